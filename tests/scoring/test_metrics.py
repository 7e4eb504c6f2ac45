"""Scores by value: masks small enough to count by hand, the empty masks, the parents' numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.metrics import Confusion, confusion

GOLDEN = Path(__file__).parents[1] / "golden" / "env"

EMPTY, FULL, PARTIAL = [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 0]]
NAN = float("nan")


def test_confusion_counts_by_hand():
    assert confusion([[1, 1], [0, 0]], [[1, 0], [1, 0]]) == Confusion(tp=1, fp=1, fn=1, tn=1)
    assert confusion([[1, 1], [1, 0]], [[1, 0], [0, 0]]) == Confusion(tp=1, fp=2, fn=0, tn=1)
    assert confusion(np.ones((2, 3, 4)), np.zeros((2, 3, 4))) == Confusion(0, 24, 0, 0)


def test_ratios_by_hand():
    counts = Confusion(tp=3, fp=1, fn=2, tn=4)
    assert metrics.dice(counts) == 6 / 9
    assert metrics.iou(counts) == 3 / 6
    assert metrics.sensitivity(counts) == 3 / 5
    assert metrics.precision(counts) == 3 / 4
    assert metrics.specificity(counts) == 4 / 5


@pytest.mark.parametrize(
    ("prediction", "truth", "dice", "iou", "sensitivity", "precision", "specificity"),
    [
        (EMPTY, EMPTY, 1, 1, 1, 1, 1),
        (EMPTY, FULL, 0, 0, 0, NAN, NAN),
        (EMPTY, PARTIAL, 0, 0, 0, NAN, 1),
        (FULL, EMPTY, 0, 0, NAN, 0, 0),
        (FULL, FULL, 1, 1, 1, 1, NAN),
        (FULL, PARTIAL, 2 / 3, 1 / 2, 1, 1 / 2, 0),
        (PARTIAL, EMPTY, 0, 0, NAN, 0, 1 / 2),
        (PARTIAL, FULL, 2 / 3, 1 / 2, 1 / 2, 1, NAN),
        (PARTIAL, PARTIAL, 1, 1, 1, 1, 1),
    ],
)
def test_table_of_empty_full_and_partial(
    prediction, truth, dice, iou, sensitivity, precision, specificity
):
    counts = confusion(prediction, truth)
    assert metrics.dice(counts) == pytest.approx(dice)
    assert metrics.iou(counts) == pytest.approx(iou)
    assert metrics.sensitivity(counts) == pytest.approx(sensitivity, nan_ok=True)
    assert metrics.precision(counts) == pytest.approx(precision, nan_ok=True)
    assert metrics.specificity(counts) == pytest.approx(specificity, nan_ok=True)


def test_empty_flags_and_the_value_of_both_empty():
    both, truth_only = confusion(EMPTY, EMPTY), confusion(PARTIAL, EMPTY)
    assert (both.empty_truth, both.empty_prediction) == (True, True)
    assert (truth_only.empty_truth, truth_only.empty_prediction) == (True, False)
    assert metrics.dice(both, empty=0.0) == metrics.iou(both, empty=0.0) == 0.0
    assert math.isnan(metrics.sensitivity(both, empty=NAN))
    assert metrics.dice(truth_only, empty=0.5) == 0.0
    half = Confusion(tp=1, fp=1, fn=1, tn=1)
    assert not half.empty_truth and not half.empty_prediction


@pytest.mark.parametrize(
    ("rule", "both", "truth_only", "prediction_only"),
    [
        ("match", (1, 1), (0, 0), (0, 0)),
        ("zero", (0, 0), (0, 0), (0, 0)),
        ("skip", (NAN, NAN), (NAN, NAN), (0, 0)),
        ("parents", (1, 1), (1e-4 / 2.0001, 1e-6 / 2.000001), (1e-4 / 2.0001, 1e-6 / 2.000001)),
    ],
)
def test_rules_for_empty_masks(rule, both, truth_only, prediction_only):
    """Of an empty truth with and without two pixels predicted, and of two pixels missed."""
    for pair, wanted in (
        ((EMPTY, EMPTY), both),
        ((PARTIAL, EMPTY), truth_only),
        ((EMPTY, PARTIAL), prediction_only),
    ):
        found = metrics.ratios(confusion(*pair), rule=rule)
        assert (found.dice, found.iou) == pytest.approx(wanted, nan_ok=True, abs=1e-12)
    assert set(metrics.EMPTY_RULES) == {"match", "skip", "zero", "parents"}


@pytest.mark.parametrize("rule", metrics.EMPTY_RULES)
def test_rules_hardly_touch_what_is_not_empty(rule):
    counts = Confusion(tp=300, fp=100, fn=200, tn=400)
    found = metrics.ratios(counts, rule=rule)
    assert found == pytest.approx((0.6667, 0.5, 0.75, 0.6, 0.8, -0.2), abs=1e-4)


def test_volume_difference_by_hand():
    assert metrics.volume_difference(Confusion(tp=3, fp=3, fn=1, tn=0)) == 0.5
    assert metrics.volume_difference(Confusion(tp=0, fp=0, fn=4, tn=0)) == -1
    assert math.isnan(metrics.volume_difference(Confusion(tp=0, fp=5, fn=0, tn=0)))


COUNTS = st.builds(Confusion, *[st.integers(0, 10**6)] * 4)


@given(COUNTS)
def test_dice_is_twice_iou_over_one_plus_iou(counts):
    iou = metrics.iou(counts)
    assert metrics.dice(counts) == pytest.approx(2 * iou / (1 + iou), abs=1e-12)


@given(COUNTS)
def test_dice_is_symmetric_bounded_and_the_harmonic_mean(counts):
    swapped = Confusion(counts.tp, counts.fn, counts.fp, counts.tn)
    dice = metrics.dice(counts)
    assert 0 <= metrics.iou(counts) <= dice <= 1
    assert dice == metrics.dice(swapped)
    assert metrics.sensitivity(counts) == pytest.approx(metrics.precision(swapped), nan_ok=True)

    if counts.tp:
        harmonic = 2 / (1 / metrics.sensitivity(counts) + 1 / metrics.precision(counts))
        assert dice == pytest.approx(harmonic)


def test_what_is_undefined_is_left_open_in_tables():
    known = metrics.known_ratios(confusion(PARTIAL, EMPTY))
    assert [known[key] for key in ("dice", "precision", "sensitivity")] == [0.0, 0.0, None]
    assert set(metrics.known_ratios(confusion(EMPTY, EMPTY), rule="skip").values()) == {None}


def test_pixels_are_counted_beyond_what_float32_can_tell_apart():
    truth = np.ones((4097, 4097), dtype=bool)
    truth[0, 0] = False
    counts = confusion(np.ones_like(truth), truth)
    assert counts == Confusion(tp=4097**2 - 1, fp=1, fn=0, tn=0)
    assert metrics.volume_difference(counts) == 1 / (4097**2 - 1)


def test_binarise_takes_half_as_foreground():
    assert metrics.binarise([0.0, 0.499, 0.5, 1.0]).tolist() == [False, False, True, True]
    assert metrics.binarise([127 / 255, 128 / 255]).tolist() == [False, True]
    assert metrics.binarise([0.2, 0.4], 0.3).tolist() == [False, True]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        confusion(np.zeros((2, 2)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="prediction is"):
        metrics.parent_scores(np.zeros((2, 2)), np.zeros((2, 3)))


def _read(path):
    return np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255


def test_parent_scores_are_the_golden_numbers():
    expected = json.loads((GOLDEN / "expected.json").read_text())
    for case, scores in expected["per_image"].items():
        prediction = _read(GOLDEN / "pred" / f"{case}_output_ens.png")
        truth = _read(GOLDEN / "gt" / f"ISIC_{case}_Segmentation.png")
        assert metrics.parent_scores(prediction, truth) == pytest.approx(scores, abs=1e-6)


def test_parent_scores_by_hand():
    # Divided by its maximum 0.5 the prediction is 1, 0.4, 0.8, 0: at .1 and .3 it has three
    # pixels of which two are true, at .5 and .7 two of which one is true, at .9 one, true.
    prediction, truth = [[0.5, 0.2], [0.4, 0.0]], [[1, 1], [0, 0]]
    iou, dice = metrics.parent_scores(prediction, truth)
    assert iou == pytest.approx((2 * 2 / 3 + 2 * 1 / 3 + 1 / 2) / 5, abs=1e-5)
    assert dice == pytest.approx((2 * 4 / 5 + 2 * 2 / 4 + 2 / 3) / 5, abs=1e-4)


def test_parent_scores_cut_the_truth_above_each_threshold():
    # 0.5 is not above 0.5: of five thresholds two find the truth, three an empty one.
    iou, dice = metrics.parent_scores([[1.0]], [[0.5]])
    assert (iou, dice) == pytest.approx((2 / 5, 2 / 5), abs=1e-4)


def test_parents_score_at_256_pixels():
    assert metrics.PARENT_SIZE == 256


def test_parent_scores_of_empty_masks():
    assert metrics.parent_scores(EMPTY, EMPTY) == (1.0, 1.0)
    iou, dice = metrics.parent_scores(EMPTY, FULL)
    assert iou == pytest.approx(1e-6 / 4, rel=1e-3)
    assert dice == pytest.approx(1e-4 / 4, rel=1e-3)


def test_parent_scores_ignore_the_scale_of_the_prediction():
    prediction, truth = np.random.default_rng(0).random((8, 8)), np.eye(8)
    assert metrics.parent_scores(prediction, truth) == metrics.parent_scores(prediction / 4, truth)
