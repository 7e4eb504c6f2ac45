"""What is scored: the predictions of a folder, paired with their truths by case id.

:func:`open_cases` finds the files of all cases, or of the part that a job scores.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.data.classes import Classes, find_classes, recorded_classes
from guided_diffusion.data.folders import counted
from guided_diffusion.data.geometry import spacing
from guided_diffusion.data.jobs import Job, Missing, divided, missing_cases
from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded, nearest_path
from guided_diffusion.layouts import open_masks
from guided_diffusion.scoring.case_scores import CaseFiles, Scoring
from guided_diffusion.scoring.other_tools import find_masks
from guided_diffusion.scoring.predictions import Found, find_predictions, recorded_plane
from guided_diffusion.scoring.tables import require_writable


class Given(NamedTuple):
    """What is to be scored, and how; of one job its own cases alone."""

    folder: Path
    truths: Mapping[str, Truth]
    classes: Classes | None
    cases: list[tuple[CaseFiles, ...]]
    scoring: Scoring
    missing: list[Missing]  # what jobs have not drawn
    settings: dict[str, Any]  # on which the scores of a case depend


def open_cases(
    inp_pth: str | Path | None,
    out_pth: str | Path | None,
    scoring: Scoring | None,
    job: Job | None = None,
    *,
    partial: bool,
    mask_labels: str,
    plane: str,
    raters: Sequence[str],
    one_class: bool = False,
) -> Given:
    """Find the files of all cases, or of those of a job."""
    folder = require_writable(folder_of(inp_pth, "--inp_pth"))
    truth_folder = folder_of(out_pth, "--out_pth")
    classes = None if one_class else find_classes(mask_labels) or recorded_classes(folder)
    plane = plane or recorded_plane(folder) or "axial"
    truths = open_masks(truth_folder, classes, plane=plane, raters=not raters)
    own = {*divided_cases(folder, truths, job.of)[job.number - 1]} if job else truths.keys()
    missing = [part for part in map(_within(own), missing_cases(folder)) if part.names]
    if missing and not partial:
        raise unfinished(folder, missing)
    left_out = {name for part in missing for name in part.names}
    some = partial or job is not None
    cases = _cases(folder, truths, classes, left_out, partial=some, plane=plane)
    cases = [case for case in cases if case[0].name in own]
    found = {case[0].name for case in cases}
    if own - found and not partial:
        raise _unpaired(folder, found, own)
    rated = [open_masks(folder_of(path, "--raters"), classes, plane=plane) for path in raters]
    cases = _with_raters(cases, rated) if raters else _with_own_raters(cases)
    cases, spaced = _with_spacing(cases, truths.values() if job else ())
    scoring = replace(scoring or Scoring(), spacing=spaced)
    settings = {
        **vars(scoring),
        "mask_labels": str(classes or ""),
        "plane": plane,
        "raters": list(raters),
    }
    return Given(folder, truths, classes, cases, scoring, missing, settings)


def divided_cases(folder: Path, truths: Mapping[str, Truth], count: int) -> list[list[str]]:
    """The cases of each of so many jobs, by name."""
    return divided(folder, count, {name: truths[name].volume for name in sorted(truths)})


def _cases(
    folder: Path,
    truths: Mapping[str, Truth],
    classes: Classes | None,
    unfinished: Container[str],
    *,
    partial: bool,
    plane: str,
) -> list[tuple[CaseFiles, ...]]:
    """The files of every case, one entry per class in their order.

    Those that a job has begun and not finished are left out.
    """
    ends = [""] if classes is None else [f"_{name}" for name in classes.names]
    predicted = [find_predictions(folder, end, truths=truths) for end in ends]
    predicted = [
        {name: files for name, files in found.items() if name not in unfinished}
        for found in predicted
    ]
    if not any(predicted):
        predicted = find_masks(folder, classes, truths, plane=plane)
    by_class = [
        pair_cases(folder, found, truths, partial=partial, end=end)
        for end, found in zip(ends, predicted, strict=True)
    ]
    for end, cases in zip(ends, by_class, strict=True):
        if [case.name for case in cases] != [case.name for case in by_class[0]]:
            raise UserError(
                folder,
                f"has other cases of class {end[1:]} than of class {ends[0][1:]}; every case needs "
                "a file of each class",
                "Sample again: finished cases are kept.",
            )
    return list(zip(*by_class, strict=True))


def pair_cases(
    folder: Path,
    predicted: Mapping[str, Found],
    truths: Mapping[str, Truth],
    *,
    partial: bool = False,
    end: str = "",
) -> list[CaseFiles]:
    """Pair the predictions in ``folder`` with the truths, sorted by id.

    ``end`` follows the files' names where they are of one class of several. With ``partial`` the
    cases on one side only are left out.

    Raises:
        UserError: a case is on one side only, or none is on both.
    """
    if not predicted:
        raise UserError(
            folder,
            f"has no prediction, such as files named <case>_output_ens{end}.png directly in it, or "
            "<case>.png or <case>.nii.gz of another tool",
            "Pass the folder that segmentation_sample.py wrote (its --out_dir), or a folder of "
            "masks.",
        )

    common = sorted(predicted.keys() & truths.keys())
    if not common or (not partial and predicted.keys() ^ truths.keys()):
        raise _unpaired(folder, predicted.keys(), truths.keys())
    return [CaseFiles(name, *predicted[name], truth=truths[name]) for name in common]


def _with_own_raters(cases: list[tuple[CaseFiles, ...]]) -> list[tuple[CaseFiles, ...]]:
    """Add the masks whose majority the truth is, to every case that has them."""
    return [tuple(file._replace(raters=file.truth.raters) for file in case) for case in cases]


def _with_raters(
    cases: list[tuple[CaseFiles, ...]], raters: Sequence[Mapping[str, Truth]]
) -> list[tuple[CaseFiles, ...]]:
    """Add the masks of its raters to every case; none may be missing."""
    names = {case[0].name for case in cases}
    for number, rater in enumerate(raters, 1):
        if missing := names - rater.keys():
            raise UserError(
                "--raters",
                f"rater {number} has no mask for {_cases_text(missing)}",
                "Complete the folder, or omit it.",
            )
    return [
        tuple(file._replace(raters=tuple(rater[file.name] for rater in raters)) for file in case)
        for case in cases
    ]


def _with_spacing(
    cases: list[tuple[CaseFiles, ...]], others: Iterable[Truth] = ()
) -> tuple[list[tuple[CaseFiles, ...]], bool]:
    """Add its pixel size to every case; also return whether it is known for all of them.

    It has to be known for ``others`` too.
    """
    sizes: dict[Path | None, tuple[float, ...] | None] = {}
    for truth in (*(case[0].truth for case in cases), *others):
        if truth.source not in sizes:
            placed = truth.placed()
            sizes[truth.source] = spacing(placed) if placed else None
    spaced = [
        tuple(file._replace(spacing=sizes[file.truth.source]) for file in case) for case in cases
    ]
    return spaced, None not in sizes.values()


def _unpaired(folder: Path, predicted: Iterable[str], true: Iterable[str]) -> UserError:
    """The error that lists the cases on one side only."""
    missing, surplus = set(true) - set(predicted), set(predicted) - set(true)
    parts = []
    if missing:
        parts.append(f"no prediction for {_cases_text(missing)}")
    if surplus:
        parts.append(f"no truth for {_cases_text(surplus)}")

    common = len(set(true) & set(predicted))
    if common:
        hint = f"Complete the folders, or score the {common} common cases with --partial True."
    else:
        hint = "Not one case is on both sides: check that --out_pth is the data that was sampled."
    return UserError(folder, "; ".join(parts), hint)


def _within(truths: Container[str]) -> Callable[[Missing], Missing]:
    """Keep those of a job's cases that have a truth."""
    return lambda part: part._replace(names=[name for name in part.names if name in truths])


