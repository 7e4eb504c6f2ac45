"""From images to fused masks: draw ensembles, fuse them, and write a result folder.

:class:`Segmenter` draws: mask i of case c depends on the seed, c and i alone, for any batch size,
order or device. :func:`segment` walks a data set through it and writes the files of every case,
whole or not at all, skipping cases that an earlier run with the same settings has finished; slices
of volumes are put together again by ``restack``. Wired by ``runs``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case, Entry, SegmentationDataset, readable
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.inference.segmenter import Segmentation, Segmenter, batched
from guided_diffusion.inference.trajectory import Trajectory

Failures = dict[str, str]
"""Why a case could not be segmented, by its name."""


def share_of(todo: Sequence[int], entries: Sequence[Entry]) -> list[int]:
    """Choose this process's cases; all slices of a volume go to one process."""
    places: dict[str, int] = {}
    for index in todo:
        places.setdefault(entries[index].volume or entries[index].name, len(places))
    return [
        index
        for index in todo
        if places[entries[index].volume or entries[index].name] % world_size() == rank()
    ]


def drawn(
    segmenter: Segmenter, dataset: SegmentationDataset, indices: Sequence[int], failures: Failures
) -> Iterator[tuple[list[tuple[int, Case, Segmentation]], float]]:
    """Segment cases batch by batch under a progress bar; the number is the seconds of each."""
    plan = segmenter.plan
    if plan.compile and (first := next(readable(dataset, indices), None)):
        logger.log(f"compiled in {segmenter.warm_up(first):.0f} s")
    with tqdm(total=len(indices), unit="case", disable=True if rank() else None) as progress:
        for some in batched(indices, plan.cases):
            started = time.perf_counter()
            results = list(_results(segmenter, dataset, some, failures))
            yield results, (time.perf_counter() - started) / len(some)

            progress.update(len(some))
            drawn = progress.n * plan.num_ensemble * plan.evaluations
            rate = drawn / max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{rate:.0f} evaluations/s")


def _results(
    segmenter: Segmenter, dataset: SegmentationDataset, indices: Sequence[int], failures: Failures
) -> Iterator[tuple[int, Case, Segmentation]]:
    """Segment cases together; where that fails, one by one, noting those that fail alone."""
    try:
        cases = [dataset[index] for index in indices]
        film = Trajectory(segmenter, cases[0].name, show=_show) if logger.watched() else None
        results = segmenter.segment(cases, film)
    except (UserError, OSError, RuntimeError, ValueError) as error:
        results, why = [], (str(error).splitlines() or [repr(error)])[0]
    # The error is gone by now, and with it the memory of what it interrupted.
    if results:
        yield from zip(indices, cases, results, strict=True)
    elif len(indices) == 1:
        failures[dataset.names[indices[0]]] = why
    else:
        for index in indices:
            yield from _results(segmenter, dataset, [index], failures)


def _show(film: Trajectory) -> None:
    logger.picture("sampling", film.picture(), film.calls)


def failure_of(failures: Failures) -> UserError:
    """Make the error that names the cases that failed, and why."""
    return UserError(
        f"{len(failures)} of the cases",
        found="; ".join(f"{name}: {why}" for name, why in list(failures.items())[:10]),
        expected="readable cases that fit the model and its device",
        hint="All others are finished: mend these and run the same command again.",
    )
