"""Guidance by value: on Gaussian classes it moves every mean by the closed form."""

import math

import pytest
import torch
from torch.testing import assert_close

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC, ddim, ddpm
from guided_diffusion.schedule import CLEAN, NoiseSchedule
from guided_diffusion.weak.guidance import class_gradient, guide, noise_aware

SCHEDULE = NoiseSchedule.named("linear", 200)
MEANS = torch.tensor([[-0.5, 0.25], [0.75, 0.5]], dtype=torch.float64)  # of two classes
SPREAD = 0.4  # their common standard deviation


def posterior_mean(mean, x, level):
    """E[x0 | x_t] where x0 ~ N(mean, SPREAD^2)."""
    gain = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return mean + gain * (x - level.alpha * mean)


def logits(x, level):
    """log p(x_t | class) up to a constant, float64 [B, 2]: its softmax is p(class | x_t)."""
    apart = x[:, None] - level.alpha * MEANS.view(1, 2, *x.shape[1:])
    return -apart.square().flatten(2).sum(2) / (2 * (level.alpha**2 * SPREAD**2 + level.sigma**2))


def mixture(x, level):
    """E[x0 | x_t] of both classes together, each as likely."""
    share = logits(x, level).softmax(1)
    means = [posterior_mean(mean.view(x.shape[1:]), x, level) for mean in MEANS]
    return Prediction(sum(share[:, k, None, None, None] * means[k] for k in (0, 1)))


def noise(rows=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, 1, 1, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("t", [0, 20, 120, 199])
@pytest.mark.parametrize("k", [0, 1])
def test_guidance_separates_two_gaussian_classes(t, k):
    """Bayes: the score of a class is that of the mixture plus the classifier's gradient."""
    level, y = SCHEDULE.at(t), torch.full((5,), k)
    guided = guide(mixture, logits, y)(noise(), level).x0
    assert_close(guided, posterior_mean(MEANS[k].view(2, 1, 1), noise(), level))


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_guidance_shifts_the_mean_by_the_closed_form(scale):
    """For p(y | x_t) = sigmoid(w . x_t) the gradient is (1 - p) w, and so are all the shifts."""
    w = torch.tensor([0.3, -0.7], dtype=torch.float64).view(2, 1, 1)

    def classify(x, level):
        score = (w * x).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)

    def denoise(x, level):
        return Prediction(posterior_mean(MEANS[0].view(2, 1, 1), x, level))

    now, nxt = SCHEDULE.at(150), SCHEDULE.at(120)
    x, y = noise(), torch.ones(5, dtype=torch.int64)
    gradient = (1 - torch.sigmoid((w * x).flatten(1).sum(1)))[:, None, None, None] * w
    assert_close(class_gradient(classify, x, now, y), gradient)

    guided = guide(denoise, classify, y, scale=scale)
    shift = scale * now.sigma**2 / now.alpha * gradient
    assert_close(guided(x, now).x0 - denoise(x, now).x0, shift)
    # DDIM: eps falls by sigma * scale * gradient, and x0 and eps make the next x
    moved = ddim(guided, x, [now, nxt]) - ddim(denoise, x, [now, nxt])
    ratio = nxt.alpha / now.alpha * now.sigma - nxt.sigma
    assert_close(moved, ratio * now.sigma * scale * gradient)
    # DDPM: the mean moves by beta / sqrt(1 - beta) * scale * gradient
    still = {"randn_like": torch.zeros_like}
    moved = ddpm(guided, x, [now, nxt], **still) - ddpm(denoise, x, [now, nxt], **still)
    root = now.alpha / nxt.alpha
    assert_close(moved, (1 - root**2) / root * scale * gradient)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_can_be_guided(name):
    """Guided by the exact classifier, all end on the Gaussian of its class, not on the mixture."""
    levels = SCHEDULE.levels(range(199, -1, -1))
    x = noise(4000)
    torch.manual_seed(3)
    y = torch.ones(4000, dtype=torch.int64)
    drawn = SAMPLERS[name](guide(mixture, logits, y), x, levels).flatten(1)
    tolerance = 5 * SPREAD / math.sqrt(len(drawn)) + 0.02
    assert (drawn.mean(0) - MEANS[1]).abs().max() < tolerance
    assert name in STOCHASTIC or (drawn.std(0) - SPREAD).abs().max() < 0.03


