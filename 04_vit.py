"""The Vision Transformer (ViT): read an image as a sequence of patches.

    z_0 = [x_class; x_1 E; ...; x_N E] + E_pos    eq. 1: N patches x_i   embed
    z'_l = MSA(LN(z_{l-1})) + z_{l-1}             eq. 2: attention       Attention
    z_l = MLP(LN(z'_l)) + z'_l                    eq. 3: an MLP          Block
    y = LN(z_L^class)                             eq. 4: the read-out    features

Cut a digit into 4x4 patches, and turn each into a vector: a token. In each block they
ask each other what they know (attention), then each thinks for itself (the MLP). One
more, the class token, collects the answer. Only E_pos says where a patch was.

    python 04_vit.py            4-8 minutes on two CPU cores
    python 04_vit.py --quick    a smoke test; --epochs 6 --train-size 10000: a short run

Expect  99.2% test accuracy (chance 10%); results.png.
Read    `Attention`, `Block` and `VisionTransformer`; the rest can wait.
Try     easy: --patch-size 4 --out out/try, then 14. What is gained, what does it cost?
        medium: in `embed`, reorder the patches in one fixed way. Does it matter?
        harder: a masked autoencoder: `encode` some tokens of `embed`, predict the rest.
Paper   Dosovitskiy et al.: An Image is Worth 16x16 Words, arXiv:2010.11929
Texts   【読書記録】Vision Transfoer入門; 第5章 演習問題の解答, ex. 5.1
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
    "epochs": (12, "passes over the training images; 0: none"),
    "batch_size": (128, "images per step"),
    "lr": (2e-3, "highest learning rate"),
    "patch_size": (7, "side of a patch in pixels", 2, 4, 7, 14),
    "pos": ("learned", "positions", "learned", "sincos", "none"),
    "tune_steps": (200, "steps of fine-tuning on letters"),
    "judge": ("", "a samples.npz to score with the model of --load"),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/04_vit", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"train_size": 512, "tune_steps": 5}


# ---- Lesson one: the Vision Transformer ----------------------------------------------
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
    """A Transformer block: tokens z (B, N, D) -> (B, N, D), and the attention."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(dim, 4 * dim),
                act=nn.GELU(),
                fc2=nn.Linear(4 * dim, dim),
            )
        )

    def forward(self, z):
        out, attention = self.attn(self.norm1(z))
        z = z + out  # eq. 2
        return z + self.mlp(self.norm2(z)), attention  # eq. 3


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes).

    Parameters have timm's names: VisionTransformer(224, 16, 3, 1000, 768, 12, 12) loads
    its vit_base_patch16_224 with strict=True, for RGB images with pixels in [-1, 1].
    """

    def __init__(
        self,
        img_size=28,
        patch_size=7,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=6,
        num_heads=4,
    ):
        super().__init__()
        assert img_size % patch_size == 0, "patch_size must divide img_size"
        self.img_size = img_size
        tokens = 1 + (img_size // patch_size) ** 2
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)}
        )  # kernel = stride: one linear map E of each patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        # (More tokens need random starts: if they start equal, they stay equal.)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, tokens, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, x):
        """Turn images into tokens z_0 (B, 1 + N, D), the class token first (eq. 1)."""
        size = self.img_size
        assert x.shape[2:] == (size, size), f"expected images of {size} x {size} pixels"
        patches = self.patch_embed.proj(x)                      # (B, D, H/P, W/P)
        patches = patches.flatten(2).transpose(1, 2)            # (B, N, D), row by row
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)   # (B, 1, D)
        return torch.cat([cls_token, patches], 1) + self.pos_embed

    def encode(self, z):
        """Return [z_0, ..., z_L] and each block's attention, for any tokens z_0."""
        layers, attentions = [z], []
        for block in self.blocks:
            z, attention = block(z)
            layers.append(z)
            attentions.append(attention)
        return layers, attentions

    def features(self, x):
        """Read the class token: y (B, D), from which the head predicts (eq. 4)."""
        layers, _ = self.encode(self.embed(x))
        return self.norm(layers[-1][:, 0])

    def forward(self, x):  # `read` calls `features`: change the model there
        return self.head(self.features(x))


