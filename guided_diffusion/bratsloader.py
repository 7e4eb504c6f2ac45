"""The BraTS layout: one folder per case, one NIfTI file per modality.

Both forms of the parents' file names are read, the plain one (``t1.nii.gz``) and the long ones
(``brats_train_001_t1_080_w.nii.gz``, ``BraTS20_Training_001_t1.nii.gz``), and the names of 2023
(t1n, t1c, t2w, t2f). :class:`BRATSDataset` reads axial slices stored as two-dimensional files,
:class:`BRATSDataset3D` cuts them out of whole volumes, and :func:`open_brats` looks at one header
to tell which it is. Called by ``layouts``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.datasets import Entry, SegmentationDataset
from guided_diffusion.errors import UserError
from guided_diffusion.readers import (
    Affine,
    Array,
    is_nifti,
    label_mask,
    nifti_shape,
    open_folder,
    read_mask_file,
    read_nifti,
    read_nifti_slice,
    safe_name,
    split_name,
    walk,
)

MODALITIES = ("t1", "t1ce", "t2", "flair")
SEG = "seg"
_CALLED = {name: name for name in (*MODALITIES, SEG)} | {
    "t1n": "t1",
    "t1c": "t1ce",
    "t2w": "t2",
    "t2f": "flair",
}


class BRATSDataset(SegmentationDataset):
    """Axial slices as two-dimensional files: image [C, H, W] as stored, in the order of MODALITIES.

    The channels are the modalities found; every slice must have them all. ``test_flag=True`` lets
    the ``seg`` file be absent, and loads it where it is there.
    """

    layout = "BRATS"

    def __init__(self, directory: str | Path, test_flag: bool = False) -> None:
        folder = open_folder(directory)
        self.modalities, entries = _index(folder, needs_seg=not test_flag)
        super().__init__(folder, entries, channels=len(self.modalities))

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack the modalities, float32 [C, H, W]; the affine is the first one's."""
        slices = [read_nifti_slice(path) for path in entry.images]
        return _stack(entry, [values for values, _ in slices]), slices[0][1]

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read the ``seg`` file, float32 [1, H, W]: 1 where a label is above 0."""
        if entry.mask is None:
            return None
        return read_mask_file(entry.mask)


class BRATSDataset3D(SegmentationDataset):
    """Whole volumes, one case per axial slice: image [C, H, W], every volume scaled to [0, 1].

    Cases are called ``<case>_slice080``; the depth comes from the header. The volumes of the last
    two cases stay decoded (for BraTS with four modalities and labels about 0.4 GB), so reading in
    order costs one decoding per volume.
    """

    layout = "BRATS"
    kept_cases = 2

    def __init__(self, directory: str | Path, test_flag: bool = False) -> None:
        folder = open_folder(directory)
        self.modalities, volumes = _index(folder, needs_seg=not test_flag)
        self._decoded: OrderedDict[Path, tuple[Array, Affine]] = OrderedDict()
        entries = (entry for volume in volumes for entry in _planes(volume))
        super().__init__(folder, entries, channels=len(self.modalities))

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack one plane of the modalities, float32 [C, H, W]; the affine is that plane's."""
        planes = [self._plane(path, entry, scaled=True) for path in entry.images]
        return _stack(entry, [values for values, _ in planes]), planes[0][1]

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Read one plane of the ``seg`` volume, float32 [1, H, W]: 1 where a label is above 0."""
        if entry.mask is None:
            return None
        values, _ = self._plane(entry.mask, entry, scaled=False)
        return torch.from_numpy(label_mask(entry.mask, values))[None]

    def _plane(self, path: Path, entry: Entry, *, scaled: bool) -> tuple[Array, Affine]:
        values, affine = self._volume(path, scaled=scaled)
        plane = entry.plane or 0
        if plane >= values.shape[2]:
            raise UserError(
                path,
                found=f"{values.shape[2]} slices",
                expected=f"the depth of {entry.images[0].name}",
                mend="Export all files of a case on one grid.",
            )
        moved = affine.copy()
        moved[:3, 3] += plane * affine[:3, 2]
        return np.ascontiguousarray(values[..., plane]), moved

    def _volume(self, path: Path, *, scaled: bool) -> tuple[Array, Affine]:
        """The decoded volume [H, W, D], from memory if it was used lately."""
        if path in self._decoded:
            self._decoded.move_to_end(path)
            return self._decoded[path]
        values, affine = read_nifti(path)
        _require_volume(path, values.shape)

        self._decoded[path] = (_scaled(values) if scaled else values), affine
        while len(self._decoded) > self.kept_cases * (self.channels + 1):
            self._decoded.popitem(last=False)
        return self._decoded[path]


def open_brats(directory: str | Path, test_flag: bool = False) -> SegmentationDataset:
    """Open a folder of slices or of volumes, told apart by the header of the first file."""
    folder = open_folder(directory)
    first = next(find_cases(folder), None)
    if first is not None and len(nifti_shape(next(iter(first[1].values()))[0])) > 2:
        return BRATSDataset3D(folder, test_flag)
    return BRATSDataset(folder, test_flag)


def modality_of(file_name: str) -> str | None:
    """The modality that a NIfTI file name states (today's name for it), or None.

    The stem itself (``t1.nii.gz``), or else the last field between ``_`` or ``-`` that is called
    like a modality (``brats_train_001_t1_080_w``, ``BraTS20_Training_001_t1``).
    """
    if not is_nifti(Path(file_name)):
        return None
    fields = re.split("[_-]", split_name(file_name)[0].lower())
    return next((_CALLED[field] for field in reversed(fields) if field in _CALLED), None)


def find_cases(folder: Path) -> Iterator[tuple[Path, dict[str, list[Path]]]]:
    """Every folder that directly holds files of a modality or labels, by modality.

    Other files are ignored; nothing is opened.
    """
    for root, names in walk(folder):
        files: dict[str, list[Path]] = {}
        for name in names:
            modality = modality_of(name)
            if modality is not None:
                files.setdefault(modality, []).append(root / name)
        if files:
            yield root, files


def _index(folder: Path, *, needs_seg: bool) -> tuple[tuple[str, ...], list[Entry]]:
    """The modalities of the set, and one entry per case folder; checks that all are complete."""
    cases = {root: _one_each(root, files) for root, files in find_cases(folder)}
    modalities = tuple(
        name for name in MODALITIES if any(name in files for files in cases.values())
    )
    if not modalities:
        raise UserError(
            folder,
            found="no NIfTI file named by a modality",
            expected=f"folders of {', '.join(MODALITIES)} (t1.nii.gz or *_t1_*.nii.gz)",
            mend="Pass the folder above the case folders.",
        )
    needed = (*modalities, SEG) if needs_seg else modalities
    for root, files in cases.items():
        _require_complete(root, files, needed)

    entries = [
        Entry(
            name=_case_name(folder, root),
            images=tuple(files[name] for name in modalities),
            mask=files.get(SEG),
        )
        for root, files in cases.items()
    ]
    return modalities, entries


def _one_each(root: Path, files: dict[str, list[Path]]) -> dict[str, Path]:
    for modality, paths in files.items():
        if len(paths) > 1:
            raise UserError(
                root,
                found=f"{len(paths)} {modality} files ({paths[0].name}, {paths[1].name})",
                expected="one file per modality",
                mend="Give every slice or volume a folder of its own.",
            )
    return {modality: paths[0] for modality, paths in files.items()}


def _require_complete(root: Path, files: dict[str, Path], needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in files]
    if missing:
        raise UserError(
            root,
            found=f"an incomplete case: {', '.join(missing)} is missing",
            expected=f"{', '.join(needed)} as in the rest of the set",
            mend="Add the file, or take the folder out of the set.",
        )


def _case_name(folder: Path, root: Path) -> str:
    """The path below the data folder; the folder's own name for a case that lies in it directly."""
    below = root.relative_to(folder)
    return safe_name("_".join(below.parts) if below.parts else folder.resolve().name)


def _stack(entry: Entry, channels: list[Array]) -> Tensor:
    """[H, W] each -> [C, H, W]; files of different size are a :class:`UserError`."""
    for path, values in zip(entry.images, channels, strict=True):
        if values.shape != channels[0].shape:
            raise UserError(
                path,
                found=f"a size of {' x '.join(map(str, values.shape))}",
                expected=f"{' x '.join(map(str, channels[0].shape))} as {entry.images[0].name}",
                mend="Export all modalities of a case on one grid.",
            )
    return torch.from_numpy(np.stack(channels))


def _planes(volume: Entry) -> Iterator[Entry]:
    """One entry per axial slice, the depth read from the first header."""
    shape = nifti_shape(volume.images[0])
    _require_volume(volume.images[0], shape)
    for plane in range(shape[2]):
        yield volume._replace(name=f"{volume.name}_slice{plane:03d}", plane=plane)


def _require_volume(path: Path, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise UserError(
            path,
            found=f"{len(shape)} axes ({' x '.join(map(str, shape))})",
            expected="a volume of three axes",
            mend="Keep slices, volumes and time series in data sets of their own.",
        )


def _scaled(values: Array) -> Array:
    """Min-max to [0, 1] over the volume; a constant volume becomes 0."""
    low, high = values.min(), values.max()
    scaled: Array = (values - low) / max(high - low, np.finfo(np.float32).tiny)
    return scaled
