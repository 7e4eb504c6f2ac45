"""Guidance by value: on Gaussian classes it moves every mean by the closed form."""

import math

import pytest
import torch
from torch.testing import assert_close

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC, ddim, ddpm
from guided_diffusion.schedule import NoiseLevel, NoiseSchedule
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


def test_classifiers_get_the_timestep_of_the_diffusion():
    diffusion = GaussianDiffusion(schedule=SCHEDULE, rescale_timesteps=True)
    heard = []

    def net(x, t):
        heard.append(t)
        return x.flatten(1)

    x = noise().float()
    assert torch.equal(noise_aware(net, diffusion)(x, NoiseLevel(30.0, 0.8, 0.6)), x.flatten(1))
    assert torch.equal(heard[0], torch.full((5,), 150.0))


def test_no_gradient_outlives_the_guidance():
    level, y = SCHEDULE.at(100), torch.zeros(5, dtype=torch.int64)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        x0 = guide(mixture, lambda x, level: weight * logits(x, level), y)(noise(), level).x0
    assert not x0.requires_grad and weight.grad is None
