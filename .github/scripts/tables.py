"""The README's tables of results, computed from .github/runs.csv.

    python .github/scripts/tables.py            prints the tables
    python .github/scripts/tables.py --write    puts them into the README
    python .github/scripts/tables.py --check    says where the README differs, exit code 1

A row of runs.csv is a run: first digits of the commit, script, flags (without the seed and local
paths), seed, processor, threads, precision, cycles, seconds, scores, note. Scores are those of the
last state, in percent or AP50.
"""
import csv
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCORES = "accuracy_1017", "clothing", "scenes", "photos"            # columns of the tables
LONG = "--dataset cifar10 --cycles 115 --bf16"
RESNET20 = "--dataset cifar10 --student resnet20 --cycles 115 --bf16"
TEACHER34 = "--teacher resnet34 --teacher-ckpt resnet34_37epochs.pth"
RESNET18 = f"--dataset cifar10 {TEACHER34} --cycles 115 --bf16"
WEAKER = "--dataset cifar10 --teacher resnet34 --cycles 115 --bf16"     # its teacher: 87.3 %
REAL = "real:FOLDER " + RESNET20            # flags of controls.py
COLOURS = "same-colours " + RESNET20
RUN = "cae_dfkd.py", "controls.py"          # scripts whose rows are runs
NO_RUN = ("network, no run",)               # in the place of a script: a network is scored as it is
RESULT = [      # what stands in the README, how it was trained, script, flags
    ("*ResNet-20, teacher*", "a public file", NO_RUN, "--teacher resnet20"),
    ("**ResNet-20, student**", "GPU", RUN, RESNET20),
    ("*ResNet-34, teacher*", "ours, not included", NO_RUN, TEACHER34),
    ("**ResNet-18, student**", "GPU", RUN, RESNET18)]
OTHERS = [
    ("ResNet-20, from 5,085 real images", "GPU", RUN, REAL),
    ("ResNet-20, feature loss without *places*", "GPU", RUN, RESNET20 + " --positions 0"),
    ("ResNet-20, without the feature loss", "GPU", RUN, RESNET20 + " --lambda-cae 0"),
    ("ResNet-20, on CPUs", "CPU", RUN, RESNET20),
    ("ResNet-20, not trained", "none", NO_RUN, "--student resnet20"),
    ("ResNet-18, without the feature loss", "GPU", RUN, RESNET18 + " --lambda-cae 0"),
    ("ResNet-18, not trained", "none", NO_RUN, "--student resnet18"),
    ("ResNet-8, by the ResNet-20", "CPU", RUN, LONG)]
SEED = ("seed",)                            # what the runs of a pair share
CPU = "seed", "processor"
GPU = "NVIDIA H200"                         # its runs, all of one code, are paired by seed
PARTS = [       # part, student, what a pair shares, flags with the part and without
    ("*chance: run again, other code or processor*", "ResNet-8", None, (LONG, LONG)),
    ("*chance: run again, other code or processor*", "ResNet-20", None, (RESNET20, RESNET20)),
    ("eq. 8", "ResNet-8", SEED, (LONG, LONG + " --lambda-cae 0")),
    ("places of eq. 8", "ResNet-8", SEED, (LONG, LONG + " --positions 0")),
    ("eq. 8", "ResNet-20, *GPU*", GPU, (RESNET20, RESNET20 + " --lambda-cae 0")),
    ("places of eq. 8", "ResNet-20, *GPU*", GPU, (RESNET20, RESNET20 + " --positions 0")),
    ("eq. 8", "ResNet-18, *GPU*", GPU, (RESNET18, RESNET18 + " --lambda-cae 0")),
    ("eq. 8", "ResNet-18, teacher of 87.3 %", SEED, (WEAKER, WEAKER + " --lambda-cae 0")),
    ("places of eq. 8", "ResNet-18, teacher of 87.3 %", SEED, (WEAKER, WEAKER + " --positions 0")),
    ("eq. 4, statistics", "ResNet-8", SEED, (LONG, LONG + " --lambda-fm 0")),
    ("eq. 1, noise (else 10 images a cycle)", "ResNet-8", SEED,
     (LONG, LONG + " --magnitudes 0 0 0 0")),
    ("decoupled (else in turns, 3.6 times as long)", "ResNet-8", SEED,
     (LONG, LONG + " --no-decoupled")),
    ("eq. 1, category vectors (else plain noise)", "ResNet-8", SEED,
     (LONG, LONG + " --no-cend")),
    ("eq. 1, CLIP's vectors (else the teacher's)", "ResNet-8", SEED,
     (LONG + " --prior clip_vitb32_cifar10.npy", LONG)),
    ("eq. 5, adversary", "ResNet-8", SEED, (LONG, LONG + " --lambda-adv 0")),
    ("eq. 9, contrast", "ResNet-8", SEED, (LONG, LONG + " --lambda-cncl 0")),
    ("random colours", "ResNet-20, same CPU", CPU, (RESNET20, COLOURS)),
    ("light generator (else 2x wide, 30 steps, slower)", "ResNet-8", SEED,
     (LONG, LONG + " --generator-width 128 --synth-steps 30"))]
