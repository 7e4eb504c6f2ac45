"""Samplers of the timesteps to train on: uniform, or by the size of their recent losses.

A sampler draws positions in the list of trained timesteps, and loss weights that keep the expected
loss unbiased. Nichol & Dhariwal (2021), section 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment")


class ScheduleSampler:
    """The interface: draw positions, learn from their losses, save and restore the state.

    A sampler that learns nothing has no state, and overrides :meth:`sample` alone.
    """

    learns = False
    """Whether :meth:`update` does anything."""

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw int64 [batch] positions and float32 [batch] loss weights from the global RNG."""
        raise NotImplementedError

    def update(self, positions: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses [batch] at these positions."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state from :meth:`state_dict`."""


class UniformSampler(ScheduleSampler):
    """Draws every timestep equally often, with weight 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw positions and weights."""
        return torch.randint(self.count, (batch,)), torch.ones(batch)


class LossSecondMomentResampler(ScheduleSampler):
    """Draws timesteps in proportion to the root mean square of their last losses: eq. 18.

    It draws uniformly until every timestep has a full history, and a small share always.
    """

    learns = True

    def __init__(self, count: int, history: int = 10, uniform_share: float = 0.001) -> None:
        self.uniform_share = uniform_share
        self._losses = torch.zeros(count, history, dtype=torch.float64)
        self._seen = torch.zeros(count, dtype=torch.int64)

    @property
    def probabilities(self) -> Tensor:
        """The probability of each timestep, float64 [count]."""
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
        """Append each finite loss to the history of its timestep."""
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
        """Restore the state from :meth:`state_dict`."""
        self._losses, self._seen = state["losses"].clone(), state["seen"].clone()


def create_named_schedule_sampler(name: str, count: int) -> ScheduleSampler:
    """Build one of :data:`SCHEDULE_SAMPLERS` over ``count`` trained timesteps."""
    return (
        LossSecondMomentResampler(count) if name == "loss-second-moment" else UniformSampler(count)
    )
