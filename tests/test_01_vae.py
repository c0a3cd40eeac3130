"""01_vae.py beside torch.distributions, and beside models whose log p(x) is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

vae = load_script(ROOT / "01_vae.py")


def fix_sigma(model, sigma):
    """As --sigma does."""
    model.pixel_logvar.requires_grad_(False).fill_(2 * math.log(sigma))


def linear_gaussian(widen=0.0):
    """A VAE with x̂ = W z + b, the x of 7 draws, log p(x) in closed form, and q = p(z | x) with
    its log-variances raised by `widen`. W has orthogonal columns: the posterior is diagonal."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])
    b, sigma = torch.randn(5, dtype=torch.float64), 0.4
    model = vae.VAE(2).double()
    fix_sigma(model, sigma)
    precision = 1 + (W**2).sum(0) / sigma**2  # of p(z | x), by Bayes' rule
    logvar = widen - precision.log()

    def encode(x):
        mu = (x - b) @ (W / sigma**2 / precision)
        return mu, logvar.expand_as(mu)

    model.encode = encode
    del model.decoder  # a module can be replaced by a function only if it is deleted first
    model.decoder = lambda z: z @ W.T + b
    marginal = MultivariateNormal(b, W @ W.T + sigma**2 * torch.eye(5, dtype=torch.float64))
    return model, marginal.sample((7,)), marginal


def elbo(model, x):
    reconstruction, kl = model.elbo(x)
    return reconstruction - kl


# ---- Lesson one: the ELBO (text 8.1.1 and C.3) ---------------------------------------


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, x = torch.randn(3, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), 1)
    torch.testing.assert_close(vae.gaussian_kl(mu, logvar), kl_divergence(q, p))
    torch.testing.assert_close(vae.gaussian_log_density(x, mu, logvar), q.log_prob(x))


def test_reparameterization_has_the_gradient_of_the_expectation():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.4], requires_grad=True)
    z = vae.reparameterize(mu.expand(400000), logvar.expand(400000))
    (z**2).mean().backward()  # E z² = μ² + s², so ∂/∂μ = 2μ and ∂/∂log s² = s²
    assert mu.grad.item() == pytest.approx(1.4, abs=0.01)
    assert logvar.grad.item() == pytest.approx(math.exp(-0.4), abs=0.01)
    assert z.mean().item() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_elbo_terms_are_explicit_log_densities_with_all_constants(sigma):
    """Averaged over many draws of z, by torch.distributions (text 8.1.1)."""
    torch.manual_seed(0)
    model, x = vae.VAE(3), torch.rand(6, 784)
    fix_sigma(model, sigma)
    many = x.repeat(1000, 1)
    with torch.no_grad():
        reconstruction, kl = (term.view(1000, 6).mean(0) for term in model.elbo(many))
        mu, logvar = model.encoder(x)[:, :3], model.encoder(x)[:, 3:]
        q = Normal(mu, (logvar / 2).exp())
        p = Normal(model.decoder(q.sample((1000,))), sigma)
        expected = p.log_prob(x).sum(2).mean(0)
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    torch.testing.assert_close(reconstruction, expected, rtol=0.01, atol=0)


def test_with_the_true_posterior_the_elbo_is_log_p():
    model, x, marginal = linear_gaussian()
    mean = sum(elbo(model, x) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, marginal.log_prob(x), atol=0.05, rtol=0)
    # and every single draw of z has the weight p(x, z) / q(z | x) = p(x)
    torch.testing.assert_close(vae.importance_bound(model, x, 1), marginal.log_prob(x))


def test_with_sigma_1_twice_the_elbo_is_the_texts_loss_and_a_constant():
    """The loss of text C.4: squared error + 2 KL."""
    torch.manual_seed(0)
    model, x = vae.VAE(4), torch.rand(5, 784)
    fix_sigma(model, 1.0)
    many = x.repeat(2000, 1)
    with torch.no_grad():
        mu, logvar = model.encode(many)
        x_hat = model.decoder(Normal(mu, (logvar / 2).exp()).sample())
        loss = (x_hat - many).square().sum(1) - (1 + logvar - mu**2 - logvar.exp()).sum(1)
        found = -2 * elbo(model, many) - 784 * math.log(2 * math.pi)
    assert found.mean().item() == pytest.approx(loss.mean().item(), abs=0.1)


