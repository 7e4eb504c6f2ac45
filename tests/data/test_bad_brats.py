"""NIfTI files and BraTS folders that cannot be used: each error names the file and a hint."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from brats_folders import (
    AFFINE,
    ALL,
    LONG,
    SIZE,
    flat,
    save,
    solid,
    write_slice,
    write_volumes,
)

from guided_diffusion.bratsloader import BRATSDataset, BRATSDataset3D, open_brats
from guided_diffusion.data.datasets import Reading
from guided_diffusion.errors import UserError


def no_gzip(folder: Path) -> None:
    (write_slice(folder / "1") / LONG.format("t1")).write_bytes(b"no gzip at all" * 9)


def cut_gzip(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t1")
    path.write_bytes(path.read_bytes()[:-20])


def empty_file(folder: Path) -> None:
    (write_slice(folder / "1") / LONG.format("flair")).write_bytes(b"")


def flipped_bit(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t1")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def wrong_magic(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t1")
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[344:348] = b"BAD\0"
    path.write_bytes(gzip.compress(bytes(raw)))


def short_voxels(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t2")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40]))


def a_folder_called_so(folder: Path) -> None:
    write_slice(folder / "2")
    path = write_slice(folder / "1") / LONG.format("t2")
    path.unlink()
    path.mkdir()


def dangling_link(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t2")
    path.unlink()
    path.symlink_to(folder / "nowhere.nii.gz")


def nan_voxel(folder: Path) -> None:
    values = flat("t1")
    values[0, 0] = np.nan
    save(write_slice(folder / "1") / LONG.format("t1"), values)


def inf_label(folder: Path) -> None:
    values = flat("seg")
    values[0, 0] = np.inf
    save(write_slice(folder / "1") / LONG.format("seg"), values)


def nan_offset(folder: Path) -> None:
    path = save(write_slice(folder / "1") / LONG.format("t1"), flat("t1"))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:120] = np.array([1, np.nan], np.float32).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))


def no_voxels(folder: Path) -> None:
    for name in ALL:
        save(folder / "1" / LONG.format(name), np.zeros((0, 8), np.float32))


def colour_voxels(folder: Path) -> None:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(write_slice(folder / "1") / LONG.format("t1"), np.zeros(SIZE, kind))


def half_labels(folder: Path) -> None:
    save(write_slice(folder / "1") / LONG.format("seg"), flat("seg") * np.float32(0.4))


def image_as_label(folder: Path) -> None:
    noise = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)
    save(write_slice(folder / "1") / LONG.format("seg"), noise)


def four_dimensions(folder: Path) -> None:
    save(write_slice(folder / "1") / LONG.format("t1ce"), np.zeros((*SIZE, 1, 3), np.float32))


def one_dimension(folder: Path) -> None:
    save(write_slice(folder / "1") / LONG.format("t1ce"), np.zeros(6, np.float32))


def swapped_slice(folder: Path) -> None:
    save(write_slice(folder / "1") / LONG.format("t1ce"), flat("t1ce").T.copy())


def turned_slice(folder: Path) -> None:
    path = write_slice(folder / "1") / LONG.format("t1ce")
    save(path, flat("t1ce"), AFFINE[:, [1, 0, 2, 3]])


def two_of_a_kind(folder: Path) -> None:
    write_slice(write_slice(folder / "1"), LONG.replace("080", "081"))


def incomplete_case(folder: Path) -> None:
    write_slice(folder / "1")
    write_slice(folder / "2", names=("t1", "seg"))


def label_only(folder: Path) -> None:
    write_slice(folder / "1")
    write_slice(folder / "2", names=("seg",))


def labels_nowhere(folder: Path) -> None:
    write_slice(folder / "1", names=ALL[:4])


def ids_that_meet(folder: Path) -> None:
    write_slice(folder / "x/y")
    write_slice(folder / "x_y")


def volume_cut(folder: Path) -> None:
    path = write_volumes(folder) / "p2/p2_t1ce.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])


def volume_nan(folder: Path) -> None:
    values = solid("t2").astype(np.float32)
    values[3, 3, 3] = np.nan
    save(write_volumes(folder) / "p1/p1_t2.nii.gz", values)


def volume_of_another_grid(folder: Path) -> None:
    save(write_volumes(folder) / "p1/p1_flair.nii.gz", solid("flair")[..., :4])


def volume_flipped(folder: Path) -> None:
    path = write_volumes(folder) / "p1/p1_seg.nii.gz"
    save(path, solid("seg"), AFFINE @ np.diag([1, -1, 1, 1]))


def volume_of_five_axes(folder: Path) -> None:
    for name in ALL:
        save(folder / f"1/1_{name}.nii.gz", np.zeros((2, 2, 2, 2, 2), np.float32))


def flat_volume_among_deep(folder: Path) -> None:
    for name in ALL:
        save(write_volumes(folder) / f"p2/p2_{name}.nii.gz", flat(name))


def volume_without_depth(folder: Path) -> None:
    for name in ALL:
        save(folder / f"1/1_{name}.nii.gz", np.zeros((6, 8, 0), np.float32))


def volume_half_labels(folder: Path) -> None:
    save(write_volumes(folder) / "p1/p1_seg.nii.gz", solid("seg") * np.float32(0.3))


def volume_complex(folder: Path) -> None:
    save(write_volumes(folder) / "p1/p1_t1.nii.gz", solid("t1").astype(np.complex64))


def volume_vanished(folder: Path) -> None:
    path = write_volumes(folder) / "p2/p2_t2.nii.gz"
    path.unlink()
    path.symlink_to(folder / "nowhere.nii.gz")


def nothing_named(folder: Path) -> None:
    save(folder / "1/brain.nii.gz", flat("t1"))


BAD: list[tuple[Callable[[Path], None], str, str]] = [
    (no_gzip, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (cut_gzip, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (empty_file, "flair_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (flipped_bit, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (wrong_magic, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (short_voxels, "t2_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (a_folder_called_so, "1: the case lacks t2; the data set has t1, t1ce, t2", "Add the file"),
    (dangling_link, "t2_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (nan_voxel, "t1_080_w.nii.gz: has NaN or infinite values", "Repair"),
    (inf_label, "seg_080_w.nii.gz: has NaN or infinite values", "Repair"),
    (nan_offset, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (no_voxels, "t1_080_w.nii.gz: has no pixels", ""),
    (colour_voxels, "t1_080_w.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (half_labels, "seg_080_w.nii.gz: holds 0, 1.6: neither labels", "interpolated"),
    (image_as_label, "seg_080_w.nii.gz: holds -2.3", "that it is a mask"),
    (four_dimensions, "t1ce_080_w.nii.gz: its shape is 6 x 8 x 1 x 3, but a slice", "Cut volumes"),
    (one_dimension, "t1ce_080_w.nii.gz: its shape is 6", "Cut volumes"),
    (
        swapped_slice,
        "t1ce_080_w.nii.gz: its size is 8 x 6, but that of brats_train_001_t1",
        "on one grid",
    ),
    (turned_slice, "t1ce_080_w.nii.gz: its size is 6 x 8", "on one grid"),
    (two_of_a_kind, "1: has 2 flair files", "a separate folder"),
    (incomplete_case, "2: the case lacks t1ce, t2, flair", "Add the file"),
    (label_only, "2: the case lacks t1, t1ce, t2, flair", "Add the file"),
    (labels_nowhere, "1: the case lacks seg", "Add the file"),
    (ids_that_meet, "more than one case with the id x_y", "Rename one"),
    (volume_cut, "p2_t1ce.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (volume_nan, "p1_t2.nii.gz: has NaN or infinite values", "Repair"),
    (
        volume_of_another_grid,
        "p1_flair.nii.gz: its grid is 6 x 8 x 4, but that of p1_t1.nii.gz is 6 x 8 x 5",
        "on one grid",
    ),
    (
        volume_flipped,
        "p1_seg.nii.gz: its affine (LAS) has other orientation or origin than p1_t1.nii.gz (L",
        "one grid",
    ),
    (volume_of_five_axes, "its shape is 2 x 2 x 2 x 2 x 2", "separate data sets"),
    (flat_volume_among_deep, "its shape is 6 x 8", "separate data sets"),
    (volume_without_depth, "its shape is 6 x 8 x 0", ""),
    (volume_half_labels, "p1_seg.nii.gz: holds 0, 0.3, which do not fit", "that it is a mask"),
    (volume_complex, "p1_t1.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (volume_vanished, "p2_t2.nii.gz: cannot be read as a NIfTI", "Restore it"),
    (nothing_named, "has no NIfTI file named by a modality", "above the case folders"),
]


@pytest.mark.parametrize("kept", ["memory", "disk"])
@pytest.mark.parametrize(("build", "found", "hint"), BAD, ids=[row[0].__name__ for row in BAD])
def test_bad_files_are_named(
    tmp_path: Path, kept: str, build: Callable[[Path], None], found: str, hint: str
) -> None:
    data = tmp_path / "data"
    build(data)
    with pytest.raises(UserError) as caught:
        dataset = open_brats(
            data, reading=Reading(cache_dir=tmp_path / "cache" if kept == "disk" else None)
        )
        for index in range(len(dataset)):
            dataset[index]
    message = str(caught.value)
    assert message.startswith(str(data)) and "\n" not in message
    assert found in message and hint in message.partition(found)[2]


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_a_volume_that_disappears_meanwhile(tmp_path: Path, kept: str) -> None:
    data = write_volumes(tmp_path / "data")
    cache = tmp_path / "cache" if kept == "disk" else None
    dataset = BRATSDataset3D(data, reading=Reading(cache_dir=cache))
    dataset[0]
    shutil.rmtree(data / "p1")
    with pytest.raises(UserError, match=r"p1_t1\.nii\.gz: cannot be read as a NIfTI"):
        dataset[1]


def test_links_that_loop_and_names_with_blanks(tmp_path: Path) -> None:
    write_slice(tmp_path / "Müller, 7 Jahre")
    (tmp_path / "Müller, 7 Jahre/up").symlink_to(tmp_path)
    assert BRATSDataset(tmp_path).names == ["Müller, 7 Jahre"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--cache_dir.*file/below.*cannot be written"):
        BRATSDataset3D(
            write_volumes(tmp_path / "data"), reading=Reading(cache_dir=tmp_path / "file/below")
        )
