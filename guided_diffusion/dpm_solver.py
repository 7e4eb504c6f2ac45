"""DPM-Solver and DPM-Solver++: few-step ODE solvers of orders 1 to 3.

Lu et al. (2022), "DPM-Solver" (noise prediction) and "DPM-Solver++" (data prediction). Both
integrate in ``log(alpha / sigma)``, and with the roles of alpha and sigma exchanged they are the
same solver: an exponential integrator over a polynomial through the last model values. So there is
one update, :func:`_advance`, and two loops over it. :func:`solver_levels` chooses where a solver
evaluates the model, including the inner points of singlestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule

ALGORITHMS = ("dpmsolver++", "dpmsolver")
METHODS = ("multistep", "singlestep")
SKIP_TYPES = ("time_uniform", "logSNR", "time_quadratic")


def multistep(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
) -> Tensor:
    """DPM-Solver(++) that reuses earlier model values: Lu et al. (2022, ++), algorithm 2.

    The order rises to ``order`` in the first steps and, with fewer than 10 steps, falls again in
    the last ones, for stability. A step to the clean mask is always a plain prediction of x0.

    Args:
        denoise: the model.
        x: noise at ``levels[0]``, [B, K, H, W].
        levels: decreasing noise, N + 1 of them for N evaluations.
        order: 1, 2 or 3.
        algorithm: ``dpmsolver++`` (predicts x0) or ``dpmsolver`` (predicts the noise).
    """
    steps = len(levels) - 1
    past: list[tuple[NoiseLevel, Tensor]] = []
    for step, (now, nxt) in enumerate(pairwise(levels)):
        x0 = denoise(x, now).x0
        if nxt.sigma == 0:
            return x0
        past = [*past, (now, _value(x, x0, now, algorithm))][-order:]
        usable = min(len(past), steps - step) if steps < 10 else len(past)
        x = _advance(x, now, nxt, *_differences(past[-usable:], nxt), algorithm=algorithm)
    return x


def multistep_sde(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    order: int = 2,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """SDE-DPM-Solver++(2M): the stochastic variant, Lu et al. (2022, ++), eq. 18.

    It solves the reverse SDE instead of the ODE, so that every step renews part of the noise, which
    ``randn_like`` draws. ``order`` is 1 or 2; the other arguments are those of :func:`multistep`.
    """
    past: list[tuple[NoiseLevel, Tensor]] = []
    for now, nxt in pairwise(levels):
        x0 = denoise(x, now).x0
        if nxt.sigma == 0:
            return x0
        past = [*past, (now, x0)][-min(order, 2) :]
        value, _, _ = _differences(past, nxt)
        shrink = math.exp(now.log_snr - nxt.log_snr)
        x = (nxt.sigma / now.sigma * shrink) * x + nxt.alpha * (1 - shrink**2) * value
        x = x + nxt.sigma * math.sqrt(1 - shrink**2) * randn_like(x)
    return x


def singlestep(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
) -> Tensor:
    """DPM-Solver(++) with ``order`` new evaluations in each step: algorithms 1 and 4-5.

    The arguments are those of :func:`multistep`, but ``levels`` are every point that is evaluated,
    inner points included, and the end, as :func:`solver_levels` returns them. The orders of the
    single steps follow from N (:func:`step_orders`). A final step to the clean mask is a plain
    prediction of x0.
    """
    last = levels[-1].sigma == 0
    position = 0
    for size in step_orders(len(levels) - 1 - last, order):
        start, *inner, end = levels[position : position + size + 1]
        x = _single_step(denoise, x, start, inner, end, algorithm)
        position += size
    return denoise(x, levels[-2]).x0 if last else x


def step_orders(evaluations: int, order: int) -> list[int]:
    """Split N evaluations into steps of at most ``order``, with the lowest orders last.

    >>> step_orders(7, 3), step_orders(5, 2)
    ([3, 3, 1], [2, 2, 1])
    """
    full, rest = divmod(evaluations, order)
    if order == 3 and rest == 0 and full:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + ([rest] if rest else [])


def solver_levels(
    schedule: NoiseSchedule,
    evaluations: int,
    *,
    order: int = 2,
    method: str = "multistep",
    skip_type: str = "time_uniform",
    to_clean: bool = True,
) -> list[NoiseLevel]:
    """Return the levels of a solver run of exactly ``evaluations`` network calls.

    The points run from the noisiest trained timestep to index 0, evenly in time, in the square root
    of time or in log-SNR. The singlestep solver takes its inner points from the same grid; only in
    log-SNR are its steps equally long, whatever their order, with inner points at their halves or
    thirds. Ending at the clean mask (``to_clean``) replaces the multistep solver's last point by it
    and appends it to a singlestep run of orders 2 and 3, whose last evaluation is at index 0.

    Args:
        schedule: the trained schedule.
        evaluations: N >= 1.
        order: 1, 2 or 3.
        method: ``multistep`` or ``singlestep``.
        skip_type: ``time_uniform``, ``logSNR`` or ``time_quadratic``.
        to_clean: end at the clean mask, not at index 0 as the published solver does.
    """
    if method == "multistep" or order == 1:
        grid = _grid(schedule, evaluations, skip_type)
        return [*grid[:-1], CLEAN] if to_clean else grid

    levels = _singlestep_levels(schedule, evaluations - to_clean, order, skip_type)
    return [*levels, CLEAN] if to_clean else levels


def _grid(schedule: NoiseSchedule, steps: int, skip_type: str) -> list[NoiseLevel]:
    """Return ``steps + 1`` levels from the noisiest trained timestep down to index 0."""
    total = len(schedule)
    if skip_type == "logSNR":
        edges = schedule.at(total - 1).log_snr, schedule.at(0).log_snr
        return [schedule.at_log_snr(value) for value in np.linspace(*edges, steps + 1)]
    power = {"time_uniform": 1, "time_quadratic": 2}[skip_type]
    times = np.linspace(1.0, (1 / total) ** (1 / power), steps + 1) ** power
    return [schedule.at(t) for t in np.clip(times * total - 1, 0, total - 1)]


def _singlestep_levels(
    schedule: NoiseSchedule, evaluations: int, order: int, skip_type: str
) -> list[NoiseLevel]:
    if skip_type != "logSNR":
        return _grid(schedule, evaluations, skip_type)

    orders = step_orders(evaluations, order)
    outer = _grid(schedule, len(orders), skip_type)
    levels = [outer[0]]
    for size, (now, nxt) in zip(orders, pairwise(outer), strict=True):
        inner = np.linspace(now.log_snr, nxt.log_snr, size + 1)[1:-1]
        levels += [*(schedule.at_log_snr(value) for value in inner), nxt]
    return levels


def _value(x: Tensor, x0: Tensor, level: NoiseLevel, algorithm: str) -> Tensor:
    """The model value that the algorithm interpolates: the clean mask or the noise."""
    return x0 if algorithm == "dpmsolver++" else (x - level.alpha * x0) / level.sigma


def _differences(
    past: Sequence[tuple[NoiseLevel, Tensor]], nxt: NoiseLevel
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value, slope and curvature at the newest of up to three points, per step to ``nxt``.

    The parabola through three points has twice this curvature. The published solver takes half of
    it, with which multistep order 3 converges like order 2 but with a smaller error. This is kept,
    so that results agree.
    """
    (now, value), *older = reversed(past)
    h = nxt.log_snr - now.log_snr
    if not older:
        return value, None, None
    r0 = (now.log_snr - older[0][0].log_snr) / h
    slope = (value - older[0][1]) / r0
    if len(older) == 1:
        return value + slope / 2, None, None
    r1 = (older[0][0].log_snr - older[1][0].log_snr) / h
    bend = slope - (older[0][1] - older[1][1]) / r1
    return value, slope + r0 / (r0 + r1) * bend, bend / (r0 + r1)


