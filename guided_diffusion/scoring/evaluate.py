"""Scoring a folder of predicted masks against their truths.

Predictions are paired with truths by case id, each case is scored, slices of one volume also
together, and the tables are written beside the predictions: ``scores.csv``, ``masks.csv``,
``patients.csv``, ``summary.json``. :func:`evaluate_all` is the entry point, for one
class and for several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.jobs import Job, Missing
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.case_scores import CaseFiles, MaskScore, Scoring
from guided_diffusion.scoring.groups import Collect, grouped, score_all
from guided_diffusion.scoring.pairing import Given, divided_cases, open_cases, unfinished
from guided_diffusion.scoring.parts import Parts, read_parts, write_part
from guided_diffusion.scoring.patients import PatientScore, score_patients
from guided_diffusion.scoring.summary import ClassScores, Summary, noted, summarise_all
from guided_diffusion.scoring.tables import write_tables


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
    given = open_cases(
        *(inp_pth, out_pth, scoring),
        partial=partial,
        mask_labels=mask_labels,
        plane=plane,
        raters=raters,
        one_class=one_class,
    )
    folder, classes, scoring = given.folder, given.classes, given.scoring
    parts = read_parts(folder, given.settings)
    unscored = _unscored(given, parts)
    left_out = {name for part in unscored for name in part.names}
    cases = [case for case in given.cases if case[0].name not in left_out]
    if unscored and not (partial and cases):
        raise unfinished(folder, unscored)
    names = ("",) if classes is None else classes.names
    scores: dict[str, ClassScores] = {name: ClassScores() for name in names}
    volumes: dict[str, dict[str, MaskScore]] = {name: {} for name in names}
    collected: dict[str, Any] = {}
    for group in (
        map(parts.scores, grouped(cases))
        if parts.of
        else score_all(cases, classes, scoring, collect=collect, processes=processes)
    ):
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
    summary["unfinished"] = [str(part) for part in (*given.missing, *unscored)]
    write_tables(folder, scores, summary)
    for path in parts.paths if not summary["unfinished"] else ():
        path.unlink(missing_ok=True)  # another run may join them, too
    return Evaluation(folder, scoring, classes, cases, scores, summary, collected)


def score_job(
    inp_pth: str | Path | None,
    out_pth: str | Path | None,
    job: Job,
    *,
    scoring: Scoring | None = None,
    partial: bool = False,
    mask_labels: str = "",
    plane: str = "",
    raters: Sequence[str] = (),
    processes: int = 0,
) -> tuple[Path, int]:
    """Score one part of the cases, which :func:`evaluate_all` joins with the others.

    That is the part that the same job of sampling draws, which has to be finished; those of other
    jobs need not be. Arguments are those of :func:`evaluate_all`.

    Returns:
        The file of the scores, and the number of cases.

    Raises:
        UserError: as :func:`evaluate_all`, for the cases of the job.
    """
    given = open_cases(
        *(inp_pth, out_pth, scoring, job),
        partial=partial,
        mask_labels=mask_labels,
        plane=plane,
        raters=raters,
    )
    groups = score_all(given.cases, given.classes, given.scoring, processes=processes)
    pairs = zip(grouped(given.cases), groups, strict=True)
    return write_part(given.folder, job, given.settings, pairs), len(given.cases)


def _unscored(given: Given, parts: Parts) -> list[Missing]:
    """List the jobs that have not scored all of their cases as they are; none without parts."""
    if not parts.of:
        return []
    left = {case[0].name for own in grouped(given.cases) if not parts.has(own) for case in own}
    jobs = [
        Missing(Job(number, parts.of), [n for n in names if n in left], len(names), drawing=False)
        for number, names in enumerate(divided_cases(given.folder, given.truths, parts.of), 1)
    ]
    return [part for part in jobs if part.names]


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
