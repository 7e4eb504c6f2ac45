"""Signals: a run that is told to end saves, ends quickly, and says so by its exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, contents, environment, read_csv, script, succeeded, training
from loops import Discs, make_loop, resumed
from torch import Tensor

from benchmarks.survival import Forker, survive
from guided_diffusion import logger
from guided_diffusion.checkpoint import LATEST, load_checkpoint, save_checkpoint
from guided_diffusion.data.batches import Batch
from guided_diffusion.data.datasets import Case
from guided_diffusion.errors import (
    Stopped,
    UserError,
    exit_on_user_error,
    handling_signals,
    stop,
)
from guided_diffusion.inference import cases, predict
from guided_diffusion.training import checkpoints
from guided_diffusion.training.stop_signal import StopSignal
from guided_diffusion.training.validation import Score

ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_before(quiet: None) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in ALL}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    started = Forker()
    yield started
    started.close()


def endless(brats: Path, out: Path, *more: object) -> list[Any]:
    """The flags of a run that logs every step and saves only when it is told to end."""
    flags = ["--max_steps", 0, "--save_interval", 10**6, "--log_interval", 1]
    return [*training(brats, out), *flags, *more]


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it does not happen"
        time.sleep(0.02)


def wait_for_steps(out: Path) -> None:
    wait_for((out / "progress.csv").exists)


def saved_step(out: Path, log: str, number: signal.Signals) -> int:
    step = load_checkpoint(out / LATEST).step
    assert step >= 1 and f"stopped by {number.name} at step {step}" in log
    return step


# ------------------------------------------------------------------------------ one process


@pytest.mark.parametrize(
    ("to", "workers", "number"),
    [
        *(("parent", 0, number) for number in ALL),
        *(("group", 2, number) for number in ALL),
        ("parent", 2, signal.SIGTERM),
        ("twice", 0, signal.SIGINT),
        ("twice", 2, signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_run_that_has_saved(
    to: str, workers: int, number: signal.Signals, brats: Path, tmp_path: Path, forker: Forker
) -> None:
    """To the whole group is how SLURM and a terminal send it: to the reading processes, too."""
    out = tmp_path / "run"
    pid = forker.start("train", *endless(brats, out, "--num_workers", workers))
    wait_for_steps(out)
    for _ in range(2 if to == "twice" else 1):
        (os.kill if to == "parent" else os.killpg)(pid, number)
    code, log, err = forker.wait()
    assert (code, err) == (128 + number, "")
    saved_step(out, log, number)


def test_resume_auto_continues_what_a_signal_ended(
    brats: Path, tmp_path: Path, forker: Forker
) -> None:
    pid = forker.start("train", *endless(brats, tmp_path))
    wait_for_steps(tmp_path)
    os.kill(pid, signal.SIGTERM)
    _, log, _ = forker.wait()
    last = saved_step(tmp_path, log, signal.SIGTERM) + 2
    flags = ["--max_steps", last, "--resume", "auto"]
    succeeded(script("segmentation_train", *endless(brats, tmp_path), *flags))
    steps = [int(row["step"]) for row in read_csv(tmp_path / "progress.csv")]
    assert steps == list(range(1, last + 1))
    assert load_checkpoint(tmp_path / LATEST).step == last


def test_a_signal_interrupts_loading(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guided_diffusion.training.resolve.open_data", told_to_end)
    done = script("segmentation_train", *endless(brats, tmp_path))
    assert (done.code, done.err) == (143, "stopped by SIGTERM; what is finished is kept\n")
    assert not list(tmp_path.glob("*.pt"))


def told_to_end(*_: object, **__: object) -> None:
    """Receive SIGTERM within something that takes long."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    raise AssertionError("still there")


