"""SIGTERM and Ctrl-C as a wish that a loop can see, so that it ends between two steps.

Called by ``train_util``.
"""

from __future__ import annotations

import signal
import time


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for the end, so that the step can be finished.

    The second of a kind does what it always did; so does every one after the run. Repeats within
    ``echo`` seconds are the first one again: a launcher hands on the signal that its own process
    got, after SLURM has sent it to every process of the step.
    """

    def __init__(self, *, echo: float = 0.0) -> None:
        self.wanted = ""
        self.echo = echo
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
