"""Maps by value: on classes with known means every one of them has a closed form."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from guided_diffusion.gaussian_diffusion import Prediction
from guided_diffusion.sampling import ddim
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.weak import maps
from guided_diffusion.weak.guidance import guide

SCHEDULE = NoiseSchedule.named("linear", 1000)
NORMAL = torch.zeros(1, 3, 3, dtype=torch.float64)
LESION = torch.tensor([[[0.0, 0, 0], [0, 0.8, 0.3], [0, -0.4, 0]]], dtype=torch.float64)


def denoiser(mean, spread=0.0):
    """The exact denoiser of images N(mean, spread^2)."""

    def denoise(x, level):
        gain = level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.sigma**2)
        return Prediction(mean + gain * (x - level.alpha * mean))

    return denoise


def drawn(seed):
    return torch.randn(
        2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def walk(first, steps, stride=1):
    return SCHEDULE.levels(range(first, first - steps * stride - 1, -stride), end=None)


# ------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize(("steps", "stride"), [(1, 1), (10, 1), (7, 30)])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.95])
def test_of_two_images_the_class_derivative_is_their_difference_times_a_known_sum(
    steps, stride, tau
):
    """A class of one image: x_n = alpha_n mean + sigma_n / sigma_Q (x_Q - alpha_Q mean)."""
    levels = walk(400, steps, stride)
    first = levels[0]
    lesion, other = denoiser(LESION), denoiser(tau * LESION + (1 - tau) * NORMAL)
    found = maps.class_difference(lesion, other, drawn(0), levels, tau=tau)
    share = sum(level.alpha - level.sigma * first.alpha / first.sigma for level in levels[1:])
    assert_close(found, (share * (LESION - NORMAL)).expand_as(found))


def test_of_two_gaussians_the_class_derivative_approaches_that_of_the_flow():
    """Classes with spread s: x_n = alpha_n mean + (v_n / v_Q)^(1/2) (x_Q - alpha_Q mean).

    The probability flow, v = alpha^2 s^2 + sigma^2; smaller steps come closer to it.
    """
    spread, first, end = 0.5, 800, 400
    errors = []
    for steps in (20, 40, 80):
        levels = walk(first, steps, (first - end) // steps)
        v = [level.alpha**2 * spread**2 + level.sigma**2 for level in levels]
        share = sum(
            level.alpha - (now / v[0]) ** 0.5 * levels[0].alpha
            for level, now in zip(levels[1:], v[1:], strict=True)
        )
        found = maps.class_difference(
            denoiser(LESION, spread), denoiser(NORMAL, spread), drawn(1), levels
        )
        errors.append(float((found / share - LESION).abs().max()))
    assert errors[0] > 1.8 * errors[1] > 1.8**2 * errors[2]
    assert errors[2] < 0.01


def test_guided_branches_part_further_by_what_the_classifier_adds():
    """With a linear score w . x the two gradients differ by w, whatever the image."""
    w = torch.zeros(1, 3, 3, dtype=torch.float64)
    w[0, 1, 1] = 2.0

    def classify(x, level):
        score = (w * x).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)

    levels, x, scale = walk(400, 1), drawn(2), 3.0
    ones = torch.ones(2, dtype=torch.int64)
    lesion, other = denoiser(LESION), denoiser(NORMAL)
    plain = maps.class_difference(lesion, other, x, levels)
    guided = maps.class_difference(
        guide(lesion, classify, ones, scale=scale),
        guide(other, classify, 0 * ones, scale=scale),
        x,
        levels,
    )
    now, nxt = levels
    ratio = nxt.alpha / now.alpha * now.sigma - nxt.sigma
    assert_close(guided - plain, (ratio * now.sigma * scale * w).expand_as(x))


def test_one_branch_and_counterfactual_are_what_the_normal_class_lacks():
    """A class of one image turns everything into it; the noise is the same and cancels."""
    x0, eps, levels = LESION.expand(2, 1, 3, 3), drawn(3), walk(400, 10)
    found = maps.one_branch_difference(denoiser(NORMAL), x0, eps, levels)
    share = levels[-1].alpha - levels[-1].sigma / levels[0].sigma * levels[0].alpha
    assert_close(found, share * (x0 - NORMAL))

    to_clean = [*walk(400, 4, 100), *SCHEDULE.levels([])]
    found = maps.counterfactual_difference(denoiser(NORMAL), x0, eps, to_clean)
    assert_close(found, x0 - NORMAL)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_an_image_encoded_and_decoded_as_the_same_class_returns(spread):
    """DDIM up and down of an exact Gaussian: the error falls with the step, to first order."""
    image, errors = LESION + 0.2, []
    for steps in (50, 100, 200):
        levels = walk(400, steps, 400 // steps)
        same = denoiser(LESION, spread)
        errors.append(float(maps.encoded_difference(same, same, image[None], levels).abs().max()))
    assert errors[0] > 1.8 * errors[1] > 1.8**2 * errors[2]
    assert errors[2] < 0.02


def test_an_image_decoded_as_another_gaussian_moves_by_the_difference_of_the_means():
    """Up: z = m_Q + (v_Q / v_0)^(1/2) (x - m_0); down the same backwards, of the other class."""
    spread, levels = 0.5, walk(400, 400)
    up, down = denoiser(LESION, spread), denoiser(NORMAL, spread)
    found = maps.encoded_difference(up, down, (LESION + 0.2)[None], levels)
    first, last = levels[0], levels[-1]
    v = [level.alpha**2 * spread**2 + level.sigma**2 for level in (first, last)]
    share = last.alpha - first.alpha * (v[1] / v[0]) ** 0.5
    assert_close(found[0], share * (LESION - NORMAL), atol=5e-3, rtol=0)


def test_an_image_is_encoded_without_drawn_noise():
    with pytest.raises(ValueError, match="eta must be 0 upwards"):
        ddim(denoiser(LESION), drawn(0), walk(400, 4)[::-1], eta=1.0)


class Halving(torch.nn.Module):
    """The input, its halves and quarters in size; the logits read the means of all."""

    def features(self, x, t):
        half = torch.nn.functional.avg_pool2d(x, 2)
        return [x, half, torch.nn.functional.avg_pool2d(half, 2)]

    def head(self, maps):
        return torch.stack([h.flatten(1).sum(1) * h.shape[-1] for h in maps]).sum(0)[:, None]


@pytest.mark.parametrize(("shrink", "side"), [(1, 8), (2, 4), (3, 4), (4, 2), (8, 2)])
def test_grad_cam_reads_the_deepest_map_that_is_not_too_small(shrink, side):
    x = torch.rand(1, 1, 8, 8)
    read = torch.nn.functional.adaptive_avg_pool2d(x, side)
    # the gradient of the first map's mean passes through the deeper ones, too
    below = {8: 8 + 4 / 4 + 2 / 16, 4: 4 + 2 / 4, 2: 2}[side]
    expected = torch.nn.functional.interpolate(
        below * read, (8, 8), mode="bilinear", align_corners=False
    )
    y, t = torch.tensor([0]), torch.zeros(1)
    assert_close(maps.grad_cam(Halving(), x, t, y, shrink=shrink), expected)


class Toy(torch.nn.Module):
    """Two maps, the input's halves, whose means are weighed; the class decides the weights."""

    def features(self, x, t):
        return [x, torch.cat([x, 2 * x.flip(-1)], dim=1)]

    def head(self, maps):
        weight = torch.tensor([[0.0, 1.0], [3.0, -1.0]])
        return maps[-1].mean((2, 3)) @ weight.T


