r"""CAE-DFKD in one file: data-free knowledge distillation with category-aware embeddings.

A trained classifier, the *teacher*, trains a new network, the *student*, without one real image. A
third network, the *generator*, makes up the images. Paper: CAE-DFKD, arXiv 2504.21478, DAC 2025. We
had its abstract, the beginning of its introduction, a review that quotes eq. 1, and notes by other
people. We could not reach the full text, and found no code. Needs Python 3.10, torch 2.6 or newer.

    python cae_dfkd.py                                         # drawn shapes, minutes on a CPU
    python cae_dfkd.py --teacher resnet34 --dataset cifar10    # downloads teacher and test images
    python cae_dfkd.py --resume runs/NAME                      # goes on after Ctrl-C or a crash
    python cae_dfkd.py --eval-only runs/NAME/student.pt --dataset cifar10

Test accuracy, %: teacher, student, untrained (CIFAR: 1,017 images, 3 to 5 runs; shapes: 1)
     4 minutes, 2 cores, no flags (shapes)                               99.60, 94.25, 8.75
    38 minutes, 1 core,  --dataset cifar10 --student resnet20 --bf16     91.6, 89.9 ± 0.7, 8.4
     9 minutes, a GPU,   a ResNet-34 of our own to a ResNet-18, --bf16   92.5, 91.0 ± 0.4, 10.2

Networks of your own need Python, and no images at all. Both must be on one device, and their last
operation must be an nn.Linear. The teacher needs BatchNorm layers, or Config(lambda_fm=0.0):
    from cae_dfkd import Config, Normalized, distill
    teacher = Normalized(my_teacher, mean, std)     # it now takes images in [0, 1]
    student = Normalized(my_student, mean, std)
    distill(teacher, student, Config(image_size=32))                    # trains student.net

Why the teacher's outputs teach more than labels do: a label says "cat". The outputs say "cat 0.8,
dog 0.15, truck 0.01". So they also tell what the image resembles.

Training repeats a *cycle* of two phases. A network in capitals learns, the others are frozen:

A, synthesis     label y ─> e_y + noise ─> GENERATOR ─> images ─> crops ─┬─> teacher ─> eq. 3, 4, 5
                              eq. 1          eq. 2        │              └─> student ─> eq. 5
                                                          └─ images of the last step ─> memory bank
B, distillation  bank ─> random batch ─> recoloured crops ─┬─> teacher ─> targets of eq. 7, 8
                                                           └─> STUDENT ─> eq. 7, 8, 9

A *step* changes the weights of one network once. A *round* draws one batch of labels and noise, and
the generator takes 12 steps on it. A *decoupled* cycle is a round and then 80 student steps. A
*coupled* cycle, for comparison, is 80 turns of one generator step and one student step:
                                   decoupled                    coupled
    generator steps in a cycle     12                           80
    new images in a cycle          128, those of the last step  80 · 128, those of each step
    labels and noise are new       in each round                in each generator step
    G's seed layer, Adam           reset in each round          never reset
    extra rounds at the beginning  4, as the bank is empty      none
    new share of the bank          1/6 in cycle 2, then less    about half

Notation   B batch size, K categories, images of H x H pixels, y (B,) their categories
           T teacher, S student; t, s (B, K) their logits, the outputs before the softmax
           f_T (B, D_T), f_S (B, D) their embeddings: what enters the last linear layer
           e (K, E) category embeddings; z = h(f_S) (B, D_T), h a linear layer that learns with S

eq  what                               where                            source
 1  ê = e_y + M_n ⊙ q_n                CEND                             quoted; default e and q ours
 2  x̂ = G(ê), images in [0, 1]         Generator                        prior work (DAFL, NAYER)
 3  L_CE = CE(t(crops of x̂), y)        generator_step                   noted
 4  L_FM, feature matching             feature_matching_loss            noted; after DeepInversion
 5  L_adv, adversarial                 adversarial_loss                 noted; form of NAYER
 6  L_G = L_CE + λ_fm L_FM + λ_adv L_adv            generator_step      noted; weights are ours
 7  L_KD, knowledge distillation       kd_loss                          noted; form of Hinton et al.
 8  L_CAE, category-aware embedding    category_aware_embedding_loss    named in one note; form ours
 9  L_CNCL, contrastive                contrastive_loss                 idea quoted; our pairs
10  L_S = L_KD + λ_cae Σ L_CAE + λ_cncl L_CNCL      student_step        noted, but Σ L_CAE is ours:
                                                                        of images, of places in maps
*Quoted*: the abstract, the beginning or the review says it. *Noted*: only notes by others say it.
*Ours*, [our choice]: no source says it. Equation numbers are ours. Plain noise for eq. 1, no eq. 5,
or no eq. 9 cost a ResNet-8 no score beyond chance (115 cycles, 3 seeds). Those parts take 90 lines.
DAFL (1904.01186) trains a generator against a frozen teacher, and needs no data.
DeepInversion (1912.08795) makes images that have the means and variances in BatchNorm layers.
NAYER (2310.00258) gives the generator category embeddings, and resets its seed layer, the first.
InfoNCE (1807.03748): a row has one right column and many wrong ones; cross-entropy of this choice.
SupCon (2004.11362): InfoNCE in which all columns of the row's category are right.
"""
# SPDX-License-Identifier: MIT
import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import json
import math
import re
import sys
import time
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path

import filelock                         # torch brings it along
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, transforms, utils
from torchvision.models.resnet import BasicBlock


# ===== 1. Settings: flags, types, defaults, help ==================================================
SHAPES_PRESET = dict(teacher_epochs=5, cycles=10, kd_steps=100, student_lr=0.1,
                     lambda_fm=8.0, lambda_adv=0.0)             # eq. 5 is off
STUDENTS = {"resnet34": "resnet18", "resnet50": "resnet18"}     # of other teachers: resnet8
# The least value of a setting. Those that are not listed: 1 for an int, else 0.
LEAST = dict(image_size=8, seed=0, warmup_rounds=0, positions=0, kd_temperature=0.1, std=0.001)


@contextlib.contextmanager
def blamed(what):
    """An error inside of `with blamed(what)` becomes a ValueError that begins with `what`."""
    try:
        yield
    except Exception as error:                          # a broken file can fail in many ways
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


