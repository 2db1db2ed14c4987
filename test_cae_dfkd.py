"""Tests of cae_dfkd.py: losses against slow computations, all of training against a second
implementation, checkpoints and networks of other people, the command line, the file.

The test on real images looks in CAE_DFKD_DATA, else ../shared/data, or skips, saying so. Tests of
the scripts, of the README and of twenty kills are in .github/scripts.
"""
import ast
import copy
import doctest
import functools
import hashlib
import inspect
import json
import math
import os
import re
import socket
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
SOURCE = (HERE / "cae_dfkd.py").read_text()
TINY = dict(device="cpu", cycles=2, image_size=16, generator_width=16, synth_batch=20,
            synth_steps=2, kd_steps=2, batch_size=20, warmup_rounds=1)
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
def pasted(*names, imports="import math, torch\nimport torch.nn.functional as F"):
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


def slow_matching(layers, inputs):
    """Eq. 4, for x (B, C, H, W) or (B, C) that entered BatchNorm layers."""
    total = 0.0
    for layer, x in zip(layers, inputs):
        pixels, var = x.transpose(0, 1).flatten(1), layer.running_var + 1e-4        # (C, m)
        total += ((pixels.mean(1) - layer.running_mean) / var.sqrt()).norm()
        total += ((pixels.var(1, correction=0) - layer.running_var) / var).norm()
    return total / len(layers)


Y, (S, T, Z, E) = torch.tensor([0, 1, 2, 0, 1, 0]), 2 * torch.randn(4, 6, 5).double()
S[:3] = T[:3] + 0.3 * S[:3]                     # half of the rows agree on the argmax
ORACLES = {     # how to call the loss, a slow computation, the input
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
    ours, theirs = call(loss, x), slow(x)       # ours is of float32
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, x)[0] for value in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert theirs.abs().max() > 1e-3            # an oracle of a constant would prove nothing


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last", "vectors"])
def test_pasted_feature_matching_has_the_right_value_and_gradient(layout, dtype, error):
    x, layers = (torch.randn(3, 4, 2, 5) * 2 + 1).to(dtype), [nn.BatchNorm2d(4) for _ in range(2)]
    x = x[..., 0, 0] if layout == "vectors" else x.to(memory_format=getattr(torch, layout))
    for layer in layers:
        layer.running_mean, layer.running_var = torch.randn(4), torch.rand(4) + 0.5
    (matching,) = pasted("feature_matching_loss")
    for wrong in (layers, [x, x]), ([], []):
        with pytest.raises(ValueError, match="BatchNorm layers, in eval mode"):
            matching(*wrong)
    exact = x.detach().double().requires_grad_()
    layers = [layer.eval() for layer in layers]
    ours, theirs = matching(layers, [x.requires_grad_()] * 2), slow_matching(layers, [exact] * 2)
    ours.backward(), theirs.backward()
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=error, atol=error)


def test_losses_raise_half_precision_and_let_no_gradient_into_targets():
    s, t = (4 * torch.randn(64, 10).bfloat16() for _ in range(2))
    assert torch.equal(C.kd_loss(s, t), C.kd_loss(s.float(), t.float()))
    y = torch.arange(64) % 5
    for half in (s, s.half()):
        assert C.category_aware_embedding_loss(half, t, y).dtype == torch.float32
        assert C.contrastive_loss(half, y).dtype == torch.float32
    s, t = s.float().requires_grad_(), t.float().requires_grad_()
    (C.kd_loss(s, t) + C.category_aware_embedding_loss(s, t, y)).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    assert not C.CEND(nn.Linear(8, 5).weight)(y).requires_grad          # the obvious call


ALL_LOSSES = {
    "kd": lambda x, y: C.kd_loss(x, x.detach().flip(1)),
    "fm": lambda x, y: C.feature_matching_loss([nn.BatchNorm2d(4).eval()], [x]),
    "adv": lambda x, y: C.adversarial_loss(x, x.detach().flip(1) * 0.5 + x.detach()),
    "cae": lambda x, y: C.category_aware_embedding_loss(x, x.detach().flip(1), y),
    "cncl": C.contrastive_loss}
