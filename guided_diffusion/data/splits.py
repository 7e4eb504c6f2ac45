"""Splits: one folder divided into training, validation and testing by a file.

Each line of a text file is ``<id> <part>``, where the id is that of a case, a volume or a patient;
what follows a ``#`` is a comment. ``splits_final.json:0`` is a fold of nnU-Net's. A case or a
patient in two parts is an error, for it would invalidate the scores.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from pathlib import Path

from guided_diffusion.data.datasets import Entry, SegmentationDataset
from guided_diffusion.data.folders import counted, listing
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import expanded, nearest_path, read_text

PARTS = ("training", "validation", "testing")
_FOLD = re.compile(r"(.+\.json)(?::(\d+))?", re.IGNORECASE)
_COMMENT = re.compile(r"(^|\s)#.*")


def read_split(path: str | Path) -> dict[str, str]:
    """Read the part of each id, in the order of the file; ids may contain spaces.

    ``<file>.json:<fold>`` is a fold of nnU-Net's splits: its cases train or validate.

    Raises:
        UserError: the file or a line cannot be read, or an id is in two parts.
    """
    file = expanded(path)
    if fold := _FOLD.fullmatch(str(file)):
        return _read_fold(Path(fold[1]), fold[2])
    try:
        lines = read_text(file).splitlines()
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


def _read_fold(file: Path, fold: str | None) -> dict[str, str]:
    """Read the ids of a fold: a JSON list of objects with the lists ``train`` and ``val``."""
    hint = f"Write --split {file}:0 for the first of nnU-Net's folds."
    try:
        folds = json.loads(read_text(file))
        if fold is None or int(fold) >= len(folds):
            raise UserError(file, f"has the folds 0 to {len(folds) - 1}", hint)
        chosen = folds[int(fold)]
        parts: dict[str, str] = {}
        for name, part in (("train", "training"), ("val", "validation")):
            for case in map(str, chosen[name]):
                _require_one_part(file, case, {parts.get(case, part), part})
                parts[case] = part
    except OSError as error:
        problem = f"the split cannot be read ({error.strerror})"
        raise UserError(file, problem, nearest_path(file, hint)) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = "is no list of nnU-Net's folds with train and val"
        raise UserError(file, problem, hint) from error
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

    A fold of nnU-Net's has none for testing: those for validation are taken.

    Raises:
        UserError: as :func:`part_of_cases`, or the part has no case.
    """
    parts = part_of_cases(dataset, path)
    if part == "testing" and part not in parts and _FOLD.fullmatch(str(path)):
        part = "validation"
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
