"""Finding and reading predicted masks: this suite's result folders, the parents', and bare masks.

A folder is read by the first of these that it has: ``<case>_output_ens`` as a picture or NIfTI
(soft or binary), the members ``<case>_output<i>`` alone (fused by their mean), ``<case>_mask``. A
member is a picture, a NIfTI file, a tensor as Diffusion-based-Segmentation saves it (no ending), or
a strip of panels as MedSegDiff draws it with ``--debug``, whose lowest panel is the mask. A NIfTI
volume stands for its axial slices, ``<case>_slice000`` and so on.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from guided_diffusion.data.folders import PICTURES, is_nifti
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.readers import UNREADABLE, StoredLabels, nifti_shape, read_nifti
from guided_diffusion.errors import UserError

Mask = NDArray[np.float32]
FUSED = r"(?P<case>.+)_output_ens"
MEMBER = r"(?P<case>.+)_output(?P<index>\d+)"
BINARY = r"(?P<case>.+)_mask"
KINDS = (r"\.(png|jpe?g)", r"\.nii(\.gz)?", "")
"""Endings, best first: a folder is read by the first kind it has; a tensor has none."""
NO_TENSOR = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
    *(AttributeError, IndexError, KeyError, TypeError, ValueError),  # of the unpickler, on any text
)
PADDING = 10
"""Black pixels around every panel of the parents' strips."""


@dataclass(frozen=True)
class Source:
    """The source of one mask: a file, and the axial plane where the file is a volume.

    ``masks`` says what the values of this file and of those like it mean; None for this one alone.
    """

    path: Path
    plane: int | None = None
    masks: MaskSet | None = field(default=None, compare=False)

    @property
    def tensor(self) -> bool:
        """Whether it is a tensor as Diffusion-based-Segmentation saves it."""
        return not is_nifti(self.path) and self.path.suffix.lower() not in PICTURES


class Found(NamedTuple):
    """The files of one case: its fused mask, if any, and its members in order."""

    fused: Source | None
    members: tuple[Source, ...]


def find_predictions(folder: Path, end: str = "") -> dict[str, Found]:
    """List every case with predictions directly in ``folder``, by id.

    ``end`` follows the files' names where they are of one class of several.
    """
    paths = sorted(folder.iterdir())
    members: dict[str, list[Source]] = {}
    for (case, _), source in sorted(_find(paths, MEMBER + re.escape(end)).items()):
        members.setdefault(case, []).append(source)

    fused = _find(paths, FUSED + re.escape(end)) or ({} if members or end else _find(paths, BINARY))
    if not fused:
        return {case: Found(None, tuple(sources)) for case, sources in members.items()}
    return {
        case: Found(source, tuple(members.get(case, ()))) for (case, _), source in fused.items()
    }


def _find(paths: Sequence[Path], pattern: str) -> dict[tuple[str, int], Source]:
    """Find the files of the first kind present, by case and member; a volume becomes its planes.

    A lossless .png takes precedence over a .jpg.
    """
    for kind in KINDS:
        named = re.compile(pattern + kind, re.IGNORECASE)
        found = [(path, match) for path in paths if (match := named.fullmatch(path.name))]
        if found:
            found.sort(key=lambda pair: pair[0].suffix.lower() == ".png")
            masks = MaskSet([path for path, _ in found])
            return {
                key: source
                for path, match in found
                for key, source in _sources(match["case"], _index(match), path, masks)
            }
    return {}


def _index(match: re.Match[str]) -> int:
    return int(match.groupdict().get("index") or 0)


def _sources(
    case: str, index: int, path: Path, masks: MaskSet
) -> Iterator[tuple[tuple[str, int], Source]]:
    shape = nifti_shape(path) if is_nifti(path) else ()
    if len(shape) < 3:
        yield (case, index), Source(path, masks=masks)
        return
    for plane in range(shape[2]):
        yield (f"{case}_slice{plane:03d}", index), Source(path, plane, masks)


