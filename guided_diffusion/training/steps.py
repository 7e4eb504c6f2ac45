"""What follows from a step's number alone: its noise, its learning rate, whether it is the last."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from guided_diffusion.data.batches import mix
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.sampling import MemberNoise


class Draw(NamedTuple):
    """What a step draws for the B rows of a process.

    Attributes:
        positions: in the list of trained timesteps, int64 [B].
        t: these timesteps, int64 [B].
        weights: of the losses at these timesteps, [B].
        eps: noise [B, K, H, W].
        withheld: bool [B], where the noisy mask is withheld.
    """

    positions: Tensor
    t: Tensor
    weights: Tensor
    eps: Tensor
    withheld: Tensor


def draw(
    sampler: ScheduleSampler,
    diffusion: GaussianDiffusion,
    shape: torch.Size,
    seed: int,
    step: int,
) -> Draw:
    """Draw this process's rows of the step's whole batch.

    Every row has its own generator, so that a process draws the noise of its rows alone, and any
    number of processes draws the same. What is drawn afterwards, such as dropout, differs from
    process to process.

    Args:
        sampler: draws the positions.
        diffusion: its ``mask_dropout`` is the share of rows, in expectation, in which the noisy
            mask is withheld, with 1 no noise is drawn; its ``noise_share`` that of rows at the last
            timestep.
        shape: [B, K, H, W] of this process's rows.
        seed: of the run.
        step: steps that were taken before.
    """
    own, count, first = mix(seed, step), shape[0] * world_size(), shape[0] * rank()
    torch.manual_seed(own)
    positions, weights = sampler.sample(count)
    dropout, share = diffusion.mask_dropout, diffusion.mask_dropout + diffusion.noise_share
    chance = torch.rand(count) if share else torch.ones(count)
    withheld, chosen = chance < dropout, chance < share
    weights = weights.masked_fill(chosen, 1.0)
    positions = positions.masked_fill(chosen & ~withheld, len(diffusion.kept) - 1)
    eps = torch.zeros(shape)
    if dropout < 1:
        eps = MemberNoise([mix(own, first + row) for row in range(shape[0])])(eps)
    if rank():
        torch.manual_seed(mix(seed + rank(), step))
    rows = slice(first, first + shape[0])
    t = torch.tensor(diffusion.kept)[positions]
    return Draw(positions[rows], t[rows], weights[rows], eps, withheld[rows])


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
