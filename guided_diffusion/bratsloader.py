"""The BraTS layout: one folder per case, one NIfTI file per modality.

Both forms of the parents' file names are read, the plain one (``t1.nii.gz``) and the long ones
(``brats_train_001_t1_080_w.nii.gz``, ``BraTS20_Training_001_t1.nii.gz``), and the names of 2023
(t1n, t1c, t2w, t2f). :class:`BRATSDataset` reads axial slices stored as two-dimensional files,
:class:`BRATSDataset3D` whole volumes, slice by slice; :func:`open_brats` chooses between them by
one header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import NIFTI, counted, open_folder, safe_name, split_name, walk
from guided_diffusion.data.geometry import Affine, plane_affine
from guided_diffusion.data.layout_table import CURRENT_NAMES
from guided_diffusion.data.readers import nifti_shape, read_nifti_slice
from guided_diffusion.data.volumes import VolumeDataset
from guided_diffusion.errors import UserError, refuse

MODALITIES = ("t1", "t1ce", "t2", "flair")
SEG = "seg"
_CURRENT_NAMES = {name: name for name in (*MODALITIES, SEG)} | CURRENT_NAMES
_SLICE = re.compile(
    rf"(?:brats_train_)?(.+?)_(?:{'|'.join(sorted(_CURRENT_NAMES, key=len, reverse=True))})"
    r"_\d+(?:_w)?",
    re.IGNORECASE,
)
_NAME = re.compile("[a-z][a-z0-9]*")
_SINCE_2023 = re.compile(r"BraTS-[A-Z]+-\d+-\d{3}|\b(?:.*[_-])?(?:t1n|t2f)[_.-]", re.IGNORECASE)


class BRATSDataset(SegmentationDataset):
    """Axial slices as two-dimensional files: image [C, H, W] as stored, in the order of MODALITIES.

    The channels are the modalities found; every slice must have them all. With ``test_flag=True``
    the ``seg`` file may be absent, and is read where it is present.
    """

    layout = "BRATS"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        index = _index(open_folder(directory), reading, needs_seg=not test_flag)
        self.modalities = index.modalities
        self.brats = index.era
        super().__init__(index.folder, index.entries, channels=index.channels, reading=reading)
        self.notes += index.notes

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack the modalities, float32 [C, H, W]; the first one's grid is that of all."""
        first, placed = read_nifti_slice(entry.images[0])
        self._last = entry.images[0], placed
        others = [read_nifti_slice(path, like=self._last)[0] for path in entry.images[1:]]
        return torch.from_numpy(np.stack([first, *others])), plane_affine(placed)


class BRATSDataset3D(VolumeDataset):
    """Whole volumes of the modalities, one case per axial slice ``<case>_slice080``.

    The patient is the case, not a field of the files' names.
    """

    layout = "BRATS"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        index = _index(open_folder(directory), reading, needs_seg=not test_flag)
        volumes = [entry._replace(patient=_patient_of_case(entry.name)) for entry in index.entries]
        self.modalities = index.modalities
        self.brats = index.era
        super().__init__(index.folder, volumes, channels=index.channels, reading=reading)
        self.notes += index.notes


def open_brats(
    directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
) -> SegmentationDataset:
    """Open a folder of slices or of volumes; the first header that can be read decides."""
    folder = open_folder(directory)
    layout = BRATSDataset3D if _holds_volumes(folder) else BRATSDataset
    return layout(folder, test_flag, reading)


def _holds_volumes(folder: Path) -> bool:
    for _, files in find_cases(folder):
        with suppress(UserError):
            return len(nifti_shape(next(iter(files.values()))[0])) > 2
    return False


def modality_of(file_name: str) -> str | None:
    """The modality in the name of a NIfTI file, under its current name, or None.

    That is the last field between ``_`` or ``-`` that names a modality (``t1.nii.gz``,
    ``brats_train_001_t1_080_w``, ``BraTS20_Training_001_t1``).
    """
    stem, ending = split_name(file_name)
    if ending not in NIFTI:
        return None
    for field in reversed(stem.lower().replace("-", "_").split("_")):
        if field in _CURRENT_NAMES:
            return _CURRENT_NAMES[field]
    return None


def find_cases(
    folder: Path, others: list[Path] | None = None
) -> Iterator[tuple[Path, dict[str, list[Path]]]]:
    """Yield every folder that directly holds files of a modality or labels, by modality.

    A folder that is named like a NIfTI file, as BraTS 2021 is also distributed, stands for the file
    in it. Other files are ignored, and added to ``others``; nothing is opened.
    """
    waiting: dict[Path, dict[str, list[Path]]] = {}
    for root, names in walk(folder):
        files: dict[str, list[Path]] = {}
        stated = modality_of(root.name) if root != folder else None
        wrapped = [root / name for name in names if stated and name.lower().endswith(NIFTI)]
        if stated and wrapped:
            waiting.setdefault(root.parent, {}).setdefault(stated, []).extend(wrapped)
            continue
        for name in names:
            modality = modality_of(name)
            if modality is not None:
                files.setdefault(modality, []).append(root / name)
            elif others is not None:
                others.append(root / name)
        if files:
            yield root, files
    yield from waiting.items()


