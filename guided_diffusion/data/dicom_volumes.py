"""The DICOM layout: folders of series, each decoded once into a NIfTI file in the cache.

Everything that slices, places or writes volumes then sees a NIfTI file. Series are told apart by
SeriesInstanceUID. Labels are NIfTI files in ``labels/`` or ``masks/``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.data.cache import private_folder, temporary_folder
from guided_diffusion.data.datasets import AS_STORED, Entry, Reading
from guided_diffusion.data.dicom import Found, examine, is_dicom, write_nifti
from guided_diffusion.data.dicom_grid import stack
from guided_diffusion.data.folders import (
    ENDINGS,
    counted,
    image_files,
    is_nifti,
    listing,
    open_folder,
    safe_name,
    split_name,
    subfolder,
    walk,
)
from guided_diffusion.data.readers import is_whole
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse
from guided_diffusion.files import atomic_write, make_folder, read_json, require_file

FOLDERS, FILES, NAMES = 64, 10, 2000
"""Folders, files in each, and names in each, that are looked at to recognise the layout."""
NAMED = (".dcm", ".dicom", ".ima")


class Series(NamedTuple):
    """One series: its folder, its number where the folder holds others, and its decoded file.

    ``uid`` and ``patient`` are digests of its ids; ``nifti`` is None for one that was refused.
    """

    folder: Path
    number: str
    uid: str
    patient: str
    files: int
    nifti: Path | None


class DicomVolumes(VolumeDataset):
    """Series of planes, one case per slice ``<case>_slice080``: image [1, H, W].

    Series are read from ``images/``, or from the whole folder; a case is named by its folder's path
    below that, joined by ``_``. Labels are named by the case, by the last folder of its path, or by
    the first where that holds no other series. Without ``test_flag`` series that have no labels are
    left out.
    """

    layout = "DICOM"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        images = subfolder(folder, "images") or folder
        labels = subfolder(folder, "masks") or subfolder(folder, "labels")
        series, ignored = _find_series(images, labels, reading.cache_dir)
        cases = _named(images, series)
        masks = _labels_of(folder, labels, images, cases, needed=not test_flag)
        volumes = [
            Entry(name, (one.nifti,), masks.get(name), patient=patient)
            for (name, one), patient in zip(cases.items(), _patients(images, cases), strict=True)
            if one.nifti and (test_flag or name in masks)
        ]
        super().__init__(folder, volumes, channels=1, reading=reading)
        files = counted(sum(one.files for one in series), "file")
        self.notes += [f"{len(series)} DICOM series in {files}", *_parted(images, series)]
        if ignored:
            self.notes.append(f"left out {', '.join(ignored)}")
        if not test_flag and (unlabelled := len(cases) - len(masks)):
            self.notes.append(f"left out {unlabelled} series without labels")


def holds_series(folder: Path) -> bool:
    """Whether there is a DICOM file below; only the first few files of few folders are opened.

    Where pictures or NIfTI files lie in ``images/``, these are the data set.
    """
    images = subfolder(folder, "images")
    pending = [images or folder]
    for _ in range(FOLDERS):
        if not pending:
            break
        root = pending.pop()
        try:
            with os.scandir(root) as found:
                names = sorted((entry.name, entry.is_dir()) for entry in islice(found, NAMES))
        except OSError:
            continue
        names = [(name, is_folder) for name, is_folder in names if not name.startswith(".")]
        files = [root / name for name, is_folder in names if not is_folder]
        others = [path for path in files if split_name(path.name)[1] not in ENDINGS]
        if root == images and len(others) < len(files):
            return False
        if any(is_dicom(path) for path in others[:FILES]):
            return True
        pending += reversed([root / name for name, is_folder in names if is_folder])
    return False


def _find_series(
    images: Path, labels: Path | None, cache_dir: Path | None
) -> tuple[list[Series], list[str]]:
    """List the series below a folder, decoded, and how many files of which kind are left out."""
    kept = private_folder(private_folder(cache_dir) / "dicom") if cache_dir else _temporary()
    series: list[Series] = []
    ignored: Counter[str] = Counter()
    for root, names in walk(images):
        if root == labels or not names:
            continue
        found, others = _series_in(root, names, kept)
        series += found
        ignored.update(others)
    texts = [f"{count} {kind}" for kind, count in sorted(ignored.items())]
    if not series:
        raise UserError(
            images,
            "holds no DICOM series of two planes or more that can be used"
            + (f"; left out {', '.join(texts)}" if texts else ""),
            "Pass the folder with the series; files need the mark DICM behind their preamble.",
        )
    return series, texts


@cache
def _temporary() -> Path:
    """A folder for the decoded series of this process, which is removed when it ends."""
    return temporary_folder(_find_series, None)


def _series_in(root: Path, names: list[str], kept: Path) -> tuple[list[Series], dict[str, int]]:
    """The series directly in a folder, and the number of files of each kind that are left out.

    Both are remembered beside the decoded volumes, and found anew once a file changes.
    """
    stamp = hashlib.sha256()
    for name in names:
        stat = os.stat(f"{root}/{name}")  # noqa: PTH116 - for 100,000 files
        stamp.update(
            f"{name}\0{stat.st_size} {stat.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    folder = kept / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    if known := _remembered(root, folder, stamp.hexdigest()):
        return known

    files = [root / name for name in names if split_name(name)[1] not in ENDINGS]
    groups, ignored, whole = _examined(files)
    if whole and not groups and not ignored:
        return [], {}
    make_folder(folder, flag="--cache_dir", mode=0o700)
    (folder / "series.json").unlink(missing_ok=True)
    found = []
    for series, number, group in _numbered(groups):
        nifti = _decoded(root, number, group, folder) if whole else None
        found.append(Series(root, number, *_ids(series, group), len(group), nifti))
    if whole and all(one.nifti for one in found):
        record = [(*one[1:-1], one.nifti and one.nifti.name) for one in found]
        known_text = {"stamp": stamp.hexdigest(), "series": record, "left_out": ignored}
        with atomic_write(folder / "series.json", mode=0o600) as part:
            part.write_text(json.dumps(known_text), encoding="utf-8")
    return found, ignored


def _decoded(root: Path, number: str, group: list[Found], folder: Path) -> Path | None:
    """Decode a series into a file named by its folder; None for one that is refused."""
    path = folder / f"{safe_name(root.resolve().name)}{number}.nii"
    try:
        stacked = stack(root, [plane for one in group for plane in one.planes])
        hint = "Free some space, or choose another --cache_dir."
        with atomic_write(path, hint=hint, mode=0o600) as part:
            write_nifti(stacked, part)
    except UserError as error:
        refuse(error)
        return None
    return path


def _ids(series: str, group: list[Found]) -> tuple[str, str]:
    """Digests of the ids of a series and its patient, which are not kept themselves."""
    texts = (series, group[0].patient)
    first, second = (text and hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)
    return first, second


def _remembered(root: Path, folder: Path, stamp: str) -> tuple[list[Series], dict[str, int]] | None:
    try:
        known = read_json(folder / "series.json", hint="") or {}
        if known["stamp"] != stamp:
            return None
        series = [
            Series(root, str(number), str(uid), str(patient), int(files), folder / str(name))
            for number, uid, patient, files, name in known["series"]
        ]
        ignored = {str(kind): int(count) for kind, count in known["left_out"].items()}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return (series, ignored) if all(one.nifti and is_whole(one.nifti) for one in series) else None


def _examined(paths: list[Path]) -> tuple[dict[str, list[Found]], dict[str, int], bool]:
    """The files by series, those left out by kind, and whether all could be read."""
    groups: dict[str, list[Found]] = {}
    ignored: Counter[str] = Counter()
    whole = True
    for path in paths:
        try:
            if not _is_marked(path):
                continue
            found = examine(path)
        except UserError as error:
            refuse(error)
            whole = False
            continue
        if found.left_out:
            ignored[found.left_out] += 1
        else:
            groups.setdefault(found.series, []).append(found)
    for series, group in [*groups.items()]:
        if sum(len(found.planes) for found in group) < 2:
            del groups[series]
            ignored["single plane"] += 1
    return groups, dict(ignored), whole


def _is_marked(path: Path) -> bool:
    """Whether a file is one of DICOM; a :class:`UserError` where only its name says so."""
    require_file(path)
    marked = is_dicom(path)
    if not marked and path.suffix.lower() in NAMED:
        problem = "is named as a DICOM file, but lacks the mark DICM behind its preamble"
        raise UserError(path, problem, "Restore it from the source, or export it again.")
    return marked


def _numbered(groups: dict[str, list[Found]]) -> Iterator[tuple[str, str, list[Found]]]:
    """Yield the series of a folder, with ``_<SeriesNumber>`` or the end of the UID if several."""
    numbers = Counter(group[0].number for group in groups.values())
    for series, group in sorted(groups.items()):
        number = group[0].number
        own = number if number and numbers[number] == 1 else series.rpartition(".")[2]
        yield series, f"_{safe_name(own)}" if len(groups) > 1 else "", group


def _parted(images: Path, series: list[Series]) -> Iterator[str]:
    """Say so where the files of one series lie in several folders."""
    folders: dict[str, list[Path]] = {}
    for one in series:
        folders.setdefault(one.uid, []).append(one.folder)
    several = [found for uid, found in folders.items() if uid and len(found) > 1]
    if several:
        names = " and ".join(str(path.relative_to(images)) for path in several[0][:2])
        yield f"folders such as {names} hold parts or copies of one series; each is read alone"


def _named(images: Path, series: list[Series]) -> dict[str, Series]:
    """The series by the names of their cases."""
    named: dict[str, Series] = {}
    for one in series:
        below = one.folder.parts[len(images.parts) :] or (images.resolve().name,)
        name = safe_name("_".join(below) + one.number)
        if name in named:
            problem = f"and {named[name].folder} would both be the case {name}"
            raise UserError(one.folder, problem, "Rename one of the folders.")
        named[name] = one
    return named


def _patients(images: Path, cases: dict[str, Series]) -> list[str]:
    """Name the patient of each case by the folder or the first case that has the same PatientID.

    Cases without an id belong to the patient of the first folder of their path.
    """
    tops = {name: _top(images, one) or name for name, one in cases.items()}
    ids = {name: one.patient or f"folder {tops[name]}" for name, one in cases.items()}
    named: dict[str, str] = {}
    for name, patient in ids.items():
        named.setdefault(patient, tops[name])
    return [named[ids[name]] for name in cases]


def _top(images: Path, series: Series) -> str:
    below = series.folder.parts[len(images.parts) :]
    return safe_name(below[0]) if below else ""


def _labels_of(
    folder: Path, labels: Path | None, images: Path, cases: dict[str, Series], *, needed: bool
) -> dict[str, Path]:
    """The file of the labels of each case that has any."""
    files = {} if labels is None else image_files(labels)
    files = {safe_name(stem): path for stem, path in files.items() if is_nifti(path)}
    if not files and needed:
        some = listing(f"labels/{name}.nii.gz" for name in islice(cases, 1))
        hint = f"Add labels as NIfTI, named by the series: {some}."
        raise UserError(folder, "has DICOM series, but no labels to train on", hint)
    keys = {
        name: {name, safe_name(one.folder.name + one.number), _top(images, one)}
        for name, one in cases.items()
    }
    owners = Counter(key for own in keys.values() for key in own)
    case_of = {key: name for name, own in keys.items() for key in own if owners[key] == 1}
    case_of |= {name: name for name in cases}
    found: dict[str, Path] = {}
    for stem, path in files.items():
        name = case_of.get(stem)
        if name is None or name in found:
            problem = (
                f"has the labels of {name}, as {found[name].name} has"
                if name
                else f"belongs to several series named {stem}"
                if owners[stem] > 1
                else f"belongs to no series; these are {listing(cases, most=3)}"
            )
            refuse(UserError(path, problem, "Name each file of labels by its series."))
        else:
            found[name] = path
    return found
