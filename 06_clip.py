"""CLIP (arXiv:2103.00020): images and sentences in one space, and what binds to what in it.

    image    u = norm(f(image) W_i)     a residual network or a Vision Transformer      ex. 6.1, 6.2
    text     w = norm(g(words) W_t)     a causal transformer, read off at the end-of-text token
    logits   e^t · u wᵀ  (B, B)         every image of a batch with every sentence, t learned
    loss     (CE of the rows + CE of the columns) / 2: the diagonal belongs together         ex. 6.1
    ITC      the same against slow encoders and a queue of their last M features             ex. 6.8

Images are made on the fly: two MNIST digits, each in a color, one above or beside the other, and
sentences say so in eight ways. Ten of the 60 digit-color pairs never occur in training: does the
model compose? Ex. 6.6 draws "a red cube on top of a blue cube"; here CLIP's features are asked
which color is whose and what is above what. The words that occur tell most batches apart, so
batches also hold twins: the same words, another meaning (hard negatives, as arXiv:2210.01936).
Parameters are named as in openai/CLIP, so published weights load, those of "RN50" too:
    clip = importlib.import_module("06_clip").CLIP("ViT-B/32")
    weights = torch.jit.load("ViT-B-32.pt", "cpu").state_dict()
    [weights.pop(name) for name in ("input_resolution", "context_length", "vocab_size")]
    clip.load_state_dict(weights, strict=True)

Run     python 06_clip.py    (--quick: the whole path in seconds; --help: every setting)
Expect  on two CPU cores 7 minutes; six pictures and weights in out/06_clip. On 1,000 unseen images
        with digit-color pairs of the training, and 1,000 (new) with pairs that never were, in %:
                                  default       --twins 0    --tower vit
                                seen    new    seen    new    seen    new   chance
          image finds caption   97.0   92.2    88.4   73.3    49.8   37.2      0.1
          digit                 94.2   86.2    96.9   92.8    50.8   39.8     10
          color                100.0  100.0   100.0  100.0    99.9   99.9     16.7
          relation              99.9  100.0    51.3   51.0    61.9   58.3     25
          colors exchanged*    100.0  100.0   100.0  100.0    94.5   93.0     50
          digits exchanged*     99.8   99.7   100.0  100.0    94.0   91.8     50
          places exchanged*    100.0  100.0    49.1   50.6    61.7   59.2     50
        Digit, color, relation: its caption is nearer than all that differ in that alone; * than
        the one with these exchanged, of two digits and colors that differ. Without twins no batch
        asks what is above what; they teach it, and new pairs find captions far more often, at the
        price of some digits. The ViT (5 epochs) would need more images.
        --compare, 120,000 images each: R@1 of CLIP 18.8, of ITC 61.1 at batches of 32; 68.4 and
        49.4 at batches of 256. The queue pays where batches are small; but with ITC exchanged
        places stay near chance (58, 53%): perhaps one twin counts little among 4,096 others.
        Real MNIST, seed 0, two cores of an AMD EPYC, 2026-11-22.
Try     easy: --load out/06_clip/model.pt --epochs 0 --prompt "a red zero above a blue two"
        medium: --twins 0, then --twins 0.1. How many are enough for "places exchanged"?
        harder: in `CLIP` leave out `+ self.positional_embedding[...]`, then also `causal=True`:
        when does a sentence become a bag of words, and which rows fall to chance?
"""

import copy
import math
from collections import OrderedDict
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
    seed: int = 0  # of weights, scenes and order [0..4294967295]
    epochs: int = 8  # as many images, twins too, as there are training digits [0..100000]
    batch_size: int = 128  # scenes a step [8..60000]
    lr: float = 2e-3  # learning rate: a short warm-up times a cosine down to 0 [0..1]
    train_size: int = 0  # training digits to use, 0 for all [0..60000]
    load: str = ""  # start from this model.pt; with --epochs 0 only evaluate and draw
    quick: bool = False  # the whole path in seconds, on a few hundred images
    compare: bool = False  # both losses, batches of 256 and of an eighth; pictures: ITC at 256
    tower: str = "resnet"  # what sees the images [resnet|vit]
    loss: str = "clip"  # within the batch, or with slow encoders and a queue [clip|itc]
    queue: int = 4096  # M, features in the queue of itc [1..1000000]
    momentum: float = 0.995  # of the slow encoders of itc [0..1]
    twins: float = 0.5  # share of a batch that are twins of the rest [0..0.5]
    prompt: str = ""  # find the nearest test images for this sentence, several with ; between

