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
        "next: guided-diffusion train --preset small --data_dir d --mask_labels 1,2 "
        "--out_dir results/first"
    )


def test_weak_training_by_a_preset_goes_on_with_it():
    def after(preset, **recorded):
        flags = Flags(
            given={"src_dir": "w", "out_dir": "o", **({"preset": preset} if preset else {})}
        )
        return next_steps.after_weak_training(flags, {"class_cond": True, **recorded})

    segment, classifier = "image_p_seg", "classifier_tumor_train"
    where, sized = "--src_dir w --save_dir o", {"image_size": 48}
    for preset, recorded, script, rest in (
        ("weak-ours", sized, segment, f"--preset weak-ours {where}"),
        ("weak-brats", sized, classifier, f"--preset weak-brats {where} --img_size 48"),
        ("weak-brats", {"model_type": "r"}, segment, f"--preset weak-brats {where}"),
        ("weak-ours", {"model_type": "r"}, segment, f"{where} --guided True"),
        ("", sized, classifier, f"{where} --img_size 48"),
    ):
        assert after(preset, **recorded) == f"next: python scripts/{script}.py {rest}"
