r"""CAE-DFKD in one file: data-free knowledge distillation with category-aware embeddings.

A student learns from a frozen teacher without one real image. Paper: CAE-DFKD, arXiv 2504.21478,
DAC 2025. What could be consulted of it: the abstract, the beginning of the introduction, a review
that quotes eq. 1, and secondary notes; no full text and no official code.

    python cae_dfkd.py                                         # drawn data, minutes on a laptop
    python cae_dfkd.py --teacher resnet34 --dataset cifar10    # fetches teacher and test images
    python cae_dfkd.py --resume --out runs/NAME                # go on after Ctrl-C or a crash
    python cae_dfkd.py --eval-only runs/NAME/student.pt --dataset cifar10      # score a student
    torchrun --nproc-per-node=2 cae_dfkd.py                    # several processes or GPUs

Every category y has an embedding e_y. CEND adds noise to it, drawn from one of several sources (eq.
1), and a light generator turns the sum into an image (eq. 2). One *cycle* is:
Phase A, synthesis: for one noise draw the generator is trained for a few steps, so that the teacher
recognises the category in its images (eq. 3), their statistics in the teacher's BatchNorm layers
are those of the teacher's own training data (eq. 4), and the student disagrees (eq. 5). The images
go to a memory bank. Phase B, distillation: the student takes some steps on images of the bank,
towards the teacher's logits (eq. 7) and embeddings (eq. 8: of images, and of places in the feature
maps of each resolution), with images of one category close together (eq. 9). That is *decoupled*
training: the generator makes a few images well, and the student learns from all that were made.
*Coupled* training takes one step of each in turns.

Notation   B batch, K categories, H x W pixels, E and D width of a category's, a network's embedding
           e (K, E) category embeddings   ê (B, E) diffused   x̂ (B, 3, H, W) images in [0, 1]
           T teacher, S student; t, s (B, K) their logits; f_T, f_S (B, D) their embeddings: what
           enters the last linear layer; z = h(f_S) projected to the width of f_T

eq  what                               where                            source
 1  ê = e_y + M_n ⊙ q_n                CEND                             paper
 2  x̂ = G(ê)                           Generator                        prior work (DAFL, NAYER)
 3  L_CE, category consistency         category_consistency_loss        paper
 4  L_FM, feature matching             FeatureMatching                  paper; after DeepInversion
 5  L_adv, adversarial                 adversarial_loss                 paper; form of NAYER
 6  L_G = L_CE + λ_fm L_FM + λ_adv L_adv            generator_step      paper; weights are ours
 7  L_KD, knowledge distillation       kd_loss                          paper; form of Hinton et al.
 8  L_CAE, category-aware embedding    category_aware_embedding_loss    summary; form is ours
 9  L_CNCL, contrastive                contrastive_loss                 paper: pairs; form of SupCon
10  L_S = L_KD + λ_cae L_CAE + λ_cncl L_CNCL        student_step        paper: KD + CNCL; rest ours

Equation numbers are ours. Where these sources are silent, the line says [our choice].
"""
# SPDX-License-Identifier: MIT
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather, all_reduce
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets, ops, transforms
from torchvision.models.resnet import BasicBlock

class UserError(ValueError):
    """Something the user can mend: `main` prints its one line and exits with code 2."""

@contextlib.contextmanager
def explain(what: str):
    """What a library raises inside becomes a UserError: `what`, then the library's own words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({one_line(error)})") from error

def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"

# ===== 1. Settings: the one place where defaults live; the command line is made from it ===========

ARCHITECTURES = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet18", "resnet34",
                 "resnet50", "wrn16_1", "wrn16_2", "wrn40_1", "wrn40_2", "vgg11")

def setting(default, text: str, low: float = 1e-9, high: float = 1e9, **flag):
    """A field of `Config`: help, range of a number (else positive), more for its argparse flag."""
    more = dict(help=text, range=(low, high), flag=flag)
    return dataclasses.field(default=default, metadata=more)

@dataclasses.dataclass
class Config:
    """Every setting of a run. The numbers are for CIFAR-10 on a CPU; PRESETS has others.

    All numbers are [our choice]; what was measured of them is in the README and its log.
    """
    # The run
    dataset: str = setting("shapes", "shapes, cifar10, cifar100, svhn, stl10, or a folder")
    data_root: str = setting("data", "where downloaded data sets are kept")
    image_size: int = setting(32, "pixels", 8, 1024, choices=(32, 64, 128, 224))
    cycles: int = setting(150, "cycles of synthesis and distillation")
    minutes: float | None = setting(None, "time for both phases, in place of --cycles")
    seed: int = setting(0, "seed of everything random", 0, 1e12)
    device: str = setting("auto", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = setting("auto", "of the networks", choices=("auto", "fp32", "bf16"))
    out: str | None = setting(None, "run directory; else a new one in runs/")
    resume: bool = setting(False, "go on from last.pt in the run directory --out")
    eval_only: str | None = setting(None, "score this student.pt and stop")
    eval_every: int = setting(25, "cycles between evaluations on the test split")
    probe_dataset: str = setting("shapes-unseen", "data set of the linear probe, as --dataset")
    detection: bool = setting(True, "score by the detection probe too")
    detection_dataset: str = setting("scenes", "scenes (drawn), voc2007, or a folder in its layout")
    detection_size: int = setting(224, "longer side of its photographs in pixels", 32)
    debug: bool = setting(False, "show where an error arose")
    # Networks
    teacher: str = setting("resnet20", "teacher architecture", choices=ARCHITECTURES)
    teacher_ckpt: str | None = setting(None, "teacher weights; else found, fetched or trained")
    train_teacher: bool = setting(False, "train a teacher even where a public one can be fetched")
    teacher_epochs: int = setting(60, "epochs of a teacher that has to be trained")
    student: str | None = setting(None, "else a smaller relative", choices=ARCHITECTURES)
    mean: list[float] | None = setting(None, "the teacher's input mean", -1e3, 1e3, nargs=3)
    std: list[float] | None = setting(None, "its standard deviation", 1e-6, 1e3, nargs=3)
    # Phase A, synthesis
    prior: str = setting("teacher", "category embeddings: teacher, index, or a (K, E) .npy file")
    cend: bool = setting(True, "diffuse category embeddings; without, plain noise goes in")
    magnitudes: tuple[float, ...] = setting((2.0,) * 4, "M_n of the sources", 0, 1e3, nargs="+")
    generator_width: int = setting(64, "channels of its seed; 128 is heavy", 8, 4096)
    decoupled: bool = setting(True, "train generator and student in separate phases; without, "
                              "a step of each in turns on fresh images, --kd-steps times a cycle")
    synth_batch: int = setting(128, "images of a synthesis round", 2)
    synth_steps: int = setting(12, "generator steps of a round")
    generator_lr: float = setting(4e-3, "Adam step size of the generator")      # as NAYER
    synth_crop: bool = setting(True, "show the teacher crops on black, as in its training")
    lambda_fm: float = setting(25.0, "weight of feature matching, eq. 4", 0)
    lambda_adv: float = setting(1.0, "weight of the adversarial term, eq. 5", 0)
    bank_capacity: int = setting(20_000, "images the memory bank keeps, the newest")
    warmup_rounds: int = setting(4, "further rounds before the first student step", 0)
    # Phase B, distillation
    kd_steps: int = setting(80, "student steps of a cycle")
    batch_size: int = setting(64, "images of a student step", 2)
    student_lr: float = setting(0.15, "SGD step size of the student, annealed by a cosine")
    lr_warmup: int = setting(5, "cycles in which it grows to --student-lr")     # see `distill`
    kd_temperature: float = setting(20.0, "temperature of eq. 7")
    lambda_cae: float = setting(4.0, "weight of the category-aware loss, eq. 8", 0)
    lambda_cncl: float = setting(0.1, "weight of the contrastive term, eq. 9", 0)
    places: int = setting(4, "per image, where eq. 8 compares feature maps; 0: none", 0, 4096)
    colour_jitter: float = setting(0.3, "how far colours of the bank's images vary", 0, 1)
    real_kd: bool = setting(False, "for comparison, not data-free: the bank holds real images")

    def __post_init__(self):
        """Raise UserError, which names the flag, for a number out of range."""
        for f in dataclasses.fields(self):
            (low, high), value = f.metadata["range"], getattr(self, f.name)
            for number in value if isinstance(value, (tuple, list)) else [value]:
                if type(number) in (int, float) and not low <= number <= high:
                    raise UserError(f"{flag_of(f.name)} {number} is not in {low:g} to {high:g}")
        if (self.mean is None) != (self.std is None):
            raise UserError("--mean and --std belong together: give both or neither")
        if not self.decoupled and (self.real_kd or not self.cend):       # no category would reach G
            raise UserError("--no-decoupled goes neither with --no-cend nor with --real-kd")

# What a run takes in place of the defaults, by data set or device, unless a flag says otherwise.
PRESETS: dict[str, dict] = {
    "shapes": dict(teacher_epochs=8, cycles=20, kd_steps=100, lambda_fm=8.0, lambda_adv=0.0,
                   student_lr=0.1),
    # Not run yet: the recipe that was measured on CPUs, for ten times as long.
    "cuda": dict(cycles=1500, bank_capacity=100_000, teacher_epochs=200, eval_every=100),
}
STUDENTS = {"resnet34": "resnet18", "resnet50": "resnet18", "vgg11": "resnet18",
            "wrn40_2": "wrn16_2", "wrn40_1": "wrn16_1"}                  # every other: resnet8
# What may be given anew with --resume: where it runs, what it reports and is scored on.
FREE_ON_RESUME = {"resume", "out", "device", "data_root", "eval_every", "probe_dataset",
                  "detection", "detection_dataset", "detection_size", "debug"}

def flag_of(name: str) -> str:
    """Name of a setting -> its flag."""
    return "--" + name.replace("_", "-")

def parse_args(argv: list[str] | None) -> Config:
    """Command line -> settings; with --resume those of the run's config.json, few of them free."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
                                     description=__doc__.split(".")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):                 # f.type is the annotation's text
        kind = float if "float" in f.type else int if f.type == "int" else str
        how = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else {"type": kind}
        others = "".join(f"; {name}: {p[f.name]}" for name, p in PRESETS.items() if f.name in p)
        parser.add_argument(flag_of(f.name), **how, **f.metadata["flag"],
                            help=f"{f.metadata['help']} (default: {f.default}{others})")
    given = vars(parser.parse_args(argv))                # only what was typed
    if given.get("resume"):
        last = Path(given.get("out", "runs"), "last.pt")
        if not last.is_file():
            raise UserError(f"nothing to resume: there is no {last}")
        for name in given.keys() - FREE_ON_RESUME:
            raise UserError(f"a resumed run keeps its settings; leave out {flag_of(name)}")
        given = json.loads(last.with_name("config.json").read_text()) | given    # all are there
    here = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    device = given.get("device", "auto")
    device = given["device"] = (here or "cpu") if device == "auto" else device
    if device not in ("cpu", here):
        raise UserError(f"--device {device}: this machine has none")
    preset = "shapes" if given.get("dataset", "shapes") == "shapes" else device
    config = Config(**PRESETS.get(preset, {}) | given)
    config.student = config.student or STUDENTS.get(config.teacher, "resnet8")
    if config.precision == "auto":                       # bf16 only where it is not emulated
        cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)     # private
        cuda = functools.partial(torch.cuda.is_bf16_supported, False)
        fast = {"cpu": cpu, "cuda": cuda}.get(device, lambda: False)()
        config.precision = "bf16" if fast else "fp32"
    return config

