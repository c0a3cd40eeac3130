"""The mathematics of 01_vae.py against torch.distributions and models whose log p(x) is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "01_vae.py")


class Fixed(nn.Module):
    """An encoder whose q(z | x) = N(A (x - b), diag exp(logvar)) is given."""

    def __init__(self, A, b, logvar):
        super().__init__()
        self.A, self.b, self.logvar = A, b, logvar

    def forward(self, x):
        return (x - self.b) @ self.A.T, self.logvar.expand(len(x), -1)


class Linear(nn.Module):
    """A decoder x̂ = W z + b."""

    def __init__(self, W, b):
        super().__init__()
        self.W, self.b = W, b

    def forward(self, z):
        return z @ self.W.T + self.b


def linear_gaussian(widen=0.0):
    """A VAE with x̂ = W z + b, the x of 7 draws, log p(x) in closed form, and q = p(z | x) with its
    log-variances raised by `widen`. W has orthogonal columns, so the posterior is diagonal."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])
    b, sigma = torch.randn(5, dtype=torch.float64), 0.4
    model = script.VAE(latent_dim=2, hidden_dim=3, input_dim=5, sigma=sigma).double()
    precision = 1 + (W ** 2).sum(0) / sigma ** 2  # of p(z | x), by Bayes' rule
    model.encoder = Fixed(W.T / sigma ** 2 / precision[:, None], b, widen - precision.log())
    model.decoder = Linear(W, b)
    marginal = MultivariateNormal(b, W @ W.T + sigma ** 2 * torch.eye(5, dtype=torch.float64))
    x = marginal.sample((7,))
    return model, x, marginal


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, x = torch.randn(3, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), 1)
    torch.testing.assert_close(script.gaussian_kl(mu, logvar), kl_divergence(q, p))
    torch.testing.assert_close(script.gaussian_log_density(x, mu, logvar), q.log_prob(x))


@pytest.mark.parametrize("sigma", [0.0, 1.0, 0.3])
def test_elbo_terms_are_explicit_log_densities_with_all_constants(sigma):
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=3, hidden_dim=8, sigma=sigma), torch.rand(6, 784)
    torch.manual_seed(1)
    reconstruction, kl, elbo = model.elbo(x)
    torch.manual_seed(1)
    mu, logvar = model.encoder(x)
    q = Normal(mu, (logvar / 2).exp())
    z = q.mean + q.stddev * torch.randn(6, 3)
    p = Normal(model.decoder(z), sigma or model.x_logvar.exp().sqrt())
    torch.testing.assert_close(reconstruction, p.log_prob(x).sum(1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(elbo, reconstruction - kl)
    assert reconstruction.shape == kl.shape == elbo.shape == (6,)
    assert model.x_logvar.requires_grad == (sigma == 0)


def test_with_sigma_1_twice_the_elbo_is_the_books_loss_and_a_constant():
    torch.manual_seed(0)
    model, x = script.VAE(4, 16, layers=1, activation=nn.ReLU, sigma=1.0), torch.rand(5, 784)
    torch.manual_seed(1)
    elbo = model.elbo(x)[2].mean()
    torch.manual_seed(1)
    mu, logvar = model.encoder(x)
    x_hat = model.decoder(script.reparameterize(mu, logvar))
    squares = F.mse_loss(x_hat, x, reduction="sum") / 5
    loss = squares - (1 + logvar - mu ** 2 - logvar.exp()).sum() / 5  # as App. C.4 has it
    torch.testing.assert_close(-2 * elbo - 784 * math.log(2 * math.pi), loss)


@pytest.mark.parametrize("logvar", [-200.0, 200.0])
def test_extreme_variances_stay_finite(logvar):
    mu, extreme = torch.zeros(1, dtype=torch.float64), torch.tensor([logvar], dtype=torch.float64)
    assert script.gaussian_kl(mu, extreme).isfinite().all()
    assert script.gaussian_log_density(mu, mu, extreme).isfinite().all()
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=3, hidden_dim=8), torch.rand(4, 784)
    model.encoder.net[-1].bias.data[3:] = logvar  # the encoder asks for it, in float32
    model.elbo(x)[2].mean().backward()
    assert model.elbo(x)[2].isfinite().all() and model.log_likelihood(x, 5).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_reparameterization_has_the_gradient_of_the_expectation():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.4], requires_grad=True)
    z = script.reparameterize(mu.expand(400000), logvar.expand(400000))
    (z ** 2).mean().backward()  # E z² = μ² + σ², so ∂/∂μ = 2μ and ∂/∂log σ² = σ²
    assert mu.grad.item() == pytest.approx(1.4, abs=0.01)
    assert logvar.grad.item() == pytest.approx(math.exp(-0.4), abs=0.01)


