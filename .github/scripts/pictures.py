"""The README's three pictures, in .github/assets. Needs matplotlib, which nothing else here does.

    python .github/scripts/pictures.py [STUDENT [ARCH=]TEACHER]

STUDENT is the student.pt of a run. If the run's last.pt is beside it, samples.png is drawn, too.
Without arguments only curves.png is drawn, which shows the accuracies of .github/runs.csv.
"""
# SPDX-License-Identifier: MIT
import io
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torchvision import ops

import detection
import tables

ASSETS = tables.ROOT / ".github/assets"
STUDENTS = [    # name, flags of its teacher and of its runs in runs.csv
    ("ResNet-8", "--teacher resnet20", tables.LONG),
    ("ResNet-20", "--teacher resnet20", tables.RESNET20),
    ("ResNet-18", tables.TEACHER34, tables.RESNET18)]
CURVES = [      # colour, line, name, further flags of the student
    ("C0", "-", "student", ""),
    ("C2", ":", "without places", " --positions 0"),
    ("C1", "--", "without the feature loss", " --lambda-cae 0")]


def save(figure, name):
    """Writes a figure with 256 colours, which makes the file a third as large."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    Image.open(file).convert("RGB").quantize(256).save(ASSETS / name, optimize=True)


def right_ones(detections, target):
    """Which detections, best first, are right, (n,): their category, and an IoU of 0.5."""
    boxes, labels, _ = detections
    right = torch.zeros(len(boxes), dtype=torch.bool)
    for label in labels.unique():
        truth = target["boxes"][target["labels"] == label]
        hits = detection.match(boxes[labels == label], truth, torch.zeros(len(truth)))
        right[labels == label] = torch.tensor(hits).bool()
    return right


def draw_boxes(axes, target, detections, right, names):
    """True boxes dashed, guesses in lime if they are right, else in red."""
    for left, top, right_side, bottom in target["boxes"].tolist():
        for colour, style in (("black", "-"), ("white", "--")):
            axes.add_patch(plt.Rectangle((left, top), right_side - left, bottom - top, fill=False,
                                         edgecolor=colour, linestyle=style, linewidth=1))
    for box, label, is_right in zip(*detections[:2], right):
        left, top, right_side, bottom = box.tolist()
        colour, mark = ("lime", "✓") if is_right else ("red", "✗")
        axes.add_patch(plt.Rectangle((left, top), right_side - left, bottom - top, fill=False,
                                     edgecolor=colour, linewidth=2))
        axes.text(max(left, 1), max(top, 11), f"{mark} {names[label]}", fontsize=8,
                  verticalalignment="bottom", clip_on=True,
                  bbox=dict(facecolor=colour, edgecolor="none", pad=0.5))


def surest(detections, n):
    """Of the detections in all images the n surest, without those that overlap a better one."""
    kept = []
    for boxes, labels, scores in detections:
        best = ops.nms(boxes, scores, 0.1)              # of all categories
        kept.append((boxes[best], labels[best], scores[best]))
    least = torch.cat([scores for _, _, scores in kept]).topk(n).values[-1]
    return [tuple(part[scores >= least] for part in (boxes, labels, scores))
            for boxes, labels, scores in kept]


def draw_detections(student, teacher, columns=6):
    """The first scenes of the test split, a row for each network.

    Each network guesses as often as there are objects in all scenes, so that shares compare.
    """
    networks = [network for _, network in detection.load_networks([student, teacher])]
    train, test, names = detection.load_detection("scenes")
    objects = sum(len(target["boxes"]) for _, target in test)
    figure, grid = plt.subplots(3, columns, figsize=(11, 5.6), layout="constrained")
    for row, title, network in zip(grid, ("student", "teacher", "not trained"), networks):
        probe = detection.detection_probe(network, train, test, categories=names)
        guesses = surest(probe["detections"], objects)
        right = [right_ones(some, target) for some, (_, target) in zip(guesses, test)]
        for axes, (image, target), some, marks in zip(row, test, guesses, right):
            axes.imshow(image.permute(1, 2, 0), extent=(0, 96, 96, 0))
            axes.set(xticks=[], yticks=[])
            draw_boxes(axes, target, some, marks, names)
        share = 100 * torch.cat(right).sum() / objects
        row[0].set_ylabel(f"{title}\nAP50 {probe['ap50']:.1f}\n{share:.0f} % right", fontsize=12)
    save(figure, "detection.png")


def draw_samples(run, columns=14):
    """The last images that a run made up, a row for each category."""
    images, labels = torch.load(run / "last.pt", weights_only=True)["bank"]
    classes = torch.load(run / "student.pt", weights_only=True)["classes"]
    figure, grid = plt.subplots(len(classes), columns, figsize=(8.9, 5.4))
    figure.subplots_adjust(0.12, 0.01, 0.99, 0.99, 0.05, 0.05)
    for label, (row, name) in enumerate(zip(grid, classes)):
        row[0].set_ylabel(name, fontsize=11, rotation=0, ha="right", va="center")
        for axes, image in zip(row, images[labels == label][-columns:]):
            axes.imshow(image.permute(1, 2, 0))
            axes.set(xticks=[], yticks=[])
    save(figure, "samples.png")


def runs_of(runs, flags):
    """The runs with these flags, on the GPU if there are any, else on CPUs."""
    scored = tables.scored_runs(runs, flags)
    return tables.on("GPU", scored) or scored


def score_of(runs, teacher, score):
    """A score of the teacher with these flags."""
    row, = (r for r in runs if (r["script"], r["flags"]) == ("network, no run", teacher))
    return float(row[score])


def draw_dots(axes, runs, score, label):
    """A score of students of 115 cycles, each dot a run, beside their teachers."""
    for i, (_, teacher, student) in enumerate(STUDENTS):
        axes.hlines(score_of(runs, teacher, score), i - 0.4, i + 0.4, color="black", linewidth=1)
        for shift, (colour, _, _, flags) in zip((-0.25, 0, 0.25), CURVES):
            scores = [float(r[score]) for r in runs_of(runs, student + flags)]
            axes.plot([i + shift] * len(scores), scores, "o", color=colour, markersize=5)
    axes.set_xticks(range(len(STUDENTS)), [name.replace("-", "\n") for name, *_ in STUDENTS])
    axes.set_title(label, fontsize=12)


def draw_curves():
    """Accuracy by cycle of students, each line a run, beside their teachers; and two scores."""
    runs = tables.read_runs()
    figure, (*grid, scenes, clothing) = plt.subplots(
        1, 4, figsize=(13.5, 4), width_ratios=(3, 3, 2, 2), layout="constrained")
    draw_dots(scenes, runs, "scenes", "scenes, AP50")
    draw_dots(clothing, runs, "clothing", "clothing, %")
    for axes, (student_name, teacher, student) in zip(grid, STUDENTS[1:]):
        accuracy = score_of(runs, teacher, "accuracy_1017")
        axes.axhline(accuracy, color="black", linewidth=1, label="teacher")
        for colour, style, name, flags in CURVES:
            for run in runs_of(runs, student + flags):
                curve = re.findall(r"(\d+): ([\d.]+)", run["note"])
                points = [*curve, (run["cycles"], run["accuracy_1017"])]
                cycles, accuracies = zip(*((int(c), float(a)) for c, a in points))
                axes.plot(cycles, accuracies, color=colour, linestyle=style, marker=".", label=name)
                name = None                             # one label for all its runs
        axes.set_ylim(40, 95)
        axes.set_title(f"{student_name}: each line is a run", fontsize=12)
        axes.set_xlabel("cycle", fontsize=13)
        axes.legend(loc="lower right", fontsize=12)
    grid[0].set_ylabel("accuracy on 1,017 images, %", fontsize=13)
    save(figure, "curves.png")


if __name__ == "__main__":
    draw_curves()
    if sys.argv[1:]:
        student, teacher = sys.argv[1:]
        if (Path(student).parent / "last.pt").exists():
            draw_samples(Path(student).parent)
        draw_detections(student, teacher)
