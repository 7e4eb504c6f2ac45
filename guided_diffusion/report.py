"""``report.html``: a scored folder as one page that opens anywhere, without network or framework.

The page is the template ``report.html`` beside this file, filled with tables, figures (``charts``)
and the layers of the cases (``thumbnails``). All values are those of ``scores.csv``. Of very many
cases only some are pictured, so that the file stays small. Called by ``runs`` after scoring.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from guided_diffusion.case_scores import CaseFiles, CaseMasks, CaseScore, load_case
from guided_diffusion.errors import UserError
from guided_diffusion.evaluate import Evaluation, write_text
from guided_diffusion.pictures import displayed, image_panel
from guided_diffusion.predictions import Reader
from guided_diffusion.report_figures import figures
from guided_diffusion.summary import Summary
from guided_diffusion.thumbnails import Layers, layers

TEMPLATE = Path(__file__).with_name("report.html")

MOST_PICTURES = 300
"""Cases and classes with embedded pictures: beyond, the worst, the best and an even spread."""

MEASURES = {
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
SHORT = {**MEASURES, "surface_dice": "Surface", "uncertainty": "Uncertainty"}
MASKS = {
    "fused": "Fused, as stored",
    "member": "Single members",
    "mean": "Fused by mean",
    "vote": "Fused by vote",
    "staple": "Fused by STAPLE",
    "squared_mean": "Fused by squared mean",
}


def write_report(evaluation: Evaluation, run: Mapping[str, str]) -> Path:
    """Write ``report.html`` into the scored folder and return its path.

    ``run`` is what was run, as the page shows it: labels and texts in order.

    Raises:
        UserError: the file cannot be written.
    """
    path = evaluation.folder / "report.html"
    write_text(path, page(evaluation, run))
    return path


def page(evaluation: Evaluation, run: Mapping[str, str]) -> str:
    """The whole page as text."""
    rows = _rows(evaluation)
    parts = {
        "title": escape(evaluation.folder.resolve().name or "results"),
        "subtitle": escape(_subtitle(evaluation)),
        "headline": _headline(evaluation),
        "tables": "".join(_tables(name, part) for name, part in _parts(evaluation)),
        "figures": "".join(
            figures(name, part, evaluation.scores[name].rows) for name, part in _parts(evaluation)
        ),
        "head": _table_head(evaluation),
        "body": "".join(_table_row(index, name, row) for index, (name, row) in enumerate(rows)),
        "classes": _class_choice(evaluation),
        "run": _definitions(run),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in _notes(evaluation)),
        "data": _data(evaluation, rows),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"<!--\{(\w+)\}-->", lambda match: parts[match[1]], template)


def _rows(evaluation: Evaluation) -> list[tuple[str, CaseScore]]:
    """Every row of ``scores.csv`` with its class, the classes of a case one after the other."""
    by_class = [[(name, row) for row in scores.rows] for name, scores in evaluation.scores.items()]
    return [pair for pairs in zip(*by_class, strict=True) for pair in pairs]


def _parts(evaluation: Evaluation) -> list[tuple[str, Summary]]:
    """The summary of each class by name; of the only one without."""
    summary = evaluation.summary
    return list(summary["classes"].items()) if "classes" in summary else [("", summary)]


def _subtitle(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    parts = [f"{summary['cases']} cases"]
    if summary.get("patients"):
        parts.append(f"{summary['patients']} patients")
    if evaluation.classes:
        parts.append(f"classes {', '.join(evaluation.classes.names)}")
    lesion = summary["cases"] - summary["empty_truth"]
    if lesion < summary["cases"]:
        parts.append(f"{lesion} with a lesion")
    members = {row.members for scores in evaluation.scores.values() for row in scores.rows}
    if members != {0}:
        span = " to ".join(map(str, sorted({min(members), max(members)})))
        parts.append(f"{span} members each")
    return " · ".join(parts)


# ---------------------------------------------------------------------------------------- numbers


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _label(key: str, evaluation_unit: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The name of a measure, with the unit of what is a distance."""
    unit, tolerance = evaluation_unit["unit"], evaluation_unit["tolerance"]
    if key in ("hd95", "assd"):
        return f"{labels[key]}, {unit}"
    return f"{labels[key]}, {tolerance:g} {unit}" if key == "surface_dice" else labels[key]