def find_modalities(text: str) -> tuple[str, ...]:
    """Read ``--modalities``, a comma-separated list, as the current names of the modalities.

    Raises:
        UserError: a name is no word, or given twice.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = tuple(_CURRENT_NAMES.get(name, name) for name in names)
    wrong = [name for name in known if not _NAME.fullmatch(name) or known.count(name) > 1]
    if wrong or SEG in known:
        raise UserError(
            "--modalities",
            f"{text!r} is not a list of {', '.join(MODALITIES)} or other words in the names of "
            "files, each once, separated by commas",
            "Write for example --modalities flair,t1ce.",
        )
    return known


class _Index(NamedTuple):
    """The content of a folder: the channels, one entry per case folder, and the ignored files."""

    folder: Path
    modalities: tuple[str, ...]
    entries: list[Entry]
    notes: list[str]

    @property
    def channels(self) -> int:
        """The number of modalities."""
        return len(self.modalities)

    @property
    def era(self) -> str:
        """'2023' where the files are named as since then, else 'older'."""
        some = self.entries[:: 1 + len(self.entries) // 200]
        named = named_since_2023(" ".join(path.name for path in entry.images) for entry in some)
        return "2023" if named else "older"


def named_since_2023(names: Iterable[str]) -> bool:
    """Whether all files are named as since BraTS 2023, whose label 3 is what 4 was."""
    found = [_SINCE_2023.search(name) is not None for name in names]
    return bool(found) and all(found)


def _index(folder: Path, reading: Reading, *, needs_seg: bool) -> _Index:
    """List a folder's cases with the chosen modalities, and check that all are complete."""
    others: list[Path] = []
    cases = {root: _one_each(root, files) for root, files in find_cases(folder, others)}
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
    return _Index(folder, modalities, entries, _note_ignored(folder, others))


def _choose(folder: Path, found: set[str], reading: Reading) -> tuple[str, ...]:
    """The modalities to read: those requested, else all that the folder has."""
    there = tuple(name for name in MODALITIES if name in found)
    if not there:
        raise UserError(
            folder,
            "has no NIfTI file named by a modality",
            f"Pass the folder above the case folders, which hold files of {', '.join(MODALITIES)} "
            "(t1.nii.gz or *_t1_*.nii.gz).",
        )
    missing = [name for name in reading.modalities if name not in there]
    if missing:
        raise UserError(
            "--modalities",
            f"{folder} does not have {', '.join(missing)}",
            f"Name some of its modalities ({', '.join(there)}), or omit --modalities for all.",
        )
    return reading.modalities or there


def _note_ignored(folder: Path, files: list[Path]) -> list[str]:
    if not files:
        return []
    count = counted(len(files), "file")
    return [f"ignored {count} not named by a modality, such as {files[0].relative_to(folder)}"]


def _patient_of_slice(path: Path) -> str:
    """'001' for ``brats_train_001_t1_080_w.nii.gz``: the part before modality and position."""
    match = _SLICE.fullmatch(split_name(path.name)[0])
    return match[1] if match else ""


def _patient_of_case(name: str) -> str:
    """The case, without the visit's number in the names of 2023 (``BraTS-GLI-00000-000``)."""
    match = re.fullmatch(r"(.*BraTS-[A-Za-z]+-\d+)-\d{3}", name)
    return match[1] if match else name


def _one_each(root: Path, files: dict[str, list[Path]]) -> dict[str, Path]:
    for modality, paths in files.items():
        if len(paths) > 1:
            problem = f"has {len(paths)} {modality} files ({paths[0].name}, {paths[1].name})"
            refuse(UserError(root, problem, "Put every slice or volume into a separate folder."))
    return {modality: paths[0] for modality, paths in files.items()}


def _is_complete(root: Path, files: dict[str, Path], needed: tuple[str, ...]) -> bool:
    missing = [name for name in needed if name not in files]
    if missing:
        error = UserError(
            root,
            f"the case lacks {', '.join(missing)}; the data set has {', '.join(needed)}",
            "Add the file, or remove the folder from the data set.",
        )
        refuse(error)
    return not missing


def _case_name(folder: Path, root: Path) -> str:
    """The path below the data folder, or the folder's name for a case directly in it."""
    below = root.parts[len(folder.parts) :]
    return safe_name("_".join(below) if below else folder.resolve().name)
