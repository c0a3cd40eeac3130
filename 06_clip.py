"""CLIP: images and sentences in one space. Does it know which digit is red?

    u = f(image) / ‖f(image)‖,  w = g(text) / ‖g(text)‖    encode_image, encode_text
    logits = e^t u wᵀ  (B, B)      all images with all sentences              CLIP
    loss = (loss_i + loss_t) / 2   cross-entropy of rows and columns     clip_loss

Each image of a batch must find its sentence among all B, and each sentence its image:
the right answers are on the diagonal (chance: ln B). Nobody says what a digit or color
is; telling pairs apart teaches it. But a bag of words is often enough for that. Twins,
the same two things with places swapped, make batches in which word order counts.

Run     python 06_clip.py       5-11 minutes on two CPU cores (--quick: a smoke test)
Expect  98% of unseen images find their caption among 1,000 (chance: 0.1%); results.png.
Read    `CLIP` and `clip_loss`, then `evaluate`; the rest can wait.
Try     easy: --epochs 0 --load out/06_clip/model.pt --out out/try --prompt "a red one"
        medium: --twins 0.1 --out out/try. How many are enough for "places bound"?
        harder: in `clip_loss`, SigLIP (arXiv:2303.15343): -F.logsigmoid(±(logits + b)),
        summed, / B (chance: ln B + 1); + on the diagonal; b starts at -10, e^t at 10.
Paper   Radford et al.: Learning Transferable Visual Models From Natural Language
        Supervision, arXiv:2103.00020.    Text: 第6章 演習問題の解答, ex. 6.1-6.8
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
    "epochs": (10, "passes over the training images; 0: none"),
    "batch_size": (128, "scenes per step"),
    "lr": (2e-3, "highest learning rate"),
    "loss": ("clip", "itc: with a queue (third lesson)", "clip", "itc"),
    "twins": (0.5, "fraction of twins among the scenes, at most 0.5; 0: none"),
    "prompt": (
        "a red three above a blue seven; a blue seven above a red three",
        "sentences to find images for, separated by semicolons"
    ),
    "train_size": (60000, "how many training images to use"),
    "data": ("", "folder of the four MNIST files, or drawn: digits of a font"),
    "out": ("out/06_clip", "folder of the results"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda or mps"),
    "seed": (0, "the same seed gives the same numbers on one CPU"),
    "load": ("", "a model.pt to start from; --epochs 0 only evaluates it"),
    "quick": (False, "a smoke test of seconds; its results mean little"),
}
QUICK = {"train_size": 256}


# ---- Lesson one: two towers and one loss ---------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D).

    The mask (N, N) is added to the scores: -inf where a token must not look, else 0
    (no bool).
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(dim**-0.5 * torch.randn(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))             # (B, N, 3, h, D/h)
        q, k, v = qkv.transpose(1, 3).unbind(2)                     # (B, h, N, D/h)
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + mask   # (B, h, N, N)
        heads = scores.softmax(3) @ v                               # (B, h, N, D/h)
        return self.out_proj(heads.transpose(1, 2).flatten(2))      # (B, N, D)


class Block(nn.Module):
    """A Transformer block, (B, N, D) -> (B, N, D): CLIP's ResidualAttentionBlock."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(dim, 4 * dim),
                "c_proj": nn.Linear(4 * dim, dim),
            }
        )

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        h = self.mlp.c_fc(self.ln_2(x))  # (B, N, 4D)
        return x + self.mlp.c_proj(h * torch.sigmoid(1.702 * h))  # QuickGELU


class Transformer(nn.Module):
    """`layers` blocks, one after the other."""

    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """The image tower: images (B, 3, H, W) -> features (B, E).

    `conv1` turns an image into N patches of `width` numbers: one convolution or more.
    """

    def __init__(self, conv1, patches, width, layers, heads, embed_dim):
        super().__init__()
        self.conv1 = conv1
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def encode(self, images):
        """Return all tokens (B, 1 + N, D), the class token first (for a captioner)."""
        x = self.conv1(images).flatten(2).mT                          # (B, N, D)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # (B, 1, D)
        x = torch.cat([class_token, x], 1) + self.positional_embedding
        return self.transformer(self.ln_pre(x), 0)  # no mask

    def forward(self, images):
        return self.ln_post(self.encode(images)[:, 0]) @ self.proj


