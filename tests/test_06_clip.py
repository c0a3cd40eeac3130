"""06_clip.py: two towers, the contrastive loss, a world of scenes, binding, the queue.

Exercises: 第6章, 6.1 (the loss), 6.2 and 6.4 (the towers), 6.6 (binding), 6.8 (ITC)."""

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

clip = load_script(ROOT / "06_clip.py")
END = len(clip.WORDS) + 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def network():
    """The small CLIP with weights moved away from their start."""
    torch.manual_seed(0)
    model = clip.small_clip()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def every_scene():
    sizes = [10, len(clip.COLORS), 10, len(clip.COLORS), 2]
    return torch.cartesian_prod(*map(torch.arange, sizes))


def digits(count=40):
    """Squares of different size as digits, so that the picture tells the label."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[13 - label:15 + label, 13 - label:15 + label] = 255
    return images, labels.byte()  # as in the files


def read(text):
    """English -> (digit, color, digit, color, relation), by its own reading of the grammar."""
    things = [(clip.NUMERALS.index(d), list(clip.COLORS).index(c)) for c, d in re.findall(
        rf"({'|'.join(clip.COLORS)}) ({'|'.join(clip.NUMERALS)})", text)]
    word = re.search("above|below|left|right", text).group()
    if "with" in text:  # "a B with an A above it"
        things = things[::-1]
    if word in ("below", "right"):
        things = things[::-1]
    return (*things[0], *things[1], int(word in ("left", "right")))


# ---- The towers (ex. 6.2, 6.4) -------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs_own(causal):
    ours, torchs = clip.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 7, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else torch.zeros(7, 7)
    torch.testing.assert_close(ours(x, mask), torchs(x, x, x, attn_mask=mask)[0])


def test_a_block_is_attention_then_an_mlp_with_quickgelu():
    block, x = clip.Block(16, 2), torch.randn(3, 5, 16)
    nn.init.normal_(block.ln_1.weight), nn.init.normal_(block.ln_2.weight)
    h = x + block.attn(F.layer_norm(x, (16,), block.ln_1.weight), 0)
    up = block.mlp.c_fc(F.layer_norm(h, (16,), block.ln_2.weight))
    expected = h + block.mlp.c_proj(up / (1 + torch.exp(-1.702 * up)))
    torch.testing.assert_close(block(x, 0), expected)


def test_parameters_are_those_of_a_published_vit_b_32():
    shapes = {"positional_embedding": (77, 512), "token_embedding.weight": (49408, 512),
              "text_projection": (512, 512), "logit_scale": (), "visual.proj": (768, 512),
              "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768),
              "visual.conv1.weight": (768, 3, 32, 32)}
    layers = {"ln_final": (512,), "visual.ln_pre": (768,), "visual.ln_post": (768,)}
    for tower, D in (("transformer", 512), ("visual.transformer", 768)):
        for i in range(12):
            block = f"{tower}.resblocks.{i}"
            layers |= {f"{block}.attn.out_proj": (D, D), f"{block}.mlp.c_fc": (4 * D, D),
                       f"{block}.mlp.c_proj": (D, 4 * D), f"{block}.ln_1": (D,), f"{block}.ln_2": (D,)}
            shapes |= {f"{block}.attn.in_proj_{kind}": size
                       for kind, size in (("weight", (3 * D, D)), ("bias", (3 * D,)))}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    line = re.search(r"CLIP\(Vision.*512\)", clip.CLIP.__doc__, re.S).group()  # as the docstring says
    with torch.device("meta"):
        model = eval(line, {**vars(clip), "nn": nn})
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert {block.attn.num_heads for block in model.visual.transformer.resblocks} == {12}
    assert {block.attn.num_heads for block in model.transformer.resblocks} == {8}


def test_the_image_tower_by_hand():
    net, x = network().visual, torch.rand(3, 3, 40, 40)
    places = net.conv1(x)
    patches = torch.stack([places[:, :, i // 5, i % 5] for i in range(25)], 1)
    tokens = torch.cat([net.class_embedding.repeat(3, 1, 1), patches], 1) + net.positional_embedding
    h = F.layer_norm(tokens, (64,), net.ln_pre.weight, net.ln_pre.bias)
    assert len(net.transformer.resblocks) == 2
    for block in net.transformer.resblocks:
        h = block(h, 0)
    torch.testing.assert_close(net.encode(x), h)
    h = F.layer_norm(h[:, 0], (64,), net.ln_post.weight, net.ln_post.bias) @ net.proj
    torch.testing.assert_close(net(x), h)


def test_a_text_is_read_off_at_its_end_and_no_token_looks_ahead():
    net = network()
    text = clip.tokenize(["a red three above a blue seven"]).repeat(3, 1)
    text[1, 9:] = torch.tensor([4, 2, 7])  # after the end
    text[2, 3] = 5
    pooled, encodings = net.encode_text(text), net.encode_tokens(text)
    torch.testing.assert_close(pooled[1], pooled[0])
    torch.testing.assert_close(encodings[1, :9], encodings[0, :9])
    torch.testing.assert_close(F.normalize(encodings[:, 8] @ net.text_projection, dim=1), pooled)
    torch.testing.assert_close(encodings[2, :3], encodings[0, :3])  # before the change
    assert (encodings[2, 3:9] - encodings[0, 3:9]).abs().amax(1).min() > 1e-3  # and from it on
    x = net.token_embedding(text) + net.positional_embedding
    for block in net.transformer.resblocks:
        x = block(x, nn.Transformer.generate_square_subsequent_mask(12))
    torch.testing.assert_close(encodings, F.layer_norm(x, (64,), net.ln_final.weight, net.ln_final.bias))


def test_logits_are_cosines_times_a_scale_of_at_most_100():
    net, images = network(), torch.rand(3, 3, 40, 40)
    text = clip.tokenize(["a red one above a blue two", "a blue one above a red two"])
    u, w = net.visual(images), net.encode_tokens(text)[:, 8] @ net.text_projection
    for scale, seen in ((7.0, 7.0), (500.0, 100.0)):
        net.logit_scale.data.fill_(math.log(scale))
        cosines = F.cosine_similarity(u[:, None], w, dim=2)
        torch.testing.assert_close(net(images, text), seen * cosines, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.visual(images[1:2]), u[1:2])  # images stay apart
    assert clip.small_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---- The losses (ex. 6.1, 6.8) -------------------------------------------------------


class Given(nn.Module):
    """A model whose features are given, times a weight."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.weight = scale, nn.Parameter(torch.ones((), dtype=torch.float64))

    def encode_image(self, features):
        return features * self.weight

    encode_text = encode_image

    def logits(self, u, w):
        return self.scale * u @ w.T

    def forward(self, images, texts):
        return self.logits(images, texts)


