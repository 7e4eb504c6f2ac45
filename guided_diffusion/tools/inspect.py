"""A look at a folder as training would see it: what is there, and everything that would go wrong.

Training stops at the first file it cannot use; the check opens every case, goes on after each
error, and lists them all beside what a person would want to know of the set: sizes, ranges,
labels, empty masks, images that come twice. Wired by the composition root.
"""

from __future__ import annotations

import os
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from guided_diffusion.data.datasets import Case, Frame, SegmentationDataset, auto_frame
from guided_diffusion.data.folders import listing
from guided_diffusion.data.readers import label_values
from guided_diffusion.errors import UserError, gathering
from guided_diffusion.report.pictures import Tile, contact_sheet, write_picture

Result = TypeVar("Result")
MOST_LABELS = 12
NAMED = 5  # what readers.listing spells out
GROUP = 16


class Look(NamedTuple):
    """What one case is like, in numbers: ``error`` where it cannot be used, else the rest.

    ``levels`` is the lowest and highest value of each channel, ``covered`` the part of the image
    that each mask channel covers (None without a mask), ``left`` the same at the network's size,
    ``labels`` the values in the mask's file, ``digest`` a number that tells images apart.
    """

    name: str
    error: str = ""
    size: tuple[int, int] = (0, 0)
    fitted: tuple[int, int] = (0, 0)
    levels: tuple[tuple[float, float], ...] = ()
    covered: tuple[float, ...] | None = None
    left: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()
    digest: int = 0


@dataclass(frozen=True)
class Findings:
    """All that was found in a folder."""

    dataset: SegmentationDataset | None
    frame: Frame
    looks: list[Look] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def good(self) -> list[Look]:
        """The cases that can be used."""
        return [look for look in self.looks if not look.error]

    @property
    def problems(self) -> list[str]:
        """Everything that training would fail on, one line each."""
        lines = [line for error in self.errors for line in _lines(error)]
        seen = set(lines)
        bad = [look for look in self.looks if look.error and look.error not in seen]
        lines += [f"{look.name}: {look.error}" for look in bad]
        sizes = Counter(look.fitted for look in self.good)
        if self.frame.crop and len(sizes) > 1:
            lines.append(f"cases of {_counted(sizes, _size)} after --crop; --crop none resizes")
        return lines


class _Looks(Dataset[Look]):
    """A data set as facts; an error is one of them. Each mask's file is asked once for labels."""

    def __init__(self, dataset: SegmentationDataset, frame: Frame) -> None:
        self.dataset, self.frame = dataset, frame
        first: dict[Path | None, int] = {}
        for index, entry in enumerate(dataset.entries):
            first.setdefault(entry.mask, index)
        self.asked = {index: mask for mask, index in first.items() if mask is not None}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Look:
        """Facts of case ``index``."""
        try:
            case = self.dataset[index]
            labels = label_values(self.asked[index]) if index in self.asked else []
            return _look(case, self.frame.fit(case), labels)
        except UserError as error:
            return Look(self.dataset.names[index], error=str(error))


def _look(case: Case, fitted: Case, labels: Sequence[float]) -> Look:
    height, width = case.image.shape[-2:]
    return Look(
        case.name,
        size=(height, width),
        fitted=(fitted.image.shape[-2], fitted.image.shape[-1]),
        levels=tuple((float(channel.min()), float(channel.max())) for channel in case.image),
        covered=None if case.mask is None else _parts(case.mask >= 0.5),
        left=() if fitted.mask is None else _parts(fitted.mask),
        labels=tuple(labels),
        digest=zlib.crc32(case.image.numpy().tobytes()),
    )


def _parts(mask: Tensor) -> tuple[float, ...]:
    return tuple(float(channel.float().mean()) for channel in mask)


