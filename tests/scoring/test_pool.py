"""Scoring in several processes: the same numbers, the same messages, and a clean end."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
from helpers import environment
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_masks
from guided_diffusion.report.thumbnails import collect_layers
from guided_diffusion.scoring import groups, pool
from guided_diffusion.scoring.evaluate import evaluate_all
from guided_diffusion.scoring.pool import in_order, process_count
from guided_diffusion.tools.phantom_layouts import write_layout

TABLES = ("scores.csv", "masks.csv", "components.csv", "patients.csv", "summary.json")


class Here:
    """A pool of processes that is none: what would be sent is packed, unpacked and run here."""

    started = 0
    sent = 0

    def __init__(self, count: int, context: object, start: Callable[..., None], given: Any) -> None:
        Here.started, Here.sent = count, 0
        type(self).shared = len(given[0])
        self.start, self.given = start, pickle.dumps(given)
        self.ready = False

    def submit(self, function: Callable[[bytes], object], task: bytes) -> Future[object]:
        if not self.ready:
            threads = pool.Thread
            pool.Thread = NoThread  # type: ignore[misc,assignment]
            self.start(*pickle.loads(self.given))
            pool.Thread = threads  # type: ignore[misc]
            self.ready = True
        Here.sent = max(Here.sent, len(task))
        done: Future[object] = Future()
        try:
            done.set_result(pickle.loads(pickle.dumps(function(task))))
        except Exception as error:
            done.set_exception(pickle.loads(pickle.dumps(error)))
        return done

    def shutdown(self, **_: object) -> None:
        pass


class NoThread:
    def __init__(self, **_: object) -> None:
        pass

    def start(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(groups, "AT_A_TIME", 1)


def write_members(folder: Path, truths: Path, plane: str = "axial", members: int = 2) -> None:
    """Write a fused mask and members beside every truth of a data set."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    (folder / "sampling.json").write_text(json.dumps({"options": {"plane": plane}}))
    (folder / "predictions.csv").write_text("name,fingerprint\n")
    for name, truth in open_masks(truths).items():
        drawn = [np.clip(truth() + generator.normal(0, 0.4, truth().shape), 0, 1)] * members
        for number, mask in enumerate(drawn):
            levels = np.roll((255 * mask).astype(np.uint8), number, axis=-1)
            Image.fromarray(levels).save(folder / f"{name}_output{number}.png")
        fused = (255 * np.mean(drawn, axis=0)).astype(np.uint8)
        Image.fromarray(fused).save(folder / f"{name}_output_ens.png")


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES if (folder / name).exists()}


