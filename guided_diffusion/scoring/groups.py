"""Groups of cases to score together: the slices of a volume, or a single case.

They are scored one after the other, or in several processes; only their scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from guided_diffusion.data.classes import Classes
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.case_scores import (
    Binary,
    CaseFiles,
    CaseMasks,
    MaskScore,
    Scored,
    Scoring,
    load_case,
    mask_score,
    score_case,
)
from guided_diffusion.scoring.pool import in_order, one_thread, process_count
from guided_diffusion.scoring.predictions import Reader
from guided_diffusion.scoring.surface import surface_distances

AT_A_TIME = 16
"""Cases that are sent to a process together, at least; a volume is never divided."""
CaseOfClasses = tuple[CaseFiles, ...]
"""The files of a case, one entry per class."""


class Collect(NamedTuple):
    """What to make of cases while their masks are at hand, so that nobody reads them again.

    Attributes:
        make: makes it of the files and masks of a case, one of each per class.
        most: cases and classes of which it is made, the first ones.
    """

    make: Callable[[Sequence[CaseFiles], Sequence[CaseMasks]], Any]
    most: int


class Group(NamedTuple):
    """Cases to score together, in order; of the first ``few`` something is collected."""

    cases: list[CaseOfClasses]
    few: int


class GroupScores(NamedTuple):
    """The scores of a group.

    Attributes:
        patient: of its cases; empty where it is unknown.
        volume: that they are slices of; empty for a single case.
        rows: of each case, by class.
        whole: the scores of the volume, by class; empty where it is not contiguous.
        collected: what was made of cases, by name.
    """

    patient: str
    volume: str
    rows: list[list[Scored]]
    whole: list[MaskScore]
    collected: dict[str, Any]


def score_all(
    cases: Sequence[CaseOfClasses],
    classes: Classes | None,
    scoring: Scoring,
    *,
    collect: Collect | None = None,
    processes: int = 0,
) -> Iterator[GroupScores]:
    """Score all cases, sorted by name, and yield the scores of their groups in order.

    ``processes`` are several to score in; 0 for this one alone, -1 for one per core.
    """
    score = partial(
        _score_groups, classes=classes, scoring=scoring, make=collect.make if collect else None
    )
    most = collect.most // len(cases[0]) if collect else 0
    tasks = _tasks(cases, most)
    count = process_count(processes, len(cases))
    with one_thread():
        for scored in in_order(score, tasks, processes=count):
            yield from scored


def _tasks(cases: Sequence[CaseOfClasses], most: int) -> Iterator[list[Group]]:
    """Divide all cases into lots of groups, for a process each."""
    lot: list[Group] = []
    seen = 0
    for group in grouped(cases):
        lot.append(Group(group, max(0, most - seen)))
        seen += len(group)
        if sum(len(part.cases) for part in lot) >= AT_A_TIME:
            yield lot
            lot = []
    if lot:
        yield lot


def grouped(cases: Iterable[CaseOfClasses]) -> Iterator[list[CaseOfClasses]]:
    """Divide cases, sorted by name, into those that are scored together."""
    for _, members in groupby(cases, _volume):
        yield sorted(members, key=_plane)


def _volume(case: CaseOfClasses) -> str:
    """The key of the cases to score together: the slices of a volume, or a single case."""
    return case[0].truth.volume or f"/{case[0].name}"


def _plane(case: CaseOfClasses) -> int:
    return case[0].truth.plane or 0


def _score_groups(
    groups: Sequence[Group],
    *,
    classes: Classes | None,
    scoring: Scoring,
    make: Callable[[Sequence[CaseFiles], Sequence[CaseMasks]], Any] | None,
) -> list[GroupScores]:
    return [_score_group(group, classes, scoring, make) for group in groups]


def _score_group(
    group: Group,
    classes: Classes | None,
    scoring: Scoring,
    make: Callable[[Sequence[CaseFiles], Sequence[CaseMasks]], Any] | None,
) -> GroupScores:
    """Score the slices of one volume, and the volume itself where they are contiguous."""
    first = group.cases[0][0]
    read = Reader()
    rows: list[list[Scored]] = [[] for _ in group.cases[0]]
    stacks: list[list[tuple[Binary, Binary]]] = [[] for _ in group.cases[0]]
    collected: dict[str, Any] = {}
    whole_volume = _is_whole(group.cases)
    for files in group.cases:
        by_class = load_case(files, classes, read)
        for k, masks in enumerate(by_class):
            rows[k].append(score_case(masks, scoring))
            if whole_volume:
                stacks[k].append((masks.found, metrics.binarise(masks.truth)))
        if make is not None and len(collected) < group.few:
            collected[files[0].name] = make(files, by_class)
    sizes = first.spacing if scoring.spacing else None
    whole = [_score_volume(stack, sizes, scoring) for stack in stacks if stack]
    return GroupScores(first.truth.patient, first.truth.volume, rows, whole, collected)


def _is_whole(cases: Sequence[CaseOfClasses]) -> bool:
    """Whether these are adjacent planes of one volume, without a gap."""
    planes = [case[0].truth.plane for case in cases if case[0].truth.plane is not None]
    return bool(planes) and planes == list(range(planes[0], planes[0] + len(cases)))


def _score_volume(
    stack: Sequence[tuple[Binary, Binary]], sizes: tuple[float, ...] | None, scoring: Scoring
) -> MaskScore:
    found, truth = (np.stack(planes, axis=-1) for planes in zip(*stack, strict=True))
    counts = metrics.confusion(found, truth)
    return mask_score(counts, surface_distances(found, truth, spacing=sizes), scoring)
