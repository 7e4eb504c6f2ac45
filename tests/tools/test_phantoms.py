"""Value tests of the phantoms: pure functions, honest difficulty, raters, file layouts, `data/`."""

import csv
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from skimage.io import imread

from guided_diffusion.commands import main
from guided_diffusion.errors import UserError
from guided_diffusion.tools import phantom_folders, phantom_skin, phantoms
from guided_diffusion.tools.phantom_fields import (
    Grid,
    ramp,
    random_stream,
    sample_grid,
    smooth_field,
    spline_weights,
)

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
SCRIPT = ROOT / "scripts" / "make_phantoms.py"


@pytest.fixture(scope="module")
def cohort():
    """Fourteen patients with the masks of raters 1-4."""
    return [phantoms.make_patient(0, patient, raters=4) for patient in range(14)]


def run(*words):
    main("make_phantoms", [str(word) for word in words])


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def read_table(path):
    return list(csv.reader(path.read_text(encoding="gbk").splitlines()))


def lesion_slices(phantom):
    """Slice numbers where the lesion is at least half as large as at its largest."""
    area = (phantom.labels > 0).sum((0, 1))
    return np.flatnonzero(area >= 0.5 * area.max())


# --- fields -------------------------------------------------------------------------------------


def test_ramp_by_hand():
    x = np.array([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0])
    np.testing.assert_array_equal(ramp(x, 2.0), [0, 0, 0.15625, 0.5, 0.84375, 1, 1])


def test_spline_weights_sum_to_one_and_reproduce_a_line():
    x = np.linspace(-119.5, 119.5, 33)
    weights = spline_weights(x, 240.0, 17.0)
    np.testing.assert_allclose(weights.sum(1), 1)
    knots = (np.arange(weights.shape[1]) - 1) * 17.0 - 120.0
    np.testing.assert_allclose(weights @ knots, x, atol=1e-9)


def test_field_has_mean_zero_and_variance_one():
    grid = sample_grid((40, 40, 26))
    fields = [smooth_field(random_stream(0, p, "any"), grid, spacing=12) for p in range(20)]
    assert abs(np.mean(fields)) < 0.03
    assert np.std(fields) == pytest.approx(1, abs=0.05)


def test_field_is_the_same_at_every_resolution():
    coarse, fine = (
        smooth_field(random_stream(3, 1, "any"), sample_grid(s), spacing=20)
        for s in ((80, 80), (240, 240))
    )
    np.testing.assert_allclose(coarse, fine[1::3, 1::3], atol=1e-12)


# --- patients -----------------------------------------------------------------------------------


def test_patient_is_a_pure_function(cohort):
    again = phantoms.make_patient(0, 7)  # without raters: nothing else may change
    for name in phantoms.MODALITIES:
        np.testing.assert_array_equal(again.modalities[name], cohort[7].modalities[name])
    np.testing.assert_array_equal(again.labels, cohort[7].labels)
    assert again.raters == ()


def test_patients_and_seeds_differ(cohort):
    other = phantoms.make_patient(1, 7)
    for phantom in (other, cohort[8]):
        assert np.abs(phantom.modalities["t1"] - cohort[7].modalities["t1"]).mean() > 0.01
        assert not np.array_equal(phantom.labels, cohort[7].labels)


def test_values_and_background(cohort):
    for phantom in cohort[:5]:
        inside = phantom.modalities["t1"] > 0
        for image in phantom.modalities.values():
            assert image.dtype == np.float32
            assert image.shape == (80, 80, 52)
            assert image.min() == 0
            np.testing.assert_array_equal(image > 0, inside)
            np.testing.assert_array_equal(image.max((0, 1)), inside.any((0, 1)))
        assert phantom.labels.dtype == np.uint8
        assert not phantom.labels[~inside].any()


def test_brain_survives_the_brats_crop(cohort):
    for phantom in cohort:
        t1 = phantom.modalities["t1"]
        assert t1[8:-8, 8:-8].sum() == pytest.approx(t1.sum(), rel=1e-6)


def test_label_sets(cohort):
    assert all(set(np.unique(p.labels)) <= {0, 1, 2, 4} for p in cohort)
    assert set(np.unique([p.labels for p in cohort])) == {0, 1, 2, 4}


