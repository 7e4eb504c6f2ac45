"""The tables of a report as HTML: key figures, scores, masks of the ensemble, lesion sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

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
            cells.append(figure_cell(number(dice["mean"]), label, range_text(dice)))
    part = parts_of(evaluation)[0][1]
    for key in ("iou", "hd95", "surface_dice") if "classes" not in summary else ():
        found = part["scores_lesion"].get(key)
        if found and found["mean"] is not None:
            digits = 1 if key == "hd95" else 3
            label = label_of(key, summary["distances"], METRIC_LABELS)
            note = ", ".join(filter(None, (range_text(found, digits), _left_out(found))))
            cells.append(figure_cell(number(found["mean"], digits), label, note))
    if "classes" not in summary:
        error, uncertainty = part["calibration"]["error"], part["uncertainty"]
        cells.append(figure_cell(number(error), "Calibration error", "expected, all pixels"))
        if uncertainty["auroc"] is not None:
            note = f"uncertainty, Dice < {uncertainty['low_dice']:g}"
            cells.append(figure_cell(number(uncertainty["auroc"], 2), "AUROC", note))
    return "".join(cells)


def class_tables(name: str, part: Summary) -> str:
    """Format all tables of one class."""
    of_class = f" of {escape(name)}" if name else ""
    return (
        table(
            f"Scores{of_class}, cases with a lesion",
            ("", "mean", "95 % interval", "median", "SD", "cases", "all cases"),
            _score_rows(part),
            wide=True,
        )
        + table(
            f"Masks of the ensemble{of_class}, cases with a lesion",
            (
                *("", "Dice", "IoU", "Sensitivity"),
                *(label_of("hd95", part["distances"], METRIC_LABELS), "with HD95"),
            ),
            _mask_rows(part),
        )
        + table(
            f"Probability and uncertainty{of_class}",
            ("", "value", "of"),
            _confidence_rows(part),
        )
        + table(
            f"By size of the lesion{of_class}",
            ("", "area", "cases", "Dice", "95 % interval"),
            _size_rows(part),
            wide=True,
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
                    label_of(key, part["distances"], METRIC_LABELS),
                    number(of_lesion["mean"], digits),
                    range_text(of_lesion, digits),
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
            range_text(third["dice"], 4),
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


def figure_cell(value: str, label: str, note: str) -> str:
    """Format a key figure with its label and a note."""
    return (
        f'<div class="figure-cell"><dt>{escape(label)}</dt><dd>{value}</dd>'
        f"<dd>{escape(note)}</dd></div>"
    )


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False
) -> str:
    """Format a table, ``wide`` for the whole width of the page; empty without rows.

    On narrow pages every value is below its heading.
    """
    body = [
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f'<td data-label="{escape(label)}">{escape(cell)}</td>'
            for label, cell in zip(head[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    of_width = ' class="wide"' if wide else ""
    return (
        f"<table{of_width}><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def label_of(key: str, distances: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The name of a metric, with its unit where it is a distance."""
    unit, tolerance = distances["unit"], distances["tolerance"]
    if key in ("hd95", "assd"):
        return f"{labels[key]}, {unit}"
    return f"{labels[key]}, {tolerance:g} {unit}" if key == "surface_dice" else labels[key]


def range_text(described: Mapping[str, Any], digits: int = 3, *, signed: bool = False) -> str:
    """'0.812 to 0.874', an interval; empty where it is unknown."""
    if described["low"] is None:
        return ""
    low, high = (number(described[end], digits, signed=signed) for end in ("low", "high"))
    return f"{low} to {high}"


def _left_out(described: Mapping[str, Any]) -> str:
    """'3 of 4 cases' where a score is not known for all; else empty."""
    some = described["number"] < described["of"]
    return f"{described['number']} of {described['of']} cases" if some else ""


def _in_brackets(described: Mapping[str, Any]) -> str:
    text = _left_out(described)
    return f" ({text})" if text else ""


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """Format a number, ``signed`` with a plus as well; None becomes a dash."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")
