"""The tables of the report as HTML: scores, masks of the ensemble, lesion sizes, and the cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from guided_diffusion.scoring.case_scores import CaseScore
from guided_diffusion.scoring.evaluate import Evaluation
from guided_diffusion.scoring.summary import Summary

METRIC_LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "hd95": "HD95",
    "assd": "ASSD",
    "surface_dice": "Surface Dice",
    "volume_difference": "Volume difference",
    "dice_between": "Dice between members",
    "energy_distance": "Energy distance to raters",
    "dice_best": "Best member, Dice to raters",
}
COLUMNS = ("dice", "iou", "precision", "sensitivity", "hd95", "surface_dice", "uncertainty")
SHORT = {**METRIC_LABELS, "surface_dice": "Surface", "uncertainty": "Uncertainty"}
MASKS = {
    "fused": "Fused, as stored",
    "member": "Single members",
    "mean": "Fused by mean",
    "vote": "Fused by vote",
    "staple": "Fused by STAPLE",
    "squared_mean": "Fused by squared mean",
    "expected_dice": "Fused by expected Dice",
}


def parts_of(evaluation: Evaluation) -> list[tuple[str, Summary]]:
    """The summary of each class with its name, which is empty for an only class."""
    summary = evaluation.summary
    return list(summary["classes"].items()) if "classes" in summary else [("", summary)]


def headline(evaluation: Evaluation) -> str:
    """Format the key figures: the Dice of every class, and more where there is only one."""
    summary = evaluation.summary
    cells = []
    for name, part in parts_of(evaluation):
        dice = part["scores_lesion"].get("dice")
        if dice and dice["mean"] is not None:
            label = f"Dice of {name}" if name else "Dice"
            cells.append(_figure_cell(number(dice["mean"]), label, _range(dice)))
    part = parts_of(evaluation)[0][1]
    for key in ("iou", "hd95", "surface_dice") if "classes" not in summary else ():
        found = part["scores_lesion"].get(key)
        if found and found["mean"] is not None:
            digits = 1 if key == "hd95" else 3
            label = _label(key, summary["distances"], METRIC_LABELS)
            note = ", ".join(filter(None, (_range(found, digits), _left_out(found))))
            cells.append(_figure_cell(number(found["mean"], digits), label, note))
    if "classes" not in summary:
        error, uncertainty = part["calibration"]["error"], part["uncertainty"]
        cells.append(_figure_cell(number(error), "Calibration error", "expected, all pixels"))
        if uncertainty["auroc"] is not None:
            note = f"uncertainty, Dice < {uncertainty['low_dice']:g}"
            cells.append(_figure_cell(number(uncertainty["auroc"], 2), "AUROC", note))
    return "".join(cells)


def class_tables(name: str, part: Summary) -> str:
    """Format all tables of one class."""
    of_class = f" of {escape(name)}" if name else ""
    return (
        _table(
            f"Scores{of_class}, cases with a lesion",
            ("", "mean", "95 % interval", "median", "SD", "cases", "all cases"),
            _score_rows(part),
        )
        + _table(
            f"Masks of the ensemble{of_class}, cases with a lesion",
            (
                *("", "Dice", "IoU", "Sensitivity"),
                *(_label("hd95", part["distances"], METRIC_LABELS), "with HD95"),
            ),
            _mask_rows(part),
        )
        + _table(
            f"By size of the lesion{of_class}",
            ("", "area", "cases", "Dice", "95 % interval"),
            _size_rows(part),
        )
        + _table(
            f"Probability and uncertainty{of_class}",
            ("", "value", "of"),
            _confidence_rows(part),
        )
    )


def _score_rows(part: Summary) -> list[list[str]]:
    everywhere, lesion = part["scores"], part["scores_lesion"]
    rows = []
    for key in METRIC_LABELS:
        if key in everywhere and key in lesion and lesion[key]["mean"] is not None:
            digits = 2 if key in ("hd95", "assd") else 4
            of_lesion = lesion[key]
            rows.append(
                [
                    _label(key, part["distances"], METRIC_LABELS),
                    number(of_lesion["mean"], digits),
                    _range(of_lesion, digits),
                    number(of_lesion["median"], digits),
                    number(of_lesion["sd"], digits),
                    _left_out(of_lesion) or str(of_lesion["number"]),
                    f"{number(everywhere[key]['mean'], digits)}{_in_brackets(everywhere[key])}",
                ]
            )
    return rows


def _mask_rows(part: Summary) -> list[list[str]]:
    found, digits = part["masks"], {"dice": 4, "iou": 4, "sensitivity": 4, "hd95": 2}
    return [
        [
            label,
            *(number(found[kind][key], places) for key, places in digits.items()),
            f"{found[kind]['hd95_number']} of {found[kind]['of']}",
        ]
        for kind, label in MASKS.items()
        if kind in found and len(found) > 1
    ]


def _size_rows(part: Summary) -> list[list[str]]:
    unit = part["distances"]["unit"]
    return [
        [
            third["size"],
            f"{third['smallest']:,.0f} to {third['largest']:,.0f} {unit}²",
            str(third["dice"]["number"]),
            number(third["dice"]["mean"], 4),
            _range(third["dice"], 4),
        ]
        for third in part["by_size"]
    ]


def _confidence_rows(part: Summary) -> list[list[str]]:
    calibration, uncertainty = part["calibration"], part["uncertainty"]
    curve, components = uncertainty["risk_coverage"] or {}, part["components"]
    ratio = f"members, {number(uncertainty['spread'])} / {number(uncertainty['member_error'])}"
    rows = [
        ("Calibration error", calibration["error"], 4, "fused mask, all pixels"),
        ("Calibration error, region", calibration["error_region"], 4, "pixels above 0"),
        ("Negative log-likelihood, nats", calibration["nll"], 4, "fused mask, all pixels"),
        ("Brier score", calibration["brier"], 4, "fused mask, all pixels"),
        ("Spread / skill, 1 is calibrated", uncertainty["spread_skill"], 2, ratio),
        ("Area under risk and coverage", curve.get("area"), 4, "cases, 1 less Dice"),
        ("Area above the best order", curve.get("excess"), 4, "cases, 1 less Dice"),
        (
            "Components, AUROC of member shares",
            components["auroc"],
            2,
            f"{components['true']} of {components['number']} true",
        ),
    ]
    found = [
        [label, number(value, digits), of] for label, value, digits, of in rows if value is not None
    ]
    for entry in curve.get("hand_over", ()):
        share = "not reached" if entry["share"] is None else f"{100 * entry['share']:.0f} %"
        found.append([f"To hand over for Dice {entry['dice']:g}", share, "cases"])
    return found


def case_table_head(evaluation: Evaluation) -> str:
    """Format the head of the table of cases."""
    labels = ["Case", *(["Class"] if evaluation.classes else [])]
    labels += [_label(key, evaluation.summary["distances"], SHORT) for key in COLUMNS]
    keys = ["name", *(["class"] if evaluation.classes else []), *COLUMNS]
    return "".join(
        f'<th scope="col" data-key="{key}" aria-sort="none">'
        f'<button type="button">{escape(label)}</button></th>'
        for key, label in zip(keys, labels, strict=True)
    )


def case_table_row(index: int, name: str, row: CaseScore) -> str:
    """Format the row of one case; the cells hold the full values of ``scores.csv``."""
    values = [getattr(row, key) for key in COLUMNS]
    cells = "".join(
        f'<td data-key="{key}" data-value="{"" if value is None else value}">'
        f"{number(value, 1 if key == 'hd95' else 3)}</td>"
        for key, value in zip(COLUMNS, values, strict=True)
    )
    of_class = f'<td data-key="class" data-value="{escape(name)}">{escape(name)}</td>'
    return (
        f'<tr data-index="{index}" tabindex="-1"><th scope="row" data-key="name" '
        f'data-value="{escape(row.name)}">{escape(row.name)}</th>'
        f"{of_class if name else ''}{cells}</tr>"
    )


def class_choice(evaluation: Evaluation) -> str:
    """Format the control that chooses a class; empty where there is only one."""
    if not evaluation.classes:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in evaluation.classes.names)
    return (
        f'<label>Class <select id="class"><option value="">all</option>{options}</select></label>'
    )


def _figure_cell(value: str, label: str, note: str) -> str:
    return (
        f'<div class="figure-cell"><dt>{escape(label)}</dt><dd>{value}</dd>'
        f"<dd>{escape(note)}</dd></div>"
    )


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    ]
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _label(key: str, distances: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The name of a metric, with its unit where it is a distance."""
    unit, tolerance = distances["unit"], distances["tolerance"]
    if key in ("hd95", "assd"):
        return f"{labels[key]}, {unit}"
    return f"{labels[key]}, {tolerance:g} {unit}" if key == "surface_dice" else labels[key]


def _range(described: Mapping[str, Any], digits: int = 3) -> str:
    if described["low"] is None:
        return ""
    return f"{number(described['low'], digits)} to {number(described['high'], digits)}"


def _left_out(described: Mapping[str, Any]) -> str:
    """'3 of 4 cases' where a score is not known for all; else empty."""
    some = described["number"] < described["of"]
    return f"{described['number']} of {described['of']} cases" if some else ""


def _in_brackets(described: Mapping[str, Any]) -> str:
    text = _left_out(described)
    return f" ({text})" if text else ""


def number(value: float | None, digits: int = 3) -> str:
    """Format a number; None becomes a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
