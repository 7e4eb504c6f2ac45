"""Planes in space, and the regular grid that they are stacked to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guided_diffusion.data.folders import counted
from guided_diffusion.data.geometry import TOLERANCE, Affine
from guided_diffusion.errors import UserError

SKEWED, DIFFERENT = 2e-3, 1e-4
"""From which deviation on directions make no right angle, and planes no common grid."""
Vector = tuple[float, ...]


class Plane(NamedTuple):
    """One plane of a series: where its pixels are, where they lie, and what their values mean.

    ``position`` is that of the first pixel, and ``orientation`` holds the directions in which
    columns and rows are counted, in millimetres along LPS axes. ``spacing`` is that of rows and of
    columns. ``low`` and ``high`` are the ends of the range of stored values.
    """

    path: Path
    frame: int
    position: Vector
    orientation: Vector
    spacing: Vector
    size: tuple[int, int]
    slope: float
    intercept: float
    inverted: bool
    low: int
    high: int

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value after scaling."""
        first, second = (self.slope * end + self.intercept for end in (self.low, self.high))
        return min(first, second), max(first, second)


class Stack(NamedTuple):
    """The planes of a volume in the order of their positions, and its affine in RAS axes."""

    planes: list[Plane]
    affine: Affine


def stack(folder: Path, planes: Sequence[Plane]) -> Stack:
    """Put planes in the order of their positions along their normal; they must be a regular grid.

    Raises:
        UserError: they differ in size, spacing or orientation, are tilted against their normal, or
            lie at uneven distances; ``folder`` names the series in the message.
    """
    first = planes[0]
    for plane in planes:
        _require_alike(plane, first)
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    planes = sorted(planes, key=lambda plane: float(np.dot(plane.position, normal)))
    places = np.array([plane.position for plane in planes])
    heights = places @ normal
    _require_even(folder, planes, heights)
    aside = places - places[0] - np.outer(heights - heights[0], normal)
    _require_straight(folder, aside, heights, min(first.spacing))

    step = (heights[-1] - heights[0]) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = normal * step, places[0]
    affine[:2] *= -1
    return Stack(planes, affine)


def require_right_angle(orientation: Vector) -> None:
    """Raise a ValueError for directions of rows and columns that are not at right angles."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    for product, expected in ((row @ row, 1), (column @ column, 1), (row @ column, 0)):
        if abs(product - expected) > SKEWED:
            raise ValueError(f"ImageOrientationPatient {list(orientation)} has no right angle")


def _require_alike(plane: Plane, first: Plane) -> None:
    """Refuse a plane that is not of the size, spacing and orientation of the first."""
    hint = "Move the files of each volume, and localizers, into separate folders."
    for what, own, other, most in (
        ("size", plane.size, first.size, 0.0),
        ("spacing", plane.spacing, first.spacing, DIFFERENT * min(first.spacing)),
        ("orientation", plane.orientation, first.orientation, DIFFERENT),
    ):
        if any(abs(a - b) > most for a, b in zip(own, other, strict=True)):
            problem = f"its {what} is {_text(own)}, but that of {first.path.name} is {_text(other)}"
            raise UserError(plane.path, f"{problem}, in the same series", hint)


def _require_even(folder: Path, planes: Sequence[Plane], heights: npt.NDArray[Any]) -> None:
    """Refuse planes that occur twice, lack others between them, or have uneven distances."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    at, same = int(np.argmin(gaps)), gaps <= max(1e-4, TOLERANCE * usual)
    if same.any():
        raise UserError(
            folder,
            f"{planes[at].path.name} and {planes[at + 1].path.name} lie at the same place, "
            f"{heights[at]:.6g} mm along the normal ({counted(int(same.sum()), 'such pair')} in "
            f"{len(planes)} planes)",
            "Remove copies, and put time points, echoes and reconstructions into separate folders.",
        )
    even = np.linspace(heights[0], heights[-1], len(heights))
    step = (heights[-1] - heights[0]) / len(gaps)
    if np.abs(heights - even).max() > TOLERANCE * step:
        at = int(np.argmax(np.abs(gaps - usual)))
        missing = round(float((gaps / usual - 1)[gaps > 1.5 * usual].round().sum()))
        raise UserError(
            folder,
            f"its planes are unevenly spaced: {planes[at].path.name} and "
            f"{planes[at + 1].path.name} are {gaps[at]:.6g} mm apart, most others {usual:.6g} mm"
            + (f"; {missing} of {len(planes) + missing} planes may be missing" if missing else ""),
            "Restore the missing files, or resample the series to even spacing as NIfTI.",
        )


def _require_straight(
    folder: Path, aside: npt.NDArray[Any], heights: npt.NDArray[Any], pixel: float
) -> None:
    """Refuse planes that are not stacked along their normal, as with a tilted gantry."""
    shift = float(np.linalg.norm(aside, axis=1).max())
    if shift <= TOLERANCE * pixel:
        return
    line = np.outer((heights - heights[0]) / (heights[-1] - heights[0]), aside[-1])
    tilted = float(np.linalg.norm(aside - line, axis=1).max()) <= TOLERANCE * pixel
    angle = math.degrees(math.atan2(np.linalg.norm(aside[-1]), heights[-1] - heights[0]))
    raise UserError(
        folder,
        f"the gantry was tilted by {angle:.3g} degrees: planes are shifted by up to {shift:.4g} mm "
        "against their normal"
        if tilted
        else f"planes are shifted by up to {shift:.4g} mm against each other",
        "Resample the series to a grid with right angles as NIfTI, as dcm2niix does."
        if tilted
        else "Put the files of each volume into a separate folder.",
    )


def _text(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.5g}" for number in numbers)
