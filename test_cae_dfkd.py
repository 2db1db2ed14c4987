"""Tests of cae_dfkd.py: oracles, invariants, checkpoint layouts, the real command line, the README.

Run with `python -m pytest -q`. Tests that need real images look for ../shared/data (or the folder in
CAE_DFKD_DATA) and skip, saying so, where it is absent. CAE_DFKD_SLOW=1 adds the kills and the soak.
"""
# SPDX-License-Identifier: MIT

import ast
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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
needs_real = pytest.mark.skipif(not (REAL / "cifar10").is_dir(),
                                reason=f"REAL DATA ABSENT: {REAL}/cifar10; set CAE_DFKD_DATA to test on it")
slow = pytest.mark.skipif("CAE_DFKD_SLOW" not in os.environ, reason="minutes; CAE_DFKD_SLOW=1 runs it, as .ci/run does")
SOURCE, README = (HERE / "cae_dfkd.py").read_text(), (HERE / "README.md").read_text()
TINY = dict(precision="fp32", student_lr=0.1, lr_warmup=1, cycles=2, generator_width=16, synth_batch=20, synth_steps=2,
            kd_steps=2, batch_size=20, bank_capacity=64, warmup_rounds=1, image_size=16)
DRAW_SHAPES, UNSEEN = C.draw_shapes, list(C.SHAPES)[10:]

@pytest.fixture(scope="module", autouse=True)
def shapes_are_drawn_once():
    """Nobody changes them, and every run of `main` in this process would draw the same ones."""
    once = functools.cache(DRAW_SHAPES)
    C.draw_shapes = lambda n, names, seed, size=32: once(n, tuple(names), seed, size)
    yield
    C.draw_shapes = DRAW_SHAPES

def rng(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).standard_normal(shape) * scale

def build_pair(teacher="resnet8", classes=4, rounds=2):
    """A small teacher with lived-in BatchNorm statistics, and a student: both take (B, 3, 16, 16)."""
    torch.manual_seed(1)
    teacher, student = C.build_model(teacher, classes), C.build_model("resnet8", classes)
    for _ in range(rounds):
        teacher(torch.rand(16, 3, 16, 16))
    return teacher.eval(), student

@pytest.fixture
def pair():
    return build_pair("resnet20", rounds=3)

def distilled(pair, **changes):
    return C.distill(*pair, C.Config(**{**TINY, **changes}))

def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- oracles: each loss against a slow computation, value and gradient -------------------------------

def log_softmax(row):
    top = max(row)
    return [v - top - math.log(sum(math.exp(u - top) for u in row)) for v in row]

def slow_ce(t, y):
    return sum(-log_softmax(row)[k] for row, k in zip(t, y)) / len(t)

def kl(row_t, row_s):
    return sum(math.exp(b) * (b - a) for a, b in zip(log_softmax(row_s), log_softmax(row_t)))

def slow_kd(s, t, tau):
    return tau * tau * sum(kl([v / tau for v in b], [v / tau for v in a]) for a, b in zip(s, t)) / len(s)

def slow_adversarial(s, t):
    return -sum(kl(b, a) for a, b in zip(s, t) if np.argmax(a) == np.argmax(b)) / len(s)

def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

def slow_cae(z, f, y, tau):
    f = [[v - sum(column) / len(f) for v, column in zip(row, zip(*f))] for row in f]
    total = 0.0
    for i, row in enumerate(z):
        below = sum(math.exp(cosine(row, f[k]) / tau) for k in range(len(f)) if k == i or y[k] != y[i])
        total -= cosine(row, f[i]) / tau - math.log(below)
    return total / len(z)

def slow_contrastive(z, y, tau):
    terms = []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        if positives:
            below = sum(math.exp(cosine(z[i], z[a]) / tau) for a in range(len(z)) if a != i)
            terms.append(-sum(cosine(z[i], z[p]) / tau - math.log(below) for p in positives) / len(positives))
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
S, T, Z, E = rng(6, 4, seed=1, scale=2), rng(6, 4, seed=2, scale=2), rng(6, 5, seed=3), rng(6, 5, seed=4)
S[:3] = T[:3] + 0.3  # half of the rows agree on the argmax, half need not
ORACLES = {
    "eq3": (lambda x: C.category_consistency_loss(x, torch.tensor(LABELS)), lambda x: slow_ce(x, LABELS), T),
    "eq5 student": (lambda x: C.adversarial_loss(x, torch.tensor(T)), lambda x: slow_adversarial(x, T), S),
    "eq5 teacher": (lambda x: C.adversarial_loss(torch.tensor(S), x), lambda x: slow_adversarial(S, x), T),
    "eq7": (lambda x: C.kd_loss(x, torch.tensor(T), 3.0), lambda x: slow_kd(x, T, 3.0), S),
    "eq7 default": (lambda x: 100 * C.kd_loss(x, torch.tensor(T)), lambda x: 100 * slow_kd(x, T, 20.0), S),
    "eq8": (lambda x: C.category_aware_embedding_loss(x, torch.tensor(E), torch.tensor(LABELS), 0.2),
            lambda x: slow_cae(x, E, LABELS, 0.2), Z),
    "eq9": (lambda x: C.contrastive_loss(x, torch.tensor(LABELS), 0.3), lambda x: slow_contrastive(x, LABELS, 0.3), Z),
}

@pytest.mark.parametrize("name", ORACLES)
def test_loss_value_and_gradient(name):
    fast, slow, x = ORACLES[name]
    tensor = torch.tensor(x, requires_grad=True)
    value = fast(tensor)
    value.backward()
    assert value.shape == () and value.item() == pytest.approx(slow(x), rel=1e-9)
    np.testing.assert_allclose(tensor.grad.numpy(), numeric_gradient(slow, x), atol=1e-5)
    assert np.abs(tensor.grad.numpy()).max() > 1e-3  # an oracle of a constant would prove nothing

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

def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

def test_feature_matching_is_the_mean_over_layers_and_leaves_no_hook(pair):
    teacher, x = pair[0], torch.rand(4, 3, 16, 16)
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    with C.listen(*layers) as heard:
        teacher(x)
    means = [slow_statistics(a, m.running_mean.tolist(), m.running_var.tolist()) for m, a in heard.items()]
    x.requires_grad_()
    with C.FeatureMatching(teacher) as matching:
        teacher(x)
    loss = matching.loss()
    loss.backward()
    assert len(means) == 19 and loss.item() == pytest.approx(sum(means) / 19, rel=1e-4)
    assert x.grad.abs().sum() > 0 and hooks(teacher) == 0
    with pytest.raises(RuntimeError), C.FeatureMatching(teacher):
        raise RuntimeError
    assert hooks(teacher) == 0
    with C.FeatureMatching(nn.Linear(2, 2)) as matching:
        pass
    assert matching.loss().item() == 0  # no BatchNorm

ALL_LOSSES = {
    "ce": lambda x, y: C.category_consistency_loss(x, y),
    "adv": lambda x, y: C.adversarial_loss(x, x.detach().flip(1) * 0.5 + x.detach()),
    "kd": lambda x, y: C.kd_loss(x, x.detach().flip(1)),
    "cae": lambda x, y: C.category_aware_embedding_loss(x, x.detach().flip(1), y),
    "cncl": lambda x, y: C.contrastive_loss(x, y),
}
BATCHES = {
    "one row": (torch.randn(1, 4), [2]),
    "one class": (torch.randn(5, 4), [1] * 5),
    "no pair": (torch.randn(4, 4), [0, 1, 2, 3]),
    "zeros": (torch.zeros(6, 4), [0, 0, 1, 1, 2, 3]),
    "equal rows": (torch.randn(1, 4).expand(6, 4), [0, 0, 1, 1, 2, 3]),
    "huge": (torch.randn(6, 4) * 1e4, [0, 0, 1, 1, 2, 3]),
    "tiny": (torch.randn(6, 4) * 1e-20, [0, 0, 1, 1, 2, 3]),
    "hard": (2e4 * torch.eye(4) - 1e4, [0, 0, 1, 2]),
}

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_are_finite_and_do_not_see_the_order(name, batch, dtype):
    x, y = BATCHES[batch][0].to(dtype), torch.tensor(BATCHES[batch][1])
    order = torch.randperm(len(y))
    for autocast in (False, True):
        x = x.clone().detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = ALL_LOSSES[name](x, y)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        slack = 1e-6 * max(1.0, x.abs().max().item())
        assert loss <= slack if name == "adv" else loss >= -slack
    if name == "cncl" and batch in ("one row", "no pair"):
        assert loss == 0
    torch.testing.assert_close(ALL_LOSSES[name](x[order], y[order]), ALL_LOSSES[name](x, y), rtol=1e-3, atol=1e-3)

