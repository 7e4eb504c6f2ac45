"""Robustness of training: kill -9, a full disk, losses that are not finite, clipping, warm-up."""

from __future__ import annotations

import errno
import gc
import io
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, environment, read_csv, refused, script, training
from loops import batch_of, equal, make_loop, resumed, with_nan
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    BEST,
    LATEST,
    load_checkpoint,
    load_weights,
    numbered_checkpoints,
    step_of,
    with_companions,
)
from guided_diffusion.errors import Stopped, UserError, handling_signals, stop
from guided_diffusion.files import Background, atomic_write, write
from guided_diffusion.training.estimates import training_gib
from guided_diffusion.training.steps import clip_gradient

# ------------------------------------------------------------------------------ kill -9

SAVES_OFTEN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from guided_diffusion import logger
from loops import make_loop, resumed
out = Path(sys.argv[1])
logger.configure(quiet=True)
loop = make_loop(out, max_steps=0, save_interval=1, keep=3, batch_size=1)
if (out / "savedmodel.pt").exists():
    resumed(loop, out / "savedmodel.pt")
print("ready", flush=True)
loop.run_loop()
"""


@pytest.mark.slow
def test_the_last_checkpoint_is_good_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    """One program is forked 20 times, so that torch is imported once."""
    forker = f"""
