"""The mathematics of 03_ddpm.py against closed forms, Bayes' rule and known answers."""

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


def every(t, count):
    return torch.full((count,), t)


def gaussian_model(chain, std):
    """The best ε for data N(0, std²): E[ε | x_t] = √(1-ᾱ_t) x_t / (ᾱ_t std² + 1 - ᾱ_t)."""
    def model(x, t):
        bar = chain.alpha_bars[t].view(-1, *[1] * (x.dim() - 1))
        return ((1 - bar).sqrt() / (bar * std ** 2 + 1 - bar)).to(x) * x
    return model


def fixed_model(chain, x0):
    """An oracle that knows x_0, and so the noise in x_t."""
    def model(x, t):
        bar = chain.alpha_bars[t].view(-1, *[1] * (x.dim() - 1))
        return ((x - bar.sqrt() * x0) / (1 - bar).sqrt()).to(x)
    return model


# ---- The forward process and its posterior ----------------------------------------------------


def test_schedule_counts_from_one_and_ends_in_noise():
    assert CHAIN.alpha_bars.dtype == torch.float64 and len(CHAIN.alpha_bars) == 1001
    assert CHAIN.alpha_bars[0] == 1
    assert CHAIN.alpha_bars[1] == 1 - 1e-4
    assert CHAIN.betas[[1, 1000]].tolist() == pytest.approx([1e-4, 0.02])
    assert CHAIN.alpha_bars[-1] < 1e-4
    one = torch.ones(1, 1, dtype=torch.float64)
    assert CHAIN.q_posterior(one, one, torch.tensor([1]))[1] == 0  # β̃_1


@pytest.mark.parametrize("T", [25, 50, 100, 1000])
def test_a_chain_of_any_length_ends_in_noise(T):
    chain = ddpm.Diffusion(T)
    assert chain.T == T and chain.alpha_bars[-1] < 1e-4 and chain.betas.max() < 1
    if T == 50:
        assert chain.betas[1:].tolist() == pytest.approx(np.linspace(0.002, 0.4, 50).tolist())


def test_many_steps_are_one_jump():
    x0, mean, variance = 0.7, torch.full((1,), 0.7, dtype=torch.float64), 0.0
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for t in range(1, 1001):  # a step is linear: follow its mean and variance exactly
        t = torch.tensor([t])
        mean = CHAIN.q_step(mean, t, zero)
        variance = CHAIN.q_step(one, t, zero) ** 2 * variance + CHAIN.q_step(zero, t, one) ** 2
        if t in (1, 10, 300, 1000):
            jump = CHAIN.q_sample(torch.full_like(one, x0), t, zero)
            noise = CHAIN.q_sample(zero, t, one)
            torch.testing.assert_close(mean, jump, rtol=1e-10, atol=0)
            torch.testing.assert_close(variance, noise ** 2, rtol=1e-10, atol=0)


def test_many_random_steps_have_the_moments_of_one_jump():
    torch.manual_seed(0)
    n, t = 40000, 200
    x = torch.full((n,), 0.7)
    for step in range(1, t + 1):
        x = CHAIN.q_step(x, every(step, n), torch.randn(n))
    bar = CHAIN.alpha_bars[t].item()
    assert abs(x.mean().item() - 0.7 * bar ** 0.5) < 4 * ((1 - bar) / n) ** 0.5
    assert abs(x.var().item() - (1 - bar)) < 4 * (1 - bar) * (2 / n) ** 0.5


@pytest.mark.parametrize("t", [2, 40, 500, 1000])
def test_posterior_is_bayes_rule(t):
    x0, x_t = torch.tensor([[[0.3]], [[-0.8]]], dtype=torch.float64)
    bar, alpha = CHAIN.alpha_bars[t - 1], 1 - CHAIN.betas[t]
    # prior x_{t-1} ~ N(√ᾱ_{t-1} x_0, 1-ᾱ_{t-1}), likelihood x_t ~ N(√α x_{t-1}, 1-α): precisions add
    precision = 1 / (1 - bar) + alpha / (1 - alpha)
    expected = (bar.sqrt() * x0 / (1 - bar) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    mean, variance = CHAIN.q_posterior(x0, x_t, torch.tensor([t]))
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, (1 / precision).view(1, 1), rtol=1e-9, atol=0)


