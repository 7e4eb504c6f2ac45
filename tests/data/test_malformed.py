"""Malformed pictures, tables and folders: each is one message that names the file, or is handled.

NIfTI files have their own table in ``test_brats``, and more folders theirs in ``test_datasets``.
"""

from __future__ import annotations

import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset

TABLE = "ISBI2016_ISIC_Part1_Training_GroundTruth.csv"
DATA = "ISBI2016_ISIC_Part1_Training_Data"
TRUTH = "ISBI2016_ISIC_Part1_Training_GroundTruth"


def noise(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def square(value: int = 255, kind: type = np.uint8) -> np.ndarray:
    values = np.zeros((24, 32), kind)
    values[8:16, 8:16] = value
    return values


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)
    return path


def pair(folder: Path, stem: str = "a", ending: str = "png") -> Path:
    save(folder / f"images/{stem}.{ending}", noise())
    save(folder / f"masks/{stem}.{ending}", square())
    return folder


def isic(
    folder: Path, rows: str = "0,{data}/ISIC_0000001.jpg,{truth}/ISIC_0000001_Seg.png"
) -> Path:
    save(folder / DATA / "ISIC_0000001.jpg", noise())
    save(folder / TRUTH / "ISIC_0000001_Seg.png", square())
    text = ",img,seg\n" + rows.format(data=DATA, truth=TRUTH, here=folder) + "\n"
    (folder / TABLE).write_text(text, encoding="utf-8")
    return folder


def cut(path: Path, part: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])


def volume(path: Path, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones(shape, np.float32), np.diag([1, 2, 3, 1])), path)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ----------------------------------------------------------------- pictures that cannot be used


def no_bytes(folder: Path) -> None:
    (pair(folder) / "images/a.png").write_bytes(b"")


def cut_png(folder: Path) -> None:
    cut(pair(folder) / "images/a.png", 0.6)


