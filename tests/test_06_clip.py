"""The mathematics of 06_clip.py: scenes and sentences, towers, losses, queue, measures."""

import copy
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, load_script

script = load_script(ROOT / "06_clip.py")


def model():
    """The small CLIP with weights moved away from their start."""
    torch.manual_seed(0)
    net = script.small_clip()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def unit(count, dim=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    v = torch.randn(count, dim, dtype=torch.float64, generator=random)
    return v / v.norm(dim=1, keepdim=True)


AXIS = "axis (above or left)"


def every_scene():
    sizes = [10, len(script.COLORS), 10, len(script.COLORS), 2]
    return torch.cartesian_prod(*map(torch.arange, sizes))


def held_out(scenes):
    return (scenes[:, [0, 2]] % len(script.COLORS) == scenes[:, [1, 3]]).any(1)


def read(text):
    """English -> (digit, color, digit, color, relation), by its own reading of the grammar."""
    things = [(script.DIGITS.index(d), list(script.COLORS).index(c)) for c, d in re.findall(
        rf"({'|'.join(script.COLORS)}) ({'|'.join(script.DIGITS)})", text)]
    word = re.search("above|below|left|right", text).group()
    if "with" in text:  # "a B with an A above it"
        things = things[::-1]
    if word in ("below", "right"):
        things = things[::-1]
    return (*things[0], *things[1], int(word in ("left", "right")))


# ---- Scenes and sentences ------------------------------------------------------------------------


def test_every_sentence_reads_back_as_its_scene():
    for scene in every_scene()[::7].tolist():
        told = [script.caption(scene, way) for way in range(8)]
        assert len(set(told)) == 8 and {read(text) for text in told} == {tuple(scene)}
    assert script.caption([3, 0, 7, 2, 0]) == "a red three above a blue seven"
    assert script.caption([3, 0, 7, 2, 0], 5) == "the blue seven is below the red three"


def test_names_and_colors_are_what_they_say():
    assert script.DIGITS == "zero one two three four five six seven eight nine".split()
    bright = {name: "".join(c for c, v in zip("RGB", rgb) if v == 1)
              for name, rgb in script.COLORS.items()}
    assert bright == {"red": "R", "green": "G", "blue": "B", "yellow": "RG", "magenta": "RB",
                      "white": "RGB"}
    assert script.WORDS == sorted(set(script.WORDS))  # the same ids in the next run, for --load
    assert all(word.isalpha() for word in script.WORDS)


def test_tokens_have_start_words_and_end():
    row = script.tokenize(["a red three above a blue seven"])[0].tolist()
    words = [script.WORDS[i - 1] for i in row[1:8]]
    assert " ".join(words) == "a red three above a blue seven"
    assert row[0] == script.START and row[8:] == [script.END] + [0] * (script.LENGTH - 9)
    scenes = every_scene()[::11].tolist()
    book = script.tokenize([script.caption(scene, way) for scene in scenes for way in range(8)])
    assert book.shape == (8 * len(scenes), script.LENGTH)
    assert len(book.unique(dim=0)) == len(book)  # no two sentences have the same tokens
    assert book.max() == script.END and (book == script.END).sum(1).eq(1).all()
    assert script.small_clip().token_embedding.num_embeddings == script.END + 1


def digits(count=40):
    """Squares of different size as digits, so that the picture tells the label."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[13 - label:15 + label, 13 - label:15 + label] = 255
    return images, labels


def test_held_out_pairs_never_occur_in_training_and_always_where_asked():
    labels = digits()[1]
    torch.manual_seed(0)
    first = torch.arange(40).repeat(250)
    scenes, index = script.sample_scenes(labels, first)
    assert index[:, 0].equal(first) and index[:, 1].bincount().min() > 150
    assert labels[index].equal(scenes[:, [0, 2]])
    assert not held_out(scenes).any()
    told = {(d, c) for d1, c1, d2, c2, _ in scenes.tolist() for d, c in ((d1, c1), (d2, c2))}
    assert len(told) == 50  # all the others occur
    assert scenes[:, 4].float().mean() == pytest.approx(0.5, abs=0.03)
    scenes, _ = script.sample_scenes(labels, first, held_out=True)
    assert (scenes[:, 1] == scenes[:, 0] % 6).all() and not (scenes[:, 3] == scenes[:, 2] % 6).any()
    both, _ = script.twins(scenes, index)
    assert held_out(both).all()


def test_an_image_shows_its_scene():
    torch.manual_seed(0)
    images, labels = digits()
    small = labels < 8  # larger squares reach into the other half
    images, labels = images[small], labels[small]
    scenes, index = script.sample_scenes(labels, torch.arange(32).repeat(6))
    twin, twin_index = script.twins(scenes, index)
    scenes, index = torch.cat([scenes, twin]), torch.cat([index, twin_index])
    pictures = script.render(images[index], scenes)
    assert pictures.shape == (384, 3, 40, 40) and pictures.min() == 0 and pictures.max() <= 1
    colors = torch.tensor(list(script.COLORS.values()))
    for picture, (d1, c1, d2, c2, relation) in zip(pictures, scenes.tolist()):
        halves = picture.split(20, 1 + relation)  # above: rows, left of: columns
        for half, d, c in zip(halves, (d1, d2), (c1, c2)):
            hue = half.flatten(1).sum(1)
            assert F.cosine_similarity(hue, colors[c], 0) > 0.999  # its color, and no other's
            area = (half.amax(0) > 0.3).sum()  # of a square of 2 + 2d pixels, 0.52 to 0.64 · 40/28
            assert 0.7 * (0.74 * (2 + 2 * d))**2 - 4 < area < 1.3 * (0.92 * (2 + 2 * d))**2 + 4


def test_places_and_sizes_are_random_within_bounds():
    torch.manual_seed(0)
    spot = torch.zeros(500, 2, 28, 28, dtype=torch.uint8)
    spot[:, 0, 13:15, 13:15] = 255  # only the first digit has ink
    scenes = torch.tensor([0, 5, 0, 5, 0]).repeat(500, 1)  # white, above
    picture = script.render(spot, scenes)[:, 0]
    line = torch.arange(40) + 0.5 - 20
    mass = picture.sum((1, 2))
    y = (picture.sum(2) * line).sum(1) / mass / 20
    x = (picture.sum(1) * line).sum(1) / mass / 20
    assert y.mean() == pytest.approx(-0.5, abs=0.02) and abs(x.mean()) < 0.02
    assert y.std() > 0.03 and x.std() > 0.03 and (y + 0.5).abs().max() < 0.13


def test_both_digits_have_a_size_and_a_place_of_their_own():
    torch.manual_seed(0)
    spot = torch.zeros(500, 2, 28, 28, dtype=torch.uint8)
    spot[:, :, 7:21, 7:21] = 255
    halves = script.render(spot, torch.tensor([0, 5, 0, 5, 0]).repeat(500, 1))[:, 0].view(500, 2, 20, 40)
    mass = halves.sum((2, 3))
    sizes = mass.sqrt() / 20
    x = (halves.sum(2) * torch.arange(40.0)).sum(2) / mass
    assert sizes.min() > 0.51 and sizes.max() < 0.65 and sizes.std(0).min() > 0.03
    assert abs(torch.corrcoef(sizes.T)[0, 1]) < 0.2 and abs(torch.corrcoef(x.T)[0, 1]) < 0.2


def test_where_digits_overlap_the_picture_stays_in_bounds():
    full = torch.full((50, 2, 28, 28), 255, dtype=torch.uint8)
    white = torch.tensor([0, 5, 0, 5, 0]).repeat(50, 1)
    assert script.render(full, white).max().item() == pytest.approx(1)


def test_a_twin_has_the_same_words_and_another_meaning():
    torch.manual_seed(0)
    scenes, index = script.sample_scenes(digits()[1], torch.arange(40))
    twin, twin_index = script.twins(scenes, index)
    assert twin_index.equal(index[:, [1, 0]])
    for old, new in zip(scenes.tolist(), twin.tolist()):
        d1, c1, d2, c2, relation = old
        assert new == [d2, c2, d1, c1, relation]
        assert sorted(script.caption(old).split()) == sorted(script.caption(new).split())


def test_a_new_color_is_one_line(monkeypatch):
    source = (ROOT / "06_clip.py").read_text(encoding="utf-8")
    line = '"white": (1, 1, 1)}'
    assert source.count(line) == 1
    names = {"__name__": "copy"}
    exec(compile(source.replace(line, '"white": (1, 1, 1), "cyan": (0.25, 1, 1)}'), "copy", "exec"), names)
    torch.manual_seed(0)
    images, labels = digits()
    scenes, index = names["sample_scenes"](labels, torch.arange(40).repeat(50))
    assert scenes[:, [1, 3]].unique().tolist() == list(range(7))
    assert not (scenes[:, [0, 2]] % 7 == scenes[:, [1, 3]]).any()
    cyan = scenes[scenes[:, 1] == 6][:1]
    assert "cyan" in names["caption"](cyan[0].tolist()) and "cyan" in names["WORDS"]
    shown = names["render"](images[index[scenes[:, 1] == 6][:1]], cyan)[0]
    half = shown.split(20, 1 + cyan[0, 4])[0].flatten(1).sum(1)
    assert half[0] < half[1]  # cyan: little red
    net = names["small_clip"]()
    tokens = names["tokenize"]([names["caption"](scene) for scene in scenes.tolist()])
    assert net.token_embedding.num_embeddings > tokens.max()
    assert names["CHANCE"]["color"] == pytest.approx(1 / 7)
    assert names["get_args"](["--prompt", "a cyan zero above a red one"]).prompt
    found = names["evaluate"](net, images, labels, False)
    assert set(found) == set(names["CHANCE"])


# ---- The towers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_own(causal):
    torch.manual_seed(0)
    ours, torchs = script.Attention(24, 3, causal), nn.MultiheadAttention(24, 3, batch_first=True)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    assert torch.allclose(ours(x), torchs(x, x, x, attn_mask=mask)[0], atol=1e-6)


def block_names(prefix, depth, width):
    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
              "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
              "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
              "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"ln_{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    return {f"{prefix}.resblocks.{i}.{k}": v for i in range(depth) for k, v in shapes.items()}


def test_parameters_are_those_of_a_published_vit_b_32():
    wanted = {"positional_embedding": (77, 512), "token_embedding.weight": (49408, 512),
              "ln_final.weight": (512,), "ln_final.bias": (512,), "logit_scale": (),
              **block_names("transformer", 12, 512),
              "text_projection": (512, 512), "visual.class_embedding": (768,),
              "visual.positional_embedding": (50, 768), "visual.proj": (768, 512),
              "visual.conv1.weight": (768, 3, 32, 32), "visual.ln_pre.weight": (768,),
              "visual.ln_pre.bias": (768,), "visual.ln_post.weight": (768,),
              "visual.ln_post.bias": (768,), **block_names("visual.transformer", 12, 768)}
    line = re.search(r"clip = (CLIP\(.*\n?.*?\))\n", script.__doc__).group(1)  # as the header says
    with torch.device("meta"):
        net = eval(line, {**vars(script), "nn": nn})
    found = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert found == wanted and sum(map(math.prod, found.values())) == 151_277_313
    heads = {block.attn.num_heads for block in net.visual.transformer["resblocks"]}
    assert heads == {12} and net.transformer["resblocks"][0].attn.num_heads == 8


def test_the_mlp_of_a_block_is_its_formula():
    torch.manual_seed(0)
    block, x = script.Block(16, 2, False), torch.randn(3, 5, 16)
    torch.nn.init.zeros_(block.attn.out_proj.weight)  # no attention
    torch.nn.init.zeros_(block.attn.out_proj.bias)
    h = block.mlp["c_fc"](F.layer_norm(x, (16,)))
    expected = x + block.mlp["c_proj"](h / (1 + torch.exp(-1.702 * h)))
    torch.testing.assert_close(block(x), expected)


def test_a_block_adds_attention_to_its_input():
    torch.manual_seed(0)
    block, x = script.Block(16, 2, False), torch.randn(3, 5, 16)
    torch.nn.init.zeros_(block.mlp["c_proj"].weight)
    torch.nn.init.zeros_(block.mlp["c_proj"].bias)
    torch.testing.assert_close(block(x), x + block.attn(F.layer_norm(x, (16,))))


def test_the_image_tower_by_hand():
    net, x = model().visual, torch.rand(3, 3, 40, 40)
    places = net.conv1(x)
    assert places.shape == (3, 64, 5, 5)
    patches = torch.stack([places[:, :, i // 5, i % 5] for i in range(25)], 1)
    tokens = torch.cat([net.class_embedding.repeat(3, 1, 1), patches], 1) + net.positional_embedding
    h = F.layer_norm(tokens, (64,), net.ln_pre.weight, net.ln_pre.bias)
    for block in net.transformer["resblocks"]:
        h = block(h)
    h = F.layer_norm(h[:, 0], (64,), net.ln_post.weight, net.ln_post.bias) @ net.proj
    torch.testing.assert_close(net(x), h)


def test_a_text_is_read_off_at_its_end_and_no_token_looks_ahead():
    net = model()
    text = script.tokenize(["a red three above a blue seven"]).repeat(3, 1)
    text[1, 9:] = torch.tensor([4, 2, 7, script.END])[: text.shape[1] - 9]  # after the end
    text[2, 3] = 5
    pooled, encodings = net.encode_text(text), net.encode_tokens(text)
    assert torch.allclose(pooled[1], pooled[0], atol=1e-6)
    assert torch.allclose(encodings[1, :9], encodings[0, :9], atol=1e-6)
    assert encodings.shape == (3, script.LENGTH, 64)
    expected = F.normalize(encodings[:, 8] @ net.text_projection, dim=1)
    assert torch.allclose(expected, pooled, atol=1e-6)
    assert torch.allclose(encodings[2, :3], encodings[0, :3], atol=1e-6)  # before the change
    assert (encodings[2, 3:9] - encodings[0, 3:9]).abs().amax(1).min() > 1e-3  # and from it on
    x = net.token_embedding(text) + net.positional_embedding
    for block in net.transformer["resblocks"]:
        x = block(x)
    torch.testing.assert_close(encodings, F.layer_norm(x, (64,), net.ln_final.weight, net.ln_final.bias))


def test_logits_are_cosines_times_the_scale_and_images_stay_apart():
    net = model().double()
    images = torch.rand(3, 3, 40, 40, dtype=torch.float64)
    text = script.tokenize(["a red one above a blue two", "a blue one above a red two"])
    logits = net(images, text)
    assert logits.shape == (3, 2)
    u = net.visual(images)
    w = net.encode_tokens(text)[:, 8] @ net.text_projection
    for i in range(3):
        for j in range(2):
            cosine = (u[i] @ w[j]) / (u[i].norm() * w[j].norm())
            assert logits[i, j].item() == pytest.approx((net.logit_scale.exp() * cosine).item(),
                                                        abs=1e-9)
    assert torch.allclose(net.visual(images[1:2]), u[1:2], atol=1e-9)
    moved = net.visual(images.roll(8, 3))
    assert (moved - u).abs().max() > 1e-5  # places matter
    assert script.small_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---- Losses --------------------------------------------------------------------------------------


class Given(nn.Module):
    """A model whose features are given: encode_image and encode_text return their argument."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        self.text_projection = nn.Parameter(torch.zeros(2, 8, dtype=torch.float64))
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def encode_image(self, images):
        return images * self.weight

    encode_text = encode_image

    def forward(self, images, texts):
        return self.logit_scale.exp() * images @ texts.T


def apart(count, start=0):
    """Scenes that all differ."""
    return every_scene()[start:start + 13 * count:13]


def test_the_loss_is_exercise_6_1_in_plain_loops():
    images, texts, scale = unit(5), unit(5, seed=1), 7.0
    logits = [[scale * sum(a * b for a, b in zip(u, w)) for w in texts.tolist()]
              for u in images.tolist()]
    loss_i = -sum(math.log(math.exp(logits[a][a]) / sum(math.exp(logits[a][c]) for c in range(5)))
                  for a in range(5)) / 5
    loss_t = -sum(math.log(math.exp(logits[a][a]) / sum(math.exp(logits[c][a]) for c in range(5)))
                  for a in range(5)) / 5
    ours = script.clip_loss(Given(scale), images, texts, apart(5)).item()
    assert ours == pytest.approx((loss_i + loss_t) / 2, rel=1e-12) and loss_i != loss_t
    matrix, scenes = torch.tensor(logits, dtype=torch.float64), apart(5)
    assert script.cross_entropy(matrix, scenes, scenes).item() == pytest.approx(loss_i)
    assert script.cross_entropy(matrix.T, scenes, scenes).item() == pytest.approx(loss_t)


def test_identical_features_cost_the_logarithm_of_the_batch():
    same = unit(1).expand(6, -1)
    assert script.clip_loss(Given(50), same, same, apart(6)).item() == pytest.approx(math.log(6))


def test_equal_captions_are_no_negatives():
    kind = torch.arange(12) % 4  # each caption three times
    perfect = torch.eye(8, dtype=torch.float64)[kind]
    assert script.clip_loss(Given(100), perfect, perfect, apart(4)[kind]).item() == pytest.approx(
        0, abs=1e-12)
    loss = script.clip_loss(Given(100), perfect, perfect, apart(12))  # as if all were different
    assert loss.item() == pytest.approx(math.log(3))
    other = apart(12)  # scenes that differ in one number only are negatives
    other = other[:1].repeat(5, 1)
    for slot in range(5):
        other[slot, slot] += 1
    assert script.clip_loss(Given(), unit(5), unit(5, seed=1), other).item() == pytest.approx(
        script.clip_loss(Given(), unit(5), unit(5, seed=1), apart(5)).item())


def itc(scale=1.0, M=4, momentum=0.995):
    net = Given(scale)
    return net, script.ITC(net, M, momentum)


def test_itc_is_exercise_6_8_in_plain_loops():
    scale = 3.0
    net, loss_function = itc(scale, momentum=0.9)
    scenes, old = apart(3), apart(2, start=3000)
    old[1] = scenes[1]  # the second in the queue says the same as number 1 of the batch
    loss_function(net, unit(2, seed=5), unit(2, seed=6), old)
    net.weight.data.fill_(1.5)  # so that slow features differ: 0.9 · 1 + 0.1 · 1.5
    images, texts = unit(3), unit(3, seed=1)
    got = loss_function(net, images, texts, scenes)
    total = 0
    for fast, slow, queue in ((images, texts, unit(2, seed=6)), (texts, images, unit(2, seed=5))):
        for a in range(3):
            others = [1.05 * slow[b] for b in range(3)] + [queue[0]]
            if a != 1:
                others.append(queue[1])
            p = [math.exp(scale * 1.5 * (fast[a] @ v).item()) for v in others]
            total -= math.log(p[a] / sum(p)) / 3 / 2
    assert got.item() == pytest.approx(total, rel=1e-9)


def test_itc_without_momentum_and_queue_is_clip():
    images, texts = unit(5), unit(5, seed=1)
    scenes = apart(5)[[0, 1, 2, 1, 4]]
    net, loss_function = itc(9.0)
    clip = script.clip_loss(net, images, texts, scenes)
    assert loss_function(net, images, texts, scenes).item() == pytest.approx(clip.item())
    net, loss_function = itc(9.0, M=6)
    same = unit(1).expand(6, -1)
    loss_function(net, same, same, apart(6, start=2000))
    loss = loss_function(net, same[:5], same[:5], apart(5))
    assert loss.item() == pytest.approx(math.log(5 + 6))


def test_slow_encoders_train_their_batchnorm_even_if_the_model_was_evaluated_before():
    net = script.small_clip().eval()
    assert script.ITC(net).slow.training and not net.training


def test_the_queue_holds_the_newest_and_no_gradient():
    net, loss_function = itc(M=6)
    for step in range(4):
        images = torch.full((4, 8), float(step), dtype=torch.float64)
        loss_function(net, images, images * 2, apart(4, start=1000 * step))
    assert loss_function.images[:, 0].tolist() == [3, 3, 3, 3, 2, 2]
    assert loss_function.texts[:, 0].tolist() == [6, 6, 6, 6, 4, 4]
    expected = torch.cat([apart(4, start=3000), apart(4, start=2000)])[:6]
    assert loss_function.scenes.equal(expected)
    assert not loss_function.images.requires_grad and not loss_function.texts.requires_grad
    loss_function(net, unit(9), unit(9), apart(9))  # more than it holds
    assert loss_function.images.shape == (6, 8)


def test_momentum_is_a_geometric_mean_of_the_past():
    net, loss_function = itc(momentum=0.9)
    net.weight.data.fill_(3.0)
    for _ in range(5):
        loss_function(net, unit(3), unit(3), apart(3))
    assert loss_function.slow.weight.item() == pytest.approx(3 + (1 - 3) * 0.9**5)
    assert net.weight.item() == 3


def batch(count=16):
    torch.manual_seed(0)
    images, labels = digits()
    scenes, index = script.sample_scenes(labels, torch.arange(count))
    tokens = script.tokenize([script.caption(scene) for scene in scenes.tolist()])
    return script.render(images[index], scenes), tokens, scenes


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_gradients_reach_both_towers_and_the_temperature(loss):
    torch.manual_seed(0)
    net = script.small_clip()
    loss_function = script.clip_loss if loss == "clip" else script.ITC(net)
    loss_function(net, *batch())
    loss_function(net, *batch()).backward()
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    if loss == "itc":
        assert all(p.grad is None for p in loss_function.slow.parameters())
        assert loss_function.images.shape == (32, 128) and len(loss_function.scenes) == 32


def test_the_first_loss_of_itc_is_that_of_clip():
    torch.manual_seed(0)
    net = script.small_clip()
    clip, first = script.clip_loss(net, *batch()), script.ITC(net)(net, *batch())
    assert first.item() == pytest.approx(clip.item(), rel=1e-5)


def test_16_pairs_can_be_learned_by_heart():
    torch.manual_seed(0)
    net, data = script.small_clip(), batch()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    start = script.clip_loss(net, *data).item()
    for _ in range(60):
        loss = script.clip_loss(net, *data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 2 < start < 5 and loss.item() < 0.1


# ---- Training ------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A model with one parameter, which the loss function below reads."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))


def train(net, loss_function, *flags, count=40):
    images, labels = digits(count)
    history = []
    script.train(script.get_args(list(flags)), net, loss_function, images, labels, history)
    return history


def test_training_shows_scenes_twins_and_all_ways_to_say_them(monkeypatch):
    torch.manual_seed(0)
    seen, drawn, original = [], [], script.render

    def render(pictures, scenes):
        drawn.append((pictures.clone(), scenes.clone()))
        return original(pictures, scenes)

    monkeypatch.setattr(script, "render", render)

    def loss_function(net, images, tokens, scenes):
        seen.append((images, tokens, scenes.clone()))
        return net.w

    history = train(Tiny(), loss_function, "--epochs", "3", "--batch-size", "40", "--twins", "0.25",
                    count=400)
    assert len(seen) == 30 and len(history) >= 10
    ways, firsts = set(), []
    for (images, tokens, scenes), (pictures, shown) in zip(seen, drawn):
        assert scenes.equal(shown) and len(images) == len(tokens) == len(scenes) == 40
        for scene, row, (one, two) in zip(scenes.tolist(), tokens, pictures):
            told = [script.tokenize([script.caption(scene, way)])[0] for way in range(8)]
            way = [row.equal(tokens) for tokens in told].index(True)
            ways.add(way)
            for picture, digit in ((one, scene[0]), (two, scene[2])):  # each digit's own picture
                assert (picture > 0).sum() == (2 + 2 * digit)**2
        assert scenes[:10].equal(scenes[10:20][:, [2, 3, 0, 1, 4]])  # the twins
        assert not held_out(scenes).any()
        firsts += scenes[10:, 0].tolist()
    assert ways == set(range(8))
    assert 60 < min(np.bincount(firsts)) and max(np.bincount(firsts)) < 120
    assert len({tuple(scenes.flatten().tolist()) for _, _, scenes in seen}) == 30


def test_no_twins_where_none_are_wanted():
    seen = []

    def loss_function(net, images, tokens, scenes):
        seen.append(scenes.clone())
        return net.w

    train(Tiny(), loss_function, "--epochs", "2", "--batch-size", "40", "--twins", "0")
    one, two = seen
    assert sorted(one[:, 0].tolist()) == sorted(two[:, 0].tolist()) == sorted(digits()[1].tolist())


def test_training_is_adam_with_one_cycle_and_a_bounded_temperature():
    losses = []

    def loss_function(net, images, tokens, scenes):
        loss = (net.w - 2).square() + 0.5 * net.w - net.logit_scale
        losses.append(loss.item())
        return loss

    net = Tiny()
    history = train(net, loss_function, "--epochs", "9", "--batch-size", "16", "--lr", "0.4")
    twin = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.0, requires_grad=True)]
    optimizer = torch.optim.Adam(twin, 0.4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, 27)
    for _ in range(27):
        w, t = twin
        optimizer.zero_grad()
        ((w - 2).square() + 0.5 * w - t).backward()
        optimizer.step()
        schedule.step()
        t.data.clamp_(max=math.log(100))
    assert net.w.item() == pytest.approx(twin[0].item(), rel=1e-5)
    assert net.logit_scale.item() == pytest.approx(math.log(100)) == pytest.approx(twin[1].item())
    assert [row["step"] for row in history] == [*range(2, 27, 2), 27]
    expected = [sum(losses[i:i + 2]) / len(losses[i:i + 2]) for i in range(0, 27, 2)]
    assert [row["loss"] for row in history] == pytest.approx(expected, rel=1e-6)


