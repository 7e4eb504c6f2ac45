"""The log of a run, for people to watch and for programs to read.

Text goes to the console and to ``log.txt``; key-value pairs collect until :func:`dumpkvs` writes
them as a table to both, as a row to ``progress.csv`` and as a line to ``progress.json``. Files are
appended to, never truncated. Keys and file names are those of OpenAI's logger. Sinks, such as
TensorBoard, receive the same numbers, and pictures.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.files import CHECKPOINTS_HINT, atomic_write, make_folder, writing

Pixels = NDArray[np.uint8]
Values = dict[str, Any]


class Sink(Protocol):
    """A live display of a run; neither method may block or raise."""

    def numbers(self, values: Values) -> None:
        """Show a row of the log, which contains ``step``."""

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Show a picture, uint8 [H, W, 3], in place of the last one of that name."""


class Logger:
    """The log of one run; with a folder of None it writes to the console alone."""

    def __init__(
        self, folder: Path | None = None, *, quiet: bool = False, sinks: Sequence[Sink] = ()
    ) -> None:
        self.folder = folder
        self.quiet = quiet
        self.sinks = sinks
        self.values: Values = {}

    def log(self, text: str) -> None:
        """Write a line."""
        if not self.quiet:
            print(text, flush=True)
        if self.folder:
            _append_line(self.folder / "log.txt", text)

    def dump(self) -> Values:
        """Write the pairs collected so far, clear them, and return them."""
        values = dict(sorted(self.values.items(), key=lambda pair: pair[0].lower()))
        self.values = {}
        if values:
            self.log(table(values))
        if values and self.folder:
            table_path = self.folder / "progress.csv"
            with writing(table_path, hint=CHECKPOINTS_HINT):
                append_row(table_path, values)
            _append_line(self.folder / "progress.json", json.dumps(values))
        for sink in self.sinks if values else ():
            sink.numbers(values)
        return values


_current = Logger()


def configure(
    folder: str | Path | None = None, *, quiet: bool = False, sinks: Sequence[Sink] = ()
) -> None:
    """Start a log in a folder, which is made if needed; ``quiet`` prints nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    global _current
    path = Path(folder).expanduser() if folder else None
    if path:
        make_folder(path)
    _current = Logger(path, quiet=quiet, sinks=sinks)
    if path:
        log(f"Logging to {path}")


def log(text: str) -> None:
    """Write a line of text."""
    _current.log(text)


def logkv(key: str, value: Any) -> None:
    """Record a value for the next :func:`dumpkvs`."""
    _current.values[key] = value


def picture(name: str, pixels: Pixels, step: int) -> None:
    """Send a picture, uint8 [H, W, 3], to all sinks."""
    for sink in _current.sinks:
        sink.picture(name, pixels, step)


def has_sinks() -> bool:
    """Return whether there are sinks that show pictures."""
    return bool(_current.sinks)


def dumpkvs() -> Values:
    """Write the values recorded since the last call, and return them."""
    return _current.dump()


def table(values: Values) -> str:
    """Draw key-value pairs as a framed table."""
    rows = [(key, f"{v:.4g}" if isinstance(v, float) else str(v)) for key, v in values.items()]
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    frame = "-" * (left + right + 7)
    return "\n".join([frame, *(f"| {k:<{left}} | {v:<{right}} |" for k, v in rows), frame])


def append_row(path: Path, values: Values) -> None:
    """Append a row to a CSV file; a new key adds a column to the rows already there."""
    old: list[dict[str, str]] = []
    names = list(values)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            known = list(reader.fieldnames or [])
            old = list(reader) if set(names) - set(known) else []
        names = known + [name for name in names if name not in known]
        if names == known:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, names).writerow(values)
            return
    with (
        atomic_write(path, hint=CHECKPOINTS_HINT) as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows([*old, values])


def _append_line(path: Path, text: str) -> None:
    with (
        writing(path, hint=CHECKPOINTS_HINT),
        path.open("a", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text + "\n")