def unfinished(folder: Path, missing: Sequence[Missing]) -> UserError:
    """The error that lists the jobs with unfinished cases."""
    more = f"; and {len(missing) - 10} further jobs" if len(missing) > 10 else ""
    again, kept = ("Sample", ": finished cases are kept") if missing[0].drawing else ("Score", "")
    return UserError(
        folder,
        "; ".join(map(str, missing[:10])) + more,
        f"{again} again with --job {missing[0].job} and so on{kept}; or score those with "
        "--partial True.",
    )


def _cases_text(names: Iterable[str], most: int = 10) -> str:
    """'3 cases (a, b, c)', with the first ten names at most."""
    listed = sorted(names)
    shown = ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
    return f"{counted(len(listed), 'case')} ({shown})"


def folder_of(path: str | Path | None, flag: str) -> Path:
    """The folder that a flag names; a UserError where it is not one."""
    if path is None or not str(path):
        raise UserError(flag, "is missing", f"Add {flag} with a folder.")
    folder = expanded(path, flag=flag)
    if not folder.exists():
        hint = nearest_path(folder, "Check the path.")
        raise UserError(f"{flag} {path}", "does not exist", hint)
    if not folder.is_dir():
        raise UserError(f"{flag} {path}", "is a file, not a folder", "Pass the folder it is in.")
    return folder