FEWEST = 3      # pairs of a mean that is printed bold


def read_runs():
    """The rows of runs.csv, as dicts of texts."""
    with open(ROOT / ".github/runs.csv", newline="") as file:
        return list(csv.DictReader(file))


def spread(values, signed=False):
    """Mean and standard deviation, as 1.2 ± 0.3, of numbers; empty if there are none."""
    if not values:
        return ""
    mean = round(statistics.mean(values), 1) + 0.0      # never -0.0
    text = f"{mean:{'+' if signed else ''}.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    return text.replace("-", "−")


def scored_runs(runs, flags, scripts=RUN):
    """The runs with these flags. A run that was stopped has no scores and is left out."""
    return [r for r in runs if r["script"] in scripts and r["flags"] == flags and r["photos"]]


def on(machine, runs):
    """The runs on the GPU, all of one code, or those on CPUs, of several codes."""
    return [r for r in runs if (r["processor"] == GPU) == (machine == "GPU")]


def network_rows(runs, title, networks):
    """The table of networks, a list of lines."""
    lines = [f"| {title} | training | CIFAR-10, % | clothing, % | scenes, AP50 | photos, AP50 |",
             "|---|---|---|---|---|---|"]
    for name, training, scripts, flags in networks:
        scored = scored_runs(runs, flags, scripts)
        if training in ("GPU", "CPU"):
            scored = on(training, scored)
            minutes = mean_of(scored, "seconds") / 60
            training = f"{minutes:.0f} {training} min, {len(scored)} runs"
        cells = [spread([float(r[s]) for r in scored]) for s in SCORES]
        lines.append(" | ".join([f"| {name}", training, *cells]) + " |")
    return lines


def mean_of(rows, score):
    """The mean of a score over runs."""
    return statistics.mean(float(r[score]) for r in rows)


def grouped(runs, columns):
    """Runs -> dict from what stands in these columns to its runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[column] for column in columns), []).append(run)
    return groups


def pairs_of(with_part, without, columns):
    """Pairs (runs with the part, runs without it) that agree in these columns.

    Without columns both are the same runs: of each seed, each later run and the first.
    """
    if columns is None:
        return [([later], [first]) for first, *rest in grouped(without, SEED).values()
                for later in rest]
    with_part = grouped(with_part, columns)
    return [(with_part[key], rows) for key, rows in grouped(without, columns).items()
            if key in with_part]


def differences(runs, columns, flags):
    """Score -> the differences of all pairs: mean of the runs with the part, less that without."""
    if columns == GPU:
        runs, columns = on("GPU", runs), SEED
    pairs = pairs_of(*(scored_runs(runs, f) for f in flags), columns)
    return {score: [mean_of(a, score) - mean_of(b, score) for a, b in pairs] for score in SCORES}


def part_rows(runs):
    """The table of parts. Its first rows are chance: equal settings, run again.

    Bold is a mean of FEWEST pairs or more, all of one sign, beyond three standard deviations of
    chance: that of the same network, or of a ResNet-20 if there is none.
    """
    lines = ["| part | student | pairs | CIFAR-10 | clothing | scenes | photos |",
             "|---|---|---|---|---|---|---|"]
    chances = {student.split(",")[0]: differences(runs, None, flags)
               for _, student, columns, flags in PARTS if columns is None}
    for part, student, columns, flags in PARTS:
        chance, cells = chances.get(student.split(",")[0], chances["ResNet-20"]), []
        for score, values in differences(runs, columns, flags).items():
            cell = spread(values, signed=True)
            if len(values) >= FEWEST and len(chance[score]) > 1:
                one_sign = min(values) > 0 or max(values) < 0
                clear = abs(statistics.mean(values)) > 3 * statistics.stdev(chance[score])
                cell = f"**{cell}**" if one_sign and clear else cell
            cells.append(cell)
        if values:
            lines.append(" | ".join([f"| {part}", student, str(len(values)), *cells]) + " |")
    return lines


def main(argv):
    """Prints, writes or checks the tables -> exit code."""
    runs, readme = read_runs(), (ROOT / "README.md").read_text()
    tables = (network_rows(runs, "network", RESULT),
              network_rows(runs, "other students", OTHERS), part_rows(runs))
    new = readme
    for lines in tables:
        table = "\n".join(lines) + "\n"
        old = re.search(re.escape(lines[0]) + r"\n(\|.*\n)*", new)[0]     # from its first line on
        if "--check" in argv and old != table:
            theirs = set(old.splitlines()) ^ set(lines)
            print("README differs from runs.csv in", *sorted(theirs), sep="\n")
        if not argv:
            print(table)
        new = new.replace(old, table)
    if "--write" in argv:
        (ROOT / "README.md").write_text(new)
    return int("--check" in argv and new != readme)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
