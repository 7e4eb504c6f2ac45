"""What is said about intensities, and the channels of mixed and converted pictures."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import script, succeeded
from PIL import Image

from guided_diffusion.data.advice import (
    intensity_advice,
    intensity_notes,
    interval_accuracy,
    shortcut_notes,
)
from guided_diffusion.data.datasets import Reading
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import TRAIN
from guided_diffusion.script_util import network_for

NAMES = [f"p{patient:02d}_{z:03d}" for patient in range(10) for z in range(10)]


@pytest.mark.parametrize(
    ("values", "positive", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1),
        ([1, 2, 3, 4], [1, 1, 0, 0], 1),
        ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 0], 1),  # inside an interval
        ([1, 2, 3, 4, 5, 6], [1, 1, 0, 0, 1, 1], 1),  # outside it
        ([1, 2, 3, 4], [0, 1, 0, 1], 3 / 4),
        ([5, 5, 5, 5], [0, 1, 0, 1], 1 / 2),
    ],
)
def test_the_best_interval_by_hand(values, positive, expected):
    assert interval_accuracy(values, positive) == pytest.approx(expected)


def test_a_class_that_follows_from_the_slice_or_from_brightness_is_warned_of():
    grey = dict.fromkeys(NAMES, 0.5)
    by_height = {name: int(3 <= int(name[-3:]) < 7) for name in NAMES}
    (said,) = shortcut_notes(by_height, grey)
    assert "slice number alone" in said and "1.00" in said
    by_patient = {name: int(name[1:3]) % 2 for name in NAMES}
    assert not shortcut_notes(by_patient, grey)
    (said,) = shortcut_notes(by_patient, {name: 0.2 + 0.1 * by_patient[name] for name in NAMES})
    assert "mean intensity alone" in said
    few = NAMES[:30]
    assert not shortcut_notes({name: by_height[name] for name in few}, dict.fromkeys(few, 0.5))
    numbered = {f"img{number}": int(number >= 50) for number in range(100)}
    assert not shortcut_notes(numbered, dict.fromkeys(numbered, 0.5))  # pictures, not slices


def test_the_height_of_real_slices_gives_their_class_away(real_data):
    said = succeeded(script("check_data", "--data_dir", real_data / "brats15_weak_128/training"))
    assert "slice number alone tells normal images from those with a lesion" in said


GREY = np.random.default_rng(0).integers(0, 256, (24, 32)).astype(np.uint8)
AS_RGB = np.repeat(GREY[..., None], 3, axis=2)
COLOUR = np.stack([GREY, 255 - GREY, GREY], axis=2)


def pictures(folder: Path, *images: np.ndarray) -> Path:
    for side in ("images", "masks"):
        (folder / side).mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        mask = np.zeros((24, 32), np.uint8)
        mask[4:12, 4:12] = 255
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
    return folder


def slices(folder: Path, white: float) -> Path:
    for side, values in (("images", GREY * (white / 255)), ("masks", GREY > 240)):
        (folder / side).mkdir(parents=True)
        nifti = nib.Nifti1Image(values.astype(np.float32), np.diag([2.0, 2, 2, 1]))
        nib.save(nifti, folder / side / "a.nii.gz")
    return folder


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [
        (0, 1, ""),
        (-4, 12, ""),
        (0, 3000, "--normalise percentile"),
        (-1024, 10, "--normalise percentile"),
        (-2, 30, ""),  # standardised, with an outlier
        (0, 0.01, "--normalise minmax"),
        (0, 0, ""),
    ],
)
def test_advice(low: float, high: float, advice: str) -> None:
    said = intensity_advice(low, high)
    assert advice in said and bool(said) == bool(advice)


def test_raw_slices_are_told_of(tmp_path: Path) -> None:
    folder = slices(tmp_path / "raw", 3000)
    (note,) = intensity_notes(open_dataset(folder))
    assert "from 0 to 3000 in 1 case" in note and "--normalise percentile" in note
    said = succeeded(script("check_data", "--data_dir", folder))
    assert "warning    intensities from 0 to 3000; " in said
    scaled = open_dataset(folder, reading=Reading(normalise="percentile"))
    assert intensity_notes(scaled) == ["intensities are scaled by --normalise percentile"]
    (usual,) = intensity_notes(open_dataset(slices(tmp_path / "usual", 1)))
    assert usual == "intensities from 0 to 1 in 1 case looked at"


@pytest.mark.parametrize(
    ("images", "channels"),
    [
        ([GREY, COLOUR, COLOUR], 3),
        ([COLOUR, COLOUR, GREY], 3),
        ([GREY, GREY, COLOUR], 3),
        ([GREY, AS_RGB], 1),
        ([AS_RGB, AS_RGB], 3),
        ([GREY, GREY], 1),
    ],
)
def test_channels_of_mixed_pictures(
    tmp_path: Path, images: list[np.ndarray], channels: int
) -> None:
    dataset = open_dataset(pictures(tmp_path, *images))
    assert dataset.channels == channels
    for index, pixels in enumerate(images):
        own = pixels if pixels.ndim == 3 else AS_RGB
        expected = torch.from_numpy(own).permute(2, 0, 1)[:channels] / 255
        torch.testing.assert_close(dataset[index].image, expected)


def test_pictures_are_converted_to_what_a_network_needs(tmp_path: Path) -> None:
    grey, as_rgb = pictures(tmp_path / "grey", GREY), pictures(tmp_path / "rgb", AS_RGB)
    for folder, in_ch in ((grey, 4), (as_rgb, 2)):
        dataset = open_dataset(folder)
        assert network_for(dataset, Flags.of(TRAIN, in_ch=in_ch), None).in_ch == in_ch
        assert dataset[0].image.shape == (in_ch - 1, 24, 32)
        assert (dataset[0].image == torch.from_numpy(GREY) / 255).all()
        assert "as the network needs" in dataset.notes[-1]
    coloured = open_dataset(pictures(tmp_path / "colour", COLOUR))
    coloured.convert_to(1)
    with pytest.raises(UserError, match=r"0\.png: is a coloured picture, but grey ones are read"):
        coloured[0]
    volume = open_dataset(slices(tmp_path / "slices", 1))
    volume.convert_to(3)
    assert volume.channels == 1
