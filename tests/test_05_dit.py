"""The mathematics of 05_dit.py: the block's start, positions, guidance, learned variance, processes."""

import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "05_dit.py")
each_design = pytest.mark.parametrize("design", script.DESIGNS)


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


# ---- The transformer -----------------------------------------------------------------------------


def test_adaln_zero_starts_as_the_identity_and_with_output_zero():
    model, (x, t, y) = network(spread=0), batch()
    tokens = torch.randn(4, 16, 32, dtype=torch.float64)
    c = torch.randn(4, 1, 32, dtype=torch.float64)
    for block in model.blocks:
        assert block(tokens, c, None).equal(tokens)
    assert model(x, t, y).shape == (4, 6, 8, 8) and model(x, t, y).abs().max() == 0
    moved = network(spread=0.1)
    assert (moved.blocks[0](tokens, c, None) - tokens).abs().max() > 0.01


def test_a_block_is_the_papers_formula():
    block, torch_c = network().blocks[0], torch.randn(4, 1, 32, dtype=torch.float64)
    x = torch.randn(4, 16, 32, dtype=torch.float64)
    six = (F.silu(torch_c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias)
    b1, g1, a1, b2, g2, a2 = six.view(4, 6, 1, 32).unbind(1)  # shift, scale, gate; twice

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(v):
        q, k, w = (v @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        heads = []
        for h in range(4):
            part = slice(8 * h, 8 * h + 8)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
            heads.append(weights @ w[..., part])
        return block.attn.proj(torch.cat(heads, -1))

    h = x + a1 * attention(norm(x) * (1 + g1) + b1)
    hidden = block.mlp.fc1(norm(h) * (1 + g2) + b2)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x, torch_c, None), h + a2 * block.mlp.fc2(gelu))


def test_cross_attention_is_torchs_own():
    torch.manual_seed(0)
    layer = script.Attention(16, 4, cross=True).double()
    x, tokens = (torch.randn(3, n, 16, dtype=torch.float64) for n in (7, 2))
    torchs = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    torchs.in_proj_weight.data = torch.cat([layer.q.weight, layer.kv.weight])
    torchs.in_proj_bias.data = torch.cat([layer.q.bias, layer.kv.bias])
    torchs.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x, tokens), torchs(x, tokens, tokens)[0])


@each_design
def test_every_design_sees_t_and_the_class_and_keeps_images_apart(design):
    model, (x, t, y) = network(design), batch()
    out = model(x, t, y)
    assert out.shape == (4, 6, 8, 8)
    for other in ((x, t + 1, y), (x, t, (y + 1) % 5), (x + 0.1, t, y)):
        assert (model(*other) - out).abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(torch.cat([model(x[i:i + 1], t[i:i + 1], y[i:i + 1])
                                          for i in range(4)]), out)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _, a, b: seen.append(b.shape[1]))
    model(x, t, y)
    assert seen == [18 if design == "in-context" else 16]


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


