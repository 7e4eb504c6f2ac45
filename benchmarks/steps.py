"""Measure Dice, diversity and time by network evaluations, for all samplers on the same weights.

    python benchmarks/steps.py --model_path results/demo --data_dir data/testing

prints one Markdown table over the cases with a lesion: Dice of single members and of the fused
mask, the disagreement of the members, and how well it detects cases of low Dice (AUROC). All
figures come from this run; ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.ensemble import disagreement
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.inference.resolve import resolve_sampling
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import SAMPLE
from guided_diffusion.scoring.metrics import confusion, dice

SETTINGS = (
    *("ddpm:1000", "ddpm:50", "ddpm:10"),
    *("ddim:50", "ddim:10", "ddim:5", "ddim:2", "ddim:10:eta=1", "ddim:5:eta=1"),
    *("dpm_solver:20", "dpm_solver:10", "dpm_solver:5"),
    *("dpm_solver++:20", "dpm_solver++:10", "dpm_solver++:5", "dpm_solver++:2", "dpm_solver++:1"),
    *("dpm_solver++:20:order=3", "dpm_solver++:10:order=3", "dpm_solver++:5:order=3"),
    *("dpm_solver++:10:method=singlestep", "dpm_solver++:5:method=singlestep"),
    *("dpm_solver++:10:skip_type=logSNR", "dpm_solver++:5:skip_type=logSNR"),
    *("sde_dpm_solver++:20", "sde_dpm_solver++:10", "sde_dpm_solver++:5"),
    *("unipc:20", "unipc:10", "unipc:5"),
)


class Figures(NamedTuple):
    """One row of the table."""

    setting: str
    evaluations: int
    single: float
    fused: float
    disagreement: float
    std_inside: float
    auroc: float | None
    seconds: float

    def __str__(self) -> str:
        auroc = "-" if self.auroc is None else f"{self.auroc:.2f}"
        return (
            f"| {self.setting} | {self.evaluations} | {self.single:.4f} | {self.fused:.4f} "
            f"| {self.disagreement:.4f} | {self.std_inside:.4f} | {auroc} | {self.seconds:.3f} |"
        )


def main() -> None:
    arguments = parse()
    with exit_on_user_error():
        logger.configure(quiet=True)
        print(f"{arguments.model_path}, ensembles of {arguments.num_ensemble}")
        print(f"torch {torch.__version__}, {describe(dev())}, {arguments.precision}\n")
        print("| sampler | evaluations | Dice, member | Dice, fused | disagreement ", end="")
        print(f"| std inside | AUROC, Dice < {arguments.below} | s per mask |")
        print("|---|---|---|---|---|---|---|---|")
        rows = []
        for setting in arguments.settings or SETTINGS:
            setup = resolve_sampling(Flags.of(SAMPLE, **flags(setting, arguments)))
            assert setup.dataset is not None
            segmenter = Segmenter.from_setup(setup)
            cases = [setup.dataset[index] for index in range(len(setup.dataset))]
            cases = [case for case in cases if has_lesion(case)]
            rows.append(measure(segmenter, cases[: arguments.cases or None], setting, arguments))
            print(rows[-1], flush=True)
        if arguments.plot:
            plot(rows, arguments.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_path", required=True, help="checkpoint or its folder")
    parser.add_argument("--data_dir", required=True, help="labelled data set")
    parser.add_argument("--data_name", default="", help="layout of the data set, if ambiguous")
    parser.add_argument("--cases", type=int, default=0, help="first cases with a lesion; 0: all")
    parser.add_argument("--num_ensemble", type=int, default=5, help="masks per case")
    parser.add_argument("--batch_size", type=int, default=20, help="network inputs at a time")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--below", type=float, default=0.9, help="a Dice below this is low")
    parser.add_argument("--plot", type=Path, help="PNG to draw (needs matplotlib)")
    parser.add_argument(
        "--settings", nargs="*", help="sampler:steps[:flag=value,...], such as ddim:10:eta=1"
    )
    return parser.parse_args()


def flags(setting: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling flags of one setting."""
    sampler, steps, *more = setting.split(":")
    extra = dict(pair.split("=") for part in more for pair in part.split(","))
    names = ("model_path", "data_dir", "data_name", "num_ensemble", "batch_size", "precision")
    return {
        **{name: getattr(arguments, name) for name in names},
        "sampler": sampler,
        "steps": int(steps),
        **{name: value_of(text) for name, text in extra.items()},
    }


def value_of(text: str) -> int | float | str:
    """Convert the value of a flag to int or float if possible."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def has_lesion(case: Case) -> bool:
    return case.mask is not None and bool((case.mask >= 0.5).any())


def measure(
    segmenter: Segmenter, cases: Sequence[Case], setting: str, arguments: argparse.Namespace
) -> Figures:
    """Segment all cases and compute a row of the table."""
    group = max(1, segmenter.plan.batch_size // segmenter.plan.num_ensemble)
    started = time.perf_counter()
    results = []
    for start in tqdm(range(0, len(cases), group), desc=setting, leave=False, disable=None):
        results += segmenter.segment(cases[start : start + group])
    seconds = time.perf_counter() - started

    truths = [case.mask >= 0.5 for case in cases if case.mask is not None]
    pairs = list(zip(results, (truth[0] for truth in truths)))
    fused = [dice(confusion(result.mask, truth)) for result, truth in pairs]
    single = [
        dice(confusion(member >= 0.5, truth))
        for result, truth in pairs
        for member in result.members
    ]
    spread = [disagreement(result.members) for result in results]
    inside = [float(result.uncertainty[truth].mean()) for result, truth in pairs]
    return Figures(
        setting=setting,
        evaluations=segmenter.plan.evaluations,
        single=statistics.mean(single),
        fused=statistics.mean(fused),
        disagreement=statistics.mean(spread),
        std_inside=statistics.mean(inside),
        auroc=auroc(spread, [value < arguments.below for value in fused]),
        seconds=seconds / (len(cases) * segmenter.plan.num_ensemble),
    )


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """Return the probability that a positive has the higher score; None without both kinds."""
    high = [score for score, is_positive in zip(scores, positive) if is_positive]
    low = [score for score, is_positive in zip(scores, positive) if not is_positive]
    if not high or not low:
        return None
    wins = sum((a > b) + 0.5 * (a == b) for a in high for b in low)
    return wins / (len(high) * len(low))


def plot(rows: Sequence[Figures], path: Path) -> None:
    """Plot Dice, disagreement and time by evaluations, one curve per kind of sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "fused": "Dice of the fused mask",
        "disagreement": "disagreement of the members",
        "seconds": "seconds per mask",
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(13, 4), layout="constrained")
    styles = cycle("osD^vP")
    for kind in dict.fromkeys(kind_of(row) for row in rows):
        own = sorted((row for row in rows if kind_of(row) == kind), key=lambda row: row.evaluations)
        counts, marker = [row.evaluations for row in own], next(styles)
        for axis, name in zip(axes, names, strict=True):
            axis.plot(counts, [getattr(row, name) for row in own], marker=marker, label=kind)
    for axis, name in zip(axes, names.values(), strict=True):
        axis.set(xscale="log", xlabel="network evaluations per mask", title=name)
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def kind_of(row: Figures) -> str:
    """Return the sampler and its flags without the number of evaluations."""
    sampler, _, *flags = row.setting.split(":")
    return ", ".join([sampler, *(flag.replace("=", " ") for flag in flags)])


if __name__ == "__main__":
    main()