import os, sys
sys.argv = ["", {str(tmp_path)!r}]
import torch
import loops
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.stderr = open(os.devnull, "w")
        exec({SAVES_OFTEN!r})
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", forker],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin and parent.stdout
        moments, before = random.Random(5), 0
        for _ in range(20):
            parent.stdin.write("\n")
            parent.stdin.flush()
            said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
            (child,) = said - {"ready"}
            if not before:
                while not (tmp_path / LATEST).exists():
                    time.sleep(0.01)
            time.sleep(0.3 * moments.random())
            os.kill(int(child), signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            saved = load_checkpoint(tmp_path / LATEST)
            assert saved.step >= before
            before = saved.step
        parent.stdin.close()
    assert before >= 5
    loop = make_loop(tmp_path, max_steps=before + 1, batch_size=1, keep=3)
    resumed(loop, tmp_path / LATEST).run_loop()
    assert not list(tmp_path.glob(".part-*")), "what a killed run left is cleared away"
    assert len(list(tmp_path.glob("savedmodel[0-9]*.pt"))) == 3


# ------------------------------------------------------------------------------ a full disk


@pytest.fixture
def filling(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill the disk half-way through every checkpoint, except the first n; the list holds n."""
    save, good = torch.save, [1]

    def half(content: Any, path: Path) -> None:
        file = io.BytesIO()
        save(content, file)
        if good[0] > 0:
            good[0] -= 1
            path.write_bytes(file.getvalue())
        else:
            path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    return good


def test_a_full_disk_ends_with_one_message(filling: list[int], brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--max_steps", 6]
    error = refused(script("segmentation_train", *command))
    assert "savedmodel000004.pt" in error and "No space left" in error and "intact" in error
    assert load_checkpoint(tmp_path / LATEST).step == 2
    assert [path.name for path in tmp_path.glob("*savedmodel*")].count(LATEST) == 1
    assert not list(tmp_path.glob(".part-*"))


def test_a_full_disk_at_the_end_is_not_missed(
    filling: list[int], quiet: None, tmp_path: Path
) -> None:
    filling[0] = 0
    with pytest.raises(UserError, match="No space left"):
        make_loop(tmp_path, max_steps=1).run_loop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("name", ["log.txt", "progress.json"])
def test_a_full_disk_for_the_log_is_reported(
    name: str, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, flags: int) -> int:
        return os.open("/dev/full" if Path(path).name == name else path, flags, 0o666)

    monkeypatch.setattr(write, "_file_itself", full)
    error = refused(script("segmentation_train", *training(brats, tmp_path), "--max_steps", 4))
    assert f"{tmp_path / name}: cannot be written" in error and "No space left" in error
    assert "earlier checkpoints are intact" in error


def test_a_log_that_cannot_be_appended_to_is_reported(quiet: None, tmp_path: Path) -> None:
    (tmp_path / "progress.csv").mkdir()
    logger.configure(tmp_path, quiet=True)
    logger.logkv("step", 1)
    with pytest.raises(UserError, match=r"progress\.csv: cannot be written .*checkpoints"):
        logger.dumpkvs()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no device without an end")
def test_a_device_is_never_read_as_a_log(quiet: None, tmp_path: Path) -> None:
    for name in ("progress.csv", "progress.json"):
        (tmp_path / name).symlink_to("/dev/zero")
    logger.configure(tmp_path, quiet=True)
    logger.rewind(1)
    logger.logkv("step", 1)
    with pytest.raises(UserError, match=r"progress\.csv: cannot be written .*checkpoints"):
        logger.dumpkvs()


# ------------------------------------------------------------------------------ the background


def test_training_goes_on_while_a_checkpoint_is_written(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, gate = torch.save, threading.Event()

    def slow(content: Any, path: Path) -> None:
        assert gate.wait(30)
        save(content, path)

    monkeypatch.setattr(torch, "save", slow)
    loop = make_loop(tmp_path)
    loop.run_step(batch_of(2))
    then = {name: value.clone() for name, value in loop.net.state_dict().items()}
    path = loop.save()
    for _ in range(3):
        loop.run_step(batch_of(2))
    assert not path.exists()
    gate.set()
    loop.checkpoints.writer.wait()
    saved = load_checkpoint(path)
    assert saved.step == 1
    assert equal(saved.model, then), "what is written is the state of its step"
    assert saved.training["optimizer"]["state"][0]["step"] == 1
    assert not equal(dict(loop.net.state_dict()), then)


@pytest.mark.parametrize("rates", ["0.9", "0.9,0.99"])
def test_the_memory_of_training_while_a_checkpoint_is_written(
    rates: str, quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> int:
        """Bytes of all tensors of more than a few numbers that Python holds, gradients included."""
        gc.collect()
        seen = [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]
        seen = [o for o in seen if o.device.type == "cpu"]
        seen += [o.grad for o in seen if o.is_leaf and o.grad is not None]
        storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in seen}
        return sum(storages.values())

    gate, before = threading.Event(), held()

    def waiting(*_: object) -> None:
        gate.wait(30)
        raise OSError

    monkeypatch.setattr(torch, "save", waiting)
    loop = make_loop(tmp_path, ema_rate=rates, num_channels=64)
    loop.run_step(batch_of(1))
    loop.save()
    loop.forward_backward(batch_of(1))
    most = (held() - before) / 2**30
    gate.set()
    with pytest.raises(UserError):
        loop.checkpoints.writer.wait()
    count = sum(parameter.numel() for parameter in loop.parameters)
    assert most == pytest.approx(training_gib(count, len(loop.averages)), rel=0.02)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_never_replaced(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "other")
    with (
        pytest.raises(UserError, match=r"other: is not a file that can be replaced\."),
        atomic_write(tmp_path / "other") as part,
    ):
        part.touch()
    assert not (tmp_path / "other").is_file() and len(list(tmp_path.iterdir())) == 1


def test_background_jobs_run_in_order_and_raise_their_errors() -> None:
    background, seen = Background(), []

    def slow() -> None:
        time.sleep(0.05)
        seen.append("slow")

    def failing() -> None:
        raise UserError("a", "b", "c.")

    background.wait()
    background.start(slow)
    background.start(lambda: seen.append("quick"))
    background.wait()
    assert seen == ["slow", "quick"]
    background.start(failing)
    with pytest.raises(UserError, match=r"a: b\. c\."):
        background.start(slow)
    background.wait()
    assert seen == ["slow", "quick"], "after an error the next job is not begun"


def test_a_background_job_is_waited_for_after_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python before 3.13 takes a thread for dead once a signal has interrupted its join."""
    background, begun, gate, seen = Background(), threading.Event(), threading.Event(), []

    def interrupted(call: Callable[[], object]) -> None:
        with pytest.raises(Stopped), handling_signals(stop):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            call()

    def slow() -> None:
        begun.set()
        gate.wait()
        time.sleep(0.05)
        seen.append("slow")

    background.start(slow)
    begun.wait()
    interrupted(background.wait)
    interrupted(lambda: background.start(lambda: seen.append("too early")))
    gate.set()
    background.wait()
    assert seen == ["slow"]

    def signalled(self: threading.Thread) -> None:
        if started:
            start(self)
        raise Stopped(signal.SIGTERM)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", signalled)
    for started in (False, True):
        gate.clear()
        begun.clear()
        with pytest.raises(Stopped):
            background.start(slow)
        if started:
            begun.wait()
            gate.set()
        background.wait()
    assert seen == ["slow", "slow"], "the job that was begun is waited for, and no other"


# ------------------------------------------------------------------------------ not finite


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    quiet: None, tmp_path: Path
) -> None:
    loop = make_loop(tmp_path, max_bad_steps=3)
    loop.run_step(batch_of(2))
    before = load_state(loop)
    loop.run_step(with_nan(batch_of(2)))
    assert equal(load_state(loop), before)
    assert (loop.step, loop.bad_steps) == (2, 1)
    loop.run_step(batch_of(2))
    assert loop.bad_steps == 0
    assert not equal(load_state(loop), before)
    means = loop.log.means(loop.parameters)
    assert means["skipped"] == 1
    assert all(value == value for value in means.values())


def load_state(loop: Any) -> Any:
    averages = [average.state_dict() for average in loop.averages.values()]
    moments = loop.optimizer.state_dict()["state"]
    clone = torch.utils._pytree.tree_map(lambda v: v.clone(), (averages, moments))
    return [*clone, {name: v.clone() for name, v in loop.net.state_dict().items()}]


def test_too_many_bad_steps_end_the_run_and_name_the_cases(quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, max_bad_steps=3)
    for batch in (with_nan(batch_of(2)), with_nan(batch_of(2)), batch_of(2)):
        loop.run_step(batch)
    with pytest.raises(UserError, match=r"3 times in a row.*disc0, disc1.*--lr") as raised:
        for _ in range(3):
            loop.run_step(with_nan(batch_of(2)))
    assert "step 5" in str(raised.value)


def test_steps_count_as_bad_only_once_the_loss_scale_fits(quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, max_bad_steps=2)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    for parameter in loop.parameters:
        parameter.register_hook(lambda gradient: gradient.half().float())
    before = load_state(loop)
    while equal(load_state(loop), before):
        loop.run_step(batch_of(2))
    lowered = 24 - math.log2(loop.scaler.get_scale())
    assert lowered >= 3, "more steps in a row than max_bad_steps were not finite"
    assert loop.log.means(loop.parameters)["skipped"] == lowered
    assert loop.bad_steps == 0

    loop.scaler.update(1.0)
    with pytest.raises(UserError, match="2 times in a row"):
        for _ in range(2):
            loop.run_step(with_nan(batch_of(2)))


def test_the_log_counts_skipped_steps(quiet: None, tmp_path: Path) -> None:
    logger.configure(tmp_path, quiet=True)
    loop = make_loop(tmp_path, max_steps=4, log_interval=4)
    dataset = loop.setup.dataset

    class WithNaN(type(dataset)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            case = super().__getitem__(index)
            return case._replace(image=case.image * torch.nan) if index == 3 else case

    loop.setup = replace(loop.setup, dataset=WithNaN())
    loop.run_loop()
    (row,) = read_csv(tmp_path / "progress.csv")
    assert 1 <= float(row["skipped"]) <= 3
    assert float(row["loss"]) > 0


# ------------------------------------------------------------------------------ clipping, warm-up


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e9])
def test_the_gradient_is_clipped_to_its_norm(limit: float, quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, grad_clip=limit)
    _ = loop.forward_backward(batch_of(4))
    gradient = torch.cat([p.grad.flatten() for p in loop.parameters if p.grad is not None])
    norm = loop.log.gradient(loop.parameters)
    assert_close(norm, gradient.norm())
    clip_gradient(loop.parameters, norm, limit)
    clipped = torch.cat([p.grad.flatten() for p in loop.parameters if p.grad is not None])
    expected = gradient * min(1.0, limit / (float(norm) + 1e-6))
    assert_close(clipped, expected)
    assert float(clipped.norm()) <= limit * (1 + 1e-5)


