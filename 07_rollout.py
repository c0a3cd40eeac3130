"""Attention rollout: what does a Vision Transformer look at, and how can such maps be judged?

    W(l)                                 attention of layer l, mean over the heads; rows sum to 1
    A(l) = (W(l) + I) / 2                I: the skip connection, by which a token also keeps itself
    Ã(1) = A(1),  Ã(l) = A(l) Ã(l-1)     rollout: what each token takes from each input token
    map                                  class token's row of Ã(L) without its own entry, sum 1

Measures A Vision Transformer reads a digit among pieces of other digits. Pointing: does the
         strongest patch of a map touch the digit's box? Mass: the fraction of the map in the box.
         Deletion: mean p(right class) as patches go black, strongest first; here low is good.
Sources  Rollout: Quantifying Attention Flow in Transformers, Abnar, Zuidema, arXiv:2005.00928
         Gradient: Generic Attention-model Explainability, Chefer, Gur, Wolf, arXiv:2103.15679
         Stem: Early Convolutions Help Transformers See Better, Xiao et al., arXiv:2106.14881
         text: 第5章 演習問題の解答, ex. 5.2
Run      python 07_rollout.py    (--quick for a smoke test, --help for the settings)
Expect   7 minutes on two CPU cores (AMD EPYC, real MNIST, 2026-11-26); two pictures. Test accuracy
         95.5% (seed 1: 94.9%; chance 10%). Measures of 1,000 scenes in %, for seed 0 and seed 1:
                               pointing      mass     deletion     before training: pointing, mass
           last layer          44   59     13   18     46   32      27   49     13   13
           mean of layers      88   98     27   34     18   16      26   71     13   13
           without residual   100  100     66   68     16   15      73   58     14   13
           rollout            100  100     42   46     16   15      72   60     13   13
           gradient            99  100     47   56     16   14      17   64     12   14
           ink: no model       82          46          16         random map: 26, 13, 38
         Rollout finds the digit; the last layer often misses it. But pointing is up to 73% before
         training, and ink alone has as much mass as rollout; only "without residual" has far more.
Read     Start with `attention_rollout` and `explain`; the rest can wait.
Try      easy: --clutter 12: which maps get worse?
         medium: one more line in `explain`: rollout of head 0 alone.
         harder: `explain` the model of 04_vit.py (import it with importlib; train it first).
"""

import argparse
import copy
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
    add("--out", default="out", help="parent folder; results go to its subfolder 07_rollout")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine")
    add("--epochs", type=int, default=11, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="scenes per step")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--train-size", type=int, default=60000, help="number of training images")
    add("--load", help="a model.pt to start from; --epochs 0 only evaluates it")
    add("--quick", action="store_true", help="smoke test: a short run on 512 images")
    add("--clutter", type=int, default=4, help="number of pieces of other digits in a scene")
    args = parser.parse_args(argv)
    if args.quick:  # flags given on the command line override these
        parser.set_defaults(epochs=2, train_size=512)
        args = parser.parse_args(argv)
    if min(args.epochs, args.clutter) < 0 or min(args.batch_size, args.lr, args.train_size) <= 0:
        parser.error("--epochs and --clutter must be >= 0; --batch-size, --lr and --train-size > 0")
    args.out += "/07_rollout"
    return args


# ---- Rollout and other maps ----------------------------------------------------------
def attention_rollout(attentions, residual=True):
    """Attention (B, h, N, N) of layers in order -> (B, N, N); row i: what token i takes in."""
    identity = rollout = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention in attentions:
        W = attention.mean(1)  # the mean over the heads: (B, h, N, N) -> (B, N, N)
        A = (W + identity) / 2 if residual else W  # the skip connection; rows of W and I sum to 1
        rollout = A @ rollout  # Ã(l) = A(l) Ã(l-1)
    return rollout


def gradient_rollout(attentions, logits):
    """R ← R + E_h[(∇A ⊙ A)⁺] R, A the raw attention, ∇A the top logit's gradient (eq. 5, 6)."""
    gradients = torch.autograd.grad(logits.amax(1).sum(), attentions)
    R = torch.eye(attentions[0].shape[-1]).to(logits)
    for attention, gradient in zip(attentions, gradients):
        R = R + (gradient * attention).clamp(min=0).mean(1) @ R
    return R  # (B, N, N)


def patch_map(matrix):
    """What the class token, number 0, takes from each patch: (B, 1 + N, 1 + N) -> (B, N), sum 1."""
    row = matrix[:, 0, 1:].detach()
    row = row + (row.sum(1, keepdim=True) == 0)  # uniform if the class token takes nothing
    return row / row.sum(1, keepdim=True)


def explain(model, x):
    """Maps (B, N), all ≥ 0, of where the model looks in x (B, 1, H, W), by name; needs autograd."""
    logits, attentions = model(x, return_attention=True)
    W = torch.stack(attentions).mean(2)  # (L, B, h, 1 + N, 1 + N) -> (L, B, 1 + N, 1 + N)
    matrices = {"last layer": W[-1], "mean of layers": W.mean(0),
                "without residual": attention_rollout(attentions, residual=False),
                "rollout": attention_rollout(attentions),
                "gradient": gradient_rollout(attentions, logits)}
    return {name: patch_map(matrix) for name, matrix in matrices.items()}


