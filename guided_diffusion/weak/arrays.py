"""The two branches of conditional diffusion as arrays, to look at them step by step.

The published ``image_p_sample.py`` writes these, under the same names and in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.data.folders import counted
from guided_diffusion.data.frames import Frame
from guided_diffusion.errors import UserError
from guided_diffusion.files import atomic_write, expanded, make_folder
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.inference.provenance import note_run, run_record
from guided_diffusion.inference.run_lock import SAMPLING, only_run
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import dead_flags
from guided_diffusion.options.weak import ArrayOptions, WeakOptions, WeakRunOptions
from guided_diffusion.sampling import MemberNoise, ddim, member_seed
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.weak.commands import in_batches
from guided_diffusion.weak.maps import noisy
from guided_diffusion.weak.models import load_classifier, load_image_model
from guided_diffusion.weak.predict import NORMAL, TUMOUR, WeakSegmenter
from guided_diffusion.weak.source import open_images

GUIDED_FILE, PLAIN_FILE = "p_sample_ddim_eg.npz", "p_sample_ddim_cond_eg.npz"


def write_arrays(flags: Flags) -> None:
    """Walk both branches of images with a lesion, and write what they are as arrays.

    The file in ``--save_dir`` is ``p_sample_ddim_eg.npz`` with ``--guided``, else
    ``p_sample_ddim_cond_eg.npz``, and holds float32 arrays [N, C, H, W] at the network's size:
    ``arr_0`` the images in [0, 1], ``arr_1`` their masks (NaN where there is none), and in the
    range that is diffused ``arr_2`` the noisy images, ``arr_3`` and ``arr_4`` what the lesion's and
    the other branch end with, and ``arr_5`` the sum of their absolute differences over the steps.

    Raises:
        UserError: networks or data that cannot be used, or no image with a lesion.
    """
    options, run = flags.group(ArrayOptions), flags.group(WeakRunOptions)
    logger.configure()
    for note in dead_flags(flags):
        logger.log(note)
    model = load_image_model(
        flags, folder=run.out_dir, weights=options.weights, whole_schedule=True
    )
    classifier = None
    if options.guided:
        classifier = load_classifier(flags, folder=run.out_dir, weights=options.weights)
    flags, dataset = open_images(flags, options.part, model, classifier)
    method = WeakOptions(
        method="cdm",
        level=options.level,
        steps=options.steps,
        stride=options.stride,
        tau=options.tau,
    )
    levels = WeakSegmenter(method, model, classifier, seed=run.seed).levels
    guidance: dict[str, Any] = {"guide": classifier, "scale": options.classifier_scale}
    ill = [i for i, name in enumerate(dataset.names) if dataset.labels[name] == TUMOUR]
    if not ill:
        hint = "Add images to tumor/, or choose another --part."
        raise UserError(dataset.directory, "has no image with a lesion", hint)
    count = min(options.num_samples or len(ill), len(ill))
    chosen = [ill[k * len(ill) // count] for k in range(count)]
    path = expanded(run.out_dir) / (GUIDED_FILE if options.guided else PLAIN_FILE)
    if options.dry_run:
        logger.log(f"dry run: {counted(count, 'image')} would be used; they would be in {path}")
        return

    frame = Frame(model.net.image_size)

    def draw(rows: Tensor) -> list[Tensor]:
        cases = [frame.fit(dataset[chosen[int(row)]]) for row in rows]
        images = torch.stack([case.image for case in cases])
        unknown = torch.full_like(images[0, :1], torch.nan)
        masks = [unknown if case.mask is None else case.mask for case in cases]
        x0 = model.diffusion.to_range(images.to(model.device))
        eps = MemberNoise([member_seed(run.seed, case.name, 0) for case in cases])(x0)
        x = noisy(x0, eps, levels[0])
        with torch.no_grad():
            lesion = model.branch(x0.shape, 1.0, label=TUMOUR, **guidance)
            other = model.branch(x0.shape, options.tau, label=NORMAL, **guidance)
            return [images, torch.stack(masks), x, *walk(lesion, other, x, levels)]

    with only_run(path.parent, SAMPLING, flag="--save_dir"):
        make_folder(path.parent, flag="--save_dir")
        note_run(path.parent, run_record(flags, data=str(dataset.directory), gpu_dev=run.gpu_dev))
        drawn = in_batches(draw, count, options.batch_size)
        _write(path, [torch.cat(parts) for parts in zip(*drawn, strict=True)])
    logger.log(f"{counted(count, 'image')} with a lesion in {path}")
    logger.log(
        f"next: numpy.load({str(path)!r}); arr_0 to arr_5 are the images, their masks, the "
        "noisy images, both branches and their difference"
    )


def walk(
    lesion: Denoiser, other: Denoiser, x: Tensor, levels: Sequence[NoiseLevel]
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk two branches down from one noisy image [B, C, H, W].

    Returns:
        The ends of both branches, and the sum of their absolute differences over the steps, each
        of the shape of ``x``.
    """
    total, x_other = torch.zeros_like(x), x
    for step in pairwise(levels):
        x, x_other = ddim(lesion, x, step), ddim(other, x_other, step)
        total += (x - x_other).abs()
    return x, x_other, total


def _write(path: Path, arrays: Sequence[Tensor]) -> None:
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, *(array.float().cpu().numpy() for array in arrays))