def test_time_is_cosines_then_sines():
    embedder = script.TimestepEmbedder(8)
    got = []
    embedder.mlp = torch.nn.Module()
    embedder.mlp.forward = lambda v: got.append(v) or v
    embedder(torch.tensor([0, 3, 900]))
    for row, t in zip(got[0], (0, 3, 900)):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert row[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_labels_are_dropped_one_by_one_and_the_null_class_is_the_last_row():
    embedder = script.LabelEmbedder(5, 8, 0.1)
    y, drop = torch.tensor([0, 1, 2, 4]), torch.tensor([False, True, False, True])
    table = embedder.embedding_table.weight
    assert table.shape == (6, 8)
    assert embedder(y, drop).equal(table[[0, 5, 2, 5]]) and embedder(y).equal(table[y])
    assert script.LabelEmbedder(5, 8, 0.0).embedding_table.weight.shape == (5, 8)


def test_parameters_are_those_of_a_published_dit_xl_2():
    with torch.device("meta"):
        model = script.named("XL", 2, input_size=32, num_classes=1000)
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
    assert sum(p.numel() for p in model.parameters() ) == 675_129_632


def test_16_latents_can_be_learned_by_heart():
    torch.manual_seed(0)
    diffusion, x0 = script.Diffusion(1000), torch.randn(16, 2, 8, 8)
    model = script.named("mini", 2, input_size=8, in_channels=2, num_classes=16)
    y, t = torch.arange(16), torch.full((16,), 500)
    optimizer, noise = torch.optim.AdamW(model.parameters(), 2e-3), torch.randn_like(x0)
    for _ in range(80):
        optimizer.zero_grad()
        simple, bound = diffusion.loss(model, x0, y, t, noise)
        (simple.mean() + bound.mean()).backward()
        optimizer.step()
    assert simple.mean() < 0.05


# ---- Diffusion -----------------------------------------------------------------------------------


def test_the_chain_has_t_from_1_to_T_and_nothing_lost_at_0():
    diffusion = script.Diffusion(1000)
    assert diffusion.alpha_bars[0] == 1 and len(diffusion.alpha_bars) == 1001
    bar = 1.0
    for t in range(1, 1001):
        bar *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
    assert diffusion.alpha_bars[-1].item() == pytest.approx(bar)


def fixed(eps, v):
    """A model that answers the same whatever it is asked."""
    return lambda x, t, y, drop=None: torch.cat([eps, v], 1)


def test_the_step_back_is_bayes_rule():
    diffusion = script.Diffusion(100, "eps")
    x0, noise = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    t, s = torch.tensor([2, 50, 100]), torch.tensor([1, 49, 70])
    x_t = diffusion.q_sample(x0, t, noise)
    for v, sign in ((-1.0, "tilde"), (1.0, "beta")):
        mean, logvar, found = diffusion.step(x_t, t, s, noise, torch.full_like(x0, v))
        torch.testing.assert_close(found, x0)
        for i in range(3):  # precision and mean of N(x_s | x_0) N(x_t | x_s), multiplied
            bar_t, bar_s = (diffusion.alpha_bars[k[i]].item() for k in (t, s))
            alpha = bar_t / bar_s
            precision = 1 / (1 - bar_s) + alpha / (1 - alpha)
            middle = bar_s**0.5 * x0[i] / (1 - bar_s) + alpha**0.5 * x_t[i] / (1 - alpha)
            torch.testing.assert_close(mean[i], middle / precision)
            variance = 1 / precision if sign == "tilde" else 1 - alpha
            torch.testing.assert_close(logvar[i].exp(), torch.full_like(x0[i], variance))


def test_the_learned_variance_stays_between_its_bounds():
    diffusion, x = script.Diffusion(100, "eps"), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 60])
    low, high = (diffusion.step(x, t, t - 1, x, torch.full_like(x, v))[1] for v in (-1.0, 1.0))
    for v in torch.rand(20, 2, 1, 4, 4, dtype=torch.float64) * 2 - 1:
        logvar = diffusion.step(x, t, t - 1, x, v)[1]
        assert (low <= logvar).all() and (logvar <= high).all()
    middle = diffusion.step(x, t, t - 1, x, torch.zeros_like(x))[1]
    torch.testing.assert_close(middle, (low + high) / 2)
    assert low.isfinite().all()  # also at t = 1, where β̃ is 0


