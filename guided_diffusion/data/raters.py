"""Several masks of each case: finding them by the names of files and folders, and their loaders.

A set is rated if it has a folder of masks for each rater (``masks_1/``, ``rater1/``,
``masks/rater1/``), numbered masks beside each image (``<case>/image.png`` and
``<case>/mask_0.png``, as LIDC-IDRI is often prepared; ``<case>_mask_0.png``) or masks
``<case>_<rater>`` in ``masks/``. Names that only happen to end in a number, such as ``img_1.png``,
are never taken for raters: no image may have the same name, and all cases must have the same
raters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import (
    ENDINGS,
    is_nifti,
    listing,
    names_in,
    open_folder,
    safe_name,
    split_name,
    walk,
)
from guided_diffusion.data.readers import image_channels, nifti_shape
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label")
LOOKED_AT = 64
"""Names of a folder that decide whether all of its files are looked at."""
DEPTH = 4
_WHO = r"(?:rater|reader|annotator|expert|observer|grader|radiologist|doctor)"
_RATER = rf"(?:masks?[ _-]?\d+|{_WHO}[ _-]?(?:\d+|[a-z])|\d+(?:st|nd|rd|th)[ _-]?(?:ho|{_WHO}))"
_ALONE = re.compile(rf"{_RATER}|label\d+_.*", re.IGNORECASE)
_BEHIND = re.compile(rf"(?P<case>.+)[ _-](?P<rater>{_RATER})", re.IGNORECASE)
_TAIL = re.compile(rf"[ _-](?:{_RATER}|\d+)", re.IGNORECASE)
_SUFFIX = re.compile(rf"(.+)[ _-](?:masks?|seg|segmentation|gt|labels?|{_RATER})", re.IGNORECASE)
_PART = re.compile(r"(?:train|test|val)(?:ing|id|idation)?", re.IGNORECASE)
_LIDC = re.compile(r"LIDC-IDRI-\d+")


class Group(NamedTuple):
    """One case: its id, its image (None where there are masks alone), its masks by rater.

    ``foldered`` says that each rater has a folder.
    """

    name: str
    image: Path | None
    masks: dict[str, Path]
    patient: str = ""
    foldered: bool = False


class RatedDataset(SegmentationDataset):
    """Pictures or NIfTI slices, each with the masks of several raters: image [1 or 3, H, W]."""

    layout = "RATERS"


class RatedVolumes(VolumeDataset):
    """NIfTI volumes, each with the label volumes of several raters: image [1, H, W]."""

    layout = "RATERS"


def open_rated(
    directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
) -> SegmentationDataset:
    """Open a set with the masks of several raters; the first image's header decides its kind.

    Cases may have masks of different raters. Raises :class:`UserError` where none are found, and
    for an image without any mask, unless ``test_flag`` allows that, or a mask without an image.
    """
    folder = open_folder(directory)
    if parts := _parts_of(folder):
        problem = f"holds {listing(parts)}, which are not mixed"
        raise UserError(folder, problem, f"Pass one of them, such as {folder / parts[0]}.")
    groups = list(_groups(folder))
    _require_pairs(folder, groups, optional=test_flag)
    entries = [
        Entry(g.name, (g.image,), next(iter(g.masks.values()), None), None, g.patient, _several(g))
        for g in groups
        if g.image is not None and (g.masks or test_flag)
    ]
    _require_one_kind([path for entry in entries for path in (*entry.images, *entry.masks)])
    first = entries[0].images[0]
    if is_nifti(first) and len(nifti_shape(first)) > 2:
        whole = [entry._replace(patient=entry.patient or entry.name) for entry in entries]
        return RatedVolumes(folder, whole, channels=1, reading=reading)
    channels = image_channels([entry.images[0] for entry in entries])
    return RatedDataset(folder, entries, channels=channels, reading=reading)


def is_rated(folder: Path) -> bool:
    """Whether a folder is a set of images with several masks each."""
    groups = _groups_or_none(folder)
    images = [group for group in groups if group.image is not None]
    return bool(images) and (_has_folders(groups) or (images == groups and _agree(groups)))


def rated_masks(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The masks of each case by id, where a folder holds several masks each and no image."""
    groups = _groups_or_none(folder)
    if not groups or any(group.image is not None for group in groups):
        return {}
    if not (_has_folders(groups) or _agree(groups)):
        return {}
    return {group.name: tuple(group.masks.values()) for group in groups}


def mirrored_masks(folder: Path, masks: Iterable[Path]) -> dict[Path, tuple[Path, ...]]:
    """The raters' masks of a data set, by the data set's own mask.

    They lie in ``raters/<rater>/``, in the data set's folder or beside it, under the path of the
    mask from there, or under its name alone, beside a folder only where that is called train, test
    or the like. Fewer than two raters count as none.
    """
    found: dict[Path, tuple[Path, ...]] = {}
    for base in (folder, folder.resolve().parent):
        places = [path for path in sorted(base.glob("raters/*")) if path.is_dir()]
        if len(places) < 2:
            continue
        there = {root / name for place in places for root, names in walk(place) for name in names}
        by_name = base == folder or _PART.fullmatch(folder.name)
        for mask in masks:
            inner = _inner(mask, base)
            paths = [place / inner for place in places] if inner else []
            if by_name and not there.intersection(paths):
                paths = [place / mask.name for place in places]
            kept = tuple(path for path in paths if path in there)
            if len(kept) > 1:
                found.setdefault(mask, kept)
    return found


