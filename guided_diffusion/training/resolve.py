"""Resolve flags into everything that a training run needs.

A checkpoint that is continued brings the flags it was trained with, the data bring their channels
and classes; a given flag that contradicts either is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset

from guided_diffusion.checkpoint import (
    LATEST,
    SEGMENTATION,
    Checkpoint,
    adapt_weights,
    latest_checkpoint,
    link_as,
    load_checkpoint,
    load_weights,
    missing_weights_note,
    with_companions,
    without_values,
)
from guided_diffusion.data.advice import intensity_notes, mask_notes
from guided_diffusion.data.batches import Batch, Foreground, TrainingBatch, prepare_masks
from guided_diffusion.data.cache import GIB, CachedDataset
from guided_diffusion.data.datasets import Case, SegmentationDataset, raters_text, read_as
from guided_diffusion.data.folders import counted
from guided_diffusion.data.frames import ResizedDataset
from guided_diffusion.data.splits import narrowed, read_split
from guided_diffusion.dist_util import (
    dev,
    memory_order_note,
    place_model,
    rank,
    setup_dist,
    world_size,
)
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Losses
from guided_diffusion.inference.launching import launch
from guided_diffusion.inference.provenance import note_run, other_settings, run_record
from guided_diffusion.inference.recorded import checked_flags
from guided_diffusion.inference.run_lock import TRAINING, refuse_second_run
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import normalise_flags, open_data, open_validation
from guided_diffusion.logger import Sink
from guided_diffusion.options.flags import Flags, numbers, recorded
from guided_diffusion.options.objective import resolve_objective
from guided_diffusion.options.presets import preset_notes, refuse_other_preset
from guided_diffusion.options.segmentation import (
    DataOptions,
    RunOptions,
    TrainingOptions,
    WatchOptions,
    dead_flags,
    run_options,
)
from guided_diffusion.report.curves import draw_curves
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model,
    frame_for,
    network_for,
)
from guided_diffusion.training.estimates import attention_notes, check_size
from guided_diffusion.training.foreground import resolve_foreground
from guided_diffusion.training.live import live_sinks
from guided_diffusion.training.sharded import shard_network
from guided_diffusion.training.steps import refuse_graphs
from guided_diffusion.training.validation import (
    Validate,
    make_validation,
    validation_notes,
    validation_plan,
)

Training = TypeVar("Training", bound=TrainingOptions)


@dataclass(frozen=True)
class TrainSetup:
    """Everything that a training run needs.

    Attributes:
        net: on its device, with the weights that the run continues.
        diffusion: what is predicted, and how it is scored.
        dataset: cases at the network's size.
        options: of the loop.
        run: folder, seed and precision.
        watch: when to validate, and when to stop early.
        recorded: the flags that checkpoints record.
        data: the data in words, for the log.
        start: the checkpoint that is continued, and ``path`` its file; None for a new run.
        missing: parameters that bare weights lacked.
        foreground: the cases to draw more often than the others, if any.
        prepare_batch: separates what is diffused from the condition.
        losses: scores the network itself; None for the diffusion's, of a U-Net that encodes the
            condition.
        validate: scores averaged weights; called in the first process alone.
        alias: a second name for the latest checkpoint.
        sinks: live displays of the run.
        notes: messages to log before it starts.
        record: what would repeat the run; empty in all processes but the first.
    """

    net: torch.nn.Module
    diffusion: GaussianDiffusion
    dataset: Dataset[Case]
    options: TrainingOptions
    run: RunOptions
    recorded: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    watch: WatchOptions = field(default_factory=WatchOptions)
    start: Checkpoint | None = None
    path: Path | None = None
    missing: Sequence[str] = ()
    foreground: Foreground | None = None
    prepare_batch: Callable[[Batch], TrainingBatch] = prepare_masks
    losses: Losses | None = None
    validate: Validate | None = None
    alias: Path | None = None
    sinks: Sequence[Sink] = ()
    notes: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def announce(self) -> list[str]:
        """Write the record of the run, and return what is to be said before it starts."""
        if not self.record:
            return list(self.notes)
        note_run(expanded(self.run.out_dir), self.record)
        changes = other_settings(self.start.run, self.record) if self.start else ""
        return [*self.notes, *([f"continued with other settings: {changes}"] if changes else [])]

    def after_save(self) -> None:
        """Draw the curves, and give the latest checkpoint its second name, if it has one."""
        folder = expanded(self.run.out_dir)
        if self.alias and (folder / LATEST).exists():  # not where only the best has been written
            link_as(folder / LATEST, self.alias)
        draw_curves(folder / "progress.csv", folder / "curves.png")


class Beginning(NamedTuple):
    """What is known before the data are opened: options, and the checkpoint to continue, if any.

    ``flags`` are resolved by what that checkpoint records.
    """

    flags: Flags
    options: Any
    run: RunOptions
    path: Path | None
    start: Checkpoint | None


def begin(
    flags: Flags, training: type[Training], running: type[RunOptions], kind: str, folder: str = ""
) -> Beginning:
    """Check options, join the other processes, and find what to continue.

    The checkpoint has to be of a ``kind``; the run works in a ``folder`` below ``--out_dir``.

    Raises:
        UserError: options that no run can have or that contradict the checkpoint, or another
            training in the folder.
    """
    options, run = training_options(flags, training), run_options(flags, running)
    run = replace(run, out_dir=str(Path(run.out_dir) / folder)) if folder else run
    launch(run.multi_gpu, flags.command)
    setup_dist()
    refuse_second_run(expanded(run.out_dir), TRAINING)
    path, start = checkpoint_to_resume(options, run)
    if start and path:
        trained = checked_flags(start, kind, path)
        if "dropout" in flags.given:  # it may change on the way
            trained.pop("dropout", None)
        normalise_flags(flags).refuse_contradictions(trained, path)
        refuse_other_preset(flags, trained, path)
        flags = flags.with_resolved(**trained)
    return Beginning(flags, options, run, path, start)


def resolve_training(flags: Flags) -> TrainSetup:
    """Make the set-up of a segmentation run.

    Raises:
        UserError: flags, data and checkpoint that do not belong together.
    """
    given = flags
    flags, options, run, path, start = begin(flags, TrainingOptions, RunOptions, SEGMENTATION)
    watch, data = flags.group(WatchOptions), flags.group(DataOptions)
    options = replace(options, rater_choice=flags.get("rater_choice", options.rater_choice))

    # The data: cases to train on, and those to validate on.
    dataset = open_data(data)
    held_out = held_out_cases(watch, data, dataset) if rank() == 0 else None
    if data.split:
        dataset = narrowed(dataset, data.split, "training")

    # The network and its diffusion.
    network = network_for(dataset, flags, path)
    if held_out is not None:
        held_out.convert_to(dataset.channels)
    options_of_diffusion = resolve_objective(flags, network.version)
    frame, crop = frame_for(dataset, network, data.crop, case=dataset[0])
    device = dev(run.gpu_dev)
    make = partial(create_model, network, options_of_diffusion, dataset.classes)
    sharded = check_size(
        network, options_of_diffusion, options, classes=dataset.classes, device=device
    )
    undivided = options.fsdp == "on" and not sharded
    torch.manual_seed(run.seed)
    missing: list[str] = []
    if sharded:
        refuse_undivided(run, start, path)
        net = shard_network(make, device, new=start is None)
    else:
        net = make()
        if start and path:
            start = load_checkpoint(path) if without_values(start.model) else start
            start, missing = adapt_weights(start, net, training=True)
            load_weights(net, start.model, path)
        net = place_model(net, device, compile=run.compile, training=True)
    process = create_gaussian_diffusion(options_of_diffusion, network.version, dataset.classes)

    # Validation, by a copy of the network.
    sinks = live_sinks(flags, options, run)
    validation = None
    if held_out or sinks:
        copy = place_model(make(), device)
        plan = validation_plan(watch, run, process, device)
        segmenter = Segmenter(copy, process, frame=frame, plan=plan, classes=dataset.classes)
        validation = make_validation(segmenter, dataset, held_out, watch, run)

    resized = ResizedDataset(dataset, frame)
    foreground, foreground_notes = resolve_foreground(dataset, frame, options)
    cached = CachedDataset(resized, most_bytes=round(options.cache_gib * GIB))
    kept = {
        **recorded(network, replace(options_of_diffusion, coarse_loss=process.coarse_loss)),
        "crop": crop,
        "mask_labels": str(dataset.classes or ""),
        "rater_choice": options.rater_choice,
        **read_as(dataset),
    }
    return TrainSetup(
        net=net,
        diffusion=process,
        dataset=cached,
        options=options,
        run=run,
        recorded=kept,
        record=run_record(flags, data=data.data_dir, values=kept, gpu_dev=run.gpu_dev),
        data=str(dataset),
        watch=watch,
        start=start,
        path=path,
        missing=missing,
        foreground=foreground,
        validate=validation,
        sinks=sinks,
        notes=[
            *([missing_weights_note(missing, training=True)] if missing else []),
            *overwriting_notes(run, start),
            *preset_notes(given),
            *(["--fsdp on has no effect: there is one process"] if undivided else []),
            *dead_flags(given, vars(network)),
            *(attention_notes(network) if given.get("attention_resolutions") else []),
            *dataset.notes,
            *rater_notes(dataset, options, chosen="rater_choice" in given.given),
            *([cached.note] if cached.note else []),
            *foreground_notes,
            *mask_notes(dataset),
            *(intensity_notes(dataset) if rank() == 0 else []),
            *objective_notes(process),
            memory_order_note(device),
            *validation_notes(validation),
        ],
    )


def refuse_undivided(run: RunOptions, start: Checkpoint | None, path: Path | None) -> None:
    """Raise a UserError for what a network that is divided among processes cannot have."""
    hint = "Omit it, or use --fsdp off where a copy fits into each device."
    if run.compile:
        raise UserError(f"--compile {run.compile}", "does not work on a divided network", hint)
    if start and not start.options:
        problem = "are bare weights, and a divided network continues from checkpoints alone"
        raise UserError(path, problem, "Use --fsdp off where a copy fits into each device.")


def objective_notes(diffusion: GaussianDiffusion) -> list[str]:
    """Say where Dice counts, if that is nearly nowhere."""
    if diffusion.mask_loss != "dice_ce" or diffusion.mask_dropout:
        return []
    return [
        "--mask_loss dice_ce adds Dice at the last timestep alone; with --mask_dropout 0.5 it "
        "counts in half of the draws"
    ]


def rater_notes(
    dataset: SegmentationDataset, options: TrainingOptions, *, chosen: bool
) -> list[str]:
    """Say how cases with several raters are trained on, or that there are none."""
    raters = raters_text(dataset.entries)
    if not raters:
        return ["--rater_choice has no effect: no case has several masks"] if chosen else []
    return [f"{raters}; trained on by --rater_choice {options.rater_choice}"]


def training_options(flags: Flags, kind: type[Training]) -> Training:
    """Make the options of the loop; ``--lr_anneal_steps`` without ``--max_steps`` ends it, too.

    Raises:
        UserError: options that no loop can have.
    """
    options = flags.group(kind)
    rates = numbers("ema_rate", options.ema_rate, float)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(
            f"--ema_rate {options.ema_rate!r}",
            "decay rates lie between 0 and 1, separated by commas",
            "Omit it for 0.9999.",
        )
    refuse_graphs(flags.get("compile", ""), options, cuda=torch.cuda.is_available())
    if options.lr_anneal_steps and "max_steps" not in flags.given:
        return replace(options, max_steps=options.lr_anneal_steps)
    return options


def checkpoint_to_resume(
    options: TrainingOptions, run: RunOptions
) -> tuple[Path | None, Checkpoint | None]:
    """Find what to continue from: a named checkpoint, or, with resume auto, the folder's latest."""
    own = expanded(run.out_dir, flag="--out_dir") / LATEST
    if options.resume_checkpoint:
        path = latest_checkpoint(options.resume_checkpoint, flag="--resume_checkpoint")
    elif own.exists() and options.resume == "auto":
        path = own
    else:
        return None, None
    start = load_checkpoint(path, on_disk=world_size() > 1)
    if not start.options:
        start = with_companions(start, path, options.ema_rate.split(","))
    return path, start


