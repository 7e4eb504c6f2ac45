"""Every layout of public data sets, as phantoms write it, from check to scores."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from helpers import DIFFUSION, NETWORK, read_csv, refused, script, succeeded
from PIL import Image

from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.layout_table import TABLE, compiled
from guided_diffusion.data.matching import files_below, recognised
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset, open_masks
from guided_diffusion.options.tools import PHANTOM_LAYOUTS
from guided_diffusion.tools.commands import SIZES
from guided_diffusion.tools.phantom_layouts import PICTURES, VOLUMES, write_layout
from guided_diffusion.tools.phantom_skin import make_skin
from guided_diffusion.tools.phantoms import make_patient

SIZE, DEPTH, PATIENTS = 24, 6, 4


class Row(NamedTuple):
    """A layout: its name, its first case and that of testing, and the flags that it needs."""

    name: str
    first: str
    tested: tuple[str, ...]
    channels: int = 3
    flags: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()


ALL = ("lesion0", "lesion1", "lesion2", "lesion3")
ROWS = {
    "nnunet2d": Row(
        "NNUNET", "lesion_000", ("lesion_002",), sampling=("--split", "{}/splits_final.json:0")
    ),
    "isic2018": Row("ISIC", "0000000", ("0000003",)),
    "busi": Row(
        "BUSI",
        "benign (1)",
        ("benign (1)", "benign (4)", "malignant (2)", "normal (3)"),
    ),
    "drive": Row("DRIVE", "01", ("04",)),
    "refuge": Row("REFUGE", "t0001", ("t0004",), flags=("--mask_labels", "disc=0+128")),
    "lidc": Row("RATERS", "nodule000", tuple(f"nodule{number:03d}" for number in range(4))),
    "custom": Row("CUSTOM", "lesion0", ALL),
    "pairs": Row("PAIRS", "lesion0", ALL),
    "pairs_gt": Row("PAIRS", "lesion0", ALL),
    "suffix": Row("SUFFIX", "lesion0", ALL),
    "parts": Row("PAIRS", "lesion0", ("lesion3",)),
    "nnunet": Row(
        "NNUNET", "head_000", ("head_002",), 2, sampling=("--split", "{}/splits_final.json:0")
    ),
    "msd": Row("MSD", "HEAD_000", ("HEAD_001",), 2, sampling=("--split", "{}/split.txt")),
    "acdc": Row("ACDC", "patient001_frame01", ("patient004_frame01", "patient004_frame12"), 1),
    "brats2021": Row(
        "BRATS", "BraTS2021_00000", ("BraTS2021_00001",), 4, sampling=("--split", "{}/split.txt")
    ),
    "modalities": Row(
        "CHANNELS",
        "head00",
        ("head01",),
        2,
        ("--modalities", "t2,adc"),
        ("--split", "{}/split.txt"),
    ),
}


def phantoms(folder: Path, layout: str) -> Path:
    write_layout(layout, folder, 0, patients=PATIENTS, slices=DEPTH, size=SIZE, training=0.5)
    return folder


def known_mask(layout: str, number: int, position: int) -> np.ndarray:
    """The phantom's own mask, where the loader should find it."""
    if layout in PICTURES:
        return make_skin(0, number, size=SIZE).mask > 0
    return make_patient(0, number, shape=(SIZE, SIZE, DEPTH)).labels[..., position] > 0


def test_every_layout_of_phantoms_has_a_row() -> None:
    assert ROWS.keys() == PICTURES.keys() | VOLUMES.keys()
    assert set(PHANTOM_LAYOUTS) == SIZES.keys()


