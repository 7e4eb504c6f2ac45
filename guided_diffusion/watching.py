"""How a training run is watched: the cases it is validated on, and the sinks that show it.

From flags to a :class:`Validation` and to sinks; wired by ``runs``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from guided_diffusion.datasets import Reading, SegmentationDataset
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options import DataOptions, RunOptions, SamplingOptions, WatchOptions
from guided_diffusion.plan import Plan, make_plan
from guided_diffusion.segmenter import Segmenter
from guided_diffusion.sinks import TensorBoardSink, VisdomSink
from guided_diffusion.splits import narrowed, read_split
from guided_diffusion.validation import Validation, chosen_cases


def validation_plan(
    watch: WatchOptions, run: RunOptions, diffusion: GaussianDiffusion, device: torch.device
) -> Plan:
    """How the masks of a validation are drawn: two a case, in few evaluations."""
    steps = min(watch.val_steps, len(diffusion.kept))
    sampling = SamplingOptions(sampler="dpm_solver++", steps=steps, num_ensemble=2)
    uncompiled = replace(run, compile="")
    return make_plan(sampling, uncompiled, diffusion, {}, device=device, own=True)


def make_validation(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    held_out: SegmentationDataset | None,
    watch: WatchOptions,
    run: RunOptions,
) -> Validation:
    """Validate on some held-out cases; without any, only film one training case."""
    if held_out is None:
        return Validation(segmenter, [dataset[0]], folder=None)
    folder = Path(run.out_dir).expanduser() / "validation"
    return Validation(segmenter, chosen_cases(held_out, watch.val_cases), folder=folder)


def validation_notes(validation: Validation | None) -> Iterator[str]:
    """Say what a run is validated on, and what it cannot draw."""
    if validation and validation.folder:
        yield (
            f"validation on {len(validation.cases)} cases, 2 masks each in "
            f"{validation.segmenter.plan.evaluations} evaluations"
        )
    if find_spec("matplotlib") is None:
        yield "no curves.png: python -m pip install matplotlib would draw it"


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
            mend="Name them with --val_dir, or leave --patience away.",
        )
    else:
        return None
    if held_out.channels != dataset.channels:
        raise UserError(
            "--val_dir",
            found=f"{held_out.channels} channels",
            expected=f"{dataset.channels}, those of {dataset.directory}",
            mend="Validate on data like that of training.",
        )
    return held_out


def open_sinks(watch: WatchOptions, run: RunOptions) -> Sequence[VisdomSink | TensorBoardSink]:
    """Where else the run is to be watched."""
    folder = Path(run.out_dir).expanduser()
    sinks: list[VisdomSink | TensorBoardSink] = []
    if watch.tensorboard:
        sinks.append(TensorBoardSink(folder))
    if watch.visdom:
        sinks.append(VisdomSink(watch.visdom, environment=page_of(run)))
    return sinks


def page_of(run: RunOptions) -> str:
    """The page of a visdom server that a run draws on."""
    return Path(run.out_dir).expanduser().name or "main"
