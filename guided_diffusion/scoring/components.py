"""Connected components of masks: how many members contain each, and which are kept.

Beside them, what changes a soft mask without changing its mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.ensemble import temper, with_mask

Binary = NDArray[np.bool_]
STRUCTURES = {number: ndimage.generate_binary_structure(2, number // 4) for number in (4, 8)}
"""The neighbours of a pixel that belong to its component: 4, or 8 with the diagonal ones."""
MOST = 100


class Component(NamedTuple):
    """One 8-connected component of a mask.

    Rows from ``top`` and columns from ``left``, the ends left out, are the smallest rectangle
    around its ``pixels``. ``found`` is the number of members that contain it, ``inside`` the share
    of its pixels that lie in the truth, None where that is unknown.
    """

    pixels: int
    top: int
    left: int
    bottom: int
    right: int
    found: int
    inside: float | None = None

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of the rectangle."""
        return self.top, self.left, self.bottom, self.right


def find_components(
    mask: Binary, members: Binary, truth: Binary | None = None, *, most: int = MOST
) -> list[Component]:
    """List the components of a mask [H, W], the largest first, ``most`` at most.

    A member, bool [E, H, W], contains a component if it has at least half of its pixels. One pixel
    in common would count a member that merely touches a large component; all pixels would count
    hardly any, as borders differ. ``truth`` is bool [H, W].
    """
    labels, count = ndimage.label(mask, STRUCTURES[8])
    if not count:
        return []
    pixels = np.bincount(labels.ravel(), minlength=count + 1)
    found = np.zeros(count + 1, dtype=np.int64)
    for member in members:
        found += 2 * np.bincount(labels[member], minlength=count + 1) >= pixels
    lesion = None if truth is None else np.bincount(labels[truth], minlength=count + 1)
    boxes = ndimage.find_objects(labels)
    components = []
    for index in 1 + np.argsort(-pixels[1:], kind="stable")[:most]:
        rows, columns = boxes[index - 1]
        components.append(
            Component(
                pixels=int(pixels[index]),
                top=rows.start,
                left=columns.start,
                bottom=rows.stop,
                right=columns.stop,
                found=int(found[index]),
                inside=None if lesion is None else float(lesion[index] / pixels[index]),
            )
        )
    return components


def clean(mask: Binary, *, largest: int = 0, fill_holes: bool = False) -> Binary:
    """Keep the largest component of a mask [H, W], and fill its holes.

    Args:
        mask: bool; of components of the same size the first is the largest.
        largest: the connectivity of the component to keep, 4 or 8; 0 keeps all.
        fill_holes: whether to fill what the mask encloses.
    """
    if largest:
        labels, count = ndimage.label(mask, STRUCTURES[largest])
        if count:
            mask = np.asarray(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))
    return np.asarray(ndimage.binary_fill_holes(mask)) if fill_holes else mask


def temper_soft(soft: Tensor, classes: Classes | None, temperature: float) -> Tensor:
    """Temper a soft mask without changing its mask, nor that of its 8-bit file.

    ``soft`` is float [H, W] in [0, 1], or [K, H, W] of declared classes. Where rounding makes two
    classes that exclude each other equally likely, or lifts a pixel to one half, it is moved as
    little as needed.
    """

    def masks(values: Tensor) -> Tensor:
        return values >= 0.5 if classes is None else torch.from_numpy(classes.masks(values.numpy()))

    found, tempered = masks(soft), temper(soft, temperature)
    moved = masks((255 * tempered + 0.5).floor() / 255) != found
    if classes is not None:
        moved = moved.any(dim=0)
    return torch.where(moved, with_mask(tempered, found), tempered)


def clean_soft(
    soft: Tensor, classes: Classes | None, *, largest: int = 0, fill_holes: bool = False
) -> Tensor:
    """Move a soft mask as little as needed for its mask to be what :func:`clean` makes of it.

    ``soft`` is float [H, W] in [0, 1], or [K, H, W] of declared classes, each of which is cleaned
    on its own. A hole of one class that excludes others is filled only where none of these is.
    """
    if classes is None:
        found = (soft >= 0.5).numpy()
        cleaned = clean(found, largest=largest, fill_holes=fill_holes)
    else:
        found = classes.masks(soft.numpy())
        cleaned = np.stack([clean(mask, largest=largest, fill_holes=fill_holes) for mask in found])
        if classes.exclusive:
            cleaned &= found | ~found.any(axis=0)
    return with_mask(soft, torch.from_numpy(cleaned))
