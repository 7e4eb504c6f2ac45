"""Which times are trained: uniformly drawn ones, or those whose loss varies most.

Both samplers draw positions in the list of trained times and weights that keep the expected loss
unbiased. Nichol & Dhariwal (2021), section 3.3. Called by ``train_util``.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class ScheduleSampler(Protocol):
    """The contract: draw positions, learn from their losses, remember across a restart."""

    learns: bool
    """Whether :meth:`update` is worth a call."""

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw int64 [batch] positions and float32 [batch] loss weights from the global RNG."""

    def update(self, positions: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [batch] at these positions."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""


class UniformSampler:
    """Every time equally often, weight 1."""

    learns = False

    def __init__(self, count: int) -> None:
        self.count = count

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw positions and weights."""
        return torch.randint(self.count, (batch,)), torch.ones(batch)

    def update(self, positions: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to continue from."""


class LossSecondMomentResampler:
    """Times in proportion to the root mean square of their last losses: eq. 18.

    Uniform until every time has a full history; a small share stays uniform for ever.
    """

    learns = True

    def __init__(self, count: int, history: int = 10, uniform_share: float = 0.001) -> None:
        self.uniform_share = uniform_share
        self._losses = torch.zeros(count, history, dtype=torch.float64)
        self._seen = torch.zeros(count, dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """The probability of each time, float64 [count]."""
        count, history = self._losses.shape
        if (self._seen < history).any():
            return torch.full((count,), 1 / count, dtype=torch.float64)
        spread = self._losses.square().mean(dim=1).sqrt()
        if not spread.sum() > 0:
            return torch.full((count,), 1 / count, dtype=torch.float64)
        return (1 - self.uniform_share) * spread / spread.sum() + self.uniform_share / count

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw positions and weights."""
        probabilities = self.probabilities
        positions = torch.multinomial(probabilities, batch, replacement=True)
        weights = 1 / (len(probabilities) * probabilities[positions])
        return positions, weights.float()

    def update(self, positions: Tensor, losses: Tensor) -> None:
        """Push each finite loss to the end of its time's history."""
        history = self._losses.shape[1]
        for position, loss in zip(positions.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            self._losses[position] = self._losses[position].roll(-1)
            self._losses[position, -1] = loss
            self._seen[position] = min(int(self._seen[position]) + 1, history)

    def state_dict(self) -> dict[str, Tensor]:
        """Return losses and their counts."""
        return {"losses": self._losses.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        self._losses, self._seen = state["losses"].clone(), state["seen"].clone()


def create_named_schedule_sampler(name: str, count: int) -> ScheduleSampler:
    """Build one of :data:`SCHEDULE_SAMPLERS` over ``count`` trained times."""
    return (
        LossSecondMomentResampler(count) if name == "loss-second-moment" else UniformSampler(count)
    )
