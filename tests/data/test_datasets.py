"""The loaders on folders written here: values, geometry, names, and the words of every error."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from brats_folders import watch
from helpers import read_alone
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from guided_diffusion.bratsloader import BRATSDataset, BRATSDataset3D, modality_of
from guided_diffusion.data.batches import collate
from guided_diffusion.data.datasets import Case, Reading, readable
from guided_diffusion.data.folders import safe_name, split_name
from guided_diffusion.data.frames import Frame, ResizedDataset, auto_frame
from guided_diffusion.data.readers import read_picture
from guided_diffusion.errors import UserError
from guided_diffusion.isicloader import ISICDataset
from guided_diffusion.layouts import open_dataset, open_masks

ALL = ("t1", "t1ce", "t2", "flair", "seg")
AFFINE = np.array([[-1.0, 0, 0, 5], [0, -2, 0, 239], [0, 0, 3, 7], [0, 0, 0, 1]])


# ----------------------------------------------------------------------- writers of phantoms


def write_nifti(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    return path


def write_picture(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def colour(height: int = 6, width: int = 8) -> np.ndarray:
    values = np.zeros((height, width, 3), np.uint8)
    values[1, 2] = 255, 102, 0
    return values


def grey_mask(height: int = 6, width: int = 8) -> np.ndarray:
    values = np.zeros((height, width), np.uint8)
    values[1, 2] = 255
    return values


def modality_slice(name: str, shape: tuple[int, ...] = (6, 8)) -> np.ndarray:
    """A bright voxel at (1, 2) whose value depends on the modality."""
    values = np.zeros(shape)
    values[1, 2] = 0.1 * (1 + ALL.index(name))
    if name == "seg":
        values[1, 2] = 4
    return values


def write_slice(folder: Path, form: str = "{}.nii.gz", names: tuple[str, ...] = ALL) -> Path:
    for name in names:
        write_nifti(folder / form.format(name), modality_slice(name))
    return folder


def write_pair(folder: Path, stem: str = "a", image: np.ndarray | None = None) -> Path:
    write_picture(folder / f"images/{stem}.png", colour() if image is None else image)
    write_picture(folder / f"masks/{stem}.png", grey_mask())
    return folder


def write_isic(folder: Path, generation: int, part: str, mode: str, ids: tuple[str, ...]) -> Path:
    start = f"ISBI2016_ISIC_{part}_{mode}"
    truths = f"{start}_GroundTruth" if generation == 2 else f"{start}_Data"
    lines = [",img,seg" if generation == 2 else "image_id,label"]
    for row, number in enumerate(ids):
        image = f"{start}_Data/ISIC_{number}.jpg"
        mask = f"{truths}/ISIC_{number}_Segmentation.png"
        write_picture(folder / image, colour())
        write_picture(folder / mask, grey_mask())
        lines.append(f"{row},{image},{mask}" if generation == 2 else f"ISIC_{number},benign")
    text = "\n".join(lines) + "\n"
    (folder / f"{start}_GroundTruth.csv").write_text(text, encoding="utf-8-sig")
    return folder


# ------------------------------------------------------------------------------------ BraTS

FORMS = (
    "{}.nii.gz",
    "{}.nii",
    "brats_train_001_{}_080_w.nii.gz",
    "BraTS20_Training_001_{}.nii.gz",
)


@pytest.mark.parametrize("form", FORMS)
def test_brats_names_channels_and_values(tmp_path: Path, form: str) -> None:
    for case in ("000002", "site/000001"):
        write_slice(tmp_path / case, form)
    (tmp_path / "000002" / "notes.txt").write_text("stray")
    write_nifti(tmp_path / "000002" / "brain_mask.nii.gz", np.ones((3, 3)))

    dataset = BRATSDataset(tmp_path)

    assert (dataset.layout, dataset.channels) == ("BRATS", 4)
    assert dataset.names == ["000002", "site_000001"]
    case = dataset[1]
    assert case.name == "site_000001"
    assert_close(case.image[:, 1, 2], torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert case.image.sum() == case.image[:, 1, 2].sum()
    assert case.mask is not None
    assert case.mask.dtype == case.image.dtype == torch.float32
    assert case.mask.nonzero().tolist() == [[0, 1, 2]] and case.mask.max() == 1
    assert case.affine is not None
    np.testing.assert_array_equal(case.affine, AFFINE)


@pytest.mark.parametrize(
    ("file_name", "modality"),
    [
        ("T1.nii.gz", "t1"),
        ("BraTS-GLI-00000-000-t1n.nii.gz", "t1"),
        ("BraTS-GLI-00000-000-t1c.nii.gz", "t1ce"),
        ("BraTS-GLI-00000-000-t2w.nii.gz", "t2"),
        ("BraTS-GLI-00000-000-t2f.nii.gz", "flair"),
        ("brats_train_001_seg_080_w.nii", "seg"),
        ("BraTS2021_00000_flair.nii.gz", "flair"),
        ("t1.png", None),
        ("t1weighted.nii.gz", None),
        ("brain_mask.nii.gz", None),
    ],
)
def test_modality_of_a_file_name(file_name: str, modality: str | None) -> None:
    assert modality_of(file_name) == modality


def test_brats_takes_the_modalities_there_are(tmp_path: Path) -> None:
    write_slice(tmp_path / "1", names=("flair", "t1ce", "seg"))
    dataset = BRATSDataset(tmp_path)
    assert dataset.modalities == ("t1ce", "flair")
    assert_close(dataset[0].image[:, 1, 2], torch.tensor([0.2, 0.4]))


def test_brats_seg_is_optional_and_read_when_testing(tmp_path: Path) -> None:
    write_slice(tmp_path / "with")
    write_slice(tmp_path / "without", names=ALL[:4])
    dataset = BRATSDataset(tmp_path, test_flag=True)
    assert [case.mask is None for case in (dataset[0], dataset[1])] == [False, True]
    assert list(open_masks(tmp_path)) == ["with"]


def test_brats_folder_that_is_itself_a_case(tmp_path: Path) -> None:
    dataset = BRATSDataset(write_slice(tmp_path / "000246"))
    assert dataset.names == ["000246"]


def test_trailing_axis_of_one_is_a_slice(tmp_path: Path) -> None:
    for name in ALL:
        write_nifti(tmp_path / "1" / f"{name}.nii.gz", modality_slice(name)[..., None])
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, BRATSDataset) and dataset[0].image.shape == (4, 6, 8)


def test_home_is_expanded_and_links_are_followed_without_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slice(tmp_path / "real/1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/up").symlink_to(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BRATSDataset("~/data").names == ["link_1"]


def write_volumes(folder: Path, depth: int = 3) -> Path:
    for case in ("p1", "p2"):
        for name in ("flair", "seg"):
            volume = np.zeros((6, 8, depth))
            volume[1, 2, 1] = 4 if name == "seg" else 30
            volume[0, 0, 0] = 0 if name == "seg" else -10
            write_nifti(folder / case / f"{case}_{name}.nii.gz", volume)
    return folder


def test_volumes_become_slices_scaled_per_volume(tmp_path: Path) -> None:
    dataset = open_dataset(write_volumes(tmp_path))

    assert isinstance(dataset, BRATSDataset3D) and (dataset.layout, len(dataset)) == ("BRATS", 6)
    assert dataset.names[:2] == ["p1_slice000", "p1_slice001"]
    bottom, middle = dataset[0], dataset[1]
    assert bottom.image[0, 0, 0] == 0 and middle.image[0, 1, 2] == 1
    assert_close(middle.image[0, 5, 5], torch.tensor(0.25))
    assert bottom.mask is not None and bottom.mask.sum() == 0
    assert middle.mask is not None and middle.mask.nonzero().tolist() == [[0, 1, 2]]
    assert middle.affine is not None and middle.affine[:3, 3].tolist() == [5, 239, 10]


def test_a_volume_is_decoded_once_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = BRATSDataset3D(write_volumes(tmp_path))
    assert dataset.masks.kind.levels == (0, 4)  # a sample, which is not kept
    decoded = watch(monkeypatch)
    dataset.store.most_bytes = 2 * 6 * 8 * 3 * 4

    for index in range(len(dataset)):
        dataset[index]

    assert len(decoded) == 4 and len(dataset.store._open) == 2


# ------------------------------------------------------------------------------------- ISIC


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("part", ["Part1", "Part3B"])
@pytest.mark.parametrize("under_root", [True, False])
def test_isic_csv(tmp_path: Path, generation: int, part: str, under_root: bool) -> None:
    write_isic(tmp_path / "Train", generation, part, "Training", ("0000002", "0000001"))
    write_isic(tmp_path / "Test", generation, part, "Test", ("0000003",))

    train = open_dataset(tmp_path if under_root else tmp_path / "Train")
    test = open_dataset(tmp_path if under_root else tmp_path / "Test", test=True)

    assert (train.layout, train.channels) == ("ISIC", 3)
    assert train.names == ["0000001", "0000002"] and test.names == ["0000003"]
    case = test[0]
    assert case.image.shape == (3, 6, 8) and 0 <= case.image.min() < case.image.max() <= 1
    assert case.mask is not None and case.mask.nonzero().tolist() == [[0, 1, 2]]


def test_isic_csv_without_header_and_mask_folder_apart(tmp_path: Path) -> None:
    write_isic(tmp_path, 2, "Part1", "Test", ("0000003", "0000004"))
    table = tmp_path / "ISBI2016_ISIC_Part1_Test_GroundTruth.csv"
    table.write_text("ISIC_0000003,benign\nISIC_0000004,malignant\n")
    dataset = ISICDataset(tmp_path, test_flag=True)
    assert dataset.names == ["0000003", "0000004"] and dataset[1].mask is not None


def test_isic_without_csv_and_without_masks(tmp_path: Path) -> None:
    write_picture(tmp_path / "in/ISIC_0000007.jpg", colour())
    dataset = open_dataset(tmp_path, test=True)
    assert dataset.names == ["0000007"] and dataset[0].mask is None

    write_picture(tmp_path / "truth/ISIC_0000007_Segmentation.png", grey_mask())
    write_picture(tmp_path / "in/ISIC_0000007_superpixels.png", colour())
    assert open_dataset(tmp_path).names == ["0000007"]
    assert open_dataset(tmp_path)[0].mask is not None
    assert not open_dataset(tmp_path).notes


def test_pictures_of_other_names_beside_those_of_isic_are_segmented_too(tmp_path: Path) -> None:
    write_picture(tmp_path / "ISIC_0000007.jpg", colour())
    write_picture(tmp_path / "my mole.jpg", colour())
    assert open_dataset(tmp_path, test=True).names == ["ISIC_0000007", "my mole"]

    write_picture(tmp_path / "ISIC_0000007_Segmentation.png", grey_mask())
    for test in (True, False):
        labelled = open_dataset(tmp_path, test=test)
        assert labelled.names == ["0000007"]
        assert labelled.notes == ["ignored 1 file, such as my mole.jpg"]


# ------------------------------------------------------------------------------ own folders


def test_custom_pairs_by_stem(tmp_path: Path) -> None:
    write_pair(tmp_path, "b")
    write_picture(tmp_path / "images/a.v2.jpg", colour())
    write_picture(tmp_path / "masks/a.v2.tif", np.full((6, 8), 255, np.uint8))
    (tmp_path / "images/Thumbs.db").write_text("stray")

    dataset = open_dataset(tmp_path)

    assert (dataset.layout, dataset.names) == ("CUSTOM", ["a.v2", "b"])
    assert open_dataset(tmp_path, data_name="kvasir").layout == "KVASIR"
    first, second = dataset[0], dataset[1]
    assert first.mask is not None and first.mask.min() == 1
    assert_close(second.image[:, 1, 2], torch.tensor([1.0, 0.4, 0.0]))
    assert second.mask is not None and second.mask.nonzero().tolist() == [[0, 1, 2]]
    assert len(pickle.loads(pickle.dumps(dataset))) == 2


def test_custom_images_alone_when_testing(tmp_path: Path) -> None:
    write_picture(tmp_path / "x y.png", grey_mask())
    dataset = open_dataset(tmp_path, data_name="CUSTOM", test=True)
    assert dataset.names == ["x y"] and dataset.channels == 1 and dataset[0].mask is None


def test_the_first_readable_image_says_how_many_channels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png"):
        open_dataset(tmp_path, data_name="CUSTOM", test=True)
    write_picture(tmp_path / "b.png", grey_mask())
    dataset = open_dataset(tmp_path, data_name="CUSTOM", test=True)
    assert dataset.names == ["a", "b"] and dataset.channels == 1
    assert [case.name for case in readable(dataset, [0, 1])] == ["b"]


def test_custom_nifti_slices(tmp_path: Path) -> None:
    write_nifti(tmp_path / "images/a.nii.gz", modality_slice("flair") * 1000)
    write_nifti(tmp_path / "masks/a.nii.gz", modality_slice("seg"))
    case = open_dataset(tmp_path)[0]
    assert case.name == "a" and case.image.shape == (1, 6, 8) and case.affine is not None
    assert_close(case.image.max(), torch.tensor(400.0))
    assert case.mask is not None and case.mask.nonzero().tolist() == [[0, 1, 2]]


def test_custom_nifti_volumes_by_axial_slices(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        volume = np.zeros((6, 8, 3))
        volume[1, 2, 1] = 40
        write_nifti(tmp_path / f"images/{case}.nii.gz", volume)
        write_nifti(tmp_path / f"masks/{case}.nii", (volume > 0).astype(np.uint8))
    dataset = open_dataset(tmp_path)

    assert (dataset.layout, dataset.channels, len(dataset)) == ("CUSTOM", 1, 6)
    assert dataset.names[:2] == ["p1_slice000", "p1_slice001"]
    assert dataset.patients == ["p1"] * 3 + ["p2"] * 3
    bottom, middle = dataset[0], dataset[1]
    assert bottom.mask is not None and bottom.mask.sum() == 0
    assert middle.image[0, 1, 2] == 1 and middle.image.sum() == 1
    assert middle.mask is not None and middle.mask.nonzero().tolist() == [[0, 1, 2]]
    assert middle.affine is not None and middle.affine[:3, 3].tolist() == [5, 239, 10]
    assert len(open_masks(tmp_path)) == 6


def test_grey_is_repeated_in_a_coloured_set(tmp_path: Path) -> None:
    write_pair(write_pair(tmp_path, "a"), "b", grey_mask())
    case = open_dataset(tmp_path)[1]
    assert case.image.shape == (3, 6, 8) and case.image[:, 1, 2].tolist() == [1, 1, 1]


def test_sixteen_bits_become_the_unit_range(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", np.array([[0, 13107, 65535]], np.uint16))
    assert_close(read_picture(path, channels=1), torch.tensor([[[0.0, 0.2, 1.0]]]))


def _nifti(values: list[float]) -> Callable[[Path], Path]:
    return lambda path: write_nifti(path.with_suffix(".nii.gz"), np.array([values], np.float32))


def _picture(values: list[object], kind: type = np.uint8) -> Callable[[Path], Path]:
    return lambda path: write_picture(path, np.array([values], kind))


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (_picture([0, 51, 255]), [0, 1, 1]),  # labels far apart
        (_picture([0, 1, 2]), [0, 1, 1]),  # a label map saved as a picture
        (_picture([0, 13107, 65535], np.uint16), [0, 1, 1]),
        (_picture([[9, 9, 9], [255, 255, 255]]), [9 / 255, 1]),  # grey stored as RGB
        (_picture([False, True], bool), [0, 1]),
        (_nifti([0, 1, 4]), [0, 1, 1]),
        (_nifti([0] * 90 + [0.25] + [1] * 9), [0] * 90 + [0.25] + [1] * 9),  # soft borders stay
    ],
)
def test_masks_of_every_kind(
    tmp_path: Path, write: Callable[[Path], Path], expected: list[float]
) -> None:
    mask = read_alone(write(tmp_path / "m.png"))
    assert_close(mask, torch.tensor([[expected]], dtype=torch.float32))


def test_listing_a_set_opens_no_slice(tmp_path: Path) -> None:
    for path in write_slice(tmp_path / "1").iterdir():
        path.write_bytes(b"")
    assert BRATSDataset(tmp_path).names == ["1"]


def test_names() -> None:
    assert split_name("a.v2.NII.gz") == ("a.v2", ".nii.gz")
    assert safe_name('a/b\\c:"d"') == "a_b_c__d_"
    assert safe_name("Mu\u0308ller 1") == "M\u00fcller 1"


# --------------------------------------------------------------------------------- geometry


def disc(height: int, width: int, radius: float, softness: float = 0.0) -> torch.Tensor:
    """[1, H, W]: a disc off the centre; its border is a ramp of ``softness`` pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.hypot(y - 0.45 * height, x - 0.52 * width)
    if softness == 0:
        return (distance <= radius).float()[None]
    return ((radius - distance) / softness + 0.5).clamp(0, 1)[None]


