"""Training in weak supervision: a diffusion of images, and a classifier of noisy ones.

Both are trained by the loop of segmentation; here their set-ups are made from flags and data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from guided_diffusion.checkpoint import CLASSIFIER, IMAGES, Weights, load_weights
from guided_diffusion.data.advice import intensity_notes, shortcut_notes
from guided_diffusion.data.batches import Batch, collate, prepare_images, prepare_labelled_images
from guided_diffusion.data.folders import counted
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.tumorloader import (
    LabelledImages,
    Pictures,
    SlicedArrays,
    TumourImages,
    held_out,
    part_folder,
    require_both,
)
from guided_diffusion.dist_util import dev, memory_order_note, place_model, rank
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.provenance import run_record
from guided_diffusion.options.flags import Flags, recorded
from guided_diffusion.options.presets import flag_text, preset_notes
from guided_diffusion.options.segmentation import WatchOptions, dead_flags
from guided_diffusion.options.weak import (
    ClassifierOptions,
    ClassifierTrainingOptions,
    ImageDiffusionOptions,
    ImageNetworkOptions,
    ImageTrainingOptions,
    SourceOptions,
    WeakRunOptions,
)
from guided_diffusion.sampling import MemberNoise, member_seed
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model
from guided_diffusion.training.live import image_drawing, live_sinks
from guided_diffusion.training.resolve import Beginning, TrainSetup, begin, overwriting_notes
from guided_diffusion.training.validation import Accuracy
from guided_diffusion.weak.finding import (
    CLASSIFIER_FILE,
    CLASSIFIER_FOLDER,
    DIFFUSION_FILE,
    rows_note,
    with_two_classes,
)
from guided_diffusion.weak.guidance import classification_losses

ARRAY_PARTS = {"training": ("train", "val"), "validation": ("test",)}


def resolve_images(flags: Flags) -> TrainSetup:
    """Make the set-up of training a diffusion of images.

    Raises:
        UserError: flags, data and checkpoint that do not belong together.
    """
    begun, notes = begin(flags, ImageTrainingOptions, WeakRunOptions, IMAGES), dead_flags(flags)
    if begun.start and begun.path and not begun.start.options:
        index = flags.get("class_index", 1)
        start, row = with_two_classes(begun.start, begun.path, index)
        begun = begun._replace(start=start)
        notes += [f"{begun.path}: {rows_note(row)}"] * bool(row)
    dataset = open_labelled(begun.flags.group(SourceOptions), "training")
    network = _following(begun.flags, in_ch=dataset.channels).group(ImageNetworkOptions)
    _require_channels(network.in_ch, dataset, "--in_ch")
    diffusion = begun.flags.group(ImageDiffusionOptions)

    torch.manual_seed(begun.run.seed)
    net = create_model(network, diffusion, of_images=True)
    process = create_gaussian_diffusion(diffusion)
    sinks = live_sinks(flags, begun.options, begun.run)
    device, seed = dev(begun.run.gpu_dev), begun.run.seed
    return _set_up(
        begun,
        net,
        dataset=dataset,
        pictures=Pictures(dataset, Frame(network.image_size)),
        diffusion=process,
        validate=image_drawing(net, process, device, seed=seed) if sinks else None,
        sinks=sinks,
        recorded={**recorded(network, diffusion), "of_images": True},
        prepare_batch=prepare_labelled_images if network.class_cond else prepare_images,
        alias=expanded(begun.run.out_dir) / DIFFUSION_FILE,
        notes=notes,
    )


def resolve_classifier(flags: Flags) -> TrainSetup:
    """Make the set-up of training a classifier of noisy images.

    It works in ``<save_dir>/classifier``, so that it can share ``save_dir`` with the diffusion.

    Raises:
        UserError: flags, data and checkpoint that do not belong together.
    """
    begun = begin(flags, ClassifierTrainingOptions, WeakRunOptions, CLASSIFIER, CLASSIFIER_FOLDER)
    options, run = begun.options, begun.run
    if options.anneal_lr and options.max_steps:
        begun = begun._replace(options=replace(options, lr_anneal_steps=options.max_steps))
    dataset = open_labelled(begun.flags.group(SourceOptions), "training")
    learned, kept = held_out(dataset, options.held_out, seed=run.seed)
    following = _following(begun.flags, in_channel=dataset.channels, num_classes=2)
    network, diffusion = following.group(ClassifierOptions), following.group(ImageDiffusionOptions)
    _require_channels(network.in_channel, dataset, "--in_channel")

    torch.manual_seed(run.seed)
    net = create_classifier(**vars(network))
    process, frame = create_gaussian_diffusion(diffusion), Frame(network.image_size)
    validate, notes = None, dead_flags(flags)
    if kept:
        patients = {dataset.entries[i].patient or dataset.names[i] for i in kept}
        images, owners = counted(len(kept), "image"), counted(len(patients), "patient")
        notes.append(f"validation on {images} of {owners}, held out")
    if kept and rank() == 0:
        copy = place_model(create_classifier(**vars(network)), dev(run.gpu_dev))
        judged = Pictures(dataset, frame, kept)
        validate = accuracy_on(judged, copy, process, noised=options.noised, seed=run.seed)
    return _set_up(
        begun,
        net,
        dataset=dataset,
        pictures=Pictures(dataset, frame, learned),
        diffusion=process,
        recorded=recorded(network, diffusion),
        prepare_batch=prepare_labelled_images,
        alias=expanded(run.out_dir).parent / CLASSIFIER_FILE,
        losses=classification_losses(process, noised=options.noised),
        watch=WatchOptions(val_interval=options.eval_interval),
        validate=validate,
        sinks=live_sinks(flags, options, run),
        notes=notes,
    )


def open_labelled(source: SourceOptions, part: str) -> LabelledImages:
    """Open a part, ``training`` or ``validation``, of what ``--src_dir`` names.

    Raises:
        UserError: nothing that can be read there, or a class without images to train on.
    """
    folder = expanded(source.src_dir, flag="--src_dir")
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
        share = "all" if any(dataset.labels.values()) else "none"
        raise UserError(
            f"--class_index {source.class_index}",
            f"{share} of {counted(len(dataset), 'slice')} have this label; slices with it and "
            "without it are needed",
            "Choose another label.",
        )
    return dataset


def source_notes(flags: Flags, dataset: LabelledImages, *, used: Collection[str] = ()) -> list[str]:
    """Say which given flags are of NumPy volumes alone, and without effect on folders of images.

    Those that are ``used`` for something else are passed over.
    """
    names = ("fold", "data_folder", "class_index")
    unread = {n: flags.given[n] for n in names if n in flags.given and n not in used}
    if not unread or isinstance(dataset, SlicedArrays):
        return []
    return [
        f"{flag_text(unread)} has no effect: {dataset.directory} holds folders of images, "
        "no NumPy volumes with a splits.pkl"
    ]


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


def _following(flags: Flags, **values: int) -> Flags:
    """Add what the data say, where the flags do not say it themselves."""
    return flags.with_resolved(**{name: flags.get(name, own) for name, own in values.items()})


def _require_channels(channels: int, dataset: LabelledImages, flag: str) -> None:
    if channels != dataset.channels:
        raise UserError(
            f"{flag} {channels}",
            f"the images in {dataset.directory} have {counted(dataset.channels, 'channel')}",
            f"Omit {flag}, or use data with the channels of training.",
        )


def _set_up(
    begun: Beginning,
    net: torch.nn.Module,
    *,
    dataset: LabelledImages,
    pictures: Pictures,
    notes: Sequence[str],
    **rest: Any,
) -> TrainSetup:
    """Make a set-up of what both networks have in common, and of the rest."""
    options, run, start = begun.options, begun.run, begun.start
    if len(pictures) < options.batch_size:
        raise UserError(
            f"--batch_size {options.batch_size}",
            f"there {'is' if len(pictures) == 1 else 'are'} only "
            f"{counted(len(pictures), 'image')} to train on",
            "Use smaller batches, or more images.",
        )
    if start:
        load_weights(net, start.model, begun.path)
    positive, bare = sum(dataset.labels.values()), start is not None and not start.options
    return TrainSetup(
        record=run_record(
            begun.flags,
            data=begun.flags.group(SourceOptions).src_dir,
            values=rest["recorded"],
            gpu_dev=run.gpu_dev,
        ),
        net=place_model(net, dev(run.gpu_dev), training=True),
        dataset=pictures,
        options=options,
        run=run,
        data=f"{dataset}: {positive} with a lesion, {len(dataset) - positive} normal",
        start=start,
        path=begun.path,
        notes=[
            *overwriting_notes(run, start),
            *preset_notes(begun.flags),
            *source_notes(begun.flags, dataset, used=("class_index",) if bare else ()),
            *notes,
            *dataset.notes,
            *intensity_notes(dataset),
            *shortcut_notes(dataset.labels, {}),
            memory_order_note(dev(run.gpu_dev)),
        ],
        **rest,
    )
