"""Surface distances by value: boxes and discs in closed form, and constants of MONAI and medpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.scoring.surface import (
    average_surface_distance,
    hd95,
    surface,
    surface_dice,
    surface_distances,
)


def hausdorff(distances):
    """The largest distance of all."""
    return max(directed.max() for directed in distances)


def disc(shape, centre, radius):
    grids = np.meshgrid(*map(np.arange, shape), indexing="ij")
    parts = [(grid - c) ** 2 / r**2 for grid, c, r in zip(grids, centre, radius, strict=True)]
    return sum(parts) <= 1


def box(shape, *sides):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def test_the_surface_of_a_square_is_its_rim():
    mask = box((9, 9), (2, 7), (3, 8))
    rim = mask.copy()
    rim[3:6, 4:7] = False
    assert surface(mask).tolist() == np.argwhere(rim).tolist()


def test_the_border_of_the_picture_is_a_surface_and_holes_have_one():
    assert len(surface(np.ones((4, 5), dtype=bool))) == 2 * 4 + 2 * 5 - 4
    ring = box((7, 7), (1, 6), (1, 6))
    ring[3, 3] = False
    assert len(surface(ring)) == 16 + 4
    assert surface(np.zeros((3, 3), dtype=bool)).shape == (0, 2)
    assert surface(box((4, 4), (1, 2), (2, 3))).tolist() == [[1, 2]]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 3.0), (2.0, 0.25)])
def test_parallel_lines_have_one_distance(spacing):
    """Two lines of one pixel's width, so that every surface pixel is as far away as the others."""
    one, other = box((12, 20), (2, 3), (0, 20)), box((12, 20), (7, 8), (0, 20))
    distances = surface_distances(one, other, spacing=spacing)
    far = 5 * spacing[0]
    assert distances.pooled.tolist() == [far] * 40
    assert hd95(distances) == hausdorff(distances) == average_surface_distance(distances) == far
    assert surface_dice(distances, far) == 1
    assert surface_dice(distances, far * (1 - 1e-5)) == 0