def test_grad_cam_weighs_maps_by_their_mean_gradient():
    x = torch.arange(8.0).view(1, 1, 2, 4)
    pixels = 8
    of_first = maps.grad_cam(Toy(), x, torch.zeros(1), torch.tensor([0]))
    assert_close(of_first, 2 * x.flip(-1) / pixels)
    of_second = maps.grad_cam(Toy(), x, torch.zeros(1), torch.tensor([1]))
    assert_close(of_second, ((3 * x - 2 * x.flip(-1)) / pixels).relu())
    either = maps.grad_cam(Toy(), x, torch.zeros(1), torch.tensor([1]), absolute=True)
    assert_close(either, ((3 * x - 2 * x.flip(-1)) / pixels).abs())
    assert (of_second == 0).any() and (either != of_second).any()


# ------------------------------------------------------------------------------- the masks


def test_a_map_has_the_range_of_its_own_image_and_sums_its_channels():
    difference = torch.tensor([[[0.0, 1, -3]], [[1.0, 1, 1]]])
    assert_close(maps.heat_of(difference), np.float32([[0.75, 1, 0]]))
    assert_close(maps.heat_of(difference, kind="absolute"), np.float32([[0, 1 / 3, 1]]))
    assert_close(maps.heat_of(difference, kind="positive"), np.float32([[0.5, 1, 0]]))
    assert not maps.heat_of(torch.full((1, 4, 4), 7.0)).any()


