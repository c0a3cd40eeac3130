"""The mathematics of 02_hvae.py against torch.distributions and a model whose log p(x) is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "02_hvae.py")


class Affine(nn.Module):
    """x -> mean W x + b and, where it is given, a fixed log-variance."""

    def __init__(self, W, b, variance=None):
        super().__init__()
        self.W, self.b, self.variance = W, b, variance

    def forward(self, x):
        mean = x @ self.W.T + self.b
        return mean if self.variance is None else (mean, self.variance.log().expand_as(mean))


def linear_gaussian(a=None, prior_variance=1.0):
    """z2 ~ N(0, 1), z1 ~ N(b z2 + 0.3, v), x ~ N(c z1 - 0.2, σ²), two of each side by side, with
    the exact q(z1 | x); q(z2 | z1) is exact too, or has the mean a (z1 - 0.3) and variance 1.
    Returns the model, p(x) and (a, b, variance of q(z1 | x))."""
    one = torch.ones(2, dtype=torch.float64)
    b, c = one * torch.tensor([0.8, 1.7]), one * torch.tensor([1.2, -0.5])
    v, sigma2 = prior_variance * one, 0.3 * one
    model = script.TwoLevelVAE(latent_dim=2, hidden_dim=3, input_dim=2).double()
    model.x_logvar.data = sigma2[0].log()
    total = b ** 2 + v  # the variance of z1
    model.decoder2 = Affine(b.diag(), 0.3 * one, v)
    model.decoder1 = Affine(c.diag(), -0.2 * one)
    s1 = 1 / (1 / total + c ** 2 / sigma2)  # p(z1 | x), by Bayes' rule
    model.encoder1 = Affine((s1 * c / sigma2).diag(), s1 * (0.3 / total + 0.2 * c / sigma2), s1)
    exact = a is None
    a = b / total if exact else a * one  # p(z2 | z1) has the mean b (z1 - 0.3) / (b² + v)
    model.encoder2 = Affine(a.diag(), -0.3 * a, v / total if exact else one)
    p_x = MultivariateNormal(0.3 * c - 0.2, (c ** 2 * total + sigma2).diag())
    return model, p_x, (a, b, s1)


def log_weight(model, x):
    """log p(x, z1, z2) / q(z1, z2 | x) at one drawn pair (N,), each factor by torch."""
    def normal(mean, logvar):
        return Normal(mean, (logvar / 2).exp())

    q1 = normal(*model.encoder1(x))
    z1 = q1.sample()
    q2 = normal(*model.encoder2(z1))
    z2 = q2.sample()
    terms = (normal(model.decoder1(z1), model.x_logvar).log_prob(x), -q1.log_prob(z1),
             normal(*model.decoder2(z2)).log_prob(z1), -q2.log_prob(z2),
             Normal(torch.zeros_like(z2), 1).log_prob(z2))
    return sum(term.detach().sum(1) for term in terms)


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, prior_mu, prior_logvar, x = torch.randn(5, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())
    torch.testing.assert_close(script.gaussian_kl(mu, logvar, prior_mu, prior_logvar),
                               kl_divergence(q, p))
    torch.testing.assert_close(script.gaussian_log_density(x, mu, logvar), q.log_prob(x))


@pytest.mark.parametrize("printed", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_elbo_terms_are_explicit_log_densities_with_all_constants(printed, exact):
    torch.manual_seed(0)
    model = script.TwoLevelVAE(3, 8, printed=printed).double()
    x = torch.rand(6, 784, dtype=torch.float64)
    torch.manual_seed(1)
    J1, level1, level2 = model.elbo(x, exact)
    torch.manual_seed(1)
    mu1, logvar1 = model.encoder1(x)
    z1 = mu1 + (logvar1 / 2).exp() * torch.randn(6, 3, dtype=torch.float64)
    mu2, logvar2 = model.encoder2(z1)
    z2 = mu2 + (logvar2 / 2).exp() * torch.randn(6, 3, dtype=torch.float64)
    prior_mu, prior_logvar = model.decoder2(z2)
    q1, q2 = Normal(mu1, (logvar1 / 2).exp()), Normal(mu2, (logvar2 / 2).exp())
    p1 = Normal(prior_mu, (prior_logvar / 2).exp())
    p = Normal(model.decoder1(z1), 1.0 if printed else 0.1)
    torch.testing.assert_close(J1, p.log_prob(x).sum(1), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(level2, kl_divergence(q2, Normal(0.0, 1.0)).sum(1))
    at_pair, closed = q1.log_prob(z1) - p1.log_prob(z1), kl_divergence(q1, p1)
    torch.testing.assert_close(level1, (at_pair if exact else closed).sum(1))
    assert (prior_logvar == 0).all() == printed and model.x_logvar.requires_grad != printed


def test_as_printed_twice_the_bound_is_the_texts_loss_and_a_constant():
    torch.manual_seed(0)
    model = script.TwoLevelVAE(4, 16, 1, nn.ReLU, printed=True).double()
    x = torch.rand(5, 784, dtype=torch.float64)
    torch.manual_seed(1)
    J1, level1, level2 = (term.mean() for term in model.elbo(x, exact=False))
    torch.manual_seed(1)
    mu1, logvar1 = model.encoder1(x)
    z1 = script.reparameterize(mu1, logvar1)
    mu2, logvar2 = model.encoder2(z1)
    z_hat = model.decoder2(script.reparameterize(mu2, logvar2))[0]
    loss = F.mse_loss(model.decoder1(z1), x, reduction="sum")  # App. C.4, all three terms
    loss = loss - (1 + logvar2 - mu2 ** 2 - logvar2.exp()).sum()
    loss = loss - (1 + logvar1 - (mu1 - z_hat) ** 2 - logvar1.exp()).sum()
    torch.testing.assert_close(-2 * (J1 - level1 - level2) - 784 * math.log(2 * math.pi), loss / 5)


@pytest.mark.parametrize("prior_variance", [1.0, 0.4])
def test_with_the_exact_posterior_every_draw_weighs_log_p(prior_variance):
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=prior_variance)
    x = p_x.sample((9,))
    torch.testing.assert_close(log_weight(model, x), p_x.log_prob(x))
    J1, level1, level2 = (v.view(-1, 9).mean(0) for v in model.elbo(x.repeat(100000, 1)))
    torch.testing.assert_close(J1 - level1 - level2, p_x.log_prob(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("a", [None, 0.5, -0.7])
def test_the_texts_closed_form_falls_short_by_what_z2_knows_of_z1(a):
    # At the pair: E ½(z1 - b z2)², z2 drawn from this z1. Closed form: E ½(z1' - b z2)² with z1'
    # drawn again from q(z1 | x), so independent of z2. Both have the same means; the squares differ
    # by -2b Cov(z1, z2) = -2b a σ1², halved and for a prior variance of 1: a·b·σ1² a dimension.
    torch.manual_seed(0)
    model, p_x, (slope, b, s1) = linear_gaussian(a)
    x, bounds = p_x.sample((5,)).repeat(200000, 1), []
    for exact in (True, False):
        torch.manual_seed(1)  # the same draws, so that the difference is sharp
        J1, level1, level2 = model.elbo(x, exact)
        bounds.append((J1 - level1 - level2).view(-1, 5).mean(0))
    shortfall = (slope * b * s1).sum()
    assert shortfall.abs() > 0.1
    torch.testing.assert_close(bounds[0] - bounds[1], shortfall.expand(5), atol=0.02, rtol=0)


def test_the_mean_of_the_weights_is_the_elbo_for_any_posterior():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(a=0.2)
    x = p_x.sample((5,))
    weights = log_weight(model, x.repeat(100000, 1)).view(-1, 5)
    J1, level1, level2 = (v.view(-1, 5).mean(0) for v in model.elbo(x.repeat(100000, 1)))
    torch.testing.assert_close(weights.mean(0), J1 - level1 - level2, atol=0.03, rtol=0)
    assert (weights.mean(0) < p_x.log_prob(x) - 0.1).all()
    torch.testing.assert_close(weights.exp().mean(0).log(), p_x.log_prob(x), atol=0.03, rtol=0)


def test_samples_have_the_mean_and_covariance_of_the_model():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=0.4)
    x = model.sample(400000)
    noise = 0.3 * torch.eye(2, dtype=torch.float64)  # `sample` gives x̂ without it
    torch.testing.assert_close(x.mean(0), p_x.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), p_x.covariance_matrix - noise, atol=0.02, rtol=0)


def test_one_level_is_the_vae_of_the_first_file():
    torch.manual_seed(0)
    vae = load_script(ROOT / "01_vae.py").VAE(latent_dim=3, hidden_dim=8)
    one, x = script.TwoLevelVAE(3, 8, levels=1), torch.rand(6, 784)
    one.encoder1.load_state_dict(vae.encoder.state_dict())
    one.decoder1[0].load_state_dict(vae.decoder[0].state_dict())
    torch.manual_seed(1)
    J1, level1, level2 = one.elbo(x, exact=False)
    torch.manual_seed(1)
    reconstruction, kl, _ = vae.elbo(x)
    torch.testing.assert_close(J1, reconstruction)
    torch.testing.assert_close(level1, kl)
    assert not level2.any()
    torch.manual_seed(2)
    images = one.sample(4)
    torch.manual_seed(2)
    torch.testing.assert_close(images, vae.sample(4))


@pytest.mark.parametrize("logvar", [-200.0, 200.0])
def test_extreme_variances_stay_finite(logvar):
    extreme = torch.tensor([logvar], dtype=torch.float64)
    zero = torch.zeros_like(extreme)
    assert script.gaussian_kl(zero, extreme, zero, zero).isfinite().all()
    assert script.gaussian_kl(zero, zero, zero, extreme).isfinite().all()
    for place in ("encoder1", "encoder2", "decoder2"):
        torch.manual_seed(0)
        model, x = script.TwoLevelVAE(3, 8), torch.rand(4, 784)
        getattr(model, place).net[-1].bias.data[3:] = logvar  # it asks for it, in float32
        for exact in (True, False):
            J1, level1, level2 = model.elbo(x, exact)
            (J1 - level1 - level2).mean().backward()
            assert (J1 - level1 - level2).isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_as_printed_flag_is_the_texts_network_and_settings():
    c = script.parse(["--as-printed"])
    assert (c.epochs, c.batch_size, c.lr, c.schedule, c.warmup) == (30, 32, 1e-3, "constant", 0)
    assert c.activation == "ReLU"
    model = script.TwoLevelVAE(c.latent_dim, c.hidden_dim, c.layers, nn.ReLU, printed=True)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(100, 784), (40, 100), (100, 20), (40, 100),  # two encoders, μ and log σ²
                      (100, 20), (20, 100), (100, 20), (784, 100)]  # decoder 2, decoder 1


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    images, _ = script.draw_characters(32, 0)
    model, x = script.TwoLevelVAE(latent_dim=8, hidden_dim=64), script.flat(images)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def bound():
        J1, level1, level2 = model.elbo(x)
        return (J1 - level1 - level2).mean()

    before = bound().item()
    for _ in range(800):
        optimizer.zero_grad()
        (-bound()).backward()
        optimizer.step()
    assert before < 0 and bound() > 900
