"""From images to fused masks: draw ensembles, fuse them, and write a result folder.

:class:`Segmenter` draws: mask i of case c depends on the seed, c and i alone, for any batch size,
order or device. :func:`segment` walks a data set through it and writes the files of every case,
whole or not at all, skipping cases that an earlier run with the same settings has finished; slices
of volumes are put together again by ``restack``. Wired by ``runs``.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.background import Background
from guided_diffusion.class_results import (
    area_columns,
    doubt,
    draw_overlay,
    draw_strip,
    measured,
    note_classes,
    soft_maps,
)
from guided_diffusion.classes import each
from guided_diffusion.datasets import Case, Entry, Frame, SegmentationDataset, readable
from guided_diffusion.dist_util import agreed, barrier, rank, world_size
from guided_diffusion.ensemble import MEASURES
from guided_diffusion.errors import UserError
from guided_diffusion.files import make_folder, whole
from guided_diffusion.film import Film
from guided_diffusion.pictures import soft_png, write_picture
from guided_diffusion.readers import listing
from guided_diffusion.restack import Stacks
from guided_diffusion.segmenter import Segmentation, Segmenter, batched

Failures = dict[str, str]
"""Why a case could not be segmented, by its name."""

DOUBTFUL = 0.5
"""A mean pairwise 1 - Dice of the members above which a case is pointed out."""


def segment(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    out_dir: Path,
    *,
    fingerprint: str,
    num_samples: int = 0,
    debug: bool = False,
) -> list[str]:
    """Segment a data set into a result folder and return the names of its cases.

    Args:
        segmenter: draws and fuses.
        dataset: cases at their own size; with masks, the overlays show them.
        out_dir: where ``predictions.csv`` and the files of each case go.
        fingerprint: of everything the masks depend on; finished cases that bear it are kept.
        num_samples: the first so many cases; 0 for all.
        debug: write a strip of all that there is to see of each case as well.
    """
    make_folder(out_dir)
    entries = dataset.entries[: num_samples or None]
    note_classes(out_dir, segmenter.classes)
    record = Record(out_dir, fingerprint, area_columns(segmenter.classes))
    stacks = Stacks(out_dir, fingerprint, entries)
    todo = [
        index
        for index, entry in enumerate(entries)
        if not record.finished(entry.name) or (entry.volume and not stacks.holds(entry))
    ]
    record.begin([entries[index].name for index in todo], of=len(entries))

    mine = _share(todo, entries)
    others = {entries[i].volume for i in todo} if rank() == 0 else {e.volume for e in entries}
    own = {entries[index].volume for index in mine}
    stacks.expect((entries[index] for index in mine), elsewhere=others - own)
    stacks.write()
    failures: Failures = {}

    def keep(some: Sequence[tuple[int, Case, Segmentation]], seconds: float) -> None:
        for index, case, result in some:
            write_case(out_dir, case, result)
            if debug:
                pixels = draw_strip(case, result, channels=dataset.modalities)
                write_picture(out_dir / f"{case.name}_debug.png", pixels)
            if entries[index].volume:
                stacks.keep(entries[index], maps_of(result))
            elif case.affine is not None:
                write_nifti(out_dir, case, result)
            record.add(_row(case, result, seconds, segmenter.frame))
            stacks.write()

    writer = Background()
    try:
        for some, seconds in _drawn(segmenter, dataset, mine, failures):
            writer.start(partial(keep, some, seconds))
    finally:
        writer.wait()
    record.end()
    failed = agreed(bool(failures))
    if rank() == 0 and not failed:
        stacks.clear()
    names = [entry.name for entry in entries]
    if rank() == 0:
        _say_what_to_look_at(record, names)
    if failures:
        raise _failure(failures)
    return names


def _share(todo: Sequence[int], entries: Sequence[Entry]) -> list[int]:
    """Choose this process's cases; all slices of a volume go to one process."""
    places: dict[str, int] = {}
    for index in todo:
        places.setdefault(entries[index].volume or entries[index].name, len(places))
    return [
        index
        for index in todo
        if places[entries[index].volume or entries[index].name] % world_size() == rank()
    ]


