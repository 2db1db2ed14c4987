"""Detection probe: how well the frozen feature maps of networks find objects, in AP50.

    python .github/scripts/detection.py [ARCH=]FILE ... [--data scenes|voc2007|FOLDER|photos:FOLDER]
        [--size 224] [--device cpu] [--debug]

FILE is a student.pt, which says what network it is. Any other checkpoint needs ARCH= before it, a
network that cae_dfkd.py knows, as in resnet20=resnet20.th. Images are normalised as the file says,
else as for ImageNet. Prints one table; an untrained network of the first file's architecture and
normalisation stands beside the others.

--data scenes           600 drawn images of 96 x 96 pixels to learn from, 300 to score (default);
                        their shapes are others than those of cae_dfkd.py
       photos:FOLDER    as many scenes of the photographs FOLDER/{train,test}/CLASS/*
       voc2007          PASCAL VOC 2007 in data/, fetched if it is missing
       FOLDER           PASCAL VOC layout, with the splits trainval and test
--size                  longer side, in pixels, of the images of the last two

Objects marked difficult teach nothing. In scoring, a detection that matches one is neither right
nor a false alarm, as in the VOC devkit.
"""
import argparse
import io
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, ops
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import cae_dfkd as C


# ===== 1. The probe ===============================================================================
def coarsest_layer(backbone, device):
    """The layer that the coarsest feature map of a network leaves."""
    image, calls = torch.zeros(1, 3, 32, 32, device=device), []
    modules = list(backbone.modules())
    with torch.no_grad(), C.hooked(modules, lambda layer, x, y: calls.append((layer, y))):
        maps = C.read(backbone, image)[2]
    if not maps:
        raise ValueError(f"{type(backbone).__name__} has no feature maps to find objects in")
    return [layer for layer, y in calls if y is maps[0]][-1]            # a block, not its last ReLU


def dense_features(backbone, layer, image, device):
    """Image (3, H, W) -> rows of its coarsest feature map (L, D), their centres (L, 2).

    A row is a location of the map. Its centre is the middle of the pixels that it stands for, as
    x and y in pixels. Images come one by one, since their sizes may differ.
    """
    maps = []
    with torch.no_grad(), C.hooked([layer], lambda _, x, y: maps.append(y)):
        backbone(C.to_float(image[None], device))
    features = maps[-1][0].float()                                                  # (D, h, w)
    _, h, w = features.shape
    y = (torch.arange(h, device=device) + 0.5) * image.shape[1] / h
    x = (torch.arange(w, device=device) + 0.5) * image.shape[2] / w
    centres = torch.cartesian_prod(y, x).flip(1)        # x before y
    return features.flatten(1).T, centres


