"""The record of a result folder: appended row by row, whole and sorted, and what a kill leaves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.inference import record as module
from guided_diffusion.inference.record import Record

FORK = multiprocessing.get_context("fork")
HEADER = (
    b"name,members,area,empty_members,full_members,disagreement,uncertainty,seconds,fingerprint"
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logger.configure(quiet=True)


def row(name: str) -> dict[str, Any]:
    return {"name": name, "members": 2, "area": 7, "seconds": 0.25}


def line(name: str, fingerprint: str = "f") -> bytes:
    return f"{name},2,7,,,,,0.25,{fingerprint}".encode()


def lines(*names: str) -> bytes:
    return b"".join(part + b"\r\n" for part in [HEADER, *map(line, names)])


def run(folder: Path, names: Sequence[str], fingerprint: str = "f") -> None:
    record = Record(folder, fingerprint)
    record.begin(names, of=len(names))
    for name in names:
        record.add(row(name))
    record.end()


def test_rows_are_appended_and_sorted_at_the_end(tmp_path: Path) -> None:
    record, path = Record(tmp_path, "f"), tmp_path / "predictions.csv"
    record.begin(["c", "a", "b"], of=3)
    assert not path.exists()
    for number, name in enumerate(["c", "a", "b"], 1):
        record.add(row(name))
        assert path.read_bytes() == lines(*["c", "a", "b"][:number])
    record.end()
    assert path.read_bytes() == lines("a", "b", "c")


def test_a_second_range_is_added_to_the_first(tmp_path: Path) -> None:
    run(tmp_path, ["c", "d"])
    run(tmp_path, ["b", "a, 1"])
    assert (tmp_path / "predictions.csv").read_bytes() == lines('"a, 1"', "b", "c", "d")


def test_a_finished_folder_is_not_written_again(tmp_path: Path) -> None:
    run(tmp_path, ["a", "b"])
    before = (tmp_path / "predictions.csv").stat()
    run(tmp_path, [])
    assert (tmp_path / "predictions.csv").stat() == before


def test_what_is_written_grows_with_the_number_of_cases(tmp_path: Path) -> None:
    """Writing the whole file after each case takes 16 times as much for 4 times as many."""
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("the system does not count what a process writes")
    written = []
    for count in (100, 400):
        before = int(io.read_text("utf-8").split("wchar: ")[1].split()[0])
        (tmp_path / str(count)).mkdir()
        run(tmp_path / str(count), [f"case{number:04d}" for number in reversed(range(count))])
        written.append(int(io.read_text("utf-8").split("wchar: ")[1].split()[0]) - before)
    assert written[1] < 5 * written[0]


def test_every_row_is_flushed_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    record = Record(tmp_path, "f")
    record.begin([], of=0)
    for number, name in enumerate("abc", 1):
        record.add(row(name))
        assert len(flushed) == number


@pytest.mark.parametrize("number", range(4))
def test_a_kill_between_rows_loses_none(number: int, tmp_path: Path) -> None:
    names = ["d", "b", "c", "a"]

    def killed() -> None:
        record = Record(tmp_path, "f")
        record.begin(names, of=4)
        for name in names[:number]:
            record.add(row(name))
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = Record(tmp_path, "f")
    assert list(again.rows) == names[:number] and not again.damage
    run(tmp_path, names[number:])
    assert (tmp_path / "predictions.csv").read_bytes() == lines("a", "b", "c", "d")


@pytest.mark.parametrize("cut", range(1, len(line("c", "fingerprint")) + 2))
def test_a_torn_last_line_is_no_row(cut: int, tmp_path: Path) -> None:
    """A fingerprint that lacks its end would count as that of other settings."""
    run(tmp_path, ["a", "b", "c"], "fingerprint")
    path = tmp_path / "predictions.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Record(tmp_path, "fingerprint")
    assert list(again.rows) == ["a", "b"] + ["c"] * (cut == 1)  # the carriage return ends a line
    run(tmp_path, ["c"], "fingerprint")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("finished", [[], ["a", "c"]])
def test_rows_of_several_processes_are_gathered(
    finished: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, finished)
    names = ["e", "b", "f", "d"]
    processes = []
    for rank in (1, 0):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        processes.append((Record(tmp_path, "f"), names[rank::2], rank))
    for record, own, rank in processes[::-1]:
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        record.begin(names, of=4)
        for name in own:
            record.add(row(name))
    part = tmp_path / ".predictions-1.csv"
    assert part.read_bytes() == lines("b", "d")
    for record, _, rank in processes:
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        record.end()
    assert (tmp_path / "predictions.csv").read_bytes() == lines(*sorted([*finished, *names]))
    assert not part.exists()


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    run(tmp_path, ["a", "b"])
    record, path = Record(tmp_path, "f"), tmp_path / "predictions.csv"
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"predictions.csv: .*{os.strerror(errno.ENOSPC)}"):
            record.add(row("c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
