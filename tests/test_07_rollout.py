"""The mathematics of 07_rollout.py: rollout by hand and by a plain loop, maps whose worth is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, load_script

script = load_script(ROOT / "07_rollout.py")


def attention(L=3, B=2, h=4, N=7, seed=0):
    """Random attention (L, B, h, N, N), some of it sharp."""
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(L, B, h, N, N, generator=random, dtype=torch.float64)).softmax(-1)


def network(size=(32, 40), depth=3):
    """A small transformer, not square, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = script.VisionTransformer(size, 16, depth, 2).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def canvas(count=4, size=(32, 40)):
    return torch.randn(count, 1, *size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(3))


# ---- Rollout -------------------------------------------------------------------------------------


def test_rollout_is_the_recursion_of_the_text():
    A = attention()
    joint = script.attention_rollout(A, joint=True)
    assert joint.shape == (3, 2, 7, 7)
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
            torch.testing.assert_close(joint[layer, b], now)
            before = now
    torch.testing.assert_close(script.attention_rollout(A), joint[-1])
    torch.testing.assert_close(script.attention_rollout(list(A)), joint[-1])


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


def test_uniform_attention_gives_uniform_rows():
    A = torch.full((4, 2, 3, 6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(script.attention_rollout(A, residual=False), A[0, :, 0])
    rolled = script.attention_rollout(A)  # with the residual: half stays, four times over
    torch.testing.assert_close(rolled[0, 0, 1:], rolled[0, 0, 1].expand(5))
    torch.testing.assert_close(rolled[0, 0, 0] - rolled[0, 0, 1], torch.tensor(0.5**4).double())


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9, 0.99])
def test_rows_sum_to_one_and_images_stay_apart(residual, fusion, discard):
    A = attention(B=3)
    rolled = script.attention_rollout(A, residual, fusion, discard, joint=True)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(3, 3, 7, dtype=torch.float64))
    assert rolled.min() >= 0
    for b in range(3):
        alone = script.attention_rollout(A[:, b:b + 1], residual, fusion, discard, joint=True)
        torch.testing.assert_close(alone[:, 0], rolled[:, b])


def test_heads_are_fused_as_asked_and_the_smallest_discarded():
    A = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]],
                      [[0.2, 0.7, 0.1], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]]])[None, None]
    for fusion, row in (("mean", [0.35, 0.5, 0.15]), ("max", [0.5, 0.7, 0.2]),
                        ("min", [0.2, 0.3, 0.1])):
        bare = script.attention_rollout(A, False, fusion)[0, 0]
        torch.testing.assert_close(bare, torch.tensor(row) / sum(row))
        rest = script.attention_rollout(A, False, fusion, discard=0.34)[0, 0]
        torch.testing.assert_close(rest, torch.tensor([row[0], row[1], 0]) / (row[0] + row[1]))
        rest = script.attention_rollout(A, True, fusion, discard=0.34)[0, 0]
        torch.testing.assert_close(rest, torch.tensor(
            [0.5 + row[0] / (row[0] + row[1]) / 2, row[1] / (row[0] + row[1]) / 2, 0]))
        rest = script.attention_rollout(A, False, fusion, discard=0.99)[0, 0]
        assert rest.tolist() == [0, 1, 0]  # the largest is never discarded
    apart = torch.eye(2).flip(0).add(torch.zeros(2, 2)).expand(1, 1, 1, 2, 2)
    apart = torch.cat([apart, torch.eye(2).expand(1, 1, 1, 2, 2)], 2)  # heads with nothing in common
    assert script.attention_rollout(apart, False, "min")[0].equal(torch.eye(2))


def test_gradient_rollout_is_that_of_finite_differences():
    torch.manual_seed(0)
    model, x = network(depth=2), canvas(2)
    classes = torch.tensor([3, 8])
    logits, maps, _ = model(x, weights=True)
    found = script.gradient_rollout(maps, logits, classes)

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
        top, left = (torch.randint(n, (), generator=random).item() for n in (28, 36))
        bottom, right = top + 4, left + 3
        pixels = torch.zeros(32, 40)
        pixels[top:bottom, left:right] = 1
        share = F.avg_pool2d(pixels[None], 8).flatten()
        boxes = torch.tensor([[top, left, bottom, right], [0, 0, 32, 40]])
        inside = script.overlap(boxes, (32, 40))
        torch.testing.assert_close(inside, torch.stack([share, torch.ones(20)]))