def assign_locations(centres, boxes, labels, k):
    """What each location is to learn: its category (L,), distances to its box's sides (L, 4).

    centres (L, 2); boxes (n, 4) as left, top, right, bottom; all in pixels; labels (n,), below k.
    A location in the central half of a box, in width and height, has the box's category; of two
    boxes the smaller counts. In no box it is background, k. Elsewhere it is -1 and left out. A box
    whose central half holds no location takes the nearest.
    """
    category = torch.full((len(centres),), k, device=centres.device)
    sides = centres.new_ones(len(centres), 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for i in areas.argsort(descending=True):            # smaller boxes overwrite larger ones
        left_top, right_bottom = boxes[i, :2], boxes[i, 2:]
        middle = (left_top + right_bottom) / 2
        off = (centres - middle).abs() / (right_bottom - left_top)      # in box sizes, (L, 2)
        inside, central = (off < 0.5).all(1), (off < 0.25).all(1)       # (L,) each
        if not central.any():
            central[off.square().sum(1).argmin()] = True
        category[inside & (category == k)] = -1
        category[central] = labels[i]
        distances = torch.cat([centres - left_top, right_bottom - centres], 1)      # (L, 4)
        sides[central] = distances[central].clamp_min(1)                # they have a logarithm
    return category, sides


def fit_ridge(x, y, l2):
    """Ridge regression in closed form, x (N, D), y (N, M): weights (D, M) under L2, bias (M,)."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    gram = x.T @ x / len(x) + l2 * torch.eye(x.shape[1], device=x.device)           # (D, D)
    w = torch.linalg.solve(gram, x.T @ (y - y_mean) / len(x))
    return w, y_mean - x_mean @ w


def difficult_of(target):
    """Which objects of an image are marked difficult, (n,); a target that does not say has none."""
    return target.get("difficult", torch.zeros(len(target["boxes"]), dtype=torch.bool))


def fit_detector(backbone, layer, train, k, most, device):
    """Two linear models of locations, each (weights, bias), and the (mean, std) of features.

    A logistic regression gives the category, background included. A ridge regression gives the
    logarithm of the distances to the sides of the box.
    """
    draw = torch.Generator().manual_seed(0)
    each = most // len(train) + 1                       # locations of background in an image
    rows = []
    for image, target in train:
        x, centres = dense_features(backbone, layer, image, device)
        easy = ~difficult_of(target)
        boxes, labels = target["boxes"][easy].to(device), target["labels"][easy].to(device)
        category, sides = assign_locations(centres, boxes, labels, k)
        objects = ((category >= 0) & (category < k)).nonzero()[:, 0]
        background = (category == k).nonzero()[:, 0]
        some = torch.randperm(len(background), generator=draw)[:each].to(device)
        keep = torch.cat([objects, background[some]])
        rows.append((x[keep], category[keep], sides[keep]))
    x, category, sides = (torch.cat(part) for part in zip(*rows))
    std, mean = torch.std_mean(x, 0)
    std = std.clamp_min(1e-6)
    x = (x - mean) / std
    objects = category < k
    classifier = C.fit_logistic(x, category, k + 1, 1e-3)
    regressor = fit_ridge(x[objects], sides[objects].log(), 1e-3)
    return classifier, regressor, (mean, std)


def detect(backbone, layer, detector, image, device):
    """Objects in an image, at most 50, best first: boxes (n, 4) in pixels, labels, scores (n,)."""
    (w, b), (v, c), (mean, std) = detector
    x, centres = dense_features(backbone, layer, image, device)
    x = (x - mean) / std
    scores, labels = (x @ w + b).softmax(1)[:, :-1].max(1)              # best but background
    sides = (x @ v + c).exp()                                                       # (L, 4)
    boxes = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1)
    boxes = ops.clip_boxes_to_image(boxes, image.shape[1:])
    sure = (scores > 0.02).nonzero()[:, 0]              # fainter ones are left out
    best = sure[ops.batched_nms(boxes[sure], scores[sure], labels[sure], 0.4)[:50]]
    return boxes[best].cpu(), labels[best].cpu(), scores[best].cpu()


def match(boxes, truth, hard):
    """Which boxes (n, 4), best first, find a true box (m, 4) of an image: 1, 0 or NaN for each.

    A box finds the true box that it overlaps most, of those that no better box has taken. 1 is
    right, 0 a false alarm; NaN, which does not count, has found one that is `hard` (m,).
    """
    hits = []
    overlap = ops.box_iou(boxes, truth)                                             # (n, m)
    for row in overlap:                                 # a view: it sees what is taken
        if len(row) == 0 or row.max() < 0.5:
            hits.append(0.0)
        elif hard[row.argmax()]:                        # any number may match it
            hits.append(math.nan)
        else:
            hits.append(1.0)
            overlap[:, row.argmax()] = 0                # taken
    return hits


def average_precision(detections, truths, difficult=None):
    """Average precision (AP) of one category at IoU 0.5, in percent.

    It is the area under precision over recall, by all points, as in VOC from 2010 on. All three
    are lists with an entry per image. detections: boxes (n, 4) and scores (n,), best first; truths:
    true boxes (m, 4); difficult: which of these are, (m,), by default none.
    """
    difficult = difficult or [torch.zeros(len(truth), dtype=torch.bool) for truth in truths]
    hits = [hit for (boxes, _), truth, hard in zip(detections, truths, difficult)
            for hit in match(boxes, truth, hard)]
    order = torch.cat([scores for _, scores in detections]).argsort(descending=True)
    hits = torch.tensor(hits, dtype=torch.double)[order]
    hits = hits[~hits.isnan()]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)         # after each detection
    precision = precision.flip(0).cummax(0).values.flip(0)              # the best from there on
    objects = sum((~hard).sum().item() for hard in difficult)
    return 100 * (precision * hits).sum().item() / objects


def detection_probe(backbone, train, test, device="cpu", categories=None, most=100_000):
    """A linear detector on frozen features -> {"ap50", "per_category", "detections"}.

    train and test are lists of (image (3, H, W), target): images uint8 or float in [0, 1]; a target
    holds "boxes" (n, 4) as left, top, right, bottom in pixels, "labels" (n,) and, if it likes,
    "difficult" (n,). categories: their names, in the order of labels. most: about how many
    locations of background the detector learns from, drawn with a seed from all images.

    "ap50": the mean of "per_category", {name: AP at IoU 0.5 in percent}; "detections": for each
    test image boxes, labels and scores. A category without an object in test has no AP.
    """
    k = len(categories or [])
    k = k or 1 + max(label for _, target in train for label in target["labels"].tolist())
    layer = coarsest_layer(backbone.eval(), device)
    detector = fit_detector(backbone, layer, train, k, most, device)
    detections = [detect(backbone, layer, detector, image, device) for image, _ in test]
    per_category = {}
    for i in range(k):
        found = [(boxes[labels == i], scores[labels == i]) for boxes, labels, scores in detections]
        truths = [target["boxes"][target["labels"] == i] for _, target in test]
        difficult = [difficult_of(target)[target["labels"] == i] for _, target in test]
        if not torch.cat(difficult).all():              # an object that counts
            name = categories[i] if categories else str(i)
            per_category[name] = average_precision(found, truths, difficult)
    ap50 = sum(per_category.values()) / max(1, len(per_category))
    return {"ap50": ap50, "per_category": per_category, "detections": detections}


# ===== 2. Drawn scenes ============================================================================
SHAPES = {      # in local coordinates: u to the right, v down, in radii
    "diamond": lambda u, v: abs(u) + abs(v) < 1,
    "half": lambda u, v: (np.hypot(u, v) < 1) & (v > 0),
    "crescent": lambda u, v: (np.hypot(u, v) < 1) & ((u - 0.5) ** 2 + v ** 2 > 0.6),
    "dots": lambda u, v: (abs(u) - 0.55) ** 2 + (abs(v) - 0.55) ** 2 < 0.13,
    "ell": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.9) & ((u < -0.3) | (v > 0.3)),
    "hourglass": lambda u, v: (abs(u) < abs(v)) & (abs(v) < 0.9),
}
SIZE = 96                                               # pixels of a scene, each way


def shape_mask(labels, dx, dy, angle):
    """Pixels (n, SIZE, SIZE) of each image's shape; dx, dy: offsets from its centre in radii."""
    u = dx * np.cos(angle) + dy * np.sin(angle)
    v = dy * np.cos(angle) - dx * np.sin(angle)
    mask = np.zeros(u.shape, dtype=bool)
    for label, inside in enumerate(SHAPES.values()):
        mask[labels == label] = inside(u[labels == label], v[labels == label])
    return mask


def draw_scenes(n, seed, most=4):
    """n images, uint8 (3, SIZE, SIZE), of 1 to `most` SHAPES, with their boxes and labels.

    Each further shape takes the first of 20 places that is clear of those before it, or is left
    out. Angle, size, colours, the shading of the ground and the noise vary.
    """
    rng = np.random.default_rng(seed)
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)
    line = np.linspace(-1, 1, SIZE, dtype=np.float32)
    yy, xx = np.meshgrid(line, line, indexing="ij")
    back = uniform(0, 1, 3, 1, 1)
    wanted = rng.integers(1, most + 1, n)               # shapes in each image
    images = back + uniform(-0.2, 0.2, 1, 1, 1) * xx + uniform(-0.2, 0.2, 1, 1, 1) * yy
    placed = np.zeros((n, 0, 3), np.float32)            # x, y, radius of each shape, in [-1, 1]
    boxes, labels = [[] for _ in range(n)], [[] for _ in range(n)]
    for i in range(most):                               # one more shape in all images at once
        radius = uniform(9, 17) * 2 / SIZE                                          # (n,)
        shape = rng.integers(len(SHAPES), size=n)
        reach = 1.3 * radius[:, None, None]             # corners reach out of the radius
        places = (1 - reach) * uniform(-1, 1, 20, 2)                                # (n, 20, 2)
        gaps = np.linalg.norm(places[:, :, None] - placed[:, None, :, :2], axis=-1)     # (n, 20, i)
        free = (gaps > reach + 1.3 * placed[:, None, :, 2]).all(2)                  # (n, 20)
        there = free.any(1) & (i < wanted)              # else this image gets none
        place = np.where(there[:, None], places[np.arange(n), free.argmax(1)], 9)   # 9: far outside
        placed = np.concatenate([placed, np.column_stack([place, radius])[:, None]], 1)
        x, y, r = placed[:, -1].T[:, :, None, None]                                 # (n, 1, 1) each
        mask = shape_mask(shape, (xx - x) / r, (yy - y) / r, uniform(-0.35, 0.35, 1, 1))
        fore = uniform(0, 1, 3, 1, 1)
        near = abs(fore - back).max(1, keepdims=True) < 0.4             # it would hardly be seen
        fore = np.where(near, (back + 0.5) % 1, fore)
        images = np.where(mask[:, None], fore, images)
        for j in there.nonzero()[0]:
            rows, columns = mask[j].any(1).nonzero()[0], mask[j].any(0).nonzero()[0]
            boxes[j].append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])   # tight
            labels[j].append(shape[j])
    images += rng.standard_normal(images.shape, np.float32) * uniform(0, 0.06, 1, 1, 1)
    images = torch.from_numpy((images.clip(0, 1) * 255).round().astype(np.uint8))
    boxes = [torch.from_numpy(np.array(rows)).float() for rows in boxes]
    labels = [torch.from_numpy(np.array(rows)) for rows in labels]
    return [(x, {"boxes": b, "labels": y}) for x, b, y in zip(images, boxes, labels)]


