"""The curves of a training run as a picture, drawn from its ``progress.csv``.

This needs matplotlib, the extra ``plot``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError
from guided_diffusion.files import atomic_write, read_table

Points = tuple[list[float], list[float]]
INK, QUIET, GRID = "#1c2430", "#6b7482", "#e4e7ec"
COLOURS = ("#2f6fde", "#12a594", "#e5871f", "#d6409f")
KINDS = {
    "loss_q0": ("first quarter of t", COLOURS[0]),
    "loss_q1": ("second", COLOURS[1]),
    "loss_q2": ("third", COLOURS[2]),
    "loss_q3": ("last (most noise)", COLOURS[3]),
    "loss_direct": ("no noisy mask", INK),
}


def read_points(path: Path) -> dict[str, Points]:
    """Read the steps and values of every column of a ``progress.csv``, finite numbers only."""
    columns: dict[str, Points] = {}
    try:
        table = read_table(path, needs=["step"], hint="")
    except UserError:  # the log of a run that goes on mends it
        return columns
    for row in table.rows if table else ():
        step = _number(row["step"])
        for name, text in row.items():
            value = _number(text)
            if name and math.isfinite(step + value):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return columns


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return math.nan


def smoothed(values: list[float], half: int) -> list[float]:
    """Average each value with up to ``half`` neighbours on either side."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def draw_curves(log: Path, picture: Path) -> bool:
    """Draw loss, loss by quarter of t if there is one, gradient norm, learning rate, validation.

    Returns:
        Whether the picture was drawn; not without a loss in the log, nor without matplotlib.
    """
    columns = read_points(log)
    if "loss" not in columns:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False

    panels: list[tuple[str, Callable[[Any], None]]] = [
        ("loss", lambda axes: _line(axes, columns["loss"], COLOURS[0])),
        ("gradient norm", lambda axes: _line(axes, columns.get("grad_norm"), COLOURS[1])),
        ("learning rate", lambda axes: _plain(axes, columns.get("lr"), COLOURS[2])),
    ]
    if "val_dice" in columns:
        speed = ("steps per second", lambda axes: _plain(axes, columns.get("steps_per_s"), QUIET))
        panels.insert(1, ("validation", lambda axes: _validation(axes, columns)))
        panels.append(speed)
    if KINDS.keys() & columns.keys():
        panels.insert(1, ("loss by time t", lambda axes: _kinds(axes, columns)))

    across = 3 if len(panels) > 4 else 2
    figure = Figure(figsize=(4.6 * across, 6.4), dpi=110, facecolor="white", layout="constrained")
    grid = figure.subplots(2, across).flatten()
    for axes, (title, draw) in zip(grid, panels, strict=False):
        _style(axes, title)
        draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    with atomic_write(picture) as part:
        figure.savefig(part, format="png")
    return True


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=QUIET, labelsize=8.5, length=0)
    axes.set_xlabel("step", fontsize=8.5, color=QUIET)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)


def _line(axes: Any, points: Points | None, colour: str, label: str = "") -> None:
    """Draw the values faintly and their running mean on top, on a suitable scale."""
    if points is None:
        return
    steps, values = points
    half = len(values) // 40
    if half:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    marker = "o" if len(values) == 1 else None
    mean = smoothed(values, half)
    axes.plot(steps, mean, color=colour, linewidth=1.8, marker=marker, label=label, clip_on=False)
    _scale(axes)


def _scale(axes: Any) -> None:
    """Use a logarithmic axis where the means span a factor of 8; it may cut off outliers."""
    means = [y for line in axes.lines if line.get_alpha() is None for y in line.get_ydata()]
    low, high = min(means), max(means)
    if 0 < 8 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leads(value) else "")


def _leads(value: float) -> bool:
    """Whether a number begins with 2 or 5: enough labels between powers of ten."""
    return f"{value:e}"[0] in "25"


def _plain(axes: Any, points: Points | None, colour: str) -> None:
    if points is not None:
        marker = "o" if len(points[0]) == 1 else None
        axes.plot(*points, color=colour, linewidth=1.8, marker=marker, clip_on=False)
        axes.set_ylim(bottom=0)


def _kinds(axes: Any, columns: dict[str, Points]) -> None:
    for name, (label, colour) in KINDS.items():
        _line(axes, columns.get(name), colour, label)
    _legend(axes)


def _validation(axes: Any, columns: dict[str, Points]) -> None:
    style = {"linewidth": 1.8, "marker": "o", "markersize": 3}
    for name, label, colour in (("val_dice", "Dice", COLOURS[0]), ("val_iou", "IoU", COLOURS[2])):
        if name in columns:
            axes.plot(*columns[name], color=colour, label=label, **style)
    steps, dice = columns["val_dice"]
    best = max(range(len(dice)), key=dice.__getitem__)
    axes.plot(steps[best], dice[best], "o", markersize=9, mfc="none", mec=INK)
    axes.set_title(
        f"best Dice {dice[best]:.3f} at step {steps[best]:.0f}",
        loc="right",
        fontsize=8.5,
        color=QUIET,
    )
    axes.set_ylim(0, 1.02)
    _legend(axes)


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False, labelcolor=QUIET)