BATCHES = {     # rows, the category of each
    "one row": (torch.randn(1, 4), "2"), "one class": (torch.randn(5, 4), "11111"),
    "no pair": (torch.randn(4, 4), "0123"), "zeros": (torch.zeros(6, 4), "001123"),
    "alike": (torch.ones(6, 4), "001123"), "huge": (torch.randn(6, 4) * 1e4, "001123")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_bank_keeps_the_newest_and_clamps():
    bank = C.MemoryBank(5, 2)
    for labels in (torch.arange(4), torch.arange(12), torch.arange(12, 15)):
        bank.push(((labels - 11) / 2.5).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)
    images, labels = bank.sample(100)
    expected = ((labels - 11) / 2.5).clamp(0, 1)
    torch.testing.assert_close(images[:, 0, 0, 0], expected, rtol=0, atol=0.5 / 255 + 1e-6)
    assert set(labels.tolist()) == {10, 11, 12, 13, 14} and len(bank.images) == 5


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


@pytest.mark.parametrize("arch, wrapper, prefix, renamed", [
    ("resnet18", "net", "", {"downsample": "shortcut", "fc.": "linear."}),              # kuangliu
    ("resnet20", "state_dict", "module.", {"fc.": "linear."}),                          # akamaster
    ("resnet50", "model", "_orig_mod.module.", {"fc.": "classifier."}),                 # compiled
    ("resnet8", "model_state_dict", "", {}), ("resnet34", "", "", {})])                 # timm
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
    teacher = C.load_network(tmp_path / "t.pth", arch, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(teacher.double()(x), net.double()(x))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_normalisation_from_argument_file_and_default(tmp_path):
    net, x, path = C.build_model("resnet8", 10).eval(), torch.rand(2, 3, 32, 32), tmp_path / "t.pth"
    inside, given, usual = (((m, 0.2, 0.3), (0.4, 0.5, 0.6)) for m in (0.1, 0.4, 0.7))
    for stored, args, wanted in (
            (inside, (*given, usual), given), (inside, ((), (), usual), inside),
            ((), ((), (), usual), usual), ((), (), C.IMAGENET)):
        torch.save({"net": net.state_dict()} | dict(zip(("mean", "std"), stored)), path)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in wanted)
        teacher = C.load_network(path, "resnet8", range(10), 32, *args)
        torch.testing.assert_close(teacher(x), net((x - mean) / std))


def test_a_file_that_says_what_it_is_is_held_to_it(tmp_path):
    path, kinds = tmp_path / "student.pt", ["cat", "dog"]
    C.save_network(C.Normalized(C.build_model("resnet8", 2), *C.IMAGENET), path, "resnet8", kinds,
                   16)
    assert C.load_network(path).net.fc.out_features == 2 and len(list(tmp_path.iterdir())) == 1
    assert C.load_network(path, "resnet8", kinds, 16)(torch.rand(1, 3, 16, 16)).shape == (1, 2)
    for wrong in (("resnet20",), ("resnet8", ["dog", "cat"]), ("resnet8", kinds, 32)):
        with pytest.raises(ValueError, match="student.pt as .*: its (arch|classes|image_size) is"):
            C.load_network(path, *wrong)


def test_foreign_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ({"state_dict": {"a": torch.zeros(1)}}, {"epoch": 3}, [1, 2]):
        torch.save(content, "t.pth")
        with pytest.raises(ValueError, match="t.pth as resnet8: "):
            C.load_network("t.pth", "resnet8", range(10))
    Path("t.pth").write_bytes(b"cos\nmkdir\n(Vexploded\ntR.")           # calls os.mkdir
    with pytest.raises(ValueError, match="t.pth as "):
        C.load_network("t.pth")
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


class Attention(nn.Module):
    """Its softmax and dropout give (B, heads, 16, 16), which look like maps and are none."""
    def __init__(self):
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(-1), nn.Dropout(0.0)

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = x[:, :, ::4, ::4].flatten(2).view(b, 4, c // 4, 16)
        attention = self.dropout(self.softmax(tokens.transpose(2, 3) @ tokens))
        return x * attention.mean((1, 2, 3))[:, None, None, None]


def network(name):
    torch.manual_seed(4)
    one, two, relu = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
    last = nn.Flatten(), nn.Linear(16, 16), relu, nn.Linear(16, 7)
    vit = M.VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=7)
    nn.init.normal_(vit.heads.head.weight)      # torchvision's is all zeros
    attention = nn.Sequential(one, Attention(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(8, 7))
    own = {"own": Own(nn.BatchNorm2d(8)), "no norm": Own(nn.Identity()), "vit": vit,
           "one ReLU": nn.Sequential(one, relu, two, relu, nn.AdaptiveAvgPool2d(1), relu, *last),
           "attention": attention}
    own["resnet8"] = C.build_model("resnet8", 7)
    return own[name] if name in own else getattr(M, name)(num_classes=7)


NETWORKS = {    # name: number of maps
    "shufflenet_v2_x0_5": 4, "mobilenet_v2": 4, "mobilenet_v3_small": 4, "mnasnet0_5": 4, "vit": 0,
    "densenet121": 4, "efficientnet_b0": 4, "regnet_y_400mf": 4, "resnext50_32x4d": 4, "own": 2,
    "convnext_tiny": 3, "vgg11_bn": 5, "one ReLU": 2, "no norm": 2, "swin_t": 0, "attention": 1}


@pytest.mark.parametrize("name", NETWORKS)
def test_where_a_network_is_read(name):
    net, x = network(name).eval().requires_grad_(False), torch.rand(2, 3, 32, 32)
    logits, f, maps, head = C.read(net, x)
    assert torch.equal(logits, net(x)) and len(maps) == NETWORKS[name]
    torch.testing.assert_close(head(f), logits)
    assert all(m.shape[1] > 3 and m.shape[2] == m.shape[3] > 1 for m in maps)
    sizes = [m.shape[2] for m in maps]
    assert sizes == sorted(set(sizes)) and max(sizes, default=0) <= 32          # coarsest first


class Odd(nn.Module):
    """A network whose output is not (B, K) from an nn.Linear."""
    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = C.build_model("resnet8", 4), kind

    def forward(self, x):
        y = self.body(x)
        if self.kind == "aux":                  # as GoogLeNet, in train mode alone
            return (y, y) if self.training else y
        return {"tuple": (y, y), "dict": {"logits": y}, "softmax": y.softmax(1),
                "tokens": self.body.fc(torch.rand(len(x), 5, 64)).mean(1),
                "convolution": nn.Conv2d(3, 4, 16)(x).flatten(1)}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "softmax", "tokens", "convolution", "aux"])
