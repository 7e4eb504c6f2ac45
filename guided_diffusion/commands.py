"""The composition root: what the three scripts do once their flags are read.

The one place that knows every name: :func:`train`, :func:`sample` and :func:`score` wire options,
data, networks and verbs together, and refuse what does not fit.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    Checkpoint,
    adapt_weights,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    missing_weights_note,
    trained_as,
)
from guided_diffusion.data.cache import GIB, CachedDataset
from guided_diffusion.data.datasets import ResizedDataset, SegmentationDataset, read_as, readable
from guided_diffusion.data.splits import narrowed, part_of_cases
from guided_diffusion.dist_util import describe, dev, launch, place_model, rank, setup_dist
from guided_diffusion.inference.plan import sampler_of
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.provenance import describe_run, note_sampling
from guided_diffusion.inference.resolve import trained_flags
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import create_reading, open_dataset, plainly
from guided_diffusion.options.flags import fill, recorded, refuse_contradictions
from guided_diffusion.options.segmentation import (
    SAMPLE,
    TRAIN,
    DataOptions,
    DiffusionOptions,
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    ScoringOptions,
    TrainingOptions,
    WatchOptions,
    dead_flags,
    settle_precision,
)
from guided_diffusion.options.tools import CheckOptions
from guided_diffusion.report.curves import draw_curves
from guided_diffusion.report.report import write_report
from guided_diffusion.report.sinks import VisdomSink, open_sinks, page_of
from guided_diffusion.report.thumbnails import CaseLayers
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.scoring.case_scores import Scoring
from guided_diffusion.scoring.compare import compare_folders, comparison_text
from guided_diffusion.scoring.evaluate import Evaluation, OnCase, evaluate_all
from guided_diffusion.scoring.summary import summary_text
from guided_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model,
    frame_for,
    network_for,
    parameter_count,
)
from guided_diffusion.tools.inspect import findings_text, look_at, write_sheet
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.estimates import attention_notes, check_size
from guided_diffusion.training.resolve import (
    checkpoint_to_resume,
    overwriting_notes,
    settled,
    training_data,
)
from guided_diffusion.training.validation import make_validation, validation_notes, validation_plan


def train(typed: dict[str, Any]) -> None:
    """Train on a data set: what ``segmentation_train.py`` does with the flags typed."""
    options = settled(fill(TrainingOptions, typed), typed)
    run, watch = settle_precision(fill(RunOptions, typed), typed), fill(WatchOptions, typed)
    launch(run.multi_gpu)
    setup_dist()
    path, start = checkpoint_to_resume(options, run)
    trained = trained_as(start) if start else {}
    refuse_contradictions(plainly(typed), trained, path)
    flags = {**typed, **trained}
    dataset, held_out = training_data(flags, watch)
    network = network_for(dataset, flags, path)
    diffusion = fill(DiffusionOptions, flags)
    frame, crop = frame_for(dataset, network, flags, case=dataset[0])

    device = dev(run.gpu_dev)
    check_size(network, diffusion, options, classes=dataset.classes, device=device)
    torch.manual_seed(run.seed)
    net = create_model(network, diffusion, dataset.classes)
    lacking: list[str] = []
    if start:
        start, lacking = adapt_weights(start, net, training=True)
        load_weights(net, start.model, path)
    process = create_gaussian_diffusion(diffusion, network.version)
    sinks = open_sinks(watch, run) if rank() == 0 else []
    validation = None
    if held_out or sinks:
        copy = place_model(create_model(network, diffusion, dataset.classes), device)
        plan = validation_plan(watch, run, process, device)
        segmenter = Segmenter(copy, process, frame=frame, plan=plan, classes=dataset.classes)
        validation = make_validation(segmenter, dataset, held_out, watch, run)
    out_dir = Path(run.out_dir).expanduser()
    loop = TrainLoop(
        place_model(net, device, compile=run.compile),
        process,
        dataset=CachedDataset(
            ResizedDataset(dataset, frame), most_bytes=round(options.cache_gib * GIB)
        ),
        schedule_sampler=create_named_schedule_sampler(options.schedule_sampler, len(process.kept)),
        options=options,
        run=run,
        recorded={
            **recorded(network, replace(diffusion, coarse_loss=process.coarse_loss)),
            "crop": crop,
            "mask_labels": str(dataset.classes or ""),
            **read_as(dataset),
        },
        watch=watch,
        validate=validation,
        after_save=lambda: draw_curves(out_dir / "progress.csv", out_dir / "curves.png"),
    )

    logger.configure(None if rank() else run.out_dir, quiet=rank() > 0, sinks=sinks)
    if start:
        loop.restore(start, path=path, lacking=lacking)
        logger.log(f"resuming {path} at step {start.step}")
    if lacking:
        logger.log(missing_weights_note(lacking, training=True))
    attention = attention_notes(network) if "attention_resolutions" in typed else []
    for note in [
        *overwriting_notes(run, start),
        *dead_flags(TRAIN, typed, vars(network)),
        *attention,
        *dataset.notes,
        *validation_notes(validation),
    ]:
        logger.log(note)
    logger.log(
        f"{dataset}; {parameter_count(net)} on {describe(device)}, {run.precision}; "
        f"steps {loop.step} to {loop.last_step or 'no end'}"
    )
    try:
        loop.run_loop()
    finally:
        for sink in sinks:
            sink.close()


def sample(typed: dict[str, Any]) -> None:
    """Draw, fuse and write masks: what ``segmentation_sample.py`` does with the flags typed."""
    options, run = fill(SamplingOptions, typed), fill(RunOptions, typed)
    launch(run.multi_gpu)
    setup_dist()
    sinks = [VisdomSink(options.visdom, environment=page_of(run))] if options.visdom else []
    logger.configure(quiet=rank() > 0, sinks=sinks if rank() == 0 else [])
    dataset, segmenter, checkpoint = _loaded(typed)
    version = trained_as(checkpoint)["version"]
    settled = {**vars(options), "sampler": sampler_of(options), "version": version}
    dead = dead_flags(SAMPLE, typed, settled)
    for note in [*dead, *dataset.notes, str(dataset), str(segmenter)]:
        logger.log(note)
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
    end = "_<class>" if segmenter.classes else ""
    kinds = ["mask", f"output_ens{end}", "uncertainty", "overlay", f"output<i>{end}"]
    kinds += ([] if version == "plain" else [f"coarse{end}"]) + ["debug"] * options.debug
    files = ", ".join(f"<case>_{kind}.png" for kind in kinds)
    logger.log(f"{len(names)} cases in {run.out_dir}: {files}, predictions.csv")


def load_segmenter(typed: dict[str, Any]) -> tuple[SegmentationDataset, Segmenter]:
    """Open the data and the model that the sampling flags name, and see that they fit."""
    return _loaded(typed)[:2]


def _loaded(typed: dict[str, Any]) -> tuple[SegmentationDataset, Segmenter, Checkpoint]:
    """Both, and the checkpoint itself."""
    path = latest_checkpoint(typed.get("model_path", ""))
    checkpoint = load_checkpoint(path)
    typed = plainly(typed)
    flags = trained_flags(checkpoint, typed, path)
    data = fill(SampleDataOptions, typed)
    reading = create_reading(fill(DataOptions, flags))
    dataset = open_dataset(data.data_dir, data_name=data.data_name, test=True, reading=reading)
    if data.split:
        dataset = narrowed(dataset, data.split, "testing")
    network = network_for(dataset, flags, path if checkpoint.options else None)
    case = next(readable(dataset, range(len(dataset))), None) or dataset[0]
    frame, _ = frame_for(dataset, network, flags, case=case)
    segmenter = Segmenter.build(checkpoint, path, network=network, frame=frame, flags=typed)
    return dataset, segmenter, checkpoint


def score(typed: dict[str, Any]) -> None:
    """Score masks against the truth: what ``segmentation_env.py`` does with the flags typed."""
    options = fill(ScoringOptions, typed)
    if options.compare:
        first, second = (_scored(options, folder) for folder in options.compare)
        print(comparison_text(compare_folders(first, second)))
        print(f"written: {second.folder / 'comparison.json'}, and the scores of both folders")
        return
    layers = CaseLayers(options.inp_pth)
    evaluation = _scored(options, options.inp_pth, on_case=layers if options.report else None)
    written = ["summary.json", "scores.csv"]
    if options.report:
        run = describe_run(evaluation.folder)
        written.append(write_report(evaluation, run, layers.by_name).name)
    print(summary_text(evaluation.summary))
    print(f"written: {', '.join(str(Path(options.inp_pth) / name) for name in written)}")
    overlays = sorted(evaluation.folder.glob("*_overlay.png"))
    if overlays:
        print(f"look at: {overlays[0]} and {len(overlays) - 1} more")


def _scored(options: ScoringOptions, folder: str, on_case: OnCase | None = None) -> Evaluation:
    """Score one folder as the flags say."""
    return evaluate_all(
        folder,
        options.out_pth,
        scoring=Scoring(options.empty, options.tolerance, options.low_dice),
        partial=options.partial,
        mask_labels=options.mask_labels,
        raters=[rater for rater in options.raters.split(",") if rater],
        on_case=on_case,
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
    print(findings_text(findings))
    if options.out:
        out = Path(options.out).expanduser()
        print(f"{write_sheet(findings, out, cases=options.cases)} cases drawn on {out}")
    if findings.problems:
        sys.exit(2)


def _fingerprint(segmenter: Segmenter, dataset: SegmentationDataset) -> str:
    """Everything that the masks depend on, the way images are read included."""
    text = f"{segmenter.fingerprint} {read_as(dataset)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
