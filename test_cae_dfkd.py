"""Tests of cae_dfkd.py: oracles, invariants, checkpoint layouts, the real command line, the README.

Run with `python -m pytest -q`. Tests that need real images look for ../shared/data (or the folder in
CAE_DFKD_DATA) and skip, saying so, where it is absent.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import cae_dfkd as C

HERE = Path(__file__).resolve().parent
REAL = Path(os.environ.get("CAE_DFKD_DATA", HERE.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(
    not (REAL / "cifar10").is_dir(), reason=f"REAL DATA ABSENT: {REAL}/cifar10; set CAE_DFKD_DATA to test on it"
)
SOURCE = (HERE / "cae_dfkd.py").read_text()
TINY = dict(
    precision="fp32",
    student_lr=0.1,
    lr_warmup=1,
    cycles=2,
    generator_width=16,
    synth_batch=20,
    synth_steps=2,
    kd_steps=2,
    batch_size=20,
    bank_capacity=64,
    warmup_rounds=1,
    image_size=16,
)


DRAW_SHAPES = C.draw_shapes


@pytest.fixture(scope="module", autouse=True)
def shapes_are_drawn_once():
    """Nobody changes them, and every run of `main` in this process would draw the same ones."""
    once = functools.cache(DRAW_SHAPES)
    C.draw_shapes = lambda n, names, seed, size=32: once(n, tuple(names), seed, size)
    yield
    C.draw_shapes = DRAW_SHAPES


def rng(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).standard_normal(shape) * scale


@pytest.fixture
def pair():
    """A small teacher with lived-in BatchNorm statistics, and a student: both take (B, 3, 16, 16)."""
    torch.manual_seed(1)
    teacher, student = C.build_model("resnet20", 4), C.build_model("resnet8", 4)
    for _ in range(3):
        teacher(torch.rand(16, 3, 16, 16))
    return teacher.eval(), student


def distilled(pair, **changes):
    teacher, student = pair
    return C.distill(teacher, student, C.Config(**{**TINY, **changes}))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- oracles: each loss against a slow computation, value and gradient -------------------------------


def log_softmax(row):
    top = max(row)
    return [v - top - math.log(sum(math.exp(u - top) for u in row)) for v in row]


def slow_ce(t, y):
    return sum(-log_softmax(row)[k] for row, k in zip(t, y)) / len(t)


def slow_kd(s, t, tau):
    total = 0.0
    for row_s, row_t in zip(s, t):
        ls, lt = log_softmax([v / tau for v in row_s]), log_softmax([v / tau for v in row_t])
        total += sum(math.exp(b) * (b - a) for a, b in zip(ls, lt))
    return tau * tau * total / len(s)


def slow_adversarial(s, t):
    total = 0.0
    for row_s, row_t in zip(s, t):
        if max(range(len(row_s)), key=lambda k: row_s[k]) == max(range(len(row_t)), key=lambda k: row_t[k]):
            total += sum(math.exp(b) * (b - a) for a, b in zip(log_softmax(row_s), log_softmax(row_t)))
    return -total / len(s)


def unit(row):
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def slow_cae(z, y, e, tau):
    return sum(-log_softmax([dot(unit(row), unit(other)) / tau for other in e])[k] for row, k in zip(z, y)) / len(z)


def slow_contrastive(z, y, tau):
    z, terms = [unit(row) for row in z], []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        if positives:
            below = sum(math.exp(dot(z[i], z[a]) / tau) for a in range(len(z)) if a != i)
            terms.append(-sum(math.log(math.exp(dot(z[i], z[p]) / tau) / below) for p in positives) / len(positives))
    return sum(terms) / len(terms) if terms else 0.0


def slow_statistics(x, mean, var):
    """Eq. 4 of one layer for x (B, C, H, W), pixel by pixel."""
    first = second = 0.0
    for c in range(x.shape[1]):
        pixels = [float(v) for v in x[:, c].flatten()]
        mu = sum(pixels) / len(pixels)
        first += (mu - mean[c]) ** 2
        second += (sum((p - mu) ** 2 for p in pixels) / len(pixels) - var[c]) ** 2
    return math.sqrt(first) + math.sqrt(second)


def numeric_gradient(f, x, h=1e-6):
    g = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        g[i] = (f(up) - f(down)) / (2 * h)
    return g


LABELS = [0, 1, 2, 0, 1, 0]
S, T, Z, E = rng(6, 4, seed=1, scale=2), rng(6, 4, seed=2, scale=2), rng(6, 5, seed=3), rng(4, 5, seed=4)
S[:3] = T[:3] + 0.3  # half of the rows agree on the argmax, half need not
ORACLES = {
    "eq3": (lambda x: C.category_consistency_loss(x, torch.tensor(LABELS)), lambda x: slow_ce(x, LABELS), T),
    "eq5 student": (lambda x: C.adversarial_loss(x, torch.tensor(T)), lambda x: slow_adversarial(x, T), S),
    "eq5 teacher": (lambda x: C.adversarial_loss(torch.tensor(S), x), lambda x: slow_adversarial(S, x), T),
    "eq7": (lambda x: C.kd_loss(x, torch.tensor(T), 3.0), lambda x: slow_kd(x, T, 3.0), S),
    "eq7 default": (lambda x: C.kd_loss(x, torch.tensor(T)), lambda x: slow_kd(x, T, 4.0), S),
    "eq8": (
        lambda x: C.category_aware_embedding_loss(x, torch.tensor(LABELS), torch.tensor(E), 0.2),
        lambda x: slow_cae(x, LABELS, E, 0.2),
        Z,
    ),
    "eq9": (lambda x: C.contrastive_loss(x, torch.tensor(LABELS), 0.3), lambda x: slow_contrastive(x, LABELS, 0.3), Z),
}


@pytest.mark.parametrize("name", ORACLES)
def test_loss_value_and_gradient(name):
    fast, slow, x = ORACLES[name]
    tensor = torch.tensor(x, requires_grad=True)
    value = fast(tensor)
    value.backward()
    assert value.shape == () and value.item() == pytest.approx(slow(x), rel=1e-9)
    np.testing.assert_allclose(tensor.grad.numpy(), numeric_gradient(slow, x), atol=1e-6)
    assert np.abs(tensor.grad.numpy()).max() > 1e-4  # an oracle of a constant would prove nothing


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-8)])
def test_statistics_value_and_gradient(layout, dtype, tolerance):
    x = rng(3, 4, 2, 5, seed=5) * 2 + 1
    mean, var = rng(4, seed=6), np.abs(rng(4, seed=7))
    tensor = torch.tensor(x, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    batch = C.BatchStatistics.apply(tensor)
    loss = C.statistics_distance(*batch, torch.tensor(mean, dtype=dtype), torch.tensor(var, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(slow_statistics(x, mean, var), rel=tolerance)
    expected = numeric_gradient(lambda v: slow_statistics(v, mean, var), x)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=max(tolerance, 1e-7))


def test_statistics_under_bf16_stay_close():
    x = torch.tensor(rng(8, 16, 8, 8) * 3 + 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    mean, var = C.BatchStatistics.apply(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0).float(), atol=1e-3, rtol=1e-3)


def test_feature_matching_is_the_mean_over_layers_and_leaves_no_hook(pair):
    teacher, _ = pair
    seen, x = [], torch.rand(4, 3, 16, 16)
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_hook(lambda m, a, o: seen.append((m, a[0].detach().clone()))) for m in layers]
    teacher(x)
    for handle in handles:
        handle.remove()
    slow = [slow_statistics(a, m.running_mean.tolist(), m.running_var.tolist()) for m, a in seen]
    x.requires_grad_()
    with C.FeatureMatching(teacher) as fm:
        teacher(x)
    loss = fm.loss()
    loss.backward()
    assert len(slow) == 19 and loss.item() == pytest.approx(sum(slow) / 19, rel=1e-4)
    assert x.grad.abs().sum() > 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())
    before = len(fm.seen)
    teacher(torch.rand(2, 3, 16, 16))
    assert len(fm.seen) == before
    with pytest.raises(RuntimeError), C.FeatureMatching(teacher):
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_feature_matching_without_batchnorm_is_zero():
    with C.FeatureMatching(nn.Linear(2, 2)) as fm:
        pass
    assert fm.loss().item() == 0


def test_objectives_are_weighted_sums():
    a, b, c = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(-5.0)
    assert C.generator_objective(a, b, c, 10.0, 0.5).item() == 2 + 30 - 2.5  # eq. 6
    assert C.student_objective(a, b, c, 10.0, 0.5).item() == 2 + 30 - 2.5  # eq. 10


ALL_LOSSES = {
    "ce": lambda x, y: C.category_consistency_loss(x, y),
    "adv": lambda x, y: C.adversarial_loss(x, x.detach().flip(1) * 0.5 + x.detach()),
    "kd": lambda x, y: C.kd_loss(x, x.detach().flip(1)),
    "cae": lambda x, y: C.category_aware_embedding_loss(x, y, torch.eye(4)),
    "cncl": lambda x, y: C.contrastive_loss(x, y),
}


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize(
    "x, y",
    [
        (torch.randn(1, 4), [2]),
        (torch.randn(5, 4), [1] * 5),
        (torch.randn(4, 4), [0, 1, 2, 3]),
        (torch.zeros(6, 4), [0, 0, 1, 1, 2, 3]),
        (torch.randn(6, 4) * 1e4, [0, 0, 1, 1, 2, 3]),
        (torch.randn(6, 4).bfloat16(), [0, 0, 1, 1, 2, 3]),
    ],
    ids=["one row", "one class", "no pair", "zeros", "extreme", "bf16"],
)
def test_losses_are_finite(name, x, y):
    for autocast in (False, True):
        x = x.clone().detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = ALL_LOSSES[name](x, torch.tensor(y))
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        assert loss <= 0 if name == "adv" else loss >= -1e-6
    if name == "cncl" and len(set(y)) == len(y):
        assert loss == 0


def test_within_class_variance():
    f = torch.tensor([[0.0, 0], [2, 0], [5, 5], [5, 5]])
    assert C.within_class_variance(f, torch.tensor([0, 0, 1, 1])).item() == 1.0
    assert C.within_class_variance(torch.randn(4, 2), torch.arange(4)).item() == 0


# --- CEND, generator, bank, augmentation ------------------------------------------------------------


@pytest.mark.parametrize("source", range(4))
def test_cend_sources(source):
    e = torch.tensor(rng(3, 8, seed=8)).float()
    cend = C.CEND(e, (1.0, 2.0, 3.0, 4.0))
    labels = torch.arange(3).repeat(4000)
    torch.manual_seed(0)
    e_hat, used = cend(labels, source)
    noise = (e_hat - e[labels]) / (source + 1)
    assert (used == source).all() and e_hat.shape == (12000, 8)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.03
    kurtosis = noise.pow(4).mean().item()
    assert kurtosis == pytest.approx([3, 1.8, 6, 1][source], rel=0.1)  # tells the four families apart


def test_cend_draws_every_source_and_takes_any_number():
    cend = C.CEND(torch.zeros(2, 4), tuple(range(1, 9)))
    torch.manual_seed(0)
    e_hat, source = cend(torch.zeros(8000, dtype=torch.long))
    assert torch.bincount(source, minlength=8).min() > 850
    for n in range(8):
        assert e_hat[source == n].std().item() == pytest.approx(n + 1, rel=0.06)
    rows = torch.tensor([3, 1])
    assert torch.equal(cend(torch.tensor([0, 1]), rows)[1], rows)


def test_prior_is_centred_and_scaled():
    for k, width, rank in ((10, 64, 9), (10, 4, 4)):
        e = C.category_prior(torch.tensor(rng(k, width) * 7 + 3))
        assert e.mean(0).abs().max() < 1e-5 and torch.linalg.matrix_rank(e) == rank
        assert e.square().sum(1).mean().item() == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_generator_shapes(size):
    x = C.Generator(12, size)(torch.randn(2, 12))
    assert x.shape == (2, 3, size, size) and 0 <= x.min() and x.max() <= 1


def test_light_generator_is_light():
    light, heavy = (
        sum(p.numel() for n, p in C.Generator(64, 32, w).named_parameters() if "project" not in n) for w in (64, 128)
    )
    assert heavy > 3.2 * light
    with pytest.raises(C.UserError, match="image size"):
        C.Generator(4, 33)


def test_bank_is_first_in_first_out():
    bank = C.MemoryBank(5, 2)
    for i in range(9):
        n = torch.tensor([i])
        bank.push(torch.full((1, 3, 2, 2), i / 255), n, n % 4)
    assert len(bank) == 5 and sorted(bank.labels.tolist()) == [4, 5, 6, 7, 8] and bank.images.dtype == torch.uint8
    images, labels, sources = bank.sample(100)
    assert torch.equal((images * 255).round()[:, 0, 0, 0].long(), labels) and torch.equal(labels % 4, sources)
    assert set(labels.tolist()) == {4, 5, 6, 7, 8}
    bank.push(torch.rand(12, 3, 2, 2), torch.arange(12), torch.zeros(12, dtype=torch.long))
    assert len(bank) == 5 and sorted(bank.labels.tolist()) == [7, 8, 9, 10, 11]


def test_augment_moves_and_flips_whole_images():
    torch.manual_seed(0)
    x = torch.arange(16.0).view(1, 1, 4, 4).expand(200, 3, 4, 4) / 16
    y = C.augment(x, pad=1)
    padded = F.pad(x[:1], (1, 1, 1, 1), mode="reflect")
    crops = [padded[0, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    views = crops + [crop.flip(2) for crop in crops]
    hits = [sum(torch.equal(row, v) for row in y) for v in views]
    assert sum(h > 0 for h in hits) == 18 and all(any(torch.equal(row, v) for v in views) for row in y)


# --- networks and checkpoints ------------------------------------------------------------------------

# from the papers and the public model zoo, 10 classes
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "wrn16_1": 175_066,
    "wrn16_2": 691_674,
    "wrn40_1": 563_930,
    "wrn40_2": 2_243_546,
    "vgg11": 9_231_114,
}


@pytest.mark.parametrize("arch", C.ARCHITECTURES)
def test_architectures(arch):
    model = C.build_model(arch, 10).eval()
    if arch in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    x = torch.rand(2, 3, 32, 32)
    logits, f = C.forward_with_embedding(model, x)
    assert logits.shape == (2, 10) and torch.equal(logits, model(x))
    torch.testing.assert_close(C.last_linear(model)(f), logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


def conv(w, key, x, stride=1, pad=1):
    return F.conv2d(x, w[key + ".weight"], w.get(key + ".bias"), stride, pad)


def bn(w, key, x):
    return F.batch_norm(x, *(w[f"{key}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))


def functional_resnet(w, x, plan, shortcut):
    """Basic-block ResNet straight from a state dict; shortcut names the keys, or None for option A."""
    x = F.relu(bn(w, "bn1", conv(w, "conv1", x)))
    for stage, blocks in enumerate(plan, 1):
        for i in range(blocks):
            p, stride = f"layer{stage}.{i}", 2 if i == 0 and stage > 1 else 1
            y = bn(w, p + ".bn2", conv(w, p + ".conv2", F.relu(bn(w, p + ".bn1", conv(w, p + ".conv1", x, stride)))))
            if f"{p}.{shortcut}.0.weight" in w:
                x = bn(w, f"{p}.{shortcut}.1", conv(w, f"{p}.{shortcut}.0", x, stride, 0))
            elif y.shape != x.shape:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
            x = F.relu(x + y)
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), w["linear.weight"], w["linear.bias"])


def functional_wrn(w, x, n):
    x = conv(w, "conv1", x)
    for stage in (1, 2, 3):
        for i in range(n):
            p, stride = f"block{stage}.layer.{i}", 2 if i == 0 and stage > 1 else 1
            y = F.relu(bn(w, p + ".bn1", x))
            short = conv(w, p + ".convShortcut", y, stride, 0) if p + ".convShortcut.weight" in w else x
            x = short + conv(w, p + ".conv2", F.relu(bn(w, p + ".bn2", conv(w, p + ".conv1", y, stride))))
    return F.linear(F.relu(bn(w, "bn1", x)).mean((2, 3)), w["fc.weight"], w["fc.bias"])


def functional_vgg(w, x):
    for block, convs in enumerate((1, 1, 2, 2, 2)):
        for i in range(convs):
            x = F.relu(bn(w, f"block{block}.{3 * i + 1}", conv(w, f"block{block}.{3 * i}", x)))
        x = F.max_pool2d(x, 2) if block < 3 else x
    return F.linear(x.mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


def lived_in(arch, **kw):
    """State dict with BatchNorm statistics and affine weights that are not 0 and 1."""
    torch.manual_seed(3)
    state = C.build_model(arch, 10, **kw).state_dict()
    for k, v in state.items():
        if k.endswith(("running_var", "bn1.weight", "bn2.weight")):
            v.uniform_(0.5, 1.5)
        elif v.ndim == 1 and v.is_floating_point():
            v.uniform_(-0.3, 0.3)
    return state


LAYOUTS = {  # name: (arch, keys as the public code writes them, its forward, extra build arguments)
    "kuangliu": (
        "resnet18",
        lambda k: k.replace("fc.", "linear.").replace("downsample", "shortcut"),
        lambda w, x: functional_resnet(w, x, (2, 2, 2, 2), "shortcut"),
        {},
    ),
    "akamaster": (
        "resnet20",
        lambda k: k.replace("fc.", "linear."),
        lambda w, x: functional_resnet(w, x, (3, 3, 3), None),
        {},
    ),
    "projection": (
        "resnet20",
        lambda k: k,
        lambda w, x: functional_resnet(
            {k.replace("fc.", "linear."): v for k, v in w.items()}, x, (3, 3, 3), "downsample"
        ),
        {"projection": True},
    ),
    "wrn": ("wrn16_2", lambda k: k, lambda w, x: functional_wrn(w, x, 2), {}),
    "vgg": ("vgg11", lambda k: k, functional_vgg, {}),
}


@pytest.mark.parametrize("container", ["raw", "state_dict", "module"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts_load_and_give_the_same_logits(layout, container, tmp_path):
    arch, rename, reference, kw = LAYOUTS[layout]
    w = {rename(k): v for k, v in lived_in(arch, **kw).items()}
    stored = {
        "raw": w,
        "state_dict": {"state_dict": w, "epoch": 3, "best_acc1": 95.7},
        "module": {"state_dict": {"module." + k: v for k, v in w.items() if "num_batches" not in k}},
    }[container]
    torch.save(stored, tmp_path / "t.pth")
    teacher = C.load_teacher(arch, 10, str(tmp_path / "t.pth"))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), reference(w, x), atol=1e-4, rtol=1e-4)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_normalisation_from_file_and_argument(tmp_path):
    torch.save({"state_dict": lived_in("resnet8"), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}, tmp_path / "t.pth")
    x, path = torch.rand(2, 3, 32, 32), str(tmp_path / "t.pth")
    plain = C.load_teacher("resnet8", 10, path, (0, 0, 0), (1, 1, 1))
    stored = C.load_teacher("resnet8", 10, path)
    torch.testing.assert_close(stored(x), plain((x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5))


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["BOMB"]),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"a": torch.zeros(1)}}, "missing"),
        ({"epoch": 3}, "no state dict"),
        ([1, 2], "no state dict"),
        ("bomb", "no file of plain tensors"),
    ],
)
def test_foreign_checkpoints_are_refused(content, message, tmp_path, monkeypatch):
    path = tmp_path / "t.pth"
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path.write_bytes(pickle.dumps(Bomb())) if content == "bomb" else torch.save(content, path)
    with pytest.raises(C.UserError, match=message):
        C.load_teacher("resnet8", 10, str(path))
    assert not (tmp_path / "exploded").exists()


def test_class_count_mismatch_names_both_shapes(tmp_path):
    torch.save(C.build_model("resnet8", 100).state_dict(), tmp_path / "t.pth")
    with pytest.raises(C.UserError, match=r"\(100, 64\).*\(10, 64\)"):
        C.load_teacher("resnet8", 10, str(tmp_path / "t.pth"))


# --- invariants of distill ---------------------------------------------------------------------------


def test_teacher_is_bit_identical_and_student_learns(pair):
    teacher, student = pair
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    start = {k: v.clone() for k, v in student.state_dict().items()}
    teacher.train()  # distill must not rely on the caller
    result = distilled(pair)
    assert result is student and not student.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert any(not torch.equal(v, start[k]) for k, v in student.state_dict().items())


def test_distill_touches_no_data(pair, monkeypatch):
    def forbidden(*args, **kw):
        raise AssertionError("distill reached for data")

    for target, name in (
        (C, "load_data"),
        (C, "draw_shapes"),
        (C, "DataLoader"),
        (torch, "load"),
        (socket, "socket"),
        (C.torchvision.datasets, "ImageFolder"),
        (C.torchvision.datasets, "CIFAR10"),
        (np, "load"),
    ):
        monkeypatch.setattr(target, name, forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    distilled(pair)


def build_pair():
    torch.manual_seed(1)
    teacher, student = C.build_model("resnet8", 4), C.build_model("resnet8", 4)
    for _ in range(2):
        teacher(torch.rand(16, 3, 16, 16))
    return teacher.eval(), student


@pytest.mark.parametrize("decoupled", [True, False])
def test_same_seed_same_student(decoupled):
    one, two, other = (distilled(build_pair(), decoupled=decoupled, seed=s) for s in (0, 0, 1))
    assert same(one, two) and not same(one, other)


def test_callbacks_do_not_disturb_the_run():
    teacher, student = build_pair()
    C.distill(teacher, student, C.Config(**TINY), on_cycle=lambda state, metrics: torch.rand(7))
    assert same(student, distilled(build_pair()))


@pytest.mark.parametrize(
    "weight, function",
    [
        ("lambda_cae", "category_aware_embedding_loss"),
        ("lambda_cncl", "contrastive_loss"),
        ("lambda_adv", "adversarial_loss"),
        ("lambda_fm", "statistics_distance"),
    ],
)
def test_zero_weight_has_no_effect_and_others_have(weight, function, monkeypatch):
    def pair():  # a student that agrees with its teacher everywhere, or eq. 5 might have no row to count
        teacher = build_pair()[0]
        student = copy.deepcopy(teacher)
        for p in C.last_linear(student).parameters():
            p.data *= 2
        return teacher, student

    on, off = distilled(pair(), **{weight: 1.0}), distilled(pair(), **{weight: 0.0})
    assert not same(on, off)
    monkeypatch.setattr(C, function, lambda *a, **k: 1 / 0)  # switched off means not even called
    assert same(off, distilled(pair(), **{weight: 0.0}))


@pytest.mark.parametrize(
    "change",
    [
        {"cend": False},
        {"decoupled": False},
        {"prior": "index"},
        {"generator_width": 32},
        {"magnitudes": (1.0,)},
        {"magnitudes": (1.0,) * 8},
    ],
)
def test_every_switch_changes_the_run(change):
    assert not same(distilled(build_pair()), distilled(build_pair(), **change))


def test_embedding_constraint_is_against_the_teachers_embedding_of_the_same_image():
    """Eq. 8 as `student_loss` calls it, image by image, also where the two widths differ."""
    teacher, student = C.build_model("wrn16_2", 10).eval(), C.build_model("resnet8", 10).eval()
    config = C.Config(**TINY)
    state, images = C.new_state(teacher, student, config), torch.rand(6, 3, 32, 32)
    with state.learner.embedding, state.teacher_embedding, torch.no_grad():
        terms = C.student_loss(state, teacher, state.learner, images, torch.zeros(6).long(), config)[1]
        f = C.forward_with_embedding(teacher, images)[1].double()
        z = state.learner.head(C.forward_with_embedding(student, images)[1]).double()
    cosine = [[float(a @ b / a.norm() / b.norm()) for b in f] for a in z]
    slow = [-c[i] / 0.1 + math.log(sum(math.exp(x / 0.1) for x in c)) for i, c in enumerate(cosine)]
    assert z.shape == f.shape and float(terms["cae"]) == pytest.approx(sum(slow) / 6, rel=1e-4)


def test_phases_are_decoupled():
    teacher, student = build_pair()
    config = C.Config(**TINY)
    C.set_training(teacher, False)
    state = C.new_state(teacher, student, config)
    frozen = {k: v.clone() for k, v in student.state_dict().items()}
    C.synthesis_round(state, teacher, config)
    assert all(torch.equal(v, frozen[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    generator = {k: v.clone() for k, v in state.generator.state_dict().items()}
    state.generator.forward = None  # any call would fail
    C.distillation_phase(state, teacher, config)
    assert all(torch.equal(v, generator[k]) for k, v in state.generator.state_dict().items())


@pytest.mark.parametrize(
    "term, function", [("kd", "kd_loss"), ("ce", "category_consistency_loss"), ("cncl", "contrastive_loss")]
)
def test_non_finite_loss_names_term_and_cycle(term, function, pair, monkeypatch):
    monkeypatch.setattr(C, function, lambda logits, *rest: logits.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=f"in cycle 1: .*{term}"):
        distilled(pair)


def test_bank_stops_at_its_cap(pair):
    teacher, student = pair
    sizes = []
    config = C.Config(**{**TINY, "cycles": 6, "bank_capacity": 50})
    C.distill(
        teacher,
        student,
        config,
        on_cycle=lambda state, metrics: sizes.append((len(state.bank), state.bank.images.shape[0])),
    )
    assert sizes[-1] == (50, 50) and len({s[1] for s in sizes}) == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes one second further each time it is read: no test waits for a real one."""
    monkeypatch.setattr(C, "time", SimpleNamespace(perf_counter=itertools.count(0.0, 1.0).__next__))


