"""Phantoms in the layouts that public data sets have, named as those are.

A layout here is one function, which lists the files of a case: pictures of skin lesions, or volumes
of heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.tools.phantom_fields import Array
from guided_diffusion.tools.phantom_folders import save_nifti, save_picture, split_patients
from guided_diffusion.tools.phantom_skin import Skin, make_skin
from guided_diffusion.tools.phantoms import Patient, make_patient

Case = Iterable[tuple[str, Array]]
"""The files of a case: paths below the data set's folder, and pixels or voxels."""
Progress = Callable[[Iterable[int]], Iterable[int]]


def _nnunet2d(skin: Skin, number: int, part: str) -> Case:
    ending = "Ts" if part == "test" else "Tr"
    yield f"images{ending}/lesion_{number:03d}_0000.png", skin.picture
    if ending == "Tr":
        yield f"labelsTr/lesion_{number:03d}.png", skin.mask // 255


def _isic2018(skin: Skin, number: int, part: str) -> Case:
    name = "Test" if part == "test" else "Training"
    case = f"ISIC_{number:07d}"
    yield f"ISIC2018_Task1-2_{name}_Input/{case}.jpg", skin.picture
    yield f"ISIC2018_Task1_{name}_GroundTruth/{case}_segmentation.png", skin.mask


def _busi(skin: Skin, number: int, part: str) -> Case:
    kind = ("benign", "malignant", "normal")[number % 3]
    case = f"{kind}/{kind} ({number + 1})"
    yield f"{case}.png", skin.picture
    if kind == "normal":
        yield f"{case}_mask.png", 0 * skin.mask
        return
    upper = skin.mask.copy()
    upper[skin.mask.nonzero()[0].mean().round().astype(int) :] = 0
    halves = [upper, skin.mask - upper] if kind == "malignant" else [skin.mask]
    for mask, ending in zip(halves, ("", "_1"), strict=False):
        yield f"{case}_mask{ending}.png", mask


def _drive(skin: Skin, number: int, part: str) -> Case:
    folder = "test" if part == "test" else "training"
    yield f"{folder}/images/{number + 1:02d}_{folder}.tif", skin.picture
    yield f"{folder}/1st_manual/{number + 1:02d}_manual1.gif", skin.mask
    field_of_view = np.full_like(skin.mask, 255)
    yield f"{folder}/mask/{number + 1:02d}_{folder}_mask.gif", field_of_view


def _refuge(skin: Skin, number: int, part: str) -> Case:
    name = {"train": "Training", "val": "Validation", "test": "Test"}[part] + "400"
    case = f"{name[0].lower()}{number + 1:04d}"
    values = np.where(skin.mask > 0, np.uint8(128), np.uint8(255))
    rows, columns = skin.mask.nonzero()
    middle = np.hypot(*(np.indices(skin.mask.shape) - [[[rows.mean()]], [[columns.mean()]]]))
    values[(middle < len(values) / 16) & (skin.mask > 0)] = 0  # the cup
    yield f"REFUGE-{name}/{name}/{case}.jpg", skin.picture
    yield f"Annotation-{name}/Disc_Cup_Masks/{case}.bmp", values


def _lidc(skin: Skin, number: int, part: str) -> Case:
    """Four raters, of whom two agree; the majority is the phantom's mask."""
    case = f"nodule{number:03d}"
    yield f"{case}/image.png", skin.picture
    for rater, shift in enumerate((0, 0, -1, 1)):
        yield f"{case}/mask_{rater}.png", np.roll(skin.mask, shift, axis=1)


def _pairs(skin: Skin, number: int, part: str, *, image: str, mask: str) -> Case:
    yield image.format(part=part, case=f"lesion{number}"), skin.picture
    yield mask.format(part=part, case=f"lesion{number}"), skin.mask


def _nnunet(patient: Patient, number: int, part: str) -> Case:
    ending = "Ts" if part == "test" else "Tr"
    for channel, name in enumerate(("flair", "t1ce")):
        path = f"images{ending}/head_{number:03d}_{channel:04d}.nii.gz"
        yield path, patient.modalities[name].astype(np.float32)
    if ending == "Tr":
        yield f"labelsTr/head_{number:03d}.nii.gz", patient.labels


def _msd(patient: Patient, number: int, part: str) -> Case:
    ending = "Ts" if part == "test" else "Tr"
    images = [patient.modalities[name] for name in ("flair", "t1ce")]
    yield f"images{ending}/HEAD_{number:03d}.nii.gz", np.stack(images, -1).astype(np.float32)
    if ending == "Tr":
        yield f"labelsTr/HEAD_{number:03d}.nii.gz", patient.labels


