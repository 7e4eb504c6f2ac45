"""Calibration of probabilities, and how well an uncertainty predicts errors.

Pixels are counted by their 8-bit level (:class:`Tally`), so that a data set of any size is one
small table. From it come the reliability curve, the expected calibration error (Naeini et al.,
2015), the negative log-likelihood, the Brier score and the sparsification curve (Ilg et al., 2018).
Whole cases give the area under the ROC curve and the rank correlation of uncertainty and error;
several members the ratio of their spread and their error, and with several raters the generalised
energy distance (Kohl et al., 2018) and the best member's Dice. All functions are pure.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Counts = NDArray[np.int64]
Masks = NDArray[np.bool_]
LEVELS = 256
BINS = 15


class Tally(NamedTuple):
    """Numbers of pixels by 8-bit level, int64 [256, 2]: all of them, and the hits among them.

    For a fused probability (0 to 1) a hit is a foreground pixel of the truth; for an uncertainty
    (standard deviation, 0 to 0.5) it is an error of the mask. Tallies of cases add up.
    """

    counts: Counts

    @classmethod
    def of(cls, values: ArrayLike, hits: ArrayLike, *, most: float = 1.0) -> Tally:
        """Count values [...] in [0, ``most``] by level, with their hits, bool [...]."""
        scaled = np.asarray(values, dtype=np.float32).ravel() * np.float32((LEVELS - 1) / most)
        levels = np.clip(scaled + np.float32(0.5), 0, LEVELS - 1).astype(np.intp)
        marked = np.asarray(hits, dtype=bool).ravel()
        counts = [np.bincount(chosen, minlength=LEVELS) for chosen in (levels, levels[marked])]
        return cls(np.stack(counts, axis=1).astype(np.int64))

    @classmethod
    def empty(cls) -> Tally:
        """The tally of no pixel."""
        return cls(np.zeros((LEVELS, 2), dtype=np.int64))

    def plus(self, other: Tally) -> Tally:
        """Add the pixels of another tally."""
        return Tally(self.counts + other.counts)


class Bin(NamedTuple):
    """One bin of a reliability curve: its pixels, their mean probability and fraction of hits."""

    pixels: int
    probability: float
    frequency: float


def reliability(tally: Tally, bins: int = BINS) -> list[Bin]:
    """Compute the reliability curve of a probability: the non-empty ones of equal bins of [0, 1].

    A level on a border belongs to the bin above.
    """
    levels = np.arange(LEVELS)
    of_level = np.minimum(levels * bins // (LEVELS - 1), bins - 1)
    curve = []
    for index in range(bins):
        pixels, hits = tally.counts[of_level == index].T
        total = int(pixels.sum())
        if total:
            probability = float(pixels @ levels[of_level == index]) / total / (LEVELS - 1)
            curve.append(Bin(total, probability, int(hits.sum()) / total))
    return curve


def calibration_error(tally: Tally, bins: int = BINS) -> float:
    """Compute the expected calibration error, Naeini et al. (2015), eq. 3: in [0, 1].

    The mean over pixels of the distance between a bin's mean probability and its fraction of hits;
    NaN without any pixel.
    """
    curve = reliability(tally, bins)
    total = sum(bin.pixels for bin in curve)
    gaps = sum(bin.pixels * abs(bin.probability - bin.frequency) for bin in curve)
    return gaps / total if total else float("nan")


def negative_log_likelihood(tally: Tally) -> float:
    """Compute the mean of -ln p over pixels, p being the probability of the true class; in nats.

    A file's levels of 0 and 255 stand for all that is rounded to them, so p is kept half a level,
    0.5 / 255, away from 0 and 1; it is in [0.00196, 6.235]. NaN without any pixel.
    """
    edge = 0.5 / (LEVELS - 1)
    p = np.clip(np.arange(LEVELS) / (LEVELS - 1), edge, 1 - edge)
    return _mean_by_level(tally, -np.log(p), -np.log(1 - p))


def brier_score(tally: Tally) -> float:
    """Compute the mean squared error of a probability, Brier (1950), for one class: in [0, 1].

    NaN without any pixel.
    """
    p = np.arange(LEVELS) / (LEVELS - 1)
    return _mean_by_level(tally, (1 - p) ** 2, p**2)


def _mean_by_level(tally: Tally, of_hits: ArrayLike, of_others: ArrayLike) -> float:
    """Average a score over pixels: its value [256] for a hit of each level, and for another."""
    pixels, hits = tally.counts.T
    total = int(pixels.sum())
    return float(hits @ of_hits + (pixels - hits) @ of_others) / total if total else float("nan")


class Sparsification(NamedTuple):
    """The error that remains when the most uncertain pixels are removed, Ilg et al. (2018).

    ``removed`` [N] rises from 0 to below 1; ``error`` [N] is the fraction of errors among the
    remaining pixels, ``oracle`` [N] the same if the errors themselves were removed first. ``area``
    is the mean distance of the two over the fraction removed (AUSE), relative to the error with
    nothing removed: 0 is perfect, random removal gives 1 less the oracle's own area.
    """

    removed: list[float]
    error: list[float]
    oracle: list[float]
    area: float


def sparsification(tally: Tally) -> Sparsification:
    """Compute the sparsification curve of an uncertainty; empty, with a NaN area, without errors.

    Within one level the curve is that of removing the pixels at random.
    """
    pixels, errors = tally.counts[::-1].T.astype(np.float64)
    total, wrong = pixels.sum(), errors.sum()
    if not wrong:
        return Sparsification([], [], [], float("nan"))

    pixel_share = np.concatenate([[0], np.cumsum(pixels)]) / total
    error_share = np.concatenate([[0], np.cumsum(errors)]) / total
    removed = np.linspace(0, 1, 101)[:-1]
    error = (wrong / total - np.interp(removed, pixel_share, error_share)) / (1 - removed)
    oracle = np.clip(wrong / total - removed, 0, None) / (1 - removed)
    area = float((error - oracle).mean() / (wrong / total))
    return Sparsification(removed.tolist(), error.tolist(), oracle.tolist(), area)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Compute the area under the ROC curve: how often a positive scores higher; ties count half.

    Mann and Whitney (1947). ``scores`` [N], ``positive`` bool [N]. NaN without positives or without
    negatives.
    """
    values, marked = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    ours, others = int(marked.sum()), int((~marked).sum())
    if not ours or not others:
        return float("nan")
    above = rankdata(values)[marked].sum() - ours * (ours + 1) / 2
    return float(above / (ours * others))


