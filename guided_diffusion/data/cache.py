"""A cache of decoded cases on disk that lasts as long as a run: each source is decoded once.

Opening a JPEG or unzipping a slice takes milliseconds, reading an array back a tenth of one. The
arrays lie in a temporary folder that all reading processes share and that the run removes at its
end, so nothing can be stale; the operating system keeps as much of it in memory as fits.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from guided_diffusion.data.datasets import Case
from guided_diffusion.data.frames import ResizedDataset
from guided_diffusion.errors import UserError
from guided_diffusion.files import create, make_folder, remove_leftovers, temporary_name

GIB = 2**30
_OWN = re.compile(r"[0-9a-f]{32}(\.nii|\.json)?|\.part-.*|dicom")


class CachedDataset(Dataset[Case]):
    """A resized data set that decodes each case once, within ``most_bytes`` on disk.

    Cached cases are bit-identical, but without their affine, which training does not need. The
    first cases by index are cached, so that all processes agree without communicating. A full disk
    ends the caching, not the run; without a folder to cache in, ``note`` says so.

    Args:
        dataset: cases at the network's size, all of one shape.
        most_bytes: disk space for the arrays; 0 caches nothing.
        directory: where the temporary folder is made; None for the system's default.
    """

    def __init__(
        self, dataset: ResizedDataset, *, most_bytes: int = 2 * GIB, directory: Path | None = None
    ) -> None:
        self.dataset = dataset
        self.most_bytes = most_bytes
        self.note = ""
        try:
            self.folder = temporary_folder(self, directory)
        except OSError as error:
            self.most_bytes, self.folder = 0, Path(os.devnull)
            self.note = (
                f"no temporary folder can be made ({error.strerror}), so every case is decoded "
                "each time it is used: free some space, or set TMPDIR"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, resized: float32 image [C, h, w], mask [K, h, w] in {0, 1}.

        The masks of several raters are cached with it.
        """
        path = self.folder / f"{index}.npy"
        try:
            return self._load(path, self.dataset.dataset.names[index])
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError):
            case = self.dataset[index]
            if (index + 1) * _bytes(case) <= self.most_bytes:
                self._save(path, case)
            return case._replace(affine=None)

    def _load(self, path: Path, name: str) -> Case:
        with path.open("rb") as file:
            image, mask, raters = np.load(file), np.load(file), np.load(file)
        return Case(torch.from_numpy(image), _unpacked(mask), name, raters=_unpacked(raters))

    def _save(self, path: Path, case: Case) -> None:
        """Write a case, renaming it once it is complete: another process may look for it."""
        part = path.with_name(temporary_name(path.name))
        try:
            with os.fdopen(create(part, mode=0o600), "wb") as file:
                np.save(file, case.image.numpy())
                for masks in (case.mask, case.raters):
                    np.save(file, np.zeros(0, np.uint8) if masks is None else _packed(masks))
            part.replace(path)
        except OSError:
            self.most_bytes = 0
            with suppress(OSError):
                part.unlink(missing_ok=True)


def private_folder(path: Path) -> Path:
    """Make a folder for copies of patients' data that nobody but this user can look into.

    A folder that is there already and that others can look into gets a private one below it, unless
    it is this user's and holds nothing but such copies: then it becomes private itself.

    Raises:
        UserError: it cannot be made or written to, or belongs to another user.
    """
    user = getattr(os, "getuid", int)()  # Windows has neither numbers of users nor these modes
    if os.name == "posix" and path.exists() and not _is_private(path, user):
        path = path / f"user-{user}"
    make_folder(path, flag="--cache_dir", mode=0o700)
    if os.name == "posix" and not _is_private(path, user):
        problem = "belongs to another user, or others can look into it"
        raise UserError(f"--cache_dir {path}", problem, "Choose another --cache_dir.")
    return path


def _is_private(path: Path, user: int) -> bool:
    try:
        facts = path.stat()
        if facts.st_uid != user or facts.st_mode & 0o022:
            return False
        if facts.st_mode & 0o077 and all(_OWN.fullmatch(entry.name) for entry in path.iterdir()):
            path.chmod(0o700)
            return True
    except OSError:
        return False
    return not facts.st_mode & 0o077


def temporary_folder(owner: object, directory: Path | None) -> Path:
    """Make a folder that is removed with its owner, or when the process that made it ends.

    Those that killed processes have left are removed first.
    """
    remove_leftovers(directory or Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=temporary_name("", "decoded"), dir=directory))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder


def _remove(folder: Path, maker: int) -> None:
    """Remove the folder in the process that made it; copies of the owner in workers keep it."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(masks: Tensor) -> NDArray[np.uint8]:
    return np.asarray(masks.numpy(), dtype=np.uint8)


def _unpacked(masks: NDArray[np.uint8]) -> Tensor | None:
    return torch.from_numpy(masks.astype(np.float32)) if masks.size else None


def _bytes(case: Case) -> int:
    """The size of a case on disk."""
    masks = (case.mask, case.raters)
    return case.image.nbytes + sum(mask.numel() for mask in masks if mask is not None)