def test_mean_of_the_reverse_step_is_that_of_algorithm_2():
    torch.manual_seed(0)
    x0 = torch.rand(999, 3, dtype=torch.float64) * 2 - 1
    noise = torch.randn_like(x0)
    t = torch.arange(2, 1001)
    x_t = CHAIN.q_sample(x0, t, noise)
    from_x0 = CHAIN.q_posterior(x0, x_t, t)[0]
    beta, bar = CHAIN.betas[t, None], CHAIN.alpha_bars[t, None]
    from_noise = (x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt()  # eq. 5.32
    torch.testing.assert_close(from_x0, from_noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(CHAIN.predict_x0(x_t, t, noise), x0, rtol=1e-8, atol=1e-8)
    mean, variance, x0_hat = CHAIN.p_mean_variance(lambda x, t: noise, x_t, t)  # |x_0| <= 1
    torch.testing.assert_close(mean, from_noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(variance, beta, rtol=1e-8, atol=0)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-8, atol=1e-8)


def test_the_estimate_of_x0_is_kept_in_the_range_of_pixels():
    x = torch.tensor([[3.0, -3.0, 0.1]])
    mean, _, x0 = CHAIN.p_mean_variance(lambda x, t: 0 * x, x, torch.tensor([500]))
    bar = CHAIN.alpha_bars[500].item()
    torch.testing.assert_close(x0, torch.tensor([[1.0, -1.0, 0.1 / bar ** 0.5]]))
    torch.testing.assert_close(mean, CHAIN.q_posterior(x0, x, torch.tensor([500]))[0])


def test_pixels_go_to_minus_one_one_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    x = ddpm.scale(levels)
    assert x.shape == (1, 1, 16, 16) and x.min() == -1 and x.max() == 1
    assert ((x + 1) * 127.5).round().byte().equal(levels[None])


# ---- The bound --------------------------------------------------------------------------------


def test_every_term_of_the_bound_is_the_divergence_of_torch_distributions():
    chain = ddpm.Diffusion(40)
    x0 = ddpm.scale(torch.randint(256, (3, 4, 4)).byte()).double()
    model = lambda x, t: torch.tanh(x * 0.8)  # noqa: E731: any function of x_t
    torch.manual_seed(1)
    terms = chain.vlb(model, x0)
    assert terms.shape == (3, 41)
    L_T = terms[:, 40]
    bits = 16 * math.log(2)
    bar = chain.alpha_bars
    prior = kl_divergence(Normal(bar[-1].sqrt() * x0, (1 - bar[-1]).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(L_T, prior.double().flatten(1).sum(1) / bits, rtol=1e-6, atol=1e-9)
    torch.manual_seed(1)
    for t in range(1, 41):  # the same noise again, the terms one by one
        x_t = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * torch.randn_like(x0)
        x0_hat = ((x_t - (1 - bar[t]).sqrt() * model(x_t, t)) / bar[t].sqrt()).clamp(-1, 1)
        beta, share = chain.betas[t], 1 / (1 - bar[t])
        mean = lambda x: share * (bar[t - 1].sqrt() * beta * x  # noqa: E731: eq. 5.28
                                  + (1 - beta).sqrt() * (1 - bar[t - 1]) * x_t)
        p = Normal(mean(x0_hat), beta.sqrt())
        if t == 1:
            k = ((x0 + 1) * 127.5).round()
            high = torch.where(k == 255, 1.0, p.cdf((k + 0.5) / 127.5 - 1))
            low = torch.where(k == 0, 0.0, p.cdf((k - 0.5) / 127.5 - 1))
            nats = -torch.log(high - low)
        else:
            q = Normal(mean(x0), (beta * (1 - bar[t - 1]) * share).sqrt())
            nats = kl_divergence(q, p)
        torch.testing.assert_close(terms[:, t - 1], nats.flatten(1).sum(1) / bits)


@pytest.mark.parametrize("mean, std", [(0.0, 0.01), (-1.0, 0.02), (0.97, 0.3), (3.0, 0.5)])
def test_decoder_shares_one_among_the_256_levels(mean, std):
    levels = torch.arange(256) / 127.5 - 1
    log_p = ddpm.discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(std))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert not log_p.isnan().any()


def test_decoder_keeps_its_digits_far_from_the_mean():
    x, mean, std = (torch.tensor(v, dtype=torch.float64) for v in (0.5 / 127.5, 0.5, 0.02))
    log_p = ddpm.discretized_log_likelihood(x.float(), mean.float(), std.float())
    density = Normal(mean, std).log_prob(x + 1 / 255) + math.log(2 / 255)  # near edge of the bin
    assert torch.isfinite(log_p) and abs(log_p - density) < 4  # of about -300
    assert log_p.item() == pytest.approx(
        ddpm.discretized_log_likelihood(x, mean, std).item(), rel=1e-4)


def l0_approximation(x0, mean, variance):
    """The nats of a pixel by the narrow-bin approximation of ex. 5.5, with its constant."""
    density = -(x0 - mean).square() / (2 * variance) - 0.5 * torch.log(2 * math.pi * variance)
    return -density - math.log(2 / 255)


def test_bound_of_a_perfect_model_is_the_entropy_plus_what_sigma_costs():
    torch.manual_seed(0)
    std, n, bar = 0.25, 16000, CHAIN.alpha_bars
    pixels = ((torch.randn(n, 1, dtype=torch.float64) * std).clamp(-1, 1) * 127.5 + 127.5).round()
    x0 = pixels / 127.5 - 1
    model = gaussian_model(CHAIN, std)
    terms = CHAIN.vlb(model, x0)
    total = terms.sum(1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std ** 2) - math.log(2 / 255)
    # For data N(0, std²) the true p(x_{t-1} | x_t) is Gaussian; σ² = β_t is a little too wide:
    var = bar * std ** 2 + 1 - bar  # of x_t
    ratio = var[:-1] / var[1:]  # true variance β_t var_{t-1} / var_t, over β_t
    gap = (0.5 * (ratio - 1 - ratio.log())).sum() + 0.5 * (var[-1] - 1 - var[-1].log())
    expected = (entropy + gap.item()) / math.log(2)
    error = total.std().item() / n ** 0.5
    assert error < 0.02
    assert abs(total.mean().item() - expected) < 4 * error
    x_1 = CHAIN.q_sample(x0, every(1, n), torch.randn_like(x0))
    mean, variance, _ = CHAIN.p_mean_variance(model, x_1, every(1, n))
    near = l0_approximation(x0, mean, variance).sum(1) / math.log(2)
    assert abs(near.mean() - terms[:, 0].mean()) < 4 * error  # ex. 5.5: bins are narrow here


def reverse_mean(x_t, t, eps):
    """μ_θ for a given estimate of the noise, without clipping (eq. 5.32)."""
    return CHAIN.q_posterior(CHAIN.predict_x0(x_t, t, eps), x_t, t)[0]


def test_weighted_noise_error_plus_constant_is_the_divergence():  # ex. 5.4 and 5.6
    torch.manual_seed(0)
    t, x0, noise, guess = torch.arange(2, 1001), *torch.randn(3, 999, 4, dtype=torch.float64)
    x_t = CHAIN.q_sample(x0, t, noise)
    mean, variance = reverse_mean(x_t, t, guess), CHAIN.betas[t, None]
    kl = ddpm.gaussian_kl(*CHAIN.q_posterior(x0, x_t, t), mean, variance).sum(1)
    ratio = (1 - CHAIN.alpha_bars[t - 1]) / (1 - CHAIN.alpha_bars[t])  # β̃_t / β_t
    constant = 4 * 0.5 * (ratio - 1 - ratio.log())
    weighted = CHAIN.dropped_weight(t) * (noise - guess).square().sum(1)
    torch.testing.assert_close(kl, weighted + constant, rtol=1e-7, atol=1e-9)


def test_first_term_is_near_the_noise_error_of_exercise_5_5():
    torch.manual_seed(0)
    x0 = torch.rand(500, 4, dtype=torch.float64) - 0.5  # away from the edges
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    noise, guess, t = torch.randn_like(x0), torch.randn_like(x0), every(1, 500)
    mean = reverse_mean(CHAIN.q_sample(x0, t, noise), t, guess)
    beta = CHAIN.betas[1]
    error = beta / (2 * beta * (1 - beta)) * (noise - guess).square()  # σ_1² = β_1
    torch.testing.assert_close((x0 - mean).square() / (2 * beta), error, rtol=1e-6, atol=1e-9)
    exact = -ddpm.discretized_log_likelihood(x0, mean, beta.sqrt())
    constant = 0.5 * math.log(2 * math.pi * beta) - math.log(2 / 255)
    assert abs((exact - error - constant).mean()) < 0.05 * exact.mean()
    torch.testing.assert_close(l0_approximation(x0, mean, beta), error + constant)
    black = torch.tensor(-1.0, dtype=torch.float64)  # at the edge it fails, even for mean = x0
    nats = -ddpm.discretized_log_likelihood(black, black, beta.sqrt())
    assert nats.item() == pytest.approx(0.43, abs=0.005)
    assert constant == pytest.approx(1.16, abs=0.005)


def test_dropped_weight_is_that_of_the_exercise():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    expected = beta ** 2 / (2 * beta * (1 - beta) * (1 - bar))
    torch.testing.assert_close(CHAIN.dropped_weight(torch.arange(1, 1001)), expected)
    assert expected[0] == pytest.approx(0.5, rel=1e-3)


# ---- The continuous view (ex. 5.3) ------------------------------------------------------------


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
    bar = CHAIN.alpha_bars
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    u = transition_density(torch.tensor(0.0), torch.tensor(0.7), torch.tensor(0.3).double(), z)
    mean = torch.trapezoid(u * z, z)
    assert torch.trapezoid(u, z).item() == pytest.approx(1)
    assert mean.item() == pytest.approx(0.7 * bar[300].sqrt().item(), rel=0.01)
    variance = torch.trapezoid(u * (z - mean) ** 2, z)
    assert variance.item() == pytest.approx(1 - bar[300].item(), rel=0.01)


# ---- Sampling ---------------------------------------------------------------------------------


def samplers(steps, eta=0.0):
    """Both samplers with the same signature; DDPM always takes all T steps."""
    if steps is None:
        return CHAIN.sample
    return lambda model, x: CHAIN.sample_ddim(model, x, steps, eta)


@pytest.mark.parametrize("steps, eta", [(None, 1), (1000, 0), (7, 0), (1, 0), (50, 1.7), (5, 9)])
def test_with_the_true_noise_samplers_return_x0(steps, eta):
    torch.manual_seed(0)
    x0 = torch.rand(4, 1, 5, 5, dtype=torch.float64) * 2 - 1
    x = samplers(steps, eta)(fixed_model(CHAIN, x0), torch.randn_like(x0))
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_sample_is_algorithm_2_in_a_plain_loop():
    chain = ddpm.Diffusion(30)
    x = start = torch.randn(5, 2, dtype=torch.float64)
    model = gaussian_model(chain, 0.2)
    frames = []
    torch.manual_seed(3)
    sampled = chain.sample(model, start, frames)
    torch.manual_seed(3)
    for t in range(30, 0, -1):  # the lines of Algorithm 2, σ_t² = β_t
        beta, bar = chain.betas[t], chain.alpha_bars[t]
        assert frames[30 - t][0] == t
        torch.testing.assert_close(frames[30 - t][1], x)
        eps = model(x, every(t, 5))
        z = torch.randn_like(x) if t > 1 else torch.zeros_like(x)
        x = (x - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt() + beta.sqrt() * z
    assert all(x0.abs().max() < 1 for _, _, x0 in frames)  # nothing was clipped
    torch.testing.assert_close(sampled, x)


def test_ddim_with_eta_1_is_the_chain_with_the_posterior_variance():
    x, model = torch.randn(8, 3, dtype=torch.float64), lambda x, t: torch.tanh(x)
    torch.manual_seed(3)
    ddim = CHAIN.sample_ddim(model, x, 1000, 1.0)
    torch.manual_seed(3)
    for t in range(1000, 0, -1):
        _, _, x0 = CHAIN.p_mean_variance(model, x, every(t, 8))
        mean, variance = CHAIN.q_posterior(x0, x, every(t, 8))
        x = mean + variance.sqrt() * torch.randn_like(x)
    torch.testing.assert_close(ddim, x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.3])
def test_a_ddim_step_is_equation_12_of_its_paper(eta):
    x, seen = torch.randn(6, 2, dtype=torch.float64), []

    def model(x, t):
        seen.append((t, x))
        return 0.9 * x

    torch.manual_seed(5)
    CHAIN.sample_ddim(model, x, 2, eta)
    torch.manual_seed(5)
    bar_t, bar_s = CHAIN.alpha_bars[[1000, 500]]
    x0 = ((x - (1 - bar_t).sqrt() * 0.9 * x) / bar_t.sqrt()).clamp(-1, 1)
    eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()  # the noise that goes with the clipped x_0
    sigma = eta * ((1 - bar_s) / (1 - bar_t)).sqrt() * (1 - bar_t / bar_s).sqrt()  # eq. 16
    sigma = sigma.minimum((1 - bar_s).sqrt())
    old = (1 - bar_s - sigma ** 2).clamp(min=0).sqrt()
    expected = bar_s.sqrt() * x0 + old * eps + sigma * torch.randn_like(x)  # eq. 12
    assert [t.tolist() for t, _ in seen] == [[1000] * 6, [500] * 6]
    torch.testing.assert_close(seen[1][1], expected)


def test_few_steps_with_the_exact_noise_narrow_the_samples():
    """The numbers in the header: a step is linear, so the variance can be followed exactly."""
    torch.manual_seed(0)
    for eta, expected in ((1.9, 0.19), (0, 0.27)):
        variance, bars = 1.0, CHAIN.alpha_bars[::20].flip(0).tolist()  # 50 steps
        for bar_t, bar_s in zip(bars, bars[1:]):
            total = bar_t * 0.09 + 1 - bar_t  # Var x_t; the best estimates are linear in x_t
            sigma2 = min(eta ** 2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s), 1 - bar_s)
            slope = bar_s ** 0.5 * bar_t ** 0.5 * 0.09 / total
            slope += ((1 - bar_s - sigma2) * (1 - bar_t)) ** 0.5 / total
            variance = slope ** 2 * variance + sigma2
        assert variance ** 0.5 == pytest.approx(expected, abs=0.005)
        x = CHAIN.sample_ddim(gaussian_model(CHAIN, 0.3), torch.randn(20000, 1).double(), 50, eta)
        assert x.std().item() == pytest.approx(variance ** 0.5, rel=0.03)


@pytest.mark.parametrize("steps, eta", [(None, 1), (1000, 0), (1000, 0.5)])
def test_a_perfect_model_of_gaussian_data_samples_that_gaussian(steps, eta):
    torch.manual_seed(0)
    n, std = 20000, 0.25
    x = samplers(steps, eta)(gaussian_model(CHAIN, std), torch.randn(n, 1))
    assert abs(x.mean().item()) < 4 * std / n ** 0.5
    assert x.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("steps, expected", [
    (None, list(range(1000, 0, -1))), (10, list(range(1000, 0, -100))),
    (5000, list(range(1000, 0, -1)))])
def test_sampling_visits_every_time_and_starts_at_T(steps, expected):
    seen = []
    samplers(steps)(lambda x, t: seen.append(t.tolist()) or 0 * x, torch.zeros(2, 1))
    assert seen == [[t, t] for t in expected]


# ---- The network ------------------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ddpm.UNet(8)


def test_time_embedding_has_sine_and_cosine_at_the_same_frequency(net):
    seen = []
    net.time.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(torch.randn(1000, 1, 4, 4), torch.arange(1, 1001))
    sine, cosine = seen[0].chunk(2, 1)
    torch.testing.assert_close(sine ** 2 + cosine ** 2, torch.ones_like(sine))
    assert (sine[1:] - sine[:-1]).abs().amax(0).min() > 1e-6  # no frequency is dead
    torch.testing.assert_close(sine[:, 0], torch.arange(1, 1001).float().sin(), rtol=0, atol=1e-4)


def test_network_depends_on_the_time(net):
    x = torch.randn(1, 1, 28, 28).expand(2, -1, -1, -1)
    a, b = net(x, torch.tensor([10, 11]))
    assert (a - b).abs().max() > 1e-4
    for block in net.modules():  # and it does so in every block
        if isinstance(block, ddpm.ResidualBlock):
            h = torch.randn(1, block.norm1.num_channels, 8, 8)
            one, two = block(h, torch.zeros(1, 64)), block(h, torch.ones(1, 64))
            assert (one - two).abs().max() > 1e-3


def test_network_treats_images_of_a_batch_apart(net):
    x, t = torch.randn(5, 1, 28, 28), torch.tensor([1, 5, 100, 500, 1000])
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x[order], t[order]), net(x, t)[order], rtol=1e-4, atol=1e-5)