def test_other_outputs_are_refused_with_the_remedy(kind):
    teacher, _, config, _ = start()
    with pytest.raises(ValueError, match="must be an nn.Linear: wrap it"):
        C.distill(teacher, Odd(kind), config)


def test_networks_that_do_not_fit_are_refused():
    teacher, student, config, state = start()
    for other, said in ((C.build_model("resnet8", 5), "5 and 4 categories"),
                        (teacher, "shared weights"), (nn.Sequential(teacher), "shared weights")):
        with pytest.raises(ValueError, match=said):
            C.State(teacher, other, config)
    other_config = C.Config(**TINY | dict(positions=1))
    for args in ((teacher, C.build_model("resnet8", 4), config), (teacher, student, other_config)):
        with pytest.raises(ValueError, match="of other arguments"):
            C.distill(*args, state)
    with pytest.raises(ValueError, match="BatchNorm"):
        C.distill(network("no norm"), network("own"), C.Config(**TINY))
    teacher = network("own").eval()             # its head is defined first, another one after it
    state = C.State(teacher, network("resnet8"), C.Config(**TINY))
    assert torch.equal(state.cend.embeddings, C.CEND(teacher.fc.weight).embeddings)


@pytest.mark.parametrize("teacher, student", [
    ("vit", "resnet8"), ("mobilenet_v3_small", "own"),
    *(("resnet8", name) for name in ("shufflenet_v2_x0_5", "mobilenet_v3_small", "own", "no norm",
                                     "one ReLU", "vit", "swin_t", "attention"))])