def test_the_bound_is_the_kl_of_torch_distributions():
    diffusion = script.Diffusion(100, "eps")
    x0, noise, eps = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    y, t = torch.zeros(3, dtype=torch.long), torch.tensor([2, 40, 100])
    x_t = diffusion.q_sample(x0, t, noise)
    for v in (torch.full_like(x0, -1), torch.rand_like(x0)):
        simple, bound = diffusion.loss(fixed(eps, v), x0, y, t, noise)
        torch.testing.assert_close(simple, (eps - noise).square().mean((1, 2, 3)))
        mean, logvar, _ = diffusion.step(x_t, t, t - 1, eps, v)
        truth, low, _ = diffusion.step(x_t, t, t - 1, noise, torch.full_like(v, -1))
        kl = kl_divergence(Normal(truth, (low / 2).exp()), Normal(mean, (logvar / 2).exp()))
        torch.testing.assert_close(bound, kl.mean((1, 2, 3)))
    first = torch.ones(3, dtype=torch.long)
    _, bound = diffusion.loss(fixed(eps, v), x0, y, first, noise)
    x_1 = diffusion.q_sample(x0, first, noise)
    mean, logvar, _ = diffusion.step(x_1, first, first - 1, eps, v)
    nats = -Normal(mean, (logvar / 2).exp()).log_prob(x0)
    torch.testing.assert_close(bound, nats.mean((1, 2, 3)))


def test_v_is_noise_in_other_words():
    """v = √ᾱ ε - √(1-ᾱ) x_0 (arXiv:2202.00512 App. D): the same chain, the same loss of ε."""
    diffusion, plain = script.Diffusion(100), script.Diffusion(100, "eps")
    x0, noise, share = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1, 40, 100])
    bar = diffusion.alpha_bars[t].view(-1, 1, 1, 1)
    x_t = diffusion.q_sample(x0, t, noise)
    v = bar.sqrt() * noise - (1 - bar).sqrt() * x0
    torch.testing.assert_close(diffusion.to_eps(v, x_t, t), noise)
    off = v + 0.3
    simple, bound = diffusion.loss(fixed(off, share), x0, t, t, noise)
    torch.testing.assert_close(simple / bar.flatten(), torch.full_like(simple, 0.09))  # error of v
    eps = diffusion.to_eps(off, x_t, t)
    expected = plain.loss(fixed(eps, share), x0, t, t, noise)
    torch.testing.assert_close((simple, bound), expected)


def test_the_bound_teaches_the_variance_and_not_the_mean():
    diffusion, x0 = script.Diffusion(100, "eps"), torch.randn(3, 2, 4, 4)
    eps, v = (torch.randn_like(x0).requires_grad_() for _ in range(2))
    t = torch.tensor([1, 40, 100])
    simple, bound = diffusion.loss(fixed(eps, v), x0, t, t, torch.randn_like(x0))
    gradients = torch.autograd.grad(bound.sum(), (eps, v), allow_unused=True)
    assert gradients[0] is None or gradients[0].abs().max() == 0
    assert gradients[1].abs().amax((1, 2, 3)).min() > 0
    gradients = torch.autograd.grad(simple.sum(), (eps, v), allow_unused=True)
    assert gradients[0].abs().max() > 0 and gradients[1].abs().max() == 0


def test_guidance_is_a_line_through_both_answers_and_leaves_the_variance():
    model, (x, t, y) = network(), batch()
    none = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        eps, v = model(x, t, y).chunk(2, 1)
        null = model(x, t, y, none).chunk(2, 1)[0]
        assert (eps - null).abs().amax((0, 2, 3)).min() > 1e-3  # in every channel
        for s in (0, 1, 2, 4.5):
            got, variance = script.guided(model, x, t, y, s)
            torch.testing.assert_close(got, null + s * (eps - null))
            torch.testing.assert_close(variance, v)
        torch.testing.assert_close(script.guided(model, x, t, y, 1)[0], eps, atol=0, rtol=0)
        torch.testing.assert_close(script.guided(model, x, t, y, 0)[0], null, atol=1e-12, rtol=0)
    bare = network(class_dropout_prob=0.0)
    assert script.guided(bare, x, t, y, 1)[0].shape == x.shape
    with pytest.raises(IndexError):  # there is no null class
        script.guided(bare, x, t, y, 2)


