r"""CAE-DFKD in one file: data-free knowledge distillation with category-aware embeddings.

A student learns from a frozen teacher without one real image. Paper: CAE-DFKD, arXiv 2504.21478,
DAC 2025. Our sources: its abstract, the beginning of its introduction, a review that quotes eq. 1,
and secondary notes. We had neither the full text nor official code.

    python cae_dfkd.py                                         # drawn data, minutes on a laptop
    python cae_dfkd.py --teacher resnet34 --dataset cifar10    # fetches teacher and test images
    python cae_dfkd.py --resume runs/NAME                      # go on after Ctrl-C or a crash
    python cae_dfkd.py --eval-only runs/NAME/student.pt --dataset cifar10

Every category y has an embedding e_y, by default a row of the teacher's classifier. CEND, category
embedding noise diffusion, adds noise to it (eq. 1), and a light generator turns the sum into an
image (eq. 2). One *cycle* is:

Phase A, synthesis, is one *round*: the noise is drawn once, and the generator takes a few steps on
it. The teacher should recognise the category in the images (eq. 3), their statistics should be the
ones that its BatchNorm layers store (eq. 4), and the student's outputs should differ from its
outputs (eq. 5). The images of the last step go to a memory bank. The first cycle has extra rounds.

Phase B, distillation: the student takes some steps on images of the bank, towards the teacher's
logits (eq. 7) and embeddings (eq. 8). CNCL, category noise contrastive learning, pulls images of
one category together, whatever their noise, and pushes others away (eq. 9). A and then B is
*decoupled* training. *Coupled* training alternates single steps of generator and student.

Notation   B batch size, K categories, H x H pixels; E, D, D_T widths of e, f_S, f_T
           e (K, E) category embeddings; ê (B, E) = e_y + noise; x̂ (B, 3, H, H) images in [0, 1]
           T teacher, S student; t, s (B, K) their logits; f_T (B, D_T), f_S (B, D) embeddings:
           what enters their last linear layers; z = h(f_S) (B, D_T), h a linear layer

eq  what                               where                            source
 1  ê = e_y + M_n ⊙ q_n                CEND                             paper
 2  x̂ = G(ê)                           Generator                        prior work (DAFL, NAYER)
 3  L_CE, category consistency         category_consistency_loss        paper
 4  L_FM, feature matching             feature_matching_loss            paper; after DeepInversion
 5  L_adv, adversarial                 adversarial_loss                 paper; form of NAYER
 6  L_G = L_CE + λ_fm L_FM + λ_adv L_adv            generator_step      paper; weights are ours
 7  L_KD, knowledge distillation       kd_loss                          paper; form of Hinton et al.
 8  L_CAE, category-aware embedding    category_aware_embedding_loss    summary; form is ours
 9  L_CNCL, contrastive                contrastive_loss                 paper: pairs; form of SupCon
10  L_S = L_KD + λ_cae L_CAE + λ_cncl L_CNCL        student_step        paper: KD + CNCL; rest ours

Summary: what one secondary note says. Equation numbers, and what is marked [our choice], are ours.
Left out, and where it went: detection, several processes, more networks and the benchmark are
scripts in .github/scripts; other data sets are folders; networks of your own go to `distill`.
"""
# SPDX-License-Identifier: MIT
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, transforms
from torchvision.models.resnet import BasicBlock


# ===== 1. Settings: flags, types, defaults and help in one place ==================================
@dataclasses.dataclass
class Config:
    """Every setting of a run. The comment behind a field is the help of its flag.

    The numbers are for CIFAR-10 and [our choice]; the README says what was measured of them. On a
    command line for shapes, SHAPES_PRESET replaces some (eq. 5 is off); Config() does not do that.
    """
    # The run
    dataset: str = "shapes"             # shapes (drawn), cifar10, cifar100 or a folder of images
    probe_dataset: str = "shapes-unseen"    # data set of the linear probe, likewise
    image_size: int = 32                # height and width in pixels
    cycles: int = 150                   # cycles of synthesis and distillation
    minutes: float = 0.0                # minutes of both, in place of --cycles
    eval_every: int = 25                # cycles between evaluations on the test split
    seed: int = 0                       # seed of weights, noise and batches
    device: str = "cuda" if torch.cuda.is_available() else "cpu"    # where to compute
    bf16: bool = False                  # bfloat16 networks: for GPUs, CPUs with AMX or AVX512-BF16
    out: str = ""                       # run directory to make; else a new one in runs/
    resume: str = ""                    # run directory to go on with, by its own settings
    eval_only: str = ""                 # score this student.pt and stop
    debug: bool = False                 # show the traceback of an error
    # Networks
    teacher: str = "resnet20"           # resnet8, 20, 32, 44, 56 or, wide, resnet18, 34, 50
    student: str = ""                   # likewise; else resnet18 for 34 and 50, resnet8 for others
    teacher_ckpt: str = ""              # teacher weights; else fetched, or trained
    teacher_epochs: int = 60            # epochs of a teacher that has to be trained
    mean: tuple[float, ...] = ()        # the teacher's input mean, three numbers; else the usual
    std: tuple[float, ...] = ()         # its standard deviation, likewise
    # Phase A, synthesis
    prior: str = "teacher"              # category embeddings: teacher, index or a (K, E) .npy file
    cend: bool = True                   # diffuse category embeddings; else noise alone goes in
    magnitudes: tuple[float, ...] = (2.0, 2.0, 2.0, 2.0)    # M_n of the noise sources, eq. 1
    generator_width: int = 64           # channels of its seed layer; 128 is heavy
    decoupled: bool = True              # phases A and B; without, single steps of each in turns
    synth_batch: int = 128              # images of a synthesis round
    synth_steps: int = 12               # generator steps of a round
    generator_lr: float = 4e-3          # Adam step size of the generator, as in NAYER
    synth_crop: bool = True             # in phase A, networks see crops on black, flipped or not
    lambda_fm: float = 25.0             # weight of feature matching, eq. 4
    lambda_adv: float = 1.0             # weight of the adversarial term, eq. 5
    bank_capacity: int = 20_000         # newest images that the memory bank keeps
    warmup_rounds: int = 4              # further rounds before the first student step
    # Phase B, distillation
    kd_steps: int = 80                  # student steps of a cycle
    batch_size: int = 64                # images of a student step
    student_lr: float = 0.15            # SGD step size of the student, before its cosine
    lr_warmup: int = 5                  # cycles of linear warm-up of the student's step size
    kd_temperature: float = 20.0        # temperature of eq. 7; at 20 it almost matches logits
    lambda_cae: float = 4.0             # weight of the category-aware loss, eq. 8
    lambda_cncl: float = 0.1            # weight of the contrastive term, eq. 9
    places: int = 4                     # places per image at which eq. 8 compares maps; 0: none
    clip_norm: float = 10.0             # largest gradient norm of a student step; 0: no limit
    colour_jitter: float = 0.3          # how far colours of the bank's images vary

    def __post_init__(self):
        """ValueError if a number is negative or huge, or a count that may not be 0 is."""
        if not (self.cend or self.decoupled):           # new noise in each step, and no e_y in it
            raise ValueError("--no-cend needs --decoupled: else G cannot know the category")
        for name, value in vars(self).items():
            low = 1 if type(getattr(Config, name)) is int and name not in MAY_BE_0 else 0
            for number in value if isinstance(value, (tuple, list)) else [value]:
                if type(number) in (int, float) and not low <= number <= 1e12:
                    raise ValueError(f"{name} is {number}, and not in {low} to 1e12")


