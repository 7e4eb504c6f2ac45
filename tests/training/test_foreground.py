"""Which cases ``--foreground_share`` draws, and how those with a lesion are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import DIFFUSION, NETWORK, refused, script, succeeded
from loops import Discs, equal, make_loop, resumed
from PIL import Image

from guided_diffusion.checkpoint import load_checkpoint
from guided_diffusion.data.batches import Foreground, training_batches
from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.volumes import VolumeDataset, VolumeStore
from guided_diffusion.errors import UserError
from guided_diffusion.inference import cases
from guided_diffusion.layouts import open_dataset
from guided_diffusion.training import foreground
from guided_diffusion.training.foreground import find_lesions

LESIONS = (1, 4, 6)


def names(steps: int, share: float, batch_size: int = 4, **options: Any) -> list[list[str]]:
    batches = training_batches(
        Discs(9), batch_size, seed=2, foreground=Foreground(share, LESIONS), **options
    )
    drawn = [batch.names for batch in islice(batches, steps)]
    batches.close()
    return drawn


def flat(batches: Sequence[Sequence[str]]) -> list[str]:
    return [name for batch in batches for name in batch]


def plain(count: int) -> list[str]:
    """What is drawn without a share, case by case."""
    return flat([b.names for b in islice(training_batches(Discs(9), 1, seed=2), count)])


@pytest.mark.parametrize(("share", "of_ten"), [(0.5, 5), (0.3, 3), (0.9, 9), (0.0, 0), (1.0, 10)])
def test_the_share_is_exact_and_both_parts_have_epochs(share: float, of_ten: int) -> None:
    """Of ten places in a row that many are from the lesions alone; the rest is as it was."""
    drawn = flat(names(18, share, batch_size=10))
    own = [place for place in range(180) if int((place + 1) * of_ten) // 10 > place * of_ten // 10]
    assert len(own) == 18 * of_ten
    assert [name for place, name in enumerate(drawn) if place not in own] == plain(180 - len(own))
    lesions = [drawn[place] for place in own]
    for start in range(0, len(lesions) - 2, 3):
        assert sorted(lesions[start : start + 3]) == [f"disc{index}" for index in LESIONS]
    epochs = {tuple(lesions[start : start + 3]) for start in range(0, len(lesions) - 2, 3)}
    assert len(epochs) > 3 or not of_ten


def test_half_of_every_batch_has_a_lesion_at_least() -> None:
    lesions = {f"disc{index}" for index in LESIONS}
    assert all(len(lesions.intersection(batch)) >= 2 for batch in names(20, 0.5, batch_size=10))
    counts = Counter(flat(names(90, 0.5)))
    assert {counts[name] for name in lesions} == {60 + 20}  # 180 / 3, and 180 / 9
    assert {counts[f"disc{index}"] for index in range(9)} == {20, 80}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_processes_draws_the_same_from_any_step(workers: int) -> None:
    full = names(12, 0.3, workers=workers)
    for world in (2, 4):
        parts = [names(12, 0.3, 4 // world, rank=r, world_size=world) for r in range(world)]
        assert [flat(batches) for batches in zip(*parts, strict=True)] == full
    assert names(7, 0.3, first_step=5, workers=workers) == full[5:]


def test_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    rest = {"foreground": Foreground(0.6, (0, 3))}
    for name in ("at once", "in two"):
        (tmp_path / name).mkdir()
    at_once = make_loop(tmp_path / "at once", max_steps=4, rest=rest).run_loop()
    half = make_loop(tmp_path / "in two", max_steps=2, rest=rest).run_loop()
    in_two = resumed(make_loop(tmp_path / "in two", max_steps=4, rest=rest), half).run_loop()
    one, other = load_checkpoint(at_once), load_checkpoint(in_two)
    assert equal(one.model, other.model) and equal(one.training, other.training)
    alike = load_checkpoint(make_loop(tmp_path / "in two", max_steps=4).run_loop())
    assert not equal(one.model, alike.model)


# ------------------------------------------------------------------------------ finding them


def write_pictures(folder: Path, marked: Sequence[int], count: int = 6) -> Path:
    """Pictures of 32 x 32 with a square in the masks of those that are ``marked``."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for index in range(count):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255 * (index in marked)
        for name, pixels in (("images", mask // 3 + 40), ("masks", mask)):
            Image.fromarray(pixels).save(folder / name / f"case{index}.png")
    return folder


def test_masks_alone_are_read_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(write_pictures(tmp_path, [1, 4]))
    read: list[str] = []
    whole = type(dataset).read_mask

    def counting(self: Any, entry: Any) -> torch.Tensor | None:
        read.append(entry.name)
        return whole(self, entry)

    monkeypatch.setattr(type(dataset), "read_mask", counting)
    monkeypatch.setattr(type(dataset), "read_image", None)
    assert find_lesions(dataset, Frame(16)) == [1, 4]
    assert sorted(read) == dataset.names
    (tmp_path / "masks" / "case4.png").write_bytes(b"cut")  # an error once it is drawn
    assert find_lesions(dataset, Frame(16)) == [1]
    (tmp_path / "masks" / "case1.png").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"case1\.png"):
        find_lesions(dataset, Frame(16))


def test_what_counts_is_the_mask_that_is_trained_on(tmp_path: Path) -> None:
    """A lesion of one pixel vanishes at a fourth of the size, one in the border by a crop."""
    folder = write_pictures(tmp_path, [0])
    mask = np.zeros((32, 32), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(folder / "masks" / "case1.png")
    dataset = open_dataset(folder)
    assert find_lesions(dataset, Frame(32)) == [0, 1]
    assert find_lesions(dataset, Frame(8)) == find_lesions(dataset, Frame(16, crop=8)) == [0]


def test_a_class_of_the_label_0_is_no_lesion(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path, [1, 4])
    for file in (folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(file)) // 255).save(file)
    for classes, expected in (("0,1", [1, 4]), ("0,x=2", [])):
        reading = Reading(classes=find_classes(classes))
        assert find_lesions(open_dataset(folder, reading=reading), Frame(16)) == expected


def test_raters_count_as_they_are_trained_on(tmp_path: Path) -> None:
    """Of case 1, one of three raters marks something; the majority does not."""
    write_pictures(tmp_path, [], count=2)
    (tmp_path / "masks").rename(tmp_path / "rater0")
    for rater in (1, 2):
        (tmp_path / f"rater{rater}").mkdir()
        for case in (0, 1):
            mask = np.full((32, 32), 255 * (case == 0 or rater == 2), np.uint8)
            Image.fromarray(mask).save(tmp_path / f"rater{rater}" / f"case{case}.png")
    dataset = open_dataset(tmp_path)
    assert find_lesions(dataset, Frame(16), rater_choice="random") == [0, 1]
    assert find_lesions(dataset, Frame(16), rater_choice="majority") == [0]


def test_a_volume_is_decoded_once_and_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for volume in range(3):
        mask = np.zeros((16, 16, 4), np.uint8)
        mask[2:12, 2:12, volume : volume + 2] = 1
        for name, values in (("images", mask * 7 + 1.5), ("labels", mask)):
            file = tmp_path / name / f"v{volume}.nii.gz"
            nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), file)
    dataset = open_dataset(tmp_path)
    assert isinstance(dataset, VolumeDataset) and len(dataset) == 12
    _ = dataset.masks.kind
    expected = [4 * volume + plane for volume in range(3) for plane in (volume, volume + 1)]

    decoded: list[str] = []
    decode = VolumeStore._decoded
    monkeypatch.setattr(
        VolumeStore,
        "_decoded",
        lambda store, path, *rest: decoded.append(path.parent.name) or decode(store, path, *rest),
    )
    assert find_lesions(dataset, Frame(16)) == expected
    assert decoded == ["labels"] * 3

    shares: list[list[int]] = []
    monkeypatch.setattr(
        foreground, "all_gather_object", lambda part: shares.append(part[0]) or [part]
    )
    monkeypatch.setattr(cases, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(cases, "rank", lambda rank=rank: rank)
        find_lesions(dataset, Frame(16))
    assert [{index // 4 for index in share} for share in shares] == [{0, 2}, {1}]
    assert sorted(shares[0] + shares[1]) == expected


def train(folder: Path, out: Path, *more: object) -> Any:
    command = ["--data_dir", folder, "--out_dir", out, *NETWORK, *DIFFUSION, "--max_steps", 1]
    return script("segmentation_train", *command, "--batch_size", 2, *more)


def test_from_the_command_line(tmp_path: Path) -> None:
    some, every, none = (
        write_pictures(tmp_path / name, marked)
        for name, marked in (("some", [1, 4]), ("every", range(6)), ("none", []))
    )
    share = ("--foreground_share", 0.5)
    assert "2 of 6 cases have a lesion" in succeeded(train(some, tmp_path / "a", *share))
    text = succeeded(train(every, tmp_path / "b", *share))
    assert "--foreground_share has no effect: every case has a lesion" in text
    error = refused(train(none, tmp_path / "c", *share))
    assert "--foreground_share 0.5: no case of" in error
    assert "between 0 and 1" in refused(train(some, tmp_path / "d", "--foreground_share", 1.5))
