"""Where the voxels of NIfTI files lie, and how planes are read from them and written back.

A plane lies as those of BraTS do: its axes run to the left, posterior and superior (LPS), in this
order, without the one that is sliced. The header decides by which flips and permutations an array
gets there. Files of one case are brought to the grid of its image in the same way, and must then
coincide with it. A header that states nothing leaves its array as it lies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import (
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from guided_diffusion.data.folders import size_of
from guided_diffusion.errors import UserError

Affine = npt.NDArray[np.float64]
Rows = tuple[tuple[float, ...], ...]
Turn = tuple[tuple[int, int], ...]
"""For each axis of an array, the axis that it becomes, and -1 where it is reversed, else 1."""
PLANES = ("sagittal", "coronal", "axial")
"""The names of the planes, at the position of the axis of LPS that each of them slices."""
TOLERANCE = 0.1
"""How far the corners of two grids may lie apart, in voxels."""
FAR = 1e12
_IDENTITY: Rows = tuple(tuple(float(i == j) for j in range(4)) for i in range(4))
_STAY: Turn = ((0, 1), (1, 1), (2, 1))
_MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}  # of the codes of NIfTI for metre, mm and micrometre


@dataclass(frozen=True)
class Grid:
    """The voxels of a NIfTI file in space, as its header describes them.

    Attributes:
        shape: the length of every axis: three, one of them 1 in a slice; other files have fewer or
            more.
        affine: the rows of the matrix [4, 4] from indices to positions in the header's unit, of
            axes that run to the right, anterior and superior.
        stated: whether the header states it. An identity matrix without an origin states nothing,
            and neither do codes of 0, for which readers invent a matrix.
        sizes: of a voxel along each axis, as pixdim states them, in the header's unit.
        unit: of length, in millimetres; None where it is not stated.
    """

    shape: tuple[int, ...]
    affine: Rows
    stated: bool
    sizes: tuple[float, ...]
    unit: float | None

    @property
    def slicing(self) -> int | None:
        """The axis of length 1 of a slice, the last one; None for anything else."""
        if len(self.shape) != 3 or 1 not in self.shape:
            return None
        return 2 - self.shape[::-1].index(1)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The shape, without the axis of length 1 of a slice."""
        axis = self.slicing
        return self.shape if axis is None else self.shape[:axis] + self.shape[axis + 1 :]

    @property
    def matrix(self) -> Affine:
        """The affine, float64 [4, 4]."""
        return np.array(self.affine)

    def __str__(self) -> str:
        rows = "; ".join(" ".join(f"{value:.5g}" for value in row) for row in self.affine[:3])
        return f"[{rows}]"


