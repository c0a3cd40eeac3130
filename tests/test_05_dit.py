"""05_dit.py: the Diffusion Transformer, guidance, the learned variance, latent diffusion.

Equations: DiT arXiv:2212.09748, DDPM arXiv:2006.11239, IDDPM arXiv:2102.09672."""

import json
import math
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from conftest import ROOT, load_script

dit = load_script(ROOT / "05_dit.py")
each_name = pytest.mark.parametrize("name", dit.BLOCKS)
BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
BAR = torch.cat([torch.ones(1).double(), (1 - BETA).cumprod(0)])  # ᾱ_0 to ᾱ_1000


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def network(name="adaln-zero", spread=0.1):
    """A small DiT; `spread` moves its weights away from the start."""
    model = dit.DiT(8, 2, 3, 32, 2, 4, 5, dit.BLOCKS[name])
    for p in model.parameters():
        p.data += spread * torch.randn_like(p) * p.requires_grad
    return model


def batch(count=4):
    return torch.randn(count, 3, 8, 8), torch.arange(1, count + 1) * 7, torch.arange(count) % 5


# ---- The blocks (DiT section 3.2) ----------------------------------------------------


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def attention_by_torch(attn, x):
    torchs = nn.MultiheadAttention(32, 4, batch_first=True)
    torchs.load_state_dict({"in_proj_weight": attn.qkv.weight, "in_proj_bias": attn.qkv.bias,
                            "out_proj.weight": attn.proj.weight, "out_proj.bias": attn.proj.bias})
    return torchs(x, x, x)[0]


def mlp_by_hand(mlp, x):
    h = mlp.fc1(x)
    return mlp.fc2(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


def block_by_hand(name, block, x, t, y):
    """Shift, scale and gate, for the attention and for the MLP; or what stands for them."""
    if name in ("adaln-zero", "adaln"):
        six = block.adaLN_modulation[1](F.silu(t + y)).chunk(6, -1)
    else:
        six = 0, 0, 1, 0, 0, 1
    shift1, scale1, gate1, shift2, scale2, gate2 = six
    if name == "adaln":
        gate1 = gate2 = 1
    if name == "in-context":
        x = torch.cat([x, t, y], 1)
    x = x + gate1 * attention_by_torch(block.attn, norm(x) * (1 + scale1) + shift1)
    if name == "cross":
        layer, c = block.cross_attn, torch.cat([t, y], 1)
        x = x + layer(norm(x), c, c)[0]
    x = x + gate2 * mlp_by_hand(block.mlp, norm(x) * (1 + scale2) + shift2)
    return x[:, :16]


@each_name
def test_a_block_is_the_formula_of_the_paper(name):
    block, fresh = network(name).blocks[0], network(name, spread=0)
    x, t, y = torch.randn(4, 16, 32), torch.randn(4, 1, 32), torch.randn(4, 1, 32)
    torch.testing.assert_close(block(x, t, y), block_by_hand(name, block, x, t, y))
    # Only adaLN-Zero starts as the identity; but the output starts at 0 in all designs.
    assert fresh.blocks[0](x, t, y).equal(x) == (name == "adaln-zero")
    assert all(out.abs().max() == 0 for out in fresh(*batch()))


# ---- The network ---------------------------------------------------------------------


@each_name
def test_the_whole_network_by_hand(name):
    model, (x, t, y) = network(name), batch()
    proj = model.x_embedder.proj
    h = F.unfold(x, 2, stride=2).transpose(1, 2) @ proj.weight.flatten(1).T + proj.bias
    h = h + dit.sincos_positions(4, 32)
    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    t_emb = model.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1))[:, None]
    y_emb = model.y_embedder.embedding_table.weight[y][:, None]
    for layer in model.blocks:
        h = layer(h, t_emb, y_emb)
    shift, scale = model.final_layer.adaLN_modulation[1](F.silu(t_emb + y_emb)).chunk(2, -1)
    out = model.final_layer.linear(norm(h) * (1 + scale) + shift)  # (B, 16, 2 2 6)
    eps, v = model(x, t, y)
    assert eps.shape == v.shape == x.shape
    both = torch.cat([eps, v], 1)
    for row in range(4):
        for column in range(4):
            patch = both[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
            expected = out[:, 4 * row + column].view(4, 2, 2, 6).permute(0, 3, 1, 2)
            torch.testing.assert_close(patch, expected)


def test_positions_are_sines_and_cosines_of_the_column_and_of_the_row():
    table = dit.sincos_positions(6, 16).view(6, 6, 2, 2, 4)  # row, column, axis, sin or cos
    frequencies = 10000 ** (-torch.arange(4) / 4)
    for row in range(6):
        for column in range(6):
            for axis, place in enumerate((column, row)):
                expected = torch.stack([(place * frequencies).sin(), (place * frequencies).cos()])
                torch.testing.assert_close(table[row, column, axis], expected)


def test_parameters_are_those_of_a_published_dit_xl_2():
    with torch.device("meta"):
        model = dit.DiT(32, 2, 4, 1152, 28, 16, 1000)
    D = 1152
    layers = {"x_embedder.proj": (D, 4, 2, 2), "t_embedder.mlp.0": (D, 256),
              "t_embedder.mlp.2": (D, D), "final_layer.linear": (32, D),
              "final_layer.adaLN_modulation.1": (2 * D, D)}
    inside = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D),
              "mlp.fc2": (D, 4 * D), "adaLN_modulation.1": (6 * D, D)}
    layers |= {f"blocks.{i}.{name}": inside[name] for i in range(28) for name in inside}
    shapes = {"pos_embed": (1, 256, D), "y_embedder.embedding_table.weight": (1001, D)}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert model.num_classes == 1000 and model.blocks[0].attn.num_heads == 16