def _headline(evaluation: Evaluation) -> str:
    """The few numbers to take away, of the first class or of the only one."""
    summary = evaluation.summary
    cells = []
    for name, part in _parts(evaluation):
        dice = part["scores_lesion"].get("dice")
        if dice and dice["mean"] is not None:
            label = f"Dice of {name}" if name else "Dice"
            cells.append(_figure_cell(number(dice["mean"]), label, _range(dice)))
    part = _parts(evaluation)[0][1]
    for key in ("iou", "hd95", "surface_dice") if "classes" not in summary else ():
        found = part["scores_lesion"].get(key)
        if found and found["mean"] is not None:
            digits = 1 if key == "hd95" else 3
            label = _label(key, summary["distances"], MEASURES)
            cells.append(_figure_cell(number(found["mean"], digits), label, _range(found, digits)))
    if "classes" not in summary:
        error, worth = part["calibration"]["error"], part["uncertainty"]
        cells.append(_figure_cell(number(error), "Calibration error", "expected, all pixels"))
        if worth["auroc"] is not None:
            found_by = f"uncertainty, Dice < {worth['low_dice']:g}"
            cells.append(_figure_cell(number(worth["auroc"], 2), "AUROC", found_by))
    return "".join(cells)


def _figure_cell(value: str, label: str, note: str) -> str:
    return (
        f'<div class="figure-cell"><dt>{escape(label)}</dt><dd>{value}</dd>'
        f"<dd>{escape(note)}</dd></div>"
    )


def _range(described: Mapping[str, Any], digits: int = 3) -> str:
    if described["low"] is None:
        return ""
    return f"{number(described['low'], digits)} to {number(described['high'], digits)}"


# ----------------------------------------------------------------------------------------- tables


def _tables(name: str, part: Summary) -> str:
    """All tables of one class."""
    of_class = f" of {escape(name)}" if name else ""
    return (
        _table(
            f"Scores{of_class}, cases with a lesion",
            ("", "mean", "95 % interval", "median", "SD", "cases", "all cases"),
            _score_rows(part),
        )
        + _table(
            f"Masks of the ensemble{of_class}, cases with a lesion",
            ("", "Dice", "IoU", "Sensitivity", _label("hd95", part["distances"], MEASURES)),
            _mask_rows(part),
        )
        + _table(
            f"By size of the lesion{of_class}",
            ("", "area", "cases", "Dice", "95 % interval"),
            _size_rows(part),
        )
    )


def _score_rows(part: Summary) -> list[list[str]]:
    everywhere, lesion = part["scores"], part["scores_lesion"]
    rows = []
    for key in MEASURES:
        if key in everywhere and key in lesion and lesion[key]["mean"] is not None:
            digits = 2 if key in ("hd95", "assd") else 4
            of_lesion = lesion[key]
            rows.append(
                [
                    _label(key, part["distances"], MEASURES),
                    number(of_lesion["mean"], digits),
                    _range(of_lesion, digits),
                    number(of_lesion["median"], digits),
                    number(of_lesion["sd"], digits),
                    str(of_lesion["number"]),
                    number(everywhere[key]["mean"], digits),
                ]
            )
    return rows


