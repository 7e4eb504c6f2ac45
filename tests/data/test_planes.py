"""Planes of volumes and slices by their headers, in memory: every orientation, every refusal."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from spatial import LPS, SHAPE, bare, head, oblique, stored

from guided_diffusion.data.geometry import (
    PLANES,
    Grid,
    as_it_lies,
    grid_of,
    mismatch,
    nifti_like,
    place,
    plane_affine,
    require_view,
    restored,
    spacing,
    spatial,
    turn_to,
    view_on,
    view_resized,
)
from guided_diffusion.errors import UserError

CODES = [
    "".join(letters)
    for pairs in permutations([("L", "R"), ("P", "A"), ("S", "I")])
    for letters in product(*pairs)
]
SIZES = (2.0, 2.5, 4.0)


def grid(values: np.ndarray, affine: np.ndarray = LPS, codes: str = "LPS") -> Grid:
    return grid_of(stored(values, codes, affine))


def with_sform(values: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """An image as it is read from a file with this affine, which may be singular."""
    header = nib.Nifti1Image(values, np.eye(4)).header
    header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
    return nib.Nifti1Image.from_bytes(nib.Nifti1Image(values, None, header).to_bytes())


def scaled(*, by: tuple[float, ...], shift: float = 0.0, axis: int = 0) -> np.ndarray:
    """LPS with voxels ``by`` times as large and the same edge, then shifted by small voxels."""
    affine = LPS.copy()
    affine[:3, :3] = LPS[:3, :3] * by
    start = [(factor - 1) / 2 for factor in by]
    start[axis] += shift
    affine[:3, 3] = (LPS @ (*start, 1))[:3]
    return affine


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("affine", [LPS, oblique()], ids=["straight", "oblique"])
def test_planes_of_all_orientations_lie_alike(affine: np.ndarray, plane: str) -> None:
    sliced = PLANES.index(plane)
    target = place(grid(head(), affine), plane)
    others = [size for axis, size in enumerate(SIZES) if axis != sliced]
    for codes in CODES:
        image = stored(head(), codes, affine)
        array, placed = np.asarray(image.dataobj), place(grid_of(image), plane)
        view = placed.view
        assert view_on(grid_of(image), target) == view
        assert view.depth == SHAPE[sliced]
        assert spacing(placed) == pytest.approx((*others, SIZES[sliced]))
        np.testing.assert_array_equal(plane_affine(placed), plane_affine(placed, 0))
        for index in (0, 1, SHAPE[sliced] - 1):
            raw = np.take(array, view.position(index), axis=view.axis)
            shown = np.take(head(), index, axis=sliced)
            np.testing.assert_array_equal(view.turn(raw), shown)
            np.testing.assert_array_equal(view.turn_back(shown), raw)
            stack = np.stack([raw, raw + 1, raw + 2])
            np.testing.assert_array_equal(view.turn(stack)[1], shown + 1)
            np.testing.assert_array_equal(view.turn_back(view.turn(stack)), stack)
            assert view.is_plain == np.array_equal(raw, shown)
            at = np.insert([3.0, 4.0], sliced, index)
            np.testing.assert_allclose(
                plane_affine(placed, index) @ [3, 4, 0, 1], affine @ [*at, 1], atol=1e-5
            )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_all_orientations_are_shown_and_restored(axis: int) -> None:
    part = tuple(slice(2, 3) if k == axis else slice(None) for k in range(3))
    shown, target = head()[part].squeeze(axis), place(grid(head()[part]))
    for codes in CODES:
        image = stored(head()[part], codes)
        array, placed = np.asarray(image.dataobj), place(grid_of(image))
        view = placed.view
        np.testing.assert_array_equal(view.turn(array.squeeze(view.axis)), shown)
        assert view_on(grid_of(image), target) == view and view.depth == 1
        np.testing.assert_array_equal(restored(placed, shown), array)
        many = restored(placed, np.stack([shown, shown + 1]))
        np.testing.assert_array_equal(many, np.stack([array, array + 1], axis=3))
    flat = place(grid(head()[..., 2]))
    np.testing.assert_array_equal(restored(flat, head()[..., 2], axes=2), head()[..., 2])
    assert restored(flat, head()[None, ..., 2], axes=2).shape == (12, 10, 1, 1)


def test_axes_of_length_1_behind_the_third_do_not_count() -> None:
    for stated, shape in (
        ((3, 4), (3, 4, 1)),
        ((3, 1, 1), (3, 1, 1)),
        ((3, 4, 5, 1), (3, 4, 5)),
        ((3, 4, 5, 1, 1), (3, 4, 5)),
        ((3, 4, 1, 1), (3, 4, 1)),
        ((3, 4, 5, 2), (3, 4, 5, 2)),
        ((3, 4, 5, 1, 2), (3, 4, 5, 1, 2)),
    ):
        assert grid_of(nib.Nifti1Image(np.zeros(stated, np.uint8), LPS)).shape == shape
    channels = grid_of(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), LPS))
    assert spatial(channels).shape == (3, 4, 5) and spatial(grid(head())) == grid(head())
    assert channels.slicing is None and channels.lengths == (3, 4, 5, 2)
    more = grid_of(nib.Nifti1Image(np.zeros((3, 1, 5, 2, 2), np.uint8), LPS))
    assert more.slicing is None and spatial(more) == more
    for shape, slicing, lengths in (((1, 4, 5), 0, (4, 5)), ((3, 1, 5), 1, (3, 5))):
        thin = grid_of(nib.Nifti1Image(np.zeros(shape, np.uint8), LPS))
        assert (thin.slicing, thin.lengths) == (slicing, lengths)
    assert str(thin) == "[-2 0 0 23; 0 -2.5 0 31; 0 0 4 -7]"
    one = grid_of(nib.Nifti1Image(np.zeros((1, 4, 1), np.uint8), LPS))
    assert one.slicing == 2 and one.lengths == (1, 4)
    with pytest.raises(ValueError, match="no grid of voxels"):
        grid_of(nib.MGHImage(np.zeros((3, 4, 5), np.float32), LPS))


@pytest.mark.parametrize(
    ("unit", "factor"), [("unknown", 1), ("mm", 1), ("meter", 1000), ("micron", 0.001)]
)
def test_units_of_length(unit: str, factor: float) -> None:
    image = stored(head())
    image.header.set_xyzt_units(unit, "sec")
    assert grid_of(image).unit == (None if unit == "unknown" else factor)
    assert spacing(place(grid_of(image))) == pytest.approx([size * factor for size in SIZES])
    smaller = nib.Nifti1Image(head(), np.diag([1 / factor, 1 / factor, 1 / factor, 1]) @ LPS)
    smaller.header.set_xyzt_units(unit)
    unknown = place(grid(head()))  # of no unit, so that numbers are compared as they are
    assert (view_on(grid_of(smaller), unknown) is None) == (factor != 1)
    millimetres = stored(head())
    millimetres.header.set_xyzt_units("mm")
    assert view_on(grid_of(smaller), place(grid_of(millimetres))) is not None
    assert view_on(grid_of(millimetres), place(grid_of(smaller))) is not None


def test_a_header_that_states_nothing() -> None:
    unknown = grid_of(bare(head(), SIZES))
    assert not unknown.stated and place(unknown).view.is_plain
    assert spacing(place(unknown)) == SIZES == unknown.sizes
    image = stored(head())
    image.set_qform(LPS, 1)
    image.set_sform(None, 0)
    assert grid_of(image).stated
    assert spacing(place(grid_of(with_sform(head(), LPS)))) == SIZES  # not pixdim, which says 1
    assert not grid_of(nib.Nifti1Image(head(), np.eye(4))).stated
    for bad in (0.0, np.nan):
        affine = LPS.copy()
        affine[0, 0] = bad
        assert not grid_of(with_sform(head(), affine)).stated
    for size in (0.0, np.nan, np.inf):
        image = bare(head(), SIZES)
        image.header["pixdim"][2] = size
        assert spacing(place(grid_of(image))) is None
    for other in (unknown, grid(head())):
        assert view_on(unknown, place(other)) is not None
        assert view_on(grid_of(bare(head()[:, :, :5])), place(other)) is None
    assert view_on(grid(head(), LPS, "RAS"), place(unknown)) == as_it_lies(unknown)
    turned = place(grid(head(), LPS, "RAI"))
    assert view_on(unknown, turned) == turned.view and turned.view.flips == (True, True)
    sideways = grid_of(bare(head()[:, :, :1].transpose(2, 0, 1)))
    flat = place(grid(head()[:, :, :1]))
    view = view_on(sideways, flat)
    assert view is not None and (view.axis, view.depth, view.is_plain) == (0, 1, True)
    assert turn_to(sideways, flat.grid) == ((2, 1), (0, 1), (1, 1))
    assert turn_to(flat.grid, sideways) == ((1, 1), (2, 1), (0, 1))
    for pair in ((unknown, flat.grid), (grid_of(bare(head()[:1])), unknown)):
        assert turn_to(*pair) == ((0, 1), (1, 1), (2, 1))


def test_a_slice_cut_from_a_volume_that_states_nothing_is_not_turned() -> None:
    affine = np.eye(4)
    affine[2, 3] = 7
    cut = grid_of(nib.Nifti1Image(head()[:, :, 2:3], affine))
    assert cut.stated and place(cut).view.is_plain
    affine[0, 3] = 7
    moved = grid_of(nib.Nifti1Image(head()[:, :, 2:3], affine))
    assert place(moved).view.flips == (True, True)
    whole = np.eye(4)
    whole[2, 3] = 7
    assert place(grid_of(nib.Nifti1Image(head(), whole))).view.flips == (True, True)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", ["LPS", "RAI", "SAR"])
def test_grids_coincide_within_a_tenth_of_a_voxel_at_every_corner(axis: int, codes: str) -> None:
    target = place(grid(head()))
    for shift in (-0.11, -0.09, 0.09, 0.11):
        ones = scaled(by=(1, 1, 1), shift=shift, axis=axis)
        assert (view_on(grid(head(), ones, codes), target) is None) == (abs(shift) > 0.1)
    for drift in (0.09, 0.11):  # voxels that are a little larger, so that the far end is elsewhere
        by = [1.0, 1.0, 1.0]
        by[axis] += drift / (SHAPE[axis] - 1)
        affine = LPS.copy()
        affine[:3, :3] = LPS[:3, :3] * by
        assert (view_on(grid(head(), affine, codes), target) is None) == (drift > 0.1)


@pytest.mark.parametrize(("factor", "limit"), [(2.0, 2.1), (0.5, 1.1)])
def test_planes_of_another_size_cover_the_case(factor: float, limit: float) -> None:
    """Within the larger voxel: 2 small ones for a coarse label, 1 of the case's for a fine one."""
    target, by = place(grid(head())), (factor, factor, 1.0)
    values = np.zeros((round(12 / factor), round(10 / factor), 6), np.uint8)
    for codes in CODES:
        for axis, shift in product((0, 1), (0, limit - 0.05, 0.05 - limit)):
            view = view_resized(grid(values, scaled(by=by, shift=shift, axis=axis), codes), target)
            assert view is not None and view.depth == 6
        for axis, shift in product((0, 1), (limit + 0.05, -limit - 0.05)):
            moved = grid(values, scaled(by=by, shift=shift, axis=axis), codes)
            assert view_resized(moved, target) is None
    deep = scaled(by=by, shift=1.2, axis=2)
    assert view_resized(grid(values, deep), target) is None
    assert view_resized(grid(values[..., :5], scaled(by=(*by[:2], 1.2))), target) is None
    assert view_resized(grid(head()), target) is None
    assert view_resized(grid_of(bare(values)), target) == as_it_lies(grid_of(bare(values)))
    unknown = place(grid_of(bare(head())))
    assert view_resized(grid(values), unknown) == as_it_lies(grid(values))
    four = grid_of(nib.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), LPS))
    assert view_resized(four, target) is None and view_on(four, target) is None


