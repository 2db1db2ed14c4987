"""A run in several processes, on one machine with several GPUs or CPU cores.

    torchrun --nproc-per-node=2 .github/scripts/distributed.py [any flag of cae_dfkd.py]
    torchrun --nproc-per-node=2 .github/scripts/distributed.py --resume runs/NAME

Batch sizes are those of each process, as in DistributedDataParallel: n processes make n times as
many images in a round, and the student sees n times as many in a step. Losses compare the images
of one process's batch. Each process draws its own noise and batches, and gradients are averaged
before each optimiser step. So networks and memory bank are equal in all processes, and last.pt of
process 0 holds everything. Process 0 alone writes and prints.

Each process clips its own gradient, before the average. A run that is resumed with the same number
of processes ends, on a CPU, with the same student bit for bit.
"""
import dataclasses
import functools
import hashlib
import io
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


def agreed(thing=None):
    """What process 0 passes, in all processes. The others wait for it."""
    box = [thing]
    dist.broadcast_object_list(box, 0)
    return box[0]


def average_gradients(optimizer, *_):
    """Before an optimiser step: every gradient becomes its mean over the processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])  # one message for all of them
    dist.all_reduce(flat)                               # their sum
    means = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


def connect(state):
    """From here on the steps of `distill` keep networks and bank equal in all processes."""
    for optimizer in (state.generator_optimizer, state.student_optimizer):
        optimizer.register_step_pre_hook(average_gradients)
    seed_layer, push = state.generator.seed_layer, state.bank.push
    reset = seed_layer.reset_parameters
    def reset_alike():
        reset()
        for parameter in seed_layer.parameters():
            dist.broadcast(parameter.data, 0)
    def push_all(*images_and_labels):
        for sender in range(dist.get_world_size()):     # in one order everywhere
            copies = [t.clone(memory_format=torch.contiguous_format) for t in images_and_labels]
            for copy in copies:
                dist.broadcast(copy, sender)
            push(*copies)
    seed_layer.reset_parameters = reset_alike
    state.bank.push = push_all


def train(teacher, student, config, state, on_cycle):
    """`distill` in each process. on_cycle is called in process 0 alone."""
    connect(state)
    rank, world = dist.get_rank(), dist.get_world_size()
    def after_cycle(state, metrics):
        if rank == 0:
            on_cycle(state, metrics)
        for buffer in (*student.buffers(), *state.generator.buffers()):
            dist.broadcast(buffer, 0)                   # BatchNorm statistics
    own = dataclasses.replace(config, seed=config.seed * world + rank)  # draws of its own
    state.config = own
    C.distill(teacher, student, own, state, after_cycle)
    weights = b"".join(v.cpu().numpy().tobytes() for v in student.state_dict().values())
    digests = [""] * world
    dist.all_gather_object(digests, hashlib.sha256(weights).hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError("the processes have ended with different students")
    print(f"student {digests[0]}, the same in {world} processes", flush=True)


def lead():
    """Process 0: the usual command, with `train` in place of `distill` -> exit code."""
    others_wait = True
    def train_with_others(teacher, student, config, state, on_cycle):
        nonlocal others_wait
        others_wait = False
        buffer = io.BytesIO()
        torch.save(state, buffer)
        agreed(buffer.getvalue())                       # teacher and data are there: all may begin
        train(teacher, student, config, state, on_cycle)
    C.run = functools.partial(C.run, train=train_with_others)
    try:
        return C.main()
    finally:
        if others_wait:                                 # --help, --eval-only or an error
            agreed(None)


def follow():
    """Every other process: the same work without files, on a copy of the state -> exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # process 0 answers Ctrl-C
    sys.stdout = open(os.devnull, "w")
    copy = agreed()
    if copy is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        state = torch.load(io.BytesIO(copy), device, weights_only=False)
        train(state.teacher, state.student, state.config, state, None)
    return 0


def main():
    """Join the processes that torchrun has started, and take part in the run -> exit code."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit("error: start it by torchrun, as its first lines show")
    backend = "gloo"
    if torch.cuda.is_available():                       # gloo for what is on the CPU
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))            # what "cuda" means here
    dist.init_process_group(backend, timeout=timedelta(days=1))         # a teacher takes its time
    code = lead() if dist.get_rank() == 0 else follow()
    if code == 0:
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
