"""Volumes decoded once, put together again, and scored by patient."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from brats_folders import (
    AFFINE,
    DEPTH,
    LONG,
    SIZE,
    save,
    solid,
    volume,
    watch,
    write_slice,
    write_volumes,
)
from torch.utils.data import DataLoader

from guided_diffusion.bratsloader import BRATSDataset3D
from guided_diffusion.data.batches import collate
from guided_diffusion.data.datasets import Entry, Reading
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.data.intensity import measure, normalised
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.volume_writer import VolumeWriter
from guided_diffusion.layouts import open_masks
from guided_diffusion.schedule import CLEAN
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.evaluate import evaluate
from guided_diffusion.scoring.patients import score_patients, summarise_patients
from guided_diffusion.scoring.summary import summary_text

# --------------------------------------------------------------------------- decoded once, bounded


def read_all(dataset: BRATSDataset3D) -> list[torch.Tensor]:
    return [dataset[index].image for index in range(len(dataset))]


def test_a_volume_is_unpacked_once_for_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, reading = write_volumes(tmp_path / "data"), Reading(cache_dir=tmp_path / "cache")
    decoded = watch(monkeypatch)
    first = read_all(BRATSDataset3D(data, reading=reading))
    assert len(decoded) == 2 * 5
    second = read_all(BRATSDataset3D(data, reading=reading))
    assert len(decoded) == 2 * 5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert BRATSDataset3D(data, reading=reading).notes == [
        f"volumes are unpacked once, into {tmp_path / 'cache'}"
    ]


@pytest.mark.parametrize("kept", ["memory", "disk"])
@pytest.mark.parametrize("end", ["gz", "nii"])
def test_a_source_that_changes_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, end: str
) -> None:
    data = write_volumes(tmp_path / "data", ("a",), end=end)
    cache = tmp_path / "cache" if kept == "disk" else None
    dataset = BRATSDataset3D(data, reading=Reading(normalise="minmax", cache_dir=cache))
    before = dataset[2].image
    decoded = watch(monkeypatch)
    path = next(data.rglob("a_t2.*"))
    save(path, solid("t2")[::-1].copy())
    os.utime(path, ns=(1, 1))

    after = dataset[2].image

    assert decoded == [path.name]
    assert torch.equal(after[2], before[2].flip(0)) and torch.equal(after[1], before[1])


@pytest.mark.parametrize("damage", ["facts", "voxels", "half a fact"])
def test_a_cache_that_is_damaged_is_made_again(tmp_path: Path, damage: str) -> None:
    data, reading = write_volumes(tmp_path / "data"), Reading(cache_dir=tmp_path / "cache")
    expected = read_all(BRATSDataset3D(data, reading=reading))
    for path in (tmp_path / "cache").glob("*.nii" if damage == "voxels" else "*.json"):
        path.write_text('{"stamp": [') if damage == "half a fact" else path.unlink()
    again = read_all(BRATSDataset3D(data, reading=reading))
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert not list((tmp_path / "cache").glob(".*"))


def test_memory_is_bounded_and_a_process_starts_empty(tmp_path: Path) -> None:
    dataset = BRATSDataset3D(write_volumes(tmp_path, tuple("abcdef")))
    dataset.store.most_bytes = 3 * solid("t1").size * 4
    images = read_all(dataset)
    assert 0 < dataset.store._bytes() <= dataset.store.most_bytes
    twin = pickle.loads(pickle.dumps(dataset))
    assert not twin.store._open and torch.equal(twin[7].image, images[7])


def test_reading_processes_share_the_cache(tmp_path: Path) -> None:
    data, reading = write_volumes(tmp_path / "data"), Reading(cache_dir=tmp_path / "cache")
    loader = DataLoader(
        ResizedDataset(BRATSDataset3D(data, reading=reading), Frame(8)),
        batch_size=5,
        num_workers=2,
        collate_fn=collate,
    )
    expected = ResizedDataset(BRATSDataset3D(data), Frame(8))
    batches = list(loader)
    assert torch.equal(batches[1].image[3], expected[8].image)
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 10


# -------------------------------------------------------------------------------------- restacking


class Painter:
    """Draws what is in the image: the plan and the masks of a segmenter, without a network."""

    classes = None
    frame = Frame(8)
    plan = SamplingPlan("ddpm", (CLEAN, CLEAN), batch_size=4, num_ensemble=2)
    others, evaluations = (), 0

    def segment(self, cases: list, note: object = None) -> list:
        results = []
        for case in cases:
            fused = case.image[0].clamp(0, 1)
            results.append(
                Segmentation(torch.stack([fused, 1 - fused]), fused, (fused - 0.5).abs())
            )
        return results


def expected_soft(case: int = 0) -> np.ndarray:
    values = solid("t1", case).astype(np.float32)
    return normalised(values, measure(values), "minmax").clip(0, 1)


def test_a_sampled_volume_comes_back_on_its_own_grid(tmp_path: Path, quiet: None) -> None:
    data = write_volumes(tmp_path / "data")
    for case in ("p1", "p2"):
        for path in (data / case).glob("*.nii.gz"):
            values, old = volume(path)
            image = nib.Nifti1Image(values, AFFINE, old.header)
            image.set_qform(AFFINE, 1)
            image.set_sform(AFFINE, 4)
            image.header.set_xyzt_units("mm")
            nib.save(image, path)
    dataset = BRATSDataset3D(data)

    segment(Painter(), dataset, tmp_path / "out", fingerprint="f")

    for number, case in enumerate(("p1", "p2")):
        soft, nifti = volume(tmp_path / f"out/{case}_output_ens.nii.gz")
        mask, mask_nifti = volume(tmp_path / f"out/{case}_mask.nii.gz")
        unsure, _ = volume(tmp_path / f"out/{case}_uncertainty.nii.gz")
        np.testing.assert_array_equal(soft, expected_soft(number))
        np.testing.assert_array_equal(mask, expected_soft(number) >= 0.5)
        np.testing.assert_array_equal(unsure, np.abs(expected_soft(number) - np.float32(0.5)))
        assert mask.dtype == np.uint8 and soft.dtype == unsure.dtype == np.float32
        for image in (nifti, mask_nifti):
            np.testing.assert_array_equal(image.affine, AFFINE)
            assert image.header.get_zooms() == (1, 2, 3)
            assert int(image.header["sform_code"]) == 4 and int(image.header["qform_code"]) == 1
            assert image.header.get_xyzt_units()[0] == "mm"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "p1_slice002_mask.png" in names and "p1_slice002_mask.nii.gz" not in names
    assert ".slices" not in names


def test_slices_not_sampled_are_zero_and_later_ones_are_added(tmp_path: Path, quiet: None) -> None:
    data, out = write_volumes(tmp_path / "data"), tmp_path / "out"
    middle = BRATSDataset3D(data, reading=Reading(slices=(2, 3)))
    segment(Painter(), middle, out, fingerprint="f")
    soft, _ = volume(out / "p1_output_ens.nii.gz")
    np.testing.assert_array_equal(soft[..., 2], expected_soft()[..., 2])
    assert soft.shape == (*SIZE, DEPTH) and not soft[..., [0, 1, 3, 4]].any()

    segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")
    np.testing.assert_array_equal(volume(out / "p1_output_ens.nii.gz")[0], expected_soft())

    segment(Painter(), middle, out, fingerprint="other settings")
    assert not volume(out / "p1_output_ens.nii.gz")[0][..., [0, 1, 3, 4]].any()


@pytest.mark.parametrize("fatal", (1, 5, 6, 7, 8, 11))
def test_a_run_that_is_killed_anywhere_loses_no_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None, fatal: int
) -> None:
    data, out = write_volumes(tmp_path / "data"), tmp_path / "out"
    left = iter(range(fatal))

    def dying(function: Callable) -> Callable:
        def step(*arguments: object) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*arguments)

        return step

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VolumeWriter, "keep", dying(VolumeWriter.keep))
        patch.setattr(VolumeWriter, "_write_kind", dying(VolumeWriter._write_kind))
        segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")
    segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")

    for number, case in enumerate(("p1", "p2")):
        soft, _ = volume(out / f"{case}_output_ens.nii.gz")
        np.testing.assert_array_equal(soft, expected_soft(number))
    assert not (out / ".slices").exists()


def test_a_volume_that_was_removed_is_drawn_again(tmp_path: Path, quiet: None) -> None:
    data, out = write_volumes(tmp_path / "data"), tmp_path / "out"
    segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")
    (out / "p2_mask.nii.gz").unlink()
    segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")
    np.testing.assert_array_equal(volume(out / "p2_mask.nii.gz")[0], expected_soft(1) >= 0.5)


def test_stacks_of_several_channels(tmp_path: Path) -> None:
    source = save(tmp_path / "a_t1.nii.gz", solid("t1"))
    entries = [Entry(f"a_slice{z:03d}", (source,), None, z) for z in range(DEPTH)]
    planes = np.random.default_rng(0).random((DEPTH, 3, *SIZE)).astype(np.float32)
    stacks = VolumeWriter(tmp_path, "f", entries)
    stacks.expect(entries)
    for entry, plane in zip(entries, planes, strict=True):
        stacks.keep(entry, {"output_ens": plane, "mask": plane[0], "uncertainty": plane})
    stacks.write()
    soft, _ = volume(tmp_path / "a_output_ens.nii.gz")
    np.testing.assert_array_equal(soft, planes.transpose(2, 3, 0, 1))


# ---------------------------------------------------------------------------------------- patients


def test_patients_are_pooled_by_hand() -> None:
    counts = {
        "1": metrics.Confusion(3, 1, 0, 12),
        "2": metrics.Confusion(0, 0, 4, 12),
        "3": metrics.Confusion(0, 0, 0, 16),
        "4": metrics.Confusion(5, 5, 5, 5),
    }
    scores = score_patients(counts, {"1": "b", "2": "b", "3": "a", "4": ""})
    assert [score.patient for score in scores] == ["a", "b"]
    assert scores[0][:8] == ("a", 1, 1.0, 1.0, 0, 0, 0, 16)
    assert scores[1][:8] == ("b", 2, pytest.approx(6 / 11), pytest.approx(3 / 8), 3, 1, 4, 24)
    assert summarise_patients(scores) == {
        "patients": 2,
        "dice_patient": pytest.approx((1 + 6 / 11) / 2),
    }
    assert scores[1][8:12] == pytest.approx((3 / 4, 3 / 7, 24 / 25, -3 / 7))
    assert scores[1][12:] == (None, None, None)
    assert summarise_patients([]) == {"patients": None, "dice_patient": None}


def test_scoring_says_dice_per_patient(tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "out"
    out.mkdir()
    for number, (patient, hit) in enumerate([("001", True), ("001", False), ("002", True)]):
        write_slice(tmp_path / f"data/{number}", LONG.replace("001", patient))
        drawn = np.zeros(SIZE, np.uint8)
        drawn[1, 2] = 255 * hit
        drawn[0, 0] = 255 * (number == 0)
        Image.fromarray(drawn).save(out / f"{number}_output_ens.png")

    summary = evaluate(out, tmp_path / "data")

    assert (summary["patients"], summary["dice_patient"]) == (2, pytest.approx((1 / 2 + 1) / 2))
    assert summary["dice"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert json.loads((out / "summary.json").read_text())["patients"] == 2
    assert "Dice of 2 patients" in summary_text(summary) and "0.7500" in summary_text(summary)
    with (out / "patients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["patient"], row["cases"], row["fn"]) for row in rows] == [
        ("001", "2", "1"),
        ("002", "1", "0"),
    ]


def test_volumes_are_scored_slice_by_slice_and_by_case(tmp_path: Path, quiet: None) -> None:
    data, out = write_volumes(tmp_path / "data"), tmp_path / "out"
    segment(Painter(), BRATSDataset3D(data), out, fingerprint="f")
    assert len(open_masks(data)) == 10
    summary = evaluate(out, data)
    assert (summary["cases"], summary["patients"]) == (10, 2)
