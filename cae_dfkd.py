r"""CAE-DFKD in one file: data-free knowledge distillation with category-aware embeddings.

A student learns from a frozen teacher without one real image. Paper: CAE-DFKD, arXiv 2504.21478,
DAC 2025. Of it we had the abstract, a review that quotes eq. 1 and secondary notes, not the full
text; we found no official code. Each equation says what is the paper's (stated there), what is
prior work and what is our choice ([choice N] at the line, see below). Equation numbers are ours.

    python cae_dfkd.py                                         # embedded data, minutes on a laptop
    python cae_dfkd.py --teacher resnet34 --dataset cifar10    # finds or trains the teacher first
    python cae_dfkd.py --eval-only runs/NAME/student.pt        # score a saved student
    python cae_dfkd.py --benchmark                             # what a step costs, and its floor
    torchrun --nproc-per-node=2 cae_dfkd.py                    # several processes or GPUs

Every category has an embedding e_y. CEND diffuses it with noise from several sources, a light
generator turns the result into images. Phase A (synthesis) shapes the images by the teacher's
logits, its BatchNorm statistics and the student's disagreement, and fills a memory bank. Phase B
(distillation) trains the student on the bank. The phases share no graph.

Notation   B batch, K categories, D width of a network's embedding, E width of a category embedding
           e (K, E) category embeddings   ê (B, E) diffused   x̂ (B, 3, H, W) image in [0, 1]
           t, s (B, K) teacher, student logits   f (B, D) penultimate embedding   h: f_S to f_T
eq  what                               where                            source
 1  ê = e_y + M_n ⊙ q_n                CEND                             paper
 2  x̂ = G(ê)                           Generator                        prior work (DAFL, NAYER)
 3  L_CE, category consistency         category_consistency_loss        paper
 4  L_FM, feature matching             FeatureMatching                  paper; form of DeepInversion
 5  L_adv, adversarial                 adversarial_loss                 paper; form of NAYER
 6  L_G = L_CE + λ L_FM + λ L_adv      generator_objective              paper; weights are ours
 7  L_KD, knowledge distillation       kd_loss                          paper; form of Hinton et al.
 8  L_CAE, category-aware embedding    category_aware_embedding_loss    our choice; form of InfoNCE
 9  L_CNCL, contrastive                contrastive_loss                 paper: pairs; form of SupCon
10  L_S = L_KD + λ L_CAE + λ L_CNCL    student_objective                paper: KD + CNCL; rest ours

Our choices, where these sources are silent or we depart from them:
[choice 1]  category embeddings: rows of the teacher's classifier (the paper: a language model's),
            centred and scaled
[choice 2]  noise families: Gaussian, uniform, Laplace, Rademacher; one source is drawn per row
[choice 3]  generator: linear seed, nearest upsampling, 3x3 convolutions whose channels halve
[choice 4]  feature matching is the mean over BatchNorm layers: one weight serves every depth
[choice 5]  eq. 8: a cosine softmax over f_T of the batch, where each image is its own category
[choice 6]  one linear projection h serves eq. 8 and eq. 9
[choice 7]  a noise draw is held for a round; seed layer and Adam start anew (as in NAYER)
[choice 8]  the bank gets the images of a round's step with the lowest eq. 6 (as in NAYER)
[choice 9]  bank images are drawn with replacement, then cropped and flipped, the same for T and S
            (the notes: the paper does not augment the images of CNCL)
[choice 10] coupled training (an ablation): a generator step and a student step per fresh batch
[choice 11] the bank is first-in first-out, and a few rounds fill it before the first student step
[choice 12] every weight, temperature and size in `Config`, the optimisers and their schedule
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock


class UserError(ValueError):
    """Something the user can mend: `main` prints its one line and exits with code 2."""


# ===== 1. Config: the one place where defaults live; the command line is made from it =============

def opt(default, group: str, text: str, **kw):
    """A dataclass field with its help text, its argparse group and further argparse keywords."""
    return field(default=default, metadata={"group": group, "help": text, **kw})


@dataclass
class Config:
    """Every setting of a run. The defaults are the CPU recipe; see `PRESETS`.        [choice 12]"""
    dataset: str = opt("shapes", "run", "shapes, cifar10, cifar100, svhn, stl10, or a folder with "
                                        "train/ and test/ (or val/) of one sub-folder per class")
    data_root: str = opt("data", "run", "where downloaded data sets are kept")
    image_size: int = opt(32, "run", "pixels; images of another size are resized",
                          range=(8, 1024))
    preset: str = opt("auto", "run", "recipe, other defaults than printed here; auto: shapes for "
                                     "shapes, else gpu on cuda, else cpu",
                      choices=("auto", "shapes", "cpu", "gpu"))
    cycles: int = opt(150, "run", "cycles of synthesis and distillation")
    minutes: float | None = opt(None, "run", "time for both phases, in place of --cycles")
    benchmark: bool = opt(False, "run", "time the steps of this run against their floors and stop")
    seed: int = opt(0, "run", "seed of everything random", range=(0, 2**63 - 1))
    device: str = opt("auto", "run", "where to compute", choices=("auto", "cuda", "mps", "cpu"))
    precision: str = opt("auto", "run", "networks in fp32 or bf16; auto asks the hardware",
                         choices=("auto", "fp32", "bf16"))
    deterministic: bool = opt(False, "run", "only kernels that repeat bit for bit; a CPU's do")
    compile: bool = opt(False, "run", "torch.compile both steps (slower on the CPUs tried)")
    out: str | None = opt(None, "run", "run directory; else runs/DATASET_TEACHER_STUDENT_SEED")
    overwrite: bool = opt(False, "run", "replace the run that is in the run directory")
    resume: bool = opt(False, "run", "go on from last.pt in the run directory")
    eval_only: str | None = opt(None, "run", "score this student.pt and stop")
    eval_every: int = opt(25, "run", "cycles between evaluations on the test split")
    probe_dataset: str | None = opt(None, "run", "data set of the linear probe, as --dataset")

    teacher: str = opt("resnet20", "networks", "teacher architecture")
    teacher_ckpt: str | None = opt(None, "networks", "teacher weights; else found or trained")
    teacher_epochs: int = opt(60, "networks", "epochs of a teacher that has to be trained")
    student: str | None = opt(None, "networks", "student architecture; else a smaller relative")
    mean: tuple[float, ...] | None = opt(None, "networks", "the teacher's input mean", nargs=3,
                                           range=(-1e3, 1e3))
    std: tuple[float, ...] | None = opt(None, "networks", "the teacher's input deviation", nargs=3,
                                          range=(1e-6, 1e3))

    # Beside a number: what another one did to the accuracy, in points, after 4 to 6 minutes on
    # CIFAR-10, ResNet-20 -> ResNet-8, most of them with the recipe of that day and one seed, where
    # 2 is noise (.github/experiments.md); the README has the ablations, with three.
    prior: str = opt("teacher", "synthesis", "category embeddings: teacher (classifier rows), "
                                             "index (one-hot), or a (K, E) array, .npy or .pt")
    cend: bool = opt(True, "synthesis", "diffuse category embeddings; without, plain noise goes in")
    magnitudes: tuple[float, ...] = opt((1.0,) * 4, "synthesis", "of each noise source", nargs="+",
                                           range=(0, 1e3))               # 2: -2
    generator_width: int = opt(64, "synthesis", "channels of its seed; 128 is heavy",
                               range=(8, 4096))                          # 32: -2, 128: -4
    decoupled: bool = opt(True, "synthesis", "generator and student train in separate phases")
    synth_batch: int = opt(128, "synthesis", "images of a round", range=(2, 1e9))
    synth_steps: int = opt(12, "synthesis", "generator steps of a round")    # 8: -5
    generator_lr: float = opt(4e-3, "synthesis", "Adam step of the generator")   # as NAYER
    lambda_fm: float = opt(19.0, "synthesis", "weight of feature matching, eq. 4")   # 8: -1
    lambda_adv: float = opt(1.0, "synthesis", "weight of the adversarial term, eq. 5")   # 0: -5..0
    bank_capacity: int = opt(20_000, "synthesis", "images the memory bank keeps, the newest")
    warmup_rounds: int = opt(4, "synthesis", "further rounds before the first student step",
                             range=(0, 1e9))

    kd_steps: int = opt(40, "distillation", "student steps of a cycle")      # 25: -1, 80: -4
    batch_size: int = opt(128, "distillation", "images of a student step",   # 75 steps of 64: -2
                          range=(2, 1e9))
    student_lr: float = opt(0.2, "distillation", "SGD step of the student, annealed by a "
                                                 "cosine")                   # 0.1: -5, 0.4: -3
    lr_warmup: int = opt(5, "distillation", "cycles in which the step grows to --student-lr; 1: "
                                            "at once")   # 1: 0, ResNet-20 student mid-run -41
    weight_decay: float = opt(1e-4, "distillation", "weight decay of the student",   # as NAYER
                              range=(0, 1))
    kd_temperature: float = opt(20.0, "distillation", "temperature of eq. 7")    # 4: -2
    real_kd: bool = opt(False, "distillation", "for comparison, not data-free: the training "
                                               "images, with their labels, are the bank")
    lambda_cae: float = opt(4.0, "distillation", "weight of the category-aware loss, "
                                                 "eq. 8")                    # 0: -4, 10: 0
    lambda_cncl: float = opt(0.1, "distillation", "weight of the contrastive term, eq. 9")  # 0: 0
    embedding_temperature: float = opt(0.1, "distillation", "temperature of eq. 8 and eq. 9")


# What differs from the defaults. Tried: cpu (ResNet-20 -> ResNet-20 and ResNet-8, ResNet-56 ->
# ResNet-8, on CIFAR-10; 10 classes of photographs) and shapes. Not tried: gpu, which takes the
# sizes of the literature.
PRESETS: dict[str, dict] = {
    "cpu": {},
    # Runs of 100 s gave 65 to 85 % with the adversarial term, 81 to 84 % without it.
    "shapes": dict(teacher_epochs=8, cycles=32, kd_steps=50, lambda_fm=10.0, lambda_adv=0.0,
                   student_lr=0.1),
    "gpu": dict(generator_width=128, synth_batch=400, synth_steps=30, batch_size=512, kd_steps=400,
                bank_capacity=100_000, teacher_epochs=200, eval_every=5),
}
STUDENTS = {"resnet34": "resnet18", "resnet50": "resnet18", "vgg11": "resnet18",
            "wrn40_2": "wrn16_2", "wrn40_1": "wrn16_1"}                  # every other: resnet8
MAY_CHANGE_ON_RESUME = {"resume", "out", "device", "data_root", "overwrite", "eval_every",
                        "probe_dataset"}


class OneLineParser(argparse.ArgumentParser):
    """Wrong flags end like all wrong input, without a page of usage."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


