"""Sort half-slices of BraTS by whether they hold a lesion, at equal heights of both classes.

    python benchmarks/weak_halves.py --data $REAL_DATA/brats15_2d --out results/halves

Slices are cut along the midline of the patient's brain, and both halves face the same way. A slice
is taken where one half holds a lesion and the other none, so that every image with a lesion has its
normal image from the same patient and height: neither tells the classes apart. Written are
``training`` and ``validate`` with ``normal``, ``tumor`` and ``seg``, grey PNG of 176 x 80 pixels.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.layouts import open_dataset

PARTS = {"training": "training", "testing": "validate"}
HEIGHT, WIDTH = 176, 80
SMALLEST = 50
"""Pixels of a lesion below which a slice is left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="BraTS slices")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for part in PARTS:
        print(f"{part}: {write_halves(arguments.data / part, arguments.out / PARTS[part])} slices")


def write_halves(slices: Path, out: Path) -> int:
    """Write the halves of a folder of slices, and return from how many slices."""
    dataset = open_dataset(slices)
    patients = defaultdict(list)
    for index, owner in enumerate(dataset.patients):
        case = dataset[index]
        assert case.mask is not None
        flair = case.image[dataset.modalities.index("flair")].numpy()
        height = int(re.findall(r"\d+", dataset.entries[index].images[0].name)[-1])
        patients[owner].append((height, flair, case.mask[0].numpy() >= 0.5))
    taken = 0
    for owner, own in patients.items():
        brain = np.any([flair > 0.02 for _, flair, _ in own], axis=0)
        left, top = (middle(brain.any(axis=1 - axis)) for axis in (0, 1))
        for height, flair, lesion in own:
            images, lesions = halves(flair, left, top), halves(lesion, left, top)
            areas = [half.sum() for half in lesions]
            if min(areas) == 0 and max(areas) >= SMALLEST:
                taken += 1
                for side, image, mask in zip("LR", images, lesions, strict=True):
                    stem = f"brats15_{owner}_{side}{height:03d}"
                    save(out / ("tumor" if mask.any() else "normal") / f"{stem}.png", image)
                    if mask.any():
                        save(out / "seg" / f"{stem}.png", mask)
    return taken


def middle(occupied: np.ndarray) -> int:
    """Where an axis is cut: behind the middle of what is occupied on it."""
    places = np.flatnonzero(occupied)
    return round(float(places[0] + places[-1]) / 2 + 0.5)


def halves(values: np.ndarray, left: int, top: int) -> list[np.ndarray]:
    """Both sides of a slice [left-right, front-back], each from the midline outwards, [H, W]."""
    rows = values[:, top - HEIGHT // 2 : top + HEIGHT // 2]
    return [rows[left - WIDTH : left][::-1].T, rows[left : left + WIDTH].T]


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.clip(np.rint(255 * values.astype(np.float32)), 0, 255).astype(np.uint8)
    Image.fromarray(grey).save(path)


if __name__ == "__main__":
    main()
