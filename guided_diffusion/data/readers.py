"""Decoding of NIfTI files, pictures and masks to float32 arrays and tensors.

Every file is checked here, once: one that cannot be used is a :class:`UserError` that names it.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import is_nifti
from guided_diffusion.data.geometry import (
    Affine,
    Grid,
    Placed,
    grid_of,
    place,
    plane_affine,
    require_view,
    size_of,
)
from guided_diffusion.errors import UserError, refuse

Array = npt.NDArray[np.float32]
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    Image.DecompressionBombError,
)
_TAGGED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def image_channels(paths: Sequence[Path]) -> int:
    """Return 1 if the first readable image is NIfTI or grey and 3 if it is coloured.

    Only headers are read. Where no image is readable, the first one's error is refused.
    """
    errors: list[UserError] = []
    for path in paths:
        try:
            if is_nifti(path):
                return 1
            with _opened(path) as picture:
                return 1 if _is_grey(picture) else 3
        except UserError as error:
            errors.append(error)
    if errors:
        refuse(errors[0])
    return 3


def read_image_file(path: Path, *, channels: int) -> tuple[Tensor, Affine | None]:
    """Read a picture or NIfTI slice, float32 [channels, H, W], and the affine of the latter."""
    if not is_nifti(path):
        return read_picture(path, channels=channels), None
    values, placed = read_nifti_slice(path)
    return torch.from_numpy(values)[None], plane_affine(placed)


def read_mask_file(
    path: Path, classes: Classes | None = None, *, like: tuple[Path, Placed] | None = None
) -> Tensor:
    """Read a mask of either kind, float32 [1, H, W] in [0, 1], or [K, H, W] of K classes.

    ``like`` is the image's file and where it lies, for a mask in NIfTI.
    """
    if is_nifti(path):
        return class_masks(path, read_nifti_slice(path, like=like)[0], classes)
    if classes is None:
        return read_picture_mask(path)
    return torch.from_numpy(classes.split(_stored_labels(path), path))


def class_masks(path: Path, values: Array, classes: Classes | None) -> Tensor:
    """Turn labels [H, W] into float32 [1, H, W] by :func:`label_mask`, or [K, H, W] of classes."""
    if classes is None:
        return torch.from_numpy(label_mask(path, values))[None]
    return torch.from_numpy(classes.split(values, path))


def label_mask(path: Path, values: Array) -> Array:
    """Turn labels into {0, 1} (above 0 is 1); fractions in [0, 1] are a soft mask and are kept."""
    if np.abs(values - np.round(values)).max() < 1e-3:
        return (np.round(values) > 0).astype(np.float32)
    if values.min() >= 0 and values.max() <= 1:
        return values
    raise UserError(
        path,
        f"has fractional labels from {values.min():g} to {values.max():g}; a mask has whole "
        "labels, or is soft in [0, 1]",
        "Check that it is a mask, not an image, and that it was not interpolated.",
    )


def label_values(path: Path) -> list[float]:
    """List the different values that a mask file stores: palette indices, levels or labels."""
    if is_nifti(path):
        return [float(value) for value in np.unique(read_nifti(path)[0])]
    return [float(value) for value in np.unique(np.asarray(_decoded(path)))]


def read_nifti(path: Path, *, shown: Path | None = None) -> tuple[Array, Grid]:
    """Decode a NIfTI file: float32 array without trailing axes of length 1, and its grid.

    Values are scaled as the header says and otherwise as stored, and lie as stored. Raises
    :class:`UserError`, naming ``shown`` where it is given, if the file cannot be decoded, is empty,
    or holds colours or complex, NaN or infinite values.
    """
    with decoding(shown or path, "NIfTI image of real numbers"), np.errstate(all="ignore"):
        nifti: Any = nib.load(path)
        stored = np.asarray(nifti.dataobj)
        if stored.dtype.kind not in "biuf":
            raise ValueError(f"its values are {stored.dtype}")
        values, grid = stored.astype(np.float32), grid_of(nifti)
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    _require_finite(shown or path, values)
    return values, grid


def read_nifti_slice(
    path: Path, *, like: tuple[Path, Placed] | None = None
) -> tuple[Array, Placed]:
    """Read a NIfTI file of one plane, float32 [H, W] as :mod:`geometry` turns it, and its place.

    ``like`` is another file of the case and its place: the plane is brought onto its grid. Raises
    :class:`UserError` as :func:`read_nifti` does, for a file of another number of axes, and where
    the two do not coincide.
    """
    values, grid = read_nifti(path)
    if grid.slicing is None:
        raise UserError(
            path,
            f"its shape is {size_of(values.shape)}, but a slice has two axes",
            "Cut volumes into slices; volumes are read in the BRATS and CUSTOM layouts.",
        )
    other, placed = like or (path, place(grid))
    view = require_view(path, grid, placed, other=other)
    plane = values.reshape(grid.lengths)
    return plane if view.is_plain else np.ascontiguousarray(view.turn(plane)), placed


def read_grid(path: Path) -> Grid:
    """Read where the voxels of a NIfTI file lie, from the header alone."""
    with decoding(path, "NIfTI image"):
        return grid_of(nib.load(path))


def unstated_note(files: Iterable[Path]) -> list[str]:
    """Say so where the header of one of these files states no orientation; others are passed by."""
    for path in filter(is_nifti, files):
        with suppress(UserError):
            if not read_grid(path).stated:
                return [
                    f"headers such as that of {path} state no orientation: their arrays are taken "
                    "as they lie"
                ]
    return []


def nifti_shape(path: Path) -> tuple[int, ...]:
    """Read the shape from the header alone; a slice has two axes, wherever its third is stored."""
    return read_grid(path).lengths


def read_picture(path: Path, *, channels: int) -> Tensor:
    """Decode a picture to float32 [channels, H, W] in [0, 1].

    Grey is repeated for 3 channels, transparency is dropped, and an orientation in EXIF is applied.
    A coloured picture for 1 channel is a :class:`UserError`.
    """
    values = _levels(path, _decoded(path))
    if values.ndim == 2:
        return torch.from_numpy(values).expand(channels, -1, -1).clone()
    if channels == 3:
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    return torch.from_numpy(_one_channel(path, values, "the rest of the data set is grey"))[None]


def read_picture_mask(path: Path) -> Tensor:
    """Decode a mask picture to float32 [1, H, W] in [0, 1]; soft borders are kept.

    A palette picture is a label map, in which indices above 0 become 1. So is a lossless grey one
    whose brightest value is below an eighth of white (labels 0, 1, 2, ...). A coloured mask, a mask
    drawn in the alpha channel and labels in a JPEG are each a :class:`UserError`.
    """
    picture = _decoded(path)
    _require_opaque(path, picture)
    if picture.mode == "P":
        return torch.from_numpy((np.asarray(picture) > 0).astype(np.float32))[None]

    values = _levels(path, picture)
    if values.ndim == 3:
        values = _one_channel(path, values, "a mask is grey, black and white or a palette")
    if picture.mode != "F" and 0 < values.max() < 1 / 8:
        _require_lossless(path, picture, values)
        values = (values > 0).astype(np.float32)
    return torch.from_numpy(values)[None]


def _stored_labels(path: Path) -> Array:
    """Read the labels of a mask picture [H, W]: its palette indices or grey levels, as stored."""
    picture = _decoded(path)
    _require_opaque(path, picture)
    values = np.asarray(picture).astype(np.float32)
    if values.ndim == 3:
        grey = values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2)
        values = _one_channel(path, grey, "a label map is grey or a palette")
    _require_finite(path, values)
    _require_lossless(path, picture, values / np.float32(255))
    return values


def _decoded(path: Path) -> Image.Image:
    picture = _opened(path)
    with picture:
        if picture.format in ("TIFF", "GIF") and getattr(picture, "n_frames", 1) > 1:
            raise UserError(path, "holds several pictures", "Split it into single pictures.")
        with decoding(path, "picture"):
            picture.load()
            upright(picture)
        return picture


def upright(picture: Image.Image) -> None:
    """Turn a decoded picture in place as the orientation in its EXIF says, as viewers do."""
    if not any(key in picture.info for key in _TAGGED):
        return
    with warnings.catch_warnings(action="ignore"), suppress(*UNREADABLE, KeyError, TypeError):
        ImageOps.exif_transpose(picture, in_place=True)  # damaged EXIF states nothing


def _opened(path: Path) -> Image.Image:
    """The picture with its header read."""
    with decoding(path, "picture"):
        return Image.open(path)


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA", "La", "F", *_DEEP_GREY)


def _levels(path: Path, picture: Image.Image) -> Array:
    """Return pixel values in [0, 1], [H, W] for grey modes and [H, W, 3] for all others."""
    if picture.mode == "F":
        values, white = np.asarray(picture, dtype=np.float32), 1
    elif picture.mode in _DEEP_GREY:
        values, white = np.asarray(picture).astype(np.float32), 65535
    else:
        opaque = picture.convert("RGBA") if picture.mode == "P" else picture
        converted = opaque.convert("L" if _is_grey(picture) else "RGB")
        values, white = np.asarray(converted).astype(np.float32), 255

    _require_finite(path, values)
    if values.min() < 0 or values.max() > white:
        raise UserError(
            path,
            f"has values from {values.min():g} to {values.max():g}, outside of 0 to {white}",
            "Scale the picture, or store it with 8 or 16 bits.",
        )
    return np.asarray(values / np.float32(white), dtype=np.float32)


def _one_channel(path: Path, values: Array, rule: str) -> Array:
    """Reduce [H, W, 3] to [H, W] where the channels agree up to compression noise."""
    if np.ptp(values, axis=2).max() > 8 / 255:
        raise UserError(
            path,
            f"is a coloured picture, but {rule}",
            "Convert it, or check that images and masks were not swapped.",
        )
    return np.ascontiguousarray(values[..., 0])


def _require_opaque(path: Path, picture: Image.Image) -> None:
    """Refuse a mask drawn in its alpha channel, for its colours may be black all over."""
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        low, high = picture.getchannel(picture.getbands()[-1]).getextrema()
        if low != high:
            raise UserError(
                path,
                "the mask has transparent and opaque parts, but only its grey values are read",
                "Save it in black and white, without an alpha channel.",
            )


def _require_lossless(path: Path, picture: Image.Image, values: Array) -> None:
    """Refuse a label map as JPEG, whose compression noise hides labels such as 0, 1, 2."""
    if picture.format in ("JPEG", "MPO"):
        raise UserError(
            path,
            f"is a JPEG mask whose brightest value is {round(values.max() * 255)}; the foreground "
            "of a JPEG must be white",
            "Save label maps as PNG.",
        )


def _require_finite(path: Path, values: Array) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise UserError(
            path,
            "has NaN or infinite values" if values.size else "has no pixels",
            "Repair the file, or remove the case from the data set.",
        )


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn an error of the disk or the format into a :class:`UserError` that names ``path``."""
    try:
        yield
    except UNREADABLE as error:
        raise unreadable(path, error, kind) from error


def unreadable(path: Path, error: BaseException, kind: str) -> UserError:
    """The error of a file that cannot be decoded as a ``kind``, with the reason in one line."""
    why = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        path,
        f"cannot be read as a {kind} ({why})",
        "Restore it from the source, or remove the case from the data set.",
    )
