"""Files by their headers: labels on the grid of their image, and planes that are what they say."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from spatial import LPS, SHAPE, bare, head, lesion, oblique, pair, put, stored

from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.geometry import PLANES, grid_of, place, spacing
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset

AXES = ("LPS", "RAS", "LAS", "RPI", "PIR", "ASL", "SAR")
SCENES = [pytest.param(LPS, id="straight"), pytest.param(oblique(), id="oblique")]


def arrays(dataset: SegmentationDataset) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks of all cases, [cases, H, W]."""
    cases = [dataset[index] for index in range(len(dataset))]
    masks = [case.mask for case in cases if case.mask is not None]
    return torch.cat([case.image for case in cases]).numpy(), torch.cat(masks).numpy()


def planes(values: np.ndarray, plane: str = "axial") -> np.ndarray:
    """The planes of an array that lies as LPS, [planes, H, W]."""
    return np.moveaxis(values, PLANES.index(plane), 0)


AS_STORED = {"normalise": "none"}

# ------------------------------------------------------------------------- one grid for a case


@pytest.mark.parametrize("affine", SCENES)
@pytest.mark.parametrize("codes", AXES)
def test_a_label_of_other_axes_lies_on_its_image(
    tmp_path: Path, codes: str, affine: np.ndarray
) -> None:
    volumes = pair(tmp_path / "3d", stored(head(), "LPS", affine), stored(lesion(), codes, affine))
    images, masks = arrays(open_dataset(volumes, reading=Reading(**AS_STORED)))
    np.testing.assert_array_equal(images, planes(head()))
    np.testing.assert_array_equal(masks, planes(lesion()))

    flat = [
        stored(values[..., 2:3], to, affine) for values, to in ((head(), "LPS"), (lesion(), codes))
    ]
    images, masks = arrays(open_dataset(pair(tmp_path / "2d", *flat)))
    np.testing.assert_array_equal(images[0], head()[..., 2])
    np.testing.assert_array_equal(masks[0], lesion()[..., 2])


def test_an_identity_with_an_origin_is_an_orientation(tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1, 1, 1])
    affine[:2, 3] = SHAPE[0] - 1, SHAPE[1] - 1
    ras = nib.as_closest_canonical(nib.Nifti1Image(lesion(), affine))
    assert (ras.affine == np.eye(4)).all()
    affine[0, 3] += 239
    ras = nib.as_closest_canonical(nib.Nifti1Image(lesion(), affine))
    assert (ras.affine[:3, :3] == np.eye(3)).all()
    for name in ("t1", "t1ce", "t2", "flair"):
        put(tmp_path / f"p/p_{name}.nii.gz", nib.Nifti1Image(head(), affine))
    put(tmp_path / "p/p_seg.nii.gz", ras)
    np.testing.assert_array_equal(arrays(open_dataset(tmp_path))[1], planes(lesion()))


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_another_place_is_refused_with_both_affines(
    tmp_path: Path, axis: int, depth: int, codes: str
) -> None:
    moved = LPS.copy()
    moved[axis, 3] += 0.2 * abs(LPS[axis, axis])
    image, label = head()[..., :depth], lesion()[..., :depth]
    folder = pair(tmp_path / "far", stored(image), stored(label, codes, moved))
    with pytest.raises(
        UserError, match=r"masks.a\.nii\.gz: its affine .*; the affines are"
    ) as raised:
        open_dataset(folder)[0]
    assert f"{moved[axis, 3]:.5g}"[:4] in str(raised.value) or codes != "LPS"
    assert "[-2 0 0 23; 0 -2.5 0 31; 0 0 4 -7]" in str(raised.value)

    moved[axis, 3] = LPS[axis, 3] + 0.05 * abs(LPS[axis, axis])
    folder = pair(tmp_path / "near", stored(image), stored(label, codes, moved))
    np.testing.assert_array_equal(arrays(open_dataset(folder))[1], planes(label))