@pytest.mark.parametrize("softness", [0.0, 6.0])
@pytest.mark.parametrize("size", [64, 256])
def test_resizing_keeps_the_area(softness: float, size: int) -> None:
    mask = disc(767, 1022, 150, softness)
    fitted = Frame(size).fit_mask(mask)
    assert set(fitted.unique().tolist()) == {0, 1}
    true_area = math.pi * 150**2 / mask.numel()
    assert abs(fitted.mean().item() / true_area - 1) < 0.01


def test_image_and_mask_share_their_geometry() -> None:
    mask = disc(300, 200, 40)
    case = Frame(96).fit(Case(mask.expand(3, -1, -1), mask, "a"))
    assert case.image.shape == (3, 96, 96) and case.mask is not None
    assert_close((case.image[:1] >= 0.5).float(), case.mask)


def test_crop_takes_the_same_voxels_and_restore_puts_them_back() -> None:
    image = torch.rand(4, 240, 240, generator=torch.Generator().manual_seed(0))
    mask = (image[:1] > 0.5).float()
    frame = Frame(256, crop=8)
    fitted = frame.fit(Case(image, mask, "a"))

    assert fitted.mask is not None and fitted.image.shape == (4, 224, 224)
    assert torch.equal(fitted.image, image[:, 8:-8, 8:-8])
    assert torch.equal(fitted.mask, mask[:, 8:-8, 8:-8])
    restored = frame.restore(fitted.image[None], (240, 240))[0]
    assert torch.equal(restored[:, 8:-8, 8:-8], fitted.image)
    assert_close(restored.sum(), fitted.image.sum())


