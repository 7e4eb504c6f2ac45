"""One loop over cases, for supervised and weak segmentation alike.

Cases are read ahead and drawn together, written in the background and recorded once their files are
in place. A group that fails is tried again case by case; what fails alone is named at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import torch

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case, Entry, SegmentationDataset
from guided_diffusion.data.folders import listing
from guided_diffusion.data.jobs import turns
from guided_diffusion.dist_util import any_rank, rank, world_size
from guided_diffusion.errors import UserError, memory_problem
from guided_diffusion.files import Background
from guided_diffusion.inference.plan import batched
from guided_diffusion.inference.record import Record
from guided_diffusion.report.progress import Progress

Result = TypeVar("Result")


def share_of(todo: Sequence[int], entries: Sequence[Entry]) -> list[int]:
    """Choose this process's cases; all slices of a volume go to one process."""
    order = turns([entries[index] for index in todo])
    return [index for index, turn in zip(todo, order, strict=True) if turn % world_size() == rank()]


def writer_count(asked: int, device: torch.device) -> int:
    """Choose the number of threads that write: ``asked``, or by the device where that is 0.

    Beside a GPU there are up to 4, as far as there are cores; on a CPU they would take the
    network's.
    """
    if asked or device.type == "cpu":
        return asked or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, (cores or 1) // world_size()))


def run_cases(
    entries: Sequence[Entry],
    indices: Sequence[int],
    record: Record,
    *,
    draw: Callable[[Sequence[int]], Sequence[Result]],
    write: Callable[[int, Result, float], dict[str, Any]],
    together: int,
    after: Callable[[], object] = bool,
    evaluations: int = 0,
    writers: int = 1,
) -> bool:
    """Draw, write and record cases under a progress bar.

    Args:
        entries: all cases of the folder.
        indices: the entries that this process draws.
        record: gets a row per case, and is closed at the end.
        draw: makes the results of some entries, by index.
        write: writes one result, given its index and the seconds it took; returns its row. Several
            threads may call it at the same time, for different cases.
        together: entries that are drawn at a time.
        after: called once a case is recorded, by one thread at a time.
        evaluations: network evaluations of a case, to show the speed; 0 to show none.
        writers: threads that write results while the next ones are drawn.

    Returns:
        Whether all cases of all processes are done.

    Raises:
        UserError: some of this process's cases failed; all others are finished.
    """
    failures: dict[str, str] = {}  # why, by the case's name

    recording = Lock()

    def keep(results: Sequence[tuple[int, Result]], seconds: float) -> None:
        for index, result in results:
            row = {"name": entries[index].name, **write(index, result, seconds)}
            with recording:
                record.add(row)
                after()

    def fewer(count: int) -> None:
        nonlocal together
        together = count

    def rate_of(progress: Progress) -> str:
        return f"{progress.speed * evaluations:.0f} evaluations/s" if evaluations else ""

    background = Background(writers)
    try:
        with Progress(total=len(indices), unit="case", quiet=rank() > 0) as progress:
            left = list(indices)
            while some := left[:together]:
                left = left[len(some) :]
                started = time.perf_counter()
                results = list(draw_or_note(draw, some, entries, failures, fewer))
                seconds = (time.perf_counter() - started) / len(some)
                for part in filter(None, (results[first::writers] for first in range(writers))):
                    background.start(partial(keep, part, seconds))

                progress.step(len(some), say=lambda: rate_of(progress))
                progress.set_postfix_str(rate_of(progress))
    finally:
        background.wait()
    record.end()
    all_done = not any_rank(bool(failures))
    if failures:
        raise UserError(
            f"{len(failures)} of the cases",
            "; ".join(_told_once(failures)[:10]),
            "All others are finished: repair these, and run the same command again.",
        )
    return all_done


class ReadAhead:
    """Reads cases of a data set, while the next ones are read in the background.

    Args:
        dataset: is read by one thread at a time.
        order: in which cases will be asked for, by index.
    """

    def __init__(self, dataset: SegmentationDataset, order: Sequence[int]) -> None:
        self.dataset = dataset
        self.order = order
        self.places = {index: place for place, index in enumerate(order)}
        self.background = Background()
        self.cases: dict[int, Case] = {}

    def __call__(self, indices: Sequence[int]) -> list[Case]:
        """Return cases, and begin to read as many of those that follow.

        Raises what the data set raises for a case that cannot be read.
        """
        self.background.wait()
        cases = [
            self.cases[index] if index in self.cases else self.dataset[index] for index in indices
        ]
        after = self.places[indices[-1]] + 1
        following = self.order[after : after + len(indices)]
        self.cases = {index: self.cases[index] for index in following if index in self.cases}
        if len(self.cases) < len(following):
            self.background.start(partial(self._read, following))
        return cases

    def close(self) -> None:
        """Wait for the cases that are being read."""
        self.background.wait()

    def _read(self, indices: Sequence[int]) -> None:
        """Read cases up to the first that cannot be; whoever asks for that one gets the error."""
        with suppress(Exception):
            for index in indices:
                if index not in self.cases:
                    self.cases[index] = self.dataset[index]


def _told_once(failures: Mapping[str, str]) -> list[str]:
    """Every reason with the cases that it stopped, such as the slices of one volume."""
    names: dict[str, list[str]] = {}
    for name, why in failures.items():
        names.setdefault(why.rstrip("."), []).append(name)
    return [f"{listing(cases, most=3)}: {why}" for why, cases in names.items()]


def draw_or_note(
    draw: Callable[[Sequence[int]], Sequence[Result]],
    indices: Sequence[int],
    entries: Sequence[Entry],
    failures: dict[str, str],
    fewer: Callable[[int], object] = bool,
) -> Iterator[tuple[int, Result]]:
    """Draw cases together; where that fails, one by one, noting those that fail alone.

    Where memory runs out, half of them are drawn at a time, which ``fewer`` is told.
    """
    results: Sequence[Result] = []
    try:
        results = draw(indices)
    except (UserError, OSError, RuntimeError, ValueError, MemoryError) as error:
        memory = memory_problem(error)
        why = memory or (str(error).splitlines() or [repr(error)])[0]
    # The error is gone by now, and with it the memory of what it interrupted.
    if results:
        yield from zip(indices, results, strict=True)
    elif len(indices) == 1:
        failures[entries[indices[0]].name] = why
    else:
        together = len(indices) // 2 if memory else 1
        if memory:
            logger.log(f"{len(indices)} cases at a time: {why}; going on with {together}")
            fewer(together)
        for some in batched(indices, together):
            yield from draw_or_note(draw, some, entries, failures, fewer)