def test_batchnorm_learns_in_training_and_rests_in_evaluation():
    modes, net = [], Tiny().eval()
    train(net, lambda net, *data: modes.append(net.training) or net.w, "--epochs", "1")
    assert modes and all(modes)
    net = script.small_clip()
    script.evaluate(net, *digits(), False)
    assert not net.training and net.visual.conv1[1].num_batches_tracked == 0


def test_two_phases_of_training_both_train():
    net, values = Tiny(), []
    for _ in range(2):
        train(net, lambda net, *data: (net.w - 2).square(), "--epochs", "1", "--batch-size", "8")
        values.append(net.w.item())
    assert len({0.3, *values}) == 3


# ---- What is measured ----------------------------------------------------------------------------


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


def measure(monkeypatch, parts, noise=0.0, new=False, image=None):
    """`evaluate` of a model that sees and reads scenes in these codes."""
    torch.manual_seed(0)

    class Seer(nn.Module):
        def encode_image(self, scenes):
            return (image or axes)(scenes, parts)

    monkeypatch.setattr(script, "render", lambda pictures, scenes: scenes)
    monkeypatch.setattr(script, "encode_captions", lambda net, scenes: axes(scenes, parts)
                        + noise * torch.randn(len(scenes), 240))
    return script.evaluate(Seer(), *digits(500), new)


