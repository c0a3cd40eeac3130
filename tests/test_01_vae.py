"""01_vae.py beside torch.distributions, and beside a model whose log p(x) is known."""

import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from conftest import ROOT, load_script

vae = load_script(ROOT / "01_vae.py")


def linear_gaussian(widen=0.0):
    """x = W z + b with noise of standard deviation ½; q is p(z | x), but the log-variances of
    the first two latents are raised by `widen`. The columns of W are orthogonal, so that the
    posterior is diagonal; `mm` takes rows only, as a network of one's own may.
    Returns the model, p(x), the squared lengths of the columns, and the log-variances of q."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7, 0.04])
    b, lengths = torch.randn(5, dtype=torch.float64), W.square().sum(0)
    precision = 1 + lengths / 0.25  # of p(z | x), by Bayes' rule
    logvar = torch.tensor([widen, widen, 0]) - precision.log()

    def encoder(x):
        mu = (x - b).mm(W / 0.25 / precision)
        return torch.cat([mu, logvar.expand_as(mu)], 1)

    model = vae.VAE(3)
    model.encoder.forward = encoder
    model.decoder.forward = lambda z: z.mm(W.T) + b
    model.pixel_logvar.data = torch.tensor(0.25, dtype=torch.float64).log()
    return model, MultivariateNormal(b, W @ W.T + 0.25 * torch.eye(5)), lengths, logvar


def gap(widen):
    """How far the ELBO is below log p(x): KL(q(z | x) ‖ p(z | x)), of two widened latents."""
    return math.exp(widen) - 1 - widen


# ---- Lesson one: the ELBO (text 8.1.1 and C.3) ---------------------------------------


def test_kl_and_log_density_are_those_of_torch_distributions():
    mu, logvar, x = torch.randn(3, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), 1)
    assert_close(vae.gaussian_kl(mu, logvar), kl_divergence(q, p))
    assert_close(vae.gaussian_log_density(x, mu, logvar), q.log_prob(x))


@pytest.mark.parametrize("widen", [0.0, 1.5])
def test_terms_are_those_of_the_text_and_fall_short_of_log_p_by_a_kl(widen):
    """In expectation; so are the slopes of the ELBO in x and in the two log-variances. With σ = 1,
    -2 ELBO is the loss of text C.4, squared error + 2 KL, and a constant. And by the slope in
    log σ², ½ (error / σ² - 5), a learned σ² is at rest where it is the mean squared error."""
    model, p_x, lengths, q_logvar = linear_gaussian(widen)
    x, n, logvar = p_x.sample((4,)).requires_grad_(), 100000, model.pixel_logvar
    q_logvar.requires_grad_()
    found = [term.view(n, 4).mean(0) for term in model.elbo(x.repeat(n, 1))]
    mu, _ = model.encode(x)
    error = (x - model.decoder(mu)).square().sum(1) + (lengths * q_logvar.exp()).sum()
    reconstruction = -0.5 * (5 * (math.log(2 * math.pi) + logvar) + error / logvar.exp())
    kl = -0.5 * (1 + q_logvar - mu**2 - q_logvar.exp()).sum(1)
    assert_close(found, [reconstruction, kl], atol=0.08, rtol=0)
    elbos = found[0] - found[1], reconstruction - kl
    slopes = [torch.autograd.grad(elbo.sum(), [x, q_logvar, logvar], retain_graph=True)
              for elbo in elbos]
    assert_close(*slopes, atol=0.2, rtol=0)
    assert_close(p_x.log_prob(x) - elbos[1], torch.full_like(kl, gap(widen)))


def test_networks_are_two_layers_with_silu_in_between_and_give_pixels_in_zero_one():
    model = vae.VAE()
    kinds = [nn.Linear, nn.SiLU, nn.Linear]
    assert [type(layer) for layer in [*model.encoder, *model.decoder]] == [*2 * kinds, nn.Sigmoid]
    assert model.decoder(torch.randn(5, 20)).shape == (5, 784)


# ---- Second lesson: a tighter bound (text 8.3.1: Jensen) -----------------------------


def test_importance_weighted_bound_rises_with_draws_and_reaches_log_p():
    model, p_x, *_ = linear_gaussian(widen=1.5)
    x = p_x.sample((7,))
    true, many = p_x.log_prob(x), x.repeat(40000, 1)
    one, two, eight = (
        vae.importance_bound(model, many, K).view(-1, 7).mean(0) for K in (1, 2, 8))
    assert_close(one, true - gap(1.5), atol=0.1, rtol=0)  # K = 1: the ELBO
    assert (one < two).all() and (two < eight).all() and (eight < true).all()
    assert_close(vae.importance_bound(model, x, 20000), true, atol=0.05, rtol=0)
    exact, *_ = linear_gaussian()  # every draw has the weight p(x, z) / p(z | x) = p(x)
    assert_close(vae.importance_bound(exact, x, 1), true)


# ---- Training ------------------------------------------------------------------------


class Scalar(nn.Module):
    """An ELBO that hangs on one parameter: reconstruction -(w - mean x)², and KL w²."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.tensor(0.0)), []

    def elbo(self, x):
        assert self.training
        self.seen.append(x)
        return -((self.w - x.mean(1)) ** 2), self.w.expand(len(x)) ** 2


