"""Folders, names, pictures and NIfTI slices: everything between the disk and an array.

What lies on disk is checked here, once: a file that cannot be used is a :class:`UserError` that
names it. Called by ``datasets`` and the loaders, one of which there is for each layout.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import is_nifti
from guided_diffusion.errors import UserError

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
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
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def unreadable(path: Path, error: BaseException, kind: str) -> UserError:
    """Say that a file could not be decoded, and why, in one line."""
    why = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        path,
        found=f"a file that cannot be read ({why})",
        expected=f"a {kind}",
        hint="Restore it from the source, or take the case out of the set.",
    )


def read_nifti(path: Path, *, shown: Path | None = None) -> tuple[Array, Affine]:
    """Decode a NIfTI file: float32 array without trailing axes of length 1, its affine [4, 4].

    Values are scaled as the header says and otherwise as stored. Raises :class:`UserError`, naming
    ``shown`` where it is given, if the file cannot be decoded, is empty, or holds colours, complex,
    NaN or infinite values.
    """
    try:
        with np.errstate(all="ignore"):
            nifti: Any = nib.load(path)
            stored = np.asarray(nifti.dataobj)
            if stored.dtype.kind not in "biuf":
                raise ValueError(f"its values are {stored.dtype}")
            values = stored.astype(np.float32)
    except UNREADABLE as error:
        raise unreadable(shown or path, error, "NIfTI image of real numbers") from error
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    _require_finite(shown or path, values)
    return values, np.asarray(nifti.affine, dtype=np.float64)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The shape from the header alone, without trailing axes of length 1."""
    try:
        nifti: Any = nib.load(path)
        shape = tuple(int(length) for length in nifti.shape)
    except UNREADABLE as error:
        raise unreadable(path, error, "NIfTI image") from error
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def nifti_spacing(path: Path) -> tuple[float, ...] | None:
    """The size of a voxel along each axis, in millimetres, from the header alone.

    None where the header does not say it: a size that is zero or no number.
    """
    try:
        nifti: Any = nib.load(path)
        unit = nifti.header.get_xyzt_units()[0]
        sizes = [float(size) for size in nifti.header.get_zooms()]
    except UNREADABLE as error:
        raise unreadable(path, error, "NIfTI image") from error
    scale = {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    if not all(np.isfinite(size) and size > 0 for size in sizes[:3]):
        return None
    return tuple(size * scale for size in sizes[: len(nifti_shape(path))])


def read_nifti_slice(path: Path) -> tuple[Array, Affine]:
    """:func:`read_nifti` for a file that must be two-dimensional, [H, W]."""
    values, affine = read_nifti(path)
    if values.ndim != 2:
        raise UserError(
            path,
            found=f"a volume of {' x '.join(map(str, values.shape))}",
            expected="a two-dimensional slice",
            hint="Cut volumes into slices; whole volumes are read in the BRATS layout only.",
        )
    return values, affine


def require_same_axes(path: Path, affine: Affine, expected: Affine, *, other: Path) -> None:
    """Raise a :class:`UserError` if two files of a case run along other axes, or at other spacing.

    The origin may differ, and an affine without rotation, flip or spacing counts as one not said.
    """
    axes, wanted = affine[:3, :3], expected[:3, :3]
    unsaid = any(np.array_equal(matrix, np.eye(3)) for matrix in (axes, wanted))
    if not unsaid and np.abs(axes - wanted).max() > 0.01:
        codes, wanted_codes = ("".join(map(str, nib.aff2axcodes(a))) for a in (affine, expected))
        raise UserError(
            path,
            found=f"an affine of other axes or spacing ({codes})",
            expected=f"the axes and spacing of {other.name} ({wanted_codes})",
            hint="Resample all files of a case onto one grid.",
        )


def label_mask(path: Path, values: Array) -> Array:
    """Label map -> {0, 1} (above 0 is 1); fractions in [0, 1] are a soft mask and are kept."""
    if np.abs(values - np.round(values)).max() < 1e-3:
        return (np.round(values) > 0).astype(np.float32)
    if values.min() >= 0 and values.max() <= 1:
        return values
    raise UserError(
        path,
        found=f"fractional labels from {values.min():g} to {values.max():g}",
        expected="whole label numbers, or a soft mask in [0, 1]",
        hint="Was an image given as the mask, or the label map interpolated?",
    )


def picture_channels(path: Path) -> int:
    """1 for a grey picture, 3 for a coloured one, from the header alone."""
    with _opened(path) as picture:
        return 1 if _is_grey(picture) else 3


def read_picture(path: Path, *, channels: int) -> Tensor:
    """Decode a picture to float32 [channels, H, W] in [0, 1].

    Grey is repeated where 3 channels are asked for; transparency is dropped; orientation tags are
    ignored, as masks rarely carry them. A coloured picture in a grey set is a :class:`UserError`.
    """
    values = _levels(path, _decoded(path))
    if values.ndim == 2:
        return torch.from_numpy(values).expand(channels, -1, -1).clone()
    if channels == 3:
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    return torch.from_numpy(_one_channel(path, values, "a grey picture as the rest of the set"))[
        None
    ]


def read_picture_mask(path: Path) -> Tensor:
    """Decode a mask picture to float32 [1, H, W] in [0, 1], soft borders kept.

    A palette picture is a label map: index above 0 is 1. So is a lossless grey one whose brightest
    value is below an eighth of white (labels 0, 1, 2, ...). A coloured mask, one drawn in its
    transparency and labels in a JPEG are each a :class:`UserError`.
    """
    picture = _decoded(path)
    _require_opaque(path, picture)
    if picture.mode == "P":
        return torch.from_numpy((np.asarray(picture) > 0).astype(np.float32))[None]

    values = _levels(path, picture)
    if values.ndim == 3:
        values = _one_channel(path, values, "a grey, black-and-white or palette mask")
    if picture.mode != "F" and 0 < values.max() < 1 / 8:
        _require_lossless(path, picture, values)
        values = (values > 0).astype(np.float32)
    return torch.from_numpy(values)[None]


def _require_opaque(path: Path, picture: Image.Image) -> None:
    """Where transparency draws the mask, its colours may be black all over."""
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        low, high = picture.getchannel(picture.getbands()[-1]).getextrema()
        if low != high:
            raise UserError(
                path,
                found="a mask with transparent and opaque parts",
                expected="a mask that is told by its grey values",
                hint="Save it in black and white, without an alpha channel.",
            )


def _require_lossless(path: Path, picture: Image.Image, values: Array) -> None:
    """JPEG blurs small numbers: labels 0, 1, 2 cannot be told from its noise."""
    if picture.format in ("JPEG", "MPO"):
        raise UserError(
            path,
            found=f"a JPEG mask whose brightest value is {round(values.max() * 255)}",
            expected="white for the foreground in a JPEG",
            hint="Save label maps as PNG.",
        )


def image_channels(path: Path) -> int:
    """1 for a NIfTI file or a grey picture, 3 for a coloured picture, from the header alone."""
    return 1 if is_nifti(path) else picture_channels(path)


def read_image_file(path: Path, *, channels: int) -> tuple[Tensor, Affine | None]:
    """One image of either kind, float32 [channels, H, W], and the affine of a NIfTI slice."""
    if not is_nifti(path):
        return read_picture(path, channels=channels), None
    values, affine = read_nifti_slice(path)
    return torch.from_numpy(values)[None], affine


def read_mask_file(path: Path, classes: Classes | None = None) -> Tensor:
    """One mask of either kind, float32 [1, H, W] in [0, 1], or [K, H, W] of K classes."""
    if is_nifti(path):
        return class_masks(path, read_nifti_slice(path)[0], classes)
    if classes is None:
        return read_picture_mask(path)
    return torch.from_numpy(classes.split(_stored_labels(path), path))


def class_masks(path: Path, values: Array, classes: Classes | None) -> Tensor:
    """Labels [H, W] -> float32 [1, H, W] by :func:`label_mask`, or [K, H, W] of K classes."""
    if classes is None:
        return torch.from_numpy(label_mask(path, values))[None]
    return torch.from_numpy(classes.split(values, path))


def _stored_labels(path: Path) -> Array:
    """The labels of a mask picture [H, W]: its palette indices or grey levels, as stored."""
    picture = _decoded(path)
    _require_opaque(path, picture)
    values = np.asarray(picture).astype(np.float32)
    if values.ndim == 3:
        grey = values if values.shape[2] == 3 else np.repeat(values[..., :1], 3, axis=2)
        values = _one_channel(path, grey, "a grey or palette picture of labels")
    _require_finite(path, values)
    _require_lossless(path, picture, values / np.float32(255))
    return values


def label_values(path: Path) -> list[float]:
    """The different values that a mask file stores, sorted: palette indices, levels or labels."""
    if is_nifti(path):
        return [float(value) for value in np.unique(read_nifti(path)[0])]
    return [float(value) for value in np.unique(np.asarray(_decoded(path)))]


def _opened(path: Path) -> Image.Image:
    """The picture with its header read."""
    try:
        return Image.open(path)
    except UNREADABLE as error:
        raise unreadable(path, error, "picture") from error


def _decoded(path: Path) -> Image.Image:
    picture = _opened(path)
    with picture:
        if picture.format in ("TIFF", "GIF") and getattr(picture, "n_frames", 1) > 1:
            raise UserError(
                path,
                found="a file of several pictures",
                expected="one picture per file",
                hint="Split it into single pictures.",
            )
        try:
            picture.load()
            return picture
        except UNREADABLE as error:
            raise unreadable(path, error, "picture") from error


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA", "La", "F", *_DEEP_GREY)


def _levels(path: Path, picture: Image.Image) -> Array:
    """Pixel values in [0, 1], [H, W] for grey modes and [H, W, 3] for all others."""
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
            found=f"values from {values.min():g} to {values.max():g}",
            expected=f"values from 0 to {white}",
            hint="Scale the picture, or store it with 8 or 16 bits.",
        )
    return np.asarray(values / np.float32(white), dtype=np.float32)


def _one_channel(path: Path, values: Array, expected: str) -> Array:
    """[H, W, 3] -> [H, W] where the channels agree up to compression noise."""
    if np.ptp(values, axis=2).max() > 8 / 255:
        raise UserError(
            path,
            found="a coloured picture",
            expected=expected,
            hint="Convert it, or check that images and masks were not swapped.",
        )
    return np.ascontiguousarray(values[..., 0])


def _require_finite(path: Path, values: Array) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise UserError(
            path,
            found="NaN or infinite values" if values.size else "no pixels",
            expected="finite numbers",
            hint="Repair the file, or take the case out of the set.",
        )
