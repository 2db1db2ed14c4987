"""Tests of cae_dfkd.py: losses against slow computations, all of training against a second
implementation, checkpoints and networks of other people, the command line, README and file.

The test on real images looks in CAE_DFKD_DATA, else ../shared/data, or skips, saying so.
CAE_DFKD_SLOW=1 adds twenty kills, which take minutes.
"""
# SPDX-License-Identifier: MIT
import ast
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as M
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import cae_dfkd as C

HERE = Path(__file__).resolve().parent
REAL = Path(os.environ.get("CAE_DFKD_DATA", HERE.parent / "shared" / "data"))
SOURCE, README = (HERE / "cae_dfkd.py").read_text(), (HERE / "README.md").read_text()
TINY = dict(device="cpu", cycles=2, image_size=16, generator_width=16, synth_batch=20, lr_warmup=1,
            synth_steps=2, kd_steps=2, batch_size=20, bank_capacity=64, warmup_rounds=1)
draw_shapes = functools.cache(C.draw_shapes)    # runs in this process draw a tenth, once
C.draw_shapes = lambda n, shapes, *rest: draw_shapes(n // 10, tuple(shapes), *rest)
torch.manual_seed(0)


def start(arch="resnet8", **changes):
    """A teacher with lived-in BatchNorm statistics, a student; their settings, state."""
    torch.manual_seed(1)
    teacher, student = C.build_model(arch, 4), C.build_model("resnet8", 4)
    teacher(torch.rand(16, 3, 16, 16))
    config = C.Config(**TINY | changes)
    return teacher.eval(), student, config, C.State(teacher, student, config)


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ===== Losses: value and gradient against slow computations =======================================
def pasted(*names, imports="import torch\nimport torch.nn.functional as F"):
    """These names of cae_dfkd.py, their sources pasted into an empty file with these imports."""
    space = {}
    exec("\n\n".join([imports, *(inspect.getsource(getattr(C, name)) for name in names)]), space)
    return [space[name] for name in names]


def slow_kl(t, s, tau=1.0):
    t, s = (t / tau).softmax(1), (s / tau).softmax(1)
    return tau * tau * (t * (t / s).log()).sum(1)


def slow_cae(z, f, y, tau):
    p, rows = (F.cosine_similarity(z[:, None], f - f.mean(0), 2) / tau).exp(), range(len(z))
    below = [p[i, i] + sum(p[i, k] for k in rows if y[k] != y[i]) for i in rows]
    return -sum((p[i, i] / below[i]).log() for i in rows) / len(z)


def slow_contrastive(z, y, tau):
    p, rows, terms = (F.cosine_similarity(z[:, None], z, 2) / tau).exp(), range(len(z)), []
    for i in rows:
        pairs = [p[i, k] / (p[i].sum() - p[i, i]) for k in rows if k != i and y[k] == y[i]]
        terms += [-torch.stack(pairs).log().mean()] if pairs else []
    return sum(terms) / len(terms)


def slow_matching(heard):
    """Eq. 4, for x (B, C, H, W) or (B, C) that entered BatchNorm layers."""
    total = 0.0
    for norm, x, _ in heard:
        pixels, var = x.transpose(0, 1).flatten(1), norm.running_var + 1e-4         # (C, m)
        total += ((pixels.mean(1) - norm.running_mean) / var.sqrt()).norm()
        total += ((pixels.var(1, correction=0) - norm.running_var) / var).norm()
    return total / len(heard)


Y, (S, T, Z, E) = torch.tensor([0, 1, 2, 0, 1, 0]), 2 * torch.randn(4, 6, 5).double()
S[:3] = T[:3] + 0.3 * S[:3]                     # half of the rows agree on the argmax
ORACLES = {     # how to call the loss, a slow computation, the input
    "category_consistency_loss": (lambda f, x: f(x, Y),
                                  lambda x: -x.softmax(1)[range(6), Y].log().mean(), T),
    "adversarial_loss": (lambda f, x: f(*x), lambda x: -(
        slow_kl(x[1], x[0]) * (x[0].argmax(1) == x[1].argmax(1))).mean(), torch.stack([S, T])),
    "kd_loss": (lambda f, x: f(x, T, 3.0) + f(x, T),    # the second by default
                lambda x: (slow_kl(T, x, 3.0) + slow_kl(T, x, 20.0)).mean(), S),
    "category_aware_embedding_loss": (lambda f, x: f(x, E, Y) + f(x, E, Y, 0.2),
                                      lambda x: slow_cae(x, E, Y, 0.1) + slow_cae(x, E, Y, 0.2), Z),
    "contrastive_loss": (lambda f, x: f(x, Y) + f(x, Y, 0.3),
                         lambda x: slow_contrastive(x, Y, 0.1) + slow_contrastive(x, Y, 0.3), Z)}


@pytest.mark.parametrize("name", ORACLES)
def test_a_pasted_loss_has_the_right_value_and_gradient(name):
    call, slow, x = ORACLES[name]
    (loss,), x = pasted(name), x.clone().requires_grad_()
    torch.testing.assert_close(call(loss, x), slow(x), rtol=1e-9, atol=0)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (call(loss, x), slow(x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert theirs.abs().max() > 1e-3            # an oracle of a constant would prove nothing


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last", "vectors"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-9),
                                          (torch.bfloat16, 5e-3)])
def test_pasted_feature_matching_has_the_right_value_and_gradient(layout, dtype, error):
    x, norms = (torch.randn(3, 4, 2, 5) * 2 + 1).to(dtype), [nn.Identity(), nn.Identity()]
    x = x[..., 0, 0] if layout == "vectors" else x.to(memory_format=getattr(torch, layout))
    for norm in norms:
        norm.running_mean, norm.running_var = torch.randn(4).double(), torch.rand(4).double() + 0.5
    matching, _, listen = pasted("feature_matching_loss", "BatchStatistics", "listen",
                                 imports="import contextlib, torch\nF = torch.nn.functional")
    with listen(norms) as heard:
        nn.Sequential(*norms)(x.requires_grad_())
    exact = x.detach().double().requires_grad_()
    ours, theirs = matching(heard), slow_matching([(norm, exact, None) for norm in norms])
    ours.backward(), theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=min(error, 1e-5), atol=0, check_dtype=False)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=error, atol=error)
    with pytest.raises(ValueError, match="nothing was heard"):
        matching([])


