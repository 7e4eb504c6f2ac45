"""Weights that come with the package: found by name, verified, and good for one's own pictures."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import contents, read_csv, refused, script, succeeded
from PIL import Image
from safetensors.torch import load_file

from guided_diffusion import Segmenter
from guided_diffusion.checkpoint import (
    LATEST,
    STARTERS,
    Checkpoint,
    export_weights,
    latest_checkpoint,
    load_checkpoint,
    starters,
)
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset
from guided_diffusion.scoring.metrics import confusion, dice
from guided_diffusion.tools.phantom_folders import write_isic
from guided_diffusion.tools.phantom_skin import make_skin
from guided_diffusion.training.validation import score_of

FILE = starters.FOLDER / "isic-small.safetensors"
KINDS = ("mask", "uncertainty", "output0", "output1")
QUICK = ("--steps", 1, "--num_ensemble", 2)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may lie in somebody's folder of pictures: sizes, endings and colours differ."""
    folder = tmp_path_factory.mktemp("own") / "my_pictures"
    folder.mkdir()
    for number, (ending, mode, size) in enumerate(
        (
            ("jpg", "RGB", (90, 60)),
            ("JPG", "L", (60, 90)),
            ("png", "RGBA", (64, 64)),
            ("jpeg", "CMYK", (33, 200)),
            ("png", "P", (100, 80)),
        )
    ):
        picture = Image.fromarray(make_skin(4, number, size=96).picture)
        picture.resize(size).convert(mode).save(folder / f"mole{number}.{ending}")
    return folder


@pytest.fixture(scope="module")
def drawn(pictures: Path) -> tuple[Path, str]:
    """Masks of these pictures, and what was said. Read only."""
    out = pictures.parent / "masks"
    flags = ("--model_path", "isic-small", "--data_dir", pictures, "--out_dir", out)
    return out, succeeded(script("segmentation_sample", *flags, *QUICK))


def test_the_file_is_small_and_its_card_names_its_checksum() -> None:
    assert FILE.stat().st_size <= 8_000_000
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert digest == STARTERS["isic-small"].sha256
    _, head, card = FILE.with_suffix(".md").read_text("utf-8").split("---\n", maxsplit=2)
    assert digest in card
    front = yaml.safe_load(head)
    assert front["license"] == "mit" and front["pipeline_tag"] == "image-segmentation"


def test_scores_of_the_card_are_those_of_its_front_matter() -> None:
    _, head, card = FILE.with_suffix(".md").read_text("utf-8").split("---\n", maxsplit=2)
    (model,) = yaml.safe_load(head)["model-index"]
    values = [metric["value"] for part in model["results"] for metric in part["metrics"]]
    assert values and all(f"{value:.4f}" in card for value in values)


def test_all_starters_have_a_file() -> None:
    names = {path.stem for path in starters.FOLDER.glob("*.safetensors")}
    assert names == STARTERS.keys() == {path.stem for path in starters.FOLDER.glob("*.md")}


def test_weights_are_found_by_name_and_a_path_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert latest_checkpoint("isic-small") == FILE
    Path("isic-small").mkdir()
    Path("isic-small", LATEST).touch()
    assert latest_checkpoint("isic-small") == Path("isic-small", LATEST)


def test_masks_of_any_picture(drawn: tuple[Path, str], pictures: Path) -> None:
    out, said = drawn
    assert "isic-small is used with --preset small; given flags win" in said
    assert "--preset small sets --sampler dpm_solver++ --fusion direct --precision auto" in said
    assert "2 masks a case by dpm_solver++, 1 evaluation each, fused by direct" in said
    assert [row["name"] for row in read_csv(out / "predictions.csv")] == [
        f"mole{number}" for number in range(5)
    ]
    for path in pictures.iterdir():
        size = size_of(path)
        assert [size_of(out / f"{path.stem}_{kind}.png") for kind in KINDS] == [size] * len(KINDS)
    assert "mole4" in (out / "report.html").read_text("utf-8")
    assert said.endswith(f"next: open {out / 'report.html'}; the most doubtful cases come first\n")


def test_a_preset_that_is_named_wins(pictures: Path, tmp_path: Path) -> None:
    flags = ("--model_path", "isic-small", "--data_dir", pictures, "--out_dir", tmp_path)
    said = succeeded(
        script("segmentation_sample", *flags, "--preset", "fast-brats", "--dry_run", True)
    )
    assert "is used with" not in said and "5 masks a case by dpm_solver++, 50 eval" in said


def test_lesions_of_phantoms_are_found() -> None:
    """No picture of a data set is needed to see that the file holds a network that segments."""
    segmenter = Segmenter.load("isic-small", num_ensemble=2)
    found = []
    for number in range(6):
        skin = make_skin(1, number)
        result = segmenter(np.moveaxis(skin.picture, 2, 0), name=str(number))
        found.append(dice(confusion(result.mask.numpy(), skin.mask > 0)))
    assert np.median(found) > 0.85, found


