"""Phantoms on disk, in the layouts that the loaders read.

BraTS slices and volumes, ISIC pictures, and images with image-level labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.tools.phantom_fields import FIELD_OF_VIEW, Array, random_stream
from guided_diffusion.tools.phantom_skin import Skin, make_skin
from guided_diffusion.tools.phantoms import MODALITIES, Patient, make_patient

HEALTHY_EVERY = 6  # every sixth slice slot shows no lesion
ANY_HEIGHT = (-40.0, 46.0)  # mm above the middle of the head; the brain is wide enough there
Progress = Callable[[Iterable[int]], Iterable[int]]


class IsicPlace(NamedTuple):
    """Where one ISIC picture goes: paths relative to the data set, and its line of the CSV."""

    picture: str
    mask: str
    table: str
    header: str
    row: str  # `{index}` is the running number within the table


def write_brats_slices(
    out: Path,
    seed: int,
    *,
    patients: int,
    slices: int = 4,
    size: int = 80,
    raters: int = 0,
    training: float = 0.8,
    progress: Progress = iter,
) -> None:
    """Write BraTS 2-D folders: `out/{training,testing}/NNNNNN/brats_train_PPP_<name>_SSS_w.nii.gz`.

    Modalities are uint8 with slope 1/255 (read as [0, 1]), `seg` is uint8 in {0, 1, 2, 4}.
    Masks of raters go to `out/raters/raterR/` under the same relative names.
    """
    train, _ = split_patients(patients, training)
    shape = (size, size, round(size * FIELD_OF_VIEW[2] / FIELD_OF_VIEW[0]))
    for patient in progress(range(patients)):
        phantom = make_patient(seed, patient, shape=shape, raters=raters)
        part = "training" if patient in train else "testing"
        first = patient * slices
        for slot, z in enumerate(choose_slices(phantom, first_slot=first, count=slices), first):
            stem = f"{part}/{slot + 1:06d}/brats_train_{patient + 1:03d}_{{}}_{z:03d}_w.nii.gz"
            save_slice(Path(out), stem, phantom=phantom, z=z)


def write_brats_volumes(
    out: Path,
    seed: int,
    *,
    patients: int,
    slices: int = 155,
    size: int = 240,
    raters: int = 0,
    training: float = 0.8,
    progress: Progress = iter,
) -> None:
    """Write BraTS 3-D folders: `out/{training,testing}/<case>/<case>_<name>.nii.gz`.

    Cases are `BraTS20_Training_NNN`. Modalities are float32 of a few hundred, not normalised;
    `seg` is uint8 in {0, 1, 2, 4}. Voxels are 1 mm at 240 x 240 x 155.
    """
    train, _ = split_patients(patients, training)
    for patient in progress(range(patients)):
        phantom = make_patient(seed, patient, shape=(size, size, slices), raters=raters)
        part = "training" if patient in train else "testing"
        case = f"BraTS20_Training_{patient + 1:03d}"
        stem = f"{part}/{case}/{case}_{{}}.nii.gz"
        gains = random_stream(seed, patient, "gain").uniform(250, 700, len(MODALITIES))

        save = partial(save_nifti, voxel_mm=phantom.voxel_mm)
        for gain, (name, image) in zip(gains, phantom.modalities.items(), strict=True):
            save(Path(out) / stem.format(name), np.rint(image * np.float32(gain)))
        save(Path(out) / stem.format("seg"), phantom.labels)
        for r, mask in enumerate(phantom.raters, 1):
            save(Path(out) / f"raters/rater{r}" / stem.format("seg"), mask)


def write_isic(
    out: Path,
    seed: int,
    *,
    patients: int,
    size: int = 128,
    raters: int = 0,
    training: float = 0.8,
    generation: str = "2025",
    progress: Progress = iter,
) -> None:
    """Write ISIC-like pictures, one per patient, JPEG + mask PNG 0/255, in one of two layouts.

    "2023": `out/ISBI2016_ISIC_Part3B_{Training,Test}_Data/` holds `<id>.jpg` beside
    `<id>_Segmentation.png`; the CSV's rows are `<id>,<class>`.
    "2025": `out/{Train,Test}/` hold a picture and a mask folder; the CSV's columns 1 and 2 are
    their relative paths. Masks of raters go to `out/raters/raterR/<id>_Segmentation.png`.
    """
    names = {"2023": isic_2023, "2025": isic_2025}
    if generation not in names:
        known = " and ".join(sorted(names))
        raise UserError("generation", f"{generation!r} is unknown", f"Choose between {known}.")
    tables: dict[Path, list[str]] = {}
    train, _ = split_patients(patients, training)
    for number in progress(range(patients)):
        skin = make_skin(seed, number, size=size, raters=raters)
        place = names[generation](number, malignant=skin.malignant, testing=number not in train)
        save_skin(Path(out), place, skin=skin)
        rows = tables.setdefault(Path(out) / place.table, [place.header])
        rows.append(place.row.format(index=len(rows) - 1))
    for path, rows in tables.items():
        path.write_text("\n".join(rows) + "\n", encoding="ascii")


def write_weak(
    out: Path,
    seed: int,
    *,
    patients: int,
    slices: int = 3,
    size: int = 64,
    training: float = 0.8,
    progress: Progress = iter,
) -> None:
    """Write T2 slices sorted by image-level label, every other patient being healthy.

    `out/{training,validate}/{normal,tumor}/phantom_PPP_SSS.png`, grey, and the tumours' masks in
    `seg/`. In T2 fluid and cysts, which all patients have, are brighter than lesions. Lesions lie
    at any height, and healthy slices where a lesion would be, so that it alone tells the classes
    apart.
    """
    train, _ = split_patients(patients, training)
    shape = (size, size, round(size * FIELD_OF_VIEW[2] / FIELD_OF_VIEW[0]))
    for patient in progress(range(patients)):
        healthy = patient % 2 == 1
        phantom = make_patient(seed, patient, shape=shape, healthy=healthy, heights=ANY_HEIGHT)
        folder = Path(out) / ("training" if patient in train else "validate")
        area = (phantom.level > 0).sum((0, 1))
        for z in spread(np.flatnonzero(area >= 0.5 * area.max()), slices, kind="at a lesion"):
            name = f"phantom_{patient + 1:03d}_{z:03d}.png"
            grey = np.rint(255 * phantom.modalities["t2"][..., z]).astype(np.uint8)
            save_picture(folder / ("normal" if healthy else "tumor") / name, grey)
            if not healthy:
                mask = ((phantom.labels[..., z] > 0) * 255).astype(np.uint8)
                save_picture(folder / "seg" / name, mask)


def split_patients(patients: int, training: float) -> tuple[range, range]:
    """Return the patient numbers for training and for testing; `training` is the fraction."""
    cut = round(patients * training)
    return range(cut), range(cut, patients)


def choose_slices(phantom: Patient, *, first_slot: int, count: int) -> list[int]:
    """Return `count` axial slice numbers of a patient whose slots start at `first_slot`.

    Lesion slots are spread over the slices where the lesion is at least half as large as at its
    largest; every `HEALTHY_EVERY`-th slot of the whole data set takes a slice without any lesion.
    Raises UserError where the patient has too few slices for that.
    """
    area = (phantom.labels > 0).sum((0, 1))
    brain = (phantom.modalities["t1"] > 0).sum((0, 1))
    contrast = (phantom.level > -phantom.fade).any((0, 1))
    with_lesion = np.flatnonzero(area >= 0.5 * area.max())
    without = np.flatnonzero(~contrast & (brain >= 0.5 * brain.max()))

    slots = range(first_slot, first_slot + count)
    healthy = sum((slot + 1) % HEALTHY_EVERY == 0 for slot in slots)
    chosen = spread(with_lesion, count - healthy, kind="with a lesion")
    return sorted(chosen + spread(without, healthy, kind="without one"))


def spread(numbers: Array, count: int, *, kind: str) -> list[int]:
    """Return `count` of the slice numbers, evenly spaced: the middles of `count` equal parts."""
    if len(numbers) < count:
        raise UserError(
            "--slices",
            f"needs {count} slices {kind}, but this patient has {len(numbers)}",
            "Ask for fewer slices or a larger size.",
        )
    return [int(numbers[(2 * i + 1) * len(numbers) // (2 * count)]) for i in range(count)]


def save_slice(out: Path, stem: str, *, phantom: Patient, z: int) -> None:
    """Write one slice's modalities, label and raters' masks; `{}` in `stem` is the modality."""
    voxel = phantom.voxel_mm
    for name, image in phantom.modalities.items():
        stored = np.rint(255 * image[..., z]).astype(np.uint8)
        save_nifti(out / stem.format(name), stored, voxel_mm=voxel, slope=1 / 255)
    save_nifti(out / stem.format("seg"), phantom.labels[..., z], voxel_mm=voxel)
    for r, mask in enumerate(phantom.raters, 1):
        path = out / f"raters/rater{r}" / stem.format("seg")
        save_nifti(path, mask[..., z], voxel_mm=voxel)


def save_nifti(
    path: Path, data: Array, *, voxel_mm: Sequence[float], slope: float | None = None
) -> None:
    """Write an array as NIfTI in the BraTS orientation; `slope` turns stored numbers into values.

    Creates the parent folders.
    """
    sizes = (*voxel_mm[: min(data.ndim, 3)], 1.0)[:3]
    affine = np.diag((-sizes[0], -sizes[1], sizes[2], 1.0))
    image: Any = nib.Nifti1Image(data, affine)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def isic_2023(number: int, *, malignant: bool, testing: bool) -> IsicPlace:
    """Name things as MedSegDiff of 2023 reads them; the test table writes classes as 0 and 1."""
    base = f"ISBI2016_ISIC_Part3B_{'Test' if testing else 'Training'}"
    name = f"ISIC_{number:07d}"
    label = str(int(malignant)) if testing else ("malignant" if malignant else "benign")
    return IsicPlace(
        picture=f"{base}_Data/{name}.jpg",
        mask=f"{base}_Data/{name}_Segmentation.png",
        table=f"{base}_GroundTruth.csv",
        header="image_id,label",
        row=f"{name},{label}",
    )


def isic_2025(number: int, *, malignant: bool, testing: bool) -> IsicPlace:
    """Name things as MedSegDiff of 2025 reads them; the class is not written."""
    folder, mode = ("Test", "Test") if testing else ("Train", "Training")
    base = f"ISBI2016_ISIC_Part1_{mode}"
    name = f"ISIC_{number:07d}"
    picture, mask = f"{base}_Data/{name}.jpg", f"{base}_GroundTruth/{name}_Segmentation.png"
    return IsicPlace(
        picture=f"{folder}/{picture}",
        mask=f"{folder}/{mask}",
        table=f"{folder}/{base}_GroundTruth.csv",
        header=",img,seg",
        row=f"{{index}},{picture},{mask}",
    )


def save_skin(out: Path, place: IsicPlace, *, skin: Skin) -> None:
    """Write one picture, its mask and its raters' masks; creates the folders."""
    panel = [f"raters/rater{r}/{Path(place.mask).name}" for r in range(1, len(skin.raters) + 1)]
    files = [(place.picture, skin.picture), (place.mask, skin.mask)]
    for name, pixels in files + list(zip(panel, skin.raters, strict=True)):
        save_picture(out / name, pixels)


def save_picture(path: Path, pixels: Array) -> None:
    """Write a picture; creates the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
