"""``comparison.html``: two scored folders on the same cases, pair by pair, the changes first.

All values are those of ``comparison.json`` and of the ``scores.csv`` of both folders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.data.folders import counted
from guided_diffusion.report.charts import (
    Axis,
    Plot,
    bars,
    captioned,
    curve,
    dots,
    figure,
    round_marks,
    upper_axis,
    upright,
)
from guided_diffusion.report.page import (
    COMPARISON,
    Column,
    Page,
    Section,
    Shown,
    Strip,
    pictures_beside,
)
from guided_diffusion.report.report import notes, rows_of, views_of
from guided_diffusion.report.tables import (
    METRIC_LABELS,
    figure_cell,
    label_of,
    number,
    range_text,
    table,
)
from guided_diffusion.report.thumbnails import MOST_PICTURES
from guided_diffusion.scoring.case_scores import CaseScore, mean_of
from guided_diffusion.scoring.compare import Comparison
from guided_diffusion.scoring.evaluate import Evaluation
from guided_diffusion.scoring.tables import write_text

Pair = tuple[str, CaseScore, CaseScore]
STRIP = 3
"""Pairs in a strip of pictures."""


def write_comparison(
    first: Evaluation, second: Evaluation, found: Comparison, run: Mapping[str, Any]
) -> Path:
    """Write ``comparison.html`` into the second folder and return its path.

    Args:
        first: one scored folder.
        second: another one, of the same cases and classes.
        found: what :func:`guided_diffusion.scoring.compare.compare_folders` found.
        run: what was run: labels with texts or settings.

    Raises:
        UserError: the file cannot be written.
    """
    path = second.folder / COMPARISON
    write_text(path, comparison_page(first, second, found, run).text())
    return path


def comparison_page(
    first: Evaluation, second: Evaluation, found: Comparison, run: Mapping[str, Any]
) -> Page:
    """Make the page; the arguments are those of :func:`write_comparison`."""
    pairs = _pairs(first, second)
    unit = f"HD95, {second.summary['distances']['unit']}"
    names = _names(first.folder, second.folder)
    return Page(
        kind="comparison",
        kicker="Comparison of two segmentations",
        title=f"{names[0]} and {names[1]}",
        subtitle=_subtitle(found),
        headline=_headline(found, pairs, names),
        before=[_measures(second, found, pairs, names), *_figures(pairs, names)],
        strips=_strips(pairs),
        columns=[
            Column("change", "Change of Dice", 3, falling=True, by_size=True),
            Column("dice_first", "Dice, first"),
            Column("dice_second", "Dice, second"),
            Column("hd95_first", f"{unit}, first", 1),
            Column("hd95_second", f"{unit}, second", 1),
        ],
        cases=_cases(first, second, pairs, names),
        order="change",
        range="change",
        classes=second.classes.names if second.classes else (),
        links=_links(first.folder, second.folder),
        run=run,
        notes=[
            "A change is the second's Dice less the first's. Cases are in the order of its size, "
            "whatever its sign.",
            "Intervals and p are over "
            f"{found['units']}: bias-corrected and accelerated bootstrap of the mean difference, "
            "and Wilcoxon's signed-rank test.",
            *notes(second)[:3],
        ],
    )


def _pairs(first: Evaluation, second: Evaluation) -> list[Pair]:
    """Every case and class with its scores in both folders, in the order of the second."""
    before = {(row.name, of_class): row for of_class, row in rows_of(first)}
    return [(of_class, before[row.name, of_class], row) for of_class, row in rows_of(second)]


def _change(pair: Pair) -> float | None:
    _, one, two = pair
    return None if one.dice is None or two.dice is None else two.dice - one.dice


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The folders' names, with those of the folders around them where they are alike."""
    one, two = first.resolve(), second.resolve()
    if one.name != two.name:
        return one.name, two.name
    return f"{one.parent.name}/{one.name}", f"{two.parent.name}/{two.name}"


def _subtitle(found: Comparison) -> str:
    dice = found["measures"]["dice"]
    changed = dice["higher"] + dice["lower"]
    return (
        f"{counted(found['cases'], 'pair')} · Dice differs in {changed}, is higher in the second "
        f"in {dice['higher']} and lower in {dice['lower']} ({found['units']})"
    )


def _means(pairs: Sequence[Pair], key: str) -> tuple[float | None, float | None]:
    """The means of a score in both folders, over the pairs in which both are known."""
    values = [(getattr(one, key), getattr(two, key)) for _, one, two in pairs]
    known = [pair for pair in values if None not in pair]
    return mean_of([one for one, _ in known]), mean_of([two for _, two in known])


def _headline(found: Comparison, pairs: Sequence[Pair], names: tuple[str, str]) -> str:
    dice, hd95 = found["measures"]["dice"], found["measures"]["hd95"]
    cells = [
        figure_cell(number(mean), f"Dice, {which}", name)
        for which, mean, name in zip(("first", "second"), _means(pairs, "dice"), names, strict=True)
    ]
    if dice["difference"] is not None:
        note = range_text(dice, signed=True)
        cells.append(figure_cell(number(dice["difference"], signed=True), "Change of Dice", note))
    if dice["p_value"] is not None:
        cells.append(figure_cell(_p(dice["p_value"]), "p of the change", "Wilcoxon, signed ranks"))
    if hd95["difference"] is not None:
        label = f"Change of HD95, {hd95['unit']}"
        note = range_text(hd95, 1, signed=True)
        cells.append(figure_cell(number(hd95["difference"], 1, signed=True), label, note))
    return "".join(cells)


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _measures(
    second: Evaluation, found: Comparison, pairs: Sequence[Pair], names: tuple[str, str]
) -> Section:
    """The table of all metrics."""
    rows = []
    for key, paired in found["measures"].items():
        if paired["difference"] is None:
            continue
        digits = 2 if key in ("hd95", "assd") else 4
        rows.append(
            [
                label_of(key, second.summary["distances"], METRIC_LABELS),
                *(number(mean, digits) for mean in _means(pairs, key)),
                number(paired["difference"], digits, signed=True),
                range_text(paired, digits, signed=True),
                "" if paired["p_value"] is None else _p(paired["p_value"]),
                str(paired["higher"]),
                str(paired["lower"]),
                str(paired["units"]),
            ]
        )
    head = ("", "first", "second", "change", "95 % interval", "p", "higher", "lower")
    shown = table(f"{names[1]} less {names[0]}", (*head, found["units"]), rows, wide=True)
    return "scores", "Scores", f'<div class="tables">{shown}</div>'