def test_smoothing_is_the_gaussian_filter_of_that_width():
    point = torch.zeros(1, 21, 21)
    point[0, 10, 10] = 1
    heat = maps.heat_of(point, smooth=1.5)
    distance = np.arange(-3, 4)
    assert_close(
        heat[10, 7:14], np.exp(-(distance**2) / (2 * 1.5**2)).astype(np.float32), atol=1e-3, rtol=0
    )


PICTURE = np.float32(
    [
        [0.9, 0.1, 0.0, 0.0, 0.0, 0.0],
        [0.1, 0.9, 0.0, 0.8, 0.8, 0.8],
        [0.0, 0.0, 0.1, 0.8, 0.1, 0.8],
        [0.0, 0.0, 0.0, 0.8, 0.8, 0.8],
        [0.9, 0.9, 0.1, 0.0, 0.0, 0.0],
    ]
)


def test_masks_lie_above_otsu_s_threshold_and_are_cleaned_as_asked():
    assert (maps.mask_of(PICTURE) == (PICTURE > 0.5)).all()
    ring = np.zeros_like(PICTURE, dtype=bool)
    ring[1:4, 3:] = PICTURE[1:4, 3:] > 0.5
    assert (maps.mask_of(PICTURE, largest=4) == ring).all()
    full = ring.copy()
    full[2, 4] = True
    assert (maps.mask_of(PICTURE, largest=4, fill_holes=True) == full).all()
    assert not maps.mask_of(np.zeros((4, 4), np.float32), largest=8, fill_holes=True).any()


def test_what_is_darker_is_cut_off_after_smoothing():
    """Ups and downs that cancel in the mean leave nothing of a positive map."""
    checks = torch.tensor([1.0, -1.0]).repeat(16)[None, None] * torch.ones(1, 32, 1)
    checks[0, 16, 16] = 40.0
    heat = maps.heat_of(checks, kind="positive", smooth=2.0)
    assert heat[16, 16] > 0.9 and heat[0, 12:20].max() < 0.01


def test_a_given_threshold_takes_the_place_of_otsu_s():
    assert (maps.mask_of(PICTURE, cut_at=0.85) == (PICTURE > 0.85)).all()
    assert not maps.mask_of(np.zeros((4, 4), np.float32), cut_at=0.5).any()


def test_a_second_cut_separates_what_the_first_one_left():
    """Three grey values: the first threshold splits off the darkest, the second the middle one."""
    picture = np.float32([[0, 0, 0, 0, 0, 0, 0.6, 0.6, 0.6, 1.0]])
    assert maps.mask_of(picture).sum() == 4
    assert (maps.mask_of(picture, cuts=2) == (picture == 1)).all()
    assert (maps.mask_of(picture, cuts=3) == (picture == 1)).all()  # nothing is left to split


def test_a_corner_joins_eight_neighbours_and_not_four():
    diagonal = np.eye(5, dtype=np.float32)
    diagonal[0, 3] = diagonal[0, 4] = 1
    two = np.zeros((5, 5), dtype=bool)
    two[0, 3:] = True
    assert (maps.mask_of(diagonal, largest=4) == two).all()
    assert (maps.mask_of(diagonal, largest=8) == np.eye(5, dtype=bool)).all()
