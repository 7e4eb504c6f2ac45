"""The summary of a scored folder: the content of ``summary.json``, and the printed table.

Scores are collected case by case (:class:`ClassScores`) and then described: over all cases, over
those with a lesion, by the lesion's size, per patient, and for every mask of the ensemble; with the
calibration of the probability and the value of the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from guided_diffusion.data.folders import counted
from guided_diffusion.data.jobs import PREDICTIONS, UNFINISHED, record_parts, rows_of
from guided_diffusion.errors import UserError
from guided_diffusion.files import read_table
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.calibration import Tally
from guided_diffusion.scoring.case_scores import CaseScore, MaskScore, Scored, Scoring, mean_of
from guided_diffusion.scoring.components import Component
from guided_diffusion.scoring.confidence import (
    describe_calibration,
    describe_components,
    describe_uncertainty,
)
from guided_diffusion.scoring.intervals import LEVEL, describe
from guided_diffusion.scoring.patients import PatientScore, summarise_patients

Summary = dict[str, Any]
METRICS = (*MaskScore._fields, "dice_between", "energy_distance", "dice_best")
"""The columns of ``scores.csv`` that the summary describes."""
SIZES = ("small", "medium", "large")


@dataclass
class ClassScores:
    """The scores of one class: rows, single masks, components, patients and tallies of pixels."""

    rows: list[CaseScore] = field(default_factory=list)
    masks: list[dict[str, MaskScore]] = field(default_factory=list)
    components: list[list[Component]] = field(default_factory=list)
    patients: list[PatientScore] = field(default_factory=list)
    of_patient: dict[str, str] = field(default_factory=dict)
    probability: Tally = field(default_factory=Tally.empty)
    uncertainty: Tally = field(default_factory=Tally.empty)

    def add(self, scored: Scored, *, patient: str = "") -> None:
        """Add the scores of one case."""
        self.rows.append(scored.row)
        self.masks.append(scored.masks)
        self.components.append(scored.components)
        self.of_patient[scored.row.name] = patient
        self.probability = self.probability.plus(scored.probability)
        self.uncertainty = self.uncertainty.plus(scored.uncertainty)

    def groups(self, rows: Iterable[CaseScore]) -> list[str] | None:
        """The patient of each row, where every case has one; else None."""
        if not all(self.of_patient.values()):
            return None
        return [self.of_patient[row.name] for row in rows]


def summarise_all(scores: Mapping[str, ClassScores], scoring: Scoring) -> Summary:
    """Summarise one class, or several with the means over them at the top level."""
    parts = {name: summarise(of_class, scoring) for name, of_class in scores.items()}
    if "" in parts:
        return parts[""]

    first = next(iter(parts.values()))
    means = {
        key: mean_of([part[key] for part in parts.values()])
        for key in first
        if any(isinstance(part[key], float) for part in parts.values())
    }
    cases = list(zip(*(of_class.rows for of_class in scores.values()), strict=True))
    empty = [all(score.empty_truth for score in case) for case in cases]
    found_none = [all(score.empty_prediction for score in case) for case in cases]
    own = {key: value for key, value in first.items() if not isinstance(value, dict | list)}
    return {
        **own,
        **means,
        "threshold": metrics.THRESHOLD,
        "distances": first["distances"],
        "interval": first["interval"],
        # a case counts as empty where all of its classes are
        "empty_truth": sum(empty),
        "empty_prediction": sum(found_none),
        "empty_both": sum(map(all, zip(empty, found_none, strict=True))),
        "classes": parts,
    }


def summarise(scores: ClassScores, scoring: Scoring) -> Summary:
    """Summarise one class: means over all cases and over those with a lesion, and all else.

    A mean over no case is None (null in JSON).
    """
    rows = scores.rows
    lesion = [row for row in rows if not row.empty_truth]
    return {
        "cases": len(rows),
        "empty_truth": len(rows) - len(lesion),
        "empty_prediction": sum(row.empty_prediction for row in rows),
        "empty_both": sum(row.empty_truth and row.empty_prediction for row in rows),
        "without_members": sum(not row.members for row in rows),
        "dice": mean_of([row.dice for row in rows]),
        "dice_lesion": mean_of([row.dice for row in lesion]),
        "iou": mean_of([row.iou for row in rows]),
        "iou_lesion": mean_of([row.iou for row in lesion]),
        "dice_member": mean_of([row.dice_member for row in rows]),
        "dice_member_lesion": mean_of([row.dice_member for row in lesion]),
        "parent_dice": mean_of([row.parent_dice for row in rows]),
        "parent_iou": mean_of([row.parent_iou for row in rows]),
        "threshold": metrics.THRESHOLD,
        "empty": scoring.empty,
        "empty_rule": metrics.EMPTY_RULES[scoring.empty],
        "distances": {"unit": scoring.unit, "tolerance": scoring.tolerance},
        "interval": {"level": LEVEL, "drawn": "patients" if scores.groups(rows) else "cases"},
        "scores": _described(rows, scores),
        "scores_lesion": _described(lesion, scores),
        "by_size": _by_size(lesion, scores),
        "masks": _masks(scores),
        "calibration": describe_calibration(scores.probability),
        "uncertainty": describe_uncertainty(rows, scores.uncertainty, low_dice=scoring.low_dice),
        "components": describe_components(rows, scores.components),
        **summarise_patients(scores.patients),
    }


def _described(rows: Sequence[CaseScore], scores: ClassScores) -> Summary:
    """Describe every metric that is known for a case."""
    groups = scores.groups(rows)
    values = {key: [getattr(row, key) for row in rows] for key in METRICS}
    return {
        key: describe_values(of_key, groups)
        for key, of_key in values.items()
        if any(value is not None for value in of_key)
    }


def describe_values(
    values: Sequence[float | None], groups: Sequence[str] | None = None
) -> dict[str, float | int | None]:
    """Describe values for JSON: None (null) stands for NaN; ``number`` of the values are known."""
    found = describe([math.nan if value is None else value for value in values], groups)
    known = {key: metrics.none_for_nan(value) for key, value in found._asdict().items()}
    return {"number": known.pop("number"), "of": len(values), **known}


def _by_size(lesion: Sequence[CaseScore], scores: ClassScores) -> list[Summary]:
    """Describe the thirds of the cases with a lesion, from the smallest lesions to the largest."""
    ordered = sorted(lesion, key=lambda row: (row.size or 0, row.name))
    if len(ordered) < 2 * len(SIZES):
        return []
    ends = [round(len(ordered) * part / len(SIZES)) for part in range(len(SIZES) + 1)]
    thirds = [ordered[start:end] for start, end in pairwise(ends)]
    return [
        {
            "size": name,
            "smallest": third[0].size,
            "largest": third[-1].size,
            **{
                key: describe_values([getattr(row, key) for row in third], scores.groups(third))
                for key in ("dice", "iou", "hd95", "surface_dice")
            },
        }
        for name, third in zip(SIZES, thirds, strict=True)
    ]


def _masks(scores: ClassScores) -> Summary:
    """Average each kind of mask over the cases with a lesion; all members are one kind."""
    pooled: dict[str, list[MaskScore]] = {}
    for row, masks in zip(scores.rows, scores.masks, strict=True):
        for name, score in masks.items() if not row.empty_truth else ():
            pooled.setdefault("member" if name.startswith("member ") else name, []).append(score)
    return {
        name: {
            **{
                key: mean_of([getattr(score, key) for score in of_kind])
                for key in MaskScore._fields
            },
            "hd95_number": sum(score.hd95 is not None for score in of_kind),
            "of": len(of_kind),
        }
        for name, of_kind in pooled.items()
    }


def noted(folder: Path) -> Summary:
    """Read seconds per case, settings, and members of a case, from the records of sampling."""
    hint = "The scores do not need it; sampling into this folder makes it anew."
    try:
        table = read_table(folder / PREDICTIONS, needs=["fingerprint"], hint=hint)
    except UserError as error:
        return {"seconds_per_case": None, "settings": 0, "record": str(error)}
    rows = table.rows if table else []
    if parts := record_parts(folder):
        last = {row.get("name"): row for row in (*rows, *rows_of(parts))}
        rows = [row for row in last.values() if row["fingerprint"] != UNFINISHED]
    seconds = [number for row in rows if math.isfinite(number := _seconds(row))]
    return {
        "seconds_per_case": mean_of(seconds),
        "settings": len({row["fingerprint"] for row in rows}),
        "drawn_members": max((_members(row) for row in rows), default=0),
    }


def _members(row: dict[str, str]) -> int:
    """The number of members in a row of ``predictions.csv``; 0 where there is none."""
    text = row.get("members", "")
    return int(text) if text.isdecimal() else 0


def _seconds(row: dict[str, str]) -> float:
    """The seconds in a row of ``predictions.csv``; NaN where there are none."""
    try:
        return float(row.get("seconds") or math.nan)
    except ValueError:
        return math.nan


def summary_text(summary: Summary) -> str:
    """Format a summary for printing: the published code's two lines, then the table."""
    mean = ", mean of classes" if "classes" in summary else ""
    rows = {f"Dice{mean}": "dice", f"IoU{mean}": "iou", "Dice of single members": "dice_member"}
    with_lesion = summary["cases"] - summary["empty_truth"]
    lines = [
        _line(label, summary[key], summary[f"{key}_lesion"])
        for label, key in rows.items()
        if summary.get(key) is not None
    ]
    lines += [
        _line(f"{label} of {name}", scores[key], scores[f"{key}_lesion"])
        for label, key in (("Dice", "dice"), ("IoU", "iou"))
        for name, scores in summary.get("classes", {}).items()
    ]
    return "\n".join(
        [
            f"iou is {summary['parent_iou']!r}",
            f"dice is {summary['parent_dice']!r}",
            "(iou, dice: as the published code computes them, of every mask resized to 256 x 256)",
            "",
            "Dice and IoU of the masks at their own size, thresholded at 0.5:",
            f"{'':<24}{'all cases':>10}{'with lesion':>14}",
            *lines,
            *_distance_lines(summary),
            *_patient_lines(summary),
            f"{'cases':<24}{summary['cases']:>10}{with_lesion:>14}",
            f"{'seconds per case':<24}{_number(summary['seconds_per_case'], 2):>10}",
            "",
            *_confidence_lines(summary),
            *_distance_notes(summary),
            *_rater_notes(summary),
            *_member_notes(summary),
            f"empty truths {summary['empty_truth']}, empty predictions "
            f"{summary['empty_prediction']}, both {summary['empty_both']}",
            f"empty masks: {summary['empty_rule']}",
            *_settings_warning(summary),
            *(f"left out: {text}" for text in summary["unfinished"]),
        ]
    )


