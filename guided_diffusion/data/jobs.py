"""Jobs that share the cases of one folder, as those of a SLURM array do: ``--job 3/16``.

Which job takes which cases follows from the cases alone, not from what is finished. Every job has a
record of its own, ``predictions-3-of-16.csv``; ``jobs.json`` says which cases are whose, so that
whoever joins the records can name what is missing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.data.datasets import Entry
from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError
from guided_diffusion.files import DamagedFile, atomic_write, read_json, read_table

PREDICTIONS, JOBS = "predictions.csv", "jobs.json"
UNFINISHED = "unfinished"
"""The fingerprint of a case that another record holds and that is being drawn anew."""
MOST_JOBS = 100_000
PART = re.compile(
    r"\.predictions-\d+\.csv|(?P<hidden>\.)?predictions-(?P<job>\d+-of-\d+)(?(hidden)-\d+|)\.csv"
)
HINT = "Sample again: finished cases are kept."


class Job(NamedTuple):
    """One of several jobs, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """The job in the names of its files."""
        return f"{self.number}-of-{self.of}"

    @property
    def record(self) -> str:
        """The name of its record."""
        return f"predictions-{self.name}.csv"

    def share(self, entries: Sequence[Entry]) -> list[int]:
        """Choose the job's cases by index; all slices of a volume go to one job."""
        return [
            index for index, turn in enumerate(turns(entries)) if turn % self.of == self.number - 1
        ]


def parse_job(text: str) -> Job | None:
    """Read ``--job 3/16``; None where it is empty.

    Raises:
        UserError: it is no such pair, or there is no job of that number.
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text)
    if match is None:
        raise UserError(
            f"--job {text}",
            "is not a job and the number of jobs",
            "Write for example --job 3/16; in a SLURM array --job $SLURM_ARRAY_TASK_ID/16.",
        )
    job = Job(int(match[1]), int(match[2]))
    if job.of > MOST_JOBS:
        raise UserError(f"--job {text}", f"must be at most {MOST_JOBS} jobs", "Use fewer.")
    if not 1 <= job.number <= job.of:
        raise UserError(
            f"--job {text}",
            f"there is no job {job.number} of {job.of}",
            f"Count jobs from 1 to {job.of}, in SLURM with --array=1-{job.of}."
            if job.of
            else "Write for example --job 3/16.",
        )
    return job


def turns(entries: Sequence[Entry]) -> list[int]:
    """Number the cases in their order, all slices of a volume alike."""
    return _numbered(entry.volume or entry.name for entry in entries)


def _numbered(keys: Iterable[str]) -> list[int]:
    places: dict[str, int] = {}
    return [places.setdefault(key, len(places)) for key in keys]


def divided(folder: Path, count: int, volume_of: Mapping[str, str]) -> list[list[str]]:
    """Divide cases among so many jobs: as those did that drew them, if they were as many.

    Args:
        folder: of results, which may hold the record of the jobs.
        count: of the jobs.
        volume_of: the volume of each case, by name in order; empty for one that is of none.

    Raises:
        UserError: the record of the jobs is damaged.
    """
    drawn = _cases_of_jobs(folder) or []
    cases: list[list[str]] = [[] for _ in range(count)]
    if len(drawn) == count:
        cases = [[name for name in names if name in volume_of] for names in drawn]
    taken = {name for names in cases for name in names}
    rest = {name: volume for name, volume in volume_of.items() if name not in taken}
    numbers = _numbered(volume or name for name, volume in rest.items())
    for name, number in zip(rest, numbers, strict=True):
        cases[number % count].append(name)
    return cases


def write_jobs(folder: Path, count: int, entries: Sequence[Entry]) -> None:
    """Record which cases each of so many jobs takes, unless the record says so already."""
    cases: list[list[str]] = [[] for _ in range(count)]
    for entry, turn in zip(entries, turns(entries), strict=True):
        cases[turn % count].append(entry.name)
    text = json.dumps({"jobs": count, "cases": cases}, separators=(",", ":"))
    path = folder / JOBS
    if not (path.is_file() and path.read_bytes() == text.encode()):
        with atomic_write(path) as part:
            part.write_text(text, "utf-8")


def record_parts(folder: Path, job: Job | None = None) -> list[Path]:
    """List the records of jobs and processes in a folder, those changed last at the end.

    With ``job`` only those of its processes.
    """
    found = []
    for name in _names(folder):
        match = PART.fullmatch(name)
        if match and (job is None or match["job"] == job.name):
            path = folder / name
            try:
                found.append((path.stat().st_mtime_ns, name, path))
            except OSError:  # gathered meanwhile
                continue
    return [path for *_, path in sorted(found)]


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - text: folders of results hold 1,000,000 names
    except OSError:
        return []


def has_records(folder: Path) -> bool:
    """Whether a folder holds a record of finished cases."""
    return (folder / PREDICTIONS).exists() or bool(record_parts(folder))


def rows_of(paths: Iterable[Path]) -> Iterator[dict[str, str]]:
    """Read the rows of records that others may be writing: what cannot be read is passed over."""
    for path in paths:
        try:
            table = read_table(path, needs=("name", "fingerprint"), hint="", keep_cut=False)
        except UserError:
            continue
        yield from table.rows if table else []


class Missing(NamedTuple):
    """The cases that a job has yet to draw, or to score, and the number of all its cases."""

    job: Job
    names: list[str]
    of: int
    drawing: bool = True

    def __str__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        cases = counted(self.of, "case")
        verb = "lacks" if self.drawing else "has not scored"
        return f"job {self.job} {verb} {len(self.names)} of {cases} ({shown})"


def missing_cases(folder: Path) -> list[Missing]:
    """List the jobs that have not finished all of their cases; empty where there are no jobs.

    Raises:
        UserError: the record of the jobs is damaged.
    """
    cases = _cases_of_jobs(folder)
    if cases is None:
        return []
    last = {row["name"]: row for row in rows_of([folder / PREDICTIONS, *record_parts(folder)])}
    done = {name for name, row in last.items() if row["fingerprint"] != UNFINISHED}
    left = [
        Missing(Job(number, len(cases)), [n for n in names if n not in done], len(names))
        for number, names in enumerate(cases, 1)
    ]
    return [part for part in left if part.names]


def _cases_of_jobs(folder: Path) -> list[list[str]] | None:
    """Read the names of the cases of each job; None where there is no record of jobs."""
    found = read_json(folder / JOBS, hint=HINT)
    if found is None:
        return None
    cases = found.get("cases")
    if not (isinstance(cases, list) and all(_are_names(names) for names in cases)):
        raise DamagedFile(folder / JOBS, "it does not list the cases of jobs", HINT)
    return cases


def _are_names(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
