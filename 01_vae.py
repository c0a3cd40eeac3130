"""The variational autoencoder (VAE): describe an image by a few numbers.

    z ~ N(0, I),  p(x | z) = N(x̂(z), σ² I)                  from z to image   decoder
    q(z | x) = N(μ(x), diag s²(x))                           from image to z   encode
    z = μ + s ε,  ε ~ N(0, I)                                a draw    reparameterize
    log p(x) >= E_q[log p(x | z)] - KL(q(z | x) ‖ N(0, I))   the ELBO          elbo

Twenty numbers z describe an image x; the encoder guesses them. The ELBO rewards getting
x back from z, and charges for each nat that z tells about x. It bounds the log of a
density of pixels in [0, 1], so it can be positive (bits/dim: -ELBO / (784 ln 2) +
log2 255). With σ = 1, as in the text, errors cost little, most of z is not worth its
nats, and images blur.

    python 01_vae.py            1-2 minutes on two CPU cores
    python 01_vae.py --quick    a smoke test

Expect  ELBO about 809 nats; images.png. Its samples are weak: see 02, 03.
Read    `VAE.elbo` and `train`; the rest can wait.
Try     easy: --latent-dim 2 --out out/try. What is lost first?
        medium: --sigma 1 --out out/try. How many latents are in use?
        harder: tell the decoder the digit (with --sigma 1, or z carries it anyway).
Paper   Kingma, Welling: Auto-Encoding Variational Bayes, arXiv:1312.6114
Text    拡散モデルの理論, section 8.1.1 and appendix C
"""