PRESETS = dict(compare=dict(epochs=2, batch_size=256),
               quick=dict(train_size=256, epochs=2, batch_size=32, queue=100))
SHAPES = ("compare", "tower")
PIXELS = (0, 1)  # black and full

# ---- Scenes and sentences ------------------------------------------------------------------------

DIGITS = "zero one two three four five six seven eight nine".split()
INKS = dict(red=(1, 0.25, 0.25), green=(0.25, 1, 0.25), blue=(0.35, 0.35, 1),
            yellow=(1, 1, 0.25), magenta=(1, 0.25, 1), white=(1, 1, 1))
RELATIONS = (("above", "below"), ("left of", "right of"))  # from the first digit, from the second
PHRASES = ("a {0} {1} a {2}", "the {0} is {1} the {2}", "there is a {0} {1} a {2}",
           "a {2} with a {0} {1} it")  # of the first thing, the relation, the second thing
WORDS = sorted({*" ".join([*DIGITS, *INKS, *RELATIONS[0], *RELATIONS[1], *PHRASES]).split()}
               - {"{0}", "{1}", "{2}"})
START, END, LENGTH = len(WORDS) + 1, len(WORDS) + 2, 13  # tokens: 0 fills up, words count from 1
SLOTS = torch.tensor([10, 6, 10, 6, 2])  # a scene: digit, color, digit, color, relation
SCENES = torch.cartesian_prod(*map(torch.arange, SLOTS.tolist()))  # all of them, (7200, 5)
EXCHANGES = dict(colors=[0, 3, 2, 1, 4], digits=[2, 1, 0, 3, 4], places=[2, 3, 0, 1, 4])

def number(scenes):
    """Scenes (..., 5) -> their places in SCENES."""
    return scenes @ torch.tensor([720, 120, 12, 2, 1])

def held_out(scenes):
    """Whether a digit in a scene (..., 5) has the color that it never has in training: ten of the
    60 pairs, a red zero, a green one, ..., a yellow nine."""
    return (scenes[..., [0, 2]] % 6 == scenes[..., [1, 3]]).any(-1)

def twins(scenes):
    """The same words, another meaning: scenes (B, 5) with their colors exchanged, or else the
    places of their digits (two equal ones stay). Also whether the images change places, (B,)."""
    recolored = scenes[:, EXCHANGES["colors"]]
    same = scenes[:, 1] == scenes[:, 3]
    move = same | held_out(recolored) | (torch.rand(len(scenes)) < 0.5)
    return torch.where(move[:, None], scenes[:, EXCHANGES["places"]], recolored), move

