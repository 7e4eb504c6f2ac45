"""Pictures of cases, drawn with NumPy and Pillow alone.

An overlay shows image, truth, fused mask and uncertainty of a case side by side, for one class or
several; a contact sheet shows many cases of a data set with the outlines of their masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from guided_diffusion.data.folders import counted
from guided_diffusion.files import FREE_SPACE_HINT, atomic_write
from guided_diffusion.report.canvas import (
    BACKGROUND,
    CLASSES,
    FUSED,
    INK,
    TINT,
    TRUTH,
    Canvas,
    Caption,
    Colour,
    Floats,
    Label,
    Pixels,
    Scale,
    blend,
    draw_line,
    enlarge,
    enlarge_mask,
    fitted,
    heat,
    save_png,
    soft_png,
)
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.components import Component

PANEL = 320
"""Longer side of a panel of an overlay, in pixels."""
MOST_LABELS = 12
"""Components of a mask with a number beside them, the largest."""
STD: Scale = ("std", 0.5)
"""Name and largest value of an uncertainty: the standard deviation of values in [0, 1]."""


def write_picture(path: Path, pixels: Pixels, *, hint: str = FREE_SPACE_HINT) -> None:
    """Write a picture, uint8 [h, w, 3] or [h, w], as PNG, atomically.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_write(path, hint=hint) as part:
        save_png(pixels, part)


def overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    fused: ArrayLike,
    uncertainty: ArrayLike,
    *,
    name: str,
    members: int = 1,
    components: Sequence[Component] = (),
    scale: Scale = STD,
    panel: int = PANEL,
) -> Pixels:
    """Draw one case: image | ground truth | fused mask | uncertainty.

    ``image`` is float [C, H, W] of any range (three channels are colour, else the last one is shown
    in grey), ``truth`` [H, W] in {0, 1} or None (its panel is left out), ``fused`` [H, W] in
    [0, 1], ``uncertainty`` [H, W]; ``scale`` holds the name and the largest value of the latter.
    Beside each of the fused mask's ``components`` stands how many members contain it. ``panel`` is
    the longer side of a panel in pixels. Returns uint8 [h, w, 3]. Raises ValueError when sizes
    differ.
    """
    case = _Case.of(image, truth, fused, np.asarray(uncertainty) / scale[1], panel)
    panels = [
        (case.picture, Caption("image")),
        (case.with_truth(), Caption("ground truth")),
        (case.with_fused(), Caption("fused mask", marks=case.marks())),
        (case.with_uncertainty(), Caption("uncertainty", bar=scale)),
    ]
    if truth is None:
        del panels[1]
    labels = _labels(components, members, case.scale, INK)
    verdict = _verdict(truth, fused, members)
    return _row(panels, case.size, name=name, verdict=verdict, labels=labels)


def map_overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    mask: ArrayLike,
    heat_map: ArrayLike,
    *,
    name: str,
) -> Pixels:
    """Draw a case as :func:`overlay`, with a thresholded map: image | truth | mask | map.

    ``mask`` is [H, W] in {0, 1}, ``heat_map`` is [H, W] in [0, 1].
    """
    case = _Case.of(image, truth, mask, heat_map, PANEL)
    panels = [
        (case.picture, Caption("image")),
        (case.with_truth(), Caption("ground truth")),
        (case.with_fused(), Caption("mask", marks=() if truth is None else ((TRUTH, "truth"),))),
        (case.with_uncertainty(), Caption("map")),
    ]
    if truth is None:
        del panels[1]
    verdict = "" if truth is None else _verdict(truth, mask, 1).partition("  ·")[0]
    return _row(panels, case.size, name=name, verdict=verdict)


def class_overlay(
    image: ArrayLike,
    truth: ArrayLike | None,
    masks: ArrayLike,
    uncertainty: ArrayLike,
    *,
    classes: Sequence[str],
    name: str,
    members: int = 1,
    components: Sequence[Sequence[Component]] = (),
    scale: Scale = STD,
    panel: int = PANEL,
) -> Pixels:
    """Draw a case as :func:`overlay`, with K classes in the colours of the legend.

    ``truth`` (or None) and ``masks`` are [K, H, W] in {0, 1}, the widest region first;
    ``uncertainty`` is [H, W], ``components`` are those of each class. Raises ValueError when the
    sizes differ.
    """
    found = np.asarray(masks) > 0
    case = _Case.of(image, None, found.any(axis=0), np.asarray(uncertainty) / scale[1], panel)
    marks = tuple(zip(cycle(CLASSES), classes, strict=False))
    panels = [
        (case.picture, Caption("image")),
        (_painted(case, found), Caption("fused mask", marks=marks)),
        (case.with_uncertainty(), Caption("uncertainty", bar=scale)),
    ]
    verdict = counted(members, "member")
    if truth is not None:
        true = np.asarray(truth) > 0
        verdict = f"{_class_verdict(true, found, classes)}  ·  {verdict}"
        panels.insert(1, (_painted(case, true), Caption("ground truth")))
    labels = [
        label
        for of_class, (colour, _) in zip(components, marks, strict=False)
        for label in _labels(of_class, members, case.scale, colour)
    ]
    return _row(panels, case.size, name=name, verdict=verdict, labels=labels)


