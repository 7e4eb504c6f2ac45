"""Tools say what to do next, and with --dry_run they do everything but write."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import contents, refused, script, succeeded

from guided_diffusion.layouts import open_dataset
from guided_diffusion.tools import phantom_folders


def next_words(said: str) -> list[str]:
    """The command that the last line names."""
    last = said.rstrip().splitlines()[-1]
    assert last.startswith("next: python scripts/"), last
    return shlex.split(last)[2:]


@pytest.mark.parametrize("layout", ["brats2021", "isic", "nnunet", "acdc", "drive", "parts"])
def test_phantoms_name_the_training_on_them(layout: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["--out", out, "--layout", layout, "--patients", 4, "--size", 48]
    dry = succeeded(script("make_phantoms", *command, "--dry_run", True))
    assert dry == f"dry run: 4 patients of {layout} would be written to {out}\n"
    assert not out.exists()
    file, *flags = next_words(succeeded(script("make_phantoms", *command)))
    assert file == "scripts/segmentation_train.py" and flags[-1] == "results/first"
    assert len(open_dataset(flags[flags.index("--data_dir") + 1])) >= 1
    again = refused(script("make_phantoms", *command, "--dry_run", True))
    assert "is not a new or empty folder" in again


def test_weak_phantoms_name_weak_training(tmp_path: Path) -> None:
    command = ["--out", tmp_path / "out", "--layout", "weak", "--patients", 4, "--size", 24]
    words = next_words(succeeded(script("make_phantoms", *command)))
    assert words == [
        *("scripts/train_tumor_ddfm.py", "--preset", "weak-ours"),
        *("--src_dir", str(tmp_path / "out")),
    ]


def test_slicing_counts_first_and_names_the_training_at_the_end(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    phantom_folders.write_brats_volumes(src, 3, patients=3, size=24, slices=12, training=1.0)
    command = ["--src", src, "--out", out, "--slices", "3:7", "--workers", 1]
    dry = succeeded(script("brats_slices", *command, "--dry_run", True))
    assert dry.splitlines()[-1] == (
        f"dry run: 12 slices of 3 volumes would be written to {out}, 0 are there"
    )
    assert not out.exists()
    said = succeeded(script("brats_slices", *command))
    words = next_words(said)
    small = ["scripts/segmentation_train.py", "--preset", "small"]
    assert words[:5] == [*small, "--data_dir", str(out / "training")]
    before = contents(out)
    dry = succeeded(script("brats_slices", *command, "--dry_run", True))
    assert "0 slices of 3 volumes would be written" in dry and "12 are there" in dry
    other = refused(script("brats_slices", *command, "--seed", 5, "--dry_run", True))
    assert "other settings" in other and contents(out) == before


@pytest.mark.parametrize("training", [False, True])
def test_export_names_the_use_of_its_file(training: bool, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "weights.pt"
    command = ["--model_path", trained, "--out", out, "--training", training]
    dry = succeeded(script("export_weights", *command, "--dry_run", True))
    assert re.fullmatch(rf"dry run: .* of {trained}\S* would be written to {out}\n", dry)
    assert not out.parent.exists()
    words = next_words(succeeded(script("export_weights", *command)))
    flag = ["--resume_checkpoint"] if training else ["--model_path"]
    name = "segmentation_train" if training else "segmentation_sample"
    assert words[:3] == [f"scripts/{name}.py", *flag, str(out)]
    assert training or words[-4:] == ["--dpm_solver", "True", "--steps", "10"]
    assert "exists" in refused(script("export_weights", *command, "--dry_run", True))
