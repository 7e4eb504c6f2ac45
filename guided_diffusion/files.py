"""Safe writing: files that appear whole or not at all, writable folders, and background jobs.

A file is written under a temporary name in its own folder, flushed to disk and then renamed, so
that an interrupted run never leaves half a checkpoint, log, mask or score behind. Temporary names
hold the process that made them; what a killed process has left is removed by the next run.
"""

from __future__ import annotations

import csv
import difflib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, count
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

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
    require_replaceable(path, hint=hint)
    part = path.with_name(temporary_name(path.name))
    try:
        with writing(path, hint=hint):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):  # a file system that became read-only refuses this as well
            part.unlink(missing_ok=True)


def append(path: Path, text: str, *, hint: str = FREE_SPACE_HINT) -> None:
    """Append a text to a file, in one piece, and flush it to disk.

    Raises:
        UserError: it cannot be written; the file is as before.
    """
    content = text.encode("utf-8")
    with writing(path, hint=hint), path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())


def require_replaceable(path: Path, *, hint: str = FREE_SPACE_HINT) -> None:
    """Raise a :class:`UserError` for a folder, a device or a pipe in the place of a file."""
    with writing(path, hint=hint):
        blocked = path.exists() and not path.is_file()
    if blocked:
        hint = "Remove it, or choose another name."
        raise UserError(path, "is not a file that can be replaced", hint)


def make_folder(path: Path, *, flag: str = "--out_dir", hint: str = "") -> Path:
    """Make a folder, check that it can be written to, and return it.

    Temporary files of killed runs are removed from it.

    Raises:
        UserError: it cannot be made or written to; ``flag`` names it in the message.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:  # unnamed: several may check at once
            file.write(b" ")
            file.flush()
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError(
            f"{flag} {path}".strip(), problem, hint or f"Choose another {flag}."
        ) from error
    remove_leftovers(path)
    return path


def expanded(path: str | os.PathLike[str], *, flag: str = "") -> Path:
    """Return a path with ``~`` expanded.

    Raises:
        UserError: an unknown user, or a NUL character; ``flag`` names the path in the message.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"{flag} {text!r}".strip(), "has a NUL character", "Correct the path.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{flag} {text}".strip(),
            f"no home folder is known for {Path(text).parts[0]}",
            f"Write the path out, or ./{text} for a folder of that name.",
        ) from error


# ------------------------------------------------------------------------------- temporary files

_LONGEST_NAME = 255
_LEFTOVER = re.compile(r"(?:\.part|decoded)-([0-9a-f]{8})\.(\d{1,9})\.(\d+)-.*", re.DOTALL)


def temporary_name(name: str, prefix: str = ".part") -> str:
    """Return a hidden name for a file in the making: it names this process and ends as ``name``."""
    start = f"{prefix}-{_host()}.{os.getpid()}.{_start_of(os.getpid())}-"
    if len(os.fsencode(start + name)) <= _LONGEST_NAME:
        return start + name
    return f"{start}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-{name[-16:]}"


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this host have left directly in a folder.

    Only temporary files and folders of this package are; those of running processes stay.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - text: folders of results hold 100,000 names
    except OSError:
        return
    for name in names:
        match = _LEFTOVER.fullmatch(name)
        if match and match[1] == _host() and _start_of(int(match[2])) != match[3]:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


@cache
def _host() -> str:
    """Eight digits for this machine, or for this container: process numbers are unique in it."""
    try:
        space = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the target is no path
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _start_of(pid: int) -> str:
    """When a process started; empty where it has ended, 0 where the system does not say."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if state in b"ZX" else rest[18].decode()
    except (OSError, IndexError, ValueError):
        pass
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:  # it is another user's
            pass
    return "0"


# -------------------------------------------------------------------------------- our own records


class DamagedFile(UserError):
    """A record of this package whose content is not what was written: torn, binary or changed.

    Args:
        path: the file.
        why: what is wrong with it, such as "it is empty".
        hint: what to do about it.
    """

    def __init__(self, path: Path, why: str, hint: str) -> None:
        self.why = why
        super().__init__(path, f"is damaged ({why})", hint)


class Table(NamedTuple):
    """A CSV file: its columns, its rows, and the number of lines that have too few or many fields.

    The last line may be ``cut``: it does not end, so that its last field may lack something.
    """

    columns: list[str]
    rows: list[dict[str, str]]
    bad: int
    cut: bool


def read_json(path: Path, *, hint: str) -> dict[str, Any] | None:
    """Read an object from a JSON file of this package; None where there is no such file.

    Raises:
        DamagedFile: it holds something else; ``hint`` says what to do about it.
        UserError: it cannot be opened.
    """
    text = _read_text(path, hint)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is empty" if not text.strip() else f"it is not JSON: {error}"
        raise DamagedFile(path, why, hint) from error
    if not isinstance(found, dict):
        why = f"it holds a {type(found).__name__} instead of names with values"
        raise DamagedFile(path, why, hint)
    return found


def read_table(
    path: Path, *, needs: Collection[str], hint: str, keep_cut: bool = True
) -> Table | None:
    """Read a CSV file of this package; None where there is no such file.

    A last line that is cut is a row if it has all fields, unless ``keep_cut`` is False.

    Raises:
        DamagedFile: it is no text, or lacks one of the columns it ``needs``; ``hint`` says what to
            do about it.
        UserError: it cannot be opened.
    """
    text = _read_text(path, hint)
    if text is None:
        return None
    try:
        header, *lines = [*csv.reader(io.StringIO(text, newline=""))] or [[]]
    except csv.Error as error:
        raise DamagedFile(path, f"it is not CSV: {error}", hint) from error
    if missing := [name for name in needs if name not in header]:
        why = f"it has no column {missing[0]}" if text.strip() else "it is empty"
        raise DamagedFile(path, why, hint)
    cut = not text.endswith(("\n", "\r"))
    lines = [line for line in (lines[:-1] if cut and not keep_cut else lines) if line]
    bad = sum(len(line) != len(header) for line in lines)
    rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
    return Table(header, rows, bad, cut)


def set_aside(path: Path, as_what: str = "damaged") -> Path:
    """Rename a file to ``NAME.damaged``, or to that with a number, and return its new path.

    Raises:
        UserError: it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.{as_what}{number}") for number in chain([""], count(2)))
    kept = next(name for name in names if not os.path.lexists(name))
    with writing(path):
        path.rename(kept)
    return kept


def _read_text(path: Path, hint: str) -> str | None:
    """Read a text file in UTF-8; None where there is none. A device may never end."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(path, "is not a file", hint)
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DamagedFile(path, "it is not a text file in UTF-8", hint) from error
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", hint) from error


# ------------------------------------------------------------------------------- background jobs


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


def nearest_path(path: Path, otherwise: str) -> str:
    """Suggest what is there for a path that is not; where nothing is near, give ``otherwise``."""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    try:
        there = {entry.name: entry for entry in missing.parent.iterdir()}
    except OSError:
        return otherwise
    close = difflib.get_close_matches(missing.name, there.keys() - {missing.name}, n=1)
    return f"Did you mean {there[close[0]]}?" if close else otherwise
