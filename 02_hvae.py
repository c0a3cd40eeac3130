"""The two-level VAE of the text's Appendix C, and what keeps it from working as printed.

A second latent z2 explains the first, z1, and z1 explains the image (App. C.1):

    p(z2) p(z1 | z2) p(x | z1),  q(z1 | x) q(z2 | z1)          all Gaussian; p(z2) = N(0, I)
    log p(x) ≥ E_q[log p(x | z1)]                              reconstruction, J1 (App. C.2)
             - E_q[log q(z1 | x) - log p(z1 | z2)]             level 1, -J3
             - E_q[KL(q(z2 | z1) ‖ p(z2))]                     level 2, -J2

each estimated at one drawn pair z1, z2 (App. C.3), in nats with all constants. Three faults:

1. As printed the code stops: imports and two classes are commented out, so `nn` is undefined. And
   log(sigma**2) is -inf once σ² underflows; here the log σ² that the networks give stays as it is.
2. The text computes level 1 as KL(q(z1 | x) ‖ p(z1 | z2)) in closed form. That draws z1 afresh, but
   z2 came from this very z1: the pair belongs together. The closed form charges a z2 for all it
   knows of the noise in its z1: a·b·σ1² nats a dimension for p(z1 | z2) = N(b z2, 1) and
   q(z2 | z1) of mean a z1. At σ = 1 that is enough to switch z2 off.
3. p(x | z1) = N(x̂, I). With σ = 1 an image is worth few nats (01_vae.py), and z1 hardly needs a
   better prior. Here σ is learned, and the variance of p(z1 | z2) depends on z2: one that is the
   same everywhere, like the text's 1, would only set the unit of z1.

Run     python 02_hvae.py    (--as-printed: the text's network, settings and loss; --quick; --help)
Expect  on two CPU cores 2 minutes; five pictures, samples, weights in out/02_hvae. Three models
        of equal width learn from the same batches. Test images, nats an image; 1,000 samples, their
        Fréchet distance to the test images by the last features of a classifier:
                                        ELBO   level 1  level 2   Fréchet distance  rarest class
        two levels, fixed               +814      45     10.9           226             7.6%
        one level                       +805      64       -            606             1.9%
        two levels, σ = 1, text's loss  -739       7      0.0004        689             1.7%
        the same, fault 2 mended        -739       3      3.4           591             0.7%
        --as-printed (4 minutes)        -740       6      0.001         822             1.4%
        The text's loss (App. C.4) with its settings falls to 38.62. Real MNIST, seed 0, two cores
        of an AMD EPYC, 2026-11-22. Samples gain because N(0, I) puts z1 where the encoder puts few
        images (prior.png shows it); p(z1) = ∫ p(z1 | z2) p(z2) dz2 learns where they are.
Try     easy: --as-printed. What is z2 good for then?
        medium: --latent-dim 5. Which level loses the most nats, and what do the samples lose?
        harder: `exact=True` for all models in `train` (line 4 of the table).
"""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

@dataclass
class Config:
    """Settings. Each is a flag; its comment is the help, a bracket at the end what is allowed."""
    data: str = ""  # folder of the four MNIST files, or "drawn"; else $MNIST_DIR, else data/mnist
    out: str = "out"  # folder for pictures, metrics, weights and samples
    device: str = "auto"  # where to compute [auto|cuda|mps|cpu]
    seed: int = 0  # of weights, noise and order [0..4294967295]
    epochs: int = 10  # passes over the training images [0..100000]
    batch_size: int = 128  # images a step [1..60000]
    lr: float = 4e-3  # learning rate of Adam [0..1]
    train_size: int = 0  # training images to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate, draw and sample
    quick: bool = False  # the whole path in seconds, on a few hundred images
    as_printed: bool = False  # train the text's model alone, with its settings
    schedule: str = "cosine"  # lr: warm-up and down to 0, or as it is [cosine|constant]
    warmup: float = 1.0  # epochs in which the KL comes in: first z2 learns, then it costs [0..1000]
    latent_dim: int = 20  # numbers in z1, and in z2 [2..1000]
    hidden_dim: int = 256  # width of the hidden layers [1..10000]
    layers: int = 2  # hidden layers; from the second on they add to their input [1..20]
    activation: str = "SiLU"  # between the layers [SiLU|ReLU]
    samples: int = 100  # images for samples.npz [0..100000]

