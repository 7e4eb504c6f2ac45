"""Splits: one folder divided into training, validation and testing by a text file.

Each line of the file is ``<id> <part>``, where the id is that of a case, a volume or a patient;
what follows a ``#`` is a comment. A case or a patient in two parts is an error, for it would
invalidate the scores.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from pathlib import Path

from guided_diffusion.data.datasets import Entry, SegmentationDataset
from guided_diffusion.data.folders import counted, listing
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import expanded, nearest_path

PARTS = ("training", "validation", "testing")
_COMMENT = re.compile(r"(^|\s)#.*")


def read_split(path: str | Path) -> dict[str, str]:
    """Read the part of each id, in the order of the file; ids may contain spaces.

    Raises:
        UserError: the file or a line cannot be read, or an id is in two parts.
    """
    file = expanded(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            file,
            f"the split cannot be read as a text file in UTF-8 ({error})",
            nearest_path(file, "Check the path given to --split."),
        ) from error

    parts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = _COMMENT.sub("", line).strip()
        if text:
            name, part = _read_line(f"{file}, line {number}", text)
            _require_one_part(file, name, {parts.get(name, part), part})
            parts[name] = part
    return parts


def _read_line(place: str, text: str) -> tuple[str, str]:
    name, _, part = text.replace("\t", " ").rpartition(" ")
    if not name or part not in PARTS:
        raise UserError(
            place,
            f"{text!r} is not '<case or patient id> <part>' with one of the parts "
            f"{', '.join(PARTS)}",
            "Correct the line.",
        )
    return name.strip(), part


def part_of_cases(dataset: SegmentationDataset, path: str | Path) -> list[str]:
    """Return the part of each case of a data set, empty where the split does not name it.

    Raises:
        UserError: an id that the data set does not have; a case or a patient in two parts.
    """
    parts = read_split(path)
    ids = [_ids(entry) for entry in dataset.entries]
    unknown = parts.keys() - {name for known in ids for name in known}
    if unknown:
        error = UserError(
            path,
            f"{dataset.directory} has no case or patient {listing(sorted(unknown))}; its ids are "
            f"such as {listing(ids[0], most=2)}",
            "Correct the ids, or pass the folder that the split was made for.",
            cases=unknown,
        )
        refuse(error)
    found: dict[str, set[str]] = defaultdict(set)
    for entry, known in zip(dataset.entries, ids, strict=True):
        for part in {parts[name] for name in known if name in parts}:
            found[entry.name].add(part)
            found[f"patient {entry.patient}" if entry.patient else entry.name].add(part)
    for name, of_name in found.items():
        _require_one_part(Path(path), name, of_name)
    return [" and ".join(sorted(found.get(entry.name, ()))) for entry in dataset.entries]


def _ids(entry: Entry) -> list[str]:
    """Every id by which a split may name a case, its own first."""
    return [name for name in (entry.name, entry.volume, entry.patient) if name]


def _require_one_part(path: Path, name: str, parts: set[str]) -> None:
    if len(parts) > 1:
        problem = f"{name} is in {' and in '.join(sorted(parts))}"
        refuse(UserError(path, problem, "Keep all cases of a patient in one part."))


def narrowed(dataset: SegmentationDataset, path: str | Path, part: str) -> SegmentationDataset:
    """Return a data set of the cases in one part; its notes say how many there are.

    Raises:
        UserError: as :func:`part_of_cases`, or the part has no case.
    """
    parts = part_of_cases(dataset, path)
    chosen = copy.copy(dataset)
    chosen.entries = [
        entry for entry, found in zip(dataset.entries, parts, strict=True) if found == part
    ]
    chosen.names = [entry.name for entry in chosen.entries]
    if not chosen.names:
        raise UserError(
            path, f"has no case for {part}", f"Add the cases or patients as lines '<id> {part}'."
        )
    nowhere = parts.count("")
    unnamed = f"; {counted(nowhere, 'case')} in no part" if nowhere else ""
    chosen.notes = [
        *dataset.notes,
        f"{path}: {len(chosen.names)} of {len(parts)} cases are for {part}{unnamed}",
    ]
    return chosen