def test_networks_of_other_people_teach_and_learn(teacher, student, capsys):
    small = dict(image_size=32, synth_batch=8, batch_size=8, kd_steps=1, cycles=1, warmup_rounds=0)
    small |= {"lambda_fm": 0.0} if teacher == "vit" else {}
    pair, seen = [network(teacher), network(student)], {}
    before = copy.deepcopy(pair[1].state_dict())
    C.distill(*pair, C.Config(**TINY | small), on_cycle=lambda state, metrics: seen.update(metrics))
    assert seen["kd"] > 0 and seen["cae"] > 0   # and finite, else distill had raised
    assert not same(before, pair[1]) and all(v.isfinite().all() for v in pair[1].parameters())
    no_maps = not NETWORKS.get(teacher, 3) * NETWORKS.get(student, 3)
    assert ("eq. 8 compares maps: []" in capsys.readouterr().out) == no_maps


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
    images = (images * (1 + 0.3 * gain) + 0.3 * shift / 1.5).clamp(0, 1)
    places, of_place = torch.rand(20, c.positions, 2), labels.repeat_interleave(c.positions)
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
    generator, heads = state.generator, (state.projection, state.map_projections)
    learning = [p for part in (student, *heads) for p in part.parameters()]
    sgd = torch.optim.SGD(learning, 1.0, momentum=0.9, weight_decay=1e-4, nesterov=True)
    adam = torch.optim.Adam(generator.parameters(), c.generator_lr, betas=(0.5, 0.999))
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    bank, kinds = torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.long)
    turns, steps = (1, (c.synth_steps, c.kd_steps)) if c.decoupled else (c.kd_steps, (1, 1))
    for cycle, turn in np.ndindex(c.cycles, turns):
        if turn == 0:
            torch.manual_seed(1_000_003 * c.seed + cycle + 1)
        cosine = (1 + math.cos(math.pi * cycle / c.cycles)) / 2
        sgd.param_groups[0]["lr"] = c.student_lr * cosine * min(1, (cycle + 1) / 5)
        student.eval()
        for _ in range(1 + c.warmup_rounds if cycle == 0 and c.decoupled else 1):       # phase A
            labels = (torch.arange(20) + torch.randint(4, ())) % 4
            e_hat = state.cend(labels) if c.cend else torch.randn(20, 64)   # CEND: its own test
            if c.decoupled:
                generator.seed_layer.reset_parameters()
                adam = torch.optim.Adam(generator.parameters(), c.generator_lr, betas=(0.5, 0.999))
            for _ in range(steps[0]):
                images, inputs = generator(e_hat), []                                   # eq. 3 to 6
                hooks = [m.register_forward_hook(lambda m, x, y: inputs.append((m, x[0])))
                         for m in layers]
                seen = crop(images, torch.rand(20, 3), "constant")
                t, s = outputs(teacher, seen)[0], outputs(student, seen)[0]
                [hook.remove() for hook in hooks]
                loss = (F.cross_entropy(t, labels) + c.lambda_fm * slow_matching(*zip(*inputs))
                        + c.lambda_adv * C.adversarial_loss(student_logits=s, teacher_logits=t))
                descend(adam, loss)
            bank = torch.cat([bank, (images.detach() * 255).round()])
            kinds = torch.cat([kinds, labels])
        student.train()
        for _ in range(steps[1]):               # phase B
            i = torch.randint(len(bank), (20,))
            loss = student_loss(teacher, student, heads, bank[i] / 255, kinds[i], c)
            descend(sgd, loss, 10.0)
    return bank.to(torch.uint8), kinds


@pytest.mark.parametrize("switch", [
    {}, {"decoupled": False}, {"cend": False}, {"lambda_cae": 0.0}, {"kd_temperature": 0.2},
    {"positions": 0, "prior": "index"}, {"lambda_fm": 0.0, "lambda_adv": 0.0, "lambda_cncl": 0.0}])
