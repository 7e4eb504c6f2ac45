"""What to say about a data set as a whole: masks that mark too much or nothing, and intensities."""

from __future__ import annotations

from contextlib import suppress

from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.folders import counted
from guided_diffusion.errors import UserError

LOOKED_AT = 8
"""Images whose intensities are measured before a run."""
FAR = 20.0
NARROW = 0.05


def are_raw(low: float, high: float) -> bool:
    """Whether intensities are far from those of pictures and of standardised images.

    The latter have negative values, and outliers.
    """
    return max(-low, high) > (FAR if low >= 0 else 5 * FAR)


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