def _inner(mask: Path, base: Path) -> Path | None:
    path = mask if mask.is_relative_to(base) else mask.resolve()
    return path.relative_to(base) if path.is_relative_to(base) else None


def _groups_or_none(folder: Path) -> list[Group]:
    """Every case of a folder that may have raters; none where it has no such names."""
    try:
        return list(_groups(folder)) if _may_be_rated(folder) else []
    except (UserError, OSError):
        return []


def _several(group: Group) -> tuple[Path, ...]:
    return tuple(group.masks.values()) if len(group.masks) > 1 else ()


def _has_folders(groups: list[Group]) -> bool:
    """Whether the raters are told apart by folders, whose masks belong to the images, if any."""
    marked = [group for group in groups if group.masks]
    paired = sum(group.image is not None for group in marked)
    return (
        all(group.foldered for group in marked)
        and any(len(group.masks) > 1 for group in marked)
        and (2 * paired >= len(marked) or not any(group.image for group in groups))
    )


def _agree(groups: list[Group]) -> bool:
    """Whether all cases have the same raters, two or more; numbers alone need several cases."""
    raters = {tuple(group.masks) for group in groups}
    if len(raters) != 1:
        return False
    (names,) = raters
    numbers = all(name.isdecimal() for name in names)
    return len(names) > 1 and not (numbers and len(groups) < 2)


def _may_be_rated(folder: Path) -> bool:
    """Whether a few names, here and in the first folders below, look like those of raters.

    A folder with one for each part of the data is not looked into.
    """
    if _parts_of(folder):
        return False
    here = folder
    for _ in range(DEPTH):
        names = [name for name in names_in(here) if not name.startswith(".")]
        if any(map(_names_a_rater, names[:LOOKED_AT])):
            return True
        by_kind = {name.lower(): name for name in names if name.lower() in (*IMAGES, *MASKS)}
        images = next((by_kind[name] for name in IMAGES if name in by_kind), None)
        masks = next((by_kind[name] for name in MASKS if name in by_kind), None)
        if images and masks and (here / masks).is_dir():
            return _looks_rated(here / images, here / masks)
        below = (here / name for name in names[:LOOKED_AT])
        inner = next((path for path in below if path.is_dir()), None)
        if inner is None:
            return False
        here = inner
    return False


def _parts_of(folder: Path) -> list[str]:
    """The folders for training, validation and testing in a folder."""
    return [n for n in names_in(folder) if _PART.fullmatch(n) and (folder / n).is_dir()]


def _names_a_rater(name: str) -> bool:
    stem = split_name(name)[0]
    return bool(_ALONE.fullmatch(stem) or _BEHIND.fullmatch(stem))


def _looks_rated(images: Path, masks: Path) -> bool:
    """Whether the first masks are of several raters; one with an image of its name is not."""
    for name in (name for name in names_in(masks) if not name.startswith(".")):
        stem, ending = split_name(name)
        if (masks / name).is_dir():
            return _names_a_rater(name) or name.isdecimal()
        if ending in ENDINGS:
            return not any((images / f"{stem}{end}").exists() for end in (ending, *ENDINGS))
    return False


def _groups(folder: Path) -> Iterator[Group]:
    """Yield every case below a folder; masks without an image have None in its place."""
    names = dict(walk(folder))
    children: dict[Path, list[Path]] = {}
    for root in names:
        children.setdefault(root.parent, []).append(root)
    used: set[Path] = set()
    for root in names:
        if root in used:
            continue
        below = children.get(root, [])
        images = next((path for path in below if path.name.lower() in IMAGES), None)
        masks = next((path for path in below if path.name.lower() in MASKS), None)
        raters = _rater_folders(children.get(masks, []) if masks else below, numbers=bool(masks))
        if raters and (images or not masks or not _files(root, names[root])):
            used |= {*raters.values(), *([images] if images else []), *([masks] if masks else [])}
            there = _files(images, names[images]) if images else {}
            mine = {who: _files(place, names[place]) for who, place in raters.items()}
            yield from _by_folder(folder, root, there, mine, alone=images is None)
        elif images and masks:
            used |= {images, masks}
            yield from _by_tail(
                folder, root, _files(images, names[images]), _files(masks, names[masks])
            )
        else:
            yield from _beside(folder, root, _files(root, names[root]))


def _files(root: Path, names: Iterable[str]) -> dict[str, Path]:
    """The pictures and NIfTI files among some names, by stem."""
    found: dict[str, Path] = {}
    for name in names:
        stem, ending = split_name(name)
        if ending in ENDINGS:
            if stem in found:
                problem = f"{found[stem].name} and {name} have the same stem"
                raise UserError(root, problem, "Rename or remove one of them.")
            found[stem] = root / name
    return found


