"""Splits: one folder divided into training, validation and testing by a text file.

Each line of the file is ``<id> <part>``, where the id is a case's, a volume's or a patient's; what
follows a ``#`` is a comment. Whoever is on two sides is an error, for such a score would be worth
nothing. Called by the composition root, and by the check of a folder.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from pathlib import Path

from guided_diffusion.data.datasets import Entry, SegmentationDataset
from guided_diffusion.data.folders import listing
from guided_diffusion.errors import UserError, refuse

PARTS = ("training", "validation", "testing")
_COMMENT = re.compile(r"(^|\s)#.*")


def read_split(path: str | Path) -> dict[str, str]:
    """The part of each id, in the order of the file; ids may hold blanks.

    Raises:
        UserError: a file or a line that cannot be read, or an id on two sides.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            file,
            found=f"a split that cannot be read ({error})",
            expected="a text file in UTF-8",
            hint="Check the path given to --split.",
        ) from error

    parts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = _COMMENT.sub("", line).strip()
        if text:
            name, part = _read_line(f"{file}, line {number}", text)
            _require_one_side(file, name, {parts.get(name, part), part})
            parts[name] = part
    return parts


def _read_line(place: str, text: str) -> tuple[str, str]:
    name, _, part = text.replace("\t", " ").rpartition(" ")
    if not name or part not in PARTS:
        raise UserError(
            place,
            found=repr(text),
            expected=f"'<case or patient id> <part>' with a part of {', '.join(PARTS)}",
            hint="Correct the line.",
        )
    return name.strip(), part


def part_of_cases(dataset: SegmentationDataset, path: str | Path) -> list[str]:
    """The part of each case of a data set, empty where the file names it nowhere.

    Raises:
        UserError: an id that the data set does not have; a case or a patient on two sides.
    """
    parts = read_split(path)
    ids = [_ids(entry) for entry in dataset.entries]
    strangers = parts.keys() - {name for known in ids for name in known}
    if strangers:
        error = UserError(
            path,
            found=f"ids that {dataset.directory} does not have: {listing(sorted(strangers))}",
            expected=f"cases or patients of the folder, such as {listing(ids[0], most=2)}",
            hint="Correct the ids, or pass the folder that the split was made for.",
            cases=strangers,
        )
        refuse(error)
    sides: dict[str, set[str]] = defaultdict(set)
    for entry, known in zip(dataset.entries, ids, strict=True):
        for found in {parts[name] for name in known if name in parts}:
            sides[entry.name].add(found)
            sides[f"patient {entry.patient}" if entry.patient else entry.name].add(found)
    for who, both in sides.items():
        _require_one_side(Path(path), who, both)
    return [" and ".join(sorted(sides.get(entry.name, ()))) for entry in dataset.entries]


def _ids(entry: Entry) -> list[str]:
    """Every id by which a split may call a case, its own first."""
    return [name for name in (entry.name, entry.volume, entry.patient) if name]


def _require_one_side(path: Path, who: str, sides: set[str]) -> None:
    if len(sides) > 1:
        error = UserError(
            path,
            found=f"{who} in {' and in '.join(sorted(sides))}",
            expected="every case and every patient on one side only",
            hint="Keep all cases of a patient in one part.",
        )
        refuse(error)


def narrowed(dataset: SegmentationDataset, path: str | Path, part: str) -> SegmentationDataset:
    """The cases of one part, as a data set of their own; its notes say what was taken and left.

    Raises:
        UserError: as :func:`part_of_cases`, or a part without a case.
    """
    parts = part_of_cases(dataset, path)
    chosen = copy.copy(dataset)
    chosen.entries = [
        entry for entry, found in zip(dataset.entries, parts, strict=True) if found == part
    ]
    chosen.names = [entry.name for entry in chosen.entries]
    if not chosen.names:
        raise UserError(
            path,
            found=f"no case for {part}",
            expected=f"lines that end in {part}",
            hint=f"Name the cases or patients of {part}.",
        )
    nowhere = parts.count("")
    unnamed = f"; {nowhere} cases are in no part" if nowhere else ""
    chosen.notes = [
        *dataset.notes,
        f"{path}: {len(chosen.names)} of {len(parts)} cases are for {part}{unnamed}",
    ]
    return chosen
