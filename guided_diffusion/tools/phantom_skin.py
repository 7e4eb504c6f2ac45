"""Skin phantoms: seeded dermatoscope-like pictures with ambiguous lesions and several raters.

The lesions are those of the brain phantoms, in two dimensions: they fade out over a border zone of
varying width, where raters differ. Freckles, hairs and vignetting surround them.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from guided_diffusion.tools.phantom_fields import (
    Array,
    Field,
    Grid,
    blobs,
    ramp,
    random_stream,
    sample_grid,
    smooth_field,
)
from guided_diffusion.tools.phantoms import Lesion, make_lesion, rater_panel


class Skin(NamedTuple):
    """A dermatoscope-like picture: uint8 [S, S, 3], masks uint8 [S, S] in {0, 255}, a class."""

    picture: Array
    mask: Array  # of the one rater drawn for this picture
    raters: tuple[Array, ...]  # masks of raters 1, 2, ...
    malignant: bool


def make_skin(seed: int, number: int, *, size: int = 128, raters: int = 0) -> Skin:
    """Return skin phantom `number` of the world `seed` as a picture of size x size pixels.

    The picture always spans the same field, so another size shows the same lesion coarser or
    finer. A pure function of its arguments.
    """
    draw = partial(random_stream, seed, number)
    grid = sample_grid((size, size))
    place = draw("skin place")
    centre, radius = place.uniform(-25, 25, 2), place.uniform(32, 62)
    lesion = make_lesion(draw("skin lesion"), grid, centre=centre, radius=radius)

    picture = np.rint(255 * skin_picture(draw("skin"), grid, lesion)).astype(np.uint8)
    labels, panel = rater_panel(seed, number, grid, lesion=lesion, raters=raters)
    mask, *others = (((m > 0) * 255).astype(np.uint8) for m in (labels, *panel))
    return Skin(picture, mask, tuple(others), bool(draw("class").uniform() < 0.25))


def skin_picture(rng: np.random.Generator, grid: Grid, lesion: Lesion) -> Field:
    """Render skin, freckles, lesion, hairs and vignetting; returns float64 [S, S, 3] in [0, 1]."""
    tone = np.array((0.86, 0.66, 0.56)) * rng.uniform(0.85, 1.08) + rng.uniform(-0.04, 0.04, 3)
    brown = np.array((0.50, 0.32, 0.24)) + rng.uniform(-0.09, 0.09) + rng.uniform(-0.03, 0.03, 3)
    pigment = 0.10 * smooth_field(rng, grid, spacing=14) + 0.05 * smooth_field(rng, grid, spacing=5)
    layers = [
        (freckles(rng, grid, lesion), brown - 0.03),
        (0.9 * ramp(lesion.level, lesion.fade), brown),
        (0.6 * ramp(lesion.core_level, 6.0), 0.55 * brown),
        (hairs(rng, grid), np.array((0.16, 0.11, 0.09))),
    ]

    shade = 0.06 * smooth_field(rng, grid, spacing=90) + 0.02 * smooth_field(rng, grid, spacing=8)
    picture = tone * (1 + shade)[..., None]
    for amount, colour in layers:
        picture += amount[..., None] * (colour * (1 + pigment)[..., None] - picture)

    x, y = np.ix_(*grid.axes)
    corner = ramp(np.sqrt(x**2 + y**2) - rng.uniform(125, 165), rng.uniform(8, 30))
    noise = 0.012 * rng.standard_normal(picture.shape)
    return np.clip(picture * (1 - 0.85 * corner)[..., None] + noise, 0, 1)


def freckles(rng: np.random.Generator, grid: Grid, lesion: Lesion) -> Field:
    """Return the amount in [0, 1] of small brown spots on healthy skin, which are no lesion."""
    count = int(rng.integers(3, 12))
    spots = blobs(rng, grid, count=count, radius=(3, 11), reach=(112, 112))
    spots += 1.5 * smooth_field(rng, grid, spacing=9)
    return ramp(spots, 2.5) * ramp(-lesion.level - lesion.fade - 6, 4) * rng.uniform(0.5, 1)


def hairs(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the amount in [0, 1] of thin bent hairs that cross skin and lesion alike."""
    x, y = np.ix_(*grid.axes)
    amount = np.zeros((x.size, y.size))
    for _ in range(int(rng.integers(0, 14))):
        x0, y0, angle = rng.uniform((-100, -100, 0), (100, 100, np.pi))
        along = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
        across = (y - y0) * np.cos(angle) - (x - x0) * np.sin(angle)
        bent = across - rng.uniform(-0.004, 0.004) * along**2
        here = ramp(0.7 - np.abs(bent), max(0.6, 0.5 * max(grid.steps)))
        amount = np.maximum(amount, here * ramp(rng.uniform(25, 90) - np.abs(along), 4))
    return 0.8 * amount
