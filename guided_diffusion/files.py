"""Writing so that nothing is ever half-written: a file appears whole under its name, or not at all.

Used by everything that writes results: checkpoints, logs, predictions and scores.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guided_diffusion.errors import UserError

ROOM = "Free some space or choose another folder."
INTACT = "Free some space or choose another --out_dir; earlier checkpoints are intact."


@contextmanager
def writing(path: Path, *, mend: str = ROOM) -> Iterator[None]:
    """Say what went wrong where a file cannot be written.

    Raises:
        UserError: it cannot.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(
            path,
            found=f"that it cannot be written ({error})",
            expected="room and permission to write",
            mend=mend,
        ) from error


@contextmanager
def whole(path: Path, *, mend: str = ROOM) -> Iterator[Path]:
    """Give a path to write to; on success the file takes its real name, on failure it vanishes.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is as it was.
    """
    part = path.with_name(f".part-{path.name}")
    try:
        with writing(path, mend=mend):
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_folder(path: Path, *, flag: str = "--out_dir") -> Path:
    """Make a folder that can be written to, and return it.

    Raises:
        UserError: it cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # nameless: several processes may ask at once
            pass
    except OSError as error:
        raise UserError(
            flag,
            found=f"{path}, which cannot be written ({error.strerror})",
            expected="a folder with permission to write",
            mend=f"Choose another {flag}.",
        ) from error
    return path
