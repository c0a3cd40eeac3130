"""CLIP: images and sentences in one space. Does it know which color belongs to which digit?

    u = normalize(f(image)),  w = normalize(g(sentence))      the two towers: features (B, E)
    logits = e^t u wᵀ  (B, B)       each image with each sentence; the scale e^t is learned
    loss = (loss_i + loss_t) / 2    cross-entropy of rows and columns; true pairs on the diagonal
    ITC loss                        image-text contrastive: with momentum encoders and a queue

Binding  Caption: "a red three above a blue seven". Three foils have the same words: "a blue three
         above a red seven" (colors exchanged), "a red seven above a blue three" (digits exchanged)
         and "a blue seven above a red three" (places exchanged, the twin). Colors are bound if the
         image is closer to its caption than to the first two foils (either one alone could be told
         by the order of the colors, or of the digits), places if closer to it than to the third.
Sources  CLIP: Learning Transferable Visual Models From Natural Language Supervision, Radford et
         al., arXiv:2103.00020; ALBEF: Align before Fuse, Li et al., arXiv:2107.07651; foils: When
         and Why Vision-Language Models Behave like Bags-of-Words, Yuksekgonul, arXiv:2210.01936
         text: 第6章 演習問題の解答, ex. 6.1, 6.2, 6.4, 6.6, 6.8
Run      python 06_clip.py    (--quick for a smoke test, --help for the settings)
Expect   5 minutes on two CPU cores (AMD EPYC, real MNIST, seed 0, 2026-11-26); results.png.
         1,000 unseen images, in % (in parentheses: the first digit in a color held out for it):
                    finds caption     digit       color        axis      colors      places
           default       99 (97)     97 (92)   100 (100)   100 (100)   100 (100)   100 (100)
           --twins 0     89 (96)     97 (84)   100 (100)   100 (100)     99 (96)     46 (53)
           chance            0.1          10          17          50          33          50
         Places need twins, colors do not. Caption found after 2 epochs, three seeds: CLIP's loss
         39, 47, 55 with batches of 32 and 62, 63, 76 with 256; ITC 79, 88, 93 and 64, 72, 73.
Weights  clip = CLIP(VisionTransformer(nn.Conv2d(3, 768, 32, 32, bias=False), 49, 768, 12, 12, 512),
                     49408, 77, 512, 12, 8, 512)
         loads OpenAI's ViT-B/32 with strict=True, once its three integers are removed.
Read     Start with `CLIP` and `clip_loss`; the rest can wait.
Try      easy: --epochs 0 --load out/06_clip/model.pt --out out/try --prompt "a red one".
         medium: --twins 0.1, then 0.02. How many twins are enough to bind the places?
         harder: add SigLIP's loss beside `clip_loss`; its bias (start: -ln B) goes in `small_clip`.
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
    add("--out", default="out", help="parent folder; results go to its subfolder 06_clip")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    add("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine")
    add("--epochs", type=int, default=10, help="passes over the images, some replaced by twins")
    add("--batch-size", type=int, default=128, help="scenes per step")
    add("--lr", type=float, default=2e-3, help="highest learning rate")
    add("--train-size", type=int, default=60000, help="number of training images")
    add("--load", help="a model.pt to start from; --epochs 0 only evaluates it")
    add("--quick", action="store_true", help="smoke test: a short run on 512 images")
    add("--loss", default="clip", choices=["clip", "itc"], help="itc: ALBEF's, with a queue")
    add("--twins", type=float, default=0.5, help="fraction of twins in a batch, 0 to 0.5")
    add("--prompt", default="a red three above a blue seven; a blue three above a red seven; "
        "a blue seven above a red three", help="sentences to find images for, separated by ;")
    args = parser.parse_args(argv)
    if args.quick:  # flags given on the command line override these
        parser.set_defaults(epochs=2, train_size=512, batch_size=32)
        args = parser.parse_args(argv)
    positive = [args.batch_size, args.lr, args.train_size]
    if args.epochs < 0 or min(positive) <= 0 or not 0 <= args.twins <= 0.5:
        parser.error("--epochs must be >= 0; --batch-size, --lr and --train-size > 0; "
                     "--twins from 0 to 0.5")
    unknown = set(args.prompt.replace(";", " ").split()) - set(WORDS)
    if unknown or max(len(text.split()) for text in args.prompt.split(";")) > LENGTH - 2:
        parser.error(f"--prompt {unknown or 'is too long'}: up to {LENGTH - 2} words of {WORDS}")
    args.out += "/06_clip"
    return args


# ---- Scenes and sentences ------------------------------------------------------------
DIGITS = "zero one two three four five six seven eight nine".split()
COLORS = {"red": (1, 0.25, 0.25), "green": (0.25, 1, 0.25), "blue": (0.35, 0.35, 1),
          "yellow": (1, 1, 0.25), "magenta": (1, 0.25, 1), "white": (1, 1, 1)}
RELATIONS = [("above", "below"), ("left of", "right of")]  # `render` knows them as 0 and 1
PHRASES = ["a {0} {1} a {2}", "the {0} is {1} the {2}", "there is a {0} {1} a {2}",
           "a {2} with a {0} {1} it"]
TEXT = " ".join([*DIGITS, *COLORS, *sum(RELATIONS, ()), *PHRASES]).format("", "", "")
WORDS = sorted(set(TEXT.split()))
START, END = len(WORDS) + 1, len(WORDS) + 2  # tokens; 1 to len(WORDS) are words, 0 is padding
LENGTH = 2 + max(len(text.format("1 2", "left of", "1 2").split()) for text in PHRASES)


def caption(scene, way=0):
    """A scene [digit, color, digit, color, relation] in words; ways 4 to 7: where the second is."""
    digit1, color1, digit2, color2, relation = scene
    names = list(COLORS)
    things = [f"{names[color1]} {DIGITS[digit1]}", f"{names[color2]} {DIGITS[digit2]}"]
    side, phrase = divmod(way, len(PHRASES))
    return PHRASES[phrase].format(things[side], RELATIONS[relation][side], things[1 - side])


def tokenize(sentences):
    """Sentences -> tokens (B, LENGTH)."""
    tokens = torch.zeros(len(sentences), LENGTH, dtype=torch.long)
    for row, sentence in zip(tokens, sentences):
        ids = [START, *[1 + WORDS.index(word) for word in sentence.split()], END]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def sample_scenes(labels, first, held_out=False):
    """Returns scenes (B, 5) and index (B, 2) of their images: `first` (B,) and a random second.

    Digit d never has color d % len(COLORS); but if `held_out`, the first digit always has it.
    """
    index = torch.stack([first, torch.randint(len(labels), [len(first)])], 1)
    digits = labels[index]  # (B, 2)
    shift = torch.randint(1, len(COLORS), index.shape)
    if held_out:
        shift[:, 0] = 0
    colors = (digits + shift) % len(COLORS)
    relation = torch.randint(len(RELATIONS), [len(first), 1])
    scenes = torch.stack([digits, colors], 2).flatten(1)  # (B, 2, 2) -> (B, 4)
    return torch.cat([scenes, relation], 1), index


def render(digits, scenes):
    """Digits uint8 (B, 2, 28, 28) and scenes (B, 5) -> images (B, 3, 40, 40) in [0, 1]."""
    if digits.dtype != torch.uint8:
        raise ValueError(f"expected uint8 images in 0..255, not {digits.dtype}")
    B, n = digits.shape[:2]
    place = torch.tensor([[0, -0.5], [0, 0.5]]) + 0.2 * (torch.rand(B, n, 2) - 0.5)  # x, y: -1 to 1
    place = torch.where(scenes[:, 4, None, None] == 1, place.flip(2), place)  # left of: along x
    size = 0.52 + 0.12 * torch.rand(B, n, 1, 1)
    affine = torch.cat([torch.eye(2).expand(B, n, 2, 2), -place[..., None]], 3) / size
    grid = F.affine_grid(affine.flatten(0, 1), [B * n, 1, 40, 40], align_corners=False)
    ink = digits.flatten(0, 1)[:, None].float() / 255  # (B, 2, 28, 28) -> (2B, 1, 28, 28)
    ink = F.grid_sample(ink, grid.to(ink), align_corners=False).view(B, n, 1, 40, 40)
    colors = torch.tensor(list(COLORS.values())).to(ink)[scenes[:, [1, 3]]]  # (B, 2, 3)
    return (ink * colors[..., None, None]).amax(1)  # (B, 2, 3, 40, 40) -> (B, 3, 40, 40)


def twins(scenes, index):
    """Hard negatives: the two digits exchange places, so knowing the words is not enough."""
    return scenes[:, [2, 3, 0, 1, 4]], index.flip(1)  # other colors would show held-out pairs


# ---- The two towers ------------------------------------------------------------------
def small_clip():
    """The model of this file, for images (B, 3, 40, 40) and the sentences above."""
    stem = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.GELU(),  # 40 -> 20
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(), nn.MaxPool2d(2),  # -> 10
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU(), nn.MaxPool2d(2))  # -> 5
    visual = VisionTransformer(stem, 25, 64, 2, 4, 128)
    return CLIP(visual, END + 1, LENGTH, 64, 2, 4, 128)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D); causal: no token sees a later one."""

    def __init__(self, dim, num_heads, causal):
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, D) -> (B, N, 3D)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, N, 3D) -> (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, D/h) each
        # softmax(q kᵀ / √(D/h)) v, with weight 0 on later tokens if causal: (B, h, N, D/h)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # -> (B, N, h, D/h) -> (B, N, D)


