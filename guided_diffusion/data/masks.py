"""What the values of a data set's masks mean, decided once for the set.

A set of masks is a *label map* (classes are named, or its values are whole numbers that are small
or far apart), a set of *soft masks* (nearly all pixels lie at two extremes, as in JPEG and with
anti-aliased borders), or it is refused. :class:`MaskSet` decides from a sample of the files, when
the first mask is read, and :class:`MaskKind` holds every mask against that decision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from torch import Tensor

from guided_diffusion.data.classes import CAVITY, ENHANCING, FLAG, Classes
from guided_diffusion.data.folders import counted, is_nifti
from guided_diffusion.data.geometry import Placed
from guided_diffusion.data.mask_kind import MaskKind
from guided_diffusion.data.mask_values import (
    MOST_LABEL,
    Values,
    distinct,
    has_levels,
    has_two_ends,
    is_crowded,
    is_label_map,
    is_soft,
    soft_range,
    union,
)
from guided_diffusion.data.readers import Array, StoredLabels, read_labels, sample_labels
from guided_diffusion.errors import UserError

SAMPLE = 200
"""Most masks that are looked at, evenly spread over the set."""
SAMPLED_PIXELS = 2**28
"""About how many pixels are looked at, so that large volumes do not hold up a start..."""
LEAST = 10
"""...but this many masks at least."""
SOFT_SHARE = 0.98
"""Of soft masks together, the part of the pixels that is near the extremes, at least."""


class Label(NamedTuple):
    """A mask of the sample: its file, its values, and how it is stored.

    ``lossy`` and ``indexed`` are those of :class:`StoredLabels`; ``bilevel`` has 1 bit, whose 1 is
    white beside greys of any depth.
    """

    path: Path
    values: Values
    lossy: bool = False
    indexed: bool = False
    bilevel: bool = False


class MaskSet:
    """The masks of a data set, whose kind is decided when the first of them is read.

    Args:
        paths: the files, each once, in the order of the cases.
        classes: the mask's channels; None for a single one.
        brats: '2023' where the files are named as since BraTS 2023, 'older' for other BraTS data,
            else empty.
        read: decodes a file, or a part of it, to be looked at.
        most: files that are looked at; None for 200.
    """

    def __init__(
        self,
        paths: Sequence[Path | None],
        classes: Classes | None = None,
        *,
        brats: str = "",
        read: Callable[[Path], StoredLabels] = sample_labels,
        most: int | None = None,
    ) -> None:
        self._read = read
        self._most = most
        self._paths = paths
        self.classes = classes
        self._brats = brats
        self._kind: MaskKind | None = None

    @property
    def kind(self) -> MaskKind:
        """The decision; made from at most 200 masks, and the same in every process."""
        if self._kind is None:
            self._kind = decide(
                sample(self._paths, self._read, self._most), self.classes, brats=self._brats
            )
            self._paths = ()
        return self._kind

    def without_paths(self) -> MaskSet:
        """Return the set for another process, which need not hold the paths.

        Of NIfTI files, which may turn out to need it, the kind is decided for that. Pictures need
        it from the first one on, or never.
        """
        if self._kind is None and any(map(is_nifti, filter(None, self._paths[:1]))):
            _ = self.kind
        light = copy.copy(self)
        light._paths = ()
        return light

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the set as a whole; empty as long as no mask has been read."""
        return () if self._kind is None else self._kind.notes

    @property
    def text(self) -> str:
        """The decision in words; empty as long as no mask has been read."""
        return "" if self._kind is None else self._kind.text

    def read(self, path: Path, *, like: tuple[Path, Placed] | None = None) -> Tensor:
        """Read a file as :meth:`MaskKind.read` does.

        ``like`` is the image's file and where it lies, for a mask in NIfTI.
        """
        kind = self.kind
        kind.require_readable()
        return kind.read(path, read_labels(path, like=like))

    def read_plane(self, path: Path, values: Array) -> Tensor:
        """Read one plane [H, W] of the volume at ``path``."""
        return self.kind.read(path, StoredLabels(values))


