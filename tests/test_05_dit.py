"""The mathematics of 05_dit.py: the blocks, positions, guidance, the learned variance, sampling."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "05_dit.py")
DESIGNS = ["in-context", "cross-attention", "adaln", "adaln-zero"]
each_design = pytest.mark.parametrize("design", DESIGNS)


def network(design="adaln-zero", spread=0.1, **more):
    """A small DiT in double precision; `spread` moves its weights away from the start."""
    torch.manual_seed(0)
    settings = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4,
                    num_classes=5, design=design)
    model = script.DiT(**{**settings, **more}).double()
    for p in model.parameters():
        p.data += spread * torch.randn_like(p) * p.requires_grad
    return model


def batch(count=4, channels=3):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, 8, 8, dtype=torch.float64, generator=random)
    return x, torch.arange(1, count + 1) * 7, torch.arange(count) % 5


def bars(diffusion, t):
    return diffusion.alpha_bars[t].view(-1, 1, 1, 1)


def noisy(diffusion, x0, t, noise):
    """x_t from its definition, DDPM eq. 4."""
    bar = bars(diffusion, t)
    return bar.sqrt() * x0 + (1 - bar).sqrt() * noise


# ---- The transformer -----------------------------------------------------------------------------


def test_adaln_zero_starts_as_the_identity_and_with_output_zero():
    model, (x, t, y) = network(spread=0), batch()
    tokens = torch.randn(4, 16, 32, dtype=torch.float64)
    c = torch.randn(4, 1, 32, dtype=torch.float64)
    for block in model.blocks:
        assert block(tokens, c, None).equal(tokens)
    for out in model(x, t, y):
        assert out.shape == (4, 3, 8, 8) and out.abs().max() == 0
    moved = network(spread=0.1)
    assert (moved.blocks[0](tokens, c, None) - tokens).abs().max() > 0.01


@each_design
def test_only_adaln_zero_starts_as_the_identity_and_all_with_output_zero(design):
    model, (x, t, y) = network(design, spread=0), batch()
    tokens, condition = torch.randn(4, 16, 32).double(), torch.randn(4, 2, 32).double()
    c = condition.sum(1, keepdim=True)
    same = model.blocks[0](tokens, c, condition).equal(tokens)
    assert same == (design == "adaln-zero")
    if design == "adaln":  # its modulation is not zero at first, that of the last norm is
        assert model.blocks[0].adaLN_modulation[1].weight.abs().min() > 0
    if design.startswith("adaln"):
        assert not any(p.any() for p in model.final_layer["adaLN_modulation"].parameters())
    assert all(out.abs().max() == 0 for out in model(x, t, y))


def norm(v):
    return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def attention_by_hand(attn, v):
    q, k, w = (v @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, -1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        heads.append(weights @ w[..., part])
    return attn.proj(torch.cat(heads, -1))


def mlp_by_hand(block, v):
    hidden = block.mlp["fc1"](v)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return block.mlp["fc2"](gelu)


def test_a_block_is_the_papers_formula():
    block, torch_c = network().blocks[0], torch.randn(4, 1, 32, dtype=torch.float64)
    x = torch.randn(4, 16, 32, dtype=torch.float64)
    six = (F.silu(torch_c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias)
    b1, g1, a1, b2, g2, a2 = six.view(4, 6, 1, 32).unbind(1)  # shift, scale, gate; twice
    h = x + a1 * attention_by_hand(block.attn, norm(x) * (1 + g1) + b1)
    expected = h + a2 * mlp_by_hand(block, norm(h) * (1 + g2) + b2)
    torch.testing.assert_close(block(x, torch_c, None), expected)


def test_the_other_three_designs_by_hand():
    x, tokens = torch.randn(4, 16, 32).double(), torch.randn(4, 2, 32).double()
    c = tokens.sum(1, keepdim=True)
    block = network("adaln").blocks[0]
    four = F.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias
    b1, g1, b2, g2 = four.view(4, 4, 1, 32).unbind(1)  # shift, scale; twice; no gates
    h = x + attention_by_hand(block.attn, norm(x) * (1 + g1) + b1)
    torch.testing.assert_close(block(x, c, tokens), h + mlp_by_hand(block, norm(h) * (1 + g2) + b2))
    block = network("in-context").blocks[0]
    h = x + attention_by_hand(block.attn, norm(x))
    torch.testing.assert_close(block(x, c, tokens), h + mlp_by_hand(block, norm(h)))
    block = network("cross-attention").blocks[0]
    h = x + attention_by_hand(block.attn, norm(x))
    h = h + block.cross_attn(norm(h), tokens)  # tested below against torch's own
    torch.testing.assert_close(block(x, c, tokens), h + mlp_by_hand(block, norm(h)))


def test_attention_is_torchs_own_with_and_without_a_context():
    torch.manual_seed(0)
    layer = script.Attention(16, 4).double()
    x, tokens = (torch.randn(3, n, 16, dtype=torch.float64) for n in (7, 2))
    torchs = nn.MultiheadAttention(16, 4, batch_first=True).double()
    torchs.in_proj_weight.data = layer.qkv.weight.data
    torchs.in_proj_bias.data = layer.qkv.bias.data + 0.1
    layer.qkv.bias.data += 0.1
    torchs.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x, tokens), torchs(x, tokens, tokens)[0])
    torch.testing.assert_close(layer(x), torchs(x, x, x)[0])
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(fused))


@each_design
def test_every_design_sees_t_and_the_class_and_keeps_images_apart(design):
    model, (x, t, y) = network(design), batch()
    out = torch.cat(model(x, t, y), 1)
    assert out.shape == (4, 6, 8, 8)
    for other in ((x, t + 1, y), (x, t, (y + 1) % 5), (x + 0.1, t, y), (x, t, y - y - 1)):
        assert (torch.cat(model(*other), 1) - out).abs().amax((1, 2, 3)).min() > 1e-6
    each = [torch.cat(model(x[i:i + 1], t[i:i + 1], y[i:i + 1]), 1) for i in range(4)]
    torch.testing.assert_close(torch.cat(each), out)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _, a, b: seen.append(b.shape[1]))
    model(x, t, y)
    assert seen == [18 if design == "in-context" else 16]


@each_design
def test_the_whole_network_by_hand(design):
    model, (x, t, y) = network(design), batch()
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (B, 16, C P P)
    proj = model.x_embedder["proj"]
    h = patches @ proj.weight.flatten(1).T + proj.bias + model.pos_embed
    angle = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    t_emb = model.t_embedder["mlp"](torch.cat([angle.cos(), angle.sin()], 1))
    tokens = torch.stack([t_emb, model.y_embedder["embedding_table"](y)], 1)
    c = tokens[:, :1] + tokens[:, 1:]
    if design == "in-context":
        h = torch.cat([h, tokens], 1)
    for block in model.blocks:
        h = block(h, c, tokens)
    h = norm(h[:, :16])
    if design.startswith("adaln"):
        layer = model.final_layer["adaLN_modulation"][1]
        shift, scale = (F.silu(c) @ layer.weight.T + layer.bias).chunk(2, -1)
        h = h * (1 + scale) + shift
    out = model.unpatchify(model.final_layer["linear"](h))
    torch.testing.assert_close(torch.cat(model(x, t, y), 1), out)


def test_patches_come_back_where_they_were():
    model, x = network(), batch()[0]
    P = model.patch_size
    patches = torch.stack([x[:, :, P * i:P * i + P, P * j:P * j + P].permute(0, 2, 3, 1).flatten(1)
                           for i in range(4) for j in range(4)], 1)  # (B, N, P P C), channel last
    assert model.unpatchify(patches).equal(x)


def test_positions_tell_the_column_in_one_half_and_the_row_in_the_other():
    table = script.sincos_positions(6, 16).view(6, 6, 16)  # row, column
    assert table[:, :, :8].std(0).max() < 1e-6 and table[:, :, 8:].std(1).max() < 1e-6
    for row, column in ((0, 3), (5, 1), (2, 2)):
        for half, place in ((0, column), (8, row)):
            for i in range(4):
                angle = place / 10000 ** (i / 4)
                assert table[row, column, half + i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert table[row, column, half + 4 + i].item() == pytest.approx(
                    math.cos(angle), abs=1e-6)
    assert network().pos_embed[0].equal(script.sincos_positions(4, 32).double())
    assert not network().pos_embed.requires_grad


def test_time_is_cosines_then_sines():
    got = script.timestep_embedding(torch.tensor([0.0, 3.0, 900.0]))
    assert got.shape == (3, 256)
    for row, t in zip(got, (0, 3, 900)):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_the_null_class_is_minus_one_and_the_last_row():
    model, (x, t, y) = network(), batch()
    assert model.y_embedder["embedding_table"].weight.shape == (6, 32)
    null, last = model(x, t, torch.full_like(y, -1)), model(x, t, torch.full_like(y, 5))
    assert null[0].equal(last[0]) and null[1].equal(last[1])
    assert all((null[0] - model(x, t, torch.full_like(y, k))[0]).abs().max() > 1e-6 for k in range(5))


def test_parameters_are_those_of_a_published_dit_xl_2():
    with torch.device("meta"):
        model = script.DiT()
    D = 1152
    shapes = {"pos_embed": (1, 256, D), "x_embedder.proj.weight": (D, 4, 2, 2),
              "x_embedder.proj.bias": (D,), "t_embedder.mlp.0.weight": (D, 256),
              "t_embedder.mlp.0.bias": (D,), "t_embedder.mlp.2.weight": (D, D),
              "t_embedder.mlp.2.bias": (D,), "y_embedder.embedding_table.weight": (1001, D),
              "final_layer.linear.weight": (32, D), "final_layer.linear.bias": (32,),
              "final_layer.adaLN_modulation.1.weight": (2 * D, D),
              "final_layer.adaLN_modulation.1.bias": (2 * D,)}
    for i in range(28):
        for name, out, into in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D),
                                ("mlp.fc2", D, 4 * D), ("adaLN_modulation.1", 6 * D, D)):
            shapes[f"blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"blocks.{i}.{name}.bias"] = (out,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    assert model.blocks[0].attn.num_heads == 16


@each_design
def test_the_parameters_of_the_four_designs_counted_by_hand(design):
    model, D = script.DiT(8, 2, 2, 128, 6, 4, 10, design), 128
    block = 3 * D * D + 3 * D + D * D + D + 4 * D * D + 4 * D + 4 * D * D + D
    block += {"in-context": 0, "cross-attention": 4 * D * D + 4 * D, "adaln": 4 * D * (D + 1),
              "adaln-zero": 6 * D * (D + 1)}[design]
    rest = D * 8 + D + 257 * D + D * D + D + 11 * D + 16 * D + (D + 1) * 16
    rest += 2 * D * (D + 1) if design.startswith("adaln") else 0
    assert sum(p.numel() for p in model.parameters()) == 6 * block + rest


def test_16_latents_can_be_learned_by_heart():
    torch.manual_seed(0)
    diffusion, x0 = script.Diffusion(1000), torch.randn(16, 2, 8, 8)
    model = script.DiT(8, 2, 2, 128, 6, 4, 16)
    y, t = torch.arange(16), torch.full((16,), 500)
    optimizer, noise = torch.optim.AdamW(model.parameters(), 2e-3), torch.randn_like(x0)
    for _ in range(80):
        optimizer.zero_grad()
        simple, bound = diffusion.loss(model, x0, y, t, noise)
        (simple + bound).backward()
        optimizer.step()
    assert simple < 0.05


# ---- Diffusion -----------------------------------------------------------------------------------


def test_the_chain_has_t_from_1_to_T_and_nothing_lost_at_0():
    diffusion = script.Diffusion(1000)
    assert diffusion.alpha_bars[0] == 1 and len(diffusion.alpha_bars) == 1001
    bar = 1.0
    for t in range(1, 1001):
        bar *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
    assert diffusion.alpha_bars[-1].item() == pytest.approx(bar)


@pytest.mark.parametrize("T", [25, 50, 100, 1000, 4000])
def test_nothing_is_left_of_the_image_at_the_end_of_a_chain_of_any_length(T):
    alpha_bars = script.Diffusion(T).alpha_bars.flatten()
    assert len(alpha_bars) == T + 1 and alpha_bars[0] == 1 and 0 < alpha_bars[-1] < 1e-4
    if T == 1000:  # the paper's 0.0001 to 0.02
        torch.testing.assert_close(1 - alpha_bars[1].item(), 1e-4)
        torch.testing.assert_close(1 - (alpha_bars[-1] / alpha_bars[-2]).item(), 0.02)


def fixed(eps, mix):
    """A model that answers the same whatever it is asked."""
    return lambda x, t, y: (eps, mix)


def test_the_model_is_asked_about_x_t_itself():
    diffusion, asked = script.Diffusion(100), []
    x0, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    t, y = torch.tensor([1, 50, 100]), torch.tensor([4, 2, -1])

    def model(*values):
        asked.append(values)
        return x0, x0

    diffusion.loss(model, x0, y, t, noise)
    (x_t, times, classes), = asked
    torch.testing.assert_close(x_t, noisy(diffusion, x0, t, noise))
    assert times.equal(t) and classes.equal(y)


def test_the_step_back_is_bayes_rule():
    diffusion = script.Diffusion(100)
    x0, noise = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    t, s = torch.tensor([2, 50, 100]), torch.tensor([1, 49, 70])
    x_t = noisy(diffusion, x0, t, noise)
    exact, variances = diffusion.q_posterior(x0, x_t, t, s)
    for mix, sign in ((-1.0, "tilde"), (1.0, "beta")):
        mean, variance, found = diffusion.p_mean_variance(noise, torch.full_like(x0, mix), x_t, t, s)
        torch.testing.assert_close(found, x0)
        torch.testing.assert_close(mean, exact)
        for i in range(3):  # precision and mean of N(x_s | x_0) N(x_t | x_s), multiplied
            bar_t, bar_s = (diffusion.alpha_bars[k[i]].item() for k in (t, s))
            alpha = bar_t / bar_s
            precision = 1 / (1 - bar_s) + alpha / (1 - alpha)
            middle = bar_s**0.5 * x0[i] / (1 - bar_s) + alpha**0.5 * x_t[i] / (1 - alpha)
            torch.testing.assert_close(mean[i], middle / precision)
            expected = 1 / precision if sign == "tilde" else 1 - alpha
            torch.testing.assert_close(variance[i], torch.full_like(x0[i], expected))
            assert variances[i].item() == pytest.approx(1 / precision)


def test_the_last_step_returns_the_estimate_itself():
    diffusion = script.Diffusion(100)
    x0, x_t = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    for t in (1, 20, 100):
        mean, variance = diffusion.q_posterior(x0, x_t, torch.full([3], t), torch.zeros(3).long())
        torch.testing.assert_close(mean, x0)
        assert variance.abs().max() == 0


def test_the_learned_variance_stays_between_its_bounds():
    diffusion, x = script.Diffusion(100), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 60])

    def log_variance(mix):
        return diffusion.p_mean_variance(x, mix, x, t, t - 1)[1].log()

    low, high = (log_variance(torch.full_like(x, v)) for v in (-1.0, 1.0))
    for v in torch.rand(20, 2, 1, 4, 4, dtype=torch.float64) * 2 - 1:
        logvar = log_variance(v)
        assert (low <= logvar).all() and (logvar <= high).all()
    middle = log_variance(torch.zeros_like(x))
    torch.testing.assert_close(middle, (low + high) / 2)
    assert low.isfinite().all()  # also at t = 1, where β̃ is 0; IDDPM takes β̃_2 there
    beta_1, beta_2 = (1 - (diffusion.alpha_bars[k] / diffusion.alpha_bars[k - 1]).item() for k in (1, 2))
    tilde_2 = beta_2 * beta_1 / (1 - diffusion.alpha_bars[2].item())
    torch.testing.assert_close(low[0].exp(), torch.full_like(low[0], tilde_2))
    torch.testing.assert_close(high[0].exp(), torch.full_like(low[0], beta_1))


def test_the_bound_is_the_kl_of_torch_distributions():
    diffusion = script.Diffusion(100)
    x0, noise, eps = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    y, t = torch.zeros(3, dtype=torch.long), torch.tensor([2, 40, 100])
    x_t = noisy(diffusion, x0, t, noise)
    for v in (torch.full_like(x0, -1), torch.rand_like(x0)):
        simple, bound = diffusion.loss(fixed(eps, v), x0, y, t, noise)
        torch.testing.assert_close(simple, (eps - noise).square().mean())
        mean, variance, _ = diffusion.p_mean_variance(eps, v, x_t, t, t - 1)
        truth, low = diffusion.q_posterior(x0, x_t, t, t - 1)
        kl = kl_divergence(Normal(truth, low.sqrt()), Normal(mean, variance.sqrt()))
        torch.testing.assert_close(bound, kl.mean())
    first = torch.ones(3, dtype=torch.long)
    _, bound = diffusion.loss(fixed(eps, v), x0, y, first, noise)
    x_1 = noisy(diffusion, x0, first, noise)
    mean, variance, _ = diffusion.p_mean_variance(eps, v, x_1, first, first - 1)
    nats = -Normal(mean, variance.sqrt()).log_prob(x0)
    torch.testing.assert_close(bound, nats.mean())
    both = torch.tensor([1, 40])  # each image has the term of its own t
    each = [diffusion.loss(fixed(eps[i:i + 1], v[i:i + 1]), x0[i:i + 1], y[:1], both[i:i + 1],
                           noise[i:i + 1])[1] for i in range(2)]
    _, bound = diffusion.loss(fixed(eps[:2], v[:2]), x0[:2], y[:2], both, noise[:2])
    torch.testing.assert_close(bound, sum(each) / 2)


def test_the_bound_in_single_precision_is_near_that_in_double():
    diffusion, t = script.Diffusion(), torch.tensor([1, 2, 10, 500, 1000])
    x0, noise, mix = torch.randn(3, 5, 2, 8, 8, dtype=torch.float64).unbind()
    eps = noise + 0.1 * torch.randn_like(noise)
    double = diffusion.loss(fixed(eps, mix), x0, t, t, noise)
    single = diffusion.loss(fixed(eps.float(), mix.float()), x0.float(), t, t, noise.float())
    for a, b in zip(double, single):
        assert b.dtype == torch.float32 and b.item() == pytest.approx(a.item(), rel=1e-3)


def test_the_bound_teaches_the_variance_and_not_the_mean():
    diffusion, x0 = script.Diffusion(100), torch.randn(3, 2, 4, 4)
    eps, v = (torch.randn_like(x0).requires_grad_() for _ in range(2))
    t = torch.tensor([1, 40, 100])
    for i in range(3):
        one = slice(i, i + 1)
        simple, bound = diffusion.loss(fixed(eps[one], v[one]), x0[one], t[one], t[one],
                                       torch.randn_like(x0[one]))
        gradients = torch.autograd.grad(bound, (eps, v), allow_unused=True, retain_graph=True)
        assert gradients[0] is None or gradients[0].abs().max() == 0
        assert gradients[1].abs().amax((1, 2, 3))[i] > 0
        gradients = torch.autograd.grad(simple, (eps, v), allow_unused=True)
        assert gradients[0].abs().max() > 0
        assert gradients[1] is None or gradients[1].abs().max() == 0


def test_guidance_is_a_line_through_both_answers_and_leaves_the_variance():
    model, (x, t, y) = network(), batch()
    with torch.no_grad():
        eps, v = model(x, t, y)
        null = model(x, t, torch.full_like(y, -1))[0]
        assert (eps - null).abs().amax((0, 2, 3)).min() > 1e-3  # in every channel
        for s in (0, 1, 2, 4.5):
            got, variance = script.guided(model, x, t, y, s)
            torch.testing.assert_close(got, null + s * (eps - null))
            torch.testing.assert_close(variance, v)
        torch.testing.assert_close(script.guided(model, x, t, y, 1)[0], eps, atol=0, rtol=0)
        torch.testing.assert_close(script.guided(model, x, t, y, 0)[0], null, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ddim", [False, True])
def test_samplers_find_a_known_distribution(ddim):
    """Data N(m, c²): the best ε is known, so samples have this mean and this deviation."""
    diffusion, m, c = script.Diffusion(1000), 0.7, 0.5

    def exact(x, t, y):
        bar = bars(diffusion, t)
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * m) / (bar * c**2 + 1 - bar)
        return eps, torch.zeros_like(x)

    torch.manual_seed(0)
    noise = torch.randn(20000, 1, 1, 1, dtype=torch.float64)
    y = torch.zeros(20000, dtype=torch.long)
    x = diffusion.sample(exact, noise, y, 1.0, 100, ddim)
    assert x.mean().item() == pytest.approx(m, abs=0.015)
    assert x.std().item() == pytest.approx(c, abs=0.03)


def test_the_samplers_in_plain_loops():
    """Every step of both samplers, with guidance, from the formulas of the papers."""
    diffusion, model = script.Diffusion(40), network(spread=0.05)
    x_T, _, y = batch()
    bar = diffusion.alpha_bars.flatten().tolist()
    for steps, times in ((4, [40, 30, 20, 10, 0]), (3, [40, 27, 13, 0]), (100, list(range(40, -1, -1)))):
        for ddim in (False, True):
            torch.manual_seed(3)
            got = diffusion.sample(model, x_T, y, 2.5, steps, ddim)
            torch.manual_seed(3)
            x = x_T
            for t, s in zip(times, times[1:]):
                with torch.no_grad():
                    eps, mix = model(x, torch.full([4], t), y)
                    null, _ = model(x, torch.full([4], t), torch.full([4], -1))
                eps = null + 2.5 * (eps - null)
                x0 = (x - (1 - bar[t])**0.5 * eps) / bar[t]**0.5
                if ddim:
                    x = bar[s]**0.5 * x0 + (1 - bar[s])**0.5 * eps
                    continue
                beta = 1 - bar[t] / bar[s]
                mean = (bar[s]**0.5 * beta * x0 + (1 - beta)**0.5 * (1 - bar[s]) * x) / (1 - bar[t])
                if s == 0:
                    x = mean
                    continue
                low, high = math.log(beta * (1 - bar[s]) / (1 - bar[t])), math.log(beta)
                z = torch.randn_like(x)
                x = mean + (low + (mix + 1) / 2 * (high - low)).exp().sqrt() * z
            torch.testing.assert_close(got, x)
            assert not got.requires_grad


# ---- Autoencoder and training --------------------------------------------------------------------


def test_the_autoencoder_has_its_kl_and_latents_of_variance_one(capsys):
    torch.manual_seed(0)
    images = script.draw_characters(300, 0)[0]
    model = script.Autoencoder()
    script.train_autoencoder(model, images)
    assert capsys.readouterr().out.count("autoencoder") >= 1
    z = model.encode(images)
    assert z.shape == (300, 2, 8, 8) and z.std().item() == pytest.approx(1, abs=1e-4)
    x = script.scale(images[:50])
    mu, logvar = model.encoder(x).chunk(2, 1)
    torch.testing.assert_close(z[:50], mu / model.std)
    torch.testing.assert_close(model.decode(z[:50]), ((model.decoder(mu) + 1) / 2).clamp(0, 1))
    prior = Normal(torch.zeros(()), torch.ones(()))
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), prior).sum((1, 2, 3))
    torch.testing.assert_close(model.loss(x)[1], kl.mean())
    errors = torch.stack([model.loss(x)[0] for _ in range(30)]).mean()
    sample = model.decoder(Normal(mu, (logvar / 2).exp()).sample((30,)).flatten(0, 1))
    expected = (sample.view(30, 50, 1, 28, 28) - x).square().sum((2, 3, 4)).mean()
    torch.testing.assert_close(errors, expected, rtol=0.02, atol=0.1)


def test_the_autoencoder_trained_twice_still_has_latents_of_variance_one():
    torch.manual_seed(0)
    images, model = script.draw_characters(100, 0)[0], script.Autoencoder()
    for _ in range(2):
        script.train_autoencoder(model, images, epochs=1)
        assert model.encode(images).std().item() == pytest.approx(1, abs=1e-4)
    assert abs(model.std - 1) > 0.01


class Linear(nn.Module):
    """A model with two parameters, ε̂ = w x_t and mix = u, which keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.w, self.u = (nn.Parameter(torch.tensor(value)) for value in (0.3, 0.1))
        self.asked = []

    def forward(self, x, t, y):
        self.asked.append((x.detach().clone(), t.clone(), y.clone()))
        return self.w * x, self.u.expand_as(x)