def test_models_that_count_from_0_are_told_t_minus_1():
    asked = []

    def model(x, t, y, drop=None):
        asked.append(t.tolist())
        return torch.cat([x, x], 1)

    x, t = torch.randn(2, 1, 4, 4), torch.tensor([1, 9])
    for first in (1, 0):
        diffusion = script.Diffusion(10, "eps", first)
        diffusion.loss(model, x, t, t, x)
        diffusion.sample(model, x, t, 1, 2)
    assert asked == [[1, 9], [10, 10], [5, 5], [0, 8], [9, 9], [4, 4]]


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_samplers_find_a_known_distribution(sampler, eta):
    """Data N(m, c²): the best ε is known, so samples have this mean and this deviation."""
    diffusion, m, c = script.Diffusion(1000, "eps"), 0.7, 0.5

    class Exact(torch.nn.Module):
        y_embedder = script.LabelEmbedder(2, 1, 0.0)

        def forward(self, x, t, y, drop=None):
            bar = diffusion.alpha_bars[t].view(-1, 1, 1, 1)
            eps = (1 - bar).sqrt() * (x - bar.sqrt() * m) / (bar * c**2 + 1 - bar)
            return torch.cat([eps, torch.zeros_like(x)], 1)

    torch.manual_seed(0)
    noise = torch.randn(20000, 1, 1, 1, dtype=torch.float64)
    y = torch.zeros(20000, dtype=torch.long)
    x = diffusion.sample(Exact(), noise, y, 1.0, 100, sampler, eta)
    assert x.mean().item() == pytest.approx(m, abs=0.015)
    assert x.std().item() == pytest.approx(c, abs=0.03)


# ---- Autoencoder and processes -------------------------------------------------------------------


def test_the_autoencoder_has_its_kl_and_a_scale_of_one(tmp_path):
    torch.manual_seed(0)
    drawn = script.draw_characters(300, 0)[0][:, None] / 127.5 - 1
    config = script.Config(out=str(tmp_path), device="cpu", ae_epochs=2, batch_size=20)
    run, model = script.Run(config), script.Autoencoder(2)
    script.train_autoencoder(run, model, drawn)
    z = model.encode(drawn)
    assert z.shape == (300, 2, 8, 8) and z.std().item() == pytest.approx(1, abs=1e-4)
    x = drawn[:50]
    mu, logvar = model.encoder(x).chunk(2, 1)
    torch.testing.assert_close(z[:50], mu * model.scale)
    torch.testing.assert_close(model.decode(z[:50]), model.decoder(mu))
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(model.loss(x)[1], kl.sum((1, 2, 3)))
    errors = torch.stack([model.loss(x)[0] for _ in range(30)]).mean(0)
    sample = model.decoder(Normal(mu, (logvar / 2).exp()).sample((30,)).flatten(0, 1))
    expected = (sample.view(30, 50, 1, 28, 28) - x).square().sum((2, 3, 4)).mean(0)
    torch.testing.assert_close(errors, expected, rtol=0.05, atol=1.0)


def test_diffusion_runs_in_pixels_too(tmp_path):
    assert script.main(["--quick", "--data", "drawn", "--train-size", "64", "--space", "pixel",
                        "--patch-size", "4", "--out", str(tmp_path), "--steps", "2"]) == 0
    assert (tmp_path / "05_dit" / "samples.png").exists()
    x = torch.rand(2, 1, 28, 28)
    assert script.Pixels().decode(script.Pixels().encode(x)) is x


def test_t_is_drawn_from_1_to_T():
    torch.manual_seed(0)
    t = script.draw_t(100000, 10)
    assert t.unique().tolist() == list(range(1, 11))
    share = torch.distributions.Beta(1.5, 2.3).sample((200000,)).mul(10).long().bincount() / 200000
    torch.testing.assert_close(t.bincount()[1:] / 100000, share, atol=0.01, rtol=0)


