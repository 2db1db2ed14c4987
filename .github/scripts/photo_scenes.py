r"""A developer's tool: scenes of photographs with boxes, in PASCAL VOC layout, to probe detection on.

    python .github/photo_scenes.py PHOTOS OUT           # PHOTOS/{train,test}/CLASS/*
    python cae_dfkd.py --eval-only student.pt --dataset cifar10 --detection-dataset OUT \
        --detection-size 96

A scene is 96 x 96 pixels: one to three photographs, 24 to 40 pixels wide, on a shaded ground,
without overlap. 600 scenes of PHOTOS/train to learn from, 300 of PHOTOS/test. Seeded.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, MOST, SIDE = 96, 3, (24, 40)                                       # pixels, objects, pixels


def scene(photos, rng):
    """An image of SIZE x SIZE pixels and its objects: (category, left, top, right, bottom)."""
    slope = np.linspace(-1, 1, SIZE)
    colour, down, across = rng.uniform(0, 1, 3), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    ground = colour + down * slope[:, None, None] + across * slope[None, :, None]
    image = Image.fromarray((255 * ground.clip(0, 1)).astype(np.uint8))
    objects = []
    for path in rng.choice(photos, rng.integers(1, MOST + 1), replace=False):
        side = int(rng.integers(SIDE[0], SIDE[1] + 1))
        for _ in range(20):                                              # places to try
            left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, 2))
            box = left, top, left + side, top + side
            if all(box[2] <= o[1] or o[3] <= box[0] or box[3] <= o[2] or o[4] <= box[1]
                   for o in objects):
                with Image.open(path) as photo:
                    image.paste(photo.convert("RGB").resize((side, side), Image.BICUBIC), box)
                objects.append((path.parent.name, *box))
                break
    return image, objects


def main(source, out):
    """Write the images, one annotation each, and the lists of the two splits."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True)
    for seed, (photos, split, n) in enumerate((("train", "trainval", 600), ("test", "test", 300))):
        rng, paths = np.random.default_rng(seed), sorted((source / photos).glob("*/*"))
        names = [f"{split}_{i:03}" for i in range(n)]
        for name in names:
            image, objects = scene(paths, rng)
            image.save(out / f"JPEGImages/{name}.jpg", quality=95)
            (out / f"Annotations/{name}.xml").write_text("<annotation>" + "".join(
                f"<object><name>{category}</name><bndbox><xmin>{l}</xmin><ymin>{t}</ymin>"
                f"<xmax>{r}</xmax><ymax>{b}</ymax></bndbox></object>"
                for category, l, t, r, b in objects) + "</annotation>")
        (out / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
