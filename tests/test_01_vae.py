"""The mathematics of 01_vae.py against torch.distributions and models whose log p(x) is known."""

import json
import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from conftest import ROOT, load_script

script = load_script(ROOT / "01_vae.py")


def linear_gaussian(widen=0.0):
    """A VAE with x̂ = W z + b, the x of 7 draws, log p(x) in closed form, and q = p(z | x) with its
    log-variances raised by `widen`. W has orthogonal columns, so the posterior is diagonal."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))[0] * torch.tensor([1.5, 0.7])
    b, sigma = torch.randn(5, dtype=torch.float64), 0.4
    model = script.VAE(latent_dim=2, sigma=sigma).double()
    precision = 1 + (W ** 2).sum(0) / sigma ** 2  # of p(z | x), by Bayes' rule
    logvar = widen - precision.log()

    def encode(x):
        mu = (x - b) @ (W / sigma ** 2 / precision)
        return mu, logvar.expand_as(mu)

    model.encode = encode
    del model.decoder  # a module can be replaced by a function only if it is deleted first
    model.decoder = lambda z: z @ W.T + b
    marginal = MultivariateNormal(b, W @ W.T + sigma ** 2 * torch.eye(5, dtype=torch.float64))
    x = marginal.sample((7,))
    return model, x, marginal


def elbo(model, x):
    reconstruction, kl = model.elbo(x)
    return reconstruction - kl


def test_kl_and_log_density_are_those_of_torch_distributions():
    torch.manual_seed(0)
    mu, logvar, x = torch.randn(3, 4, 6, dtype=torch.float64)
    q, p = Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), 1)
    torch.testing.assert_close(script.gaussian_kl(mu, logvar), kl_divergence(q, p))
    torch.testing.assert_close(script.pixel_log_density(x, mu, logvar), q.log_prob(x))


@pytest.mark.parametrize("book", [False, True])
@pytest.mark.parametrize("sigma", [0, 1.0, 0.3])
def test_elbo_terms_are_explicit_log_densities_with_all_constants(sigma, book):
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=3, sigma=sigma, book=book), torch.rand(6, 784)
    torch.manual_seed(1)
    reconstruction, kl = model.elbo(x)
    torch.manual_seed(1)
    mu, logvar = model.encode(x)
    torch.testing.assert_close(torch.cat([mu, logvar], 1), model.encoder(x))
    q = Normal(mu, (logvar / 2).exp())
    z = q.mean + q.stddev * torch.randn(6, 3)
    p = Normal(model.decoder(z), sigma or model.logvar.exp().sqrt())
    torch.testing.assert_close(reconstruction, p.log_prob(x).sum(1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    assert reconstruction.shape == kl.shape == (6,)
    assert model.logvar.requires_grad == (sigma == 0)


def test_with_sigma_1_twice_the_elbo_is_the_books_loss_and_a_constant():
    torch.manual_seed(0)
    model, x = script.VAE(4, sigma=1.0, book=True), torch.rand(5, 784)
    torch.manual_seed(1)
    bound = elbo(model, x).mean()
    torch.manual_seed(1)
    mu, logvar = model.encode(x)
    x_hat = model.decoder(script.reparameterize(mu, logvar))
    squares = F.mse_loss(x_hat, x, reduction="sum") / 5
    loss = squares - (1 + logvar - mu ** 2 - logvar.exp()).sum() / 5  # as App. C.4 has it
    torch.testing.assert_close(-2 * bound - 784 * math.log(2 * math.pi), loss)


@pytest.mark.parametrize("logvar", [-200.0, 200.0])
def test_extreme_variances_stay_finite(logvar):
    mu, extreme = torch.zeros(1, dtype=torch.float64), torch.tensor([logvar], dtype=torch.float64)
    assert script.gaussian_kl(mu, extreme).isfinite().all()
    assert script.pixel_log_density(mu, mu, extreme).isfinite().all()
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=3), torch.rand(4, 784)
    model.encoder[-1].bias.data[3:] = logvar  # the encoder asks for it, in float32
    elbo(model, x).mean().backward()
    assert elbo(model, x).isfinite().all() and model.importance_bound(x, 5).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_log_variances_are_left_alone_from_minus_20_to_20():
    model = script.VAE(latent_dim=2)
    model.encoder[-1].weight.data.zero_()
    model.encoder[-1].bias.data = torch.tensor([100.0, -100.0, 19.5, -19.5])
    mu, logvar = model.encode(torch.rand(1, 784))
    assert mu.tolist() == [[100, -100]] and logvar.tolist() == [[19.5, -19.5]]


def test_reparameterization_has_the_gradient_of_the_expectation():
    torch.manual_seed(0)
    mu, logvar = torch.tensor([0.7], requires_grad=True), torch.tensor([-0.4], requires_grad=True)
    z = script.reparameterize(mu.expand(400000), logvar.expand(400000))
    (z ** 2).mean().backward()  # E z² = μ² + σ², so ∂/∂μ = 2μ and ∂/∂log σ² = σ²
    assert mu.grad.item() == pytest.approx(1.4, abs=0.01)
    assert logvar.grad.item() == pytest.approx(math.exp(-0.4), abs=0.01)


def test_with_the_true_posterior_the_elbo_is_log_p():
    model, x, marginal = linear_gaussian()
    mean = sum(elbo(model, x) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, marginal.log_prob(x), atol=0.05, rtol=0)
    # and every single draw of z has the weight p(x, z) / q(z | x) = p(x)
    torch.testing.assert_close(model.importance_bound(x, 1), marginal.log_prob(x))


def test_importance_weighted_bound_rises_with_draws_and_reaches_log_p():
    model, x, marginal = linear_gaussian(widen=1.5)
    true = marginal.log_prob(x)
    many = x.repeat(60000, 1)
    few = {K: model.importance_bound(many, K).view(-1, 7).mean(0) for K in (1, 2, 8)}
    torch.testing.assert_close(few[1], elbo(model, many).view(-1, 7).mean(0), atol=0.1, rtol=0)
    assert (few[1] < few[2]).all() and (few[2] < few[8]).all() and (few[8] < true).all()
    gap = math.exp(1.5) - 1 - 1.5  # of the ELBO: twice KL(N(0, e^1.5) ‖ N(0, 1))
    torch.testing.assert_close(true - few[1], torch.full_like(true, gap), atol=0.1, rtol=0)
    torch.testing.assert_close(model.importance_bound(x, 20000), true, atol=0.03, rtol=0)


def test_importance_weights_are_densities_of_torch_distributions():
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=3), torch.rand(5, 784)
    torch.manual_seed(1)
    bound = model.importance_bound(x, 4)
    torch.manual_seed(1)
    mu, logvar = model.encode(x)
    q = Normal(mu, (logvar / 2).exp())
    z = q.mean + q.stddev * torch.randn(4, 5, 3)
    p = Normal(model.decoder(z), model.logvar.exp().sqrt())
    log_weights = (p.log_prob(x).sum(2) + Normal(0.0, 1.0).log_prob(z).sum(2)
                   - q.log_prob(z).sum(2))
    torch.testing.assert_close(bound, log_weights.logsumexp(0) - math.log(4), rtol=1e-5, atol=1e-3)


def test_learned_sigma_is_at_rest_where_it_equals_the_error():
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=2), torch.rand(64, 784)
    torch.manual_seed(1)
    error = (x - model.decoder(script.reparameterize(*model.encode(x)))).square().mean()
    for factor, sign in ((0.5, 1), (1.0, 0), (2.0, -1)):
        model.logvar.data = (factor * error.detach()).log()
        torch.manual_seed(1)
        slope, = torch.autograd.grad(elbo(model, x).mean(), model.logvar)
        assert abs(slope) < 0.01 if sign == 0 else slope * sign > 100


def test_another_density_of_a_pixel_is_one_function(monkeypatch):
    # A Laplace density in place of the Gaussian: every number that depends on it follows.
    monkeypatch.setattr(script, "pixel_log_density",
                        lambda x, x_hat, logvar: -2 * (x - x_hat).abs())
    torch.manual_seed(0)
    model, x = script.VAE(latent_dim=2), torch.rand(8, 784)
    torch.manual_seed(1)
    reconstruction, _ = model.elbo(x)
    torch.manual_seed(1)
    x_hat = model.decoder(script.reparameterize(*model.encode(x)))
    torch.testing.assert_close(reconstruction, -2 * (x - x_hat).abs().sum(1))
    many = x.repeat(1000, 1)
    with torch.no_grad():
        bound = model.importance_bound(many, 1).view(-1, 8).mean(0)
        mean = elbo(model, many).view(-1, 8).mean(0)
    torch.testing.assert_close(bound, mean, atol=0.5, rtol=0)


def test_book_flag_is_the_books_network_and_settings():
    args = script.get_args(["--book"])
    assert (args.epochs, args.batch_size, args.lr, args.sigma) == (30, 32, 3e-4, 1)
    assert script.get_args(["--book", "--sigma", "0"]).sigma == 0  # what is asked for wins
    quick = script.get_args(["--book", "--quick"])
    assert quick.epochs < 30 and quick.sigma == 1 and quick.batch_size == 32
    model = script.VAE(20, 1.0, book=True)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(200, 784), (40, 200), (200, 20), (784, 200)]  # μ and log σ² in one of 2 · 20
    assert [type(m) for m in model.encoder] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in model.decoder] == [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]
    assert model.logvar.item() == 0 and not model.logvar.requires_grad


def test_32_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    images, _ = script.draw_characters(32, 0)
    model, x = script.VAE(latent_dim=8), script.scale(images)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = elbo(model, x).mean().item()
    for _ in range(600):
        optimizer.zero_grad()
        (-elbo(model, x).mean()).backward()
        optimizer.step()
    assert before < 0 and elbo(model, x).mean() > 900


# ---- Training, and what is reported -----------------------------------------------------------


def test_pixels_go_to_zero_one():
    images = torch.arange(784).remainder(256).byte().view(1, 28, 28)
    expected = torch.arange(784).remainder(256) / 255
    torch.testing.assert_close(script.scale(images), expected[None])
    with pytest.raises(ValueError, match="uint8"):
        script.scale(torch.rand(1, 28, 28))


class Scalar(nn.Module):
    """Terms of an ELBO that hang on one parameter: reconstruction -w Σ x and KL w²."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.asked = []

    def elbo(self, x):
        self.asked.append(x.clone())
        return -self.w * x.sum(1), (self.w ** 2).expand(len(x))


