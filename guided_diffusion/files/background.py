"""A thread that runs one job at a time, such as the writing of a file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread


class Background:
    """A thread that runs one job at a time; the next call raises what a job has raised.

    A signal's exception may end any call here; waiting again waits for the same job. The
    interpreter waits for the last job before it exits, so a started job is always finished.
    """

    def __init__(self) -> None:
        # Python before 3.13 takes a thread for dead if a signal interrupts Thread.join, and does
        # not wait for it at exit: a tensor operation that is cut off there aborts the process.
        self._job: Future[None] | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Start a job once the previous one is done; raise what that one raised."""
        self.wait()
        state: Future[None] = Future()
        try:
            self._job = state
            Thread(target=_run, args=(job, state)).start()
        except (RuntimeError, MemoryError):  # no thread can be started: it is done in this one
            _run(job, state)
        except BaseException:  # a signal
            if state.cancel():  # before the job was begun: now it never is
                self._job = None
            raise

    def wait(self) -> None:
        """Wait for the current job, if any, and raise what it raised."""
        if self._job:
            error = self._job.exception()
            self._job = None
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