PRESETS = dict(
    as_printed=dict(epochs=30, batch_size=32, lr=1e-3, schedule="constant", warmup=0.0,
                    hidden_dim=100, layers=1, activation="ReLU"),
    quick=dict(train_size=512, epochs=2, batch_size=32))
SHAPES = ("as_printed", "latent_dim", "hidden_dim", "layers", "activation")  # of a checkpoint
PIXELS = (0, 1)  # black and white

# ---- Model ---------------------------------------------------------------------------------------

class Residual(nn.Module):
    """A hidden layer that adds to its input (N, H) instead of replacing it."""

    def __init__(self, dim, activation):
        super().__init__()
        self.activation, self.linear = activation(), nn.Linear(dim, dim)

    def forward(self, h):
        return h + self.linear(self.activation(h))

def mlp(input_dim, hidden_dim, output_dim, layers, activation):
    """(N, input_dim) -> (N, output_dim) over hidden layers; with one, the text's network."""
    return nn.Sequential(nn.Linear(input_dim, hidden_dim),
                         *[Residual(hidden_dim, activation) for _ in range(layers - 1)],
                         activation(), nn.Linear(hidden_dim, output_dim))

class GaussianNet(nn.Module):
    """x (N, D) -> mu, logvar of a Gaussian over (N, output_dim) that x determines. `unit` fixes the
    variance to 1, as the text does for p(z1 | z2): then logvar is 0."""

    def __init__(self, input_dim, hidden_dim, output_dim, layers, activation, unit=False):
        super().__init__()
        self.unit = unit
        self.net = mlp(input_dim, hidden_dim, (2 - unit) * output_dim, layers, activation)

    def forward(self, x):
        if self.unit:
            mu = self.net(x)
            return mu, 0 * mu
        mu, logvar = self.net(x).chunk(2, 1)  # (N, 2 output_dim) -> 2 x (N, output_dim)
        return mu, logvar.clamp(-20, 20)  # σ from e^-10 to e^10: whatever the net says, finite

def reparameterize(mu, logvar):
    """A draw z = μ + σ ε from N(μ, σ²) through which gradients reach μ and log σ² (App. C.3)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

def gaussian_log_density(x, mu, logvar):
    """log N(x; μ, σ²) per element, in nats, constants included."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu).square() * torch.exp(-logvar))

def gaussian_kl(mu, logvar, prior_mu, prior_logvar):
    """KL(N(μ, σ²) ‖ N(prior μ, prior σ²)) per element, in nats (App. C.3 for prior σ² = 1)."""
    difference = logvar - prior_logvar
    return 0.5 * (difference.exp() - 1 - difference
                  + (mu - prior_mu).square() * torch.exp(-prior_logvar))

