"""Slicing BraTS volumes into the two-dimensional layout, with the patients kept together.

``out/{training,testing}/NNNNNN/brats_train_PPP_<modality>_SSS_w.nii.gz``: one folder per slice,
PPP the patient's number in the split, SSS the position. ``out/split.txt`` holds the part of
each patient; it is written by the first run and read by later ones, and fits ``--split`` with the
slices. Folders are renamed once they are complete, so the same command continues a run that was
killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from zlib import crc32

import nibabel as nib
import numpy as np

from guided_diffusion.bratsloader import SEG, open_brats
from guided_diffusion.data.datasets import Entry, Reading
from guided_diffusion.data.folders import listing
from guided_diffusion.data.geometry import Affine, Grid
from guided_diffusion.data.limits import limit, set_limit
from guided_diffusion.data.readers import Array
from guided_diffusion.data.splits import PARTS, read_split
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError
from guided_diffusion.files import (
    DamagedFile,
    atomic_write,
    make_folder,
    read_json,
    read_text,
    remove_leftovers,
    set_aside,
    temporary_name,
)


@dataclass(frozen=True)
class SlicingPlan:
    """How volumes are read, how their slices are stored, and how patients are divided.

    Attributes:
        reading: modalities, slices, normalisation.
        dtype: 'uint8' stores values in [0, 1] in steps of 1/255, 'float32' as they are.
        train: fraction of the patients for training.
        seed: of the division.
    """

    reading: Reading
    dtype: str = "uint8"
    train: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype == "uint8" and self.reading.normalise not in ("minmax", "percentile"):
            raise UserError(
                "--dtype",
                "uint8 needs values in [0, 1], as --normalise minmax and percentile give, not "
                f"{self.reading.normalise}",
                "Pass --dtype float32.",
            )


class Job(NamedTuple):
    """One volume: its part's folder, its patient's number, its slices, the first one's number."""

    folder: Path
    patient: int
    slices: list[Entry]
    first: int

    def targets(self) -> Iterator[tuple[Entry, Path]]:
        """Yield every slice with its folder."""
        for number, entry in enumerate(self.slices, self.first):
            yield entry, self.folder / f"{number:06d}"


def plan_jobs(
    dataset: VolumeDataset, out: Path, plan: SlicingPlan, *, dry_run: bool = False
) -> list[Job]:
    """Make one job per volume, in the order of the split file, which is written if it is missing.

    Lines on patients of the volumes get the numbers that the slices have for them.

    ``volumes.json`` records the numbers of each volume's slices, so that volumes can be added, and
    a checksum of its files, so that a changed one is refused. A ``dry_run`` writes neither file.

    Raises:
        UserError: the folder cannot be written, holds slices of other settings or of a volume that
            has changed, or its split lacks a patient.
    """
    if not dry_run:
        make_folder(out, flag="--out")
    patients = sorted(set(dataset.patients))
    split, lines = _read_or_divide(out / "split.txt", patients, plan)
    if lines and not dry_run:
        with atomic_write(out / "split.txt") as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    entries = sorted(dataset.entries, key=lambda entry: (split[entry.patient][0], entry.name))

    path = out / "volumes.json"
    known = _read_numbers(path, dry_run=dry_run)
    free = 1 + max((first + count - 1 for first, count, _ in known.values()), default=0)
    jobs = []
    for volume, group in groupby(entries, key=lambda entry: entry.volume):
        slices = list(group)
        row = known.setdefault(volume, [free, len(slices), _stamp(slices[0])])
        if row[1:] != [len(slices), _stamp(slices[0])]:
            raise UserError(
                slices[0].images[0],
                "the volume has changed since it was sliced",
                "Choose another --out, so that old and new slices do not mix.",
            )
        free = max(free, row[0] + row[1])
        number, side = split[slices[0].patient]
        jobs.append(Job(out / side, number, slices, row[0]))
    if not dry_run:
        with atomic_write(path) as part:
            part.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return jobs