def test_cosine_losses_do_not_see_the_scale():
    z, f, labels = torch.randn(12, 6), torch.randn(12, 6), torch.arange(12) % 4
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(C.contrastive_loss(z * scale, labels), C.contrastive_loss(z, labels))
        scaled, loss = (C.category_aware_embedding_loss(z * a, f / a + 7, labels) for a in (scale, 1.0))
        torch.testing.assert_close(scaled, loss, rtol=1e-3, atol=1e-3)

def test_category_aware_embeddings_leave_the_own_category_alone():
    """Rows of one category are no negatives of each other: a batch of one category has nothing to tell apart."""
    f = torch.randn(8, 5)
    z, one = torch.randn(8, 5), torch.zeros(8, dtype=torch.long)
    assert C.category_aware_embedding_loss(z, f, one) == 0
    two = torch.arange(8) % 2
    far = z.clone().requires_grad_()
    C.category_aware_embedding_loss(far, f, two)[None].backward()
    assert (far.grad.abs().sum(1) > 0).all()

def test_places_are_the_same_in_maps_of_any_size():
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).T.view(1, 2, 8, 8).expand(5, -1, -1, -1)
    fine, coarse = grid.repeat_interleave(2, 2).repeat_interleave(2, 3), grid[:, :, ::2, ::2]
    places = torch.rand(5, 50, 2)
    rows = [C.read_places(m, places) for m in (grid, fine, coarse)]
    assert all(r.shape == (250, 2) for r in rows) and torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0] // 2 * 2, rows[2]) and len(rows[0].unique(dim=0)) > 50
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 3, 3)
    assert torch.equal(C.read_places(images, places[:, :2])[:, 0], torch.arange(5.0).repeat_interleave(2))

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
        e = C.centre_and_scale(torch.tensor(rng(k, width) * 7 + 3))
        assert e.mean(0).abs().max() < 1e-5 and torch.linalg.matrix_rank(e) == rank
        assert e.square().sum(1).mean().item() == pytest.approx(rank, rel=1e-4)

@pytest.mark.parametrize("size", [32, 64, 128, 224])
def test_generator_shapes(size):
    x = C.Generator(12, size)(torch.randn(2, 12))
    assert x.shape == (2, 3, size, size) and 0 <= x.min() and x.max() <= 1

def test_light_generator_is_light():
    light, heavy = (sum(p.numel() for n, p in C.Generator(64, 32, w).named_parameters() if "seed" not in n) for w in (64, 128))
    assert heavy > 3.2 * light
    with pytest.raises(C.UserError, match="image size"):
        C.Generator(4, 33)

def test_bank_is_first_in_first_out():
    bank = C.MemoryBank(5, 2)
    for i in range(9):
        bank.push(torch.full((1, 3, 2, 2), i / 255), torch.tensor([i]))
    assert len(bank) == 5 and sorted(bank.labels.tolist()) == [4, 5, 6, 7, 8] and bank.images.dtype == torch.uint8
    images, labels = bank.sample(100)
    assert torch.equal((images * 255).round()[:, 0, 0, 0].long(), labels) and set(labels.tolist()) == {4, 5, 6, 7, 8}
    bank.push(torch.rand(12, 3, 2, 2), torch.arange(12))
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
PARAMETERS = {"resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet18": 11_173_962,
              "resnet34": 21_282_122, "resnet50": 23_520_842, "wrn16_1": 175_066, "wrn16_2": 691_674, "wrn40_1": 563_930,
              "wrn40_2": 2_243_546, "vgg11": 9_231_114}

@pytest.mark.parametrize("arch", C.ARCHITECTURES)
def test_architectures(arch):
    model = C.build_model(arch, 10).eval()
    if arch in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]
    x = torch.rand(2, 3, 32, 32)
    logits, f = C.forward_with_embedding(model, x)
    assert logits.shape == (2, 10) and torch.equal(logits, model(x))
    torch.testing.assert_close(C.last_layer(model, nn.Linear)(f), logits)
    assert hooks(model) == 0

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

def linear_head(w):
    return {k.replace("fc.", "linear."): v for k, v in w.items()}

LAYOUTS = {  # name: (arch, keys as the public code writes them, its forward, extra build arguments)
    "kuangliu": ("resnet18", lambda k: k.replace("fc.", "linear.").replace("downsample", "shortcut"),
                 lambda w, x: functional_resnet(w, x, (2, 2, 2, 2), "shortcut"), {}),
    "akamaster": ("resnet20", lambda k: k.replace("fc.", "linear."),
                  lambda w, x: functional_resnet(w, x, (3, 3, 3), None), {}),
    "chenyaofo": ("resnet20", lambda k: k, lambda w, x: functional_resnet(linear_head(w), x, (3, 3, 3), "downsample"),
                  {"projection": True}),
    "timm": ("resnet34", lambda k: k, lambda w, x: functional_resnet(linear_head(w), x, (3, 4, 6, 3), "downsample"), {}),
    "wrn": ("wrn16_2", lambda k: k, lambda w, x: functional_wrn(w, x, 2), {}),
    "vgg": ("vgg11", lambda k: k, functional_vgg, {}),
}

@pytest.mark.parametrize("container", ["raw", "state_dict", "module"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts_load_and_give_the_same_logits(layout, container, tmp_path):
    arch, rename, reference, kw = LAYOUTS[layout]
    w = {rename(k): v for k, v in lived_in(arch, **kw).items()}
    stored = {"raw": w, "state_dict": {"state_dict": w, "epoch": 3, "best_acc1": 95.7},
              "module": {"state_dict": {"module." + k: v for k, v in w.items() if "num_batches" not in k}}}[container]
    torch.save(stored, tmp_path / "t.pth")
    teacher = C.load_teacher(arch, 10, str(tmp_path / "t.pth"))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), reference(w, x), atol=1e-4, rtol=1e-4)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

@pytest.mark.parametrize("kind", ["half", "bfloat16", "double", "transposed", "shared"])
def test_odd_but_right_checkpoints_are_read(kind, tmp_path):
    state = C.build_model("resnet8", 4).state_dict()
    if kind == "transposed":
        state["fc.weight"] = state["fc.weight"].T.contiguous().T
    elif kind == "shared":
        state["bn1.weight"], state["bn1.bias"] = torch.randn(2, 16)
    else:
        state = {k: getattr(v, kind)() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "net.pth")
    loaded = C.load_teacher("resnet8", 4, str(tmp_path / "net.pth")).net.state_dict()
    assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in loaded.items())

def test_normalisation_from_argument_file_and_default(tmp_path):
    torch.save({"state_dict": lived_in("resnet8"), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}, tmp_path / "t.pth")
    torch.save(lived_in("resnet8"), tmp_path / "bare.pth")
    x, path = torch.rand(2, 3, 32, 32), str(tmp_path / "t.pth")
    plain, stored = C.load_teacher("resnet8", 10, path, (0, 0, 0), (1, 1, 1)), C.load_teacher("resnet8", 10, path)
    torch.testing.assert_close(stored(x), plain((x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5))
    bare = C.load_teacher("resnet8", 10, tmp_path / "bare.pth", default=C.IMAGENET)
    torch.testing.assert_close(bare.mean.flatten(), torch.tensor(C.IMAGENET[0]))
    with pytest.raises(C.UserError, match="belong together"):
        C.Config(mean=(0.5, 0.5, 0.5))

class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["BOMB"]),))

@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content, message", [({"state_dict": {"a": torch.zeros(1)}}, "Missing"), ({"epoch": 3}, "is no resnet8"),
                                              ([1, 2], "is no resnet8"), ("bomb", "no file of plain tensors")])
def test_foreign_checkpoints_are_refused(content, message, tmp_path, monkeypatch):
    path = tmp_path / "t.pth"
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    path.write_bytes(pickle.dumps(Bomb())) if content == "bomb" else torch.save(content, path)
    with pytest.raises(C.UserError, match=message):
        C.load_teacher("resnet8", 10, str(path))
    assert not (tmp_path / "exploded").exists()

# --- invariants of distill ---------------------------------------------------------------------------

def test_teacher_is_bit_identical_and_student_learns(pair):
    teacher, student = pair
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    teacher.train()  # distill must not rely on the caller
    assert distilled(pair) is student and not student.training
    assert same(teacher, before) and not same(student, start)