import argparse
import gzip
import json
import math
import os
import sys
import time
import urllib.request
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads yield their cores
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# name: (default, meaning, choices if any); 0 is refused, unless the meaning has "0:".
SETTINGS = {
    "epochs": (12, "passes over the training images; 0: none"),
    "batch_size": (128, "images per step"),
    "lr": (4e-3, "highest learning rate"),
    "latent_dim": (20, "number of latents, the size of z"),
    "sigma": (0.0, "standard deviation of a pixel; 0: it is learned"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/01_vae", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"train_size": 512}


# ---- Lesson one: the model and the ELBO ----------------------------------------------
def gaussian_log_density(x, mu, logvar):
    """Return log N(x; μ, σ²) of each element, in nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 / logvar.exp())


def gaussian_kl(mu, logvar):
    """Return KL(N(μ, s²) ‖ N(0, 1)) of each element, in nats (text C.3)."""
    return 0.5 * (logvar.exp() - 1 - logvar + mu**2)


def reparameterize(mu, logvar):
    """Draw z = μ + s ε, so that gradients reach μ and s (section 2.4; text C.3)."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


class VAE(nn.Module):
    """p(z) p(x | z) and q(z | x) for images x (B, 784) in [0, 1] (text 8.1.1).

    Networks of your own also get rows: start with nn.Unflatten, end with nn.Flatten.
    """

    def __init__(self, latent_dim=20):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(784, 1000),
            nn.SiLU(),
            nn.Linear(1000, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 1000),
            nn.SiLU(),
            nn.Linear(1000, 784),
            nn.Sigmoid(),
        )
        # Learned, σ² becomes the mean squared error of a pixel. With σ = 1, as in the
        # text, no error costs over half a nat, and a latent pays for itself only if the
        # variance that it explains, summed over pixels, is above 1.
        self.pixel_logvar = nn.Parameter(torch.tensor(-2.4))  # log σ²; at first σ = 0.3

    def encode(self, x):
        """Return μ and log s² of q(z | x), each (B, latent_dim)."""
        return self.encoder(x).chunk(2, 1)

    def log_likelihood(self, x, z):
        """Return log p(x | z) = log N(x; x̂(z), σ²) of each image, (B,), in nats."""
        x_hat = self.decoder(z)
        return gaussian_log_density(x, x_hat, self.pixel_logvar).sum(1)

    def elbo(self, x):
        """Return the two terms of ELBO = reconstruction - kl, each (B,), in nats."""
        mu, logvar = self.encode(x)                 # q(z | x)
        z = reparameterize(mu, logvar)              # one draw from it
        reconstruction = self.log_likelihood(x, z)  # log p(x | z)
        kl = gaussian_kl(mu, logvar).sum(1)         # KL(q(z | x) ‖ p(z))
        return reconstruction, kl


# ---- Training ------------------------------------------------------------------------
def to_float(images):
    """Turn uint8 images (B, 28, 28) into pixels in [0, 1], (B, 784)."""
    assert images.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    return images.flatten(1).float() / 255


def train(args, model, images, history):
    """Maximize the ELBO on uint8 images (N, 28, 28); fill `history` with -ELBO."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(args.batch_size):
            reconstruction, kl = model.elbo(to_float(images[batch]))
            loss = -(reconstruction - kl).mean()  # -ELBO
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            progress(history, losses, steps, began)


def progress(history, losses, steps, began):
    """About 20 times, print the mean of the latest losses and add it to `history`."""
    step, every = len(losses), math.ceil(steps / 20)
    if step % every == 0:
        loss = torch.stack(losses[-every:]).mean().item()
        seconds = time.time() - began
        print(f"step {step}/{steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
        if not math.isfinite(loss):
            raise SystemExit("The loss is not finite; try a lower --lr. Nothing saved.")
        history.append([step, loss, seconds])


# ---- Second lesson: a tighter bound (you can skip it) --------------------------------
# The ELBO is the mean of a log, E[log (p(x, z) / q(z | x))]. The log of the mean of K
# such ratios is larger on average, and on average still below log p(x) (Jensen; text
# 8.3.1). The gain is at most KL(q(z | x) ‖ p(z | x)), the encoder's own error.
def importance_bound(model, x, K):
    """Return log (1/K Σ_k p(x, z_k) / q(z_k | x)), (B,), in nats.

    Burda, Grosse, Salakhutdinov: Importance Weighted Autoencoders, arXiv:1509.00519,
    eq. 8.
    """
    x = x.repeat(K, 1)  # (K B, 784)
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar)
    log_p_x = model.log_likelihood(x, z)                                # log p(x | z)
    log_p_z = gaussian_log_density(z, 0.0, torch.zeros_like(z)).sum(1)  # log p(z)
    log_q_z = gaussian_log_density(z, mu, logvar).sum(1)                # log q(z | x)
    return (log_p_x + log_p_z - log_q_z).view(K, -1).logsumexp(0) - math.log(K)


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, _, test_images, _, source = load_data(args)
    model = VAE(args.latent_dim).to(args.device)
    load_weights(args, model)
    if args.sigma > 0:
        model.pixel_logvar.requires_grad_(False).fill_(2 * math.log(args.sigma))
    history = []
    try:
        train(args, model, images, history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    model.eval()
    x = to_float(test_images)
    save_metrics(args, results=evaluate(model, x), history=history, data=source)
    plot_images(args, model, x)


@torch.no_grad()
def evaluate(model, x):
    """Return means over images x (N, 784)."""
    reconstruction, kl = model.elbo(x)
    elbo = reconstruction - kl
    gain = importance_bound(model, x[:100], 100) - elbo[:100]
    in_use = gaussian_kl(*model.encode(x)).mean(0) > 0.01
    return {
        "ELBO in nats (the mean image of MNIST: -56)": elbo.mean().item(),
        "KL in nats": kl.mean().item(),
        "latents in use (KL above 0.01)": in_use.sum().item(),
        "gain of the bound with K = 100 (100 images)": gain.mean().item(),
        "sigma": model.pixel_logvar.exp().sqrt().item(),
    }


@torch.no_grad()
def plot_images(args, model, x):
    """Show images x, the way from each to the next in z, and samples x̂(z)."""
    mu, _ = model.encode(x[:10])
    w = torch.arange(8).to(x)[:, None] / 7
    lines = (1 - w) * mu[:-1, None] + w * mu[1:, None]  # (9, 8, latent_dim)
    z = torch.randn(9, 9, args.latent_dim).to(x)
    x_hat = model.decoder(torch.cat([lines, z], 1).flatten(0, 1))  # (153, 784)
    tiles = torch.cat([x[:9, None], x_hat.view(9, 17, 784)], 1)
    plt.figure(figsize=(12, 6.3), layout="constrained")
    show_grid(tiles.view(-1, 1, 28, 28), 18, "x; from x̂ to the x̂ below; samples")
    plt.savefig(f"{args.out}/images.png")


def show_grid(images, columns, title):
    """Draw images (N, C, H, W) in [0, 1], C = 1 or 3, into the current axes of plt."""
    padding = [1, 1, 1, 1, 0, 0, 0, -len(images) % columns]  # a frame, and full rows
    tiles = F.pad(images.detach().cpu(), padding, value=0.5).movedim(1, 3)
    rows = [np.hstack(row) for row in tiles.split(columns)]
    plt.imshow(np.vstack(rows), "gray", vmin=0, vmax=1)
    plt.title(title)
    plt.axis("off")


# ---- Drawn digits, for when MNIST is missing, the same in every script ---------------
DIGITS = ("3c66666666663c001838181818183c003c66060c18307e003c66061c06663c00"  # 0 1 2 3
          "3636367e060606007e607c0606663c001c30607c66663c007e060c0c18181800"  # 4 5 6 7
          "3c66663c66663c003c66663e060c3800")  # 8 9: a byte for each of eight rows


def draw_characters(count, font=DIGITS):
    """Draw distorted characters: uint8 images (N, 28, 28) and labels (N,)."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(font), np.uint8))
    glyphs = 255.0 * torch.tensor(bits).view(-1, 1, 8, 8)
    labels = torch.arange(count) % len(glyphs)  # each as often as the others
    affine = 1.4 * torch.eye(2, 3) + 0.2 * torch.randn(count, 2, 3)
    grid = F.affine_grid(affine, [count, 1, 28, 28], False)
    images = F.grid_sample(glyphs[labels], grid, align_corners=False)
    return images[:, 0].byte(), labels


# ---- Plumbing: settings, data and files, the same in every script --------------------
MNIST = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
         "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def get_args(argv=None):
    """Turn SETTINGS into flags (batch_size: --batch-size); [] gives the defaults."""
    parser = argparse.ArgumentParser()
    for name, (default, meaning, *choices) in SETTINGS.items():
        kind = {"type": type(default), "choices": choices or None}
        if default is False:
            kind = {"action": "store_true"}
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            default=default,
            help=f"{meaning} (default: {default})",
            **kind
        )
    args = parser.parse_args(argv)
    if args.quick:  # flags on the command line win over QUICK
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    for name, value in vars(args).items():
        default, meaning, *_ = SETTINGS[name]
        zero = value == 0 != default and "0:" not in meaning
        if zero or str(value).startswith("-"):
            parser.error(f"{name} cannot be {value}")
    os.makedirs(args.out, exist_ok=True)  # a bad folder ends the run here
    return args


