"""Slices of volumes without decompressing a volume for each: every NIfTI volume is decoded once.

:class:`VolumeStore` hands out volumes to cut. With a folder, a compressed volume is unpacked into
it once (NIfTI lies on disk plane by plane, so a plane is one short read) beside what was measured
of it, and both are redone when the source changes; without a folder, the last few volumes stay
decoded in memory. :class:`VolumeDataset` is the loader of axial slices that layouts build on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.intensity import Levels, measure, normalised
from guided_diffusion.data.readers import (
    UNREADABLE,
    Affine,
    Array,
    class_masks,
    nifti_shape,
    read_nifti,
    require_same_axes,
    unreadable,
)
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import atomic_write, make_folder

MEMORY = 2**30
Stamp = tuple[int, int]


class Volume(NamedTuple):
    """One decoded volume: voxels [H, W, D] that can be cut, its affine, and what was measured."""

    voxels: Any
    affine: Affine
    levels: Levels
    constant: frozenset[int]
    stamp: Stamp

    @property
    def bytes(self) -> int:
        """Memory in use: none where the voxels stay on disk."""
        return self.voxels.nbytes if isinstance(self.voxels, np.ndarray) else 0


class VolumeStore:
    """Volumes by path, decoded once: into ``folder``, or, where that is None, into memory.

    ``most_bytes`` bounds the decoded voxels in memory; the volume in use stays whatever its size.
    """

    def __init__(self, folder: Path | None, *, most_bytes: int = MEMORY) -> None:
        self.folder = folder and make_folder(folder, flag="--cache_dir")
        self.most_bytes = most_bytes
        self._open: OrderedDict[Path, Volume] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """A reading process starts with nothing decoded."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __call__(self, path: Path) -> Volume:
        """The volume at ``path``; a :class:`UserError` where it cannot be used."""
        stamp = _stamp(path)
        volume = self._open.pop(path, None)
        if volume is None or volume.stamp != stamp:
            volume = self._decoded(path, stamp)
        self._open[path] = volume

        while len(self._open) > 1 and self._bytes() > self.most_bytes:
            self._open.popitem(last=False)
        return volume

    def _bytes(self) -> int:
        return sum(volume.bytes for volume in self._open.values())

    def _decoded(self, path: Path, stamp: Stamp) -> Volume:
        if self.folder is None:
            values, affine = _read_volume(path)
            return Volume(values, affine, measure(values), constant_planes(values), stamp)

        facts = self.folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
        known = _read_facts(facts)
        if known is None or known["stamp"] != list(stamp) or not unpacked(path, facts).exists():
            known = _unpack(path, facts, stamp)
        voxels, affine = _proxy(unpacked(path, facts))
        return Volume(voxels, affine, Levels(*known["levels"]), frozenset(known["constant"]), stamp)


class VolumeDataset(SegmentationDataset):
    """Whole volumes, one case per axial slice: image [C, H, W], scaled by its whole volume.

    Args:
        directory: the data set's folder.
        volumes: one entry per volume, with one file per channel.
        channels: of the image.
        reading: which slices, on which scale, and where decoded volumes are kept.

    Cases are called ``<volume>_slice080``; the depth comes from the header.
    """

    usual_scale = "minmax"

    def __init__(
        self,
        directory: Path,
        volumes: Iterable[Entry],
        *,
        channels: int,
        reading: Reading = AS_STORED,
    ) -> None:
        self.store = VolumeStore(reading.cache_dir)
        volumes = list(volumes)
        kept = [plane for volume in volumes for plane in _planes(volume, reading, self.store)]
        super().__init__(directory, kept, channels=channels, reading=reading)
        if reading.cache_dir and any(path.name.lower().endswith(".gz") for path in _files(volumes)):
            self.notes.append(f"volumes are unpacked once, into {reading.cache_dir}")

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack one plane of every channel, float32 [C, H, W]; the affine is that plane's."""
        first = self.store(entry.images[0])
        planes = [self._plane(path, entry, scale=self.normalise) for path in entry.images]
        return torch.from_numpy(np.stack(planes)), plane_affine(first.affine, entry.plane or 0)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read one plane of the labels, float32 [K, H, W]; one class is what is above 0."""
        values = self.read_labels(entry)
        if entry.mask is None or values is None:
            return None
        return class_masks(entry.mask, values, self.classes)

    def read_labels(self, entry: Entry) -> Array | None:
        """Read one plane of the labels as stored, float32 [H, W]; None where there are none."""
        return None if entry.mask is None else self._plane(entry.mask, entry, scale="none")

    def _plane(self, path: Path, entry: Entry, *, scale: str) -> Array:
        volume, grid = self.store(path), self.store(entry.images[0])
        if volume.voxels.shape != grid.voxels.shape:
            raise UserError(
                path,
                found=f"a grid of {_grid_text(volume.voxels.shape)}",
                expected=f"{_grid_text(grid.voxels.shape)} as {entry.images[0].name}",
                hint="Export all files of a case on one grid.",
            )
        require_same_axes(path, volume.affine, grid.affine, other=entry.images[0])
        with _reading(path):
            plane = np.asarray(volume.voxels[..., entry.plane], dtype=np.float32)
        return normalised(np.ascontiguousarray(plane), volume.levels, scale)


def plane_affine(affine: Affine, plane: int) -> Affine:
    """The affine of one plane of a volume with ``affine`` [4, 4]."""
    moved = affine.copy()
    moved[:3, 3] += plane * affine[:3, 2]
    return moved


def constant_planes(values: Array) -> frozenset[int]:
    """Positions of the axial planes of [H, W, D] that hold one value only."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return frozenset(map(int, np.flatnonzero(low == high)))


