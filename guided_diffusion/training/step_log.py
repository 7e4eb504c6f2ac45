"""Values that training steps report, collected until a line of the log is written.

Nothing here waits for the device before that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.dist_util import all_gather, memory_gib
from guided_diffusion.training.sharded import total_norm

_KINDS = ("q0", "q1", "q2", "q3", "direct")


class StepLog:
    """Collects what steps report, without waiting for the device, until the log is written.

    Args:
        steps: the length T of the schedule.
        kinds: losses are reported by kind, too; not where all are of one kind.
    """

    def __init__(self, steps: int, *, kinds: bool = True) -> None:
        self.steps = steps
        self.kinds = _KINDS if kinds else ()
        self._clear()

    def _clear(self) -> None:
        self.times: list[Tensor] = []
        self.terms: dict[str, list[Tensor]] = {}
        self.grad_norms: list[Tensor] = []
        self.skipped = 0
        self.untimed = 0
        self.started = time.perf_counter()

    def restart(self) -> float:
        """Leave the steps until now out of the speed, and return their time in seconds."""
        before, self.started = self.started, time.perf_counter()
        self.untimed = len(self.grad_norms)
        return self.started - before

    def losses(self, t: Tensor, terms: dict[str, Tensor], withheld: Tensor | None = None) -> None:
        """Note times int64 [B], the loss terms [B] they gave, and where no noisy mask was given."""
        self.times.append(t if withheld is None else t.masked_fill(withheld, self.steps))
        for name, values in terms.items():
            self.terms.setdefault(name, []).append(values)

    def gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """Note the norm of the gradient, and return it."""
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.grad_norms.append(norm)
        return norm

    def report(
        self, *, step: int, last: int, samples: int, lr: float, parameters: Sequence[Tensor]
    ) -> None:
        """Give the logger a line: the means of all processes, speed, memory and time left.

        Args:
            step: steps that were taken.
            last: the step to stop at; 0 for never.
            samples: images that were drawn.
            lr: the learning rate.
            parameters: of the network, on its device.
        """
        for name, value in (("step", step), ("samples", samples), ("lr", lr)):
            logger.logkv(name, value)
        logger.logkv("memory_gib", memory_gib(parameters[0].device))
        means = self.means(parameters, all_gather)
        for name, value in means.items():
            logger.logkv(name, value)
        if last and "steps_per_s" in means:
            logger.logkv("minutes_left", round((last - step) / means["steps_per_s"] / 60, 1))

    def means(
        self, parameters: Sequence[Tensor], gather: Callable[[Tensor], Tensor] = torch.Tensor.cpu
    ) -> dict[str, float]:
        """Return the means since the last call, losses also by kind, and start anew.

        The kinds are the quarters of t, as ``mse_q0``, and, as ``mse_direct``, where the noisy mask
        was withheld.

        ``gather`` joins the values [N] of all processes. What is not finite is left out:
        ``skipped`` says how often that was. Without a step that was timed there is no speed.
        """
        quarter = (4 * gather(torch.cat(self.times)) // self.steps).tolist()
        timed = len(self.grad_norms) - self.untimed
        norms = _finite(torch.stack(self.grad_norms).tolist())
        means = {
            **({"grad_norm": sum(norms) / len(norms)} if norms else {}),
            "param_norm": float(total_norm([p.detach() for p in parameters])),
            "skipped": float(self.skipped),
            **({"steps_per_s": timed / (time.perf_counter() - self.started)} if timed else {}),
        }
        for name, parts in self.terms.items():
            pairs = list(zip(gather(torch.cat(parts)).tolist(), quarter, strict=True))
            kinds = {name: pairs}
            for place, end in enumerate(self.kinds):
                kinds[f"{name}_{end}"] = [pair for pair in pairs if pair[1] == place]
            for kind, chosen in kinds.items():
                if values := _finite([value for value, _ in chosen]):
                    means[kind] = sum(values) / len(values)
        self._clear()
        return means


def _finite(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