@pytest.mark.parametrize("change", ["spacing", "rotation", "depth"])
def test_another_grid_is_refused(tmp_path: Path, change: str) -> None:
    affine, label = LPS.copy(), lesion()
    if change == "spacing":
        affine[1, 1] *= 1.1
    elif change == "rotation":
        affine = oblique()
    else:
        label = label[..., :5]
    folder = pair(tmp_path, stored(head()), stored(label, "RAS", affine))
    words = "its grid is 12 x 10 x 5, but" if change == "depth" else "axes or spacing"
    with pytest.raises(UserError, match=words):
        open_dataset(folder)[2]


@pytest.mark.parametrize("kind", ["codes of 0", "identity"])
@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR"])
@pytest.mark.parametrize("depth", [1, 6])
def test_a_label_that_states_nothing_lies_as_it_is_stored(
    tmp_path: Path, depth: int, codes: str, kind: str
) -> None:
    image = stored(head()[..., :depth], codes)
    array = np.asarray(stored(lesion()[..., :depth], codes).dataobj)
    label = nib.Nifti1Image(array, np.eye(4)) if kind == "identity" else bare(array, (2, 2.5, 4))
    dataset = open_dataset(pair(tmp_path, image, label))
    np.testing.assert_array_equal(arrays(dataset)[1], planes(lesion()[..., :depth]))
    (note,) = [note for note in dataset.notes if "orientation" in note]
    assert f"{tmp_path / 'masks/a.nii.gz'} state no orientation" in note


@pytest.mark.parametrize("depth", [1, 6])
def test_an_image_that_states_nothing_lies_as_it_is_stored(tmp_path: Path, depth: int) -> None:
    values, label = head()[..., :depth], lesion()[..., :depth]
    for name, image in (
        ("zero", bare(values, (2, 2, 2))),
        ("one", nib.Nifti1Image(values, np.eye(4))),
    ):
        dataset = open_dataset(pair(tmp_path / name, image, nib.Nifti1Image(label, LPS)))
        images, masks = arrays(dataset)
        assert np.argmax(images) == np.argmax(planes(values))
        np.testing.assert_array_equal(masks, planes(label))
        assert len([note for note in dataset.notes if "no orientation" in note]) == 1
    with_header = open_dataset(pair(tmp_path / "said", stored(values), stored(label)))
    assert not any("orientation" in note for note in with_header.notes)


def test_channels_of_other_axes_are_brought_to_the_first(tmp_path: Path) -> None:
    for depth in (1, 6):
        names = zip(
            ("t1", "t1ce", "t2", "flair", "seg"), ("RAS", "LPS", "PIR", "SAR", "LAI"), strict=True
        )
        for name, codes in names:
            values = lesion() if name == "seg" else head()
            put(tmp_path / f"{depth}/p/p_{name}.nii.gz", stored(values[..., :depth], codes))
        dataset = open_dataset(tmp_path / str(depth), reading=Reading(**AS_STORED))
        for index in range(depth):
            case = dataset[index]
            for channel in case.image.numpy():
                np.testing.assert_array_equal(channel, head()[..., index])
            assert case.mask is not None
            np.testing.assert_array_equal(case.mask[0].numpy(), lesion()[..., index])


def test_units_count(tmp_path: Path) -> None:
    image, label = stored(head()), stored(lesion(), "RAS", np.diag([1e-3, 1e-3, 1e-3, 1]) @ LPS)
    image.header.set_xyzt_units("mm")
    label.header.set_xyzt_units("meter")
    dataset = open_dataset(pair(tmp_path, image, label))
    np.testing.assert_array_equal(arrays(dataset)[1], planes(lesion()))
    assert spacing(place(grid_of(label))) == pytest.approx((2, 2.5, 4))


