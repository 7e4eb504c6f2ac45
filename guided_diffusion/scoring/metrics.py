"""Overlap metrics of a mask against its truth, from the four confusion counts; NumPy alone.

The confusion counts with the ratios computed from them, the rules for empty masks, and the
arithmetic of MedSegDiff's evaluation script, so that published numbers can be compared.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5
PARENT_SIZE = 256
PARENT_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
EMPTY_RULE = (
    "prediction and truth both empty: a perfect match (1.0), counted apart; "
    "only one of them empty: 0.0"
)
EMPTY_RULES = {
    "match": EMPTY_RULE,
    "skip": "cases without a lesion are left out of every mean, whatever was predicted",
    "zero": "prediction and truth both empty: 0.0, as is only one of them empty",
    "parents": "MedSegDiff's smoothing, (2 tp + 1e-4) / (2 tp + fp + fn + 1e-4) and likewise IoU "
    "with 1e-6: both empty 1.0, only one of them empty nearly 0",
}


class Confusion(NamedTuple):
    """Numbers of pixels: true positives, false positives, false negatives, true negatives."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def empty_truth(self) -> bool:
        """Whether the truth has no foreground pixel."""
        return self.tp + self.fn == 0

    @property
    def empty_prediction(self) -> bool:
        """Whether the prediction has no foreground pixel."""
        return self.tp + self.fp == 0


def binarise(values: ArrayLike, threshold: float = THRESHOLD) -> NDArray[np.bool_]:
    """Threshold values in [0, 1] of any shape: foreground is where ``values >= threshold``.

    With "greater or equal" a soft mask and its 8-bit file always agree at 0.5, which is rounded to
    level 128.
    """
    return np.asarray(values) >= threshold


def confusion(prediction: ArrayLike, truth: ArrayLike) -> Confusion:
    """Count the pixels of two binary masks (bool or {0, 1}) of one shape, whatever that shape is.

    Raises ValueError when the shapes differ.
    """
    predicted, true = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    _same_shape(predicted, true)

    tp = int(np.count_nonzero(predicted & true))
    fp = int(np.count_nonzero(predicted)) - tp
    fn = int(np.count_nonzero(true)) - tp
    return Confusion(tp, fp, fn, true.size - tp - fp - fn)


def dice(counts: Confusion, *, empty: float = 1.0) -> float:
    """Compute 2 tp / (2 tp + fp + fn), Dice (1945); ``empty`` where both masks are empty."""
    tp, fp, fn, _ = counts
    return _ratio(2 * tp, 2 * tp + fp + fn, empty)


def iou(counts: Confusion, *, empty: float = 1.0) -> float:
    """Compute tp / (tp + fp + fn), Jaccard (1912); ``empty`` where both masks are empty."""
    tp, fp, fn, _ = counts
    return _ratio(tp, tp + fp + fn, empty)


def sensitivity(counts: Confusion, *, empty: float = 1.0) -> float:
    """Compute the fraction of the truth that is found, tp / (tp + fn).

    NaN (undefined) where the truth alone is empty, ``empty`` where both masks are.
    """
    return _ratio(counts.tp, counts.tp + counts.fn, _undefined(counts, empty))


def precision(counts: Confusion, *, empty: float = 1.0) -> float:
    """Compute the fraction of the prediction that is true, tp / (tp + fp).

    NaN (undefined) where the prediction alone is empty, ``empty`` where both masks are.
    """
    return _ratio(counts.tp, counts.tp + counts.fp, _undefined(counts, empty))


def specificity(counts: Confusion) -> float:
    """Compute tn / (tn + fp), in [0, 1]; NaN where the truth fills the image."""
    return _ratio(counts.tn, counts.tn + counts.fp, float("nan"))


def volume_difference(counts: Confusion) -> float:
    """Compute the relative difference in size, (fp - fn) / (tp + fn), in [-1, inf).

    NaN where the truth is empty.
    """
    return _ratio(counts.fp - counts.fn, counts.tp + counts.fn, float("nan"))


class Ratios(NamedTuple):
    """All scores from the four counts; NaN where one is undefined or left out."""

    dice: float
    iou: float
    precision: float
    sensitivity: float
    specificity: float
    volume_difference: float


def ratios(counts: Confusion, *, rule: str = "match") -> Ratios:
    """Compute every ratio; ``rule``, one of :data:`EMPTY_RULES`, is that for empty masks."""
    if rule == "skip" and counts.empty_truth:
        return Ratios(*[float("nan")] * len(Ratios._fields))

    empty = 0.0 if rule == "zero" else 1.0
    smooth = rule == "parents"
    return Ratios(
        dice=_smooth_dice(counts) if smooth else dice(counts, empty=empty),
        iou=_smooth_iou(counts) if smooth else iou(counts, empty=empty),
        precision=precision(counts, empty=empty),
        sensitivity=sensitivity(counts, empty=empty),
        specificity=specificity(counts),
        volume_difference=volume_difference(counts),
    )


def none_for_nan(value: float) -> float | None:
    """Return None for NaN, as JSON and CSV need it, and any other value unchanged."""
    return None if math.isnan(value) else value


def known_ratios(counts: Confusion, *, rule: str = "match") -> dict[str, Any]:
    """Compute :func:`ratios` by name; None where one is undefined or left out."""
    return {key: none_for_nan(value) for key, value in ratios(counts, rule=rule)._asdict().items()}


def parent_scores(prediction: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """Compute MedSegDiff's ``(iou, dice)`` of one image, as in its ``segmentation_env.py``.

    The prediction [H, W], of any positive scale, is divided by its maximum; the truth [H, W] is in
    [0, 1]. Both are binarised at five thresholds, and the scores, smoothed by 1e-6 (IoU) and 1e-4
    (Dice), are averaged over these. The parents do this at 256 x 256 (``PARENT_SIZE``), to which
    the caller resizes both. Raises ValueError when the shapes differ.
    """
    soft, true = np.asarray(prediction, dtype=np.float32), np.asarray(truth, dtype=np.float32)
    peak = soft.max(initial=0.0)
    soft = soft / peak if peak > 0 else np.zeros_like(soft)
    pairs = [_parent_pair(soft, true, np.float32(tau)) for tau in PARENT_THRESHOLDS]
    mean_iou, mean_dice = np.mean(pairs, axis=0)
    return float(mean_iou), float(mean_dice)


def _parent_pair(
    soft: NDArray[np.float32], true: NDArray[np.float32], tau: np.float32
) -> tuple[float, float]:
    """Compute both scores at one threshold, which also binarises the truth."""
    counts = confusion(soft > tau, true > tau)
    return _smooth_iou(counts), _smooth_dice(counts)


def _smooth_iou(counts: Confusion) -> float:
    tp, fp, fn, _ = counts
    return (tp + 1e-6) / (tp + fp + fn + 1e-6)


def _smooth_dice(counts: Confusion) -> float:
    tp, fp, fn, _ = counts
    return (2 * tp + 1e-4) / (2 * tp + fp + fn + 1e-4)


def _ratio(numerator: int, denominator: int, undefined: float) -> float:
    return numerator / denominator if denominator else undefined


def _undefined(counts: Confusion, empty: float) -> float:
    """The value of 0 / 0: ``empty`` if both masks are empty, else NaN."""
    return empty if counts.empty_truth and counts.empty_prediction else float("nan")


def _same_shape(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}")
