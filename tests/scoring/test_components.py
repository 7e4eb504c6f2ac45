"""Components by value: pictures of a few pixels, and what is kept of them."""

import numpy as np
import pytest
import torch

from guided_diffusion.data.classes import find_classes
from guided_diffusion.ensemble import temper
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.scoring.components import (
    Component,
    clean,
    clean_soft,
    find_components,
    temper_soft,
)


def picture(text):
    """Rows of # and . as bool [H, W]."""
    return np.array([[pixel == "#" for pixel in row] for row in text.split()])


TWO = picture("##..# ##... .....")
DIAGONAL = picture("##... ..#.. ....#")


def test_members_contain_a_component_from_half_of_its_pixels_up():
    members = np.stack([TWO, picture("#...# #.... ....."), picture("#.... ..... .....")])
    found = find_components(TWO, members, picture("###.. ..... ....."))
    assert found == [
        Component(4, top=0, left=0, bottom=2, right=2, found=2, inside=0.5),
        Component(1, top=0, left=4, bottom=1, right=5, found=2, inside=0.0),
    ]
    assert find_components(TWO, members, most=1) == [found[0]._replace(inside=None)]


def test_diagonal_neighbours_are_one_component():
    found = find_components(DIAGONAL, DIAGONAL[None])
    assert [component.pixels for component in found] == [3, 1]


def test_nothing_and_everything():
    nothing, everything = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert find_components(nothing, everything[None]) == []
    assert find_components(everything, nothing[None], everything) == [
        Component(6, top=0, left=0, bottom=2, right=3, found=0, inside=1.0)
    ]


def test_the_largest_component_by_its_connectivity():
    assert (clean(DIAGONAL, largest=8) == picture("##... ..#.. .....")).all()
    assert (clean(DIAGONAL, largest=4) == picture("##... ..... .....")).all()
    assert (clean(TWO) == TWO).all() and not clean(TWO & False, largest=4).any()


def test_soft_masks_are_moved_to_the_nearest_level():
    ring = picture("###.. #.#.# ###..")
    soft = torch.from_numpy(np.where(ring, 0.9, 0.2).astype(np.float32))
    cleaned = clean_soft(soft, None, largest=8, fill_holes=True)
    expected = soft.clone()
    expected[1, 1], expected[1, 4] = 0.5, 127 / 255
    torch.testing.assert_close(cleaned, expected)
    assert clean_soft(soft, None).equal(soft)


@pytest.mark.parametrize(("labels", "filled"), [("1,2", 0.1), ("1+2,2", 0.5)])
def test_a_hole_is_not_filled_where_another_exclusive_class_is(labels, filled):
    """A ring around a core: of regions that contain each other the hole belongs to both."""
    ring, core = picture("### #.# ###"), picture("... .#. ...")
    soft = np.stack([np.where(ring, 0.9, 0.1), np.where(core, 0.8, 0.1)])
    text = labels.replace("1+2", "whole=1+2")
    cleaned = clean_soft(torch.from_numpy(soft), find_classes(text), fill_holes=True)
    assert float(cleaned[0, 1, 1]) == pytest.approx(filled)
    assert float(cleaned[1, 1, 1]) == pytest.approx(0.8)


def test_a_component_that_is_removed_goes_to_no_other_class():
    """Where the first class is removed, the second is one half or more as well."""
    first, second = np.full((1, 5), 0.9), np.full((1, 5), 0.6)
    first[0, 2] = second[0, 2] = first[0, 3:] = 0.1
    first[0, 4], second[0, 3:] = 0.8, 0.6
    classes = find_classes("1,2")
    cleaned = clean_soft(torch.from_numpy(np.stack([first, second])), classes, largest=8)
    found = classes.masks(cleaned.numpy())
    assert found[0].tolist() == [[True, True, False, False, False]]
    assert found[1].tolist() == [[False, False, False, True, False]]


@pytest.mark.parametrize("temperature", [0.1, 0.3, 3, 100])
def test_a_temperature_changes_no_mask_in_memory_nor_in_a_file(temperature):
    """0.9, 0.99 and 0.999 are all nearly 1 at a low temperature: the last one still wins."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    soft = torch.tensor([[[0.9, 0.3, below]], [[0.99, 0.6, 0.2]], [[0.999, 0.59, 0.5]]])
    classes = find_classes("1,2,4")
    tempered = temper_soft(soft, classes, temperature)
    for values in (tempered.numpy(), soft_png(tempered) / 255):
        assert classes.masks(values).tolist() == classes.masks(soft.numpy()).tolist()
        assert classes.label_map(values).tolist() == [[4, 2, 4]]
    alone = temper_soft(soft[0], None, temperature)
    assert (alone >= 0.5).tolist() == (soft_png(alone) >= 128).tolist() == [[True, False, False]]


def test_a_temperature_where_no_two_classes_are_close():
    soft = torch.tensor([[0.0, 0.1, 0.5, 0.9, 1.0]])
    torch.testing.assert_close(temper_soft(soft, None, 2), temper(soft, 2), rtol=0, atol=0)
