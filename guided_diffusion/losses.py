"""Likelihood terms of the variational bound, and losses of masks.

The terms of the bound are per element and in nats: Ho et al. (2020), sections 3.2 and 3.3. Logits
of masks have a cross-entropy and a Dice loss. The coarse mask is the condition network's own
prediction; :data:`COARSE_LOSSES` names its losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_BIN = 1 / 255


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) per element, of the broadcast shape, in nats."""
    gap = (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + gap - 1)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-probability, in nats, of the bin of width 2/255 around ``x``.

    The outermost bins (beyond -0.999 and 0.999) are open, as in Ho et al. (2020), eq. 13. The
    tensors are broadcast against each other.
    """
    scale = torch.exp(-log_std)
    upper = _normal_cdf((x + _BIN - mean) * scale)
    lower = _normal_cdf((x - _BIN - mean) * scale)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Standard normal CDF in the tanh approximation that published weights were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CoarseLoss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""``loss(coarse, mask, t)`` returns terms [B]: ``coarse``, to add to the objective, and others."""


def coarse_mse(
    coarse: Tensor, mask: Tensor, t: Tensor, *, weight: float = 10.0
) -> dict[str, Tensor]:
    """Compute MedSegDiff's loss of the coarse mask: the squared error, ``loss_cal``, times 10.

    Args:
        coarse: [B, K, H, W] in (0, 1).
        mask: [B, K, H, W] in [0, 1].
        t: timesteps int64 [B], unused here.
        weight: of the squared error in the objective.
    """
    error = ((coarse - mask) ** 2).flatten(1).mean(1)
    return {"coarse": weight * error, "loss_cal": error}


def coarse_none(coarse: Tensor, mask: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Report the squared error with weight 0 in the objective.

    It is not left out, since distributed training needs a gradient of every parameter.
    """
    return coarse_mse(coarse, mask, t, weight=0.0)


def coarse_dice_ce(
    coarse: Tensor, mask: Tensor, t: Tensor, *, alpha: int = 5, beta: float = 10.0
) -> dict[str, Tensor]:
    """Compute MedSegDiff-V2's anchor loss: Dice + beta * cross-entropy where t = 0 mod alpha.

    At other timesteps its weight is 0, and the two terms are only reported. Arguments as in
    :func:`coarse_mse`; Wu et al. (2024), the equation of the total loss.
    """
    dice, entropy = soft_dice_loss(coarse, mask), binary_cross_entropy(coarse, mask)
    counts = (t % alpha == 0).to(coarse)
    return {"coarse": counts * (dice + beta * entropy), "loss_dice": dice, "loss_ce": entropy}


def mask_probability(logits: Tensor, *, exclusive: bool = False) -> Tensor:
    """Turn logits [B, K, H, W] into probabilities of foreground, of the same shape.

    Classes that exclude each other share one softmax with the background, whose logit is 0; others
    have a sigmoid each. For K = 1 that is the same.
    """
    if exclusive:
        return _with_background(logits).softmax(dim=1)[:, 1:]
    return logits.sigmoid()


def mask_cross_entropy(logits: Tensor, mask: Tensor, *, exclusive: bool = False) -> Tensor:
    """Compute the cross-entropy in nats of the distribution that :func:`mask_probability` gives.

    Args:
        logits: [B, K, H, W].
        mask: [B, K, H, W] in [0, 1].
        exclusive: the classes exclude each other.

    Returns:
        [B]: the mean over pixels, and over the classes unless they are exclusive.
    """
    if exclusive:
        terms = _with_background(logits).logsumexp(dim=1) - (logits * mask).sum(dim=1)
    else:
        terms = F.softplus(logits) - logits * mask
    return terms.flatten(1).mean(1)


def _with_background(logits: Tensor) -> Tensor:
    return F.pad(logits, (0, 0, 0, 0, 1, 0))


def soft_dice_loss(soft: Tensor, mask: Tensor) -> Tensor:
    """Compute 1 - Dice of a soft mask, [B, K, H, W] each -> [B], averaged over the K channels.

    One is added to numerator and denominator, so that two empty masks agree and the gradient stays
    finite.
    """
    common = (soft * mask).flatten(2).sum(2)
    both = (soft + mask).flatten(2).sum(2)
    return (1 - (2 * common + 1) / (both + 1)).mean(1)


def binary_cross_entropy(soft: Tensor, mask: Tensor) -> Tensor:
    """Compute the cross-entropy of probabilities in nats, [B, K, H, W] each -> [B].

    Probabilities are clamped at 1e-30 only, so that a confidently wrong pixel keeps its gradient.
    torch's own function refuses to run under autocast on CUDA.
    """
    hit, miss = (p.clamp(min=1e-30).log() for p in (soft, 1 - soft))
    return -(mask * hit + (1 - mask) * miss).flatten(1).mean(1)


COARSE_LOSSES: dict[str, CoarseLoss] = {
    "mse": coarse_mse,
    "dice_ce": coarse_dice_ce,
    "none": coarse_none,
}
"""The losses of the coarse mask, by the names of ``--coarse_loss``."""
