"""What the commands of weak supervision do once both networks are trained.

:func:`draw_images` shows what the diffusion learned, :func:`segment_weakly` makes and scores masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError, memory_problem
from guided_diffusion.files import atomic_write, expanded, make_folder
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.inference.next_steps import after_weak_masks
from guided_diffusion.inference.plan import sampling_levels
from guided_diffusion.inference.provenance import note_run, run_record
from guided_diffusion.inference.resolve import chosen_steps
from guided_diffusion.inference.run_lock import SAMPLING, only_run
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.presets import preset_notes
from guided_diffusion.options.segmentation import SamplingOptions, dead_flags
from guided_diffusion.options.weak import (
    ImageSamplingOptions,
    WeakOptions,
    WeakRunOptions,
)
from guided_diffusion.report.pictures import Tile, contact_sheet, write_picture
from guided_diffusion.sampling import SAMPLERS, MemberNoise, member_seed
from guided_diffusion.weak.models import (
    ClassifierModel,
    ImageModel,
    load_classifier,
    load_image_model,
)
from guided_diffusion.weak.predict import WeakSegmenter, score_masks, segment_images
from guided_diffusion.weak.second_stage import write_training_set
from guided_diffusion.weak.source import open_images, size_notes

Result = TypeVar("Result")
SHOWN = 60
"""Drawn images on the contact sheet."""


def draw_images(flags: Flags) -> None:
    """Draw images from noise.

    Image i depends on the seed and i alone. Written: ``samples_NxHxWxC.npz`` (``arr_0`` uint8
    [N, H, W, C], ``arr_1`` the classes int64 [N] where there are any) and a contact sheet.

    Raises:
        UserError: networks that cannot be used, or another sampling into the folder.
    """
    options, run = flags.group(ImageSamplingOptions), flags.group(WeakRunOptions)
    folder = expanded(run.out_dir, flag="--save_dir")
    logger.configure()
    for note in dead_flags(flags, vars(options)):
        logger.log(note)
    model = load_image_model(
        flags, folder=run.out_dir, weights=options.weights, clip=options.clip_denoised
    )
    classifier = (
        load_classifier(flags, folder=run.out_dir, weights=options.weights)
        if options.guided
        else None
    )
    eta = 1.0 if options.sigma_small and not options.use_ddim else 0.0
    sampler = "ddim" if options.use_ddim or eta else "ddpm"
    wanted = SamplingOptions(steps=chosen_steps(flags, options.steps))
    respacing = flags.given.get("timestep_respacing", "")
    levels = sampling_levels(model.diffusion, sampler, wanted, respacing=respacing)
    if options.class_index > 1 and model.trained.is_own:
        raise UserError(
            f"--class_index {options.class_index}",
            f"{model.trained.path} has the classes 0 and 1",
            "Choose one of them; published weights may have others.",
        )
    for note in size_notes(model, classifier):
        logger.log(note)
    logger.log(f"{model.source}; {counted(options.num_samples, 'image')} by {sampler}")
    if options.dry_run:
        logger.log(f"dry run: they would be written to {run.out_dir}")
        return

    names = [f"image{i:05d}" for i in range(options.num_samples)]
    drawn_classes = [member_seed(run.seed, name, 1) % 2 for name in names]
    fixed = options.class_index >= 0
    classes = torch.tensor([options.class_index] * len(names) if fixed else drawn_classes)
    size = (model.net.in_channels, model.net.image_size, model.net.image_size)
    keywords = {"eta": eta} if sampler == "ddim" else {}

    def draw(rows: Tensor) -> Tensor:
        noise = MemberNoise([member_seed(run.seed, names[int(i)], 0) for i in rows])
        x = noise(torch.empty(len(rows), *size, device=model.device))
        y = classes[rows].clamp(max=1)
        denoise = _denoiser(model, classifier, x, y, scale=options.classifier_scale)
        with torch.no_grad():
            x0 = SAMPLERS[sampler](denoise, x, levels, randn_like=noise, **keywords)
        return model.diffusion.from_range(x0).cpu()

    with only_run(folder, SAMPLING, flag="--save_dir"):
        make_folder(folder, flag="--save_dir")
        note_run(folder, run_record(flags, gpu_dev=run.gpu_dev))
        drawn = torch.cat(in_batches(draw, len(names), options.batch_size))
        labelled = bool(model.net.num_classes or classifier)
        picture = _write_images(drawn, classes if labelled else None, folder)
    logger.log(f"next: open {picture}")


def in_batches(draw: Callable[[Tensor], Result], count: int, batch: int) -> list[Result]:
    """Draw rows 0 to ``count`` a batch at a time, in smaller ones where memory runs out.

    Args:
        draw: takes the numbers of the rows, int64 [B].
        count: of rows.
        batch: rows at a time.
    """
    drawn, left = [], torch.arange(count)
    while len(left):
        try:
            drawn.append(draw(left[:batch]))
            left = left[batch:]
            continue
        except (RuntimeError, MemoryError) as error:
            problem = memory_problem(error)
            if not problem or batch == 1:
                raise
        # The error is gone by now, and with it the memory of what it interrupted.
        batch = min(batch, len(left)) // 2 or 1
        logger.log(f"{problem}; going on with --batch_size {batch}")
    return drawn


def _denoiser(
    model: ImageModel,
    classifier: ClassifierModel | None,
    x: Tensor,
    classes: Tensor,
    *,
    scale: float,
) -> Denoiser:
    """Make the denoiser of images like ``x``, of their classes as far as the networks know any."""
    y = classes.to(x.device)
    denoise = model.denoiser(x.shape, y if model.net.num_classes else None)
    if classifier is None:
        return denoise
    return classifier.guiding(denoise, y, scale=scale, of=model.diffusion)


def _write_images(images: Tensor, classes: Tensor | None, folder: Path) -> Path:
    """Write images [N, C, H, W] in [0, 1] as arrays, and some of them as a picture: its path."""
    arrays = [(255 * images + 0.5).floor().to(torch.uint8).permute(0, 2, 3, 1).numpy()]
    if classes is not None:
        arrays.append(classes.numpy())
    path = folder / f"samples_{'x'.join(map(str, arrays[0].shape))}.npz"
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, *arrays)
    tiles = [
        Tile(image.numpy(), None, f"{i}" if classes is None else f"{i}: class {int(classes[i])}")
        for i, image in enumerate(images[:SHOWN])
    ]
    write_picture(path.with_suffix(".png"), contact_sheet(tiles, title=path.stem))
    logger.log(f"written: {path}, {path.with_suffix('.png')}")
    return path.with_suffix(".png")


def segment_weakly(flags: Flags) -> None:
    """Make masks of labelled images, and score them.

    Those of the training part are also written as a data set for supervised training.

    Raises:
        UserError: networks or data that cannot be used, or some images failed.
    """
    options, run = flags.group(WeakOptions), flags.group(WeakRunOptions)
    method = options.method or ("cg-cdm" if options.guided else "cdm")
    options = replace(options, method=method, guided=options.guided or method == "cg-cdm")
    logger.configure()
    for note in [*preset_notes(flags), *dead_flags(flags)]:
        logger.log(note)
    model = classifier = None
    if method not in ("gradcam", "otsu") or options.label == "diffusion":
        model = load_image_model(
            flags, folder=run.out_dir, weights=options.weights, whole_schedule=True
        )
    if options.guided or method == "gradcam" or options.label == "classifier":
        classifier = load_classifier(flags, folder=run.out_dir, weights=options.weights)
    flags, dataset = open_images(flags, options.part, model, classifier)
    segmenter = WeakSegmenter(options, model, classifier, seed=run.seed)
    own = method if options.part == "validation" else f"{method}_{options.part}"
    folder = expanded(options.results_dir or Path(run.out_dir) / own)
    if options.dry_run:
        number = min(options.num_samples or len(dataset), len(dataset))
        images = counted(number, "image")
        logger.log(f"dry run: {images} would be segmented; they would be written to {folder}")
        return
    with only_run(folder, SAMPLING, flag="--results_dir"):
        note_run(folder, run_record(flags, data=str(dataset.directory), gpu_dev=run.gpu_dev))
        names = segment_images(segmenter, dataset, folder)
        training = options.part == "training"
        written = write_training_set(dataset, names, folder) if training else None
        *scores, after = score_masks(dataset, folder)
        for line in [*scores, after_weak_masks(written) if written else after]:
            logger.log(line)
