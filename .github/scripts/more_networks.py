"""More networks for the command line: an example of how to bring your own.

    python .github/scripts/more_networks.py --teacher wrn40_2 --teacher-ckpt FILE --dataset cifar10
    python .github/scripts/more_networks.py --teacher resnet56b --dataset cifar100

It takes any flag of cae_dfkd.py and adds these names to --teacher and --student:
wrn16_1, wrn16_2, wrn40_1, wrn40_2         wide ResNets, parameters named as in the public files
resnet20b, resnet32b, resnet44b, resnet56b CIFAR ResNets whose shortcuts are 1x1 convolutions

For a network of your own, add a function to NETWORKS that takes the number of classes and gives an
nn.Module, images (B, 3, H, W) -> logits (B, K). Its last layer has to be an nn.Linear called fc.
The program finds its embedding and its feature maps by itself.
"""
import functools
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


class PreActBlock(nn.Module):
    """Pre-activation block: x (B, width, H, W) -> (B, out, H / stride, W / stride)."""
    def __init__(self, width, out, stride=1):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.convShortcut = None
        if width != out:
            self.convShortcut = nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = self.convShortcut(y) if self.convShortcut else x
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


def wide_resnet(depth, k, num_classes):
    """WRN-depth-k of Zagoruyko and Komodakis: x (B, 3, H, W) -> logits (B, K)."""
    model, width = nn.Sequential(), 16
    model.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
    for i, stride in ((1, 1), (2, 2), (3, 2)):
        out = 16 * k * 2 ** (i - 1)
        first = PreActBlock(width, out, stride)
        others = [PreActBlock(out, out) for _ in range((depth - 4) // 6 - 1)]
        block = nn.Sequential()
        block.layer = nn.Sequential(first, *others)
        model.add_module(f"block{i}", block)
        width = out
    model.bn1, model.relu = nn.BatchNorm2d(width), nn.ReLU()
    model.avgpool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(width, num_classes)
    return model


def projection_resnet(depth, num_classes):
    """CIFAR ResNet with 1x1 convolutions as shortcuts ("option B"), as in chenyaofo's files."""
    model = C.cifar_resnet(depth, num_classes)
    for layer, width in ((model.layer2, 16), (model.layer3, 32)):
        convolution = nn.Conv2d(width, 2 * width, 1, 2, bias=False)
        layer[0].downsample = nn.Sequential(convolution, nn.BatchNorm2d(2 * width))
    return model


NETWORKS = {f"wrn{depth}_{k}": functools.partial(wide_resnet, depth, k)
            for depth in (16, 40) for k in (1, 2)}
NETWORKS |= {f"resnet{depth}b": functools.partial(projection_resnet, depth)
             for depth in (20, 32, 44, 56)}
STUDENTS = {"wrn40_2": "wrn16_2", "wrn40_1": "wrn16_1"}                 # by default, of a teacher
CHENYAOFO = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/cifar100_"
PUBLIC_TEACHERS = {     # as C.PUBLIC_TEACHERS; behind it the stated accuracy in %
    "resnet20b_cifar100": (CHENYAOFO + "resnet20-23dac2f1.pt", "23dac2f1", C.CIFAR100),     # 68.8
    "resnet32b_cifar100": (CHENYAOFO + "resnet32-84213ce6.pt", "84213ce6", C.CIFAR100),     # 70.2
    "resnet44b_cifar100": (CHENYAOFO + "resnet44-ffe32858.pt", "ffe32858", C.CIFAR100),     # 71.6
    "resnet56b_cifar100": (CHENYAOFO + "resnet56-f2eff4c8.pt", "f2eff4c8", C.CIFAR100),     # 72.6
}
known_to_program = C.build_model


def build_model(arch, num_classes):
    """An untrained network by its name, x (B, 3, H, W) -> logits (B, K)."""
    if arch in NETWORKS:
        return NETWORKS[arch](num_classes)
    return known_to_program(arch, num_classes)


def main(argv=None):
    """The usual command, which now knows these names -> exit code."""
    C.build_model, C.STUDENTS = build_model, C.STUDENTS | STUDENTS
    C.PUBLIC_TEACHERS = C.PUBLIC_TEACHERS | PUBLIC_TEACHERS
    return C.main(argv)


if __name__ == "__main__":
    sys.exit(main())
