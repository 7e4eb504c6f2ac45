"""The one kind of error a user should ever see, and how a script ends on it.

Every room raises :class:`UserError` where input from outside (a flag, a file, a folder) is not what
the code can work with; the scripts run inside :func:`exit_on_user_error`, which turns it into one
message on stderr and exit code 2. Anything else that escapes is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: names the file or flag, what was found, what was expected, and the mend."""

    def __init__(self, what: object, *, found: object, expected: object, mend: str) -> None:
        super().__init__(f"{what}: found {found}, expected {expected}. {mend}")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Run a script's body: a :class:`UserError` becomes one line and exit code 2, Ctrl-C 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