MAY_BE_0 = "seed", "warmup_rounds", "lr_warmup", "places"               # other counts may not
SHAPES_PRESET = dict(teacher_epochs=5, cycles=10, kd_steps=100, lambda_fm=8.0, lambda_adv=0.0,
                     student_lr=0.1)
STUDENTS = {"resnet34": "resnet18", "resnet50": "resnet18"}             # of others: resnet8


def parse_args(argv: list[str] | None = None) -> Config:
    """Command line -> settings; with --resume those of the run's config.json and no others."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    source = inspect.getsource(Config)                  # its comments become the help: no %
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(field.default, tuple):
            kind = {"type": float, "nargs": "+"}
        text = f"{help_of[field.name]} (default: {field.default}"
        if field.name in SHAPES_PRESET:
            text += f"; shapes: {SHAPES_PRESET[field.name]}"
        parser.add_argument("--" + field.name.replace("_", "-"), **kind, help=text + ")")
    given = vars(parser.parse_args(argv))               # only what was typed
    if "resume" in given:
        if given.keys() - {"resume", "debug"}:
            raise ValueError("a resumed run has its settings: give --resume alone")
        given = json.loads(Path(given["resume"], "config.json").read_text()) | given
    elif given.get("dataset", "shapes") == "shapes":
        given = SHAPES_PRESET | given
    config = Config(**given)
    config.student = config.student or STUDENTS.get(config.teacher, "resnet8")
    return config


# ===== 2. Teacher: networks, loading a checkpoint, reading a network's embedding and maps =========
class Normalized(nn.Module):
    """A network that takes images in [0, 1]: it normalises them to what `net` was trained on."""
    def __init__(self, net: nn.Module, mean, std):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)            # the faster layout
        mean, std = (torch.as_tensor(v).float().view(3, 1, 1) for v in (mean, std))
        self.register_buffer("mean", mean, persistent=False)            # not in the state dict
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)


def cifar_resnet(depth, num_classes):
    """ResNet-(6n+2) of He et al. for CIFAR, with the parameter names of torchvision's ResNets.

    Where the width changes, the shortcut takes every second pixel and adds channels of zeros
    ("option A"). AvgPool2d(1, 2) is x[:, :, ::2, ::2]; the last two paddings are of channels.
    """
    model = nn.Sequential()                             # runs what follows in this order
    model.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    model.bn1, model.relu = nn.BatchNorm2d(16), nn.ReLU()
    for i, (width, out) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
        others = [BasicBlock(out, out) for _ in range((depth - 2) // 6 - 1)]
        pad = (out - width) // 2                        # channels to add on each side
        shortcut = nn.Sequential(nn.AvgPool2d(1, 2), nn.ConstantPad3d((0, 0, 0, 0, pad, pad), 0.0))
        first = BasicBlock(width, out, 2, shortcut) if pad else BasicBlock(width, out)
        model.add_module(f"layer{i}", nn.Sequential(first, *others))
    model.avgpool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(64, num_classes)
    return model


def build_model(arch: str, num_classes: int) -> nn.Module:
    """An untrained network by its literature name, x (B, 3, H, W) -> logits (B, K).

    resnet18, 34, 50 are torchvision's with the usual CIFAR stem: 3x3, stride 1, no first pooling.
    """
    if arch in ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56"):
        return cifar_resnet(int(arch[6:]), num_classes)
    if arch not in ("resnet18", "resnet34", "resnet50"):
        raise ValueError(f"unknown network {arch!r}; --help lists all")
    model = getattr(torchvision.models, arch)(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def load_teacher(arch: str, num_classes: int, path, mean=None, std=None, default=None):
    """A teacher's file or a student.pt -> Normalized, frozen, in eval mode, for images in [0, 1].

    Understands the wrappers state_dict, net and model, the prefix `module.`, heads called linear,
    classifier or fc, shortcuts called shortcut or downsample; loads strictly, and executes nothing.
    Normalisation: mean and std, else what the file stores by these names, else `default`, a pair,
    else ImageNet's. Raises ValueError that says what does not fit.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        weights, renamed = stored, {}
        for wrapper in ("state_dict", "net", "model"):
            weights = weights.get(wrapper, weights)
        for key, value in weights.items():
            key = key.removeprefix("module.").replace(".shortcut.", ".downsample.")
            renamed[re.sub(r"^(linear|classifier)\.", "fc.", key)] = value
        net = build_model(arch, num_classes)
        counters = {k: v for k, v in net.state_dict().items() if k.endswith("_tracked")}
        net.load_state_dict(counters | renamed)         # old files lack these counters
        usual = default or IMAGENET
        mean, std = mean or stored.get("mean", usual[0]), std or stored.get("std", usual[1])
        return Normalized(net, mean, std).eval().requires_grad_(False)
    except Exception as error:
        raise ValueError(f"{path} is no {arch} with {num_classes} classes: {error}") from error