def autocast(like: Tensor, config: Config) -> torch.autocast:
    """bf16 for the networks if config.precision says so; losses compute in float32 all the same."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=config.precision == "bf16")

# ===== 2. Teacher: networks, safe loading, public files, training one that nobody offers ==========

def named(**layers: nn.Module) -> nn.Sequential:
    """A chain of layers; their names are those of the parameters in public files."""
    return nn.Sequential(OrderedDict(layers))

def stage(block: Callable, width: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    """A stage of a residual network: the first block changes width and resolution."""
    rest = [block(out, out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(width, out, stride), *rest)

def cifar_resnet(n: int, num_classes: int, projection: bool = False) -> nn.Sequential:
    """ResNet-(6n+2) of He et al. for CIFAR, with 16, 32, 64 channels.

    Shortcuts where these change: every second pixel and zeros for the missing channels ("option
    A"); projection: 1x1 convolutions ("option B"), as in some public files.
    """
    def block(width: int, out: int, stride: int) -> BasicBlock:
        if width == out:
            return BasicBlock(width, out)
        if projection:
            layers = nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        else:                                            # every second pixel; zeros on both sides
            pad = (out - width) // 2                     # channels
            layers = nn.AvgPool2d(1, stride), nn.ConstantPad3d((0, 0, 0, 0, pad, pad), 0.0)
        return BasicBlock(width, out, stride, nn.Sequential(*layers))

    return named(conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(16),
                 relu=nn.ReLU(), layer1=stage(block, 16, 16, n, 1),
                 layer2=stage(block, 16, 32, n, 2), layer3=stage(block, 32, 64, n, 2),
                 avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                 fc=nn.Linear(64, num_classes))

class PreActBlock(nn.Module):
    """Pre-activation block of wide ResNets, with the parameter names of the public files."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.convShortcut = None if width == out else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = self.convShortcut(y) if self.convShortcut else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))

def wide_resnet(depth: int, k: int, num_classes: int) -> nn.Sequential:
    """WRN-depth-k of Zagoruyko and Komodakis."""
    n = (depth - 4) // 6
    return named(conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
                 block1=named(layer=stage(PreActBlock, 16, 16 * k, n, 1)),
                 block2=named(layer=stage(PreActBlock, 16 * k, 32 * k, n, 2)),
                 block3=named(layer=stage(PreActBlock, 32 * k, 64 * k, n, 2)),
                 bn1=nn.BatchNorm2d(64 * k), relu=nn.ReLU(), avgpool=nn.AdaptiveAvgPool2d(1),
                 flatten=nn.Flatten(), fc=nn.Linear(64 * k, num_classes))

def cifar_vgg11(num_classes: int, image_size: int) -> nn.Sequential:
    """VGG-11 with BatchNorm in the five-block CIFAR layout of the public files."""
    blocks, width = {}, 3
    for i, outs in enumerate(((64,), (128,), (256, 256), (512, 512), (512, 512))):
        layers = []
        for out in outs:
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        blocks[f"block{i}"] = nn.Sequential(*layers)     # keys block{i}.{j} in files
        if i < (3 if image_size < 64 else 4):            # as many poolings as in the public code
            blocks[f"pool{i}"] = nn.MaxPool2d(2)
    return named(**blocks, avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                 classifier=nn.Linear(width, num_classes))

def build_model(arch: str, num_classes: int, image_size=32, projection=False) -> nn.Module:
    """An untrained network by its literature name, x (B, 3, H, W) -> logits (B, K).

    resnet18/34/50 are torchvision's; below 128 pixels with a 3x3 stem and no first pooling.
    Raises UserError that lists the known names.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if arch == "vgg11":
        return cifar_vgg11(num_classes, image_size)
    if arch.startswith("wrn"):
        return wide_resnet(*map(int, arch[3:].split("_")), num_classes)
    if arch not in ("resnet18", "resnet34", "resnet50"):
        return cifar_resnet((int(arch[6:]) - 2) // 6, num_classes, projection)
    model = getattr(torchvision.models, arch)(num_classes=num_classes)
    if image_size < 128:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model

class Normalized(nn.Module):
    """A network that takes images in [0, 1]: it normalises them to what `net` was trained on."""

    def __init__(self, net: nn.Module, mean, std):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)             # the faster layout
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value).float().view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)          # no part of the state dict

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)

def last_layer(model: nn.Module, kind: type) -> nn.Module:
    """The last layer of a kind, in the order of definition; raises UserError if there is none."""
    layers = [m for m in model.modules() if isinstance(m, kind)]
    if not layers:
        raise UserError(f"the network has no nn.{kind.__name__}, where its features are read")
    return layers[-1]

@contextlib.contextmanager
def listen(*layers: nn.Module, keep: Callable[[Tensor], object] = lambda x: x):
    """`with listen(*layers) as heard: model(x)`, then heard[layer]: what entered it, by `keep`."""
    heard = {}
    hooks = [layer.register_forward_pre_hook(
        lambda layer, args: heard.update({layer: keep(args[0])})) for layer in layers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()

def forward_with_embedding(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (B, K), embedding f (B, D)): f is what enters the network's last nn.Linear."""
    classifier = last_layer(model, nn.Linear)
    with listen(classifier) as heard:
        return model(x), heard[classifier]

def load_safely(path: str | Path) -> dict:
    """torch.load of tensors and plain types only: nothing in the file is ever executed."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    with explain(f"{path} is damaged, or no file of plain tensors; of a module save state_dict()"):
        return torch.load(path, map_location="cpu", weights_only=True)

def load_teacher(arch: str, num_classes: int, path: str | Path, mean=None, std=None,
                 default=((0, 0, 0), (1, 1, 1)), image_size: int = 32) -> Normalized:
    """A public checkpoint -> frozen network in eval mode that takes images in [0, 1].

    Strips `module.`, maps head names linear / fc / classifier and shortcut / downsample, then loads
    strictly. Normalisation: mean and std, else what the file stores, else `default`.
    Raises UserError with the keys that are missing or unexpected, or with shapes that differ.
    """
    stored, head, state = load_safely(path), "classifier" if arch == "vgg11" else "fc", {}
    with explain(f"{path} is no {arch} with {num_classes} classes"):
        for key, value in stored.get("state_dict", stored).items():
            key = key.removeprefix("module.").replace(".shortcut.", ".downsample.")
            first, _, rest = key.partition(".")
            state[f"{head}.{rest}" if first in ("linear", "fc", "classifier") else key] = value
        net = build_model(arch, num_classes, image_size, any(".downsample." in k for k in state))
        counters = {k: v for k, v in net.state_dict().items() if k.endswith("_tracked")}
        net.load_state_dict(counters | state)            # old files lack these counters
        if mean is None:
            mean, std = (stored.get(key, other) for key, other in zip(("mean", "std"), default))
        return Normalized(net, mean, std).eval().requires_grad_(False)

def export(model: Normalized, arch: str, config: Config) -> dict:
    """Weights and what they are of, all on the CPU: a file that `load_teacher` reads."""
    return {"state_dict": {k: v.cpu() for k, v in model.net.state_dict().items()}, "arch": arch,
            "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(),
            "image_size": config.image_size, "dataset": dataset_name(config.dataset)}

def save_atomic(thing, path: Path) -> None:
    """A text or torch.save by way of a temporary file: `path` holds the old or the new, no half."""
    path.parent.mkdir(parents=True, exist_ok=True)       # made when first needed
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(thing) if isinstance(thing, str) else torch.save(thing, temporary)
    temporary.replace(path)                              # atomic on one file system

def seed_for(config: Config, i: int) -> None:
    """Seed what is random in cycle or epoch i, on all devices: resumed runs draw as unbroken ones.

    i begins at 1: with --seed 0, i = 0 would draw again what the first weights were drawn from.
    """
    torch.manual_seed(1_000_003 * config.seed + i)

def to_float(images: Tensor, device: str | torch.device) -> Tensor:
    """uint8 (or float) images -> float32 in [0, 1] on the device, channels last."""
    images = images.to(device, non_blocking=True)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.contiguous(memory_format=torch.channels_last)

def augment(images: Tensor, mode: str = "constant", pad: int = 4) -> Tensor:
    """Random crop after padding, and flip, drawn per image: (B, 3, H, W) in [0, 1] -> same.

    mode, as of F.pad: "constant" is black, as in the usual recipe for CIFAR teachers.
    """
    (b, _, h, w), device = images.shape, images.device
    draws = torch.rand(b, 3, device=device)              # cut where, down and across; flip
    top, left = (draws[:, :2, None] * (2 * pad + 1)).long().unbind(1)               # (B, 1) each
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    columns = left + torch.where(draws[:, 2:] < 0.5, w - 1 - columns, columns)      # (B, W)
    rows, padded = top + rows, F.pad(images, (pad,) * 4, mode).permute(0, 2, 3, 1)  # pixels last
    image = torch.arange(b, device=device)[:, None, None]                           # (B, 1, 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

def train_teacher(config: Config, num_classes: int, data: Dataset, path: Path, status: Callable
                  ) -> None:
    """Supervised training of a teacher, into `path`: SGD, one-cycle, crop and flip. [our choice]

    After each epoch its state goes to a file beside `path`, from where the same call goes on.
    """
    some = torch.stack([data[i][0] for i in range(0, len(data), max(1, len(data) // 2000))])
    std, mean = torch.std_mean(some.float() / 255, (0, 2, 3))
    mean, std = NORMALISATION.get(config.dataset, (mean, std.clamp_min(1e-3)))   # 0: a flat channel
    net = build_model(config.teacher, num_classes, config.image_size)
    model = Normalized(net, config.mean or mean, config.std or std).to(config.device)
    loader = batches(data, 128, shuffle=True, drop_last=len(data) > 128)
    epochs, done = config.teacher_epochs, 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    parts = [model, optimizer, schedule]
    settings = [len(data), num_classes, config.seed, config.precision,
                model.mean.tolist(), model.std.tolist()]
    unfinished = path.with_suffix(".unfinished")
    if unfinished.exists() and (saved := load_safely(unfinished))["settings"] == settings:
        for part, state in zip(parts, saved["parts"]):
            part.load_state_dict(state)
        done = saved["epochs"]
    steps, start = 0, time.monotonic()                   # for the rate
    model.train()
    for epoch in range(done, epochs):
        seed_for(config, epoch + 1)
        for images, labels in loader:
            images = augment(to_float(images, config.device))
            with autocast(images, config):
                logits = model(images)
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels.to(config.device)).backward()
            optimizer.step()
            schedule.step()
            steps += 1
            each, left = (time.monotonic() - start) / steps, (epochs - done) * len(loader) - steps
            status(f"training the teacher: epoch {epoch + 1} of {epochs}, {128 / each:.0f} "
                   f"images/s, {each * left / 60:.1f} minutes left")
        save_atomic({"settings": settings, "epochs": epoch + 1,
                     "parts": [part.state_dict() for part in parts]}, unfinished)
    save_atomic(export(model, config.teacher, config), path)
    unfinished.unlink(missing_ok=True)                   # a run beside this one may have

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                             # mean, std
NORMALISATION = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
                 "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
                 "svhn": ((0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971)),
                 "stl10": ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))}
AKAMASTER = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/cifar100_"
EDADALTOCG = "https://huggingface.co/edadaltocg/resnet{}_{}/resolve/main/pytorch_model.bin"
PUBLIC_TEACHERS = {   # (data set, network): (address, SHA-256 or its beginning, %, mean and std)
    **{("cifar10", f"resnet{n}"): (f"{AKAMASTER}resnet{n}-{sha}.th", sha, stated, IMAGENET)
       for n, sha, stated in ((20, "12fca82f", 91.7), (32, "d509ac18", 92.6),
                              (44, "014dd654", 93.1), (56, "4bfd9763", 93.4))},
    **{("cifar100", f"resnet{n}"): (f"{CHENYAOFO}resnet{n}-{sha}.pt", sha, stated,
                                    NORMALISATION["cifar100"])
       for n, sha, stated in ((20, "23dac2f1", 68.8), (32, "84213ce6", 70.2),
                              (44, "ffe32858", 71.6), (56, "f2eff4c8", 72.6))},
    **{(data, f"resnet{n}"): (EDADALTOCG.format(n, data), sha, stated, NORMALISATION[data])
       for data, n, stated, sha in (
        ("cifar10", 18, 94.98, "f656242526b567dbd46857276acbcfcb4ee74a7f8a7ae5e56557b7e8fa5d914a"),
        ("cifar10", 34, 95.4, ""),                       # no digest known
        ("cifar10", 50, "?", "600e3f79fa41bc7c91d751a65b29b1ed2733345f8b6908381caa79a32ff28a6e"),
        ("cifar100", 18, "?", "d214f848520df67ed2396aad73888ad52c587239ba842b8d8479d6ad8d3dc32b"),
        ("cifar100", 34, "?", "6c289529717391309146c2ba0b28e425cbb1f8586c8c93c40499405d8ee72f1e"),
       )},
}

def dataset_name(dataset: str) -> str:
    """A name for files; folders of one name are told apart by a digest of their place."""
    if dataset in BUILT_IN or dataset in ("shapes", "shapes-unseen"):
        return dataset
    place = Path(dataset).resolve()
    return f"{place.name}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"

def get_teacher(config: Config, num_classes: int, train_data: Callable, status: Callable
                ) -> Normalized:
    """Frozen teacher: --teacher-ckpt, else the file in checkpoints/, else a public one, else a new.

    train_data() is called to train one. Normalisation: the flags, else what the file stores, else
    that of the public teacher which the file is, else the data set's, else ImageNet's.
    """
    name, size = f"{dataset_name(config.dataset)}_{config.teacher}", config.image_size
    path = Path("checkpoints", name + ("" if size == 32 else f"_{size}px") + ".pth")
    offered = PUBLIC_TEACHERS.get((config.dataset, config.teacher)) if size == 32 else None
    if config.teacher_ckpt:
        path = Path(config.teacher_ckpt)
    elif config.train_teacher or not (path.exists() or offered):
        path = path.with_stem(f"{path.stem}_{config.teacher_epochs}epochs")
        if not path.exists():
            status(f"training {config.teacher} into {path}", True)
            train_teacher(config, num_classes, train_data(), path, status)
    elif not path.exists():
        address, sha, *_ = offered
        path = path.with_stem(f"{name}-{sha or 'public'}")   # torch.hub checks the digest
        with explain(f"cannot fetch {address}: put the file there as {path}, or --train-teacher"):
            torch.hub.load_state_dict_from_url(address, str(path.parent), "cpu", True, bool(sha),
                                               path.name, weights_only=True)
    # What the file is, its digest says, whoever put it there; or its name, where none is known.
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    public = next((row for row in PUBLIC_TEACHERS.values() if row[1] and digest.startswith(row[1])),
                  offered if path.stem == f"{name}-public" else None)
    default = public[3] if public else NORMALISATION.get(config.dataset, IMAGENET)
    status(f"teacher weights: {path}" + (
        f", {public[0]}, stated accuracy {public[2]} %" if public else ""), True)
    return load_teacher(config.teacher, num_classes, path, config.mean, config.std, default,
                        size).to(config.device)

# ===== 3. CEND, generator, memory bank. Here the method begins; it ends with section 5 ============

def centre_and_scale(embeddings: Tensor) -> Tensor:
    """Raw category embeddings (K, E) -> centred and scaled by one number.           [our choice]

    Language embeddings of class names are almost parallel, so they are centred. They then span
    r = min(K-1, E) directions, and get a mean squared length of r: along these directions noise of
    magnitude 1 is as strong as the differences between categories, whatever E is.
    """
    e = embeddings.float() - embeddings.float().mean(0)
    r = min(len(e) - 1, e.shape[1])
    return e * math.sqrt(r) / e.square().sum(1).mean().sqrt().clamp_min(1e-12)

NOISE_SOURCES: tuple[Callable[[Tensor], Tensor], ...] = (   # zero mean, unit variance [our choice]
    torch.randn_like,                                       # Gaussian
    lambda x: (2 * torch.rand_like(x) - 1) * math.sqrt(3),  # uniform
    lambda x: torch.distributions.Laplace(
        torch.zeros_like(x), math.sqrt(0.5), validate_args=False).sample(),         # Laplace
    lambda x: 2.0 * torch.randint_like(x, 2) - 1,           # Rademacher
)

class CEND(nn.Module):
    """Category embedding noise diffusion, eq. 1 (paper; families and the draw of n are ours).

    ê = e_y + M_n ⊙ q_n, n ~ U{1..N}, q_n ~ NS_n

    category_embeddings (K, E); magnitudes: M_n of the N sources. Beyond four the families repeat.
    Without noise, M = 0, all images of a category in a round would be the same.
    """

    def __init__(self, category_embeddings: Tensor, magnitudes=(2.0, 2.0, 2.0, 2.0)):
        super().__init__()
        self.register_buffer("embeddings", category_embeddings.clone())
        self.register_buffer("magnitudes", torch.tensor(magnitudes, dtype=torch.float32))

    def forward(self, labels: Tensor, source: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """labels (B,) -> (ê (B, E), source (B,)). source: one, one per row, or None: drawn."""
        n = len(self.magnitudes)
        if source is None:
            source = torch.randint(n, labels.shape, device=labels.device)
        source = torch.as_tensor(source, device=labels.device).expand(labels.shape)
        e = self.embeddings[labels]                                                 # e_y (B, E)
        noise = torch.stack([NOISE_SOURCES[i % 4](e) for i in range(n)])            # (N, B, E)
        q = noise[source, torch.arange(len(e), device=e.device)]                    # q_n (B, E)
        return e + self.magnitudes[source, None] * q, source                        # ê (B, E)

class Generator(nn.Module):
    """Lightweight generator, eq. 2: x̂ = G(ê), (B, E) -> (B, 3, S, S) in [0, 1].     [our choice]

    A linear seed layer makes `width` channels of at most 8 x 8 pixels; each stage doubles height
    and width (less one where S asks for it) and convolves; from the second stage on channels halve,
    down to 8. Width 64 is light, 128 heavy.
    """

    def __init__(self, embedding_dim: int, image_size: int = 32, width: int = 64):
        super().__init__()
        stages = max(1, math.ceil(math.log2(image_size / 8)))
        seed, *sizes = [math.ceil(image_size / 2 ** i) for i in range(stages, -1, -1)]
        self.seed_layer = nn.Linear(embedding_dim, width * seed * seed)
        layers = [nn.Unflatten(1, (width, seed, seed)), nn.BatchNorm2d(width)]
        for i, size in enumerate(sizes):
            before, width = width, width if i == 0 else max(width // 2, 8)
            layers += [nn.Upsample(size), nn.Conv2d(before, width, 3, 1, 1, bias=False),
                       nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.decode = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Sigmoid())

    def forward(self, e_hat: Tensor) -> Tensor:
        return self.decode(self.seed_layer(e_hat))

class MemoryBank(nn.Module):
    """First-in first-out store of uint8 images (capacity, 3, S, S) and labels.      [our choice]"""

    def __init__(self, capacity: int, image_size: int):
        super().__init__()
        images = torch.zeros(capacity, 3, image_size, image_size, dtype=torch.uint8)
        self.register_buffer("images", images)
        self.register_buffer("labels", torch.zeros(capacity, dtype=torch.long))
        self.pushed = 0                                                  # images ever pushed

    def __len__(self) -> int:
        return min(self.pushed, len(self.labels))

    def push(self, images: Tensor, labels: Tensor) -> None:
        """images (B, 3, S, S), uint8 or float in [0, 1]; labels (B,). The oldest go."""
        if images.is_floating_point():
            images = (images * 255).round().to(torch.uint8)
        capacity, first = len(self.labels), max(0, len(labels) - len(self.labels))
        where = torch.arange(first, len(labels), device=self.labels.device) + self.pushed
        for store, new in ((self.images, images), (self.labels, labels)):
            store[where % capacity] = new[first:]
        self.pushed += len(labels)

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """images (batch, 3, S, S) float32 in [0, 1], labels (batch,); drawn with replacement."""
        i = torch.randint(len(self), (batch,), device=self.labels.device)
        return to_float(self.images[i], i.device), self.labels[i]

# ===== 4. Losses: pure functions, tensors in, scalar out; and what reads the networks for them ====

def at_least_float32(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 stay: no loss takes logarithms in half."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

def category_consistency_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 3 (paper): L_CE = CE(t(x̂), y), batch mean. (B, K), (B,) -> scalar >= 0."""
    return F.cross_entropy(at_least_float32(teacher_logits), labels)

class BatchStatistics(torch.autograd.Function):
    """Mean and biased variance over (B, H, W), by the BatchNorm kernel: x (B, C, H, W) -> (C,) x 2.

    The same as `torch.var_mean(x, (0, 2, 3), correction=0)`, which takes ten times as long on a
    CPU. The backward is one affine map of x, which is a BatchNorm too.
    """

    @staticmethod
    def forward(ctx, x):
        if x.device.type in ("cpu", "cuda"):
            dtype = torch.promote_types(x.dtype, torch.float32)
            running = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)   # no half precision
            mean, var = torch.batch_norm_update_stats(x, running[0], running[1], 0.0)
        else:
            var, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, g_mean, g_var):
        x, mean = ctx.saved_tensors                          # dμ/dx = 1/M, dσ²/dx = 2 (x - μ) / M
        m = x.numel() // x.shape[1]
        return F.batch_norm(x, mean, torch.ones_like(mean), 2 * g_var / m, g_mean / m, eps=0.0)