def test_with_the_true_posterior_the_elbo_is_log_p():
    model, x, marginal = linear_gaussian()
    mean = sum(model.elbo(x)[2] for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, marginal.log_prob(x), atol=0.05, rtol=0)
    # and every single draw of z has the weight p(x, z) / q(z | x) = p(x)
    torch.testing.assert_close(model.log_likelihood(x, 1), marginal.log_prob(x))


def test_importance_weighted_bound_rises_with_draws_and_reaches_log_p():
    model, x, marginal = linear_gaussian(widen=1.5)
    true = marginal.log_prob(x)
    many = x.repeat(20000, 1)
    few = {K: model.log_likelihood(many, K).view(-1, 7).mean(0) for K in (1, 2, 8)}
    torch.testing.assert_close(few[1], model.elbo(many)[2].view(-1, 7).mean(0), atol=0.1, rtol=0)
    assert (few[1] < few[2]).all() and (few[2] < few[8]).all() and (few[8] < true).all()
    gap = math.exp(1.5) - 1 - 1.5  # of the ELBO: twice KL(N(0, e^1.5) ‖ N(0, 1))
    torch.testing.assert_close(true - few[1], torch.full_like(true, gap), atol=0.1, rtol=0)
    torch.testing.assert_close(model.log_likelihood(x, 20000), true, atol=0.03, rtol=0)


def test_samples_have_the_mean_and_covariance_of_the_model():
    model, _, marginal = linear_gaussian()
    x = model.sample(200000)
    covariance = marginal.covariance_matrix - 0.4 ** 2 * torch.eye(5)  # x̂ is without noise
    torch.testing.assert_close(x.mean(0), marginal.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.03, rtol=0)


def test_learned_sigma_is_at_rest_where_it_equals_the_error():
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=2, hidden_dim=8), torch.rand(64, 784)
    torch.manual_seed(1)
    error = (x - model.decoder(script.reparameterize(*model.encoder(x)))).square().mean()
    for factor, sign in ((0.5, 1), (1.0, 0), (2.0, -1)):
        model.x_logvar.data = (factor * error.detach()).log()
        torch.manual_seed(1)
        slope, = torch.autograd.grad(model.elbo(x)[2].mean(), model.x_logvar)
        assert abs(slope) < 0.01 if sign == 0 else slope * sign > 100


def test_book_flag_is_the_books_network_and_settings():
    c = script.parse(["--book"])
    assert (c.epochs, c.batch_size, c.lr, c.schedule, c.sigma) == (30, 32, 3e-4, "constant", 1)
    assert script.parse(["--book", "--sigma", "0"]).sigma == 0  # what is asked for wins
    model = script.VAE(c.latent_dim, c.hidden_dim, c.layers, getattr(nn, c.activation), c.sigma)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(200, 784), (40, 200), (200, 20), (784, 200)]  # μ and log σ² in one of 2 · 20
    assert [type(m) for m in model.encoder.net] == [nn.Linear, nn.ReLU, nn.Linear]


def test_hidden_layers_beyond_the_first_add_to_their_input():
    torch.manual_seed(0)
    net, x = script.mlp(5, 8, 3, layers=3, activation=nn.SiLU), torch.randn(4, 5)
    (first, *hidden, activation, last), h = net, net[0](x)
    for layer in hidden:
        h = h + layer.linear(F.silu(h))
    torch.testing.assert_close(net(x), last(F.silu(h)))
    assert len(hidden) == 2


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    images, _ = script.draw_characters(32, 0)
    model, x = script.VAE(latent_dim=8, hidden_dim=64), script.flat(images)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = model.elbo(x)[2].mean().item()
    for _ in range(600):
        optimizer.zero_grad()
        (-model.elbo(x)[2].mean()).backward()
        optimizer.step()
    assert before < 0 and model.elbo(x)[2].mean() > 900