class CLIP(nn.Module):
    """The image tower `visual`, a text tower and a scale e^t (1 / temperature).

    Parameters have OpenAI's names: CLIP(VisionTransformer(nn.Conv2d(3, 768, 32, 32,
    bias=False), 49, 768, 12, 12, 512), 49408, 77, 512, 12, 8, 512) loads ViT-B/32 with
    strict=True, once the three integers in the file are left out.
    """

    def __init__(self, visual, vocab_size, length, width, layers, heads, embed_dim):
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.token_embedding.weight.data *= 0.02
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))  # t, ex. 6.1

    def encode_image(self, images):
        """Turn images (B, 3, H, W) into features u (B, E) of length 1."""
        return F.normalize(self.visual(images), dim=1)

    def encode_tokens(self, tokens):
        """Encode tokens (B, L) as (B, L, D); none sees a later one (ex. 6.4)."""
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L, D)
        later = x.new_full(2 * [x.shape[1]], -math.inf).triu(1)  # (L, L)
        return self.ln_final(self.transformer(x, later))

    def encode_text(self, tokens):
        """Turn tokens into features w (B, E) of length 1, read at END, the largest."""
        x = self.encode_tokens(tokens)
        rows = torch.arange(len(x), device=x.device)
        x = x[rows, tokens.argmax(1)]  # at END: (B, D)
        return F.normalize(x @ self.text_projection, dim=1)

    def logits(self, u, w):
        """Return e^t u wᵀ (A, B), with e^t at most 100 (CLIP section 2.5)."""
        return self.logit_scale.exp().clamp(max=100) * u @ w.T

    def forward(self, images, tokens):
        return self.logits(self.encode_image(images), self.encode_text(tokens))


def clip_loss(model, images, tokens, scenes):
    """CLIP's loss (its figure 3), in nats; pairs share an index. scenes: see ITC."""
    logits = model(images, tokens)  # (B, B)
    answers = torch.arange(len(logits), device=logits.device)  # on the diagonal
    loss_i = F.cross_entropy(logits, answers)  # each image finds its sentence (ex. 6.1)
    loss_t = F.cross_entropy(logits.T, answers)  # each sentence finds its image
    return (loss_i + loss_t) / 2


# ---- The world: scenes and sentences -------------------------------------------------
# A scene is five numbers: two colored digits, and the relation of first to second.
DIGIT1, COLOR1, DIGIT2, COLOR2, RELATION = range(5)
SWAP_COLORS = [DIGIT1, COLOR2, DIGIT2, COLOR1, RELATION]
SWAP_DIGITS = [DIGIT2, COLOR1, DIGIT1, COLOR2, RELATION]
SWAP_PLACES = [DIGIT2, COLOR2, DIGIT1, COLOR1, RELATION]

NUMERALS = "zero one two three four five six seven eight nine".split()
COLORS = {
    "red": (1, 0.25, 0.25),
    "green": (0.25, 1, 0.25),
    "blue": (0.35, 0.35, 1),
    "yellow": (1, 1, 0.25),
    "magenta": (1, 0.25, 1),
    "white": (1, 1, 1),
}
RELATIONS = {  # words for both directions; where the second digit is: x, y (down)
    ("above", "below"): (0, 1),
    ("left of", "right of"): (1, 0),
}
PHRASES = (
    "a {0} {1} a {2}",
    "the {0} is {1} the {2}",
    "there is a {0} {1} a {2}",
    "a {2} with a {0} {1} it",
)
OTHERS = "a the is there with it above below left right of".split()
WORDS = sorted({*NUMERALS, *COLORS, *OTHERS})
LENGTH = 12  # START, up to ten words, END