# ---- Measures ------------------------------------------------------------------------
def to_pixels(maps, size):
    """One value per patch (B, N) -> one per pixel (B, 1, size, size)."""
    side = math.isqrt(maps.shape[1])
    return F.interpolate(maps.view(-1, 1, side, side), size=size)  # N = side², row by row


def overlap(boxes, size, N):
    """The fraction of each of N patches that lies in the box: (B, 4) in pixels -> (B, N)."""
    inside = torch.zeros(len(boxes), 1, size, size)
    for image, (top, left, bottom, right) in zip(inside, boxes):
        image[0, top:bottom, left:right] = 1
    return F.avg_pool2d(inside, size // math.isqrt(N)).flatten(1).to(boxes.device)


def pointing(maps, inside):
    """1 where the strongest patch touches the box, else 0; ties are averaged: (B,)."""
    strongest = maps == maps.amax(1, keepdim=True)
    return (strongest & (inside > 0)).sum(1) / strongest.sum(1)


def mass(maps, inside):
    """The fraction of the map that lies in the box: (B,); 0 for a map of zeros."""
    return (maps * inside).sum(1) / maps.sum(1).clamp(min=1e-30)


@torch.no_grad()
def deletion(model, x, labels, maps, fractions):
    """Probability of the right class (B, K) with each of K fractions of patches black."""
    rank = maps.argsort(dim=1, descending=True, stable=True).argsort(1)  # 0: the strongest patch
    rank = to_pixels(rank.float(), x.shape[2])
    probabilities = []
    for fraction in fractions:
        logits = model(torch.where(rank >= round(fraction * maps.shape[1]), x, -1.0))
        probabilities.append(logits.softmax(1).gather(1, labels[:, None]))
    return torch.cat(probabilities, 1)


def measure(model, x, labels, boxes):
    """The means of the three measures, and the mean deletion curve, by the name of the map."""
    maps = explain(model, x)
    N = next(iter(maps.values())).shape[1]  # patches
    inside = overlap(boxes, x.shape[2], N)
    ink = F.adaptive_avg_pool2d(x + 1, math.isqrt(N)).flatten(1)  # no model: how bright a patch is
    maps |= {"ink": ink, "random": torch.rand_like(inside), "the box": inside}  # for comparison
    fractions = [(i / 6) ** 2 for i in range(7)]  # 0, 1, 4, 9, ... of 36 patches
    rows, curves = {}, {}
    for name in maps:
        curve = curves[name] = deletion(model, x, labels, maps[name], fractions).mean(0).cpu()
        rows[name] = {"pointing": pointing(maps[name], inside).mean().item(),
                      "mass": mass(maps[name], inside).mean().item(),
                      "deletion": torch.trapezoid(curve, torch.tensor(fractions)).item()}
    return rows, curves


# ---- The model, a small Vision Transformer -------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D), and the attention (B, h, N, N)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3D) -> (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
        attention = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)  # (B, h, N, N)
        heads = attention @ v  # (B, h, N, D/h)
        return self.proj(heads.transpose(1, 2).flatten(2)), attention  # (B, N, h, D/h) -> (B, N, D)


