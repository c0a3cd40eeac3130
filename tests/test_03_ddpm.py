"""03_ddpm.py beside torch.distributions, and on data of which the best model is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from conftest import ROOT, load_script

ddpm = load_script(ROOT / "03_ddpm.py")
CHAIN = ddpm.Diffusion()  # T = 1000, β from 1e-4 to 0.02
LATER = torch.arange(2, 1001)  # every t with a Gaussian step back


def best_model(x0, std=0.0, chain=CHAIN):
    """E[ε | x_t] for data N(x0, std²). For std = 0 it is ε itself, because x_0 is known."""
    def model(x_t, t):
        signal, noise = chain.signal[t], chain.noise[t]
        return noise * (x_t - signal * x0) / (signal**2 * std**2 + noise**2)
    return model


def reverse_mean(chain, x_t, t, eps):
    """μ_θ for a given estimate of the noise, without the clamp (eq. 5.32)."""
    return (x_t - chain.beta[t] / chain.noise[t] * eps) / (1 - chain.beta[t]).sqrt()


# ---- The forward process and its posterior -------------------------------------------


@pytest.mark.parametrize("T", [21, 50, 100, 1000])
def test_schedule_counts_from_one_and_ends_in_noise(T):
    chain = ddpm.Diffusion(T)
    beta = [0, *np.linspace(0.1, 20, T) / T]
    assert chain.beta.flatten().tolist() == pytest.approx(beta, rel=1e-5) and beta[-1] < 1
    assert chain.T == T and chain.signal[0] == 1 and chain.noise[0] == 0  # ᾱ_0 = 1
    assert chain.signal[-1] < 0.01 and chain.beta_tilde[1] == 0
    tables = [table for table in vars(chain).values() if torch.is_tensor(table)]
    assert all(table.dtype == torch.float32 for table in tables)  # a Mac's GPU has no others
    with pytest.raises(ValueError, match="T must"):
        ddpm.Diffusion(20)  # β_T would be 1


def test_many_steps_are_one_jump():
    """A step is linear: follow the mean and the deviation from x_0 = 0.7 (text 8.4.3)."""
    zero, one, x0 = torch.tensor([0, 1, 0.7]).double().view(3, 1, 1, 1, 1)
    mean, std = x0, zero
    for t in range(1, 1001):
        mean = ddpm.q_step(CHAIN, mean, t, zero)
        std = torch.hypot(ddpm.q_step(CHAIN, std, t, zero), ddpm.q_step(CHAIN, zero, t, one))
        if t in (1, 10, 300, 1000):
            jump = [CHAIN.q_sample(x0, t, zero), CHAIN.q_sample(zero, t, one)]
            assert_close(jump, [mean, std], rtol=1e-4, atol=0)


def test_posterior_is_bayes_rule():
    """Prior N(√ᾱ_{t-1} x_0, 1-ᾱ_{t-1}), likelihood N(√α x_{t-1}, 1-α): precisions add."""
    x0, x_t = torch.randn(2, 999, 1, 1, 3)
    signal, noise, beta = CHAIN.signal[LATER - 1], CHAIN.noise[LATER - 1], CHAIN.beta[LATER]
    precision = 1 / noise**2 + (1 - beta) / beta
    mean = (signal * x0 / noise**2 + (1 - beta).sqrt() * x_t / beta) / precision
    assert_close(CHAIN.q_mean(x0, x_t, LATER), mean, rtol=1e-5, atol=1e-5)
    assert_close(CHAIN.beta_tilde[LATER], 1 / precision, rtol=1e-5, atol=0)


def test_mean_of_the_reverse_step_is_that_of_algorithm_2():
    x0, eps = torch.rand(999, 1, 1, 3) * 2 - 1, torch.randn(999, 1, 1, 3)
    x_t = CHAIN.q_sample(x0, LATER, eps)
    mean = reverse_mean(CHAIN, x_t, LATER, eps)
    assert_close(CHAIN.q_mean(x0, x_t, LATER), mean, rtol=1e-4, atol=1e-4)
    assert_close(CHAIN.predict_x0(lambda x, t: eps, x_t, LATER), x0, rtol=1e-3, atol=1e-3)
    far = CHAIN.predict_x0(lambda x, t: -1e6 * eps.sign(), x_t, LATER)
    assert far.equal(eps.sign())  # pixels stay in [-1, 1]


def transition(r, x, t):
    """The law at time t of the chain's limit T -> ∞, started from x at time r: the limit is
    dX = -β(t) X/2 dt + √β(t) dW, with times t/T in [0, 1] and β(t) = 0.1 + 19.9 t (T β_t)."""
    integral = (t - r) * (0.1 + 19.9 * (t + r) / 2)  # ∫ β from r to t
    return Normal(x * torch.exp(-integral / 2), (-torch.expm1(-integral)).sqrt())


def test_transition_density_solves_the_backward_equation():
    """∂u/∂r + b ∂u/∂x + (a/2) ∂²u/∂x² = 0 with b = -β x/2 and a = β, by autograd (ex. 5.3)."""
    r, x, t, z = torch.rand(4, 200, dtype=torch.float64)
    r, x, z = (0.6 * r).requires_grad_(), (4 * x - 2).requires_grad_(), 4 * z - 2
    u = transition(r, x, r.detach() + 0.05 + 0.3 * t).log_prob(z).exp()
    u_r, u_x = torch.autograd.grad(u.sum(), (r, x), create_graph=True)
    u_xx = torch.autograd.grad(u_x.sum(), x)[0]
    beta = 0.1 + 19.9 * r
    residual = u_r - beta * x / 2 * u_x + beta / 2 * u_xx
    assert u_r.abs().max() > 0.1  # the terms that cancel are not small
    assert residual.abs().max() < 1e-9
    limit = transition(0, 0.7, torch.tensor(0.3))  # of the chain, at t = 300
    assert_close(limit.mean, 0.7 * CHAIN.signal[300].squeeze(), rtol=0.01, atol=0)
    assert_close(limit.variance, CHAIN.noise[300].squeeze() ** 2, rtol=0.01, atol=0)


# ---- The bound -----------------------------------------------------------------------


def test_every_term_of_the_bound_is_that_of_torch_distributions():
    """Exercise 5.4: L_0, ..., L_T on average over x_t, also where x̂_0 is clamped."""
    chain, n = ddpm.Diffusion(30), 4000
    chain.T, chain.signal, chain.noise = 15, chain.signal[:16], chain.noise[:16]  # L_T matters
    x0 = torch.tensor([-1, -0.9, 0.1, 1]).view(1, 2, 2).expand(n, 1, 2, 2)
    model = lambda x, t: torch.tanh(0.8 * x)  # noqa: E731: any function of x_t
    terms = ddpm.bound_terms(chain, model, x0) * math.log(2)  # in nats
    assert terms.shape == (n, 16)
    for t in range(1, 16):
        x_t = chain.q_sample(x0, t, torch.randn_like(x0))
        x0_hat = chain.predict_x0(model, x_t, t)
        p = Normal(chain.q_mean(x0_hat, x_t, t), chain.beta[t].sqrt())
        if t == 1:
            nats = -ddpm.discretized_log_likelihood(x0, p.mean, p.stddev)
        else:
            nats = kl_divergence(Normal(chain.q_mean(x0, x_t, t), chain.beta_tilde[t].sqrt()), p)
        nats = nats.mean((1, 2, 3))
        error = ((nats.var() + terms[:, t - 1].var()) / n).sqrt()
        assert abs(terms[:, t - 1].mean() - nats.mean()) < 5 * error + 1e-6, t
    prior = kl_divergence(Normal(chain.signal[15] * x0, chain.noise[15]), Normal(0.0, 1.0))
    assert_close(terms[:, 15], prior.mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 0.01), (-1.0, 0.02), (0.97, 0.3), (3.0, 0.5)])
def test_decoder_shares_one_among_the_256_levels(mean, std):
    levels = torch.arange(256) / 127.5 - 1
    log_p = ddpm.discretized_log_likelihood(levels, torch.tensor(mean), torch.tensor(std))
    cdf = Normal(mean, std).cdf(torch.linspace(-256 / 255, 256 / 255, 257).double())
    cdf[0], cdf[-1] = 0, 1  # the bins of black and white are open
    assert_close(log_p.exp().double(), cdf.diff(), rtol=1e-3, atol=1e-6)
    for far_or_exact in (torch.tensor(mean), levels):  # even without variance
        nats = ddpm.discretized_log_likelihood(levels, far_or_exact, torch.tensor(0.0))
        assert nats.isfinite().all()


def test_bound_of_a_perfect_model_is_the_entropy_plus_what_sigma_costs():
    """For data N(0, std²) the true p(x_{t-1} | x_t) is Gaussian; σ² = β_t is a little wider."""
    std, n = 0.25, 4000
    x0 = ((torch.randn(n, 1, 2, 2) * std).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    total = ddpm.bound_terms(CHAIN, best_model(0.0, std), x0).sum(1)
    bits = (Normal(0.0, std).entropy() - math.log(2 / 255)) / math.log(2)
    variance = (CHAIN.signal**2 * std**2 + CHAIN.noise**2).double()  # of x_t
    ratio = variance[:-1] / variance[1:]  # true variance β_t var_{t-1} / var_t, over β_t
    for wider in (ratio, variance[-1]):  # and q(x_T) beside N(0, 1)
        bits += kl_divergence(Normal(0.0, wider.sqrt()), Normal(0.0, 1.0)).sum() / math.log(2)
    error = total.std() / n**0.5
    assert error < 0.02 and abs(total.mean() - bits) < 4 * error


def test_weighted_noise_error_plus_constant_is_the_divergence():
    """Exercises 5.4 and 5.6."""
    x0, eps, guess = torch.randn(3, 999, 1, 2, 2)
    x_t = CHAIN.q_sample(x0, LATER, eps)
    mean = reverse_mean(CHAIN, x_t, LATER, guess)
    variances = CHAIN.beta_tilde[LATER], CHAIN.variance[LATER]
    kl = ddpm.gaussian_kl(CHAIN.q_mean(x0, x_t, LATER), variances[0], mean, variances[1])
    ratio = variances[0] / variances[1]
    weighted = ddpm.dropped_weight(CHAIN, LATER) * (eps - guess) ** 2
    assert_close(kl, weighted + 0.5 * (ratio - 1 - ratio.log()), rtol=2e-3, atol=1e-5)


def test_first_term_is_near_the_noise_error_of_exercise_5_5():
    x0 = ((torch.rand(500, 1, 2, 2) * 127.5).round() + 64) / 127.5 - 1  # far from the edges
    eps, guess = torch.randn(2, 500, 1, 2, 2)
    mean, beta = reverse_mean(CHAIN, CHAIN.q_sample(x0, 1, eps), 1, guess), CHAIN.beta[1]
    exact = -ddpm.discretized_log_likelihood(x0, mean, beta.sqrt())
    weight = ddpm.dropped_weight(CHAIN, 1).item()
    assert weight == pytest.approx(1 / (2 * (1 - 1e-4)), rel=1e-4)  # because σ_1² = β_1
    constant = 0.5 * math.log(2 * math.pi * beta) - math.log(2 / 255)
    assert abs((exact - weight * (eps - guess) ** 2 - constant).mean()) < 0.05 * exact.mean()
    black = torch.tensor(-1.0)  # at the edge it fails, even for mean = x0
    nats = -ddpm.discretized_log_likelihood(black, black, beta.sqrt())
    assert (nats.item(), constant) == pytest.approx((0.43, 1.16), abs=0.005)


# ---- Sampling ------------------------------------------------------------------------


@pytest.mark.parametrize("steps, eta, std", [
    (1000, "DDPM", 0), (7, 0, 0), (1, 0, 0), (50, 0.5, 0),
    (1000, "DDPM", 0.2), (1000, 0, 0.2), (1000, 0.5, 0.2), (1000, 1, 0.2)])
def test_with_the_best_model_samplers_return_the_data(steps, eta, std):
    x0, x_T = torch.tensor([-0.3, 0, 0.1, 0.3]).view(2, 2), torch.randn(5000, 1, 2, 2)
    seen, best = [], best_model(x0, std)
    model = lambda x, t: seen.extend(torch.as_tensor(t).unique().tolist()) or best(x, t)  # noqa
    if eta == "DDPM":
        x = CHAIN.sample(model, x_T)
    else:
        x = ddpm.sample_ddim(CHAIN, model, x_T, steps, eta)
    assert seen == list(range(1000, 0, -math.ceil(1000 / steps)))
    assert abs((x - x0).mean()) < 4 * std / 20000**0.5 + 1e-3
    assert (x - x0).std().item() == pytest.approx(std, rel=0.03, abs=1e-3)


@pytest.mark.parametrize("chosen", ["beta", "beta_tilde"])
def test_sample_is_algorithm_2_with_either_variance(chosen):
    """For data N(0, 0.25²) no clamp acts, and a step is linear: follow the variance exactly."""
    chain, variance, one = ddpm.Diffusion(40), 1.0, torch.ones(1, 1, 1, 1)
    chain.variance, model = getattr(chain, chosen), best_model(0.0, 0.25, chain)
    for t in range(40, 0, -1):
        slope = reverse_mean(chain, one, t, model(one, t))
        variance = slope**2 * variance + chain.variance[t] * (t > 1)
    x = chain.sample(model, torch.randn(10000, 1, 2, 2))
    assert x.std().item() == pytest.approx(variance.item() ** 0.5, rel=0.015)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_ddim_step_is_equation_12_of_its_paper(eta):
    """Many times the same step from 0.3: mean and deviation of x_500."""
    x, seen = torch.full([40000, 1, 1, 1], 0.3), []
    ddpm.sample_ddim(CHAIN, lambda x, t: seen.append(x) or 0.9 * x, x, 2, eta)
    signal_t, signal_s = CHAIN.signal[[1000, 500]].flatten().tolist()
    noise_t, noise_s = CHAIN.noise[[1000, 500]].flatten().tolist()
    x0 = min(1, (0.3 - noise_t * 0.27) / signal_t)
    eps = (0.3 - signal_t * x0) / noise_t  # the noise that goes with the clamped x_0
    sigma = eta * noise_s / noise_t * (1 - (signal_t / signal_s) ** 2) ** 0.5  # eq. 16
    mean = signal_s * x0 + (noise_s**2 - sigma**2) ** 0.5 * eps  # eq. 12
    assert seen[1].mean().item() == pytest.approx(mean, abs=0.02 * sigma + 1e-4)
    assert seen[1].std().item() == pytest.approx(sigma, rel=0.02, abs=1e-6)


# ---- The network ---------------------------------------------------------------------


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = ddpm.UNet()
    for block in net.modules():
        if isinstance(block, ddpm.ResidualBlock):  # as after some training
            nn.init.normal_(block.conv2[-1].weight, std=0.05)
    return net


def test_time_embedding_is_sines_and_cosines_of_32_frequencies():
    emb = ddpm.timestep_embedding(torch.tensor([1, 7, 1000]))
    angles = torch.tensor([[1.0], [7], [1000]]).double() * 10 ** (-4 * torch.arange(32) / 31)
    assert_close(emb.double(), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-3)


def test_a_block_is_its_formula():
    block, x, emb = ddpm.ResidualBlock(32), torch.randn(2, 32, 6, 6), torch.randn(2, 64)
    assert_close(block(x, emb), x + block.conv2[-1].bias.view(32, 1, 1))  # at first
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    (norm1, _, conv1), (norm2, _, conv2) = block.conv1, block.conv2
    h = conv1(nn.functional.silu(norm1(x))) + block.time(emb).view(2, 32, 1, 1)
    assert_close(block(x, emb), x + conv2(nn.functional.silu(norm2(h))))


def test_network_treats_each_image_by_itself_at_its_own_time(net):
    x, t = torch.randn(3, 1, 28, 28), torch.tensor([1, 500, 501])
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert_close(net(x, t), alone, rtol=1e-4, atol=1e-5)
    assert (net(x, t) - net(x, t + 1)).abs().amax((1, 2, 3)).min() > 1e-5
    assert ddpm.UNet(32)(torch.zeros(3, 1, 32, 32), t).shape == (3, 1, 32, 32)


def test_every_parameter_matters_and_one_corner_sees_the_other(net):
    """The vector of the whole image carries every pixel, and the skips lead past the rest."""
    x, t = torch.randn(2, 1, 28, 28, requires_grad=True), torch.tensor([9, 700])
    vector = []  # out of one layer, into the next
    net.gather.register_forward_hook(lambda _, inputs, out: vector.append(out))
    net.spread.register_forward_hook(lambda _, inputs, out: vector.append(*inputs))
    net(x, t)[:, 0, -1, -1].sum().backward()
    assert_close(vector[1], nn.functional.silu(vector[0]))
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    assert (x.grad != 0).float().mean() > 0.99
    paths = ((net.spread, net.middle1), (net.grow2, net.down2), (net.grow1, net.down1))
    for closed, skip in paths:
        net.zero_grad()
        nn.init.zeros_(closed.weight)  # nothing comes from below, or from the vector
        net(x, t).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in skip.parameters())


def test_eight_images_can_be_learned_by_heart():
    x0, net = ddpm.to_float(ddpm.draw_characters(8)[0]), ddpm.UNet()
    t, eps = torch.linspace(50, 900, 8).long(), torch.randn_like(x0)
    x_t, losses = CHAIN.q_sample(x0, t, eps), []
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(40):
        loss = (net(x_t, t) - eps).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 0.5 and losses[-1] < 0.03


# ---- Training ------------------------------------------------------------------------


class Scale(nn.Module):
    """ε_θ = w x_t: one parameter, of which the best value is known."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, t):
        assert self.training
        return self.w * x