def sentence(scene, saying=0):
    """A scene (5 numbers) in one of eight sayings: four phrases, each from either digit's side."""
    d1, c1, d2, c2, relation = scene
    names = list(INKS)
    things = [f"{names[c1]} {DIGITS[d1]}", f"{names[c2]} {DIGITS[d2]}"]
    first, second = things if saying < 4 else things[::-1]
    return PHRASES[saying % 4].format(first, RELATIONS[relation][saying // 4], second)

def tokenize(sentences):
    """Sentences -> tokens (B, 13): start, words, end, zeros. What is too long is cut."""
    rows = torch.zeros(len(sentences), LENGTH, dtype=torch.long)
    for row, text in zip(rows, sentences):
        ids = [START, *(1 + WORDS.index(word) for word in text.split()[:LENGTH - 2]), END]
        row[:len(ids)] = torch.tensor(ids)
    return rows

def say(scenes, saying=None):
    """Scenes (B, 5) -> tokens (B, 13), all in one saying or each in any."""
    sayings = ([saying] * len(scenes) if saying is not None else
               torch.randint(8, (len(scenes),)).tolist())
    return tokenize([*map(sentence, scenes.tolist(), sayings)])

def render(digits, scenes):
    """Digits uint8 (B, 2, 28, 28), scenes (B, 5) -> images (B, 3, 40, 40) in [0, 1]. Size and
    place are random: along the relation's axis each digit keeps to its half, across it both lie
    anywhere, not far from each other. Lengths are in half canvases."""
    B, flat = len(scenes), scenes[:, 4:] == 1  # left of: along x
    half = torch.empty(B, 2, 1, 1).uniform_(0.52, 0.64)  # of a whole MNIST image with its rim
    across = torch.empty(B, 1).uniform_(-0.3, 0.3) + torch.empty(B, 2).uniform_(-0.15, 0.15)
    along = torch.tensor([-0.48, 0.48]) + torch.empty(B, 2).uniform_(-0.03, 0.03)
    place = torch.stack([along.where(flat, across), across.where(flat, along)], 2)  # x, y
    theta = torch.cat([torch.eye(2).expand(B, 2, 2, 2), -place[..., None]], 3) / half  # inverse
    color = torch.tensor(list(INKS.values()))[scenes[:, [1, 3]]]
    color = color * torch.empty(B, 2, 1).uniform_(0.75, 1)  # (B, 2, 3), not always as bright
    ink = digits.flatten(0, 1)[:, None].float() / 255  # (2B, 1, 28, 28)
    grid = F.affine_grid(theta.flatten(0, 1).to(ink), (2 * B, 1, 40, 40), align_corners=False)
    ink = F.grid_sample(ink, grid, align_corners=False).view(B, 2, 1, 40, 40)
    return (ink * color[..., None, None].to(ink)).amax(1)  # (B, 2, 3, H, W) -> (B, 3, H, W)

def sample_pairs(digits, labels, index, share=0.0, held=False):
    """Digits uint8 (N, 28, 28) of an index (B,), each with another, the first above or left of it
    -> images (B, 3, H, W), scenes (B, 5). Held-out pairs never occur, or (`held`) one or two in
    every scene. A `share` of the batch gives way to the twins of its beginning."""
    B, n = len(index), int(share * len(index))
    index = torch.stack([index.cpu(), torch.randint(len(digits), (B,))], 1)
    digit = labels[index]  # (B, 2)
    color = digit + torch.randint(1, 6, (B, 2))  # modulo 6; + 0 would be the held-out color
    if held:
        which = torch.randint(3, (B,))  # the first, the second, or both
        color = torch.where(torch.stack([which != 1, which != 0], 1), digit, color)
    relation = torch.randint(2, (B, 1))
    scenes = torch.cat([torch.stack([digit, color % 6], 2).flatten(1), relation], 1)
    twin, move = twins(scenes[:n])
    scenes = torch.cat([scenes[:B - n], twin])
    moved = torch.where(move[:, None], index[:n].flip(1), index[:n])
    index = torch.cat([index[:B - n], moved]).to(digits.device)
    return render(digits[index], scenes), scenes

def different_pairs(digits, labels, count, held):
    """At most `count` images and scenes, no two of which say the same."""
    index = torch.randint(len(digits), (3 * count,))
    images, scenes = sample_pairs(digits, labels, index, held=held)
    keep = torch.as_tensor(np.unique(number(scenes), return_index=True)[1])
    keep = keep[torch.randperm(len(keep))[:count]]
    return images[keep.to(images.device)], scenes[keep]

# ---- Two towers ----------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention under the names of torch's own; if causal, no token looks ahead."""

    def __init__(self, dim, num_heads, causal):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.in_proj_weight = nn.Parameter(dim**-0.5 * torch.randn(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, N, 3D) -> (B, N, 3, h, D/h)
        heads = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=self.causal)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, h, N, D/h) -> (B, N, D)

class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B, N, D) throughout."""

    def __init__(self, dim, num_heads, causal, depth):
        super().__init__()
        self.attn = Attention(dim, num_heads, causal)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(dim, 4 * dim), c_proj=nn.Linear(4 * dim, dim)))
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * dim)**-0.5)
        for last in (self.attn.out_proj, self.mlp.c_proj):  # small, for 2 · depth of them add up
            nn.init.normal_(last.weight, std=(2 * depth * dim)**-0.5)
        nn.init.zeros_(self.attn.out_proj.bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        h = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(h * torch.sigmoid(1.702 * h))  # QuickGELU, close to GELU

def transformer(dim, depth, num_heads, causal=False):
    """A stack of blocks."""
    blocks = (ResidualAttentionBlock(dim, num_heads, causal, depth) for _ in range(depth))
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))

class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> (B, E): patches, and a class token that answers for all."""

    def __init__(self, side, patch_size, dim, depth, num_heads, embed_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(dim**-0.5 * torch.randn(dim))
        self.positional_embedding = nn.Parameter(
            dim**-0.5 * torch.randn((side // patch_size)**2 + 1, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = transformer(dim, depth, num_heads)
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, embed_dim))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, 3, H, W) -> (B, N, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)  # (B, 1 + N, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj  # (B, 1 + N, D) -> (B, D) -> (B, E)

def conv(inputs, outputs, kernel=1, stride=1):
    """A convolution that keeps the size, without bias: a norm follows."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)

class Bottleneck(nn.Module):
    """A residual block: convolutions of 1x1, 3x3 and 1x1; its stride is an average of pixels."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        dim = 4 * planes
        self.conv1, self.bn1 = conv(inputs, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, dim), nn.BatchNorm2d(dim)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = (nn.Identity() if stride == 1 and inputs == dim else
                           nn.Sequential(conv(inputs, dim), nn.BatchNorm2d(dim)))
        nn.init.zeros_(self.bn3.weight)  # at first only what goes around counts

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.pool(F.relu(self.bn2(self.conv2(y))))))
        return F.relu(y + self.downsample(self.pool(x)))

