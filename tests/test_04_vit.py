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


def varied(model):
    """A model whose weights are large enough for attention to matter."""
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def small():
    """A model of three blocks, and six images of two channels in 3 x 3 patches of 4 x 4."""
    model = vit.VisionTransformer(img_size=12, patch_size=4, in_chans=2, num_classes=5,
                                  embed_dim=16, depth=3, num_heads=4)
    return varied(model.double()), torch.randn(6, 2, 12, 12, dtype=torch.float64)


# ---- Lesson one (ViT eq. 1 to 8) -----------------------------------------------------


def test_patches_are_cut_row_by_row_and_embedded_alike():
    model, x = small()
    proj, tokens = model.patch_embed.proj, model.embed(x)
    assert tokens.shape == (6, 10, 16)
    tokens = tokens - model.pos_embed
    torch.testing.assert_close(tokens[:, 0], model.cls_token[0].expand(6, 16))
    for n in range(9):
        row, column = 4 * (n // 3), 4 * (n % 3)
        patch = x[:, :, row:row + 4, column:column + 4].flatten(1)
        expected = patch @ proj.weight.flatten(1).T + proj.bias
        torch.testing.assert_close(tokens[:, 1 + n], expected)


def test_attention_written_out_is_the_fused_kernel_and_torchs_module():
    layer, x = vit.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    out, weights = layer(x)
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, layer.proj(heads))  # fused
    torchs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    torchs.in_proj_weight.data, torchs.in_proj_bias.data = layer.qkv.weight, layer.qkv.bias
    torchs.out_proj.load_state_dict(layer.proj.state_dict())
    expected, expected_weights = torchs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_maps_and_tokens_are_those_of_the_forward_pass():
    """A block is prenorm, with exact GELU (eq. 2 and 3); the attention is what it used."""
    model, x = small()
    tokens, maps = model.encode(model.embed(x))
    torch.testing.assert_close(tokens[0], model.embed(x))

    def norm(z, layer):
        z = z - z.mean(-1, keepdim=True)
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    for block, z, after, attention in zip(model.blocks, tokens[:-1], tokens[1:], maps,
                                         strict=True):
        v = block.attn.qkv(norm(z, block.norm1)).view(6, 10, 3, 4, 4)[:, :, 2]  # (B, N, h, D/h)
        heads = torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2)
        h = z + block.attn.proj(heads)
        hidden = block.mlp.fc1(norm(h, block.norm2))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        torch.testing.assert_close(after, h + block.mlp.fc2(hidden))
    y = norm(tokens[3], model.norm)[:, 0]  # eq. 4
    torch.testing.assert_close(model.features(x), y)
    torch.testing.assert_close(model(x), model.head(y))
    for image, logits in zip(x, model(x)):  # images of a batch do not see each other
        torch.testing.assert_close(model(image[None])[0], logits)
    model(x).sum().backward()
    assert all(p.grad.any() for p in model.parameters())  # everything learns


@pytest.mark.parametrize("pos", ["learned", "sincos", "none"])
def test_the_order_of_patches_matters_only_through_positions(pos):
    model, x = small()
    if pos != "learned":
        vit.fix_positions(model, pos)
    for axis in (2, 3):  # move each patch to the place of the next
        difference = (model(x.roll(4, axis)) - model(x)).abs().max()
        assert difference < 1e-10 if pos == "none" else difference > 1e-3


def test_fixed_positions_are_sines_and_cosines_of_one_angle():
    table = vit.sincos_positions(50, 8)
    for t in (0, 1, 7, 49):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            expected = pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)
            assert table[t, 2 * i:2 * i + 2].tolist() == expected
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


def test_parameters_are_those_of_a_published_vit_b_16():
    with torch.device("meta"):
        model = vit.VisionTransformer(224, 16, 3, 1000, 768, 12, 12)
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768)}
    layers = {"patch_embed.proj": (768, 3, 16, 16), "norm": (768,), "head": (1000, 768)}
    block = {"norm1": (768,), "attn.qkv": (2304, 768), "attn.proj": (768, 768),
             "norm2": (768,), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for i in range(12):
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, nn.LayerNorm))


