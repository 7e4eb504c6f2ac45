"""The layouts of data sets: their registry, recognising them, and the truths to score against.

A new layout is one loader and one line in ``LAYOUTS``. :func:`open_dataset` opens a folder for
training or prediction, :func:`open_masks` the masks alone for scoring.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.bratsloader import (
    SEG,
    find_cases,
    find_modalities,
    named_since_2023,
    open_brats,
)
from guided_diffusion.custom_dataset_loader import KvasirDataset, open_custom
from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import (
    AS_STORED,
    Entry,
    Reading,
    SegmentationDataset,
    majority,
    require_one_size,
)
from guided_diffusion.data.dicom_volumes import DicomVolumes, holds_series
from guided_diffusion.data.folders import (
    image_files,
    is_nifti,
    listing,
    many_objects,
    open_folder,
    safe_name,
    subfolder,
)
from guided_diffusion.data.geometry import Placed, place, require_view
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.raters import is_rated, mirrored_masks, open_rated, rated_masks
from guided_diffusion.data.readers import Array, read_grid
from guided_diffusion.data.splits import narrowed
from guided_diffusion.data.tumorloader import TumourImages, is_classified
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.isicloader import ISICDataset, has_csv, has_pictures
from guided_diffusion.options.flags import Flags, slice_range
from guided_diffusion.options.segmentation import DataOptions

Loader = Callable[[Path, bool, Reading], SegmentationDataset]
LAYOUTS: dict[str, Loader] = {
    "BRATS": open_brats,
    "ISIC": ISICDataset,
    "KVASIR": KvasirDataset,
    "CUSTOM": open_custom,
    "TUMOR": TumourImages,
    "DICOM": DicomVolumes,
    "RATERS": open_rated,
}
_SUFFIX = re.compile(r"(.+)_(?:segmentation|mask|seg)", re.IGNORECASE)


def open_dataset(
    data_dir: str | Path,
    *,
    data_name: str = "",
    test: bool = False,
    reading: Reading = AS_STORED,
) -> SegmentationDataset:
    """Open a folder by the layout called ``data_name``, or by the one that it is recognised as.

    With ``test=True`` masks may be absent, and are loaded where they are present. Raises
    :class:`UserError` for an unknown name, a missing or empty folder, and a folder that no layout,
    or more than one, recognises.
    """
    folder = open_folder(data_dir)
    with many_objects():
        return _open(folder, data_name, test, reading)


def _open(folder: Path, data_name: str, test: bool, reading: Reading) -> SegmentationDataset:
    name = data_name.upper() or recognise(folder, test=test)
    if name not in LAYOUTS:
        raise UserError(
            "--data_name",
            f"{data_name!r} is not one of {', '.join(LAYOUTS)}",
            "Omit it to have the layout recognised.",
        )
    dataset = with_raters(LAYOUTS[name](folder, test, reading), folder)
    if reading.modalities and not dataset.modalities:
        raise UserError(
            "--modalities",
            f"{','.join(reading.modalities)} cannot be chosen in the {name} layout, whose channels "
            "have no names",
            "Omit --modalities; a model trained on modalities needs BraTS data.",
        )
    if any(end is not None for end in reading.slices) and not dataset.entries[0].volume:
        first, end = ("" if end is None else end for end in reading.slices)
        raise UserError(
            "--slices",
            f"{first}:{end} cannot be selected, for {folder} holds pictures or slices, not volumes",
            "Omit --slices.",
        )
    return dataset


def with_raters(dataset: SegmentationDataset, folder: Path) -> SegmentationDataset:
    """Add the masks in ``raters/``, in ``folder`` or beside it, to the cases of a data set."""
    own = {entry.mask for entry in dataset.entries if entry.mask and not entry.raters}
    if rated := mirrored_masks(folder, own):
        dataset.entries = [
            entry._replace(raters=rated.get(entry.mask, entry.raters)) if entry.mask else entry
            for entry in dataset.entries
        ]
    return dataset


def recognise(folder: Path, *, test: bool = False) -> str:
    """The name of the one layout that ``folder`` has; a :class:`UserError` otherwise."""
    found = _recognised(folder, test=test)
    if len(found) == 1:
        return found[0]
    state = f"fits {' and '.join(found)}" if found else f"holds {_contents(folder)}"
    raise UserError(
        folder,
        f"{state}, but must fit one of these layouts: NIfTI files named by modality (BRATS); an "
        "ISBI2016 CSV or pictures named ISIC_<number> (ISIC); images/ and masks/ (CUSTOM); normal/ "
        "and tumor/ (TUMOR); series of DICOM files (DICOM)",
        "Pass the folder that holds the data, or name its layout with --data_name.",
    )


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
    placed: Callable[[], Placed | None] = lambda: None
    raters: tuple[Truth, ...] = ()

    def __call__(self) -> Array:
        """Decode the mask, float32 [H, W] in [0, 1], or [K, H, W] of declared classes."""
        return self.read()


def open_masks(
    folder: str | Path,
    classes: Classes | None = None,
    *,
    plane: str = "axial",
    raters: bool = True,
) -> dict[str, Truth]:
    """List the truths for scoring by case id; ``plane`` is how volumes are sliced.

    Where a case has the masks of several raters, the truth is their majority; ``raters=False``
    passes over those in ``raters/``, beside a mask of the data set's own.

    ``folder`` is a data set of any layout, or holds mask files named
    ``ISIC_<id>_Segmentation.png``, ``<id>.png``, ``<id>_mask.png``, ``<id>_seg.nii.gz`` and the
    like, with any ending the loaders read. Raises :class:`UserError` where there is no mask.
    """
    folder = open_folder(folder)
    for name in _recognised(folder, test=True):
        dataset = LAYOUTS[name](folder, True, Reading(classes=classes, plane=plane))
        dataset = with_raters(dataset, folder) if raters else dataset
        labelled = [entry for entry in dataset.entries if dataset.has_mask(entry)]
        if labelled:
            return {
                entry.name: _voted(
                    [_entry_truth(dataset, entry, path) for path in entry.masks or (None,)], classes
                )
                for entry in labelled
            }
    if rated := rated_masks(folder):
        return _rated_masks(folder, rated, classes, plane)
    return _bare_masks(folder, classes, plane)


def _recognised(folder: Path, *, test: bool) -> list[str]:
    """List every layout that fits; images/ with ISIC's mask names count as ISIC alone."""
    if is_classified(folder):
        return ["TUMOR"]
    if is_rated(folder):
        return ["RATERS"]
    images, masks = subfolder(folder, "images"), subfolder(folder, "masks")
    paired = images is not None and (masks is not None or test)
    if paired and not (masks and any(masks.glob("*_Segmentation.*"))):
        return ["DICOM"] if holds_series(folder) else ["CUSTOM"]
    labels = subfolder(folder, "labels")
    brats = any(
        files.keys() - {SEG} and not (root == labels and holds_series(folder))
        for root, files in find_cases(folder)
    )
    isic = has_csv(folder) or (not brats and has_pictures(folder))
    found = [name for name, marks in (("BRATS", brats), ("ISIC", isic)) if marks]
    return found or (["DICOM"] if holds_series(folder) else [])