def caption(scene, phrase=0, side=0):
    """Put a scene (five numbers) into words; side 1 starts with the second digit."""
    digit1, color1, digit2, color2, relation = scene
    colors, relations = list(COLORS), list(RELATIONS)
    things = [
        f"{colors[color1]} {NUMERALS[digit1]}",
        f"{colors[color2]} {NUMERALS[digit2]}",
    ]
    words = things[side], relations[relation][side], things[1 - side]
    return PHRASES[phrase].format(*words)


def tokenize(sentences):
    """Turn sentences into tokens (B, LENGTH): START, words, END, and 0 for padding."""
    START, END = len(WORDS) + 1, len(WORDS) + 2
    rows = []
    for sentence in sentences:
        words = sentence.split()
        assert set(words) <= set(WORDS), f"use only the words {WORDS}"
        row = [START, *[1 + WORDS.index(word) for word in words], END]
        rows.append(row + [0] * (LENGTH - len(row)))
    return torch.tensor(rows)


def shows_held_out(scenes):
    """Tell which scenes (B, 5) show a pair never trained on: digit d, color d mod 6."""
    digits, colors = scenes[:, [DIGIT1, DIGIT2]], scenes[:, [COLOR1, COLOR2]]
    return (digits % len(COLORS) == colors).any(1)


def sample_scenes(labels, first, held_out=False):
    """Return scenes (B, 5) and which images they show: index (B, 2).

    `first` (B,) is given, the second is random. If `held_out`, the first digit has the
    color that training never shows; else neither does.
    """
    index = torch.stack([first, torch.randint_like(first, len(labels))], 1)
    digits = labels[index].long()  # (B, 2)
    shift = torch.randint_like(index, 1, len(COLORS))
    if held_out:
        shift[:, 0] = 0
    colors = (digits + shift) % len(COLORS)
    things = torch.stack([digits, colors], 2).flatten(1)  # digit, color, digit, color
    relation = torch.randint_like(first, len(RELATIONS))
    return torch.cat([things, relation[:, None]], 1), index


def add_twins(scenes, index, fraction):
    """Replace up to every other scene by a twin of the one before it.

    A twin shows the same two images with places swapped. The same words can describe
    both scenes; only their order tells which is meant.
    """
    pairs = torch.rand(len(scenes) // 2, device=scenes.device) < 2 * fraction
    original = 2 * pairs.nonzero()[:, 0]
    scenes[original + 1] = scenes[original][:, SWAP_PLACES]
    index[original + 1] = index[original].flip(1)  # the images follow SWAP_PLACES


def render(digits, scenes):
    """Draw uint8 digits (B, 2, 28, 28) as scenes (B, 5): (B, 3, 40, 40) in [0, 1]."""
    assert digits.dtype == torch.uint8, "expected a uint8 tensor, pixels in 0..255"
    B = len(scenes)
    with digits.device:  # new tensors are made there
        direction = torch.tensor(list(RELATIONS.values()))[scenes[:, RELATION]]
        place = torch.stack([-direction, direction], 1) / 2 + 0.2 * torch.rand(B, 2, 2)
        colors = torch.tensor(list(COLORS.values()))[scenes[:, [COLOR1, COLOR2]]]
        base = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 40, 40], False)
    grid = (base + 0.1 - place.view(2 * B, 1, 1, 2)) / 0.58  # pixel -> place in a digit
    ink = digits.flatten(0, 1)[:, None] / 255  # (2B, 1, 28, 28)
    ink = F.grid_sample(ink, grid, align_corners=False).view(B, 2, 1, 40, 40)
    return (ink * colors[..., None, None]).amax(1)  # overlap: channel-wise maximum