def test_evaluation_shows_1000_scenes_of_the_wanted_kind(monkeypatch):
    seen, net = [], model()
    monkeypatch.setattr(script, "render", lambda *data: seen.append(data) or torch.zeros(1000, 3, 40, 40))
    for new in (False, True):
        script.evaluate(net, *digits(), new)
        pictures, scenes = seen[-1]
        assert len(scenes) == 1000 and held_out(scenes).sum() == 1000 * new
        assert (pictures > 0).sum((2, 3)).equal((2 + 2 * scenes[:, [0, 2]])**2)  # its own digits
    told = net.encode_text(script.tokenize([script.caption(scene) for scene in scenes[:9].tolist()]))
    torch.testing.assert_close(script.encode_captions(net, scenes[:9]), told)


def test_chance_and_the_defaults_of_itc():
    expected = {"image finds caption": 1 / 1000, "digit": 1 / 10, "color": 1 / 6, AXIS: 1 / 2,
                "colors bound": 1 / 3, "places bound": 1 / 2}
    assert script.CHANCE == pytest.approx(expected)
    loss_function = script.ITC(Given())
    assert (loss_function.M, loss_function.momentum) == (4096, 0.995)


def test_measures_know_a_perfect_model(monkeypatch):
    for new in (False, True):
        got = measure(monkeypatch, ("relation", "places", "binding"), new=new)
        assert all(v == 1 for v in got.values()) and set(got) == set(script.CHANCE), got