@dataclasses.dataclass
class Config:
    """The settings of a run. The comment behind a field is the help of its flag. The numbers were
    chosen by test scores [our choice]. SHAPES_PRESET is for the command line alone."""
    # The run
    dataset: str = "shapes"             # shapes (drawn), cifar10, cifar100 or a folder of images
    probe_dataset: str = "shapes-unseen"    # data set of the linear probe, another or the same
    image_size: int = 32                # in pixels; shapes-unseen takes 4 GB at 96, 22 GB at 224
    cycles: int = 115                   # cycles of synthesis and distillation
    eval_every: int = 25                # cycles between two scores on the test split
    seed: int = 0                       # seed of weights, noise and batches
    device: str = "cuda" if torch.cuda.is_available() else "cpu"    # where to compute
    bf16: bool = False                  # bfloat16 networks: for GPUs, CPUs with AMX or AVX512-BF16
    out: str = dataclasses.field(default="", compare=False)     # new directory; else one in runs/
    resume: str = ""                    # directory of a run to go on with, in its own settings
    eval_only: str = ""                 # a student.pt to score, without any training
    # Networks
    teacher: str = "resnet20"           # resnet8, 20, 32, 44, 56 (thin), resnet18, 34, 50 (wide)
    student: str = ""                   # same names; else resnet18 for resnet34 and 50, else 8
    teacher_ckpt: str = ""              # file of its weights; else they are fetched, or trained
    teacher_epochs: int = 60            # epochs of a teacher that has to be trained
    mean: tuple = ()        # three numbers by which it normalises; else the usual ones
    std: tuple = ()         # three more, the standard deviations
    # Phase A, synthesis
    prior: str = "teacher"              # category embeddings: teacher, index or a (K, E) .npy file
    cend: bool = True                   # G gets category embedding plus noise; else noise alone
    magnitudes: tuple = (2.0, 2.0, 2.0, 2.0)    # M_n of the noise sources, eq. 1
    generator_width: int = 64           # channels of its seed layer; 128 is slow
    decoupled: bool = True              # phases A and B; else single steps of G and S in turns
    synth_batch: int = 128              # images of a synthesis round
    synth_steps: int = 12               # generator steps of a round
    generator_lr: float = 4e-3          # Adam step size of the generator, as in NAYER
    lambda_fm: float = 25.0             # weight of feature matching, eq. 4
    lambda_adv: float = 1.0             # weight of the adversarial term, eq. 5
    warmup_rounds: int = 4              # extra rounds before the first student step
    # Phase B, distillation
    kd_steps: int = 80                  # student steps of a cycle
    batch_size: int = 64                # images of a student step
    student_lr: float = 0.15            # SGD step size of the student, which rises over five cycles
    kd_temperature: float = 20.0        # temperature of eq. 7; at 20 it almost matches logits
    lambda_cae: float = 4.0             # weight of the category-aware loss, eq. 8
    lambda_cncl: float = 0.1            # weight of the contrastive term, eq. 9
    positions: int = 4                  # positions per image at which eq. 8 compares maps; 0: none

    def __post_init__(self):
        """ValueError for what would otherwise be wrong in silence, or only after hours."""
        self.student = self.student or STUDENTS.get(self.teacher, "resnet8")
        self.out = self.resume or self.out or time.strftime("runs/%Y%m%d-%H%M%S")
        with blamed(f"device {self.device}"):
            torch.empty(0, device=self.device)
        for name, value in vars(self).items():
            least = LEAST.get(name, 1 if type(getattr(Config, name)) is int else 0)
            numbers = [] if isinstance(value, str) else np.ravel(value)
            if not all(least <= number <= 1e12 for number in numbers):
                raise ValueError(f"{name} is {value}, not in {least} to 1e12")


def parse_args(argv=None):
    """Command line -> settings."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [flags]  (for shapes: {SHAPES_PRESET})",
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    # A line of Config, "    name: type = default  # help", gives the flag --name and its help.
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        name, default = field.name, field.default
        kind = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        if isinstance(default, tuple):
            kind = {"type": float, "nargs": "+" if default else 3}
        kind["help"] = f"{help_of[name]} (default: {default})"
        parser.add_argument("--" + name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))               # only what was typed
    if "" in given.values() or ("resume" in given and len(given) > 1):
        parser.error("a flag is empty, or stands beside --resume")
    if "resume" not in given and given.get("dataset", "shapes") == "shapes":
        given = SHAPES_PRESET | given
    return Config(**given)


# ===== 2. Networks: building, loading and reading them ============================================
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                 # mean, std


class Normalized(nn.Module):
    """A network for images in [0, 1]: it normalises them to what `net` was trained on."""
    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)            # the faster layout
        mean, std = (torch.as_tensor(v).float().view(3, 1, 1) for v in (mean, std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x):
        return self.net((x - self.mean.to(x.device)) / self.std.to(x.device))


class Shortcut(nn.Module):
    """Half the size, twice the channels, no weights: "option A" of He et al."""
    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


def cifar_resnet(depth, k):
    """ResNet-(6n+2) of He et al. for CIFAR, with the parameter names of torchvision's ResNets."""
    def stage(width, out):
        stride, shortcut = (1, None) if out == width else (2, Shortcut())
        others = [BasicBlock(out, out) for _ in range((depth - 2) // 6 - 1)]
        return nn.Sequential(BasicBlock(width, out, stride, shortcut), *others)
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(16), relu=nn.ReLU(),
        layer1=stage(16, 16), layer2=stage(16, 32), layer3=stage(32, 64),
        avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(64, k)))


def build_model(arch, num_classes):
    """An untrained network by its usual name: x (B, 3, H, W) -> logits (B, K). resnet18, 34 and 50
    are torchvision's, with the usual first layer for CIFAR: 3x3, stride 1, no pooling after it."""
    if arch in ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56"):
        return cifar_resnet(int(arch[6:]), num_classes)
    if arch not in ("resnet18", "resnet34", "resnet50"):
        raise ValueError(f"unknown network {arch!r}: see --help")
    model = getattr(models, arch)(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def load_network(path, arch="", classes=(), size=0, mean=(), std=(), usual=IMAGENET):
    """A file of weights -> Normalized, frozen, in eval mode. ValueError if the file does not fit. A
    student.pt says its arch, classes and image size; what is given must agree. Files of others need
    arch. Normalisation: mean and std, else what the file says, else `usual`."""
    with blamed(f"{path} as {arch or 'a student.pt'}"):
        stored = torch.load(path, "cpu", weights_only=True)     # runs no code of the file
        for name, asked in dict(arch=arch, classes=classes, image_size=size).items():
            if asked and stored.get(name, asked) != asked:
                raise ValueError(f"its {name} is {stored[name]}")
        weights, renamed = stored, {}
        for key in ("state_dict", "model_state_dict", "net", "model"):
            weights = weights.get(key, weights)         # out of its wrapper
        for key, value in weights.items():
            key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)
            key = re.sub(r"^(linear|classifier)\.", "fc.", key)
            renamed[key.replace(".shortcut.", ".downsample.")] = value
        net = build_model(arch or stored["arch"], len(classes or renamed["fc.bias"]))
        net.load_state_dict(renamed)
        nn.utils.get_total_norm(net.parameters(), 2.0, True)     # an error for NaN
        mean, std = mean or stored.get("mean", usual[0]), std or stored.get("std", usual[1])
        return Normalized(net, mean, std).eval().requires_grad_(False)


