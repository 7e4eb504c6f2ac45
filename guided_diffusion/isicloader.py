"""The ISIC layout: dermoscopy pictures ``ISIC_<id>.jpg`` with ``ISIC_<id>_Segmentation.png``.

Pairs come from the CSV of ISBI 2016, in both generations (``id,label`` with image and mask in one
folder; relative paths in the columns 1 and 2) and under both names (Part1 and Part3B), or, without
a CSV, from the ids of the files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import (
    PICTURES,
    counted,
    listing,
    names_in,
    open_folder,
    safe_name,
    split_name,
    walk,
)
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import read_text

_CSV = re.compile(r"ISBI2016_ISIC_(Part1|Part3B)_(Training|Test)_GroundTruth\.csv")
_PICTURE = re.compile(r"ISIC_(\d+)")
_MASK = re.compile(r"ISIC_(\d+)_Segmentation", re.IGNORECASE)
_PARTS = {False: ("train", "training"), True: ("test", "testing")}
_PART = re.compile(r"(?:.*_)?(?:(train|training)|(test|testing))(?:_.*)?", re.IGNORECASE)


class ISICDataset(SegmentationDataset):
    """Colour pictures with one mask each: image [3, H, W] in [0, 1], at full size.

    ``directory`` holds the CSV or the files, or is a root with ``Train`` and ``Test``, of which
    ``test_flag`` chooses one. With ``test_flag=True`` all masks may be absent. A case is named by
    its number ("0000003").
    """

    layout = "ISIC"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = _part_of(open_folder(directory), test_flag)
        table = find_csv(folder, test_flag)
        entries = _table_entries(table) if table is not None else _paired_by_id(folder, test_flag)

        _require_cases(folder, entries)
        entries = _checked_masks(table or folder, entries, optional=test_flag)
        super().__init__(folder, entries, channels=3, reading=reading)
        files = [root / name for root, names in walk(folder) for name in names]
        if table is None and (others := _others(files)):
            example = others[0].relative_to(folder)
            self.notes.append(f"ignored {counted(len(others), 'file')}, such as {example}")


def has_csv(folder: Path) -> bool:
    """Whether the folder, or its Train or Test, holds the CSV."""
    folders = {folder, *(_part_of(folder, test) for test in (False, True))}
    return any(find_csv(part, False) for part in folders)


def has_pictures(folder: Path, *, bare: bool = False) -> bool:
    """Whether the folder or one below it holds pictures named by an ISIC number.

    With ``bare``, a folder that directly holds such pictures and others, and no mask, does not
    count: all of its pictures are to be segmented.
    """
    files = [root / name for root, names in walk(folder) for name in names]
    named = [path for path in files if _id_of(_PICTURE, path.name)]
    if not bare or any(_id_of(_MASK, path.name) for path in files):
        return bool(named)
    near = {path.parent for path in named} & {path.parent for path in _others(files)}
    return bool(named) and folder not in near


def find_csv(folder: Path, test_flag: bool) -> Path | None:
    """Find the CSV directly in ``folder``: of the requested part, else any; Part1 first."""
    wanted = "Test" if test_flag else "Training"
    found = [match for name in names_in(folder) if (match := _CSV.fullmatch(name))]
    found.sort(key=lambda match: (match[2] != wanted, match[1]))
    return folder / found[0].string if found else None


def _part_of(folder: Path, test_flag: bool) -> Path:
    """The Train or Test folder of a root that has them, else ``folder`` itself."""
    called = (name for name in names_in(folder) if name.lower() in _PARTS[test_flag])
    return next((folder / name for name in called if (folder / name).is_dir()), folder)


def _table_entries(table: Path) -> list[Entry]:
    """Read the entries of a CSV, deciding row by row which generation it is."""
    rows = _read_rows(table)
    if rows and _is_header(rows[0]):
        rows = rows[1:]
    return [_entry_of_row(table, number, row) for number, row in enumerate(rows, start=1) if row]


def _read_rows(table: Path) -> list[list[str]]:
    try:
        text = read_text(table)
        first = text.partition("\n")[0]
        separator = next((mark for mark in ",;\t" if mark in first), ",")
        rows = csv.reader(text.splitlines(), delimiter=separator)
        return [[field.strip() for field in row] for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = f"the table cannot be read as comma-separated values ({error})"
        raise UserError(table, problem, "Save it again as CSV in UTF-8.") from error


def _others(files: Sequence[Path]) -> list[Path]:
    """The pictures that are not named as ISIC names its files."""
    return [path for path in files if _is_picture(path.name) and not path.name.startswith("ISIC_")]


def _is_header(row: list[str]) -> bool:
    return not any(_PICTURE.search(field) or _is_picture(field) for field in row)


def _is_picture(name: str) -> bool:
    return split_name(name)[1] in PICTURES


def _entry_of_row(table: Path, number: int, row: list[str]) -> Entry:
    if len(row) > 2 and _is_picture(row[1]):
        image = table.parent / row[1].replace("\\", "/")
        mask = table.parent / row[2].replace("\\", "/") if row[2] else None
        return Entry(name_of(image), (image,), mask)
    if row[0] and len(row) <= 2:
        return _entry_of_id(table, row[0])
    raise UserError(
        f"{table}, row {number}",
        f"'{','.join(row)}' is neither 'number,image path,mask path' nor 'id,label'",
        "Correct the row, or remove the CSV: pairs are then found by their ids.",
    )


def _entry_of_id(table: Path, case: str) -> Entry:
    """First generation: image and mask in ..._Data, or the mask in the folder ..._GroundTruth."""
    truths = table.with_suffix("")
    data = truths.with_name(truths.name.replace("_GroundTruth", "_Data"))
    near = data / f"{case}_Segmentation.png"
    mask = near if near.exists() else truths / near.name
    image = data / f"{case}.jpg"
    return Entry(name_of(image), (image,), mask)


def _paired_by_id(folder: Path, test_flag: bool) -> list[Entry]:
    """Without a CSV: every ISIC picture below, and the mask of the same number in any folder.

    Where there are folders of both parts (``..._Training_Data``, ``..._Test_Data``), only the
    pictures of the requested part count.
    """
    files = [root / name for root, names in walk(folder) for name in names]
    parts = {path: _part(path.relative_to(folder)) for path in files if _PICTURE.match(path.name)}
    if {False, True} <= set(parts.values()):
        files = [path for path in files if parts.get(path, test_flag) in (test_flag, None)]
    masks = {number: path for path in files if (number := _id_of(_MASK, path.name))}
    return [
        Entry(number, (path,), masks.get(number, path.with_name(f"{path.stem}_Segmentation.png")))
        for path in files
        if (number := _id_of(_PICTURE, path.name))
    ]


def _part(path: Path) -> bool | None:
    """Whether a folder in a path is named for test (True) or training (False); None for neither."""
    matches = [match for name in path.parts[:-1] if (match := _PART.fullmatch(name))]
    return matches[-1][2] is not None if matches else None


def _id_of(pattern: re.Pattern[str], file_name: str) -> str | None:
    """The number in the name of a picture or mask; None for any other file."""
    stem, ending = split_name(file_name)
    match = pattern.fullmatch(stem) if ending in PICTURES else None
    return match[1] if match else None


def name_of(image: Path) -> str:
    """'0000003' for ``ISIC_0000003.jpg``; the stem of a picture with another name."""
    return _id_of(_PICTURE, image.name) or safe_name(split_name(image.name)[0])


def _require_cases(folder: Path, entries: list[Entry]) -> None:
    if not entries:
        raise UserError(
            folder,
            "has no ISIC picture: neither ISBI2016_ISIC_Part1_*_GroundTruth.csv nor "
            "ISIC_<number>.jpg",
            "Pass the folder with the CSV or the pictures, or the one above Train and Test.",
        )


def _checked_masks(source: Path, entries: list[Entry], *, optional: bool) -> list[Entry]:
    """Require every file to exist; if ``optional`` and no mask does, remove the masks."""
    entries = _with_files(source, entries, "pictures", lambda entry: entry.images[0])
    missing = [entry for entry in entries if entry.mask is None or not entry.mask.is_file()]
    if optional and len(missing) == len(entries):
        return [entry._replace(mask=None) for entry in entries]
    return _with_files(
        source, entries, "masks", lambda entry: entry.mask or Path(f"the mask of {entry.name}")
    )


def _with_files(
    source: Path, entries: list[Entry], kind: str, file_of: Callable[[Entry], Path]
) -> list[Entry]:
    """The entries whose file exists; the others are refused."""
    missing = [entry for entry in entries if not file_of(entry).is_file()]
    if missing:
        error = UserError(
            source,
            f"{len(missing)} of {len(entries)} {kind} missing: {listing(map(file_of, missing))}",
            "Restore the files, or remove their cases from the data set.",
            cases=[entry.name for entry in missing],
        )
        refuse(error)
    lost = {entry.name for entry in missing}
    return [entry for entry in entries if entry.name not in lost]
