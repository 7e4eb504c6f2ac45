"""Draw phantoms with their maps and weak masks, from the networks that ``weak.py`` trained.

    python benchmarks/weak_gallery.py

writes ``results/figures/weak_maps.png``. The settings are those of ``results/weak.jsonl``, the
images are held-out ones, evenly spread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from weak import Study, truth_of

METHODS = ("CDM", "counterfactual", "encoded")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("results/weak_benchmark"), help="folder of the networks")
    add("--rows", type=Path, default=Path("results/weak.jsonl"))
    add("--figure", type=Path, default=Path("results/figures/weak_maps.png"))
    add("--seed", type=int, default=1)
    add("--image_size", type=int, default=48)
    add("--diffusion_steps", type=int, default=1000)
    add("--shown", type=int, default=6)
    arguments = parser.parse_args()
    arguments.seeds = [arguments.seed]
    figure = gallery(Study(arguments, "phantoms", arguments.seed), arguments.shown)
    figure.savefig(arguments.figure, dpi=90)


def gallery(study: Study, shown: int) -> Figure:
    """A row for each image: itself, the maps of some methods, and the contours of two masks."""
    torch.set_num_threads(1)
    cases = study.cases("validate", label=1, most=shown)
    columns = 2 + len(METHODS)
    figure, axes = pyplot.subplots(
        shown, columns, figsize=(1.8 * columns, 1.8 * shown + 0.5), layout="constrained"
    )
    for axis, title in zip(axes[0], ("image", *METHODS, "masks"), strict=True):
        axis.set_title(title, fontsize=10)
    for row, case in zip(axes, cases, strict=True):
        for axis in row:
            axis.axis("off")
        row[0].imshow(case.image[0], cmap="gray")
        row[-1].imshow(case.image[0], cmap="gray")
        row[-1].contour(truth_of(case), [0.5], colors="#35c95b", linewidths=1.2)
    for column, name in enumerate(METHODS, 1):
        settings = study.settings(name)
        differences = study.differences(study.segmenter(settings), cases)
        for row, case, difference in zip(axes, cases, differences, strict=True):
            heat, mask = study.mask(settings, case, difference)
            row[column].imshow(heat, cmap="magma")
            if name == METHODS[-1] and mask.any():
                row[-1].contour(mask.astype(np.float32), [0.5], colors="#ff5a3c", linewidths=1.2)
    figure.supxlabel("masks: green the truth, red that of the encoded map", fontsize=9)
    return figure


if __name__ == "__main__":
    main()
