"""DICOM series: their values and place, what is left out, what is refused, and a run on them."""

import builtins
import csv
from pathlib import Path

import dicom_files
import nibabel as nib
import numpy as np
import pytest
from dicom_files import AXIAL, CORONAL, OBLIQUE, SAGITTAL
from helpers import DIFFUSION, NETWORK, Run, script
from pydicom.uid import (
    BasicTextSRStorage,
    DigitalXRayImageStorageForPresentation,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
)

from guided_diffusion.data import dicom_volumes
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.dicom_volumes import DicomVolumes
from guided_diffusion.data.readers import read_nifti
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import UserError, gathering
from guided_diffusion.layouts import open_dataset, open_masks

SHAPE = (5, 6, 8)  # planes, rows, columns


def recognise(folder: Path, *, test: bool = False) -> str:
    return open_dataset(folder, test=test).layout


def numbered(dtype: type = np.int16) -> np.ndarray:
    """Distinct values of every voxel."""
    return np.arange(np.prod(SHAPE), dtype=dtype).reshape(SHAPE)


def opened(folder: Path, cache: Path | None = None) -> DicomVolumes:
    dataset = open_dataset(folder, test=True, reading=Reading(cache_dir=cache, normalise="none"))
    assert isinstance(dataset, DicomVolumes)
    return dataset


