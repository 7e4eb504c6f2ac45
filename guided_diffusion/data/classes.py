"""Classes: which labels of a mask file make each class, and how soft classes become a label map.

``--mask_labels`` names the classes: ``1,2,4``, the regions ``WT,TC,ET`` of BraTS, or, in general,
``core=1+4,oedema=2``. Classes that share no label exclude each other: a pixel goes to the likeliest
one. Overlapping regions are thresholded separately, each at one half.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from guided_diffusion.errors import UserError
from guided_diffusion.files import DamagedFile, read_json

FLAG = "--mask_labels"
RECORD = "classes.json"
MOST = 255
# The enhancing tumour is 4 until 2021 and 3 since 2023, when 4 is a resection cavity.
CAVITY = 4
BRATS = {"WT": (1, 2, 4, 3), "TC": (1, 4, 3), "ET": (4, 3)}
ENHANCING = (4, 3)
_ITEM = re.compile(r"(?:(?P<name>\w[\w-]*)=)?(?P<labels>\d{1,18}(?:\+\d{1,18})*)")


@dataclass(frozen=True)
class Classes:
    """The classes of a segmentation, in the order of the mask's channels.

    Attributes:
        names: of the classes, fit for file names.
        labels: the values in a file that make each class.
        unused: further values that a file may hold, which belong to no class.
        either: values of which a file may hold at most one.
        rivals: those of them that this data set does not have, as its other masks show.

    Where 0 is a label of a class, all values that are not named are background.
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    unused: tuple[int, ...] = ()
    either: tuple[int, ...] = ()
    rivals: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """The flag's value, in the canonical form that a checkpoint records."""
        return ",".join(map(_flag_item, self.names, self.labels))

    @property
    def exclusive(self) -> bool:
        """Whether no label belongs to two classes."""
        return not any(set(one) & set(two) for one, two in combinations(self.labels, 2))

    @property
    def values(self) -> tuple[int, ...]:
        """The value that stands for each class in a label map: its first unambiguous label.

        That is a label of this class alone, else one that no class painted later has. 0, which
        stands for the background, is replaced by the lowest number that is no label.
        """
        named = {label for labels in self.labels for label in labels}
        free = next(value for value in range(1, MOST + 2) if value not in named)
        return tuple(self._value(k) or free for k in range(len(self)))

    def _value(self, k: int) -> int:
        order = self.painted
        later = {label for j in order[order.index(k) + 1 :] for label in self.labels[j]}
        others = {label for j in order if j != k for label in self.labels[j]}
        alone = [label for label in self.labels[k] if label not in others]
        above = [label for label in self.labels[k] if label not in later]
        return (alone or above or list(self.labels[k]))[0]

    @property
    def painted(self) -> list[int]:
        """The order of painting: the widest region first, so that it hides none inside it."""
        return sorted(range(len(self)), key=lambda k: -len(self.labels[k]))

    def without(self, label: int, *, rival: bool = False) -> Classes:
        """Take a label out of the regions of BraTS: it is background, or, as a rival, an error."""
        labels = tuple(
            tuple(own for own in labels if own != label) if BRATS.get(name) == labels else labels
            for name, labels in zip(self.names, self.labels, strict=True)
        )
        unused, rivals = (*self.unused, label), (*self.rivals, label)
        if rival:
            return replace(self, labels=labels, rivals=rivals)
        return replace(self, labels=labels, unused=unused, either=())

    def split(self, values: npt.ArrayLike, source: object) -> npt.NDArray[np.float32]:
        """Label map [H, W] -> one channel per class, float32 [K, H, W] in {0, 1}.

        Raises:
            UserError: naming ``source``, for a label that no class declares.
        """
        values = np.asarray(values)
        stored = np.rint(values)
        found = np.unique(stored)
        if np.abs(values - stored).max() >= 1e-3:
            raise UserError(
                source,
                f"has fractional labels from {values.min():g} to {values.max():g}, but "
                f"{FLAG} {self} needs whole numbers",
                "Check that it is a mask, not an image, and that it was not interpolated.",
            )
        self._require_declared({int(value) for value in found}, source)
        return np.stack([np.isin(stored, labels) for labels in self.labels]).astype(np.float32)

    def _require_declared(self, found: set[int], source: object) -> None:
        declared = {label for labels in self.labels for label in labels}
        if other := sorted(found & set(self.rivals)):
            (own,) = set(self.either) - set(self.rivals)
            raise UserError(
                source,
                f"has the label {other[0]}, but {own} is the enhancing tumour in the other masks",
                f"Write the regions out, as in {FLAG} WT=1+2+{own},TC=1+{own},ET={own},"
                f"other={other[0]}.",
            )
        if 0 in declared:
            return
        unknown = sorted(found - declared - {0, *self.unused})
        if unknown:
            raise UserError(
                source,
                f"has label {', '.join(map(str, unknown[:5]))}, which no class declares "
                f"({FLAG} {self})",
                f"Give it a class, as in {FLAG} {self},{unknown[0]}, or add it to one, as in "
                f"{FLAG} {self.names[0]}={_plus((*self.labels[0], unknown[0]))}.",
            )
        if len(found & set(self.either)) > 1:
            raise UserError(
                source,
                f"has the labels {' and '.join(map(str, sorted(self.either)))} together, but only "
                "one of them can be the enhancing tumour",
                f"Write the regions out, as in {FLAG} WT=1+2+3,TC=1+3,ET=3,cavity=4.",
            )

    def masks(self, soft: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Soft classes float [K, H, W] in [0, 1] -> bool [K, H, W].

        True from one half up; of classes that exclude each other only the likeliest one, which is
        the first of equals.
        """
        soft = np.asarray(soft)
        found: npt.NDArray[np.bool_] = soft >= 0.5
        if self.exclusive:
            found &= soft.argmax(axis=0) == np.arange(len(self))[:, None, None]
        return found

    def label_map(self, soft: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Soft classes float [K, H, W] -> uint8 [H, W] of :attr:`values`, 0 for none of them."""
        masks, values = self.masks(soft), self.values
        labels = np.zeros(masks.shape[1:], dtype=np.uint8)
        for k in self.painted:
            labels[masks[k]] = values[k]
        return labels


def find_classes(text: str) -> Classes | None:
    """Read ``--mask_labels``; None where it is empty: everything above 0 is one class.

    Raises:
        UserError: ``text`` is no list of labels and regions, or repeats a name or a set of labels.
    """
    items = [item.strip().replace(" ", "") for item in text.split(",")]
    if items == [""]:
        return None
    pairs = [_read_item(item, text) for item in items]
    names, labels = zip(*pairs, strict=True)
    twice = [name for name in names if [n.lower() for n in names].count(name.lower()) > 1]
    same = [one for one, two in combinations(map(set, labels), 2) if one == two]
    if twice or same:
        raise _invalid_classes(text, f"{(twice or [_plus(sorted(same[0]))])[0]} is given twice")
    if not any(BRATS.get(name) == own for name, own in pairs):
        return Classes(names, labels)
    known = {label for own in labels for label in own}
    unused = tuple(label for label in BRATS["WT"] if label not in known)
    return Classes(names, labels, unused=unused, either=ENHANCING)


def _read_item(item: str, text: str) -> tuple[str, tuple[int, ...]]:
    """The name and the labels of one class."""
    if item.upper() in BRATS:
        return item.upper(), BRATS[item.upper()]
    match = _ITEM.fullmatch(item)
    if match is None:
        raise _invalid_classes(text, f"{item!r} is no class")
    labels = tuple(int(label) for label in match["labels"].split("+"))
    if not all(0 <= label <= MOST for label in labels) or len(set(labels)) < len(labels):
        raise _invalid_classes(text, f"the labels of {item!r} are not valid")
    if match["name"] is None and len(labels) > 1:
        raise _invalid_classes(text, f"the class {item!r} has no name")
    return match["name"] or str(labels[0]), labels


def _invalid_classes(text: str, problem: str) -> UserError:
    return UserError(
        FLAG,
        f"in {text!r}, {problem}; classes are labels from 0 to {MOST}, the regions "
        f"{', '.join(BRATS)}, or named sums of labels, each once, separated by commas",
        f"Write for example {FLAG} 1,2,4 or {FLAG} WT,TC,ET or {FLAG} core=1+4,oedema=2.",
    )


def _flag_item(name: str, labels: tuple[int, ...]) -> str:
    """One class as :func:`_read_item` reads it: its name alone where that says the labels."""
    plain = BRATS.get(name) == labels or labels == (int(name) if name.isdecimal() else -1,)
    return name if plain else f"{name}={_plus(labels)}"


def _plus(labels: Iterable[int]) -> str:
    return "+".join(map(str, labels))


def record_text(classes: Classes) -> str:
    """The content of ``classes.json``, which records the classes of a result folder."""
    return json.dumps(
        {
            "mask_labels": str(classes),
            "labels": dict(zip(classes.names, classes.labels, strict=True)),
            "written_as": dict(zip(classes.names, classes.values, strict=True)),
        },
        indent=2,
    )


def recorded_classes(folder: Path) -> Classes | None:
    """The classes that a result folder records; None where it has no record.

    Raises:
        DamagedFile: the record is not what sampling wrote.
        UserError: it cannot be opened.
    """
    path = folder / RECORD
    hint = (
        f"To score, name the classes with {FLAG}; to sample, remove the file if the folder's "
        "results are of the same classes, else choose another --out_dir."
    )
    record = read_json(path, hint=hint)
    if record is None:
        return None
    text = record.get("mask_labels")
    if not isinstance(text, str) or not text:
        raise DamagedFile(path, "it does not say which classes were sampled", hint)
    try:
        return find_classes(text)
    except UserError as error:
        raise DamagedFile(path, f"{text!r} are no classes", hint) from error


def each(classes: Classes | None) -> Iterator[tuple[int, str]]:
    """Yield the channel and the file name's ending of every class; (0, "") without classes."""
    if classes is None:
        yield 0, ""
    else:
        yield from ((k, f"_{name}") for k, name in enumerate(classes.names))