def test_every_skip_reaches_its_level_and_matters(net):
    x, t, made, taken = torch.randn(2, 1, 28, 28), torch.tensor([9, 700]), {}, {}
    pairs = {1: (net.down1, net.up1), 2: (net.down2, net.up2)}
    for i, (down, up) in pairs.items():
        down.register_forward_hook(lambda m, a, out, i=i: made.update({i: out}))
        up.register_forward_pre_hook(lambda m, a, i=i: taken.update({i: a[0]}))
    before = net(x, t)
    for i, (_, up) in pairs.items():
        channels = made[i].shape[1]
        assert taken[i][:, -channels:].equal(made[i])
        cut = up.register_forward_pre_hook(
            lambda m, a, c=channels: (torch.cat([a[0][:, :-c], 0 * a[0][:, -c:]], 1), a[1]))
        assert (net(x, t) - before).abs().max() > 1e-4
        cut.remove()


def test_a_block_is_its_formula(net):
    block, x, time = net.down2, torch.randn(2, 8, 6, 6), torch.randn(2, 64)
    scale, shift = block.time(time).view(2, 2, 16, 1, 1).unbind(1)
    silu = lambda z: z * torch.sigmoid(z)  # noqa: E731
    h = block.norm2(block.conv1(silu(block.norm1(x))))
    expected = block.skip(x) + block.conv2(silu((1 + scale) * h + shift))
    torch.testing.assert_close(block(x, time), expected)


