"""Noise schedules: how much of the clean mask is left at each time.

The whole suite speaks of noise through two types: a :class:`NoiseLevel`, the pair (alpha, sigma)
that turns a clean mask into a noisy one, and the :class:`NoiseSchedule` of a trained model, which
knows the level of every time, fractional ones included. Samplers only ever see lists of levels.
Linear schedule: Ho et al. (2020), section 4; cosine: Nichol & Dhariwal (2021), eq. 17; log-linear
interpolation between the trained times: Lu et al. (2022), appendix D.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.errors import UserError

SCHEDULES = ("linear", "cosine")


class NoiseLevel(NamedTuple):
    """One amount of noise: ``x = alpha * x0 + sigma * eps`` with ``alpha**2 + sigma**2 == 1``.

    ``t`` is the index into the trained schedule (fractional between two trained times) that the
    network is told.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma); infinite for the clean mask."""
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


CLEAN = NoiseLevel(t=-1.0, alpha=1.0, sigma=0.0)


def get_named_beta_schedule(name: str, steps: int) -> np.ndarray:
    """Return the betas of a named schedule, float64 [steps], each in (0, 1).

    ``linear`` is Ho et al. (2020) scaled to any length; ``cosine`` is Nichol & Dhariwal (2021), eq.
    17.

    Raises:
        UserError: unknown name, no step at all, or a linear schedule so short that a beta reaches
            1.
    """
    if steps < 1:
        raise UserError("--diffusion_steps", found=steps, expected="at least 1", hint="Try 1000.")
    if name == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    elif name == "cosine":
        edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    else:
        raise UserError(
            "--noise_schedule",
            found=name,
            expected=" or ".join(SCHEDULES),
            hint="Choose one of them.",
        )
    if name == "linear" and steps <= 20:
        raise UserError(
            "--diffusion_steps",
            found=f"{steps} with the linear schedule, whose last beta is then {20 / steps:.3g}",
            expected="at least 21, for a beta is a variance below 1",
            hint="Train with more steps or with --noise_schedule cosine; to sample in few steps, "
            "use --steps on a model trained with many.",
        )
    return betas


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels a model was trained on.

    Attributes:
        alpha_bar: float64 [T] on the CPU, strictly decreasing in (0, 1); ``alpha_bar[t]`` is the
            share of the clean mask's variance left at time ``t``.
    """

    alpha_bar: Tensor

    @classmethod
    def named(cls, name: str, steps: int) -> NoiseSchedule:
        """Build the schedule of :func:`get_named_beta_schedule`."""
        return cls(torch.from_numpy(np.cumprod(1 - get_named_beta_schedule(name, steps))))

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def _log_alpha(self) -> np.ndarray:
        return np.asarray(0.5 * self.alpha_bar.log())

    def at(self, t: float) -> NoiseLevel:
        """Return the level at a time in [0, T - 1]; between trained times log alpha is linear."""
        if not 0 <= t <= len(self) - 1:
            raise ValueError(f"time {t} lies outside the schedule's [0, {len(self) - 1}]")
        log_alpha = float(np.interp(t, np.arange(len(self)), self._log_alpha))
        return _level(t, log_alpha)

    def thinned(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """The schedule of some of the times, increasing: what training on them alone knows."""
        return NoiseSchedule(self.alpha_bar[list(timesteps)])

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """Return the level of a given log(alpha / sigma); the inverse of :meth:`at`."""
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2 * log_snr))
        t = np.interp(-log_alpha, -self._log_alpha, np.arange(len(self)))
        return _level(float(t), log_alpha)

    def levels(
        self, timesteps: Iterable[float], end: NoiseLevel | None = CLEAN
    ) -> list[NoiseLevel]:
        """Return the levels a sampler walks through: these times as given, then any ``end``."""
        return [self.at(t) for t in timesteps] + ([end] if end else [])

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw from q(x_t | x0), Ho et al. (2020), eq. 4.

        Args:
            x0: clean masks [B, K, H, W], in the range that is diffused.
            t: int64 [B], times in [0, T - 1], on any device.
            eps: standard normal noise of the shape of ``x0``.

        Returns:
            Noisy masks, shape and dtype of ``x0``.
        """
        alpha_bar = self.alpha_bar[t.cpu()]
        return per_sample(alpha_bar.sqrt(), x0) * x0 + per_sample((1 - alpha_bar).sqrt(), x0) * eps


def _level(t: float, log_alpha: float) -> NoiseLevel:
    return NoiseLevel(float(t), math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Bring float64 [B] on the CPU to the dtype and device of ``like``, as [B, 1, 1, 1]."""
    return values.to(like.dtype).to(like.device, non_blocking=True)[:, None, None, None]