class Reader:
    """Reads masks and decodes each volume once; it is kept as long as one volume is scored."""

    def __init__(self) -> None:
        self.volumes: dict[Path, Mask] = {}

    def __call__(self, source: Source) -> Mask:
        """Read a soft mask, float32 [H, W] in [0, 1]; a :class:`UserError` where it is none."""
        if source.plane is None:
            return read_soft(source.path, source.masks)
        if source.path not in self.volumes:
            self.volumes[source.path] = _read_nifti(source.path, 3, source.masks)
        return np.ascontiguousarray(self.volumes[source.path][..., source.plane])


def read_soft(path: Path, masks: MaskSet | None = None) -> Mask:
    """Read one file as a soft mask, float32 [H, W] in [0, 1].

    ``masks`` says what the values of binary masks mean; None for those of this file alone. Pictures
    have 8 or 16 bits, colour is converted to grey as the parents do, and of a strip of panels the
    lowest one is taken. Raises UserError for a file that cannot be read, or holds NaN.
    """
    if is_nifti(path):
        return _read_nifti(path, 2, masks)
    if Source(path).tensor:
        return read_tensor(path)
    if path.stem.endswith("_mask"):
        return np.asarray((masks or MaskSet([path])).read(path)[0].numpy(), dtype=np.float32)
    try:
        with Image.open(path) as picture:
            deep = picture.mode.startswith("I")
            levels = np.asarray(picture if deep else picture.convert("L"), dtype=np.float32)
    except UNREADABLE as error:
        raise _unreadable_prediction(path, error, "an image of one mask") from error
    soft: Mask = levels / np.float32(65535 if deep else 255)
    return last_panel(soft) if path.suffix.lower() in (".jpg", ".jpeg") else soft


def last_panel(picture: Mask) -> Mask:
    """Return the lowest of n > 1 square panels [n (s + 10) + 10, s + 20], else the picture itself.

    torchvision's ``save_image(nrow=1, padding=10)`` draws such a strip on black; a picture of that
    size whose padding is not black is no strip.
    """
    height, width = picture.shape
    side = width - 2 * PADDING
    panels, rest = divmod(height - PADDING, side + PADDING) if side > 0 else (0, 1)
    if rest or panels < 2:
        return picture
    rows = [picture[n * (side + PADDING) :][:PADDING] for n in range(panels + 1)]
    if max(row[2:-2].mean() for row in rows) > 0.05:  # JPEG smears two pixels into the padding
        return picture
    top = height - PADDING - side
    return np.ascontiguousarray(picture[top : top + side, PADDING : PADDING + side])


def read_tensor(path: Path) -> Mask:
    """Read a tensor [..., H, W] as Diffusion-based-Segmentation saves its samples.

    The last channel is the mask, clamped to [0, 1], float32 [H, W]. Only tensors are unpickled.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except NO_TENSOR as error:
        raise _unreadable_prediction(path, error, "a tensor with one mask") from error
    if not isinstance(loaded, torch.Tensor) or loaded.ndim < 2 or not loaded.numel():
        shape = tuple(loaded.shape) if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise _unreadable_prediction(path, ValueError(f"it holds {shape}"), "a tensor [..., H, W]")
    mask = loaded.reshape(-1, *loaded.shape[-2:])[-1].float()
    if not torch.isfinite(mask).all():
        hint = "Remove it and sample into this folder again: only this case is drawn."
        raise UserError(path, "has NaN or infinite values", hint)
    return np.asarray(mask.clamp(0, 1).numpy(), dtype=np.float32)


def _read_nifti(path: Path, axes: int, masks: MaskSet | None) -> Mask:
    """Read probabilities, which are fractions from 0 to 1, or masks by what their values mean."""
    values = read_nifti(path)[0]
    if values.ndim != axes:
        raise _unreadable_prediction(
            path, ValueError(f"it has {values.ndim} axes"), f"a mask of {axes} axes"
        )
    if values.min() >= 0 and values.max() <= 1:
        return values
    kind = (masks or MaskSet([path])).kind
    return np.asarray(kind.read(path, StoredLabels(values))[0].numpy())


def _unreadable_prediction(path: Path, error: BaseException, kind: str) -> UserError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    hint = "Remove it and sample into this folder again: only this case is drawn."
    return UserError(path, f"cannot be read as {kind} ({why})", hint)
