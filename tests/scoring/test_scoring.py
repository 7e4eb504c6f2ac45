"""The scores of whole folders: fusions, raters, volumes, and every kind of result file."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import read_csv, refused, script, succeeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.scoring.case_scores import Scoring
from guided_diffusion.scoring.evaluate import evaluate, evaluate_all
from guided_diffusion.scoring.predictions import find_predictions, last_panel, read_soft
from guided_diffusion.scoring.summary import summary_text
from guided_diffusion.scoring.surface import surface_distances

SQUARE = np.zeros((16, 16), dtype=np.float32)
SQUARE[4:12, 4:12] = 1
SHIFTED = np.roll(SQUARE, 2, axis=1)
EMPTY = np.zeros_like(SQUARE)


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(soft_png(mask)).save(path)


def save_nifti(path, values, zooms=(1, 1, 1)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values), np.diag([*zooms, 1])), path)


def folder(tmp_path, cases, truths):
    """Predictions by file name, truths by case."""
    for name, mask in cases.items():
        save(tmp_path / "pred" / name, mask)
    for case, mask in truths.items():
        save(tmp_path / "gt" / f"{case}.png", mask)
    return tmp_path / "pred", tmp_path / "gt"


# ------------------------------------------------------------------------------------- one case


def test_every_measure_of_a_shifted_square_by_hand(tmp_path):
    """8 x 8, moved by two: 48 pixels in common of 64 each; every column is two away at most."""
    pair = folder(tmp_path, {"a_output_ens.png": SHIFTED}, {"a": SQUARE})
    evaluate(*pair)
    (row,) = read_csv(pair[0] / "scores.csv")
    ratios = {
        "dice": 0.75,
        "iou": 48 / 80,
        "precision": 0.75,
        "sensitivity": 0.75,
        "specificity": (256 - 80) / (256 - 64),
        "volume_difference": 0,
        "size": 64,
        "surface_dice": 1,
        "hd95": 2,
    }
    assert {key: float(row[key]) for key in ratios} == pytest.approx(ratios)
    distances = surface_distances(SHIFTED > 0, SQUARE > 0)
    assert float(row["assd"]) == pytest.approx(distances.pooled.mean())
    assert row["energy_distance"] == row["dice_best"] == row["dice_between"] == ""
    assert float(row["uncertainty"]) == 0


def test_members_and_fusions_by_hand(tmp_path):
    """Three members: the square twice and nothing once. Mean and vote find it, its square not."""
    files = {
        "a_output_ens.png": SHIFTED,
        "a_output0.png": SQUARE,
        "a_output1.png": SQUARE,
        "a_output2.png": EMPTY,
    }
    pair = folder(tmp_path, files, {"a": SQUARE})
    summary = evaluate(*pair)
    found = {row["mask"]: float(row["dice"]) for row in read_csv(pair[0] / "masks.csv")}
    assert found == pytest.approx(
        {
            "fused": 0.75,
            "member 0": 1,
            "member 1": 1,
            "member 2": 0,
            "mean": 1,
            "vote": 1,
            "staple": 1,
            "squared_mean": 0,
            "expected_dice": 1,
        }
    )
    (row,) = read_csv(pair[0] / "scores.csv")
    assert float(row["dice_between"]) == pytest.approx(1 / 3)
    assert float(row["uncertainty"]) == pytest.approx(2 / 3)
    assert summary["masks"]["member"]["dice"] == pytest.approx(2 / 3)
    assert summary["masks"]["mean"]["hd95"] == 0

    # Two of three pairs have a Dice of 0; one of three members has a Dice of 0 with the truth.
    assert float(row["member_error"]) == pytest.approx(1 / 3)
    assert summary["uncertainty"]["spread_skill"] == pytest.approx((2 / 3) / (1 / 3))
    (component,) = read_csv(pair[0] / "components.csv")
    assert {key: float(value) for key, value in component.items() if key != "name"} == {
        **{"component": 1, "pixels": 64, "top": 4, "left": 6, "bottom": 12, "right": 14},
        **{"member_share": pytest.approx(2 / 3), "truth_share": 0.75},
    }


def test_components_and_the_members_that_contain_them(tmp_path):
    """Of two squares one is true and in every member, the other in one of two."""
    other = EMPTY.copy()
    other[0:2, 0:2] = 1
    both = np.maximum(SQUARE, other)
    files = {"a_output_ens.png": both, "a_output0.png": both, "a_output1.png": SQUARE}
    files["b_output_ens.png"] = SQUARE  # without members: nothing to count
    pair = folder(tmp_path, files, {"a": SQUARE, "b": SQUARE})
    summary = evaluate(*pair)
    rows = read_csv(pair[0] / "components.csv")
    columns = ("name", "component", "member_share", "truth_share")
    shown = [[row[column] for column in columns] for row in rows]
    assert shown == [["a", "1", "1.0", "1.0"], ["a", "2", "0.5", "0.0"]]
    assert summary["components"] == {
        **{"number": 2, "true": 1, "share_true": 1, "share_false": 0.5, "auroc": 1}
    }
    assert summary["uncertainty"]["spread"] == pytest.approx(1 - 128 / 132)
    assert summary["uncertainty"]["member_error"] == pytest.approx((1 - 128 / 132) / 2)
    assert summary["uncertainty"]["spread_skill"] == pytest.approx(2)
    assert "spread/skill 2.00" in summary_text(summary)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)))
def test_members_in_any_order_score_the_same(tmp_path_factory, order):
    generator = np.random.default_rng(2)
    members = [np.clip(SQUARE + generator.normal(0, 0.4, (16, 16)), 0, 1) for _ in order]
    found = []
    for places in (range(4), order):
        place = tmp_path_factory.mktemp("order")
        files = {f"a_output{k}.png": members[i] for k, i in enumerate(places)}
        pair = folder(place, {"a_output_ens.png": SQUARE, **files}, {"a": SHIFTED})
        evaluate(*pair)
        (row,) = read_csv(pair[0] / "scores.csv")
        fusions = [r for r in read_csv(pair[0] / "masks.csv") if "member" not in r["mask"]]
        found.append([float(row["dice_between"]), *(float(r["dice"]) for r in fusions)])
    assert found[0] == pytest.approx(found[1])


def test_calibration_and_uncertainty_of_a_folder_by_hand(tmp_path):
    """Half of the pixels at level 51 (0.2) are foreground: the error there is 0.3."""
    soft = np.full((16, 16), 51 / 255, dtype=np.float32)
    truth = EMPTY.copy()
    truth[:8] = 1
    pair = folder(
        tmp_path,
        {"a_output_ens.png": soft, "b_output_ens.png": SQUARE},
        {"a": truth, "b": SQUARE},
    )
    summary = evaluate(*pair)
    assert summary["calibration"]["error"] == pytest.approx(0.3 / 2)
    assert summary["calibration"]["error_region"] == pytest.approx(0.3 * 256 / (256 + 64))
    assert sum(bin["pixels"] for bin in summary["calibration"]["curve"]) == 2 * 256
    uncertainty = summary["uncertainty"]
    assert uncertainty["of"] == "fused mask"
    assert (uncertainty["low_cases"], uncertainty["auroc"]) == (1, 1)
    assert uncertainty["correlation"] == pytest.approx(1)
    assert uncertainty["sparsification"]["error"][0] == pytest.approx(128 / 512)
    assert uncertainty["sparsification"]["error"][-1] == pytest.approx(0, abs=1e-9)

    # Case a has a Dice of 0 and is handed over first: 1/2 for both, 1 for the rest.
    half = 128 * (math.log(5) + math.log(1.25))  # -ln 0.2 of the lesion, -ln 0.8 of the rest
    sure = 256 * -math.log(1 - 1 / 510)
    assert summary["calibration"]["nll"] == pytest.approx((half + sure) / 512)
    assert summary["calibration"]["brier"] == pytest.approx(128 * (0.64 + 0.04) / 512)
    assert uncertainty["spread_skill"] is None and uncertainty["spread"] is None
    curve = uncertainty["risk_coverage"]
    assert curve["curve"] == {"handed": [0, 0.5], "dice": [0.5, 1], "oracle": [0.5, 1]}
    assert (curve["area"], curve["excess"]) == (0.25, 0)
    assert [entry["share"] for entry in curve["hand_over"]] == [0.5] * 4
    assert summary["components"]["number"] == 0 and not (pair[0] / "components.csv").exists()
    assert "hand over for a mean Dice of the rest: 50 % for 0.8, 50 %" in summary_text(summary)


def test_components_of_earlier_masks_do_not_stay(tmp_path):
    """The folder was sampled anew with one member; a table of the user's own is left alone."""
    files = {f"a_output{end}.png": SQUARE for end in ("_ens", "0", "1")}
    pair = folder(tmp_path, files, {"a": SQUARE})
    table = pair[0] / "components.csv"
    evaluate(*pair)
    assert len(read_csv(table)) == 1
    (pair[0] / "a_output1.png").unlink()
    evaluate(*pair)
    assert not table.exists()
    table.write_text("name,pixels\na,3\n")
    evaluate(*pair)
    assert table.read_text() == "name,pixels\na,3\n"


