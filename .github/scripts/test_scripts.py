"""Tests of the scripts: detection, transfer, several processes, more networks, benchmark.

    python -m pytest -q .github/scripts/test_scripts.py
"""
# SPDX-License-Identifier: MIT
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SCRIPTS = Path(__file__).resolve().parent
HERE = SCRIPTS.parents[1]
sys.path[:0] = [str(HERE), str(SCRIPTS)]
import cae_dfkd as C
import detection as D

draw_shapes = C.draw_shapes
C.draw_shapes = lambda n, shapes, *rest: draw_shapes(n // 10, tuple(shapes), *rest)
FAST = ("--device cpu --teacher resnet8 --teacher-epochs 1 --cycles 2 --generator-width 16 "
        "--synth-batch 20 --synth-steps 2 --kd-steps 2 --batch-size 20 --warmup-rounds 1").split()


def same(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def tensors(*path):
    return torch.load(Path(*path), weights_only=True)


def logged(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(C, "linear_probe", lambda *args: 0.0)


# ===== More networks, benchmark, several processes ==============================================
def functional(w, x, blocks, wide):
    """Wide or option-B ResNet straight from a state dict with the keys of the public files."""
    def conv(key, x, stride=1, pad=1):
        return F.conv2d(x, w[key + ".weight"], None, stride, pad)
    def bn(key, x):
        kinds = "running_mean", "running_var", "weight", "bias"
        return F.batch_norm(x, *(w[f"{key}.{kind}"] for kind in kinds))
    x = conv("conv1", x) if wide else F.relu(bn("bn1", conv("conv1", x)))
    for stage, i in [(stage, i) for stage in (1, 2, 3) for i in range(blocks)]:
        p, stride = f"layer{stage}.{i}.", 2 if i == 0 and stage > 1 else 1
        if wide:                                # BatchNorm and ReLU come first
            p = f"block{stage}.layer.{i}."
            y = F.relu(bn(p + "bn1", x))
            if p + "convShortcut.weight" in w:
                x = conv(p + "convShortcut", y, stride, 0)
            x = x + conv(p + "conv2", F.relu(bn(p + "bn2", conv(p + "conv1", y, stride))))
            continue
        y = bn(p + "bn2", conv(p + "conv2", F.relu(bn(p + "bn1", conv(p + "conv1", x, stride)))))
        if stride == 2:
            x = bn(p + "downsample.1", conv(p + "downsample.0", x, 2, 0))
        x = F.relu(x + y)
    f = (F.relu(bn("bn1", x)) if wide else x).mean((2, 3))
    return F.linear(f, w["fc.weight"], w["fc.bias"])


@pytest.mark.parametrize("arch, blocks, size", [
    ("wrn16_1", 2, 175_066), ("wrn40_2", 6, 2_243_546), ("resnet20b", 3, 272_474),
    ("resnet56b", 9, 855_770)])
def test_more_networks_are_those_of_the_public_files(arch, blocks, size, monkeypatch, tmp_path):
    monkeypatch.setattr(C, "build_model", importlib.import_module("more_networks").build_model)
    net, x = C.build_model(arch, 10), torch.rand(2, 3, 32, 32)
    assert sum(p.numel() for p in net.parameters()) == size             # as published
    w = net.state_dict()
    for value in [v for v in w.values() if v.ndim == 1]:        # BatchNorm as after training
        value.uniform_(0.5, 1.5)
    torch.save({"module." + key: value for key, value in w.items()}, tmp_path / "t.pth")
    teacher = C.load_network(tmp_path / "t.pth", arch, mean=(0, 0, 0), std=(1, 1, 1))
    reference = functional(w, x, blocks, arch.startswith("wrn"))
    torch.testing.assert_close(teacher(x), reference, rtol=1e-4, atol=1e-4)


def test_more_networks_on_the_command_line(here, tmp_path, monkeypatch):
    more, runs, run = importlib.import_module("more_networks"), [], C.run
    monkeypatch.chdir(tmp_path)
    for name in ("build_model", "STUDENTS", "PUBLIC_TEACHERS"):         # put back afterwards
        monkeypatch.setattr(C, name, getattr(C, name))
    monkeypatch.setattr(C, "run", runs.append)
    for words in ("wrn40_2", "wrn40_2 --student resnet20b", "resnet34", "resnet20b"):
        assert more.main(["--teacher", *words.split()]) == 0
    assert [c.student for c in runs] == ["wrn16_2", "resnet20b", "resnet18", "resnet8"]
    monkeypatch.setattr(C, "run", run)
    assert more.main([*FAST, "--teacher", "wrn16_1", "--student", "resnet20b", "--out", "a"]) == 0
    assert more.main(["--resume", "a"]) == more.main(["--eval-only", "a/student.pt"]) == 0


def test_controls_change_one_thing(here, tmp_path, monkeypatch):
    controls = importlib.import_module("controls")
    monkeypatch.setattr(C, "synthesis_round", C.synthesis_round)        # put back afterwards
    monkeypatch.setattr(C, "jitter_colours", C.jitter_colours)
    for i, split in enumerate(2 * ("train", "test")):       # a grey level for each of 4 images
        Path("real", split, "ab"[i // 2]).mkdir(parents=True)
        Image.new("RGB", (32, 32), 3 * (60 * i,)).save(f"real/{split}/{'ab'[i // 2]}/{i}.png")
    words = [*FAST, "--dataset", "real"]
    assert controls.main("same-colours", *words, "--out", "same") == 0
    assert len(tensors("same/last.pt")["bank"][0].unique()) > 2
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(C.jitter_colours(images), images)
    assert controls.main("real:real", *words, "--out", "real-bank") == 0
    pixels, labels = tensors("real-bank/last.pt")["bank"]
    assert len(pixels) == 60 and set(labels.tolist()) == {0, 1}         # as many as G would make
    assert torch.equal(pixels.flatten(1).unique(dim=1)[:, 0], 120 * labels.byte())


def test_benchmark_prints_its_table(monkeypatch, capsys):
    tiny = "--image-size 8 --synth-batch 4 --batch-size 4".split()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *FAST, *tiny])
    importlib.import_module("benchmark").main()
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("resnet8 -> resnet8, cpu fp32, ")
    assert len(rows) == 15 and all(float(row.split("|")[2]) > 0 for row in rows)


# Each process takes the steps of both alone, and then its own with gradients averaged.
ONE_STEP = """
import copy, torch, torch.distributed as dist, cae_dfkd as C, distributed as D
dist.init_process_group("gloo")
rank, config = dist.get_rank(), C.Config(image_size=16, generator_width=16, batch_size=20)
torch.manual_seed(0)
teacher, student = C.build_model("resnet8", 4), C.build_model("resnet8", 4)
state = C.State(teacher.eval().requires_grad_(False), student, config)
state.bank.push(torch.rand(20, 3, 16, 16), torch.arange(20) % 4)
saved, optimizers = copy.deepcopy(state.state_dict()), (
    state.generator_optimizer, state.student_optimizer)
def gradients(seed):
    state.load_state_dict(copy.deepcopy(saved)), torch.manual_seed(seed)
    labels = torch.arange(20) % 4
    C.generator_step(state, state.cend(labels), labels)
    C.student_step(state)
    return torch.cat([p.grad.flatten() for o in optimizers for p in o.param_groups[0]["params"]])
mean = (gradients(0) + gradients(1)) / 2
D.connect(state)
averaged = torch.equal(gradients(rank), mean)
state.generator.seed_layer.reset_parameters()           # the draws of the two differ
state.bank.push(torch.rand(2, 3, 16, 16), torch.tensor([rank, 2]))
parts = *state.generator.parameters(), *student.parameters(), state.bank.images
sums = [v.double().sum().item() for v in parts]
alike = sums == D.agreed(sums) and state.bank.labels[-4:].tolist() == [0, 2, 1, 2]
print(f"averaged {averaged} alike {alike}\\n", end="", flush=True)      # in one piece
"""
# The script itself on little data. KILL is the process that is killed after the first cycle.
WHOLE_RUN = """
import os, runpy, signal, cae_dfkd as C
C.linear_probe, draw, distill = lambda *args: 0.0, C.draw_shapes, C.distill
C.draw_shapes = lambda n, *rest: draw(n // 20, *rest)
def killed(teacher, student, config, state, on_cycle):
    def then(state, metrics):
        on_cycle(state, metrics)
        if os.environ["RANK"] == os.environ.get("KILL"):
            os.kill(os.getpid(), signal.SIGKILL)
    return distill(teacher, student, config, state, then)
C.distill = killed
runpy.run_module("distributed", run_name="__main__")
"""


def torchrun(code, *args, cwd, **more):
    (cwd / "worker.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = {"PYTHONPATH": f"{HERE}:{SCRIPTS}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, "worker.py", *args], cwd=cwd, env=os.environ | paths | more,
                          capture_output=True, text=True, timeout=170)


def test_two_processes_average_gradients_and_stay_alike(tmp_path):
    done = torchrun(ONE_STEP, cwd=tmp_path)
    assert done.stdout.count("averaged True alike True") == 2, done.stdout + done.stderr


def test_two_processes_end_alike_and_a_killed_one_can_be_resumed(tmp_path):
    def run(*args, **more):
        done = torchrun(WHOLE_RUN, *args, cwd=tmp_path, **more)
        return done.returncode, re.findall(r"^student (\w{64}), the same in 2", done.stdout, re.M)
    assert run(*FAST, "--out", "lost", KILL="1") == (1, [])
    code, student = run("--resume", "lost")
    assert (code, len(student)) == (0, 1) and run(*FAST, "--out", "whole") == (0, student)
    assert [row["cycle"] for row in logged(tmp_path / "lost")] == [1, 2]
    assert same(*(tensors(tmp_path, out, "student.pt")["state_dict"] for out in ("lost", "whole")))
    newest = tensors(tmp_path, "whole/last.pt")["bank"][0][-40:]        # 20 of each process
    assert not torch.equal(newest[:20], newest[20:])


def test_several_processes_say_once_what_is_wrong(tmp_path):
    done = torchrun(WHOLE_RUN, "--dataset", "nowhere", cwd=tmp_path)
    assert done.stderr.count("error: ") == 1 and "error: nowhere (a folder" in done.stderr
    assert done.returncode == 1 and not (tmp_path / "runs").exists()


# ===== Detection ==================================================================================
def slow_average_precision(detections, truths, difficult):
    """One detection of all images after the other; the best precision at a recall or beyond."""
    rows = [(score, i, box) for i, found in enumerate(detections) for box, score in zip(*found)]
    taken, false, points = [], 0, []
    for _, i, box in sorted(rows, key=lambda row: row[0], reverse=True):
        overlaps = [(D.ops.box_iou(box[None], truth[None]).item(), j)
                    for j, truth in enumerate(truths[i]) if (i, j) not in taken]
        most, j = max(overlaps, default=(0, 0))
        if most < 0.5:
            false += 1
        elif not difficult[i][j]:
            taken.append((i, j))
        points.append((len(taken), len(taken) / max(1, len(taken) + false)))
    total = sum((~flags).sum().item() for flags in difficult)
    best = [max([p for right, p in points if right >= n], default=0) for n in range(1, total + 1)]
    return 100 * sum(best) / total


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_a_slow_computation(seed):
    torch.manual_seed(seed)
    truths = [60 * torch.rand(n, 2).repeat(1, 2) + torch.tensor([0, 0, 20, 20]) for n in range(5)]
    found = [t.repeat(3, 1) + 4 * torch.randn(3 * len(t), 4) for t in truths]
    detections = [(boxes, torch.rand(len(boxes)).sort(descending=True).values) for boxes in found]
    none, some = ([torch.arange(len(truth)) == i for truth in truths] for i in (-1, 2))
    easy, hard = (slow_average_precision(detections, truths, flags) for flags in (none, some))
    assert D.average_precision(detections, truths) == pytest.approx(easy) and 0 < easy < 100
    assert D.average_precision(detections, truths, some) == pytest.approx(hard) and hard != easy


def test_locations_learn_the_box_in_whose_central_half_they_lie():
    places = torch.ones(8, 8).nonzero().flip(1) * 8.0 + 4               # x and y in 64 x 64 pixels
    boxes = torch.tensor([[0.0, 0, 32, 32], [8, 8, 16, 16], [49, 49, 51, 51.5]])
    category, sides = D.assign_locations(places, boxes, torch.tensor([0, 1, 2]), 3)
    grid = category.view(8, 8)
    assert grid[1, 1] == 1 and grid[1, 2] == grid[2, 1] == grid[2, 2] == 0          # the smaller
    assert grid[0, 0] == grid[3, 3] == -1 and grid[6, 6] == 2 and (grid[4:6, 4:6] == 3).all()
    assert sides.view(8, 8, 4)[2, 1].tolist() == [12, 20, 20, 12] and (sides > 0).all()


class Painter(nn.Module):
    """Perfect features: what a location is to learn, looked up by the image's own pixels."""
    def __init__(self, scenes):
        super().__init__()
        self.known = {image.numpy().tobytes(): target for image, target in scenes}
        self.map, self.head = nn.Identity(), nn.Linear(11, 6)
    def forward(self, x):
        pixels = (x[0] * 255).round().to(torch.uint8).contiguous().numpy().tobytes()
        target = self.known.get(pixels, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)})
        places = torch.ones(24, 24).nonzero().flip(1) * 4.0 + 2
        category, sides = D.assign_locations(places, target["boxes"], target["labels"], 6)
        category = F.one_hot(torch.where(category < 0, 6, category), 7)
        rows = torch.cat([20 * category, sides.log()], 1)               # (576, 11)
        return self.head(self.map(rows.T.reshape(1, 11, 24, 24)).mean((2, 3)))