def unit(count, seed=0):
    torch.manual_seed(seed)
    return F.normalize(torch.randn(count, 8, dtype=torch.float64), dim=1)


def apart(count, start=0):
    """Scenes that all differ."""
    return every_scene()[start:start + 13 * count:13]


def test_the_loss_is_exercise_6_1_in_plain_loops():
    images, texts, scale = unit(5), unit(5, seed=1), 7.0
    logits = [[scale * sum(a * b for a, b in zip(u, w)) for w in texts.tolist()]
              for u in images.tolist()]
    total = 0
    for a in range(5):
        row = sum(math.exp(logits[a][c]) for c in range(5))
        column = sum(math.exp(logits[c][a]) for c in range(5))
        total -= (logits[a][a] - math.log(row) + logits[a][a] - math.log(column)) / 2 / 5
    found = clip.clip_loss(Given(scale), images, texts, apart(5))
    assert found.item() == pytest.approx(total, rel=1e-12)
    same = unit(1).expand(6, -1)
    assert clip.clip_loss(Given(50), same, same, apart(6)).item() == pytest.approx(math.log(6))


def queue(model, M):
    loss = clip.ITC(model)
    loss.M = M
    return loss


def test_itc_is_exercise_6_8_in_plain_loops():
    scale, model = 3.0, Given(3.0)
    loss = queue(model, 4)
    scenes, old = apart(3), apart(2, start=3000)
    old[1] = scenes[1]  # the second in the queue says the same as number 1 of the batch
    loss(model, unit(2, seed=5), unit(2, seed=6), old)
    model.weight.data.fill_(1.5)  # so that slow features differ: 0.995 · 1 + 0.005 · 1.5
    images, texts = unit(3), unit(3, seed=1)
    found, total = loss(model, images, texts, scenes), 0
    for fast, slow, waiting in ((images, texts, unit(2, seed=6)), (texts, images, unit(2, seed=5))):
        for a in range(3):
            others = [1.0025 * slow[b] for b in range(3)] + [waiting[0]]
            if a != 1:
                others.append(waiting[1])
            p = [math.exp(scale * 1.5 * (fast[a] @ v).item()) for v in others]
            total -= math.log(p[a] / sum(p)) / 3 / 2
    assert found.item() == pytest.approx(total, rel=1e-9)


