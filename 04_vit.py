"""The Vision Transformer (ViT, arXiv:2010.11929): an image as a sentence of patches.

    input layer  z_0 = [x_class; x_1 E; ...; x_N E] + E_pos                         eq. 1
                 N patches x_i, one linear map E for all; a class token; positions
    encoder      z'_l = MSA(LN(z_{l-1})) + z_{l-1}                                  eq. 2
                 z_l  = MLP(LN(z'_l)) + z'_l                                        eq. 3
                 MSA: softmax(Q Kᵀ / √(D/h)) V in h heads of D/h channels each      eq. 5-8
    MLP head     y = LN(z_L^class), logits = W y + b                                eq. 4

Sections (§), appendices (App.) and equations are those of the paper, exercises (ex.) those of the
book's chapter 5. Parameters are named as in timm, so published weights load, in four lines:

    import importlib, timm
    vit = importlib.import_module("04_vit").VisionTransformer(224, 16, 3, 1000, 768, 12, 12)
    weights = timm.create_model("vit_base_patch16_224", pretrained=True).state_dict()
    vit.load_state_dict(weights, strict=True)        # and the same logits for the same image

Run     python 04_vit.py    (--quick: the whole path in seconds; --help: every setting)
Expect  on two CPU cores 5 minutes; five pictures and weights in out/04_vit; 98.99% of the test
        digits (chance 10%). Half of the 24 heads can be switched off for 2 points of accuracy.
        Letters drawn from fonts, which the network has never seen, 2,000 to test (chance 4%):
          examples of each letter         1     5    20   100     seconds for 100
          ridge on the ViT's features    36%   67%   82%   89%         0.5
          ridge on pixels                26%   49%   62%   74%         0.07
          fine-tuning, 100 steps         52%   80%   87%   89%         4
        With many examples the closed form is as good at an eighth of the time: the paper probes
        with it "to save compute". With few, fine-tuning may gain from the moved images it is shown.
        Real MNIST, seed 0, two cores of an AMD EPYC, 2026-11-22.
Try     easy: --pos none, and --pos sincos. Does the order of the patches matter to digits?
        medium: --num-heads 1, then --patch-size 4 (49 patches instead of 16).
        harder: the mean of the patches instead of the class token, as in the paper's App. D.3:
        `[:, 1:].mean(1)` for `[:, 0]` in `forward`.
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

@dataclass
class Config:
    """Settings. Each is a flag; its comment is the help, a bracket at the end what is allowed."""
    data: str = ""  # folder of the four MNIST files, or "drawn"; else $MNIST_DIR, else data/mnist
    out: str = "out"  # folder for pictures, metrics and weights
    device: str = "auto"  # where to compute [auto|cuda|mps|cpu]
    seed: int = 0  # of weights, noise and order [0..4294967295]
    epochs: int = 8  # passes over the training images [0..100000]
    batch_size: int = 128  # images a step [1..60000]
    lr: float = 3e-3  # learning rate: a short warm-up times a cosine down to 0 [0..1]
    train_size: int = 0  # training images to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate and draw
    quick: bool = False  # the whole path in seconds, on a few hundred images
    patch_size: int = 7  # pixels a side of a patch [2|4|7|14]
    embed_dim: int = 64  # D, width of a token [16|32|48|64|96|128|192|256]
    depth: int = 6  # blocks [1..48]
    num_heads: int = 4  # h, heads a block [1|2|4|8|16]
    pos: str = "learned"  # position embedding: learned, fixed sines, or none [learned|sincos|none]
    jitter: float = 0.7  # how far training images are turned, slanted, scaled, moved [0..2]
    weight_decay: float = 0.1  # of AdamW, on matrices only [0..10]
    lam: float = 10.0  # weight of the ridge in the few-shot probe [0.000001..1000000]
    shots: int = 100  # most letters a class that the few-shot comparison learns from [1..100]

PRESETS = dict(quick=dict(train_size=512, epochs=2, batch_size=32, depth=2, shots=5))
SHAPES = ("patch_size", "embed_dim", "depth", "num_heads", "pos")  # a checkpoint shares them
PIXELS = (-1, 1)  # black and white

# ---- Model ---------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Cuts an image (B, C, H, W) into N = HW/P² patches and embeds each (B, N, D): a convolution
    whose stride is its size is one linear map on every patch (eq. 1)."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # -> (B, D, H/P, W/P) -> (B, N, D)

class Attention(nn.Module):
    """Multi-head self-attention (App. A): every token takes from the others what it asks for."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, weights=False):
        """(B, N, D) -> (B, N, D); with `weights` also the attention (B, h, N, N)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # eq. 5: (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, D/h)
        if weights:
            attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)  # eq. 6
            heads = attention @ v  # eq. 7: (B, h, N, N) @ (B, h, N, D/h) -> (B, h, N, D/h)
        else:
            heads = F.scaled_dot_product_attention(q, k, v)  # the same without keeping the weights
        x = self.proj(heads.transpose(1, 2).flatten(2))  # eq. 8: (B, h, N, D/h) -> (B, N, D)
        return (x, attention) if weights else x

class Mlp(nn.Sequential):
    """Its parts, in order, on each token alone: (B, N, D) -> (B, N, 4D) -> (B, N, D)."""

    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

class Block(nn.Module):
    """Attention between tokens, then an MLP in each, both added to what comes in (eq. 2, 3)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

