"""02_hvae.py beside torch.distributions, and beside a model whose log p(x) is known."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from conftest import ROOT, load_script

hvae = load_script(ROOT / "02_hvae.py")
NAMED = {
    "repaired": (hvae.TwoLevelVAE, hvae.sampled_J3),
    "as in the text": (hvae.SigmaOne, hvae.closed_form_J3),
    "one level": (hvae.OneLevel, hvae.closed_form_J3),
    "closed form alone": (hvae.TwoLevelVAE, hvae.closed_form_J3),
    "sigma 1 alone": (hvae.SigmaOne, hvae.sampled_J3),
}


def gaussian(mean, variance):
    """What a network gives: means (N, 2) and, beside them, the logs of the variances."""
    return torch.cat([mean, variance.log().expand_as(mean)], 1)


def linear_gaussian(a=None, v=1.0):
    """z2 ~ N(0, 1), z1 ~ N(b z2 + 0.3, v), x ~ N(c z1 - 0.2, 0.3), two of each side by side, with
    the exact q(z1 | x); q(z2 | z1) is exact too, or has the mean a (z1 - 0.3) and variance 1.
    Returns the model, p(x) and (a, b, c, variance of q(z1 | x))."""
    b, c = torch.tensor([[0.8, 1.7], [1.2, -0.5]], dtype=torch.float64)
    one, total = torch.ones_like(b), b**2 + v  # the variance of z1
    s1 = 1 / (1 / total + c**2 / 0.3)  # of p(z1 | x), by Bayes' rule
    a, s2 = (b / total, v / total) if a is None else (a * one, one)
    model = hvae.TwoLevelVAE(2)
    model.decoder2.forward = lambda z2: gaussian(b * z2 + 0.3, v * one)
    model.decoder1.forward = lambda z1: c * z1 - 0.2
    model.pixel_logvar.data = (0.3 * one[0]).log()
    model.encoder1.forward = lambda x: gaussian(s1 * (0.3 / total + c * (x + 0.2) / 0.3), s1)
    model.encoder2.forward = lambda z1: gaussian(a * (z1 - 0.3), s2)
    p_x = MultivariateNormal(0.3 * c - 0.2, (c**2 * total + 0.3).diag())
    return model, p_x, (a, b, c, s1)


def normal(parameters):
    """The distribution whose means and log-variances a network gives, side by side."""
    mean, logvar = parameters.chunk(2, 1)
    return Normal(mean, (logvar / 2).exp())


def log_weight(model, x):
    """log p(x, z1, z2) / q(z1, z2 | x) at one drawn pair (N,), each factor by torch."""
    q1 = normal(model.encoder1(x))
    z1 = q1.sample()
    q2 = normal(model.encoder2(z1))
    z2 = q2.sample()
    log_p_x = Normal(model.decoder1(z1), (model.pixel_logvar / 2).exp()).log_prob(x)
    log_p = log_p_x + normal(model.decoder2(z2)).log_prob(z1) + Normal(0.0, 1.0).log_prob(z2)
    return (log_p - q1.log_prob(z1) - q2.log_prob(z2)).sum(1).detach()


def mean_elbo(model, x, draws, *J3_term):
    """J1 + J2 + J3 (N,), the mean of many draws of z1 and z2."""
    return sum(model.elbo(x.repeat(draws, 1), *J3_term)).detach().view(draws, len(x)).mean(0)


# ---- Lesson one: the ELBO (text C.1 to C.3) ------------------------------------------


def test_kl_and_log_density_are_those_of_torch_distributions():
    q, p = torch.randn(2, 4, 6, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert_close(hvae.gaussian_log_density(x, *q.chunk(2, 1)), normal(q).log_prob(x))
    kl = hvae.gaussian_kl(*q.chunk(2, 1), *p.chunk(2, 1))
    assert_close(kl, kl_divergence(normal(q), normal(p)))
    zero = torch.zeros(())  # in float32, where a variance of exp(-200) underflows
    assert hvae.gaussian_kl(zero, zero - 200, zero, zero) == (200 - 1) / 2


def test_terms_are_those_of_the_text():
    """In expectation; so are the slopes of their sum in x and in the two variances."""
    model, p_x, (a, b, c, s1) = linear_gaussian(a=0.5)
    x, n, logvar = p_x.sample((4,)).requires_grad_(), 200000, model.pixel_logvar
    s1.requires_grad_()
    found = [term.view(n, 4).mean(0) for term in model.elbo(x.repeat(n, 1))]
    m1, _ = model.encoder1(x).chunk(2, 1)  # z1 = m1 + √s1 ε, x ~ N(c z1 - 0.2, 0.3)
    error = (x - c * m1 + 0.2) ** 2 + c**2 * s1
    J1 = -0.5 * (math.log(2 * math.pi) + logvar + error / logvar.exp())
    m2 = a * (m1 - 0.3)  # z2 = m2 + a √s1 ε + ε', and its KL to N(0, 1) at variance 1
    J2 = -0.5 * (m2**2 + a**2 * s1)
    rest = m1 - b * m2 - 0.3  # z1 - b z2 - 0.3 has the variance (1 - a b)² s1 + b²
    log_p = -0.5 * (math.log(2 * math.pi) + rest**2 + (1 - a * b) ** 2 * s1 + b**2)
    J3 = log_p + Normal(0.0, s1.sqrt()).entropy()
    expected = [J1.sum(1), J2.sum(1), J3.sum(1)]
    assert_close(found, expected, atol=0.03, rtol=0)
    slopes = [torch.autograd.grad(sum(y).sum(), [x, s1, logvar]) for y in (found, expected)]
    assert_close(*slopes, atol=0.2, rtol=0)


@pytest.mark.parametrize("a, v", [(0.2, 1.0), (None, 1.0), (None, 0.4)])
def test_for_any_posterior_the_elbo_is_the_mean_log_weight(a, v):
    """And the mean weight is p(x); with the exact posterior, every draw has that weight."""
    model, p_x, _ = linear_gaussian(a, v)
    x, n = p_x.sample((5,)), 100000
    weights, true = log_weight(model, x.repeat(n, 1)).view(n, 5), p_x.log_prob(x)
    assert_close(mean_elbo(model, x, n), weights.mean(0), atol=0.03, rtol=0)
    assert_close(weights.exp().mean(0).log(), true, atol=0.03, rtol=0)
    gap = true - weights.mean(0)
    assert (gap.abs() < 1e-6).all() if a is None else (gap > 0.1).all()


def test_samples_have_the_mean_and_covariance_of_the_model():
    model, p_x, _ = linear_gaussian(v=0.4)
    x = model.sample(torch.randn(400000, 2, dtype=torch.float64))
    assert_close(x.mean(0), p_x.mean, atol=0.01, rtol=0)
    covariance = p_x.covariance_matrix - 0.3 * torch.eye(2)  # `sample` gives x̂, without noise
    assert_close(torch.cov(x.T), covariance, atol=0.02, rtol=0)


def test_networks_are_layers_with_silu_in_between():
    model = hvae.TwoLevelVAE(20)
    kinds = [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert [type(layer) for layer in [*model.encoder2, *model.decoder2]] == 2 * kinds
    images = model.sample(100 * torch.randn(50, 20))
    assert images.shape == (50, 784) and 0 <= images.min() < images.max() <= 1


# ---- Second lesson: the faults (text C.3 to C.5) -------------------------------------


@pytest.mark.parametrize("a", [None, 0.5, -0.7])
def test_the_closed_form_falls_short_by_what_z2_knows_of_z1(a):
    """By Cov(z1, ẑ(z2) | x) = a b s1 in each dimension: ½ E[(z1 - ẑ)²] with the z1 that z2 was
    drawn from, and with z1 drawn anew, have the same means and differ by the covariance."""
    model, p_x, (a, b, _, s1) = linear_gaussian(a)
    x, bounds = p_x.sample((5,)), []
    for J3 in (hvae.sampled_J3, hvae.closed_form_J3):
        torch.manual_seed(1)  # the same draws, so that the difference is sharp
        bounds.append(mean_elbo(model, x, 200000, J3))
    assert_close(bounds[0] - bounds[1], (a * b * s1).sum().expand(5), atol=0.03, rtol=0)
    ELBO, *_ = hvae.evaluate(model, x.repeat(20000, 1)).values()  # however it was trained
    assert ELBO == pytest.approx(bounds[0].mean().item(), abs=0.05)


def test_with_both_faults_twice_the_bound_is_the_texts_loss_and_a_constant():
    """The three squared errors and KL of text C.4."""
    model, x = hvae.SigmaOne(4), torch.rand(5, 784).repeat(1000, 1)
    model.decoder2.forward = lambda z2: gaussian(z2 + 1, 3 * torch.ones(4))  # 3 has no say
    with torch.no_grad():
        elbo = sum(model.elbo(x, hvae.closed_form_J3)).mean().item()
        q1 = normal(model.encoder1(x))
        z1 = q1.sample()
        q2 = normal(model.encoder2(z1))
        z1_hat = model.decoder2(q2.sample())[:, :4]
        loss = (model.decoder1(z1) - x).square().sum(1)
        for mu, variance in ((q2.mean, q2.variance), (q1.mean - z1_hat, q1.variance)):
            loss = loss - (1 + variance.log() - mu**2 - variance).sum(1)
    constant = 784 * math.log(2 * math.pi)
    assert -2 * elbo - constant == pytest.approx(loss.mean().item(), abs=0.2)
    assert not model.pixel_logvar.requires_grad


def test_one_level_has_the_prior_n_0_1():
    model, x = hvae.OneLevel(3), torch.rand(6, 784)
    *_, J3 = model.elbo(x, hvae.closed_form_J3)
    assert_close(J3, -kl_divergence(normal(model.encoder1(x)), Normal(0.0, 1.0)).sum(1))
    assert model.sample(torch.zeros(9, 3)).std(0).max() > 0  # z1 is drawn, whatever z2 is


# ---- Training, and what a run reports ------------------------------------------------


class Scalar(nn.Module):
    """J1 = -(w - mean x)², J2 = -w², and J3 of z1 = 1, q(z1 | x) = N(0, 1), p(z1 | z2) = N(w, 1):
    ½ - ½ (1 - w)² for the z1 that was drawn, -½ w² in closed form."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.tensor(0.0)), []

    def elbo(self, x, J3_term=hvae.sampled_J3):
        assert self.training
        self.seen.append(x)
        w, zero = self.w.expand(len(x)), torch.zeros(len(x))
        return -((w - x.mean(1)) ** 2), -(w**2), J3_term(zero + 1, (zero, zero), (w, zero))


