"""What the commands of weak supervision do once both networks are trained.

:func:`draw_images` shows what the diffusion learned, :func:`segment_weakly` makes and scores masks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from guided_diffusion import logger
from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError, memory_problem
from guided_diffusion.files import atomic_write, expanded, make_folder
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.inference.plan import sampling_levels
from guided_diffusion.inference.provenance import note_run, run_record
from guided_diffusion.inference.resolve import chosen_steps
from guided_diffusion.inference.run_lock import SAMPLING, only_run
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.presets import preset_notes
from guided_diffusion.options.segmentation import SamplingOptions, dead_flags
from guided_diffusion.options.weak import (
    ImageSamplingOptions,
    SourceOptions,
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
from guided_diffusion.weak.train import open_labelled

SHOWN = 60
"""Drawn images on the contact sheet."""


def draw_images(flags: Flags) -> None:
    """Draw images from noise.

    Image i depends on the seed and i alone. Written: ``samples_NxHxWxC.npz`` (``arr_0`` uint8
    [N, H, W, C], ``arr_1`` the classes int64 [N] where there are any) and a contact sheet.

    Raises:
        UserError: networks that cannot be used, or another sampling into the folder.
    """
    folder = expanded(flags.group(WeakRunOptions).out_dir)
    with only_run(folder, SAMPLING, flag="--save_dir"):
        _draw_images(flags, folder)


def _draw_images(flags: Flags, folder: Path) -> None:
    options, run = flags.group(ImageSamplingOptions), flags.group(WeakRunOptions)
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
    out_dir = make_folder(expanded(run.out_dir), flag="--save_dir")
    note_run(out_dir, run_record(flags, gpu_dev=run.gpu_dev))
    logger.log(f"{model.source}; {counted(options.num_samples, 'image')} by {sampler}")

    names = [f"image{i:05d}" for i in range(options.num_samples)]
    drawn_classes = [member_seed(run.seed, name, 1) % 2 for name in names]
    fixed = options.class_index >= 0
    classes = torch.tensor([options.class_index] * len(names) if fixed else drawn_classes)
    size = (model.net.in_channels, model.net.image_size, model.net.image_size)
    keywords = {"eta": eta} if sampler == "ddim" else {}
    drawn = []

    def draw(rows: torch.Tensor) -> torch.Tensor:
        noise = MemberNoise([member_seed(run.seed, names[int(i)], 0) for i in rows])
        x = noise(torch.empty(len(rows), *size, device=model.device))
        denoise = _denoiser(model, classifier, x, classes[rows], scale=options.classifier_scale)
        with torch.no_grad():
            x0 = SAMPLERS[sampler](denoise, x, levels, randn_like=noise, **keywords)
        return model.diffusion.from_range(x0).cpu()

    left, batch = torch.arange(len(names)), options.batch_size
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

    labelled = bool(model.net.num_classes or classifier)
    _write_images(torch.cat(drawn), classes if labelled else None, out_dir)


def _denoiser(
    model: ImageModel,
    classifier: ClassifierModel | None,
    x: torch.Tensor,
    classes: torch.Tensor,
    *,
    scale: float,
) -> Denoiser:
    """Make the denoiser of images like ``x``, of their classes as far as the networks know any."""
    y = classes.to(x.device)
    denoise = model.denoiser(x.shape, y if model.net.num_classes else None)
    return classifier.guiding(denoise, y, scale=scale) if classifier else denoise


def _write_images(images: torch.Tensor, classes: torch.Tensor | None, folder: Path) -> None:
    """Write images [N, C, H, W] in [0, 1] as arrays, and some of them as a picture."""
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


def segment_weakly(flags: Flags) -> None:
    """Make masks of labelled images, and score them."""
    options, run = flags.group(WeakOptions), flags.group(WeakRunOptions)
    method = options.method or ("cg-cdm" if options.guided else "cdm")
    options = replace(options, method=method, guided=options.guided or method == "cg-cdm")
    logger.configure()
    for note in [*preset_notes(flags), *dead_flags(flags)]:
        logger.log(note)
    dataset = open_labelled(flags.group(SourceOptions), options.part)
    model = classifier = None
    if method not in ("gradcam", "otsu") or options.label == "diffusion":
        model = load_image_model(flags, folder=run.out_dir, weights=options.weights)
        logger.log(model.source)
    if options.guided or method == "gradcam" or options.label == "classifier":
        classifier = load_classifier(flags, folder=run.out_dir, weights=options.weights)
        logger.log(classifier.source)
    segmenter = WeakSegmenter(options, model, classifier, seed=run.seed)
    for trained in (model, classifier):
        if trained:
            dataset.convert_to(trained.net.in_channels)
        if trained and trained.net.in_channels != dataset.channels:
            raise UserError(
                dataset.directory,
                f"its images have {counted(dataset.channels, 'channel')}, {trained.source} was "
                f"trained on {trained.net.in_channels}",
                "Use images like those of training.",
            )
    if model and classifier and classifier.image_size != model.net.image_size:
        raise UserError(
            classifier.source,
            f"the classifier works at {classifier.image_size} pixels, {model.source} at "
            f"{model.net.image_size}",
            "Train both networks with one --img_size.",
        )
    folder = expanded(options.results_dir or Path(run.out_dir) / method)
    with only_run(folder, SAMPLING, flag="--results_dir"):
        note_run(folder, run_record(flags, data=str(dataset.directory), gpu_dev=run.gpu_dev))
        segment_images(segmenter, dataset, folder)
        for line in score_masks(dataset, folder):
            logger.log(line)