def test_four_designs_are_compared_and_no_null_class_is_said(tmp_path, capsys):
    flags = ["--quick", "--data", "drawn", "--train-size", "64", "--out", str(tmp_path)]
    assert script.main([*flags, "--drop", "0"]) == 2
    assert "--scale 1" in capsys.readouterr().err
    assert script.main([*flags, "--drop", "0", "--scale", "1", "--compare"]) == 0
    metrics = json.loads((tmp_path / "05_dit" / "metrics.json").read_text())
    designs = metrics["results"]["designs"]
    assert list(designs) == list(script.DESIGNS)
    for name, model in ((k, network(k, hidden_size=128, depth=6, in_channels=2, num_classes=10,
                                    class_dropout_prob=0.0)) for k in designs):
        assert designs[name]["parameters"] == sum(p.numel() for p in model.parameters())
    # by hand, for 16 tokens of width 128: patches, 6 blocks, embeddings of t, last layer
    tokens, D = 16, 128
    block = tokens * 12 * D * D + 2 * tokens * tokens * D
    rest = tokens * 8 * D + (256 + D) * D + tokens * D * 16 + 2 * D * D
    assert designs["adaln-zero"]["multiply_adds"] == 6 * (block + 6 * D * D) + rest
    assert designs["adaln"]["multiply_adds"] == 6 * (block + 4 * D * D) + rest


PROCESS = """
import importlib.util, os, sys, torch, torch.distributed as dist
spec = importlib.util.spec_from_file_location("m", sys.argv[1]); m = importlib.util.module_from_spec(spec)
sys.modules["m"] = m; spec.loader.exec_module(m)
run = m.Run(m.Config(out=sys.argv[2], device="cpu", epochs=1, batch_size=8, T=50, lr=1e-3, steps=2))
rank, world = m.parallel(run)
torch.manual_seed(0)
model = m.DiT(8, 2, 2, 32, 2, 4, num_classes=10)
for p in model.parameters():
    p.data += 0.05 * torch.randn_like(p) * p.requires_grad
latents, labels = torch.randn(16, 2, 8, 8), torch.arange(16) % 10
kept, step = [], torch.optim.AdamW.step
def record(self, *args):
    kept.append([p.grad.clone() for p in self.param_groups[0]["params"] if p.requires_grad])
    return step(self, *args)
torch.optim.AdamW.step = record
m.nn.utils.clip_grad_norm_ = lambda *_: None
models = m.nn.ModuleDict({"adaln-zero": model})
m.train(run, m.Diffusion(50), models, latents, labels, latents[:2], labels[:2], rank, world)
torch.save(kept, f"{sys.argv[2]}/{world}_{rank}.pt")
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(**more):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return subprocess.Popen([sys.executable, "-c", PROCESS, str(ROOT / "05_dit.py"), str(tmp_path)],
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    both = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    jobs = [start(), *(start(RANK=str(i), LOCAL_RANK=str(i), **both) for i in range(2))]
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], said
    assert "images/s" in said[1][0] and said[2][0] == ""  # only the first process speaks
    alone, first, second = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert len(alone) == 2
    for one, two, three in zip(alone, first, second):
        for a, b, c in zip(one, two, three):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
            assert b.equal(c)


@pytest.mark.parametrize("T", [25, 50, 100, 1000, 4000])
def test_nothing_is_left_of_the_image_at_the_end_of_a_chain_of_any_length(T):
    alpha_bars = script.Diffusion(T).alpha_bars
    assert len(alpha_bars) == T + 1 and alpha_bars[0] == 1 and 0 < alpha_bars[-1] < 1e-4
    if T == 1000:  # the paper's 0.0001 to 0.02
        torch.testing.assert_close(1 - alpha_bars[1].item(), 1e-4)
        torch.testing.assert_close(1 - (alpha_bars[-1] / alpha_bars[-2]).item(), 0.02)
