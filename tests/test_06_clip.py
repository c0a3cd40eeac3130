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
EVERY_SCENE = torch.cartesian_prod(*map(torch.arange, [10, 6, 10, 6, 2]))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def network():
    """The small CLIP with weights moved away from their start."""
    model = clip.small_clip()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def digits(count=40):
    """Squares of different size as digits, so that the picture tells the label."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[13 - label:15 + label, 13 - label:15 + label] = 255
    return images, labels.byte()  # as in the files


def area(digit):
    """The pixels of this square in a scene, where a digit is 0.58 of 40 pixels wide."""
    return ((2 + 2 * digit) * 0.58 * 40 / 28) ** 2


def read(text):
    """English -> (digit, color, digit, color, relation), by its own reading of the grammar."""
    things = [(clip.NUMERALS.index(d), list(clip.COLORS).index(c)) for c, d in re.findall(
        rf"({'|'.join(clip.COLORS)}) ({'|'.join(clip.NUMERALS)})", text)]
    word = re.search("above|below|left|right", text).group()
    if ("with" in text) != (word in ("below", "right")):  # "a B with an A above it"
        things.reverse()
    return (*things[0], *things[1], int(word in ("left", "right")))


# ---- The towers (ex. 6.2, 6.4) -------------------------------------------------------


def test_a_block_is_torchs_attention_and_then_an_mlp_with_quickgelu():
    block, attention = clip.Block(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    attention.load_state_dict(block.attn.state_dict(), strict=True)
    x, mask = torch.randn(2, 7, 24), torch.randn(7, 7)
    h = F.layer_norm(x, (24,), block.ln_1.weight, block.ln_1.bias)
    h = x + attention(h, h, h, attn_mask=mask)[0]
    up = block.mlp.c_fc(F.layer_norm(h, (24,), block.ln_2.weight, block.ln_2.bias))
    expected = h + block.mlp.c_proj(up / (1 + torch.exp(-1.702 * up)))
    torch.testing.assert_close(block(x, mask), expected)


def test_parameters_are_those_of_a_published_vit_b_32():
    line = re.search(r"CLIP\(Vision.*512\)", clip.CLIP.__doc__, re.S).group()  # the docstring's
    with torch.device("meta"):
        model = eval(line, vars(clip))
    shapes = {"positional_embedding": (77, 512), "token_embedding.weight": (49408, 512),
              "text_projection": (512, 512), "logit_scale": (), "visual.proj": (768, 512),
              "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768),
              "visual.conv1.weight": (768, 3, 32, 32)}
    layers = {"ln_final.": (512,), "visual.ln_pre.": (768,), "visual.ln_post.": (768,)}
    for tower, D, heads in (("transformer", 512, 8), ("visual.transformer", 768, 12)):
        block = {"attn.in_proj_": (3 * D, D), "attn.out_proj.": (D, D), "ln_1.": (D,),
                 "mlp.c_fc.": (4 * D, D), "mlp.c_proj.": (D, 4 * D), "ln_2.": (D,)}
        layers |= {f"{tower}.resblocks.{i}.{name}": shape
                   for i in range(12) for name, shape in block.items()}
        assert {b.attn.num_heads for b in model.get_submodule(tower).resblocks} == {heads}
    shapes |= {f"{name}weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}bias": shape[:1] for name, shape in layers.items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes


def test_the_image_tower_by_hand():
    net, x = network().visual, torch.rand(3, 3, 40, 40)
    places = net.conv1(x)
    patches = torch.stack([places[:, :, i // 5, i % 5] for i in range(25)], 1)
    tokens = torch.cat([net.class_embedding.repeat(3, 1, 1), patches], 1)
    first, second = net.transformer.resblocks
    h = second(first(net.ln_pre(tokens + net.positional_embedding), 0), 0)
    torch.testing.assert_close(net.encode(x), h)
    torch.testing.assert_close(net(x), net.ln_post(h[:, 0]) @ net.proj)


def test_a_text_is_read_at_its_end_and_logits_are_cosines_times_at_most_100():
    net, images = network(), torch.rand(3, 3, 40, 40)
    text = clip.tokenize(["a red one above a blue two", "the blue one is above the red two"])
    text[0, 9:] = torch.tensor([4, 2, 7])  # after the end
    h = net.token_embedding(text) + net.positional_embedding
    for block in net.transformer.resblocks:
        h = block(h, nn.Transformer.generate_square_subsequent_mask(12))
    h = net.ln_final(h)
    torch.testing.assert_close(net.encode_tokens(text), h)
    u, w = net.visual(images), h[[0, 1], [8, 9]] @ net.text_projection
    for scale, seen in ((7.0, 7.0), (500.0, 100.0)):
        net.logit_scale.data.fill_(math.log(scale))
        cosines = F.cosine_similarity(u[:, None], w, dim=2)
        torch.testing.assert_close(net(images, text), seen * cosines, rtol=1e-4, atol=1e-4)
    assert clip.small_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---- The losses (ex. 6.1, 6.8) -------------------------------------------------------


class Given(nn.Module):
    """A model whose features are given, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def encode_image(self, features):
        return features * self.weight

    def logits(self, u, w):
        return 3 * u @ w.T

    encode_text, forward = encode_image, logits


