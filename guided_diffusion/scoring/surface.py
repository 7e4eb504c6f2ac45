"""Distances between the surfaces of two masks, in pixels or, with a spacing, in millimetres.

The surface of a mask is its pixels (voxels) with a face neighbour that is background; outside of
the picture is background. Every pixel of either surface has its Euclidean distance to the nearest
one of the other, found by a k-d tree over the surfaces: exact, and independent of the size of the
picture. MONAI and medpy define surface and distance alike; where they differ, the docstring says
which one is followed. NumPy and SciPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import KDTree

Distances = NDArray[np.float64]


SLACK = 1e-6
"""By how much a distance may exceed a tolerance, relatively: more than float32 rounds it."""


class SurfaceDistances(NamedTuple):
    """Distances of each surface's pixels to the other surface, float64 [N], in units of spacing.

    ``to_truth`` has one entry per surface pixel of the prediction, ``to_prediction`` one per
    surface pixel of the truth.
    """

    to_truth: Distances
    to_prediction: Distances

    @property
    def pooled(self) -> Distances:
        """Both directions together."""
        return np.concatenate(self)


def surface_distances(
    prediction: ArrayLike, truth: ArrayLike, *, spacing: Sequence[float] | None = None
) -> SurfaceDistances | None:
    """Compute the distances between the surfaces of two binary masks of one shape, 2-D or 3-D.

    ``spacing`` is the size of a pixel along each axis; None counts pixels. Returns None where a
    mask is empty, for which no distance is defined. Raises ValueError when the shapes differ, or
    the spacing does not fit them.
    """
    predicted, true = np.asarray(prediction, dtype=bool), np.asarray(truth, dtype=bool)
    if predicted.shape != true.shape:
        raise ValueError(f"prediction is {predicted.shape}, truth is {true.shape}")
    scale = np.ones(true.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    if scale.shape != (true.ndim,) or not (scale > 0).all():
        raise ValueError(f"spacing is {spacing}, for masks of {true.ndim} axes")

    ours, theirs = surface(predicted) * scale, surface(true) * scale
    if not len(ours) or not len(theirs):
        return None
    return SurfaceDistances(KDTree(theirs).query(ours)[0], KDTree(ours).query(theirs)[0])


def surface(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Find the positions [N, axes] of a mask's surface pixels."""
    box = _box(mask)
    if box is None:
        return np.zeros((0, mask.ndim), dtype=np.intp)

    padded = np.pad(mask[box], 1)
    middle = tuple(slice(1, -1) for _ in box)
    inner = padded[middle].copy()
    for axis in range(mask.ndim):
        for side in (slice(None, -2), slice(2, None)):
            neighbours = (*middle[:axis], side, *middle[axis + 1 :])
            inner &= padded[neighbours]
    found = np.argwhere(padded[middle] & ~inner)
    return found + np.array([part.start for part in box])


def hd95(distances: SurfaceDistances) -> float:
    """Compute the larger of the two directed 95th percentiles (linear between ranks), as in MONAI.

    medpy takes the percentile of ``distances.pooled`` instead.
    """
    return float(max(np.percentile(directed, 95) for directed in distances))


def average_surface_distance(distances: SurfaceDistances) -> float:
    """Compute the mean over the pixels of both surfaces (ASSD), as in MONAI and medpy."""
    return float(distances.pooled.mean())


def surface_dice(distances: SurfaceDistances, tolerance: float) -> float:
    """Compute the fraction of both surfaces' pixels within ``tolerance`` of the other, in [0, 1].

    Nikolov et al. (2018), eq. 2, with every surface pixel weighing the same, as in MONAI. Distances
    in spacings that headers store in float32 count as equal to the tolerance up to rounding.
    """
    return float((distances.pooled <= tolerance * (1 + SLACK)).mean())


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box around the foreground; None where there is none."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hit = np.flatnonzero(mask.any(axis=others))
        if not len(hit):
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
