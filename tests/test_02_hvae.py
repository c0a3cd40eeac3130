"""The mathematics of 02_hvae.py against torch.distributions and a model whose log p(x) is known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "02_hvae.py")


def affine(W, b, variance=None):
    """x -> W x + b and, where it is given, the log of a fixed variance in the same tensor."""
    def net(x):
        mean = x @ W.T + b
        return mean if variance is None else torch.cat([mean, variance.log().expand_as(mean)], 1)

    return Net(net)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def linear_gaussian(a=None, prior_variance=1.0):
    """z2 ~ N(0, 1), z1 ~ N(b z2 + 0.3, v), x ~ N(c z1 - 0.2, σ²), two of each side by side, with
    the exact q(z1 | x); q(z2 | z1) is exact too, or has the mean a (z1 - 0.3) and variance 1.
    Returns the model, p(x) and (a, b, variance of q(z1 | x))."""
    one = torch.ones(2, dtype=torch.float64)
    b, c = one * torch.tensor([0.8, 1.7]), one * torch.tensor([1.2, -0.5])
    v, sigma2 = prior_variance * one, 0.3 * one
    model = script.TwoLevelVAE(latent_dim=2).double()
    model.logvar.data = sigma2[0].log()
    total = b ** 2 + v  # the variance of z1
    model.decoder2 = affine(b.diag(), 0.3 * one, v)
    model.decoder1 = affine(c.diag(), -0.2 * one)
    s1 = 1 / (1 / total + c ** 2 / sigma2)  # p(z1 | x), by Bayes' rule
    model.encoder1 = affine((s1 * c / sigma2).diag(), s1 * (0.3 / total + 0.2 * c / sigma2), s1)
    exact = a is None
    a = b / total if exact else a * one  # p(z2 | z1) has the mean b (z1 - 0.3) / (b² + v)
    model.encoder2 = affine(a.diag(), -0.3 * a, v / total if exact else one)
    p_x = MultivariateNormal(0.3 * c - 0.2, (c ** 2 * total + sigma2).diag())
    return model, p_x, (a, b, s1)


def bound(model, x, level1="sampled"):
    J1, costs = model.elbo(x, level1)
    return J1 - sum(costs)


def log_weight(model, x):
    """log p(x, z1, z2) / q(z1, z2 | x) at one drawn pair (N,), each factor by torch."""
    def normal(mean, logvar):
        return Normal(mean, (logvar / 2).exp())

    q1 = normal(*model.encoder1(x).chunk(2, 1))
    z1 = q1.sample()
    q2 = normal(*model.encoder2(z1).chunk(2, 1))
    z2 = q2.sample()
    terms = (normal(model.decoder1(z1), model.logvar).log_prob(x), -q1.log_prob(z1),
             normal(*model.decoder2(z2).chunk(2, 1)).log_prob(z1), -q2.log_prob(z2),
             Normal(torch.zeros_like(z2), 1).log_prob(z2))
    return sum(term.detach().sum(1) for term in terms)


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, prior_mu, prior_logvar, x = torch.randn(5, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(prior_mu, (prior_logvar / 2).exp())
    torch.testing.assert_close(script.gaussian_kl(mu, logvar, prior_mu, prior_logvar),
                               kl_divergence(q, p))
    torch.testing.assert_close(script.gaussian_log_density(x, mu, logvar), q.log_prob(x))


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("level1", ["sampled", "closed_form"])
def test_elbo_terms_are_explicit_log_densities_with_all_constants(learn_sigma, level1):
    torch.manual_seed(0)
    model = script.TwoLevelVAE(3, learn_sigma=learn_sigma).double()
    x = torch.rand(6, 784, dtype=torch.float64)
    torch.manual_seed(1)
    J1, (cost1, cost2) = model.elbo(x, level1)
    torch.manual_seed(1)
    mu1, logvar1 = model.encoder1(x).chunk(2, 1)
    z1 = mu1 + (logvar1 / 2).exp() * torch.randn(6, 3, dtype=torch.float64)
    mu2, logvar2 = model.encoder2(z1).chunk(2, 1)
    z2 = mu2 + (logvar2 / 2).exp() * torch.randn(6, 3, dtype=torch.float64)
    prior_mu, prior_logvar = model.prior(z2)
    if learn_sigma:
        expected = model.decoder2(z2)
    else:
        expected = torch.cat([model.decoder2(z2), torch.zeros(6, 3, dtype=torch.float64)], 1)
    torch.testing.assert_close(torch.cat([prior_mu, prior_logvar], 1), expected)
    q1, q2 = Normal(mu1, (logvar1 / 2).exp()), Normal(mu2, (logvar2 / 2).exp())
    p1 = Normal(prior_mu, (prior_logvar / 2).exp())
    p = Normal(model.decoder1(z1), 0.3 if learn_sigma else 1.0)
    torch.testing.assert_close(J1, p.log_prob(x).sum(1), rtol=1e-6, atol=1e-4)
    torch.manual_seed(1)
    torch.testing.assert_close(script.TwoLevelVAE.elbo(model, x)[1][0],  # the default is at the pair
                               (q1.log_prob(z1) - p1.log_prob(z1)).sum(1))
    torch.testing.assert_close(cost2, kl_divergence(q2, Normal(0.0, 1.0)).sum(1))
    at_pair, closed = q1.log_prob(z1) - p1.log_prob(z1), kl_divergence(q1, p1)
    torch.testing.assert_close(cost1, (at_pair if level1 == "sampled" else closed).sum(1))
    assert model.logvar.requires_grad == learn_sigma


def test_as_printed_twice_the_bound_is_the_texts_loss_and_a_constant():
    torch.manual_seed(0)
    model = script.TwoLevelVAE(4, learn_sigma=False, as_printed=True).double()
    x = torch.rand(5, 784, dtype=torch.float64)
    torch.manual_seed(1)
    mean = bound(model, x, "closed_form").mean()
    torch.manual_seed(1)
    mu1, logvar1 = model.encoder1(x).chunk(2, 1)
    z1 = script.reparameterize(mu1, logvar1)
    mu2, logvar2 = model.encoder2(z1).chunk(2, 1)
    z_hat = model.decoder2(script.reparameterize(mu2, logvar2))
    loss = F.mse_loss(model.decoder1(z1), x, reduction="sum")  # App. C.4, all three terms
    loss = loss - (1 + logvar2 - mu2 ** 2 - logvar2.exp()).sum()
    loss = loss - (1 + logvar1 - (mu1 - z_hat) ** 2 - logvar1.exp()).sum()
    torch.testing.assert_close(-2 * mean - 784 * math.log(2 * math.pi), loss / 5)


@pytest.mark.parametrize("prior_variance", [1.0, 0.4])
def test_with_the_exact_posterior_every_draw_weighs_log_p(prior_variance):
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=prior_variance)
    x = p_x.sample((9,))
    torch.testing.assert_close(log_weight(model, x), p_x.log_prob(x))
    elbo = bound(model, x.repeat(100000, 1)).view(-1, 9).mean(0)
    torch.testing.assert_close(elbo, p_x.log_prob(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("a", [None, 0.5, -0.7])
def test_the_texts_closed_form_falls_short_by_what_z2_knows_of_z1(a):
    # At the pair: E ½(z1 - b z2)², z2 drawn from this z1. Closed form: E ½(z1' - b z2)² with z1'
    # drawn again from q(z1 | x), so independent of z2. Both have the same means; the squares differ
    # by -2b Cov(z1, z2) = -2b a σ1², halved and for a prior variance of 1: a·b·σ1² a dimension.
    torch.manual_seed(0)
    model, p_x, (slope, b, s1) = linear_gaussian(a)
    x, bounds = p_x.sample((5,)).repeat(200000, 1), []
    for level1 in ("sampled", "closed_form"):
        torch.manual_seed(1)  # the same draws, so that the difference is sharp
        bounds.append(bound(model, x, level1).view(-1, 5).mean(0))
    shortfall = (slope * b * s1).sum()
    assert shortfall.abs() > 0.1
    torch.testing.assert_close(bounds[0] - bounds[1], shortfall.expand(5), atol=0.02, rtol=0)


def test_the_mean_of_the_weights_is_the_elbo_for_any_posterior():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(a=0.2)
    x = p_x.sample((5,))
    weights = log_weight(model, x.repeat(100000, 1)).view(-1, 5)
    elbo = bound(model, x.repeat(100000, 1)).view(-1, 5).mean(0)
    torch.testing.assert_close(weights.mean(0), elbo, atol=0.03, rtol=0)
    assert (weights.mean(0) < p_x.log_prob(x) - 0.1).all()
    torch.testing.assert_close(weights.exp().mean(0).log(), p_x.log_prob(x), atol=0.03, rtol=0)


def test_samples_have_the_mean_and_covariance_of_the_model():
    torch.manual_seed(0)
    model, p_x, _ = linear_gaussian(prior_variance=0.4)
    x = model.sample(torch.randn(400000, 2, dtype=torch.float64))
    noise = 0.3 * torch.eye(2, dtype=torch.float64)  # `sample` gives x̂ without it
    torch.testing.assert_close(x.mean(0), p_x.mean, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), p_x.covariance_matrix - noise, atol=0.02, rtol=0)


def test_one_level_is_the_vae_of_the_first_file():
    torch.manual_seed(0)
    vae = load_script(ROOT / "01_vae.py").VAE(latent_dim=3)
    one, x = script.TwoLevelVAE(3, levels=1), torch.rand(6, 784)
    one.encoder1, one.decoder1 = vae.encoder, vae.decoder
    for level1 in ("sampled", "closed_form"):
        torch.manual_seed(1)
        J1, (cost,) = one.elbo(x, level1)
        torch.manual_seed(1)
        reconstruction, kl = vae.elbo(x)
        torch.testing.assert_close(J1, reconstruction)
        torch.testing.assert_close(cost, kl)
    z = torch.randn(4, 3)
    torch.testing.assert_close(one.sample(z), vae.decoder(z))


@pytest.mark.parametrize("logvar", [-200.0, 200.0])
def test_extreme_variances_stay_finite(logvar):
    extreme = torch.tensor([logvar], dtype=torch.float64)
    zero = torch.zeros_like(extreme)
    assert script.gaussian_kl(zero, extreme, zero, zero).isfinite().all()
    assert script.gaussian_kl(zero, zero, zero, extreme).isfinite().all()
    for place in ("encoder1", "encoder2", "decoder2"):
        torch.manual_seed(0)
        model, x = script.TwoLevelVAE(3), torch.rand(4, 784)
        getattr(model, place)[-1].bias.data[3:] = logvar  # it asks for it, in float32
        for level1 in ("sampled", "closed_form"):
            bound(model, x, level1).mean().backward()
            assert bound(model, x, level1).isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_log_variances_are_left_alone_from_minus_20_to_20():
    mu, logvar = script.gaussian(torch.tensor([[100.0, -100.0, 19.5, -19.5]]))
    assert mu.tolist() == [[100, -100]] and logvar.tolist() == [[19.5, -19.5]]


def test_as_printed_flag_is_the_texts_network_and_settings():
    args = script.get_args(["--as-printed"])
    assert (args.epochs, args.batch_size, args.lr) == (30, 32, 1e-3)
    assert script.get_args(["--as-printed", "--lr", "0.5"]).lr == 0.5  # what is asked for wins
    model = script.TwoLevelVAE(args.latent_dim, learn_sigma=False, as_printed=True)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(100, 784), (40, 100), (100, 20), (40, 100),  # two encoders, μ and log σ²
                      (100, 20), (20, 100), (100, 20), (784, 100)]  # decoder 2, decoder 1
    nets = model.encoder1, model.encoder2, model.decoder2, model.decoder1[0]
    assert all([type(m) for m in net] == [nn.Linear, nn.ReLU, nn.Linear] for net in nets)
    assert isinstance(model.decoder1[-1], nn.Sigmoid)


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    images, _ = script.draw_characters(32, 0)
    model, x = script.TwoLevelVAE(latent_dim=8), script.scale(images)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = bound(model, x).mean().item()
    for _ in range(800):
        optimizer.zero_grad()
        (-bound(model, x).mean()).backward()
        optimizer.step()
    assert before < 0 and bound(model, x).mean() > 900


# ---- Training, and what is reported -----------------------------------------------------------


class Scalar(nn.Module):
    """Terms of an ELBO that hang on one parameter: J1 = -w Σ x, costs w² and w⁴ / 10."""

    def __init__(self, level1="sampled"):
        super().__init__()
        self.w, self.level1 = nn.Parameter(torch.tensor(0.5)), level1
        self.asked = []

    def elbo(self, x, level1="sampled"):
        self.asked.append((x.clone(), level1, torch.is_grad_enabled()))
        return -self.w * x.sum(1), [self.w.expand(len(x)) ** 2, self.w.expand(len(x)) ** 4 / 10]


def train(model, images, test_x, *flags):
    history = []
    script.train(script.get_args(list(flags)), model, images, test_x, history)
    return history


@pytest.mark.parametrize("printed", [False, True])
def test_training_is_adam_on_the_elbo_with_a_cosine_or_the_texts_constant_rate(printed):
    torch.manual_seed(0)
    images, test_x = torch.randint(256, (40, 2, 2)).byte(), torch.rand(5, 4)
    flags = ["--epochs", "3", "--batch-size", "16", "--lr", "0.05"] + ["--as-printed"] * printed
    torch.manual_seed(5)
    model = Scalar("closed_form")
    history = train(model, images, test_x, *flags)
    torch.manual_seed(5)
    w = torch.tensor(0.5, dtype=torch.float64)
    m = v = torch.zeros((), dtype=torch.float64)
    step, rows = 0, []
    for _ in range(3):
        for batch in torch.randperm(40).split(16):  # 16, 16 and 8 images
            x = images[batch].flatten(1).double() / 255
            gradient = x.sum(1).mean() + 2 * w + 0.4 * w ** 3
            step += 1
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient ** 2
            lr = 0.05 if printed else 0.05 * (1 + math.cos(math.pi * (step - 1) / 9)) / 2
            w = w - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
            rows.append([(-w * test_x.sum(1)).mean() - w ** 2 - w ** 4 / 10, w ** 2, w ** 4 / 10])
    assert model.w.item() == pytest.approx(w.item(), rel=1e-4)
    assert [row["step"] for row in history] == list(range(1, 10))
    for i, name in enumerate(["ELBO", "level 1", "level 2"]):  # on test images
        assert [row[name] for row in history] == pytest.approx([r[i].item() for r in rows], rel=1e-3)
    trained = [level1 for _, level1, grad in model.asked if grad]
    judged = [(x, level1) for x, level1, grad in model.asked if not grad]
    assert trained == ["closed_form"] * 9  # as the model asks
    assert len(judged) == 9 and all(x.equal(test_x) and level1 == "sampled" for x, level1 in judged)


def test_each_epoch_sees_each_image_once_in_a_new_order():
    model, images = Scalar(), torch.arange(50).byte().view(50, 1, 1)
    train(model, images, torch.rand(3, 1), "--epochs", "2", "--batch-size", "7")
    seen = torch.cat([x for x, _, grad in model.asked if grad])
    seen = (seen[:, 0] * 255).round().long().tolist()
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50)) and seen[:50] != seen[50:]


def test_the_last_step_is_reported_too():
    history = train(Scalar(), torch.zeros(46, 2, 2, dtype=torch.uint8), torch.rand(3, 4),
                    "--epochs", "1", "--batch-size", "1")
    assert [row["step"] for row in history] == [*range(3, 46, 3), 46]


def test_default_settings_and_networks():
    args = script.get_args([])
    assert (args.epochs, args.batch_size, args.lr) == (10, 128, 4e-3)
    assert (args.latent_dim, args.as_printed, args.train_size) == (20, False, 60000)
    shapes = [tuple(m.weight.shape) for m in script.TwoLevelVAE(20).modules()
              if isinstance(m, nn.Linear)]
    assert shapes == [(512, 784), (40, 512), (256, 20), (256, 256), (40, 256),  # the encoders
                      (256, 20), (256, 256), (40, 256), (512, 20), (784, 512)]  # the decoders


def test_two_phases_of_training_both_train():
    model, images = Scalar(), torch.zeros(64, 2, 2, dtype=torch.uint8)
    weights = []
    for _ in range(2):
        train(model, images, torch.rand(3, 4), "--epochs", "2", "--batch-size", "16")
        weights.append(model.w.item())
    assert weights[0] != weights[1] and sum(grad for *_, grad in model.asked) == 16


def test_pixels_go_to_zero_one():
    images = torch.arange(784).remainder(256).byte().view(1, 28, 28)
    expected = torch.arange(784).remainder(256) / 255
    torch.testing.assert_close(script.scale(images), expected[None])


SETTINGS = {"repaired": (True, "sampled", 2), "one level": (True, "sampled", 1),
            "closed form": (True, "closed_form", 2), "sigma 1": (False, "sampled", 2),
            "sigma 1, closed form": (False, "closed_form", 2)}


def run(tmp_path, monkeypatch, *flags):
    """`main` on black training and white test images; the models, and what the run left."""
    white, black = (torch.full((600, 28, 28), v, dtype=torch.uint8) for v in (255, 0))
    labels = torch.zeros(600, dtype=torch.long)
    monkeypatch.setattr(script, "load_data", lambda args: (black, labels, white, labels, "mine"))
    seen, saved = [], script.save_model
    monkeypatch.setattr(script, "save_model", lambda args, m: seen.append(m) or saved(args, m))
    script.main(["--quick", "--out", str(tmp_path), "--device", "cpu", *flags])
    return seen[0], tmp_path / "02_hvae"


def test_every_model_is_trained_as_its_name_says_and_judged_on_test_images(tmp_path, monkeypatch):
    trained, evaluated, built = [], [], []
    train, evaluate = script.train, script.evaluate
    VAE = script.TwoLevelVAE
    monkeypatch.setattr(script, "TwoLevelVAE", lambda *values, **settings: built.append(
        torch.initial_seed()) or VAE(*values, **settings))

    def spy_train(args, model, images, test_x, history):
        assert not images.any() and (test_x == 1).all()
        trained.append((model, torch.initial_seed()))
        train(args, model, images, test_x, history)

    def spy_evaluate(model, x):
        evaluated.append((model, x))
        return evaluate(model, x)

    monkeypatch.setattr(script, "train", spy_train)
    monkeypatch.setattr(script, "evaluate", spy_evaluate)
    models, out = run(tmp_path, monkeypatch, "--seed", "3")
    assert list(models) == list(SETTINGS) and built == [3] * 5
    assert all(model is models[name] and seed == 3 for (model, seed), name in zip(trained, SETTINGS))
    for name, expected in SETTINGS.items():
        assert (models[name].learn_sigma, models[name].level1, models[name].levels) == expected
        assert models[name].logvar.requires_grad == expected[0]
    last = evaluated[-5:]
    assert all(model is models[name] for (model, _), name in zip(last, SETTINGS))
    assert all(x.shape == (600, 784) and (x == 1).all() for _, x in last)
    metrics = json.loads((out / "metrics.json").read_text())
    for name, model in models.items():
        torch.manual_seed(0)
        with torch.no_grad():
            draws = [evaluate(model, torch.ones(600, 784)) for _ in range(20)]
        result = metrics["results"][name]
        assert list(result) == ["ELBO", "level 1", "level 2"][:1 + model.levels]
        for key in result:  # within what draws of z1 and z2 differ by
            values = [draw[key] for draw in draws]
            spread = max(values) - min(values) + 1e-4 * abs(values[0])
            assert result[key] == pytest.approx(sum(values) / 20, abs=2 * spread), (name, key)
        assert metrics["history"][name][-1]["step"] == 10
    weights = torch.load(out / "model.pt", weights_only=True)["weights"]
    assert all(weight.equal(weights[name]) for name, weight in models.state_dict().items())


def test_results_do_not_depend_on_the_other_models(tmp_path, monkeypatch):
    all_five, _ = run(tmp_path / "a", monkeypatch)
    train, order = script.train, []

    def only_last(args, model, *rest):
        if not order or model.level1 == "closed_form":
            order.append(model)
        if not model.learn_sigma and model.level1 == "closed_form":
            train(args, model, *rest)

    monkeypatch.setattr(script, "train", only_last)
    alone, _ = run(tmp_path / "b", monkeypatch)
    one, two = (models["sigma 1, closed form"].state_dict() for models in (all_five, alone))
    assert all(one[name].equal(two[name]) for name in one)
    assert not all(value.equal(alone["repaired"].state_dict()[name])
                   for name, value in all_five["repaired"].state_dict().items())


def test_pictures_are_drawn_from_test_images(tmp_path, monkeypatch):
    asked, plot = [], script.plot_images
    monkeypatch.setattr(script, "plot_images", lambda *values: asked.append(values) or plot(*values))
    models, out = run(tmp_path, monkeypatch, "--latent-dim", "3", "--epochs", "0")
    (_, drawn, x), = asked
    assert drawn is models and x.shape == (10, 784) and (x == 1).all()
    assert models["repaired"].encoder1[-1].weight.shape == (6, 512)
    assert {path.name for path in out.glob("*.png")} == {"levels.png", "samples.png"}


def test_as_printed_is_one_model(tmp_path, monkeypatch):
    models, out = run(tmp_path, monkeypatch, "--as-printed")
    (name, model), = models.items()
    assert (model.learn_sigma, model.level1, model.levels) == (False, "closed_form", 2)
    assert model.decoder2[0].weight.shape == (100, 20) and name == "as printed"
    assert list(json.loads((out / "metrics.json").read_text())["results"]) == ["as printed"]


@pytest.fixture
def grids(monkeypatch):
    """What `show_grid` was given, in order."""
    seen = []
    monkeypatch.setattr(script, "show_grid",
                        lambda axes, images, columns, title: seen.append((images, columns, title)))
    return seen


def test_pictures_show_what_the_levels_keep_and_samples_of_every_model(tmp_path, grids):
    args = script.get_args(["--out", str(tmp_path), "--latent-dim", "3"])
    (tmp_path / "02_hvae").mkdir()
    torch.manual_seed(0)
    models = nn.ModuleDict({"a": script.TwoLevelVAE(3), "b": script.TwoLevelVAE(3, levels=1)})
    model, x = models["a"], torch.rand(10, 784)
    asked, sample = [], script.TwoLevelVAE.sample
    for one in models.values():
        one.sample = lambda z, one=one: asked.append(z) or sample(one, z)
    torch.manual_seed(2)
    with torch.no_grad():
        script.plot_images(args, models, x)
        mu1 = model.encoder1(x)[:, :3]
        mu2 = model.encoder2(mu1)[:, :3]
        mean, logvar = model.decoder2(mu2).chunk(2, 1)
        expected = models["b"].decoder1(asked[1])
    (images, columns, _), *samples = grids
    rows = images.view(7, 10, 784)
    assert columns == 10 and rows[0].equal(x)
    torch.testing.assert_close(rows[1], model.decoder1(mu1).detach())
    torch.testing.assert_close(rows[2], model.decoder1(mean).detach())
    torch.manual_seed(2)
    for row in rows[3:]:  # draws of z1 from p(z1 | z2)
        z1 = mean + (logvar / 2).exp() * torch.randn(10, 3)
        torch.testing.assert_close(row, model.decoder1(z1).detach())
    assert asked[0] is asked[1] and asked[0].shape == (1000, 3)
    assert abs(asked[0].mean()) < 0.06 and abs(asked[0].std() - 1) < 0.05
    saved = np.load(tmp_path / "02_hvae" / "samples.npz")
    assert set(saved) == {"a", "b"} and saved["a"].dtype == np.uint8
    assert saved["b"].tolist() == (expected * 255).round().byte().view(-1, 28, 28).tolist()
    assert saved["a"].tolist() != saved["b"].tolist()
    assert [title.split()[-1] for *_, title in samples] == ["a", "b"]
    assert [columns for _, columns, _ in samples] == [20, 20]
    torch.testing.assert_close(samples[1][0].view(40, 784), expected[:40])


def test_default_run_uses_both_levels_on_the_real_digits(real_data, tmp_path, monkeypatch):
    train = script.train

    def only_two(args, model, *rest):
        if model.learn_sigma and model.level1 == "sampled":
            train(args, model, *rest)

    monkeypatch.setattr(script, "train", only_two)
    script.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
                 "--train-size", "6000", "--epochs", "4"])
    results = json.loads((tmp_path / "02_hvae" / "metrics.json").read_text())["results"]
    assert results["repaired"]["level 2"] > 2
    assert results["repaired"]["ELBO"] > results["one level"]["ELBO"] > 150  # mean image: -56
