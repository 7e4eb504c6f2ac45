"""SIGTERM and Ctrl-C as a wish that a loop can see, so that it ends between two steps."""

from __future__ import annotations

import signal
import time

from guided_diffusion.dist_util import launched

LAUNCHER_ECHO = 5.0
"""Seconds within which a launcher may repeat a signal that this process has had already."""


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for the end, so that the step can be finished.

    The second of a kind does what it always did; so does every one after the run. Repeats within
    ``echo`` seconds are the first one again: a launcher hands on the signal that its own process
    got, after SLURM has sent it to every process of the step.
    """

    def __init__(self, *, echo: float | None = None) -> None:
        self.wanted = ""
        self.echo = (LAUNCHER_ECHO if launched() else 0.0) if echo is None else echo
        self.first: dict[int, float] = {}

    def __enter__(self) -> StopSignal:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
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