def test_distill_is_the_method_step_by_step(switch, monkeypatch, request):
    # In float64, so that rounding never decides which number a pixel of the bank gets.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    settings = dict(cycles=3, seed=5, generator_lr=2e-3, kd_temperature=3.0, student_lr=0.1,
                    lambda_fm=3.0, lambda_adv=5.0, lambda_cae=2.0, lambda_cncl=0.5)
    teacher, student, config, state = start(**settings | switch)
    _, other_student, other = copy.deepcopy((teacher, student, state))
    bank, kinds = by_hand(copy.deepcopy(teacher), other_student, other, config)
    C.distill(teacher.train(), student, config, state)  # the mode is not the caller's task
    for ours, theirs in ((student, other_student), (state.generator, other.generator)):
        ours, theirs = dict(ours.state_dict()), dict(theirs.state_dict())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert torch.equal(state.bank.images, bank) and torch.equal(state.bank.labels, kinds)


# ===== What distill promises ======================================================================
def test_distill_touches_neither_data_nor_the_teacher_nor_frozen_layers(monkeypatch):
    C.distill(*start()[:3])                     # what torch imports late is imported now
    teacher, student, config, _ = start("resnet20")
    student.layer1.requires_grad_(False)
    before, flags = copy.deepcopy(teacher), [p.requires_grad for p in teacher.parameters()]
    of_student = copy.deepcopy(student)
    with monkeypatch.context() as patch:
        for name in ("cae_dfkd.load_data cae_dfkd.DataLoader cae_dfkd.datasets torch.load io.open "
                     "cae_dfkd.draw_shapes numpy.load socket.socket os.open builtins.open").split():
            patch.setattr(name, lambda *args, **kw: pytest.fail("distill reached for data"))
        assert C.distill(teacher, student, config) is student and not student.training
    assert same(teacher, before) and all(p.grad is None for p in teacher.parameters())
    assert flags == [p.requires_grad for p in teacher.parameters()]
    assert not any(m._forward_hooks for m in [*teacher.modules(), *student.modules()])
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


def test_a_generator_of_ones_own_learns_and_lines_are_printed(capsys):
    layers = nn.Linear(64, 3 * 16 * 16), nn.Sigmoid(), nn.Unflatten(1, (3, 16, 16))     # no reset
    teacher, student, config, _ = start()
    state = C.State(teacher, student, config, generator=nn.Sequential(*layers))
    before = layers[0].weight.clone()
    C.distill(teacher, student, C.Config(**TINY, out="later"), state)       # made apart, equal
    assert not torch.equal(before, layers[0].weight)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("eq. 8 compares maps: [((64, 4, 4), (64, 4, 4)), ((32, 8, 8), ")
    assert lines[-1].startswith("cycle 2, ce ") and len(lines) == 3


