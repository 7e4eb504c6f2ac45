"""Results lie on the grid of their source, with its header, however it is stored and sliced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import DIFFUSION, NETWORK, refused, script, succeeded
from spatial import SHAPE, bare, head, lesion, oblique, pair, put, stored

from guided_diffusion.checkpoint import Checkpoint, load_checkpoint, recorded_flags
from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.geometry import PLANES
from guided_diffusion.errors import UserError
from guided_diffusion.files import make_folder
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.provenance import note_sampling
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import open_dataset
from guided_diffusion.schedule import CLEAN
from guided_diffusion.scoring.evaluate import evaluate

AXES = ("LPS", "RAS", "PIR", "SAR", "LAI")


class Painter:
    """Draws the image itself: the plan and the masks of a segmenter, without a network."""

    classes = None
    frame = Frame(8)
    plan = SamplingPlan("ddpm", (CLEAN, CLEAN), batch_size=4, num_ensemble=2)
    others, evaluations = (), 0

    def segment(self, cases: list, note: object = None) -> list:
        return [
            Segmentation(image[:1].repeat(2, 1, 1), image[0], torch.zeros_like(image[0]))
            for image in (case.image for case in cases)
        ]


def drawn(data: Path, out: Path, plane: str = "axial") -> SegmentationDataset:
    """Paint a data set into a folder, with the record that sampling writes."""
    dataset = open_dataset(data, reading=Reading(normalise="none", plane=plane))
    note_sampling(make_folder(out), "f", model="", seed=0, options={"plane": plane})
    segment(Painter(), dataset, out, fingerprint="f")
    return dataset


def same_header(result: nib.Nifti1Image, source: nib.Nifti1Image) -> None:
    """Everything of a header that places its voxels is that of the source."""
    assert result.shape == source.shape
    np.testing.assert_array_equal(result.affine, source.affine)
    for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(result.header[field], source.header[field])
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "pixdim"):
        np.testing.assert_array_equal(result.header[field], source.header[field])


def scanned(values: np.ndarray, codes: str, affine: np.ndarray) -> nib.Nifti1Image:
    """An image with the codes of a scanner, in millimetres and seconds."""
    image = stored(values, codes, affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    return image


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("codes", AXES)
def test_volumes_come_back_as_they_were_stored(
    tmp_path: Path, quiet: None, codes: str, plane: str
) -> None:
    image = scanned(lesion().astype(np.float32) * 0.75, codes, oblique())
    data = pair(tmp_path / "data", image, stored(lesion(), "LPS", oblique()))
    drawn(data, tmp_path / "out", plane)
    source = nib.load(data / "images/a.nii.gz")
    for kind, factor in (("mask", 4 / 3), ("output_ens", 1)):
        result = nib.load(tmp_path / f"out/a_{kind}.nii.gz")
        same_header(result, source)
        np.testing.assert_allclose(result.get_fdata(), source.get_fdata() * factor, atol=1e-6)

    summary = evaluate(tmp_path / "out", data)
    assert summary["dice"] == 1 and summary["distances"]["unit"] == "mm"


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", AXES)
def test_slices_come_back_as_they_were_stored(
    tmp_path: Path, quiet: None, codes: str, axis: int
) -> None:
    part = tuple(slice(2, 3) if k == axis else slice(None) for k in range(3))
    values = lesion()[part].astype(np.float32)
    data = pair(
        tmp_path / "data",
        scanned(values, codes, oblique()),
        stored(lesion()[part], "LPS", oblique()),
    )
    drawn(data, tmp_path / "out")
    source = nib.load(data / "images/a.nii.gz")
    result = nib.load(tmp_path / "out/a_mask.nii.gz")
    same_header(result, source)
    np.testing.assert_array_equal(result.get_fdata(), source.get_fdata())
    assert evaluate(tmp_path / "out", data)["dice"] == 1


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("codes", AXES)
def test_a_truth_that_states_nothing_lies_as_the_images_do(
    tmp_path: Path, quiet: None, codes: str, depth: int
) -> None:
    image = stored(lesion()[..., :depth].astype(np.float32), codes)
    data = pair(tmp_path / "data", image, stored(lesion()[..., :depth]))
    drawn(data, tmp_path / "out")
    put(tmp_path / "gt/a.nii.gz", bare(np.asarray(image.dataobj).astype(np.uint8)))
    if depth == 1 or codes in ("LPS", "RAS"):
        assert evaluate(tmp_path / "out", tmp_path / "gt")["dice"] == 1
    else:
        with pytest.raises(UserError):
            evaluate(tmp_path / "out", tmp_path / "gt")


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1), (1, 12, 10)])
def test_slices_that_state_nothing_keep_their_shape(
    tmp_path: Path, quiet: None, shape: tuple[int, ...]
) -> None:
    label = lesion()[..., 2].reshape(shape)
    data = pair(tmp_path / "data", bare(label.astype(np.float32)), bare(label))
    drawn(data, tmp_path / "out")
    result = nib.load(tmp_path / "out/a_mask.nii.gz")
    assert result.shape == shape
    assert int(result.header["sform_code"]) == int(result.header["qform_code"]) == 0
    np.testing.assert_array_equal(result.get_fdata(), label)


class Copier(Segmenter):
    """A segmenter whose masks are the image that it was given."""

    def __init__(self) -> None:
        self.net = SimpleNamespace(in_channels=2, mask_channels=1)
        self.normalise = "none"

    def segment(self, cases: list, callback: object = None) -> list:
        return Painter().segment(cases)


@pytest.mark.parametrize("codes", ("LPS", "RAS", "LAS", "PLS", "SLP"))
def test_a_path_gives_masks_that_lie_as_the_file(tmp_path: Path, codes: str) -> None:
    image = stored(head()[..., :1], codes)
    result = Copier()(put(tmp_path / "a.nii.gz", image))
    expected = np.asarray(image.dataobj).squeeze()
    np.testing.assert_array_equal(result.fused, expected)
    np.testing.assert_array_equal(result.members[1], expected)
    assert result.uncertainty.shape == expected.shape and result.coarse is None


def test_a_checkpoint_records_the_plane_and_scoring_follows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pair(tmp_path / "data", stored(head(), "RAS"), stored(lesion(), "PIR"), name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        data = ("--data_dir", tmp_path / "data")
        run = ("--out_dir", tmp_path / "run", "--max_steps", 1, *NETWORK, *DIFFUSION)
        succeeded(script("segmentation_train", *data, *run, "--plane", "coronal"))
        model = ("--model_path", tmp_path / "run", "--dpm_solver", True, "--steps", 1)
        out = ("--out_dir", tmp_path / "out", "--num_ensemble", 1)
        assert "contradict" in refused(
            script("segmentation_sample", *data, *model, "--plane", "axial")
        )
        succeeded(script("segmentation_sample", *data, *model, *out))
    assert load_checkpoint(tmp_path / "run/savedmodel.pt").options["plane"] == "coronal"
    assert len(list((tmp_path / "out").glob("a_slice*_mask.png"))) == SHAPE[1]
    paths = ("--inp_pth", tmp_path / "out", "--out_pth", tmp_path / "data", "--report", False)
    said = succeeded(script("segmentation_env", *paths))
    assert f"{'cases':<24}{2 * SHAPE[1]:>10}" in said
    assert nib.load(tmp_path / "out/a_mask.nii.gz").shape == SHAPE


def test_older_checkpoints_are_axial() -> None:
    assert recorded_flags(Checkpoint({"image_size": 8}, 1, {}))["plane"] == "axial"


def test_a_check_names_the_plane(tmp_path: Path) -> None:
    data = pair(tmp_path / "data", stored(head(), "PIR"), bare(lesion()))
    put(data / "masks/a.nii.gz", stored(lesion(), "RAS"))
    said = succeeded(
        script("check_data", "--data_dir", data, "--plane", "sagittal", "--cache_dir", "none")
    )
    assert "1 volume by sagittal slices" in said and "12, of which 12 can be used" in said