def test_nothing_is_resampled_at_the_target_size() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Frame(32).fit_image(image), image)
    assert torch.equal(Frame(32).restore(image, (32, 32)), image)


@pytest.mark.parametrize("size", [(50, 90), (767, 1022)])
def test_restore_keeps_range_and_place(size: tuple[int, int]) -> None:
    mask = disc(*size, radius=0.3 * min(size))
    soft = Frame(128).fit_image(mask)
    restored = Frame(128).restore(soft, size)
    assert restored.shape == mask.shape
    assert restored.min() >= soft.min() and restored.max() <= soft.max()
    assert ((restored >= 0.5).float() - mask).abs().mean() < 0.01


@pytest.mark.parametrize(
    ("layout", "size", "version", "image_size", "crop", "expected"),
    [
        ("BRATS", (240, 240), "plain", 256, "auto", 8),
        ("BRATS", (240, 240), "plain", 256, "none", 0),
        ("BRATS", (240, 240), "plain", 64, "auto", 0),
        ("BRATS", (240, 240), "new", 256, "auto", 0),
        ("BRATS", (128, 128), "plain", 256, "auto", 0),
        ("CUSTOM", (240, 240), "plain", 256, "auto", 0),
        ("CUSTOM", (240, 240), "new", 64, "wolleb", 8),
    ],
)
def test_auto_frame(
    layout: str,
    size: tuple[int, int],
    version: str,
    image_size: int,
    crop: str,
    expected: int,
) -> None:
    frame = auto_frame(layout, size, version=version, image_size=image_size, crop=crop)
    assert frame == Frame(image_size, expected)