def train(model, images, *flags):
    history = []
    script.train(script.get_args(list(flags)), model, images, history)
    return history


@pytest.mark.parametrize("book", [False, True])
def test_training_is_adam_on_the_elbo_with_a_cosine_or_the_books_constant_rate(book):
    torch.manual_seed(0)
    images = torch.randint(256, (40, 2, 2)).byte()
    flags = ["--epochs", "3", "--batch-size", "16", "--lr", "0.05"] + ["--book"] * book
    torch.manual_seed(5)
    model = Scalar()
    history = train(model, images, *flags)
    torch.manual_seed(5)
    w = torch.tensor(0.5, dtype=torch.float64)
    m = v = torch.zeros((), dtype=torch.float64)
    step, rows = 0, []
    for _ in range(3):
        for batch in torch.randperm(40).split(16):  # 16, 16 and 8 images
            x = images[batch].flatten(1).double() / 255
            rows.append((-(w * x.sum(1)).mean(), w ** 2))
            gradient = x.sum(1).mean() + 2 * w  # of KL - reconstruction
            step += 1
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient ** 2
            lr = 0.05 if book else 0.05 * (1 + math.cos(math.pi * (step - 1) / 9)) / 2
            w = w - lr * (m / (1 - 0.9 ** step)) / ((v / (1 - 0.999 ** step)).sqrt() + 1e-8)
    assert model.w.item() == pytest.approx(w.item(), rel=1e-4)
    assert [row["step"] for row in history] == list(range(1, 10))
    assert [row["reconstruction"] for row in history] == pytest.approx([r.item() for r, _ in rows], rel=1e-4)
    assert [row["KL"] for row in history] == pytest.approx([k.item() for _, k in rows], rel=1e-4)


