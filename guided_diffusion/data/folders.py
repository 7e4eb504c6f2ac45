"""Folders, names, pictures and NIfTI slices: everything between the disk and an array.

What lies on disk is checked here, once: a file that cannot be used is a :class:`UserError` that
names it. Called by ``datasets`` and the loaders, one of which there is for each layout.
"""

from __future__ import annotations

import gc
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from guided_diffusion.errors import UserError, refuse

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii.gz", ".nii")
_RESERVED = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


def open_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with ``~`` expanded; a missing one, or a file, is a :class:`UserError`."""
    folder = Path(directory).expanduser()
    if folder.is_dir():
        return folder
    raise UserError(
        folder,
        found="a file" if folder.exists() else "nothing there",
        expected="a folder of images and masks",
        hint="Pass the folder that holds the data set.",
    )


def walk(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below (and ``directory`` itself) with its sorted file names; nothing is opened.

    Hidden files and folders are left out. Links to folders are followed, but no folder is visited
    twice, so a link that points upwards ends the walk there.
    """
    seen: set[tuple[int, int]] = set()
    pending = [os.fspath(directory)]
    while pending:
        root = pending.pop()
        folders, files, place = _folder_contents(root)
        if place not in seen:
            seen.add(place)
            yield Path(root), files
            pending += [f"{root}/{name}" for name in reversed(folders)]


def _folder_contents(root: str) -> tuple[list[str], list[str], tuple[int, int]]:
    """The visible folders and files in a folder, sorted, and which folder of the disk it is."""
    folders: list[str] = []
    files: list[str] = []
    try:
        stat = os.stat(root)  # noqa: PTH116 - strings, for a path object takes longer than the call
        with os.scandir(root) as entries:
            for entry in entries:
                if _is_visible(entry.name):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except OSError as error:
        raise UserError(
            root,
            found=f"a folder that cannot be listed ({error.strerror})",
            expected="a readable folder",
            hint="Change its permissions, or move it out of the data set.",
        ) from error
    return sorted(folders), sorted(files), (stat.st_dev, stat.st_ino)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere, or in a circle, is no folder: opening it will say so."""
    try:
        return entry.is_dir()
    except OSError:
        return False


@contextmanager
def many_objects() -> Iterator[None]:
    """Keep Python's search for cycles away while 100,000 paths are listed: it takes half the time.

    Paths and entries hold no cycles, so nothing is missed.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def names_in(folder: Path) -> list[str]:
    """The sorted names in a folder, as text: 50,000 path objects would take ten times as long."""
    return sorted(os.listdir(folder))  # noqa: PTH208


def split_name(file_name: str) -> tuple[str, str]:
    """('slice.v2', '.nii.gz') from 'slice.v2.nii.gz'; the ending in lower case."""
    lower = file_name.lower()
    if lower.endswith(NIFTI):
        ending = NIFTI[0] if lower.endswith(NIFTI[0]) else NIFTI[1]
    else:
        stem, dot, last = lower.rpartition(".")
        ending = dot + last if stem and last else ""
    return file_name[: len(file_name) - len(ending)], ending


def is_nifti(path: Path) -> bool:
    """Whether the file's ending says NIfTI."""
    return path.name.lower().endswith(NIFTI)


def safe_name(text: str) -> str:
    """A case id that any file system takes: separators and reserved characters become '_'.

    So do bytes that are no text, which a name on disk may have.
    """
    readable = text.encode("utf-8", "replace").decode()
    name = _RESERVED.sub("_", unicodedata.normalize("NFC", readable))
    return name.strip(" .") or "_"


def listing(items: Iterable[object], *, most: int = 5) -> str:
    """The first few items for a message, with the count of the rest."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def size_text(image: Tensor) -> str:
    """'240 x 224' for a message."""
    return f"{image.shape[-2]} x {image.shape[-1]}"


ENDINGS = (*PICTURES, *NIFTI)


def subfolder(folder: Path, name: str) -> Path | None:
    """The folder called ``name`` directly below, in any case of letters."""
    found = (folder / called for called in names_in(folder) if called.lower() == name)
    return next((path for path in found if path.is_dir()), None)


def image_files(folder: Path) -> dict[str, Path]:
    """The pictures and NIfTI files directly in ``folder``, by stem."""
    found: dict[str, Path] = {}
    for name in names_in(folder):
        stem, ending = split_name(unicodedata.normalize("NFC", name))
        if name.startswith(".") or ending not in ENDINGS:
            continue
        if stem in found:
            error = UserError(
                folder,
                found=f"{found[stem].name} and {name}",
                expected="one file per stem",
                hint="Rename or remove one of them.",
            )
            refuse(error)
        found[stem] = folder / name
    return found