def test_pointing_and_mass_of_maps_whose_worth_is_known():
    inside = torch.tensor([[0.0, 0.25, 1.0, 0.0]]).expand(5, 4)
    maps = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.1, 0.5, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1],
                         [0.25, 0.25, 0.25, 0.25], [0.4, 0.0, 0.4, 0.2]])
    assert script.pointing(maps, inside).tolist() == [1, 1, 0, 0.5, 0.5]
    torch.testing.assert_close(script.mass(maps, inside),
                               torch.tensor([0.65, 0.325, 0.125, 0.3125, 0.4]))
    torch.testing.assert_close(script.mass(7 * maps, inside), script.mass(maps, inside))


class Counter(torch.nn.Module):
    """Logit of class 1: how much of patch 5 (of 4 x 5) is not black. Others: 0."""

    def forward(self, x):
        patch = (x[:, 0, 8:16, 0:8] + 1).mean((1, 2))
        return F.one_hot(torch.ones(len(x), dtype=torch.long), 10) * patch[:, None]


def test_deletion_falls_when_the_patch_that_counts_goes():
    x = torch.rand(3, 1, 32, 40)
    maps = torch.rand(3, 20) / 2
    maps[0, 5], maps[1, 5] = 1, -1  # found first, last; and somewhere
    place = maps.argsort(1, descending=True).tolist()[2].index(5)
    counts = list(range(21))
    curve = script.deletion(Counter(), x, torch.tensor([1, 1, 1]), maps, counts)
    whole = Counter()(x).softmax(1)[:, 1]
    for row, gone in ((0, 0), (1, 19), (2, place)):
        expected = torch.where(torch.tensor(counts) <= gone, whole[row], torch.tensor(0.1))
        torch.testing.assert_close(curve[row], expected)
    same = script.deletion(Counter(), x[:1], torch.tensor([1]), torch.ones(1, 20), [5, 6])
    assert same[0, 0] > 0.11 and same[0, 1] == pytest.approx(0.1)  # equal ones: reading order


def test_study_measures_the_maps_of_every_scene(tmp_path):
    config = script.Config(out=str(tmp_path), device="cpu", height=32, width=40, clutter=2)
    run = script.Run(config)
    drawn, labels = script.draw_characters(300, 0)  # more than one portion
    x, boxes = script.scenes(drawn, drawn, (32, 40), 2, torch.Generator().manual_seed(0))
    model = network().float()
    logits, counts, rows, layers = script.study(run, model, x, labels, boxes)
    assert counts[0] == 0 and counts[-1] == 20 and counts == sorted(set(counts))
    torch.testing.assert_close(logits, model(x).detach(), atol=1e-5, rtol=1e-4)
    _, attentions, shares = model(x, weights=True)
    raw = torch.stack(attentions).mean(2).detach()
    inside = script.overlap(boxes, (32, 40))
    maps = {"last layer": raw[-1], "mean of layers": raw.mean(0),
            "rollout": script.attention_rollout(attentions).detach(),
            "no residual": script.attention_rollout(attentions, residual=False).detach(),
            "weighted": script.attention_rollout(attentions, shares=shares).detach()}
    again, attentions, _ = model(x, weights=True)
    maps["gradient"] = script.gradient_rollout(attentions, again, logits.argmax(1))
    for name, matrix in maps.items():
        m = script.patch_map(matrix)
        torch.testing.assert_close(rows[name][:, 0], script.pointing(m, inside))
        torch.testing.assert_close(rows[name][:, 1], script.mass(m, inside), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(rows[name][:, 2], logits.softmax(1)[torch.arange(300), labels])
    assert rows["the box itself"][:, 0].eq(1).all()
    share = (inside > 0).float().mean(1)
    torch.testing.assert_close(rows["uniform"][:, 0], share)
    torch.testing.assert_close(rows["uniform"][:, 1], inside.mean(1))
    assert rows["random"][:, 0].mean().item() == pytest.approx(share.mean().item(), abs=0.09)
    blank = model(torch.full_like(x[:1], -1)).softmax(1)[0, labels].detach()
    for values in rows.values():
        torch.testing.assert_close(values[:, -1], blank)  # at the end everything is black
    assert layers["rollout"].shape == (3, 4, 300)
    torch.testing.assert_close(layers["raw attention"][2, 2], rows["last layer"][:, 0])
    entropy = torch.distributions.Categorical(raw).entropy()  # (L, B, N), in nats
    torch.testing.assert_close(layers["raw attention"][:, 0], entropy[:, :, 0])
    torch.testing.assert_close(layers["raw attention"][:, 1], entropy.mean(2))
    torch.testing.assert_close(layers["rollout"][2, 2:].T, rows["rollout"][:, :2])


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
    logits, maps, shares = model(x, weights=True)
    assert logits.shape == (4, 10) and len(maps) == len(shares) == 3 and maps[0].shape == (4, 2, 21, 21)
    torch.testing.assert_close(model(x), logits)
    changed = x.clone()
    changed[2] += 1
    moved = (model(changed) - logits).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, False]