def statistics_distance(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor,
                        eps: float = 1e-4) -> Tensor:
    """One layer of eq. 4: ‖(μ(x̂) - μ)/σ‖₂ + ‖(σ²(x̂) - σ²)/σ²‖₂. (C,) each -> scalar >= 0.

    DeepInversion does not divide by σ: there, channels count the more the larger their values are.
    eps is added to σ², for channels that are nearly constant.                       [our choice]
    """
    norm, scale = torch.linalg.vector_norm, running_var + eps                       # σ²
    return norm((mean - running_mean) / scale.sqrt()) + norm((var - running_var) / scale)

class FeatureMatching(contextlib.ExitStack):
    """Teacher-guided feature distribution matching, eq. 4 (paper; form after DeepInversion).

    L_FM = mean over BatchNorm layers l of ‖(μ_l(x̂) - μ_l)/σ_l‖₂ + ‖(σ²_l(x̂) - σ²_l)/σ²_l‖₂

        with FeatureMatching(teacher) as matching:
            logits = teacher(images)
        loss = matching.loss()

    It keeps the generator from collapsing onto a few images that the teacher is sure of. Division
    by σ and mean over layers are [our choice]: one weight serves every channel and depth. A teacher
    without BatchNorm gives 0. average(x): the differentiable mean of x over processes, if several.
    """

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        self.heard, self.average = {}, None

    def __enter__(self) -> FeatureMatching:              # what it enters, ExitStack ends
        self.heard = self.enter_context(listen(*self.layers, keep=BatchStatistics.apply))
        return self

    def loss(self) -> Tensor:
        """Scalar >= 0 of the last forward, differentiable to the images."""
        if not self.heard:
            return torch.zeros(())
        means, variances = zip(*self.heard.values())
        if self.average:                                 # means of x and x² average; σ² does not
            mean, var, sizes = torch.cat(means), torch.cat(variances), [len(m) for m in means]
            mean, square = self.average(torch.stack([mean, var + mean.square()]))
            means, variances = mean.split(sizes), (square - mean.square()).split(sizes)
        return torch.stack([statistics_distance(m, v, layer.running_mean, layer.running_var)
                            for layer, m, v in zip(self.heard, means, variances)]).mean()

