"""Compare the masks that one checkpoint draws in other precisions, batch sizes and compiled.

    python benchmarks/agreement.py --model_path results/demo --data_dir data/testing

prints one Markdown table. Each way of computing is compared with fp32 by the Dice coefficient of
the two binary masks, the largest difference of a pixel of the soft masks, and the Dice coefficient
against the truth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from guided_diffusion import logger
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.inference.plan import batched
from guided_diffusion.inference.resolve import resolve_sampling
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import SAMPLE
from guided_diffusion.scoring.metrics import confusion, dice

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, one input at a time": {"batch_size": 1},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp32, compiled": {"compile": "default"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model_path", required=True, help="checkpoint or its folder")
    parser.add_argument("--data_dir", required=True, help="labelled data set")
    parser.add_argument("--data_name", default="", help="layout of the data set, if ambiguous")
    parser.add_argument("--steps", type=int, default=5, help="evaluations of DPM-Solver++")
    parser.add_argument("--ways", nargs="*", help=f"some of: {'; '.join(WAYS)}")
    arguments = parser.parse_args()
    chosen = {name: WAYS[name] for name in arguments.ways or WAYS}
    flags = {name: getattr(arguments, name) for name in ("model_path", "data_dir", "data_name")}
    flags |= {"sampler": "dpm_solver++", "steps": arguments.steps}

    with exit_on_user_error():
        logger.configure(quiet=True)
        print(f"{arguments.model_path}, {arguments.steps} evaluations, ensembles of 5")
        print(f"torch {torch.__version__}, {describe(dev())}\n")
        print("| way | Dice with fp32, mean | least | soft mask, largest difference ", end="")
        print("| Dice with truth | s per mask |\n|---|---|---|---|---|---|")
        reference, _, _ = segmented(flags)
        for name, own in chosen.items():
            results, scores, seconds = segmented(flags | own)
            agreement = [
                dice(confusion(result.mask, other.mask))
                for result, other in zip(results, reference, strict=True)
            ]
            difference = max(
                float((result.fused - other.fused).abs().max())
                for result, other in zip(results, reference, strict=True)
            )
            row = f"{statistics.mean(agreement):.4f} | {min(agreement):.4f} | {difference:.2g}"
            print(f"| {name} | {row} | {statistics.mean(scores):.4f} | {seconds:.3f} |", flush=True)


def segmented(flags: dict[str, Any]) -> tuple[list[Segmentation], list[float], float]:
    """Segment all cases: the results, the Dice of those with a lesion, and seconds per mask."""
    setup = resolve_sampling(Flags.of(SAMPLE, **flags))
    assert setup.dataset is not None
    segmenter = Segmenter.from_setup(setup)
    cases = [setup.dataset[index] for index in range(len(setup.dataset))]
    if segmenter.plan.compile:
        segmenter.warm_up(cases[0])
    started = time.perf_counter()
    results = []
    for some in batched(cases, segmenter.plan.cases):
        results += segmenter.segment(some)
    seconds = (time.perf_counter() - started) / len(cases) / segmenter.plan.num_ensemble
    scores = [
        dice(confusion(result.mask, case.mask[0] >= 0.5))
        for result, case in zip(results, cases, strict=True)
        if case.mask is not None and bool((case.mask >= 0.5).any())
    ]
    return results, scores, seconds


if __name__ == "__main__":
    main()