def test_each_epoch_sees_each_image_once_in_a_new_order():
    model, images = Scalar(), torch.arange(50).byte().view(50, 1, 1)
    train(model, images, "--epochs", "2", "--batch-size", "7")
    seen = (torch.cat(model.asked)[:, 0] * 255).round().long().tolist()
    assert sorted(seen[:50]) == sorted(seen[50:]) == list(range(50)) and seen[:50] != seen[50:]


def test_the_last_step_is_reported_too():
    history = train(Scalar(), torch.zeros(46, 2, 2, dtype=torch.uint8), "--epochs", "1",
                    "--batch-size", "1")
    assert [row["step"] for row in history] == [*range(3, 46, 3), 46]


def test_default_settings():
    args = script.get_args([])
    assert (args.epochs, args.batch_size, args.lr) == (12, 128, 4e-3)
    assert (args.latent_dim, args.sigma, args.book, args.train_size) == (20, 0, False, 60000)
    assert script.VAE().logvar.item() == pytest.approx(2 * math.log(0.3))


def test_two_phases_of_training_both_train():
    model, images = Scalar(), torch.zeros(64, 2, 2, dtype=torch.uint8)
    train(model, images, "--epochs", "2", "--batch-size", "16")
    after_one = model.w.item()
    train(model, images, "--epochs", "2", "--batch-size", "16")
    assert len(model.asked) == 16 and model.w.item() != after_one