def sincos_positions(count, dim):
    """Fixed positions (count, dim): for token t the sine and cosine of t / 10000^(2i/dim) at 2i and
    2i + 1 (the text's cosine has one t too many)."""
    angle = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (count, dim/2, 2) -> (.., dim)

class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes). `pos`: learned, sincos or none."""

    def __init__(self, img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64,
                 depth=6, num_heads=4, pos="learned"):
        super().__init__()
        tokens = 1 + (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), pos == "learned")
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # small: every block starts close to the identity
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        if pos == "learned":  # std 0.02: with 1 they would drown the patches at the start
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif pos == "sincos":
            self.pos_embed.data[0] = sincos_positions(tokens, embed_dim)

    def layers(self, x):
        """(B, C, H, W) -> the tokens before the blocks and after each: z_0..z_L, (B, 1 + N, D)."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        tokens = [x + self.pos_embed]  # eq. 1
        for block in self.blocks:
            tokens.append(block(tokens[-1]))
        return tokens

    def forward_features(self, x):
        """(B, C, H, W) -> LN(z_L) (B, 1 + N, D), the class token first."""
        return self.norm(self.layers(x)[-1])

    def forward(self, x):
        return self.head(self.norm(self.layers(x)[-1][:, 0]))  # eq. 4: (B, 1 + N, D) -> (B, K)

    def attention_maps(self, x):
        """Attention in every block, L x (B, h, 1 + N, 1 + N); rows sum to 1."""
        return [block.attn(block.norm1(z), weights=True)[1]
                for block, z in zip(self.blocks, self.layers(x))]

# ---- What the features are worth -----------------------------------------------------------------

def ridge_probe(features, labels, classes, lam):
    """Few-shot training in closed form (ex. 5.1; paper, §4.1): the W (D + 1, K) that minimizes
    ‖X W - Y‖² + λ ‖W‖² solves (XᵀX + λI) W = XᵀY; X = [features, 1], features (n, D), targets Y
    (n, K) of -1 and 1."""
    x = F.pad(features.cpu(), (0, 1), value=1.0).double()  # (n, D + 1), a bias at the end
    targets = 2 * F.one_hot(labels.cpu(), classes).double() - 1
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + lam * eye, x.T @ targets)  # where the gradient vanishes

def probe_accuracy(W, features, labels):
    """Share of features (n, D) whose largest [features, 1] W is at the label."""
    scores = F.pad(features.cpu(), (0, 1), value=1.0).double() @ W  # (n, D + 1) -> (n, K)
    return (scores.argmax(1) == labels.cpu()).float().mean().item()

