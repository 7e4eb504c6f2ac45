"""Scoring a folder of predicted masks against their truths.

Predictions are paired with truths by case id, each case is scored, slices of one volume also
together, and the tables are written beside the predictions: ``scores.csv``, ``masks.csv``,
``patients.csv``, ``summary.json``. :func:`evaluate_all` is the entry point, for one
class and for several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.data.classes import Classes, find_classes, recorded_classes
from guided_diffusion.data.folders import counted
from guided_diffusion.data.geometry import spacing
from guided_diffusion.data.jobs import Missing, missing_cases
from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded, nearest_path
from guided_diffusion.layouts import open_masks
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.case_scores import CaseFiles, MaskScore, Scoring
from guided_diffusion.scoring.groups import Collect, score_all
from guided_diffusion.scoring.other_tools import find_masks
from guided_diffusion.scoring.patients import PatientScore, score_patients
from guided_diffusion.scoring.predictions import Found, find_predictions, recorded_plane
from guided_diffusion.scoring.summary import ClassScores, Summary, noted, summarise_all
from guided_diffusion.scoring.tables import require_writable, write_tables


class Evaluation(NamedTuple):
    """A scored folder: the settings, the files and the scores."""

    folder: Path
    scoring: Scoring
    classes: Classes | None
    cases: list[tuple[CaseFiles, ...]]  # the files of each case, one entry per class
    scores: dict[str, ClassScores]  # by class; "" where there is only one
    summary: Summary
    collected: dict[str, Any]  # what was made of the first cases, by name


def evaluate(
    inp_pth: str | Path | None, out_pth: str | Path | None, *, partial: bool = False
) -> Summary:
    """Score a folder of masks of one class with the default settings, and return the summary."""
    return evaluate_all(inp_pth, out_pth, partial=partial, one_class=True).summary


def evaluate_all(
    inp_pth: str | Path | None,
    out_pth: str | Path | None,
    *,
    scoring: Scoring | None = None,
    partial: bool = False,
    mask_labels: str = "",
    plane: str = "",
    raters: Sequence[str] = (),
    one_class: bool = False,
    collect: Collect | None = None,
    processes: int = 0,
) -> Evaluation:
    """Score the predictions in ``inp_pth`` against the truths in ``out_pth``.

    Writes ``scores.csv``, ``masks.csv`` (of members and fusions), ``patients.csv`` where patients
    are known, and ``summary.json`` into ``inp_pth``, atomically, after all cases have been scored.

    Args:
        inp_pth: the result folder, read by ``find_predictions``.
        out_pth: a folder of truths, read by ``open_masks``.
        scoring: the settings; None for the defaults.
        partial: score the cases that are in both folders.
        mask_labels: the classes; empty for those that sampling recorded, else a single class.
        plane: how volumes are sliced; empty for what sampling recorded, else axial.
        raters: folders with further masks of the same cases, one for each rater; empty for the
            masks of several raters that ``out_pth`` itself has, whose majority is then the truth.
        one_class: treat everything above 0 as one class, whatever the folder records.
        collect: what to make of cases while their masks are at hand.
        processes: in which cases are scored; 0 for this one, -1 for one per core.

    Raises:
        UserError: a missing or empty folder, cases in one folder only, a file that is not a
            readable mask, a class without files, a truth with a label of no class.
    """
    folder = require_writable(folder_of(inp_pth, "--inp_pth"))
    truth_folder = folder_of(out_pth, "--out_pth")
    classes = None if one_class else find_classes(mask_labels) or recorded_classes(folder)
    plane = plane or recorded_plane(folder) or "axial"
    truths = open_masks(truth_folder, classes, plane=plane, raters=not raters)
    missing = [part for part in map(_within(truths), missing_cases(folder)) if part.names]
    if missing and not partial:
        raise _unfinished(folder, missing)
    unfinished = {name for part in missing for name in part.names}
    cases = _cases(folder, truths, classes, unfinished, partial=partial, plane=plane)
    rated = [open_masks(folder_of(path, "--raters"), classes, plane=plane) for path in raters]
    cases = _with_raters(cases, rated) if raters else _with_own_raters(cases)
    cases, spaced = _with_spacing(cases)
    scoring = replace(scoring or Scoring(), spacing=spaced)

    names = ("",) if classes is None else classes.names
    scores: dict[str, ClassScores] = {name: ClassScores() for name in names}
    volumes: dict[str, dict[str, MaskScore]] = {name: {} for name in names}
    collected: dict[str, Any] = {}
    for group in score_all(cases, classes, scoring, collect=collect, processes=processes):
        for k, name in enumerate(names):
            for scored in group.rows[k]:
                scores[name].add(scored, patient=group.patient)
            if group.whole:
                volumes[name][group.volume] = group.whole[k]
        collected |= group.collected
    patient_of = {case[0].truth.volume: case[0].truth.patient for case in cases}
    for name in names:
        scores[name].patients += _patients(scores[name], volumes[name], patient_of, scoring)
    voted = 0 if raters else max(len(case[0].raters) for case in cases)
    summary = {**summarise_all(scores, scoring), "majority_of": voted, **noted(folder)}
    summary["unfinished"] = [str(part) for part in missing]
    write_tables(folder, scores, summary)
    return Evaluation(folder, scoring, classes, cases, scores, summary, collected)


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
    cases: list[tuple[CaseFiles, ...]],
) -> tuple[list[tuple[CaseFiles, ...]], bool]:
    """Add its pixel size to every case; also return whether it is known for all of them."""
    sizes: dict[Path | None, tuple[float, ...] | None] = {}
    for case in cases:
        truth = case[0].truth
        if truth.source not in sizes:
            placed = truth.placed()
            sizes[truth.source] = spacing(placed) if placed else None
    spaced = [
        tuple(file._replace(spacing=sizes[file.truth.source]) for file in case) for case in cases
    ]
    return spaced, None not in sizes.values()


def _patients(
    scores: ClassScores,
    volumes: Mapping[str, MaskScore],
    patient_of: Mapping[str, str],
    scoring: Scoring,
) -> list[PatientScore]:
    """One row per patient: the pooled counts, and the surfaces of a patient's only volume."""
    counts = {row.name: metrics.Confusion(row.tp, row.fp, row.fn, row.tn) for row in scores.rows}
    number = Counter(patient_of.values())
    surfaces = {
        patient_of[volume]: (score.hd95, score.assd, score.surface_dice)
        for volume, score in volumes.items()
        if number[patient_of[volume]] == 1
    }
    return score_patients(counts, scores.of_patient, surfaces=surfaces, rule=scoring.empty)


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


def _unfinished(folder: Path, missing: Sequence[Missing]) -> UserError:
    """The error that lists the jobs with unfinished cases."""
    more = f"; and {len(missing) - 10} further jobs" if len(missing) > 10 else ""
    return UserError(
        folder,
        "; ".join(map(str, missing[:10])) + more,
        f"Sample again with --job {missing[0].job} and so on: finished cases are kept; or score "
        "those with --partial True.",
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
