"""What follows from a step's number alone: its noise, its learning rate, whether it is the last."""

from __future__ import annotations

import torch
from torch import Tensor

from guided_diffusion.data.batches import mix
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.resample import ScheduleSampler


def draw(
    sampler: ScheduleSampler, shape: torch.Size, seed: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positions, weights and noise of this process's rows of the step's whole batch.

    What is drawn afterwards, such as dropout, differs from process to process.

    Args:
        sampler: draws the positions.
        shape: [B, K, H, W] of this process's rows.
        seed: of the run.
        step: steps that were taken before.

    Returns:
        Positions in the schedule int64 [B], their weights [B] and noise [B, K, H, W].
    """
    torch.manual_seed(mix(seed, step))
    count, rows = shape[0] * world_size(), slice(rank() * shape[0], (rank() + 1) * shape[0])
    positions, weights = sampler.sample(count)
    eps = torch.randn(count, *shape[1:])
    if rank():
        torch.manual_seed(mix(seed + rank(), step))
    return positions[rows], weights[rows], eps[rows]


def learning_rate(options: TrainingOptions, step: int) -> float:
    """Return the rate of the step after ``step``: warm-up, then linear annealing."""
    warm = min(1.0, (step + 1) / max(options.warmup_steps, 1))
    anneal = options.lr_anneal_steps
    left = max(1 - step / anneal, 0.0) if anneal else 1.0
    return options.lr * warm * left


def last_step(options: TrainingOptions) -> int:
    """Return the step to stop at; 0 for never."""
    limits = [options.max_steps, options.lr_anneal_steps]
    return min((limit for limit in limits if limit > 0), default=0)
