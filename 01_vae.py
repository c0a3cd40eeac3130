"""The variational autoencoder (VAE, arXiv:1312.6114): a density of images with hidden causes.

A decoder turns a simple z into an image x; an encoder guesses which z an image came from.

    p(z) = N(z; 0, I)                                                 the prior, text §8.1.1
    p(x | z) = N(x; x̂(z), σ² I)                                       the decoder (text: σ = 1)
    q(z | x) = N(z; μ(x), diag σ²(x))                                 the encoder
    log p(x) ≥ E_q[log p(x | z)] - KL(q(z | x) ‖ p(z)) = ELBO(x)      Jensen; equal if q = p(z | x)
    KL(q(z | x) ‖ p(z)) = ½ Σ_h (μ_h² + σ_h² - 1 - log σ_h²)          in closed form
    z = μ(x) + σ(x) ε,  ε ~ N(0, I)                                   gradients pass the draw

The ELBO is in nats with all constants: log p(x | z) keeps its -D/2 log 2πσ². Pixels are in [0, 1]
and x is flat, (N, D) with D = 784; a density above 1 has a positive logarithm.
Sections (§) and App. C are those of the text on diffusion theory, which sums up a book.

What σ = 1 costs. It says that pixels, which lie in [0, 1], are right to ±1. Roughly, a latent pays
for its KL only if it explains more variance than σ² (exactly so for linear networks), and only 12
directions of MNIST have more than 1: half of the book's latents stay unused, images are blurred.
Learning σ asks the data; in the book's units, ‖x - x̂‖² + 2 KL, it multiplies the KL by σ² = 0.006.

Run     python 01_vae.py    (--book: the book's model and training; --quick; --help)
Expect  on two CPU cores 25 to 50 seconds; five pictures, samples and weights in out/01_vae. Test
        images, nats an image:
                                       ELBO    KL    σ       latents in use   minutes
        this file                      +810    64   0.078       20 of 20        0.7
        --book                         -740     7   1           10 of 20        2.0
        best constant x̂, no z           -56     0   0.26           -
        In the book's units --book reaches 38.40 (the book's own code: 38.45). Real MNIST, seed 0,
        two cores of an AMD EPYC, 2026-11-22. Reconstructions are sharp, samples are not: z from
        N(0, I) mostly falls between the places where images are encoded; 02_hvae.py mends that.
Try     easy: --latent-dim 2 (two more pictures: the latent plane).
        medium: --sigma 1, 0.3 and 0.1. How many latents are in use, and how sharp are the images?
        harder: a β-VAE (β = 4) in `train`, `(3 * kl - elbo).mean().backward()`: what happens to
        reconstructions, samples and latents in use, what to the ELBO, and why?
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
    book: bool = False  # the book's network, σ and training instead of this file's
    schedule: str = "cosine"  # lr: warm-up and down to 0, or as it is [cosine|constant]
    latent_dim: int = 20  # numbers in z [1..1000]
    hidden_dim: int = 256  # width of the hidden layers [1..10000]
    layers: int = 2  # hidden layers; from the second on they add to their input [1..20]
    activation: str = "SiLU"  # between the layers [SiLU|ReLU]
    sigma: float = 0.0  # standard deviation of a pixel given z; 0: learned, 1: the text's [0..100]
    samples: int = 100  # images for samples.npz [0..100000]

PRESETS = dict(
    book=dict(epochs=30, batch_size=32, lr=3e-4, schedule="constant", hidden_dim=200, layers=1,
              activation="ReLU", sigma=1.0),
    quick=dict(train_size=512, epochs=2, batch_size=32))
SHAPES = ("latent_dim", "hidden_dim", "layers", "activation", "sigma")  # a checkpoint shares them
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
    """(N, input_dim) -> (N, output_dim) over hidden layers; with one, the book's network."""
    return nn.Sequential(nn.Linear(input_dim, hidden_dim),
                         *[Residual(hidden_dim, activation) for _ in range(layers - 1)],
                         activation(), nn.Linear(hidden_dim, output_dim))

class Encoder(nn.Module):
    """x (N, D) -> mu, logvar of q(z | x), each (N, latent_dim). The net gives log σ² itself: the
    logarithm of a σ² that underflowed would be -inf (§8.1.1)."""

    def __init__(self, input_dim, hidden_dim, latent_dim, layers, activation):
        super().__init__()
        self.net = mlp(input_dim, hidden_dim, 2 * latent_dim, layers, activation)

    def forward(self, x):
        mu, logvar = self.net(x).chunk(2, 1)  # (N, 2 latent_dim) -> 2 x (N, latent_dim)
        return mu, logvar.clamp(-20, 20)  # σ from e^-10 to e^10: whatever the net says, finite