class Block(nn.Module):
    """A Transformer block on x (B, N, D), with the names of OpenAI's ResidualAttentionBlock."""

    def __init__(self, dim, num_heads, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, causal)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim),
                                  "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp["c_fc"](self.ln_2(x))  # (B, N, D) -> (B, N, 4D)
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))  # QuickGELU


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> features (B, E); conv1 turns an image into N tokens of width D."""

    def __init__(self, conv1, patches, width, layers, heads, embed_dim):
        super().__init__()
        self.conv1 = conv1
        self.class_embedding = nn.Parameter(0.02 * torch.randn(width))
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [Block(width, heads, causal=False) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, D, H/P, W/P) -> (B, N, D)
        class_token = self.class_embedding.expand(len(x), 1, -1)  # (D,) -> (B, 1, D)
        x = torch.cat([class_token, x], 1) + self.positional_embedding  # (B, 1 + N, D)
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D) -> (B, E)


class CLIP(nn.Module):
    """An image tower, a text tower, and the temperature; the names are those of openai/CLIP."""

    def __init__(self, visual, vocab_size, length, width, layers, heads, embed_dim):
        super().__init__()
        self.visual = visual
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        blocks = [Block(width, heads, causal=True) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # t of ex. 6.1
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Images (B, 3, H, W) -> features (B, E) of length 1."""
        return F.normalize(self.visual(images), dim=1)

    def encode_tokens(self, tokens):
        """Tokens (B, L) -> an encoding of every token (B, L, D), the first output of ex. 6.4."""
        tokens = tokens.to(self.positional_embedding.device)
        x = self.token_embedding(tokens) + self.positional_embedding  # (B, L) -> (B, L, D)
        return self.ln_final(self.transformer["resblocks"](x))

    def encode_text(self, tokens):
        """Tokens (B, L) -> features (B, E) of length 1, read at END (ex. 6.4, second output)."""
        x = self.encode_tokens(tokens)
        x = x[torch.arange(len(x)), tokens.argmax(1)]  # END is the largest token: -> (B, D)
        return F.normalize(x @ self.text_projection, dim=1)

    def forward(self, images, tokens):
        """Logits e^t cos(image, text) (B, B): a row for each image, a column for each text."""
        return self.logit_scale.exp() * self.encode_image(images) @ self.encode_text(tokens).T


