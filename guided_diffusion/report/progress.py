"""Progress of a run: a bar on a terminal, and elsewhere a line of text now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

FIRST, LATER, LATE = 20.0, 50.0, 5.0
"""Seconds until the first line and between later ones, and how late one may be."""


class Progress(tqdm):  # type: ignore[type-arg]
    """A progress bar that writes lines to stderr where that is no terminal.

    A line has the share that is done, speed, time left and what the last step said. It is written
    by the step that is due, or by a thread while a step takes long.

    Args:
        unit: of a step.
        total: of the steps; None for no end.
        initial: steps that an earlier run has taken.
        quiet: show nothing.
        first: seconds until the first line; None for ``FIRST``.
        later: seconds between two lines.
    """

    def __init__(
        self,
        *,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        quiet: bool = False,
        first: float | None = None,
        later: float = LATER,
    ) -> None:
        super().__init__(initial=initial, total=total, unit=unit, disable=quiet or None)
        self.counted, self.steps, self.last, self.began = unit, total, initial, initial
        self.started = time.monotonic()
        self.due, self.later = self.started + (FIRST if first is None else first), later
        self.text = ""
        self.ended = Event()
        self.lines = bool(self.disable) and not quiet
        if self.lines:
            Thread(target=self._watch, daemon=True).start()

    def step(self, number: int = 1, *, say: Callable[[], str] = str) -> None:
        """Count steps; ``say`` describes the last one and is called where a line is due."""
        self.last += number
        self.update(number)
        if self.lines and time.monotonic() >= self.due:
            self.text = say()
            self._write()

    def close(self) -> None:
        """End the bar, or the lines."""
        if hasattr(self, "ended"):
            self.ended.set()
        super().close()

    @property
    def speed(self) -> float:
        """Steps per second since the start."""
        return (self.last - self.began) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """Describe what is done."""
        of = f" of {self.steps}" if self.steps else ""
        parts = [f"{self.counted} {self.last}{of}"]
        if self.speed:
            parts.append(_speed_text(self.speed, self.counted))
            if self.steps:
                parts.append(f"{_time_text((self.steps - self.last) / self.speed)} left")
        else:
            parts.append(f"{_time_text(time.monotonic() - self.started)} in the first")
        return ", ".join([*parts, *([self.text] if self.text else [])])

    def _write(self) -> None:
        self.due = time.monotonic() + self.later
        tqdm.write(self.line(), file=sys.stderr)

    def _watch(self) -> None:
        """Write a line that no step has written in time."""
        while not self.ended.wait(max(self.due + LATE - time.monotonic(), 0.1)):
            if time.monotonic() >= self.due + LATE:
                self._write()


def _speed_text(speed: float, unit: str) -> str:
    if speed >= 1:
        return f"{speed:.3g} {unit}s/s"
    return f"{1 / speed:.3g} s a {unit}"


def _time_text(seconds: float) -> str:
    """'40 s', '12 min' or '3 h 20 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def plain_loss(loss: Any) -> str:
    """Describe a loss, a number or a scalar tensor."""
    return f"loss {float(loss):.4f}"