def test_without_a_limit_nothing_is_clipped(quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.forward_backward(batch_of(4))
    before = [p.grad.clone() for p in loop.parameters if p.grad is not None]
    clip_gradient(loop.parameters, torch.tensor(1e9), loop.options.grad_clip)
    assert equal(before, [p.grad for p in loop.parameters if p.grad is not None])


def test_the_rate_warms_up_and_anneals(quiet: None, tmp_path: Path) -> None:
    """Step n (from 0) is taken at lr * min(1, (n + 1) / 4) * (1 - n / 10)."""
    loop = make_loop(tmp_path, lr=0.5, warmup_steps=4, lr_anneal_steps=10)
    loop._set_rate()
    for n in range(10):
        rate = loop.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(0.5 * min(1, (n + 1) / 4) * (1 - n / 10))
        loop.step += 1
        loop._set_rate()
    assert loop.optimizer.param_groups[0]["lr"] == 0


def test_warm_up_applies_to_the_first_step(quiet: None, tmp_path: Path) -> None:
    """AdamW's first step has the size lr, so the first of 100 warm-up steps is a hundredth."""
    moved = []
    for warm in (0, 100):
        loop = make_loop(tmp_path, warmup_steps=warm, lr=1e-3)
        before = [p.detach().clone() for p in loop.parameters]
        loop.run_step(batch_of(4))
        steps = [(p - q).detach().abs().max() for p, q in zip(loop.parameters, before, strict=True)]
        moved.append(float(max(steps)))
    assert moved[0] / moved[1] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5])])
