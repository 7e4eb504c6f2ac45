"""Predictions and truths are compared in space: on the truth's grid, in its millimetres."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from spatial import LPS, SHAPE, bare, head, lesion, oblique, pair, put, stored

from guided_diffusion.errors import UserError
from guided_diffusion.scoring.evaluate import evaluate, evaluate_all
from guided_diffusion.scoring.summary import summary_text

AXES = ("LPS", "RAS", "LAI", "PIR", "SAR")


def patient(folder: Path) -> dict[str, str]:
    """The only row of patients.csv."""
    with (folder / "patients.csv").open() as file:
        (row,) = csv.DictReader(file)
    return row


def scored(folder: Path, prediction: nib.Nifti1Image, truth: nib.Nifti1Image) -> dict:
    """Score one volume or slice against a bare mask."""
    put(folder / "pred/p_mask.nii.gz", prediction)
    put(folder / "gt/p_seg.nii.gz", truth)
    return evaluate(folder / "pred", folder / "gt")


@pytest.mark.parametrize("affine", [LPS, oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("truth", AXES)
@pytest.mark.parametrize("codes", AXES)
def test_the_same_mask_in_the_world_is_a_perfect_match(
    tmp_path: Path, codes: str, truth: str, affine: np.ndarray
) -> None:
    summary = scored(
        tmp_path / "3d", stored(lesion(), codes, affine), stored(lesion(), truth, affine)
    )
    assert summary["dice"] == 1 and summary["cases"] == 6
    assert float(patient(tmp_path / "3d/pred")["dice"]) == 1
    one = lesion()[..., 2:3]
    assert (
        scored(tmp_path / "2d", stored(one, codes, affine), stored(one, truth, affine))["dice"] == 1
    )


@pytest.mark.parametrize("codes", AXES)
def test_a_data_set_is_the_truth_of_any_prediction(tmp_path: Path, codes: str) -> None:
    data = pair(
        tmp_path / "data", stored(head(), "PIR"), bare(np.asarray(stored(lesion(), "PIR").dataobj))
    )
    put(tmp_path / "pred/a_output_ens.nii.gz", stored(lesion().astype(np.float32), codes))
    for plane in ("axial", "coronal", "sagittal"):
        found = evaluate_all(tmp_path / "pred", data, plane=plane)
        assert found.summary["dice"] == 1
        assert found.summary["cases"] == SHAPE[{"axial": 2, "coronal": 1, "sagittal": 0}[plane]]


@pytest.mark.parametrize("depth", [1, 6])
def test_a_mask_that_states_nothing_lies_as_it_is_stored(tmp_path: Path, depth: int) -> None:
    label = lesion()[..., :depth]
    for codes in AXES:
        truth = stored(label, codes)
        array = np.asarray(truth.dataobj)
        assert scored(tmp_path / f"a{codes}", bare(array), truth)["dice"] == 1
        assert scored(tmp_path / f"b{codes}", truth, bare(array))["dice"] == 1


@pytest.mark.parametrize("depth", [1, 6])
def test_another_place_is_refused(tmp_path: Path, depth: int) -> None:
    moved = LPS.copy()
    moved[0, 3] += 6
    label = lesion()[..., :depth]
    with pytest.raises(UserError, match=r"p_mask\.nii\.gz: its affine .* origin than p_seg"):
        scored(tmp_path, stored(label, "RAS", moved), stored(label))


def test_distances_are_in_the_millimetres_of_the_affine(tmp_path: Path) -> None:
    truth, found = np.zeros((12, 10, 6), np.uint8), np.zeros((12, 10, 6), np.uint8)
    truth[2:5, 2:5, 1:4] = found[5:8, 2:5, 1:4] = 1
    image = stored(truth)
    image.set_sform(LPS, 2)
    image.set_qform(None, 0)
    image.header.set_zooms((1, 1, 1))
    for codes in AXES:
        summary = scored(tmp_path / codes, stored(found, codes), image)
        assert float(patient(tmp_path / codes / "pred")["hd95"]) == pytest.approx(3 * 2)
        assert summary["scores"]["hd95"]["mean"] == pytest.approx(3 * 2)
        turned = scored(tmp_path / f"t{codes}", stored(found), stored(truth, codes))
        assert turned["scores"]["hd95"]["mean"] == pytest.approx(3 * 2)


def test_a_header_without_affine_has_the_sizes_of_pixdim(tmp_path: Path) -> None:
    truth, found = np.zeros((12, 10, 1), np.uint8), np.zeros((12, 10, 1), np.uint8)
    truth[2:5, 2:5], found[2:5, 4:7] = 1, 1
    summary = scored(tmp_path, bare(found), bare(truth, (3, 0.5, 1)))
    assert summary["scores"]["hd95"]["mean"] == pytest.approx(2 * 0.5)
    assert summary["distances"]["unit"] == "mm"


# ---------------------------------------------------------------------------------------- sizes


def picture(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values * 255).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((60, 32), True), ((32, 60), False), ((30, 16), True), ((31, 16), True), ((30, 15), True),
        ((120, 64), True), ((120, 60), False), ((45, 24), True), ((32, 32), False),
        ((60, 34), False),
    ],
)  # fmt: skip
def test_only_the_truths_shape_is_resized(
    tmp_path: Path, size: tuple[int, int], fits: bool
) -> None:
    truth = np.zeros((60, 32), bool)
    truth[4:24, 4:12] = True
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, (60, 32), strict=True))
    picture(tmp_path / "gt/a.png", truth)
    picture(tmp_path / "pred/a_mask.png", truth[np.ix_(rows, columns)])
    if fits:
        assert evaluate(tmp_path / "pred", tmp_path / "gt")["dice"] > 0.85
    else:
        with pytest.raises(UserError, match=rf"a_mask\.png: the mask is {size[0]} x {size[1]}"):
            evaluate(tmp_path / "pred", tmp_path / "gt")


def test_squares_of_the_published_code_are_stretched(tmp_path: Path) -> None:
    truth = np.zeros((64, 32), bool)
    truth[16:32, 8:16] = True
    picture(tmp_path / "gt/a.png", truth)
    picture(tmp_path / "pred/a_output_ens.jpg", truth[::2])
    assert evaluate(tmp_path / "pred", tmp_path / "gt")["dice"] > 0.9


def test_volumes_of_half_the_size_must_cover_the_same_space(tmp_path: Path) -> None:
    half = LPS @ np.diag([2, 2, 1, 1])
    half[:3, 3] += LPS[:3, :3] @ [0.5, 0.5, 0]
    label = np.kron(lesion()[::2, ::2], np.ones((2, 2, 1), np.uint8))
    for codes in AXES:
        small = stored(lesion()[::2, ::2], codes, half)
        assert scored(tmp_path / codes, small, stored(label))["dice"] > 0.7
    cut = stored(lesion()[::2, ::2], "LPS", LPS)  # says that it is a corner of the truth
    with pytest.raises(UserError, match=r"its grid is 6 x 5 x 6, but that of p_seg\.nii\.gz is 12"):
        scored(tmp_path / "cut", cut, stored(label))


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("codes", ["RAS", "PLS"])
def test_pictures_lie_as_the_truth_is_stored_unless_they_are_ours(
    tmp_path: Path, codes: str
) -> None:
    label = lesion()[..., 2:3]
    put(tmp_path / "gt/a_seg.nii.gz", stored(label, codes))
    picture(tmp_path / "pred/a_mask.png", np.asarray(stored(label, codes).dataobj)[..., 0])
    assert evaluate(tmp_path / "pred", tmp_path / "gt")["dice"] == 1
    picture(tmp_path / "own/a_mask.png", label[..., 0])
    note = {"options": {"plane": "axial"}}
    (tmp_path / "own/sampling.json").write_text(json.dumps(note))
    assert evaluate(tmp_path / "own", tmp_path / "gt")["dice"] == 1


def test_pictures_do_not_say_which_plane_they_are(tmp_path: Path) -> None:
    put(tmp_path / "gt/a_seg.nii.gz", stored(lesion(), "PIR"))
    for k in range(6):
        picture(tmp_path / f"pred/a_slice{k:03d}_mask.png", lesion()[..., k])
    with pytest.raises(UserError, match="a picture does not say where it lies"):
        evaluate(tmp_path / "pred", tmp_path / "gt")


@pytest.mark.parametrize("codes", AXES)
def test_raters_are_brought_to_the_truth(tmp_path: Path, codes: str) -> None:
    put(tmp_path / "gt/a_seg.nii.gz", stored(lesion()))
    put(tmp_path / "pred/a_mask.nii.gz", stored(lesion()))
    put(tmp_path / "rater/a_seg.nii.gz", stored(lesion(), codes))
    found = evaluate_all(tmp_path / "pred", tmp_path / "gt", raters=[str(tmp_path / "rater")])
    assert {row.dice_best for row in found.scores[""].rows} == {1}
    moved = LPS.copy()
    moved[1, 3] += 10
    put(tmp_path / "rater/a_seg.nii.gz", stored(lesion(), codes, moved))
    with pytest.raises(UserError, match="origin"):
        evaluate_all(tmp_path / "pred", tmp_path / "gt", raters=[str(tmp_path / "rater")])


# --------------------------------------------------------------------------------- missed lesions


def test_the_mean_distance_says_of_how_many_cases_it_is(tmp_path: Path) -> None:
    from guided_diffusion.report.report import write_report

    truth, found = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    truth[8:16, 8:16] = found[10:18, 8:16] = True
    for name in "abcd":
        picture(tmp_path / f"gt/{name}.png", truth)
        picture(tmp_path / f"pred/{name}_output_ens.png", found & (name == "a"))
    evaluation = evaluate_all(tmp_path / "pred", tmp_path / "gt")
    assert "HD95 is the mean of 1 of 4 cases, 1 of 4 with lesion" in summary_text(
        evaluation.summary
    )
    summary = json.loads((tmp_path / "pred/summary.json").read_text())
    for group in ("scores", "scores_lesion"):
        assert (summary[group]["hd95"]["number"], summary[group]["hd95"]["of"]) == (1, 4)
    assert (summary["masks"]["fused"]["hd95_number"], summary["masks"]["fused"]["of"]) == (1, 4)
    page = write_report(evaluation, {}).read_text("utf-8")
    assert page.count("1 of 4 cases") >= 3

    picture(tmp_path / "pred/b_output_ens.png", found)
    for name in "cd":
        picture(tmp_path / f"pred/{name}_output_ens.png", found)
    assert "HD95 is the mean" not in summary_text(evaluate(tmp_path / "pred", tmp_path / "gt"))
