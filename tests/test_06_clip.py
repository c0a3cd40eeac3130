"""The mathematics of 06_clip.py: scenes and sentences, towers, losses, queue, measures."""

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, load_script

script = load_script(ROOT / "06_clip.py")
each_tower = pytest.mark.parametrize("tower", ["resnet", "vit"])


def model(tower="vit"):
    """A small CLIP with weights moved away from their start."""
    torch.manual_seed(0)
    net = script.CLIP(tower)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def unit(count, dim=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    v = torch.randn(count, dim, dtype=torch.float64, generator=random)
    return v / v.norm(dim=1, keepdim=True)


def read(text):
    """English -> (digit, color, digit, color, relation), by its own reading of the grammar."""
    things = [(script.DIGITS.index(d), list(script.INKS).index(c)) for c, d in re.findall(
        rf"({'|'.join(script.INKS)}) ({'|'.join(script.DIGITS)})", text)]
    word = re.search("above|below|left|right", text).group()
    if "with" in text:  # "a B with an A above it"
        things = things[::-1]
    if word in ("below", "right"):
        things = things[::-1]
    return (*things[0], *things[1], int(word in ("left", "right")))


# ---- Scenes and sentences ------------------------------------------------------------------------


def test_every_sentence_reads_back_as_its_scene():
    scenes = script.SCENES
    assert scenes.unique(dim=0).equal(scenes) and len(scenes) == 7200
    assert script.number(scenes).equal(torch.arange(7200))
    for scene in scenes[::7].tolist():
        told = [script.sentence(scene, k) for k in range(8)]
        assert len(set(told)) == 8 and {read(text) for text in told} == {tuple(scene)}
    assert script.sentence([3, 0, 7, 2, 0]) == "a red three above a blue seven"
    assert script.sentence([3, 0, 7, 2, 0], 5) == "the blue seven is below the red three"


def test_tokens_have_start_words_and_end():
    row = script.tokenize(["a red three above a blue seven"])[0].tolist()
    words = [script.WORDS[i - 1] for i in row[1:8]]
    assert " ".join(words) == "a red three above a blue seven"
    assert row[0] == script.START and row[8:] == [script.END, 0, 0, 0, 0]
    assert all(script.CLIP(name).end == script.END for name in ("vit", "resnet"))  # looked for
    book = torch.stack([script.say(script.SCENES, k) for k in range(8)], 1)
    assert book.shape == (7200, 8, 13) and len(book.flatten(0, 1).unique(dim=0)) == 57600
    scene = [9, 1, 4, 5, 1]
    at = script.number(torch.tensor(scene))
    assert book[at].equal(script.tokenize([script.sentence(scene, k) for k in range(8)]))
    torch.manual_seed(0)
    drawn = script.say(script.SCENES)  # each in any of its eight sayings
    fits = (book == drawn[:, None]).all(2)
    assert fits.sum(1).eq(1).all() and fits.sum(0).min() > 800


def test_a_text_keeps_its_end_when_it_is_cut():
    rows = script.tokenize(["", "a " * 11, "a " * 30])
    a = script.WORDS.index("a") + 1
    assert rows[0].tolist() == [script.START, script.END] + [0] * 11
    assert rows[1].tolist() == rows[2].tolist() == [script.START] + [a] * 11 + [script.END]


def digits(count=40):
    """Squares of different size as digits, so that the picture tells the label."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[13 - label:15 + label, 13 - label:15 + label] = 255
    return images, labels


def test_held_out_pairs_never_occur_in_training_and_always_where_asked():
    pairs = digits()
    torch.manual_seed(0)
    _, scenes = script.sample_pairs(*pairs, torch.arange(40).repeat(250), share=0.5)
    told = {(d, c) for d1, c1, d2, c2, _ in scenes.tolist() for d, c in ((d1, c1), (d2, c2))}
    never = {(d, d % 6) for d in range(10)}
    assert len(told) == 50 and not told & never
    assert not script.held_out(scenes).any()
    _, scenes = script.sample_pairs(*pairs, torch.arange(40).repeat(25), held=True)
    assert all({(d1, c1), (d2, c2)} & never for d1, c1, d2, c2, _ in scenes.tolist())
    both = sum((d1, c1) in never and (d2, c2) in never for d1, c1, d2, c2, _ in scenes.tolist())
    assert 250 < both < 420  # a third
    assert script.held_out(script.SCENES).float().mean() == pytest.approx(1 - (5 / 6)**2)


def test_an_image_shows_its_scene():
    torch.manual_seed(0)
    pictures, scenes = script.sample_pairs(*digits(), torch.arange(40).repeat(5), share=0.5)
    assert pictures.shape == (200, 3, 40, 40) and pictures.min() == 0 and pictures.max() <= 1
    colors = torch.tensor(list(script.INKS.values()))
    for picture, (d1, c1, d2, c2, relation) in zip(pictures, scenes.tolist()):
        halves = picture.split(20, 1 + relation)  # above: rows, left of: columns
        for half, d, c in zip(halves, (d1, d2), (c1, c2)):
            hue = half.flatten(1).sum(1)
            assert F.cosine_similarity(hue, colors[c], 0) > 0.999  # its color, and no other's
            area = (half.amax(0) > 0.3).sum()  # of a square of 2 + 2d pixels, 0.52 to 0.64 · 40/28
            assert 0.7 * (0.74 * (2 + 2 * d))**2 - 4 < area < 1.3 * (0.92 * (2 + 2 * d))**2 + 4


def test_a_twin_has_the_same_words_and_another_meaning():
    torch.manual_seed(0)
    scenes = script.SCENES
    scenes = scenes[~script.held_out(scenes)]
    twin, move = script.twins(scenes)
    assert not script.held_out(twin).any() and twin[:, 4].equal(scenes[:, 4])
    assert 0.5 < move.float().mean() < 0.8
    same = (scenes[:, :2] == scenes[:, 2:4]).all(1)
    assert (twin != scenes).any(1).equal(~same)  # two equal ones have no twin
    for old, new, moved in zip(scenes[::5].tolist(), twin[::5].tolist(), move[::5].tolist()):
        d1, c1, d2, c2, relation = old
        assert new == ([d2, c2, d1, c1, relation] if moved else [d1, c2, d2, c1, relation])
    pairs = digits()
    _, drawn = script.sample_pairs(*pairs, torch.arange(40), share=0.25)
    said = [sorted(script.sentence(s).replace("above", "").split()) for s in drawn.tolist()]
    assert said[30:] == said[:10] and drawn[30:].ne(drawn[:10]).any(1).sum() > 5


def test_different_scenes_are_different():
    pairs = digits()
    torch.manual_seed(0)
    images, scenes = script.different_pairs(*pairs, 1000, False)
    assert len(images) == len(scenes) == len(scenes.unique(dim=0)) == 1000


# ---- The towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_own(causal):
    torch.manual_seed(0)
    ours, torchs = script.Attention(24, 3, causal), nn.MultiheadAttention(24, 3, batch_first=True)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    assert torch.allclose(ours(x), torchs(x, x, x, attn_mask=mask)[0], atol=1e-6)


def test_attention_pooling_asks_with_the_mean_only():
    torch.manual_seed(0)
    pool, x = script.AttentionPool2d(3, 24, 2, 5), torch.randn(4, 24, 3, 3)
    torchs = nn.MultiheadAttention(24, 2, batch_first=True)
    torchs.in_proj_weight.data = torch.cat([pool.q_proj.weight, pool.k_proj.weight,
                                            pool.v_proj.weight])
    torchs.in_proj_bias.data = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    torchs.out_proj.weight.data, torchs.out_proj.bias.data = torch.eye(24), torch.zeros(24)
    places = torch.stack([x[:, :, i // 3, i % 3] for i in range(9)], 1)
    places = torch.cat([places.mean(1, keepdim=True), places], 1) + pool.positional_embedding
    wanted = pool.c_proj(torchs(places, places, places)[0][:, 0])
    assert torch.allclose(pool(x), wanted, atol=1e-6)


def test_blocks_start_as_the_identity_of_the_residual_tower():
    block = script.Bottleneck(32, 8, 1)
    x = torch.rand(4, 32, 6, 6)
    assert block(x).equal(x)
    halved = script.Bottleneck(32, 16, 2)(x)
    assert halved.shape == (4, 64, 3, 3)


def block_names(prefix, depth, width):
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
              "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
              "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
              "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    return {f"{prefix}.resblocks.{i}.{k}": v for i in range(depth) for k, v in shapes.items()}


TEXT = {"positional_embedding": (77, 512), "token_embedding.weight": (49408, 512),
        "ln_final.weight": (512,), "ln_final.bias": (512,), "logit_scale": (),
        **block_names("transformer", 12, 512)}


def shapes(name):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in script.CLIP(name).state_dict().items()}


def test_parameters_are_those_of_a_published_vit_b_32():
    wanted = {**TEXT, "text_projection": (512, 512), "visual.class_embedding": (768,),
              "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
              "visual.conv1.weight": (768, 3, 32, 32), "visual.ln_pre.weight": (768,),
              "visual.ln_pre.bias": (768,), "visual.ln_post.weight": (768,),
              "visual.ln_post.bias": (768,), **block_names("visual.transformer", 12, 768)}
    found = shapes("ViT-B/32")
    assert found == wanted and sum(map(math.prod, found.values())) == 151_277_313


def test_parameters_are_those_of_a_published_rn50():
    wanted = {**TEXT, "text_projection": (512, 1024), "visual.attnpool.positional_embedding":
              (50, 2048), "visual.attnpool.c_proj.weight": (1024, 2048),
              "visual.attnpool.c_proj.bias": (1024,)}
    for letter in "qkv":
        wanted[f"visual.attnpool.{letter}_proj.weight"] = (2048, 2048)
        wanted[f"visual.attnpool.{letter}_proj.bias"] = (2048,)

    def conv(name, norm, out, inputs, side):
        wanted[f"visual.{name}.weight"] = (out, inputs, side, side)
        wanted.update({f"visual.{norm}.{k}": (out,)
                       for k in ("weight", "bias", "running_mean", "running_var")})
        wanted[f"visual.{norm}.num_batches_tracked"] = ()

    for i, (out, inputs) in enumerate(((32, 3), (32, 32), (64, 32)), 1):
        conv(f"conv{i}", f"bn{i}", out, inputs, 3)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        planes = 64 * 2**stage
        for i in range(blocks):
            at = f"layer{stage + 1}.{i}."
            conv(at + "conv1", at + "bn1", planes, inputs, 1)
            conv(at + "conv2", at + "bn2", planes, planes, 3)
            conv(at + "conv3", at + "bn3", 4 * planes, planes, 1)
            if i == 0:
                conv(at + "downsample.0", at + "downsample.1", 4 * planes, inputs, 1)
            inputs = 4 * planes
    assert shapes("RN50") == wanted


def test_the_mlp_of_a_block_is_its_formula():
    torch.manual_seed(0)
    block, x = script.ResidualAttentionBlock(16, 2, False, 1), torch.randn(3, 5, 16)
    torch.nn.init.zeros_(block.attn.out_proj.weight)  # no attention
    h = block.mlp["c_fc"](F.layer_norm(x, (16,)))
    expected = x + block.mlp["c_proj"](h / (1 + torch.exp(-1.702 * h)))
    torch.testing.assert_close(block(x), expected)


def test_a_text_is_read_off_at_its_end_and_no_token_looks_ahead():
    net = model()
    text = script.tokenize(["a red three above a blue seven"]).repeat(3, 1)
    text[1, 9:] = torch.tensor([4, 2, 7, script.END])  # after the end, even a second end
    text[2, 3] = 5
    pooled, encodings = net.encode_text(text, tokens=True)
    assert torch.allclose(pooled[1], pooled[0], atol=1e-6)
    assert torch.allclose(encodings[1], encodings[0], atol=1e-6)
    assert encodings.shape == (3, 13, 96) and encodings[:, 9:].abs().max() == 0
    assert encodings[:, 8].abs().min() > 0
    assert torch.allclose(encodings[:, 8] @ net.text_projection, pooled, atol=1e-6)
    assert torch.allclose(encodings[2, :3], encodings[0, :3], atol=1e-6)  # before the change
    assert (encodings[2, 3:9] - encodings[0, 3:9]).abs().amax(1).min() > 1e-3  # and from it on
    assert torch.equal(net.encode_text(text), pooled)


def test_the_end_is_found_by_its_id_not_as_the_largest():
    net = model()
    net.end = 3
    text = torch.tensor([[28, 9, 3, 20, 0]])  # 28 and 20 are larger than 3
    pooled, encodings = net.encode_text(text, tokens=True)
    assert torch.allclose(encodings[:, 2] @ net.text_projection, pooled, atol=1e-6)


@each_tower
def test_logits_are_cosines_times_the_scale_and_images_stay_apart(tower):
    net = model(tower).double()
    images = torch.rand(3, 3, 40, 40, dtype=torch.float64)
    text = script.tokenize(["a red one above a blue two"] * 2)
    logits = net(images, text)
    u, w = net.encode_image(images), net.encode_text(text)
    for i in range(3):
        for j in range(2):
            cosine = (u[i] @ w[j]) / (u[i].norm() * w[j].norm())
            assert logits[i, j].item() == pytest.approx((net.logit_scale.exp() * cosine).item(),
                                                        abs=1e-9)
    assert torch.allclose(net.encode_image(images[1:2]), u[1:2], atol=1e-9)
    moved = net.encode_image(images.roll(8, 3))
    assert (moved - u).abs().max() > 1e-5  # places matter


# ---- Losses --------------------------------------------------------------------------------------


def test_the_loss_is_exercise_6_1_in_plain_loops():
    images, texts, scale = unit(5), unit(5, seed=1), 7.0
    logits = [[scale * sum(a * b for a, b in zip(u, w)) for w in texts.tolist()]
              for u in images.tolist()]
    loss_i = -sum(math.log(math.exp(logits[a][a]) / sum(math.exp(logits[a][c]) for c in range(5)))
                  for a in range(5)) / 5
    loss_t = -sum(math.log(math.exp(logits[a][a]) / sum(math.exp(logits[c][a]) for c in range(5)))
                  for a in range(5)) / 5
    ours = [v.item() for v in script.clip_loss(images, texts, scale)]
    assert ours == pytest.approx([loss_i, loss_t], rel=1e-12) and loss_i != loss_t
    assert [v.item() for v in script.clip_loss(texts, images, scale)] == pytest.approx(ours[::-1])


def test_identical_features_cost_the_logarithm_of_the_batch():
    same = unit(1).expand(6, -1)
    for loss in script.clip_loss(same, same, 50.0):
        assert loss.item() == pytest.approx(math.log(6))


def test_equal_captions_cost_their_logarithm_unless_they_are_no_negatives():
    numbers = torch.arange(12) % 4  # each caption three times
    perfect = torch.eye(8, dtype=torch.float64)[numbers]
    for loss in script.clip_loss(perfect, perfect, 100.0):
        assert loss.item() == pytest.approx(math.log(3))  # the best there is
    for loss in script.clip_loss(perfect, perfect, 100.0, numbers[:, None] == numbers):
        assert loss.item() == pytest.approx(0, abs=1e-12)
    plain = script.clip_loss(unit(4), unit(4, seed=1), 5.0)
    alone = script.clip_loss(unit(4), unit(4, seed=1), 5.0, torch.eye(4, dtype=torch.bool))
    assert [v.item() for v in plain] == [v.item() for v in alone]


def queue(size=6, momentum=0.9):
    holder = nn.Linear(2, 2)
    holder.text_projection = nn.Parameter(torch.zeros(2, 8, dtype=torch.float64))
    return script.Momentum(holder, size, momentum)


def test_itc_is_exercise_6_8_in_plain_loops():
    images, texts, slow_images, slow_texts = (unit(3, seed=s) for s in range(4))
    past = queue(4)
    past.push(unit(2, seed=5), unit(2, seed=6), torch.tensor([7, 1]))
    numbers, scale = torch.tensor([0, 1, 2]), 3.0
    losses = script.itc_loss(images, texts, slow_images, slow_texts, past, numbers, scale)
    for loss, fast, slow, old in ((losses[0], images, slow_texts, past.texts),
                                  (losses[1], texts, slow_images, past.images)):
        total = 0
        for a in range(3):
            others = [slow[b] for b in range(3)] + [old[0]]
            if a != 1:  # the second in the queue says the same as number 1 of the batch
                others.append(old[1])
            p = [math.exp(scale * (fast[a] @ v).item()) for v in others]
            total -= math.log(p[a] / sum(p)) / 3
        assert loss.item() == pytest.approx(total, rel=1e-9)


def test_itc_without_momentum_and_queue_is_clip():
    images, texts, numbers = unit(5), unit(5, seed=1), torch.tensor([0, 1, 2, 1, 4])
    itc = script.itc_loss(images, texts, images, texts, queue(), numbers, 9.0)
    clip = script.clip_loss(images, texts, 9.0, numbers[:, None] == numbers)
    assert [v.item() for v in itc] == pytest.approx([v.item() for v in clip])
    full = queue()
    full.push(unit(1).expand(6, -1), unit(1).expand(6, -1), torch.arange(10, 16))
    same = unit(1).expand(5, -1)
    for loss in script.itc_loss(same, same, same, same, full, torch.arange(5), 9.0):
        assert loss.item() == pytest.approx(math.log(5 + 6))


def test_the_queue_wraps_round_and_holds_no_gradient():
    past = queue(6)
    for step in range(4):
        images = torch.full((4, 8), float(step), dtype=torch.float64, requires_grad=True)
        past.push(images * 1, images * 2, torch.arange(4) + 4 * step)
    assert sorted(past.numbers.tolist()) == list(range(10, 16))  # the six youngest of sixteen
    assert past.numbers.tolist() == [12, 13, 14, 15, 10, 11]
    assert past.images[:, 0].tolist() == [3, 3, 3, 3, 2, 2]
    assert past.texts[:, 0].tolist() == [6, 6, 6, 6, 4, 4]
    assert not past.images.requires_grad and not past.texts.requires_grad
    past.push(unit(9), unit(9), torch.arange(20, 29))  # more than it holds
    assert sorted(past.numbers.tolist()) == list(range(23, 29))


def test_momentum_is_a_geometric_mean_of_the_past():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    model.text_projection = nn.Parameter(torch.zeros(1, 8))
    past = script.Momentum(model, 2, 0.9)
    model.weight.data.fill_(3.0)
    for _ in range(5):
        past.update(model)
    assert past.slow.weight.item() == pytest.approx(3 + (1 - 3) * 0.9**5)
    assert not past.slow.weight.requires_grad and model.weight.item() == 3


def learner(tower="vit", loss="clip", **more):
    config = script.Config(tower=tower, queue=50, **more)
    torch.manual_seed(0)
    return script.Learner(script.CLIP(tower), config, loss, 16)


def batch(count=16):
    torch.manual_seed(0)
    pairs = digits()
    images, scenes = script.different_pairs(*pairs, count, False)
    return images, script.say(scenes), script.number(scenes)


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_gradients_reach_both_towers_and_the_temperature(loss):
    one = learner(loss=loss)
    one.loss(*batch())
    losses = one.loss(*batch())
    sum(losses).backward()
    silent = [k for k, p in one.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    if loss == "itc":
        assert not any(p.requires_grad or p.grad is not None for p in one.memory.slow.parameters())
        assert one.memory.numbers[:32].ge(0).all() and one.memory.numbers[32:].lt(0).all()


def test_the_temperature_stays_below_a_hundred_after_a_huge_step():
    for start in (math.log(99), 0.01):
        one = learner()
        one.model.logit_scale.data.fill_(start)
        for sign in (-1, 1):
            one.step([sign * one.model.logit_scale * 1.0] * 2, lr=50.0)
            assert 1 <= one.model.logit_scale.exp().item() <= 100.001


def test_the_slow_copy_follows_every_step():
    one = learner(loss="itc", momentum=0.5)
    before = copy.deepcopy(one.model.state_dict())
    one.step(one.loss(*batch()), lr=1e-2)
    after = one.model.state_dict()
    key = "visual.proj"
    assert not after[key].equal(before[key])
    assert torch.allclose(one.memory.slow.state_dict()[key], (before[key] + after[key]) / 2)


def test_the_first_loss_of_itc_is_that_of_clip():
    clip, itc = (learner(loss=name).loss(*batch()) for name in ("clip", "itc"))
    assert [v.item() for v in itc] == pytest.approx([v.item() for v in clip], rel=1e-5)
    assert abs(clip[0] - clip[1]) > 1e-4  # else an exchange of the two would not show


@each_tower
def test_16_pairs_can_be_learned_by_heart(tower):
    one, data = learner(tower), batch()
    start = sum(v.item() for v in one.loss(*data)) / 2
    for _ in range(60):
        losses = one.loss(*data)
        one.step(losses, lr=2e-3)
    assert 2 < start < 5 and max(v.item() for v in losses) < 0.1


# ---- What is measured ----------------------------------------------------------------------------


def test_recall_is_known_where_ranks_are():
    similarity = torch.tensor([[3., 2, 1], [3, 2, 1], [3, 2, 1]])  # ranks 1, 2, 3
    assert [script.recall(similarity, k).tolist() for k in (1, 2, 3)] == [
        [True, False, False], [True, True, False], [True, True, True]]
    assert not script.recall(torch.ones(4, 4), 1).any()  # no choice is no success
    assert not script.recall(torch.full((4, 4), math.nan), 1).any()


def axes(scenes, parts):
    """Features that tell only some of digit, color and place, in exact codes."""
    rows = []
    for d1, c1, d2, c2, relation in scenes.tolist():
        code = torch.zeros(2, 2, 10, 6)  # relation, place, digit, color
        first, second = code[relation if "relation" in parts else 0]
        if "places" not in parts:
            second = first
        if "binding" in parts:
            first[d1, c1] += 1
            second[d2, c2] += 1
        else:
            first[d1, :] += 1 / 6
            first[:, c1] += 1 / 10
            second[d2, :] += 1 / 6
            second[:, c2] += 1 / 10
        rows.append(code.flatten())
    return F.normalize(torch.stack(rows), dim=1)


def test_measures_know_a_perfect_model():
    scenes = script.SCENES[5::61]
    parts = ("relation", "places", "binding")
    got = script.evaluate(axes(scenes, parts), axes(script.SCENES, parts), scenes)
    assert all(v == 1 for v in got.values()), got
    assert set(got) == set(script.chance(len(scenes)))


def test_measures_know_a_bag_of_words():
    random = torch.Generator().manual_seed(0)
    every = script.SCENES
    scenes = every[torch.randperm(7200, generator=random)[:400]]
    noise = 1e-3 * torch.randn(7200, 240, generator=random)  # equal captions: a toss
    got = script.evaluate(axes(scenes, ("relation",)), axes(every, ("relation",)) + noise, scenes)
    for name in ("colors exchanged", "digits exchanged", "places exchanged", "relation"):
        assert got[name] == pytest.approx(0.5, abs=0.1), name
    assert got["color"] == 1 and got["digit"] == 1  # words alone suffice for these
    got = script.evaluate(axes(scenes, ()), axes(every, ()) + noise, scenes)
    assert got["relation"] == pytest.approx(0.25, abs=0.1)


def test_features_that_bind_but_know_no_place_fail_only_there():
    random = torch.Generator().manual_seed(0)
    every = script.SCENES
    scenes = every[torch.randperm(7200, generator=random)[:400]]
    noise = 1e-3 * torch.randn(7200, 240, generator=random)
    parts = ("relation", "binding")
    got = script.evaluate(axes(scenes, parts), axes(every, parts) + noise, scenes)
    assert got["colors exchanged"] == 1 and got["digits exchanged"] == 1
    assert got["places exchanged"] == pytest.approx(0.5, abs=0.1)


def test_foils_are_as_new_as_their_captions():
    scenes = script.SCENES
    seen = scenes[~script.held_out(scenes)]
    similarity = torch.zeros(len(seen), 7200)
    similarity[:, script.held_out(scenes)] = 1  # a model that loves whatever it never saw
    similarity[torch.arange(len(seen)), script.number(seen)] = 0.5
    got = script.evaluate(similarity, torch.eye(7200), seen)
    assert {got[name] for name in got if "exchanged" in name} == {1.0}


# ---- The whole -----------------------------------------------------------------------------------


def test_both_losses_are_compared_and_a_prompt_is_answered(tmp_path, capsys):
    flags = ["--quick", "--data", "drawn", "--epochs", "1", "--train-size", "100", "--out",
             str(tmp_path)]
    assert script.main([*flags, "--compare", "--prompt", "a red three; a blue two above a red one"]
                       ) == 0
    kept = json.loads((tmp_path / "06_clip" / "metrics.json").read_text())
    assert list(kept["results"])[:4] == ["clip B/8", "itc B/8", "clip B", "itc B"]
    assert {"clip B/8 loss_i", "itc B R@1 new", "itc B/8 e^t"} <= set(kept["history"][-1])
    assert (tmp_path / "06_clip" / "prompts.png").exists()
    assert script.main([*flags, "--prompt", "a pink three"]) == 2
    assert "'pink' is unknown; the words are: a above" in capsys.readouterr().err


def test_captions_that_are_equally_near_are_not_preferred():
    scenes = script.SCENES[[14, 1507, 3330, 6001]]
    results = script.evaluate(torch.ones(4, 1), torch.ones(7200, 1), scenes)
    for name in ("digit", "color", "relation", "colors exchanged", "places exchanged"):
        assert results[name] == 0, name
