"""Denoising diffusion (DDPM): a network learns to remove the noise from an image step by step.

    q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)              forward process: add noise
    q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I),  ᾱ_t = Π (1-β_s)    t steps at once, t = 1..T
    q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I)                      posterior of the forward process
    p_θ(x_{t-1} | x_t) = N(μ_θ(x_t, t), β_t I)                 reverse process: remove noise
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))   the bound's term for step t > 1
    -log p_θ(x_0) ≤ E[L_T + Σ_{t=2..T} L_{t-1} + L_0]          with L_0 = -log p_θ(x_0 | x_1)
                                                               and L_T = KL(q(x_T | x_0) ‖ N(0, I))
    L_simple = E (ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t))²          the training loss, a mean over pixels

Sources  DDPM: Denoising Diffusion Probabilistic Models, Ho, Jain, Abbeel, arXiv:2006.11239
         DDIM: Denoising Diffusion Implicit Models, Song, Meng, Ermon, arXiv:2010.02502
         texts: 拡散モデルの理論, sections 8.2-8.4; for ex. 5.x and eq. 5.x: 第5章 演習問題の解答
Run      python 03_ddpm.py    (--quick for a smoke test, --help for the settings)
Expect   8 minutes on two CPU cores (AMD EPYC, real MNIST, seed 0, 2026-11-26); four pictures.
         L_simple 0.0231; bound 2.04 bits/dim (16 test images). 1,000 samples, 04_vit.py --judge:
                                           clear (over 95% sure)   Fréchet distance
         this file: DDIM, 50 steps, η = 1.9          80%             2.2
         the same with η = 0                         68%             4.6
         Algorithm 2 (--ddim-steps 0; 500 samples)   75%             3.1
         1,000 real test images                      97%             0.4
         3 epochs (2026-11-24): Algorithm 2 (500)    61%             6.0
           DDIM, η = 1.9 (another seed)              73% (72%)       4.7 (4.9)
           the same, averaged weights (not here)     71%             4.7
           the same, v-prediction (not here)         76%             4.5
           the same, t/T ~ Beta(1.5, 2.3) (not here) 75% (74%)       3.1 (4.1)
         η = 1.9 was found by experiment: the noise lets later steps correct the network's errors.
         The price is variety: with the exact ε of N(0, 0.3²), samples have σ = 0.19 (η = 0: 0.27).
Read     Start with `Diffusion` and `train`: `train` is Algorithm 1, `sample` is Algorithm 2.
Try      easy: --epochs 0 --load out/03_ddpm/model.pt --out out/try --ddim-steps 10 (or 5, or 0).
         medium: other values of `eta` in `main`; at how many steps does eta = 0 beat 1.9?
         harder: condition `UNet` on the class: embed the label and add it to `emb`.
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
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # a Mac's GPU lacks log_ndtr
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
    add("--out", default="out", help="parent folder; results go to its subfolder 03_ddpm")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine")
    add("--epochs", type=int, default=8, help="passes over the training images")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--train-size", type=int, default=60000, help="number of training images")
    add("--load", help="a model.pt to start from; --epochs 0 only evaluates it")
    add("--quick", action="store_true", help="smoke test: a short run on 512 images")
    add("--T", type=int, default=1000, help="number of diffusion steps")
    add("--samples", type=int, default=100, help="number of generated images, a multiple of 10")
    add("--ddim-steps", type=int, default=50, help="DDIM steps; 0: Algorithm 2, with all T steps")
    args = parser.parse_args(argv)
    if args.quick:  # flags given on the command line override these
        parser.set_defaults(epochs=1, train_size=512, batch_size=64, T=30, samples=20)
        args = parser.parse_args(argv)
    positive = [args.batch_size, args.lr, args.train_size, args.samples, args.T - 24]  # T ≥ 25
    if min(positive) <= 0 or min(args.epochs, args.ddim_steps) < 0 or args.samples % 10:
        parser.error("--epochs and --ddim-steps must be >= 0; --batch-size, --lr and --train-size "
                     "> 0; --T >= 25; --samples a positive multiple of 10")
    args.out += "/03_ddpm"
    return args


# ---- Diffusion: the forward process, the reverse process, and the bound --------------
def per_image(values, x):
    """values (B,) -> (B, 1, ..., 1) with the type and device of x (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1)).to(x)


