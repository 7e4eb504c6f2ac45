"""Threads that run jobs, such as the writing of files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread


class Background:
    """Threads that run jobs, one each; a later call raises what a job has raised.

    A signal's exception may end any call here; waiting again waits for the same jobs. The
    interpreter waits for the last jobs before it exits, so a started job is always finished.

    Args:
        most: jobs that run at the same time.
    """

    def __init__(self, most: int = 1) -> None:
        # Python before 3.13 takes a thread for dead if a signal interrupts Thread.join, and does
        # not wait for it at exit: a tensor operation that is cut off there aborts the process.
        self._jobs: list[Future[None]] = []  # in the order in which they were started
        self._error: BaseException | None = None
        self.most = most

    def start(self, job: Callable[[], object]) -> None:
        """Start a job once fewer than ``most`` others run; raise what one of these raised."""
        self._finish([state for state in self._jobs if state.done()])
        self._finish(self._jobs[: max(len(self._jobs) - self.most + 1, 0)])
        self._raise()
        state: Future[None] = Future()
        try:
            self._jobs.append(state)
            Thread(target=_run, args=(job, state)).start()
        except (RuntimeError, MemoryError):  # no thread can be started: it is done in this one
            _run(job, state)
        except BaseException:  # a signal
            if state.cancel():  # before the job was begun: now it never is
                self._jobs.remove(state)
            raise

    def wait(self) -> None:
        """Wait for all jobs, and raise what the first of those that failed has raised."""
        self._finish(self._jobs[:])
        self._raise()

    def _finish(self, jobs: list[Future[None]]) -> None:
        """Wait for some jobs, and note the first error."""
        for state in jobs:
            error = None if state.cancelled() else state.exception()
            self._error = self._error or error
            self._jobs.remove(state)

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error


def _run(job: Callable[[], object], state: Future[None]) -> None:
    if not state.set_running_or_notify_cancel():
        return
    try:
        job()
    except BaseException as error:  # the main thread raises it, whatever it is
        state.set_exception(error)
    else:
        state.set_result(None)
