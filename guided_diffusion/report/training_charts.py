"""The curves of a training as charts of the report, drawn from its ``progress.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from guided_diffusion.report.charts import (
    Axis,
    Plot,
    captioned,
    curve,
    figure,
    round_marks,
    upright,
)
from guided_diffusion.report.curves import Points, read_points, smoothed
from guided_diffusion.report.page import Section

MOST_POINTS = 400
"""Points of a curve; of more, means of as many neighbours."""
DIGITS = (1, 2, 5)


def training_section(log: Path | None) -> list[Section]:
    """Draw the curves of a training as a section of the page; none without its log."""
    columns = read_points(log) if log is not None and log.is_file() else {}
    drawn = [
        (_curves(columns, "loss", "loss"), "Loss of training; faint, as it was logged."),
        (
            _validation(columns),
            "Dice of the validation; orange, its IoU. The line marks the best Dice.",
        ),
        (_curves(columns, "grad_norm", "gradient norm"), "Norm of the gradient."),
        (_curves(columns, "lr", "learning rate", varies=True), "Learning rate."),
    ]
    content = captioned(drawn)
    return [("training", "Training", f'<div class="figures">{content}</div>')] if content else []


def _curves(columns: Mapping[str, Points], name: str, label: str, *, varies: bool = False) -> str:
    """Draw the running mean of a column, faintly its values; no constant if it ``varies``."""
    steps, values = columns.get(name, ([], []))
    if len(steps) < 2 or (varies and min(values) == max(values)):
        return ""
    means = smoothed(values, len(values) // 40)
    frame = Plot(f"{label.capitalize()} by step", step_axis(steps), value_axis(label, means))
    faint = curve(frame, _thinned((steps, values)), "faint") if means != values else ""
    return figure(frame, faint, curve(frame, _thinned((steps, means)), "one"))


def _validation(columns: Mapping[str, Points]) -> str:
    steps, dice = columns.get("val_dice", ([], []))
    if len(steps) < 2:
        return ""
    frame = Plot("Dice of the validation by step", step_axis(steps), Axis("validation"))
    best = max(range(len(dice)), key=dice.__getitem__)
    iou = columns.get("val_iou", ([], []))
    return figure(
        frame,
        curve(frame, _thinned(iou), "two"),
        curve(frame, _thinned((steps, dice)), "one"),
        upright(frame, steps[best], f"best {dice[best]:.3f}"),
    )


def step_axis(steps: Sequence[float]) -> Axis:
    """An axis of steps from 0."""
    marks = round_marks(max(steps))
    return Axis("step", 0, marks[-1], marks)


def value_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis from 0, or a logarithmic one where positive values span a factor of 8."""
    low, high = min(values), max(values)
    if not 0 < 8 * low < high:
        marks = round_marks(high)
        return Axis(label, 0, marks[-1], marks)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = DIGITS if len(powers) < 5 else DIGITS[:1]
    marks = tuple(float(f"{digit}e{power}") for power in powers for digit in every)
    first = max(mark for mark in marks if mark <= low)
    last = min((mark for mark in marks if mark >= high), default=marks[-1])
    return Axis(label, first, last, tuple(m for m in marks if first <= m <= last), True)


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Average neighbours of a long curve, so that at most :data:`MOST_POINTS` are left."""
    steps, values = points
    size = -(-len(steps) // MOST_POINTS)
    parts = [slice(start, start + size) for start in range(0, len(steps), max(size, 1))]
    return [(_mean(steps[part]), _mean(values[part])) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
