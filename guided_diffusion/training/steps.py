"""What a step needs before it is taken: its noise, its inputs on the device, its learning rate."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from guided_diffusion.data.batches import Batch, TrainingBatch, mix
from guided_diffusion.dist_util import local_world_size, rank, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.sampling import MemberNoise
from guided_diffusion.training.sharded import own_parts

GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that use CUDA graphs."""


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


class StepInputs(NamedTuple):
    """What a step computes from, on the device but for what :class:`Draw` says of times.

    Attributes:
        batch: that was read.
        x0: what is diffused, in its range, [B, K, H, W].
        condition: [B, C, H, W].
        y: class labels int64 [B], or None.
        drawn: noise and weights on the device; positions, times and ``withheld`` on the CPU.
        seed: of what is drawn inside the network, such as dropout.
        state: of the CPU's generator after the draws.
    """

    batch: Batch
    x0: Tensor
    condition: Tensor
    y: Tensor | None
    drawn: Draw
    seed: int
    state: Tensor

    def continue_drawing(self) -> None:
        """Set the generators of all devices to where this step's draws ended."""
        torch.manual_seed(self.seed)
        torch.set_rng_state(self.state)


def prepare_step(
    batch: Batch,
    prepare_batch: Callable[[Batch], TrainingBatch],
    sampler: ScheduleSampler,
    diffusion: GaussianDiffusion,
    *,
    seed: int,
    step: int,
    device: torch.device,
) -> StepInputs:
    """Draw a step's noise and send its tensors to the device, without waiting for it.

    The arguments are those of :func:`draw`; ``prepare_batch`` separates what is diffused.
    """

    def sent(value: Tensor) -> Tensor:
        pinned = value.pin_memory() if device.type == "cuda" else value
        return pinned.to(device, non_blocking=True)

    prepared = prepare_batch(batch)
    drawn = draw(sampler, diffusion, prepared.x0.shape, seed, step)
    return StepInputs(
        batch=batch,
        x0=diffusion.to_range(sent(prepared.x0)),
        condition=sent(prepared.condition),
        y=None if prepared.y is None else sent(prepared.y),
        drawn=drawn._replace(eps=sent(drawn.eps), weights=sent(drawn.weights)),
        seed=torch.initial_seed(),
        state=torch.get_rng_state(),
    )


def reading_processes(wanted: int, device: torch.device) -> int:
    """Resolve ``--num_workers``: below 0, up to 4 beside a CUDA device, 0 beside others."""
    if wanted >= 0 or device.type != "cuda":
        return max(wanted, 0)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(4, cores // local_world_size() - 1))


def refuse_graphs(mode: str, options: TrainingOptions, *, cuda: bool) -> None:
    """Refuse CUDA graphs where gradients are added up over several backward passes.

    A replayed graph writes into memory of its own, which the gradients of the pass before are in.

    Raises:
        UserError: ``mode`` of torch.compile has graphs, and ``--microbatch`` divides the batch.
    """
    if cuda and mode in GRAPHS and options.microbatch > 0:
        raise UserError(
            f"--compile {mode}",
            f"does not work with --microbatch {options.microbatch}: a replayed CUDA graph "
            "overwrites the gradients that are added up",
            "Use --compile default, or omit --microbatch.",
        )


def clip_gradient(parameters: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Shrink a gradient of this norm to the largest that is allowed; 0 allows any."""
    if largest:
        shrink = (largest / (norm + 1e-6)).clamp(max=1.0)
        gradients = own_parts(p.grad for p in parameters if p.grad is not None)
        torch._foreach_mul_(gradients, shrink)


def not_finite(step: int, times: int, cases: str) -> UserError:
    """Make the error for a run whose gradient was not finite so many times in a row."""
    return UserError(
        f"step {step}",
        f"the gradient was not finite {times} times in a row, last for the cases {cases}",
        "Lower --lr, use --grad_clip 1 or --precision fp32; scripts/check_data.py looks at the "
        "images. The last checkpoint is intact.",
    )


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
