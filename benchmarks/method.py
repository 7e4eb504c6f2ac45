"""Compare objectives of training with each other and with the plain U-Net, on real pictures.

    python benchmarks/method.py --data DIR

DIR holds ``isbi2016_256``, ``kvasir_256`` and ``brats15_2d``; what is missing is left out. The
*screen* trains every recipe for a few steps on ISIC and scores it on validation cases. The *finals*
train the best ones, the parents' settings and the U-Net longer, on all sets and with several seeds;
how far members spread is chosen on validation cases, and the test cases are scored once. The
*evaluations* look at one network of the winner: samplers, counts of evaluations, sizes of ensembles
and mask guidance. The *members* ask every network of the winner for masks that spread as they
err, beside the U-Net, and the *ensembles* all seeds of either together. Every finished run is a
line of ``results/method.jsonl`` and is not repeated; ``results/method.md`` is written
from the lines; ``figures.py`` draws them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from method_tables import PARENTS, UNET, Json, tables
from torch import Tensor
from torch.utils.data import Dataset
from versions import ends_with_newline, read

from guided_diffusion import logger
from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.data.splits import narrowed
from guided_diffusion.dist_util import describe, dev, place_model
from guided_diffusion.errors import UserError, exit_on_user_error
from guided_diffusion.inference.drawing import TrainedNetwork
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions, TrainingOptions
from guided_diffusion.scoring.calibration import (
    Tally,
    brier_score,
    calibration_error,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    spread_skill,
)
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.validation import score_of

SPLITS = Path(__file__).parent / "splits"
SETS = {
    "isic": ("isbi2016_256/Train", "isbi2016_256/Test"),
    "kvasir": ("kvasir_256/train", "kvasir_256/val"),
    "brats": ("brats15_2d/training", "brats15_2d/testing"),
}
NETWORK: Json = {
    "num_channels": 32,
    "channel_mult": "1,2,3,4",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 1,
}
X0: Json = {"predict_xstart": True, "mask_range": "-1,1"}
GUIDANCE = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5)


def recipes() -> dict[str, Json]:
    """The recipes of the screen by name: flags of training."""
    found: dict[str, Json] = {UNET: {"version": "unet"}, PARENTS: {}, "x0 mse": X0}
    for loss, b, q in (
        *(("mse", 1, 0.5), ("mse", 0.2, 0.5), ("bce", 1, 0), ("bce", 0.2, 0)),
        *(("bce", 1, 0.5), ("bce", 0.2, 0.5), ("dice_ce", 1, 0.3), ("dice_ce", 1, 0.5)),
        *(("dice_ce", 0.5, 0.5), ("dice_ce", 0.2, 0.3), ("dice_ce", 0.2, 0.5)),
        *(("dice_ce", 0.2, 0.7), ("dice_ce", 0.1, 0.5), ("dice_ce", 0.5, 0.7)),
    ):
        own = {"mask_loss": loss, "input_scale": b, "mask_dropout": q}
        found[f"{loss} b={b:g} q={q:g}"] = (X0 if loss == "mse" else {}) | own
    for q, n in ((0.25, 0.25), (0.35, 0.35)):
        found[f"dice_ce b=0.2 q={q:g} n={n:g}"] = {
            **{"mask_loss": "dice_ce", "input_scale": 0.2, "mask_dropout": q, "noise_share": n}
        }
    return found


def evaluations(recipe: Json) -> dict[str, Json]:
    """The ways in which networks of a recipe are asked, by name: flags of sampling."""
    if recipe.get("version") == "unet":
        return {"direct": {"sampler": "direct", "num_ensemble": 1}}
    found: dict[str, Json] = {
        f"{n} x 4": {"sampler": "ddim", "steps": n, "num_ensemble": 4} for n in (1, 5, 10)
    }
    if recipe.get("mask_dropout"):
        found = {"direct": {"sampler": "direct", "num_ensemble": 1}} | found
        found["5 x 4, w = 1.5"] = found["5 x 4"] | {"mask_guidance": 1.5}
    return found


@dataclass(frozen=True)
class Data:
    """A data set in memory: cases to train on, at the network's size, and others to score."""

    training: list[Case]
    validation: list[Case]
    testing: list[Case]
    channels: int