def adversarial_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 5: L_adv = -(1/B) Σ_i 1[argmax s_i = argmax t_i] KL(softmax(t_i) ‖ softmax(s_i)).

    (B, K), (B, K) -> scalar <= 0. Named by the paper; form of NAYER. Where the two disagree already
    there is nothing left to look for, and more of it would drive the images from their category:
    so only rows on which student and teacher agree count.
    """
    s = F.log_softmax(at_least_float32(student_logits), 1)
    t = F.log_softmax(at_least_float32(teacher_logits), 1)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(1)                   # (B,)
    return -(kl * (s.argmax(1) == t.argmax(1))).mean()

def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 20.0) -> Tensor:
    """Eq. 7 (Hinton et al.): L_KD = τ² KL(softmax(t/τ) ‖ softmax(s/τ)), sum over K, mean over B.

    (B, K), (B, K) -> scalar >= 0. τ² keeps the size of the gradient when τ changes.
    """
    s = F.log_softmax(at_least_float32(student_logits) / temperature, 1)
    t = F.log_softmax(at_least_float32(teacher_logits) / temperature, 1)
    return temperature ** 2 * F.kl_div(s, t, log_target=True, reduction="batchmean")

def category_aware_embedding_loss(z: Tensor, targets: Tensor, labels: Tensor,
                                  temperature: float = 0.1) -> Tensor:
    """Eq. 8: L_CAE = mean_i -log( p_i / (p_i + Σ_{k: y_k ≠ y_i} exp(cos(z_i, f_k)/τ)) ).

    p_i = exp(cos(z_i, f_i)/τ). z (N, D) the student's projected embeddings, targets f (N, D) the
    teacher's of the same images, or of the same places in them, labels y (N,) -> scalar >= 0.
    Form: InfoNCE whose negatives are of *other* categories only [our choice]: two images of one
    category need not be told apart, which would work against eq. 9. Targets are centred, since
    features after a ReLU all point into one corner. An embedding is the mean over all places of the
    last feature map and does not say what is where; so `student_step` applies the loss to single
    places, too: of that map, and of the last one of every finer resolution, for the lower layers.
    """
    z, f = at_least_float32(z), at_least_float32(targets)
    z, f = F.normalize(z, dim=1), F.normalize(f - f.mean(0), dim=1)
    similarity = at_least_float32(z @ f.to(z.dtype).T) / temperature                # (N, N)
    kin = (labels[:, None] == labels).fill_diagonal_(False)          # neither target nor negative
    return F.cross_entropy(similarity.masked_fill(kin, -1e9), torch.arange(len(z), device=z.device))

def resolution_ends(model: nn.Module) -> list[nn.Module]:
    """Layers that the last map of a resolution enters: any with a stride, and the last pooling."""
    strided = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d))
               and m.stride not in (1, (1, 1))]
    return [*strided, last_layer(model, nn.AdaptiveAvgPool2d)]

def last_maps(heard: dict[nn.Module, Tensor]) -> list[Tensor]:
    """The last feature map (B, D, h, w) of each resolution, coarsest first.

    heard: what entered the layers of `resolution_ends`, in the order of the forward pass; of maps
    of one resolution the last counts. Those of teacher and student are paired in the order
    returned, also where their resolutions differ.
    """
    maps = {x.shape[2:]: x for x in heard.values() if x.ndim == 4 and x.shape[1] > 3}    # no image
    return list(maps.values())[::-1]

def read_places(feature_map: Tensor, places: Tensor) -> Tensor:
    """Feature map (B, D, h, w), places (B, n, 2) in [0, 1) of its height and width -> (B n, D).

    The same places name the same part of an image in maps of any resolution.
    """
    (b, _, h, w), (y, x) = feature_map.shape, places.unbind(2)
    image = torch.arange(b, device=places.device)[:, None]
    cell = (image * h + (y * h).long()) * w + (x * w).long()                        # (B, n)
    # Of a channels-last map all rows are a view: only those that are selected get copied.
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, cell.flatten())

def contrastive_loss(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Eq. 9, CNCL: rows of one category attract, whatever their noise; other categories repel.

    L = -(1/|V|) Σ_{i∈V} (1/|P(i)|) Σ_{p∈P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) )
    z (B, D), normalised here; labels (B,); P(i) the other rows of i's category; V the rows that
    have any. Pairs: paper; form: SupCon. 0 for a batch without any pair.
    """
    z = F.normalize(at_least_float32(z), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (at_least_float32(z @ z.T) / temperature).masked_fill(itself, -1e9)    # a ≠ i
    log_p = F.log_softmax(similarity, 1)                                            # (B, B)
    positive = (labels[:, None] == labels) & ~itself                                # P(i)
    per_row = -(log_p * positive).sum(1) / positive.sum(1).clamp_min(1)
    return per_row.sum() / positive.any(1).sum().clamp_min(1)                       # mean over V

def within_class_variance(f: Tensor, labels: Tensor) -> Tensor:
    """Diversity: unbiased variance of f (B, D) within a category, summed over D. 0 = collapsed."""
    same = (labels[:, None] == labels).to(f.dtype)                                  # (B, B)
    n = same.sum(1, keepdim=True)                                                   # (B, 1)
    return (f - same @ f / n).square().sum() / (len(f) - (1 / n).sum()).clamp_min(1)

# ===== 5. Synthesis, distillation, the loop over both =============================================

class State(nn.Module):
    """What distilling changes or needs: networks, embeddings, bank, optimisers, counters.

    prior (K, E): category embeddings; else the rows of the teacher's classifier, which need no
    second model, or with config.prior "index" one-hot rows. Raises UserError for another shape.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: Config,
                 prior: Tensor | None = None):
        super().__init__()
        self.heads = [last_layer(net, nn.Linear) for net in (teacher, student)]     # f enters them
        rows = self.heads[0].weight.detach()                                        # (K, D)
        if prior is None:
            prior = torch.eye(len(rows)) if config.prior == "index" else rows
        prior = prior.detach().float().to(rows.device)                              # (K, E)
        if prior.ndim != 2 or len(prior) != len(rows) or not (
                0 < (prior - prior.mean(0)).square().sum() < math.inf):
            raise UserError(f"--prior is {tuple(prior.shape)}; it must be finite, not all alike "
                            f"and ({len(rows)}, E), a row for each category of the teacher")
        self.student, self.cend = student, CEND(centre_and_scale(prior), config.magnitudes)
        norms = [weights.float().norm() for weights in teacher.state_dict().values()]
        self.register_buffer("teacher_norms", torch.stack(norms))    # --resume compares them
        self.generator = Generator(prior.shape[1], config.image_size, config.generator_width)
        # h: a linear projection serves eq. 8 and eq. 9, others eq. 8 at places.      [our choice]
        self.projection = nn.Linear(self.heads[1].in_features, rows.shape[1])
        self.ends = [resolution_ends(net) if config.places and config.lambda_cae else []
                     for net in (teacher, student)]
        maps, image = [], torch.zeros(1, 3, config.image_size, config.image_size)
        for net, ends in zip((teacher, student), self.ends):
            with torch.no_grad(), listen(*ends) as heard:
                net.eval()(image.to(rows.device))
            maps.append(last_maps(heard))
        self.place_projections = nn.ModuleList(nn.Linear(map_s.shape[1], map_t.shape[1])
                                               for map_t, map_s in zip(*maps))
        # Coupled training learns from the fresh batch alone.
        self.bank = MemoryBank(config.bank_capacity if config.decoupled else config.synth_batch,
                               config.image_size)
        self.to(rows.device)                             # the teacher is there already
        self.generator.to(memory_format=torch.channels_last)             # as the teacher
        self.matching = FeatureMatching(teacher if config.lambda_fm else nn.Identity())
        if config.lambda_fm and not self.matching.layers:
            warnings.warn("the teacher has no BatchNorm: feature matching is off", stacklevel=2)
        # SGD with a cosine, Adam for the generator: as in most of the literature.   [our choice]
        learning = [p for part in (student, self.projection, self.place_projections)
                    for p in part.parameters()]
        self.student_optimizer = torch.optim.SGD(learning, config.student_lr, 0.9, nesterov=True,
                                                 weight_decay=1e-4)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(),
                                                    config.generator_lr, betas=(0.5, 0.999))
        self.cycle, self.seconds = 0, 0.0                # seconds: kept by the caller of `distill`
        # share: the rows of a batch that are this process's; gather: those of all. See section 8.
        self.share = self.gather = lambda rows: rows

    def get_extra_state(self) -> dict:
        """What `state_dict` holds beside networks and images: a run goes on from there exactly."""
        return {"generator": self.generator_optimizer.state_dict(), "cycle": self.cycle,
                "student": self.student_optimizer.state_dict(), "seconds": self.seconds,
                "pushed": self.bank.pushed}

    def set_extra_state(self, saved: dict) -> None:
        """The inverse, for `load_state_dict`."""
        self.generator_optimizer.load_state_dict(saved["generator"])
        self.student_optimizer.load_state_dict(saved["student"])
        self.cycle, self.seconds, self.bank.pushed = (
            saved[name] for name in ("cycle", "seconds", "pushed"))

def set_training(model: nn.Module, on: bool) -> None:
    """Train mode with gradients, or eval mode without."""
    model.train(on).requires_grad_(on)

def generator_step(state: State, teacher: nn.Module, e_hat: Tensor, labels: Tensor, config: Config
                   ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One Adam step on eq. 6 -> (the images it was computed on, their L_G, its terms), detached.

    BatchNorm layers of a teacher that was trained on crops with black padding hold the statistics
    of images with black borders. So it is shown such crops, drawn anew in each step: otherwise the
    generator has to draw the borders, and the student learns from them.             [our choice]
    """
    l_fm = l_adv = torch.zeros((), device=e_hat.device)
    with state.matching, autocast(e_hat, config):
        images = state.generator(e_hat)                                             # eq. 2
        seen = augment(images) if config.synth_crop else images
        t = teacher(seen)
        s = state.student(seen) if config.lambda_adv else None           # in eval mode, frozen
    l_ce = category_consistency_loss(t, labels)                                     # eq. 3
    if state.matching.layers:
        l_fm = state.matching.loss()                                                # eq. 4
    if config.lambda_adv:
        l_adv = adversarial_loss(s, t)                                              # eq. 5
    loss = l_ce + config.lambda_fm * l_fm + config.lambda_adv * l_adv               # eq. 6
    state.generator_optimizer.zero_grad()
    loss.backward()
    state.generator_optimizer.step()                     # G only: T and S are frozen
    terms = {"ce": l_ce.detach(), "fm": l_fm.detach(), "adv": l_adv.detach()}
    return images.detach(), loss.detach(), terms

def synthesis_round(state: State, teacher: nn.Module, config: Config) -> dict[str, Tensor]:
    """Phase A, the student frozen: one noise draw, some generator steps, images to the bank.

    Returns the loss terms of the last step, and two things to look at when a student does not
    learn: the variance of the new images within a category, and how many the teacher recognises.
    """
    set_training(state.student, False)                   # eval: no statistics change
    e = state.cend.embeddings
    # Categories in turn, from a random first. The draw is held for the round, since a few steps
    # can fit the images of one draw but not a map from all noise.                    [our choice]
    first = torch.randint(len(e), (), device=e.device)
    all_labels = (torch.arange(config.synth_batch, device=e.device) + first) % len(e)
    e_hat = state.cend(all_labels)[0] if config.cend else torch.randn_like(e[all_labels])   # eq. 1
    e_hat, labels = state.share(e_hat), state.share(all_labels)
    if config.decoupled:
        # A new seed layer and a fresh Adam give new images, as in NAYER; the decoder, which has
        # learnt to draw for this teacher, stays.
        state.generator.seed_layer.reset_parameters()
        state.generator_optimizer.state.clear()          # its moments
    best, lowest = torch.zeros((), device=e.device), torch.full((), math.inf, device=e.device)
    for _ in range(config.synth_steps):
        images, loss, terms = generator_step(state, teacher, e_hat, labels, config)
        best = torch.where(loss < lowest, images, best)  # of the step with the lowest L_G, as NAYER
        lowest = torch.fmin(loss, lowest)                # fmin and < pass over a loss that is NaN
    state.bank.push(state.gather(best), all_labels)      # as uint8, as a picture file has
    with torch.no_grad(), autocast(best, config):
        t, f = forward_with_embedding(teacher, best)
    return terms | {"variance": within_class_variance(f.float(), labels),
                    "recognised": (t.argmax(1) == labels).float().mean()}

def student_step(state: State, teacher: nn.Module, images: Tensor, labels: Tensor, config: Config
                 ) -> dict[str, Tensor]:
    """One SGD step of student and h on eq. 10, for images (B, 3, H, W) -> its terms, detached."""
    l_cae = l_cncl = torch.zeros((), device=images.device)
    (head_t, head_s), (ends_t, ends_s) = state.heads, state.ends
    with (listen(head_t, *ends_t) as heard_t, listen(head_s, *ends_s) as heard_s,
          autocast(images, config)):
        with torch.no_grad():
            t = teacher(images)
        s = state.student(images)                        # train mode: its BatchNorm learns
        z, labels = state.gather(state.projection(heard_s[head_s])), state.gather(labels)
        # Some places in each image, drawn anew: the same in the maps of all resolutions.
        places = state.share(torch.rand(len(labels), config.places, 2, device=labels.device))
        pairs = [(state.gather(project(read_places(map_s, places))),
                  state.gather(read_places(map_t, places)))                         # (B n, D) each
                 for project, map_s, map_t in zip(state.place_projections, last_maps(heard_s),
                                                  last_maps(heard_t))]
    l_kd = kd_loss(s, t, config.kd_temperature)                                     # eq. 7
    if config.lambda_cae:
        f_t, of_place = state.gather(heard_t[head_t]), labels.repeat_interleave(config.places)
        l_cae = category_aware_embedding_loss(z, f_t, labels) + sum(                # eq. 8
            category_aware_embedding_loss(*pair, of_place) for pair in pairs)
    if config.lambda_cncl:
        l_cncl = contrastive_loss(z, labels)                                        # eq. 9
    loss = l_kd + config.lambda_cae * l_cae + config.lambda_cncl * l_cncl           # eq. 10
    state.student_optimizer.zero_grad()
    loss.backward()
    state.student_optimizer.step()
    return {"kd": l_kd.detach(), "cae": l_cae.detach(), "cncl": l_cncl.detach()}

def jitter_colours(images: Tensor, strength: float) -> Tensor:
    """Each channel brighter or darker by up to ±strength, each image by ±⅔ of that. [our choice]

    (B, 3, H, W) in [0, 1] -> same. Drawn per image; torchvision's ColorJitter draws once a batch.
    """
    gain = 1 + strength * (2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 1)
    shift = strength / 1.5 * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    return (images * gain + shift).clamp(0, 1)

def distillation_phase(state: State, teacher: nn.Module, config: Config,
                       progress: Callable[[], float] = lambda: 0.0) -> dict[str, Tensor]:
    """Phase B: student steps on images of the bank, the generator is not called -> mean terms.

    It ends early where `progress`, the fraction of the run that is over, reaches 1.
    """
    set_training(state.student, True)
    steps = []
    for _ in range(config.kd_steps):
        images, labels = state.bank.sample(config.batch_size)
        # Cropped, flipped, varied in colour, the same for T and S; reflected at the edges, since
        # test images have no black ones. (The notes: the paper leaves the images of CNCL as they
        # are.)                                                                       [our choice]
        images = jitter_colours(augment(images, mode="reflect"), config.colour_jitter)
        images, labels = state.share(images), state.share(labels)
        steps.append(student_step(state, teacher, images, labels, config))
        if progress() >= 1:
            break
    return {name: torch.stack([terms[name] for terms in steps]).mean() for name in steps[0]}

def distill(teacher: nn.Module, student: nn.Module, config: Config, prior: Tensor | None = None,
            state: State | None = None, progress: Callable[[], float] | None = None,
            on_cycle: Callable[[State, dict], None] | None = None) -> nn.Module:
    """Train `student` to imitate `teacher` on images that the generator makes. No data set goes in.

    Both take images in [0, 1] and sit on one device; the teacher stays bit-identical. prior (K, E):
    category embeddings in place of config.prior. state: of this student, to go on from. progress():
    fraction of the run that is over, by default of config.cycles (config.minutes is for `main`).
    on_cycle(state, metrics) follows each cycle. config.real_kd: the images are those in state.bank.
    Returns the student, in eval mode. Raises FloatingPointError that names the cycle and what is
    not finite: a loss, or the norm of all weights. Seeds torch's generators by config.seed.
    """
    if teacher is student or state and state.student is not student:
        raise UserError("`student` must be the network in `state`, and another than the teacher")
    if state is None:
        torch.manual_seed(config.seed)
        state = State(teacher, student, config, prior)
    progress = progress or (lambda: state.cycle / config.cycles)
    set_training(teacher, False)                         # eval, no gradient to its weights
    turns, per_turn = 1, config                          # decoupled: a cycle is one turn
    if not config.decoupled:                             # coupled: many, a step of each network
        turns, per_turn = config.kd_steps, dataclasses.replace(
            config, synth_steps=1, kd_steps=1, warmup_rounds=0)
    while (over := progress()) < 1:
        seed_for(config, state.cycle + 1)
        # A cosine that begins slowly: at full step size from the start, a deep student learns
        # nothing for long.
        lr = config.student_lr * (1 + math.cos(math.pi * over)) / 2
        lr *= min(1.0, (state.cycle + 1) / config.lr_warmup)
        state.student_optimizer.param_groups[0]["lr"] = lr
        rounds = 1 if state.cycle else 1 + per_turn.warmup_rounds    # one gives too few images
        terms: dict[str, Tensor] = {}
        for _ in range(turns):
            for _ in range(0 if config.real_kd else rounds):
                terms |= synthesis_round(state, teacher, per_turn)                  # phase A
                if progress() > 0.5:
                    break                                # half of a short budget is for phase B
            terms |= distillation_phase(state, teacher, per_turn, progress)         # phase B
            if progress() >= 1:
                break
        # Weights that the last step broke must not be saved: no loss would tell before the next.
        terms["weight_norm"] = torch.stack([p.detach().norm() for p in state.parameters()]).norm()
        state.cycle += 1                                 # first, since on_cycle may save it
        # One transfer per cycle: reading a number earlier would make a GPU wait at each step.
        numbers = torch.stack([term.float() for term in terms.values()]).tolist()
        metrics = {"cycle": state.cycle, "lr": lr, **dict(zip(terms, numbers))}
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite in cycle {state.cycle}: {', '.join(broken)}; "
                                     f"lower --student-lr or --generator-lr")
        if on_cycle:
            on_cycle(state, metrics)                     # may raise, to stop
    return student.eval()