def test_label_is_one_of_the_panel(cohort):
    drawn = [[np.array_equal(p.labels, mask) for mask in p.raters] for p in cohort]
    assert [sum(row) for row in drawn] == [1] * len(cohort)
    assert np.any(drawn, axis=0).all()  # every rater of the panel gets a turn


def test_rater_labels_are_nested_level_sets():
    level = np.linspace(-4, 9, 14)[:, None, None]
    lesion = phantoms.Lesion(
        level, level - 3.5, np.full_like(level, 3.0), np.full_like(level, 1e-9)
    )
    grid = Grid((np.arange(14.0), np.zeros(1), np.zeros(1)), (1.0, 1.0, 1.0))
    labels = phantoms.rater_labels(random_stream(0, 0, "rater"), grid, lesion)
    assert np.delete(labels.ravel(), 4).tolist() == [0] * 4 + [2] * 3 + [4] * 3 + [1] * 3
    assert labels.dtype == np.uint8


def test_lesion_size_as_share_of_the_brain(cohort):
    share = []
    for phantom in cohort:
        brain = (phantom.modalities["t1"] > 0).sum((0, 1))
        chosen = lesion_slices(phantom)
        share.extend((phantom.labels > 0).sum((0, 1))[chosen] / brain[chosen])
    assert 0.05 < np.median(share) < 0.12
    assert min(share) > 0.02
    assert np.mean(np.array(share) > 0.15) < 0.15


# --- difficulty and raters ----------------------------------------------------------------------


@pytest.mark.parametrize("name", phantoms.MODALITIES)
def test_no_threshold_solves_the_task(cohort, name):
    images = [p.modalities[name][..., z] for p in cohort for z in lesion_slices(p)[::3]]
    masks = [p.labels[..., z] > 0 for p in cohort for z in lesion_slices(p)[::3]]
    images, masks = np.array(images), np.array(masks)

    best = 0.0
    for threshold in np.linspace(0.02, 0.98, 49):
        for found in (images > threshold, (images > 0) & (images < threshold)):
            scores = [dice(f, m) for f, m in zip(found, masks, strict=True)]
            best = max(best, float(np.mean(scores)))
    assert best < 0.65


def test_lesion_is_not_the_brightest_structure(cohort):
    for name in phantoms.MODALITIES:
        elsewhere = []
        for phantom in cohort:
            z = lesion_slices(phantom)[2]
            image, inside = phantom.modalities[name][..., z], phantom.labels[..., z] > 0
            brightest = image >= np.sort(image.ravel())[-20]
            elsewhere.append((brightest & ~inside).sum() / brightest.sum())
        assert np.mean(elsewhere) > 0.4, name


def test_raters_agree_about_as_well_as_people_do(cohort):
    scores = [
        dice(a[..., z] > 0, b[..., z] > 0)
        for p in cohort
        for a, b in combinations(p.raters, 2)
        for z in lesion_slices(p)[::2]
    ]
    assert 0.945 < np.mean(scores) < 0.97
    assert np.percentile(scores, 5) < 0.93  # and some lesions are truly ambiguous


def test_raters_disagree_where_the_border_fades(cohort):
    apart = {"sharp": [], "fading": []}
    for p in cohort:
        votes = np.mean([mask > 0 for mask in p.raters], axis=0)
        split = (votes > 0) & (votes < 1)
        rim = np.abs(p.level) < 2  # mm from the mean contour
        apart["sharp"].extend(split[rim & (p.fade < 2)])
        apart["fading"].extend(split[rim & (p.fade > 7)])
    assert np.mean(apart["sharp"]) < 0.2
    assert np.mean(apart["fading"]) > 3 * np.mean(apart["sharp"])


def test_contrast_fades_over_the_border_zone():
    level = np.array([-6.0, -3.0, 0.0, 3.0, 6.0])[:, None, None]
    wide = phantoms.Lesion(level, level - 50, np.ones_like(level), np.full_like(level, 6.0))
    amount = phantoms.lesion_amounts(wide)["oedema"].ravel()
    np.testing.assert_allclose(amount, [0, 0.15625, 0.5, 0.84375, 1])


