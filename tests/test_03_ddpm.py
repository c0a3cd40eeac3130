"""Worked solutions for 03_ddpm.py: closed forms, Bayes' rule, tiny problems with known answers."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from conftest import ROOT, load_script

ddpm = load_script(ROOT / "03_ddpm.py")
CHAIN = ddpm.Diffusion()  # T = 1000, β from 1e-4 to 0.02
BETA = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)]).double()
BAR = torch.cumprod(1 - BETA, 0)  # ᾱ_t, for t = 0..T


def every(t, count):
    return torch.full([count], t)


def times(t):
    """The one time that a model is asked for, as a number or for each image."""
    value, = torch.as_tensor(t).unique().tolist()
    return value


def scalars(*values):
    """Numbers as images of one pixel (B, 1, 1, 1)."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def gaussian_model(std):
    """The best ε for data N(0, std²): E[ε | x_t] = √(1-ᾱ_t) x_t / (ᾱ_t std² + 1 - ᾱ_t)."""
    def model(x, t):
        bar = BAR[t].view(-1, 1, 1, 1)
        return ((1 - bar).sqrt() / (bar * std**2 + 1 - bar)).to(x) * x
    return model


def fixed_model(x0):
    """An oracle that knows x_0, and so the noise in x_t."""
    def model(x, t):
        bar = BAR[t].view(-1, 1, 1, 1)
        return ((x - bar.sqrt() * x0) / (1 - bar).sqrt()).to(x)
    return model


# ---- The forward process and its posterior -------------------------------------------


@pytest.mark.parametrize("T", [21, 50, 100, 1000])
def test_schedule_counts_from_one_and_ends_in_noise(T):
    chain = ddpm.Diffusion(T)
    beta = chain.beta.flatten()
    assert chain.T == T and len(beta) == T + 1 and beta[0] == 0 and beta.max() < 1
    expected = np.linspace(0.1, 20, T) / T
    assert beta[1:].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert chain.signal[0] == 1 and chain.noise[0] == 0  # ᾱ_0 = 1
    assert chain.signal[1].item() == pytest.approx((1 - 0.1 / T) ** 0.5)
    assert chain.signal[-1] < 0.01 and chain.beta_tilde[1] == 0
    tables = [table for table in vars(chain).values() if torch.is_tensor(table)]
    assert all(table.dtype == torch.float32 for table in tables)  # a Mac's GPU has no others
    with pytest.raises(ValueError, match="T must"):
        ddpm.Diffusion(20)  # β_T would be 1


def test_many_steps_are_one_jump():
    """A step is linear: follow its mean and variance from x_0 = 0.7 (text 8.4.3)."""
    zero, one = scalars(0), scalars(1)
    mean, variance = scalars(0.7), scalars(0)
    for t in range(1, 1001):
        t = torch.tensor([t])
        mean = ddpm.q_step(CHAIN, mean, t, zero)
        slope, noise = ddpm.q_step(CHAIN, one, t, zero), ddpm.q_step(CHAIN, zero, t, one)
        variance = slope**2 * variance + noise**2
        if t in (1, 10, 300, 1000):
            torch.testing.assert_close(mean, CHAIN.q_sample(scalars(0.7), t, zero),
                                       rtol=1e-4, atol=0)
            torch.testing.assert_close(variance, CHAIN.q_sample(zero, t, one) ** 2,
                                       rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [2, 40, 500, 1000])
