"""Resolve flags into everything that sampling needs: checkpoint, options and data.

A checkpoint brings its own flags; a given flag that contradicts them is refused. In sampling,
``--diffusion_steps`` and ``--timestep_respacing`` count network evaluations and do not describe the
training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.checkpoint import (
    SEGMENTATION,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    recorded_flags,
    require_kind,
)
from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import SegmentationDataset, readable
from guided_diffusion.data.frames import WOLLEB_CROP, Frame
from guided_diffusion.errors import UserError
from guided_diffusion.inference.plan import sampler_of
from guided_diffusion.layouts import normalise_flags, open_data
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.objective import resolve_objective
from guided_diffusion.options.segmentation import (
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    dead_flags,
    run_options,
)
from guided_diffusion.script_util import frame_for, network_for


class Trained(NamedTuple):
    """A checkpoint, its file, and the flags completed by what it records."""

    checkpoint: Checkpoint
    path: Path
    flags: Flags

    @property
    def is_own(self) -> bool:
        """Whether the checkpoint describes itself; bare weights of others do not."""
        return bool(self.checkpoint.options)


@dataclass(frozen=True)
class SampleSetup:
    """Everything that sampling needs.

    Attributes:
        trained: the checkpoint.
        options: how masks are drawn; ``steps`` counts evaluations, 0 for the sampler's default.
        respacing: ``--timestep_respacing`` of this run, where it was given.
        run: folder, seed, device and precision.
        network: of the checkpoint.
        diffusion: that it was trained for.
        classes: what the mask's channels are; None for one of everything.
        frame: how cases reach the network's size.
        normalise: how the pixels of files were scaled in training.
        dataset: the cases to segment; None if only the model is needed.
        notes: messages to log before anything is drawn.
    """

    trained: Trained
    options: SamplingOptions
    respacing: str
    run: RunOptions
    network: NetworkOptions
    diffusion: DiffusionOptions
    classes: Classes | None
    frame: Frame
    normalise: str
    dataset: SegmentationDataset | None
    notes: tuple[str, ...]


def load_trained(
    path: str | Path, flags: Flags, *, flag: str = "--model_path", kind: str = SEGMENTATION
) -> Trained:
    """Load a checkpoint of a kind, or a folder's latest one, and resolve the flags by it.

    Bare weights are taken as trained on ``--trained_steps`` steps, 1000 by default.

    Raises:
        UserError: no checkpoint of that kind there (``flag`` names the path), or flags that
            contradict it.
    """
    found = latest_checkpoint(path, flag=flag)
    checkpoint = load_checkpoint(found)
    require_kind(checkpoint, kind, found)
    flags, trained = normalise_flags(flags), recorded_flags(checkpoint)
    passing, steps = ("diffusion_steps", "timestep_respacing"), flags.get("trained_steps", 0)
    if checkpoint.options:
        trained["trained_steps"] = trained["diffusion_steps"] if steps else 0
    else:
        trained |= {"diffusion_steps": steps or 1000, "timestep_respacing": ""}
    flags.refuse_contradictions(trained, found, passing=passing)
    return Trained(checkpoint, found, flags.with_resolved(**trained))


def resolve_sampling(flags: Flags, *, model: str | Path | None = None) -> SampleSetup:
    """Make the set-up of sampling; if ``model`` is given, it is loaded and no data are opened.

    Raises:
        UserError: flags, checkpoint and data that do not belong together.
    """
    options, run = flags.group(SamplingOptions), run_options(flags, RunOptions)
    trained = load_trained(
        options.model_path if model is None else model,
        flags,
        flag="--model_path" if model is None else "path",
    )
    known = trained.flags
    crop, dataset = known.get("crop", "auto"), None
    if model is None:
        dataset = open_data(known.group(SampleDataOptions), part="testing", test=True)
        network = network_for(dataset, known, trained.path if trained.is_own else None)
        case = next(readable(dataset, range(len(dataset))), None) or dataset[0]
        frame, _ = frame_for(dataset, network, crop, case=case)
    else:
        network = known.group(NetworkOptions)
        frame = Frame(network.image_size, WOLLEB_CROP if crop == "wolleb" else 0)
    _refuse_coarse(options, network)
    diffusion = resolve_objective(known, network.version)
    options = replace(
        options,
        steps=chosen_steps(flags, options.steps),
        mask_temperature=options.mask_temperature or _fitted_temperature(trained),
    )
    options = _of_one_answer(options, flags, network, diffusion, trained.path)
    normalise = known.get("normalise", "auto")
    outcome = {**vars(options), "sampler": sampler_of(options), "version": network.version}
    return SampleSetup(
        trained=trained,
        options=options,
        respacing=flags.given.get("timestep_respacing", ""),
        run=run,
        network=network,
        diffusion=diffusion,
        classes=find_classes(known.get("mask_labels", "")),
        frame=frame,
        normalise="none" if normalise == "auto" else normalise,
        dataset=dataset,
        notes=(*dead_flags(flags, outcome), *(dataset.notes if dataset else ())),
    )


def chosen_steps(flags: Flags, steps: int) -> int:
    """Count the network evaluations that the flags ask for; 0 where they leave it open.

    ``--steps`` wins, then ``--timestep_respacing`` (which leaves the count open), then a given
    ``--diffusion_steps``.
    """
    respaced = flags.given.get("timestep_respacing", "")
    return steps or (0 if respaced else flags.given.get("diffusion_steps", 0))


def _fitted_temperature(trained: Trained) -> float:
    """Return the temperature of fused masks that the last validation of training fitted."""
    fitted = trained.checkpoint.training.get("best", {}).get("mask_temperature")
    if not isinstance(fitted, float):
        raise UserError(
            "--mask_temperature 0",
            f"{trained.path} holds no temperature, since its training had no validation",
            "Train with --val_dir, or omit --mask_temperature.",
        )
    return fitted


def _of_one_answer(
    options: SamplingOptions,
    flags: Flags,
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    path: Path,
) -> SamplingOptions:
    """Settle how the one answer without a noisy mask is asked for, where that is meant.

    A plain U-Net has no other answer. One answer makes one member.

    Raises:
        UserError: flags that only a diffusion can have, or an answer that the network cannot give.
    """
    is_unet = network.version == "unet"
    if is_unet:
        walks = {
            "sampler": options.sampler not in ("", "direct"),
            "use_ddim": options.use_ddim,
            "dpm_solver": options.dpm_solver,
            "eta": bool(options.eta),
            "timestep_respacing": bool(flags.given.get("timestep_respacing")),
            "mask_guidance": options.mask_guidance != 1,
            "temperature": options.temperature != 1,
        }
        for name in (name for name, given in walks.items() if given):
            raise UserError(
                f"--{name} {flags.given.get(name, getattr(options, name, ''))}",
                f"concerns a diffusion, but {path} is a plain U-Net (--version unet), which has "
                "one answer and draws no noise",
                f"Omit --{name}.",
            )
        options = replace(options, sampler="direct")
    elif not diffusion.mask_dropout:
        for name, asked in (
            ("sampler", options.sampler == "direct"),
            ("mask_guidance", options.mask_guidance != 1),
        ):
            if asked:
                raise UserError(
                    f"--{name} {getattr(options, name)}",
                    f"needs the answer without a noisy mask, but {path} was trained with one in "
                    "every draw",
                    "Train with --mask_dropout 0.5; --steps 1 --use_ddim True is one evaluation "
                    "from noise.",
                )
    if options.sampler != "direct":
        return options
    cause = f"{path} is a plain U-Net, which" if is_unet else "--sampler direct"
    other = "" if is_unet else ", or --sampler direct"
    if options.steps > 1:
        name = "steps" if flags.given.get("steps") else "diffusion_steps"
        raise UserError(
            f"--{name} {options.steps}",
            f"{cause} answers in one evaluation, without a noisy mask",
            f"Omit --{name}{other}.",
        )
    if options.mask_guidance != 1 and not is_unet:
        raise UserError(
            f"--mask_guidance {options.mask_guidance}",
            "says how far the noisy mask is trusted, which --sampler direct withholds",
            "Omit one of the two.",
        )
    if options.num_ensemble > 1 and "num_ensemble" in flags.given:
        raise UserError(
            f"--num_ensemble {options.num_ensemble}",
            f"{cause} draws no noise, so that all masks would be equal",
            f"Omit --num_ensemble{other}.",
        )
    measure = flags.given.get("uncertainty", "entropy")  # the deviation of one mask is 0
    return replace(options, num_ensemble=1, steps=1, uncertainty=measure)


def _refuse_coarse(options: SamplingOptions, network: NetworkOptions) -> None:
    """Raise a UserError where a coarse mask is asked for and there is none."""
    if options.coarse != "none" and network.version in ("plain", "unet"):
        raise UserError(
            f"--coarse {options.coarse}",
            f"the {network.version} network has no coarse mask",
            "Omit --coarse.",
        )
