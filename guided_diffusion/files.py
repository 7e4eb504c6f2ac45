"""Safe writing: files that appear whole or not at all, writable folders, and background jobs.

A file is written under a temporary name in its own folder, flushed to disk and then renamed, so
that an interrupted run never leaves half a checkpoint, log, mask or score behind.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from guided_diffusion.errors import UserError

FREE_SPACE_HINT = "Free some space or choose another folder."
CHECKPOINTS_HINT = "Free some space or choose another --out_dir; earlier checkpoints are intact."


@contextmanager
def writing(path: Path, *, hint: str = FREE_SPACE_HINT) -> Iterator[None]:
    """Report a failure inside this context as a file that cannot be written.

    Raises:
        UserError: an OSError or RuntimeError occurred while ``path`` was written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(path, f"cannot be written ({error})", hint) from error


@contextmanager
def atomic_write(path: Path, *, hint: str = FREE_SPACE_HINT) -> Iterator[Path]:
    """Yield a temporary path; renamed to ``path`` on success and deleted on failure.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is unchanged. A folder,
            a device or a pipe is never replaced.
    """
    if path.exists() and not path.is_file():
        raise UserError(path, "is not a file that can be replaced", "Choose another name.")
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
    """Make a folder, check that it can be written to, and return it.

    Raises:
        UserError: it cannot be made or written to; ``flag`` names it in the message.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # unnamed: several processes may check at once
            pass
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError(f"{flag} {path}", problem, f"Choose another {flag}.") from error
    return path


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


def nearest_path(path: Path, otherwise: str) -> str:
    """Suggest what is there for a path that is not; where nothing is near, give ``otherwise``."""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    try:
        there = {entry.name: entry for entry in missing.parent.iterdir()}
    except OSError:
        return otherwise
    close = difflib.get_close_matches(missing.name, there.keys() - {missing.name}, n=1)
    return f"Did you mean {there[close[0]]}?" if close else otherwise
