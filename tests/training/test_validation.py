"""Validation while training: right scores, an untouched run, the best checkpoint, an early stop."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, read_csv, refused, script, succeeded, training
from loops import equal, make_loop, resumed
from PIL import Image
from torch import Tensor

from guided_diffusion.checkpoint import BEST, LATEST, latest_checkpoint, load_checkpoint
from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Case
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.options.segmentation import WatchOptions
from guided_diffusion.scoring.metrics import confusion, dice
from guided_diffusion.tools import phantom_folders
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.validation import Score, score_of


def scored(folder: Path, scores: list[float], **options: Any) -> tuple[TrainLoop, list[int]]:
    """A loop whose validations return these Dice values, and the steps at which they happen."""
    asked: list[int] = []

    def validate(weights: dict[str, Tensor], step: int) -> Score:
        asked.append(step)
        torch.rand(3)  # must not change what the run draws
        return Score(scores[len(asked) - 1], 0.5)

    watch = WatchOptions(**options.pop("watch", {}))
    loop = make_loop(folder, rest={"watch": watch, "validate": validate}, **options)
    return loop, asked


@pytest.mark.parametrize(
    ("interval", "asked"), [(0, [3, 6, 7]), (2, [2, 4, 6, 7]), (7, [7]), (100, [7])]
)
def test_validation_happens_at_its_interval_and_at_the_end(
    interval: int, asked: list[int], quiet: None, tmp_path: Path
) -> None:
    loop, seen = scored(
        tmp_path, [0.5] * 9, max_steps=7, save_interval=3, watch={"val_interval": interval}
    )
    loop.run_loop()
    assert seen == asked


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.2, 0.3], 6), ([0.3, 0.2, 0.1], 2), ([0.1, 0.3, 0.2], 4)]
)
@pytest.mark.parametrize("save_interval", [1, 2, 100])
def test_the_best_is_kept(
    scores: list[float], best: int, save_interval: int, quiet: None, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "save_interval": save_interval, "keep": 1}
    loop, _ = scored(tmp_path, scores, watch={"val_interval": 2}, **options)
    loop.run_loop()
    kept = load_checkpoint(tmp_path / BEST)
    assert (kept.step, kept.training["best"]) == (
        best,
        {"dice": max(scores), "step": best, "since": 0, "mask_temperature": 1.0},
    )
    assert {path.name for path in tmp_path.iterdir()} == {BEST, LATEST, "savedmodel000006.pt"}
    assert latest_checkpoint(tmp_path) == tmp_path / LATEST
    assert load_checkpoint(tmp_path / LATEST).step == 6


@pytest.mark.parametrize(("patience", "end"), [(0, 12), (1, 6), (2, 8), (3, 12)])
def test_the_run_ends_without_a_better_validation(
    patience: int, end: int, quiet: None, tmp_path: Path
) -> None:
    scores = [0.1, 0.3, 0.2, 0.3, 0.4, 0.4]
    watch = {"val_interval": 2, "patience": patience}
    loop, _ = scored(tmp_path, scores, max_steps=12, watch=watch)
    loop.run_loop()
    assert load_checkpoint(tmp_path / LATEST).step == end


def test_patience_lasts_over_a_resume(quiet: None, tmp_path: Path) -> None:
    watch = {"val_interval": 2, "patience": 2}
    loop, _ = scored(tmp_path, [0.5, 0.4], max_steps=4, watch=watch)
    half = loop.run_loop()
    second, asked = scored(tmp_path, [0.5, 0.9], max_steps=20, watch=watch)
    resumed(second, half).run_loop()
    assert (asked, second.step) == ([6], 6)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_validation_does_not_change_a_run(brats: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit, at once and resumed; only the score is added to the checkpoint."""
    validated = ["--val_dir", brats / "testing", "--val_steps", 2, "--val_interval", 1]
    command = [*training(brats, tmp_path / "run"), *validated]
    succeeded(script("segmentation_train", *command, "--max_steps", 2))
    succeeded(script("segmentation_train", *command, "--max_steps", 4, "--resume", "auto"))
    one, other = load_checkpoint(trained / LATEST), load_checkpoint(tmp_path / "run" / LATEST)
    assert other.training.pop("best")["step"] >= 1
    assert equal({**vars(one), "run": {}}, {**vars(other), "run": {}})