class TwoLevelVAE(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1) and q(z1 | x) q(z2 | z1); x (N, D), pixels in [0, 1]. `printed`
    fixes the variances of p(x | z1) and p(z1 | z2) to 1, as the text does. With `levels=1` there is
    no z2 and p(z1) = N(0, I), as in 01_vae.py."""

    def __init__(self, latent_dim=20, hidden_dim=256, layers=2, activation=nn.SiLU, printed=False,
                 levels=2, input_dim=784):
        super().__init__()
        shape, self.latent_dim, self.levels = (layers, activation), latent_dim, levels
        self.encoder1 = GaussianNet(input_dim, hidden_dim, latent_dim, *shape)  # q(z1 | x)
        if levels == 2:
            self.encoder2 = GaussianNet(latent_dim, hidden_dim, latent_dim, *shape)  # q(z2 | z1)
            self.decoder2 = GaussianNet(  # p(z1 | z2)
                latent_dim, hidden_dim, latent_dim, *shape, unit=printed)
        self.decoder1 = nn.Sequential(  # the mean x̂ of p(x | z1)
            mlp(latent_dim, hidden_dim, input_dim, *shape), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(0.0 if printed else 2 * math.log(0.1)))  # log σ²
        self.x_logvar.requires_grad_(not printed)

    def elbo(self, x, exact=True):
        """Terms in nats, each (N,): reconstruction, level 1, level 2; ELBO = first - the others.
        `exact=False` gives the text's KL(q(z1 | x) ‖ p(z1 | z2)) for level 1 (fault 2): exact where
        there is one level, but with two only both together are a KL, of q(z1, z2 | x)."""
        mu1, logvar1 = self.encoder1(x)
        z1 = reparameterize(mu1, logvar1)
        prior, level2 = (0 * z1, 0 * z1), 0 * z1  # of a single level
        if self.levels == 2:
            mu2, logvar2 = self.encoder2(z1)
            prior = self.decoder2(reparameterize(mu2, logvar2))
            level2 = gaussian_kl(mu2, logvar2, 0 * mu2, 0 * mu2)  # -J2
        if exact:  # -J3 at the drawn pair
            level1 = gaussian_log_density(z1, mu1, logvar1) - gaussian_log_density(z1, *prior)
        else:  # App. C.3, item 3
            level1 = gaussian_kl(mu1, logvar1, *prior)
        reconstruction = gaussian_log_density(x, self.decoder1(z1), self.x_logvar)  # J1
        return reconstruction.sum(1), level1.sum(1), level2.sum(1)

    @torch.no_grad()
    def sample_z1(self, n):
        """z2 ~ p(z2), then z1 ~ p(z1 | z2): (n, latent_dim)."""
        top = torch.randn(n, self.latent_dim).to(self.x_logvar)
        return reparameterize(*self.decoder2(top)) if self.levels == 2 else top

    @torch.no_grad()
    def sample(self, n):
        """n images (n, D): z2 -> z1 -> the mean x̂(z1), without the noise σ."""
        return self.decoder1(self.sample_z1(n))

def flat(images):
    """uint8 (N, 28, 28) -> (N, 784) in [0, 1]."""
    return images.flatten(1).float() / 255

# ---- Training ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(models, test_x):
    """Test ELBO, by the exact estimate for every model, and both levels, in nats an image."""
    results = {}
    for name, model in models.items():
        J1, level1, level2 = (term.mean().item() for term in model.elbo(test_x))
        results |= {name: J1 - level1 - level2, f"{name}_level1": level1, f"{name}_level2": level2}
    return results

def train(run, models, images, test_x):
    """Trains all models on the same batches of uint8 (N, 28, 28), each for itself: they share no
    parameters, and Adam treats every parameter alone."""
    c = run.config
    optimizer = torch.optim.Adam(models.parameters(), c.lr, fused=run.device.type != "mps")
    for index in run.batches(len(images), lambda: evaluate(models, test_x)):
        x, loss = flat(images[index]), 0.0
        beta = min(1, (run.step + 1) / (c.warmup * run.steps / c.epochs + 1))  # KL warm-up
        for name, model in models.items():
            J1, level1, level2 = model.elbo(x, exact=name == "fixed")
            loss = loss - (J1 - beta * (level1 + level2)).mean()
        run.log(loss=loss)
        if c.schedule == "cosine":
            warm, done = min(1, (run.step + 1) / 100), run.step / run.steps
            optimizer.param_groups[0]["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        loss.backward()
        for model in models.values():
            nn.utils.clip_grad_norm_(model.parameters(), 1000.0)  # nats of 784 pixels: large
        optimizer.step()

# ---- Figures -------------------------------------------------------------------------------------

NAMES = dict(fixed="two levels, fixed", one="one level", text="two levels, σ = 1")
STYLES = dict(fixed="C0.-", one="C1.--", text="C2.:")

def draw_training(run, models):
    """What each level costs, and the ELBO, over training on test images."""
    axes = (figure := Figure((12, 3.5), layout="constrained")).subplots(1, 3)
    labels = ("level 2: KL(q(z2 | z1) ‖ p(z2))", "level 1: log q(z1 | x) / p(z1 | z2)", "ELBO")
    epochs, last = [row["epoch"] for row in run.history], run.history[-1]
    two = [name for name in models if name != "one"]  # those that have a level 2
    for ax, key, label in zip(axes, ("_level2", "_level1", ""), labels):
        for name in two if key == "_level2" else models:
            values = [row[name + key] for row in run.history]
            ax.plot(epochs, values, STYLES[name], label=NAMES[name])
        ax.set(xlabel="epoch", ylabel=f"{label} (nats)")
        ax.legend()
    axes[0].set_yscale("log")
    if "one" in models:  # σ = 1 costs 1,500 nats: out of sight
        low, high = min(run.history[0]["one"], run.history[0]["fixed"]), last["fixed"]
        axes[2].set_ylim(low - 10, high + 0.1 * (high - low) + 10)
    carried = ", ".join(f"{last[name + '_level2']:.4f} ({NAMES[name]})" for name in two)
    run.figure("training", f"Nats that the upper level carries at the end: {carried}", figure)

def draw_reconstructions(run, models, x):
    """Test images from z1 and from z2 alone, and many z1 for one z2."""
    rows = {"x": x[:12]}
    for name, model in models.items():
        mu1, _ = model.encoder1(x[:12])
        rows[f"{NAMES[name]}: z1"] = model.decoder1(mu1)
        if name != "one":
            mu2, _ = model.encoder2(mu1)
            rows[f"{NAMES[name]}: z2"] = model.decoder1(model.decoder2(mu2)[0])
    images = torch.cat(list(rows.values())).view(-1, 1, 28, 28)
    run.grid("reconstructions", "What z1 keeps of a test image, and what z2 alone keeps", images,
             12, (10, 0.7 * len(rows) + 0.6), yticks=list(rows))
    model = next(iter(models.values()))
    z2 = model.encoder2(model.encoder1(x[:8])[0])[0]  # (8, 784) -> (8, L)
    z1 = reparameterize(*model.decoder2(z2.repeat_interleave(11, 0)))  # (88, L)
    drawn = torch.cat([x[:8, None], model.decoder1(z1).view(8, 11, -1)], 1)  # (8, 12, 784)
    run.grid("z2", "z2 of the test image at the left, z1 drawn anew: what a row shares, z2 holds",
             drawn.view(-1, 1, 28, 28), 12, (8, 5.8))

def draw_samples(run, models):
    """Samples of each model; samples.npz holds those of the first."""
    images = torch.cat([model.sample(48) for model in models.values()]).view(-1, 1, 28, 28)
    run.grid("samples", "Samples: z2 → z1 → x̂, or z1 → x̂", images, 16,
             (10, 1.6 * len(models) + 0.6),
             yticks=sum((["", NAMES[name], ""] for name in models), []))
    run.samples(next(iter(models.values())).sample(run.config.samples).view(-1, 1, 28, 28))

def draw_prior(run, models, x, labels):
    """q(z1), by digit, against draws from p(z1), along the two directions that part the digits."""
    names = [name for name in models if name != "text"] or ["text"]
    figure = Figure((5 * len(names), 5), layout="constrained")
    for place, name in enumerate(names, 1):
        ax = figure.add_subplot(1, len(names), place)
        z = reparameterize(*models[name].encoder1(x)).cpu()
        means = torch.stack([z[labels.cpu() == digit].mean(0) for digit in labels.unique().cpu()])
        plane = torch.linalg.svd(means - means.mean(0))[2][:2].T  # (L, 2)
        ax.scatter(*(z @ plane).T.numpy(), s=2, c=labels.cpu().numpy(), cmap="tab10", alpha=0.5,
                   label="q(z1), colored by digit")
        drawn = models[name].sample_z1(1000).cpu() @ plane
        ax.scatter(*drawn.T.numpy(), s=4, c="black", label="p(z1)")
        ax.set(title=NAMES[name], xlabel="z1, in the plane where the digits' means differ most")
        ax.legend(loc="upper right")
    run.figure("prior", "Where the prior p(z1) lies, and where the encoder puts images", figure)

# ---- Plumbing: the same in every file ------------------------------------------------------------

import argparse, gzip, hashlib, io, json, os, re, shutil, signal  # noqa: E401
import sys, time, urllib.request, zipfile  # noqa: E401
from pathlib import Path
import matplotlib

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST = {  # file name: SHA-256 of its unzipped content
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}
FACES = ("DejaVu Sans", "DejaVu Sans:bold", "DejaVu Sans:oblique", "DejaVu Serif", "cmr10",
         "DejaVu Serif:italic", "DejaVu Sans Mono", "STIXGeneral", "STIXGeneral:italic", "cmss10")
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # all eyes tell apart

def parse(argv=None):
    """Flags from Config: a field's comment is its help, a bracket at the end what is allowed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda what: parser.exit(2, f"{parser.prog}: {what} (--help lists the flags)\n")
    source = Path(__file__).read_text(encoding="utf-8").split("class Config:")[1]
    rules = re.findall(r"^    (\w+): \w+ = .*?  # (.*?(?:\[(.*)\])?)$", source, re.M)
    for name, text, _ in rules:
        kind, default = Config.__annotations__[name], getattr(Config, name)
        how = dict(action="store_true") if kind is bool else dict(type=kind, metavar=kind.__name__)
        text = text.replace("%", "%%") + f" (default {default})" * (default not in ("", False))
        parser.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)
    for name in PRESETS:
        if "--" + name.replace("_", "-") in (sys.argv if argv is None else argv):
            parser.set_defaults(**PRESETS[name])
    for name in Config.__annotations__.keys() - {name for name, *_ in rules}:
        parser.error(f"in Config {name} should look like its neighbors, name: type = value  # help")
    config = Config(**vars(parser.parse_args(argv)))
    for name, _, allowed in rules:
        value, (low, dots, high) = getattr(config, name), allowed.partition("..")
        if allowed and not (float(low) <= value <= float(high or "inf") if dots
                            else str(value) in allowed.split("|")):
            parser.error(f"--{name.replace('_', '-')} {value} is not in [{allowed}]")
    if not config.epochs and not config.load:
        parser.error("--epochs 0 trains nothing and so needs --load")
    return config