def _single_step(
    denoise: Denoiser,
    x: Tensor,
    start: NoiseLevel,
    inner: Sequence[NoiseLevel],
    end: NoiseLevel,
    algorithm: str,
) -> Tensor:
    """One step of order ``len(inner) + 1``; each inner value refines the slope at the start."""
    first = value = _value(x, denoise(x, start).x0, start, algorithm)
    slope = None
    for level in inner:
        at = _advance(x, start, level, first, slope, algorithm=algorithm)
        value = _value(at, denoise(at, level).x0, level, algorithm)
        following = inner[1] if len(inner) == 2 and level is inner[0] else end
        reach = following.log_snr - start.log_snr
        slope = (value - first) * (reach / (level.log_snr - start.log_snr))
    if len(inner) == 1 and slope is not None:
        first, slope = first + slope / 2, None
    return _advance(x, start, end, first, slope, algorithm=algorithm)


def _advance(
    x: Tensor,
    now: NoiseLevel,
    nxt: NoiseLevel,
    value: Tensor,
    slope: Tensor | None = None,
    curvature: Tensor | None = None,
    *,
    algorithm: str,
) -> Tensor:
    """Integrate the linear part exactly and the model value as a polynomial: Lu et al., eq. 3.4.

    With phi_1(k) = e^k - 1 and phi_{j+1}(k) = phi_j(k) / k - 1 / j!, data prediction has k = -h and
    noise prediction k = h, h being the step in log(alpha / sigma).
    """
    h = nxt.log_snr - now.log_snr
    if algorithm == "dpmsolver++":
        keep, scale, k = nxt.sigma / now.sigma, nxt.alpha, -h
    else:
        keep, scale, k = nxt.alpha / now.alpha, nxt.sigma, h
    phi_1 = math.expm1(k)
    phi_2 = phi_1 / k - 1
    phi_3 = phi_2 / k - 0.5

    change = phi_1 * value
    if slope is not None:
        change = change + phi_2 * slope
    if curvature is not None:
        change = change + phi_3 * curvature
    return torch.sub(keep * x, change, alpha=scale)