def test_the_queue_holds_the_newest_and_the_copy_follows_slowly():
    model = Given()
    loss = queue(model, 6)
    model.weight.data.fill_(3.0)
    for step in range(4):
        images = torch.full((4, 8), float(step + 1), dtype=torch.float64)
        loss(model, images, images * 2, apart(4, start=1000 * step)).backward()
        weight = 3 + (1 - 3) * 0.995 ** (step + 1)
        assert loss.slow.weight.item() == pytest.approx(weight) and loss.slow.weight.grad is None
        u, w, scenes = loss.queue
        torch.testing.assert_close(u[:4], weight * images)
        torch.testing.assert_close(w, 2 * u)
        assert not u.requires_grad and len(u) == len(scenes) == min(4 * (step + 1), 6)
    assert (u[4:, 0] / u[0, 0]).tolist() == pytest.approx(2 * [3 / 4], rel=0.01)
    assert scenes.equal(torch.cat([apart(4, start=3000), apart(4, start=2000)])[:6])
    assert model.weight.item() == 3 and clip.ITC.M == 4096


def batch(count=16):
    images, labels = digits()
    scenes, index = clip.sample_scenes(labels, torch.arange(count))
    assert len(scenes.unique(dim=0)) == count  # else change the seed
    tokens = clip.tokenize([clip.caption(scene) for scene in scenes.tolist()])
    return clip.render(images[index], scenes), tokens, scenes


@pytest.mark.parametrize("kind", [lambda model: clip.clip_loss, clip.ITC])
def test_gradients_reach_both_towers_and_the_temperature(kind):
    model, data = clip.small_clip(), batch()
    loss = kind(model)
    first = loss(model, *data).item()
    assert first == pytest.approx(clip.clip_loss(model, *data).item(), rel=1e-4)
    loss(model, *data).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_sixteen_pairs_can_be_learned_by_heart():
    model, data = clip.small_clip(), batch()
    optimizer, losses = torch.optim.Adam(model.parameters(), 2e-3), []
    for _ in range(80):
        loss = clip.clip_loss(model, *data)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 2 < losses[0] < 6 and losses[-1] < 0.5


# ---- The world -----------------------------------------------------------------------


def test_every_sentence_reads_back_as_its_scene():
    for scene in every_scene()[::7].tolist():
        told = [clip.caption(scene, phrase, side) for phrase in range(4) for side in range(2)]
        assert len(set(told)) == 8 and {read(text) for text in told} == {tuple(scene)}
        assert all(len(text.split()) <= clip.LENGTH - 2 for text in told)
    assert clip.caption([3, 0, 7, 2, 0]) == "a red three above a blue seven"
    assert clip.caption([3, 0, 7, 2, 0], 1, 1) == "the blue seven is below the red three"
    bright = {name: "".join(c for c, v in zip("RGB", rgb) if v == 1) for name, rgb in clip.COLORS.items()}
    assert bright == dict(red="R", green="G", blue="B", yellow="RG", magenta="RB", white="RGB")


