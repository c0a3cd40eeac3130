"""04_vit.py beside torch's own attention, least squares, and definitions."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import ROOT, load_script

vit = load_script(ROOT / "04_vit.py")


def network(**more):
    """A small Transformer whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    settings = dict(img_size=12, patch_size=4, in_chans=2, num_classes=5, embed_dim=16, depth=3,
                    num_heads=4)
    model = vit.VisionTransformer(**{**settings, **more}).double()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def images(count=6, channels=2, side=12):
    return torch.randn(count, channels, side, side, dtype=torch.float64)


# ---- Lesson one (ViT eq. 1 to 8) -----------------------------------------------------


def test_patches_are_cut_row_by_row_and_embedded_alike():
    torch.manual_seed(0)
    model, x = network(), images()
    embed, tokens = model.patch_embed, model.embed(x)
    assert tokens.shape == (6, 10, 16)
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(6, 1, 16))
    tokens = tokens[:, 1:] - model.pos_embed[:, 1:]
    for n, (row, column) in enumerate((r, c) for r in range(3) for c in range(3)):
        patch = x[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten(1)
        expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias
        torch.testing.assert_close(tokens[:, n], expected)


def test_attention_written_out_is_the_fused_kernel_and_torchs_module():
    torch.manual_seed(0)
    layer, x = vit.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
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
    block, x = vit.Block(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)

    def norm(v, layer):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return v * layer.weight + layer.bias

    added, attention = block.attn(norm(x, block.norm1))
    h = x + added
    hidden = block.mlp.fc1(norm(h, block.norm2))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    out, same = block(x)
    torch.testing.assert_close(out, h + block.mlp.fc2(hidden))
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
    model, x = network(), images()
    if pos != "learned":
        vit.fix_positions(model, pos)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)[:, :, order]  # (B, C, 9, 4, 4)
    shuffled = patches.unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    difference = (model(shuffled) - model(x)).abs().max()
    assert difference < 1e-10 if pos == "none" else difference > 1e-3


def test_fixed_positions_are_sines_and_cosines_of_one_angle():
    table = vit.sincos_positions(50, 8)
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    model = vit.VisionTransformer()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    vit.fix_positions(model, "sincos")
    torch.testing.assert_close(model.pos_embed[0], vit.sincos_positions(17, 64))
    vit.fix_positions(model, "none")
    assert not model.pos_embed.any() and not model.pos_embed.requires_grad


def test_pixels_are_never_dropped():
    """The convolution would leave out those at the edge without a word."""
    for size, patch in ((32, 7), (30, 8), (28, 5)):
        with pytest.raises(AssertionError, match="patch_size must divide img_size"):
            vit.VisionTransformer(size, patch)
    for shape in ((2, 1, 34, 34), (2, 1, 28, 34), (2, 1, 14, 56), (2, 1, 30, 28)):
        with pytest.raises(AssertionError, match="expected images of 28 x 28"):
            vit.VisionTransformer()(torch.zeros(shape))


def test_maps_and_tokens_are_those_of_the_forward_pass():
    model, x = network(), images()
    tokens, maps = model.encode(model.embed(x))
    assert len(tokens) == 4 and len(maps) == 3 and maps[0].shape == (6, 4, 10, 10)
    torch.testing.assert_close(tokens[0], model.embed(x))
    torch.testing.assert_close(model.head(model.norm(tokens[-1])[:, 0]), model(x))  # eq. 4
    torch.testing.assert_close(model.norm(tokens[-1])[:, 0], model.features(x))
    for block, before, after, attention in zip(model.blocks, tokens, tokens[1:], maps):
        v = block.attn.qkv(block.norm1(before)).view(6, 10, 3, 4, 4)[:, :, 2]  # (B, N, h, D/h)
        heads = torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2)
        h = before + block.attn.proj(heads)
        hidden = F.gelu(block.mlp.fc1(block.norm2(h)))
        torch.testing.assert_close(after, h + block.mlp.fc2(hidden))


def test_parameters_are_those_of_a_published_vit_b_16():
    with torch.device("meta"):
        model = vit.VisionTransformer(224, 16, 3, 1000, 768, 12, 12)
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


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    drawn, labels = vit.draw_characters(32)
    model, x = vit.VisionTransformer(embed_dim=32, depth=2), vit.to_float(drawn)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.02 and (model(x).argmax(1) == labels).all()


# ---- Training ------------------------------------------------------------------------


def test_pixels_go_to_minus_one_one():
    levels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
    x = vit.to_float(levels)
    assert x.shape == (3, 1, 28, 28)
    torch.testing.assert_close(x[:, 0, 4, 7], torch.tensor([-1, 1, -0.6]))


