"""The Diffusion Transformer (DiT, arXiv:2212.09748): diffusion in a latent space, by patches.

    latents      z = scale · E(x) (C, 8, 8): an autoencoder takes the detail, diffusion the meaning
    tokens       z_t cut into patches of 2x2, one linear map, fixed 2-D positions          §3.2
    condition    c = embedding of t + embedding of the class; now and then the null class ∅
    adaLN-Zero   x + α(c) · MSA(γ(c) · LN(x) + δ(c)), then the same with an MLP; α = 0 at first
    objective    ‖v̂ - v‖², v = √ᾱ ε - √(1-ᾱ) z, middle t more often; paper: ‖ε̂ - ε‖²       §3.1
    learned Σ    log σ² between log β̃ and log β, its place learned by the bound            §3.1
    guidance     ε(∅) + s · (ε(y) - ε(∅)), y the class; s > 1 trades variety for clarity   §3.1

Sections (§) are those of the paper, eq. 5.x those of the book's chapter 5. Everywhere t runs from 1
to T and ᾱ_0 = 1. Parameters have the names of facebookresearch/DiT, so published weights load:

    code = importlib.import_module("05_dit")
    dit = code.named("XL", 2, input_size=32, num_classes=1000).eval()
    dit.load_state_dict(torch.load("DiT-XL-2-256x256.pt"), strict=True)
    chain, y = code.Diffusion(predict="eps", first=0), torch.tensor([207, 360])
    z = chain.sample(dit, torch.randn(2, 4, 32, 32), y, scale=4.0, steps=250)  # to be decoded

Run     python 05_dit.py    (--quick: the whole path in seconds; --help: every setting)
        torchrun --nproc-per-node=2 05_dit.py    (as many processes as there are GPUs)
Expect  on two CPU cores 7 minutes, the first for the autoencoder (Ctrl-C in it ends all); six
        pictures, samples and weights in out/05_dit. L_simple on test latents, t evenly over 1..T,
        falls to 0.094 (1 for ε = 0, 0.28 untrained). 1,000 samples, judged by a classifier that is
        right on 99.7% of real images:
                          class asked for   over 95% sure   Fréchet distance   within a class
          s = 1                91.4%            88.6%             77                26.1
          s = 2 (default)      99.8%            99.6%             46                21.1
          s = 4               100.0%           100.0%            101                19.6
          real test images     99.7%            98.3%              0                28.0
          decoded latents      98.8%            96.1%             27                26.1
        (within a class: mean distance, the variety). --compare, one epoch in 9 minutes: L_simple
        0.131 for adaln-zero, 0.134 for in-context and adaln, 0.135 for cross-attention: adaLN-Zero
        is ahead, as in the paper, in this one run. Real MNIST, seed 0, two cores of an AMD EPYC,
        2026-11-22.
Try     easy: --epochs 0 --load out/05_dit/model.pt --scale 4 (or --sampler ddim --steps 10).
        medium: --patch-size 4, then 1. In 240 CPU seconds 4, 16 and 64 tokens got to 100, 98 and
        16% of the class asked for; what do they get to in as many epochs? Then --space pixel.
        harder: no guidance while all is noise, `if scale == 1 or t[0] > 700:` in `guided`.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

@dataclass
class Config:
    """Settings. Each is a flag; its comment is the help, a bracket at the end what is allowed."""
    data: str = ""  # folder of the four MNIST files, or "drawn"; else $MNIST_DIR, else data/mnist
    out: str = "out"  # folder for pictures, metrics and weights
    device: str = "auto"  # where to compute [auto|cuda|mps|cpu]
    seed: int = 0  # of weights, noise and order [0..4294967295]
    epochs: int = 5  # passes over the training images [0..100000]
    batch_size: int = 128  # images a step, of all processes together [1..60000]
    lr: float = 2e-3  # learning rate: a short warm-up times a cosine down to 0 [0..1]
    train_size: int = 0  # training images to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate and draw
    quick: bool = False  # the whole path in seconds, on a few hundred images
    compare: bool = False  # trains the four block designs side by side, for fewer epochs
    space: str = "latent"  # where diffusion runs [latent|pixel]
    channels: int = 2  # C of a latent [1|2|3|4|8]
    kl_weight: float = 0.5  # of the KL beside ‖x - x̂‖²: an ELBO of σ² = kl_weight/2 [0..1000]
    ae_epochs: int = 2  # passes of the autoencoder [1..1000]
    size: str = "mini"  # width, blocks, heads: those of SIZES [mini|S|B|L|XL]
    patch_size: int = 2  # side of a patch, 4 is enough for pixels [1|2|4]
    block: str = "adaln-zero"  # design [in-context|cross-attention|adaln|adaln-zero]
    drop: float = 0.1  # share of labels dropped in training, for guidance [0..0.9]
    T: int = 1000  # steps of the chain [25..4000]
    scale: float = 2.0  # s of guidance; 1 none, 0 no class [0..20]
    steps: int = 50  # of sampling [1..4000]
    sampler: str = "ddpm"  # with the learned variance, or ddim as --eta says [ddpm|ddim]
    eta: float = 0.0  # fresh noise of ddim [0..1]
    samples: int = 100  # images for samples.npz, as many of each class [10..100000]

PRESETS = dict(compare=dict(epochs=1), quick=dict(
    train_size=256, epochs=1, batch_size=32, ae_epochs=4, T=50, samples=20, steps=5))
SHAPES = ("compare", "space", "channels", "size", "patch_size", "block", "drop", "T")
PIXELS = (-1, 1)  # black and white

# ---- A latent space ------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """Images (B, 1, 28, 28) in [-1, 1] <-> latents (B, C, 8, 8), kept near N(0, I) by a KL as in
    latent diffusion (LDM, arXiv:2112.10752 §3.1), but far more strongly."""

    def __init__(self, channels):
        super().__init__()
        self.encoder = nn.Sequential(  # to mean and log variance of q(z | x)
            nn.Conv2d(1, 16, 4, 2, 3), nn.SiLU(),  # 28 -> 16, zeros (gray) around
            nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU(),  # 16 -> 8
            nn.Conv2d(32, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 2 * channels, 1))
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.SiLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(),  # 8 -> 16
            nn.ConvTranspose2d(16, 16, 4, 2, 3), nn.SiLU(), nn.Conv2d(16, 1, 3, 1, 1))  # -> 28
        self.register_buffer("scale", torch.ones(()))  # brings latents to unit variance

    def loss(self, x):
        """Squared error, summed over pixels, and KL to N(0, I) in nats, per image (B,)."""
        mu, logvar = self.encoder(x).chunk(2, 1)
        error = (self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu)) - x).square()
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
        return error.flatten(1).sum(1), kl.flatten(1).sum(1)

    @torch.no_grad()
    def encode(self, x):  # to the mean of q(z | x), in portions
        return torch.cat([self.encoder(some).chunk(2, 1)[0] for some in x.split(1000)]) * self.scale

    def decode(self, z):
        return self.decoder(z / self.scale)

class Pixels(nn.Identity):
    """--space pixel: no autoencoder, images are their own latents."""
    encode = decode = nn.Identity.forward

# ---- The Diffusion Transformer -------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): one linear map on every PxP patch, row by row."""

    def __init__(self, patch_size, channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # -> (B, D, H/P, W/P) -> (B, N, D)

class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): cosines and sines at 128 frequencies from 1 to 1/10,000, then an MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        omega = torch.exp(-math.log(10000) * (torch.arange(128) / 128))
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t):
        angle = t[:, None].float() * self.omega
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))