@contextlib.contextmanager
def frozen(model):
    """Eval mode, and no gradients to weights; inputs still get theirs, for G. Undone at the end."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def listen(layers):
    """`with listen(layers) as heard: model(x)`; heard: [(layer, input, output)] as called."""
    heard = []
    def hook(layer, inputs, output):
        heard.append((layer, inputs[0] if inputs else None, output))
    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield heard
    finally:
        for handle in hooks:
            handle.remove()


def find_layers(model, image, extractor=False):
    """Names of the layers at which a network is read, by one forward pass of an image (1, 3, H, H).

    -> (head, maps): of a ResNet-20 ("fc", ["layer1", "layer2", "layer3"]), with "net." before each
    in a Normalized. head: the nn.Linear whose output is the network's own; the embedding enters it.
    extractor=True: a network without such a layer has the head "", its output is the embedding.
    maps: for each size h > 1 the last layer that gives (1, D > 3, h, h) before a coarser map comes.
    A convolution of the image itself does not count: in vision transformers it only cuts patches.
    """
    with frozen(model), torch.no_grad(), listen(model.modules()) as heard:
        logits = model(image)
    name_of = {layer: name for name, layer in model.named_modules()}
    heads, maps = [""] if extractor else [], {}
    for layer, x, y in heard:
        if isinstance(layer, nn.Linear) and y is logits:
            heads.append(name_of[layer])
        on_image = isinstance(layer, nn.Conv2d) and x.shape == image.shape
        is_map = isinstance(y, Tensor) and y.ndim == 4 and y.shape[2] == y.shape[3] > 1
        if is_map and y.shape[1] > 3 and not on_image and y.shape[2] <= min(maps, default=math.inf):
            maps[y.shape[2]] = name_of[layer]           # a block ends after its layers, and wins
    if not heads:
        raise ValueError(f"{type(model).__name__} ends in no nn.Linear: name (head, maps)")
    return heads[-1], list(dict.fromkeys(maps.values()))    # a layer may serve two sizes


def read(model, x, layers):
    """Logits (B, K), embedding (B, D) (for head "": logits), maps (B, D, h, w), coarsest first."""
    head, *maps = [model.get_submodule(name) for name in (layers[0], *layers[1])]
    with listen({head, *maps}) as heard:
        logits = model(x)
    f, last = logits, {}
    for layer, before, after in heard:
        if layer is head and layers[0]:
            f = before.mean((2, 3)) if before.ndim == 4 else before     # of a 1x1 convolution
        elif layer in maps and after.ndim == 4 and after[0, 0].numel() > 1:
            last[after.shape[2:]] = after               # the last of each size
    return logits, f, sorted(last.values(), key=lambda y: y[0, 0].numel())


def forward_with_embedding(model, x, head=""):
    """(logits (B, K), embedding f (B, D)): f enters `head`, else what `find_layers` finds."""
    return read(model, x, (head, []) if head else find_layers(model, x[:1]))[:2]


# ===== 3. CEND, generator, memory bank ============================================================
class CEND(nn.Module):
    """Category embedding noise diffusion, eq. 1 (paper; families and the draw of n are ours).

        ê = e_y + M_n ⊙ q_n,   n ~ U{1..N},   q_n ~ NS_n

    category_embeddings (K, E) in any scale; magnitudes: N numbers M_n. The laws of the sources are
    Gaussian, uniform, Laplace, Rademacher, Gaussian, ... "Diffusion" only means added noise.

    Embeddings are centred, since those of language models are almost parallel. They are scaled to a
    mean squared length of r = min(K-1, E), the number of directions that they can span; that of
    noise of magnitude 1 is E. So with K = 10, E = 64 and M = 2 an embedding has a length of about
    √9 = 3, and noise of 2 √64 = 16.                                                 [our choice]
    """
    def __init__(self, category_embeddings: Tensor, magnitudes=(2.0, 2.0, 2.0, 2.0)):
        super().__init__()
        e = category_embeddings.float() - category_embeddings.float().mean(0)
        r = min(len(e) - 1, e.shape[1])
        length = e.square().sum(1).mean().sqrt().clamp_min(1e-12)       # root mean square
        self.register_buffer("embeddings", e * math.sqrt(r) / length)               # (K, E)
        self.register_buffer("magnitudes", torch.tensor(magnitudes, dtype=torch.float32))

    def forward(self, labels: Tensor) -> Tensor:
        """labels (B,) -> ê (B, E). The source n is drawn for each row."""
        source = torch.randint(len(self.magnitudes), labels.shape, device=labels.device)    # (B,)
        e = self.embeddings[labels]                                                 # e_y (B, E)
        law = torch.distributions.Laplace(torch.zeros_like(e), math.sqrt(0.5), validate_args=False)
        noise = torch.stack([                           # zero mean, unit variance   [our choice]
            torch.randn_like(e),                        # Gaussian
            (2 * torch.rand_like(e) - 1) * math.sqrt(3),                # uniform
            law.sample(),                               # Laplace
            2.0 * torch.randint_like(e, 2) - 1])        # Rademacher                  (4, B, E)
        q = noise[source % 4, torch.arange(len(e), device=e.device)]                # q_n (B, E)
        return e + self.magnitudes[source, None] * q


class Generator(nn.Module):
    """Lightweight generator, eq. 2: x̂ = G(ê), (B, E) -> (B, 3, H, H) in [0, 1].     [our choice]

    A linear seed layer makes `width` channels of at most 8 x 8 pixels. Each stage doubles the size
    and convolves; later ones also halve the channels, down to 8. Width 64 is light, 128 heavy.
    """
    def __init__(self, embedding_dim: int, image_size: int = 32, width: int = 64):
        super().__init__()
        stages = max(1, math.ceil(math.log2(image_size / 8)))
        seed, *sizes = [math.ceil(image_size / 2 ** i) for i in range(stages, -1, -1)]
        self.seed_layer = nn.Linear(embedding_dim, width * seed * seed)
        layers = [nn.Unflatten(1, (width, seed, seed)), nn.BatchNorm2d(width)]
        out = width
        for size in sizes:                              # 16, 32, from a seed of 8
            layers += [nn.Upsample(size), nn.Conv2d(width, out, 3, 1, 1, bias=False),
                       nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            width, out = out, max(out // 2, 8)
        self.decode = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Sigmoid())

    def forward(self, e_hat: Tensor) -> Tensor:
        return self.decode(self.seed_layer(e_hat))


class MemoryBank(nn.Module):
    """First-in first-out store of uint8 images (capacity, 3, H, H) and labels.      [our choice]"""
    def __init__(self, capacity: int, image_size: int):
        super().__init__()
        images = torch.zeros(capacity, 3, image_size, image_size, dtype=torch.uint8)
        self.register_buffer("images", images)
        self.register_buffer("labels", torch.zeros(capacity, dtype=torch.long))
        self.pushed = 0                                                 # images ever pushed

    def push(self, images: Tensor, labels: Tensor) -> None:
        """images (B, 3, H, H) in [0, 1], else clamped; labels (B,). The oldest are overwritten."""
        if not images.isfinite().all():
            raise FloatingPointError("an image is not finite: lower a step size")
        new = torch.arange(len(labels), device=self.labels.device)
        slot = (self.pushed + new) % len(self.labels)
        self.images[slot] = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
        self.labels[slot] = labels
        self.pushed += len(labels)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """images (batch, 3, H, H) in [0, 1], labels (batch,); drawn with replacement."""
        filled = min(self.pushed, len(self.labels))
        i = torch.randint(filled, (batch,), device=self.labels.device)
        return to_float(self.images[i]), self.labels[i]


# ===== 4. Losses: pure functions, float32 tensors (eq. 4: what was heard) in, scalar tensor out ===
def category_consistency_loss(teacher_logits, labels):
    """Eq. 3 (paper): L_CE = CE(t(x̂), y), batch mean. (B, K), (B,) -> scalar >= 0."""
    return F.cross_entropy(teacher_logits, labels)


def feature_matching_loss(heard, eps=1e-4):
    """Eq. 4, teacher-guided feature distribution matching (paper; form after DeepInversion).

        L_FM = mean over BatchNorm layers l of ‖(μ_l(x̂) - μ_l)/σ_l‖₂ + ‖(σ²_l(x̂) - σ²_l)/σ²_l‖₂

    heard: from `with listen(layers) as heard: teacher(x̂)`; layers: the teacher's BatchNorm layers
    -> scalar >= 0. Needs `listen`, BatchStatistics. ValueError if nothing was heard.

    It keeps the generator from collapsing onto a few images that the teacher is sure of. Division
    by σ (without it, as in DeepInversion, channels of large values count more) and the mean over
    layers (so one weight fits any depth) are [our choice]. Norms are not divided by the number of
    channels, so wide layers count more. eps is added to σ², for channels that are nearly constant.
    """
    if not heard:
        raise ValueError("nothing was heard: use `with listen(layers) as heard`")
    distances = []
    for layer, x, _ in heard:
        mean, var = BatchStatistics.apply(x)                            # μ_l(x̂), σ²_l(x̂)
        scale = layer.running_var + eps                                 # σ²_l
        d_mean, d_var = mean - layer.running_mean, var - layer.running_var
        distances.append((d_mean / scale.sqrt()).norm() + (d_var / scale).norm())
    return torch.stack(distances).mean()


def adversarial_loss(student_logits, teacher_logits):
    """Eq. 5: L_adv = -(1/B) Σ_i 1[argmax s_i = argmax t_i] KL(softmax(t_i) ‖ softmax(s_i)).

    (B, K), (B, K) -> scalar <= 0. Named by the paper; form of NAYER. Where the two disagree already
    the student has something to learn, and more disagreement would drive the images from their
    category: so only rows on which they agree count. The gradient reaches G through both.
    """
    log_s = F.log_softmax(student_logits, 1)
    log_t = F.log_softmax(teacher_logits, 1)
    kl = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1)           # (B,)
    return -(kl * (log_s.argmax(1) == log_t.argmax(1))).mean()


def kd_loss(student_logits, teacher_logits, temperature=20.0):
    """Eq. 7 (Hinton et al.): L_KD = τ² KL(softmax(t/τ) ‖ softmax(s/τ)), sum over K, mean over B.

    (B, K), (B, K) -> scalar >= 0. τ² keeps the size of the gradient when τ changes.
    """
    log_s = F.log_softmax(student_logits / temperature, 1)
    log_t = F.log_softmax(teacher_logits / temperature, 1)
    return temperature ** 2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")


def category_aware_embedding_loss(z, targets, labels, temperature=0.1):
    """Eq. 8, category-aware embedding constraint (summary; form is ours).

        L_CAE = mean_i -log( w_ii / (w_ii + Σ_{k: y_k ≠ y_i} w_ik) )
        w_ik  = exp( cos(z_i, f_k - f̄) / τ ),   f̄ the mean of all f_k

    z (N, D) the student's projected embeddings, targets f (N, D) the teacher's of the same images,
    labels y (N,) -> scalar >= 0. Categories enter by y alone, not by the e of eq. 1. Rows may as
    well be places in feature maps: `student_step` adds up both.

    InfoNCE whose negatives are of *other* categories only [our choice]: two images of one category
    need not be told apart. (Measured, this choice made no clear difference.) Targets are centred:
    after a ReLU all cosines would be high.
    """
    z = F.normalize(z, dim=1)
    f = F.normalize(targets - targets.mean(0), dim=1)
    ignored = labels[:, None] == labels                 # rows of one category (N, N) ...
    ignored.fill_diagonal_(False)                       # ... but i with itself is the positive
    similarity = (z @ f.T / temperature).masked_fill(ignored, -1e9)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device))


def contrastive_loss(z, labels, temperature=0.1):
    """Eq. 9, CNCL, category noise contrastive learning (paper: pairs; form of SupCon).

        L = -(1/|V|) Σ_{i∈V} (1/|P(i)|) Σ_{p∈P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) )

    z (B, D), normalised here; labels (B,); P(i) the other rows of i's category, whatever their
    noise; V the rows that have any -> scalar >= 0, and 0 for a batch without any pair.
    """
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -1e9)      # a ≠ i; -inf · 0: nan
    log_p = F.log_softmax(similarity, 1)
    positive = (labels[:, None] == labels) & ~itself                    # P(i), (B, B)
    per_row = -(log_p * positive).sum(1) / positive.sum(1).clamp_min(1)
    return per_row.sum() / positive.any(1).sum().clamp_min(1)           # mean over V


# ===== 5. State, steps, phases, and the loop over both ============================================
class State(nn.Module):
    """What a run saves to be resumed: networks but for the teacher, bank, optimisers, counters.

    The teacher never changes, so it is not saved: `norms` is a plain list, which registers nothing.
    prior (K, E): category embeddings; without, config.prior decides, by default for rows of the
    teacher's head, which need no language model. generator: your own, ê (B, E) -> (B, 3, H, H) in
    [0, 1]; if it has a `seed_layer`, each decoupled round resets that. teacher_layers and
    student_layers: (head, maps) in place of what `find_layers` finds. Maps are paired from the
    coarsest on, and finer ones that are left over go unused. ValueError if parts do not fit.
    """
    def __init__(self, teacher: nn.Module, student: nn.Module, config: Config, prior=None,
                 generator: nn.Module | None = None, teacher_layers=None, student_layers=None):
        super().__init__()
        size, device = config.image_size, next(teacher.parameters()).device
        image = torch.zeros(1, 3, size, size, device=device)
        self.teacher_layers = teacher_layers or find_layers(teacher, image)
        self.student_layers = student_layers or find_layers(student, image)
        with frozen(teacher), frozen(student), torch.no_grad():
            t, f_t, maps_t = read(teacher, image, self.teacher_layers)
            s, f_s, maps_s = read(student, image, self.student_layers)
        if student is teacher or t.shape != s.shape:
            raise ValueError("teacher and student: two networks of as many categories")
        rows = teacher.get_submodule(self.teacher_layers[0]).weight.detach().flatten(1)   # (K, D_T)
        if prior is None:
            known = {"teacher": rows, "index": torch.eye(len(rows))}
            prior = known[config.prior] if config.prior in known else np.load(config.prior)
        prior = torch.as_tensor(prior).float().to(device)
        if prior.ndim != 2 or len(prior) != len(rows) or not 0 < prior.var(0).sum() < math.inf:
            raise ValueError(f"the prior must be ({len(rows)}, E), finite, not all alike")
        self.student, self.cend = student, CEND(prior, config.magnitudes)
        self.generator = generator or Generator(prior.shape[1], size, config.generator_width)
        # h: one linear projection serves eq. 8 and eq. 9, others eq. 8 at places.    [our choice]
        self.projection = nn.Linear(f_s.shape[1], f_t.shape[1])
        at_places = config.places and config.lambda_cae
        pairs = zip(maps_s, maps_t) if at_places else []
        self.place_projections = nn.ModuleList(nn.Linear(a.shape[1], b.shape[1]) for a, b in pairs)
        capacity = config.bank_capacity if config.decoupled else 0      # coupled: one batch
        self.bank = MemoryBank(max(capacity, config.synth_batch), size)
        self.to(device)
        self.generator.to(memory_format=torch.channels_last)            # the faster layout
        self.norms = [m for m in teacher.modules() if getattr(m, "running_mean", None) is not None]
        if config.lambda_fm and not self.norms:
            warnings.warn("the teacher has no BatchNorm statistics: eq. 4 is off")
        if at_places and not self.place_projections:
            warnings.warn("no feature maps: eq. 8 is of whole images alone")
        # SGD for the student, Adam for the generator: as in most of the literature. [our choice]
        parts = nn.ModuleList([student, self.projection, self.place_projections])
        self.learning = [p for p in parts.parameters() if p.requires_grad]
        self.student_optimizer = torch.optim.SGD(self.learning, config.student_lr, momentum=0.9,
                                                 nesterov=True, weight_decay=1e-4)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(),
                                                    config.generator_lr, betas=(0.5, 0.999))
        self.cycle, self.seconds = 0, 0.0               # seconds: `run` counts them

    def get_extra_state(self):
        """What `state_dict` holds beside networks and images. Since `distill` seeds each cycle, a
        run goes on from there as if unbroken: on a CPU bit for bit, but not with --minutes."""
        optimizers = self.generator_optimizer.state_dict(), self.student_optimizer.state_dict()
        return *optimizers, self.cycle, self.seconds, self.bank.pushed

    def set_extra_state(self, saved):
        """The inverse, for `load_state_dict`."""
        self.generator_optimizer.load_state_dict(saved[0])
        self.student_optimizer.load_state_dict(saved[1])
        self.cycle, self.seconds, self.bank.pushed = saved[2:]


def autocast(like, config):
    """bfloat16 for the networks with config.bf16; losses are computed outside of it, in float32."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=config.bf16)