def overwriting_notes(run: RunOptions, start: Checkpoint | None) -> list[str]:
    """Warn of a checkpoint that a new run will overwrite."""
    own = expanded(run.out_dir, flag="--out_dir") / LATEST
    if start or not own.exists():
        return []
    return [f"{own} exists and will be overwritten; --resume auto would continue it"]


def held_out_cases(
    watch: WatchOptions, data: DataOptions, dataset: SegmentationDataset
) -> SegmentationDataset | None:
    """Open the cases to validate on: a folder's, else the validation part of split or data, if any.

    Raises:
        UserError: there are none although ``--patience`` needs them, or they do not fit.
    """
    if watch.val_dir:
        held_out = open_data(replace(data, data_dir=watch.val_dir), test=True)
    elif data.split and "validation" in read_split(data.split).values():
        held_out = narrowed(dataset, data.split, "validation")
    elif not data.split and (own := open_validation(data)):
        held_out = own
    elif watch.patience:
        raise UserError(
            f"--patience {watch.patience}",
            "there are no cases to validate on",
            "Name them with --val_dir, or omit --patience.",
        )
    else:
        return None
    held_out.convert_to(dataset.channels)
    if held_out.channels != dataset.channels:
        raise UserError(
            f"--val_dir {held_out.directory}",
            f"its images have {counted(held_out.channels, 'channel')}, those of "
            f"{dataset.directory} have {dataset.channels}",
            "Validate on data like that of training.",
        )
    return held_out