def test_scores_on_real_pictures(real_data: Path) -> None:
    """Every 25th of the 305 test pictures."""
    dataset = open_dataset(real_data / "isbi2016_256" / "Test")
    segmenter = Segmenter.load("isic-small", sampler="direct")
    cases = [dataset[index] for index in range(0, len(dataset), 25)]
    results = segmenter.segment(cases)
    scores = [score_of(*pair).dice for pair in zip(cases, results, strict=True)]
    assert np.mean(scores) > 0.88, scores


def test_training_goes_on_from_a_starter(tmp_path: Path) -> None:
    write_isic(tmp_path, 0, patients=4, size=64)
    flags = ("--preset", "small", "--data_dir", tmp_path / "Train", "--out_dir", tmp_path / "run")
    more = ("--resume_checkpoint", "isic-small", "--max_steps", 1201, "--batch_size", 1)
    said = succeeded(script("segmentation_train", *flags, *more))
    assert f"resuming {FILE} at step 1200" in said
    assert load_checkpoint(tmp_path / "run" / LATEST).step == 1201


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("isic-smal", "there is no file isic-smal. Did you mean isic-small? Weights that come"),
        ("skin", "there is no file skin. Weights that come with the package: isic-small."),
        ("results/isic-small", "there is no file results/isic-small. Name a checkpoint"),
        (
            "./isic-small",
            "isic-small is also the name of weights that come with the package: write",
        ),
        ("isic-small.pt", "there is no file isic-small.pt. Name a checkpoint"),
        ("isic-small,isic-small", "twice. Name different weights."),
    ],
)
def test_names_that_are_none(
    name: str, message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(
        script("segmentation_sample", "--model_path", name, "--data_dir", pictures)
    )
    assert not [*tmp_path.iterdir()]


def test_a_changed_file_is_refused(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starters, "FOLDER", tmp_path)
    flags = ("--model_path", "isic-small", "--data_dir", pictures, "--out_dir", tmp_path / "out")
    error = refused(script("segmentation_sample", *flags))
    assert "isic-small: its file" in error and "cannot be read (No such file" in error

    shutil.copy(FILE, tmp_path)
    changed = bytearray(FILE.read_bytes())
    changed[-1] ^= 1
    (tmp_path / FILE.name).write_bytes(changed)
    error = refused(script("segmentation_sample", *flags))
    assert "isic-small: its file" in error and "its checksum (SHA-256) differs" in error
    assert not (tmp_path / "out").exists()


def test_pictures_of_other_channels_are_refused(brats: Path, tmp_path: Path) -> None:
    flags = ("--model_path", "isic-small", "--data_dir", brats / "testing", "--out_dir", tmp_path)
    error = refused(script("segmentation_sample", *flags))
    assert "4 of the images" in error and "Use data with the channels of training." in error
    assert not [*tmp_path.iterdir()]


def test_a_folder_with_masks_of_other_pictures_is_refused(
    drawn: tuple[Path, str], pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn[0], out := tmp_path / "masks")
    before = contents(out)
    shutil.copy(pictures / "mole0.jpg", tmp_path / "another.jpg")
    flags = ("--model_path", "isic-small", "--data_dir", tmp_path / "another.jpg")
    error = refused(script("segmentation_sample", *flags, "--out_dir", out, "--steps", 2))
    assert "holds masks of another run, of mole0, mole1, " in error
    assert error.endswith("Choose another --out_dir.\n")
    assert contents(out) == before


def test_half_precision_halves_the_file(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    flags = ("--model_path", trained, "--out", out, "--precision", "fp16")
    succeeded(script("export_weights", *flags))
    whole = tmp_path / "whole.safetensors"
    succeeded(script("export_weights", *flags[:2], "--out", whole))
    halves, wholes = load_file(out), load_file(whole)
    assert all(torch.equal(halves[name], value.half()) for name, value in wholes.items())
    image = np.random.default_rng(0).random((4, 40, 40), dtype=np.float32)
    one, two = (
        Segmenter.load(path, steps=2, num_ensemble=1, sampler="ddim")(image).members
        for path in (out, whole)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0.01)
    again = ("--model_path", trained, "--out", tmp_path / "a.pt", "--precision", "fp16")
    assert "is not for --training True" in refused(
        script("export_weights", *again, "--training", True)
    )


def test_weights_beyond_half_precision_are_refused(trained: Path, tmp_path: Path) -> None:
    large = Checkpoint({}, 0, {"w": torch.tensor([1e5])})
    with pytest.raises(UserError, match=r"tensor w holds numbers above 65504"):
        export_weights(large, "raw", tmp_path / "a.safetensors", precision="fp16")
    assert not [*tmp_path.iterdir()]
