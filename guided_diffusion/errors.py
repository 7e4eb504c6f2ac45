"""The one kind of error a user should ever see, and how a script ends on it or on a signal.

:class:`UserError` is raised wherever input from outside (a flag, a file, a folder) cannot be used;
the scripts run inside :func:`exit_on_user_error`, which turns it into one message on stderr and
exit code 2, as an OSError that names a file does, and whatever says that memory ran out. A signal
raises :class:`Stopped`. Any other exception that escapes is a bug in this package and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any


class UserError(Exception):
    """Bad input: ``{what}: {problem}. {hint}``.

    Args:
        what: the file, folder or flag, such as ``--out_dir results/x``.
        problem: what is wrong with it, a clause without a full stop.
        hint: what to do about it, a sentence.
        cases: every case this is about, where the message can name only a few.
    """

    cases: tuple[str, ...] = ()

    def __init__(self, what: object, problem: str, hint: str, *, cases: Iterable[str] = ()) -> None:
        self.cases = tuple(sorted(cases))
        super().__init__(f"{what}: {problem}. {hint}")

    def __reduce__(self) -> tuple[Callable[[str], UserError], tuple[str]]:
        """Pickle the message, for processes that read data hand errors to the one that trains."""
        return _again, (str(self),)


def _again(message: str) -> UserError:
    return UserError.__new__(UserError, message)


MEMORY_HINT = "Use smaller images, fewer at a time, fewer processes, or a larger machine."

_MEMORY = re.compile(
    r"tried to allocate|unable to allocate|out of memory|can't allocate memory|not enough memory"
    r"|Invalid buffer size|Storage size calculation overflowed|multiplication overflow"
    r"|array is too big|Maximum allowed dimension exceeded|out of shared memory|ALLOC_FAILED",
    re.IGNORECASE,
)
_AMOUNT = re.compile(r"allocate (\d[\d.]*) ?(bytes|[KMGTPE]?i?B)|buffer size: (\d[\d.]* \w+)", re.I)


def memory_problem(error: BaseException) -> str:
    """Say that memory ran out, and what was asked for if the error tells; empty for other errors.

    NumPy, PyTorch on every device, and Python have different errors for it.
    """
    text = str(error)
    kinds = (RuntimeError, ValueError, OSError)
    known = isinstance(error, kinds) and not isinstance(error, UserError) and _MEMORY.search(text)
    if not (known or isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM):
        return ""
    amount = _AMOUNT.search(text)
    if amount is None:
        own_words = isinstance(error, MemoryError) and not _MEMORY.search(text)
        return (own_words and text) or "more memory is needed than there is"
    value, unit, other = amount.groups()
    asked = other or f"{value} {unit}"
    if unit == "bytes":
        asked = f"{int(float(value)) / 2**30:.1f} GiB"
    return f"more memory is needed than there is (a part of {asked} was asked for)"


_gathered: ContextVar[list[UserError] | None] = ContextVar("gathered", default=None)


def refuse(error: UserError) -> None:
    """Raise ``error``, or note it where errors are being collected."""
    gathered = _gathered.get()
    if gathered is None:
        raise error
    gathered.append(error)


@contextmanager
def gathering() -> Iterator[list[UserError]]:
    """Collect what :func:`refuse` would raise, for the check that lists all that is wrong."""
    gathered: list[UserError] = []
    token = _gathered.set(gathered)
    try:
        yield gathered
    finally:
        _gathered.reset(token)


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Suggest the nearest of the known words; where none is near, give the other hint."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {close[0]}?" if close else otherwise


class Stopped(KeyboardInterrupt):
    """A signal ends the command; :attr:`code` is the exit code that shells give it."""

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.code = 128 + number
        super().__init__(self.name)


def stop(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise :class:`Stopped` at once, or as soon as it is safe."""
    stopped = Stopped(number)
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        # Torch would swallow the exception as it loads NumPy. No work was begun: just end.
        _tell(stopped)
        os._exit(stopped.code)
    if not postponed(number, frame):
        raise stopped


_postponements: dict[int, int] = {}


def postponed(number: int, frame: FrameType | None) -> bool:
    """Send a signal again a little later if it came inside ``logging`` or an import.

    An exception there may leave a lock of Python's own held, for which other threads, such as the
    writer of a checkpoint, would wait for ever. After five seconds it is not postponed again.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == "logging" or frame.f_code.co_filename.startswith("<frozen importlib"):
            break
        frame = frame.f_back
    count = _postponements.pop(number, 0)
    if frame is None or count >= 100:
        return False
    _postponements[number] = count + 1
    _send_later(number)
    return True


def _send_later(number: int) -> None:
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _tell(stopped: Stopped) -> None:
    print(f"stopped by {stopped.name}; what is finished is kept", file=sys.stderr, flush=True)


def _send_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose :class:`Stopped` was raised in a destructor, and so ignored."""
    stopped = unraisable.exc_value
    if not isinstance(stopped, Stopped):
        sys.__unraisablehook__(unraisable)
        return
    _send_later(stopped.code - 128)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGTERM, SIGHUP and Ctrl-C a handler inside this context.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored. Threads other than the main one
    cannot handle signals: there, nothing changes.
    """
    before: dict[signal.Signals, Any] = {}
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and threading.current_thread() is threading.main_thread():
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            if name == "SIGHUP" and before[number] is signal.SIG_IGN:
                del before[number]
    hook = sys.unraisablehook
    try:
        sys.unraisablehook = _send_again
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
        sys.unraisablehook = hook


_HINTS = {
    errno.ENOSPC: "Free some space, or choose another folder.",
    errno.EDQUOT: "Free some space, or choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Allow more open files (ulimit -n), or use fewer --num_workers.",
    errno.EIO: "Check the disk.",
}


def os_message(error: OSError) -> str:
    """Say what the operating system refused; empty for an error that is not the system's.

    Those that name no file are told if they are about space, limits or permissions.
    """
    named = [name for name in (error.filename, error.filename2) if name not in (None, "")]
    known = {*_HINTS, errno.EACCES, errno.EPERM, errno.EROFS}
    if not named and error.errno not in known:
        return ""
    what = os.fsdecode(named[0]) if named and not isinstance(named[0], int) else "a file"
    hint = _HINTS.get(error.errno or 0, "Check the path and its permissions.")
    return f"{what}: {error.strerror}. {hint}"


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script: bad input, file errors and full memory become one line and exit code 2.

    A signal n ends it with 128 + n.
    """
    try:
        with handling_signals(stop):
            yield
    except (UserError, OSError, RuntimeError, ValueError, MemoryError) as error:
        if problem := memory_problem(error):
            message = f"memory: {problem}. {MEMORY_HINT}"
        elif isinstance(error, OSError):
            message = os_message(error)
        else:
            message = str(error) if isinstance(error, UserError) else ""
        if not message:
            raise
        line = f"error: {' '.join(message.splitlines())}\n"
        print(line, end="", file=sys.stderr)  # whole, since several processes may write
        sys.exit(2)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        _tell(stopped)
        sys.exit(stopped.code)


@contextmanager
def python_names() -> Iterator[None]:
    """Let messages speak of parameters, ``steps``, where a command speaks of flags, ``--steps``."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--(?=[a-z])", "", str(error)),)
        raise
