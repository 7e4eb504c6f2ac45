"""The BraTS layout: one folder per case, one NIfTI file per modality.

Both forms of the parents' file names are read, the plain one (``t1.nii.gz``) and the long ones
(``brats_train_001_t1_080_w.nii.gz``, ``BraTS20_Training_001_t1.nii.gz``), and the names of 2023
(t1n, t1c, t2w, t2f). :class:`BRATSDataset` reads axial slices stored as two-dimensional files,
:class:`BRATSDataset3D` finds the volumes that :mod:`guided_diffusion.volumes` cuts into slices, and
:func:`open_brats` looks at one header to tell which it is. Called by ``layouts``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import NIFTI, open_folder, safe_name, split_name, walk
from guided_diffusion.data.readers import (
    Affine,
    Array,
    nifti_shape,
    read_mask_file,
    read_nifti_slice,
    require_same_axes,
)
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse

MODALITIES = ("t1", "t1ce", "t2", "flair")
SEG = "seg"
_CALLED = {name: name for name in (*MODALITIES, SEG)} | {
    "t1n": "t1",
    "t1c": "t1ce",
    "t2w": "t2",
    "t2f": "flair",
}
_SLICE = re.compile(
    rf"(?:brats_train_)?(.+?)_(?:{'|'.join(sorted(_CALLED, key=len, reverse=True))})_\d+(?:_w)?",
    re.IGNORECASE,
)


class BRATSDataset(SegmentationDataset):
    """Axial slices as two-dimensional files: image [C, H, W] as stored, in the order of MODALITIES.

    The channels are the modalities found; every slice must have them all. ``test_flag=True`` lets
    the ``seg`` file be absent, and loads it where it is there.
    """

    layout = "BRATS"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        index = _index(folder, reading, needs_seg=not test_flag)
        self.modalities = index.modalities
        super().__init__(folder, index.slices, channels=len(index.modalities), reading=reading)
        self.notes += index.notes

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack the modalities, float32 [C, H, W]; the affine is the first one's."""
        slices = [read_nifti_slice(path) for path in entry.images]
        affine = slices[0][1]
        for path, (_, other) in zip(entry.images, slices, strict=True):
            require_same_axes(path, other, affine, other=entry.images[0])
        return _stack(entry, [values for values, _ in slices]), affine

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read the ``seg`` file, float32 [K, H, W]; one class is what is above 0."""
        if entry.mask is None:
            return None
        return read_mask_file(entry.mask, self.classes)


class BRATSDataset3D(VolumeDataset):
    """Whole volumes of the modalities, one case per axial slice ``<case>_slice080``."""

    layout = "BRATS"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        index = _index(folder, reading, needs_seg=not test_flag)
        self.modalities = index.modalities
        super().__init__(folder, index.volumes, channels=len(index.modalities), reading=reading)
        self.notes += index.notes


def open_brats(
    directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
) -> SegmentationDataset:
    """Open a folder of slices or of volumes, told apart by the first header that can be read."""
    folder = open_folder(directory)
    layout = BRATSDataset3D if _holds_volumes(folder) else BRATSDataset
    return layout(folder, test_flag, reading)


def _holds_volumes(folder: Path) -> bool:
    for _, files in find_cases(folder):
        with suppress(UserError):
            return len(nifti_shape(next(iter(files.values()))[0])) > 2
    return False


def modality_of(file_name: str) -> str | None:
    """The modality that a NIfTI file name states (today's name for it), or None.

    The stem itself (``t1.nii.gz``), or else the last field between ``_`` or ``-`` that is called
    like a modality (``brats_train_001_t1_080_w``, ``BraTS20_Training_001_t1``).
    """
    stem, ending = split_name(file_name)
    if ending not in NIFTI:
        return None
    for field in reversed(stem.lower().replace("-", "_").split("_")):
        if field in _CALLED:
            return _CALLED[field]
    return None


def find_cases(
    folder: Path, strays: list[Path] | None = None
) -> Iterator[tuple[Path, dict[str, list[Path]]]]:
    """Every folder that directly holds files of a modality or labels, by modality.

    Other files are ignored, and added to ``strays``; nothing is opened.
    """
    for root, names in walk(folder):
        files: dict[str, list[Path]] = {}
        for name in names:
            modality = modality_of(name)
            if modality is not None:
                files.setdefault(modality, []).append(root / name)
            elif strays is not None:
                strays.append(root / name)
        if files:
            yield root, files


def find_modalities(text: str) -> tuple[str, ...]:
    """Today's names of the modalities in a comma-separated list, as ``--modalities`` has it.

    Raises:
        UserError: a name that is no modality, or one given twice.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = tuple(_CALLED.get(name, name) for name in names)
    wrong = [name for name in known if name not in MODALITIES or known.count(name) > 1]
    if wrong:
        raise UserError(
            "--modalities",
            found=repr(text),
            expected=f"some of {', '.join(MODALITIES)}, each once, separated by commas",
            hint="Write for example --modalities flair,t1ce.",
        )
    return known


class _Index(NamedTuple):
    """What is in a folder: the channels, one entry per case folder, and what was left aside."""

    modalities: tuple[str, ...]
    slices: list[Entry]
    notes: list[str]

    @property
    def volumes(self) -> list[Entry]:
        """The entries as those of volumes: the patient is the case, not the file name's field."""
        return [entry._replace(patient=_patient_of_case(entry.name)) for entry in self.slices]


def _index(folder: Path, reading: Reading, *, needs_seg: bool) -> _Index:
    """List a folder's cases, with the modalities chosen; checks that all are complete."""
    strays: list[Path] = []
    cases = {root: _one_each(root, files) for root, files in find_cases(folder, strays)}
    modalities = _choose(folder, {name for files in cases.values() for name in files}, reading)
    needed = (*modalities, SEG) if needs_seg else modalities
    cases = {root: files for root, files in cases.items() if _is_complete(root, files, needed)}
    entries = [
        Entry(
            name=_case_name(folder, root),
            images=tuple(files[name] for name in modalities),
            mask=files.get(SEG),
            patient=_patient_of_slice(files[modalities[0]]),
        )
        for root, files in cases.items()
    ]
    return _Index(modalities, entries, _note_strays(folder, strays))


def _choose(folder: Path, found: set[str], reading: Reading) -> tuple[str, ...]:
    """The modalities to read: those asked for, else all that the folder has."""
    there = tuple(name for name in MODALITIES if name in found)
    if not there:
        raise UserError(
            folder,
            found="no NIfTI file named by a modality",
            expected=f"folders of {', '.join(MODALITIES)} (t1.nii.gz or *_t1_*.nii.gz)",
            hint="Pass the folder above the case folders.",
        )
    missing = [name for name in reading.modalities if name not in there]
    if missing:
        raise UserError(
            "--modalities",
            found=f"{', '.join(missing)}, which {folder} does not have",
            expected=f"some of {', '.join(there)}",
            hint="Name modalities of the data, or leave --modalities away for all of them.",
        )
    return reading.modalities or there


def _note_strays(folder: Path, strays: list[Path]) -> list[str]:
    if not strays:
        return []
    count = "1 file that is" if len(strays) == 1 else f"{len(strays)} files that are"
    return [f"ignored {count} no modality, such as {strays[0].relative_to(folder)}"]


def _patient_of_slice(path: Path) -> str:
    """'001' for ``brats_train_001_t1_080_w.nii.gz``: what stands before modality and position."""
    match = _SLICE.fullmatch(split_name(path.name)[0])
    return match[1] if match else ""


def _patient_of_case(name: str) -> str:
    """The case, but for the number of the visit in the names of 2023 (``BraTS-GLI-00000-000``)."""
    match = re.fullmatch(r"(.*BraTS-[A-Za-z]+-\d+)-\d{3}", name)
    return match[1] if match else name


def _one_each(root: Path, files: dict[str, list[Path]]) -> dict[str, Path]:
    for modality, paths in files.items():
        if len(paths) > 1:
            error = UserError(
                root,
                found=f"{len(paths)} {modality} files ({paths[0].name}, {paths[1].name})",
                expected="one file per modality",
                hint="Give every slice or volume a folder of its own.",
            )
            refuse(error)
    return {modality: paths[0] for modality, paths in files.items()}


def _is_complete(root: Path, files: dict[str, Path], needed: tuple[str, ...]) -> bool:
    missing = [name for name in needed if name not in files]
    if missing:
        error = UserError(
            root,
            found=f"an incomplete case: {', '.join(missing)} is missing",
            expected=f"{', '.join(needed)} as in the rest of the set",
            hint="Add the file, or take the folder out of the set.",
        )
        refuse(error)
    return not missing


def _case_name(folder: Path, root: Path) -> str:
    """The path below the data folder; the folder's own name for a case that lies in it directly."""
    below = root.parts[len(folder.parts) :]
    return safe_name("_".join(below) if below else folder.resolve().name)


def _stack(entry: Entry, channels: list[Array]) -> Tensor:
    """[H, W] each -> [C, H, W]; files of different size are a :class:`UserError`."""
    for path, values in zip(entry.images, channels, strict=True):
        if values.shape != channels[0].shape:
            raise UserError(
                path,
                found=f"a size of {' x '.join(map(str, values.shape))}",
                expected=f"{' x '.join(map(str, channels[0].shape))} as {entry.images[0].name}",
                hint="Export all modalities of a case on one grid.",
            )
    return torch.from_numpy(np.stack(channels))