class AttentionPool2d(nn.Module):
    """(B, D, H, W) -> (B, E): the mean of all places asks every place."""

    def __init__(self, side, dim, num_heads, embed_dim):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(side**2 + 1, dim))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.c_proj = nn.Linear(dim, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=dim**-0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, N, D)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # (B, 1 + N, D)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (
            self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))  # (B, N, D) -> (B, h, N, D/h)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(heads.transpose(1, 2).flatten(1))  # (B, h, 1, D/h) -> (B, D) -> (B, E)

class ModifiedResNet(nn.Module):
    """Images (B, 3, H, W) -> (B, E): a stem of three convolutions, stages of residual blocks, each
    at half the resolution of the one before, and attention in place of the last average."""

    def __init__(self, side, width, layers, head_width, embed_dim):
        super().__init__()
        half, dim = width // 2, width
        self.conv1, self.conv2 = conv(3, half, 3, stride=2), conv(half, half, 3)
        self.conv3, self.bn1 = conv(half, width, 3), nn.BatchNorm2d(half)
        self.bn2, self.bn3 = nn.BatchNorm2d(half), nn.BatchNorm2d(width)
        for i, count in enumerate(layers):
            stage, planes = nn.Sequential(), width * 2**i
            for j in range(count):
                stage.append(Bottleneck(dim, planes, stride=2 if i and not j else 1))
                dim = 4 * planes
            self.add_module(f"layer{i + 1}", stage)
        self.attnpool = AttentionPool2d(side // 2**(len(layers) + 1), dim, dim // head_width,
                                        embed_dim)

    def forward(self, x):
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        x = F.avg_pool2d(x, 2)  # (B, 3, H, W) -> (B, D, H/4, W/4)
        for name, stage in self.named_children():
            x = stage(x) if name.startswith("layer") else x
        return self.attnpool(x)

MODELS = {  # an image tower with its sizes; of the text tower: words, length, width, depth, heads
    "ViT-B/32": (VisionTransformer, (224, 32, 768, 12, 12, 512), (49408, 77, 512, 12, 8)),
    "RN50": (ModifiedResNet, (224, 64, (3, 4, 6, 3), 64, 1024), (49408, 77, 512, 12, 8)),
    "vit": (VisionTransformer, (40, 8, 96, 4, 4, 128), (END + 1, LENGTH, 96, 3, 3)),
    "resnet": (ModifiedResNet, (40, 16, (1, 1), 16, 128), (END + 1, LENGTH, 96, 3, 3))}

class CLIP(nn.Module):
    """Both towers and the temperature, in one of the sizes of MODELS."""

    def __init__(self, name):
        super().__init__()
        tower, sizes, (vocab_size, length, dim, depth, num_heads) = MODELS[name]
        self.visual, self.end = tower(*sizes), vocab_size - 1  # end of text: the last token
        self.transformer = transformer(dim, depth, num_heads, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, dim))
        self.ln_final = nn.LayerNorm(dim)
        self.text_projection = nn.Parameter(dim**-0.5 * torch.randn(dim, sizes[-1]))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # t; e^t = 14.3
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """Images (B, 3, H, W) -> (B, E), not yet of length 1."""
        return self.visual(images)

    def encode_text(self, text, tokens=False):
        """Tokens (B, L) -> (B, E), read off at the first end of text; with `tokens` also one
        encoding a token (B, L, D), 0 after the end (ex. 6.4)."""
        x = self.token_embedding(text) + self.positional_embedding[:text.shape[1]]
        x = self.ln_final(self.transformer(x))  # (B, L) -> (B, L, D)
        at = (text == self.end).int().argmax(1)
        pooled = x[torch.arange(len(x), device=x.device), at] @ self.text_projection  # -> (B, E)
        inside = torch.arange(text.shape[1], device=x.device) <= at[:, None]
        return (pooled, x * inside[..., None]) if tokens else pooled

    def forward(self, images, text):
        """Logits (B_images, B_texts): cosines times e^t."""
        images, text = self.encode_image(images), self.encode_text(text)
        return self.logit_scale.exp() * F.normalize(images, dim=1) @ F.normalize(text, dim=1).T