def unit(count):
    return F.normalize(torch.randn(count, 8, dtype=torch.float64), dim=1)


def test_the_loss_is_exercise_6_1_in_plain_loops():
    images, texts, total = unit(5), unit(5), 0
    logits = [[3 * sum(a * b for a, b in zip(u, w)) for w in texts.tolist()]
              for u in images.tolist()]
    for a in range(5):
        row = sum(math.exp(logits[a][c]) for c in range(5))
        column = sum(math.exp(logits[c][a]) for c in range(5))
        total -= (logits[a][a] - math.log(row) + logits[a][a] - math.log(column)) / 2 / 5
    found = clip.clip_loss(Given(), images, texts, EVERY_SCENE[:5])
    assert found.item() == pytest.approx(total, rel=1e-12)


def test_itc_is_exercise_6_8_in_plain_loops():
    model, old_images, old_texts = Given(), unit(2), unit(2)
    loss = clip.ITC(model)
    loss(model, old_images, old_texts, EVERY_SCENE[[5, 1]])  # scene 1 will come again
    model.weight.data.fill_(1.5)  # so that slow features differ: 0.995 · 1 + 0.005 · 1.5
    images, texts, total = unit(3), unit(3), 0
    found = loss(model, images, texts, EVERY_SCENE[:3])
    for fast, slow, waiting in ((images, texts, old_texts), (texts, images, old_images)):
        for a in range(3):
            others = [1.0025 * slow[b] for b in range(3)] + [waiting[0]]
            if a != 1:
                others.append(waiting[1])
            p = [math.exp(3 * 1.5 * (fast[a] @ v).item()) for v in others]
            total -= math.log(p[a] / sum(p)) / 3 / 2
    assert found.item() == pytest.approx(total, rel=1e-9)


def test_the_queue_holds_the_newest_and_the_copy_follows_slowly():
    model = Given()
    loss = clip.ITC(model)
    loss.M = 6
    model.weight.data.fill_(3.0)
    for step in range(4):
        images = torch.full((4, 8), float(step + 1), dtype=torch.float64)
        loss(model, images, images * 2, EVERY_SCENE[4 * step:4 * step + 4]).backward()
        weight = 3 + (1 - 3) * 0.995 ** (step + 1)
        assert loss.slow.weight.item() == pytest.approx(weight) and loss.slow.weight.grad is None
        u, w, scenes = loss.queue
        torch.testing.assert_close(u[:4], weight * images)
        torch.testing.assert_close(w, 2 * u)
        assert not u.requires_grad and len(u) == len(scenes) == min(4 * (step + 1), 6)
    assert (u[4:, 0] / u[0, 0]).tolist() == pytest.approx(2 * [3 / 4], rel=0.01)
    assert scenes.equal(EVERY_SCENE[[12, 13, 14, 15, 8, 9]])
    assert model.weight.item() == 3 and clip.ITC.M == 4096


def test_gradients_reach_all_parameters_and_ten_pairs_can_be_learned_by_heart():
    (images, labels), model = digits(), clip.small_clip()
    scenes, index = clip.sample_scenes(labels, torch.arange(10))
    tokens = clip.tokenize(map(clip.caption, scenes.tolist()))
    data, losses = (clip.render(images[index], scenes), tokens, scenes), []
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for loss_function in [clip.ITC(model)] + 80 * [clip.clip_loss]:
        loss = loss_function(model, *data)
        optimizer.zero_grad()
        loss.backward()
        if len(losses) < 2:  # at first both losses are the same
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        else:
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and 2 < losses[0] < 6
    assert losses[-1] < 0.5


# ---- The world -----------------------------------------------------------------------