@pytest.mark.parametrize(
    "layout", ["isic2018", "busi", "drive", "acdc", "msd", "brats2021", "custom", "lidc"]
)
def test_every_layout_can_be_sent_and_scores_alike(
    layout: str, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    truth, masks = tmp_path / "gt", tmp_path / "pred"
    write_layout(layout, truth, 0, patients=6, slices=4, size=24, training=0.5)
    write_members(masks, truth)
    one = evaluate_all(masks, truth, collect=collect_layers(masks))
    alone = tables(masks)
    many = evaluate_all(masks, truth, collect=collect_layers(masks), processes=2)
    assert Here.started == 2 and 0 < Here.sent < 20_000
    assert tables(masks) == alone and len(alone) >= 4
    assert many.collected == one.collected and len(many.collected) == len(one.cases)


@pytest.mark.parametrize("kind", ["masks", "tool", "raters", "volumes", "zero and one"])
def test_other_folders_score_alike(
    kind: str, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    truth, masks = tmp_path / "gt", tmp_path / "pred"
    generator = np.random.default_rng(1)
    layout = "msd" if kind == "volumes" else "isic2018"
    write_layout(layout, tmp_path / "data", 0, patients=6, slices=4, size=24, training=0.5)
    write_members(masks, tmp_path / "data")
    raters: list[str] = []
    if kind == "volumes":
        truth = tmp_path / "data"
        for path in masks.glob("*.png"):
            path.unlink()
        for mask in open_masks(truth).values():
            assert mask.source is not None
            copy(mask.source, masks / f"{mask.volume}_output_ens.nii.gz")
    else:
        truth.mkdir()
    for name, mask in open_masks(tmp_path / "data").items() if kind != "volumes" else ():
        values = (255 * mask()).astype(np.uint8)
        Image.fromarray(values).save(truth / f"{name}.png")
        if kind == "raters":
            (tmp_path / "rater").mkdir(exist_ok=True)
            Image.fromarray(np.roll(values, 1)).save(tmp_path / "rater" / f"{name}.png")
            raters = [str(tmp_path / "rater")]
        if kind in ("tool", "zero and one"):
            for path in masks.glob(f"{name}_*"):
                path.unlink()
            end, high = ("", 255) if kind == "tool" else ("_output_ens", 1)
            drawn = high * (generator.random(values.shape) < values / 255)
            Image.fromarray(drawn.astype(np.uint8)).save(masks / f"{name}{end}.png")
    if kind == "zero and one":
        (masks / "predictions.csv").unlink()
    one = evaluate_all(masks, truth, raters=raters)
    alone = tables(masks)
    evaluate_all(masks, truth, raters=raters, processes=2)
    assert Here.started == 2 and tables(masks) == alone
    assert one.summary["dice_lesion"] > 0.3


def test_what_is_sent_does_not_grow_with_the_cases(tmp_path: Path, here: None) -> None:
    sizes = []
    for count in (20, 80):
        truth, masks = tmp_path / f"gt{count}", tmp_path / f"pred{count}"
        write_layout("isic2018", truth, 0, patients=count, slices=1, size=16, training=0)
        write_members(masks, truth)
        evaluate_all(masks, truth, processes=2)
        sizes.append((Here.sent, Here.shared))  # type: ignore[attr-defined]
    (sent, shared), (later, larger) = sizes
    assert later < 1.1 * sent and larger < 1.1 * shared


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [process_count(asked, 10) for asked in (-1, 0, 1, 4, 99)] == [0, 0, 1, 4, 10]
    for cores, count in ((1, 0), (16, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: {*range(n)}, raising=False)
        assert process_count(-1, 100_000) == count


def double(value: int) -> int:
    """Double a number; refuse 7, and end the process at 9."""
    if value == 7:
        raise UserError("seven.png", "is damaged", "Replace it.")
    if value == 9:
        os._exit(1)
    return 2 * value


@pytest.mark.slow
def test_real_processes_keep_the_order_and_pass_errors_on() -> None:
    got = in_order(double, [0, 1, 2, 3, 4, 5, 7, 3, 4], processes=2)
    assert [next(got) for _ in range(6)] == [0, 2, 4, 6, 8, 10]
    with pytest.raises(UserError, match=r"^seven.png: is damaged. Replace it.$"):
        next(got)
    with pytest.raises(UserError, match=r"a process was ended by the system.*--num_workers 1"):
        list(in_order(double, [0, 9, 2], processes=1))
    for child in multiprocessing.active_children():  # told to end, which takes a moment
        child.join(30)
    assert not multiprocessing.active_children()


PROGRAM = """
import os, sys, time
from pathlib import Path
from guided_diffusion import commands
from guided_diffusion.scoring import groups

def slowly(groups, **named):
    Path(sys.argv[3], f"began-{os.getpid()}").touch()
    time.sleep(0 if len(list(Path(sys.argv[3]).glob("began-*"))) == 1 else 60)
    return score(groups, **named)

score, groups._score_groups = groups._score_groups, slowly
groups.AT_A_TIME = 1
if __name__ == "__main__":
    flags = ["--inp_pth", sys.argv[1], "--out_pth", sys.argv[2], "--num_workers", "2"]
    commands.main("score", flags)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGINT, "group"), (signal.SIGTERM, "group"), (signal.SIGKILL, "first")],
)
def test_a_signal_ends_all_processes(number: signal.Signals, whom: str, tmp_path: Path) -> None:
    truth, masks, notes = (tmp_path / name for name in ("gt", "pred", "notes"))
    write_layout("isic2018", truth, 0, patients=8, slices=1, size=16, training=0)
    write_members(masks, truth)
    notes.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(masks), str(truth), str(notes)]
    first = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(notes.iterdir())) < 3:
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    (os.killpg if whom == "group" else os.kill)(first.pid, number)
    _, err = first.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert first.returncode == -number
    else:
        assert (first.returncode, err) == (
            128 + number,
            f"stopped by {number.name}; what is finished is kept\n",
        )
    pids = [int(path.name.partition("-")[2]) for path in notes.iterdir()]
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tables(masks) == {}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
