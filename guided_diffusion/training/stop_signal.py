"""SIGTERM, SIGHUP and Ctrl-C as a request that a loop can see, to end between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from guided_diffusion.errors import Stopped, handling_signals, postponed

ECHO = 5.0
"""Seconds in which a repeated signal counts as the first one: launchers forward the signal that
SLURM has sent to every process, and whoever presses Ctrl-C often presses it twice."""


class StopSignal:
    """Notes that SIGTERM, SIGHUP or Ctrl-C was received, so that the step can be finished.

    The same signal ``echo`` seconds later raises :class:`Stopped` at once, as the first one does
    inside :meth:`at_once`.

    Attributes:
        wanted: the name of the last signal, empty before the first.
        code: the exit code that it asks for.
    """

    def __init__(self, *, echo: float = ECHO) -> None:
        self.wanted = ""
        self.code = 0
        self.echo = echo
        self._first: dict[int, float] = {}
        self._urgent = False

    def __enter__(self) -> StopSignal:
        self._handling = handling_signals(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    @contextmanager
    def at_once(self, urgent: bool = True) -> Iterator[None]:
        """Interrupt what takes long and changes nothing; a signal that came before counts, too.

        Raises:
            Stopped: a signal is received, or was, while ``urgent``.
        """
        self._urgent = urgent
        try:
            if urgent and self.wanted:
                raise Stopped(signal.Signals[self.wanted])
            yield
        finally:
            self._urgent = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        repeated = now - self._first.setdefault(number, now) >= self.echo
        stopped = Stopped(number)
        self.wanted, self.code = stopped.name, stopped.code
        if (repeated or self._urgent) and not postponed(number, frame):
            raise stopped