def parse_args(argv: list[str] | None) -> tuple[Config, set[str]]:
    """Command line -> (settings, names of those given). Needs no network, data or device."""
    parser = OneLineParser(description="CAE-DFKD: data-free knowledge distillation.",
                           argument_default=argparse.SUPPRESS)
    groups = {name: parser.add_argument_group(name) for name in (
        "run", "networks", "synthesis", "distillation")}
    for f in dataclasses.fields(Config):                 # f.type is the annotation's text
        kw = {k: v for k, v in f.metadata.items() if k not in ("group", "range")}
        kw["help"] += f" (default: {f.default})"
        if f.type == "bool":
            kw["action"] = argparse.BooleanOptionalAction
        else:
            kw["type"] = float if "float" in f.type else int if f.type == "int" else str
        groups[f.metadata["group"]].add_argument("--" + f.name.replace("_", "-"), **kw)
    given = {k: tuple(v) if isinstance(v, list) else v
             for k, v in vars(parser.parse_args(argv)).items()}
    config = Config(**given)
    config.device = pick_device(config.device)
    if config.preset == "auto":
        config.preset = "gpu" if config.device == "cuda" else "cpu"
        config.preset = "shapes" if config.dataset == "shapes" else config.preset
    for name in PRESETS[config.preset].keys() - given.keys():
        setattr(config, name, PRESETS[config.preset][name])
    check(config)
    config.student = config.student or STUDENTS.get(config.teacher, "resnet8")
    if config.dataset == "shapes":
        config.probe_dataset = config.probe_dataset or "shapes-unseen"
    config.out = config.out or "_".join(
        ("runs/" + dataset_name(config.dataset), config.teacher, config.student, str(config.seed)))
    return config, set(given)


def check(config: Config) -> None:
    """Raise UserError, which names the flag, for a setting of a wrong type or out of its range."""
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        if value is None and f.default is None:
            continue
        kind, flag = f.type.split("[")[0].split(" ")[0], "--" + f.name.replace("_", "-")
        kinds = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple": tuple}[kind]
        length = {3: (3,), "+": range(1, 65)}.get(f.metadata.get("nargs"))
        if (not isinstance(value, kinds) or isinstance(value, bool) and kind != "bool"
                or value == "" or length and len(value) not in length):
            raise UserError(f"{flag} {value!r} should be a {kind}")
        if value not in f.metadata.get("choices", [value]):
            raise UserError(f"{flag} {value!r} should be one of {f.metadata['choices']}")
        if kind in ("int", "float", "tuple"):
            least = 0 if f.name.startswith("lambda") else 1 if kind == "int" else 1e-9
            low, high = f.metadata.get("range", (least, 1e9))
            for number in value if kind == "tuple" else [value]:
                if not (isinstance(number, (int, float)) and low <= number <= high):
                    raise UserError(f"{flag} {number} is out of range, {low:g} to {high:g}")
    if not config.decoupled and (config.real_kd or not config.cend):
        raise UserError("--no-decoupled goes neither with --no-cend, where no category would reach "
                        "the generator, nor with --real-kd")


def pick_device(name: str) -> str:
    """auto -> cuda, mps or cpu, the first that is there; UserError for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if not there.get(name, True):
        raise UserError(f"--device {name}: this machine has none")
    return next(k for k in there if there[k]) if name == "auto" else name


def pick_precision(name: str, device: str) -> str:
    """auto -> bf16 where the hardware multiplies in it, and is faster for it; else fp32."""
    fast = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": bool,
            "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}
    return ("bf16" if fast[device]() else "fp32") if name == "auto" else name


def set_numerics(config: Config) -> None:
    """Precision of this run: bf16 networks, on a GPU with TF32 for the rest, or all in float32."""
    config.precision = pick_precision(config.precision, config.device)
    if config.device == "cuda":
        torch.backends.cudnn.allow_tf32 = config.precision == "bf16"
        torch.set_float32_matmul_precision("high" if config.precision == "bf16" else "highest")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # before CUDA begins
    torch.use_deterministic_algorithms(config.deterministic)


def keep_freed_memory() -> None:
    """glibc: keep freed blocks instead of fetching zeroed pages from the system for each step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):        # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                                   # M_MMAP_MAX
        mallopt(-1, 2 ** 31 - 1)                                         # M_TRIM_THRESHOLD


# ===== 2. Data: only to train a missing teacher and to evaluate; `distill` sees none of it ========

# Shapes in local coordinates: u right, v down, r radius, m = max(|u|, |v|). The first ten make up
# the embedded data set, the others are the unseen categories of its linear probe.
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


def draw_shapes(n: int, names: list[str], seed: int, size: int = 32) -> TensorDataset:
    """n images, uint8 (n, 3, size, size), and labels. Place, size, angle, colours, noise vary."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(names))

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    x, y, angle = (uniform(-0.35, 0.35, 1, 1) for _ in range(3))
    scale = uniform(0.4, 0.65, 1, 1)
    yy, xx = np.meshgrid(*2 * [np.linspace(-1, 1, size, dtype=np.float32)], indexing="ij")
    dx, dy = (xx - x) / scale, (yy - y) / scale                          # (n, size, size)
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = dy * np.cos(angle) - dx * np.sin(angle)
    mask = np.zeros(u.shape, dtype=bool)
    for k, name in enumerate(names):
        i = labels == k
        mask[i] = SHAPES[name](u[i], v[i], np.hypot(u[i], v[i]), np.maximum(abs(u[i]), abs(v[i])))
    back, fore = uniform(0, 1, 3, 1, 1), uniform(0, 1, 3, 1, 1)
    faint = abs(fore - back).max(1, keepdims=True) < 0.4
    fore = np.where(faint, (back + 0.5) % 1, fore)
    shade = uniform(-0.2, 0.2, 1, 1, 1) * xx + uniform(-0.2, 0.2, 1, 1, 1) * yy
    noise = rng.standard_normal((n, 3, size, size), np.float32) * uniform(0, 0.06, 1, 1, 1)
    images = (np.where(mask[:, None], fore, back + shade) + noise).clip(0, 1)
    return TensorDataset(torch.from_numpy((images * 255).round().astype(np.uint8)),
                         torch.from_numpy(labels))


BUILT_IN = {   # name: (class in torchvision.datasets, its files under --data-root, (mean, std))
    "cifar10": ("CIFAR10", "cifar-10-batches-py/",
                ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    "cifar100": ("CIFAR100", "cifar-100-python/",
                 ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))),
    "svhn": ("SVHN", "train_32x32.mat and test_32x32.mat",
             ((0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971))),
    "stl10": ("STL10", "stl10_binary/", ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))),
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dataset_name(dataset: str) -> str:
    """A name for files; folders of one name are told apart by a checksum of their place."""
    if dataset in (*BUILT_IN, "shapes", "shapes-unseen"):
        return dataset
    place = Path(dataset).resolve()
    return f"{place.name}-{zlib.crc32(os.fsencode(place)):08x}"


def load_data(dataset: str, split: str, root="data", size=32) -> tuple[Dataset, list[str]]:
    """Split "train" or "test" -> (data of uint8 (3, size, size) images and labels, class names).

    dataset: as in `Config`. What fits into 2 GiB is decoded once and kept in memory.
    Raises UserError in one line.
    """
    if dataset in ("shapes", "shapes-unseen"):
        names = list(SHAPES)[:10] if dataset == "shapes" else list(SHAPES)[10:]
        n, seed = {"train": (5000, 1), "test": (2000, 2)}[split]
        return draw_shapes(n, names, seed, size), names
    transform = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    help_line = f"name shapes, {', '.join(BUILT_IN)} or a folder with train/ and test/ (or val/)"
    try:
        if dataset in BUILT_IN:
            kind, files, _ = BUILT_IN[dataset]
            help_line = f"without a network, put {files} into {root}/"
            which = {"train": split == "train"} if "cifar" in dataset else {"split": split}
            data = getattr(torchvision.datasets, kind)(
                root, **which, transform=transform, download=True)
        else:
            folder = Path(dataset, split)
            if split == "test" and not folder.is_dir():
                folder = Path(dataset, "val")
            data = torchvision.datasets.ImageFolder(str(folder), transform, loader=read_image)
        classes = getattr(data, "classes", None) or [str(k) for k in range(10)]
        if len(data) * 3 * size * size <= 2 << 30:
            batches = list(DataLoader(data, batch_size=256))
            data = TensorDataset(*(torch.cat(part) for part in zip(*batches)))
    except (OSError, RuntimeError, ImportError) as error:
        if isinstance(error, ImportError):
            help_line = "torchvision reads svhn with scipy: pip install scipy"
        raise UserError(f"cannot read data set {dataset!r} ({split}): {first_line(error)}; "
                        f"{help_line}") from error
    if len(classes) < 2:
        raise UserError(f"{dataset!r} ({split}) has one class only; two are needed to tell apart")
    return data, classes


def read_image(path: str) -> Image.Image:
    """An image file of any kind as RGB; a broken one is named."""
    try:
        with Image.open(path) as image:
            if max(image.size) > 100 * min(image.size):  # would be resized to a huge one
                raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path}: {first_line(error)}; remove or replace it"
                        ) from error


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def to_float(images: Tensor, device: str | torch.device) -> Tensor:
    """uint8 (or float) images -> float32 in [0, 1] on the device, channels last."""
    images = images.to(device, non_blocking=True)
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return images.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, pad: int = 4) -> Tensor:
    """Random crop after reflection padding, and flip, drawn per image: (B, 3, H, W) -> same."""
    (b, _, h, w), device = images.shape, images.device

    def reflect(i: Tensor, n: int) -> Tensor:            # pixel outside 0..n-1 -> its mirror image
        return n - 1 - (n - 1 - i.abs()).abs()

    top, left = torch.randint(-pad, pad + 1, (2, b, 1), device=device)
    columns = torch.arange(w, device=device)
    columns = torch.where(torch.rand(b, 1, device=device) < 0.5, w - 1 - columns, columns)
    rows = reflect(top + torch.arange(h, device=device), h)[:, :, None]                 # (B, H, 1)
    columns = reflect(left + columns, w)[:, None, :]                                    # (B, 1, W)
    image = torch.arange(b, device=device)[:, None, None]
    where = (image * h + rows) * w + columns                                         # (B, H, W)
    pixels = images.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, where.flatten())
    return pixels.view(b, h, w, -1).permute(0, 3, 1, 2)


# ===== 3. Networks and teacher loading ============================================================

class ShortcutA(nn.Module):
    """Shortcut "option A" of He et al.: every second pixel, missing channels are zero."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.stride, self.pad = stride, (out - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        # A pooling of one pixel: plain slices have a gradient that is not channels last.
        return F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, self.pad, self.pad))