# ===== 3. Scenes of photographs, and the PASCAL VOC layout ========================================
def photo_scene(photos, rng):
    """An image (3, SIZE, SIZE) of one to three photographs, 24 to 40 pixels wide, and its target.

    They do not overlap. The ground is shaded. The category is the folder of the photograph.
    """
    slope = np.linspace(-1, 1, SIZE)
    colour, down, across = rng.uniform(0, 1, 3), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    ground = colour + down * slope[:, None, None] + across * slope[None, :, None]
    image = Image.fromarray((255 * ground.clip(0, 1)).astype(np.uint8))
    boxes, names = [], []
    for path in rng.choice(photos, rng.integers(1, 4), replace=False):
        side = int(rng.integers(24, 41))
        for _ in range(20):                             # places to try
            left, top = (int(corner) for corner in rng.integers(0, SIZE - side + 1, 2))
            box = left, top, left + side, top + side
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1]
                   for b in boxes):
                photo = datasets.folder.pil_loader(path)
                image.paste(photo.resize((side, side), Image.BICUBIC), box)
                boxes.append(box)
                names.append(path.parent.name)
                break
    file = io.BytesIO()                                 # pixels are those of a JPEG file
    image.save(file, "JPEG", quality=95)
    return pil_to_tensor(Image.open(file)), {"boxes": torch.tensor(boxes).float(), "names": names}


