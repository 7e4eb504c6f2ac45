"""Measure how fast training cases are loaded, and how fast a large folder is indexed.

    python benchmarks/data_slices.py --data_dir data/training --workers 2 --size 256

prints images per second through the training loader, for the first epoch (every file is decoded)
and for later ones (decoded cases are read from the run's cache). Cases are repeated until a set has
at least 500 of them.

    python benchmarks/data_slices.py --index 100000

times opening a synthetic folder of so many files, for the BraTS layout and for images/ and masks/.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.cache import GIB, CachedDataset
from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.layouts import open_dataset

FEWEST = 500


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores\n")
    with exit_on_user_error():
        if arguments.index:
            index(arguments.index)
        else:
            throughput(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", nargs="*", default=[], help="labelled data sets")
    parser.add_argument("--workers", type=int, default=2, help="reading processes")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a batch")
    parser.add_argument("--index", type=int, default=0, help="files to index instead")
    return parser.parse_args()


def throughput(arguments: argparse.Namespace) -> None:
    """Print a row per data set: the first epoch, a later one, a later one with augmentation."""
    print("| set | cases | first epoch, images/s | later epochs | with --augment |")
    print("|---|---|---|---|---|")
    for folder in map(Path, arguments.data_dir):
        dataset = repeated(open_dataset(folder))
        resized = ResizedDataset(dataset, Frame(arguments.size))
        cached = CachedDataset(resized, most_bytes=4 * GIB)
        rates = [rate(cached, arguments, augmentation=None) for _ in range(2)]
        rates.append(rate(cached, arguments, augmentation=Augmentation()))
        shown = " | ".join(f"{value:.0f}" for value in rates)
        print(f"| {folder.parent.name}/{folder.name} | {len(dataset)} | {shown} |", flush=True)


def repeated(dataset: SegmentationDataset) -> SegmentationDataset:
    """Repeat the cases until there are enough; each copy is decoded separately."""
    copies = -(-FEWEST // len(dataset))
    dataset.entries = [
        entry._replace(name=f"{entry.name}_{copy}" if copies > 1 else entry.name)
        for copy in range(copies)
        for entry in dataset.entries
    ]
    dataset.names = [entry.name for entry in dataset.entries]
    return dataset


def rate(
    cached: CachedDataset, arguments: argparse.Namespace, *, augmentation: Augmentation | None
) -> float:
    """Return images per second over one epoch, without the start of the reading processes."""
    batches = training_batches(
        cached,
        arguments.batch_size,
        seed=0,
        workers=arguments.workers,
        augmentation=augmentation,
    )
    next(batches)
    count = len(cached) // arguments.batch_size - 1
    started = time.perf_counter()
    for _ in tqdm(islice(batches, count), total=count, leave=False, disable=None):
        pass
    return count * arguments.batch_size / (time.perf_counter() - started)


def index(files: int) -> None:
    """Print a row per layout: seconds and CPU seconds of opening a folder twice."""
    print("| layout | files | opened first, s | again, s | again, s of processor |")
    print("|---|---|---|---|---|")
    pairs = {
        "CUSTOM": ("images/case{:06d}.png", "masks/case{:06d}.png"),
        "NNUNET": ("imagesTr/case{:06d}_0000.png", "labelsTr/case{:06d}.png"),
        "SUFFIX": ("case{:06d}.png", "case{:06d}_mask.png"),
    }
    writers = {name: partial(write_pairs, names=names) for name, names in pairs.items()}
    for name, write in {"BRATS": write_slices, **writers}.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), files)
            (first, _), (again, cpu) = opening_time(folder, name), opening_time(folder, name)
            print(f"| {name} | {files} | {first:.2f} | {again:.2f} | {cpu:.2f} |", flush=True)


def opening_time(folder: str, layout: str) -> tuple[float, float]:
    """Return the seconds and CPU seconds of opening a folder."""
    started, cpu = time.perf_counter(), time.process_time()
    assert open_dataset(folder).layout == layout
    return time.perf_counter() - started, time.process_time() - cpu


def write_slices(folder: Path, files: int) -> None:
    """Write case folders of five files, all empty except in the first, whose headers are read."""
    for case in tqdm(range(files // 5), leave=False, disable=None):
        case_folder = folder / f"{case:06d}"
        case_folder.mkdir()
        for name in ("t1", "t1ce", "t2", "flair", "seg"):
            (case_folder / f"brats_train_{case // 60:03d}_{name}_{case % 60:03d}_w.nii.gz").touch()
    for path in (folder / "000000").iterdir():
        nib.save(nib.Nifti1Image(np.zeros((8, 8), np.uint8), np.eye(4)), path)


def write_pairs(folder: Path, files: int, names: Sequence[str]) -> None:
    """Write images and masks of some names, each of them one picture under many names."""
    for name in names:
        Image.new("L", (8, 8)).save(folder / ".picture.png")
        (folder / name).parent.mkdir(exist_ok=True)
        for case in tqdm(range(files // 2), leave=False, disable=None):
            (folder / name.format(case)).hardlink_to(folder / ".picture.png")
        (folder / ".picture.png").unlink()


if __name__ == "__main__":
    main()
