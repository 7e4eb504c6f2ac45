"""Brain phantoms: seeded MRI-like patients with ambiguous lesions and several raters.

A phantom patient is a smooth function of millimetres that can be sampled on any voxel grid; slices,
whole volumes and every rater's mask therefore show one anatomy. Lesions fade out over a border zone
whose width varies along the contour, no single modality shows them by brightness alone, and raters
differ where the border fades. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from guided_diffusion.tools.phantom_fields import (
    Array,
    Field,
    Grid,
    blob,
    blobs,
    ramp,
    random_stream,
    sample_grid,
    smooth_field,
)

MODALITIES = ("t1", "t1ce", "t2", "flair")
CORE, OEDEMA, ENHANCING = 1, 2, 4  # BraTS label values
PANEL = 4  # raters among whom the one who drew `seg` is chosen
BRAIN_BOX = (84.0, 99.0, 77.5)  # mm either side of the centre that can hold brain
LESION_HEIGHTS = (-12.0, 24.0)  # mm above the middle of the head
RATER_SPREAD = 0.17  # rater's standard deviation, in half-widths of the border zone
NOISE = 0.025  # standard deviation of each Rician component, white matter in T1 being 0.72
CONTRAST = {  # tissue: intensity in t1, t1ce, t2, flair
    "white": (0.72, 0.70, 0.34, 0.40),
    "grey": (0.50, 0.49, 0.50, 0.54),
    "nuclei": (0.56, 0.55, 0.44, 0.49),
    "hyperintensity": (0.66, 0.64, 0.42, 0.86),  # bright in FLAIR, ordinary in T2: not a lesion
    "cyst": (0.20, 0.20, 0.92, 0.14),  # bright in T2, dark in FLAIR: not a lesion
    "fluid": (0.18, 0.18, 0.95, 0.12),
    "vessel": (0.62, 1.00, 0.22, 0.30),  # bright in T1ce only: not a lesion
    "oedema": (0.50, 0.49, 0.76, 0.74),
    "enhancing": (0.46, 0.86, 0.62, 0.68),
    "core": (0.28, 0.31, 0.78, 0.50),
}


@dataclass(frozen=True)
class Patient:
    """One phantom patient on a grid [H, W, D]; axes run left-right, front-back, bottom-top.

    modalities: name -> float32 [H, W, D], each axial slice scaled to [0, 1], background exactly 0.
    labels: uint8 [H, W, D] in {0, 1, 2, 4}, the mask of the one rater drawn for this patient.
    raters: the masks of raters 1, 2, ..., as many as were asked for, each like `labels`.
    level: float32 [H, W, D], latent lesion field in mm, positive inside, 0 on the mean contour.
    fade: float32 [H, W, D], half-width in mm of the zone in which the lesion's contrast fades.
    voxel_mm: edge lengths of a voxel in mm.
    """

    modalities: dict[str, Array]
    labels: Array
    raters: tuple[Array, ...]
    level: Array
    fade: Array
    voxel_mm: tuple[float, float, float]


class Lesion(NamedTuple):
    """A lesion as smooth fields in mm, all of one shape: level sets are the masks."""

    level: Field  # whole lesion, positive inside
    core_level: Field  # tumour core (labels 1 and 4), positive inside, below `level`
    rim: Field  # thickness of the enhancing rim around label 1
    fade: Field  # half-width of the border zone


def make_patient(
    seed: int,
    patient: int,
    *,
    shape: tuple[int, int, int] = (80, 80, 52),
    raters: int = 0,
    healthy: bool = False,
    heights: tuple[float, float] = LESION_HEIGHTS,
) -> Patient:
    """Return phantom patient number `patient` of the world `seed`, sampled on a grid [H, W, D].

    The grid always spans 240 x 240 x 155 mm, so (240, 240, 155) has 1 mm voxels and any other
    shape shows the same head coarser or finer. `raters` masks of raters 1, 2, ... come along.
    One who is `healthy` has all but the lesion; `level` says where it would be. Its centre lies
    within `heights`, in mm above the middle of the head. A pure function of the arguments.
    """
    full = sample_grid(shape)
    grid, corner = brain_box(full)
    depth, tissue = anatomy(seed, patient, grid)
    centre, radius = lesion_place(random_stream(seed, patient, "place"), heights)
    lesion = make_lesion(random_stream(seed, patient, "lesion"), grid, centre=centre, radius=radius)

    inside = depth > 0
    put = partial(place, shape=shape, corner=corner)
    amounts = tissue if healthy else tissue | lesion_amounts(lesion)
    images = render(seed, patient, grid, amounts=amounts, inside=inside)
    labels, panel = rater_panel(seed, patient, grid, lesion=lesion, raters=raters)
    return Patient(
        modalities={name: put(image) for name, image in images.items()},
        labels=put(labels * (inside & (not healthy))),
        raters=tuple(put(mask * (inside & (not healthy))) for mask in panel),
        level=put(np.where(inside, lesion.level, -99).astype(np.float32)),
        fade=put(lesion.fade.astype(np.float32)),
        voxel_mm=(full.steps[0], full.steps[1], full.steps[2]),
    )


def brain_box(grid: Grid) -> tuple[Grid, list[slice]]:
    """Cut the grid down to where brain can be; returns the smaller grid and its place."""
    corner = []
    for x, reach in zip(grid.axes, BRAIN_BOX, strict=True):
        near = np.flatnonzero(np.abs(x) <= reach)
        corner.append(slice(near[0], near[-1] + 1))
    axes = tuple(x[part] for x, part in zip(grid.axes, corner, strict=True))
    return Grid(axes, grid.steps), corner


def place(box: Array, shape: Sequence[int], corner: Sequence[slice]) -> Array:
    """Put an array computed on the brain's box into a zero array of the full shape."""
    full = np.zeros(shape, box.dtype)
    full[tuple(corner)] = box
    return full


