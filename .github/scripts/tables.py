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
RESNET18 = "--dataset cifar10 --teacher resnet34 --cycles 115 --bf16"
SHORT18 = "--dataset cifar10 --teacher resnet34 --cycles 10 --bf16"
RESULT = [      # what stands in the README, how it was trained, script, flags
    ("*ResNet-20, teacher*", "real images", "network, no run", "--teacher resnet20"),
    ("**ResNet-20, student**", None, "cae_dfkd.py", RESNET20),
    ("student, feature loss without *places*", None, "cae_dfkd.py", RESNET20 + " --positions 0"),
    ("student without the feature loss", None, "cae_dfkd.py", RESNET20 + " --lambda-cae 0"),
    ("ResNet-20, not trained", "none", "network, no run", "--student resnet20")]
NETWORKS = [
    ("**ResNet-8, student of the ResNet-20**", None, "cae_dfkd.py", LONG),
    ("*ResNet-34, teacher*", "ours: 8 epochs, CIFAR-10 as JPEG", "network, no run",
     "--teacher resnet34"),
    ("**ResNet-18, student of it**", None, "cae_dfkd.py", RESNET18),
    ("ResNet-18, student without feature loss", "1 run", "cae_dfkd.py",
     RESNET18 + " --lambda-cae 0"),
    ("**ResNet-18, student, only 10 cycles**", None, "cae_dfkd.py", SHORT18),
    ("ResNet-18, not trained", "none", "network, no run", "--student resnet18")]
SHORT8 = "--dataset cifar10 --cycles 8 --bf16"
SEED = ("seed",)                            # what the runs of a pair share
SAME = "seed", "commit", "processor"
PARTS = [       # part, student and cycles, what a pair shares, flags with the part and without
    ("eq. 8, both", "ResNet-8, 8", SEED, (SHORT8, SHORT8 + " --lambda-cae 0")),
    ("eq. 8, whole images", "ResNet-8, 115, *same*", SAME,
     (LONG + " --positions 0", LONG + " --lambda-cae 0")),
    ("eq. 8, places added", "ResNet-8, 115", SEED, (LONG, LONG + " --positions 0")),
    ("eq. 8, places added", "ResNet-8, 115, *same*", SAME, (LONG, LONG + " --positions 0")),
    ("eq. 8, whole images", "ResNet-20, 115", SEED,
     (RESNET20 + " --positions 0", RESNET20 + " --lambda-cae 0")),
    ("eq. 8, places added", "ResNet-20, 115", SEED, (RESNET20, RESNET20 + " --positions 0")),
    ("eq. 8, places added", "ResNet-20, 115, same code", SAME[:2],
     (RESNET20, RESNET20 + " --positions 0")),
    ("eq. 8, both", "ResNet-18, 10, *same*", SAME, (SHORT18, SHORT18 + " --lambda-cae 0")),
    ("eq. 8, whole images", "ResNet-18, 115, *same*", SAME,
     (RESNET18 + " --positions 0", RESNET18 + " --lambda-cae 0")),
    ("eq. 8, places added", "ResNet-18, 115", SEED, (RESNET18, RESNET18 + " --positions 0")),
    ("eq. 4, statistics", "ResNet-8, 115", SEED, (LONG, LONG + " --lambda-fm 0")),
    ("eq. 1, noise (else 10 images a cycle)", "ResNet-8, 115", SEED,
     (LONG, LONG + " --magnitudes 0 0 0 0")),
    ("eq. 1, category vectors (else plain noise)", "ResNet-8, 115", SEED,
     (LONG, LONG + " --no-cend")),
    ("eq. 5, adversary", "ResNet-8, 115", SEED, (LONG, LONG + " --lambda-adv 0")),
    ("eq. 9, contrast", "ResNet-8, 115", SEED, (LONG, LONG + " --lambda-cncl 0")),
    ("decoupled: 12 steps, then 80 (25 minutes; in turns: 90)", "ResNet-8, 115", SEED,
     (LONG, LONG + " --no-decoupled")),
    ("light generator (25 minutes; twice as wide, 30 steps: 65)", "ResNet-8, 115", SEED,
     (LONG, LONG + " --generator-width 128 --synth-steps 30")),
    ("*chance: same seed, other code or CPU*", "ResNet-8, 115", None, (LONG, LONG))]

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


def network_rows(runs, title, networks):
    """A table of networks, a list of lines. Networks without a row in runs.csv are left out."""
    lines = [f"| {title} | training | CIFAR-10, % | clothing, % | scenes, AP50 | photos, AP50 |",
             "|---|---|---|---|---|---|"]
    for name, training, script, flags in networks:
        rows = [r for r in runs if (r["script"], r["flags"]) == (script, flags)]
        scored = [r for r in rows if r["clothing"]]
        if not scored:
            continue
        if training is None:
            minutes = statistics.mean(float(r["seconds"]) for r in scored) / 60
            seeds = len({r["seed"] for r in scored})
            runs_of = f"{len(scored)} runs, " * (len(scored) > seeds)
            training = f"{minutes:.0f} min, {runs_of}{seeds} seed{'s' * (seeds > 1)}"
        cells = [spread([float(r[s]) for r in scored if r[s]]) for s in SCORES]
        lines.append(" | ".join([f"| {name}", training, *cells]) + " |")
    return lines


def scored_runs(runs, flags):
    """The runs with these flags. A run that was stopped has no scores and is left out."""
    return [r for r in runs if (r["script"], r["flags"]) == ("cae_dfkd.py", flags) if r["photos"]]


def grouped(runs, columns):
    """Runs -> dict from what stands in these columns to its runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[column] for column in columns), []).append(run)
    return groups


def mean_of(rows, score):
    """The mean of a score over runs."""
    return statistics.mean(float(r[score]) for r in rows)


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
    pairs = pairs_of(*(scored_runs(runs, f) for f in flags), columns)
    return {score: [mean_of(a, score) - mean_of(b, score) for a, b in pairs] for score in SCORES}


def part_rows(runs):
    """The table of parts, whose last row is chance: equal settings, run again.

    Bold is a mean of FEWEST pairs or more, beyond three standard deviations of chance.
    """
    lines = ["| part | student, cycles | pairs | CIFAR-10 | clothing | scenes | photos |",
             "|---|---|---|---|---|---|---|"]
    _, _, *last = PARTS[-1]
    chance = differences(runs, *last)
    for part, student, columns, flags in PARTS:
        cells = []
        for score, values in differences(runs, columns, flags).items():
            cell = spread(values, signed=True)
            if len(values) >= FEWEST and len(chance[score]) > 1:
                clear = abs(statistics.mean(values)) > 3 * statistics.stdev(chance[score])
                cell = f"**{cell}**" if clear else cell
            cells.append(cell)
        if values:
            lines.append(" | ".join([f"| {part}", student, str(len(values)), *cells]) + " |")
    return lines


def main(argv):
    """Prints, writes or checks the tables -> exit code."""
    runs, readme = read_runs(), (ROOT / "README.md").read_text()
    tables = (network_rows(runs, "network", RESULT),
              network_rows(runs, "other networks", NETWORKS), part_rows(runs))
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
