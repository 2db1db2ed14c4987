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
    ("ResNet-8, not trained", "none", "network, no run", "--student resnet8"),
    ("*ResNet-34, teacher*", "ours: 8 epochs, CIFAR-10 as JPEG", "network, no run",
     "--teacher resnet34"),
    ("**ResNet-18, student of it**", None, "cae_dfkd.py", RESNET18),
    ("ResNet-18, student without feature loss", "1 seed", "cae_dfkd.py",
     RESNET18 + " --lambda-cae 0"),
    ("**ResNet-18, student, only 10 cycles**", None, "cae_dfkd.py", SHORT18),
    ("ResNet-18, not trained", "none", "network, no run", "--student resnet18")]
PARTS = [       # what stands in the README, flags of the runs with the part, and without it
    ("features of whole images (eq. 8)", " --positions 0", " --lambda-cae 0"),
    ("places added to that", "", " --positions 0"),
    ("statistics (eq. 4)", "", " --lambda-fm 0"),
    ("noise in eq. 1 (and 128 images a cycle, not 10)", "", " --magnitudes 0 0 0 0"),
    ("eq. 1 instead of plain noise", "", " --no-cend"),
    ("adversary (eq. 5)", "", " --lambda-adv 0"),
    ("contrast (eq. 9)", "", " --lambda-cncl 0")]
FEWEST = 3      # pairs of a part that the README shows
SAME = "seed", "commit", "processor"    # what a pair has in common
ELSEWHERE = [   # single pairs: name, what they have in common, flags with the part, without it
    ("*decoupled* phases, not single steps in turn: 25 minutes, not 90", SAME[:1], LONG, LONG + " --no-decoupled"),
    ("*light* generator: 64 channels, 12 steps, not 128, 30: 25 minutes, not 65", SAME[:1],
     LONG, LONG + " --generator-width 128 --synth-steps 30"),
    ("all of eq. 8 in a ResNet-20, same code and CPU", SAME, RESNET20, RESNET20 + " --lambda-cae 0"),
    ("all of eq. 8 in a ResNet-18, same code and CPU, only 10 cycles", SAME,
     SHORT18, SHORT18 + " --lambda-cae 0"),
    ("all of eq. 8 in a ResNet-18", SAME[:1], RESNET18, RESNET18 + " --lambda-cae 0"),
    ("of that, places", SAME[:1], RESNET18, RESNET18 + " --positions 0")]


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


def grouped(runs, columns=("seed",)):
    """Runs -> dict from what stands in these columns to its runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[column] for column in columns), []).append(run)
    return groups


def mean_of(rows, score):
    """The mean of a score over runs."""
    return statistics.mean(float(r[score]) for r in rows)


def part_row(name, pairs):
    """name, pairs (runs with the part, runs without it) -> a line of the table of parts."""
    cells = [spread([mean_of(a, s) - mean_of(b, s) for a, b in pairs], signed=True) for s in SCORES]
    return " | ".join([f"| {name}", str(len(pairs)), *cells]) + " |"


def part_rows(runs):
    """The table of parts: for each seed the mean of all runs with the part, less that without it.

    The row of chance: of each seed that ran again, each later run less the first.
    """
    lines = ["| part | pairs | CIFAR-10 | clothing | scenes | photos |",
             "|---|---|---|---|---|---|"]

    def pairs_of(with_flags, without_flags, columns=("seed",)):
        with_part = grouped(scored_runs(runs, with_flags), columns)
        without = grouped(scored_runs(runs, without_flags), columns)
        return [(with_part[key], rows) for key, rows in without.items() if key in with_part]

    for name, *flags in PARTS:
        pairs = pairs_of(*(LONG + flag for flag in flags))
        if len(pairs) >= FEWEST:
            lines.append(part_row(name, pairs))
    again = [([later], [first]) for first, *rest in grouped(scored_runs(runs, LONG)).values()
             for later in rest]
    if again:
        lines.append(part_row("*chance: the same seeds again, often on another CPU*", again))
    for name, columns, *flags in ELSEWHERE:
        pairs = pairs_of(*flags, columns)
        if pairs:
            lines.append(part_row(name, pairs))
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
