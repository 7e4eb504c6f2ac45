"""Slicing volumes: equal slices, division by patient, continued runs, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from brats_folders import (
    watch,
    write_volumes,
)
from helpers import contents, refused, script, succeeded
from spatial import SHAPE, bare, head, lesion, put, stored
from torch.testing import assert_close

from guided_diffusion.bratsloader import BRATSDataset, BRATSDataset3D
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.geometry import PLANES
from guided_diffusion.data.splits import part_of_cases
from guided_diffusion.tools import slices


def slicer(src: Path, out: Path, *more: object) -> object:
    return script("brats_slices", "--src", src, "--out", out, "--workers", 1, *more)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_slices_equal_the_volumes_slices(tmp_path: Path, dtype: str) -> None:
    cases = ("BraTS20_Training_003", "x y", "BraTS20_Training_001", "z")
    data = write_volumes(tmp_path / "data", cases)
    succeeded(slicer(data, tmp_path / "out", "--slices", "1:4", "--dtype", dtype, "--train", 0.5))

    lines = (tmp_path / "out/split.txt").read_text().splitlines()[2:]
    patients = [line.partition("# ")[2] for line in lines]
    parts = [line.split()[1] for line in lines]
    assert patients == sorted(cases) and sorted(parts) == ["testing"] * 2 + ["training"] * 2
    whole = BRATSDataset3D(data)
    for part in ("training", "testing"):
        cut = BRATSDataset(tmp_path / "out" / part)
        assert len(cut) == 6
        for entry, case in zip(cut.entries, cut, strict=True):
            number = int(entry.patient) - 1
            assert parts[number] == part
            plane = int(entry.images[0].name.split("_")[4])
            name = f"{patients[number]}_slice{plane:03d}"
            original = whole[whole.names.index(name)]
            assert_close(case.image, original.image, rtol=0, atol=0.501 / 255)
            assert torch.equal(case.mask, original.mask)
            np.testing.assert_array_equal(case.affine, original.affine)
            labels = np.asarray(nib.load(entry.mask).dataobj)
            assert labels.dtype == np.uint8 and labels[1, 2] == [0, 1, 2, 4][plane]


def test_slicing_continues_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, flags = write_volumes(tmp_path / "data", tuple("abc")), ("--slices", ":")
    succeeded(slicer(data, tmp_path / "expected", *flags))
    saved, real = [], slices._save

    def dying(*arguments: object) -> None:
        saved.append(1)
        if len(saved) == 38:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(slices, "_save", dying)
    assert slicer(data, tmp_path / "out", *flags).code == 130
    done = sorted((tmp_path / "out").glob("t*/*"))
    assert len(done) == 7 and all(len(list(folder.iterdir())) == 5 for folder in done)
    (done[0].parent / ".part-000099-1").mkdir()

    text = succeeded(slicer(data, tmp_path / "out", *flags))

    assert "8 slices of 3 volumes written, 7 were there" in text
    assert sorted(contents(tmp_path / "out")) == sorted(contents(tmp_path / "expected"))
    assert len(saved) == 38 + 8 * 5


def test_finished_volumes_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_volumes(tmp_path / "data")
    succeeded(slicer(data, tmp_path / "out", "--slices", ":"))
    decoded = watch(monkeypatch)
    succeeded(slicer(data, tmp_path / "out", "--slices", ":"))
    assert decoded == []


def test_an_existing_split_is_followed(tmp_path: Path) -> None:
    data, out = write_volumes(tmp_path / "data", tuple("abc")), tmp_path / "out"
    out.mkdir()
    (out / "split.txt").write_text("c testing\na testing\nb training\n")
    succeeded(slicer(data, out, "--slices", "2:3", "--train", 1.0))
    assert BRATSDataset(out / "testing").patients == ["001", "002"]
    assert BRATSDataset(out / "training").patients == ["003"]
    assert part_of_cases(BRATSDataset(out), out / "split.txt") == ["testing"] * 2 + ["training"]

    (data / "b").rename(data / "d")
    assert "has no line for patient d. Add a line" in refused(slicer(data, out, "--slices", "2:3"))
    (out / "split.txt").write_text("c nowhere\n")
    assert "line 1: 'c nowhere' is not" in refused(slicer(data, out, "--slices", "2:3"))


def test_the_split_fits_the_slices(tmp_path: Path) -> None:
    data, out = write_volumes(tmp_path / "data", tuple("abc")), tmp_path / "out"
    flags = ("--slices", "1:3", "--train", 0.6)
    succeeded(slicer(data, out, *flags))
    split = out / "split.txt"
    said = succeeded(script("check_data", "--data_dir", out, "--split", split))
    assert "split      training (4), testing (2)" in said
    dataset = BRATSDataset(out)
    assert part_of_cases(dataset, split) == [name.partition("_")[0] for name in dataset.names]

    before = split.read_text("utf-8")
    succeeded(slicer(data, out, *flags))
    assert split.read_text("utf-8") == before


def test_a_split_that_names_volumes_gets_the_numbers_of_their_slices(tmp_path: Path) -> None:
    """Users and earlier versions write such lines, and patients may be added."""
    data, out = write_volumes(tmp_path / "data", ("a", "x y", "001")), tmp_path / "out"
    out.mkdir()
    split, flags = out / "split.txt", ("--slices", "2:3")
    split.write_text("# mine\nx y testing # why\n\n001\ttraining\na training\n")
    succeeded(slicer(data, out, *flags))
    head, *rows = split.read_text("utf-8").splitlines()
    assert rows == [
        *("# mine", "001 testing  # x y # why", "", "002 training  # 001", "003 training  # a")
    ]

    write_volumes(data, ("001b",))
    before = contents(out)
    assert "has no line for patient 001b. Add a line" in refused(slicer(data, out, *flags))
    split.write_text("\n".join([head, *rows[:0:-1], "a training"]), encoding="utf-8")
    assert "patient a has two lines. Remove one" in refused(slicer(data, out, *flags))
    split.write_text("\n".join([head, *rows[:0:-1], "001b testing"]), encoding="utf-8")
    succeeded(slicer(data, out, *flags))
    assert split.read_text("utf-8").splitlines() == [head, *rows[:0:-1], "004 testing  # 001b"]
    after = contents(out)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"split.txt", "volumes.json", "config.yaml"}
    assert BRATSDataset(out / "testing").patients == ["001", "004"]


def test_the_division_depends_on_the_seed_alone() -> None:
    patients = [f"p{number}" for number in range(10)]
    first = slices.divide(patients, train=0.8, seed=1)
    assert sum(side == "training" for side in first.values()) == 8
    assert first == slices.divide(patients, train=0.8, seed=1)
    assert first != slices.divide(patients, train=0.8, seed=2)


def test_worker_processes_name_the_volume(tmp_path: Path) -> None:
    data = write_volumes(tmp_path / "data", tuple("abc"))
    flags = ("--slices", "1:3", "--workers", 2)
    assert "6 slices of 3 volumes written" in succeeded(slicer(data, tmp_path / "out", *flags))
    path = data / "b/b_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:90])
    assert f"error: {path}: cannot be read" in refused(slicer(data, tmp_path / "new", *flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--normalise", "zscore"), r"--dtype: uint8 needs values in \[0, 1\], .* not zscore"),
        (("--train", 2), r"--train 2\.0: must be between 0 and 1"),
        (("--slices", "9:12"), "--slices: 9:12 selects none of the 5 slices"),
        (("--slices", "x"), "--slices.*'x'"),
        (("--modalities", "dwi"), "does not have dwi"),
    ],
)
def test_slicing_refuses(tmp_path: Path, flags: tuple, words: str) -> None:
    run = slicer(write_volumes(tmp_path / "data"), tmp_path / "out", *flags)
    assert re.search(words, refused(run))


def test_slicing_refuses_other_settings_and_slices(tmp_path: Path) -> None:
    data, out = write_volumes(tmp_path / "data"), tmp_path / "out"
    succeeded(slicer(data, out, "--slices", "1:3"))
    assert "cut with other settings (slices 1:3" in refused(slicer(data, out, "--slices", "1:4"))
    assert "two-dimensional slices" in refused(slicer(out / "training", tmp_path / "new"))


def test_volumes_may_be_added_but_not_changed(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_volumes(data, ("BraTS-GLI-00001-000", "BraTS-GLI-00002-000"))
    flags = ("--slices", "1:3", "--train", 1)
    succeeded(slicer(data, out, *flags))
    before = contents(out / "training")

    write_volumes(data, ("BraTS-GLI-00001-001",))
    text = succeeded(slicer(data, out, *flags))
    assert "2 slices of 3 volumes written, 4 were there" in text
    after = contents(out / "training")
    assert before.items() <= after.items()
    assert len(BRATSDataset(out / "training")) == 6

    assert "train 0.5" in refused(slicer(data, out, "--slices", "1:3", "--train", 0.5))
    seg = next((data / "BraTS-GLI-00002-000").glob("*seg*"))
    seg.touch()
    assert "changed since" in refused(slicer(data, out, *flags))
    assert contents(out / "training") == after


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", ""])
def test_slices_of_any_plane_are_read_as_those_of_the_volume(
    tmp_path: Path, codes: str, plane: str
) -> None:
    for name in ("flair", "t1", "seg"):
        values = lesion() if name == "seg" else head()
        put(tmp_path / f"data/p/p_{name}.nii.gz", stored(values, codes) if codes else bare(values))
    flags = ("--slices", ":", "--dtype", "float32", "--plane", plane)
    succeeded(slicer(tmp_path / "data", tmp_path / "out", *flags, "--train", 1))
    cut = BRATSDataset(tmp_path / "out/training")
    whole = BRATSDataset3D(tmp_path / "data", reading=Reading(plane=plane))
    assert len(cut) == len(whole) == SHAPE[PLANES.index(plane)]
    for one, other in zip(cut, whole, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    assert any("orientation" in note for note in cut.notes) == (not codes)

    other = "axial" if plane != "axial" else "coronal"
    again = slicer(tmp_path / "data", tmp_path / "out", *flags[:-1], other, "--train", 1)
    assert "the slices were cut with other settings" in refused(again)