def test_intervals_and_thirds_by_size(tmp_path):
    truths = {f"{k}": EMPTY.copy() for k in range(9)}
    for k, truth in enumerate(truths.values()):
        truth[: k + 1] = 1
    predicted = {f"{k}_output_ens.png": truths[f"{k}"] * (k != 0) for k in range(9)}
    summary = evaluate(*folder(tmp_path, predicted, truths))
    thirds = summary["by_size"]
    assert [third["size"] for third in thirds] == ["small", "medium", "large"]
    assert [(t["smallest"], t["largest"]) for t in thirds] == [(16, 48), (64, 96), (112, 144)]
    assert [third["dice"]["mean"] for third in thirds] == pytest.approx([2 / 3, 1, 1])
    dice = summary["scores_lesion"]["dice"]
    assert (dice["number"], dice["mean"], dice["median"]) == (9, pytest.approx(8 / 9), 1)
    assert dice["low"] < 8 / 9 < dice["high"] <= 1
    assert summary["scores_lesion"]["hd95"]["number"] == 8
    assert summary["interval"]["drawn"] == "cases"


@pytest.mark.parametrize(
    ("rule", "dice", "counted"), [("match", 2 / 3, 3), ("zero", 1 / 3, 3), ("skip", 1, 1)]
)
def test_the_rule_for_empty_masks_is_chosen_and_printed(tmp_path, rule, dice, counted):
    """A found square, nothing found where nothing is, and something found there."""
    files = {"a_output_ens.png": SQUARE, "b_output_ens.png": EMPTY, "c_output_ens.png": SQUARE}
    pair = folder(tmp_path, files, {"a": SQUARE, "b": EMPTY, "c": EMPTY})
    summary = evaluate_all(*pair, scoring=Scoring(empty=rule)).summary
    assert summary["dice"] == pytest.approx(dice)
    assert summary["scores"]["dice"]["number"] == counted
    assert summary["dice_lesion"] == 1
    assert summary_text(summary).splitlines()[-1] == f"empty masks: {summary['empty_rule']}"
    assert [row["dice"] != "" for row in read_csv(pair[0] / "scores.csv")].count(True) == counted