def _contents(folder: Path) -> str:
    return listing(sorted(path.name for path in folder.iterdir())) or "nothing"


def _bare_masks(folder: Path, classes: Classes | None, plane: str) -> dict[str, Truth]:
    """Mask files directly in ``folder``; if some are named as masks, only those are."""
    files = image_files(folder)
    named = {stem: path for stem, path in files.items() if _SUFFIX.fullmatch(stem)}
    masks: dict[str, Truth] = {}
    store = VolumeStore(None)
    since_2023 = named_since_2023(path.name for path in files.values())
    truths = MaskSet(list((named or files).values()), classes, brats="2023" if since_2023 else "")
    for stem, path in (named or files).items():
        found = dict(_truths_in(path, _case_id(stem), truths, store, plane))
        if twice := found.keys() & masks.keys():
            raise UserError(folder, f"has two masks for case {min(twice)}", "Remove one of them.")
        masks |= found
    if not masks:
        raise UserError(
            folder,
            f"holds {_contents(folder)}, but no mask file such as <case>.png",
            "Pass the folder with the ground truth: a labelled data set, or mask files.",
        )
    return masks


def _rated_masks(
    folder: Path, rated: Mapping[str, Sequence[Path]], classes: Classes | None, plane: str
) -> dict[str, Truth]:
    """Mask files of several raters, without images."""
    store = VolumeStore(None)
    truths = MaskSet([path for paths in rated.values() for path in paths], classes)
    masks: dict[str, Truth] = {}
    for name, paths in rated.items():
        each = [dict(_truths_in(path, _case_id(name), truths, store, plane)) for path in paths]
        if any(found.keys() != each[0].keys() for found in each):
            problem = f"the masks of {name} have different numbers of planes"
            raise UserError(folder, problem, "Export the masks of all raters on one grid.")
        masks |= {case: _voted([found[case] for found in each], classes) for case in each[0]}
    return masks