class Listed(Dataset[Case]):
    """Cases in memory as a data set."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Case:
        return self.cases[index]


DATA: dict[str, Data] = {}


def load(folder: Path, name: str, size: int, cases: int) -> Data:
    """Read a data set; ``cases`` to validate and to test on at most, 0 for all."""
    first, second = (open_dataset(folder / part) for part in SETS[name])
    split = SPLITS / f"{name}.txt"
    training = ResizedDataset(narrowed(first, split, "training"), Frame(size))
    held_out = narrowed(first, split, "validation")
    return Data(
        training=[training[index] for index in range(len(training))],
        validation=spread_out(held_out, min(cases or 60, 60)),
        testing=spread_out(second, cases),
        channels=first.channels,
    )


def spread_out(dataset: SegmentationDataset, most: int) -> list[Case]:
    """Up to so many cases, evenly spread; 0 for all."""
    number = min(most or len(dataset), len(dataset))
    return [dataset[index * len(dataset) // number] for index in range(number)]


def main() -> None:
    arguments = parse()
    logger.configure(quiet=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        if (arguments.data / SETS[name][0]).exists():
            DATA[name] = load(arguments.data, name, arguments.size, arguments.cases)
    if not DATA:
        wanted = ", ".join(SETS[name][0] for name in arguments.sets)
        raise UserError(f"--data {arguments.data}", f"holds none of {wanted}", "Name their folder.")
    # The screen chooses who goes on; the ensembles find the weights of the members.
    for group in (("screen",), ("evaluations", "finals", "members"), ("ensembles",)):
        done = read(arguments.out)
        jobs = [
            job
            for stage in group
            if stage in arguments.stages
            for job in STAGES[stage](arguments, done)
            if not any(all(line.get(key) == value for key, value in job.items()) for line in done)
        ]
        for line in results(jobs, arguments):
            with arguments.out.open("a+", encoding="utf-8") as file:
                file.write(f"{'' if ends_with_newline(file) else chr(10)}{json.dumps(line)}\n")
            print(
                f"{line['stage']}, {line['set']}, {line['recipe']}, seed {line['seed']}: ", end=""
            )
            print(brief(line), flush=True)
    text = tables(read(arguments.out))
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("results/method.jsonl"))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--size", type=int, default=64, help="pixels, of the network")
    parser.add_argument("--screen_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1200, help="of the finals")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", help="of the screen; all by default")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--cases", type=int, default=0, help="to score at most; 0: all")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="falls linearly to 0")
    parser.add_argument("--weights", type=Path, help="folder that keeps the trained weights")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one device")
    parser.add_argument("--commit", default="", help="of the code; empty: what git says")
    return parser.parse_args()


def results(jobs: Sequence[Json], arguments: argparse.Namespace) -> Iterator[Json]:
    """Yield the line of every run, as runs finish."""
    if arguments.jobs == 1:
        yield from (run(job, arguments) for job in jobs)
        return
    fork = multiprocessing.get_context("fork")  # the data in memory are shared
    ends = (signal.SIGTERM, signal.SIG_DFL)  # what the package installs is for one process
    pool = ProcessPoolExecutor(
        arguments.jobs, mp_context=fork, initializer=signal.signal, initargs=ends
    )
    failed = []
    try:
        for future in as_completed([pool.submit(run, job, arguments) for job in jobs]):
            if error := future.exception():
                failed.append(error)
            else:
                yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise failed[0]


def job_of(
    arguments: argparse.Namespace, stage: str, name: str, recipe: str, seed: int | str, steps: int
) -> Json:
    """What identifies a run; of an ensemble, the seeds joined by '+'."""
    return {
        "stage": stage,
        "set": name,
        "recipe": recipe,
        "seed": seed,
        "size": arguments.size,
        "steps": steps,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
    }


def screen(arguments: argparse.Namespace, done: Sequence[Json]) -> Iterator[Json]:
    """Every recipe, on the first set, with the first seed."""
    for recipe in arguments.recipes or recipes():
        steps, seed = arguments.screen_steps, arguments.seeds[0]
        yield job_of(arguments, "screen", next(iter(DATA)), recipe, seed, steps)


def finals(arguments: argparse.Namespace, done: Sequence[Json]) -> Iterator[Json]:
    """The U-Net, the parents' settings, README's recipe and the best of the screen."""
    chosen = dict.fromkeys((UNET, PARENTS, "x0 mse", *best(done, arguments.finalists)))
    for name in DATA:
        for seed in arguments.seeds:
            for recipe in chosen:
                yield job_of(arguments, "finals", name, recipe, seed, arguments.steps)


def best(done: Sequence[Json], number: int) -> list[str]:
    """The recipes with a direct answer whose better one-evaluation mask is best in validation."""

    def score(line: Json) -> float:
        found = line["validation"]
        return float(max(found["direct"]["dice"], found["1 x 4"]["dice"]))

    lines = [
        line
        for line in done
        if line["stage"] == "screen" and {"direct", "1 x 4"} <= line["validation"].keys()
    ]
    return [line["recipe"] for line in sorted(lines, key=score, reverse=True)[:number]]


def walks(arguments: argparse.Namespace, done: Sequence[Json]) -> Iterator[Json]:
    """One network of the best recipe of the screen."""
    for recipe in best(done, 1):
        first = next(iter(DATA))
        yield job_of(arguments, "evaluations", first, recipe, arguments.seeds[0], arguments.steps)


def members(arguments: argparse.Namespace, done: Sequence[Json]) -> Iterator[Json]:
    """The networks of the best recipe, and U-Nets, one by one."""
    for recipe in (*best(done, 1), UNET):
        for name in DATA:
            for seed in arguments.seeds:
                yield job_of(arguments, "members", name, recipe, seed, arguments.steps)


def ensembles(arguments: argparse.Namespace, done: Sequence[Json]) -> Iterator[Json]:
    """The networks of the best recipe, and U-Nets, all seeds together."""
    together = "+".join(map(str, arguments.seeds))
    for name in DATA:
        for recipe in (*best(done, 1), UNET):
            yield job_of(arguments, "ensembles", name, recipe, together, arguments.steps)


STAGES = {
    "screen": screen,
    "finals": finals,
    "evaluations": walks,
    "members": members,
    "ensembles": ensembles,
}


def run(job: Json, arguments: argparse.Namespace) -> Json:
    """Train and score one network."""
    torch.set_num_threads(1 if arguments.jobs > 1 else torch.get_num_threads())
    data, recipe = DATA[job["set"]], recipes()[job["recipe"]]
    device = dev("0")
    started = time.perf_counter()
    segmenter = together(job, arguments, data, recipe, device)
    line = {
        **job,
        "flags": recipe,
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(parameter.numel() for parameter in segmenter.net.parameters()),
        "device": describe(device),
        "jobs": arguments.jobs,
        "torch": torch.__version__,
        "commit": arguments.commit or commit(),
    }
    asked = evaluations(recipe)
    if job["stage"] == "evaluations":
        line["validation"] = scores(segmenter, data.validation, grid())
        return line
    if job["stage"] in ("members", "ensembles"):
        asked = ways_to_spread(recipe, networks=1 + len(segmenter.others))
        line["validation"] = scores(segmenter, data.validation, asked)
        line["chosen"] = spreading(line["validation"]) if len(asked) > 1 else next(iter(asked))
        first = [name for name in asked if name in ("direct", "1 x 8", "1 x 4")]
        asked = {name: asked[name] for name in first} | {"chosen": asked[line["chosen"]]}
        line["test"] = scores(segmenter, data.testing, asked, keep=True)
        return line
    line["validation"] = scores(segmenter, data.validation, asked)
    if job["stage"] == "finals":
        if recipe.get("mask_dropout"):
            w = guidance(segmenter, data.validation)
            line["mask_guidance"] = w
            asked["5 x 4, w chosen"] = asked.pop("5 x 4, w = 1.5") | {"mask_guidance": w}
            asked["1 x 12"] = asked["1 x 4"] | {"num_ensemble": 12}
        if job["recipe"] == PARENTS:
            asked["50 x 4"] = asked["5 x 4"] | {"steps": 50}
        line["test"] = scores(segmenter, data.testing, asked, keep=True)
    return line


def commit() -> str:
    """The commit of the code, with a mark where files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


