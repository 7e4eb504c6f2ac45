"""The records of a result folder: ``predictions.csv`` on its cases, and ``classes.json``."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_diffusion import logger
from guided_diffusion.data.classes import RECORD, Classes, record_text, recorded_classes
from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.folders import counted, listing
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.jobs import (
    JOBS,
    PREDICTIONS,
    UNFINISHED,
    Job,
    has_records,
    record_parts,
    rows_of,
)
from guided_diffusion.dist_util import barrier, rank
from guided_diffusion.errors import UserError
from guided_diffusion.files import (
    DamagedFile,
    append,
    atomic_write,
    marked_text,
    read_table,
    require_replaceable,
    set_aside,
)
from guided_diffusion.inference.rendering import measured, spreads
from guided_diffusion.inference.segmentation import Segmentation

MOST_DISAGREEMENT = 0.5
"""A mean pairwise 1 - Dice of the members above which a case is pointed out."""


def log_remarks(record: Record, names: Sequence[str]) -> None:
    """Log which cases of this run are uncertain or empty, and how many have other settings."""
    uncertain = [name for name in names if name in record.rows and _is_uncertain(record.rows[name])]
    if uncertain:
        logger.log(
            f"look at {listing(uncertain)}: some of the members are empty or cover the whole "
            f"picture, or they disagree by more than {MOST_DISAGREEMENT}"
        )
    empty = [name for name in names if name in record.rows and _is_empty(record.rows[name])]
    if empty:
        logger.log(f"nothing is found in any member of {listing(empty)}")
    others = sum(row["fingerprint"] != record.fingerprint for row in record.rows.values())
    if others:
        logger.log(
            f"{counted(others, 'case')} in {record.out_dir} "
            f"{'has other settings; it stays' if others == 1 else 'have other settings; they stay'}"
            ", and would be scored together with these"
        )


def _is_uncertain(row: dict[str, Any]) -> bool:
    some_empty = 0 < int(row.get("empty_members") or 0) < int(row["members"])
    full = int(row.get("full_members") or 0) > 0
    return some_empty or full or float(row.get("disagreement") or 0) > MOST_DISAGREEMENT


def _is_empty(row: dict[str, Any]) -> bool:
    empty = row.get("empty_members")
    return empty not in (None, "") and int(empty) == int(row["members"])


def row_of(case: Case, result: Segmentation, seconds: float, frame: Frame) -> dict[str, Any]:
    """Make a case's row of ``predictions.csv``."""
    found = frame.seen(result.members >= 0.5).flatten(1)
    return {
        "members": len(result.members),
        **measured(result),
        **spreads(result),
        "empty_members": int((~found.any(1)).sum()),
        "full_members": int(found.all(1).sum()),
        "seconds": round(seconds, 3),
    }


COLUMNS = (
    *("name", "members", "area", "empty_members", "full_members"),
    *("disagreement", "uncertainty", "seconds", "fingerprint"),
)
NEEDED = ("name", "members", "fingerprint")
COUNTS = ("members", "area", "empty_members", "full_members")
SPREADS = ("within_weights", "between_weights")
"""Columns of their own where the members are of several weights."""
MEASURES = ("disagreement", *SPREADS, "uncertainty", "seconds")


