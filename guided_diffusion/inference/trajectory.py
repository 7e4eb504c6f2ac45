"""How a mask develops: states of the reverse process, kept while it runs, and drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from guided_diffusion.gaussian_diffusion import Prediction
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.report.canvas import Pixels
from guided_diffusion.report.pictures import strip
from guided_diffusion.schedule import NoiseLevel

FRAMES = 6
"""States that are kept, evenly spread over all evaluations."""


class Trajectory:
    """Keeps states of the first mask that a segmenter draws, as a step callback.

    Args:
        segmenter: whose next draw is kept.
        title: the case.
        show: called after every kept state.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        title: str,
        *,
        show: Callable[[Trajectory], object] = bool,
    ) -> None:
        self.diffusion = segmenter.diffusion
        self.title = title
        self.show = show
        last = segmenter.plan.evaluations - 1
        self.wanted = set(np.linspace(0, last, min(FRAMES, last + 1)).round().astype(int).tolist())
        self.calls = 0
        self.states: list[tuple[float, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, level: NoiseLevel, prediction: Prediction) -> None:
        """Keep the first row of a network evaluation, if it is one of those to keep."""
        if self.calls in self.wanted:
            self.states.append((level.t, self._grey(x), self._grey(prediction.x0)))
            self.show(self)
        self.calls += 1

    def picture(self) -> Pixels:
        """Draw the noisy masks in the upper row, below each the predicted clean mask.

        Returns:
            uint8 [h, w, 3].
        """
        times, noisy, clean = zip(*self.states, strict=True)
        captions = [f"{what} at t = {t:.0f}" for what in ("x", "its x0") for t in times]
        return strip([*noisy, *clean], captions, title=self.title, columns=len(times))

    def _grey(self, masks: Tensor) -> Tensor:
        """The first of masks [B, K, h, w], all classes in one, float32 [h, w] in [0, 1]."""
        return self.diffusion.from_range(masks[0]).amax(dim=0).float().cpu()