@pytest.mark.parametrize("more, best", [({}, 0.4), ({"J3_term": hvae.closed_form_J3}, 0.2)])
def test_training_maximizes_the_sum_of_the_three_terms(more, best):
    """Each epoch sees each image once, in a new order; J3 is that of the draw, if not told else.
    With pixels of mean ½ the sum has no slope at w = 2/5, and in closed form at 1/5."""
    model, history, images = Scalar().eval(), [], torch.arange(0, 256, 5).byte().view(52, 1, 1)
    args = hvae.get_args("--epochs 60 --batch-size 20 --lr 0.05".split())
    hvae.train(args, model, images, history, **more)
    order = torch.cat(model.seen).view(60, 52) * 51
    assert [len(x) for x in model.seen] == 60 * [20, 20, 12]
    assert order.sort(1).values.round().equal(torch.arange(52.0).expand(60, 52))
    assert not (order[1:] == order[:-1]).all(1).any()
    assert model.w.item() == pytest.approx(best, abs=0.02)
    loss = -sum(model.elbo(hvae.to_float(images), **more)).mean().item()
    assert history[-1][:2] == [180, pytest.approx(loss, abs=0.03)]


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """`main`, plain and with --faults, on digits to train and their negatives to test."""
    out, seen, train = tmp_path_factory.mktemp("run"), [], hvae.train
    torch.manual_seed(0)
    images, labels = hvae.draw_characters(512)
    data = images, labels, 255 - images[:200], labels[:200], "mine"

    def watched(args, model, images, history, J3_term=hvae.sampled_J3):
        seen.append(((type(model), J3_term), torch.rand(1).item()))
        train(args, model, images, history, J3_term)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvae, "load_data", lambda args: data)
        patch.setattr(hvae, "train", watched)
        for flags in (["--epochs", "0"], ["--faults"]):
            flags += ["--quick", "--latent-dim", "4", "--out", str(out), "--device", "cpu"]
            hvae.main(flags)
    metrics = json.loads((out / "metrics.json").read_text())
    models = nn.ModuleDict({name: kind(4) for name, (kind, _) in NAMED.items()})
    models.load_state_dict(torch.load(out / "model.pt", weights_only=True)["weights"])
    pictures = [(axes.get_title(), axes.images[0].get_array()) for axes in hvae.plt.gcf().axes]
    x, test_x = hvae.to_float(images), hvae.to_float(data[2])
    samples = np.load(out / "samples.npz")
    return models.requires_grad_(False), x, test_x, seen, metrics, pictures, samples


