"""What a command says to do next, with its paths filled in."""

import sys

import pytest

from guided_diffusion.inference import next_steps
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import DataOptions


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/segmentation_train.py"])


def trained(tmp_path, **flags):
    return next_steps.after_training(Flags(given={"data_dir": f"{tmp_path}/training", **flags}))


def test_training_names_the_images_for_testing_beside_its_own(tmp_path):
    (tmp_path / "testing").mkdir()
    said = trained(tmp_path, out_dir="results/x")
    assert said == (
        "next: python scripts/segmentation_sample.py --model_path results/x --data_dir "
        f"{tmp_path}/testing --out_dir results/x --dpm_solver True --steps 10"
    )


def test_else_those_of_validation_or_of_the_split_or_a_word(tmp_path):
    assert "--data_dir YOUR_IMAGES --out_dir" in trained(tmp_path)
    assert "--data_dir some/val " in trained(tmp_path, val_dir="some/val")
    split = trained(tmp_path, split="split.txt")
    assert f"--data_dir {tmp_path}/training --split split.txt" in split


def test_a_unet_has_no_solver(tmp_path):
    assert "dpm_solver" not in trained(tmp_path, version="unet")


def test_the_command_is_written_as_it_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/guided-diffusion", "train"])
    assert next_steps.command_line("sample", out_dir="a b") == (
        "guided-diffusion sample --out_dir 'a b'"
    )
    data = DataOptions(data_dir="d", mask_labels="1,2")
    assert next_steps.after_check(data) == (
        "next: guided-diffusion train --data_dir d --mask_labels 1,2 --out_dir results/first"
    )
