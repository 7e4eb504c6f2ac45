"""Splits: the cases that are chosen, and an error for every patient in two parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guided_diffusion.data.datasets import Entry, SegmentationDataset
from guided_diffusion.data.splits import narrowed, part_of_cases, read_split
from guided_diffusion.errors import UserError, gathering

CASES = [("000001", "p 1"), ("000002", "p 1"), ("000003", "p2"), ("000004", "p2"), ("x", "")]


class Listed(SegmentationDataset):
    layout = "LISTED"

    def read_image(self, entry: Entry) -> tuple[torch.Tensor, None]:
        return torch.zeros(1, 2, 2), None

    def read_mask(self, entry: Entry) -> None:
        return None


def dataset() -> Listed:
    entries = [Entry(name, (Path(name),), None, patient=patient) for name, patient in CASES]
    return Listed(Path("data"), entries, channels=1)


def split(folder: Path, text: str) -> Path:
    path = folder / "split.txt"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_patients_and_cases_with_comments_and_blanks(tmp_path: Path) -> None:
    path = split(tmp_path, "# made by hand\n\np 1\ttraining\np2   testing # two slices\n")
    assert read_split(path) == {"p 1": "training", "p2": "testing"}

    train, test = (narrowed(dataset(), path, part) for part in ("training", "testing"))
    assert train.names == ["000001", "000002"] and train.patients == ["p 1", "p 1"]
    assert test.names == ["000003", "000004"] and test[1].name == "000004"
    assert train.notes == [f"{path}: 2 of 5 cases are for training; 1 case in no part"]


def test_a_case_may_be_named_beside_its_patient(tmp_path: Path) -> None:
    path = split(tmp_path, "p 1 training\n000001 training\nx validation\n")
    assert part_of_cases(dataset(), path) == ["training", "training", "", "", "validation"]


def test_the_whole_data_set_is_unchanged(tmp_path: Path) -> None:
    whole = dataset()
    narrowed(whole, split(tmp_path, "x testing"), "testing")
    assert len(whole) == 5 and whole.notes == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("p 1 training\np 1 testing\n", "p 1 is in testing and in training"),
        ("p2 testing\n000003 training\n", "000003 is in testing and in training"),
        ("000003 training\n000004 testing\n", "patient p2 is in testing and in training"),
        (
            "p 1 training\n000009 testing\n",
            "data has no case or patient 000009; its ids are such as 000001",
        ),
        ("p 1 train\n", "line 1: 'p 1 train' is not"),
        ("training\n", "line 1: 'training' is not"),
        ("x testing\n", "has no case for training"),
        ("# nobody\n", "has no case for training"),
    ],
)
def test_errors_name_the_line_or_the_patient(tmp_path: Path, text: str, found: str) -> None:
    path = split(tmp_path, text)
    with pytest.raises(UserError) as caught:
        narrowed(dataset(), path, "training")
    assert str(caught.value).startswith(str(path)) and found in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="the split cannot be read"):
            read_split(path)
    (tmp_path / "latin.txt").write_bytes("M\xfcller training".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_split(tmp_path / "latin.txt")


def test_the_check_gets_all_errors_at_once(tmp_path: Path) -> None:
    text = "000001 training\n000002 testing\n000003 training\n000004 testing\nnobody testing\n"
    with gathering() as errors:
        part_of_cases(dataset(), split(tmp_path, text))
    assert [str(error).partition(": ")[2].split(";")[0].split(".")[0] for error in errors] == [
        "data has no case or patient nobody",
        "patient p 1 is in testing and in training",
        "patient p2 is in testing and in training",
    ]
