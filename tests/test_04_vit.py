"""The mathematics of 04_vit.py against torch's own attention, least squares and definitions."""

import math

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
    embed, x = script.PatchEmbed(4, 2, 16).double(), images()
    tokens = embed(x)
    assert tokens.shape == (6, 9, 16)
    for n, (row, column) in enumerate((r, c) for r in range(3) for c in range(3)):
        patch = x[:, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4].flatten(1)
        expected = patch @ embed.proj.weight.flatten(1).T + embed.proj.bias
        torch.testing.assert_close(tokens[:, n], expected)


def test_attention_written_out_is_the_fused_kernel_and_torchs_module():
    torch.manual_seed(0)
    layer, x = script.Attention(16, 4).double(), torch.randn(3, 7, 16, dtype=torch.float64)
    out, weights = layer(x, weights=True)
    torch.testing.assert_close(layer(x), out)  # fused
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

    h = x + block.attn(norm(x, block.norm1))
    hidden = block.mlp.fc1(norm(h, block.norm2))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(block(x), h + block.mlp.fc2(hidden))


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


def test_maps_and_tokens_are_those_of_the_forward_pass():
    model, x = network(), images()
    tokens, maps = model.layers(x), model.attention_maps(x)
    assert len(tokens) == 4 and len(maps) == 3 and maps[0].shape == (6, 4, 10, 10)
    torch.testing.assert_close(model.norm(tokens[-1]), model.forward_features(x))
    torch.testing.assert_close(model.head(model.forward_features(x)[:, 0]), model(x))
    for block, before, after, attention in zip(model.blocks, tokens, tokens[1:], maps):
        v = block.attn.qkv(block.norm1(before)).view(6, 10, 3, 4, 4)[:, :, 2]  # (B, N, h, D/h)
        heads = torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2)
        h = before + block.attn.proj(heads)
        torch.testing.assert_close(after, h + block.mlp(block.norm2(h)))


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


def test_at_the_start_the_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model, x = script.VisionTransformer(), torch.randn(200, 1, 28, 28)
    loss = F.cross_entropy(model(x), torch.arange(200) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.05)


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    drawn, labels = script.draw_characters(32, 0)
    model, x = script.VisionTransformer(embed_dim=32, depth=2), script.scale(drawn)
    optimizer = script.adamw(model, 3e-3, 0.0)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.02 and (model(x).argmax(1) == labels).all()


def test_weight_decay_reaches_matrices_and_nothing_else():
    model = script.VisionTransformer(depth=1)
    optimizer = script.adamw(model, 1e-3, 0.05)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {name for name, _ in model.named_parameters() if name.endswith("weight")
                     and "norm" not in name}
    assert optimizer.param_groups[0]["weight_decay"] == 0.05
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_jitter_of_nothing_is_the_image_and_of_something_is_near_it():
    torch.manual_seed(0)
    x = script.scale(script.draw_characters(200, 0)[0])
    torch.testing.assert_close(script.jitter(x, 0.0), x, atol=1e-4, rtol=0)
    moved = script.jitter(x)
    assert moved.shape == x.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    assert (moved - x).abs().mean((1, 2, 3)).min() > 0.01
    assert (moved.mean() - x.mean()).abs() < 0.05


# ---- Least squares, CKA, heads -------------------------------------------------------------------


@pytest.mark.parametrize("count, width", [(40, 6), (9, 30)])  # more images than features, and fewer
def test_ridge_is_least_squares_on_the_augmented_system(count, width):
    torch.manual_seed(0)
    x = torch.randn(count, width, dtype=torch.float64)
    labels, lam = torch.arange(count) % 3, 0.7
    W = script.ridge_probe(x, labels, 3, lam)
    X = torch.cat([x, torch.ones(count, 1).double()], 1)
    T = torch.where(F.one_hot(labels, 3) == 1, 1.0, -1.0).double()
    rows = torch.cat([X, math.sqrt(lam) * torch.eye(width + 1).double()])  # ‖·‖² has both terms
    target = torch.cat([T, torch.zeros(width + 1, 3).double()])
    torch.testing.assert_close(W, torch.linalg.lstsq(rows, target).solution)
    W.requires_grad_()
    ((X @ W - T).square().sum() + lam * W.square().sum()).backward()
    assert W.grad.abs().max() < 1e-9
    assert script.probe_accuracy(W.detach(), x, labels) == pytest.approx(
        ((X @ W).argmax(1) == labels).double().mean().item())


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


def test_heads_are_switched_off_least_missed_first():
    torch.manual_seed(0)
    drawn, labels = script.draw_characters(64, 0)
    model = script.VisionTransformer(embed_dim=16, depth=2, num_heads=2)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)

    def without(off):
        """Loss and accuracy with attention written out once more, silent heads left out."""
        def attend(layer, block):
            def attention(x):
                qkv = block.attn.qkv(x).view(len(x), -1, 3, 2, 8).permute(2, 3, 0, 1, 4)
                heads = [F.scaled_dot_product_attention(*qkv[:, h]) * ((layer, h) not in off)
                         for h in range(2)]
                return block.attn.proj(torch.cat(heads, -1))
            return attention

        x = model.layers(script.scale(drawn))[0]
        for layer, block in enumerate(model.blocks):
            x = x + attend(layer, block)(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        logits = model.head(model.norm(x)[:, 0])
        right = (logits.argmax(1) == labels)[32:].float().mean().item()
        return F.cross_entropy(logits[:32], labels[:32]).item(), right

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    order = sorted(places, key=lambda place: without([place])[0])
    assert order != places
    expected = [without(order[:count])[1] for count in range(5)]
    assert script.switch_off(model, drawn, labels) == pytest.approx(expected)