def test_jitter_moves_images_a_little_and_each_in_its_own_way():
    torch.manual_seed(0)
    x = vit.to_float(vit.draw_characters(1)[0]).expand(400, 1, 28, 28)
    moved = vit.jitter(x)
    assert moved.shape == x.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    assert (moved - x).abs().mean((1, 2, 3)).min() > 0.005 and moved.std(0).max() > 0.3
    torch.testing.assert_close(moved.mean((1, 2, 3)).mean(), x.mean(), atol=0.03, rtol=0)
    steps = torch.linspace(-27 / 28, 27 / 28, 28)
    ramp = steps.expand(400, 1, 28, 28)  # x = u: what is seen at (u, v) is a u + b v + c
    seen = vit.jitter(ramp)[:, 0, 4:24, 4:24].flatten(1).T
    u, v = torch.meshgrid(steps[4:24], steps[4:24], indexing="xy")
    design = torch.stack([u.flatten(), v.flatten(), torch.ones(400)], 1)
    numbers = torch.linalg.lstsq(design, seen).solution  # (3, 400)
    torch.testing.assert_close(numbers.mean(1), torch.tensor([1.0, 0, 0]), atol=0.02, rtol=0)
    torch.testing.assert_close(numbers.std(1), torch.full([3], 0.05), atol=0.01, rtol=0)
    white = vit.jitter(torch.ones(400, 1, 28, 28))
    assert white.min() == -1  # what comes from outside of the image is black


