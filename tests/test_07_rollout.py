"""The mathematics of 07_rollout.py: rollout by hand and by a plain loop, maps whose worth is known."""

import copy
import json
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, load_script

script = load_script(ROOT / "07_rollout.py")


def attention(L=3, B=2, h=4, N=7, seed=0):
    """Random attention (L, B, h, N, N), some of it sharp."""
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(L, B, h, N, N, generator=random, dtype=torch.float64)).softmax(-1)


def network(size=40, depth=3):
    """A small transformer with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = script.VisionTransformer(size, 16, depth, 2).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def canvas(count=4, size=40):
    return torch.randn(count, 1, size, size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(3))


# ---- Rollout -------------------------------------------------------------------------------------


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
            torch.testing.assert_close(script.attention_rollout(A[:layer + 1])[b], now)
            before = now
    torch.testing.assert_close(script.attention_rollout(list(A)), script.attention_rollout(A))


def test_the_later_layer_multiplies_from_the_left():
    first = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    A = torch.stack([first, second])[:, None, None]  # (2, 1, 1, 3, 3)
    bare = script.attention_rollout(A, residual=False)[0]
    assert bare.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]  # A2 A1; A1 A2 has other rows
    assert bare.equal(second @ first) and not bare.equal(first @ second)
    halves = script.attention_rollout(A)[0]
    assert halves.equal((second + torch.eye(3)) @ (first + torch.eye(3)) / 4)


@pytest.mark.parametrize("residual", [True, False])
def test_tokens_that_keep_to_themselves_roll_out_to_the_identity(residual):
    A = torch.eye(6).expand(5, 2, 3, 6, 6)
    assert script.attention_rollout(A, residual).equal(torch.eye(6).expand(2, 6, 6))
    assert script.attention_rollout(A, True).equal(torch.eye(6).expand(2, 6, 6))


def test_uniform_attention_gives_uniform_rows():
    A = torch.full((4, 2, 3, 6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(script.attention_rollout(A, residual=False), A[0, :, 0])
    rolled = script.attention_rollout(A)  # with the residual: half stays, four times over
    torch.testing.assert_close(rolled[0, 0, 1:], rolled[0, 0, 1].expand(5))
    torch.testing.assert_close(rolled[0, 0, 0] - rolled[0, 0, 1], torch.tensor(0.5**4).double())


@pytest.mark.parametrize("residual", [True, False])
def test_rows_sum_to_one_and_images_stay_apart(residual):
    A = attention(B=3)
    rolled = script.attention_rollout(A, residual)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert rolled.min() >= 0
    for b in range(3):
        alone = script.attention_rollout(A[:, b:b + 1], residual)
        torch.testing.assert_close(alone[0], rolled[b])


def test_gradient_rollout_is_that_of_finite_differences():
    torch.manual_seed(0)
    model, x = network(24, 2), canvas(2, 24)
    logits, maps = model(x, return_attention=True)
    classes = logits.argmax(1)
    found = script.gradient_rollout(maps, logits)

    def logit(shift, layer, place):
        """The chosen logits when one entry of one layer's attention is moved by `shift`."""
        z = model.stem(x).flatten(2).transpose(1, 2)
        z = torch.cat([model.cls_token.expand(2, -1, -1), z], 1) + model.pos_embed
        for i, block in enumerate(model.blocks):
            v = block.attn.qkv(block.norm1(z)).view(2, -1, 3, 2, 8)[:, :, 2]
            A = maps[i].detach().clone() if i == layer else block.attn(block.norm1(z))[1]
            if i == layer:
                A[(slice(None), *place)] += shift
            z = z + block.attn.proj(torch.einsum("bhnm,bmhd->bnhd", A, v).flatten(2))
            z = z + block.mlp(block.norm2(z))
        return model.head(model.norm(z[:, 0]))[torch.arange(2), classes]

    N = maps[0].shape[-1]
    R = torch.eye(N, dtype=torch.float64).expand(2, N, N)
    with torch.no_grad():
        for layer in range(2):
            gradient = torch.zeros_like(maps[layer])
            rows = range(N) if layer == 0 else [0]  # of the last layer only the class token's
            for place in ((h, i, j) for h in range(2) for i in rows for j in range(N)):
                step = (logit(1e-5, layer, place) - logit(-1e-5, layer, place)) / 2e-5
                gradient[(slice(None), *place)] = step
            R = R + (gradient * maps[layer]).clamp(min=0).mean(1) @ R
    torch.testing.assert_close(found, R, atol=1e-7, rtol=1e-5)


