"""Every layout of public data sets, as phantoms write it, from check to scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from helpers import DIFFUSION, NETWORK, read_csv, refused, script, succeeded
from PIL import Image

from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.layout_table import TABLE, compiled
from guided_diffusion.data.matching import files_below, match, recognised
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset, open_masks
from guided_diffusion.options.tools import PHANTOM_LAYOUTS
from guided_diffusion.tools.commands import SIZES
from guided_diffusion.tools.phantom_layouts import PICTURES, VOLUMES, write_layout
from guided_diffusion.tools.phantom_skin import make_skin
from guided_diffusion.tools.phantoms import make_patient

SIZE, DEPTH, PATIENTS = 24, 6, 4


class Row(NamedTuple):
    """A layout: its name, its first case and that of testing, and the flags that it needs."""

    name: str
    first: str
    tested: tuple[str, ...]
    channels: int = 3
    flags: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()


ALL = ("lesion0", "lesion1", "lesion2", "lesion3")
ROWS = {
    "nnunet2d": Row(
        "NNUNET", "lesion_000", ("lesion_002",), sampling=("--split", "{}/splits_final.json:0")
    ),
    "isic2018": Row("ISIC", "0000000", ("0000003",)),
    "busi": Row(
        "BUSI",
        "benign (1)",
        ("benign (1)", "benign (4)", "malignant (2)", "normal (3)"),
    ),
    "drive": Row("DRIVE", "01", ("04",)),
    "refuge": Row("REFUGE", "t0001", ("t0004",), flags=("--mask_labels", "disc=0+128")),
    "pairs": Row("PAIRS", "lesion0", ALL),
    "pairs_gt": Row("PAIRS", "lesion0", ALL),
    "suffix": Row("SUFFIX", "lesion0", ALL),
    "parts": Row("PAIRS", "lesion0", ("lesion3",)),
    "nnunet": Row(
        "NNUNET", "head_000", ("head_002",), 2, sampling=("--split", "{}/splits_final.json:0")
    ),
    "msd": Row("MSD", "HEAD_000", ("HEAD_001",), 2, sampling=("--split", "{}/split.txt")),
    "acdc": Row("ACDC", "patient001_frame01", ("patient004_frame01", "patient004_frame12"), 1),
    "brats2021": Row(
        "BRATS", "BraTS2021_00000", ("BraTS2021_00001",), 4, sampling=("--split", "{}/split.txt")
    ),
    "modalities": Row(
        "MODALITIES",
        "head00",
        ("head01",),
        2,
        ("--modalities", "t2,adc"),
        ("--split", "{}/split.txt"),
    ),
}


def phantoms(folder: Path, layout: str) -> Path:
    write_layout(layout, folder, 0, patients=PATIENTS, slices=DEPTH, size=SIZE, training=0.5)
    return folder


def known_mask(layout: str, number: int, position: int) -> np.ndarray:
    """The phantom's own mask, where the loader should find it."""
    if layout in PICTURES:
        return make_skin(0, number, size=SIZE).mask > 0
    return make_patient(0, number, shape=(SIZE, SIZE, DEPTH)).labels[..., position] > 0


def test_every_layout_of_phantoms_has_a_row() -> None:
    assert ROWS.keys() == PICTURES.keys() | VOLUMES.keys()
    assert set(PHANTOM_LAYOUTS) == SIZES.keys()


@pytest.mark.parametrize("layout", ROWS)
def test_from_check_to_scores(tmp_path: Path, layout: str) -> None:
    row, folder = ROWS[layout], phantoms(tmp_path / "data", layout)
    position, volume = DEPTH // 2, layout in VOLUMES
    (folder / "split.txt").write_text(f"{row.first} training\n{row.tested[0]} testing\n")
    data = ["--data_dir", folder, "--cache_dir", tmp_path / "cache", *row.flags]
    data += ["--slices", f"{position}:{position + 1}"] if volume else []

    # The layout is recognised, and the mask lies where the phantom has it.
    text = succeeded(script("check_data", *data, "--image_size", 16))
    assert f"layout     {row.name}" in text
    names = dict(zip(row.flags[::2], row.flags[1::2], strict=True))
    wanted = tuple(filter(None, names.get("--modalities", "").split(",")))
    dataset = open_dataset(folder, reading=Reading(modalities=wanted))
    index = dataset.names.index(f"{row.first}_slice{position:03d}" if volume else row.first)
    case = dataset[index]
    assert case.image.shape == (row.channels, SIZE, SIZE)
    if layout != "refuge":
        assert case.mask is not None
        np.testing.assert_array_equal(case.mask[0].numpy() > 0.5, known_mask(layout, 0, position))

    # Train, sample, and score against the folder itself.
    run = tmp_path / "run"
    command = ["--out_dir", run, *NETWORK, *DIFFUSION, "--max_steps", 1, "--batch_size", 2]
    succeeded(script("segmentation_train", *data, *command))
    chosen = [flag.format(folder) for flag in row.sampling]
    given = [item for item in data if item not in row.flags]
    command = ["--model_path", run, "--out_dir", tmp_path / "masks", "--num_ensemble", 1]
    succeeded(
        script("segmentation_sample", *given, *chosen, *command, "--use_ddim", True, "--steps", 1)
    )
    ending = f"_slice{position:03d}_mask.png" if volume else "_mask.png"
    drawn = {path.name for path in (tmp_path / "masks").glob("*_mask.png")}
    assert drawn == {f"{name}{ending}" for name in row.tested}
    against = ["--inp_pth", tmp_path / "masks", "--out_pth", folder, "--partial", True]
    succeeded(script("segmentation_env", *against))
    assert len(read_csv(tmp_path / "masks/scores.csv")) == len(row.tested)
