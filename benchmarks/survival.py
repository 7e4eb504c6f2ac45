"""Kill and signal runs at random moments, continue them, and compare with undisturbed runs.

    python benchmarks/survival.py --kills 300 --signals 100

Each attempt starts a command, ends it at a random moment (SIGKILL, or SIGTERM, SIGINT or SIGHUP, to
the process or to its whole group), and looks at what is left: every file can be read, a signal ends
the run with its exit code, and a training that was told to stop has saved. After some attempts the
command runs to its end; checkpoints, masks, scores and slices must then equal those of a run that
nothing disturbed. One table says how many attempts there were, and what was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PRELOADED = """
import faulthandler, json, os, signal, sys
import torch
torch.set_num_threads(1)
from guided_diffusion.__main__ import main
import guided_diffusion.train_util, guided_diffusion.inference.predict
import guided_diffusion.scoring.evaluate, guided_diffusion.tools.commands
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        for number, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(name, flags), number)
        faulthandler.register(signal.SIGUSR1)
        sys.argv = [job["name"], *job["argv"]]
        os.environ.update(job["environment"])
        main(job["name"])
        sys.exit()
    print("process", child, flush=True)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forker:
    """Runs commands one after another in forks of one process, so that torch is imported once.

    Each run is the leader of its own group of processes.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="survival-"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELOADED],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)

    def start(self, name: str, *argv: object, **environment: str) -> int:
        """Start a command and return its process, once it exists."""
        job = {"name": name, "argv": list(map(str, argv)), "environment": environment}
        job |= {"out": str(self.folder / "out"), "err": str(self.folder / "err")}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.pid = int(self._next("process", 60))
        return self.pid

    def wait(self, timeout: float = 100) -> tuple[int, str, str]:
        """Wait for the end and return exit code (negative after a kill), stdout and stderr.

        Raises:
            TimeoutError: it did not end in so many seconds, and was killed; says where it was.
        """
        try:
            code = int(self._next("code", timeout))
        except queue.Empty:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            os.killpg(self.pid, signal.SIGKILL)
            self._next("code", timeout)
            where = (self.folder / "err").read_text("utf-8")
            raise TimeoutError(f"still running after {timeout} s: {where}") from None
        return code, *((self.folder / name).read_text("utf-8") for name in ("out", "err"))

    def _next(self, kind: str, timeout: float) -> str:
        said, _, value = self.lines.get(timeout=timeout).partition(" ")
        assert said == kind, f"{said} instead of {kind}"
        return value

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder)


SMALL = [
    *("--image_size", "16", "--num_channels", "32", "--channel_mult", "1,2"),
    *("--num_res_blocks", "1", "--attention_resolutions", "8", "--num_heads", "1"),
    *("--diffusion_steps", "100", "--predict_xstart", "True", "--mask_range=-1,1"),
    *("--batch_size", "2", "--ema_rate", "0.9", "--log_interval", "1"),
]


@dataclass
class Scenario:
    """A command to disturb, and what happened.

    Attributes:
        argv: makes its flags from the folder that it writes.
        results: patterns of the files that must be equal in the end.
        saves: whether a signal leaves a checkpoint of the step it came in.
    """

    name: str
    command: str
    argv: Callable[[Path], list[object]]
    results: Sequence[str]
    saves: bool = False
    seconds: float = 0.0
    reference: dict[str, str] = field(default_factory=dict)
    kills: int = 0
    signals: int = 0
    finished: int = 0
    slowest: float = 0.0
    groups: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def scenarios(work: Path) -> list[Scenario]:
    """The commands, on phantoms and a small network that are made in ``work``."""
    data, volumes, trained = work / "data", work / "volumes", work / "trained"
    masks = work / "masks"
    train: list[object] = ["--data_dir", data / "training", *SMALL, "--max_steps", "24"]
    train += ["--save_interval", "3", "--resume", "auto"]
    held_out = ["--val_dir", data / "testing", "--val_interval", "4", "--val_cases", "3"]
    draw: list[object] = ["--model_path", trained, "--num_ensemble", "2", "--steps", "4"]
    draw += ["--batch_size", "2"]
    models, pictures = ["savedmodel.pt"], ["*.png", "predictions.csv"]
    return [
        Scenario(
            *("training", "train", lambda out: [*train, "--out_dir", out], models), saves=True
        ),
        Scenario(
            *("training, 2 readers", "train"),
            *(lambda out: [*train, "--out_dir", out, "--num_workers", "2"], models),
            saves=True,
        ),
        Scenario(
            *("training with validation", "train"),
            *(lambda out: [*train, *held_out, "--out_dir", out], [*models, "bestmodel.pt"]),
            saves=True,
        ),
        Scenario(
            *("sampling of slices", "sample"),
            *(lambda out: [*draw, "--data_dir", data / "testing", "--out_dir", out], pictures),
        ),
        Scenario(
            *("sampling of volumes", "sample"),
            *(lambda out: [*draw, "--data_dir", volumes, "--out_dir", out], ["*.nii.gz"]),
        ),
        Scenario(
            *("sampling, 3 writers", "sample"),
            *(
                lambda out: [*draw, "--data_dir", volumes, "--out_dir", out, "--writers", "3"],
                ["*.nii.gz", *pictures],
            ),
        ),
        Scenario(
            *("scoring", "score"),
            lambda out: ["--inp_pth", copy_of(masks, out), "--out_pth", data / "testing"],
            ["scores.csv", "summary.json"],
        ),
        Scenario(
            *("slicing of volumes", "slices"),
            *(
                lambda out: ["--src", volumes, "--out", out, "--slices", "0:4", "--workers", "2"],
                ["**/*.nii.gz"],
            ),
        ),
    ]


def copy_of(folder: Path, out: Path) -> Path:
    """Copy results once, so that scoring writes beside its own."""
    if not out.exists():
        shutil.copytree(folder, out)
    return out


def prepare(work: Path, forker: Forker) -> None:
    """Write phantoms, a trained network and masks."""

    def run(name: str, *argv: object) -> None:
        forker.start(name, *argv)
        code, out, err = forker.wait()
        if code:
            sys.exit(f"{name} failed: {out}{err}")

    shape = ["--size", "40", "--slices", "4"]
    run("phantoms", "--out", work / "data", "--patients", "8", *shape)
    run("phantoms", "--out", work / "volumes", "--layout", "brats3d", "--patients", "4", *shape)
    common = ["--data_dir", work / "data/training", *SMALL]
    run("train", *common, "--max_steps", "3", "--out_dir", work / "trained")
    draw = ["--num_ensemble", "2", "--steps", "2", "--data_dir", work / "data/testing"]
    run("sample", "--model_path", work / "trained", *draw, "--out_dir", work / "masks")


def digests(out: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Digests of the contents of result files, without times and paths."""
    found = {}
    for path in sorted(path for pattern in patterns for path in out.glob(pattern)):
        found[str(path.relative_to(out))] = hashlib.sha256(content(path)).hexdigest()
    return found