def test_posterior_is_bayes_rule(t):
    """Prior N(√ᾱ_{t-1} x_0, 1-ᾱ_{t-1}), likelihood N(√α x_{t-1}, 1-α): precisions add."""
    x0, x_t = scalars(0.3, -0.8), scalars(1.2, 0.1)
    bar, alpha = BAR[t - 1], 1 - BETA[t]
    precision = 1 / (1 - bar) + alpha / (1 - alpha)
    mean = (bar.sqrt() * x0 / (1 - bar) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    torch.testing.assert_close(CHAIN.q_mean(x0, x_t, every(t, 2)), mean, rtol=1e-5, atol=1e-6)
    assert CHAIN.beta_tilde[t].item() == pytest.approx(1 / precision.item(), rel=1e-5)


def reverse_mean(x_t, t, eps):
    """μ_θ for a given estimate of the noise, without the clamp (eq. 5.32)."""
    beta, bar = BETA[t].view(-1, 1, 1, 1), BAR[t].view(-1, 1, 1, 1)
    return (x_t - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()


def test_mean_of_the_reverse_step_is_that_of_algorithm_2():
    torch.manual_seed(0)
    x0, eps = torch.rand(999, 1, 1, 3) * 2 - 1, torch.randn(999, 1, 1, 3)
    t = torch.arange(2, 1001)
    x_t = CHAIN.q_sample(x0, t, eps)
    torch.testing.assert_close(CHAIN.q_mean(x0, x_t, t).double(), reverse_mean(x_t, t, eps),
                               rtol=1e-4, atol=1e-4)
    x0_hat = CHAIN.predict_x0(lambda x, t: eps, x_t, t)  # eq. 4 solved for x_0
    torch.testing.assert_close(x0_hat, x0, rtol=1e-3, atol=1e-3)
    far = CHAIN.predict_x0(lambda x, t: -1e6 * eps.sign(), x_t, t)
    assert far.equal(eps.sign())  # pixels stay in [-1, 1]


def test_pixels_go_to_minus_one_one():
    x = ddpm.to_float(torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1))
    torch.testing.assert_close(x, torch.tensor([-1, 1, -0.6]).view(3, 1, 1, 1))


# ---- The bound -----------------------------------------------------------------------


def test_every_term_of_the_bound_is_that_of_torch_distributions():
    """Exercises 5.4 and 5.5 with a model of which only the mean over many x_t is compared."""
    chain, n = ddpm.Diffusion(30), 4000
    x0 = ddpm.to_float(torch.tensor([0, 9, 130, 255]).byte().view(1, 2, 2)).expand(n, 1, 2, 2)
    model = lambda x, t: torch.tanh(0.8 * x)  # noqa: E731: any function of x_t
    torch.manual_seed(1)
    terms = ddpm.bound_terms(chain, model, x0)
    assert terms.shape == (n, 31)
    beta = torch.linspace(0.1 / 30, 20 / 30, 30, dtype=torch.float64)
    bar = torch.cat([torch.ones(1), torch.cumprod(1 - beta, 0)])
    for t in range(1, 31):
        x_t = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * torch.randn(n, 1, 2, 2)
        x0_hat = ((x_t - (1 - bar[t]).sqrt() * model(x_t, t)) / bar[t].sqrt()).clamp(-1, 1)

        def mean(x):  # μ̃_t, eq. 5.28
            old = (1 - beta[t - 1]).sqrt() * (1 - bar[t - 1]) * x_t
            return (bar[t - 1].sqrt() * beta[t - 1] * x + old) / (1 - bar[t])

        p = Normal(mean(x0_hat), beta[t - 1].sqrt())
        if t == 1:
            high = torch.where(x0 == 1, 1.0, p.cdf(x0 + 1 / 255))
            low = torch.where(x0 == -1, 0.0, p.cdf(x0 - 1 / 255))
            nats = -torch.log((high - low).clamp(min=1e-12))
        else:
            beta_tilde = beta[t - 1] * (1 - bar[t - 1]) / (1 - bar[t])
            nats = kl_divergence(Normal(mean(x0), beta_tilde.sqrt()), p)
        bits = nats.mean((1, 2, 3)) / math.log(2)
        error = (bits.var() + terms[:, t - 1].var()).sqrt().item() / n**0.5
        assert abs(terms[:, t - 1].mean() - bits.mean()) < 5 * error + 1e-6, t
    prior = kl_divergence(Normal(bar[30].sqrt() * x0, (1 - bar[30]).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(terms[:, 30].double(), prior.mean((1, 2, 3)) / math.log(2),
                               rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 0.01), (-1.0, 0.02), (0.97, 0.3), (3.0, 0.5)])
def test_decoder_shares_one_among_the_256_levels(mean, std):
    levels = torch.arange(256) / 127.5 - 1
    log_p = ddpm.discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(std))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    normal = Normal(torch.tensor(mean).double(), torch.tensor(std).double())
    edges = normal.cdf(torch.linspace(-256 / 255, 256 / 255, 257).double())
    edges[0], edges[-1] = 0, 1  # the bins of black and white are open
    torch.testing.assert_close(log_p.exp().double(), edges.diff(), rtol=1e-3, atol=1e-6)
    for far_or_exact in (torch.tensor(mean), levels):  # even without variance
        nats = ddpm.discretized_log_likelihood(levels, far_or_exact, torch.tensor(0.0))
        assert nats.isfinite().all()