def test_network_overfits_sixteen_images():
    torch.manual_seed(0)
    x0 = ddpm.scale(ddpm.draw_characters(16, 0)[0])
    t, noise = torch.linspace(50, 900, 16).long(), torch.randn_like(x0)
    net = ddpm.UNet(16)
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    x_t = CHAIN.q_sample(x0, t, noise)
    for step in range(150):
        loss = (net(x_t, t) - noise).square().mean()
        if step == 0:
            assert loss.item() > 0.5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


# ---- Training ---------------------------------------------------------------------------------


class Linear(nn.Module):
    """ε_θ = w x_t: one parameter, whose gradient is known. Remembers what it was asked."""

    def __init__(self, w=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.asked = []

    def forward(self, x, t):
        if self.training and torch.is_grad_enabled():
            self.asked.append((x.detach().clone(), t.clone()))
        return self.w * x


def train(model, images, *flags, T=1000):
    """The script's own `train`; returns history and snapshots."""
    args = ddpm.get_args(["--T", str(T), *flags])
    history, snapshots = [], []
    ddpm.train(args, ddpm.Diffusion(T), model, images, history, snapshots)
    return history, snapshots


def images_of(value, count):
    return torch.full((count, 4, 4), value, dtype=torch.uint8)


@pytest.fixture
def small_snapshots(monkeypatch):
    """Snapshots of 28x28 are slow here and are tested elsewhere."""
    monkeypatch.setattr(ddpm.Diffusion, "sample_ddim", lambda self, model, x, steps, eta: x)


def test_training_is_algorithm_1_on_the_training_images(small_snapshots):
    torch.manual_seed(0)
    model = Linear()
    train(model, images_of(255, 4000), "--epochs", "2", "--batch-size", "500", "--lr", "1e-9", T=30)
    assert len(model.asked) == 16
    chain = ddpm.Diffusion(30)
    t = torch.cat([t for _, t in model.asked])
    counts = t.bincount(minlength=31)
    assert counts[0] == 0 and len(counts) == 31  # no t outside of 1..T
    assert counts[1:].min() > 200 and counts[1:].max() < 335, counts  # 267 on average
    for x_t, t in model.asked:  # x_t is q_sample of white images with noise N(0, 1)
        bar = chain.alpha_bars[t].float().view(-1, 1, 1, 1)
        eps = (x_t - bar.sqrt()) / (1 - bar).sqrt()
        assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
        assert eps.flatten(1).std(0).min() > 0.8  # every pixel and image its own noise


def test_training_is_adam_on_the_squared_error_with_a_cosine(small_snapshots):
    images = torch.randint(256, (40, 4, 4)).byte()
    flags = ["--epochs", "3", "--batch-size", "16", "--lr", "0.05"]
    torch.manual_seed(5)
    model = Linear(0.3)
    history, _ = train(model, images, *flags)
    torch.manual_seed(5)
    torch.randn(10, 1, 28, 28)  # the noise of the snapshots
    w = torch.tensor(0.3, dtype=torch.float64)
    m = v = torch.zeros((), dtype=torch.float64)
    steps, step, losses = 9, 0, []
    for _ in range(3):
        for batch in torch.randperm(40).split(16):  # 16, 16 and 8 images
            x0 = images[batch, None].float() / 127.5 - 1
            t = torch.randint(1, 1001, (len(x0),))
            noise = torch.randn_like(x0)
            x_t = CHAIN.q_sample(x0, t, noise).double()
            losses.append((w * x_t - noise).square().mean())
            gradient = (2 * (w * x_t - noise) * x_t).mean()
            step += 1
            m = 0.9 * m + 0.1 * gradient  # Adam with β = 0.9 and 0.99
            v = 0.99 * v + 0.01 * gradient ** 2
            lr = 0.05 * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
            w = w - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.99 ** step)).sqrt() + 1e-8)
    assert model.w.item() == pytest.approx(w.item(), rel=1e-4)
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["loss"] for row in history] == pytest.approx([x.item() for x in losses], rel=1e-4)


