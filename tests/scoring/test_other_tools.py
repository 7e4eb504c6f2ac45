"""Masks of other tools, scored under the names and in the layouts that they come in."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import read_csv
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.scoring.evaluate import evaluate, evaluate_all

AXIAL = np.diag([-2.0, -2, 3, 1])
LABELS = np.zeros((12, 10, 3), np.uint8)
LABELS[2:8, 2:6, :2] = 1
LABELS[4:6, 3:5, 1] = 2
TRUTH = (LABELS[..., 1] > 0).astype(np.uint8)
FOUND = np.roll(TRUTH, 2, axis=0)
"""Dice 2/3: four of the six rows are common."""


def png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray = AXIAL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)


@pytest.fixture
def truths(tmp_path: Path) -> Path:
    for case in ("a", "b"):
        png(tmp_path / f"gt/{case}.png", TRUTH * 255)
    return tmp_path / "gt"


@pytest.mark.parametrize(
    "name",
    [
        "{c}.png",
        "{c}.tif",
        "{c}_mask.png",
        "{c}_seg.png",
        "{c}_segmentation.png",
        "{c}_output_ens.png",
        "{c}_output0.png",
    ],
)
@pytest.mark.parametrize("white", [1, 255])
def test_pictures_of_0_and_1_and_of_black_and_white(
    name: str, white: int, truths: Path, tmp_path: Path
) -> None:
    for case in ("a", "b"):
        png(tmp_path / "pred" / name.format(c=case), FOUND * np.uint8(white))
    assert evaluate(tmp_path / "pred", truths)["dice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", ["masks/{c}.png", "rater{r}/{c}.png", "{c}/mask_{r}.png"])
def test_layouts_of_a_baseline(form: str, truths: Path, tmp_path: Path) -> None:
    """Several masks of a case are members, which are fused by their mean."""
    for case in ("a", "b"):
        for r, mask in enumerate((FOUND, FOUND, TRUTH)[: 3 if "{r}" in form else 1]):
            png(tmp_path / "pred" / form.format(c=case, r=r), mask)
        if "masks" in form:
            png(tmp_path / f"pred/images/{case}.png", TRUTH)
    assert evaluate(tmp_path / "pred", truths)["dice"] == pytest.approx(2 / 3)
    members = "3" if "{r}" in form else "0"
    assert {row["members"] for row in read_csv(tmp_path / "pred/scores.csv")} == {members}


def test_a_nearly_black_soft_mask_is_not_binary(truths: Path, tmp_path: Path) -> None:
    """Its 1 stands for 1/255 as long as any mask of the folder, of any class, is brighter."""
    png(tmp_path / "pred/a_output_ens.png", FOUND)
    png(tmp_path / "pred/b_output_ens.png", TRUTH * 255)
    evaluate(tmp_path / "pred", truths)
    rows = read_csv(tmp_path / "pred/scores.csv")
    assert [float(row["dice"]) for row in rows] == [0, 1]

    png(tmp_path / "pred/b_output_ens.png", FOUND)
    assert evaluate(tmp_path / "pred", truths)["dice"] == pytest.approx(2 / 3)
    for member, level in enumerate((0, 40)):
        for case in ("a", "b"):
            png(tmp_path / f"pred/{case}_output{member}.png", FOUND * np.uint8(level))
    assert evaluate(tmp_path / "pred", truths)["dice"] == 0


def test_results_of_this_suite_are_always_soft(truths: Path, tmp_path: Path) -> None:
    for case in ("a", "b"):
        png(tmp_path / f"pred/{case}_output_ens.png", FOUND)
    record = "name,fingerprint\na,0\nb,0\n"
    (tmp_path / "pred/predictions.csv").write_text(record, "utf-8")
    assert evaluate(tmp_path / "pred", truths)["dice"] == 0


def flipped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels, stored the other way round along x."""
    affine = AXIAL.copy()
    affine[0] = [2, 0, 0, -2 * (len(values) - 1)]
    return values[::-1], affine


@pytest.mark.parametrize("labels", ["", "core=1,rim=2"])
@pytest.mark.parametrize("turned", [False, True])
def test_label_maps_of_volumes_as_nnunet_writes_them(
    labels: str, turned: bool, tmp_path: Path
) -> None:
    nifti(tmp_path / "gt/p1.nii.gz", LABELS)
    found = LABELS.copy()
    found[found == 2] = 1
    nifti(tmp_path / "pred/p1.nii.gz", *(flipped(found) if turned else (found, AXIAL)))
    (tmp_path / "pred/plans.json").write_text("{}", "utf-8")
    summary = evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels=labels).summary
    if not labels:
        assert summary["dice_lesion"] == 1
        return
    # Of the core's 20 voxels in slice 1 all are found, with the rim's 4; those are lost.
    core, rim = (summary["classes"][name]["dice_lesion"] for name in ("core", "rim"))
    assert (core, rim) == (pytest.approx((1 + 40 / 44) / 2), 0)