def test_tokens_have_start_words_and_end():
    row = clip.tokenize(["a red three above a blue seven"])[0].tolist()
    assert " ".join(clip.WORDS[i - 1] for i in row[1:8]) == "a red three above a blue seven"
    assert row[0] == END - 1 and row[8:] == [END, 0, 0, 0]
    book = clip.tokenize(clip.caption(scene) for scene in every_scene()[::11].tolist())
    assert len(book.unique(dim=0)) == len(book)  # no two sentences have the same tokens
    assert clip.small_clip().token_embedding.num_embeddings == END + 1
    with pytest.raises(AssertionError, match="use only the words"):
        clip.tokenize(["a cat above a blue seven"])
    assert clip.WORDS == sorted(clip.WORDS)  # the same numbers in the next run, for --load


def held_out(scenes):
    return (scenes[:, [0, 2]] % 6 == scenes[:, [1, 3]]).any(1)


def test_held_out_pairs_never_occur_in_training_and_always_where_asked():
    labels, first = digits()[1], torch.arange(40).repeat(250)
    scenes, index = clip.sample_scenes(labels, first)
    assert index[:, 0].equal(first) and index[:, 1].bincount().min() > 150
    assert labels[index].equal(scenes[:, [0, 2]].byte())
    assert not held_out(scenes).any()
    told = {(d, c) for d1, c1, d2, c2, _ in scenes.tolist() for d, c in ((d1, c1), (d2, c2))}
    assert len(told) == 50  # all the others occur
    assert scenes[:, 4].float().mean() == pytest.approx(0.5, abs=0.03)
    scenes, _ = clip.sample_scenes(labels, first, held_out=True)
    assert (scenes[:, 1] == scenes[:, 0] % 6).all() and not (scenes[:, 3] == scenes[:, 2] % 6).any()
    some = every_scene()[::7]
    assert clip.shows_held_out(some).equal(held_out(some))


def test_an_image_shows_its_scene_and_a_twin_the_same_things():
    images, labels = (tensor[digits()[1] < 7] for tensor in digits())  # larger ones reach too far
    scenes, index = clip.sample_scenes(labels, torch.arange(28).repeat(8))
    before, shown = scenes.clone(), index.clone()
    clip.add_twins(scenes, index, 0.5)
    assert scenes[::2].equal(before[::2]) and index[::2].equal(shown[::2])
    for (d1, c1, d2, c2, r), twin in zip(scenes[::2].tolist(), scenes[1::2].tolist()):
        assert twin == [d2, c2, d1, c1, r]
    pictures, colors = clip.render(images[index], scenes), torch.tensor(list(clip.COLORS.values()))
    assert pictures.shape == (224, 3, 40, 40) and pictures.min() == 0 and pictures.max() <= 1
    for picture, (d1, c1, d2, c2, relation) in zip(pictures, scenes.tolist()):
        halves = picture.split(20, 1 + relation)  # above: rows, left of: columns
        for half, d, c in zip(halves, (d1, d2), (c1, c2)):
            hue = half.flatten(1).sum(1)
            assert F.cosine_similarity(hue, colors[c], 0) > 0.999  # its color, and no other's
            side = (2 + 2 * d) * 0.58 * 40 / 28  # of the square, in pixels
            assert hue.max().item() / colors[c].max().item() == pytest.approx(side**2, rel=0.1, abs=1)


@pytest.mark.parametrize("fraction", [0, 0.4])
def test_twins_are_the_fraction_that_is_asked_for(fraction):
    scenes, index = clip.sample_scenes(digits()[1], torch.arange(40).repeat(251)[:10039])
    before = scenes.clone()
    clip.add_twins(scenes, index, fraction)
    changed = (scenes != before).any(1)
    assert changed.float().mean().item() == pytest.approx(fraction, abs=0.02)
    assert digits()[1][index].equal(scenes[:, [0, 2]].byte())


