"""One's own folders: ``images/`` and ``masks/`` with equal stems, the way Kvasir-SEG comes too.

Pictures (png, jpg, tif, bmp; grey or colour, 8 or 16 bit) or NIfTI files, slices or whole volumes,
paired by stem and never by position. :func:`open_custom` looks at the first file to tell which it
is. Called by ``layouts``.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import (
    ENDINGS,
    image_files,
    is_nifti,
    listing,
    names_in,
    open_folder,
    safe_name,
    split_name,
    subfolder,
)
from guided_diffusion.data.readers import (
    Affine,
    image_channels,
    nifti_shape,
    read_image_file,
    read_mask_file,
)
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse


class CustomDataset(SegmentationDataset):
    """Pairs of ``images/<stem>`` and ``masks/<stem>``: image [1 or 3, H, W], mask [1, H, W].

    The first readable image decides between grey and colour (a grey picture in a coloured set is
    repeated, the other way round is an error). With ``test_flag=True`` the folder ``masks`` may be
    absent, and the images may lie in ``directory`` itself. A case is called by its stem.
    """

    layout = "CUSTOM"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        entries = _paired(folder, test_flag=test_flag)
        super().__init__(folder, entries, channels=_channels(entries), reading=reading)

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Decode the image: pictures in [0, 1], NIfTI slices as stored and with their affine."""
        return read_image_file(entry.images[0], channels=self.channels)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the mask, float32 [K, H, W] in [0, 1]."""
        return None if entry.mask is None else read_mask_file(entry.mask, self.classes)


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
    """Kvasir-SEG (Jha et al. 2020), which comes as a :class:`CustomDataset`."""

    layout = "KVASIR"


def open_custom(
    directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
) -> SegmentationDataset:
    """Open pairs of pictures or slices, or of volumes, told apart by the first image's header."""
    folder = open_folder(directory)
    within = subfolder(folder, "images") or folder
    names = (name for name in names_in(within) if not name.startswith("."))
    first = next((within / name for name in names if split_name(name)[1] in ENDINGS), None)
    if first is not None and is_nifti(first) and len(nifti_shape(first)) > 2:
        return CustomVolumes(folder, test_flag, reading)
    return CustomDataset(folder, test_flag, reading)


def _paired(folder: Path, *, test_flag: bool) -> list[Entry]:
    """One entry per stem, with its mask unless there are none; checks that pairs are complete."""
    images = _image_files(folder, bare=test_flag)
    masks = _mask_files(folder, optional=test_flag)
    if masks:
        _require_pairs(folder, images, masks)
        images = {stem: path for stem, path in images.items() if stem in masks}
    if not images:
        raise UserError(
            folder,
            found="no image that has a mask",
            expected="images and masks of equal stems",
            hint="Rename the files so that each pair has one stem.",
        )
    _require_one_kind([*images.values(), *masks.values()])
    return [Entry(safe_name(stem), (path,), masks.get(stem)) for stem, path in images.items()]


def _image_files(folder: Path, *, bare: bool) -> dict[str, Path]:
    within = subfolder(folder, "images") or (folder if bare else None)
    found = image_files(within) if within is not None else {}
    if not found:
        raise UserError(
            within or folder,
            found="no folder images" if within is None else "no image",
            expected=f"images/ with {' '.join(ENDINGS)} files beside masks/",
            hint="Pass the folder that holds images and masks.",
        )
    return found


def _mask_files(folder: Path, *, optional: bool) -> dict[str, Path]:
    within = subfolder(folder, "masks")
    found = image_files(within) if within is not None else {}
    if not found and not optional:
        raise UserError(
            within or folder,
            found="no folder masks" if within is None else "no mask",
            expected="masks/ with one mask per image, of the same stem",
            hint="Add the masks: training needs them.",
        )
    return found


def _channels(entries: list[Entry]) -> int:
    """What the first image has that can be read; the first one's error where none can."""
    errors: list[UserError] = []
    for entry in entries:
        try:
            return image_channels(entry.images[0])
        except UserError as error:
            errors.append(error)
    if errors:
        refuse(errors[0])
    return 3


def _require_pairs(folder: Path, images: dict[str, Path], masks: dict[str, Path]) -> None:
    for lonely, kind in ((images.keys() - masks, "mask"), (masks.keys() - images, "image")):
        if lonely:
            error = UserError(
                folder,
                found=f"{len(lonely)} stems without {kind}: {listing(sorted(lonely))}",
                expected="images and masks of equal stems",
                hint="Rename the files so that each pair has one stem, or remove the single ones.",
                cases=lonely,
            )
            refuse(error)


def _require_one_kind(paths: list[Path]) -> None:
    """A NIfTI file's first axis runs along x, a picture's along y: a mixed pair would be turned."""
    first = is_nifti(paths[0])
    for path in paths:
        if is_nifti(path) != first:
            raise UserError(
                path,
                found="NIfTI files and pictures in one set",
                expected=f"files of one kind as {paths[0].name}",
                hint="Convert the images and masks to the same format.",
            )
