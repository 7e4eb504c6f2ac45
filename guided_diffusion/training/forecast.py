"""What a run will take, said before its first step, and how long, said after ten."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from guided_diffusion import logger
from guided_diffusion.checkpoint.sharded import is_sharded
from guided_diffusion.dist_util import describe, rank, total_gib
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.training.cost import ImageCost, image_cost
from guided_diffusion.training.estimates import gib_text
from guided_diffusion.unet import UNetModel

TIMED = 10
"""Steps that are timed, after the first one, which compiles and warms up."""
DAY = 86400.0


class StepNeed(NamedTuple):
    """The memory that steps need, in GiB.

    Attributes:
        held: for weights, gradients, AdamW's moments and averages.
        copied: more while a checkpoint is written.
        image: of an image while its gradient is computed.
        together: images in one forward pass.
    """

    held: float
    copied: float
    image: float
    together: int

    @classmethod
    def of(
        cls, cost: ImageCost, options: TrainingOptions, *, parameters: int, precision: str
    ) -> StepNeed:
        """Work out the need of a network of so many parameters."""
        averages = len(options.ema_rate.split(","))
        one, batch = 4 * parameters / 2**30, options.batch_size
        together = min(batch, options.microbatch) if options.microbatch > 0 else batch
        return cls((4 + averages) * one, (3 + averages) * one, cost.gib_in(precision), together)

    @property
    def total(self) -> float:
        """GiB of a step."""
        return self.held + self.together * self.image

    def fitting(self, device: torch.device) -> int:
        """Images whose gradient fits into the device's memory together, about."""
        free = total_gib(device) - self.held - self.copied
        return max(0, int(min(free / self.image, 2**31)))

    def text(self, cost: ImageCost, device: torch.device) -> str:
        """Write operations and memory for the log."""
        images = f"{self.together} images at a time" if self.together > 1 else "one image at a time"
        return (
            f"a step takes {3 * cost.flop / 1e9:,.0f} GFLOP an image, and about "
            f"{gib_text(self.total)}: {gib_text(self.held)} for weights, gradients, moments and "
            f"averages, {gib_text(self.image)} an image, {images}; while a checkpoint is written, "
            f"{gib_text(self.copied)} more; {describe(device)} has {total_gib(device):.1f} GiB"
        )


def announce_need(
    net: torch.nn.Module, options: TrainingOptions, precision: str, device: torch.device
) -> int:
    """Log what a step of a U-Net takes; the first process does.

    Of a network that is divided among processes, what it takes has been said before it was built.

    Returns:
        How many images fit at a time, about; 0 where that is not known.
    """
    if rank() or not isinstance(net, UNetModel) or is_sharded([*net.parameters()]):
        return 0
    cost = image_cost(net)
    count = sum(parameter.numel() for parameter in net.parameters())
    need = StepNeed.of(cost, options, parameters=count, precision=precision)
    logger.log(need.text(cost, device))
    return need.fitting(device)


class TimeForecast:
    """Says once how long a run will take, from ten of its steps.

    Args:
        start: step at which this run starts.
        last: step at which it ends; 0 for never.
        device: that trains.
    """

    def __init__(self, start: int, last: int, device: torch.device) -> None:
        self.first, self.last, self.device = start + 1, last, device
        self._begun = 0.0

    def after(self, step: int) -> str:
        """Return the forecast after the tenth timed step, if any are left; else an empty text."""
        if step == self.first:
            self._begun = time.perf_counter()
        if step != self.first + TIMED or step >= self.last:
            return ""
        each = (time.perf_counter() - self._begun) / TIMED
        left = self.last - step
        text = (
            f"{TIMED} steps took {TIMED * each:.2g} s: the {left:,} steps that are left take about "
            f"{duration_text(left * each)} here, beside validation"
        )
        if self.device.type == "cpu" and left * each >= DAY:
            text += "; --preset small trains a network that suits a processor"
        return text


def duration_text(seconds: float) -> str:
    """Write a time for people: in seconds, minutes, hours or days."""
    for unit, size in (("days", DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