# ===== 6. Evaluation, on real data: accuracy, linear probe, detection probe =======================

def batches(data: Dataset, size: int = 256, **keywords) -> DataLoader:
    """A loader; large folders of image files are decoded by several workers."""
    large = not isinstance(data, TensorDataset) and len(data) > 10_000
    return DataLoader(data, size, num_workers=min(8, os.cpu_count() or 1) if large else 0,
                      **keywords)

@torch.no_grad()
def predict(model: nn.Module, data: Dataset, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Run a network in eval mode over a data set: logits (N, K), embeddings (N, D), labels (N,)."""
    model.eval()
    rows = []
    for images, labels in batches(data):
        logits, f = forward_with_embedding(model, to_float(images, device))
        rows.append((logits.float(), f.float(), labels.to(device)))
    return tuple(torch.cat(part) for part in zip(*rows))

def top1(scores: Tensor, labels: Tensor) -> float:
    """Percentage of rows of scores (N, K) whose largest entry is at labels (N,)."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()  # waits for the device

def fit_logistic(x: Tensor, y: Tensor, k: int, l2: float) -> tuple[Tensor, Tensor]:
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

def linear_probe(backbone: nn.Module, train: Dataset, test: Dataset, device: str = "cpu",
                 l2_grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)) -> dict:
    """How well frozen embeddings serve another task: {"accuracy": percent, "l2": chosen strength}.

    train and test yield (image, label), images uint8 or float in [0, 1]. Embeddings are
    standardised by train statistics; L2 is chosen on a held-out tenth of train.
    """
    (_, x, y), (_, x_test, y_test) = (predict(backbone, data, device) for data in (train, test))
    std, mean = torch.std_mean(x, 0)
    x, x_test = ((v - mean) / std.clamp_min(1e-6) for v in (x, x_test))
    k, tenth = int(y.max()) + 1, max(1, len(x) // 10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)  # fixed
    held, rest = order[:tenth], order[tenth:]            # to choose L2 by, and to fit

    def held_out(l2: float) -> float:
        w, b = fit_logistic(x[rest], y[rest], k, l2)
        return top1(x[held] @ w + b, y[held])

    l2 = max(l2_grid, key=held_out)
    w, b = fit_logistic(x, y, k, l2)
    return {"accuracy": top1(x_test @ w + b, y_test), "l2": l2}

def fit_ridge(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Ridge regression in closed form: weights (D, M) under L2, bias (M,)."""
    mx, my = x.mean(0), y.mean(0)
    gram = (x - mx).T @ (x - mx) / len(x) + l2 * torch.eye(x.shape[1], device=x.device)
    w = torch.linalg.solve(gram, (x - mx).T @ (y - my) / len(x))  # (D, M)
    return w, my - mx @ w

def dense_features(backbone: nn.Module, image: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) -> last feature map before pooling as rows (L, D), centres (L, 2).

    A centre is the middle of what a location stands for, x and y in pixels.
    """
    pool = last_layer(backbone, nn.AdaptiveAvgPool2d)
    with torch.no_grad(), listen(pool) as heard:
        backbone(to_float(image[None], device))          # one image: sizes may differ
    features = heard[pool][0].float()                                               # (D, h, w)
    y, x = ((torch.arange(n, device=device) + 0.5) * pixels / n
            for n, pixels in zip(features.shape[1:], image.shape[1:]))
    return features.flatten(1).T, torch.cartesian_prod(y, x).flip(1)

def assign_locations(centres: Tensor, boxes: Tensor, labels: Tensor, k: int
                     ) -> tuple[Tensor, Tensor]:
    """What each location is to learn: category (L,), distances to the sides of its box (L, 4).

    centres (L, 2); boxes (n, 4): left, top, right, bottom; labels (n,) < k. Category: of the box in
    whose central half the centre lies (of two, the smaller box), k for background in no box, -1 for
    the rest, which is left out. A box whose central half holds no centre takes the nearest one.
    """
    category, sides = torch.full_like(centres[:, 0], k).long(), centres.new_ones(len(centres), 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True):                            # the smaller overwrite
        box, centre = boxes[i], (boxes[i, :2] + boxes[i, 2:]) / 2
        off = (centres - centre).abs() / (box[2:] - box[:2])                         # (L, 2)
        central = (off < 0.25).all(1)
        central[off.square().sum(1).argmin()] |= ~central.any()
        category[(off < 0.5).all(1) & (category == k)] = -1  # in the box
        category[central] = labels[i]
        sides[central] = torch.cat([centres - box[:2], box[2:] - centres], 1)[central].clamp_min(1)
    return category, sides

def average_precision(detections: list[tuple[Tensor, Tensor]], truths: list[Tensor]) -> float:
    """AP at IoU 0.5 of one category in percent: area under precision over recall, all points.

    Per image: detected boxes (n, 4) and their scores (n,), best first; true boxes (m, 4). A
    detection is right if it overlaps a true box that no better one has taken.
    """
    hits, order = [], torch.cat([scores for _, scores in detections]).argsort(descending=True)
    for (boxes, _), truth in zip(detections, truths):
        overlap = ops.box_iou(boxes, truth)                                             # (n, m)
        for row in overlap:                              # a view: it sees what is taken
            hits.append(len(row) > 0 and row.max().item() >= 0.5)
            if hits[-1]:
                overlap[:, row.argmax()] = 0
    hits = torch.tensor(hits, dtype=torch.double)[order]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)  # after each detection
    precision = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    return 100 * (precision * hits).sum().item() / sum(map(len, truths))

def detection_probe(backbone: nn.Module, train: Dataset, test: Dataset, device: str = "cpu",
                    categories: list[str] | None = None, most: int = 100_000) -> dict:
    """How well frozen dense features find objects: {"ap50": percent, "per_category": {name: AP}}.

    train and test yield (image (3, H, W), {"boxes": (n, 4) in pixels, "labels": (n,)}). Linear in
    the last feature map: a logistic regression for the category of a location, a ridge regression
    for the logarithm of the distances to the sides of its box. Of the background some `most`
    locations, seeded draws from all images. "detections": boxes, labels, scores. [our choice]
    """
    backbone.eval()
    k = len(categories or []) or 1 + max(i for _, t in train for i in t["labels"].tolist())
    rows, draw, each = [], torch.Generator().manual_seed(0), most // len(train) + 1
    for image, target in train:
        x, centres = dense_features(backbone, image, device)
        category, sides = assign_locations(centres, target["boxes"].to(device), target["labels"], k)
        empty = (category == k).nonzero()[:, 0]          # background
        empty = empty[torch.randperm(len(empty), generator=draw)[:each].to(device)]
        keep = torch.cat([((category >= 0) & (category < k)).nonzero()[:, 0], empty])
        rows.append((x[keep], category[keep], sides[keep]))  # all of an image that is kept
    x, category, sides = (torch.cat(part) for part in zip(*rows))
    std, mean = torch.std_mean(x, 0)
    x, objects = (x - mean) / std.clamp_min(1e-6), category < k  # rows of objects, for the boxes
    w, b = fit_logistic(x, category, k + 1, 1e-3)
    v, c = fit_ridge(x[objects], sides[objects].log(), 1e-3)
    detections, targets = [], []
    for image, target in test:
        x, centres = dense_features(backbone, image, device)
        x = (x - mean) / std.clamp_min(1e-6)
        scores, labels = (x @ w + b).softmax(1)[:, :k].max(1)  # best category but background
        sides = (x @ v + c).exp()                        # (L, 4) pixels
        boxes = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1)
        boxes = ops.clip_boxes_to_image(boxes, image.shape[1:])
        sure = (scores > 0.02).nonzero()[:, 0]           # fainter ones are left out
        best = sure[ops.batched_nms(boxes[sure], scores[sure], labels[sure], 0.4)[:50]]
        detections.append(tuple(part[best].cpu() for part in (boxes, labels, scores)))
        targets.append(target)
    per_category = {}
    for i in range(k):
        truths = [t["boxes"][t["labels"] == i] for t in targets]  # (m, 4) for each image
        if any(map(len, truths)):                        # a category without test objects has none
            found = [(boxes[of == i], scores[of == i]) for boxes, of, scores in detections]
            per_category[categories[i] if categories else str(i)] = average_precision(found, truths)
    return {"ap50": sum(per_category.values()) / max(1, len(per_category)),
            "per_category": per_category, "detections": detections}