def test_reported_loss_is_the_mean_since_the_last_report(small_snapshots):
    torch.manual_seed(0)
    history, snapshots = train(Linear(), images_of(0, 45), "--epochs", "2", "--batch-size", "1",
                               "--lr", "1e-9")
    torch.manual_seed(0)
    torch.randn(10, 1, 28, 28)  # the noise of the snapshots
    losses = []
    for _ in range(2):
        torch.randperm(45)
        for _ in range(45):
            torch.randint(1, 1001, (1,))
            losses.append(torch.randn(1, 1, 4, 4).square().mean().item())  # ε_θ stays near 0
    assert [row["step"] for row in history] == list(range(5, 91, 5))
    assert len(snapshots) == len(history)
    expected = [sum(losses[i:i + 5]) / 5 for i in range(0, 90, 5)]
    assert [row["loss"] for row in history] == pytest.approx(expected, rel=1e-4)


def test_two_phases_of_training_both_train(small_snapshots):
    model, images = Linear(), images_of(0, 64)
    flags = ["--epochs", "2", "--batch-size", "16"]
    train(model, images, *flags)
    after_one = model.w.item()
    train(model, images, *flags)
    assert len(model.asked) == 16 and model.w.item() != after_one


def test_snapshots_come_from_the_model_and_one_noise(monkeypatch):
    seen = []
    model = Linear()
    monkeypatch.setattr(ddpm.Diffusion, "sample_ddim",
                        lambda self, m, x, steps, eta: seen.append((m, x.clone(), eta)) or x)
    train(model, images_of(0, 8), "--epochs", "3", "--batch-size", "8")
    assert len(seen) == 3 and all(m is model and eta == 0 for m, _, eta in seen)
    assert all(x.equal(seen[0][1]) and x.shape == (10, 1, 28, 28) for _, x, _ in seen)