def stage(block: Callable, width: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    """A stage of a residual network: the first block changes width and resolution."""
    rest = [block(out, out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(width, out, stride), *rest)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) of He et al. for CIFAR: 16, 32, 64 channels; x (B, 3, H, W) -> (B, K).

    projection: 1x1 convolutions as shortcuts, the variant of some public checkpoints.
    """

    def __init__(self, n: int, num_classes: int, projection: bool = False):
        super().__init__()

        def block(width: int, out: int, stride: int) -> BasicBlock:
            if width == out:
                return BasicBlock(width, out)
            return BasicBlock(width, out, stride, nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                if projection else ShortcutA(width, out, stride))

        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = stage(block, 16, 16, n, 1)
        self.layer2, self.layer3 = stage(block, 16, 32, n, 2), stage(block, 32, 64, n, 2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActBlock(nn.Module):
    """Pre-activation block of wide ResNets, with the parameter names of the public checkpoints."""

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


class WideResNet(nn.Module):
    """WRN-depth-k of Zagoruyko and Komodakis; x (B, 3, H, W) -> (B, K)."""

    def __init__(self, depth: int, k: int, num_classes: int):
        super().__init__()
        self.conv1, width, n = nn.Conv2d(3, 16, 3, padding=1, bias=False), 16, (depth - 4) // 6
        for i, out in enumerate((16 * k, 32 * k, 64 * k), 1):
            layer = stage(PreActBlock, width, out, n, 1 if i == 1 else 2)
            setattr(self, f"block{i}", nn.Sequential(OrderedDict(layer=layer)))
            width = out
        self.bn1, self.fc = nn.BatchNorm2d(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class CifarVGG(nn.Module):
    """VGG-11 with BatchNorm in the five-block CIFAR layout; x (B, 3, H, W) -> (B, K)."""

    def __init__(self, num_classes: int):
        super().__init__()
        width = 3
        for i, outs in enumerate(((64,), (128,), (256, 256), (512, 512), (512, 512))):
            layers = []
            for out in outs:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
                width = out
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))      # last ReLU: in forward
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        pools = 3 if x.shape[-1] < 64 else 4                             # as the public code does
        for i in range(5):
            x = F.relu(getattr(self, f"block{i}")(x))
            x = F.max_pool2d(x, 2) if i < pools else x
        return self.classifier(x.mean((2, 3)))


class Normalize(nn.Module):
    """Images in [0, 1] -> what the network was trained on. No part of the state dict."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean).float().view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).float().view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


ARCHITECTURES = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet18", "resnet34",
                 "resnet50", "wrn16_1", "wrn16_2", "wrn40_1", "wrn40_2", "vgg11")


def build_model(arch: str, num_classes: int, image_size=32, projection=False) -> nn.Module:
    """An untrained network by its literature name; raises UserError that lists the known ones.

    resnet18/34/50 are torchvision's; below 128 pixels with a 3x3 stem and no first pooling.
    """
    if arch not in ARCHITECTURES:
        raise UserError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if arch == "vgg11":
        return CifarVGG(num_classes)
    if arch.startswith("wrn"):
        return WideResNet(*map(int, arch[3:].split("_")), num_classes)
    if arch not in ("resnet18", "resnet34", "resnet50"):
        return CifarResNet((int(arch[6:]) - 2) // 6, num_classes, projection)
    model = getattr(torchvision.models, arch)(num_classes=num_classes)
    if image_size < 128:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def with_normalisation(net: nn.Module, mean, std) -> nn.Sequential:
    """Network that takes images in [0, 1]; convolutions run channels last."""
    model = nn.Sequential(OrderedDict(normalize=Normalize(mean, std), net=net))
    return model.to(memory_format=torch.channels_last)


def load_safely(path: str | Path):
    """torch.load of tensors and plain types only: nothing in the file is ever executed."""
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}")
    try:
        if zipfile.is_zipfile(path):                     # torch stores tensors as they are
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > 2 * os.path.getsize(path):
                raise UserError(f"{path} would expand to {size:,} bytes; save it anew")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:                           # whatever a broken or hostile file raises
        raise UserError(f"{path} is damaged, or no file of plain tensors; of a pickled module save "
                        f"the state_dict()") from error


def read_checkpoint(path: str) -> dict:
    """A weights file -> {"state_dict": tensors by name, more}; a bare state dict will do."""
    stored = load_safely(path)
    if not (isinstance(stored, dict) and "state_dict" in stored):
        stored = {"state_dict": stored}
    state = stored["state_dict"]
    if not (isinstance(state, dict) and state
            and all(isinstance(k, str) and is_plain(v) for k, v in state.items())):
        raise UserError(f"{path} holds no state dict of plain tensors")
    for key, value in state.items():
        if not value.float().isfinite().all():
            raise UserError(f"{path}: {key} is not finite; this network is broken")
    for key in ("mean", "std"):
        row = stored.get(key, (1.0,) * 3)
        if not (isinstance(row, (list, tuple)) and len(row) == 3 and all(
                isinstance(v, (int, float)) and -1e3 <= v <= 1e3 and (v > 1e-6 or key == "mean")
                for v in row)):
            raise UserError(f"{path}: its {key} should be three numbers")
    return stored