# ===== 7. Data sets: only to train a missing teacher and to evaluate; `distill` sees none =========

# Shapes in local coordinates: u right, v down, r radius, m = max(|u|, |v|). The first ten make up
# the embedded data set, the others are the unseen categories of its probe.
SHAPES: dict[str, Callable] = {
    "disc": lambda u, v, r, m: r < 0.9,
    "ring": lambda u, v, r, m: (r > 0.55) & (r < 1),
    "square": lambda u, v, r, m: m < 0.8,
    "frame": lambda u, v, r, m: (m > 0.5) & (m < 0.9),
    "triangle": lambda u, v, r, m: (v < 0.7) & (v > 2 * abs(u) - 0.9),
    "cross": lambda u, v, r, m: (np.minimum(abs(u), abs(v)) < 0.25) & (m < 1),
    "saltire": lambda u, v, r, m: (abs(abs(u) - abs(v)) < 0.35) & (m < 0.9),
    "bars": lambda u, v, r, m: (np.sin(8 * v) > 0) & (m < 1),
    "checker": lambda u, v, r, m: (np.sin(5 * u) * np.sin(5 * v) > 0) & (m < 1.1),
    "star": lambda u, v, r, m: r < 0.6 + 0.4 * np.cos(5 * np.arctan2(u, -v)),
    "diamond": lambda u, v, r, m: abs(u) + abs(v) < 1,
    "half": lambda u, v, r, m: (r < 1) & (v > 0),
    "crescent": lambda u, v, r, m: (r < 1) & ((u - 0.5) ** 2 + v ** 2 > 0.6),
    "dots": lambda u, v, r, m: (abs(u) - 0.55) ** 2 + (abs(v) - 0.55) ** 2 < 0.13,
    "ell": lambda u, v, r, m: (m < 0.9) & ((u < -0.3) | (v > 0.3)),
    "hourglass": lambda u, v, r, m: (abs(u) < abs(v)) & (abs(v) < 0.9),
}

def shape_mask(labels, names: list[str], dx, dy, angle) -> np.ndarray:
    """Pixels (n, size, size) of each image's shape; dx, dy: offsets from its centre in radii."""
    u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    mask = np.zeros(u.shape, dtype=bool)
    for k, name in enumerate(names):
        i = labels == k
        mask[i] = SHAPES[name](u[i], v[i], np.hypot(u[i], v[i]), np.maximum(abs(u[i]), abs(v[i])))
    return mask