@pytest.mark.parametrize("start", [0, -1], ids=["near edge", "far edge"])
@pytest.mark.parametrize(("excess", "covers"), [(0.16, True), (0.19, False)])
def test_both_edges_of_planes_of_another_size_count(
    start: int, excess: float, covers: bool
) -> None:
    """One edge fits, the other is 12 times the excess away: up to 2.1 voxels of the case do."""
    coarse = scaled(by=(2 * (1 + excess), 2, 1), shift=start * 12 * excess)
    label = grid(np.zeros((6, 5, 6), np.uint8), coarse)
    assert (view_resized(label, place(grid(head()))) is not None) == covers


def test_arrays_as_they_lie() -> None:
    assert as_it_lies(grid(head(), LPS, "RAI")) == (2, 6, False, False, (False, False))
    assert as_it_lies(grid(head()[:1])) == (0, 1, False, False, (False, False))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    label, image = tmp_path / "label.nii", tmp_path / "image.nii"
    target = place(grid(head()))
    view = require_view(label, grid(head(), LPS, "RAS"), target, other=image)
    assert view == place(grid(head(), LPS, "RAS")).view
    with pytest.raises(UserError, match=r"its grid is 12 x 10 x 5, but that of image\.nii is 12 x"):
        require_view(label, grid(head()[..., :5]), target, other=image)

    def said(values: np.ndarray, affine: np.ndarray, codes: str = "LPS") -> str:
        return str(mismatch(label, grid(values, affine, codes), target.grid, other=image))

    assert "affine (RAS) has other orientation or origin than image.nii (LPS)" in said(
        head(), scaled(by=(1, 1, 1), shift=1), "RAS"
    )
    assert "other axes or spacing" in said(head(), scaled(by=(1, 1.1, 1)))
    assert "other axes or spacing" in said(head(), oblique())
    for by in ((1, 1, 1.1), (1.04, 1, 1)):
        assert "other axes or spacing" in said(head(), scaled(by=by))
    assert "other orientation or origin" in said(head(), scaled(by=(1.004, 1, 1), shift=5))
    flat = mismatch(label, grid(head()[:11, :, :1]), grid(head()[..., :1]), other=image)
    assert "its size is 11 x 10, but that of image.nii is 12 x 10; the affines are [-2 0" in str(
        flat
    )
    unknown = mismatch(label, grid_of(bare(head()[:11])), target.grid, other=image)
    assert "its grid is 11 x 10 x 6, but" in str(unknown) and "affines" not in str(unknown)
    nowhere = mismatch(label, grid(head()[:11]), grid_of(bare(head())), other=image)
    assert "affines" not in str(nowhere)
    four = grid_of(nib.Nifti1Image(np.zeros((12, 10, 6, 2), np.uint8), LPS))
    assert "its grid is 12 x 10 x 6 x 2, but" in str(
        mismatch(label, four, target.grid, other=image)
    )


