"""Intensity scales: bringing one image, slice or volume, to a range the network can use.

What a scale needs to know of an image is measured once (:class:`Levels`) and applied to any part of
it, so that a slice is scaled by its whole volume. Called by ``datasets`` for two-dimensional images
and by ``volumes``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guided_diffusion.errors import UserError

Array = npt.NDArray[np.float32]
NORMALISATIONS = ("auto", "none", "minmax", "percentile", "zscore")


class Levels(NamedTuple):
    """An image's intensities in short.

    ``low`` and ``high`` are the extremes, ``p1`` and ``p99`` percentiles of all voxels, ``mean``
    and ``std`` those of the voxels that are not 0, which in skull-stripped images are the brain.
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
    """Scale values by what was measured of the image they are a part of.

    ``none`` leaves them; ``minmax`` maps the extremes to 0 and 1; ``percentile`` maps p1 and p99 to
    0 and 1 and clips; ``zscore`` gives the brain mean 0 and deviation 1 and keeps 0 at 0. An image
    of one value becomes 0.
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
        found=repr(how),
        expected=f"one of {', '.join(NORMALISATIONS)}",
        hint="Leave it out for the layout's own.",
    )


def _ratio(difference: Array, span: float) -> Array:
    if span <= 0:
        return np.zeros_like(difference)
    ratio: Array = difference / np.float32(span)
    return ratio
