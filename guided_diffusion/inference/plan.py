"""How masks are drawn: sampler, noise levels, size and fusion of the ensemble, fixed beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from guided_diffusion import logger
from guided_diffusion.dist_util import describe, total_gib
from guided_diffusion.dpm_solver import solver_levels
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.precision import resolve_precision
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions
from guided_diffusion.respace import space_timesteps
from guided_diffusion.schedule import NoiseLevel

Item = TypeVar("Item")


@dataclass(frozen=True)
class SamplingPlan:
    """How masks are drawn.

    Attributes:
        sampler: a name of :data:`guided_diffusion.sampling.SAMPLERS`, or ``direct``: one evaluation
            without a noisy mask.
        levels: the noise levels to step through; one network evaluation for each but the last.
        options: keywords of the sampler.
        clip: the range x0 is clamped to at every evaluation, or None.
        num_ensemble: masks a case, of one network and of one orientation of the image.
        fusion: a name of :data:`guided_diffusion.ensemble.FUSIONS`, or ``direct``: the network's
            answer without a noisy mask, or, where it has none, the mean of its first answers.
        measure: a name of :data:`guided_diffusion.ensemble.MEASURES`.
        seed: of all randomness.
        batch_size: network inputs at a time.
        precision: fp32, bf16 or fp16.
        compile: a mode of ``torch.compile``, or empty.
        temperature: standard deviation of the noise that a mask starts from.
        coarse: how the network's coarse mask joins the members: a name of
            :data:`guided_diffusion.ensemble.BLENDS`.
        mask_guidance: how far the noisy mask is trusted; 1 needs no answer without it.
        mask_temperature: divides the log-odds of the fused mask.
        largest: connectivity of the component of the fused mask to keep, 4 or 8; 0 keeps all.
        fill_holes: whether the holes of the fused mask are filled.
        flip_members: masks of the image flipped left to right are drawn as well.
        dropout_members: dropout stays active, other for every mask.
    """

    sampler: str
    levels: tuple[NoiseLevel, ...]
    options: dict[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] | None = (-1.0, 1.0)
    num_ensemble: int = 5
    fusion: str = "mean"
    measure: str = "std"
    seed: int = 10
    batch_size: int = 8
    precision: str = "fp32"
    compile: str = ""
    temperature: float = 1.0
    coarse: str = "none"
    mask_guidance: float = 1.0
    mask_temperature: float = 1.0
    largest: int = 0
    fill_holes: bool = False
    flip_members: bool = False
    dropout_members: bool = False

    @property
    def members(self) -> int:
        """Masks a case of one network."""
        return self.num_ensemble * (2 if self.flip_members else 1)

    @property
    def evaluations(self) -> int:
        """Network evaluations per mask."""
        return len(self.levels) - 1

    @property
    def needs_direct(self) -> bool:
        """Whether the answer without a noisy mask is needed beside the members."""
        if self.sampler == "direct":  # a member is the answer itself, unless dropout is active
            return self.dropout_members and self.fusion == "direct"
        return self.mask_guidance != 1 or self.fusion == "direct"

    @property
    def cases(self) -> int:
        """Cases whose members fit into ``batch_size`` together; 1 if not even those of one do."""
        return max(1, self.batch_size // self.num_ensemble)

    @property
    def inputs(self) -> int:
        """Network inputs in a full call."""
        return min(self.batch_size, self.cases * self.num_ensemble)

    def inputs_of(self, cases: int) -> int:
        """Network inputs in the first call for some cases; compiled code is for full calls."""
        return self.inputs if self.compile else min(self.batch_size, cases * self.num_ensemble)


MAPS = 16
"""Maps of the first level's width that a network holds for each input while it predicts, about."""


def within_memory(
    plan: SamplingPlan,
    *,
    size: int,
    width: int,
    masks: int,
    device: torch.device,
    members: int = 0,
) -> SamplingPlan:
    """Lower a plan's batch to what can fit into memory, and say so.

    Args:
        plan: of a run.
        size: height and width at which the network works.
        width: of the network's first level, in channels.
        masks: channels of a mask.
        device: that draws.
        members: masks a case of all networks; 0 for those of the plan.

    Raises:
        UserError: not even the masks of one case fit into main memory.
    """
    member = 3 * 4 * masks * size**2 / 2**30  # drawn, gathered and brought to the case's size
    main = total_gib(torch.device("cpu"))
    members = members or plan.members
    if members * member > main:
        raise UserError(
            f"--num_ensemble {plan.num_ensemble}",
            f"the masks of one case take {members * member:.1f} GiB, this machine has {main:.1f}",
            f"At most {int(main / member * plan.num_ensemble / members)} fit.",
        )
    fitting = total_gib(device) / (MAPS * 4 * width * size**2 / 2**30)
    if plan.batch_size <= max(1, fitting):
        return plan
    lower = max(1, int(fitting))
    logger.log(
        f"--batch_size {plan.batch_size}: lowered to {lower}, about what fits into the "
        f"{total_gib(device):.1f} GiB of {describe(device)}"
    )
    return replace(plan, batch_size=lower)


