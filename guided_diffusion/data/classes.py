"""Which labels of a mask's file make which class, and how soft classes become one label map again.

``--mask_labels`` names the classes: ``1,2,4``, the regions ``WT,TC,ET`` of BraTS, or, in general,
``core=1+4,oedema=2``. Classes that share no label exclude each other: a pixel goes to the likeliest
one. Regions that overlap are cut at one half each. Called by the readers, by prediction and by
scoring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from guided_diffusion.errors import UserError

FLAG = "--mask_labels"
RECORD = "classes.json"
MOST = 255
# The enhancing tumour is 4 until 2021 and 3 since 2023; a file has one of the two.
BRATS = {"WT": (1, 2, 4, 3), "TC": (1, 4, 3), "ET": (4, 3)}
ENHANCING = (4, 3)
_ITEM = re.compile(r"(?:(?P<name>\w[\w-]*)=)?(?P<labels>\d+(?:\+\d+)*)")


@dataclass(frozen=True)
class Classes:
    """The classes of a segmentation, in the order of the mask's channels.

    Attributes:
        names: of the classes, fit for file names.
        labels: the values in a file that make each class; the first says how it is written.
        unused: further values that a file may hold, which are of no class.
        either: values of which a file may hold one at most.
    """

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    unused: tuple[int, ...] = ()
    either: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """As the flag has it, in the one spelling that a checkpoint remembers."""
        return ",".join(map(_spelled, self.names, self.labels))

    @property
    def exclusive(self) -> bool:
        """Whether no label is of two classes."""
        return not any(set(one) & set(two) for one, two in combinations(self.labels, 2))

    @property
    def values(self) -> tuple[int, ...]:
        """How each class is written in a label map: by its first label that tells it from others.

        That is a label of this class alone, else one of no class that is painted later.
        """
        return tuple(self._value(k) for k in range(len(self)))

    def _value(self, k: int) -> int:
        order = self.painted
        later = {label for j in order[order.index(k) + 1 :] for label in self.labels[j]}
        others = {label for j in order if j != k for label in self.labels[j]}
        alone = [label for label in self.labels[k] if label not in others]
        above = [label for label in self.labels[k] if label not in later]
        return (alone or above or list(self.labels[k]))[0]

    @property
    def painted(self) -> list[int]:
        """The order of painting: the widest region first, so that it hides none within."""
        return sorted(range(len(self)), key=lambda k: -len(self.labels[k]))

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
                found=f"fractional labels from {values.min():g} to {values.max():g}",
                expected=f"whole numbers, of {FLAG} {self}",
                hint="Was an image given as the mask, or the label map interpolated?",
            )
        self._require_declared({int(value) for value in found}, source)
        return np.stack([np.isin(stored, labels) for labels in self.labels]).astype(np.float32)

    def _require_declared(self, found: set[int], source: object) -> None:
        declared = {label for labels in self.labels for label in labels}
        strange = sorted(found - declared - {0, *self.unused})
        if strange:
            raise UserError(
                source,
                found=f"label {', '.join(map(str, strange[:5]))}, which no class declares",
                expected=f"0 or a label of {FLAG} {self}",
                hint=f"Give it a class, as in {FLAG} {self},{strange[0]}, or add it to one, as in "
                f"{FLAG} {self.names[0]}={'+'.join(map(str, (*self.labels[0], strange[0])))},...",
            )
        if len(found & set(self.either)) > 1:
            raise UserError(
                source,
                found=f"the labels {' and '.join(map(str, sorted(self.either)))} together",
                expected="one of them, the enhancing tumour",
                hint=f"Write the regions out, as in {FLAG} WT=1+2+3,TC=1+3,ET=3,cavity=4.",
            )

    def masks(self, soft: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Soft classes float [K, H, W] in [0, 1] -> bool [K, H, W].

        At least one half; of classes that exclude each other only the likeliest, the first of
        equals.
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
        UserError: what is no list of labels and regions, or names a class or its labels twice.
    """
    items = [item.strip().replace(" ", "") for item in text.split(",")]
    if items == [""]:
        return None
    pairs = [_read_item(item, text) for item in items]
    names, labels = zip(*pairs, strict=True)
    twice = [name for name in names if [n.lower() for n in names].count(name.lower()) > 1]
    same = [one for one, two in combinations(map(set, labels), 2) if one == two]
    if twice or same:
        raise _invalid_classes(text, f"{twice[0]} twice" if twice else f"{_plus(same[0])} twice")
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
        raise _invalid_classes(text, repr(item))
    labels = tuple(int(label) for label in match["labels"].split("+"))
    if not all(0 < label <= MOST for label in labels) or len(set(labels)) < len(labels):
        raise _invalid_classes(text, repr(item))
    if match["name"] is None and len(labels) > 1:
        raise _invalid_classes(text, f"{item!r}, a class without a name")
    return match["name"] or str(labels[0]), labels


def _invalid_classes(text: str, found: str) -> UserError:
    return UserError(
        FLAG,
        found=f"{found} in {text!r}",
        expected=f"labels from 1 to {MOST}, the regions {', '.join(BRATS)}, or named sums of "
        "labels, each once, separated by commas",
        hint=f"Write for example {FLAG} 1,2,4 or {FLAG} WT,TC,ET or {FLAG} core=1+4,oedema=2.",
    )


def _spelled(name: str, labels: tuple[int, ...]) -> str:
    plain = BRATS.get(name) == labels or labels == (int(name) if name.isdecimal() else 0,)
    return name if plain else f"{name}={'+'.join(map(str, labels))}"


def _plus(labels: set[int]) -> str:
    return "+".join(map(str, sorted(labels)))


def record_text(classes: Classes) -> str:
    """What a result folder says of its classes, in ``classes.json``."""
    return json.dumps(
        {
            "mask_labels": str(classes),
            "labels": dict(zip(classes.names, classes.labels, strict=True)),
            "written_as": dict(zip(classes.names, classes.values, strict=True)),
        },
        indent=2,
    )


def recorded_classes(folder: Path) -> Classes | None:
    """The classes of a result folder by its own record; None where it has none.

    Raises:
        UserError: a record that cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return find_classes(str(json.loads(path.read_text(encoding="utf-8"))["mask_labels"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            path,
            found=f"a record that cannot be read ({error})",
            expected="the classes that sampling noted",
            hint="Sample again, or remove the file and name the classes with " + FLAG + ".",
        ) from error


def each(classes: Classes | None) -> Iterator[tuple[int, str]]:
    """The channel and the end of a file's name for every class; one without an end by default."""
    if classes is None:
        yield 0, ""
    else:
        yield from ((k, f"_{name}") for k, name in enumerate(classes.names))