# ---- The contrastive loss ------------------------------------------------------------
def cross_entropy(logits, scenes, others):
    """Cross-entropy in nats of logits (A, B), true on the diagonal; other equal pairs left out."""
    target = torch.arange(len(logits))
    duplicates = (scenes[:, None] == others).all(2)  # (A, 5), (B, 5) -> (A, B)
    duplicates[target, target] = False  # the answer stays; k copies of it would cost ln k
    logits = logits.masked_fill(duplicates.to(logits.device), -math.inf)
    return F.cross_entropy(logits, target.to(logits.device))


def clip_loss(model, images, tokens, scenes):
    """CLIP's loss (chance: ln B); captions with equal rows of scenes (B, n) are no negatives."""
    logits = model(images, tokens)  # (B, B)
    loss_i = cross_entropy(logits, scenes, scenes)  # each image finds its text (ex. 6.1)
    loss_t = cross_entropy(logits.T, scenes, scenes)  # each text finds its image
    return (loss_i + loss_t) / 2


# ---- Second lesson: a queue instead of a large batch (you can skip it) ---------------
class ITC:
    """The ITC loss of ALBEF (section 3.2; ex. 6.8): B new features against B + M slow ones.

    The slow features come from momentum encoders; the last M of them wait in a queue, so that small
    batches have many negatives. If all features agree and the queue is full, it is ln(B + M).
    """

    def __init__(self, model, M=4096, momentum=0.995):
        self.M = M
        self.momentum = momentum
        self.slow = copy.deepcopy(model).train()
        self.images = self.texts = model.text_projection.detach()[:0]  # (0, E): an empty queue
        self.scenes = torch.zeros(0, 5, dtype=torch.long)  # (0, n): here n = 5 numbers, on the CPU

    def __call__(self, model, images, tokens, scenes):
        with torch.no_grad():
            for slow, parameter in zip(self.slow.parameters(), model.parameters()):
                slow.lerp_(parameter, 1 - self.momentum)  # θ' ← m θ' + (1 - m) θ
            slow_images = torch.cat([self.slow.encode_image(images), self.images])  # (B + M, E)
            slow_texts = torch.cat([self.slow.encode_text(tokens), self.texts])
        slow_scenes = torch.cat([scenes, self.scenes])
        self.images = slow_images[: self.M]  # first in, first out
        self.texts = slow_texts[: self.M]
        self.scenes = slow_scenes[: self.M]
        scale = model.logit_scale.exp()
        i2t = scale * model.encode_image(images) @ slow_texts.T  # (B, B + M)
        t2i = scale * model.encode_text(tokens) @ slow_images.T
        loss_i = cross_entropy(i2t, scenes, slow_scenes)
        loss_t = cross_entropy(t2i, scenes, slow_scenes)
        return (loss_i + loss_t) / 2


