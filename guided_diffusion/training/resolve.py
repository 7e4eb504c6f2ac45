"""Whether flags, checkpoint and data belong together, and what follows from them.

A checkpoint brings the flags it was trained with, the data brings its channels and classes; a typed
flag that contradicts either is refused. Called by ``runs``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from guided_diffusion.checkpoint import (
    LATEST,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    with_companions,
)
from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.splits import narrowed, read_split
from guided_diffusion.dist_util import rank
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import create_reading, open_dataset
from guided_diffusion.options.flags import fill, numbers
from guided_diffusion.options.segmentation import (
    DataOptions,
    RunOptions,
    TrainingOptions,
    WatchOptions,
)

Training = TypeVar("Training", bound=TrainingOptions)


def settled(options: Training, typed: dict[str, Any]) -> Training:
    """Where only ``--lr_anneal_steps`` is typed, it says when to stop; refuse what cannot be."""
    rates = numbers("ema_rate", options.ema_rate, float)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(
            "--ema_rate",
            found=repr(options.ema_rate),
            expected="decay rates from 0 to 1, separated by commas",
            hint="Leave --ema_rate away for 0.9999.",
        )
    graphs = typed.get("compile") in ("reduce-overhead", "max-autotune")
    if graphs and options.microbatch > 0 and torch.cuda.is_available():
        raise UserError(
            "--compile",
            found=f"{typed['compile']} with --microbatch {options.microbatch}",
            expected="default, where gradients are added up: a replayed graph overwrites them",
            hint="Use --compile default, or leave --microbatch away.",
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


def training_data(
    flags: dict[str, Any], watch: WatchOptions
) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Open the cases to train on, and those to validate on, if any."""
    data = fill(DataOptions, flags)
    reading = create_reading(data)
    dataset = open_dataset(data.data_dir, data_name=data.data_name, reading=reading)
    held_out = held_out_cases(watch, data, dataset, reading) if rank() == 0 else None
    if data.split:
        dataset = narrowed(dataset, data.split, "training")
    return dataset, held_out


def held_out_cases(
    watch: WatchOptions, data: DataOptions, dataset: SegmentationDataset, reading: Reading
) -> SegmentationDataset | None:
    """The cases to validate on: a folder's, else the validation part of the split, if any."""
    if watch.val_dir:
        held_out = open_dataset(watch.val_dir, data_name=data.data_name, test=True, reading=reading)
    elif data.split and "validation" in read_split(data.split).values():
        held_out = narrowed(dataset, data.split, "validation")
    elif watch.patience:
        raise UserError(
            "--patience",
            found=watch.patience,
            expected="cases to validate on",
            hint="Name them with --val_dir, or leave --patience away.",
        )
    else:
        return None
    if held_out.channels != dataset.channels:
        raise UserError(
            "--val_dir",
            found=f"{held_out.channels} channels",
            expected=f"{dataset.channels}, those of {dataset.directory}",
            hint="Validate on data like that of training.",
        )
    return held_out
