"""Scores per patient: the voxels of all of a patient's slices, counted together.

A slice with a few voxels of a lesion weighs as much as the largest one in a mean over slices; here
every voxel weighs the same, as in scores of whole volumes. Called by ``evaluate``.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from guided_diffusion import metrics


class PatientScore(NamedTuple):
    """One row of ``patients.csv``; the fields are its columns, in this order."""

    patient: str
    cases: int
    dice: float
    iou: float
    tp: int
    fp: int
    fn: int
    tn: int


def score_patients(
    counts: Mapping[str, metrics.Confusion], patients: Mapping[str, str]
) -> list[PatientScore]:
    """Pool the counts of each patient's cases, sorted by patient.

    ``counts`` and ``patients`` are by case; a case without a patient is left out.
    """
    pooled: dict[str, list[metrics.Confusion]] = {}
    for case, confusion in counts.items():
        if patients.get(case):
            pooled.setdefault(patients[case], []).append(confusion)
    return [_pool(patient, pooled[patient]) for patient in sorted(pooled)]


def _pool(patient: str, counts: list[metrics.Confusion]) -> PatientScore:
    total = metrics.Confusion(*map(sum, zip(*counts, strict=True)))
    return PatientScore(patient, len(counts), metrics.dice(total), metrics.iou(total), *total)


def summarise_patients(scores: Iterable[PatientScore]) -> dict[str, float | int | None]:
    """How many patients there are, and the mean of their Dice; None where there are none."""
    dice = [score.dice for score in scores]
    if not dice:
        return {"patients": None, "dice_patient": None}
    return {"patients": len(dice), "dice_patient": math.fsum(dice) / len(dice)}


def patients_csv(scores: Iterable[PatientScore]) -> str:
    """One header line and one line per patient."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(PatientScore._fields)
    writer.writerows(scores)
    return text.getvalue()
