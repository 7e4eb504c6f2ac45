"""The layouts of data sets: their registry, recognising them, and the truths to score against.

``LAYOUTS`` holds the layouts that have a loader of their own, and ``TABLE`` of
:mod:`guided_diffusion.data.layout_table` those that are a line each. :func:`open_dataset` opens a
folder for training or prediction, :func:`open_masks` the masks alone for scoring.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from guided_diffusion.bratsloader import (
    MODALITIES,
    SEG,
    find_cases,
    find_modalities,
    named_since_2023,
    open_brats,
)
from guided_diffusion.custom_dataset_loader import KvasirDataset, open_custom
from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import (
    ENDINGS,
    is_nifti,
    many_objects,
    mask_files,
    names_in,
    open_folder,
    safe_name,
    split_name,
    subfolder,
)
from guided_diffusion.data.geometry import Placed, place, require_view
from guided_diffusion.data.layout_table import TABLE
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.matching import (
    FEW_NAMES,
    files_below,
    match,
    recognised,
)
from guided_diffusion.data.opening import (
    PAGE,
    contents,
    is_wrapped,
    open_bare,
    part_folder,
    part_folders,
    require_chosen,
    unrecognised,
)
from guided_diffusion.data.readers import Array, read_grid
from guided_diffusion.data.splits import narrowed
from guided_diffusion.data.table_loader import open_layout
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
}
_ISIC_MASK = re.compile(r"_Segmentation\.|^ISIC_\d+_segmentation\.")
_SUFFIX = re.compile(r"(.+)_(?:segmentation|mask|seg)", re.IGNORECASE)


def open_dataset(
    data_dir: str | Path,
    *,
    data_name: str = "",
    test: bool = False,
    part: str = "",
    reading: Reading = AS_STORED,
) -> SegmentationDataset:
    """Open a folder by the layout called ``data_name``, or by the one that it is recognised as.

    With ``test=True`` masks may be absent, and are loaded where they are present; a folder of bare
    images and a single file will do, too. ``part`` is what to open of a folder that has parts,
    'training', 'validation' or 'testing'; by default what ``test`` says. Raises :class:`UserError`
    for an unknown name, a missing or empty folder, and a folder that no layout, or more than one,
    recognises.
    """
    name = data_name.upper()
    known = list(dict.fromkeys([*LAYOUTS, *(layout.name for layout in TABLE)]))
    if name and name not in known:
        raise UserError(
            "--data_name",
            f"{data_name!r} is not one of {', '.join(known)}",
            "Omit it to have the layout recognised.",
        )
    path, wanted = expanded(data_dir), part or ("testing" if test else "training")
    with many_objects():
        if test and path.is_file():
            dataset = open_bare(path.parent, [path.name], reading)
            if dataset is None:
                hint = f"Pass a file that ends in one of {' '.join(ENDINGS)}, or a folder."
                raise UserError(path, "is neither a picture nor a NIfTI file", hint)
            dataset.directory = path
        else:
            dataset = _open(open_folder(data_dir), name, wanted, test, reading)
    if dataset is None:
        raise UserError(data_dir, f"has no part for {wanted}", f"Add one, or see {PAGE}.")
    require_chosen(dataset, reading)
    return dataset


def _open(
    folder: Path, name: str, wanted: str, test: bool, reading: Reading
) -> SegmentationDataset | None:
    """Open a part of a folder; None where it has parts, but not this one."""
    found = [name] if name else _recognised(folder, test=test, modalities=reading.modalities)
    if len(found) > 1:
        problem = f"fits {' and '.join(found)}, but must fit one layout"
        raise UserError(folder, problem, f"Choose with --data_name {found[0]} or {found[1]}.")
    if found and found[0] in LAYOUTS:
        return LAYOUTS[found[0]](folder, test, reading)
    if parts := part_folders(folder):
        within = part_folder(parts, wanted)
        part = wanted if wanted == "training" else "testing"  # what is in the folder is all of it
        dataset = within and _open(within, name, part, test, reading)
        if dataset:
            dataset.notes.append(
                f"of {', '.join(p.name for p in parts.values())}, {within} is read"
            )
        return dataset or None
    files = files_below(folder)
    table = [layout for layout in TABLE if name in ("", layout.name)]
    layout = recognised(files, test=test, modalities=reading.modalities, table=table)
    if layout is not None and not (layout.by_pairs and is_wrapped(folder)):
        return open_layout(layout, files, wanted=wanted, reading=reading)
    dataset = open_bare(folder, names_in(folder), reading) if test and not name else None
    if dataset is None:
        raise unrecognised(folder, files, table, [*LAYOUTS], is_one=_is_one, test=test)
    return dataset


@dataclass(frozen=True)
class Truth:
    """A mask to score against, read when called; ``patient`` is empty where it is unknown.

    ``volume`` and ``plane`` are its place in a volume; ``source`` is its file, and ``placed`` says
    where its planes lie, None for pictures; ``image`` decodes the picture itself, float32
    [C, H, W].
    """

    read: Callable[[], Array]
    patient: str = ""
    volume: str = ""
    plane: int | None = None
    source: Path | None = None
    image: Callable[[], Array] | None = None
    placed: Callable[[], Placed | None] = lambda: None

    def __call__(self) -> Array:
        """Decode the mask, float32 [H, W] in [0, 1], or [K, H, W] of declared classes."""
        return self.read()


def open_masks(
    folder: str | Path, classes: Classes | None = None, *, plane: str = "axial"
) -> dict[str, Truth]:
    """List the truths for scoring by case id; ``plane`` is how volumes are sliced.

    ``folder`` is a data set of any layout, or holds mask files named
    ``ISIC_<id>_Segmentation.png``, ``<id>.png``, ``<id>_mask.png``, ``<id>_seg.nii.gz`` and the
    like, with any ending the loaders read. Raises :class:`UserError` where there is no mask.
    """
    folder = open_folder(folder)
    reading = Reading(classes=classes, plane=plane)
    for dataset in _labelled_sets(folder, reading):
        labelled = [entry for entry in dataset.entries if dataset.has_mask(entry)]
        if labelled:
            return {
                entry.name: Truth(
                    partial(_entry_mask, dataset, entry),
                    patient=entry.patient,
                    volume=entry.volume,
                    plane=entry.plane,
                    source=entry.mask,
                    image=partial(_entry_image, dataset, entry),
                    placed=partial(dataset.placed, entry),
                )
                for entry in labelled
            }
    return _bare_masks(folder, classes, plane)


def _labelled_sets(folder: Path, reading: Reading) -> Iterator[SegmentationDataset]:
    """Yield the data sets that a folder may be, of parts that of testing first."""
    for name in _recognised(folder, test=True):
        yield LAYOUTS[name](folder, True, reading)
    if any(_SUFFIX.fullmatch(split_name(name)[0]) for name in names_in(folder)):
        return  # masks beside whatever else there is
    if parts := part_folders(folder):
        for part in ("testing", "validation", "training"):
            if part in parts:
                yield from _labelled_sets(parts[part], reading)
        return
    files = files_below(folder)
    layout = recognised(files)
    for wanted in ("testing", "validation", "training") if layout else ():
        assert layout is not None
        with suppress(UserError):  # without masks there, training is no part to score
            dataset = open_layout(layout, files, wanted=wanted, reading=reading)
            if dataset is not None:
                yield dataset


def _recognised(folder: Path, *, test: bool, modalities: Collection[str] = ()) -> list[str]:
    """List every layout with a loader that fits; images/ with ISIC's mask names are ISIC alone."""
    if is_classified(folder):
        return ["TUMOR"]
    if (folder / "imagesTr").is_dir() or any(name not in MODALITIES for name in modalities):
        return []
    images, masks = subfolder(folder, "images"), subfolder(folder, "masks")
    if images is not None and (masks is not None or test):
        names = names_in(masks) if masks else []
        if not any(map(_ISIC_MASK.search, names)):
            return [] if _has_other_pairs(folder, images, names) else ["CUSTOM"]
    first = next((files for _, files in find_cases(folder) if files.keys() - {SEG}), {})
    brats = bool(first) and not (max(map(len, first.values())) > 1 and _is_flat(folder))
    isic = has_csv(folder) or (not first and has_pictures(folder))
    return [name for name, marks in (("BRATS", brats), ("ISIC", isic)) if marks]


