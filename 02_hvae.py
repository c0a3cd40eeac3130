"""The two-level VAE: z2 explains z1, and z1 explains the image x. Why does it fail as printed?

    p(z2) = N(0, I), p(z1 | z2), p(x | z1) = N(x̂(z1), σ² I)      and encoders q(z1 | x), q(z2 | z1)
    log p(x) ≥ ELBO = J1 + J2 + J3,  J1 = E_q[log p(x | z1)]     reconstruction
    J2 = -E_q[KL(q(z2 | z1) ‖ p(z2))]                            minus the cost of level 2
    J3 = E_q[log p(z1 | z2) - log q(z1 | x)]                     minus the cost of level 1

Faults   of the text's code: 1. Imports and classes are commented out: a NameError (mended here).
         2. -J3 is computed as KL(q(z1 | x) ‖ p(z1 | z2)), as if z1 were drawn anew; but z2 is drawn
         from this z1. The error, if p(z1 | z2) = N(b z2, 1), E[z2 | z1] = a z1, Var[z1 | x] = σ1²:
         a·b·σ1² nats too much per dimension; if a·b > 0, a penalty on what z2 knows of z1.
         3. σ = 1, also in p(z1 | z2): z1 carries few nats. Only 2 and 3 together switch z2 off.
Sources  text: 拡散モデルの理論, appendix C
Run      python 02_hvae.py    (--quick for a smoke test, --help for the settings)
Expect   3 minutes for five models on two CPU cores (AMD EPYC, real MNIST, 2026-11-26).
         Mean (3 seeds) ± largest deviation ELBO, nats    level 1     level 2     Fréchet, 04_vit.py
         repaired: σ learned, sampled -J3   +801.7 ± 1.3  47.7 ± 0.7  9.0 ± 0.6       4.9 ± 0.4
         closed form (fault 2)              +799.2 ± 2.8  48.6 ± 0.4  8.3 ± 0.3       5.0 ± 0.6
         sigma 1 (fault 3)                  -739.1 ± 0.1   3.3 ± 0.3  3.3 ± 0.2       7.8 ± 0.6
         sigma 1, closed form (2 and 3)     -739.4 ± 0.1   6.7 ± 0.1  0.000 ± 0.001  11.7 ± 1.8
         one level (smaller than 01_vae.py) +779.5 ± 0.8  64.5 ± 0.1  -              27.8 ± 1.2
Read     Start with `TwoLevelVAE.elbo` and `train`; the rest can wait.
Try      easy: --as-printed: level 2 costs nothing. What do draws from p(z1 | z2) look like then?
         medium: --latent-dim 5: what does each level cost then, and what do the samples lose?
         harder: a third level like `encoder2` and `decoder2`; change `elbo` and `sample` as well.
"""

import argparse
import gzip
import hashlib
import json
import math
import os
import sys
import time
import urllib.request
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads release their cores sooner
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.textpath import TextPath
from torch import nn


def get_args(argv=None):
    """Reads the settings from the command line; get_args([]) returns the defaults."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--data", default="", help='folder of the four MNIST files, or "drawn" for drawn digits')
    add("--out", default="out", help="parent folder; results go to its subfolder 02_hvae")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine")
    add("--epochs", type=int, default=10, help="passes over the training images, for each model")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=4e-3, help="highest learning rate")
    add("--train-size", type=int, default=60000, help="number of training images")
    add("--load", help="a model.pt to start from; --epochs 0 only evaluates it")
    add("--quick", action="store_true", help="smoke test: a short run on 512 images")
    add("--as-printed", action="store_true", help="only the text's model, with its settings")
    add("--latent-dim", type=int, default=20, help="number of latents, the size of z1 and of z2")
    args = parser.parse_args(argv)
    if args.as_printed:  # flags given on the command line override these
        parser.set_defaults(epochs=30, batch_size=32, lr=1e-3)
    if args.quick:
        parser.set_defaults(epochs=2, train_size=512)
    args = parser.parse_args(argv)
    if args.epochs < 0 or min(args.batch_size, args.lr, args.train_size, args.latent_dim) <= 0:
        parser.error("--epochs must be >= 0; --batch-size, --lr, --train-size, --latent-dim > 0")
    args.out += "/02_hvae"
    return args


# ---- The model and the ELBO ----------------------------------------------------------
def gaussian_log_density(x, mu, logvar):
    """log N(x; μ, σ²) of each element, in nats, with all constants."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu).square() * (-logvar).exp())


def gaussian_kl(mu, logvar, prior_mu, prior_logvar):
    """KL(N(μ, σ²) ‖ N(prior μ, prior σ²)) of each element, in nats (text C.3: prior σ² = 1)."""
    log_ratio = logvar - prior_logvar
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mu - prior_mu).square() / prior_logvar.exp())


