"""Dice and time against network evaluations, for several samplers on the same trained weights.

    python benchmarks/steps.py --model_path results/demo --data_dir data/testing

prints one Markdown table: the fused mask of an ensemble beside single members, over the cases that
have a lesion. Every figure comes from this one run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.datasets import Case
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.ensemble import disagreement
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.layouts import open_dataset
from guided_diffusion.metrics import confusion, dice
from guided_diffusion.runs import load_segmenter
from guided_diffusion.segmenter import Segmenter

SETTINGS = [
    ("ddpm", 1000),
    ("ddim", 50),
    ("dpm_solver++", 10),
    ("dpm_solver++", 5),
    ("dpm_solver++", 2),
    ("dpm_solver++", 1),
]


def main() -> None:
    arguments = parse()
    with exit_on_user_error():
        logger.configure(quiet=True)
        dataset = open_dataset(arguments.data_dir, test=True)
        cases = [case for case in map(dataset.__getitem__, range(len(dataset))) if has_lesion(case)]
        cases = cases[: arguments.cases or None]
        settings = [parse_setting(text) for text in arguments.settings] or SETTINGS

        print(f"{arguments.model_path}, {len(cases)} cases with a lesion, ensembles of 5")
        print(f"torch {torch.__version__}, {describe(dev())}, {arguments.precision}\n")
        print(
            "| sampler | evaluations | Dice, one member | Dice, fused | disagreement | s per mask |"
        )
        print("|---|---|---|---|---|---|")
        for sampler, steps in settings:
            flags = {
                "model_path": arguments.model_path,
                "data_dir": arguments.data_dir,
                "sampler": sampler,
                "steps": steps,
            }
            flags |= {"batch_size": arguments.batch_size, "precision": arguments.precision}
            _, segmenter = load_segmenter(flags)
            print(row(segmenter, cases, f"{sampler} | {steps}"), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_path", required=True, help="checkpoint or its folder")
    parser.add_argument("--data_dir", required=True, help="labelled data set")
    parser.add_argument("--cases", type=int, default=0, help="first cases with a lesion; 0: all")
    parser.add_argument("--batch_size", type=int, default=20, help="network inputs at a time")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument(
        "--settings", nargs="*", default=[], help="such as ddpm:1000 ddim:50 dpm_solver++:10"
    )
    return parser.parse_args()


def parse_setting(text: str) -> tuple[str, int]:
    sampler, _, steps = text.partition(":")
    return sampler, int(steps)


def has_lesion(case: Case) -> bool:
    return case.mask is not None and bool((case.mask >= 0.5).any())


def row(segmenter: Segmenter, cases: list[Case], label: str) -> str:
    """Segment all cases and write a row of the table."""
    group = max(1, segmenter.plan.batch_size // segmenter.plan.num_ensemble)
    started = time.perf_counter()
    results = []
    for start in tqdm(range(0, len(cases), group), desc=label, leave=False, disable=None):
        results += segmenter.segment(cases[start : start + group])
    seconds = time.perf_counter() - started

    truths = [case.mask[0] >= 0.5 for case in cases if case.mask is not None]
    fused = [dice(confusion(r.mask, truth)) for r, truth in zip(results, truths, strict=True)]
    single = [
        dice(confusion(member >= 0.5, truth))
        for r, truth in zip(results, truths, strict=True)
        for member in r.members
    ]
    spread = statistics.mean(disagreement(r.members) for r in results)
    masks = len(cases) * segmenter.plan.num_ensemble
    return (
        f"| {label} | {statistics.mean(single):.4f} | {statistics.mean(fused):.4f} "
        f"| {spread:.4f} | {seconds / masks:.3f} |"
    )


if __name__ == "__main__":
    main()
