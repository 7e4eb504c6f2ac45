"""The log of a run, for people to watch and for programs to read.

Text goes to the console and to ``log.txt``; key-value pairs collect until :func:`dumpkvs` writes
them as a table to both, as a row to ``progress.csv`` and as a line to ``progress.json``. Files are
appended to; :func:`rewind` drops the steps that a restarted run takes again. Keys and file names
are those of OpenAI's logger. Sinks, such as TensorBoard, receive the same numbers, and pictures.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.files import (
    CHECKPOINTS_HINT,
    DamagedFile,
    Table,
    append,
    atomic_write,
    expanded,
    make_folder,
    marked_text,
    read_table,
    set_aside,
    writing,
)

Pixels = NDArray[np.uint8]
Values = dict[str, Any]


class Sink(Protocol):
    """A live display of a run; no method may raise, nor delay the run."""

    def numbers(self, values: Values) -> None:
        """Show a row of the log, which contains ``step``."""

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Show a picture, uint8 [H, W, 3], in place of the last one of that name."""

    def close(self) -> None:
        """Show what is left, at the end of the run."""


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
    path = expanded(folder, flag="--out_dir") if folder else None
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


def rewind(step: int, *, new: bool = False) -> None:
    """Drop what the run's folder holds of later steps than this one, and lines that were cut.

    A run that starts at ``step`` takes those steps again. A ``new`` run leaves the numbers of an
    earlier one as ``progress.csv.old``. Files that are damaged are set aside, and what can be read
    of them is kept.
    """
    if _current.folder is None:
        return
    path = _current.folder / "progress.csv"
    for earlier in (path, path.with_suffix(".json")):
        if new and earlier.is_file():
            set_aside(earlier, "old")
    known = _read_progress(path, ["step"]) if path.is_file() else None
    if known is not None:
        rows: dict[int, dict[str, str]] = {}
        whole = [row for row in known.rows if re.fullmatch(r"\d{1,18}", row["step"])]
        for row in whole:
            number = int(row["step"])
            if number <= step:
                rows[number] = _merged(rows.get(number, {}), row)
        damaged = known.bad + len(known.rows) - len(whole) > 0
        if damaged:
            _set_aside(path, "a line is not that of a step")
        if damaged or known.cut or list(rows.values()) != known.rows:
            _write_rows(path, known.columns, list(rows.values()))
    path = path.with_suffix(".json")
    if path.is_file():
        with writing(path, hint=CHECKPOINTS_HINT):
            lines = path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        wrong = [line for line, at in zip(lines, steps, strict=True) if at is None]
        if any(line.endswith(b"\n") or not line.startswith(b'{"') for line in wrong):
            _set_aside(path, "a line is not that of a step")
        good = [
            line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step
        ]
        if good != lines:
            with atomic_write(path, hint=CHECKPOINTS_HINT) as part:
                part.write_bytes(b"".join(good))


def _step_of(line: bytes) -> float | None:
    """The step of a line of ``progress.json``, 0 without one; None for what is no whole line."""
    try:
        return float(json.loads(line).get("step", 0)) if line.endswith(b"\n") else None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def append_row(path: Path, values: Values) -> None:
    """Append a row to a CSV file; a new key adds a column to the rows already there.

    The row joins the last one where that is of the same ``step``. A damaged file is set aside.
    """
    texts = {key: "" if value is None else str(value) for key, value in values.items()}
    columns, last = _ends(path)
    if last is not None and set(texts) <= set(columns):
        step = dict(zip(columns, last, strict=False)).get("step")
        if "step" not in texts or texts["step"] != step:
            line = io.StringIO(newline="")
            csv.DictWriter(line, columns).writerow(_marked(texts))
            append(path, line.getvalue(), hint=CHECKPOINTS_HINT, sync=False)
            return
    known = _read_progress(path, [key for key in texts if key == "step"])
    columns, rows = (known.columns, known.rows) if known else ([], [])
    if rows and "step" in texts and texts["step"] == rows[-1]["step"]:
        texts = _merged(rows.pop(), texts)
    _write_rows(path, columns + [name for name in texts if name not in columns], [*rows, texts])


def _ends(path: Path) -> tuple[list[str], list[str] | None]:
    """The columns of a CSV file and the fields of its last line; None unless both are whole."""
    if not path.exists():
        return [], None
    if not path.is_file():
        raise OSError("it is not a file")
    with path.open("rb") as file:
        first = file.readline()
        file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
        end = file.read()
    try:
        lines = [first.decode(), end.rstrip().rpartition(b"\n")[2].decode()]
        columns, last = csv.reader(lines)
    except (ValueError, csv.Error):
        return [], None
    whole = len(last) == len(columns) and end.endswith(b"\n")
    return columns, last if whole else None


def _merged(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Two rows as one; what is in the second row counts."""
    return {**one, **{key: text for key, text in other.items() if text or key not in one}}


def _read_progress(path: Path, needs: Sequence[str]) -> Table | None:
    """Read a CSV file; one that is damaged is set aside, so that there is none."""
    try:
        return read_table(path, needs=needs, hint=CHECKPOINTS_HINT, keep_cut=False)
    except DamagedFile as error:
        _set_aside(path, error.why)
        return None


def _set_aside(path: Path, why: str) -> None:
    log(f"{path} is damaged ({why}); it is kept as {set_aside(path).name}, and made anew")


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    with (
        atomic_write(path, hint=CHECKPOINTS_HINT) as part,
        part.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(map(_marked, rows))


def _marked(row: Mapping[str, str]) -> dict[str, str]:
    return {key: marked_text(text) for key, text in row.items()}


def _append_line(path: Path, text: str) -> None:
    append(path, f"{text}\n", hint=CHECKPOINTS_HINT, sync=False)
