"""07_rollout.py by hand, by plain loops, and on maps whose worth is known."""

import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, load_script

rollout = load_script(ROOT / "07_rollout.py")


def attention(L=3, B=2, h=4, N=7, seed=0):
    """Random attention (L, B, h, N, N), some of it sharp."""
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(L, B, h, N, N, generator=random, dtype=torch.float64)).softmax(-1)


def network(depth=2):
    """A small Transformer with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = rollout.VisionTransformer(16, depth, 2).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def canvas(count=4):
    return torch.randn(count, 1, 48, 48, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(3))


# ---- Lesson one: rollout (ex. 5.2) ---------------------------------------------------


def test_rollout_is_the_recursion_of_the_text():
    A = attention()
    for b in range(2):  # one image, one row, one entry at a time
        before = None
        for layer in range(3):
            mixed = torch.zeros(7, 7, dtype=torch.float64)
            for i in range(7):
                row = [sum(A[layer, b, h, i, j].item() for h in range(4)) / 4 + (i == j)
                       for j in range(7)]
                for j in range(7):
                    mixed[i, j] = row[j] / sum(row)
            now = mixed if before is None else torch.tensor(
                [[sum(mixed[i, k] * before[k, j] for k in range(7)) for j in range(7)]
                 for i in range(7)])
            torch.testing.assert_close(rollout.attention_rollout(A[:layer + 1])[b], now)
            before = now


def test_the_later_layer_multiplies_from_the_left():
    first = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    A = torch.stack([first, second])[:, None, None]  # (2, 1, 1, 3, 3)
    bare = rollout.attention_rollout(A, kept=0)[0]
    assert bare.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]  # A2 A1; A1 A2 has other rows
    assert bare.equal(second @ first) and not bare.equal(first @ second)
    halves = rollout.attention_rollout(A)[0]
    assert halves.equal((second + torch.eye(3)) @ (first + torch.eye(3)) / 4)


def test_tokens_that_keep_to_themselves_roll_out_to_the_identity():
    A = torch.eye(6).expand(5, 2, 3, 6, 6)
    for kept in (0.5, 0):
        assert rollout.attention_rollout(A, kept).equal(torch.eye(6).expand(2, 6, 6))


def test_uniform_attention_gives_uniform_rows():
    A = torch.full((4, 2, 3, 6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(rollout.attention_rollout(A, kept=0), A[0, :, 0])
    rolled = rollout.attention_rollout(A)  # with the residual: half stays, four times over
    torch.testing.assert_close(rolled[0, 0, 1:], rolled[0, 0, 1].expand(5))
    torch.testing.assert_close(rolled[0, 0, 0] - rolled[0, 0, 1], torch.tensor(0.5**4).double())


@pytest.mark.parametrize("kept", [0.5, 0])
def test_rows_sum_to_one_and_images_stay_apart(kept):
    A = attention(B=3)
    rolled = rollout.attention_rollout(A, kept)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert rolled.min() >= 0
    for b in range(3):
        torch.testing.assert_close(rollout.attention_rollout(A[:, b:b + 1], kept)[0], rolled[b])


def test_heads_are_averaged_and_rows_sum_to_one_whatever_is_done_to_them():
    A = attention()[0]
    torch.testing.assert_close(rollout.merge_heads(A), A.mean(1))
    some = rollout.merge_heads(A * (torch.rand(2, 1, 7, 7) > 0.8))  # most entries dropped
    sums = some.sum(2)
    assert some.isfinite().all() and ((sums - 1).abs().minimum(sums) < 1e-9).all()


def test_gradient_rollout_is_that_of_finite_differences():
    """Each entry of each attention is moved a little: the N entries of a row as one batch."""
    model, x = network(2), canvas(1)
    logits, maps = model.look(x)
    chosen, N = logits.argmax(1).item(), 37
    found = rollout.gradient_rollout(maps, logits)

    def moved(shift, layer, h, i):
        """The highest logit, with entry (h, i, j) of one attention moved, for all j: (N,)."""
        z = torch.cat([model.cls_token, model.stem(x).flatten(2).transpose(1, 2)], 1)
        z = (z + model.pos_embed).expand(N, N, 16)
        for k, block in enumerate(model.blocks):
            v = block.attn.qkv(block.norm1(z)).view(N, N, 3, 2, 8)[:, :, 2]
            A = maps[k].repeat(N, 1, 1, 1) if k == layer else block.attn(block.norm1(z))[1]
            if k == layer:
                A[:, h, i] += shift * torch.eye(N)
            z = z + block.attn.proj(torch.einsum("bhnm,bmhd->bnhd", A, v).flatten(2))
            z = z + block.mlp(block.norm2(z))
        return model.head(model.norm(z[:, 0]))[:, chosen]

    R = torch.eye(N, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(2):
            gradient = torch.zeros(2, N, N, dtype=torch.float64)
            rows = range(N) if layer == 0 else [0]  # of the last layer only the class token's
            for h, i in ((h, i) for h in range(2) for i in rows):
                gradient[h, i] = (moved(1e-5, layer, h, i) - moved(-1e-5, layer, h, i)) / 2e-5
            R = R + (gradient * maps[layer][0]).clamp(min=0).mean(0) @ R
    torch.testing.assert_close(found[0, 0], R[0], atol=1e-7, rtol=1e-5)


def test_a_frozen_model_is_explained_and_the_image_is_left_as_it_was():
    model, x = network().requires_grad_(False), canvas()
    maps = rollout.explain(model, x)
    assert list(maps) == ["last layer", "mean of layers", "without residual", "rollout", "gradient"]
    assert not x.requires_grad and not any(values.requires_grad for values in maps.values())
    W = [A.mean(1) for A in model.look(x)[1]]
    row = W[1] @ W[0]
    torch.testing.assert_close(maps["without residual"], row[:, 0, 1:] / row[:, 0, 1:].sum(1, True))
    both = (W[0] + W[1])[:, 0, 1:]
    torch.testing.assert_close(maps["mean of layers"], both / both.sum(1, True))
    torch.testing.assert_close(maps["last layer"], rollout.patch_map(W[1]))
    torch.testing.assert_close(maps["rollout"],
                               rollout.patch_map(rollout.attention_rollout(model.look(x)[1])))


def test_a_map_is_the_class_tokens_row_without_itself():
    A = attention()[0].mean(1)
    torch.testing.assert_close(rollout.patch_map(A), A[:, 0, 1:] / (1 - A[:, 0, :1]))
    assert rollout.patch_map(torch.eye(5)[None]).tolist() == [[0.25] * 4]  # nothing from any patch


# ---- Second lesson: measures ---------------------------------------------------------


def test_overlap_counts_pixels():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        top, left = (torch.randint(n, (), generator=random).item() for n in (44, 45))
        bottom, right = top + 4, left + 3
        share = torch.zeros(36)
        for y in range(top, bottom):
            for x in range(left, right):
                share[y // 8 * 6 + x // 8] += 1 / 64
        boxes = torch.tensor([[top, left, bottom, right], [0, 0, 48, 48]])
        torch.testing.assert_close(rollout.overlap(boxes), torch.stack([share, torch.ones(36)]))


def test_a_map_is_painted_patch_by_patch_and_row_by_row():
    painted = rollout.to_pixels(torch.arange(72.0).view(2, 36))
    assert painted.shape == (2, 1, 48, 48)
    for y, x in ((0, 0), (7, 8), (47, 47), (16, 31)):
        assert painted[1, 0, y, x] == 36 + y // 8 * 6 + x // 8


def test_pointing_and_mass_of_maps_whose_worth_is_known():
    inside = torch.tensor([[0.0, 0.25, 1.0, 0.0]]).expand(5, 4)
    maps = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.1, 0.5, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1],
                         [0.25, 0.25, 0.25, 0.25], [0.4, 0.0, 0.4, 0.2]])
    assert rollout.pointing(maps, inside).tolist() == [1, 1, 0, 0.5, 0.5]
    torch.testing.assert_close(rollout.mass(maps, inside),
                               torch.tensor([0.65, 0.325, 0.125, 0.3125, 0.4]))
    for factor in (7, 1e-20):
        torch.testing.assert_close(rollout.mass(factor * maps, inside), rollout.mass(maps, inside))
    assert rollout.mass(torch.zeros(5, 4), inside).tolist() == [0] * 5  # Grad-CAM may find nothing


class Counter(nn.Module):
    """Logit of class 1: how much of patch 6 (of 6 x 6) is not black. Others: 0."""

    def forward(self, x):
        patch = (x[:, 0, 8:16, 0:8] + 1).mean((1, 2))
        return F.one_hot(torch.ones(len(x), dtype=torch.long), 10) * patch[:, None]


def test_deletion_falls_when_the_patch_that_counts_goes():
    assert rollout.FRACTIONS == [(i / 6) ** 2 for i in range(7)]
    x, maps = torch.rand(3, 1, 48, 48), torch.rand(3, 36) / 2
    maps[0, 6], maps[1, 6] = 1, -1  # found first, last; and somewhere
    place = maps.argsort(1, descending=True).tolist()[2].index(6)
    counts = torch.tensor([0, 1, 4, 9, 16, 25, 36])
    curve = rollout.deletion(Counter(), x, torch.tensor([1, 1, 1]), maps)
    whole = Counter()(x).softmax(1)[:, 1]
    for row, gone in ((0, 0), (1, 35), (2, place)):
        expected = torch.where(counts <= gone, whole[row], torch.tensor(0.1))
        torch.testing.assert_close(curve[row], expected)
    same = rollout.deletion(Counter(), x[:1], torch.tensor([1]), torch.ones(1, 36))
    assert same[0, 2] > 0.11 and same[0, 3] == pytest.approx(0.1)  # equal ones: reading order


def test_the_measures_are_means_over_the_scenes_of_every_map():
    torch.manual_seed(0)
    drawn, labels = rollout.draw_characters(100)
    x, boxes = rollout.scenes(drawn, drawn, 2)
    model, inside = network().float(), rollout.overlap(boxes)
    found = rollout.measure(model, x, labels, boxes)
    maps = rollout.explain(model, x)
    maps["ink"] = F.unfold(x + 1, 8, stride=8).mean(1)  # (B, 64, 36) -> (B, 36)
    maps["the box"] = inside
    assert set(found) == {*maps, "random"}
    for name, values in maps.items():
        hit = (inside[torch.arange(100), values.argmax(1)] > 0).float().mean().item()
        assert found[name]["pointing"] == pytest.approx(hit, abs=0.02)
        m = values / values.sum(1, keepdim=True)
        assert found[name]["mass"] == pytest.approx((m * inside).sum(1).mean().item(), rel=1e-3)
        curve = rollout.deletion(model, x, labels, values).mean(0)
        torch.testing.assert_close(torch.tensor(found[name]["curve"]), curve, atol=1e-3, rtol=0)
        f = rollout.FRACTIONS
        area = sum((f[i + 1] - f[i]) * (curve[i] + curve[i + 1]) / 2 for i in range(6))
        assert found[name]["deletion"] == pytest.approx(area.item(), abs=1e-4)
    share = (inside > 0).float().mean().item()
    assert found["random"]["pointing"] == pytest.approx(share, abs=0.15)
    assert found["random"]["mass"] == pytest.approx(inside.mean().item(), abs=0.03)


def test_signed_maps_are_refused_and_a_map_of_zeros_is_black(monkeypatch, tmp_path):
    drawn, labels = rollout.draw_characters(3)
    x, boxes = rollout.scenes(drawn, drawn, 2)
    monkeypatch.setattr(rollout, "explain", lambda model, x: {"mine": torch.randn(3, 36)})
    with pytest.raises(AssertionError, match="mine is negative or NaN"):
        rollout.measure(network().float(), x, labels, boxes)
    args = rollout.get_args(["--out", str(tmp_path)])
    rollout.plot_maps(args, x, {"zeros": torch.zeros(3, 36)})
    picture = np.asarray(rollout.plt.gcf().axes[0].images[0].get_array()).squeeze()
    assert not picture[1:49, 51:99].any()


# ---- Model and scenes ----------------------------------------------------------------


def test_attention_is_what_the_fused_kernel_computes():
    torch.manual_seed(0)
    layer, x = rollout.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    out, weights = layer(x)
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, layer.proj(heads.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(weights @ v, heads)


def test_the_model_gives_one_map_a_layer_and_keeps_images_apart():
    model, x = network(3), canvas()
    logits, maps = model.look(x)
    assert logits.shape == (4, 10) and len(maps) == 3 and maps[0].shape == (4, 2, 37, 37)
    torch.testing.assert_close(model(x), logits)
    changed = x.clone()
    changed[2] += 1
    moved = (model(changed) - logits).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_the_forward_pass_is_that_of_a_prenorm_transformer():
    model, x = network(), canvas()
    z = torch.cat([model.cls_token.expand(4, -1, -1), model.stem(x).flatten(2).transpose(1, 2)], 1)
    z = z + model.pos_embed
    logits, maps = model.look(x)
    for block, A in zip(model.blocks, maps):
        added, same = block.attn(F.layer_norm(z, (16,), block.norm1.weight, block.norm1.bias))
        torch.testing.assert_close(A, same)
        z = z + added
        h = F.layer_norm(z, (16,), block.norm2.weight, block.norm2.bias)
        z = z + F.linear(F.gelu(F.linear(h, block.mlp[0].weight, block.mlp[0].bias)),
                         block.mlp[2].weight, block.mlp[2].bias)
    z = F.layer_norm(z[:, 0], (16,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(logits, model.head(z))


def test_a_token_sees_its_patch_and_three_pixels_around_it():
    model, x = network(), canvas(1)
    for row, column in ((1, 2), (3, 4), (5, 0)):
        pixels = x.clone().requires_grad_()
        model.stem(pixels)[0, :, row, column].square().sum().backward()
        seen = pixels.grad[0, 0].nonzero()
        assert (seen.amin(0) >= torch.tensor([max(8 * v - 3, 0) for v in (row, column)])).all()
        assert (seen.amax(0) <= torch.tensor([min(8 * v + 10, 47) for v in (row, column)])).all()
        assert (seen.amin(0) <= torch.tensor([8 * row, 8 * column])).all()
        assert (seen.amax(0) >= torch.tensor([8 * row + 7, 8 * column + 7])).all()


def test_a_scene_without_clutter_is_its_digit_in_its_box():
    torch.manual_seed(0)
    drawn, _ = rollout.draw_characters(200)
    x, boxes = rollout.scenes(drawn, drawn, 0)
    assert x.shape == (200, 1, 48, 48) and x.min() == -1 and x.max() <= 1
    for scene, digit, (top, left, bottom, right) in zip(x, drawn, boxes.tolist()):
        rows, columns = (scene[0] > -1).nonzero().unbind(1)
        assert [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] == [
            top, left, bottom, right]
        r, c = digit.nonzero().unbind(1)
        own = digit[r.min():r.max() + 1, c.min():c.max() + 1].float() / 127.5 - 1
        torch.testing.assert_close(scene[0, top:bottom, left:right], own)
    full = torch.full((2000, 28, 28), 9, dtype=torch.uint8)
    _, boxes = rollout.scenes(full, full, 0)
    for k in range(2):
        assert boxes[:, k].unique().tolist() == list(range(21))  # the whole canvas is used
    assert abs(torch.corrcoef(boxes[:, :2].T.float())[0, 1]) < 0.1


def test_clutter_is_cut_from_the_middle_of_the_pool_and_never_darkens():
    torch.manual_seed(0)
    digits = torch.zeros(100, 28, 28, dtype=torch.uint8)
    digits[:, 10:20, 12:15] = 100
    pool = torch.tensor([7, 14, 210], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    full, boxes = rollout.scenes(digits, pool, 3)
    levels = ((full + 1) * 127.5).round()
    assert levels.unique().tolist() == [0, 7, 14, 100, 210]
    assert ((levels > 0) & (levels != 100)).flatten(1).sum(1).max() <= 3 * 64
    for scene, (top, left, bottom, right) in zip(levels[:, 0], boxes.tolist()):
        assert scene[top:bottom, left:right].min() >= 100  # the brighter pixel wins
    rim = torch.full((1, 28, 28), 200, dtype=torch.uint8)
    rim[0, 4:25, 4:25] = torch.arange(441).view(21, 21) % 150 + 10
    seen, _ = rollout.scenes(torch.ones(3000, 28, 28, dtype=torch.uint8), rim, 1)
    values = ((seen + 1) * 127.5).round().unique().tolist()
    assert 200 not in values and {10, 159} < set(values)
    reached = (seen[:, 0] > -0.9).any(0)
    assert reached.any(0).all() and reached.any(1).all()  # pieces reach every row and column


def test_a_piece_is_eight_pixels_of_one_image_in_order():
    pool = torch.randint(2, 256, (1, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
    dot = torch.zeros(50, 28, 28, dtype=torch.uint8)
    dot[:, 0, 0] = 1
    seen, _ = rollout.scenes(dot, pool, 1)
    for scene in ((seen + 1) * 127.5).round().byte()[:, 0]:
        ink = (scene > 1).nonzero()
        top, left = ink.amin(0).tolist()
        piece = scene[top:top + 8, left:left + 8]
        found = [(y, x) for y in range(4, 18) for x in range(4, 18)
                 if (piece == pool[0, y:y + 8, x:x + 8]).float().mean() > 0.95]
        assert len(found) == 1


# ---- Training, and what a run reports ------------------------------------------------


class Prior(nn.Module):
    """Logits that do not look at the scene: at best the log of how often each label occurs."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(10)), []

    def forward(self, x):
        assert self.training
        self.seen.append(x)
        return self.w.expand(len(x), 10)