def whole(path, write):
    """Lets `write(file)` finish in memory, then moves a file into place: all of it or nothing."""
    write(memory := io.BytesIO())
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(memory.getvalue())
        part.replace(path)
    except OSError as fault:
        raise OSError(fault.errno, fault.strerror, str(path)) from None  # a full disk names no file
    finally:
        part.unlink(missing_ok=True)

def download(path, digest):
    """Fetches a gzipped file to `path`. Raises ConnectionError when that fails everywhere."""
    for mirror in MIRRORS:
        try:
            print(f"downloading {mirror}{path.name}", flush=True)
            raw = urllib.request.urlopen(mirror + path.name, timeout=10).read()
            if hashlib.sha256(gzip.decompress(raw)).hexdigest() == digest:
                return whole(path, lambda file: file.write(raw))
            reason = "what came is not MNIST"
        except Exception as fault:  # whatever it was, the next mirror may do better
            reason = fault
    raise ConnectionError(f"{path.name} cannot be downloaded ({reason})")

def load_mnist(folder):
    """Train images, train labels, test images, test labels: uint8 (N, 28, 28) and int64 (N,).
    IDX files in `folder`, gzipped or not, are taken as they are, missing ones downloaded. Raises
    SystemExit naming a malformed file, ConnectionError where a download fails."""
    arrays = []
    for name, digest in MNIST.items():
        path = Path(folder, name) if Path(folder, name).exists() else Path(folder, name + ".gz")
        if not path.exists():
            download(path, digest)
        raw, rank = path.read_bytes(), 3 if "images" in name else 1
        try:
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
            magic, *shape = np.frombuffer(raw[:4 + 4 * rank], ">i4").tolist()
            array = torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)).view(shape)
            if magic != 2048 + rank or not (shape[1:] == [28, 28] if rank == 3 else
                                            shape == [len(arrays[-1])] and array.max() < 10):
                raise ValueError
        except Exception:  # gzip, numpy and torch each raise their own
            raise SystemExit(f"{path} is cut short or not an IDX file of 28x28 images or their "
                             "labels: replace it, or delete it to have it downloaded") from None
        arrays.append(array if rank == 3 else array.long())
    return arrays