ALL_LOSSES = {
    "ce": C.category_consistency_loss, "kd": lambda x, y: C.kd_loss(x, x.detach().flip(1)),
    "fm": lambda x, y: C.feature_matching_loss([(nn.BatchNorm2d(4), x, None)]),
    "adv": lambda x, y: C.adversarial_loss(x, x.detach().flip(1) * 0.5 + x.detach()),
    "cae": lambda x, y: C.category_aware_embedding_loss(x, x.detach().flip(1), y),
    "cncl": C.contrastive_loss}
BATCHES = {     # rows, the category of each
    "one row": (torch.randn(1, 4), "2"), "one class": (torch.randn(5, 4), "11111"),
    "no pair": (torch.randn(4, 4), "0123"), "zeros": (torch.zeros(6, 4), "001123"),
    "alike": (torch.ones(6, 4), "001123"), "huge": (torch.randn(6, 4) * 1e4, "001123"),
    "tiny": (torch.randn(6, 4) * 1e-20, "001123"), "hard": (2e4 * torch.eye(4) - 1e4, "0012")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_are_finite(name, batch, dtype):
    x, y = BATCHES[batch]
    x, y = x.to(dtype).requires_grad_(), torch.tensor([int(k) for k in y])
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = ALL_LOSSES[name](x, y)
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()
    if (name, batch) in (("cncl", "one row"), ("cncl", "no pair"), ("cae", "one class")):
        assert value == 0                       # nothing to compare


# ===== CEND, generator, bank, crops, places =======================================================
@pytest.mark.parametrize("n, kurtosis", [(0, 3), (1, 1.8), (2, 6), (3, 1)])
def test_cend_scales_embeddings_and_draws_each_noise_at_its_magnitude(n, kurtosis):
    labels, magnitudes = torch.arange(3).repeat(16_000), [3.0 * (i == n) for i in range(4)]
    cend = C.CEND(torch.randn(3, 8) * 7 + 3, magnitudes)
    noise = cend(labels) - cend.embeddings[labels]
    loud = noise[noise.abs().sum(1) > 0] / 3
    assert abs(len(loud) - 12_000) < 500        # the other sources are silent
    assert abs(loud.mean()) < 0.02 and abs(loud.var() - 1) < 0.03
    assert loud.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.1)
    for e, rank in ((cend.embeddings, 2), (C.CEND(torch.randn(10, 4)).embeddings, 4)):
        assert e.mean(0).abs().max() < 1e-5
        assert e.square().sum(1).mean().item() == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("size", [7, 16, 32, 45, 224])
def test_pasted_cend_generator_and_bank_fit_together(size):
    cend, generator, bank, _ = pasted("CEND", "Generator", "MemoryBank", "to_float",
                                      imports="import math, torch\nfrom torch import Tensor, nn")
    labels, bank = torch.arange(4), bank(10, size)
    images = generator(6, size)(cend(torch.rand(4, 6))(labels)).detach()
    assert images.shape == (4, 3, size, size) and 0 <= images.min() and images.max() <= 1
    bank.push(images, labels)
    drawn, kinds = bank.sample(7)
    torch.testing.assert_close(drawn, images[kinds], rtol=0, atol=0.5 / 255 + 1e-6)


def test_bank_keeps_the_newest_clamps_and_refuses_nan():
    bank = C.MemoryBank(5, 2)
    with pytest.raises(RuntimeError):           # nothing to sample
        bank.sample(1)
    for labels in (torch.arange(4), torch.arange(12), torch.arange(12, 15)):
        bank.push(((labels - 11) / 2.5).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)
    images, labels = bank.sample(100)
    expected = ((labels - 11) / 2.5).clamp(0, 1)
    torch.testing.assert_close(images[:, 0, 0, 0], expected, rtol=0, atol=0.5 / 255 + 1e-6)
    with pytest.raises(FloatingPointError, match="not finite"):
        bank.push(images[:1] * math.nan, labels[:1])
    assert set(labels.tolist()) == {10, 11, 12, 13, 14} and bank.pushed == 19


def crop(images, draws, mode):
    """What `augment` does, image by image."""
    size, views = images.shape[-1], []
    for image, (down, across, flip) in zip(F.pad(images, (4,) * 4, mode), draws.tolist()):
        view = image[:, int(down * 9):, int(across * 9):][:, :size, :size]
        views.append(view.flip(2) if flip < 0.5 else view)
    return torch.stack(views)