def test_sixteen_latents_can_be_learned_by_heart():
    torch.set_default_dtype(torch.float32)
    diffusion, x0 = dit.Diffusion(), torch.randn(16, 2, 8, 8)
    model, y, t = dit.DiT(num_classes=16), torch.arange(16), torch.full((16,), 500)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        torch.manual_seed(1)  # always the same noise
        simple, bound = diffusion.loss(model, x0, y, t)
        optimizer.zero_grad()
        (simple + bound).backward()
        optimizer.step()
    assert simple < 0.05


# ---- The chain -----------------------------------------------------------------------


def test_tables_go_from_an_image_at_0_to_pure_noise_at_T():
    diffusion = dit.Diffusion()
    signal, noise = (table.flatten().double() for table in (diffusion.signal, diffusion.noise))
    torch.testing.assert_close(signal, BAR.sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(noise, (1 - BAR).sqrt(), rtol=1e-6, atol=0)
    for T in (21, 100, 4000):  # nothing is left of the image at the end of any chain
        short = dit.Diffusion(T)
        assert len(short.signal) == T + 1 and 0 < short.signal[-1] < 0.01
        assert short.signal[0] == 1 and short.noise[0] == 0
    with pytest.raises(AssertionError, match="below 1"):
        dit.Diffusion(20)


@pytest.mark.parametrize("t, s", [(2, 1), (50, 49), (1000, 960), (60, 20), (20, 0), (1, 0)])
def test_the_posterior_is_bayes_rule(t, s):
    """q(x_s | x_t, x_0) is N(x_s | x_0) N(x_t | x_s), normalized (DDPM eq. 7, IDDPM eq. 19)."""
    x0, eps = torch.randn(2, 3, 2, 4, 4).unbind()
    x_t = BAR[t].sqrt() * x0 + (1 - BAR[t]).sqrt() * eps
    mean, variance, beta = dit.Diffusion().posterior(eps, x_t, t, s)
    alpha = BAR[t] / BAR[s]
    assert beta.item() == pytest.approx((1 - alpha).item(), rel=1e-3)
    if s == 0:  # the first step of all borrows the variance of the second
        second = BETA[1] * (1 - BAR[1]) / (1 - BAR[2])
        assert variance.item() == pytest.approx(second.item(), rel=1e-3)
        return torch.testing.assert_close(mean, x0, rtol=1e-4, atol=1e-5)
    precision = 1 / (1 - BAR[s]) + alpha / (1 - alpha)
    weighted = BAR[s].sqrt() * x0 / (1 - BAR[s]) + alpha.sqrt() * x_t / (1 - alpha)
    torch.testing.assert_close(mean, weighted / precision, rtol=1e-4, atol=1e-5)
    assert variance.item() == pytest.approx((1 / precision).item(), rel=1e-3)


# ---- The loss, and the learned variance ----------------------------------------------


def test_the_noise_in_x_t_is_the_target():
    """A network that knows x_0 can tell ε = (x_t - signal x_0) / noise: L_simple is then 0."""
    x0, times, labels = torch.randn(500, 2, 4, 4), torch.randint(1, 1001, [500]), torch.arange(500)
    seen = []

    def knows(x, t, y):
        assert t.equal(times) and y.equal(labels)
        bar = BAR[t].view(-1, 1, 1, 1)
        seen.append((x - bar.sqrt() * x0) / (1 - bar).sqrt())
        return seen[-1] + 0.1, torch.zeros_like(x)

    simple, _ = dit.Diffusion().loss(knows, x0, labels, times)
    assert simple.item() == pytest.approx(0.01, rel=1e-3)
    assert abs(seen[0].mean()) < 0.03 and abs(seen[0].std() - 1) < 0.03


def test_the_loss_of_the_variance_is_the_kl_of_torch_distributions():
    """IDDPM eq. 15 with the network's -1 to 1 in place of v from 0 to 1, and eq. 4 to 6."""
    diffusion, t = dit.Diffusion(), torch.tensor([1, 2, 40, 1000])
    eps, eps_hat, x_t = torch.randn(3, 4, 2, 4, 4).unbind()
    v = torch.rand(4, 2, 4, 4) * 2 - 1
    terms = []
    for i, k in enumerate(t.tolist()):
        true_mean, tilde, beta = diffusion.posterior(eps[i], x_t[i], k, k - 1)
        mean, _, _ = diffusion.posterior(eps_hat[i], x_t[i], k, k - 1)
        variance = tilde ** ((1 - v[i]) / 2) * beta ** ((1 + v[i]) / 2)
        p = Normal(mean, variance.sqrt())
        q = Normal(true_mean, tilde.sqrt().expand_as(mean))
        terms.append(kl_divergence(q, p) if k > 1 else -p.log_prob(true_mean))
    found = dit.variance_loss(diffusion, eps, eps_hat, v, x_t, t)
    torch.testing.assert_close(found, torch.stack(terms).mean())


def test_the_variance_has_its_loss_and_the_noise_the_other():
    (eps, v), t = torch.randn(2, 3, 2, 4, 4, requires_grad=True), torch.tensor([1, 40, 1000])
    losses = dit.Diffusion().loss(lambda x, t, y: (eps, v), torch.randn(3, 2, 4, 4), t, t)
    for loss, taught, other in zip(losses, (eps, v), (v, eps)):
        gradient, none = torch.autograd.grad(loss, (taught, other), allow_unused=True,
                                             retain_graph=True)
        assert gradient.abs().min() > 0 and gradient.isfinite().all() and none is None


# ---- Guidance and sampling -----------------------------------------------------------


def test_guidance_is_a_line_through_both_answers_and_leaves_the_variance():
    model, (x, _, y) = network(), batch()
    t = torch.full([4], 300)
    eps, v = model(x, t, y)
    null, _ = model(x, t, torch.full([4], 5))
    assert (eps - null).abs().amax((0, 2, 3)).min() > 1e-3  # in every channel
    for g in (0, 1, 2, 4.5):
        found, variance = dit.guided(model, x, 300, y, g)
        torch.testing.assert_close(found, null + g * (eps - null))
        torch.testing.assert_close(variance, v)
    assert dit.get_args([]).guidance > 1  # by default, beyond the answer for the class


def test_the_sampler_finds_a_known_distribution():
    """Data N(m, c²): the best ε̂ is known, so samples have this mean and this deviation."""
    m, c = 0.7, 0.5

    def exact(x, t, y):
        bar = BAR[t].view(-1, 1, 1, 1)
        eps = (1 - bar).sqrt() * (x - bar.sqrt() * m) / (bar * c**2 + 1 - bar)
        return eps, torch.zeros_like(x)

    exact.num_classes = 10
    noise, y = torch.randn(20000, 1, 1, 1), torch.zeros(20000).long()
    x = dit.Diffusion().sample(exact, noise, y, guidance=1, steps=100)
    assert x.mean().item() == pytest.approx(m, abs=0.015)
    assert x.std().item() == pytest.approx(c, abs=0.03)


@pytest.mark.parametrize("steps, times", [(4, [40, 30, 20, 10, 0]), (3, [40, 26, 12, 0]),
                                          (100, list(range(40, -1, -1)))])
def test_the_sampler_in_a_plain_loop(steps, times):
    diffusion, model, (x, _, y) = dit.Diffusion(40), network(spread=0.05), batch()
    bar = [1.0]
    for t in range(40):
        bar.append(bar[-1] * (1 - (0.1 + 19.9 * t / 39) / 40))
    torch.manual_seed(3)
    found = diffusion.sample(model, x, y, 2.5, steps)
    torch.manual_seed(3)
    for t, s in zip(times, times[1:]):
        with torch.no_grad():
            eps, v = dit.guided(model, x, t, y, 2.5)
        x0 = (x - (1 - bar[t]) ** 0.5 * eps) / bar[t] ** 0.5
        beta = 1 - bar[t] / bar[s]
        x = (bar[s] ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - bar[s]) * x) / (1 - bar[t])
        if s > 0:
            low, high = math.log(beta * (1 - bar[s]) / (1 - bar[t])), math.log(beta)
            x = x + (low + (v + 1) / 2 * (high - low)).exp().sqrt() * torch.randn_like(x)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert not found.requires_grad