def test_training_maximizes_the_elbo():
    """Each epoch sees each image once, in a new order; pixels go from 0..255 to [0, 1]. With
    pixels of mean ½ the ELBO has no slope at w = ¼."""
    model, history, images = Scalar().eval(), [], torch.arange(0, 256, 5).byte().view(52, 1, 1)
    args = vae.get_args("--epochs 30 --batch-size 20 --lr 0.05".split())
    vae.train(args, model, images, history)
    order = torch.cat(model.seen).view(30, 52) * 51
    assert [len(x) for x in model.seen] == 30 * [20, 20, 12]
    assert_close(order.sort(1).values, torch.arange(52.0).expand(30, 52))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert model.w.item() == pytest.approx(0.25, abs=0.02)
    reconstruction, kl = model.elbo(images.flatten(1) / 255)
    loss = (kl - reconstruction).mean().item()
    assert history[-1][:2] == [90, pytest.approx(loss, abs=0.03)]


# ---- What a run reports --------------------------------------------------------------


def test_results_are_those_of_the_linear_gaussian_model(monkeypatch):
    """Where the third latent tells 0.003 nats. The first hundred x are the likelier ones, so that
    a gain over the ELBO of others would be noticed."""
    bound, asked = vae.importance_bound, set()
    monkeypatch.setattr(vae, "importance_bound", lambda model, x, K: (
        asked.add(f"K = {K} ({len(x)} images)") or bound(model, x, K)))
    model, p_x, *_ = linear_gaussian(widen=1.5)
    x = p_x.sample((200,))
    true, order = p_x.log_prob(x).sort(descending=True)
    draws = [[*vae.evaluate(model, x[order]).values()] for _ in range(50)]
    ELBO, KL, in_use, gain, sigma = torch.tensor(draws).mean(0).tolist()
    mu, logvar = model.encode(x)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1).mean().item()
    assert ELBO == pytest.approx(true.mean().item() - gap(1.5), abs=0.4)
    assert asked.pop() in " ".join(vae.evaluate(model, x))
    assert gain == pytest.approx(gap(1.5), abs=0.4)  # with K = 100 nearly all
    assert (KL, in_use, sigma) == (pytest.approx(kl), 2, pytest.approx(0.5))


def shown():
    """The tiles of the picture without their frames, (9, 18, 784)."""
    picture = torch.tensor(vae.plt.gcf().axes[0].images[0].get_array())
    return picture.view(9, 30, 18, 30)[:, 1:-1, :, 1:-1].transpose(1, 2).flatten(2)


@pytest.mark.parametrize("sigma", [0.5, 0.0])
def test_a_run_trains_all_but_a_fixed_sigma_and_reports_on_test_images(
        sigma, tmp_path, monkeypatch):
    """With digits to train, and their negatives to test."""
    images, labels = vae.draw_characters(256)
    data = images, labels, 255 - images[:12], labels[:12], "mine"
    train, start = vae.train, {}

    def watched(args, model, images, history):
        start.update({name: value.clone() for name, value in model.state_dict().items()})
        train(args, model, images, history)

    monkeypatch.setattr(vae, "load_data", lambda args: data)
    monkeypatch.setattr(vae, "train", watched)
    vae.main(["--quick", "--sigma", str(sigma), "--latent-dim", "3", "--out", str(tmp_path),
              "--device", "cpu"])
    model, x = vae.VAE(3), data[2].flatten(1) / 255
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True)["weights"])
    still = [name for name, value in model.state_dict().items() if value.equal(start[name])]
    assert still == ["pixel_logvar"] * (sigma > 0)
    assert not sigma or model.pixel_logvar.item() == pytest.approx(2 * math.log(sigma))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    draws = torch.tensor([[*vae.evaluate(model, x).values()] for _ in range(20)])
    found = torch.tensor([*metrics["results"].values()])
    assert ((found - draws.mean(0)).abs() < 5 * draws.std(0) + 1e-3).all()
    first, *_, last = [row[1] for row in metrics["history"]]
    reconstruction, kl = model.elbo(images.flatten(1) / 255)
    assert first - 100 > last == pytest.approx((kl - reconstruction).mean().item(), abs=20)
    assert_close(shown()[:, 0], x[:9])


def test_picture_shows_images_lines_in_z_and_samples(tmp_path):
    model, x, means = vae.VAE(784), torch.rand(10, 784), torch.rand(10, 784)
    model.encoder.forward = lambda x: torch.cat([means, 0 * means], 1)
    model.decoder.forward = lambda z: z.mm(torch.eye(784))  # shows z itself
    args = vae.get_args(["--latent-dim", "784", "--out", str(tmp_path)])
    vae.plot_images(args, model, x)
    tiles = shown()
    assert_close(tiles[:, 0], x[:9])
    for step in range(8):
        assert_close(tiles[:, 1 + step], means[:9] + (means[1:] - means[:9]) * step / 7)
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