def _row(
    panels: Sequence[tuple[Floats, Caption]],
    size: tuple[int, int],
    *,
    name: str,
    verdict: str,
    labels: Sequence[Label] = (),
) -> Pixels:
    """Draw panels of one ``size`` (width, height) in a row under a header.

    ``labels`` are those of the last panel but one, the mask's.
    """
    canvas = Canvas(len(panels), size)
    canvas.header(name, verdict)
    for index, (pixels, caption) in enumerate(panels):
        canvas.place(index, pixels, caption)
    canvas.label(len(panels) - 2, labels)
    return np.asarray(canvas.picture)


def _labels(
    components: Sequence[Component], members: int, scale: float, colour: Colour
) -> list[Label]:
    """How many members contain each of the largest components, '4/5'; ``scale`` enlarges them."""
    return [
        Label(f"{component.found}/{members}", [scale * side for side in component.box], colour)
        for component in components[:MOST_LABELS]
    ]


class _Case(NamedTuple):
    """The layers of one case, enlarged to a panel of ``size`` (width, height)."""

    size: tuple[int, int]
    picture: Floats  # [h, w, 3] in [0, 1]
    truth: Floats | None  # [h, w], smoothed, contour at 0.5
    fused: Floats
    outline: Floats  # [h, w], of fused >= 0.5, smoothed; fused may lie at 0.5 over whole areas
    uncertainty: Floats  # [h, w] in [0, 1]
    scale: float  # of the enlargement

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

        size = fitted((height, width), panel)
        return cls(
            size=size,
            picture=enlarge(shown, size),
            truth=None if truth is None else enlarge_mask(np.asarray(truth), size),
            fused=enlarge_mask(soft, size),
            outline=enlarge_mask(metrics.binarise(soft), size),
            uncertainty=np.clip(enlarge(np.asarray(uncertainty, np.float32), size), 0, 1),
            scale=size[0] / width,
        )

    def marks(self) -> tuple[tuple[Colour, str], ...]:
        """The legend of the fused panel."""
        fused = ((FUSED, "fused"),)
        return fused if self.truth is None else ((TRUTH, "truth"), *fused)

    def with_truth(self) -> Floats:
        return self.picture if self.truth is None else draw_line(self.picture, self.truth, TRUTH)

    def with_fused(self) -> Floats:
        tinted = blend(self.picture, TINT, 0.45 * self.fused)
        outlined = draw_line(tinted, self.outline, FUSED)
        return outlined if self.truth is None else draw_line(outlined, self.truth, TRUTH, width=1.7)

    def with_uncertainty(self) -> Floats:
        """Add the map's colours to the dimmed grey image, which alone is seen at 0."""
        grey = self.picture.mean(axis=-1, keepdims=True) * 0.45
        colours = heat(self.uncertainty).astype(np.float32) / np.float32(255)
        mixed: Floats = grey * (1 - self.uncertainty[..., None]) + colours
        return np.clip(mixed, 0, 1)


def _painted(case: _Case, masks: NDArray[np.bool_]) -> Floats:
    """Outline the masks [K, H, W] on the picture, tinted by the last one at each pixel."""
    painted = case.picture
    colours = [colour for _, colour in zip(masks, cycle(CLASSES), strict=False)]
    for k, colour in enumerate(colours):
        seen = masks[k] & ~masks[k + 1 :].any(axis=0)
        painted = blend(painted, colour, 0.4 * enlarge_mask(seen, case.size))
    for mask, colour in zip(masks, colours, strict=True):
        if mask.any():
            painted = draw_line(painted, enlarge_mask(mask, case.size), colour, width=1.7)
    return painted


