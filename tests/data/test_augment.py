"""Augmentation by value: identity, one geometry for image and mask, one case for one draw."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close
from torch.utils.data import Dataset

from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.datasets import Case

STILL = Augmentation(flip=0, degrees=0, scale=0, gamma=0, noise=0)
GEOMETRY = Augmentation(gamma=0, noise=0)


def draw(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def blobs(height: int = 40, width: int = 40, seed: int = 0) -> Case:
    """Two smooth channels on a background of 0 and 1 class that is where the first is bright."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = torch.rand(2, generator=draw(seed)) * 8
    bright = torch.exp(-((y - 15 - centre[0]) ** 2 + (x - 18 - centre[1]) ** 2) / 60.0)
    image = torch.stack([bright, 200 - 300 * bright])
    return Case(image, (bright >= 0.5).float()[None], f"case{seed}")


class Blobs(Dataset[Case]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Case:
        return blobs(seed=index)


@pytest.mark.parametrize("size", [(40, 40), (33, 50)])
def test_strength_zero_is_the_identity(size: tuple[int, int]) -> None:
    case = blobs(*size)
    still = STILL(case, draw(0))
    assert_close(still.image, case.image, rtol=1e-5, atol=1e-4)
    assert torch.equal(still.mask, case.mask) and still.name == case.name


def flipped(seed: int) -> tuple[Tensor, Tensor]:
    case = blobs()
    result = replace(STILL, flip=0.5)(case, draw(seed))
    return result.image, result.mask


def test_flips_are_those_of_torch_and_all_four_happen() -> None:
    case, seen = blobs(), set()
    for seed in range(20):
        image, mask = flipped(seed)
        for axes in ((), (1,), (2,), (1, 2)):
            if torch.equal(mask, case.mask.flip(axes)):
                assert_close(image, case.image.flip(axes), rtol=1e-5, atol=1e-4)
                seen.add(axes)
    assert seen == {(), (1,), (2,), (1, 2)}


@pytest.mark.parametrize("seed", range(6))
def test_a_marker_goes_the_same_way_in_image_and_mask(seed: int) -> None:
    marker = torch.zeros(1, 41, 61)
    marker[:, 12:17, 20:25] = 1
    result = GEOMETRY(Case(marker, marker, "a"), draw(seed))
    assert torch.equal(result.mask, (result.image >= 0.5).float())
    assert 12 < result.mask.sum() < 42
    away = (result.mask.nonzero().float().mean(0) - marker.nonzero().float().mean(0)).norm()
    assert away > 0.5


def test_turning_keeps_angles_and_areas_on_a_picture_that_is_not_square() -> None:
    disc = torch.zeros(1, 60, 120)
    y, x = torch.meshgrid(torch.arange(60), torch.arange(120), indexing="ij")
    disc[0] = ((y - 29.5) ** 2 + (x - 75) ** 2 <= 12**2).float()
    turn = replace(STILL, degrees=15)
    for seed in range(5):
        mask = turn(Case(disc, disc, "a"), draw(seed)).mask[0]
        rows, columns = mask.any(1).sum().item(), mask.any(0).sum().item()
        assert abs(rows - columns) <= 1 and abs(mask.sum() / disc.sum() - 1) < 0.02
        centre = mask.nonzero().float().mean(0) - torch.tensor([29.5, 59.5])
        assert abs(centre.norm().item() - 15.5) < 0.3
        assert abs(math.degrees(math.atan2(centre[0], centre[1]))) <= 15.1


def test_intensities_stay_in_range_and_leave_background_and_mask_alone() -> None:
    case = blobs()
    case.image[0, :5] = 0
    result = Augmentation(flip=0, degrees=0, scale=0, gamma=0.5, noise=0.1)(case, draw(1))
    low, high = case.image.amin((1, 2)), case.image.amax((1, 2))
    assert (result.image.amin((1, 2)) >= low - 1e-4).all()
    assert (result.image.amax((1, 2)) <= high + 1e-4).all()
    assert (result.image[0, :5].abs() < 1e-3).all() and torch.equal(result.mask, case.mask)
    assert ((result.image - case.image).abs().amax((1, 2)) > 0.02 * (high - low)).all()


def test_masks_stay_binary_and_a_flat_image_stays_finite() -> None:
    for seed in range(5):
        result = Augmentation()(blobs(seed=seed), draw(seed))
        assert set(result.mask.unique().tolist()) <= {0, 1}
    flat = Augmentation()(Case(torch.full((1, 8, 8), 3.0), None, "a"), draw(0))
    assert_close(flat.image, torch.full((1, 8, 8), 3.0))
    assert flat.mask is None


@pytest.mark.parametrize(("first", "workers"), [(0, 2), (3, 0), (3, 2)])
def test_a_case_follows_from_seed_and_place_alone(first: int, workers: int) -> None:
    """With any number of workers, and resumed at any step."""

    def batches(count: int, **options: int) -> list[Tensor]:
        found = islice(
            training_batches(Blobs(), 2, seed=7, augmentation=Augmentation(), **options), count
        )
        return [torch.cat([batch.image.flatten(), batch.mask.flatten()]) for batch in found]

    for one, other in zip(
        batches(6)[first:], batches(6 - first, first_step=first, workers=workers), strict=True
    ):
        assert torch.equal(one, other)


def test_another_epoch_and_another_seed_give_other_cases() -> None:
    def images(seed: int) -> list[Tensor]:
        batches = islice(training_batches(Blobs(), 1, seed=seed, augmentation=Augmentation()), 10)
        return [image for batch in batches for image in batch.image]

    found = [*images(1), *images(2)]
    assert len({image.sum().item() for image in found}) == 20


def test_off_means_untouched() -> None:
    batch = next(training_batches(Blobs(), 5, seed=0))
    for image, name in zip(batch.image, batch.names, strict=True):
        assert torch.equal(image, blobs(seed=int(name[-1])).image)
