"""Comparison of two scored folders on the same cases: which is better, by how much, how surely.

Rows are paired by case (and class), and every metric is compared by its mean difference with a
confidence interval and Wilcoxon's signed-rank test. ``comparison.json`` is written into the second
folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError
from guided_diffusion.scoring.case_scores import CaseScore
from guided_diffusion.scoring.evaluate import Evaluation
from guided_diffusion.scoring.intervals import compare
from guided_diffusion.scoring.metrics import none_for_nan
from guided_diffusion.scoring.tables import write_text

Comparison = dict[str, Any]
COMPARED_METRICS = ("dice", "iou", "precision", "sensitivity", "hd95", "assd", "surface_dice")
EXTREMES = 5


def compare_folders(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two scored folders, write ``comparison.json`` into the second, and return it.

    Differences are the second's score less the first's. Where all cases have patients, interval and
    test are over patients.

    Raises:
        UserError: the folders have different cases or classes.
    """
    one, two = _rows(first), _rows(second)
    if one.keys() != two.keys():
        raise _unpaired(first, second, one.keys(), two.keys())
    keys = sorted(one)
    patients = {
        case[0].name: case[0].truth.patient for case in first.cases if case[0].truth.patient
    }
    groups = [patients[name] for name, _ in keys] if len(patients) == len(first.cases) else None
    unit = {"hd95": first.scoring.unit, "assd": first.scoring.unit}

    found: Comparison = {
        "first": str(first.folder),
        "second": str(second.folder),
        "cases": len(keys),
        "units": "patients" if groups else "cases",
        "measures": {},
    }
    for key in COMPARED_METRICS:
        before, after = ([_value(rows[case], key) for case in keys] for rows in (one, two))
        paired = compare(before, after, groups)
        found["measures"][key] = {
            **{name: none_for_nan(value) for name, value in paired._asdict().items()},
            "unit": unit.get(key, ""),
        }
    found["worst"], found["best"] = _extremes(one, two)
    write_text(second.folder / "comparison.json", json.dumps(found, indent=2) + "\n")
    return found


def _rows(evaluation: Evaluation) -> dict[tuple[str, str], CaseScore]:
    return {
        (row.name, of_class): row
        for of_class, scores in evaluation.scores.items()
        for row in scores.rows
    }


def _value(row: CaseScore, key: str) -> float:
    value = getattr(row, key)
    return math.nan if value is None else float(value)


def _extremes(
    one: Mapping[tuple[str, str], CaseScore], two: Mapping[tuple[str, str], CaseScore]
) -> tuple[list[Comparison], list[Comparison]]:
    """The cases whose Dice fell and rose most, the largest changes first."""
    change = {case: _value(two[case], "dice") - _value(one[case], "dice") for case in one}
    order = sorted((c for c in one if not math.isnan(change[c])), key=lambda c: (change[c], c))

    def row(case: tuple[str, str]) -> Comparison:
        of_class = {"class": case[1]} if case[1] else {}
        return {
            "name": case[0],
            **of_class,
            "first": one[case].dice,
            "second": two[case].dice,
            "difference": change[case],
        }

    worst = [row(case) for case in order[:EXTREMES] if change[case] < 0]
    best = [row(case) for case in order[::-1][:EXTREMES] if change[case] > 0]
    return worst, best


def _unpaired(
    first: Evaluation,
    second: Evaluation,
    one: Iterable[tuple[str, str]],
    two: Iterable[tuple[str, str]],
) -> UserError:
    only_one, only_two = sorted(set(one) - set(two)), sorted(set(two) - set(one))
    place, names = (first.folder, only_one) if only_one else (second.folder, only_two)
    shown = ", ".join(" ".join(name).strip() for name in names[:10])
    return UserError(
        "--compare",
        f"{first.folder} and {second.folder} differ in their cases or classes: "
        f"{counted(len(names), 'case')} only in {place} ({shown})",
        "Sample the missing cases, or pass an --out_pth without their truths.",
    )


def comparison_text(found: Comparison) -> str:
    """Format a comparison as the table to print."""
    most = max(paired["units"] for paired in found["measures"].values())
    head = f"{'second less first':<24}{'difference':>11}{'95 % interval':>22}{'p':>9}"
    lines = [head + f"{'higher':>8}{'lower':>7}"]
    for key, paired in found["measures"].items():
        if paired["difference"] is not None:
            label = f"{key.replace('_', ' ')}{', ' if paired['unit'] else ''}{paired['unit']}"
            known = paired["low"] is not None
            span = f"{paired['low']:+.4f} to {paired['high']:+.4f}" if known else "-"
            lines.append(
                f"{label:<24}{paired['difference']:>+11.4f}{span:>22}{paired['p_value']:>9.2g}"
                f"{paired['higher']:>8}{paired['lower']:>7}"
                + (f"   {paired['units']} of {most}" if paired["units"] < most else "")
            )
    return "\n".join(
        [
            f"first   {found['first']}",
            f"second  {found['second']}",
            f"{found['cases']} pairs; intervals by BCa bootstrap and Wilcoxon's signed-rank test "
            f"over {found['units']}",
            "",
            *lines,
            *_names_text("worst in the second", found["worst"]),
            *_names_text("best in the second", found["best"]),
        ]
    )


def _names_text(title: str, rows: Iterable[Comparison]) -> list[str]:
    lines = [
        f"  {row['name']} {row.get('class', '')}".rstrip()
        + f"  Dice {row['first']:.4f} -> {row['second']:.4f}"
        for row in rows
    ]
    return ["", f"{title}:", *lines] if lines else []
