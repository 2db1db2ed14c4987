"""Accuracy on all images of a folder, and a linear probe in five folds, of any networks.

    python .github/scripts/transfer.py [ARCH=]FILE ... [--images FOLDER] [--probe FOLDER]
        [--device cpu] [--debug]

FILE is a student.pt, or with ARCH= a checkpoint, as for detection.py. Both folders are as for
--dataset of cae_dfkd.py, and train/ and test/ are put together: a student without data has seen
neither. (A teacher may have seen train/: score it with cae_dfkd.py, on test/ alone.)

--images    images of the network's own categories: top-1 accuracy in percent
--probe     images of any categories: five times a linear probe of the frozen embeddings is fitted
            to four fifths and scored on the fifth; the mean of the five, in percent. Folds are
            drawn once, by seed 0.

Prints one table; an untrained network of the first file's architecture stands beside the others.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C
from detection import exit_code, load_networks


def load_all(folder):
    """FOLDER/{train,test}/CLASS/* -> images uint8 (N, 3, 32, 32), labels (N,)."""
    config = C.Config(dataset=folder)
    splits = [C.load_data(folder, split, config)[0] for split in ("train", "test")]
    images, labels = zip(*(split.tensors for split in splits))
    return torch.cat(images), torch.cat(labels)


def probe_in_folds(network, images, labels, device="cpu", folds=5):
    """Mean accuracy, in percent, of linear probes that were each scored on another fold."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.chunk(folds)
    scores, network = [], network.eval()
    def embed(images):
        return C.read(network, images)[1]
    for held in parts:
        rest = torch.cat([part for part in parts if part is not held])
        train = TensorDataset(images[rest], labels[rest])
        test = TensorDataset(images[held], labels[held])
        scores.append(C.linear_probe(embed, train, test, device))
    return sum(scores) / len(scores)


def run(args):
    """Scores all networks and prints the table."""
    own = load_all(args.images) if args.images else None
    other = load_all(args.probe) if args.probe else None
    print("| network | accuracy | linear probe |\n|---|---|---|")
    for name, network in load_networks(args.files):
        network = network.to(args.device)
        accuracy = probed = ""
        if own:
            scores = C.collect(network.eval(), TensorDataset(*own), args.device)
            accuracy = f"{C.top1(*scores):.2f}"
        if other:
            probed = f"{probe_in_folds(network, *other, args.device):.2f}"
        print(f"| {name} | {accuracy} | {probed} |", flush=True)


def main(argv=None):
    """Command line -> exit code: 0 done, 2 something to mend (one line says what)."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[ARCH=]FILE")
    parser.add_argument("--images")
    parser.add_argument("--probe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--debug", action="store_true")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