def test_crops_and_places_are_those_of_each_image():
    for mode in ("constant", "reflect"):
        images = torch.rand(40, 3, 16, 16)
        with torch.random.fork_rng():
            draws = torch.rand(40, 3)
        assert torch.equal(C.augment(images, mode), crop(images, draws, mode))
    fine, places = torch.arange(5 * 8 * 8.0).view(5, 1, 8, 8), torch.rand(5, 50, 2)
    coarse = fine[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    rows = [C.read_places(m, places) for m in (fine, coarse, coarse[:, :, ::2, ::2])]
    assert rows[0].flatten().tolist() == [64 * i + 8 * int(8 * y) + int(8 * x)
                                          for i in range(5) for y, x in places[i].tolist()]
    assert torch.equal(rows[1], rows[2])        # the same places in maps of other resolutions


# ===== Checkpoints ================================================================================
def test_networks_are_those_of_the_papers():
    for arch, number in dict(resnet8=75_290, resnet20=269_722, resnet32=464_154, resnet44=658_586,
                             resnet56=853_018, resnet18=11_173_962, resnet34=21_282_122,
                             resnet50=23_520_842).items():
        assert sum(p.numel() for p in C.build_model(arch, 10).parameters()) == number, arch
    shortcut, x = C.build_model("resnet20", 10).layer2[0].downsample, torch.rand(2, 16, 8, 8)
    assert torch.equal(shortcut(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))   # option A


@pytest.mark.parametrize("arch, wrapper, prefix, renamed", [
    ("resnet18", "net", "", {"downsample": "shortcut", "fc.": "linear."}),              # kuangliu
    ("resnet20", "state_dict", "module.", {"fc.": "linear."}),                          # akamaster
    ("resnet50", "model", "", {"fc.": "classifier."}), ("resnet34", "", "", {})])       # timm
def test_public_layouts_load_and_give_the_same_logits(arch, wrapper, prefix, renamed, tmp_path):
    net, x, stored = C.build_model(arch, 10).eval(), torch.rand(2, 3, 32, 32).double(), {}
    for key, value in net.state_dict().items():
        if value.ndim == 1:                     # BatchNorm as after training
            value.uniform_(0.5, 1.5)
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        if not prefix or "_tracked" not in key:                         # old files lack counters
            stored[prefix + key] = value
    torch.save({wrapper: stored, "epoch": 3} if wrapper else stored, tmp_path / "t.pth")
    teacher = C.load_teacher(arch, 10, tmp_path / "t.pth", (0, 0, 0), (1, 1, 1))
    torch.testing.assert_close(teacher.double()(x), net.double()(x))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_normalisation_from_argument_file_and_default(tmp_path):
    net, x, path = C.build_model("resnet8", 10).eval(), torch.rand(2, 3, 32, 32), tmp_path / "t.pth"
    inside, given, usual = (((m, 0.2, 0.3), (0.4, 0.5, 0.6)) for m in (0.1, 0.4, 0.7))
    for stored, args, wanted in (
            (inside, (*given, usual), given), (inside, (None, None, usual), inside),
            ((), (None, None, usual), usual), ((), (), C.IMAGENET)):
        torch.save({"net": net.state_dict()} | dict(zip(("mean", "std"), stored)), path)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in wanted)
        teacher = C.load_teacher("resnet8", 10, path, *args)
        torch.testing.assert_close(teacher(x), net((x - mean) / std))


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, {"epoch": 3}, [1, 2],
                                     b"cos\nmkdir\n(Vexploded\ntR."])   # calls os.mkdir
def test_foreign_checkpoints_are_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "t.pth")
    if isinstance(content, bytes):
        Path("t.pth").write_bytes(content)
    with pytest.raises(ValueError, match="t.pth is no resnet8 with 10 classes"):
        C.load_teacher("resnet8", 10, "t.pth")
    assert not Path("exploded").exists()


# ===== Networks of other people ===================================================================
class Own(nn.Module):
    """The head comes first, another is unused; gates for channels and places; a mean for pool."""
    def __init__(self, norm):
        super().__init__()
        self.fc, self.unused, self.norm = nn.Linear(16, 7), nn.Linear(16, 7), norm
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.look = nn.Sequential(nn.Conv2d(16, 1, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.two(self.norm(self.one(x)).relu())
        return self.fc((x * self.gate(x) * self.look(x)).mean((2, 3)))


def network(name):
    torch.manual_seed(4)
    one, two, relu = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
    last = nn.Flatten(), nn.Linear(16, 16), relu, nn.Linear(16, 7)
    vit = M.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=7)
    nn.init.normal_(vit.heads.head.weight)      # torchvision's is all zeros
    own = {"own": Own(nn.BatchNorm2d(8)), "no norm": Own(nn.Identity()), "vit": vit,
           "one ReLU": nn.Sequential(one, relu, two, relu, nn.AdaptiveAvgPool2d(1), relu, *last)}
    own["resnet8"] = C.build_model("resnet8", 7)
    return own[name] if name in own else getattr(M, name)(num_classes=7)


NETWORKS = {    # name: (head, number of maps)
    "shufflenet_v2_x0_5": ("fc", 4), "mobilenet_v2": ("classifier.1", 4), "swin_t": ("head", 0),
    "mobilenet_v3_small": ("classifier.3", 4), "mnasnet0_5": ("classifier.1", 4), "own": ("fc", 2),
    "densenet121": ("classifier", 4), "efficientnet_b0": ("classifier.1", 4), "no norm": ("fc", 2),
    "regnet_y_400mf": ("fc", 4), "resnext50_32x4d": ("fc", 4), "convnext_tiny": ("classifier.2", 3),
    "vgg11_bn": ("classifier.6", 5), "one ReLU": ("9", 2), "vit": ("heads.head", 0)}
SQUEEZED = "classifier.1", ["features.5"]       # of squeezenet1_0: its head is a 1x1 convolution


@pytest.mark.parametrize("name", NETWORKS)
def test_where_a_network_is_read(name):
    net, x = network(name).eval().requires_grad_(False), torch.rand(2, 3, 32, 32)
    head, maps = C.find_layers(net, x[:1])
    logits, f, read = C.read(net, x, (head, maps))
    assert (head, len(read)) == NETWORKS[name] and torch.equal(logits, net(x))
    torch.testing.assert_close(net.get_submodule(head)(f), logits)
    assert torch.equal(C.forward_with_embedding(net, x)[1], f)
    assert not any(getattr(net.get_submodule(m), "in_channels", 0) == 3 for m in maps)      # patch
    assert all(m.ndim == 4 and m.shape[1] > 3 and m.shape[2] > 1 for m in read)             # gate
    sizes = [m.shape[2] for m in read]
    assert sizes == sorted(set(sizes))          # coarsest first


@pytest.mark.filterwarnings("ignore:the teacher has no BatchNorm", "ignore:no feature maps")
@pytest.mark.parametrize("teacher, student", [
    ("vit", "resnet8"), ("mobilenet_v3_small", "own"), ("squeezenet1_0", "own"),
    *(("resnet8", name) for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small", "own", "no norm",
                                     "one ReLU", "vit", "squeezenet1_0"))])