def anatomy(seed: int, patient: int, grid: Grid) -> tuple[Field, dict[str, Field]]:
    """Return depth (mm) and the amount in [0, 1] of each healthy tissue, in painting order."""
    draw = partial(random_stream, seed, patient)
    depth = brain_depth(draw("outline"), grid)
    fluid = fluid_distance(draw("folds"), grid, depth)
    ventricle = ventricles(draw("ventricles"), grid)
    edge = max(0.8, 0.5 * max(grid.steps))  # partial volume: no edge is sharper than half a voxel

    inner = ramp(fluid - 6.0, 2.0)
    amounts = {
        "grey": ramp(4.8 - fluid, edge),
        "nuclei": ramp(nuclei(draw("nuclei"), grid), edge),
        "hyperintensity": inner * ramp(hyperintensities(draw("bright"), grid, ventricle), 3.0),
        "cyst": inner * ramp(cysts(draw("cysts"), grid), 2.0),
        "fluid": np.maximum(ramp(1.1 - fluid, edge), ramp(ventricle, edge)),
        "vessel": ramp(vessels(draw("vessels"), grid), edge),
    }
    return depth, amounts


def brain_depth(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the depth in mm below the brain's surface, positive inside: an uneven egg."""
    x, y, z = np.ix_(*grid.axes)
    a, b, c = rng.uniform((64, 80, 62), (71, 88, 68))
    narrowing = 1 - rng.uniform(0.06, 0.14) * y / b  # the forehead is narrower
    rho: Field = np.sqrt((x * narrowing / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)

    bumps = 2.2 * smooth_field(rng, grid, spacing=45) + 0.7 * smooth_field(rng, grid, spacing=12)
    return (1 - rho) * 70 + np.clip(bumps, -5, 5)


def fluid_distance(rng: np.random.Generator, grid: Grid, depth: Field) -> Field:
    """Return the distance in mm from outer fluid: surface, folds and the midline fissure."""
    x, y, _ = np.ix_(*grid.axes)
    folds = 8 * np.abs(smooth_field(rng, grid, spacing=11)) + np.maximum(depth - 15, 0)
    bend = 1.5 * smooth_field(rng, grid, spacing=50)
    fissure = np.abs(x + bend) + 0.7 * np.maximum(54 - np.abs(y), 0) - 0.6
    return np.minimum(np.minimum(depth, folds), fissure)


def ventricles(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the signed distance in mm to the ventricles, positive inside them."""
    x, y, z = np.ix_(*grid.axes)
    size, splay = rng.uniform(0.75, 1.5), rng.uniform(8, 15)
    third = blob(grid, (0, 2, -10), (2.4 * size, 12, 13))

    union = third
    for side in (-1, 1):
        width, long, high = size * rng.uniform((5.2, 30, 11), (7.4, 38, 15))
        middle = side * (width + 2 + splay * (y / 36) ** 2)
        rho = np.sqrt(((x - middle) / width) ** 2 + (y / long) ** 2 + ((z - 8) / high) ** 2)
        union = np.maximum(union, (1 - rho) * width)
    return union + 0.8 * smooth_field(rng, grid, spacing=14)


def nuclei(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the signed distance in mm to the deep grey nuclei of both sides."""
    union = 0.6 * smooth_field(rng, grid, spacing=14) - 0.5
    shapes = [((25, -6, -2), (7, 17, 12)), ((12, 14, -4), (8, 12, 10))]
    parts = []
    for (x, y, z), radii in shapes:
        scale = rng.uniform(0.85, 1.15)
        parts += [blob(grid, (side * x, y, z), np.multiply(radii, scale)) for side in (-1, 1)]
    return union + np.maximum.reduce(parts)


def hyperintensities(rng: np.random.Generator, grid: Grid, ventricle: Field) -> Field:
    """Return the distance in mm to FLAIR-bright tissue that is no lesion: caps, spots, one patch.

    The patch is as large and as soft as a lesion, so that FLAIR alone cannot tell the two apart.
    """
    caps = 1.5 - np.abs(ventricle + 2.0) + 1.5 * smooth_field(rng, grid, spacing=20)
    spots = blobs(rng, grid, count=int(rng.integers(4, 9)), radius=(4, 8), reach=(50, 62, 40))
    patch = blobs(rng, grid, count=int(rng.integers(1, 3)), radius=(13, 22), reach=(45, 55, 30))
    rough = 2.5 * smooth_field(rng, grid, spacing=14)
    return np.maximum.reduce([caps, spots + 0.5 * rough, patch + rough])


def cysts(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the distance in mm to fluid-filled pockets, bright in T2 like a lesion."""
    union = blobs(rng, grid, count=int(rng.integers(2, 6)), radius=(5, 13), reach=(52, 64, 40))
    return union + 1.5 * smooth_field(rng, grid, spacing=14)


def vessels(rng: np.random.Generator, grid: Grid) -> Field:
    """Return the distance in mm to thin bright tubes, where two smooth fields both vanish."""
    first, second = (smooth_field(rng, grid, spacing=30) for _ in range(2))
    return 2.4 - 16 * np.sqrt(first**2 + second**2)


def lesion_place(
    rng: np.random.Generator, heights: tuple[float, float] = LESION_HEIGHTS
) -> tuple[Field, float]:
    """Draw a lesion's centre (mm) beside the midline and its mean radius (mm)."""
    x = rng.choice((-1, 1)) * rng.uniform(20, 34)
    return np.array([x, rng.uniform(-38, 38), rng.uniform(*heights)]), rng.uniform(20, 28)


def make_lesion(rng: np.random.Generator, grid: Grid, *, centre: Field, radius: float) -> Lesion:
    """Draw a lesion around `centre` (mm): its nested level fields and the width of its border."""
    level = lobes(rng, grid, centre=centre, radius=radius)
    blur = ramp(smooth_field(rng, grid, spacing=26) - 0.6, 1.0)  # 0 sharp, 1 fading
    fade = 1.5 + 8.5 * blur

    inset = radius * rng.uniform(0.25, 0.5) + 2.5 * smooth_field(rng, grid, spacing=18)
    core_level = level - np.maximum(inset, 2.0)
    rim = np.maximum(rng.uniform(3, 6) + 1.5 * smooth_field(rng, grid, spacing=18), 1.0)
    return Lesion(level, core_level, rim, fade)


def lobes(rng: np.random.Generator, grid: Grid, *, centre: Field, radius: float) -> Field:
    """Return the distance in mm to a lobed body: one large ellipsoid and two or three smaller."""
    union = blob(grid, centre, radius * rng.uniform(0.75, 1.15, len(centre)))
    for _ in range(int(rng.integers(2, 4))):
        direction = rng.standard_normal(len(centre))
        shift = direction / np.sqrt((direction**2).sum()) * radius * rng.uniform(0.55, 0.85)
        radii = radius * rng.uniform(0.45, 0.7) * rng.uniform(0.8, 1.25, len(centre))
        np.maximum(union, blob(grid, centre + shift, radii), out=union)
    rough = 2.0 * smooth_field(rng, grid, spacing=18) + 1.0 * smooth_field(rng, grid, spacing=9)
    return union + rough


def lesion_amounts(lesion: Lesion) -> dict[str, Field]:
    """Return the amount in [0, 1] of each lesion tissue, in painting order."""
    soft = 0.5 * lesion.fade + 0.5
    return {
        "oedema": ramp(lesion.level, lesion.fade),
        "enhancing": ramp(lesion.core_level, soft) * ramp(lesion.level, lesion.fade),
        "core": ramp(lesion.core_level - lesion.rim, soft),
    }


def rater_panel(
    seed: int, patient: int, grid: Grid, *, lesion: Lesion, raters: int
) -> tuple[Array, tuple[Array, ...]]:
    """Return the mask of the rater drawn for this patient, and the masks of raters 1, 2, ...

    The drawn rater is one of the first `PANEL`, whatever number of masks is asked for.
    """
    drawn = int(random_stream(seed, patient, "rater drawn").integers(1, PANEL + 1))
    masks = {
        r: rater_labels(random_stream(seed, patient, f"rater {r}"), grid, lesion)
        for r in {drawn, *range(1, raters + 1)}
    }
    return masks[drawn], tuple(masks[r] for r in range(1, raters + 1))


def rater_labels(rng: np.random.Generator, grid: Grid, lesion: Lesion) -> Array:
    """Return one rater's mask, uint8 in {0, 1, 2, 4}: the level set under a smooth personal bias.

    The bias is proportional to the border's half-width, so raters agree where it is sharp.
    """
    habit = 0.3 * rng.standard_normal()
    mood = habit + 0.95 * smooth_field(rng, grid, spacing=24)
    bias = RATER_SPREAD * lesion.fade * mood

    labels = np.zeros(lesion.level.shape, np.uint8)
    lesion_mask = lesion.level > bias
    labels[lesion_mask] = OEDEMA
    labels[lesion_mask & (lesion.core_level > bias)] = ENHANCING
    labels[lesion_mask & (lesion.core_level > bias + lesion.rim)] = CORE
    return labels


def render(
    seed: int, patient: int, grid: Grid, *, amounts: dict[str, Field], inside: Array
) -> dict[str, Array]:
    """Return the four modalities of the painted tissues, name -> float32 in [0, 1]."""
    jitter = random_stream(seed, patient, "contrast").uniform(-0.04, 0.04, (len(CONTRAST), 4))
    images = {}
    for m, name in enumerate(MODALITIES):
        painted = paint(amounts, modality=m, jitter=jitter)
        acquired = acquire(random_stream(seed, patient, name), grid, painted)
        images[name] = scale_slices(acquired, inside)
    return images


def paint(amounts: dict[str, Field], *, modality: int, jitter: Field) -> Field:
    """Mix the tissues of one modality in order, the later over the earlier; returns intensity."""
    names = list(CONTRAST)
    image = np.full_like(amounts["grey"], CONTRAST["white"][modality])
    for tissue, amount in amounts.items():
        value = CONTRAST[tissue][modality] + jitter[names.index(tissue), modality]
        image += amount * (value - image)
    return image


def acquire(rng: np.random.Generator, grid: Grid, image: Field) -> Field:
    """Add what a scanner adds: tissue texture, a smooth bias field and Rician noise."""
    texture = 0.045 * smooth_field(rng, grid, spacing=5) + 0.03 * smooth_field(
        rng, grid, spacing=12
    )
    bias = 0.10 * smooth_field(rng, grid, spacing=85)
    signal = image * (1 + texture) * (1 + np.clip(bias, -0.3, 0.3))

    real, imaginary = (NOISE * rng.standard_normal(image.shape, np.float32) for _ in range(2))
    return np.sqrt((signal + real) ** 2 + imaginary**2)


def scale_slices(image: Array, inside: Array) -> Array:
    """Scale each axial slice to [0, 1] by its 99.7th percentile; background exactly 0, float32."""
    scaled = np.zeros(image.shape, np.float32)
    for z in range(image.shape[-1]):
        here = inside[..., z]
        if here.any():
            top = np.percentile(image[..., z][here], 99.7)
            scaled[..., z][here] = np.clip(image[..., z][here] / top, 1 / 255, 1)
    return scaled