def sample(
    paths: Iterable[Path | None],
    read: Callable[[Path], StoredLabels] = sample_labels,
    most: int | None = None,
) -> list[Label]:
    """Read at most 200 masks, evenly spread; those that cannot be read are left out."""
    files = list(dict.fromkeys(path for path in paths if path is not None))
    most = min(SAMPLE, most or SAMPLE)
    looked = (_look(file, read) for file in _spread(files, most))
    first = next((label for label in looked if label is not None), None)
    if first is None:
        return []
    fitting = max(LEAST, round(SAMPLED_PIXELS / first.values.counts.sum()))
    some = _spread(files, min(most, fitting))
    found = (first if file == first.path else _look(file, read) for file in some)
    return [label for label in found if label is not None]


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    count = min(len(files), most)
    return [files[i * len(files) // count] for i in range(count)]


def _look(path: Path, read: Callable[[Path], StoredLabels]) -> Label | None:
    """Look at a mask; None where it cannot be read, which is said when it is needed."""
    try:
        values, lossy, indexed = read(path)
        return Label(path, distinct(values), lossy, indexed, values.dtype == bool)
    except UserError:
        return None


def decide(labels: Sequence[Label], classes: Classes | None = None, *, brats: str = "") -> MaskKind:
    """Decide what the values of a set of masks mean, by a sample of them."""
    if not labels:
        return MaskKind(classes, text="none could be read")
    whole = [label.values.levels for label in labels if label.values.whole]
    seen = {int(level) for levels in whole for level in levels}
    left_out, brats_notes = _cavity(seen, brats, classes)
    if classes is not None:
        kind = _kind_of_classes(labels, classes, seen, left_out)
    else:
        kind = _kind_of_one(labels, left_out)
    if kind.refusal is not None:
        return kind
    return replace(kind, notes=(*brats_notes, *_extent_notes(labels, kind)))


def _kind_of_classes(
    labels: Sequence[Label], classes: Classes, seen: set[int], left_out: tuple[int, ...]
) -> MaskKind:
    """A label map of declared classes; the regions of BraTS are fitted to the set's labels."""
    text = f"label maps of {union(label.values for label in labels)}, by {FLAG} {classes}"
    either = seen & set(classes.either)
    if left_out:
        classes = classes.without(left_out[0])
    elif len(either) > 1:
        examples = [
            next(label.path for label in labels if value in label.values.levels)
            for value in sorted(either)
        ]
        return MaskKind(classes, refusal=_two_enhancing(examples), text=text)
    elif either:
        (rival,) = set(classes.either) - either
        classes = classes.without(rival, rival=True)
    return MaskKind(classes, left_out=left_out, text=text)


def _two_enhancing(examples: Sequence[Path]) -> tuple[Path, str, str]:
    three, four = examples
    return (
        three,
        f"has the label 3, and {four} the label 4, but only one of them can be the enhancing "
        "tumour: it is 3 since BraTS 2023, whose 4 is a resection cavity, and 4 before, when 3 was "
        "a part of the core",
        f"Write the regions out, as in {FLAG} WT=1+2+3,TC=1+3,ET=3,cavity=4 or {FLAG} "
        "WT=1+2+3+4,TC=1+3+4,ET=4.",
    )


def _cavity(
    seen: set[int], brats: str, classes: Classes | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The labels of BraTS to leave out, and what to say about them."""
    if not brats or not (classes is None or classes.either):
        return (), ()
    if brats == "2023":
        note = "label 4 is left out: by the files' names it is the resection cavity of BraTS 2024"
        return (CAVITY,), ((note,) if CAVITY in seen else ())
    if classes is None and set(ENHANCING) <= seen:
        note = (
            "labels 3 and 4 both occur, and both count as foreground; in BraTS 2024 label 4 is a "
            f"resection cavity, which {FLAG} tumour=1+2+3,cavity=4 tells apart"
        )
        return (), (note,)
    return (), ()


def _kind_of_one(labels: Sequence[Label], left_out: tuple[int, ...]) -> MaskKind:
    """One class: a label map, soft masks, or a refusal; what most masks are decides."""
    deep = [label for label in labels if not label.bilevel] or labels
    plain = [label for label in deep if label.indexed or is_label_map(label.values)]
    soft = [label for label in deep if label not in plain and _may_be_soft(label)]
    if 2 * (len(plain) + len(soft)) < len(deep):
        return _refused(next(label for label in deep if label not in plain and label not in soft))
    usable = [*plain, *soft]
    values = union(label.values for label in usable)
    ends = soft_range(values)
    several = [label for label in plain if ends and not has_two_ends(label.values.levels, ends)]
    if len(soft) <= len(several) and not (ends and _is_grey_on_grey(values, ends)):
        labelled = union(label.values for label in plain)
        if is_label_map(labelled) or all(map(_is_clear, plain)):
            return MaskKind(
                levels=tuple(labelled.levels.tolist()),
                left_out=left_out,
                text=f"label maps of {labelled}",
            )
    lossy = any(label.lossy for label in usable)
    labels_in_jpeg = ends and lossy and has_levels(values, ends)
    crowded = labels_in_jpeg or (ends and is_crowded(values, ends, lossy))
    if ends and is_soft(values, ends, SOFT_SHARE) and not crowded:
        text = f"soft masks from {ends[0]:g} to {ends[1]:g}, cut half-way"
        return MaskKind(ends=ends, text=text)
    darkest_first = sorted(usable, key=lambda label: float(label.values.levels[-1]))
    marked = (label for label in darkest_first if label.values.levels[-1] > 0)
    return _refused(next(marked, darkest_first[0]), values)


def _is_clear(label: Label) -> bool:
    """Whether a mask is a label map by itself: it has indices, or 0 and at most one other value."""
    return label.indexed or (label.values.levels[0] == 0 and len(label.values.levels) <= 2)


def _is_grey_on_grey(values: Values, ends: tuple[float, float]) -> bool:
    """Whether all background is a dark grey, as in video, so that nothing is 0."""
    low = values.levels[0]
    return bool(
        low > 0 and values.levels[-1] > MOST_LABEL and has_two_ends(values.levels, (low, ends[1]))
    )


def _may_be_soft(label: Label) -> bool:
    ends = soft_range(label.values)
    return is_soft(label.values, ends, SOFT_SHARE) and not (
        ends and is_crowded(label.values, ends, label.lossy)
    )


def _refused(example: Label, values: Values | None = None) -> MaskKind:
    """The refusal of a set, which names one of its masks, and the values of all of them."""
    others = f", and the masks together {values}" if values is not None else ""
    refusal = (
        example.path,
        f"holds {example.values}{others}: neither labels (whole numbers up to {MOST_LABEL} or far "
        "apart) nor black and white with soft borders",
        "Check that it is a mask, not an image, and that it was not interpolated; "
        f"{FLAG} names the labels of a label map.",
    )
    return MaskKind(refusal=refusal, text="refused")


def _extent_notes(labels: Sequence[Label], kind: MaskKind) -> list[str]:
    """Warn of masks that mark most of their images, and of masks that are all empty."""
    shares = [_share(label, kind) for label in labels]
    values = union(label.values for label in labels)
    looked = f"{counted(len(shares), 'mask')} looked at, which hold {values}"
    if not any(shares):
        hint = (
            "check that they are the right files"
            if len(values.levels) == 1
            else (f"name the foreground's values with {FLAG}")
        )
        return [f"all masks are empty ({looked}); {hint}"]
    middle = median(shares)
    if middle <= 0.5:
        return []
    return [
        f"the masks cover {middle:.0%} of their images in the median ({looked}); if the background "
        f"is marked, name the foreground's values with {FLAG}, as in {FLAG} 0"
    ]


def _share(label: Label, kind: MaskKind) -> float:
    """The part of a mask that is foreground."""
    levels, counts = label.values.levels, label.values.counts
    if kind.classes is not None:
        marked = np.isin(np.rint(levels), [n for own in kind.classes.labels for n in own])
    elif kind.ends is not None and not label.bilevel:
        marked = levels >= sum(kind.ends) / 2
    else:
        marked = (levels > 0) & ~np.isin(levels, kind.left_out)
    return float(counts[marked].sum() / counts.sum())
