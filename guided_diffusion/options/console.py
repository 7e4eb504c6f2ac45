"""The console of a command: output that cannot be shown is no reason to end a run.

A pipe whose reader has gone, a full disk and a closed descriptor swallow what is printed from then
on; letters that the console's code page lacks are shown as backslash escapes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

NAMES = {"stdout": "standard output", "stderr": "standard error"}


class Tolerant:
    """A text stream that goes on as a sink once its own stream cannot be written.

    The reason is told once, on standard error; a reader that went away knows it already.

    Args:
        stream: what is written to.
        name: in words, for the message.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.name = name
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        if not self.failed:
            try:
                self._write(text)
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        if not self.failed:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _give_up(self, error: OSError | ValueError) -> None:
        """Send what is buffered, and what is still to come, to the null device."""
        self.failed = True
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        if isinstance(error, OSError) and error.errno != errno.EPIPE:
            with suppress(AttributeError):
                sys.stderr.write(f"{self.name} cannot be written ({error.strerror})\n")


@contextmanager
def tolerant_console() -> Iterator[None]:
    """Let a command write to standard output and error whatever becomes of them.

    A descriptor that is closed is opened on the null device, as otherwise the next file that is
    opened, a checkpoint say, would take its place and receive what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    before = {name: getattr(sys, name) for name in NAMES}
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        tolerant = [Tolerant(before[name] or nowhere, words) for name, words in NAMES.items()]
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in tolerant)
        try:
            yield
        finally:
            for stream in tolerant:
                stream.flush()
            sys.stdout, sys.stderr = before.values()
