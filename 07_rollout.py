"""Attention rollout: where does a Vision Transformer look, and is that map right?

    W(l)                               mean attention of layer l       merge_heads
    A(l) = (W(l) + I) / 2              I: the skip connection          Block
    Ã(1) = A(1), Ã(l) = A(l) Ã(l-1)    how much of j is in token i     attention_rollout
    map                                the class token's row           patch_map

A Vision Transformer reads a digit among pieces of other digits. Its class token
answers, so how much of each patch has reached it? Rollout multiplies the attention of
all layers. We know where the digit is, so a map can be measured: does its strongest
patch touch the digit (pointing)? How much of it lies there (mass)? How fast does the
answer fall when the strongest patches go black (deletion)?

    python 07_rollout.py            6-13 minutes on two CPU cores
    python 07_rollout.py --quick    a smoke test; --epochs 6 --train-size 10000: short

Expect  Rollout points at the digit in 100% of scenes, the last layer in 23 to 52%.
        Untrained, rollout still gets 73%: a map can be right and explain nothing.
Read    `attention_rollout` and `explain`.
Try     easy: --clutter 12 --out out/clutter12. Which maps get worse?
        medium: one more line in `explain`: rollout of head 0 alone (keep its axis).
        harder: `explain` the trained model of 04_vit.py, in a script of your own.
Paper   Abnar, Zuidema: Quantifying Attention Flow in Transformers, arXiv:2005.00928
Text    第5章 演習問題の解答, ex. 5.2
"""

import argparse
import copy
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
    "epochs": (11, "passes over the training images; 0: none"),
    "batch_size": (64, "scenes per step"),
    "lr": (3e-3, "highest learning rate"),
    "clutter": (4, "pieces of other digits in a scene; 0: none"),
    "measured": (1000, "test scenes on which maps are measured"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/07_rollout", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"epochs": 3, "train_size": 512, "measured": 20}


# ---- Lesson one: rollout, and other maps ---------------------------------------------
def merge_heads(attention):
    """Return W (B, N, N), the mean over the heads of attention (B, h, N, N)."""
    W = attention.mean(1)
    # Rows still sum to 1 if heads are merged in another way (a maximum, entries set to
    # 0), except rows of zeros.
    return W / W.sum(2, keepdim=True).clamp(min=1e-12)


def attention_rollout(attentions, kept=0.5):
    """Return Ã(L) (B, N, N) from the attention (B, h, N, N) of each layer.

    Row i says how much of each input token is in token i.

    Entry (i, j) of a matrix product is a sum over all paths from j to i. `kept` is the
    share that a token keeps of itself: by convention ½, for the skip connection (ex.
    5.2); 0 ignores it. The MLP mixes no tokens, and is left out.
    """
    identity = torch.eye(attentions[0].shape[3]).to(attentions[0])
    rollout = identity
    for attention in attentions:
        A = (1 - kept) * merge_heads(attention) + kept * identity
        rollout = A @ rollout  # Ã(l) = A(l) Ã(l-1)
    return rollout


def gradient_rollout(attentions, logits):
    """Return R (B, N, N): rollout of the attention that raises the highest logit.

    R <- R + E_h[max(0, ∇a ⊙ a)] R, with the mean over heads E_h, the attention a of a
    layer, and the gradient ∇a of the highest logit (Chefer, Gur, Wolf: Generic
    Attention-model Explainability, arXiv:2103.15679, eq. 5 and 6).
    """
    gradients = torch.autograd.grad(logits.amax(1).sum(), attentions, retain_graph=True)
    R = torch.eye(attentions[0].shape[3]).to(logits)
    for attention, gradient in zip(attentions, gradients):
        R = R + (gradient * attention).clamp(min=0).mean(1) @ R
    return R


def patch_map(matrix):
    """Return what the class token, number 0, takes from each patch: (B, N), sum 1."""
    row = matrix[:, 0, 1:].detach() + 1e-12  # if it takes nothing: uniform
    return row / row.sum(1, keepdim=True)


def explain(model, x):
    """Return maps (B, N) of where the model looks in x (B, 1, H, W), by name.

    model.look(x) returns logits, and the attention (B, h, N, N) of each layer that they
    were computed from. Token 0 must be the class token, which the head reads.
    """
    model.eval()
    x = x.detach().requires_grad_()  # gives even a frozen model gradients
    logits, attentions = model.look(x)
    # For an entropy, take single heads: their mean is always closer to uniform.
    W = torch.stack([merge_heads(attention) for attention in attentions])
    matrices = {
        "last layer": W[-1],
        "mean of layers": W.mean(0),
        "without residual": attention_rollout(attentions, kept=0),
        "rollout": attention_rollout(attentions),
        "gradient": gradient_rollout(attentions, logits),
    }
    return {name: patch_map(matrix) for name, matrix in matrices.items()}


# ---- The model, a small Vision Transformer -------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D), and who looks at whom.

    Row i of the attention (B, h, N, N) says how much token i takes from each token.
    Equations 5 to 8 are in appendix A of the ViT paper.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, h, D/h)
        q, k, v = qkv.transpose(1, 3).unbind(2)                  # (B, h, N, D/h) each
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5       # (B, h, N, N)
        attention = scores.softmax(3)                            # rows sum to 1, eq. 6
        heads = attention @ v                                    # (B, h, N, D/h), eq. 7
        out = heads.transpose(1, 2).flatten(2)                   # (B, N, D)
        return self.proj(out), attention                         # eq. 8