# ---- Contrastive losses --------------------------------------------------------------------------

def clip_loss(images, texts, scale, same=None):
    """loss_i over the rows and loss_t over the columns (ex. 6.1), in nats; CLIP's is their mean.
    Features (B, E) of length 1, scale = e^t. `same` (B, B): which texts say the same; off the
    diagonal these are no negatives and left out, else k equal ones cost ln k at best. Without it
    identical features cost ln B."""
    logits = scale * images @ texts.T  # (B, E), (B, E) -> (B, B)
    target = torch.arange(len(logits), device=logits.device)  # row a and column a belong together
    if same is not None:
        logits = logits.masked_fill(same & (target != target[:, None]), -math.inf)
    return F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)

class Momentum:
    """ITC's slow copy of the model, θ', and the queue of its last M features and their scenes'
    numbers (-1: still empty)."""

    def __init__(self, model, size, momentum):
        self.slow, self.momentum = copy.deepcopy(model).requires_grad_(False), momentum
        self.images = model.text_projection.new_zeros(size, model.text_projection.shape[1])
        self.texts, self.count = self.images.clone(), 0
        self.numbers = torch.full((size,), -1, device=self.images.device)

    @torch.no_grad()
    def update(self, model):
        """θ' <- m θ' + (1 - m) θ, after every step of θ (ex. 6.8)."""
        for slow, fast in zip(self.slow.parameters(), model.parameters()):
            slow.lerp_(fast, 1 - self.momentum)

    def push(self, images, texts, numbers):
        """First in, first out: features (B, E) take the place of the oldest. No gradient stays."""
        size = len(self.numbers)
        at = (self.count + torch.arange(len(numbers), device=numbers.device))[-size:] % size
        self.images[at], self.texts[at] = images[-size:].detach(), texts[-size:].detach()
        self.numbers[at], self.count = numbers[-size:], self.count + len(numbers)

def itc_loss(images, texts, slow_images, slow_texts, queue, numbers, scale):
    """Image to text and text to image (ex. 6.8, arXiv:2107.07651 §3.2), in nats; ITC is their mean.
    Features (B, E) against the slow ones of the other modality: this batch's, of which number a
    is right for a, and the queue's; scale = 1/τ. Equal scenes are no negatives. With none of them
    and a full queue identical features cost ln(B + M)."""
    others = torch.cat([numbers, queue.numbers])
    target = torch.arange(len(images), device=images.device)
    skip = (numbers[:, None] == others) | (others < 0)  # (B, B + M)
    skip[target, target] = False
    losses = []
    for fast, slow, past in ((images, slow_texts, queue.texts), (texts, slow_images, queue.images)):
        logits = scale * fast @ torch.cat([slow, past]).T  # (B, E) -> (B, B + M)
        losses.append(F.cross_entropy(logits.masked_fill(skip, -math.inf), target))
    return losses

# ---- What was learned, and what binds to what ----------------------------------------------------

@torch.no_grad()
def features(model, inputs):
    """Images (N, 3, H, W) or tokens (N, L) -> features (N, E) of length 1, in portions."""
    encode = model.encode_image if inputs.ndim == 4 else model.encode_text
    return torch.cat([F.normalize(encode(some.to(model.logit_scale.device)), dim=1)
                      for some in inputs.split(500)])

def recall(similarity, k):
    """Whether the own column of each row of (N, N) is among the k most similar, (N,)."""
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1)  # 0 where it is not a number
    return (rank >= 1) & (rank <= k)

def prefers(similarity, scenes, others):
    """Whether images are nearer to their own captions than to those of other scenes (N, K, 5);
    from the similarities (N, 7200) to all captions."""
    own, others = number(scenes)[:, None], number(others % SLOTS)
    nearer = similarity.gather(1, own) > similarity.gather(1, others)
    return (nearer | (others == own)).all(1)  # (N, K) -> (N,); equal scenes are no others