# ---- Training ------------------------------------------------------------------------


class Taught(nn.Module):
    """Stands for network and diffusion, remembers each batch; its losses are planes in w."""

    T, num_classes = 25, 10

    def __init__(self):
        super().__init__()
        self.w, self.seen, self.path = nn.Parameter(torch.zeros(2)), [], []

    def loss(self, model, x0, y, t):
        assert model is self and self.training
        self.seen.append((x0, y, t))
        self.path.append(self.w.tolist())
        a, b = self.w
        return 1 + 2 * a + b, 1 - 2.5 * a - 0.8 * b


def train(taught, *flags):
    latents = torch.arange(640).view(-1, 1, 1, 1) * torch.ones(2, 2, 2)
    history, args = [], dit.get_args([str(flag) for flag in flags])
    dit.train(args, taught, taught.eval(), latents, torch.arange(640) % 10, history)
    return history


def test_training_shows_every_image_with_its_label_or_without():
    taught = Taught()
    train(taught, "--epochs", 10, "--batch-size", 100)
    assert [len(t) for _, _, t in taught.seen] == 10 * [100, 100, 100, 100, 100, 100, 40]
    x0, y, t = (torch.cat(tensors) for tensors in zip(*taught.seen))
    order = x0[:, 0, 0, 0].view(10, 640)
    assert order.sort(1).values.equal(torch.arange(640.0).expand(10, 640))  # each image once
    assert not (order[1:] == order[:-1]).all(1).any()  # in another order each time
    hidden = y == 10
    assert 0.08 < hidden.double().mean() < 0.12  # one class in ten is hidden, at random
    assert y[~hidden].equal((x0[~hidden, 0, 0, 0] % 10).long())
    counts = t.bincount(minlength=26)
    assert counts[0] == 0 and len(counts) == 26 and 180 < counts[1:].min() <= counts.max() < 340
    assert abs(torch.corrcoef(torch.stack([t.double(), hidden.double()]))[0, 1]) < 0.05
    taught.num_classes = 9  # now the label 9 would mean: no class
    with pytest.raises(AssertionError):
        train(taught, "--epochs", 1)