def _figures(pairs: Sequence[Pair], names: tuple[str, str]) -> list[Section]:
    """Dice against Dice, and how far it has changed."""
    known = [
        (one.dice, two.dice, two.name + f" {of_class}".rstrip(), place)
        for place, (of_class, one, two) in enumerate(pairs)
        if one.dice is not None and two.dice is not None
    ]
    if not known:
        return []
    before, after, labels, places = (list(column) for column in zip(*known, strict=True))
    ends = upper_axis("", [*before, *after])
    frame = Plot(
        "Dice against Dice",
        ends._replace(label=f"Dice, {names[0]}"),
        ends._replace(label=f"Dice, {names[1]}"),
    )
    points = list(zip(before, after, strict=True))
    corners = [(ends.low, ends.low), (1.0, 1.0)]
    drawn = [
        (
            figure(frame, curve(frame, corners, "quiet"), dots(frame, points, labels, places)),
            "Dice of every case in both. Above the line the second is better; a click on a dot "
            "shows the case.",
        ),
        (_histogram(np.subtract(after, before)), "How far the Dice of the cases has changed."),
    ]
    return [("figures", "Dice against Dice", f'<div class="figures">{captioned(drawn)}</div>')]


def _histogram(changes: np.ndarray) -> str:
    most = round_marks(float(np.abs(changes).max()), 3)
    ends = tuple(-mark for mark in most[:0:-1]) + most
    counts = np.histogram(changes, bins=21, range=(ends[0], ends[-1]))[0].tolist()
    marks = round_marks(max(counts))
    frame = Plot(
        "Histogram of the change",
        Axis("change of Dice", ends[0], ends[-1], ends),
        Axis("cases", 0, marks[-1], marks),
    )
    mean = float(changes.mean())
    return figure(frame, bars(frame, counts), upright(frame, mean, f"mean {mean:+.3f}"))


def _strips(pairs: Sequence[Pair]) -> list[Strip]:
    """The pairs whose Dice fell and rose most."""
    change = {
        place: value for place, pair in enumerate(pairs) if (value := _change(pair)) is not None
    }
    order = sorted(change, key=change.__getitem__)
    fell = [place for place in order[:STRIP] if change[place] < 0]
    rose = [place for place in order[::-1][:STRIP] if change[place] > 0]
    return [
        (heading, [(place, number(change[place], signed=True)) for place in some])
        for heading, some in (("Fell most", fell), ("Rose most", rose))
        if some
    ]


def _cases(
    first: Evaluation, second: Evaluation, pairs: Sequence[Pair], names: tuple[str, str]
) -> list[Shown]:
    """Every pair; those that changed most have their pictures in the page."""
    sizes = [abs(_change(pair) or 0) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda place: -sizes[place])
    chosen = order[: MOST_PICTURES // 2]
    base = _way(second.folder, first.folder)
    rows = {(row.name, of_class): k for k, (of_class, row) in enumerate(rows_of(first))}
    match = [rows[two.name, of_class] for of_class, _, two in pairs]
    there = views_of(first, rows_of(first), {}, chosen=[match[k] for k in chosen], base=base or "")
    here = views_of(second, rows_of(second), {}, chosen=chosen)
    shown = []
    for place, (of_class, one, two) in enumerate(pairs):
        end = f"_{of_class}" if of_class else ""
        links = {
            f"{label}, second": file
            for label, file in pictures_beside(second.folder, two.name, end=end).items()
        }
        if base is not None:
            beside = pictures_beside(first.folder, one.name, end=end, base=base)
            links = {f"{label}, first": file for label, file in beside.items()} | links
        views = [
            {**there[match[place]], "label": f"{names[0]}, Dice {number(one.dice)}"},
            {**here[place], "label": f"{names[1]}, Dice {number(two.dice)}"},
        ]
        if base is None and "overlay" in views[0]:
            views[0] = {"label": views[0]["label"]}
        values = {
            "change": _change((of_class, one, two)),
            "dice_first": one.dice,
            "dice_second": two.dice,
            "hd95_first": one.hd95,
            "hd95_second": two.hd95,
        }
        kept = {k: v for k, v in links.items() if k.startswith(("overlay", "mask"))}
        shown.append(Shown(two.name, values, views, kept, of_class))
    return shown


def _way(start: Path, goal: Path) -> str | None:
    """The way from one folder to another as the beginning of an address; None without one."""
    try:
        way = os.path.relpath(goal.resolve(), start.resolve())
    except ValueError:  # another drive
        return None
    return f"{way.replace(os.sep, '/')}/"


def _links(first: Path, second: Path) -> dict[str, str]:
    way = _way(second, first)
    there = {} if way is None else {"scores.csv, first": f"{way}scores.csv"}
    return {**there, "scores.csv, second": "scores.csv", "comparison.json": "comparison.json"}
