"""02_hvae.py beside torch.distributions, and beside a model whose log p(x) is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

hvae = load_script(ROOT / "02_hvae.py")
EVERY = hvae.MODELS | hvae.FAULTS


class Affine(nn.Module):
    """x -> W x + b and, where it is given, the log of a fixed variance in the same tensor."""

    def __init__(self, W, b, variance=None):
        super().__init__()
        self.W, self.b, self.variance = W, b, variance

    def forward(self, x):
        mean = x @ self.W.T + self.b
        if self.variance is None:
            return mean
        return torch.cat([mean, self.variance.log().expand_as(mean)], 1)


def linear_gaussian(a=None, prior_variance=1.0):
    """z2 ~ N(0, 1), z1 ~ N(b z2 + 0.3, v), x ~ N(c z1 - 0.2, σ²), two of each side by side, with
    the exact q(z1 | x); q(z2 | z1) is exact too, or has the mean a (z1 - 0.3) and variance 1.
    Returns the model, p(x) and (a, b, variance of q(z1 | x))."""
    one = torch.ones(2, dtype=torch.float64)
    b, c = one * torch.tensor([0.8, 1.7]), one * torch.tensor([1.2, -0.5])
    v, sigma2 = prior_variance * one, 0.3 * one
    model = hvae.TwoLevelVAE(2).double()
    model.pixel_logvar.data = sigma2[0].log()
    total = b**2 + v  # the variance of z1
    model.decoder2 = Affine(b.diag(), 0.3 * one, v)
    model.decoder1 = Affine(c.diag(), -0.2 * one)
    s1 = 1 / (1 / total + c**2 / sigma2)  # p(z1 | x), by Bayes' rule
    model.encoder1 = Affine((s1 * c / sigma2).diag(), s1 * (0.3 / total + 0.2 * c / sigma2), s1)
    exact = a is None
    a = b / total if exact else a * one  # p(z2 | z1) has the mean b (z1 - 0.3) / (b² + v)
    model.encoder2 = Affine(a.diag(), -0.3 * a, v / total if exact else one)
    p_x = MultivariateNormal(0.3 * c - 0.2, (c**2 * total + sigma2).diag())
    return model, p_x, (a, b, s1)


def log_weight(model, x):
    """log p(x, z1, z2) / q(z1, z2 | x) at one drawn pair (N,), each factor by torch."""

    def normal(mean, logvar):
        return Normal(mean, (logvar / 2).exp())

    q1 = normal(*model.encoder1(x).chunk(2, 1))
    z1 = q1.sample()
    q2 = normal(*model.encoder2(z1).chunk(2, 1))
    z2 = q2.sample()
    terms = (normal(model.decoder1(z1), model.pixel_logvar).log_prob(x), -q1.log_prob(z1),
             normal(*model.decoder2(z2).chunk(2, 1)).log_prob(z1), -q2.log_prob(z2),
             Normal(torch.zeros_like(z2), 1).log_prob(z2))
    return sum(term.detach().sum(1) for term in terms)


def mean_elbo(model, x, draws, *J3_term):
    """J1 + J2 + J3 (N,), the mean of many draws of z1 and z2."""
    return sum(model.elbo(x.repeat(draws, 1), *J3_term)).detach().view(draws, len(x)).mean(0)


# ---- Lesson one: the ELBO (text C.1 to C.3) ------------------------------------------


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, prior_mu, prior_logvar, x = torch.randn(5, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())
    kl = hvae.gaussian_kl(mu, logvar, prior_mu, prior_logvar)
    torch.testing.assert_close(kl, kl_divergence(q, p))
    torch.testing.assert_close(hvae.gaussian_log_density(x, mu, logvar), q.log_prob(x))


def test_terms_are_those_of_the_text():
    """J1, J2 and J3 one by one, in expectation, in a model where each can be worked out."""
    torch.manual_seed(0)
    model, p_x, (a, b, s1) = linear_gaussian(a=0.5)
    x, n = p_x.sample((4,)), 200000
    found = [term.detach().view(n, 4).mean(0) for term in model.elbo(x.repeat(n, 1))]
    m1, s = model.encoder1(x).chunk(2, 1)  # z1 = m1 + √s1 ε, x ~ N(c z1 - 0.2, 0.3)
    c = torch.tensor([1.2, -0.5], dtype=torch.float64)
    error = (x - c * m1 + 0.2) ** 2 + c**2 * s1
    J1 = -0.5 * (math.log(2 * math.pi * 0.3) + error / 0.3)
    m2 = a * (m1 - 0.3)  # z2 = m2 + a √s1 ε + ε', and its KL to N(0, 1) at variance 1
    J2 = -0.5 * (m2**2 + a**2 * s1)
    rest = m1 - b * m2 - 0.3  # z1 - b z2 - 0.3 has the variance (1 - a b)² s1 + b²
    log_p = -0.5 * (math.log(2 * math.pi) + rest**2 + (1 - a * b) ** 2 * s1 + b**2)
    J3 = log_p + Normal(0.0, s1.sqrt()).entropy()
    for term, expected in zip(found, (J1, J2, J3)):
        torch.testing.assert_close(term, expected.sum(1), atol=0.03, rtol=0)


@pytest.mark.parametrize("prior_variance", [1.0, 0.4])
def test_with_the_exact_posterior_every_draw_weighs_log_p(prior_variance):
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=prior_variance)
    x = p_x.sample((9,))
    torch.testing.assert_close(log_weight(model, x), p_x.log_prob(x))
    torch.testing.assert_close(mean_elbo(model, x, 50000), p_x.log_prob(x), atol=0.03, rtol=0)


def test_for_any_posterior_the_elbo_is_the_mean_log_weight():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(a=0.2)
    x = p_x.sample((5,))
    weights = log_weight(model, x.repeat(100000, 1)).view(-1, 5)
    torch.testing.assert_close(weights.mean(0), mean_elbo(model, x, 100000), atol=0.03, rtol=0)
    assert (weights.mean(0) < p_x.log_prob(x) - 0.1).all()
    torch.testing.assert_close(weights.exp().mean(0).log(), p_x.log_prob(x), atol=0.03, rtol=0)


def test_samples_have_the_mean_and_covariance_of_the_model():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=0.4)
    x = model.sample(torch.randn(400000, 2, dtype=torch.float64))
    noise = 0.3 * torch.eye(2, dtype=torch.float64)  # `sample` gives x̂ without it
    torch.testing.assert_close(x.mean(0), p_x.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), p_x.covariance_matrix - noise, atol=0.02, rtol=0)


def test_networks_are_layers_with_silu_in_between():
    kinds = [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    model = hvae.TwoLevelVAE(20)
    for net in (model.encoder2, model.decoder2):
        assert [type(layer) for layer in net] == kinds
    images = model.sample(100 * torch.randn(50, 20))
    assert images.shape == (50, 784) and 0 <= images.min() < images.max() <= 1


# ---- Second lesson: the faults (text C.3 to C.5) -------------------------------------


@pytest.mark.parametrize("a", [None, 0.5, -0.7])
def test_the_closed_form_falls_short_by_what_z2_knows_of_z1(a):
    """By Cov(z1, ẑ(z2) | x) = a b σ1² in each dimension: ½ E[(z1 - ẑ)²] with z1 that z2 was drawn
    from, and with z1 drawn anew, have the same means and differ by the covariance."""
    torch.manual_seed(0)
    model, p_x, (slope, b, s1) = linear_gaussian(a)
    x = p_x.sample((5,))
    bounds = []
    for J3 in (hvae.sampled_J3, hvae.closed_form_J3):
        torch.manual_seed(1)  # the same draws, so that the difference is sharp
        bounds.append(mean_elbo(model, x, 200000, J3))
    shortfall = (slope * b * s1).sum()
    assert shortfall.abs() > 0.1
    torch.testing.assert_close(bounds[0] - bounds[1], shortfall.expand(5), atol=0.03, rtol=0)


def test_with_both_faults_twice_the_bound_is_the_texts_loss_and_a_constant():
    """The three squared errors and KL of text C.4."""
    torch.manual_seed(0)
    model, x = hvae.SigmaOne(4), torch.rand(5, 784).repeat(400, 1)
    with torch.no_grad():
        elbo = sum(model.elbo(x, hvae.closed_form_J3)).mean()
        mu1, logvar1 = model.encoder1(x).chunk(2, 1)
        z1 = Normal(mu1, (logvar1 / 2).exp()).sample()
        mu2, logvar2 = model.encoder2(z1).chunk(2, 1)
        z1_hat = model.decoder2(Normal(mu2, (logvar2 / 2).exp()).sample())[:, :4]
        loss = (model.decoder1(z1) - x).square().sum(1)
        loss = loss - (1 + logvar2 - mu2**2 - logvar2.exp()).sum(1)
        loss = loss - (1 + logvar1 - (mu1 - z1_hat) ** 2 - logvar1.exp()).sum(1)
    found = -2 * elbo - 784 * math.log(2 * math.pi)
    assert found.item() == pytest.approx(loss.mean().item(), abs=0.2)
    assert not model.pixel_logvar.requires_grad


def test_one_level_is_the_vae_of_the_first_file():
    torch.manual_seed(0)
    vae = load_script(ROOT / "01_vae.py").VAE(3)
    one, x = hvae.OneLevel(3), torch.rand(6, 784)
    one.encoder1, one.decoder1 = vae.encoder, vae.decoder
    many = x.repeat(2000, 1)
    with torch.no_grad():
        J1, _, J3 = (term.view(2000, 6).mean(0) for term in one.elbo(many, hvae.closed_form_J3))
        reconstruction, kl = (term.view(2000, 6).mean(0) for term in vae.elbo(many))
        *_, sampled = (term.view(2000, 6).mean(0) for term in one.elbo(many))
    torch.testing.assert_close(J1, reconstruction, atol=1.0, rtol=0)
    torch.testing.assert_close(J3, -kl)
    torch.testing.assert_close(sampled, J3, atol=0.1, rtol=0)  # here the closed form is right
    assert one.sample(torch.zeros(9, 3)).std(0).max() > 0  # z1 is drawn, whatever z2 is


# ---- Training ------------------------------------------------------------------------


class Scalar(nn.Module):
    """J1 = -(w - mean x)², J2 = -w², J3 = -w² or what is asked for."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.tensor(0.0)), []

    def elbo(self, x, J3_term=lambda w: -(w**2)):
        assert self.training
        self.seen.append(x)
        w = self.w.expand(len(x))
        return -((w - x.mean(1)) ** 2), -(w**2), J3_term(w)