# --- file layouts -------------------------------------------------------------------------------


def test_brats_slices_layout(tmp_path):
    phantom_folders.write_brats_slices(
        tmp_path, 0, patients=3, slices=2, size=48, raters=2, training=0.67
    )
    parts = {p: sorted(d.name for d in (tmp_path / p).iterdir()) for p in ("training", "testing")}
    assert parts == {
        "training": ["000001", "000002", "000003", "000004"],
        "testing": ["000005", "000006"],
    }

    for folder in [*(tmp_path / "training").iterdir(), *(tmp_path / "testing").iterdir()]:
        fields = [f.name.removesuffix(".nii.gz").split("_") for f in folder.iterdir()]
        assert sorted(f[3] for f in fields) == sorted((*phantoms.MODALITIES, "seg"))
        assert {(*f[:2], f[5]) for f in fields} == {("brats", "train", "w")}
        assert len({(f[2], f[4]) for f in fields}) == 1
        (seg,) = folder.glob("*_seg_*")
        for r in (1, 2):
            mask = tmp_path / "raters" / f"rater{r}" / seg.relative_to(tmp_path)
            assert set(np.unique(nib.load(mask).get_fdata())) <= {0, 1, 2, 4}


def test_brats_slice_files_decode_to_the_patient(tmp_path, cohort):
    phantom_folders.write_brats_slices(tmp_path, 0, patients=1, training=1.0)
    for path in (tmp_path / "training").glob("*/*"):
        *_, name, z, _ = path.name.split("_")
        image = nib.load(path)
        assert image.get_data_dtype() == np.uint8
        truth = cohort[0].labels if name == "seg" else cohort[0].modalities[name]
        error = np.abs(image.get_fdata() - truth[..., int(z)])
        assert error.max() <= (0 if name == "seg" else 0.5 / 255 + 1e-6)


def test_every_sixth_slice_is_healthy(tmp_path):
    phantom_folders.write_brats_slices(tmp_path, 0, patients=4, slices=3, size=48, training=1.0)
    empty = [
        int(path.parent.name)
        for path in sorted((tmp_path / "training").glob("*/*_seg_*"))
        if not nib.load(path).get_fdata().any()
    ]
    assert len(empty) == 2
    assert sum(n <= 6 for n in empty) == 1  # one in each run of six


def test_too_many_slices_are_refused_with_a_hint(tmp_path):
    with pytest.raises(UserError, match="Ask for fewer slices or a larger size"):
        phantom_folders.write_brats_slices(tmp_path, 0, patients=1, slices=50)


def test_brats_volumes_layout(tmp_path):
    phantom_folders.write_brats_volumes(
        tmp_path, 0, patients=2, slices=31, size=48, raters=1, training=0.5
    )
    case = tmp_path / "training" / "BraTS20_Training_001"
    names = {f"BraTS20_Training_001_{m}.nii.gz" for m in (*phantoms.MODALITIES, "seg")}
    assert {p.name for p in case.iterdir()} == names
    assert (tmp_path / "testing" / "BraTS20_Training_002").is_dir()
    assert len(list((tmp_path / "raters" / "rater1").rglob("*_seg.nii.gz"))) == 2

    flair = nib.load(case / "BraTS20_Training_001_flair.nii.gz")
    assert flair.get_data_dtype() == np.float32
    assert flair.shape == (48, 48, 31)
    assert flair.header.get_zooms() == (5, 5, 5)
    assert 200 < flair.get_fdata().max() <= 700
    seg = nib.load(case / "BraTS20_Training_001_seg.nii.gz")
    assert seg.get_data_dtype() == np.uint8
    assert set(np.unique(seg.get_fdata())) == {0, 1, 2, 4}


def test_isic_2023_layout(tmp_path):
    phantom_folders.write_isic(
        tmp_path, 0, patients=5, size=48, raters=2, training=0.6, generation="2023"
    )
    for mode, count, classes in (("Training", 3, {"benign", "malignant"}), ("Test", 2, {"0", "1"})):
        base = f"ISBI2016_ISIC_Part3B_{mode}"
        _, *rows = read_table(tmp_path / f"{base}_GroundTruth.csv")
        assert len(rows) == count
        for name, label in rows:
            assert label in classes
            picture = imread(tmp_path / f"{base}_Data" / f"{name}.jpg")
            mask = imread(tmp_path / f"{base}_Data" / f"{name}_Segmentation.png")
            assert picture.shape == (48, 48, 3)
            assert set(np.unique(mask)) == {0, 255}
            assert (tmp_path / "raters" / "rater2" / f"{name}_Segmentation.png").is_file()