class LabelEmbedder(nn.Module):
    """Labels (B,) -> (B, D). Where `drop` (B,) is true the null class stands in their place, the
    last row of the table, which is there only if labels are dropped at all."""

    def __init__(self, classes, dim, dropout):
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + (dropout > 0), dim)

    def forward(self, y, drop=None):
        return self.embedding_table(y if drop is None else y.where(~drop, self.classes))

class Attention(nn.Module):
    """Multi-head attention softmax(QKᵀ/√(D/h)) V, by the fused kernel. Tokens x (B, N, D) ask one
    another; in cross-attention the tokens of the condition (B, M, D) answer."""

    def __init__(self, dim, num_heads, cross=False):
        super().__init__()
        self.num_heads = num_heads
        if cross:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, tokens=None):
        if tokens is None:
            q, k, v = self.qkv(x).chunk(3, 2)  # (B, N, 3D) -> 3 x (B, N, D)
        else:
            q, (k, v) = self.q(x), self.kv(tokens).chunk(2, 2)  # (B, M, 2D) -> 2 x (B, M, D)
        q, k, v = (u.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for u in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v)  # each (B, h, N, D/h)
        return self.proj(heads.transpose(1, 2).flatten(2))  # (B, h, N, D/h) -> (B, N, D)

class DiTBlock(nn.Module):
    """One block in one of the four designs of §3.2; in-context has the condition among x."""

    def __init__(self, dim, num_heads, design):
        super().__init__()
        self.design, adaptive = design, design.startswith("adaln")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not adaptive)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not adaptive)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU("tanh"), fc2=nn.Linear(4 * dim, dim)))
        if adaptive:  # scale and shift before attention and MLP; zero: also a gate after each
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(dim, (6 if design == "adaln-zero" else 4) * dim))
        if design == "cross-attention":
            self.norm_cross = nn.LayerNorm(dim, eps=1e-6)
            self.cross = Attention(dim, num_heads, cross=True)

    def forward(self, x, c, tokens):
        """x (B, N, D); the condition as one vector c (B, 1, D) and as tokens (B, 2, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1  # δ, γ-1, α: none
        if self.design == "adaln":
            shift1, scale1, shift2, scale2 = self.adaLN_modulation(c).chunk(4, 2)
        if self.design == "adaln-zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 2)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        if self.design == "cross-attention":
            x = x + self.cross(self.norm_cross(x), tokens)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, P² C_out): a norm, adaptive in the adaLN designs, and a linear map."""

    def __init__(self, dim, patch_size, channels, adaptive):
        super().__init__()
        self.adaptive = adaptive
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not adaptive)
        self.linear = nn.Linear(dim, patch_size**2 * channels)
        if adaptive:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 2) if self.adaptive else (0, 0)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)

