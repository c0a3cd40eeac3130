"""Attention rollout (arXiv:2005.00928): what does a Vision Transformer look at?

    attention        W(l) (N, N): how layer l mixes its tokens, mean over the heads, rows sum to 1
    with residual    A(l) = normalize(W(l) + I) = (W(l) + I) / 2: a token also keeps itself
    rollout          Ã(1) = A(1),  Ã(l) = A(l) Ã(l-1): the mixing of all layers so far
    map              row of the class token in Ã(L), over its sum without itself: one number a patch

This is the recursion of the book's exercise 5.2 (paper: §3; ViT's own maps: arXiv:2010.11929 D.8).
A late token is no longer the patch that it started as, so, the argument goes, its attention says
little about the image, and the product of the layers leads back to the input. Whether it does is
measured here: a digit at a random place on a larger canvas, among pieces of other digits. A small
Vision Transformer learns to name the digit and is then explained by six maps, the class token's row
of: the last W; the mean of all W; rollout without I; rollout; rollout weighted by how much really
comes through attention, measured, in place of 1/2; rollout by the gradient of the answer's logit.

Run     python 07_rollout.py    (--quick: the whole path in seconds; --help: every setting)
Expect  on two CPU cores 7 minutes; six pictures and weights in out/07_rollout; 95.4% of the
        test digits read (chance 10%). On 2,000 test scenes, in %:
                                   points at the digit   mass in its box   deletion (lower: better)
          last layer                      99.0                60.6               14.4
          mean of layers                  99.6                58.0               13.8
          rollout without the residual    99.6                30.8               14.5
          rollout                         99.6                37.0               14.0
          rollout, weighted               99.6                53.2               13.8
          rollout, by gradient            98.4                65.4               13.7
          random / the box itself      26.2 / 100          12.8 / 69.5       35.4 / 14.1
        Pointing and mass ask whether a map agrees with us, deletion (the right class's probability
        while patches go, strongest first) whether it agrees with the model. Rollout beats the last
        layer in pointing and deletion, but the plain mean of the layers is as good or better, and
        rollout's mass leaks away: layer by layer it spreads, since it takes half of every token
        from others. With the measured shares, which are smaller, most of it comes back. That late
        attention flattens, as the paper saw, is not so in this small net: the class token's entropy
        goes from 2.3 to 2.2 nats of at most ln 37 = 3.6. Real MNIST, seed 0, two cores of an AMD
        EPYC, 2026-11-22.
Try     easy: --epochs 0 --load out/07_rollout/model.pt with --head-fusion max, --discard 0.9.
        medium: --clutter 12, or --depth 6. Does rollout gain on the last layer?
        harder: which share in place of 1/2, the 0.5 in `attention_rollout`, serves best?
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
    out: str = "out"  # folder for pictures, metrics and weights
    device: str = "auto"  # where to compute [auto|cuda|mps|cpu]
    seed: int = 0  # of weights, noise and order [0..4294967295]
    epochs: int = 6  # passes over the training images [0..100000]
    batch_size: int = 64  # images a step [1..60000]
    lr: float = 2e-3  # learning rate: a short warm-up times a cosine down to 0 [0..1]
    train_size: int = 0  # training images to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate and draw
    quick: bool = False  # the whole path in seconds, on a few hundred images
    height: int = 48  # of the canvas in pixels, 8 a patch [32|40|48|56|64|72|80]
    width: int = 48  # of the canvas in pixels, 8 a patch [32|40|48|56|64|72|80]
    clutter: int = 4  # pieces of other digits on the canvas [0..50]
    embed_dim: int = 64  # D, width of a token [16|32|48|64|96|128|192|256]
    depth: int = 4  # L, blocks [1..48]
    num_heads: int = 4  # h, heads a block [1|2|4|8|16]
    head_fusion: str = "mean"  # how the heads of a layer become one [mean|max|min]
    discard: float = 0.0  # share of every row, its smallest, that rollout leaves out [0..0.99]
    explain: int = 2000  # test scenes to measure the maps on [16..10000]

PRESETS = dict(quick=dict(train_size=512, epochs=2, batch_size=32, depth=2, explain=64))
SHAPES = ("height", "width", "embed_dim", "depth", "num_heads")  # a checkpoint shares them
PIXELS = (-1, 1)  # black and white
PATCH = 8  # pixels a side that one token stands for

# ---- Explaining ----------------------------------------------------------------------------------

def attention_rollout(attentions, residual=True, head_fusion="mean", discard=0.0, joint=False,
                      shares=None):
    """How much each token takes from each input token, through all layers (ex. 5.2).
    attentions: for L layers, first layer first, (B, h, N, N) with rows that sum to 1. `discard`, in
    [0, 1), is the share of each row that is left out, its smallest entries; rows are brought to 1
    again before the identity comes in. Without `residual` it does not; with `shares`, L of (B, N),
    a token takes that share, not half of it, by attention, and keeps the rest. Returns (B, N, N),
    rows summing to 1; `joint`: (L, B, N, N), the product after every layer."""
    fuse = dict(mean=torch.mean, max=torch.amax, min=torch.amin)[head_fusion]
    A = fuse(torch.stack([*attentions]), 2)  # (L, B, h, N, N) -> (L, B, N, N)
    N = A.shape[-1]
    A = A.scatter(-1, A.argsort(-1)[..., :min(N - 1, round(discard * N))], 0)  # the least
    eye, total = torch.eye(N, dtype=A.dtype, device=A.device), A.sum(-1, keepdim=True)
    A = torch.where(total > 0, A / total, eye)  # keepdim: each row by its own sum
    w = 0.5 if residual else 1.0
    if shares is not None:
        w = torch.stack([*shares])[..., None]  # (L, B, N, 1)
    first, *later = w * A + (1 - w) * eye  # w = 1/2: normalize(W + I)
    products = [first]
    for A in later:
        products.append(A @ products[-1])  # the later layer from the left
    return torch.stack(products) if joint else products[-1]

def gradient_rollout(attentions, logits, classes):
    """Rollout for one class (arXiv:2103.15679, eq. 5 and 6): every entry counts by how much it
    raises that class's logit, to first order, and by 0 if it lowers it. The attentions, L of
    (B, h, N, N), led to the logits (B, K); classes (B,). Returns (B, N, N), rows of any sum."""
    chosen = logits.gather(1, classes[:, None]).sum()  # images do not see each other: one sum
    gradients = torch.autograd.grad(chosen, attentions)
    R = torch.eye(attentions[0].shape[-1], dtype=logits.dtype, device=logits.device)
    for attention, gradient in zip(attentions, gradients):
        R = R + (gradient * attention).clamp(min=0).mean(1) @ R  # R <- R + E_h[(∇A ⊙ A)⁺] R
    return R.detach()

def patch_map(matrix):
    """What the class token takes from each patch: (.., N, N) -> (.., n = N - 1), rows sum to 1."""
    row = matrix[..., 0, 1:]
    row = row + (row.sum(-1, keepdim=True) == 0)  # nothing at all: alike everywhere
    return row / row.sum(-1, keepdim=True)

def explain(model, x, config):
    """Explains the model's answers to scenes x (B, 1, H, W). Returns logits (B, 10), six maps
    (B, n) by name, and for every layer its attention, mean over the heads whatever `head_fusion`,
    and the rollout up to it, both (L, B, N, N). The gradient is that of the class answered."""
    logits, attentions, shares = model.eval()(x, weights=True)
    raw, how = torch.stack(attentions).mean(2), (config.head_fusion, config.discard)
    rolled = attention_rollout(attentions, True, *how, joint=True)
    matrices = {"last layer": raw[-1], "mean of layers": raw.mean(0),
                "no residual": attention_rollout(attentions, False, *how), "rollout": rolled[-1],
                "weighted": attention_rollout(attentions, True, *how, shares=shares),
                "gradient": gradient_rollout(attentions, logits, logits.argmax(1))}
    maps = {name: patch_map(matrix).detach() for name, matrix in matrices.items()}
    return logits.detach(), maps, raw.detach(), rolled.detach()

# ---- Measuring maps ------------------------------------------------------------------------------

def overlap(boxes, size):
    """Share of each patch that lies in the box: boxes (B, 4) in pixels, size (H, W) -> (B, n)."""
    row, column = (torch.arange(side, device=boxes.device) for side in size)
    top, left, bottom, right = boxes[:, :, None].unbind(1)  # (B, 4) -> 4 x (B, 1)
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)
    inside = rows[:, :, None] & columns[:, None]  # (B, H) and (B, W) -> (B, H, W)
    return F.avg_pool2d(inside.float(), PATCH).flatten(1)  # (B, H/8, W/8) -> (B, n)

def pointing(maps, inside):
    """Pointing game: 1 where the strongest patch touches the box, 0 where not; patches that tie
    share it. maps (.., B, n); inside (B, n), the share of each patch in the box -> (.., B)."""
    strongest = maps == maps.amax(-1, keepdim=True)
    return (strongest & (inside > 0)).sum(-1) / strongest.sum(-1)

def mass(maps, inside):
    """Share of a map that lies in the box: maps (.., B, n), inside (B, n) -> (.., B)."""
    return (maps * inside).sum(-1) / maps.sum(-1)

@torch.no_grad()
def deletion(model, x, labels, maps, counts):
    """Probability of the right class when the `count` strongest patches of the maps (B, n), of
    equal ones the first, are painted black as the canvas is. Returns (B, len(counts))."""
    rank = maps.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0: strongest
    rank = rank.view(-1, 1, x.shape[2] // PATCH, x.shape[3] // PATCH).float()
    rank = F.interpolate(rank, scale_factor=PATCH)  # (B, 1, H/8, W/8) -> (B, 1, H, W)
    logits = torch.stack([model(x.where(rank >= count, PIXELS[0])) for count in counts], 1)
    return logits.softmax(-1)[torch.arange(len(x)), :, labels]

def study(run, model, x, labels, boxes):
    """Explains scenes x (B, 1, H, W) and measures the maps. Returns the logits (B, 10); how many
    patches were painted black, a list; by map's name, for every image, pointing, mass and the curve
    of deletion (B, 2 + len(counts)); for "raw attention" and "rollout", by layer, the entropy of
    the class token's row, the mean entropy of all rows, pointing and mass (L, 4, B).
    Three maps to compare with: a random one; a uniform one (chance for pointing and mass; deleted
    row by row); the box itself, whose mass is below 1 since patches at its edge stick out."""
    n = model.pos_embed.shape[1] - 1
    noise = torch.rand(len(x), n, generator=torch.Generator().manual_seed(2)).to(x.device)
    counts = sorted({round(n * (i / 12) ** 2) for i in range(13)})  # dense where most happens
    answers, rows, layers = [], {}, {"raw attention": [], "rollout": []}
    for some, right, box, any_map in zip(*(v.split(100) for v in (x, labels, boxes, noise))):
        logits, maps, *matrices = explain(model, some, run.config)
        inside = overlap(box, x.shape[2:])
        maps |= {"random": any_map, "uniform": 0 * inside + 1, "the box itself": inside}
        for name, m in maps.items():
            found = torch.stack([pointing(m, inside), mass(m, inside)], 1)
            curve = deletion(model, some, right, m, counts)
            rows.setdefault(name, []).append(torch.cat([found, curve], 1).cpu())
        for name, matrix in zip(layers, matrices):  # (L, B, N, N)
            entropy = torch.special.entr(matrix).sum(-1)  # of every row, in nats: (L, B, N)
            m = patch_map(matrix)  # (L, B, n)
            found = entropy[..., 0], entropy.mean(-1), pointing(m, inside), mass(m, inside)
            layers[name].append(torch.stack(found, 1).cpu())  # 4 x (L, B) -> (L, 4, B)
        answers.append(logits.cpu())
    return (torch.cat(answers), counts, {name: torch.cat(v) for name, v in rows.items()},
            {name: torch.cat(v, 2) for name, v in layers.items()})

# ---- Model: a small Vision Transformer that returns its attention --------------------------------

class Attention(nn.Module):
    """Multi-head self-attention, written out: its weights are what this file is about."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        """(B, N, D) -> (B, N, D) and the attention (B, h, N, N)."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, N, 3, h, D/h) -> 3 x (B, h, N, D/h)
        attention = (q @ k.transpose(-2, -1) / math.sqrt(D // self.num_heads)).softmax(-1)
        heads = attention @ v  # (B, h, N, N) @ (B, h, N, D/h) -> (B, h, N, D/h)
        return self.proj(heads.transpose(1, 2).reshape(B, N, D)), attention

class Block(nn.Module):
    """Attention and an MLP, both added to what comes in: the I of rollout is this addition."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        """(B, N, D) -> (B, N, D), the attention (B, h, N, N), and the share of every token that
        comes through it (B, N): a rough one, by lengths without directions and without the MLP."""
        added, attention = self.attn(self.norm1(x))
        share = added.norm(dim=2) / (added.norm(dim=2) + x.norm(dim=2))
        x = x + added
        return x + self.mlp(self.norm2(x)), attention, share

class VisionTransformer(nn.Module):
    """Scenes (B, 1, H, W) -> logits (B, 10); with `weights` also, of every layer, the attention
    (B, h, 1 + n, 1 + n), the class token first, patches row by row, and the shares (B, 1 + n)."""

    def __init__(self, size=(48, 48), embed_dim=64, depth=4, num_heads=4):
        super().__init__()
        self.stem = nn.Sequential(  # convolutions learn sooner than a linear map (2106.14881)
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),  # a token sees 15x15: its 8x8, 3 before, 4 after
            nn.Conv2d(32, embed_dim, 3, 2))
        tokens = 1 + size[0] // PATCH * (size[1] // PATCH)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x, weights=False):
        x = self.stem(x).flatten(2).transpose(1, 2)  # (B, D, H/8, W/8) -> (B, n, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        seen = []
        for block in self.blocks:
            x, *attention_and_share = block(x)
            seen.append(attention_and_share)
        logits = self.head(self.norm(x[:, 0]))  # (B, 1 + n, D) -> (B, 10)
        return (logits, *zip(*seen)) if weights else logits

# ---- The task ------------------------------------------------------------------------------------

def scenes(digits, pool, size=(48, 48), pieces=4, generator=None):
    """Each of the digits, uint8 (B, 28, 28), at a random place on a black canvas, among `pieces`
    8x8 cuts from the middle of images of the pool (N, 28, 28); where they meet, the brighter wins.
    Returns (B, 1, H, W) in [-1, 1] and the boxes of the digits' ink, (B, 4): top, left, bottom,
    right in pixels, the last two exclusive."""
    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator).to(digits.device)

    def square(top, left, side, width):  # (..) -> (.., side²): its pixels in an image that wide
        pixel = torch.arange(side, device=digits.device)
        rows, columns = top[..., None, None] + pixel[:, None], left[..., None, None] + pixel
        return (rows * width + columns).flatten(-2)

    B, (H, W) = len(digits), size
    top, left = draw(H - 27, B), draw(W - 27, B)
    canvas = digits.new_zeros(B, H * W)
    canvas.scatter_(1, square(top, left, 28, W), digits.flatten(1))
    middle = square(draw(14, B, pieces) + 4, draw(14, B, pieces) + 4, 8, 28)
    cuts = pool.flatten(1)[draw(len(pool), B, pieces)[..., None], middle]  # (B, pieces, 64)
    places = square(draw(H - 7, B, pieces), draw(W - 7, B, pieces), 8, W)
    canvas.scatter_reduce_(1, places.flatten(1), cuts.flatten(1), "amax")
    rows, columns = (digits > 0).any(2).int(), (digits > 0).any(1).int()  # (B, 28): has it ink?
    bottom, right = top + 28 - rows.flip(1).argmax(1), left + 28 - columns.flip(1).argmax(1)
    boxes = torch.stack([top + rows.argmax(1), left + columns.argmax(1), bottom, right], 1)
    return canvas.view(B, 1, H, W).float() / 127.5 - 1, boxes

# ---- Training ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, x, labels):
    """Cross-entropy in nats and accuracy on scenes (N, 1, H, W) and labels (N,)."""
    model.eval()
    logits = torch.cat([model(batch) for batch in x.split(500)])
    return dict(test_loss=F.cross_entropy(logits, labels).item(),
                test_accuracy=(logits.argmax(1) == labels).float().mean().item())

def train(run, model, images, labels, test, test_labels):
    """Minimizes the cross-entropy of scenes of the images, drawn anew for every step."""
    c = run.config
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, (0.9, 0.99), weight_decay=0.05,
                                  fused=run.device.type != "mps")
    for index in run.batches(len(images), lambda: evaluate(model, test, test_labels)):
        model.train()
        x, _ = scenes(images[index], images, (c.height, c.width), c.clutter)
        with torch.autocast("cuda", torch.bfloat16, enabled=run.device.type == "cuda"):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels[index])
        run.log(loss=loss)
        warm, done = min(1, (run.step + 1) / min(200, run.steps / 10)), run.step / run.steps
        optimizer.param_groups[0]["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

# ---- Figures -------------------------------------------------------------------------------------

STYLES = {"rollout": ("C0", "o-"), "mean of layers": ("C1", "s-"), "last layer": ("C2", "^-"),
          "no residual": ("C4", "v-"), "weighted": ("C5", "P-"), "gradient": ("C3", "D-"),
          "random": ("0.6", ":"), "uniform": ("0.4", "--"), "the box itself": ("k", "-")}

def draw_maps(run, name, title, x, boxes, maps, ylabels):
    """One row a scene x (B, 1, H, W): the scene and its box, then each of the maps (B, n)."""
    B, (H, W), scene = len(x), x.shape[2:], unit(x)[:, 0].numpy()
    panels = {k: m.view(B, H // PATCH, -1).cpu().numpy() for k, m in maps.items()}
    panels = {"scene": scene, **panels}
    figure = Figure((1.45 * len(panels), 1.33 * B * H / W + 0.8), layout="constrained")
    for row, axes in enumerate(figure.subplots(B, len(panels), squeeze=False)):
        top, left, bottom, right = boxes[row].tolist()
        for ax, (method, panel) in zip(axes, panels.items()):
            ax.imshow(panel[row], cmap="gray" if method == "scene" else "inferno", vmin=0,
                      extent=(0, W, H, 0))
            if method != "scene":
                ax.contour(scene[row], [0.5], colors="w", linewidths=0.7, extent=(0, W, 0, H))
            ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "c", lw=1)
            ax.set(xticks=[], yticks=[], title="" if row else method)
        axes[0].set_ylabel(ylabels[row])
    run.figure(name, title, figure)

def draw_examples(run, model, x, boxes, labels, logits, rows):
    """Maps for five right and five wrong answers; two scenes layer by layer."""
    answers, sure, labels = logits.argmax(1), logits.softmax(1).amax(1), labels.cpu()
    for name, chosen in (("right", answers == labels), ("wrong", answers != labels)):
        some = chosen.nonzero()[:5, 0]
        if len(some):
            says = [f"{labels[i]} read as {answers[i]}\n({100 * sure[i]:.0f}%)" for i in some]
            points = 100 * rows["rollout"][chosen, 0].mean()
            some = some.to(x.device)
            draw_maps(run, f"maps_{name}", f"Answers that are {name} ({chosen.sum()} of "
                      f"{len(chosen)}): rollout points at the digit in {points:.0f}%",
                      x[some], boxes[some], explain(model, x[some], run.config)[1], says)
    _, _, raw, rolled = explain(model, x[:2], run.config)
    both = torch.stack([patch_map(raw), patch_map(rolled)], 2).flatten(1, 2)  # in turn: (L, 4, n)
    draw_maps(run, "layers", "Rollout gathers the layers before it\n(class token; each map over "
              "its maximum)", x[:2].repeat_interleave(2, 0), boxes[:2].repeat_interleave(2, 0),
              {f"layer {i}": m for i, m in enumerate(both, 1)}, ["raw", "rollout"] * 2)

def draw_layers(run, layers, n):
    """Entropy, pointing and mass of raw attention and rollout by layer; n patches."""
    left, right = (figure := Figure((9.5, 4), layout="constrained")).subplots(1, 2)
    for (name, values), style in zip(layers.items(), ("C2^", "C0o")):
        token, every, points, share = values.mean(2).T.numpy()  # (L, 4, B) -> 4 x (L,)
        depth = range(1, len(token) + 1)
        left.plot(depth, token, style + "-", label=f"{name}, class token")
        left.plot(depth, every, style + ":", mfc="w", label=f"{name}, all tokens")
        right.plot(depth, 100 * points, style + "-", label=f"{name}: points at the digit")
        right.plot(depth, 100 * share, style + ":", mfc="w", label=f"{name}: mass in the box")
    left.axhline(math.log(n + 1), color="gray", lw=0.8, label=f"uniform: ln {n + 1}")
    left.set(xlabel="layer", ylabel="entropy of a row (nats)", xticks=depth, ylim=(0, None))
    right.set(xlabel="layer", ylabel="% of scenes, % of mass", xticks=depth, ylim=(0, 102))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    ends = layers["raw attention"].mean(2)[[0, -1], 0].tolist()
    run.figure("by_layer", "From the first to the last layer the entropy of the class token's raw "
               f"attention goes from {ends[0]:.2f} to {ends[1]:.2f} nats", figure)

def draw_measures(run, counts, rows, table):
    """Bars of pointing and mass; the curves of deletion."""
    left, right = (figure := Figure((10, 4.2), layout="constrained")).subplots(1, 2)
    painted = [100 * count / counts[-1] for count in counts]
    for place, (name, values) in enumerate(rows.items()):
        color, style = STYLES.get(name, ("k", "x-"))
        row = {k: 100 * v for k, v in table[name].items()}
        left.barh(place - 0.2, row["pointing"], 0.4, color=color)
        left.barh(place + 0.2, row["mass"], 0.4, color=color, alpha=0.4)
        right.plot(painted, 100 * values[:, 2:].mean(0).numpy(), style, color=color, ms=4,
                   label=f"{name}: {row['deletion']:.1f}")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set(xlabel="strongest patch on the digit; pale: mass in its box (%)", xlim=(0, 100))
    right.set_xscale("function", functions=(np.sqrt, np.square))  # the start is what matters
    right.set(xlabel="patches painted black, strongest first (%)", xlim=(0, 100),
              ylabel="probability of the right class (%)", xticks=(1, 5, 10, 20, 40, 60, 100),
              title="the faster it falls, the better the map")
    right.legend(fontsize=8, title="mean of the curve", framealpha=0.5)
    one, other = (100 * table[name]["pointing"] for name in ("rollout", "last layer"))
    run.figure("measures", f"Rollout points at the digit in {one:.1f}% of {len(rows['rollout'])} "
               f"scenes, the last layer's attention in {other:.1f}%", figure)

def draw_training(run):
    """Loss and accuracy over training."""
    left, right = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    epochs = [row["epoch"] for row in run.history]
    left.semilogy(epochs, [row["loss"] for row in run.history], "o-", label="training")
    left.semilogy(epochs, [row["test_loss"] for row in run.history], "s-", label="test")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats; chance: ln 10 = 2.3)")
    left.legend()
    right.plot(epochs, [100 * row["test_accuracy"] for row in run.history], "o-")
    right.set(xlabel="epoch", ylabel="accuracy on test scenes (%)")
    run.figure("training", "A Vision Transformer learns to read a digit among clutter", figure)

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
    images, labels, test_images, test_labels = run.data()
    size = c.height, c.width
    test, boxes = scenes(test_images, test_images, size, c.clutter,
                         torch.Generator().manual_seed(1))
    model = VisionTransformer(size, c.embed_dim, c.depth, c.num_heads).to(run.device)
    run.load(model)
    train(run, model, images, labels, test, test_labels)
    run.save(model)
    results = evaluate(model, test, test_labels)
    print("test scenes: cross-entropy {test_loss:.4f} nats (chance: ln 10 = 2.30), accuracy "
          "{test_accuracy:.2%} (chance 10%)".format(**results))
    few = slice(c.explain)
    logits, counts, rows, layers = study(run, model, test[few], test_labels[few], boxes[few])
    print("maps: pointing and mass, more is better (uniform: chance); deletion, less is better")
    table = {}
    for name, values in rows.items():
        points, share, curve = *values[:, :2].mean(0).tolist(), values[:, 2:].mean(0)
        area = torch.trapezoid(curve, torch.tensor(counts) / counts[-1]).item()
        table[name] = dict(pointing=points, mass=share, deletion=area)
        print(f"{name:15} " + "  ".join(f"{k} {100 * v:5.1f}%" for k, v in table[name].items()))
    draw_training(run)
    draw_examples(run, model, test[few], boxes[few], test_labels[few], logits, rows)
    draw_layers(run, layers, counts[-1])
    draw_measures(run, counts, rows, table)
    what = "entropy", "entropy_all_tokens", "pointing", "mass"
    by_layer = {name: dict(zip(what, v.mean(2).T.tolist())) for name, v in layers.items()}
    return run.finish(**results, test_accuracy_chance=0.1, scenes=len(logits), maps=table,
                      by_layer=by_layer)

if __name__ == "__main__":
    launch(main)