def test_cases_of_different_size_are_batched(tmp_path: Path) -> None:
    write_pair(tmp_path, "a")
    write_picture(tmp_path / "images/b.png", colour(20, 30))
    write_picture(tmp_path / "masks/b.png", grey_mask(20, 30))
    framed = ResizedDataset(open_dataset(tmp_path), Frame(16))

    (batch,) = DataLoader(framed, batch_size=2, collate_fn=collate)

    assert batch.names == ["a", "b"]
    assert batch.image.shape == (2, 3, 16, 16) and batch.mask.shape == (2, 1, 16, 16)


# ------------------------------------------------------------------------ truths for scoring


def test_masks_by_case_id_from_data_set_and_from_bare_folder(tmp_path: Path) -> None:
    write_isic(tmp_path, 1, "Part3B", "Test", ("0000003",))
    data = tmp_path / "ISBI2016_ISIC_Part3B_Test_Data"
    for folder in (tmp_path, data):
        masks = open_masks(folder)
        assert list(masks) == ["0000003"]
        assert np.argwhere(masks["0000003"]()).tolist() == [[1, 2]]
        assert masks["0000003"]().dtype == np.float32


@pytest.mark.parametrize(
    ("file_name", "case"),
    [
        ("ISIC_0000007_Segmentation.png", "0000007"),
        ("a.png", "a"),
        ("a_mask.tif", "a"),
        ("a_b_seg.png", "a_b"),
    ],
)
def test_bare_mask_names(tmp_path: Path, file_name: str, case: str) -> None:
    write_picture(tmp_path / file_name, grey_mask())
    assert list(open_masks(tmp_path)) == [case]