@contextlib.contextmanager
def hooked(modules, hook):
    """In `with hooked(modules, hook): model(x)`, each module calls hook(module, inputs, output)."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read(model, x):
    """One forward pass -> logits (B, K), embedding (B, D), maps [(B, D_r, h_r, h_r), ...], head.
    The head is the nn.Linear whose output is that of the network. What enters it is the embedding.
    No head: ValueError. (Leave out a softmax or scale after it; write a 1x1 convolution as an
    nn.Linear.) The maps are the last outputs of each resolution, from coarse to fine: of a
    ResNet-20, 64 x 8 x 8, 32 x 16 x 16, 16 x 32 x 32. To copy it, copy `hooked` as well."""
    calls, maps = [], {}
    def look(module, inputs, output):
        if isinstance(module, nn.Linear):
            calls.append((module, inputs[0], output))
        # Not maps: an image; patches, which a convolution cuts, and attention of transformers.
        cuts = isinstance(module, nn.Conv2d) and inputs[0].shape == x.shape
        no_map = cuts or isinstance(module, (nn.Dropout, nn.Softmax))
        if isinstance(output, Tensor) and output.ndim == 4 and not no_map:
            _, channels, height, width = output.shape
            coarsest = min(maps, default=x.shape[2])    # so far; a finer map is upsampled
            if channels > 3 and 1 < height == width <= coarsest:
                maps[height] = output
    with hooked(model.modules(), look):
        logits = model(x)
    heads = [(layer, before) for layer, before, after in calls if after is logits]
    if not heads or logits.ndim != 2:                   # `is`: nothing comes after the head
        raise ValueError("the last operation must be an nn.Linear: wrap it")
    head, embedding = heads[-1]
    return logits, embedding, [maps[size] for size in sorted(maps)], head


# ===== 3. CEND, generator, memory bank ============================================================
class CEND(nn.Module):
    """Category embedding noise diffusion, eq. 1: ê = e_y + M_n ⊙ q_n, n in {1..N}, q_n ~ NS_n.
    Quoted from a review. "Diffusion" means only that noise is added. The paper takes e from a
    language model: np.save its (K, E) embeddings of the class names, in the order of the labels,
    for --prior. Our default: weight rows of the teacher's head. Plain noise did a ResNet-8 as well.
    category_embeddings (K, E) in any scale, copied without their gradient; magnitudes: N numbers
    M_n. The N noise sources NS_n are Gaussian, uniform, Laplace, Rademacher, Gaussian, ... These
    families, the draw of n for each image, centring and scaling are [our choice]. Embeddings are
    centred, because those of a language model are almost parallel. K centred vectors span at most
    r = min(K-1, E) directions, and we scale their mean squared length to r. For K = 10, E = 64,
    M = 2: e_y has length 3. The noise has length 16; its part in these 9 directions has 6."""
    def __init__(self, category_embeddings, magnitudes=(2.0, 2.0, 2.0, 2.0)):
        super().__init__()
        e = category_embeddings.detach().float()
        e = e - e.mean(0)
        r = min(len(e) - 1, e.shape[1])
        length = e.square().sum(1).mean().sqrt().clamp_min(1e-12)       # root mean square
        self.register_buffer("embeddings", e * math.sqrt(r) / length)               # (K, E)
        self.register_buffer("magnitudes", torch.as_tensor(magnitudes).float())

    def forward(self, labels):
        """labels (B,) -> ê (B, E). The source n is drawn for each row."""
        source = torch.randint(len(self.magnitudes), labels.shape, device=labels.device)    # (B,)
        e = self.embeddings[labels]                                                 # e_y (B, E)
        # Each family has zero mean and unit variance, so that M_n alone sets its size. [our choice]
        families = torch.stack([                                                    # (4, B, E)
            torch.randn_like(e), math.sqrt(3) * (2 * torch.rand_like(e) - 1),   # Gaussian, uniform
            torch.distributions.Laplace(0 * e, 0.5 ** 0.5, validate_args=False).sample(),
            2.0 * torch.randint_like(e, 2) - 1])                        # Rademacher: -1 or 1
        q = families[source % 4, torch.arange(len(e), device=e.device)]             # q_n (B, E)
        return e + self.magnitudes[source, None] * q


class Generator(nn.Module):
    """Light generator, eq. 2: x̂ = G(ê), (B, E) -> (B, 3, H, H) in [0, 1].           [our choice]
        H = 32, width 64    channels, height, width
        seed layer          64 x  8 x  8    at most 8 x 8 pixels for any H
        first stage         64 x 16 x 16    each stage doubles the size and convolves
        second stage        32 x 32 x 32    from the second on, it also halves the channels
        last convolution     3 x 32 x 32"""
    def __init__(self, embedding_dim, image_size=32, width=64):
        super().__init__()
        stages = max(1, math.ceil(math.log2(image_size / 8)))
        sizes = [math.ceil(image_size / 2 ** i) for i in range(stages, -1, -1)]     # 8, 16, 32
        self.seed_layer = nn.Linear(embedding_dim, width * sizes[0] ** 2)
        layers = [nn.Unflatten(1, (width, sizes[0], sizes[0])), nn.BatchNorm2d(width)]
        channels = width                                # of the next stage
        for size in sizes[1:]:
            layers += [nn.Upsample(size), nn.Conv2d(width, channels, 3, 1, 1, bias=False),
                       nn.BatchNorm2d(channels), nn.LeakyReLU(0.2)]
            width, channels = channels, max(channels // 2, 8)
        self.decode = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Sigmoid())

    def forward(self, e_hat):
        return self.decode(self.seed_layer(e_hat))


def to_float(images, device=None):
    """uint8 (or float) images -> float32 in [0, 1], on the device if one is given."""
    scale = 255 if images.dtype == torch.uint8 else 1
    return (images.to(device).float() / scale).contiguous(memory_format=torch.channels_last)


class MemoryBank:
    """The newest `capacity` images, as uint8, and their labels. (Copy `to_float`, too.)"""
    def __init__(self, capacity, image_size, device="cpu"):
        self.capacity = capacity
        self.images = torch.zeros(0, 3, image_size, image_size).byte().to(device)
        self.labels = torch.zeros(0).long().to(device)

    def push(self, images, labels):
        """images (B, 3, H, H) in [0, 1], labels (B,). The oldest images make room for them."""
        pixels = (images.float().clamp(0, 1) * 255).round().byte()
        self.images = torch.cat([self.images, pixels])[-self.capacity:]
        self.labels = torch.cat([self.labels, labels])[-self.capacity:]

    def sample(self, batch):
        """images (batch, 3, H, H) in [0, 1], labels (batch,). An image may come up twice."""
        i = torch.randint(len(self.labels), (batch,), device=self.labels.device)
        return to_float(self.images[i]), self.labels[i]


# ===== 4. Losses: pure functions, which can be copied one by one ==================================
# All raise half precision to float32. Eq. 7 and 8 let no gradient into their targets.
def feature_matching_loss(layers, inputs, eps=1e-4):
    """Eq. 4, teacher-guided feature distribution matching (noted; after DeepInversion).
        L_FM = mean_l ( ‖(μ_l(x̂) - μ_l) / σ_l‖₂ + ‖(σ²_l(x̂) - σ²_l) / σ²_l‖₂ )
    layers: BatchNorm layers l of a teacher in eval mode, which store the mean μ_l and the variance
    σ²_l of its training data. inputs: what entered each of them for images x̂, (B, C_l, h, w) or
    (B, C_l), with the statistics μ_l(x̂), σ²_l(x̂) -> scalar >= 0. In train mode: ValueError.
    Without it a ResNet-8 has 52 to 61 % of CIFAR-10, with it 80 to 82 (115 cycles, 3 seeds). Unlike
    DeepInversion we divide by σ_l, or channels of large values would count most [our choice]. The
    mean makes λ_fm independent of the number of layers, not their width: norms grow like √C_l."""
    if not layers or any(layer.training for layer in layers):
        raise ValueError("eq. 4 needs BatchNorm layers, in eval mode")
    distances = []
    for layer, x in zip(layers, inputs, strict=True):
        rows = x.movedim(1, -1).flatten(0, -2).float()                  # (B h w, C_l)
        mean = rows.mean(0)                                             # μ_l(x̂)
        var = rows.square().mean(0) - mean.square()                     # σ²_l(x̂)
        scale = layer.running_var + eps                                 # σ²_l, never 0
        of_mean = (mean - layer.running_mean) / scale.sqrt()
        of_var = (var - layer.running_var) / scale
        distances.append(of_mean.norm() + of_var.norm())
    return torch.stack(distances).mean()


def adversarial_loss(student_logits, teacher_logits):
    """Eq. 5: L_adv = -(1/B) Σ_i 1[argmax s_i = argmax t_i] KL(softmax(t_i) ‖ softmax(s_i)).
    (B, K), (B, K) -> scalar <= 0, since G is to make the KL large. 1[...] is 1 if that holds, else
    0. Noted; the form is NAYER's. Gradients reach G through both networks. If their categories
    differ, S can already learn from the image. A further push could move the image to another
    category. So the image counts 0, like row three here. (No effect beyond chance: see the top.)
    >>> t = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> s = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    >>> [f"{-adversarial_loss(s[i:i + 1], t[i:i + 1]):.3f}" for i in range(3)]      # the KL
    ['0.000', '0.067', '0.000']
    """
    log_s = F.log_softmax(student_logits.float(), 1)
    log_t = F.log_softmax(teacher_logits.float(), 1)
    kl = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(1)           # (B,)
    return -(kl * (log_s.argmax(1) == log_t.argmax(1))).mean()


def kd_loss(student_logits, teacher_logits, temperature=20.0):
    """Eq. 7: L_KD = τ² KL(softmax(t/τ) ‖ softmax(s/τ)), the sum over K, the mean over B.
    (B, K), (B, K) -> scalar >= 0. Noted; the form is that of Hinton et al. The factor τ² keeps the
    size of the gradient when τ changes. At a high τ the loss is close to 1/(2K) times the squared
    difference of centred logits, so that categories of low probability count as well."""
    log_s = F.log_softmax(student_logits.float() / temperature, 1)
    log_t = F.log_softmax(teacher_logits.detach().float() / temperature, 1)
    return temperature ** 2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")


def category_aware_embedding_loss(z, targets, labels, temperature=0.1):
    """Eq. 8, category-aware embedding constraint (one note names it; the form is ours).
        L_CAE = mean_i -log( w_ii / (w_ii + Σ_{k: y_k ≠ y_i} w_ik) )
        w_ik  = exp( cos(z_i, f_k - f̄) / τ ),   f̄ the mean of all f_k
    z (N, D_T): the student's projected embeddings; targets f (N, D_T): the teacher's embeddings of
    the same N images; labels y (N,) -> scalar >= 0. Each row is a classification: student image i
    must pick teacher image i out of the teacher images of other categories. For labels [0, 0, 1]:
                             teacher 0  teacher 1  teacher 2
        student 0             right       -         wrong        "-" is left out: it is another
        student 1               -        right      wrong        image of the same category
        student 2             wrong      wrong      right
    Targets are centred, because after a ReLU no value is negative and all cosines would be high. To
    leave out "-" is [our choice]. It changed little in five pairs of runs of 8 cycles.
    With cosines of 1 for right, -0.5 for wrong and τ = 1 the third row costs most:
    >>> z = torch.tensor([[2.0, 0.0], [-1.0, 3 ** 0.5], [-1.0, -3 ** 0.5]])     # 120° apart
    >>> one_wrong, two_wrong = (math.log(1 + n * math.exp(-1.5)) for n in (1, 2))
    >>> loss = category_aware_embedding_loss(z, z, torch.tensor([0, 0, 1]), temperature=1.0)
    >>> f"{loss:.4f}", f"{(one_wrong + one_wrong + two_wrong) / 3:.4f}"
    ('0.2573', '0.2573')
    """
    z = F.normalize(z.float(), dim=1)
    f = targets.detach().float()
    f = F.normalize(f - f.mean(0), dim=1)
    left_out = labels[:, None] == labels                                            # (N, N)
    left_out.fill_diagonal_(False)
    similarity = (z @ f.T / temperature).masked_fill(left_out, -math.inf)           # log w_ik
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device))


def contrastive_loss(z, labels, temperature=0.1):
    """Eq. 9, CNCL, category noise contrastive learning (idea quoted; the form is that of SupCon).
        L = -(1/|V|) Σ_{i∈V} (1/|P(i)|) Σ_{p∈P(i)} log( exp(z_i·z_p/τ) / Σ_{a≠i} exp(z_i·z_a/τ) )
    z (B, D_T), normalised here; labels (B,) -> scalar >= 0. P(i): the other rows of i's category.
    V: the rows that have any. A batch without a pair gives 0. Eq. 8 compares student with teacher,
    eq. 9 compares student with student. By the notes, the paper's positive pairs are of one
    category and differ in their degree of diffusion, the amount of noise. Ours are any two images
    of one category, cropped and recoloured. [our choice] No effect beyond chance: see the top."""
    z = F.normalize(z.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -math.inf)             # a ≠ i
    log_p = F.log_softmax(similarity, 1).masked_fill(itself, 0)         # -inf * 0 would be nan
    positive = (labels[:, None] == labels) & ~itself                    # P(i), (B, B)
    per_row = -(log_p * positive).sum(1) / positive.sum(1).clamp_min(1)
    return per_row.sum() / positive.any(1).sum().clamp_min(1)           # mean over V


# ===== 5. State, steps, cycles, and the loop over them ============================================
def load_prior(prior, k):
    """Category embeddings (K, E) of a file, else an index. ValueError if the file does not fit."""
    e = torch.eye(k) if prior in ("index", "teacher") else torch.as_tensor(np.load(prior)).float()
    if e.ndim != 2 or len(e) != k or not 0 < e.var(0).sum() < math.inf:
        raise ValueError(f"{prior} must hold ({k}, E) numbers")
    return e


class State:
    """All that a run works with. A new module that learns goes into SAVED and `learning`, too.
    generator: your own network, ê (B, E) -> (B, 3, H, H) in [0, 1]; if it has a seed_layer, each
    round resets that. ValueError if teacher, student and config do not fit together."""
    SAVED = ("student", "cend", "generator", "projection", "map_projections",
             "student_optimizer", "generator_optimizer")

    def __init__(self, teacher, student, config, generator=None):
        self.teacher, self.student, self.config = teacher, student, config
        self.cycle, self.history = 0, []                # cycles that are over, metrics of each
        size, device = config.image_size, next(teacher.parameters()).device
        image = torch.zeros(1, 3, size, size, device=device)
        with torch.no_grad():
            t, f_t, maps_t, head = read(teacher.eval(), image)
            s, f_s, maps_s, _ = read(student.eval(), image)
        shared = set(teacher.parameters()) & set(student.parameters())
        if shared or s.shape != t.shape:
            raise ValueError(f"{s.shape[1]} and {t.shape[1]} categories, or shared weights")
        layers = [m for m in teacher.modules() if hasattr(m, "running_mean")]
        self.bn_layers = [layer for layer in layers if layer.running_mean is not None]
        e = head.weight if config.prior == "teacher" else load_prior(config.prior, t.shape[1])
        self.cend = CEND(e, config.magnitudes).to(device)
        self.generator = generator or Generator(e.shape[1], size, config.generator_width)
        self.generator.to(device, memory_format=torch.channels_last)    # the faster layout
        self.bank = MemoryBank(20_000, size, device)        # 115 cycles make 15,232
        # h serves eq. 8 for whole images and eq. 9. Each pair of maps has its own linear layer. The
        # coarsest maps of both networks are a pair, then the next coarsest.          [our choice]
        self.projection = nn.Linear(f_s.shape[1], f_t.shape[1]).to(device)
        pairs = zip(maps_s, maps_t) if config.positions and config.lambda_cae else []
        self.maps = [(tuple(a.shape[1:]), tuple(b.shape[1:])) for a, b in pairs]
        self.map_projections = nn.ModuleList(nn.Linear(a[0], b[0]) for a, b in self.maps).to(device)
        learning = nn.ModuleList([student, self.projection, self.map_projections])
        self.student_parameters = [p for p in learning.parameters() if p.requires_grad]
        self.student_optimizer = torch.optim.SGD(
            self.student_parameters, config.student_lr, 0.9, nesterov=True, weight_decay=1e-4)
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), config.generator_lr, betas=(0.5, 0.999))

    def state_dict(self):
        bank = [self.bank.images, self.bank.labels]
        saved = {"bank": bank, "history": self.history, "teacher": self.teacher.state_dict()}
        return saved | {k: getattr(self, k).state_dict() for k in self.SAVED}

    def load_state_dict(self, saved):
        pairs = zip(saved["teacher"].values(), self.teacher.state_dict().values())
        if not all(torch.equal(a.to(b), b) for a, b in pairs):
            raise ValueError("the run began with another teacher")
        for name in self.SAVED:
            getattr(self, name).load_state_dict(saved[name])
        self.bank.images, self.bank.labels = saved["bank"]
        self.history, self.cycle = saved["history"], len(saved["history"])


def autocast(like, config):
    """bfloat16 for the networks with --bf16. Losses are computed outside of it, in float32."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=config.bf16)


