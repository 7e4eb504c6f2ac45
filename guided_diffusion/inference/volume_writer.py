"""From slices back to volumes: what was predicted slice by slice becomes one NIfTI per volume.

Slices wait on disk, exactly as drawn, until the last one of their volume is there; then they are
put at their places in a volume on the source's grid, with its header, and removed. A run may be
killed at any point: what waits is found again, and a volume that is extended keeps what it has.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any
from zipfile import BadZipFile

import nibabel as nib
import numpy as np

from guided_diffusion import logger
from guided_diffusion.data.datasets import Entry
from guided_diffusion.data.decoding import UNREADABLE
from guided_diffusion.data.geometry import grid_of, nifti_like, place, spatial
from guided_diffusion.errors import UserError
from guided_diffusion.files import atomic_write, require_replaceable, set_aside

KINDS = ("output_ens", "mask", "uncertainty")


class VolumeWriter:
    """The volumes of one run, written as ``<volume>_<kind>.nii.gz`` for the :data:`KINDS`.

    Args:
        out_dir: the result folder; slices wait in ``.slices`` below it.
        fingerprint: of the settings, written into the header: others' volumes are replaced.
        entries: the cases of the run; those of no volume are ignored.
        plane: how the volumes are sliced.
    """

    def __init__(
        self, out_dir: Path, fingerprint: str, entries: Iterable[Entry], *, plane: str = "axial"
    ) -> None:
        self.out_dir = out_dir
        self.fingerprint = fingerprint
        self.plane = plane
        self.entries = [entry for entry in entries if entry.volume]
        self.source = {entry.volume: entry.images[0] for entry in self.entries}
        self.waiting = out_dir / ".slices" / fingerprint
        self.missing: Counter[str] = Counter()
        self._counting = Lock()
        self.complete: dict[str, bool] = {}
        for volume in self.source:
            for kind in KINDS:
                require_replaceable(self._path(volume, kind))

    def holds(self, entry: Entry) -> bool:
        """Whether a slice that is recorded as finished waits, or is in its volume."""
        return self._holds(entry.volume, entry.plane or 0)

    def lost(self, names: Iterable[str]) -> list[str]:
        """List those of the recorded slices that are in no volume of this run, nor wait."""
        found = [(name, *name.rpartition("_slice")[::2]) for name in names]
        return [
            name
            for name, volume, plane in found
            if volume in self.source and plane.isdecimal() and not self._holds(volume, int(plane))
        ]

    def _holds(self, volume: str, plane: int) -> bool:
        if volume not in self.complete:
            self.complete[volume] = all(self._written(volume, kind) is not None for kind in KINDS)
        return self.complete[volume] or _is_whole_slice(self._slice(volume, plane))

    def expect(self, entries: Iterable[Entry], *, elsewhere: Container[str] = ()) -> None:
        """Declare the slices still to come; a volume is written when its last one is there.

        Other processes write the volumes ``elsewhere``.
        """
        self.missing = Counter(entry.volume for entry in entries)
        self.source = {v: path for v, path in self.source.items() if v not in elsewhere}

    def keep(self, entry: Entry, maps: Mapping[str, np.ndarray]) -> None:
        """Store one slice: a map [..., H, W] for each of the :data:`KINDS`; threads may call it."""
        path = self._slice(entry.volume, entry.plane or 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            np.savez(part, **{kind: maps[kind] for kind in KINDS})  # type: ignore[arg-type]
        with self._counting:
            self.missing[entry.volume] -= 1

    def write(self) -> None:
        """Write every volume of which slices wait and none is still to come."""
        for volume, source in self.source.items():
            waiting = self.waiting / volume
            if self.missing[volume] < 1 and waiting.is_dir():
                slices = [path for path in sorted(waiting.glob("[0-9]*.npz")) if _kept(path)]
                for kind in KINDS if slices else ():  # a killed run may leave the folder empty
                    self._write_kind(volume, kind, source, slices)
                shutil.rmtree(waiting)

    def clear(self) -> None:
        """Remove the folder of waiting slices, once all are in their volumes."""
        shutil.rmtree(self.waiting.parent, ignore_errors=True)

    def _write_kind(self, volume: str, kind: str, source: Path, slices: list[Path]) -> None:
        planes = {int(path.stem): _load(path, kind) for path in slices}
        like = next(iter(planes.values()))
        known = self._written(volume, kind)
        original: Any = nib.load(source)
        placed = place(spatial(grid_of(original)), self.plane)
        shape = (*placed.grid.shape, *like.shape[:-2])
        values = np.zeros(shape, like.dtype) if known is None else self._read(volume, kind, known)
        along = np.moveaxis(values, placed.view.axis, 2)
        for position, plane in planes.items():
            stored = placed.view.turn_back(plane)
            along[:, :, placed.view.position(position)] = np.moveaxis(stored, (-2, -1), (0, 1))

        path = self._path(volume, kind)
        if known is None and path.exists() and not _is_volume(path):
            logger.log(f"{path} is damaged; it is kept as {set_aside(path).name}, and made anew")
        with atomic_write(path) as part:
            nib.save(nifti_like(original, values.astype(like.dtype), note=self.fingerprint), part)

    def _written(self, volume: str, kind: str) -> Any:
        """The volume as an earlier run with the same settings has left it, or None."""
        path = self._path(volume, kind)
        if not path.exists():
            return None
        if not _is_volume(path):
            return None
        nifti: Any = nib.load(path)
        note = nifti.header["descrip"].item()  # without the zeros that fill the field's 80 bytes
        return nifti if note == self.fingerprint.encode() else None

    def _read(self, volume: str, kind: str, known: Any) -> np.ndarray:
        """The values of a volume that is extended."""
        try:
            return np.asarray(known.dataobj)
        except UNREADABLE as error:
            kept = set_aside(self._path(volume, kind))
            raise UserError(
                self._path(volume, kind),
                f"is damaged ({error}); it is kept as {kept.name}",
                "Run the same command again, which draws its slices anew; new ones are kept.",
            ) from error

    def _path(self, volume: str, kind: str) -> Path:
        return self.out_dir / f"{volume}_{kind}.nii.gz"

    def _slice(self, volume: str, plane: int) -> Path:
        return self.waiting / volume / f"{plane:04d}.npz"


def _kept(path: Path) -> bool:
    """Whether a waiting slice can be read; one that cannot, of another run, is set aside."""
    whole = _is_whole_slice(path)
    if not whole:
        logger.log(f"{path} is damaged; it is kept as {set_aside(path).name}, and drawn anew")
    return whole


def _is_whole_slice(path: Path) -> bool:
    """Whether a slice waits, and can be read."""
    try:
        return all(_load(path, kind).ndim >= 2 for kind in KINDS)
    except (*UNREADABLE, KeyError, TypeError, BadZipFile, MemoryError):
        return False


def _is_volume(path: Path) -> bool:
    """Whether a compressed volume has the length that its header states; nothing is unpacked."""
    try:
        voxels: Any = nib.load(path).dataobj  # type: ignore[attr-defined]
        needed = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            return int.from_bytes(file.read(), "little") == needed % 2**32
    except (*UNREADABLE, AttributeError):
        return False


def _load(path: Path, kind: str) -> np.ndarray:
    with path.open("rb") as file, np.load(file) as maps:
        return np.asarray(maps[kind])