def generator_step(state, teacher, e_hat, labels, config):
    """One Adam step on eq. 6, with T and S `frozen` -> (images made before it, terms), detached.

    A teacher that was trained on crops with black padding has black borders in its statistics. So
    it is shown such crops, drawn anew in each step: otherwise the generator would draw the borders,
    and the student would learn from them.                                           [our choice]
    """
    l_fm = l_adv = torch.zeros((), device=e_hat.device)
    with listen(state.norms) as heard, autocast(e_hat, config):
        images = state.generator(e_hat)                 # eq. 2; ours stays in train mode
        shown = augment(images) if config.synth_crop else images
        t = teacher(shown).float()
        s = state.student(shown).float() if config.lambda_adv else None
    l_ce = category_consistency_loss(t, labels)                                     # eq. 3
    if config.lambda_fm and state.norms:
        l_fm = feature_matching_loss(heard)                                         # eq. 4
    if config.lambda_adv:
        l_adv = adversarial_loss(s, t)                                              # eq. 5
    loss = l_ce + config.lambda_fm * l_fm + config.lambda_adv * l_adv               # eq. 6
    state.generator_optimizer.zero_grad()
    loss.backward()
    state.generator_optimizer.step()                    # it holds the weights of G alone
    terms = {"ce": l_ce.detach(), "fm": l_fm.detach(), "adv": l_adv.detach()}
    terms["recognised"] = (t.argmax(1) == labels).float().mean()        # by the teacher
    return images.detach(), terms