# ---- Training ------------------------------------------------------------------------
def train(args, model, loss_function, digits, labels, history):
    """Minimizes the loss on scenes made from uint8 digits (N, 28, 28); fills `history`."""
    optimizer = torch.optim.Adam(model.parameters(), args.lr)
    steps = args.epochs * math.ceil(len(digits) / args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, max(steps, 1))  # lr up, down
    losses, step = [], 0
    began = time.time()
    model.train()
    for epoch in range(args.epochs):
        for batch in torch.randperm(len(digits)).split(args.batch_size):
            scenes, index = sample_scenes(labels, batch)
            n = int(args.twins * len(batch))  # the first n scenes become twins of the next n
            scenes[:n], index[:n] = twins(scenes[n : 2 * n], index[n : 2 * n])
            ways = torch.randint(2 * len(PHRASES), [len(scenes)]).tolist()
            tokens = tokenize([caption(*pair) for pair in zip(scenes.tolist(), ways)])
            loss = loss_function(model, render(digits[index], scenes), tokens, scenes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))  # CLIP section 2.5
            step += 1
            losses.append(loss.item())
            if step % math.ceil(steps / 20) == 0 or step == steps:
                mean_loss = sum(losses) / len(losses)
                losses = []
                history.append({"step": step, "loss": mean_loss})
                progress(step, steps, began, {"loss": mean_loss})


# ---- What was learned: retrieval, zero-shot answers, binding -------------------------
CHANCE = {"image finds caption": 0.001, "digit": 1 / len(DIGITS), "color": 1 / len(COLORS),
          "axis (above or left)": 1 / len(RELATIONS), "colors bound": 1 / 3, "places bound": 1 / 2}


def encode_captions(model, scenes):
    """Features (N, E) of the captions of scenes (N, 5)."""
    return model.encode_text(tokenize([caption(scene) for scene in scenes.tolist()]))