def _distance_lines(summary: Summary) -> list[str]:
    """Distances and agreement with raters of one class; of several in ``summary.json`` only."""
    unit, tolerance = (summary["distances"][key] for key in ("unit", "tolerance"))
    labels = {
        "hd95": f"HD95, {unit}",
        "surface_dice": f"surface Dice, {tolerance:g} {unit}",
        "energy_distance": "GED to the raters",
        "dice_best": "best member, raters",
    }
    return [
        _line(label, _mean(summary, "scores", key), _mean(summary, "scores_lesion", key))
        for key, label in labels.items()
        if _mean(summary, "scores", key) is not None
    ]


def _distance_notes(summary: Summary) -> list[str]:
    """Of how many cases the mean HD95 is, where some have none."""
    everywhere, lesion = (summary.get(g, {}).get("hd95") for g in ("scores", "scores_lesion"))
    if not everywhere or everywhere["number"] == everywhere["of"]:
        return []
    found, of = (lesion[name] if lesion else 0 for name in ("number", "of"))
    return [
        f"HD95 is the mean of {everywhere['number']} of {everywhere['of']} cases, {found} of {of} "
        "with lesion: it is undefined where a mask is empty"
    ]


def _rater_notes(summary: Summary) -> list[str]:
    """What the truth is, where cases have several raters."""
    voted = summary.get("majority_of")
    return [f"truth: what half of the raters or more mark, of up to {voted}"] if voted else []