def _is_one(folder: Path) -> bool:
    found = part_folders(folder) or _recognised(folder, test=False)
    return bool(found or recognised(files_below(folder)))


def _has_other_pairs(folder: Path, images: Path, masks: Sequence[str]) -> bool:
    """Whether the masks of images/ are named or placed otherwise than those of CUSTOM."""
    few = {split_name(name)[0] for name in masks[:FEW_NAMES]}
    if few and any(split_name(name)[0] in few for name in names_in(images)):
        return False
    return recognised(files_below(folder)) is not None


def _is_flat(folder: Path) -> bool:
    """Whether modalities of several cases lie side by side, each case with the same ones."""
    if (layout := recognised(files := files_below(folder))) is None:
        return False
    found = match(layout, files, few=True)
    return not found.others and len({tuple(sorted(of)) for of in found.images.values()}) == 1


def _bare_masks(folder: Path, classes: Classes | None, plane: str) -> dict[str, Truth]:
    """Mask files directly in ``folder``; if some are named as masks, only those are."""
    files = mask_files(folder)
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
            f"holds {contents(folder)}, but no mask file such as <case>.png",
            "Pass the folder with the ground truth: a labelled data set, or mask files.",
        )
    return masks


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

    ``test`` accepts cases without masks. Of a folder that is divided itself, training's part is
    opened, or with ``test`` and no split testing's. Raises what :func:`open_dataset` raises.
    """
    dataset = open_dataset(
        data.data_dir,
        data_name=data.data_name,
        test=test,
        part="training" if data.split and test else "",
        reading=create_reading(data),
    )
    return narrowed(dataset, data.split, part) if data.split and part else dataset


def open_validation(data: DataOptions) -> SegmentationDataset | None:
    """Open the part for validation of a folder that is divided itself; None where it has none."""
    folder, name = open_folder(data.data_dir), data.data_name.upper()
    reading = create_reading(data)
    if name in LAYOUTS or (
        not name and _recognised(folder, test=False, modalities=reading.modalities)
    ):
        return None
    with many_objects():
        dataset = _open(folder, name, "validation", True, reading)
    return dataset if dataset and any(map(dataset.has_mask, dataset.entries)) else None


def normalise_flags(flags: Flags) -> Flags:
    """Write the given modalities and classes as a checkpoint records them."""
    classes = find_classes(flags.given.get("mask_labels", ""))
    if classes is not None:
        flags = flags.with_given(mask_labels=str(classes))
    if names := flags.given.get("modalities"):
        flags = flags.with_given(modalities=",".join(find_modalities(names)))
    return flags