def evaluate(images, texts, scenes):
    """All results by name from the features of N images (N, E) and of all captions (7200, E)."""
    similarity, right = (images @ texts.T).cpu(), {}
    own = similarity[:, number(scenes)]  # (N, N)
    for way, part in (("image to text", own), ("text to image", own.T)):
        right |= {f"{way} R@{k}": recall(part, k) for k in (1, 5)}
    one = torch.eye(5, dtype=torch.long)  # zero-shot: all captions that differ in one thing only
    for name, slots in dict(digit=(0, 2), color=(1, 3)).items():
        steps = [torch.arange(1, SLOTS[i])[:, None] * one[i] for i in slots]
        right[name] = torch.cat([prefers(similarity, scenes, scenes[:, None] + s) for s in steps])
    across, swap = scenes + one[4], EXCHANGES["places"]
    others = torch.stack([scenes[:, swap], across, across[:, swap]], 1)
    right["relation"] = prefers(similarity, scenes, others)
    # binding, of two different digits in two colors; a foil has no digit-color pair that is new
    # unless the caption has one, too
    two = (scenes[:, :2] != scenes[:, 2:4]).all(1)
    for name, order in EXCHANGES.items():
        foils = scenes[:, order]
        fair = two & (held_out(scenes) | ~held_out(foils))
        right[f"{name} exchanged"] = prefers(similarity, scenes, foils[:, None])[fair]
    return {name: hits.float().mean().item() for name, hits in right.items()}

def chance(N):
    """What guessing reaches in `evaluate`."""
    shares = {f"{way} R@{k}": k / N for way in ("image to text", "text to image") for k in (1, 5)}
    shares |= {"digit": 1 / 10, "color": 1 / 6, "relation": 1 / 4}
    return shares | {f"{name} exchanged": 1 / 2 for name in EXCHANGES}

# ---- Training ------------------------------------------------------------------------------------

class Learner:
    """A model with its loss ("clip" or "itc"), its optimizer and its size of batch."""

    def __init__(self, model, config, loss, batch_size):
        self.model, self.batch_size = model, batch_size
        self.memory = Momentum(model, config.queue, config.momentum) if loss == "itc" else None
        wide = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim < 2]  # norms and biases do not decay
        self.optimizer = torch.optim.AdamW([dict(params=wide), dict(params=rest, weight_decay=0)],
                                           betas=(0.9, 0.98), weight_decay=0.1)

    def loss(self, images, tokens, numbers):
        """loss_i and loss_t of a batch; the queue takes its slow features up."""
        def both(model):
            with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
                pair = model.encode_image(images), model.encode_text(tokens)
            return [F.normalize(v.float(), dim=1) for v in pair]

        fast, scale = both(self.model), self.model.logit_scale.exp()
        if self.memory is None:
            return clip_loss(*fast, scale, numbers[:, None] == numbers)
        slow = both(self.memory.slow)
        losses = itc_loss(*fast, *slow, self.memory, numbers, scale)
        self.memory.push(*slow, numbers)
        return losses

    def step(self, losses, lr):
        """One step of AdamW on the mean of both losses; e^t stays in 1..100."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        (sum(losses) / 2).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        if self.memory is not None:
            self.memory.update(self.model)

def train(run, learners, digits, labels, tests):
    """Trains every learner on the same digits, each in batches of its own size."""
    c = run.config

    def report():
        row = {}
        for name, learner in learners.items():
            model = learner.model.eval()
            for kind, (images, scenes) in tests.items():
                similarity = features(model, images) @ features(model, say(scenes, 0)).T
                row[f"{name} R@1 {kind}"] = recall(similarity, 1).float().mean().item()
            row[f"{name} e^t"] = model.logit_scale.exp().item()
            model.train()
        return row

    for index in run.batches(len(digits), report, per_epoch=2):
        warm, done = min(1, (run.step + 1) / min(200, run.steps / 10)), run.step / run.steps
        lr, terms = c.lr * warm * (1 + math.cos(math.pi * done)) / 2, {}
        for name, learner in learners.items():
            parts = []
            for some in index.split(learner.batch_size):
                images, scenes = sample_pairs(digits, labels, some, c.twins)
                losses = learner.loss(images, say(scenes).to(run.device),
                                      number(scenes).to(run.device))
                learner.step(losses, lr)
                parts.append(torch.stack(losses).detach())
            loss_i, loss_t = torch.stack(parts).mean(0)
            terms |= {f"{name} loss_i": loss_i, f"{name} loss_t": loss_t}
        run.log(**terms)

# ---- Figures -------------------------------------------------------------------------------------

def show(axes, image, text):
    """One image (3, H, W) under a short text."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    axes.set_title(text, fontsize=8)
    axes.set_axis_off()

