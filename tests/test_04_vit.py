"""The mathematics of 04_vit.py against torch's own attention, least squares and definitions."""

import copy
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, load_script

script = load_script(ROOT / "04_vit.py")


def network(pos="learned", **more):
    """A small transformer whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    settings = dict(img_size=12, patch_size=4, in_chans=2, num_classes=5, embed_dim=16, depth=3,
                    num_heads=4, pos=pos)
    model = script.VisionTransformer(**{**settings, **more}).double()
    for name, p in model.named_parameters():
        if name != "pos_embed" or pos == "learned":
            p.data += 0.3 * torch.randn_like(p)
    return model


def images(count=6, channels=2, side=12):
    return torch.randn(count, channels, side, side, dtype=torch.float64)


# ---- The model -----------------------------------------------------------------------------------


def test_patches_are_cut_row_by_row_and_embedded_alike():
    torch.manual_seed(0)
    model, x = network(), images()
    embed, tokens = model.patch_embed, model.embed(x)
    assert tokens.shape == (6, 10, 16)
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(6, 1, 16))
    tokens = tokens[:, 1:] - model.pos_embed[:, 1:]
    for n, (row, column) in enumerate((r, c) for r in range(3) for c in range(3)):
        patch = x[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten(1)
        expected = patch @ embed["proj"].weight.flatten(1).T + embed["proj"].bias
        torch.testing.assert_close(tokens[:, n], expected)


def test_attention_written_out_is_the_fused_kernel_and_torchs_module():
    torch.manual_seed(0)
    layer, x = script.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    out, weights = layer(x)
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.proj(heads))  # fused
    assert weights.shape == (3, 4, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7, dtype=torch.float64))
    torchs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    torchs.in_proj_weight.data, torchs.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
    torchs.out_proj.load_state_dict(layer.proj.state_dict())
    expected, expected_weights = torchs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_a_block_is_prenorm_with_exact_gelu():
    torch.manual_seed(0)
    block, x = script.Block(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)

    def norm(v, layer):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return v * layer.weight + layer.bias

    added, attention = block.attn(norm(x, block.norm1))
    h = x + added
    hidden = block.mlp["fc1"](norm(h, block.norm2))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    out, same = block(x)
    torch.testing.assert_close(out, h + block.mlp["fc2"](hidden))
    torch.testing.assert_close(same, attention)


def test_images_of_a_batch_do_not_see_each_other():
    model, x = network(), images()
    logits, changed = model(x), x.clone()
    changed[2] += 1
    moved = (model(changed) - logits).abs().amax(1) > 1e-9
    assert moved.tolist() == [False, False, True, False, False, False]
    torch.testing.assert_close(torch.cat([model(x[i:i + 1]) for i in range(6)]), logits)


@pytest.mark.parametrize("pos", ["learned", "sincos", "none"])
def test_the_order_of_patches_matters_only_through_positions(pos):
    model, x = network(pos), images()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]  # (B, C, 9, 4, 4)
    shuffled = patches.unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    difference = (model(shuffled) - model(x)).abs().max()
    assert difference < 1e-10 if pos == "none" else difference > 1e-3


def test_fixed_positions_are_sines_and_cosines_of_one_angle():
    table = script.sincos_positions(50, 8)
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    model = script.VisionTransformer(pos="sincos")
    assert not model.pos_embed.requires_grad and model.cls_token.requires_grad
    torch.testing.assert_close(model.pos_embed[0], script.sincos_positions(17, 64))
    assert script.VisionTransformer(pos="none").pos_embed.abs().max() == 0
    learned = script.VisionTransformer().pos_embed
    assert learned.requires_grad and learned.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("size, patch", [(32, 7), (30, 8), (28, 5)])
def test_patches_must_cover_the_image(size, patch):
    """The convolution would drop the pixels at the edge without a word."""
    with pytest.raises(AssertionError, match="patch_size must divide img_size"):
        script.VisionTransformer(size, patch)


def test_maps_and_tokens_are_those_of_the_forward_pass():
    model, x = network(), images()
    logits, maps = model(x, return_attention=True)
    torch.testing.assert_close(model(x), logits)
    tokens, same = model.encode(model.embed(x))
    assert len(tokens) == 4 and len(maps) == 3 and maps[0].shape == (6, 4, 10, 10)
    torch.testing.assert_close(tokens[0], model.embed(x))
    torch.testing.assert_close(model.head(model.norm(tokens[-1])[:, 0]), logits)
    for block, before, after, attention, again in zip(model.blocks, tokens, tokens[1:], maps, same):
        torch.testing.assert_close(attention, again)
        v = block.attn.qkv(block.norm1(before)).view(6, 10, 3, 4, 4)[:, :, 2]  # (B, N, h, D/h)
        heads = torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2)
        h = before + block.attn.proj(heads)
        hidden = F.gelu(block.mlp["fc1"](block.norm2(h)))
        torch.testing.assert_close(after, h + block.mlp["fc2"](hidden))


def test_gradients_reach_the_attention_that_is_returned():
    """The derivative of a logit by one entry of the attention, against finite differences."""
    model, x = network(), images(1)
    logits, maps = model(x, return_attention=True)
    gradient = torch.autograd.grad(logits[0, 3], maps)[1][0, 2, 0, 5]
    before = model.encode(model.embed(x))[0][1]

    def logit(shift):
        block = model.blocks[1]
        v = block.attn.qkv(block.norm1(before)).view(1, 10, 3, 4, 4)[:, :, 2]
        attention = maps[1].clone()
        attention[0, 2, 0, 5] += shift
        h = before + block.attn.proj(torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2))
        h = h + block.mlp["fc2"](F.gelu(block.mlp["fc1"](block.norm2(h))))
        for block in model.blocks[2:]:
            h, _ = block(h)
        return model.head(model.norm(h[:, 0]))[0, 3].item()

    assert gradient.item() == pytest.approx((logit(1e-5) - logit(-1e-5)) / 2e-5, rel=1e-5)


def test_features_are_the_input_of_the_head_in_portions():
    torch.manual_seed(0)
    model = script.VisionTransformer(depth=2)
    model.head.weight.data.normal_()
    drawn, _ = script.draw_characters(1003, 0)
    z = script.features(model, drawn)
    assert z.shape == (1003, 64) and not z.requires_grad
    torch.testing.assert_close(model.head(z), model(script.scale(drawn)), atol=1e-4, rtol=1e-4)


def test_parameters_are_those_of_a_published_vit_b_16():
    with torch.device("meta"):
        model = script.VisionTransformer(224, 16, 3, 1000, 768, 12, 12)
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768),
              "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
              "norm.weight": (768,), "norm.bias": (768,),
              "head.weight": (1000, 768), "head.bias": (1000,)}
    for i in range(12):
        for name, shape in (("norm1", (768,)), ("attn.qkv", (2304, 768)), ("attn.proj", (768, 768)),
                            ("norm2", (768,)), ("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072))):
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 25 and all(norm.eps == 1e-6 for norm in norms)


def test_at_the_start_the_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model, x = script.VisionTransformer(), torch.randn(200, 1, 28, 28)
    loss = F.cross_entropy(model(x), torch.arange(200) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.05)


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    drawn, labels = script.draw_characters(32, 0)
    model, x = script.VisionTransformer(embed_dim=32, depth=2), script.scale(drawn)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.02 and (model(x).argmax(1) == labels).all()


def test_jitter_of_nothing_is_the_image_and_of_something_is_near_it():
    torch.manual_seed(0)
    x = script.scale(script.draw_characters(200, 0)[0])
    torch.testing.assert_close(script.jitter(x, 0.0), x, atol=1e-4, rtol=0)
    moved = script.jitter(x, 0.1)
    assert moved.shape == x.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    assert (moved - x).abs().mean((1, 2, 3)).min() > 0.01
    assert (moved.mean() - x.mean()).abs() < 0.05
    torch.manual_seed(1)
    found = script.jitter(x)
    torch.manual_seed(1)
    affine = torch.eye(2, 3) + 0.05 * torch.randn(200, 2, 3)  # 5% of half a side, in all six numbers
    for i in (0, 7):  # the pixel that lands at (row, column), by hand
        for row, column in ((14, 14), (9, 17)):
            u, v = (2 * column + 1) / 28 - 1, (2 * row + 1) / 28 - 1
            a, b = (affine[i] @ torch.tensor([u, v, 1.0])).tolist()
            at = torch.tensor([[[[a, b]]]])
            expected = F.grid_sample(x[i:i + 1] + 1, at, align_corners=False).item() - 1
            assert found[i, 0, row, column].item() == pytest.approx(expected, abs=1e-5)
    far = script.jitter(torch.ones(500, 1, 28, 28), 1.0)
    assert far.min() == -1  # what comes from outside of the image is black


def test_scaled_images_are_in_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    x = script.scale(images)
    assert x.shape == (3, 1, 28, 28)
    torch.testing.assert_close(x[:, 0, 4, 7], torch.tensor([-1, 1, -0.6]))


def test_training_is_a_plain_loop_of_adam_with_one_cycle(monkeypatch):
    """Weights after `train` against a loop written out here, with the rate of OneCycleLR by hand."""
    torch.manual_seed(0)
    images, labels = script.draw_characters(50, 0)
    one = script.VisionTransformer(embed_dim=16, depth=1)
    two = copy.deepcopy(one)
    args = script.get_args("--epochs 3 --batch-size 20 --lr 0.01".split())
    reported = []
    monkeypatch.setattr(script, "progress", lambda *values: reported.append(values))
    history = []
    torch.manual_seed(1)
    script.train(args, one, images, labels, history)
    torch.manual_seed(1)
    steps, step, losses = 9, 0, []
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in two.parameters()}
    products = 1.0
    for _ in range(3):
        for batch in torch.randperm(50).split(20):
            top = 0.3 * steps - 1  # the step of the highest rate
            if step <= top:
                phase, ends = step / top, (0.01 / 25, 0.01, 0.95, 0.85)
            else:
                phase, ends = (step - top) / (steps - 1 - top), (0.01, 0.01 / 25e4, 0.85, 0.95)
            bend = (1 + math.cos(math.pi * phase)) / 2
            rate = ends[1] + (ends[0] - ends[1]) * bend
            beta = ends[3] + (ends[2] - ends[3]) * bend
            loss = F.cross_entropy(two(script.jitter(script.scale(images[batch]))), labels[batch])
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(two.parameters()))
            step += 1
            for (p, (m, v)), g in zip(moments.items(), gradients):
                m.mul_(beta).add_((1 - beta) * g)
                v.mul_(0.999).add_(0.001 * g**2)
                # torch corrects by the present beta to the power of the step
                p.data -= rate * m / (1 - beta**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3)
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-3)
    assert [values[0] for values in reported] == list(range(1, 10))
    assert reported[-1][1] == 9 and reported[-1][3] == {"loss": history[-1]["loss"]}


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
    script.train(args, script.VisionTransformer(embed_dim=16, depth=1), images, labels, history)
    assert [row["step"] for row in history] == [*range(3, 50, 3), 50]
    expected = [sum(losses[i:i + 3]) / 3 for i in range(0, 48, 3)] + [sum(losses[48:]) / 2]
    assert [row["loss"] for row in history] == pytest.approx([v.item() for v in expected], rel=1e-5)


# ---- Least squares, CKA, and the judge ------------------------------------------------------------


@pytest.mark.parametrize("count, width", [(40, 6), (9, 30)])  # more images than features, and fewer
def test_ridge_is_least_squares_on_the_augmented_system(count, width):
    torch.manual_seed(0)
    x = torch.randn(count, width, dtype=torch.float64)
    labels, lam = torch.arange(count) % 3, 0.7
    W = script.ridge(x, labels, 3, lam)
    X = x
    T = torch.where(F.one_hot(labels, 3) == 1, 1.0, -1.0).double()
    rows = torch.cat([X, math.sqrt(lam) * torch.eye(width).double()])  # ‖·‖² has both terms
    target = torch.cat([T, torch.zeros(width, 3).double()])
    torch.testing.assert_close(W, torch.linalg.lstsq(rows, target).solution)
    torch.testing.assert_close(script.ridge(x, labels, 3), script.ridge(x, labels, 3, 10.0))
    W.requires_grad_()
    ((X @ W - T).square().sum() + lam * W.square().sum()).backward()
    assert W.grad.abs().max() < 1e-9


def test_cka_knows_features_again_after_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert script.cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert script.cka(x, y) == pytest.approx(script.cka(y, x))
    assert script.cka(x, x @ torch.randn(8, 8, dtype=torch.float64)) < 0.99
    center = torch.eye(50, dtype=torch.float64) - 1 / 50  # the definition, by Gram matrices
    K, L = (center @ v @ v.T @ center for v in (x, y))
    hsic = [(a * b).sum() for a, b in ((K, L), (K, K), (L, L))]
    assert script.cka(x, y) == pytest.approx((hsic[0] / (hsic[1] * hsic[2]).sqrt()).item())


def gaussian(mean, covariance, count, seed):
    torch.manual_seed(seed)
    return torch.distributions.MultivariateNormal(mean, covariance).sample((count,))


def test_frechet_distance_of_two_known_gaussians():
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, 3, dtype=torch.float64)
    C, D = A @ A.T + torch.eye(3).double(), B @ B.T + 0.5 * torch.eye(3).double()
    m, n = torch.randn(2, 3, dtype=torch.float64)

    def symmetric_root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.sqrt()) @ vectors.T

    half = symmetric_root(C)
    root = half @ symmetric_root(half @ D @ half) @ torch.linalg.inv(half)
    torch.testing.assert_close(root @ root, C @ D)
    expected = ((m - n).square().sum() + (C + D - 2 * root).trace()).item()
    # samples whose mean and covariance are exactly these
    x, y = torch.randn(2, 500, 3, dtype=torch.float64)

    def exact(x, mean, covariance):
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
        return x @ torch.linalg.cholesky(covariance).T + mean

    x, y = exact(x, m, C), exact(y, n, D)
    assert script.frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert script.frechet_distance(y, x).item() == pytest.approx(expected, rel=1e-9)
    assert script.frechet_distance(x, x).item() == pytest.approx(0, abs=1e-9)
    assert script.frechet_distance(x, x + 2).item() == pytest.approx(12)  # 3 times 2²
    few = x[:2]  # a covariance of rank one has a root, too
    assert script.frechet_distance(few, few).item() == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_precise_for_features_that_hardly_vary_in_most_directions():
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) * torch.logspace(0, -5, 64)[:, None]
    x, y = torch.randn(10, 64) @ mixing, torch.randn(1000, 64) @ mixing
    a, b = [(z.double() - z.double().mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    overlap = torch.linalg.svdvals(a @ b.T).sum()  # tr (C_x C_y)^½ is the nuclear norm of A B^T
    means = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = means + a.square().sum() + b.square().sum() - 2 * overlap
    assert script.frechet_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(script.frechet_distance(y, y).item()) < 1e-4  # two decimals are printed


@pytest.fixture
def judged(tmp_path):
    """A function: arrays -> what `judge` prints about them, with a model of random weights."""
    torch.manual_seed(0)
    model = script.VisionTransformer(depth=1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.head.weight.data *= 3
    test_images, _ = script.draw_characters(400, 5)
    args = script.get_args(["--load", "model.pt", "--judge", str(tmp_path / "samples.npz")])

    def scores(capsys, **arrays):
        np.savez(args.judge, **arrays)
        script.judge(args, model, test_images)
        return capsys.readouterr().out.splitlines()

    scores.model, scores.test_images = model, test_images
    return scores


def test_the_judge_counts_what_the_classifier_says(judged, capsys):
    samples, _ = script.draw_characters(150, 6)
    probabilities = judged.model(script.scale(samples)).softmax(1)
    certainty, classes = probabilities.max(1)
    labels = classes.clone()
    labels[:60] = (labels[:60] + 1) % 10  # 60 of 150 are another digit than asked for
    lines = judged(capsys, some=samples.numpy(), labels=labels.numpy())
    clear = (certainty > 0.95).double().mean().item()
    assert 0.05 < clear < 0.95
    real = script.features(judged.model, judged.test_images)
    distance = script.frechet_distance(script.features(judged.model, samples), real).item()
    assert lines[0] == (f"some: {clear:.1%} clear (over 95% sure), "
                        f"Fréchet distance {distance:.2f}")
    assert lines[1].strip() == "60.0% show the digit asked for"
    assert lines[2].startswith("test images: ") and len(lines) == 3
    torch.manual_seed(3)
    lines = judged(capsys, some=samples.numpy(), labels=labels.numpy())
    torch.manual_seed(3)
    drawn = real[torch.randperm(400)[:150]]  # at random, as many as there are samples
    assert lines[2].endswith(f" {script.frechet_distance(drawn, real):.2f}")
    nearer = float(lines[2].split()[-1])
    assert 0 < nearer < distance  # 150 of the 400 themselves, without a label asked for


def test_certainty_is_clear(judged, capsys):
    judged.model.head.bias.data[0] = 1000
    line, _ = judged(capsys, some=judged.test_images.numpy())
    assert "100.0% clear" in line


def test_the_judge_takes_every_array_of_the_file(judged, capsys):
    samples, _ = script.draw_characters(150, 6)
    same = judged(capsys, one=judged.test_images.numpy(), **{"two, σ = 1": samples.numpy()})
    assert [line.split(": ")[0] for line in same] == ["one", "two, σ = 1", "test images"]
    assert abs(float(same[0].split()[-1])) < 0.01  # the distance of a set to itself
    assert abs(float(same[2].split()[-1])) < 0.01  # all 400, in another order


@pytest.mark.parametrize("arrays", [
    {"images": np.zeros((5, 28, 28), np.float32)}, {"images": np.zeros((5, 14, 14), np.uint8)},
    {"weights": np.zeros((3, 3))}, {}, {"images": np.array([None])}])
def test_a_file_without_samples_gets_a_sentence(arrays, judged, capsys):
    with pytest.raises(SystemExit, match="--judge .*samples.npz cannot be used: "):
        judged(capsys, **arrays)


def test_other_files_get_a_sentence_and_so_does_a_judge_without_a_model(tmp_path, capsys):
    model, (images, _) = script.VisionTransformer(depth=1), script.draw_characters(20, 0)
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", images.numpy())
    for name in ("text.npz", "one.npy", "missing.npz"):
        args = script.get_args(["--load", "x", "--judge", str(tmp_path / name)])
        with pytest.raises(SystemExit, match=name):
            script.judge(args, model, images)
    with pytest.raises(SystemExit):
        script.get_args(["--judge", "samples.npz"])
    assert "--load" in capsys.readouterr().err


def test_judging_trains_nothing_and_changes_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", pytest.fail)
    out = tmp_path / "04_vit"
    out.mkdir()
    model = script.VisionTransformer(pos="sincos")
    torch.save({"settings": {}, "weights": model.state_dict()}, out / "model.pt")
    (out / "metrics.json").write_text("old")
    drawn, _ = script.draw_characters(30, 6)
    np.savez(tmp_path / "samples.npz", images=drawn.numpy())
    calls = []
    monkeypatch.setattr(script, "judge", lambda *values: calls.append(values))
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path), "--load",
                 str(out / "model.pt"), "--judge", str(tmp_path / "samples.npz")])
    (args, judging, test_images), = calls
    assert judging.state_dict()["pos_embed"].equal(model.pos_embed) and len(test_images) == 2000
    assert (out / "metrics.json").read_text() == "old" and len(list(out.iterdir())) == 2


# ---- Few-shot learning, main and the picture ------------------------------------------------------


def test_few_shot_learns_n_of_each_letter_and_tests_on_others(monkeypatch):
    torch.manual_seed(0)
    model = script.VisionTransformer(depth=1)
    before = copy.deepcopy(model.state_dict())
    images, labels = script.draw_characters(7200, 2, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    calls = []

    def train(args, tuned, some, names, history):
        calls.append((args.epochs, args.batch_size, args.lr, tuned, some, names))
        tuned.norm.weight.data.neg_()

    monkeypatch.setattr(script, "train", train)
    found = script.few_shot(script.get_args([]), model, "cpu")
    assert list(found) == ["ridge", "fine-tuning"]
    assert list(found["ridge"]) == [1, 5, 20, 100] == list(found["fine-tuning"])
    test = slice(5200, None)
    for n, (epochs, size, lr, tuned, some, names) in zip((1, 5, 20, 100), calls):
        assert names.bincount().tolist() == [n] * 26 and tuned.head.weight.shape == (26, 64)
        assert (epochs, size, lr) == (200 // n, 32, 1e-3)
        assert tuned is not model
        matches = (images[:5200].flatten(1)[None, :, ::29] == some.flatten(1)[:, None, ::29]).all(2)
        assert matches.any(1).all()  # learned from the first 5,200
        z = script.features(model, some)
        W = script.ridge(z, names, 26)
        right = (script.features(model, images[test]) @ W).argmax(1) == labels[test]
        assert found["ridge"][n] == pytest.approx(right.float().mean().item(), abs=2e-3)
        right = tuned(script.scale(images[test])).argmax(1) == labels[test]
        assert found["fine-tuning"][n] == pytest.approx(right.float().mean().item(), abs=2e-3)
    for name, value in model.state_dict().items():
        assert value.equal(before[name])  # the model itself is not changed
    assert list(script.few_shot(script.get_args(["--quick"]), model, "cpu")["ridge"]) == [5]


def test_few_shot_never_learns_from_the_letters_it_is_tested_on(monkeypatch):
    images, labels = script.draw_characters(2200, 2, "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    labels[:200] = torch.arange(200) % 25  # Z is among the last 2,000 only
    monkeypatch.setattr(script, "draw_characters", lambda *args: (images, labels))
    learned = []
    monkeypatch.setattr(script, "train", lambda args, model, x, y, history: learned.append(y))
    script.few_shot(script.get_args([]), script.VisionTransformer(depth=1), "cpu")
    assert [y.unique().tolist() for y in learned] == 4 * [list(range(25))]


def test_default_settings_are_those_of_the_header():
    args = vars(script.get_args([]))
    expected = dict(epochs=12, batch_size=128, lr=2e-3, train_size=60000, seed=0, patch_size=7,
                    pos="learned", judge=None, load=None, quick=False)
    assert {name: args[name] for name in expected} == expected
    model = script.VisionTransformer()
    assert len(model.blocks) == 6 and model.blocks[0].attn.num_heads == 4
    assert model.pos_embed.shape == (1, 17, 64)


def test_main_hands_on_data_and_flags_and_draws_what_it_finds(tmp_path, monkeypatch):
    seen = {}

    def spy(name, result=None):
        original = getattr(script, name)

        def call(*values):
            seen[name] = values
            return original(*values) if result is None else result
        monkeypatch.setattr(script, name, call)

    spy("train")
    spy("plot_results")
    letters = {"ridge": {1: 0.25, 5: 0.5}, "fine-tuning": {1: 0.125, 5: 0.75}}
    spy("few_shot", letters)
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path),
                 "--patch-size", "14", "--pos", "none", "--seed", "7"])
    assert torch.initial_seed() == 7
    args, model, images, labels, history = seen["train"]
    drawn, names = script.draw_characters(512, 0)
    assert images.equal(drawn) and labels.equal(names)
    assert model.pos_embed.shape == (1, 5, 64) and not model.pos_embed.any()
    test_images, test_labels = script.draw_characters(2000, 1)
    metrics = json.loads((tmp_path / "04_vit" / "metrics.json").read_text())
    right = torch.cat([model(script.scale(x)).argmax(1) for x in test_images.split(1000)]) == test_labels
    assert metrics["results"]["accuracy (chance 0.1)"] == pytest.approx(right.float().mean().item())
    assert metrics["results"]["accuracy on letters (chance 0.04)"] == {
        way: {str(n): share for n, share in row.items()} for way, row in letters.items()}
    assert metrics["history"] == history and len(history) >= 5
    _, same, x, _, shown = seen["plot_results"]
    assert same is model and shown == letters and x.equal(script.scale(test_images[:500]))
    loss, few, attention, alike = plt.gcf().axes[:4]
    assert list(loss.lines[0].get_ydata()) == [row["loss"] for row in history]
    assert list(loss.lines[0].get_xdata()) == [row["step"] for row in history]
    for line, (way, row) in zip(few.lines, letters.items()):
        assert line.get_label() == way and list(line.get_xdata()) == [1, 5]
        assert list(line.get_ydata()) == list(row.values())
    tokens, maps = model.encode(model.embed(x))
    table = [[script.cka(a.mean(1), b.mean(1)) for a in tokens] for b in tokens]
    np.testing.assert_allclose(alike.images[0].get_array(), np.array(table), atol=1e-5)
    assert alike.images[0].get_clim() == (0, 1)
    picture = np.asarray(attention.images[0].get_array())[:, :, 0]
    assert picture.shape == (7 * 30, 10 * 30)
    for block in range(6):
        for i in (0, 3, 9):
            row = maps[block][i, :, 0, 1:].mean(0)
            row = (row / row.max()).view(2, 2).detach()
            tile = picture[30 * (block + 1) + 1:30 * (block + 2) - 1, 30 * i + 1:30 * i + 29]
            for r in range(2):
                for c in range(2):
                    np.testing.assert_allclose(tile[14 * r:14 * r + 14, 14 * c:14 * c + 14],
                                               row[r, c], atol=1e-5)
    np.testing.assert_allclose(picture[1:29, 61:89], (x[2, 0].numpy() + 1) / 2, atol=1e-6)
