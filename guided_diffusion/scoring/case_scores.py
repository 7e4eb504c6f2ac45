"""The scores of one case: of its fused mask, its members, and the members under every fusion rule.

:func:`load_case` reads a case and brings it to the truth's size; :func:`score_case` computes ratios
of counts, surface distances, the members' agreement with each other, with the truth and with
several raters, the components, and the tallies of pixels by probability and by uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import size_of
from guided_diffusion.data.truths import Truth
from guided_diffusion.ensemble import FUSIONS, fusion
from guided_diffusion.errors import UserError
from guided_diffusion.scoring import metrics, surface
from guided_diffusion.scoring.calibration import (
    Tally,
    best_dice,
    dice_table,
    energy_distance,
    expected_disagreement,
)
from guided_diffusion.scoring.components import Component, find_components
from guided_diffusion.scoring.fitting import at_size, on_grid, require_shape, resize
from guided_diffusion.scoring.predictions import Mask, Reader, Source

Binary = NDArray[np.bool_]


@dataclass(frozen=True)
class Scoring:
    """How masks are scored.

    Attributes:
        empty: one of :data:`guided_diffusion.scoring.metrics.EMPTY_RULES`.
        tolerance: of the surface Dice, in the unit of the distances.
        low_dice: cases with a lower Dice are those that the uncertainty should find.
        spacing: whether every truth has a known pixel size, so that distances are in mm.
    """

    empty: str = "match"
    tolerance: float = 2.0
    low_dice: float = 0.8
    spacing: bool = False

    @property
    def unit(self) -> str:
        """The unit of all distances."""
        return "mm" if self.spacing else "px"


class CaseFiles(NamedTuple):
    """The files of one case: its fused mask (or None), its members in order, and its truths.

    ``spacing`` is the size of a pixel along H, W and, in a volume, across planes, in millimetres.
    """

    name: str
    fused: Source | None
    members: tuple[Source, ...]
    truth: Truth
    raters: tuple[Truth, ...] = ()
    spacing: tuple[float, ...] | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every file of a prediction, the fused mask first."""
        return self.members if self.fused is None else (self.fused, *self.members)


class CaseMasks(NamedTuple):
    """The masks of one case, or of one class of it, all but ``stored`` at the truth's size."""

    name: str
    stored: Mask  # the fused soft mask [h, w] at its own size
    soft: Mask  # float32 [H, W] in [0, 1]
    found: Binary  # the fused mask [H, W]
    outlined: Mask | Binary  # [H, W], drawn at one half: ``soft``, or ``found`` of a declared class
    truth: Mask  # float32 [H, W] in [0, 1]
    members: Binary  # [E, H, W]
    spread: Mask | None  # standard deviation of the members [H, W]; None of fewer than two
    fusions: dict[str, Binary]  # the members by every rule of fusion, [H, W] each
    raters: Binary  # [R, H, W]
    spacing: tuple[float, ...] | None

    @property
    def uncertainty(self) -> Mask:
        """The members' standard deviation [H, W] in [0, 0.5], or the fused probability's own."""
        return np.sqrt(self.soft * (1 - self.soft)) if self.spread is None else self.spread


class MaskScore(NamedTuple):
    """The scores of any mask against its truth; None where one is undefined or left out."""

    dice: float | None
    iou: float | None
    precision: float | None
    sensitivity: float | None
    specificity: float | None
    volume_difference: float | None
    hd95: float | None
    assd: float | None
    surface_dice: float | None


class CaseScore(NamedTuple):
    """One row of ``scores.csv``; the fields are its columns, in this order."""

    name: str
    dice: float | None
    iou: float | None
    parent_dice: float
    parent_iou: float
    tp: int
    fp: int
    fn: int
    tn: int
    empty_truth: bool
    empty_prediction: bool
    members: int
    dice_member: float | None  # mean Dice of the single members; None without member files
    precision: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    volume_difference: float | None = None
    hd95: float | None = None
    assd: float | None = None
    surface_dice: float | None = None
    size: float | None = None  # area of the truth, in the unit of the distances, squared
    dice_between: float | None = None  # mean Dice of two members with each other
    uncertainty: float | None = None  # 1 - dice_between, or what the fused mask expects of it
    energy_distance: float | None = None  # with --raters
    dice_best: float | None = None  # with --raters: of the member that suits each rater best
    member_error: float | None = None  # mean 1 - Dice of two or more members with the truth


class Scored(NamedTuple):
    """A case's row, the scores of its masks by name, its tallies, and its fused components.

    Components are those of a case with two or more members.
    """

    row: CaseScore
    masks: dict[str, MaskScore]
    probability: Tally
    uncertainty: Tally
    components: list[Component]


