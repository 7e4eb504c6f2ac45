"""Validation while a run trains: a few cases, segmented with averaged weights in a few steps.

The network that is trained is left alone: a copy is given the weights. All noise comes from
separate generators, so that a run with validation draws what it would have drawn without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.checkpoint import BEST, Weights
from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.folders import counted
from guided_diffusion.dist_util import rank
from guided_diffusion.ensemble import fit_temperature
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded, make_folder
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.plan import SamplingPlan, make_plan
from guided_diffusion.inference.rendering import draw_overlay
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.inference.trajectory import Trajectory
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions, WatchOptions
from guided_diffusion.report.canvas import Pixels
from guided_diffusion.report.pictures import write_picture
from guided_diffusion.scoring.calibration import best_dice, energy_distance
from guided_diffusion.scoring.metrics import confusion, dice, iou


class Score(NamedTuple):
    """How good a run is: mean Dice and IoU, in [0, 1], over the cases of validation.

    ``mask_temperature`` is the one with which the fused masks' log-odds are calibrated best.
    """

    dice: float
    iou: float
    mask_temperature: float = 1.0


class RatedScore(NamedTuple):
    """How good a run is where cases have several raters; Dice and IoU are with their majority.

    ``energy_distance`` of the drawn masks and the raters is in [0, 2], ``dice_best`` is the mean
    over raters of the Dice of each one's best drawn mask; means over the cases with raters.
    """

    dice: float
    iou: float
    energy_distance: float
    dice_best: float
    mask_temperature: float = 1.0


class Accuracy(NamedTuple):
    """How good a classifier is: share of right answers, and mean loss."""

    accuracy: float
    loss: float


Validate = Callable[[Weights, int], Score | RatedScore | Accuracy | None]
"""Scores the weights of a step, the first value decides; None where there is nothing to score."""


class BestScore:
    """The best validation of a run, and how many validations have come since.

    ``state`` is what a checkpoint keeps: the score by its name, ``step`` and ``since``; empty
    before the first validation; also the ``mask_temperature`` that the last validation fitted. It
    has ``owed`` if a signal kept the last one from its end.
    """

    def __init__(self, state: Mapping[str, Any] = {}) -> None:
        self.state = dict(state)

    def owe(self) -> None:
        """Note that the present step has not been validated to the end."""
        self.state["owed"] = True

    @property
    def owed(self) -> bool:
        """Whether the present step is still to be validated."""
        return "owed" in self.state

    def update(self, score: Score | RatedScore | Accuracy, step: int) -> bool:
        """Add a validation, whose first value decides, and return whether it is the best."""
        name = score._fields[0]
        self.state.pop("owed", None)
        better = score[0] > self.state.get(name, -1.0)
        if better:
            self.state = {name: score[0], "step": step, "since": 0}
        else:
            self.state["since"] += 1
        if not isinstance(score, Accuracy):
            self.state["mask_temperature"] = score.mask_temperature
        return better

    def is_stale(self, patience: int, step: int) -> bool:
        """Return whether the last ``patience`` validations were not better, and log it if so.

        Only the first process validates, so only it knows.
        """
        since = self.state.get("since", 0)
        if rank() or not 0 < patience <= since:
            return False
        name, value = next(iter(self.state.items()))
        logger.log(
            f"stopped at step {step}: the last {since} validations were not better than "
            f"{name} {value:.4f} of step {self.state['step']}, kept as {BEST}"
        )
        return True


SHOWN = 4
"""Cases whose overlays a sink is shown."""
PIXELS = 2**16
"""Pixels of a case that the temperature of the fused masks is fitted to, at least half of them."""


class Validation:
    """Scores weights on some cases, and draws their overlays and how a mask develops.

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

    def __call__(self, weights: Weights, step: int) -> Score | RatedScore | None:
        """Score weights; the pictures of the last call are replaced."""
        self.segmenter.net.load_state_dict(weights)
        trajectory = draw_trajectory(self.segmenter, self.cases[0])
        logger.picture("sampling", trajectory, step)
        if self.folder is None:
            return None
        make_folder(self.folder)
        write_picture(self.folder / "sampling.png", trajectory)
        scores, rated, soft, truth = [], [], list[Tensor](), list[Tensor]()
        for case in self.cases:
            (result,) = self.segmenter.segment([case])
            scores.append(score_of(case, result)[:2])
            every = max(1, result.fused.numel() // PIXELS)
            assert case.mask is not None
            soft.append(result.fused.flatten()[::every])
            truth.append(case.mask.flatten()[::every])
            rated += [agreement_of(case.raters, result)] if case.raters is not None else []
            shown = draw_overlay(case, result)
            write_picture(self.folder / f"{case.name}.png", shown)
            if len(scores) <= SHOWN:
                logger.picture(case.name, shown, step)
        mean = np.mean(scores, axis=0).tolist()
        fitted = fit_temperature(torch.cat(soft), torch.cat(truth))
        if rated:
            mean += np.mean(rated, axis=0).tolist()
            return RatedScore(*mean)._replace(mask_temperature=fitted)
        return Score(*mean)._replace(mask_temperature=fitted)


def score_of(case: Case, result: Segmentation) -> Score:
    """Dice and IoU of a case at its own size; of declared classes the means."""
    if case.mask is None:
        raise ValueError(f"{case.name} has no mask")
    truth = (case.mask >= 0.5).numpy()
    found = result.mask.numpy().reshape(truth.shape)
    counts = [confusion(*pair) for pair in zip(found, truth, strict=True)]
    return Score(*(float(np.mean([rule(c) for c in counts])) for rule in (dice, iou)))


def agreement_of(raters: Tensor, result: Segmentation) -> tuple[float, float]:
    """Energy distance and best Dice of the drawn masks and the raters' [R, K, H, W].

    Of declared classes the means.
    """
    own, classes = result.members, result.classes
    if classes is None:
        drawn = (own >= 0.5)[:, None].numpy()
    else:
        drawn = np.stack([classes.masks(member.numpy()) for member in own])
    theirs = (raters >= 0.5).numpy()
    pairs = [(drawn[:, k], theirs[:, k]) for k in range(theirs.shape[1])]
    distance, best = (
        float(np.mean([rule(*pair) for pair in pairs])) for rule in (energy_distance, best_dice)
    )
    return distance, best


def draw_trajectory(segmenter: Segmenter, case: Case) -> Pixels:
    """Draw how the first mask of a case develops, uint8 [h, w, 3]."""
    trajectory = Trajectory(segmenter, case.name)
    image = segmenter.frame.fit(case).image
    segmenter.draw(image[None], [case.name], callback=trajectory)
    return trajectory.picture()


def chosen_cases(dataset: SegmentationDataset, count: int) -> list[Case]:
    """Choose ``count`` cases, evenly spread over a data set; 0 for all.

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
                f"{case.name} has no mask, which validation needs",
                "Omit --val_dir, or name a folder with masks.",
            )
    return cases


def validation_plan(
    watch: WatchOptions, run: RunOptions, diffusion: GaussianDiffusion, device: torch.device
) -> SamplingPlan:
    """Make the plan of a validation: two masks per case, in few evaluations.

    Where the noisy mask was withheld in training, the answer without it is scored; a network that
    never sees one gives one mask.
    """
    steps = min(watch.val_steps, len(diffusion.kept))
    sampling = SamplingOptions(sampler="dpm_solver++", steps=steps, num_ensemble=2)
    if diffusion.mask_dropout:
        sampling = replace(sampling, fusion="direct")
    if diffusion.mask_dropout == 1:
        sampling = replace(sampling, sampler="direct", num_ensemble=1, uncertainty="entropy")
    uncompiled = replace(run, compile="")
    return make_plan(sampling, uncompiled, diffusion, device=device, own=True)


def make_validation(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    held_out: SegmentationDataset | None,
    watch: WatchOptions,
    run: RunOptions,
) -> Validation:
    """Validate on some held-out cases; without any, only draw one training case."""
    if held_out is None:
        return Validation(segmenter, [dataset[0]], folder=None)
    folder = expanded(run.out_dir) / "validation"
    return Validation(segmenter, chosen_cases(held_out, watch.val_cases), folder=folder)


def validation_notes(validation: Validation | None) -> Iterator[str]:
    """Describe what a run is validated on, and which pictures it cannot draw."""
    if validation and validation.folder:
        plan = validation.segmenter.plan
        yield (
            f"validation on {counted(len(validation.cases), 'case')}, "
            f"{counted(plan.num_ensemble, 'mask')} each in "
            f"{counted(plan.evaluations, 'evaluation')}"
            + ("; Dice is that of the answer without a noisy mask" if plan.needs_direct else "")
        )
    if find_spec("matplotlib") is None:
        yield "no curves.png: python -m pip install matplotlib would draw it"
