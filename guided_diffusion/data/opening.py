"""Opening a folder: its parts, bare images to segment, and what to say of one that is not known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.data.folders import folders_in, listing
from guided_diffusion.data.layout_table import TABLE, Layout, part_of
from guided_diffusion.data.matching import (
    FEW_FOLDERS,
    Files,
    bare,
    files_below,
    nearest,
    recognised,
)
from guided_diffusion.data.table_loader import open_layout
from guided_diffusion.errors import UserError

PAGE = "docs/data.md"
FEW_WRAPPED = 3


def open_bare(folder: Path, names: Sequence[str], reading: Reading) -> SegmentationDataset | None:
    """Open images that lie in a folder, to segment them; None where there are none."""
    found = bare(folder, [name for name in names if not name.startswith(".")])
    if found is None:
        return None
    dataset = open_layout(*found, wanted="testing", reading=reading)
    if dataset and len(reading.modalities) == dataset.channels:
        dataset.modalities = reading.modalities  # as the checkpoint has them, in its order
    return dataset


def require_chosen(dataset: SegmentationDataset, reading: Reading) -> None:
    """Refuse a choice of modalities or slices that the data set cannot make."""
    if reading.modalities and not dataset.modalities:
        raise UserError(
            "--modalities",
            f"{','.join(reading.modalities)} cannot be chosen in the {dataset.layout} layout, "
            "whose channels have no names",
            "Omit --modalities, or name the files <case>_<modality>; a model that was trained on "
            "modalities needs them.",
        )
    if any(end is not None for end in reading.slices) and not dataset.entries[0].volume:
        first, end = ("" if end is None else end for end in reading.slices)
        raise UserError(
            "--slices",
            f"{first}:{end} cannot be selected, for {dataset.directory} holds pictures or slices, "
            "not volumes",
            "Omit --slices.",
        )


def part_folders(folder: Path) -> dict[str, Path]:
    """The folders train, val and test below a folder, by part; empty unless it has two of them."""
    found: dict[str, Path] = {}
    for path in folders_in(folder):
        if len(path.name) > 2 and (part := part_of(path.name)):
            found.setdefault(part, path)
    return found if len(found) > 1 else {}


def part_folder(parts: Mapping[str, Path], wanted: str) -> Path | None:
    """The folder of a part; that of validation where there is none for testing."""
    return parts.get(wanted) or (parts.get("validation") if wanted == "testing" else None)


def is_wrapped(folder: Path) -> bool:
    """Whether a folder is only that around a data set, whose own layout counts."""
    within = folders_in(folder)
    if len(within) > FEW_WRAPPED:
        return False
    table = [layout for layout in TABLE if not layout.by_pairs]
    return any(part_folders(path) or recognised(files_below(path), table=table) for path in within)


def unrecognised(
    folder: Path,
    files: Files,
    table: Sequence[Layout],
    others: Sequence[str],
    *,
    is_one: Callable[[Path], bool],
    test: bool,
) -> UserError:
    """Say what a folder looks like, what is missing, and where the data may be instead.

    ``others`` are the names of layouts that are not in the table; ``is_one`` says whether a folder
    is a data set.
    """
    for within in folders_in(folder)[:FEW_FOLDERS]:
        with suppress(UserError, OSError):
            if is_one(within):
                problem = f"is no data set, but {within.name} below it is one"
                return UserError(folder, problem, f"Pass {within}.")
    near: dict[str, str] = {}
    for layout, missing in nearest(files, table):
        near.setdefault(layout.name, missing)
    if near:
        looks = "; or like ".join(f"{name}, but {missing}" for name, missing in near.items())
        return UserError(folder, f"looks like {looks}", f"See {PAGE}, which shows every layout.")
    state = f"holds {contents(folder)}"
    if files.paths:
        example = files.path(0).relative_to(folder)
        problem = f"holds images such as {example}, but no masks that belong to them by their names"
        hint = f"Name each mask <case>_mask, or put it into masks/; {PAGE} shows every layout."
        if test:
            problem = f"holds images such as {example}, but in no layout that is known"
            hint = f"Pass the folder that directly holds the images; {PAGE} shows every layout."
        return UserError(folder, problem, hint)
    names = ", ".join(dict.fromkeys([*others, *(layout.name for layout in table)]))
    return UserError(
        folder,
        f"{state}, but neither pictures nor NIfTI files",
        f"Pass the folder of a data set; {PAGE} shows the layouts: {names}.",
    )


def contents(folder: Path) -> str:
    """The first names in a folder, for a message."""
    return listing(sorted(path.name for path in folder.iterdir())) or "nothing"
