"""The charts of the report as inline SVG: a histogram, curves and a scatter plot.

They are written as strings, without a library or a script. Colours come from the page's style, by
CSS class, so that charts follow its light and dark mode. Every chart has a title for screen
readers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from guided_diffusion.scoring.case_scores import CaseScore
from guided_diffusion.scoring.summary import Summary

Point = tuple[float, float]
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40


class Axis(NamedTuple):
    """One axis: its label, its two ends, the positions of its marks, and whether it is logarithmic.

    The ends of a logarithmic axis are positive.
    """

    label: str
    low: float = 0.0
    high: float = 1.0
    marks: tuple[float, ...] = (0, 0.2, 0.4, 0.6, 0.8, 1)
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """The relative position of a value between the ends, in [0, 1]."""
        if self.logarithmic:
            ends = math.log(self.high / self.low)
            value = math.log(max(value, self.low) / self.low) / ends
            return min(1.0, max(0.0, value))
        span = self.high - self.low
        return min(1.0, max(0.0, (value - self.low) / span)) if span else 0.0


class Plot(NamedTuple):
    """The title and the two axes of a chart."""

    title: str
    across: Axis
    up: Axis

    def at(self, point: Point) -> Point:
        """Convert a point from the axes' units to the picture's coordinates."""
        x = LEFT + self.across.share(point[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - self.up.share(point[1]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)


def figures(
    name: str, part: Summary, rows: Sequence[CaseScore], *, first: int = 0, step: int = 1
) -> str:
    """Draw the charts of one class (named, or "" for the only one) as HTML.

    The first of its ``rows`` is the page's row number ``first``, the next one is ``step`` further.
    """
    of_class = f" of {name}" if name else ""
    drawn = [
        (_histogram(rows), f"Dice{of_class} of the cases with a lesion."),
        (
            _reliability(part),
            f"How often a pixel{of_class} of a given fused probability is "
            "foreground. On the diagonal the probability is calibrated.",
        ),
        (
            _sparsification(part),
            f"Errors left{of_class} when the most uncertain pixels are removed; "
            "below, in the best possible order.",
        ),
        (_scatter(rows, first, step), f"The uncertainty of a case{of_class} against its Dice."),
        (
            _risk_coverage(part),
            f"Mean Dice{of_class} of the rest when the most uncertain cases are handed to a "
            "person; above, in the best possible order; level, in random order.",
        ),
    ]
    return captioned(drawn)


def captioned(drawn: Iterable[tuple[str, str]]) -> str:
    """Format charts with their captions as HTML; empty ones are left out."""
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
    marks = round_marks(max(counts))
    frame = Plot("Histogram of Dice", Axis("Dice"), Axis("cases", 0, marks[-1], marks))
    middle = float(np.median(dice))
    median = upright(frame, middle, f"median {middle:.3f}")
    return figure(frame, bars(frame, counts), median)


def _reliability(part: Summary) -> str:
    bins = part["calibration"]["curve"]
    frame = Plot("Reliability curve", Axis("fused probability"), Axis("fraction of foreground"))
    points = [(bin["probability"], bin["frequency"]) for bin in bins]
    return figure(
        frame,
        curve(frame, [(0, 0), (1, 1)], "quiet"),
        curve(frame, points, "one"),
        dots(frame, points, [f"{bin['pixels']:,} pixels" for bin in bins]),
    )


def _sparsification(part: Summary) -> str:
    measured = part["uncertainty"]["sparsification"]
    if not measured["removed"]:
        return ""
    marks = round_marks(max(measured["error"]) * 100)
    frame = Plot(
        "Sparsification curve",
        Axis("fraction of pixels removed"),
        Axis("errors left, %", 0, marks[-1], marks),
    )
    lines = {
        kind: [(x, 100 * y) for x, y in zip(measured["removed"], measured[key], strict=True)]
        for kind, key in (("one", "error"), ("quiet", "oracle"))
    }
    return figure(frame, *(curve(frame, lines[kind], kind) for kind in lines))


def _scatter(rows: Sequence[CaseScore], first: int, step: int) -> str:
    known = [
        (row.uncertainty, row.dice, row.name, first + place * step)
        for place, row in enumerate(rows)
        if row.uncertainty is not None and row.dice is not None and not row.empty_truth
    ]
    if not known:
        return ""
    uncertainties, dice, names, places = (list(column) for column in zip(*known, strict=True))
    marks = round_marks(max(uncertainties))
    across = Axis("uncertainty", 0, marks[-1], marks)
    frame = Plot("Uncertainty and Dice", across, upper_axis("Dice", dice))
    return figure(frame, dots(frame, [*zip(uncertainties, dice, strict=True)], names, places))


def upper_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis of shares that ends at 1 and begins at the tenth below the least of the values."""
    low = min(0.9, math.floor(10 * min(values) + 1e-9) / 10)
    marks = tuple(round(low + step * (1 - low) / 5, 3) for step in range(6))
    return Axis(label, low, 1.0, marks)