def test_the_picture_to_look_at_is_the_worst_case_with_a_lesion(tmp_path):
    shifted = {name: np.roll(SQUARE, k, axis=0) for name, k in (("b", 1), ("c", 2), ("d", 3))}
    found = {f"{name}_output_ens.png": mask for name, mask in shifted.items()}
    truths = dict.fromkeys(shifted, SQUARE) | {"a": EMPTY}
    pred, gt = folder(tmp_path, found | {"a_output_ens.png": SQUARE}, truths)
    command = ["--inp_pth", pred, "--out_pth", gt]
    for name in "abc":
        said = succeeded(script("segmentation_env", *command))
        assert said.rstrip().endswith(f"next: open {pred / 'report.html'}")
        (pred / f"{name}_overlay.png").touch()
    (pred / "d_overlay.png").touch()
    said = succeeded(script("segmentation_env", *command, "--report", False))
    worst = f"{pred / 'd_overlay.png'}, the lowest Dice of a case with a lesion, 0.6"
    assert f"next: open {worst}" in said


def test_several_raters(tmp_path):
    """Members and raters alike, in another order: no distance, and each rater's is among them."""
    files = {"a_output_ens.png": SQUARE, "a_output0.png": SQUARE, "a_output1.png": SHIFTED}
    pair = folder(tmp_path, files, {"a": SQUARE})
    for number, mask in enumerate((SHIFTED, SQUARE)):
        save(tmp_path / f"rater{number}" / "a.png", mask)
    raters = [str(tmp_path / f"rater{number}") for number in range(2)]
    summary = evaluate_all(*pair, raters=raters).summary
    assert summary["scores"]["energy_distance"]["mean"] == pytest.approx(0)
    assert summary["scores"]["dice_best"]["mean"] == 1

    summary = evaluate_all(*pair, raters=raters[:1]).summary
    apart = 1 - 48 / 80
    assert summary["scores"]["energy_distance"]["mean"] == pytest.approx(apart - apart / 2)
    (tmp_path / "rater0/a.png").rename(tmp_path / "rater0/b.png")
    with pytest.raises(UserError, match=r"--raters: rater 1 has no mask for 1 case \(a\)"):
        evaluate_all(*pair, raters=raters)
    save(tmp_path / "rater0/a.png", SQUARE[:8])
    with pytest.raises(
        UserError, match=r"truth of case a: the rater's mask is 8 x 16, not 16 x 16"
    ):
        evaluate_all(*pair, raters=raters)


