"""05_dit.py: the Diffusion Transformer, guidance, the learned variance, latent diffusion.

Equations: DiT arXiv:2212.09748, DDPM arXiv:2006.11239, IDDPM arXiv:2102.09672."""

import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from conftest import ROOT, load_script

dit = load_script(ROOT / "05_dit.py")


def alpha_bar(T):
    """ᾱ_0 to ᾱ_T; for T = 1000, β goes from 1e-4 to 0.02, as in DDPM section 4."""
    beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
    return torch.cat([torch.ones(1).double(), (1 - beta).cumprod(0)])


BAR = alpha_bar(1000)


@pytest.fixture(autouse=True)
def precision():
    yield
    torch.set_default_dtype(torch.float32)


def network(name="adaln-zero", spread=0.1):
    """A small DiT; `spread` moves its weights away from the start."""
    model = dit.DiT(8, 2, 3, 32, 2, 4, 5, dit.BLOCKS[name])
    for p in model.parameters():
        p.data += spread * torch.randn_like(p) * p.requires_grad
    return model


def batch():
    return torch.randn(4, 3, 8, 8), torch.tensor([7, 14, 300, 900]), torch.arange(4)


# ---- The network (DiT section 3.2) ---------------------------------------------------


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()


def block_by_hand(name, block, x, t, y):
    """Shift, scale and gate, for the attention and for the MLP; or what stands for them."""
    six = 0, 0, 1, 0, 0, 1
    if name in ("adaln-zero", "adaln"):
        six = block.adaLN_modulation[1](F.silu(t + y)).chunk(6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = six
    if name == "adaln":
        gate1 = gate2 = 1
    if name == "in-context":
        x = torch.cat([x, t, y], 1)
    h = norm(x) * (1 + scale1) + shift1
    q, k, v = block.attn.qkv(h).view(4, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)  # of four heads
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1 * block.attn.proj(h)
    if name == "cross":
        c = torch.cat([t, y], 1)
        x = x + block.cross_attn(norm(x), c, c)[0]
    h = block.mlp.fc1(norm(x) * (1 + scale2) + shift2)
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))  # GELU
    x = x + gate2 * block.mlp.fc2(h)
    return x[:, :16]


@pytest.mark.parametrize("name", dit.BLOCKS)
def test_the_network_by_hand(name):
    torch.set_default_dtype(torch.float64)
    model, (x, t, y) = network(name), batch()
    patches, proj = F.unfold(x, 2, stride=2).transpose(1, 2), model.x_embedder.proj
    h = patches @ proj.weight.flatten(1).T + proj.bias + dit.sincos_positions(4, 32)
    angle = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    t_emb = model.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], 1))[:, None]
    y_emb = model.y_embedder.embedding_table.weight[y][:, None]
    for block in model.blocks:
        h = block_by_hand(name, block, h, t_emb, y_emb)
    shift, scale = model.final_layer.adaLN_modulation[1](F.silu(t_emb + y_emb)).chunk(2, -1)
    out = model.final_layer.linear(norm(h) * (1 + scale) + shift)  # (B, 16, 2 2 6)
    out = out.view(4, 16, 4, 6).transpose(2, 3).flatten(2)  # `fold` wants channels first
    eps, v = model(x, t, y)
    expected = F.fold(out.transpose(1, 2), 8, 2, stride=2).chunk(2, 1)
    torch.testing.assert_close((eps, v), expected)

    # All weights learn, but in the last two designs, the adaLN of the blocks is idle.
    (eps.square().sum() + v.square().sum()).backward()
    for key, p in model.named_parameters():
        idle = key.startswith("blocks") and "adaLN" in key and name in ("in-context", "cross")
        assert (p.grad is None) == (idle or key == "pos_embed"), key

    # Only adaLN-Zero starts as the identity; but the output starts at 0 in all designs.
    fresh = network(name, spread=0)
    assert fresh.blocks[0](h, t_emb, y_emb).equal(h) == (name == "adaln-zero")
    assert all(out.abs().max() == 0 for out in fresh(x, t, y))