def sincos_positions(side, dim):
    """Fixed 2-D positions (side², dim), row by row: the first half of the channels tells the
    column, the second the row, each by sines and then cosines of place / 10000^(4i/dim)."""
    place = torch.arange(side, dtype=torch.float64)
    angle = place[:, None] / 10000 ** (torch.arange(dim // 4) / (dim / 4)).double()
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, dim/2)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], 1).float()

class DiT(nn.Module):
    """Noisy latents x (B, C, H, W), times t (B,), classes y (B,) -> (B, 2C, H, W). `drop` (B,):
    whose class is kept secret. The defaults are DiT-XL/2."""

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28,
                 num_heads=16, class_dropout_prob=0.1, num_classes=1000, design="adaln-zero"):
        super().__init__()
        self.patch_size, self.design, adaptive = patch_size, design, design.startswith("adaln")
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(
            sincos_positions(input_size // patch_size, hidden_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, design) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * in_channels, adaptive)

        for module in self.modules():
            if isinstance(module, nn.Linear):  # Xavier: variance kept forth and back
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a linear map, too
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in (self.y_embedder.embedding_table, *self.t_embedder.mlp[::2]):
            nn.init.normal_(layer.weight, std=0.02)  # the condition is weak at first
        if design == "adaln-zero":  # gates 0: every block starts as the identity
            for block in self.blocks:
                nn.init.zeros_(block.adaLN_modulation[1].weight)
        if adaptive:  # the last norm starts plain
            nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)  # the first guess is 0

    def unpatchify(self, x):
        """(B, N, P² C) -> (B, C, H, W)."""
        side, P = math.isqrt(x.shape[1]), self.patch_size
        x = x.unflatten(2, (P, P, -1)).unflatten(1, (side, side))  # (B, H/P, W/P, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H/P, P, W/P, P)

    def forward(self, x, t, y, drop=None):
        x = self.x_embedder(x) + self.pos_embed  # (B, C, H, W) -> (B, N, D)
        tokens = torch.stack([self.t_embedder(t), self.y_embedder(y, drop)], 1)  # (B, 2, D)
        c, N = tokens.sum(1, keepdim=True), x.shape[1]
        if self.design == "in-context":
            x = torch.cat([x, tokens], 1)  # (B, N + 2, D)
        for block in self.blocks:
            x = block(x, c, tokens)
        return self.unpatchify(self.final_layer(x[:, :N], c))  # (B, N, P² 2C) -> (B, 2C, H, W)

SIZES = {"mini": (128, 6, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
         "XL": (1152, 28, 16)}  # width, blocks, heads (paper, table 1; mini is for MNIST)
DESIGNS = ("in-context", "cross-attention", "adaln", "adaln-zero")

def named(size, patch_size, **more):
    """A DiT of one of the sizes, e.g. DiT-XL/2: named("XL", 2, input_size=32, num_classes=1000)."""
    width, depth, heads = SIZES[size]
    return DiT(patch_size=patch_size, hidden_size=width, depth=depth, num_heads=heads, **more)

# ---- Diffusion with a learned variance, and guidance ---------------------------------------------

class Diffusion:
    """The chain q and its way back p, for a model(x_t, t, y, drop) that answers (B, 2C, H, W).

    With `predict` "eps", as published weights do, the first C channels are the noise ε; with "v"
    ε = √(1-ᾱ_t) x_t + √ᾱ_t times them (arXiv:2202.00512 App. D), so that 0 is the best linear guess
    and small errors at t near T stay small. The other C channels place log σ² between log β̃_t (-1)
    and log β_t (1). `alpha_bars[t]` is ᾱ_t, t = 0..T, float64; t runs from 1 to T, only the model
    is told t - 1 where `first` is 0, as published weights expect."""

    def __init__(self, T=1000, predict="v", first=1):
        self.T, self.predict, self.first = T, predict, first
        betas = torch.linspace(0.1 / T, 20 / T, T, dtype=torch.float64)  # 0.0001 .. 0.02 at 1000
        self.alpha_bars = F.pad(torch.cumprod(1 - betas, 0), (1, 0), value=1.0)

    def pair(self, t, s, x):
        """ᾱ_t, ᾱ_s, β and β̃ of the step from t back to s, each (B, 1, 1, 1) like x."""
        bar_t, bar_s = (self.alpha_bars[v.cpu()].view(-1, 1, 1, 1) for v in (t, s))
        beta = 1 - bar_t / bar_s
        return [v.to(x) for v in (bar_t, bar_s, beta, beta * (1 - bar_s) / (1 - bar_t))]

    def q_sample(self, x0, t, noise):
        """x_0 -> x_t, all steps at once (eq. 5.25); t (B,)."""
        bar = self.pair(t, t, x0)[0]
        return bar.sqrt() * x0 + (1 - bar).sqrt() * noise

    def to_eps(self, answer, x_t, t):
        """The model's first channels (B, C, H, W) as ε."""
        bar = self.pair(t, t, x_t)[0]
        return answer if self.predict == "eps" else (1 - bar).sqrt() * x_t + bar.sqrt() * answer

    def step(self, x_t, t, s, eps, share):
        """Mean (eq. 5.28 with x̂_0) and log variance of p(x_s | x_t), and x̂_0, each (B, C, H, W).
        share goes from log β̃ (-1) to log β (1), and may pass them (arXiv:2102.09672 eq. 15). At
        s = 0, where β̃ = 0, the β̃ of the step from 2 to 1 is taken."""
        bar_t, bar_s, beta, tilde = self.pair(t, s, x_t)
        x0 = (x_t - (1 - bar_t).sqrt() * eps) / bar_t.sqrt()
        mean = (bar_s.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - bar_s) * x_t) / (1 - bar_t)
        least = self.pair(torch.tensor([2]), torch.tensor([1]), x_t)[3]
        low = tilde.where(tilde > 0, least).log()
        return mean, low + (share + 1) / 2 * (beta.log() - low), x0

    def loss(self, model, x0, y, t, noise, drop=None):
        """L_simple and one term of the bound in nats, means over elements, (B,) each. The bound
        teaches the variance only: the mean in it is detached (arXiv:2102.09672 §3.1)."""
        x_t = self.q_sample(x0, t, noise)
        answer, share = model(x_t, t - 1 + self.first, y, drop).to(x_t).chunk(2, 1)
        eps = self.to_eps(answer, x_t, t)
        simple = (eps - noise).square()  # eq. 5.36
        mean, logvar, _ = self.step(x_t, t, t - 1, eps.detach(), share)
        truth, *_ = self.step(x_t, t, t - 1, noise, share)  # the true ε: q(x_{t-1} | x_t, x_0)
        tilde = self.pair(t, t - 1, x_t)[3].clamp(min=1e-20)
        error = (truth - mean).square()
        kl = 0.5 * (logvar - tilde.log() + (tilde + error) / logvar.exp() - 1)
        nll = 0.5 * (math.log(2 * math.pi) + logvar + error / logvar.exp())  # latents have no bins
        bound = kl.where(t.view(-1, 1, 1, 1).to(x_t.device) > 1, nll)
        return simple.flatten(1).mean(1), bound.flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, model, x, y, scale, steps, sampler="ddpm", eta=0.0):
        """Noise x = x_T (B, C, H, W) -> x_0 of the classes y (B,), guided, in `steps` steps. "ddpm"
        draws from p with the learned variance; "ddim" with noise η² β̃ (arXiv:2010.02502)."""
        times = torch.linspace(self.T, 0, min(steps, self.T) + 1).round().long()
        times = times[:, None].expand(-1, len(x))  # (steps + 1, B)
        for t, s in zip(times, times[1:]):
            answer, share = guided(model, x, t.to(x.device) - 1 + self.first, y, scale)
            eps = self.to_eps(answer, x, t)  # guiding v guides ε: one is linear in the other
            mean, logvar, x0 = self.step(x, t, s, eps, share)
            if s[0] == 0:
                return x0
            variance = logvar.exp()
            if sampler == "ddim":
                _, bar_s, _, tilde = self.pair(t, s, x)
                variance = (eta**2 * tilde).minimum(1 - bar_s)  # its eq. 16
                mean = bar_s.sqrt() * x0 + (1 - bar_s - variance).sqrt() * eps  # its eq. 12
            x = mean + variance.sqrt() * torch.randn_like(x)

