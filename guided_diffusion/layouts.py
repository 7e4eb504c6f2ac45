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
from pathlib import Path

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
from guided_diffusion.data.datasets import (
    AS_STORED,
    Reading,
    SegmentationDataset,
)
from guided_diffusion.data.dicom_volumes import DicomVolumes, holds_series
from guided_diffusion.data.folders import (
    ENDINGS,
    many_objects,
    names_in,
    open_folder,
    split_name,
    subfolder,
)
from guided_diffusion.data.layout_table import TABLE
from guided_diffusion.data.matching import (
    FEW_NAMES,
    files_below,
    match,
    recognised,
)
from guided_diffusion.data.opening import (
    PAGE,
    is_wrapped,
    open_bare,
    part_folder,
    part_folders,
    require_chosen,
    unrecognised,
)
from guided_diffusion.data.raters import is_rated, mirrored_masks, open_rated, rated_masks
from guided_diffusion.data.splits import narrowed
from guided_diffusion.data.table_loader import open_layout
from guided_diffusion.data.truths import (
    SUFFIX,
    Truth,
    bare_masks,
    entry_truth,
    rated_files,
    voted,
)
from guided_diffusion.data.tumorloader import TumourImages, is_classified
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
_ISIC_MASK = re.compile(r"_Segmentation\.|^ISIC_\d+_segmentation\.")


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
        return with_raters(LAYOUTS[found[0]](folder, test, reading), folder)
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
        dataset = open_layout(layout, files, wanted=wanted, reading=reading)
        return dataset and with_raters(dataset, folder)
    dataset = open_bare(folder, names_in(folder), reading) if test and not name else None
    if dataset is None:
        raise unrecognised(folder, files, table, [*LAYOUTS], is_one=_is_one, test=test)
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
    reading = Reading(classes=classes, plane=plane)
    for dataset in _labelled_sets(folder, reading):
        dataset = with_raters(dataset, folder) if raters else dataset
        labelled = [entry for entry in dataset.entries if dataset.has_mask(entry)]
        if labelled:
            return {
                entry.name: voted(
                    [entry_truth(dataset, entry, path) for path in entry.masks or (None,)], classes
                )
                for entry in labelled
            }
    if rated := rated_masks(folder):
        return rated_files(folder, rated, classes, plane)
    return bare_masks(folder, classes, plane, since_2023=named_since_2023)


def _labelled_sets(folder: Path, reading: Reading) -> Iterator[SegmentationDataset]:
    """Yield the data sets that a folder may be, of parts that of testing first."""
    for name in _recognised(folder, test=True):
        yield LAYOUTS[name](folder, True, reading)
    if any(SUFFIX.fullmatch(split_name(name)[0]) for name in names_in(folder)):
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
    if is_rated(folder):
        return ["RATERS"]
    images, masks = subfolder(folder, "images"), subfolder(folder, "masks")
    if images is not None and (masks is not None or test):
        names = names_in(masks) if masks else []
        if not any(map(_ISIC_MASK.search, names)):
            if holds_series(folder):
                return ["DICOM"]
            return [] if _has_other_pairs(folder, images, names) else ["CUSTOM"]
    labels = subfolder(folder, "labels")
    cases = (
        files
        for root, files in find_cases(folder)
        if files.keys() - {SEG} and not (root == labels and holds_series(folder))
    )
    first = next(cases, {})
    brats = bool(first) and not (max(map(len, first.values())) > 1 and _is_flat(folder))
    isic = has_csv(folder) or (not first and has_pictures(folder, bare=test))
    found = [name for name, marks in (("BRATS", brats), ("ISIC", isic)) if marks]
    if found or part_folders(folder) or recognised(files_below(folder), test=test):
        return found
    return ["DICOM"] if holds_series(folder) else []


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
