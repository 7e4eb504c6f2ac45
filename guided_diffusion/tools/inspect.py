"""The check of a data folder: what training would read there, and all problems it would have.

Training stops at the first file it cannot use. The check opens every case, continues after each
error, and lists all errors together with the facts of the data set: sizes, intensity ranges,
labels, empty masks and duplicate images.
"""

from __future__ import annotations

import os
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from guided_diffusion.data.advice import intensity_advice, shortcut_notes
from guided_diffusion.data.datasets import Case, SegmentationDataset, raters_text, readable
from guided_diffusion.data.folders import counted, listing
from guided_diffusion.data.frames import Frame, auto_frame
from guided_diffusion.data.limits import limit, set_limit
from guided_diffusion.data.mask_values import distinct
from guided_diffusion.data.readers import sample_labels
from guided_diffusion.data.tumorloader import LabelledImages
from guided_diffusion.errors import UserError, gathering
from guided_diffusion.report.pictures import Tile, contact_sheet, write_picture
from guided_diffusion.scoring.calibration import dice_table

Result = TypeVar("Result")
MOST_LABELS = 12
NAMED = 5  # cases that the message of an error names
GROUP = 16


class CaseFacts(NamedTuple):
    """The facts of one case: ``error`` where it cannot be used, else the rest.

    ``levels`` is the lowest and highest value of each channel, ``covered`` the fraction of the
    image that each mask channel covers (None without a mask), ``left`` the same at the size of the
    network's input, ``labels`` the values in the masks' files, ``digest`` a checksum of the image,
    ``mean`` its mean. ``agreement`` is the mean Dice of two raters, where the case has several.
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
    mean: float = 0.0
    agreement: float | None = None


@dataclass(frozen=True)
class Findings:
    """The facts and errors of a folder; ``parts`` holds the part of each case in the split."""

    dataset: SegmentationDataset | None
    frame: Frame
    cases: list[CaseFacts] = field(default_factory=list)
    errors: list[UserError] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def good(self) -> list[CaseFacts]:
        """The cases that can be used."""
        return [case for case in self.cases if not case.error]

    @property
    def problems(self) -> list[str]:
        """Everything that training would fail on, one line for each problem."""
        lines = [line for error in self.errors for line in _lines(error)]
        seen = set(lines)
        bad = [case for case in self.cases if case.error and case.error not in seen]
        entries = self.dataset.entries if self.dataset is not None else []
        lines += _told_once(bad, {entry.name: entry.volume for entry in entries})
        sizes = Counter(case.fitted for case in self.good)
        if self.frame.crop and len(sizes) > 1:
            lines.append(f"cases of {_frequencies(sizes, _size)} after --crop; --crop none resizes")
        return lines


class _FactsDataset(Dataset[CaseFacts]):
    """The facts of each case, errors included; labels are read once for each mask file."""

    def __init__(self, dataset: SegmentationDataset, frame: Frame) -> None:
        self.dataset, self.frame = dataset, frame
        first: dict[tuple[Path, ...], int] = {}
        for index, entry in enumerate(dataset.entries):
            first.setdefault(entry.masks, index)
        self.label_files = {index: masks for masks, index in first.items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> CaseFacts:
        """The facts of case ``index``."""
        try:
            case = self.dataset[index]
            labels = {v for path in self.label_files.get(index, ()) for v in _label_values(path)}
            return _facts_of(case, self.frame.fit(case), sorted(labels))
        except UserError as error:
            return CaseFacts(self.dataset.names[index], error=str(error))


def _label_values(path: Path) -> list[float]:
    """The different values in a mask's file; of very many fractions some."""
    levels: list[float] = distinct(sample_labels(path).values).levels.tolist()
    return levels


def _facts_of(case: Case, fitted: Case, labels: Sequence[float]) -> CaseFacts:
    height, width = case.image.shape[-2:]
    return CaseFacts(
        case.name,
        size=(height, width),
        fitted=(fitted.image.shape[-2], fitted.image.shape[-1]),
        levels=tuple((float(channel.min()), float(channel.max())) for channel in case.image),
        covered=None if case.mask is None else _fractions(case.mask >= 0.5),
        left=() if fitted.mask is None else _fractions(fitted.mask),
        labels=tuple(labels),
        digest=zlib.crc32(case.image.numpy().tobytes()),
        mean=float(case.image.mean(dtype=torch.float64)),
        agreement=None if case.raters is None else _agreement(case.raters),
    )


def _fractions(mask: Tensor) -> tuple[float, ...]:
    return tuple(float(channel.mean(dtype=torch.float64)) for channel in mask)


