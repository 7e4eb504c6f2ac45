"""Safe writing: files that appear whole or not at all, and writable folders.

A file is written under a temporary name in its own folder, flushed to disk and then renamed, so
that an interrupted run never leaves half a checkpoint, log, mask or score behind. Temporary names
hold the process that made them; what a killed process has left is removed by the next run. Nothing
is written through a link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from guided_diffusion.errors import UserError

FREE_SPACE_HINT = "Free some space or choose another folder."
CHECKPOINTS_HINT = "Free some space or choose another --out_dir; earlier checkpoints are intact."
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


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
def atomic_write(path: Path, *, hint: str = FREE_SPACE_HINT, mode: int = 0o666) -> Iterator[Path]:
    """Yield the path of a new, empty file; renamed to ``path`` on success and deleted on failure.

    ``mode`` are its permissions, less those that the umask takes.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is unchanged. A folder,
            a device or a pipe is never replaced.
    """
    require_replaceable(path, hint=hint)
    part = path.with_name(temporary_name(path.name))
    try:
        with writing(path, hint=hint):
            os.close(create(part, mode=mode))
            yield part
            with open(part, "rb", opener=_file_itself) as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        with suppress(OSError):  # a file system that became read-only refuses this as well
            part.unlink(missing_ok=True)


def create(path: Path, *, mode: int = 0o666) -> int:
    """Create a file that is not there, a link neither, and return its descriptor for writing."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, mode)


def _file_itself(path: str, flags: int) -> int:
    """Open a regular file, and neither follow a link nor wait for a pipe."""
    with suppress(FileNotFoundError):
        mode = Path(path).lstat().st_mode
        if stat.S_ISLNK(mode):
            raise OSError("it is a link, and results are not written through links")
        if not stat.S_ISREG(mode):
            raise OSError("it is not a file")
    descriptor = os.open(path, flags | _NO_LINK | _NO_WAIT, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a file")
    return descriptor


def append(path: Path, text: str, *, hint: str = FREE_SPACE_HINT, sync: bool = True) -> None:
    """Append a text to a file, in one piece, and with ``sync`` flush it to disk.

    Raises:
        UserError: it cannot be written, or is a link or no file; the file is as before.
    """
    content = text.encode("utf-8", "backslashreplace")
    with writing(path, hint=hint), open(path, "ab", buffering=0, opener=_file_itself) as file:
        end = file.tell()
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(file.fileno())


def require_replaceable(path: Path, *, hint: str = FREE_SPACE_HINT) -> None:
    """Raise a :class:`UserError` for a folder, a device or a pipe in the place of a file."""
    with writing(path, hint=hint):
        blocked = path.exists() and not path.is_file()
    if blocked:
        hint = "Remove it, or choose another name."
        raise UserError(path, "is not a file that can be replaced", hint)


def make_folder(path: Path, *, flag: str = "--out_dir", hint: str = "", mode: int = 0o777) -> Path:
    """Make a folder, check that it can be written to, and return it.

    Temporary files of killed runs are removed from it. A new one gets the permissions ``mode``.

    Raises:
        UserError: it cannot be made or written to; ``flag`` names it in the message.
    """
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
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


# ------------------------------------------------------------------------------- temporary files

_LONGEST_NAME = 255
_LEFTOVER = re.compile(r"(?:\.part|decoded)-([0-9a-f]{8})\.(\d{1,9})\.(\d+)-.*", re.DOTALL)


def temporary_name(name: str, prefix: str = ".part") -> str:
    """Return a hidden name for a file in the making: it names this process and ends as ``name``.

    Nobody can tell it beforehand, and so put something in its place.
    """
    own = f"{_host()}.{os.getpid()}.{_start_of(os.getpid())}"
    start = f"{prefix}-{own}-{secrets.token_hex(4)}-"
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