def test_a_token_sees_its_patch_and_three_pixels_around_it():
    model, x = network(), canvas(1)
    for row, column in ((1, 2), (3, 4), (2, 0)):
        pixels = x.clone().requires_grad_()
        model.stem(pixels)[0, :, row, column].square().sum().backward()
        seen = pixels.grad[0, 0].nonzero()
        assert seen.amin(0).tolist() == [max(8 * v - 3, 0) for v in (row, column)]
        assert seen.amax(0).tolist() == [min(8 * v + 11, side - 1)
                                         for v, side in ((row, 32), (column, 40))]


def test_shares_say_how_much_of_a_token_comes_through_attention():
    model, x = network(), canvas()
    _, maps, shares = model(x, weights=True)
    z = torch.cat([model.cls_token.expand(4, -1, -1), model.stem(x).flatten(2).transpose(1, 2)], 1)
    z = z + model.pos_embed
    R = torch.eye(21, dtype=torch.float64)
    for block, A, share in zip(model.blocks, maps, shares):
        added = block.attn(block.norm1(z))[0]
        torch.testing.assert_close(share, added.norm(dim=2) / (added.norm(dim=2) + z.norm(dim=2)))
        z = z + added
        z = z + block.mlp(block.norm2(z))
        w = share[..., None]
        R = (w * A.mean(1) + (1 - w) * torch.eye(21)) @ R
    torch.testing.assert_close(script.attention_rollout(maps, shares=shares), R)
    for value, other in ((0.5, dict(residual=True)), (1.0, dict(residual=False))):
        constant = [torch.full((4, 21), value, dtype=torch.float64)] * 3
        torch.testing.assert_close(script.attention_rollout(maps, shares=constant),
                                   script.attention_rollout(maps, **other))
    nothing = script.attention_rollout(maps, head_fusion="max", discard=0.5,
                                       shares=[torch.zeros(4, 21)] * 3)
    torch.testing.assert_close(nothing, torch.eye(21).double().expand(4, 21, 21))


def test_at_the_start_the_loss_is_that_of_guessing():
    torch.manual_seed(0)
    loss = F.cross_entropy(script.VisionTransformer()(torch.randn(100, 1, 48, 48)),
                           torch.arange(100) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.05)


def test_32_scenes_can_be_learned_by_heart():
    torch.manual_seed(0)
    drawn, labels = script.draw_characters(32, 0)
    x, _ = script.scenes(drawn, drawn, (40, 40))
    model = script.VisionTransformer((40, 40), 32, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.03 and script.evaluate(model, x, labels)["test_accuracy"] > 0.9


def test_a_scene_without_clutter_is_its_digit_in_its_box():
    drawn, _ = script.draw_characters(200, 0)
    x, boxes = script.scenes(drawn, drawn, (40, 56), 0, torch.Generator().manual_seed(0))
    assert x.shape == (200, 1, 40, 56) and x.min() == -1 and x.max() <= 1
    for scene, digit, (top, left, bottom, right) in zip(x, drawn, boxes.tolist()):
        rows, columns = (scene[0] > -1).nonzero().unbind(1)
        assert [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1] == [
            top, left, bottom, right]
        r, c = digit.nonzero().unbind(1)
        cut = digit[r.min():r.max() + 1, c.min():c.max() + 1].float() / 127.5 - 1
        torch.testing.assert_close(scene[0, top:bottom, left:right], cut)
    places = boxes[:, :2].float()
    assert places.std(0).min() > 2  # they differ


def test_clutter_is_cut_from_the_pool_and_never_darkens():
    digits = torch.zeros(100, 28, 28, dtype=torch.uint8)
    digits[:, 10:20, 12:15] = 100
    pool = torch.full((3, 28, 28), 7, dtype=torch.uint8) * torch.tensor([1, 2, 30])[
        :, None, None].byte()
    bare, boxes = script.scenes(digits, pool, pieces=0, generator=torch.Generator().manual_seed(5))
    full, same = script.scenes(digits, pool, pieces=3, generator=torch.Generator().manual_seed(5))
    assert boxes.equal(same) and (full >= bare).all()
    added = full[full > bare]
    levels = ((added + 1) * 127.5).round().unique().tolist()
    assert levels == [7, 14, 210]
    pixels = (full > bare).flatten(1).sum(1)
    assert pixels.max() <= 3 * 64 and pixels.float().mean() > 100  # three pieces of 8 x 8, less overlap
    again, _ = script.scenes(digits, pool, pieces=3, generator=torch.Generator().manual_seed(5))
    assert again.equal(full)