def together(
    job: Json, arguments: argparse.Namespace, data: Data, recipe: Json, device: torch.device
) -> Segmenter:
    """The networks of the seeds of a job, as one; their weights are kept if that is asked for."""
    found: list[Segmenter] = []
    for seed in str(job["seed"]).split("+"):
        own = job | {"seed": int(seed)}
        name = "-".join(str(own[key]) for key in ("set", "recipe", "seed", "size", "steps"))
        file = arguments.weights / f"{name}.pt" if arguments.weights else None
        if file and file.exists():
            found.append(segmenter_of(own, data, recipe, device))
            found[-1].net.load_state_dict(torch.load(file, map_location=device))
            continue
        found.append(trained(own, data, recipe, device))
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found[-1].net.state_dict(), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    found[0].others = tuple(TrainedNetwork(one.net, one.diffusion, one.plan) for one in found[1:])
    return found[0]


def segmenter_of(job: Json, data: Data, recipe: Json, device: torch.device) -> Segmenter:
    """A network of a recipe, not trained yet."""
    torch.manual_seed(job["seed"])
    net, diffusion = create_model_and_diffusion(
        **NETWORK, **recipe, image_size=job["size"], in_ch=data.channels + 1
    )
    plan = make_plan(SamplingOptions(steps=1), RunOptions(), diffusion, device=device, own=True)
    net = place_model(net, device)
    return Segmenter(net, diffusion, frame=Frame(job["size"]), plan=plan)