# ---- Measures ------------------------------------------------------------------------------------


def test_a_map_is_the_class_tokens_row_without_itself():
    A = attention()[0].mean(1)
    found = script.patch_map(A)
    torch.testing.assert_close(found, A[:, 0, 1:] / (1 - A[:, 0, :1]))
    assert script.patch_map(torch.eye(5)[None]).tolist() == [[0.25] * 4]  # nothing from any patch


def test_overlap_counts_pixels():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        top, left = (torch.randint(n, (), generator=random).item() for n in (36, 36))
        bottom, right = top + 4, left + 3
        share = torch.zeros(25)
        for y in range(top, bottom):
            for x in range(left, right):
                share[y // 8 * 5 + x // 8] += 1 / 64
        boxes = torch.tensor([[top, left, bottom, right], [0, 0, 40, 40]])
        inside = script.overlap(boxes, 40, 25)
        torch.testing.assert_close(inside, torch.stack([share, torch.ones(25)]))


def test_a_map_is_painted_patch_by_patch_and_row_by_row():
    painted = script.to_pixels(torch.arange(50.0).view(2, 25), 40)
    assert painted.shape == (2, 1, 40, 40)
    for y, x in ((0, 0), (7, 8), (39, 39), (16, 31)):
        assert painted[1, 0, y, x] == 25 + y // 8 * 5 + x // 8


def test_pointing_and_mass_of_maps_whose_worth_is_known():
    inside = torch.tensor([[0.0, 0.25, 1.0, 0.0]]).expand(5, 4)
    maps = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.1, 0.5, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1],
                         [0.25, 0.25, 0.25, 0.25], [0.4, 0.0, 0.4, 0.2]])
    assert script.pointing(maps, inside).tolist() == [1, 1, 0, 0.5, 0.5]
    torch.testing.assert_close(script.mass(maps, inside),
                               torch.tensor([0.65, 0.325, 0.125, 0.3125, 0.4]))
    for factor in (7, 1e-20):
        torch.testing.assert_close(script.mass(factor * maps, inside), script.mass(maps, inside))
    assert script.mass(torch.zeros(5, 4), inside).tolist() == [0] * 5  # Grad-CAM may find nothing


class Counter(torch.nn.Module):
    """Logit of class 1: how much of patch 5 (of 5 x 5) is not black. Others: 0."""

    def forward(self, x):
        patch = (x[:, 0, 8:16, 0:8] + 1).mean((1, 2))
        return F.one_hot(torch.ones(len(x), dtype=torch.long), 10) * patch[:, None]


def test_deletion_falls_when_the_patch_that_counts_goes():
    x = torch.rand(3, 1, 40, 40)
    maps = torch.rand(3, 25) / 2
    maps[0, 5], maps[1, 5] = 1, -1  # found first, last; and somewhere
    place = maps.argsort(1, descending=True).tolist()[2].index(5)
    counts = list(range(26))
    curve = script.deletion(Counter(), x, torch.tensor([1, 1, 1]), maps, [i / 25 for i in counts])
    whole = Counter()(x).softmax(1)[:, 1]
    for row, gone in ((0, 0), (1, 24), (2, place)):
        expected = torch.where(torch.tensor(counts) <= gone, whole[row], torch.tensor(0.1))
        torch.testing.assert_close(curve[row], expected)
    same = script.deletion(Counter(), x[:1], torch.tensor([1]), torch.ones(1, 25), [5 / 25, 6 / 25])
    assert same[0, 0] > 0.11 and same[0, 1] == pytest.approx(0.1)  # equal ones: reading order


def test_deletion_is_the_area_under_the_curve(monkeypatch):
    drawn, labels = script.draw_characters(3, 0)
    x, boxes = script.scenes(drawn, drawn, 2, size=40)
    steep = torch.linspace(1, 0, 7).expand(3, 7)
    monkeypatch.setattr(script, "deletion", lambda *values: steep)
    rows, _ = script.measure(network().float(), x, labels, boxes)
    x = [(i / 6) ** 2 for i in range(7)]  # fractions of 36 patches: 0, 1, 4, 9, ..., 36
    area = sum((x[i + 1] - x[i]) * (2 - (2 * i + 1) / 6) / 2 for i in range(6))
    assert all(row["deletion"] == pytest.approx(area) for row in rows.values())