def test_networks_of_other_people_teach_and_learn(teacher, student):
    small = dict(image_size=32, synth_batch=8, batch_size=8, kd_steps=1, cycles=1, warmup_rounds=0)
    pair, config, seen = [network(teacher), network(student)], C.Config(**TINY | small), {}
    layers = [SQUEEZED if name == "squeezenet1_0" else None for name in (teacher, student)]
    before = copy.deepcopy(pair[1].state_dict())
    state = C.State(*pair, config, teacher_layers=layers[0], student_layers=layers[1])
    C.distill(*pair, config, state=state, on_cycle=lambda state, metrics: seen.update(metrics))
    assert seen["kd"] > 0 and seen["cae"] > 0   # and finite, else distill had raised
    assert not same(before, pair[1]) and all(v.isfinite().all() for v in pair[1].parameters())


# ===== A second implementation of the method: by hand, with the same random numbers ===============
def outputs(net, x):
    """Of a CIFAR ResNet: logits, embedding, maps (coarsest first)."""
    one = net.layer1(torch.relu(net.bn1(net.conv1(x))))
    three = net.layer3(two := net.layer2(one))
    return net.fc(three.mean((2, 3))), three.mean((2, 3)), [three, two, one]


def student_loss(teacher, student, heads, images, labels, c):
    """Eq. 7 to 10, for images (20, 3, 16, 16) of the bank."""
    images = crop(images, torch.rand(20, 3), "reflect")
    gain, shift = (2 * torch.rand(20, channels, 1, 1) - 1 for channels in (3, 1))
    images = (images * (1 + c.colour_jitter * gain) + c.colour_jitter * shift / 1.5).clamp(0, 1)
    places, of_place = torch.rand(20, c.places, 2), labels.repeat_interleave(c.places)
    (t, f, maps_t), (s, g, maps_s) = outputs(teacher, images), outputs(student, images)
    z = heads[0](g)
    l_cae = C.category_aware_embedding_loss(z, f.detach(), labels)
    for project, *maps in zip(heads[1], maps_s, maps_t):
        at_s, at_t = (torch.stack([m[i, :, int(y * len(m[0, 0])), int(x * len(m[0, 0]))]
                                   for i in range(20) for y, x in places[i].tolist()])
                      for m in maps)
        l_cae = l_cae + C.category_aware_embedding_loss(project(at_s), at_t.detach(), of_place)
    return (C.kd_loss(student_logits=s, teacher_logits=t, temperature=c.kd_temperature)
            + c.lambda_cae * l_cae + c.lambda_cncl * C.contrastive_loss(z, labels))


def descend(optimizer, loss, clip=0.0):
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    length = math.sqrt(sum(g.square().sum() for g in gradients))
    for gradient in gradients:
        gradient *= clip / (length + 1e-6) if 0 < clip < length else 1
    optimizer.step()