def draw_pairs(run, images, scenes):
    """Six scenes with their captions, each above its twin."""
    places = (figure := Figure((11, 4.4), layout="constrained")).subplots(2, 6).flat
    for k, (axes, image, scene) in enumerate(zip(places, images, scenes.tolist())):
        words = sentence(scene, k % 6).split()
        show(axes, image, " ".join(words[:5]) + "\n" + " ".join(words[5:]))
    run.figure("pairs", "Below each image its twin: the same words, another meaning", figure)

def draw_training(run, names):
    """Losses, retrieval and temperature over training, for every learner."""
    panels = (figure := Figure((12, 3.6), layout="constrained")).subplots(1, 3)
    epochs = [row["epoch"] for row in run.history]
    lines = {"loss in nats": ("loss_i", "loss_t"), "e^t, at most 100": ("e^t",),
             "share of unseen images\nthat find their caption": ("R@1 seen", "R@1 new")}
    for axes, (ylabel, keys) in zip(panels, lines.items()):
        for i, name in enumerate(names):
            for key, style in zip(keys, "-:"):
                axes.plot(epochs, [row[f"{name} {key}"] for row in run.history], f"C{i}{style}",
                          marker="os^D"[i], label=f"{name}: {key}")
        axes.set(xlabel="epoch", ylabel=ylabel, ylim=0)
        axes.legend(fontsize=8)
    found = ", ".join(f"{name} {run.history[-1][f'{name} R@1 seen']:.0%}" for name in names)
    run.figure("training", f"Unseen images that find their caption at the end: {found}", figure)

def draw_similarity(run, images, cosines, scenes):
    """Test images (8), their captions and all 64 cosines."""
    axes = (figure := Figure((10, 6), layout="constrained")).subplots()
    shown = axes.imshow(cosines.numpy(), cmap="gray", extent=(0, 8, 8, 0))
    for k, image in enumerate(images):
        axes.imshow(image.permute(1, 2, 0).cpu().numpy(), extent=(k, k + 1, 0, -1))
    axes.set(xlim=(0, 8), ylim=(8, -1), xticks=[])
    axes.set_yticks(np.arange(8) + 0.5, map(sentence, scenes.tolist()))
    figure.colorbar(shown, label="cosine")
    right = (cosines.argmax(0) == torch.arange(8)).sum()
    run.figure("similarity", f"{right} of eight images are nearest to their own caption", figure)

def draw_prompts(run, prompts, cosines, images, scenes):
    """The six images nearest to each prompt, and which are right if it tells a whole scene."""
    figure = Figure((8, 0.5 + 1.75 * len(prompts)), layout="constrained")
    rows = figure.subfigures(len(prompts), 1, squeeze=False)[:, 0]
    told = [[sentence(scene, k) for k in range(8)] for scene in scenes.tolist()]
    for row, prompt, cosine in zip(rows, prompts, cosines):
        right = [prompt in sayings for sayings in told]
        for axes, k in zip(row.subplots(1, 6), cosine.topk(6)[1].tolist()):
            show(axes, images[k], f"{cosine[k]:.2f}" + " right" * right[k])
        row.suptitle(f"{prompt} (shown by {sum(right)})", fontsize=9, weight="bold")
    run.figure("prompts", f"Nearest to each sentence among {len(images):,} test images", figure)

def draw_results(run, results, guess):
    """What was learned, as bars with their chance levels: seen pairs and held-out pairs."""
    axes = (figure := Figure((10, 4.2), layout="constrained")).subplots()
    names = [name for name in guess if "R@5" not in name]
    places = np.arange(len(names))
    kinds = dict(seen="digit-color pairs of the training", new="with pairs never seen")
    for i, (kind, label) in enumerate(kinds.items()):
        bars = axes.bar(places + 0.4 * i, [100 * results[kind][name] for name in names], 0.38,
                        label=label, hatch="//" * i)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    levels = [100 * guess[name] for name in names]
    axes.hlines(levels, places - 0.25, places + 0.65, "gray", "--", label="chance")
    axes.set_xticks(places + 0.2, [name.replace(" ", "\n") for name in names], fontsize=8)
    axes.set(ylabel="right, % of unseen images", ylim=(0, 125), yticks=range(0, 101, 20))
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    share = results["seen"]["places exchanged"]
    run.figure("results", f"{share:.0%} prefer their caption to that with places exchanged", figure)

