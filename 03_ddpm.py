"""Denoising diffusion (DDPM, arXiv:2006.11239): noise an image step by step, learn the way back.

A chain without parameters turns an image x_0 into noise x_T; a network learns to undo each step.

    q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)                       one step, text §8.2
    q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I),  ᾱ_t = Π_{s≤t} (1-β_s)       t steps at once, text §8.4
    q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I)                             the true way back, eq. 5.28
    p_θ(x_{t-1} | x_t) = N(μ_θ(x_t, t), σ_t² I)           the learned one, ex. 5.4 (§8.2.2: σ_t = 1)
    -log p_θ(x_0) ≤ L_T + Σ_{t=2..T} L_{t-1} + L_0                      the bound, eq. 5.27
    L_{t-1} = E ‖μ̃_t - μ_θ‖² / 2σ_t² + const                            ex. 5.4
            = w_t E ‖ε - ε_θ(x_t, t)‖² + const                          w_t: ex. 5.6
    L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²                   without w_t, eq. 5.36

Training weights L_simple by 1/ᾱ_t, which makes it the squared error of the v that `UNet` computes,
and draws t by `draw_t`: the same minimum.
Everywhere t runs from 1 to T and ᾱ_0 = 1; pixels are in [-1, 1]. Equations 5.x and exercises (ex.)
are those of the book's chapter 5, sections (§) those of the text on diffusion theory.

Run     python 03_ddpm.py    (--quick: the whole path in seconds; --help: every setting)
Expect  on two CPU cores first digits after 1 minute and the end after 8; eight pictures, samples
        and weights in out/03_ddpm. L_simple on test images falls to 0.023 (always answering 0
        scores 1), the bound (of 16 images) to 2.2 bits/dim (8 for uniform pixels). 1,000 samples,
        judged by a classifier that is right on 99.7% of real test images:
                                      over 95% sure   rarest class   Fréchet distance
        this file, 50 steps                83%            6.8%               73
        the same with --eta 0              72%            8.8%              125
        the book's VAE, 30 epochs          64%            1.4%              885
        1,000 real test images             98%            7.7%               12
        Real MNIST, seed 0, two cores of an AMD EPYC, 2026-11-22. The network and loop of the book,
        rebuilt, took 14 minutes for one of ten epochs in an hour in which this file took 11: a
        fifth of the images a second. A second 1,000 samples of this file: 85%, 7.0%, 60.
Try     easy: --epochs 0 --load out/03_ddpm/model.pt with --eta 0, --eta 3, --steps 10.
        medium: t drawn uniformly, `u = torch.rand(count)` in `draw_t`.
        harder: L_simple itself, `loss = simple.mean()` in `train`. Which terms of the bound suffer?
"""

import copy
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Beta, Normal

@dataclass
class Config:
    """Settings. Each is a flag; its comment is the help, a bracket at the end what is allowed."""
    data: str = ""  # folder of the four MNIST files, or "drawn"; else $MNIST_DIR, else data/mnist
    out: str = "out"  # folder for pictures, metrics, weights and samples
    device: str = "auto"  # where to compute [auto|cuda|mps|cpu]
    seed: int = 0  # of weights, noise and order [0..4294967295]
    epochs: int = 3  # passes over the training images [0..100000]
    batch_size: int = 32  # images a step; many small steps beat few large ones here [1..60000]
    lr: float = 2e-3  # learning rate: a short warm-up times a cosine down to 0 [0..1]
    train_size: int = 0  # training images to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate, draw and sample
    quick: bool = False  # the whole path in seconds, on a few hundred images
    T: int = 1000  # steps of the chain [25..10000]
    width: int = 16  # channels at 28x28; 2x at 14x14, 4x at 7x7 [8|16|24|32|48|64]
    samples: int = 100  # images for samples.npz [0..100000]
    steps: int = 50  # network calls a sample; fewer than T skip along the chain [1..10000]
    sampler: str = "ddim"  # ddpm draws from p(x_s | x_t), ddim as --eta says [ddpm|ddim]
    eta: float = 1.9  # fresh noise of ddim: 0 none, 1 that of the chain, more mends errors [0..100]
    bound_images: int = 16  # test images on which all T terms of the bound are computed [1..10000]

PRESETS = dict(quick=dict(train_size=512, epochs=1, T=100, samples=16, steps=10, bound_images=2))
SHAPES = ("T", "width")  # the settings that a checkpoint has to share
PIXELS = (-1, 1)  # black and white, in the range that noise N(0, I) goes with

