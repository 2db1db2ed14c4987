"""A developer's tool: each step of a run against its floor, in turns, in one process.

    python .github/scripts/benchmark.py --teacher-ckpt resnet20.th --dataset cifar10

It takes any flag of cae_dfkd.py. The floor is the bare forward and backward passes (and the
student's optimiser step) over the same tensors in the same precision and memory layout. Prints a
table of medians. Without --teacher-ckpt the teacher is untrained, which takes as long.
"""
import copy
import dataclasses
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


def side_by_side(functions, device, repeats, minutes=5):
    """Median milliseconds of each. They take turns, so that a busy moment hits all of them.

    The first turn warms up. Turns end after `repeats`, or after these minutes if there were three.
    """
    times = {name: [] for name in functions}
    wait = getattr(torch, torch.device(device).type).synchronize
    begun = time.perf_counter()
    for turn in range(1 + repeats):
        if turn > 3 and time.perf_counter() - begun > 60 * minutes:
            break
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if turn > 0:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def steps(teacher, student, config):
    """The two steps of a run, a whole round, and their floors: functions to be timed, by name."""
    frozen = copy.deepcopy(student).eval().requires_grad_(False)
    pupil = copy.deepcopy(student).train()
    a, b = C.State(teacher, frozen, config), C.State(teacher, pupil, config)
    labels = torch.arange(config.synth_batch, device=a.bank.labels.device) % len(a.cend.embeddings)
    e_hat = a.cend(labels)
    b.bank.push(a.generator(e_hat).detach(), labels)
    ready = b.bank.sample(config.batch_size)[0]

    def kd_step():
        C.student_step(b)

    def kd_floor():
        with C.autocast(ready, config):
            with torch.no_grad():
                teacher(ready)
            loss = pupil(ready).float().mean()
        b.student_optimizer.zero_grad()
        loss.backward()
        b.student_optimizer.step()

    def synthesis_step():
        C.generator_step(a, e_hat, labels)

    def synthesis_floor():
        with C.autocast(e_hat, config):
            images = a.generator(e_hat)
            loss = teacher(images).float().mean()
            if config.lambda_adv:
                loss = loss + frozen(images).float().mean()
        a.generator_optimizer.zero_grad()
        loss.backward()

    def synthesis_round():
        C.synthesis_round(a)

    return {"KD step": kd_step, "KD floor": kd_floor, "synthesis step": synthesis_step,
            "synthesis floor": synthesis_floor, "synthesis round": synthesis_round}


def main():
    """Command line -> the table."""
    config = C.parse_args(sys.argv[1:])
    _, classes = C.load_data(config.dataset, "test", config)
    if config.teacher_ckpt:
        teacher = C.find_teacher(config, classes)
    else:
        net = C.build_model(config.teacher, len(classes))
        teacher = C.Normalized(net, *C.IMAGENET).to(config.device).eval().requires_grad_(False)
    net = C.build_model(config.student, len(classes))
    student = C.Normalized(net, teacher.mean.cpu(), teacher.std.cpu()).to(config.device)

    def variant(**changes):
        return steps(teacher, student, dataclasses.replace(config, **changes))

    run, other = variant(), "fp32" if config.bf16 else "bf16"
    timed = {name: run[name] for name in run if name != "synthesis round"}
    rival = variant(bf16=not config.bf16)
    timed |= {f"{name}, {other}": rival[name] for name in ("KD floor", "synthesis floor")}
    plain = variant(lambda_cae=0.0, lambda_cncl=0.0)
    timed["KD step, KD alone"] = plain["KD step"]
    ms = side_by_side(timed, config.device, 40)
    heavy = variant(generator_width=128, synth_steps=30)
    rounds = {"light": run["synthesis round"], "heavy, 30 steps": heavy["synthesis round"]}
    ms |= side_by_side(rounds, config.device, 3)
    rows = {f"{name} step / its floor": ms[f"{name} step"] / ms[f"{name} floor"]
            for name in ("KD", "synthesis")}
    rows["images finished / s"] = 1000 * config.synth_batch / ms["light"]
    finished_by_heavy = 1000 * config.synth_batch / ms["heavy, 30 steps"]
    rows["the same, heavy generator with 30 steps"] = finished_by_heavy
    rows["images consumed / s"] = 1000 * config.batch_size / ms["KD step"]
    rows |= {f"{name}, ms": value for name, value in ms.items()}
    rows["peak resident MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3)
    precision = "bf16" if config.bf16 else "fp32"
    print(f"{config.teacher} -> {config.student}, {config.device} {precision}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, value in rows.items():
        print(f"| {name} | {value:.3g} |")


if __name__ == "__main__":
    main()