@pytest.mark.parametrize("layout", ROWS)
def test_from_check_to_scores(tmp_path: Path, layout: str) -> None:
    row, folder = ROWS[layout], phantoms(tmp_path / "data", layout)
    position, volume = DEPTH // 2, layout in VOLUMES
    (folder / "split.txt").write_text(f"{row.first} training\n{row.tested[0]} testing\n")
    data = ["--data_dir", folder, "--cache_dir", tmp_path / "cache", *row.flags]
    data += ["--slices", f"{position}:{position + 1}"] if volume else []

    # The layout is recognised, and the mask lies where the phantom has it.
    text = succeeded(script("check_data", *data, "--image_size", 16))
    assert f"layout     {row.name}" in text
    names = dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    wanted = tuple(filter(None, names.get("--modalities", "").split(",")))
    classes = find_classes(names.get("--mask_labels", ""))
    dataset = open_dataset(folder, reading=Reading(modalities=wanted, classes=classes))
    index = dataset.names.index(f"{row.first}_slice{position:03d}" if volume else row.first)
    case = dataset[index]
    assert case.image.shape == (row.channels, SIZE, SIZE)
    assert case.mask is not None
    np.testing.assert_array_equal(case.mask[0].numpy() > 0.5, known_mask(layout, 0, position))

    # Train, sample, and score against the folder itself.
    run = tmp_path / "run"
    command = ["--out_dir", run, *NETWORK, *DIFFUSION, "--max_steps", 1, "--batch_size", 2]
    succeeded(script("segmentation_train", *data, *command))
    chosen = [flag.format(folder) for flag in row.sampling]
    given = [item for item in data if item not in row.flags]
    command = ["--model_path", run, "--out_dir", tmp_path / "masks", "--num_ensemble", 1]
    succeeded(
        script("segmentation_sample", *given, *chosen, *command, "--use_ddim", True, "--steps", 1)
    )
    ending = f"_slice{position:03d}_mask.png" if volume else "_mask.png"
    drawn = {path.name for path in (tmp_path / "masks").glob("*_mask.png")}
    assert drawn == {f"{name}{ending}" for name in row.tested}
    against = ["--inp_pth", tmp_path / "masks", "--out_pth", folder, "--partial", True]
    succeeded(script("segmentation_env", *against))
    assert len(read_csv(tmp_path / "masks/scores.csv")) == len(row.tested)


# ---------------------------------------------------------------- what is particular to a layout


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def picture(value: int = 90) -> np.ndarray:
    return np.full((16, 16, 3), (value, 10, 20), np.uint8)


def mask(*rows: int) -> np.ndarray:
    values = np.zeros((16, 16), np.uint8)
    values[list(rows)] = 255
    return values


def write_volume(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.diag((-1.0, -1, 1, 1))), path)
    return path


def marked(dataset: SegmentationDataset, name: str) -> set[int]:
    """The rows that the mask of a case marks."""
    found = dataset[dataset.names.index(name)].mask
    assert found is not None
    return set(np.flatnonzero(found[0].numpy().any(axis=1)).tolist())


def test_several_masks_of_an_image_are_united(tmp_path: Path) -> None:
    save(tmp_path / "benign/benign (1).png", picture())
    for ending, row in (("", 2), ("_1", 5), ("_2", 9)):
        save(tmp_path / f"benign/benign (1)_mask{ending}.png", mask(row))
    assert marked(open_dataset(tmp_path), "benign (1)") == {2, 5, 9}
    truth = open_masks(tmp_path)["benign (1)"]()
    assert set(np.flatnonzero(truth.any(axis=1))) == {2, 5, 9}


def test_instances_in_folders_of_their_own_are_united(tmp_path: Path) -> None:
    save(tmp_path / "c1/images/c1.png", picture())
    for number in (3, 7):
        save(tmp_path / f"c1/masks/{number}.png", mask(number))
    assert marked(open_dataset(tmp_path), "c1") == {3, 7}


@pytest.mark.parametrize("cached", [False, True])
def test_the_last_of_four_axes_is_the_channel(tmp_path: Path, cached: bool) -> None:
    values = np.zeros((6, 5, 4, 3), np.float32)
    for channel in range(3):
        values[2, 1, 3, channel] = channel + 1
        values[0, 0, 0, channel] = 4  # every channel is scaled by its own range
    write_volume(tmp_path / "imagesTr/a.nii.gz", values)
    write_volume(tmp_path / "labelsTr/a.nii.gz", (values[..., 0] == 1).astype(np.uint8))
    reading = Reading(cache_dir=tmp_path / "cache" if cached else None)
    for _ in range(2):
        dataset = open_dataset(tmp_path, reading=reading)
        case = dataset[dataset.names.index("a_slice003")]
        assert case.image[:, 2, 1].tolist() == [0.25, 0.5, 0.75]
        assert case.mask is not None and case.mask.sum() == 1 and case.mask[0, 2, 1] == 1


def test_a_volume_of_fewer_channels_is_named(tmp_path: Path) -> None:
    for name, channels in (("a", 3), ("b", 2)):
        write_volume(tmp_path / f"imagesTr/{name}.nii", np.zeros((6, 5, 4, channels), np.float32))
        write_volume(tmp_path / f"labelsTr/{name}.nii", np.zeros((6, 5, 4), np.uint8))
    dataset = open_dataset(tmp_path)
    with pytest.raises(UserError, match=r"b\.nii: .*2 channels, fewer than others"):
        dataset[dataset.names.index("b_slice000")]