# ----------------------------------------------------------------------------------- errors


def _every_case(folder: Path) -> None:
    dataset = open_dataset(folder)
    for index in range(len(dataset)):
        dataset[index]


def incomplete(folder: Path) -> None:
    write_slice(folder / "1")
    write_slice(folder / "2")
    (folder / "2/t2.nii.gz").unlink()


def no_seg(folder: Path) -> None:
    write_slice(folder / "7", names=ALL[:4])


def doubled(folder: Path) -> None:
    write_slice(write_slice(folder / "1"), "x_{}.nii.gz")


def same_id(folder: Path) -> None:
    write_slice(folder / "a/b")
    write_slice(folder / "a_b")


def truncated(folder: Path) -> None:
    path = write_slice(folder / "1") / "t1.nii.gz"
    path.write_bytes(path.read_bytes()[:60])


def no_magic(folder: Path) -> None:
    (write_slice(folder / "1", "{}.nii") / "t1.nii").write_bytes(b"no image" * 100)


def not_finite(folder: Path) -> None:
    write_nifti(write_slice(folder / "1") / "t2.nii.gz", np.full((6, 8), np.nan))


def complex_numbers(folder: Path) -> None:
    write_nifti(write_slice(folder / "1") / "t2.nii.gz", np.ones((6, 8), np.complex64))