def test_every_sentence_reads_back_as_its_scene():
    for scene in EVERY_SCENE[::7].tolist():
        told = [clip.caption(scene, phrase, side) for phrase in range(4) for side in range(2)]
        assert len(set(told)) == 8 and {read(text) for text in told} == {tuple(scene)}
    assert clip.caption([3, 0, 7, 2, 0], 1, 1) == "the blue seven is below the red three"
    bright = {name: "".join(c for c, v in zip("RGB", rgb) if v == 1)
              for name, rgb in clip.COLORS.items()}
    assert bright == dict(red="R", green="G", blue="B", yellow="RG", magenta="RB", white="RGB")


def test_tokens_have_start_words_and_end():
    row = clip.tokenize([clip.caption([3, 0, 7, 2, 0])])[0].tolist()
    assert " ".join(clip.WORDS[i - 1] for i in row[1:8]) == "a red three above a blue seven"
    assert row[0] == END - 1 and row[8:] == [END, 0, 0, 0]
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
    pairs = torch.cat([scenes[:, :2], scenes[:, 2:4]]).unique(dim=0)
    assert len(pairs) == 50  # all the others occur
    assert scenes[:, 4].float().mean() == pytest.approx(0.5, abs=0.03)
    scenes, _ = clip.sample_scenes(labels, first, held_out=True)
    assert (scenes[:, 1] == scenes[:, 0] % 6).all()
    assert not (scenes[:, 3] == scenes[:, 2] % 6).any()
    assert clip.shows_held_out(EVERY_SCENE).equal(held_out(EVERY_SCENE))


@pytest.mark.parametrize("fraction", [0, 0.4, 0.5])
def test_a_twin_is_the_scene_before_it_with_places_swapped(fraction):
    labels = digits()[1]
    scenes, index = clip.sample_scenes(labels, torch.arange(10039) % 40)
    before = scenes.clone()
    clip.add_twins(scenes, index, fraction)
    changed = (scenes != before).any(1)
    assert changed.float().mean().item() == pytest.approx(fraction, abs=0.02)
    assert not changed[::2].any()
    twin = 1 + 2 * changed[1::2].nonzero()[:, 0]
    assert scenes[twin].equal(scenes[twin - 1][:, [2, 3, 0, 1, 4]])
    assert index[twin].equal(index[twin - 1].flip(1))
    assert labels[index].equal(scenes[:, [0, 2]].byte())


def test_an_image_shows_its_scene():
    images, labels = (tensor[digits()[1] < 7] for tensor in digits())  # larger ones reach too far
    scenes, index = clip.sample_scenes(labels, torch.arange(28).repeat(8))
    pictures, colors = clip.render(images[index], scenes), torch.tensor([*clip.COLORS.values()])
    assert pictures.shape == (224, 3, 40, 40) and pictures.min() == 0 and pictures.max() <= 1
    for picture, (d1, c1, d2, c2, relation) in zip(pictures, scenes.tolist()):
        halves = picture.split(20, 1 + relation)  # above: rows, left of: columns
        for half, d, c in zip(halves, (d1, d2), (c1, c2)):
            hue = half.flatten(1).sum(1)
            assert F.cosine_similarity(hue, colors[c], 0) > 0.999  # its color, and no other's
            size = hue.max().item() / colors[c].max().item()
            assert size == pytest.approx(area(d), rel=0.1, abs=1)


def test_places_are_random_within_bounds():
    white = torch.tensor([0, 5, 0, 5, 0]).repeat(500, 1)  # both digits, one above the other
    ink = torch.zeros(500, 2, 28, 28, dtype=torch.uint8)
    ink[:, 0, 13:15, 13:15] = 255  # only the first has ink
    picture = clip.render(ink, white)[:, 0]
    line, mass = (torch.arange(40) + 0.5 - 20) / 20, picture.sum((1, 2))
    y, x = ((picture.sum(axis) * line).sum(1) / mass for axis in (2, 1))
    assert y.mean() == pytest.approx(-0.5, abs=0.02) and abs(x.mean()) < 0.02
    assert y.std() > 0.03 and x.std() > 0.03 and (y + 0.5).abs().max() < 0.13
    ink[:] = 255  # now they overlap
    assert clip.render(ink, white).max().item() == pytest.approx(1)


