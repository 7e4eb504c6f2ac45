"""The live displays of a training, and pictures for them: its first batch, an image that it draws.

Segmentation shows how a mask develops, see ``validation``; here is the same for networks that draw
images from noise.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import cast

import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.checkpoint import Weights
from guided_diffusion.data.batches import TrainingBatch
from guided_diffusion.dist_util import rank
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from guided_diffusion.inference.plan import sampling_levels
from guided_diffusion.logger import Sink
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import (
    LiveOptions,
    RunOptions,
    SamplingOptions,
    TrainingOptions,
)
from guided_diffusion.report.canvas import Pixels
from guided_diffusion.report.pictures import strip
from guided_diffusion.report.sinks import open_sinks
from guided_diffusion.sampling import MemberNoise, ddim, member_seed
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.unet import UNetModel

STEPS = 6
"""Evaluations of an image, each of which is shown."""
COLUMNS = 8
"""Cases of a batch that are shown, at most."""


def live_sinks(flags: Flags, options: TrainingOptions, run: RunOptions) -> list[Sink]:
    """Open the live displays of a training, in its first process alone, and in no rehearsal."""
    shown = rank() == 0 and not options.dry_run
    return open_sinks(flags.group(LiveOptions), run) if shown else []


def draw_batch(batch: TrainingBatch) -> Pixels:
    """Draw the first cases of a batch, what is diffused below its condition, uint8 [h, w, 3].

    Channels are averaged, those of a mask joined.
    """
    masks, images = batch.x0[:COLUMNS], batch.condition[:COLUMNS]
    count = len(masks)
    if not images.shape[1]:
        images, masks = masks, masks[:0]
    panels = [*images.float().mean(1).clamp(0, 1), *masks.float().amax(1)]
    captions = [f"image {i}" for i in range(count)] + [f"mask {i}" for i in range(len(masks))]
    grey = [panel.cpu().numpy() for panel in panels]
    return strip(grey, captions, title="the first batch", columns=count)


def image_drawing(
    net: torch.nn.Module, diffusion: GaussianDiffusion, device: torch.device, *, seed: int
) -> Callable[[Weights, int], None]:
    """Make the validation of a diffusion of images: it scores nothing and shows how one is drawn.

    A network that knows classes draws one of class 1. The noise is always the same.
    """
    copy = cast(UNetModel, deepcopy(net)).to(device).eval()
    steps = min(STEPS, len(diffusion.kept))
    levels = sampling_levels(diffusion, "ddim", SamplingOptions(steps=steps))
    size = (1, copy.in_channels, copy.image_size, copy.image_size)
    y = torch.ones(1, dtype=torch.int64, device=device) if copy.num_classes else None

    @torch.inference_mode()
    def draw(weights: Weights, step: int) -> None:
        copy.load_state_dict(weights)
        condition = copy.encode(torch.empty(1, 0, *size[2:], device=device))
        denoise = diffusion.denoiser(copy, condition, y=y)
        noisy, clean, times = list[Tensor](), list[Tensor](), list[float]()

        def noting(x: Tensor, level: NoiseLevel) -> Prediction:
            prediction = denoise(x, level)
            noisy.append(_grey(diffusion, x))
            clean.append(_grey(diffusion, prediction.x0))
            times.append(level.t)
            return prediction

        x = MemberNoise([member_seed(seed, "live", 0)])(torch.empty(size, device=device))
        ddim(noting, x, levels)
        captions = [f"{what} at t = {t:.0f}" for what in ("x", "its x0") for t in times]
        drawn = strip([*noisy, *clean], captions, title="an image", columns=len(times))
        logger.picture("sampling", drawn, step)

    return draw


def _grey(diffusion: GaussianDiffusion, images: Tensor) -> Tensor:
    """The mean channel of the first of images [B, C, h, w], float32 [h, w] in [0, 1]."""
    return diffusion.from_range(images)[0].mean(dim=0).clamp(0, 1).float().cpu()