def halved(plan: SamplingPlan, batch: int, problem: str, *, device: torch.device) -> SamplingPlan:
    """Halve the batch with which memory ran out, and say so."""
    logger.log(f"--batch_size {batch}: {problem}; going on with {batch // 2}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return replace(plan, batch_size=batch // 2)


def sampler_of(options: SamplingOptions) -> str:
    """The sampler that the flags choose, by its name there."""
    return options.sampler or (
        "dpm_solver++" if options.dpm_solver else "ddim" if options.use_ddim else "ddpm"
    )


def make_plan(
    options: SamplingOptions,
    run: RunOptions,
    diffusion: GaussianDiffusion,
    *,
    device: torch.device,
    own: bool,
    respacing: str = "",
) -> SamplingPlan:
    """Make the plan of a run.

    ``own`` checkpoints clip to the range they were trained with, others' weights to [-1, 1];
    ``respacing`` is a ``--timestep_respacing``.
    """
    sampler = sampler_of(options)
    clip = (diffusion.mask_range if own else (-1.0, 1.0)) if options.clip_denoised else None
    levels = sampling_levels(diffusion, sampler, options, respacing=respacing)
    if options.method == "singlestep" and sampler.startswith("dpm_solver"):
        sampler += "_singlestep"
    if sampler == "direct":  # no noise is drawn
        options = replace(options, temperature=1.0)
    keywords: dict[str, dict[str, Any]] = {"ddpm": {}, "direct": {}, "ddim": {"eta": options.eta}}
    return SamplingPlan(
        sampler=sampler,
        levels=tuple(levels),
        options=keywords.get(sampler, {"order": options.order}),
        clip=clip,
        num_ensemble=options.num_ensemble,
        fusion=options.fusion,
        measure=options.uncertainty,
        seed=run.seed,
        batch_size=options.batch_size or (8 if device.type == "cpu" else 32),
        precision=resolve_precision(run.precision, device),
        compile=run.compile,
        temperature=options.temperature,
        coarse=options.coarse,
        mask_guidance=options.mask_guidance,
        mask_temperature=options.mask_temperature,
        largest=int(options.largest or 0),
        fill_holes=options.fill_holes,
        flip_members=options.flip_members,
        dropout_members=options.dropout_members,
    )


def sampling_levels(
    diffusion: GaussianDiffusion,
    sampler: str,
    options: SamplingOptions,
    *,
    respacing: str = "",
) -> list[NoiseLevel]:
    """Choose the noise levels of a run among the trained times.

    ``options.steps`` counts evaluations and wins over ``respacing``. Without either, DDPM and DDIM
    visit every trained time and the solvers 50.

    Raises:
        UserError: more evaluations than trained times, or fewer than 1.
    """
    schedule, trained = diffusion.schedule, diffusion.kept
    total, count = len(trained), options.steps
    if not 0 <= count <= total:
        raise UserError(
            f"--steps {count}",
            f"the network was trained at {total} times",
            f"Ask for 1 to {total} evaluations with --steps or --diffusion_steps; "
            "--trained_steps states the schedule length of bare weights.",
        )
    if sampler == "direct":
        return schedule.levels([diffusion.last])
    if sampler not in ("ddpm", "ddim"):
        levels = solver_levels(
            schedule.thinned(trained),
            count or len(space_timesteps(total, respacing or [min(50, total)])),
            order=options.order,
            method=options.method if sampler.startswith("dpm_solver") else "multistep",
            skip_type=options.skip_type,
        )
        places = range(-1, total)
        times = np.interp([level.t for level in levels], places, [-1, *trained])
        return [level._replace(t=float(t)) for level, t in zip(levels, times, strict=True)]
    visited = space_timesteps(total, [count] if count else respacing)
    if len(visited) == 1:  # the one that respacing takes is 0, where nothing is left to remove
        return schedule.levels([trained[-1]])
    return schedule.levels([trained[index] for index in sorted(visited, reverse=True)])


def batched(values: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cut a sequence into pieces of ``size``; the last may be shorter."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def padded(values: Sequence[Item], size: int) -> Sequence[Item]:
    """Repeat the last value until there are ``size``: compiled code is for one shape."""
    return [*values, *[values[-1]] * (size - len(values))]
