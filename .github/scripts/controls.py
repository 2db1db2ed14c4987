"""Two controls: runs of cae_dfkd.py that differ from a usual one in images or in colours.

    python .github/scripts/controls.py real:FOLDER [flags of cae_dfkd.py]
    python .github/scripts/controls.py same-colours [flags of cae_dfkd.py]

real:FOLDER     the bank gets images of FOLDER/train/CLASS/*, with their labels, and nothing is
                made up. Each cycle draws as many as the generator would make.
same-colours    the student learns from images that are cropped and flipped, but not recoloured
"""
# SPDX-License-Identifier: MIT
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


def real_round(images, labels):
    """A synthesis_round that draws from these images, uint8 (N, 3, H, H), and their labels (N,)."""
    def draw(state):
        chosen = torch.randint(len(labels), (state.config.synth_batch,))
        device = state.bank.labels.device
        state.bank.push(C.to_float(images[chosen], device), labels[chosen].to(device))
        return {}
    return draw


def main(control, *flags):
    """Command line -> exit code."""
    if control == "same-colours":
        C.jitter_colours = lambda images: images
    else:
        folder = control.removeprefix("real:")
        data, _ = C.load_data(folder, "train", C.parse_args(flags))
        C.synthesis_round = real_round(*data.tensors)
    return C.main(flags)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