def guided(model, x, t, y, scale):
    """ε(∅) + scale (ε(y) - ε(∅)) (B, C, H, W), of all C channels, and the other C channels of y,
    unguided: both halves in one batch. Where scale is not 1 the model needs its null class."""
    if scale == 1:
        return model(x, t, y).chunk(2, 1)
    drop = torch.arange(2 * len(x), device=x.device) >= len(x)
    answer, share = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]), drop).chunk(2, 1)
    eps, eps_null = answer.chunk(2)
    return eps_null.lerp(eps, scale), share[:len(x)]  # lerp: exact at 0 and 1

# ---- Training ------------------------------------------------------------------------------------

def train_autoencoder(run, model, images):
    """Trains the autoencoder, then sets its scale: 1 / std of all latents (LDM, App. G)."""
    c, size = run.config, min(run.config.batch_size, len(images))
    steps = c.ae_epochs * (len(images) // size)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        error, kl = model.loss(images[torch.randint(len(images), (size,)).to(run.device)])
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.zero_grad()
        (error + c.kl_weight * kl).mean().backward()
        optimizer.step()
        if not (step + 1) % (steps // 4 or 1):
            print(f"autoencoder {step + 1}/{steps}: squared error {error.mean():.1f}, KL "
                  f"{kl.mean():.1f} nats an image", flush=True)
    model.scale.copy_(1 / model.encode(images).std())

def draw_t(count, T):
    """t (count,) in {1..T} from Beta(1.5, 2.3), not uniformly: at 0.1 T to 0.7 T shapes form."""
    u = torch.distributions.Beta(1.5, 2.3).sample((count,))
    return (u * T).long().clamp(max=T - 1) + 1

def parallel(run):
    """Joins the processes that torchrun started. Returns the number of this one and of all."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= set(os.environ):
        return 0, 1
    if run.device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # process 0 speaks, saves and draws
    return dist.get_rank(), dist.get_world_size()

def train(run, diffusion, models, latents, labels, test_latents, test_labels, rank, world):
    """Trains every model by name on the same batches, t, noise and dropped labels. Returns their
    averages, and samples by images seen. Every process draws for the whole batch and takes its
    share: the mean of their gradients is that of one process."""
    c, snapshots = run.config, {}
    averages = copy.deepcopy(models).requires_grad_(False)
    nets = {k: nn.parallel.DistributedDataParallel(m) if world > 1 else m
            for k, m in models.items()}
    optimizer = torch.optim.AdamW(models.parameters(), betas=(0.9, 0.99), weight_decay=0)
    probe = torch.randn(10, *latents.shape[1:]).to(run.device)
    test_t = torch.arange(len(test_latents), device=run.device) * c.T // len(test_latents) + 1
    test_noise = torch.randn(test_latents.shape).to(run.device)

    @torch.no_grad()
    def report():
        row = {}
        for name, model in averages.items():
            simple, bound = diffusion.loss(model, test_latents, test_labels, test_t, test_noise)
            row |= {f"{name} test": simple.mean().item(), f"{name} test bound": bound.mean().item()}
        digits = diffusion.sample(averages[c.block], probe, torch.arange(10, device=run.device),
                                  c.scale, c.steps, "ddim")
        snapshots[f"{run.step * min(c.batch_size, len(latents)):,}"] = digits
        return row

    for index in run.batches(len(latents), report, 8 if c.compare else 2):
        t, drop = draw_t(len(index), c.T), torch.rand(len(index)) < c.drop
        noise = torch.randn(len(index), *latents.shape[1:])
        mine = slice(rank, len(index) // world * world, world)  # a remainder is left out
        t, drop, noise = (v[mine].to(run.device) for v in (t, drop, noise))
        x0, y = latents[index[mine]], labels[index[mine]]
        warm, done = min(1, (run.step + 1) / min(200, run.steps / 10)), run.step / run.steps
        optimizer.param_groups[0]["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        terms = {}
        for name, net in nets.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=run.device.type == "cuda"):
                simple, bound = diffusion.loss(net, x0, y, t, noise, drop)
            weight = 1 / diffusion.alpha_bars[t.cpu()].to(simple)  # makes it the error of v
            loss = (weight * simple).mean() + bound.mean()  # 2102.09672: 0.001 times T terms
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            terms |= {name: simple.mean(), f"{name} bound": bound.mean()}
        optimizer.step()
        run.log(**terms)
        keep = min(0.999, (1 + run.step) / (10 + run.step))  # a longer memory as training goes on
        with torch.no_grad():
            for mean, new in zip(averages.parameters(), models.parameters()):
                mean.lerp_(new, 1 - keep)
    return averages, snapshots

# ---- Figures -------------------------------------------------------------------------------------

def draw_latents(run, autoencoder, x):
    """Ten digits x, the channels of their latents, and what the decoder makes of them."""
    z = autoencoder.encode(x)
    channels = F.interpolate(z / 3, x.shape[2:]).transpose(0, 1).reshape(-1, *x.shape[1:])
    names = ["image", *(f"z, channel {i + 1}" for i in range(z.shape[1])), "decoded"]
    run.grid("latents", f"{x[0].numel()} pixels, {z[0].numel()} numbers, and back (gray: 0, "
             "white: 3)", torch.cat([x, channels, autoencoder.decode(z)]), 10,
             (8, 0.7 * len(names) + 0.5), yticks=names)

def draw_loss(run, models, z):
    """L_simple and the bound over training, for every design trained, with its costs. Returns
    these: parameters, and multiply-adds of one forward pass on one latent z (1, C, H, W)."""
    figure, epochs = Figure((10, 4.4), layout="constrained"), [row["epoch"] for row in run.history]
    left, right = figure.subplots(1, 2)
    zero, costs = torch.zeros(1, dtype=torch.long, device=run.device), {}
    for (name, model), style in zip(models.items(), ("C0o-", "C1^-", "C2s-", "C3D-")):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts all
            model(z, zero, zero)
        size, work = sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2
        label = f"{name}: {size / 1e6:.2f} M parameters, {work / 1e6:.1f} M multiply-adds"
        costs[name] = dict(parameters=size, multiply_adds=work)
        left.plot(epochs, [row[f"{name} test"] for row in run.history], style, label=label)
        right.plot(epochs, [row[f"{name} test bound"] for row in run.history], style)
    left.set(xlabel="epoch", ylabel="L_simple (1 for ε = 0)")
    right.set(xlabel="epoch", ylabel="mean term of the bound, nats a number")
    figure.legend(loc="outside lower center", ncols=2)
    run.figure("loss", "On test latents: the error of ε, the bound that teaches Σ", figure)
    return costs

@torch.no_grad()
def draw_gates(run, model, diffusion):
    """Size of the gates α by block and t: how far adaLN-Zero has opened."""
    times = torch.linspace(1, diffusion.T, 20).round().long().to(run.device)
    c = model.t_embedder(times) + model.y_embedder(torch.zeros_like(times))  # class 0
    six = torch.stack([block.adaLN_modulation(c) for block in model.blocks]).unflatten(2, (6, -1))
    size = six.abs().mean(3).cpu().numpy()  # (blocks, times, 6)
    figure = Figure((9, 3.6), layout="constrained")
    for axes, i, name in zip(figure.subplots(1, 2, sharey=True), (2, 5), ("attention", "MLP")):
        axes.set_prop_cycle(color=np.linspace(0.8, 0, len(size)).astype(str))  # light to dark
        axes.plot(times.cpu().numpy(), size[..., i].T)
        axes.set(xlabel="t", ylabel=f"mean |α| of the {name}")
    names = [f"block {k + 1}" for k in range(len(size))]
    figure.legend(axes.lines, names, loc="outside right center")
    run.figure("gates", "The gates of all blocks, 0 before training, have opened", figure)

def draw_samples(run, diffusion, autoencoder, models, snapshots, shape):
    """Ten digits over training, under five scales, of every design; a row a class; samples.npz."""
    c, classes = run.config, torch.arange(10, device=run.device)
    model, noise = models[c.block], torch.randn(10, *shape).to(run.device)

    def digits(model, s):
        return diffusion.sample(model, noise, classes, s, c.steps, "ddim")

    def rows(name, title, ylabel, latents):
        images = autoencoder.decode(torch.cat([*latents.values()]))
        run.grid(name, title, images, 10, (8, 0.7 * len(latents) + 0.9), "class", ylabel,
                 range(10), list(latents))

    if snapshots:
        rows("training", f"Ten fixed x_T as the network learns, s = {c.scale:g}",
             "training images seen", snapshots)
    if c.drop:
        rows("guidance", "One noise a column, one class a column: s trades variety for clarity",
             "scale s of guidance", {s: digits(model, s) for s in (0, 1, 2, 4, 8)})
    y, x_T = torch.arange(c.samples) % 10, torch.randn(c.samples, *shape)
    images = torch.cat([autoencoder.decode(diffusion.sample(
        model, x.to(run.device), k.to(run.device), c.scale, c.steps, c.sampler, c.eta))
        for x, k in zip(x_T.split(250), y.split(250))])
    run.samples(images, labels=y)
    images = images[:min(c.samples // 10, 10) * 10].unflatten(0, (-1, 10)).transpose(0, 1)
    run.grid("samples", f"A row a class, s = {c.scale:g} ({c.sampler}, {min(c.steps, c.T)} steps)",
             images.flatten(0, 1), images.shape[1], (6, 6.3), ylabel="class asked for",
             yticks=range(10))
    if c.compare:
        rows("designs", "The same noise, the same training, four designs", "design",
             {name: digits(one, c.scale) for name, one in models.items()})

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
    c = parse(argv)
    if not c.drop and c.scale != 1:
        print("--drop 0 trains no null class to guide away from: add --scale 1", file=sys.stderr)
        return 2
    run, diffusion = Run(c), Diffusion(c.T)
    rank, world = parallel(run)
    images, labels, test_images, test_labels = run.data()
    images, test_images = (x[:, None].float() / 127.5 - 1 for x in (images, test_images))
    latent, models = c.space == "latent", nn.ModuleDict()
    autoencoder = Autoencoder(c.channels) if latent else Pixels()
    channels, side = (c.channels, 8) if latent else (1, 28)
    for name in DESIGNS if c.compare else [c.block]:
        torch.manual_seed(c.seed)
        models[name] = named(c.size, c.patch_size, input_size=side, in_channels=channels,
                             num_classes=10, class_dropout_prob=c.drop, design=name)
    kept = nn.ModuleDict(dict(autoencoder=autoencoder, models=models)).to(run.device)
    run.load(kept)
    if latent and not c.load:
        train_autoencoder(run, autoencoder, images)
        if world > 1:
            nn.parallel.DistributedDataParallel(autoencoder)  # all take that of process 0
    autoencoder.requires_grad_(False)
    latents, test_latents = autoencoder.encode(images), autoencoder.encode(test_images[:1000])
    averages, snapshots = train(run, diffusion, models, latents, labels, test_latents,
                                test_labels[:1000], rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank:
        return 0
    kept["models"] = averages
    run.save(kept)
    if latent:
        draw_latents(run, autoencoder, test_images[:10])
    designs = draw_loss(run, averages, latents[:1])
    if c.block == "adaln-zero":
        draw_gates(run, averages[c.block], diffusion)
    draw_samples(run, diffusion, autoencoder, averages, snapshots, latents.shape[1:])
    last = {k: v for k, v in run.history[-1].items() if "test" in k} if run.history else {}
    for name in designs:
        designs[name]["loss"] = last.get(f"{name} test")
        print(f"{name}: L_simple on test latents {last.get(f'{name} test', math.nan):.4f} (0: 1)")
    return run.finish(**last, test_chance=1.0, designs=designs if c.compare else {})

if __name__ == "__main__":
    launch(main)
