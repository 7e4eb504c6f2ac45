"""The run's cache: the same cases, decoded once, for every process, and gone afterwards."""

from __future__ import annotations

import gc
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.cache import CachedDataset
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=generator).numpy()
        for side, picture in (("images", pixels), ("masks", 255 * (pixels[..., 0] > 128))):
            path = tmp_path / f"data/{side}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.astype("uint8")).save(path)
    return tmp_path


def cached(folder: Path, **options: int) -> CachedDataset:
    framed = ResizedDataset(open_dataset(folder / "data"), Frame(16))
    return CachedDataset(framed, directory=folder, **options)


def test_cases_are_equal_and_decoded_once(folder: Path) -> None:
    cases = cached(folder)
    first = [cases[index] for index in range(6)]
    for path in (folder / "data").rglob("*.png"):
        path.unlink()
    for index, case in enumerate(first):
        again = cases[index]
        assert torch.equal(again.image, case.image) and torch.equal(again.mask, case.mask)
        assert again.name == case.name == str(index)
        assert again.image.dtype == again.mask.dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_processes_share_it(folder: Path, workers: int) -> None:
    cases = cached(folder)
    epoch = list(islice(training_batches(cases, 2, seed=0, workers=workers), 3))
    assert len(list(cases.folder.glob("*.npy"))) == 6
    plain = list(islice(training_batches(cases.dataset, 2, seed=0), 3))
    for one, other in zip(epoch, plain, strict=True):
        assert one.names == other.names
        assert torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)


def test_the_size_is_bounded(folder: Path) -> None:
    one = 3 * 16 * 16 * 4 + 16 * 16
    cases = cached(folder, most_bytes=2 * one)
    for index in reversed(range(6)):
        cases[index]
    assert sorted(path.name for path in cases.folder.iterdir()) == ["0.npy", "1.npy"]


def test_a_full_disk_ends_the_caching_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = cached(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    assert cases[0].name == "0" and cases.most_bytes == 0
    assert list(cases.folder.iterdir()) == []


def test_a_broken_copy_is_read_again(folder: Path) -> None:
    cases = cached(folder)
    case = cases[3]
    (cases.folder / "3.npy").write_bytes(b"\x93NUMPY")
    assert torch.equal(cases[3].image, case.image)


def test_the_folder_is_removed_with_the_run_but_not_with_a_copy(folder: Path) -> None:
    cases = cached(folder)
    copy = pickle.loads(pickle.dumps(cases))
    place = cases.folder
    assert copy.folder == place
    del copy
    gc.collect()
    assert place.is_dir()
    del cases
    gc.collect()
    assert not place.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_disappears_during_the_run_is_one_message(folder: Path, workers: int) -> None:
    batches = training_batches(cached(folder, most_bytes=0), 2, seed=0, workers=workers)
    next(batches)
    for path in (folder / "data/masks").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"masks/\d.png: cannot be read as a picture"):
        for _ in range(9):
            next(batches)
