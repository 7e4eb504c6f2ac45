"""From images to fused masks: draw ensembles, fuse them, and write a result folder.

:class:`Segmenter` draws: mask i of case c depends on the seed, c and i alone, for any batch size,
order or device. :func:`segment` walks a data set through it and writes the files of every case,
whole or not at all, skipping cases that an earlier run with the same settings has finished; slices
of volumes are put together again by ``restack``. Wired by ``runs``.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.datasets import Case, SegmentationDataset
from guided_diffusion.ensemble import disagreement
from guided_diffusion.files import make_folder, whole
from guided_diffusion.pictures import overlay, soft_png
from guided_diffusion.restack import Stacks
from guided_diffusion.segmenter import Segmentation, Segmenter


def segment(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    out_dir: Path,
    *,
    fingerprint: str,
    num_samples: int = 0,
) -> list[str]:
    """Segment a data set into a result folder and return the names of its cases.

    Args:
        segmenter: draws and fuses.
        dataset: cases at their own size; with masks, the overlays show them.
        out_dir: where ``predictions.csv`` and the files of each case go.
        fingerprint: of everything the masks depend on; finished cases that bear it are kept.
        num_samples: the first so many cases; 0 for all.
    """
    make_folder(out_dir)
    names = dataset.names[: num_samples or None]
    record = Record(out_dir / "predictions.csv", fingerprint)
    entries = dataset.entries[: len(names)]
    stacks = Stacks(out_dir, fingerprint, entries)
    todo = [
        index
        for index, entry in enumerate(entries)
        if not record.finished(entry.name) or (entry.volume and not stacks.holds(entry))
    ]
    stacks.expect(entries[index] for index in todo)
    stacks.write()
    if len(todo) < len(names):
        logger.log(f"{len(names) - len(todo)} of {len(names)} cases are finished and kept")
    stale = record.forget([names[index] for index in todo])
    if stale:
        logger.log(f"{stale} cases of other settings in {out_dir} are drawn anew")

    plan = segmenter.plan
    group = max(1, plan.batch_size // plan.num_ensemble)
    with tqdm(total=len(todo), unit="case", disable=None) as progress:
        for indices in _batched(todo, group):
            started = time.perf_counter()
            cases = [dataset[index] for index in indices]
            for index, case, result in zip(indices, cases, segmenter.segment(cases), strict=True):
                write_case(out_dir, case, result)
                if entries[index].volume:
                    stacks.keep(entries[index], maps_of(result))
                elif case.affine is not None:
                    write_nifti(out_dir, case, result)
                seconds = (time.perf_counter() - started) / len(cases)
                record.add(_row(case, result, seconds))
            stacks.write()
            progress.update(len(cases))
            drawn = progress.n * plan.num_ensemble * plan.evaluations
            rate = drawn / max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{rate:.0f} evaluations/s")
    return names


def _row(case: Case, result: Segmentation, seconds: float) -> dict[str, Any]:
    return {
        "name": case.name,
        "members": len(result.members),
        "area": int(result.mask.sum()),
        "disagreement": round(disagreement(result.members), 4),
        "uncertainty": round(float(result.uncertainty.mean()), 6),
        "seconds": round(seconds, 3),
    }


COLUMNS = ("name", "members", "area", "disagreement", "uncertainty", "seconds", "fingerprint")


class Record:
    """``predictions.csv``: one row per finished case, appended once its files are in place."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in self._read()}

    def _read(self) -> Iterator[dict[str, str]]:
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("fingerprint") and row.get("name"):
                        yield row

    def finished(self, name: str) -> bool:
        """Whether a case is done, with these settings, and its mask is still there."""
        same = self.rows.get(name, {}).get("fingerprint") == self.fingerprint
        return same and (self.path.parent / f"{name}_mask.png").exists()

    def forget(self, names: Sequence[str]) -> int:
        """Strike cases off before their files are replaced, and return how many there were."""
        struck = [name for name in names if self.rows.pop(name, None)]
        if struck:
            self._write()
        return len(struck)

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished case."""
        self.rows[row["name"]] = {**row, "fingerprint": self.fingerprint}
        self._write()

    def _write(self) -> None:
        """Write all rows; the file appears whole."""
        with whole(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())


def write_case(out_dir: Path, case: Case, result: Segmentation) -> None:
    """Write the pictures of one case, each at the case's own size.

    ``<name>_output_ens.png`` (soft, 8 bit), ``<name>_mask.png`` (0 and 255),
    ``<name>_uncertainty.png`` (255 is a standard deviation of 0.5), ``<name>_output<i>.png`` (the
    members, soft) and ``<name>_overlay.png``.
    """
    stem = f"{out_dir / case.name}"
    truth = None if case.mask is None else (case.mask[0] >= 0.5).numpy()
    pictures = {
        "output_ens": soft_png(result.fused),
        "mask": soft_png(result.mask.float()),
        "uncertainty": soft_png(2 * result.uncertainty),
        **{f"output{i}": soft_png(member) for i, member in enumerate(result.members)},
        "overlay": overlay(
            case.image.numpy(),
            truth,
            result.fused.numpy(),
            result.uncertainty.numpy(),
            name=case.name,
            members=len(result.members),
        ),
    }
    for kind, pixels in pictures.items():
        with whole(Path(f"{stem}_{kind}.png")) as part:
            Image.fromarray(pixels).save(part, format="PNG")
    _remove_members(stem, first=len(result.members))


def write_nifti(out_dir: Path, case: Case, result: Segmentation) -> None:
    """Write fused mask, binary mask and uncertainty of a NIfTI slice, with the case's affine."""
    for kind, values in maps_of(result).items():
        with whole(out_dir / f"{case.name}_{kind}.nii.gz") as part:
            nib.save(nib.Nifti1Image(values, case.affine), part)


def maps_of(result: Segmentation) -> dict[str, np.ndarray]:
    """What is written as NIfTI, by the end of its name."""
    return {
        "output_ens": result.fused.numpy(),
        "mask": result.mask.numpy().astype(np.uint8),
        "uncertainty": result.uncertainty.numpy(),
    }


def _remove_members(stem: str, *, first: int) -> None:
    """Remove what an earlier run with more members has left: scoring would take it for ours."""
    for index in count(first):
        surplus = Path(f"{stem}_output{index}.png")
        if not surplus.exists():
            return
        surplus.unlink()


def _batched(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