def test_training_finds_the_best_linear_model_with_the_draws_of_algorithm_1():
    """The error of w x_t has no slope at w = E[ε x_t] / E[x_t²]; a second phase finds it too."""
    images = torch.zeros(250, 4, 4, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(250)  # a number for each image
    chain, seen, model = ddpm.Diffusion(25), [], Scale()
    q_sample = chain.q_sample
    chain.q_sample = lambda x0, t, eps: seen.append((x0, t, eps)) or q_sample(x0, t, eps)
    args = ddpm.get_args("--epochs 40 --batch-size 60 --lr 0.05".split())
    signal, noise = chain.signal[1:].flatten(), chain.noise[1:].flatten()
    second_moment = (images / 127.5 - 1).square().mean() * signal**2 + noise**2
    w = (noise.mean() / second_moment.mean()).item()
    for history in ([], []):
        nn.init.zeros_(model.eval().w)
        ddpm.train(args, chain, model, images, history)
        assert model.w.item() == pytest.approx(w, abs=0.02)
        steps, losses, _ = zip(*history)
        assert steps == tuple(range(10, 201, 10))
        assert np.mean(losses[10:]) == pytest.approx(1 - w * noise.mean().item(), abs=0.03)
    x0, t, eps = (torch.cat(tensors) for tensors in zip(*seen))
    assert [len(t) for _, t, _ in seen] == 80 * [60, 60, 60, 60, 10]
    counts = t.bincount(minlength=26)
    assert counts[0] == 0 and len(counts) == 26  # t is in 1..T ...
    assert counts[1:].min() > 680 and counts[1:].max() < 920  # ... 800 times each
    order = (x0[:, 0, 0, 0] + 1).view(80, 250) * 127.5
    assert_close(order.sort(1).values, torch.arange(250.0).expand(80, 250))  # each image once
    assert not (order[1:] == order[:-1]).all(1).any()  # in another order each time
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
    assert eps.unique().numel() > 0.95 * x0.numel()  # its own noise for each pixel


class Slopes(nn.Module):
    """The gradients of its w are the given numbers at each step, whatever the data are."""

    def __init__(self, slopes):
        super().__init__()
        self.w, self.slopes, self.path = nn.Parameter(torch.zeros(2)), iter(slopes), []

    def forward(self, x, t):
        self.path.append(self.w.tolist())
        return 0 * x.detach() + 1e4 + ((self.w - self.w.detach()) * next(self.slopes)).sum()


def test_training_is_adam_that_forgets_fast_with_a_rate_that_ends_at_zero():
    """While the gradient is 1, each step is the rate; where it was 100 once, at step 21, Adam
    divides that by the root of v̂, which is 1 and what β2 = 0.99 has left of 100² - 1."""
    slopes = torch.ones(200, 2)
    slopes[20, 1] = 100
    model = Slopes(slopes)
    args = ddpm.get_args("--epochs 20 --batch-size 32 --lr 0.01".split())
    ddpm.train(args, ddpm.Diffusion(30), model, torch.zeros(320, 4, 4).byte(), [])
    rates, disturbed = -np.diff(model.path, axis=0).T
    assert len(rates) == 199 and rates.max() == pytest.approx(0.01, rel=0.02)
    assert rates.min() > 0 and rates[-1] < 1e-4 and (np.diff(rates[100:]) < 1e-6).all()
    step = np.arange(151, 200)  # long after, so that β1 has no say
    v = 1 + (100**2 - 1) * 0.01 * 0.99 ** (step - 21) / (1 - 0.99**step)
    assert (disturbed / rates)[150:] == pytest.approx(v**-0.5, rel=0.05)


# ---- What a run reports --------------------------------------------------------------


def tiles(axes, columns):
    """The images that a picture shows, without frames (rows, columns, 28, 28)."""
    picture = torch.as_tensor(np.asarray(axes.images[0].get_array()))
    return picture.view(-1, 30, columns, 30).transpose(1, 2)[..., 1:-1, 1:-1]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main` on white images to train and black ones to test."""
    out, labels = tmp_path_factory.mktemp("run"), torch.zeros(256).long()
    white = torch.full([256, 28, 28], 255, dtype=torch.uint8)
    tests = torch.cat([0 * white[:8], white[:8] // 2, white])  # eight black, eight gray
    drawn, sample = [], ddpm.Diffusion.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm, "load_data", lambda args: (white, labels, tests, labels, "mine"))
        patch.setattr(ddpm.Diffusion, "sample",
                      lambda self, model, x: drawn.append(x) or sample(self, model, x))
        ddpm.main(["--quick", "--samples", "13", "--out", str(out), "--device", "cpu"])
    axes = [axes for number in ddpm.plt.get_fignums() for axes in ddpm.plt.figure(number).axes]
    axes.sort(key=lambda axes: (len(axes.lines), "t = 30 to 1" in axes.get_title()))
    net = ddpm.UNet().eval().requires_grad_(False)
    net.load_state_dict(torch.load(out / "model.pt", weights_only=True)["weights"])
    results = json.loads((out / "metrics.json").read_text())["results"]
    return net, results, np.load(out / "samples.npz")["images"], axes, drawn, ddpm.to_float(tests)


def test_the_bound_is_that_of_the_trained_model_on_test_images(a_run):
    net, results, _, (*_, bound), _, tests = a_run
    chain = ddpm.Diffusion(30)
    (name, value), = results.items()
    terms, white = (ddpm.bound_terms(chain, net, x0).mean(0) for x0 in (tests[:16], tests[-16:]))
    assert "bits/dim" in name and value == pytest.approx(terms.sum().item(), rel=0.03)
    assert value != pytest.approx(white.sum().item(), rel=0.2)  # white: the training images
    weights = ddpm.dropped_weight(chain, torch.arange(1, 31)).flatten()
    shown = {line.get_label(): line.get_xydata().T for line in bound.lines}
    assert len(shown) == 2 and bound.get_xlabel() == "t" and bound.get_ylabel()
    for label, (t, y) in shown.items():
        expected, rel = (terms[:-1], 0.2) if "bits/dim" in label else (weights, 1e-5)
        assert t.tolist() == list(range(1, 31)) and ("weight" in label) == (expected is weights)
        assert y.tolist() == pytest.approx(expected.tolist(), rel=rel), label


def test_pictures_show_the_chain_both_ways_and_the_saved_samples(a_run):
    net, _, images, (samples, shown, _), drawn, _ = a_run
    assert images.shape == (13, 28, 28) and images.dtype == np.uint8
    assert (255 * tiles(samples, 10).flatten(0, 1)[:13] - torch.tensor(images)).abs().max() < 0.51
    chain, x = ddpm.Diffusion(30), 2 * tiles(shown, 11).view(3, 3, 11, 1, 28, 28) - 1
    assert "t = 30 to 1" in shown.get_title()
    for column, t in enumerate([*range(30, 0, -3), 1]):
        by_q, x_t, x0_hat = x[:, :, column]
        eps = (by_q + chain.signal[t]) / chain.noise[t]  # of a black image
        assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1
        assert_close(chain.predict_x0(net, x_t, t), x0_hat, rtol=1e-3, atol=1e-3)
    for x_T in drawn:  # pure noise
        assert abs(x_T.mean()) < 0.1 and abs(x_T.std() - 1) < 0.1
    assert_close(x[1, :, 0], drawn[1])
    assert (x[1, :, -1] - x[2, :, -1]).abs().mean() < 0.3  # at t = 1 hardly any is left
