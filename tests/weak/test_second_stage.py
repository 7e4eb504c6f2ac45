"""Weak masks as a data set: what is written of pictures, NIfTI slices and NumPy volumes."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from guided_diffusion.data.tumorloader import LabelledImages, SlicedArrays, TumourImages
from guided_diffusion.layouts import open_dataset
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.report.pictures import write_picture
from guided_diffusion.weak.second_stage import write_training_set

SHAPE = (12, 8)


@pytest.fixture
def slices(tmp_path: Path) -> LabelledImages:
    """A NIfTI slice of each class."""
    for number, name in enumerate(("normal", "tumor")):
        folder = tmp_path / "source" / name
        folder.mkdir(parents=True)
        values = np.random.default_rng(number).random(SHAPE, dtype=np.float32)
        image = nib.Nifti1Image(values, np.diag([-1, -1, 1, 1]))
        nib.save(image, folder / f"p{number}_1.nii.gz")
    return TumourImages(tmp_path / "source", test_flag=True)


@pytest.fixture
def volumes(tmp_path: Path) -> LabelledImages:
    """A volume of two slices, the second of which has the label 1."""
    volume = np.random.default_rng(0).random((2, 2, *SHAPE), dtype=np.float32)
    volume[:, 1] = 0
    volume[1, 1, 3:6] = 1
    (tmp_path / "source" / "preprocessed").mkdir(parents=True)
    np.save(tmp_path / "source" / "preprocessed" / "v_0.npy", volume)
    split = {"train": ["v_0.npy"], "val": ["v_0.npy"], "test": ["v_0.npy"]}
    (tmp_path / "source" / "splits.pkl").write_bytes(pickle.dumps([split]))
    return SlicedArrays(tmp_path / "source", parts=("train",))


def weak_mask(name: str) -> np.ndarray:
    """A mask that no turned or mirrored image shares."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:4, 5 : 7 + (name[-1] == "1")] = True
    return mask


@pytest.mark.parametrize("kind", ["slices", "volumes"])
def test_images_and_weak_masks_are_read_as_they_were(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: LabelledImages = request.getfixturevalue(kind)
    for name, label in source.labels.items():
        write_picture(tmp_path / f"{name}_mask.png", soft_png(label * weak_mask(name)))
    root = write_training_set(source, source.names, tmp_path)
    written = open_dataset(root)
    assert (written.layout, written.names) == ("TUMOR", source.names)
    assert written.patients == source.patients
    for index, name in enumerate(source.names):
        case = written[index]
        assert_close(case.image, source.picture(index).image, atol=1e-5, rtol=0)
        assert case.mask is not None
        expected = torch.from_numpy(weak_mask(name) * bool(source.labels[name]))
        assert torch.equal(case.mask[0] > 0.5, expected)


def test_an_image_changes_its_folder_with_its_mask(tmp_path: Path) -> None:
    for name in ("normal", "tumor"):
        (tmp_path / "source" / name).mkdir(parents=True)
        Image.new("L", SHAPE[::-1], 90).save(tmp_path / "source" / name / f"{name}.png")
    source = TumourImages(tmp_path / "source", test_flag=True)
    for filled in (True, False):
        for name in source.names:
            write_picture(tmp_path / f"{name}_mask.png", soft_png(filled * weak_mask(name)))
        written = TumourImages(write_training_set(source, source.names, tmp_path))
        assert written.labels == {"normal": int(filled), "tumor": 1}
    assert [path.name for path in (tmp_path / "dataset" / "seg").iterdir()] == ["tumor.png"]
    assert TumourImages(write_training_set(source, ["normal"], tmp_path)).names == ["normal"]