# ---- The forward chain, its posterior, and the bound ---------------------------------------------

class Diffusion:
    """The chain q, the model p built on a network for ε, and the bound between them.
    `model(x_t, t)` is any function from (B, ...) and t (B,) to an estimate of ε (B, ...).
    `alpha_bars[t]` is ᾱ_t for t = 0..T, `betas[t]` is β_t for t = 1..T (β_0 = 0 is a filler), both
    float64 on the CPU; factors made of them are rounded once, to the precision of the images."""

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02):
        self.T = T
        self.betas = F.pad(torch.linspace(beta_start, beta_end, T, dtype=torch.float64), (1, 0))
        self.alpha_bars = torch.cumprod(1 - self.betas, 0)  # ᾱ_0 = 1

    def bar(self, t, x):
        """ᾱ_t for t (B,), of shape (B, 1, ..., 1) to go with x (B, ...)."""
        return self.alpha_bars[t.cpu()].view(-1, *[1] * (x.dim() - 1))

    def q_step(self, x, t, noise):
        """One step x_{t-1} -> x_t of the chain (text §8.2.1); t (B,)."""
        alpha = self.bar(t, x) / self.bar(t - 1, x)  # 1 - β_t
        return alpha.sqrt().to(x) * x + (1 - alpha).sqrt().to(x) * noise

    def q_sample(self, x0, t, noise):
        """All t steps at once, x_0 -> x_t (text §8.4.3, eq. 5.25); t (B,)."""
        bar = self.bar(t, x0)
        return bar.sqrt().to(x0) * x0 + (1 - bar).sqrt().to(x0) * noise

    def q_posterior(self, x0, x_t, t, s=None):
        """Mean (B, ...) and variance (B, 1, ...) of q(x_s | x_t, x_0), by Bayes' rule (eq. 5.28).
        s < t is t-1 by default, an earlier step when sampling skips; at s = 0 the variance is 0."""
        bar_t, bar_s = self.bar(t, x0), self.bar(t - 1 if s is None else s, x0)
        alpha = bar_t / bar_s  # 1 - β_t when s = t-1
        on_x0 = bar_s.sqrt() * (1 - alpha) / (1 - bar_t)
        on_xt = alpha.sqrt() * (1 - bar_s) / (1 - bar_t)
        variance = (1 - alpha) * (1 - bar_s) / (1 - bar_t)  # β̃_t
        return on_x0.to(x0) * x0 + on_xt.to(x0) * x_t, variance.to(x0)

    def predict_x0(self, x_t, t, eps):
        """The x_0 from which this noise leads to x_t: q_sample solved for x_0."""
        bar = self.bar(t, x_t)
        return (1 / bar.sqrt()).to(x_t) * x_t - (1 / bar - 1).sqrt().to(x_t) * eps

    def p_mean_variance(self, model, x_t, t, s=None, sigma="beta", clip=True):
        """Mean, variance of p_θ(x_s | x_t) and x̂_0 behind them (eq. 5.32 where it is not clipped).
        σ² = β_t ("beta") is right for data of unit variance, β̃_t ("tilde") for a single known
        image; the truth lies between. `clip` keeps x̂_0 in the range of pixels, [-1, 1]."""
        x0 = self.predict_x0(x_t, t, model(x_t, t))
        x0 = x0.clamp(-1, 1) if clip else x0
        mean, variance = self.q_posterior(x0, x_t, t, s)
        if sigma == "beta":
            beta = 1 - self.bar(t, x_t) / self.bar(t - 1 if s is None else s, x_t)
            variance = beta.to(x_t)
        return mean, variance, x0

    def simple_loss(self, model, x0, t, noise):
        """L_simple per image (B,): squared error of ε, mean over pixels (eq. 5.36)."""
        return (model(self.q_sample(x0, t, noise), t) - noise).square().flatten(1).mean(1)

    def dropped_weight(self, t):
        """The factor of E ‖ε - ε_θ‖² in L_{t-1} that L_simple drops, for σ_t² = β_t (ex. 5.6)."""
        beta, bar = self.betas[t], self.alpha_bars[t]
        return beta / (2 * (1 - beta) * (1 - bar))  # β_t² / (2 σ_t² α_t (1-ᾱ_t))

    @torch.no_grad()
    def vlb(self, model, x0):
        """The whole bound on -log p_θ(x_0), in bits/dim, for σ_t² = β_t (eq. 5.27; text §8.3), of
        8-bit images in [-1, 1]. Returns L_T (B,); terms (B, T), L_{t-1} in column t-1 and so L_0 in
        column 0, each at an x_t of its own instead of along one chain (text §8.4); and the
        approximation of L_0 (B,) in ex. 5.5. The model is the one that samples: x̂_0 is clipped."""
        bits = 1 / (x0[0].numel() * math.log(2))  # nats of an image -> bits/dim
        bar, terms = self.alpha_bars[-1].item(), []
        L_T = 0.5 * (bar * x0.square() - bar - math.log1p(-bar)).flatten(1).sum(1)  # KL to N(0, I)
        for t in torch.arange(1, self.T + 1)[:, None].expand(-1, len(x0)):  # (T, B)
            x_t = self.q_sample(x0, t, torch.randn_like(x0))
            mean, variance, _ = self.p_mean_variance(model, x_t, t)
            if t[0] == 1:
                nats = -discretized_log_likelihood(x0, mean, variance.sqrt())  # eq. 5.34
                near = (x0 - mean).square() / (2 * variance) + (  # ex. 5.5, with its constant
                    0.5 * torch.log(2 * math.pi * variance) - math.log(2 / 255))
            else:
                nats = gaussian_kl(*self.q_posterior(x0, x_t, t), mean, variance)  # ex. 5.4
            terms.append(nats.flatten(1).sum(1))
        return L_T * bits, torch.stack(terms, 1) * bits, near.flatten(1).sum(1) * bits

    @torch.no_grad()
    def sample(self, model, x, steps=None, sampler="ddpm", sigma="beta", eta=1.0,
               watch=lambda t, x_t, x0: None):
        """From noise x = x_T (B, ...) back to x_0 (B, ...) in `steps` network calls (T by default).
        "ddpm" draws from p_θ(x_s | x_t). "ddim" draws noise of variance η² β̃ and fills up with the
        noise it sees in x_t (arXiv:2010.02502 eq. 12, 16); η = 1 is "ddpm" with σ² = β̃. The last
        step draws none. `watch(t, x_t, x̂_0)` sees every step."""
        times = torch.linspace(self.T, 0, min(steps or self.T, self.T) + 1).round().long()
        times = times[:, None].expand(-1, len(x))  # (steps + 1, B)
        for t, s in zip(times, times[1:]):
            mean, variance, x0 = self.p_mean_variance(model, x, t, s, sigma)
            watch(t[0].item(), x, x0)
            if sampler == "ddim":
                bar_t, bar_s = self.bar(t, x), self.bar(s, x)
                room = (1 - bar_s).to(x)  # all the noise there may be in x_s
                variance = (eta ** 2 * self.q_posterior(x0, x, t, s)[1]).minimum(room)  # eq. 16
                eps = (x - bar_t.sqrt().to(x) * x0) / (1 - bar_t).sqrt().to(x)
                mean = bar_s.sqrt().to(x) * x0 + (room - variance).sqrt() * eps  # eq. 12
            x = mean + variance.sqrt() * torch.randn_like(x) if s[0] > 0 else mean
        return x