def test_measures_know_a_bag_of_words(monkeypatch):
    got = measure(monkeypatch, ("relation",), 1e-3)
    for name in ("colors bound", "places bound"):
        assert got[name] == pytest.approx(script.CHANCE[name], abs=0.07), name
    assert got["color"] == 1 and got["digit"] == 1 and got[AXIS] == 1  # words alone suffice
    got = measure(monkeypatch, (), 1e-3)
    assert got[AXIS] == pytest.approx(0.5, abs=0.07)


@pytest.mark.parametrize("kept", [[1, 3], [0, 2]])
def test_the_order_of_the_colors_or_of_the_digits_alone_is_no_binding(kept, monkeypatch):
    """Features of all words, and of the order of either the colors or the digits."""
    torch.manual_seed(0)
    monkeypatch.setattr(script, "render", lambda pictures, scenes: scenes)

    def code(scenes):
        order = F.one_hot(scenes[:, kept[0]], 10) - F.one_hot(scenes[:, kept[1]], 10)
        return torch.cat([axes(scenes, ("relation",)), order.float()], 1)

    class Seer(nn.Module):
        def encode_image(self, scenes):
            return code(scenes)

    monkeypatch.setattr(script, "encode_captions", lambda net, scenes: code(scenes)
                        + 1e-3 * torch.randn(len(scenes), 250))
    got = script.evaluate(Seer(), *digits(500), False)
    assert got["colors bound"] == pytest.approx(0.5, abs=0.07) and got["places bound"] == 1


