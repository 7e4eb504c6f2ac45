"""The CUSTOM layout: ``images/`` and ``masks/`` with equal stems, as Kvasir-SEG is published too.

Pictures (png, jpg, tif, bmp; grey or colour, 8 or 16 bit) or NIfTI files, slices or whole volumes,
are paired by stem and never by position. :func:`open_custom` opens either, by the first file.
"""

from __future__ import annotations

from pathlib import Path

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import (
    ENDINGS,
    counted,
    image_files,
    is_nifti,
    listing,
    mask_files,
    names_in,
    open_folder,
    safe_name,
    split_name,
    subfolder,
)
from guided_diffusion.data.readers import image_channels, nifti_shape
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse


class CustomDataset(SegmentationDataset):
    """Pairs of ``images/<stem>`` and ``masks/<stem>``: image [1 or 3, H, W], mask [1, H, W].

    The first readable image decides between grey and colour (a grey picture in a coloured set is
    repeated, a coloured one in a grey set is an error). With ``test_flag=True`` the folder
    ``masks`` may be absent, and the images may lie in ``directory`` itself. A case is named by its
    stem.
    """

    layout = "CUSTOM"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        entries = _paired(folder, test_flag=test_flag)
        channels = image_channels([entry.images[0] for entry in entries])
        super().__init__(folder, entries, channels=channels, reading=reading)


class CustomVolumes(VolumeDataset):
    """Pairs of NIfTI volumes, one case per axial slice ``<stem>_slice080``: image [1, H, W]."""

    layout = "CUSTOM"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        volumes = [
            entry._replace(patient=entry.name) for entry in _paired(folder, test_flag=test_flag)
        ]
        super().__init__(folder, volumes, channels=1, reading=reading)


class KvasirDataset(CustomDataset):
    """Kvasir-SEG (Jha et al. 2020), which has the layout of a :class:`CustomDataset`."""

    layout = "KVASIR"


def open_custom(
    directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
) -> SegmentationDataset:
    """Open pairs of pictures or slices, or of volumes; the first image's header decides."""
    folder = open_folder(directory)
    within = subfolder(folder, "images") or folder
    names = (name for name in names_in(within) if not name.startswith("."))
    first = next((within / name for name in names if split_name(name)[1] in ENDINGS), None)
    if first is not None and is_nifti(first) and len(nifti_shape(first)) > 2:
        return CustomVolumes(folder, test_flag, reading)
    return CustomDataset(folder, test_flag, reading)


def _paired(folder: Path, *, test_flag: bool) -> list[Entry]:
    """List one entry per stem, with its mask unless there are none; all pairs must be complete."""
    hint = f"Pass the folder that holds masks/ and images/, with {' '.join(ENDINGS)} files."
    images = _files_in(folder, "images", hint=hint, bare=test_flag)
    hint = "Add masks/ with one mask per image, of the same stem: training needs them."
    masks = _files_in(folder, "masks", hint=hint, optional=test_flag)
    if masks:
        _require_pairs(folder, images, masks)
        images = {stem: path for stem, path in images.items() if stem in masks}
    if not images:
        raise UserError(
            folder,
            "no image has a mask of the same stem",
            "Rename the files so that each pair has one stem.",
        )
    _require_one_kind([*images.values(), *masks.values()])
    return [Entry(safe_name(stem), (path,), masks.get(stem)) for stem, path in images.items()]


def _files_in(
    folder: Path, name: str, *, hint: str, bare: bool = False, optional: bool = False
) -> dict[str, Path]:
    """List the files of ``images/`` or ``masks/`` by stem; ``bare`` ones may lie in the folder."""
    within = subfolder(folder, name) or (folder if bare else None)
    files = mask_files if name == "masks" else image_files
    found = files(within) if within is not None else {}
    if not found and not optional:
        missing = f"folder {name}" if within is None else name.removesuffix("s")
        raise UserError(within or folder, f"has no {missing}", hint)
    return found


def _require_pairs(folder: Path, images: dict[str, Path], masks: dict[str, Path]) -> None:
    hint = "Rename the files so that each pair has one stem, or remove the single ones."
    for stems, kind in ((images.keys() - masks, "mask"), (masks.keys() - images, "image")):
        if stems:
            problem = f"has {counted(len(stems), 'stem')} without {kind}: {listing(sorted(stems))}"
            refuse(UserError(folder, problem, hint, cases=stems))


def _require_one_kind(paths: list[Path]) -> None:
    """Refuse NIfTI files among pictures: their first axis is x, not y, so pairs would not match."""
    first = is_nifti(paths[0])
    for path in paths:
        if is_nifti(path) != first:
            raise UserError(
                path,
                f"NIfTI files and pictures are mixed in one data set, as with {paths[0].name}",
                "Convert the images and masks to the same format.",
            )