def gaussian_kl(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) per element, in nats."""
    ratio = variance1 / variance2
    return 0.5 * (ratio - 1 - torch.log(ratio) + (mean1 - mean2).square() / variance2)

def discretized_log_likelihood(x0, mean, std):
    """log of the mass N(mean, std²) has on the bin of an 8-bit pixel, in nats (eq. 5.34, 5.35).
    x0 holds k/127.5 - 1 for k = 0..255; bins are 2/255 wide, the outermost reach to infinity."""
    lower = torch.where(x0 < -0.999, -math.inf, (x0 - 1 / 255 - mean) / std)
    upper = torch.where(x0 > 0.999, math.inf, (x0 + 1 / 255 - mean) / std)
    flip = lower + upper > 0  # into the left tail, where the logarithms keep their digits
    edges = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    low, high = (torch.special.log_ndtr(e.cpu()).to(e) for e in edges)  # not on every device
    return high + torch.log(-torch.expm1(low - high))

def transition_density(r, x, t, z):
    """u(r, x; t, z): density at z, time t, of the chain's limit T -> ∞ started from x at time r.
    The limit is dX = -β(t) X/2 dt + √β(t) dW with, only here, times t/T in [0, 1] and T β_t =
    β(t) = 0.1 + 19.9 t (ex. 5.3; not for training)."""
    integral = (t - r) * (0.1 + 19.9 * (t + r) / 2)  # ∫ β from r to t
    return Normal(x * torch.exp(-integral / 2), (-torch.expm1(-integral)).sqrt()).log_prob(z).exp()

def backward_residual(r, x, t, z):
    """∂u/∂r + b ∂u/∂x + (a/2) ∂²u/∂x² with b = -β x/2 and a = β: 0 by Kolmogorov (ex. 5.3)."""
    r, x = r.detach().requires_grad_(), x.detach().requires_grad_()
    u = transition_density(r, x, t, z)
    u_r, u_x = torch.autograd.grad(u.sum(), (r, x), create_graph=True)
    u_xx = torch.autograd.grad(u_x.sum(), x)[0]
    beta = 0.1 + 19.9 * r
    return u_r - beta * x / 2 * u_x + beta / 2 * u_xx

# ---- The network ---------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """t (B,) in 1..T -> (B, D): sines and cosines at the same frequencies, then a small MLP."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("omega", torch.logspace(0, -4, 32), persistent=False)  # 1 to 1/10,000
        self.mlp = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angle = t[:, None] * self.omega  # (B,) -> (B, 32)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], 1))  # (B, 64) -> (B, D)