def test_places_are_random_within_bounds():
    spot = torch.zeros(500, 2, 28, 28, dtype=torch.uint8)
    spot[:, 0, 13:15, 13:15] = 255  # only the first digit has ink
    picture = clip.render(spot, torch.tensor([0, 5, 0, 5, 0]).repeat(500, 1))[:, 0]  # white, above
    line, mass = (torch.arange(40) + 0.5 - 20) / 20, picture.sum((1, 2))
    y, x = ((picture.sum(axis) * line).sum(1) / mass for axis in (2, 1))
    assert y.mean() == pytest.approx(-0.5, abs=0.02) and abs(x.mean()) < 0.02
    assert y.std() > 0.03 and x.std() > 0.03 and (y + 0.5).abs().max() < 0.13
    full = torch.full((50, 2, 28, 28), 255, dtype=torch.uint8)
    white = torch.tensor([0, 5, 0, 5, 0]).repeat(50, 1)
    assert clip.render(full, white).max().item() == pytest.approx(1)  # also where both are


def test_a_color_and_a_relation_are_a_line_each():
    source = (ROOT / "06_clip.py").read_text(encoding="utf-8")
    for old, new in (("(1, 1, 1),", '(1, 1, 1),  "cyan": (0.25, 1, 1),'), ('"a the', '"over under a the'),
                     ("(1, 0),", '(1, 0), ("over", "under"): (1, 1),')):
        assert source.count(old) == 1
        source = source.replace(old, new)
    names = {"__name__": "copy"}
    exec(compile(source, "copy", "exec"), names)
    images, labels = digits()
    scenes, index = names["sample_scenes"](labels, torch.arange(40).repeat(50))
    assert scenes[:, [1, 3]].unique().tolist() == list(range(7))
    assert scenes[:, 4].unique().tolist() == [0, 1, 2]
    assert not (scenes[:, [0, 2]] % 7 == scenes[:, [1, 3]]).any()
    new = (scenes[:, 1] == 6) & (scenes[:, 4] == 2) & (scenes[:, 0] < 5) & (scenes[:, 2] < 5)
    picture = names["render"](images[index[new]][:1], scenes[new][:1])[0]
    assert re.match(r"a cyan \w+ over a \w+ \w+", names["caption"](scenes[new][0].tolist()))
    corner = picture[:, :20, :20].flatten(1).sum(1)  # the first is at the upper left
    assert 0 < corner[0] < corner[1] and picture[:, 20:, 20:].sum() > 0  # cyan has little red
    assert picture[:, :16, 24:].sum() == picture[:, 24:, :16].sum() == 0
    found = names["evaluate"](names["small_clip"](), images, labels, False)
    assert found.keys() == names["CHANCE"].keys() and names["CHANCE"]["color"] == 1 / 7


# ---- Training ------------------------------------------------------------------------