# ------------------------------------------------------------------------------- kinds of files


def test_tensors_of_diffusion_based_segmentation(tmp_path):
    """Members of [1, 1, 224, 224], not fused, of a slice of 240 x 240; DDIM's have 5 channels."""
    truth = np.zeros((240, 240), dtype=np.uint8)
    truth[60:120, 80:140] = 1
    save_nifti(tmp_path / "gt" / "000246_seg.nii.gz", truth, (0.5, 2, 1))
    member = torch.from_numpy(truth[8:-8, 8:-8].astype(np.float32))[None, None]
    (tmp_path / "pred").mkdir()
    torch.save(member * 1.2 - 0.1, tmp_path / "pred/000246_output0")
    torch.save(
        torch.cat([torch.randn(1, 4, 224, 224), member], 1), tmp_path / "pred/000246_output1"
    )
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    (row,) = read_csv(tmp_path / "pred/scores.csv")
    assert (row["name"], float(row["dice"]), row["members"]) == ("000246", 1, "2")
    assert summary["distances"]["unit"] == "mm" and float(row["size"]) == 3600


def test_pictures_and_strips_of_medsegdiff(tmp_path):
    """Grey as RGB in a JPEG; a debug strip of three panels on black, the mask below."""
    big = np.kron(SQUARE, np.ones((16, 16), dtype=np.float32))
    path = tmp_path / "1_output_ens.jpg"
    Image.fromarray(soft_png(big)).convert("RGB").save(path)
    assert np.array_equal(read_soft(path) >= 0.5, big >= 0.5)

    side, panels = 256, 3
    strip = np.zeros((panels * (side + 10) + 10, side + 20), dtype=np.float32)
    for n, panel in enumerate((0.5 * np.ones_like(big), 1 - big, big)):
        strip[n * 266 + 10 : n * 266 + 266, 10:266] = panel
    Image.fromarray(soft_png(strip)).save(tmp_path / "1_output0.jpg")
    assert np.array_equal(read_soft(tmp_path / "1_output0.jpg") >= 0.5, big >= 0.5)
    assert last_panel(1 - strip).shape == strip.shape

    save(tmp_path / "gt/ISIC_1_Segmentation.png", SQUARE)
    assert evaluate(tmp_path, tmp_path / "gt")["dice"] > 0.98


def test_the_best_kind_of_file_is_read(tmp_path):
    save(tmp_path / "a_output_ens.png", SQUARE)
    save_nifti(tmp_path / "a_output_ens.nii.gz", SQUARE)
    save_nifti(tmp_path / "b_output_ens.nii.gz", SQUARE)
    save(tmp_path / "a_output1.jpg", SQUARE)
    save(tmp_path / "a_output1.png", SQUARE)
    save(tmp_path / "a_output0.png", SQUARE)
    found = find_predictions(tmp_path)
    assert list(found) == ["a"] and found["a"].fused.path.suffix == ".png"
    names = ["a_output0.png", "a_output1.png"]
    assert [source.path.name for source in found["a"].members] == names


def test_binary_masks_alone(tmp_path):
    save(tmp_path / "pred/a_mask.png", SHIFTED)
    save_nifti(tmp_path / "other/a_mask.nii.gz", (SHIFTED * 2).astype(np.uint8))
    save(tmp_path / "gt/a.png", SQUARE)
    for name in ("pred", "other"):
        assert evaluate(tmp_path / name, tmp_path / "gt")["dice"] == pytest.approx(0.75)