def synthesis_round(state, teacher, config, steps):
    """Phase A, the student frozen: one noise draw, some generator steps, images to the bank.

    Returns the terms of the loss in the last step, and the share of images that T recognised.
    """
    # Labels run through the categories, from a random one on. The noise is held for the round: in
    # a few steps G can learn one batch, but not to make images of any noise.         [our choice]
    e = state.cend.embeddings
    first = torch.randint(len(e), (), device=e.device)
    labels = (torch.arange(config.synth_batch, device=e.device) + first) % len(e)
    e_hat = state.cend(labels) if config.cend else torch.randn_like(e[labels])      # eq. 1
    if config.decoupled and hasattr(state.generator, "seed_layer"):
        # A new seed layer and a fresh Adam give new images, as in NAYER; the decoder stays.
        state.generator.seed_layer.reset_parameters()
        state.generator_optimizer.state.clear()         # its moments
    with frozen(state.student):
        for _ in range(steps):
            images, terms = generator_step(state, teacher, e_hat, labels, config)
    state.bank.push(images, labels)                     # rounded to uint8
    return terms


def read_places(feature_map, places):
    """Feature map (B, D, h, w), places (B, P, 2) in [0, 1) of its height and width -> (B P, D).

    The same places name the same part of an image in maps of any resolution.
    """
    b, _, h, w = feature_map.shape
    row = torch.arange(b, device=places.device)[:, None]                            # (B, 1)
    y = (places[:, :, 0] * h).long()                                                # (B, P)
    x = (places[:, :, 1] * w).long()
    return feature_map.permute(0, 2, 3, 1)[row, y, x].flatten(0, 1)     # copies only places


def student_step(state, teacher, images, labels, config):
    """One SGD step of student and projections on eq. 10, for images (B, 3, H, W) -> its terms.

    The L_CAE of eq. 10 is a sum of eq. 8 for whole images and, for each pair r of maps, for P
    random places in each image:

        L_CAE(h(f_S), f_T, y) + Σ_r L_CAE(h_r(S_r at places), T_r at places, y)

    S_r, T_r are paired from the coarsest map on. The embedding of a ResNet is only the mean of its
    last map, and maps that differ everywhere can share a mean. Comparison place by place, with
    places of other categories' images as negatives, aligns the maps themselves, and teaches lower
    layers directly.                                                                 [our choice]
    """
    l_cae = l_cncl = torch.zeros((), device=images.device)
    with autocast(images, config):
        with torch.no_grad():
            t, f_t, maps_t = read(teacher, images, state.teacher_layers)
        s, f_s, maps_s = read(state.student, images, state.student_layers)
    z = state.projection(f_s.float())                                               # (B, D_T)
    places = torch.rand(len(labels), config.places, 2, device=labels.device)        # (B, P, 2)
    l_kd = kd_loss(s.float(), t.float(), config.kd_temperature)                     # eq. 7
    if config.lambda_cae:
        l_cae = category_aware_embedding_loss(z, f_t.float(), labels)               # eq. 8, images
        labels_at = labels.repeat_interleave(config.places)                         # (B P,)
        for project, map_s, map_t in zip(state.place_projections, maps_s, maps_t):
            at_s = project(read_places(map_s, places).float())                      # (B P, D_r)
            at_t = read_places(map_t, places).float()                               # (B P, D_r)
            l_cae = l_cae + category_aware_embedding_loss(at_s, at_t, labels_at)    # eq. 8, places
    if config.lambda_cncl:
        l_cncl = contrastive_loss(z, labels)                                        # eq. 9
    loss = l_kd + config.lambda_cae * l_cae + config.lambda_cncl * l_cncl           # eq. 10
    state.student_optimizer.zero_grad()
    loss.backward()
    if config.clip_norm:
        nn.utils.clip_grad_norm_(state.learning, config.clip_norm)
    state.student_optimizer.step()
    return {"kd": l_kd.detach(), "cae": l_cae.detach(), "cncl": l_cncl.detach()}