def test_training_is_adam_on_the_sum_of_both_losses_and_goes_on_in_a_second_phase():
    taught = Taught()
    for phase in (1, 2):
        history = train(taught, "--epochs", 20, "--batch-size", 64, "--lr", 0.01)
        path = np.array(taught.path[-200:])
        rates = np.diff(path, axis=0) * [1, -1]  # Adam: a constant slope moves by the rate
        assert rates.max(0) == pytest.approx([0.01, 0.01], rel=0.02)
        assert rates.min() > 0 and rates[-1].max() < 1e-4  # the rate ends at 0
        assert (np.diff(rates[100:], axis=0) < 1e-6).all()
        losses = 1 + path @ [2, 1]  # L_simple is what is reported
        assert [row[0] for row in history] == list(range(10, 201, 10))
        assert [row[1] for row in history] == pytest.approx(losses.reshape(20, 10).mean(1))


# ---- The latent space ----------------------------------------------------------------


def test_the_autoencoder_samples_z_and_weighs_error_and_kl(capsys):
    torch.set_default_dtype(torch.float32)
    images, model, seen = dit.draw_characters(150)[0], dit.Autoencoder(), []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    dit.train_autoencoder(model, images)
    assert len(seen) == 2 * 2 * 3  # two epochs of batches of 64, 64 and 22
    whiter = []
    for (x, both), (z, decoded) in zip(seen[::2], seen[1::2]):
        mu, logvar = both.chunk(2, 1)
        q = Normal(mu, (logvar / 2).exp())
        whiter.append(((z - mu) / q.scale).flatten())
        loss = (x - decoded).square().sum() + 0.1 * kl_divergence(q, Normal(0.0, 1.0)).sum()
    whiter = torch.cat(whiter)
    assert abs(whiter.mean()) < 0.03 and abs(whiter.std() - 1) < 0.03
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[-1].split()[-1]) == pytest.approx(loss.item() / 22, abs=0.06)
    z = model.encode(images)
    torch.testing.assert_close(z, model.encoder(dit.to_float(images))[:, :2])
    assert z.shape == (150, 2, 8, 8) and not z.requires_grad
    torch.testing.assert_close(model.decode(z), (model.decoder(z) + 1) / 2)