def train(model, images, *flags, **more):
    history = []
    hvae.train(hvae.get_args([*map(str, flags)]), model.eval(), images, history, **more)
    return history


@pytest.mark.parametrize("J3, best", [(lambda w: -(w**2), 1 / 3), (lambda w: 0 * w, 1 / 2)])
def test_training_maximizes_the_sum_of_the_three_terms(J3, best):
    model, white = Scalar(), torch.full([1024, 4, 4], 255, dtype=torch.uint8)
    history = train(model, white, "--epochs", 20, "--lr", 0.05, J3_term=J3)
    assert model.w.item() == pytest.approx(best, abs=0.01)
    assert history[-1][:2] == [160, pytest.approx(1 - best, abs=1e-3)]
    first = model.w.item()
    train(model, 0 * white, "--epochs", 20, "--lr", 0.05, J3_term=J3)  # a second phase trains as well
    assert first != model.w.item() == pytest.approx(0, abs=0.01)


def test_each_epoch_sees_each_image_once_in_a_new_order():
    torch.manual_seed(0)
    model, images = Scalar(), torch.arange(50).byte().view(50, 1, 1)
    train(model, images, "--epochs", 3, "--batch-size", 7, J3_term=lambda w: -(w**2))
    assert [len(x) for x in model.seen] == 3 * [*[7] * 7, 1]
    order = (torch.cat(model.seen) * 255).round().view(3, 50)
    assert order.sort(1).values.equal(torch.arange(50.0).expand(3, 50))
    assert not (order[1:] == order[:-1]).all(1).any()


