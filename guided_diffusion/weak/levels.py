"""The noise levels at which maps are made: trained times, from ``--level`` downwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError
from guided_diffusion.options.weak import WeakOptions
from guided_diffusion.schedule import CLEAN, NoiseLevel
from guided_diffusion.weak.models import ImageModel


def levels_of(options: WeakOptions, model: ImageModel) -> list[NoiseLevel]:
    """The levels of the branches, or of a whole reconstruction, which ends at the clean image.

    Raises:
        UserError: options that the diffusion cannot fulfil.
    """
    by_classifier = options.guided and options.method in ("counterfactual", "encoded")
    if not model.net.num_classes and (not by_classifier or options.label == "diffusion"):
        raise UserError(
            model.source,
            "the diffusion was trained without classes",
            "Train one with --class_cond True, or use --method gradcam.",
        )
    last = len(model.diffusion.schedule) - 1
    if options.level > last:
        raise UserError(
            f"--level {options.level}", f"the last trained time is {last}", "Choose a lower level."
        )
    if options.method in ("gradcam", "otsu"):
        return []
    times = [t for t in model.diffusion.kept if t <= options.level]
    if options.method == "encoded":
        if len(times) < 2:
            raise UserError(
                f"--level {options.level}",
                "--method encoded carries images to a higher level and back",
                "Choose a higher level.",
            )
        chosen = spread(times, min(options.steps, len(times) - 1) + 1)
        return model.diffusion.schedule.levels(chosen, end=None)
    if options.method == "counterfactual":
        chosen = spread(times, min(options.steps, len(times)))
        return model.diffusion.schedule.levels(chosen, end=CLEAN)
    if options.steps * options.stride >= len(times):
        raise UserError(
            f"--steps {options.steps}",
            f"{counted(options.steps, 'step')} of {options.stride} from level {options.level} "
            "would end below time 0",
            "Take fewer steps, a smaller --stride or a higher --level.",
        )
    branches = times[:: -options.stride][: options.steps + 1]
    return model.diffusion.schedule.levels(branches, end=None)


def spread(times: Sequence[int], count: int) -> list[int]:
    """Choose so many of some times, evenly spread from the last to the first."""
    places = np.linspace(len(times) - 1, 0, count).round().astype(int)
    return [times[place] for place in places]