def trained(job: Json, data: Data, recipe: Json, device: torch.device) -> Segmenter:
    """Train a network; its averaged weights draw."""
    segmenter = segmenter_of(job, data, recipe, device)
    options = TrainingOptions(
        batch_size=job["batch_size"],
        lr=job["lr"],
        lr_anneal_steps=job["steps"],
        warmup_steps=min(50, job["steps"] // 4),
        grad_clip=1.0,
        ema_rate="0.99",
    )
    folder = Path(os.devnull)  # nothing is saved
    setup = TrainSetup(
        net=place_model(segmenter.net, device, training=True),
        diffusion=segmenter.diffusion,
        dataset=Listed(data.training),
        options=options,
        run=RunOptions(out_dir=str(folder), seed=job["seed"]),
    )
    loop = TrainLoop(setup)
    batches = training_batches(
        setup.dataset, options.batch_size, seed=job["seed"], augmentation=Augmentation()
    )
    for _ in range(job["steps"]):
        loop.run_step(next(batches))
        if loop.step % 100 == 0:
            loop.log.means(loop.parameters)
    segmenter.net.load_state_dict(loop.averages["0.99"].state_dict())
    place_model(segmenter.net, device)
    return segmenter


def scores(
    segmenter: Segmenter, cases: Sequence[Case], asked: dict[str, Json], *, keep: bool = False
) -> dict[str, Json]:
    """Score a network on some cases, asked in several ways; ``keep`` the Dice of every case."""
    return {name: score(segmenter, cases, flags, keep=keep) for name, flags in asked.items()}


def score(segmenter: Segmenter, cases: Sequence[Case], flags: Json, *, keep: bool) -> Json:
    """Score a network, asked in one way, at the size of each case."""
    options = SamplingOptions(batch_size=256 if segmenter.device.type == "cuda" else 8, **flags)
    segmenter.plan = make_plan(
        options, RunOptions(), segmenter.diffusion, device=segmenter.device, own=True
    )
    segmenter.others = tuple(one._replace(plan=segmenter.plan) for one in segmenter.others)
    images = torch.stack([segmenter.frame.fit_image(case.image) for case in cases])
    started = time.perf_counter()
    drawn = segmenter.draw_with_coarse(images, [case.name for case in cases])
    seconds = time.perf_counter() - started
    dice, spread, error, doubt, tally = [], [], [], [], Tally.empty()
    for index, case in enumerate(cases):
        assert case.mask is not None
        result = segmenter.finish(case, drawn.case(index))
        truth = case.mask[0] >= 0.5
        dice.append(score_of(case, result).dice)
        tally = tally.plus(Tally.of(result.fused.numpy(), truth.numpy()))
        doubt.append(doubted(result.fused))
        between, wrong = distances(result.members >= 0.5, truth)
        spread.append(between)
        error.append(wrong)
    several = len(result.members) > 1
    return {
        "dice": round(float(np.mean(dice)), 5),
        "member_dice": round(1 - float(np.mean(error)), 5),
        "spread_skill": round(spread_skill(spread, error), 4) if several else None,
        "error_rank_correlation": round(rank_correlation(spread, 1 - np.array(dice)), 4)
        if several
        else None,
        "ece": round(calibration_error(tally), 5),
        "nll": round(negative_log_likelihood(tally), 5),
        "brier": round(brier_score(tally), 5),
        "seconds_a_case": round(seconds / len(cases), 5),
        **(kept(dice, spread, doubt, tally, several=several) if keep else {}),
    }


def kept(
    dice: list[float], spread: list[float], doubt: list[float], tally: Tally, *, several: bool
) -> Json:
    """What figures are drawn from: scores of every case, and the reliability curve."""

    def rounded(values: list[float]) -> list[float]:
        return [round(value, 4) for value in values]

    curve = [
        (bin.pixels, round(bin.probability, 4), round(bin.frequency, 4))
        for bin in reliability(tally)
    ]
    found = {"cases": rounded(dice), "doubt": rounded(doubt), "reliability": curve}
    return found | ({"spread": rounded(spread)} if several else {})


def doubted(fused: Tensor) -> float:
    """How doubtful a soft mask is: 1 - the Dice that is expected of its threshold at 0.5."""
    mask = fused >= 0.5
    size = float(mask.sum() + fused.sum())
    return 1 - 2 * float(fused[mask].sum()) / size if size else 0.0


def distances(members: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean 1 - Dice between members, bool [E, H, W], and of members with the truth, bool [H, W]."""
    masks = torch.cat([members, truth[None]]).flatten(1).float()
    common, sizes = masks @ masks.T, masks.sum(dim=1)
    both = sizes[:, None] + sizes
    gap = torch.where(both > 0, 1 - 2 * common / both.clamp(min=1), 0.0)
    count = len(members)
    pairs = gap[:count, :count].sum() / max(count * (count - 1), 1)
    return float(pairs), float(gap[:count, count].mean())


def guidance(segmenter: Segmenter, cases: Sequence[Case]) -> float:
    """Choose the mask guidance with which members of 5 evaluations spread as they err."""

    def gap(w: float) -> float:
        flags = {"sampler": "ddim", "steps": 5, "num_ensemble": 4, "mask_guidance": w}
        return abs(score(segmenter, cases, flags, keep=False)["spread_skill"] - 1)

    return min(GUIDANCE, key=gap)


def ways_to_spread(recipe: Json, networks: int) -> dict[str, Json]:
    """The ways to ask networks for members that differ as they err: flags of sampling."""
    found: dict[str, Json] = {"direct": {"sampler": "direct", "num_ensemble": 1}}
    if recipe.get("version") == "unet":
        return found
    each = 8 if networks == 1 else 4
    found[f"1 x {each}"] = {"sampler": "ddim", "steps": 1, "num_ensemble": each}
    fast: Json = {"sampler": "unipc", "order": 3, "skip_type": "time_quadratic"}
    for name, own, counts in (
        ("unipc 3, time_quadratic", fast, (2, 5)),
        ("dpm_solver++", {"sampler": "dpm_solver++"}, (3, 5)),
    ):
        for n in counts:
            for w in (1.0, 1.25, 1.5):
                found[f"{name}, {n} x {each}, w = {w:g}"] = {
                    **own,
                    **{"steps": n, "num_ensemble": each, "mask_guidance": w},
                }
    return found


def spreading(found: dict[str, Json], most: float = 0.1) -> str:
    """Choose members by validation: the best fused Dice of those that spread as they err.

    Where none has a ratio of spread and error within ``most`` of 1, the one whose ratio is nearest.
    """
    gaps = {
        name: abs(value["spread_skill"] - 1)
        for name, value in found.items()
        if value["spread_skill"] is not None
    }
    near = [name for name, gap in gaps.items() if gap <= most]
    if near:
        return max(near, key=lambda name: float(found[name]["dice"]))
    return min(gaps, key=lambda name: gaps[name])


def grid() -> dict[str, Json]:
    """The ways to ask one network: samplers, counts, ensembles and mask guidance."""
    found: dict[str, Json] = {"direct": {"sampler": "direct", "num_ensemble": 1}}
    kinds: dict[str, Json] = {
        "ddim": {"sampler": "ddim"},
        "ddim, eta 1": {"sampler": "ddim", "eta": 1.0},
        "dpm_solver++": {"sampler": "dpm_solver++"},
        "unipc": {"sampler": "unipc"},
        "unipc 3, time_quadratic": {"sampler": "unipc", "order": 3, "skip_type": "time_quadratic"},
    }
    for name, own in kinds.items():
        for n in (1, 2, 3, 5, 10, 50):
            found[f"{name}, {n} x 8"] = own | {"steps": n, "num_ensemble": 8}
    for members in (2, 4, 12, 25):
        for n in (1, 2, 5):
            found[f"ddim, {n} x {members}"] = {
                **{"sampler": "ddim", "steps": n, "num_ensemble": members}
            }
    for w in (0.5, 0.75, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0):
        for n in (2, 5, 10):
            found[f"ddim, {n} x 8, w = {w:g}"] = {
                **{"sampler": "ddim", "steps": n, "num_ensemble": 8, "mask_guidance": w}
            }
    return found


def brief(line: Json) -> str:
    """The Dice of a run's answers."""
    found = line.get("test") or line["validation"]
    return ", ".join(f"{name} {value['dice']:.4f}" for name, value in list(found.items())[:8])


if __name__ == "__main__":
    with exit_on_user_error():
        main()