def conv(c_in, c_out):
    """Convolve and halve the resolution: (B, c_in, H, W) -> (B, c_out, H/2, W/2)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.MaxPool2d(2),
        nn.GroupNorm(4, c_out),
        nn.GELU(),
    )


def small_clip():
    """The model of this file, for images (B, 3, 40, 40) and the sentences above."""
    stem = nn.Sequential(conv(3, 16), conv(16, 32), conv(32, 64))  # 40x40 -> 5x5
    size = {"width": 64, "layers": 2, "heads": 4, "embed_dim": 128}
    visual = VisionTransformer(stem, patches=25, **size)
    return CLIP(visual, vocab_size=len(WORDS) + 3, length=LENGTH, **size)


# ---- Training ------------------------------------------------------------------------
def train(args, model, loss_function, digits, labels, history):
    """Minimize the loss on scenes made of uint8 digits (N, 28, 28) with labels (N,)."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    N = len(digits)
    steps = args.epochs * math.ceil(N / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps + 1)
    losses, began = [], time.time()
    for epoch in range(args.epochs):
        model.train()
        shuffled = torch.randperm(N, device=digits.device)
        scenes, index = sample_scenes(labels, shuffled)
        add_twins(scenes, index, args.twins)
        assert not shows_held_out(scenes).any()  # twins of another kind might
        phrases = torch.randint(len(PHRASES), [N]).tolist()
        sides = torch.randint(2, [N]).tolist()
        tokens = tokenize(map(caption, scenes.tolist(), phrases, sides))
        world = index, scenes, tokens.to(digits.device)
        for batch in zip(*[rows.split(args.batch_size) for rows in world]):
            index, scenes, tokens = batch
            images = render(digits[index], scenes)
            loss = loss_function(model, images, tokens, scenes)
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


# ---- Second lesson: binding (you can skip it) ----------------------------------------
# Does CLIP know WHICH digit is red? Four captions use the same words:
#   a red three above a blue seven   the truth
#   a blue three above a red seven   colors swapped  } "colors bound": the truth
#   a red seven above a blue three   digits swapped  } is closer than both of these
#   a blue seven above a red three   places swapped    "places bound": than this one
# Digits and colors are bound without help. Places need the twins: without them, this
# CLIP takes a sentence for a bag of words, and finds most captions all the same.
# Yuksekgonul et al.: When and Why Vision-Language Models Behave like Bags-of-Words, and
# What to Do About It?, arXiv:2210.01936.
CHANCE = {
    "finds its caption": 0.001,  # a little more: equal captions count
    "digit": 1 / len(NUMERALS),
    "color": 1 / len(COLORS),
    "axis": 1 / len(RELATIONS),
    "colors bound": 1 / 3,
    "places bound": 1 / 2,
}


@torch.no_grad()
def evaluate(model, digits, labels, held_out):
    """Return the fractions of 1,000 images that are closest to their own caption."""
    model.eval()
    first = torch.randint(len(labels), [1000], device=labels.device)
    scenes, index = sample_scenes(labels, first, held_out)
    u = model.encode_image(render(digits[index], scenes))  # (N, E)

    def captions(scenes):
        tokens = tokenize(map(caption, scenes.tolist()))
        return model.encode_text(tokens.to(u.device))  # (N, E)

    w = captions(scenes)

    def prefers(*foils):
        """Tell which images are closer to their caption than to those of all foils."""
        beaten = [(u * w).sum(1) > (u * captions(foil)).sum(1) for foil in foils]
        return torch.stack(beaten).all(0)

    def others(column, count):
        """Yield the scenes with each of the other values in one column."""
        for i in range(1, count):
            foil = scenes.clone()
            foil[:, column] = (foil[:, column] + i) % count
            yield foil

    swapped = scenes[:, SWAP_COLORS], scenes[:, SWAP_DIGITS]
    different = (scenes[:, :2] != scenes[:, 2:4]).all(1)  # digits and colors differ
    trained = ~shows_held_out(swapped[0])  # foils of unseen pairs would be too easy
    hits = {
        "finds its caption": (scenes[(u @ w.T).argmax(1)] == scenes).all(1),
        "digit": prefers(*others(DIGIT1, len(NUMERALS))),
        "color": prefers(*others(COLOR1, len(COLORS))),
        "axis": prefers(*others(RELATION, len(RELATIONS))),
        "colors bound": prefers(*swapped)[different & trained],
        "places bound": prefers(scenes[:, SWAP_PLACES])[different],
    }
    return {name: hit.float().mean().item() for name, hit in hits.items()}


