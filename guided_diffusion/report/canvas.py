"""The drawing tools of all pictures: colours, a canvas with captions, outlines and blending.

Outlines are drawn from the level set of the enlarged mask, so they are smooth at any size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]
Scale = tuple[str, float]
BACKGROUND: Colour = (17, 19, 24)
INK: Colour = (236, 238, 242)
QUIET: Colour = (150, 156, 168)
TRUTH: Colour = (92, 240, 120)
FUSED: Colour = (88, 170, 255)
TINT: Colour = (24, 104, 240)
CLASSES: tuple[Colour, ...] = (
    TRUTH,
    (255, 196, 64),
    (255, 96, 128),
    (96, 200, 255),
    (190, 140, 255),
    (255, 140, 60),
    (70, 220, 200),
    (236, 238, 242),
)
HEAT: tuple[Colour, ...] = (
    (0, 0, 0),
    (52, 14, 92),
    (132, 28, 108),
    (206, 60, 76),
    (248, 136, 42),
    (254, 240, 168),
)
MARGIN, GAP, HEADER, FOOTER = 20, 12, 50, 34


class Caption(NamedTuple):
    """The line below a panel: its title, and at the right a legend or a colour bar."""

    title: str
    marks: tuple[tuple[Colour, str], ...] = ()
    bar: Scale | None = None
    note: str = ""


class Label(NamedTuple):
    """A short text beside a rectangle of a panel: top, left, bottom, right in its pixels."""

    text: str
    box: Sequence[float]
    colour: Colour = INK


class Canvas:
    """A dark page: a header line, and panels in rows, each with its caption below."""

    def __init__(self, panels: int, size: tuple[int, int], *, rows: int = 1) -> None:
        self.size, self.panels = size, panels
        width = 2 * MARGIN + panels * size[0] + (panels - 1) * GAP
        height = HEADER + rows * (size[1] + FOOTER)
        self.picture = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.picture)

    def header(self, name: str, verdict: str) -> None:
        """Write the verdict at the right and the name, shortened to fit, at the left."""
        right = self.picture.width - MARGIN
        self._text((right, HEADER // 2), verdict, size=17, anchor="rm")
        space = right - MARGIN - self._width(verdict, size=17) - 24
        self._text((MARGIN, HEADER // 2), self._shortened(name, space), size=19, anchor="lm")

    def place(self, index: int, pixels: Floats, caption: Caption) -> None:
        """Paste panel ``index`` and write its caption."""
        width, height = self.size
        row, column = divmod(index, self.panels)
        left, top = MARGIN + column * (width + GAP), HEADER + row * (height + FOOTER)
        middle = top + height + FOOTER // 2
        self.picture.paste(Image.fromarray(soft_png(pixels)), (left, top))
        space = width - (self._width(caption.note, size=13) + 10 if caption.note else 0)
        title = self._shortened(caption.title, space, size=14)
        self._text((left, middle), title, size=14, anchor="lm", fill=QUIET)
        self._text((left + width, middle), caption.note, size=13, anchor="rm", fill=HEAT[4])
        if caption.bar:
            self._bar(left + width, middle, caption.bar)
        self._legend(left + width, middle, caption.marks)

    def label(self, index: int, labels: Sequence[Label]) -> None:
        """Write labels on panel ``index``, each at the right of its rectangle if there is space.

        Else it is at the left, above or below; where it would cover others, it is left out.
        """
        row, column = divmod(index, self.panels)
        left, top = MARGIN + column * (self.size[0] + GAP), HEADER + row * (self.size[1] + FOOTER)
        font, taken = ImageFont.load_default(size=13), list[tuple[float, float]]()
        for label in labels:
            width = self._width(label.text, size=13)
            for x, y in _places(label.box, width):
                inside = 2 <= x <= self.size[0] - width - 2 and 8 <= y <= self.size[1] - 8
                if inside and all(abs(x - a) > width + 4 or abs(y - b) > 15 for a, b in taken):
                    taken.append((x, y))
                    self.draw.text(
                        (left + x, top + y),
                        label.text,
                        font=font,
                        fill=label.colour,
                        anchor="lm",
                        stroke_width=2,
                        stroke_fill=(0, 0, 0),
                    )
                    break

    def _legend(self, right: int, middle: int, marks: tuple[tuple[Colour, str], ...]) -> None:
        space = self.size[0] - 90
        share = space / max(len(marks), 1) - 32
        fits = sum(self._width(name, size=13) + 32 for _, name in marks) <= space
        for colour, name in reversed(marks):
            label = name if fits else self._shortened(name, share, size=13)
            self._text((right, middle), label, size=13, anchor="rm", fill=QUIET)
            right -= round(self._width(label, size=13)) + 6
            self.draw.rectangle((right - 14, middle - 1, right, middle + 1), fill=colour)
            right -= 14 + 12

    def _bar(self, right: int, middle: int, of: Scale, length: int = 90) -> None:
        """Draw the scale of the uncertainty, from 0, in the colours of the map."""
        name, most = of
        scale = f"{most:g}"
        self._text((right, middle), scale, size=13, anchor="rm", fill=QUIET)
        end = right - round(self._width(scale, size=13)) - 6
        ramp = np.tile(heat(np.linspace(0, 1, length)), (10, 1, 1))
        self.picture.paste(Image.fromarray(ramp), (end - length, middle - 5))
        self.draw.rectangle((end - length - 1, middle - 6, end, middle + 5), outline=(70, 74, 84))
        self._text((end - length - 7, middle), f"{name}  0", size=13, anchor="rm", fill=QUIET)

    def _shortened(self, name: str, space: float, *, size: int = 19) -> str:
        """The name, with its middle left out where it is wider than ``space``."""
        kept = len(name)
        shown = name
        while kept > 8 and self._width(shown, size=size) > space:
            kept -= 1
            shown = f"{name[: kept // 2]}…{name[len(name) - (kept - kept // 2) :]}"
        return shown

    def _width(self, text: str, *, size: int) -> float:
        return self.draw.textlength(text, font=ImageFont.load_default(size=size))

    def _text(
        self, at: tuple[int, int], text: str, *, size: int, anchor: str, fill: Colour = INK
    ) -> None:
        font = ImageFont.load_default(size=size)
        self.draw.text(at, text, font=font, fill=fill, anchor=anchor)


def _places(box: Sequence[float], width: float) -> list[tuple[float, float]]:
    """Where a label of a rectangle may be, the best place first: its left end and its middle."""
    top, left, bottom, right = box
    across, down = (left + right - width) / 2, (top + bottom) / 2
    return [(right + 5, down), (left - 5 - width, down), (across, top - 10), (across, bottom + 10)]


def soft_png(values: ArrayLike) -> Pixels:
    """Convert [0, 1] to 8-bit levels, rounded half up so that 0.5 becomes 128 (foreground)."""
    levels = np.multiply(np.asarray(values), 255, dtype=np.float64)
    levels += 0.5
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


def save_png(pixels: Pixels, file: Path | BytesIO) -> None:
    """Save a picture, uint8 [h, w, 3] or [h, w], as PNG, in a third of the time that Pillow takes.

    Grey masks become smaller by it, colours a fifth larger.
    """
    strategy = zlib.Z_RLE if pixels.ndim == 2 else -1
    Image.fromarray(pixels).save(file, format="PNG", compress_level=1, compress_type=strategy)


def heat(values: ArrayLike) -> Pixels:
    """Map values [...] in [0, 1] (clipped) to colours, uint8 [..., 3], dark to bright."""
    position = np.clip(np.asarray(values, dtype=np.float32), 0, 1) * (len(HEAT) - 1)
    channels = [np.interp(position, range(len(HEAT)), channel) for channel in np.transpose(HEAT)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def fitted(shape: Sequence[int], longer: float) -> tuple[int, int]:
    """Scale (height, width) to (width, height) in pixels, the ``longer`` side given."""
    scale = longer / max(shape)
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def enlarge(values: Floats, size: tuple[int, int]) -> Floats:
    """Resize [H, W] or [H, W, C] to ``size`` (width, height), bicubic and in floating point."""
    if values.ndim == 3:
        planes = [enlarge(plane, size) for plane in np.moveaxis(values, -1, 0)]
        return np.clip(np.stack(planes, axis=-1), 0, 1)
    plane = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(plane.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def enlarge_mask(mask: NDArray[Any], size: tuple[int, int]) -> Floats:
    """Resize a mask and smooth the steps of its pixels, so that its 0.5 contour is clean."""
    levels = Image.fromarray(soft_png(mask)).resize(size, Image.Resampling.BICUBIC)
    scale = size[0] / mask.shape[1]
    if scale > 1:
        levels = levels.filter(ImageFilter.GaussianBlur(max(0.45 * scale, 0.8)))
    return np.asarray(levels, dtype=np.float32) / np.float32(255)


def draw_line(picture: Floats, mask: Floats, colour: Colour, *, width: float = 2.3) -> Floats:
    """Draw the 0.5 level set of ``mask`` as an antialiased line with a faint dark rim."""
    slope = np.hypot(*_gradient(mask))
    distance = np.abs(mask - 0.5) / np.maximum(slope, 1e-4)
    rim = np.clip((width + 2.0) / 2 + 0.5 - distance, 0, 1) * 0.4
    core = np.clip(width / 2 + 0.5 - distance, 0, 1)
    return blend(blend(picture, (0, 0, 0), rim), colour, core)


def _gradient(mask: Floats) -> tuple[Floats, Floats]:
    """Compute the change per pixel along both axes; 0 along a side of one pixel."""
    steps = [
        np.gradient(mask, axis=axis) if mask.shape[axis] > 1 else np.zeros_like(mask)
        for axis in (0, 1)
    ]
    return steps[0], steps[1]


def blend(picture: Floats, colour: Colour, alpha: Floats) -> Floats:
    """Blend a colour into a picture [H, W, 3] with the opacity ``alpha`` [H, W] in [0, 1]."""
    paint = np.asarray(colour, dtype=np.float32) / np.float32(255)
    return picture + alpha[..., None] * (paint - picture)


class PanelGrid(NamedTuple):
    """How many panels an overlay has, and the size of one in pixels."""

    panels: int
    width: int
    height: int


def panel_grid(drawn: tuple[int, int], size: tuple[int, int]) -> PanelGrid | None:
    """Find the panels of an overlay of a case; both are (height, width).

    Returns None where the picture does not have the dimensions of such an overlay.
    """
    height = drawn[0] - HEADER - FOOTER
    width = max(1, round(height * size[1] / size[0]))
    total = drawn[1] - 2 * MARGIN + GAP
    panels = round(total / (width + GAP))
    if height < 1 or panels not in (3, 4):
        return None
    return PanelGrid(panels, total // panels - GAP, height)


def image_panel(drawn: Pixels, size: tuple[int, int]) -> Pixels | None:
    """Cut the image out of an overlay of a case of ``size`` (height, width).

    Returns None where the picture does not have the dimensions of such an overlay.
    """
    grid = panel_grid((drawn.shape[0], drawn.shape[1]), size)
    if grid is None:
        return None
    return drawn[HEADER : HEADER + grid.height, MARGIN : MARGIN + grid.width, :3]
