"""Samplers: plain loops over noise levels, all under one signature.

``sampler(denoise, x, levels)`` takes a model, noise at the first level, and the levels to walk
through, and returns the mask at the last. Options are keywords. :data:`SAMPLERS` names them all;
those of ``dpm_solver`` are among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from guided_diffusion import dpm_solver
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.unipc import unipc

Sampler = Callable[..., Tensor]
RandnLike = Callable[[Tensor], Tensor]


def ddpm(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Ancestral sampling, Ho et al. (2020), algorithm 2, between any two levels.

    The variance lies between the posterior's and beta where the model learned it (Nichol & Dhariwal
    (2021), eq. 15), and is beta where it did not. No noise is added on reaching the clean mask.
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
    """Interpolate, geometrically, from the posterior's (0; ``shrink`` smaller) to beta's (1)."""
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
    """DDIM, eq. 12 of Song et al. (2020); eta = 1 is DDPM with the posterior variance."""
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now).x0
        eps = (x - now.alpha * x0) / now.sigma
        std = eta * nxt.sigma / now.sigma * math.sqrt(1 - (now.alpha / nxt.alpha) ** 2)
        x = nxt.alpha * x0 + math.sqrt(nxt.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * randn_like(x)
    return x


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
"""Every sampler by name, each called as ``sampler(denoise, x, levels)``."""

STOCHASTIC = frozenset({"ddpm", "ddim", "sde_dpm_solver++"})
"""Those that draw noise on the way, by their keyword ``randn_like``."""
