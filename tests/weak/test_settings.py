"""What masks depend on: their fingerprint, the trained times, and settings that leave no map."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill as fill_weights
from PIL import Image

from guided_diffusion.data.tumorloader import LabelledImages, SlicedArrays, TumourImages
from guided_diffusion.errors import UserError
from guided_diffusion.options.parser import parse
from guided_diffusion.options.weak import (
    SEGMENT_WEAKLY,
    ImageDiffusionOptions,
    ImageNetworkOptions,
    WeakOptions,
)
from guided_diffusion.script_util import create_model
from guided_diffusion.weak import maps
from guided_diffusion.weak.models import ImageModel, load_image_model
from guided_diffusion.weak.predict import WeakSegmenter, score_masks, segment_images

SMALL = ["--img_size", "16", "--num_channels", "32", "--channel_mult", "1", "--num_res_blocks", "1"]
SIZES = {"image_size": 16, "num_channels": 32, "channel_mult": "1", "num_res_blocks": 1}


@pytest.fixture(params=[True])
def bare(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Bare weights of a diffusion of images, with classes unless parametrised otherwise."""
    network = ImageNetworkOptions(**SIZES, class_cond=request.param, in_ch=1)
    net = create_model(network, ImageDiffusionOptions(), of_images=True)
    fill_weights(net)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def loaded(path: Path, *words: str) -> ImageModel:
    flags = parse(SEGMENT_WEAKLY, ["--model_path", str(path), *SMALL, *words])
    return load_image_model(flags, folder=str(path.parent), whole_schedule=True)


def images(root: Path, names: str, *, white: bool = False) -> LabelledImages:
    """Images of 16 x 16 with a lesion, all of it if ``white``."""
    for name in names:
        for folder in ("tumor", "seg"):
            pixels = np.random.default_rng(ord(name)).integers(0, 255, (16, 16), np.uint8)
            (root / folder).mkdir(parents=True, exist_ok=True)
            pixels = np.full_like(pixels, 255) if white else pixels // 128 * 255
            Image.fromarray(pixels).save(root / folder / f"{name}1.png")
    return TumourImages(root)


def test_the_fingerprint_has_all_that_bare_weights_are_taken_for(bare: Path) -> None:
    """With the same weights and settings of maps, it tells what the flags say of the network."""
    said = (
        [],
        ["--noise_schedule", "cosine"],
        ["--diffusion_steps", "500"],
        ["--predict_xstart", "True"],
        ["--rescale_timesteps", "False", "--diffusion_steps", "500"],
        ["--num_heads", "2"],
    )
    options = WeakOptions("encoded", level=40)
    found = [
        WeakSegmenter(options, loaded(bare, *words), None, seed=0).fingerprint for words in said
    ]
    assert len(set(found)) == len(said)
    again = WeakSegmenter(options, loaded(bare), None, seed=0).fingerprint
    assert again == found[0]


def test_only_trained_times_are_used(bare: Path) -> None:
    """Of a respaced schedule a network knows some times alone; its level is the last one below."""
    model = loaded(bare, "--trained_steps", "100")
    respaced = replace(model.diffusion, timesteps=(0, 11, 22, 33, 44, 55, 66, 77, 88, 99))
    model = replace(model, diffusion=respaced)

    def times(**options: object) -> list[float]:
        chosen = WeakOptions(level=60, **options)  # type: ignore[arg-type]
        return [level.t for level in WeakSegmenter(chosen, model, None, seed=0).levels]

    assert times(method="encoded", steps=10) == [55, 44, 33, 22, 11, 0]
    assert times(method="encoded", steps=2) == [55, 22, 0]
    assert times(method="counterfactual", steps=3) == [55, 22, 0, -1]
    assert times(method="cdm", steps=2, stride=2) == [55, 33, 11]
    with pytest.raises(UserError, match="would end below time 0"):
        times(method="cdm", steps=3, stride=2)