def augment(images, mode="constant", pad=4):
    """Random crop after padding, random flip: (B, 3, H, W) in [0, 1] -> the same shape. "constant"
    pads with black, as most recipes for CIFAR teachers do; "reflect" mirrors the edges. Each image
    has its own crop: rows y and columns x say where its pixels stand in the padded image."""
    (b, _, h, w), device = images.shape, images.device
    draws = torch.rand(b, 3, device=device)
    top, left = ((draws[:, i, None] * (2 * pad + 1)).long() for i in (0, 1))        # (B, 1) each
    flip = draws[:, 2, None] < 0.5                                                  # (B, 1)
    y = top + torch.arange(h, device=device)                                        # (B, H)
    x = torch.arange(w, device=device)
    x = left + torch.where(flip, w - 1 - x, x)                                      # (B, W)
    padded = F.pad(images, (pad,) * 4, mode).permute(0, 2, 3, 1)        # channels last
    row = torch.arange(b, device=device)[:, None, None]                             # (B, 1, 1)
    return padded[row, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def jitter_colours(images, strength=0.3):
    """Scale each channel by 1 ± strength, shift each image by up to ±⅔ strength.    [our choice]"""
    gain = 2 * torch.rand(len(images), 3, 1, 1, device=images.device) - 1
    shift = 2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1
    return (images * (1 + strength * gain) + strength / 1.5 * shift).clamp(0, 1)


def draw_embeddings(state):
    """What one batch of images starts from: generator inputs ê (B, E) and labels y (B,)."""
    config, e = state.config, state.cend.embeddings
    first = torch.randint(len(e), (), device=e.device)
    labels = (torch.arange(config.synth_batch, device=e.device) + first) % len(e)   # balanced
    e_hat = state.cend(labels) if config.cend else torch.randn_like(e[labels])      # eq. 1
    return e_hat, labels


def generator_step(state, e_hat, labels):
    """One Adam step of G on eq. 6 -> the images made before it (B, 3, H, H), and loss terms. G is
    in train mode. T and S are in eval mode; gradients only pass through them. A teacher that was
    trained on crops with black padding has black borders in its statistics. So it sees such crops
    here; of whole images, G would have to draw the borders itself.                  [our choice]"""
    config, student = state.config, state.student.eval()
    l_fm = l_adv = torch.zeros((), device=e_hat.device)
    calls = []                                          # (layer, (its input,), its output)
    with hooked(state.bn_layers, lambda *call: calls.append(call)), autocast(e_hat, config):
        images = state.generator.train()(e_hat)                                     # eq. 2
        crops = augment(images)
        t = state.teacher.eval()(crops).float()
        s = student(crops).float() if config.lambda_adv else None
    l_ce = F.cross_entropy(t, labels)                                               # eq. 3
    if config.lambda_fm:
        l_fm = feature_matching_loss([c[0] for c in calls], [c[1][0] for c in calls])       # eq. 4
    if config.lambda_adv:
        l_adv = adversarial_loss(s, t)                                              # eq. 5
    loss = l_ce + config.lambda_fm * l_fm + config.lambda_adv * l_adv               # eq. 6
    state.generator_optimizer.zero_grad()
    loss.backward(inputs=list(state.generator.parameters()))    # not into teacher and student
    state.generator_optimizer.step()
    recognised = (t.argmax(1) == labels).float().mean()         # crops that T puts in category y
    return images.detach(), {"ce": l_ce, "fm": l_fm, "adv": l_adv, "recognised": recognised}


def synthesis_round(state):
    """Phase A: generator steps on one batch, whose images then go to the bank -> loss terms.
        redrawn   labels, noise                new images, of the categories in turn
        reset     seed layer, Adam's moments   or G may repeat its images (NAYER; unclear here)
        kept      the other layers of G        they have learnt what images look like
        held      labels, noise in the round   a few steps teach G one batch, but not to draw for
                                               arbitrary noise                      [our choice]
    All steps of a round see the same rows, so G can fit each row and ignore e_y. This may be why
    a ResNet-8 with plain noise (--no-cend) did as well: 3 seeds, 115 cycles, within chance."""
    e_hat, labels = draw_embeddings(state)
    if hasattr(state.generator, "seed_layer"):
        state.generator.seed_layer.reset_parameters()
    state.generator_optimizer.state.clear()             # Adam's moments
    for _ in range(state.config.synth_steps):
        images, terms = generator_step(state, e_hat, labels)
    state.bank.push(images, labels)
    return terms


def read_places(feature_map, places):
    """Feature map (B, D, h, w), places (B, P, 2) in [0, 1) of its height and width -> (B P, D). A
    place is the same part of the image in maps of any size. Here it is row 2, column 3 of 4 x 4:
    >>> read_places(torch.arange(16.0).view(1, 1, 4, 4), torch.tensor([[[0.5, 0.75]]]))
    tensor([[11.]])
    """
    b, _, h, w = feature_map.shape
    row = torch.arange(b, device=places.device)[:, None]                            # (B, 1)
    y = (places[:, :, 0] * h).long()                                                # (B, P)
    x = (places[:, :, 1] * w).long()                                                # (B, P)
    return feature_map.permute(0, 2, 3, 1)[row, y, x].flatten(0, 1)


def student_step(state):
    """One SGD step of student and projections on eq. 10, for a batch of the bank -> loss terms.
    Eq. 10 sums eq. 8 over whole images, and over P random places of each image in each pair r of
    maps S_r, T_r of the two networks:
        L_CAE(h(f_S), f_T, y) + Σ_r L_CAE(h_r(S_r at places), T_r at places, y)
    It has 1 + R terms, so λ_cae weighs more for networks with more pairs of maps: R is 3 for a
    ResNet-20, 4 for a ResNet-18. With B = 64 and P = 4 a term at places has N = 256 rows. The
    positive is the same place of the same image, negatives are all places of images of other
    categories, and all other places of its own category are left out.
    Why places: an embedding is the mean of the last map, which many maps can share. Places look at
    all parts. They add 17 and 22 AP50 (chance ±5) at drawn scenes to a ResNet-8 and 20. Eq. 8 adds
    5 points of accuracy to a ResNet-18, costs 4 of a probe (115 cycles, 3 pairs).  [our choice]"""
    config, student = state.config, state.student.train()
    images, labels = state.bank.sample(config.batch_size)
    l_cae = l_cncl = torch.zeros((), device=labels.device)
    # Both networks see the same. Edges are mirrored: no test image has black ones.  [our choice]
    images = jitter_colours(augment(images, mode="reflect"))
    with autocast(images, config):
        with torch.no_grad():
            t, f_t, maps_t, _ = read(state.teacher, images)
        s, f_s, maps_s, _ = read(student, images)
    z = state.projection(f_s.float())                                               # (B, D_T)
    places = torch.rand(len(labels), config.positions, 2, device=labels.device)     # (B, P, 2)
    l_kd = kd_loss(s, t, config.kd_temperature)                                     # eq. 7
    if config.lambda_cae:
        l_cae = category_aware_embedding_loss(z, f_t, labels)                       # eq. 8, images
        labels_at = labels.repeat_interleave(config.positions)                      # (B P,)
        for project, map_s, map_t in zip(state.map_projections, maps_s, maps_t):
            at_s = project(read_places(map_s, places).float())                      # (B P, D_r)
            at_t = read_places(map_t, places)                                       # (B P, D_r)
            l_cae = l_cae + category_aware_embedding_loss(at_s, at_t, labels_at)    # eq. 8, places
    if config.lambda_cncl:
        l_cncl = contrastive_loss(z, labels)                                        # eq. 9
    loss = l_kd + config.lambda_cae * l_cae + config.lambda_cncl * l_cncl           # eq. 10
    state.student_optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(state.student_parameters, 10.0)    # a few are huge     [our choice]
    state.student_optimizer.step()
    return {"kd": l_kd, "cae": l_cae, "cncl": l_cncl}


def decoupled_cycle(state):
    """Phase A, then phase B, in which the generator rests -> loss terms of the last steps."""
    for _ in range(1 if state.cycle else 1 + state.config.warmup_rounds):
        terms = synthesis_round(state)
    for _ in range(state.config.kd_steps):
        terms |= student_step(state)
    return terms


def coupled_cycle(state):
    """Steps of generator and student in turns (see the table at the top) -> their loss terms."""
    for _ in range(state.config.kd_steps):
        e_hat, labels = draw_embeddings(state)
        images, terms = generator_step(state, e_hat, labels)
        state.bank.push(images, labels)
        terms |= student_step(state)
    return terms


def print_cycle(state, metrics):
    """A line for each cycle. Over the first cycles kd and cae should fall."""
    print(", ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)


def distill(teacher, student, config, state=None, on_cycle=print_cycle):
    """Train `student` to imitate `teacher` on images of the generator. No data set goes in.
    Both take images (B, 3, H, H) in [0, 1] (wrap one for grey images, so that it takes the mean
    over colours), return an nn.Linear's output and sit on one device. The teacher's weights and
    statistics do not change. Student weights with requires_grad=False stay fixed, but all its
    BatchNorm statistics move. state: a State of this teacher, student and config, new or loaded.
    on_cycle(state, metrics) follows each cycle, with the loss terms of its last steps. Returns the
    student, in eval mode. FloatingPointError if a loss or the student is not finite."""
    torch.manual_seed(config.seed)
    state = state or State(teacher, student, config)
    if (state.teacher, state.student, state.config) != (teacher, student, config):
        raise ValueError("state is of other arguments")
    print("eq. 8 compares maps:", state.maps, flush=True)
    while state.cycle < config.cycles:
        # The seed depends on the cycle, so a resumed run draws what an unbroken one draws.
        torch.manual_seed(1_000_003 * config.seed + state.cycle + 1)
        # Step size: half a cosine from full size to 0, times a rise over five cycles. Without it a
        # ResNet-20 had 27, not 68 % at cycle 40 (1 seed, old code); ResNet-8: unclear. [our choice]
        cosine = (1 + math.cos(math.pi * state.cycle / config.cycles)) / 2
        for group in state.student_optimizer.param_groups:
            group["lr"] = config.student_lr * cosine * min(1.0, (state.cycle + 1) / 5)
        terms = decoupled_cycle(state) if config.decoupled else coupled_cycle(state)
        state.cycle += 1
        # The losses were computed before the last step. This is of the weights after it.
        terms["weight_norm"] = nn.utils.get_total_norm(state.student_parameters)
        metrics = {"cycle": state.cycle} | {k: v.item() for k, v in terms.items()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"not finite, lower a step size: {metrics}")
        state.history.append(metrics)
        on_cycle(state, metrics)
    return student.eval()


# ===== 6. Evaluation: accuracy, and a linear probe of frozen embeddings ===========================
@torch.no_grad()
def collect(function, data, device="cpu"):
    """function(images) for a whole data set -> outputs (N, ...), labels (N,), on the device."""
    batches = [(function(to_float(x, device)).float(), y.to(device))
               for x, y in DataLoader(data, 256)]
    return [torch.cat(column) for column in zip(*batches)]


def top1(scores, labels):
    """Percentage of rows of scores (N, K) whose largest entry is at labels (N,)."""
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def fit_logistic(x, y, k, l2):
    """Logistic regression of y (N,) on x (N, D), L2 on the weights -> weights (D, k), bias (k,)."""
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


def linear_probe(embed, train, test, device="cpu"):
    """Accuracy on test, in percent, of a linear classifier of embeddings that is fitted on train.
    embed: a function of images (B, 3, H, H) in [0, 1] -> (B, D); train and test: pairs (image,
    label). L2 is the strength that does best on a tenth of train, held out for this. To copy it,
    copy to_float, collect, top1 and fit_logistic as well."""
    x, y = collect(embed, train, device)
    x_test, y_test = collect(embed, test, device)
    std, mean = torch.std_mean(x, 0)
    x, x_test = ((v - mean) / std.clamp_min(1e-6) for v in (x, x_test))
    k, tenth = int(y.max()) + 1, max(1, len(x) // 10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held_out, rest = order[:tenth], order[tenth:]
    def held_out_accuracy(l2):
        w, b = fit_logistic(x[rest], y[rest], k, l2)
        return top1(x[held_out] @ w + b, y[held_out])
    l2 = max((1e-4, 1e-3, 1e-2, 1e-1), key=held_out_accuracy)
    w, b = fit_logistic(x, y, k, l2)
    return top1(x_test @ w + b, y_test)


# ===== 7. Data sets: only to train a missing teacher and to evaluate; `distill` sees none =========
# Drawn categories: how many lobes a curve around a point has, and whether it is hollow. The first
# ten are the data set "shapes". The others are "shapes-unseen", for the linear probe.
SHAPES = [(lobes, hollow) for lobes in (0, 2, 3, 4, 5, 1, 6, 8) for hollow in (False, True)]


def draw_shapes(n, shapes, seed, size):
    """n images, uint8 (n, 3, size, size), of one shape each, and labels (n,). All else varies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(shapes), size=n)
    lobes, hollow = np.array(shapes)[labels].T[:, :, None, None, None]              # (n, 1, 1, 1)
    def uniform(low, high, channels=1):
        return rng.uniform(low, high, (n, channels, 1, 1))
    radius, grid = uniform(0.45, 0.7), np.linspace(-1, 1, size)
    dx, dy = (axis - uniform(-1, 1) * (1 - radius) for axis in (grid, grid[:, None]))
    angle = np.arctan2(dy, dx) + uniform(-0.35, 0.35)
    r = np.hypot(dx, dy) / radius / (0.7 + 0.3 * np.cos(lobes * angle))             # 1: the curve
    inside = (r < 1) & ((r > 0.55) | (hollow == 0))
    back = uniform(0, 1, 3)
    fore = (back + uniform(0.3, 0.7, 3)) % 1            # a colour that differs from it
    image = np.where(inside, fore, back + uniform(-0.2, 0.2) * grid)
    image = (image + uniform(0, 0.06) * rng.standard_normal(image.shape)).clip(0, 1)
    pixels = torch.from_numpy((image * 255).round().astype(np.uint8))
    return TensorDataset(pixels, torch.from_numpy(labels))


def load_data(dataset, split, config):
    """Split "train" or "test" -> (data of uint8 (3, size, size) images and labels, class names). Of
    a folder, images are scaled and cut to squares. CIFAR is downloaded to data/ if missing."""
    size, train = config.image_size, split == "train"
    if dataset in ("shapes", "shapes-unseen"):
        shapes = SHAPES[:10] if dataset == "shapes" else SHAPES[10:]
        data = draw_shapes(5000 if train else 2000, shapes, 1 if train else 2, size)
        return data, [str(shape) for shape in shapes]
    square = transforms.Compose([
        transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    with blamed(f"{dataset} (a folder with {split}/CLASS/*, or CIFAR in data/)"):
        if dataset in ("cifar10", "cifar100"):
            data = getattr(datasets, dataset.upper())("data", train, square, download=True)
        else:
            data = datasets.ImageFolder(f"{dataset}/{split}", square)
        folders = {path.name for path in Path(dataset, "train").glob("*") if path.is_dir()}
        if len(data.classes) < 2 or folders not in (set(), set(data.classes)):
            raise ValueError("train/ and test/ differ, or one class")
        images, labels = zip(*DataLoader(data, 256))    # decoded once, kept in memory
    return TensorDataset(torch.cat(images), torch.cat(labels)), data.classes


# ===== 8. Teachers: public ones, and training where none is public ================================
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)            # mean, std
CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
USUAL = {"cifar10": CIFAR10, "cifar100": CIFAR100}      # of other data sets: IMAGENET
AKA = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/{0}-{2}.th"
EDA = "https://huggingface.co/edadaltocg/{0}_{1}/resolve/main/pytorch_model.bin"
PUBLIC_TEACHERS = {     # address, beginning of the file's SHA-256, mean and std    # stated %
    "resnet20_cifar10": (AKA, "12fca82f", IMAGENET),                             # 91.7
    "resnet32_cifar10": (AKA, "d509ac18", IMAGENET),                             # 92.6
    "resnet44_cifar10": (AKA, "014dd654", IMAGENET),                             # 93.1
    "resnet56_cifar10": (AKA, "4bfd9763", IMAGENET),                             # 93.4
    "resnet18_cifar10": (EDA, "f6562425", CIFAR10),                             # 94.98
    "resnet34_cifar10": (EDA, "", CIFAR10),         # no digest is known          95.4
    "resnet50_cifar10": (EDA, "600e3f79", CIFAR10),
    "resnet18_cifar100": (EDA, "d214f848", CIFAR100),
    "resnet34_cifar100": (EDA, "6c289529", CIFAR100)}


def find_teacher(config, classes):
    """The teacher, frozen, or None if one has to be trained. The file is the run's own teacher.pth,
    or --teacher-ckpt, or a public one, which stays in checkpoints/. The normalisation is --mean and
    --std, or what the file says, or that of the public teacher that it is, or the data set's."""
    path, name = Path(config.out, "teacher.pth"), f"{config.teacher}_{config.dataset}"
    if not path.exists() and config.teacher_ckpt:
        path = Path(config.teacher_ckpt)
    elif not path.exists() and name in PUBLIC_TEACHERS and config.image_size == 32:
        address, sha, _ = PUBLIC_TEACHERS[name]
        address = address.format(config.teacher, config.dataset, sha)
        path = Path("checkpoints", f"{name}-{sha or 'public'}.pth")
        with blamed(f"{path} (put {address} there)"):
            torch.hub.load_state_dict_from_url(         # checks the digest of what it downloads
                address, path.parent, "cpu", True, bool(sha), path.name, weights_only=True)
    elif not path.exists():
        return None
    known = {sha: pair for _, sha, pair in PUBLIC_TEACHERS.values()}
    digest = sha256(path.read_bytes()).hexdigest()[:8]
    return load_network(path, config.teacher, classes, config.image_size, config.mean, config.std,
                        known.get(digest, USUAL.get(config.dataset, IMAGENET))).to(config.device)


def train_teacher(config, k, data):
    """Supervised training of a teacher: SGD, one-cycle schedule, crops, flips.      [our choice]"""
    torch.manual_seed(config.seed)
    mean, std = USUAL.get(config.dataset, IMAGENET)
    net = build_model(config.teacher, k)
    model = Normalized(net, config.mean or mean, config.std or std).to(config.device)
    loader = DataLoader(data, 128, shuffle=True, drop_last=len(data) > 128)
    epochs, start = config.teacher_epochs, time.time()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    for epoch in range(1, epochs + 1):
        for images, labels in loader:
            with autocast(model.mean, config):
                logits = model(augment(to_float(images, config.device)))
            loss = F.cross_entropy(logits.float(), labels.to(config.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        left = (time.time() - start) / epoch * (epochs - epoch) / 60
        print(f"teacher, epoch {epoch}/{epochs}: minutes left {left:.1f}", flush=True)
    return model.eval().requires_grad_(False)


# ===== 9. A run: directory, resume, scores, main ==================================================
def save(thing, path):
    """torch.save by way of a temporary file: a crash leaves the old file or the new, never half."""
    with blamed(path), open(f"{path}.tmp", "wb") as file:
        torch.save(thing, file)
    Path(f"{path}.tmp").replace(path)


def save_network(model, path, arch, classes, size):
    """A Normalized network and what it is, all on the CPU: a file for `load_network`."""
    weights = {k: v.cpu() for k, v in model.net.state_dict().items()}
    save({"state_dict": weights, "arch": arch, "classes": classes, "image_size": size,
          "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}, path)


def score(name, network, test, probe, config):
    """Top-1 accuracy and linear probe of a network, in percent: printed and returned."""
    top = top1(*collect(network.eval(), test, config.device))
    probed = linear_probe(lambda x: read(network, x)[1], *probe, config.device)
    print(f"{name}: top-1 {top:.2f} %, linear probe {probed:.2f} %")
    return {"top-1": top, "linear probe": probed}


def train_and_log(state, test, train):
    """Call `train` on a state, new or saved. After each cycle write last.pt and the log."""
    config, out = state.config, Path(state.config.out)
    last, log = out / "last.pt", out / "metrics.jsonl"
    if last.exists() or log.exists():                   # begun; an error without last.pt
        with blamed(last):
            state.load_state_dict(torch.load(last, config.device, weights_only=True))
    save(state.state_dict(), last)                      # fails now, not in an hour, on a full disk
    first, start = state.cycle, time.time()
    def on_cycle(state, metrics):
        seconds = (time.time() - start) / (state.cycle - first)         # of one cycle
        metrics["minutes left"] = seconds * (config.cycles - state.cycle) / 60
        if state.cycle % config.eval_every == 0 or state.cycle == config.cycles:
            metrics["accuracy"] = top1(*collect(state.student.eval(), test, config.device))
        log.write_text("".join(json.dumps(row) + "\n" for row in state.history))
        save(state.state_dict(), last)
        print_cycle(state, metrics)
    return train(state.teacher, state.student, config, state, on_cycle)


def run(config, train=distill):
    """A whole run in the directory config.out. train: distill, or a loop like it."""
    if config.resume:
        with blamed(path := Path(config.resume, "config.json")):
            config = Config(**json.loads(path.read_text()) | {"resume": config.resume})
    test, classes = load_data(config.dataset, "test", config)
    probe = [load_data(config.probe_dataset, split, config)[0] for split in ("train", "test")]
    if config.eval_only:
        student = load_network(config.eval_only, "", classes, config.image_size, config.mean,
                               config.std).to(config.device)
        return score("student", student, test, probe, config)
    build_model(config.teacher, 2), build_model(config.student, 2)      # wrong names fail now
    load_prior(config.prior, len(classes))
    teacher, out = find_teacher(config, classes), Path(config.out)
    data = None if teacher else load_data(config.dataset, "train", config)[0]
    out.mkdir(parents=True, exist_ok=bool(config.resume))       # a new run has a new directory
    with filelock.FileLock(out / "lock", timeout=0):            # and one process at a time
        if not config.resume:
            (out / "config.json").write_text(json.dumps(vars(config), indent=1))
        teacher = teacher or train_teacher(config, len(classes), data)
        save_network(teacher, out / "teacher.pth", config.teacher, classes, config.image_size)
        torch.manual_seed(config.seed)
        net = build_model(config.student, len(classes))
        student = Normalized(net, teacher.mean.cpu(), teacher.std.cpu()).to(config.device)
        state = State(teacher, student, config)
        scores = {"teacher": score("teacher", teacher, test, probe, config)}
        print("low? check --mean, --std and the stem (3x3, stride 1)")
        scores["untrained"] = score("untrained", student, test, probe, config)
        train_and_log(state, test, train)
        utils.save_image(to_float(state.bank.images[-100:]), out / "samples.png", nrow=len(classes))
        save_network(student, out / "student.pt", config.student, classes, config.image_size)
        scores |= {"student": score("student", student, test, probe, config), "cycle": state.cycle}
        (out / "summary.json").write_text(json.dumps(scores, indent=1))


def main(argv=None):
    """Command line -> exit code: 0 done, 2 with one line that says what is wrong, 130 Ctrl-C."""
    if sys.platform == "linux":             # glibc then keeps freed memory for the next step,
        libc = ctypes.CDLL(None)            # which made a CPU 0 to 59 % faster
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 31 - 1)      # M_MMAP_MAX, M_TRIM_THRESHOLD
    config = None
    try:
        config = parse_args(argv)
        run(config)
    except KeyboardInterrupt:
        begun = config and Path(config.out, "config.json").exists()
        how = f"go on with --resume {config.out}" if begun else "nothing to resume"
        print(f"\ninterrupted: {how}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
