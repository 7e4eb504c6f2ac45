"""Classifier guidance as a wrapper of the denoiser, for any sampler, and the classifier's losses.

Here also is what such a classifier is trained on. Dhariwal & Nichol (2021), section 4: the score
of ``p(x_t) p(y | x_t)^scale`` is the diffusion's plus ``scale`` times the classifier's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isclose, log

import torch
from torch import Tensor
from torch.nn import functional

from guided_diffusion.gaussian_diffusion import Denoiser, GaussianDiffusion, Prediction
from guided_diffusion.schedule import NoiseLevel

Classify = Callable[[Tensor, NoiseLevel], Tensor]
"""``classify(x, level)`` gives the logits [B, K] of noisy images [B, C, H, W]."""


def noise_aware(
    net: Callable[[Tensor, Tensor], Tensor],
    diffusion: GaussianDiffusion,
    *,
    mask_range: tuple[float, float] | None = None,
) -> Classify:
    """Turn a classifier of images and timesteps into one of images and noise levels.

    Of a noisy image, only its signal-to-noise ratio says how noisy it is: the classifier is told
    the time at which its own schedule has that ratio, a real number between its first and last
    trained timestep. A level of its own schedule has the level's own time.

    Args:
        net: called as ``net(x, t)``.
        diffusion: whose noise it was trained on.
        mask_range: the range of the clean image in what is classified; None for the classifier's
            own. Noisy images of another range are brought to the classifier's first, which changes
            their signal-to-noise ratio.
    """
    low, high = diffusion.mask_range
    own_low, own_high = mask_range or diffusion.mask_range
    ratio = (high - low) / (own_high - own_low)
    offset = low - ratio * own_low  # a clean image x0 is ratio * x0 + offset to the classifier

    def classify(x: Tensor, level: NoiseLevel) -> Tensor:
        own = level if ratio == 1 else diffusion.schedule.at_log_snr(level.log_snr - log(ratio))
        if ratio != 1 or offset:
            x = own.alpha * ratio / level.alpha * x + own.alpha * offset
        t = diffusion.scale_timestep(told_time(diffusion, own))
        return net(x, torch.full((len(x),), t, device=x.device))

    return classify


def told_time(diffusion: GaussianDiffusion, level: NoiseLevel) -> float:
    """The time of a diffusion whose log-SNR is that of a level, within the trained timesteps."""
    schedule, last = diffusion.schedule, len(diffusion.schedule) - 1
    t = min(max(level.t, 0.0), last)
    if not isclose(schedule.at(t).log_snr, level.log_snr, abs_tol=1e-9):
        t = schedule.at_log_snr(level.log_snr).t
    return min(max(t, float(diffusion.kept[0])), float(diffusion.last))


def class_gradient(classify: Classify, x: Tensor, level: NoiseLevel, y: Tensor) -> Tensor:
    """Gradient of log p(y | x_t) with respect to x_t.

    Args:
        classify: the classifier of noisy images.
        x: noisy images [B, C, H, W].
        level: their noise.
        y: class labels int64 [B].

    Returns:
        [B, C, H, W], dtype of ``x``.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        chosen = classify(leaf, level).log_softmax(dim=1).gather(1, y[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
    return gradient.to(x.dtype)


def guide(denoise: Denoiser, classify: Classify, y: Tensor, *, scale: float = 1.0) -> Denoiser:
    """Lead a denoiser towards classes: Dhariwal & Nichol (2021), algorithm 2.

    eps - sigma * scale * gradient, read as a clean image, is x0 + scale * sigma**2 / alpha *
    gradient. As in theirs, what the guidance adds is not clipped. The learned variance is kept.

    Args:
        denoise: the diffusion's, conditional or not.
        classify: the classifier of noisy images.
        y: class labels int64 [B].
        scale: exponent of the classifier's probability.
    """

    def guided(x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = denoise(x, level)
        strength = scale * level.sigma**2 / level.alpha
        x0 = prediction.x0 + strength * class_gradient(classify, x, level, y)
        return prediction._replace(x0=x0)

    return guided


def classification_losses(
    diffusion: GaussianDiffusion, *, noised: bool = True
) -> Callable[..., dict[str, Tensor]]:
    """Score classifiers as :meth:`GaussianDiffusion.training_losses` scores denoisers.

    The function returned gives the cross-entropy as ``loss`` and whether the likeliest class is the
    right one as ``acc@1``, both [B], of images noised to their times, or, unless ``noised``, of
    clean ones at time 0.
    """

    def losses(
        net: Callable[[Tensor, Tensor], Tensor],
        x0: Tensor,
        t: Tensor,
        *,
        eps: Tensor,
        condition: object = None,
        y: Tensor,
        withheld: Tensor | None = None,
    ) -> dict[str, Tensor]:
        x_t = diffusion.schedule.add_noise(x0, t, eps) if noised else x0
        timesteps = (t if noised else 0 * t).to(x0.device, non_blocking=True)
        timesteps = timesteps * diffusion.scale_timestep(1.0)
        logits = net(x_t, timesteps).float()
        return {
            "loss": functional.cross_entropy(logits, y, reduction="none"),
            "acc@1": (logits.argmax(dim=1) == y).float(),
        }

    return losses
