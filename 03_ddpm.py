"""Denoising diffusion (DDPM): learn to see the noise, then turn noise into images.

    x_t = √(1-β_t) x_{t-1} + √β_t ε,  ε ~ N(0, I)     a step of noise       q_step
    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                       t steps at once       q_sample
    L_simple = mean of (ε - ε_θ(x_t, t))²             find the noise        train
    x̂_0 = (x_t - √(1-ᾱ_t) ε_θ(x_t, t)) / √ᾱ_t         the image behind it   predict_x0
    x_{t-1} = μ̃_t(x̂_0, x_t) + σ_t z,  z ~ N(0, I)     a step towards it     sample

In T = 1000 small steps, an image x_0 dissolves in noise: ᾱ_t falls from 1 to 0. The
network ε_θ only learns to tell the noise in x_t from the image. That is enough to go
back: guess the image, step a little towards it, add a little fresh noise, repeat.

    python 03_ddpm.py            9-20 minutes on two CPU cores
    python 03_ddpm.py --quick    a smoke test

Expect  loss (L_simple) below 0.025; chain.png: noise becomes digits.
Read    `Diffusion` and `train`: they are DDPM.
Try     easy: --T 100 --out out/T100. How many steps does a digit need?
        medium: in `Diffusion`, the cosine schedule (arXiv:2102.09672, eq. 17).
        harder: add an embedding of y.long(), if given, to `emb`; `train` gets labels,
        and `sample` gets `lambda x, t: model(x, t, y)`.
Paper   Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, arXiv:2006.11239
Text    拡散モデルの理論, sections 8.2 to 8.4; ex. and eq. 5.x: 第5章 演習問題の解答
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
    "epochs": (8, "passes over the training images; 0: none"),
    "batch_size": (32, "images per step"),
    "lr": (2e-3, "highest learning rate"),
    "T": (1000, "steps from image to noise, above 20"),
    "samples": (100, "images to generate"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/03_ddpm", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"epochs": 1, "T": 30, "samples": 20, "train_size": 512}


# ---- Lesson one: diffusion -----------------------------------------------------------
class Diffusion:
    """The chain x_0, x_1, ..., x_T: q adds noise, p_θ removes it (text 8.2, 8.4).

    Images x (B, C, H, W) have pixels in [-1, 1] (points: (B, 2, 1, 1)); t is a number
    in 1..T, or one for each image (B,). model(x_t, t) estimates the noise ε in x_t.
    Tables (T + 1, 1, 1, 1) are indexed by t; they are computed in float64, because
    1 - ᾱ_t is small at first.
    """

    def __init__(self, T=1000, device="cpu"):
        if T <= 20:
            raise ValueError("T must be above 20, so that β_T = 20 / T is below 1")
        beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
        beta = F.pad(beta, (1, 0)).view(-1, 1, 1, 1)  # put β_0 = 0 in front of β_1
        bar = torch.cumprod(1 - beta, 0)  # ᾱ_t = (1 - β_1) ... (1 - β_t), and ᾱ_0 = 1
        before = bar.roll(1, 0)  # ᾱ_{t-1}, for t >= 1
        self.beta = beta
        self.signal = bar.sqrt()  # x_t = signal x_0 + noise ε
        self.noise = (1 - bar).sqrt()
        self.from_x0 = before.sqrt() * beta / (1 - bar)  # μ̃_t = from_x0 x_0
        self.from_xt = (1 - beta).sqrt() * (1 - before) / (1 - bar)  # + from_xt x_t
        self.beta_tilde = beta * (1 - before) / (1 - bar)  # β̃_t, variance around μ̃_t
        self.variance = beta  # σ_t² of p_θ; or beta_tilde, if its 0 at t = 1 is mended
        for name, table in vars(self).items():  # so far, there are only tables
            setattr(self, name, table.float().to(device))
        self.T = T

    def q_sample(self, x0, t, eps):
        """Jump from x_0 to x_t (text 8.4.3; eq. 5.25; DDPM eq. 4)."""
        return self.signal[t] * x0 + self.noise[t] * eps

    def predict_x0(self, model, x_t, t):
        """Return x̂_0, the image that the network sees in x_t (DDPM eq. 15).

        What the network predicts is decided here and in the loss of `train`.
        """
        x0 = (x_t - self.noise[t] * model(x_t, t)) / self.signal[t]
        # At large t, errors are divided by almost 0. (For latents, drop the clamp.)
        return x0.clamp(-1, 1)

    def q_mean(self, x0, x_t, t):
        """Return μ̃_t, the mean of q(x_{t-1} | x_t, x_0) (eq. 5.28; DDPM eq. 7).

        For x̂_0 without the clamp, it is the mean in the paper's Algorithm 2,
        (x_t - β_t ε_θ(x_t, t) / √(1-ᾱ_t)) / √(1-β_t) (eq. 5.32; DDPM eq. 11).
        """
        return self.from_x0[t] * x0 + self.from_xt[t] * x_t

    @torch.no_grad()
    def sample(self, model, x):
        """Turn pure noise x_T into images x_0 (DDPM, Algorithm 2; text 8.2.2)."""
        for t in range(self.T, 0, -1):
            x0 = self.predict_x0(model, x, t)  # guess the image
            x = self.q_mean(x0, x, t)  # take a small step towards it
            if t > 1:
                z = torch.randn_like(x)
                x = x + self.variance[t].sqrt() * z  # add a little fresh noise
        return x


def timestep_embedding(t):
    """Turn times t (B,) into sines and cosines at 32 frequencies: (B, 64)."""
    angles = t.view(-1, 1) / torch.logspace(0, 4, 32, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], 1)


def normed_conv(c_in, c_out):
    """Normalize, SiLU, convolution: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(
        nn.GroupNorm(8, c_in),
        nn.SiLU(),
        nn.Conv2d(c_in, c_out, 3, padding=1),
    )