def test_distill_touches_no_data(pair, monkeypatch):
    def forbidden(*args, **kw):
        raise AssertionError("distill reached for data")

    for target, name in ((C, "load_data"), (C, "draw_shapes"), (C, "DataLoader"), (torch, "load"), (socket, "socket"),
                         (C.datasets, "ImageFolder"), (C.datasets, "CIFAR10"), (np, "load")):
        monkeypatch.setattr(target, name, forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    distilled(pair)

@pytest.mark.parametrize("decoupled", [True, False])
def test_same_seed_same_student(decoupled):
    one, two, other = (distilled(build_pair(), decoupled=decoupled, seed=s) for s in (0, 0, 1))
    assert same(one, two) and not same(one, other)

@pytest.mark.parametrize("weight, function", [("lambda_cae", "category_aware_embedding_loss"), ("lambda_cncl", "contrastive_loss"),
                                              ("lambda_adv", "adversarial_loss"), ("lambda_fm", "statistics_distance")])
def test_zero_weight_has_no_effect_and_others_have(weight, function, monkeypatch):
    def pair():  # a student that agrees with its teacher everywhere, or eq. 5 might have no row to count
        teacher = build_pair()[0]
        student = copy.deepcopy(teacher)
        for p in C.last_layer(student, nn.Linear).parameters():
            p.data *= 2
        return teacher, student

    on, off = distilled(pair(), **{weight: 1.0}), distilled(pair(), **{weight: 0.0})
    assert not same(on, off)
    monkeypatch.setattr(C, function, lambda *a, **k: 1 / 0)  # switched off means not even called
    assert same(off, distilled(pair(), **{weight: 0.0}))

@pytest.mark.parametrize("teacher, student", [("wrn16_2", "resnet8"), ("resnet18", "vgg11"), ("resnet50", "wrn16_1")])
def test_networks_of_other_widths_and_maps_go_together(teacher, student):
    pair = C.build_model(teacher, 4).eval(), C.build_model(student, 4)
    seen = []
    C.distill(*pair, C.Config(**{**TINY, "cycles": 1, "image_size": 32}), on_cycle=lambda state, metrics: seen.append(metrics["cae"]))
    assert math.isfinite(seen[0]) and seen[0] > 1

@pytest.mark.parametrize("change", [{"places": 0}, {"cend": False}, {"decoupled": False}, {"prior": "index"}, {"generator_width": 32},
                                    {"magnitudes": (1.0,)}, {"magnitudes": (1.0,) * 8}])
def test_every_switch_changes_the_run(change):
    assert not same(distilled(build_pair()), distilled(build_pair(), **change))

def test_phases_are_decoupled():
    teacher, student = build_pair()
    config = C.Config(**TINY)
    C.set_training(teacher, False)
    state = C.State(teacher, student, config)
    frozen = copy.deepcopy(student.state_dict())
    C.synthesis_round(state, teacher, config)
    assert same(student, frozen) and all(p.grad is None for p in student.parameters())
    generator = copy.deepcopy(state.generator.state_dict())
    state.generator.forward = None  # any call would fail
    C.distillation_phase(state, teacher, config)
    assert same(state.generator, generator)

def test_coupled_training_takes_turns_on_one_batch(monkeypatch):
    order, real = [], (C.generator_step, C.student_step)
    monkeypatch.setattr(C, "generator_step", lambda *a: order.append("G") or real[0](*a))
    monkeypatch.setattr(C, "student_step", lambda state, *a: order.append(len(state.bank)) or real[1](state, *a))
    distilled(build_pair(), decoupled=False, kd_steps=3, cycles=1)
    assert order == ["G", 20] * 3  # the bank never holds more than the fresh batch

@pytest.mark.parametrize("term, function", [("kd", "kd_loss"), ("ce", "category_consistency_loss"), ("cncl", "contrastive_loss")])
def test_non_finite_loss_names_term_and_cycle(term, function, pair, monkeypatch):
    monkeypatch.setattr(C, function, lambda logits, *rest: logits.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=f"in cycle 1: .*{term}"):
        distilled(pair)

def test_a_step_that_is_not_finite_leaves_the_best_images_alone(monkeypatch):
    teacher, student = build_pair()
    config = C.Config(**{**TINY, "synth_steps": 4})
    state, losses, real = C.State(teacher, student, config), iter([5.0, 2.0, math.nan, 3.0]), C.generator_step
    seen = []

    def step(*args):
        images, _, terms = real(*args)
        seen.append(images)
        return images, torch.tensor(next(losses)), terms

    monkeypatch.setattr(C, "generator_step", step)
    C.synthesis_round(state, teacher, config)
    assert torch.equal(state.bank.images[:20], (seen[1] * 255).round().to(torch.uint8))

def test_bank_stops_at_its_cap(pair):
    sizes = []
    C.distill(*pair, C.Config(**{**TINY, "cycles": 6, "bank_capacity": 50}),
              on_cycle=lambda state, metrics: sizes.append((len(state.bank), len(state.bank.images))))
    assert sizes[-1] == (50, 50) and len({s[1] for s in sizes}) == 1

def test_the_students_step_grows_over_the_first_cycles_and_then_falls(pair):
    rates = []
    config = C.Config(**{**TINY, "cycles": 8, "lr_warmup": 4, "student_lr": 0.2})
    C.distill(*pair, config, on_cycle=lambda s, m: rates.append(m["lr"]))
    cosine = [0.1 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates == pytest.approx([c * share for c, share in zip(cosine, (0.25, 0.5, 0.75, 1, 1, 1, 1, 1))])

@pytest.mark.parametrize("tick", [0.02, 0.3])
def test_a_time_budget_is_kept_to_a_step(pair, tick):
    """`progress` is read at each student step and between the first rounds; a run of any length ends when it says so."""
    now, rates = [0.0], []

    def progress():
        now[0] += tick
        return min(1.0, now[0])

    config = C.Config(**{**TINY, "kd_steps": 10**6, "warmup_rounds": 10**6, "cycles": 1})
    C.distill(*pair, config, progress=progress, on_cycle=lambda s, m: rates.append((m["lr"], s.bank.pushed)))
    assert 1 <= now[0] < 1 + 4 * tick and len(rates) == 1 and rates[0][1] <= 20 * (0.5 / tick + 3)

def test_more_classes_than_a_batch():
    teacher, student = build_pair(classes=30)
    C.distill(teacher, student, C.Config(**{**TINY, "synth_batch": 8, "batch_size": 8}))
    assert all(v.isfinite().all() for v in student.state_dict().values())

def test_what_distill_refuses_and_warns_of():
    bare = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="no BatchNorm: feature matching is off"):
        distilled((bare, build_pair()[1]))
    teacher, student = build_pair()
    state = C.State(teacher, student, C.Config(**TINY))
    for pair, kept in (((teacher, teacher), None), ((teacher, copy.deepcopy(student)), state)):
        with pytest.raises(C.UserError, match="must be the network in `state`, and another than the teacher"):
            C.distill(*pair, C.Config(**TINY), state=kept)

# --- speed, without a clock --------------------------------------------------------------------------

def test_no_step_waits_for_the_device(monkeypatch):
    """Reading a number off a tensor makes the host wait for a GPU: inside the phases nothing may do so."""
    teacher, student = build_pair()
    config = C.Config(**TINY)
    C.set_training(teacher, False)
    state = C.State(teacher, student, config)
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        monkeypatch.setattr(optimizer, "step", lambda self: None)
    for name in "item tolist cpu numpy nonzero __bool__ __int__ __float__ __index__".split():
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("the host reads a tensor"))
    C.synthesis_round(state, teacher, config)
    C.distillation_phase(state, teacher, config)

def test_gradients_stay_channels_last():
    """A gradient in another memory format costs a fifth of a training step: sliced shortcuts had one."""
    net, wrong = C.Normalized(C.build_model("resnet8", 4), (0, 0, 0), (1, 1, 1)), []

    def check(gradient):
        wrong.append(not gradient.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, C.BasicBlock):
            module.register_forward_hook(lambda module, args, out: out.register_hook(check) and None)
    net(C.to_float(torch.rand(4, 3, 32, 32), "cpu")).sum().backward()
    assert len(wrong) == 3 and not any(wrong[1:])  # the first comes from the pooling to one pixel

# --- evaluation --------------------------------------------------------------------------------------

