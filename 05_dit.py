"""The Diffusion Transformer (DiT): a Transformer that removes noise from latents.

    c = embed(t) + embed(y)                                   what a block sees
    shift, scale, gate = W SiLU(c) + b,  at first all 0       adaLN-Zero      DiTBlock
    h <- h + gate ⊙ Attention(LN(h) ⊙ (1 + scale) + shift)    MLP likewise
    L_simple = mean of (ε - ε_θ(x_t, t, y))²                  the noise       loss
    ε̂ = ε_θ(x_t, t, ∅) + g (ε_θ(x_t, t, y) - ε_θ(x_t, t, ∅))  guidance        guided

An autoencoder first turns 28x28 pixels into 2x8x8 latents x, where all the diffusion
happens. In each block, t and y shift and scale what enters attention and MLP, and gate
what leaves. In training the class is sometimes hidden (∅), so the network also learns
to answer without it; guidance, g > 1, exaggerates the difference.

    python 05_dit.py        7-12 minutes on two CPU cores (--quick: a smoke test)

Expect  results.png; to a classifier, 99% of samples show the right digit (chance: 10%).
Read    `DiTBlock`, `Diffusion`, `guided`; the rest can wait.
Try     easy: --epochs 0 --load out/05_dit/model.pt --out out/try --guidance 4
        medium: DDIM, without new training: `step` returns signal[s] x̂_0 + noise[s] ε̂.
        harder: flow matching, which learns faster: see `loss` in `Diffusion`.
Paper   Peebles, Xie: Scalable Diffusion Models with Transformers, arXiv:2212.09748
Texts   [논문분석] Scalable Diffusion Models with Transformers; 第5章 解答, ex. 5.7
"""

import argparse
import gzip
import json
import math
import os
import sys
import time
import urllib.request
from collections import OrderedDict
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle threads yield their cores
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# name: (default, meaning, choices if any); 0 is refused, unless the meaning has "0:".
SETTINGS = {
    "epochs": (7, "passes over the training images for the DiT; 0: none"),
    "batch_size": (128, "images per step"),
    "lr": (2e-3, "highest learning rate"),
    "block": ("adaln-zero", "design", "adaln-zero", "adaln", "in-context", "cross"),
    "patch_size": (2, "side of a patch of latents", 1, 2, 4),
    "guidance": (1.75, "strength g; 1: off; 0: the noise ignores the class"),
    "steps": (50, "sampling steps, at most"),
    "samples": (100, "images to generate, a multiple of 10"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/05_dit", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"train_size": 512, "steps": 10}


# ---- Lesson one: the Diffusion Transformer -------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, h, D/h)
        q, k, v = qkv.transpose(1, 3).unbind(2)                  # (B, h, N, D/h) each
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5       # (B, h, N, N)
        heads = scores.softmax(3) @ v                            # (B, h, N, D/h)
        return self.proj(heads.transpose(1, 2).flatten(2))       # (B, N, D)


def zero_linear(dim, out_dim):
    """Return a linear layer whose output is 0 before training."""
    layer = nn.Linear(dim, out_dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(x, shift=0, scale=0):
    """Return LN(x) ⊙ (1 + scale) + shift; LN has no weights (DiT has it outside)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """The adaLN-Zero block (DiT section 3.2): tokens x (B, N, D) -> (B, N, D).

    The embeddings of t and y, (B, 1, D) each, set shift, scale and gate (β, γ and α in
    the paper). Before training all gates are 0, and the block adds nothing.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(dim, 4 * dim),
                act=nn.GELU("tanh"),
                fc2=nn.Linear(4 * dim, dim),
            )
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), zero_linear(dim, 6 * dim))

    def forward(self, x, t, y):
        c = t + y
        six = self.adaLN_modulation(c).chunk(6, 2)  # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attn(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """Latents x_t (B, C, H, W), times t (B,), classes y (B,) -> ε̂ and v, like x_t.

    t is in 1..T, and y = num_classes means no class. Parameters have the names of
    facebookresearch/DiT: DiT(32, 2, 4, 1152, 28, 16, 1000) is DiT-XL/2 and takes its
    weights, strict=True. These weights count times from 0: call it with t - 1.
    """

    def __init__(
        self,
        input_size=8,
        patch_size=2,
        in_channels=2,
        hidden_size=128,
        depth=6,
        num_heads=4,
        num_classes=10,
        block=DiTBlock,
    ):
        super().__init__()
        D, P = hidden_size, patch_size
        self.side, self.patch_size = input_size // P, P
        self.num_classes = num_classes
        proj = nn.Conv2d(in_channels, D, P, stride=P)
        self.x_embedder = nn.ModuleDict({"proj": proj})  # PatchEmbed
        mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})  # TimestepEmbedder
        table = nn.Embedding(num_classes + 1, D)  # the last row: no class
        self.y_embedder = nn.ModuleDict({"embedding_table": table})  # LabelEmbedder
        positions = sincos_positions(self.side, D)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(block(D, num_heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), zero_linear(D, 2 * D)),
                "linear": zero_linear(D, P * P * 2 * in_channels),
            }
        )

    def unpatchify(self, x):
        """Arrange the patches' outputs (B, N, P P 2C) as an image (B, 2C, H, W)."""
        side, P = self.side, self.patch_size
        x = x.view(len(x), side, side, P, P, -1)  # row, column; inside a patch p, q
        return torch.einsum("bhwpqc->bchpwq", x).flatten(4).flatten(2, 3)

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x)                             # (B, D, H/P, W/P)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed       # (B, N, D)
        t = self.t_embedder.mlp(sinusoids(t, 256))[:, None]     # (B, 1, D)
        y = self.y_embedder.embedding_table(y)[:, None]         # (B, 1, D)
        for block in self.blocks:
            x = block(x, t, y)
        shift, scale = self.final_layer.adaLN_modulation(t + y).chunk(2, 2)
        x = self.final_layer.linear(modulate(x, shift, scale))  # (B, N, P P 2C)
        return self.unpatchify(x).chunk(2, 1)                   # (B, C, H, W) each


