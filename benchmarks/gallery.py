"""Draw the test images of ISIC whose members differ most.

    python benchmarks/gallery.py --data DIR --weights FOLDER

FOLDER holds the weights that ``method.py --stages members --weights FOLDER`` has kept; of the first
seed, the settings of its members are those that ``results/method.jsonl`` says were chosen. The
pictures are in the public domain (CC-0).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from method import distances, load, recipes, together, ways_to_spread
from versions import read

from guided_diffusion.data.datasets import Case
from guided_diffusion.dist_util import dev
from guided_diffusion.errors import UserError, exit_on_user_error
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.inference.segmenter import Segmentation, Segmenter
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions
from guided_diffusion.report.canvas import (
    FUSED,
    TRUTH,
    Canvas,
    Caption,
    draw_line,
    enlarge,
    enlarge_mask,
    heat,
)
from guided_diffusion.report.pictures import displayed, write_picture

PANEL, MEMBERS = 150, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--weights", type=Path, required=True, help="folder of trained weights")
    parser.add_argument("--runs", type=Path, default=Path("results/method.jsonl"))
    parser.add_argument("--rows", type=int, default=5, help="images to show")
    parser.add_argument("--cases", type=int, default=0, help="test images to look at; 0: all")
    parser.add_argument("--out", type=Path, default=Path("results/figures/gallery.png"))
    arguments = parser.parse_args()

    lines = [
        line for line in read(arguments.runs) if (line["stage"], line["set"]) == ("members", "isic")
    ]
    if not lines:
        raise UserError(arguments.runs, "has no members of ISIC", "Run the stage members first.")
    line = min(lines, key=lambda line: (line["recipe"] == "unet", line["seed"]))
    data, recipe = (
        load(arguments.data, "isic", line["size"], cases=arguments.cases),
        recipes()[line["recipe"]],
    )
    segmenter = together(line, arguments, data, recipe, dev("0"))
    asked = ways_to_spread(recipe, networks=1)[line["chosen"]]
    options = SamplingOptions(batch_size=64, fusion="direct", **asked)
    segmenter.plan = make_plan(
        options, RunOptions(), segmenter.diffusion, device=segmenter.device, own=True
    )
    shown = most_spread(segmenter, data.testing, arguments.rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_picture(arguments.out, drawn(shown, line["chosen"]))


def most_spread(
    segmenter: Segmenter, cases: list[Case], number: int
) -> list[tuple[Case, Segmentation]]:
    """The cases whose members differ most, and their masks."""
    found: list[tuple[float, Case, Segmentation]] = []
    for case in cases:
        (result,) = segmenter.segment([case])
        spread, _ = distances(result.members >= 0.5, result.fused >= 0.5)
        found = sorted([*found, (spread, case, result)], key=lambda entry: -entry[0])[:number]
    return [(case, result) for _, case, result in found]


def drawn(shown: list[tuple[Case, Segmentation]], settings: str) -> np.ndarray:
    """A row for each case: image and truth, direct answer, members, and where they differ."""
    size = (PANEL, PANEL)
    canvas = Canvas(MEMBERS + 3, size, rows=len(shown))
    canvas.header(
        f"The {len(shown)} test images of ISIC whose members differ most", f"members: {settings}"
    )
    place = iter(range(len(shown) * (MEMBERS + 3)))
    for case, result in shown:
        assert case.mask is not None
        picture = enlarge(displayed(case.image).astype(np.float32) / 255, size)
        outlines = [
            (case.mask[0], TRUTH, "ground truth"),
            (result.fused, FUSED, "direct answer"),
            *(
                (member, FUSED, f"member {number}")
                for number, member in enumerate(result.members[:MEMBERS], start=1)
            ),
        ]
        for mask, colour, text in outlines:
            outline = enlarge_mask((mask >= 0.5).numpy(), size)
            canvas.place(next(place), draw_line(picture, outline, colour), Caption(text))
        map_ = enlarge(heat(2 * result.uncertainty).astype(np.float32) / 255, size)
        canvas.place(next(place), map_, Caption("uncertainty"))
    return np.asarray(canvas.picture)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