def test_volumes_in_millimetres(tmp_path):
    """A box moved by one slice: in 3-D one voxel away there, in its slices empty or perfect."""
    truth = np.zeros((12, 14, 10), dtype=np.uint8)
    truth[3:9, 4:10, 2:6] = 1
    soft = np.roll(truth, 1, axis=2) * np.float32(0.9)
    save_nifti(tmp_path / "gt/p1_seg.nii.gz", truth, (0.5, 0.5, 3))
    save_nifti(tmp_path / "pred/p1_output_ens.nii.gz", soft, (0.5, 0.5, 3))
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    (patient,) = read_csv(tmp_path / "pred/patients.csv")
    distances = surface_distances(soft >= 0.5, truth == 1, spacing=(0.5, 0.5, 3))
    assert (patient["patient"], patient["cases"]) == ("p1", "10")
    assert float(patient["dice"]) == pytest.approx(0.75)
    assert float(patient["assd"]) == pytest.approx(distances.pooled.mean())
    assert float(patient["hd95"]) == 3
    assert summary["distances"] == {"unit": "mm", "tolerance": 2.0}
    slices = {row["name"]: row for row in read_csv(tmp_path / "pred/scores.csv")}
    assert len(slices) == 10
    assert slices["p1_slice002"]["dice"] == "0.0" and slices["p1_slice003"]["dice"] == "1.0"
    assert float(slices["p1_slice003"]["size"]) == 36 * 0.25


def test_pixels_where_one_header_says_nothing(tmp_path):
    save_nifti(tmp_path / "gt/a.nii.gz", SQUARE.astype(np.uint8), (2, 2, 1))
    save(tmp_path / "gt/b.png", SQUARE)
    for case in "ab":
        save(tmp_path / f"pred/{case}_output_ens.png", SHIFTED)
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    assert summary["distances"]["unit"] == "px"
    assert {row["hd95"] for row in read_csv(tmp_path / "pred/scores.csv")} == {"2.0"}
    (tmp_path / "gt/b.png").unlink()
    summary = evaluate(tmp_path / "pred", tmp_path / "gt", partial=True)
    assert (summary["distances"]["unit"], summary["scores"]["hd95"]["mean"]) == ("mm", 4)


def test_nothing_is_left_where_every_truth_is_empty_and_skipped(tmp_path):
    files = {"a_output_ens.png": SQUARE, "b_output_ens.png": EMPTY}
    found, truths = folder(tmp_path, files, {"a": EMPTY, "b": EMPTY})
    command = ["--inp_pth", found, "--out_pth", truths, "--empty", "skip"]
    succeeded(script("segmentation_env", *command))
    summary = json.loads((found / "summary.json").read_text("utf-8"))
    assert (summary["cases"], summary["dice"]) == (2, None)
    uncertainty = summary["uncertainty"]
    assert (uncertainty["correlation"], uncertainty["auroc"], uncertainty["low_cases"]) == (
        None,
        None,
        0,
    )


# ---------------------------------------------------------------------------------- comparison


def test_two_folders_compared(tmp_path):
    truths = {f"{k}": np.roll(SQUARE, k, axis=0) for k in range(8)}
    for name, shift in (("one", 2), ("two", 1)):
        for case, truth in truths.items():
            save(tmp_path / name / f"{case}_output_ens.png", np.roll(truth, shift, axis=1))
            save(tmp_path / "gt" / f"{case}.png", truth)
    save(tmp_path / "two/7_output_ens.png", EMPTY)
    command = ["--compare", tmp_path / "one", tmp_path / "two", "--out_pth", tmp_path / "gt"]
    said = succeeded(script("segmentation_env", *command))
    found = json.loads((tmp_path / "two/comparison.json").read_text("utf-8"))
    dice = found["measures"]["dice"]
    assert dice["difference"] == pytest.approx((7 * 0.125 - 0.75) / 8)
    assert (dice["units"], dice["higher"], dice["lower"]) == (8, 7, 1)
    assert found["measures"]["hd95"]["difference"] == pytest.approx(-1)
    assert found["measures"]["hd95"]["units"] == 7
    assert [row["name"] for row in found["worst"]] == ["7"]
    assert found["worst"][0]["difference"] == pytest.approx(-0.75)
    assert len(found["best"]) == 5 and "7  Dice 0.7500 -> 0.0000" in said
    assert f"{dice['difference']:+.4f}" in said

    (tmp_path / "two/7_output_ens.png").unlink()
    error = refused(script("segmentation_env", *command, "--partial", True))
    assert "--compare: " in error and f"1 case only in {tmp_path / 'one'} (7)" in error
    assert "--partial" not in error, "it is given"
    (tmp_path / "gt/7.png").unlink()
    succeeded(script("segmentation_env", *command, "--partial", True))