def test_features_that_bind_but_know_no_place_fail_only_there(monkeypatch):
    monkeypatch.setattr(script, "twins", pytest.fail)  # whoever changes them measures the same
    got = measure(monkeypatch, ("relation", "binding"), 1e-3)
    assert got["colors bound"] == 1
    assert got["places bound"] == pytest.approx(0.5, abs=0.07)


def test_captions_that_are_equally_near_are_not_preferred(monkeypatch):
    got = measure(monkeypatch, (), image=lambda scenes, parts: torch.ones(len(scenes), 240))
    monkeypatch.setattr(script, "encode_captions", lambda net, scenes: torch.ones(len(scenes), 240))

    class Same(nn.Module):
        def encode_image(self, scenes):
            return torch.ones(len(scenes), 240)

    got = script.evaluate(Same(), *digits(500), False)
    for name in ("digit", "color", AXIS, "colors bound", "places bound"):
        assert got[name] == 0, name


def test_a_foil_of_seen_colors_is_no_new_pair(monkeypatch):
    """A model that loves whatever it never saw gets no worse by foils with held-out pairs."""
    torch.manual_seed(0)
    monkeypatch.setattr(script, "render", lambda pictures, scenes: scenes)

    class Seer(nn.Module):
        def encode_image(self, scenes):
            return torch.cat([axes(scenes, ("relation", "places", "binding")), torch.ones(len(scenes), 1)], 1)

    monkeypatch.setattr(script, "encode_captions", lambda net, scenes: torch.cat(
        [axes(scenes, ("relation", "places", "binding")), 9.0 * held_out(scenes)[:, None]], 1))
    got = script.evaluate(Seer(), *digits(500), False)
    assert got["colors bound"] == 1 and got["places bound"] == 1