def test_channels_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for channel in range(2):
        grey = np.full((8, 8), 51 * (1 + channel), np.uint8)
        save(tmp_path / f"imagesTr/a_000{channel}.png", grey)
    save(tmp_path / "labelsTr/a.png", (mask(2)[:8, :8] > 0).astype(np.uint8))
    case = open_dataset(tmp_path)[0]
    assert case.image[:, 0, 0].tolist() == pytest.approx([0.2, 0.4])


def test_modalities_of_any_name_are_chosen_in_order(tmp_path: Path) -> None:
    for k, name in enumerate(("adc", "dwi", "t2w")):
        write_volume(tmp_path / f"p1/p1_{name}.nii", np.full((6, 5), k, np.float32))
    write_volume(tmp_path / "p1/p1_seg.nii", np.eye(6, 5, dtype=np.uint8))
    dataset = open_dataset(tmp_path, reading=Reading(modalities=("t2", "adc")))
    assert dataset.modalities == ("t2", "adc")
    assert dataset[0].image[:, 0, 0].tolist() == [2, 0]


def test_brats_folders_called_nii_are_one_case(tmp_path: Path) -> None:
    for number in range(2):
        for name in ("flair", "t1ce", "seg"):
            case = f"BraTS2021_{number:05d}"
            path = tmp_path / case / f"{case}_{name}.nii" / f"0000{number}_final_{name}.nii"
            write_volume(path, np.arange(24, dtype=np.uint8).reshape(2, 3, 4) % 2)
    dataset = open_dataset(tmp_path)
    assert {entry.volume for entry in dataset.entries} == {"BraTS2021_00000", "BraTS2021_00001"}
    assert dataset.modalities == ("t1ce", "flair")


@pytest.mark.parametrize("ending", ["_mask", "_seg", "_gt", "_label"])
@pytest.mark.parametrize("folders", [("images/", "masks/"), ("", ""), ("x/", "y/")])
def test_masks_named_by_a_suffix(tmp_path: Path, ending: str, folders: tuple[str, str]) -> None:
    for row, case in enumerate(("a", "b")):
        save(tmp_path / f"{folders[0]}{case}.png", picture())
        save(tmp_path / f"{folders[1]}{case}{ending}.png", mask(row))
    assert marked(open_dataset(tmp_path), "b") == {1}
    assert open_masks(tmp_path).keys() == {"a", "b"}


@pytest.mark.parametrize(
    "layout", ["image/ label/", "images/ labels/", "img/ mask/", "imgs/ masks/"]
)
def test_pairs_of_folders(tmp_path: Path, layout: str) -> None:
    images, masks = layout.split()
    save(tmp_path / images / "face_mask.png", picture())
    save(tmp_path / masks / "face_mask.png", mask(4))
    for test in (False, True):
        assert marked(open_dataset(tmp_path, test=test), "face_mask") == {4}


def test_a_gif_counts_as_a_mask_but_not_beside_other_masks_or_images(tmp_path: Path) -> None:
    save(tmp_path / "a/images/1.png", picture())
    save(tmp_path / "a/images/preview.gif", mask(1))
    save(tmp_path / "a/masks/1.gif", mask(6))
    assert marked(open_dataset(tmp_path / "a"), "1") == {6}
    save(tmp_path / "a/masks/1.png", mask(3))
    assert marked(open_dataset(tmp_path / "a"), "1") == {3}


# ----------------------------------------------------------------------------------- parts, splits


def test_each_command_takes_its_part(tmp_path: Path) -> None:
    phantoms(tmp_path, "parts")
    names = {part: open_dataset(tmp_path, part=part).names for part in ("training", "validation")}
    assert names == {"training": ["lesion0", "lesion1"], "validation": ["lesion2"]}
    assert open_dataset(tmp_path, test=True).names == ["lesion3"]


@pytest.mark.parametrize("layout", ["parts", "nnunet2d"])
def test_the_part_for_validation_is_validated_on(tmp_path: Path, layout: str) -> None:
    folder, run = phantoms(tmp_path / "data", layout), tmp_path / "run"
    split = ["--split", folder / "splits_final.json:0"] if layout == "nnunet2d" else []
    flags = [*NETWORK, *DIFFUSION, "--max_steps", 1, "--batch_size", 2, "--val_interval", 1]
    text = succeeded(
        script("segmentation_train", "--data_dir", folder, *split, "--out_dir", run, *flags)
    )
    assert "lesion" in " ".join(path.stem for path in run.rglob("lesion*.png")), text