class Diffusion:
    """The forward process q, the reverse process p_θ, and the variational bound.

    `model(x_t, t)` estimates the noise ε in x_t (B, ...), with x_0 in [-1, 1] and t (B,) in 1..T; t
    is on the CPU. `betas[t]` is β_t, `alpha_bars[t]` is ᾱ_t, for t = 0..T, with β_0 = 0, ᾱ_0 = 1.
    """

    def __init__(self, T=1000):
        self.T = T
        betas = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)  # DDPM section 4; T > 20
        self.betas = F.pad(betas, (1, 0))
        self.alpha_bars = torch.cumprod(1 - self.betas, 0)

    def q_step(self, x, t, noise):
        """One step of the forward process, x_{t-1} to x_t (text 8.2.1); not used below."""
        beta = self.betas[t]
        return per_image((1 - beta).sqrt(), x) * x + per_image(beta.sqrt(), x) * noise

    def q_sample(self, x0, t, noise):
        """From x_0 to x_t directly (text 8.4.3; DDPM eq. 4)."""
        bar = self.alpha_bars[t]
        return per_image(bar.sqrt(), x0) * x0 + per_image((1 - bar).sqrt(), x0) * noise

    def q_posterior(self, x0, x_t, t):
        """Mean μ̃_t and variance β̃_t of q(x_{t-1} | x_t, x_0), by Bayes' rule (DDPM eq. 7)."""
        beta, bar = self.betas[t], self.alpha_bars[t]
        bar_previous = self.alpha_bars[t - 1]
        from_x0 = bar_previous.sqrt() * beta / (1 - bar)
        from_xt = (1 - beta).sqrt() * (1 - bar_previous) / (1 - bar)
        mean = per_image(from_x0, x0) * x0 + per_image(from_xt, x0) * x_t
        return mean, per_image(beta * (1 - bar_previous) / (1 - bar), x0)

    def predict_x0(self, x_t, t, eps):
        """The x_0 that gives x_t if the noise in x_t is eps (DDPM eq. 4 solved for x_0)."""
        bar = self.alpha_bars[t]
        return (x_t - per_image((1 - bar).sqrt(), x_t) * eps) / per_image(bar.sqrt(), x_t)

    def p_mean_variance(self, model, x_t, t):
        """Mean and variance σ_t² = β_t of p_θ(x_{t-1} | x_t), and the estimate x̂_0 of x_0."""
        x0 = self.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)  # pixels are in [-1, 1]
        # without the clamp, mean is (x_t - β_t ε_θ / √(1-ᾱ_t)) / √(1-β_t): eq. 5.32; DDPM eq. 11
        mean, _ = self.q_posterior(x0, x_t, t)
        return mean, per_image(self.betas[t], x_t), x0

    @torch.no_grad()
    def sample(self, model, x, frames=None):
        """DDPM, Algorithm 2: x_T (B, ...) -> x_0. Appends each (t, x_t, x̂_0) to `frames`."""
        for step in range(self.T, 0, -1):
            t = torch.full([len(x)], step)
            mean, variance, x0 = self.p_mean_variance(model, x, t)
            if frames is not None:
                frames.append((step, x, x0))
            z = torch.randn_like(x) if step > 1 else 0
            x = mean + variance.sqrt() * z
        return x

    @torch.no_grad()
    def sample_ddim(self, model, x, steps, eta):
        """DDIM eq. 12 (its α_t is our ᾱ_t), x_T -> x_0; eta = 1: variance of q(x_s | x_t, x_0)."""
        times = torch.linspace(self.T, 0, min(steps, self.T) + 1).round().long()
        for t, s in zip(times, times[1:]):  # from x_t to x_s, s < t
            x0 = self.p_mean_variance(model, x, t.expand(len(x)))[2]
            bar_t, bar_s = self.alpha_bars[t], self.alpha_bars[s]
            eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()  # the ε that fits the clamped x̂_0
            variance = eta**2 * (1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s)  # eq. 16
            variance = variance.clamp(max=1 - bar_s)  # if eta > 1, keeps the next root real
            x = bar_s.sqrt() * x0 + (1 - bar_s - variance).sqrt() * eps
            x = x + variance.sqrt() * torch.randn_like(x)
        return x

    def dropped_weight(self, t):
        """The weight of ‖ε - ε_θ‖² in L_{t-1}, t > 1; L_simple drops it (ex. 5.6; DDPM eq. 12)."""
        beta = self.betas[t]  # β_t² / (2 σ_t² α_t (1-ᾱ_t)) with σ_t² = β_t, α_t = 1-β_t
        return beta / (2 * (1 - beta) * (1 - self.alpha_bars[t]))

    @torch.no_grad()
    def vlb(self, model, x0):
        """L_0, ..., L_T (B, T + 1), at one x_t for each t, in bits/dim (eq. 5.27; DDPM eq. 5)."""
        terms = []
        for step in range(1, self.T + 1):
            t = torch.full([len(x0)], step)
            x_t = self.q_sample(x0, t, torch.randn_like(x0))
            mean, variance, _ = self.p_mean_variance(model, x_t, t)
            if step == 1:
                nats = -discretized_log_likelihood(x0, mean, variance.sqrt())  # L_0, eq. 5.34
            else:
                nats = gaussian_kl(*self.q_posterior(x0, x_t, t), mean, variance)  # ex. 5.4
            terms.append(nats)
        bar = self.alpha_bars[-1]
        terms.append(gaussian_kl(bar.sqrt() * x0, 1 - bar, 0, 1))  # L_T
        return torch.stack([nats.flatten(1).mean(1) for nats in terms], 1) / math.log(2)


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) of each pixel, in nats."""
    ratio = variance1 / variance2
    return 0.5 * (ratio - 1 - ratio.log() + (mean1 - mean2).square() / variance2)


def discretized_log_likelihood(x0, mean, std):
    """Log probability in nats of 8-bit pixels x0 under N(mean, std²) (eq. 5.34; DDPM eq. 13)."""
    log_cdf = torch.special.log_ndtr
    d = (x0 - mean).abs()  # by symmetry; log Φ is precise in the lower tail
    upper = log_cdf((1 / 255 - d) / std)  # the bin of a pixel is x0 ± 1/255
    lower = log_cdf((-1 / 255 - d) / std)
    inner = upper + torch.log1p(-(lower - upper).exp())
    outer = log_cdf((1 / 255 - x0.sign() * (x0 - mean)) / std)  # black, white: half-open bins
    return torch.where(x0.abs() > 0.999, outer, inner)


# ---- The network ---------------------------------------------------------------------
class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection: (B, c_in, H, W) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, 1)  # (B, c_out, 1, 1) each
        return self.skip(x) + self.conv2(F.silu(h * (1 + scale) + shift))


class UNet(nn.Module):
    """ε_θ(x_t, t) for x_t (B, 1, 28, 28): down to 7x7 and up again, with skip connections."""

    def __init__(self, width=16):
        super().__init__()
        d = 8 * width
        self.time = nn.Sequential(nn.Linear(64, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.down1 = ResidualBlock(width, width, d)
        self.down2 = ResidualBlock(width, 2 * width, d)
        self.middle1 = ResidualBlock(2 * width, 4 * width, d)
        self.middle2 = ResidualBlock(4 * width, 2 * width, d)
        self.up2 = ResidualBlock(4 * width, width, d)
        self.up1 = ResidualBlock(2 * width, width, d)
        self.norm = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t):
        angles = t[:, None].to(x) * torch.logspace(0, -4, 32).to(x)  # frequencies
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1))  # (B, 64) -> (B, 8C)
        h1 = self.down1(self.conv_in(x), emb)  # (B, C, 28, 28), C = width
        h2 = self.down2(F.avg_pool2d(h1, 2), emb)  # (B, 2C, 14, 14)
        h = self.middle1(F.avg_pool2d(h2, 2), emb)  # (B, 4C, 7, 7)
        h = F.interpolate(self.middle2(h, emb), scale_factor=2)  # (B, 2C, 14, 14)
        h = self.up2(torch.cat([h, h2], 1), emb)  # (B, 4C, 14, 14) -> (B, C, 14, 14)
        h = F.interpolate(h, scale_factor=2)  # (B, C, 28, 28)
        h = self.up1(torch.cat([h, h1], 1), emb)  # (B, 2C, 28, 28) -> (B, C, 28, 28)
        return self.conv_out(F.silu(self.norm(h)))  # (B, 1, 28, 28)


# ---- Training ------------------------------------------------------------------------
def scale(images):
    """uint8 (B, 28, 28) in 0..255 -> float (B, 1, 28, 28) in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0..255, not {images.dtype}")
    return images[:, None].float() / 127.5 - 1


