"""Compare the versions of the network with each other and with a U-Net without diffusion.

    python benchmarks/versions.py --isic data/ISIC

trains each for the same CPU time (on a CUDA device: wall-clock time) on the demo's slices and, if
``--isic`` names their folder, on skin lesions, at 64 pixels with the demo's flags and the same
seeds. Every finished run is a line of a JSON lines file and is not repeated. At the end the table
is written from all lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.cache import CachedDataset
from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.frames import WOLLEB_CROP, Frame, ResizedDataset
from guided_diffusion.dist_util import describe, dev, place_model
from guided_diffusion.ensemble import BLENDS
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.plan import SamplingPlan, make_plan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.validation import chosen_cases, score_of
from guided_diffusion.unet import UNetModel

FLAGS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 32,
    "channel_mult": "1,2,3,4",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 1,
    "predict_xstart": True,
    "mask_range": "-1,1",
}
METHODS = ("plain", "1", "new", "2", "unet")
RATES = {"demo": 1e-3, "isic": 5e-4}
NAMES = {"unet": "the same U-Net, no diffusion", "plain": "plain"}


def main() -> None:
    arguments = parse()
    logger.configure(quiet=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(arguments.out)
    sets = {"demo": (arguments.data / "training", arguments.data / "testing")}
    if arguments.isic:
        sets["isic"] = (arguments.isic / "Train", arguments.isic / "Test")
    for key in wanted(arguments, sets):
        if any(all(line[name] == value for name, value in key.items()) for line in done):
            continue
        print(", ".join(f"{name} {value}" for name, value in key.items()), flush=True)
        train_dir, test_dir = sets[key["set"]]
        line = {**key, **run(key, open_dataset(train_dir), open_dataset(test_dir), arguments)}
        with arguments.out.open("a+", encoding="utf-8") as file:
            file.write(f"{'' if ends_with_newline(file) else chr(10)}{json.dumps(line)}\n")
        done.append(line)
    text = table(done, arguments)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/versions.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="training/ and testing/")
    parser.add_argument("--isic", type=Path, help="folder of ISIC's Train/ and Test/")
    parser.add_argument("--budget", type=float, default=180, help="seconds of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=5, help="evaluations of a mask")
    parser.add_argument("--num_ensemble", type=int, default=5)
    parser.add_argument("--cases", type=int, default=100, help="test cases of a set; 0: all")
    parser.add_argument("--gpu_dev", default="0")
    return parser.parse_args()


def wanted(arguments: argparse.Namespace, sets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the key of each run; seeds vary slowest, so that an early table compares all."""
    for seed in arguments.seeds:
        for name in sets:
            for method in arguments.methods:
                yield {
                    "set": name,
                    "method": method,
                    "seed": seed,
                    "budget": arguments.budget,
                    "cases": arguments.cases,
                    "evaluations": 1 if method == "unet" else arguments.steps,
                    "members": 1 if method == "unet" else arguments.num_ensemble,
                }