class Tiny(nn.Module):
    """A model with one parameter, which the loss functions below read."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


def train(model, loss_function, *flags, count=40):
    history = []
    args = clip.get_args([str(flag) for flag in flags])
    clip.train(args, model, loss_function, *digits(count), history)
    return history


def test_training_shows_scenes_twins_and_all_ways_to_say_them():
    seen = []

    def loss_function(model, images, tokens, scenes):
        assert model.training
        seen.append((images, tokens, scenes))
        return model.w + 0

    train(Tiny().eval(), loss_function, "--epochs", 3, "--batch-size", 40, "--twins", 0.25, count=410)
    assert [len(scenes) for _, _, scenes in seen] == 3 * (10 * [40] + [10])
    images, tokens, scenes = (torch.cat(tensors) for tensors in zip(*seen))
    ways = set()
    for picture, row, scene in zip(images, tokens, scenes.tolist()):
        text = " ".join(clip.WORDS[i - 1] for i in row if 0 < i < END - 1)
        assert read(text) == tuple(scene)
        ways.add(tuple(word for word in text.split() if word in clip.OTHERS))
        first = picture.split(20, 1 + scene[4])[0].amax(0).sum().item()
        assert first > 0.8 * min(((2 + 2 * scene[0]) * 0.58 * 40 / 28) ** 2, 180)
    assert len(ways) == 16  # four phrases, two sides, two relations
    pairs = scenes.view(3, 205, 2, 5)
    twins = (pairs[:, :, 1] == pairs[:, :, 0][..., [2, 3, 0, 1, 4]]).all(2)
    assert twins.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert not held_out(scenes).any()
    assert not (pairs[1:] == pairs[:-1]).all(3).all(2).all(1).any()  # a new world in each epoch


def test_held_out_pairs_in_training_are_refused(monkeypatch):
    monkeypatch.setattr(clip, "SWAP_PLACES", clip.SWAP_COLORS)  # other twins: 30% show such a pair
    with pytest.raises(AssertionError):
        train(Tiny(), lambda model, *data: model.w + 0, "--epochs", 1, count=400)


def test_training_is_adam_with_a_rate_that_ends_at_zero_and_goes_on_in_a_second_phase():
    path, model = [], Tiny()

    def slope(model, *data):
        path.append(model.w.item())
        return 5 + 0.1 * model.w

    for phase in (1, 2):
        history = train(model, slope, "--epochs", 20, "--batch-size", 4, "--lr", 0.01)
        rates = -np.diff(path[-200:])  # Adam: a constant slope moves by the rate
        assert rates.max() == pytest.approx(0.01, rel=0.02)
        assert rates.min() > 0 and rates[-1] < 1e-4 and (np.diff(rates[100:]) < 1e-6).all()
        assert [step for step, _, _ in history] == list(range(10, 201, 10))
        assert history[0][1] == pytest.approx(5 + 0.1 * np.mean(path[-200:-190]), rel=1e-5)


# ---- Binding (ex. 6.6) ---------------------------------------------------------------


def code(scenes, parts):
    """Features that tell only some of digit, color and place, in exact codes."""
    d1, c1, d2, c2, relation = scenes.T
    table = torch.zeros(len(scenes), 2, 2, 10, 6)  # relation, place, digit, color
    n, relation = torch.arange(len(scenes)), relation * ("relation" in parts)
    for place, d, c in ((0, d1, c1), (int("places" in parts), d2, c2)):
        if "binding" in parts:
            table[n, relation, place, d, c] += 1
        else:
            table[n, relation, place, d] += 1 / 6
            table[n, relation, place, :, c] += 1 / 10
    order = {"color order": (c1, c2), "digit order": (d1, d2)}.get(parts[-1] if parts else "", (d1, d1))
    order = F.one_hot(order[0], 10) - F.one_hot(order[1], 10)
    return torch.cat([F.normalize(table.flatten(1), dim=1), order], 1)


def measure(monkeypatch, image, text, held_out=False):
    """`evaluate` of a model that sees and reads scenes in these codes."""
    class Seer(nn.Module):
        encode_image, encode_text = staticmethod(image), staticmethod(text)

    monkeypatch.setattr(clip, "render", lambda pictures, scenes: scenes)
    monkeypatch.setattr(clip, "tokenize", lambda texts: torch.tensor([read(text) for text in texts]))
    model = Seer()
    found = clip.evaluate(model, *digits(500), held_out)
    assert not model.training and found.keys() == clip.CHANCE.keys()
    return found


@pytest.mark.parametrize("parts, wrong", [
    (("relation", "places", "binding"), {}),
    (("relation", "binding"), {"places bound": 1 / 2}),
    (("relation",), {"colors bound": 1 / 3, "places bound": 1 / 2}),
    ((), {"axis": 1 / 2, "colors bound": 1 / 3, "places bound": 1 / 2}),
    (("relation", "color order"), {"colors bound": 1 / 2}),  # either order alone
    (("relation", "digit order"), {"colors bound": 1 / 2}),  # is no binding
])
def test_measures_are_at_chance_exactly_where_knowledge_is_missing(monkeypatch, parts, wrong):
    def text(scenes):
        exact = code(scenes, parts)
        return exact + 1e-3 * torch.randn_like(exact)

    found = measure(monkeypatch, lambda scenes: code(scenes, parts), text)
    found.pop("finds its caption")
    for name, value in found.items():
        assert value == pytest.approx(wrong.get(name, 1), abs=0.07 if name in wrong else 0), name


def test_evaluation_shows_1000_scenes_of_the_wanted_kind_and_counts_those_that_find_theirs(monkeypatch):
    for kind in (False, True):
        seen = []

        def image(scenes):
            turned = scenes.clone()
            turned[::4] = scenes.roll(1, 0)[::4]  # a fourth sees the scene of another image
            seen.append((scenes, turned))
            return code(turned, ("relation", "places", "binding"))

        found = measure(monkeypatch, image,
                        lambda scenes: code(scenes, ("relation", "places", "binding")), kind)
        (scenes, turned), = seen
        assert len(scenes) == 1000 and held_out(scenes).sum() == 1000 * kind
        right = (turned == scenes).all(1).float().mean().item()
        assert found["finds its caption"] == pytest.approx(right) and 0.7 < right < 0.8


def test_ties_are_not_preferred_and_foils_show_no_held_out_pair(monkeypatch):
    flat = lambda scenes: torch.ones(len(scenes), 9)  # noqa: E731
    found = measure(monkeypatch, flat, flat)
    assert all(found[name] == 0 for name in found if name != "finds its caption")
    parts = "relation", "places", "binding"
    loves_the_new = lambda scenes: torch.cat(  # noqa: E731
        [code(scenes, parts), 9.0 * held_out(scenes)[:, None]], 1)
    found = measure(monkeypatch, lambda scenes: torch.cat(
        [code(scenes, parts), torch.ones(len(scenes), 1)], 1), loves_the_new)
    assert found["colors bound"] == 1 and found["places bound"] == 1
    first = lambda scenes: F.one_hot(10 * scenes[:, 0] + scenes[:, 1], 100).float()  # noqa: E731
    found = measure(monkeypatch, first, first)  # a model that sees the first digit only
    assert found["digit"] == found["color"] == 1 and found["axis"] == 0
    assert list(clip.CHANCE.values()) == pytest.approx([0.001, 1 / 10, 1 / 6, 1 / 2, 1 / 3, 1 / 2])


# ---- A run ---------------------------------------------------------------------------


class Ink(nn.Module):
    """A model that knows how much ink an image has, and wants much of it."""

    def encode_image(self, images):
        return images.sum((1, 2, 3))[:, None] / 1000

    def encode_text(self, tokens):
        return torch.ones(len(tokens), 1)


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_a_run_trains_with_the_loss_asked_for_and_draws_what_it_finds(loss, tmp_path, monkeypatch):
    found = [{"digit": 0.5, "of one's own": 0.25}, {"digit": 0.75, "of one's own": 1.0}]
    asked, trained, (images, labels) = [], [], digits(200)
    monkeypatch.setattr(clip, "small_clip", Ink)
    monkeypatch.setattr(clip, "train", lambda *values: trained.append(values))
    monkeypatch.setattr(clip, "evaluate",
                        lambda *values, held_out: asked.append((values, held_out)) or found[held_out])
    monkeypatch.setattr(clip, "load_data", lambda args: (images, labels, 255 - images, labels, "mine"))
    clip.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--loss", loss, "--prompt",
               "a red nine above a blue zero; a white one left of a white two"])
    (_, model, loss_function, shown, _, _), = trained
    assert shown is images and (loss_function is clip.clip_loss) == (loss == "clip")
    assert [held for _, held in asked] == [False, True]
    assert all(values[0] is model and values[1] is not images for values, _ in asked)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["results"] == {"seen pairs": found[0], "held-out pairs": found[1],
                                  "chance": clip.CHANCE}
    bars, nearest = plt.gcf().axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    seen, new, chance = ({names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width()
                          for bar in kind} for kind in bars.containers)  # paired by name
    assert seen == found[0] and new == found[1] and chance == clip.CHANCE
    heights = [kind[0].get_height() for kind in bars.containers]  # wide, narrow, thin
    assert heights == sorted(heights, reverse=True)
    assert "wide: seen pairs, narrow: held-out pairs, thin: chance" in bars.get_title()
    assert "a white one left of a white two" in nearest.get_title()
    picture = np.asarray(nearest.images[0].get_array())
    ink = [picture[1:41, 42 * i + 1:42 * i + 41].sum() for i in range(6)]
    assert ink == sorted(ink, reverse=True) and ink[5] > 2000  # the nearest come first
