"""The records of a result folder: ``predictions.csv`` on its cases, and ``classes.json``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from guided_diffusion import logger
from guided_diffusion.data.classes import RECORD, Classes, record_text, recorded_classes
from guided_diffusion.data.datasets import Case, Frame
from guided_diffusion.data.folders import listing
from guided_diffusion.dist_util import barrier, rank
from guided_diffusion.errors import UserError
from guided_diffusion.files import atomic_write
from guided_diffusion.inference.rendering import measured
from guided_diffusion.inference.segmenter import Segmentation

MOST_DISAGREEMENT = 0.5
"""A mean pairwise 1 - Dice of the members above which a case is pointed out."""


def log_remarks(record: Record, names: Sequence[str]) -> None:
    """Log which cases of this run are uncertain or empty, and how many have other settings."""
    uncertain = [name for name in names if name in record.rows and _is_uncertain(record.rows[name])]
    if uncertain:
        logger.log(
            f"look at {listing(uncertain)}: some of their members are empty or cover the whole "
            f"picture, or they disagree by more than {MOST_DISAGREEMENT}"
        )
    empty = [name for name in names if name in record.rows and _is_empty(record.rows[name])]
    if empty:
        logger.log(f"nothing is found in any member of {listing(empty)}")
    others = sum(row["fingerprint"] != record.fingerprint for row in record.rows.values())
    if others:
        logger.log(
            f"{others} cases in {record.out_dir} have other settings; they stay, and would be "
            "scored together with these"
        )


def _is_uncertain(row: dict[str, Any]) -> bool:
    some_empty = 0 < int(row.get("empty_members") or 0) < int(row["members"])
    full = int(row.get("full_members") or 0) > 0
    return some_empty or full or float(row["disagreement"]) > MOST_DISAGREEMENT


def _is_empty(row: dict[str, Any]) -> bool:
    empty = row.get("empty_members")
    return empty not in (None, "") and int(empty) == int(row["members"])


def row_of(case: Case, result: Segmentation, seconds: float, frame: Frame) -> dict[str, Any]:
    """Make a case's row of ``predictions.csv``."""
    found = frame.seen(result.members >= 0.5).flatten(1)
    return {
        "members": len(result.members),
        **measured(result),
        "empty_members": int((~found.any(1)).sum()),
        "full_members": int(found.all(1).sum()),
        "seconds": round(seconds, 3),
    }


COLUMNS = (
    *("name", "members", "area", "empty_members", "full_members"),
    *("disagreement", "uncertainty", "seconds", "fingerprint"),
)


class Record:
    """``predictions.csv``: one row per finished case, written once its files are in place.

    Of several processes each keeps a file of its own until the first one gathers them.
    """

    def __init__(self, out_dir: Path, fingerprint: str, areas: Sequence[str] = ()) -> None:
        self.out_dir = out_dir
        self.columns = (*COLUMNS[:3], *areas, *COLUMNS[3:])
        self.fingerprint = fingerprint
        self.path = out_dir / "predictions.csv"
        self.rows = {row["name"]: row for row in _read_rows([self.path, *self._parts()])}

    def _parts(self) -> list[Path]:
        return sorted(self.out_dir.glob(".predictions-*.csv"))

    def finished(self, name: str) -> bool:
        """Whether a case is done, with these settings, and its mask is still there."""
        same = self.rows.get(name, {}).get("fingerprint") == self.fingerprint
        return same and (self.out_dir / f"{name}_mask.png").exists()

    def begin(self, names: Sequence[str], *, of: int) -> None:
        """Remove cases before their files are replaced, and log what is kept."""
        if len(names) < of:
            logger.log(f"{of - len(names)} of {of} cases are finished and kept")
        stale = [name for name in names if self.rows.pop(name, None)]
        if stale:
            logger.log(f"{len(stale)} cases of other settings in {self.out_dir} are drawn anew")
        barrier()  # every process has read the parts that the first one now gathers
        if rank() == 0:
            self._gather(stale)
        barrier()
        if rank():
            self.path, self.rows = self.out_dir / f".predictions-{rank()}.csv", {}

    def add(self, row: dict[str, Any]) -> None:
        """Add a finished case."""
        self.rows[row["name"]] = {**row, "fingerprint": self.fingerprint}
        self._write()

    def end(self) -> None:
        """Gather the rows of all processes in the first one's file."""
        barrier()
        if rank() == 0:
            self.rows |= {row["name"]: row for row in _read_rows(self._parts())}
            self._gather(self._parts())
        barrier()

    def _gather(self, changes: Sequence[object]) -> None:
        parts = self._parts()
        if changes or parts:
            self._write()
        for part in parts:
            part.unlink()

    def _write(self) -> None:
        """Write all rows, sorted by name; the file appears whole."""
        with atomic_write(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows[name] for name in sorted(self.rows))


def _read_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Read the finished cases of some records; other files have none."""
    for path in paths:
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("fingerprint") and row.get("name") and row.get("members"):
                        yield row


def note_classes(out_dir: Path, classes: Classes | None) -> None:
    """Record the classes in the folder, since results of other classes must not mix with them.

    The first process writes.

    Raises:
        UserError: the folder holds results of other classes.
    """
    earlier, path = recorded_classes(out_dir), out_dir / RECORD
    if earlier != classes and (out_dir / "predictions.csv").exists():
        raise UserError(
            out_dir,
            f"holds results of {_class_text(earlier)}, these would be of {_class_text(classes)}",
            "Choose another --out_dir.",
        )
    barrier()  # every process has read what the first one now writes
    if rank():
        return
    if classes is None:
        path.unlink(missing_ok=True)
    elif earlier != classes:
        with atomic_write(path) as part:
            part.write_text(record_text(classes) + "\n", encoding="utf-8")


def _class_text(classes: Classes | None) -> str:
    return "one class" if classes is None else f"the classes {classes}"