class Prior(nn.Module):
    """Logits that do not look at the image: at best the log of how often each label occurs."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(10)), []

    def forward(self, x):
        assert self.training
        self.seen.append(x)
        return self.w.expand(len(x), 10)


def test_training_finds_how_often_each_label_occurs():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 124)
    black, model, history = torch.zeros(1024, 28, 28, dtype=torch.uint8), Prior().eval(), []
    vit.train(model, black, labels, 30, 64, 0.1, history)
    share = labels.bincount(minlength=10) / 1024
    torch.testing.assert_close(model.w.softmax(0), share, atol=0.02, rtol=0)
    entropy = -(share[:3] * share[:3].log()).sum().item()
    assert history[-1][:2] == [480, pytest.approx(entropy, abs=0.03)]
    vit.train(model, black, 0 * labels, 30, 64, 0.1, [])  # a second phase trains as well
    assert model.w.softmax(0)[0] > 0.95


def test_each_epoch_sees_each_image_once_in_a_new_order_with_its_label():
    torch.manual_seed(0)
    shades = (5 * torch.arange(50)).byte().view(50, 1, 1).expand(50, 28, 28)
    model, asked, original = Prior(), [], F.cross_entropy
    patch = pytest.MonkeyPatch()
    patch.setattr(vit.F, "cross_entropy", lambda a, b: asked.append(b) or original(a, b))
    vit.train(model, shades, torch.arange(50) // 5, 3, 7, 0.1, [])
    patch.undo()
    assert [len(x) for x in model.seen] == 3 * [*[7] * 7, 1]
    order = ((torch.cat(model.seen)[:, 0, 14, 14] + 1) * 127.5 / 5).round().view(3, 50).long()
    assert order.sort(1).values.equal(torch.arange(50).expand(3, 50))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert torch.cat(asked).equal(order.flatten() // 5)


# ---- Second to fourth lesson (ex. 5.1; CKA) ------------------------------------------


@pytest.mark.parametrize("count, width", [(40, 6), (9, 30)])  # more images than features, and fewer
def test_ridge_is_least_squares_on_the_augmented_system(count, width):
    torch.manual_seed(0)
    x, labels = torch.randn(count, width), torch.arange(count) % 3
    W = vit.ridge(x, labels)
    Y = torch.where(F.one_hot(labels, 3) == 1, 1.0, -1.0)
    rows = torch.cat([x, math.sqrt(10) * torch.eye(width)])  # ‖·‖² has both terms
    expected = torch.linalg.lstsq(rows, torch.cat([Y, torch.zeros(width, 3)])).solution
    torch.testing.assert_close(W, expected, atol=1e-5, rtol=1e-4)


def test_few_shot_learns_from_n_of_each_letter_and_tests_on_others(monkeypatch):
    torch.manual_seed(0)
    model, calls = vit.VisionTransformer(depth=1), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = vit.draw_characters(8000, vit.LETTERS)
    monkeypatch.setattr(vit, "draw_characters", lambda *args: drawn)

    def train(tuned, x, y, epochs, batch_size, lr, history):
        calls.append((tuned, x, y, epochs * math.ceil(len(x) / batch_size)))
        tuned.norm.weight.data.neg_()

    monkeypatch.setattr(vit, "train", train)
    found = vit.few_shot(vit.get_args(["--device", "cpu"]), model)
    images, labels = drawn
    for n, (tuned, x, y, steps) in zip((1, 5, 20, 100), calls, strict=True):
        assert y.bincount().tolist() == [n] * 26 and 150 < steps <= 200
        assert tuned is not model and tuned.head.weight.shape == (26, 64)
        own = (images[6000:].flatten(1)[:, None, ::29] == x.flatten(1)[None, :, ::29]).all(2)
        assert not own.any()  # no letter is learned and tested
        scores = vit.read(model, images[6000:]) @ vit.ridge(vit.read(model, x), y)
        assert found[f"ridge, {n}"] == pytest.approx(vit.accuracy(scores, labels[6000:]), abs=2e-3)
        right = tuned(vit.to_float(images[6000:])).argmax(1) == labels[6000:]
        assert found[f"fine-tuning, {n}"] == pytest.approx(right.float().mean().item(), abs=2e-3)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_features_are_read_in_portions_and_without_dropout():
    torch.manual_seed(0)
    model, (drawn, _) = vit.VisionTransformer(depth=2), vit.draw_characters(1003)
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    z = vit.read(model.train(), drawn)
    assert z.shape == (1003, 64) and not z.requires_grad
    torch.testing.assert_close(z, model.eval().features(vit.to_float(drawn)), atol=1e-4, rtol=1e-4)


def test_accuracy_is_the_share_of_right_answers():
    scores = torch.tensor([[2.0, 1, 0], [0, 3, 1], [1, 0, 0], [0, 0, 9]])
    assert vit.accuracy(scores, torch.tensor([0, 1, 2, 2])) == 0.75


def test_cka_knows_features_again_after_rotation_scale_and_shift():
    torch.manual_seed(0)
    x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert vit.cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert vit.cka(x, y) == pytest.approx(vit.cka(y, x))
    assert vit.cka(x, x @ torch.randn(8, 8, dtype=torch.float64)) < 0.99
    center = torch.eye(50, dtype=torch.float64) - 1 / 50  # the definition, by Gram matrices
    K, L = (center @ v @ v.T @ center for v in (x, y))
    hsic = [(a * b).sum() for a, b in ((K, L), (K, K), (L, L))]
    assert vit.cka(x, y) == pytest.approx((hsic[0] / (hsic[1] * hsic[2]).sqrt()).item())


def test_cka_of_random_features_needs_many_images():
    torch.manual_seed(0)
    few, many = (vit.cka(*torch.randn(2, n, 64)) for n in (20, 2000))
    assert few > 0.7 and many < 0.06


# ---- The judge of samples (FID eq. 6) ------------------------------------------------


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
    assert vit.frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert vit.frechet_distance(y, x).item() == pytest.approx(expected, rel=1e-9)
    assert vit.frechet_distance(x, x).item() == pytest.approx(0, abs=1e-9)
    assert vit.frechet_distance(x, x + 2).item() == pytest.approx(12)  # 3 times 2²
    few = x[:2]  # a covariance of rank one has a root, too
    assert vit.frechet_distance(few, few).item() == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_precise_for_features_that_hardly_vary_in_most_directions():
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) * torch.logspace(0, -5, 64)[:, None]
    x, y = torch.randn(10, 64) @ mixing, torch.randn(1000, 64) @ mixing
    a, b = [(z.double() - z.double().mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    overlap = torch.linalg.svdvals(a @ b.T).sum()  # tr (C_x C_y)^½ is the nuclear norm of A B^T
    means = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = means + a.square().sum() + b.square().sum() - 2 * overlap
    assert vit.frechet_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(vit.frechet_distance(y, y).item()) < 1e-4  # two decimals are printed


@pytest.fixture
def judged(tmp_path, capsys):
    """A function: arrays -> what `judge` prints about them, with a model of random weights."""
    torch.manual_seed(0)
    model = vit.VisionTransformer(depth=1)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.head.weight.data *= 3
    test_images, _ = vit.draw_characters(2000)
    path = tmp_path / "samples.npz"
    args = vit.get_args(["--load", "x", "--judge", str(path), "--device", "cpu"])

    def scores(**arrays):
        np.savez(path, **arrays)
        vit.judge(args, model, test_images)
        return capsys.readouterr().out.splitlines()

    scores.model, scores.test_images = model, test_images
    return scores


def test_the_judge_counts_what_the_classifier_says(judged):
    samples, _ = vit.draw_characters(150)
    with torch.no_grad():
        certainty, digits = judged.model(vit.to_float(samples)).softmax(1).max(1)
    labels = digits.clone()
    labels[:60] = (labels[:60] + 1) % 10  # 60 of 150 are another digit than asked for
    lines = judged(images=samples.numpy(), labels=labels.numpy())
    clear = (certainty > 0.95).double().mean().item()
    assert 0.05 < clear < 0.95
    real = vit.read(judged.model, judged.test_images)
    distance = vit.frechet_distance(vit.read(judged.model, samples), real).item()
    assert lines[0] == f"images: {clear:.1%} clear, Frechet distance {distance:.2f}"
    assert lines[1].strip() == "60.0% show the digit asked for"
    assert lines[2].startswith("test images: ") and len(lines) == 3
    assert 0 < float(lines[2].split()[-1]) < distance  # 223 of the 2,000 themselves


def test_the_judge_takes_every_array_of_the_file(judged):
    samples, _ = vit.draw_characters(150)
    lines = judged(one=judged.test_images.numpy(), **{"two, σ = 1": samples.numpy()})
    assert [line.split(": ")[0] for line in lines] == ["one", "two, σ = 1", "test images"]
    assert abs(float(lines[0].split()[-1])) < 0.01  # the distance of a set to itself


# ---- What a run reports --------------------------------------------------------------


def test_what_the_class_token_looks_at():
    torch.manual_seed(0)
    attention = torch.rand(3, 4, 17, 17)
    seen = vit.class_attention(attention, 7)
    assert seen.shape == (3, 1, 28, 28)
    for i in range(3):
        row = attention[i, :, 0, 1:].mean(0)
        for patch in range(16):
            y, x = patch // 4 * 7, patch % 4 * 7
            tile = seen[i, 0, y:y + 7, x:x + 7]
            torch.testing.assert_close(tile, (row[patch] / row.max()).expand(7, 7))


def test_results_and_picture_are_those_of_test_images(tmp_path, monkeypatch):
    """Digits to train, their negatives to test; each number again from tested functions."""
    torch.manual_seed(0)
    images, labels = vit.draw_characters(512)
    data = images, labels, 255 - images, labels, "mine"
    monkeypatch.setattr(vit, "load_data", lambda args: data)
    monkeypatch.setattr(vit, "few_shot", lambda args, model: {"ridge, 1": 0.25})
    vit.main(["--quick", "--out", str(tmp_path), "--patch-size", "14", "--pos", "sincos",
              "--device", "cpu"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model, x = vit.VisionTransformer(patch_size=14), vit.to_float(255 - images)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["weights"])
    torch.testing.assert_close(model.pos_embed[0], vit.sincos_positions(5, 64))
    right = (model(x).argmax(1) == labels).float().mean().item()
    assert list(metrics["results"].values()) == [0.25, pytest.approx(right, abs=0.01)]
    attention, alike, *_ = vit.plt.gcf().axes
    layers, maps = model.encode(model.embed(x[:500]))
    table = [[vit.cka(a.mean(1), b.mean(1)) for a in layers] for b in layers]
    np.testing.assert_allclose(alike.images[0].get_array(), np.array(table), atol=1e-4)
    assert alike.images[0].get_clim() == (0, 1)
    picture = np.asarray(attention.images[0].get_array()).squeeze()
    tiles = torch.tensor(picture.reshape(7, 30, 10, 30).swapaxes(1, 2)[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(tiles[0], (x[:10, 0] + 1) / 2)
    for row, attention in zip(tiles[1:], maps):
        expected = vit.class_attention(attention[:10], 14)[:, 0]
        torch.testing.assert_close(row, expected.detach(), atol=1e-4, rtol=0)


def test_judging_trains_nothing_and_writes_nothing(tmp_path, monkeypatch):
    torch.save(vit.VisionTransformer().state_dict(), tmp_path / "model.pt")
    np.savez(tmp_path / "samples.npz", images=vit.draw_characters(30)[0].numpy())
    monkeypatch.setattr(vit, "train", pytest.fail)
    vit.main(["--quick", "--data", "drawn", "--out", str(tmp_path / "out"), "--device", "cpu",
              "--load", str(tmp_path / "model.pt"), "--judge", str(tmp_path / "samples.npz")])
    assert not (tmp_path / "out").exists()


def test_a_loaded_model_is_evaluated_with_the_positions_asked_for(tmp_path, monkeypatch):
    torch.manual_seed(0)
    seen = []
    monkeypatch.setattr(vit, "judge", lambda args, model, images: seen.append(model.pos_embed))
    torch.save(vit.VisionTransformer().state_dict(), tmp_path / "model.pt")
    for pos in ("learned", "sincos", "none"):
        vit.main(["--data", "drawn", "--load", str(tmp_path / "model.pt"), "--judge", "x.npz",
                  "--pos", pos, "--train-size", "10"])
    assert seen[0].std() < 0.1 and seen[1].std() > 0.5 and not seen[2].any()


def test_default_run_learns_the_real_digits(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "few_shot", lambda args, model: {})
    vit.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
              "--train-size", "3000", "--epochs", "3"])
    found, = json.loads((tmp_path / "metrics.json").read_text())["results"].values()
    assert found > 0.5