class ResidualBlock(nn.Module):
    """x + two convolutions that are told the time: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = normed_conv(channels, channels)
        self.time = nn.Linear(64, channels)
        self.conv2 = normed_conv(channels, channels)
        nn.init.zeros_(self.conv2[-1].weight)  # at first, it adds almost nothing

    def forward(self, x, emb):
        h = self.conv1(x) + self.time(emb)[:, :, None, None]  # (B, C, H, W)
        return x + self.conv2(h)


class UNet(nn.Module):
    """ε_θ(x_t, t) for images x_t (B, 1, size, size), size divisible by 4.

    In text 8.2.2 the network outputs x̂_{t-1}; here it outputs the noise, as in DDPM.
    Convolutions see only nearby pixels. One vector of the whole image links the rest,
    in place of the paper's self-attention; and skips are added, not concatenated.
    """

    def __init__(self, size=28):
        super().__init__()
        pixels = 64 * (size // 4) ** 2  # numbers at the lowest resolution
        self.conv_in = nn.Conv2d(1, 16, 3, padding=1)
        self.down1 = ResidualBlock(16)
        self.shrink1 = nn.Conv2d(16, 32, 2, stride=2)
        self.down2 = ResidualBlock(32)
        self.shrink2 = nn.Conv2d(32, 64, 2, stride=2)
        self.middle1 = ResidualBlock(64)
        self.gather = nn.Linear(pixels, 256)
        self.spread = nn.Linear(256, pixels)
        self.middle2 = ResidualBlock(64)
        self.grow2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.up2 = ResidualBlock(32)
        self.grow1 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.up1 = ResidualBlock(16)
        self.conv_out = normed_conv(16, 1)

    def forward(self, x, t):
        emb = timestep_embedding(torch.as_tensor(t, device=x.device))
        h1 = self.down1(self.conv_in(x), emb)                 # (B, 16, 28, 28)
        h2 = self.down2(self.shrink1(h1), emb)                # (B, 32, 14, 14)
        h = self.middle1(self.shrink2(h2), emb)               # (B, 64, 7, 7)
        vector = F.silu(self.gather(h.flatten(1)))            # (B, 256)
        h = h + self.spread(vector).view_as(h)                # (B, 64, 7, 7)
        h = self.middle2(h, emb)
        h = self.up2(self.grow2(h) + h2, emb)                 # (B, 32, 14, 14)
        h = self.up1(self.grow1(h) + h1, emb)                 # (B, 16, 28, 28)
        return self.conv_out(h)                               # (B, 1, 28, 28)


# ---- Training ------------------------------------------------------------------------
def to_float(images):
    """Turn uint8 images (B, H, W) into pixels in [-1, 1], (B, 1, H, W)."""
    assert images.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    return images[:, None].float() / 127.5 - 1


def train(args, diffusion, model, images, history):
    """Train with Algorithm 1 of DDPM on uint8 images (N, H, W); fill `history`."""
    optimizer = torch.optim.Adam(
        model.parameters(), args.lr, betas=(0.9, 0.99), fused=True
    )
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(args.batch_size):
            x0 = to_float(images[batch])
            t = torch.randint(1, diffusion.T + 1, [len(x0)], device=x0.device)
            eps = torch.randn_like(x0)
            x_t = diffusion.q_sample(x0, t, eps)
            # L_simple: the mean of (ε - ε_θ(x_t, t))²; see predict_x0, too
            loss = F.mse_loss(model(x_t, t), eps)
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


# ---- Second lesson: the bound (you can skip it) --------------------------------------
# DDPM is derived from a bound (text 8.3; eq. 5.27; DDPM eq. 5):
#     -log p_θ(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0, on average over q, with
#     L_T = KL(q(x_T | x_0) ‖ N(0, I))                          does x_0 end in noise?
#     L_{t-1} = KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))  is step t > 1 right?
#     L_0 = -log p_θ(x_0 | x_1)                                 is each pixel right?
# Without the clamp, each L_{t-1} is a constant plus a weight times the error of the
# noise (ex. 5.4). L_simple drops the weights (ex. 5.6), so that small t count for less.
@torch.no_grad()
def bound_terms(diffusion, model, x0):
    """Return L_0, ..., L_T (B, T + 1), from one x_t for each t, in bits/dim."""
    terms = []
    for t in range(1, diffusion.T + 1):
        x_t = diffusion.q_sample(x0, t, torch.randn_like(x0))
        mean = diffusion.q_mean(diffusion.predict_x0(model, x_t, t), x_t, t)
        variance = diffusion.variance[t]
        if t == 1:
            nats = -discretized_log_likelihood(x0, mean, variance.sqrt())
        else:
            true_mean = diffusion.q_mean(x0, x_t, t)
            nats = gaussian_kl(true_mean, diffusion.beta_tilde[t], mean, variance)
        terms.append(nats)
    L_T = gaussian_kl(diffusion.signal[-1] * x0, diffusion.noise[-1] ** 2, 0.0, 1.0)
    terms.append(L_T)
    return torch.stack(terms, 1).mean((2, 3, 4)) / math.log(2)


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) of each pixel in nats (ex. 5.4)."""
    ratio = variance1 / variance2
    return 0.5 * (ratio - 1 - ratio.log() + (mean1 - mean2) ** 2 / variance2)


