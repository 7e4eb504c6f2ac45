"""The TUMOR layout: images with image-level labels, in the folders ``normal/`` and ``tumor/``.

The layout of the weak-supervision parent: ``<src_dir>/{training,validate}/{normal,tumor}/`` with
pictures or NIfTI slices of any size, and masks of equal stems in ``seg/``, which only scoring and
supervised training read. :class:`SlicedArrays` reads that parent's NumPy volumes, which are divided
by ``splits.pkl``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from guided_diffusion.data.datasets import AS_STORED, Case, Entry, Reading, SegmentationDataset
from guided_diffusion.data.decoding import decoding
from guided_diffusion.data.folders import (
    counted,
    image_files,
    listing,
    mask_files,
    open_folder,
    safe_name,
    subfolder,
)
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.limits import require_array
from guided_diffusion.data.plain_pickle import load_plain
from guided_diffusion.data.readers import image_channels
from guided_diffusion.errors import UserError, refuse

CLASSES = ("normal", "tumor")
SPELLINGS = {"normal": ("normal",), "tumor": ("tumor", "tumour")}
PARTS = {"training": ("training",), "validation": ("validate", "validation")}
MOST_LABEL = 7
"""Labels above this are background, as in the weak-supervision parent."""
MOST_NAMES = 10**6
_PATIENT = re.compile(r"(.*\d.*)_\D*\d+")


class LabelledImages(SegmentationDataset):
    """A data set with a label for each whole image: 0 for normal, 1 for a lesion."""

    labels: dict[str, int]
    positive: Sequence[int] = ()
    """The values in masks that make an image one with a lesion; empty where folders do."""

    def __getitem__(self, index: int) -> Case:
        """Read case ``index`` with its label, and its mask where there is one."""
        case = super().__getitem__(index)
        return case._replace(label=self.labels[case.name])

    def picture(self, index: int) -> Case:
        """Read image and label of case ``index``, never its mask."""
        entry = self.entries[index]
        image, affine = self.read_image(entry)
        return Case(image, None, entry.name, affine, self.labels[entry.name])


class TumourImages(LabelledImages):
    """Pictures in ``normal/`` and ``tumor/``: image [1 or 3, H, W], mask [1, H, W].

    The first readable picture decides between grey and colour. A case is named by its stem, and its
    patient by the part before the stem's last number, if that part contains a number. The mask of a
    normal image is empty. With ``test_flag=True`` tumours may lack masks; masks may never lack
    images.
    """

    layout = "TUMOR"

    def __init__(
        self, directory: str | Path, test_flag: bool = False, reading: Reading = AS_STORED
    ) -> None:
        folder = open_folder(directory)
        pictures = _classified(folder)
        seg = subfolder(folder, "seg")
        masks = mask_files(seg) if seg else {}
        _require_pairs(folder, pictures["tumor"], masks, masks_needed=not test_flag)
        entries = [
            Entry(safe_name(stem), (path,), masks.get(stem), patient=patient_of(stem))
            for found in pictures.values()
            for stem, path in found.items()
        ]
        self.labels = {
            safe_name(stem): CLASSES.index(name)
            for name, found in pictures.items()
            for stem in found
        }
        channels = image_channels([entry.images[0] for entry in entries])
        super().__init__(folder, entries, channels=channels, reading=reading)

    def has_mask(self, entry: Entry) -> bool:
        """Whether the mask is known: that of a normal image is empty."""
        return entry.mask is not None or not self.labels[entry.name]

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the mask, float32 [K, H, W] in [0, 1]; zeros for a normal image."""
        if not self.labels[entry.name]:
            size = self.read_image(entry)[0].shape[-2:]
            return torch.zeros(1 if self.classes is None else len(self.classes), *size)
        return super().read_mask(entry)


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders ``normal`` and ``tumor`` (or ``tumour``) that exist, by class."""
    found = {
        name: next(filter(None, (subfolder(folder, s) for s in spellings)), None)
        for name, spellings in SPELLINGS.items()
    }
    return {name: path for name, path in found.items() if path is not None}


def is_classified(folder: Path) -> bool:
    """Whether a folder is sorted by class: it has both classes, or tumours and their masks."""
    found = class_folders(folder)
    return len(found) == len(CLASSES) or ("tumor" in found and subfolder(folder, "seg") is not None)


def patient_of(stem: str) -> str:
    """'brats15_003' for 'brats15_003_013'; empty for a stem with one number only."""
    match = _PATIENT.fullmatch(stem)
    return safe_name(match[1]) if match else ""


def part_folder(src_dir: str | Path, part: str) -> Path:
    """The folder of a part of a data set: ``training``, or ``validate`` or ``validation``.

    Raises:
        UserError: it does not exist.
    """
    folder = open_folder(src_dir)
    for name in PARTS[part]:
        if found := subfolder(folder, name):
            return found
    raise UserError(
        "--src_dir",
        f"{folder} has no folder {' or '.join(PARTS[part])}",
        "Pass the folder above training/ and validate/ (or validation/), each of which has normal/ "
        "and tumor/.",
    )


def require_both(dataset: LabelledImages) -> None:
    """Raise a UserError where a class has no image: a classifier needs both."""
    for label, name in enumerate(CLASSES):
        if label not in dataset.labels.values():
            raise UserError(
                dataset.directory / name,
                "has no image",
                "Add pictures or NIfTI slices of this class: training needs both classes.",
            )


def _classified(folder: Path) -> dict[str, dict[str, Path]]:
    """The pictures of each class by stem; one of the classes may have none."""
    pictures = {name: image_files(path) for name, path in class_folders(folder).items()}
    if not any(pictures.values()):
        raise UserError(
            folder, "has no image in normal/ or tumor/", "Sort the images into these two folders."
        )
    return {name: pictures.get(name, {}) for name in CLASSES}


def _require_pairs(
    folder: Path, tumours: dict[str, Path], masks: dict[str, Path], *, masks_needed: bool
) -> None:
    """Refuse masks without a tumour image, and tumour images without a mask where it is needed."""
    bare = sorted(masks.keys() - tumours.keys())
    if bare:
        problem = f"has {counted(len(bare), 'mask')} without an image in tumor/: {listing(bare)}"
        hint = "Rename the files so that each mask has its image's stem, or remove the masks."
        refuse(UserError(folder / "seg", problem, hint, cases=bare))
    bare = sorted(tumours.keys() - masks.keys())
    if bare and masks_needed:
        problem = f"has {counted(len(bare), 'image')} without a mask in seg/: {listing(bare)}"
        hint = "Add the masks; weak-train needs none, and check none with --labelled False."
        refuse(UserError(folder / "tumor", problem, hint, cases=bare))


class SlicedArrays(LabelledImages):
    """The parent's NumPy volumes: ``.npy`` arrays [slices, 2, H, W], images and label maps.

    ``splits.pkl`` holds one dictionary per fold, with the file names of ``train``, ``val`` and
    ``test``. Cases are named ``<file>_slice080``, and a file is a patient. Values outside [0, 1]
    are scaled by their volume's range.

    Args:
        src_dir: the folder of ``splits.pkl``.
        parts: keys of the split, such as ``("train", "val")``.
        data_folder: the folder below ``src_dir`` that holds the arrays, at any depth.
        fold: which split.
        class_index: the label that makes a slice positive; 2 stands for 2 and 3.
    """

    layout = "ARRAYS"

    def __init__(
        self,
        src_dir: str | Path,
        *,
        parts: Sequence[str],
        data_folder: str = "preprocessed",
        fold: int = 0,
        class_index: int = 1,
    ) -> None:
        folder = open_folder(src_dir)
        wanted = _split_files(folder / "splits.pkl", fold, parts)
        self.positive = [2, 3] if class_index == 2 else [class_index]
        self.labels, self.places, self.ranges = {}, {}, {}
        entries = []
        for path in _found_files(folder / data_folder, wanted):
            volume = _read_array(path)
            for values in volume:
                _require_finite(path, values)
            low, high = float(volume[:, 0].min()), float(volume[:, 0].max())
            self.ranges[path] = (low, high) if low < 0 or high > 1 else (0.0, 1.0)
            for z in range(len(volume)):
                name = f"{safe_name(path.stem)}_slice{z:03d}"
                entries.append(Entry(name, (path,), path, patient=safe_name(path.stem)))
                self.places[name] = z
                self.labels[name] = int(self._foreground(volume[z, 1]).any())
        super().__init__(folder, entries, channels=1)

    def read_image(self, entry: Entry) -> tuple[Tensor, None]:
        """Decode the image, float32 [1, H, W] in [0, 1]."""
        low, high = self.ranges[entry.images[0]]
        values = _read_array(entry.images[0])[self.places[entry.name], 0]
        return torch.from_numpy((np.float32(values) - low) / max(high - low, 1e-12))[None], None

    def read_mask(self, entry: Entry) -> Tensor:
        """Decode the mask of the positive class, float32 [1, H, W] in {0, 1}."""
        values = _read_array(entry.images[0])[self.places[entry.name], 1]
        return torch.from_numpy(self._foreground(values).astype(np.float32))[None]

    def _foreground(self, values: np.ndarray) -> np.ndarray:
        whole = np.rint(values)
        return np.isin(np.where(whole > MOST_LABEL, 0, whole), self.positive)


def _split_files(path: Path, fold: int, parts: Sequence[str]) -> list[str]:
    """Read the file names of some parts of a fold."""
    with decoding(path, "pickled list of dictionaries with train, val and test"):
        splits = load_plain(path)
        folds = len(splits)
        chosen = [splits[fold][part] for part in parts] if -folds <= fold < folds else []
        names = [name for part in chosen if len(part) <= MOST_NAMES for name in part]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("its names are no texts")
    if not chosen:
        raise UserError(
            "--fold",
            f"{path} has the folds 0 to {folds - 1}, but not {fold}",
            "Omit --fold for the first one.",
        )
    if not names:
        raise UserError(
            path,
            f"names no .npy file for {' and '.join(parts)} in fold {fold}",
            "Choose another --fold.",
        )
    return names


def _found_files(folder: Path, names: Iterable[str]) -> list[Path]:
    found = {path.name: path for path in sorted(open_folder(folder).rglob("*.npy"))}
    wanted = [name if name.endswith(".npy") else f"{name}.npy" for name in names]
    missing = sorted({Path(name).name for name in wanted} - found.keys())
    if missing:
        raise UserError(
            folder,
            f"lacks {listing(missing)}, named in splits.pkl",
            "Check --src_dir and --data_folder.",
        )
    return [found[name] for name in sorted({Path(name).name for name in wanted})]


def _read_array(path: Path) -> np.ndarray:
    with decoding(path, "NumPy array"):
        shape = require_array(path)
        if len(shape) == 4 and shape[1] == 2 and 0 not in shape:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    raise UserError(
        path,
        f"its shape is {shape}, not [slices, 2, H, W] with images and label maps",
        "Restore it from the source, or remove it from splits.pkl.",
    )


def _require_finite(path: Path, values: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        if not np.isfinite(values.astype(np.float32)).all():
            hint = "Repair the file, or remove it from splits.pkl."
            raise UserError(path, "has NaN or infinite values", hint)


class Pictures(Dataset[Case]):
    """Chosen images of a labelled data set at the network's input size, without masks."""

    def __init__(
        self, dataset: LabelledImages, frame: Frame, indices: Sequence[int] | None = None
    ) -> None:
        self.dataset = dataset
        self.frame = frame
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Case:
        """Picture ``index``, cropped or resized."""
        return self.frame.fit(self.dataset.picture(self.indices[index]))

    @property
    def labels(self) -> list[int]:
        """The class of every picture."""
        return [self.dataset.labels[self.dataset.names[i]] for i in self.indices]


def held_out(dataset: LabelledImages, share: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Divide the indices of the cases by patient: those to train on, and those held out.

    A case without a patient counts as one. At least one patient is held out where ``share`` is
    above 0, unless a class would be left without an image to train on.
    """
    owners = [entry.patient or entry.name for entry in dataset.entries]
    patients = sorted(set(owners))
    order = np.random.default_rng(abs(seed)).permutation(len(patients))
    count = max(1, round(share * len(patients))) if share else 0
    kept: set[str] = set()
    for patient in (patients[i] for i in order):
        left = {
            dataset.labels[name]
            for name, owner in zip(dataset.names, owners, strict=True)
            if owner not in kept | {patient}
        }
        if len(kept) < count and len(left) == len(CLASSES):
            kept.add(patient)
    sides: tuple[list[int], list[int]] = ([], [])
    for index, owner in enumerate(owners):
        sides[owner in kept].append(index)
    return sides