def test_the_cavity_of_brats_2024_is_left_out_of_both_sides(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[0, :, 1] = 4
    nifti(tmp_path / "gt/BraTS-GLI-00005-100-seg.nii.gz", LABELS)
    nifti(tmp_path / "pred/BraTS-GLI-00005-100-seg.nii.gz", labels)
    assert evaluate(tmp_path / "pred", tmp_path / "gt")["dice_lesion"] == 1


def test_pictures_with_labels_of_classes(tmp_path: Path) -> None:
    png(tmp_path / "gt/a.png", LABELS[..., 1])
    png(tmp_path / "pred/a.png", np.where(LABELS[..., 1] == 2, 0, LABELS[..., 1]))
    found = evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels="core=1,rim=2").summary
    assert [part["dice"] for part in found["classes"].values()] == [1, 0]
    png(tmp_path / "pred/a.png", LABELS[..., 1] * 3)
    with pytest.raises(UserError, match=r"pred/a.png: has label 3, 6, which no class declares"):
        evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels="core=1,rim=2")


def test_a_nifti_file_for_each_class(tmp_path: Path) -> None:
    nifti(tmp_path / "gt/p1.nii.gz", LABELS)
    for name, label in (("core", 1), ("rim", 2)):
        soft = (label == LABELS).astype(np.float32) * np.float32(0.9)
        if label == 2:
            soft[..., 1] = np.roll(soft[..., 1], 1, axis=0)
        nifti(tmp_path / f"pred/p1_output_ens_{name}.nii.gz", *flipped(soft))
    found = evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels="core=1,rim=2").summary
    # The rim is moved by one of its two rows; where it meets the core, the core is as likely.
    dices = [part["dice_lesion"] for part in found["classes"].values()]
    assert dices == pytest.approx([1, 2 / 3])


def test_what_cannot_be_a_prediction(truths: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds the ground truth itself, such as a\.png"):
        evaluate(truths, truths)
    assert not (truths / "scores.csv").exists()
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"has no prediction, such as .*<case>\.nii\.gz of another"):
        evaluate(tmp_path / "none", truths)
    noise = np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8)
    for case in ("a", "b"):
        png(tmp_path / f"pred/{case}.png", noise)
    with pytest.raises(UserError, match=r"pred/a.png: holds .* neither labels .* nor black"):
        evaluate(tmp_path / "pred", truths)


def test_the_raters_of_the_truth_are_found(tmp_path: Path) -> None:
    """Two members against raters who are the same two: no distance; the truth is their union."""
    for r, mask in enumerate((TRUTH, FOUND)):
        png(tmp_path / f"gt/masks_{r}/a.png", mask)
        png(tmp_path / f"pred/a_output{r}.png", mask * 255)
    png(tmp_path / "gt/images/a.png", TRUTH)
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    assert summary["dice"] == 1 and summary["majority_of"] == 2
    assert summary["scores"]["energy_distance"]["mean"] == pytest.approx(0)
    assert summary["scores"]["dice_best"]["mean"] == 1
    (row,) = read_csv(tmp_path / "pred/scores.csv")
    assert int(row["tp"]) == int(((TRUTH + FOUND) > 0).sum())


def test_raters_that_are_given_leave_the_truth_as_it_is(tmp_path: Path) -> None:
    png(tmp_path / "gt/images/a.png", TRUTH)
    png(tmp_path / "gt/masks/a.png", TRUTH)
    for r in (1, 2):
        png(tmp_path / f"gt/raters/rater{r}/a.png", FOUND)
    png(tmp_path / "pred/a.png", FOUND)
    assert evaluate(tmp_path / "pred", tmp_path / "gt")["dice"] == 1
    given = [str(tmp_path / f"gt/raters/rater{r}") for r in (1, 2)]
    summary = evaluate_all(tmp_path / "pred", tmp_path / "gt", raters=given).summary
    assert summary["dice"] == pytest.approx(2 / 3) and summary["majority_of"] == 0
    assert summary["scores"]["energy_distance"]["mean"] == 0