def sinusoids(t, dim):
    """Turn numbers t (B,) into cosines and sines at dim/2 frequencies, (B, dim)."""
    angles = t[:, None] / torch.logspace(0, 4, dim // 2 + 1, device=t.device)[:-1]
    return torch.cat([angles.cos(), angles.sin()], 1)


def sincos_positions(side, dim):
    """Return fixed positions (side², dim): half of the numbers for each axis."""
    line = sinusoids(torch.arange(side), dim // 2).roll(dim // 4, 1)  # sines first
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1)


class Diffusion:
    """The chain x_0, ..., x_T of latents x (B, C, H, W), with steps of any length.

    model(x_t, t, y) returns ε̂, its estimate of the noise, and v, for the variance (see
    the second lesson; not v-prediction). A network that predicts something else needs a
    wrapper that returns ε̂ and v, and has num_classes; `loss` weighs errors as those of
    ε̂, so change it, too. The tables (T + 1, 1, 1, 1) are indexed by t in 1..T. Latents
    have no bounds; for pixels, clamp x̂_0 in `step`.
    """

    def __init__(self, T=1000, device="cpu"):
        assert T > 20, "β_T = 20 / T must be below 1"
        beta = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)
        bar = torch.cumprod(1 - F.pad(beta, (1, 0)), 0).view(-1, 1, 1, 1)  # ᾱ_0 = 1
        self.T = T
        self.signal = bar.sqrt().float().to(device)  # x_t = signal x_0 + noise ε
        self.noise = (1 - bar).sqrt().float().to(device)
        self.least = float(beta[1] * beta[0] / (1 - bar[2]))  # β̃_2; beta[0] is β_1

    def posterior(self, eps, x_t, t, s):
        """Return the mean and variance of q(x_s | x_t, x_0), and β of q(x_t | x_s).

        s < t are numbers, or one for each image (B,). ε is the noise in x_t, so it
        gives x_0. For ε̂, the mean is that of p_θ(x_s | x_t), as in Algorithm 2 of DDPM
        (Ho, Jain, Abbeel, arXiv:2006.11239; eq. 7 and 11).
        """
        kept = self.signal[t] / self.signal[s]  # √α_t if s = t - 1
        beta = self.noise[t] ** 2 - (kept * self.noise[s]) ** 2  # 1 - ᾱ_t / ᾱ_s
        mean = (x_t - beta / self.noise[t] * eps) / kept
        beta_tilde = beta * (self.noise[s] / self.noise[t]) ** 2
        return mean, beta_tilde.clamp(min=self.least), beta  # β̃_1 = 0 has no log

    def loss(self, model, x0, y, t):
        """Return L_simple and, in nats, the loss of the variance (second lesson).

        Flow matching, with τ = t / T as (B, 1, 1, 1), has x_t = (1 - τ) x_0 + τ ε here,
        the target ε - x_0 and the bound torch.zeros(()). `step` then returns
        x_t - (t - s) / T ε̂, where ε̂ is now a velocity.
        """
        eps = torch.randn_like(x0)
        x_t = self.signal[t] * x0 + self.noise[t] * eps
        eps_hat, v = model(x_t, t, y)
        simple = F.mse_loss(eps_hat, eps)  # mean of (ε - ε̂)², DDPM eq. 14
        return simple, variance_loss(self, eps, eps_hat.detach(), v, x_t, t)

    def step(self, eps_hat, v, x_t, t, s):
        """Draw x_s from p_θ(x_s | x_t), as in Algorithm 2 of DDPM.

        DDIM would use the guess of the image, x̂_0 = (x_t - noise[t] ε̂) / signal[t].
        After a clamp of x̂_0, ε̂ = (x_t - signal[t] x̂_0) / noise[t].
        """
        mean, beta_tilde, beta = self.posterior(eps_hat, x_t, t, s)
        if s == 0:
            return mean
        variance = learned_variance(v, beta_tilde, beta)
        return mean + variance.sqrt() * torch.randn_like(x_t)

    @torch.no_grad()
    def sample(self, model, x, y, guidance, steps):
        """Turn noise x_T (B, C, H, W) into latents x_0 of the classes y (B,)."""
        times = [*range(self.T, 0, -math.ceil(self.T / steps)), 0]
        for t, s in zip(times, times[1:]):  # from x_t to x_s
            eps_hat, v = guided(model, x, t, y, guidance)
            x = self.step(eps_hat, v, x, t, s)
        return x


