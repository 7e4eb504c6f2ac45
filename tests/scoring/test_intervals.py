"""Means, intervals and paired tests by value: closed forms, SciPy's own bootstrap, coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from guided_diffusion.scoring.intervals import compare, describe, mean_interval

SCORES = 1 - np.random.default_rng(3).beta(1, 8, size=60)


def test_description_by_hand():
    found = describe([1.0, 2.0, 4.0, float("nan"), 5.0])
    assert (found.number, found.mean, found.median) == (4, 3, 3)
    assert found.sd == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3))
    assert found.low < 3 < found.high


def test_no_score_one_score_and_equal_scores():
    assert describe([]).number == 0 and math.isnan(describe([float("nan")]).mean)
    one = describe([0.5])
    assert (one.number, one.mean, one.median) == (1, 0.5, 0.5)
    assert math.isnan(one.sd) and math.isnan(one.low)
    alike = describe([0.7, 0.7, 0.7])
    assert (alike.low, alike.high) == (pytest.approx(0.7), pytest.approx(0.7))


def test_the_interval_is_scipy_s():
    low, high = mean_interval(SCORES, resamples=20000)
    theirs = stats.bootstrap((SCORES,), np.mean, n_resamples=20000, rng=1).confidence_interval
    assert low == pytest.approx(theirs.low, abs=1e-3)
    assert high == pytest.approx(theirs.high, abs=1e-3)
    assert mean_interval(SCORES) == mean_interval(SCORES)


def test_normal_scores_have_the_textbook_s_interval():
    values = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    low, high = mean_interval(values, resamples=20000)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(-half, rel=0.05), pytest.approx(half, rel=0.05))


def test_groups_are_drawn_whole():
    """Ten equal slices per patient give the interval of one slice per patient."""
    patients = np.arange(12)
    single = mean_interval(SCORES[:12], patients.tolist())
    repeated = mean_interval(np.repeat(SCORES[:12], 10), np.repeat(patients, 10).tolist())
    apart = mean_interval(np.repeat(SCORES[:12], 10))
    assert repeated == pytest.approx(single)
    assert repeated.high - repeated.low > 2 * (apart.high - apart.low)
    assert math.isnan(mean_interval(SCORES[:3], ["one"] * 3).low)


def test_the_interval_covers_the_truth():
    """95 % within three standard errors of 400 trials, on skewed scores of 120 cases."""
    generator = np.random.default_rng(5)
    trials = [mean_interval(1 - generator.beta(1, 8, size=120), resamples=400) for _ in range(400)]
    covered = np.mean([low <= 1 - 1 / 9 <= high for low, high in trials])
    assert covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 400))


def test_paired_differences_by_hand():
    first = [0.5, 0.6, 0.7, 0.8, 0.9, float("nan")]
    second = [0.6, 0.8, 0.7, 1.2, 0.4, 0.5]
    found = compare(first, second)
    assert (found.units, found.higher, found.lower) == (5, 3, 1)
    assert found.difference == pytest.approx((0.1 + 0.2 + 0 + 0.4 - 0.5) / 5)
    # Ranks of .1, .2, .4, -.5 are 1 to 4: W- = 4, and 6 of the 16 signings give W <= 4 either way
    # of which P(W <= 4) = 7 / 16, two-sided 14 / 16.
    assert found.p_value == pytest.approx(14 / 16)
    back = compare(second, first)
    assert back.difference == pytest.approx(-found.difference)
    assert back.p_value == pytest.approx(found.p_value)


def test_a_clear_winner_and_no_difference_at_all():
    better = compare(SCORES - 0.05 - 0.001 * np.arange(60), SCORES)
    assert better.p_value == pytest.approx(stats.wilcoxon(0.05 + 0.001 * np.arange(60)).pvalue)
    assert better.low > 0 and better.higher == 60
    same = compare(SCORES, SCORES)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    assert compare([], []).units == 0


def test_groups_are_the_units_of_the_test():
    first, second = np.zeros(6), np.array([1.0, 3.0, 2.0, 2.0, -1.0, -1.0])
    found = compare(first, second, list("aabbcc"))
    assert (found.units, found.higher, found.lower) == (3, 2, 1)
    assert found.p_value == compare([0, 0, 0], [2.0, 2.0, -1.0]).p_value
