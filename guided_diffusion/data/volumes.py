"""Slices of NIfTI volumes, each volume decoded once instead of once per slice.

:class:`VolumeStore` provides volumes to slice. With a folder, a compressed volume is unpacked into
it once (NIfTI is stored plane by plane, so a plane is one short read) beside its statistics, and
both are redone when the source changes; one that is sliced along another axis than its last is
stored anew, in the order of its planes. Without a folder, the last few volumes stay decoded in
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

from guided_diffusion.data.cache import private_folder
from guided_diffusion.data.datasets import (
    AS_STORED,
    Entry,
    Reading,
    SegmentationDataset,
    mask_files,
)
from guided_diffusion.data.decoding import decoding, load_nifti
from guided_diffusion.data.folders import size_of
from guided_diffusion.data.geometry import (
    Affine,
    Grid,
    Placed,
    View,
    place,
    plane_affine,
    require_view,
    spatial,
)
from guided_diffusion.data.intensity import Levels, measure, normalised
from guided_diffusion.data.limits import nifti_header
from guided_diffusion.data.masks import SAMPLE, MaskSet
from guided_diffusion.data.readers import (
    Array,
    StoredLabels,
    is_whole,
    nifti_shape,
    read_grid,
    read_nifti,
)
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import atomic_write, read_json

MEMORY = 2**30
LABEL_PIXELS = 2**23
"""Pixels of all label volumes that are looked at, before the first is used."""
LABELS_ON_DISK, LABELS_IN_MEMORY = 2**28, 2**25
"""Voxels of the label volumes that are looked at: each is unpacked for that, or decoded twice."""
Stamp = tuple[int, int]


class Volume(NamedTuple):
    """One decoded volume: its voxels, with the sliced axis last, and its statistics.

    ``constant`` holds the positions of planes of one value, ``stamp`` size and time of the source.
    """

    voxels: Any
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
    ``channel`` is read of files of four axes, which are refused without it.
    """

    def __init__(
        self, folder: Path | None, *, most_bytes: int = MEMORY, channel: int | None = None
    ) -> None:
        self.folder = folder and private_folder(folder)
        self.most_bytes = most_bytes
        self.channel = channel
        self._open: OrderedDict[tuple[Path, int], Volume] = OrderedDict()
        self._grids: dict[Path, tuple[Stamp, Grid]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the decoded volumes, so that a reading process starts without any."""
        return {**self.__dict__, "_open": OrderedDict()}

    def grid(self, path: Path) -> Grid:
        """Return the grid of a volume, by its header, which is read once."""
        stamp, known = _stamp(path), self._grids.get(path)
        if known is None or known[0] != stamp:
            grid = read_grid(path)
            known = self._grids[path] = stamp, grid if self.channel is None else spatial(grid)
        return known[1]

    def __call__(self, path: Path, axis: int = 2) -> Volume:
        """Return the volume at ``path`` for slicing along an axis.

        Raises:
            UserError: it cannot be used.
        """
        stamp = _stamp(path)
        volume = self._open.pop((path, axis), None)
        if volume is None or volume.stamp != stamp:
            volume = self._decoded(path, axis, stamp)
        self._open[path, axis] = volume

        while len(self._open) > 1 and self._bytes() > self.most_bytes:
            self._open.popitem(last=False)
        return volume

    def labels(self, path: Path, most: int = LABEL_PIXELS, *, plane: str = "axial") -> StoredLabels:
        """Return planes of labels, evenly spread, of at most ``most`` pixels, but one at least.

        Without a folder, they are not kept in memory.
        """
        axis = place(self.grid(path), plane).view.axis
        in_memory = self.folder is None
        voxels = _read_volume(path, self.channel) if in_memory else self(path, axis).voxels
        height, width, depth = voxels.shape
        count = max(1, min(depth, most // (height * width)))
        places = [(2 * n + 1) * depth // (2 * count) for n in range(count)]
        return StoredLabels(np.stack([np.asarray(voxels[..., place]) for place in places]))

    def _bytes(self) -> int:
        return sum(volume.bytes for volume in self._open.values())

    def _decoded(self, path: Path, axis: int, stamp: Stamp) -> Volume:
        if self.folder is None:
            values = np.moveaxis(_read_volume(path, self.channel), axis, -1)
            return Volume(values, measure(values), constant_planes(values), stamp)

        key = os.fsencode(path.resolve()) + (b"" if axis == 2 else f" axis {axis}".encode())
        four = self.channel is not None and len(read_grid(path).lengths) == 4
        channel = self.channel if four else None
        key += f" channel {channel}".encode() if channel is not None else b""
        facts = self.folder / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
        known = _read_facts(facts)
        bare = unpacked(path, facts, axis if channel is None else -1)
        if known is None or known["stamp"] != list(stamp) or not is_whole(bare):
            known = _unpack(path, facts, stamp, axis, channel)
        return Volume(_proxy(bare), Levels(*known["levels"]), frozenset(known["constant"]), stamp)

    def plane(self, path: Path, view: View, position: int) -> Array:
        """Read one plane, float32 [H, W] as ``view`` turns it.

        A copy in the cache that cannot be read is made again.

        Raises:
            UserError: the volume itself cannot be read.
        """
        try:
            return self._plane(path, view, position)
        except (OSError, EOFError, ValueError, UserError):
            self._open.pop((path, view.axis), None)
        with decoding(path, "NIfTI volume"):
            return self._plane(path, view, position)

    def _plane(self, path: Path, view: View, position: int) -> Array:
        voxels = self(path, view.axis).voxels
        stored = np.asarray(voxels[..., view.position(position)], dtype=np.float32)
        return np.ascontiguousarray(view.turn(stored))


class VolumeDataset(SegmentationDataset):
    """Whole volumes, one case per slice: image [C, H, W], scaled by its whole volume.

    Cases are named ``<volume>_slice080``; the header of the first channel says which axis is
    sliced, and how planes lie. All other files are brought onto its grid.

    Args:
        directory: the data set's folder.
        volumes: one entry per volume, with one file per channel.
        channels: of the image.
        reading: which slices, which normalisation, and where decoded volumes are kept.
        store: of the volumes; None for one of files of three axes.
    """

    usual_scale = "minmax"

    def __init__(
        self,
        directory: Path,
        volumes: Iterable[Entry],
        *,
        channels: int,
        reading: Reading = AS_STORED,
        store: VolumeStore | None = None,
    ) -> None:
        self.store = store or VolumeStore(reading.cache_dir)
        volumes = list(volumes)
        kept = [plane for volume in volumes for plane in _planes(volume, reading, self.store)]
        super().__init__(directory, kept, channels=channels, reading=reading)
        self.masks = self._label_volumes(mask_files(volumes), reading)
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
        read = partial(self.store.labels, most=LABEL_PIXELS // most, plane=reading.plane)
        return MaskSet(labels, reading.classes, brats=self.brats, read=read, most=most)

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack one plane of every channel, float32 [C, H, W]; the affine is that plane's."""
        placed = place(self.store.grid(entry.images[0]), self.plane)
        planes = [self._plane(path, entry, placed, scale=self.normalise) for path in entry.images]
        return torch.from_numpy(np.stack(planes)), plane_affine(placed, entry.plane or 0)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read one plane of the labels, float32 [K, H, W]; a single class is what is above 0."""
        values = self.read_labels(entry)
        if entry.mask is None or values is None:
            return None
        return self.masks.read_plane(entry.mask, values)

    def read_labels(self, entry: Entry) -> Array | None:
        """Read one plane of the labels as stored, float32 [H, W]; None where there are none."""
        if entry.mask is None:
            return None
        placed = place(self.store.grid(entry.images[0]), self.plane)
        return self._plane(entry.mask, entry, placed, scale="none")

    def _image_place(self, entry: Entry) -> tuple[Path, Placed]:
        return entry.images[0], place(self.store.grid(entry.images[0]), self.plane)

    def _plane(
        self, path: Path, entry: Entry, placed: Placed, *, scale: str, store: Any = None
    ) -> Array:
        store = store or self.store
        grid = store.grid(path)
        require_volume(path, grid)
        view = require_view(path, grid, placed, other=entry.images[0])
        plane = store.plane(path, view, entry.plane or 0)
        return normalised(plane, store(path, view.axis).levels, scale)


def constant_planes(values: Array) -> frozenset[int]:
    """Find the positions of the planes of [H, W, D] that hold one value only."""
    low, high = values.min(axis=(0, 1)), values.max(axis=(0, 1))
    return frozenset(map(int, np.flatnonzero(low == high)))


def unpacked(path: Path, facts: Path, axis: int = 2) -> Path:
    """Where the uncompressed voxels of ``path`` are: in the file itself, if it can be sliced."""
    as_is = axis == 2 and not path.name.lower().endswith(".gz")
    return path if as_is else facts.with_suffix(".nii")


def _unpack(
    path: Path, facts: Path, stamp: Stamp, axis: int, channel: int | None
) -> dict[str, Any]:
    """Unpack a volume and measure it; the facts are written last, so they imply the voxels.

    Several processes may do so at once: each writes a file of its own and renames it.
    """
    plain = axis == 2 and channel is None
    bare = unpacked(path, facts, axis if channel is None else -1)
    hint = "Free some space, or choose another --cache_dir."
    if bare != path:
        facts.unlink(missing_ok=True)
        with atomic_write(bare, hint=hint, mode=0o600) as part:
            if plain:
                _gunzip(path, part)
                values = _read_volume(part, shown=path)
            else:
                values = np.moveaxis(_read_volume(path, channel), axis, -1)
                nib.save(nib.Nifti1Image(values, np.eye(4)), part)
    else:
        values = _read_volume(path)

    known = {"stamp": list(stamp), "levels": measure(values), "source": str(path)}
    known["constant"] = sorted(constant_planes(values))
    with atomic_write(facts, hint=hint, mode=0o600) as part:
        part.write_text(json.dumps(known), encoding="utf-8")
    return known


def _gunzip(path: Path, target: Path) -> None:
    """Unpack header and voxels in pieces, and nothing behind them.

    A read error names ``path``, a write error is left to the caller.
    """
    with ExitStack() as stack:
        with decoding(path, "NIfTI volume"):
            rest = nifti_header(path).end
            packed = stack.enter_context(gzip.open(path))
        file = stack.enter_context(target.open("wb"))
        while rest > 0:
            with decoding(path, "NIfTI volume"):
                if not (piece := packed.read(min(rest, 2**20))):
                    raise EOFError("it ends within its voxels")
            file.write(piece)
            rest -= len(piece)


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Read what is known of a cached volume; None where that is nothing, or damaged."""
    try:
        facts = read_json(path, hint="") or {}
        Levels(*map(float, facts["levels"]))
        whole = all(type(number) is int for key in ("stamp", "constant") for number in facts[key])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return facts if whole and len(facts["stamp"]) == 2 else None


def _read_volume(path: Path, channel: int | None = None, *, shown: Path | None = None) -> Array:
    values, grid = read_nifti(path, shown=shown, channel=channel)
    require_volume(shown or path, grid)
    return values


def _proxy(path: Path) -> Any:
    """Return voxels [H, W, D] that are read from disk when they are sliced."""
    with decoding(path, "NIfTI volume"):
        nifti, _ = load_nifti(path)
        return nifti.dataobj.reshape(nifti.shape[:3])


def _stamp(path: Path) -> Stamp:
    with decoding(path, "NIfTI volume"):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _planes(volume: Entry, reading: Reading, store: VolumeStore) -> Iterator[Entry]:
    """Yield one entry per chosen slice; opens headers only, unless blank slices are left out."""
    first = volume.images[0]
    try:
        grid = store.grid(first)
        require_volume(first, grid)
        placed = place(grid, reading.plane)
    except UserError as error:
        refuse(error)
        return
    depth = placed.view.depth
    chosen = range(depth)[slice(*reading.slices)]
    if not chosen:
        raise UserError(
            "--slices",
            f"{':'.join('' if end is None else str(end) for end in reading.slices)} selects none "
            f"of the {depth} slices of {first}",
            "Count from 0 and exclude the end: 80:129 selects 49 of 155.",
        )
    blank: frozenset[int] = frozenset()
    if not reading.blank_slices:
        views = {p: require_view(p, store.grid(p), placed, other=first) for p in volume.images}
        blank = frozenset.intersection(
            *(
                frozenset(map(view.position, store(path, view.axis).constant))
                for path, view in views.items()
            )
        )
    for plane in chosen:
        if plane not in blank:
            yield volume._replace(name=f"{volume.name}_slice{plane:03d}", plane=plane)


def require_volume(path: Path, grid: Grid) -> None:
    """Raise a :class:`UserError` unless a grid has three axes, none of them empty or of a slice."""
    if len(grid.lengths) != 3 or 0 in grid.lengths:
        raise UserError(
            path,
            f"its shape is {size_of(grid.lengths)}, but a volume has three axes, none of them "
            "empty",
            "Keep slices, volumes and time series in separate data sets.",
        )


def _files(volumes: Iterable[Entry]) -> Iterator[Path]:
    for volume in volumes:
        yield from volume.images
        if volume.mask is not None:
            yield volume.mask
