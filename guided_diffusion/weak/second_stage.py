"""The second stage: weak masks beside their images, for supervised training to read."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.data.datasets import Entry
from guided_diffusion.data.folders import counted, is_nifti
from guided_diffusion.data.tumorloader import CLASSES, LabelledImages, TumourImages
from guided_diffusion.files import atomic_write, make_folder
from guided_diffusion.scoring.predictions import read_soft

FOLDER = "dataset"


def write_training_set(dataset: LabelledImages, names: Collection[str], folder: Path) -> Path:
    """Write images and their weak masks in the TUMOR layout, into ``dataset`` below a folder.

    Images are copied; slices of NumPy volumes become PNG of 16 bits. An image that is labelled
    normal and has an empty mask is in ``normal/``, any other in ``tumor/`` with its mask in
    ``seg/``. Cases of the data set that are not among the names are removed.

    Args:
        dataset: the images.
        names: of those that were segmented.
        folder: has ``<name>_mask.png`` for each of them.

    Returns:
        The folder of the data set.

    Raises:
        UserError: a file cannot be written.
    """
    root = folder / FOLDER
    folders = {name: make_folder(root / name, flag="--results_dir") for name in (*CLASSES, "seg")}
    chosen, lesions = set(names), 0
    for entry in dataset.entries:
        image, mask = f"{entry.name}{_ending(dataset, entry)}", f"{entry.name}.png"
        weak = folder / f"{entry.name}_mask.png"
        wanted = entry.name in chosen
        ill = wanted and bool(dataset.labels[entry.name] or (read_soft(weak) > 0).any())
        for name in CLASSES:
            if not wanted or ill != (name == CLASSES[1]):
                (folders[name] / image).unlink(missing_ok=True)
        if wanted:
            _write_image(dataset, entry, folders[CLASSES[ill]] / image)
        if ill:
            _copy(weak, folders["seg"] / mask)
        else:
            (folders["seg"] / mask).unlink(missing_ok=True)
        lesions += ill
    logger.log(
        f"{counted(len(names), 'image')}, {lesions} of them with a mask, to train on: {root}"
    )
    return root


def _ending(dataset: LabelledImages, entry: Entry) -> str:
    if not isinstance(dataset, TumourImages):
        return ".png"
    path = entry.images[0]
    return ".nii.gz" if is_nifti(path) and path.suffix == ".gz" else path.suffix


def _write_image(dataset: LabelledImages, entry: Entry, path: Path) -> None:
    if isinstance(dataset, TumourImages):
        _copy(entry.images[0], path)
        return
    image, _ = dataset.read_image(entry)
    levels = (65535 * image[0].clamp(0, 1).numpy() + 0.5).astype(np.uint16)
    with atomic_write(path) as part:
        Image.fromarray(levels).save(part, format="PNG")


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as part:
        shutil.copyfile(source, part)