def train(model, latents, labels, *flags, diffusion=None):
    """The script's own `train`; returns the history."""
    history = []
    script.train(script.get_args(list(flags)), diffusion or script.Diffusion(), model, latents, labels,
                 history)
    return history


def test_training_asks_about_every_image_time_and_class():
    torch.manual_seed(0)
    model, latents, labels = Linear(), torch.full((4000, 2, 2, 2), 3.0), torch.arange(4000) % 10
    train(model, latents, labels, "--epochs", "2", "--batch-size", "500", "--lr", "1e-9",
          diffusion=script.Diffusion(30))
    assert len(model.asked) == 16
    x_t, t, y = (torch.cat(column) for column in zip(*model.asked))
    counts = t.bincount(minlength=31)
    assert counts[0] == 0 and len(counts) == 31  # no t outside of 1..T
    assert counts[1:].min() > 200 and counts[1:].max() < 335, counts  # 267 on average
    bar = bars(script.Diffusion(30), t).float()
    eps = (x_t - bar.sqrt() * 3) / (1 - bar).sqrt()
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    assert eps.std(0).min() > 0.8  # every number and image its own noise
    null = y == -1  # a tenth of the labels is the null class, at random, the others are right
    assert 700 < null.sum() < 900 and not y[:4000].eq(-1).equal(y[4000:].eq(-1))
    assert y[~null].bincount().min() > 650 and y.max() == 9


