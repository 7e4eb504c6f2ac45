"""The one kind of error a user should ever see, and how a script ends on it.

:class:`UserError` is raised wherever input from outside (a flag, a file, a folder) cannot be used;
the scripts run inside :func:`exit_on_user_error`, which turns it into one message on stderr and
exit code 2, as an OSError that names a file does. Any other exception that escapes is a bug in this
package and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


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
    """Run a script: bad input and file errors become one line and exit code 2, Ctrl-C 130."""
    try:
        yield
    except (UserError, OSError) as error:
        message = os_message(error) if isinstance(error, OSError) else str(error)
        if not message:
            raise
        print("error:", " ".join(message.splitlines()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(130)


@contextmanager
def python_names() -> Iterator[None]:
    """Let messages speak of parameters, ``steps``, where a command speaks of flags, ``--steps``."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--(?=[a-z])", "", str(error)),)
        raise