def by_hand(teacher, student, state, c):
    """Trains the student and the generator in `state` as `distill` should -> the bank, labels."""
    generator, heads = state.generator, (state.projection, state.place_projections)
    learning = [p for part in (student, *heads) for p in part.parameters()]
    sgd = torch.optim.SGD(learning, 1.0, momentum=0.9, weight_decay=1e-4, nesterov=True)
    adam = torch.optim.Adam(generator.parameters(), c.generator_lr, betas=(0.5, 0.999))
    pushed, size = 0, c.bank_capacity if c.decoupled else 20
    bank, kinds = torch.zeros(size, 3, 16, 16), torch.zeros(size, dtype=torch.long)
    turns, steps = (1, (c.synth_steps, c.kd_steps)) if c.decoupled else (c.kd_steps, (1, 1))
    for cycle, turn in np.ndindex(c.cycles, turns):
        if turn == 0:
            torch.manual_seed(1_000_003 * c.seed + cycle + 1)
        cosine = (1 + math.cos(math.pi * cycle / c.cycles)) / 2
        sgd.param_groups[0]["lr"] = c.student_lr * cosine * min(1, (cycle + 1) / c.lr_warmup)
        student.eval()
        for _ in range(1 + c.warmup_rounds if cycle == 0 and c.decoupled else 1):       # phase A
            labels = (torch.arange(20) + torch.randint(4, ())) % 4
            e_hat = state.cend(labels) if c.cend else torch.randn(20, 64)   # CEND: its own test
            if c.decoupled:
                generator.seed_layer.reset_parameters()
                adam = torch.optim.Adam(generator.parameters(), c.generator_lr, betas=(0.5, 0.999))
            for _ in range(steps[0]):
                images = generator(e_hat)                                               # eq. 3 to 6
                seen = crop(images, torch.rand(20, 3), "constant") if c.synth_crop else images
                with C.listen(m for m in teacher.modules() if hasattr(m, "running_mean")) as heard:
                    t, s = outputs(teacher, seen)[0], outputs(student, seen)[0]
                loss = (F.cross_entropy(t, labels) + c.lambda_fm * slow_matching(heard)
                        + c.lambda_adv * C.adversarial_loss(student_logits=s, teacher_logits=t))
                descend(adam, loss)
            where = (pushed + torch.arange(20)) % size
            bank[where], kinds[where] = (images.detach() * 255).round(), labels
            pushed += 20
        student.train()
        for _ in range(steps[1]):               # phase B
            i = torch.randint(min(pushed, size), (20,))
            loss = student_loss(teacher, student, heads, bank[i] / 255, kinds[i], c)
            descend(sgd, loss, c.clip_norm)
    return bank.to(torch.uint8), kinds


@pytest.mark.parametrize("switch", [
    {}, {"decoupled": False}, {"cend": False, "synth_crop": False}, {"lambda_cae": 0.0},
    {"places": 0, "colour_jitter": 0.1, "prior": "index"}, {"clip_norm": 0.5},
    {"lambda_fm": 0.0, "lambda_adv": 0.0, "lambda_cncl": 0.0}])
def test_distill_is_the_method_step_by_step(switch, monkeypatch, request):
    # In float64, so that rounding never decides which number a pixel of the bank gets.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    settings = dict(cycles=3, lr_warmup=2, seed=5, generator_lr=2e-3, kd_temperature=3.0,
                    student_lr=0.1, lambda_fm=3.0, lambda_adv=5.0, lambda_cae=2.0, lambda_cncl=0.5,
                    clip_norm=0.0)
    teacher, student, config, state = start(**settings | switch)
    _, other_student, other = twin = copy.deepcopy((teacher, student, state))
    bank, kinds = by_hand(*twin, config)
    C.distill(teacher.train(), student, config, state=state)    # the mode is not the caller's task
    for ours, theirs in ((student, other_student), (state.generator, other.generator)):
        ours, theirs = dict(ours.state_dict()), dict(theirs.state_dict())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert torch.equal(state.bank.images, bank) and torch.equal(state.bank.labels, kinds)


# ===== What distill promises ======================================================================
def test_distill_touches_neither_data_nor_the_teacher_nor_frozen_layers(monkeypatch):
    C.distill(*start()[:3])                     # what torch imports late is imported now
    teacher, student, config, _ = start("resnet20")
    teacher.train().bn1.eval()
    teacher.fc.requires_grad_(False)
    student.layer1.requires_grad_(False)
    def flags():
        return ([p.requires_grad for p in teacher.parameters()],
                [(m.training, *m._forward_hooks) for m in teacher.modules()])
    before, of_student = copy.deepcopy((teacher.state_dict(), flags())), copy.deepcopy(student)
    with monkeypatch.context() as patch:
        for name in ("cae_dfkd.load_data cae_dfkd.DataLoader cae_dfkd.datasets torch.load io.open "
                     "cae_dfkd.draw_shapes numpy.load socket.socket os.open builtins.open").split():
            patch.setattr(name, lambda *args, **kw: pytest.fail("distill reached for data"))
        assert C.distill(teacher, student, config) is student and not student.training
    assert same(teacher, before[0]) and flags() == before[1]
    for (name, p), old in zip(student.named_parameters(), of_student.parameters()):
        assert p.requires_grad == (not torch.equal(p, old)) == ("layer1" not in name)


def test_the_same_seed_gives_the_same_and_a_weight_of_zero_no_loss(monkeypatch):
    students = [C.distill(*start(seed=seed)[:3]) for seed in (0, 0, 1)]
    assert same(*students[:2]) and not same(*students[1:])
    for name in ("feature_matching", "adversarial", "contrastive", "category_aware_embedding"):
        monkeypatch.setattr(C, name + "_loss", lambda *args: pytest.fail("of weight zero"))
    C.distill(*start(lambda_fm=0.0, lambda_adv=0.0, lambda_cncl=0.0, lambda_cae=0.0)[:3])


def test_numbers_that_are_not_finite_do_no_harm(monkeypatch):
    *args, _ = start(kd_steps=1)
    def broken(self):                           # in the last step of a cycle
        self.param_groups[0]["params"][0].data.fill_(math.nan)
    monkeypatch.setattr(torch.optim.SGD, "step", broken)
    with pytest.raises(FloatingPointError, match="'cycle': 1.*'weight_norm': nan"):
        C.distill(*args, on_cycle=lambda *args: pytest.fail("may be saved"))