def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a number off a tensor makes the host wait for a GPU: inside the phases none is."""
    *_, state = start()
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split():
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("reads a tensor"))
    C.decoupled_cycle(state)


# ===== Evaluation and data ========================================================================
def test_linear_probe_separates_a_separable_toy_and_chooses_l2_on_held_out_images(monkeypatch):
    x, y = torch.rand(400, 3, 8, 8) * 0.3, torch.arange(400) % 3
    x[torch.arange(400), y] += 0.6              # the class is the brightest channel
    train, test = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])
    embed = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    probe = pasted("linear_probe", "fit_logistic", "collect", "top1", "to_float",
                   imports="import torch\nimport torch.nn.functional as F\n"
                           "from torch.utils.data import DataLoader")[0]
    assert probe(embed, train, test) == C.linear_probe(embed, train, test) == 100
    real, fitted = C.fit_logistic, []
    def only_one_strength_works(x, y, k, l2):
        fitted.append((len(x), l2))
        return tuple(part * (l2 == 1e-2) for part in real(x, y, k, l2))
    monkeypatch.setattr(C, "fit_logistic", only_one_strength_works)
    assert C.linear_probe(embed, train, test) == 100
    assert [n for n, _ in fitted] == [270] * 4 + [300] and fitted[-1][1] == 1e-2


def test_shapes_are_seeded_and_their_splits_disjoint():
    train, test, again = (draw_shapes.__wrapped__(900, C.SHAPES, seed, 32) for seed in (1, 2, 2))
    assert all(map(torch.equal, test.tensors, again.tensors))
    assert len({image.numpy().tobytes() for image, _ in [*train, *test]}) == 1800


# ===== Command line ===============================================================================
FAST = ("--device cpu --teacher resnet8 --teacher-epochs 1 --cycles 2 --generator-width 16 "
        "--synth-batch 20 --synth-steps 2 --kd-steps 2 --batch-size 20 --warmup-rounds 1").split()


def main(words):
    """The exit code of a command line; of a tiny run unless it resumes one."""
    try:
        return C.main([*FAST * ("--resume" not in words), *words.split()])
    except SystemExit as end:                   # by argparse
        return end.code


def logged(out):
    return [json.loads(line)["cycle"] for line in Path(out, "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        assert main("--eval-every 1 --out runs/a") == 0
        for place in ("few/train/a few/train/b few/test/a few/test/b torn/train/a torn/train/b "
                      "torn/test/a torn/test/b differ/train/a differ/train/b differ/test/a "
                      "differ/test/c lonely/train/a lonely/test/a untaught/test/a untaught/test/b "
                      "empty bad/key bad/torn bad/range bad/last bad/gone").split():
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
                               ("range", '"kd_steps": 2', '"kd_steps": -2'), ("gone", "", "")):
            text = Path("runs/a/config.json").read_text().replace(old, new, 1)
            Path("bad", name, "config.json").write_text(text)
            for file in ("teacher.pth", "metrics.jsonl"):
                Path("bad", name, file).write_bytes(Path("runs/a", file).read_bytes())
        Path("bad/last/last.pt").write_bytes(Path("runs/a/last.pt").read_bytes()[:5000])
        yield Path.cwd()


@pytest.fixture
def here(workdir, monkeypatch):             # with probes that cost nothing
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: 0.0)


def test_a_run_directory_is_complete_and_scored_alike_later(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    names = "config.json last.pt lock metrics.jsonl samples.png student.pt summary.json teacher.pth"
    assert sorted(path.name for path in Path("runs/a").iterdir()) == names.split()
    summary = json.loads(Path("runs/a/summary.json").read_text())
    top, probe = summary["student"].values()
    assert logged("runs/a") == [1, 2] and {"cycle", "teacher", "untrained"} < summary.keys()
    assert f'"accuracy": {top}}}\n' in Path("runs/a/metrics.jsonl").read_text()
    assert main("--eval-only runs/a/student.pt") == 0
    assert re.search(f"student: top-1 {top:.2f} %.* {probe:.2f} %", capsys.readouterr().out)
    monkeypatch.setattr(C, "score", lambda name, network, *rest: print(network.mean.sum()))
    assert main("--eval-only runs/a/student.pt --mean 9 9 9") == 0
    assert "27" in capsys.readouterr().out
    C.run(C.parse_args([*FAST, "--out", "runs/b", "--teacher-ckpt", "runs/a/teacher.pth"]))
    assert same(*(torch.load(f"runs/{x}/student.pt")["state_dict"] for x in "ab"))


@pytest.mark.parametrize("mode", ["decoupled", "no-decoupled"])
def test_resume_is_exact_and_alone(mode, here, monkeypatch, capsys):
    whole, cut = f"runs/{mode}-whole", f"runs/{mode}-cut"
    Path("own.pth").write_bytes(Path("runs/a/teacher.pth").read_bytes())
    words = f"--{mode} --seed 3 --teacher-ckpt own.pth --out "
    assert main(words + whole) == 0
    real = C.save
    def interrupted(thing, path):
        if path.name == "last.pt" and len(thing["history"]) == 2:
            assert main(f"--resume {cut}") == 2     # a second process; cycle 2 is logged, not saved
            assert f"{cut}/lock" in capsys.readouterr().err
            raise KeyboardInterrupt
        real(thing, path)
    with monkeypatch.context() as patch:
        patch.setattr(C, "save", interrupted)
        assert main(words + cut) == 130
    assert f"--resume {cut}" in capsys.readouterr().err and logged(cut) == [1, 2]
    torch.save(C.build_model("resnet8", 10).state_dict(), "own.pth")    # it has its own copy
    Path(f"{cut}/metrics.jsonl").unlink()       # last.pt has the log as well
    own = Path(f"{cut}/teacher.pth").rename("kept.pth")
    assert main(f"--resume {cut}") == 2 and "another teacher" in capsys.readouterr().err
    own.rename(f"{cut}/teacher.pth")
    for _ in range(2):                          # the second time it is a finished run
        assert main(f"--resume {cut}") == 0
        one, other = torch.load(f"{whole}/last.pt"), torch.load(f"{cut}/last.pt")
        for part in one.keys() - {"history"}:   # which holds the minutes
            torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
        assert logged(cut) == [1, 2]


def test_a_run_that_is_stopped_while_its_teacher_learns_can_be_resumed(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(C, "train_teacher", Mock(side_effect=KeyboardInterrupt))
        assert main("--seed 4 --out runs/early") == 130
    assert "--resume runs/early" in capsys.readouterr().err
    assert main("--resume runs/early") == main("--seed 4 --out runs/late") == 0
    assert same(*(torch.load(f"runs/{x}/student.pt")["state_dict"] for x in ("early", "late")))
    with monkeypatch.context() as patch:        # before there is a directory
        patch.setattr(C, "load_data", Mock(side_effect=KeyboardInterrupt))
        assert main("--out runs/never") == 130
    assert "nothing to resume" in capsys.readouterr().err and not Path("runs/never").exists()


def test_a_public_teacher_is_fetched_and_known_again(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": C.build_model("resnet8", 10).state_dict()}, "served.pth")
    digest = hashlib.sha256(Path("served.pth").read_bytes()).hexdigest()[:8]
    pair = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    for row in ((f"file://{tmp_path}/served.pth", "00000000", pair), ("file:///no", "", pair)):
        monkeypatch.setitem(C.PUBLIC_TEACHERS, "resnet8_shapes", row)
        assert main("--out run") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"checkpoints/resnet8_shapes-{row[1] or 'public'}.pth (put {row[0]} there)" in error
        assert [path.name for path in tmp_path.rglob("*.*")] == ["served.pth"]
    row = f"file://{tmp_path}/served.pth", digest, pair
    monkeypatch.setitem(C.PUBLIC_TEACHERS, "resnet8_shapes", row)
    assert main("--out run") == 0
    ckpt = "--teacher-ckpt served.pth --out"
    assert main(f"{ckpt} given") == 0 and main(f"{ckpt} own --mean .4 .5 .6 --std 1 1 1") == 0
    Path("served.pth").unlink()                 # now it is in checkpoints/
    assert main("--out again") == 0
    means = [torch.load(f"{out}/student.pt")["mean"] for out in ("run", "given", "again", "own")]
    assert means == [pytest.approx(m) for m in [pair[0]] * 3 + [(0.4, 0.5, 0.6)]]


def test_help_names_every_field_and_settings_are_checked(capsys):
    assert main("--help") == 0
    text, fields = re.sub(r"[\s,]+", " ", capsys.readouterr().out), vars(C.Config())
    assert all(f" --{name.replace('_', '-')} " in text for name in fields)
    assert text.count("(default: ") == len(fields)
    preset = C.SHAPES_PRESET | {"student_lr": 0.3, "student": "resnet8"}
    assert vars(C.parse_args(["--student-lr", "0.3"])).items() >= preset.items()    # typed: first
    assert C.Config().cycles == 115             # in Python there is no preset
    big = C.parse_args("--dataset cifar10 --teacher resnet34 --no-cend".split())
    assert (big.student, big.cycles, big.cend) == ("resnet18", C.Config().cycles, False)
    for wrong in (dict(kd_temperature=0), dict(std=(1, 0, 1)), dict(cycles=0), dict(image_size=4),
                  dict(student_lr=math.nan), dict(lambda_cae=-1.0), dict(device="nonsense")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            C.Config(**wrong)


WRONG = """--colour 3|--cycles 1.5|--cycles 0|--dataset nowhere|--dataset torn|--dataset differ
--dataset lonely|--dataset untaught|--dataset cifar10|--device nonsense|--eval-only absent.pt
--eval-only fine.pth|--eval-only text.pth|--eval-only runs/a/student.pt --dataset shapes-unseen
--eval-only runs/a/student.pt --image-size 16|--image-size 4|--kd-steps many|--kd-steps -1
--kd-temperature 0|--lambda-fm inf|--magnitudes -1|--mean 1|--mean 0 0|--min 1|--std 0 0 0
--out text.pth/run|--out .|--out empty|--out runs/a|--out text.pth|--prior absent.npy
--prior nan.npy|--prior wrong.npy|--prior word|--probe-dataset nowhere|--probe-dataset differ
--resume empty|--resume runs/none|--resume runs/a --cycles 30|--resume text.pth|--resume bad/key
--resume bad/torn|--resume bad/range|--resume bad/last|--resume bad/gone|--student resnet99
--student-lr nan|--student-lr 1e400|--synth-steps 0|--teacher-ckpt absent.pth|word|--eval-only=
--teacher-ckpt text.pth|--teacher-ckpt mean.pth|--teacher-ckpt nan.pth|--seed 1700000000000000000
--teacher-ckpt fine.pth --teacher resnet20|--teacher-ckpt=|--teacher 20|full"""


@pytest.mark.parametrize("words", re.split(r"[|\n]", WRONG))
def test_wrong_input_is_one_line_code_2_and_leaves_all_as_it_was(words, here, monkeypatch, capsys):
    def files():
        return {path: path.is_file() and path.read_bytes() for path in Path(".").rglob("*")}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: open("no network"))
    monkeypatch.setattr(C, "train_teacher", lambda *args: pytest.fail("too late"))
    if words == "full":                         # a disk on which nothing can be written
        monkeypatch.setattr(Path, "write_text", Mock(side_effect=OSError("No space left")))
        words = ""
    before = files()
    assert main(words if re.search("--out|--resume", words) else words + " --out runs/bad") == 2
    assert re.search(r"error: .{9,}\n$", capsys.readouterr().err)
    after = files()
    kept = [k for k in before if k.name != "teacher.pth"]       # which a resumed run writes again
    assert [after[k] for k in kept] == [before[k] for k in kept]
    new = {k for k in after.keys() - before.keys() if k.name not in ("lock", "data")}
    assert not new or words == ""


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(),
                    reason=f"REAL DATA ABSENT: {REAL}/cifar10; set CAE_DFKD_DATA to test on it")
def test_the_public_teacher_scores_on_real_images_what_it_should(here, capsys):
    real = f"--teacher resnet20 --dataset {REAL}/cifar10 --teacher-ckpt {REAL}/resnet20_cifar10.th"
    assert main(f"{real} --prior {REAL}/clip_vitb32_cifar10.npy --out runs/real") == 0
    assert "teacher: top-1 91.64 %" in capsys.readouterr().out
    assert torch.load("runs/real/student.pt")["mean"] == pytest.approx(C.IMAGENET[0])   # known


# ===== The file ===================================================================================
def test_file_keeps_its_promises():
    nodes, lines = list(ast.walk(ast.parse(SOURCE))), SOURCE.splitlines()
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    assert max(f.end_lineno - f.lineno for f in functions) < 45
    assert len(lines) <= 1000 and max(map(len, lines)) <= 100 and ".cuda(" not in SOURCE
    assert "# ===== 6" in "\n".join(lines[:760])    # the method ends before
    assert doctest.testmod(C).attempted >= 8 and doctest.testmod(C).failed == 0
    named = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [n for n in nodes if isinstance(n, named) and ast.get_docstring(n)]
    texts = "\n".join(map(ast.get_docstring, documented))
    assert all(re.search(rf"[Ee]q\. {k}\b", texts) for k in range(1, 11))
    prose = {i for n in documented for i in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    code = [line.split("  #")[0].strip() for i, line in enumerate(lines, 1) if i not in prose]
    code = [len(line) for line in code if line and line[0] != "#"]
    assert sum(code) / len(code) <= 46
