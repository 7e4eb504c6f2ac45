"""The tables of the comparison of objectives, from its finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from guided_diffusion.scoring.intervals import compare

Json = dict[str, Any]
UNET, PARENTS = "unet", "parents"
STAGES = {
    "screen": "validation",
    "finals": "test",
    "evaluations": "validation",
    "members": "test",
    "ensembles": "test",
}
"""The part of the cases that the table of each stage shows."""
PATIENTS = Path(__file__).parent / "splits" / "brats_patients.txt"
COLUMNS = ("dice", "member_dice", "spread_skill", "error_rank_correlation", "ece", "nll", "brier")
HEAD = "| Dice | member | spread/skill | rank correlation | ECE | NLL | Brier | s/case |"


def tables(done: Sequence[Json]) -> str:
    """Write all runs as Markdown."""
    parts = ["# Objectives compared\n\n```bash\npython benchmarks/method.py --data DIR\n```\n"]
    for stage, part in STAGES.items():
        lines = [line for line in done if line["stage"] == stage]
        for name in dict.fromkeys(line["set"] for line in lines):
            own = [line for line in lines if line["set"] == name]
            parts.append(table(f"{stage}, {name}: {part} cases", own, part))
            if stage == "finals":
                parts.append(differences(own, patients(name)))
    return "\n".join([*parts, text] if (text := repeated(done)) else parts)


def patients(name: str) -> list[str] | None:
    """The patient of each test case of a set, where several cases are of one patient."""
    if name != "brats":
        return None
    lines = PATIENTS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def table(title: str, lines: Sequence[Json], part: str) -> str:
    """Write the means over seeds of some runs."""
    first = lines[0]
    devices = ", ".join(sorted({f"{line['device']}, torch {line['torch']}" for line in lines}))
    text = [
        f"## {title}\n",
        f"{first['size']} px, {first['steps']} steps of {first['batch_size']}, learning rate "
        f"{first['lr']:g} falling to 0, seeds {', '.join(seeds(lines))}. {devices}; "
        f"commit {', '.join(sorted({line['commit'] for line in lines}))}.\n",
        "| recipe | seeds | asked " + HEAD,
        "|---" * 11 + "|",
    ]
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        own = [line for line in lines if line["recipe"] == recipe]
        for asked in own[0][part]:
            found = [line[part][asked] for line in own if asked in line[part]]
            cells = [mean_text([value[key] for value in found]) for key in COLUMNS]
            alone = all(line["jobs"] == 1 for line in own)  # else the device was shared
            seconds = np.mean([value["seconds_a_case"] for value in found])
            cells.append(f"{seconds:.4f}" if alone else "")
            chosen = sorted({line["chosen"] for line in own}) if asked == "chosen" else []
            name = f"chosen: {'; '.join(chosen)}" if chosen else asked
            text.append(f"| {recipe} | {len(found)} | {name} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def seeds(lines: Sequence[Json]) -> list[str]:
    """The seeds of some runs, in order."""
    return sorted({str(line["seed"]) for line in lines})


def mean_text(values: Sequence[float | None]) -> str:
    """The mean over seeds, with their standard deviation if there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {np.std(known, ddof=1):.4f}" if len(known) > 1 else ""
    return f"{np.mean(known):.4f}{spread}"


def differences(lines: Sequence[Json], groups: Sequence[str] | None = None) -> str:
    """Compare every recipe's answers with the U-Net's, case by case, over the seeds of both.

    With ``groups``, the patient of each case, patients are drawn, and each has a column.
    """
    of_unet = {line["seed"]: line for line in lines if line["recipe"] == UNET}
    if not of_unet:
        return ""
    names = list(dict.fromkeys(groups or ()))
    drawn = "patients" if groups else "cases"
    text = [
        "Dice minus that of the U-Net, of the same test cases and seeds, and its 95 % bootstrap "
        f"interval over {drawn}:\n",
        "| recipe | seeds | asked | difference | from | to |"
        + "".join(f" patient {name} |" for name in names),
        "|---" * (6 + len(names)) + "|",
    ]
    for recipe in dict.fromkeys(line["recipe"] for line in lines if line["recipe"] != UNET):
        own = [line for line in lines if line["recipe"] == recipe and line["seed"] in of_unet]
        for asked in own[0]["test"] if own else ():
            base = mean_of(of_unet[line["seed"]]["test"]["direct"] for line in own)
            other = mean_of(line["test"][asked] for line in own)
            found = compare(base, other, groups)
            cells = [found.difference, found.low, found.high]
            cells += [
                (other - base)[[group == name for group in groups or ()]].mean() for name in names
            ]
            values = " | ".join(f"{value:+.4f}" for value in cells)
            text.append(f"| {recipe} | {', '.join(seeds(own))} | {asked} | {values} |")
    return "\n".join(text) + "\n"


def repeated(done: Sequence[Json]) -> str:
    """Compare the direct answers of all trainings of a recipe with those of the U-Net.

    The finals and the members are trainings of their own, with the same seeds: on a GPU they end
    differently. The interval over trainings is Welch's (1947), of the difference of two means.
    """
    text = [
        "## direct answers of all trainings: test cases\n",
        "Dice minus that of the U-Net, with 95 % intervals over cases (of BraTS: patients; "
        "trainings averaged) and over trainings (cases averaged):\n",
        "| set | recipe | trainings | Dice | U-Net, trainings | Dice | difference | over cases | "
        "over trainings |",
        "|---" * 9 + "|",
    ]
    lines = [line for line in done if line["stage"] in ("finals", "members")]
    both = [line for line in lines if "direct" in line["test"]]
    for name in dict.fromkeys(line["set"] for line in both):
        own = [line for line in both if line["set"] == name]
        unet = [line["test"]["direct"] for line in own if line["recipe"] == UNET]
        for recipe in dict.fromkeys(line["recipe"] for line in own if line["recipe"] != UNET):
            ours = [line["test"]["direct"] for line in own if line["recipe"] == recipe]
            if len(ours) < 2 or len(unet) < 2:
                continue
            cases = compare(mean_of(unet), mean_of(ours), patients(name))
            dice, base = ([answer["dice"] for answer in answers] for answers in (ours, unet))
            low, high = ttest_ind(dice, base, equal_var=False).confidence_interval()
            text.append(
                f"| {name} | {recipe} | {len(ours)} | {mean_text(dice)} | {len(unet)} | "
                f"{mean_text(base)} | {cases.difference:+.4f} | [{cases.low:+.4f}, "
                f"{cases.high:+.4f}] | [{low:+.4f}, {high:+.4f}] |"
            )
    return "\n".join(text) + "\n" if len(text) > 4 else ""


def mean_of(answers: Iterable[Json]) -> np.ndarray:
    """The Dice of every case, averaged over answers."""
    return np.mean([answer["cases"] for answer in answers], axis=0)