def test_training_hands_each_image_its_own_label():
    model, labels = Linear(), torch.arange(64) % 10
    latents = labels.view(-1, 1, 1, 1).float().expand(-1, 2, 2, 2) * 1e5
    train(model, latents, labels, "--epochs", "1", "--batch-size", "16", diffusion=script.Diffusion(25))
    for x_t, t, y in model.asked:
        bar = bars(script.Diffusion(25), t).float()
        found = (x_t / bar.sqrt() / 1e5).mean((1, 2, 3))
        assert (found - y)[y >= 0].abs().max() < 0.5


def test_training_is_adam_on_the_sum_of_both_terms_with_one_cycle():
    torch.manual_seed(1)
    model, latents, labels = Linear(), torch.randn(40, 2, 4, 4), torch.arange(40) % 10
    torch.manual_seed(5)
    history = train(model, latents, labels, "--epochs", "3", "--batch-size", "16", "--lr", "0.05")
    torch.manual_seed(5)
    diffusion, twin = script.Diffusion(), Linear()
    steps, step, rows = 9, 0, []
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    rates = []
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 0.05, steps, cycle_momentum=False)
    momenta = []
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], 0.05)
    other = torch.optim.lr_scheduler.OneCycleLR(adam, 0.05, steps)
    for _ in range(steps):
        rates.append(reference.param_groups[0]["lr"])
        momenta.append(adam.param_groups[0]["betas"][0])
        for optimizer, scheduler in ((reference, schedule), (adam, other)):
            optimizer.step()
            scheduler.step()
    parameters = [twin.w, twin.u]
    m, v = [torch.zeros(2), torch.zeros(2)]
    for _ in range(3):
        for some in torch.randperm(40).split(16):  # 16, 16 and 8 images
            torch.rand(len(some))  # which labels are dropped
            t = torch.randint(1, 1001, (len(some),))
            simple, bound = diffusion.loss(twin, latents[some], labels[some], t,
                                           torch.randn(len(some), 2, 4, 4))
            rows.append((simple.item(), bound.item()))
            gradient = torch.stack(torch.autograd.grad(simple + bound, parameters))
            beta = momenta[step]
            m = beta * m + (1 - beta) * gradient
            v = 0.999 * v + 0.001 * gradient**2
            step += 1
            change = rates[step - 1] * (m / (1 - beta**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            for p, d in zip(parameters, change):
                p.data -= d
    assert model.w.item() == pytest.approx(twin.w.item(), rel=1e-3)
    assert model.u.item() == pytest.approx(twin.u.item(), rel=1e-3)
    assert [row["step"] for row in history] == list(range(1, 10))
    np.testing.assert_allclose([[row["L_simple"], row["L_{t-1}"]] for row in history], rows, rtol=1e-3,
                               atol=1e-5)


def test_reported_losses_are_the_means_since_the_last_report():
    model, latents = Linear(), torch.randn(45, 2, 2, 2)
    labels, diffusion = torch.zeros(45, dtype=torch.long), script.Diffusion()
    torch.manual_seed(0)
    history = train(model, latents, labels, "--epochs", "2", "--batch-size", "1", "--lr", "1e-9")
    torch.manual_seed(0)
    losses = []
    for _ in range(2):
        for i in torch.randperm(45).split(1):
            torch.rand(1)
            t = torch.randint(1, 1001, (1,))
            terms = diffusion.loss(Linear(), latents[i], labels[i], t, torch.randn(1, 2, 2, 2))
            losses.append([term.item() for term in terms])
    assert [row["step"] for row in history] == list(range(5, 91, 5))
    expected = [np.mean(losses[i:i + 5], 0) for i in range(0, 90, 5)]
    np.testing.assert_allclose([[row["L_simple"], row["L_{t-1}"]] for row in history], expected,
                               rtol=1e-4, atol=1e-5)


def test_the_last_step_is_reported_too():
    model, latents = Linear(), torch.randn(21, 2, 2, 2)
    history = train(model, latents, torch.arange(21) % 10, "--epochs", "1", "--batch-size", "1")
    assert [row["step"] for row in history] == [*range(2, 21, 2), 21]


def test_two_phases_of_training_both_train():
    model, latents = Linear(), torch.randn(40, 2, 2, 2)
    values = []
    for _ in range(2):
        train(model, latents, torch.arange(40) % 10, "--epochs", "1", "--batch-size", "8")
        values.append(model.w.item())
    assert len({0.3, *values}) == 3


def test_the_autoencoder_is_adam_on_error_and_half_the_kl(capsys):
    images = script.draw_characters(150, 0)[0]
    torch.manual_seed(2)
    model = script.Autoencoder()
    twin = script.Autoencoder()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(4)
    script.train_autoencoder(model, images)
    torch.manual_seed(4)
    optimizer, lines = torch.optim.Adam(twin.parameters(), 2e-3), []
    for _ in range(2):
        for some in torch.randperm(150).split(64):  # 64, 64 and 22 images
            x = script.scale(images[some])
            mu, logvar = twin.encoder(x).chunk(2, 1)
            decoded = twin.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))
            error = (decoded - x).square().sum() / len(x)
            kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum() / len(x)
            for p, gradient in zip(twin.parameters(), torch.autograd.grad(
                    error + 0.5 * kl, list(twin.parameters()))):
                p.grad = gradient
            optimizer.step()
        lines.append((error.item(), kl.item()))
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    out = capsys.readouterr().out.splitlines()
    for line, (error, kl) in zip(out, lines, strict=True):
        numbers = [float(word) for word in line.replace(",", " ").split() if word[0].isdigit()]
        assert numbers == pytest.approx([error, kl], abs=0.11)


