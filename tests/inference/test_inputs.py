"""Images given to the Python class: the same pixels for a path, a picture and any array."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from guided_diffusion.errors import UserError
from guided_diffusion.inference.inputs import pixels_of

COLOUR = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8)
FIRST = COLOUR.transpose(2, 0, 1)
SCALES = ("none", "minmax", "percentile", "zscore")


def pixels(image: Any, *, channels: int = 3, normalise: str = "none") -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pixels_of(image, name="a", channels=channels, normalise=normalise)


def read_only() -> np.ndarray:
    values = FIRST.copy()
    values.flags.writeable = False
    return values


@pytest.mark.parametrize("normalise", SCALES)
@pytest.mark.parametrize(
    "same",
    [
        Image.fromarray(COLOUR),
        FIRST,
        read_only(),
        FIRST[:, ::-1][:, ::-1],
        FIRST.astype(np.float32),
        FIRST.astype(np.float64),
        torch.from_numpy(FIRST.copy()),
        torch.from_numpy(FIRST.copy()).float().requires_grad_(),
    ],
    ids=["pil", "uint8", "read-only", "strides", "float32", "float64", "torch", "torch float"],
)
def test_arrays_are_scaled_as_the_file_is(tmp_path: Path, normalise: str, same: object) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    expected = pixels(tmp_path / "a.png", normalise=normalise)
    assert_close(pixels(same, normalise=normalise), expected, rtol=0, atol=0)
    assert_close(pixels(str(tmp_path / "a.png"), normalise=normalise), expected)


def test_sixteen_bits_and_grey(tmp_path: Path) -> None:
    deep = np.arange(120, dtype=np.uint16).reshape(10, 12) * 500
    Image.fromarray(deep).save(tmp_path / "a.png")
    expected = pixels(tmp_path / "a.png", channels=1)
    for same in (deep, deep[None], Image.fromarray(deep)):
        assert_close(pixels(same, channels=1), expected, rtol=0, atol=0)
    assert pixels(tmp_path / "a.png").shape == (3, 10, 12)  # grey for a network of colour
    assert pixels(Image.fromarray(deep)).shape == (3, 10, 12)
    grey = Image.fromarray(COLOUR[..., 0]).convert("RGB")
    assert_close(pixels(grey, channels=1)[0], torch.from_numpy(FIRST[0].copy()) / 255)


@pytest.mark.parametrize("normalise", SCALES)
def test_floats_in_the_range_of_training_are_kept(normalise: str) -> None:
    values = torch.rand(3, 10, 12)
    assert torch.equal(pixels(values, normalise=normalise), values)
    standard = torch.randn(3, 10, 12)
    kept = torch.equal(pixels(standard, normalise=normalise), standard)
    assert kept == (normalise in ("none", "zscore"))


@pytest.mark.parametrize("normalise", SCALES[1:])
def test_raw_intensities_are_scaled_where_training_scaled(normalise: str) -> None:
    raw = np.random.default_rng(0).integers(0, 3000, (3, 10, 12))
    expected = pixels(raw.astype(np.float32), normalise=normalise)
    assert expected.abs().max() < 5
    assert_close(pixels(raw.astype(np.int16), normalise=normalise), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (FIRST.astype(np.float32) + 0.5, "has values from .* to 255.5; pictures"),
        (np.full((3, 4, 4), 2000.5), "has values from 2000.5 to 2000.5"),
        (FIRST.astype(np.int64), "its type is int64, whose white is not known"),
        (FIRST.astype(np.complex64), "its type is complex64"),
        (COLOUR, "shape is .10, 12, 3., that of training is .3, H, W"),
        (FIRST[0], "shape is .10, 12., that of training"),
        ("nowhere/b.png", "nowhere/b.png: does not exist"),
    ],
)
def test_what_cannot_be_in_the_range_of_training_is_refused(image: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        pixels(image)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "scan_01.png")
    with pytest.raises(UserError, match=r"scan_1.png: does not exist. Did you mean .*scan_01.png"):
        pixels(tmp_path / "scan_1.png")