def test_results_are_means_over_the_test_images(tmp_path, monkeypatch, capsys):
    white, black = (torch.full((600, 28, 28), v, dtype=torch.uint8) for v in (255, 0))
    labels = torch.zeros(600, dtype=torch.long)
    monkeypatch.setattr(script, "load_data", lambda args: (white, labels, black, labels, "mine"))
    models, asked = [], []
    evaluate, train, others = script.evaluate, script.train, []

    def spy_train(args, model, images, history):
        assert (images == 255).all() and images.shape == (600, 28, 28)  # training images
        train(args, model, images, history)

    monkeypatch.setattr(script, "train", spy_train)
    for name in ("plot_training", "plot_images"):  # on test images
        def plot(args, model, x, *more, real=getattr(script, name)):
            others.append((model, x))
            real(args, model, x, *more)
        monkeypatch.setattr(script, name, plot)

    def spy(model, x):
        models.append(model)
        asked.append(x)
        return evaluate(model, x)

    monkeypatch.setattr(script, "evaluate", spy)
    script.main(["--quick", "--out", str(tmp_path), "--device", "cpu", "--latent-dim", "3"])
    (model,), (x,) = models, asked
    assert x.shape == (600, 784) and not x.any()
    assert len(others) == 2 and all(m is model and images is x for m, images in others)
    out = tmp_path / "01_vae"
    assert {path.name for path in out.glob("*.png")} == {"training.png", "images.png"}
    saved = torch.load(out / "model.pt", weights_only=True)["weights"]
    assert all(weight.equal(saved[name]) for name, weight in model.state_dict().items())
    results = json.loads((out / "metrics.json").read_text())["results"]
    assert list(results) == ["ELBO", "importance-weighted bound, first 100", "KL", "squared error"]
    printed = capsys.readouterr().out
    assert all(f'"{name}": {value}' in printed for name, value in results.items())
    with torch.no_grad():  # many draws of z, by tested functions
        terms = [model.elbo(x) for _ in range(20)]
        bounds = [elbo(model, x).mean().item() for _ in range(20)]
        mu, logvar = model.encode(x)
        squares = torch.stack([(x - model.decoder(script.reparameterize(mu, logvar))).square().sum(1)
                               for _ in range(20)]).mean().item()
        IW = model.importance_bound(x[:100], 100).mean().item()
    assert results["KL"] == pytest.approx(terms[0][1].mean().item(), rel=1e-5)
    spread = max(bounds) - min(bounds)
    assert results["ELBO"] == pytest.approx(sum(bounds) / 20, abs=2 * spread)
    assert results["squared error"] == pytest.approx(squares, rel=0.05)
    assert results["importance-weighted bound, first 100"] == pytest.approx(IW, abs=spread)
    assert results["ELBO"] < results["importance-weighted bound, first 100"]


