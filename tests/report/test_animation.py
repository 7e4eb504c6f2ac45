"""The animated picture of a case: its frames, its colours and its size."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from guided_diffusion.report.animation import (
    END,
    MASKS,
    Moment,
    animate,
    mosaic,
    square_number,
    write_animation,
)
from guided_diffusion.report.canvas import FUSED


def moments(members, steps=18):
    generator = np.random.default_rng(0)
    disc = np.hypot(*np.mgrid[-32:32, -32:32]) < 12
    noisy = [generator.random((members, 64, 64)) for _ in range(steps)]
    kept = [
        255 * np.clip(disc + (1 - k / steps) * (x - 0.5) * 2, 0, 1) for k, x in enumerate(noisy)
    ]
    mean = disc.astype(np.float32)
    states = [Moment(900 - 50 * k, x.astype(np.uint8), mean) for k, x in enumerate(kept)]
    final = np.repeat(255 * disc[None].astype(np.uint8), members, axis=0)
    return [*states, Moment(0, final, mean)]


def test_a_picture_of_nine_noisy_members_is_small(tmp_path):
    some = moments(9)
    image = np.random.default_rng(1).random((3, 64, 64)).astype(np.float32)
    spread = np.linspace(0, 0.5, 64 * 64).reshape(64, 64)
    frames = animate(image, some, some[-1].clean, spread, name="a")
    assert len(frames) == 20 and [ms for _, ms in frames[-2:]] == [MASKS, END]
    write_animation(tmp_path / "a_members.gif", frames)
    assert (tmp_path / "a_members.gif").stat().st_size < 700_000
    with Image.open(tmp_path / "a_members.gif") as picture:
        shown = [frame.convert("RGB").copy() for frame in ImageSequence.Iterator(picture)]
        assert picture.info["loop"] == 0 and len(shown) == 20
    assert shown[0].size == frames[0][0].shape[1::-1]
    last = np.asarray(shown[-1]).astype(int)
    assert (np.abs(last - FUSED).max(axis=-1) < 20).sum() > 50, "the outline keeps its colour"
    bright = (last[..., 0] > 230) & (last[..., 1] > 200) & (last[..., 2] < 190)
    assert bright.sum() > 50, "as does the largest uncertainty"


@pytest.mark.parametrize(("members", "shown"), [(1, 1), (3, 3), (5, 4), (9, 9), (25, 9)])
def test_as_many_members_are_shown_as_fill_a_square(members, shown):
    assert square_number(members) == shown


def test_a_mosaic_keeps_the_proportions_of_its_masks():
    masks = [np.full((10, 20), k / 3, np.float32) for k in range(4)]
    panel = mosaic(masks, (204, 204))
    assert panel.shape == (204, 204, 3)
    found = {tuple(np.argwhere(np.isclose(panel[..., 0], k / 3)).min(axis=0)) for k in (1, 2, 3)}
    assert found == {(50, 104), (104, 0), (104, 104)}
