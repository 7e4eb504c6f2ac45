"""The layers of a case in the report: picture, outlines and uncertainty, small enough for hundreds.

Masks are outlines in SVG's path language, which stay crisp at any size and take the colours of the
page; the picture is a small JPEG and the uncertainty a small PNG, transparent where there is none,
both as data URIs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from skimage.measure import approximate_polygon, find_contours

from guided_diffusion.data.decoding import decoding, opened_picture
from guided_diffusion.errors import UserError
from guided_diffusion.report.canvas import (
    GAP,
    HEADER,
    HEAT,
    MARGIN,
    Floats,
    Pixels,
    fitted,
    image_panel,
    panel_grid,
)
from guided_diffusion.report.pictures import STD, displayed
from guided_diffusion.scoring.case_scores import CaseFiles, CaseMasks
from guided_diffusion.scoring.groups import Collect

SIDE = 224
"""Longer side of an embedded picture, in pixels."""
UNCERTAINTY_SIDE = 96
"""Longer side of an embedded uncertainty, which is smooth."""
MOST_PATH = 6000
"""Characters of an outline; longer ones are simplified."""
MOST_RINGS = 80
"""Rings of an outline, the longest ones; noise has more."""
MOST_PICTURES = 300
"""Cases and classes with embedded pictures; of more, the worst, the best and an even spread."""


class Layers(NamedTuple):
    """The layers of one case or class as text, and the size of its picture."""

    width: int
    height: int
    image: str  # data URI; empty where there is no picture
    truth: str  # outline
    fused: str  # outline
    uncertainty: str  # data URI; empty where nothing is uncertain


def collect_layers(folder: str | Path) -> Collect:
    """Collect the layers of the first cases while they are scored, so that no mask is read twice.

    ``folder`` is the result folder, which may hold overlays. Masks are not kept.
    """
    return Collect(partial(_layers_in, Path(folder)), MOST_PICTURES)


def _layers_in(
    folder: Path, files: Sequence[CaseFiles], masks: Sequence[CaseMasks]
) -> list[Layers]:
    return case_layers(files[0], masks, folder)


def case_layers(case: CaseFiles, masks: Sequence[CaseMasks], folder: Path) -> list[Layers]:
    """Make the layers of every class of a case; ``folder`` may hold its overlay."""
    height, width = masks[0].truth.shape
    picture = _picture(case, (height, width), folder)
    return [layers(picture, mask.truth, mask.outlined, mask.uncertainty) for mask in masks]


def overlay_view(folder: Path, name: str, *, base: str = "") -> dict[str, Any]:
    """Describe the view of a case that shows the panels of its overlay, a file beside the page.

    Only the headers of two pictures are read. ``base`` leads from the page to the folder. Empty
    where there is no overlay.
    """
    path = folder / f"{name}_overlay.png"
    try:
        with Image.open(folder / f"{name}_mask.png") as mask, Image.open(path) as drawn:
            grid = panel_grid(drawn.size[::-1], mask.size[::-1])
            total = drawn.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {}
    if grid is None:
        return {}
    return {
        "width": grid.width,
        "height": grid.height,
        "overlay": "".join((base, path.name)),
        "panels": grid.panels,
        "grid": [MARGIN, HEADER, grid.width + GAP],
        "size": total,
    }


def _picture(case: CaseFiles, size: tuple[int, int], folder: Path) -> Pixels | None:
    """The image of a case, from the data set or cut out of its overlay; None without either."""
    try:
        if case.truth.image is not None:
            return displayed(case.truth.image())
        return picture_in(folder / f"{case.name}_overlay.png", size)
    except UserError:
        return None


def picture_in(overlay: Path, size: tuple[int, int]) -> Pixels | None:
    """Cut the image of a case of ``size`` (height, width) out of its overlay.

    Raises:
        UserError: the file cannot be read.
    """
    with decoding(overlay, "picture"), opened_picture(overlay) as drawn:
        return image_panel(np.asarray(drawn.convert("RGB")), size)


def layers(
    picture: Pixels | None, truth: ArrayLike, fused: ArrayLike, uncertainty: ArrayLike
) -> Layers:
    """Make the layers of a case or class.

    ``picture`` is uint8 [h, w, 3] of any size, or None; ``truth`` and ``fused`` are [H, W] in
    [0, 1], outlined at one half; ``uncertainty`` is [H, W] in [0, 0.5]. Outlines are in units of
    the embedded picture, whose longer side is :data:`SIDE`.
    """
    height, width = np.shape(truth)
    scale, size = SIDE / max(height, width), fitted((height, width), SIDE)
    return Layers(
        *size,
        image="" if picture is None else _jpeg(picture, size),
        truth=outline(truth, scale=scale),
        fused=outline(fused, scale=scale),
        uncertainty=_heat_png(np.asarray(uncertainty, dtype=np.float32)),
    )


def outlines(masks: NDArray[np.float32]) -> str:
    """Trace masks [K, H, W] as one path in units of the embedded picture."""
    scale = SIDE / max(masks.shape[1:])
    return "".join(outline(mask, scale=scale) for mask in masks)


def outline(mask: ArrayLike, *, scale: float = 1.0) -> str:
    """Trace the 0.5 level set of a mask [H, W] as an SVG path, times ``scale``; may be empty.

    Holes are separate rings (rule ``evenodd``). Corners nearer than half a unit to their chord are
    left out, more of them where the outline is long.
    """
    padded = np.pad(np.asarray(mask, dtype=np.float32), 1)
    found = sorted(find_contours(padded, 0.4999), key=len)[-MOST_RINGS:]
    rings = [(_thinned(ring) - 0.5) * scale for ring in found]
    tolerance, path = 0.5, ""
    while rings:
        path = "".join(_ring(approximate_polygon(ring, tolerance)) for ring in rings)
        if len(path) <= MOST_PATH or tolerance > SIDE:
            break
        tolerance *= 1.6
        rings = [ring for ring in rings if np.ptp(ring, axis=0).max() > tolerance]
    return path


def _thinned(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keep every second corner of a long ring, fewer of a very long one: simplifying is slow."""
    step = 1 if len(ring) < 100 else max(2, len(ring) // 1000)
    return ring if step == 1 else np.concatenate([ring[:-1:step], ring[:1]])


def _ring(points: NDArray[np.float64]) -> str:
    """Format one closed ring of (row, column) positions; empty for fewer than three corners."""
    corners = [f"{x:.1f},{y:.1f}".replace(".0", "") for y, x in points[:-1]]
    return f"M{' '.join(corners)}z" if len(corners) > 2 else ""


def _jpeg(picture: Pixels, size: tuple[int, int]) -> str:
    small = Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    grey = small.convert("L")
    if np.abs(np.asarray(small).astype(int) - np.asarray(grey)[..., None]).max() <= 2:
        small = grey  # a third of the chroma's bytes are headers
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=72, optimize=True)
    return _uri(file, "jpeg")


def _heat_png(uncertainty: Floats) -> str:
    """Draw the uncertainty in sixteen steps, from transparent to the map's brightest colour."""
    size = fitted(uncertainty.shape, min(UNCERTAINTY_SIDE, max(uncertainty.shape)))
    small = np.asarray(Image.fromarray(uncertainty).resize(size, Image.Resampling.BOX))
    steps = np.rint(np.clip(small / STD[1], 0, 1) * 15).astype(np.uint8)
    if not steps.any():
        return ""

    picture = Image.fromarray(steps, mode="P")
    colours = [
        np.interp(np.linspace(0.45, 1, 16), np.linspace(0, 1, len(HEAT)), c)
        for c in np.transpose(HEAT)
    ]
    picture.putpalette(np.rint(np.stack(colours, axis=1)).astype(np.uint8).tobytes())
    file = io.BytesIO()
    ramp = bytes(round(255 * min(1.0, 1.6 * step / 15)) for step in range(16))
    picture.save(file, format="PNG", transparency=ramp, optimize=True, bits=4)
    return _uri(file, "png")


def _uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