def load_case(
    files: Sequence[CaseFiles], classes: Classes | None, read: Reader, *, fuse: bool = True
) -> list[CaseMasks]:
    """Read one case: the files of each class, or of the only one; ``read`` decodes them.

    With ``fuse`` the members are also fused by every rule there is.

    Raises:
        UserError: a file, a truth or a rater's mask is not a readable mask, or sizes differ.
    """
    truth = _read_truth(files[0].truth, files[0].name, len(files))
    size = (truth.shape[1], truth.shape[2])
    rated = (
        _read_truth(rater, files[0].name, len(files), like=(files[0].truth, size))
        for rater in files[0].raters
    )
    raters = np.stack([truth, *rated])[1:]
    stored, members = _read_predictions(files, read)
    require_shape(files[0].sources[0], stored.shape[1:], size)
    cropped = files[0].sources[0].tensor
    soft = np.stack([at_size(channel, size, cropped=cropped) for channel in stored])
    drawn = np.stack([soft, *([at_size(c, size, cropped=cropped) for c in m] for m in members)])[1:]
    kept, found = len(drawn), _cut(soft, classes)
    cut = np.stack([found, *(_cut(member, classes) for member in drawn)])[1:]
    exclusive = classes is not None and classes.exclusive
    fusions = {
        name: _cut(fusion(name, exclusive=exclusive)(torch.from_numpy(drawn)).numpy(), classes)
        for name in FUSIONS
        if fuse and kept > 1
    }
    return [
        CaseMasks(
            name=case.name,
            stored=stored[k],
            soft=soft[k],
            found=found[k],
            outlined=soft[k] if classes is None else found[k],
            truth=truth[k],
            members=cut[:, k],
            spread=drawn[:, k].std(axis=0) if kept > 1 else None,
            fusions={name: mask[k] for name, mask in fusions.items()},
            raters=raters[:, k] >= metrics.THRESHOLD,
            spacing=case.spacing,
        )
        for k, case in enumerate(files)
    ]


def _cut(soft: Mask, classes: Classes | None) -> Binary:
    """Binarise soft masks [K, H, W]; of classes that exclude each other the likeliest wins."""
    return metrics.binarise(soft) if classes is None else classes.masks(soft)


def _read_predictions(files: Sequence[CaseFiles], read: Reader) -> tuple[Mask, Mask]:
    """Read the fused mask [K, h, w], or the mean of the members, and the members [E, K, h, w]."""
    first = files[0].sources[0]
    size = read(first, files[0].truth).shape
    masks = [
        [_require_size(read(source, f.truth), source, size, first) for source in f.sources]
        for f in files
    ]
    stacked = np.stack([np.stack(channels) for channels in zip(*masks, strict=False)])
    if files[0].fused is None:
        return stacked.mean(axis=0), stacked
    return stacked[0], stacked[1:]


def _require_size(mask: Mask, source: Source, size: tuple[int, ...], first: Source) -> Mask:
    if mask.shape != size:
        raise UserError(
            source.path,
            f"the mask is {size_of(mask.shape)}, but {first.path.name} is {size_of(size)}",
            "The folder holds files of two runs: sample into an empty folder.",
        )
    return mask


def score_case(masks: CaseMasks, scoring: Scoring) -> Scored:
    """Score one case, or one class of it, at the truth's size and by the parents' arithmetic."""
    truth = metrics.binarise(masks.truth)
    counts = metrics.confusion(masks.found, truth)
    parent_iou, parent_dice = metrics.parent_scores(
        _parent_size(masks.stored), _parent_size(masks.truth)
    )
    scores = dict(_all_masks(masks, truth, scoring))
    fused = scores["fused"]
    single = [score.dice for name, score in scores.items() if name.startswith("member ")]
    between, uncertainty = _agreement(masks)
    distance, best = _rated(masks)
    row = CaseScore(
        name=masks.name,
        dice=fused.dice,
        iou=fused.iou,
        parent_dice=parent_dice,
        parent_iou=parent_iou,
        **counts._asdict(),
        empty_truth=counts.empty_truth,
        empty_prediction=counts.empty_prediction,
        members=len(masks.members),
        dice_member=mean_of(single),
        **{key: value for key, value in fused._asdict().items() if key not in ("dice", "iou")},
        size=(counts.tp + counts.fn) * math.prod(_plane_spacing(masks, scoring) or (1.0,)),
        dice_between=between,
        uncertainty=uncertainty,
        energy_distance=distance,
        dice_best=best,
        member_error=None if between is None else _error(masks.members, truth),
    )
    errors = Tally.of(masks.uncertainty, masks.found != truth, most=0.5)
    several = len(masks.members) > 1
    components = find_components(masks.found, masks.members, truth) if several else []
    return Scored(row, scores, Tally.of(masks.soft, truth), errors, components)


