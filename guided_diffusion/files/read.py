"""Reading of text files: those of others, and the records of this package.

Nothing is read from a pipe or a device, and no more of a file than one of its kind may hold.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import stat
from collections.abc import Collection
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.errors import UserError
from guided_diffusion.files.write import writing

MOST_TEXT, MOST_TABLE = 2**26, 2**28
"""Bytes of a text file, and of a CSV file of this package, that are read: 64 and 256 MiB."""


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


def nearest_path(path: Path, otherwise: str) -> str:
    """Suggest what is there for a path that is not; where nothing is near, give ``otherwise``."""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    try:
        there = {entry.name: entry for entry in missing.parent.iterdir()}
    except OSError:
        return otherwise
    close = difflib.get_close_matches(missing.name, there.keys() - {missing.name}, n=1)
    return f"Did you mean {there[close[0]]}?" if close else otherwise


def require_file(path: Path) -> None:
    """Refuse a named pipe, a socket and a device: reading from them may never end.

    Opening tells what else is wrong with a path.

    Raises:
        UserError: it is one of them.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        problem = f"is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file"
        raise UserError(path, problem, "Replace it by a file, or remove it.")


def read_text(path: Path, *, most: int = MOST_TEXT) -> str:
    """Read a text file in UTF-8, with or without a mark of the byte order.

    Raises:
        UserError: it is longer than ``most`` bytes, or a pipe, a socket or a device.
        OSError, UnicodeDecodeError: it cannot be opened, or is no text.
    """
    require_file(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        problem = f"is longer than {most // 2**20} MiB, more than any file of its kind"
        raise UserError(path, problem, "Check that it is the right file.")
    return content.decode("utf-8-sig")


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


_NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|-inf"
_FORMULA = re.compile(rf"'*(?!({_NUMBER})\Z)[=+\-@\t\r\n]", re.IGNORECASE)


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
    text = _text_of(path, hint)
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
    text = _text_of(path, hint, most=MOST_TABLE)
    if text is None:
        return None
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        header, *lines = [line for line in reader if line] or [[]]
    except csv.Error as error:
        raise DamagedFile(path, f"it is not CSV: {error}", hint) from error
    if missing := [name for name in needs if name not in header]:
        why = f"it has no column {missing[0]}" if text.strip() else "it is empty"
        raise DamagedFile(path, why, hint)
    cut = not text.endswith(("\n", "\r"))
    lines = lines[:-1] if cut and not keep_cut else lines
    bad = sum(len(line) != len(header) for line in lines)
    rows = [
        dict(zip(header, map(unmarked_text, line), strict=True))
        for line in lines
        if len(line) == len(header)
    ]
    return Table(header, rows, bad, cut)


def marked_text(text: str) -> str:
    """Put a ' before a text that a spreadsheet would take for a formula; numbers are none.

    Every field of text in CSV is written so, and :func:`read_table` takes the mark off again.
    """
    return f"'{text}" if _FORMULA.match(text) else text


def unmarked_text(field: str) -> str:
    """Return the text that :func:`marked_text` was given."""
    return field[1:] if field[:1] == "'" and _FORMULA.match(field) else field


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


def _text_of(path: Path, hint: str, most: int = MOST_TEXT) -> str | None:
    """Read a text file of this package; None where there is none."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(path, "is not a file", hint)
        return read_text(path, most=most)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DamagedFile(path, "it is not a text file in UTF-8", hint) from error
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", hint) from error
