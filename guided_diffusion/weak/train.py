"""The wiring of training in weak supervision: a diffusion of images, a classifier of noisy ones.

:func:`train_images` and :func:`train_classifier` run the training loop of segmentation on images
and their labels. Called by the scripts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import logger
from guided_diffusion.checkpoint import LATEST, Checkpoint, Weights, link_as, load_weights
from guided_diffusion.data.batches import (
    Batch,
    TrainingBatch,
    collate,
    prepare_images,
    prepare_labelled_images,
)
from guided_diffusion.data.datasets import Frame
from guided_diffusion.data.tumorloader import (
    LabelledImages,
    Pictures,
    SlicedArrays,
    TumourImages,
    held_out,
    part_folder,
    require_both,
)
from guided_diffusion.dist_util import describe, dev, launch, place_model, rank, setup_dist
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Losses
from guided_diffusion.options.flags import fill, recorded, refuse_contradictions
from guided_diffusion.options.segmentation import WatchOptions, dead_flags, settle_precision
from guided_diffusion.options.weak import (
    TRAIN_CLASSIFIER,
    TRAIN_IMAGES,
    ClassifierOptions,
    ClassifierTrainingOptions,
    ImageDiffusionOptions,
    ImageNetworkOptions,
    ImageTrainingOptions,
    SourceOptions,
    WeakRunOptions,
)
from guided_diffusion.report.curves import draw_curves
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.sampling import MemberNoise, member_seed
from guided_diffusion.script_util import (
    create_classifier,
    create_gaussian_diffusion,
    create_model,
    parameter_count,
)
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import checkpoint_to_resume, overwriting_notes, settled
from guided_diffusion.training.validation import Accuracy, Validate
from guided_diffusion.weak.guidance import classification_losses
from guided_diffusion.weak.models import CLASSIFIER, DIFFUSION

ARRAY_PARTS = {"training": ("train", "val"), "validation": ("test",)}


def open_labelled(flags: dict[str, Any], part: str) -> LabelledImages:
    """Open a part, ``training`` or ``validation``, of what ``--src_dir`` names.

    Raises:
        UserError: nothing that can be read there, or a class without images to train on.
    """
    source = fill(SourceOptions, flags)
    folder = Path(source.src_dir).expanduser()
    if not (folder / "splits.pkl").exists():
        images = TumourImages(part_folder(folder, part), test_flag=True)
        if part == "training":
            require_both(images)
        return images
    dataset = SlicedArrays(
        folder,
        parts=ARRAY_PARTS[part],
        data_folder=source.data_folder,
        fold=source.fold,
        class_index=source.class_index,
    )
    if len(set(dataset.labels.values())) < 2:
        raise UserError(
            "--class_index",
            found=f"{'all' if any(dataset.labels.values()) else 'none'} of {len(dataset)} slices "
            f"with the label {source.class_index}",
            expected="slices with it and without it",
            hint="Choose another label.",
        )
    return dataset


def train_images(typed: dict[str, Any]) -> None:
    """Train a diffusion of images: what ``train_tumor_ddfm.py`` does with the flags typed."""
    options = settled(fill(ImageTrainingOptions, typed), typed)
    run = settle_precision(fill(WeakRunOptions, typed), typed)
    launch(run.multi_gpu)
    setup_dist()
    path, start = checkpoint_to_resume(options, run)
    flags = {**typed, **_agreeing(typed, start.options if start else {}, path)}
    dataset = open_labelled(flags, "training")
    network = fill(ImageNetworkOptions, {"in_ch": dataset.channels, **flags})
    _require_channels(network.in_ch, dataset, "--in_ch")
    diffusion = fill(ImageDiffusionOptions, flags)

    device = dev(run.gpu_dev)
    torch.manual_seed(run.seed)
    net = create_model(network, diffusion, of_images=True)
    if start:
        load_weights(net, start.model, path)
    folder = Path(run.out_dir).expanduser()
    loop = _loop(
        place_model(net, device),
        create_gaussian_diffusion(diffusion),
        Pictures(dataset, Frame(network.image_size)),
        options,
        run,
        recorded={**recorded(network, diffusion), "of_images": True},
        lesson=prepare_labelled_images if network.class_cond else prepare_images,
        alias=folder / DIFFUSION,
    )
    _run(loop, dataset, start, path, dead_flags(TRAIN_IMAGES, typed))


def train_classifier(typed: dict[str, Any]) -> None:
    """Train a classifier of noisy images: what ``classifier_tumor_train.py`` does.

    It works in ``<save_dir>/classifier``, so that it can share ``save_dir`` with the diffusion.
    """
    options = settled(fill(ClassifierTrainingOptions, typed), typed)
    if options.anneal_lr and options.max_steps:
        options = replace(options, lr_anneal_steps=options.max_steps)
    run = settle_precision(fill(WeakRunOptions, typed), typed)
    launch(run.multi_gpu)
    setup_dist()
    top = Path(run.out_dir).expanduser()
    run = replace(run, out_dir=str(top / "classifier"))
    path, start = checkpoint_to_resume(options, run)
    flags = {**typed, **_agreeing(typed, start.options if start else {}, path)}
    dataset = open_labelled(flags, "training")
    learned, kept = held_out(dataset, options.held_out, seed=run.seed)
    given = {"in_channel": dataset.channels, "num_classes": 2, **flags}
    network, diffusion = fill(ClassifierOptions, given), fill(ImageDiffusionOptions, flags)
    _require_channels(network.in_channel, dataset, "--in_channel")

    device = dev(run.gpu_dev)
    torch.manual_seed(run.seed)
    net = create_classifier(**vars(network))
    if start:
        load_weights(net, start.model, path)
    process, frame = create_gaussian_diffusion(diffusion), Frame(network.image_size)
    validate = None
    if kept and rank() == 0:
        copy = place_model(create_classifier(**vars(network)), device)
        judged = Pictures(dataset, frame, kept)
        validate = accuracy_on(judged, copy, process, noised=options.noised, seed=run.seed)
    loop = _loop(
        place_model(net, device),
        process,
        Pictures(dataset, frame, learned),
        options,
        run,
        recorded=recorded(network, diffusion),
        lesson=prepare_labelled_images,
        alias=top / CLASSIFIER,
        losses=classification_losses(process, noised=options.noised),
        watch=WatchOptions(val_interval=options.eval_interval),
        validate=validate,
    )
    notes = dead_flags(TRAIN_CLASSIFIER, typed)
    if kept:
        patients = {dataset.entries[i].patient or dataset.names[i] for i in kept}
        notes.append(f"validation on {len(kept)} images of {len(patients)} patients, held out")
    _run(loop, dataset, start, path, notes)


def accuracy_on(
    pictures: Pictures,
    net: torch.nn.Module,
    diffusion: GaussianDiffusion,
    *,
    noised: bool = True,
    seed: int = 0,
    batch_size: int = 32,
) -> Callable[[Weights, int], Accuracy]:
    """Make the validation of a classifier: right answers on images it never saw.

    Image i has one of the trained times, spread evenly over the images, and always the same noise.

    Args:
        pictures: held out.
        net: of its own, which is given the weights to score.
        diffusion: whose noise it is.
        noised: whether images are noised.
        seed: of the noise.
        batch_size: images at a time.
    """
    losses = classification_losses(diffusion, noised=noised)
    device = next(net.parameters()).device
    kept = torch.tensor(diffusion.kept)
    times = kept[torch.arange(len(pictures)) * len(kept) // len(pictures)]

    @torch.inference_mode()
    def validate(weights: Weights, step: int) -> Accuracy:
        net.load_state_dict(weights)
        net.eval()
        right, loss = [], []
        for rows in torch.arange(len(pictures)).split(batch_size):
            batch: Batch = collate([pictures[int(i)] for i in rows])
            noise = MemberNoise([member_seed(seed, name, 0) for name in batch.names])
            x0 = diffusion.to_range(batch.image.to(device))
            assert batch.label is not None
            y = batch.label.to(device)
            terms = losses(net, x0, times[rows], eps=noise(x0), y=y)
            right.append(terms["acc@1"])
            loss.append(terms["loss"])
        return Accuracy(float(torch.cat(right).mean()), float(torch.cat(loss).mean()))

    return validate


def _agreeing(typed: dict[str, Any], trained: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """What a checkpoint was trained with, none of which the typed flags may contradict."""
    refuse_contradictions(typed, trained, path)
    return trained


def _loop(
    net: torch.nn.Module,
    diffusion: GaussianDiffusion,
    pictures: Pictures,
    options: ImageTrainingOptions,
    run: WeakRunOptions,
    *,
    recorded: dict[str, Any],
    lesson: Callable[[Batch], TrainingBatch],
    alias: Path,
    losses: Losses | None = None,
    watch: WatchOptions | None = None,
    validate: Validate | None = None,
) -> TrainLoop:
    """Wire a training loop; ``alias`` is the published name of its latest checkpoint."""
    if len(pictures) < options.batch_size:
        raise UserError(
            "--batch_size",
            found=options.batch_size,
            expected=f"at most {len(pictures)}, all images there are to train on",
            hint="Use smaller batches, or more images.",
        )
    folder = Path(run.out_dir).expanduser()

    def after_save() -> None:
        if (folder / LATEST).exists():  # not yet, where only the best has been written
            link_as(folder / LATEST, alias)
        draw_curves(folder / "progress.csv", folder / "curves.png")

    return TrainLoop(
        net,
        diffusion,
        dataset=pictures,
        schedule_sampler=create_named_schedule_sampler(
            options.schedule_sampler, len(diffusion.kept)
        ),
        options=options,
        run=run,
        recorded=recorded,
        watch=watch,
        validate=validate,
        after_save=after_save,
        lesson=lesson,
        losses=losses,
    )


def _run(
    loop: TrainLoop,
    dataset: LabelledImages,
    start: Checkpoint | None,
    path: Path | None,
    notes: list[str],
) -> None:
    """Say what is trained on what, and train it."""
    run = loop.run
    logger.configure(None if rank() else run.out_dir, quiet=rank() > 0)
    if start:
        loop.restore(start, path=path)
        logger.log(f"resuming {path} at step {start.step}")
    positive = sum(dataset.labels.values())
    for note in [*overwriting_notes(run, start), *notes, *dataset.notes]:
        logger.log(note)
    logger.log(
        f"{dataset}: {positive} with a lesion, {len(dataset) - positive} normal; "
        f"{parameter_count(loop.net)} on {describe(loop.device)}, {run.precision}; "
        f"steps {loop.step} to {loop.last_step or 'no end'}"
    )
    loop.run_loop()


def _require_channels(channels: int, dataset: LabelledImages, flag: str) -> None:
    if channels != dataset.channels:
        raise UserError(
            flag,
            found=channels,
            expected=f"{dataset.channels}, the channels of {dataset.directory}",
            hint=f"Leave {flag} away, or use data with the channels of training.",
        )
