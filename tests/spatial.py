"""NIfTI files of one small scene in any orientation, for the tests of everything spatial."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

SHAPE = (12, 10, 6)
LPS = np.array([[-2.0, 0, 0, 23], [0, -2.5, 0, 31], [0, 0, 4, -7], [0, 0, 0, 1]])


def oblique() -> np.ndarray:
    """An affine that is nearest to LPS, turned by 0.2 and 0.1 rad."""
    c, s, k, t = np.cos(0.2), np.sin(0.2), np.cos(0.1), np.sin(0.1)
    turn = np.eye(4)
    turn[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, k, -t], [0, t, k]]
    return turn @ LPS


def head() -> np.ndarray:
    """An image of distinct voxels, float32, as LPS."""
    return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def lesion() -> np.ndarray:
    """A label in a corner, so that every flip and permutation shows, as LPS."""
    values = np.zeros(SHAPE, np.uint8)
    values[1:5, 2:4, 1:3] = 1
    return values


def stored(values: np.ndarray, codes: str = "LPS", affine: np.ndarray = LPS) -> nib.Nifti1Image:
    """An image that lies as LPS with ``affine``, as it is stored in another orientation."""
    image = nib.Nifti1Image(values, affine)
    return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))


def bare(values: np.ndarray, sizes: tuple[float, ...] = (1, 1, 1)) -> nib.Nifti1Image:
    """An image whose header states no orientation: its codes are 0."""
    image = nib.Nifti1Image(values, np.diag((*sizes, 1.0)))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    return image


def put(path: Path, image: nib.Nifti1Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def pair(folder: Path, image: nib.Nifti1Image, mask: nib.Nifti1Image, name: str = "a") -> Path:
    """A case of the CUSTOM layout; its folder."""
    put(folder / f"images/{name}.nii.gz", image)
    put(folder / f"masks/{name}.nii.gz", mask)
    return folder
