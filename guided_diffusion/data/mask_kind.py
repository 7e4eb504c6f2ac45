"""What the values of a data set's masks mean, and how a mask is read by that."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.mask_values import (
    EDGE,
    MOST_LABEL,
    Values,
    distinct,
    has_two_ends,
    is_crowded,
    is_label_map,
    soft_range,
    union,
)
from guided_diffusion.data.readers import Array, Stored, StoredLabels
from guided_diffusion.errors import UserError

OWN_SHARE = 0.8
"""Of a soft mask, the part of the pixels that is near the extremes, at least."""
FAINT = 1 / 8
"""Whole numbers below this part of white are labels, as in 0, 1, 2, and not faint borders."""


@dataclass(frozen=True)
class MaskKind:
    """How the masks of a data set are read.

    Attributes:
        classes: the mask's channels; None makes one channel of the foreground.
        levels: the values that were seen, of a label map.
        ends: the values of background and foreground of soft masks; None for a label map.
        left_out: labels that are no foreground, although they are above 0.
        refusal: the error of every mask, where none can be read: file, problem and hint.
        notes: warnings about the set as a whole.
        text: the decision in words.
    """

    classes: Classes | None = None
    levels: tuple[float, ...] = ()
    ends: tuple[float, float] | None = None
    left_out: tuple[int, ...] = ()
    refusal: tuple[Path, str, str] | None = None
    notes: tuple[str, ...] = ()
    text: str = ""

    def read(self, path: Path, labels: StoredLabels) -> Tensor:
        """Turn what a mask file holds, [H, W], into float32 [K, H, W] in [0, 1].

        Without classes K is 1. Label maps become 0 and 1, soft masks keep their borders.

        Raises:
            UserError: naming ``path``, for a mask that does not fit the decision; the set's
                refusal where there is one.
        """
        self.require_readable()
        if self.classes is not None:
            if labels.lossy:
                raise lossy_labels(path, labels.values)
            return torch.from_numpy(self.classes.split(labels.values.astype(np.float32), path))
        return torch.from_numpy(self._foreground(path, labels))[None]

    def require_readable(self) -> None:
        """Raise the set's refusal, where there is one."""
        if self.refusal is not None:
            raise UserError(*self.refusal)

    def _foreground(self, path: Path, labels: StoredLabels) -> Array:
        stored = labels.values
        if stored.dtype == bool:
            return stored.astype(np.float32)
        if self.ends is not None:
            return self._softened(path, labels, self.ends)
        whole = stored if stored.dtype.kind in "iu" else np.rint(stored)
        is_whole = whole is stored or np.abs(stored - whole).max() < 1e-3
        if not (is_whole and (labels.indexed or self._seen(whole))):
            own = distinct(stored)
            known = Values(np.array(self.levels), np.zeros(len(self.levels)), whole=True)
            both = union([known, own]) if self.levels else own
            if not is_label_map(both):
                return self._unexpected(path, labels, both)
        if labels.lossy and 0 < stored.max() <= MOST_LABEL:
            raise lossy_labels(path, stored)
        found = whole > 0
        for label in self.left_out:
            found &= whole != label
        return found.astype(np.float32)

    def _seen(self, whole: Stored) -> bool:
        """Whether whole numbers are among the values of the sample, or are all small as those."""
        if not self.levels or whole.min() < 0:
            return False
        if self.levels[-1] <= MOST_LABEL:
            return bool(whole.max() <= MOST_LABEL)
        known = self._known
        return bool(whole.max() < len(known) and known[whole.astype(np.intp)].all())

    @cached_property
    def _known(self) -> Any:
        known = np.zeros(min(int(self.levels[-1]), 65535) + 1, dtype=bool)
        known[[int(level) for level in self.levels if level < len(known)]] = True
        return known

    def _unexpected(self, path: Path, labels: StoredLabels, both: Values) -> Array:
        """Read a soft mask among masks of two values; refuse any other that is no label map."""
        ends = soft_range(both)
        if ends is None or self.left_out or not has_two_ends(self.levels, ends):
            raise self._misfit(path, labels)
        if is_crowded(both, ends, labels.lossy):
            raise self._misfit(path, labels)
        return self._softened(path, labels, ends)

    def _softened(self, path: Path, labels: StoredLabels, ends: tuple[float, float]) -> Array:
        low, high = ends
        scaled = (labels.values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
        darkest, brightest = scaled.min(), scaled.max()
        blurred = ((scaled > EDGE) & (scaled < 1 - EDGE)).mean() > 1 - OWN_SHARE
        faint = 0 < brightest < FAINT and not labels.lossy and distinct(labels.values).whole
        if darkest < -EDGE or brightest > 1 + EDGE or blurred or faint or labels.indexed:
            raise self._misfit(path, labels)
        inside: Array = np.clip(scaled, np.float32(0), np.float32(1))
        return inside

    def _misfit(self, path: Path, labels: StoredLabels) -> UserError:
        return UserError(
            path,
            f"holds {distinct(labels.values)}, which do not fit the other masks ({self.text})",
            "Check that it is a mask, not an image, and store all masks in the same way.",
        )


def lossy_labels(path: Path, values: Stored) -> UserError:
    """The error of a label map as JPEG, whose compression noise hides labels such as 0, 1, 2."""
    return UserError(
        path,
        f"is a JPEG mask whose brightest value is {round(float(values.max()))}; the foreground of "
        "a JPEG must be white",
        "Save label maps as PNG.",
    )