def read(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs; incomplete lines are skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def ends_with_newline(file: TextIO) -> bool:
    """Say whether the last line is complete, as it is unless a run was killed while writing."""
    file.seek(0)
    return file.read()[-1:] in ("", "\n")


def run(
    key: dict[str, Any],
    training: SegmentationDataset,
    testing: SegmentationDataset,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Train and score a network once."""
    device = dev(arguments.gpu_dev)
    torch.manual_seed(key["seed"])
    net, diffusion = create_model_and_diffusion(
        **FLAGS, in_ch=training.channels + 1, version=key["method"]
    )
    frame = Frame(FLAGS["image_size"], WOLLEB_CROP if key["set"] == "demo" else 0)
    with tempfile.TemporaryDirectory() as folder:
        setup = TrainSetup(
            net=place_model(net, device, training=True),
            diffusion=diffusion,
            dataset=CachedDataset(ResizedDataset(training, frame), directory=Path(folder)),
            options=TrainingOptions(batch_size=8, lr=RATES[key["set"]], ema_rate="0.99"),
            run=RunOptions(out_dir=folder, seed=key["seed"]),
        )
        loop = TrainLoop(setup)
        train(loop, key["budget"])
        net.load_state_dict(loop.averages["0.99"].state_dict())
    segmenter = Segmenter(net, diffusion, frame=frame, plan=plan_of(key, diffusion, device))
    return {
        "steps": loop.step,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "dice": score(segmenter, testing, key["cases"]),
        **timed(net, training.channels, device),
        "device": describe(device),
        "torch": torch.__version__,
    }


def train(loop: TrainLoop, budget: float) -> None:
    """Take training steps until the time budget is spent."""
    clock = time.perf_counter if loop.device.type == "cuda" else time.process_time
    batches = training_batches(loop.setup.dataset, loop.options.batch_size, seed=loop.run.seed)
    end = clock() + budget
    with tqdm(unit="step", disable=None) as progress:
        while clock() < end:
            loop.run_step(next(batches))
            progress.update()
            if loop.step % 100 == 0:
                loop.log.means(loop.parameters)


def plan_of(
    key: dict[str, Any], diffusion: GaussianDiffusion, device: torch.device
) -> SamplingPlan:
    sampler = "direct" if key["method"] == "unet" else "dpm_solver++"
    sampling = SamplingOptions(
        sampler=sampler, steps=key["evaluations"], num_ensemble=key["members"]
    )
    return make_plan(sampling, RunOptions(), diffusion, device=device, own=True)


def score(segmenter: Segmenter, testing: SegmentationDataset, cases: int) -> dict[str, float]:
    """Return the mean Dice at the original sizes, for each rule to blend any coarse mask."""
    scores: dict[str, list[float]] = {}
    for case in tqdm(chosen_cases(testing, cases), unit="case", disable=None):
        fitted = segmenter.frame.fit(case)
        drawn = segmenter.draw_with_coarse(fitted.image[None], [case.name])
        for rule in BLENDS if drawn.coarse is not None else ["none"]:
            segmenter.plan = replace(segmenter.plan, coarse=rule)
            result = segmenter.finish(case, drawn.case(0))
            scores.setdefault(rule, []).append(score_of(case, result).dice)
    return {rule: float(np.mean(values)) for rule, values in scores.items()}


@torch.inference_mode()
def timed(net: UNetModel, channels: int, device: torch.device) -> dict[str, float]:
    """Return milliseconds per evaluation and per encoding of an image, in batches of 8."""
    size = FLAGS["image_size"]
    image, x = torch.rand(8, channels, size, size), torch.rand(8, 1, size, size)
    image, x, t = image.to(device), x.to(device), torch.zeros(8, device=device)
    condition = net.encode(image)
    calls = {
        "ms_per_evaluation": lambda: net(x, t, condition),
        "ms_per_image": lambda: net.encode(image),
    }
    return {name: milliseconds(call, device) / 8 for name, call in calls.items()}


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of five calls, after one that warms up."""
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])


def table(lines: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """Return the Markdown of all finished runs: a table of Dice, and one of the blending rules."""
    command = "python benchmarks/versions.py"
    command += f" --budget {arguments.budget:g}" if arguments.budget != 180 else ""
    command += " --isic DIR" if arguments.isic else ""
    chosen = [line for line in lines if line["budget"] == arguments.budget]
    machines = sorted({f"torch {line['torch']}, {line['device']}" for line in chosen})
    parts = [
        "# The versions compared\n",
        f"    {command}\n",
        f"{arguments.budget:g} s of training each, 64 px, batches of 8, averaged weights; Dice at "
        "the original sizes, where an empty mask for an empty truth counts as 1. Mean and standard "
        f"deviation over the seeds; the versions draw {arguments.num_ensemble} masks with "
        f"{arguments.steps} evaluations each, fused by their mean. {'; '.join(machines)}.\n",
    ]
    for name in sorted({line["set"] for line in chosen}):
        here = [line for line in chosen if line["set"] == name]
        parts += [f"## {name}\n", *compared(here), "", *blended(here), ""]
    return "\n".join(parts)


def compared(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a row per method: Dice without blending, size, time."""
    yield (
        "| network | Dice | seeds | million parameters | training steps | ms per evaluation "
        "| ms per image, once |"
    )
    yield "|---|---|---|---|---|---|---|"
    for method, runs in by_method(lines):
        figures = [
            spread([line["dice"]["none"] for line in runs]),
            str(len(runs)),
            f"{runs[0]['parameters'] / 1e6:.2f}",
            f"{statistics.mean(line['steps'] for line in runs):.0f}",
            f"{statistics.median(line['ms_per_evaluation'] for line in runs):.2f}",
            f"{statistics.median(line['ms_per_image'] for line in runs):.2f}",
        ]
        yield f"| {NAMES.get(method, f'version {method}')} | {' | '.join(figures)} |"


def blended(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a table with a row per network with a coarse mask: Dice by blending rule."""
    rows = [(method, runs) for method, runs in by_method(lines) if len(runs[0]["dice"]) > 1]
    if not rows:
        return
    yield f"| `--coarse` | {' | '.join(BLENDS)} |"
    yield "|---" * (len(BLENDS) + 1) + "|"
    for method, runs in rows:
        cells = [spread([line["dice"][rule] for line in runs]) for rule in BLENDS]
        yield f"| version {method} | {' | '.join(cells)} |"


def by_method(lines: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for method in METHODS:
        runs = [line for line in lines if line["method"] == method]
        if runs:
            yield method, runs


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
