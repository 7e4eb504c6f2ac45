"""What the report draws of each class: Dice, reliability, sparsification, uncertainty against Dice.

Called by ``report``; the axes and marks are those of ``charts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from guided_diffusion import charts
from guided_diffusion.case_scores import CaseScore
from guided_diffusion.charts import Axis, Frame, Point
from guided_diffusion.summary import Summary


def figures(name: str, part: Summary, rows: Sequence[CaseScore]) -> str:
    """The four figures of one class (named, or "" for the only one) as HTML."""
    of_class = f" of {name}" if name else ""
    drawn = [
        (_histogram(rows), f"Dice{of_class} of the cases with a lesion."),
        (
            _reliability(part),
            f"How often a pixel{of_class} of a given fused probability is "
            "foreground. On the diagonal the probability can be believed.",
        ),
        (
            _sparsification(part),
            f"Errors left{of_class} when the most uncertain pixels are taken "
            "away; below, the best order there is.",
        ),
        (_scatter(rows), f"The uncertainty of a case{of_class} against its Dice."),
    ]
    return "".join(
        f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in drawn
        if svg
    )


def _histogram(rows: Sequence[CaseScore]) -> str:
    dice = [row.dice for row in rows if row.dice is not None and not row.empty_truth]
    if not dice:
        return ""
    counts = np.histogram(dice, bins=20, range=(0, 1))[0].tolist()
    marks = charts.round_marks(max(counts))
    frame = Frame("Histogram of Dice", Axis("Dice"), Axis("cases", 0, marks[-1], marks))
    middle = float(np.median(dice))
    median = charts.upright(frame, middle, f"median {middle:.3f}")
    return charts.figure(frame, charts.bars(frame, counts), median)


def _reliability(part: Summary) -> str:
    curve = part["calibration"]["curve"]
    frame = Frame("Reliability curve", Axis("fused probability"), Axis("share of foreground"))
    points = [(bin["probability"], bin["frequency"]) for bin in curve]
    return charts.figure(
        frame,
        charts.curve(frame, [(0, 0), (1, 1)], "quiet"),
        charts.curve(frame, points, "one"),
        charts.dots(frame, points, [f"{bin['pixels']:,} pixels" for bin in curve]),
    )


def _sparsification(part: Summary) -> str:
    curve = part["uncertainty"]["sparsification"]
    if not curve["removed"]:
        return ""
    marks = charts.round_marks(max(curve["error"]) * 100)
    frame = Frame(
        "Sparsification curve",
        Axis("share of pixels taken away"),
        Axis("errors left, %", 0, marks[-1], marks),
    )
    lines = {
        kind: [(x, 100 * y) for x, y in zip(curve["removed"], curve[key], strict=True)]
        for kind, key in (("one", "error"), ("quiet", "oracle"))
    }
    return charts.figure(frame, *(charts.curve(frame, lines[kind], kind) for kind in lines))


def _scatter(rows: Sequence[CaseScore]) -> str:
    known = [
        (row.uncertainty, row.dice, row.name)
        for row in rows
        if row.uncertainty is not None and row.dice is not None and not row.empty_truth
    ]
    if not known:
        return ""
    marks = charts.round_marks(max(doubt for doubt, _, _ in known))
    frame = Frame("Uncertainty and Dice", Axis("uncertainty", 0, marks[-1], marks), Axis("Dice"))
    points: list[Point] = [(doubt, dice) for doubt, dice, _ in known]
    return charts.figure(frame, charts.dots(frame, points, [name for _, _, name in known]))