@pytest.mark.parametrize("flags, shape, logvar", [
    ([], (1000, 784), None), (["--book"], (200, 784), 0.0),
    (["--sigma", "0.5"], (1000, 784), 2 * math.log(0.5)),
    (["--latent-dim", "7"], (1000, 784), None)])
def test_flags_reach_the_model(flags, shape, logvar, tmp_path, monkeypatch):
    data = script.draw_characters(9, 0)
    monkeypatch.setattr(script, "load_data", lambda args: (*data, *data, "mine"))
    script.main(["--quick", "--epochs", "0", "--out", str(tmp_path), *flags])
    weights = torch.load(tmp_path / "01_vae" / "model.pt", weights_only=True)["weights"]
    assert weights["encoder.0.weight"].shape == shape
    assert weights["encoder.2.weight"].shape[0] == (14 if "7" in flags else 40)
    assert weights["logvar"].item() == pytest.approx(2 * math.log(0.3) if logvar is None else logvar)


def test_results_are_the_means_they_are_called():
    model, asked = script.VAE(2), []
    model.elbo = lambda x: (torch.arange(len(x)) * 1.0, torch.full([len(x)], 7.0))
    del model.decoder
    model.decoder = lambda z: torch.zeros(len(z), 784)
    model.importance_bound = lambda x, K: asked.append((x, K)) or torch.arange(len(x)) * 1.0
    x = torch.rand(700, 784)
    with torch.no_grad():
        results = script.evaluate(model, x)
    (images, K), = asked
    assert images.equal(x[:100]) and K == 100
    assert results["importance-weighted bound, first 100"] == pytest.approx(49.5)
    assert results["ELBO"] == pytest.approx(349.5 - 7) and results["KL"] == pytest.approx(7)
    assert results["squared error"] == pytest.approx(x.square().sum(1).mean().item(), rel=1e-5)


def test_a_decoder_of_ones_own_gets_its_codes_one_per_row(tmp_path):
    """Such as one of transposed convolutions, which takes no further dimensions."""
    args = script.get_args(["--out", str(tmp_path)])
    (tmp_path / "01_vae").mkdir()
    model, x = script.VAE(), torch.rand(9, 784)
    model.decoder = nn.Sequential(
        nn.Linear(20, 32 * 49), nn.Unflatten(1, (32, 7, 7)), nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 2, 2), nn.Flatten(), nn.Sigmoid())
    with torch.no_grad():
        assert model.importance_bound(x, 3).shape == (9,)
        assert math.isfinite(script.evaluate(model, x)["ELBO"])
        script.plot_images(args, model, x)
    assert (tmp_path / "01_vae" / "images.png").exists()


