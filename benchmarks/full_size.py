"""Train the published settings and ours at 256 px, in short jobs that continue each other.

    python benchmarks/full_size.py --data DIR --out FOLDER

DIR holds ``isbi2016_256`` and ``brats15_2d``. The trainings take turns of ``--minutes``: each is
told to stop, saves, and continues in its next turn (``--resume auto``), so that any number of calls
reach what one long run would. After a turn, masks of ``--cases`` test cases are drawn and scored.
Every turn is a line of ``results/full_size.jsonl``, and ``results/full_size.md`` is written from
them. A training that has all its steps has no further turn.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from method import commit
from method_tables import Json
from versions import ends_with_newline, read

from guided_diffusion.checkpoint import load_checkpoint
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.errors import UserError, exit_on_user_error

DATA = {
    "isic": ("isbi2016_256/Train", "isbi2016_256/Test", ("--data_name", "ISIC")),
    "brats": ("brats15_2d/training", "brats15_2d/testing", ()),
}


class Job(NamedTuple):
    """A training: its data set, and the presets of training and of sampling."""

    data: str
    train: str
    sample: str


JOBS = (
    Job("isic", "medsegdiff", "fast-isic"),
    Job("brats", "wolleb", "fast-brats"),
    Job("isic", "best", "best"),
    Job("brats", "best", "best"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--runs", type=Path, default=Path("results/full_size.jsonl"))
    parser.add_argument("--minutes", type=float, default=10, help="of training in one turn")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each training")
    parser.add_argument("--presets", nargs="+", default=sorted({job.train for job in JOBS}))
    parser.add_argument("--max_steps", type=int, default=100_000, help="of each training")
    parser.add_argument("--cases", type=int, default=20, help="to draw after a turn; 0: none")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more, of training")
    arguments = parser.parse_args()
    for _ in range(arguments.rounds):
        for job in JOBS:
            if job.train in arguments.presets:
                turn(job, arguments)
    text = table(read(arguments.runs))
    arguments.runs.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def turn(job: Job, arguments: argparse.Namespace) -> None:
    """Train for a while, draw, score, and write the line."""
    out = arguments.out / f"{job.data}-{job.train}"
    before, training, testing = step_of(out), *folders(job, arguments)
    if before >= arguments.max_steps:
        return
    seconds = train(
        [
            *("segmentation_train.py", "--preset", job.train, *training, "--out_dir", out),
            *("--resume", "auto", "--max_steps", arguments.max_steps, *arguments.flags),
        ],
        arguments.minutes * 60,
    )
    line: Json = {
        **job._asdict(),
        "step": step_of(out),
        "steps": step_of(out) - before,
        "seconds": round(seconds, 1),
        "device": describe(dev("0")),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if arguments.cases:
        line |= drawn(job, out, testing, arguments.cases)
    arguments.runs.parent.mkdir(parents=True, exist_ok=True)
    with arguments.runs.open("a+", encoding="utf-8") as file:
        file.write(f"{'' if ends_with_newline(file) else chr(10)}{json.dumps(line)}\n")
    print(json.dumps(line), flush=True)


def folders(job: Job, arguments: argparse.Namespace) -> tuple[list[object], list[object]]:
    """The flags that name the training and the test cases."""
    first, second, more = DATA[job.data]
    return ["--data_dir", arguments.data / first, *more], [
        "--data_dir",
        arguments.data / second,
        *more,
    ]


def step_of(out: Path) -> int:
    """The step that a training has reached."""
    file = out / "savedmodel.pt"
    return load_checkpoint(file).step if file.exists() else 0


def train(words: Sequence[object], seconds: float) -> float:
    """Run a training for so many seconds at most; return how long it took."""
    started = time.perf_counter()
    process = subprocess.Popen(command(words))
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise UserError("the training", f"ended with code {code}", "Its message is above.")
    return time.perf_counter() - started


def command(words: Sequence[object]) -> list[str]:
    """A script of the project with its flags, as words of a command line."""
    script, *flags = map(str, words)
    return [sys.executable, str(ROOT / "scripts" / script), *flags]


def drawn(job: Job, out: Path, testing: Sequence[object], cases: int) -> Json:
    """Draw and score masks of some test cases with the averaged weights."""
    masks = out / "masks" / str(step_of(out))
    started = time.perf_counter()
    sample = ("segmentation_sample.py", "--preset", job.sample, *testing, "--model_path", out)
    score = ("segmentation_env.py", "--inp_pth", masks, "--out_pth", testing[1])
    for words in (
        (*sample, "--out_dir", masks, "--num_samples", cases),
        (*score, "--partial", "True"),
    ):
        subprocess.run(command(words), check=True)
    found = json.loads((masks / "summary.json").read_text(encoding="utf-8"))
    seconds = time.perf_counter() - started
    return {"cases": cases, "dice": round(found["dice"], 4), "seconds_of_masks": round(seconds, 1)}


def table(lines: Sequence[Json]) -> str:
    """Write what each training has reached as Markdown."""
    text = [
        "# 256 px: what has been reached\n",
        "```bash\npython benchmarks/full_size.py --data DIR --out FOLDER\n```\n",
        "| data | preset | steps | minutes of training | Dice | cases | device | commit |",
        "|---" * 8 + "|",
    ]
    for job in dict.fromkeys((line["data"], line["train"]) for line in lines):
        own = [line for line in lines if (line["data"], line["train"]) == job]
        minutes, last = sum(line["seconds"] for line in own) / 60, own[-1]
        dice = f"{last['dice']:.4f}" if "dice" in last else ""
        cells = (*job, last["step"], f"{minutes:.1f}", dice, last.get("cases", ""))
        text.append(f"| {' | '.join(map(str, (*cells, last['device'], last['commit'])))} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    with exit_on_user_error():
        main()
