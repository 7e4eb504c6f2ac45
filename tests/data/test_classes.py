"""Declared classes: from labels to channels, through training and sampling, to scores by class."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from brats_folders import AFFINE, write_volumes
from helpers import DIFFUSION, NETWORK, contents, read_alone, read_csv, refused, script, succeeded
from PIL import Image

from guided_diffusion.data.classes import Classes, find_classes, record_text, recorded_classes
from guided_diffusion.data.datasets import Case, Reading
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.errors import UserError
from guided_diffusion.inference.record import note_classes
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import open_dataset
from guided_diffusion.report.pictures import class_overlay
from guided_diffusion.scoring.evaluate import evaluate_all
from guided_diffusion.scoring.summary import summary_text
from guided_diffusion.script_util import create_model_and_diffusion

LABELS = np.array([[0, 1, 2, 4], [4, 2, 1, 0]], np.uint8)


def classes_of(text: str) -> Classes:
    classes = find_classes(text)
    assert classes is not None
    return classes


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return path


# ----------------------------------------------------------------------------------- the flag


@pytest.mark.parametrize(
    ("text", "names", "labels", "exclusive", "values", "spelled"),
    [
        ("1,2,4", ("1", "2", "4"), ((1,), (2,), (4,)), True, (1, 2, 4), "1,2,4"),
        (" 4, 01", ("4", "1"), ((4,), (1,)), True, (4, 1), "4,1"),
        ("core=1+4,oedema=2", ("core", "oedema"), ((1, 4), (2,)), True, (1, 2), None),
        ("wt,TC,et", ("WT", "TC", "ET"), ((1, 2, 4, 3), (1, 4, 3), (4, 3)), False, (2, 1, 4), ""),
        ("ET,WT", ("ET", "WT"), ((4, 3), (1, 2, 4, 3)), False, (4, 1), "ET,WT"),
        ("WT=1+2+3,ET=3", ("WT", "ET"), ((1, 2, 3), (3,)), False, (1, 3), None),
        ("a=1+2,b=2+3", ("a", "b"), ((1, 2), (2, 3)), False, (1, 3), None),
    ],
)
def test_the_flag_is_read(
    text: str,
    names: tuple[str, ...],
    labels: tuple[tuple[int, ...], ...],
    exclusive: bool,
    values: tuple[int, ...],
    spelled: str | None,
) -> None:
    classes = classes_of(text)
    assert (classes.names, classes.labels) == (names, labels)
    assert (classes.exclusive, classes.values, len(classes)) == (exclusive, values, len(names))
    assert str(classes) == (text if spelled is None else spelled or "WT,TC,ET")
    assert find_classes(str(classes)) == classes


def test_without_the_flag_there_is_one_class() -> None:
    assert find_classes("") is None and find_classes(" ") is None


@pytest.mark.parametrize(
    "text",
    [
        "1,,2",
        "256",
        "1,1",
        "a=1,A=2",
        "a=1,b=1",
        "1+2",
        "a=",
        "=1",
        "a/b=1",
        "a=1+1",
        "x",
        "-1",
    ],
)
def test_an_invalid_list_of_classes(text: str) -> None:
    with pytest.raises(UserError, match=r"--mask_labels: in .* labels from 0 to 255.*Write for"):
        find_classes(text)


# ------------------------------------------------------------------------- labels to channels


def test_one_hot_by_hand() -> None:
    split = classes_of("1,2,4").split(LABELS, "a")
    assert split.dtype == np.float32 and split.shape == (3, 2, 4)
    assert split[0].tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert split[2].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert (split.sum(0) == (LABELS > 0)).all()


@pytest.mark.parametrize("enhancing", [3, 4])
def test_regions_by_hand(enhancing: int) -> None:
    labels = np.where(LABELS == 4, enhancing, LABELS)
    whole, core, enhanced = classes_of("WT,TC,ET").split(labels, "a")
    assert whole.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]]
    assert core.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert enhanced.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert classes_of("ET").split(labels, "a").sum() == 2  # the tumour's other labels are known


@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        ("1,4", LABELS, "a.png: has label 2, which no class declares.* --mask_labels 1,4,2"),
        ("core=1+4", LABELS, r"label 2, .*core=1\+4\+2"),
        ("WT,ET", LABELS + 3, "label 5, 7"),
        ("WT,ET", np.array([[3, 4]]), "the labels 3 and 4 together"),
        ("1,2", np.array([[0.5, 1]]), "fractional labels from 0.5 to 1"),
    ],
)
def test_undeclared_labels(text: str, labels: np.ndarray, found: str) -> None:
    with pytest.raises(UserError, match=found):
        classes_of(text).split(labels, "a.png")


def test_pictures_hold_labels_as_stored(tmp_path: Path) -> None:
    classes = classes_of("1,200")
    grey = np.array([[0, 1], [200, 1]], np.uint8)
    palette = Image.fromarray(grey, "P")
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 0)])
    palette.save(tmp_path / "palette.png")
    paths = [tmp_path / "palette.png", save(tmp_path / "grey.png", grey)]
    paths.append(save(tmp_path / "deep.png", grey.astype(np.uint16)))
    paths.append(save(tmp_path / "rgb.png", np.repeat(grey[..., None], 3, axis=2)))
    for path in paths:
        mask = read_alone(path, classes)
        assert mask.dtype == torch.float32, path
        assert mask.tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]]], path
    with pytest.raises(UserError, match=r"grey\.png: has label 200"):
        read_alone(paths[1], classes_of("1"))
    jpeg = save(tmp_path / "a.jpg", np.full((8, 8), 1, np.uint8))
    with pytest.raises(UserError, match="Save label maps as PNG"):
        read_alone(jpeg, classes_of("1"))
    assert read_alone(paths[0]).tolist() == [[[0, 1], [1, 1]]]  # one class, as ever


def test_layouts_give_channels(tmp_path: Path) -> None:
    reading = Reading(classes=classes_of("1,2,4"))
    write_volumes(tmp_path / "volumes")
    volumes = open_dataset(tmp_path / "volumes", reading=reading)
    masks = [volumes[index].mask for index in range(5)]
    assert [mask.sum((1, 2)).tolist() for mask in masks if mask is not None] == [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [0, 0, 0],
    ]
    save(tmp_path / "own" / "images" / "a.png", np.zeros((2, 4), np.uint8))
    save(tmp_path / "own" / "masks" / "a.png", LABELS)
    mask = open_dataset(tmp_path / "own", reading=reading)[0].mask
    assert mask is not None and (mask.numpy() == classes_of("1,2,4").split(LABELS, "")).all()


def test_a_pixel_that_two_classes_halve_goes_to_the_first(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", np.zeros((2, 2), np.uint8))
    save(tmp_path / "masks" / "a.png", np.tile(np.array([1, 2], np.uint8), (2, 1)))
    for text, expected in (("1,2", 1), ("a=1+3,b=2+3", 2)):
        dataset = open_dataset(tmp_path, reading=Reading(classes=classes_of(text)))
        mask = ResizedDataset(dataset, Frame(1))[0].mask
        assert mask is not None and mask.sum() == expected


# ------------------------------------------------------------------------- channels to labels


SOFT = np.array([[[0.9, 0.6, 0.4]], [[0.6, 0.7, 0.3]], [[0.5, 0.7, 0.2]]], np.float32)


def test_exclusive_classes_by_the_likeliest() -> None:
    classes = classes_of("1,2,4")
    assert classes.masks(SOFT).tolist() == [[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 0]]]
    assert classes.label_map(SOFT).tolist() == [[1, 2, 0]]
    assert classes.label_map(SOFT).dtype == np.uint8


def test_regions_by_one_half_each() -> None:
    soft = np.array([[[0.9, 0.6, 0.5]], [[0.6, 0.7, 0.3]], [[0.4, 0.7, 0.2]]])
    classes = classes_of("WT,TC,ET")
    assert (classes.masks(soft) == (soft >= 0.5)).all()
    assert classes.label_map(soft).tolist() == [[1, 4, 2]]
    assert classes.label_map(SOFT).tolist() == [[4, 4, 0]]
    # the widest is painted first, in whatever order they are named
    assert classes_of("ET,TC,WT").label_map(soft[::-1]).tolist() == [[1, 4, 2]]


def test_a_label_map_is_split_and_painted_back() -> None:
    for text in ("1,2,4", "WT,TC,ET"):
        classes = classes_of(text)
        assert (classes.label_map(classes.split(LABELS, "")) == LABELS).all()


def test_segmentations() -> None:
    members = torch.rand(4, 3, 5, 6)
    result = Segmentation(members, torch.from_numpy(SOFT), members[0], classes_of("1,2,4"))
    assert result.labels.tolist() == [[1, 2, 0]] and result.labels.dtype == torch.uint8
    assert result.mask.dtype == torch.bool and result.mask.sum() == 2
    plain = Segmentation(members[:, 0], members[0, 0], members[0, 0])
    assert torch.equal(plain.mask, members[0, 0] >= 0.5)
    assert torch.equal(plain.labels, plain.mask.to(torch.uint8))


def test_networks_have_a_channel_per_class() -> None:
    small = {"image_size": 16, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1}
    for flags, out in (({"learn_sigma": True}, 6), ({}, 3)):
        net, _ = create_model_and_diffusion(in_ch=7, mask_labels="WT,TC,ET", **small, **flags)
        image, noisy = torch.zeros(1, 4, 16, 16), torch.zeros(1, 3, 16, 16)
        assert net(noisy, torch.zeros(1), net.encode(image)).raw.shape == (1, out, 16, 16)
        assert net.mask_channels == 3
    net, _ = create_model_and_diffusion(in_ch=5, **small)
    assert net.mask_channels == 1


def test_the_overlay_of_classes() -> None:
    masks = classes_of("1,2,4").split(LABELS.repeat(8, 0).repeat(8, 1), "")
    image, uncertainty = np.zeros((1, 16, 32), np.float32), np.zeros((16, 32))
    arguments = {"classes": ("a", "b", "c"), "name": "case", "panel": 64}
    with_truth = class_overlay(image, masks, masks, uncertainty, **arguments)
    without = class_overlay(image, None, masks, uncertainty, **arguments)
    assert with_truth.shape[1] > without.shape[1] and with_truth.dtype == np.uint8
    with pytest.raises(ValueError, match="a mask is"):
        class_overlay(image, None, masks[:, :4], uncertainty, **arguments)


# --------------------------------------------------------------- training, sampling, scoring


TRAIN = [*NETWORK, *DIFFUSION, "--batch_size", 2, "--lr", 3e-3, "--ema_rate", "0.9"]
DRAW = ["--steps", 2, "--dpm_solver", "True", "--num_ensemble", 2]


@pytest.fixture(scope="module")
def model(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of three labels, trained for a moment on phantom slices."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    data = ["--data_dir", brats / "training", "--out_dir", folder]
    succeeded(
        script("segmentation_train", *data, *TRAIN, "--mask_labels", "1,2,4", "--max_steps", 2)
    )
    return folder


@pytest.fixture(scope="module")
def sampled(model: Path, brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "masks"
    data = ["--data_dir", brats / "testing", "--out_dir", folder, "--model_path", model]
    succeeded(script("segmentation_sample", *data, *DRAW))
    return folder


def test_files_of_sampled_classes(sampled: Path, brats: Path) -> None:
    dataset = open_dataset(brats / "testing", reading=Reading(classes=classes_of("1,2,4")))
    name, height, width = dataset.names[0], *dataset[0].image.shape[-2:]
    soft = []
    for label in "124":
        soft.append(np.asarray(Image.open(sampled / f"{name}_output_ens_{label}.png")))
        member = np.asarray(Image.open(sampled / f"{name}_output1_{label}.png"))
        assert soft[-1].shape == member.shape == (height, width)
    labels = np.asarray(Image.open(sampled / f"{name}_mask.png"))
    assert labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 1, 2, 4}
    decided = np.stack(soft).max(0) != 128  # 8 bits cannot tell ties from one half
    expected = classes_of("1,2,4").label_map(np.stack(soft) / 255)
    assert (labels == expected)[decided].mean() > 0.99
    stored = nib.load(sampled / f"{name}_mask.nii.gz")
    assert (np.asarray(stored.dataobj) == labels).all()
    assert nib.load(sampled / f"{name}_output_ens.nii.gz").shape == (height, width, 1, 3)
    assert not list(sampled.glob("*_output_ens.png"))

    row = read_csv(sampled / "predictions.csv")[0]
    assert list(row)[2:6] == ["area", "area_1", "area_2", "area_4"]
    assert [int(row[f"area_{k}"]) for k in "124"] == [int((labels == k).sum()) for k in (1, 2, 4)]
    assert int(row["area"]) == (labels > 0).sum()
    assert recorded_classes(sampled) == classes_of("1,2,4")


def test_sampled_classes_are_scored_without_a_flag(sampled: Path, brats: Path) -> None:
    said = succeeded(
        script("segmentation_env", "--inp_pth", sampled, "--out_pth", brats / "testing")
    )
    assert "Dice, mean of classes" in said and "IoU of 4" in said
    summary = json.loads((sampled / "summary.json").read_text())
    assert list(summary["classes"]) == ["1", "2", "4"]
    parts = [part["dice"] for part in summary["classes"].values()]
    assert summary["dice"] == pytest.approx(np.mean(parts))
    table = read_csv(sampled / "scores.csv")
    assert [row["class"] for row in table[:4]] == ["1", "2", "4", "1"]
    assert len(table) == 3 * summary["cases"]
    assert [row["class"] for row in read_csv(sampled / "patients.csv")[:3]] == ["1", "2", "4"]


def test_the_first_process_alone_writes_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = classes_of("1,2,4")
    monkeypatch.setenv("RANK", "1")
    note_classes(tmp_path, classes)
    assert not contents(tmp_path)
    monkeypatch.setenv("RANK", "0")
    note_classes(tmp_path, classes)
    assert recorded_classes(tmp_path) == classes


def test_a_checkpoint_knows_its_classes(model: Path, brats: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(model, steps=2, sampler="ddim", num_ensemble=2)
    result = segmenter(torch.rand(4, 20, 24), "a")
    assert result.members.shape == (2, 3, 20, 24) and result.fused.shape == (3, 20, 24)
    assert result.uncertainty.shape == (3, 20, 24) and result.labels.shape == (20, 24)
    assert result.classes == classes_of("1,2,4")
    assert Segmenter.load(model, mask_labels=" 1, 2,4").classes == result.classes
    with pytest.raises(UserError, match=r"mask_labels.*WT,TC,ET.*1,2,4"):
        Segmenter.load(model, mask_labels="WT,TC,ET")

    data = ["--data_dir", brats / "training", "--out_dir", tmp_path]
    resume = ["--resume_checkpoint", model, "--mask_labels", "1,2", "--max_steps", 3]
    error = refused(script("segmentation_train", *data, *TRAIN, *resume))
    assert re.search("mask_labels.*1,2.*1,2,4", error)


def test_a_model_of_one_class_is_no_model_of_three(trained: Path) -> None:
    with pytest.raises(UserError, match=r"mask_labels.*1,2,4"):
        Segmenter.load(trained, mask_labels="1,2,4")
    segmenter = Segmenter.load(trained, steps=2, sampler="ddim", num_ensemble=2)
    result = segmenter.segment([Case(torch.rand(4, 16, 16), None, "a")])[0]
    assert result.members.shape == (2, 16, 16) and result.classes is None


def test_results_of_other_classes_are_not_mixed(sampled: Path, trained: Path, brats: Path) -> None:
    before = contents(sampled)
    data = ["--data_dir", brats / "testing", "--out_dir", sampled, "--model_path", trained]
    error = refused(script("segmentation_sample", *data, *DRAW))
    assert "results of the classes 1,2,4" in error and contents(sampled) == before


def test_an_undeclared_label_ends_training(brats: Path, tmp_path: Path) -> None:
    data = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--mask_labels", "1,4"]
    error = refused(script("segmentation_train", *data, *TRAIN, "--max_steps", 2))
    assert "label 2, which no class declares" in error and "_seg_" in error


def test_volumes_of_regions(tmp_path: Path) -> None:
    write_volumes(tmp_path / "data")
    data = ["--data_dir", tmp_path / "data", "--cache_dir", "none"]
    flags = ["--mask_labels", "wt,tc,et", "--max_steps", 1, "--learn_sigma", "True"]
    run, out = tmp_path / "run", tmp_path / "out"
    succeeded(script("segmentation_train", *data, "--out_dir", run, *TRAIN, *flags))
    model = ["--model_path", run, "--out_dir", out]
    succeeded(script("segmentation_sample", *data, *model, *DRAW))

    soft, mask = nib.load(out / "p1_output_ens.nii.gz"), nib.load(out / "p1_mask.nii.gz")
    assert soft.shape == (6, 8, 5, 3) and mask.shape == (6, 8, 5)
    assert nib.load(out / "p1_uncertainty.nii.gz").shape == (6, 8, 5)
    assert (mask.affine == AFFINE).all() and mask.get_data_dtype() == np.uint8
    values = np.moveaxis(np.asarray(soft.dataobj), -1, 0)
    expected = classes_of("WT,TC,ET").label_map(values)
    assert (np.asarray(mask.dataobj) == expected).all()
    summary = evaluate_all(out, tmp_path / "data").summary
    assert list(summary["classes"]) == ["WT", "TC", "ET"] and summary["patients"] == 2


# --------------------------------------------------------------------------- scores by hand


def predicted(folder: Path, case: str, soft: dict[str, np.ndarray]) -> None:
    for name, values in soft.items():
        save(folder / f"{case}_output_ens_{name}.png", values.astype(np.uint8))


def square(columns: slice, level: int) -> np.ndarray:
    values = np.zeros((8, 8))
    values[:, columns] = level
    return values


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """Truth: label 1 in columns 0 to 3, 2 in 4 to 5 of case a; nothing in case b."""
    truth = (square(slice(4), 1) + square(slice(4, 6), 2)).astype(np.uint8)
    save(tmp_path / "truth" / "a_mask.png", truth)
    save(tmp_path / "truth" / "b_mask.png", np.zeros((8, 8), np.uint8))
    # class 2 reaches into columns 3 and 4 of class 1's claim, likelier in 4 only
    one = square(slice(5), 200)
    two = square(slice(3, 6), 150) + square(slice(4, 6), 90)
    predicted(tmp_path / "pred", "a", {"1": one, "2": two})
    predicted(tmp_path / "pred", "b", {"1": one * 0, "2": square(slice(1), 255)})
    (tmp_path / "pred" / "classes.json").write_text(record_text(classes_of("1,2")))
    return tmp_path


def test_scores_of_classes_by_hand(by_hand: Path) -> None:
    summary = evaluate_all(by_hand / "pred", by_hand / "truth").summary
    one, two = summary["classes"]["1"], summary["classes"]["2"]
    assert (one["dice"], one["dice_lesion"], one["iou"]) == (1, 1, 1)
    assert (two["dice"], two["dice_lesion"], two["iou_lesion"]) == (0.5, 1, 1)
    assert (summary["dice"], summary["dice_lesion"], summary["iou"]) == (0.75, 1, 0.75)
    assert (summary["cases"], summary["empty_truth"], summary["empty_prediction"]) == (2, 1, 0)
    assert (one["empty_both"], two["empty_truth"], two["empty_prediction"]) == (1, 1, 0)
    table = read_csv(by_hand / "pred" / "scores.csv")
    assert [(row["name"], row["class"], row["tp"], row["fp"]) for row in table] == [
        ("a", "1", "32", "0"),
        ("a", "2", "16", "0"),
        ("b", "1", "0", "0"),
        ("b", "2", "0", "8"),
    ]
    lines = summary_text(summary).splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("Dice of")] == [
        ["1.0000", "1.0000"],
        ["0.5000", "1.0000"],
    ]
    assert not (by_hand / "pred" / "patients.csv").exists()


def test_overlapping_regions_are_scored_by_one_half(by_hand: Path) -> None:
    summary = evaluate_all(by_hand / "pred", by_hand / "truth", mask_labels="1=1+2,2=2").summary
    one, two = (summary["classes"][name]["dice_lesion"] for name in "12")
    assert one == pytest.approx(2 * 40 / (40 + 48)) and two == pytest.approx(2 * 16 / (24 + 16))


def test_scoring_names_what_is_missing(by_hand: Path) -> None:
    with pytest.raises(UserError, match=r"files named <case>_output_ens_3\.png"):
        evaluate_all(by_hand / "pred", by_hand / "truth", mask_labels="1,2,3")
    with pytest.raises(UserError, match=r"a_mask\.png: has label 2, which no class declares"):
        evaluate_all(by_hand / "pred", by_hand / "truth", mask_labels="1")
    save(by_hand / "pred" / "a_output_ens_2.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"a_output_ens_2\.png: .*4 x 4"):
        evaluate_all(by_hand / "pred", by_hand / "truth")
    (by_hand / "pred" / "b_output_ens_2.png").unlink()
    with pytest.raises(UserError, match="other cases of class 2 than of class 1"):
        evaluate_all(by_hand / "pred", by_hand / "truth", partial=True)
    (by_hand / "pred" / "classes.json").write_text("{")
    with pytest.raises(UserError, match=r"classes\.json: is damaged \(it is not JSON"):
        evaluate_all(by_hand / "pred", by_hand / "truth")
