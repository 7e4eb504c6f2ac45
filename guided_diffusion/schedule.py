"""Noise schedules: how much of the clean mask is left at each timestep.

Two types describe noise everywhere in this package: a :class:`NoiseLevel`, the pair (alpha, sigma)
that turns a clean mask into a noisy one, and the :class:`NoiseSchedule` of a trained model, which
gives the level of every timestep, fractional ones included. Samplers see only lists of levels.
Linear schedule: Ho et al. (2020), section 4; cosine: Nichol & Dhariwal (2021), eq. 17; log-linear
interpolation between trained timesteps: Lu et al. (2022), appendix D.4.
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

    ``t`` is the timestep that the network is conditioned on, an index into the trained schedule
    (fractional between two trained timesteps).
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
        UserError: the name is unknown, ``steps`` is below 1, or a linear schedule is so short that
            a beta reaches 1.
    """
    if steps < 1:
        raise UserError(f"--diffusion_steps {steps}", "must be at least 1", "Try 1000.")
    if name == "linear":
        scale = 1000 / steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)
    elif name == "cosine":
        edges = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    else:
        choices = " or ".join(SCHEDULES)
        raise UserError(f"--noise_schedule {name}", "is not a noise schedule", f"Choose {choices}.")
    if name == "linear" and steps <= 20:
        raise UserError(
            f"--diffusion_steps {steps}",
            "the linear schedule needs at least 21 steps, since a beta is a variance below 1 and "
            f"the last one would be {20 / steps:.3g}",
            "Train with more steps or with --noise_schedule cosine; to sample in few steps, "
            "use --steps on a model trained with many.",
        )
    return betas


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise levels a model was trained on.

    Attributes:
        alpha_bar: float64 [T] on the CPU, strictly decreasing in (0, 1); ``alpha_bar[t]`` is the
            share of the clean mask's variance left at timestep ``t``.
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
        """Return the level at a timestep in [0, T - 1]; in between, log alpha is linear."""
        if not 0 <= t <= len(self) - 1:
            raise ValueError(f"timestep {t} is outside the schedule's [0, {len(self) - 1}]")
        log_alpha = float(np.interp(t, np.arange(len(self)), self._log_alpha))
        return _level(t, log_alpha)

    def scaled(self, b: float) -> NoiseSchedule:
        """Return the schedule of masks that are multiplied by ``b`` before they are noised.

        A small ``b`` leaves less of the mask at every timestep. The noisy mask is divided by its
        standard deviation, so that alpha and sigma keep a squared sum of 1: Chen et al. (2022),
        "Analog Bits", and Chen (2023), "On the Importance of Noise Scheduling", section 2.2.
        """
        signal = b**2 * self.alpha_bar
        return NoiseSchedule(signal / (1 - self.alpha_bar + signal))

    def thinned(self, timesteps: Sequence[int]) -> NoiseSchedule:
        """Return the schedule of some increasing timesteps, as training on them alone has it."""
        return NoiseSchedule(self.alpha_bar[list(timesteps)])

    def at_log_snr(self, log_snr: float) -> NoiseLevel:
        """Return the level of a given log(alpha / sigma); the inverse of :meth:`at`."""
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2 * log_snr))
        t = np.interp(-log_alpha, -self._log_alpha, np.arange(len(self)))
        return _level(float(t), log_alpha)

    def levels(
        self, timesteps: Iterable[float], end: NoiseLevel | None = CLEAN
    ) -> list[NoiseLevel]:
        """Return the levels for a sampler: those of these timesteps in order, then any ``end``."""
        return [self.at(t) for t in timesteps] + ([end] if end else [])

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw from q(x_t | x0), Ho et al. (2020), eq. 4.

        Args:
            x0: clean masks [B, K, H, W], in the range that is diffused.
            t: int64 [B], timesteps in [0, T - 1], on any device.
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