def unpacked(path: Path, facts: Path) -> Path:
    """Where the voxels of ``path`` lie bare: in the file itself, unless it is compressed."""
    return facts.with_suffix(".nii") if path.name.lower().endswith(".gz") else path


def _unpack(path: Path, facts: Path, stamp: Stamp) -> dict[str, Any]:
    """Unpack a volume and measure it; the facts come last, so that they vouch for the voxels.

    Several processes may do so at once: each writes a file of its own and renames it.
    """
    bare = unpacked(path, facts)
    own = bare.with_name(f"{bare.stem}-{os.getpid()}.nii")
    if bare != path:
        facts.unlink(missing_ok=True)
        with atomic_write(own, hint="Free some space, or choose another --cache_dir.") as part:
            _gunzip(path, part)
            values, _ = _read_volume(part, shown=path)
        own.replace(bare)
    else:
        values, _ = _read_volume(path)

    known = {"stamp": list(stamp), "levels": measure(values), "source": str(path)}
    known["constant"] = sorted(constant_planes(values))
    written = facts.with_name(f"{facts.stem}-{os.getpid()}.json")
    with atomic_write(written) as part:
        part.write_text(json.dumps(known), encoding="utf-8")
    written.replace(facts)
    return known


def _gunzip(path: Path, target: Path) -> None:
    """Unpack piece by piece; an error of reading names ``path``, one of writing is the caller's."""
    with ExitStack() as stack:
        with _reading(path):
            packed = stack.enter_context(gzip.open(path))
        file = stack.enter_context(target.open("wb"))
        piece = b"?"
        while piece:
            with _reading(path):
                piece = packed.read(2**20)
            file.write(piece)


def _read_facts(path: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts if {"stamp", "levels", "constant"} <= facts.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _read_volume(path: Path, *, shown: Path | None = None) -> tuple[Array, Affine]:
    values, affine = read_nifti(path, shown=shown)
    require_volume(shown or path, values.shape)
    return values, affine


def _proxy(path: Path) -> tuple[Any, Affine]:
    """Voxels [H, W, D] that are read from disk when they are cut, and the affine."""
    nifti: Any = nib.load(path)
    return nifti.dataobj.reshape(nifti.shape[:3]), np.asarray(nifti.affine, dtype=np.float64)


def _stamp(path: Path) -> Stamp:
    with _reading(path):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """An error of the disk or of the format, inside, is one of the file ``path``."""
    try:
        yield
    except UNREADABLE as error:
        raise unreadable(path, error, "NIfTI volume") from error


def _planes(volume: Entry, reading: Reading, store: VolumeStore) -> Iterator[Entry]:
    """One entry per chosen axial slice; opens headers only, unless blank slices are left out."""
    try:
        shape = nifti_shape(volume.images[0])
        require_volume(volume.images[0], shape)
    except UserError as error:
        refuse(error)
        return
    chosen = range(shape[2])[slice(*reading.slices)]
    if not chosen:
        raise UserError(
            "--slices",
            found=":".join("" if end is None else str(end) for end in reading.slices),
            expected=f"some of the {shape[2]} slices of {volume.images[0]}",
            hint="Count from 0, the end left out: 80:129 leaves 49 of 155.",
        )
    blank: frozenset[int] = frozenset()
    if not reading.blank_slices:
        blank = frozenset.intersection(*(store(path).constant for path in volume.images))
    for plane in chosen:
        if plane not in blank:
            yield volume._replace(name=f"{volume.name}_slice{plane:03d}", plane=plane)


def require_volume(path: Path, shape: tuple[int, ...]) -> None:
    """Raise a :class:`UserError` unless ``shape`` has three axes, none of them empty."""
    if len(shape) != 3 or 0 in shape:
        raise UserError(
            path,
            found=f"{len(shape)} axes ({_grid_text(shape)})",
            expected="a volume of three axes",
            hint="Keep slices, volumes and time series in data sets of their own.",
        )


def _grid_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _files(volumes: Iterable[Entry]) -> Iterator[Path]:
    for volume in volumes:
        yield from volume.images
        if volume.mask is not None:
            yield volume.mask