def cka(x, y):
    """Linear centered kernel alignment of two sets of features (n, D) and (n, E) of the same n
    images (arXiv:1905.00414 §3): 1 where they differ by rotation, scale and shift only."""
    x, y = (v.cpu().double() - v.cpu().double().mean(0) for v in (x, y))
    return ((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()

# ---- Training ------------------------------------------------------------------------------------

def scale(images):
    """uint8 (B, 28, 28) -> (B, 1, 28, 28) in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1

def jitter(x, amount=1.0):
    """Images (B, 1, H, W), each turned, slanted, scaled and moved a little, at random: a ViT knows
    little of space, so it has to be shown that a moved digit is the same digit."""
    angle, slant, size, right, down = amount * torch.tensor([0.5, 0.4, 0.3, 0.2, 0.2])[:, None] * (
        torch.rand(5, len(x)) - 0.5)
    cos, sin = (1 + size) * angle.cos(), (1 + size) * angle.sin()
    affine = torch.stack([cos, slant * cos - sin, right, sin, slant * sin + cos, down], 1)
    grid = F.affine_grid(affine.view(-1, 2, 3).to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

@torch.no_grad()
def evaluate(model, images, labels):
    """Cross-entropy in nats and accuracy on uint8 (N, 28, 28) and labels (N,)."""
    logits = torch.cat([model(scale(batch)) for batch in images.split(1000)])
    return dict(test_loss=F.cross_entropy(logits, labels).item(),
                test_accuracy=(logits.argmax(1) == labels).float().mean().item())

def adamw(model, lr, weight_decay):
    """AdamW that draws only matrices towards 0, not biases, norms, class token and positions."""
    groups = [dict(params=[p for p in model.parameters() if (p.dim() in (2, 4)) == matrix],
                   weight_decay=weight_decay * matrix) for matrix in (True, False)]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.99))

def train(run, model, images, labels, test_images, test_labels):
    """Minimizes the cross-entropy of uint8 (N, 28, 28) and their labels (N,)."""
    c, optimizer = run.config, adamw(model, run.config.lr, run.config.weight_decay)
    for index in run.batches(len(images), lambda: evaluate(model, test_images, test_labels)):
        with torch.autocast("cuda", torch.bfloat16, enabled=run.device.type == "cuda"):
            logits = model(jitter(scale(images[index]), c.jitter))
        loss = F.cross_entropy(logits.float(), labels[index])
        run.log(loss=loss)
        warm, done = min(1, (run.step + 1) / min(200, run.steps / 10)), run.step / run.steps
        for group in optimizer.param_groups:
            group["lr"] = c.lr * warm * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

# ---- What was learned ----------------------------------------------------------------------------

def switch_off(model, images, labels):
    """Accuracy on the second half of the images as heads are switched off one by one: first the
    head whose absence alone raises the loss on the first half the least."""
    half, size = len(images) // 2, model.head.in_features // model.blocks[0].attn.num_heads

    def without(places, part):
        bare = copy.deepcopy(model)
        for layer, head in places:  # nothing that it says gets through the map that joins heads
            bare.blocks[layer].attn.proj.weight.data[:, head * size:(head + 1) * size] = 0
        return evaluate(bare, images[part], labels[part])

    places = sorted(np.ndindex(len(model.blocks), model.blocks[0].attn.num_heads),
                    key=lambda place: without([place], slice(half))["test_loss"])
    return [without(places[:count], slice(half, None))["test_accuracy"]
            for count in range(len(places) + 1)]

@torch.no_grad()
def draw_inside(run, model, images, labels):
    """Position embeddings, CKA between layers, heads switched off, attention of the class token."""
    x, side = scale(images[:1000]), 28 // run.config.patch_size
    if run.config.pos != "none":
        pos = F.normalize(model.pos_embed[0, 1:], dim=1)  # (N, D), without the class token
        alike = pos @ pos.T / (pos @ pos.T).fill_diagonal_(0).abs().max()  # itself: out of range
        run.grid("positions", "One map a patch, at its place: its position embedding against\n"
                 "all others, cosine over its largest (white: alike, gray: 0)",
                 alike.view(-1, 1, side, side), side, (6, 6.5))
    tokens = [z.mean(1) for z in model.layers(x)]  # (L + 1) x (n, D), mean over an image
    left, right = (figure := Figure((9, 3.8), layout="constrained")).subplots(1, 2)
    table = [[cka(a, b) for a in tokens] for b in tokens]
    figure.colorbar(left.imshow(table, vmin=0, vmax=1, origin="lower"), ax=left)
    left.set(xlabel="after block", ylabel="after block", title="CKA (mean over the tokens)",
             xticks=range(len(tokens)), yticks=range(len(tokens)))
    accuracy = switch_off(model, images[:4000], labels[:4000])
    right.plot(100 * np.array(accuracy), ".-")
    right.axhline(10, color="gray", lw=0.8)
    right.set(xlabel="heads switched off, least missed first", ylabel="accuracy (%)",
              title=f"of {len(accuracy) - 1} heads (gray: chance)")
    run.figure("layers", "How alike the layers are, and how many heads are needed", figure)
    seen = torch.stack([a[:, :, 0, 1:].mean(1) for a in model.attention_maps(x[:8])], 1)
    seen = (seen / seen.amax(2, keepdim=True)).unflatten(2, (side, side))  # from (8, L, N)
    seen = F.interpolate(seen, scale_factor=run.config.patch_size)  # (8, L, 28, 28)
    lit = 2 * seen * (x[:8] + 1.3) / 2.3 - 1  # the image lit by it; black keeps 13%, to be seen
    run.grid("attention", "What the class token attends to, block by block, over its maximum",
             torch.cat([x[:8], lit], 1).flatten(0, 1)[:, None], len(tokens),
             (max(7.0, 1.1 * len(tokens) + 0.4), 9), "block",
             xticks=["image", *range(1, len(tokens))])
    return accuracy

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

@torch.no_grad()
def features(model, images):
    """uint8 (N, 28, 28) -> (N, 2 D): the class token and the mean of the patches, after LN."""
    tokens = torch.cat([model.forward_features(scale(batch)) for batch in images.split(1000)])
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)

def fine_tune(model, images, labels, steps=100):
    """A copy of the model with a new head, all of it trained, on moved images: the costly way."""
    model = copy.deepcopy(model)
    model.head = nn.Linear(model.head.in_features, len(LETTERS)).to(images.device)
    optimizer = adamw(model, 1e-3, 0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        index = torch.randint(len(images), (min(64, len(images)),), device=images.device)
        loss = F.cross_entropy(model(jitter(scale(images[index]))), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model

def draw_few_shot(run, model):
    """Letters learned from 1 to 100 of each in three ways (ex. 5.1): accuracy and seconds."""
    pool, names, test, truth = (v.to(run.device) for v in (
        *draw_characters(26 * 160, 2, LETTERS), *draw_characters(2000, 3, LETTERS)))
    ways = {"ridge, ViT features": lambda x: features(model, x),
            "ridge, pixels": lambda x: x.flatten(1) / 255, "fine-tuning": None}
    shots = [n for n in (1, 2, 5, 10, 20, 50, 100) if n <= run.config.shots]
    accuracy, seconds = {way: [] for way in ways}, {way: [] for way in ways}
    ridge_probe(features(model, pool[:99]), names[:99], 26, 1.0)  # the first call is slow
    left, right = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    for (way, f), style in zip(ways.items(), ("o-", "s--", "^:")):
        for n in shots:
            some = torch.cat([(names == k).nonzero()[:n, 0] for k in range(26)])
            began = time.time()
            if f:
                W = ridge_probe(f(pool[some]), names[some], 26, run.config.lam)
            else:
                tuned = fine_tune(model, pool[some], names[some])
                tuned.head.bias.tolist()  # until a GPU is done
            seconds[way].append(time.time() - began)
            accuracy[way].append(probe_accuracy(W, f(test), truth) if f
                                 else evaluate(tuned, test, truth)["test_accuracy"])
        left.plot(shots, 100 * np.array(accuracy[way]), style, label=way)
        right.loglog(shots, seconds[way], style)
        print(f"letters by {way:19}: " + ", ".join(
            f"{n}: {a:.0%} in {s:.2g} s" for n, a, s in zip(shots, accuracy[way], seconds[way])))
    left.axhline(100 / 26, color="gray", lw=0.8)
    left.set(xscale="log", xlabel="letters a class", ylabel="accuracy on 2,000 letters (%)")
    left.legend()
    right.set(xlabel="letters a class", ylabel="seconds to learn them")
    run.figure("few_shot", "A network trained on digits meets letters (gray: chance)", figure)
    return dict(shots=shots, few_shot_accuracy=accuracy, few_shot_seconds=seconds)

def draw_training(run):
    """Loss and accuracy over training."""
    left, right = (figure := Figure((9, 3.5), layout="constrained")).subplots(1, 2)
    names = "epoch", "loss", "test_loss", "test_accuracy"
    epochs, loss, test_loss, accuracy = np.array([[row[k] for k in names]
                                                  for row in run.history]).T
    left.semilogy(epochs, loss, label="training, moved")
    left.semilogy(epochs, test_loss, "o-", label="test")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats; chance: ln 10 = 2.3)")
    left.legend()
    right.plot(epochs, 100 * accuracy, "C1o-")
    right.set(xlabel="epoch", ylabel="accuracy on test images (%)")
    run.figure("training", f"{accuracy[-1]:.2%} of the test digits are read right", figure)

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
    model = VisionTransformer(28, c.patch_size, 1, 10, c.embed_dim, c.depth, c.num_heads, c.pos)
    run.load(model.to(run.device))
    train(run, model, images, labels, test_images, test_labels)
    run.save(model)
    results = evaluate(model, test_images, test_labels)
    print("test: cross-entropy {test_loss:.4f} nats (chance: ln 10 = 2.30), accuracy "
          "{test_accuracy:.2%} (chance 10%)".format(**results))
    draw_training(run)
    results["heads_switched_off"] = draw_inside(run, model, test_images, test_labels)
    return run.finish(**results, **draw_few_shot(run, model), test_accuracy_chance=0.1,
                      few_shot_accuracy_chance=1 / 26)

if __name__ == "__main__":
    launch(main)