def reparameterize(mu, logvar):
    """A draw z = μ + σ ε from N(μ, σ²) through which gradients reach μ and log σ² (App. C.3)."""
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)

# ---- Objective -----------------------------------------------------------------------------------

def gaussian_log_density(x, mu, logvar):
    """log N(x; μ, σ²) per element, in nats, constants included."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu).square() * torch.exp(-logvar))

def gaussian_kl(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, 1)) per element, in nats (App. C.3, item 2)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)

class VAE(nn.Module):
    """p(z) p(x | z) and q(z | x), with one σ for all pixels: learned, or fixed where sigma > 0.
    x is (N, D), pixels in [0, 1]; every density is in nats, one number an image."""

    def __init__(self, latent_dim=20, hidden_dim=256, layers=2, activation=nn.SiLU, sigma=0.0,
                 input_dim=784):
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = Encoder(input_dim, hidden_dim, latent_dim, layers, activation)
        self.decoder = nn.Sequential(  # z (N, latent_dim) -> x̂ (N, D), the mean of p(x | z)
            mlp(latent_dim, hidden_dim, input_dim, layers, activation), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(2 * math.log(sigma or 0.1)))  # log σ², from 0.1
        self.x_logvar.requires_grad_(sigma == 0)

    def elbo(self, x):
        """Reconstruction E_q[log p(x | z)] at one drawn z, KL(q ‖ p), and ELBO, each (N,)."""
        mu, logvar = self.encoder(x)
        x_hat = self.decoder(reparameterize(mu, logvar))
        reconstruction = gaussian_log_density(x, x_hat, self.x_logvar).sum(1)
        kl = gaussian_kl(mu, logvar).sum(1)
        return reconstruction, kl, reconstruction - kl

    @torch.no_grad()
    def log_likelihood(self, x, samples):
        """log 1/K Σ_k p(x, z_k) / q(z_k | x) for K = samples draws (N,): a bound on log p(x) that
        rises with K, from the ELBO towards log p(x) (arXiv:1509.00519 eq. 8 and theorem 1)."""
        mu, logvar = self.encoder(x)
        weights = []
        for _ in range(samples):
            z = reparameterize(mu, logvar)
            weights.append(gaussian_log_density(x, self.decoder(z), self.x_logvar).sum(1)
                           + gaussian_log_density(z, 0 * z, 0 * z).sum(1)
                           - gaussian_log_density(z, mu, logvar).sum(1))
        return torch.logsumexp(torch.stack(weights), 0) - math.log(samples)

    @torch.no_grad()
    def sample(self, n):
        """n images (n, D): z from the prior, then the mean x̂(z) without the noise σ."""
        return self.decoder(torch.randn(n, self.latent_dim).to(self.x_logvar))  # on its device

def flat(images):
    """uint8 (N, 28, 28) -> (N, 784) in [0, 1]."""
    return images.flatten(1).float() / 255

# ---- Training ------------------------------------------------------------------------------------

def train(run, model, images, test_images):
    """Maximizes the ELBO on uint8 images (N, 28, 28)."""
    c, test_x = run.config, flat(test_images)
    optimizer = torch.optim.Adam(model.parameters(), c.lr, fused=run.device.type != "mps")

    @torch.no_grad()
    def report():
        _, kl, elbo = model.elbo(test_x)
        return dict(test_kl=kl.mean().item(), test_elbo=elbo.mean().item())

    for index in run.batches(len(images), report):
        _, kl, elbo = model.elbo(flat(images[index]))
        run.log(kl=kl.mean(), elbo=elbo.mean())
        if c.schedule == "cosine":
            warm, done = min(1, (run.step + 1) / 100), run.step / run.steps
            optimizer.param_groups[0]["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        (-elbo.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1000.0)  # nats of 784 pixels: large
        optimizer.step()

@torch.no_grad()
def evaluate(run, model, images, x):
    """Results on the test images x (N, 784), in nats an image."""
    reconstruction, kl, elbo = (v.mean().item() for v in model.elbo(x))
    bounds = [model.log_likelihood(x[:1000], draws).mean().item() for draws in (1, 10, 100)]
    base = flat(images)
    logvar = (base - base.mean(0)).square().mean().clamp(min=1e-9).log()  # the best constant x̂
    chance = gaussian_log_density(x, base.mean(0), logvar).sum(1).mean().item()
    results = dict(test_elbo=elbo, test_elbo_chance=chance, test_reconstruction=reconstruction,
                   test_kl=kl, first_1000_bounds=bounds, sigma=model.x_logvar.exp().sqrt().item())
    if run.config.sigma == 1:  # then ‖x - x̂‖² + 2 KL differs from -2 ELBO by a constant
        results["book_loss"] = -2 * elbo - x.shape[1] * math.log(2 * math.pi)
    print("test images, nats an image; chance: without z; bounds: with 1, 10 and 100 draws of z")
    for name, value in results.items():
        print(f"{name:20}", np.round(value, 4))
    return results

# ---- Figures -------------------------------------------------------------------------------------

def draw_training(run):
    """The terms of the ELBO over training, on training and on test images."""
    axes = (figure := Figure((12, 3.5), layout="constrained")).subplots(1, 3)
    names = "epoch", "kl", "elbo", "test_kl", "test_elbo"
    epochs, kl, elbo, test_kl, test_elbo = np.array([[row[k] for k in names]
                                                     for row in run.history]).T
    for ax, name, values, test in zip(axes, ("reconstruction", "KL", "ELBO"), (elbo + kl, kl, elbo),
                                      (test_elbo + test_kl, test_kl, test_elbo)):
        ax.plot(epochs, values, label="training")  # its first mean is far below, out of sight
        ax.plot(epochs, test, "--", label="test")
        ax.set_ylim(bottom=test.min() - 0.2 * np.ptp(test) - 1)
        ax.set(xlabel="epoch", ylabel=f"{name} (nats an image)")
        ax.legend()
    run.figure("training", "ELBO = reconstruction - KL", figure)

def draw_latents(run, model, x, labels):
    """KL of each latent (which are in use); for two latents the map of their plane."""
    mu, logvar = model.encoder(x)
    kl = gaussian_kl(mu, logvar).mean(0).sort(descending=True).values.tolist()
    used = sum(nats > 0.01 for nats in kl)
    axes = (figure := Figure((8, 3.5), layout="constrained")).subplots()
    axes.bar(range(1, len(kl) + 1), kl)
    axes.set(xlabel="latent, by its KL", ylabel="KL (nats an image)")
    axes.locator_params(axis="x", integer=True)
    run.figure("kl", f"{used} of {len(kl)} latents are in use (more than 0.01 nats)", figure)
    if len(kl) == 2:
        axes = (figure := Figure((7, 7), layout="constrained")).subplots()
        axes.scatter(*mu.T.cpu().numpy(), c=labels.cpu().numpy(), cmap="tab10", s=2)
        for digit in labels.unique().tolist():
            axes.text(*mu[labels == digit].median(0).values.tolist(), digit, size=14,
                      bbox=dict(facecolor="white", alpha=0.8, boxstyle="circle"))
        axes.set(xlabel="z_1", ylabel="z_2", aspect="equal")
        run.figure("plane", "Where the encoder puts the test digits, which it was not told", figure)
        ticks = torch.special.ndtri(torch.linspace(0.02, 0.98, 20))  # equally likely cells
        z = torch.cartesian_prod(ticks.flip(0), ticks).flip(1).to(x)  # rows from top: z_2 falls
        shown = [f"{tick:.1f}" for tick in ticks]
        run.grid("map", "What the decoder makes of the plane",
                 model.decoder(z).view(-1, 1, 28, 28), 20, (9, 9), "z_1", "z_2", shown, shown[::-1])
    return used

def draw_images(run, model, x):
    """Reconstructions, interpolations and samples."""
    x_hat = model.decoder(model.encoder(x[:10])[0])  # at the mean of q(z | x)
    pairs = torch.cat([x[:10], x_hat]).view(-1, 1, 28, 28)
    run.grid("reconstructions", f"Test images, and what {model.latent_dim} numbers keep of them",
             pairs, 10, (8, 2.2), yticks=["x", "x̂"])
    start, end = model.encoder(x[:12])[0].view(2, 6, 1, -1)  # means: two ends of six paths
    z = torch.lerp(start, end, torch.linspace(0, 1, 11).to(x).view(-1, 1))  # (6, 11, latent_dim)
    run.grid("interpolation", "Straight lines in z between the test images of the outer columns",
             model.decoder(z).view(-1, 1, 28, 28), 11, (8, 4.8))
    images = model.sample(max(100, run.config.samples)).view(-1, 1, 28, 28)
    run.grid("samples", "Samples: z from the prior, then x̂(z)", images[:100], 10, (6, 6.3))
    run.samples(images[:run.config.samples])

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
    activation, x = getattr(nn, c.activation), flat(test_images)
    model = VAE(c.latent_dim, c.hidden_dim, c.layers, activation, c.sigma).to(run.device)
    run.load(model)
    train(run, model, images, test_images)
    run.save(model)
    results = evaluate(run, model, images, x)
    draw_training(run)
    with torch.no_grad():
        used = draw_latents(run, model, x, test_labels)
        draw_images(run, model, x)
    return run.finish(**results, latents_in_use=used)

if __name__ == "__main__":
    launch(main)