def test_bound_of_a_perfect_model_is_the_entropy_plus_what_sigma_costs():
    """For data N(0, std²) the true p(x_{t-1} | x_t) is Gaussian; σ² = β_t is a little wider."""
    torch.manual_seed(0)
    std, n = 0.25, 4000
    x0 = ((torch.randn(n, 1, 2, 2) * std).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    terms = ddpm.bound_terms(CHAIN, gaussian_model(std), x0)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2) - math.log(2 / 255)
    var = BAR * std**2 + 1 - BAR  # of x_t
    ratio = var[:-1] / var[1:]  # true variance β_t var_{t-1} / var_t, over β_t
    gap = 0.5 * (ratio - 1 - ratio.log()).sum() + 0.5 * (var[-1] - 1 - var[-1].log())
    total = terms.sum(1)
    error = total.std().item() / n**0.5
    assert error < 0.02
    assert abs(total.mean().item() - (entropy + gap.item()) / math.log(2)) < 4 * error


def test_weighted_noise_error_plus_constant_is_the_divergence():
    """Exercises 5.4 and 5.6."""
    torch.manual_seed(0)
    t, (x0, eps, guess) = torch.arange(2, 1001), torch.randn(3, 999, 1, 2, 2)
    x_t = CHAIN.q_sample(x0, t, eps)
    variance = CHAIN.variance[t]
    mean = reverse_mean(x_t, t, guess)
    kl = ddpm.gaussian_kl(CHAIN.q_mean(x0, x_t, t), CHAIN.beta_tilde[t], mean, variance)
    ratio = (1 - BAR[t - 1]) / (1 - BAR[t])  # β̃_t / β_t
    constant = (0.5 * (ratio - 1 - ratio.log())).view(-1, 1, 1, 1)
    weighted = ddpm.dropped_weight(CHAIN, t) * (eps - guess) ** 2
    torch.testing.assert_close(kl.double(), weighted + constant, rtol=2e-3, atol=1e-5)
    first = ddpm.dropped_weight(CHAIN, every(1, 1)).item()  # ex. 5.5, with σ_1² = β_1
    assert first == pytest.approx(1 / (2 * (1 - 1e-4)), rel=1e-4)


def test_first_term_is_near_the_noise_error_of_exercise_5_5():
    torch.manual_seed(0)
    x0 = ((torch.rand(500, 1, 2, 2) * 127.5).round() + 64) / 127.5 - 1  # far from the edges
    eps, guess, t = torch.randn_like(x0), torch.randn_like(x0), every(1, 500)
    mean = reverse_mean(CHAIN.q_sample(x0, t, eps), t, guess)
    beta = BETA[1]
    error = (eps - guess) ** 2 / (2 * (1 - beta))  # β_1² / (2 σ_1² α_1 (1-ᾱ_1)), σ_1² = β_1
    exact = -ddpm.discretized_log_likelihood(x0, mean, beta.sqrt().float())
    constant = 0.5 * math.log(2 * math.pi * beta) - math.log(2 / 255)
    assert abs((exact - error - constant).mean()) < 0.05 * exact.mean()
    black = torch.tensor(-1.0)  # at the edge it fails, even for mean = x0
    nats = -ddpm.discretized_log_likelihood(black, black, beta.sqrt().float())
    assert nats.item() == pytest.approx(0.43, abs=0.005)
    assert constant == pytest.approx(1.16, abs=0.005)


# ---- The continuous view (ex. 5.3) ---------------------------------------------------