def test_a_map_of_ones_own_can_stand_alone_and_need_not_be_detached(monkeypatch, tmp_path):
    drawn, labels = script.draw_characters(3, 0)
    x, boxes = script.scenes(drawn, drawn, 2, size=40)
    model = network().float()
    monkeypatch.setattr(script, "explain", lambda model, x: {
        "mine": model(x, return_attention=True)[1][0][:, 0, 0, 1:]})  # head 0 of block 1
    rows, _ = script.measure(model, x, labels, boxes)
    assert list(rows) == ["mine", "ink", "random", "the box"]
    (tmp_path / "07_rollout").mkdir()
    script.plot_maps(script.get_args(["--out", str(tmp_path)]), x, boxes, script.explain(model, x))


def test_the_measures_are_means_over_the_scenes_of_every_map():
    drawn, labels = script.draw_characters(300, 0)
    x, boxes = script.scenes(drawn, drawn, 2, torch.Generator().manual_seed(0), 40)
    model = network().float()
    rows, curves = script.measure(model, x, labels, boxes)
    logits, attentions = model(x, return_attention=True)
    raw = torch.stack(attentions).mean(2).detach()
    inside = script.overlap(boxes, 40, 25)
    maps = {"last layer": raw[-1], "mean of layers": raw.mean(0),
            "rollout": script.attention_rollout(attentions).detach(),
            "without residual": script.attention_rollout(attentions, residual=False).detach()}
    again, attentions = model(x, return_attention=True)
    maps["gradient"] = script.gradient_rollout(attentions, again)
    assert list(rows) == list(curves) and set(rows) == {*maps, "ink", "random", "the box"}
    right = logits.softmax(1)[torch.arange(300), labels].mean()
    blank = model(torch.full_like(x[:1], -1)).softmax(1)[0, labels].mean()
    fractions = [(i / 6) ** 2 for i in range(7)]
    bright = (script.F.unfold(x + 1, 8, stride=8)).mean(1)  # (B, 64, 25) -> (B, 25)
    found = (inside[torch.arange(300), bright.argmax(1)] > 0).float().mean().item()
    assert rows["ink"]["pointing"] == pytest.approx(found, abs=1e-3)
    found = ((bright * inside).sum(1) / bright.sum(1)).mean().item()
    assert rows["ink"]["mass"] == pytest.approx(found, rel=1e-3)
    for name, matrix in maps.items():
        m = matrix[:, 0, 1:] / matrix[:, 0, 1:].sum(1, keepdim=True)
        strongest = m.argmax(1)
        found = (inside[torch.arange(300), strongest] > 0).float().mean().item()
        assert rows[name]["pointing"] == pytest.approx(found, abs=1e-3)
        assert rows[name]["mass"] == pytest.approx((m * inside).sum(1).mean().item(), rel=1e-3)
        curve = script.deletion(model, x, labels, m, fractions).mean(0)
        torch.testing.assert_close(curves[name], curve, atol=1e-3, rtol=0)
        area = sum((fractions[i + 1] - fractions[i]) * (curve[i] + curve[i + 1]) / 2 for i in range(6))
        assert rows[name]["deletion"] == pytest.approx(area.item(), abs=2e-5)
    for curve in curves.values():
        assert curve[0].item() == pytest.approx(right.item(), abs=1e-5)
        assert curve[-1].item() == pytest.approx(blank.item(), abs=1e-5)  # everything is black
    assert rows["the box"]["pointing"] == 1
    share = (inside > 0).float().mean().item()
    assert rows["random"]["pointing"] == pytest.approx(share, abs=0.09)
    assert rows["random"]["mass"] == pytest.approx(inside.mean().item(), abs=0.02)
    expected = (inside.square().sum(1) / inside.sum(1)).mean().item()
    assert rows["the box"]["mass"] == pytest.approx(expected, rel=1e-4)


# ---- Model and task ------------------------------------------------------------------------------


def test_attention_is_what_the_fused_kernel_computes():
    torch.manual_seed(0)
    layer, x = script.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    out, weights = layer(x)
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.proj(heads))
    torch.testing.assert_close(weights @ v, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7, dtype=torch.float64))


