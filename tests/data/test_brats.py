"""BraTS slices and volumes: which channels, which slices, on which scale, and what is recorded."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from brats_folders import (
    ALL,
    DEPTH,
    flat,
    save,
    solid,
    volume,
    write_slice,
    write_volumes,
)
from helpers import refused, script, succeeded, training
from torch.testing import assert_close

from guided_diffusion.bratsloader import BRATSDataset, BRATSDataset3D, find_modalities
from guided_diffusion.data import volumes
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.intensity import measure, normalised
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.flags import slice_range
from guided_diffusion.tools import phantom_folders

# ------------------------------------------------------------------------------- modalities, names


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        ("", ("t1", "t1ce", "t2", "flair")),
        ("flair,t1ce", ("flair", "t1ce")),
        (" T2W , t1n", ("t2", "t1")),
        ("t2f", ("flair",)),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_the_modalities_chosen_are_the_channels_in_that_order(
    tmp_path: Path, wanted: str, order: tuple[str, ...], deep: bool
) -> None:
    write_volumes(tmp_path) if deep else write_slice(tmp_path / "1")
    reading = Reading(modalities=find_modalities(wanted), normalise="none")

    dataset = open_dataset(tmp_path, reading=reading)

    assert (dataset.modalities, dataset.channels) == (order, len(order))
    image = dataset[1 if deep else 0].image
    own = [solid(name)[1, 2, 1] if deep else flat(name)[1, 2] for name in order]
    assert image[:, 1, 2].tolist() == own


@pytest.mark.parametrize("deep", [False, True])
def test_only_the_modalities_chosen_are_read(tmp_path: Path, deep: bool) -> None:
    write_volumes(tmp_path) if deep else write_slice(tmp_path / "1")
    for path in tmp_path.rglob("*_t2*.nii.gz"):
        path.write_bytes(b"never opened")
    dataset = open_dataset(tmp_path, reading=Reading(modalities=("flair", "t1")))
    assert dataset[0].image.shape[0] == 2


@pytest.mark.parametrize("text", ["flair,d-wi", "t1,t1n", "seg"])
def test_an_unknown_modality(text: str) -> None:
    with pytest.raises(UserError, match=r"^--modalities: .* is not a list of t1, t1ce, t2"):
        find_modalities(text)


def test_a_modality_that_the_data_lack_names_what_is_there(tmp_path: Path) -> None:
    write_slice(tmp_path / "1", names=("t1ce", "flair", "seg"))
    with pytest.raises(UserError, match=r"does not have t2\. .*modalities \(t1ce, flair\)"):
        BRATSDataset(tmp_path, reading=Reading(modalities=("t2", "flair")))


def test_modalities_of_a_layout_without_names(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name / "a.png")
    with pytest.raises(UserError, match="--modalities: t1 cannot be chosen in the CUSTOM"):
        open_dataset(tmp_path, reading=Reading(modalities=("t1",)))


def test_ignored_files_are_noted_once_and_depth_may_differ(tmp_path: Path) -> None:
    for case in ("1", "site/deeper/2"):
        write_slice(tmp_path / case)
        (tmp_path / case / "thumb.png").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("")
    dataset = BRATSDataset(tmp_path)
    assert dataset.names == ["1", "site_deeper_2"]
    assert dataset.notes == ["ignored 3 files not named by a modality, such as readme.txt"]
    assert BRATSDataset(tmp_path / "site/deeper").notes[0].startswith("ignored 1 file not named")


@pytest.mark.parametrize(
    ("file_form", "patient"),
    [
        ("brats_train_001_{}_080_w.nii.gz", "001"),
        ("brats_train_Mu_7_{}_080_w.nii", "Mu_7"),
        ("BraTS20_Training_012_{}_80.nii.gz", "BraTS20_Training_012"),
        ("{}.nii.gz", ""),
        ("slice080_{}.nii.gz", ""),
    ],
)
def test_the_patient_of_a_slice(tmp_path: Path, file_form: str, patient: str) -> None:
    assert BRATSDataset(write_slice(tmp_path / "000001", file_form)).patients == [patient]


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS-GLI-00005-001", "BraTS-GLI-00005"),
        ("BraTS2021_00000", "BraTS2021_00000"),
    ],
)
def test_the_patient_of_a_volume(tmp_path: Path, case: str, patient: str) -> None:
    assert set(BRATSDataset3D(write_volumes(tmp_path, (case,))).patients) == {patient}


# ------------------------------------------------------------------------------------- intensities


def test_normalisations_by_hand() -> None:
    values = np.array([0, 0, 2, 4, 6], np.float32)
    levels = measure(values)
    assert levels == pytest.approx((0, 6, 0, 5.92, 4, np.sqrt(8 / 3)))
    spread = np.sqrt(8 / 3)
    for how, expected in {
        "none": [0, 0, 2, 4, 6],
        "minmax": [0, 0, 1 / 3, 2 / 3, 1],
        "percentile": [0, 0, 2 / 5.92, 4 / 5.92, 1],
        "zscore": [0, 0, -2 / spread, 0, 2 / spread],
    }.items():
        result = normalised(values, levels, how)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=1e-6, err_msg=how)


@pytest.mark.parametrize("how", ["minmax", "percentile", "zscore"])
@pytest.mark.parametrize("value", [0, 7])
def test_an_image_of_one_value_becomes_zero(how: str, value: float) -> None:
    values = np.full((3, 3), value, np.float32)
    assert not normalised(values, measure(values), how).any()


def test_an_unknown_normalisation(tmp_path: Path) -> None:
    dataset = BRATSDataset(write_slice(tmp_path / "1"), reading=Reading(normalise="max"))
    with pytest.raises(UserError, match="--normalise: 'max' is not one of auto, none"):
        dataset[0]


@pytest.mark.parametrize("end", ["gz", "nii"])
@pytest.mark.parametrize("kept", ["memory", "disk"])
@pytest.mark.parametrize("how", ["auto", "none", "minmax", "percentile", "zscore"])
def test_a_slice_is_scaled_by_its_whole_volume(
    tmp_path: Path, how: str, kept: str, end: str
) -> None:
    data = write_volumes(tmp_path / "data", end=end)
    reading = Reading(normalise=how, cache_dir=tmp_path / "cache" if kept == "disk" else None)
    dataset = BRATSDataset3D(data, reading=reading)
    assert dataset.normalise == ("minmax" if how == "auto" else how)

    whole = [solid(name, case=1).astype(np.float32) for name in ALL[:4]]
    for plane in range(DEPTH):
        case = dataset[DEPTH + plane]
        scaled = [normalised(v, measure(v), dataset.normalise)[..., plane] for v in whole]
        assert_close(case.image, torch.from_numpy(np.stack(scaled)))
        assert case.mask is not None
        assert_close(case.mask[0], torch.from_numpy(solid("seg")[..., plane] > 0).float())


def test_two_dimensional_slices_are_as_stored_unless_asked(tmp_path: Path) -> None:
    write_slice(tmp_path / "1")
    assert BRATSDataset(tmp_path).normalise == "none"
    assert BRATSDataset(tmp_path)[0].image[:, 1, 2].tolist() == [10, 20, 30, 40]
    scaled = BRATSDataset(tmp_path, reading=Reading(normalise="minmax"))[0].image
    assert scaled[:, 1, 2].tolist() == [1, 1, 1, 1] and scaled.sum() == 4


# ------------------------------------------------------------------------------- slices of volumes


def test_depth_comes_from_each_header(tmp_path: Path) -> None:
    write_volumes(tmp_path, ("a",))
    for name in ALL:
        save(tmp_path / f"b/b_{name}.nii.gz", solid(name)[..., :2])
    names = BRATSDataset3D(tmp_path).names
    assert names == [f"a_slice{z:03d}" for z in range(5)] + ["b_slice000", "b_slice001"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("", [0, 1, 2, 3, 4]), ("1:3", [1, 2]), ("3:", [3, 4]), (":-3", [0, 1]), ("2:99", [2, 3, 4])],
)
def test_slices_chosen(tmp_path: Path, text: str, kept: list[int]) -> None:
    dataset = BRATSDataset3D(
        write_volumes(tmp_path, ("a",)), reading=Reading(slices=slice_range(text))
    )
    assert [entry.plane for entry in dataset.entries] == kept
    np.testing.assert_array_equal(dataset[0].affine[:3, 3], [5, 239, 7 + 3 * kept[0]])


def test_no_slice_left(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--slices: 80:129 selects none of the 5 slices"):
        BRATSDataset3D(write_volumes(tmp_path), reading=Reading(slices=(80, 129)))


@pytest.mark.parametrize("text", ["80", "a:b", "1:2:3", "80-129"])
def test_slices_that_are_no_range(text: str) -> None:
    with pytest.raises(UserError, match=r"--slices\b.* --slices 80:129"):
        slice_range(text)


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_blank_slices_can_be_left_out(tmp_path: Path, kept: str) -> None:
    cache = tmp_path / "cache" if kept == "disk" else None
    data = write_volumes(tmp_path / "data", ("a",))
    dataset = BRATSDataset3D(data, reading=Reading(blank_slices=False, cache_dir=cache))
    assert [entry.plane for entry in dataset.entries] == [1, 2, 3]


def test_listing_opens_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_volumes(tmp_path / "data")
    monkeypatch.setattr(volumes, "read_nifti", lambda *_, **__: pytest.fail("decoded"))
    assert len(BRATSDataset3D(tmp_path / "data", reading=Reading(cache_dir=tmp_path / "c"))) == 10


# ----------------------------------------------------------------------- recorded and contradicted


@pytest.fixture(scope="module")
def flair_model(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flair")
    flags = ("--max_steps", 1, "--modalities", "t2f,t1ce", "--normalise", "zscore")
    succeeded(script("segmentation_train", *training(brats, folder), *flags))
    return folder


def sampling(data: Path, model: Path, out: Path) -> list[object]:
    return [
        *("--data_dir", data, "--model_path", model, "--out_dir", out),
        *("--dpm_solver", True, "--steps", 1, "--num_ensemble", 2),
    ]


def test_modalities_and_scale_are_recorded_and_used(
    brats: Path, flair_model: Path, tmp_path: Path
) -> None:
    state = torch.load(flair_model / "savedmodel.pt", weights_only=True)
    assert (state["options"]["modalities"], state["options"]["normalise"]) == (
        "flair,t1ce",
        "zscore",
    )
    text = succeeded(
        script("segmentation_sample", *sampling(brats / "testing", flair_model, tmp_path))
    )
    assert "2 channels" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--modalities", "t1ce,flair"), "--modalities.*t1ce,flair.*flair,t1ce"),
        (("--normalise", "none"), "--normalise.*none.*zscore"),
    ],
)
def test_what_is_recorded_cannot_be_contradicted(
    brats: Path, flair_model: Path, tmp_path: Path, flags: tuple, words: str
) -> None:
    arguments = sampling(brats / "testing", flair_model, tmp_path)
    assert re.search(words, refused(script("segmentation_sample", *arguments, *flags)))


def test_what_is_recorded_may_be_repeated(brats: Path, flair_model: Path, tmp_path: Path) -> None:
    arguments = sampling(brats / "testing", flair_model, tmp_path)
    flags = ("--modalities", "t2f,T1c", "--normalise", "auto")
    succeeded(script("segmentation_sample", *arguments, *flags))


def test_volumes_from_training_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    phantom_folders.write_brats_volumes(tmp_path, 3, patients=2, size=24, slices=16, training=0.5)
    flags = ("--max_steps", 2, "--slices", "4:12", "--blank_slices", False)
    text = succeeded(script("segmentation_train", *training(tmp_path, tmp_path / "run"), *flags))
    assert f"volumes are unpacked once, into {tmp_path / 'home/guided_diffusion'}" in text
    state = torch.load(tmp_path / "run/savedmodel.pt", weights_only=True)
    assert state["options"]["normalise"] == "minmax"
    assert not {"slices", "blank_slices", "cache_dir"} & state["options"].keys()

    out = tmp_path / "masks"
    arguments = sampling(tmp_path / "testing", tmp_path / "run", out)
    succeeded(script("segmentation_sample", *arguments, "--slices", "6:9", "--cache_dir", "none"))

    case = "BraTS20_Training_002"
    mask, nifti = volume(out / f"{case}_mask.nii.gz")
    source = nib.load(tmp_path / f"testing/{case}/{case}_t1.nii.gz")
    assert mask.shape == source.shape and np.array_equal(nifti.affine, source.affine)
    scored = succeeded(
        script(
            "segmentation_env", "--inp_pth", out, "--out_pth", tmp_path / "testing", "--partial", 1
        )
    )
    assert "Dice of 1 patient" in scored and (out / "patients.csv").exists()


# --------------------------------------------------------------------------------------- real data


def test_real_volumes(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "brats15_volumes"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    dataset = open_dataset(
        folder, reading=Reading(modalities=("flair", "t1ce"), cache_dir=tmp_path, slices=(80, 129))
    )
    assert (len(dataset), dataset.channels, dataset.normalise) == (98, 2, "minmax")
    case = dataset[10]
    path = folder / "brats_2013_pat0001_1/brats_2013_pat0001_1_flair.nii.gz"
    values = nib.load(path).get_fdata(dtype=np.float32)
    low, high = values.min(), values.max()
    assert_close(case.image[0], torch.from_numpy((values[..., 90] - low) / (high - low)))
    assert case.mask is not None and case.mask.sum() > 0


@pytest.mark.parametrize(("folder", "patients"), [("brats15_2d", 6), ("brats20_mini", None)])
def test_real_slices_know_their_patients(
    real_data: Path, folder: str, patients: int | None
) -> None:
    if not (real_data / folder).is_dir():
        pytest.skip(f"{folder} is not there")
    dataset = open_dataset(real_data / folder, test=True)
    assert all(patient.isdigit() for patient in dataset.patients)
    assert patients is None or len(set(dataset.patients)) == patients
