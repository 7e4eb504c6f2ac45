"""Statistics of scores: mean, spread and confidence interval of one list, comparison of two.

Means come with the bias-corrected and accelerated (BCa) bootstrap interval of Efron (1987), which
follows the skew of scores that accumulate below 1. Where scores belong to groups (slices to
patients), whole groups are drawn, for slices of one patient are not independent. The same scores
give the same interval: the generator's seed is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import wilcoxon

Floats = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 5000
SEED = 0
_MOST_AT_ONCE = 2**21  # drawn indices in memory


class Interval(NamedTuple):
    """The two ends of a confidence interval; NaN for fewer than two groups."""

    low: float
    high: float


class Description(NamedTuple):
    """Mean, median, standard deviation (n - 1) and the mean's interval of ``number`` scores.

    All but ``number`` are NaN without a score, ``sd`` and the interval with a single one.
    """

    number: int
    mean: float
    median: float
    sd: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean difference, second minus first, of two lists of scores of the same cases.

    ``units`` is the number of cases, or of groups; ``higher`` and ``lower`` count those whose mean
    difference is above and below 0. ``p_value`` is that of the two-sided signed-rank test of
    Wilcoxon (1945) on the units' mean differences, 1 where no unit differs.
    """

    units: int
    difference: float
    low: float
    high: float
    p_value: float
    higher: int
    lower: int


def describe(scores: ArrayLike, groups: Sequence[object] | None = None) -> Description:
    """Describe scores [N]; those that are not finite are left out.

    ``groups`` holds the group of each score; None: every score is independent.
    """
    values, groups = _finite(np.asarray(scores, dtype=np.float64), groups)
    if not len(values):
        return Description(0, *[float("nan")] * 5)
    return Description(
        number=len(values),
        mean=float(values.mean()),
        median=float(np.median(values)),
        sd=float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        **mean_interval(values, groups)._asdict(),
    )


def mean_interval(
    scores: ArrayLike,
    groups: Sequence[object] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """Compute the BCa interval of the mean of finite scores [N], Efron (1987), eqs. 2.3 and 6.6.

    The mean over all scores is recomputed on groups drawn with replacement; a drawn group
    contributes all of its scores. NaN for fewer than two groups; both ends are the mean where
    nothing varies.
    """
    sums, counts = _by_group(np.asarray(scores, dtype=np.float64), groups)
    if len(sums) < 2:
        return Interval(float("nan"), float("nan"))
    mean = sums.sum() / counts.sum()
    drawn = _resampled(sums, counts, resamples)
    if np.ptp(drawn) < 1e-12:
        return Interval(float(mean), float(mean))

    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    skew = left_out.mean() - left_out
    acceleration = (skew**3).sum() / (6 * ((skew**2).sum() ** 1.5))
    below = ((drawn < mean).sum() + 0.5 * (drawn == mean).sum()) / resamples
    bias = ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    tails = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(drawn, ndtr(bias + tails / (1 - acceleration * tails)))
    return Interval(float(low), float(high))


def compare(first: ArrayLike, second: ArrayLike, groups: Sequence[object] | None = None) -> Paired:
    """Compare two lists of scores [N] of the same cases; pairs with a NaN are left out.

    With ``groups`` the units of the test are the groups' mean differences.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    difference, groups = _finite(difference, groups)
    if not len(difference):
        nan = float("nan")
        return Paired(0, nan, nan, nan, nan, higher=0, lower=0)

    sums, counts = _by_group(difference, groups)
    units = sums / counts
    changed = units[units != 0]
    return Paired(
        units=len(units),
        difference=float(difference.mean()),
        **mean_interval(difference, groups)._asdict(),
        p_value=float(wilcoxon(changed).pvalue) if len(changed) else 1.0,
        higher=int((units > 0).sum()),
        lower=int((units < 0).sum()),
    )


def _finite(
    values: Floats, groups: Sequence[object] | None
) -> tuple[Floats, Sequence[object] | None]:
    """Leave out the values that are not finite, and their groups."""
    kept = np.isfinite(values)
    if groups is not None:
        groups = [group for group, keep in zip(groups, kept, strict=True) if keep]
    return values[kept], groups


def _by_group(values: Floats, groups: Sequence[object] | None) -> tuple[Floats, Floats]:
    """Compute sum and number of the scores of each group."""
    if groups is None:
        return values, np.ones_like(values)
    places: dict[object, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups], dtype=np.intp)
    return np.bincount(index, values).astype(np.float64), np.bincount(index).astype(np.float64)


def _resampled(sums: Floats, counts: Floats, resamples: int) -> Floats:
    """Compute the mean of each draw of groups; drawn in pieces, so that memory is bounded."""
    generator, groups = np.random.default_rng(SEED), len(sums)
    piece = max(1, _MOST_AT_ONCE // groups)
    means = []
    for start in range(0, resamples, piece):
        drawn = generator.integers(groups, size=(min(piece, resamples - start), groups))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)