class Record:
    """``predictions.csv``: one row per finished case, appended once its files are in place.

    The rows are sorted by name at the start and at the end of a run. Of several processes each
    keeps a file of its own until the first one gathers them. A job keeps its file, and changes no
    other's; a run of all cases gathers them.

    Args:
        out_dir: the result folder.
        fingerprint: of the settings of this run.
        own: further columns, after that of the area.
        spreads: whether the members are of several weights.
        ends: of the names of a case's files, one for each class.
        with_members: whether the members of a case are written, too.
        job: which of several jobs this run is; None for a run of all cases.
        names: the cases of the job.
    """

    def __init__(
        self,
        out_dir: Path,
        fingerprint: str,
        own: Sequence[str] = (),
        *,
        spreads: bool = False,
        ends: Sequence[str] = ("",),
        with_members: bool = True,
        job: Job | None = None,
        names: Collection[str] = (),
    ) -> None:
        self.out_dir = out_dir
        between = SPREADS if spreads else ()
        self.columns = (*COLUMNS[:3], *own, *COLUMNS[3:6], *between, *COLUMNS[6:])
        self.fingerprint = fingerprint
        self.ends = ends
        self.with_members = with_members
        self.job = job
        self.path = out_dir / (job.record if job else PREDICTIONS)
        require_replaceable(self.path)
        self.damage: dict[Path, str] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.elsewhere: set[str] = set()
        """Cases of the job that another run's record holds."""
        self._others: set[str] = set()
        """Those of them whose row here is that of the other record."""
        self._alike = True
        if job:
            self._read_with_others({*names})
        else:
            self.rows |= {row["name"]: row for row in self._read([self.path, *self._parts()])}

    def _read_with_others(self, names: Collection[str]) -> None:
        """Read what is known of a job's cases; of two rows of a case the newer file's wins."""
        own = {self.path, *self._parts()}
        for path in (self.out_dir / PREDICTIONS, *record_parts(self.out_dir)):
            for row in self._read([path]) if path in own else rows_of([path]):
                name = row["name"]
                self._alike &= row["fingerprint"] == self.fingerprint
                if path in own:
                    self._others.discard(name)
                elif name in names and _is_whole(row):
                    self._others.add(name)
                    self.elsewhere.add(name)
                else:
                    continue
                self.rows[name] = row

    def _read(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """Read the finished cases of some records, and note which of these are damaged."""
        for path in paths:
            try:
                hint = "Choose another --out_dir."
                table = read_table(path, needs=NEEDED, hint=hint, keep_cut=False)
            except DamagedFile as error:
                self.damage[path] = error.why
                continue
            rows = table.rows if table else []
            good = [row for row in rows if _is_whole(row)]
            if table and table.cut + table.bad + len(rows) - len(good):
                self.damage[path] = "not all of its lines are those of cases"
            yield from good

    def _parts(self) -> list[Path]:
        return [path for path in record_parts(self.out_dir, self.job) if path != self.path]

    def refuse_other_run(self, dataset: SegmentationDataset, *, flag: str = "--out_dir") -> None:
        """Refuse a folder with masks of other settings, all of them of cases of another data set.

        Masks of the same data are replaced; these would stay and be scored together with the new.

        Raises:
            UserError: it is such a folder.
        """
        others = [n for n, row in self.rows.items() if row["fingerprint"] != self.fingerprint]
        if others and not self.rows.keys() & {entry.name for entry in dataset.entries}:
            raise UserError(
                f"{flag} {self.out_dir}",
                f"holds masks of another run, of {listing(others)}, none of which is in "
                f"{dataset.directory}",
                f"Choose another {flag}.",
            )

    @property
    def is_uniform(self) -> bool:
        """Whether everything that is recorded has this run's settings."""
        same = all(row["fingerprint"] == self.fingerprint for row in self.rows.values())
        return same and self._alike and not self.damage

    def finished(self, name: str) -> bool:
        """Whether a case is done, with these settings, and its masks are still there and whole."""
        row = self.rows.get(name)
        if row is None or row["fingerprint"] != self.fingerprint:
            return False
        return all(is_whole_png(self.out_dir / f"{name}_{kind}.png") for kind in self._masks(row))

    def _masks(self, row: Mapping[str, str]) -> Iterator[str]:
        """The ends of the names of a case's masks, those that scoring reads."""
        yield "mask"
        for end in self.ends:
            yield f"output_ens{end}"
            if self.with_members:
                yield from (f"output{index}{end}" for index in range(int(row["members"])))

    def forget(self, names: Iterable[str]) -> None:
        """Take cases for unfinished whose files are gone."""
        for name in names:
            del self.rows[name]

    def begin(self, names: Sequence[str], *, of: int) -> None:
        """Remove cases before their files are replaced, and log what is kept."""
        if len(names) < of:
            logger.log(f"{of - len(names)} of {of} cases are finished and kept")
        stale = [row for name in names if (row := self.rows.pop(name, None))]
        for name in self.elsewhere.intersection(names) if rank() == 0 else ():
            self.rows[name] = {"name": name, "members": 1, "fingerprint": UNFINISHED}
        self._others.difference_update(names)
        lost = [row["name"] for row in stale if row["fingerprint"] == self.fingerprint]
        if len(stale) > len(lost):
            replaced = counted(len(stale) - len(lost), "case")
            logger.log(f"drawn anew: {replaced} of other settings in {self.out_dir}")
        if lost:
            logger.log(f"files of {listing(lost)} are missing or damaged; they are drawn anew")
        barrier()  # every process has read the parts that the first one now gathers
        if rank() == 0:
            for path, why in self.damage.items():
                kept = set_aside(path).name
                logger.log(
                    f"{path} is damaged ({why}); it is kept as {kept}, and cases that cannot be "
                    "read from it are drawn anew"
                )
            self._gather()
        barrier()
        if rank():
            part = f"{self.job.name}-{rank()}" if self.job else rank()
            self.path, self.rows = self.out_dir / f".predictions-{part}.csv", {}

    def add(self, row: dict[str, Any]) -> None:
        """Add a finished case."""
        self.rows[row["name"]] = {**row, "fingerprint": self.fingerprint}
        if self.path.exists():
            append(self.path, self._text([row["name"]], header=False))
        else:
            self._write()

    def end(self) -> None:
        """Gather the rows of all processes in the first one's file."""
        barrier()
        if rank() == 0:
            self.rows |= {row["name"]: row for row in self._read(self._parts())}
            self._gather()
        barrier()

    def _gather(self) -> None:
        parts = self._parts()
        if self.rows or self.path.exists():
            self._write()
        for part in parts:
            part.unlink()
        if self.job is None:
            (self.out_dir / JOBS).unlink(missing_ok=True)

    def _write(self) -> None:
        """Write all rows, sorted by name, where the file has others; it appears whole."""
        content = self._text(sorted(self.rows.keys() - self._others)).encode("utf-8")
        if not self.path.exists() or self.path.read_bytes() != content:
            with atomic_write(self.path) as part:
                part.write_bytes(content)

    def _text(self, names: Sequence[str], *, header: bool = True) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows({**self.rows[name], "name": marked_text(name)} for name in names)
        return text.getvalue()


def _is_whole(row: Mapping[str, str]) -> bool:
    """Whether a row is that of a finished case, and its numbers are numbers."""
    try:
        counts = [int(row.get(name) or 0) for name in COUNTS]
        measures = [float(row.get(name) or 0) for name in MEASURES]
    except ValueError:
        return False
    finite = all(map(math.isfinite, measures))
    return bool(row["name"] and row["fingerprint"]) and finite and min(counts) >= 0 < counts[0]


def is_whole_png(path: Path) -> bool:
    """Whether a file is there and begins and ends as a PNG does."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            begins = file.read(8) == b"\x89PNG\r\n\x1a\n"
            file.seek(-12, os.SEEK_END)
            return begins and file.read() == b"\0\0\0\0IEND\xaeB`\x82"
    except OSError:
        return False


def note_classes(out_dir: Path, classes: Classes | None, *, known: bool = False) -> None:
    """Record the classes in the folder, since results of other classes must not mix with them.

    The first process writes.

    A damaged record is made anew where ``known`` says that all results in the folder are those of
    the settings of this run, and so of its classes.

    Raises:
        UserError: the folder holds results of other classes, or nobody knows of which.
    """
    path = out_dir / RECORD
    require_replaceable(path)
    holds_results = has_records(
        out_dir
    )  # first: another job may be writing the classes, then those
    try:
        earlier, why = recorded_classes(out_dir), ""
    except DamagedFile as error:
        if not known:
            raise
        earlier, why = classes, error.why
    if earlier != classes and holds_results:
        raise UserError(
            out_dir,
            f"holds results of {_class_text(earlier)}, these would be of {_class_text(classes)}",
            "Choose another --out_dir.",
        )
    barrier()  # every process has read what the first one now writes
    if rank():
        return
    if why:
        kept = set_aside(path).name
        logger.log(f"{path} is damaged ({why}); it is kept as {kept}, and made anew")
    if classes is None:
        path.unlink(missing_ok=True)
    elif earlier != classes or why:
        with atomic_write(path) as part:
            part.write_text(record_text(classes) + "\n", encoding="utf-8")


def _class_text(classes: Classes | None) -> str:
    return "one class" if classes is None else f"the classes {classes}"