def load_data(args):
    """Return uint8 images (N, 28, 28) and labels (N,) to train and to test, and a name.

    The four MNIST files are read from --data, $MNIST_DIR or data/mnist. Without --data,
    missing files are downloaded, and where that fails, digits are drawn. An embedding
    wants labels.long(), because the files have bytes.
    """
    source = args.data or os.environ.get("MNIST_DIR") or "data/mnist"
    try:
        data = [read_idx(Path(source, name), args.data) for name in MNIST]
    except Exception as error:
        if args.data not in ["", "drawn"]:
            raise SystemExit(f"cannot read --data {source}: {error}") from None
        source = f"drawn digits, not MNIST ({args.data or error})"
        data = [*draw_characters(args.train_size), *draw_characters(2000)]
    print(f"data: {source}")
    images, labels, *test = [tensor.to(args.device) for tensor in data]
    return images[: args.train_size], labels[: args.train_size], *test, source


def read_idx(path, own):
    """Read an IDX file, gzipped or not, as a tensor; download it if it is missing."""
    packed = Path(f"{path}.gz")
    if path.exists():
        raw = path.read_bytes()
    elif own or packed.exists():
        raw = gzip.decompress(packed.read_bytes())
    else:
        url = f"https://ossci-datasets.s3.amazonaws.com/mnist/{packed.name}"
        print(f"downloading {url}")
        raw = gzip.decompress(urllib.request.urlopen(url, timeout=10).read())
        os.makedirs(path.parent, exist_ok=True)
        path.write_bytes(raw)
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    array = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    return torch.tensor(array.reshape(shape))


def save_model(args, model):
    """Write model.pt: the weights of the model in main, and the settings."""
    part = f"{args.out}/model.part"
    torch.save({"weights": model.state_dict(), "settings": vars(args)}, part)
    os.replace(part, f"{args.out}/model.pt")


def load_weights(args, model):
    """Load the weights of --load, if it is given."""
    if args.load:
        saved = torch.load(args.load, map_location="cpu", weights_only=True)
        model.load_state_dict(saved.get("weights", saved))


def save_metrics(args, **metrics):
    """Print the results, and write all metrics to metrics.json."""
    metrics.update(settings=vars(args), torch=torch.__version__)
    Path(args.out, "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(json.dumps(metrics["results"], indent=1))
    print(f"data: {metrics['data']}; results: {args.out}")


if __name__ == "__main__":
    main([] if "kernel_launcher" in sys.argv[0] else None)  # notebook: the defaults