# ---- Main and the picture ------------------------------------------------------------------------


def test_default_settings_are_those_of_the_header():
    args = vars(script.get_args([]))
    expected = dict(epochs=7, batch_size=128, lr=2e-3, train_size=60000, seed=0, patch_size=2,
                    block="adaln-zero", guidance=1.75, steps=50, ddim=False, samples=100,
                    load=None, quick=False)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("flags, word", [("--samples 15", "samples"), ("--samples 0", "samples"),
                                         ("--steps 0", "steps"), ("--patch-size 3", "patch-size"),
                                         ("--block none", "block"), ("--guidance x", "guidance")])
def test_wrong_settings_get_a_sentence(flags, word, capsys):
    with pytest.raises(SystemExit) as end:
        script.get_args(flags.split())
    assert end.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


@each_design
def test_every_block_design_runs_from_the_command_line(design, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(script, "train", lambda *values: seen.update(train=values))
    monkeypatch.setattr(script, "train_autoencoder", lambda model, images: None)
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path), "--block",
                 design, "--patch-size", "4", "--steps", "2", "--samples", "10"])
    args, diffusion, model, latents, labels, history = seen["train"]
    assert diffusion.T == 1000
    expected = script.DiT(8, 4, 2, 128, 6, 4, 10, design).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert model.blocks[0].attn.num_heads == 4 and latents.shape == (512, 2, 8, 8)