def test_learned_sigma_is_at_rest_where_it_equals_the_error():
    torch.manual_seed(0)
    model, x = vae.VAE(2), torch.rand(64, 784).repeat(20, 1)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        error = (x - model.decoder(vae.reparameterize(mu, logvar))).square().mean()
    slopes = []
    for factor in (0.5, 1.0, 2.0):
        model.pixel_logvar.data = (factor * error).log()
        slopes += torch.autograd.grad(elbo(model, x).mean(), model.pixel_logvar)
    assert slopes[0] > 100 and abs(slopes[1]) < 1 and slopes[2] < -50


# ---- Second and third lesson (text 8.3.1: Jensen) ------------------------------------


def test_importance_weighted_bound_rises_with_draws_and_reaches_log_p():
    model, x, marginal = linear_gaussian(widen=1.5)
    true = marginal.log_prob(x)
    many = x.repeat(60000, 1)
    few = {K: vae.importance_bound(model, many, K).view(-1, 7).mean(0) for K in (1, 2, 8)}
    torch.testing.assert_close(few[1], elbo(model, many).view(-1, 7).mean(0), atol=0.1, rtol=0)
    assert (few[1] < few[2]).all() and (few[2] < few[8]).all() and (few[8] < true).all()
    gap = math.exp(1.5) - 1 - 1.5  # of the ELBO: twice KL(N(0, e^1.5) ‖ N(0, 1))
    torch.testing.assert_close(true - few[1], torch.full_like(true, gap), atol=0.1, rtol=0)
    torch.testing.assert_close(vae.importance_bound(model, x, 20000), true, atol=0.03, rtol=0)


@pytest.mark.parametrize("sigma", [0.5, 0.0])
def test_a_fixed_sigma_stays_and_a_learned_one_moves(sigma, tmp_path, monkeypatch):
    data = [*vae.draw_characters(64), *vae.draw_characters(200)]
    monkeypatch.setattr(vae, "load_data", lambda args: (*data, "mine"))
    vae.main(["--quick", "--sigma", str(sigma), "--out", str(tmp_path), "--device", "cpu"])
    weights = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
    learned, found = vae.VAE().pixel_logvar.item(), weights["pixel_logvar"].item()
    assert found == pytest.approx(math.log(0.25)) if sigma else abs(found - learned) > 1e-3
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert results["sigma"] == pytest.approx(math.exp(found / 2))


def test_a_decoder_of_ones_own_gets_its_codes_one_per_row(tmp_path):
    """Such as one of transposed convolutions, which takes no further dimensions."""
    model, x = vae.VAE(), torch.rand(10, 784)
    model.decoder = nn.Sequential(
        nn.Linear(20, 8 * 49), nn.Unflatten(1, (8, 7, 7)), nn.ConvTranspose2d(8, 8, 2, 2),
        nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Flatten(), nn.Sigmoid())
    assert vae.importance_bound(model, x, 3).shape == (10,)
    assert all(math.isfinite(value) for value in vae.evaluate(model, x).values())
    vae.plot_images(vae.get_args(["--out", str(tmp_path)]), model, x)
    assert (tmp_path / "images.png").exists()


# ---- Training ------------------------------------------------------------------------


def test_pixels_go_to_zero_one():
    images = torch.arange(784).remainder(256).byte().view(1, 28, 28)
    expected = torch.arange(784).remainder(256) / 255
    torch.testing.assert_close(vae.to_float(images), expected[None])


