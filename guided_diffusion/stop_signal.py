"""SIGTERM and Ctrl-C as a wish that a loop can see, so that it ends between two steps.

Called by ``train_util``.
"""

from __future__ import annotations

import signal


class StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for the end, so that the step can be finished.

    The second of a kind does what it always did; so does every one after the run.
    """

    def __init__(self) -> None:
        self.wanted = ""

    def __enter__(self) -> StopSignal:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.wanted = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])