def _risk_coverage(part: Summary) -> str:
    found = part["uncertainty"]["risk_coverage"]
    if found is None or len(found["curve"]["dice"]) < 3:
        return ""
    handed, dice, oracle = (found["curve"][key] for key in ("handed", "dice", "oracle"))
    frame = Plot(
        "Risk-coverage curve",
        Axis("fraction of cases handed to a person"),
        upper_axis("mean Dice of the rest", dice),
    )
    reached = [(entry["share"], entry["dice"]) for entry in found["hand_over"] if entry["share"]]
    names = [f"{100 * share:.0f} % of the cases for {target:g}" for share, target in reached]
    points = [(share, float(np.interp(share, handed, dice))) for share, _ in reached]
    return figure(
        frame,
        curve(frame, [(0, dice[0]), (1, dice[0])], "quiet"),
        curve(frame, list(zip(handed, oracle, strict=True)), "quiet"),
        curve(frame, list(zip(handed, dice, strict=True)), "one"),
        dots(frame, points, names),
        upright(frame, points[0][0], names[0]) if points else "",
    )


def figure(frame: Plot, *parts: str) -> str:
    """Draw a chart: its axes, and the parts on them."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(frame.title)}">'
        f"<title>{escape(frame.title)}</title>{_axes(frame)}{''.join(parts)}</svg>"
    )


def _axes(frame: Plot) -> str:
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for mark in frame.up.marks:
        y = frame.at((frame.across.low, mark))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{end}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5}" text-anchor="end">')
        parts.append(f"{mark:g}</text>")
    for mark in frame.across.marks:
        x = frame.at((mark, frame.up.low))[0]
        parts.append(f'<text class="tick" x="{x}" y="{base + 15}" text-anchor="middle">')
        parts.append(f"{mark:g}</text>")
    middle = (TOP + base) / 2
    return (
        "".join(parts)
        + f'<line class="base" x1="{LEFT}" y1="{base}" x2="{end}" y2="{base}"/>'
        + f'<text class="label" x="{(LEFT + end) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        + f"{escape(frame.across.label)}</text>"
        + f'<text class="label" transform="translate(9 {middle}) rotate(-90)" '
        + f'text-anchor="middle">{escape(frame.up.label)}</text>'
    )


def bars(frame: Plot, counts: Sequence[int]) -> str:
    """Draw bars of equal width over the whole axis, each with its count as a tooltip."""
    step = (frame.across.high - frame.across.low) / max(1, len(counts))
    drawn = []
    for index, count in enumerate(counts):
        low = frame.across.low + index * step
        left, top = frame.at((low, count))
        right, base = frame.at((low + step, frame.up.low))
        drawn.append(
            f'<rect class="bar" x="{left + 0.75:.1f}" y="{top}" '
            f'width="{max(0.5, right - left - 1.5):.1f}" height="{base - top:.1f}">'
            f"<title>{low:g} to {low + step:g}: {count}</title></rect>"
        )
    return "".join(drawn)


def curve(frame: Plot, points: Sequence[Point], kind: str) -> str:
    """Draw a line through the points; ``kind`` is its CSS class: one, two or quiet."""
    if not points:
        return ""
    placed = " ".join("{},{}".format(*frame.at(point)) for point in points)
    return f'<polyline class="curve {kind}" points="{placed}"/>'


def dots(
    frame: Plot, points: Sequence[Point], names: Sequence[str], places: Sequence[int] = ()
) -> str:
    """Draw a dot for each point, with its name as a tooltip.

    ``places`` are the rows of the page that are shown when the dots are clicked.
    """
    drawn = []
    for number, (point, name) in enumerate(zip(points, names, strict=True)):
        x, y = frame.at(point)
        index = f' data-index="{places[number]}"' if places else ""
        drawn.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.6"{index}>')
        drawn.append(f"<title>{escape(name)}</title></circle>")
    return "".join(drawn)


def upright(frame: Plot, value: float, label: str) -> str:
    """Draw a vertical line with a label at a value of the horizontal axis."""
    x, top = frame.at((value, frame.up.high))
    end = x > WIDTH * 0.7
    return (
        f'<line class="mark" x1="{x}" y1="{top}" x2="{x}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="note" x="{x + (-5 if end else 5)}" y="{top - 3}" '
        f'text-anchor="{"end" if end else "start"}">{escape(label)}</text>'
    )


def round_marks(most: float, number: int = 4) -> tuple[float, ...]:
    """Choose about ``number`` round steps from 0 to at least ``most``."""
    if most <= 0:
        return (0, 1)
    power = 10.0 ** math.floor(math.log10(most / number))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * (1 + 1e-9) >= most / number)
    return tuple(round(step * index, 12) for index in range(math.ceil(most / step - 1e-9) + 1))
