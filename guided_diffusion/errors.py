"""The one kind of error a user should ever see, and how a script ends on it or on a signal.

:class:`UserError` is raised wherever input from outside (a flag, a file, a folder) cannot be used;
the scripts run inside :func:`exit_on_user_error`, which turns it into one message on stderr and
exit code 2, as an OSError that names a file does. A signal raises :class:`Stopped`. Any other
exception that escapes is a bug in this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


def stop(number: int, frame: object) -> None:
    """Handle a signal: raise :class:`Stopped` at once."""
    raise Stopped(number)


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
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
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script: bad input and file errors end with exit code 2, a signal n with 128 + n."""
    try:
        with handling_signals(stop):
            yield
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}. Check the path and its permissions."
        print("error:", " ".join(message.splitlines()), file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped by {stopped.name}; what is finished is kept", file=sys.stderr)
        sys.exit(stopped.code)


@contextmanager
def python_names() -> Iterator[None]:
    """Let messages speak of parameters, ``steps``, where a command speaks of flags, ``--steps``."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--(?=[a-z])", "", str(error)),)
        raise
