"""A thread that runs one job at a time, such as the writing of a file."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """A thread that runs one job at a time; the next call raises what a job has raised.

    The interpreter waits for the last job before it exits, so a started job is always finished.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Start a job once the previous one is done; raise what that one raised."""
        self.wait()
        thread = Thread(target=self._run, args=(job,))
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # no thread can be started: it is done in this one
            self._run(job)
        else:
            self._thread = thread

    def wait(self) -> None:
        """Wait for the current job, if any, and raise what it raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # the main thread raises it, whatever it is
            self._error = error