def _acdc(patient: Patient, number: int, part: str) -> Case:
    folder = "testing" if part == "test" else "training"
    stem = f"{folder}/patient{number + 1:03d}/patient{number + 1:03d}"
    image = np.rint(500 * patient.modalities["t2"]).astype(np.int16)
    yield f"{stem}_4d.nii.gz", np.stack([image, image], -1)
    for frame in (1, 12):
        yield f"{stem}_frame{frame:02d}.nii.gz", image
        yield f"{stem}_frame{frame:02d}_gt.nii.gz", np.minimum(patient.labels, 3)


def _brats2021(patient: Patient, number: int, part: str) -> Case:
    case = f"BraTS2021_{number:05d}"
    for name, image in {**patient.modalities, "seg": patient.labels}.items():
        values = image if name == "seg" else np.rint(500 * image).astype(np.float32)
        yield f"{case}/{case}_{name}.nii/{number:08d}_brain_{name}.nii", values


def _modalities(patient: Patient, number: int, part: str) -> Case:
    for name, own in (("t2", "t2"), ("adc", "flair")):
        yield f"head{number:02d}_{name}.nii.gz", patient.modalities[own].astype(np.float32)
    yield f"head{number:02d}_seg.nii.gz", patient.labels


PICTURES: dict[str, Callable[[Skin, int, str], Case]] = {
    "nnunet2d": _nnunet2d,
    "isic2018": _isic2018,
    "busi": _busi,
    "drive": _drive,
    "refuge": _refuge,
    "lidc": _lidc,
    "custom": partial(_pairs, image="images/{case}.png", mask="masks/{case}.png"),
    "pairs": partial(_pairs, image="image/{case}.png", mask="label/{case}.png"),
    "pairs_gt": partial(_pairs, image="imgs/{case}.jpg", mask="masks/{case}_gt.png"),
    "suffix": partial(_pairs, image="{case}.png", mask="{case}_mask.png"),
    "parts": partial(_pairs, image="{part}/images/{case}.png", mask="{part}/labels/{case}.png"),
}
VOLUMES: dict[str, Callable[[Patient, int, str], Case]] = {
    "nnunet": _nnunet,
    "msd": _msd,
    "acdc": _acdc,
    "brats2021": _brats2021,
    "modalities": _modalities,
}


def part_of_patient(number: int, patients: int, training: float) -> str:
    """'train', 'val' or 'test': a share for training, half of the rest to validate on."""
    train, rest = split_patients(patients, training)
    if number in train:
        return "train"
    return "val" if number < (rest.start + rest.stop) // 2 else "test"


def write_layout(
    layout: str,
    out: Path,
    seed: int,
    *,
    patients: int,
    slices: int,
    size: int,
    training: float = 0.8,
    progress: Progress = iter,
) -> None:
    """Write phantoms as :data:`PICTURES` or :data:`VOLUMES` name them.

    Args:
        layout: a key of one of the two.
        out: the folder.
        seed: of all phantoms.
        patients: volumes, or pictures.
        slices: of a volume.
        size: pixels per side.
        training: share of the patients in the part for training.
        progress: goes round the numbers of the patients.
    """
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in progress(range(patients)):
        part = part_of_patient(number, patients, training)
        parts[part].append(f"{'lesion' if layout in PICTURES else 'head'}_{number:03d}")
        if layout in PICTURES:
            skin = make_skin(seed, number, size=size)
            for name, pixels in PICTURES[layout](skin, number, part):
                save_picture(out / name, pixels)
            continue
        patient = make_patient(seed, number, shape=(size, size, slices))
        for name, voxels in VOLUMES[layout](patient, number, part):
            save_nifti(out / name, voxels, voxel_mm=patient.voxel_mm)
    if layout in ("nnunet", "nnunet2d", "msd"):
        _write_json(layout, out, parts)


def _write_json(layout: str, out: Path, parts: dict[str, list[str]]) -> None:
    """Write the records of nnU-Net and of the Decathlon."""
    names = ["RGB"] if layout == "nnunet2d" else ["FLAIR", "T1ce"]
    labels: dict[str, Any] = {"background": 0, "whole": [1, 2, 4], "core": [1, 4], "enhancing": [4]}
    if layout == "nnunet2d":
        labels = {"background": 0, "lesion": 1}
    channels = dict(enumerate(names))
    facts: dict[str, Any] = {"channel_names": channels, "labels": labels}
    if layout == "msd":
        labels = {"0": "background", "1": "core", "2": "oedema", "4": "enhancing"}
        facts = {"modality": channels, "labels": labels, "tensorImageSize": "4D"}
    (out / "dataset.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    folds = [{"train": parts["train"], "val": parts["val"]}]
    if layout != "msd":
        (out / "splits_final.json").write_text(json.dumps(folds, indent=2), encoding="utf-8")