def test_each_model_is_trained_and_evaluated_as_its_name_says(a_run):
    """On the same training images as the others; the results are those of test images."""
    models, x, test_x, seen, metrics, *_ = a_run
    kinds = list(NAMED.values())  # the last two only with --faults
    assert [kind for kind, _ in seen] == kinds[:3] + kinds and len({draw for _, draw in seen}) == 1
    for name, model in models.items():
        J1, J2, J3 = torch.stack([torch.stack(model.elbo(test_x)).mean(1) for _ in range(30)], 1)
        results = metrics["results"][name].values()
        for found, draws in zip(results, (J1 + J2 + J3, -J3, -J2), strict=True):
            assert abs(found - draws.mean()) < 5 * draws.std() + 1e-3, name
        first, *_, last = [row[1] for row in metrics["history"][name]]
        loss = -mean_elbo(model, x, 3, NAMED[name][1]).mean().item()
        assert first - 10 > last == pytest.approx(loss, abs=10), name


def test_picture_shows_what_each_level_keeps_and_samples(a_run):
    models, _, x, *_, pictures, samples = a_run
    for (name, model), (title, picture) in zip(models.items(), pictures, strict=True):
        assert title.startswith(name)
        tiles = torch.tensor(picture).view(11, 30, 10, 30)[:, 1:-1, :, 1:-1]
        tiles = tiles.transpose(1, 2).flatten(2)
        mu1 = model.encoder1(x[:10])[:, :4]
        mu2 = model.encoder2(mu1)[:, :4]
        rows = [x[:10], model.decoder1(mu1), model.decoder1(model.prior(mu2)[0])]
        assert_close(tiles[:3], torch.stack(rows))
        assert not tiles[3].equal(tiles[4])
        saved = torch.tensor(samples[name])
        assert saved.shape == (1000, 28, 28) and saved.dtype == torch.uint8
        assert (tiles[6:].reshape(50, 28, 28) * 255 - saved[:50]).abs().max() < 0.51


