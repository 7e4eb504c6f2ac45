"""How masks develop: states of the reverse process, kept while it runs, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.datasets import Case
from guided_diffusion.ensemble import UNCERTAINTIES
from guided_diffusion.gaussian_diffusion import Prediction
from guided_diffusion.inference.rendering import combined_uncertainty
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.report.animation import Moment, animate
from guided_diffusion.report.canvas import Pixels
from guided_diffusion.report.pictures import strip
from guided_diffusion.schedule import NoiseLevel

FRAMES = 6
"""States that are kept, evenly spread over all evaluations."""
MOMENTS = 18
"""States of an animated picture."""
MOST_SIDE = 96
"""Longer side of a noisy member in an animated picture, in pixels, about."""


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


class MemberStates:
    """Keeps states of the first network's members of some cases, as a step callback.

    Args:
        segmenter: whose next draw is kept.
        cases: that it draws, in this order.
        then: another step callback to call, too.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        cases: Sequence[Case],
        *,
        then: Callable[[Tensor, NoiseLevel, Prediction], object] | None = None,
    ) -> None:
        self.segmenter, self.cases, self.then = segmenter, cases, then
        plan = segmenter.plan
        last = plan.evaluations - 1
        wanted = np.linspace(0, last, min(MOMENTS, last + 1)).round().astype(int)
        self.wanted = {int(place) for place in wanted}
        self.rows = len(cases) * plan.num_ensemble
        self.kept: list[list[tuple[float, Tensor, Tensor]]] = []  # by chunk of the batch
        self.calls = 0

    def __call__(self, x: Tensor, level: NoiseLevel, prediction: Prediction) -> None:
        """Keep a network evaluation, if it is one of those to keep."""
        if self.then:
            self.then(x, level, prediction)
        place = self.calls % self.segmenter.plan.evaluations
        self.calls += 1
        done = sum(len(chunk[0][1]) for chunk in self.kept[: -1 if place else None])
        if place not in self.wanted or done >= self.rows:
            return
        if place == 0:
            self.kept.append([])
        self.kept[-1].append((level.t, self._levels(x), self._levels(prediction.x0)))

    def moments(self, index: int) -> list[Moment]:
        """The states of one case, the noisiest first; empty where not all of them were kept.

        The last one is that of the predicted clean masks.
        """
        number = self.segmenter.plan.num_ensemble
        case, own = self.cases[index], slice(index * number, (index + 1) * number)
        size = (case.image.shape[-2], case.image.shape[-1])
        found = []
        for states in zip(*self.kept, strict=False):
            noisy, clean = (torch.cat([state[k] for state in states])[own] for k in (1, 2))
            if len(noisy) < number:
                return []
            mean = self.segmenter.frame.restore(clean.float().mean(dim=0) / 255, size)
            step = -(-max(noisy.shape[-2:]) // MOST_SIDE)
            small = (masks[:, ::step, ::step].numpy() for masks in (noisy, clean))
            found.append(Moment(states[0][0], next(small), mean.numpy()))
        if not len(found) == len(self.wanted) > 1:
            return []
        return [*found, Moment(0, next(small), mean.numpy())]

    def _levels(self, masks: Tensor) -> Tensor:
        """Masks [B, K, h, w] with all classes in one, uint8 [B, h, w]."""
        soft = self.segmenter.diffusion.from_range(masks).amax(dim=1)
        return (255 * soft + 0.5).to(torch.uint8).cpu()


def member_frames(
    case: Case, result: Segmentation, moments: Sequence[Moment]
) -> list[tuple[Pixels, int]]:
    """Draw the frames of a case's animated picture, each with its milliseconds."""
    fused = result.fused if result.classes is None else result.fused.amax(dim=0)
    return animate(
        case.image.numpy(),
        moments,
        fused.numpy(),
        combined_uncertainty(result).numpy(),
        name=case.name,
        scale=(result.measure, UNCERTAINTIES[result.measure].most),
    )