def mask_size(folder: Path) -> None:
    write_nifti(write_slice(folder / "1") / "seg.nii.gz", np.zeros((8, 6)))


def modality_size(folder: Path) -> None:
    write_nifti(write_slice(folder / "1") / "flair.nii.gz", np.zeros((9, 9)))


def fractional_labels(folder: Path) -> None:
    write_nifti(write_slice(folder / "1") / "seg.nii.gz", np.full((6, 8), 1.5))


def volume_in_slices(folder: Path) -> None:
    write_slice(folder / "1")
    write_nifti(write_slice(folder / "2") / "t1.nii.gz", np.zeros((6, 8, 3)))


def slice_in_volumes(folder: Path) -> None:
    write_nifti(write_volumes(folder) / "p2" / "p2_flair.nii.gz", np.zeros((6, 8)))


def shallow_mask(folder: Path) -> None:
    write_nifti(write_volumes(folder) / "p2" / "p2_seg.nii.gz", np.zeros((6, 8, 2)))


def four_axes(folder: Path) -> None:
    write_nifti(folder / "1/t1.nii.gz", np.zeros((6, 8, 3, 2)))
    write_nifti(folder / "1/seg.nii.gz", np.zeros((6, 8, 3, 2)))


def isic_missing_picture(folder: Path) -> None:
    write_isic(folder, 2, "Part1", "Training", ("0000001", "0000002"))
    (folder / "ISBI2016_ISIC_Part1_Training_Data/ISIC_0000002.jpg").unlink()


def isic_missing_mask(folder: Path) -> None:
    write_isic(folder, 1, "Part3B", "Training", ("0000001", "0000002"))
    (folder / "ISBI2016_ISIC_Part3B_Training_Data/ISIC_0000002_Segmentation.png").unlink()


def isic_bad_row(folder: Path) -> None:
    table = write_isic(folder, 2, "Part1", "Training", ("0000001",))
    with (table / "ISBI2016_ISIC_Part1_Training_GroundTruth.csv").open("a") as lines:
        lines.write("1,ISIC_0000002,x,y\n")


def isic_bad_encoding(folder: Path) -> None:
    table = folder / "ISBI2016_ISIC_Part1_Training_GroundTruth.csv"
    table.write_bytes("0,Z\xfcrich.jpg,m.png".encode("latin-1"))


def stems(folder: Path) -> None:
    write_picture(write_pair(folder) / "images/c.png", colour())


def surplus_mask(folder: Path) -> None:
    write_picture(write_pair(folder) / "masks/d.png", grey_mask())


def two_endings(folder: Path) -> None:
    write_picture(write_pair(folder) / "images/a.jpg", colour())


def no_images(folder: Path) -> None:
    (write_pair(folder) / "images/a.png").unlink()


def no_masks(folder: Path) -> None:
    (write_pair(folder) / "masks/a.png").unlink()


def mixed_kinds(folder: Path) -> None:
    (write_pair(folder) / "masks/a.png").unlink()
    write_nifti(folder / "masks/a.nii.gz", np.zeros((6, 8)))


def coloured_mask(folder: Path) -> None:
    write_picture(write_pair(folder) / "masks/a.png", colour())


