"""Fusion rules and measures of uncertainty: values computed by hand, and properties."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.ensemble import (
    FUSIONS,
    UNCERTAINTIES,
    disagreement,
    entropy,
    expected_dice,
    fit_temperature,
    fusion,
    mean,
    staple,
    temper,
    uncertainty,
    variance,
    vote,
    with_mask,
)
from guided_diffusion.scoring.metrics import binarise, confusion, dice

GOLDEN = Path(__file__).parent / "golden"


def raters(*rows):
    """One row of pixels per rater -> [E, 1, P]."""
    return torch.tensor(rows, dtype=torch.float32)[:, None]


THREE = raters([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0])


def test_mean_and_vote_by_hand():
    torch.testing.assert_close(mean(THREE), torch.tensor([[1, 1 / 3, 1 / 3, 0]]))
    torch.testing.assert_close(vote(THREE), torch.tensor([[1.0, 0, 0, 0]]))


def test_vote_counts_members_not_probabilities():
    members = raters([0.9, 0.45], [0.6, 0.45], [0.0, 0.9])
    torch.testing.assert_close(vote(members), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(vote(members, threshold=0.4), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(vote(raters([1, 0], [0, 0])), torch.tensor([[1.0, 0.0]]))


def test_staple_of_two_raters_by_hand():
    # Two raters who agree on 1 and 0 and differ on the third pixel; the prior is 1/2. The first
    # E-step, with p = q for all, gives 1, 0 and 1/2, hence p = (1, 1 / 1.5) and q = (1 / 1.5, 1)
    # up to 1e-5. Then the third pixel has p1 (1 - p2) against (1 - q1) q2, 1/3 each, which is 1/2
    # again. So (1, 0, 1/2) is the fixed point, and no rater is preferred.
    fused = staple(raters([1, 0, 1], [1, 0, 0]))
    torch.testing.assert_close(fused, torch.tensor([[1, 0, 0.5]]), atol=1e-4, rtol=0)


def test_staple_toy_agrees_with_a_plain_em():
    decisions = [[1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1, 0]]
    fused = staple(raters(*decisions))
    expected = torch.tensor([plain_staple(decisions)])
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)


def plain_staple(decisions, iterations=2000):
    """The paper's equations, pixel by pixel, on lists of Python floats."""
    raters_, pixels = range(len(decisions)), range(len(decisions[0]))
    prior = sum(map(sum, decisions)) / (len(decisions) * len(decisions[0]))
    p, q = [0.99999] * len(decisions), [0.99999] * len(decisions)
    for _ in range(iterations):
        a = [
            prior * math.prod(p[j] if decisions[j][i] else 1 - p[j] for j in raters_)
            for i in pixels
        ]
        b = [
            (1 - prior) * math.prod(1 - q[j] if decisions[j][i] else q[j] for j in raters_)
            for i in pixels
        ]
        w = [x / (x + y) for x, y in zip(a, b, strict=True)]
        p = [sum(w[i] * decisions[j][i] for i in pixels) / sum(w) for j in raters_]
        rest = len(w) - sum(w)
        q = [sum((1 - w[i]) * (1 - decisions[j][i]) for i in pixels) / rest for j in raters_]
    return w


def noisy(truth, flips, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(truth.shape, generator=generator) < flips, 1 - truth, truth)


def disc(size=32, radius=0.5):
    line = torch.linspace(-1, 1, size)
    return (line[:, None] ** 2 + line**2 < radius**2).float()


def test_staple_agrees_with_itk():
    known = json.loads((GOLDEN / "staple_itk.json").read_text(encoding="utf-8"))
    members = torch.tensor([[float(bit) for bit in rater] for rater in known["raters"]])
    fused = staple(members.double().reshape(5, *known["shape"])).flatten()
    patterns = ["".join(str(int(bit)) for bit in pixel) for pixel in members.T]
    expected = torch.tensor([known["probability"][pattern] for pattern in patterns]).double()
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-5)

    inside = members.double() @ fused / fused.sum()
    outside = (1 - members.double()) @ (1 - fused) / (1 - fused).sum()
    torch.testing.assert_close(
        inside, torch.tensor(known["sensitivity"]).double(), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        outside, torch.tensor(known["specificity"]).double(), atol=1e-6, rtol=0
    )


def test_staple_recovers_raters_of_known_quality():
    generator = torch.Generator().manual_seed(4)
    truth = (torch.arange(256) < 128).double().expand(256, 256)
    chance = torch.rand(10, 256, 256, generator=generator, dtype=torch.float64)
    members = torch.where(truth > 0, chance < 0.95, chance < 0.10).double()
    fused = staple(members)
    sensitivity = (members * fused).sum((1, 2)) / fused.sum()
    specificity = ((1 - members) * (1 - fused)).sum((1, 2)) / (1 - fused).sum()
    torch.testing.assert_close(sensitivity, torch.full((10,), 0.95).double(), atol=0.006, rtol=0)
    torch.testing.assert_close(specificity, torch.full((10,), 0.90).double(), atol=0.006, rtol=0)
    assert ((fused >= 0.5) == (truth > 0)).double().mean() > 0.9995