def _drawn(
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
        film = Film(segmenter, cases[0].name, show=_show) if logger.watched() else None
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


def _show(film: Film) -> None:
    logger.picture("sampling", film.picture(), film.calls)


def _say_what_to_look_at(record: Record, names: Sequence[str]) -> None:
    """Name the cases of this run whose members are doubtful, and what else lies in the folder."""
    doubtful = [name for name in names if name in record.rows and _is_doubtful(record.rows[name])]
    if doubtful:
        logger.log(
            f"look at {listing(doubtful)}: of their members some are empty, some cover the whole "
            f"picture, or they disagree by more than {DOUBTFUL}"
        )
    empty = [name for name in names if name in record.rows and _is_empty(record.rows[name])]
    if empty:
        logger.log(f"nothing is found in any member of {listing(empty)}")
    strangers = sum(row["fingerprint"] != record.fingerprint for row in record.rows.values())
    if strangers:
        logger.log(
            f"{strangers} cases in {record.out_dir} are of other settings; they stay, and would be "
            "scored together with these"
        )


def _failure(failures: Failures) -> UserError:
    return UserError(
        f"{len(failures)} of the cases",
        found="; ".join(f"{name}: {why}" for name, why in list(failures.items())[:10]),
        expected="readable cases that fit the model and its device",
        mend="All others are finished: mend these and run the same command again.",
    )


def _is_doubtful(row: dict[str, Any]) -> bool:
    some_empty = 0 < int(row.get("empty_members") or 0) < int(row["members"])
    full = int(row.get("full_members") or 0) > 0
    return some_empty or full or float(row["disagreement"]) > DOUBTFUL


def _is_empty(row: dict[str, Any]) -> bool:
    return row.get("empty_members") not in (None, "") and int(row["empty_members"]) == int(
        row["members"]
    )


def _row(case: Case, result: Segmentation, seconds: float, frame: Frame) -> dict[str, Any]:
    found = frame.seen(result.members >= 0.5).flatten(1)
    return {
        "name": case.name,
        "members": len(result.members),
        **measured(result),
        "empty_members": int((~found.any(1)).sum()),
        "full_members": int(found.all(1).sum()),
        "seconds": round(seconds, 3),
    }


COLUMNS = (
    *("name", "members", "area", "empty_members", "full_members"),
    *("disagreement", "uncertainty", "seconds", "fingerprint"),
)


class Record:
    """``predictions.csv``: one row per finished case, written once its files are in place.

    Of several processes each keeps a file of its own until the first one gathers them.
    """

    def __init__(self, out_dir: Path, fingerprint: str, areas: Sequence[str] = ()) -> None:
        self.out_dir = out_dir
        self.columns = (*COLUMNS[:3], *areas, *COLUMNS[3:])
        self.fingerprint = fingerprint
        self.path = out_dir / "predictions.csv"
        self.rows = {row["name"]: row for row in _read_rows([self.path, *self._parts()])}

    def _parts(self) -> list[Path]:
        return sorted(self.out_dir.glob(".predictions-*.csv"))

    def finished(self, name: str) -> bool:
        """Whether a case is done, with these settings, and its mask is still there."""
        same = self.rows.get(name, {}).get("fingerprint") == self.fingerprint
        return same and (self.out_dir / f"{name}_mask.png").exists()

    def begin(self, names: Sequence[str], *, of: int) -> None:
        """Strike cases off before their files are replaced, and say what is kept."""
        if len(names) < of:
            logger.log(f"{of - len(names)} of {of} cases are finished and kept")
        stale = [name for name in names if self.rows.pop(name, None)]
        if stale:
            logger.log(f"{len(stale)} cases of other settings in {self.out_dir} are drawn anew")
        barrier()  # every process has read the parts that the first one now gathers
        if rank() == 0:
            self._gather(stale)
        barrier()
        if rank():
            self.path, self.rows = self.out_dir / f".predictions-{rank()}.csv", {}

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished case."""
        self.rows[row["name"]] = {**row, "fingerprint": self.fingerprint}
        self._write()

    def end(self) -> None:
        """Gather the rows of all processes in the first one's file."""
        barrier()
        if rank() == 0:
            self.rows |= {row["name"]: row for row in _read_rows(self._parts())}
            self._gather(self._parts())
        barrier()

    def _gather(self, changes: Sequence[object]) -> None:
        parts = self._parts()
        if changes or parts:
            self._write()
        for part in parts:
            part.unlink()

    def _write(self) -> None:
        """Write all rows, sorted by name; the file appears whole."""
        with whole(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows[name] for name in sorted(self.rows))


def _read_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Read the finished cases of some records; what is no record has none."""
    for path in paths:
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("fingerprint") and row.get("name") and row.get("members"):
                        yield row


def write_case(out_dir: Path, case: Case, result: Segmentation) -> None:
    """Write the pictures of one case, each at the case's own size.

    ``<name>_output_ens.png`` (soft, 8 bit), ``<name>_mask.png`` (0 and 255),
    ``<name>_uncertainty.png`` (255 is the largest value that the measure can have),
    ``<name>_output<i>.png`` (the members, soft), ``<name>_overlay.png`` and, where the network has
    one, ``<name>_coarse.png`` (its coarse mask, soft). Of declared classes the mask is the label
    map, the soft ones are ``<name>_output_ens_<class>.png`` and ``<name>_output<i>_<class>.png``,
    and the uncertainty is the largest of the classes.
    """
    stem = f"{out_dir / case.name}"
    one = result.classes is None
    pictures = {
        "mask": soft_png(result.mask.float()) if one else result.labels.numpy(),
        "uncertainty": soft_png(doubt(result) / MEASURES[result.measure].most),
        **{kind: soft_png(values) for kind, values in soft_maps(result)},
        "overlay": draw_overlay(case, result),
    }
    for kind, pixels in pictures.items():
        write_picture(Path(f"{stem}_{kind}.png"), pixels)
    for _, end in each(result.classes):
        _remove_members(stem, end, first=len(result.members))


def write_nifti(out_dir: Path, case: Case, result: Segmentation) -> None:
    """Write fused mask, binary mask and uncertainty of a NIfTI slice, with the case's affine.

    Declared classes are the fourth axis of the fused mask, and the values of the other.
    """
    for kind, values in maps_of(result).items():
        if values.ndim == 3:
            values = np.moveaxis(values, 0, -1)[:, :, None]
        with whole(out_dir / f"{case.name}_{kind}.nii.gz") as part:
            nib.save(nib.Nifti1Image(values, case.affine), part)


def maps_of(result: Segmentation) -> dict[str, np.ndarray]:
    """What is written as NIfTI, by the end of its name."""
    return {
        "output_ens": result.fused.numpy(),
        "mask": result.labels.numpy(),
        "uncertainty": doubt(result).numpy(),
    }


def _remove_members(stem: str, end: str, *, first: int) -> None:
    """Remove what an earlier run with more members has left: scoring would take it for ours."""
    for index in count(first):
        surplus = Path(f"{stem}_output{index}{end}.png")
        if not surplus.exists():
            return
        surplus.unlink()
