"""How good a run is while it trains: a few cases, segmented with averaged weights in a few steps.

The network that is trained is left alone: a copy is given the weights. All noise comes from
generators of its own, so that a run with validation draws what it would have drawn without. Built
by ``runs`` and called by ``train_util``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guided_diffusion import logger
from guided_diffusion.checkpoint import Weights
from guided_diffusion.class_results import draw_overlay
from guided_diffusion.datasets import Case, SegmentationDataset
from guided_diffusion.errors import UserError
from guided_diffusion.files import make_folder
from guided_diffusion.film import Film
from guided_diffusion.metrics import confusion, dice, iou
from guided_diffusion.pictures import Pixels, write_picture
from guided_diffusion.segmenter import Segmentation, Segmenter
from guided_diffusion.train_util import Score

SHOWN = 4
"""Cases whose overlays a sink is shown."""


class Validation:
    """Scores weights on some cases, and draws their overlays and how a mask comes to be.

    Args:
        segmenter: a network of its own, which is given the weights to score.
        cases: at their own size; scored where ``folder`` is not None, which needs their masks.
        folder: where ``<case>.png`` and ``sampling.png`` go.
    """

    def __init__(
        self, segmenter: Segmenter, cases: Sequence[Case], *, folder: Path | None = None
    ) -> None:
        self.segmenter = segmenter
        self.cases = cases
        self.folder = folder

    def __call__(self, weights: Weights, step: int) -> Score | None:
        """Score weights; the pictures of the last call are replaced."""
        self.segmenter.net.load_state_dict(weights)
        film = film_of(self.segmenter, self.cases[0])
        logger.picture("sampling", film, step)
        if self.folder is None:
            return None
        make_folder(self.folder)
        write_picture(self.folder / "sampling.png", film)
        scores = []
        for case in self.cases:
            (result,) = self.segmenter.segment([case])
            scores.append(score_of(case, result))
            shown = draw_overlay(case, result)
            write_picture(self.folder / f"{case.name}.png", shown)
            if len(scores) <= SHOWN:
                logger.picture(case.name, shown, step)
        return Score(*np.mean(scores, axis=0).tolist())


def score_of(case: Case, result: Segmentation) -> Score:
    """Dice and IoU of a case at its own size; of declared classes the means."""
    if case.mask is None:
        raise ValueError(f"{case.name} has no mask")
    truth = (case.mask >= 0.5).numpy()
    found = result.mask.numpy().reshape(truth.shape)
    counts = [confusion(*pair) for pair in zip(found, truth, strict=True)]
    return Score(*(float(np.mean([rule(c) for c in counts])) for rule in (dice, iou)))


def film_of(segmenter: Segmenter, case: Case) -> Pixels:
    """How the first mask of a case comes to be, uint8 [h, w, 3]."""
    film = Film(segmenter, case.name)
    image = segmenter.frame.fit(case).image
    segmenter.draw(image[None], [case.name], note=film)
    return film.picture()


def chosen_cases(dataset: SegmentationDataset, count: int) -> list[Case]:
    """So many cases, evenly spread over a data set; 0 for all.

    Raises:
        UserError: one of them has no mask.
    """
    total = len(dataset)
    number = min(count or total, total)
    cases = [dataset[i * total // number] for i in range(number)]
    for case in cases:
        if case.mask is None:
            raise UserError(
                dataset.directory,
                found=f"no mask for {case.name}",
                expected="a labelled data set to validate on",
                mend="Leave --val_dir away, or name a folder with masks.",
            )
    return cases
