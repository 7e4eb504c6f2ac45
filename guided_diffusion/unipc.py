"""UniPC: a predictor-corrector solver of any order at the price of the predictor alone.

Zhao et al. (2023), "UniPC", algorithms 5 to 8, in data prediction with B(h) = e^h - 1. The value
that the next step needs anyway also corrects the point it was computed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.schedule import NoiseLevel

Known = tuple[NoiseLevel, Tensor]


def unipc(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], *, order: int = 2) -> Tensor:
    """UniPC of order 1 to 3; a step to the clean mask is a plain prediction of x0.

    The first steps rise to ``order``; below 10 steps the last ones come down again, for stability.

    Args:
        denoise: the model.
        x: noise at ``levels[0]``, [B, K, H, W].
        levels: decreasing noise, N + 1 of them for N evaluations.
        order: of the predictor; the corrector adds one.
    """
    steps = len(levels) - 1
    known: list[Known] = []
    before = x
    for step, (now, nxt) in enumerate(pairwise(levels)):
        x0 = denoise(x, now).x0
        if nxt.sigma == 0:
            return x0
        if known:
            x = _update(before, known, now, x0)
        usable = min(order, steps - step) if steps < 10 else order
        known = [*known, (now, x0)][-usable:]
        before, x = x, _update(x, known, nxt)
    return x


def _update(
    x: Tensor, known: Sequence[Known], nxt: NoiseLevel, new: Tensor | None = None
) -> Tensor:
    """Step from the newest known point to ``nxt``: predict, or correct with the value there."""
    (now, value), *older = reversed(known)
    h = nxt.log_snr - now.log_snr
    nodes = [(level.log_snr - now.log_snr) / h for level, _ in older]
    slopes = [(other - value) / node for (_, other), node in zip(older, nodes, strict=True)]
    if new is not None:
        nodes, slopes = [*nodes, 1.0], [*slopes, new - value]

    phi = math.expm1(-h)
    x = (nxt.sigma / now.sigma) * x - nxt.alpha * phi * value
    for weight, slope in zip(_weights(nodes, -h), slopes, strict=True):
        x = x - nxt.alpha * phi * weight * slope
    return x


def _weights(nodes: Sequence[float], k: float) -> list[float]:
    """Solve the order conditions for the weight of each divided difference: eq. 9.

    One node has the weight 1/2, which meets the condition to second order.
    """
    if len(nodes) < 2:
        return [0.5] * len(nodes)
    powers = np.array([[node**i for node in nodes] for i in range(len(nodes))])
    target, phi, factorial = [], math.expm1(k) / k - 1, 1
    for i in range(1, len(nodes) + 1):
        target.append(phi * factorial / math.expm1(k))
        factorial *= i + 1
        phi = phi / k - 1 / factorial
    return [float(weight) for weight in np.linalg.solve(powers, target)]