def voxels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The values [columns, rows, planes] of the only series, and its affine."""
    dataset = opened(folder)
    (path,) = {entry.images[0] for entry in dataset.entries}
    values, grid = read_nifti(path)
    return values, grid.matrix


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        DicomVolumes(folder, test_flag=True)
    return str(caught.value)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, OBLIQUE])
def test_values_and_affine_are_those_of_a_nifti_file_that_itk_writes(
    tmp_path: Path, orientation: tuple[float, ...]
) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, the second reader, is missing")
    made = dicom_files.series(numbered(), orientation=orientation)
    for number, one in enumerate(made):
        one.RescaleSlope, one.RescaleIntercept = number + 1, -1024
    folder = dicom_files.save(tmp_path / "a", made)

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    itk = reader.Execute()
    sitk.WriteImage(itk, str(tmp_path / "itk.nii.gz"))
    other = nib.load(tmp_path / "itk.nii.gz")

    values, affine = voxels(folder)
    again = sitk.ReadImage(str(opened(folder).entries[0].images[0]))
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(again, name)(), getattr(itk, name)(), atol=1e-4)
    np.testing.assert_array_equal(values, np.asarray(other.dataobj))
    np.testing.assert_allclose(affine, other.affine, atol=1e-4)
    assert values[3, 2, 4] == 5 * numbered()[4, 2, 3] - 1024
    place = itk.TransformIndexToPhysicalPoint((3, 2, 4))
    ours = affine @ (3, 2, 4, 1)
    np.testing.assert_allclose(ours[:3] * (-1, -1, 1), place, atol=1e-4)


def test_planes_lie_by_hand_where_the_header_says(tmp_path: Path) -> None:
    _, affine = voxels(dicom_files.save(tmp_path / "a", dicom_files.series(numbered())))
    expected = [[-0.75, 0, 0, 20], [0, -0.5, 0, 30], [0, 0, 2.5, 40], [0, 0, 0, 1]]
    np.testing.assert_allclose(affine, expected, atol=1e-6)


def test_slices_of_a_plane_come_as_from_nifti(tmp_path: Path) -> None:
    made = dicom_files.series(numbered(), orientation=SAGITTAL)
    dicom_files.save(tmp_path / "set/a", made)
    dataset = opened(tmp_path / "set", tmp_path / "cache")
    assert len(dataset) == SHAPE[1] and dataset.names[0] == "a_slice000"
    # In sagittal planes rows run downwards, so the lowest axial slice is the last row.
    np.testing.assert_array_equal(np.sort(dataset[0].image.numpy().ravel())[:8], range(40, 48))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_monochrome1_is_inverted_before_values_are_scaled(tmp_path: Path, dtype: type) -> None:
    made = dicom_files.series(numbered(dtype))
    for one in made:
        one.PhotometricInterpretation, one.RescaleSlope, one.RescaleIntercept = "MONOCHROME1", 2, 5
    values, _ = voxels(dicom_files.save(tmp_path / "a", made))
    ends = np.iinfo(dtype).min + np.iinfo(dtype).max
    expected = 2.0 * (ends - numbered().astype(float)) + 5
    np.testing.assert_array_equal(values, expected.transpose(2, 1, 0))


def test_slopes_that_are_no_whole_numbers_stay_exact(tmp_path: Path) -> None:
    made = dicom_files.series(numbered())
    for number, one in enumerate(made):
        one.RescaleSlope = 0.25 * (number + 1)
    values, _ = voxels(dicom_files.save(tmp_path / "a", made))
    scale = 0.25 * np.arange(1, 6)
    np.testing.assert_array_equal(values, (numbered().T * scale).astype(np.float32))


@pytest.mark.parametrize("ending", ["", ".ima", ".dcm"])
def test_files_are_recognised_by_their_mark(tmp_path: Path, ending: str) -> None:
    made = dicom_files.series(numbered())
    dicom_files.save(tmp_path / "p1/study/series", made, ending=ending)
    (tmp_path / "p1/study/series/readme").write_text("some words")
    assert recognise(tmp_path, test=True) == "DICOM"
    dataset = opened(tmp_path)
    assert dataset.names[0] == "p1_study_series_slice000"
    assert dataset.notes == ["1 DICOM series in 5 files"]


def test_enhanced_objects_are_read(tmp_path: Path) -> None:
    made = dicom_files.enhanced(numbered(), [3, 0, 4, 1, 2])
    values, affine = voxels(dicom_files.save(tmp_path / "a", [made]))
    np.testing.assert_array_equal(values, numbered().T * 2 + np.arange(5))
    assert affine[2].tolist() == [0, 0, 2.5, 40]


def test_rle_is_decoded(tmp_path: Path) -> None:
    made = dicom_files.series(numbered())
    for one in made:
        one.compress("1.2.840.10008.1.2.5", encoding_plugin="pydicom", generate_instance_uid=False)
    values, _ = voxels(dicom_files.save(tmp_path / "a", made))
    np.testing.assert_array_equal(values, numbered().T)


def test_series_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    first, second = dicom_files.series(numbered()), dicom_files.series(numbered(), uid="1.2.9")
    for one in second:
        one.SeriesNumber, one.RescaleIntercept = 8, 1000
    dicom_files.save(tmp_path / "mixed", first)
    dicom_files.save(tmp_path / "mixed", second, ending="b")
    dataset = opened(tmp_path)
    assert {entry.volume for entry in dataset.entries} == {"mixed_7", "mixed_8"}
    case = dataset[dataset.names.index("mixed_8_slice002")]
    assert case.image[0, 3, 4] == 1000 + numbered()[2, 4, 3]
    assert set(dataset.patients) == {"mixed"}


def test_what_is_no_plane_of_a_volume_is_left_out_and_said(tmp_path: Path) -> None:
    made = dicom_files.series(numbered())
    scout = dicom_files.series(numbered()[:1], orientation=CORONAL)[0]
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    xray = dicom_files.new(DigitalXRayImageStorageForPresentation)
    dicom_files.set_pixels(xray, numbered()[0])
    single = dicom_files.series(numbered()[:1], uid="1.2.77")[0]
    text = dicom_files.new(BasicTextSRStorage)
    dicom_files.save(tmp_path / "a", [*made, scout, xray, single, text])
    dicom_files.save(tmp_path, [dicom_files.new(MediaStorageDirectoryStorage)], ending="")
    kinds = "1 Basic Text SR, 1 DICOMDIR, 1 localizer, 1 picture without a position, 1 single plane"
    for _ in range(2):  # decoded, and remembered
        notes = opened(tmp_path, tmp_path.parent / "cache").notes
        assert notes == ["1 DICOM series in 5 files", f"left out {kinds}"]


def test_a_series_is_decoded_once_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = tmp_path / "set/a", tmp_path / "cache"
    dicom_files.save(folder, dicom_files.series(numbered()))
    assert opened(folder, cache)[0].image.max() == 47
    with monkeypatch.context() as patch:
        patch.setattr(dicom_volumes, "examine", None)
        assert opened(folder, cache)[0].image.max() == 47

    made = dicom_files.series(numbered() + 100)
    dicom_files.save(folder, made)
    assert opened(folder, cache)[0].image.max() == 147
    next(cache.glob("dicom/*/a.nii")).write_bytes(b"")
    assert opened(folder, cache)[0].image.max() == 147


def test_parts_of_a_series_in_several_folders_are_said(tmp_path: Path) -> None:
    for name, planes in (("a", slice(0, 3)), ("b", slice(3, 5))):
        dicom_files.save(tmp_path / name, dicom_files.series(numbered())[planes])
    assert "folders such as a and b hold parts or copies of one series" in opened(tmp_path).notes[1]


def without(index: int) -> list:
    made = dicom_files.series(numbered())
    del made[index]
    return made


def changed(index: int, **values: object) -> list:
    made = dicom_files.series(numbered())
    for name, value in values.items():
        setattr(made[index], name, value)
    return made


def tilted() -> list:
    made = dicom_files.series(numbered())
    for number, one in enumerate(made):
        one.ImagePositionPatient[1] += number * 2.5 * float(np.tan(np.radians(15)))
    return made


def compressed() -> list:
    made = dicom_files.series(numbered())
    for one in made:
        one.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        one.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00"
        one["PixelData"].is_undefined_length = True
    return made


def unplaced() -> list:
    made = dicom_files.series(numbered())
    del made[2].ImagePositionPatient
    return made


REFUSED = {
    "tilt": (tilted, ("a: the gantry was tilted by 15 degrees", "up to 2.679 mm", "dcm2niix")),
    "missing": (
        lambda: without(2),
        ("07.dcm and 14.dcm are 5 mm apart, most others 2.5 mm; 1 of 5 planes may be missing",),
    ),
    "uneven": (
        lambda: changed(4, ImagePositionPatient=[-20, -30, 51]),
        ("21.dcm and 28.dcm are 3.5 mm apart, most others 2.5 mm", "resample"),
    ),
    "twice": (
        lambda: changed(3, ImagePositionPatient=[-20, -30, 45]),
        ("same place, 45 mm", "1 such pair in 5 planes", "time points"),
    ),
    "shifted": (
        lambda: changed(2, ImagePositionPatient=[-15, -30, 45]),
        ("planes are shifted by up to 5 mm against each other",),
    ),
    "orientation": (
        lambda: changed(1, ImageOrientationPatient=list(CORONAL)),
        ("07.dcm: its orientation is 1 x 0 x 0 x 0 x 0 x -1", "in the same series"),
    ),
    "spacing": (
        lambda: changed(1, PixelSpacing=[0.5, 0.8]),
        ("its spacing is 0.5 x 0.8, but that of 00.dcm is 0.5 x 0.75",),
    ),
    "skewed": (
        lambda: changed(1, ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]),
        ("07.dcm: cannot be read", "no right angle"),
    ),
    "unplaced": (unplaced, ("14.dcm: cannot be read", "ImagePositionPatient is missing")),
    "no spacing": (
        lambda: changed(1, PixelSpacing=None),
        ("07.dcm: cannot be read", "PixelSpacing is missing"),
    ),
    "no scale": (lambda: changed(1, RescaleSlope=0), ("07.dcm: cannot be read", "RescaleSlope is")),
    "huge": (lambda: changed(1, Rows=60000, Columns=60000), ("07.dcm", "60000 x 60000 x 1")),
    "short": (lambda: changed(1, PixelData=b"\0" * 10), ("07.dcm: cannot be read",)),
    "compressed": (compressed, ("00.dcm: its pixels are compressed as JPEG Lossless", "pylibjpeg")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_regular_grid_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make, parts = REFUSED[name]
    message = refusal(dicom_files.save(tmp_path / "a", make()))
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("length", [0, 200, 400, 700])
def test_a_file_that_is_cut_is_refused_by_name(tmp_path: Path, length: int) -> None:
    folder = dicom_files.save(tmp_path / "a", dicom_files.series(numbered()))
    (folder / "14.dcm").write_bytes((folder / "14.dcm").read_bytes()[:length])
    assert "14.dcm" in refusal(folder)


def test_all_bad_series_are_listed_by_the_check(tmp_path: Path) -> None:
    for name, make in (("a", tilted), ("b", lambda: dicom_files.series(numbered())), ("c", tilted)):
        dicom_files.save(tmp_path / name, make())
    for name in "abc":
        labelled(tmp_path, "labels", name)
    (tmp_path / "b/extra.dcm").write_bytes(b"")
    with gathering() as errors:
        assert {entry.volume for entry in DicomVolumes(tmp_path).entries} == set()
    assert "b/extra.dcm: is named as a DICOM file, but lacks the mark" in str(errors[1])
    (tmp_path / "b/extra.dcm").unlink()
    with gathering() as errors:
        dataset = DicomVolumes(tmp_path)
    assert {entry.volume for entry in dataset.entries} == {"b"}
    assert [str(error).partition(":")[0] for error in errors] == [
        str(tmp_path / "a"),
        str(tmp_path / "c"),
    ]


def test_without_pydicom_one_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dicom_files.save(tmp_path / "a", dicom_files.series(numbered()))
    real = builtins.__import__

    def fake(name: str, *rest: object) -> object:
        if name == "pydicom":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake)
    assert "python -m pip install 'pydicom>=3.0.1,<4'" in refusal(tmp_path)


def labelled(folder: Path, where: str, name: str) -> Path:
    """A label in the corner of :func:`numbered`, stored as RAS beside the series."""
    values = np.zeros(SHAPE[::-1], np.uint8)
    values[1:4, 0:2, 3] = 1
    affine = np.array([[-0.75, 0, 0, 20], [0, -0.5, 0, 30], [0, 0, 2.5, 40], [0, 0, 0, 1]])
    image = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    (folder / where).mkdir(parents=True, exist_ok=True)
    nib.save(image, folder / where / f"{name}.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("series", "where", "name"),
    [
        ("images/a", "masks", "a"),
        ("a", "labels", "a"),
        ("p1/study/t1", "labels", "p1_study_t1"),
        ("p1/study/t1", "labels", "t1"),
        ("p1/study/t1", "masks", "p1"),
    ],
)
def test_labels_are_found_and_brought_to_the_grid(
    tmp_path: Path, series: str, where: str, name: str
) -> None:
    dicom_files.save(tmp_path / series, dicom_files.series(numbered()))
    labelled(tmp_path, where, name)
    dataset = open_dataset(tmp_path)
    assert dataset.layout == "DICOM"
    masks = [case.mask for case in dataset if case.mask is not None]
    expected = np.zeros((5, 8, 6))
    expected[3, 1:4, 0:2] = 1
    np.testing.assert_array_equal(np.concatenate([mask.numpy() for mask in masks]), expected)
    truths = open_masks(tmp_path)
    np.testing.assert_array_equal(truths[dataset.names[3]](), expected[3])


def test_series_without_labels_are_left_out_of_training_alone(tmp_path: Path) -> None:
    for name in ("p1/a", "p2/b"):
        dicom_files.save(tmp_path / name, dicom_files.series(numbered()))
    labelled(tmp_path, "labels", "p2_b")
    dataset = open_dataset(tmp_path)
    assert {entry.volume for entry in dataset.entries} == {"p2_b"}
    assert dataset.notes[-1] == "left out 1 series without labels"
    assert len(opened(tmp_path)) == 10


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("c", ("belongs to no series; these are p1_a, p2_a",)),
        ("a", ("belongs to several series named a",)),
    ],
)
def test_labels_of_no_one_series_are_refused(
    tmp_path: Path, name: str, parts: tuple[str, ...]
) -> None:
    for series in ("p1/a", "p2/a"):
        dicom_files.save(tmp_path / series, dicom_files.series(numbered()))
    labelled(tmp_path, "labels", name)
    message = refusal(tmp_path)
    assert all(part in message for part in parts), message


def test_labels_on_another_grid_name_the_series(tmp_path: Path) -> None:
    made = dicom_files.series(numbered(), origin=(-20.0, -30.0, 50.0))
    dicom_files.save(tmp_path / "knee", made)
    dataset = open_dataset(labelled(tmp_path, "labels", "knee"))
    with pytest.raises(UserError, match=r"other orientation or origin than knee\.nii"):
        dataset[0]


def test_originals_beside_a_layout_that_is_known_change_nothing(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        labelled(tmp_path, part, "a")
    dicom_files.save(tmp_path / "originals", dicom_files.series(numbered()))
    dicom_files.save(tmp_path / "images/originals", dicom_files.series(numbered()))
    assert recognise(tmp_path) == recognise(tmp_path, test=True) == "CUSTOM"
    dicom_files.save(tmp_path / "brats/case/originals", dicom_files.series(numbered()))
    labelled(tmp_path, "brats/case", "case_t1")
    assert recognise(tmp_path / "brats", test=True) == "BRATS"


def test_files_of_known_layouts_are_not_opened(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("images", "masks"):
        labelled(tmp_path, part, "a")
    monkeypatch.setattr(dicom_volumes, "is_dicom", None)
    assert recognise(tmp_path, test=True) == "CUSTOM"
    assert recognise(brats / "training") == "BRATS"


def succeeded(run: Run) -> str:
    assert run.code == 0, run.err
    return run.out + run.err


def test_a_model_is_trained_on_series_and_draws_masks_on_their_grid(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK, the second reader, is missing")
    data, cache = tmp_path / "data", tmp_path / "cache"
    box = (slice(1, 4), slice(3, 9), slice(5, 13))  # planes, rows, columns
    for number in range(3):
        volume = np.random.default_rng(number).integers(0, 60, (5, 16, 16), dtype=np.int16)
        volume[box] += 900
        made = dicom_files.series(volume, uid=f"1.2.{number}", orientation=CORONAL)
        folder = dicom_files.save(data / f"images/s{number}", made)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        label = reader.Execute() > 500
        (data / "masks").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.DICOMOrient(label, "RAS"), str(data / f"masks/s{number}.nii.gz"))

    shared = ["--plane", "coronal", "--cache_dir", cache]
    said = succeeded(script("check_data", "--data_dir", data, *shared))
    assert "DICOM, 3 volumes by coronal slices" in said
    assert "3 DICOM series in 15 files" in said
    out = ["--out_dir", tmp_path / "model"]
    speed = ["--batch_size", 8, "--max_steps", 100, "--lr", "2e-3", "--ema_rate", "0.9"]
    train = ["segmentation_train", "--data_dir", data, *out, *NETWORK, *DIFFUSION, *speed, *shared]
    succeeded(script(*train))

    for name in ("masks", "images"):  # labels are not needed for sampling
        (data / name).rename(tmp_path / name)
    (tmp_path / "scan").mkdir()
    (tmp_path / "images/s1").rename(tmp_path / "scan/s1")
    results = ["--out_dir", tmp_path / "results", "--dpm_solver", True, "--steps", 5]
    model = ["--model_path", tmp_path / "model", "--num_ensemble", 2, "--cache_dir", "none"]
    succeeded(script("segmentation_sample", "--data_dir", tmp_path / "scan", *model, *results))

    found = nib.load(tmp_path / "results/s1_mask.nii.gz")
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "scan/s1")))
    sitk.WriteImage(reader.Execute(), str(tmp_path / "itk.nii.gz"))
    np.testing.assert_allclose(found.affine, nib.load(tmp_path / "itk.nii.gz").affine, atol=1e-4)
    mask, expected = np.asarray(found.dataobj) > 0, np.zeros((16, 16, 5), bool)
    expected[box[::-1]] = True
    assert 2 * (mask & expected).sum() / (mask.sum() + expected.sum()) > 0.9

    (tmp_path / "scan/labels").mkdir()
    (tmp_path / "masks/s1.nii.gz").rename(tmp_path / "scan/labels/s1.nii.gz")
    scored = ["--inp_pth", tmp_path / "results", "--out_pth", tmp_path / "scan"]
    succeeded(script("segmentation_env", *scored))
    (row,) = csv.DictReader((tmp_path / "results/patients.csv").read_text().splitlines())
    assert (row["patient"], float(row["dice"]) > 0.9) == ("s1", True)


def test_the_store_sees_a_nifti_file(tmp_path: Path) -> None:
    folder = dicom_files.save(tmp_path / "a", dicom_files.series(numbered()))
    dataset = opened(folder, tmp_path / "cache")
    volume = VolumeStore(tmp_path / "other")(dataset.entries[0].images[0])
    np.testing.assert_array_equal(np.asarray(volume.voxels), numbered().T)
