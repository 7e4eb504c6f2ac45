"""Calibration, uncertainty and raters by value: tables small enough to count by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.ensemble import disagreement
from guided_diffusion.scoring.calibration import (
    Tally,
    auroc,
    average_precision,
    best_dice,
    brier_score,
    calibration_error,
    dice_table,
    energy_distance,
    expected_disagreement,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    sparsification,
    spread_skill,
)

NAN = float("nan")


def test_levels_are_those_of_the_files():
    tally = Tally.of([0, 0.5, 0.5, 1], [False, True, False, True])
    assert tally.counts[[0, 128, 255]].tolist() == [[1, 0], [2, 1], [1, 1]]
    assert tally.counts.sum(axis=0).tolist() == [4, 2]
    assert Tally.of([0.25, 0.5], [True, True], most=0.5).counts[[128, 255], 1].tolist() == [1, 1]
    both = tally.plus(tally)
    assert both.counts.sum(axis=0).tolist() == [8, 4]
    assert tally.plus(Tally.empty()).counts.tolist() == tally.counts.tolist()


def test_a_reliability_curve_by_hand():
    """Ten pixels of 0.2 with one hit, ten of 0.8 with nine: both bins are off by 0.1."""
    values = [51 / 255] * 10 + [204 / 255] * 10
    hits = [1] + [0] * 9 + [0] + [1] * 9
    tally = Tally.of(values, hits)
    curve = reliability(tally, bins=2)
    assert [bin.pixels for bin in curve] == [10, 10]
    assert [bin.probability for bin in curve] == pytest.approx([0.2, 0.8])
    assert [bin.frequency for bin in curve] == pytest.approx([0.1, 0.9])
    assert calibration_error(tally, bins=2) == pytest.approx(0.1)
    assert calibration_error(tally, bins=1) == pytest.approx(0)
    assert math.isnan(calibration_error(Tally.empty())) and not reliability(Tally.empty())


def test_a_calibrated_probability_has_no_error_and_an_inverted_one_a_large_one():
    p = np.repeat(np.arange(256) / 255, 255)
    hits = np.concatenate([np.arange(255) < level for level in range(256)])
    assert calibration_error(Tally.of(p, hits)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(Tally.of(p, ~hits), bins=255) == pytest.approx(0.5, abs=0.01)
    assert sum(bin.pixels for bin in reliability(Tally.of(p, hits))) == p.size


def test_likelihood_and_brier_score_by_hand():
    """Levels 51 and 204 are 0.2 and 0.8; 0 and 255 are half a level away from certainty."""
    tally = Tally.of([0.2, 0.2, 0.8, 0.8], [True, False, True, True])
    expected = -(math.log(0.2) + 3 * math.log(0.8)) / 4
    assert negative_log_likelihood(tally) == pytest.approx(expected)
    assert brier_score(tally) == pytest.approx((0.64 + 3 * 0.04) / 4)

    right, wrong = Tally.of([0.0, 1.0], [False, True]), Tally.of([0.0, 1.0], [True, False])
    assert negative_log_likelihood(right) == pytest.approx(-math.log(1 - 1 / 510))
    assert negative_log_likelihood(wrong) == pytest.approx(math.log(510))
    assert (brier_score(right), brier_score(wrong)) == (0, 1)
    assert math.isnan(negative_log_likelihood(Tally.empty()))
    assert math.isnan(brier_score(Tally.empty()))


def test_sparsification_by_hand():
    """Uncertainty finds the errors: what is left falls as fast as it can, and the area is 0."""
    uncertainty = np.array([0.5] * 20 + [0.0] * 80)
    perfect = sparsification(Tally.of(uncertainty, uncertainty > 0, most=0.5))
    assert perfect.error[0] == pytest.approx(0.2) and perfect.error[10] == pytest.approx(0.1 / 0.9)
    assert perfect.error[20:] == pytest.approx([0] * 80) and perfect.area == pytest.approx(0)

    blind = sparsification(Tally.of(np.zeros(100), uncertainty > 0, most=0.5))
    assert blind.error == pytest.approx([0.2] * 100)
    assert blind.area == pytest.approx(1 - np.mean(blind.oracle) / 0.2)
    wrong = sparsification(Tally.of(0.5 - uncertainty, uncertainty > 0, most=0.5))
    assert wrong.area > blind.area
    assert math.isnan(sparsification(Tally.of(uncertainty, uncertainty > 1, most=0.5)).area)


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 3 / 4),
        ([1, 1, 1], [0, 1, 0], 1 / 2),
        ([1, 2], [1, 1], NAN),
        ([], [], NAN),
    ],
)
def test_auroc_by_hand(scores, positive, expected):
    assert auroc(scores, positive) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1),
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([4, 3, 2, 1], [0, 0, 0, 1], 1 / 4),
        ([1, 1, 1, 1], [0, 1, 0, 1], 1 / 2),
        ([3, 1, 1], [1, 1, 0], (1 + 2 / 3) / 2),
        ([1, 2], [0, 0], NAN),
    ],
)
def test_average_precision_by_hand(scores, positive, expected):
    assert average_precision(scores, positive) == pytest.approx(expected, nan_ok=True)
    grid = average_precision(np.reshape(scores, (1, -1)), np.reshape(positive, (1, -1)))
    assert grid == pytest.approx(expected, nan_ok=True)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 200, 3000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / (4 * 15))
    assert math.isnan(rank_correlation([1, 1], [1, 2]))
    assert math.isnan(rank_correlation([], []))


def test_expected_disagreement_by_hand():
    assert expected_disagreement([0.0, 1.0, 1.0]) == 0
    assert expected_disagreement([0.5] * 4) == pytest.approx(0.5)
    assert expected_disagreement([0.2, 0.8]) == pytest.approx(0.32)
    assert expected_disagreement([0.0]) == 0


FULL, LEFT, TOP, NONE = np.array(
    [[[1, 1], [1, 1]], [[1, 0], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]], dtype=bool
)


def test_dice_table_by_hand():
    table = dice_table(np.stack([FULL, LEFT, NONE]), np.stack([LEFT, TOP, NONE]))
    expected = [[2 / 3, 2 / 3, 0], [1, 1 / 2, 0], [0, 0, 1]]
    assert table == pytest.approx(np.array(expected))


def test_counts_beyond_what_float32_can_tell_apart():
    one = np.ones((1, 4097, 4097), dtype=bool)
    other = one.copy()
    other[0, 0, 0] = False
    pixels = one.size
    assert dice_table(one, other) == 2 * (pixels - 1) / (2 * pixels - 1)
    soft = torch.from_numpy(np.concatenate([one, other])).float()
    assert disagreement(soft) == pytest.approx(1 / (2 * pixels - 1), rel=1e-6)
    tally = Tally.of(one[0], other[0])
    assert tally.counts.sum(axis=0).tolist() == [pixels, pixels - 1]
    assert expected_disagreement(one[0] / 2) == 0.5


def test_energy_distance_by_hand():
    """One member, one rater: twice 1 - IoU. Two against one: 2 (d1 + d2) / 2 - d12 / 2."""
    assert energy_distance(FULL[None], LEFT[None]) == pytest.approx(2 * (1 - 1 / 2))
    assert energy_distance(NONE[None], NONE[None]) == 0
    two = energy_distance(np.stack([LEFT, TOP]), FULL[None])
    assert two == pytest.approx(2 * 1 / 2 - (1 - 1 / 3) / 2)
    assert energy_distance(np.stack([LEFT, TOP]), np.stack([TOP, LEFT])) == pytest.approx(0)


def test_the_best_member_by_hand():
    members = np.stack([FULL, LEFT])
    assert best_dice(members, np.stack([LEFT, TOP])) == pytest.approx((1 + 2 / 3) / 2)
    assert best_dice(members, NONE[None]) == 0


def spread_and_error(members, truth):
    """Mean 1 - Dice of two members with each other, and of both with the truth."""
    between = 1 - dice_table(members[:1], members[1:])[0, 0]
    return between, float(1 - dice_table(members, truth[None]).mean())


def test_spread_and_skill_by_hand():
    """LEFT and TOP share one pixel of two each, and have a Dice of 2/3 with FULL."""
    first = spread_and_error(np.stack([LEFT, TOP]), FULL)
    assert first == pytest.approx((1 / 2, 1 / 3))
    assert spread_skill(*([value] for value in first)) == pytest.approx(3 / 2)
    second = spread_and_error(np.stack([FULL, FULL]), LEFT)
    both = zip(first, second, strict=True)
    assert spread_skill(*both) == pytest.approx((1 / 2 + 0) / (1 / 3 + 1 / 3))
    assert math.isnan(spread_skill([0.0], [0.0])) and math.isnan(spread_skill([], []))


def test_members_drawn_as_the_truth_is_are_calibrated():
    """Every choice of two members and a truth among four masks occurs once: the ratio is 1."""
    masks = np.stack([FULL, LEFT, TOP, NONE])
    cases = [
        spread_and_error(masks[[i, j]], masks[k])
        for i in range(4)
        for j in range(4)
        for k in range(4)
    ]
    assert spread_skill(*zip(*cases, strict=True)) == pytest.approx(1)
    alike = [spread_and_error(masks[[i, i]], masks[k]) for i in range(4) for k in range(4)]
    assert spread_skill(*zip(*alike, strict=True)) == 0


def test_spread_and_skill_of_random_masks_is_near_one_and_falls_with_the_spread():
    generator = np.random.default_rng(0)
    cases, sharp = [], []
    for _ in range(300):
        p = generator.random((8, 8)) ** 2
        drawn = generator.random((3, 8, 8)) < p
        cases.append(spread_and_error(drawn[:2], drawn[2]))
        surer = generator.random((2, 8, 8)) < np.where(p > 0.5, 0.9 + 0.1 * p, 0.1 * p)
        sharp.append(spread_and_error(surer, drawn[2]))
    assert spread_skill(*zip(*cases, strict=True)) == pytest.approx(1, abs=0.03)
    assert spread_skill(*zip(*sharp, strict=True)) < 0.6


MASKS = st.lists(st.integers(0, 2**9 - 1), min_size=1, max_size=5).map(
    lambda numbers: np.array(
        [[number >> k & 1 for k in range(9)] for number in numbers], dtype=bool
    ).reshape(-1, 3, 3)
)


@given(MASKS, MASKS, st.randoms(use_true_random=False))
def test_members_and_raters_in_any_order(members, raters, random):
    distance = energy_distance(members, raters)
    assert -1e-9 <= distance <= 2
    assert energy_distance(raters, members) == pytest.approx(distance)
    shuffled = members[random.sample(range(len(members)), len(members))]
    assert energy_distance(shuffled, raters) == pytest.approx(distance)
    assert best_dice(shuffled, raters) == pytest.approx(best_dice(members, raters))
    assert dice_table(members, raters) == pytest.approx(dice_table(raters, members).T)
    assert 0 <= best_dice(members, raters) <= 1


@given(MASKS)
def test_the_table_agrees_with_the_ensemble_s_own_measure(members):
    pairs = len(members) * (len(members) - 1)
    apart = (1 - dice_table(members, members)).sum() / pairs if pairs else 0.0
    soft = torch.from_numpy(members.astype(np.float32))
    assert disagreement(soft) == pytest.approx(apart, abs=1e-6)
