"""06_clip.py: two towers, the contrastive loss, a world of scenes, binding, the queue.

Exercises: 第6章, 6.1 (the loss), 6.2 and 6.4 (the towers), 6.6 (binding), 6.8 (ITC)."""

import json
import math
import re
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import ROOT, load_script

clip = load_script(ROOT / "06_clip.py")
END = len(clip.WORDS) + 2
EVERY_SCENE = torch.cartesian_prod(*map(torch.arange, [10, 6, 10, 6, 2]))


def digits(count=40):
    """Squares of different size as digits, so that the picture tells the label."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[13 - label:15 + label, 13 - label:15 + label] = 255
    return images, labels.byte()  # as in the files


def words(row):
    """What a row of tokens says, without START, END and padding."""
    return " ".join(clip.WORDS[token - 1] for token in row if 0 < token < END - 1)


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
    assert_close(block(x, mask), expected)


def test_parameters_are_those_of_a_published_vit_b_32():
    with torch.device("meta"):  # the example of the docstring
        model = eval(re.search(r"CLIP\(V.*512\)", clip.CLIP.__doc__, re.S).group(), vars(clip))
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


def test_towers_by_hand_and_logits_are_cosines_times_at_most_100():
    net, images = clip.small_clip(), torch.rand(3, 3, 40, 40)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    text = clip.tokenize(["a red one above a blue two", "the blue one is above the red two"])
    text[0, 9:] = torch.tensor([4, 2, 7])  # after the end
    tower, features = net.visual, net.visual.conv1(images)
    patches = torch.stack([features[:, :, i // 5, i % 5] for i in range(25)], 1)
    h = torch.cat([tower.class_embedding.repeat(3, 1, 1), patches], 1)
    h = tower.ln_pre(h + tower.positional_embedding)
    for block in tower.transformer.resblocks:
        h = block(h, 0)
    assert_close(tower.encode(images), h)
    u = tower.ln_post(h[:, 0]) @ tower.proj
    h = net.token_embedding(text) + net.positional_embedding
    for block in net.transformer.resblocks:
        h = block(h, nn.Transformer.generate_square_subsequent_mask(12))
    h = net.ln_final(h)
    assert_close(net.encode_tokens(text), h)
    w = h[[0, 1], [8, 9]] @ net.text_projection
    for scale, seen in ((7.0, 7.0), (500.0, 100.0)):
        net.logit_scale.data.fill_(math.log(scale))
        cosines = F.cosine_similarity(u[:, None], w, dim=2)
        assert_close(net(images, text), seen * cosines, rtol=1e-4, atol=1e-4)
    assert clip.small_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ---- The losses (ex. 6.1, 6.8) -------------------------------------------------------


class Given(nn.Linear):
    """A model whose two towers are one matrix."""

    encode_image = encode_text = nn.Linear.forward

    def logits(self, u, w):
        return 3 * u @ w.T

    def forward(self, images, texts):
        return self.logits(self.encode_image(images), self.encode_text(texts))


def surprise(feature, others, answer):
    """-log softmax of the answer among others."""
    logits = torch.stack([3 * feature @ other for other in others])
    return logits.logsumexp(0) - 3 * feature @ answer


def test_the_loss_is_exercise_6_1_in_plain_loops():
    model, images, texts = Given(8, 8), *torch.randn(2, 5, 8)
    u, w = model.encode_image(images), model.encode_text(texts)
    total = sum(surprise(u[a], w, w[a]) + surprise(w[a], u, u[a]) for a in range(5)) / 2 / 5
    assert_close(clip.clip_loss(model, images, texts, EVERY_SCENE[:5]), total)


def test_itc_is_exercise_6_8_in_plain_loops():
    """With room for two batches; the slow features have no gradient."""
    model, waiting = Given(8, 8, bias=False), []
    slow, loss = model.weight.detach().clone(), clip.ITC(model)
    loss.M = 6
    for step in range(4):
        model.weight.data = torch.randn(8, 8) / 3
        slow = 0.995 * slow + 0.005 * model.weight.detach()
        images, texts, scenes = *torch.randn(2, 3, 8), EVERY_SCENE[[step, 1, 7]].tolist()
        rows, total = [*zip(images @ slow.T, texts @ slow.T, scenes), *waiting], 0
        for fast, other in ((images @ model.weight.T, 1), (texts @ model.weight.T, 0)):
            for a in range(3):  # the answer, and features of all scenes but this one
                others = [row[other] for b, row in enumerate(rows) if b == a or row[2] != scenes[a]]
                total += surprise(fast[a], others, rows[a][other]) / 2 / 3
        found = loss(model, images, texts, torch.tensor(scenes))
        assert_close(found, total)
        assert_close(*(torch.autograd.grad(value, model.weight) for value in (found, total)))
        waiting = rows[:6]


def test_ten_pairs_can_be_learned_by_heart_and_all_parameters_help():
    (images, labels), model = digits(), clip.small_clip()
    scenes, index = clip.sample_scenes(labels, torch.arange(10))
    images = clip.render(images[index], scenes)
    tokens = clip.tokenize(map(clip.caption, scenes.tolist()))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for loss_function in [clip.ITC(model)] + 40 * [clip.clip_loss]:
        loss = loss_function(model, images, tokens, scenes)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in model.parameters())
        optimizer.step()
    assert loss < 0.5


# ---- The world -----------------------------------------------------------------------


def test_every_sentence_is_tokenized_and_reads_back_as_its_scene():
    for scene in EVERY_SCENE[::7].tolist():
        told = [clip.caption(scene, phrase, side) for phrase in range(4) for side in range(2)]
        assert len(set(told)) == 8 and {read(text) for text in told} == {tuple(scene)}
        for text, row in zip(told, clip.tokenize(told).tolist(), strict=True):
            end = 1 + len(text.split())
            assert words(row) == text and row[0] == END - 1
            assert row[end:] == [END] + (clip.LENGTH - end - 1) * [0]
    assert clip.caption([3, 0, 7, 2, 0], 1, 1) == "the blue seven is below the red three"
    with pytest.raises(AssertionError, match="use only the words"):
        clip.tokenize(["a cat above a blue seven"])
    assert clip.WORDS == sorted(clip.WORDS)  # the same numbers in the next run, for --load
    bright = {name: "".join(c for c, v in zip("RGB", rgb) if v == 1)
              for name, rgb in clip.COLORS.items()}
    assert bright == dict(red="R", green="G", blue="B", yellow="RG", magenta="RB", white="RGB")


def held_out(scenes):
    return (scenes[:, [0, 2]] % 6 == scenes[:, [1, 3]]).any(1)


def test_held_out_pairs_never_occur_in_training_and_always_where_asked():
    labels, first = digits()[1], torch.arange(40).repeat(250)
    scenes, index = clip.sample_scenes(labels, first)
    assert index[:, 0].equal(first) and index[:, 1].bincount().min() > 150
    assert labels[index].equal(scenes[:, [0, 2]].byte())
    assert not held_out(scenes).any()
    assert len(scenes[:, :4].reshape(-1, 2).unique(dim=0)) == 50  # all other pairs occur
    assert scenes[:, 4].float().mean() == pytest.approx(0.5, abs=0.03)
    scenes, _ = clip.sample_scenes(labels, first, held_out=True)
    assert (scenes[:, 1] == scenes[:, 0] % 6).all()
    assert not (scenes[:, 3] == scenes[:, 2] % 6).any()
    assert clip.shows_held_out(EVERY_SCENE).equal(held_out(EVERY_SCENE))


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
            side = (hue.max() / colors[c].max()).sqrt()  # a digit is 0.58 of 40 pixels wide
            assert side == pytest.approx((2 + 2 * d) / 28 * 0.58 * 40, rel=0.05, abs=0.3)


def test_places_are_random_within_bounds_and_independent():
    white = torch.tensor([0, 5, 0, 5, 0]).repeat(500, 1)  # both digits, one above the other
    ink = torch.zeros(500, 2, 28, 28, dtype=torch.uint8)
    ink[:, :, 13:15, 13:15] = 255
    line, places = (torch.arange(40) + 0.5 - 20) / 20, []
    upper, lower = clip.render(ink, white)[:, 0].split(20, 1)
    for half, rows, middle in ((upper, line[:20], -0.5), (lower, line[20:], 0.5)):
        mass = half.sum((1, 2))
        y, x = (half.sum(2) * rows).sum(1) / mass, (half.sum(1) * line).sum(1) / mass
        assert y.mean() == pytest.approx(middle, abs=0.02) and abs(x.mean()) < 0.02
        assert y.std() > 0.03 and x.std() > 0.03 and (y - middle).abs().max() < 0.13
        places += [y, x]
    assert (torch.corrcoef(torch.stack(places)) - torch.eye(4)).abs().max() < 0.2
    assert clip.render(ink | 255, white).max().item() == pytest.approx(1)  # they overlap


def test_colors_and_relations_can_be_added(tmp_path):
    source = (ROOT / "06_clip.py").read_text(encoding="utf-8")
    for start, new in (("\nCOLORS = {", '"cyan": (0.25, 1, 1), '), ('\nOTHERS = "', "over under "),
                       ("\nRELATIONS = {", '("over", "under"): (1, 1), ')):
        source = source.replace(start, start + new)
    (tmp_path / "more.py").write_text(source, encoding="utf-8")
    more, (images, labels) = load_script(tmp_path / "more.py"), digits()
    scenes, _ = more.sample_scenes(labels, torch.arange(40).repeat(50))
    assert scenes.amax(0).tolist() == [9, 6, 9, 6, 2] and more.CHANCE["color"] == 1 / 7
    assert not (scenes[:, [0, 2]] % 7 == scenes[:, [1, 3]]).any()
    assert not more.shows_held_out(scenes).any()
    assert more.caption([4, 0, 3, 1, 0]) == "a cyan four over a red three"
    pictures = more.render(images[None, [4, 3]], torch.tensor([[4, 0, 3, 1, 0]]))
    corner = pictures[0, :, :20, :20].sum((1, 2))  # the first is at the upper left
    assert 0 < corner[0] < corner[1]  # cyan has little red
    assert pictures[:, :, :16, 24:].sum() == pictures[:, :, 24:, :16].sum() == 0


# ---- Training ------------------------------------------------------------------------


def train(loss_function, flags, count=40):
    """Train a model of one number on squares; return the history."""
    history, model = [], nn.ParameterList([torch.zeros(())]).eval()
    clip.train(clip.get_args(flags.split()), model, loss_function, *digits(count), history)
    return history


def test_training_shows_scenes_twins_and_all_ways_to_say_them(monkeypatch):
    seen = []

    def loss_function(model, images, tokens, scenes):
        assert model.training
        seen.append((images, tokens, scenes))
        return model[0] + 0

    firsts, sample = [], clip.sample_scenes
    monkeypatch.setattr(clip, "sample_scenes", lambda labels, first, *more: (
        firsts.append(first) or sample(labels, first, *more)))
    train(loss_function, "--epochs 3 --batch-size 40 --twins 0.2", count=411)
    assert [len(scenes) for _, _, scenes in seen] == 3 * (10 * [40] + [11])
    assert torch.stack(firsts).sort(1).values.equal(torch.arange(411).expand(3, 411))
    assert not firsts[0].equal(firsts[1])  # each image once an epoch, in a new order
    images, tokens, scenes = (torch.cat(tensors) for tensors in zip(*seen))
    texts = [words(row) for row in tokens]
    assert [read(text) for text in texts] == [tuple(scene) for scene in scenes.tolist()]
    ways = {tuple(word for word in text.split() if word in clip.OTHERS) for text in texts}
    assert len(ways) == 16  # four phrases, two sides, two relations
    halves = [picture.split(20, 1 + axis)[0] for picture, axis in zip(images, scenes[:, 4])]
    sides = [half.amax(0).sum().sqrt() for half in halves]  # of the squares that are the digits
    assert np.corrcoef(sides, scenes[:, 0])[0, 1] > 0.95
    pairs = scenes.view(3, 411, 5)[:, :410].view(3, 205, 2, 5)
    twins = (pairs[:, :, 1] == pairs[:, :, 0][..., [2, 3, 0, 1, 4]]).all(2)
    assert twins.double().mean().item() == pytest.approx(0.4, abs=0.06)
    assert not (pairs[1:] == pairs[:-1]).all(3).all(2).all(1).any()  # a new world in each epoch
    monkeypatch.setattr(clip, "SWAP_PLACES", clip.SWAP_COLORS)
    with pytest.raises(AssertionError):  # 30% of these twins would show a held-out pair
        train(loss_function, "--epochs 1", count=400)


def test_training_is_adam_with_a_rate_that_ends_at_zero():
    path = []

    def slope(model, images, tokens, scenes):
        path.append(model[0].item())
        return 5 + 0.1 * model[0]

    history = train(slope, "--epochs 20 --batch-size 4 --lr 0.01")
    rates = -np.diff(path)  # Adam: a constant slope moves by the rate
    assert rates.max() == pytest.approx(0.01, rel=0.02)
    assert rates.min() > 0 and rates[-1] < 1e-4 and (np.diff(rates[100:]) < 1e-6).all()
    assert history[10][:2] == [110, pytest.approx(5 + 0.1 * np.mean(path[100:110]), rel=1e-5)]


# ---- Binding (ex. 6.6), and a run ----------------------------------------------------


def knowing(tell=lambda *scene: scene):
    """Features that are equal where `tell` says the same of two scenes; else they are random."""
    vectors = defaultdict(lambda: torch.randn(64).sign())
    return lambda scenes: torch.stack([vectors[str(tell(*scene))] for scene in scenes.tolist()])


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
])
def test_a_measure_is_0_where_knowledge_is_missing_and_else_1(monkeypatch, tell, missing):
    code = knowing(tell)
    found = measure(monkeypatch, code, code)
    found.pop("finds its caption")
    assert found == {name: name not in missing for name in found}


def test_those_who_guess_are_at_chance(monkeypatch):
    found = [measure(monkeypatch, lambda scenes: torch.ones(len(scenes), 1),
                     lambda scenes: torch.randn(len(scenes), 1)) for _ in range(3)]
    chance = {"finds its caption": 1 / 1000, "digit": 1 / 10, "color": 1 / 6,
              "axis": 1 / 2, "colors bound": 1 / 3, "places bound": 1 / 2}
    assert clip.CHANCE == pytest.approx(chance)
    for name, expected in chance.items():
        assert sum(run[name] for run in found) / 3 == pytest.approx(expected, rel=0.25, abs=0.005)


@pytest.mark.parametrize("kind", [False, True])
def test_1000_images_of_the_wanted_kind_look_for_captions_of_seen_pairs(monkeypatch, kind):
    code, seen = knowing(), []

    def image(scenes):  # captions would find the longer features
        seen.append(scenes)
        return code(scenes) * torch.tensor([[1], [99]]).repeat(500, 1)

    def text(scenes):  # with held-out pairs, anything can happen
        return code(scenes) * (1 + 99 * held_out(scenes)[:, None])

    found = measure(monkeypatch, image, text, kind)
    assert len(seen[0]) == 1000 and held_out(seen[0]).sum() == 1000 * kind
    assert found["finds its caption"] == found["colors bound"] == found["places bound"] == 1


@pytest.mark.parametrize("loss", ["clip", "itc"])
def test_a_run_trains_with_the_loss_asked_for_and_draws_what_it_finds(loss, tmp_path, monkeypatch):
    found = [{"digit": 0.5, "of one's own": 0.25}, {"digit": 0.75, "of one's own": 1.0}]
    (images, labels), net = digits(200), nn.Module()
    data = images, labels, 255 - images, labels, "mine"
    net.encode_image = lambda images: images.sum((1, 2, 3))[:, None]  # how much ink there is
    net.encode_text = lambda tokens: torch.tensor([[1.0], [-1.0]])  # the most, the least

    def train(args, model, loss_function, digits, labels, history):
        assert model is net and digits is images
        assert (loss_function is clip.clip_loss) == (loss == "clip")

    def evaluate(model, digits, labels, held_out):
        assert model is net and digits is data[2]
        return found[held_out]

    for name, stub in (("small_clip", lambda: net), ("load_data", lambda args: data),
                       ("train", train), ("evaluate", evaluate)):
        monkeypatch.setattr(clip, name, stub)
    clip.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--loss", loss, "--prompt",
               "a red nine above a blue zero; a white one left of a white two"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results == {"seen pairs": found[0], "held-out pairs": found[1], "chance": clip.CHANCE}
    bars, nearest = plt.gcf().axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    for kind, expected in zip(bars.containers, (*found, clip.CHANCE), strict=True):
        middles = [round(bar.get_y() + bar.get_height() / 2) for bar in kind]
        assert {names[y]: bar.get_width() for y, bar in zip(middles, kind)} == expected
    assert "wide: seen pairs, narrow: held out, thin: chance" in bars.get_title()
    heights = [kind[0].get_height() for kind in bars.containers]
    assert heights == sorted(heights, reverse=True)
    assert "a white one left of a white two" in nearest.get_title()
    picture = np.asarray(nearest.images[0].get_array())
    tiles = picture.reshape(2, 42, 6, 42, 3)[:, 1:-1, :, 1:-1]  # without frames
    most, least = tiles.sum((1, 3, 4)).tolist()
    assert most == sorted(most, reverse=True) and least == sorted(least)
    assert most[-1] > 2000  # test images are bright
