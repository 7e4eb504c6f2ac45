"""Draw the figures of the comparison of objectives from its finished runs.

    python benchmarks/figures.py

reads ``results/method.jsonl`` and writes ``evaluations.png``, ``spread.png``, ``reliability.png``
and ``risk_coverage.png`` into ``results/figures``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from method_tables import PARENTS, UNET, Json
from versions import read

from guided_diffusion.scoring.risk_coverage import risk_coverage

NAMES = {"isic": "ISIC skin lesions", "kvasir": "Kvasir-SEG polyps", "brats": "BraTS slices"}
LABELS = {UNET: "plain U-Net", PARENTS: "published settings", "x0 mse": "clean mask, squared error"}
ANSWERS = {
    "direct": "direct answer",
    "1 x 8": "8 members, 1 evaluation",
    "chosen": "8 members, chosen settings",
}
COUNTS = (1, 5, 10, 50)
COLOURS = {UNET: "black", PARENTS: "#b04a3a", "x0 mse": "#8a8a8a"}
OURS = ("#1f6fb4", "#5aa7a7", "#7a5fb0")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("results/method.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("results/figures"))
    arguments = parser.parse_args()
    runs = read(arguments.runs)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        figure = draw(runs)
        figure.savefig(arguments.out / f"{name}.png", dpi=110)
        pyplot.close(figure)


def panels(names: Sequence[str], title: str, down: str, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Rows of panels, one for each data set in every row."""
    size = (4 * len(names), 1 + 2.8 * rows)
    figure, axes = pyplot.subplots(
        rows, len(names), figsize=size, squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    for row in axes:
        for axis, name in zip(row, names, strict=True):
            axis.set_title(NAMES[name], fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="#e5e5e5", linewidth=0.6)
        row[0].set_ylabel(down)
    return figure, list(axes.flat)


def legend(figure: Figure, axes: Sequence[Axes], columns: int) -> Figure:
    """Name the lines of all panels below them."""
    found = {
        text: line
        for axis in axes
        for line, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [*found.values()], [*found], loc="outside lower center", ncols=columns, fontsize=8
    )
    return figure


def sets(runs: Sequence[Json], *stages: str) -> list[str]:
    """The data sets of some stages, in their order."""
    found = {run["set"] for run in runs if run["stage"] in stages}
    return [name for name in NAMES if name in found]


def label(recipe: str) -> str:
    """What a recipe is called."""
    return LABELS.get(recipe, recipe.replace("dice_ce", "cross-entropy + Dice"))


def evaluations(runs: Sequence[Json]) -> Figure:
    """Dice of the fused mask against evaluations of the network, test cases."""
    finals = [run for run in runs if run["stage"] == "finals"]
    names = sets(runs, "finals")
    figure, axes = panels(
        names,
        "4 members by DDIM, test cases, mean of the seeds; below, the same near the U-Net",
        "Dice of the fused mask",
        rows=2,
    )
    for axis, name in zip(axes, names * 2, strict=True):
        own = [run for run in finals if run["set"] == name]
        recipes = list(dict.fromkeys(run["recipe"] for run in own))
        new = iter(OURS)
        for recipe in (UNET, PARENTS, *(one for one in recipes if one not in (UNET, PARENTS))):
            tests = [run["test"] for run in own if run["recipe"] == recipe]
            if tests:
                draw_recipe(axis, tests, label(recipe), COLOURS.get(recipe) or next(new))
        axis.set_xscale("log")
        axis.set_xticks(COUNTS, [str(n) for n in COUNTS])
        axis.minorticks_off()
        axis.set_xlabel("evaluations of the network")
    for axis, name in zip(axes[len(names) :], names, strict=True):
        level = dice_of(finals, name, UNET, "direct")
        axis.set_ylim(level - 0.07, level + 0.03)
    return legend(figure, axes, 3)


def draw_recipe(axis: Axes, tests: Sequence[Json], text: str, colour: str) -> None:
    """Draw the Dice of one recipe's answers against their evaluations."""
    counts = [n for n in COUNTS if f"{n} x 4" in tests[0]]
    if counts:
        dice = [[test[f"{n} x 4"]["dice"] for n in counts] for test in tests]
        axis.plot(counts, np.mean(dice, axis=0), "o-", color=colour, label=text, ms=4)
    if "direct" in tests[0]:
        level = np.mean([test["direct"]["dice"] for test in tests])
        style = (
            {"linestyle": "--", "label": f"{text}, direct answer"} if counts else {"label": text}
        )
        axis.axhline(level, color=colour, **style)


def dice_of(runs: Sequence[Json], name: str, recipe: str, asked: str) -> float:
    """The mean Dice over the seeds of a recipe on the test cases of a set."""
    own = [run for run in runs if (run["set"], run["recipe"]) == (name, recipe)]
    return float(np.mean([run["test"][asked]["dice"] for run in own]))


def spread(runs: Sequence[Json]) -> Figure:
    """What members that spread as they err cost in Dice: every way to ask, validation cases."""
    names = sets(runs, "members", "evaluations")
    figure, axes = panels(
        names,
        "Every way to ask a network for members, validation cases",
        "Dice of the members' fused mask",
    )
    for axis, name in zip(axes, names, strict=True):
        for stage, colour, text in (
            ("evaluations", "#8a8a8a", "one network: samplers, counts, guidance"),
            ("members", OURS[0], "three networks, one by one: fast solvers, guidance"),
            ("ensembles", "#b04a3a", "three networks together"),
        ):
            points = [
                (value["spread_skill"], value["dice"])
                for run in runs
                if (run["stage"], run["set"]) == (stage, name) and run["recipe"] != UNET
                for value in run["validation"].values()
                if value["spread_skill"] is not None
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o", color=colour, ms=4, alpha=0.6, label=text
                )
        axis.axvspan(0.9, 1.1, color="#d8ead8", zorder=0)
        axis.set_xlabel("spread/skill (1: members spread as they err)")
    return legend(figure, axes, 3)


def answers(runs: Sequence[Json], name: str) -> list[tuple[str, str, list[Json]]]:
    """What was kept of each answer on a data set: its name, its colour, one entry for each seed."""
    found = []
    own = [run for run in runs if (run["stage"], run["set"]) == ("members", name)]
    for recipe in dict.fromkeys(run["recipe"] for run in own):
        tests = [run["test"] for run in own if run["recipe"] == recipe]
        for (asked, text), colour in zip(ANSWERS.items(), OURS, strict=True):
            if asked in tests[0]:
                unet = recipe == UNET
                kept = [test[asked] for test in tests]
                found.append((LABELS[UNET] if unet else text, "black" if unet else colour, kept))
    return found


def reliability(runs: Sequence[Json]) -> Figure:
    """The fraction of foreground among pixels of one probability, test cases."""
    names = sets(runs, "members")
    figure, axes = panels(
        names,
        "Reliability of the fused mask, test cases, mean of the seeds",
        "foreground, fraction",
    )
    for axis, name in zip(axes, names, strict=True):
        axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        for text, colour, kept in answers(runs, name):
            bins = np.sum([as_sums(one["reliability"]) for one in kept], axis=0)
            pixels, probability, hits = bins[bins[:, 0] > 0].T
            axis.plot(probability / pixels, hits / pixels, "o-", color=colour, ms=3, label=text)
        axis.set_xlabel("probability")
    return legend(figure, axes, 4)


def as_sums(curve: Sequence[tuple[int, float, float]], bins: int = 15) -> np.ndarray:
    """Pixels, summed probability and foreground of each bin of a reliability curve."""
    sums = np.zeros((bins, 3))
    for pixels, probability, frequency in curve:
        own = min(int(probability * bins), bins - 1)
        sums[own] += (pixels, pixels * probability, pixels * frequency)
    return sums


def risks(runs: Sequence[Json]) -> Figure:
    """The Dice of the rest when the most doubtful cases are handed to a person, test cases."""
    names = sets(runs, "members")
    figure, axes = panels(
        names,
        "The most doubtful cases handed over, test cases, mean of the seeds",
        "mean Dice of the rest",
    )
    for axis, name in zip(axes, names, strict=True):
        for text, colour, kept in answers(runs, name):
            curves = [risk_coverage(one["doubt"], one["cases"]) for one in kept]
            handed = np.mean([curve.handed for curve in curves if curve], axis=0)
            shown = handed <= 0.8
            dice = np.mean([curve.dice for curve in curves if curve], axis=0)
            oracle = np.mean([curve.oracle for curve in curves if curve], axis=0)
            axis.plot(handed[shown], dice[shown], color=colour, label=text)
            if text == LABELS[UNET]:
                axis.plot(
                    *(handed[shown], oracle[shown]),
                    **{"color": colour, "linestyle": ":", "label": "the U-Net's worst first"},
                )
        axis.set_xlabel("share handed over")
    return legend(figure, axes, 5)


FIGURES: dict[str, Callable[[Sequence[Json]], Figure]] = {
    "evaluations": evaluations,
    "spread": spread,
    "reliability": reliability,
    "risk_coverage": risks,
}

if __name__ == "__main__":
    main()
