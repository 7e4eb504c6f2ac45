"""Several threads that write cases, the reading ahead, and results without member files."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import CasesInMemory, cases_in_memory, make_segmenter

from guided_diffusion.data.datasets import Case
from guided_diffusion.errors import UserError
from guided_diffusion.files import Background
from guided_diffusion.inference.cases import ReadAhead, run_cases, writer_count
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.record import Record
from guided_diffusion.scoring.evaluate import evaluate
from guided_diffusion.scoring.summary import summary_text


def never() -> None:
    raise AssertionError("it was begun")


def test_so_many_jobs_run_at_the_same_time_and_no_more() -> None:
    background, gate, begun = Background(3), threading.Event(), []

    def job() -> None:
        begun.append(threading.get_ident())
        assert gate.wait(20)

    for _ in range(3):
        background.start(job)
    fourth = threading.Thread(target=background.start, args=(job,))
    fourth.start()
    fourth.join(0.1)
    assert fourth.is_alive() and len({*begun}) == 3
    gate.set()
    fourth.join(20)
    background.wait()
    assert len(begun) == 4


def test_a_finished_job_makes_place_though_an_older_one_runs() -> None:
    background, gate, seen = Background(2), threading.Event(), []
    background.start(lambda: gate.wait(20))
    done = threading.Event()
    background.start(done.set)
    assert done.wait(20)
    while not background._jobs[1].done():
        time.sleep(0.001)
    background.start(lambda: seen.append("third"))
    gate.set()
    background.wait()
    assert seen == ["third"]


def test_the_first_error_is_raised_once_and_all_jobs_are_waited_for() -> None:
    background, gate, seen = Background(3), threading.Event(), []

    def failing(text: str) -> Callable[[], None]:
        def job() -> None:
            assert gate.wait(20)
            raise UserError(text, "failed", "Repair it.")

        return job

    def slow() -> None:
        assert gate.wait(20)
        time.sleep(0.05)
        seen.append("slow")

    for job in (failing("one"), failing("two"), slow):
        background.start(job)
    gate.set()
    with pytest.raises(UserError, match="one: failed"):
        background.wait()
    assert seen == ["slow"]
    background.wait()
    background.start(failing("three"))
    while not background._jobs[0].done():
        time.sleep(0.001)
    with pytest.raises(UserError, match="three"):
        background.start(never)
    background.wait()


def run(tmp_path: Path, write: Callable[..., dict[str, Any]], **options: Any) -> bool:
    entries = cases_in_memory(8).entries
    record = Record(tmp_path, "fingerprint", with_members=False)
    return run_cases(
        entries, range(8), record, draw=lambda indices: [*indices], write=write, **options
    )


def rows(tmp_path: Path) -> list[str]:
    with (tmp_path / "predictions.csv").open(newline="") as file:
        return [row["name"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("together", [1, 2, 8])
def test_cases_are_written_at_the_same_time_and_recorded_one_by_one(
    together: int, tmp_path: Path
) -> None:
    both, recording, after = threading.Barrier(2), [0], []

    def write(index: int, result: int, seconds: float) -> dict[str, Any]:
        assert index == result and seconds >= 0
        both.wait(20)  # passes only while two cases are being written
        return {"members": 1}

    def recorded() -> None:
        recording[0] += 1
        time.sleep(0.01)
        after.append(recording[0])

    assert run(tmp_path, write, together=together, writers=2, after=recorded)
    assert after == [*range(1, 9)]
    assert rows(tmp_path) == [f"case{index}" for index in range(8)]


def test_an_error_in_a_writer_ends_the_run_and_keeps_what_is_whole(tmp_path: Path) -> None:
    def write(index: int, result: int, seconds: float) -> dict[str, Any]:
        if index in (3, 4):
            raise UserError(f"case{index}", "cannot be written (No space left on device)", "Free.")
        return {"members": 1}

    before = {*threading.enumerate()}  # an earlier test of this process may have left some
    with pytest.raises(UserError, match=r"case[34]: cannot be written"):
        run(tmp_path, write, together=2, writers=4)
    kept = rows(tmp_path)
    assert {"case0", "case1", "case2"} <= {*kept} and not {"case3", "case4"} & {*kept}
    assert {*threading.enumerate()} <= before  # no writer is left running


def test_writers_are_chosen_by_the_device() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert writer_count(0, cpu) == 1
    assert 1 <= writer_count(0, gpu) <= 4
    assert writer_count(7, cpu) == writer_count(7, gpu) == 7


class Counted(CasesInMemory):
    """Counts how often each case is read, and by which thread; one of them cannot be read."""

    bad = ""

    def __init__(self, dataset: CasesInMemory) -> None:
        super().__init__([*dataset.cases.values()])
        self.seen: list[tuple[str, bool]] = []

    def __getitem__(self, index: int) -> Case:
        name = self.names[index]
        self.seen.append((name, threading.current_thread() is threading.main_thread()))
        if name == self.bad:
            raise UserError(name, "is damaged", "Restore it.")
        return super().__getitem__(index)


def test_the_next_cases_are_read_in_the_background() -> None:
    dataset = Counted(cases_in_memory(5))
    read = ReadAhead(dataset, [0, 2, 3, 4])
    for indices in ([0, 2], [3], [4]):
        assert [case.name for case in read(indices)] == [f"case{index}" for index in indices]
    read.close()
    assert dataset.seen == [("case0", True), ("case2", True), ("case3", False), ("case4", False)]


def test_a_case_that_cannot_be_read_ahead_fails_when_it_is_asked_for() -> None:
    dataset = Counted(cases_in_memory(4))
    dataset.bad = "case2"
    read = ReadAhead(dataset, range(4))
    assert [case.name for case in read([0, 1])] == ["case0", "case1"]
    with pytest.raises(UserError, match="case2: is damaged"):
        read([2, 3])
    with pytest.raises(UserError, match="case2: is damaged"):
        read([2])
    assert [case.name for case in read([3])] == ["case3"]
    read.close()


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_the_number_of_writers_changes_no_file(tmp_path: Path) -> None:
    found = []
    for writers in (1, 3):
        folder = tmp_path / str(writers)
        segment(make_segmenter(), cases_in_memory(5), folder, fingerprint="f", writers=writers)
        found.append(pictures(folder))
    assert found[0] == found[1] and len(found[0]) == 5 * 7


def test_results_without_members(tmp_path: Path) -> None:
    """Earlier files of members go, a finished case stays finished, and scoring says what lacks."""
    results, truths = tmp_path / "results", tmp_path / "truths"

    def draw(fingerprint: str, **options: Any) -> dict[str, bytes]:
        segment(make_segmenter(), cases_in_memory(2), results, fingerprint=fingerprint, **options)
        return pictures(results)

    whole = draw("first")
    fewer = draw("second", save_members=False)
    assert {*whole} - {*fewer} == {f"case{k}_output{i}.png" for k in range(2) for i in range(3)}
    assert all(fewer[name] == whole[name] for name in fewer)
    before = (results / "case0_mask.png").stat().st_mtime_ns
    assert draw("second", save_members=False) == fewer
    assert (results / "case0_mask.png").stat().st_mtime_ns == before

    truths.mkdir()
    for index in range(2):
        mask = Image.fromarray(np.eye(16, dtype=np.uint8) * 255)
        mask.save(truths / f"case{index}.png")
    said = "2 cases without files of the single masks"
    assert said in summary_text(evaluate(results, truths))
    assert draw("second") == whole, "members are drawn anew where they are asked for"
    assert said not in summary_text(evaluate(results, truths))