def train(args, diffusion, model, images, history, snapshots):
    """DDPM, Algorithm 1, on uint8 images (N, 28, 28); fills `history` and `snapshots` (samples)."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.99))  # default 0.999
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # lr falls to 0
    fixed_noise = torch.randn(10, 1, 28, 28).to(images.device)
    losses, step = [], 0
    began = time.time()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images)).split(args.batch_size):
            x0 = scale(images[batch])
            t = torch.randint(1, diffusion.T + 1, [len(x0)])
            noise = torch.randn_like(x0)
            x_t = diffusion.q_sample(x0, t, noise)
            loss = (noise - model(x_t, t)).square().mean()  # L_simple (eq. 5.36; DDPM eq. 14)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            if step % math.ceil(steps / 20) == 0 or step == steps:
                mean_loss = sum(losses) / len(losses)
                losses = []
                snapshots.append(diffusion.sample_ddim(model, fixed_noise, 25, eta=0))
                history.append({"step": step, "loss": mean_loss})
                progress(step, steps, began, {"loss": mean_loss})


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    began = time.time()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)
    images, _, test_images, _, source = load_data(args)
    diffusion = Diffusion(args.T)
    model = UNet().to(device)
    if args.load:
        load_weights(args, model)
    history, snapshots = [], []
    try:
        train(args, diffusion, model, images.to(device), history, snapshots)
    except KeyboardInterrupt:
        print("Training stopped early; saving and evaluating the current model.")
    save_model(args, model)
    bound = plot_bound(args, diffusion, model, scale(test_images[:16]).to(device))
    results = {"bound in bits/dim (uniform model: 8)": bound}
    plot_training(args, history, snapshots)
    x_T = torch.randn(args.samples, 1, 28, 28).to(device)
    plot_chain(args, diffusion, model, x_T[:5])
    if args.ddim_steps:
        samples = diffusion.sample_ddim(model, x_T, args.ddim_steps, eta=1.9)  # see Expect
    else:
        samples = diffusion.sample(model, x_T)
    save_samples(args, samples)
    print(json.dumps(results, indent=1))
    save_metrics(args, results, history, source, began)


def plot_training(args, history, snapshots):
    """Draws the loss, and every third entry of `snapshots`, latest first: all from the same x_T."""
    if not history:
        return
    _, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    axes[0].semilogy([row["step"] for row in history], [row["loss"] for row in history])
    axes[0].set(xlabel="step", title="L_simple (predicting ε = 0 gives 1)")
    show_grid(axes[1], (torch.cat(snapshots[::-3]) + 1) / 2, 10, "samples in training, last on top")
    plt.savefig(f"{args.out}/training.png")


def plot_bound(args, diffusion, model, x0):
    """Draws the terms of the bound for x0 and the weights of ex. 5.6; returns it in bits/dim."""
    terms = diffusion.vlb(model, x0)
    t = torch.arange(1, diffusion.T + 1)
    _, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    axes[0].loglog(t, terms[:, :-1].mean(0).cpu())
    axes[0].set(title="terms L_{t-1} against t, in bits/dim (ex. 5.4, 5.5)")
    axes[1].semilogy(t, diffusion.dropped_weight(t))
    axes[1].set(title="weight of (ε - ε_θ)² in L_{t-1} against t (ex. 5.6)")
    plt.savefig(f"{args.out}/bound.png")
    return terms.sum(1).mean().item()


def plot_chain(args, diffusion, model, x_T):
    """Draws how Algorithm 2 turns noise into digits: x_t, with the estimate x̂_0 on its right."""
    frames = []
    diffusion.sample(model, x_T, frames)
    frames = frames[:: diffusion.T // 10] + frames[-1:]
    tiles = torch.cat([torch.cat([x_t, x0], 3) for _, x_t, x0 in frames])
    _, axes = plt.subplots(figsize=(7, 7), layout="constrained")
    show_grid(axes, (tiles + 1) / 2, len(x_T), "x_t (left) and the estimate x̂_0 (right)")
    axes.set_yticks(range(15, 30 * len(frames), 30), [f"t = {t}" for t, _, _ in frames])
    plt.savefig(f"{args.out}/chain.png")


def save_samples(args, samples):
    """Writes samples.npz, uint8 images (N, 28, 28), and a picture of the first hundred."""
    pixels = ((samples[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    np.savez_compressed(f"{args.out}/samples.npz", images=pixels)
    _, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    show_grid(axes, (samples[:100] + 1) / 2, 10, "samples")
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