class Block(nn.Module):
    """A Transformer block on x (B, N, D); the x kept in `x + out` is the I of rollout."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):
        out, attention = self.attn(self.norm1(x))
        x = x + out
        return x + self.mlp(self.norm2(x)), attention


class VisionTransformer(nn.Module):
    """Scenes (B, 1, size, size) -> logits (B, 10); a token for each patch of 8x8 pixels."""

    def __init__(self, size=48, dim=64, depth=4, num_heads=4):
        super().__init__()
        self.stem = nn.Sequential(  # learns faster than one linear map per patch (Xiao et al.)
            nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, dim, 2, stride=2))  # a token sees its patch and 3 pixels around it
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 8) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)
        nn.init.normal_(self.head.weight, std=0.02)  # the first predictions are nearly uniform

    def forward(self, x, return_attention=False):
        x = self.stem(x).flatten(2).transpose(1, 2)  # (B, D, H/8, W/8) -> (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        attentions = []
        for block in self.blocks:
            x, attention = block(x)
            attentions.append(attention)
        logits = self.head(self.norm(x[:, 0]))  # (B, D) -> (B, 10)
        return (logits, attentions) if return_attention else logits


# ---- Scenes --------------------------------------------------------------------------
def scenes(digits, pool, clutter=4, generator=None, size=48):
    """Puts each digit, uint8 (B, 28, 28), at a random place, among 8x8 pieces of the pool's images.

    Returns scenes (B, 1, size, size) in [-1, 1], and the boxes (B, 4) of the digits' ink in pixels.
    """
    if digits.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0..255, not {digits.dtype}")
    B = len(digits)
    corners = torch.randint(size - 27, (B, 2), generator=generator).tolist()
    sources = torch.randint(len(pool), (B, clutter), generator=generator).tolist()
    cuts = torch.randint(4, 18, (B, clutter, 2), generator=generator).tolist()  # skip the margin
    places = torch.randint(size - 7, (B, clutter, 2), generator=generator).tolist()
    digits, pool = digits.numpy(), pool.numpy()
    canvas = np.zeros((B, size, size), np.uint8)
    boxes = []
    for i in range(B):
        for source, (y, x), (top, left) in zip(sources[i], cuts[i], places[i]):
            part = canvas[i, top : top + 8, left : left + 8]
            np.maximum(part, pool[source, y : y + 8, x : x + 8], out=part)  # the brighter pixel
        top, left = corners[i]
        part = canvas[i, top : top + 28, left : left + 28]
        np.maximum(part, digits[i], out=part)
        rows, columns = digits[i].nonzero()
        boxes.append([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    boxes = torch.tensor(boxes) + torch.tensor(corners).repeat(1, 2)  # top, left, bottom, right
    return torch.tensor(canvas)[:, None].float() / 127.5 - 1, boxes


# ---- Training ------------------------------------------------------------------------
def train(args, model, images, labels, history, device):
    """Minimizes the cross-entropy on new scenes of uint8 images (N, 28, 28); fills `history`."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    steps = args.epochs * math.ceil(len(images) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, max(steps, 1))  # lr up, down
    losses, step = [], 0
    began = time.time()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(images)).split(args.batch_size):
            x, _ = scenes(images[batch], images, args.clutter)
            loss = F.cross_entropy(model(x.to(device)), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            if step % math.ceil(steps / 20) == 0 or step == steps:
                mean_loss = sum(losses) / len(losses)
                losses = []
                history.append({"step": step, "loss": mean_loss})
                progress(step, steps, began, {"loss": mean_loss})


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    began = time.time()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)
    images, labels, test_images, test_labels, source = load_data(args)
    model = VisionTransformer().to(device)
    untrained = copy.deepcopy(model)
    if args.load:
        load_weights(args, model)
    history = []
    try:
        train(args, model, images, labels, history, device)
    except KeyboardInterrupt:
        print("Training stopped early; saving and evaluating the current model.")
    save_model(args, model)
    test = scenes(test_images, test_images, args.clutter, torch.Generator().manual_seed(1))
    x, boxes, test_labels = [tensor.to(device) for tensor in [*test, test_labels]]
    with torch.no_grad():
        predictions = torch.cat([model(batch).argmax(1) for batch in x.split(500)])
    results = {"accuracy (chance 0.1)": (predictions == test_labels).float().mean().item()}
    data = [tensor[: 50 if args.quick else 1000] for tensor in [x, test_labels, boxes]]
    results["trained"], curves = measure(model, *data)
    results["untrained"], _ = measure(untrained, *data)
    plot_measures(args, history, results, curves)
    plot_maps(args, x[:8], boxes[:8], explain(model, x[:8]))
    print(json.dumps(results, indent=1))
    save_metrics(args, results, history, source, began)


def plot_measures(args, history, results, curves):
    """Draws the loss, the deletion curves, and pointing and mass, trained and untrained."""
    axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")[1].flatten()
    axes[0].semilogy([row["step"] for row in history], [row["loss"] for row in history])
    axes[0].set(xlabel="step", title="cross-entropy in nats (chance: ln 10 = 2.3)")
    for name, curve in curves.items():
        axes[1].plot(torch.linspace(0, 1, len(curve)) ** 2, curve, ".-", label=name)
    axes[1].set(xlabel="fraction of patches deleted", title="probability of the right class")
    axes[1].legend()
    for axis, key in zip(axes[2:], ["pointing", "mass"]):
        for network, height in [("untrained", 0.8), ("trained", 0.4)]:
            values = [row[key] for row in results[network].values()]
            axis.barh(list(curves), values, height, label=network)
        axis.set(title=key)
    axes[3].legend()
    plt.savefig(f"{args.out}/measures.png")


def plot_maps(args, x, boxes, maps):
    """Draws scenes x (B, 1, H, W) with boxes (B, 4), and maps (B, N), each scaled to maximum 1."""
    x = (x.cpu() + 1) / 2
    tiles = [x.clone()]
    for scene, (top, left, bottom, right) in zip(tiles[0], boxes.tolist()):
        scene[0, top:bottom, [left, right - 1]] = 0.5
        scene[0, [top, bottom - 1], left:right] = 0.5
    for values in maps.values():
        light = to_pixels(values / values.amax(1, keepdim=True), x.shape[2]).detach().cpu()
        tiles.append(light * (0.3 + 0.7 * x))
    tiles = torch.stack(tiles, 1).flatten(0, 1)  # (B, 1 + K, 1, H, W) -> (B (1 + K), 1, H, W)
    columns = ["scene", *maps]
    _, axes = plt.subplots(figsize=(1.4 * len(columns), 1.4 * len(x)), layout="constrained")
    show_grid(axes, tiles, len(columns), "")
    axes.set_xticks([(x.shape[2] + 2) * (i + 0.5) for i in range(len(columns))], columns)
    plt.savefig(f"{args.out}/maps.png")


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