def test_perfect_features_find_all_objects_and_untrained_ones_do_not():
    train, test = D.draw_scenes(20, 1), D.draw_scenes(12, 2)
    net = C.build_model("resnet8", 4)
    assert D.coarsest_layer(net, "cpu") is net.layer3
    one, two = (D.detection_probe(net, train, test, most=2000)["ap50"] for _ in range(2))
    assert one == two < 60
    for _, target in train:
        target["difficult"] = target["labels"] == 0     # what is difficult is not learnt ...
    for _, target in test:
        target["difficult"] = torch.arange(len(target["labels"])) == 0  # ... and no false alarm
    found = D.detection_probe(Painter(train + test), train, test)["per_category"]
    assert found.pop("0") == 0 and set(found) == set("1235") and min(found.values()) > 99


def test_scenes_are_seeded_and_their_boxes_tight(monkeypatch, tmp_path):
    masks, real = [], D.shape_mask
    monkeypatch.setattr(D, "shape_mask", lambda *args: masks.append(real(*args)) or masks[-1])
    scenes, again = D.draw_scenes(20, 1), D.draw_scenes(20, 1)
    for j, (image, target) in enumerate(scenes):
        assert torch.equal(image, again[j][0])
        pixels = [mask[j].nonzero() for mask in masks[:4] if mask[j].any()]
        tight = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in pixels]
        assert target["boxes"].tolist() == tight
    for red in (0, 100, 200):                           # photographs of three categories
        (tmp_path / f"{red}").mkdir()
        Image.new("RGB", (50, 60), (red, 0, 0)).save(tmp_path / f"{red}/photo.png")
    for image, target in D.photo_scenes(tmp_path, 5, 0):
        for (left, top, right, bottom), name in zip(target["boxes"].int(), target["names"]):
            assert abs(int(image[0, (top + bottom) // 2, (left + right) // 2]) - int(name)) < 8


def test_voc_layout_and_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    box = "<bndbox><xmin>30</xmin><ymin>9</ymin><xmax>99</xmax><ymax>30</ymax></bndbox>"
    xml = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult>{box}</object>"
                  for name, hard in (("dog", 0), ("cow", 1), ("cat", 1), ("cat", 0)))
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        Path(folder).mkdir(parents=True)
    Path("ImageSets/Main/trainval.txt").write_text("full\nempty")
    Path("ImageSets/Main/test.txt").write_text("empty\nfull")
    for name, objects in (("full", xml), ("empty", "")):
        Path(f"Annotations/{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        Image.new("RGB", (64, 48)).save(f"JPEGImages/{name}.jpg")
    ((image, target), _), _, names = D.load_detection(".", 32)
    assert names == ["cat", "dog"] and image.shape == (3, 24, 32)
    assert target["labels"].tolist() == [1, -1, 0, 0] and target["difficult"].sum() == 2
    assert target["boxes"][0].tolist() == [15, 4.5, 32, 15]             # scaled and clipped
    net = C.build_model("resnet8", 4)
    torch.save(net.state_dict(), "bare.pth")
    student = C.Normalized(net, *C.IMAGENET)
    C.save_network(student, Path("student.pt"), "resnet8", list("abcd"), 32)
    words = ["student.pt", "resnet8=bare.pth", "--data", ".", "--size", "32"]
    assert D.main(words) == 0
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [name for name, _ in rows] == ["student.pt", "bare.pth", "untrained resnet8"]
    for wrong in (["bare.pth"], ["student.pt", "--data", "photos:."], ["none.pt"]):
        assert D.main(wrong) == 2 and capsys.readouterr().err.startswith("error: ")


# ===== Accuracy and five folds ====================================================================
def test_every_image_is_probed_once_by_a_probe_that_has_not_seen_it(here, monkeypatch, capsys):
    for split in ("train", "test"):
        for red in range(20):
            folder = Path(f"images/{split}/{red % 2}")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (red, 0, 9 * (split == "test"))).save(folder / f"{red}.png")
    seen = []
    def probe(embed, train, test, device):
        fitted, held = ({tuple(x[:, 0, 0].tolist()) for x, _ in split} for split in (train, test))
        seen.append(held)
        assert len(fitted) == 32 and len(held) == 8 and not fitted & held
        return float(len(seen))
    monkeypatch.setattr(C, "linear_probe", probe)
    net = C.Normalized(C.build_model("resnet8", 2), *C.IMAGENET)
    C.save_network(net, Path("student.pt"), "resnet8", list("ab"), 32)
    transfer = importlib.import_module("transfer")
    assert transfer.main(["student.pt", "--images", "images", "--probe", "images"]) == 0
    assert len(set.union(*seen[:5])) == 40 and seen[5:] == seen[:5]     # the same folds for all
    images = torch.tensor([[r, 0, b] for b in (0, 9) for r in range(20)]) / 255
    right = net.eval()(images[:, :, None, None].expand(-1, -1, 32, 32)).argmax(1)
    accuracy = 100 * (right == torch.arange(40) % 2).float().mean()
    assert f"| student.pt | {accuracy:.2f} | 3.00 |" in capsys.readouterr().out
    assert transfer.main(["nothing.pt"]) == 2