def test_staple_beats_the_majority_where_raters_are_bad():
    truth = disc()
    bad = [noisy(truth, 0.45, seed) for seed in range(3)]
    members = torch.stack([noisy(truth, 0.01, 7), noisy(truth, 0.02, 8), *bad])
    scores = {
        name: dice(confusion(binarise(fuse(members)), truth)) for name, fuse in FUSIONS.items()
    }
    assert scores["staple"] > 0.94 > scores["vote"] + 0.1


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)))
def test_fusions_do_not_depend_on_the_order_of_members(order):
    members = torch.stack([noisy(disc(12), 0.1 + 0.05 * seed, seed) for seed in range(5)])
    for fuse in (*FUSIONS.values(), uncertainty):
        torch.testing.assert_close(fuse(members[list(order)]), fuse(members))
    assert disagreement(members[list(order)]) == pytest.approx(disagreement(members))


@pytest.mark.parametrize("fuse", FUSIONS.values(), ids=FUSIONS.keys())
@pytest.mark.parametrize("mask", [disc(), torch.zeros(8, 8), torch.ones(8, 8)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_unanimous_members_are_a_fixed_point(fuse, mask, count):
    fused = fuse(mask.expand(count, *mask.shape))
    torch.testing.assert_close(fused, mask, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fuse", [*FUSIONS.values(), uncertainty])
def test_a_batch_is_fused_case_by_case(fuse):
    members = torch.rand((4, 3, 2, 8, 9), generator=torch.Generator().manual_seed(0))
    fused = fuse(members)
    assert fused.shape == (3, 2, 8, 9)
    assert fused.dtype == torch.float32
    assert fused.min() >= 0
    assert fused.max() <= 1
    torch.testing.assert_close(fused[1, 1], fuse(members[:, 1, 1]), atol=1e-5, rtol=0)


ALL_MASKS = torch.tensor(list(product([0.0, 1.0], repeat=9))).reshape(-1, 3, 3)


def mean_dice(masks, members):
    """The mean Dice of masks [..., 3, 3] with members [E, 3, 3]; 1 for two empty masks."""
    found, drawn = masks.unsqueeze(-3) >= 0.5, members >= 0.5
    common = (found & drawn).sum((-2, -1)).double()
    both = found.sum((-2, -1)) + drawn.sum((-2, -1))
    return torch.where(both > 0, 2 * common / both.clamp(min=1), 1.0).mean(-1)


SMALL = st.lists(st.lists(st.floats(0, 1, width=16), min_size=9, max_size=9), min_size=1).map(
    lambda rows: torch.tensor(rows[:6]).reshape(-1, 3, 3)
)


@given(SMALL)
def test_expected_dice_is_the_best_of_all_thresholds(members):
    soft, fused = mean(members), expected_dice(members)
    thresholds = [*soft.flatten().tolist(), 2.0]
    best = max(float(mean_dice((soft >= t).float(), members)) for t in thresholds)
    assert float(mean_dice(fused, members)) == pytest.approx(best, abs=1e-9)
    assert best >= float(mean_dice(soft, members)) - 1e-9


@given(st.lists(st.integers(0, 2**9 - 1), min_size=1, max_size=6))
def test_expected_dice_of_masks_against_all_512(numbers):
    members = ALL_MASKS[numbers]
    score = float(mean_dice(expected_dice(members), members))
    assert score >= float(mean_dice(vote(members), members)) - 1e-9
    every, soft = mean_dice(ALL_MASKS, members), mean(members)
    within = soft.where(ALL_MASKS > 0, torch.tensor(2.0)).amin((1, 2))
    without = soft.where(ALL_MASKS == 0, torch.tensor(-1.0)).amax((1, 2))
    level_sets = within > without
    assert score == pytest.approx(float(every[level_sets].max()), abs=1e-9)
    assert score <= float(every.max()) + 1e-9


def test_expected_dice_takes_more_than_half_where_members_differ():
    """Three members of one pixel each, none in common: all three pixels have a Dice of 1/2."""
    fused = expected_dice(raters([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]))
    torch.testing.assert_close(fused, torch.tensor([[0.5, 0.5, 0.5, 0.0]]))


def test_expected_dice_of_empty_members_by_hand():
    none, some = [0, 0], [1, 0]
    torch.testing.assert_close(expected_dice(raters(none, none)), torch.zeros(1, 2))
    # Empty: Dice 1, 1, 0; the pixel: 0, 0, 1. The mean of 1/3 stays below one half.
    fused = expected_dice(raters(none, none, some))
    torch.testing.assert_close(fused, torch.tensor([[1 / 3, 0]]))
    # The first pixel has a mean of 0.6, but two of three members are empty.
    fused = expected_dice(raters([0.49, 0], [0.49, 0], [0.82, 0]))
    torch.testing.assert_close(fused, torch.tensor([[127 / 255, 0]]))


def test_expected_dice_has_a_threshold_for_each_image():
    spread = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    same = [[1, 0, 0, 0]] * 3
    members = torch.tensor([spread, same], dtype=torch.float32).transpose(0, 1)[:, :, None]
    expected = torch.tensor([[[0.5, 0.5, 0.5, 0]], [[1.0, 0, 0, 0]]])
    torch.testing.assert_close(expected_dice(members), expected)


def test_expected_dice_gives_a_pixel_to_one_of_the_classes_that_exclude_each_other():
    """Ten members: the first pixel is of class 1 in three of them, of class 2 in four.

    Both thresholds lie below these shares, and the likelier class gets the pixel.
    """
    members = torch.zeros(10, 2, 1, 7)
    for k, at, first, last in ((0, 0, 0, 3), (1, 0, 3, 7), (0, 1, 3, 6), (0, 2, 6, 9)):
        members[first:last, k, 0, at] = 1
    for k, at, first, last in ((1, 3, 7, 10), (1, 4, 0, 3), (0, 5, 9, 10)):
        members[first:last, k, 0, at] = 1
    apart = expected_dice(members)
    assert (apart[:, 0, 0] == 0.5).all(), "each class alone would take it"
    fused = expected_dice(members, exclusive=True)
    assert fused[:, 0, 0].tolist() == pytest.approx([0.3, 0.5])
    torch.testing.assert_close(fused[..., 1:], apart[..., 1:])
    torch.testing.assert_close(fusion("expected_dice", exclusive=True)(members), fused)
    torch.testing.assert_close(fusion("expected_dice")(members), apart)


def test_a_soft_mask_is_moved_as_little_as_needed():
    soft = torch.tensor([[0.0, 0.2, 0.4, 0.6, 0.9]])
    moved = with_mask(soft, torch.tensor([[False, True, False, True, False]]))
    torch.testing.assert_close(moved, torch.tensor([[0.0, 0.5, 0.4, 0.6, 127 / 255]]))


def test_temper_by_hand():
    soft = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    torch.testing.assert_close(temper(soft, 2), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(temper(temper(soft, 2), 0.5), soft)


def test_the_temperature_of_overconfident_masks_by_hand():
    """Of pixels with 0.9, odds of 9, three in four are lesion, odds of 3 = 9 ** (1 / 2)."""
    soft = torch.tensor([0.9] * 4 + [0.1] * 4 + [0.0, 1.0, 1.0])
    truth = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1])
    assert fit_temperature(soft, truth) == pytest.approx(2, abs=1e-3)
    assert fit_temperature(temper(soft, 2), truth) == pytest.approx(1, abs=1e-3)
    assert fit_temperature(soft, (soft >= 0.5).float()) == pytest.approx(0.1, rel=1e-3)
    assert fit_temperature(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])) == 1


