"""Bringing predictions and the masks of raters to the size and the place of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from guided_diffusion.data.folders import size_of
from guided_diffusion.data.frames import WOLLEB_CROP, WOLLEB_SIZE
from guided_diffusion.data.geometry import mismatch, view_on
from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.scoring.predictions import Mask, Source


def require_shape(source: Source, own: Sequence[int], size: tuple[int, int]) -> None:
    """Refuse a prediction whose sides have another ratio than the truth's, beyond one pixel.

    ``own`` and ``size`` are height and width of prediction and truth. Squares of the published code
    pass: it draws images of all shapes as squares.

    Raises:
        UserError: the ratios differ.
    """
    (height, width), (true_height, true_width) = own, size
    if source.square and height == width:
        return
    if (
        abs(height * true_width / true_height - width) > 1
        and abs(width * true_height / true_width - height) > 1
    ):
        raise UserError(
            source.path,
            f"the mask is {size_of(own)}, which cannot be resized to the truth's {size_of(size)}: "
            "the ratio of the sides differs",
            "Save it with the height and width of its image; perhaps they are swapped.",
        )


def at_size(mask: Mask, size: tuple[int, int], *, cropped: bool = False) -> Mask:
    """Bring a prediction [h, w] to the truth's size.

    ``cropped`` marks a tensor of Diffusion-based-Segmentation, which removes 8 pixels from every
    side of 240 x 240; these are padded with 0.
    """
    kept = WOLLEB_SIZE - 2 * WOLLEB_CROP
    if cropped and (mask.shape, size) == ((kept, kept), (WOLLEB_SIZE, WOLLEB_SIZE)):
        return np.pad(mask, WOLLEB_CROP)
    return resize(mask, size)


def resize(mask: Mask, size: tuple[int, int], *, antialias: bool | None = None) -> Mask:
    """Resize [H, W] bilinearly to ``size`` (height, width), antialiased where it shrinks.

    Where it enlarges, antialiasing changes the last bit only, and takes ten times as long.
    """
    if mask.shape == size:
        return mask
    if antialias is None:
        antialias = mask.shape[0] > size[0] or mask.shape[1] > size[1]
    batch = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    resized = functional.interpolate(batch, size, mode="bilinear", antialias=antialias)
    return resized[0, 0].numpy()


def on_grid(values: Mask, rater: Truth, truth: Truth) -> Mask:
    """Turn a rater's mask [..., H, W] as the truth lies.

    Raises:
        UserError: it lies elsewhere.
    """
    own, target = rater.placed(), truth.placed()
    if own is None or target is None or len(own.grid.lengths) != len(target.grid.lengths):
        return values
    view, stored = view_on(own.grid, target), own.view
    if view is None or (view.axis, view.reverse) != (stored.axis, stored.reverse):
        raise mismatch(rater.source or Path(), own.grid, target.grid, other=truth.source or Path())
    return np.ascontiguousarray(view.turn(stored.turn_back(values)))
