"""Axial slices of NIfTI volumes, each volume decoded once instead of once per slice.

:class:`VolumeStore` provides volumes to slice. With a folder, a compressed volume is unpacked into
it once (NIfTI is stored plane by plane, so a plane is one short read) beside its statistics, and
both are redone when the source changes; without a folder, the last few volumes stay decoded in
memory. :class:`VolumeDataset` is the base class of the loaders of volumes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.intensity import Levels, measure, normalised
from guided_diffusion.data.masks import SAMPLE, MaskSet
from guided_diffusion.data.readers import (
    UNREADABLE,
    Affine,
    Array,
    StoredLabels,
    decoding,
    nifti_shape,
    read_nifti,
    require_same_axes,
)
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import atomic_write, make_folder, read_json

MEMORY = 2**30
LABEL_PIXELS = 2**23
"""Pixels of all label volumes that are looked at, before the first is used."""
LABELS_ON_DISK, LABELS_IN_MEMORY = 2**28, 2**25
"""Voxels of the label volumes that are looked at: each is unpacked for that, or decoded twice."""
Stamp = tuple[int, int]


class Volume(NamedTuple):
    """One decoded volume: its voxels [H, W, D], affine [4, 4] and statistics.

    ``constant`` holds the positions of planes of one value, ``stamp`` size and time of the source.
    """

    voxels: Any
    affine: Affine
    levels: Levels
    constant: frozenset[int]
    stamp: Stamp

    @property
    def bytes(self) -> int:
        """The memory in use; 0 where the voxels stay on disk."""
        return self.voxels.nbytes if isinstance(self.voxels, np.ndarray) else 0


class VolumeStore:
    """Volumes by path, decoded once: into ``folder``, or into memory where that is None.

    ``most_bytes`` bounds the decoded voxels in memory; the volume in use is kept at any size.
    """

    def __init__(self, folder: Path | None, *, most_bytes: int = MEMORY) -> None:
        self.folder = folder and make_folder(folder, flag="--cache_dir")
        self.most_bytes = most_bytes
        self._open: OrderedDict[Path, Volume] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the decoded volumes, so that a reading process starts without any."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __call__(self, path: Path) -> Volume:
        """Return the volume at ``path``; a :class:`UserError` where it cannot be used."""
        stamp = _stamp(path)
        volume = self._open.pop(path, None)
        if volume is None or volume.stamp != stamp:
            volume = self._decoded(path, stamp)
        self._open[path] = volume

        while len(self._open) > 1 and self._bytes() > self.most_bytes:
            self._open.popitem(last=False)
        return volume

    def labels(self, path: Path, most: int = LABEL_PIXELS) -> StoredLabels:
        """Return planes of labels, evenly spread, of at most ``most`` pixels, but one at least.

        Without a folder, they are not kept in memory.
        """
        voxels = _read_volume(path)[0] if self.folder is None else self(path).voxels
        height, width, depth = voxels.shape
        count = max(1, min(depth, most // (height * width)))
        places = [(2 * n + 1) * depth // (2 * count) for n in range(count)]
        return StoredLabels(np.stack([np.asarray(voxels[..., place]) for place in places]))

    def _bytes(self) -> int:
        return sum(volume.bytes for volume in self._open.values())

    def _decoded(self, path: Path, stamp: Stamp) -> Volume:
        if self.folder is None:
            values, affine = _read_volume(path)
            return Volume(values, affine, measure(values), constant_planes(values), stamp)

        facts = self.folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
        known = _read_facts(facts)
        if known is None or known["stamp"] != list(stamp) or not is_whole(unpacked(path, facts)):
            known = _unpack(path, facts, stamp)
        voxels, affine = _proxy(unpacked(path, facts))
        return Volume(voxels, affine, Levels(*known["levels"]), frozenset(known["constant"]), stamp)

    def plane(self, path: Path, position: int) -> Array:
        """Read one axial plane [H, W], float32.

        A copy in the cache that cannot be read is made again. Raises a :class:`UserError` where
        the volume itself cannot be read.
        """
        try:
            return np.asarray(self(path).voxels[..., position], dtype=np.float32)
        except UNREADABLE:
            self._open.pop(path, None)
        with decoding(path, "NIfTI volume"):
            return np.asarray(self(path).voxels[..., position], dtype=np.float32)


class VolumeDataset(SegmentationDataset):
    """Whole volumes, one case per axial slice: image [C, H, W], scaled by its whole volume.

    Cases are named ``<volume>_slice080``; the depth comes from the header.

    Args:
        directory: the data set's folder.
        volumes: one entry per volume, with one file per channel.
        channels: of the image.
        reading: which slices, which normalisation, and where decoded volumes are kept.
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
        self.masks = self._label_volumes([volume.mask for volume in volumes], reading)
        if reading.cache_dir and any(path.name.lower().endswith(".gz") for path in _files(volumes)):
            self.notes.append(f"volumes are unpacked once, into {reading.cache_dir}")

    def _label_volumes(self, paths: Sequence[Path | None], reading: Reading) -> MaskSet:
        """The masks, of which some planes of some volumes are looked at."""
        labels = [path for path in paths if path is not None]
        voxels = 1
        with suppress(UserError, IndexError):  # a broken header is an error once it is needed
            voxels = max(1, math.prod(nifti_shape(labels[0])))
        bound = LABELS_IN_MEMORY if reading.cache_dir is None else LABELS_ON_DISK
        most = max(1, min(len(labels), max(4, bound // voxels), SAMPLE))
        read = partial(self.store.labels, most=LABEL_PIXELS // most)
        return MaskSet(labels, reading.classes, brats=self.brats, read=read, most=most)

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack one plane of every channel, float32 [C, H, W]; the affine is that plane's."""
        first = self.store(entry.images[0])
        planes = [self._plane(path, entry, scale=self.normalise) for path in entry.images]
        return torch.from_numpy(np.stack(planes)), plane_affine(first.affine, entry.plane or 0)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read one plane of the labels, float32 [K, H, W]; a single class is what is above 0."""
        values = self.read_labels(entry)
        if entry.mask is None or values is None:
            return None
        return self.masks.read_plane(entry.mask, values)

    def read_labels(self, entry: Entry) -> Array | None:
        """Read one plane of the labels as stored, float32 [H, W]; None where there are none."""
        return None if entry.mask is None else self._plane(entry.mask, entry, scale="none")

    def _plane(self, path: Path, entry: Entry, *, scale: str) -> Array:
        volume, grid = self.store(path), self.store(entry.images[0])
        if volume.voxels.shape != grid.voxels.shape:
            raise UserError(
                path,
                f"its grid is {_grid_text(volume.voxels.shape)}, but that of "
                f"{entry.images[0].name} is {_grid_text(grid.voxels.shape)}",
                "Export all files of a case on one grid.",
            )
        require_same_axes(path, volume.affine, grid.affine, other=entry.images[0])
        plane = self.store.plane(path, entry.plane or 0)
        return normalised(np.ascontiguousarray(plane), volume.levels, scale)


def plane_affine(affine: Affine, plane: int) -> Affine:
    """Compute the affine of one plane of a volume with ``affine`` [4, 4]."""
    moved = affine.copy()
    moved[:3, 3] += plane * affine[:3, 2]
    return moved


def constant_planes(values: Array) -> frozenset[int]:
    """Find the positions of the axial planes of [H, W, D] that hold one value only."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return frozenset(map(int, np.flatnonzero(low == high)))


def unpacked(path: Path, facts: Path) -> Path:
    """Where the uncompressed voxels of ``path`` are: in the file itself, unless it is .gz."""
    return facts.with_suffix(".nii") if path.name.lower().endswith(".gz") else path


def _unpack(path: Path, facts: Path, stamp: Stamp) -> dict[str, Any]:
    """Unpack a volume and measure it; the facts are written last, so they imply the voxels.

    Several processes may do so at once: each writes a file of its own and renames it.
    """
    bare, hint = unpacked(path, facts), "Free some space, or choose another --cache_dir."
    if bare != path:
        facts.unlink(missing_ok=True)
        with atomic_write(bare, hint=hint) as part:
            _gunzip(path, part)
            values, _ = _read_volume(part, shown=path)
    else:
        values, _ = _read_volume(path)

    known = {"stamp": list(stamp), "levels": measure(values), "source": str(path)}
    known["constant"] = sorted(constant_planes(values))
    with atomic_write(facts, hint=hint) as part:
        part.write_text(json.dumps(known), encoding="utf-8")
    return known


def _gunzip(path: Path, target: Path) -> None:
    """Unpack in pieces; a read error names ``path``, a write error is left to the caller."""
    with ExitStack() as stack:
        with decoding(path, "NIfTI volume"):
            packed = stack.enter_context(gzip.open(path))
        file = stack.enter_context(target.open("wb"))
        piece = b"?"
        while piece:
            with decoding(path, "NIfTI volume"):
                piece = packed.read(2**20)
            file.write(piece)


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Read what is known of a cached volume; None where that is nothing, or damaged."""
    try:
        facts = read_json(path, hint="") or {}
        Levels(*map(float, facts["levels"]))
        whole = all(type(number) is int for key in ("stamp", "constant") for number in facts[key])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return facts if whole and len(facts["stamp"]) == 2 else None


def is_whole(path: Path) -> bool:
    """Whether a file is an uncompressed NIfTI volume of the length that its header states."""
    try:
        voxels: Any = nib.load(path).dataobj  # type: ignore[attr-defined]
        needed = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        return len(voxels.shape) >= 3 and path.stat().st_size >= needed
    except (*UNREADABLE, AttributeError):
        return False


def _read_volume(path: Path, *, shown: Path | None = None) -> tuple[Array, Affine]:
    values, affine = read_nifti(path, shown=shown)
    require_volume(shown or path, values.shape)
    return values, affine


def _proxy(path: Path) -> tuple[Any, Affine]:
    """Return voxels [H, W, D] that are read from disk when they are sliced, and the affine."""
    nifti: Any = nib.load(path)
    return nifti.dataobj.reshape(nifti.shape[:3]), np.asarray(nifti.affine, dtype=np.float64)


def _stamp(path: Path) -> Stamp:
    with decoding(path, "NIfTI volume"):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _planes(volume: Entry, reading: Reading, store: VolumeStore) -> Iterator[Entry]:
    """Yield one entry per chosen slice; opens headers only, unless blank slices are left out."""
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
            f"{':'.join('' if end is None else str(end) for end in reading.slices)} selects none "
            f"of the {shape[2]} slices of {volume.images[0]}",
            "Count from 0 and exclude the end: 80:129 selects 49 of 155.",
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
            f"its shape is {_grid_text(shape)}, but a volume has three axes, none of them empty",
            "Keep slices, volumes and time series in separate data sets.",
        )


def _grid_text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _files(volumes: Iterable[Entry]) -> Iterator[Path]:
    for volume in volumes:
        yield from volume.images
        if volume.mask is not None:
            yield volume.mask
