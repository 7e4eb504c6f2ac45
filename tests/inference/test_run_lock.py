"""Two runs on one folder: the second one is refused, and what a killed run left behind is not."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import contents, process, refused, script, succeeded, training

from guided_diffusion.data.jobs import Job
from guided_diffusion.errors import UserError
from guided_diffusion.inference import run_lock
from guided_diffusion.inference.run_lock import SAMPLING, TRAINING, Holder, only_run

FORK = multiprocessing.get_context("fork")


def write(folder: Path, **changes: Any) -> Path:
    """Write the lock of a training that differs from this process as given."""
    path = folder / ".lock-training"
    path.write_text(json.dumps(asdict(replace(Holder.this(), **changes))))
    return path


def dead_pid() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_second_run_is_refused_and_the_lock_goes_with_the_first(tmp_path: Path) -> None:
    with only_run(tmp_path, TRAINING):
        own = json.loads((tmp_path / ".lock-training").read_text("utf-8"))
        where = f"process {os.getpid()} on {socket.gethostname()}, since {own['started']}"
        with pytest.raises(UserError, match=re.escape(where)), only_run(tmp_path, TRAINING):
            pass
        reader = FORK.Process(target=os.getpid)
        reader.start()
        reader.join()
        with only_run(tmp_path, SAMPLING):
            assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_a_lock_without_a_launch_holds(tmp_path: Path) -> None:
    """A run of an earlier version, which did not write one, may still go on after a minute."""
    lock = write(tmp_path)
    found = json.loads(lock.read_text("utf-8"))
    del found["launch"]
    lock.write_text(json.dumps(found))
    os.utime(lock, (time.time() - 120,) * 2)
    where = f"process {os.getpid()} on "
    with pytest.raises(UserError, match=where), only_run(tmp_path, TRAINING):
        pass


def test_jobs_of_one_number_share_a_folder(tmp_path: Path) -> None:
    def refusal(job: Job | None) -> str:
        before = contents(tmp_path)
        with pytest.raises(UserError) as error, only_run(tmp_path, SAMPLING, job=job):
            pass
        assert contents(tmp_path) == before
        return str(error.value)

    with only_run(tmp_path, SAMPLING, job=Job(1, 4)), only_run(tmp_path, SAMPLING, job=Job(2, 4)):
        assert "another sampling of job 2/4 writes there" in refusal(Job(2, 4))
        assert "another sampling of job" in refusal(Job(3, 8))
        assert "another sampling of job" in refusal(None)
        with only_run(tmp_path, TRAINING):
            pass
    with only_run(tmp_path, SAMPLING):
        assert "another sampling writes there" in refusal(Job(1, 4))
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock-sampling-1-of-8").write_text(
        json.dumps(asdict(replace(Holder.this(), pid=dead_pid())))
    )
    with only_run(tmp_path, SAMPLING, job=Job(1, 4)), only_run(tmp_path, TRAINING):
        pass


@pytest.mark.parametrize("shared", [True, False])
def test_nodes_without_a_shared_folder_are_refused(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a second node looks for the lock that the first process has written."""
    monkeypatch.setattr(run_lock, "VISIBLE", 0.2)
    monkeypatch.setattr(run_lock, "local_world_size", lambda: 1)
    monkeypatch.setattr(run_lock, "world_size", lambda: 2)
    monkeypatch.setattr(run_lock, "rank", lambda: 1)
    lock = write(tmp_path, host="node01", pid=7).read_bytes()
    answers = {bytes: lock, type(None): None, str: ""}
    monkeypatch.setattr(run_lock, "all_gather_object", lambda v: [answers[type(v)], v])
    if shared:
        with only_run(tmp_path, TRAINING):
            pass
        return
    write(tmp_path, host="node02", pid=8)
    problem = rf"{socket.gethostname()} does not see .*on a file system that all nodes share"
    with pytest.raises(UserError, match=problem), only_run(tmp_path, TRAINING):
        pass


