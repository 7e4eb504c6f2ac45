"""Scoring in several processes: cases are sent to them, and their scores come back in order.

What all cases refer to (the data set, what masks mean) is sent once to each process and not with
every case. Few cases are under way at a time, so that memory does not grow with their number.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

import torch

from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.limits import limit, set_limit
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import UserError
from guided_diffusion.scoring.predictions import PictureSet

Item = TypeVar("Item")
Value = TypeVar("Value")
SHARED = (SegmentationDataset, MaskSet, VolumeStore, PictureSet)
"""Objects of which there are few and to which many cases refer."""
FEW_CASES = 400
"""Cases that one process scores before others have started."""
WAITING = 3
"""Tasks under way for each process, so that none has to wait for the next."""


def process_count(asked: int, cases: int) -> int:
    """Choose the number of processes; 0 for this one alone.

    ``asked`` is -1 for as many as there are cores, if there are cases enough.
    """
    if asked >= 0:
        return min(asked, cases)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores if cores and cores > 1 and cases >= FEW_CASES else 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that no sum depends on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    function: Callable[[Item], Value], items: Iterable[Item], *, processes: int
) -> Iterator[Value]:
    """Apply a function to items in several processes, and yield the results in their order.

    The first result is made in this process, which decides what is decided once for all items.

    Args:
        function: of a module, or a partial of one, so that it can be sent.
        items: each is sent to one process.
        processes: at most so many; 0 for this one alone.

    Raises:
        UserError: a process was ended, as by the system when memory runs out.
        Exception: what the function raises, for the first item for which it raises anything.
    """
    items = iter(items)
    first = list(islice(items, 1))
    yield from map(function, first)
    if not processes:
        yield from map(function, items)
        return
    known = _shared_by((function, first))
    start = pickle.dumps([_light(value) for value in known])
    numbers = {id(value): number for number, value in enumerate(known)}
    before = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), _start, (start, limit())
    )
    done = False
    try:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            task = _dump((function, item), numbers)
            with _signals_kept_back():
                waiting.append(pool.submit(_run, task))
            if len(waiting) >= WAITING * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        done = True
    except BrokenProcessPool as error:
        raise UserError(
            "scoring",
            "a process was ended by the system, as where memory runs out",
            "Score with fewer processes, --num_workers 1.",
        ) from error
    finally:
        if not done:
            for child in multiprocessing.active_children():
                if child not in before:
                    child.kill()
                    child.join()
        pool.shutdown(wait=done, cancel_futures=True)


@contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Let processes and threads that are started here pass over signals, which this one handles."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---------------------------------------------------------------------------- what processes share


class _Pickler(pickle.Pickler):
    """Writes objects of the kinds in :data:`SHARED` as numbers, as far as they have one."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.numbers = numbers

    def persistent_id(self, value: Any) -> int | None:
        return self.numbers.get(id(value)) if isinstance(value, SHARED) else None


class _Finder(_Pickler):
    """Collects the shared objects that something refers to."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), {})
        self.found: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, SHARED):
            return None
        if not any(value is other for other in self.found):
            self.found.append(value)
        return 0


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, number: Any) -> Any:
        return _values[number]


_values: list[Any] = []


def _shared_by(value: object) -> list[Any]:
    finder = _Finder()
    finder.dump(value)
    return finder.found


def _dump(value: object, numbers: dict[int, int]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, numbers).dump(value)
    return file.getvalue()


def _light(value: Any) -> Any:
    """Leave out of a shared object the list of all cases, which no single case needs."""
    if isinstance(value, SegmentationDataset):
        value = copy.copy(value)
        value.entries, value.names, value.masks = [], [], value.masks.without_paths()
        return value
    return value.without_paths() if isinstance(value, MaskSet | PictureSet) else value


# ----------------------------------------------------------------------------- in another process


def _start(shared: bytes, max_read_gib: float) -> None:
    """Prepare a process, which ends with the one that started it, also where that is killed."""
    global _values
    torch.set_num_threads(1)
    set_limit(max_read_gib)
    _values = pickle.loads(shared)
    if parent := multiprocessing.parent_process():
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run(task: bytes) -> Any:
    function, item = _Unpickler(io.BytesIO(task)).load()
    return function(item)
