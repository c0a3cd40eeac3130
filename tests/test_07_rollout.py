"""07_rollout.py by hand, by plain loops, and on maps whose worth is known."""

import json
import time
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import ROOT, load_script

rollout = load_script(ROOT / "07_rollout.py")
COUNTS = [0, 1, 4, 9, 16, 25, 36]  # patches that are black along a curve of deletion


def attention():
    """Random attention of 3 layers, for 2 images and 4 heads, some of it sharp."""
    torch.manual_seed(0)
    return (3 * torch.randn(3, 2, 4, 5, 5).double()).softmax(-1)


def network(dim=16, depth=2, heads=2):
    """A Transformer with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = rollout.VisionTransformer(dim, depth, heads).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


# ---- Lesson one: rollout (ex. 5.2) ---------------------------------------------------


@pytest.mark.parametrize("kept", [0.5, 0])
def test_rollout_is_the_sum_over_all_paths_between_two_tokens(kept):
    """An entry of the product, as in exercise 5.2, is Σ A3[i, k] A2[k, m] A1[m, j]."""
    a, N = attention(), 5
    A = (1 - kept) * sum(a[:, :, h] for h in range(4)) / 4 + kept * torch.eye(N)
    A1, A2, A3 = A.tolist()
    expected = torch.zeros(2, N, N, dtype=torch.float64)
    for b, i, k, m, j in product(range(2), *4 * [range(N)]):
        expected[b, i, j] += A3[b][i][k] * A2[b][k][m] * A1[b][m][j]
    assert_close(rollout.attention_rollout(a, kept), expected)


def test_of_uniform_attention_half_is_kept_in_each_layer():
    """The mean over the tokens, P = P P, mixes with I: ((P + I) / 2)^4 = P + (I - P) / 16."""
    P, identity = torch.full((6, 6), 1 / 6, dtype=torch.float64), torch.eye(6)
    A = P.expand(4, 2, 3, 6, 6)
    assert_close(rollout.attention_rollout(A)[1], P + (identity - P) / 16)
    assert_close(rollout.attention_rollout(A, kept=0)[1], P)


def test_rows_sum_to_one_whatever_is_done_to_heads():
    A = attention()[0]
    A[:, :, 0] = A[:, :, :, 2:] = 0  # nothing is left of row 0, a part of the others
    sums = torch.tensor([0, 1, 1, 1, 1], dtype=torch.float64)
    assert_close(rollout.merge_heads(A).sum(2), sums.expand(2, 5))


def test_gradient_rollout_of_logits_whose_gradients_are_known():
    """Logits Σ G a, with weights G for each class: the gradient by a is G."""
    a, G = attention().requires_grad_().unbind(), torch.randn(3, 2, 10, 4, 5, 5).double()
    logits = sum((G[layer] * a[layer][:, None]).sum((2, 3, 4)) for layer in range(3))
    found = rollout.gradient_rollout(a, logits)
    for b, best in enumerate(logits.argmax(1)):
        R = torch.eye(5, dtype=torch.float64)
        for layer in range(3):  # equations 5 and 6
            useful = (G[layer, b, best] * a[layer][b]).clamp(min=0)
            R = R + sum(useful[h] for h in range(4)) / 4 @ R
        assert_close(found[b], R)


def test_a_frozen_model_is_explained_and_the_image_is_left_as_it_was():
    model, x = network(), torch.randn(4, 1, 48, 48).double()
    logits, attentions = model.look(x)
    W1, W2 = (a.mean(1) for a in attentions)
    identity = torch.eye(37)
    expected = {
        "last layer": W2,
        "mean of layers": (W1 + W2) / 2,
        "without residual": W2 @ W1,
        "rollout": (W2 + identity) @ (W1 + identity) / 4,
        "gradient": rollout.gradient_rollout(attentions, logits),
    }
    maps = rollout.explain(model.requires_grad_(False), x)
    assert set(maps) == set(expected) and not x.requires_grad
    for name, matrix in expected.items():
        row = matrix[:, 0, 1:].detach()  # what the class token takes from each patch
        assert_close(maps[name], row / row.sum(1, keepdim=True))
        assert not maps[name].requires_grad
    nothing = rollout.patch_map(torch.eye(5)[None])  # takes from itself only
    assert nothing.tolist() == [[0.25] * 4]


# ---- Second lesson: measures ---------------------------------------------------------


def test_overlap_counts_pixels():
    corners, sizes = torch.randint(25, (20, 2)), torch.randint(1, 24, (20, 2))
    boxes = torch.cat([corners, corners + sizes], 1)
    for (top, left, bottom, right), found in zip(boxes.tolist(), rollout.overlap(boxes)):
        share = [0] * 36
        for y, x in product(range(top, bottom), range(left, right)):
            share[y // 8 * 6 + x // 8] += 1 / 64
        assert found.tolist() == share


def test_pointing_and_mass_of_maps_whose_worth_is_known():
    inside = torch.tensor([[0.0, 0.25, 1.0, 0.0]]).expand(5, 4)
    maps = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.1, 0.5, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1],
                         [0.25, 0.25, 0.25, 0.25], [0.4, 0.0, 0.4, 0.2]])
    assert rollout.pointing(maps, inside).tolist() == [1, 1, 0, 0.5, 0.5]
    for factor in (1, 7, 1e-20):
        found = rollout.mass(factor * maps, inside)
        assert_close(found, torch.tensor([0.65, 0.325, 0.125, 0.3125, 0.4]))
    assert rollout.mass(0 * maps, inside).tolist() == [0] * 5


def test_deletion_blackens_the_strongest_patches_first():
    """The logit of class c is the mean of patch c, of black -1: the curve is known."""
    x, maps = 2 * torch.rand(3, 1, 48, 48) - 1, torch.rand(3, 36)
    maps[2] = maps[2].round()  # of equal ones, the first in reading order
    labels = torch.tensor([3, 0, 9], dtype=torch.uint8)
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    curve = rollout.deletion(model, x, labels, maps)
    for b, label in enumerate(labels.tolist()):
        order = sorted(range(36), key=lambda patch: -maps[b, patch])
        for found, count in zip(curve[b], COUNTS, strict=True):
            logits = model(x)[b]
            logits[order[:count]] = -1
            assert_close(found, logits.softmax(0)[label])


def test_the_measures_are_means_over_the_scenes_of_every_map(monkeypatch):
    drawn, labels = rollout.draw_characters(60)
    x, boxes = rollout.scenes(drawn, drawn, 2)
    model, inside = network().float(), rollout.overlap(boxes)
    found, curves = rollout.measure(model, x, labels, boxes)
    maps = rollout.explain(model, x)
    maps["ink"] = F.unfold(x + 1, 8, stride=8).mean(1)  # (B, 64, 36) -> (B, 36)
    maps["the box"] = inside
    assert set(found) == set(curves) == {*maps, "random"}
    for name, values in maps.items():
        pointing, mass = rollout.pointing(values, inside), rollout.mass(values, inside)
        curve = rollout.deletion(model, x, labels, values).mean(0).tolist()
        points = pairwise(zip(COUNTS, curve, strict=True))
        area = sum((n1 - n0) / 36 * (p0 + p1) / 2 for (n0, p0), (n1, p1) in points)
        assert curves[name].tolist() == pytest.approx(curve, abs=1e-4)
        expected = {"pointing": pointing.mean(), "mass": mass.mean(), "deletion": area}
        for key, value in expected.items():
            assert found[name][key] == pytest.approx(float(value), abs=1e-4)
    touched = (inside > 0).float().mean().item()
    hits = 60 * found["random"]["pointing"]  # no ties, so a whole number
    assert hits == pytest.approx(round(hits), abs=1e-3) and abs(hits / 60 - touched) < 0.2
    assert found["random"]["mass"] == pytest.approx(inside.mean().item(), abs=0.03)
    monkeypatch.setattr(rollout, "explain", lambda model, x: {"mine": -inside})
    with pytest.raises(AssertionError, match="mine is negative or NaN"):
        rollout.measure(model, x, labels, boxes)


# ---- Model and scenes ----------------------------------------------------------------


def test_the_model_is_torchs_transformer_with_the_norm_first():
    model, x = network(depth=3), torch.randn(4, 1, 48, 48).double()
    logits, attentions = model.look(x)
    z = model.stem(x).flatten(2).transpose(1, 2)  # 36 tokens, row by row
    z = torch.cat([model.cls_token.expand(4, 1, 16), z], 1) + model.pos_embed
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj",
             "mlp.0": "linear1", "mlp.2": "linear2"}
    for block, a in zip(model.blocks, attentions, strict=True):
        weights = block.state_dict()
        for ours, theirs in names.items():
            weights = {name.replace(ours, theirs): w for name, w in weights.items()}
        layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0, activation="gelu",
                                           batch_first=True, norm_first=True).double()
        layer.load_state_dict(weights)
        h = layer.norm1(z)
        assert_close(a, layer.self_attn(h, h, h, average_attn_weights=False)[1])
        z = layer(z)
    assert_close(logits, model.head(model.norm(z[:, 0])))
    assert_close(model(x), logits)


def test_a_token_sees_its_patch_and_three_pixels_around_it():
    stem, x = network().stem, torch.rand(1, 1, 48, 48).double().requires_grad_()
    for p in stem.parameters():
        p.data.abs_()  # no ReLU is closed: all that a token can see has a gradient
    tokens = stem(x)
    for row, column in ((1, 2), (3, 4), (5, 0)):
        seen, = torch.autograd.grad(tokens[0, :, row, column].sum(), x, retain_graph=True)
        expected = torch.zeros(48, 48, dtype=torch.bool)
        expected[8 * row - 3:8 * row + 11, max(8 * column - 3, 0):8 * column + 11] = True
        assert seen[0, 0].bool().equal(expected)


def levels(scenes):
    """Pixels (B, 48, 48) in 0..255 of scenes (B, 1, 48, 48) in [-1, 1]."""
    return ((scenes[:, 0] + 1) * 127.5).round().byte()


def spread_over(places, *sizes):
    """Places (B, K) take all values 0, 1, ... below each size, and independently."""
    for values, size in zip(places.T, sizes, strict=True):
        assert values.unique().tolist() == list(range(size))
    correlations = torch.corrcoef(places.T.float()) - torch.eye(len(sizes))
    assert correlations.abs().max() < 0.2


def test_a_scene_without_clutter_is_its_digit_in_its_box():
    drawn, _ = rollout.draw_characters(200)
    x, boxes = rollout.scenes(drawn, drawn, 0)
    assert x.shape == (200, 1, 48, 48) and x.min() == -1
    for scene, digit, (top, left, bottom, right) in zip(levels(x), drawn, boxes.tolist()):
        ink = digit.nonzero()
        (y0, x0), (y1, x1) = ink.amin(0), ink.amax(0) + 1
        expected = torch.zeros(48, 48, dtype=torch.uint8)
        expected[top:bottom, left:right] = digit[y0:y1, x0:x1]
        assert scene.equal(expected)
    full = torch.full((2000, 28, 28), 9, dtype=torch.uint8)
    _, boxes = rollout.scenes(full, full, 0)
    spread_over(boxes[:, :2], 21, 21)  # the whole canvas is used


def test_clutter_comes_from_the_pool_and_never_darkens():
    digits = torch.zeros(100, 28, 28, dtype=torch.uint8)
    digits[:, 10:20, 12:15] = 100
    pool = torch.tensor([7, 14, 210], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    x, boxes = rollout.scenes(digits, pool, 3)
    scenes = levels(x)
    assert scenes.unique().tolist() == [0, 7, 14, 100, 210]
    assert scenes.amax((1, 2)).unique().tolist() == [100, 210]  # each scene has its own pieces
    cluttered = ((scenes > 0) & (scenes != 100)).flatten(1).sum(1)
    assert 2 * 64 < cluttered.max() <= 3 * 64  # three pieces, which may overlap
    for scene, (top, left, bottom, right) in zip(scenes, boxes.tolist()):
        assert scene[top:bottom, left:right].min() >= 100  # the brighter pixel wins


def test_a_piece_is_cut_from_the_middle_of_an_image_and_put_anywhere():
    pool = torch.randint(1, 256, (1, 28, 28)).byte()
    windows = pool[0].unfold(0, 8, 1).unfold(1, 8, 1)  # (21, 21, 8, 8)
    x, _ = rollout.scenes(torch.zeros(600, 28, 28, dtype=torch.uint8), pool, 1)
    found = []
    for scene in levels(x):
        top, left = scene.nonzero().amin(0)
        piece = scene[top:top + 8, left:left + 8]
        (y, x), = (windows == piece).all(3).all(2).nonzero()
        found.append([y - 4, x - 4, top, left])
    spread_over(torch.tensor(found), 14, 14, 41, 41)


# ---- Training, and what a run reports ------------------------------------------------


class Prior(nn.Module):
    """Logits that do not look at the scene: at best the log of how often each label occurs."""

    def __init__(self):
        super().__init__()
        self.w, self.seen, self.labels = nn.Parameter(torch.zeros(10)), [], []

    def forward(self, x):
        assert self.training
        self.seen.append(x)
        logits = self.w.expand(len(x), 10)
        logits.register_hook(lambda slope: self.labels.append(slope.argmin(1)))  # p - 1 < 0
        return logits


def test_each_epoch_sees_each_image_once_in_a_new_scene_with_its_label():
    shades = 5 * torch.arange(1, 50, dtype=torch.uint8)
    images = shades.view(49, 1, 1).expand(49, 28, 28)
    labels = torch.tensor([0] * 29 + [1] * 14 + [2] * 6)
    args = rollout.get_args("--epochs 60 --batch-size 10 --lr 0.1 --clutter 0".split())
    model, history = Prior().eval(), []
    rollout.train(args, model, images, labels, history)
    scenes = levels(torch.cat(model.seen)).view(60, 49, 48, 48)
    order = scenes.amax((2, 3)).long() // 5 - 1
    assert order.sort(1).values.equal(torch.arange(49).expand(60, 49))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert torch.cat(model.labels).equal(labels[order.flatten()])
    one, two = (scenes[epoch][order[epoch].argsort()] > 0 for epoch in (0, 1))
    assert (one != two).flatten(1).any(1).float().mean() > 0.9  # other places
    share = labels.bincount(minlength=10) / 49
    assert_close(model.w.softmax(0), share, atol=0.02, rtol=0)
    entropy = torch.distributions.Categorical(share).entropy().item()
    assert history[-1][:2] == [300, pytest.approx(entropy, abs=0.03)]


def test_results_and_pictures_are_those_of_both_networks(tmp_path, monkeypatch):
    images, labels = rollout.draw_characters(100)
    tests, answers = 255 - images, labels.flip(0)
    data = images, labels, tests, answers, "mine"
    monkeypatch.setattr(rollout, "load_data", lambda args: data)
    explain = rollout.explain  # one map is of zeros, and black, as Grad-CAM's can be
    monkeypatch.setattr(rollout, "explain", lambda model, x: {
        **explain(model, x), "zeros": torch.zeros(len(x), 36)})
    torch.save(network(64, 4, 4).state_dict(), tmp_path / "start.pt")

    def run(name, *flags):
        rollout.main(["--out", str(tmp_path / name), "--device", "cpu", "--clutter", "2",
                      "--measured", "8", *flags])
        return json.loads((tmp_path / name / "metrics.json").read_text())["results"]

    untrained = run("fresh", "--epochs", "0")["trained"]
    rollout.plt.close("all")
    results = run("trained", "--epochs", "1", "--load", str(tmp_path / "start.pt"))
    model = rollout.VisionTransformer().eval()
    saved = torch.load(tmp_path / "trained" / "model.pt", weights_only=True)
    model.load_state_dict(saved["weights"])
    torch.manual_seed(0)  # the scenes depend on the seed, not on the training
    x, boxes = rollout.scenes(tests, tests, 2)
    right = (model(x).argmax(1) == answers).float().mean().item()
    assert results["accuracy (chance 0.1)"] == pytest.approx(right)
    trained, expected_curves = rollout.measure(model, x[:8], answers[:8], boxes[:8])
    for name, key in product(set(trained) - {"random"}, ("pointing", "mass", "deletion")):
        for found, expected in (("trained", trained), ("untrained", untrained)):
            assert results[found][name][key] == pytest.approx(expected[name][key], abs=1e-4)

    figures = map(rollout.plt.figure, rollout.plt.get_fignums())
    maps, measures = sorted(figures, key=lambda figure: len(figure.axes))
    bars, curves = {}, {}
    for axes in measures.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        for container in axes.containers:
            widths = [bar.get_width() for bar in container]
            bars[axes.get_xlabel(), container.get_label()] = dict(zip(names, widths))
        for line in axes.lines:
            curves[line.get_label()] = list(zip(line.get_xdata(), line.get_ydata()))
    for key, which in product(("pointing", "mass"), ("trained", "untrained")):
        assert bars[key, which] == {name: row[key] for name, row in results[which].items()}
    assert set(curves) == set(trained)
    for name in set(trained) - {"random"}:
        assert [y for _, y in curves[name]] == pytest.approx(expected_curves[name].tolist())
        assert [x for x, _ in curves[name]] == rollout.FRACTIONS

    picture = np.asarray(maps.axes[0].images[0].get_array()).squeeze()
    tiles = torch.tensor(picture.reshape(8, 50, -1, 50).swapaxes(1, 2)[:, :, 1:-1, 1:-1])
    names, scenes = maps.axes[0].get_title().split(", "), (x[:8, 0] + 1) / 2
    assert_close(tiles[:, names.index("scene")], scenes)
    for name, values in rollout.explain(model, x[:8]).items():
        light = (values / values.amax(1, keepdim=True).clamp(min=1e-30)).view(8, 6, 6)
        light = light.repeat_interleave(8, 1).repeat_interleave(8, 2)
        expected = light * (0.3 + 0.7 * scenes)
        assert_close(tiles[:, names.index(name)], expected, atol=1e-3, rtol=0)


def test_scenes_are_made_quickly():
    """Making them must stay a small part of a training step."""
    images, labels = rollout.draw_characters(2000)
    model, making, learning = rollout.VisionTransformer(), [], []
    for _ in range(6):
        began = time.process_time()
        x, _ = rollout.scenes(images[:64], images)
        middle = time.process_time()
        F.cross_entropy(model(x), labels[:64]).backward()
        making.append(middle - began)
        learning.append(time.process_time() - middle)
    assert min(making) < 0.3 * min(learning)


def test_default_network_learns_the_real_digits(real_data, tmp_path):
    rollout.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
                  "--epochs", "3", "--train-size", "3000", "--clutter", "0", "--measured", "20"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results["accuracy (chance 0.1)"] > 0.2