def test_a_folder_to_compare_is_named_by_its_flag(tmp_path):
    pred, gt = folder(tmp_path, {"a_output_ens.png": SQUARE}, {"a": SQUARE})
    (tmp_path / "none").mkdir()
    for other, problem in (("nowhere", "does not exist"), ("none", "has no prediction")):
        for pair in ([pred, tmp_path / other], [tmp_path / other, pred]):
            error = refused(script("segmentation_env", "--compare", *pair, "--out_pth", gt))
            assert f"{tmp_path / other}: {problem}" in error and "--inp_pth" not in error


# ------------------------------------------------------------------------------------ bad input


def test_a_soft_mask_with_nan(tmp_path):
    save_nifti(tmp_path / "pred/a_output_ens.nii.gz", np.full((16, 16), np.nan, np.float32))
    save(tmp_path / "gt/a.png", SQUARE)
    with pytest.raises(UserError, match=r"a_output_ens\.nii\.gz: has NaN"):
        evaluate(tmp_path / "pred", tmp_path / "gt")
    (tmp_path / "tensors").mkdir()
    torch.save(torch.full((1, 1, 16, 16), math.nan), tmp_path / "tensors/a_output0")
    with pytest.raises(UserError, match=r"a_output0: has NaN"):
        evaluate(tmp_path / "tensors", tmp_path / "gt")


@pytest.mark.parametrize("content", ["text", "pickle", "dict", "scalar", "cut"])
def test_a_tensor_that_is_none(tmp_path, content):
    save(tmp_path / "gt/a.png", SQUARE)
    path = tmp_path / "pred/a_output0"
    path.parent.mkdir()
    if content == "text":
        path.write_text("hello")
    elif content == "cut":
        torch.save(torch.zeros(1, 1, 64, 64), path)
        path.write_bytes(path.read_bytes()[:900])
    else:
        torch.save(
            {"pickle": Scoring(), "dict": {"a": 1}, "scalar": torch.tensor(1.0)}[content], path
        )
    with pytest.raises(UserError, match="a_output0: cannot be read as a tensor") as caught:
        evaluate(tmp_path / "pred", tmp_path / "gt")
    assert "\n" not in str(caught.value)


def test_members_of_unequal_sizes_without_a_fused_mask(tmp_path):
    save(tmp_path / "pred/a_output0.png", SQUARE)
    save(tmp_path / "pred/a_output1.png", SQUARE[:8])
    save(tmp_path / "gt/a.png", SQUARE)
    with pytest.raises(
        UserError, match=r"a_output1\.png: the mask is 8 x 16, but a_output0\.png is 16 x 16"
    ):
        evaluate(tmp_path / "pred", tmp_path / "gt")


def test_a_truth_with_an_undeclared_label(tmp_path):
    save_nifti(tmp_path / "gt/a_seg.nii.gz", (SQUARE * 3).astype(np.uint8))
    for name in "12":
        save(tmp_path / f"pred/a_output_ens_{name}.png", SQUARE)
    with pytest.raises(UserError, match=r"a_seg\.nii\.gz: has label 3, which no class declares"):
        evaluate_all(tmp_path / "pred", tmp_path / "gt", mask_labels="1,2")


@pytest.mark.parametrize(
    "flags", [("--empty", "never"), ("--tolerance", "-1"), ("--low_dice", "2"), ("--compare", "a")]
)
def test_invalid_scoring_flags(tmp_path, flags):
    pair = folder(tmp_path, {"a_output_ens.png": SQUARE}, {"a": SQUARE})
    ended = script("segmentation_env", "--inp_pth", pair[0], "--out_pth", pair[1], *flags)
    assert ended.code == 2 and flags[0] in ended.err and ended.err.count("\n") == 1
    assert not (pair[0] / "scores.csv").exists()
