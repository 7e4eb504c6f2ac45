"""Volumes of results: a repeated run keeps them, and further slices are added to them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import DIFFUSION, NETWORK, contents, script, succeeded

from guided_diffusion.tools import phantom_folders

KINDS = ("output_ens", "mask", "uncertainty")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with volumes of 12 slices in testing/ and a model of one step in run/."""
    folder = tmp_path_factory.mktemp("volumes")
    phantom_folders.write_brats_volumes(folder, 3, patients=2, size=24, slices=12, training=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        flags = ("--out_dir", folder / "run", "--max_steps", 1, *NETWORK, *DIFFUSION)
        succeeded(script("segmentation_train", "--data_dir", folder / "training", *flags))
    return folder


def sample(model: Path, out: Path, slices: str) -> str:
    """Draw some slices into a folder; what is said."""
    flags = ["--data_dir", model / "testing", "--model_path", model / "run", "--out_dir", out]
    drawing = ["--dpm_solver", True, "--steps", 2, "--num_ensemble", 2, "--slices", slices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(model / "home"))
        return succeeded(script("segmentation_sample", *flags, *drawing))


def volumes(folder: Path) -> dict[str, np.ndarray]:
    """The soft volumes of a folder by name, [H, W, D]."""
    return {
        path.name: nib.load(path).get_fdata() for path in sorted(folder.glob("*_output_ens.nii.gz"))
    }


def test_a_second_run_draws_nothing_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    sample(model, tmp_path, "2:5")
    before = contents(tmp_path)
    said = sample(model, tmp_path, "2:5")
    assert "3 of 3 cases are finished and kept" in said and "other settings" not in said
    assert contents(tmp_path) == before


def test_two_ranges_into_one_folder_leave_both(model: Path, tmp_path: Path) -> None:
    sample(model, tmp_path / "all", "2:8")
    sample(model, tmp_path / "parts", "2:5")
    said = sample(model, tmp_path / "parts", "5:8")
    assert "other settings" not in said
    expected, found = volumes(tmp_path / "all"), volumes(tmp_path / "parts")
    assert expected.keys() == found.keys() != set()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-4)
        assert (found[name][:, :, 2:8].max(axis=(0, 1)) > 0).all()
        assert not found[name][:, :, [0, 1, *range(8, 12)]].any()


def test_a_superset_draws_only_what_is_new(model: Path, tmp_path: Path) -> None:
    sample(model, tmp_path, "2:5")
    before = volumes(tmp_path)
    said = sample(model, tmp_path, "1:7")
    assert "3 of 6 cases are finished and kept" in said
    for name, values in volumes(tmp_path).items():
        np.testing.assert_array_equal(values[:, :, 2:5], before[name][:, :, 2:5])
        assert (values[:, :, 1:7].max(axis=(0, 1)) > 0).all()


def test_an_empty_waiting_folder_is_removed(model: Path, tmp_path: Path) -> None:
    """What a run leaves that was killed while it removed the folder."""
    sample(model, tmp_path, "2:5")
    (name,) = {path.name.removesuffix("_mask.nii.gz") for path in tmp_path.glob("*_mask.nii.gz")}
    (row, *_) = (tmp_path / "predictions.csv").read_text("utf-8").splitlines()[1:]
    waiting = tmp_path / ".slices" / row.rpartition(",")[2] / name
    waiting.mkdir(parents=True)
    before = volumes(tmp_path)
    assert "3 of 3 cases are finished" in sample(model, tmp_path, "2:5")
    assert not waiting.exists()
    for key, values in volumes(tmp_path).items():
        np.testing.assert_array_equal(values, before[key])