def discretized_log_likelihood(x0, mean, std):
    """Return log P(bin x0 ± 1/255) of each 8-bit pixel under N(mean, std²), in nats.

    The bins of black and white are open on one side (ex. 5.5, eq. 5.34; DDPM eq. 13).
    """
    cdf = torch.special.ndtr  # Φ
    above = torch.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - mean) / std))
    below = torch.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - mean) / std))
    return (above - below).clamp(min=1e-12).log()


def dropped_weight(diffusion, t):
    """Return the weight of ‖ε - ε_θ‖² in L_{t-1} (ex. 5.6; for t = 1, ex. 5.5)."""
    beta = diffusion.beta[t]
    return beta**2 / (2 * diffusion.variance[t] * (1 - beta) * diffusion.noise[t] ** 2)


# ---- Third lesson: other ways along the chain (you can skip it) ----------------------
# The forward chain can be walked step by step. The way back can be cut short: put
# sample_ddim(diffusion, model, x_T) in the place of diffusion.sample in `main`.
def q_step(diffusion, x, t, eps):
    """Take one step of the forward process, from x_{t-1} to x_t (text 8.2.1)."""
    beta = diffusion.beta[t]
    return (1 - beta).sqrt() * x + beta.sqrt() * eps


@torch.no_grad()
def sample_ddim(diffusion, model, x, steps=50, eta=0.0):
    """Sample in at most `steps` steps: DDIM (Song, Meng, Ermon, arXiv:2010.02502).

    Its α_t is our ᾱ_t. With eta = 0 no noise is added on the way; with eta = 1 and
    steps = T it is Algorithm 2 with σ_t² = β̃_t.
    """
    signal, noise = diffusion.signal, diffusion.noise
    stride = math.ceil(diffusion.T / steps)
    times = [*range(diffusion.T, 0, -stride), 0]
    for t, s in zip(times, times[1:]):  # from x_t to x_s, s < t
        x0 = diffusion.predict_x0(model, x, t)
        eps = (x - signal[t] * x0) / noise[t]  # the noise in x_t if x̂_0 is the image
        kept = signal[t] / signal[s]
        sigma = eta * noise[s] / noise[t] * (1 - kept**2).sqrt()  # eq. 16
        x = signal[s] * x0 + (noise[s] ** 2 - sigma**2).sqrt() * eps  # eq. 12
        x = x + sigma * torch.randn_like(x)
    return x


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, _, test_images, _, source = load_data(args)
    diffusion = Diffusion(args.T, args.device)
    model = UNet().to(args.device)
    load_weights(args, model)
    history = []
    try:
        train(args, diffusion, model, images, history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    model.eval()
    x0 = to_float(test_images[:16])
    terms = bound_terms(diffusion, model, x0).mean(0)
    x_T = torch.randn(args.samples, *x0.shape[1:], device=args.device)
    samples = diffusion.sample(model, x_T)
    pixels = (samples[:, 0].clamp(-1, 1) + 1) * 127.5
    np.savez_compressed(f"{args.out}/samples.npz", images=pixels.round().byte().cpu())
    save_metrics(
        args,
        results={"bound in bits/dim, 16 images (uniform model: 8)": terms.sum().item()},
        history=history,
        data=source,
    )
    plot_bound(args, diffusion, terms)
    plot_chain(args, diffusion, model, x0[:3], samples[:100])


def plot_bound(args, diffusion, terms):
    """Plot the terms of the bound and the weights that L_simple drops (ex. 5.6)."""
    t = torch.arange(1, diffusion.T + 1)
    weights = dropped_weight(diffusion, t).flatten()
    plt.figure()
    plt.loglog(t, weights.cpu(), label="weight that L_simple drops, nats (ex. 5.6)")
    plt.loglog(t, terms[:-1].cpu(), label="L_{t-1}, bits/dim (ex. 5.4)")
    plt.xlabel("t")
    plt.ylabel("weight; term of the bound")
    plt.legend()
    plt.savefig(f"{args.out}/bound.png")


@torch.no_grad()
def plot_chain(args, diffusion, model, x0, samples):
    """Plot images x0 dissolving in noise, new images emerging from it, and samples."""
    noise = torch.randn_like(x0)
    seen, columns = [], []

    def watched(x_t, t):  # the model, with a note of what it is shown
        seen.append((x_t, t))
        return model(x_t, t)

    diffusion.sample(watched, noise)
    for x_t, t in seen[:: diffusion.T // 10] + seen[-1:]:
        x0_hat = diffusion.predict_x0(model, x_t, t)
        columns.append(torch.cat([diffusion.q_sample(x0, t, noise), x_t, x0_hat]))
    tiles = torch.stack(columns, 1).flatten(0, 1)
    plt.figure(figsize=(13, 6), layout="constrained")
    plt.subplot(1, 2, 1)
    title = f"from t = {diffusion.T} to 1: x_t by q, x_t by p_θ, its guess x̂_0"
    show_grid((tiles + 1) / 2, len(columns), title)
    plt.subplot(1, 2, 2)
    show_grid((samples + 1) / 2, 10, "samples")
    plt.savefig(f"{args.out}/chain.png")


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