# ---- Training ------------------------------------------------------------------------
def to_float(images):
    """Turn uint8 images (B, H, W) into pixels in [-1, 1], (B, 1, H, W)."""
    assert images.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    return images[:, None].float() / 127.5 - 1


def jitter(x):
    """Distort each image (B, C, H, W), in [-1, 1], by a random map, to be ignored."""
    affine = 0.05 * torch.randn(len(x), 2, 3, device=x.device)
    affine += torch.eye(2, 3, device=x.device)
    grid = F.affine_grid(affine, x.shape, False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # black outside


def train(model, images, labels, epochs, batch_size, lr, history):
    """Minimize the cross-entropy on jittered uint8 images (N, H, W)."""
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(epochs):
        model.train()
        shuffled = torch.randperm(len(images), device=images.device)
        for batch in shuffled.split(batch_size):
            x = jitter(to_float(images[batch]))
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


@torch.no_grad()
def read(model, images):
    """Return `features` (N, D) of uint8 images (N, H, W)."""
    model.eval()  # nn.Dropout is off now; F.dropout would stay on
    return torch.cat([model.features(to_float(x)) for x in images.split(500)])


def accuracy(scores, labels):
    """Return how often scores (N, K) are highest at the label (N,)."""
    return (scores.argmax(1) == labels).float().mean().item()


# ---- Second lesson: fixed positions, or none (you can skip it) -----------------------
def sincos_positions(count, dim):
    """Return sin and cos of t / 10000^(2i/dim) in row t, columns 2i and 2i + 1.

    Tokens are counted in reading order; the class token is t = 0.
    """
    angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)  # (count, dim)


def fix_positions(model, pos):
    """Freeze a model's positions, loaded or not, at sines and cosines, or zero."""
    model.pos_embed.requires_grad_(False).zero_()
    if pos == "sincos":
        model.pos_embed += sincos_positions(*model.pos_embed[0].shape)


# ---- Third lesson: few-shot learning (you can skip it) -------------------------------
# A model that can read digits has features that also tell letters apart. The cheapest
# way to use them is least squares: a closed form, exact and fast (ex. 5.1). Fine-tuning
# changes the whole network, which pays off with more examples.
LETTERS = (
    "3c66667e666666007c66667c66667c003c66606060663c00786c6666666c7800"  # A B C D
    "7e60607c60607e007e60607c606060003c66606e66663e006666667e66666600"  # E F G H
    "3c18181818183c001e0c0c0c6c6c3800666c7870786c66006060606060607e00"  # I J K L
    "c3e7ffdbc3c3c30066767e7e6e6666003c66666666663c007c66667c60606000"  # M N O P
    "3c6666666e3c0e007c66667c786c66003c66703c0e663c007e18181818181800"  # Q R S T
    "6666666666663c00666666663c3c1800c3c3c3dbffe7c30066663c183c666600"  # U V W X
    "66663c18181818007e060c1830607e00"  # Y Z
)


def ridge(x, labels):
    """Return the W (D, K) that minimizes ‖x W - Y‖² + 10 ‖W‖² (ex. 5.1).

    The 10 suits features after a LayerNorm; standardize others before comparing them.
    """
    Y = 2 * F.one_hot(labels).float() - 1  # (N, K): 1 at the label and -1 elsewhere
    return torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]).to(x), x.T @ Y)


def few_shot(args, model):
    """Learn letters from n examples of each, in two ways; return the accuracies."""
    letters = draw_characters(8000, LETTERS)
    images, labels = [tensor.to(args.device) for tensor in letters]
    test_images, test_labels = images[6000:], labels[6000:]
    results = {}
    for n in (1, 5, 20, 100):
        x, y = images[: 26 * n], labels[: 26 * n]
        W = ridge(read(model, x), y)
        results[f"ridge, {n}"] = accuracy(read(model, test_images) @ W, test_labels)
        tuned = copy.deepcopy(model)
        tuned.head = nn.Linear(len(W), 26, device=args.device)
        epochs = args.tune_steps // math.ceil(26 * n / 32)
        train(tuned, x, y, epochs, batch_size=32, lr=1e-3, history=[])
        scores = tuned.head(read(tuned, test_images))
        results[f"fine-tuning, {n}"] = accuracy(scores, test_labels)
    return results