def test_what_does_not_fit_is_refused_and_own_parameter_groups_are_annealed():
    teacher, student, config, state = start()
    more, minutes, rates = C.build_model("resnet8", 5), C.Config(**TINY | dict(minutes=1.0)), []
    alike, other = torch.ones(4, 9), copy.deepcopy(student)
    for wrong in ((teacher, config), (more, config), (student, minutes), (student, config, alike),
                  (other, config, None, state)):
        with pytest.raises(ValueError):
            C.distill(teacher, *wrong)
    with pytest.warns(UserWarning, match="eq. 4 is off"):
        C.State(network("no norm"), network("own"), config)
    first, *others = state.student_optimizer.param_groups[0]["params"]
    groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}]
    state.student_optimizer = torch.optim.SGD(groups)
    C.distill(teacher, student, config, state=state, on_cycle=lambda state, metrics: rates.extend(
        group["lr"] for group in state.student_optimizer.param_groups))
    assert rates == pytest.approx([0.1, 0.02, 0.05, 0.01])


def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a number off a tensor makes the host wait for a GPU: inside the phases none is."""
    teacher, _, config, state = start()
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    monkeypatch.setattr(C.MemoryBank, "push", lambda *args: None)       # reads one, once a round
    for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split():
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("reads a tensor"))
    C.synthesis_round(state, teacher, config, 2)
    state.bank.pushed = 20
    C.distillation_phase(state, teacher, config, 2)


# ===== Evaluation and data ========================================================================
def test_linear_probe_separates_a_separable_toy_and_chooses_l2_on_held_out_images(monkeypatch):
    x, y = torch.rand(400, 3, 8, 8) * 0.3, torch.arange(400) % 3
    x[torch.arange(400), y] += 0.6              # the class is the brightest channel
    train, test = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])
    extractor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = nn.Sequential(*extractor, nn.Linear(3, 2))             # its head plays no part
    results = [C.linear_probe(net, train, test) for net in (classifier, classifier, extractor)]
    assert results[0] == results[1] == results[2] and results[0]["accuracy"] == 100
    real, fitted = C.fit_logistic, []
    def only_one_strength_works(x, y, k, l2):
        fitted.append(len(x))
        return tuple(part * (l2 == 1e-2) for part in real(x, y, k, l2))
    monkeypatch.setattr(C, "fit_logistic", only_one_strength_works)
    assert C.linear_probe(extractor, train, test) == {"accuracy": 100, "l2": 1e-2}
    assert fitted == [270] * 4 + [300]


def test_shapes_are_seeded_and_their_splits_disjoint(monkeypatch):
    monkeypatch.setattr(C, "draw_shapes", draw_shapes.__wrapped__)
    train, test, again = (C.load_data("shapes", split, C.Config())[0].tensors
                          for split in ("train", "test", "test"))
    assert all(map(torch.equal, test, again)) and test[1].bincount().min() > 100
    assert len({image.numpy().tobytes() for image in torch.cat([train[0], test[0]])}) == 7000


# ===== Command line ===============================================================================
FAST = ("--device cpu --teacher resnet8 --teacher-epochs 1 --cycles 2 --generator-width 16 "
        "--synth-batch 20 --synth-steps 2 --kd-steps 2 --batch-size 20 --bank-capacity 64 "
        "--warmup-rounds 1").split()


def main(words):
    """The exit code of a command line; of a tiny run unless it resumes one."""
    try:
        return C.main([*FAST * ("--resume" not in words), *words.split()])
    except SystemExit as end:                   # by argparse
        return end.code


def logged(out):
    lines = Path(out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["cycle"] for line in lines]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a finished run, runs/a, and with what makes others fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        assert main("--eval-every 1 --out runs/a") == 0
        for place in ("few/train/a few/train/b few/test/a few/test/b torn/train/a torn/train/b "
                      "torn/test/a torn/test/b differ/train/a differ/train/b differ/test/a "
                      "differ/test/c lonely/train/a lonely/test/a empty bad/key bad/torn bad/range "
                      "bad/last").split():
            Path(place).mkdir(parents=True)
            if "/t" in place:
                Image.effect_noise((64, 64), 50).save(f"{place}/x.png")
        os.truncate("torn/test/b/x.png", 200)
        np.save("wrong.npy", np.eye(7)), np.save("nan.npy", np.eye(10) * math.nan)
        net = C.build_model("resnet8", 10).state_dict()
        torch.save(net, "fine.pth")
        torch.save({k: v * math.nan for k, v in net.items()}, "nan.pth")
        torch.save({"net": net, "mean": "0.5"}, "mean.pth")
        Path("text.pth").write_text("Good")     # begins as a pickle may
        for name, old, new in (("key", "{", '{"colour": 1,'), ("torn", "}", ""), ("last", "", ""),
                               ("range", '"kd_steps": 2', '"kd_steps": -2')):
            text = Path("runs/a/config.json").read_text().replace(old, new, 1)
            Path("bad", name, "config.json").write_text(text)
        saved = torch.load("runs/a/last.pt")
        torch.save(saved | {"bank.labels": torch.zeros(3)}, "bad/last/last.pt")
        yield Path.cwd()


@pytest.fixture
def here(workdir, monkeypatch):
    """In that folder, with probes that cost nothing."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})