def guided(model, x, t, y, guidance):
    """Go from ε̂ without a class to ε̂ for y, and beyond if guidance is above 1.

    Ho, Salimans: Classifier-Free Diffusion Guidance, arXiv:2207.12598, eq. 6, with
    g = 1 + w. DiT's `forward_with_cfg` does this for three of its four channels only.
    """
    t = torch.full_like(y, t)
    eps, v = model(x, t, y)
    null_eps, _ = model(x, t, torch.full_like(y, model.num_classes))
    return null_eps + guidance * (eps - null_eps), v


# ---- Training ------------------------------------------------------------------------
def to_float(images):
    """Turn uint8 images (B, H, W) into pixels in [-1, 1], (B, 1, H, W)."""
    assert images.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    return images[:, None].float() / 127.5 - 1


def train(args, diffusion, model, latents, labels, history):
    """Minimize L_simple + L_{t-1} on latents (N, C, H, W) with int64 labels (N,).

    The paper uses AdamW with a constant rate, and averages the weights.
    """
    assert labels.max() < model.num_classes  # this index means: no class
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    steps = args.epochs * math.ceil(len(latents) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(len(latents), device=latents.device)
        for batch in shuffled.split(args.batch_size):
            x0, y = latents[batch], labels[batch]
            no_class = torch.rand(len(y), device=y.device) < 0.1
            y = y.masked_fill(no_class, model.num_classes)
            t = torch.randint_like(y, 1, diffusion.T + 1)
            simple, bound = diffusion.loss(model, x0, y, t)
            loss = simple + bound
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(simple.detach())
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


# ---- The latent space ----------------------------------------------------------------
class Autoencoder(nn.Module):
    """A VAE: images (B, 1, 28, 28) in [-1, 1] <-> latents z (B, 2, 8, 8).

    Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models,
    arXiv:2112.10752, section 3.1.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=3),  # 16x16
            nn.SiLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1),  # 8x8
            nn.SiLU(),
            nn.Conv2d(32, 4, 1),  # mean and log-variance
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2, 32, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),  # 16x16
            nn.SiLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=3),  # 28x28
        )

    @torch.no_grad()
    def encode(self, images):
        """Turn uint8 images (N, 28, 28) into latents, the means (N, 2, 8, 8)."""
        return torch.cat([self.encoder(to_float(x))[:, :2] for x in images.split(1000)])

    @torch.no_grad()
    def decode(self, z):
        """Turn latents (B, 2, 8, 8) into pixels (B, 1, 28, 28), about in [0, 1]."""
        return (self.decoder(z) + 1) / 2


def train_autoencoder(autoencoder, images):
    """Minimize ‖x - x̂‖² + KL / 10; Rombach et al. add a perceptual and a GAN loss."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), 2e-3, fused=True)
    for epoch in range(2):
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(64):
            x = to_float(images[batch])
            mu, logvar = autoencoder.encoder(x).chunk(2, 1)
            z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
            error = (x - autoencoder.decoder(z)).square().sum()
            kl = gaussian_kl(mu, logvar.exp(), 0, 1).sum()
            loss = (error + 0.1 * kl) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"autoencoder: loss {loss.item():.1f}")