def test_isic_2025_layout(tmp_path):
    phantom_folders.write_isic(tmp_path, 0, patients=4, size=48, training=0.5, generation="2025")
    for folder, mode in (("Train", "Training"), ("Test", "Test")):
        table = tmp_path / folder / f"ISBI2016_ISIC_Part1_{mode}_GroundTruth.csv"
        header, *rows = read_table(table)
        assert header == ["", "img", "seg"]
        assert [row[0] for row in rows] == ["0", "1"]
        for _, picture, mask in rows:
            assert imread(table.parent / picture).shape == (48, 48, 3)
            assert imread(table.parent / mask).shape == (48, 48)


def test_isic_generation_is_checked(tmp_path):
    with pytest.raises(UserError, match=r"2023.*2025"):
        phantom_folders.write_isic(tmp_path, 0, patients=1, generation="2024")


def test_skin_lesion_is_darker_than_the_skin_around():
    for number in range(6):
        skin = phantom_skin.make_skin(0, number, size=64, raters=1)
        grey = skin.picture.mean(2)
        inside = skin.mask > 0
        assert grey[inside].mean() < grey[16:48, 16:48][~inside[16:48, 16:48]].mean() - 15
        assert 0.02 < inside.mean() < 0.5


# --- the script and the shipped example ---------------------------------------------------------


def test_script_refuses_a_folder_in_use(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match="2"):
        run("--out", tmp_path)
    message = capsys.readouterr().err
    assert str(tmp_path) in message
    assert "notes.txt" in message
    assert "Name another folder" in message
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_script_writes_beside_a_readme(tmp_path, capsys):
    (tmp_path / "README.md").touch()
    flags = ["--out", str(tmp_path), "--patients", "1", "--slices", "2", "--split", "1"]
    run(*flags)
    assert len(list((tmp_path / "training").iterdir())) == 2
    first, following = capsys.readouterr().out.splitlines()
    assert first == f"1 patient written to {tmp_path}: training"
    assert following.startswith("next: guided-diffusion train --preset small --data_dir ")


@pytest.mark.parametrize("flags", [["--split", "1.5"], ["--patients", "0"], ["--seed", "-1"]])
def test_script_refuses_bad_numbers(tmp_path, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--out", tmp_path / "new", *flags)
    assert re.search("must be (between 0 and 1|[01] or more)", capsys.readouterr().err)


def test_script_help_needs_no_numpy():
    code = (
        f"import runpy, sys; sys.argv = ['make_phantoms.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: sys.exit('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--raters" in done.stdout


def test_shipped_data_is_small_and_complete():
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 3_000_000
    patients = {}
    for part, count, healthy in (("training", 100, 16), ("testing", 24, 4)):
        folders = sorted((DATA / part).iterdir())
        labels = [next(folder.glob("*_seg_*")) for folder in folders]
        patients[part] = {label.name.split("_")[2] for label in labels}
        assert len(folders) == count
        assert sum(not nib.load(label).get_fdata().any() for label in labels) == healthy
    assert not patients["training"] & patients["testing"]


def test_shipped_data_is_what_the_command_writes(tmp_path):
    flags = ["--layout", "brats2d", "--seed", "0", "--slices", "4", "--size", "80"]
    run("--out", tmp_path, "--patients", 2, "--split", 1, *flags)
    paths = sorted((tmp_path / "training").glob("*/*.nii.gz"))
    assert len(paths) == 40
    for path in paths:
        written = nib.load(path)
        shipped = nib.load(DATA / path.relative_to(tmp_path))
        difference = np.abs(shipped.get_fdata() - written.get_fdata())
        # another machine's linear algebra may round differently, hence one grey level for a few
        assert np.mean(difference > 0) < 0.002
        if "_seg_" not in path.name:
            assert difference.max() < 1.5 / 255