def transition_density(r, x, t, z):
    """u(r, x; t, z): density at z and time t of the chain's limit T -> ∞, started from x at r.

    The limit is dX = -β(t) X/2 dt + √β(t) dW, with times t/T in [0, 1] and β(t) = 0.1 + 19.9 t,
    which is T β_t."""
    integral = (t - r) * (0.1 + 19.9 * (t + r) / 2)  # ∫ β from r to t
    return Normal(x * torch.exp(-integral / 2), (-torch.expm1(-integral)).sqrt()).log_prob(z).exp()


def test_transition_density_solves_the_backward_equation():
    """∂u/∂r + b ∂u/∂x + (a/2) ∂²u/∂x² = 0 with b = -β x/2 and a = β, by autograd (ex. 5.3)."""
    torch.manual_seed(0)
    r = (torch.rand(200, dtype=torch.float64) * 0.6).requires_grad_()
    x = torch.randn(200, dtype=torch.float64).requires_grad_()
    z = torch.randn(200, dtype=torch.float64)
    t = r.detach() + 0.05 + 0.3 * torch.rand(200, dtype=torch.float64)
    u = transition_density(r, x, t, z)
    u_r, u_x = torch.autograd.grad(u.sum(), (r, x), create_graph=True)
    u_xx = torch.autograd.grad(u_x.sum(), x)[0]
    beta = 0.1 + 19.9 * r
    residual = u_r - beta * x / 2 * u_x + beta / 2 * u_xx
    assert u_r.abs().max() > 0.1  # the terms that cancel are not small
    assert residual.abs().max() < 1e-9


def test_transition_density_is_the_limit_of_the_chain():
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    u = transition_density(torch.tensor(0.0), torch.tensor(0.7), torch.tensor(0.3).double(), z)
    mean = torch.trapezoid(u * z, z)
    assert torch.trapezoid(u, z).item() == pytest.approx(1)
    assert mean.item() == pytest.approx(0.7 * CHAIN.signal[300].item(), rel=0.01)
    variance = torch.trapezoid(u * (z - mean) ** 2, z)
    assert variance.item() == pytest.approx(CHAIN.noise[300].item() ** 2, rel=0.01)


# ---- Sampling ------------------------------------------------------------------------


def sampler(steps, eta=0.0):
    """Both samplers with one signature; DDPM always takes all T steps."""
    if steps is None:
        return CHAIN.sample
    return lambda model, x: ddpm.sample_ddim(CHAIN, model, x, steps, eta)


@pytest.mark.parametrize("steps, eta", [(None, 1), (1000, 0), (1000, 1), (7, 0), (1, 0), (50, 0.5)])
def test_with_the_true_noise_samplers_pass_all_times_and_return_x0(steps, eta):
    torch.manual_seed(0)
    x0, seen = torch.rand(4, 1, 5, 5) * 2 - 1, []
    model = fixed_model(x0)
    x = sampler(steps, eta)(lambda x, t: seen.append(times(t)) or model(x, t), torch.randn_like(x0))
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-3)
    assert seen == list(range(1000, 0, -math.ceil(1000 / (steps or 1000))))


@pytest.mark.parametrize("steps, eta", [(None, 1), (1000, 0), (1000, 0.5), (1000, 1)])
def test_a_perfect_model_of_gaussian_data_samples_that_gaussian(steps, eta):
    torch.manual_seed(0)
    x = sampler(steps, eta)(gaussian_model(0.25), torch.randn(5000, 1, 2, 2))
    assert abs(x.mean().item()) < 4 * 0.25 / 20000**0.5
    assert x.std().item() == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("chosen", ["beta", "beta_tilde"])
