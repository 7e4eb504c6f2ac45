"""One job at a time beside the main thread, for what must not hold a run up.

A checkpoint takes seconds to reach a disk, the pictures of an ensemble a tenth of one; training and
drawing go on meanwhile. Called by ``train_util`` and ``predict``.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread


class Background:
    """Runs jobs in a thread, one after the other; what a job raises arrives at the next call.

    The interpreter waits for the last job before it ends, so a job that was begun is finished.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job once the one before it is done; raises what that one raised."""
        self.wait()
        self._thread = Thread(target=self._run, args=(job,))
        self._thread.start()

    def wait(self) -> None:
        """Wait for the present job, if any, and raise what it raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # the main thread is to hear of everything
            self._error = error