def look_at(
    open_it: Callable[[], SegmentationDataset],
    *,
    image_size: int,
    crop: str = "auto",
    workers: int = -1,
    parts_of: Callable[[SegmentationDataset], list[str]] | None = None,
) -> Findings:
    """Open a data set and every case in it, and gather what is wrong instead of raising it.

    Args:
        open_it: opens the data set as training does.
        image_size: of the network.
        crop: as the flag.
        workers: reading processes; -1: chosen by the number of cases and of cores.
        parts_of: the part of each case, where there is a split.
    """
    parts: list[str] = []
    with gathering() as errors:
        dataset = _kept(open_it, errors)
        if dataset is not None and parts_of is not None:
            parts = _kept(lambda: parts_of(dataset), errors) or []
    if dataset is None:
        return Findings(None, Frame(image_size), errors=errors)
    if not len(dataset):
        return Findings(dataset, Frame(image_size), errors=errors)

    frame = _frame(dataset, image_size, crop)
    looks = list(_look_at_all(_Looks(dataset, frame), workers))
    return Findings(dataset, frame, looks, errors, parts)


def _kept(call: Callable[[], Result], errors: list[UserError]) -> Result | None:
    """What a call returns; None where it cannot go on, and then the error is with the others."""
    try:
        return call()
    except UserError as error:
        errors.append(error)
        return None


def _frame(dataset: SegmentationDataset, image_size: int, crop: str) -> Frame:
    """The frame of training with the plain network, by the first case that can be read."""
    size = (0, 0)
    for index in range(len(dataset)):
        try:
            height, width = dataset[index].image.shape[-2:]
            size = (height, width)
            break
        except UserError:
            continue
    return auto_frame(dataset.layout, size, version="plain", image_size=image_size, crop=crop)


def _look_at_all(looks: _Looks, workers: int) -> Iterator[Look]:
    """Every look in order, read in groups of neighbours: slices of a volume stay together."""
    if workers < 0:
        workers = 0 if len(looks) < 200 else min(8, os.cpu_count() or 1)
    loader = DataLoader(looks, batch_size=GROUP, num_workers=workers, collate_fn=list)
    with tqdm(total=len(looks), unit="case", leave=False, disable=None) as progress:
        for group in loader:
            yield from group
            progress.update(len(group))


def findings_text(findings: Findings) -> str:
    """Everything found, for a person: a line for each fact, then the problems."""
    lines: list[str] = []
    if findings.dataset is not None:
        lines += [f"{name:<10} {text}" for name, text in _facts(findings, findings.dataset) if text]
    problems = findings.problems
    if not problems:
        return "\n".join([*lines, "", "nothing that training would fail on"])
    return "\n".join([*lines, "", "training would fail:", *(f"  {line}" for line in problems)])


def _facts(findings: Findings, dataset: SegmentationDataset) -> Iterator[tuple[str, str]]:
    good, patients = findings.good, set(dataset.patients) - {""}
    yield "folder", str(dataset.directory)
    volumes = {entry.volume for entry in dataset.entries} - {""}
    yield "layout", dataset.layout + (f", {len(volumes)} volumes by axial slices" * bool(volumes))
    yield "cases", f"{len(dataset)}, of which {len(good)} can be used"
    yield "patients", str(len(patients)) if patients else "unknown"
    if findings.parts:
        yield "split", _counted(Counter(findings.parts), lambda part: part or "in no part")
    yield "channels", f"{dataset.channels}" + _called(dataset.modalities)
    for note in dataset.notes:
        yield "note", note
    if not good:
        return
    yield "sizes", _counted(Counter(look.size for look in good), _size)
    yield "network", _counted(Counter(look.fitted for look in good), _size) + _how(findings)
    yield from _values(good, dataset.modalities)
    yield from _masks(good)
    yield "twice", _doubles(good)


def _called(modalities: Sequence[str]) -> str:
    return f" ({', '.join(modalities)})" if modalities else ""


def _how(findings: Findings) -> str:
    if findings.frame.crop:
        return f", {findings.frame.crop} pixels cut off every side"
    resized = sum(look.size != look.fitted for look in findings.good)
    return f", {resized} of them resized" if resized else ", none of them resized"