def test_the_model_gives_one_map_a_layer_and_keeps_images_apart():
    model, x = network(), canvas()
    logits, maps = model(x, return_attention=True)
    assert logits.shape == (4, 10) and len(maps) == 3 and maps[0].shape == (4, 2, 26, 26)
    torch.testing.assert_close(model(x), logits)
    changed = x.clone()
    changed[2] += 1
    moved = (model(changed) - logits).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_the_forward_pass_is_that_of_a_prenorm_transformer():
    model, x = network(), canvas()
    z = torch.cat([model.cls_token.expand(4, -1, -1), model.stem(x).flatten(2).transpose(1, 2)], 1)
    z = z + model.pos_embed
    logits, maps = model(x, return_attention=True)
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
    for row, column in ((1, 2), (3, 4), (2, 0)):
        pixels = x.clone().requires_grad_()
        model.stem(pixels)[0, :, row, column].square().sum().backward()
        seen = pixels.grad[0, 0].nonzero()
        assert (seen.amin(0) >= torch.tensor([max(8 * v - 3, 0) for v in (row, column)])).all()
        assert (seen.amax(0) <= torch.tensor([min(8 * v + 10, 39) for v in (row, column)])).all()
        assert (seen.amin(0) <= torch.tensor([8 * row, 8 * column])).all()
        assert (seen.amax(0) >= torch.tensor([8 * row + 7, 8 * column + 7])).all()


def test_at_the_start_the_loss_is_that_of_guessing():
    torch.manual_seed(0)
    loss = F.cross_entropy(script.VisionTransformer()(torch.randn(100, 1, 48, 48)),
                           torch.arange(100) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.05)