def _voted(truths: Sequence[Truth], classes: Classes | None) -> Truth:
    """The majority of several truths of a case; a single one as it is."""
    first = truths[0]
    if len(truths) == 1:
        return first

    def read() -> Array:
        masks = [torch.from_numpy(truth()) for truth in truths]
        require_one_size([truth.source or Path() for truth in truths], masks)
        stacked = torch.stack(masks)
        voted = majority(stacked[:, None] if classes is None else stacked, classes)
        return _truth(voted, one=classes is None)

    return replace(first, read=read, raters=tuple(truths))


def _truths_in(
    path: Path, case: str, masks: MaskSet, store: VolumeStore, plane: str
) -> Iterator[tuple[str, Truth]]:
    """Yield the one mask of a file, or a mask for every plane of a volume."""
    placed = place(read_grid(path), plane) if is_nifti(path) else None
    if placed is None or len(placed.grid.lengths) != 3:
        yield case, Truth(partial(_file_mask, path, masks), source=path, placed=lambda: placed)
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
                placed=lambda: placed,
            ),
        )


def _case_id(stem: str) -> str:
    """'0000003' for 'ISIC_0000003_Segmentation', 'a' for 'a_mask'."""
    match = _SUFFIX.fullmatch(stem)
    plain = match[1] if match else stem
    number = re.fullmatch(r"ISIC_(\d+)", plain)
    return number[1] if number else safe_name(plain)


def _entry_truth(dataset: SegmentationDataset, entry: Entry, path: Path | None) -> Truth:
    """The truth of an entry in one of its mask's files, None where it has none."""
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


def create_reading(data: DataOptions) -> Reading:
    """What the flags say about reading a data set."""
    return Reading(
        modalities=find_modalities(data.modalities),
        slices=slice_range(data.slices),
        plane=data.plane,
        blank_slices=data.blank_slices,
        normalise=data.normalise,
        cache_dir=_cache_folder(data.cache_dir),
        classes=find_classes(data.mask_labels),
    )


def _cache_folder(text: str) -> Path | None:
    """The folder that ``--cache_dir`` names; None for none, or where nothing is known as home."""
    if text != "auto":
        return None if text == "none" else expanded(text, flag="--cache_dir")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(home) / "guided_diffusion" if home[0] != "~" else None


def open_data(data: DataOptions, *, part: str = "", test: bool = False) -> SegmentationDataset:
    """Open what the flags name: all of it, or with ``--split`` the cases of one part.

    ``test`` accepts cases without masks. Raises what :func:`open_dataset` raises.
    """
    dataset = open_dataset(
        data.data_dir, data_name=data.data_name, test=test, reading=create_reading(data)
    )
    return narrowed(dataset, data.split, part) if data.split and part else dataset


def normalise_flags(flags: Flags) -> Flags:
    """Write the given modalities and classes as a checkpoint records them."""
    classes = find_classes(flags.given.get("mask_labels", ""))
    if classes is not None:
        flags = flags.with_given(mask_labels=str(classes))
    if names := flags.given.get("modalities"):
        flags = flags.with_given(modalities=",".join(find_modalities(names)))
    return flags
