"""The mathematics of 03_ddpm.py against closed forms, Bayes' rule and known answers."""

import math

import pytest
import torch
import torch.nn.functional as F
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


# ---- The chain -----------------------------------------------------------------------------------


def test_schedule_counts_from_one_and_ends_in_noise():
    assert CHAIN.alpha_bars.dtype == torch.float64 and len(CHAIN.alpha_bars) == 1001
    assert CHAIN.alpha_bars[0] == 1
    assert CHAIN.alpha_bars[1] == 1 - 1e-4
    assert CHAIN.betas[[1, 1000]].tolist() == pytest.approx([1e-4, 0.02])
    assert CHAIN.alpha_bars[-1] < 1e-4
    one = torch.ones(1, 1, dtype=torch.float64)
    assert CHAIN.q_posterior(one, one, torch.tensor([1]))[1] == 0  # β̃_1


@pytest.mark.parametrize("T", [50, 100, 1000])
def test_a_chain_of_any_length_that_main_makes_ends_in_noise(T):
    assert ddpm.Diffusion(T, 0.1 / T, 20 / T).alpha_bars[-1] < 1e-4


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


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (1000, 999), (1000, 900), (40, 20)])
def test_posterior_is_bayes_rule(t, s):
    x0, x_t = torch.tensor([[[0.3]], [[-0.8]]], dtype=torch.float64)
    bar, alpha = CHAIN.alpha_bars[s], (1 - CHAIN.betas[s + 1:t + 1]).prod()
    # prior x_s ~ N(√ᾱ_s x_0, 1-ᾱ_s), likelihood x_t ~ N(√α x_s, 1-α): precisions add
    precision = 1 / (1 - bar) + alpha / (1 - alpha)
    expected = (bar.sqrt() * x0 / (1 - bar) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    mean, variance = CHAIN.q_posterior(x0, x_t, torch.tensor([t]), torch.tensor([s]))
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(variance, (1 / precision).view(1, 1), rtol=1e-9, atol=0)


def test_both_forms_of_the_posterior_mean_agree():
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 999, 3, dtype=torch.float64)
    t = torch.arange(2, 1001)
    x_t = CHAIN.q_sample(x0, t, noise)
    from_x0 = CHAIN.q_posterior(x0, x_t, t)[0]
    beta, bar = CHAIN.betas[t, None], CHAIN.alpha_bars[t, None]
    from_noise = (x_t - beta / (1 - bar).sqrt() * noise) / (1 - beta).sqrt()  # eq. 5.32
    torch.testing.assert_close(from_x0, from_noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(CHAIN.predict_x0(x_t, t, noise), x0, rtol=1e-8, atol=1e-8)
    mean, variance, x0_hat = CHAIN.p_mean_variance(lambda x, t: noise, x_t, t, clip=False)
    torch.testing.assert_close(mean, from_noise, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(variance, beta, rtol=1e-8, atol=0)


def test_times_drawn_are_one_to_T():
    torch.manual_seed(0)
    assert ddpm.draw_t(20000, 5).unique().tolist() == [1, 2, 3, 4, 5]
    t = ddpm.draw_t(200000, 1000)
    assert t.min() >= 1 and t.max() <= 1000 and t.max() > 980 and t.min() < 5
    assert t.dtype == torch.long


def test_pixels_go_to_minus_one_one_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    x = ddpm.scale(levels)
    assert x.shape == (1, 1, 16, 16) and x.min() == -1 and x.max() == 1
    assert ((x + 1) * 127.5).round().byte().equal(levels[None])


# ---- The bound -----------------------------------------------------------------------------------


def test_simple_loss_of_a_model_that_answers_zero_is_one():
    torch.manual_seed(0)
    x0 = torch.randn(64, 1, 28, 28)
    loss = CHAIN.simple_loss(lambda x, t: 0 * x, x0, ddpm.draw_t(64, 1000), torch.randn_like(x0))
    assert loss.shape == (64,) and abs(loss.mean().item() - 1) < 4 * (2 / x0.numel()) ** 0.5


def test_every_term_of_the_bound_is_the_divergence_of_torch_distributions():
    chain = ddpm.Diffusion(40, 0.1 / 40, 20 / 40)
    x0 = ddpm.scale(torch.randint(256, (3, 4, 4)).byte()).double()
    model = lambda x, t: torch.tanh(x * 0.8)  # noqa: E731: any function of x_t
    torch.manual_seed(1)
    L_T, terms, _ = chain.vlb(model, x0)
    assert L_T.shape == (3,) and terms.shape == (3, 40)
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


def test_bound_of_a_perfect_model_is_the_entropy_plus_what_sigma_costs():
    torch.manual_seed(0)
    std, n, bar = 0.25, 16000, CHAIN.alpha_bars
    pixels = ((torch.randn(n, 1, dtype=torch.float64) * std).clamp(-1, 1) * 127.5 + 127.5).round()
    L_T, terms, near = CHAIN.vlb(gaussian_model(CHAIN, std), pixels / 127.5 - 1)
    total = L_T + terms.sum(1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std ** 2) - math.log(2 / 255)
    # For data N(0, std²) the true p(x_{t-1} | x_t) is Gaussian; σ² = β_t is a little too wide:
    var = bar * std ** 2 + 1 - bar  # of x_t
    ratio = var[:-1] / var[1:]  # true variance β_t var_{t-1} / var_t, over β_t
    gap = (0.5 * (ratio - 1 - ratio.log())).sum() + 0.5 * (var[-1] - 1 - var[-1].log())
    expected = (entropy + gap.item()) / math.log(2)
    error = total.std().item() / n ** 0.5
    assert error < 0.02
    assert abs(total.mean().item() - expected) < 4 * error
    assert abs(near.mean() - terms[:, 0].mean()) < 4 * error  # ex. 5.5: bins are narrow here


def test_weighted_noise_error_plus_constant_is_the_divergence():  # ex. 5.4 and 5.6
    torch.manual_seed(0)
    t, x0, noise, guess = torch.arange(2, 1001), *torch.randn(3, 999, 4, dtype=torch.float64)
    x_t = CHAIN.q_sample(x0, t, noise)
    mean, variance, _ = CHAIN.p_mean_variance(lambda x, t: guess, x_t, t, clip=False)
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
    mean, variance, _ = CHAIN.p_mean_variance(
        lambda x, t: guess, CHAIN.q_sample(x0, t, noise), t, clip=False)
    beta = CHAIN.betas[1]
    error = beta / (2 * beta * (1 - beta)) * (noise - guess).square()  # σ_1² = β_1
    torch.testing.assert_close((x0 - mean).square() / (2 * variance), error, rtol=1e-6, atol=1e-9)
    exact = -ddpm.discretized_log_likelihood(x0, mean, variance.sqrt())
    constant = 0.5 * math.log(2 * math.pi * beta) - math.log(2 / 255)
    assert abs((exact - error - constant).mean()) < 0.05 * exact.mean()


def test_dropped_weight_is_that_of_the_exercise():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    expected = beta ** 2 / (2 * beta * (1 - beta) * (1 - bar))
    torch.testing.assert_close(CHAIN.dropped_weight(torch.arange(1, 1001)), expected)
    assert expected[0] == pytest.approx(0.5, rel=1e-3)


# ---- The continuous view -------------------------------------------------------------------------


def test_transition_density_solves_the_backward_equation():
    torch.manual_seed(0)
    r = (torch.rand(200, dtype=torch.float64) * 0.6).requires_grad_()
    x = torch.randn(200, dtype=torch.float64).requires_grad_()
    z = torch.randn(200, dtype=torch.float64)
    t = r.detach() + 0.05 + 0.3 * torch.rand(200, dtype=torch.float64)
    residual = ddpm.backward_residual(r, x, t, z)
    u_r = torch.autograd.grad(ddpm.transition_density(r, x, t, z).sum(), r)[0]
    assert u_r.abs().max() > 0.1  # the terms that cancel are not small
    assert residual.abs().max() < 1e-9


def test_transition_density_is_the_limit_of_the_chain():
    bar = CHAIN.alpha_bars
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    u = ddpm.transition_density(torch.tensor(0.0), torch.tensor(0.7), torch.tensor(0.3).double(), z)
    mean = torch.trapezoid(u * z, z)
    assert torch.trapezoid(u, z).item() == pytest.approx(1)
    assert mean.item() == pytest.approx(0.7 * bar[300].sqrt().item(), rel=0.01)
    variance = torch.trapezoid(u * (z - mean) ** 2, z)
    assert variance.item() == pytest.approx(1 - bar[300].item(), rel=0.01)


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddpm", 1000, 1), ("ddpm", 30, 1), ("ddim", 1000, 0), ("ddim", 7, 0), ("ddim", 50, 1.7),
    ("ddim", 5, 9)])