def _all_masks(
    masks: CaseMasks, truth: Binary, scoring: Scoring
) -> Iterator[tuple[str, MaskScore]]:
    """Score the fused mask, every member, and the members under every fusion rule."""
    named = {
        "fused": masks.found,
        **{f"member {index}": member for index, member in enumerate(masks.members)},
        **masks.fusions,
    }
    spacing = _plane_spacing(masks, scoring)
    for name, mask in named.items():
        counts = metrics.confusion(mask, truth)
        distances = surface.surface_distances(mask, truth, spacing=spacing)
        yield name, mask_score(counts, distances, scoring)


def mask_score(
    counts: metrics.Confusion, distances: surface.SurfaceDistances | None, scoring: Scoring
) -> MaskScore:
    """Compute the scores of one mask from its counts and its surface distances.

    Without distances (a mask is empty) the surface Dice is the Dice by the rule for empty masks.
    """
    known = metrics.known_ratios(counts, rule=scoring.empty)
    if distances is None:
        return MaskScore(**known, hd95=None, assd=None, surface_dice=known["dice"])
    return MaskScore(
        **known,
        hd95=surface.hd95(distances),
        assd=surface.average_surface_distance(distances),
        surface_dice=surface.surface_dice(distances, scoring.tolerance),
    )


def _plane_spacing(masks: CaseMasks, scoring: Scoring) -> tuple[float, ...] | None:
    return masks.spacing[:2] if scoring.spacing and masks.spacing else None


def _agreement(masks: CaseMasks) -> tuple[float | None, float]:
    """Compute the Dice between members, and the uncertainty of the case."""
    pairs = len(masks.members) * (len(masks.members) - 1)
    if not pairs:
        return None, expected_disagreement(masks.soft)
    table = dice_table(masks.members, masks.members)
    between = float((table.sum() - np.trace(table)) / pairs)
    return between, 1 - between


def _error(members: Binary, truth: Binary) -> float:
    """Compute the mean 1 - Dice of the members with the truth; two empty masks have a Dice of 1."""
    return float(1 - dice_table(members, truth[None]).mean())


def _rated(masks: CaseMasks) -> tuple[float | None, float | None]:
    """Compute energy distance and best Dice of the members (or the fused mask) and the raters."""
    if not len(masks.raters):
        return None, None
    members = masks.members if len(masks.members) else masks.found[None]
    return energy_distance(members, masks.raters), best_dice(members, masks.raters)


def _parent_size(mask: Mask) -> Mask:
    """Bring a mask to the parents' 256 x 256 as torchvision resizes a uint8 tensor: rounded.

    It is always antialiased, because the last bit decides how a tie is rounded.
    """
    levels = np.round(mask * np.float32(255))
    levels = resize(levels, (metrics.PARENT_SIZE, metrics.PARENT_SIZE), antialias=True)
    return np.round(levels) / np.float32(255)


def _read_truth(
    truth: Truth, name: str, channels: int, *, like: tuple[Truth, tuple[int, int]] | None = None
) -> Mask:
    """Read a truth as float32 [K, H, W]; a UserError unless it is a finite mask in [0, 1].

    That of a rater is brought to the grid of another truth, and must have its size.
    """
    values, size = np.asarray(truth(), dtype=np.float32), like and like[1]
    if like:
        values = on_grid(values, truth, like[0])
    values = values[None] if channels == 1 and values.ndim == 2 else values
    problem = None
    if values.ndim != 3 or values.size == 0 or len(values) != channels:
        problem = f"has the shape {values.shape}, which is not that of a mask"
    elif not np.isfinite(values).all():
        problem = "has NaN or infinite values"
    elif values.min() < 0 or values.max() > 1:
        problem = f"has values from {values.min():g} to {values.max():g}, outside of [0, 1]"
    elif size and values.shape[1:] != size:
        problem = f"the rater's mask is {size_of(values.shape[1:])}, not {size_of(size)}"

    if problem:
        flag = "--raters" if size else "--out_pth"
        raise UserError(f"truth of case {name}", problem, f"Repair this file in {flag}.")
    return values


def mean_of(values: Sequence[float | None]) -> float | None:
    """Compute the mean of the known values; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
