"""A small animated picture of a case: members out of noise, then their mean and uncertainty."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from guided_diffusion.data.folders import counted
from guided_diffusion.files import FREE_SPACE_HINT, atomic_write
from guided_diffusion.report.canvas import (
    BACKGROUND,
    FUSED,
    TINT,
    Canvas,
    Caption,
    Floats,
    Pixels,
    Scale,
    blend,
    draw_line,
    enlarge,
    enlarge_mask,
    fitted,
    heat,
)
from guided_diffusion.report.pictures import STD, displayed

SIDE = 224
"""Longer side of a panel in pixels."""
MOST_MEMBERS = 9
"""Members that are shown; as many as fill a square."""
COLOURS, GREYS, RAMP = 72, 10, 24
"""Colours of the pictures, of the members, and of the map of the uncertainty."""
STEP, MASKS, END = (90, 350), 1400, 2600
"""Milliseconds: of a step (least, most), of the finished masks, of the uncertainty at the end."""
RUN = 2600
"""Milliseconds that all steps together take, if that is possible."""


class Moment(NamedTuple):
    """What an evaluation of the network has seen and predicted of a case.

    Attributes:
        t: the time; 0 of the finished masks.
        noisy: the members, uint8 [E, h, w] from 0 to 255, all classes in one.
        clean: the mean of their predicted clean masks, float32 [H, W] in [0, 1], at the case's own
            size.
    """

    t: float
    noisy: NDArray[np.uint8]
    clean: Floats


def animate(
    image: ArrayLike,
    moments: Sequence[Moment],
    fused: ArrayLike,
    uncertainty: ArrayLike,
    *,
    name: str,
    scale: Scale = STD,
) -> list[tuple[Pixels, int]]:
    """Draw the frames, uint8 [h, w, 3], each with its milliseconds.

    Args:
        image: of the case, float [C, H, W] of any range.
        moments: of the drawing, the noisiest first, the finished masks last.
        fused: mask of the case, float [H, W] in [0, 1].
        uncertainty: map of the case, float [H, W].
        name: of the case.
        scale: the name and the largest value of the uncertainty.
    """
    photo = displayed(image).astype(np.float32) / np.float32(255)
    size = fitted(photo.shape[:2], SIDE)
    picture = enlarge(photo, size)
    final = np.asarray(fused, dtype=np.float32)
    members = len(moments[-1].noisy)
    shown = square_number(members)
    title = counted(members, "member")
    title = f"{shown} of {title}" if shown < members else title

    def frame(moment: Moment, mask: Floats, right: Floats, caption: Caption, text: str) -> Pixels:
        canvas = Canvas(3, size)
        canvas.header(name, text)
        outline = draw_line(picture, enlarge_mask(mask, size), FUSED)
        canvas.place(0, outline, Caption("image, mean mask"))
        canvas.place(1, mosaic(list(map(_soft, moment.noisy[:shown])), size), Caption(title))
        canvas.place(2, right, caption)
        return np.asarray(canvas.picture)

    pace = int(np.clip(RUN / len(moments), *STEP))
    drawn = []
    for moment in moments:
        tinted = _tinted(picture, moment.clean, size)
        pixels = frame(moment, moment.clean, tinted, Caption("their mean"), f"t = {moment.t:.0f}")
        drawn.append((pixels, MASKS if moment is moments[-1] else pace))
    glowing = _glowing(picture, uncertainty, size, scale[1])
    bar = Caption("", bar=("uncertainty", scale[1]))
    drawn.append((frame(moments[-1], final, glowing, bar, f"uncertainty: {scale[0]}"), END))
    return drawn


def square_number(members: int) -> int:
    """How many of the members to show: those that fill a square, or up to three in a row."""
    return next((most for most in (MOST_MEMBERS, 4) if members >= most), members)


def _soft(mask: NDArray[np.uint8]) -> Floats:
    return mask.astype(np.float32) / np.float32(255)


def mosaic(masks: Sequence[Floats], size: tuple[int, int], *, gap: int = 4) -> Floats:
    """Place grey masks [h, w] in [0, 1] side by side on a panel of ``size`` (width, height).

    Returns float32 [height, width, 3].
    """
    columns = math.ceil(math.sqrt(len(masks)))
    rows = -(-len(masks) // columns)
    height, width = masks[0].shape
    scale = min(
        (size[0] - gap * (columns - 1)) / (columns * width),
        (size[1] - gap * (rows - 1)) / (rows * height),
    )
    own = max(1, int(width * scale)), max(1, int(height * scale))
    panel = np.full((size[1], size[0], 3), BACKGROUND, dtype=np.float32) / np.float32(255)
    left = (size[0] - columns * own[0] - gap * (columns - 1)) // 2
    top = (size[1] - rows * own[1] - gap * (rows - 1)) // 2
    for index, mask in enumerate(masks):
        levels = Image.fromarray(np.rint(mask * (GREYS - 1)) / np.float32(GREYS - 1))
        row, column = divmod(index, columns)
        y, x = top + row * (own[1] + gap), left + column * (own[0] + gap)
        shown = np.asarray(levels.resize(own, Image.Resampling.NEAREST))
        panel[y : y + own[1], x : x + own[0]] = shown[..., None]
    return panel


def _tinted(picture: Floats, mean: Floats, size: tuple[int, int]) -> Floats:
    """The grey, dimmed picture with the mean of the masks in blue."""
    grey = np.repeat(picture.mean(axis=-1, keepdims=True) * np.float32(0.45), 3, axis=-1)
    return blend(
        blend(grey, TINT, 0.7 * enlarge_mask(mean, size)), FUSED, 0.25 * enlarge(mean, size)
    )


def _glowing(picture: Floats, values: ArrayLike, size: tuple[int, int], most: float) -> Floats:
    """The grey, dimmed picture with the uncertainty in the colours of its map."""
    share = np.clip(enlarge(np.asarray(values, dtype=np.float32) / most, size), 0, 1)
    grey = picture.mean(axis=-1, keepdims=True) * 0.45
    mixed: Floats = grey * (1 - share[..., None]) + heat(share).astype(np.float32) / 255
    return np.clip(mixed, 0, 1)


def write_animation(
    path: Path, frames: Sequence[tuple[Pixels, int]], *, hint: str = FREE_SPACE_HINT
) -> None:
    """Write frames with their milliseconds as GIF, atomically; it repeats for ever.

    Raises:
        UserError: it cannot be written.
    """
    palette = _palette([frames[len(frames) // 2][0], frames[-1][0]])
    indexed = [
        Image.fromarray(pixels).quantize(palette=palette, dither=Image.Dither.NONE)
        for pixels, _ in frames
    ]
    file = io.BytesIO()
    indexed[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=indexed[1:],
        duration=[milliseconds for _, milliseconds in frames],
        loop=0,
        optimize=True,
    )
    with atomic_write(path, hint=hint) as part:
        part.write_bytes(file.getvalue())


def _palette(frames: Sequence[Pixels]) -> Image.Image:
    """The greys of the members, the colours of the uncertainty, and those of some frames."""
    greys = np.repeat(np.linspace(0, 255, GREYS)[:, None], 3, axis=1).round().astype(np.uint8)
    own = Image.fromarray(np.concatenate(frames)).quantize(
        COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    fixed = np.concatenate([greys, heat(np.linspace(0, 1, RAMP)), np.array([FUSED], np.uint8)])
    palette = Image.new("P", (1, 1))
    palette.putpalette([*fixed.ravel().tolist(), *(own.getpalette() or [])[: 3 * COLOURS]])
    return palette