def test_a_run_directory_is_complete_and_scored_alike_later(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    files = "config.json last.pt metrics.jsonl samples.png student.pt summary.json".split()
    assert sorted(path.name for path in Path("runs/a").iterdir()) == files
    summary, lines = json.loads(Path("runs/a/summary.json").read_text()), logged("runs/a")
    top, probe = summary["student"].values()
    assert {"student", "teacher", "untrained"} < summary.keys() and lines == [1, 2]
    assert f'"accuracy": {top}}}\n' in Path("runs/a/metrics.jsonl").read_text()
    assert main("--eval-only runs/a/student.pt") == 0
    assert re.search(f"student: top-1 {top:.2f} %.* {probe:.2f} %", capsys.readouterr().out)


@pytest.mark.parametrize("mode", ["decoupled", "no-decoupled"])
def test_resume_is_exact(mode, here, monkeypatch, capsys):
    whole, cut = f"runs/{mode}-whole", f"runs/{mode}-cut"
    assert main(f"--{mode} --seed 3 --out {whole}") == 0
    assert list(Path("checkpoints").glob("shapes_resnet8_1epochs_seed3_*.pth"))
    real = C.save
    def interrupted(thing, path):
        if path.name == "last.pt" and thing["_extra_state"][2] == 2:
            raise KeyboardInterrupt             # cycle 2 is logged, but not saved
        real(thing, path)
    with monkeypatch.context() as patch:
        patch.setattr(C, "save", interrupted)
        assert main(f"--{mode} --seed 3 --out {cut}") == 130
    assert f"--resume {cut}" in capsys.readouterr().err and logged(cut) == [1, 2]
    for _ in range(2):                          # the second time it is a finished run
        assert main(f"--resume {cut}") == 0
        one, other = torch.load(f"{whole}/last.pt"), torch.load(f"{cut}/last.pt")
        *states, _, _ = zip(one.pop("_extra_state"), other.pop("_extra_state"))     # not seconds
        for ours, theirs in states:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert same(one, other) and logged(cut) == [1, 2]


def test_minutes_are_those_of_all_cycles_also_of_a_resumed_run(here, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))      # a second a look
    monkeypatch.setattr(C, "print_cycle", Mock(side_effect=[None, KeyboardInterrupt, *3 * [None]]))
    assert main("--minutes 0.0833 --out runs/minutes") == 130           # 5 seconds
    assert main("--resume runs/minutes") == 0 and logged("runs/minutes") == [1, 2, 3, 4, 5]


def test_a_signal_says_how_to_go_on_and_two_runs_get_two_directories(workdir):
    words = [*FAST, *"--cycles 100000 --dataset few --probe-dataset few".split()]
    runs = [(number, subprocess.Popen(          # SIGINT would be ignored in the background
        [sys.executable, str(HERE / "cae_dfkd.py"), *words], cwd=workdir, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))
        for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        for number, run in runs:
            for _ in range(3000):               # of a twentieth of a second
                if run.poll() is not None or list(workdir.glob(f"runs/*_{run.pid}/last.pt")):
                    break
                time.sleep(0.05)
            run.send_signal(number)
            (out,) = workdir.glob(f"runs/*_{run.pid}")
            assert f"--resume runs/{out.name}" in str(run.communicate()) and run.returncode == 130
    finally:
        for _, run in runs:
            run.kill()


def test_a_public_teacher_is_fetched_once_and_checked(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": C.build_model("resnet8", 10).state_dict()}, "served.pth")
    digest = hashlib.sha256(Path("served.pth").read_bytes()).hexdigest()[:8]
    for row in ((f"file://{tmp_path}/served.pth", "00000000"), ("file:///nowhere.pth", "12345678")):
        monkeypatch.setitem(C.PUBLIC_TEACHERS, "shapes_resnet8", row)
        assert main("--out run") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(f"error: .*checkpoints/shapes_resnet8-{row[1]}.pth", error)
        assert [path.name for path in tmp_path.rglob("*.*")] == ["served.pth"]
    row = f"file://{tmp_path}/served.pth", digest
    monkeypatch.setitem(C.PUBLIC_TEACHERS, "shapes_resnet8", row)
    assert main("--out run") == 0
    Path("served.pth").unlink()                 # now it is in checkpoints/
    assert main("--out again --mean .4 .5 .6 --std .2 .3 .4") == 0
    means = [torch.load(f"{out}/student.pt")["mean"] for out in ("run", "again")]
    assert means == [pytest.approx(C.IMAGENET[0]), pytest.approx([0.4, 0.5, 0.6])]


def test_help_names_every_field_and_debug_raises(capsys):
    assert main("--help") == 0
    text, fields = re.sub(r"[\s,]+", " ", capsys.readouterr().out), vars(C.Config())
    assert all(f" --{name.replace('_', '-')} " in text for name in fields)
    assert text.count("(default: ") == len(fields)
    preset = C.SHAPES_PRESET | {"student_lr": 0.3, "student": "resnet8"}
    assert vars(C.parse_args(["--student-lr", "0.3"])).items() >= preset.items()    # typed: first
    big = C.parse_args("--dataset cifar10 --teacher resnet34 --no-cend".split())
    assert (big.student, big.cycles, big.cend) == ("resnet18", C.Config().cycles, False)
    with pytest.raises(ValueError, match="kd_steps is -1"):
        main("--debug --kd-steps -1")


WRONG = """--bank-capacity 900000000|--colour 3|--cycles 1.5|--dataset nowhere|--dataset torn
--no-cend --no-decoupled|--dataset differ|--dataset lonely|--dataset cifar10|--device nonsense
--eval-only absent.pt|--eval-only fine.pth|--eval-only text.pth
--eval-only runs/a/student.pt --dataset shapes-unseen|--eval-only runs/a/student.pt --image-size 16
--kd-steps many|--kd-steps -1|--kd-steps 0|--lambda-fm 1e13|--magnitudes -1|--mean 1|--mean 0 0
--min 1|--minutes nan|--out text.pth/run|--out .|--out empty|--out runs/a|--out text.pth
--prior absent.npy|--prior nan.npy|--prior wrong.npy|--prior word|--probe-dataset nowhere
--probe-dataset differ|--resume empty|--resume runs/none|--resume runs/a --kd-steps 9
--resume text.pth|--resume bad/key|--resume bad/torn|--resume bad/range|--resume bad/last
--student resnet99|--student-lr nan|--student-lr 1e400|--teacher resnet99|--teacher-ckpt absent.pth
--teacher-ckpt text.pth|--teacher-ckpt mean.pth|--teacher-ckpt nan.pth
--teacher-ckpt fine.pth --teacher resnet20|word"""


@pytest.mark.parametrize("words", re.split(r"[|\n]", WRONG))
def test_wrong_input_is_one_line_and_code_2(words, here, monkeypatch, capsys):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in Path(".").rglob("*")}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: open("no network"))
    before = files()
    assert main(words if re.search("--out|--resume", words) else words + " --out runs/bad") == 2
    assert re.fullmatch(r"(\S+: )?error: .{9,}\n", capsys.readouterr().err)
    assert files() == before


