"""Whether flags, checkpoint and data belong together, and what follows from them.

A checkpoint brings the flags it was trained with, the data brings its channels and classes; a typed
flag that contradicts either is refused. Called by ``runs``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from guided_diffusion.bratsloader import find_modalities
from guided_diffusion.checkpoint import (
    LATEST,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    version_of,
    with_companions,
)
from guided_diffusion.datasets import Case, Frame, SegmentationDataset, auto_frame
from guided_diffusion.errors import UserError
from guided_diffusion.options import (
    LATER,
    NetworkOptions,
    RunOptions,
    TrainingOptions,
    fill,
    numbers,
)
from guided_diffusion.plan import spelled
from guided_diffusion.script_util import count_masks, refuse_uneven_crop

Training = TypeVar("Training", bound=TrainingOptions)


def read_as(dataset: SegmentationDataset) -> dict[str, str]:
    """How a data set's images were read, as flags; a checkpoint remembers it."""
    return {"modalities": ",".join(dataset.modalities), "normalise": dataset.normalise}


def plainly(typed: dict[str, Any]) -> dict[str, Any]:
    """The typed flags, with modalities and classes called as a checkpoint calls them."""
    typed = spelled(typed)
    if not typed.get("modalities"):
        return typed
    return {**typed, "modalities": ",".join(find_modalities(typed["modalities"]))}


def settled(options: Training, typed: dict[str, Any]) -> Training:
    """Where only ``--lr_anneal_steps`` is typed, it says when to stop; refuse what cannot be."""
    rates = numbers("ema_rate", options.ema_rate, float)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(
            "--ema_rate",
            found=repr(options.ema_rate),
            expected="decay rates from 0 to 1, separated by commas",
            mend="Leave --ema_rate away for 0.9999.",
        )
    graphs = typed.get("compile") in ("reduce-overhead", "max-autotune")
    if graphs and options.microbatch > 0 and torch.cuda.is_available():
        raise UserError(
            "--compile",
            found=f"{typed['compile']} with --microbatch {options.microbatch}",
            expected="default, where gradients are added up: a replayed graph overwrites them",
            mend="Use --compile default, or leave --microbatch away.",
        )
    if options.lr_anneal_steps and "max_steps" not in typed:
        return replace(options, max_steps=options.lr_anneal_steps)
    return options


def checkpoint_to_resume(
    options: TrainingOptions, run: RunOptions
) -> tuple[Path | None, Checkpoint | None]:
    """Find what to continue from: a named checkpoint, or, with resume auto, the folder's own."""
    own = Path(run.out_dir).expanduser() / LATEST
    if options.resume_checkpoint:
        path = latest_checkpoint(options.resume_checkpoint, flag="--resume_checkpoint")
    elif own.exists() and options.resume == "auto":
        path = own
    else:
        return None, None
    start = load_checkpoint(path)
    if not start.options:
        start = with_companions(start, path, options.ema_rate.split(","))
    return path, start


def overwriting_notes(run: RunOptions, start: Checkpoint | None) -> list[str]:
    """Say what a run will overwrite, unless it continues something."""
    own = Path(run.out_dir).expanduser() / LATEST
    if start or not own.exists():
        return []
    return [f"{own} exists and will be overwritten; --resume auto would continue it"]


def trained_as(start: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its training; of bare weights the version is all that shows."""
    if start.options:
        return {**LATER, **start.options}
    return {"version": version_of(start.model)}


def network_for(
    dataset: SegmentationDataset, flags: dict[str, Any], path: Path | None
) -> NetworkOptions:
    """The network for a data set's channels; refuse what cannot segment it."""
    masks = count_masks(dataset.classes)
    expected = dataset.channels + masks
    if flags.get("in_ch", expected) != expected:
        raise UserError(
            path or "--in_ch",
            found=f"a network of {flags['in_ch']} input channels",
            expected=f"{expected}: {dataset.channels} of the images in {dataset.directory} "
            f"and {'the noisy mask' if masks == 1 else f'{masks} noisy masks'}",
            mend="Use data with the channels of training." if path else "Leave --in_ch away.",
        )
    if flags.get("class_cond"):
        raise UserError(
            "--class_cond",
            found="True",
            expected="False",
            mend="Segmentation has no class labels to condition on.",
        )
    return fill(NetworkOptions, {**flags, "in_ch": expected})


def frame_for(
    dataset: SegmentationDataset, network: NetworkOptions, flags: dict[str, Any], *, case: Case
) -> tuple[Frame, str]:
    """How cases of the size of this one reach the network's, and what a checkpoint calls that.

    Raises:
        UserError: the size does not suit.
    """
    height, width = case.image.shape[-2:]
    frame = auto_frame(
        dataset.layout,
        (height, width),
        version=network.version,
        image_size=network.image_size,
        crop=flags.get("crop", "auto"),
    )
    if frame.crop:
        refuse_uneven_crop(network, (height - 2 * frame.crop, width - 2 * frame.crop))
    return frame, "wolleb" if frame.crop else "none"