@pytest.fixture
def grids(monkeypatch):
    """What `show_grid` was given, in order."""
    seen = []
    monkeypatch.setattr(script, "show_grid",
                        lambda axes, images, columns, title: seen.append((images, columns, title)))
    return seen


def test_pictures_show_reconstructions_lines_and_samples(tmp_path, grids):
    args = script.get_args(["--latent-dim", "400", "--out", str(tmp_path)])
    (tmp_path / "01_vae").mkdir()
    torch.manual_seed(0)
    model, x = script.VAE(400), torch.rand(9, 784)
    means = torch.rand(9, 400)
    model.encode = lambda x: (means[:len(x)], 0 * means[:len(x)])
    del model.decoder
    model.decoder = lambda z: torch.cat([z, z[..., :384]], -1)  # shows z itself
    script.plot_images(args, model, x)
    (left, columns, _), (right, more_columns, _) = grids
    assert columns == more_columns == 9 and left.shape == right.shape == (81, 1, 28, 28)
    left, right = left.flatten(1), right.flatten(1)[:, :400]
    assert left[:9].equal(x)
    torch.testing.assert_close(left[9:18, :400], means)
    for row in range(7):
        for column in range(9):
            expected = means[row] + (means[row + 1] - means[row]) * column / 8
            torch.testing.assert_close(left[18 + 9 * row + column, :400], expected)
    assert abs(right.mean()) < 0.02 and abs(right.std() - 1) < 0.02  # z from the prior
    assert right.std(0).min() > 0.7


def test_plane_of_two_latents_has_equally_likely_steps(tmp_path, grids):
    args = script.get_args(["--latent-dim", "2", "--out", str(tmp_path)])
    (tmp_path / "01_vae").mkdir()
    model, x = script.VAE(2), torch.rand(9, 784)
    del model.decoder
    model.decoder = lambda z: z.repeat_interleave(392, -1)
    script.plot_images(args, model, x)
    z = grids[1][0].view(9, 9, 784)[:, :, [0, -1]]  # (row, column, latent)
    area = Normal(0.0, 1.0).cdf(z.double())
    steps = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    torch.testing.assert_close(area[..., 0], steps.expand(9, 9), atol=1e-5, rtol=0)
    torch.testing.assert_close(area[..., 1], steps.flip(0)[:, None].expand(9, 9), atol=1e-5, rtol=0)


def test_latents_that_are_in_use_are_counted(tmp_path):
    args = script.get_args(["--latent-dim", "5", "--out", str(tmp_path)])
    (tmp_path / "01_vae").mkdir()
    model, x = script.VAE(5), torch.rand(20, 784)
    mu = torch.tensor([0.0, 2.0, 0.1, 0.2, 0.0])  # KL ½ μ²: 0, 2, 0.005, 0.02, 0
    factors = torch.linspace(0.5, 1.5, 20)[:, None]  # images differ; the mean of the squares counts
    factors = factors / factors.square().mean().sqrt()
    model.encode = lambda x: (factors * mu, torch.zeros(20, 5))
    history = [{"step": 1, "reconstruction": -5.0, "KL": 2.0},
               {"step": 2, "reconstruction": -3.0, "KL": 1.0}]
    script.plot_training(args, model, x, history)
    first, second, bars = plt.gcf().axes
    assert first.lines[0].get_xydata().tolist() == [[1, -5], [2, -3]]
    assert second.lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    heights = [patch.get_height() for patch in bars.patches]
    assert heights == pytest.approx([0, 2, 0.005, 0.02, 0]) and "2 in use" in bars.get_title()


def test_default_run_learns_the_real_digits(real_data, tmp_path):
    script.main(["--data", str(real_data), "--out", str(tmp_path), "--device", "cpu",
                 "--train-size", "5000", "--epochs", "4"])
    results = json.loads((tmp_path / "01_vae" / "metrics.json").read_text())["results"]
    assert results["ELBO"] > 150 and 20 < results["KL"] < 80  # the best constant image has -56