def broken_picture(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    path = write_picture(write_pair(folder) / "images/a.png", noise)
    path.write_bytes(path.read_bytes()[:900])


def not_a_picture(folder: Path) -> None:
    (write_pair(folder) / "images/a.png").write_text("text")


def picture_size(folder: Path) -> None:
    write_picture(write_pair(folder) / "masks/a.png", grey_mask(8, 6))


def several_pages(folder: Path) -> None:
    page = Image.fromarray(grey_mask())
    (write_pair(folder) / "masks/a.png").unlink()
    page.save(folder / "masks/a.tif", save_all=True, append_images=[page])


def float_picture(folder: Path) -> None:
    (write_pair(folder) / "images/a.png").unlink()
    write_picture(folder / "images/a.tif", np.full((6, 8), 7.5, np.float32))


def float_holes(folder: Path) -> None:
    (write_pair(folder) / "images/a.png").unlink()
    write_picture(folder / "images/a.tif", np.full((6, 8), np.inf, np.float32))


def two_layouts(folder: Path) -> None:
    write_slice(folder / "1")
    write_isic(folder, 2, "Part1", "Training", ("0000001",))


def empty(folder: Path) -> None:
    """Nothing at all."""


def unknown_files(folder: Path) -> None:
    (folder / "paper.pdf").write_text("")


MALFORMED: list[tuple[Callable[[Path], None], str, str]] = [
    (incomplete, "2: the case lacks t2", "Add the file"),
    (no_seg, "7: the case lacks seg", "Add the file"),
    (doubled, "1: has 2 flair files (flair.nii.gz, x_flair.nii.gz)", "a separate folder"),
    (same_id, "more than one case with the id a_b", "Rename one"),
    (truncated, "1/t1.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (no_magic, "1/t1.nii: cannot be read as a NIfTI", "Restore it"),
    (not_finite, "1/t2.nii.gz: has NaN or infinite values", "Repair the file"),
    (complex_numbers, "1/t2.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (mask_size, "1/seg.nii.gz: its size is 8 x 6, but that of t1.nii.gz is 6 x 8", "on one grid"),
    (modality_size, "1/flair.nii.gz: its size is 9 x 9", "on one grid"),
    (fractional_labels, "1/seg.nii.gz: holds 1.5: neither labels", "interpolated"),
    (volume_in_slices, "2/t1.nii.gz: its shape is 6 x 8 x 3, but a slice", "Cut volumes"),
    (slice_in_volumes, "p2_flair.nii.gz: its shape is 6 x 8", "separate data sets"),
    (shallow_mask, "p2_seg.nii.gz: its grid is 6 x 8 x 2", "on one grid"),
    (four_axes, "1/t1.nii.gz: its shape is 6 x 8 x 3 x 2", "separate data sets"),
    (isic_missing_picture, "1 of 2 pictures missing: ", "Restore the files"),
    (isic_missing_mask, "ISIC_0000002_Segmentation.png", "Restore the files"),
    (isic_bad_row, "row 2: '1,ISIC_0000002,x,y' is neither", "remove the CSV"),
    (isic_bad_encoding, "GroundTruth.csv: the table cannot be read", "UTF-8"),
    (stems, ": has 1 stem without mask: c", "Rename the files"),
    (surplus_mask, ": has 1 stem without image: d", "Rename the files"),
    (two_endings, "images: a.jpg and a.png have the same stem", "Rename or remove"),
    (no_images, "images: has no image", "holds masks/ and images/"),
    (no_masks, "masks: has no mask", "Add masks/"),
    (mixed_kinds, "masks/a.nii.gz: NIfTI files and pictures are mixed", "the same format"),
    (coloured_mask, "masks/a.png: is a coloured picture", "swapped"),
    (broken_picture, "images/a.png: cannot be read as a picture", "Restore it"),
    (not_a_picture, "images/a.png: cannot be read as a picture", "Restore it"),
    (picture_size, "masks/a.png: the mask is 8 x 6", "same size"),
    (several_pages, "masks/a.tif: holds several pictures", "Split it"),
    (float_picture, "images/a.tif: has values from 7.5 to 7.5", "Scale the picture"),
    (float_holes, "images/a.tif: has NaN or infinite values", "Repair the file"),
    (two_layouts, "fits BRATS and ISIC, but must", "--data_name"),
    (empty, "holds nothing, but neither pictures nor NIfTI", "docs/data.md"),
    (unknown_files, "holds paper.pdf, but neither", "docs/data.md"),
]


@pytest.mark.parametrize(
    ("build", "found", "hint"), MALFORMED, ids=[row[0].__name__ for row in MALFORMED]
)
def test_bad_folders_name_the_file_and_a_hint(
    tmp_path: Path, build: Callable[[Path], None], found: str, hint: str
) -> None:
    build(tmp_path)
    with pytest.raises(UserError) as caught:
        _every_case(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert found in message and hint in message.partition(found)[2]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda p: open_dataset(p / "nowhere"), "nowhere: does not exist"),
        (lambda p: open_dataset(write_picture(p / "a.png", colour())), "a.png: is a file"),
        (lambda p: open_dataset(p, data_name="LIDC"), "--data_name: 'LIDC' is not one of BRATS"),
        (lambda p: open_dataset(p, data_name="brats"), "has no NIfTI file"),
        (lambda p: open_dataset(p, data_name="ISIC"), "has no ISIC picture"),
        (lambda p: open_dataset(p, data_name="CUSTOM"), "has no folder images"),
        (lambda p: open_masks(p), "holds nothing"),
        (lambda p: Frame(0), "image_size 0"),
        (lambda p: Frame(64, 8).fit_image(torch.zeros(1, 16, 99)), "an image of 16 x 99"),
        (lambda p: Frame(64, 8).restore(torch.zeros(1, 48, 48), (65, 64)), "65 x 64"),
        (
            lambda p: auto_frame("ISIC", (9, 9), version="plain", image_size=64, crop="yes"),
            "'yes' is not a crop",
        ),
        (
            lambda p: collate([Case(torch.zeros(1, 4, size), None, f"c{size}") for size in (4, 5)]),
            "case c5: its size after --crop is 4 x 5, but case c4 has 4 x 4",
        ),
    ],
)
def test_bad_arguments(tmp_path: Path, call: Callable[[Path], object], found: str) -> None:
    with pytest.raises(UserError) as caught:
        call(tmp_path)
    assert found in str(caught.value)


def test_isic_masks_are_all_there_or_none(tmp_path: Path) -> None:
    write_isic(tmp_path, 1, "Part3B", "Test", ("0000001", "0000002"))
    data = tmp_path / "ISBI2016_ISIC_Part3B_Test_Data"
    (data / "ISIC_0000001_Segmentation.png").unlink()
    with pytest.raises(UserError, match="1 of 2 masks missing"):
        open_dataset(tmp_path, test=True)
    (data / "ISIC_0000002_Segmentation.png").unlink()
    assert open_dataset(tmp_path, test=True)[0].mask is None


# -------------------------------------------------------------------------------- real data

REAL = os.environ.get("REAL_DATA", "")


@pytest.mark.skipif(not REAL, reason="REAL_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("folder", "test", "layout", "cases", "channels", "size"),
    [
        ("isbi2016_256/Train", False, "ISIC", 749, 3, 256),
        ("isbi2016_256", True, "ISIC", 305, 3, 256),
        ("brats20_mini/training", False, "BRATS", 6, 4, 240),
        ("brats20_mini/testing", True, "BRATS", 2, 4, 240),
        ("brats20_mini/testing_unlabelled", True, "BRATS", 2, 4, 240),
        ("brats15_2d/training", False, "BRATS", 293, 2, 240),
        ("brats15_2d/testing", True, "BRATS", 126, 2, 240),
        ("kvasir_256/train", False, "CUSTOM", 800, 3, 256),
        ("kvasir_256/val", True, "CUSTOM", 100, 3, 256),
    ],
)
def test_real_data(
    folder: str, test: bool, layout: str, cases: int, channels: int, size: int
) -> None:
    path = Path(REAL) / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    dataset = open_dataset(path, test=test)

    assert (dataset.layout, len(dataset), dataset.channels) == (layout, cases, channels)
    assert dataset.names == sorted(set(dataset.names))
    case = dataset[len(dataset) // 2]
    assert case.image.shape == (channels, size, size)
    assert 0 <= case.image.min() < case.image.max() <= 1
    assert (case.mask is None) == folder.endswith("unlabelled")


def test_slices_of_what_is_no_volume_are_refused(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / part / "a.png")
    reading = Reading(slices=(2, None))
    with pytest.raises(UserError, match=r"--slices: 2: cannot.*not volumes\. Omit"):
        open_dataset(tmp_path, reading=reading)