def _member_notes(summary: Summary) -> list[str]:
    """What is left out for cases whose members were drawn and not kept."""
    count = summary["without_members"]
    if not count or summary.get("drawn_members", 0) < 2:
        return []
    return [
        f"{counted(count, 'case')} without files of the single masks (--save_members False): only "
        "the fused mask is scored; Dice and spread of single masks, other rules of fusion and "
        "components are left out"
    ]


def _mean(summary: Summary, group: str, key: str) -> float | None:
    mean = summary.get(group, {}).get(key, {}).get("mean")
    return None if mean is None else float(mean)


def _confidence_lines(summary: Summary) -> list[str]:
    """The interval of the mean Dice, and the quality of probability and uncertainty."""
    dice = summary.get("scores_lesion", {}).get("dice")
    if not dice or dice["low"] is None:
        return []
    drawn = summary["interval"]["drawn"]
    lines = [
        f"Dice with lesion {_number(dice['mean'])}: 95 % interval {_number(dice['low'])} to "
        f"{_number(dice['high'])} (over {drawn}), median {_number(dice['median'])}"
    ]
    calibration, uncertainty = summary["calibration"], summary["uncertainty"]
    lines.append(
        f"calibration error {_number(calibration['error'])}, NLL {_number(calibration['nll'])}, "
        f"Brier score {_number(calibration['brier'])}"
    )
    if uncertainty["spread_skill"] is not None:
        ratio = _number(uncertainty["spread_skill"], 2)
        lines.append(f"spread/skill {ratio}: members are calibrated at 1, too alike below")
    if uncertainty["auroc"] is not None:
        lines.append(
            f"uncertainty finds Dice < {uncertainty['low_dice']:g} with AUROC "
            f"{_number(uncertainty['auroc'], 3)}"
        )
    return lines + _hand_over_lines(uncertainty["risk_coverage"])