def test_the_files_of_validation(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--max_steps", 2, "--val_dir", brats / "testing"]
    said = succeeded(script("segmentation_train", *command, "--val_cases", 1))
    assert "validation on 1 case, 2 masks each in 5 evaluations" in said
    row = read_csv(tmp_path / "progress.csv")[-1]
    assert row["step"] == "2"
    assert 0 <= float(row["val_iou"]) <= float(row["val_dice"]) <= 1
    pictures = {}
    for path in (tmp_path / "validation").iterdir():
        with Image.open(path) as picture:
            pictures[path.name] = picture.size
    assert len(pictures) == 2 and "sampling.png" in pictures
    assert all(min(size) > 100 for size in pictures.values())
    assert load_checkpoint(tmp_path / BEST).training["best"]["dice"] == float(row["val_dice"])


def test_scores_are_those_of_sampling_and_scoring(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path / "run"), "--max_steps", 3, "--val_steps", 3]
    succeeded(script("segmentation_train", *command, "--val_dir", brats / "testing"))
    masks = tmp_path / "masks"
    sampling = ["--model_path", tmp_path / "run", "--data_dir", brats / "testing"]
    sampling += ["--out_dir", masks, "--dpm_solver", True, "--steps", 3, "--num_ensemble", 2]
    succeeded(script("segmentation_sample", *sampling))
    succeeded(script("segmentation_env", "--inp_pth", masks, "--out_pth", brats / "testing"))
    with (masks / "scores.csv").open(newline="", encoding="utf-8") as file:
        found = [float(row["dice"]) for row in csv.DictReader(file)]
    said = read_csv(tmp_path / "run" / "progress.csv")[-1]
    assert float(said["val_dice"]) == pytest.approx(sum(found) / len(found), abs=1e-4)


def test_a_split_names_the_cases(brats: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (brats / "training").iterdir() if path.is_dir())
    parts = ["training"] * (len(names) - 2) + ["validation"] * 2
    lines = "".join(f"{name} {part}\n" for name, part in zip(names, parts, strict=True))
    (tmp_path / "split.txt").write_text(lines, encoding="utf-8")
    command = [*training(brats, tmp_path / "run"), "--max_steps", 1]
    done = script("segmentation_train", *command, "--split", tmp_path / "split.txt")
    assert "validation on " in succeeded(done)


def test_patience_needs_cases_to_validate_on(brats: Path, tmp_path: Path) -> None:
    error = refused(script("segmentation_train", *training(brats, tmp_path), "--patience", 3))
    assert "--patience" in error and "--val_dir" in error
    assert contents(tmp_path) == {}


def test_validation_needs_the_channels_of_training(brats: Path, tmp_path: Path) -> None:
    phantom_folders.write_isic(tmp_path / "isic", 3, patients=2, size=40, training=0.5)
    command = [*training(brats, tmp_path / "run"), "--val_dir", tmp_path / "isic" / "Test"]
    assert "have 3 channels" in refused(script("segmentation_train", *command))


def test_a_score_is_the_mean_over_classes() -> None:
    truth, found = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    truth[0, :2], found[0, :1] = 1, 1  # Dice 2/3; of the other class both are empty: 1
    classes = find_classes("a=1,b=2")
    result = Segmentation(found[None], found, torch.zeros(2, 4, 4), classes)
    score = score_of(Case(torch.zeros(1, 4, 4), truth, "x"), result)
    assert score == pytest.approx(Score((2 / 3 + 1) / 2, (0.5 + 1) / 2))
    flat = Segmentation(found[:1], found[0], torch.zeros(4, 4))
    one = score_of(Case(torch.zeros(1, 4, 4), truth[:1], "x"), flat)
    assert one.dice == pytest.approx(dice(confusion(found[0], truth[0])))


def test_a_checkpoint_records_predict_v_and_one_without_it_loads(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    own = [*training(brats, tmp_path / "v"), "--max_steps", 1]
    own[own.index("--predict_xstart") + 1] = "False"
    succeeded(script("segmentation_train", *own, "--predict_v", True, "--min_snr_gamma", 5))
    assert load_checkpoint(tmp_path / "v" / LATEST).options["predict_v"] is True
    sampling = ["--data_dir", brats / "testing", "--num_ensemble", 1, "--steps", 1]
    sampling += ["--num_samples", 1, "--out_dir", tmp_path / "masks"]
    succeeded(script("segmentation_sample", *sampling, "--model_path", tmp_path / "v"))
    wrong = script(
        "segmentation_sample", *sampling, "--model_path", tmp_path / "v", "--predict_v", False
    )
    assert "--predict_v False: contradicts True" in refused(wrong)

    content = torch.load(trained / LATEST, weights_only=True)
    for later in ("predict_v", "min_snr_gamma"):
        del content["options"][later]
    torch.save(content, tmp_path / "old.pt")
    old = [*sampling[:-1], tmp_path / "old", "--model_path", tmp_path / "old.pt"]
    succeeded(script("segmentation_sample", *old))
    error = refused(script("segmentation_sample", *old, "--predict_v", True))
    assert "--predict_v True: contradicts False" in error