def distillation_phase(state, teacher, config, steps):
    """Phase B: student steps on images of the bank, the generator is not called -> mean terms."""
    rows = []
    for _ in range(steps):
        images, labels = state.bank.sample(config.batch_size)
        # T and S see the same crops and colours. Edges are mirrored, since test images have no
        # black borders. [our choice] (Notes on the paper say that CNCL's images are not augmented.)
        images = jitter_colours(augment(images, mode="reflect"), config.colour_jitter)
        rows.append(student_step(state, teacher, images, labels, config))
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def distill(teacher: nn.Module, student: nn.Module, config: Config, prior=None, state=None,
            on_cycle=None, progress=None) -> nn.Module:
    """Train `student` to imitate `teacher` on images that the generator makes. No data set goes in.

    Both take images (B, 3, H, H) in [0, 1], give logits (B, K) and sit on one device. The teacher
    stays bit-identical. Student weights with requires_grad=False stay fixed, but all its BatchNorm
    statistics move. prior: as in State. state: a State of this student, new or loaded, in place of
    prior. on_cycle(state, metrics) follows each cycle. progress(state): the fraction of the run
    that is over, by default of config.cycles. Returns the student, in eval mode. Raises
    FloatingPointError for images, losses or weights that are not finite. Seeds torch in each cycle.

    Coupled training: a cycle is config.kd_steps turns of one generator step, on noise drawn anew,
    and one student step on images of this turn, without warm-up rounds. Metrics: the last turn's.
    """
    if state is None:
        torch.manual_seed(config.seed)
        state = State(teacher, student, config, prior)
    if state.student is not student or (config.minutes and not progress):
        raise ValueError("state is of another student, or minutes are given without progress")
    progress = progress or (lambda state: state.cycle / config.cycles)
    turns, generator_steps, student_steps = 1, config.synth_steps, config.kd_steps      # decoupled
    if not config.decoupled:                            # a step of each network, alternately
        turns, generator_steps, student_steps = config.kd_steps, 1, 1
    student.train()
    while progress(state) < 1:
        torch.manual_seed(1_000_003 * config.seed + state.cycle + 1)    # a resumed run repeats it
        # A cosine with a warm-up: begun at full step size, a deep student is slow to learn at all.
        cosine = (1 + math.cos(math.pi * progress(state))) / 2
        warmup = min(1.0, (state.cycle + 1) / max(1, config.lr_warmup))
        for group in state.student_optimizer.param_groups:              # each from its own rate
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * cosine * warmup
        first = config.decoupled and state.cycle == 0
        rounds = 1 + config.warmup_rounds if first else 1               # the bank starts empty
        with frozen(teacher):
            for _ in range(turns):
                for _ in range(rounds):
                    terms = synthesis_round(state, teacher, config, generator_steps)    # phase A
                terms |= distillation_phase(state, teacher, config, student_steps)      # phase B
        state.cycle += 1
        # Losses are from before the last step, so look at weights as well, before they are saved.
        terms["weight_norm"] = torch.stack([p.detach().norm() for p in state.parameters()]).norm()
        numbers = torch.stack([term.float() for term in terms.values()]).tolist()   # one transfer
        metrics = {"cycle": state.cycle, "lr": group["lr"]} | dict(zip(terms, numbers))
        if not all(math.isfinite(number) for number in numbers):
            raise FloatingPointError(f"not finite, lower a step size: {metrics}")
        if on_cycle:
            on_cycle(state, metrics)                    # may raise, to stop
    return student.eval()


# ===== 6. Linear probe: how well frozen embeddings serve another task =============================
@torch.no_grad()
def predict(model, data, device="cpu", layers=None):
    """Run a network in eval mode over a data set: logits (N, K), labels (N,), embeddings (N, D)."""
    rows = []
    with frozen(model):
        for images, labels in DataLoader(data, 256):
            x = to_float(images, device)
            layers = layers or find_layers(model, x[:1], extractor=True)
            logits, f, _ = read(model, x, layers)
            rows.append((logits.float(), labels.to(device), f.float()))
    return tuple(torch.cat(column) for column in zip(*rows))