@pytest.mark.parametrize("flag", [["--ddim"], []])
def test_main_hands_on_data_and_flags_and_draws_what_it_finds(flag, tmp_path, monkeypatch):
    seen, sampled = {}, []

    def spy(name):
        original = getattr(script, name)

        def call(*values):
            seen[name] = values
            return original(*values)
        monkeypatch.setattr(script, name, call)

    spy("train")
    spy("train_autoencoder")
    sample = script.Diffusion.sample

    def record(self, *values, **more):
        values = (*values, *more.values())
        sampled.append((values, sample(self, *values)))
        return sampled[-1][1]

    monkeypatch.setattr(script.Diffusion, "sample", record)
    judged, loss = [], script.Diffusion.loss

    def record_loss(self, *values):
        judged.append((values, loss(self, *values)))
        return judged[-1][1]

    monkeypatch.setattr(script.Diffusion, "loss", record_loss)
    script.main(["--quick", "--data", "drawn", "--device", "cpu", "--out", str(tmp_path), "--seed", "7",
                 "--guidance", "3", "--steps", "3", "--samples", "30", *flag])
    assert torch.initial_seed() == 7
    out = tmp_path / "05_dit"
    drawn, names = script.draw_characters(512, 0)
    test_images, test_labels = script.draw_characters(2000, 1)
    autoencoder, images = seen["train_autoencoder"]
    args, diffusion, model, latents, labels, history = seen["train"]
    assert images.equal(drawn) and labels.equal(names) and not labels.equal(names + 1)
    torch.testing.assert_close(latents, autoencoder.encode(drawn))
    checkpoint = torch.load(out / "model.pt", weights_only=True)["weights"]
    assert checkpoint["dit.pos_embed"].equal(model.pos_embed)
    assert checkpoint["autoencoder.std"].equal(autoencoder.std) and autoencoder.std != 1

    (net, x_T, y, guidance, steps, ddim), z = sampled[0]
    assert net is model and y.tolist() == list(range(10)) * 3
    assert (guidance, steps, ddim) == (3.0, 3, bool(flag)) and x_T.shape == (30, 2, 8, 8)
    assert abs(x_T.mean()) < 0.1 and abs(x_T.std() - 1) < 0.1
    arrays = np.load(out / "samples.npz")
    pixels = 255 * ((autoencoder.decoder(z * autoencoder.std) + 1) / 2).clamp(0, 1).detach()
    assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (30, 28, 28)
    assert np.abs(arrays["images"] - pixels[:, 0].numpy()).max() < 0.51
    assert arrays["labels"].tolist() == y.tolist()

    results = json.loads((out / "metrics.json").read_text())["results"]
    (net, x0, y, t, noise), terms = judged[-1]
    assert net is model and x0.equal(autoencoder.encode(test_images[:1000]))
    assert y.equal(test_labels[:1000]) and t.tolist() == list(range(1, 1001))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and noise.shape == x0.shape
    assert list(results.values()) == [term.item() for term in terms]
    assert list(results)[0].startswith("test L_simple") and list(results)[1].startswith("test L_{t-1}")

    loss, latent, guided, samples = plt.gcf().axes[:4]
    assert list(loss.lines[0].get_xdata()) == [row["step"] for row in history]
    assert list(loss.lines[0].get_ydata()) == [row["L_simple"] for row in history]

    def tile(axes, row, column):
        picture = np.asarray(axes.images[0].get_array())[:, :, 0]
        return picture[30 * row + 1:30 * row + 29, 30 * column + 1:30 * column + 29]

    z = autoencoder.encode(test_images[:10])
    for i in (0, 3, 9):
        np.testing.assert_allclose(tile(latent, 0, i), test_images[i] / 255, atol=1e-6)
        for channel in range(2):  # from -3 to 3
            for r, c in ((0, 0), (3, 5), (7, 7)):
                value = (z[i, channel, r, c] / 6 + 0.5).clamp(0, 1).item()
                cell = tile(latent, 1 + channel, i)[int((r + 0.5) * 3.5), int((c + 0.5) * 3.5)]
                assert cell == pytest.approx(value, abs=1e-5)
        np.testing.assert_allclose(tile(latent, 3, i), autoencoder.decode(z)[i, 0], atol=1e-5)
    rows = sampled[1:]
    assert [values[3] for values, _ in rows] == [0, 1, 2, 4, 8] and {v[4] for v, _ in rows} == {3}
    for row, (values, result) in enumerate(rows):
        assert values[1].equal(rows[0][0][1]) and values[2].tolist() == list(range(10))
        assert values[5] is True  # DDIM: the same noise gives comparable digits
        for i in (0, 4):
            np.testing.assert_allclose(tile(guided, row, i), autoencoder.decode(result)[i, 0], atol=1e-5)
    for i in (0, 13, 29):
        np.testing.assert_allclose(tile(samples, i // 10, i % 10), pixels[i, 0] / 255, atol=1e-5)


def test_the_picture_of_samples_has_a_hundred_and_tells_the_guidance(tmp_path):
    args = script.get_args(["--guidance", "3.5"])
    args.out = str(tmp_path)
    images, _ = script.draw_characters(10, 0)
    samples, latents = torch.rand(120, 1, 28, 28), [torch.randn(10, 2, 8, 8)] * 5
    script.plot_results(args, [], script.Autoencoder(), images, latents, samples)
    axes = plt.gcf().axes[3]
    assert np.asarray(axes.images[0].get_array()).shape[:2] == (300, 300)
    assert "3.5" in axes.get_title() and (tmp_path / "results.png").exists()


def test_an_interrupt_before_the_latents_are_ready_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_autoencoder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--quick", "--data", "drawn", "--out", str(tmp_path)])
    assert not list((tmp_path / "05_dit").iterdir())


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_loaded_model_keeps_its_autoencoder(tmp_path, monkeypatch):
    flags = ["--quick", "--data", "drawn", "--device", "cpu", "--samples", "10", "--steps", "2",
             "--train-size", "64"]
    script.main([*flags, "--out", str(tmp_path / "one")])
    before = torch.load(tmp_path / "one/05_dit/model.pt", weights_only=True)["weights"]
    monkeypatch.setattr(script, "train_autoencoder", pytest.fail)
    script.main([*flags, "--out", str(tmp_path / "two"), "--load", str(tmp_path / "one/05_dit/model.pt")])
    after = torch.load(tmp_path / "two/05_dit/model.pt", weights_only=True)["weights"]
    for name in before:  # the DiT is trained on, the autoencoder is not
        fixed = name.startswith("autoencoder") or name == "dit.pos_embed"
        assert before[name].equal(after[name]) == fixed, name