def test_the_newest_checkpoints_are_kept(
    keep: int, left: list[int], quiet: None, tmp_path: Path
) -> None:
    (tmp_path / BEST).write_bytes(b"the best")
    make_loop(tmp_path, max_steps=5, save_interval=1, keep=keep).run_loop()
    names = sorted(path.name for path in tmp_path.glob("savedmodel[0-9]*.pt"))
    assert names == [f"savedmodel{step:06d}.pt" for step in left]
    assert load_checkpoint(tmp_path / LATEST).step == 5
    assert (tmp_path / BEST).read_bytes() == b"the best"


def test_checkpoints_of_another_run_are_kept(quiet: None, tmp_path: Path) -> None:
    """A run started anew in an old folder removes neither the old files nor its own newest ones."""

    def steps() -> list[int]:
        return [step_of(path) for path in numbered_checkpoints(tmp_path)]

    for old in (0, 5000, 6000):
        (tmp_path / f"savedmodel{old:06d}.pt").write_bytes(b"of another run")
    make_loop(tmp_path, max_steps=3, save_interval=1, keep=2).run_loop()
    assert steps() == [0, 2, 3, 5000, 6000]

    elsewhere = make_loop(tmp_path / "new", max_steps=5, save_interval=1, keep=1)
    elsewhere.checkpoints.folder.mkdir()
    resumed(elsewhere, tmp_path / "savedmodel000003.pt").run_loop()
    assert steps() == [0, 2, 3, 5000, 6000]

    continued = make_loop(tmp_path, max_steps=4, save_interval=1, keep=2)
    resumed(continued, tmp_path / LATEST).run_loop()
    assert steps() == [3, 4, 5000, 6000], "a run that goes on takes the folder's files for its own"


# ------------------------------------------------------------------------------ the parents' files