class Received:
    """Receives a signal while it is destroyed, where exceptions are ignored."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_within_a_destructor_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        Received()
        time.sleep(30)
    assert left.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; what is finished is kept\n"
    with StopSignal() as stop, pytest.raises(Stopped), stop.at_once():
        Received()
        time.sleep(30)


def test_a_signal_while_torch_is_loaded_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loading of NumPy swallows exceptions: the run went on, or failed in some other way."""
    monkeypatch.setattr(torch.__spec__, "_initializing", True, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with (
        pytest.raises(SystemExit) as left,
        exit_on_user_error(),
        contextlib.suppress(KeyboardInterrupt),
    ):
        told_to_end()
    assert left.value.code == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; what is finished is kept\n"


def test_ctrl_c_before_a_command_begins_shows_no_traceback() -> None:
    """The package's modules are loaded, which takes a while, before a handler can be there."""
    code = (
        "import os, signal, sys\n"
        "sys.addaudithook(lambda event, args: os.kill(os.getpid(), signal.SIGINT)\n"
        "    if event == 'import' and args[0] == 'guided_diffusion.commands' else None)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import runpy; runpy.run_path('scripts/check_data.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_hang_up_is_ignored_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with exit_on_user_error(), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.wanted


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds reading processes below /proc")
def test_a_reader_that_is_killed_is_one_message_and_the_run_saves(
    brats: Path, tmp_path: Path, forker: Forker
) -> None:
    pid = forker.start("train", *endless(brats, tmp_path, "--num_workers", 2))
    wait_for_steps(tmp_path)
    readers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(readers[-1]), signal.SIGKILL)
    code, _, err = forker.wait()
    assert code == 2 and err.count("\n") == 1
    assert re.match(r"error: --num_workers: a reading process ended .*--num_workers", err)
    assert load_checkpoint(tmp_path / LATEST).step >= 1


# ------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("number", ALL)
def test_a_signal_ends_the_run_after_its_step(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.configure()
    loop = make_loop(tmp_path, max_steps=50)
    run_step = loop.run_step

    def interrupted(batch: Batch) -> Tensor:
        if loop.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # launchers repeat it
        return run_step(batch)

    loop.run_step = interrupted  # type: ignore[method-assign]
    path = loop.run_loop()
    assert path.name == "savedmodel000003.pt"
    assert f"stopped by {number.name} at step 3" in capsys.readouterr().out


def test_signal_handlers_are_restored_after_a_run(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in ALL}
    make_loop(tmp_path, max_steps=1).run_loop()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_later_signal_ends_at_once() -> None:
    with StopSignal(echo=0.1) as stop, pytest.raises(Stopped, match="SIGINT"):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wanted == "SIGINT"
        time.sleep(0.15)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def test_a_signal_interrupts_a_validation_which_is_repeated(tmp_path: Path) -> None:
    scores = {2: 0.5, 4: 0.9, 6: 0.7}

    def run(folder: Path, interrupted_at: int, resume: bool = False) -> tuple[list[int], Any]:
        seen = []

        def validate(_: object, step: int) -> Score:
            if step == interrupted_at:
                told_to_end()
            seen.append(step)
            return Score(scores[step], 0.0)

        folder.mkdir(exist_ok=True)
        loop = make_loop(folder, max_steps=6, save_interval=2, rest={"validate": validate})
        if resume:
            resumed(loop, folder / LATEST)
        loop.run_loop()
        return seen, loop

    whole, _ = run(tmp_path / "whole", 0)
    first, _ = run(tmp_path / "parts", 4)
    assert load_checkpoint(tmp_path / "parts" / LATEST).step == 4
    rest, loop = run(tmp_path / "parts", 0, resume=True)
    assert (whole, first, rest) == ([2, 4, 6], [2], [4, 6])
    assert loop.best.state == {"dice": 0.9, "step": 4, "since": 1, "mask_temperature": 1.0}
    one, other = (load_checkpoint(tmp_path / name / "bestmodel.pt") for name in ("whole", "parts"))
    assert one.step == other.step == 4
    for name, values in one.model.items():
        assert torch.equal(values, other.model[name])


def test_a_signal_interrupts_the_reading_of_a_batch(tmp_path: Path) -> None:
    class Slow(Discs):
        def __getitem__(self, index: int) -> Case:
            if loop.step == 2:
                told_to_end()
            return super().__getitem__(index)

    loop = make_loop(tmp_path, max_steps=5)
    loop.setup = replace(loop.setup, dataset=Slow())
    assert load_checkpoint(loop.run_loop()).step == 3, "the step that read ahead is finished"


def test_a_case_that_cannot_be_read_ends_a_run_that_has_saved(tmp_path: Path) -> None:
    class Gone(Discs):
        def __getitem__(self, index: int) -> Case:
            if loop.step == 2:
                raise UserError("disc", "is gone", "Put it back.")
            return super().__getitem__(index)

    loop = make_loop(tmp_path, max_steps=5)
    loop.setup = replace(loop.setup, dataset=Gone())
    with pytest.raises(UserError, match="is gone"):
        loop.run_loop()
    assert load_checkpoint(tmp_path / LATEST).step == 3, "the step that read ahead is finished"


def test_a_checkpoint_is_written_before_an_error_leaves_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(0.2)
        save_checkpoint(*arguments, **named)

    def step(batch: Batch) -> Tensor:
        if loop.step == 1:
            raise UserError("step 1", "the gradient was not finite", "Lower --lr.")
        return run_step(batch)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slowly)
    loop = make_loop(tmp_path, max_steps=3, save_interval=1)
    run_step, loop.run_step = loop.run_step, step  # type: ignore[method-assign]
    with pytest.raises(UserError, match="finite"):
        loop.run_loop()
    assert load_checkpoint(tmp_path / LATEST).step == 1


def test_a_signal_interrupts_compilation(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, max_steps=5)
    loop.run = replace(loop.run, compile="default")

    def compiling(_: Batch) -> Tensor:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(30)
        raise AssertionError("still there")

    loop.run_step = compiling  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="SIGHUP"):
        loop.run_loop()