def test_an_image_like_another_keeps_its_space_and_nothing_of_its_values() -> None:
    original = stored(head())
    original.header.set_xyzt_units("meter")
    original.header.set_slope_inter(3, 4)
    original.header["cal_min"], original.header["cal_max"] = 1, 2
    original.header["descrip"] = "a patient"
    made = nifti_like(original, np.ones(SHAPE, np.uint8), note="drawn")
    header = made.header
    assert type(made) is type(original) and header.get_data_dtype() == np.uint8
    assert header.get_slope_inter() == (1, 0) or header.get_slope_inter() == (None, None)
    assert (header["cal_min"], header["cal_max"]) == (0, 0)
    assert header["descrip"].item() == b"drawn"
    assert header.get_xyzt_units()[0] == "meter"
    np.testing.assert_array_equal(made.affine, original.affine)


def test_a_slice_without_thickness_gets_a_normal_of_length_1() -> None:
    affine = oblique()
    affine[:3, 2] = 0
    found = grid_of(with_sform(head()[..., :1], affine))
    normal = found.matrix[:3, 2]
    assert found.stated and np.linalg.norm(normal) == pytest.approx(1)
    np.testing.assert_array_equal(grid(head()[..., :1]).matrix, LPS)
    assert normal @ found.matrix[:3, :2] == pytest.approx([0, 0], abs=1e-6)
    assert not grid_of(with_sform(head(), affine)).stated
    affine[:3, 1] = affine[:3, 0]
    assert not grid_of(with_sform(head()[..., :1], affine)).stated