class View(NamedTuple):
    """How planes [H, W] are read from an array of three axes.

    Attributes:
        axis: the one that is sliced.
        depth: its length.
        reverse: whether planes are counted from its end.
        transposed: whether H is the later of the two other axes.
        flips: whether H and W run against the array's axes.
    """

    axis: int
    depth: int
    reverse: bool
    transposed: bool
    flips: tuple[bool, bool]

    @property
    def is_plain(self) -> bool:
        """Whether planes lie as they are stored."""
        return not self.transposed and not any(self.flips)

    def position(self, plane: int) -> int:
        """The position of a plane along the axis."""
        return self.depth - 1 - plane if self.reverse else plane

    def turn(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn stored planes [..., h, w] to [..., H, W]."""
        planes = stored.swapaxes(-1, -2) if self.transposed else stored
        return self._flipped(planes)

    def turn_back(self, planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Turn planes [..., H, W] to [..., h, w], as they are stored."""
        stored = self._flipped(planes)
        return stored.swapaxes(-1, -2) if self.transposed else stored

    def _flipped(self, planes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        steps = [slice(None, None, -1 if flip else None) for flip in self.flips]
        return planes[(..., *steps)] if any(self.flips) else planes


@dataclass(frozen=True)
class Placed:
    """Where the planes of a case lie.

    Attributes:
        grid: of the file that decides.
        turn: of the grid's axes to those of the planes.
        axis: the one of the turned axes that is sliced.
    """

    grid: Grid
    turn: Turn
    axis: int

    @property
    def view(self) -> View:
        """How the planes are read from the array of the grid."""
        return _view(self.grid.shape, self.turn, self.axis)


def grid_of(nifti: Any) -> Grid:
    """Describe the grid of an image of nibabel; only its header is used.

    Raises:
        ValueError: it is no image on a grid, as CIFTI is not.
    """
    if not isinstance(nifti, nib.Nifti1Pair):
        raise ValueError("it has no grid of voxels")
    header, shape = nifti.header, tuple(map(int, nifti.shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    affine = nifti.affine if np.isfinite(nifti.affine).all() else np.eye(4)
    rows: Rows = tuple(map(tuple, affine.tolist()))
    stated = bool(header["sform_code"] or header["qform_code"]) and rows != _IDENTITY
    if stated:
        rows = _with_normal(rows, shape)
        stated = _is_sound(np.array(rows))
    unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7)
    return Grid(shape, rows, stated, tuple(header["pixdim"][1:4].tolist()), unit)


def _is_sound(affine: Affine) -> bool:
    """Whether a matrix leads into space and back, and is one that a scanner may have."""
    most, volume = np.abs(affine).max(), abs(np.linalg.det(affine / np.abs(affine).max()))
    return bool(most < FAR and volume > 0 and np.isfinite(io_orientation(affine)).all())


def spatial(grid: Grid) -> Grid:
    """The grid of one channel of an image whose fourth axis is the channel; others as they are."""
    return replace(grid, shape=grid.shape[:3]) if len(grid.shape) == 4 else grid


def _with_normal(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """Complete the affine of a slice whose third axis has no length in the header."""
    if shape[2:] != (1,) or any(row[2] for row in rows):
        return rows
    matrix = np.array(rows)
    normal = np.cross(matrix[:3, 0], matrix[:3, 1])
    matrix[:3, 2] = normal / (np.linalg.norm(normal) or 1.0)
    return tuple(map(tuple, matrix.tolist()))


@lru_cache(maxsize=4096)
def place(grid: Grid, plane: str = "axial") -> Placed:
    """Say where the planes of a volume, or the only one of a slice, lie.

    ``plane`` is one of :data:`PLANES`; a slice has its own. An array whose header states nothing is
    read as if it were stored as LPS.
    """
    turn = _STAY
    if _is_turned(grid):
        turn = _turn(ornt_transform(io_orientation(grid.matrix), axcodes2ornt("LPS")))
    slicing = grid.slicing
    return Placed(grid, turn, PLANES.index(plane) if slicing is None else turn[slicing][0])


def _is_turned(grid: Grid) -> bool:
    """Whether planes are turned to LPS; not those cut from a volume that states nothing."""
    known = tuple((*row[:3], row[3] * (number != 2)) for number, row in enumerate(grid.affine))
    return grid.stated and not (grid.slicing == 2 and known == _IDENTITY)


@lru_cache(maxsize=4096)
def view_on(grid: Grid, placed: Placed) -> View | None:
    """Say how the planes of a case are read from another file; None where its grid does not fit.

    The file is brought to the case's grid by flips and permutations, and fits if it has the same
    shape then and its corners lie within :data:`TOLERANCE` of the case's. A file or a case whose
    header states nothing is taken as it lies, and has to have the same shape.
    """
    if grid == placed.grid:
        return placed.view
    turn = turn_to(grid, placed.grid)
    if turn is None or _turned(grid.shape, turn) != placed.grid.shape:
        return None
    if grid.stated and placed.grid.stated and _apart(grid, placed.grid, turn) > TOLERANCE:
        return None
    return _view(grid.shape, _joined(turn, placed.turn), placed.axis)


def turn_to(grid: Grid, target: Grid) -> Turn | None:
    """Find the flips and permutations that bring an array to the axes of another; None without."""
    if not len(grid.shape) == len(target.shape) == 3:
        return None
    if grid.stated and target.stated:
        orientation = io_orientation(_relative(grid, target))
        return _turn(orientation) if np.isfinite(orientation).all() else None
    own, other = grid.slicing, target.slicing
    if own is None or other is None or own == other:
        return _STAY
    rest = iter([axis for axis in range(3) if axis != other])
    return tuple((other if axis == own else next(rest), 1) for axis in range(3))


def _relative(grid: Grid, target: Grid) -> Affine:
    """The matrix [4, 4] from the indices of a grid to those of another."""
    own = grid.matrix
    if grid.unit and target.unit:
        own[:3] *= grid.unit / target.unit
    return np.asarray(np.linalg.solve(target.matrix, own))


def _apart(grid: Grid, target: Grid, turn: Turn) -> float:
    """The largest distance between corners of a turned grid and those of another, in voxels."""
    relative, most = _relative(grid, target), 0.0
    for corner in product(*((0, length - 1) for length in grid.shape)):
        place = (relative @ (*corner, 1))[:3]
        for index, length, (axis, sign) in zip(corner, grid.shape, turn, strict=True):
            expected = index if sign > 0 else length - 1 - index
            most = max(most, abs(float(place[axis]) - expected))
    return most


def view_resized(grid: Grid, placed: Placed) -> View | None:
    """Say how planes of another size are read, which cover those of a case; None where they do not.

    There must be as many planes, and the outer edges of the grids must lie within one voxel, the
    larger one, of each other.
    """
    turn = turn_to(grid, placed.grid)
    if turn is None or _turned(grid.shape, turn) == placed.grid.shape:
        return None
    if grid.stated and placed.grid.stated and not _covers(grid, placed.grid, turn):
        return None
    view = _view(grid.shape, _joined(turn, placed.turn), placed.axis)
    return view if view.depth == placed.view.depth else None


def _covers(grid: Grid, target: Grid, turn: Turn) -> bool:
    """Whether two grids of different size have the same outer edges, within the larger voxel."""
    relative, shape = _relative(grid, target), _turned(grid.shape, turn)
    voxel = [max(1.0, other / own) for own, other in zip(shape, target.shape, strict=True)]
    for ends in product((0, 1), repeat=3):
        edge = [end * length - 0.5 for end, length in zip(ends, grid.shape, strict=True)]
        place = (relative @ (*edge, 1))[:3]
        for end, (axis, sign) in zip(ends, turn, strict=True):
            expected = (end if sign > 0 else 1 - end) * target.shape[axis] - 0.5
            if abs(place[axis] - expected) > voxel[axis] + TOLERANCE:
                return False
    return True


def as_it_lies(grid: Grid) -> View:
    """How the planes of an array are read as they are stored, along its last axis."""
    axis = grid.slicing
    return _view(grid.shape, _STAY, 2 if axis is None else axis)


def require_view(path: Path, grid: Grid, placed: Placed, *, other: Path) -> View:
    """Return :func:`view_on`, or raise a :class:`UserError` that names both files and affines."""
    view = view_on(grid, placed)
    if view is None:
        raise mismatch(path, grid, placed.grid, other=other)
    return view


def mismatch(path: Path, grid: Grid, target: Grid, *, other: Path) -> UserError:
    """The error of two files of a case on different grids."""
    turn, both = turn_to(grid, target), grid.stated and target.stated
    affines = f"; the affines are {grid}, and {target}" if both else ""
    if turn is None or _turned(grid.shape, turn) != target.shape:
        own, wanted = size_of(grid.lengths), size_of(target.lengths)
        kind = "grid" if len(target.lengths) > 2 else "size"
        problem = f"its {kind} is {own}, but that of {other.name} is {wanted}{affines}"
        return UserError(path, problem, "Export all files of a case on one grid.")
    axes = np.abs(_relative(grid, target)[:3, :3]).round(2)
    kind = "axes or spacing" if set(axes.flat) - {0, 1} else "orientation or origin"
    codes, wanted = ("".join(map(str, nib.aff2axcodes(g.matrix))) for g in (grid, target))
    return UserError(
        path,
        f"its affine ({codes}) has other {kind} than {other.name} ({wanted}){affines}",
        "Resample all files of a case onto one grid.",
    )


@lru_cache(maxsize=4096)
def first_plane(placed: Placed) -> Rows:
    """Compute the affine of the planes: from (H, W, position) to the header's unit, as rows."""
    if placed.turn == _STAY and placed.axis == 2:
        return placed.grid.affine
    matrix = placed.grid.matrix @ inv_ornt_aff(np.array(placed.turn), placed.grid.shape)
    others = [axis for axis in range(3) if axis != placed.axis]
    return tuple(map(tuple, matrix[:, [*others, placed.axis, 3]].tolist()))


def plane_affine(placed: Placed, plane: int = 0) -> Affine:
    """Compute the affine [4, 4] of one plane as it is read, from (H, W, 0)."""
    moved = np.array(first_plane(placed))
    moved[:3, 3] += plane * moved[:3, 2]
    return moved


def spacing(placed: Placed) -> tuple[float, ...] | None:
    """The size of a voxel along H, W and, in a volume, from plane to plane, in millimetres.

    By the affine, or by pixdim where there is none; None where neither states it.
    """
    grid = placed.grid
    sizes = np.linalg.norm(grid.matrix[:3, :3], axis=0) if grid.stated else np.array(grid.sizes)
    becomes = [axis for axis, _ in placed.turn]
    order = [*(axis for axis in range(3) if axis != placed.axis), placed.axis]
    turned = sizes[[becomes.index(axis) for axis in order]] * (grid.unit or 1.0)
    known = turned[: len(grid.lengths)]
    return tuple(known.tolist()) if np.isfinite(known).all() and (known > 0).all() else None


def nifti_like(original: Any, values: npt.NDArray[Any], *, note: str = "") -> Any:
    """Make an image of nibabel with the affine, codes, units and sizes of another one."""
    header = original.header.copy()
    header.set_data_dtype(values.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"], header["descrip"] = 0, 0, note
    return type(original)(values, original.affine, header)


def restored(placed: Placed, plane: npt.NDArray[Any], *, axes: int = 3) -> npt.NDArray[Any]:
    """Bring the only plane of a slice [..., H, W] to the axes of its file, [h, w, 1, ...].

    ``axes`` is the number of axes of the file; with 2 and a single map the result is [h, w].
    """
    view = placed.view
    stored = np.moveaxis(view.turn_back(plane), (-2, -1), (0, 1))
    return stored if axes == stored.ndim == 2 else np.expand_dims(stored, view.axis)


def _turn(orientation: npt.NDArray[Any]) -> Turn:
    return tuple((int(axis), int(sign)) for axis, sign in orientation)


def _turned(shape: tuple[int, ...], turn: Turn) -> tuple[int, ...]:
    """The shape of a turned array."""
    lengths = {axis: length for (axis, _), length in zip(turn, shape, strict=True)}
    return tuple(lengths[axis] for axis in range(len(shape)))


def _joined(first: Turn, second: Turn) -> Turn:
    """One turn after the other."""
    return tuple((second[axis][0], sign * second[axis][1]) for axis, sign in first)


def _view(shape: tuple[int, ...], turn: Turn, sliced: int) -> View:
    """How planes of the turned axis ``sliced`` are read from an array that is not turned yet."""
    axis = next(own for own, (becomes, _) in enumerate(turn) if becomes == sliced)
    (first, first_sign), (second, second_sign) = (turn[own] for own in range(3) if own != axis)
    transposed = first > second
    flips = (second_sign < 0, first_sign < 0) if transposed else (first_sign < 0, second_sign < 0)
    return View(axis, shape[axis], turn[axis][1] < 0, transposed, flips)