def test_sample_is_algorithm_2_with_either_variance(chosen):
    """With ε_θ = c_t x_t a step is linear: its variance can be followed exactly (eq. 5.32)."""
    torch.manual_seed(0)
    chain, variance = ddpm.Diffusion(40), 1.0
    chain.variance = getattr(chain, chosen)
    beta, bar = chain.beta.flatten(), torch.cumprod(1 - chain.beta.flatten(), 0)
    c = (1 - bar).sqrt() / (bar * 0.25**2 + 1 - bar)  # right for data N(0, 0.25²): no clamp acts
    for t in range(40, 0, -1):
        slope = (1 - beta[t] / (1 - bar[t]).sqrt() * c[t]) / (1 - beta[t]).sqrt()
        variance = slope**2 * variance + (chain.variance[t].item() if t > 1 else 0)
    x = chain.sample(lambda x, t: c[t].view(-1, 1, 1, 1) * x, torch.randn(10000, 1, 2, 2))
    assert x.std().item() == pytest.approx(variance.item() ** 0.5, rel=0.02)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_ddim_step_is_equation_12_of_its_paper(eta):
    """Many times the same two steps: mean and deviation of x_0 and of x_500."""
    torch.manual_seed(0)
    x, seen = torch.full([40000, 1, 1, 1], 0.3), []
    ddpm.sample_ddim(CHAIN, lambda x, t: seen.append((t, x)) or 0.9 * x, x, 2, eta)
    assert [times(t) for t, _ in seen] == [1000, 500]
    bar_t, bar_s = BAR[1000].item(), BAR[500].item()
    x0 = min(1, (0.3 - (1 - bar_t) ** 0.5 * 0.27) / bar_t**0.5)
    eps = (0.3 - bar_t**0.5 * x0) / (1 - bar_t) ** 0.5  # the noise that goes with the clamped x_0
    sigma = eta * ((1 - bar_s) / (1 - bar_t)) ** 0.5 * (1 - bar_t / bar_s) ** 0.5  # eq. 16
    mean = bar_s**0.5 * x0 + (1 - bar_s - sigma**2) ** 0.5 * eps  # eq. 12
    assert seen[1][1].mean().item() == pytest.approx(mean, abs=0.02 * sigma + 1e-4)
    assert seen[1][1].std().item() == pytest.approx(sigma, rel=0.02, abs=1e-6)


# ---- The network ---------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ddpm.UNet().eval()
    for block in net.modules():
        if isinstance(block, ddpm.ResidualBlock):  # as after some training
            nn.init.normal_(block.conv2[-1].weight, std=0.05)
    return net


def test_time_embedding_is_sines_and_cosines_of_32_frequencies():
    emb = ddpm.timestep_embedding(torch.tensor([1, 7, 1000]))
    for row, t in zip(emb, (1, 7, 1000)):
        angles = [t * 10 ** (-4 * i / 31) for i in range(32)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-3)


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block, x, emb = ddpm.ResidualBlock(32), torch.randn(2, 32, 6, 6), torch.randn(2, 64)
    bias = block.conv2[-1].bias.view(32, 1, 1)
    torch.testing.assert_close(block(x, emb), x + bias)  # at first
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    (norm1, _, conv1), (norm2, _, conv2) = block.conv1, block.conv2
    silu = lambda z: z * torch.sigmoid(z)  # noqa: E731
    h = conv1(silu(norm1(x))) + block.time(emb).view(2, 32, 1, 1)
    torch.testing.assert_close(block(x, emb), x + conv2(silu(norm2(h))))
    assert (block(x, emb) - block(x, emb + torch.randn(64))).abs().max() > 0.01


def test_network_keeps_images_apart_and_depends_on_the_time(net):
    x, t = torch.randn(5, 1, 28, 28), torch.tensor([1, 5, 100, 500, 1000])
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x[order], t[order]), net(x, t)[order], rtol=1e-4, atol=1e-5)
    assert (net(x, t) - net(x, t + 1)).abs().amax((1, 2, 3)).min() > 1e-5
    x = torch.randn(2, 1, 32, 32)
    assert ddpm.UNet(32)(x, torch.tensor([10, 11])).shape == x.shape