# ---- Training ------------------------------------------------------------------------


def test_20_images_can_be_learned_by_heart():
    drawn, labels = vit.draw_characters(20)
    model = vit.VisionTransformer(embed_dim=32, depth=2)
    vit.train(model, drawn, labels, 150, 20, 5e-3, [])
    assert F.cross_entropy(model(vit.to_float(drawn)), labels) < 0.1


def test_pixels_go_to_minus_one_one():
    x = vit.to_float(torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1))
    torch.testing.assert_close(x, torch.tensor([-1, 1, -0.6]).view(3, 1, 1, 1))


def test_jitter_is_near_the_identity_and_another_map_for_each_image():
    u = torch.linspace(-27 / 28, 27 / 28, 28).expand(28, 28)
    terms = torch.stack([u, u.T, torch.ones(28, 28)])[:, 4:24, 4:24].flatten(1).T
    for ramp, mean in ((u, [1.0, 0, 0]), (u.T, [0, 1.0, 0])):
        x = ramp.expand(400, 1, 28, 28)
        seen = vit.jitter(x)[:, 0, 4:24, 4:24].flatten(1).T  # each is a u + b v + c
        abc = torch.linalg.lstsq(terms, seen).solution
        torch.testing.assert_close(abc.mean(1), torch.tensor(mean), atol=0.02, rtol=0)
        torch.testing.assert_close(abc.std(1), torch.full([3], 0.05), atol=0.01, rtol=0)
    white = vit.jitter(torch.ones(400, 1, 28, 28))
    assert white.min() == -1 and white.max() < 1.001  # black comes from outside


class Shade(nn.Module):
    """Logits for dark images and for bright ones."""

    def __init__(self):
        super().__init__()
        self.table, self.seen = nn.Parameter(torch.zeros(2, 10)), []

    def forward(self, x):
        assert self.training
        self.seen.append(x)
        return self.table[(x[:, 0, 14, 14] > 0).long()]


def test_training_finds_how_often_each_label_occurs():
    """Four of five dark images are a 0, the fifth is a 1; bright ones are a 5 or a 6."""
    shades = torch.arange(3, 253)  # 125 are dark
    labels = (shades % 5 == 0) + 5 * (shades > 127)
    images = shades.byte().view(-1, 1, 1).expand(-1, 28, 28)
    model, history = Shade().eval(), []
    vit.train(model, images, labels, 75, 64, 0.1, history)
    share = torch.zeros(2, 10)
    share[0, :2] = share[1, 5:7] = torch.tensor([0.8, 0.2])
    torch.testing.assert_close(model.table.softmax(1), share, atol=0.03, rtol=0)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert history[-1][:2] == [300, pytest.approx(entropy, abs=0.03)]

    # In each epoch, each image comes once, jittered, and in a new order.
    assert [len(x) for x in model.seen] == 75 * [64, 64, 64, 58]
    seen = torch.cat(model.seen)[:, 0]
    order = ((seen[:, 14, 14] + 1) * 127.5).round().view(75, 250)
    assert order.sort(1).values.equal(shades.float().expand(75, 250))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert (seen.amin((1, 2)) == -1).float().mean() > 0.5  # black came in from outside


# ---- Second to fourth lesson (ex. 5.1; CKA) ------------------------------------------


@pytest.mark.parametrize("count, width", [(40, 6), (9, 30)])  # of images, of features
def test_ridge_is_least_squares_on_the_augmented_system(count, width):
    x, labels = torch.randn(count, width), torch.arange(count) % 3
    Y = torch.where(F.one_hot(labels, 3) == 1, 1.0, -1.0)
    rows = torch.cat([x, math.sqrt(10) * torch.eye(width)])  # ‖·‖² has both terms
    expected = torch.linalg.lstsq(rows, torch.cat([Y, torch.zeros(width, 3)])).solution
    torch.testing.assert_close(vit.ridge(x, labels), expected, atol=1e-5, rtol=1e-4)