# ---- A run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main` on drawn digits, tested on negatives: its samples, folder, figure and test images."""
    patch, calls, sample = pytest.MonkeyPatch(), [], dit.Diffusion.sample
    images, labels = dit.draw_characters(512)
    labels = (labels + 3) % 10  # so that they are not those of the samples
    data = images, labels, 255 - images[:256], labels[:256], "mine"
    patch.setattr(dit, "load_data", lambda args: data)

    def watched(self, model, x, y, guidance, steps):
        seed = torch.get_rng_state()
        calls.append((x, y, guidance, steps, seed, sample(self, model, x, y, guidance, steps)))
        return calls[-1][-1]

    torch.set_default_dtype(torch.float32)
    patch.setattr(dit.Diffusion, "sample", watched)
    out = tmp_path_factory.mktemp("run")
    dit.main(["--quick", "--device", "cpu", "--out", str(out), "--samples", "30", "--guidance", "3",
              "--steps", "4", "--epochs", "2"])
    patch.undo()
    return calls, out, plt.gcf(), data[2]


def loaded(path):
    torch.set_default_dtype(torch.float32)
    model = nn.ModuleDict({"autoencoder": dit.Autoencoder(), "dit": dit.DiT()})
    model.load_state_dict(torch.load(path / "model.pt", weights_only=True)["weights"])
    return model


