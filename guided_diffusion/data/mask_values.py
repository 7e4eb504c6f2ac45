"""The distinct values of masks, and whether they are those of labels or of soft masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.data.readers import Stored

MOST_LABEL = 64
"""Whole numbers up to this are labels, however close they are."""
APART = 1 / 20
EDGE = 1 / 10
MOST_VALUES = 4096
SHOWN = 8


class Values(NamedTuple):
    """The distinct values of a mask, ascending, how many pixels have each, and whether all are
    whole numbers; of more than 4096 distinct ones a histogram."""

    levels: Any
    counts: Any
    whole: bool

    def __str__(self) -> str:
        if len(self.levels) <= SHOWN:
            return ", ".join(f"{level:g}" for level in self.levels)
        more = "over " if len(self.levels) >= MOST_VALUES else ""
        return f"{self.levels[0]:g} to {self.levels[-1]:g}, {more}{len(self.levels)} values"


def distinct(stored: Stored) -> Values:
    """Count the values of an array of any shape; whole numbers may be off by a thousandth."""
    flat = stored.ravel()
    if flat.dtype.kind == "f":
        rounded = np.rint(flat)
        if np.abs(flat - rounded).max() >= 1e-3:
            return _of_fractions(flat)
        flat = rounded
    small = flat.dtype in (np.uint8, np.uint16, np.bool_)
    if not small and (flat.min() < 0 or flat.max() > 65535):
        levels, counts = np.unique(flat, return_counts=True)
        return _values(levels, counts, whole=True)
    counts = np.bincount(flat.astype(np.intp))
    levels = np.flatnonzero(counts)
    return _values(levels, counts[levels], whole=True)


def _of_fractions(flat: Stored) -> Values:
    levels, counts = np.unique(flat, return_counts=True)
    if len(levels) > MOST_VALUES:
        counts, edges = np.histogram(flat, bins=MOST_VALUES)
        levels = np.concatenate([levels[:1], (edges[1:-2] + edges[2:-1]) / 2, levels[-1:]])
    return _values(levels, counts, whole=False)


def _values(levels: Any, counts: Any, *, whole: bool) -> Values:
    return Values(levels.astype(np.float64), counts.astype(np.float64), whole)


def union(values: Iterable[Values]) -> Values:
    """Count the values of several masks together."""
    parts = list(values)
    levels, places = np.unique(np.concatenate([part.levels for part in parts]), return_inverse=True)
    counts = np.bincount(places, weights=np.concatenate([part.counts for part in parts]))
    return Values(levels, counts, all(part.whole for part in parts))


def is_label_map(values: Values) -> bool:
    """Whether values are labels: whole, none negative, none above 64 or all far apart.

    Far apart is a twentieth of their range.
    """
    levels = values.levels
    if not values.whole or levels[0] < 0:
        return False
    gaps = np.diff(levels)
    return bool(levels[-1] <= MOST_LABEL or gaps.min(initial=np.inf) >= APART * np.ptp(levels))


def soft_range(values: Values) -> tuple[float, float] | None:
    """The values of background and foreground of soft masks; None where there are none.

    That is 0 and 1, or 0 and the white of 8 or 16 bits where the brightest value is near it, or
    else the two extremes, which must be whole numbers.
    """
    low, high = float(values.levels[0]), float(values.levels[-1])
    if low < 0 or low == high:
        return None
    if high <= 1:
        return 0.0, 1.0
    white = next((w for w in (255.0, 65535.0) if (1 - EDGE) * w <= high <= w), None)
    if white is None and high != round(high):
        return None
    white = white or high
    return (low if low > EDGE * white else 0.0), white


def in_the_middle(levels: Any, low: float, high: float) -> Any:
    """Where values are further than a tenth of the range from both extremes, bool."""
    edge = EDGE * (high - low)
    return (levels > low + edge) & (levels < high - edge)


def is_soft(values: Values, ends: tuple[float, float] | None, share: float) -> bool:
    """Whether that share of all pixels lies within a tenth of the range of its two ends.

    More than four pixels in between for each bright one are instances or levels, not borders.
    """
    if ends is None:
        return False
    counts = values.counts
    middle = counts[in_the_middle(values.levels, *ends)].sum()
    bright = counts[values.levels >= ends[1] - EDGE * (ends[1] - ends[0])].sum()
    return bool(middle <= (1 - share) * counts.sum() + 1e-9 and middle <= 4 * bright)


def has_levels(values: Values, ends: tuple[float, float]) -> bool:
    """Whether the values between two ends are many and crowd at one level, as JPEG blurs labels."""
    between = in_the_middle(values.levels, *ends)
    levels, counts = values.levels[between], values.counts[between]
    bright = values.counts[values.levels >= ends[1] - EDGE * (ends[1] - ends[0])].sum()
    if not len(levels) or counts.sum() < bright / 4:
        return False
    bins = np.histogram(levels, bins=round(1 / EDGE), range=ends, weights=counts)[0]
    return bool((bins[:-1] + bins[1:]).max() > 0.4 * counts.sum())


def has_two_ends(levels: Iterable[float], ends: tuple[float, float]) -> bool:
    """Whether every level is the lowest one, or near the bright end."""
    low, high = ends
    return all(level <= low or level >= high - EDGE * (high - low) for level in levels)


def is_crowded(values: Values, ends: tuple[float, float], lossy: bool) -> bool:
    """Whether values are labels next to each other and a far one (0, 1, 255), not soft borders."""
    low, high = ends
    levels, edge = values.levels, EDGE * (high - low)
    none, far = (levels <= low).sum(), (levels >= high - edge).sum()
    near = ((levels > low) & (levels <= low + edge)).sum()
    few = none and near and far == 1 and none + near + far == len(levels)
    return bool(few and values.whole and not lossy)