def foils(scenes, slot, count):
    """Scenes (N, 5) -> (count - 1, N, 5): copies with each of the other values in one slot."""
    others = scenes.repeat(count - 1, 1, 1)
    others[:, :, slot] = (scenes[:, slot] + torch.arange(1, count)[:, None]) % count
    return others


@torch.no_grad()
def evaluate(model, digits, labels, held_out):
    """Fractions of unseen images closer to their caption than to all foils (see `CHANCE`)."""
    model.eval()
    scenes, index = sample_scenes(labels, torch.randint(len(labels), [1000]), held_out)
    images = model.encode_image(render(digits[index], scenes))  # (N, E)
    texts = encode_captions(model, scenes)

    def prefers(others):
        """Whether an image is closer to its own caption than to those of others (K, N, 5)."""
        cosines = [(images * encode_captions(model, other)).sum(1) for other in others]
        return ((images * texts).sum(1) > torch.stack(cosines)).all(0).cpu()  # (K, N) -> (N,)

    exchanged = torch.stack([scenes[:, [0, 3, 2, 1, 4]], scenes[:, [2, 1, 0, 3, 4]]])  # (2, N, 5)
    different = (scenes[:, :2] != scenes[:, 2:4]).all(1)  # digits and colors differ
    trained = (exchanged[0][:, [0, 2]] % len(COLORS) != exchanged[0][:, [1, 3]]).all(1)
    best = (images @ texts.T).argmax(1).cpu()
    hits = {"image finds caption": (scenes[best] == scenes).all(1),
            "digit": prefers(foils(scenes, 0, len(DIGITS))),
            "color": prefers(foils(scenes, 1, len(COLORS))),
            "axis (above or left)": prefers(foils(scenes, 4, len(RELATIONS))),
            "colors bound": prefers(exchanged)[different & trained],  # no foil has a held-out pair
            "places bound": prefers(scenes[:, [2, 3, 0, 1, 4]][None])[different]}
    return {name: hit.float().mean().item() for name, hit in hits.items()}


# ---- Main and figures ----------------------------------------------------------------
def main(argv=None):
    args = get_args(argv)
    began = time.time()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)
    digits, labels, test_digits, test_labels, source = load_data(args)
    digits, test_digits = digits.to(device), test_digits.to(device)
    model = small_clip().to(device)
    if args.load:
        load_weights(args, model)
    losses = {"clip": clip_loss, "itc": ITC(model)}
    history = []
    try:
        train(args, model, losses[args.loss], digits, labels, history)
    except KeyboardInterrupt:
        print("Training stopped early; saving and evaluating the current model.")
    save_model(args, model)
    results = {"seen pairs": evaluate(model, test_digits, test_labels, False),
               "held-out pairs": evaluate(model, test_digits, test_labels, True)}
    plot_results(args, model, test_digits, test_labels, history, results)
    print(json.dumps({"chance": CHANCE, **results}, indent=1))
    save_metrics(args, results, history, source, began)


@torch.no_grad()
def plot_results(args, model, digits, labels, history, results):
    """Draws the loss, the results beside chance, and the images nearest to each prompt."""
    _, axes = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    axes[0].semilogy([row["step"] for row in history], [row["loss"] for row in history])
    axes[0].set(xlabel="step", title=f"{args.loss} loss in nats (chance: ln B; itc: ln(B + M))")
    rows = np.arange(len(CHANCE))
    for i, (name, fractions) in enumerate({**results, "chance": CHANCE}.items()):
        axes[1].barh(rows + 0.3 * i, fractions.values(), 0.3, label=name)
    axes[1].set_yticks(rows + 0.3, CHANCE.keys())
    axes[1].set(xlim=(0, 1.5), title="fractions of unseen images")
    axes[1].legend()
    scenes, index = sample_scenes(labels, torch.arange(500 if args.quick else 5000) % len(labels))
    images = render(digits[index], scenes)
    prompts = [prompt.strip() for prompt in args.prompt.split(";")]
    cosines = model.encode_text(tokenize(prompts)) @ model.encode_image(images).T  # (P, N)
    show_grid(axes[2], images[cosines.topk(6)[1].flatten()], 6, f"nearest of {len(images)} images")
    axes[2].set_yticks(range(21, 42 * len(prompts), 42), prompts)
    plt.savefig(f"{args.out}/results.png")


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