def _read_numbers(path: Path, *, dry_run: bool) -> dict[str, list[int]]:
    """Read first slice, count and checksum of each volume; a damaged file only before any slice."""
    hint = (
        "The numbers of the slices are lost with it: choose another --out, or empty this folder "
        "and cut everything again."
    )
    try:
        known = read_json(path, hint=hint) or {}
        for row in known.values():
            if not isinstance(row, list) or [type(number) for number in row] != 3 * [int]:
                raise DamagedFile(path, "it does not say which slices a volume has", hint)
    except DamagedFile:
        if any(next((path.parent / part).glob("[0-9]*"), None) for part in PARTS):
            raise
        if not dry_run:
            set_aside(path)
        known = {}
    return known


def _stamp(volume: Entry) -> int:
    """A checksum over the sizes and modification times of the volume's files."""
    files = [*volume.images, *([volume.mask] if volume.mask else [])]
    stats = [path.stat() for path in files]
    return crc32(repr([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())


def open_volumes(src: Path, reading: Reading) -> VolumeDataset:
    """Open the labelled volumes below ``src``; slices are a :class:`UserError`."""
    dataset = open_brats(src, False, reading)
    if isinstance(dataset, VolumeDataset):
        return dataset
    raise UserError(
        src,
        "holds two-dimensional slices, not volumes of three axes",
        "Train on these slices as they are.",
    )


def cut_all(
    dataset: VolumeDataset, jobs: Sequence[Job], *, dtype: str, workers: int
) -> Iterator[int]:
    """Slice the unfinished volumes in ``workers`` processes; yield the slices written for each.

    That is 0 where a volume was finished before.
    """
    if workers <= 1:
        for job in jobs:
            yield cut(dataset, job, dtype)
        return
    start = (dataset, limit())
    with ProcessPoolExecutor(workers, initializer=_set_dataset, initargs=start) as pool:
        futures = [pool.submit(_cut_in_worker, job, dtype) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_dataset: VolumeDataset | None = None


def _set_dataset(dataset: VolumeDataset, max_read_gib: float) -> None:
    """Set data set and limit of a worker process once, instead of sending it with every job.

    The worker ends with the process that started it, also where that is killed.
    """
    global _dataset
    _dataset = dataset
    set_limit(max_read_gib)
    if parent := multiprocessing.parent_process():
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _cut_in_worker(job: Job, dtype: str) -> int:
    assert _dataset is not None
    return cut(_dataset, job, dtype)


def cut(dataset: VolumeDataset, job: Job, dtype: str) -> int:
    """Write the missing slices of one volume and return their number; errors name the volume."""
    missing = [(entry, folder) for entry, folder in job.targets() if not folder.exists()]
    for entry, folder in missing:
        image, affine = dataset.read_image(entry)
        grid = dataset.store.grid(entry.images[0])
        labels = dataset.read_labels(entry)
        assert labels is not None
        stem = f"brats_train_{job.patient:03d}_{{}}_{entry.plane:03d}_w.nii.gz"
        with _atomic_folder(folder) as part:
            for name, values in zip(dataset.modalities, image.numpy(), strict=True):
                _save(part / stem.format(name), values, affine, dtype, grid)
            _save(part / stem.format(SEG), labels, affine, "label", grid)
    return len(missing)


def sweep(out: Path) -> None:
    """Remove the incomplete folders of a run that was killed."""
    for part in PARTS:
        remove_leftovers(out / part)


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to ``folder`` once all is written."""
    part = folder.with_name(temporary_name(folder.name))
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        raise UserError(
            folder,
            f"cannot be written ({error})",
            "Free some space or check the permissions, then run the same command to continue.",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save(path: Path, values: Array, affine: Affine | None, dtype: str, grid: Grid) -> None:
    """Write one slice: labels as uint8, images as ``dtype``; ``grid`` is that of the volume."""
    if dtype == "float32":
        image: Any = nib.Nifti1Image(values.astype(np.float32), affine)
    elif dtype == "label":
        image = nib.Nifti1Image(np.rint(values).astype(np.uint8), affine)
    else:
        image = nib.Nifti1Image(np.rint(255 * values).astype(np.uint8), affine)
        image.header.set_slope_inter(1 / 255, 0)
    if not grid.stated:
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    if grid.unit is not None:
        image.header.set_xyzt_units({1000.0: "meter", 1.0: "mm"}.get(grid.unit, "micron"))
    nib.save(image, path)


_NUMBERED = "# number in the names of the slices, part, # patient"
_LINE = re.compile(r"\s*(?P<number>\d{3,})\s+\w+\s+# (?P<patient>.+?)(\s+#.*)?\s*")
_ADDED = re.compile(r"\s*(?P<patient>[^#\s].*?)\s+(?P<part>\w+)(?P<comment>\s+#.*)?\s*")


def _read_or_divide(
    path: Path, patients: Sequence[str], plan: SlicingPlan
) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Return number and part of each patient, and the lines of the file if it has to be written.

    A file of other settings is refused. A line that was added by hand names the patient, and gets
    the next number.
    """
    settings = f"# {_settings(plan)}"
    if path.exists():
        parts, lines = read_split(path), read_text(path).splitlines()
    else:
        parts = divide(patients, train=plan.train, seed=plan.seed)
        lines = [settings, *(f"{patient} {side}" for patient, side in parts.items())]
    written = next((line for line in lines if line.startswith("# slices ")), settings)
    if written != settings:
        raise UserError(
            path,
            f"the slices were cut with other settings ({written[2:]}) than these ({settings[2:]})",
            "Choose another --out, or use the earlier settings.",
        )

    matches = [_LINE.fullmatch(line) for line in lines if _NUMBERED in lines]
    numbered = {match["number"]: match["patient"] for match in matches if match}
    following = count(1 + max(map(int, numbered), default=0))
    split: dict[str, tuple[int, str]] = {}
    for name, side in parts.items():
        patient = numbered.get(name, name)
        if patient in split:
            raise UserError(path, f"patient {patient} has two lines", "Remove one of them.")
        split[patient] = (int(name) if name in numbered else next(following), side)

    missing = sorted(set(patients) - split.keys())
    if missing:
        raise UserError(
            path,
            f"has no line for patient {listing(missing)}",
            "Add a line for each at the end, such as '<patient> training'.",
        )
    if len(numbered) >= len(split):
        return split, []
    head = [line for line in lines[:1] if line.startswith("# slices ")]
    rest = [
        line if numbered and _LINE.fullmatch(line) else _numbered_line(line, split)
        for line in lines[len(head) :]
        if line != _NUMBERED
    ]
    return split, [*head, _NUMBERED, *rest]


def _numbered_line(line: str, split: Mapping[str, tuple[int, str]]) -> str:
    """Put the number in front of a line that names a patient; return others as they are."""
    match = _ADDED.fullmatch(line)
    patient = match["patient"].replace("\t", " ") if match else ""
    if not match or patient not in split:
        return line
    return f"{split[patient][0]:03d} {match['part']}  # {patient}{match['comment'] or ''}"


def divide(patients: Sequence[str], *, train: float, seed: int) -> dict[str, str]:
    """Draw the part of each patient, in the given order; a seed gives the same parts everywhere."""
    drawn = random.Random(seed).sample(range(len(patients)), round(train * len(patients)))
    training = {patients[index] for index in drawn}
    return {patient: "training" if patient in training else "testing" for patient in patients}


def _settings(plan: SlicingPlan) -> str:
    reading = plan.reading
    first, end = ("" if bound is None else bound for bound in reading.slices)
    blank = "" if reading.blank_slices else ", no blank slices"
    channels = ",".join(reading.modalities) or "all modalities"
    plane = "" if reading.plane == "axial" else f", {reading.plane}"
    cut = f"slices {first}:{end}{plane}{blank}, {reading.normalise}, {plan.dtype}, {channels}"
    return f"{cut}, train {plan.train:g}, seed {plan.seed}"