def test_32_scenes_can_be_learned_by_heart():
    torch.manual_seed(0)
    drawn, labels = script.draw_characters(32, 0)
    x, _ = script.scenes(drawn, drawn, size=40)
    model = script.VisionTransformer(40, 32, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.03 and (model(x).argmax(1) == labels).float().mean() > 0.9


def test_a_scene_without_clutter_is_its_digit_in_its_box():
    drawn, _ = script.draw_characters(200, 0)
    x, boxes = script.scenes(drawn, drawn, 0, torch.Generator().manual_seed(0), 56)
    assert x.shape == (200, 1, 56, 56) and x.min() == -1 and x.max() <= 1
    for scene, digit, (top, left, bottom, right) in zip(x, drawn, boxes.tolist()):
        rows, columns = (scene[0] > -1).nonzero().unbind(1)
        assert [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] == [
            top, left, bottom, right]
        r, c = digit.nonzero().unbind(1)
        cut = digit[r.min():r.max() + 1, c.min():c.max() + 1].float() / 127.5 - 1
        torch.testing.assert_close(scene[0, top:bottom, left:right], cut)
    places = boxes[:, :2].float()
    assert places.std(0).min() > 2  # they differ
    full = torch.full((2000, 28, 28), 9, dtype=torch.uint8)
    _, boxes = script.scenes(full, full, 0)
    for k in range(2):
        assert boxes[:, k].unique().tolist() == list(range(21))  # the whole canvas is used


def test_clutter_is_cut_from_the_middle_of_the_pool_and_never_darkens():
    digits = torch.zeros(100, 28, 28, dtype=torch.uint8)
    digits[:, 10:20, 12:15] = 100
    pool = torch.full((3, 28, 28), 7, dtype=torch.uint8) * torch.tensor([1, 2, 30])[
        :, None, None].byte()
    bare, boxes = script.scenes(digits, pool, 0, torch.Generator().manual_seed(5))
    full, same = script.scenes(digits, pool, 3, torch.Generator().manual_seed(5))
    assert boxes.equal(same) and (full >= bare).all()
    added = full[full > bare]
    levels = ((added + 1) * 127.5).round().unique().tolist()
    assert levels == [7, 14, 210]
    pixels = (full > bare).flatten(1).sum(1)
    assert pixels.max() <= 3 * 64 and pixels.float().mean() > 100  # three pieces of 8 x 8, less overlap
    again, _ = script.scenes(digits, pool, 3, torch.Generator().manual_seed(5))
    assert again.equal(full)
    rim = torch.full((1, 28, 28), 200, dtype=torch.uint8)
    rim[0, 4:25, 4:25] = torch.arange(441).view(21, 21) % 150 + 10
    seen, _ = script.scenes(digits[:1].expand(3000, -1, -1) * 0 + 1, rim, 1)
    values = ((seen + 1) * 127.5).round().unique().tolist()
    assert 200 not in values and {10, 159} < set(values)
    reached = (seen[:, 0] > -0.9).any(0)
    assert reached.any(0).all() and reached.any(1).all()  # pieces reach every row and column


def test_a_piece_is_eight_pixels_of_one_image_in_order():
    pool = torch.randint(2, 256, (1, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
    dot = torch.zeros(50, 28, 28, dtype=torch.uint8)
    dot[:, 0, 0] = 1
    seen, _ = script.scenes(dot, pool, 1, torch.Generator().manual_seed(0))
    for scene in ((seen + 1) * 127.5).round().byte()[:, 0]:
        ink = (scene > 1).nonzero()
        top, left = ink.amin(0).tolist()
        piece = scene[top:top + 8, left:left + 8]
        found = [(y, x) for y in range(4, 18) for x in range(4, 18)
                 if (piece == pool[0, y:y + 8, x:x + 8]).float().mean() > 0.95]
        assert len(found) == 1


# ---- Training, main and the pictures --------------------------------------------------------------


def test_training_sees_new_scenes_at_every_step(monkeypatch):
    """Weights after `train` against a plain loop with torch's own Adam and OneCycleLR."""
    torch.manual_seed(0)
    images, labels = script.draw_characters(50, 0)
    one = script.VisionTransformer(48, 16, 1)
    two = copy.deepcopy(one)
    args = script.get_args("--epochs 3 --batch-size 20 --lr 0.01 --clutter 2".split())
    reported, history = [], []
    monkeypatch.setattr(script, "progress", lambda *values: reported.append(values))
    torch.manual_seed(1)
    script.train(args, one, images, labels, history, "cpu")
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(two.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 9)
    losses = []
    for _ in range(3):
        for batch in torch.randperm(50).split(20):
            x, _ = script.scenes(images[batch], images, 2)
            loss = F.cross_entropy(two(x), labels[batch])
            for p, g in zip(two.parameters(), torch.autograd.grad(loss, list(two.parameters()))):
                p.grad = g
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q)
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["loss"] for row in history] == pytest.approx(losses)
    assert [values[:2] for values in reported] == [(i, 9) for i in range(1, 10)]


def test_the_history_holds_means_since_the_last_row_and_ends_with_the_last_step(monkeypatch):
    torch.manual_seed(0)
    images, labels = script.draw_characters(50, 0)
    losses = []
    cross_entropy = F.cross_entropy

    def spy(*values):
        losses.append(cross_entropy(*values))
        return losses[-1]

    monkeypatch.setattr(script.F, "cross_entropy", spy)
    history = []
    args = script.get_args("--epochs 1 --batch-size 1".split())
    script.train(args, script.VisionTransformer(48, 16, 1), images, labels, history,
                 "cpu")
    assert [row["step"] for row in history] == [*range(3, 50, 3), 50]
    expected = [sum(losses[i:i + 3]) / 3 for i in range(0, 48, 3)] + [sum(losses[48:]) / 2]
    assert [row["loss"] for row in history] == pytest.approx([v.item() for v in expected], rel=1e-5)


def test_default_settings_are_those_of_the_header():
    args = vars(script.get_args([]))
    expected = dict(epochs=11, batch_size=64, lr=3e-3, train_size=60000, seed=0, clutter=4,
                    load=None, quick=False)
    assert {name: args[name] for name in expected} == expected
    model = script.VisionTransformer()
    assert len(model.blocks) == 4 and model.blocks[0].attn.num_heads == 4
    assert model.pos_embed.shape == (1, 37, 64)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    x = torch.randn(2, 1, 48, 48)
    first, second, third = (layer for layer in model.stem if isinstance(layer, torch.nn.Conv2d))
    h = F.relu(F.conv2d(x, first.weight, first.bias, 2, 1))
    h = F.relu(F.conv2d(h, second.weight, second.bias, 2, 1))
    torch.testing.assert_close(model.stem(x), F.conv2d(h, third.weight, third.bias, 2))


def test_a_loaded_model_is_the_trained_one_and_the_untrained_stays(tmp_path, monkeypatch):
    torch.manual_seed(3)
    saved = script.VisionTransformer()
    torch.save({"settings": {}, "weights": saved.state_dict()}, tmp_path / "model.pt")
    measured = []
    measure = script.measure
    data = script.draw_characters(50, 0)
    monkeypatch.setattr(script, "load_data", lambda args: (*data, *data, "mine"))
    monkeypatch.setattr(script, "measure",
                        lambda net, *data: measured.append(net) or measure(net, *data))
    script.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--epochs", "0",
                 "--load", str(tmp_path / "model.pt")])
    torch.manual_seed(0)
    for net, expected in zip(measured, (saved, script.VisionTransformer())):
        assert all(p.equal(q) for p, q in zip(net.parameters(), expected.parameters()))