class Scalar(nn.Module):
    """An ELBO that hangs on one parameter: reconstruction -(w - mean x)², and KL w²."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.tensor(0.0)), []

    def elbo(self, x):
        assert self.training
        self.seen.append(x)
        return -((self.w - x.mean(1)) ** 2), self.w.expand(len(x)) ** 2


def train(model, images, *flags):
    history = []
    vae.train(vae.get_args([*map(str, flags)]), model.eval(), images, history)
    return history


def test_training_maximizes_the_elbo():
    """-(w - 1)² - w² is largest at w = ½, where it is -½ (white images)."""
    model, white = Scalar(), torch.full([1024, 4, 4], 255, dtype=torch.uint8)
    history = train(model, white, "--epochs", 20, "--lr", 0.05)
    assert model.w.item() == pytest.approx(0.5, abs=0.01)
    assert history[-1][:2] == [160, pytest.approx(0.5, abs=1e-3)]
    first = model.w.item()
    train(model, 0 * white, "--epochs", 20, "--lr", 0.05)  # a second phase trains as well
    assert first != model.w.item() == pytest.approx(0, abs=0.01)


def test_each_epoch_sees_each_image_once_in_a_new_order():
    torch.manual_seed(0)
    model, images = Scalar(), torch.arange(50).byte().view(50, 1, 1)
    train(model, images, "--epochs", 3, "--batch-size", 7)
    assert [len(x) for x in model.seen] == 3 * [*[7] * 7, 1]
    order = (torch.cat(model.seen) * 255).round().view(3, 50)
    assert order.sort(1).values.equal(torch.arange(50.0).expand(3, 50))
    assert not (order[1:] == order[:-1]).all(1).any()


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    images, _ = vae.draw_characters(32)
    model = vae.VAE(8)
    before = elbo(model, vae.to_float(images)).mean().item()
    train(model, images, "--epochs", 500, "--lr", 3e-3)
    after = elbo(model, vae.to_float(images)).mean().item()
    assert before < 0 and after > 300, after


# ---- What a run reports --------------------------------------------------------------


def test_results_and_picture_are_those_of_test_images(tmp_path, monkeypatch):
    """Digits to train, their negatives to test; each number again from tested functions."""
    torch.manual_seed(0)
    images, labels = vae.draw_characters(512)
    data = images, labels, 255 - images[:200], labels[:200], "mine"
    monkeypatch.setattr(vae, "load_data", lambda args: data)
    vae.main(["--quick", "--out", str(tmp_path), "--device", "cpu", "--latent-dim", "3",
              "--sigma", "0.2"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    model, x = vae.VAE(3), vae.to_float(255 - images[:200])
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["weights"])
    assert model.pixel_logvar.item() == pytest.approx(2 * math.log(0.2))
    with torch.no_grad():
        bounds = [elbo(model, x).mean().item() for _ in range(20)]
        kl = vae.gaussian_kl(*model.encode(x))
        gains = [(vae.importance_bound(model, x[:100], 100) - elbo(model, x[:100])).mean().item()
                 for _ in range(9)]
        trained = elbo(model, vae.to_float(images)).mean().item()
    ELBO, KL, in_use, gain, _ = results.values()
    spread = max(bounds) - min(bounds)
    assert ELBO == pytest.approx(sum(bounds) / 20, abs=2 * spread)
    assert abs(ELBO - trained) > 10 * spread
    assert KL == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
    assert in_use == (kl.mean(0) > 0.01).sum() > 0
    assert min(gains) - 1 < gain < max(gains) + 1 and min(gains) > 0
    picture = np.asarray(vae.plt.gcf().axes[0].images[0].get_array()).squeeze()
    tiles = picture.reshape(9, 30, 18, 30).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
    assert np.abs(tiles[:, 0] - x[:9].view(9, 28, 28).numpy()).max() < 1e-6


def test_picture_shows_images_lines_in_z_and_samples(tmp_path):
    torch.manual_seed(0)
    model, x, means = vae.VAE(784), torch.rand(10, 784), torch.rand(10, 784)
    model.encode = lambda x: (means[: len(x)], 0 * means[: len(x)])
    del model.decoder
    model.decoder = lambda z: z.clone()  # shows z itself
    args = vae.get_args(["--latent-dim", "784", "--out", str(tmp_path)])
    vae.plot_images(args, model, x)
    picture = np.asarray(vae.plt.gcf().axes[0].images[0].get_array()).squeeze()
    tiles = torch.tensor(picture.reshape(9, 30, 18, 30).swapaxes(1, 2)[:, :, 1:-1, 1:-1])
    tiles = tiles.flatten(2)
    torch.testing.assert_close(tiles[:, 0], x[:9])
    for step in range(8):
        expected = means[:9] + (means[1:] - means[:9]) * step / 7
        torch.testing.assert_close(tiles[:, 1 + step], expected)
    samples = tiles[:, 9:]
    assert abs(samples.mean()) < 0.02 and abs(samples.std() - 1) < 0.02  # z from N(0, I)
    assert samples.flatten(0, 1).std(0).min() > 0.7


def test_default_run_learns_the_real_digits(real_data, tmp_path):
    vae.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
              "--train-size", "5000", "--epochs", "4"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    ELBO, KL, in_use, gain, sigma = results.values()
    assert ELBO > 100 and 15 < KL < 80 and in_use > 15  # the mean image has -56
    assert gain > 0 and 0.1 < sigma < 0.3