class Block(nn.Module):
    """A Transformer block; the x kept in `x + out` is the I of rollout."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
        )

    def forward(self, x):
        out, attention = self.attn(self.norm1(x))
        x = x + out
        return x + self.mlp(self.norm2(x)), attention


class VisionTransformer(nn.Module):
    """Scenes (B, 1, 48, 48) -> logits (B, 10); a token for each patch of 8x8 pixels."""

    def __init__(self, dim=64, depth=4, num_heads=4):
        super().__init__()
        # Three convolutions learn faster than one linear map of each patch; a token
        # sees its patch and 3 pixels around it (Xiao et al., arXiv:2106.14881).
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, dim, 2, stride=2),
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 37, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def look(self, x):
        """Return logits (B, 10), and the attention of each layer (B, h, 37, 37)."""
        x = self.stem(x).flatten(2).transpose(1, 2)            # (B, 36, D)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([cls_token, x], 1) + self.pos_embed      # (B, 37, D)
        attentions = []
        for block in self.blocks:
            x, attention = block(x)
            attentions.append(attention)
        # Only token 0 is read: the last block's patch tokens get no gradient.
        return self.head(self.norm(x[:, 0])), attentions

    def forward(self, x):
        logits, _ = self.look(x)
        return logits


# ---- Scenes --------------------------------------------------------------------------
def window(top, left, size):
    """Return indices of a square at (top, left) in each of B pictures (B, H, W)."""
    steps = torch.arange(size, device=top.device)
    picture = torch.arange(len(top), device=top.device)[:, None, None]
    return picture, top[:, None, None] + steps[:, None], left[:, None, None] + steps


def paste(canvas, pictures, top, left):
    """Write each picture into its canvas; where both have ink, the brighter wins."""
    place = window(top, left, pictures.shape[2])
    canvas[place] = canvas[place].maximum(pictures)


def scenes(digits, pool, clutter=4):
    """Put each digit, uint8 (B, 28, 28), at a random place among scraps of the pool.

    Returns scenes (B, 1, 48, 48), black at -1 and white at 1, and boxes (B, 4) of the
    digits' ink: top, left, bottom, right in pixels.
    """
    assert digits.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    B, device = len(digits), digits.device
    canvas = digits.new_zeros(B, 48, 48)
    for _ in range(clutter):
        source = pool[torch.randint(len(pool), [B], device=device)]
        cut = torch.randint(4, 18, [2, B], device=device)  # inside the margin
        piece = source[window(*cut, 8)]  # (B, 8, 8)
        paste(canvas, piece, *torch.randint(41, [2, B], device=device))
    top, left = torch.randint(21, [2, B], device=device)
    paste(canvas, digits, top, left)
    rows = digits.amax(2).sign()  # (B, 28): 1 where a row has ink
    columns = digits.amax(1).sign()
    box = [
        top + rows.argmax(1),
        left + columns.argmax(1),
        top + 28 - rows.flip(1).argmax(1),
        left + 28 - columns.flip(1).argmax(1),
    ]
    return canvas[:, None].float() / 127.5 - 1, torch.stack(box, 1)


# ---- Training ------------------------------------------------------------------------
def train(args, model, images, labels, history):
    """Minimize the cross-entropy on new scenes of uint8 images (N, 28, 28)."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(args.batch_size):
            x, _ = scenes(images[batch], images, args.clutter)
            loss = F.cross_entropy(model(x), labels[batch])
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


# ---- Second lesson: is a map right? (you can skip it) --------------------------------
# Three measures, each with a weakness: pointing looks at one patch only, mass favors
# sharp maps, and deletion (the area under the curve: lower is better) shows the model
# scenes unlike any that it was trained on. So we also measure maps that come from no
# model (brightness, called ink; random numbers; the box itself), and a model before
# training, whose deletion says nothing, because it is always at chance.
FRACTIONS = [(i / 6) ** 2 for i in range(7)]  # 0, 1, 4, 9, ... of 36: dense at first


def to_pixels(maps):
    """Spread values of patches (B, 36), row by row, over pixels: (B, 1, 48, 48)."""
    return F.interpolate(maps.view(len(maps), 1, 6, 6), scale_factor=8)