def _rater_folders(below: Iterable[Path], *, numbers: bool) -> dict[str, Path]:
    """The folders that are named for raters, two or more; in ``masks/`` a number is enough."""
    found = {
        path.name: path
        for path in below
        if _ALONE.fullmatch(path.name) or (numbers and path.name.isdecimal())
    }
    return _ordered(found) if len(found) > 1 else {}


def _ordered(masks: Mapping[str, Path]) -> dict[str, Path]:
    """Sort raters by name, numbers by their value."""

    def key(item: tuple[str, Path]) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", item[0])
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return dict(sorted(masks.items(), key=key))


def _named(folder: Path, root: Path, stem: str = "") -> tuple[str, str]:
    """The id of a case, from the folders down to it, and its patient where a folder states it."""
    parts = [part for part in root.relative_to(folder).parts if part.lower() not in MASKS]
    parts += [stem] if stem else []
    patient = _LIDC.search("/".join((folder.name, *parts)))
    return safe_name("_".join(parts or [folder.resolve().name])), patient[0] if patient else ""


def _by_folder(
    folder: Path,
    root: Path,
    images: Mapping[str, Path],
    raters: Mapping[str, Mapping[str, Path]],
    *,
    alone: bool,
) -> Iterator[Group]:
    """A folder for each rater, whose files have the stem of the image, or a suffix as well."""
    masks: dict[str, dict[str, Path]] = {stem: {} for stem in images}
    for who, files in raters.items():
        for stem, path in files.items():
            shorter = _SUFFIX.fullmatch(stem)
            plain = shorter[1] if shorter else stem
            case = stem if stem in images or not (alone or plain in images) else plain
            masks.setdefault(case, {})[who] = path
    for stem, own in masks.items():
        name, patient = _named(folder, root, stem)
        yield Group(name, images.get(stem), own, patient, foldered=True)


def _by_tail(
    folder: Path, root: Path, images: Mapping[str, Path], masks: Mapping[str, Path]
) -> Iterator[Group]:
    """Masks ``<stem>_<rater>`` of images ``<stem>``, of which the longest that fits counts."""
    found: dict[str, dict[str, Path]] = {stem: {} for stem in images}
    for stem, path in masks.items():
        ends = [match.start() for match in re.finditer(r"[ _-]", stem)]
        fits = (end for end in reversed(ends) if stem[:end] in images)
        end = None if stem in images else next(fits, None)
        tail = end is not None and _TAIL.fullmatch(stem[end:])
        case, who = (stem[:end], stem[end:][1:]) if tail else (stem, "")
        found.setdefault(case, {})[who] = path
    for stem, own in found.items():
        name, patient = _named(folder, root, stem)
        yield Group(name, images.get(stem), _ordered(own), patient)


def _beside(folder: Path, root: Path, files: Mapping[str, Path]) -> Iterator[Group]:
    """Masks beside their image: of a case in a folder of its own, or ``<case>_<rater>``."""
    numbered = {stem: path for stem, path in files.items() if _ALONE.fullmatch(stem)}
    others = [path for stem, path in files.items() if stem not in numbered]
    if numbered and len(others) <= 1:
        name, patient = _named(folder, root)
        raters = {
            stem.partition("_")[0] if stem.startswith("label") else stem: path
            for stem, path in numbered.items()
        }
        yield Group(name, others[0] if others else None, _ordered(raters), patient)
        return
    found: dict[str, dict[str, Path]] = {}
    for stem, path in files.items():
        match = _BEHIND.fullmatch(stem)
        if match:
            found.setdefault(match["case"], {})[match["rater"]] = path
        else:
            found.setdefault(stem, {})
    for stem, own in found.items():
        name, patient = _named(folder, root, stem)
        yield Group(name, files.get(stem), _ordered(own), patient)


def _require_pairs(folder: Path, groups: list[Group], *, optional: bool) -> None:
    """Refuse a set without raters, masks without images, and, unless optional, the reverse."""
    if not any(group.image is not None and len(group.masks) > 1 for group in groups):
        raise UserError(
            folder,
            "has no image with the masks of several raters",
            "Use a folder of masks for each rater, such as masks_1/ and masks_2/ beside images/, "
            "or number the masks of each case, mask_0.png, mask_1.png and so on.",
        )
    single = [group.name for group in groups if group.image is None]
    bare = [group.name for group in groups if not group.masks and not optional]
    for names, kind in ((single, "image"), (bare, "mask")):
        if names:
            shown = listing(sorted(names))
            problem = f"{len(names)} of {len(groups)} cases have no {kind}: {shown}"
            hint = "Give the files of a case one name, or remove the single ones."
            refuse(UserError(folder, problem, hint, cases=names))


def _require_one_kind(paths: list[Path]) -> None:
    first = is_nifti(paths[0])
    for path in islice(paths, 1, None):
        if is_nifti(path) != first:
            raise UserError(
                path,
                f"NIfTI files and pictures are mixed in one data set, as with {paths[0].name}",
                "Convert the images and masks to the same format.",
            )
