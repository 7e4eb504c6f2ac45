"""Scores per patient: the voxels of all of a patient's slices, counted together.

In a mean over slices one with a few lesion voxels weighs as much as the largest; here every voxel
weighs the same, as in scores of whole volumes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from guided_diffusion.scoring import metrics

Surfaces = tuple[float | None, float | None, float | None]
"""HD95, average surface distance and surface Dice of a volume; None where undefined."""


class PatientScore(NamedTuple):
    """One row of ``patients.csv``; the fields are its columns, in this order.

    The last three are those of the patient's volume, None unless there is one, without gaps.
    """

    patient: str
    cases: int
    dice: float | None
    iou: float | None
    tp: int
    fp: int
    fn: int
    tn: int
    precision: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    volume_difference: float | None = None
    hd95: float | None = None
    assd: float | None = None
    surface_dice: float | None = None


def score_patients(
    counts: Mapping[str, metrics.Confusion],
    patients: Mapping[str, str],
    *,
    surfaces: Mapping[str, Surfaces] | None = None,
    rule: str = "match",
) -> list[PatientScore]:
    """Pool the counts of each patient's cases, sorted by patient.

    ``counts`` and ``patients`` are by case, ``surfaces`` by patient; a case without a patient is
    left out. ``rule`` is one of :data:`guided_diffusion.scoring.metrics.EMPTY_RULES`.
    """
    pooled: dict[str, list[metrics.Confusion]] = {}
    for case, confusion in counts.items():
        if patients.get(case):
            pooled.setdefault(patients[case], []).append(confusion)
    none: Surfaces = (None, None, None)
    return [
        _pool(patient, pooled[patient], (surfaces or {}).get(patient, none), rule)
        for patient in sorted(pooled)
    ]


def _pool(
    patient: str, counts: list[metrics.Confusion], surfaces: Surfaces, rule: str
) -> PatientScore:
    total = metrics.Confusion(*map(sum, zip(*counts, strict=True)))
    hd95, assd, surface_dice = surfaces
    return PatientScore(
        patient,
        len(counts),
        **total._asdict(),
        **metrics.known_ratios(total, rule=rule),
        hd95=hd95,
        assd=assd,
        surface_dice=surface_dice,
    )


def summarise_patients(scores: Iterable[PatientScore]) -> dict[str, float | int | None]:
    """Return the number of patients and the mean of their Dice; None where there are none."""
    rows = list(scores)
    dice = [score.dice for score in rows if score.dice is not None]
    return {
        "patients": len(rows) or None,
        "dice_patient": math.fsum(dice) / len(dice) if dice else None,
    }