def is_plain(value) -> bool:
    """A dense tensor whose numbers are all there: an expanded one could fill the memory."""
    return (isinstance(value, Tensor) and value.layout == torch.strided
            and not (value.is_quantized or value.is_complex() or value.is_meta)
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def load_teacher(arch: str, num_classes: int, path: str, mean=None, std=None, image_size=32
                 ) -> nn.Sequential:
    """A public checkpoint -> frozen network in eval mode that takes images in [0, 1].

    Strips `module.`, maps head names linear / fc / classifier and shortcut / downsample, then loads
    strictly. Normalisation: the arguments, else what the file stores, else none.
    Raises UserError with the first missing and unexpected key, or with the two shapes that differ.
    """
    stored = read_checkpoint(path)
    state, head = {}, "classifier" if arch == "vgg11" else "fc"
    for key, value in stored["state_dict"].items():
        key = key.removeprefix("module.").replace(".shortcut.", ".downsample.")
        first, _, rest = key.partition(".")
        state[f"{head}.{rest}" if first in ("linear", "fc", "classifier") else key] = value
    net = build_model(arch, num_classes, image_size, any(".downsample." in k for k in state))
    want = net.state_dict()
    missing = [k for k in want if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in want]
    if missing or extra:
        raise UserError(f"{path} is no {arch}: missing {missing[:1]}, unexpected {extra[:1]}")
    for k, v in state.items():
        if v.shape != want[k].shape:
            raise UserError(f"{path} does not fit {arch} with {num_classes} classes: {k} is "
                            f"{tuple(v.shape)} there, {tuple(want[k].shape)} here")
    net.load_state_dict(state)
    mean, std = mean or stored.get("mean") or (0, 0, 0), std or stored.get("std") or (1, 1, 1)
    return with_normalisation(net, mean, std).eval().requires_grad_(False)


def last_linear(model: nn.Module) -> nn.Linear:
    """The classifier head of a network; raises UserError if it has none."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise UserError("the network has no nn.Linear, so no classifier head and no embedding")
    return linears[-1]


class Embedding:
    """`with Embedding(model) as f: model(x); f.value` (B, D): what entered its last nn.Linear."""

    def __init__(self, model: nn.Module):
        self.classifier = last_linear(model)

    def __enter__(self) -> Embedding:
        self.hook = self.classifier.register_forward_pre_hook(self.keep)
        return self

    def __exit__(self, *error) -> None:
        self.hook.remove()

    def keep(self, classifier: nn.Module, args: tuple) -> None:
        self.value = args[0]


def forward_with_embedding(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(logits (B, K), embedding f (B, D)): f is what enters the network's last nn.Linear."""
    with Embedding(model) as f:
        return model(x), f.value


def train_classifier(model: nn.Module, data: Dataset, config: Config, status: Callable) -> None:
    """Supervised training of a teacher that does not exist yet: SGD, one-cycle, crop and flip."""
    loader = DataLoader(data, batch_size=128, shuffle=True, drop_last=len(data) > 128)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    steps = config.teacher_epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for epoch in range(config.teacher_epochs):
        for images, labels in loader:
            images = augment(to_float(images, config.device))
            with autocast(images, config):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels.to(config.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        status(f"training the teacher: epoch {epoch + 1} of {config.teacher_epochs}, "
               f"loss {loss.item():.3f}")
    model.eval()


# ===== 4. CEND and generator. Here the method begins: no files, data sets, logs, arguments ========

def category_prior(embeddings: Tensor) -> Tensor:
    """Raw category embeddings (K, E) -> centred, scaled by one number.                [choice 1]

    Language embeddings of class names are almost parallel, so they are centred. They span r =
    min(K-1, E) directions and get a mean squared length of r: noise of magnitude 1 is as strong as
    the category, on average over these directions, whatever E is.
    """
    e = embeddings.float() - embeddings.float().mean(0)
    r = min(len(e) - 1, e.shape[1])
    return e * math.sqrt(r) / e.square().sum(1).mean().sqrt().clamp_min(1e-12)


NOISE_SOURCES: tuple[Callable[[Tensor], Tensor], ...] = (   # zero mean, unit variance   [choice 2]
    torch.randn_like,                                       # Gaussian
    lambda x: (2 * torch.rand_like(x) - 1) * math.sqrt(3),  # uniform
    lambda x: torch.distributions.Laplace(
        torch.zeros_like(x), math.sqrt(0.5), validate_args=False).sample(),             # Laplace
    lambda x: 2.0 * torch.randint_like(x, 2) - 1,           # Rademacher
)


class CEND(nn.Module):
    """Category embedding noise diffusion, eq. 1 (paper; how n is drawn is ours, choice 2).

    ê = e_y + M_n ⊙ q_n, n ~ U{1..N}, q_n ~ NS_n

    category_embeddings (K, E); magnitudes: M_n of the N sources. Beyond four the families repeat.
    """

    def __init__(self, category_embeddings: Tensor, magnitudes=(1.0, 1.0, 1.0, 1.0)):
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
    """Lightweight generator, eq. 2: x̂ = G(ê), (B, E) -> (B, 3, S, S) in [0, 1].       [choice 3]

    A linear layer makes a seed of `width` channels and at most 8 pixels; each stage doubles the
    pixels and convolves; from the second stage on channels halve, down to 8. Width 64 is light, 128
    heavy. Raises UserError where S is no such seed doubled.
    """

    def __init__(self, embedding_dim: int, image_size: int = 32, width: int = 64):
        super().__init__()
        stages = max(1, math.ceil(math.log2(image_size / 8)))
        seed = image_size >> stages
        if seed << stages != image_size:
            raise UserError(f"image size {image_size} is not {seed} doubled {stages} times; "
                            f"use 32, 64, 128 or 224")
        self.project = nn.Linear(embedding_dim, width * seed * seed)
        layers = [nn.Unflatten(1, (width, seed, seed)), nn.BatchNorm2d(width)]
        for i in range(stages):
            before, width = width, width if i == 0 else max(width // 2, 8)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, 1, 1, bias=False),
                       nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.decode = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Sigmoid())

    def forward(self, e_hat: Tensor) -> Tensor:
        return self.decode(self.project(e_hat))


class MemoryBank:
    """First-in first-out store of uint8 images (capacity, 3, S, S) and labels.     [choice 11]

    sources are the noise sources of the images, for the caller; no loss reads them.
    """

    def __init__(self, capacity: int, image_size: int, device: str | torch.device = "cpu"):
        shape = (capacity, image_size, image_size, 3)                    # channels last
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        self.labels = torch.zeros(capacity, dtype=torch.long, device=device)
        self.sources = torch.zeros(capacity, dtype=torch.long, device=device)
        self.pushed = 0                                                  # images ever pushed

    def __len__(self) -> int:
        return min(self.pushed, len(self.labels))

    def push(self, images: Tensor, labels: Tensor, sources: Tensor) -> None:
        """images (B, 3, S, S), uint8 or float in [0, 1]; labels, sources (B,). The oldest go."""
        if images.is_floating_point():
            images = (images * 255).round().to(torch.uint8)
        capacity, first = len(self.labels), max(0, len(labels) - len(self.labels))
        where = torch.arange(first, len(labels), device=self.labels.device) + self.pushed
        for store, new in ((self.images, images), (self.labels, labels), (self.sources, sources)):
            store[where % capacity] = new[first:]
        self.pushed += len(labels)

    def sample(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """images (batch, 3, S, S) float32 in [0, 1], labels, sources (batch,); with replacement."""
        i = torch.randint(len(self), (batch,), device=self.labels.device)
        images = self.images.permute(0, 2, 3, 1).index_select(0, i).permute(0, 3, 1, 2)
        return to_float(images, images.device), self.labels[i], self.sources[i]


# ===== 5. Losses: pure functions, tensors in, scalar out ==========================================

def full(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 stay: losses never compute in half."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def category_consistency_loss(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 3 (paper): L_CE = CE(t(x̂), y), batch mean. (B, K), (B,) -> scalar >= 0."""
    return F.cross_entropy(full(teacher_logits), labels)


class BatchStatistics(torch.autograd.Function):
    """Mean and biased variance over (B, H, W), by the BatchNorm kernel: x (B, C, H, W) -> (C,) x 2.

    The backward is one affine map of x. On a CPU `torch.var_mean` over three axes takes ten times
    as long as this forward.
    """

    @staticmethod
    def forward(ctx, x):
        if x.device.type in ("cpu", "cuda"):
            dtype = torch.promote_types(x.dtype, torch.float32)
            running = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)   # makes it float32
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


def statistics_distance(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
                        ) -> Tensor:
    """One layer of eq. 4: ‖μ(x̂) - μ‖₂ + ‖σ²(x̂) - σ²‖₂. (C,) each -> scalar >= 0."""
    norm = torch.linalg.vector_norm
    return norm(mean - running_mean) + norm(var - running_var)


class FeatureMatching:
    """Teacher-guided feature distribution matching, eq. 4 (paper; form of DeepInversion).

    L_FM = mean over BatchNorm layers l of ‖μ_l(x̂) - μ_l‖₂ + ‖σ²_l(x̂) - σ²_l‖₂        [choice 4]

        with FeatureMatching(teacher) as fm:
            logits = teacher(images)
        loss = fm.loss()

    Hooks live only inside the `with`. Without BatchNorm in the teacher the loss is 0. average:
    where a batch is spread over processes, a differentiable mean over them, any shape -> same.
    """

    def __init__(self, teacher: nn.Module, average: Callable[[Tensor], Tensor] | None = None):
        self.average, self.seen = average, {}
        self.layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self) -> FeatureMatching:
        self.hooks = [layer.register_forward_pre_hook(self.measure) for layer in self.layers]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()

    def measure(self, layer: nn.BatchNorm2d, args: tuple) -> None:
        self.seen[layer] = BatchStatistics.apply(args[0])

    def loss(self) -> Tensor:
        """Scalar >= 0 of the last forward, differentiable to the images."""
        if not self.seen:
            return torch.zeros(())
        means, variances = zip(*self.seen.values())
        if self.average:                                 # means of x and x² average; σ² does not
            mean, var, sizes = torch.cat(means), torch.cat(variances), [len(m) for m in means]
            mean, square = self.average(torch.stack([mean, var + mean.square()]))
            means, variances = mean.split(sizes), (square - mean.square()).split(sizes)
        return torch.stack([statistics_distance(m, v, layer.running_mean, layer.running_var)
                            for layer, m, v in zip(self.seen, means, variances)]).mean()


def adversarial_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 5: L_adv = -(1/B) Σ_i 1[argmax s_i = argmax t_i] KL(softmax(t_i) ‖ softmax(s_i)).

    (B, K), (B, K) -> scalar <= 0. Named by the paper; form of NAYER: disagreement is
    sought only where student and teacher still agree.
    """
    s, t = F.log_softmax(full(student_logits), 1), F.log_softmax(full(teacher_logits), 1)
    kl = F.kl_div(s, t, log_target=True, reduction="none").sum(1)                   # (B,)
    return -(kl * (s.argmax(1) == t.argmax(1))).mean()


def generator_objective(l_ce, l_fm, l_adv, lambda_fm: float, lambda_adv: float) -> Tensor:
    """Eq. 6 (paper; the weights are ours): L_G = L_CE + λ_fm L_FM + λ_adv L_adv."""
    return l_ce + lambda_fm * l_fm + lambda_adv * l_adv


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Eq. 7 (Hinton et al.): L_KD = τ² KL(softmax(t/τ) ‖ softmax(s/τ)), sum over K, mean over B.

    (B, K), (B, K) -> scalar >= 0.
    """
    s = F.log_softmax(full(student_logits) / temperature, 1)
    t = F.log_softmax(full(teacher_logits) / temperature, 1)
    return temperature ** 2 * F.kl_div(s, t, log_target=True, reduction="batchmean")


def category_aware_embedding_loss(z: Tensor, labels: Tensor, category_embeddings: Tensor,
                                  temperature: float = 0.1) -> Tensor:
    """Eq. 8: L_CAE = -log softmax_k(cos(z, e_k) / τ)[y], batch mean.                  [choice 5]

    z (B, D) projected student embeddings h(f_S(x̂)); labels (B,); category_embeddings (K, D). In
    `student_loss` every image of the batch is a category of its own, k = 1..B, and its embedding
    is the teacher's, e_k = f_T(x̂_k): InfoNCE, with others of the same y among the negatives.
    """
    z, e = F.normalize(full(z), dim=1), F.normalize(full(category_embeddings), dim=1)
    return F.cross_entropy(full(z @ e.to(z.dtype).T) / temperature, labels)


def contrastive_loss(z: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Eq. 9, CNCL: rows of one category attract, whatever their noise; other categories repel.

    L = -(1/|V|) Σ_{i∈V} (1/|P(i)|) Σ_{p∈P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) )
    z (B, D), normalised here; labels (B,); P(i) the other rows of i's category; V the rows that
    have any. Pairs: paper; form: SupCon. 0 for a batch without any pair.
    """
    z = F.normalize(full(z), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (full(z @ z.T) / temperature).masked_fill(itself, -1e9)            # a ≠ i
    log_p = F.log_softmax(similarity, 1)                                            # (B, B)
    positive = (labels[:, None] == labels) & ~itself                                # P(i)
    per_row = -(log_p * positive).sum(1) / positive.sum(1).clamp_min(1)
    return per_row.sum() / positive.any(1).sum().clamp_min(1)                       # mean over V


def student_objective(l_kd, l_cae, l_cncl, lambda_cae: float, lambda_cncl: float) -> Tensor:
    """Eq. 10 (paper for KD + CNCL): L_S = L_KD + λ_cae L_CAE + λ_cncl L_CNCL."""
    return l_kd + lambda_cae * l_cae + lambda_cncl * l_cncl


def within_class_variance(f: Tensor, labels: Tensor) -> Tensor:
    """Diversity: unbiased variance of f (B, D) within a category, summed over D. 0 = collapsed."""
    same = (labels[:, None] == labels).to(f.dtype)                                  # (B, B)
    n = same.sum(1, keepdim=True)                                                   # (B, 1)
    return (f - same @ f / n).square().sum() / (len(f) - (1 / n).sum()).clamp_min(1)


# ===== 6. What a run carries from cycle to cycle ==================================================

class Learner(nn.Module):
    """What phase B trains, student and projection h: x (B, 3, H, W) -> s (B, K), z = h(f_S) (B, D).

    To be called inside `with learner.embedding:`.
    """

    def __init__(self, student: nn.Module, width: int):
        super().__init__()
        self.student = student
        self.embedding = Embedding(student)                                         # f_S
        self.head = nn.Linear(last_linear(student).in_features, width)              # [choice 6]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.student(x)
        return s, self.head(self.embedding.value)


@dataclass
class State:
    """All that changes while distilling; what of it is needed to go on is in last.pt."""
    student: nn.Module
    generator: Generator
    cend: CEND
    learner: Learner
    teacher_embedding: Embedding                         # f_T
    matching: FeatureMatching
    bank: MemoryBank
    generator_optimizer: torch.optim.Optimizer
    student_optimizer: torch.optim.Optimizer
    cycle: int = 0
    seconds: float = 0.0                                 # of both phases; no evaluation, no saving


def new_state(teacher: nn.Module, student: nn.Module, config: Config, prior: Tensor | None = None
              ) -> State:
    """Generator, head, bank and optimisers on the teacher's device. prior (K, E): given embeddings.

    Raises UserError for a prior of another shape than (K, E) or with infinite numbers.
    """
    rows = last_linear(teacher).weight.detach()                                     # (K, D)
    if prior is None and config.prior not in ("teacher", "index"):
        raise UserError(f"pass the embeddings of --prior {config.prior} as `prior`")
    if prior is None:
        prior = torch.eye(len(rows)) if config.prior == "index" else rows
    prior = prior.detach().float().to(rows.device)
    if prior.ndim != 2 or len(prior) != len(rows) or not (
            0 < (prior - prior.mean(0)).square().sum() < math.inf):
        raise UserError(f"the prior is {tuple(prior.shape)}; it must be finite, not all alike and "
                        f"({len(rows)}, E), a row for each category of the teacher")
    e = category_prior(prior)
    generator = Generator(e.shape[1], config.image_size, config.generator_width)
    generator.to(rows.device, memory_format=torch.channels_last)
    learner = Learner(student, rows.shape[1]).to(rows.device)
    learner.head.requires_grad_(bool(config.lambda_cae or config.lambda_cncl))
    # SGD with a cosine, Adam for the generator: as in most of the literature         [choice 12]
    sgd = torch.optim.SGD(learner.parameters(), config.student_lr, 0.9,
                          weight_decay=config.weight_decay, nesterov=True)
    adam = torch.optim.Adam(generator.parameters(), config.generator_lr, betas=(0.5, 0.999))
    bank = MemoryBank(config.bank_capacity, config.image_size, rows.device)
    cend = CEND(e, config.magnitudes).to(rows.device)
    matching = FeatureMatching(teacher if config.lambda_fm else nn.Identity(),
                               Average.apply if world() > 1 else None)
    if config.lambda_fm and not matching.layers:
        warnings.warn("the teacher has no BatchNorm: feature matching is off", stacklevel=2)
    return State(student, generator, cend, learner, Embedding(teacher), matching, bank, adam, sgd)


def autocast(like: Tensor, config: Config) -> torch.autocast:
    """bf16 for the networks if config.precision says so; losses compute in float32 all the same."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=config.precision == "bf16")


compiled = functools.cache(torch.compile)


def set_training(model: nn.Module, on: bool) -> None:
    """Train mode with gradients, or eval mode without."""
    model.train(on).requires_grad_(on)


# ===== 7. Phase A, synthesis: the generator learns, the student is frozen =========================

def draw_inputs(state: State, labels: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """labels (B,) -> the generator's input (B, E), noise sources (B,). Without CEND plain noise."""
    if config.cend:
        return state.cend(labels)                                                   # eq. 1
    return torch.randn_like(state.cend.embeddings[labels]), torch.zeros_like(labels)


def generator_loss(state: State, teacher: nn.Module, generator: nn.Module, e_hat: Tensor,
                   labels: Tensor, config: Config) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Eq. 6 and its terms for one batch -> (images, L_G, terms). Needs `with state.matching`."""
    with autocast(e_hat, config):
        images = generator(e_hat)                                                   # eq. 2
        t = teacher(images)
        s = state.student(images) if config.lambda_adv else None
    zero = torch.zeros((), device=t.device)
    l_ce = category_consistency_loss(t, labels)                                     # eq. 3
    l_fm = state.matching.loss() if state.matching.layers else zero                 # eq. 4
    l_adv = zero if s is None else adversarial_loss(s, t)                           # eq. 5
    loss = generator_objective(l_ce, l_fm, l_adv, config.lambda_fm, config.lambda_adv)   # eq. 6
    return images, loss, {"ce": l_ce, "fm": l_fm, "adv": l_adv}


def generator_step(state: State, teacher: nn.Module, generator: nn.Module, e_hat: Tensor,
                   labels: Tensor, config: Config) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One Adam step on eq. 6 -> (the images it was computed on, their L_G, terms), detached."""
    objective = compiled(generator_loss) if config.compile else generator_loss
    images, loss, terms = objective(state, teacher, generator, e_hat, labels, config)
    state.generator_optimizer.zero_grad()
    loss.backward()
    state.generator_optimizer.step()
    return images.detach(), loss.detach(), {name: term.detach() for name, term in terms.items()}


@torch.no_grad()
def diversity(teacher: nn.Module, images: Tensor, labels: Tensor, config: Config) -> dict:
    """What to look at when a student does not learn: within-class variance, share recognised."""
    with autocast(images, config):
        t, f = forward_with_embedding(teacher, images)
    return {"variance": within_class_variance(f.float(), labels),
            "recognised": (t.argmax(1) == labels).float().mean()}


def synthesis_round(state: State, teacher: nn.Module, config: Config) -> dict[str, Tensor]:
    """Phase A: one noise draw, some generator steps, images of the best to the bank -> terms."""
    e = state.cend.embeddings
    set_training(state.student, False)
    offset = torch.randint(len(e), (), device=e.device)
    labels = (torch.arange(config.synth_batch, device=e.device) + offset) % len(e)  # balanced
    e_hat, sources = draw_inputs(state, labels, config)              # held for a round  [choice 7]
    state.generator.project.reset_parameters()           # a new seed layer and Adam: new images
    state.generator_optimizer.state.clear()
    generator = parallel(state.generator)
    best, lowest = torch.zeros((), device=e.device), torch.full((), math.inf, device=e.device)
    with state.matching:
        for _ in range(config.synth_steps):
            images, loss, terms = generator_step(state, teacher, generator, e_hat, labels, config)
            best = torch.where(loss > lowest, best, images)                         # [choice 8]
            lowest = torch.fmin(loss, lowest)
    state.bank.push(best, labels, sources)
    return terms | diversity(teacher, best, labels, config)


# ===== 8. Phase B, distillation, and the loop over both ===========================================

def student_loss(state: State, teacher: nn.Module, learner: nn.Module, images: Tensor,
                 labels: Tensor, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 10 and its terms for images (B, 3, H, W) in [0, 1], while both `Embedding`s listen."""
    with autocast(images, config):
        with torch.no_grad():
            t = teacher(images)
        s, z = learner(images)
    zero = torch.zeros((), device=s.device)
    tau, f = config.embedding_temperature, state.teacher_embedding.value
    own = torch.arange(len(z), device=z.device)          # every image a category of its own
    l_kd = kd_loss(s, t, config.kd_temperature)                                     # eq. 7
    l_cae = category_aware_embedding_loss(z, own, f, tau) if config.lambda_cae else zero   # eq. 8
    l_cncl = contrastive_loss(z, labels, tau) if config.lambda_cncl else zero       # eq. 9
    loss = student_objective(l_kd, l_cae, l_cncl, config.lambda_cae, config.lambda_cncl)  # eq. 10
    return loss, {"kd": l_kd, "cae": l_cae, "cncl": l_cncl}


def student_step(state: State, teacher: nn.Module, learner: nn.Module, images: Tensor,
                 labels: Tensor, config: Config) -> dict[str, Tensor]:
    """One SGD step of student and head on eq. 10 -> terms, detached."""
    objective = compiled(student_loss) if config.compile else student_loss
    loss, terms = objective(state, teacher, learner, images, labels, config)
    state.student_optimizer.zero_grad()
    loss.backward()
    state.student_optimizer.step()
    return {name: term.detach() for name, term in terms.items()}


def distillation_phase(state: State, teacher: nn.Module, config: Config, deadline: float = math.inf
                       ) -> dict[str, Tensor]:
    """Phase B: student steps on batches of the bank; the generator is not called -> mean terms.

    No step begins after the deadline (time.perf_counter), but the first.
    """
    set_training(state.student, True)
    learner, steps = parallel(state.learner), []
    with state.learner.embedding, state.teacher_embedding:
        while len(steps) < config.kd_steps and not (steps and time.perf_counter() > deadline):
            images, labels, _ = state.bank.sample(config.batch_size)
            images = augment(images)                                                # [choice 9]
            steps.append(student_step(state, teacher, learner, images, labels, config))
    share_buffers(state.student)
    return {name: torch.stack([terms[name] for terms in steps]).mean() for name in steps[0]}


def coupled_phase(state: State, teacher: nn.Module, config: Config) -> dict[str, Tensor]:
    """In place of both phases: a generator and a student step on each fresh batch.   [choice 10]"""
    e = state.cend.embeddings
    set_training(state.student, True)                    # DDP looks for weights that learn
    generator, learner = parallel(state.generator), parallel(state.learner)
    for _ in range(config.kd_steps):
        labels = torch.randint(len(e), (config.batch_size,), device=e.device)
        e_hat, sources = draw_inputs(state, labels, config)
        set_training(state.student, False)
        with state.matching:
            images, _, terms = generator_step(state, teacher, generator, e_hat, labels, config)
        set_training(state.student, True)
        with state.learner.embedding, state.teacher_embedding:
            terms |= student_step(state, teacher, learner, augment(images.float()), labels, config)
        state.bank.push(images, labels, sources)                         # for samples.png
    share_buffers(state.student)
    return terms | diversity(teacher, images, labels, config)


def run_progress(state: State, config: Config) -> float:
    """Share of the run that is done: of the wall-clock budget, if there is one, or the cycles."""
    if config.minutes:
        return min(1.0, state.seconds / (60 * config.minutes))
    return state.cycle / config.cycles


def distill(teacher: nn.Module, student: nn.Module, config: Config, prior: Tensor | None = None,
            state: State | None = None, on_cycle: Callable[[State, dict], None] | None = None
            ) -> nn.Module:
    """Train `student` to imitate `teacher` on images that the generator makes. No data set goes in.

    Both take images in [0, 1] and sit on one device; the teacher stays bit-identical. prior (K, E):
    category embeddings in place of config.prior. state: go on from there. on_cycle(state, metrics)
    follows each cycle; random numbers it draws do not disturb the run. config.precision "bf16" is
    bf16, all else fp32. config.real_kd: the images are those in state.bank. Returns the student, in
    eval mode. Raises FloatingPointError with the name and cycle of a loss that is not finite.
    """
    if config.real_kd and state is None:
        raise UserError("real_kd needs a state whose bank holds the real images")
    if teacher is student:
        raise UserError("teacher and student are one object; the student would stay as it is")
    set_training(teacher, False)
    if state is None:
        torch.manual_seed(config.seed)
        state = new_state(teacher, student, config, prior)
    while (progress := run_progress(state, config)) < 1:
        lr = config.student_lr * (1 + math.cos(math.pi * progress)) / 2
        lr *= min(1.0, (state.cycle + 1) / config.lr_warmup)
        state.student_optimizer.param_groups[0]["lr"] = lr
        metrics: dict = {"cycle": state.cycle + 1, "lr": lr}
        start = middle = time.perf_counter()
        left = 60 * config.minutes - state.seconds if config.minutes else math.inf
        if config.decoupled:
            rounds = 1 if state.cycle else 1 + config.warmup_rounds                 # [choice 11]
            terms = {}
            for extra in range(0 if config.real_kd else rounds):
                if extra and agreed(time.perf_counter() - start) > left / 2:
                    break                                # of a short budget, half is for phase B
                terms = synthesis_round(state, teacher, config)                     # phase A
            metrics |= to_numbers(terms)
            middle = time.perf_counter()
            terms = distillation_phase(state, teacher, config,                      # phase B
                                       start + left if world() == 1 else math.inf)
            metrics |= to_numbers(terms)
        else:
            metrics |= to_numbers(coupled_phase(state, teacher, config))
        end = time.perf_counter()
        if broken := [name for name, value in metrics.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"not finite in cycle {state.cycle + 1}: {', '.join(broken)}; "
                                     f"lower --student-lr or --generator-lr")
        state.cycle, state.seconds = state.cycle + 1, state.seconds + agreed(end - start)
        metrics |= {"seconds_synthesis": middle - start, "seconds_distillation": end - middle,
                    "seconds": state.seconds, "images": state.bank.pushed * world()}
        if on_cycle:
            cuda = [state.bank.labels.device] if state.bank.labels.is_cuda else []
            with torch.random.fork_rng(devices=cuda):
                on_cycle(state, metrics)
    return state.student.eval()


def to_numbers(terms: dict[str, Tensor]) -> dict[str, float]:
    """Device scalars -> floats in one transfer, once a phase, so that no step waits for it."""
    values = [v.float() for v in terms.values()]
    return dict(zip(terms, torch.stack(values).tolist())) if values else {}


# ===== 9. Evaluation, on real data: accuracy, agreement, linear probe =============================

@torch.no_grad()
def predict(model: nn.Module, data: Dataset, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Run a network in eval mode over a data set: logits (N, K), embeddings (N, D), labels (N,)."""
    model.eval()
    rows, own = [], torch.Generator()                    # a loader would draw from the global one
    for images, labels in DataLoader(data, batch_size=256, generator=own):
        logits, f = forward_with_embedding(model, to_float(images, device))
        rows.append((logits.float(), f.float(), labels.to(device)))
    return tuple(torch.cat(part) for part in zip(*rows))


def top1(scores: Tensor, labels: Tensor) -> float:
    """Percentage of rows of scores (N, K) whose largest entry is at labels (N,)."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


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
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order[:tenth], order[tenth:]

    def score(l2: float) -> float:
        w, b = fit_logistic(x[rest], y[rest], k, l2)
        return top1(x[held] @ w + b, y[held])

    l2 = max(l2_grid, key=score)
    w, b = fit_logistic(x, y, k, l2)
    return {"accuracy": top1(x_test @ w + b, y_test), "l2": l2}


def load_probe(config: Config) -> tuple[Dataset, Dataset] | None:
    """(train, test) of config.probe_dataset, if there is one."""
    if not config.probe_dataset:
        return None
    (train, names), (test, others) = (
        load_data(config.probe_dataset, split, config.data_root, config.image_size)
        for split in ("train", "test"))
    if names != others:
        raise UserError(f"{config.probe_dataset}: train/ and test/ have different classes")
    return train, test


# ===== 10. Several processes: torchrun. Each holds a share of every batch and its own bank ========

def world() -> int:
    """Number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes and reports."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def parallel(module: nn.Module) -> nn.Module:
    """The module; with several processes inside DDP: process 0's weights, averaged gradients."""
    return nn.parallel.DistributedDataParallel(module) if world() > 1 else module


class Average(torch.autograd.Function):
    """Mean over the processes; gradients are averaged on the way back."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / world()

    @staticmethod
    def backward(ctx, g):
        return Average.forward(ctx, g)


def share_buffers(module: nn.Module) -> None:
    """Process 0's running statistics, everywhere."""
    for buffer in module.buffers() if world() > 1 else ():
        dist.broadcast(buffer, 0)


def agreed(number: float) -> float:
    """Process 0's number: clocks differ."""
    box = [number]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


@contextlib.contextmanager
def process_group(config: Config):
    """Join what torchrun started, and leave it; nothing where there is one process."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    try:
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo",
                                timeout=timedelta(days=1))   # process 0 may train a teacher first
    except (LookupError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes ({first_line(error)}): start them with "
                        f"torchrun, one for each device, or unset WORLD_SIZE") from error
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(f"process {rank()} lost another one; if {config.out} has a last.pt, "
                        f"--resume --out {config.out} goes on, with {world()} processes") from error
    dist.destroy_process_group()


def share_of(config: Config) -> Config:
    """Settings of one process: batches and bank are spread over all. UserError if they do not."""
    n = world()
    if n > 1 and (config.benchmark or config.synth_batch % n or config.batch_size % n):
        raise UserError(f"{n} processes: --synth-batch and --batch-size must be multiples of {n}, "
                        f"and --benchmark is for one process")
    return dataclasses.replace(config, synth_batch=config.synth_batch // n,
                               batch_size=config.batch_size // n,
                               bank_capacity=max(1, config.bank_capacity // n))


# ===== 11. Run directory: checkpoints, pictures, status line ======================================

def save_atomic(thing, path: Path) -> None:
    """A text or torch.save by way of a temporary file: `path` holds the old or the new, no half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if isinstance(thing, str):
            temporary.write_text(thing)
        else:
            torch.save(thing, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:             # torch calls a full disk a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, is the disk full? What was there is intact "
                        f"({first_line(error)})") from error


SAVE_EVERY = 50       # last.pt waits so many times as long as it last took: 2 % of a run's time
RUN_FILES = ("config.json", "metrics.jsonl",          # the others are worth a question
             "samples.png", "last.pt", "student.pt", "summary.json")
STATEFUL = ("learner", "generator", "cend", "generator_optimizer", "student_optimizer")


def checksum(model: nn.Module) -> int:
    """Of all weights and statistics: a run goes on with the teacher it began with."""
    data = (value.cpu().numpy().tobytes() for value in model.state_dict().values())
    return functools.reduce(lambda crc, part: zlib.crc32(part, crc), data, 0)


def pack_state(state: State, teacher: nn.Module, config: Config) -> dict:
    """State, settings and random generators as plain types that `weights_only=True` reads back."""
    bank, n, cuda = state.bank, len(state.bank), config.device == "cuda"
    own = {"bank": [part[:n].clone().cpu() for part in (bank.images, bank.labels, bank.sources)],
           "pushed": bank.pushed,
           "rng": [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]}
    processes = [own] * world()                          # on process 0: what each of them holds
    if world() > 1:
        dist.gather_object(own, processes if rank() == 0 else None)
    return {**{name: getattr(state, name).state_dict() for name in STATEFUL},
            "teacher": checksum(teacher), "processes": processes, "cycle": state.cycle,
            "seconds": state.seconds, "config": dataclasses.asdict(config)}


def unpack_state(saved: dict, state: State, teacher: nn.Module) -> None:
    """The inverse of `pack_state`, into a new state of the same settings, else UserError."""
    if saved.get("teacher") != checksum(teacher):
        raise UserError("the teacher is not the one that last.pt was saved with; give it back its "
                        "file, or start in the folder where the run began")
    try:
        for name in STATEFUL:
            getattr(state, name).load_state_dict(saved[name])
        bank, own = state.bank, saved["processes"][rank()]
        if not (type(saved["cycle"]) is type(own["pushed"]) is int
                and type(saved["seconds"]) is float and len(own["bank"][1])
                and 0 <= own["bank"][1].min() <= own["bank"][1].max() < len(state.cend.embeddings)):
            raise ValueError("counts or labels out of range")
        bank.pushed, state.cycle, state.seconds = own["pushed"], saved["cycle"], saved["seconds"]
        for part, kept in zip((bank.images, bank.labels, bank.sources), own["bank"], strict=True):
            part[:len(bank)] = kept.to(part.device)
        torch.set_rng_state(own["rng"][0])
        if len(own["rng"]) > 1:
            torch.cuda.set_rng_state(own["rng"][1])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"last.pt does not fit its settings: {first_line(error)}") from error


def export(model: nn.Sequential, arch: str, config: Config) -> dict:
    """Weights, architecture, normalisation: a file that `load_teacher` and --teacher-ckpt read."""
    return {"state_dict": model.net.state_dict(), "arch": arch, "image_size": config.image_size,
            "dataset": dataset_name(config.dataset),
            "mean": model.normalize.mean.flatten().tolist(),
            "std": model.normalize.std.flatten().tolist()}


def open_run(out: Path, config: Config, cycle: int) -> None:
    """Make or clear the run directory, write config.json, cut metrics.jsonl to the cycles saved."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "metrics.jsonl"
    old = log.read_text(errors="replace") if cycle and log.exists() else ""
    for name in RUN_FILES:
        if not cycle:
            (out / name).unlink(missing_ok=True)         # of a run that is overwritten
        for leftover in out.glob(f"{name}.*.tmp"):       # of a process that was killed
            leftover.unlink()
    save_atomic(json.dumps(dataclasses.asdict(config), indent=1), out / "config.json")
    save_atomic("".join(old.splitlines(keepends=True)[:cycle]), log)


def save_samples(bank: MemoryBank, num_classes: int, path: Path, rows: int = 8) -> None:
    """Grid of the newest bank images: a column for each of the first 100 categories."""
    age = (bank.pushed - 1 - torch.arange(len(bank), device=bank.labels.device)) % len(bank)
    newest, columns = age.argsort(), min(num_classes, 100)
    grid = torch.zeros(rows, columns, *bank.images.shape[1:])
    for k in range(columns):
        i = newest[bank.labels[newest] == k][:rows]
        grid[:len(i), k] = bank.images[i].cpu() / 255
    torchvision.utils.save_image(grid.flatten(0, 1), path, nrow=columns)


@contextlib.contextmanager
def stop_after_cycle():
    """Ctrl-C and SIGTERM fill the list that is yielded; the second one interrupts at once."""
    asked: list[int] = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(2, b"\nstopping after this cycle; once more to stop now\n")

    numbers = (signal.SIGINT, signal.SIGTERM) if (
        threading.current_thread() is threading.main_thread()) else ()
    before = [(number, signal.signal(number, ask)) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Status:
    """An updating line on a terminal; elsewhere a plain line, at most every ten seconds."""

    def __init__(self):
        self.terminal, self.last = sys.stdout.isatty(), -math.inf

    def __call__(self, text: str) -> None:
        if self.terminal:
            self.line(text[:os.get_terminal_size().columns - 1], end="")
        elif time.monotonic() - self.last > 10:
            self.last = time.monotonic()
            self.line(text)

    def line(self, text: str, end: str = "\n") -> None:
        """A line that stays; process 0's only."""
        if rank() == 0:
            print(("\r\033[K" if self.terminal else "") + text, end=end, flush=True)


# ===== 12. Benchmark: each step against its floor, in one run =====================================

def side_by_side(functions: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each. They take turns, so that a busy moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    wait = getattr(torch, device).synchronize
    for i in range(3 + repeats):                                         # three warm up
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name] += [1000 * (time.perf_counter() - start)] * (i >= 3)
    return {name: float(np.median(t)) for name, t in times.items()}


def bench_functions(teacher: nn.Module, student: nn.Module, config: Config, prior: Tensor | None,
                    layout: torch.memory_format) -> dict[str, Callable]:
    """The two steps of a run and their floors, bare passes over the same tensors, to be timed."""
    teacher, frozen, pupil = (copy.deepcopy(net).to(memory_format=layout)
                              for net in (teacher, student, student))
    set_training(frozen, False)
    set_training(pupil, True)
    a, b = (new_state(teacher, net, config, prior) for net in (frozen, pupil))
    a.generator.to(memory_format=layout)
    labels = torch.arange(config.synth_batch, device=a.bank.labels.device) % len(a.cend.embeddings)
    e_hat, sources = a.cend(labels)
    b.bank.push(a.generator(e_hat).detach(), labels, sources)
    ready = b.bank.sample(config.batch_size)[0].contiguous(memory_format=layout)

    def kd_floor():
        with autocast(ready, config):
            with torch.no_grad():
                teacher(ready)
            loss = pupil(ready).float().mean()
        b.student_optimizer.zero_grad()
        loss.backward()
        b.student_optimizer.step()

    def kd_step():
        images, labels, _ = b.bank.sample(config.batch_size)
        with b.learner.embedding, b.teacher_embedding:
            student_step(b, teacher, b.learner, augment(images), labels, config)

    def synthesis_floor():
        with autocast(e_hat, config):
            images = a.generator(e_hat)
            loss = teacher(images).float().mean()
            if config.lambda_adv:
                loss = loss + frozen(images).float().mean()
        a.generator_optimizer.zero_grad()
        loss.backward()

    def synthesis_step():
        with a.matching:
            generator_step(a, teacher, a.generator, e_hat, labels, config)

    return {"KD step": kd_step, "KD floor": kd_floor, "synthesis step": synthesis_step,
            "synthesis floor": synthesis_floor,
            "synthesis round": lambda: synthesis_round(a, teacher, config)}


def benchmark(config: Config, status: Status) -> None:
    """--benchmark: what a run costs, what each setting buys; a table, and benchmark.json.

    Names before a comma are the run as it is set, names with one are what follows the comma.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    _, classes = load_data(config.dataset, "test", config.data_root, config.image_size)
    teacher, prior = get_teacher(config, classes, status), read_prior(config.prior)
    student = fresh_student(config, teacher, len(classes))

    def variant(layout=torch.channels_last, **changes) -> dict[str, Callable]:
        changed = dataclasses.replace(config, **changes)
        return bench_functions(teacher, student, changed, prior, layout)

    run, other = variant(), "fp32" if config.precision == "bf16" else "bf16"
    steps, floors = ("KD step", "synthesis step"), ("KD floor", "synthesis floor")
    ms = side_by_side({f"{name}, default malloc": run[name] for name in steps}, config.device, 20)
    keep_freed_memory()                                  # `main` did not yet
    rivals = {other: variant(precision=other),
              "contiguous memory": variant(torch.contiguous_format)}
    timed = {name: run[name] for name in steps + floors}
    timed |= {f"{name}, {rival}": rivals[rival][name] for rival in rivals for name in floors}
    if config.compile:
        timed |= {f"{name}, eager": variant(compile=False)[name] for name in steps}
    ms |= side_by_side(timed, config.device, 40)
    ms |= side_by_side({"synthesis round": run["synthesis round"], "synthesis round, heavy":
                        variant(generator_width=128)["synthesis round"]}, config.device, 5)
    x = to_float(torch.rand(128, 16, 32, 32), config.device)
    ms |= side_by_side({"statistics": lambda: BatchStatistics.apply(x), "statistics, var_mean":
                        lambda: torch.var_mean(x, (0, 2, 3))}, config.device, 50)
    for size in (1_000, 10_000, 100_000):
        bank = MemoryBank(size, config.image_size, config.device)
        bank.pushed, batch = size, (bank.images[:128].clone(), *2 * [bank.labels[:128].clone()])
        ms |= side_by_side({f"bank of {size}, push": functools.partial(bank.push, *batch),
                            f"bank of {size}, sample": functools.partial(bank.sample, 128)},
                           config.device, 50)
    result = {f"{name} step / its floor": ms[f"{name} step"] / ms[f"{name} floor"]
              for name in ("KD", "synthesis")}
    result |= {f"{name} / as run": t / ms[name.split(", ")[0]] for name, t in ms.items()
               if name.split(", ")[0] in ms and ", " in name}
    result["images finished / s"] = 1000 * config.synth_batch / ms["synthesis round"]
    result["images consumed / s"] = 1000 * config.batch_size / ms["KD step"]
    result |= {f"{name}, ms": t for name, t in ms.items()}
    with contextlib.suppress(ImportError):               # not on Windows; macOS says bytes
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result["peak resident MB"] = peak / (1e6 if sys.platform == "darwin" else 1e3)
    if config.device == "cuda":
        result["peak CUDA MB"] = torch.cuda.max_memory_allocated() / 1e6
    where = (f"{config.teacher} -> {config.student}, {config.device} {config.precision}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    status.line(f"| {where} | |\n|---|---|\n" + "\n".join(
        f"| {name} | {value:.3g} |" for name, value in result.items()))
    save_atomic(json.dumps({"where": where, **result}, indent=1), out / "benchmark.json")


# ===== 13. Main ===================================================================================

def load_train(config: Config, classes: list[str]) -> Dataset:
    """The train split of config.dataset; UserError if its classes are not the test split's."""
    train, names = load_data(config.dataset, "train", config.data_root, config.image_size)
    if names != classes:
        raise UserError(f"{config.dataset}: train/ and test/ have different classes")
    return train


def get_teacher(config: Config, classes: list[str], status: Status) -> nn.Module:
    """--teacher-ckpt, or checkpoints/DATASET_ARCH.pth, which is trained now if it is not there."""
    size = "" if config.image_size == 32 else f"_{config.image_size}px"
    path = Path(config.teacher_ckpt
                or f"checkpoints/{dataset_name(config.dataset)}_{config.teacher}{size}.pth")
    mean, std = BUILT_IN[config.dataset][2] if config.dataset in BUILT_IN else (None, None)
    if config.benchmark and not (config.teacher_ckpt or path.exists()):
        net = build_model(config.teacher, len(classes), config.image_size)   # as fast as a trained
        return with_normalisation(net, *IMAGENET).eval().requires_grad_(False).to(config.device)
    if not (config.teacher_ckpt or path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        status.line(f"no {path}: training {config.teacher} for {config.teacher_epochs} epochs")
        train = load_train(config, classes)
        if not mean:                                     # measured on some 2,000 images
            some = [train[i][0] for i in range(0, len(train), max(1, len(train) // 2000))]
            std, mean = torch.std_mean(torch.stack(some).float() / 255, (0, 2, 3))
            std = std.clamp_min(1e-3)                    # a channel may be empty
        net = build_model(config.teacher, len(classes), config.image_size)
        model = with_normalisation(net, config.mean or mean, config.std or std).to(config.device)
        train_classifier(model, train, config, status)
        save_atomic(export(model, config.teacher, config), path)
    stored = read_checkpoint(str(path))
    mean, std = (config.mean or stored.get("mean") or mean, config.std or stored.get("std") or std)
    if mean is None or std is None:
        status.line(f"warning: {path} stores no normalisation; ImageNet's is taken (--mean, --std)")
        mean, std = mean or IMAGENET[0], std or IMAGENET[1]
    return load_teacher(config.teacher, len(classes), str(path), mean, std,
                        config.image_size).to(config.device)


def fresh_student(config: Config, teacher: nn.Module, num_classes: int) -> nn.Module:
    """The untrained student of config.seed, with the teacher's normalisation, on its device."""
    torch.manual_seed(config.seed)
    net = build_model(config.student, num_classes, config.image_size)
    mean_std = (buffer.tolist() for buffer in teacher.normalize.buffers())
    return with_normalisation(net, *mean_std).to(config.device)


def read_prior(name: str) -> Tensor | None:
    """--prior FILE -> (K, E) tensor; None for the priors that need no file."""
    if name in ("teacher", "index"):
        return None
    if not Path(name).is_file():
        raise UserError(f"--prior {name!r} is neither teacher, index nor a file")
    try:
        array = np.load(name, allow_pickle=False) if name.endswith(".npy") else load_safely(name)
        prior = torch.as_tensor(array)
        if not is_plain(prior):
            raise ValueError
        return prior.detach().float()
    except Exception as error:                           # whatever a broken or hostile file raises
        raise UserError(f"cannot read the prior {name!r}: it holds no (K, E) array") from error


def evaluate_only(config: Config, given: set[str], status: Status) -> None:
    """--eval-only: accuracy and probe of a saved student.pt, which says what network it is."""
    stored, path = read_checkpoint(config.eval_only), config.eval_only
    if not (stored.get("arch") in ARCHITECTURES and isinstance(stored.get("image_size"), int)):
        raise UserError(f"{path} does not say its architecture: give a student.pt of this program")
    if stored.get("dataset") != dataset_name(config.dataset) and "dataset" not in given:
        raise UserError(f"{path} was distilled for {stored.get('dataset')}: give --dataset")
    config.image_size = stored["image_size"]
    check(config)
    test, classes = load_data(config.dataset, "test", config.data_root, config.image_size)
    model = load_teacher(stored["arch"], len(classes), path, image_size=config.image_size)
    logits, _, labels = predict(model.to(config.device), test, config.device)
    status.line(f"{stored['arch']}: {top1(logits, labels):.2f} % on {len(test)} test images")
    if probe := load_probe(config):
        accuracy = linear_probe(model, *probe, config.device)["accuracy"]
        status.line(f"linear probe on {config.probe_dataset}: {accuracy:.2f} %")


def resume_or_start(config: Config, given: set[str]) -> tuple[Config, dict | None]:
    """Guard the run directory -> (settings, saved state or None)."""
    last = Path(config.out) / "last.pt"
    there = next(p for p in (last.parent, *last.parent.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"cannot write to {there}: take another --out")
    settings = last.with_name("config.json")
    if not config.resume:
        if not config.overwrite:
            if any((last.parent / name).exists() for name in RUN_FILES[2:]):
                raise UserError(f"{config.out} holds a run: --resume it, --overwrite it, or take "
                                f"another --out")
            if settings.exists():                        # of a run killed in its first cycle, or
                read_config(settings)                    # somebody else's
        return config, None
    if not last.exists():
        raise UserError(f"nothing to resume: there is no {last}")
    stored, saved = read_config(settings), load_safely(last)
    fixed = {f.name for f in dataclasses.fields(Config)} - MAY_CHANGE_ON_RESUME
    try:
        same = all(saved["config"][k] == getattr(stored, k) for k in fixed)
        processes = len(saved["processes"])
    except (LookupError, TypeError, RuntimeError):
        same = False
    if not same:
        raise UserError(f"{last} was not saved with the config.json beside it")
    if changed := {k for k in given & fixed if getattr(config, k) != getattr(stored, k)}:
        raise UserError(f"a resumed run keeps its settings; this would change "
                        f"{', '.join(sorted(changed))}")
    if processes != world():
        raise UserError(f"{last} is of {processes} processes, here are {world()}")
    free = {k: getattr(config, k) for k in (MAY_CHANGE_ON_RESUME & given) | {"device", "out"}}
    return dataclasses.replace(stored, **free), saved


def read_config(path: Path) -> Config:
    """The settings in a run's config.json, checked as those of the command line are."""
    try:
        stored = json.loads(path.read_text())
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no settings of this program in {path}: {first_line(error)}") from error
    check(config)
    return config


def first_state(config: Config, teacher: nn.Module, student: nn.Module, prior: Tensor | None,
                saved: dict | None, real: Dataset | None) -> State:
    """What `distill` begins with: a new state, the saved one, or one whose bank holds `real`."""
    config.bank_capacity = len(real) if real else config.bank_capacity
    state = new_state(teacher, student, config, prior)
    if saved:
        unpack_state(saved, state, teacher)
        return state
    for images, labels in DataLoader(real, batch_size=256) if real else ():
        state.bank.push(*(part.to(config.device) for part in (images, labels, labels * 0)))
    if rank():                                           # every process draws images of its own
        torch.manual_seed(config.seed + 1_000_003 * rank())
    return state


def score(config: Config, teacher: nn.Module, student: nn.Module, t_logits: Tensor,
          test: Dataset, probe: tuple[Dataset, Dataset] | None, status: Status) -> dict:
    """Accuracy, agreement and probe of a finished student beside its teacher's, printed too."""
    logits, _, labels = predict(student, test, config.device)
    result = {"teacher_accuracy": top1(t_logits, labels), "student_accuracy": top1(logits, labels),
              "agreement": top1(logits, t_logits.argmax(1)), "test_images": len(test)}
    status.line(f"student {config.student}: {result['student_accuracy']:.2f} % (teacher "
                f"{result['teacher_accuracy']:.2f} %), agreement {result['agreement']:.2f} %")
    if probe:
        models = {"student": student, "teacher": teacher,
                  "untrained": fresh_student(config, teacher, t_logits.shape[1])}
        result["probe"] = {name: linear_probe(model, *probe, config.device)["accuracy"]
                           for name, model in models.items()}
        status.line(f"linear probe on {config.probe_dataset}: " + ", ".join(
            f"{name} {accuracy:.2f} %" for name, accuracy in result["probe"].items()))
    return result


def run(config: Config, given: set[str]) -> None:
    """All of it: teacher, distillation with logs and checkpoints, evaluation, summary."""
    status = Status()
    saved = None
    if not (config.eval_only or config.benchmark):
        config, saved = resume_or_start(config, given)
    set_numerics(config)
    share = share_of(config)
    if config.eval_only:
        return evaluate_only(config, given, status)
    if config.benchmark:
        return benchmark(config, status)
    if saved and (Path(config.out) / "summary.json").exists():
        return status.line(f"{config.out} is finished; its results are in summary.json")
    with torch.device("meta"):                           # what is wrong fails before any work
        for arch in (config.student, config.teacher):
            build_model(arch, 2)
        Generator(1, config.image_size, config.generator_width)
    prior = read_prior(config.prior)
    torch.manual_seed(config.seed)
    if rank() > 0:                                       # process 0 goes first, and
        agreed(0)
    test, classes = load_data(config.dataset, "test", config.data_root, config.image_size)
    probe = load_probe(config)
    teacher = get_teacher(config, classes, status)
    real = load_train(config, classes) if config.real_kd else None
    if rank() == 0:                                      # the others find its downloads
        agreed(0)
    start, lead = time.perf_counter(), rank() == 0
    t_logits, _, labels = predict(teacher, test, config.device)
    accuracy = top1(t_logits, labels)
    status.line(f"teacher {config.teacher}: {accuracy:.2f} % on {len(test)} test images")
    if accuracy < 5 + 100 / len(classes):
        status.line("warning: this teacher knows next to nothing; are --mean, --std and the order "
                    "of the classes its own?")

    student = fresh_student(config, teacher, len(classes))
    state = first_state(share, teacher, student, prior, saved, real)
    out, save_at, resumed, first = Path(config.out), -math.inf, state.seconds, state.cycle
    sizes = [f"{sum(p.numel() for p in m.parameters()):,}" for m in (student, state.generator)]
    status.line(f"student {config.student} {sizes[0]} weights, generator {sizes[1]}, preset "
                f"{config.preset}, {config.device} {config.precision}, torch {torch.__version__}, "
                f"into {out}" + (f", {world()} processes" if world() > 1 else ""))

    def save() -> None:
        nonlocal save_at
        begin = time.perf_counter()
        packed = pack_state(state, teacher, config)
        if lead:
            save_atomic(packed, out / "last.pt")
        save_at = time.perf_counter() + SAVE_EVERY * (time.perf_counter() - begin)

    def on_cycle(state: State, metrics: dict) -> None:
        done = run_progress(state, config)
        shown = [f"{k} {metrics[k]:.2f}" for k in ("kd", "variance", "recognised") if k in metrics]
        status(f"distilling: {done:.0%}, cycle {state.cycle}, {state.seconds / state.cycle:.1f} s "
               f"each, {state.seconds * (1 / done - 1):.0f} s left, {', '.join(shown)}")
        if lead and state.cycle == first + 1:
            open_run(out, config, first)
        if lead and state.cycle % config.eval_every == 0:
            metrics["accuracy"] = top1(predict(student, test, config.device)[0], labels)
            status.line(f"cycle {state.cycle}, {state.seconds:.0f} s: {metrics['accuracy']:.2f} %")
            save_samples(state.bank, len(classes), out / "samples.png")
        if lead:
            with (out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        stop = agreed(bool(asked))
        if stop or agreed(time.perf_counter() > save_at):
            save()
        if stop:
            raise KeyboardInterrupt

    with stop_after_cycle() as asked:
        distill(teacher, student, share, prior, state, on_cycle)
    if lead and state.cycle == first:                    # resumed where only the end was missing
        open_run(out, config, first)
    save()
    if not lead:
        return
    save_samples(state.bank, len(classes), out / "samples.png")
    save_atomic(export(student, config.student, config), out / "student.pt")
    summary = score(config, teacher, student, t_logits, test, probe, status)
    summary |= {"cycles": state.cycle, "seconds": state.seconds, "seed": config.seed,
                "images": 0 if real else state.bank.pushed * world(),
                "seconds_around": time.perf_counter() - start - state.seconds + resumed,
                "versions": {m.__name__: m.__version__ for m in (torch, torchvision, np)}}
    status.line(f"{summary['images']:,} images made; synthesis and distillation took "
                f"{state.seconds:.0f} s, all around them {summary['seconds_around']:.0f} s")
    save_atomic(json.dumps(summary, indent=1), out / "summary.json")


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code: 0 done, 2 something to mend (one line says what), 130 Ctrl-C."""
    config = None
    try:
        config, given = parse_args(argv)
        if not config.benchmark:
            keep_freed_memory()
        with warnings.catch_warnings(), process_group(config):
            warnings.simplefilter("ignore")              # of libraries: one line says what is wrong
            run(config, given)
    except (UserError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; is there room, and the right to write? What was saved is intact",
              file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        short = ("out of memory", "enough memory", "allocate memory", "bad_alloc")
        if isinstance(error, MemoryError) or any(words in str(error) for words in short):
            remedy = "not enough memory; lower a batch size, --bank-capacity or --generator-width"
        elif config and config.compile:
            remedy = "torch.compile may have failed; run without --compile"
        else:
            raise
        print(f"error: {remedy} ({first_line(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        saved = config and Path(config.out, "last.pt").exists()
        print("\ninterrupted; " + (f"go on with --resume --out {config.out}" if saved
                                   else "no cycle was finished"), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # ends a run as Ctrl-C does
    sys.exit(main())