def top1(scores, labels):
    """Percentage of rows of scores (N, K) whose largest entry is at labels (N,)."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def fit_logistic(x, y, k, l2):
    """Multinomial logistic regression by full-batch L-BFGS: weights (D, k) under L2, bias (k,)."""
    w = torch.zeros(x.shape[1], k, device=x.device, requires_grad=True)
    b = torch.zeros(k, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w + b, y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return w.detach(), b.detach()


def linear_probe(backbone, train, test, device="cpu", layers=None):
    """A linear classifier on frozen embeddings: {"accuracy": percent, "l2": chosen strength}.

    train and test yield (image, label), images uint8 or float in [0, 1]. backbone: a classifier, or
    an extractor that gives (B, D); an extractor that ends in an nn.Linear needs layers=("", []).
    Embeddings are standardised by train statistics; L2 is chosen on a held-out tenth of train.
    """
    _, y, x = predict(backbone, train, device, layers)
    _, y_test, x_test = predict(backbone, test, device, layers)
    std, mean = torch.std_mean(x, 0)
    x, x_test = ((v - mean) / std.clamp_min(1e-6) for v in (x, x_test))
    k, tenth = int(y.max()) + 1, max(1, len(x) // 10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order[:tenth], order[tenth:]           # to choose L2 by, and to fit
    def held_out_accuracy(l2):
        w, b = fit_logistic(x[rest], y[rest], k, l2)
        return top1(x[held] @ w + b, y[held])
    l2 = max((1e-4, 1e-3, 1e-2, 1e-1), key=held_out_accuracy)
    w, b = fit_logistic(x, y, k, l2)
    return {"accuracy": top1(x_test @ w + b, y_test), "l2": l2}


# ===== 7. Helpers: to float, crops, colours, batch statistics =====================================
def to_float(images, device=None):
    """uint8 (or float) images -> float32 in [0, 1], on the device if one is given."""
    scale = 255 if images.dtype == torch.uint8 else 1
    return (images.to(device).float() / scale).contiguous(memory_format=torch.channels_last)


def augment(images, mode="constant", pad=4):
    """Random crop after padding, and flip: (B, 3, H, W) in [0, 1] -> same.

    Pixels are gathered by index, so that each image has its own crop and flip. Mode "constant" pads
    with black, as in the usual recipe for CIFAR teachers; "reflect" mirrors the edges.
    """
    (b, _, h, w), device = images.shape, images.device
    draws = torch.rand(b, 3, device=device)
    top, left = ((draws[:, i, None] * (2 * pad + 1)).long() for i in (0, 1))        # (B, 1) each
    flip = draws[:, 2, None] < 0.5                                                  # (B, 1)
    y, x = top + torch.arange(h, device=device), torch.arange(w, device=device)     # (B, H), (W,)
    x = left + torch.where(flip, w - 1 - x, x)                                      # (B, W)
    padded = F.pad(images, (pad,) * 4, mode).permute(0, 2, 3, 1)        # channels last
    row = torch.arange(b, device=device)[:, None, None]                             # (B, 1, 1)
    return padded[row, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def jitter_colours(images, strength):
    """Each channel scaled by 1 ± strength, each image shifted by up to ±⅔ strength. [our choice]

    (B, 3, H, W) in [0, 1] -> same. Drawn per image; torchvision's ColorJitter draws once a batch.
    """
    gain = 1 + strength * (2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 1)
    shift = strength / 1.5 * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    return (images * gain + shift).clamp(0, 1)


class BatchStatistics(torch.autograd.Function):
    """Mean and biased variance over all but the channels: x (B, C, H, W) or (B, C) -> (C,), (C,).

    Only for speed: `var, mean = torch.var_mean(x, (0, 2, 3), correction=0)` gives the same, but a
    synthesis step then takes 1.4 (float32) to 1.9 (bfloat16) times as long on a CPU.
    """
    @staticmethod
    def forward(ctx, x):
        dtype = torch.promote_types(x.dtype, torch.float32)             # never half precision
        running = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)          # not used
        mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, g_mean, g_var):
        x, mean = ctx.saved_tensors
        m = x.numel() // x.shape[1]
        # dL/dx = g_mean/m + 2 g_var (x - μ)/m per channel, which BatchNorm in eval mode computes.
        return F.batch_norm(x, mean, torch.ones_like(mean), 2 * g_var / m, g_mean / m, eps=0.0)


# ===== 8. Public teachers, and training one where none is public ==================================
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                 # mean, std
NORMALISATION = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
                 "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}
AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
EDADALTOCG = "https://huggingface.co/edadaltocg/{}_{}/resolve/main/pytorch_model.bin"
PUBLIC_TEACHERS = {     # address, beginning of the file's SHA-256                  # stated %
    "cifar10_resnet20": (AKAMASTER + "resnet20-12fca82f.th", "12fca82f"),           # 91.7
    "cifar10_resnet32": (AKAMASTER + "resnet32-d509ac18.th", "d509ac18"),           # 92.6
    "cifar10_resnet44": (AKAMASTER + "resnet44-014dd654.th", "014dd654"),           # 93.1
    "cifar10_resnet56": (AKAMASTER + "resnet56-4bfd9763.th", "4bfd9763"),           # 93.4
    "cifar10_resnet18": (EDADALTOCG, "f6562425"),                                   # 94.98
    "cifar10_resnet34": (EDADALTOCG, ""),               # no digest is known         # 95.4
    "cifar10_resnet50": (EDADALTOCG, "600e3f79"),
    "cifar100_resnet18": (EDADALTOCG, "d214f848"),
    "cifar100_resnet34": (EDADALTOCG, "6c289529"),
}


def train_teacher(config, num_classes, data):
    """Supervised training of a teacher: SGD, one-cycle schedule, crops, flips.      [our choice]"""
    torch.manual_seed(config.seed)
    mean, std = NORMALISATION.get(config.dataset, IMAGENET)
    net = build_model(config.teacher, num_classes)
    model = Normalized(net, config.mean or mean, config.std or std).to(config.device).train()
    loader = DataLoader(data, 128, shuffle=True, drop_last=len(data) > 128)
    epochs, start = config.teacher_epochs, time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            images = augment(to_float(images, config.device))
            with autocast(images, config):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels.to(config.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        left = (time.perf_counter() - start) / epoch * (epochs - epoch) / 60
        print(f"teacher, epoch {epoch} of {epochs}: minutes left {left:.1f}", flush=True)
    return model


def export(model, arch, classes, size):
    """Weights and what they are of, all on the CPU: a file that `load_teacher` reads."""
    return {"state_dict": {k: v.cpu() for k, v in model.net.state_dict().items()}, "arch": arch,
            "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(),
            "classes": classes, "image_size": size}


def get_teacher(config, classes):
    """Frozen teacher: --teacher-ckpt, else a public one, else a new one; kept in checkpoints/.

    Normalisation: --mean and --std, else what the file stores, else that of the public teacher's
    training, else the data set's, else ImageNet's.
    """
    arch, usual = config.teacher, NORMALISATION.get(config.dataset, IMAGENET)
    name = re.sub(r"\W+", "-", f"{config.dataset}_{arch}")
    others = zlib.crc32(repr((config.image_size, classes, *config.mean, *config.std)).encode())
    trained = f"{name}_{config.teacher_epochs}epochs_seed{config.seed}_{others:08x}.pth"
    path = Path(config.teacher_ckpt or f"checkpoints/{trained}")
    if name in PUBLIC_TEACHERS and config.image_size == 32 and not config.teacher_ckpt:
        address, digest = PUBLIC_TEACHERS[name]
        address = address.format(arch, config.dataset)
        usual = IMAGENET if AKAMASTER in address else usual             # as in their training
        path = Path("checkpoints", f"{name}-{digest or 'public'}.pth")
        try:                                            # torch.hub compares the digest in the name
            torch.hub.load_state_dict_from_url(address, "checkpoints", "cpu", file_name=path.name,
                                               check_hash=bool(digest), weights_only=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot fetch {address} ({error}): put it there as {path}") from error
    elif not path.exists() and not config.teacher_ckpt:
        model = train_teacher(config, len(classes), load_data(config.dataset, "train", config)[0])
        save(export(model, arch, classes, config.image_size), path)
    print(f"teacher weights: {path}", flush=True)
    return load_teacher(arch, len(classes), path, config.mean, config.std, usual).to(config.device)


# ===== 9. Data sets: only to train a missing teacher and to evaluate; `distill` sees none =========
# Drawn categories: how many lobes a curve around a point has, and whether it is hollow. The first
# ten make up the embedded data set, the others are the unseen categories of its probe.
SHAPES = [(lobes, hollow) for lobes in (0, 2, 3, 4, 5, 1, 6, 8) for hollow in (False, True)]


def draw_shapes(n, shapes, seed, size):
    """n images, uint8 (n, 3, size, size), of one shape each, and labels (n,).

    Place, size, angle, both colours, the shading of the ground and the noise vary.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(shapes), size=n)
    lobes, hollow = np.array(shapes)[labels].T[:, :, None, None, None]              # (n, 1, 1, 1)
    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (n, channels, 1, 1))
    radius, grid = uniform(0.45, 0.7), np.linspace(-1, 1, size)
    dx = grid - uniform(-1, 1) * (1 - radius)
    dy = grid[:, None] - uniform(-1, 1) * (1 - radius)
    angle = np.arctan2(dy, dx) + uniform(-0.35, 0.35)
    r = np.hypot(dx, dy) / radius / (0.7 + 0.3 * np.cos(lobes * angle))             # 1: the curve
    inside = (r < 1) & ((r > 0.55) | (hollow == 0))
    back = uniform(0, 1, 3)
    fore = (back + uniform(0.3, 0.7, 3)) % 1            # a colour that differs from it
    image = np.where(inside, fore, back + uniform(-0.2, 0.2) * grid)
    image += uniform(0, 0.06) * rng.standard_normal(image.shape)
    image = torch.from_numpy((image.clip(0, 1) * 255).round().astype(np.uint8))
    return TensorDataset(image, torch.from_numpy(labels))


