"""The composition root: what the three scripts do once their flags are read.

The one place that knows every name: :func:`train`, :func:`sample` and :func:`score` wire options,
data, networks and verbs together, and refuse what does not fit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from guided_diffusion import logger
from guided_diffusion.bratsloader import find_modalities
from guided_diffusion.cache import GIB, Remembered
from guided_diffusion.case_scores import Scoring
from guided_diffusion.check import look_at, write_sheet
from guided_diffusion.check import report as report_check
from guided_diffusion.checkpoint import (
    LATEST,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    version_of,
    with_companions,
)
from guided_diffusion.classes import Classes
from guided_diffusion.compare import compare_folders
from guided_diffusion.compare import report as report_comparison
from guided_diffusion.curves import draw_curves
from guided_diffusion.datasets import (
    Frame,
    Framed,
    Reading,
    SegmentationDataset,
    auto_frame,
)
from guided_diffusion.dist_util import describe, dev, launch, rank, setup_dist, total_gib
from guided_diffusion.errors import UserError
from guided_diffusion.evaluate import Evaluation, evaluate_all
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options import (
    LATER,
    SAMPLE,
    TRAIN,
    CheckOptions,
    DataOptions,
    DiffusionOptions,
    NetworkOptions,
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    ScoringOptions,
    TrainingOptions,
    WatchOptions,
    dead_flags,
    fill,
    numbers,
    recorded,
    refuse_contradictions,
)
from guided_diffusion.predict import segment
from guided_diffusion.provenance import described, note_sampling
from guided_diffusion.report import write_report
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    adopted,
    attention_notes,
    count_masks,
    create_gaussian_diffusion,
    create_model,
    create_reading,
    lacking_note,
    million,
    place,
    refuse_uneven_crop,
    training_gib,
)
from guided_diffusion.segmenter import (
    Plan,
    Segmenter,
    make_plan,
    settle_precision,
    spelled,
    trained_flags,
)
from guided_diffusion.sinks import TensorBoardSink, VisdomSink
from guided_diffusion.splits import narrowed, part_of_cases, read_split
from guided_diffusion.summary import report
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.validation import Validation, chosen_cases

Training = TypeVar("Training", bound=TrainingOptions)


def train(typed: dict[str, Any]) -> None:
    """Train on a data set: what ``segmentation_train.py`` does with the flags typed."""
    options = settled(fill(TrainingOptions, typed), typed)
    run, watch = settle_precision(fill(RunOptions, typed)), fill(WatchOptions, typed)
    launch(run.multi_gpu)
    setup_dist()
    path, start = checkpoint_to_resume(options, run)
    trained = _trained_as(start) if start else {}
    refuse_contradictions(_plainly(typed), trained, path)
    flags = {**typed, **trained}
    dataset, held_out = _training_data(flags, watch)
    network = _network_for(dataset, flags, path)
    diffusion = fill(DiffusionOptions, flags)
    frame, crop = _frame(dataset, network, flags)

    device = dev(run.gpu_dev)
    _say_if_large(network, diffusion, options, classes=dataset.classes, device=device)
    torch.manual_seed(run.seed)
    net = create_model(network, diffusion, dataset.classes)
    lacking: list[str] = []
    if start:
        start, lacking = adopted(start, net)
        load_weights(net, start.model, path)
    process = create_gaussian_diffusion(diffusion, network.version)
    sinks = _sinks(watch, run) if rank() == 0 else []
    validation = None
    if held_out or sinks:
        copy = place(create_model(network, diffusion, dataset.classes), device)
        plan = _validation_plan(watch, run, process, device)
        segmenter = Segmenter(copy, process, frame=frame, plan=plan, classes=dataset.classes)
        validation = _validation(segmenter, dataset, held_out, watch, run)
    out_dir = Path(run.out_dir).expanduser()
    loop = TrainLoop(
        place(net, device, compile=run.compile),
        process,
        dataset=Remembered(Framed(dataset, frame), most_bytes=round(options.cache_gib * GIB)),
        schedule_sampler=create_named_schedule_sampler(options.schedule_sampler, len(process.kept)),
        options=options,
        run=run,
        recorded={
            **recorded(network, replace(diffusion, coarse_loss=process.coarse_loss)),
            "crop": crop,
            "mask_labels": str(dataset.classes or ""),
            **_read_as(dataset),
        },
        watch=watch,
        validate=validation,
        after_save=lambda: draw_curves(out_dir / "progress.csv", out_dir / "curves.png"),
    )

    logger.configure(None if rank() else run.out_dir, quiet=rank() > 0, sinks=sinks)
    if start:
        loop.restore(start, lacking=lacking)
        logger.log(f"resuming {path} at step {start.step}")
    if lacking:
        logger.log(lacking_note(lacking))
    attention = attention_notes(network) if "attention_resolutions" in typed else []
    for note in [*dead_flags(TRAIN, typed), *attention, *dataset.notes, *_notes(validation)]:
        logger.log(note)
    logger.log(
        f"{dataset}; {million(net)} on {describe(device)}, {run.precision}; "
        f"steps {loop.step} to {loop.last_step or 'no end'}"
    )
    try:
        loop.run_loop()
    finally:
        for sink in sinks:
            sink.close()


LARGE_GIB = 8.0
"""Training that holds more than this before any activation is told so before it is built."""


def _say_if_large(
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    options: TrainingOptions,
    *,
    classes: Classes | None,
    device: torch.device,
) -> None:
    """Say what a large network takes before it is built; refuse one that cannot fit."""
    with torch.device("meta"):
        net = create_model(network, diffusion, classes)
    averages = len(options.ema_rate.split(","))
    needed = training_gib(sum(parameter.numel() for parameter in net.parameters()), averages)
    says = (
        f"{million(net)}: weights, gradients, AdamW's moments and averages take {needed:.1f} GiB "
        "before any activation"
    )
    if needed > total_gib(device):
        raise UserError(
            "the network",
            found=says,
            expected=f"at most the {total_gib(device):.1f} GiB of {describe(device)}",
            mend="Use a larger device, or lower --num_channels or --num_res_blocks.",
        )
    if needed > LARGE_GIB and rank() == 0:
        logger.log(says)


def _training_data(
    flags: dict[str, Any], watch: WatchOptions
) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Open the cases to train on, and those to validate on, if any."""
    data = fill(DataOptions, flags)
    reading = create_reading(data)
    dataset = open_dataset(data.data_dir, data_name=data.data_name, reading=reading)
    held_out = _held_out(watch, data, dataset, reading) if rank() == 0 else None
    if data.split:
        dataset = narrowed(dataset, data.split, "training")
    return dataset, held_out