def test_snapshots_are_shown_from_the_last_one_on_in_steps_of_three(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ddpm, "show_grid", lambda axes, images, *rest: shown.append(images))
    args = ddpm.get_args(["--out", str(tmp_path)])
    (tmp_path / "03_ddpm").mkdir()
    for count, expected in ((20, [19, 16, 13, 10, 7, 4, 1]), (1, [0])):
        snapshots = [torch.full((10, 1, 28, 28), i / 10) for i in range(count)]
        ddpm.plot_training(args, [{"step": 1, "loss": 0.5}], snapshots)
        rows = (shown[-1] * 2 - 1)[::10, 0, 0, 0] * 10
        assert rows.round().tolist() == expected


def test_the_bound_is_reported_on_test_images_and_the_trained_model(tmp_path, monkeypatch, capsys):
    white, black = images_of(255, 64), images_of(0, 32)
    white, black = (x.repeat(1, 7, 7) for x in (white, black))
    labels = torch.zeros(64, dtype=torch.long)
    monkeypatch.setattr(ddpm, "load_data", lambda args: (white, labels, black, labels[:32], "mine"))
    asked, drawn = [], []
    vlb = ddpm.Diffusion.vlb

    def spy(self, model, x0):
        asked.append(x0)
        terms = vlb(self, model, x0)
        drawn.append((model, terms.sum(1).mean().item()))
        return terms

    monkeypatch.setattr(ddpm.Diffusion, "vlb", spy)
    ddpm.main(["--quick", "--out", str(tmp_path), "--device", "cpu", "--samples", "10"])
    assert len(asked) == 1 and asked[0].shape == (16, 1, 28, 28) and (asked[0] == -1).all()
    metrics = json.loads((tmp_path / "03_ddpm" / "metrics.json").read_text())
    (name, value), = metrics["results"].items()
    assert "bits/dim" in name and value == pytest.approx(drawn[0][1])
    assert f'"{name}": {value}' in capsys.readouterr().out
    saved = torch.load(tmp_path / "03_ddpm" / "model.pt", weights_only=True)["weights"]
    for name, weight in drawn[0][0].state_dict().items():
        assert weight.equal(saved[name]), name
    samples = np.load(tmp_path / "03_ddpm" / "samples.npz")["images"]
    assert samples.shape == (10, 28, 28) and samples.dtype == np.uint8