def draw_modalities(run, images, texts):
    """Features (N, E) of length 1, of images and of captions, in their two main directions."""
    axes = (figure := Figure((6.8, 5.6), layout="constrained")).subplots()
    both = torch.stack([images, texts]).cpu()
    gap = (both[0].mean(0) - both[1].mean(0)).norm()
    both = both - both.mean((0, 1))
    flat = both @ torch.linalg.svd(both.flatten(0, 1))[2][:2].T  # (2, N, E) -> (2, N, 2)
    axes.plot(*flat.permute(2, 0, 1).numpy(), color="0.85", linewidth=0.6, zorder=0)
    for points, marker, name in zip(flat.numpy(), "o^", ("images", "texts")):
        axes.scatter(*points.T, s=14, marker=marker, label=name)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.legend()
    run.figure("modalities", f"The means of images and captions are {gap:.2f} apart", figure)

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
    asked = c.prompt.strip("; .") or (
        "a red three above a blue seven; a blue three above a red seven; "
        "a blue seven above a red three; a red zero left of a blue two")
    prompts = [" ".join(p.lower().strip(" .").split()) for p in asked.split(";") if p.strip(" .")]
    for word in " ".join(prompts).split():
        if word not in WORDS:
            print(f"--prompt: {word!r} is unknown; the words are:", *WORDS, file=sys.stderr)
            return 2
    run = Run(c)
    images, labels, test_images, test_labels = run.data()
    pairs, unseen = (images, labels.cpu()), (test_images, test_labels.cpu())
    count = min(1000, len(test_images))
    tests = {kind: different_pairs(*unseen, count, kind == "new") for kind in ("seen", "new")}
    plan = {"CLIP": (c.loss, c.batch_size)}
    if c.compare:
        plan = {f"{loss} {name}": (loss, size)
                for name, size in (("B/8", c.batch_size // 8), ("B", c.batch_size))
                for loss in ("clip", "itc")}
    models = nn.ModuleDict()
    for name in plan:
        torch.manual_seed(c.seed)  # all start alike
        models[name] = CLIP(c.tower).to(run.device)
    run.load(models)
    shown = sample_pairs(*pairs, torch.arange(12) % len(images), 0.5)
    train(run, {name: Learner(models[name], c, *how) for name, how in plan.items()}, *pairs,
          tests)
    run.save(models.eval())
    draw_pairs(run, *shown)
    draw_training(run, plan)
    guess, results, ways = chance(count), {}, 1 if c.quick else 8
    for name, model in models.items():
        sayings = [features(model, say(SCENES, k)) for k in range(ways)]
        ensemble = F.normalize(torch.stack(sayings).mean(0), dim=1)
        encoded = {kind: features(model, views) for kind, (views, _) in tests.items()}
        results[name] = {f"{kind}{more}": evaluate(encoded[kind], texts, scenes)
                         for kind, (_, scenes) in tests.items()
                         for more, texts in (("", sayings[0]), (", ensemble", ensemble))}
        table = dict(results[name], chance=guess)
        print(f"\n{name + ', % right':20}" + "".join(f"{kind:>16}" for kind in table))
        for key in guess:
            print(f"{key:20}" + "".join(f"{100 * part[key]:16.1f}" for part in table.values()))
    (test, scenes), seen = tests["seen"], encoded["seen"]
    texts = sayings[0][number(scenes).to(run.device)]
    draw_similarity(run, test[:8], (texts[:8] @ seen[:8].T).cpu(), scenes[:8])
    draw_results(run, results[name], guess)
    draw_modalities(run, seen[:300], texts[:300])
    index = torch.randint(len(test_images), (10 * count,))
    pool, scenes = (torch.cat(v) for v in zip(
        sample_pairs(*unseen, index), sample_pairs(*unseen, index[::4], held=True)))
    cosines = (features(model, tokenize(prompts)) @ features(model, pool).T).cpu()
    draw_prompts(run, prompts, cosines, pool, scenes)
    return run.finish(**results, chance=guess)

if __name__ == "__main__":
    launch(main)