def train(model, images, labels, *flags):
    history = []
    rollout.train(rollout.get_args([*map(str, flags)]), model.eval(), images, labels, history)
    return history


def test_training_finds_how_often_each_label_occurs():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 124)
    digits, model = torch.ones(1024, 28, 28, dtype=torch.uint8), Prior()
    flags = "--epochs", 30, "--lr", 0.1, "--clutter", 0
    history = train(model, digits, labels, *flags)
    share = labels.bincount(minlength=10) / 1024
    torch.testing.assert_close(model.w.softmax(0), share, atol=0.02, rtol=0)
    entropy = -(share[:3] * share[:3].log()).sum().item()
    assert history[-1][:2] == [480, pytest.approx(entropy, abs=0.03)]
    train(model, digits, 0 * labels, *flags)  # a second phase trains as well
    assert model.w.softmax(0)[0] > 0.95


def test_each_epoch_sees_each_image_once_in_new_scenes():
    torch.manual_seed(0)
    shades = (5 * torch.arange(1, 51)).byte().view(50, 1, 1).expand(50, 28, 28)
    model, asked, original = Prior(), [], F.cross_entropy
    patch = pytest.MonkeyPatch()
    patch.setattr(rollout.F, "cross_entropy", lambda a, b: asked.append(b) or original(a, b))
    train(model, shades, torch.arange(50) // 5, "--epochs", 3, "--batch-size", 7, "--clutter", 0)
    patch.undo()
    scenes = (torch.cat(model.seen)[:, 0] + 1) * 127.5
    order = (scenes.amax((1, 2)) / 5).round().view(3, 50).long() - 1
    assert order.sort(1).values.equal(torch.arange(50).expand(3, 50))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert torch.cat(asked).equal(order.flatten() // 5)
    first, second = (scenes.view(3, 50, 48, 48)[i][order[i].argsort()] for i in (0, 1))
    assert ((first > 0) != (second > 0)).flatten(1).any(1).float().mean() > 0.9  # other places


def test_results_and_pictures_are_those_of_both_networks(tmp_path, monkeypatch):
    torch.manual_seed(0)
    images, labels = rollout.draw_characters(512)
    data = images, labels, 255 - images[:200], labels[:200], "mine"
    asked, original = [], rollout.measure
    monkeypatch.setattr(rollout, "load_data", lambda args: data)
    monkeypatch.setattr(rollout, "measure", lambda model, *data: asked.append(data) or original(
        model, *data))
    rollout.main(["--quick", "--out", str(tmp_path), "--device", "cpu", "--clutter", "2",
                  "--measured", "16"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    model = rollout.VisionTransformer().eval()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["weights"])
    (x, y, boxes), same = asked
    assert all(a is b or a.equal(b) for a, b in zip(asked[0], same)) and len(x) == 16
    assert y.equal(labels[:16])
    again = original(model, x, y, boxes)
    torch.manual_seed(0)
    fresh = original(rollout.VisionTransformer(), x, y, boxes)  # the first weights of this run
    for name in set(again) - {"random"}:
        for key in ("pointing", "mass", "deletion"):
            assert results["trained"][name][key] == pytest.approx(again[name][key], abs=1e-4)
            assert results["untrained"][name][key] == pytest.approx(fresh[name][key], abs=1e-4)
    torch.manual_seed(0)  # the scenes do not depend on the training
    scenes, _ = rollout.scenes(data[2], data[2], 2)
    assert scenes[:16].equal(x)
    right = (model(scenes).argmax(1) == labels[:200]).float().mean().item()
    assert results["accuracy (chance 0.1)"] == pytest.approx(right, abs=0.01)
    measures, maps = (rollout.plt.figure(number) for number in rollout.plt.get_fignums()[-2:])
    for axes, key in zip(measures.axes, ("pointing", "mass")):
        widths = [bar.get_width() for bar in axes.patches]
        expected = [row[key] for net in ("untrained", "trained") for row in results[net].values()]
        assert widths == pytest.approx(expected) and axes.get_xlabel() == key
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == list(results["trained"])
    for line in measures.axes[2].lines:
        assert list(line.get_ydata()) == results["trained"][line.get_label()]["curve"]
        assert list(line.get_xdata()) == rollout.FRACTIONS
    picture = np.asarray(maps.axes[0].images[0].get_array()).squeeze()
    tiles = torch.tensor(picture.reshape(8, 50, 6, 50).swapaxes(1, 2)[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(tiles[:, 0], (x[:8, 0] + 1) / 2)
    for column, values in enumerate(rollout.explain(model, x[:8]).values(), 1):
        light = rollout.to_pixels(values / values.amax(1, keepdim=True))[:, 0]
        expected = light * (0.3 + 0.7 * (x[:8, 0] + 1) / 2)
        torch.testing.assert_close(tiles[:, column], expected, atol=1e-3, rtol=0)


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


def test_default_network_learns_the_real_digits(real_data, tmp_path, monkeypatch):
    load = rollout.load_data
    monkeypatch.setattr(rollout, "load_data", lambda args: [part[:3000] for part in load(args)])
    rollout.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu", "--epochs", "3",
                  "--clutter", "0", "--measured", "20"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results["accuracy (chance 0.1)"] > 0.2