def test_minutes_anneal_and_stop(pair, clock):
    teacher, student = pair
    seen = []
    config = C.Config(**{**TINY, "minutes": 0.5})
    C.distill(teacher, student, config, on_cycle=lambda s, m: seen.append((s.seconds, m["lr"])))
    assert seen[-1][0] >= 30 and all(s < 30 for s, _ in seen[:-1])
    assert len(seen) > 5 and [lr for _, lr in seen] == sorted((lr for _, lr in seen), reverse=True)
    assert seen[0][1] == 0.1 and seen[-1][1] < 0.01


def test_the_students_step_grows_over_the_first_cycles_and_then_falls(pair):
    rates = []
    config = C.Config(**{**TINY, "cycles": 8, "lr_warmup": 4, "student_lr": 0.2})
    C.distill(*pair, config, on_cycle=lambda s, m: rates.append(m["lr"]))
    cosine = [0.1 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx([c * share for c, share in zip(cosine, (0.25, 0.5, 0.75, 1, 1, 1, 1, 1))])


def test_a_budget_below_a_cycle_is_kept(pair, clock):
    teacher, student = pair
    seen = []
    config = C.Config(**{**TINY, "minutes": 0.2, "kd_steps": 10**6, "warmup_rounds": 10**6})
    C.distill(teacher, student, config, on_cycle=lambda s, m: seen.append((s.seconds, m["images"])))
    assert len(seen) == 1 and 12 <= seen[0][0] <= 15 and 20 < seen[0][1] < 200


def test_a_resumed_budget_has_the_time_that_was_left(clock):
    class Cut(Exception):
        pass

    def run(pair, state, stop_at=None):
        def on_cycle(state, metrics):
            rates.append(metrics["lr"])
            kept.update(C.pack_state(state, pair[0], config))
            if state.cycle == stop_at:
                raise Cut

        with contextlib.suppress(Cut):
            C.distill(*pair, config, state=state, on_cycle=on_cycle)

    config, kept = C.Config(**{**TINY, "minutes": 0.5, "device": "cpu", "lr_warmup": 5}), {}
    rates = whole = []
    run(build_pair(), None)
    rates = []
    run(build_pair(), None, stop_at=3)
    pair = build_pair()
    state = C.new_state(*pair, config)
    C.unpack_state(copy.deepcopy(kept), state, pair[0])
    run(pair, state)
    assert rates == whole and len(whole) > 5


# --- evaluation --------------------------------------------------------------------------------------


def test_linear_probe_separates_a_separable_toy_and_is_deterministic():
    x = torch.rand(400, 3, 8, 8) * 0.3
    y = torch.arange(400) % 3
    x[torch.arange(400), y] += 0.6  # the class is the brightest channel
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))  # head width plays no part
    train, test = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    result = C.linear_probe(backbone, train, test)
    assert result["accuracy"] == 100
    assert result == C.linear_probe(backbone, train, test)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    shuffled = TensorDataset(x[:300], y[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    assert C.linear_probe(backbone, shuffled, test)["accuracy"] < 70


def test_logistic_regression_is_at_its_optimum():
    x, y = torch.tensor(rng(60, 5)).float(), torch.arange(60) % 3
    w, b = C.fit_logistic(x, y, 3, l2=0.01)
    w.requires_grad_()
    b.requires_grad_()
    (F.cross_entropy(x @ w + b, y) + 0.005 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4


def test_shapes_are_seeded_balanced_and_distinct():
    one, two, other = (DRAW_SHAPES(200, list(C.SHAPES)[:10], seed) for seed in (1, 1, 2))
    assert torch.equal(one.tensors[0], two.tensors[0]) and not torch.equal(one.tensors[0], other.tensors[0])
    assert torch.bincount(one.tensors[1]).tolist() == [20] * 10
    assert one.tensors[0].shape == (200, 3, 32, 32) and one.tensors[0].dtype == torch.uint8


# --- command line ------------------------------------------------------------------------------------

FAST = (
    "--teacher resnet8 --teacher-epochs 1 --cycles 2 --generator-width 16 --synth-batch 20 --synth-steps 2 "
    "--kd-steps 2 --batch-size 20 --bank-capacity 64 --warmup-rounds 1"
).split()


def cli(*args, cwd):
    return subprocess.run(
        [sys.executable, str(HERE / "cae_dfkd.py"), *args], cwd=cwd, capture_output=True, text=True, timeout=170
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a quickly trained teacher on shapes and a finished tiny run, made by the real command."""
    folder = tmp_path_factory.mktemp("work")
    done = cli(*FAST, "--eval-every", "1", "--out", "runs/a", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_run_directory_is_complete(workdir):
    run, out = workdir / "runs/a", (workdir / "stdout").read_text()
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "samples.png",
        "last.pt",
        "student.pt",
        "summary.json",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["student_accuracy"] < 100 and set(summary["probe"]) == {"student", "teacher", "untrained"}
    order = [
        out.index(text)
        for text in (
            f"teacher resnet8: {summary['teacher_accuracy']:.2f} %",
            "cycle 1,",
            f"student resnet8: {summary['student_accuracy']:.2f} %",
            "untrained",
        )
    ]
    assert order == sorted(order)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["cycle"] for line in lines] == [1, 2]
    for key in (
        "ce",
        "fm",
        "adv",
        "kd",
        "cae",
        "cncl",
        "lr",
        "variance",
        "images",
        "seconds_synthesis",
        "seconds_distillation",
        "accuracy",
    ):
        assert math.isfinite(lines[1][key])
    assert lines[1]["accuracy"] == pytest.approx(summary["student_accuracy"])  # the last state
    assert json.loads((run / "config.json").read_text())["kd_steps"] == 2
    torch.load(run / "last.pt", weights_only=True)


def test_real_kd_makes_no_image_and_holds_the_training_set(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    monkeypatch.setattr(C, "generator_step", lambda *args: 1 / 0)
    assert C.main([*FAST, "--real-kd", "--out", "runs/real"]) == 0
    images, labels, _ = torch.load("runs/real/last.pt", weights_only=True)["processes"][0]["bank"]
    train, _ = C.load_data("shapes", "train")
    assert torch.equal(images, train.tensors[0]) and torch.equal(labels, train.tensors[1])


def test_eval_only_gives_the_summary_number(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    assert C.main(["--eval-only", "runs/a/student.pt", "--dataset", "shapes-unseen"]) == 2
    assert "fit resnet8 with 6 classes" in capsys.readouterr().err
    done, summary = cli("--eval-only", "runs/a/student.pt", cwd=workdir), json.loads(Path("runs/a/summary.json").read_text())
    assert done.returncode == 0 and f"{summary['student_accuracy']:.2f} %" in done.stdout
    assert f"{summary['probe']['student']:.2f} %" in done.stdout


def test_resume_is_exact(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    args = [*FAST, "--precision", "fp32", "--eval-every", "1"]  # the cut is at an evaluation
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    assert C.main(args + ["--out", "runs/whole"]) == 0
    real = C.save_atomic

    def interrupted(thing, path):
        real(thing, path)
        if path.name == "last.pt" and thing["cycle"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(C, "save_atomic", interrupted)
    assert C.main(args + ["--out", "runs/cut"]) == 130 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(C, "save_atomic", real)
    assert C.main(args + ["--out", "runs/cut"]) == 2  # holds a run
    assert C.main(["--resume", "--out", "runs/cut", "--kd-steps", "9"]) == 2
    assert "kd_steps" in capsys.readouterr().err
    assert C.main(["--resume", "--out", "runs/cut"]) == 0
    whole, cut = (torch.load(f"runs/{n}/last.pt", weights_only=True) for n in ("whole", "cut"))

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b

    for key in whole.keys() - {"config", "seconds"}:
        assert equal(whole[key], cut[key]), key
    assert len(Path("runs/cut/metrics.jsonl").read_text().splitlines()) == 2


def test_download_without_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert C.main(["--teacher", "resnet34", "--dataset", "cifar10"]) == 2
    error = capsys.readouterr().err
    assert "cifar10" in error and "cifar-10-batches-py/ into data/" in error and len(error.strip().splitlines()) == 1


def test_help_needs_nothing_and_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: 1 / 0)
    with pytest.raises(SystemExit) as stop:
        C.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + f.name.replace("_", "-") in text for f in dataclasses.fields(C.Config))


# --- speed, without a clock --------------------------------------------------------------------------


def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a number off a tensor makes the host wait for a GPU: inside the phases nothing may do so."""
    teacher, student = build_pair()
    config = C.Config(**TINY)
    C.set_training(teacher, False)
    state = C.new_state(teacher, student, config)
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split():
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("the host reads a tensor"))
    C.synthesis_round(state, teacher, config)
    C.distillation_phase(state, teacher, config)


def test_gradients_stay_channels_last():
    """A gradient in another memory format costs a fifth of a training step: sliced shortcuts had one."""
    net, wrong = C.with_normalisation(C.build_model("resnet8", 4), (0, 0, 0), (1, 1, 1)), []

    def check(gradient):
        wrong.append(not gradient.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, C.BasicBlock):
            module.register_forward_hook(lambda module, args, out: out.register_hook(check) and None)
    net(C.to_float(torch.rand(4, 3, 32, 32), "cpu")).sum().backward()
    assert len(wrong) == 3 and not any(wrong[1:])  # the first comes from the pooling to one pixel


def test_compiled_steps_have_no_graph_break_and_change_nothing(monkeypatch):
    eager = distilled(build_pair())
    whole = functools.cache(functools.partial(torch.compile, backend="eager", fullgraph=True))
    monkeypatch.setattr(C, "compiled", whole)
    assert same(eager, distilled(build_pair(), compile=True)) and whole.cache_info().misses == 2


def test_benchmark_table(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    real = C.side_by_side
    monkeypatch.setattr(C, "side_by_side", lambda functions, device, repeats: real(functions, device, 1))
    assert C.main([*FAST, "--benchmark", "--out", "runs/bench"]) == 0
    assert [p.name for p in Path("runs/bench").iterdir()] == ["benchmark.json"]
    result = json.loads(Path("runs/bench/benchmark.json").read_text())
    printed = capsys.readouterr().out
    assert result.pop("where") in printed
    assert all(f"| {name} | {value:.3g} |" in printed and value > 0 for name, value in result.items())
    for step in ("KD", "synthesis"):
        times = result[f"{step} step, ms"] / result[f"{step} floor, ms"]
        assert result[f"{step} step / its floor"] == pytest.approx(times)
    assert result["bank of 100000, push, ms"] > 0 and result["synthesis round, heavy / as run"] > 0


def test_floors_and_steps_use_the_same_tensors(monkeypatch):
    """An honest floor: teacher and student see as many images of the same type and layout as in the step."""
    teacher, student = build_pair()
    teacher, student = (C.with_normalisation(net, (0, 0, 0), (1, 1, 1)) for net in (teacher, student))
    config = C.Config(**{**TINY, "device": "cpu", "precision": "bf16"})
    seen = []

    def spy(module, args, out):
        seen.append((tuple(args[0].shape), args[0].dtype, args[0].stride(), out.dtype, out.requires_grad))

    for net in (teacher, student):
        net.net.conv1.register_forward_hook(spy)
    functions = C.bench_functions(teacher, student, config, None, torch.channels_last)
    for name in ("KD", "synthesis"):
        looks = []
        for kind in ("step", "floor"):
            seen.clear()
            functions[f"{name} {kind}"]()
            looks.append(list(seen))
        assert looks[0] == looks[1] and len(looks[0]) == 2


def test_checkpoints_take_a_small_share_of_the_time(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    real, saves = C.save_atomic, []

    def slow(thing, path):
        if path.name == "last.pt":
            saves.append(thing["cycle"])
            C.time.sleep(0.5)
        real(thing, path)

    monkeypatch.setattr(C, "save_atomic", slow)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    assert C.main([*FAST, "--cycles", "6", "--out", "runs/slow"]) == 0
    assert saves == [1, 6]  # at once, then not before 25 s have gone, and at the end


# --- several processes -------------------------------------------------------------------------------

WORKER = """
import hashlib, os, signal, sys
import torch
import cae_dfkd as C

real, C.linear_probe = C.distill, lambda *args: {"accuracy": 0.0}

def distill(teacher, student, config, prior, state, on_cycle):
    def then(state, metrics):
        on_cycle(state, metrics)
        if os.environ.get("DIE") and state.cycle == 1 and C.rank() == 1:
            os._exit(9)
    done = real(teacher, student, config, prior, state, then)
    bits = b"".join(v.numpy().tobytes() for v in done.state_dict().values())
    print("student", C.rank(), hashlib.sha256(bits).hexdigest(), flush=True)

    whole = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    half = whole.detach().chunk(2)[C.rank()].clone().requires_grad_()
    losses = []
    for images, average in ((whole, None), (half, C.Average.apply)):
        with C.FeatureMatching(teacher, average) as matching:
            teacher(images)
        losses.append(matching.loss())
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    expected = whole.grad.chunk(2)[C.rank()]            # DDP divides by two
    torch.testing.assert_close(half.grad / 2, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    print("matching", C.rank(), flush=True)
    return done

C.distill = distill
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(C.main())
"""


def torchrun(processes, script, *args, cwd, **env):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), **env}
    return subprocess.run(
        [*command, str(script), *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=170
    )


def test_two_processes_agree_and_a_lost_one_can_be_resumed(workdir, monkeypatch, capsys):
    worker = workdir / "worker.py"
    worker.write_text(WORKER)
    died = torchrun(2, worker, *FAST, "--out", "runs/two", cwd=workdir, DIE="1")
    assert died.returncode != 0 and "--resume --out runs/two" in died.stderr
    assert torch.load(workdir / "runs/two/last.pt", weights_only=True)["cycle"] == 1
    monkeypatch.chdir(workdir)
    assert C.main(["--resume", "--out", "runs/two"]) == 2 and "of 2 processes" in capsys.readouterr().err
    ends = [
        torchrun(2, worker, *args, cwd=workdir)
        for args in (["--resume", "--out", "runs/two"], [*FAST, "--out", "runs/both"])
    ]
    students = set()
    for end in ends:
        assert end.returncode == 0, end.stderr
        assert end.stdout.count("matching") == 2
        students |= {line.split()[2] for line in end.stdout.splitlines() if re.match(r"student \d ", line)}
    assert len(students) == 1  # both processes, resumed or not
    lines = [json.loads(line) for line in (workdir / "runs/two/metrics.jsonl").read_text().splitlines()]
    assert [line["cycle"] for line in lines] == [1, 2] and lines[-1]["images"] == 60
    kept = torch.load(workdir / "runs/two/last.pt", weights_only=True)["processes"]
    assert [len(own["bank"][0]) for own in kept] == [30, 30]
    assert not torch.equal(kept[0]["bank"][0], kept[1]["bank"][0])  # each makes its own images


def test_torchrun_with_one_process_is_the_plain_run(workdir):
    one = torchrun(1, HERE / "cae_dfkd.py", *FAST, "--eval-every", "1", "--out", "runs/torchrun", cwd=workdir)
    assert one.returncode == 0, one.stderr
    assert equal_weights(workdir / "runs/a", workdir / "runs/torchrun")


@pytest.mark.parametrize("args, culprit", [(["--batch-size", "21"], "multiples of 2"), (["--benchmark"], "one process")])
def test_batches_that_cannot_be_spread_are_refused(args, culprit, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "world", lambda: 2)
    assert C.main([*FAST, "--out", "runs/odd", *args]) == 2
    assert culprit in capsys.readouterr().err and not Path("runs/odd").exists()


# --- hard to break -----------------------------------------------------------------------------------


def save_image(path, *size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode).save(path)


@pytest.fixture(scope="module")
def oddities(workdir):
    """Wrong and odd files beside the trained teacher."""
    for split, names in {"train": "ab", "test": "ac"}.items():
        for name in names:
            save_image(workdir / "differ" / split / name / "x.png", 8, 8)
        save_image(workdir / "lonely" / split / "a" / "x.png", 8, 8)
        (workdir / "empty" / split).mkdir(parents=True)
        for name in "ab":
            save_image(workdir / "torn" / split / name / "x.png", 64, 64)
            save_image(workdir / "vast" / split / name / "x.png", 8, 8)
            save_image(workdir / "long" / split / name / "x.png", 1, 1 if name == "a" else 200)
            (workdir / "text" / split / name).mkdir(parents=True)
            (workdir / "text" / split / name / "x.png").write_text("no image")
    torn = workdir / "torn/test/b/x.png"
    torn.write_bytes(torn.read_bytes()[:200])
    Image.new("1", (30_000, 30_000)).save(workdir / "vast/test/b/x.png")
    np.save(workdir / "wrong.npy", np.zeros((3, 7), dtype=np.float32))
    np.save(workdir / "nan.npy", np.full((10, 7), np.nan, dtype=np.float32))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 10000000000000), }\n"
    (workdir / "vast.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    np.save(workdir / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    net = C.build_model("resnet8", 10).state_dict()
    torch.save(C.build_model("resnet8", 100).state_dict(), workdir / "hundred.pth")
    torch.save({**net, "fc.bias": torch.full((10,), math.nan)}, workdir / "nan.pth")
    torch.save({**net, "fc.bias": torch.tensor(1.0)}, workdir / "scalar.pth")
    torch.save({**net, "fc.weight": torch.zeros(1).expand(10, 64)}, workdir / "expanded.pth")
    torch.save({**net, "fc.weight": torch.zeros(10, 64).to_sparse()}, workdir / "sparse.pth")
    torch.save({**net, "fc.weight": torch.zeros(10, 64, dtype=torch.complex64)}, workdir / "complex.pth")
    torch.save({"state_dict": net, "mean": "0.5", "std": [1.0] * 3}, workdir / "mean.pth")
    torch.save({"state_dict": net, "mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}, workdir / "std.pth")
    torch.save({"state_dict": net, "mean": [10**400, 0, 0], "std": [1] * 3}, workdir / "huge-mean.pth")
    torch.save({"state_dict": net, "arch": "resnet8", "image_size": 32, "dataset": "cifar10"}, workdir / "elsewhere.pt")
    (workdir / "binfloat.pth").write_text("Good")
    (workdir / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x0e\x00{'descr': '<f4',")
    np.save(workdir / "alike.npy", np.ones((10, 7), dtype=np.float32))
    np.save(workdir / "empty.npy", np.ones((10, 0), dtype=np.float32))
    (workdir / "foreign").mkdir()
    (workdir / "foreign/config.json").write_text('{"name": "of somebody"}')
    (workdir / "holds").mkdir()
    (workdir / "holds/student.pt").write_text("of somebody")
    torch.save({"state_dict": net, "arch": "resnet8", "image_size": 10**9, "dataset": "shapes"}, workdir / "huge.pt")
    torch.save({"state_dict": net, "arch": ["resnet8"], "image_size": 32}, workdir / "arch.pt")
    torch.save(net, workdir / "fine.pth")
    torch.save([1, 2], workdir / "list.pth")
    torch.save(torch.zeros(1).expand(10, 10**9), workdir / "vast.pt")
    with zipfile.ZipFile(workdir / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    (workdir / "text.pth").write_text("not a checkpoint")
    (workdir / "file").write_text("in the way")
    for name, change in {"path": ("dataset", "/elsewhere"), "type": ("kd_steps", "many"), "key": ("colour", 1)}.items():
        shutil.copytree(workdir / "runs/a", workdir / f"tampered/{name}")
        config = json.loads((workdir / "runs/a/config.json").read_text()) | dict([change])
        (workdir / f"tampered/{name}/config.json").write_text(json.dumps(config))
    own = torch.load(workdir / "runs/a/last.pt", weights_only=True)["processes"][0]
    labels = [own["bank"][0], own["bank"][1] + 99, own["bank"][2]]
    tampered = {
        "bank": {"processes": [{}]},
        "labels": {"processes": [{**own, "bank": labels}]},
        "learner": {"learner": {}},
        "cycle": {"cycle": "1"},
        "teacher": {"teacher": 1},
        "list": None,
    }
    shutil.copytree(workdir / "runs/a", workdir / "tampered/deep")
    (workdir / "tampered/deep/config.json").write_text("[" * 200_000)
    for name, change in tampered.items():
        shutil.copytree(workdir / "runs/a", workdir / f"tampered/{name}")
        saved = torch.load(workdir / "runs/a/last.pt", weights_only=True)
        torch.save([1] if change is None else saved | change, workdir / f"tampered/{name}/last.pt")
        (workdir / f"tampered/{name}/summary.json").unlink()
    return workdir


NUMBERS = [f for f in dataclasses.fields(C.Config) if f.type in ("int", "float", "float | None")]
OUT_OF_RANGE = [
    (["--" + f.name.replace("_", "-"), value], "--" + f.name.replace("_", "-"))
    for f in NUMBERS
    for value in ("-1", "1e400" if "float" in f.type else "1" + "0" * 30, *(["nan"] if "float" in f.type else []))
]
WRONG = [
    (["--kd-steps", "many"], "--kd-steps"),
    (["--colour", "red"], "--colour"),
    (["--mean", "1"], "--mean"),
    (["--precision", "fp8"], "--precision"),
    (["--batch-size", "1"], "--batch-size"),
    (["--teacher", "resnet999"], "resnet999"),
    (["--student", "vit"], "vit"),
    (["--teacher-ckpt", "absent.pth"], "absent.pth"),
    (["--teacher-ckpt", "hundred.pth"], "(100, 64)"),
    (["--teacher-ckpt", "text.pth"], "text.pth"),
    (["--teacher-ckpt", "list.pth"], "list.pth"),
    (["--teacher-ckpt", "nan.pth"], "fc.bias is not finite"),
    (["--teacher-ckpt", "scalar.pth"], "fc.bias"),
    (["--teacher-ckpt", "expanded.pth"], "plain tensors"),
    (["--teacher-ckpt", "sparse.pth"], "plain tensors"),
    (["--teacher-ckpt", "complex.pth"], "plain tensors"),
    (["--teacher-ckpt", "mean.pth"], "mean should be three numbers"),
    (["--teacher-ckpt", "std.pth"], "std should be three numbers"),
    (["--teacher-ckpt", "bomb.pth"], "expand to 10,000,000 bytes"),
    (["--teacher-ckpt", "differ"], "differ"),
    (["--teacher-ckpt", "fine.pth", "--teacher", "resnet20"], "is no resnet20"),
    (["--mean", "nan", "0", "0"], "--mean"),
    (["--std", "1", "0", "1"], "--std"),
    (["--magnitudes", "1", "-1"], "--magnitudes"),
    (["--dataset", "nowhere"], "nowhere"),
    (["--dataset", "empty"], "empty"),
    (["--dataset", "differ"], "different classes"),
    (["--dataset", "lonely"], "one class only"),
    (["--dataset", "torn"], "torn/test/b/x.png"),
    (["--dataset", "vast"], "vast/test/b/x.png"),
    (["--dataset", "text"], "text/test/a/x.png"),
    (["--probe-dataset", "nowhere"], "nowhere"),
    (["--probe-dataset", "torn"], "torn/test/b/x.png"),
    (["--prior", "absent.npy"], "absent.npy"),
    (["--prior", "wrong.npy"], "(3, 7)"),
    (["--prior", "nan.npy"], "finite"),
    (["--prior", "objects.npy"], "objects.npy"),
    (["--prior", "list.pth"], "the prior is (2,)"),
    (["--prior", "vast.pt"], "vast.pt"),
    (["--prior", "vast.npy"], "vast.npy"),
    (["--prior", "text.pth"], "text.pth"),
    (["--eval-only", "absent.pt"], "absent.pt"),
    (["--eval-only", "fine.pth"], "architecture"),
    (["--eval-only", "huge.pt"], "--image-size 1000000000"),
    (["--eval-only", "arch.pt"], "architecture"),
    (["--eval-only", "elsewhere.pt"], "distilled for cifar10: give --dataset"),
    (["--eval-only", ""], "--eval-only"),
    (["--out", "holds"], "holds holds a run"),
    (["--out", "foreign"], "foreign/config.json"),
    (["--teacher-ckpt", "huge-mean.pth"], "mean should be three numbers"),
    (["--teacher-ckpt", "binfloat.pth"], "binfloat.pth"),
    (["--teacher-ckpt", "/dev/zero"], "/dev/zero"),
    (["--prior", "cut.npy"], "cut.npy"),
    (["--prior", "alike.npy"], "not all alike"),
    (["--prior", "empty.npy"], "(10, 0)"),
    (["--dataset", "long"], "long/test/b/x.png"),
    (["--resume", "--out", "tampered/labels"], "labels out of range"),
    (["--resume", "--out", "tampered/cycle"], "out of range"),
    (["--resume", "--out", "tampered/teacher"], "the teacher is not the one"),
    (["--resume", "--out", "tampered/deep"], "config.json"),
    (["--image-size", "33"], "33"),
    (["--no-cend", "--no-decoupled"], "--no-cend"),
    (["--real-kd", "--no-decoupled"], "--real-kd"),
    (["--bank-capacity", "900000000"], "memory"),
    (["--device", "cuda"], "--device cuda"),
    (["--out", "file/run"], "file"),
    (["--out", "runs/a"], "runs/a holds a run"),
    (["--resume", "--out", "runs/none"], "runs/none"),
    (["--resume", "--out", "runs/a", "--kd-steps", "9"], "kd_steps"),
    (["--resume", "--out", "tampered/path"], "not saved with the config.json beside it"),
    (["--resume", "--out", "tampered/type"], "--kd-steps 'many'"),
    (["--resume", "--out", "tampered/key"], "colour"),
    (["--resume", "--out", "tampered/bank"], "does not fit"),
    (["--resume", "--out", "tampered/learner"], "does not fit"),
    (["--resume", "--out", "tampered/list"], "last.pt"),
]


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="--device cuda is right here")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Validating sparse")
@pytest.mark.parametrize("args, culprit", WRONG + OUT_OF_RANGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_input_is_one_line_and_code_2(args, culprit, oddities, monkeypatch, capsys):
    monkeypatch.chdir(oddities)
    before = tree("."), sorted(Path("runs").iterdir())
    fast = [] if "--resume" in args else FAST
    assert C.main([*fast, "--out", "runs/bad", *args]) == 2
    error = capsys.readouterr().err
    assert culprit in error and len(error.strip().splitlines()) == 1 and error.startswith("error: ")
    assert (tree("."), sorted(Path("runs").iterdir())) == before


def test_odd_but_right_images_are_read(tmp_path):
    for i, (mode, size) in enumerate({"L": (9, 40), "RGBA": (40, 9), "P": (1, 1), "1": (64, 64), "RGB": (5, 300)}.items()):
        for name in "ab":
            save_image(tmp_path / "test" / name / f"{i}.png", *size, mode=mode)
    data, names = C.load_data(str(tmp_path), "test")
    images, labels = data.tensors
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8 and names == ["a", "b"]
    assert labels.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double", "transposed", "shared"])
def test_odd_but_right_checkpoints_are_read(kind, tmp_path):
    torch.manual_seed(0)
    state = C.build_model("resnet8", 4).state_dict()
    if kind == "transposed":
        state["fc.weight"] = state["fc.weight"].T.contiguous().T
    elif kind == "shared":
        whole = torch.randn(2, 16)
        state["bn1.weight"], state["bn1.bias"] = whole[0], whole[1]
    else:
        state = {k: getattr(v, kind)() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "net.pth")
    loaded = C.load_teacher("resnet8", 4, str(tmp_path / "net.pth")).net.state_dict()
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in loaded.items())


def test_weak_teacher_and_missing_batchnorm_are_warned_of(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    torch.save(C.build_model("resnet8", 10).state_dict(), "weak.pth")
    assert C.main([*FAST, "--teacher-ckpt", "weak.pth", "--out", "runs/weak"]) == 0
    assert capsys.readouterr().out.count("warning: this teacher knows next to nothing") == 1
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="no BatchNorm: feature matching is off"):
        C.distill(bare, build_pair()[1], C.Config(**TINY))
    with pytest.raises(C.UserError, match="one object"):
        C.distill(bare, bare, C.Config(**TINY))


def test_more_classes_than_a_batch(tmp_path):
    torch.manual_seed(0)
    teacher, student = C.build_model("resnet8", 30), C.build_model("resnet8", 30)
    C.distill(teacher, student, C.Config(**{**TINY, "synth_batch": 8, "batch_size": 8}))
    assert all(v.isfinite().all() for v in student.state_dict().values())


@pytest.mark.parametrize("function, phase", [("category_consistency_loss", "ce"), ("kd_loss", "kd")])
def test_a_loss_that_breaks_keeps_the_last_good_state(function, phase, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    real, calls = getattr(C, function), []

    def breaks(*args):
        calls.append(0)
        return real(*args) * (math.nan if len(calls) > {"ce": 6, "kd": 4}[phase] else 1)

    monkeypatch.setattr(C, function, breaks)
    out = f"runs/broken-{phase}"
    assert C.main([*FAST, "--cycles", "5", "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"in cycle 3: {phase}" in error and len(error.splitlines()) == 1
    saved = torch.load(Path(out, "last.pt"), weights_only=True)
    assert 1 <= saved["cycle"] <= 2 and all(v.isfinite().all() for v in saved["learner"].values())


def test_full_disk_keeps_what_was_saved(workdir, tmp_path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        monkeypatch.chdir(workdir)
        real = C.save_atomic

        def then_fill(thing, path):
            real(thing, path)
            if path.name == "last.pt" and not (disk / "fill").exists():
                with contextlib.suppress(OSError), (disk / "fill").open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass

        monkeypatch.setattr(C, "save_atomic", then_fill)
        assert C.main([*FAST, "--out", str(disk / "run")]) == 2
        error = capsys.readouterr().err
        assert re.search("No space left|is the disk full", error) and len(error.splitlines()) == 1
        assert torch.load(disk / "run/last.pt", weights_only=True)["cycle"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


EXTREME = {
    "huge": lambda n, k: torch.randn(n, k) * 1e4,
    "equal rows": lambda n, k: torch.randn(1, k).expand(n, k),
    "zero": lambda n, k: torch.zeros(n, k),
    "one hot, hard": lambda n, k: 2e4 * F.one_hot(torch.arange(n) % k, k).float() - 1e4,
    "tiny": lambda n, k: torch.randn(n, k) * 1e-20,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", EXTREME)
def test_losses_in_extreme_places(kind, dtype):
    """Finite values and gradients, the documented ranges, no matter in which order the batch comes."""
    tau = 4.0
    for seed, (n, k) in enumerate([(1, 2), (2, 2), (7, 3), (16, 10), (5, 100)]):
        torch.manual_seed(seed)
        s, t = (EXTREME[kind](n, k).to(dtype) for _ in range(2))
        labels, e, order = torch.randint(k, (n,)), torch.randn(k, k), torch.randperm(n)
        for loss, low, high in (
            (lambda x, i: C.category_consistency_loss(x[i], labels[i]), 0, math.inf),
            (lambda x, i: C.kd_loss(x[i], t[i], tau), 0, math.inf),
            (lambda x, i: C.kd_loss(t[i], x[i], tau), 0, math.inf),
            (lambda x, i: C.adversarial_loss(x[i], t[i]), -math.inf, 0),
            (lambda x, i: C.category_aware_embedding_loss(x[i], labels[i], e), 0, math.inf),
            (lambda x, i: C.contrastive_loss(x[i], labels[i]), 0, math.inf),
        ):
            x = s.clone().requires_grad_()
            value = loss(x, torch.arange(n))
            value.backward()
            slack = 1e-6 * max(1.0, s.abs().max().item())
            assert value.isfinite() and x.grad.isfinite().all()
            assert low - slack <= value.item() <= high + slack
            torch.testing.assert_close(loss(s, order), value.detach(), rtol=1e-3, atol=1e-3)


def test_cosine_losses_do_not_see_the_scale():
    torch.manual_seed(0)
    z, e, labels = torch.randn(12, 6), torch.randn(4, 6), torch.arange(12) % 4
    for scale in (1e-3, 1.0, 1e3):
        torch.testing.assert_close(C.contrastive_loss(z * scale, labels), C.contrastive_loss(z, labels))
        torch.testing.assert_close(
            C.category_aware_embedding_loss(z * scale, labels, e / scale), C.category_aware_embedding_loss(z, labels, e)
        )


def weights(out):
    return torch.load(Path(out, "student.pt"), weights_only=True)["state_dict"]


def equal_weights(*outs):
    first, *others = map(weights, outs)
    return all(torch.equal(v, other[k]) for other in others for k, v in first.items())


def test_evaluation_leaves_no_trace_in_the_student(workdir, monkeypatch):
    """Other test images, other reports, another probe or none: the same student, bit for bit."""
    monkeypatch.chdir(workdir)
    base = [*FAST, "--teacher-ckpt", "checkpoints/shapes_resnet8.pth", "--precision", "fp32"]
    for split in ("train", "test"):
        for name in list(C.SHAPES)[:10]:
            save_image(workdir / "other" / split / name / "x.png", 16, 16)
    runs = {
        "runs/e0": [],
        "runs/e1": ["--eval-every", "1", "--probe-dataset", "shapes"],
        "runs/e2": ["--dataset", "other", "--preset", "shapes", "--deterministic"],
    }
    for out, args in runs.items():
        assert C.main([*base, "--out", out, *args]) == 0
    assert equal_weights(*runs)


def test_a_finished_run_is_left_alone(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    before = tree("runs/a")
    assert C.main(["--resume", "--out", "runs/a"]) == 0
    assert "is finished" in capsys.readouterr().out and tree("runs/a") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, workdir):
    out = f"runs/signal{int(number)}"
    command = [sys.executable, str(HERE / "cae_dfkd.py"), *FAST, "--cycles", "100000", "--out", out]
    run = subprocess.Popen(command, cwd=workdir, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (workdir / out / "last.pt").exists():
        assert run.poll() is None
        C.time.sleep(0.05)
    (workdir / out / "last.pt.1.tmp").write_text("half a checkpoint")
    C.time.sleep(0.5)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and f"--resume --out {out}" in stderr and "stopping after this cycle" in stderr
    saved = torch.load(workdir / out / "last.pt", weights_only=True)
    lines = (workdir / out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == saved["cycle"] > 1


slow = pytest.mark.skipif("CAE_DFKD_SLOW" not in os.environ, reason="minutes; CAE_DFKD_SLOW=1 runs it, as .ci/run does")


@slow
def test_twenty_kills_change_nothing(workdir):
    """kill -9 at random moments, checkpoint writes among them; the student is that of the unbroken run."""
    args = [*FAST, "--cycles", "150", "--precision", "fp32"]
    assert cli(*args, "--out", "runs/unbroken", cwd=workdir).returncode == 0
    moments, kills, out = np.random.default_rng(0), 0, workdir / "runs/killed"
    command = [sys.executable, "-c", KILLED, *args, "--out", "runs/killed"]
    while True:
        run = subprocess.Popen(command, cwd=workdir, env={**os.environ, "PYTHONPATH": str(HERE)}, stderr=subprocess.PIPE)
        try:
            done = run.wait(moments.uniform(2.5, 6.0) if kills < 20 else 170)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
        else:
            assert done == 0, run.stderr.read().decode()
            break
        if (out / "last.pt").exists():
            torch.load(out / "last.pt", weights_only=True)  # never a half
            command = [*command[:3], "--resume", "--out", "runs/killed"]
        else:
            command = [*command[:3], *args, "--out", "runs/killed"]
    assert kills == 20
    assert equal_weights(workdir / "runs/unbroken", out)
    lines = [json.loads(line)["cycle"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 151)) and not list(out.glob("*.tmp"))


# A run whose every cycle ends with a checkpoint that takes its time: most kills fall into the writing.
KILLED = """
import sys, cae_dfkd as C
real, C.SAVE_EVERY = C.torch.save, 0
def slow(thing, path):
    path.write_bytes(b"half")
    C.time.sleep(0.3)
    real(thing, path)
C.torch.save = slow
sys.exit(C.main())
"""


@slow
def test_soak(workdir, monkeypatch):
    """2,000 cycles: memory flat within 5 %, a line for each, no file left open."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    real, seen = C.distill, []

    def distill(*args):
        *rest, on_cycle = args

        def then(state, metrics):
            on_cycle(state, metrics)
            if state.cycle % 100 == 0:
                status = Path("/proc/self/status").read_text()
                seen.append((int(re.search(r"VmRSS:\s+(\d+)", status)[1]), len(os.listdir("/proc/self/fd"))))

        return real(*rest, then)

    monkeypatch.setattr(C, "distill", distill)
    assert C.main([*FAST, "--cycles", "2000", "--synth-steps", "1", "--kd-steps", "1", "--out", "runs/soak"]) == 0
    memory, files = zip(*seen)
    assert len(seen) == 20 and max(memory[2:]) <= 1.05 * memory[2] and len(set(files)) == 1
    lines = [json.loads(line)["cycle"] for line in Path("runs/soak/metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 2001))


# --- real data ---------------------------------------------------------------------------------------


@needs_real
def test_public_teacher_scores_what_it_should():
    test, _ = C.load_data(str(REAL / "cifar10"), "test")
    teacher = C.load_teacher("resnet20", 10, str(REAL / "resnet20_cifar10.th"), *C.IMAGENET)
    logits, _, labels = C.predict(teacher, test)
    assert len(test) == 1017 and round(C.top1(logits, labels), 2) == 91.64


@needs_real
def test_real_command_for_a_few_seconds(tmp_path):
    done = cli(
        "--dataset",
        str(REAL / "cifar10"),
        "--teacher",
        "resnet20",
        "--teacher-ckpt",
        str(REAL / "resnet20_cifar10.th"),
        "--mean",
        "0.485",
        "0.456",
        "0.406",
        "--std",
        "0.229",
        "0.224",
        "0.225",
        "--prior",
        str(REAL / "clip_vitb32_cifar10.npy"),
        "--minutes",
        "0.05",
        "--warmup-rounds",
        "0",
        "--synth-steps",
        "2",
        "--kd-steps",
        "4",
        "--out",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("teacher resnet20: 91.64 %")
    assert json.loads((tmp_path / "run/summary.json").read_text())["test_images"] == 1017


# --- the file and the README -------------------------------------------------------------------------


def test_file_keeps_its_promises():
    tree = ast.parse(SOURCE)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    longest = max(functions, key=lambda n: n.end_lineno - n.lineno)
    assert longest.end_lineno - longest.lineno < 90, longest.name
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert ".cuda(" not in SOURCE and "weights_only=False" not in SOURCE
    listed, used = (
        set(re.findall(r"\[choice (\d+)\]", part)) for part in (ast.get_docstring(tree), SOURCE.split('"""', 2)[2])
    )
    assert listed == used and len(listed) >= 8
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node)):
            assert not re.search(r"[\x00-\x08\x0b-\x1f]", doc), node.name
    documented = "\n".join(
        ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    )
    assert all(re.search(rf"[Ee]q\. {k}\b", documented) for k in range(1, 11))


def test_import_has_no_side_effect(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cae_dfkd, os, threading; print(os.listdir(), threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-B", "-W", "error::SyntaxWarning", "-c", code, str(HERE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[] 1", done.stderr


README = (HERE / "README.md").read_text()


def test_readme_commands_parse():
    commands = re.findall(
        r"^python cae_dfkd\.py((?:.*\\\n)*.*)$", "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S)), re.M
    )
    assert len(commands) >= 4
    for command in commands:
        words = command.split("#")[0].replace("\\\n", " ").replace("&&", " ").split()
        if "--help" not in words:
            C.parse_args(words)


def test_readme_python_snippets_run(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    snippets = [s for s in snippets if not re.search("import (clip|matplotlib)", s)]  # not installed here
    assert snippets
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_readme_five_folds_are_near_the_single_split(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    names = {}
    exec(next(s for s in re.findall(r"```python\n(.*?)```", README, re.S) if "def five_folds" in s), names)
    single = json.loads(Path("runs/a/summary.json").read_text())["probe"]["teacher"]
    five = names["five_folds"]("checkpoints/shapes_resnet8.pth", "shapes-unseen", 1e-4)
    assert single > 50 and five == pytest.approx(single, abs=4), (single, five)


def test_readme_maps_every_equation_to_code_and_test():
    rows = re.findall(r"^\| (\d+) \|.*?\| `(\w+)` \| `(\w+)` \|", README, re.M)
    assert [int(r[0]) for r in rows] == list(range(1, 11))
    here = (HERE / "test_cae_dfkd.py").read_text()
    for _, name, test in rows:
        assert hasattr(C, name) and f"def {test}(" in here
