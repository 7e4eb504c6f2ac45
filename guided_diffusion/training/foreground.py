"""Which training cases have a lesion: ``--foreground_share`` draws these more often."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from tqdm import tqdm

from guided_diffusion.data.batches import Foreground
from guided_diffusion.data.datasets import Entry, SegmentationDataset, majority
from guided_diffusion.data.folders import counted
from guided_diffusion.data.frames import Frame
from guided_diffusion.dist_util import all_gather_object, rank
from guided_diffusion.errors import UserError
from guided_diffusion.inference.cases import share_of
from guided_diffusion.options.segmentation import TrainingOptions


def resolve_foreground(
    dataset: SegmentationDataset, frame: Frame, options: TrainingOptions
) -> tuple[Foreground | None, list[str]]:
    """Find the cases to draw more often, if any, and what to say about them.

    Raises:
        UserError: no case has a lesion, as far as the masks can be read.
    """
    share = options.foreground_share
    if not share:
        return None, []
    found = find_lesions(dataset, frame, rater_choice=options.rater_choice)
    if not found:
        raise UserError(
            f"--foreground_share {share:g}",
            f"no case of {dataset.directory} has a lesion",
            "Omit it, or see what scripts/check_data.py says of the masks.",
        )
    if len(found) == len(dataset):
        return None, ["--foreground_share has no effect: every case has a lesion"]
    note = (
        f"{len(found)} of {counted(len(dataset), 'case')} have a lesion; --foreground_share "
        f"{share:g} draws that share of the batches from them"
    )
    return Foreground(share, found), [note]


def find_lesions(
    dataset: SegmentationDataset, frame: Frame, *, rater_choice: str = "random"
) -> Sequence[int]:
    """Find the cases whose mask is not empty at the network's size, by index.

    Masks alone are read, each once. Every process reads a share of them, all slices of a volume
    together, and all get the same answer. A mask that cannot be read is an error once it is drawn.

    Raises:
        UserError: no case has a lesion, and some mask cannot be read.
    """
    found: list[int] = []
    errors: list[UserError] = []
    mine = share_of(range(len(dataset)), dataset.entries)
    bar = tqdm(mine, "masks", unit="mask", leave=False, delay=2, disable=rank() > 0 or None)
    for index in bar:
        try:
            if _has_lesion(dataset, dataset.entries[index], frame, rater_choice):
                found.append(index)
        except UserError as error:
            errors = errors or [error]
    parts = all_gather_object((found, errors))
    everywhere = sorted(chain(*(own for own, _ in parts)))
    unread = [*chain(*(own for _, own in parts))]
    if unread and not everywhere:
        raise unread[0]
    return everywhere


def _has_lesion(
    dataset: SegmentationDataset, entry: Entry, frame: Frame, rater_choice: str
) -> bool:
    mask = dataset.read_raters(entry)
    if mask is None:
        mask = dataset.read_mask(entry)
    elif rater_choice == "majority":
        mask = majority(mask, dataset.classes)
    if mask is not None and dataset.classes is not None:
        # A class that has the label 0 is no lesion: every case would have one.
        mask = mask[..., [0 not in labels for labels in dataset.classes.labels], :, :]
    return mask is not None and bool(mask.any()) and bool(frame.fit_mask(mask).any())