@pytest.mark.parametrize("style", ["savedmodel", ""])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("step", [float, int])
def test_training_continues_from_the_three_files_of_the_parents(
    style: str, channels_last: bool, step: type, quiet: None, tmp_path: Path
) -> None:
    """The next step is the one that the run itself would have taken."""
    loop = make_loop(tmp_path)
    for _ in range(3):
        loop.run_step(batch_of(4))
    path = write_three_files(loop, tmp_path, style)
    if step is int:
        _with_plain_step_counts(path.with_name(f"opt{style}000003.pt"))

    other = make_loop(tmp_path, channels_last=channels_last)
    start = with_companions(load_checkpoint(path), path, ["0.9", "0.99"])
    assert (start.step, start.ema.keys()) == (3, {"0.9"})
    load_weights(other.net, start.model, path)
    other.restore(start)
    assert other.step == 3
    assert_close(other.averages["0.9"].values, loop.averages["0.9"].values, rtol=0, atol=0)
    assert_close(other.averages["0.99"].values, [p.detach() for p in loop.parameters])
    for run in (loop, other):
        run.run_step(batch_of(4))
    apart = [
        (p - q).detach().abs().flatten()
        for p, q in zip(other.parameters, loop.parameters, strict=True)
    ]
    assert float(torch.cat(apart).mean()) < 1e-6, "moments in another memory order give 4e-4"


def test_the_optimiser_state_changes_the_step(quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    for _ in range(3):
        loop.run_step(batch_of(4))
    path = write_three_files(loop, tmp_path, "savedmodel")
    (tmp_path / "optsavedmodel000003.pt").unlink()
    other = make_loop(tmp_path)
    start = with_companions(load_checkpoint(path), path, ["0.9"])
    load_weights(other.net, start.model, path)
    other.restore(start)
    for run in (loop, other):
        run.run_step(batch_of(4))
    apart = [
        float((p - q).detach().abs().max())
        for p, q in zip(other.parameters, loop.parameters, strict=True)
    ]
    assert max(apart) > 2e-4


def test_a_head_of_two_channels_is_cut_with_its_moments(quiet: None, tmp_path: Path) -> None:
    wide = make_loop(tmp_path, learn_sigma=True)
    for _ in range(3):
        wide.run_step(batch_of(4))
    path = write_three_files(wide, tmp_path, "savedmodel")
    cut = make_loop(tmp_path)
    start = with_companions(load_checkpoint(path), path, ["0.9"])
    load_weights(cut.net, start.model, path)
    cut.restore(start)
    for name, index in (("weight", -2), ("bias", -1)):
        own, both = (
            cut.optimizer.state[cut.parameters[index]],
            wide.optimizer.state[wide.parameters[index]],
        )
        assert cut.parameters[index].shape[0] == 1 and wide.parameters[index].shape[0] == 2, name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_close(own[moment], both[moment][:1], rtol=0, atol=0)
        assert own["step"] == 3
    cut.run_step(batch_of(4))


def _with_plain_step_counts(path: Path) -> None:
    """Count an optimiser's steps by a plain number, not a tensor."""
    state = torch.load(path, weights_only=True)
    for moments in state["state"].values():
        moments["step"] = int(moments["step"])
    torch.save(state, path)


def write_three_files(loop: Any, folder: Path, style: str) -> Path:
    """Weights, an average and the optimiser as the parents (or guided-diffusion) name them."""
    contiguous = torch.utils._pytree.tree_map(
        lambda v: v.clone().contiguous() if isinstance(v, Tensor) else v,
        loop.optimizer.state_dict(),
    )
    parameters = {
        name: torch.nn.Parameter(v.clone().contiguous())
        for name, v in loop.net.state_dict().items()
    }
    path = folder / f"{style or 'model'}000003.pt"
    torch.save(parameters, path)
    torch.save(loop.averages["0.9"].state_dict(), folder / f"ema{style}_0.9_000003.pt")
    torch.save(contiguous, folder / f"opt{style}000003.pt")
    return path