def photo_scenes(folder, n, seed):
    """n scenes of the photographs folder/CLASS/*."""
    photos, rng = sorted(folder.glob("*/*")), np.random.default_rng(seed)
    if len(photos) < 3:
        raise ValueError(f"{folder} needs at least three photographs CLASS/*")
    return [photo_scene(photos, rng) for _ in range(n)]


def read_voc(folder, split, size):
    """PASCAL VOC layout -> images (3, H, W), longer side `size`, each with its target.

    Boxes are scaled with the image and clipped to it; what is left below one pixel goes.
    """
    rows = []
    for name in (folder / f"ImageSets/Main/{split}.txt").read_text().split():
        image = datasets.folder.pil_loader(folder / f"JPEGImages/{name}.jpg")
        scale = size / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size])
        boxes, names, difficult = [], [], []
        for item in ElementTree.parse(folder / f"Annotations/{name}.xml").iter("object"):
            sides = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([scale * float(side) for side in sides])
            names.append(item.findtext("name"))
            difficult.append(item.findtext("difficult") == "1")
        boxes = ops.clip_boxes_to_image(torch.tensor(boxes).view(-1, 4), image.size[::-1])
        keep = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        names = [name for name, kept in zip(names, keep) if kept]
        target = {"boxes": boxes[keep], "names": names,
                  "difficult": torch.tensor(difficult, dtype=torch.bool)[keep]}
        rows.append((pil_to_tensor(image), target))
    return rows


