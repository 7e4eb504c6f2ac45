"""What to say about a data set as a whole: masks that mark too much or nothing, and intensities."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import ArrayLike

from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.folders import counted
from guided_diffusion.data.tumorloader import patient_of
from guided_diffusion.errors import UserError

LOOKED_AT = 8
"""Images whose intensities are measured before a run."""
FAR = 20.0
NARROW = 0.05
FEWEST_OF_A_CLASS = 20
TELLING = 0.8


def are_raw(low: float, high: float) -> bool:
    """Whether intensities are far from those of pictures and of standardised images.

    The latter have negative values, and outliers.
    """
    return max(-low, high) > (FAR if low >= 0 else 5 * FAR)


def interval_accuracy(values: ArrayLike, positive: ArrayLike) -> float:
    """How well one interval of a number tells two classes apart, on the very values given.

    Args:
        values: a number for each case [N].
        positive: its class, bool [N]; both classes occur.

    Returns:
        The balanced accuracy, 0.5 to 1, of the best rule "positive inside an interval" or "outside
        it": (1 + V) / 2 with the statistic V of Kuiper (1960).
    """
    marked = np.asarray(positive, dtype=bool)
    levels, place = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    ours = np.bincount(place[marked], minlength=len(levels)) / marked.sum()
    others = np.bincount(place[~marked], minlength=len(levels)) / (~marked).sum()
    ahead = np.cumsum(ours - others)
    return float(1 + max(ahead.max(), 0.0) - min(ahead.min(), 0.0)) / 2


def shortcut_notes(labels: Mapping[str, int], means: Mapping[str, float]) -> list[str]:
    """Warn where the class of images follows from their place or brightness alone.

    A network that is trained on such labels may learn no more than that, and its maps then do not
    show the lesion.

    Args:
        labels: 1 for images with a lesion, else 0. The last number of a name that also has one of
            its patient is the slice.
        means: mean intensity of the images, as far as it is known.
    """
    slices = [name for name in labels if patient_of(name)]
    places = {name: float(re.findall(r"\d+", name)[-1]) for name in slices}
    notes = []
    for what, values in (("slice number", places), ("mean intensity", means)):
        marked = [bool(labels[name]) for name in values]
        if min(sum(marked), len(marked) - sum(marked)) < FEWEST_OF_A_CLASS:
            continue
        accuracy = interval_accuracy([*values.values()], marked)
        if accuracy >= TELLING:
            notes.append(
                f"the {what} alone tells normal images from those with a lesion (balanced accuracy "
                f"{accuracy:.2f}); a network can learn that instead of the lesion: choose normal "
                f"images like the others in it"
            )
    return notes


def mask_notes(dataset: SegmentationDataset) -> list[str]:
    """Warn of masks that mark most of their images, or nothing, as far as they can be read.

    One mask is read, so that the set's kind is decided; loaders with masks of their own format have
    no such notes.
    """
    for entry in dataset.entries:
        if entry.mask is not None:
            with suppress(UserError):
                dataset.read_mask(entry)
            break
    return list(dataset.masks.notes)


def intensity_notes(dataset: SegmentationDataset) -> list[str]:
    """Say in which range some images lie, and which ``--normalise`` would suit them better.

    Volumes that are scaled as a whole are not read.
    """
    if dataset.normalise != "none":
        return [f"intensities are scaled by --normalise {dataset.normalise}"]
    count, levels = min(len(dataset), LOOKED_AT), []
    for index in range(count):
        with suppress(UserError):
            image, _ = dataset.read_image(dataset.entries[index * len(dataset) // count])
            levels.append((float(image.min()), float(image.max())))
    if not levels:
        return []
    low, high = min(low for low, _ in levels), max(high for _, high in levels)
    advice = intensity_advice(low, high)
    return [
        f"intensities from {low:.4g} to {high:.4g} in {counted(len(levels), 'case')} looked at"
        + (f"; {advice}" if advice else "")
    ]


def intensity_advice(low: float, high: float) -> str:
    """Advise a ``--normalise`` for images that are read as stored; empty where none is needed."""
    if are_raw(low, high):
        return (
            "a network needs about 0 to 1: --normalise percentile scales every image to that, "
            "--normalise zscore to mean 0 and deviation 1"
        )
    if 0 < high - low < NARROW:
        return "they fill little of 0 to 1: --normalise minmax would stretch every image to that"
    return ""
