"""The check of a folder: facts, all problems at once, contact sheet; the loader in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, refused, script, succeeded
from PIL import Image

from guided_diffusion.layouts import LAYOUTS, open_dataset
from guided_diffusion.options.network import NetworkOptions
from guided_diffusion.options.tools import CheckOptions
from guided_diffusion.report.canvas import TRUTH
from guided_diffusion.report.pictures import Tile, contact_sheet
from guided_diffusion.tools.inspect import _fractions


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write(folder: Path, stem: str, *, side: int = 10, seed: int | None = None) -> None:
    """A picture of 40 x 60 whose mask is a square."""
    number = sum(map(ord, stem)) if seed is None else seed
    save(
        folder / f"images/{stem}.png",
        np.random.default_rng(number).integers(10, 201, (40, 60, 3), np.uint8),
    )
    mask = np.zeros((40, 60), np.uint8)
    mask[5 : 5 + side, 5 : 5 + side] = 255
    save(folder / f"masks/{stem}.png", mask)


def test_the_foreground_is_counted_beyond_what_float32_can_tell_apart() -> None:
    mask = torch.ones(1, 4097, 4097, dtype=torch.bool)
    mask[0, 0, 0] = False
    (share,) = _fractions(mask)
    assert 1 - share == pytest.approx(1 / 4097**2, rel=1e-6)
    assert _fractions(torch.tensor([[[0.0, 1.0]]])) == (0.5,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for stem in "abcdef":
        write(tmp_path / "set", stem)
    write(tmp_path / "set", "g", side=0)
    write(tmp_path / "set", "h", side=1)
    write(tmp_path / "set", "same", seed=ord("a"))
    return tmp_path / "set"


def fact(said: str, name: str) -> str:
    """The text of a named fact, with the unnamed lines that follow."""
    return re.search(rf"^{name} +(.*(?:\n {{11}}.*)*)", said, re.MULTILINE)[1]


def test_the_facts_of_a_folder(folder: Path, tmp_path: Path) -> None:
    said = succeeded(script("check_data", "--data_dir", folder, "--image_size", 16))

    assert fact(said, "folder") == str(folder) and fact(said, "layout") == "CUSTOM"
    assert fact(said, "cases") == "9, of which 9 can be used"
    assert fact(said, "patients") == "unknown" and fact(said, "channels") == "3"
    assert fact(said, "sizes") == "40 x 60 (9)"
    assert fact(said, "network") == "16 x 16 (9), 9 of them resized"
    assert "channel 0: 0.03922 to 0.7843; highest" in fact(said, "values")
    assert fact(said, "labels") == "0, 255"
    masks = fact(said, "masks")
    assert masks.startswith("9, of which 1 empty (g)")
    assert "foreground: in 8 cases, 0.0417 to 4.17, median 4.17 % of the image" in masks
    assert "1 vanish at the network's size (h)" in masks
    assert fact(said, "twice") == "1 image under several ids: a = same"
    assert "nothing that training would fail on\nnext: " in said


def test_patients_volumes_and_labels(tmp_path: Path) -> None:
    for case in ("p1", "p2"):
        for name in ("t1", "flair", "seg"):
            values = np.zeros((8, 8, 3), np.float32)
            values[2, 2, 1] = 4 if name == "seg" else 30
            (tmp_path / case).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / case / f"{case}_{name}.nii.gz")
    said = succeeded(script("check_data", "--data_dir", tmp_path, "--cache_dir", "none"))
    assert fact(said, "layout") == "BRATS, 2 volumes by axial slices"
    assert fact(said, "patients") == "2" and fact(said, "channels") == "2 (t1, flair)"
    assert fact(said, "labels") == "0, 4"
    assert "t1: 0 to 1; highest of a case 0 to 1, median 0; 4 cases of one value" in said


def test_every_problem_is_listed(folder: Path) -> None:
    for stem in [*"abcdefg", "same"]:
        (folder / f"masks/{stem}.png").unlink()
    write(folder, "bad")
    (folder / "images/bad.png").write_bytes(b"")
    write(folder, "size")
    save(folder / "masks/size.png", np.zeros((9, 9), np.uint8))
    split = folder / "split.txt"
    split.write_text("h training\nnobody testing\n")

    run = script("check_data", "--data_dir", folder, "--split", split)

    assert run.code == 2 and run.err == ""
    problems = run.out.split("training would fail:\n")[1].splitlines()
    assert len(problems) == 12
    assert "set: has 8 stems without mask: a, b, c, d, e and 3 more" in problems[0]
    assert problems[1:9] == [f"    {stem}" for stem in [*"abcdefg", "same"]]
    assert "has no case or patient nobody; its ids are such as" in problems[9]
    bad = f"  bad: {folder}/images/bad.png: cannot be read as a picture"
    assert problems[10].startswith(bad)
    assert problems[11].startswith(f"  size: {folder}/masks/size.png: the mask is 9 x 9, but")
    assert fact(run.out, "split") == "in no part (2), training (1)"


def test_incomplete_slices_are_all_listed(brats: Path, tmp_path: Path) -> None:
    for case in sorted((brats / "training").iterdir()):
        (tmp_path / case.name).mkdir()
        for path in case.iterdir():
            if "_t2_" not in path.name or case.name == "000001":
                (tmp_path / case.name / path.name).symlink_to(path)
    run = script("check_data", "--data_dir", tmp_path)
    assert run.code == 2 and run.out.count("the case lacks t2") == 3
    assert fact(run.out, "cases") == "1, of which 1 can be used"


def test_broken_volumes_are_all_listed(tmp_path: Path) -> None:
    for case in "abc":
        for side in ("images", "masks"):
            (tmp_path / side).mkdir(exist_ok=True)
            volume = nib.Nifti1Image(np.ones((8, 8, 2), np.uint8), np.eye(4))
            nib.save(volume, tmp_path / f"{side}/{case}.nii.gz")
    for case in "bc":
        path = tmp_path / f"images/{case}.nii.gz"
        path.write_bytes(path.read_bytes()[:30])
    run = script("check_data", "--data_dir", tmp_path, "--cache_dir", "none")
    problems = run.out.split("training would fail:\n")[1].splitlines()
    assert run.code == 2 and [Path(p.split(":")[0]).name for p in problems] == [
        "b.nii.gz",
        "c.nii.gz",
    ]


def test_an_error_of_a_volume_or_of_the_set_is_told_once(tmp_path: Path) -> None:
    for case in "ab":
        for side, depth in (("images", 40), ("masks", 40 if case == "a" else 39)):
            (tmp_path / side).mkdir(exist_ok=True)
            volume = nib.Nifti1Image(np.ones((8, 8, depth), np.uint8), np.eye(4))
            nib.save(volume, tmp_path / f"{side}/{case}.nii.gz")
    run = script("check_data", "--data_dir", tmp_path, "--cache_dir", "none")
    (line,) = run.out.split("training would fail:\n")[1].splitlines()
    assert line.startswith(f"  b, 40 slices: {tmp_path}/masks/b.nii.gz: its grid is 8 x 8 x 39")
    for case in "ab":
        values = np.random.default_rng(0).normal(size=(8, 8, 40)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"masks/{case}.nii.gz")
    run = script("check_data", "--data_dir", tmp_path, "--cache_dir", "none")
    (line,) = run.out.split("training would fail:\n")[1].splitlines()
    assert line.startswith("  80 cases (a_slice000, a_slice001, a_slice002 and 77 more): ")
    assert "masks/a.nii.gz: holds -" in line and "neither labels" in line


def test_the_size_is_that_of_training() -> None:
    assert CheckOptions().image_size == NetworkOptions().image_size


def test_an_empty_folder(tmp_path: Path) -> None:
    run = script("check_data", "--data_dir", tmp_path)
    assert run.code == 2 and "\ntraining would fail:\n" in run.out
    assert f"{tmp_path}: holds nothing" in run.out
    assert "--data_nam " in refused(script("check_data", "--data_nam ", "x"))


def test_worker_processes_find_the_same(folder: Path) -> None:
    one, two = (script("check_data", "--data_dir", folder, "--num_workers", n) for n in (0, 2))
    assert succeeded(one) == succeeded(two)


def test_a_folder_without_masks(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        path.unlink()
    assert script("check_data", "--data_dir", folder).code == 2
    said = succeeded(script("check_data", "--data_dir", folder, "--labelled", "False"))
    assert fact(said, "masks") == "none"


def test_the_contact_sheet(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    said = succeeded(script("check_data", "--data_dir", folder, "--out", out, "--cases", 7))
    assert f"7 cases drawn on {out}" in said
    with Image.open(out) as sheet:
        assert sheet.size == (2 * 20 + 6 * 220 + 5 * 12, 50 + 2 * (220 + 34))


def test_outlines_lie_on_the_border_of_the_mask() -> None:
    image, mask = np.full((1, 50, 100), 0.5), np.zeros((1, 50, 100))
    image[0, 0, 0] = 1
    mask[0, 10:40, 20:80] = 1
    page = contact_sheet([Tile(image, mask, "a"), Tile(image, None, "b")], title="t", panel=200)
    green = (np.abs(page.astype(int) - TRUTH) < 30).all(axis=-1)
    rows, columns = np.nonzero(green[50:250, 20:220])
    assert abs(rows.min() - 70) <= 2 and abs(rows.max() - 130) <= 2
    assert abs(columns.min() - 40) <= 2 and abs(columns.max() - 160) <= 2
    assert not green[:, 232:].any()
    with pytest.raises(ValueError, match="mask is"):
        contact_sheet([Tile(image, mask[:, 1:], "a")], title="t")


def test_a_split_is_used_in_training_and_sampling(
    folder: Path, tmp_path: Path, training_flags: list[object]
) -> None:
    split = tmp_path / "split.txt"
    split.write_text("".join(f"{s} training\n" for s in "abcd") + "e testing\nf testing\n")
    where = ["--data_dir", folder, "--split", split, "--out_dir", tmp_path / "run"]
    said = succeeded(script("segmentation_train", *where, *training_flags))
    assert "4 of 9 cases are for training; 3 cases in no part" in said
    assert "4 CUSTOM cases" in said

    model = ["--model_path", tmp_path / "run", "--steps", 2, "--num_ensemble", 1]
    said = succeeded(script("segmentation_sample", *where, *model))
    assert sorted(path.name[0] for path in (tmp_path / "run").glob("*_mask.png")) == ["e", "f"]


def test_augmented_training_runs_and_needs_no_record(
    folder: Path, tmp_path: Path, training_flags: list[object]
) -> None:
    where = ["--data_dir", folder, "--out_dir", tmp_path / "run"]
    succeeded(script("segmentation_train", *where, *training_flags, "--augment", "True"))
    resumed = [*where, *training_flags, "--resume", "auto", "--max_steps", 2]
    assert "resuming" in succeeded(script("segmentation_train", *resumed))


@pytest.fixture
def training_flags() -> list[object]:
    network = "--image_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1"
    return [*network.split(), "--attention_resolutions", 8, "--max_steps", 1, "--batch_size", 2]


# --------------------------------------------------------------------- the loader of the docs


def test_the_loader_in_the_docs_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training_flags: list[object]
) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    monkeypatch.setattr("guided_diffusion.layouts.LAYOUTS", LAYOUTS.copy())
    exec(compile(code, "docs/data.md", "exec"), {})

    (tmp_path / "arrays").mkdir()
    for name in ("anna_1", "anna_2", "ben_1"):
        values = np.zeros((2, 20, 20), np.float32)
        values[:, 4:9, 4:9] = 1
        np.save(tmp_path / f"arrays/{name}.npy", values)
    dataset = open_dataset(tmp_path / "arrays", data_name="arrays")
    assert (dataset.layout, dataset.channels) == ("ARRAYS", 1)
    assert dataset.names == ["anna_1", "anna_2", "ben_1"]
    assert dataset.patients == ["anna", "anna", "ben"]
    assert torch.equal(dataset[0].image, dataset[0].mask) and dataset[0].mask.sum() == 25

    (tmp_path / "split.txt").write_text("anna training\nben testing\n")
    where = ["--data_dir", tmp_path / "arrays", "--data_name", "ARRAYS"]
    where += ["--split", tmp_path / "split.txt", "--out_dir", tmp_path / "run"]
    said = succeeded(script("segmentation_train", *where, *training_flags))
    assert "2 ARRAYS cases, 1 channel, " in said