def test_training_without_further_words_is_that_of_the_elbo():
    """A model trained by hand or by `train` gets J3 at the drawn pair, whatever its class."""
    torch.manual_seed(0)
    images, _ = hvae.draw_characters(32)
    model, x = hvae.TwoLevelVAE(8), hvae.to_float(images)
    before = mean_elbo(model, x, 1).mean().item()
    history = train(model, images, "--epochs", 500, "--lr", 3e-3)
    after = mean_elbo(model, x, 100).mean().item()
    assert before < 0 and after > 300  # 32 images are learned by heart
    assert history[-1][1] == pytest.approx(-after, abs=40)


# ---- What a run reports --------------------------------------------------------------


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main --faults` on digits to train and their negatives to test."""
    patch = pytest.MonkeyPatch()
    torch.manual_seed(0)
    images, labels = hvae.draw_characters(512)
    data = images, labels, 255 - images[:200], labels[:200], "mine"
    patch.setattr(hvae, "load_data", lambda args: data)
    out = tmp_path_factory.mktemp("run")
    hvae.main(["--quick", "--faults", "--latent-dim", "4", "--out", str(out), "--device", "cpu"])
    patch.undo()
    picture = [np.asarray(axes.images[0].get_array()).squeeze() for axes in hvae.plt.gcf().axes]
    titles = [axes.get_title() for axes in hvae.plt.gcf().axes]
    models = nn.ModuleDict({name: kind(4) for name, (kind, _) in EVERY.items()})
    models.load_state_dict(torch.load(out / "model.pt", weights_only=True)["weights"])
    x = hvae.to_float(255 - images[:200])
    return out, json.loads((out / "metrics.json").read_text()), models, x, picture, titles


def test_results_are_the_true_elbo_of_each_model_on_test_images(a_run):
    _, metrics, models, x, *_ = a_run
    assert list(metrics["results"]) == list(EVERY) == list(metrics["history"])
    for name, model in models.items():
        with torch.no_grad():
            draws = torch.stack([torch.stack(model.elbo(x)).mean(1) for _ in range(30)])
        J1, J2, J3 = draws.T
        found = metrics["results"][name].values()
        for value, expected in zip(found, (J1 + J2 + J3, -J3, -J2)):
            spread = (expected.max() - expected.min()).item() + 1e-3
            assert value == pytest.approx(expected.mean().item(), abs=2 * spread), name


def test_each_model_is_trained_as_its_name_says(a_run):
    """Its last training loss is what its own J3 gives, and a model of the same seed repeats it."""
    _, metrics, models, *_ = a_run
    losses = {name: rows[-1][1] for name, rows in metrics["history"].items()}
    torch.manual_seed(0)
    images, _ = hvae.draw_characters(512)
    for name, (kind, J3) in EVERY.items():
        found = -mean_elbo(models[name], hvae.to_float(images), 3, J3).mean().item()
        assert losses[name] == pytest.approx(found, abs=10), name
    assert [models[name].pixel_logvar.item() == 0 for name in EVERY] == [
        False, True, False, False, True]
    assert len({round(loss, 3) for loss in losses.values()}) == 5


def test_the_default_run_trains_the_first_three_in_the_same_way(a_run, tmp_path, monkeypatch):
    _, metrics, *_ = a_run
    torch.manual_seed(0)
    images, labels = hvae.draw_characters(512)
    data = images, labels, 255 - images[:200], labels[:200], "mine"
    monkeypatch.setattr(hvae, "load_data", lambda args: data)
    hvae.main(["--quick", "--latent-dim", "4", "--out", str(tmp_path), "--device", "cpu"])
    again = json.loads((tmp_path / "metrics.json").read_text())["history"]
    assert list(again) == ["repaired", "as in the text", "one level"]
    for name, rows in again.items():
        assert [row[:2] for row in rows] == [row[:2] for row in metrics["history"][name]]


def test_picture_shows_what_each_level_keeps_and_samples(a_run):
    out, _, models, x, pictures, titles = a_run
    saved = np.load(out / "samples.npz")
    for (name, model), picture, title in zip(models.items(), pictures, titles, strict=True):
        assert title.startswith(name)
        tiles = picture.reshape(11, 30, 10, 30).swapaxes(1, 2)[:, :, 1:-1, 1:-1]
        tiles = torch.tensor(tiles).flatten(2)
        with torch.no_grad():
            mu1 = model.encoder1(x[:10])[:, :4]
            mu2 = model.encoder2(mu1)[:, :4]
            z1_hat, logvar = model.prior(mu2)
            torch.testing.assert_close(tiles[0], x[:10])
            torch.testing.assert_close(tiles[1], model.decoder1(mu1))
            torch.testing.assert_close(tiles[2], model.decoder1(z1_hat))
            draws = torch.stack([model.sample(mu2) for _ in range(300)])
            error = (tiles[3:6] - draws.mean(0)).square().mean((1, 2)).sqrt()
        assert (error < 2 * draws.std(0).square().mean().sqrt() + 1e-6).all()
        assert not tiles[3].equal(tiles[4])
        assert saved[name].shape == (1000, 28, 28) and saved[name].dtype == np.uint8
        shown = tiles[6:].reshape(50, 28, 28) * 255
        assert (shown - torch.tensor(saved[name][:50])).abs().max() < 0.51


def test_both_levels_are_used_on_the_real_digits_and_the_texts_version_uses_one(
        real_data, tmp_path):
    hvae.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
               "--train-size", "6000", "--epochs", "4"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    ELBO, _, level2 = results["repaired"].values()
    assert level2 > 0.5 and ELBO > results["one level"]["ELBO in nats"] > 100  # mean image: -56
    assert results["as in the text"]["cost of level 2"] < 0.1