def test_positions_are_sines_and_cosines_of_the_column_and_of_the_row():
    table = dit.sincos_positions(6, 16).view(6, 6, 2, 2, 4)  # row, column, axis, sin or cos
    angles = torch.arange(6)[:, None] * 10000 ** (-torch.arange(4) / 4)
    line = torch.stack([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(table[:, :, 0], line.expand(6, 6, 2, 4))
    torch.testing.assert_close(table[:, :, 1], line[:, None].expand(6, 6, 2, 4))


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


# ---- The chain -----------------------------------------------------------------------


def test_tables_go_from_an_image_at_0_to_pure_noise_at_T():
    for T in (21, 100, 1000, 4000):
        diffusion, bar = dit.Diffusion(T), alpha_bar(T)
        found = torch.cat([diffusion.signal, diffusion.noise], 1).flatten(1).double()
        expected = torch.stack([bar.sqrt(), (1 - bar).sqrt()], 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert 0 < found[-1, 0] < 0.01 and diffusion.T == T
    with pytest.raises(AssertionError, match="below 1"):
        dit.Diffusion(20)


def test_the_posterior_is_bayes_rule():
    """q(x_s | x_t, x_0) is N(x_s | x_0) N(x_t | x_s), normalized (DDPM eq. 7, IDDPM eq. 19)."""
    t, s = torch.tensor([[2, 50, 1000, 60, 20, 1], [1, 49, 960, 20, 0, 0]])
    x0, eps = torch.randn(2, 6, 2, 4, 4).unbind()
    bar, earlier = BAR[t].view(-1, 1, 1, 1), BAR[s].view(-1, 1, 1, 1)
    x_t, alpha = bar.sqrt() * x0 + (1 - bar).sqrt() * eps, bar / earlier
    mean, variance, beta = dit.Diffusion().posterior(eps, x_t, t, s)
    torch.testing.assert_close(beta, 1 - alpha, rtol=1e-3, atol=0, check_dtype=False)
    precision = 1 / (1 - earlier) + alpha / (1 - alpha)
    expected = 1 / precision
    expected[4:] = expected[0]  # the step to x_0 borrows the variance of the one before
    torch.testing.assert_close(variance, expected, rtol=1e-3, atol=0, check_dtype=False)
    weighted = earlier.sqrt() * x0 / (1 - earlier) + alpha.sqrt() * x_t / (1 - alpha)
    expected = torch.where(s.view(-1, 1, 1, 1) == 0, x0, weighted / precision)
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


# ---- The loss, and the learned variance ----------------------------------------------


def test_the_noise_in_x_t_is_the_target_and_the_variance_has_its_own_loss():
    """A network that knows x_0 can tell ε = (x_t - signal x_0) / noise; here it adds 0.1."""
    t, y, seen = torch.randint(1, 1001, [500]), torch.arange(500), []
    x0, v = torch.randn(2, 500, 2, 4, 4).unbind()

    def knows(x_t, times, labels):
        assert times.equal(t) and labels.equal(y)
        bar = BAR[t].view(-1, 1, 1, 1)
        eps = ((x_t - bar.sqrt() * x0) / (1 - bar).sqrt()).float()
        seen.append((eps, (eps + 0.1).requires_grad_(), v.requires_grad_(), x_t))
        return seen[0][1:3]

    diffusion = dit.Diffusion()
    simple, bound = diffusion.loss(knows, x0, y, t)
    eps, eps_hat, *_ = seen[0]
    assert simple.item() == pytest.approx(0.01, rel=1e-3)
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
    expected = dit.variance_loss(diffusion, *seen[0], t)
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0)
    for loss, taught, other in ((simple, eps_hat, v), (bound, v, eps_hat)):
        gradient, none = torch.autograd.grad(loss, (taught, other), allow_unused=True)
        assert gradient.abs().min() > 0 and gradient.isfinite().all() and none is None


def test_the_loss_of_the_variance_is_the_kl_of_torch_distributions():
    """IDDPM eq. 15 with the network's -1 to 1 in place of v from 0 to 1, and eq. 4 to 6."""
    diffusion, t = dit.Diffusion(), torch.tensor([1, 2, 40, 1000])
    eps, eps_hat, x_t, v = torch.randn(4, 4, 2, 4, 4).double().unbind()
    true_mean, tilde, beta = diffusion.posterior(eps, x_t, t, t - 1)
    mean, _, _ = diffusion.posterior(eps_hat, x_t, t, t - 1)
    variance = tilde.double() ** ((1 - v) / 2) * beta.double() ** ((1 + v) / 2)
    p, q = Normal(mean, variance.sqrt()), Normal(true_mean, tilde.sqrt())
    expected = torch.cat([-p.log_prob(true_mean)[:1], kl_divergence(q, p)[1:]]).mean()
    torch.testing.assert_close(dit.variance_loss(diffusion, eps, eps_hat, v, x_t, t), expected)


# ---- Guidance and sampling -----------------------------------------------------------


def test_guidance_is_a_line_through_both_answers_and_leaves_the_variance():
    model, (x, _, y) = network(), batch()
    t, no_class = torch.full([4], 300), torch.full([4], 5)
    (eps, v), (null, _) = model(x, t, y), model(x, t, no_class)
    assert (eps - null).abs().amax((0, 2, 3)).min() > 1e-3  # in every channel
    for g in (0, 1, 2, 4.5):
        expected = null + g * (eps - null), v
        torch.testing.assert_close(dit.guided(model, x, 300, y, g), expected)
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
    torch.manual_seed(3)
    found = diffusion.sample(model, x, y, 2.5, steps)
    torch.manual_seed(3)
    for t, s in zip(times, times[1:]):
        eps, v = dit.guided(model, x, t, y, 2.5)
        x, tilde, beta = diffusion.posterior(eps, x, t, s)
        if s > 0:
            variance = tilde ** ((1 - v) / 2) * beta ** ((1 + v) / 2)
            x = x + variance.sqrt() * torch.randn_like(x)
    torch.testing.assert_close(found, x.detach(), rtol=1e-4, atol=1e-4)
    assert not found.requires_grad


# ---- Training ------------------------------------------------------------------------


class Taught(nn.Module):
    """Stands for network and diffusion, remembers each batch; its losses are planes in w."""

    T, num_classes = 25, 10

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(2)), []

    def loss(self, model, x0, y, t):
        assert model is self and self.training
        self.seen.append((x0, y, t, self.w.detach().clone().double()[None]))
        a, b = self.w
        return 1 + 2 * a + b, 1 - 2.5 * a - 0.8 * b


def test_training_is_adam_on_both_losses_and_hides_one_label_in_ten():
    taught, history = Taught().eval(), []
    latents = torch.arange(640).view(-1, 1, 1, 1).expand(640, 2, 2, 2)
    labels = latents[:, 0, 0, 0] % 10
    args = dit.get_args("--epochs 20 --batch-size 100 --lr 0.01".split())
    dit.train(args, taught, taught, latents, labels, history)
    assert [len(x0) for x0, *_ in taught.seen] == 20 * [100, 100, 100, 100, 100, 100, 40]
    x0, y, t, path = (torch.cat(tensors) for tensors in zip(*taught.seen))
    shown = x0[:, 0, 0, 0]
    order = shown.view(20, 640)
    assert order.sort(1).values.equal(torch.arange(640).expand(20, 640))  # each image once
    assert not (order[1:] == order[:-1]).all(1).any()  # in another order each time
    hidden = y == 10
    assert 0.09 < hidden.double().mean() < 0.11 and y[~hidden].equal(labels[shown][~hidden])
    counts = t.bincount(minlength=26)
    assert counts[0] == 0 and len(counts) == 26 and 400 < counts[1:].min() <= counts.max() < 620
    assert abs(torch.corrcoef(torch.stack([t.double(), hidden.double()]))[0, 1]) < 0.05

    a, b = path.T
    rates = torch.stack([a.diff(), -b.diff()])  # Adam: a constant slope moves by the rate
    assert rates.amax(1).tolist() == pytest.approx([0.01, 0.01], rel=0.02)
    assert rates.min() > 0 and rates[:, -1].max() < 1e-4  # the rate ends at 0
    assert (rates[:, 70:].diff() < 1e-6).all()
    losses = (1 + 2 * a + b).view(20, 7).mean(1).tolist()  # L_simple is what is reported
    expected = [[7 * i + 7, pytest.approx(loss, rel=1e-5)] for i, loss in enumerate(losses)]
    assert [row[:2] for row in history] == expected
    with pytest.raises(AssertionError):  # a label 10 would mean: no class
        dit.train(args, taught, taught, latents, labels + 1, history)


# ---- The latent space ----------------------------------------------------------------


def test_the_autoencoder_samples_z_and_weighs_error_and_kl(capsys):
    (images, _), model, seen, whiter = dit.draw_characters(150), dit.Autoencoder(), [], []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    old = []  # gradients that are there when those of a batch are about to be added
    watch = model.decoder.register_forward_hook(lambda _, inputs, out: out.register_hook(
        lambda _: old.extend(p.grad for p in model.parameters() if p.grad is not None)) and None)
    dit.train_autoencoder(model, images)
    watch.remove()
    assert not any(gradient.any() for gradient in old)
    assert len(seen) == 2 * 2 * 3  # two epochs of batches of 64, 64 and 22
    for (x, both), (z, decoded) in zip(seen[::2], seen[1::2]):
        mu, logvar = both.chunk(2, 1)
        q = Normal(mu, (logvar / 2).exp())
        whiter.append(((z - mu) / q.scale).flatten())
        loss = (x - decoded).square().sum() + 0.1 * kl_divergence(q, Normal(0.0, 1.0)).sum()
    order = torch.cat([x for x, _ in seen[::2]]).view(2, 150, 784)
    one, two = (sorted(epoch.tolist()) for epoch in order)  # each image once, in a new order
    assert one == two == sorted(dit.to_float(images).flatten(1).tolist())
    assert not order[0].equal(order[1])
    whiter = torch.cat(whiter)
    assert abs(whiter.mean()) < 0.03 and abs(whiter.std() - 1) < 0.03
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert 0.85 * first > last == pytest.approx(loss.item() / 22, abs=0.06)
    z, pixels = model.encode(images), images[:, None] / 127.5 - 1  # in [-1, 1]
    torch.testing.assert_close(z, model.encoder(pixels)[:, :2])
    assert z.shape == (150, 2, 8, 8) and not z.requires_grad
    torch.testing.assert_close(model.decode(z), (model.decoder(z) + 1) / 2)


# ---- A run ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main` on digits to train and their negatives to test, with other labels; and from where
    to repeat it: the random states before the evaluation and, with x_T, before each sampling."""
    out, sampled, states = tmp_path_factory.mktemp("run"), [], []
    loss, sample = dit.Diffusion.loss, dit.Diffusion.sample
    torch.manual_seed(0)
    images, labels = dit.draw_characters(256)
    data = images, (labels + 3) % 10, 255 - images[:200], (labels[:200] + 5) % 10, "mine"

    def watched_loss(*args, **more):
        states.append(torch.get_rng_state())
        return loss(*args, **more)

    def watched_sample(self, model, x, *args, **more):
        sampled.append((x, torch.get_rng_state()))
        return sample(self, model, x, *args, **more).tanh()  # most pixels are gray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dit, "load_data", lambda args: data)
        patch.setattr(dit.Diffusion, "loss", watched_loss)
        patch.setattr(dit.Diffusion, "sample", watched_sample)
        dit.main(["--quick", "--device", "cpu", "--out", str(out), "--samples", "30",
                  "--guidance", "3", "--steps", "4", "--epochs", "2"])
    model = nn.ModuleDict({"autoencoder": dit.Autoencoder(), "dit": dit.DiT()})
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True)["weights"])
    return data, model.requires_grad_(False), out, states[-1], sampled, dit.plt.gcf()


def sample_again(model, x, state, guidance):
    """Samples of 0, 1, ..., 9, 0, ... from the same noise, decoded (B, 28, 28)."""
    torch.set_rng_state(state)
    z = dit.Diffusion().sample(model.dit, x, torch.arange(len(x)) % 10, guidance, 4).tanh()
    return model.autoencoder.decode(z)[:, 0]


def test_results_samples_and_picture_are_those_of_the_saved_model(a_run):
    """L_simple and bound of test images; samples of all classes; five strengths of guidance."""
    (_, _, images, labels, _), model, out, state, sampled, figure = a_run
    torch.set_rng_state(state)
    z, t = model.autoencoder.encode(images), torch.arange(1, 201)
    simple, bound = (loss.item() for loss in dit.Diffusion().loss(model.dit, z, labels, t))
    results = json.loads((out / "metrics.json").read_text())["results"]
    expected = {"L_simple (untrained: 1)": simple, "L_{t-1} in nats": bound}
    assert results == pytest.approx(expected, rel=1e-5) and 0 < simple < 0.98

    (x_T, before), (_, same), *_ = sampled
    assert x_T.shape == (30, 2, 8, 8) and abs(x_T.mean()) < 0.1 and abs(x_T.std() - 1) < 0.1
    arrays, again = np.load(out / "samples.npz"), sample_again(model, x_T, before, 3)
    assert arrays["images"].dtype == np.uint8 and arrays["labels"].tolist() == [*range(10)] * 3
    assert np.abs(arrays["images"] - 255 * again.clamp(0, 1).numpy()).max() < 0.51

    tiles = []
    for axes in figure.axes:
        picture = torch.tensor(axes.images[0].get_array()).view(-1, 30, 10, 30)
        tiles.append(picture[:, 1:-1, :, 1:-1].transpose(1, 2))  # (rows, 10, 28, 28)
    first, rows, samples = tiles
    z, nearest = z[:10], torch.arange(28) * 8 // 28
    channels = z.movedim(1, 0)[:, :, nearest][..., nearest] / 6 + 0.5  # -3 black, 3 white
    expected = [images[:10] / 255, *channels, model.autoencoder.decode(z)[:, 0]]
    np.testing.assert_allclose(first.clip(0, 1), torch.stack(expected).clip(0, 1), atol=1e-4)
    np.testing.assert_allclose(samples.flatten(0, 1), again, atol=1e-4)
    for row, guidance in zip(rows, (0, 1, 2, 4, 8), strict=True):
        again = sample_again(model, x_T[:10], same, guidance)
        np.testing.assert_allclose(row, again, atol=1e-4)
    assert "guidance 0, 1, 2, 4, 8" in figure.axes[1].get_title()


def test_designs_start_from_the_same_latents_and_noise_and_load_keeps_both(
        a_run, tmp_path, monkeypatch):
    (data, model, out, *_), draws = a_run, []

    def train(args, diffusion, network, latents, labels, history):
        assert latents.equal(model.autoencoder.encode(data[0])) and labels.equal(data[1])
        draws.append(torch.rand(1).item())

    monkeypatch.setattr(dit, "load_data", lambda args: data)
    monkeypatch.setattr(dit, "train", train)
    for flag, value in (("--block", "cross"), ("--patch-size", "4"), ("--load", out / "model.pt")):
        dit.main(["--quick", "--device", "cpu", "--samples", "10", "--steps", "1",
                  "--out", str(tmp_path), flag, str(value)])
    assert draws == draws[:1] * 3


def test_an_interrupt_before_the_latents_are_ready_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "train_autoencoder", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dit.main(["--quick", "--data", "drawn", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
