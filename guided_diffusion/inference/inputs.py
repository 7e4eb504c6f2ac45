"""Images given to the Python class: paths, pictures and arrays, scaled as files are."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from torch import Tensor

from guided_diffusion.data.advice import are_raw
from guided_diffusion.data.datasets import scaled
from guided_diffusion.data.readers import picture_values, read_image_file
from guided_diffusion.errors import UserError
from guided_diffusion.files import nearest_path

ImageLike = ArrayLike | Tensor | Image.Image | str | PathLike[str]
WHITE = {"bool": 1, "uint8": 255, "uint16": 65535}
"""The brightest value of the types that pictures have."""


def pixels_of(image: ImageLike, *, name: str, channels: int, normalise: str) -> Tensor:
    """Bring an image to the range of training, float32 [channels, H, W].

    Files and pictures are read as a data set's are. Arrays of unsigned integers are taken as the
    pixels of a picture, and so are floats that are whole numbers from 0 to 255; all are then
    scaled by ``normalise``. Other floats are taken to be in the range of training already.

    Raises:
        UserError: a file that cannot be read, another shape, or values that cannot be those of
            training.
    """
    if isinstance(image, (str, PathLike)):
        path = Path(image)
        if not path.exists():
            raise UserError(path, "does not exist", nearest_path(path, "Check the path."))
        return scaled(read_image_file(path, channels=channels)[0], normalise)
    if isinstance(image, Image.Image):
        return scaled(
            picture_values(name, ImageOps.exif_transpose(image), channels=channels), normalise
        )
    values = _array(name, image)
    if channels == 1 and values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or len(values) != channels or not values.size:
        raise UserError(
            name,
            f"its shape is {values.shape}, that of training is [{channels}, H, W]",
            "Put the channels first.",
        )
    return _in_range(name, values, normalise)


def _array(name: str, image: Any) -> Any:
    """A copy as a NumPy array of numbers, from any device and with any strides."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    values = np.array(image)
    if values.dtype.kind not in "biuf":
        raise UserError(
            name, f"its type is {values.dtype}", "Pass an array of integers or real numbers."
        )
    return values


def _in_range(name: str, values: Any, normalise: str) -> Tensor:
    white: float | None = WHITE.get(values.dtype.name)
    pixels = values.astype(np.float32)
    if not np.isfinite(pixels).all():
        return torch.from_numpy(pixels)  # the drawn masks are not finite either, which is an error
    low, high = float(pixels.min()), float(pixels.max())
    if white is None and values.dtype.kind == "f":
        white = _white_of_floats(name, pixels, low, high, normalise)
        if white is None:
            return torch.from_numpy(pixels)
    if white is None and normalise == "none":
        raise UserError(
            name,
            f"its type is {values.dtype}, whose white is not known; it has values from {low:g} to "
            f"{high:g}",
            "Pass uint8, uint16, floats in the range of training, or the path of the file.",
        )
    return scaled(torch.from_numpy(pixels / np.float32(white or 1)), normalise)


def _white_of_floats(
    name: str, pixels: Any, low: float, high: float, normalise: str
) -> float | None:
    """What floats are divided by; None where they are in the range of training already."""
    if low >= 0 and 1 < high <= 255 and (pixels == np.rint(pixels)).all():
        return 255
    if not are_raw(low, high) and (normalise in ("none", "zscore") or high <= 1.001):
        return None
    if normalise != "none":
        return 1
    raise UserError(
        name,
        f"has values from {low:g} to {high:g}; pictures are trained on from 0 to 1",
        "Pass the pixels as integers, the path of the file, or floats in the range of training.",
    )