def test_uncertainty_by_hand():
    expected = torch.tensor([[0, math.sqrt(2) / 3, math.sqrt(2) / 3, 0]])
    torch.testing.assert_close(uncertainty(THREE), expected)
    torch.testing.assert_close(uncertainty(raters([1, 0], [0, 0])), torch.tensor([[0.5, 0]]))
    assert not uncertainty(raters([0.3, 0.7])).any()


def test_variance_and_entropy_by_hand():
    members = raters([1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.5, 0.0])
    torch.testing.assert_close(variance(members), torch.tensor([[0.0, 0.25, 0.0, 0.0]]))
    torch.testing.assert_close(entropy(members), torch.tensor([[0.0, 1.0, 1.0, 0.0]]))
    quarter = entropy(raters([0.25], [0.25]))
    assert float(quarter) == pytest.approx(2 - 0.75 * math.log2(3))


@pytest.mark.parametrize("name", UNCERTAINTIES)
@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_measures_stay_in_their_range(name, rows):
    measure, members = UNCERTAINTIES[name], raters(*rows)
    values = measure.rule(members)
    assert bool((values >= 0).all()) and bool((values <= measure.most).all())
    torch.testing.assert_close(values, measure.rule(members.flip(0)))


def test_disagreement_by_hand():
    # The pairs share one pixel of 2 + 2, 2 + 1 and 2 + 1: Dice 1/2, 2/3 and 2/3.
    assert disagreement(THREE) == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert disagreement(raters([1, 0], [0, 1])) == 1.0
    assert disagreement(raters([1, 0], [0, 0])) == 1.0
    assert disagreement(raters([0, 0], [0, 0], [0, 0])) == 0.0
    assert disagreement(raters([1, 0])) == 0.0


@pytest.mark.parametrize(
    "members", [torch.zeros(4, 4), torch.zeros(0, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)]
)
@pytest.mark.parametrize("function", [*FUSIONS.values(), uncertainty, disagreement])
def test_members_of_wrong_shape_or_dtype_are_refused(function, members):
    with pytest.raises(ValueError, match="members must be float"):
        function(members)