@pytest.mark.parametrize("shift", [(6, 0), (0, 8), (-4, 10)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 2.5), (3.0, 0.4)])
def test_a_shifted_disc_has_its_distances_in_closed_form(shift, spacing):
    """A circle of radius r in millimetres, moved by v: at angle t its points are as far from the
    first circle as sqrt(r^2 + 2 r v cos t + v^2) is from r.
    """
    r, v = 90.0, math.hypot(shift[0] * spacing[0], shift[1] * spacing[1])
    shape = tuple(round(2 * r / step) + 40 for step in spacing)
    centre = tuple(length // 2 for length in shape)
    there = disc(shape, centre, [r / step for step in spacing])
    moved = np.roll(there, shift, axis=(0, 1))
    angles = np.linspace(0, 2 * math.pi, 20001)[1:]
    exact = np.abs(np.sqrt(r * r + 2 * r * v * np.cos(angles) + v * v) - r)

    distances = surface_distances(moved, there, spacing=spacing)
    grid = math.hypot(*spacing)
    assert hausdorff(distances) == pytest.approx(v, abs=grid)
    assert hd95(distances) == pytest.approx(np.percentile(exact, 95), abs=grid)
    if spacing == (1.0, 1.0):  # pixels lie evenly along the circle, but for the raster
        assert average_surface_distance(distances) == pytest.approx(exact.mean(), rel=0.05)
        assert surface_dice(distances, v / 2) == pytest.approx((exact <= v / 2).mean(), abs=0.05)
    if 0 in shift:
        assert hausdorff(distances) == pytest.approx(v)


def test_percentile_and_means_by_hand():
    """A pixel at 0 and one at 10 against one at 0: directed 0 and 10, back 0."""
    one, other = np.zeros((1, 12), dtype=bool), np.zeros((1, 12), dtype=bool)
    one[0, [0, 10]] = True
    other[0, 0] = True
    distances = surface_distances(one, other)
    assert (distances.to_truth.tolist(), distances.to_prediction.tolist()) == ([0, 10], [0])
    assert hd95(distances) == pytest.approx(9.5)
    assert average_surface_distance(distances) == pytest.approx(10 / 3)
    assert surface_dice(distances, 2) == pytest.approx(2 / 3)


# Made with MONAI 1.6.1 (compute_hausdorff_distance with percentile 95, compute_surface_dice with
# class_thresholds [2.0]) and medpy 0.5.2 (metric.binary.hd, hd95, asd, assd) on these very masks.
DISCS = (disc((40, 48), (18, 20), (9, 9)), disc((40, 48), (20, 25), (10, 10)))
CORNER = DISCS[1] | box((40, 48), (0, 3), (44, 48))
ELLIPSOIDS = (
    disc((16, 20, 24), (7, 9, 10), (4, 5, 6)),
    disc((16, 20, 24), (8, 10, 12), (3, 4, 7)),
)
OTHERS = [
    # masks, spacing, Hausdorff, HD95 of MONAI, of medpy, directed means, ASSD, surface Dice
    (DISCS, (1, 1), 6.403124, 6.344198, 6.082763, 3.089370, 3.522812, 3.322762, 0.278846),
    (DISCS, (0.7, 2.5), 15.065192, 12.852510, 12.569370, 3.816782, 5.246068, 4.586398, 0.259615),
    (ELLIPSOIDS, (3, 1, 1.5), 6.782330, 6.0, 5.211753, 2.200470, 1.603806, 1.934312, 0.625),
    (
        (CORNER, DISCS[0]),
        (1, 1),
        *(23.600847, 22.359833, 21.390847, 6.295701, 3.089370, 4.945667, 0.254386),
    ),
]


@pytest.mark.parametrize(
    ("masks", "spacing", "far", "monai", "medpy", "there", "back", "both", "within"), OTHERS
)
def test_constants_of_monai_and_medpy(masks, spacing, far, monai, medpy, there, back, both, within):
    distances = surface_distances(*masks, spacing=spacing)
    assert hausdorff(distances) == pytest.approx(far, abs=1e-5)
    assert hd95(distances) == pytest.approx(monai, abs=1e-5)
    assert np.percentile(distances.pooled, 95) == pytest.approx(medpy, abs=1e-5)
    assert distances.to_truth.mean() == pytest.approx(there, abs=1e-5)
    assert distances.to_prediction.mean() == pytest.approx(back, abs=1e-5)
    assert average_surface_distance(distances) == pytest.approx(both, abs=1e-5)
    assert surface_dice(distances, 2.0) == pytest.approx(within, abs=1e-5)


MASKS = st.lists(st.integers(0, 2**36 - 1), min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(MASKS, st.sampled_from([(1.0, 1.0), (0.5, 2.0)]))
def test_symmetric_bounded_and_as_by_brute_force(bits, spacing):
    one, other = (
        np.array([number >> k & 1 for k in range(36)], dtype=bool).reshape(6, 6) for number in bits
    )
    distances = surface_distances(one, other, spacing=spacing)
    if not one.any() or not other.any():
        assert distances is None
        return

    ours, theirs = surface(one) * spacing, surface(other) * spacing
    table = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    assert distances.to_truth == pytest.approx(table.min(axis=1))
    assert distances.to_prediction == pytest.approx(table.min(axis=0))

    swapped = surface_distances(other, one, spacing=spacing)
    for measure in (hausdorff, hd95, average_surface_distance):
        assert measure(distances) == pytest.approx(measure(swapped))
        assert 0 <= measure(distances) <= hausdorff(distances) + 1e-12
    assert 0 <= surface_dice(distances, 1) <= surface_dice(distances, 2) <= 1
    same = surface_distances(one, one, spacing=spacing)
    assert hausdorff(same) == 0 and surface_dice(same, 0) == 1


def test_what_cannot_be_measured():
    mask = np.ones((3, 4), dtype=bool)
    for pair in ((mask, ~mask), (~mask, mask), (~mask, ~mask)):
        assert surface_distances(*pair) is None
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        surface_distances(mask, mask.T)
    for spacing in ((1,), (1, 0), (1, float("nan"))):
        with pytest.raises(ValueError, match="spacing is"):
            surface_distances(mask, mask, spacing=spacing)


@pytest.mark.parametrize("size", [0.4, 0.2, 0.1])
def test_the_tolerance_holds_for_spacings_in_float32(size: float) -> None:
    """NIfTI stores 0.4 mm as 0.4000000059604645: 5 voxels are then just beyond 2 mm."""
    apart = round(2 / size)
    first, second = np.zeros((2, 3, apart + 1), dtype=bool)
    first[1, 0], second[1, apart] = True, True
    distances = surface_distances(first, second, spacing=[float(np.float32(size))] * 2)
    assert distances is not None
    assert surface_dice(distances, 2.0) == 1.0
    assert surface_dice(distances, 2.0 * (1 - 1e-5)) == 0.0
