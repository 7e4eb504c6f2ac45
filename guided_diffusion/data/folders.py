"""Folders and file names: what a data set holds on disk, before any file is opened.

Listings are sorted, so that a data set has one order on every file system, and written for folders
of 100,000 files. A folder that cannot be used is a :class:`UserError` that names it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch import Tensor

from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import expanded, nearest_path

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii.gz", ".nii")
ENDINGS = (*PICTURES, *NIFTI)
GIF = ".gif"
"""Of masks, as in DRIVE; beside other pictures it is a preview."""
MOST_BYTES = 200
"""Of a case id: file systems allow 255, and the names of a case's files are longer than its id."""
_RESERVED = re.compile(r'[/\\:*?"<>|\x00-\x1f]')

_Contents = tuple[list[str], list[str], tuple[int, int]]
_KNOWN: ContextVar[dict[str, _Contents] | None] = ContextVar(
    "folders that are listed", default=None
)


def open_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with ``~`` expanded; a :class:`UserError` where it is missing, or a file."""
    folder = expanded(directory)
    if folder.is_dir():
        return folder
    problem = "is a file, not a folder" if folder.exists() else "does not exist"
    hint = "Pass the folder that holds the data set."
    raise UserError(folder, problem, hint if folder.exists() else nearest_path(folder, hint))


def walk(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield ``directory`` and every folder below it, each with its sorted file names.

    Hidden files and folders are left out. Links to folders are followed, but no folder is visited
    twice, so a link that points upwards ends the walk there.
    """
    seen: set[tuple[int, int]] = set()
    pending = [os.fspath(directory)]
    while pending:
        root = pending.pop()
        folders, files, inode = _listed(root)
        if inode not in seen:
            seen.add(inode)
            yield Path(root), files
            pending += [f"{root}/{name}" for name in reversed(folders)]


def _listed(root: str) -> _Contents:
    """The contents of a folder, which :func:`many_objects` remembers."""
    known = _KNOWN.get()
    if known is None:
        return _folder_contents(root)
    if root not in known:
        known[root] = _folder_contents(root)
    return known[root]


def _folder_contents(root: str) -> _Contents:
    """The visible folders and files in a folder, sorted, and its device and inode numbers."""
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
            f"the folder cannot be listed ({error.strerror})",
            "Change its permissions, or move it out of the data set.",
        ) from error
    return sorted(folders), sorted(files), (stat.st_dev, stat.st_ino)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder; a broken or circular link is not, and fails when it is opened."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def names_in(folder: Path) -> list[str]:
    """The sorted visible names in a folder, as text: 50,000 path objects would take far longer."""
    folders, files, _ = _listed(os.fspath(folder))
    return sorted([*files, *folders])


def folders_in(folder: Path) -> list[Path]:
    """The visible folders directly below, sorted by name."""
    return [folder / name for name in _listed(os.fspath(folder))[0]]


def subfolder(folder: Path, name: str) -> Path | None:
    """The folder called ``name`` directly below, in upper or lower case; None without one."""
    return next((path for path in folders_in(folder) if path.name.lower() == name), None)


def image_files(folder: Path) -> dict[str, Path]:
    """The pictures and NIfTI files directly in ``folder``, by stem."""
    return _with_endings(folder, names_in(folder), ENDINGS)


def mask_files(folder: Path) -> dict[str, Path]:
    """The masks directly in ``folder``, by stem: as :func:`image_files`, or its GIFs."""
    return image_files(folder) or _with_endings(folder, names_in(folder), (GIF,))


def _with_endings(folder: Path, names: Iterable[str], endings: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in names:
        stem, ending = split_name(unicodedata.normalize("NFC", name))
        if name.startswith(".") or ending not in endings:
            continue
        if stem in found:
            problem = f"{found[stem].name} and {name} have the same stem"
            refuse(UserError(folder, problem, "Rename or remove one of them."))
        found[stem] = folder / name
    return found


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
    """Whether the file's ending is that of NIfTI."""
    return path.name.lower().endswith(NIFTI)


def safe_name(text: str) -> str:
    """A case id that is a valid name on any file system.

    Separators, reserved characters and bytes that are not text become '_'. Of a name that is too
    long for the files of a case a digest replaces the end.
    """
    readable = text.encode("utf-8", "replace").decode()
    name = _RESERVED.sub("_", unicodedata.normalize("NFC", readable)).strip(" .") or "_"
    if len(name.encode()) <= MOST_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name.encode()[: MOST_BYTES - 13].decode(errors='ignore')}-{digest}"


@contextmanager
def many_objects() -> Iterator[None]:
    """Pause Python's cyclic garbage collection while many paths are listed: half the time.

    Paths and entries hold no cycles, so nothing is missed. Meanwhile :func:`walk` reads every
    folder once.
    """
    running = gc.isenabled()
    gc.disable()
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)
        if running:
            gc.enable()


def listing(items: Iterable[object], *, most: int = 5) -> str:
    """The first few items for a message, with the count of the rest."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str) -> str:
    """'1 mask' or '2 masks' for a message."""
    return f"{number} {noun}{'s' * (number != 1)}"


def size_of(lengths: Iterable[int]) -> str:
    """'240 x 240 x 155' for a message."""
    return " x ".join(map(str, lengths))


def size_text(image: Tensor) -> str:
    """'240 x 224' for a message."""
    return f"{image.shape[-2]} x {image.shape[-1]}"