def look_at(
    open_data: Callable[[], SegmentationDataset],
    *,
    image_size: int,
    crop: str = "auto",
    workers: int = -1,
    parts_of: Callable[[SegmentationDataset], list[str]] | None = None,
) -> Findings:
    """Open a data set and every case in it, and collect all errors instead of raising one.

    Args:
        open_data: opens the data set as training does.
        image_size: of the network's input.
        crop: the value of ``--crop``.
        workers: number of reading processes; -1 chooses by the numbers of cases and cores.
        parts_of: returns the part of each case, where there is a split.
    """
    parts: list[str] = []
    with gathering() as errors:
        dataset = _result_or_error(open_data, errors)
        if dataset is not None and parts_of is not None:
            parts = _result_or_error(lambda: parts_of(dataset), errors) or []
    if dataset is None:
        return Findings(None, Frame(image_size), errors=errors)
    if not len(dataset):
        return Findings(dataset, Frame(image_size), errors=errors)

    frame = _frame(dataset, image_size, crop)
    cases = list(_read_all(_FactsDataset(dataset, frame), workers))
    return Findings(dataset, frame, cases, errors, parts)


def _result_or_error(call: Callable[[], Result], errors: list[UserError]) -> Result | None:
    """Return what ``call`` returns; None where it fails, and then its error joins ``errors``."""
    try:
        return call()
    except UserError as error:
        errors.append(error)
        return None


def _frame(dataset: SegmentationDataset, image_size: int, crop: str) -> Frame:
    """Choose the frame as training the plain network does, by the first readable case."""
    case = next(readable(dataset, range(len(dataset))), None)
    height, width = (0, 0) if case is None else case.image.shape[-2:]
    return auto_frame(
        dataset.layout, (height, width), version="plain", image_size=image_size, crop=crop
    )


def _read_all(facts: _FactsDataset, workers: int) -> Iterator[CaseFacts]:
    """Read all facts in order, in groups of neighbours: slices of a volume stay together."""
    if workers < 0:
        workers = 0 if len(facts) < 200 else min(8, os.cpu_count() or 1)
    loader = DataLoader(
        facts,
        batch_size=GROUP,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=partial(set_limit, limit()),
    )
    with tqdm(total=len(facts), unit="case", leave=False, disable=None) as progress:
        for group in loader:
            yield from group
            progress.update(len(group))


def findings_text(findings: Findings) -> str:
    """Format the findings for printing: a line for each fact, then the problems."""
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
    layout = f"{dataset.layout}, {counted(len(volumes), 'volume')} by {dataset.plane} slices"
    yield "layout", layout if volumes else dataset.layout
    yield "cases", f"{len(dataset)}, of which {len(good)} can be used"
    yield "patients", str(len(patients)) if patients else "unknown"
    if findings.parts:
        yield "split", _frequencies(Counter(findings.parts), lambda part: part or "in no part")
    called = f" ({', '.join(dataset.modalities)})" if dataset.modalities else ""
    yield "channels", f"{dataset.channels}{called}"
    for note in dataset.notes:
        yield "note", note
    if not good:
        return
    yield "sizes", _frequencies(Counter(case.size for case in good), _size)
    yield "network", _frequencies(Counter(case.fitted for case in good), _size) + _how(findings)
    yield from _values(good, dataset.modalities)
    yield from _masks(good)
    yield "raters", _raters(good, dataset)
    yield "read as", dataset.masks.text
    yield "twice", _duplicates(good)
    for warning in _warnings(good, dataset):
        yield "warning", warning


def _how(findings: Findings) -> str:
    if findings.frame.crop:
        return f", {findings.frame.crop} pixels cut off every side"
    resized = sum(case.size != case.fitted for case in findings.good)
    return f", {resized} of them resized" if resized else ", none of them resized"