def test_a_color_and_a_relation_are_a_line_each(tmp_path):
    source = (ROOT / "06_clip.py").read_text(encoding="utf-8")
    for old, new in (("(1, 1, 1),", '(1, 1, 1),  "cyan": (0.25, 1, 1),'),
                     ('"a the', '"over under a the'),
                     ("(1, 0),", '(1, 0), ("over", "under"): (1, 1),')):
        assert source.count(old) == 1
        source = source.replace(old, new)
    (tmp_path / "more.py").write_text(source, encoding="utf-8")
    more, images = load_script(tmp_path / "more.py"), digits()[0]
    scenes, _ = more.sample_scenes(digits()[1], torch.arange(40).repeat(50))
    assert scenes.amax(0).tolist() == [9, 6, 9, 6, 2] and more.CHANCE["color"] == 1 / 7
    assert not (scenes[:, [0, 2]] % 7 == scenes[:, [1, 3]]).any()
    text = more.caption([4, 6, 3, 0, 2])
    assert text == "a cyan four over a red three"
    pictures = more.render(images[None, [4, 3]], torch.tensor([[4, 6, 3, 0, 2]]))
    corner = pictures[0, :, :20, :20].sum((1, 2))  # the first is at the upper left
    assert 0 < corner[0] < corner[1] and pictures[:, :, 20:, 20:].sum() > 0  # cyan has little red
    assert pictures[:, :, :16, 24:].sum() == pictures[:, :, 24:, :16].sum() == 0
    assert more.small_clip()(pictures, more.tokenize([text])).isfinite()


# ---- Training ------------------------------------------------------------------------


def train(loss_function, *flags, count=40, model=None):
    """Train a model of one number, if no other is given, on squares; return the history."""
    history, args = [], clip.get_args([str(flag) for flag in flags])
    model = model or nn.ParameterList([torch.zeros(())]).eval()
    clip.train(args, model, loss_function, *digits(count), history)
    return history


def test_training_shows_scenes_twins_and_all_ways_to_say_them(monkeypatch):
    seen = []

    def loss_function(model, images, tokens, scenes):
        assert model.training
        seen.append((images, tokens, scenes))
        return model[0] + 0

    train(loss_function, "--epochs", 3, "--batch-size", 40, "--twins", 0.25, count=410)
    assert [len(scenes) for _, _, scenes in seen] == 3 * (10 * [40] + [10])
    images, tokens, scenes = (torch.cat(tensors) for tensors in zip(*seen))
    ways = set()
    for picture, row, scene in zip(images, tokens, scenes.tolist()):
        text = " ".join(clip.WORDS[i - 1] for i in row if 0 < i < END - 1)
        assert read(text) == tuple(scene)
        ways.add(tuple(word for word in text.split() if word in clip.OTHERS))
        first = picture.split(20, 1 + scene[4])[0].amax(0).sum().item()
        assert first > 0.8 * min(area(scene[0]), 180)
    assert len(ways) == 16  # four phrases, two sides, two relations
    pairs = scenes.view(3, 205, 2, 5)
    twins = (pairs[:, :, 1] == pairs[:, :, 0][..., [2, 3, 0, 1, 4]]).all(2)
    assert twins.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert not held_out(scenes).any()
    assert not (pairs[1:] == pairs[:-1]).all(3).all(2).all(1).any()  # a new world in each epoch
    monkeypatch.setattr(clip, "SWAP_PLACES", clip.SWAP_COLORS)  # 30% of these twins show
    with pytest.raises(AssertionError):  # a held-out pair
        train(lambda model, images, tokens, scenes: model[0] + 0, "--epochs", 1, count=400)


def test_training_is_adam_with_a_rate_that_ends_at_zero_and_goes_on_in_a_second_phase():
    path, model = [], nn.ParameterList([torch.zeros(())])

    def slope(model, images, tokens, scenes):
        path.append(model[0].item())
        return 5 + 0.1 * model[0]

    for phase in (1, 2):
        history = train(slope, "--epochs", 20, "--batch-size", 4, "--lr", 0.01, model=model)
        rates = -np.diff(path[-200:])  # Adam: a constant slope moves by the rate
        assert rates.max() == pytest.approx(0.01, rel=0.02)
        assert rates.min() > 0 and rates[-1] < 1e-4 and (np.diff(rates[100:]) < 1e-6).all()
        assert [step for step, _, _ in history] == list(range(10, 201, 10))
        assert history[10][1] == pytest.approx(5 + 0.1 * np.mean(path[-100:-90]), rel=1e-5)


# ---- Binding (ex. 6.6), and a run ----------------------------------------------------


def knowing(tell=lambda *scene: scene):
    """Features that are equal where `tell` says the same of two scenes; else they are random."""
    vectors = {}

    def encode(scenes):
        told = [str(tell(*scene)) for scene in scenes.tolist()]
        return torch.stack([vectors.setdefault(key, torch.randn(64).sign()) for key in told])

    return encode