def _mask_rows(part: Summary) -> list[list[str]]:
    found = part["masks"]
    return [
        [
            label,
            number(found[kind]["dice"], 4),
            number(found[kind]["iou"], 4),
            number(found[kind]["sensitivity"], 4),
            number(found[kind]["hd95"], 2),
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


# ------------------------------------------------------------------------------------------ cases


def _table_head(evaluation: Evaluation) -> str:
    labels = ["Case", *(["Class"] if evaluation.classes else [])]
    labels += [_label(key, evaluation.summary["distances"], SHORT) for key in COLUMNS]
    keys = ["name", *(["class"] if evaluation.classes else []), *COLUMNS]
    return "".join(
        f'<th scope="col" data-key="{key}" aria-sort="none">'
        f'<button type="button">{escape(label)}</button></th>'
        for key, label in zip(keys, labels, strict=True)
    )


def _table_row(index: int, name: str, row: CaseScore) -> str:
    """One case; the cells' full values are those of ``scores.csv``."""
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


def _class_choice(evaluation: Evaluation) -> str:
    if not evaluation.classes:
        return ""
    options = "".join(f"<option>{escape(name)}</option>" for name in evaluation.classes.names)
    return (
        f'<label>Class <select id="class"><option value="">all</option>{options}</select></label>'
    )


def _data(evaluation: Evaluation, rows: Sequence[tuple[str, CaseScore]]) -> str:
    """What the page's script needs, as JSON that no case's name can end."""
    pictured = set(chosen([row.dice for _, row in rows]))
    by_case = {case[0].name: case for case in evaluation.cases}
    names = list(evaluation.scores)
    entries: list[dict[str, Any]] = []
    drawn: dict[str, list[Layers]] = {}
    read, volume = Reader(), ""
    for index, (name, row) in enumerate(rows):
        entry: dict[str, Any] = {"name": row.name, "class": name, "dice": row.dice}
        entry["lesion"] = not row.empty_truth
        if index in pictured:
            if row.name not in drawn:
                case = by_case[row.name]
                if case[0].truth.volume != volume:
                    read, volume = Reader(), case[0].truth.volume
                drawn = {row.name: _case_layers(case, evaluation, read)}
            entry |= drawn[row.name][names.index(name)]._asdict()
        entry["links"] = _links(evaluation.folder, row.name)
        entries.append(entry)
    text = json.dumps({"cases": entries}, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def chosen(dice: Sequence[float | None], most: int = MOST_PICTURES) -> list[int]:
    """Which cases get a picture: all, or the worst, the best and an even spread between them.

    Those without a Dice come last.
    """
    values = [math.inf if value is None else value for value in dice]
    order = sorted(range(len(values)), key=values.__getitem__)
    known = len(dice) - values.count(math.inf)
    if known <= most:
        return sorted(order[:most])
    third = most // 3
    middle = np.linspace(third, known - third - 1, most - 2 * third).round().astype(int)
    places = [*range(third), *middle.tolist(), *range(known - third, known)]
    return sorted(order[place] for place in places)


def _case_layers(case: Sequence[CaseFiles], evaluation: Evaluation, read: Reader) -> list[Layers]:
    """The layers of every class of a case."""
    masks = load_case(case, evaluation.classes, read, fuse=False)
    picture = _picture(case[0], masks[0], evaluation.folder)
    return [
        layers(
            picture,
            of_class.truth,
            of_class.found if evaluation.classes else of_class.soft,
            np.sqrt(of_class.soft * (1 - of_class.soft))
            if of_class.spread is None
            else of_class.spread,
        )
        for of_class in masks
    ]


def _picture(case: CaseFiles, masks: CaseMasks, folder: Path) -> NDArray[np.uint8] | None:
    """The image of a case: from the data set, else out of the overlay that sampling drew.

    The report does without where neither can be read.
    """
    height, width = masks.truth.shape
    try:
        if case.truth.image is not None:
            return displayed(case.truth.image())
        with Image.open(folder / f"{case.name}_overlay.png") as drawn:
            return image_panel(np.asarray(drawn.convert("RGB")), (height, width))
    except (UserError, OSError, SyntaxError, ValueError):
        return None


def _links(folder: Path, name: str) -> dict[str, str]:
    """Full pictures beside the report, by what they show."""
    kinds = {"overlay": "overlay", "mask": "mask", "soft mask": "output_ens"}
    files = {label: f"{name}_{kind}.png" for label, kind in kinds.items()}
    return {label: file for label, file in files.items() if (folder / file).exists()}


# ------------------------------------------------------------------------------- what was run


def _definitions(run: Mapping[str, str]) -> str:
    return "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in run.items() if text
    )


def _notes(evaluation: Evaluation) -> list[str]:
    """How to read the numbers."""
    summary = evaluation.summary
    unit, tolerance = summary["distances"]["unit"], summary["distances"]["tolerance"]
    known = "from the headers" if unit == "mm" else "no header gives a spacing"
    return [
        f"Empty masks: {summary['empty_rule']}.",
        f"Masks are cut at {summary['threshold']:g} at the size of the truth.",
        f"Distances are in {unit} ({known}). HD95 is the larger of the two directed 95th "
        "percentiles, ASSD the mean over both surfaces; both are undefined, and left out, where a "
        f"mask is empty. Surface Dice forgives {tolerance:g} {unit}.",
        "Intervals hold the mean with 95 % confidence: bias-corrected and accelerated bootstrap "
        f"over {summary['interval']['drawn']}.",
        "The uncertainty of a case is 1 less the mean Dice of two members, or what the fused mask "
        "alone lets expect.",
    ]