def load_detection(data, size=224):
    """What --data names -> train split, test split, names of the categories."""
    if data == "scenes":
        return draw_scenes(600, 1), draw_scenes(300, 2), list(SHAPES)
    folder = Path(data.removeprefix("photos:"))
    try:
        if data == "voc2007":
            folder = Path("data/VOCdevkit/VOC2007")
            for split in ("trainval", "test"):
                if not (folder / f"ImageSets/Main/{split}.txt").exists():
                    datasets.VOCDetection("data", "2007", split, download=True)
        if data.startswith("photos:"):
            splits = photo_scenes(folder / "train", 600, 0), photo_scenes(folder / "test", 300, 1)
        else:
            splits = read_voc(folder, "trainval", size), read_voc(folder, "test", size)
    except Exception as error:
        raise ValueError(f"cannot read {folder}: {error}; --help says what there is") from error
    targets = [[target for _, target in split] for split in splits]
    found = [{name for target in split                  # difficult objects make no category
              for name, hard in zip(target["names"], difficult_of(target)) if not hard}
             for split in targets]
    if not all(found):
        raise ValueError(f"{folder}: one of its two splits has no object to find")
    names = sorted(set.union(*found))
    for target in sum(targets, []):                     # -1: in no category
        labels = [names.index(name) if name in names else -1 for name in target["names"]]
        target["labels"] = torch.tensor(labels).long()
    return *splits, names


# ===== 4. Networks, main ==========================================================================
def load_network(word):
    """[ARCH=]FILE -> frozen network that takes images in [0, 1], file, architecture."""
    arch, path = re.fullmatch(r"(?:(\w+)=)?(.+)", word).groups()
    network = C.load_network(path, arch or "")
    return network, path, arch or torch.load(path, "cpu", weights_only=True)["arch"]


def load_networks(words):
    """Networks by file, and behind them an untrained one of the first's architecture."""
    loaded = [load_network(word) for word in words]
    first, _, arch = loaded[0]
    torch.manual_seed(0)
    net = C.build_model(arch, first.net.fc.out_features)
    untrained = C.Normalized(net, first.mean, first.std)
    return [*((path, network) for network, path, _ in loaded), (f"untrained {arch}", untrained)]


def run(args):
    """Scores all networks and prints the table."""
    networks = load_networks(args.files)
    train, test, names = load_detection(args.data, args.size)
    print(f"| network | AP50 on {args.data} |\n|---|---|")
    for name, network in networks:
        probe = detection_probe(network.to(args.device), train, test, args.device, names)
        print(f"| {name} | {probe['ap50']:.2f} |", flush=True)


def exit_code(run, args):
    """run(args) -> 0, or 2 with one line that says what is to be mended."""
    try:
        run(args)
        return 0
    except Exception as error:
        if args.debug:
            raise
        text = " ".join(str(error).split())
        print(f"error: {text} ({type(error).__name__}; --debug shows where)", file=sys.stderr)
        return 2


def main(argv=None):
    """Command line -> exit code: 0 done, 2 something to mend (one line says what)."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[ARCH=]FILE")
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--debug", action="store_true")
    return exit_code(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