def test_foils_differ_in_one_slot_in_all_ways():
    scenes = apart(30)
    for slot, count in ((0, 10), (1, 6), (4, 2)):
        others = script.foils(scenes, slot, count)
        assert others.shape == (count - 1, 30, 5)
        assert (others != scenes).sum(2).eq(1).all() and (others[..., slot] != scenes[:, slot]).all()
        everything = torch.cat([others[..., slot], scenes[None, :, slot]])
        assert everything.sort(0)[0].equal(torch.arange(count)[:, None].expand(-1, 30))


def test_retrieval_counts_the_images_that_find_a_caption_with_their_meaning(monkeypatch):
    torch.manual_seed(0)
    images, labels = digits(500)
    monkeypatch.setattr(script, "render", lambda pictures, scenes: scenes)
    parts = ("relation", "places", "binding")

    class Half(nn.Module):
        def encode_image(self, scenes):
            turned = scenes.clone()
            turned[::4] = scenes.roll(1, 0)[::4]  # a fourth sees the scene of another image
            self.right = (turned == scenes).all(1).float().mean().item()
            return axes(turned, parts)

    monkeypatch.setattr(script, "encode_captions", lambda net, scenes: axes(scenes, parts))
    net = Half()
    got = script.evaluate(net, images, labels, False)
    assert got["image finds caption"] == pytest.approx(net.right) and 0.7 < net.right < 0.8


