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
)
from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import SegmentationDataset, readable
from guided_diffusion.data.frames import WOLLEB_CROP, Frame
from guided_diffusion.errors import UserError
from guided_diffusion.inference.plan import sampler_of
from guided_diffusion.inference.recorded import checked_flags
from guided_diffusion.layouts import normalise_flags, open_data
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import (
    DiffusionOptions,
    NetworkOptions,
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
    flags, trained = normalise_flags(flags), checked_flags(checkpoint, kind, found)
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
    normalise = known.get("normalise", "auto")
    outcome = {**vars(options), "sampler": sampler_of(options), "version": network.version}
    return SampleSetup(
        trained=trained,
        options=replace(options, steps=chosen_steps(flags, options.steps)),
        respacing=flags.given.get("timestep_respacing", ""),
        run=run,
        network=network,
        diffusion=known.group(DiffusionOptions),
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


def _refuse_coarse(options: SamplingOptions, network: NetworkOptions) -> None:
    """Raise a UserError where a coarse mask is asked for and there is none."""
    if options.coarse != "none" and network.version == "plain":
        raise UserError(
            f"--coarse {options.coarse}", "the plain network has no coarse mask", "Omit --coarse."
        )
