"""Scores of jobs that share the cases of a folder: each writes its part, and one run joins them.

A part, ``scores-3-of-16.jsonl``, is a line of settings and a line for each group of cases. Floats
are written so that they are read to the last bit. A group counts only as long as its files are
those that were scored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.data.jobs import Job
from guided_diffusion.errors import UserError
from guided_diffusion.files import DamagedFile, atomic_write, require_file
from guided_diffusion.scoring.calibration import Tally
from guided_diffusion.scoring.case_scores import CaseScore, MaskScore, Scored
from guided_diffusion.scoring.components import Component
from guided_diffusion.scoring.groups import CaseOfClasses, GroupScores
from guided_diffusion.scoring.tables import TARGET_HINT

Settings = dict[str, Any]
PART = re.compile(r"scores-(?P<job>\d+)-of-(?P<of>\d+)\.jsonl")


def part_path(folder: Path, job: Job) -> Path:
    """The file that holds the scores of a job."""
    return folder / f"scores-{job.name}.jsonl"


def write_part(
    folder: Path,
    job: Job,
    settings: Settings,
    groups: Iterable[tuple[Sequence[CaseOfClasses], GroupScores]],
) -> Path:
    """Write the scores of a job's groups, each as it comes; the file appears whole.

    Raises:
        UserError: the folder cannot be written; an earlier file is unchanged.
    """
    path = part_path(folder, job)
    with (
        atomic_write(path, hint=TARGET_HINT) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.write(f"{json.dumps(settings)}\n")
        for cases, scores in groups:
            line = {"stamp": _stamp(cases), **_plain(scores)}
            file.write(f"{json.dumps(line, default=lambda number: number.item())}\n")
    return path


class Parts(NamedTuple):
    """The parts in a folder.

    Attributes:
        paths: their files.
        of: the number of jobs; 0 where there are no parts.
        lines: the scores of each group as text, by the names and the state of its files.
    """

    paths: list[Path]
    of: int
    lines: dict[str, tuple[Path, str]]

    def has(self, cases: Sequence[CaseOfClasses]) -> bool:
        """Whether a job has scored the files of a group as they are."""
        return _stamp(cases) in self.lines

    def scores(self, cases: Sequence[CaseOfClasses]) -> GroupScores:
        """Read the scores of a group that it has.

        Raises:
            UserError: they are damaged.
        """
        path, text = self.lines[_stamp(cases)]
        try:
            return _group(json.loads(text))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise _damaged(path, "a line is not that of scores") from error


def read_parts(folder: Path, settings: Settings) -> Parts:
    """Read the parts in a folder, if there are any.

    Raises:
        UserError: they are damaged, of other settings, or of several numbers of jobs.
    """
    named = {path: PART.fullmatch(path.name) for path in sorted(folder.glob("scores-*.jsonl"))}
    numbers = sorted({int(match["of"]) for match in named.values() if match})
    if len(numbers) > 1:
        raise UserError(
            folder,
            f"holds scores of {numbers[0]} jobs and of {numbers[1]} jobs",
            f"Delete scores-*-of-{numbers[0]}.jsonl or the others.",
        )
    paths = [path for path, match in named.items() if match]
    lines = {}
    for path in paths:
        require_file(path)
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            _refuse_other(path, file.readline(), settings)
            for line in file:
                lines[line[len(_START) : len(_START) + _DIGITS]] = (path, line)
    return Parts(paths, next(iter(numbers), 0), lines)


_START, _DIGITS = '{"stamp": "', 32


def _refuse_other(path: Path, text: str, settings: Settings) -> None:
    """Raise a UserError for a part with other settings."""
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, "its first line does not hold settings") from error
    for name in settings:
        if found.get(name) != settings[name]:
            raise UserError(
                path,
                f"was scored with {name} {found.get(name)!r}, not {settings[name]!r}",
                "Use the same flags, or delete the scores of the jobs and score again.",
            )


def _damaged(path: Path, why: str) -> DamagedFile:
    return DamagedFile(path, why, "Delete it and score with this --job again.")


def _stamp(cases: Sequence[CaseOfClasses]) -> str:
    """A digest of the names of cases, and of the names, sizes and times of their files."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case[0].name}\0".encode(errors="surrogateescape"))
    files = [file for case in cases for file in case]
    truths = [truth for file in files for truth in (file.truth, *file.raters)]
    paths = {source.path for file in files for source in file.sources}
    for path in sorted(paths | {truth.source for truth in truths if truth.source}):
        state = path.stat()
        text = f"{path.name}\0{state.st_size} {state.st_mtime_ns}\0"
        digest.update(text.encode(errors="surrogateescape"))
    return digest.hexdigest()[:_DIGITS]


def _plain(scores: GroupScores) -> dict[str, Any]:
    return {
        "patient": scores.patient,
        "volume": scores.volume,
        "rows": [[_plain_case(scored) for scored in of_class] for of_class in scores.rows],
        "whole": scores.whole,
    }


def _plain_case(scored: Scored) -> list[Any]:
    return [
        scored.row,
        scored.masks,
        _sparse(scored.probability),
        _sparse(scored.uncertainty),
        scored.components,
    ]


def _sparse(tally: Tally) -> list[list[int]]:
    """The levels that have pixels, with their numbers."""
    found = np.flatnonzero(tally.counts[:, 0])
    return np.column_stack([found, tally.counts[found]]).tolist()


def _dense(rows: Sequence[Sequence[int]]) -> Tally:
    tally = Tally.empty()
    for level, pixels, hits in rows:
        tally.counts[level] = pixels, hits
    return tally


def _group(found: Mapping[str, Any]) -> GroupScores:
    rows = [[_case(*parts) for parts in of_class] for of_class in found["rows"]]
    whole = [MaskScore(*values) for values in found["whole"]]
    return GroupScores(found["patient"], found["volume"], rows, whole, {})


def _case(row: Any, masks: Any, probability: Any, uncertainty: Any, components: Any) -> Scored:
    return Scored(
        CaseScore(*row),
        {name: MaskScore(*values) for name, values in masks.items()},
        _dense(probability),
        _dense(uncertainty),
        [Component(*values) for values in components],
    )