def load_data(dataset, split, config):
    """Split "train" or "test" -> (data of uint8 (3, size, size) images and labels, class names).

    A folder holds train/CLASS/* and test/CLASS/*; images are scaled and cut to squares, and all are
    kept in memory. Raises ValueError that says what to put where.
    """
    size, train = config.image_size, split == "train"
    if dataset in ("shapes", "shapes-unseen"):
        shapes = SHAPES[:10] if dataset == "shapes" else SHAPES[10:]
        data = draw_shapes(5000 if train else 2000, shapes, 1 if train else 2, size)
        return data, [str(shape) for shape in shapes]
    square = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    square = transforms.Compose(square)
    try:
        if dataset in ("cifar10", "cifar100"):
            data = getattr(datasets, dataset.upper())("data", train, square, download=True)
        else:
            data = datasets.ImageFolder(f"{dataset}/{split}", square)
            learnt = [f.name for f in Path(dataset, "train").glob("*") if f.is_dir()]
            if len(data.classes) < 2 or (learnt and data.classes != sorted(learnt)):
                raise ValueError(f"{dataset}: train/, test/ need the same two or more classes")
        images, labels = zip(*DataLoader(data, 256))    # decoded once, kept in memory
        return TensorDataset(torch.cat(images), torch.cat(labels)), data.classes
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot read {dataset} ({error}): give a folder with train/CLASS/* and "
                         "test/CLASS/*, or unpack CIFAR's python version in data/") from error


# ===== 10. A run: directory, resume, evaluation, main =============================================
def print_cycle(state, metrics):
    """A line per cycle, for distill(..., on_cycle=print_cycle); `run` prints by it, too."""
    shown = [k for k in ("kd", "cae", "recognised", "accuracy", "minutes left") if k in metrics]
    print(f"cycle {state.cycle}:", ", ".join(f"{k} {metrics[k]:.2f}" for k in shown), flush=True)


def save(thing, path):
    """A text or torch.save by way of a temporary file: `path` is the old or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")        # nobody else's
    temporary.write_text(thing) if isinstance(thing, str) else torch.save(thing, temporary)
    temporary.replace(path)                             # atomic on one file system


def score(networks, test, probe_data, config):
    """Top-1 and linear probe of networks by name, in percent: printed, and for summary.json."""
    result = {}
    for name, network in networks.items():
        top = top1(*predict(network, test, config.device)[:2])
        probe = linear_probe(network, *probe_data, config.device)["accuracy"]
        result[name] = {"top-1": top, "linear probe": probe}
        print(f"{name}: top-1 {top:.2f} %, linear probe on {config.probe_dataset} {probe:.2f} %")
    return result


def prepare(config, classes):
    """Teacher and state of a run that begins, the student as config.seed draws it."""
    teacher = get_teacher(config, classes)
    torch.manual_seed(config.seed)
    net = build_model(config.student, len(classes))
    student = Normalized(net, teacher.mean.cpu(), teacher.std.cpu()).to(config.device)
    return teacher, State(teacher, student, config)


def run(config, train=distill):
    """All of it, in config.out: teacher, `train` (distill or a loop like it), scores, summary."""
    test, classes = load_data(config.dataset, "test", config)
    probe = [load_data(config.probe_dataset, split, config)[0] for split in ("train", "test")]
    if config.eval_only:                                # a student.pt says what it is
        stored = torch.load(config.eval_only, map_location="cpu", weights_only=True)
        if stored.get("classes") != classes or stored.get("image_size") != config.image_size:
            raise ValueError(f"{config.eval_only} is of other classes or image size")
        student = load_teacher(stored["arch"], len(classes), config.eval_only).to(config.device)
        return score({"student": student}, test, probe, config)
    teacher, state = prepare(config, classes)
    student, untrained, out = state.student, copy.deepcopy(state.student), Path(config.out)
    accuracy = top1(*predict(teacher, test, config.device)[:2])
    print(f"teacher: {accuracy:.2f} %. If low, check --mean and --std.", flush=True)
    log, kept = out / "metrics.jsonl", []
    if (out / "last.pt").exists():                      # resumed: the log is cut to where it is
        state.load_state_dict(torch.load(out / "last.pt", config.device, weights_only=True))
        kept = log.read_text().splitlines(keepends=True)[:state.cycle]
    save("".join(kept), log)
    save(json.dumps(dataclasses.asdict(config), indent=1), out / "config.json")
    clock = time.perf_counter()
    def progress(state):
        if config.minutes:
            return state.seconds / (60 * config.minutes)
        return state.cycle / config.cycles
    def on_cycle(state, metrics):                       # time in here is not counted
        nonlocal clock
        state.seconds += time.perf_counter() - clock
        over = min(1.0, progress(state))
        metrics |= {"seconds": state.seconds, "images": state.bank.pushed,
                    "minutes left": state.seconds / 60 * (1 / over - 1)}
        if state.cycle % config.eval_every == 0 or over == 1:
            metrics["accuracy"] = top1(*predict(student, test, config.device)[:2])
        with open(log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        save(state.state_dict(), out / "last.pt")
        print_cycle(state, metrics)
        clock = time.perf_counter()
    train(teacher, student, config, state=state, on_cycle=on_cycle, progress=progress)
    images, labels = state.bank.sample(100)
    torchvision.utils.save_image(images[labels.argsort()], out / "samples.png", nrow=10)
    save(export(student, config.student, classes, config.image_size), out / "student.pt")
    networks = {"student": student, "teacher": teacher, "untrained": untrained}
    counts = {"cycles": state.cycle, "images": state.bank.pushed, "seconds": state.seconds}
    save(json.dumps(score(networks, test, probe, config) | counts, indent=1), out / "summary.json")


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 something to mend (one line says what), 130 Ctrl-C."""
    words, out = sys.argv[1:] if argv is None else argv, ""
    try:
        config = parse_args(words)
        with contextlib.suppress(OSError, AttributeError, TypeError):   # a C library that has none
            libc = ctypes.CDLL(None)                    # to keep freed memory is faster on CPUs
            libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)      # M_MMAP_MAX, M_TRIM_THRESHOLD
        if not config.eval_only:
            new = time.strftime(f"runs/%Y%m%d-%H%M%S_{os.getpid()}")
            config.out = config.resume or config.out or new
            os.makedirs(config.out, exist_ok=bool(config.resume))       # for this run alone
            out = config.out
        run(config)
        return 0
    except KeyboardInterrupt:
        how = f"; after a cycle, go on with --resume {out}" if out else ""
        print("\ninterrupted" + how, file=sys.stderr)
        return 130
    except Exception as e:
        if "--debug" in words:
            raise
        print("error:", *str(e).split(), f"({type(e).__name__}; see --debug)", file=sys.stderr)
        return 2
    finally:
        for folder in (out, "runs", "data", "checkpoints"):     # removed if it is empty
            with contextlib.suppress(OSError):
                os.rmdir(folder)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)           # ends a run as Ctrl-C does
    sys.exit(main())