def reparameterize(mu, logvar):
    """Draws z = μ + σ ε from N(μ, σ²); gradients reach μ and log σ² (text C.3)."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def mlp(sizes, activation):
    """A network of linear layers, (B, sizes[0]) -> (B, sizes[-1]), with activations in between."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(d_in, d_out), activation]
    return nn.Sequential(*layers[:-1])


def gaussian(parameters):
    """Splits a network's output (B, 2 d) into a Gaussian's mean and log-variance, each (B, d)."""
    mu, logvar = parameters.chunk(2, 1)
    return mu, logvar.clamp(-20, 20)  # exp(logvar) neither underflows nor overflows


class TwoLevelVAE(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1), q(z1 | x) q(z2 | z1); x (B, 784) in [0, 1]. levels=1: no z2."""

    def __init__(self, latent_dim, learn_sigma=True, level1="sampled", levels=2, as_printed=False):
        super().__init__()
        self.learn_sigma = learn_sigma  # False: p(x | z1) and p(z1 | z2) have variance 1
        self.level1 = level1  # "sampled" or "closed_form"; train with elbo(x, model.level1)
        self.levels = levels
        activation = nn.ReLU() if as_printed else nn.SiLU()
        hidden1, hidden2 = ([100], [100]) if as_printed else ([512], [256, 256])
        d_prior = 2 * latent_dim if learn_sigma else latent_dim
        self.encoder1 = mlp([784, *hidden1, 2 * latent_dim], activation)  # q(z1 | x)
        self.encoder2 = mlp([latent_dim, *hidden2, 2 * latent_dim], activation)  # q(z2 | z1)
        self.decoder2 = mlp([latent_dim, *hidden2, d_prior], activation)  # p(z1 | z2)
        decoder1 = mlp([latent_dim, *hidden1, 784], activation)
        self.decoder1 = nn.Sequential(decoder1, nn.Sigmoid())  # x̂(z1), the mean of p(x | z1)
        logvar = torch.tensor(2 * math.log(0.3) if learn_sigma else 0.0)  # learned σ: start at 0.3
        self.logvar = nn.Parameter(logvar, requires_grad=learn_sigma)  # log σ² of p(x | z1)

    def prior(self, z2):
        """Mean and log-variance of p(z1 | z2), each (B, latent_dim)."""
        if self.learn_sigma:
            return gaussian(self.decoder2(z2))
        return self.decoder2(z2), torch.zeros_like(z2)

    def elbo(self, x, level1="sampled"):
        """J1 and the costs of the levels, [-J3, -J2], or [KL] if levels=1, each (B,), in nats."""
        mu1, logvar1 = gaussian(self.encoder1(x))
        z1 = reparameterize(mu1, logvar1)
        J1 = gaussian_log_density(x, self.decoder1(z1), self.logvar).sum(1)
        if self.levels == 1:
            return J1, [gaussian_kl(mu1, logvar1, 0 * z1, 0 * z1).sum(1)]
        mu2, logvar2 = gaussian(self.encoder2(z1))
        prior = self.prior(reparameterize(mu2, logvar2))
        if level1 == "sampled":  # -J3 at the drawn pair z1, z2
            cost1 = gaussian_log_density(z1, mu1, logvar1) - gaussian_log_density(z1, *prior)
        else:  # fault 2: KL(q(z1 | x) ‖ p(z1 | z2)), text C.3 item 3
            cost1 = gaussian_kl(mu1, logvar1, *prior)
        cost2 = gaussian_kl(mu2, logvar2, 0 * z1, 0 * z1)  # -J2: KL(q(z2 | z1) ‖ p(z2))
        return J1, [cost1.sum(1), cost2.sum(1)]

    def sample(self, z):
        """z (B, latent_dim) from N(0, I) at the top level -> images (B, 784), the means x̂(z1)."""
        if self.levels > 1:
            z = reparameterize(*self.prior(z))
        return self.decoder1(z)


# ---- Training ------------------------------------------------------------------------
def scale(images):
    """uint8 (B, 28, 28) in 0..255 -> float (B, 784) in [0, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0..255, not {images.dtype}")
    return images.flatten(1).float() / 255


def train(args, model, images, test_x, history):
    """Minimizes -ELBO on uint8 images (N, 28, 28); appends results on test_x to `history`."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # lr falls to 0
    step = 0
    began = time.time()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images)).split(args.batch_size):
            J1, costs = model.elbo(scale(images[batch]), model.level1)
            loss = (sum(costs) - J1).mean()  # -ELBO (but for fault 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not args.as_printed:
                schedule.step()
            step += 1
            if step % math.ceil(steps / 20) == 0 or step == steps:
                results = evaluate(model, test_x)
                history.append({"step": step, **results})
                progress(step, steps, began, results)


@torch.no_grad()
def evaluate(model, x):
    """The ELBO and the cost of each level, means over images x (N, 784), in nats."""
    J1, costs = model.elbo(x)  # always with the sampled -J3: the true ELBO
    levels = {f"level {i}": cost.mean().item() for i, cost in enumerate(costs, 1)}
    return {"ELBO": (J1 - sum(costs)).mean().item(), **levels}


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    began = time.time()
    device = pick_device(args.device)
    os.makedirs(args.out, exist_ok=True)
    images, _, test_images, _, source = load_data(args)
    x = scale(test_images).to(device)
    settings = {"repaired": {}, "one level": {"levels": 1},
                "closed form": {"level1": "closed_form"}, "sigma 1": {"learn_sigma": False},
                "sigma 1, closed form": {"learn_sigma": False, "level1": "closed_form"}}
    if args.as_printed:
        settings = {"as printed": {**settings["sigma 1, closed form"], "as_printed": True}}
    models = nn.ModuleDict()
    for name in settings:
        torch.manual_seed(args.seed)  # so that no model depends on the ones before it
        models[name] = TwoLevelVAE(args.latent_dim, **settings[name]).to(device)
    if args.load:
        load_weights(args, models)
    history = {name: [] for name in models}
    try:
        for name, model in models.items():
            print(f"model: {name}")
            torch.manual_seed(args.seed)
            train(args, model, images.to(device), x[:1000], history[name])
    except KeyboardInterrupt:
        print("Training stopped early; saving and evaluating all models, trained or not.")
    save_model(args, models)
    results = {}
    for name, model in models.items():
        torch.manual_seed(args.seed)
        results[name] = evaluate(model, x)
    plot_images(args, models, x[:10])
    print(json.dumps(results, indent=1))
    save_metrics(args, results, history, source, began)


@torch.no_grad()
def plot_images(args, models, x):
    """Draws what each level of the first model keeps of images x, and samples (also as .npz)."""
    name, model = next(iter(models.items()))
    mu1, _ = gaussian(model.encoder1(x))
    prior = model.prior(gaussian(model.encoder2(mu1))[0])  # p(z1 | z2) at the mean of z2
    rows = [x, model.decoder1(mu1), model.decoder1(prior[0])]
    rows += [model.decoder1(reparameterize(*prior)) for _ in range(4)]
    _, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    title = f"{name}: x; from z1; from z2; four draws from p(z1 | z2)"
    show_grid(axes, torch.cat(rows).view(-1, 1, 28, 28), len(x), title)
    plt.savefig(f"{args.out}/levels.png")
    z = torch.randn(1000, args.latent_dim).to(x)
    size = (9, 1.2 * len(models))
    _, axes = plt.subplots(len(models), figsize=size, squeeze=False, layout="constrained")
    pixels = {}
    for axis, (name, model) in zip(axes[:, 0], models.items()):
        samples = model.sample(z).view(-1, 1, 28, 28)
        pixels[name] = (samples[:, 0] * 255).round().byte().cpu()
        show_grid(axis, samples[:40], 20, f"samples: {name}")
    np.savez_compressed(f"{args.out}/samples.npz", **pixels)
    plt.savefig(f"{args.out}/samples.png")


# ---- Plumbing: data and files, the same in every script ----------------------------
MIRRORS = ["https://ossci-datasets.s3.amazonaws.com/mnist/",
           "https://storage.googleapis.com/cvdf-datasets/mnist/"]
MNIST = {  # file name: SHA-256 of its unzipped content
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"}


def pick_device(name):
    """Returns the name of the device to compute on; "auto" picks the first that works."""
    for device in ["cuda", "mps", "cpu"] if name == "auto" else [name]:
        try:
            torch.zeros(1, device=device)
            return device
        except Exception:
            pass
    sys.exit(f"--device {name} is not available on this machine; use --device auto")


def download(path):
    """Downloads an MNIST file from the first mirror that delivers it."""
    for mirror in MIRRORS:
        print(f"downloading {mirror}{path.name}")
        try:
            content = urllib.request.urlopen(mirror + path.name, timeout=10).read()
            if hashlib.sha256(gzip.decompress(content)).hexdigest() == MNIST[path.stem]:
                os.makedirs(path.parent, exist_ok=True)
                Path(f"{path}.part").write_bytes(content)
                return Path(f"{path}.part").rename(path)  # so that no partial file has that name
        except Exception as error:
            print(error)


def read_idx(path, may_download):
    """Reads uint8 images (N, 28, 28) or labels (N,) from an IDX file, gzipped or not."""
    if not path.exists():
        path = Path(f"{path}.gz")
    if may_download and not path.exists():
        download(path)
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        shape = np.frombuffer(content, ">i4", content[3], 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return torch.tensor(array.reshape(shape))
    except Exception as error:
        sys.exit(f"cannot read {path}: {error}; delete or replace it")


def load_data(args):
    """Returns images uint8 (N, 28, 28) and labels (N,) to train and to test, and their source.

    Without --data it reads MNIST from $MNIST_DIR or data/mnist, or downloads it, or draws digits.
    """
    source = args.data or os.environ.get("MNIST_DIR") or "data/mnist"
    try:
        data = [read_idx(Path(f"{source}/{name}"), not args.data) for name in MNIST]
    except FileNotFoundError as error:
        if args.data and args.data != "drawn":
            sys.exit(f"--data needs the four MNIST files: {error}")
        source = "drawn digits (not MNIST)"
        data = [*draw_characters(args.train_size, 0), *draw_characters(2000, 1)]
    print(f"data: {source}")
    for images, labels in [data[:2], data[2:]]:
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            sys.exit(f"{source}: expected 28x28 images, each with a label from 0 to 9")
    images, labels, test_images, test_labels = data
    n = args.train_size
    return images[:n], labels[:n].long(), test_images, test_labels.long(), source


def draw_characters(count, seed, characters="0123456789"):
    """Draws distorted characters of a font: uint8 (N, 28, 28), and their labels (N,)."""
    points = np.mgrid[-6:22, 22:-6:-1].reshape(2, 784).T  # x and y of each pixel
    inside = [TextPath((0, 0), c, size=22).contains_points(points) for c in characters]
    glyphs = 255.0 * torch.tensor(np.stack(inside)).view(-1, 1, 28, 28).mT
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(characters), [count], generator=random)
    affine = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=random)
    grid = F.affine_grid(affine, (count, 1, 28, 28), align_corners=False)
    return F.grid_sample(glyphs[labels], grid, align_corners=False)[:, 0].byte(), labels


def progress(step, steps, began, losses):
    """Prints a progress line; stops the run if a loss is not finite."""
    remaining = (time.time() - began) * (steps / step - 1)
    values = [f"{name} {value:.4f}" for name, value in losses.items()]
    print(f"step {step}/{steps}  {remaining / 60:.1f} min left ", *values, flush=True)
    if not math.isfinite(sum(losses.values())):
        sys.exit("The loss is not finite; try a lower --lr. No results have been written.")


def show_grid(axes, images, columns, title):
    """Shows images (N, C, H, W) in [0, 1], C = 1 or 3, as tiles of H + 2 by W + 2 pixels."""
    images = F.pad(images.cpu().clamp(0, 1), [1] * 4, value=0.5)  # a gray frame
    picture = torch.cat([torch.cat([*row], 2) for row in images.split(columns)], 1)
    axes.imshow(picture.movedim(0, 2).expand(-1, -1, 3).numpy(), origin="upper")
    axes.set(title=title, xticks=[], yticks=[])


def load_weights(args, model):
    """Loads the weights from --load; exits with torch's message if they do not fit."""
    try:
        checkpoint = torch.load(args.load, map_location="cpu", weights_only=True)
        differ = sorted(checkpoint["settings"].items() - vars(args).items())
        print(f"--load {args.load}: its settings that differ from this run's: {differ}")
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:
        sys.exit(f"--load {args.load} cannot be used: {error}")


def save_model(args, model):
    """Writes model.pt and removes the results of an earlier run from the folder."""
    weights = model.state_dict()
    if not all(weight.isfinite().all() for weight in weights.values()):
        sys.exit("The weights are not finite. No file has been changed.")
    for old in Path(args.out).iterdir():
        if old.suffix in [".png", ".npz", ".json"]:
            old.unlink()
    torch.save({"settings": vars(args), "weights": weights}, f"{args.out}/model.pt")


def save_metrics(args, results, history, source, began):
    """Writes metrics.json and says where the results are."""
    seconds = time.time() - began
    metrics = {"results": results, "settings": vars(args), "data": source, "history": history,
               "seconds": seconds, "torch": torch.__version__}
    Path(f"{args.out}/metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False))
    print(f"{seconds / 60:.1f} minutes; data: {source}; results: {args.out}")


if __name__ == "__main__":
    main(None if "__file__" in globals() else [])  # in a notebook: the defaults