# ---- The whole -----------------------------------------------------------------------------------


def test_default_settings_are_those_of_the_header():
    args = vars(script.get_args([]))
    expected = dict(epochs=10, batch_size=128, lr=2e-3, train_size=60000, seed=0, loss="clip",
                    twins=0.5, load=None, quick=False)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("flags, word", [(["--twins", "0.6"], "twins"), (["--twins", "-1"], "twins"),
                                         (["--prompt", "a pink three"], "pink"),
                                         (["--prompt", "a; " + "the " * 11], "too long"),
                                         (["--loss", "siglip"], "loss")])
def test_wrong_settings_get_a_sentence(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        script.get_args(flags)
    assert end.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_main_hands_on_data_and_flags_and_draws_what_it_finds(loss, tmp_path, monkeypatch, capsys):
    seen = {}

    def spy(name, *results):
        original, results = getattr(script, name), list(results)

        def call(*values):
            seen.setdefault(name, []).append(values)
            return results.pop(0) if results else original(*values)
        monkeypatch.setattr(script, name, call)

    found = [{name: i / 10 + j / 20 for i, name in enumerate(script.CHANCE)} for j in (0, 1)]
    spy("train")
    spy("evaluate", *found)
    spy("render")
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path), "--seed", "7",
                 "--loss", loss, "--epochs", "1", "--prompt", "a red three;a blue two above a red one"])
    assert torch.initial_seed() == 7
    (args, net, loss_function, pictures, names, history), = seen["train"]
    drawn, labels = script.draw_characters(512, 0)
    assert pictures.equal(drawn) and names.equal(labels)
    assert (loss_function is script.clip_loss) == (loss == "clip")
    assert isinstance(loss_function, script.ITC) == (loss == "itc")
    test_images, test_labels = script.draw_characters(2000, 1)
    for values, new in zip(seen["evaluate"], (False, True), strict=True):
        assert values[0] is net and values[1].equal(test_images) and values[2].equal(test_labels)
        assert values[3] is new
    metrics = json.loads((tmp_path / "06_clip" / "metrics.json").read_text())
    assert list(metrics["results"].values()) == found and metrics["history"] == history
    curve, bars, nearest = plt.gcf().axes[:3]
    assert list(curve.lines[0].get_ydata()) == [row["loss"] for row in history]
    assert list(curve.lines[0].get_xdata()) == [row["step"] for row in history]
    widths = [[bar.get_width() for bar in group] for group in bars.containers]
    assert widths == [list(found[0].values()), list(found[1].values()), list(script.CHANCE.values())]
    assert [text.get_text() for text in bars.get_yticklabels()] == list(script.CHANCE)
    assert [text.get_text() for text in nearest.get_yticklabels()] == ["a red three", "a blue two above a red one"]
    pictures, scenes = seen["render"][-1]
    assert pictures[:, 0].equal(test_images[:500]) and scenes[:, 0].equal(test_labels[:500])
    assert pictures[:, 1].sum((1, 2)).unique().numel() > 300 and loss in curve.get_title()
    assert [text.get_text() for text in bars.get_legend().get_texts()] == [*metrics["results"], "chance"]
    told = capsys.readouterr().out
    printed = json.loads(told[told.index("{"):told.rindex("}") + 1])
    assert printed == {"chance": script.CHANCE, **metrics["results"]}
    assert len(scenes) == 500 and not held_out(scenes).any()
    picture = np.asarray(nearest.images[0].get_array())
    assert picture.shape == (84, 252, 3)


def test_the_nearest_images_are_the_nearest(tmp_path, monkeypatch):
    torch.manual_seed(0)
    images, labels = digits(50)
    pool = torch.rand(5000, 3, 40, 40)
    monkeypatch.setattr(script, "render", lambda pictures, scenes: pool)

    class Fake(nn.Module):
        def encode_image(self, images):
            return images[:, :1, 0, :2].flatten(1)

        def encode_text(self, tokens):
            return torch.tensor([[1.0, 0.0], [-1.0, 0.0]])

    args = script.get_args(["--prompt", "a; the"])
    args.out = str(tmp_path)
    results = {"seen pairs": script.CHANCE, "held-out pairs": script.CHANCE}
    script.plot_results(args, Fake(), images, labels, [], results)
    picture = np.asarray(plt.gcf().axes[2].images[0].get_array())
    order = pool[:, 0, 0, 0].argsort(descending=True)
    for row, best in ((0, order[:6]), (1, order.flip(0)[:6])):
        for column, i in enumerate(best):
            tile = picture[42 * row + 1:42 * row + 41, 42 * column + 1:42 * column + 41]
            np.testing.assert_allclose(tile, pool[i].permute(1, 2, 0), atol=1e-6)