def _verdict(truth: ArrayLike | None, fused: ArrayLike, members: int) -> str:
    """The right side of the header: Dice at 0.5 where there is a truth, and the members."""
    drawn = counted(members, "member")
    if truth is None:
        return drawn

    counts = metrics.confusion(metrics.binarise(fused), metrics.binarise(truth))
    if counts.empty_truth:
        found = (
            "none predicted"
            if counts.empty_prediction
            else f"{counted(counts.fp, 'pixel')} predicted"
        )
        return f"no lesion, {found}  ·  {drawn}"
    return f"Dice {metrics.dice(counts):.3f}  ·  {drawn}"


def _class_verdict(
    truth: NDArray[np.bool_], found: NDArray[np.bool_], classes: Sequence[str]
) -> str:
    """The Dice of the classes present; of more than four, their mean."""
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
    """One case of a contact sheet: image [C, H, W], mask [K, H, W] or None, and its name."""

    image: ArrayLike
    mask: ArrayLike | None
    name: str


def contact_sheet(
    tiles: Sequence[Tile], *, title: str, subtitle: str = "", columns: int = 6, panel: int = 220
) -> Pixels:
    """Draw a page of cases with the outlines of their masks, one colour for each class.

    ``panel`` is the side of a tile in pixels. Returns uint8 [h, w, 3]. Raises ValueError where a
    mask and its image differ in size.
    """
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    canvas = Canvas(columns, (panel, panel), rows=rows)
    canvas.header(title, subtitle)
    for index, tile in enumerate(tiles):
        pixels, caption = _outlined(tile, panel)
        canvas.place(index, pixels, caption)
    return np.asarray(canvas.picture)


def _outlined(tile: Tile, panel: int) -> tuple[Floats, Caption]:
    """Draw a tile on a square background; its caption has its name, and whether it is empty."""
    shown = _displayed(np.asarray(tile.image, dtype=np.float32))
    masks = np.zeros((0, *shown.shape[:2])) if tile.mask is None else np.asarray(tile.mask)
    if masks.shape[1:] != shown.shape[:2]:
        raise ValueError(f"image is {shown.shape[:2]}, mask is {masks.shape[1:]}")

    width, height = fitted(shown.shape[:2], panel)
    picture = enlarge(shown, (width, height))
    for mask, colour in zip(masks, cycle(CLASSES), strict=False):
        if mask.any():
            picture = draw_line(picture, enlarge_mask(mask, (width, height)), colour, width=2.3)
    square = np.full((panel, panel, 3), BACKGROUND, dtype=np.float32) / np.float32(255)
    top, left = (panel - height) // 2, (panel - width) // 2
    square[top : top + height, left : left + width] = picture
    state = "no mask" if tile.mask is None else "" if masks.any() else "empty"
    return square, Caption(tile.name, note=state)


def strip(
    panels: Sequence[ArrayLike], captions: Sequence[str], *, title: str, columns: int
) -> Pixels:
    """Draw grey pictures, [H, W] in [0, 1] and of one size, in rows of ``columns``.

    Returns uint8 [h, w, 3].
    """
    height, width = np.shape(panels[0])
    scale = max(1, 160 // max(height, width))
    rows = -(-len(panels) // columns)
    canvas = Canvas(columns, (max(160, width * scale), height * scale), rows=rows)
    canvas.header(title, "")
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        grey = np.repeat(np.asarray(panel, dtype=np.float32)[..., None], 3, axis=-1)
        canvas.place(index, grey.repeat(scale, axis=0).repeat(scale, axis=1), Caption(caption))
    return np.asarray(canvas.picture)


def displayed(image: ArrayLike) -> Pixels:
    """Convert an image [C, H, W] of any range as overlays show it, to uint8 [H, W, 3]."""
    return soft_png(_displayed(np.asarray(image, dtype=np.float32)))


def _displayed(image: Floats) -> Floats:
    """Convert an image [C, H, W] of any range to [H, W, 3] in [0, 1].

    Three channels are colour, of which values in [0, 1] are kept; else the last channel is shown in
    grey. Everything else is stretched between its 1st and 99.5th percentile.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be [C, H, W], not {image.shape}")
    shown = image if len(image) == 3 else np.repeat(image[-1:], 3, axis=0)
    shown = np.moveaxis(np.nan_to_num(shown), 0, -1)
    if len(image) == 3 and shown.min() >= 0 and shown.max() <= 1:
        return shown

    low, high = np.percentile(shown, (1, 99.5))
    return np.clip((shown - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