def test_every_parameter_matters_and_one_corner_sees_the_other(net):
    """The vector of the whole image carries every pixel, also at the time that is asked for."""
    x = torch.randn(2, 1, 28, 28, requires_grad=True)
    net(x, torch.tensor([9, 700]))[:, 0, -1, -1].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    assert (x.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("grow, down, up", [("grow2", "down2", "up2"), ("grow1", "down1", "up1")])
def test_both_skips_are_added(net, grow, down, up):
    seen = {}
    for name in (grow, down, up):
        layer = getattr(net, name)
        layer.register_forward_hook(
            lambda layer, inputs, out, name=name: seen.update({name: (inputs[0], out)}))
    net(torch.randn(2, 1, 28, 28), torch.tensor([9, 700]))
    torch.testing.assert_close(seen[up][0], seen[grow][1] + seen[down][1])


def test_eight_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    x0, net = ddpm.to_float(ddpm.draw_characters(8)[0]), ddpm.UNet()
    t, eps = torch.linspace(50, 900, 8).long(), torch.randn_like(x0)
    optimizer, x_t = torch.optim.Adam(net.parameters(), 4e-3), CHAIN.q_sample(x0, t, eps)
    for step in range(40):
        loss = (net(x_t, t) - eps).square().mean()
        assert step > 0 or loss.item() > 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.03


# ---- Training ------------------------------------------------------------------------


class Scale(nn.Module):
    """ε_θ = w x_t: one parameter, of which the best value is known."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t):
        assert self.training
        return self.w * x


class Watched(ddpm.Diffusion):
    """A chain that remembers what was asked of it in training."""

    def q_sample(self, x0, t, eps):
        self.__dict__.setdefault("seen", []).append((x0, t, eps))
        return super().q_sample(x0, t, eps)


def train(model, images, *flags, chain=None):
    """The script's own `train`; returns the chain and the history."""
    chain, history = chain or Watched(1000), []
    ddpm.train(ddpm.get_args([*map(str, flags)]), chain, model, images, history)
    return chain, history


def test_training_draws_images_times_and_noise_as_algorithm_1_does():
    torch.manual_seed(0)
    images = torch.arange(250, dtype=torch.uint8).view(250, 1, 1).expand(250, 4, 4)
    chain, _ = train(Scale().eval(), images, "--epochs", 40, "--batch-size", 60, chain=Watched(25))
    x0, t, eps = (torch.cat(tensors) for tensors in zip(*chain.seen))
    assert [len(t) for _, t, _ in chain.seen] == 40 * [60, 60, 60, 60, 10]
    counts = t.bincount(minlength=26)
    assert counts[0] == 0 and len(counts) == 26  # t is in 1..T ...
    assert counts[1:].min() > 320 and counts[1:].max() < 480, counts  # ... 400 times each
    order = ((x0[:, 0, 0, 0] + 1) * 127.5).round().view(40, 250)
    assert order.sort(1).values.equal(torch.arange(250.0).expand(40, 250))  # each image once
    assert not (order[1:] == order[:-1]).all(1).any()  # in another order each time
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert eps.view(10000, 16).T.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    assert abs(torch.corrcoef(torch.stack([t.float(), eps.square().mean((1, 2, 3))]))[0, 1]) < 0.05


def test_training_finds_the_best_linear_model():
    """For black images x_t = -signal + noise ε, and w = E[ε x_t] / E[x_t²] = E[√(1-ᾱ_t)]."""
    torch.manual_seed(0)
    black, model = torch.zeros(4096, 4, 4, dtype=torch.uint8), Scale()
    _, history = train(model, black, "--epochs", 4, "--lr", 0.02)
    w = (1 - BAR[1:]).sqrt().mean().item()
    assert model.w.item() == pytest.approx(w, abs=0.01)
    step, loss, _ = history[-1]
    assert 480 < step <= 512 and 18 <= len(history) <= 20
    assert loss == pytest.approx(1 - w**2, abs=0.03)  # E[ε²] - w² E[x_t²]
    model.w.data.zero_()
    train(model, black, "--epochs", 4, "--lr", 0.02)
    assert model.w.item() == pytest.approx(w, abs=0.03)  # a second phase trains as well


class Slope(nn.Module):
    """The gradient of its w is a chosen number at each step, whatever the data are."""

    def __init__(self, slopes):
        super().__init__()
        self.w, self.slopes, self.path = nn.Parameter(torch.tensor(0.0)), iter(slopes), []

    def forward(self, x, t):
        self.path.append(self.w.item())
        return x.detach() * 0 + 1e4 + (self.w - self.w.detach()) * next(self.slopes)


def test_training_is_adam_that_forgets_fast_with_a_rate_that_ends_at_zero():
    """Constant gradients: each step is the learning rate. And after one large gradient, steps
    recover as in torch's Adam with β2 = 0.99."""
    large, paths = [1.0] * 20 + [100.0] + [1.0] * 179, []
    for slopes in ([1.0] * 200, large):
        model = Slope(slopes)
        train(model, torch.zeros(320, 4, 4, dtype=torch.uint8), "--epochs", 20, "--lr", 0.01)
        paths.append(-np.diff(model.path))
    rates, disturbed = paths
    assert len(rates) == 199 and rates.max() == pytest.approx(0.01, rel=0.02)
    assert rates.min() > 0 and rates[-1] < 1e-4 and (np.diff(rates[100:]) < 1e-6).all()
    w = torch.zeros(1, requires_grad=True)
    adam, path = torch.optim.Adam([w], 1.0, betas=(0.9, 0.99)), []
    for slope in large:
        path.append(w.item())
        w.grad = torch.tensor([slope])
        adam.step()
    expected = -np.diff(path)[150:]
    assert (disturbed / rates)[150:] == pytest.approx(expected, rel=0.05)  # the schedule cancels


# ---- What a run reports --------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main` on white images to train and black ones to test: module, folder, figures."""
    patch = pytest.MonkeyPatch()
    white, labels = torch.full([512, 28, 28], 255, dtype=torch.uint8), torch.zeros(512).long()
    patch.setattr(ddpm, "load_data", lambda args: (white, labels, 0 * white, labels, "mine"))
    out = tmp_path_factory.mktemp("run")
    ddpm.main(["--quick", "--samples", "13", "--out", str(out), "--device", "cpu"])
    patch.undo()
    figures = [ddpm.plt.figure(number) for number in ddpm.plt.get_fignums()[-2:]]
    return out, json.loads((out / "metrics.json").read_text()), figures


def test_the_bound_is_that_of_the_trained_model_on_test_images(a_run):
    out, metrics, _ = a_run
    net = ddpm.UNet()
    net.load_state_dict(torch.load(out / "model.pt", weights_only=True)["weights"])
    black = torch.full([16, 1, 28, 28], -1.0)
    bounds = [ddpm.bound_terms(ddpm.Diffusion(30), net, x).sum(1).mean().item()
              for x in (black, black, black, -black)]
    (name, value), = metrics["results"].items()
    assert "bits/dim" in name and min(bounds[:3]) * 0.97 < value < max(bounds[:3]) * 1.03
    assert not 0.97 < value / bounds[3] < 1.03  # training images would give another number


def test_samples_and_pictures_show_what_they_say(a_run):
    out, metrics, (bound, chain) = a_run
    images = np.load(out / "samples.npz")["images"]
    assert images.shape == (13, 28, 28) and images.dtype == np.uint8
    weights, terms = sorted(bound.axes[0].lines, key=lambda line: "bits" in line.get_label())
    assert "bits/dim" in terms.get_label() and "weight" in weights.get_label()
    assert terms.get_xdata()[[0, -1]].tolist() == weights.get_xdata()[[0, -1]].tolist() == [1, 30]
    diffusion = ddpm.Diffusion(30)
    expected = ddpm.dropped_weight(diffusion, torch.arange(1, 31)).flatten()
    torch.testing.assert_close(torch.as_tensor(weights.get_ydata()), expected)
    value, = metrics["results"].values()
    assert np.asarray(terms.get_ydata()).sum() == pytest.approx(value, abs=0.01)  # L_T is small
    assert all(axes.get_xlabel() == "t" and axes.get_ylabel() for axes in bound.axes)
    left, right = (np.asarray(axes.images[0].get_array()).squeeze() for axes in chain.axes)
    tile = lambda picture, row, column: picture[30 * row + 1:30 * row + 29,  # noqa: E731
                                                30 * column + 1:30 * column + 29]
    assert np.abs(tile(right, 1, 2) - images[12] / 255).max() < 0.01
    assert "t = 30, ..., 1" in chain.axes[0].get_title()
    q_first, q_last = tile(left, 0, 0), tile(left, 0, 10)  # rows: q, x_t, and what it sees
    assert q_first.std() > 0.3 and q_last.mean() < 0.15  # noise at t = 30, black at t = 1
    x_t, x0_hat = tile(left, 3, 10), tile(left, 6, 10)
    assert tile(left, 3, 0).std() > 0.3
    assert np.abs(x_t - x0_hat).mean() < 0.15  # at t = 1 hardly any noise is left