@pytest.mark.parametrize(
    ("content", "flag", "found"),
    [
        ([{"train": ["a"], "val": ["b"]}], ":1", "has the folds 0 to 0"),
        ([{"train": ["a"], "val": ["b"]}], "", "has the folds 0 to 0"),
        ([{"train": ["a"], "val": ["a"]}], ":0", "a is in training and in validation"),
        ({"train": []}, ":0", "is no list of nnU-Net's folds"),
        ([{"train": ["a"], "val": ["zz"]}], ":0", "has no case or patient zz"),
        ([3], ":0", "is no list of nnU-Net's folds"),
    ],
)
def test_folds_that_cannot_be_used(tmp_path: Path, content: Any, flag: str, found: str) -> None:
    for case in ("a", "b"):
        save(tmp_path / f"d/{case}.png", picture())
        save(tmp_path / f"d/{case}_mask.png", mask(1))
    (tmp_path / "s.json").write_text(json.dumps(content))
    split = f"{tmp_path / 's.json'}{flag}"
    run = script("check_data", "--data_dir", tmp_path / "d", "--split", split, "--image_size", 16)
    assert run.code == 2 and found in run.out + run.err


# ------------------------------------------------------------------------------------- to segment


def test_bare_images_and_single_files_keep_their_names(tmp_path: Path) -> None:
    run, flags = tmp_path / "run", [*NETWORK, *DIFFUSION, "--max_steps", 1, "--batch_size", 2]
    save(tmp_path / "d/images/a.png", picture())
    save(tmp_path / "d/masks/a.png", mask(4))
    succeeded(script("segmentation_train", "--data_dir", tmp_path / "d", "--out_dir", run, *flags))
    for name in ("new photo", "x_y"):
        save(tmp_path / f"bare/{name}.png", picture())
    for where, names in (("bare", ["new photo", "x_y"]), ("bare/x_y.png", ["x_y"])):
        out = tmp_path / f"out{len(names)}"
        drawing = ["--model_path", run, "--out_dir", out, "--num_ensemble", 1, "--dpm_solver", True]
        succeeded(
            script("segmentation_sample", "--data_dir", tmp_path / where, *drawing, "--steps", 1)
        )
        assert sorted(p.name for p in out.glob("*_mask.png")) == [f"{n}_mask.png" for n in names]


def test_one_volume_is_segmented_on_its_grid(tmp_path: Path) -> None:
    phantoms(tmp_path / "data", "msd")
    run, cache = tmp_path / "run", ["--cache_dir", tmp_path / "cache"]
    flags = [*NETWORK, *DIFFUSION, "--max_steps", 1, "--batch_size", 2, *cache]
    succeeded(
        script("segmentation_train", "--data_dir", tmp_path / "data", "--out_dir", run, *flags)
    )
    image = tmp_path / "data/imagesTs/HEAD_003.nii.gz"
    drawing = ["--model_path", run, "--out_dir", tmp_path / "out", "--num_ensemble", 1, *cache]
    steps = ["--dpm_solver", True, "--steps", 1]
    succeeded(script("segmentation_sample", "--data_dir", image, *drawing, *steps))
    source, result = nib.load(image), nib.load(tmp_path / "out/HEAD_003_mask.nii.gz")
    assert source.shape == (SIZE, SIZE, DEPTH, 2) and result.shape == (SIZE, SIZE, DEPTH)
    np.testing.assert_array_equal(source.affine, result.affine)


def test_bare_channels_of_nnunet(tmp_path: Path) -> None:
    folder = phantoms(tmp_path, "nnunet") / "imagesTs"
    dataset = open_dataset(folder, test=True)
    assert dataset.channels == 2
    assert {entry.volume for entry in dataset.entries} == {"head_003"}


def test_numbered_photographs_are_no_channels(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"IMG_{number:04d}.png", picture())
    assert open_dataset(tmp_path, test=True).names == ["IMG_0000", "IMG_0001", "IMG_0002"]


# -------------------------------------------------------------------------------------- not known


def labels_missing(folder: Path) -> None:
    save(folder / "imagesTr/a_0000.png", picture())


def manuals_missing(folder: Path) -> None:
    save(folder / "images/21_training.tif", picture())


def images_missing(folder: Path) -> None:
    save(folder / "labelsTr/a.png", mask(1))


def one_below(folder: Path) -> None:
    save(folder / "Set/image/a.png", picture())
    save(folder / "Set/label/a.png", mask(1))