# A run whose checkpoints take their time: most kills fall into the writing of one.
KILLED = """
import sys, time, cae_dfkd as C
def slow(thing, path, write=C.torch.save):
    path.write_bytes(b"half")
    time.sleep(0.3)
    write(thing, path)
C.torch.save = slow
sys.exit(C.main())
"""


@pytest.mark.skipif("CAE_DFKD_SLOW" not in os.environ, reason="minutes; CAE_DFKD_SLOW=1 runs it")
def test_twenty_kills_change_nothing(here):
    words = "--cycles 200 --dataset few --probe-dataset few --out runs/"
    assert main(words + "unbroken") == 0
    moments, kills, out = np.random.default_rng(0), 0, Path("runs/killed")
    while not (out / "summary.json").exists():
        how = [*FAST, *f"{words}killed".split()]
        how = ["--resume", str(out)] if (out / "config.json").exists() else how
        run = subprocess.Popen([sys.executable, "-c", KILLED, *how],
                               env={**os.environ, "PYTHONPATH": str(HERE)})
        try:
            assert run.wait(moments.uniform(2, 6) if kills < 20 else None) == 0
        except subprocess.TimeoutExpired:
            run.kill(), run.wait()
            kills += 1
        assert not (out / "last.pt").exists() or torch.load(out / "last.pt")     # never a half
    student, other = (torch.load(f"runs/{name}/student.pt") for name in ("unbroken", "killed"))
    assert kills == 20 and same(student["state_dict"], other["state_dict"])
    assert logged(out) == list(range(1, 201))


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(),
                    reason=f"REAL DATA ABSENT: {REAL}/cifar10; set CAE_DFKD_DATA to test on it")
def test_the_public_teacher_scores_on_real_images_what_it_should(here, capsys):
    real = f"--teacher resnet20 --dataset {REAL}/cifar10 --teacher-ckpt {REAL}/resnet20_cifar10.th"
    assert main(f"{real} --prior {REAL}/clip_vitb32_cifar10.npy --out runs/real") == 0
    assert "teacher: 91.64 %" in capsys.readouterr().out


# ===== The file and the README ====================================================================
def test_file_keeps_its_promises():
    nodes, lines = list(ast.walk(ast.parse(SOURCE))), SOURCE.splitlines()
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    assert max(f.end_lineno - f.lineno for f in functions) < 50
    assert len(lines) <= 1100 and max(map(len, lines)) <= 100 and ".cuda(" not in SOURCE
    assert "# ===== 6" in "\n".join(lines[:760])    # the method ends before
    named = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [n for n in nodes if isinstance(n, named) and ast.get_docstring(n)]
    texts = "\n".join(map(ast.get_docstring, documented))
    assert all(re.search(rf"[Ee]q\. {k}\b", texts) for k in range(1, 11))
    prose = {i for n in documented for i in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    code = [line.split("  #")[0].strip() for i, line in enumerate(lines, 1) if i not in prose]
    code = [len(line) for line in code if line and line[0] != "#"]
    assert sum(code) / len(code) <= 46


def test_readme_keeps_its_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"python cae_dfkd\.py([^`\n]*)", README)
    assert len(README.splitlines()) <= 130 and len(commands) >= 4
    for words in commands:
        assert "--resume" in words or C.parse_args(words.split())
    rows = re.findall(r"^\| (\d+) \|.*\[`(\w+)`\]\(cae_dfkd\.py#L(\d+)\)", README, re.M)
    assert [int(row[0]) for row in rows] == list(range(1, 11))
    for _, name, line in rows:
        assert re.match(rf"(def|class) {name}\b", SOURCE.splitlines()[int(line) - 1]), name
    assert all((HERE / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)", README))
    assert max(map(len, README.splitlines())) <= 120
    log = (HERE / ".github/experiments.md").read_text().replace("−", "-")
    results = "".join(re.findall(r"^\|.*\n", README.split("## Results")[1], re.M)).replace("−", "-")
    numbers = re.findall(r"[+-]?\d+\.\d(?: ± \d+\.\d)?", results)
    assert len(numbers) > 40 and not [n for n in numbers if n not in log]     # none without its run
    snippets = re.findall(r"```python\n((?!import clip).*?)```", README, re.S)
    assert snippets
    for text in snippets:
        exec(compile(text, "README.md", "exec"), {})