def content(path: Path) -> bytes:
    """Read the part of a result that a repeated run must equal; fails if the file is torn."""
    import nibabel as nib
    import numpy as np
    import torch
    from PIL import Image

    if path.suffix == ".pt":
        from guided_diffusion.checkpoint import load_checkpoint

        saved = load_checkpoint(path)
        tensors: list[Any] = [saved.model, saved.ema, saved.training["optimizer"]["state"]]
        values = torch.utils._pytree.tree_leaves(tensors)
        return b"".join(torch.as_tensor(value).numpy().tobytes() for value in values)
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return np.asarray(picture).tobytes()
    if path.name.endswith(".nii.gz"):
        return np.asarray(nib.load(path).dataobj).tobytes()
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("a row is torn")
        return repr([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
    if path.suffix == ".json":
        is_log = path.name == "progress.json"
        text = path.read_text("utf-8")
        values = [json.loads(line) for line in text.splitlines()] if is_log else json.loads(text)
        if path.name == "summary.json":
            values = {key: values[key] for key in sorted(values) if key not in ("folder", "run")}
        return json.dumps(values).encode()
    return b""


def look(out: Path) -> list[str]:
    """List what is torn among the files of a folder; names that begin with a dot are not done."""
    torn = []
    for path in sorted(out.rglob("*")):
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(out).parts):
            try:
                content(path)
            except Exception as error:
                torn.append(f"{path.name} is torn ({type(error).__name__}: {error})")
    return torn


def attempt(
    scenario: Scenario, out: Path, forker: Forker, chance: random.Random, number: int
) -> None:
    """Start the command, end it at a random moment, and look at what is left."""
    group = chance.random() < 0.5
    pid = forker.start(scenario.command, *scenario.argv(out))
    scenario.groups.append(pid)
    time.sleep(scenario.seconds * chance.random())
    step = last_step(out)
    sent = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)
    told = signal.Signals(number).name + (" to the group" if group else "")
    try:
        code, printed, err = forker.wait()
    except TimeoutError as error:
        scenario.faults.append(f"{told}: {error}")
        return
    elapsed = time.monotonic() - sent
    if code == 0:
        scenario.finished += 1
    if number == signal.SIGKILL:
        scenario.kills += 1
        expected = {0, -9}
    else:
        scenario.signals += 1
        scenario.slowest = max(scenario.slowest, elapsed)
        expected = {0, 128 + number, -number}  # the last before and after the command's work
        if scenario.saves and code and last_step(out) < step:
            scenario.faults.append(f"{told}: step {step} is lost, {last_step(out)} is saved")
        if elapsed > 5:
            scenario.faults.append(f"{told}: it took {elapsed:.1f} s to end")
    if code not in expected or "Traceback" in err:
        scenario.faults.append(f"{told}: exit code {code}, {printed[-200:]}{err[-2000:]}")
    scenario.faults += [f"{told}: {fault}" for fault in look(out)]


