"""The one kind of error a user should ever see, and how a script ends on it.

Every room raises :class:`UserError` where input from outside (a flag, a file, a folder) is not what
the code can work with; the scripts run inside :func:`exit_on_user_error`, which turns it into one
message on stderr and exit code 2. Anything else that escapes is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class UserError(Exception):
    """Bad input: names the file or flag, what was found, what was expected, and the mend."""

    cases: tuple[str, ...] = ()

    def __init__(
        self,
        what: object,
        *,
        found: object,
        expected: object,
        mend: str,
        cases: Iterable[str] = (),
    ) -> None:
        """``cases``: every case this is about, where the message can only name a few."""
        self.cases = tuple(sorted(cases))
        super().__init__(f"{what}: found {found}, expected {expected}. {mend}")

    def __reduce__(self) -> tuple[Callable[[str], UserError], tuple[str]]:
        """Travel whole from a process that reads data to the one that trains."""
        return _again, (str(self),)


def _again(message: str) -> UserError:
    return UserError.__new__(UserError, message)


_gathered: ContextVar[list[UserError] | None] = ContextVar("gathered", default=None)


def refuse(error: UserError) -> None:
    """Raise ``error``, unless somebody gathers: then it is noted, and the caller does without."""
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


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script's body: a :class:`UserError` becomes one line and exit code 2, Ctrl-C 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept", file=sys.stderr)
        sys.exit(130)