def average_precision(scores: ArrayLike, positive: ArrayLike) -> float:
    """The area under precision against recall: sum of precision times the rise of recall.

    Args:
        scores: any numbers, of any shape; equal ones are passed together.
        positive: bool, of the same shape.

    Returns:
        0 to 1; NaN without a positive.
    """
    values, marked = np.ravel(scores), np.ravel(positive).astype(bool)
    order = np.argsort(-values, kind="stable")
    last_of_ties = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    found = np.cumsum(marked[order])[last_of_ties]
    if not marked.any():
        return float("nan")
    rises = np.diff(found, prepend=0)
    return float((rises * found / (last_of_ties + 1)).sum() / found[-1])


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Compute Spearman's rank correlation of two lists [N]; ties share their mean rank.

    NaN where one of the lists does not vary, or they are empty.
    """
    one, two = (rankdata(np.asarray(x, dtype=np.float64)) for x in (first, second))
    middle = (len(one) + 1) / 2  # the mean of any ranks
    one, two = one - middle, two - middle
    spread = np.sqrt((one @ one) * (two @ two))
    return float((one @ two) / spread) if spread else float("nan")


def expected_disagreement(probability: ArrayLike) -> float:
    """Estimate 1 - Dice of two masks drawn from a soft mask [...], as a ratio of expectations.

    In [0, 1]: sum p (1 - p) / sum p; 0 for an empty mask. It replaces the disagreement of the
    members where only the fused mask is kept.
    """
    p = np.asarray(probability, dtype=np.float64)
    total = p.sum()
    return float((p * (1 - p)).sum() / total) if total else 0.0


def spread_skill(spread: ArrayLike, error: ArrayLike) -> float:
    """Divide the members' mean distance from each other by that from the truth; 1 is calibrated.

    ``spread`` [N] is each case's mean 1 - Dice over all pairs of its members, ``error`` [N] the
    mean 1 - Dice of its members with the truth, both with a Dice of 1 for two empty masks. The
    ratio is that of the means over the cases. Where members and truth are drawn from the same
    distribution, both means are the same; below 1 the members are too alike. NaN without a case,
    or without an error.
    """
    wide, wrong = (np.asarray(x, dtype=np.float64).sum() for x in (spread, error))
    return float(wide / wrong) if wrong else float("nan")


def dice_table(first: Masks, second: Masks) -> NDArray[np.float64]:
    """Compute the Dice of every mask [N, ...] with each of [M, ...], float64 [N, M].

    It is 1 for two empty masks.
    """
    one, two = (masks.reshape(len(masks), -1).astype(np.float64) for masks in (first, second))
    common = one @ two.T
    both = one.sum(axis=1)[:, None] + two.sum(axis=1)[None]
    return np.where(both > 0, 2 * common / np.maximum(both, 1), 1.0)


def energy_distance(members: Masks, raters: Masks) -> float:
    """Compute the generalised energy distance of members [E, ...] and raters [R, ...], bool.

    Kohl et al. (2018), eq. 8, squared as they report it, with d = 1 - IoU: 2 E d(S, Y) -
    E d(S, S') - E d(Y, Y'), the expectations over all pairs, those of a mask with itself included.
    In [0, 2]; 0 where members and raters are the same masks in the same proportions.
    """
    across, ours, theirs = (
        1 - dice / (2 - dice)  # IoU from Dice
        for dice in (
            dice_table(members, raters),
            dice_table(members, members),
            dice_table(raters, raters),
        )
    )
    return float(2 * across.mean() - ours.mean() - theirs.mean())


def best_dice(members: Masks, raters: Masks) -> float:
    """Compute the mean over raters [R, ...] of the Dice of each one's best member [E, ...].

    Rahman et al. (2023) call it maximum Dice matching.
    """
    return float(dice_table(members, raters).max(axis=0).mean())
