"""``report.html``: a scored folder as one self-contained page, without network or framework.

The page is the template ``report.html`` beside this file, filled with tables, charts and the layers
of the cases. All values are those of ``scores.csv``. Of very many cases only some are pictured, so
that the file stays small.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.data.folders import counted
from guided_diffusion.report.charts import figures
from guided_diffusion.report.tables import (
    case_table_head,
    case_table_row,
    class_choice,
    class_tables,
    headline,
    parts_of,
)
from guided_diffusion.report.thumbnails import MOST_PICTURES, Layers, case_layers
from guided_diffusion.scoring.case_scores import CaseScore, load_case
from guided_diffusion.scoring.evaluate import Evaluation
from guided_diffusion.scoring.predictions import Reader
from guided_diffusion.scoring.tables import write_text

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(
    evaluation: Evaluation,
    run: Mapping[str, str],
    layers: Mapping[str, Sequence[Layers]] | None = None,
) -> Path:
    """Write ``report.html`` into the scored folder and return its path.

    Args:
        evaluation: the scored folder.
        run: what was run: labels and texts, in the order in which the page shows them.
        layers: those of cases by name, collected while scoring; other cases are read again.

    Raises:
        UserError: the file cannot be written.
    """
    path = evaluation.folder / "report.html"
    write_text(path, page(evaluation, run, layers))
    return path


def page(
    evaluation: Evaluation,
    run: Mapping[str, str],
    layers: Mapping[str, Sequence[Layers]] | None = None,
) -> str:
    """Format the whole page as text; the arguments are those of :func:`write_report`."""
    rows = _rows(evaluation)
    parts = {
        "title": escape(evaluation.folder.resolve().name or "results"),
        "subtitle": escape(_subtitle(evaluation)),
        "headline": headline(evaluation),
        "tables": "".join(class_tables(name, part) for name, part in parts_of(evaluation)),
        "figures": "".join(
            figures(name, part, evaluation.scores[name].rows) for name, part in parts_of(evaluation)
        ),
        "head": case_table_head(evaluation),
        "body": "".join(case_table_row(index, name, row) for index, (name, row) in enumerate(rows)),
        "classes": class_choice(evaluation),
        "run": _definitions(run),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in _notes(evaluation)),
        "data": _data(evaluation, rows, layers or {}),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"<!--\{(\w+)\}-->", lambda match: parts[match[1]], template)


def _rows(evaluation: Evaluation) -> list[tuple[str, CaseScore]]:
    """List every row of ``scores.csv`` with its class, the classes of a case in succession."""
    by_class = [[(name, row) for row in scores.rows] for name, scores in evaluation.scores.items()]
    return [pair for pairs in zip(*by_class, strict=True) for pair in pairs]


def _subtitle(evaluation: Evaluation) -> str:
    summary = evaluation.summary
    parts = [counted(summary["cases"], "case")]
    if summary.get("patients"):
        parts.append(counted(summary["patients"], "patient"))
    if evaluation.classes:
        parts.append(f"classes {', '.join(evaluation.classes.names)}")
    lesion = summary["cases"] - summary["empty_truth"]
    if lesion < summary["cases"]:
        parts.append(f"{lesion} with a lesion")
    members = {row.members for scores in evaluation.scores.values() for row in scores.rows}
    if members != {0}:
        least, most = min(members), max(members)
        span = f"{least} to " if least < most else ""
        parts.append(f"{span}{counted(most, 'member')} each")
    return " · ".join(parts)


def _data(
    evaluation: Evaluation,
    rows: Sequence[tuple[str, CaseScore]],
    collected: Mapping[str, Sequence[Layers]],
) -> str:
    """Format the data of the page's script as JSON that no case's name can terminate."""
    pictured = set(choose_pictured([row.dice for _, row in rows]))
    drawn = _complete(collected, evaluation, {rows[index][1].name for index in pictured})
    names = list(evaluation.scores)
    entries: list[dict[str, Any]] = []
    for index, (name, row) in enumerate(rows):
        entry: dict[str, Any] = {"name": row.name, "class": name, "dice": row.dice}
        entry["lesion"] = not row.empty_truth
        if index in pictured:
            entry |= drawn[row.name][names.index(name)]._asdict()
        entry["links"] = _links(evaluation.folder, row.name)
        entries.append(entry)
    text = json.dumps({"cases": entries}, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _complete(
    collected: Mapping[str, Sequence[Layers]], evaluation: Evaluation, names: Collection[str]
) -> dict[str, Sequence[Layers]]:
    """The layers of the named cases: those collected, and the others from their files."""
    drawn = dict(collected)
    read, volume = Reader(), ""
    for case in evaluation.cases:
        name = case[0].name
        if name in names and name not in drawn:
            if case[0].truth.volume != volume:
                read, volume = Reader(), case[0].truth.volume
            masks = load_case(case, evaluation.classes, read, fuse=False)
            drawn[name] = case_layers(case[0], masks, evaluation.folder)
    return drawn


def choose_pictured(dice: Sequence[float | None], most: int = MOST_PICTURES) -> list[int]:
    """Choose the cases with a picture: all, or the worst, the best and an even spread between.

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


def _links(folder: Path, name: str) -> dict[str, str]:
    """The full-size pictures beside the report, by label."""
    kinds = {"overlay": "overlay", "mask": "mask", "soft mask": "output_ens"}
    files = {label: f"{name}_{kind}.png" for label, kind in kinds.items()}
    return {label: file for label, file in files.items() if (folder / file).exists()}


def _definitions(run: Mapping[str, str]) -> str:
    return "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in run.items() if text
    )


def _notes(evaluation: Evaluation) -> list[str]:
    """The notes on how to read the numbers."""
    summary = evaluation.summary
    unit, tolerance = summary["distances"]["unit"], summary["distances"]["tolerance"]
    known = "from the headers" if unit == "mm" else "no header gives a spacing"
    return [
        f"Empty masks: {summary['empty_rule']}.",
        f"Masks are thresholded at {summary['threshold']:g}, at the size of the truth.",
        f"Distances are in {unit} ({known}). HD95 is the larger of the two directed 95th "
        "percentiles, ASSD the mean over both surfaces; both are undefined, and left out, where a "
        f"mask is empty. Surface Dice has a tolerance of {tolerance:g} {unit}.",
        "Intervals are 95 % confidence intervals of the mean, by bias-corrected and accelerated "
        f"bootstrap over {summary['interval']['drawn']}.",
        "The uncertainty of a case is 1 less the mean Dice of two members, or of two masks drawn "
        "from the fused probability where there are no members.",
        "Spread / skill is the mean 1 less Dice of two members over that of a member with the "
        "truth: 1 where the truth is like one more member, less where members are too alike.",
        "A component is a true one if half of its pixels or more lie in the truth.",
    ]