def test_main_measures_both_networks_on_the_same_scenes_and_draws_them(tmp_path, monkeypatch):
    seen = {}

    def spy(name):
        original = getattr(script, name)

        def call(*values):
            seen.setdefault(name, []).append(values)
            return original(*values)
        monkeypatch.setattr(script, name, call)

    for name in ("train", "measure", "plot_measures", "plot_maps"):
        spy(name)
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path),
                 "--clutter", "2", "--seed", "7"])
    (args, model, images, labels, history, _), = seen["train"]
    drawn, names = script.draw_characters(512, 0)
    assert images.equal(drawn) and labels.equal(names) and args.clutter == 2
    test_images, test_labels = script.draw_characters(2000, 1)
    x, boxes = script.scenes(test_images, test_images, 2, torch.Generator().manual_seed(1))
    (one, *data), (other, *same) = seen["measure"]
    for values in (data, same):
        assert all(a.equal(b[:50]) for a, b in zip(values, (x, test_labels, boxes)))
    assert one is model
    torch.manual_seed(7)
    for p, q in zip(other.parameters(), script.VisionTransformer().parameters()):
        assert p.equal(q)  # the first weights of this very run
    metrics = json.loads((tmp_path / "07_rollout" / "metrics.json").read_text())
    results = metrics["results"]
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(500)]) == test_labels
    assert results["accuracy (chance 0.1)"] == pytest.approx(right.float().mean().item())
    maps = script.explain(model, x[:50])
    for which, net in (("trained", model), ("untrained", other)):
        maps = script.explain(net, x[:50])
        inside = script.overlap(boxes[:50], 48, 36)
        for name in maps:
            row = results[which][name]
            assert row["mass"] == pytest.approx(script.mass(maps[name], inside).mean().item(), rel=1e-3)
    assert metrics["history"] == history and len(history) >= 5
    loss, curves, points, masses = plt.figure(plt.get_fignums()[0]).axes
    assert list(loss.lines[0].get_ydata()) == [row["loss"] for row in history]
    assert list(loss.lines[0].get_xdata()) == [row["step"] for row in history]
    assert [line.get_label() for line in curves.lines] == list(results["trained"])
    drawn_curves = seen["plot_measures"][0][3]
    for line in curves.lines:
        assert list(line.get_ydata()) == drawn_curves[line.get_label()].tolist()
        np.testing.assert_allclose(line.get_xdata(), [(i / 6) ** 2 for i in range(7)], atol=1e-6)
    for axis, key in ((points, "pointing"), (masses, "mass")):
        widths = [bar.get_width() for bar in axis.patches]
        expected = [row[key] for which in ("untrained", "trained") for row in results[which].values()]
        assert widths == pytest.approx(expected) and axis.get_title().startswith(key)
    (_, some, some_boxes, some_maps), = seen["plot_maps"]
    picture = plt.figure(plt.get_fignums()[1]).axes[0]
    tiles = np.asarray(picture.images[0].get_array())[:, :, 0]
    assert tiles.shape == (8 * 50, 6 * 50)
    assert [label.get_text() for label in picture.get_xticklabels()] == ["scene", *some_maps]
    top, left, bottom, right = boxes[3].tolist()
    scene = tiles[151:199, 1:49]
    for edge in (scene[top, left:right], scene[bottom - 1, left:right],
                 scene[top:bottom, left], scene[top:bottom, right - 1]):
        assert (edge == 0.5).all()
    inner = (x[3, 0] + 1) / 2
    np.testing.assert_allclose(scene[top + 1:bottom - 1, left + 1:right - 1],
                               inner[top + 1:bottom - 1, left + 1:right - 1], atol=1e-6)
    for column, values in enumerate(some_maps.values(), 1):
        for i in range(8):
            light = script.to_pixels((values[i] / values[i].max())[None], 48)[0, 0]
            tile = tiles[50 * i + 1:50 * i + 49, 50 * column + 1:50 * column + 49]
            np.testing.assert_allclose(tile, light * (0.3 + 0.7 * (x[i, 0] + 1) / 2), atol=1e-5)


def test_scenes_are_drawn_quickly():
    """Drawing must stay a small part of a training step."""
    images, labels = script.draw_characters(2000, 0)
    model = script.VisionTransformer()
    batch = torch.arange(64)
    script.scenes(images[batch], images)
    drawing, learning = [], []
    for _ in range(5):
        began = time.process_time()
        x, _ = script.scenes(images[batch], images)
        middle = time.process_time()
        F.cross_entropy(model(x), labels[batch]).backward()
        drawing.append(middle - began)
        learning.append(time.process_time() - middle)
    assert min(drawing) < 0.3 * min(learning)
