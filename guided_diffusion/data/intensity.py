"""Intensity normalisation: bringing an image, slice or volume to a range the network can use.

The statistics of an image are measured once (:class:`Levels`) and applied to any part of it, so
that a slice is scaled by its whole volume.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guided_diffusion.errors import UserError

Array = npt.NDArray[np.float32]
NORMALISATIONS = ("auto", "none", "minmax", "percentile", "zscore")


class Levels(NamedTuple):
    """The statistics of an image's intensities.

    ``low`` and ``high`` are the extremes and ``p1`` and ``p99`` percentiles of all voxels; ``mean``
    and ``std`` are those of the non-zero voxels, which are the brain in skull-stripped images.
    """

    low: float
    high: float
    p1: float
    p99: float
    mean: float
    std: float


def measure(values: Array) -> Levels:
    """Measure an array of any shape with at least one value."""
    p1, p99 = np.percentile(values, (1, 99))
    brain = values[values != 0].astype(np.float64)
    mean, std = (brain.mean(), brain.std()) if brain.size else (0.0, 0.0)
    return Levels(*map(float, (values.min(), values.max(), p1, p99, mean, std)))


def normalised(values: Array, levels: Levels, how: str) -> Array:
    """Scale values, float32 of any shape, by the statistics of the image they are a part of.

    ``none`` changes nothing; ``minmax`` maps the extremes to 0 and 1; ``percentile`` maps p1 and
    p99 to 0 and 1 and clips; ``zscore`` gives the brain mean 0 and deviation 1 and keeps 0 at 0. An
    image of one value becomes 0. Raises :class:`UserError` for an unknown ``how``.
    """
    if how == "none":
        return values
    if how == "zscore":
        scaled = _ratio(values - np.float32(levels.mean), levels.std)
        return np.where(values == 0, np.float32(0), scaled)
    if how == "minmax":
        return _ratio(values - np.float32(levels.low), levels.high - levels.low)
    if how == "percentile":
        scaled = _ratio(values - np.float32(levels.p1), levels.p99 - levels.p1)
        return np.clip(scaled, np.float32(0), np.float32(1))
    raise UserError(
        "--normalise",
        f"{how!r} is not one of {', '.join(NORMALISATIONS)}",
        "Omit it for the default of the layout.",
    )


def _ratio(difference: Array, span: float) -> Array:
    if span <= 0:
        return np.zeros_like(difference)
    return difference / np.float32(span)
