"""Measure the time of scoring a folder of pictures with ensembles, and one patient's volume.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --truth $REAL_DATA/isbi2016_256/Test

Predictions are the true masks shifted, blurred and with noise: five members per case, in the files
that sampling writes. Without --truth, the true masks are synthetic as well. All metrics and the
report are computed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.inference.provenance import describe_run
from guided_diffusion.layouts import open_masks
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.report.report import write_report
from guided_diffusion.scoring.evaluate import evaluate_all

VOLUME = (240, 240, 155)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--truth", default="", help="data set with masks; empty: synthetic")
    parser.add_argument("--cases", type=int, default=300, help="pictures to score")
    parser.add_argument("--members", type=int, default=5, help="masks per case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, one thread\n")
    print("| what | scored, s | of processor | report, s | of processor | MB | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch, exit_on_user_error():
        folder = Path(scratch)
        truth = Path(arguments.truth or write_truth(folder / "gt", arguments.cases))
        write_predictions(truth, folder / "pred", arguments.cases, arguments.members)
        row(f"{arguments.cases} pictures, {arguments.members} members", folder / "pred", truth)
        write_volume(folder / "volume")
        size = " x ".join(map(str, VOLUME))
        row(f"a patient of {size}", folder / "volume/pred", folder / "volume/gt")


def row(what: str, predicted: Path, truth: Path) -> None:
    start = now()
    evaluation = evaluate_all(predicted, truth, partial=True)
    scored = now()
    report = write_report(evaluation, describe_run(predicted))
    done = now()
    spent = [f"{b - a:.1f}" for pair in ((start, scored), (scored, done)) for a, b in zip(*pair)]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {what} | {' | '.join(spent)} | {report.stat().st_size / 1e6:.1f} | {memory:.0f} |")


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def write_truth(folder: Path, cases: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for case in range(cases):
        noise = gaussian_filter(generator.normal(size=(256, 256)), 24)
        mask = noise > np.quantile(noise, generator.uniform(0.6, 0.95))
        Image.fromarray(soft_png(mask)).save(folder / f"{case:04d}.png")
    return folder


def write_predictions(truth: Path, folder: Path, cases: int, members: int) -> None:
    folder.mkdir()
    generator = np.random.default_rng(1)
    for name, mask in list(open_masks(truth).items())[:cases]:
        drawn = [perturbed(mask(), generator) for _ in range(members)]
        for index, member in enumerate(drawn):
            Image.fromarray(soft_png(member)).save(folder / f"{name}_output{index}.png")
        Image.fromarray(soft_png(np.mean(drawn, axis=0))).save(folder / f"{name}_output_ens.png")


def perturbed(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    shifted = np.roll(mask, generator.integers(-9, 10, mask.ndim), axis=tuple(range(mask.ndim)))
    noise = gaussian_filter(generator.normal(size=mask.shape), 2) * 2
    return np.clip(gaussian_filter(shifted.astype(np.float32), 3) + noise * (shifted > 0), 0, 1)


def write_volume(folder: Path) -> None:
    axes = np.meshgrid(*(np.linspace(-1, 1, length) for length in VOLUME), indexing="ij")
    truth = (axes[0] ** 2 + (axes[1] - 0.2) ** 2 + axes[2] ** 2 < 0.12).astype(np.uint8)
    soft = gaussian_filter(np.roll(truth, 3, axis=0).astype(np.float32), 1.5)
    for name, values in (("gt/p_seg", truth), ("pred/p_output_ens", soft)):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)


if __name__ == "__main__":
    main()