def test_samples_stand_below_the_image_whose_z2_they_have_and_other_z2_are_standard_normal(tmp_path):
    """Of a model whose z1, z2 and x̂ are the image itself, but for a little noise."""
    model, x = hvae.TwoLevelVAE(784), torch.rand(10, 784)
    for network in (model.encoder1, model.encoder2, model.decoder2):
        network.forward = lambda z: gaussian(z, torch.tensor(-20.0).exp())
    model.decoder1.forward = lambda z1: z1
    args = hvae.get_args(["--latent-dim", "784", "--out", str(tmp_path)])
    hvae.plot_levels(args, nn.ModuleDict({"sharp": model}), x)
    tiles = torch.tensor(hvae.plt.gcf().axes[0].images[0].get_array())
    tiles = tiles.view(11, 30, 10, 30)[:, 1:-1, :, 1:-1].transpose(1, 2).flatten(2)
    assert_close(tiles[:6], x.expand(6, 10, 784), atol=1e-3, rtol=0)
    z2 = tiles[6:]
    assert abs(z2.mean()) < 0.02 and abs(z2.std() - 1) < 0.02 and z2.std((0, 1)).min() > 0.6


def test_on_real_digits_both_levels_are_used_but_one_in_the_texts_model(real_data, tmp_path):
    hvae.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
               "--train-size", "6000", "--epochs", "4"])
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    ELBO, _, level2 = results["repaired"].values()
    assert level2 > 0.5 and ELBO > results["one level"]["ELBO in nats"] > 100  # mean image: -56
    assert results["as in the text"]["cost of level 2"] < 0.1
