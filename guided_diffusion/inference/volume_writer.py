"""From slices back to volumes: what was predicted slice by slice becomes one NIfTI per volume.

Slices wait on disk, exactly as drawn, until the last one of their volume is there; then they are
put at their places in a volume on the source's grid, with its header, and removed. A run may be
killed at any point: what waits is found again, and a volume that is extended keeps what it has.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from guided_diffusion.data.datasets import Entry
from guided_diffusion.data.geometry import grid_of, nifti_like, place
from guided_diffusion.files import atomic_write

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
        self.complete: dict[str, bool] = {}

    def holds(self, entry: Entry) -> bool:
        """Whether a slice that is recorded as finished waits, or is in its volume."""
        volume = entry.volume
        if volume not in self.complete:
            self.complete[volume] = all(self._written(volume, kind) is not None for kind in KINDS)
        return self.complete[volume] or self._slice(entry).exists()

    def expect(self, entries: Iterable[Entry], *, elsewhere: Container[str] = ()) -> None:
        """Declare the slices still to come; a volume is written when its last one is there.

        Other processes write the volumes ``elsewhere``.
        """
        self.missing = Counter(entry.volume for entry in entries)
        self.source = {v: path for v, path in self.source.items() if v not in elsewhere}

    def keep(self, entry: Entry, maps: Mapping[str, np.ndarray]) -> None:
        """Store one slice: a map [..., H, W] for each of the :data:`KINDS`."""
        path = self._slice(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            np.savez(part, **{kind: maps[kind] for kind in KINDS})  # type: ignore[arg-type]
        self.missing[entry.volume] -= 1

    def write(self) -> None:
        """Write every volume of which slices wait and none is still to come."""
        for volume, source in self.source.items():
            waiting = self.waiting / volume
            if self.missing[volume] < 1 and waiting.is_dir():
                slices = sorted(waiting.glob("[0-9]*.npz"))
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
        placed = place(grid_of(original), self.plane)
        shape = (*placed.grid.shape, *like.shape[:-2])
        values = np.zeros(shape, like.dtype) if known is None else np.asarray(known.dataobj)
        along = np.moveaxis(values, placed.view.axis, 2)
        for position, plane in planes.items():
            stored = placed.view.turn_back(plane)
            along[:, :, placed.view.position(position)] = np.moveaxis(stored, (-2, -1), (0, 1))

        with atomic_write(self._path(volume, kind)) as part:
            nib.save(nifti_like(original, values.astype(like.dtype), note=self.fingerprint), part)

    def _written(self, volume: str, kind: str) -> Any:
        """The volume as an earlier run with the same settings has left it, or None."""
        path = self._path(volume, kind)
        if not path.exists():
            return None
        nifti: Any = nib.load(path)
        note = nifti.header["descrip"].item()  # without the zeros that fill the field's 80 bytes
        return nifti if note == self.fingerprint.encode() else None

    def _path(self, volume: str, kind: str) -> Path:
        return self.out_dir / f"{volume}_{kind}.nii.gz"

    def _slice(self, entry: Entry) -> Path:
        return self.waiting / entry.volume / f"{entry.plane:04d}.npz"


def _load(path: Path, kind: str) -> np.ndarray:
    with np.load(path) as maps:
        return np.asarray(maps[kind])
