"""Weights that come with the package, and go by a name where a path is asked for.

Their model cards are beside them in ``weights/``.
"""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.checkpoint.portable import SUFFIX
from guided_diffusion.errors import UserError, did_you_mean
from guided_diffusion.files import expanded, nearest_path

FOLDER = Path(__file__).resolve().parents[1] / "weights"


class Starter(NamedTuple):
    """The SHA-256 of a file of weights, and the preset whose settings its masks are drawn with."""

    sha256: str
    preset: str


STARTERS = {
    "isic-small": Starter(
        "4394d1e8f49a25a10146272f37d235fb64139b9992799b8fa25a90477389259c", preset="small"
    ),
}


def starter_named(path: str | PathLike[str]) -> Starter | None:
    """Return the weights of a name; None for other words, and where a file has that name."""
    starter = STARTERS.get(str(path))
    return None if starter and expanded(path).exists() else starter


def starter_file(name: str) -> Path:
    """Return the file of the weights of a name, which is read once to compare its checksum.

    Raises:
        UserError: the file is not the one that was published, or is not there.
    """
    file = FOLDER / f"{name}{SUFFIX}"
    hint = "Install the package again, or copy the file again from its source."
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UserError(name, f"its file {file} cannot be read ({why})", hint) from error
    if found != STARTERS[name].sha256:
        raise UserError(name, f"its file {file} is damaged: its checksum (SHA-256) differs", hint)
    return file


def other_name(path: Path, otherwise: str) -> str:
    """Suggest what is there for a path that is not, and list the weights if it is a bare name."""
    name = str(path)
    if path.suffix or len(path.parts) != 1:
        return nearest_path(path, otherwise)
    if name in STARTERS:  # a folder without weights, or written as a path
        return (
            f"{name} is also the name of weights that come with the package: write it without a "
            f"slash, where no file or folder is called so. {otherwise}"
        )
    near = did_you_mean(name, STARTERS, "") or nearest_path(path, "")
    return f"{near} Weights that come with the package: {', '.join(STARTERS)}. {otherwise}".strip()
