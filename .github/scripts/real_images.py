"""A control: a run whose bank gets real images, as many in a cycle as the generator would make.

    python .github/scripts/real_images.py FOLDER [flags of cae_dfkd.py]

Draws from FOLDER/train/CLASS/*. Losses, steps and the schedule are those of cae_dfkd.py, and the
labels are those of the folders. So the student differs from a data-free one by its images alone.
"""
# SPDX-License-Identifier: MIT
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


def real_round(images, labels):
    """A synthesis_round that makes no images but draws from these: uint8 (N, 3, H, H), (N,)."""
    def draw(state):
        chosen = torch.randint(len(labels), (state.config.synth_batch,))
        device = state.bank.labels.device
        state.bank.push(C.to_float(images[chosen], device), labels[chosen].to(device))
        return {}
    return draw


def main(folder, *flags):
    """Command line -> exit code."""
    data, _ = C.load_data(folder, "train", C.parse_args(flags))
    C.synthesis_round = real_round(*data.tensors)
    return C.main(flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
