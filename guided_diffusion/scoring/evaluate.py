"""Scoring a folder of predicted masks against their truths, for ``scripts/segmentation_env.py``.

Here predictions are paired with truths by case id, each case is scored (``case_scores``), slices of
one volume also together, and the tables are written beside the predictions: ``scores.csv``,
``masks.csv``, ``patients.csv``, ``summary.json``. Cases stream through; what is kept of one is its
row. ``evaluate_all`` is the door, for one class and for several; this room itself prints nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from guided_diffusion.data.classes import Classes, find_classes, recorded_classes
from guided_diffusion.data.folders import is_nifti
from guided_diffusion.data.readers import nifti_spacing
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import Truth, open_masks
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.case_scores import (
    Binary,
    CaseFiles,
    MaskScore,
    Scored,
    Scoring,
    load_case,
    mask_score,
    score_case,
)
from guided_diffusion.scoring.patients import PatientScore, score_patients
from guided_diffusion.scoring.predictions import Found, Reader, find_predictions
from guided_diffusion.scoring.summary import ClassScores, Summary, noted, summarise_all
from guided_diffusion.scoring.surface import surface_distances
from guided_diffusion.scoring.tables import write_tables


class Evaluation(NamedTuple):
    """A scored folder: what was asked, what was found, and everything measured."""

    folder: Path
    scoring: Scoring
    classes: Classes | None
    cases: list[tuple[CaseFiles, ...]]  # the files of each case, one entry per class
    scores: dict[str, ClassScores]  # by class; "" where there is only one
    summary: Summary


def evaluate(
    inp_pth: str | Path | None, out_pth: str | Path | None, *, partial: bool = False
) -> Summary:
    """Score a folder of masks of one class with the standard settings, and return the summary."""
    return evaluate_all(inp_pth, out_pth, partial=partial, one_class=True).summary


def evaluate_all(
    inp_pth: str | Path | None,
    out_pth: str | Path | None,
    *,
    scoring: Scoring | None = None,
    partial: bool = False,
    mask_labels: str = "",
    raters: Sequence[str] = (),
    one_class: bool = False,
) -> Evaluation:
    """Score the predictions in ``inp_pth`` against the truths in ``out_pth``.

    Args:
        inp_pth: the result folder; ``find_predictions`` says what is read.
        out_pth: whatever ``open_masks`` finds for a data layout.
        scoring: how; None for the standard.
        partial: score the cases that are on both sides.
        mask_labels: the classes; without them those that sampling noted, without either one.
        raters: folders with further masks of the same cases, one for each rater.
        one_class: everything above 0 is one class, whatever the folder says.

    Writes ``scores.csv``, ``masks.csv`` (of members and fusions), ``patients.csv`` where patients
    are known, and ``summary.json`` into ``inp_pth``, each whole or not at all, after every case has
    been scored.

    Raises:
        UserError: a missing or empty folder, cases without a partner, a file that is not a
            readable mask, a class without files, a truth with a label of no class.
    """
    folder = folder_of(inp_pth, "--inp_pth")
    truth_folder = folder_of(out_pth, "--out_pth")
    classes = None if one_class else find_classes(mask_labels) or recorded_classes(folder)
    truths = _truths(truth_folder, classes)
    cases = _cases(folder, truths, classes, partial=partial)
    cases = _with_raters(cases, [_rater(path, classes) for path in raters])
    cases, spaced = _with_spacing(cases)
    scoring = replace(scoring or Scoring(), spacing=spaced)

    names = ("",) if classes is None else classes.names
    scores = _score(cases, names, classes, scoring)
    summary = {**summarise_all(scores, scoring), **noted(folder)}
    write_tables(folder, scores, summary)
    return Evaluation(folder, scoring, classes, cases, scores, summary)


def _truths(folder: Path, classes: Classes | None) -> dict[str, Truth]:
    return open_masks(folder) if classes is None else open_masks(folder, classes)


def _rater(path: str, classes: Classes | None) -> dict[str, Truth]:
    return _truths(folder_of(path, "--raters"), classes)


def _cases(
    folder: Path, truths: Mapping[str, Truth], classes: Classes | None, *, partial: bool
) -> list[tuple[CaseFiles, ...]]:
    """The files of every case, one entry per class in their order."""
    ends = [""] if classes is None else [f"_{name}" for name in classes.names]
    by_class = [pair_cases(folder, truths, partial=partial, end=end) for end in ends]
    for end, cases in zip(ends, by_class, strict=True):
        if [case.name for case in cases] != [case.name for case in by_class[0]]:
            raise UserError(
                folder,
                found=f"other cases of class {end[1:]} than of class {ends[0][1:]}",
                expected="a file of each class for every case",
                hint="Sample again: finished cases are kept.",
            )
    return list(zip(*by_class, strict=True))


def pair_cases(
    folder: Path, truths: Mapping[str, Truth], *, partial: bool = False, end: str = ""
) -> list[CaseFiles]:
    """Pair the predictions in ``folder`` with the truths, sorted by id.

    ``end`` stands behind the files' names where they are of one class of several.

    Raises UserError that lists the cases which are on one side only (with ``partial`` they are
    left out), and when no case is on both.
    """
    predicted = find_predictions(folder, end)
    if not predicted:
        raise UserError(
            folder,
            found="no prediction",
            expected=f"files named <case>_output_ens{end}.png directly in it",
            hint="Give --inp_pth the folder that segmentation_sample.py wrote (its --out_dir).",
        )

    common = sorted(predicted.keys() & truths.keys())
    if not common or (not partial and predicted.keys() ^ truths.keys()):
        raise _unpaired(folder, predicted.keys(), truths.keys())
    return [_case(name, predicted[name], truths[name]) for name in common]


def _case(name: str, found: Found, truth: Truth) -> CaseFiles:
    return CaseFiles(name, found.fused, found.members, truth)


def _with_raters(
    cases: list[tuple[CaseFiles, ...]], raters: Sequence[Mapping[str, Truth]]
) -> list[tuple[CaseFiles, ...]]:
    """Give every case the masks of its raters; each has to have them all."""
    names = {case[0].name for case in cases}
    for number, rater in enumerate(raters, 1):
        if missing := names - rater.keys():
            raise UserError(
                "--raters",
                found=f"no mask of rater {number} for {_cases_text(missing)}",
                expected="a mask of every rater for every case",
                hint="Complete the folder, or leave it out.",
            )
    return [
        tuple(file._replace(raters=tuple(rater[file.name] for rater in raters)) for file in case)
        for case in cases
    ]


def _with_spacing(
    cases: list[tuple[CaseFiles, ...]],
) -> tuple[list[tuple[CaseFiles, ...]], bool]:
    """Give every case the size of its pixels; whether all of them know it."""
    sizes = {
        path: nifti_spacing(path) if path is not None and is_nifti(path) else None
        for path in {case[0].truth.source for case in cases}
    }
    spaced = [
        tuple(file._replace(spacing=sizes[file.truth.source]) for file in case) for case in cases
    ]
    return spaced, None not in sizes.values()


def _score(
    cases: Sequence[tuple[CaseFiles, ...]],
    names: Sequence[str],
    classes: Classes | None,
    scoring: Scoring,
) -> dict[str, ClassScores]:
    """Score every case, those of a volume together; the order is that of the cases."""
    scores = {name: ClassScores() for name in names}
    volumes: dict[str, dict[str, MaskScore]] = {name: {} for name in names}
    groups = [sorted(group, key=_plane) for _, group in groupby(cases, _volume)]
    for group in groups:
        truth = group[0][0].truth
        rows, of_volume = _score_group(group, classes, scoring)
        for k, name in enumerate(names):
            for scored in rows[k]:
                scores[name].add(scored, patient=truth.patient)
            if of_volume:
                volumes[name][truth.volume] = of_volume[k]

    patient_of = {case[0].truth.volume: case[0].truth.patient for case in cases}
    for name in names:
        scores[name].patients += _patients(scores[name], volumes[name], patient_of, scoring)
    return scores


def _volume(case: tuple[CaseFiles, ...]) -> str:
    """What is scored together: the slices of a volume, or one case alone."""
    return case[0].truth.volume or f"/{case[0].name}"


def _plane(case: tuple[CaseFiles, ...]) -> int:
    return case[0].truth.plane or 0


def _score_group(
    cases: Sequence[tuple[CaseFiles, ...]], classes: Classes | None, scoring: Scoring
) -> tuple[list[list[Scored]], list[MaskScore]]:
    """Score the slices of one volume, and the volume where they are all of it; by class."""
    read = Reader()
    rows: list[list[Scored]] = [[] for _ in cases[0]]
    stacks: list[list[tuple[Binary, Binary]]] = [[] for _ in cases[0]]
    whole_volume = _is_whole(cases)
    for files in cases:
        for k, masks in enumerate(load_case(files, classes, read)):
            rows[k].append(score_case(masks, scoring))
            if whole_volume:
                stacks[k].append((masks.found, metrics.binarise(masks.truth)))
    spacing = cases[0][0].spacing if scoring.spacing else None
    return rows, [_score_volume(stack, spacing, scoring) for stack in stacks if stack]


def _is_whole(cases: Sequence[tuple[CaseFiles, ...]]) -> bool:
    """Whether these are neighbouring planes of one volume, without a gap."""
    planes = [case[0].truth.plane for case in cases if case[0].truth.plane is not None]
    return bool(planes) and planes == list(range(planes[0], planes[0] + len(cases)))


def _score_volume(
    stack: Sequence[tuple[Binary, Binary]], spacing: tuple[float, ...] | None, scoring: Scoring
) -> MaskScore:
    found, truth = (np.stack(planes, axis=-1) for planes in zip(*stack, strict=True))
    counts = metrics.confusion(found, truth)
    return mask_score(counts, surface_distances(found, truth, spacing=spacing), scoring)


def _patients(
    scores: ClassScores,
    volumes: Mapping[str, MaskScore],
    patient_of: Mapping[str, str],
    scoring: Scoring,
) -> list[PatientScore]:
    """One row per patient: the counts of all cases together, the surfaces of an only volume."""
    counts = {row.name: metrics.Confusion(row.tp, row.fp, row.fn, row.tn) for row in scores.rows}
    number = Counter(patient_of.values())
    surfaces = {
        patient_of[volume]: (score.hd95, score.assd, score.surface_dice)
        for volume, score in volumes.items()
        if number[patient_of[volume]] == 1
    }
    return score_patients(counts, scores.of_patient, surfaces=surfaces, rule=scoring.empty)


def _unpaired(folder: Path, predicted: Iterable[str], true: Iterable[str]) -> UserError:
    """The error that lists the cases which are on one side only."""
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
    expected = "one prediction <case>_output_ens.png per truth"
    return UserError(folder, found="; ".join(parts), expected=expected, hint=hint)


def _cases_text(names: Iterable[str], most: int = 10) -> str:
    """'3 cases (a, b, c)', with the first ten names at most."""
    listed = sorted(names)
    shown = ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
    return f"{len(listed)} {'case' if len(listed) == 1 else 'cases'} ({shown})"


def folder_of(path: str | Path | None, flag: str) -> Path:
    """The folder a flag names, or a UserError that says what is wrong with it."""
    if path is None or not str(path):
        found, hint = "nothing", f"Add {flag} with a folder."
    elif not Path(path).exists():
        found, hint = f"{path}, which does not exist", "Check the path."
    elif not Path(path).is_dir():
        found, hint = f"{path}, which is a file", "Give the folder it lies in."
    else:
        return Path(path)
    raise UserError(flag, found=found, expected="a folder", hint=hint)