@pytest.mark.parametrize(
    ("bare", "method", "label", "level", "problem"),
    [
        (True, "encoded", "truth", 0, "--level 0: --method encoded carries images to a higher"),
        (False, "encoded", "diffusion", 40, "the diffusion was trained without classes"),
        (False, "encoded", "truth", 40, ""),
        (True, "otsu", "diffusion", 3, ""),
        (True, "gradcam", "diffusion", 3, ""),
    ],
    indirect=["bare"],
)
def test_what_would_leave_all_masks_empty_is_refused_and_no_more(
    bare: Path, method: str, label: str, level: int, problem: str
) -> None:
    options = WeakOptions(method, guided=True, label=label, level=level)
    if problem:
        with pytest.raises(UserError, match=problem):
            WeakSegmenter(options, loaded(bare), None, seed=0)
    else:
        WeakSegmenter(options, loaded(bare), None, seed=0)


def test_predictions_that_are_not_numbers_are_an_error(bare: Path, tmp_path: Path) -> None:
    model = loaded(bare)
    with torch.no_grad():
        model.net.label_emb.weight[1] = torch.nan
    segmenter = WeakSegmenter(WeakOptions("cdm", level=40), model, None, seed=0)
    with pytest.raises(UserError, match=r"a1, b1.*it predicted NaN or infinite values"):
        segment_images(segmenter, images(tmp_path / "data", "ab"), tmp_path / "masks")
    assert not list((tmp_path / "masks").glob("*.png"))


def test_a_folder_of_other_data_and_settings_is_refused(tmp_path: Path) -> None:
    first, second = (images(tmp_path / names, names) for names in ("ab", "cd"))
    otsu = WeakSegmenter(WeakOptions("otsu"), None, None, seed=0)
    twice = WeakSegmenter(WeakOptions("otsu", cuts=2), None, None, seed=0)
    segment_images(otsu, first, tmp_path / "masks")
    before = {path: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    with pytest.raises(UserError, match=r"--results_dir .*holds masks of another run, of a1, b1"):
        segment_images(twice, second, tmp_path / "masks")
    assert {path: path.read_bytes() for path in (tmp_path / "masks").iterdir()} == before
    segment_images(twice, first, tmp_path / "masks")


def test_another_class_index_draws_and_scores_anew(tmp_path: Path) -> None:
    """The masks and the truths of NumPy volumes follow from the label that is looked for."""
    volume = np.zeros((2, 2, 8, 8), np.float32)
    volume[:, 0, 2:4, 2:4] = 1
    volume[0, 1, 2:4, 2:4], volume[1, 1, :4] = 1, 4
    (tmp_path / "preprocessed").mkdir()
    np.save(tmp_path / "preprocessed" / "v_0.npy", volume)
    split = {"train": [], "val": [], "test": ["v_0.npy"]}
    (tmp_path / "splits.pkl").write_bytes(pickle.dumps([split]))
    folder, otsu = tmp_path / "masks", WeakSegmenter(WeakOptions("otsu"), None, None, seed=0)
    areas = {}
    for index in (1, 4):
        dataset = SlicedArrays(tmp_path, parts=("test",), class_index=index)
        segment_images(otsu, dataset, folder)
        score_masks(dataset, folder)
        areas[index] = [
            int((np.asarray(Image.open(folder / kind.format(z))) > 0).sum())
            for kind in ("v_0_slice{:03d}_mask.png", "truth/v_0_slice{:03d}.png")
            for z in range(2)
        ]
    assert areas == {1: [4, 0, 4, 0], 4: [0, 4, 0, 32]}


def test_the_rank_of_a_map_is_unknown_where_the_lesion_is_the_whole_image(tmp_path: Path) -> None:
    dataset, folder = images(tmp_path / "data", "a", white=True), tmp_path / "masks"
    segment_images(WeakSegmenter(WeakOptions("otsu"), None, None, seed=0), dataset, folder)
    lines = score_masks(dataset, folder)
    found = json.loads((folder / "maps.json").read_text("utf-8"))
    assert found == {"images": 1, "auroc": None, "average_precision": 1.0}
    assert any("AUROC unknown, average precision 1.0000" in line for line in lines)


def test_values_that_differ_by_rounding_are_not_cut_again() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[0, :2], heat[1, 0] = 0.9, np.nextafter(np.float32(0.9), np.float32(1))
    for cuts in (1, 2, 5):
        assert maps.mask_of(heat, cuts=cuts).sum() == 3
    heat[1, 0] = 0.95
    assert maps.mask_of(heat, cuts=2).sum() == 1