def test_few_shot_learns_from_n_of_each_letter_and_tests_on_others(monkeypatch):
    model, calls = vit.VisionTransformer(depth=1), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = vit.draw_characters(8000, vit.LETTERS)
    monkeypatch.setattr(vit, "draw_characters", lambda *args: (images, labels))

    def train(tuned, x, y, epochs, batch_size, lr, history):
        calls.append((tuned, x, y, epochs * math.ceil(len(x) / batch_size)))
        tuned.norm.weight.data.neg_()

    monkeypatch.setattr(vit, "train", train)
    found = vit.few_shot(vit.get_args(["--device", "cpu"]), model)
    images, labels = images[6000:], labels[6000:]
    for n, (tuned, x, y, steps) in zip((1, 5, 20, 100), calls, strict=True):
        assert y.bincount().tolist() == [n] * 26 and 150 < steps <= 200
        learned, tested = ({image.numpy().tobytes() for image in part} for part in (x, images))
        assert not learned & tested
        assert tuned.head.weight.shape == (26, 64)
        scores = {"ridge": vit.read(model, images) @ vit.ridge(vit.read(model, x), y),
                  "fine-tuning": tuned(vit.to_float(images))}
        for name, score in scores.items():
            right = (score.argmax(1) == labels).float().mean().item()
            assert found[f"{name}, {n}"] == pytest.approx(right, abs=2e-3)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_features_are_read_in_portions_and_without_dropout():
    model, (drawn, _) = vit.VisionTransformer(depth=2), vit.draw_characters(1003)
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    z = vit.read(model.train(), drawn)
    assert z.shape == (1003, 64) and not z.requires_grad
    expected = model.eval().features(vit.to_float(drawn))
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


