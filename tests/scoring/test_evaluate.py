"""The scoring of whole folders: what is written, what is printed, and all kinds of bad input."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.report.canvas import heat, soft_png
from guided_diffusion.report.pictures import overlay
from guided_diffusion.scoring import pairing
from guided_diffusion.scoring.case_scores import resize
from guided_diffusion.scoring.components import find_components
from guided_diffusion.scoring.evaluate import evaluate
from guided_diffusion.scoring.predictions import read_soft
from guided_diffusion.scoring.summary import summary_text

GOLDEN = Path(__file__).parents[1] / "golden" / "env"

SQUARE = np.zeros((16, 16), dtype=np.float32)
SQUARE[4:12, 4:12] = 1
HALF = SQUARE.copy()
HALF[:, 8:] = 0
EMPTY = np.zeros_like(SQUARE)


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(soft_png(mask)).save(path)


@pytest.fixture
def folders(tmp_path):
    """Four ISIC cases: perfect, half found, empty and found empty, empty but something found."""
    pairs = {"1": (SQUARE, SQUARE), "2": (HALF, SQUARE), "3": (EMPTY, EMPTY), "4": (HALF, EMPTY)}
    for case, (prediction, truth) in pairs.items():
        save(tmp_path / "pred" / f"{case}_output_ens.png", prediction)
        save(tmp_path / "gt" / f"ISIC_{case}_Segmentation.png", truth)
    return tmp_path / "pred", tmp_path / "gt"


def rows(folder):
    with (folder / "scores.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_golden_folder_by_the_parents_arithmetic(tmp_path):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    shutil.copytree(GOLDEN / "pred", tmp_path / "pred")
    summary = evaluate(str(tmp_path / "pred"), str(GOLDEN / "gt"))

    assert summary["parent_iou"] == pytest.approx(expected["iou"], abs=1e-6)
    assert summary["parent_dice"] == pytest.approx(expected["dice"], abs=1e-6)
    for case, row in rows(tmp_path / "pred").items():
        scores = [float(row["parent_iou"]), float(row["parent_dice"])]
        assert scores == pytest.approx(expected["per_image"][case], abs=1e-6)

    first, second = summary_text(summary).splitlines()[:2]
    assert float(first.removeprefix("iou is ")) == summary["parent_iou"]
    assert float(second.removeprefix("dice is ")) == summary["parent_dice"]


def test_four_cases_by_hand(folders):
    summary = evaluate(*folders)
    assert summary["cases"] == 4
    assert (summary["empty_truth"], summary["empty_prediction"], summary["empty_both"]) == (2, 1, 1)
    assert summary["dice"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert summary["iou"] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)
    assert summary["dice_lesion"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["iou_lesion"] == pytest.approx((1 + 1 / 2) / 2)
    assert summary["dice_member"] is None


def test_files_that_are_written(folders):
    summary = evaluate(*folders)
    table = rows(folders[0])
    assert json.loads((folders[0] / "summary.json").read_text()) == summary
    assert list(table) == ["1", "2", "3", "4"]
    assert next(iter(table["2"])) == "name"
    assert [table["2"][key] for key in ("tp", "fp", "fn", "tn")] == ["32", "0", "32", "192"]
    assert [table["4"][key] for key in ("empty_truth", "empty_prediction")] == ["1", "0"]
    assert table["4"]["dice_member"] == ""
    assert not list(folders[0].glob(".*"))

    evaluate(*folders)
    assert rows(folders[0]) == table


def test_report_is_aligned_and_states_the_rule(folders):
    lines = summary_text(evaluate(*folders)).splitlines()
    assert lines[2].startswith("(iou, dice: as the published code computes them")
    assert "at their own size" in lines[4]
    table = lines[5:11]
    words = ["all", "Dice", "IoU", "HD95,", "surface", "cases"]
    assert [line.split()[0] for line in table] == words
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["Dice", "0.6667", "0.8333"]
    assert table[5].split() == ["cases", "4", "2"]
    assert "empty masks: prediction and truth both empty" in lines[-1]


def test_nothing_but_empty_truths(tmp_path):
    save(tmp_path / "pred" / "1_output_ens.png", EMPTY)
    save(tmp_path / "gt" / "ISIC_1_Segmentation.png", EMPTY)
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    assert (summary["dice"], summary["dice_lesion"]) == (1.0, None)
    assert json.loads((tmp_path / "pred" / "summary.json").read_text())["dice_lesion"] is None
    assert "-" in summary_text(summary).splitlines()[6].split()


def test_the_prediction_goes_to_the_size_of_the_truth(tmp_path):
    truth = np.kron(SQUARE, np.ones((4, 4), dtype=np.float32))
    save(tmp_path / "pred" / "1_output_ens.png", SQUARE)
    save(tmp_path / "gt" / "ISIC_1_Segmentation.png", truth)
    summary = evaluate(tmp_path / "pred", tmp_path / "gt")
    row = rows(tmp_path / "pred")["1"]
    assert sum(int(row[key]) for key in ("tp", "fp", "fn", "tn")) == truth.size
    assert 0.98 < summary["dice"] <= 1
    assert 0.95 < summary["parent_dice"] <= 1


def test_resize_by_hand():
    row = np.array([[0, 1]], dtype=np.float32)
    np.testing.assert_allclose(resize(row, (1, 4)), [[0, 0.25, 0.75, 1]])
    np.testing.assert_allclose(resize(row, (1, 1)), [[0.5]])
    assert resize(row, (1, 2)) is row


def test_members_are_scored_one_by_one(folders):
    save(folders[0] / "2_output0.png", SQUARE)
    save(folders[0] / "2_output1.png", EMPTY)
    save(folders[0] / "2_output10.png", HALF)
    summary = evaluate(*folders)
    row = rows(folders[0])["2"]
    assert row["members"] == "3"
    assert float(row["dice_member"]) == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert summary["dice_member"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert "single members" in summary_text(summary)


def test_png_wins_over_jpg_and_other_files_are_left_alone(folders):
    predictions, truths = folders
    Image.fromarray(soft_png(SQUARE)).save(predictions / "2_output_ens.jpg")
    Image.fromarray(soft_png(SQUARE)).save(predictions / "4_output_ens.jpg")
    (predictions / "4_output_ens.png").unlink()
    save(predictions / "2_mask.png", SQUARE)
    save(predictions / "2_uncertainty.png", SQUARE)
    save(predictions / "below" / "9_output_ens.png", SQUARE)
    evaluate(predictions, truths)
    table = rows(predictions)
    assert (table["2"]["tp"], table["4"]["fp"], len(table)) == ("32", "64", 4)


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA", "P"])
def test_masks_of_any_picture_mode(tmp_path, mode):
    Image.fromarray(soft_png(SQUARE)).convert(mode).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_soft(tmp_path / "mask.png"), SQUARE)


def test_sixteen_bit_masks(tmp_path):
    Image.fromarray((SQUARE * 65535).astype(np.uint16)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_soft(tmp_path / "mask.png"), SQUARE)


# Bad input


def refused(folders, *wanted, **options):
    """Scoring stops with one message that holds all of ``wanted``, and writes nothing."""
    with pytest.raises(UserError) as error:
        evaluate(*folders, **options)
    assert all(text in str(error.value) for text in wanted), str(error.value)
    assert "\n" not in str(error.value)
    if folders[0] and Path(folders[0]).is_dir():
        assert not (Path(folders[0]) / "scores.csv").exists()
        assert not (Path(folders[0]) / "summary.json").exists()


def test_missing_and_surplus_cases_are_listed(folders):
    save(folders[0] / "9_output_ens.png", SQUARE)
    (folders[0] / "1_output_ens.png").unlink()
    refused(
        folders,
        "no prediction for 1 case (1)",
        "no truth for 1 case (9)",
        "score the 3 common cases with --partial True",
    )
    summary = evaluate(*folders, partial=True)
    assert summary["cases"] == 3
    assert list(rows(folders[0])) == ["2", "3", "4"]


def test_a_long_list_of_missing_cases_is_cut(folders):
    for case in range(100, 115):
        save(folders[1] / f"ISIC_{case}_Segmentation.png", SQUARE)
    refused(folders, "no prediction for 15 cases (100, 101,", "109, ...)")


def test_no_case_in_common(folders):
    for path in folders[0].iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    refused(folders, "Not one case is on both sides")
    refused(folders, "Not one case is on both sides", partial=True)


def test_folders_that_are_not_there(folders, tmp_path):
    refused((None, folders[1]), "--inp_pth: is missing")
    refused((folders[0], ""), "--out_pth: is missing")
    refused((tmp_path / "nowhere", folders[1]), f"--inp_pth {tmp_path / 'nowhere'}: does not exist")
    refused((folders[0], tmp_path / "nowhere"), f"--out_pth {tmp_path / 'nowhere'}: does not exist")
    refused((folders[0] / "1_output_ens.png", folders[1]), "--inp_pth", "is a file, not a folder")


def test_empty_folders(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    refused((tmp_path / "empty", folders[1]), str(tmp_path / "empty"), "no prediction")
    refused((folders[0], tmp_path / "empty"), str(tmp_path / "empty"))


@pytest.mark.parametrize("content", [b"", b"not a picture", b"cut"])
def test_an_unreadable_prediction(folders, content):
    path = folders[0] / "2_output_ens.png"
    path.write_bytes(path.read_bytes()[:60] if content == b"cut" else content)
    refused(folders, "2_output_ens.png", "cannot be read")


def test_a_member_of_another_size(folders):
    save(folders[0] / "2_output0.png", SQUARE[:8])
    refused(folders, "2_output0.png: the mask is 8 x 16, but 2_output_ens.png is 16 x 16")


@pytest.mark.parametrize(
    ("truth", "wanted"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), 3.0), "values from 3 to 3"),
        (np.zeros((3, 4, 4)), "shape (3, 4, 4)"),
    ],
)
def test_a_truth_that_is_no_mask(folders, monkeypatch, truth, wanted):
    cases = {case: Truth(lambda: truth) for case in "1234"}
    monkeypatch.setattr(pairing, "open_masks", lambda folder, classes, **_: cases)
    refused(folders, "truth of case 1", wanted)


def test_an_interrupted_write_leaves_the_old_file(folders, monkeypatch):
    evaluate(*folders)
    before = (folders[0] / "summary.json").read_bytes()

    def fail(self, target):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"scores\.csv.*No space left"):
        evaluate(*folders)
    assert (folders[0] / "summary.json").read_bytes() == before
    assert not list(folders[0].glob(".*"))


# Pictures


def test_soft_png_rounds_half_up():
    assert soft_png([-1, 0, 0.5, 1, 2]).tolist() == [0, 0, 128, 255, 255]
    assert soft_png(np.arange(256) / 255).tolist() == list(range(256))


def test_heat_grows_brighter():
    light = heat(np.linspace(0, 1, 50)).astype(float) @ [0.21, 0.72, 0.07]
    assert heat(0.0).tolist() == [0, 0, 0]
    assert (np.diff(light) > 0).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_overlay_shows_each_panel_in_its_place(channels):
    image = np.full((channels, 16, 16), 0.5, dtype=np.float32)
    image[:, 0, 0] = 0
    picture = overlay(image, SQUARE, HALF, HALF / 2, name="a case", members=5, panel=160)
    assert picture.dtype == np.uint8
    assert picture.shape == (50 + 160 + 34, 4 * 160 + 2 * 20 + 3 * 12, 3)

    plain, truth, fused, uncertainty = (picture[50:210, 20 + i * 172 :][:, :160] for i in range(4))
    outline = (truth.astype(int) - plain).any(axis=-1)
    assert outline[80, 36:44].any() and outline[80, 116:124].any()
    assert not outline[80, 50:110].any()
    assert fused[80, 60, 2] > fused[80, 60, 0] + 50
    np.testing.assert_allclose(uncertainty[80, 60], heat(1.0), atol=2)
    assert len(np.unique(uncertainty[10, 150])) == 1


def test_an_overlay_has_a_number_beside_each_component():
    """At the right of a square, at the left of one at the edge, and only on the fused panel."""
    fused = np.zeros((16, 16), dtype=np.float32)
    fused[6:10, 4:8] = fused[1:3, 13:] = 1
    components = find_components(fused > 0, fused[None] > 0)
    image = np.full((1, 16, 16), 0.5, dtype=np.float32)
    arguments = {"name": "a", "members": 2, "panel": 160}
    plain = overlay(image, fused, fused, fused / 2, **arguments)
    drawn = overlay(image, fused, fused, fused / 2, components=components, **arguments)
    changed = (plain != drawn).any(axis=-1)[50:210, 20:]
    panels = [changed[:, i * 172 : i * 172 + 160] for i in range(4)]
    assert [panel.any() for panel in panels] == [False, False, True, False]
    rows, columns = panels[2].nonzero()
    beside = (columns >= 80) & (columns < 110) & (abs(rows - 80) < 12)
    before = (columns >= 100) & (columns < 130) & (abs(rows - 20) < 12)
    assert beside.any() and before.any() and (beside | before).all()


def test_overlay_without_truth_and_of_another_shape():
    image = np.random.default_rng(0).normal(size=(3, 20, 40))
    zeros = np.zeros((20, 40))
    picture = overlay(image, None, zeros, zeros, name="x" * 300)
    assert picture.shape == (50 + 160 + 34, 3 * 320 + 2 * 20 + 2 * 12, 3)


def test_overlay_refuses_masks_of_another_size():
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(8, 16\)"):
        overlay(np.zeros((1, 16, 16)), SQUARE, SQUARE[:8], SQUARE, name="x")
