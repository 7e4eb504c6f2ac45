"""Risk and coverage by value: a few cases, handed over one by one."""

import numpy as np
import pytest

from guided_diffusion.scoring.risk_coverage import risk_coverage


def test_a_curve_by_hand():
    """The most uncertain case is the worst, the next one the best: 0.8, then 1, 0.6, 0.4."""
    curve = risk_coverage([0.1, 0.2, 0.3, 0.4], [0.8, 0.6, 1.0, 0.4])
    assert curve.handed.tolist() == [0, 0.25, 0.5, 0.75]
    assert curve.dice == pytest.approx([0.7, 0.8, 0.7, 0.8])
    assert curve.oracle == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert curve.area == pytest.approx(1 - 0.75)
    assert curve.excess == pytest.approx(0.85 - 0.75)
    assert (curve.share(0.7), curve.share(0.8), curve.share(0.81)) == (0, 0.25, None)


def test_equal_uncertainties_count_in_random_order():
    """Of three equally uncertain cases the expected Dice is their mean, whoever goes first."""
    curve = risk_coverage([0.2, 0.2, 0.1, 0.2], [0.0, 0.9, 1.0, 0.6])
    assert curve.dice == pytest.approx([2.5 / 4, 2.0 / 3, 1.5 / 2, 1.0])
    blind = risk_coverage([0.0, 0.0], [0.4, 0.8])
    assert blind.dice == pytest.approx([0.6, 0.6]) and blind.excess == pytest.approx(0.1)


def test_a_perfect_order_has_no_excess_and_the_reverse_the_most():
    dice = np.linspace(0, 1, 300)
    perfect, reverse = risk_coverage(1 - dice, dice), risk_coverage(dice, dice)
    assert perfect.excess == pytest.approx(0, abs=1e-12)
    assert perfect.share(0.75) == pytest.approx(0.5, abs=1 / 300)
    assert reverse.area > perfect.area and reverse.share(0.6) is None
    thin = perfect.thinned()
    assert len(thin["dice"]) == 101 and thin["dice"][-1] == 1 and thin["handed"][0] == 0


def test_one_case_and_none():
    assert risk_coverage([], []) is None
    single = risk_coverage([0.3], [0.9])
    assert single.dice == pytest.approx([0.9]) and single.share(0.95) is None