@pytest.mark.parametrize("flag, sampler", [("0", "sample"), ("7", "sample_ddim")])
def test_samples_are_those_of_the_sampler_that_was_asked_for(flag, sampler, tmp_path, monkeypatch):
    result = torch.linspace(-1, 1, 784).view(1, 1, 28, 28).repeat(20, 1, 1, 1)
    calls, original = [], getattr(ddpm.Diffusion, sampler)

    def fake(self, model, x, *more, **options):
        if len(x) != 20:  # five for the chain, ten for the snapshots
            return original(self, model, x, *more, **options)
        calls.append((x, more, options))
        return result

    monkeypatch.setattr(ddpm.Diffusion, sampler, fake)
    ddpm.main(["--quick", "--data", "drawn", "--epochs", "0", "--samples", "20", "--device", "cpu",
               "--ddim-steps", flag, "--out", str(tmp_path)])
    (x_T, more, options), = calls
    assert abs(x_T.std() - 1) < 0.05 and x_T.shape == (20, 1, 28, 28)
    assert (more, options) == (() if flag == "0" else (7,), {} if flag == "0" else {"eta": 1.9})
    images = np.load(tmp_path / "03_ddpm" / "samples.npz")["images"]
    assert images.shape == (20, 28, 28) and images[0].ravel()[[0, -1]].tolist() == [0, 255]
    assert images[3].tolist() == ((result[3, 0] + 1) * 127.5).round().byte().tolist()