# ---- Second lesson: the learned variance (you can skip it) ---------------------------
# The right variance of p_θ(x_s | x_t) is between β̃ and β. With a thousand steps these
# are mostly close; with fifty they are not. So the network chooses, on a logarithmic
# scale, and a term of the bound, L_{t-1}, trains its choice. The gradient does not
# reach ε̂, but it does reach the Transformer, which both outputs share. Nichol,
# Dhariwal: Improved Denoising Diffusion Probabilistic Models (IDDPM), arXiv:2102.09672.
def learned_variance(v, beta_tilde, beta):
    """Go from β̃ to β by the network's second output, in log σ² (IDDPM eq. 15)."""
    v = (v + 1) / 2  # as in DiT's code, -1 means β̃ and 1 means β
    return (v * beta.log() + (1 - v) * beta_tilde.log()).exp()


def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) of each number, in nats."""
    ratio = variance1 / variance2
    return 0.5 * (ratio - 1 - ratio.log() + (mean1 - mean2) ** 2 / variance2)


def variance_loss(diffusion, eps, eps_hat, v, x_t, t):
    """Return the mean of L_{t-1}, and at t = 1 of L_0, in nats per number.

    L_0 uses a density and can be negative (IDDPM eq. 16, with λ = 1 / T).
    """
    true_mean, beta_tilde, beta = diffusion.posterior(eps, x_t, t, t - 1)
    mean, _, _ = diffusion.posterior(eps_hat, x_t, t, t - 1)
    variance = learned_variance(v, beta_tilde, beta)
    kl = gaussian_kl(true_mean, beta_tilde, mean, variance)
    # L_0 = -log p_θ(x_0 | x_1); and at t = 1, true_mean is x_0.
    nll = 0.5 * ((2 * math.pi * variance).log() + (true_mean - mean) ** 2 / variance)
    return torch.where(t.view(-1, 1, 1, 1) == 1, nll, kl).mean()


# ---- Third lesson: the three designs that lost (you can skip it) ---------------------
# Section 3.2 of the DiT paper compares four ways to give a block t and y. Here all four
# keep the last layer of adaLN-Zero, and the last two leave their adaLN weights idle.
class AdaLNBlock(DiTBlock):
    """adaLN: no gates, so a block does not start as the identity."""

    def forward(self, x, t, y):
        c = t + y
        shift1, scale1, _, shift2, scale2, _ = self.adaLN_modulation(c).chunk(6, 2)
        x = x + self.attn(modulate(x, shift1, scale1))
        return x + self.mlp(modulate(x, shift2, scale2))


class InContextBlock(DiTBlock):
    """In-context: t and y are two more tokens.

    In the paper these pass through all blocks; here each block gets fresh ones.
    """

    def forward(self, x, t, y):
        x = torch.cat([x, t, y], 1)
        x = x + self.attn(modulate(x))
        x = x + self.mlp(modulate(x))
        return x[:, :-2]


class CrossAttentionBlock(DiTBlock):
    """Cross-attention: tokens look at t and y in an extra attention."""

    def __init__(self, dim, num_heads):
        super().__init__(dim, num_heads)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x, t, y):
        x = x + self.attn(modulate(x))
        c = torch.cat([t, y], 1)  # (B, 2, D)
        out, _ = self.cross_attn(modulate(x), c, c)  # queries, keys, values
        x = x + out
        return x + self.mlp(modulate(x))


BLOCKS = {
    "adaln-zero": DiTBlock,
    "adaln": AdaLNBlock,
    "in-context": InContextBlock,
    "cross": CrossAttentionBlock,
}


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels, source = load_data(args)
    diffusion = Diffusion(device=args.device)
    autoencoder = Autoencoder()
    dit = DiT(patch_size=args.patch_size, block=BLOCKS[args.block])
    model = nn.ModuleDict({"autoencoder": autoencoder, "dit": dit}).to(args.device)
    load_weights(args, model)
    torch.manual_seed(args.seed)  # the same autoencoder for any DiT
    if not args.load:
        train_autoencoder(autoencoder, images)  # Ctrl-C here ends the script
    history = []
    torch.manual_seed(args.seed)
    try:
        latents = autoencoder.encode(images)
        train(args, diffusion, dit, latents, labels.long(), history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    model.eval()
    x0, y = autoencoder.encode(test_images[:1000]), test_labels[:1000].long()
    t = torch.arange(len(x0), device=args.device) % diffusion.T + 1  # at many times
    with torch.no_grad():
        simple, bound = diffusion.loss(dit, x0, y, t)
    y = torch.arange(args.samples, device=args.device) % dit.num_classes
    x_T = torch.randn(len(y), 2, 8, 8, device=args.device)
    z = diffusion.sample(dit, x_T, y, args.guidance, args.steps)
    samples = autoencoder.decode(z)
    pixels = (samples[:, 0].clamp(0, 1) * 255).round().byte().cpu()
    np.savez_compressed(f"{args.out}/samples.npz", images=pixels, labels=y.cpu())
    save_metrics(
        args,
        results={
            "L_simple (untrained: 1)": simple.item(),
            "L_{t-1} in nats": bound.item(),
        },
        history=history,
        data=source,
    )
    rows = []
    for g in (0, 1, 2, 4, 8):
        torch.manual_seed(args.seed)  # the same noise for each row
        rows.append(diffusion.sample(dit, x_T[:10], y[:10], g, args.steps))
    z = x0[:10]
    channels = F.interpolate(z, 28) / 6 + 0.5  # shows -3 to 3 as 0 to 1
    first = [test_images[:10, None] / 255, *channels.split(1, 1), autoencoder.decode(z)]
    grids = {
        "images, their latents, reconstructions": torch.cat(first),
        "rows: guidance 0, 1, 2, 4, 8": autoencoder.decode(torch.cat(rows)),
        f"samples by class, guidance {args.guidance:g}": samples[:100],
    }
    plt.figure(figsize=(11, 6), layout="constrained")
    for place, title in zip((221, 223, 122), grids):
        plt.subplot(place)
        show_grid(grids[title], 10, title)
    plt.savefig(f"{args.out}/results.png")


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
