"""``report.html`` of a scored folder: its scores, how far they can be trusted, and every case.

All values are those of ``scores.csv``. Of very many cases only some have their pictures inside the
page, so that it stays small; the others show the overlays that lie beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.data.folders import counted
from guided_diffusion.report.charts import figures
from guided_diffusion.report.page import (
    REPORT,
    Column,
    Page,
    Section,
    Shown,
    Strip,
    pictures_beside,
    tables_beside,
)
from guided_diffusion.report.tables import (
    METRIC_LABELS,
    class_tables,
    headline,
    label_of,
    number,
    parts_of,
)
from guided_diffusion.report.thumbnails import MOST_PICTURES, Layers, case_layers, overlay_view
from guided_diffusion.report.training_charts import training_section
from guided_diffusion.scoring.case_scores import CaseScore, load_case
from guided_diffusion.scoring.evaluate import Evaluation
from guided_diffusion.scoring.predictions import Reader
from guided_diffusion.scoring.tables import write_text

COLUMNS = ("dice", "iou", "precision", "sensitivity", "hd95", "surface_dice", "uncertainty")
SHORT = {**METRIC_LABELS, "surface_dice": "Surface", "uncertainty": "Uncertainty"}
STRIP = 3
"""Cases in a strip of pictures."""


def write_report(
    evaluation: Evaluation,
    run: Mapping[str, Any],
    layers: Mapping[str, Sequence[Layers]] | None = None,
    *,
    training: Path | None = None,
) -> Path:
    """Write ``report.html`` into the scored folder and return its path.

    Args:
        evaluation: the scored folder.
        run: what was run: labels with texts or settings, in the order in which the page shows them.
        layers: those of cases by name, collected while scoring; other cases are read again.
        training: the ``progress.csv`` of the training; None where it is not known.

    Raises:
        UserError: the file cannot be written.
    """
    path = evaluation.folder / REPORT
    write_text(path, page(evaluation, run, layers, training=training))
    return path


def page(
    evaluation: Evaluation,
    run: Mapping[str, Any],
    layers: Mapping[str, Sequence[Layers]] | None = None,
    *,
    training: Path | None = None,
) -> str:
    """Format the whole page as text; the arguments are those of :func:`write_report`."""
    rows = rows_of(evaluation)
    distances = evaluation.summary["distances"]
    return Page(
        kind="scoring",
        kicker="Segmentation report",
        title=evaluation.folder.resolve().name or "results",
        subtitle=_subtitle(evaluation),
        headline=headline(evaluation),
        before=_sections(evaluation),
        after=training_section(training),
        strips=_strips(rows),
        columns=[
            Column(key, label_of(key, distances, SHORT), 1 if key == "hd95" else 3)
            for key in COLUMNS
        ],
        cases=_cases(evaluation, rows, layers or {}),
        order="dice",
        range="dice",
        classes=evaluation.classes.names if evaluation.classes else (),
        links=tables_beside(evaluation.folder),
        run=run,
        notes=notes(evaluation),
    ).text()


def rows_of(evaluation: Evaluation) -> list[tuple[str, CaseScore]]:
    """List every row of ``scores.csv`` with its class, the classes of a case in succession."""
    by_class = [[(name, row) for row in scores.rows] for name, scores in evaluation.scores.items()]
    return [pair for pairs in zip(*by_class, strict=True) for pair in pairs]


def _sections(evaluation: Evaluation) -> list[Section]:
    tables = "".join(class_tables(name, part) for name, part in parts_of(evaluation))
    parts = parts_of(evaluation)
    drawn = "".join(
        figures(name, part, evaluation.scores[name].rows, first=k, step=len(parts))
        for k, (name, part) in enumerate(parts)
    )
    return [
        ("scores", "Scores", f'<div class="tables">{tables}</div>'),
        ("figures", "Distribution and trust", f'<div class="figures">{drawn}</div>'),
    ]


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


def _strips(rows: Sequence[tuple[str, CaseScore]]) -> list[Strip]:
    """The worst, the median and the best cases with a lesion."""
    known = {
        index: row.dice
        for index, (_, row) in enumerate(rows)
        if row.dice is not None and not row.empty_truth
    }
    if len(known) < STRIP:
        return []
    order = sorted(known, key=known.__getitem__)
    middle = round((len(order) - STRIP) / 2)
    chosen = {
        "Worst": order[:STRIP],
        "Median": order[middle : middle + STRIP],
        "Best": order[-STRIP:][::-1],
    }
    return [
        (heading, [(index, number(known[index])) for index in some])
        for heading, some in chosen.items()
    ]


def _cases(
    evaluation: Evaluation,
    rows: Sequence[tuple[str, CaseScore]],
    collected: Mapping[str, Sequence[Layers]],
) -> list[Shown]:
    views = views_of(evaluation, rows, collected)
    ends = {name: f"_{name}" if name else "" for name in evaluation.scores}
    folder = evaluation.folder
    return [
        Shown(
            name=row.name,
            of_class=name,
            values={key: getattr(row, key) for key in COLUMNS},
            views=[view],
            links=pictures_beside(folder, row.name, end=ends[name]),
        )
        for (name, row), view in zip(rows, views, strict=True)
    ]


def views_of(
    evaluation: Evaluation,
    rows: Sequence[tuple[str, CaseScore]],
    collected: Mapping[str, Sequence[Layers]],
    *,
    chosen: Collection[int] | None = None,
    base: str = "",
) -> list[dict[str, Any]]:
    """The view of every row: layers of the chosen ones, and the overlay beside the page of others.

    Args:
        evaluation: the scored folder.
        rows: its rows, by :func:`rows_of`.
        collected: layers of cases that need not be read again.
        chosen: places of the rows with layers; None for those of :func:`choose_pictured`.
        base: leads from the page to the folder.
    """
    pictured = set(choose_pictured([row.dice for _, row in rows]) if chosen is None else chosen)
    drawn = _complete(collected, evaluation, {rows[index][1].name for index in pictured})
    names = list(evaluation.scores)
    return [
        drawn[row.name][names.index(name)]._asdict()
        if index in pictured
        else overlay_view(evaluation.folder, row.name, base=base)
        for index, (name, row) in enumerate(rows)
    ]


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


def notes(evaluation: Evaluation) -> list[str]:
    """The notes on how to read the numbers of a scored folder."""
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