def stragglers(groups: Sequence[int], seconds: float = 20) -> list[int]:
    """List the groups of which some process is still there after a while."""
    limit = time.monotonic() + seconds
    there = list(groups)
    while there and time.monotonic() < limit:
        there = [group for group in there if exists(group)]
        time.sleep(0.1)
    return there


def exists(group: int) -> bool:
    """Whether a group has a process; one that has ended, and is not waited for, does not count."""
    if not Path("/proc/self/stat").exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
        return False
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group, *_ = path.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def last_step(out: Path) -> int:
    """The last step that a training has logged or, once it has ended, saved."""
    path = out / "progress.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return max((int(row["step"]) for row in csv.DictReader(file)), default=0)
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def finish(scenario: Scenario, out: Path, forker: Forker) -> float:
    """Run the command to its end and compare; returns the seconds it took."""
    started = time.monotonic()
    forker.start(scenario.command, *scenario.argv(out))
    code, printed, err = forker.wait(300)
    if code:
        scenario.faults.append(f"it was not continued: exit code {code}, {printed[-200:]}{err}")
    found = digests(out, scenario.results)
    if not scenario.reference:
        scenario.reference = found
    elif found != scenario.reference:
        names = {name for name, _ in found.items() ^ scenario.reference.items()}
        scenario.faults.append(f"differs from the undisturbed run: {', '.join(sorted(names))}")
    if not found:
        scenario.faults.append("there are no results")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and signal runs, and count what is lost.")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--every", type=int, default=6, help="attempts between two full runs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    lines, faults = survive(options.kills, options.signals, options.every, options.seed)
    print("\n".join(lines))
    sys.exit(1 if faults else 0)


def survive(kills: int, signals: int, every: int, seed: int) -> tuple[list[str], list[str]]:
    """Disturb all scenarios in turn; return the table's lines and all faults."""
    chance = random.Random(seed)
    soft = [number for name in ("SIGTERM", "SIGINT", "SIGHUP") if (number := getattr(signal, name))]
    attempts = [signal.SIGKILL] * kills + [soft[i % len(soft)] for i in range(signals)]
    chance.shuffle(attempts)
    forker = Forker()
    with tempfile.TemporaryDirectory(prefix="survival-") as folder:
        work = Path(folder)
        prepare(work, forker)
        run = scenarios(work)
        for scenario in run:
            scenario.seconds = finish(scenario, work / "out" / "reference", forker)
            if scenario.faults:
                sys.exit(f"{scenario.name}: {scenario.faults[0]}")
            shutil.rmtree(work / "out")
        for begun, number in enumerate(attempts):
            scenario, turn = run[begun % len(run)], begun // len(run)
            out = work / "out" / scenario.name.replace(" ", "_")
            attempt(scenario, out, forker, chance, number)
            last = begun + len(run) >= len(attempts)
            if turn % every == every - 1 or last:
                finish(scenario, out, forker)
                shutil.rmtree(out, ignore_errors=True)
        for scenario in run:
            left = stragglers(scenario.groups)
            scenario.faults += [f"processes of {group} run on" for group in left]
    forker.close()
    lines = ["| command | kills | signals | slowest end, s | ended before | faults |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {s.name} | {s.kills} | {s.signals} | {s.slowest:.1f} | {s.finished} | {len(s.faults)} |"
        for s in run
    ]
    total = [sum(getattr(s, name) for s in run) for name in ("kills", "signals", "finished")]
    faults = [f"{s.name}: {fault}" for s in run for fault in s.faults]
    slowest = max(s.slowest for s in run)
    lines.append(f"| all | {total[0]} | {total[1]} | {slowest:.1f} | {total[2]} | {len(faults)} |")
    return lines + faults, faults


if __name__ == "__main__":
    main()
