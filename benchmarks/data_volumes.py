"""Measure slices per second from BraTS volumes, decompressed for each slice or once.

    python benchmarks/data_volumes.py --volumes 20

writes phantom volumes (240 x 240 x 155, four modalities and labels) into a temporary folder, or
reads the folder of --data, and prints one Markdown table, all measured in this run. The method of
the parent projects, which decompress every file of a case for each slice, is timed on a few slices.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import torch

from guided_diffusion.bratsloader import BRATSDataset3D
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import exit_on_user_error

GIB = 2**30


def main() -> None:
    torch.set_num_threads(1)
    arguments = parse()
    with exit_on_user_error(), tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_phantoms(Path(scratch) / "volumes", arguments)
        compare(data, Path(scratch) / "cache", arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder of volumes; default: phantoms are written")
    add("--volumes", type=int, default=20, help="phantom volumes (default 20)")
    add("--size", type=int, default=240, help="pixels per side (default 240)")
    add("--depth", type=int, default=155, help="axial slices (default 155)")
    add("--cache_gib", type=float, default=0.5, help="memory for volumes (default 0.5)")
    add("--parent_slices", type=int, default=8, help="slices read the parents' way (default 8)")
    return parser.parse_args()


def write_phantoms(folder: Path, arguments: argparse.Namespace) -> Path:
    script = Path(__file__).resolve().parents[1] / "scripts/make_phantoms.py"
    flags = {
        "--out": folder,
        "--layout": "brats3d",
        "--patients": arguments.volumes,
        "--size": arguments.size,
        "--slices": arguments.depth,
        "--split": 1,
    }
    words = [str(word) for flag in flags.items() for word in flag]
    subprocess.run([sys.executable, str(script), *words], check=True)
    return folder


def compare(data: Path, cache: Path, arguments: argparse.Namespace) -> None:
    """Time all methods over the same slices, in order and shuffled."""
    in_memory = BRATSDataset3D(data, reading=Reading())
    in_memory.store = VolumeStore(None, most_bytes=int(arguments.cache_gib * GIB))
    on_disk = BRATSDataset3D(data, reading=Reading(cache_dir=cache))
    count = len(on_disk)
    shuffled = random.Random(0).sample(range(count), count)
    few = shuffled[: arguments.parent_slices]

    parents = rate(lambda index: read_as_parents(on_disk, index), few)
    started = time.perf_counter()
    for path in {path for e in on_disk.entries for path in (*e.images, e.mask) if path}:
        on_disk.store(path)
    unpacking = time.perf_counter() - started

    volumes = len({entry.volume for entry in on_disk.entries})
    stored = sum(path.stat().st_size for path in cache.iterdir()) / GIB
    print(f"{volumes} volumes, {count} slices, {on_disk.channels} modalities and labels; one core")
    print(f"unpacked once in {unpacking:.0f} s into {stored:.2f} GiB\n")
    print("| way | order | slices per second | against the parents' |")
    print("|---|---|---|---|")
    row("every file decompressed for each slice (parents)", "any", parents, parents)
    row("unpacked on disk", "random", rate(on_disk.__getitem__, shuffled), parents)
    row("unpacked on disk", "in order", rate(on_disk.__getitem__, range(count)), parents)
    kept = f"kept in {arguments.cache_gib:g} GiB of memory"
    row(kept, "in order", rate(in_memory.__getitem__, range(min(count, 620))), parents)
    row(kept, "random", rate(in_memory.__getitem__, few), parents)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of the process: {peak:.2f} GiB")


def read_as_parents(dataset: BRATSDataset3D, index: int) -> np.ndarray:
    """Decompress every file of the case to read one plane of each."""
    entry = dataset.entries[index]
    files = [path for path in (*entry.images, entry.mask) if path is not None]
    planes = [np.asarray(nib.load(path).get_fdata()[:, :, entry.plane]) for path in files]
    return np.stack(planes)


def rate(read: Callable[[int], object], indices: Iterable[int]) -> float:
    """Return slices per second."""
    indices = list(indices)
    started = time.perf_counter()
    for index in indices:
        read(index)
    return len(indices) / (time.perf_counter() - started)


def row(way: str, order: str, slices: float, parents: float) -> None:
    print(f"| {way} | {order} | {slices:.2f} | {slices / parents:.3g}x |", flush=True)


if __name__ == "__main__":
    main()