def draw_characters(count, seed, characters="0123456789"):
    """Characters of matplotlib's fonts, each turned, slanted, scaled, moved, thickened at random.
    Returns uint8 images (N, 28, 28), white on black, and labels (N,), places in `characters`."""
    rows, columns, random = len(FACES), len(characters), torch.Generator().manual_seed(seed)
    sheet = FigureCanvasAgg(Figure((columns, rows), dpi=64))  # 64x64 pixels a character
    for i, (face, character) in enumerate((f, c) for f in FACES for c in characters):
        x, y = (i % columns + 0.5) / columns, 1 - (i // columns + 0.5) / rows
        sheet.figure.text(x, y, character, font=face, size=60, ha="center", va="center")
    sheet.draw()
    ink = 1 - torch.tensor(np.asarray(sheet.buffer_rgba())[..., 0]) / 255  # (64 rows, 64 columns)
    ink = F.avg_pool2d(ink.view(rows, 64, columns, 64).transpose(1, 2), 5, 1, 2)  # (.., 64, 64)
    face, label = (torch.randint(n, (count,), generator=random) for n in (rows, columns))
    angle, slant, size, right, down, edge = torch.tensor([.5, .6, .3, .2, .2, .2])[:, None] * (
        torch.rand(6, count, generator=random) - 0.5)
    cos, sin = (1 + size) * angle.cos(), (1 + size) * angle.sin()
    affine = torch.stack([cos, slant * cos - sin, right, sin, slant * sin + cos, down], 1)
    images = []
    for i in torch.arange(count).split(1000):
        grid = F.affine_grid(affine[i].view(-1, 2, 3), (len(i), 1, 28, 28), align_corners=False)
        soft = F.grid_sample(ink[face[i], label[i]][:, None], grid, align_corners=False)[:, 0]
        images.append(((soft - 0.2 - edge[i, None, None]) * 4).clamp(0, 1).mul(255).byte())
    return torch.cat(images), label

def unit(images):
    """Images in the range of PIXELS -> clamped, in [0, 1], on the CPU."""
    return ((images.cpu() - PIXELS[0]) / (PIXELS[1] - PIXELS[0])).clamp(0, 1)

class Run:
    """One run: device, seed, data, progress, Ctrl-C, and the files it leaves in out/<script>."""

    def __init__(self, config):
        self.config, self.settings, self.script = config, asdict(config), Path(__file__).stem
        self.out, self.began, self.history = Path(config.out or "out", self.script), time.time(), []
        self.step, self.steps, self.rate, self.stopped = 0, 0, 0.0, False
        self.dataset = "data of your own"  # until data() says which
        has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        name = next(k for k in has if has[k]) if config.device == "auto" else config.device
        if not has[name]:
            print(f"{self.script}.py: --device {name} is not to be had here, auto takes what is",
                  file=sys.stderr)
            raise SystemExit(2)
        self.device = torch.device(name)
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLORS)
        self.out.mkdir(parents=True, exist_ok=True)
        if not os.access(self.out, os.W_OK):  # fails now, not after the training
            raise PermissionError(13, "cannot be written", str(self.out))

    def data(self):
        """`load_mnist` on the device, cut to `train_size`; drawn digits where it cannot be had."""
        size, beside = self.config.train_size or 60000, Path(__file__).parent / "data" / "mnist"
        folder = Path(self.config.data or os.environ.get("MNIST_DIR") or beside)
        arrays, self.dataset = [], "drawn digits"
        try:
            if self.config.data != "drawn":
                arrays, self.dataset = load_mnist(folder), folder.resolve().name
        except ConnectionError as fault:
            print(f"{fault}, and {folder} does not have it.\n"
                  "Going on with digits drawn from fonts; --data FOLDER names another place.")
        tests = min(max(size, 100), 10000)
        arrays = arrays or [*draw_characters(size, 0), *draw_characters(tests, 1)]
        return [a.to(self.device) for a in (*(a[:size] for a in arrays[:2]), *arrays[2:])]

    def batches(self, count, report=dict, per_epoch=1):
        """Index batches (B,) of `epochs` shuffled passes over `count` images, until Ctrl-C; what
        fills no batch is not used. `per_epoch` times an epoch the means of what was logged and the
        numbers of `report()` go to the history. Raises SystemExit if one of them is not finite."""
        def interrupt(*_):
            self.stopped = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nCtrl-C: training ends, evaluating and saving (again: stops at once)\n")
        before = signal.signal(signal.SIGINT, interrupt)
        past = self.history[-1]["epoch"] if self.history else 0
        size, tty = min(self.config.batch_size, count), sys.stdout.isatty()
        steps, clock, shown = count // size, time.time(), 0
        self.steps, self.sums, self.logged = steps * self.config.epochs, {}, 0
        while self.step < self.steps and not self.stopped:
            start = self.step % steps * size
            order = order if start else torch.randperm(count).to(self.device)
            yield order[start:start + size]
            self.step, epoch = self.step + 1, past + (self.step + 1) / steps
            due = self.step * per_epoch % steps < per_epoch or self.stopped
            if due or tty and time.time() - shown > 0.5:
                row, shown = {k: float(v) / self.logged for k, v in self.sums.items()}, time.time()
                row.update(report() if due else {})
                if not all(map(math.isfinite, row.values())):
                    raise SystemExit(f"The loss is not finite after {self.step} steps; try a lower "
                                     f"--lr than {self.config.lr:g}. Nothing was overwritten.")
                self.rate = self.step * size / (shown - clock)
                if due:
                    self.history.append(dict(epoch=epoch, **row))
                    self.sums, self.logged, clock = {}, 0, clock + time.time() - shown
                left = round((self.steps - self.step) * size / self.rate)
                text = f"epoch {epoch:.2f}  {left // 60}:{left % 60:02} left  "
                text += f"{self.rate:.0f} images/s" + "".join(
                    f"  {k} {v:.4g}" for k, v in row.items())
                width = shutil.get_terminal_size().columns - 1
                text = f"\r{text if due else text[:width]:{width}}" if tty else text
                try:
                    print(text, end="\n" * due, flush=True)
                except OSError:  # nobody reads on, or the disk is full: ends as after Ctrl-C
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    self.stopped = True
        signal.signal(signal.SIGINT, before)

    def log(self, **terms):
        """Adds one step's loss terms (tensors without axes) to the means of this epoch."""
        self.sums = {k: self.sums.get(k, 0) + v.detach() for k, v in terms.items()}
        self.logged += 1

    def figure(self, name, title, figure):
        """Saves `name`.png under a title that says what is to be seen."""
        figure.suptitle(title + " (drawn digits)" * (self.dataset == "drawn digits"))
        whole(self.out / f"{name}.png", lambda file: figure.savefig(file, format="png", dpi=100))

    def grid(self, name, title, images, across, size, xlabel="", ylabel="", xticks=(), yticks=()):
        """Saves images (N, C, H, W) in the range of PIXELS as one picture, `across` in a row."""
        axes = (figure := Figure(size, layout="constrained")).subplots()
        tiles = F.pad(unit(images), (1, 1, 1, 1), value=0.5)  # a gray rim
        N, C, H, W = tiles.shape
        tiles = tiles.view(N // across, across, C, H, W).permute(0, 3, 1, 4, 2)
        tiles = tiles.reshape(-1, across * W, C).squeeze(2).numpy()
        axes.imshow(tiles, cmap="gray", vmin=0, vmax=1)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xticks([W * i + W // 2 for i in range(len(xticks))], xticks)
        axes.set_yticks([H * i + H // 2 for i in range(len(yticks))], yticks)
        self.figure(name, title, figure)

    def samples(self, images, **labels):
        """samples.npz: images (N, 1, 28, 28) in the range of PIXELS, as uint8, and any labels."""
        images = (unit(images)[:, 0] * 255).round().byte()
        arrays = {k: v.cpu().numpy() for k, v in dict(images=images, **labels).items()}
        whole(self.out / "samples.npz", lambda file: np.savez_compressed(file, **arrays))

    def save(self, model):
        """model.pt: settings, history, weights. A run that trained nothing leaves it as it is."""
        kept = dict(script=self.script, settings=self.settings, history=self.history,
                    state_dict={k: v.detach().cpu() for k, v in model.state_dict().items()})
        if self.step:
            whole(self.out / "model.pt", lambda file: torch.save(kept, file))

    def load(self, model):
        """Takes weights and history from --load. Raises SystemExit that says what does not fit."""
        if not self.config.load:
            return
        here = dict(script=self.script, **{k: self.settings[k] for k in SHAPES})
        try:
            if zipfile.ZipFile(self.config.load).testzip():  # torch does not look at its checksums
                raise ValueError
            kept = torch.load(self.config.load, map_location="cpu", weights_only=True)
            there = dict(kept["settings"], script=kept["script"])
            odd = [f"its {k} is {there.get(k)}, not {v}" for k, v in here.items()
                   if there.get(k) != v]
            odd or model.load_state_dict(kept["state_dict"])
            self.history = kept["history"]
        except Exception as fault:  # torch, pickle and zip each raise their own
            missing = getattr(fault, "filename", None)
            odd = [fault.strerror if missing else "it is no whole checkpoint"]
        if odd:
            raise SystemExit(f"--load {self.config.load} cannot be used: {', '.join(odd)} "
                             "(it wants the flags that it was trained with)")

    def finish(self, **results):
        """metrics.json and a last line. Returns the exit code: 130 after Ctrl-C, else 0."""
        kept = dict(script=self.script, data=self.dataset, device=str(self.device), results=results,
                    torch=torch.__version__, seconds=time.time() - self.began, history=self.history,
                    images_per_second=self.rate, interrupted=self.stopped, settings=self.settings)
        text = json.dumps(kept, indent=1).encode()
        whole(self.out / "metrics.json", lambda file: file.write(text))
        print(f"{kept['seconds'] / 60:.1f} minutes; pictures and files are in {self.out}"
              + " (--quick: too little training for the numbers to mean much)" * self.config.quick)
        return 130 if self.stopped else 0

def launch(main):
    """Runs main; a foreseeable fault becomes a sentence and an exit code, never a traceback."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a path that the terminal cannot spell
    try:
        sys.exit(main())
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        code, what = 1, end.code
    except KeyboardInterrupt:
        code, what = 130, "stopped; every file is whole, some may be those of an earlier run"
    except OSError as fault:
        code, what = 1, f"{fault.filename or 'output'}: {fault.strerror or fault}"
    except (MemoryError, RuntimeError) as fault:
        if "memory" not in repr(fault).lower():
            raise
        code, what = 1, "out of memory; try a smaller --batch-size"
    print(f"{Path(__file__).name}: {what}", file=sys.stderr)
    sys.exit(code)

# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    run = Run(c := parse(argv))
    images, _, test_images, test_labels = run.data()
    shape, x = (c.latent_dim, c.hidden_dim, c.layers, getattr(nn, c.activation)), flat(test_images)
    models = nn.ModuleDict(dict(text=TwoLevelVAE(*shape, printed=True)))
    if not c.as_printed:
        models = nn.ModuleDict(dict(
            fixed=TwoLevelVAE(*shape), one=TwoLevelVAE(*shape, levels=1), **models))
    run.load(models.to(run.device))
    train(run, models, images, x)
    run.save(models)
    results = evaluate(models, x)
    with torch.no_grad():
        J1, level1, level2 = (v.mean().item() for v in models["text"].elbo(x, exact=False))
        results["text_loss"] = -2 * (J1 - level1 - level2) - x.shape[1] * math.log(2 * math.pi)
        print("test ELBO and levels, nats an image, and the text's loss as printed (App. C.4)")
        for name, value in results.items():
            print(f"{name:20}", np.round(value, 4))
        draw_training(run, models)
        draw_reconstructions(run, models, x)
        draw_prior(run, models, x, test_labels)
        draw_samples(run, models)
    return run.finish(**results)

if __name__ == "__main__":
    launch(main)