def test_with_the_true_noise_samplers_return_x0(sampler, steps, eta):
    torch.manual_seed(0)
    x0 = torch.rand(4, 1, 5, 5, dtype=torch.float64) * 2 - 1
    x = CHAIN.sample(fixed_model(CHAIN, x0), torch.randn_like(x0), steps, sampler, eta=eta)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_ddim_with_all_the_noise_is_the_chain_with_the_posterior_variance():
    x, model = torch.randn(8, 3, dtype=torch.float64), lambda x, t: torch.tanh(x)
    for steps in (1000, 25):
        torch.manual_seed(3)
        ancestral = CHAIN.sample(model, x, steps, "ddpm", sigma="tilde")
        torch.manual_seed(3)
        torch.testing.assert_close(CHAIN.sample(model, x, steps, "ddim", eta=1.0), ancestral)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.3])
def test_a_ddim_step_is_equation_12_of_its_paper(eta):
    seen, x = [], torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(5)
    CHAIN.sample(lambda x, t: 0.9 * x, x, 2, "ddim", eta=eta, watch=lambda *step: seen.append(step))
    torch.manual_seed(5)
    bar_t, bar_s = CHAIN.alpha_bars[[1000, 500]]
    x0 = ((x - (1 - bar_t).sqrt() * 0.9 * x) / bar_t.sqrt()).clamp(-1, 1)
    eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()  # the noise that goes with the clipped x_0
    sigma = eta * ((1 - bar_s) / (1 - bar_t)).sqrt() * (1 - bar_t / bar_s).sqrt()  # eq. 16
    sigma = sigma.minimum((1 - bar_s).sqrt())
    old = (1 - bar_s - sigma ** 2).clamp(min=0).sqrt()
    expected = bar_s.sqrt() * x0 + old * eps + sigma * torch.randn_like(x)  # eq. 12
    assert [t for t, *_ in seen] == [1000, 500]
    torch.testing.assert_close(seen[1][1], expected)


