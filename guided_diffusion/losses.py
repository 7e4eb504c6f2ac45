"""Likelihood terms of the variational bound, per element and in nats.

Ho et al. (2020), sections 3.2 and 3.3. Called by ``gaussian_diffusion`` only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BIN = 1 / 255


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) per element, of the broadcast shape, in nats."""
    gap = (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    return 0.5 * (log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + gap - 1)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-probability, in nats, of the bin of width 2/255 around ``x``.

    The outermost bins (beyond -0.999 and 0.999) are open, as in Ho et al. (2020), eq. 13. All
    tensors broadcast against each other.
    """
    scale = torch.exp(-log_std)
    upper = _normal_cdf((x + _BIN - mean) * scale)
    lower = _normal_cdf((x - _BIN - mean) * scale)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Standard normal CDF in the tanh approximation that published weights were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