def just_images(folder: Path) -> None:
    save(folder / "a.png", picture())


def around_drive(folder: Path) -> None:
    for part, number in (("training", 21), ("test", 1)):
        save(folder / f"DRIVE/{part}/images/{number:02d}_{part}.tif", picture())
        save(folder / f"DRIVE/{part}/1st_manual/{number:02d}_manual1.gif", mask(1))
        save(folder / f"DRIVE/{part}/mask/{number:02d}_{part}_mask.gif", mask(2))


def field_of_view_alone(folder: Path) -> None:
    save(folder / "images/21_training.tif", picture())
    save(folder / "mask/21_training_mask.gif", mask(2))


def other_names(folder: Path) -> None:
    save(folder / "images/a.png", picture())
    save(folder / "labels/b.png", mask(1))


def one_without(folder: Path) -> None:
    other_names(folder)
    save(folder / "labels/a.png", mask(1))


UNKNOWN: list[tuple[Callable[[Path], None], str]] = [
    (labels_missing, "looks like NNUNET, but has no mask labelsTr/<case>"),
    (manuals_missing, "looks like DRIVE, but has no mask 1st_manual/<case>_manual1"),
    (images_missing, "looks like NNUNET, but has no image imagesTr/<case>_0000"),
    (one_below, "is no data set, but Set below it is one"),
    (around_drive, "is no data set, but DRIVE below it is one"),
    (field_of_view_alone, "looks like DRIVE, but has no mask 1st_manual/<case>_manual1"),
    (just_images, "holds images such as a.png, but no masks that belong to them"),
    (other_names, "looks like PAIRS, but has no mask whose case is that of an image"),
    (one_without, "has 1 mask without image: b"),
]


@pytest.mark.parametrize(("build", "found"), UNKNOWN, ids=[row[0].__name__ for row in UNKNOWN])
def test_a_folder_that_is_not_known(
    tmp_path: Path, build: Callable[[Path], None], found: str
) -> None:
    build(tmp_path)
    run = script("segmentation_train", "--data_dir", tmp_path, "--out_dir", tmp_path / "run")
    message = refused(run)
    assert found in message and "--data_name" not in message
    assert "docs/data.md" in message or "Pass " in message or "Add " in message


# --------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("pattern", "path", "groups"),
    [
        ("images{part}/{case}_{channel}", "imagesTr/a_b_0001", ("Tr", "a_b", "0001")),
        ("images{part}/{case}_{channel}", "imagesTr/a_b_001", None),
        ("**/{case:p#}", "x/y/p12", ("p12",)),
        ("**/{case:p#}", "x/y/q12", None),
        ("{case}/{case}_(a|b)[_#]", "k/k_b_3", ("k",)),
        ("{case}/{case}_(a|b)[_#]", "k/l_b_3", None),
        ("{case}/images/*", "k/images/any thing", ("k",)),
        ("{case}.x", "kax", None),
    ],
)
def test_patterns(pattern: str, path: str, groups: tuple[str, ...] | None) -> None:
    hit = compiled(pattern).fullmatch(path)
    assert (hit and hit.groups()) == groups


def test_layouts_of_the_table_are_told_apart(tmp_path: Path) -> None:
    for layout in (*PICTURES, *VOLUMES):
        if ROWS[layout].name not in ("ISIC", "BRATS", "CUSTOM", "RATERS"):
            folder = phantoms(tmp_path / layout, layout)
            parts = [folder / name for name in ("train", "training") if (folder / name).is_dir()]
            found = recognised(files_below(parts[0] if parts else folder))
            assert found in TABLE and found is not None and found.name == ROWS[layout].name


@pytest.mark.parametrize(
    ("image", "label"), [("imagesTr/c{}_0000.png", "labelsTr/c{}.png"), ("c{}.png", "c{}_mask.png")]
)
def test_many_files_are_listed_once_and_few_are_opened(
    tmp_path: Path, image: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = save(tmp_path / "i.png", picture()), save(tmp_path / "m.png", mask(1))
    for number in range(1000):
        for pattern, source in zip((image, label), sources, strict=True):
            path = tmp_path / "d" / pattern.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, path)
    listed, opened = [], []
    scan, open_picture = os.scandir, Image.open
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    monkeypatch.setattr(Image, "open", lambda p, **_: opened.append(p) or open_picture(p))
    assert len(open_dataset(tmp_path / "d")) == 1000
    assert max(Counter(map(str, listed)).values()) <= 2, "once more to look for DICOM or raters"
    assert len(opened) <= 200