def _values(good: Sequence[Look], modalities: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The range of each channel over the set, and how many cases are one flat value."""
    for channel, levels in enumerate(zip(*(look.levels for look in good), strict=True)):
        low, high = min(low for low, _ in levels), max(high for _, high in levels)
        flat = sum(low == high for low, high in levels)
        name = modalities[channel] if modalities else f"channel {channel}"
        yield (
            "values" if channel == 0 else "",
            f"{name}: {low:.4g} to {high:.4g}; highest of a case {_middle(h for _, h in levels)}"
            + (f"; {flat} cases of one value" if flat else ""),
        )


def _masks(good: Sequence[Look]) -> Iterator[tuple[str, str]]:
    masks = [look for look in good if look.covered is not None]
    if not masks:
        yield "masks", "none"
        return
    labels = Counter(value for look in masks for value in look.labels)
    shown = [f"{value:g}" for value in sorted(labels)]
    yield (
        "labels",
        ", ".join(shown)
        if len(shown) <= MOST_LABELS
        else f"{shown[0]} to {shown[-1]}, {len(shown)} values (soft borders)",
    )
    empty = [look for look in masks if not any(look.covered or ())]
    yield "masks", f"{len(masks)}, of which {len(empty)} empty" + _examples(empty)
    for channel, parts in enumerate(zip(*(look.covered or () for look in masks), strict=True)):
        found = [100 * part for part in parts if part]
        name = f"class {channel + 1}" if len(masks[0].covered or ()) > 1 else "foreground"
        yield "", f"{name}: in {len(found)} cases, {_middle(found)} % of the image"
    lost = [look for look in masks if any(look.covered or ()) and not any(look.left)]
    if lost:
        yield "", f"{len(lost)} vanish at the network's size" + _examples(lost)


def _middle(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return "0"
    if found[0] == found[-1]:
        return f"{found[0]:.3g}"
    return f"{found[0]:.3g} to {found[-1]:.3g}, median {statistics.median(found):.3g}"


def _examples(looks: Sequence[Look]) -> str:
    return f" ({listing((look.name for look in looks), most=3)})" if looks else ""


def _doubles(good: Sequence[Look]) -> str:
    """Images that come under two ids: where they are on two sides, a score is worth little."""
    by_digest: dict[int, list[str]] = {}
    for look in good:
        if any(low < high for low, high in look.levels):
            by_digest.setdefault(look.digest, []).append(look.name)
    doubles = [" = ".join(names) for names in by_digest.values() if len(names) > 1]
    return f"{len(doubles)} images under several ids: {listing(doubles, most=3)}" if doubles else ""


def _counted(counter: Counter[Any], text: Callable[..., str]) -> str:
    """'240 x 240 (5), 512 x 512 (1)': the most frequent first."""
    common = [f"{text(key)} ({count})" for key, count in counter.most_common()]
    return listing(common)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _lines(error: UserError) -> list[str]:
    """An error, and a line for every case where its message names only a few."""
    if len(error.cases) <= NAMED:
        return [str(error)]
    return [str(error), *(f"  {case}" for case in error.cases)]


def write_sheet(findings: Findings, path: Path, *, cases: int) -> int:
    """Write a contact sheet of cases that are spread evenly over the set; returns how many."""
    dataset = findings.dataset
    good = {look.name for look in findings.good}
    usable = [i for i, name in enumerate(dataset.names) if name in good] if dataset else []
    if dataset is None or not usable:
        return 0
    places = np.linspace(0, len(usable) - 1, min(cases, len(usable))).round().astype(int)
    chosen = [dataset[usable[place]] for place in places]
    tiles = [
        Tile(case.image.numpy(), None if case.mask is None else _hard(case.mask), case.name)
        for case in chosen
    ]
    subtitle = f"{dataset.layout}  ·  {len(tiles)} of {len(dataset)} cases"
    title = "/".join(dataset.directory.resolve().parts[-2:])
    page = contact_sheet(tiles, title=title, subtitle=subtitle)
    write_picture(path, page, hint="Choose another --out.")
    return len(tiles)


def _hard(mask: Tensor) -> np.ndarray:
    return (mask >= 0.5).to(torch.uint8).numpy()