def measure(monkeypatch, image, text, held_out=False):
    """`evaluate` of a model that sees scenes as `image` does and reads them as `text` does."""
    model = nn.Module()
    model.encode_image, model.encode_text = image, text
    monkeypatch.setattr(clip, "render", lambda pictures, scenes: scenes)
    monkeypatch.setattr(clip, "tokenize", lambda texts: torch.tensor([*map(read, texts)]))
    found = clip.evaluate(model, *digits(500), held_out)
    assert not model.training and found.keys() == clip.CHANCE.keys()
    return found


@pytest.mark.parametrize("tell, missing", [
    (lambda d1, c1, d2, c2, r: (d1, c1, d2, c2, r), []),
    (lambda d1, c1, d2, c2, r: (sorted([(d1, c1), (d2, c2)]), r), ["places bound"]),
    (lambda d1, c1, d2, c2, r: (sorted([d1, d2]), sorted([c1, c2]), r),  # a bag of words
     ["colors bound", "places bound"]),
    (lambda d1, c1, d2, c2, r: (sorted([d1, d2]), c1, c2, r), ["colors bound"]),  # either order
    (lambda d1, c1, d2, c2, r: (d1, d2, sorted([c1, c2]), r), ["colors bound"]),  # binds nothing
    (lambda d1, c1, d2, c2, r: (d1, c1), ["axis"]),
    (lambda d1, c1, d2, c2, r: None, [*clip.CHANCE]),
])
def test_a_measure_is_0_where_knowledge_is_missing_and_else_1(monkeypatch, tell, missing):
    code = knowing(tell)
    found = measure(monkeypatch, code, code)
    found.pop("finds its caption")
    assert found == {name: name not in missing for name in found}


def test_those_who_guess_are_at_chance(monkeypatch):
    found = [measure(monkeypatch, lambda scenes: torch.ones(len(scenes), 1),
                     lambda scenes: torch.randn(len(scenes), 1)) for _ in range(3)]
    for name in list(clip.CHANCE)[1:]:  # "finds its caption" hardly ever succeeds
        mean = np.mean([fractions[name] for fractions in found])
        assert mean == pytest.approx(clip.CHANCE[name], rel=0.25), name


@pytest.mark.parametrize("kind", [False, True])
def test_1000_scenes_of_the_wanted_kind_look_for_their_caption(monkeypatch, kind):
    code, seen = knowing(), []

    def image(scenes):
        turned = torch.cat([scenes[:1].repeat(250, 1), scenes[250:]])  # a fourth sees another
        seen.append((scenes, turned))
        return code(turned)

    found = measure(monkeypatch, image, code, kind)
    (scenes, turned), = seen
    assert len(scenes) == 1000 and held_out(scenes).sum() == 1000 * kind
    right = (turned == scenes).all(1).float().mean().item()
    assert found["finds its caption"] == pytest.approx(right) and 0.7 < right < 0.8
    assert clip.CHANCE["finds its caption"] == 1 / 1000


def test_foils_show_no_held_out_pair(monkeypatch):
    code = knowing()
    found = measure(monkeypatch, code,  # with held-out pairs, anything can happen
                    lambda scenes: code(scenes) * (1 + 99 * held_out(scenes)[:, None]))
    assert found["colors bound"] == found["places bound"] == 1


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_a_run_trains_with_the_loss_asked_for_and_draws_what_it_finds(loss, tmp_path, monkeypatch):
    found = [{"digit": 0.5, "of one's own": 0.25}, {"digit": 0.75, "of one's own": 1.0}]
    asked, trained, (images, labels), net = [], [], digits(200), nn.Module()
    net.encode_image = lambda images: images.sum((1, 2, 3))[:, None] / 1000  # it knows how much
    net.encode_text = lambda tokens: torch.ones(len(tokens), 1)  # ink there is, and wants much
    monkeypatch.setattr(clip, "small_clip", lambda: net)
    monkeypatch.setattr(clip, "train", lambda args, model, loss_function, digits, labels, history:
                        trained.append((model, loss_function, digits)))
    monkeypatch.setattr(clip, "evaluate", lambda model, digits, labels, held_out:
                        asked.append((model, digits)) or found[held_out])
    data = images, labels, 255 - images, labels, "mine"
    monkeypatch.setattr(clip, "load_data", lambda args: data)
    clip.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--loss", loss, "--prompt",
               "a red nine above a blue zero; a white one left of a white two"])
    (model, loss_function, shown), = trained
    assert shown is images and (loss_function is clip.clip_loss) == (loss == "clip")
    assert all(tested is model and shown is data[2] for tested, shown in asked)
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
