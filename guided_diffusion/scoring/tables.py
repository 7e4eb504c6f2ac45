"""The text files of a scored folder: tables of cases, masks, components, patients; the summary."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from guided_diffusion.files import atomic_write, make_folder, marked_text, require_replaceable
from guided_diffusion.scoring.case_scores import CaseScore, MaskScore
from guided_diffusion.scoring.patients import PatientScore
from guided_diffusion.scoring.summary import ClassScores, Summary

WRITTEN = (
    "scores.csv",
    "masks.csv",
    "components.csv",
    "patients.csv",
    "summary.json",
    "comparison.json",
    "comparison.html",
    "report.html",
)
TARGET_HINT = "Free some space, change the permissions, or copy the predictions elsewhere."


def require_writable(folder: Path) -> Path:
    """Return a folder in which every table can be written; a :class:`UserError` if it is none."""
    make_folder(folder, flag="", hint=TARGET_HINT)
    for name in WRITTEN:
        require_replaceable(folder / name)
    return folder


def write_tables(folder: Path, scores: Mapping[str, ClassScores], summary: Summary) -> None:
    """Write every table of a scored folder, each file atomically."""
    rows = {name: of_class.rows for name, of_class in scores.items()}
    write_text(folder / "scores.csv", table_text(rows, CaseScore._fields))
    write_text(folder / "masks.csv", _masks_text(scores))
    if any(row.members > 1 for of_class in scores.values() for row in of_class.rows):
        write_text(folder / "components.csv", _components_text(scores))
    else:
        _remove_components(folder / "components.csv")
    if any(of_class.patients for of_class in scores.values()):
        patients = {name: of_class.patients for name, of_class in scores.items()}
        write_text(folder / "patients.csv", table_text(patients, PatientScore._fields))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def table_text(
    rows: Mapping[str, Sequence[CaseScore] | Sequence[PatientScore]], fields: Sequence[str]
) -> str:
    """Format one CSV line per case (or patient) and class, the classes of a case together.

    Booleans are written as 0 and 1, None as an empty field.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([fields[0], *_class_column(rows, "class"), *fields[1:]])
    for scores in zip(*rows.values(), strict=True):
        for name, score in zip(rows, scores, strict=True):
            values = [int(value) if isinstance(value, bool) else value for value in score]
            writer.writerow(_marked([values[0], *_class_column(rows, name), *values[1:]]))
    return text.getvalue()


def _masks_text(scores: Mapping[str, ClassScores]) -> str:
    """Format one CSV line for the fused mask, every member and every fusion of a case."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *_class_column(scores, "class"), "mask", *MaskScore._fields])
    for name, of_class in scores.items():
        for row, masks in zip(of_class.rows, of_class.masks, strict=True):
            for mask, score in masks.items():
                values = [row.name, *_class_column(scores, name), mask, *score]
                writer.writerow(_marked(values))
    return text.getvalue()


COMPONENT_FIELDS = (
    *("component", "pixels", "top", "left", "bottom", "right"),
    *("member_share", "truth_share"),
)


def _components_text(scores: Mapping[str, ClassScores]) -> str:
    """Format one CSV line for each component of a fused mask with several members.

    ``member_share`` is the share of members that contain it, ``truth_share`` that of its pixels
    which lie in the truth. Rows count from the top, the ends of a rectangle are left out.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *_class_column(scores, "class"), *COMPONENT_FIELDS])
    for name, of_class in scores.items():
        for row, components in zip(of_class.rows, of_class.components, strict=True):
            for number, component in enumerate(components, 1):
                *place, found, inside = component
                values = [number, *place, found / row.members, inside]
                writer.writerow(_marked([row.name, *_class_column(scores, name), *values]))
    return text.getvalue()


def _marked(values: Iterable[object]) -> list[object]:
    """The values of a row, no text of which is a formula."""
    return [marked_text(value) if isinstance(value, str) else value for value in values]


def _remove_components(path: Path) -> None:
    """Remove the components of masks that had several members; files of others stay."""
    end = ",".join(COMPONENT_FIELDS)
    if path.exists() and path.read_bytes().split(b"\n", 1)[0].endswith(end.encode()):
        path.unlink()


def _class_column(rows: Mapping[str, object], name: str) -> list[str]:
    return [] if "" in rows else [name]


def write_text(path: Path, text: str) -> None:
    """Write a text file into the result folder atomically."""
    with atomic_write(path, hint=TARGET_HINT) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