def heard_by(diffusion, x, level, **options):
    """What a classifier of a diffusion is given: images and times."""
    heard = []
    noise_aware(lambda *given: heard.append(given), diffusion, **options)(x, level)
    return heard[0]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_classifier_of_the_same_schedule_gets_the_index_itself(name, rescale):
    schedule = NoiseSchedule.named(name, 200)
    diffusion = GaussianDiffusion(schedule=schedule, rescale_timesteps=rescale)
    x = noise().float()
    for t in [*range(0, 200, 7), 199, 30.25]:
        images, told = heard_by(diffusion, x, schedule.at(t))
        assert images is x
        assert torch.equal(told, torch.full((5,), t * 5.0 if rescale else float(t)))


def test_a_classifier_of_another_schedule_is_told_the_time_of_the_same_noise():
    """The published recipe: a diffusion of 4000 steps, a classifier of 1000."""
    long, short = (NoiseSchedule.named("linear", steps) for steps in (4000, 1000))
    level = long.at(int((long.alpha_bar - 0.896).abs().argmin()))
    assert level.alpha**2 == pytest.approx(0.896, abs=1e-4)
    assert short.at(level.t).alpha ** 2 < 0.2, "what the index itself would say"
    told = heard_by(GaussianDiffusion(schedule=short), noise().float(), level)[1]
    assert told.unique().numel() == 1
    assert short.at(float(told[0])).alpha ** 2 == pytest.approx(level.alpha**2, rel=1e-6)
    below, above = short.alpha_bar[int(told[0])], short.alpha_bar[int(told[0]) + 1]
    assert below > level.alpha**2 > above, "a time between two trained ones"


def test_a_classifier_is_told_no_time_that_it_was_not_trained_on():
    long, short = (NoiseSchedule.named("linear", steps) for steps in (4000, 1000))
    diffusion = GaussianDiffusion(schedule=short, timesteps=tuple(range(10, 900)))
    x = noise().float()
    for level, t in ((long.at(0), 10), (CLEAN, 10), (long.at(3999), 899), (short.at(950), 899)):
        assert torch.equal(heard_by(diffusion, x, level)[1], torch.full((5,), float(t)))
    whole = GaussianDiffusion(schedule=short)
    assert torch.equal(heard_by(whole, x, long.at(0))[1], torch.zeros(5))


def test_noisy_images_are_brought_to_the_range_of_the_classifier():
    """x = alpha x0 + sigma eps in both ranges, for one image and one draw of the noise."""
    image = torch.rand(5, 2, 1, 1, dtype=torch.float64)
    level, own = SCHEDULE.at(120), GaussianDiffusion(SCHEDULE, mask_range=(0.0, 1.0))
    x = level.alpha * (2 * image - 1) + level.sigma * noise()
    seen, told = heard_by(own, x, level, mask_range=(-1.0, 1.0))
    as_own = SCHEDULE.at(float(told[0].double()))
    assert_close(seen, as_own.alpha * image + as_own.sigma * noise(), atol=1e-5, rtol=1e-5)
    assert float(told[0]) != 120

    score = noise_aware(lambda x, t: x.flatten(1), own, mask_range=(-1.0, 1.0))
    plain = noise_aware(lambda x, t: x.flatten(1), own)
    y = torch.ones(5, dtype=torch.int64)
    moved = class_gradient(plain, seen, as_own, y) * (as_own.sigma / level.sigma)
    assert_close(class_gradient(score, x, level, y), moved, atol=1e-5, rtol=1e-4)


def test_no_gradient_outlives_the_guidance():
    level, y = SCHEDULE.at(100), torch.zeros(5, dtype=torch.int64)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x0 = guide(mixture, lambda x, level: weight * logits(x, level), y)(noise(), level).x0
    assert not x0.requires_grad and weight.grad is None