def cut_png_mask(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", noise(channels=1))
    cut(folder / "masks/a.png", 0.5)


def cut_jpg(folder: Path) -> None:
    cut(pair(folder, ending="jpg") / "images/a.jpg", 0.5)


def cut_tif(folder: Path) -> None:
    cut(pair(folder, ending="tif") / "images/a.tif", 0.5)


def cut_bmp(folder: Path) -> None:
    cut(pair(folder, ending="bmp") / "images/a.bmp", 0.5)


def web_page(folder: Path) -> None:
    (pair(folder, ending="jpg") / "images/a.jpg").write_text("<html>404</html>")


def changed_bytes(folder: Path) -> None:
    path = pair(folder) / "images/a.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def bomb(folder: Path) -> None:
    (pair(folder) / "images/a.png").write_bytes(png(60_000, 60_000))


def no_width(folder: Path) -> None:
    (pair(folder) / "images/a.png").write_bytes(png(0, 24))


def no_pixels(folder: Path) -> None:
    (pair(folder) / "images/a.png").write_bytes(png(32, 24))


def negative(folder: Path) -> None:
    (pair(folder) / "images/a.png").unlink()
    save(folder / "images/a.tif", np.full((24, 32), -5, np.int32))


def folder_called_png(folder: Path) -> None:
    (pair(folder) / "images/a.png").unlink()
    (folder / "images/a.png").mkdir()


def dangling_link(folder: Path) -> None:
    (pair(folder) / "images/a.png").unlink()
    (folder / "images/a.png").symlink_to(folder / "gone.png")


def circular_link(folder: Path) -> None:
    (pair(folder) / "masks/a.png").unlink()
    (folder / "masks/a.png").symlink_to(folder / "masks/a.png")


# -------------------------------------------------------------------- masks that are no masks


def photo_as_mask(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", noise())


def coloured_classes(folder: Path) -> None:
    colours = np.zeros((24, 32, 4), np.uint8)
    colours[..., 3] = 255
    colours[:9, :, 0] = 200
    save(pair(folder) / "masks/a.png", colours)


def transparent_mask(folder: Path) -> None:
    mask = np.zeros((24, 32, 4), np.uint8)
    mask[..., 3] = square()
    save(pair(folder) / "masks/a.png", mask)


def transparent_grey_mask(folder: Path) -> None:
    mask = np.stack([np.full((24, 32), 255, np.uint8), square()], axis=-1)
    save(pair(folder) / "masks/a.png", Image.fromarray(mask, "LA"))


def labels_in_jpeg(folder: Path) -> None:
    pair(folder, ending="jpg")
    save(folder / "masks/a.jpg", square(12))


def turned_mask(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", square().T)


def float_mask(folder: Path) -> None:
    (pair(folder) / "masks/a.png").unlink()
    save(folder / "masks/a.tif", square(3, np.float32) / 2)


def nan_mask(folder: Path) -> None:
    (pair(folder) / "masks/a.png").unlink()
    save(folder / "masks/a.tif", np.full((24, 32), np.nan, np.float32))


# ------------------------------------------------------------------------------ own folders


def one_id(folder: Path) -> None:
    pair(pair(folder, "a:b"), "a_b")


def both_spellings(folder: Path) -> None:
    pair(pair(folder, unicodedata.normalize("NFC", "ä")), unicodedata.normalize("NFD", "ä"))


def images_is_a_file(folder: Path) -> None:
    (folder / "masks").mkdir()
    (folder / "images").write_text("")
    save(folder / "masks/a.png", square())


def unknown_format(folder: Path) -> None:
    save(folder / "images/a.gif", square())
    save(folder / "masks/a.png", square())


def volume_with_slice(folder: Path) -> None:
    volume(folder / "images/a.nii.gz", 8, 8, 3)
    volume(folder / "masks/a.nii.gz", 8, 8)


def slice_then_volume(folder: Path) -> None:
    for side in ("images", "masks"):
        volume(folder / side / "a.nii.gz", 8, 8)
        volume(folder / side / "b.nii.gz", 8, 8, 3)


def time_series(folder: Path) -> None:
    for side in ("images", "masks"):
        volume(folder / side / "a.nii", 8, 8, 3, 2)


# -------------------------------------------------------------------------------- ISIC's CSV


def no_rows(folder: Path) -> None:
    (isic(folder) / TABLE).write_text(",img,seg\n")


def empty_table(folder: Path) -> None:
    (isic(folder) / TABLE).write_text("")


def one_column(folder: Path) -> None:
    isic(folder, "0")


def no_mask_column(folder: Path) -> None:
    isic(folder, "0,{data}/ISIC_0000001.jpg")


def empty_mask_field(folder: Path) -> None:
    isic(folder, "0,{data}/ISIC_0000001.jpg,")


def elsewhere(folder: Path) -> None:
    isic(folder, "0,/home/anna/ISIC_0000001.jpg,/home/anna/ISIC_0000001_Segmentation.png")


def windows_path(folder: Path) -> None:
    isic(folder, r"0,C:\data\ISIC_0000001.jpg,C:\data\ISIC_0000001_Segmentation.png")


def row_twice(folder: Path) -> None:
    row = "0,{data}/ISIC_0000001.jpg,{truth}/ISIC_0000001_Seg.png"
    isic(folder, f"{row}\n{row}")


def utf16(folder: Path) -> None:
    table = isic(folder) / TABLE
    table.write_text(table.read_text(), encoding="utf-16")


def table_is_a_folder(folder: Path) -> None:
    (isic(folder) / TABLE).unlink()
    (folder / TABLE).mkdir()


def picture_is_a_folder(folder: Path) -> None:
    (isic(folder) / DATA / "ISIC_0000001.jpg").unlink()
    (folder / DATA / "ISIC_0000001.jpg").mkdir()


def same_number(folder: Path) -> None:
    for side in ("one", "two"):
        save(folder / side / "ISIC_0000001.jpg", noise())
        save(folder / side / "ISIC_0000001_Segmentation.png", square())


def no_mask_by_id(folder: Path) -> None:
    save(folder / "ISIC_0000001.jpg", noise())


HINT = re.compile(r"\. [A-Z].*\.$")
UNREADABLE = "cannot be read as a picture"
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (no_bytes, f"images/a.png: {UNREADABLE}"),
    (cut_png, f"images/a.png: {UNREADABLE}"),
    (cut_png_mask, f"masks/a.png: {UNREADABLE}"),
    (cut_jpg, f"images/a.jpg: {UNREADABLE}"),
    (cut_tif, f"images/a.tif: {UNREADABLE}"),
    (cut_bmp, f"images/a.bmp: {UNREADABLE}"),
    (web_page, f"images/a.jpg: {UNREADABLE}"),
    (changed_bytes, f"images/a.png: {UNREADABLE}"),
    (bomb, f"images/a.png: {UNREADABLE}"),
    (no_width, f"images/a.png: {UNREADABLE}"),
    (no_pixels, f"images/a.png: {UNREADABLE}"),
    (negative, "images/a.tif: has values from -5 to -5"),
    (folder_called_png, f"images/a.png: {UNREADABLE}"),
    (dangling_link, f"images/a.png: {UNREADABLE}"),
    (circular_link, f"masks/a.png: {UNREADABLE}"),
    (photo_as_mask, "masks/a.png: is a coloured picture"),
    (coloured_classes, "masks/a.png: is a coloured picture"),
    (transparent_mask, "masks/a.png: the mask has transparent and opaque parts"),
    (transparent_grey_mask, "masks/a.png: the mask has transparent and opaque parts"),
    (labels_in_jpeg, "masks/a.jpg: is a JPEG mask whose brightest value is 1"),
    (turned_mask, "masks/a.png: the mask is 32 x 24, but its image is 24 x 32"),
    (float_mask, "masks/a.tif: holds 0, 1.5: neither labels"),
    (nan_mask, "masks/a.tif: has NaN or infinite values"),
    (one_id, "more than one case with the id a_b"),
    (both_spellings, "have the same stem"),
    (images_is_a_file, "looks like PAIRS, but has no image images/<case>"),
    (unknown_format, "images: has no image"),
    (volume_with_slice, "masks/a.nii.gz: its shape is 8 x 8"),
    (slice_then_volume, "b.nii.gz: its shape is 8 x 8 x 3"),
    (time_series, "a.nii: its shape is 8 x 8 x 3 x 2"),
    (no_rows, "has no ISIC picture"),
    (empty_table, "has no ISIC picture"),
    (one_column, f"{TABLE}: 1 of 1 pictures missing"),
    (no_mask_column, f"{TABLE}: 1 of 1 pictures missing"),
    (empty_mask_field, "masks missing: the mask of 0000001"),
    (elsewhere, "pictures missing: /home/anna/ISIC_0000001.jpg"),
    (windows_path, "pictures missing: "),
    (row_twice, "more than one case with the id 0000001"),
    (utf16, f"{TABLE}: the table cannot be read"),
    (table_is_a_folder, f"{TABLE}: the table cannot be read"),
    (picture_is_a_folder, f"{TABLE}: 1 of 1 pictures missing"),
    (same_number, "more than one case with the id 0000001"),
    (no_mask_by_id, "ISIC_0000001_Segmentation.png"),
]


@pytest.mark.parametrize(("build", "found"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_refused_in_one_line_that_names_the_file(
    tmp_path: Path, build: Callable[[Path], object], found: str
) -> None:
    build(tmp_path)
    with pytest.raises(UserError) as caught:
        read_all(open_dataset(tmp_path))
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert found in message and HINT.search(message.partition(found)[2])


def read_all(dataset: SegmentationDataset) -> list[int]:
    """The foreground pixels of every case, at the size of the network's input."""
    framed = ResizedDataset(dataset, Frame(24))
    cases = [framed[index] for index in range(len(framed))]
    for case in cases:
        assert case.image.isfinite().all() and case.mask is not None
        assert set(case.mask.unique().tolist()) <= {0, 1}
    return [int(case.mask.sum()) for case in cases]


# --------------------------------------------------------------------- odd, but handled


def spelled_apart(folder: Path) -> None:
    """As a Mac unpacks umlauts: one character in one folder, two in the other."""
    save(folder / f"images/{unicodedata.normalize('NFD', 'Müller 1')}.png", noise())
    save(folder / f"masks/{unicodedata.normalize('NFC', 'Müller 1')}.png", square())


def no_text(folder: Path) -> None:
    for side, pixels in (("images", noise()), ("masks", square())):
        path = save(folder / side / "x.png", pixels)
        path.rename(path.with_name(os.fsdecode(b"\xff\n.png")))


def capitals(folder: Path) -> None:
    pair(folder)
    (folder / "images/a.png").rename(folder / "images/a.PNG")
    (folder / "images").rename(folder / "Images")


def wrong_ending(folder: Path) -> None:
    """A PNG that is called a JPEG is still a PNG."""
    pair(folder)
    for side in ("images", "masks"):
        (folder / side / "a.png").rename(folder / side / "a.jpg")


def left_by_macs(folder: Path) -> None:
    pair(folder)
    for name in ("images/._a.png", "masks/.DS_Store", "images/Thumbs.db"):
        (folder / name).write_bytes(b"\0")


def folder_loop(folder: Path) -> None:
    (pair(folder) / "images/again").symlink_to(folder / "images")


def grey_in_rgb(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", np.stack([square()] * 3, axis=-1))


def opaque_alpha(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", Image.fromarray(square()).convert("RGBA"))


def palette_mask(folder: Path) -> None:
    """White is the foreground, whatever its index."""
    picture = Image.fromarray(1 - square(1), "P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    save(pair(folder) / "masks/a.png", picture)


def palette_image(folder: Path) -> None:
    save(pair(folder) / "images/a.png", Image.fromarray(noise()).quantize(16))


def deep_mask(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", square(65535, np.uint16))


def deep_labels(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", square(4, np.uint16))


def one_bit(folder: Path) -> None:
    save(pair(folder) / "masks/a.png", square().astype(bool))


def cmyk(folder: Path) -> None:
    pair(folder, ending="jpg")
    save(folder / "images/a.jpg", Image.fromarray(noise()).convert("CMYK"))


def byte_order_mark(folder: Path) -> None:
    table = isic(folder) / TABLE
    table.write_text(table.read_text(), encoding="utf-8-sig")


def absolute_paths(folder: Path) -> None:
    isic(folder, "0,{here}/{data}/ISIC_0000001.jpg,{here}/{truth}/ISIC_0000001_Seg.png")


def semicolons(folder: Path) -> None:
    """As Excel saves a table where the comma is for decimals."""
    table = isic(folder) / TABLE
    table.write_text(table.read_text().replace(",", ";"))


def other_system(folder: Path) -> None:
    """Backslashes, carriage returns, quotes, blanks and an empty last line."""
    isic(folder)
    row = rf'"0", {DATA}\ISIC_0000001.jpg ,"{TRUTH}\ISIC_0000001_Seg.png"'
    (folder / TABLE).write_bytes(f",img,seg\r\n{row}\r\n\r\n".encode())


def both_sides_without_table(folder: Path) -> None:
    """Only the training side may be trained on."""
    for side in ("Training", "Test"):
        place = folder / f"ISBI2016_ISIC_Part1_{side}_Data"
        number = f"000000{len(side)}"
        save(place / f"ISIC_{number}.jpg", noise())
        save(place / f"ISIC_{number}_Segmentation.png", square())


HANDLED: list[tuple[Callable[[Path], object], str]] = [
    (spelled_apart, "Müller 1"),
    (no_text, "__"),
    (capitals, "a"),
    (wrong_ending, "a"),
    (left_by_macs, "a"),
    (folder_loop, "a"),
    (grey_in_rgb, "a"),
    (opaque_alpha, "a"),
    (palette_mask, "a"),
    (palette_image, "a"),
    (deep_mask, "a"),
    (deep_labels, "a"),
    (one_bit, "a"),
    (cmyk, "a"),
    (byte_order_mark, "0000001"),
    (absolute_paths, "0000001"),
    (semicolons, "0000001"),
    (other_system, "0000001"),
    (both_sides_without_table, "0000008"),
]


@pytest.mark.parametrize(("build", "name"), HANDLED, ids=[row[0].__name__ for row in HANDLED])
def test_handled_with_the_right_mask(
    tmp_path: Path, build: Callable[[Path], object], name: str
) -> None:
    build(tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.names == [unicodedata.normalize("NFC", name)]
    (pixels,) = read_all(dataset)
    assert abs(pixels - 64 * 24 / 32) <= 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut(path, 0.5)])
def test_a_file_that_breaks_during_the_run_is_one_message(
    tmp_path: Path, workers: int, damage: Callable[[Path], object]
) -> None:
    for stem in "abcd":
        pair(tmp_path, stem)
    batches = training_batches(
        ResizedDataset(open_dataset(tmp_path), Frame(16)), 1, seed=0, workers=workers
    )
    assert isinstance(next(batches).image, torch.Tensor)
    for path in (tmp_path / "images").iterdir():
        damage(path)
    with pytest.raises(UserError, match=rf"images/\w.png: {UNREADABLE}"):
        for _ in range(12):
            next(batches)


@pytest.mark.parametrize("target", ["itself", "gone"])
def test_a_data_folder_that_is_a_broken_link(tmp_path: Path, target: str) -> None:
    link = tmp_path / "itself"
    link.symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="itself: does not exist"):
        open_dataset(link)
