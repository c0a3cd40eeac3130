"""The two-level VAE: z2 explains z1, and z1 explains the image x.

    p(x, z1, z2) = p(z2) p(z1 | z2) p(x | z1),  p(z2) = N(0, I)    sample
    q(z1, z2 | x) = q(z1 | x) q(z2 | z1)                           encoder1, encoder2
    log p(x) >= ELBO = J1 + J2 + J3, on average over q, with       elbo
    J1 = log p(x | z1)                                             x is redrawn
    J2 = -KL(q(z2 | z1) ‖ p(z2))                                   minus cost of level 2
    J3 = log p(z1 | z2) - log q(z1 | x)                            minus cost of level 1

A second level gives z1 a learned prior: z2 says which z1 are likely. Diffusion has T
levels. In the text's code, z2 is switched off; the second lesson says why. (The ELBO
bounds the log of a density of pixels in [0, 1], so it can be positive; bits/dim:
-ELBO / (784 ln 2) + log2 255.)

    python 02_hvae.py            2-4 minutes on two CPU cores
    python 02_hvae.py --quick    a smoke test

Expect  ELBO +808 nats, after paying 8 for level 2; one level: +782. In the text's model
        level 2 costs 0. See levels.png.
Read    `TwoLevelVAE` first.
Try     easy: --faults. What does each fault do?
        medium: --latent-dim 5 --out out/try. What does each level cost?
        harder: a third level, like `encoder2`. Which J needs care?
Text    拡散モデルの理論, appendix C, after the book ゼロから作るDeep Learning 5
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
    "epochs": (12, "passes over the training images for each model; 0: none"),
    "batch_size": (128, "images per step"),
    "lr": (4e-3, "highest learning rate"),
    "latent_dim": (20, "numbers in z1 and in z2"),
    "faults": (False, "train five models: also two with a single fault"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/02_hvae", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"train_size": 512}


# ---- Lesson one: two levels ----------------------------------------------------------
def gaussian_log_density(x, mu, logvar):
    """Return log N(x; μ, σ²) per element, in nats."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 / logvar.exp())


def gaussian_kl(mu1, logvar1, mu2, logvar2):
    """Return KL(N(μ1, σ1²) ‖ N(μ2, σ2²)) per element, in nats (text C.3)."""
    log_ratio = logvar1 - logvar2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mu1 - mu2) ** 2 / logvar2.exp())


def reparameterize(mu, logvar):
    """Draw z = μ + σ ε, so that gradients reach μ and σ (text C.3)."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def mlp(*sizes):
    """Linear layers with SiLU in between: (B, sizes[0]) -> (B, sizes[-1])."""
    layers = []
    for d_in, d_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(d_in, d_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def gaussian(parameters):
    """Split a network's output (B, 2 d) into a mean and a log-variance, each (B, d)."""
    return parameters.chunk(2, 1)


def sampled_J3(z1, q1, p1):
    """Return log p(z1 | z2) - log q(z1 | x) at the z1 that was drawn, per element."""
    return gaussian_log_density(z1, *p1) - gaussian_log_density(z1, *q1)


class TwoLevelVAE(nn.Module):
    """p(z2) p(z1 | z2) p(x | z1) for images x (B, 784) in [0, 1] (text C.1, C.5)."""

    def __init__(self, d):
        super().__init__()
        self.encoder1 = mlp(784, 512, 2 * d)     # q(z1 | x)
        self.encoder2 = mlp(d, 256, 256, 2 * d)  # q(z2 | z1)
        self.decoder2 = mlp(d, 256, 256, 2 * d)  # p(z1 | z2)
        self.decoder1 = nn.Sequential(mlp(d, 512, 784), nn.Sigmoid())  # x̂(z1)
        self.pixel_logvar = nn.Parameter(torch.tensor(-2.4))  # log σ², learned

    def prior(self, z2):
        """Return mean (ẑ of text C.1) and log-variance of p(z1 | z2), each (B, d)."""
        return gaussian(self.decoder2(z2))

    def elbo(self, x, J3_term=sampled_J3):
        """Return J1, J2, J3 at one draw of z1 and z2, each (B,), in nats (text C.2).

        The second lesson has another J3_term.
        """
        q1 = gaussian(self.encoder1(x))   # q(z1 | x)
        z1 = reparameterize(*q1)
        q2 = gaussian(self.encoder2(z1))  # q(z2 | z1)
        z2 = reparameterize(*q2)
        p1 = self.prior(z2)               # p(z1 | z2)
        p2 = 2 * [torch.zeros_like(z2)]   # p(z2) = N(0, I): mean and log-variance 0
        J1 = gaussian_log_density(x, self.decoder1(z1), self.pixel_logvar)
        J2 = -gaussian_kl(*q2, *p2)  # in closed form, because p2 depends on no draw
        return J1.sum(1), J2.sum(1), J3_term(z1, q1, p1).sum(1)

    def sample(self, z2):
        """Turn z2 (B, d), from N(0, I) or an image, into images (B, 784): x̂(z1)."""
        z1 = reparameterize(*self.prior(z2))
        return self.decoder1(z1)


