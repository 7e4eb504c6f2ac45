"""Smooth random fields in millimetres, of which the phantoms are made.

A field is drawn on a fixed coarse grid of B-spline knots and sampled on any voxel grid, so the same
random stream gives the same anatomy at every resolution. NumPy alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
Field = NDArray[np.floating[Any]]  # on a Grid: mm, an amount in [0, 1] or an intensity
FIELD_OF_VIEW = (240.0, 240.0, 155.0)  # mm along left-right, front-back, bottom-top


class Grid(NamedTuple):
    """Sampling positions: one float64 coordinate vector in mm per axis, 0 at the centre."""

    axes: tuple[Field, ...]
    steps: tuple[float, ...]  # spacing in mm along each axis


def sample_grid(shape: Sequence[int]) -> Grid:
    """Return voxel centres in mm of a grid of this shape over the field of view."""
    steps = tuple(extent / n for extent, n in zip(FIELD_OF_VIEW, shape, strict=False))
    axes = [(np.arange(n) + 0.5 - n / 2) * step for n, step in zip(shape, steps, strict=True)]
    return Grid(tuple(axes), steps)


def random_stream(seed: int, patient: int, name: str) -> np.random.Generator:
    """Return the random stream of one named component, independent of all other components."""
    return np.random.Generator(np.random.PCG64([seed, patient, zlib.crc32(name.encode())]))


def smooth_field(rng: np.random.Generator, grid: Grid, *, spacing: float) -> Field:
    """Sample a smooth Gaussian field, mean 0 and variance about 1, on the grid.

    The knots lie `spacing` mm apart over the whole field of view whatever the grid, so the same
    stream gives the same field at every resolution. Returns float64 of the grid's shape.
    """
    weights = [
        spline_weights(x, extent, spacing)
        for x, extent in zip(grid.axes, FIELD_OF_VIEW, strict=False)
    ]
    field = rng.standard_normal([w.shape[1] for w in weights])
    for axis, w in enumerate(weights):
        field = np.moveaxis(np.tensordot(w, field, axes=(1, axis)), 0, axis)
    scale = 0.479 ** (len(weights) / 2)  # 151/315 = mean square of one axis' weights
    return field / scale


def spline_weights(x: Array, extent: float, spacing: float) -> Array:
    """Return cubic B-spline weights [len(x), knots] of positions x (mm) on a fixed knot grid."""
    position = (x + extent / 2) / spacing + 1
    first = np.floor(position).astype(int)
    f = position - first
    taps = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, 1 + 3 * (f + f**2 - f**3), f**3)

    weights = np.zeros((len(x), ceil(extent / spacing) + 4))
    for offset, tap in enumerate(taps):
        weights[np.arange(len(x)), first - 1 + offset] = tap / 6
    return weights


def ramp(x: Field, half_width: Field | float) -> Field:
    """Rise smoothly from 0 at -half_width to 1 at +half_width (cubic; exact arithmetic only)."""
    t = np.clip(0.5 + 0.5 * x / half_width, 0, 1)
    return t * t * (3 - 2 * t)


def blobs(
    rng: np.random.Generator,
    grid: Grid,
    *,
    count: int,
    radius: tuple[float, float],
    reach: tuple[float, ...],
) -> Field:
    """Return the union of `count` ellipsoids at random places within +-reach mm, as a distance."""
    union = np.full([len(x) for x in grid.axes], -99.0)
    for _ in range(count):
        centre = [rng.uniform(-r, r) for r in reach]
        radii = rng.uniform(*radius) * rng.uniform(0.75, 1.3, len(reach))
        np.maximum(union, blob(grid, centre, radii), out=union)
    return union


def blob(grid: Grid, centre: ArrayLike, radii: ArrayLike) -> Field:
    """Return the approximate signed distance in mm to an ellipsoid, positive inside."""
    parts = zip(np.ix_(*grid.axes), np.asarray(centre), np.asarray(radii), strict=True)
    rho: Field = np.sqrt(sum(((x - c) / r) ** 2 for x, c, r in parts))
    return (1 - rho) * np.min(radii)