@pytest.mark.parametrize("sampler, sigma, eta", [
    ("ddpm", "beta", 0), ("ddpm", "tilde", 0), ("ddim", "beta", 0), ("ddim", "beta", 0.5)])
def test_a_perfect_model_of_gaussian_data_samples_that_gaussian(sampler, sigma, eta):
    torch.manual_seed(0)
    n, std = 20000, 0.25
    x = CHAIN.sample(gaussian_model(CHAIN, std), torch.randn(n, 1), 1000, sampler, sigma, eta)
    assert abs(x.mean().item()) < 4 * std / n ** 0.5
    assert x.std().item() == pytest.approx(std, rel=0.03)


def test_sampling_visits_every_time_and_starts_at_T():
    seen = []
    CHAIN.sample(lambda x, t: 0 * x, torch.zeros(2, 1), watch=lambda t, x, x0: seen.append(t))
    assert seen == list(range(1000, 0, -1))
    seen.clear()
    CHAIN.sample(lambda x, t: 0 * x, torch.zeros(2, 1), 10, watch=lambda t, x, x0: seen.append(t))
    assert seen == list(range(1000, 0, -100))


# ---- The network ---------------------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ddpm.UNet(CHAIN.alpha_bars, 8)
    for parameter in net.parameters():  # away from the zeros it starts with
        nn.init.normal_(parameter, std=0.1) if parameter.abs().max() == 0 else None
    return net


