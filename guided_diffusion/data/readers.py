"""Decoding of NIfTI files, pictures and masks to float32 arrays and tensors.

Every file is checked here, once: one that cannot be used is a :class:`UserError` that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from guided_diffusion.data.decoding import (
    UNREADABLE,
    decoded_picture,
    decoding,
    load_nifti,
    opened_picture,
)
from guided_diffusion.data.folders import is_nifti, size_of
from guided_diffusion.data.geometry import (
    Affine,
    Grid,
    Placed,
    grid_of,
    place,
    plane_affine,
    require_view,
    spatial,
)
from guided_diffusion.data.limits import nifti_header
from guided_diffusion.errors import UserError, refuse

Array = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


MOST_HEADERS = 200


class StoredLabels(NamedTuple):
    """What a mask file holds, [H, W] or [H, W, D] of any real type.

    ``lossy`` says that it is a JPEG, ``indexed`` that its values are indices into colours.
    """

    values: Stored
    lossy: bool = False
    indexed: bool = False


def image_channels(paths: Sequence[Path]) -> int:
    """Return 1 for NIfTI files and grey pictures, and 3 where any picture is coloured.

    Only the headers of at most 200 pictures, evenly spread, are read, and the pixels of those that
    have three channels among grey ones. Where none is readable, the first one's error is refused.
    """
    count = min(len(paths), MOST_HEADERS)
    errors: list[UserError] = []
    greys = 0
    coloured: list[Path] = []
    for path in (paths[i * len(paths) // count] for i in range(count)):
        try:
            if is_nifti(path):
                return 1
            with opened_picture(path) as picture:
                grey = _is_grey(picture)
        except UserError as error:
            errors.append(error)
            continue
        greys += grey
        coloured += [] if grey else [path]
    if errors and not greys and not coloured:
        refuse(errors[0])
    return 3 if not greys or any(map(_shows_colour, coloured)) else 1


def _shows_colour(path: Path) -> bool:
    """Whether a picture of three channels is more than grey, as far as it can be read."""
    try:
        return not _agree(_levels(path, decoded_picture(path)))
    except UserError:
        return False


def read_image_file(path: Path, *, channels: int) -> tuple[Tensor, Affine | None]:
    """Read a picture or NIfTI slice, float32 [channels, H, W], and the affine of the latter."""
    if not is_nifti(path):
        return read_picture(path, channels=channels), None
    values, placed = read_nifti_slice(path)
    return torch.from_numpy(values)[None], plane_affine(placed)


def sample_labels(path: Path) -> StoredLabels:
    """Read what a mask file holds, a volume too, to look at its values alone."""
    return StoredLabels(read_nifti(path)[0]) if is_nifti(path) else read_labels(path)


def read_labels(path: Path, *, like: tuple[Path, Placed] | None = None) -> StoredLabels:
    """Read what a mask file holds, [H, W]: grey levels, palette indices or labels, as stored.

    A palette of greys alone is read by its greys, one of colours by its indices. A coloured mask
    and one that is drawn in the alpha channel are each a :class:`UserError`. ``like`` is the
    image's file and where it lies, for a mask in NIfTI.
    """
    if is_nifti(path):
        return StoredLabels(read_nifti_slice(path, like=like)[0])
    picture = decoded_picture(path)
    _require_opaque(path, picture)
    greys, indexed = None, picture.mode in ("P", "PA")
    if indexed:
        values, greys = np.asarray(picture.getchannel("P")), _palette_greys(picture)
    else:
        values = _grey_labels(path, picture)
    _require_finite(path, values)
    lossy = picture.format in ("JPEG", "MPO")
    if greys is not None:
        return StoredLabels(greys[values], lossy)
    return StoredLabels(values, lossy, indexed)


def _palette_greys(picture: Image.Image) -> Stored | None:
    """The grey of each index, uint8 [256], of a palette of several greys and no colour."""
    palette = np.array(picture.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)[:256]
    if len(np.unique(palette)) < 2 or (palette != palette[:, :1]).any():
        return None
    greys = np.zeros(256, dtype=np.uint8)
    greys[: len(palette)] = palette[:, 0]
    return greys


def _grey_labels(path: Path, picture: Image.Image) -> Stored:
    """The grey levels of a picture, [H, W]; of colour only that of compression noise."""
    if picture.mode in ("1", "L", "F", *_DEEP_GREY):
        return np.asarray(picture)
    if picture.mode in ("LA", "La"):
        return np.asarray(picture.getchannel("L"))
    values = np.asarray(picture.convert("RGB"))
    noise = 8 if values.max(initial=0) > 64 else 0
    rule = "a mask is grey, black and white or a palette"
    return _one_channel(path, values.astype(np.float32), rule, noise=noise).astype(np.uint8)


def read_nifti(
    path: Path, *, shown: Path | None = None, channel: int | None = None
) -> tuple[Array, Grid]:
    """Decode a NIfTI file: float32 array without trailing axes of length 1, and its grid.

    ``channel`` chooses a position along the last of four axes; other files are read as they are.

    Values are scaled as the header says and otherwise as stored, and lie as stored. Raises
    :class:`UserError`, naming ``shown`` where it is given, if the file cannot be decoded, is empty,
    or holds colours or complex, NaN or infinite values.
    """
    with decoding(shown or path, "NIfTI image of real numbers"), np.errstate(all="ignore"):
        nifti, header = load_nifti(path, shown=shown)
        if header.dtype.kind not in "biuf":
            raise ValueError(f"its values are {header.dtype}")
        stored = np.asarray(nifti.dataobj)
        grid = grid_of(nifti)
        if channel is not None and len(grid.shape) == 4:
            if channel >= grid.shape[3]:
                raise ValueError(f"it has {grid.shape[3]} channels, fewer than others of the set")
            stored, grid = stored.reshape(grid.shape)[..., channel], spatial(grid)
        values = stored.astype(np.float32)
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
        return grid_of(load_nifti(path)[0])


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


def is_whole(path: Path) -> bool:
    """Whether a file is an uncompressed NIfTI volume of the length that its header states."""
    try:
        header = nifti_header(path)
        return len(header.shape) >= 3 and path.stat().st_size >= header.end
    except (UserError, *UNREADABLE):
        return False


def nifti_shape(path: Path) -> tuple[int, ...]:
    """Read the shape from the header alone; a slice has two axes, wherever its third is stored."""
    return read_grid(path).lengths


def read_picture(path: Path, *, channels: int) -> Tensor:
    """Decode a picture to float32 [channels, H, W] in [0, 1], as :func:`picture_values` does."""
    return picture_values(path, decoded_picture(path), channels=channels)


def picture_values(source: object, picture: Image.Image, *, channels: int) -> Tensor:
    """Return the pixels of a picture, float32 [channels, H, W] in [0, 1].

    Grey is repeated for 3 channels, transparency is dropped, and an orientation in EXIF is applied.
    A coloured picture for 1 channel is a :class:`UserError`, which names ``source``.
    """
    values = _levels(source, picture)
    if values.ndim == 2:
        return torch.from_numpy(values).expand(channels, -1, -1).clone()
    if channels == 3:
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    return torch.from_numpy(_one_channel(source, values, "grey ones are read"))[None]


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA", "La", "F", *_DEEP_GREY)


def _levels(source: object, picture: Image.Image) -> Array:
    """Return pixel values in [0, 1], [H, W] for grey modes and [H, W, 3] for all others."""
    if picture.mode == "F":
        values, white = np.asarray(picture, dtype=np.float32), 1
    elif picture.mode in _DEEP_GREY:
        values, white = np.asarray(picture).astype(np.float32), 65535
    else:
        opaque = picture.convert("RGBA") if picture.mode == "P" else picture
        converted = opaque.convert("L" if _is_grey(picture) else "RGB")
        values, white = np.asarray(converted).astype(np.float32), 255

    _require_finite(source, values)
    if values.min() < 0 or values.max() > white:
        raise UserError(
            source,
            f"has values from {values.min():g} to {values.max():g}, outside of 0 to {white}",
            "Scale the picture, or store it with 8 or 16 bits.",
        )
    return np.divide(values, np.float32(white), out=values if values.flags.writeable else None)


def _one_channel(source: object, values: Array, rule: str, *, noise: float = 8 / 255) -> Array:
    """Reduce [H, W, 3] to [H, W] where the channels agree up to compression noise."""
    if not _agree(values, noise):
        raise UserError(
            source,
            f"is a coloured picture, but {rule}",
            "Convert it, or check that images and masks were not swapped.",
        )
    return np.ascontiguousarray(values[..., 0])


def _agree(values: Array, noise: float = 8 / 255) -> bool:
    """Whether the channels of [H, W, 3] agree up to compression noise; always for [H, W]."""
    return values.ndim == 2 or not np.ptp(values, axis=2).max(initial=0) > noise


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


def _require_finite(source: object, values: Stored) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise UserError(
            source,
            "has NaN or infinite values" if values.size else "has no pixels",
            "Repair the file, or remove the case from the data set.",
        )
