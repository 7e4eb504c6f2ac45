"""Masks to score against, each read when it is needed: of a data set's cases, or of bare files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.datasets import (
    Entry,
    SegmentationDataset,
    majority,
    require_one_size,
)
from guided_diffusion.data.folders import is_nifti, mask_files, safe_name
from guided_diffusion.data.geometry import Placed, place, require_view
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.opening import contents
from guided_diffusion.data.readers import Array, read_grid
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import UserError

SUFFIX = re.compile(r"(.+)_(?:segmentation|mask|seg)", re.IGNORECASE)
"""The name of a file that is a mask by its name, without the ending."""


def _same(placed: Placed | None) -> Placed | None:
    return placed


def _nowhere() -> None:
    return None


@dataclass(frozen=True)
class Truth:
    """A mask to score against, read when called; ``patient`` is empty where it is unknown.

    ``volume`` and ``plane`` are its place in a volume; ``source`` is its file, and ``placed`` says
    where its planes lie, None for pictures; ``image`` decodes the picture itself, float32
    [C, H, W]. ``raters`` are the masks of several raters, whose majority it is.
    """

    read: Callable[[], Array]
    patient: str = ""
    volume: str = ""
    plane: int | None = None
    source: Path | None = None
    image: Callable[[], Array] | None = None
    placed: Callable[[], Placed | None] = _nowhere
    raters: tuple[Truth, ...] = ()

    def __call__(self) -> Array:
        """Decode the mask, float32 [H, W] in [0, 1], or [K, H, W] of declared classes."""
        return self.read()


def bare_masks(
    folder: Path,
    classes: Classes | None,
    plane: str,
    *,
    since_2023: Callable[[Iterable[str]], bool],
) -> dict[str, Truth]:
    """List mask files directly in ``folder``; if some are named as masks, only those are.

    ``since_2023`` says whether files are named as in BraTS since then. Raises :class:`UserError`
    where there is none, or two of a case.
    """
    files = mask_files(folder)
    named = {stem: path for stem, path in files.items() if SUFFIX.fullmatch(stem)}
    masks: dict[str, Truth] = {}
    store = VolumeStore(None)
    brats = "2023" if since_2023(path.name for path in files.values()) else ""
    truths = MaskSet(list((named or files).values()), classes, brats=brats)
    for stem, path in (named or files).items():
        found = dict(_truths_in(path, _case_id(stem), truths, store, plane))
        if twice := found.keys() & masks.keys():
            raise UserError(folder, f"has two masks for case {min(twice)}", "Remove one of them.")
        masks |= found
    if not masks:
        raise UserError(
            folder,
            f"holds {contents(folder)}, but no mask file such as <case>.png",
            "Pass the folder with the ground truth: a labelled data set, or mask files.",
        )
    return masks


def rated_files(
    folder: Path, rated: Mapping[str, Sequence[Path]], classes: Classes | None, plane: str
) -> dict[str, Truth]:
    """List mask files of several raters, without images, by case; each truth is their majority."""
    store = VolumeStore(None)
    truths = MaskSet([path for paths in rated.values() for path in paths], classes)
    masks: dict[str, Truth] = {}
    for name, paths in rated.items():
        each = [dict(_truths_in(path, _case_id(name), truths, store, plane)) for path in paths]
        if any(found.keys() != each[0].keys() for found in each):
            problem = f"the masks of {name} have different numbers of planes"
            raise UserError(folder, problem, "Export the masks of all raters on one grid.")
        masks |= {case: voted([found[case] for found in each], classes) for case in each[0]}
    return masks


def voted(truths: Sequence[Truth], classes: Classes | None) -> Truth:
    """Return the majority of several truths of a case; a single one as it is."""
    first = truths[0]
    if len(truths) == 1:
        return first

    return replace(first, read=partial(_voted, tuple(truths), classes), raters=tuple(truths))


def _voted(truths: Sequence[Truth], classes: Classes | None) -> Array:
    masks = [torch.from_numpy(truth()) for truth in truths]
    require_one_size([truth.source or Path() for truth in truths], masks)
    stacked = torch.stack(masks)
    voted = majority(stacked[:, None] if classes is None else stacked, classes)
    return _truth(voted, one=classes is None)


def _truths_in(
    path: Path, case: str, masks: MaskSet, store: VolumeStore, plane: str
) -> Iterator[tuple[str, Truth]]:
    """Yield the one mask of a file, or a mask for every plane of a volume."""
    placed = place(read_grid(path), plane) if is_nifti(path) else None
    if placed is None or len(placed.grid.lengths) != 3:
        yield (
            case,
            Truth(partial(_file_mask, path, masks), source=path, placed=partial(_same, placed)),
        )
        return
    for position in range(placed.view.depth):
        yield (
            f"{case}_slice{position:03d}",
            Truth(
                partial(_plane_mask, path, placed, position, masks, store),
                patient=case,
                volume=case,
                plane=position,
                source=path,
                placed=partial(_same, placed),
            ),
        )


def _case_id(stem: str) -> str:
    """'0000003' for 'ISIC_0000003_Segmentation', 'a' for 'a_mask'."""
    match = SUFFIX.fullmatch(stem)
    plain = match[1] if match else stem
    number = re.fullmatch(r"ISIC_(\d+)", plain)
    return number[1] if number else safe_name(plain)


def entry_truth(dataset: SegmentationDataset, entry: Entry, path: Path | None) -> Truth:
    """Return the truth of an entry in one of its masks' files; None where it has none."""
    alone = entry._replace(mask=path, raters=())
    return Truth(
        partial(_entry_mask, dataset, alone),
        patient=entry.patient,
        volume=entry.volume,
        plane=entry.plane,
        source=path,
        image=partial(_entry_image, dataset, entry),
        placed=partial(dataset.placed, alone),
    )


def _entry_mask(dataset: SegmentationDataset, entry: Entry) -> Array:
    mask = dataset.read_mask(entry)
    assert mask is not None
    return _truth(mask, one=dataset.classes is None)


def _entry_image(dataset: SegmentationDataset, entry: Entry) -> Array:
    return np.asarray(dataset.read_image(entry)[0].numpy(), dtype=np.float32)


def _plane_mask(
    path: Path, placed: Placed, plane: int, masks: MaskSet, store: VolumeStore
) -> Array:
    view = require_view(path, store.grid(path), placed, other=path)
    values = store.plane(path, view, plane)
    return _truth(masks.read_plane(path, values), one=masks.classes is None)


def _file_mask(path: Path, masks: MaskSet) -> Array:
    return _truth(masks.read(path), one=masks.classes is None)


def _truth(mask: Tensor, *, one: bool) -> Array:
    return np.asarray((mask[0] if one else mask).numpy(), dtype=np.float32)
