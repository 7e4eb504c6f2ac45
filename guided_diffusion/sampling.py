"""Samplers, plain loops over noise levels with one signature, and reproducible noise for them.

``sampler(denoise, x, levels)`` takes a model, noise at the first level, and the levels to step
through, and returns the mask at the last one. Options are keywords. :data:`SAMPLERS` lists them
all, with DDPM, DDIM and UniPC from here and the solvers of ``dpm_solver``. :class:`MemberNoise`
draws the noise of each ensemble member from its seed, so that it does not depend on the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import dpm_solver
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.schedule import NoiseLevel

Sampler = Callable[..., Tensor]
RandnLike = Callable[[Tensor], Tensor]
Known = tuple[NoiseLevel, Tensor]


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Ancestral sampling, Ho et al. (2020), algorithm 2, between any two levels.

    The variance is between the posterior's and beta if the model learned it (Nichol & Dhariwal
    (2021), eq. 15), else beta. No noise is added in the step to the clean mask.
    """
    for now, nxt in pairwise(levels):
        x0, var_frac, _ = denoise(x, now)
        ratio = now.alpha / nxt.alpha
        beta = 1 - ratio**2
        x0_weight = nxt.alpha * beta / now.sigma**2
        x = x0_weight * x0 + (ratio * nxt.sigma**2 / now.sigma**2) * x
        if nxt.sigma > 0:
            x = x + _ancestral_std(beta, nxt.sigma / now.sigma, var_frac) * randn_like(x)
    return x


def _ancestral_std(beta: float, shrink: float, var_frac: Tensor | None) -> Tensor | float:
    """Interpolate geometrically from the posterior's (0; ``shrink`` times beta's) to beta's (1)."""
    if var_frac is None:
        return math.sqrt(beta)
    return math.sqrt(beta) * torch.exp((1 - var_frac) * math.log(shrink))


def ddim(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    eta: float = 0.0,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """DDIM, eq. 12 of Song et al. (2020); eta = 1 is DDPM with the posterior variance.

    With eta = 0 the levels may also ascend, which encodes an image as noise: the same differential
    equation backwards (their section 4.3). The first level needs some noise, ``sigma > 0``.

    Raises:
        ValueError: ascending levels with another eta.
    """
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now).x0
        eps = (x - now.alpha * x0) / now.sigma
        std = 0.0
        if eta:
            if nxt.alpha < now.alpha:
                raise ValueError("noise is drawn on the way down alone; eta must be 0 upwards")
            std = eta * nxt.sigma / now.sigma * math.sqrt(1 - (now.alpha / nxt.alpha) ** 2)
        x = nxt.alpha * x0 + math.sqrt(nxt.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * randn_like(x)
    return x


def direct(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel]) -> Tensor:
    """Evaluate the network once, without a noisy mask: the same answer for any noise ``x``.

    It is for networks that were trained without the noisy mask in some draws, or that never see
    one; they are given zeros at the last trained timestep, which is ``levels[0]``.
    """
    return denoise(torch.zeros_like(x), levels[0]).x0


def unipc(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], *, order: int = 2) -> Tensor:
    """UniPC: a predictor-corrector solver, with as many evaluations as its predictor alone.

    Zhao et al. (2023), algorithms 5 to 8, in data prediction with B(h) = e^h - 1: the model value
    that the next step needs also corrects the point it was computed at. The order rises to
    ``order`` in the first steps and, with fewer than 10 steps, falls again in the last ones, for
    stability. A step to the clean mask is a plain prediction of x0. The arguments are those of
    :func:`guided_diffusion.dpm_solver.multistep`; ``order`` is that of the predictor, and the
    corrector has one more.
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
    """Solve the order conditions for the weight of each divided difference: UniPC, eq. 9.

    A single node has the weight 1/2, which meets the condition to second order.
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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": partial(dpm_solver.multistep, algorithm="dpmsolver"),
    "dpm_solver_singlestep": partial(dpm_solver.singlestep, algorithm="dpmsolver"),
    "dpm_solver++": dpm_solver.multistep,
    "dpm_solver++_singlestep": dpm_solver.singlestep,
    "sde_dpm_solver++": dpm_solver.multistep_sde,
    "unipc": unipc,
}
"""All samplers by name, each called as ``sampler(denoise, x, levels)``, but for :func:`direct`."""
STOCHASTIC = frozenset({"ddpm", "ddim", "sde_dpm_solver++"})
"""The samplers that draw noise in their steps, with the keyword ``randn_like``."""


class MemberNoise:
    """Standard normal noise with one random generator per row.

    It is drawn on the CPU, so that it does not depend on the device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Draw noise of the shape of ``x`` [B, ...], row b from generator b."""
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(x.device, x.dtype)


def member_seed(seed: int, name: str, member: int) -> int:
    """Return the seed of one mask: 63 bits of a hash of the run's seed, the case and the member."""
    digest = hashlib.sha256(f"{seed}/{name}/{member}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