def test_linear_probe_separates_a_separable_toy_and_is_deterministic():
    x, y = torch.rand(400, 3, 8, 8) * 0.3, torch.arange(400) % 3
    x[torch.arange(400), y] += 0.6  # the class is the brightest channel
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))  # head width plays no part
    train, test = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])
    before = copy.deepcopy(backbone.state_dict())
    result = C.linear_probe(backbone, train, test)
    assert result["accuracy"] == 100 and result == C.linear_probe(backbone, train, test) and same(backbone, before)
    shuffled = TensorDataset(x[:300], y[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    assert C.linear_probe(backbone, shuffled, test)["accuracy"] < 70

def test_logistic_regression_is_at_its_optimum():
    x, y = torch.tensor(rng(60, 5)).float(), torch.arange(60) % 3
    w, b = (v.requires_grad_() for v in C.fit_logistic(x, y, 3, l2=0.01))
    (F.cross_entropy(x @ w + b, y) + 0.005 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-4 and b.grad.abs().max() < 1e-4

def test_shapes_are_seeded_and_distinct():
    one, two, other = (DRAW_SHAPES(200, list(C.SHAPES)[:10], seed) for seed in (1, 1, 2))
    assert torch.equal(one.tensors[0], two.tensors[0]) and not torch.equal(one.tensors[0], other.tensors[0])
    assert torch.bincount(one.tensors[1], minlength=10).min() > 5
    assert one.tensors[0].shape == (200, 3, 32, 32) and one.tensors[0].dtype == torch.uint8

@pytest.fixture(scope="module")
def scenes():
    return C.draw_scenes(20, UNSEEN, 1), C.draw_scenes(12, UNSEEN, 2)

def test_scenes_are_seeded_and_boxes_are_inside_and_apart(scenes):
    again, other = C.draw_scenes(20, UNSEEN, 1), C.draw_scenes(20, UNSEEN, 3)
    assert all(torch.equal(a, b) and same(s, t) for (a, s), (b, t) in zip(scenes[0], again)) and not torch.equal(again[0][0], other[0][0])
    counts = [len(target["labels"]) for _, target in scenes[0] + other]
    assert min(counts) == 1 and max(counts) == 4 and scenes[0][0][0].shape == (3, 96, 96)
    for image, target in scenes[0]:
        boxes = target["boxes"]
        assert (boxes >= 0).all() and (boxes <= 96).all() and target["labels"].max() < 6
        size = boxes[:, 2:] - boxes[:, :2]
        assert 7 <= size.min() and size.max() <= 2 * 1.3 * 17 + 1
        overlap = C.ops.box_iou(boxes, boxes) - torch.eye(len(boxes))
        assert overlap.max() < 0.1

def test_boxes_are_tight_around_the_shapes(monkeypatch):
    masks, real = [], C.shape_mask
    monkeypatch.setattr(C, "shape_mask", lambda *args: masks.append(real(*args)) or masks[-1])
    for j, (_, target) in enumerate(C.draw_scenes(8, UNSEEN, 5)):
        pixels = [sorted(zip(*m[j].nonzero())) for m in masks if m[j].any()]
        tight = [[min(x for _, x in p), min(y for y, _ in p), 1 + max(x for _, x in p), 1 + max(y for y, _ in p)] for p in pixels]
        assert target["boxes"].tolist() == tight

def test_locations_learn_the_box_in_whose_central_half_they_lie():
    places = torch.cartesian_prod(torch.arange(4.0, 64, 8), torch.arange(4.0, 64, 8)).flip(1)  # 8 x 8 of 8 pixels
    boxes = torch.tensor([[0.0, 0, 32, 32], [8, 8, 16, 16], [49, 49, 51, 51.5]])
    category, sides = C.assign_locations(places, boxes, torch.tensor([0, 1, 2]), 3)
    grid = category.view(8, 8)
    assert grid[1, 1] == 1 and grid[1, 2] == grid[2, 1] == grid[2, 2] == 0  # the smaller box comes first
    assert grid[0, 0] == grid[3, 3] == -1 and grid[6, 6] == 2 and (grid[4:6, 4:6] == 3).all()  # 2 holds no place: the nearest
    assert sides.view(8, 8, 4)[2, 1].tolist() == [12, 20, 20, 12] and (sides > 0).all()
    category, sides = C.assign_locations(places, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), 3)
    assert (category == 3).all() and sides.shape == (64, 4)

def slow_average_precision(detections, truths):
    """Every detection of all images, best first; precision interpolated from the right at each new recall."""
    rows = sorted(((s, i, b) for i, (boxes, scores) in enumerate(detections) for b, s in zip(boxes.tolist(), scores.tolist())),
                  key=lambda row: -row[0])
    taken, points, right = set(), [], 0
    for n, (_, i, b) in enumerate(rows, 1):
        best, where = 0.0, None
        for j, t in enumerate(truths[i].tolist()):
            w, h = min(b[2], t[2]) - max(b[0], t[0]), min(b[3], t[3]) - max(b[1], t[1])
            inter = max(0, w) * max(0, h)
            iou = inter / ((b[2] - b[0]) * (b[3] - b[1]) + (t[2] - t[0]) * (t[3] - t[1]) - inter)
            if (i, j) not in taken and iou > best:
                best, where = iou, (i, j)
        if best >= 0.5:
            taken.add(where)
            right += 1
        points.append((right, right / n))
    total = sum(map(len, truths))
    return 100 * sum(max([p for r, p in points if r >= k], default=0) for k in range(1, total + 1)) / total

@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_that_of_a_slow_computation(seed):
    draw = torch.Generator().manual_seed(seed)
    truths, detections = [], []
    for i in range(6):
        corner = torch.rand(i % 4, 2, generator=draw) * 60
        truths.append(torch.cat([corner, corner + 20], 1))
        near = truths[-1].repeat(3, 1) + torch.randn(3 * (i % 4), 4, generator=draw) * 4
        boxes = torch.cat([near, torch.tensor([[70.0, 70, 90, 90]])])
        scores = torch.rand(len(boxes), generator=draw)
        order = scores.argsort(descending=True)
        detections.append((boxes[order], scores[order]))
    value = C.average_precision(detections, truths)
    assert value == pytest.approx(slow_average_precision(detections, truths), rel=1e-9) and 0 < value < 100
    assert C.average_precision([(t, torch.ones(len(t))) for t in truths], truths) == 100
    assert C.average_precision([(t[:0], torch.zeros(0)) for t in truths], truths) == 0

class Painter(nn.Module):
    """Perfect features: what a location is to learn, read off the image's own pixels."""

    def __init__(self, data):
        super().__init__()
        self.known = {image.numpy().tobytes(): target for image, target in data}
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(11, 2)

    def forward(self, x):
        target = self.known[(x[0] * 255).round().to(torch.uint8).contiguous().numpy().tobytes()]
        places = torch.cartesian_prod(torch.arange(2.0, 96, 4), torch.arange(2.0, 96, 4)).flip(1)
        category, sides = C.assign_locations(places, target["boxes"], target["labels"], 6)
        rows = torch.cat([20 * F.one_hot(category.clamp_min(0) + 6 * (category < 0), 7), sides.log()], 1)
        return self.fc(self.pool(rows.T.reshape(1, 11, 24, 24)).flatten(1))

def test_detection_probe_finds_all_with_perfect_features_and_is_deterministic(scenes):
    perfect = C.detection_probe(Painter(scenes[0] + scenes[1]), *scenes, categories=list("abcdef"))
    assert perfect["ap50"] > 99 and set(perfect["per_category"]) == set("abcdef")
    torch.manual_seed(0)
    net = C.build_model("resnet8", 4)
    before = copy.deepcopy(net.state_dict())
    one, two = (C.detection_probe(net, *scenes, most=2000) for _ in range(2))
    assert one["ap50"] == two["ap50"] < 60 and one["per_category"] == two["per_category"] and same(net, before)

@pytest.mark.parametrize("arch", ["resnet18", "wrn16_1", "vgg11"])
def test_dense_features_are_the_map_before_pooling(arch):
    net, image = C.build_model(arch, 4).eval(), torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    rows, places = C.dense_features(net, image, "cpu")
    torch.testing.assert_close(rows.mean(0), C.forward_with_embedding(net, C.to_float(image[None], "cpu"))[1][0])
    assert len(rows) == len(places) and places[0, 0] == places[0, 1] and places[-1].tolist() == [96 - places[0, 0], 64 - places[0, 0]]

def write_voc(root, objects, image=(48, 64)):
    """A folder in VOC layout: {name: [(category, box, difficult)]}, its first half for training."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, rows in objects.items():
        save_image(root / f"JPEGImages/{name}.jpg", *image)
        xml = "".join(f"<object><name>{c}</name><difficult>{d}</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
                      f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>" for c, b, d in rows)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    names = list(objects)
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[: len(names) // 2]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[len(names) // 2 :]))

def test_photographs_with_boxes(tmp_path):
    objects = {f"{i}": [("cat", (4, 4, 30, 40), 0), ("dog", (30, 10, 999, 47), 0), ("cow", (1, 1, 9, 9), 1)] for i in range(5)}
    write_voc(tmp_path, objects | {"empty": [], "new": [("emu", (10, 10, 40, 40), 0)], "out": [("cat", (80, 80, 90, 90), 0)]})
    train, test, names = C.load_detection(C.Config(detection_dataset=str(tmp_path), detection_size=32))
    assert names == ["cat", "dog", "emu"] and len(train) == len(test) == 4
    image, target = train[0]
    assert image.shape == (3, 24, 32) and target["labels"].tolist() == [0, 1]
    assert target["boxes"].tolist() == [[2, 2, 15, 20], [15, 5, 32, 23.5]]
    assert [len(test[i][1]["labels"]) for i in range(4)] == [2, 0, 1, 0]
    result = C.detection_probe(C.build_model("resnet8", 4), train, test, categories=names)
    assert set(result["per_category"]) == {"cat", "dog", "emu"} and result["per_category"]["emu"] == 0
    C.save_detections(test, [result["detections"]], tmp_path / "detection.png", columns=4)
    with pytest.raises(C.UserError, match="no VOC layout"):
        C.load_detection(C.Config(detection_dataset=str(tmp_path / "JPEGImages")))

def save_image(path, *size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode).save(path)

def test_odd_but_right_images_are_read(tmp_path):
    for i, (mode, size) in enumerate({"L": (9, 40), "RGBA": (40, 9), "P": (1, 1), "1": (64, 64), "RGB": (5, 300)}.items()):
        for name in "ab":
            save_image(tmp_path / "val" / name / f"{i}.png", *size, mode=mode)
    data, names = C.load_data(str(tmp_path), "test")
    images, labels = data.tensors
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.uint8 and names == ["a", "b"]
    assert labels.tolist() == [0] * 5 + [1] * 5

# --- command line ------------------------------------------------------------------------------------

FAST = ("--teacher resnet8 --teacher-epochs 1 --cycles 2 --generator-width 16 --synth-batch 20 --synth-steps 2 "
        "--kd-steps 2 --batch-size 20 --bank-capacity 64 --warmup-rounds 1 --no-detection").split()
PROGRAM = [sys.executable, str(HERE / "cae_dfkd.py")]

def cli(*args, cwd):
    return subprocess.run([*PROGRAM, *args], cwd=cwd, capture_output=True, text=True, timeout=170)

def tensors(*path):
    return torch.load(Path(*path), weights_only=True)

def equal_weights(*outs):
    first, *others = (tensors(out, "student.pt")["state_dict"] for out in outs)
    return all(same(first, other) for other in others)

def cycles_logged(out):
    return [json.loads(line)["cycle"] for line in Path(out, "metrics.jsonl").read_text().splitlines()]

@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A folder with a quickly trained teacher on shapes and a finished tiny run, made by the real command."""
    folder = tmp_path_factory.mktemp("work")
    done = cli(*FAST, "--eval-every", "1", "--out", "runs/a", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder

@pytest.fixture
def here(workdir, monkeypatch):
    """In that folder, with probes that cost nothing."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    return workdir

def test_run_directory_is_complete(workdir):
    run, out = workdir / "runs/a", (workdir / "stdout").read_text()
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", "samples.png", "last.pt", "student.pt", "summary.json"}
    summary = json.loads((run / "summary.json").read_text())
    top = summary["top-1"]
    assert 0 < top["student"] < 100 and set(top) == set(summary["linear probe"]) == {"student", "teacher", "untrained"}
    order = [out.index(text) for text in ("training resnet8 into checkpoints/shapes_resnet8_1epochs.pth",
             "2 cycles will take about 0 minutes on this machine", f"teacher resnet8: {top['teacher']:.2f} %", "distilling: ",
             f"top-1 on 2000 test images: student {top['student']:.2f}", "linear probe on shapes-unseen: student")]
    assert order == sorted(order)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["cycle"] for line in lines] == [1, 2]
    for key in "ce fm adv kd cae cncl lr variance recognised images seconds accuracy".split():
        assert math.isfinite(lines[1][key])
    assert lines[1]["accuracy"] == pytest.approx(top["student"])  # the last state
    assert json.loads((run / "config.json").read_text())["kd_steps"] == 2

def test_a_free_run_directory_is_chosen(here):
    assert C.main([*FAST, "--cycles", "1"]) == 0
    (out,) = Path("runs").glob("shapes_resnet8_resnet8_0_2*")
    assert (out / "summary.json").exists()

def test_real_kd_makes_no_image_and_holds_the_training_set(here, monkeypatch):
    monkeypatch.setattr(C, "generator_step", lambda *args: 1 / 0)
    assert C.main([*FAST, "--real-kd", "--out", "runs/real"]) == 0
    bank, (train, _) = tensors("runs/real/last.pt"), C.load_data("shapes", "train")
    assert torch.equal(bank["bank.images"], train.tensors[0]) and torch.equal(bank["bank.labels"], train.tensors[1])

def test_eval_only_gives_the_summary_number(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    assert C.main(["--eval-only", "runs/a/student.pt", "--dataset", "shapes-unseen"]) == 2
    assert "no resnet8 with 6 classes" in capsys.readouterr().err
    done, summary = cli("--eval-only", "runs/a/student.pt", "--no-detection", cwd=workdir), json.loads(Path("runs/a/summary.json").read_text())
    assert done.returncode == 0 and f"student {summary['top-1']['student']:.2f}" in done.stdout
    assert f"student {summary['linear probe']['student']:.2f}" in done.stdout

def test_resume_is_exact(here, monkeypatch, capsys):
    args = [*FAST, "--precision", "fp32", "--eval-every", "1"]  # the cut is at an evaluation
    assert C.main(args + ["--out", "runs/whole"]) == 0
    real = C.save_atomic

    def interrupted(thing, path):
        real(thing, path)
        if path.name == "last.pt" and thing["_extra_state"]["cycle"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(C, "save_atomic", interrupted)
    assert C.main(args + ["--out", "runs/cut"]) == 130 and "--resume --out runs/cut" in capsys.readouterr().err
    monkeypatch.setattr(C, "save_atomic", real)
    assert C.main(["--resume", "--out", "runs/cut"]) == 0
    whole, cut = (tensors(f"runs/{n}/last.pt") for n in ("whole", "cut"))

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b

    for saved in (whole, cut):
        saved["_extra_state"].pop("seconds")
    assert equal(whole, cut)
    assert cycles_logged("runs/cut") == [1, 2] and equal_weights("runs/whole", "runs/cut")
    before = tensors("runs/cut/student.pt")
    assert C.main(["--resume", "--out", "runs/cut"]) == 0  # of a finished run: the same again
    assert same(before["state_dict"], tensors("runs/cut/student.pt")["state_dict"])

def test_a_minute_budget_is_resumed_with_the_time_that_was_left(here):
    assert C.main([*FAST, "--minutes", "0.02", "--out", "runs/minutes"]) == 0
    saved = tensors("runs/minutes/last.pt")
    assert 1.2 <= saved["_extra_state"]["seconds"] < 1.8
    saved["_extra_state"]["seconds"] = 0.6
    torch.save(saved, "runs/minutes/last.pt")
    assert C.main(["--resume", "--out", "runs/minutes"]) == 0
    more = tensors("runs/minutes/last.pt")["_extra_state"]
    assert more["cycle"] > saved["_extra_state"]["cycle"] and 1.2 <= more["seconds"] < 1.8

def test_evaluation_leaves_no_trace_in_the_student(here):
    """Other test images, other reports, another probe or none: the same student, bit for bit."""
    base = [*FAST, "--teacher-ckpt", "checkpoints/shapes_resnet8_1epochs.pth", "--precision", "fp32"]
    for split in ("train", "test"):
        for name in list(C.SHAPES)[:10]:
            save_image(here / "other" / split / name / "x.png", 16, 16)
    preset = [word for name, value in C.PRESETS["shapes"].items() if C.flag_of(name) not in FAST
              for word in (C.flag_of(name), str(value))]
    runs = {"runs/e0": [], "runs/e1": ["--eval-every", "1", "--probe-dataset", "shapes"], "runs/e2": ["--dataset", "other", *preset]}
    for out, args in runs.items():
        assert C.main([*base, *args, "--out", out]) == 0
    assert equal_weights(*runs)

def test_help_needs_nothing_and_names_every_field(monkeypatch, capsys):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: 1 / 0)
    assert C.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in text for f in dataclasses.fields(C.Config))
    assert all(len(f.metadata["help"]) > 5 for f in dataclasses.fields(C.Config))

def test_output_that_nobody_reads_is_no_error(workdir):
    done = subprocess.run(f"{' '.join(PROGRAM)} --eval-only runs/a/student.pt --no-detection | true", shell=True, cwd=workdir,
                          capture_output=True, text=True)
    assert done.stderr == ""

# --- the teacher: fetched, placed, trained -----------------------------------------------------------

@pytest.fixture
def public(tmp_path, monkeypatch):
    """A public teacher at a file: address, for the drawn shapes, with its digest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    torch.save({"state_dict": {"module." + k: v for k, v in C.build_model("resnet8", 10).state_dict().items()}}, "served.pth")
    digest = hashlib.sha256(Path("served.pth").read_bytes()).hexdigest()

    def offer(digest, address=f"file://{tmp_path}/served.pth"):
        monkeypatch.setitem(C.PUBLIC_TEACHERS, ("shapes", "resnet8"), (address, digest, 91.5, C.IMAGENET))

    offer(digest[:8])
    return offer

def test_a_public_teacher_is_fetched_once_checked_and_normalised(public, capsys):
    assert C.main([*FAST, "--out", "run"]) == 0
    out, (file,) = capsys.readouterr().out, Path("checkpoints").iterdir()
    assert re.fullmatch(r"shapes_resnet8-[0-9a-f]{8}\.pth", file.name)
    assert "served.pth, stated accuracy 91.5 %" in out and out.index("stated") < out.index("teacher resnet8: ")
    assert tensors("run/student.pt")["mean"] == pytest.approx(C.IMAGENET[0])
    Path("served.pth").unlink()  # now from checkpoints/
    assert C.main([*FAST, "--cycles", "1", "--out", "again"]) == 0
    assert C.main([*FAST, "--cycles", "1", "--out", "third", "--teacher-ckpt", str(file)]) == 0
    assert tensors("third/student.pt")["mean"] == pytest.approx(C.IMAGENET[0])  # known by its digest

@pytest.mark.parametrize("digest, address", [("0" * 8, None), ("", "file:///nowhere/at/all.pth"), ("12fca82f", "http://127.0.0.1:9/x.pth")])
def test_a_public_teacher_that_is_wrong_or_away_leaves_nothing(digest, address, public, capsys):
    public(*[digest] if address is None else [digest, address])
    assert C.main([*FAST, "--out", "run"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: cannot fetch ") and f"as checkpoints/shapes_resnet8-{digest or 'public'}.pth" in error and "--train-teacher" in error
    assert not Path("run").exists() and not list(Path(".").rglob("checkpoints/*"))

def test_own_files_come_before_public_ones_and_training_on_request(public, capsys):
    """Trained ones are kept by their epochs; checkpoints/DATA_NAME.pth is the user's own."""
    train = [*FAST, "--cycles", "1", "--train-teacher"]
    for epochs, again in ((1, False), (1, True), (2, False)):
        assert C.main([*train, "--teacher-epochs", str(epochs), "--out", f"run{epochs}{again}"]) == 0
        assert ("training resnet8" in capsys.readouterr().out) != again
    own = Path("checkpoints/shapes_resnet8.pth")
    own.write_bytes(Path("checkpoints/shapes_resnet8_2epochs.pth").read_bytes())
    assert C.main([*FAST, "--cycles", "1", "--out", "own"]) == 0
    assert f"teacher weights: {own}\n" in capsys.readouterr().out

def test_teacher_training_goes_on_where_it_was(here, tmp_path, monkeypatch):
    """An epoch, an interruption in the next one, and the same call again: the unbroken teacher, bit for bit."""
    data, _ = C.load_data("shapes", "test")
    data = TensorDataset(*(part[:512] for part in data.tensors))
    config, calls = C.Config(teacher="resnet8", teacher_epochs=3, precision="fp32", device="cpu"), []

    def train(path, status=lambda text: None):
        torch.manual_seed(0)
        C.train_teacher(config, 10, data, path, status)
        return C.load_safely(path)["state_dict"]

    def breaks(text):
        calls.append(text)
        if len(calls) == 6:
            raise KeyboardInterrupt

    whole = train(tmp_path / "whole.pth")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut.pth", breaks)
    assert not (tmp_path / "cut.pth").exists() and (tmp_path / "cut.unfinished").exists() and "minutes left" in calls[-1]
    assert same(whole, train(tmp_path / "cut.pth")) and not (tmp_path / "cut.unfinished").exists()

def test_download_without_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    assert C.main(["--teacher", "resnet34", "--dataset", "cifar10"]) == 2
    error = capsys.readouterr().err
    assert "cifar10" in error and "cifar-10-batches-py/ into data/" in error and len(error.strip().splitlines()) == 1

# --- several processes -------------------------------------------------------------------------------

def torchrun(processes, *args, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*command, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(HERE)}, capture_output=True, text=True,
                          timeout=170)

WORKER = """
import torch, cae_dfkd as C
C.join_processes(C.Config(device="cpu"))
config = C.Config(precision="fp32", cycles=1, generator_width=16, synth_batch=20, batch_size=20, image_size=16, lambda_adv=0.5)
grads = []
for connected in (False, True):                 # one process's arithmetic, and the same batch in two halves
    torch.manual_seed(1)
    teacher, student = C.build_model("resnet8", 4), C.build_model("resnet8", 4)
    teacher(torch.rand(16, 3, 16, 16))
    C.set_training(teacher.eval(), False)
    C.set_training(student, False)
    state = C.State(teacher, student, config)
    state.generator.eval(), state.cend.eval()  # BatchNorm of generator and student see a share only: leave it out
    if connected:
        C.connect(state)
    torch.manual_seed(2)
    e_hat, labels, images = torch.randn(20, 64), torch.arange(20) % 4, torch.rand(20, 3, 16, 16)
    C.generator_step(state, teacher, state.share(e_hat), state.share(labels), config)
    student.requires_grad_(True)
    C.student_step(state, teacher, state.share(images), state.share(labels), config)
    grads.append(torch.cat([p.grad.flatten() for m in (state.generator, state.projection, student) for p in m.parameters()]))
print("gradients", C.rank(), bool((grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()), flush=True)
"""

def test_two_processes_take_the_steps_of_one(workdir):
    (workdir / "worker.py").write_text(WORKER)
    done = torchrun(2, "worker.py", cwd=workdir)
    assert "gradients 0 True" in done.stdout and "gradients 1 True" in done.stdout, done.stdout + done.stderr

TWO = """
import hashlib, os, sys, time, cae_dfkd as C
C.linear_probe, shapes = lambda *args: {"accuracy": 0.0}, C.draw_shapes
C.draw_shapes = lambda n, *rest: shapes(n // 20, *rest)      # they only score
distill, record = C.distill, C.Recorder.__call__
def told(*args):
    bits = b"".join(v.numpy().tobytes() for v in distill(*args).state_dict().values())
    print(f"student {C.rank()} {hashlib.sha256(bits).hexdigest()}\\n", end="", flush=True)     # in one piece
def dies(self, state, metrics):
    record(self, state, metrics)
    if "DIE" in os.environ and state.cycle == 1 and C.rank() == 1:
        time.sleep(1)                           # until process 0 has saved
        os._exit(9)
C.distill, C.Recorder.__call__ = told, dies
sys.exit(C.main())
"""

def test_two_processes_end_alike_and_a_lost_one_can_be_resumed(workdir, monkeypatch):
    (workdir / "two.py").write_text(TWO)
    args = [*FAST, "--precision", "fp32", "--out"]
    monkeypatch.setenv("DIE", "1")
    assert torchrun(2, "two.py", *args, "runs/lost", cwd=workdir).returncode != 0
    monkeypatch.delenv("DIE")
    assert tensors(workdir, "runs/lost/last.pt")["_extra_state"]["cycle"] == 1
    ends = [torchrun(2, "two.py", *words, cwd=workdir) for words in ([*args, "runs/two"], ["--resume", "--out", "runs/lost"])]
    assert all(end.returncode == 0 for end in ends), ends[0].stderr + ends[1].stderr
    students = [re.findall(r"student (\d) (\w{64})", end.stdout) for end in ends]
    assert [len(s) for s in students] == [2, 2] and len({bits for s in students for _, bits in s}) == 1, "".join(end.stdout for end in ends)
    assert cycles_logged(workdir / "runs/lost") == [1, 2]

def test_torchrun_with_one_process_is_the_plain_run(workdir):
    (workdir / "two.py").write_text(TWO)
    one = torchrun(1, "two.py", *FAST, "--eval-every", "1", "--out", "runs/torchrun", cwd=workdir)
    assert one.returncode == 0, one.stderr
    assert equal_weights(workdir / "runs/a", workdir / "runs/torchrun")

# --- hard to break -----------------------------------------------------------------------------------

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
            (workdir / "text" / split / name).mkdir(parents=True)
            (workdir / "text" / split / name / "x.png").write_text("no image")
    torn = workdir / "torn/test/b/x.png"
    torn.write_bytes(torn.read_bytes()[:200])
    Image.new("1", (30_000, 30_000)).save(workdir / "vast/test/b/x.png")
    np.save(workdir / "wrong.npy", np.zeros((3, 7), dtype=np.float32))
    np.save(workdir / "nan.npy", np.full((10, 7), np.nan, dtype=np.float32))
    np.save(workdir / "alike.npy", np.ones((10, 7), dtype=np.float32))
    np.save(workdir / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (workdir / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00\x0e\x00{'descr': '<f4',")
    net = C.build_model("resnet8", 10).state_dict()
    more = {"state_dict": net, "arch": "resnet8", "image_size": 32, "dataset": "shapes"}
    for name, content in {
        "fine.pth": net, "list.pth": [1, 2], "hundred.pth": C.build_model("resnet8", 100).state_dict(),
        "nan.pth": {k: v * math.nan if v.is_floating_point() else v for k, v in net.items()},
        "scalar.pth": {**net, "fc.bias": torch.tensor(1.0)}, "elsewhere.pt": more | {"dataset": "cifar10"},
        "sparse.pth": {**net, "fc.weight": torch.zeros(10, 64).to_sparse()}, "mean.pth": more | {"mean": "0.5", "std": [1.0] * 3},
        "huge.pt": more | {"image_size": 10**9}, "arch.pt": more | {"arch": ["resnet8"]},
    }.items():
        torch.save(content, workdir / name)
    (workdir / "text.pth").write_text("not a checkpoint")
    (workdir / "binfloat.pth").write_text("Good")
    (workdir / "file").write_text("in the way")
    (workdir / "holds").mkdir()
    (workdir / "holds/student.pt").write_text("of somebody")
    saved = tensors(workdir, "runs/a/last.pt")
    for name, change in {"shape": {"bank.labels": torch.zeros(3)}, "more": {"colour": torch.zeros(3)}, "counters": {"_extra_state": {}},
                         "list": None}.items():
        (workdir / "tampered" / name).mkdir(parents=True)
        (workdir / "tampered" / name / "config.json").write_text((workdir / "runs/a/config.json").read_text())
        torch.save([1] if change is None else saved | change, workdir / "tampered" / name / "last.pt")
    for name, text in {"type": '{"kd_steps": "many"}', "key": '{"colour": 1}', "deep": "[" * 200_000, "range": '{"kd_steps": -1}'}.items():
        (workdir / "tampered" / name).mkdir()
        text = json.dumps(json.loads((workdir / "runs/a/config.json").read_text()) | json.loads(text)) if name != "deep" else text
        (workdir / "tampered" / name / "config.json").write_text(text)
        torch.save(saved, workdir / "tampered" / name / "last.pt")
    return workdir

OUT_OF_RANGE = [([flag, value], flag) for f in dataclasses.fields(C.Config) if f.type in ("int", "float", "float | None")
                for flag in ["--" + f.name.replace("_", "-")]
                for value in ("-1", *(["1e400", "nan"] if "float" in f.type else ["1" + "0" * 30]))]
WRONG = [
    (["--kd-steps", "many"], "--kd-steps"), (["--colour", "red"], "--colour"), (["--min", "1"], "--min"), (["--mean", "1"], "--mean"),
    (["--mean", "0", "0", "0"], "belong together"), (["--precision", "fp8"], "--precision"), (["--batch-size", "1"], "--batch-size"),
    (["--teacher", "resnet999"], "resnet999"), (["--student", "vit"], "vit"), (["--teacher-ckpt", "absent.pth"], "absent.pth"),
    (["--teacher-ckpt", "hundred.pth"], "100"), (["--teacher-ckpt", "text.pth"], "text.pth"),
    (["--teacher-ckpt", "list.pth"], "list.pth"), (["--teacher-ckpt", "nan.pth"], "finite"),
    (["--teacher-ckpt", "scalar.pth"], "fc.bias"), (["--teacher-ckpt", "sparse.pth"], "sparse.pth"),
    (["--teacher-ckpt", "mean.pth"], "mean.pth is no resnet8"), (["--teacher-ckpt", "differ"], "differ"), (["--teacher-ckpt", "binfloat.pth"], "binfloat"),
    (["--teacher-ckpt", "/dev/zero"], "/dev/zero"), (["--teacher-ckpt", "fine.pth", "--teacher", "resnet20"], "is no resnet20"),
    (["--mean", "nan", "0", "0", "--std", "1", "1", "1"], "--mean"), (["--mean", "0", "0", "0", "--std", "1", "0", "1"], "--std"),
    (["--magnitudes", "1", "-1"], "--magnitudes"), (["--dataset", "nowhere"], "nowhere"), (["--dataset", "empty"], "empty"),
    (["--dataset", "differ"], "same two or more classes"), (["--dataset", "lonely"], "same two or more classes"),
    (["--dataset", "torn"], "torn/test/b/x.png"), (["--dataset", "vast"], "vast/test/b/x.png"), (["--dataset", "text"], "text/test/a/x.png"),
    (["--probe-dataset", "nowhere"], "nowhere"), (["--prior", "absent.npy"], "absent.npy"), (["--prior", "wrong.npy"], "(3, 7)"),
    (["--prior", "nan.npy"], "finite"), (["--prior", "objects.npy"], "objects.npy"), (["--prior", "cut.npy"], "cut.npy"),
    (["--prior", "alike.npy"], "not all alike"), (["--prior", "text.pth"], "text.pth"), (["--eval-only", "absent.pt"], "absent.pt"),
    (["--eval-only", "fine.pth"], "architecture"), (["--eval-only", "huge.pt"], "--image-size 1000000000"),
    (["--eval-only", "arch.pt"], "resnet8"), (["--eval-only", "elsewhere.pt"], "distilled for cifar10: give --dataset"),
    (["--eval-only", ""], "no such file"), (["--out", "holds"], "holds is not empty"), (["--out", "runs/a"], "runs/a is not empty"),
    (["--image-size", "33"], "33"), (["--no-cend", "--no-decoupled"], "--no-cend"), (["--real-kd", "--no-decoupled"], "--real-kd"),
    (["--bank-capacity", "900000000"], "lower a batch size, --bank-capacity"), (["--device", "cuda"], "--device cuda"), (["--out", "file/run"], "file"),
    (["--resume", "--out", "runs/none"], "runs/none"), (["--resume", "--out", "runs/a", "--kd-steps", "9"], "--kd-steps"),
    (["--resume", "--out", "tampered/type"], "error: "), (["--resume", "--out", "tampered/key"], "colour"),
    (["--resume", "--out", "tampered/range"], "--kd-steps"), (["--resume", "--out", "tampered/deep"], "error: "),
    (["--resume", "--out", "tampered/shape"], "bank.labels"), (["--resume", "--out", "tampered/more"], "colour"),
    (["--resume", "--out", "tampered/counters"], "error: "), (["--resume", "--out", "tampered/list"], "error: "),
]

def tree(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}

@pytest.mark.skipif(torch.cuda.is_available(), reason="--device cuda is right here")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Validating sparse", "ignore:Sparse")
@pytest.mark.parametrize("args, culprit", WRONG + OUT_OF_RANGE, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_input_is_one_line_and_code_2(args, culprit, oddities, monkeypatch, capsys):
    monkeypatch.chdir(oddities)
    monkeypatch.setattr(C, "linear_probe", lambda *args: {"accuracy": 0.0})
    before = tree(".")
    fast = [] if "--resume" in args else FAST
    if "--prior" in args or "--probe-dataset" in args:
        fast = [*fast, "--teacher-ckpt", "fine.pth"]
    out = [] if "--out" in args else ["--out", "runs/bad"]
    assert C.main([*fast, *out, *args]) == 2
    error = capsys.readouterr().err
    assert culprit in error and len(error.strip().splitlines()) == 1 and "error: " in error
    assert tree(".") == before

def test_debug_shows_where(here):
    with pytest.raises(C.UserError, match="no such file"):
        C.main([*FAST, "--teacher-ckpt", "absent.pth", "--debug"])

def test_a_weak_teacher_is_warned_of(here, capsys):
    torch.save(C.build_model("resnet8", 10).state_dict(), "weak.pth")
    assert C.main([*FAST, "--teacher-ckpt", "weak.pth", "--out", "runs/weak"]) == 0
    assert capsys.readouterr().out.count("next to nothing: are --mean") == 1

@pytest.mark.parametrize("function, phase", [("category_consistency_loss", "ce"), ("kd_loss", "kd")])
def test_a_loss_that_breaks_keeps_the_last_good_state(function, phase, here, monkeypatch, capsys):
    real, calls = getattr(C, function), []

    def breaks(*args):
        calls.append(0)
        return real(*args) * (math.nan if len(calls) > {"ce": 6, "kd": 4}[phase] else 1)

    monkeypatch.setattr(C, function, breaks)
    out = f"runs/broken-{phase}"
    assert C.main([*FAST, "--cycles", "5", "--out", out]) == 2
    error = capsys.readouterr().err
    assert f"in cycle 3: {phase}" in error and len(error.splitlines()) == 1
    saved = tensors(out, "last.pt")
    assert 1 <= saved.pop("_extra_state")["cycle"] <= 2 and all(v.isfinite().all() for v in saved.values())

def test_a_full_disk_keeps_what_was_saved(here, monkeypatch, capsys):
    real = C.torch.save

    def full(thing, path):
        if thing.get("_extra_state", {}).get("cycle") == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(thing, path)

    monkeypatch.setattr(C.torch, "save", full)
    assert C.main([*FAST, "--out", "runs/full"]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and len(error.splitlines()) == 1 and tensors("runs/full/last.pt")["_extra_state"]["cycle"] == 1

def test_checkpoints_take_a_small_share_of_the_time(here, monkeypatch):
    real, saves = C.save_atomic, []

    def slow_save(thing, path):
        if path.name == "last.pt":
            saves.append(thing["_extra_state"]["cycle"])
            time.sleep(0.5)
        real(thing, path)

    monkeypatch.setattr(C, "save_atomic", slow_save)
    assert C.main([*FAST, "--cycles", "6", "--out", "runs/slow"]) == 0
    assert saves == [1, 6]  # at once, then not before 25 s have gone, and at the end

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, workdir):
    out = f"runs/signal{int(number)}"
    run = subprocess.Popen([*PROGRAM, *FAST, "--cycles", "100000", "--out", out], cwd=workdir, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    while not (workdir / out / "last.pt").exists():
        assert run.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130 and f"--resume --out {out}" in stderr
    assert tensors(workdir, out, "last.pt")["_extra_state"]["cycle"] > 1

# A run whose every cycle ends with a checkpoint that takes its time: most kills fall into the writing.
KILLED = """
import sys, time, cae_dfkd as C
real = C.torch.save
def slow(thing, path):
    path.write_bytes(b"half")
    time.sleep(0.3)
    real(thing, path)
C.torch.save = slow
save = C.Recorder.save
def always(self):
    save(self)
    self.next_save = 0
C.Recorder.save = always
sys.exit(C.main())
"""

@slow
def test_twenty_kills_change_nothing(workdir):
    """kill -9 at random moments, checkpoint writes among them; the student is that of the unbroken run."""
    args = [*FAST, "--cycles", "100", "--precision", "fp32"]
    assert cli(*args, "--out", "runs/unbroken", cwd=workdir).returncode == 0
    moments, kills, out = np.random.default_rng(0), 0, workdir / "runs/killed"
    start = command = [sys.executable, "-c", KILLED, *args, "--out", "runs/killed"]
    while True:
        run = subprocess.Popen(command, cwd=workdir, env={**os.environ, "PYTHONPATH": str(HERE)}, stderr=subprocess.PIPE)
        try:
            done = run.wait(moments.uniform(2.5, 7.0) if kills < 20 else 170)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
        else:
            assert done == 0, run.stderr.read().decode()
            break
        saved = (out / "last.pt").exists() and tensors(out, "last.pt")  # never a half
        command = [*start[:3], "--resume", "--out", "runs/killed"] if saved else start
    assert kills == 20 and equal_weights(workdir / "runs/unbroken", out)
    assert cycles_logged(out) == list(range(1, 101)) and not list(out.glob("*.tmp"))

@slow
def test_soak(here, monkeypatch):
    """1,000 cycles: memory flat within 5 %, a line for each, no file left open."""
    real, seen = C.Recorder.__call__, []

    def measured(self, state, metrics):
        real(self, state, metrics)
        if state.cycle % 100 == 0:
            memory = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]
            seen.append((int(memory), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(C.Recorder, "__call__", measured)
    assert C.main([*FAST, "--cycles", "1000", "--synth-steps", "1", "--kd-steps", "1", "--out", "runs/soak"]) == 0
    memory, files = zip(*seen)
    assert len(seen) == 10 and max(memory[2:]) <= 1.05 * memory[2] and len(set(files)) == 1
    assert cycles_logged("runs/soak") == list(range(1, 1001))

# --- real data ---------------------------------------------------------------------------------------

@needs_real
def test_public_teacher_scores_what_it_should():
    test, _ = C.load_data(str(REAL / "cifar10"), "test")
    teacher = C.load_teacher("resnet20", 10, str(REAL / "resnet20_cifar10.th"), *C.IMAGENET)
    logits, _, labels = C.predict(teacher, test)
    assert len(test) == 1017 and round(C.top1(logits, labels), 2) == 91.64

@needs_real
def test_real_command_for_a_few_seconds(tmp_path):
    """Without --mean and --std: the file is known by its digest."""
    done = cli("--dataset", str(REAL / "cifar10"), "--teacher-ckpt", str(REAL / "resnet20_cifar10.th"), "--prior",
               str(REAL / "clip_vitb32_cifar10.npy"), "--minutes", "0.05", "--warmup-rounds", "0", "--synth-steps", "2",
               "--kd-steps", "4", "--out", "run", "--no-detection", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "stated accuracy 91.7 %\nteacher resnet20: 91.64 % on 1017 test images" in done.stdout
    assert json.loads((tmp_path / "run/summary.json").read_text())["top-1"]["teacher"] == pytest.approx(91.64, abs=0.01)

# --- the file and the README -------------------------------------------------------------------------

def test_file_keeps_its_promises():
    tree = ast.parse(SOURCE)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    longest = max((n for n in nodes if isinstance(n, ast.FunctionDef)), key=lambda n: n.end_lineno - n.lineno)
    assert longest.end_lineno - longest.lineno < 60, longest.name
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert ".cuda(" not in SOURCE and "weights_only=False" not in SOURCE and SOURCE.count("[our choice]") >= 10
    documented = "\n".join(ast.get_docstring(n) or "" for n in nodes)
    assert all(re.search(rf"[Ee]q\. {k}\b", documented) for k in range(1, 11))
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", documented)

def test_import_has_no_side_effect(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import cae_dfkd, os, threading; "
            "print(os.listdir(), threading.active_count())")
    done = subprocess.run([sys.executable, "-B", "-W", "error::SyntaxWarning", "-c", code, str(HERE)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "[] 1", done.stderr

def test_readme_commands_parse():
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", README, re.S))
    commands = re.findall(r"^python cae_dfkd\.py((?:.*\\\n)*.*)$", blocks, re.M)
    assert len(commands) >= 4
    for command in commands:
        words = command.split("#")[0].replace("\\\n", " ").replace("&&", " ").split()
        if not {"--help", "--resume"} & set(words):
            C.parse_args(words)

def test_readme_python_snippets_run(tmp_path, monkeypatch):
    snippets = [s for s in re.findall(r"```python\n(.*?)```", README, re.S) if not re.search("import (clip|matplotlib)", s)]
    assert snippets
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})

def test_readme_leads_from_every_equation_to_its_lines():
    rows = re.findall(r"^\| (\d+) \|.*\[`(\w+)`\]\(cae_dfkd\.py#L(\d+)\) \|$", README, re.M)
    assert [int(row[0]) for row in rows] == list(range(1, 11)) and len(README.splitlines()) <= 180
    for _, name, line in rows:
        assert re.match(rf"(def|class) {name}\b", SOURCE.splitlines()[int(line) - 1]), f"{name} is not at line {line}"