def overlap(boxes):
    """Return the fraction of each patch that lies in the box: (B, 4) -> (B, 36)."""
    top, left, bottom, right = boxes.T[:, :, None]  # (B, 1) each
    pixel = torch.arange(48, device=boxes.device)
    rows = (top <= pixel) & (pixel < bottom)  # (B, 48)
    columns = (left <= pixel) & (pixel < right)
    inside = (rows[:, :, None] & columns[:, None]).float()  # (B, 48, 48)
    return F.avg_pool2d(inside, 8).flatten(1)


def pointing(maps, inside):
    """Return 1 where the strongest patch touches the box, else 0; ties are averaged."""
    strongest = maps == maps.amax(1, keepdim=True)
    return (strongest & (inside > 0)).sum(1) / strongest.sum(1)


def mass(maps, inside):
    """Return the fraction of each map that lies in the box, 0 for a map of zeros."""
    return (maps * inside).sum(1) / maps.sum(1).clamp(min=1e-30)


@torch.no_grad()
def deletion(model, x, labels, maps):
    """Return p(right class), (B, K), as more of the strongest patches go black.

    For insertion, exchange x and -1.0 and keep the order; then higher is better.
    """
    order = maps.argsort(dim=1, descending=True, stable=True)
    curve = []
    for fraction in FRACTIONS:
        gone = order[:, : round(fraction * 36)]
        keep = torch.ones_like(maps).scatter(1, gone, 0)  # 0: this patch goes black
        logits = model(torch.where(to_pixels(keep) > 0, x, -1.0))
        curve.append(logits.softmax(1).gather(1, labels.long()[:, None]))
    return torch.cat(curve, 1)


def measure(model, x, labels, boxes):
    """Return the three measures, and the curves of deletion (7,), by map name."""
    maps, inside = explain(model, x), overlap(boxes)
    maps["ink"] = F.avg_pool2d(x + 1, 8).flatten(1)
    maps["random"] = torch.rand_like(inside)
    maps["the box"] = inside
    results, curves = {}, {}
    for name, values in maps.items():
        assert (values >= 0).all(), f"the map {name} is negative or NaN"
        curve = curves[name] = deletion(model, x, labels, values).mean(0).cpu()
        results[name] = {
            "pointing": pointing(values, inside).mean().item(),
            "mass": mass(values, inside).mean().item(),
            "deletion": torch.trapezoid(curve, torch.tensor(FRACTIONS)).item(),
        }
    return results, curves


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels, source = load_data(args)
    model = VisionTransformer().to(args.device)
    untrained = copy.deepcopy(model)
    load_weights(args, model)
    history = []
    try:
        train(args, model, images, labels, history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    model.eval()
    torch.manual_seed(args.seed)  # the same scenes for a model that is loaded
    x, boxes = scenes(test_images, test_images, args.clutter)
    with torch.no_grad():
        answers = torch.cat([model(batch).argmax(1) for batch in x.split(500)])
    results = {"accuracy (chance 0.1)": (answers == test_labels).float().mean().item()}
    data = [tensor[: args.measured] for tensor in (x, test_labels, boxes)]
    results["trained"], curves = measure(model, *data)
    results["untrained"], _ = measure(untrained, *data)
    save_metrics(args, results=results, history=history, data=source)
    plot_measures(args, results, curves)
    plot_maps(args, x[:8], explain(model, x[:8]))


def plot_measures(args, results, curves):
    """Plot curves of deletion, and pointing and mass before and after training."""
    plt.figure(figsize=(15, 5), layout="constrained")
    for place, key in (131, "pointing"), (132, "mass"):
        plt.subplot(place)
        for network, height in [("untrained", 0.8), ("trained", 0.4)]:
            values = [row[key] for row in results[network].values()]
            plt.barh(list(results[network]), values, height, label=network)
        plt.xlabel(key)
        plt.legend()
    plt.subplot(133)
    for name, curve in curves.items():
        plt.plot(FRACTIONS, curve, ".-", label=name)
    plt.xlabel("fraction of patches blackened, strongest first")
    plt.ylabel("probability of the right class")
    plt.legend()
    plt.savefig(f"{args.out}/measures.png")


def plot_maps(args, x, maps):
    """Show scenes x (B, 1, 48, 48) and maps (B, 36), each scaled to at most 1."""
    x = (x + 1) / 2
    columns = [x]
    for values in maps.values():
        light = to_pixels(values / values.amax(1, keepdim=True).clamp(min=1e-30))
        columns.append(light * (0.3 + 0.7 * x))
    tiles = torch.stack(columns, 1).flatten(0, 1)
    plt.figure(figsize=(9, 12), layout="constrained")
    show_grid(tiles, len(columns), "scene, " + ", ".join(maps))
    plt.savefig(f"{args.out}/maps.png")


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