def test_cka_knows_features_again_after_rotation_scale_and_shift():
    x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64)
    mixing = torch.randn(8, 8, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(mixing)
    assert vit.cka(x, 3 * x @ rotation + 2) == pytest.approx(1)
    assert vit.cka(x, x @ mixing) < 0.99
    center = torch.eye(50, dtype=torch.float64) - 1 / 50  # the definition, by Gram matrices
    K, L = (center @ v @ v.T @ center for v in (x, y))
    expected = ((K * L).sum() / (K.norm() * L.norm())).item()
    assert vit.cka(x, y) == pytest.approx(expected) == vit.cka(y, x)
    few, many = (vit.cka(*torch.randn(2, n, 64)) for n in (20, 2000))  # unrelated features
    assert few > 0.7 and many < 0.06


# ---- The judge of samples (FID eq. 6) ------------------------------------------------


def test_frechet_distance_is_that_of_two_gaussians():
    x = torch.cartesian_prod(*torch.tensor([[-1.0, 1]] * 3))  # covariance 8/7 I
    shift, scale = torch.tensor([[2, 0, -1], [1, 3, 0.5]])
    expected = 4 + 1 + 8 / 7 * (0 + 2**2 + 0.5**2)  # of each axis: the means, the deviations
    assert vit.frechet_distance(x, scale * x + shift).item() == pytest.approx(expected)
    # Ten vectors of which most directions hardly vary: the covariance has no full rank.
    mixing = torch.randn(64, 64) * torch.logspace(0, -5, 64)[:, None]
    x, y = torch.randn(10, 64) @ mixing + 0.3, torch.randn(1000, 64) @ mixing
    A, B = [(z.double() - z.double().mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    overlap = torch.linalg.svdvals(A @ B.T).sum()  # tr (C_x C_y)^½ is the nuclear norm of A Bᵀ
    means = (x.double().mean(0) - y.double().mean(0)).square().sum()
    expected = means + A.square().sum() + B.square().sum() - 2 * overlap
    assert vit.frechet_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    assert vit.frechet_distance(y, x).item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(vit.frechet_distance(y, y).item()) < 1e-4  # two decimals are printed


@pytest.mark.parametrize("pos", ["learned", "sincos", "none"])
def test_the_judge_counts_what_the_loaded_classifier_says(pos, tmp_path, monkeypatch, capsys):
    model, (real, _) = varied(vit.VisionTransformer()), vit.draw_characters(150)
    model.head.weight.data *= 3  # some answers are clear, and some are not
    torch.save(model.state_dict(), tmp_path / "model.pt")
    if pos != "learned":
        vit.fix_positions(model, pos)

    def expected(name, images):
        clear = (model(vit.to_float(images)).softmax(1).amax(1) > 0.95).float().mean()
        assert 0 < clear < 1
        distance = vit.frechet_distance(vit.read(model, images), vit.read(model, real))
        return f"{name}: {clear:.1%} clear, Frechet distance {distance:.2f}"

    samples, _ = vit.draw_characters(150)
    labels = model(vit.to_float(samples)).argmax(1)
    labels[:60] = (labels[:60] + 1) % 10  # 60 of 150 are another digit than asked for
    arrays = {"images": samples, "labels": labels, "two, σ = 1": real}
    np.savez(tmp_path / "samples.npz", **arrays)
    monkeypatch.setattr(vit, "load_data", lambda args: (None, None, real, None, "mine"))
    monkeypatch.setattr(vit, "train", pytest.fail)
    flags = ["--judge", str(tmp_path / "samples.npz"), "--out", str(tmp_path / "out"),
             "--device", "cpu", "--pos", pos]
    vit.main([*flags, "--load", str(tmp_path / "model.pt")])
    assert capsys.readouterr().out.splitlines() == [
        expected("images", samples), "  60.0% show the digit asked for",
        expected("two, σ = 1", real), expected("test images", real[::9])]
    with pytest.raises(AssertionError, match="add --load"):
        vit.main(flags)
    assert not list((tmp_path / "out").iterdir())


# ---- What a run reports --------------------------------------------------------------


def test_results_and_picture_are_those_of_test_images(tmp_path, monkeypatch):
    """Digits to train, their negatives to test; each number again from tested functions."""
    images, labels = vit.draw_characters(512)
    data = images, labels, 255 - images, labels, "mine"
    monkeypatch.setattr(vit, "load_data", lambda args: data)
    monkeypatch.setattr(vit, "few_shot", lambda args, model: {"ridge, 1": 0.25})
    vit.main(["--quick", "--epochs", "4", "--out", str(tmp_path), "--patch-size", "14",
              "--pos", "sincos", "--device", "cpu"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    model, x = vit.VisionTransformer(patch_size=14), vit.to_float(255 - images)
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["weights"])
    torch.testing.assert_close(model.pos_embed[0], vit.sincos_positions(5, 64))
    right = (model(x).argmax(1) == labels).float().mean().item()
    assert list(metrics["results"].values()) == [0.25, pytest.approx(right, abs=0.01)]
    left, alike, *_ = vit.plt.gcf().axes
    layers, maps = model.encode(model.embed(x[:500]))
    table = [[vit.cka(a.mean(1), b.mean(1)) for a in layers] for b in layers]
    np.testing.assert_allclose(alike.images[0].get_array(), np.array(table), atol=1e-4)
    assert alike.images[0].get_clim() == (0, 1)
    picture = np.asarray(left.images[0].get_array()).squeeze()
    tiles = picture.reshape(7, 30, 10, 30).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    np.testing.assert_allclose(tiles[0], (x[:10, 0] + 1) / 2, atol=1e-6)
    for row, attention in zip(tiles[1:], maps):  # how much the class token takes of 4 patches
        for tile, taken in zip(row, attention[:, :, 0, 1:].mean(1).detach().numpy()):
            expected = np.kron(taken.reshape(2, 2) / taken.max(), np.ones((14, 14)))
            np.testing.assert_allclose(tile, expected, atol=1e-4)


def test_default_run_learns_the_real_digits(real_data, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "few_shot", lambda args, model: {})
    vit.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
              "--train-size", "3000", "--epochs", "3"])
    found, = json.loads((tmp_path / "metrics.json").read_text())["results"].values()
    assert found > 0.5
