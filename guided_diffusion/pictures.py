"""Pictures of a case that a person would want to look at, with NumPy and Pillow alone.

Here live the 8-bit form of a soft mask, the colour map of the uncertainty, the overlay (image,
truth, fused mask and uncertainty side by side) and the contact sheet of a data set. Contours are
drawn from the level set of the enlarged mask, so they are smooth at any size. Prediction,
validation and the check of a data set call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from guided_diffusion import metrics
from guided_diffusion.files import ROOM, whole

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

Scale = tuple[str, float]
STD: Scale = ("std", 0.5)
"""What a map of doubt shows, and its largest value: the standard deviation of values in [0, 1]."""

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


def soft_png(values: ArrayLike) -> Pixels:
    """Soft mask in [0, 1] -> 8-bit levels, rounded half up so that 0.5 becomes 128 (foreground)."""
    levels = np.asarray(values, dtype=np.float64) * 255 + 0.5
    result: Pixels = np.floor(np.clip(levels, 0, 255)).astype(np.uint8)
    return result


def write_picture(path: Path, pixels: Pixels, *, mend: str = ROOM) -> None:
    """Write a picture as PNG; it appears whole.

    Raises:
        UserError: it cannot be written.
    """
    with whole(path, mend=mend) as part:
        Image.fromarray(pixels).save(part, format="PNG")


def heat(values: ArrayLike) -> Pixels:
    """Colour map: values [...] in [0, 1] (clipped) -> uint8 [..., 3], dark to bright."""
    position = np.clip(np.asarray(values, dtype=np.float32), 0, 1) * (len(HEAT) - 1)
    channels = [np.interp(position, range(len(HEAT)), channel) for channel in np.transpose(HEAT)]
    result: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return result


def overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    fused: ArrayLike,
    uncertainty: ArrayLike,
    *,
    name: str,
    members: int = 1,
    scale: Scale = STD,
    panel: int = 320,
) -> Pixels:
    """One picture of a case: image | ground truth | fused mask | uncertainty.

    ``image`` float [C, H, W] of any range (three channels are colour, else the last one is shown
    in grey), ``truth`` [H, W] in {0, 1} or None (its panel is left out), ``fused`` [H, W] in
    [0, 1], ``uncertainty`` [H, W], which ``scale`` names, with its largest value. ``panel`` is the
    longer side of a panel in pixels. Returns uint8 [h, w, 3]. Raises ValueError when sizes differ.
    """
    case = _Case.of(image, truth, fused, np.asarray(uncertainty) / scale[1], panel)
    panels = [
        (case.picture, _Caption("image")),
        (case.with_truth(), _Caption("ground truth")),
        (case.with_fused(), _Caption("fused mask", marks=case.marks())),
        (case.with_doubt(), _Caption("uncertainty", bar=scale)),
    ]
    if truth is None:
        del panels[1]

    canvas = _Canvas(len(panels), case.size)
    canvas.header(name, _verdict(truth, fused, members))
    for index, (pixels, caption) in enumerate(panels):
        canvas.place(index, pixels, caption)
    return np.asarray(canvas.picture)


def map_overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    mask: ArrayLike,
    heat_map: ArrayLike,
    *,
    name: str,
    panel: int = 320,
) -> Pixels:
    """As :func:`overlay`, for a mask that was cut from a map: image | truth | mask | map.

    ``mask`` is [H, W] in {0, 1}, ``heat_map`` is [H, W] in [0, 1].
    """
    case = _Case.of(image, truth, mask, heat_map, panel)
    panels = [
        (case.picture, _Caption("image")),
        (case.with_truth(), _Caption("ground truth")),
        (case.with_fused(), _Caption("mask", marks=() if truth is None else ((TRUTH, "truth"),))),
        (case.with_doubt(), _Caption("map")),
    ]
    if truth is None:
        del panels[1]
    canvas = _Canvas(len(panels), case.size)
    canvas.header(name, "" if truth is None else _verdict(truth, mask, 1).partition("  ·")[0])
    for index, (pixels, caption) in enumerate(panels):
        canvas.place(index, pixels, caption)
    return np.asarray(canvas.picture)


def image_panel(drawn: Pixels, size: tuple[int, int]) -> Pixels | None:
    """The image itself, cut out of an :func:`overlay` of a case of ``size`` (height, width).

    None where the picture has not the measures of an overlay of such a case.
    """
    height = drawn.shape[0] - HEADER - FOOTER
    width = max(1, round(height * size[1] / size[0]))
    room = drawn.shape[1] - 2 * MARGIN + GAP
    panels = round(room / (width + GAP))
    if height < 1 or panels not in (3, 4):
        return None
    width = room // panels - GAP
    panel: Pixels = drawn[HEADER : HEADER + height, MARGIN : MARGIN + width, :3]
    return panel


def displayed(image: ArrayLike) -> Pixels:
    """An image [C, H, W] of any range as overlays show it, uint8 [H, W, 3]."""
    return soft_png(_displayed(np.asarray(image, dtype=np.float32)))


def class_overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    masks: ArrayLike,
    uncertainty: ArrayLike,
    *,
    classes: Sequence[str],
    name: str,
    members: int = 1,
    scale: Scale = STD,
    panel: int = 320,
) -> Pixels:
    """As :func:`overlay`, for K classes, each in a colour that the legend names.

    ``truth`` (or None) and ``masks`` are [K, H, W] in {0, 1}, ``uncertainty`` is [H, W]; wide
    regions come first. Raises ValueError when the sizes differ.
    """
    found = np.asarray(masks) > 0
    case = _Case.of(image, None, found.any(axis=0), np.asarray(uncertainty) / scale[1], panel)
    marks = tuple(zip(cycle(CLASSES), classes, strict=False))
    panels = [
        (case.picture, _Caption("image")),
        (_painted(case, found), _Caption("fused mask", marks=marks)),
        (case.with_doubt(), _Caption("uncertainty", bar=scale)),
    ]
    verdict = "1 member" if members == 1 else f"{members} members"
    if truth is not None:
        true = np.asarray(truth) > 0
        verdict = f"{_class_verdict(true, found, classes)}  ·  {verdict}"
        panels.insert(1, (_painted(case, true), _Caption("ground truth")))

    canvas = _Canvas(len(panels), case.size)
    canvas.header(name, verdict)
    for index, (pixels, caption) in enumerate(panels):
        canvas.place(index, pixels, caption)
    return np.asarray(canvas.picture)


def _painted(case: _Case, masks: NDArray[np.bool_]) -> Floats:
    """The picture under the outlined masks [K, H, W], tinted by the last of them at each pixel."""
    painted = case.picture
    colours = [colour for _, colour in zip(masks, cycle(CLASSES), strict=False)]
    for k, colour in enumerate(colours):
        seen = masks[k] & ~masks[k + 1 :].any(axis=0)
        painted = _blend(painted, colour, 0.4 * _enlarge_mask(seen, case.size))
    for mask, colour in zip(masks, colours, strict=True):
        if mask.any():
            painted = _line(painted, _enlarge_mask(mask, case.size), colour, width=1.7)
    return painted


def _class_verdict(
    truth: NDArray[np.bool_], found: NDArray[np.bool_], classes: Sequence[str]
) -> str:
    """Dice of the classes that are there; of more than four, their mean."""
    counts = [metrics.confusion(*pair) for pair in zip(found, truth, strict=True)]
    scores = [
        (name, metrics.dice(count))
        for name, count in zip(classes, counts, strict=True)
        if not (count.empty_truth and count.empty_prediction)
    ]
    if not scores:
        return "no lesion, none predicted"
    if len(scores) > 4:
        return f"mean Dice {sum(score for _, score in scores) / len(scores):.3f}"
    return "Dice  " + "  ".join(f"{name} {score:.3f}" for name, score in scores)


class Tile(NamedTuple):
    """One case of a contact sheet: image [C, H, W], mask [K, H, W] or None, and what to write."""

    image: ArrayLike
    mask: ArrayLike | None
    name: str


def contact_sheet(
    tiles: Sequence[Tile], *, title: str, subtitle: str = "", columns: int = 6, panel: int = 220
) -> Pixels:
    """A page of cases with the outlines of their masks, one colour for each class.

    ``panel`` is the side of a tile in pixels. Returns uint8 [h, w, 3]. Raises ValueError where a
    mask has not the size of its image.
    """
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    canvas = _Canvas(columns, (panel, panel), rows=rows)
    canvas.header(title, subtitle)
    for index, tile in enumerate(tiles):
        pixels, caption = _outlined(tile, panel)
        canvas.place(index, pixels, caption)
    return np.asarray(canvas.picture)


def strip(
    panels: Sequence[ArrayLike], captions: Sequence[str], *, title: str, columns: int
) -> Pixels:
    """Grey pictures in rows of ``columns``: each [H, W] in [0, 1] and of one size.

    Returns uint8 [h, w, 3].
    """
    height, width = np.shape(panels[0])
    scale = max(1, 160 // max(height, width))
    rows = -(-len(panels) // columns)
    canvas = _Canvas(columns, (max(160, width * scale), height * scale), rows=rows)
    canvas.header(title, "")
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        grey = np.repeat(np.asarray(panel, dtype=np.float32)[..., None], 3, axis=-1)
        canvas.place(index, grey.repeat(scale, axis=0).repeat(scale, axis=1), _Caption(caption))
    return np.asarray(canvas.picture)


def _outlined(tile: Tile, panel: int) -> tuple[Floats, _Caption]:
    """The tile on a square of background, and its caption: its name, and whether it is empty."""
    shown = _displayed(np.asarray(tile.image, dtype=np.float32))
    masks = np.zeros((0, *shown.shape[:2])) if tile.mask is None else np.asarray(tile.mask)
    if masks.shape[1:] != shown.shape[:2]:
        raise ValueError(f"image is {shown.shape[:2]}, mask is {masks.shape[1:]}")

    scale = panel / max(shown.shape[:2])
    height, width = (max(1, round(side * scale)) for side in shown.shape[:2])
    picture = _enlarge(shown, (width, height))
    for mask, colour in zip(masks, cycle(CLASSES), strict=False):
        if mask.any():
            picture = _line(picture, _enlarge_mask(mask, (width, height)), colour, width=2.3)
    square = np.full((panel, panel, 3), BACKGROUND, dtype=np.float32) / np.float32(255)
    top, left = (panel - height) // 2, (panel - width) // 2
    square[top : top + height, left : left + width] = picture
    state = "no mask" if tile.mask is None else "" if masks.any() else "empty"
    return square, _Caption(tile.name, note=state)


class _Case(NamedTuple):
    """Everything of one case, enlarged to a panel of ``size`` (width, height)."""

    size: tuple[int, int]
    picture: Floats  # [h, w, 3] in [0, 1]
    truth: Floats | None  # [h, w], smoothed, contour at 0.5
    fused: Floats
    doubt: Floats  # [h, w] in [0, 1]

    @classmethod
    def of(
        cls,
        image: ArrayLike,
        truth: ArrayLike | None,
        fused: ArrayLike,
        uncertainty: ArrayLike,
        panel: int,
    ) -> _Case:
        shown, soft = _displayed(np.asarray(image, dtype=np.float32)), np.asarray(fused)
        height, width = shown.shape[:2]
        for values in (truth, soft, uncertainty):
            if values is not None and np.shape(values) != (height, width):
                raise ValueError(f"image is {(height, width)}, a mask is {np.shape(values)}")

        scale = panel / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        doubt = np.asarray(uncertainty, dtype=np.float32)
        return cls(
            size=size,
            picture=_enlarge(shown, size),
            truth=None if truth is None else _enlarge_mask(np.asarray(truth), size),
            fused=_enlarge_mask(soft, size),
            doubt=np.clip(_enlarge(doubt, size), 0, 1),
        )

    def marks(self) -> tuple[tuple[Colour, str], ...]:
        """The legend of the fused panel."""
        fused = ((FUSED, "fused"),)
        return fused if self.truth is None else ((TRUTH, "truth"), *fused)

    def with_truth(self) -> Floats:
        return self.picture if self.truth is None else _line(self.picture, self.truth, TRUTH)

    def with_fused(self) -> Floats:
        tinted = _blend(self.picture, TINT, 0.45 * self.fused)
        outlined = _line(tinted, self.fused, FUSED)
        return outlined if self.truth is None else _line(outlined, self.truth, TRUTH, width=1.7)

    def with_doubt(self) -> Floats:
        """The colours added to the dimmed grey image: without doubt only the image is left."""
        grey = self.picture.mean(axis=-1, keepdims=True) * 0.45
        colours = heat(self.doubt).astype(np.float32) / np.float32(255)
        mixed: Floats = grey * (1 - self.doubt[..., None]) + colours
        return np.clip(mixed, 0, 1)


def _displayed(image: Floats) -> Floats:
    """Image [C, H, W] of any range -> [H, W, 3] in [0, 1]: colour if C is 3, else its last channel.

    Colour that already lies in [0, 1] is left as it is; everything else is stretched between its
    1st and 99.5th percentile.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be [C, H, W], not {image.shape}")
    shown = image if len(image) == 3 else np.repeat(image[-1:], 3, axis=0)
    shown = np.moveaxis(np.nan_to_num(shown), 0, -1)
    if len(image) == 3 and shown.min() >= 0 and shown.max() <= 1:
        return shown

    low, high = np.percentile(shown, (1, 99.5))
    stretched: Floats = np.clip((shown - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return stretched


def _enlarge(values: Floats, size: tuple[int, int]) -> Floats:
    """Resize [H, W] or [H, W, C] to ``size`` (width, height), smoothly and in floating point."""
    if values.ndim == 3:
        planes = [_enlarge(plane, size) for plane in np.moveaxis(values, -1, 0)]
        stacked: Floats = np.clip(np.stack(planes, axis=-1), 0, 1)
        return stacked
    plane = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(plane.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def _enlarge_mask(mask: NDArray[Any], size: tuple[int, int]) -> Floats:
    """Resize a mask and round off the stairs of its pixels, so that its 0.5 contour is clean."""
    levels = Image.fromarray(soft_png(mask)).resize(size, Image.Resampling.BICUBIC)
    scale = size[0] / mask.shape[1]
    if scale > 1:
        levels = levels.filter(ImageFilter.GaussianBlur(max(0.45 * scale, 0.8)))
    smooth: Floats = np.asarray(levels, dtype=np.float32) / np.float32(255)
    return smooth


def _line(picture: Floats, mask: Floats, colour: Colour, *, width: float = 2.3) -> Floats:
    """Draw the 0.5 level set of ``mask`` as an antialiased line with a faint dark rim."""
    slope = np.hypot(*_gradient(mask))
    distance = np.abs(mask - 0.5) / np.maximum(slope, 1e-4)
    rim = np.clip((width + 2.0) / 2 + 0.5 - distance, 0, 1) * 0.4
    core = np.clip(width / 2 + 0.5 - distance, 0, 1)
    return _blend(_blend(picture, (0, 0, 0), rim), colour, core)


def _gradient(mask: Floats) -> tuple[Floats, Floats]:
    """Change per pixel along both axes; a side of one pixel has none."""
    steps = [
        np.gradient(mask, axis=axis) if mask.shape[axis] > 1 else np.zeros_like(mask)
        for axis in (0, 1)
    ]
    return steps[0], steps[1]


def _blend(picture: Floats, colour: Colour, alpha: Floats) -> Floats:
    paint = np.asarray(colour, dtype=np.float32) / np.float32(255)
    mixed: Floats = picture + alpha[..., None] * (paint - picture)
    return mixed


def _verdict(truth: ArrayLike | None, fused: ArrayLike, members: int) -> str:
    """The right side of the header: Dice at 0.5 where there is a truth, and the members."""
    drawn = "1 member" if members == 1 else f"{members} members"
    if truth is None:
        return drawn

    counts = metrics.confusion(metrics.binarise(fused), metrics.binarise(truth))
    if counts.empty_truth:
        found = "none predicted" if counts.empty_prediction else f"{counts.fp} pixels predicted"
        return f"no lesion, {found}  ·  {drawn}"
    return f"Dice {metrics.dice(counts):.3f}  ·  {drawn}"


class _Caption(NamedTuple):
    """What stands below a panel: its title, and at the right a legend or the colour bar."""

    title: str
    marks: tuple[tuple[Colour, str], ...] = ()
    bar: Scale | None = None
    note: str = ""


class _Canvas:
    """The dark sheet: a header line, and panels in rows, each with its caption below."""

    def __init__(self, panels: int, size: tuple[int, int], *, rows: int = 1) -> None:
        self.size, self.panels = size, panels
        width = 2 * MARGIN + panels * size[0] + (panels - 1) * GAP
        height = HEADER + rows * (size[1] + FOOTER)
        self.picture = Image.new("RGB", (width, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.picture)

    def header(self, name: str, verdict: str) -> None:
        """The name at the left, shortened to the room that the verdict leaves it."""
        right = self.picture.width - MARGIN
        self._text((right, HEADER // 2), verdict, size=17, anchor="rm")
        room = right - MARGIN - self._width(verdict, size=17) - 24
        self._text((MARGIN, HEADER // 2), self._shortened(name, room), size=19, anchor="lm")

    def place(self, index: int, pixels: Floats, caption: _Caption) -> None:
        """Paste panel ``index`` and write its caption."""
        width, height = self.size
        row, column = divmod(index, self.panels)
        left, top = MARGIN + column * (width + GAP), HEADER + row * (height + FOOTER)
        middle = top + height + FOOTER // 2
        self.picture.paste(Image.fromarray(soft_png(pixels)), (left, top))
        room = width - (self._width(caption.note, size=13) + 10 if caption.note else 0)
        title = self._shortened(caption.title, room, size=14)
        self._text((left, middle), title, size=14, anchor="lm", fill=QUIET)
        self._text((left + width, middle), caption.note, size=13, anchor="rm", fill=HEAT[4])
        if caption.bar:
            self._bar(left + width, middle, caption.bar)
        self._legend(left + width, middle, caption.marks)

    def _legend(self, right: int, middle: int, marks: tuple[tuple[Colour, str], ...]) -> None:
        room, share = self.size[0] - 90, (self.size[0] - 90) / max(len(marks), 1) - 32
        fits = sum(self._width(name, size=13) + 32 for _, name in marks) <= room
        for colour, name in reversed(marks):
            label = name if fits else self._shortened(name, share, size=13)
            self._text((right, middle), label, size=13, anchor="rm", fill=QUIET)
            right -= round(self._width(label, size=13)) + 6
            self.draw.rectangle((right - 14, middle - 1, right, middle + 1), fill=colour)
            right -= 14 + 12

    def _bar(self, right: int, middle: int, of: Scale, length: int = 90) -> None:
        """The scale of the uncertainty, from 0, in the colours of the map."""
        name, most = of
        scale = f"{most:g}"
        self._text((right, middle), scale, size=13, anchor="rm", fill=QUIET)
        end = right - round(self._width(scale, size=13)) - 6
        ramp = np.tile(heat(np.linspace(0, 1, length)), (10, 1, 1))
        self.picture.paste(Image.fromarray(ramp), (end - length, middle - 5))
        self.draw.rectangle((end - length - 1, middle - 6, end, middle + 5), outline=(70, 74, 84))
        self._text((end - length - 7, middle), f"{name}  0", size=13, anchor="rm", fill=QUIET)

    def _shortened(self, name: str, room: float, *, size: int = 19) -> str:
        """The name, with its middle left out where it is wider than ``room``."""
        kept = len(name)
        shown = name
        while kept > 8 and self._width(shown, size=size) > room:
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