# --------------------------------------------------------------------------------------- planes


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("affine", SCENES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("codes", AXES)
def test_volumes_are_sliced_by_their_affine(
    tmp_path: Path, codes: str, plane: str, affine: np.ndarray, cached: bool
) -> None:
    folder = pair(tmp_path, stored(head(), codes, affine), stored(lesion(), codes, affine))
    reading = Reading(plane=plane, cache_dir=tmp_path / "cache" if cached else None, **AS_STORED)
    dataset = open_dataset(folder, reading=reading)
    images, masks = arrays(dataset)
    np.testing.assert_array_equal(images, planes(head(), plane))
    np.testing.assert_array_equal(masks, planes(lesion(), plane))

    sliced = PLANES.index(plane)
    for position in (0, 2):
        case = dataset[position]
        assert case.affine is not None
        at = np.insert([3.0, 4.0], sliced, position)
        np.testing.assert_allclose(case.affine @ [3, 4, 0, 1], affine @ [*at, 1], atol=1e-5)
    again = open_dataset(folder, reading=reading)
    np.testing.assert_array_equal(arrays(again)[0], images)


def test_one_cache_serves_all_planes(tmp_path: Path) -> None:
    folder = pair(tmp_path, stored(head()), stored(lesion()))
    for plane in (*PLANES, *PLANES):
        reading = Reading(plane=plane, cache_dir=tmp_path / "cache", **AS_STORED)
        images, masks = arrays(open_dataset(folder, reading=reading))
        np.testing.assert_array_equal(images, planes(head(), plane))
        np.testing.assert_array_equal(masks, planes(lesion(), plane))


def test_uncompressed_and_scaled_volumes_along_any_axis(tmp_path: Path) -> None:
    image = stored(head(), "PIR")
    image.set_data_dtype(np.int16)
    put(tmp_path / "images/a.nii", image)
    put(tmp_path / "masks/a.nii", stored(lesion(), "SAR"))
    for kept in (None, tmp_path / "cache"):
        dataset = open_dataset(tmp_path, reading=Reading(cache_dir=kept, **AS_STORED))
        np.testing.assert_allclose(arrays(dataset)[0], planes(head()), atol=0.05)


def test_ranges_and_blank_slices_count_from_the_bottom(tmp_path: Path) -> None:
    values = head()
    values[..., 0] = values[..., 3] = 0
    folder = pair(tmp_path, stored(values, "RAI"), stored(lesion(), "LPS"))
    reading = Reading(slices=(0, 4), blank_slices=False, **AS_STORED)
    dataset = open_dataset(folder, reading=reading)
    assert dataset.names == ["a_slice001", "a_slice002"]
    np.testing.assert_array_equal(arrays(dataset)[0], planes(values)[1:3])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("stated", [True, False])
def test_a_file_with_an_axis_of_length_1_is_a_slice(
    tmp_path: Path, axis: int, stated: bool
) -> None:
    part = tuple(slice(2, 3) if k == axis else slice(None) for k in range(3))
    image, label = head()[part], lesion()[part]
    folder = (
        pair(tmp_path, stored(image), stored(label, "RAS"))
        if stated
        else pair(tmp_path, bare(image), nib.Nifti1Image(label, np.eye(4)))
    )
    dataset = open_dataset(folder)
    assert len(dataset) == 1 and dataset.names == ["a"]
    images, masks = arrays(dataset)
    np.testing.assert_array_equal(images[0], image.squeeze(axis))
    np.testing.assert_array_equal(masks[0], label.squeeze(axis))


def test_slices_of_any_storage_lie_alike(tmp_path: Path) -> None:
    for codes in AXES:
        folder = pair(
            tmp_path / codes, stored(head()[..., 1:2], codes), stored(lesion()[..., 1:2], "LPS")
        )
        images, masks = arrays(open_dataset(folder))
        np.testing.assert_array_equal(images[0], head()[..., 1])
        np.testing.assert_array_equal(masks[0], lesion()[..., 1])


def test_a_slice_whose_header_has_no_thickness(tmp_path: Path) -> None:
    header = stored(head()[..., 0:1]).header
    header["srow_z"][2] = 0
    image = nib.Nifti1Image(lesion()[..., 0], None, header)
    grid = grid_of(nib.load(put(tmp_path / "a.nii.gz", image)))
    assert grid.stated and spacing(place(grid)) == (2, 2.5)
    assert place(grid).view.is_plain


# --------------------------------------------------------------------------- what must not change

KNOWN = {
    "brats20_mini/training": "cda481eb2e3ee14e",
    "brats20_mini/testing": "d3461e6f9999b722",
    "brats15_2d/training": "69944a217f64f315",
    "brats15_2d/testing": "1c7793b6885204d1",
    "brats15_volumes": "9edf136220d1014c",
}


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no folder")
@pytest.mark.parametrize("name", KNOWN)
def test_real_data_are_read_as_before_orientation_counted(name: str) -> None:
    """Twelve cases of each set, against what was read before headers were followed."""
    folder = Path(os.environ["REAL_DATA"]) / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    dataset, digest = open_dataset(folder, test=True), hashlib.sha256()
    for index in range(0, len(dataset), max(1, len(dataset) // 12)):
        case = dataset[index]
        digest.update(case.name.encode())
        digest.update(case.image.numpy().tobytes())
        if case.mask is not None:
            digest.update(case.mask.numpy().tobytes())
        assert case.affine is not None
        digest.update((case.affine + 0.0).tobytes())
    assert digest.hexdigest()[:16] == KNOWN[name]


# ------------------------------------------------------------------------------------- pictures


def tagged(path: Path, values: np.ndarray, tag: int) -> Path:
    """A lossless picture that viewers turn to show ``values``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(tag, tag)
    turned = Image.fromarray(values)
    turned.getexif()[0x0112] = undo
    turned = ImageOps.exif_transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = tag
    turned.save(path, exif=exif.tobytes())
    return path


@pytest.mark.parametrize("end", ["png", "tif", "jpg"])
@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("size", [(8, 16), (16, 16)])
def test_pictures_are_read_as_they_are_shown(
    tmp_path: Path, size: tuple[int, int], tag: int, end: str
) -> None:
    mask = np.zeros(size, np.uint8)
    mask[:4, 4:8] = 255
    image = np.repeat(mask[..., None], 3, axis=2)
    tagged(tmp_path / f"images/a.{end}", image, tag)
    tagged(tmp_path / "images/b.png", image, tag)
    Image.fromarray(mask).save(put_folder(tmp_path / "masks") / "a.png")
    tagged(tmp_path / "masks/b.png", mask, tag)
    for case in open_dataset(tmp_path):
        assert case.mask is not None and case.image.shape[1:] == case.mask.shape[1:] == size
        np.testing.assert_array_equal(case.mask[0].numpy(), mask / 255)
        np.testing.assert_array_equal(case.image[0].numpy() > 0.5, mask > 0)


def put_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_mask_drawn_on_the_stored_pixels_is_refused(tmp_path: Path) -> None:
    tagged(tmp_path / "images/a.jpg", np.zeros((16, 24, 3), np.uint8), 6)
    Image.new("L", (16, 24)).save(put_folder(tmp_path / "masks") / "a.png")
    with pytest.raises(UserError, match=r"a\.png: the mask is 24 x 16, but its image is 16 x 24"):
        open_dataset(tmp_path)[0]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_says_nothing(tmp_path: Path) -> None:
    path = put_folder(tmp_path / "images") / "a.jpg"
    Image.new("L", (8, 8), 255).save(path, exif=b"Exif\0\0MM\0*\0\0\0\xff garbage")
    Image.new("L", (8, 8)).save(put_folder(tmp_path / "masks") / "a.png")
    assert open_dataset(tmp_path)[0].image.min() > 0.9