def _values(good: Sequence[CaseFacts], modalities: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The range of each channel over the data set, and how many cases have a single value."""
    for channel, levels in enumerate(zip(*(case.levels for case in good), strict=True)):
        low, high = min(low for low, _ in levels), max(high for _, high in levels)
        flat = sum(low == high for low, high in levels)
        name = modalities[channel] if modalities else f"channel {channel}"
        yield (
            "values" if channel == 0 else "",
            f"{name}: {low:.4g} to {high:.4g}; highest of a case {_spread(h for _, h in levels)}"
            + (f"; {counted(flat, 'case')} of one value" if flat else ""),
        )


def _warnings(good: Sequence[CaseFacts], dataset: SegmentationDataset) -> Iterator[str]:
    """What training says as well: about the masks as a whole, and about the intensities."""
    yield from dataset.masks.notes
    if isinstance(dataset, LabelledImages):
        yield from shortcut_notes(dataset.labels, {case.name: case.mean for case in good})
    levels = [level for case in good for level in case.levels]
    low, high = min(low for low, _ in levels), max(high for _, high in levels)
    if dataset.normalise == "none" and (advice := intensity_advice(low, high)):
        yield f"intensities from {low:.4g} to {high:.4g}; {advice}"


def _masks(good: Sequence[CaseFacts]) -> Iterator[tuple[str, str]]:
    masks = [case for case in good if case.covered is not None]
    if not masks:
        yield "masks", "none"
        return
    shown = [f"{value:g}" for value in sorted({value for case in masks for value in case.labels})]
    yield (
        "labels",
        ", ".join(shown)
        if len(shown) <= MOST_LABELS
        else f"{shown[0]} to {shown[-1]}, {len(shown)} values (soft borders)",
    )
    empty = [case for case in masks if not any(case.covered or ())]
    yield "masks", f"{len(masks)}, of which {len(empty)} empty" + _examples(empty)
    for channel, parts in enumerate(zip(*(case.covered or () for case in masks), strict=True)):
        found = [100 * part for part in parts if part]
        name = f"class {channel + 1}" if len(masks[0].covered or ()) > 1 else "foreground"
        yield "", f"{name}: in {counted(len(found), 'case')}, {_spread(found)} % of the image"
    lost = [case for case in masks if any(case.covered or ()) and not any(case.left)]
    if lost:
        yield "", f"{len(lost)} vanish at the network's size" + _examples(lost)


def _raters(good: Sequence[CaseFacts], dataset: SegmentationDataset) -> str:
    """How many raters there are, and how well two of them agree."""
    found = [case.agreement for case in good if case.agreement is not None]
    if not found:
        return ""
    agreement = f"mean Dice of two raters {statistics.fmean(found):.4f}"
    return f"{raters_text(dataset.entries)}, {agreement}; the masks above are their majority"


def _agreement(raters: Tensor) -> float:
    """Mean Dice of two raters, [R, K, H, W], over all pairs and classes; 1 for two empty masks."""
    masks = (raters >= 0.5).numpy()
    tables = [dice_table(masks[:, k], masks[:, k]) for k in range(masks.shape[1])]
    pairs = np.triu_indices(len(masks), 1)
    return float(np.mean([table[pairs] for table in tables]))


def _spread(values: Iterable[float]) -> str:
    """'0.0417 to 4.17, median 4.17' for some numbers."""
    found = sorted(values)
    if not found:
        return "0"
    if found[0] == found[-1]:
        return f"{found[0]:.3g}"
    return f"{found[0]:.3g} to {found[-1]:.3g}, median {statistics.median(found):.3g}"


def _examples(cases: Sequence[CaseFacts]) -> str:
    return f" ({listing((case.name for case in cases), most=3)})" if cases else ""


def _duplicates(good: Sequence[CaseFacts]) -> str:
    """Images that have several ids: in two parts of a split they would invalidate the scores."""
    by_digest: dict[int, list[str]] = {}
    for case in good:
        if any(low < high for low, high in case.levels):
            by_digest.setdefault(case.digest, []).append(case.name)
    equal = [" = ".join(names) for names in by_digest.values() if len(names) > 1]
    number = counted(len(equal), "image")
    return f"{number} under several ids: {listing(equal, most=3)}" if equal else ""


def _frequencies(counter: Counter[Any], text: Callable[..., str]) -> str:
    """'240 x 240 (5), 512 x 512 (1)': the most frequent first."""
    common = [f"{text(key)} ({count})" for key, count in counter.most_common()]
    return listing(common)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _lines(error: UserError) -> list[str]:
    """The message of an error, and a line for every case where it names only some of them."""
    if len(error.cases) <= NAMED:
        return [str(error)]
    return [str(error), *(f"  {case}" for case in error.cases)]


def _told_once(bad: Sequence[CaseFacts], volume_of: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each error: that of a file for all slices, that of a set for all cases."""
    owners: dict[str, set[str]] = {}
    for case in bad:
        owners.setdefault(case.error, set()).add(volume_of.get(case.name) or case.name)
    groups: dict[tuple[str, str], list[CaseFacts]] = {}
    for case in bad:
        volume = volume_of.get(case.name, "")
        alone = volume and len(owners[case.error]) == 1
        key = (volume, case.error.partition(": ")[0]) if alone else ("", case.error)
        groups.setdefault(key, []).append(case)
    for (volume, _), cases in groups.items():
        names = [case.name for case in cases]
        if len(cases) == 1:
            yield f"{names[0]}: {cases[0].error}"
        elif volume:
            yield f"{volume}, {len(cases)} slices: {cases[0].error}"
        else:
            yield f"{len(cases)} cases ({listing(names, most=3)}): {cases[0].error}"


def write_sheet(findings: Findings, path: Path, *, cases: int) -> int:
    """Write a contact sheet of cases spread evenly over the data set; return their number."""
    dataset = findings.dataset
    good = {case.name for case in findings.good}
    usable = [i for i, name in enumerate(dataset.names) if name in good] if dataset else []
    if dataset is None or not usable:
        return 0
    places = np.linspace(0, len(usable) - 1, min(cases, len(usable))).round().astype(int)
    tiles = []
    for place in places:
        case = dataset[usable[place]]
        mask = None if case.mask is None else (case.mask >= 0.5).numpy()
        tiles.append(Tile(case.image.numpy(), mask, case.name))
    subtitle = f"{dataset.layout}  ·  {len(tiles)} of {len(dataset)} cases"
    title = "/".join(dataset.directory.resolve().parts[-2:])
    page = contact_sheet(tiles, title=title, subtitle=subtitle)
    write_picture(path, page, hint="Choose another --out.")
    return len(tiles)