def test_the_lock_goes_when_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), only_run(tmp_path, TRAINING):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "left", ["dead", "reused", "rebooted", "requeued", "lost", "empty", "text", "list"]
)
def test_a_lock_that_is_left_over_is_replaced(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run1")
    changes: dict[str, dict[str, Any]] = {
        "dead": {"pid": dead_pid()},
        "reused": {"process": "1"},
        "rebooted": {"machine": "another-boot pid:[1]"},
        "requeued": {"host": "elsewhere", "restarts": 1},
        "lost": {"host": "elsewhere", "job": "", "launch": "run1"},
    }
    lock = write(tmp_path, **changes.get(left, {}))
    if left not in changes:
        lock.write_bytes({"empty": b"", "text": b"\xff\x00", "list": b"[1, {}]"}[left])
        os.utime(lock, (time.time() - 100,) * 2)
    with only_run(tmp_path, TRAINING):
        assert Holder.read(lock.read_bytes()) is not None
        assert list(tmp_path.iterdir()) == [lock]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"host": "elsewhere", "pid": 12, "started": "then"},
            "process 12 on elsewhere, since then",
        ),
        ({"machine": Holder.this().machine + "0"}, "If that run is gone, delete "),
        ({"host": "elsewhere", "job": "8"}, "If that run is gone, delete "),
        ({"host": "elsewhere", "launch": "run2"}, "If that run is gone, delete "),
        ({"process": ""}, "If that run is gone, delete "),
    ],
)
def test_a_run_that_cannot_be_known_to_be_gone_is_respected(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lock = write(tmp_path, **changes)
    before = lock.read_bytes()
    refusal = pytest.raises(UserError, match="another training writes there")
    with refusal as error, only_run(tmp_path, TRAINING):
        pass
    assert message in str(error.value) and lock.name in str(error.value)
    assert lock.read_bytes() == before and list(tmp_path.iterdir()) == [lock]


def test_a_lock_that_is_just_being_written_is_respected(tmp_path: Path) -> None:
    (tmp_path / ".lock-training").touch()
    with pytest.raises(UserError, match="Try again in a minute"), only_run(tmp_path, TRAINING):
        pass


def test_a_killed_child_that_nobody_waited_for_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = run_lock._process_start(child.pid)
    assert start
    holder = replace(Holder.this(), pid=child.pid, process=start)
    assert holder.is_gone() is False
    child.kill()
    while not holder.is_gone():
        time.sleep(0.01)
    child.wait()


def test_all_processes_of_a_run_hear_of_a_refusal_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UserError("--out_dir", "is in use", "Wait.")
    monkeypatch.setattr(run_lock, "rank", lambda: 1)
    monkeypatch.setattr(run_lock, "all_gather_object", lambda own: [error, own])
    with pytest.raises(UserError, match="is in use"), only_run(tmp_path, TRAINING):
        pass
    assert not list(tmp_path.iterdir())


def take(folder: Path, start: Any, results: Any, done: Any) -> None:
    """Take the lock at a signal, and say whether that worked, and hold it until all have tried."""
    start.wait()
    try:
        with only_run(folder, TRAINING):
            results.put(True)
            done.wait()
    except UserError:
        results.put(False)
        done.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
@pytest.mark.parametrize("left", ["lock", "lock and claim"])
def test_of_many_that_find_a_lock_left_over_one_gets_it(left: str, tmp_path: Path) -> None:
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        lock = write(folder, process="1")
        if left == "lock and claim":
            found = run_lock._read(lock)
            with pytest.MonkeyPatch.context() as patch:  # killed before it renamed its claim
                patch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                child = FORK.Process(target=run_lock._take, args=(lock, b"{}", "folder", TRAINING))
                child.start()
                child.join()
            assert child.exitcode == -signal.SIGKILL
            (claim,) = folder.glob(".lock-training-*")
            os.utime(claim, (time.time() - 100,) * 2)
            assert found == run_lock._read(lock)
        start, results, done = FORK.Event(), FORK.Queue(), FORK.Barrier(6)
        takers = [FORK.Process(target=take, args=(folder, start, results, done)) for _ in range(6)]
        for taker in takers:
            taker.start()
        start.set()
        assert sorted(results.get(timeout=20) for _ in takers) == [False] * 5 + [True]
        for taker in takers:
            taker.join()
        assert not list(folder.iterdir())


def test_commands_refuse_a_folder_in_use_and_leave_no_lock(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    flags = [*training(brats, tmp_path), "--max_steps", 1]
    sampling = [
        *("--data_dir", brats / "testing", "--model_path", trained, "--out_dir", tmp_path),
        *("--sampler", "ddim", "--steps", 1, "--num_ensemble", 1),
    ]
    with only_run(tmp_path, TRAINING):
        assert "another training writes there: process" in refused(
            script("segmentation_train", *flags)
        )
        succeeded(script("segmentation_sample", *sampling))
    with only_run(tmp_path, SAMPLING):
        assert "another sampling writes there: process" in refused(
            script("segmentation_sample", *sampling)
        )
        succeeded(script("segmentation_train", *flags))
    assert not list(tmp_path.glob(".lock*"))


@pytest.mark.slow
def test_two_trainings_at_once_and_a_killed_one(brats: Path, tmp_path: Path) -> None:
    flags = [*training(brats, tmp_path), "--max_steps", 0, "--num_workers", 1]
    first = process("segmentation_train", *flags, group=True)
    try:
        while not (tmp_path / "savedmodel000002.pt").exists():
            assert first.poll() is None
            time.sleep(0.1)
        message = refused(script("segmentation_train", *flags))
        assert f"process {first.pid} on {socket.gethostname()}, since " in message
    finally:
        first.kill()
        first.wait()
    (lock,) = tmp_path.glob(".lock*")
    ended = [*training(brats, tmp_path), "--max_steps", 4, "--resume", "auto"]
    succeeded(script("segmentation_train", *ended))
    assert not lock.exists()
    first.communicate()