# ---- Third lesson: a queue instead of a large batch (you can skip it) ----------------
class ITC:
    """The image-text contrastive loss of ALBEF: B new features against B + M slow ones.

    A slow copy of the model follows it. The copy's last M features wait in a queue, so
    that even a small batch has many wrong answers (ex. 6.8). Chance: ln(B + M), once
    the queue is full. Li et al.: Align before Fuse, arXiv:2107.07651, section 3.2,
    without its soft targets; the queue is that of He et al.: Momentum Contrast,
    arXiv:1911.05722. Rows of scenes (B, K) are equal where captions are.
    """

    M = 4096

    def __init__(self, model):
        self.slow = copy.deepcopy(model)
        self.queue = None  # features of images and of texts, and their scenes

    def __call__(self, model, images, tokens, scenes):
        with torch.no_grad():
            for slow, parameter in zip(self.slow.parameters(), model.parameters()):
                slow.lerp_(parameter, 0.005)  # θ' <- 0.995 θ' + 0.005 θ
            slow_u = self.slow.encode_image(images)
            rows = slow_u, self.slow.encode_text(tokens), scenes
        if self.queue:
            rows = [torch.cat(pair) for pair in zip(rows, self.queue)]
        self.queue = [some[: self.M] for some in rows]  # first in, first out
        slow_u, slow_w, slow_scenes = rows  # new and waiting: B + M of each
        # Among so many, equal scenes are common, and no wrong answers: hide them.
        equal = (scenes[:, None] == slow_scenes).all(2)  # (B, B + M)
        equal.fill_diagonal_(False)  # the answers themselves stay
        answers = torch.arange(len(scenes), device=scenes.device)
        i2t = model.logits(model.encode_image(images), slow_w)
        t2i = model.logits(model.encode_text(tokens), slow_u)
        loss_i = F.cross_entropy(i2t.masked_fill(equal, -math.inf), answers)
        loss_t = F.cross_entropy(t2i.masked_fill(equal, -math.inf), answers)
        return (loss_i + loss_t) / 2


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    prompts = args.prompt.split(";")
    tokens = tokenize(prompts).to(args.device)  # an unknown word ends the run here
    torch.manual_seed(args.seed)
    digits, labels, test_digits, test_labels, source = load_data(args)
    model = small_clip().to(args.device)
    load_weights(args, model)
    history = []
    try:
        loss_function = {"clip": clip_loss, "itc": ITC(model)}[args.loss]
        train(args, model, loss_function, digits, labels, history)
    except KeyboardInterrupt:
        print("Training stopped early; the model is evaluated as it is.")
    save_model(args, model)
    results = {
        "seen pairs": evaluate(model, test_digits, test_labels, held_out=False),
        "held-out pairs": evaluate(model, test_digits, test_labels, held_out=True),
        "chance": CHANCE,
    }
    save_metrics(args, results=results, history=history, data=source)
    plt.figure(figsize=(8, 6), layout="constrained")
    plt.subplot(2, 1, 1)
    for kind, height in zip(results, (0.8, 0.5, 0.1)):
        plt.barh([*results[kind]], results[kind].values(), height)
    title = "share of unseen images (wide: seen pairs, narrow: held out, thin: chance)"
    plt.title(title)
    plt.subplot(2, 1, 2)
    everyone = torch.arange(len(test_labels), device=args.device)
    scenes, index = sample_scenes(test_labels, everyone)
    images = render(test_digits[index], scenes)
    with torch.no_grad():
        cosines = model.encode_text(tokens) @ model.encode_image(images).T  # (P, N)
    nearest = cosines.topk(6).indices.flatten()
    show_grid(images[nearest], 6, "nearest images to:\n" + "\n".join(prompts))
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