# ---- Training ------------------------------------------------------------------------
def to_float(images):
    """Turn uint8 images (B, 28, 28) into pixels in [0, 1], (B, 784)."""
    assert images.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    return images.flatten(1).float() / 255


def train(args, model, images, history, J3_term=sampled_J3):
    """Maximize J1 + J2 + J3 on uint8 images (N, 28, 28); fill `history`."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps + 1, pct_start=0.05
    )  # high early: once σ is small, a high rate makes the loss explode
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(args.batch_size):
            terms = model.elbo(to_float(images[batch]), J3_term)
            loss = -sum(terms).mean()  # -(J1 + J2 + J3)
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


# ---- Second lesson: why the text's version switches z2 off (you can skip it) ---------
# The text computes J3 in closed form, as a KL. A KL averages over fresh z1, but z2 was
# drawn from one z1: what z2 knows of that z1, beyond x, costs nats in J2 and earns none
# in J3. (For p(z1 | z2) = N(ẑ(z2), 1), J3 falls by Cov(z1, ẑ(z2) | x) per dimension.)
# The text also sets every σ of p to 1. Then z1 carries few nats and is noisy, and the
# noise of z1 is just what the closed form charges for. Either fault alone leaves z2 in
# use; together they switch it off.
def closed_form_J3(z1, q1, p1):
    """First fault: return -KL(q(z1 | x) ‖ p(z1 | z2)), per element (text C.3)."""
    return -gaussian_kl(*q1, *p1)


class SigmaOne(TwoLevelVAE):
    """Second fault: p(x | z1) and p(z1 | z2) have variance 1."""

    def __init__(self, d):
        super().__init__(d)
        self.pixel_logvar.requires_grad_(False).zero_()  # log 1

    def prior(self, z2):
        z1_hat, logvar = super().prior(z2)
        return z1_hat, torch.zeros_like(logvar)


class OneLevel(TwoLevelVAE):
    """For comparison: p(z1) = N(0, I), so that the closed form is right."""

    def prior(self, z2):
        return 2 * [torch.zeros_like(z2)]


MODELS = {
    "repaired": (TwoLevelVAE, sampled_J3),
    "as in the text": (SigmaOne, closed_form_J3),
    "one level": (OneLevel, closed_form_J3),
}
FAULTS = {
    "closed form alone": (TwoLevelVAE, closed_form_J3),
    "sigma 1 alone": (SigmaOne, sampled_J3),
}


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, _, test_images, _, source = load_data(args)
    chosen = MODELS | FAULTS if args.faults else MODELS
    models, history = nn.ModuleDict(), {}
    for name, (model_class, _) in chosen.items():
        models[name] = model_class(args.latent_dim).to(args.device)
        history[name] = []
    load_weights(args, models)
    try:
        for name, (_, J3_term) in chosen.items():
            print(f"model: {name}")
            torch.manual_seed(args.seed)  # all see the same batches
            train(args, models[name], images, history[name], J3_term)
    except KeyboardInterrupt:
        print("Training stopped early; models that had no turn are untrained.")
    save_model(args, models)
    models.eval()
    x = to_float(test_images)
    results = {name: evaluate(model, x) for name, model in models.items()}
    save_metrics(args, results=results, history=history, data=source)
    plot_levels(args, models, x[:10])


@torch.no_grad()
def evaluate(model, x):
    """Return the ELBO and the cost of each level, means over images x (N, 784)."""
    J1, J2, J3 = model.elbo(x)  # the ELBO, however it was trained
    return {
        "ELBO in nats": (J1 + J2 + J3).mean().item(),
        "cost of level 1": -J3.mean().item(),
        "cost of level 2": -J2.mean().item(),
    }


@torch.no_grad()
def plot_levels(args, models, x):
    """Show images x, what z1 keeps, what z2 keeps, three draws from it, and samples."""
    plt.figure(figsize=(5 * len(models), 6), layout="constrained")
    z2, pixels = torch.randn(1000, args.latent_dim, device=x.device), {}
    for i, (name, model) in enumerate(models.items()):
        mu1, _ = gaussian(model.encoder1(x))
        mu2, _ = gaussian(model.encoder2(mu1))
        z1_hat, _ = model.prior(mu2)
        samples = model.sample(z2)
        pixels[name] = (samples.view(-1, 28, 28) * 255).round().byte().cpu()
        rows = [x, model.decoder1(mu1), model.decoder1(z1_hat)]
        rows += [model.sample(mu2.repeat(3, 1)), samples[:50]]
        plt.subplot(1, len(models), i + 1)
        title = f"{name}: x, by z1, by z2, 3 draws, samples"
        show_grid(torch.cat(rows).view(-1, 1, 28, 28), 10, title)
    plt.savefig(f"{args.out}/levels.png")
    np.savez_compressed(f"{args.out}/samples.npz", **pixels)


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