def test_samples_are_of_all_classes_and_results_are_those_of_test_images(a_run):
    calls, out, _, images = a_run
    x, y, guidance, steps, _, z = calls[0]
    assert x.shape == (30, 2, 8, 8) and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert y.tolist() == list(range(10)) * 3 and (guidance, steps) == (3, 4)
    model, diffusion, arrays = loaded(out), dit.Diffusion(), np.load(out / "samples.npz")
    pixels = 255 * model.autoencoder.decode(z)[:, 0].clamp(0, 1)
    assert arrays["images"].dtype == np.uint8 and arrays["labels"].tolist() == y.tolist()
    assert np.abs(arrays["images"] - pixels.numpy()).max() < 0.51
    z, y, t = model.autoencoder.encode(images), torch.arange(3, 259) % 10, torch.arange(1, 257)
    with torch.no_grad():
        losses = torch.tensor([diffusion.loss(model.dit, z, y, t) for _ in range(5)])
    results = json.loads((out / "metrics.json").read_text())["results"]
    (name, simple), (other, bound) = results.items()
    assert "untrained: 1" in name and simple == pytest.approx(losses[:, 0].mean().item(), rel=0.05)
    assert "nats" in other and bound == pytest.approx(losses[:, 1].mean().item(), rel=0.4)


def test_the_picture_shows_what_it_says(a_run):
    calls, out, figure, images = a_run
    first, rows, samples = figure.axes
    autoencoder = loaded(out).autoencoder

    def tile(axes, row, column):
        picture = np.asarray(axes.images[0].get_array()).squeeze()
        return picture[30 * row + 1:30 * row + 29, 30 * column + 1:30 * column + 29]

    z = autoencoder.encode(images[:10])
    for i in (0, 9):
        np.testing.assert_allclose(tile(first, 0, i), images[i] / 255, atol=1e-4)
        for channel in range(2):  # from -3 to 3
            expected = (z[i, channel, 3, 5] / 6 + 0.5).clamp(0, 1).item()
            shown = tile(first, 1 + channel, i)[12, 19].clip(0, 1)
            assert shown == pytest.approx(expected, abs=1e-4)
        np.testing.assert_allclose(tile(first, 3, i), autoencoder.decode(z)[i, 0], atol=1e-4)
    assert [guidance for _, _, guidance, *_ in calls[1:]] == [0, 1, 2, 4, 8]
    for row, (x, y, guidance, steps, seed, latents) in enumerate(calls[1:]):
        assert x.equal(calls[0][0][:10]) and y.tolist() == list(range(10)) and steps == 4
        assert seed.equal(calls[1][4])  # the same noise in each row
        np.testing.assert_allclose(tile(rows, row, 7), autoencoder.decode(latents)[7, 0], atol=1e-4)
    decoded = autoencoder.decode(calls[0][-1])
    np.testing.assert_allclose(tile(samples, 2, 9), decoded[29, 0], atol=1e-4)
    assert "3" in samples.get_title() and "0, 1, 2, 4, 8" in rows.get_title()


def test_designs_share_their_latent_space_and_load_keeps_it(tmp_path, a_run, monkeypatch):
    torch.set_default_dtype(torch.float32)
    few, (_, old, _, _) = dit.draw_characters(40), a_run
    monkeypatch.setattr(dit, "load_data", lambda args: (*few, *few, "mine"))

    def latent_space(*flags):
        dit.main(["--quick", "--device", "cpu", "--samples", "10", "--steps", "1",
                  "--epochs", "0", "--out", str(tmp_path), *flags])
        weights = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
        return torch.cat([w.flatten() for name, w in weights.items() if "autoencoder" in name])

    one = latent_space()
    assert one.equal(latent_space("--block", "cross"))
    assert one.equal(latent_space("--patch-size", "4"))
    again = latent_space("--load", str(old / "model.pt"), "--epochs", "1", "--seed", "3")
    assert again.equal(nn.utils.parameters_to_vector(loaded(old).autoencoder.parameters()))


def test_an_interrupt_before_the_latents_are_ready_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "train_autoencoder", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dit.main(["--quick", "--data", "drawn", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
