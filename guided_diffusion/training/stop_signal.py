"""SIGTERM, SIGHUP and Ctrl-C as a request that a loop can see, to end between two steps."""

from __future__ import annotations

import signal
import time

from guided_diffusion.dist_util import launched

LAUNCHER_ECHO = 5.0
"""Seconds within which a launcher may repeat a signal that this process already received."""


class StopSignal:
    """Notes that SIGTERM, SIGHUP or Ctrl-C was received, so that the step can be finished.

    A second signal of the same kind has its usual effect, as has any signal after the run. Repeats
    within ``echo`` seconds count as the first one: a launcher forwards the signal that it received
    itself, after SLURM has sent it to every process of the step.
    """

    def __init__(self, *, echo: float | None = None) -> None:
        self.wanted = ""
        self.echo = (LAUNCHER_ECHO if launched() else 0.0) if echo is None else echo
        self.first: dict[int, float] = {}

    def __enter__(self) -> StopSignal:
        names = ("SIGTERM", "SIGINT", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if number not in self.first:
            self.first[number] = now
            self.wanted = signal.Signals(number).name
        elif now - self.first[number] >= self.echo:
            signal.signal(number, self.before[signal.Signals(number)])
            signal.raise_signal(number)