# ---- Fourth lesson: which layers are alike (you can skip it) -------------------------
def cka(x, y):
    """Return the linear centered kernel alignment of features (N, D) and (N, E).

    It needs many more images N than features: random features come out alike if N is
    small. Kornblith et al.: Similarity of Neural Network Representations Revisited,
    arXiv:1905.00414, section 3.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    return ((x.T @ y).norm() ** 2 / (x.T @ x).norm() / (y.T @ y).norm()).item()


# ---- A judge for the samples of 02, 03 and 05 (you can skip it) ----------------------
def frechet_distance(x, y):
    """Return ‖m_x - m_y‖² + tr(C_x + C_y - 2 (C_x C_y)^½) of features (N, D), (M, D).

    This is the squared distance between two Gaussians, as in FID (Heusel et al.: GANs
    Trained by a Two Time-Scale Update Rule, arXiv:1706.08500, eq. 6). The trace of a
    root is the sum of the roots of the eigenvalues.
    """
    x, y = x.cpu().double(), y.cpu().double()  # in float32 it can come out negative
    C_x, C_y = x.T.cov(), y.T.cov()
    roots = torch.linalg.eigvals(C_x @ C_y).real.clamp(min=0).sqrt()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return means + (C_x + C_y).trace() - 2 * roots.sum()


@torch.no_grad()
def judge(args, model, test_images):
    """Score the images (N, 28, 28) of the --judge file, and every ninth test image.

    All test images are the reference, so that their own ninth gets too small a
    distance. Compare sets of one size: fewer images have a larger distance.
    """
    assert args.load, "--judge needs a trained model: add --load"
    sets = dict(np.load(args.judge))
    labels = sets.pop("labels", None)
    sets["test images"] = test_images[::9]
    real = read(model, test_images)
    for name, images in sets.items():
        z = read(model, torch.as_tensor(images, device=args.device))
        certainty, digits = model.head(z).softmax(1).cpu().max(1)
        print(f"{name}: {(certainty > 0.95).float().mean():.1%} clear, "
              f"Frechet distance {frechet_distance(z, real):.2f}")
        if labels is not None and name == "images":
            print(f"  {(digits.numpy() == labels).mean():.1%} show the digit asked for")


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels, source = load_data(args)
    model = VisionTransformer(patch_size=args.patch_size)
    load_weights(args, model)
    if args.pos != "learned":
        fix_positions(model, args.pos)
    model.to(args.device)
    if args.judge:
        return judge(args, model, test_images)
    history = []
    try:
        train(model, images, labels, args.epochs, args.batch_size, args.lr, history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    results = few_shot(args, model)
    scores = model.head(read(model, test_images))
    results["digits (chance 0.1; on letters: 0.04)"] = accuracy(scores, test_labels)
    save_metrics(args, results=results, history=history, data=source)
    plot_results(args, model, to_float(test_images[:500]))


def class_attention(attention, patch_size):
    """Return what the class token looks at, (B, 1, 28, 28), scaled to at most 1.

    In the last layer this means something only if the class token is read out.
    """
    seen = attention[:, :, 0, 1:].mean(1)  # over heads: (B, N)
    seen = seen / seen.amax(1, keepdim=True)
    seen = seen.view(-1, 1, 28 // patch_size, 28 // patch_size)
    return F.interpolate(seen, scale_factor=patch_size)


@torch.no_grad()
def plot_results(args, model, x):
    """Plot attention for ten images, and how alike layers are on images x."""
    layers, attentions = model.encode(model.embed(x))
    maps = [class_attention(A[:10], args.patch_size) for A in attentions]
    plt.figure(figsize=(11, 5), layout="constrained")
    plt.subplot(1, 2, 1)
    title = "what the class token looks at, layers 1 to L"
    show_grid(torch.cat([(x[:10] + 1) / 2, *maps]), 10, title)
    plt.subplot(1, 2, 2)
    means = [z.mean(1) for z in layers]  # of all tokens: (B, D)
    plt.imshow([[cka(a, b) for a in means] for b in means], vmin=0, vmax=1)
    plt.title("CKA: similarity of the layers z_0 to z_L")
    plt.colorbar()
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
