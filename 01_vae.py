"""The variational autoencoder (VAE): a latent-variable model of images, trained by a bound.

    p(z) = N(0, I)                                        prior
    p(x | z) = N(x̂(z), σ² I)                              decoder, σ learned (the text sets σ = 1)
    q(z | x) = N(μ(x), diag σ²(x))                        encoder
    log p(x) ≥ E_q[log p(x | z)] - KL(q(z | x) ‖ p(z))    ELBO = reconstruction - KL

Sources  VAE: Auto-Encoding Variational Bayes, Kingma, Welling, arXiv:1312.6114
         IWAE: Importance Weighted Autoencoders, Burda, Grosse, Salakhutdinov, arXiv:1509.00519
         text: 拡散モデルの理論, section 8.1.1 and appendix C
Run      python 01_vae.py    (--quick for a smoke test, --help for the settings)
Expect   57 seconds on two CPU cores (AMD EPYC, real MNIST, seed 0, 2026-11-26); two pictures.
         Test images; ELBO and KL in nats (the mean image alone, with the best σ: an ELBO of -56):
         this file   ELBO +811   KL 68.0   20 of 20 latents in use   squared error 4.86 ≈ 784 σ²
         --sigma 1   ELBO -739   KL  6.8   10 of 20                  24.4
         --book      ELBO -740   KL  6.6   10 of 20                  25.2; its loss adds 2 KL: 38.3
         With σ = 1, a latent pays for its KL only if the variance that it explains, summed over
         pixels, exceeds σ² = 1. Half of the latents go unused, and the images are blurred.
Read     Start with `VAE.elbo` and `train`; the rest can wait.
Try      easy: --latent-dim 2: instead of samples, the decoder's images on a grid over the plane.
         medium: --sigma 1, 0.3 and 0.1: how many latents are in use, and how sharp are images?
         harder: a β-VAE: weight the KL by 4 in `train`. What happens to the samples, and why?
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
    add("--out", default="out", help="parent folder; results go to its subfolder 01_vae")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine")
    add("--epochs", type=int, default=12, help="passes over the training images")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--lr", type=float, default=4e-3, help="highest learning rate")
    add("--train-size", type=int, default=60000, help="number of training images")
    add("--load", help="a model.pt to start from; --epochs 0 only evaluates it")
    add("--quick", action="store_true", help="smoke test: a short run on 512 images")
    add("--book", action="store_true", help="the model and settings of the book behind the text")
    add("--latent-dim", type=int, default=20, help="number of latents, the size of z")
    add("--sigma", type=float, default=0, help="standard deviation σ of a pixel; 0: it is learned")
    args = parser.parse_args(argv)
    if args.book:  # flags given on the command line override these
        parser.set_defaults(epochs=30, batch_size=32, lr=3e-4, sigma=1.0)
    if args.quick:
        parser.set_defaults(epochs=2, train_size=512)
    args = parser.parse_args(argv)
    if args.epochs < 0 or min(args.batch_size, args.lr, args.train_size, args.latent_dim) <= 0:
        parser.error("--epochs must be >= 0; --batch-size, --lr, --train-size, --latent-dim > 0")
    args.out += "/01_vae"
    return args


# ---- The model and the ELBO ----------------------------------------------------------
def pixel_log_density(x, x_hat, logvar):
    """log p(x | z) = log N(x; x̂, σ²) of each pixel, in nats; change this for another density."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - x_hat).square() * (-logvar).exp())


