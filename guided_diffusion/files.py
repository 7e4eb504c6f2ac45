"""Writing so that nothing is ever half-written: a file appears whole under its name, or not at all.

Used by everything that writes results: checkpoints, logs, predictions and scores.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from guided_diffusion.errors import UserError

ROOM = "Free some space or choose another folder."
INTACT = "Free some space or choose another --out_dir; earlier checkpoints are intact."


@contextmanager
def writing(path: Path, *, hint: str = ROOM) -> Iterator[None]:
    """Say what went wrong where a file cannot be written.

    Raises:
        UserError: it cannot.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            path,
            found=f"that it cannot be written ({error})",
            expected="room and permission to write",
            hint=hint,
        ) from error


@contextmanager
def atomic_write(path: Path, *, hint: str = ROOM) -> Iterator[Path]:
    """Give a path to write to; on success the file takes its real name, on failure it vanishes.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is as it was.
    """
    part = path.with_name(f".part-{path.name}")
    try:
        with writing(path, hint=hint):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_folder(path: Path, *, flag: str = "--out_dir") -> Path:
    """Make a folder that can be written to, and return it.

    Raises:
        UserError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # nameless: several processes may ask at once
            pass
    except OSError as error:
        raise UserError(
            flag,
            found=f"{path}, which cannot be written ({error.strerror})",
            expected="a folder with permission to write",
            hint=f"Choose another {flag}.",
        ) from error
    return path


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