class ResidualBlock(nn.Module):
    """x (B, C, H, W) plus two convolutions of it; the time scales and shifts what is between."""

    def __init__(self, c_in, c_out, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(c_in // 8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(c_out // 8, c_out, affine=False)  # the time does that
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the skip and a constant
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)  # (B, 2C) -> 2 x (B, C, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))

class SelfAttention(nn.Module):
    """Every pixel of a (B, C, H, W) map looks at every other: softmax(QKᵀ/√d) V in h heads."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(channels // 8, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, 3C, H, W) -> 3 x (B, h, HW, C/h)
        scores = q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)  # (B, h, HW, HW)
        return x + self.out((scores.softmax(-1) @ v).transpose(-1, -2).reshape(B, C, H, W))

class UNet(nn.Module):
    """ε_θ(x_t, t) for images (B, 1, 28, 28): three resolutions, 28, 14 and 7, with skips across.
    The layers compute v, and ε_θ = √(1-ᾱ_t) x_t + √ᾱ_t v, so that x̂_0 = √ᾱ_t x_t - √(1-ᾱ_t) v
    (arXiv:2202.00512 App. D). With v = 0, where training starts, this is the best linear guess for
    pixels of unit variance, and at t near T an error of v is not divided by √ᾱ_T = 0.006."""

    def __init__(self, alpha_bars, width=16):
        super().__init__()
        channels, time = (width, 2 * width, 4 * width), 8 * width
        self.register_buffer("alpha_bars", alpha_bars.float(), persistent=False)
        self.time = TimeEmbedding(time)
        self.inlet = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(c, c, time) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, 2, 1) for c in channels[:2])
        self.attention = SelfAttention(channels[-1])
        self.middle = nn.ModuleList(ResidualBlock(4 * width, 4 * width, time) for _ in range(2))
        self.up = nn.ModuleList(ResidualBlock(2 * c, c, time) for c in channels)
        self.grow = nn.ModuleList(nn.Conv2d(2 * c, c, 1) for c in channels[:2])
        self.norm, self.outlet = nn.GroupNorm(width // 8, width), nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def forward(self, x, t):
        t = t.to(x.device)
        time, h, skips = F.silu(self.time(t)), self.inlet(x), []  # (B, 8C), (B, C, 28, 28)
        for i in range(3):
            skips.append(self.down[i](h, time))
            h = self.shrink[i](skips[i]) if i < 2 else skips[i]  # -> (B, 2C, 14, 14), (B, 4C, 7, 7)
        h = self.middle[1](self.middle[0](self.attention(h), time), time)
        for i in (2, 1, 0):
            h = self.up[i](torch.cat([h, skips[i]], 1), time)
            h = F.interpolate(self.grow[i - 1](h), scale_factor=2) if i else h
        out = self.outlet(F.silu(self.norm(h)))  # -> (B, 1, 28, 28)
        bar = self.alpha_bars[t].view(-1, 1, 1, 1)
        return (1 - bar).sqrt() * x + bar.sqrt() * out.float()  # autocast gave bfloat16

# ---- Training ------------------------------------------------------------------------------------

@torch.no_grad()
def update_ema(ema, model, k, decay=0.999):
    """Exponential moving average of a model's weights, with warm-up: step k = 1, 2, .. keeps
    min(decay, (1 + k)/(10 + k)) of the old average, so the untrained start is soon forgotten."""
    keep = min(decay, (1 + k) / (10 + k))
    for mean, new in zip(ema.parameters(), model.parameters()):
        mean.lerp_(new, 1 - keep)

def draw_t(count, T):
    """t (count,) in {1..T} from Beta(1.5, 2.3) instead of uniformly: L_simple, weighted again.
    Near T nothing can be seen and near 1 nothing is left to decide: strokes form in between."""
    u = Beta(1.5, 2.3).sample((count,))
    return (u * T).long().clamp(max=T - 1) + 1

def scale(images):
    """uint8 (B, 28, 28) -> (B, 1, 28, 28) in [-1, 1], the range that noise N(0, I) goes with."""
    return images[:, None].float() / 127.5 - 1

def train(run, diffusion, model, images, test_images):
    """Trains on uint8 (N, 28, 28). Returns the averaged model, and samples from along the way."""
    c, ema, snapshots = run.config, copy.deepcopy(model), {}
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, betas=(0.9, 0.99), weight_decay=0)
    noise, test_x0 = torch.randn(10, 1, 28, 28, device=run.device), scale(test_images[:500])
    test_t = torch.arange(len(test_x0)) * c.T // len(test_x0) + 1  # evenly over 1..T
    test_noise = torch.randn_like(test_x0)

    @torch.no_grad()
    def report():
        seen = run.step * min(c.batch_size, len(images))
        snapshots[seen] = diffusion.sample(ema, noise, c.steps, "ddim", eta=0)
        return dict(test=diffusion.simple_loss(ema, test_x0, test_t, test_noise).mean().item())

    for index in run.batches(len(images), report, per_epoch=4):
        x0, t = scale(images[index]), draw_t(len(index), c.T)
        with torch.autocast("cuda", torch.bfloat16, enabled=run.device.type == "cuda"):
            simple = diffusion.simple_loss(model, x0, t, torch.randn_like(x0))
        loss = (simple / diffusion.alpha_bars[t].to(simple)).mean()  # the squared error of v
        run.log(loss=loss, simple=simple.mean())
        warm, done = min(1, (run.step + 1) / 100), run.step / run.steps
        optimizer.param_groups[0]["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, run.step + 1)
    return ema, snapshots

# ---- Figures -------------------------------------------------------------------------------------

def draw_chain(run, diffusion, image, noise):
    """What the chain and noise (T, 1, 1, 28, 28) do to a uint8 image (28, 28); the schedule."""
    T, bar, chain = diffusion.T, diffusion.alpha_bars, [scale(image[None])]
    for t in range(1, T + 1):
        chain.append(diffusion.q_step(chain[-1], torch.tensor([t]), noise[t - 1]))
    shown = [round(T * k / 10) for k in range(11)]
    run.grid("chain", f"{T} small steps turn a digit into noise (text §8.2)",
             torch.cat([chain[t] for t in shown]), 11, (9, 1.7), "t", xticks=shown)
    left, right = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    left.plot(bar.sqrt(), label="√ᾱ_t, what is left of x_0")
    left.plot((1 - bar).sqrt(), "--", label="√(1-ᾱ_t), the noise")
    left.set(xlabel="t", ylabel="factor")
    left.legend()
    right.semilogy(range(1, T + 1), (bar / (1 - bar))[1:])
    right.axhline(1, color="gray", lw=0.8)
    right.set(xlabel="t", ylabel="signal-to-noise ratio ᾱ_t / (1-ᾱ_t)")
    run.figure("schedule", f"ᾱ_0 = 1, ᾱ_{T} = {bar[-1]:.1e}: nothing is left of the image", figure)

@torch.no_grad()
def draw_curves(run, diffusion, model, test_images):
    """The loss over training and by t, the weight that L_simple drops (ex. 5.6), and the terms of
    the bound by t. Returns L_simple and the bound on test images."""
    T, epochs, x0 = diffusion.T, [row["epoch"] for row in run.history], scale(test_images[:1000])
    t = torch.arange(len(x0)) * T // len(x0) + 1
    losses = diffusion.simple_loss(model, x0, t, torch.randn_like(x0)).cpu()
    one, two, three = (figure := Figure((12, 3.5), layout="constrained")).subplots(1, 3)
    one.semilogy(epochs, [row["simple"] for row in run.history], label="training (its own t)")
    one.semilogy(epochs, [row["test"] for row in run.history], "o-", label="test")
    one.set(xlabel="epoch", ylabel="L_simple (1 without a model)")
    one.legend()
    two.loglog(*([part.float().mean() for part in v.chunk(20)] for v in (t, losses)), "o-")
    two.set(xlabel="t", ylabel="L_simple on test images")
    three.loglog(range(1, T + 1), diffusion.dropped_weight(torch.arange(1, T + 1)))
    three.set(xlabel="t", ylabel="w_t, which L_simple drops (ex. 5.6)")
    run.figure("loss", "Noise is hardest to see at small t, where L_simple drops weight", figure)
    x0 = scale(test_images[:run.config.bound_images])
    L_T, terms, near = (v.cpu() for v in diffusion.vlb(model, x0))
    mean, axes = terms.mean(0), (figure := Figure((8, 3.5), layout="constrained")).subplots()
    axes.loglog(range(2, T + 1), mean[1:], label="L_{t-1}, t = 2..T")
    axes.plot(1, mean[0], "o", label=f"L_0 = {mean[0]:.3f} (ex. 5.5: {near.mean():.3f})")
    axes.plot(T, L_T.mean(), "s", label=f"L_T = {L_T.mean():.1e}")
    axes.set(xlabel="t", ylabel="bits/dim")
    axes.legend()
    bound = (L_T + terms.sum(1)).mean().item()
    run.figure("bound", f"The bound of {len(x0)} test images: {bound:.2f} bits/dim (at first 8)",
               figure)
    return losses.mean().item(), bound

def draw_samples(run, diffusion, model, snapshots):
    """Samples over training, the reverse chain and its x̂_0, one noise under 5 to T steps."""
    c, T, films = run.config, diffusion.T, []
    if snapshots:
        run.grid("training", "From ten fixed x_T, digits appear as the network learns",
                 torch.cat([*snapshots.values()]), 10, (8, 0.5 * len(snapshots) + 0.8),
                 ylabel="training images seen", yticks=snapshots)
    noise = torch.randn(10, 1, 28, 28, device=run.device)
    diffusion.sample(model, noise[:3], watch=lambda *step: films.append(step))
    films = [films[round(k * (T - 1) / 10)] for k in range(11)]
    frames = torch.stack([torch.stack(film[1:], 1) for film in films], 2)  # (3, 2, 11, 1, 28, 28)
    run.grid("reverse", "Backward: the guess x̂_0 begins as a blur and then decides",
             frames.flatten(0, 2), 11, (9, 5.4), "t", xticks=[t for t, *_ in films],
             yticks=["x_t", "x̂_0"] * 3)
    steps = [n for n in (5, 10, 25, 50) if n < T] + [T]
    images = torch.cat([diffusion.sample(model, noise, n, "ddim", eta=0) for n in steps])
    run.grid("steps", "DDIM, η = 0: ten fixed x_T and the number of steps", images, 10, (7, 3.6),
             ylabel="steps", yticks=steps)
    if c.samples:
        images = torch.cat([diffusion.sample(model, x.to(run.device), c.steps, c.sampler, eta=c.eta)
                            for x in torch.randn(c.samples, 1, 28, 28).split(250)])
        shown = min(c.samples // 10 * 10 or c.samples, 100)
        run.grid("samples", f"Samples ({c.sampler}, {c.steps} steps)", images[:shown],
                 min(shown, 10), (6, 6.3))
        run.samples(images)

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
    images, _, test_images, _ = run.data()
    diffusion = Diffusion(c.T, 0.1 / c.T, 20 / c.T)  # the book's β at T = 1000
    model = UNet(diffusion.alpha_bars, c.width).to(run.device)
    run.load(model)
    noise = torch.randn(c.T, 1, 1, 28, 28)
    model, snapshots = train(run, diffusion, model, images, test_images)
    run.save(model)
    draw_chain(run, diffusion, test_images[0].cpu(), noise)
    loss, bound = draw_curves(run, diffusion, model, test_images)
    draw_samples(run, diffusion, model, snapshots)
    r, x, z = torch.rand(3, 100, dtype=torch.float64)  # ex. 5.3 at a hundred places
    residual = backward_residual(0.9 * r, x, 0.9 * r + 0.1, z)
    print(f"L_simple on test images {loss:.4f} (without a model 1), bound {bound:.2f} bits/dim "
          f"(8), backward equation off by {residual.abs().max():.0e} (0)")
    return run.finish(test_loss=loss, test_loss_chance=1.0, bound_bits_per_dim=bound)

if __name__ == "__main__":
    launch(main)