def test_time_embedding_has_sine_and_cosine_at_the_same_frequency():
    embedding = ddpm.TimeEmbedding(16)
    embedding.mlp = nn.Identity()
    sine, cosine = embedding(torch.arange(1, 1001)).chunk(2, 1)
    torch.testing.assert_close(sine ** 2 + cosine ** 2, torch.ones_like(sine))
    assert (sine[1:] - sine[:-1]).abs().amax(0).min() > 1e-6  # no frequency is dead


def test_attention_is_the_fused_kernel():
    torch.manual_seed(0)
    layer, x = ddpm.SelfAttention(16, heads=4), torch.randn(2, 16, 5, 3)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 4, 4, 15).transpose(-1, -2).unbind(1)
    fused = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(2, 16, 5, 3)
    torch.testing.assert_close(layer(x), x + layer.out(fused))


def test_untrained_network_gives_the_linear_guess():
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([1, 500, 1000])
    guess = (1 - CHAIN.alpha_bars[t]).sqrt().view(3, 1, 1, 1).float() * x
    torch.testing.assert_close(ddpm.UNet(CHAIN.alpha_bars, 8)(x, t), guess)


def test_network_depends_on_the_time(net):
    x = torch.randn(1, 1, 28, 28).expand(2, -1, -1, -1)
    bar = CHAIN.alpha_bars.clone()
    net.alpha_bars[:] = 0.5  # so that only the embedding can tell the times apart
    a, b = net(x, torch.tensor([10, 11]))
    assert (a - b).abs().max() > 1e-4 and bar[0] == 1


def test_network_treats_images_of_a_batch_apart(net):
    x, t = torch.randn(5, 1, 28, 28), torch.tensor([1, 5, 100, 500, 1000])
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(net(x[order], t[order]), net(x, t)[order], rtol=1e-4, atol=1e-5)


def test_every_skip_reaches_its_level_and_matters(net):
    x, t, made, taken = torch.randn(2, 1, 28, 28), torch.tensor([9, 700]), {}, {}
    for i in range(3):
        net.down[i].register_forward_hook(lambda m, a, out, i=i: made.update({i: out}))
        net.up[i].register_forward_pre_hook(lambda m, a, i=i: taken.update({i: a[0]}))
    before = net(x, t)
    for i in range(3):
        channels = made[i].shape[1]
        assert taken[i][:, -channels:].equal(made[i])
        cut = net.up[i].register_forward_pre_hook(
            lambda m, a, c=channels: (torch.cat([a[0][:, :-c], 0 * a[0][:, -c:]], 1), a[1]))
        assert (net(x, t) - before).abs().max() > 1e-4
        cut.remove()


def test_network_overfits_sixteen_images():
    torch.manual_seed(0)
    x0 = ddpm.scale(ddpm.draw_characters(16, 0)[0])
    t, noise = torch.linspace(50, 900, 16).long(), torch.randn_like(x0)
    net = ddpm.UNet(CHAIN.alpha_bars, 16)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    before = CHAIN.simple_loss(net, x0, t, noise).mean().item()
    for _ in range(150):
        loss = CHAIN.simple_loss(net, x0, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 < 0.1 < before


def test_average_of_weights_has_its_closed_form():
    ema, model = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(ema.weight)
    kept, expected = [], 0.0
    for k in range(1, 31):
        nn.init.constant_(model.weight, float(k))
        ddpm.update_ema(ema, model, k, decay=0.9)
        kept.append(min(0.9, (1 + k) / (10 + k)))
    for k in range(1, 31):  # value k was taken in with 1 - kept_k and faded by all later steps
        expected += k * (1 - kept[k - 1]) * math.prod(kept[k:])
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)
    assert math.prod(kept) < 1e-6 and kept[0] == 2 / 11  # nothing is left of the start
