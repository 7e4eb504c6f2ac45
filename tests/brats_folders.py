"""BraTS folders of a few voxels, for the tests of everything that reads or writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from guided_diffusion.data import volumes

ALL = ("t1", "t1ce", "t2", "flair", "seg")
LONG = "brats_train_001_{}_080_w.nii.gz"
AFFINE = np.array([[-1.0, 0, 0, 5], [0, -2, 0, 239], [0, 0, 3, 7], [0, 0, 0, 1]])
SIZE, DEPTH = (6, 8), 5


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE, **header: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def flat(name: str) -> np.ndarray:
    """A slice with one bright voxel, whose value depends on the modality."""
    values = np.zeros(SIZE, np.float32)
    values[1, 2] = 4 if name == "seg" else 10 * (1 + ALL.index(name))
    return values


def write_slice(folder: Path, form: str = LONG, names: tuple[str, ...] = ALL) -> Path:
    for name in names:
        save(folder / form.format(name), flat(name))
    return folder


def solid(name: str, case: int = 0) -> np.ndarray:
    """A volume of distinct voxels, with a blank bottom and top."""
    if name == "seg":
        labels = np.zeros((*SIZE, DEPTH), np.uint8)
        labels[1, 2, 1:4] = 1, 2, 4
        return labels
    start = 1000 * ALL.index(name) + 100 * case
    values = start + np.arange(np.prod((*SIZE, DEPTH)), dtype=np.int16).reshape((*SIZE, DEPTH))
    values[..., 0] = values[..., -1] = 0
    return values


def write_volumes(
    folder: Path,
    cases: tuple[str, ...] = ("p1", "p2"),
    names: tuple[str, ...] = ALL,
    end: str = "gz",
) -> Path:
    for number, case in enumerate(cases):
        for name in names:
            ending = ".nii.gz" if end == "gz" else ".nii"
            save(folder / case / f"{case}_{name}{ending}", solid(name, number))
    return folder


def volume(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    nifti = nib.load(path)
    return np.asarray(nifti.dataobj), nifti


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the volumes that are decoded from now on."""
    decoded: list[str] = []
    read = volumes.read_nifti

    def read_nifti(path: Path, *, shown: Path | None = None, **more: Any) -> object:
        decoded.append((shown or path).name)
        return read(path, shown=shown, **more)

    monkeypatch.setattr(volumes, "read_nifti", read_nifti)
    return decoded