# ------------------------------------------------------------------------------ other commands


@pytest.mark.parametrize("number", ALL)
def test_a_signal_ends_sampling_and_keeps_what_is_finished(
    number: signal.Signals, brats: Path, trained: Path, tmp_path: Path, forker: Forker
) -> None:
    flags = ["--model_path", trained, "--data_dir", brats / "training", "--out_dir", tmp_path]
    flags += ["--sampler", "ddpm", "--num_ensemble", 4, "--batch_size", 4]
    pid = forker.start("sample", *flags)
    wait_for((tmp_path / "predictions.csv").exists)
    os.kill(pid, number)
    code, _, err = forker.wait()
    assert (code, err) == (128 + number, f"stopped by {number.name}; what is finished is kept\n")
    rows = read_csv(tmp_path / "predictions.csv")
    assert rows and all((tmp_path / f"{row['name']}_mask.png").exists() for row in rows)
    assert not [name for name in contents(tmp_path) if name.startswith(".part-")]


def test_a_signal_while_sampling_waits_for_its_writer_ends_after_the_case(
    brats: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is cut off within a tensor operation aborts the process (exit code 134)."""
    drawn, draw_or_note, write_case = threading.Semaphore(0), cases.draw_or_note, predict.write_case

    def draw(*arguments: Any) -> Iterator[Any]:
        yield from draw_or_note(*arguments)
        drawn.release()

    def slowly(*arguments: Any, **named: Any) -> None:
        for _ in range(2):
            drawn.acquire()
        time.sleep(0.1)  # by now the second case waits for this one
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        write_case(*arguments, **named)

    monkeypatch.setattr(cases, "draw_or_note", draw)
    monkeypatch.setattr(predict, "write_case", slowly)
    flags = ["--model_path", trained, "--data_dir", brats / "training", "--out_dir", tmp_path]
    flags += ["--steps", 1, "--num_ensemble", 1, "--batch_size", 1]
    done = script("segmentation_sample", *flags)
    assert (done.code, done.err) == (129, "stopped by SIGHUP; what is finished is kept\n")
    (row,) = read_csv(tmp_path / "predictions.csv")
    assert (tmp_path / f"{row['name']}_mask.png").exists()


def test_a_signal_ends_scoring_and_writes_nothing(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guided_diffusion.tools import scoring

    monkeypatch.setattr(scoring, "evaluate_all", told_to_end)
    done = script("segmentation_env", "--inp_pth", tmp_path, "--out_pth", brats / "testing")
    assert done.code == 143 and "stopped by SIGTERM" in done.err
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------ several processes


LAUNCHER = """
import sys
import torch
torch.cuda.device_count = lambda: 2  # the processes find none, and use the CPU
from guided_diffusion.commands import main
main("train", sys.argv[1:])
"""


def start(*command: object) -> subprocess.Popen[str]:
    """Start a program as the leader of a group; its readers and ranks may have groups of theirs."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(out: Path) -> list[int]:
    """All processes whose command line names a folder, but the one that was started first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to", "workers"),
    [
        (signal.SIGTERM, "parent", 2),
        (signal.SIGINT, "group", 0),
        (signal.SIGHUP, "twice", 0),
    ],
)
def test_multi_gpu_passes_a_signal_on(
    number: signal.Signals, to: str, workers: int, brats: Path, tmp_path: Path
) -> None:
    flags = endless(brats, tmp_path, "--num_workers", workers, "--multi_gpu", "0,1")
    parent = start("-c", LAUNCHER, *flags)
    wait_for_steps(tmp_path)
    assert len(ranks(tmp_path)) >= 3
    for _ in range(2 if to == "twice" else 1):
        (os.kill if to == "parent" else os.killpg)(parent.pid, number)
        time.sleep(0.2)
    log, err = parent.communicate(timeout=60)
    assert parent.returncode == 128 + number
    assert "Traceback" not in err
    saved_step(tmp_path, log, number)
    assert not ranks(tmp_path), "no process trains on"


def test_multi_gpu_ends_with_the_exit_code_of_its_processes(tmp_path: Path) -> None:
    flags = ["--data_dir", tmp_path / "nowhere", "--out_dir", tmp_path, "--multi_gpu", "0,1"]
    parent = start("-c", LAUNCHER, *flags)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 2
    assert set(re.findall(r"error: .*", err)) == set(err.splitlines()), "torch adds nothing"


@pytest.mark.slow
def test_the_recipe_for_slurm_saves(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of docs/training.md, on one node; SLURM sends SIGTERM to every process."""
    text = (ROOT / "docs/training.md").read_text("utf-8").partition("### Several nodes")[2]
    recipe = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert recipe
    line = recipe[1][recipe[1].index("srun ") :].replace("\\\n", " ")
    line = line.replace('"$SLURM_NNODES"', "1").replace('"$SLURM_JOB_ID"', "7")
    line = line.replace("$head:29500", "localhost:0").replace(
        "nproc_per_node=4", "nproc_per_node=2"
    )
    words = shlex.split(line)[2:]
    assert "$" not in " ".join(words)
    for name, value in re.findall(r"^export (\w+)=(\w+)$", recipe[1], re.MULTILINE):
        monkeypatch.setenv(name, value)
    flags = endless(brats, tmp_path)
    program = start("-m", "torch.distributed.run", *words, *flags, "--precision", "fp32")
    wait_for_steps(tmp_path)
    for pid in ranks(tmp_path):
        os.kill(pid, signal.SIGTERM)
    log, err = program.communicate(timeout=60)
    saved_step(tmp_path, log, signal.SIGTERM)
    assert "exitcode" not in err, "every rank ends with 0, so nothing is started again"
    assert not ranks(tmp_path)


# ------------------------------------------------------------------------------ at any moment


@pytest.mark.slow
def test_nothing_is_lost_by_kills_at_random_moments() -> None:
    lines, faults = survive(kills=4, signals=0, every=2, seed=1)
    assert not faults, "\n".join(lines)


@pytest.mark.long
def test_nothing_is_lost_by_kills_and_signals_at_random_moments() -> None:
    lines, faults = survive(kills=70, signals=70, every=5, seed=1)
    assert not faults, "\n".join(lines)


def test_no_lock_of_python_s_own_stays_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal inside logging, or an import, ends the command only after it."""
    finished: list[str] = []

    class Interrupted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            finished.append("logging")

    (tmp_path / "interrupted_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.01)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = logging.Logger("own")
    own.addHandler(Interrupted())

    def imported() -> None:
        __import__("interrupted_module")
        finished.append("import")

    for act in (lambda: own.error("x"), imported):
        with handling_signals(stop), pytest.raises(Stopped):
            act()
            time.sleep(5)
    assert finished == ["logging", "import"]
    monkeypatch.delitem(sys.modules, "interrupted_module")