def gaussian_kl(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, 1)) of each element, in nats (text C.3; VAE appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def reparameterize(mu, logvar):
    """Draws z = μ + σ ε from N(μ, σ²); gradients reach μ and log σ² (VAE section 2.4; text C.3)."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


class VAE(nn.Module):
    """p(z) p(x | z) and q(z | x) for x (B, 784) in [0, 1]; one σ for all pixels, learned if 0."""

    def __init__(self, latent_dim=20, sigma=0, book=False):
        super().__init__()
        h, activation = (200, nn.ReLU()) if book else (1000, nn.SiLU())  # h hidden units
        self.encoder = nn.Sequential(nn.Linear(784, h), activation, nn.Linear(h, 2 * latent_dim))
        self.decoder = nn.Sequential(  # z (B, latent_dim) -> x̂ (B, 784), the mean of p(x | z)
            nn.Linear(latent_dim, h), activation, nn.Linear(h, 784), nn.Sigmoid())
        logvar = torch.tensor(2 * math.log(sigma or 0.3))  # learned σ: start at 0.3
        self.logvar = nn.Parameter(logvar, requires_grad=sigma == 0)  # log σ²

    def encode(self, x):
        """x (B, 784) -> mean and log-variance of q(z | x), each (B, latent_dim)."""
        mu, logvar = self.encoder(x).chunk(2, -1)  # (B, 2 latent_dim) -> (B, latent_dim) each
        return mu, logvar.clamp(-20, 20)  # exp(logvar) neither underflows nor overflows

    def elbo(self, x):
        """The ELBO's terms in nats, each (B,): E_q[log p(x | z)] estimated at one z, and the KL."""
        mu, logvar = self.encode(x)
        x_hat = self.decoder(reparameterize(mu, logvar))
        reconstruction = pixel_log_density(x, x_hat, self.logvar).sum(1)
        return reconstruction, gaussian_kl(mu, logvar).sum(1)

    def importance_bound(self, x, K):
        """log(1/K Σ_k p(x, z_k) / q(z_k | x)) in nats (B,); its mean grows with K (IWAE eq. 8)."""
        x = x.repeat(K, 1)  # (B, 784) -> (K B, 784)
        mu, logvar = self.encode(x)
        eps = torch.randn_like(mu)
        z = mu + (0.5 * logvar).exp() * eps
        log_p_x = pixel_log_density(x, self.decoder(z), self.logvar).sum(1)  # log p(x | z): (K B,)
        log_ratio = 0.5 * (logvar + eps.square() - z.square()).sum(1)  # log p(z) - log q(z | x)
        return (log_p_x + log_ratio).view(K, -1).logsumexp(0) - math.log(K)


# ---- Training ------------------------------------------------------------------------
def scale(images):
    """uint8 (B, 28, 28) in 0..255 -> float (B, 784) in [0, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0..255, not {images.dtype}")
    return images.flatten(1).float() / 255


def train(args, model, images, history):
    """Minimizes -ELBO on uint8 images (N, 28, 28); appends the last batch's terms to `history`."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # lr falls to 0
    step = 0
    began = time.time()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images)).split(args.batch_size):
            reconstruction, kl = model.elbo(scale(images[batch]))
            loss = (kl - reconstruction).mean()  # -ELBO
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not args.book:
                schedule.step()
            step += 1
            if step % math.ceil(steps / 20) == 0 or step == steps:
                terms = {"reconstruction": reconstruction.mean().item(), "KL": kl.mean().item()}
                history.append({"step": step, **terms})
                progress(step, steps, began, terms)


def evaluate(model, x):
    """Means over test images x (N, 784); all but the squared error in nats."""
    reconstruction, kl = model.elbo(x)
    x_hat = model.decoder(reparameterize(*model.encode(x)))
    return {
        "ELBO": (reconstruction - kl).mean().item(),
        "importance-weighted bound, first 100": model.importance_bound(x[:100], 100).mean().item(),
        "KL": kl.mean().item(),
        "squared error": (x - x_hat).square().sum(1).mean().item(),
    }


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    began = time.time()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)
    images, _, test_images, _, source = load_data(args)
    model = VAE(args.latent_dim, args.sigma, args.book).to(device)
    if args.load:
        load_weights(args, model)
    history = []
    try:
        train(args, model, images.to(device), history)
    except KeyboardInterrupt:
        print("Training stopped early; saving and evaluating the current model.")
    save_model(args, model)
    x = scale(test_images).to(device)
    with torch.no_grad():
        results = evaluate(model, x)
        plot_training(args, model, x, history)
        plot_images(args, model, x)
    print(json.dumps(results, indent=1))
    save_metrics(args, results, history, source, began)


def plot_training(args, model, x, history):
    """Draws the two terms of the ELBO during training, and the KL of each latent at the end."""
    _, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, name in zip(axes, ["reconstruction", "KL"]):
        axis.plot([row["step"] for row in history], [row[name] for row in history])
        axis.set(xlabel="step", title=f"{name} in nats per image")
    latent_kl = gaussian_kl(*model.encode(x)).mean(0).cpu()
    axes[2].bar(range(args.latent_dim), latent_kl)
    axes[2].set(title=f"KL of each latent in nats ({(latent_kl > 0.01).sum()} in use, above 0.01)")
    plt.savefig(f"{args.out}/training.png")


def plot_images(args, model, x):
    """Draws reconstructions, interpolations, and samples (or the plane of two latents)."""
    mu, _ = model.encode(x[:9])
    paths = torch.lerp(mu[:7, None], mu[1:8, None], torch.linspace(0, 1, 9).to(x)[:, None])
    z = torch.randn(81, args.latent_dim)
    if args.latent_dim == 2:
        ticks = torch.special.ndtri(torch.linspace(0.05, 0.95, 9))  # quantiles of N(0, 1)
        z = torch.cartesian_prod(-ticks, ticks).flip(1)  # z_1 grows to the right, z_2 upward
    left = torch.cat([x[:9], model.decoder(mu), model.decoder(paths.flatten(0, 1))])
    _, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    show_grid(axes[0], left.view(-1, 1, 28, 28), 9, "x; x̂; straight lines in z between images")
    show_grid(axes[1], model.decoder(z.to(x)).view(-1, 1, 28, 28), 9,
              "x̂(z): z from the prior (if z has two dimensions: on a grid)")
    plt.savefig(f"{args.out}/images.png")


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