def draw_scenes(n: int, names: list[str], seed: int | list[int], size: int = 96, most: int = 4,
                radius: tuple[float, float] = (9, 17)) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """n images, uint8 (3, size, size), of 1 to `most` shapes, with their boxes (m, 4), labels (m,).

    radius: smallest and largest, in pixels. Each further shape takes the first of 20 places that is
    clear of those before it, or is left out. Angle, colours, shading of the ground and noise vary.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    yy, xx = np.meshgrid(*2 * [np.linspace(-1, 1, size, dtype=np.float32)], indexing="ij")
    back, wanted = uniform(0, 1, 3, 1, 1), rng.integers(1, most + 1, n)
    images = back + uniform(-0.2, 0.2, 1, 1, 1) * xx + uniform(-0.2, 0.2, 1, 1, 1) * yy
    placed = np.zeros((n, 0, 3), np.float32)             # x, y, radius of what is there, in [-1, 1]
    targets = [{"boxes": [], "labels": []} for _ in range(n)]
    for i in range(most):                                # one more shape in each image at once
        r, labels = uniform(*radius) * 2 / size, rng.integers(len(names), size=n)
        reach = 1.3 * r[:, None, None]                   # corners reach out of the radius
        places = (1 - reach) * uniform(-1, 1, 20, 2)                                # (n, 20, 2)
        gaps = np.linalg.norm(places[:, :, None] - placed[:, None, :, :2], axis=-1)     # (n, 20, i)
        free = (gaps > reach + 1.3 * placed[:, None, :, 2]).all(2)                  # (n, 20)
        there = free.any(1) & (i < wanted)               # else this image gets none
        place = np.where(there[:, None], places[np.arange(n), free.argmax(1)], 9)   # 9: far outside
        placed = np.concatenate([placed, np.column_stack([place, r])[:, None]], 1)
        x, y, r = (v[:, None, None] for v in placed[:, -1].T)
        mask = shape_mask(labels, names, (xx - x) / r, (yy - y) / r, uniform(-0.35, 0.35, 1, 1))
        fore = uniform(0, 1, 3, 1, 1)
        near = abs(fore - back).max(1, keepdims=True) < 0.4              # too near to be seen well
        images = np.where(mask[:, None], np.where(near, (back + 0.5) % 1, fore), images)
        for j in there.nonzero()[0]:                     # tight boxes
            rows, columns = mask[j].any(1).nonzero()[0], mask[j].any(0).nonzero()[0]
            targets[j]["boxes"].append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            targets[j]["labels"].append(labels[j])
    images += rng.standard_normal(images.shape, np.float32) * uniform(0, 0.06, 1, 1, 1)
    images = torch.from_numpy((images.clip(0, 1) * 255).round().astype(np.uint8))
    return [(image, {"boxes": torch.tensor(np.array(target["boxes"])).float(),
                     "labels": torch.tensor(np.array(target["labels"]))})
            for image, target in zip(images, targets)]

def draw_shapes(n: int, names: list[str], seed: int, size: int = 32) -> TensorDataset:
    """n images, uint8 (n, 3, size, size), of one shape each, and labels (n,)."""
    images, targets = zip(*(scene for i in range(0, n, 500) for scene in draw_scenes(
        min(500, n - i), names, [seed, i], size, 1, (0.2 * size, 0.33 * size))))
    return TensorDataset(torch.stack(images), torch.cat([target["labels"] for target in targets]))

BUILT_IN = {   # name: (maker, the files it needs under --data-root)
    "cifar10": (lambda root, split, **kw: datasets.CIFAR10(root, split == "train", **kw),
                "cifar-10-batches-py/"),
    "cifar100": (lambda root, split, **kw: datasets.CIFAR100(root, split == "train", **kw),
                 "cifar-100-python/"),
    "svhn": (datasets.SVHN, "train_32x32.mat and test_32x32.mat"),
    "stl10": (datasets.STL10, "stl10_binary/"),
}

def load_data(dataset: str, split: str, root="data", size=32) -> tuple[Dataset, list[str]]:
    """Split "train" or "test" -> (data of uint8 (3, size, size) images and labels, class names).

    A folder holds train/CLASS/* and test/CLASS/* (or val/). What fits into 2 GiB is decoded once
    and kept in memory. Raises UserError that says what to put where.
    """
    if dataset in ("shapes", "shapes-unseen"):
        names = list(SHAPES)[:10] if dataset == "shapes" else list(SHAPES)[10:]
        n, seed = {"train": (5000, 1), "test": (2000, 2)}[split]
        return draw_shapes(n, names, seed, size), names
    transform = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    maker, files = BUILT_IN.get(dataset, (None, ""))
    remedy = f"without a network, put {files} into {root}/" if files else (
        f"name shapes, {', '.join(BUILT_IN)} or a folder with train/ and test/ (or val/)")
    with explain(f"cannot read data set {dataset!r} ({split}); {remedy}"):
        if maker:
            data = maker(root, split, transform=transform, download=True)
        else:
            folder = Path(dataset, split)
            folder = folder if split == "train" or folder.is_dir() else Path(dataset, "val")
            data = datasets.ImageFolder(str(folder), transform, loader=read_image)
        names = getattr(data, "classes", None) or [str(k) for k in range(10)]       # svhn: digits
        if len(data) * 3 * size * size <= 2 << 30:
            data = TensorDataset(*(torch.cat(part) for part in zip(*batches(data))))
        return data, names

def read_image(path: str):
    """An image file of any kind as RGB; a broken one is named."""
    with explain(f"{path} is no image"):
        return datasets.folder.pil_loader(path)

def load_splits(dataset: str, config: Config) -> tuple[Dataset, Dataset]:
    """Train and test split; UserError where these do not have the same two or more classes."""
    (train, names), (test, others) = (
        load_data(dataset, split, config.data_root, config.image_size)
        for split in ("train", "test"))
    if names != others or len(names) < 2:
        raise UserError(f"{dataset}: train/ and test/ need the same two or more classes")
    return train, test

def read_voc(root: Path, split: str, size: int) -> list[tuple[Tensor, dict]]:
    """PASCAL VOC layout -> images (3, H, W), longer side `size`, with boxes (n, 4) and names.

    Objects marked difficult are left out, boxes are clipped to the image. UserError for a bad file.
    """
    rows = []
    with explain(f"{root} has no VOC layout ({split})"):
        for name in (root / f"ImageSets/Main/{split}.txt").read_text().split():
            tree = ElementTree.parse(root / f"Annotations/{name}.xml")
            objects = [o for o in tree.iter("object") if o.findtext("difficult") != "1"]
            image = read_image(str(root / f"JPEGImages/{name}.jpg"))
            scale = size / max(image.size)               # longer side
            image = image.resize([max(1, round(side * scale)) for side in image.size])
            boxes = torch.tensor([[scale * float(o.findtext(f"bndbox/{side}")) for side in (
                "xmin", "ymin", "xmax", "ymax")] for o in objects]).view(-1, 4)
            boxes = ops.clip_boxes_to_image(boxes, image.size[::-1])
            keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
            names = [o.findtext("name") for o, kept in zip(objects, keep) if kept]
            rows.append((transforms.functional.pil_to_tensor(image),
                         {"boxes": boxes[keep], "names": names}))
    return rows

def load_detection(config: Config) -> tuple[list, list, list[str]]:
    """Train split, test split, categories of --detection-dataset; UserError as `load_data`."""
    if config.detection_dataset == "scenes":
        names = list(SHAPES)[10:]
        return draw_scenes(600, names, 1), draw_scenes(300, names, 2), names
    folder = Path(config.detection_dataset)
    if config.detection_dataset == "voc2007":
        folder = Path(config.data_root, "VOCdevkit/VOC2007")
        with explain(f"cannot fetch VOC 2007; without a network, put VOCdevkit/ into "
                     f"{config.data_root}/"):
            for split in ("trainval", "test"):
                if not (folder / f"ImageSets/Main/{split}.txt").exists():
                    datasets.VOCDetection(config.data_root, "2007", split, download=True)
    train, test = (read_voc(folder, split, config.detection_size) for split in ("trainval", "test"))
    names = sorted({name for _, target in train + test for name in target["names"]})
    if not all(any(target["names"] for _, target in split) for split in (train, test)):
        raise UserError(f"{folder}: trainval or test has no object to find")
    for _, target in train + test:
        target["labels"] = torch.tensor([names.index(name) for name in target["names"]]).long()
    return train, test, names

# ===== 8. Several processes, by torchrun: all hold the same state, each computes its share ========

def world() -> int:
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1

def rank() -> int:
    """Number of this process; 0 writes and reports."""
    return dist.get_rank() if world() > 1 else 0

def agreed(thing):
    """Process 0's value, in all of them; a meeting point, too."""
    box = [thing]                                        # broadcast in place
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]

def join_processes(config: Config) -> None:
    """Join what torchrun started; nothing where there is one process."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if config.synth_batch % n or config.batch_size % n:
        raise UserError(f"--synth-batch and --batch-size must be multiples of the {n} processes")
    if n > 1 and config.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if n > 1:                                            # process 0 may train a teacher first
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo",
                                timeout=timedelta(days=1))

def average_gradients(optimizer: torch.optim.Optimizer, *_) -> None:
    """Before each step: the mean of the gradients over the processes."""
    for group in optimizer.param_groups:
        for gradient in (p.grad for p in group["params"] if p.grad is not None):
            dist.all_reduce(gradient)                    # their sum
            gradient /= world()

def connect(state: State) -> None:
    """Draws are the same in all processes, rows are shared out, losses over pairs see all rows.

    Crops in synthesis are drawn per share: its j-th image is cut alike in each process.
    """
    warnings.filterwarnings("ignore", "torch.distributed.nn", FutureWarning)    # nothing public yet
    state.share = lambda rows: rows.chunk(world())[rank()]               # rows of this process
    state.gather = lambda rows: torch.cat(all_gather(rows.contiguous())) # with gradient
    state.matching.average = lambda x: all_reduce(x) / world()
    for optimizer in (state.generator_optimizer, state.student_optimizer):
        optimizer.register_step_pre_hook(average_gradients)

# ===== 9. Run directory, resume, main =============================================================

class Status:
    """An updating line on a terminal; elsewhere a plain line, at most every ten seconds."""
    last = -math.inf

    def __call__(self, text: str, stay: bool = False) -> None:
        """Process 0's only. stay: a line that is not overwritten."""
        terminal = sys.stdout.isatty()
        if rank() == 0 and (stay or terminal or time.monotonic() - self.last > 10):
            self.last = self.last if stay else time.monotonic()
            cut = shutil.get_terminal_size().columns - 1 if terminal and not stay else None
            print("\r\033[K" * terminal + text[:cut], end="" if cut else "\n", flush=True)

def save_samples(bank: MemoryBank, path: Path, most: int = 100) -> None:
    """Grid of the newest images of the bank, in the order of their categories."""
    newest = torch.arange(bank.pushed - min(len(bank), most), bank.pushed) % len(bank.labels)
    newest = newest[bank.labels.cpu()[newest].argsort()]
    torchvision.utils.save_image(bank.images.cpu()[newest] / 255, path, nrow=10)

def save_detections(scenes: Dataset, found: list[list], path: Path, columns: int = 8) -> None:
    """A row for each network: the first test images with its best guesses, of a score above 0.5."""
    colours, tiles = ("yellow", "red", "cyan", "magenta", "lime", "white", "orange", "blue"), []
    for detections in found:
        for i, (boxes, labels, scores) in zip(range(columns), detections):
            best = ops.nms(boxes, scores, 0.1)           # of all categories
            best = best[scores[best] > 0.5]
            image = torchvision.utils.draw_bounding_boxes(scenes[i][0], boxes[best], colors=[
                colours[k % len(colours)] for k in labels[best].tolist()]) if len(best) else (
                scenes[i][0])
            tiles.append(transforms.functional.resize(image, [192, 192]) / 255)
    torchvision.utils.save_image(torch.stack(tiles), path, nrow=min(columns, len(scenes)))

def fresh_student(config: Config, teacher: Normalized, num_classes: int) -> Normalized:
    """The untrained student of config.seed, with the teacher's normalisation, on its device."""
    torch.manual_seed(config.seed)
    net = build_model(config.student, num_classes, config.image_size)
    return Normalized(net, teacher.mean.cpu(), teacher.std.cpu()).to(config.device)

def load_tasks(config: Config) -> dict[str, tuple]:
    """Data of what frozen features are probed on; read first, so that wrong ones fail first."""
    tasks = {"linear probe": load_splits(config.probe_dataset, config)}
    return tasks | ({"detection": load_detection(config)} if config.detection else {})

def score(networks: dict[str, nn.Module], test: Dataset, tasks: dict[str, tuple], config: Config,
          status: Status) -> dict[str, dict[str, float]]:
    """Top-1 and probes of networks by name, in percent: printed, and for summary.json."""
    seen = {name: predict(network, test, config.device) for name, network in networks.items()}
    result = {"top-1": {name: top1(t, labels) for name, (t, _, labels) in seen.items()},
              "linear probe": {name: linear_probe(net, *tasks["linear probe"], config.device)
                               ["accuracy"] for name, net in networks.items()}}
    sources = {"top-1": f"{len(test)} test images", "linear probe": config.probe_dataset,
               "detection": f"{config.detection_dataset}, AP50"}
    if "detection" in tasks:
        train, scenes, names = tasks["detection"]
        found = {name: detection_probe(network, train, scenes, config.device, names)
                 for name, network in networks.items()}
        result["detection"] = {name: probe["ap50"] for name, probe in found.items()}
        if config.out:
            save_detections(scenes, [probe["detections"] for probe in found.values()],
                            Path(config.out, "detection.png"))
    for title, values in result.items():
        status(f"{title} on {sources[title]}: " + ", ".join(
            f"{name} {value:.2f}" for name, value in values.items()), True)
    if "teacher" in seen:
        agreement = top1(seen["student"][0], seen["teacher"][0].argmax(1))
        result["agreement"] = {"student with teacher": agreement}
    return result

def evaluate_only(config: Config, status: Status) -> None:
    """--eval-only: scores of a saved student.pt, which says what network it is."""
    path, stored = config.eval_only, load_safely(config.eval_only)
    if "arch" not in stored:
        raise UserError(f"{path} does not say its architecture: give a student.pt of this program")
    if config.dataset == "shapes" and stored.get("dataset", "shapes") != "shapes":
        raise UserError(f"{path} was distilled for {stored['dataset']}: give --dataset")
    config = dataclasses.replace(config, image_size=stored.get("image_size", 32), out=None)
    test, names = load_data(config.dataset, "test", config.data_root, config.image_size)
    student = load_teacher(stored["arch"], len(names), path, image_size=config.image_size)
    score({"student": student.to(config.device)}, test, load_tasks(config), config, status)

class Recorder:
    """What a run does around its cycles: clock, log, evaluation, checkpoint."""

    def __init__(self, config: Config, state: State, test: Dataset, status: Status):
        self.config, self.state, self.test, self.status = config, state, test, status
        self.out, self.next_save, kept = Path(config.out), -math.inf, []
        if config.resume:                                # the log is cut to where last.pt is
            saved, new = load_safely(self.out / "last.pt"), state.state_dict()
            if not all(torch.allclose(saved[name], new[name].cpu(), 1e-4)
                       for name in ("teacher_norms", "cend.embeddings")):
                raise UserError("the teacher's file or --prior has changed since this run began")
            state.load_state_dict(saved)
            kept = (self.out / "metrics.jsonl").read_text().splitlines(True)[:state.cycle]
        if rank() == 0:
            save_atomic("".join(kept), self.out / "metrics.jsonl")
            save_atomic(json.dumps(dataclasses.asdict(config), indent=1), self.out / "config.json")
        self.first_cycle, self.start = state.cycle + 1, time.perf_counter()

    def progress(self) -> float:
        """Fraction of the run that is over: of --minutes, by process 0's clock, or of --cycles."""
        if not self.config.minutes:
            return self.state.cycle / self.config.cycles
        seconds = self.state.seconds + time.perf_counter() - self.start
        return agreed(min(1.0, seconds / (60 * self.config.minutes)))

    def __call__(self, state: State, metrics: dict) -> None:
        """After each cycle; what this takes is not counted in state.seconds."""
        over = self.progress()                           # > 0: a cycle is done
        state.seconds += time.perf_counter() - self.start
        for buffer in state.student.buffers() if world() > 1 else ():
            dist.broadcast(buffer, 0)                    # BatchNorm statistics of process 0
        metrics |= {"seconds": state.seconds, "images": state.bank.pushed}
        if state.cycle % self.config.eval_every == 0:
            logits, _, labels = predict(state.student, self.test, self.config.device)
            metrics["accuracy"] = top1(logits, labels)
        if rank() == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
            begin = time.perf_counter()
            if begin > self.next_save:                   # saving takes 2 % of the time at most
                save_atomic(state.state_dict(), self.out / "last.pt")
                self.next_save = time.perf_counter() + 50 * (time.perf_counter() - begin)
        shown = [k for k in ("accuracy", "kd", "variance", "recognised") if k in metrics]
        self.status(f"distilling: {over:.0%}, cycle {state.cycle}, "
                    f"{state.seconds / 60 * (1 / over - 1):.1f} minutes left, "
                    + ", ".join(f"{k} {metrics[k]:.2f}" for k in shown),
                    stay="accuracy" in metrics or state.cycle == self.first_cycle)
        self.start = time.perf_counter()

def choose_directory(config: Config) -> str:
    """--out, which has to be free unless it is resumed; else a new one in runs/."""
    words = dataset_name(config.dataset), config.teacher, config.student, str(config.seed)
    out = Path(config.out or f"runs/{'_'.join(words)}_{datetime.now():%Y%m%d-%H%M%S}")
    leftovers = ("config.json", "metrics.jsonl", "*.tmp")        # of a run killed in its first save
    others = [path for path in out.glob("*") if not any(map(path.match, leftovers))]
    if not config.resume and (others or out.is_file()):
        raise UserError(f"{out} is not empty: --resume the run in it, or take another --out")
    return str(out)

def run(config: Config) -> None:
    """All of it: teacher, distillation with logs and checkpoints, evaluation, summary."""
    status, prior = Status(), None
    if config.eval_only is not None:
        return evaluate_only(config, status)
    if config.prior not in ("teacher", "index"):
        with explain(f"--prior {config.prior} is not teacher, index or a .npy file, (K, E)"):
            prior = torch.from_numpy(np.load(config.prior)).float()
    config.out = agreed(choose_directory(config))        # into config.json, too
    if rank() > 0:                                       # process 0 downloads and trains first
        agreed("process 0 is ready")
    torch.manual_seed(config.seed)                       # of a teacher's weights
    test, names = load_data(config.dataset, "test", config.data_root, config.image_size)
    tasks = load_tasks(config)                           # wrong ones fail before any work
    train = functools.cache(lambda: load_splits(config.dataset, config)[0])         # when needed
    teacher = get_teacher(config, len(names), train, status)
    if rank() == 0:                                      # the others find what it left
        agreed("process 0 is ready")
    begin = time.perf_counter()
    logits, _, labels = predict(teacher, test, config.device)
    accuracy, seconds = top1(logits, labels), time.perf_counter() - begin
    if not (config.minutes or config.resume):            # a step takes two to four forward passes
        synth_steps = config.synth_steps if config.decoupled else config.kd_steps
        images = synth_steps * config.synth_batch + config.kd_steps * config.batch_size
        minutes = 3 * config.cycles * images * seconds / len(test) / 60
        status(f"{config.cycles} cycles will take about {minutes:.0f} minutes on this machine; "
               f"--minutes N ends them after N", True)
    status(f"teacher {config.teacher}: {accuracy:.2f} % on {len(test)} test images" + (
        "; next to nothing: are --mean, --std and the order of the classes its own?"
        if accuracy < 5 + 100 / len(names) else ""), True)
    real = train() if config.real_kd else []
    config.bank_capacity = len(real) or config.bank_capacity
    student = fresh_student(config, teacher, len(names))
    state = State(teacher, student, config, prior)
    for images, labels in batches(real) if real else ():
        state.bank.push(images.to(config.device), labels.to(config.device))
    if world() > 1:
        connect(state)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (student, state.generator)]
    status(f"student {config.student} of {sizes[0]:,} weights, generator of {sizes[1]:,}, "
           f"{config.device} {config.precision}, torch {torch.__version__}, in {config.out}", True)
    recorder = Recorder(config, state, test, status)     # --resume: loads last.pt
    distill(teacher, student, config, None, state, recorder.progress, recorder)
    if rank() == 0:                                      # the last state, not the best
        save_atomic(state.state_dict(), recorder.out / "last.pt")
        save_samples(state.bank, recorder.out / "samples.png")
        save_atomic(export(student, config.student, config), recorder.out / "student.pt")
        networks = {"student": student, "teacher": teacher,
                    "untrained": fresh_student(config, teacher, len(names))}
        images = 0 if config.real_kd else state.bank.pushed
        summary = score(networks, test, tasks, config, status) | {
            "cycles": state.cycle, "seconds": state.seconds, "seed": config.seed, "images": images,
            "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)}}
        save_atomic(json.dumps(summary, indent=1), recorder.out / "summary.json")
        status(f"{images:,} images made, {state.seconds:.0f} s of synthesis and distillation", True)

def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 something to mend (one line says what), 130 Ctrl-C."""
    config = None
    try:
        config = parse_args(argv)                        # no file is written before `run`
        # glibc: fetching zeroed pages from the system anew at each step takes time.
        with contextlib.suppress(OSError, AttributeError, TypeError):    # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)     # M_MMAP_MAX, M_TRIM_THRESHOLD
        torch.backends.cudnn.allow_tf32 = config.precision == "bf16"
        join_processes(config)                           # see section 8
        run(config)
        if world() > 1:
            dist.destroy_process_group()
        return 0
    except SystemExit as stop:                           # --help, or a flag that argparse refuses
        return stop.code                                 # 0 or 2
    except KeyboardInterrupt:
        saved = config and config.out and Path(config.out, "last.pt").exists()
        print("\ninterrupted; " + (f"go on with --resume --out {config.out}" if saved else
                                   "the same command goes on with what was saved"), file=sys.stderr)
        return 130
    except BrokenPipeError:                              # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in (argv or sys.argv):              # the traceback says where
            raise
        known = isinstance(error, (UserError, FloatingPointError))
        hint = "" if known else f" ({type(error).__name__}; --debug shows where)"
        if "allocate" in str(error) or "out of memory" in str(error):
            hint = "; lower a batch size, --bank-capacity or --generator-width"
        over = "\r\033[K" * sys.stderr.isatty()          # replaces the line of `Status`
        print(f"{over}error: {one_line(error)}{hint}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # ends a run as Ctrl-C does
    sys.exit(main())