def _validation_plan(
    watch: WatchOptions, run: RunOptions, diffusion: GaussianDiffusion, device: torch.device
) -> Plan:
    """How the masks of a validation are drawn: two a case, in few evaluations."""
    steps = min(watch.val_steps, len(diffusion.kept))
    sampling = SamplingOptions(sampler="dpm_solver++", steps=steps, num_ensemble=2)
    uncompiled = replace(run, compile="")
    return make_plan(sampling, uncompiled, diffusion, {}, device=device, own=True)


def _validation(
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


def _notes(validation: Validation | None) -> Iterator[str]:
    if validation and validation.folder:
        yield (
            f"validation on {len(validation.cases)} cases, 2 masks each in "
            f"{validation.segmenter.plan.evaluations} evaluations"
        )
    if find_spec("matplotlib") is None:
        yield "no curves.png: python -m pip install matplotlib would draw it"


def _held_out(
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


def _sinks(watch: WatchOptions, run: RunOptions) -> Sequence[VisdomSink | TensorBoardSink]:
    """Where else the run is to be watched."""
    folder = Path(run.out_dir).expanduser()
    sinks: list[VisdomSink | TensorBoardSink] = []
    if watch.tensorboard:
        sinks.append(TensorBoardSink(folder))
    if watch.visdom:
        sinks.append(VisdomSink(watch.visdom, environment=_page(run)))
    return sinks


def _page(run: RunOptions) -> str:
    """The page of a visdom server that a run draws on."""
    return Path(run.out_dir).expanduser().name or "main"


def sample(typed: dict[str, Any]) -> None:
    """Draw, fuse and write masks: what ``segmentation_sample.py`` does with the flags typed."""
    options, run = fill(SamplingOptions, typed), fill(RunOptions, typed)
    launch(run.multi_gpu)
    setup_dist()
    sinks = [VisdomSink(options.visdom, environment=_page(run))] if options.visdom else []
    logger.configure(quiet=rank() > 0, sinks=sinks if rank() == 0 else [])
    for note in dead_flags(SAMPLE, typed):
        logger.log(note)
    dataset, segmenter, checkpoint = _loaded(typed)
    for note in [*dataset.notes, str(dataset), str(segmenter)]:
        logger.log(note)
    end = "_<class>" if segmenter.classes else ""
    out_dir, fingerprint = Path(run.out_dir).expanduser(), _fingerprint(segmenter, dataset)
    names = segment(
        segmenter,
        dataset,
        out_dir,
        fingerprint=fingerprint,
        num_samples=options.num_samples,
        debug=options.debug,
    )
    for sink in sinks:
        sink.close()
    if rank() == 0:
        note_sampling(
            out_dir,
            fingerprint,
            model=str(segmenter),
            seed=segmenter.plan.seed,
            options=checkpoint.options,
        )
    logger.log(
        f"{len(names)} cases in {run.out_dir}: <case>_mask.png, <case>_output_ens{end}.png, "
        f"<case>_uncertainty.png, <case>_overlay.png, <case>_output<i>{end}.png, predictions.csv"
    )


def load_segmenter(typed: dict[str, Any]) -> tuple[SegmentationDataset, Segmenter]:
    """Open the data and the model that the sampling flags name, and see that they fit."""
    return _loaded(typed)[:2]


def _loaded(typed: dict[str, Any]) -> tuple[SegmentationDataset, Segmenter, Checkpoint]:
    """Both, and the checkpoint itself."""
    path = latest_checkpoint(typed.get("model_path", ""))
    checkpoint = load_checkpoint(path)
    typed = _plainly(typed)
    flags = trained_flags(checkpoint, typed, path)
    data = fill(SampleDataOptions, typed)
    reading = create_reading(fill(DataOptions, flags))
    dataset = open_dataset(data.data_dir, data_name=data.data_name, test=True, reading=reading)
    if data.split:
        dataset = narrowed(dataset, data.split, "testing")
    network = _network_for(dataset, flags, path if checkpoint.options else None)
    frame, _ = _frame(dataset, network, flags)
    segmenter = Segmenter.build(checkpoint, path, network=network, frame=frame, flags=typed)
    return dataset, segmenter, checkpoint


def score(typed: dict[str, Any]) -> None:
    """Score masks against the truth: what ``segmentation_env.py`` does with the flags typed."""
    options = fill(ScoringOptions, typed)
    if options.compare:
        first, second = (_scored(options, folder) for folder in options.compare)
        print(report_comparison(compare_folders(first, second)))
        print(f"written: {second.folder / 'comparison.json'}, and the scores of both folders")
        return
    evaluation = _scored(options, options.inp_pth)
    written = ["summary.json", "scores.csv"]
    if options.report:
        written.append(write_report(evaluation, described(evaluation.folder)).name)
    print(report(evaluation.summary))
    print(f"written: {', '.join(str(Path(options.inp_pth) / name) for name in written)}")
    overlays = sorted(evaluation.folder.glob("*_overlay.png"))
    if overlays:
        print(f"look at: {overlays[0]} and {len(overlays) - 1} more")


def _scored(options: ScoringOptions, folder: str) -> Evaluation:
    """Score one folder as the flags say."""
    return evaluate_all(
        folder,
        options.out_pth,
        scoring=Scoring(options.empty, options.tolerance, options.low_dice),
        partial=options.partial,
        mask_labels=options.mask_labels,
        raters=[rater for rater in options.raters.split(",") if rater],
    )


def check(typed: dict[str, Any]) -> None:
    """Look at a folder: what ``check_data.py`` does with the flags typed; problems exit with 2."""
    data, options = fill(DataOptions, typed), fill(CheckOptions, typed)
    findings = look_at(
        lambda: open_dataset(
            data.data_dir,
            data_name=data.data_name,
            test=not options.labelled,
            reading=create_reading(data),
        ),
        image_size=options.image_size,
        crop=data.crop,
        workers=options.num_workers,
        parts_of=(lambda dataset: part_of_cases(dataset, data.split)) if data.split else None,
    )
    print(report_check(findings))
    if options.out:
        out = Path(options.out).expanduser()
        print(f"{write_sheet(findings, out, cases=options.cases)} cases drawn on {out}")
    if findings.problems:
        sys.exit(2)


def _read_as(dataset: SegmentationDataset) -> dict[str, str]:
    """How a data set's images were read, as flags; a checkpoint remembers it."""
    return {"modalities": ",".join(dataset.modalities), "normalise": dataset.normalise}


def _fingerprint(segmenter: Segmenter, dataset: SegmentationDataset) -> str:
    """Everything that the masks depend on, the way images are read included."""
    text = f"{segmenter.fingerprint} {_read_as(dataset)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plainly(typed: dict[str, Any]) -> dict[str, Any]:
    """The typed flags, with modalities and classes called as a checkpoint calls them."""
    typed = spelled(typed)
    if not typed.get("modalities"):
        return typed
    return {**typed, "modalities": ",".join(find_modalities(typed["modalities"]))}


def settled(options: Training, typed: dict[str, Any]) -> Training:
    """Where only ``--lr_anneal_steps`` is typed, it says when to stop; refuse impossible rates."""
    rates = numbers("ema_rate", options.ema_rate, float)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(
            "--ema_rate",
            found=repr(options.ema_rate),
            expected="decay rates from 0 to 1, separated by commas",
            mend="Leave --ema_rate away for 0.9999.",
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
        if own.exists():
            logger.log(f"{own} exists and will be overwritten; --resume auto would continue it")
        return None, None
    start = load_checkpoint(path)
    if not start.options:
        start = with_companions(start, path, options.ema_rate.split(","))
    return path, start


def _trained_as(start: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its training; of bare weights the version is all that shows."""
    if start.options:
        return {**LATER, **start.options}
    return {"version": version_of(start.model)}


def _network_for(
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


def _frame(
    dataset: SegmentationDataset, network: NetworkOptions, flags: dict[str, Any]
) -> tuple[Frame, str]:
    """How cases reach the network's size, and the word for it that a checkpoint remembers."""
    height, width = dataset[0].image.shape[-2:]
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
