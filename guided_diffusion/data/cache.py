"""Decoded cases on disk, for as long as a run lives: each is read from its source once.

Opening a JPEG or unzipping a slice costs milliseconds, reading an array back a tenth of one. The
arrays lie in a temporary folder that every reading process shares and that the run removes at its
end, so nothing can be stale; the operating system keeps in memory what it has room for. Wired by
the composition root.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from guided_diffusion.data.datasets import Case, ResizedDataset

GIB = 2**30


class CachedDataset(Dataset[Case]):
    """A framed data set that decodes each case once, as far as ``most_bytes`` on disk allow.

    Cases come back bit for bit, without their affine, which training has no use for. The room is
    given to the cases by their index, so that all processes agree on it without talking. A disk
    that is full ends the remembering, not the run.

    Args:
        dataset: cases at the network's size, all of one shape.
        most_bytes: room for arrays; 0 remembers nothing.
        directory: where the temporary folder is made; None for the system's place.
    """

    def __init__(
        self, dataset: ResizedDataset, *, most_bytes: int = 2 * GIB, directory: Path | None = None
    ) -> None:
        self.dataset = dataset
        self.most_bytes = most_bytes
        self.folder = _temporary_folder(self, directory)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, fitted: float32 image [C, h, w], mask [K, h, w] in {0, 1}."""
        path = self.folder / f"{index}.npy"
        try:
            return self._load(path, self.dataset.dataset.names[index])
        except (OSError, ValueError, EOFError):
            case = self.dataset[index]
            if (index + 1) * _bytes(case) <= self.most_bytes:
                self._save(path, case)
            return case._replace(affine=None)

    def _load(self, path: Path, name: str) -> Case:
        with path.open("rb") as file:
            image, mask = np.load(file), np.load(file)
        return Case(
            torch.from_numpy(image),
            torch.from_numpy(mask.astype(np.float32)) if mask.size else None,
            name,
        )

    def _save(self, path: Path, case: Case) -> None:
        """Write a case under its name once it is complete: another process may look for it."""
        part = path.with_suffix(f".{os.getpid()}")
        mask = np.empty(0) if case.mask is None else case.mask.numpy()
        try:
            with part.open("wb") as file:
                np.save(file, case.image.numpy())
                np.save(file, mask.astype(np.uint8))
            part.replace(path)
        except OSError:
            self.most_bytes = 0
            part.unlink(missing_ok=True)


def _temporary_folder(owner: object, directory: Path | None) -> Path:
    """A folder that goes with its owner, or at the end of the process that made it."""
    folder = Path(tempfile.mkdtemp(prefix="decoded-", dir=directory))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder


def _remove(folder: Path, maker: int) -> None:
    """Remove the folder; copies of its owner in reading processes leave it alone."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(case: Case) -> int:
    """What a case takes on disk."""
    return case.image.nbytes + (0 if case.mask is None else case.mask.numel())
