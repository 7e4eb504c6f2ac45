"""The files of one case: pictures as PNG, and NIfTI on the grid of the case's own file."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from guided_diffusion.data.classes import each
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.folders import is_nifti
from guided_diffusion.data.geometry import grid_of, nifti_like, place, restored
from guided_diffusion.ensemble import UNCERTAINTIES
from guided_diffusion.files import atomic_write
from guided_diffusion.inference.rendering import combined_uncertainty, draw_overlay, soft_maps
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.report.pictures import write_picture


def write_case(
    out_dir: Path, case: Case, result: Segmentation, *, save_members: bool = True
) -> None:
    """Write the pictures of one case, each at the case's own size.

    ``<name>_output_ens.png`` (soft, 8 bit), ``<name>_mask.png`` (0 and 255),
    ``<name>_uncertainty.png`` (255 is the largest value that the measure can have),
    ``<name>_output<i>.png`` (the members, soft), ``<name>_overlay.png`` and, where the network has
    one, ``<name>_coarse.png`` (its coarse mask, soft). Of declared classes the mask is the label
    map, the soft ones are ``<name>_output_ens_<class>.png`` and ``<name>_output<i>_<class>.png``,
    and the uncertainty is the largest of the classes. Without ``save_members`` there are no files
    of members, and earlier ones are removed.
    """
    stem = f"{out_dir / case.name}"
    one = result.classes is None
    members = len(result.members) if save_members else 0
    pictures = {
        "mask": soft_png(result.mask.float()) if one else result.labels.numpy(),
        "uncertainty": soft_png(combined_uncertainty(result) / UNCERTAINTIES[result.measure].most),
        **{kind: soft_png(values) for kind, values in soft_maps(result, members=members)},
        "overlay": draw_overlay(case, result),
    }
    for kind, pixels in pictures.items():
        write_picture(Path(f"{stem}_{kind}.png"), pixels)
    for _, end in each(result.classes):
        _remove_members(stem, end, first=members)


def write_nifti(
    out_dir: Path, case: Case, result: Segmentation, *, source: Path | None = None
) -> None:
    """Write fused mask, binary mask and uncertainty of a NIfTI slice.

    They have the shape, the affine and the header of ``source``, from which the case was read; the
    case's affine where it is no NIfTI file. Declared classes are the fourth axis of the fused mask,
    and the values of the other.
    """
    for kind, values in maps_of(result).items():
        if source is not None and is_nifti(source):
            image = _on_grid_of(source, values)
        else:
            own = np.moveaxis(values, 0, -1)[:, :, None] if values.ndim == 3 else values
            image = nib.Nifti1Image(own, case.affine)
        with atomic_write(out_dir / f"{case.name}_{kind}.nii.gz") as part:
            nib.save(image, part)


def _on_grid_of(source: Path, values: np.ndarray) -> Any:
    """Make an image of nibabel of a plane [..., H, W] as it was read from a slice."""
    original: Any = nib.load(source)
    stored = restored(place(grid_of(original)), values, axes=original.ndim)
    return nifti_like(original, stored)


def maps_of(result: Segmentation) -> dict[str, np.ndarray]:
    """What is written as NIfTI, by the end of its name."""
    return {
        "output_ens": result.fused.numpy(),
        "mask": result.labels.numpy(),
        "uncertainty": combined_uncertainty(result).numpy(),
    }


def _remove_members(stem: str, end: str, *, first: int) -> None:
    """Remove what an earlier run with more members has left: scoring would take it for ours."""
    for index in count(first):
        surplus = Path(f"{stem}_output{index}{end}.png")
        if not surplus.exists():
            return
        surplus.unlink()