def _hand_over_lines(curve: Summary | None) -> list[str]:
    """How many of the most uncertain cases to hand over for the rest to be better than all are."""
    shares = {entry["dice"]: entry["share"] for entry in curve["hand_over"]} if curve else {}
    parts = [f"{100 * share:.0f} % for {dice:g}" for dice, share in shares.items() if share]
    return [f"cases to hand over for a mean Dice of the rest: {', '.join(parts)}"] if parts else []


def _settings_warning(summary: Summary) -> list[str]:
    if summary.get("record"):
        return [f"warning: {summary['record']}"]
    if summary["settings"] < 2:
        return []
    return [
        f"warning: these masks were sampled with {summary['settings']} different settings "
        "(weights, sampler, steps, seed); see the column fingerprint in predictions.csv"
    ]


def _line(label: str, everywhere: float | None, lesion: float | None) -> str:
    """One line of the table: a mean over all cases, and over those with a lesion."""
    return f"{label:<24}{_number(everywhere):>10}{_number(lesion):>14}"


def _patient_lines(summary: Summary) -> list[str]:
    """The line on patients, where there are any."""
    if not summary.get("patients"):
        return []
    label = f"Dice of {summary['patients']} patient{'s' * (summary['patients'] != 1)}"
    return [f"{label:<24}{_number(summary['dice_patient']):>10}"]


def _number(value: float | int | str | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "-"
