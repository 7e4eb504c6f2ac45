"""Finding and reading predicted masks: this suite's result folders, the parents', and bare masks.

A folder is read by the first of these that it has: ``<case>_output_ens`` as a picture or NIfTI
(soft or binary), the members ``<case>_output<i>`` alone (fused by their mean), ``<case>_mask``;
:mod:`guided_diffusion.scoring.other_tools` reads what has none of them. A
member is a picture, a NIfTI file, a tensor as Diffusion-based-Segmentation saves it (no ending), or
a strip of panels as MedSegDiff draws it with ``--debug``, whose lowest panel is the mask. A NIfTI
volume stands for its slices, ``<case>_slice000`` and so on. NIfTI files are brought to the grid of
the truth, and refused where they do not lie on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from guided_diffusion.data.decoding import decoding, opened_picture, upright
from guided_diffusion.data.folders import PICTURES, is_nifti
from guided_diffusion.data.geometry import (
    PLANES,
    Grid,
    Placed,
    View,
    as_it_lies,
    mismatch,
    place,
    view_on,
    view_resized,
)
from guided_diffusion.data.jobs import JOBS, PREDICTIONS
from guided_diffusion.data.limits import require_tensors
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.readers import (
    StoredLabels,
    read_grid,
    read_nifti,
)
from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.files import read_json

Mask = NDArray[np.float32]
FUSED = r"(?P<case>.+)_output_ens"
MEMBER = r"(?P<case>.+)_output(?P<index>\d+)"
BINARY = r"(?P<case>.+)_mask"
KINDS = (r"\.(png|jpe?g)", r"\.nii(\.gz)?", "")
"""Endings, best first: a folder is read by the first kind it has; a tensor has none."""
DRAW_AGAIN = "Remove it and sample into this folder again: only this case is drawn."
SOFT = re.compile(r".+_output(_ens|\d+)(_.+)?\.png", re.IGNORECASE)
RECORDS = (PREDICTIONS, JOBS)
"""Written by sampling."""
PADDING = 10
"""Black pixels around every panel of the parents' strips."""


class PictureSet:
    """The soft masks of a folder; whether they hold 0 and 1 alone is decided over all of them.

    A soft mask that is nearly black is no binary one as long as another one is brighter. JPEG files
    and the results of this suite are never taken for 0 and 1.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        own = any(path.name in RECORDS for path in paths)
        self.paths = [] if own else [path for path in paths if SOFT.fullmatch(path.name)]

    @cached_property
    def binary(self) -> bool:
        """Whether no value of any picture is above 1; one that cannot be read does not count."""
        for path in self.paths:
            with suppress(UserError), decoding(path, "picture"), opened_picture(path) as picture:
                if _grey(picture).max(initial=0) > 1:
                    return False
        return bool(self.paths)

    def without_paths(self) -> PictureSet:
        """Return the decision alone, for another process."""
        light = PictureSet(())
        light.binary = self.binary
        return light


@dataclass(frozen=True)
class Source:
    """The source of one mask: a file, and the plane where the file is a volume.

    ``masks`` says what the values of this file and of those like it mean; None for this one alone.
    ``labels`` marks a label map or binary mask, of which ``channel`` is the class; others are soft,
    with the white of ``pictures``. ``turned`` pictures lie as this suite turns planes; others lie
    as the truth's file is stored.
    """

    path: Path
    plane: int | None = None
    masks: MaskSet | None = field(default=None, compare=False)
    turned: bool = False
    labels: bool = False
    channel: int = 0
    pictures: PictureSet | None = field(default=None, compare=False)

    @property
    def tensor(self) -> bool:
        """Whether it is a tensor as Diffusion-based-Segmentation saves it."""
        return not is_nifti(self.path) and self.path.suffix.lower() not in PICTURES

    @property
    def square(self) -> bool:
        """Whether it is a file of the published code, drawn as a square for images of any shape."""
        return self.tensor or self.path.suffix.lower() in (".jpg", ".jpeg")


class Found(NamedTuple):
    """The files of one case: its fused mask, if any, and its members in order."""

    fused: Source | None
    members: tuple[Source, ...]


def find_predictions(
    folder: Path, end: str = "", *, truths: Mapping[str, Truth] | None = None
) -> dict[str, Found]:
    """List every case with predictions directly in ``folder``, by id.

    ``end`` follows the files' names where they are of one class of several. Volumes are sliced as
    those of ``truths`` are.
    """
    paths = sorted(folder.iterdir())
    volumes = volumes_of(truths or {})
    members: dict[str, list[Source]] = {}
    for (case, _), source in sorted(_find(paths, MEMBER + re.escape(end), volumes).items()):
        members.setdefault(case, []).append(source)

    fused = _find(paths, FUSED + re.escape(end), volumes)
    if not (fused or members or end):
        fused = _find(paths, BINARY, volumes, labels=True)
    pictures, turned = PictureSet(paths), bool(recorded_plane(folder))

    def completed(source: Source) -> Source:
        return replace(source, turned=turned, pictures=pictures)

    members = {case: [completed(source) for source in members[case]] for case in members}
    if not fused:
        return {case: Found(None, tuple(sources)) for case, sources in members.items()}
    return {
        case: Found(completed(source), tuple(members.get(case, ())))
        for (case, _), source in fused.items()
    }


def volumes_of(truths: Mapping[str, Truth]) -> dict[str, Truth]:
    """One truth of each volume, by its name."""
    return {truth.volume: truth for truth in truths.values() if truth.volume}


def recorded_plane(folder: Path) -> str:
    """How sampling recorded that volumes were sliced; empty for results without that record."""
    try:
        plane = (read_json(folder / "sampling.json", hint="") or {})["options"]["plane"]
    except (UserError, KeyError, TypeError):
        return ""
    return plane if plane in PLANES else ""


def _find(
    paths: Sequence[Path], pattern: str, volumes: Mapping[str, Truth], *, labels: bool = False
) -> dict[tuple[str, int], Source]:
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
                key: replace(source, labels=labels)
                for path, match in found
                for key, source in sources_in(match["case"], _index(match), path, masks, volumes)
            }
    return {}


def _index(match: re.Match[str]) -> int:
    return int(match.groupdict().get("index") or 0)


def sources_in(
    case: str, index: int, path: Path, masks: MaskSet, volumes: Mapping[str, Truth]
) -> Iterator[tuple[tuple[str, int], Source]]:
    """Yield a file by case and member, or the planes of a volume, as the truth is sliced."""
    grid = read_grid(path) if is_nifti(path) else None
    if grid is None or len(grid.lengths) < 3:
        yield (case, index), Source(path, masks=masks)
        return
    truth = volumes.get(case)
    depth = _view(path, grid, truth.placed() if truth else None, truth).depth
    for plane in range(depth):
        yield (f"{case}_slice{plane:03d}", index), Source(path, plane, masks)


class Reader:
    """Reads masks and decodes each volume once; it is kept as long as one volume is scored."""

    def __init__(self) -> None:
        self.volumes: dict[tuple[Path, int], tuple[Mask, Grid]] = {}
        self.written: dict[Path, Grid] = {}
        self.last: tuple[Truth | None, Placed | None] = (None, None)

    def __call__(self, source: Source, truth: Truth | None = None) -> Mask:
        """Read a soft mask, float32 [H, W] in [0, 1], as the truth lies.

        Raises:
            UserError: it is no mask, or does not lie where the truth is.
        """
        if truth is not self.last[0]:
            self.last = truth, truth.placed() if truth else None
        placed = self.last[1]
        if not is_nifti(source.path):
            mask = _read_picture(source)
            if placed is None or truth is None:
                return mask
            if source.turned:
                return self._as_sampled(source.path, mask, placed, truth)
            return _as_stored(source.path, mask, placed)
        if source.plane is None:
            values, grid = _read_nifti(source, 2)
        else:
            key = source.path, source.channel
            if key not in self.volumes:
                self.volumes[key] = _read_nifti(source, 3)
            values, grid = self.volumes[key]
        view = _view(source.path, grid, placed, truth)
        along = np.moveaxis(values.reshape(grid.shape), view.axis, -1)
        return np.ascontiguousarray(view.turn(along[..., view.position(source.plane or 0)]))

    def _as_sampled(self, path: Path, mask: Mask, placed: Placed, truth: Truth) -> Mask:
        """Turn a picture that sampling has turned back, beside a truth that states nothing.

        The orientation of the image is that of the NIfTI file that sampling wrote as well.
        """
        case = truth.volume or re.sub(r"_(output_ens|output\d+|mask)(_.*)?$", "", path.stem)
        written = path.with_name(f"{case}_mask.nii.gz")
        if placed.grid.stated or not (written in self.written or written.exists()):
            return mask
        if written not in self.written:
            self.written[written] = read_grid(written)
        own, view = place(self.written[written], PLANES[placed.axis]).view, placed.view
        if truth.volume and (own.axis, own.reverse) != (view.axis, view.reverse):
            raise UserError(
                truth.source or path,
                f"states no orientation, and {written.name} is not stored as its slices are",
                "Score against the data set, or a truth whose header states its orientation.",
            )
        return np.ascontiguousarray(own.turn_back(mask))


def _view(path: Path, grid: Grid, placed: Placed | None, truth: Truth | None) -> View:
    """How planes are read from a prediction, so that they lie as those of the truth.

    A grid of another size has to cover the same space in the same number of planes. Without a
    truth in NIfTI the file is read as it lies.
    """
    if placed is None or truth is None:
        return as_it_lies(grid)
    if len(placed.grid.lengths) != len(grid.lengths):
        return place(grid).view
    view = view_on(grid, placed) or view_resized(grid, placed)
    if view is None:
        raise mismatch(path, grid, placed.grid, other=truth.source or path)
    return view


def _as_stored(path: Path, mask: Mask, placed: Placed) -> Mask:
    """Turn a picture that lies as the truth's file is stored."""
    view = placed.view
    if placed.grid.slicing is None and (view.axis != 2 or view.reverse):
        raise UserError(
            path,
            f"a picture does not say where it lies in {placed.grid}, which is not sliced along its "
            "last axis from the bottom up",
            "Score NIfTI files, or sample again.",
        )
    return np.ascontiguousarray(view.turn(mask))


def read_soft(path: Path) -> Mask:
    """Read one file by its own values as a soft mask, float32 [H, W] in [0, 1].

    Pictures have 8 or 16 bits, colour is converted to grey as the parents do, and of a strip of
    panels the lowest one is taken. Raises UserError for a file that cannot be read, or holds NaN.
    """
    source = Source(path, labels=path.stem.endswith("_mask"))
    return _read_nifti(source, 2)[0] if is_nifti(path) else _read_picture(source)


def _read_picture(source: Source) -> Mask:
    """Read a picture, or a tensor, as a soft mask, float32 [H, W] in [0, 1]."""
    path = source.path
    if source.tensor:
        return read_tensor(path)
    if source.labels:
        mask = (source.masks or MaskSet([path])).read(path)
        return np.asarray(mask[source.channel].numpy(), dtype=np.float32)
    named = decoding(path, "picture of one mask", hint=DRAW_AGAIN)
    with named, opened_picture(path, hint=DRAW_AGAIN) as picture:
        upright(picture)
        white = 65535 if picture.mode.startswith("I") else 255
        levels = _grey(picture)
    if source.pictures and source.pictures.binary:
        return levels
    soft: Mask = levels / np.float32(white)
    return last_panel(soft) if path.suffix.lower() in (".jpg", ".jpeg") else soft


def _grey(picture: Image.Image) -> Mask:
    deep = picture.mode.startswith("I")
    return np.asarray(picture if deep else picture.convert("L"), dtype=np.float32)


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
    require_tensors(path)
    with decoding(path, "tensor with one mask", hint=DRAW_AGAIN):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(loaded, torch.Tensor) and loaded.nbytes > loaded.untyped_storage().nbytes():
            raise ValueError(f"it states {tuple(loaded.shape)} values, and holds fewer")
    if not isinstance(loaded, torch.Tensor) or loaded.ndim < 2 or not loaded.numel():
        shape = tuple(loaded.shape) if isinstance(loaded, torch.Tensor) else type(loaded).__name__
        raise _unreadable_prediction(path, ValueError(f"it holds {shape}"), "a tensor [..., H, W]")
    mask = loaded.reshape(-1, *loaded.shape[-2:])[-1].float()
    if not torch.isfinite(mask).all():
        raise UserError(path, "has NaN or infinite values", DRAW_AGAIN)
    return np.asarray(mask.clamp(0, 1).numpy(), dtype=np.float32)


def _read_nifti(source: Source, axes: int) -> tuple[Mask, Grid]:
    """Read probabilities, which are fractions from 0 to 1, or masks by what their values mean."""
    path, masks = source.path, source.masks
    values, grid = read_nifti(path)
    if len(grid.lengths) != axes:
        raise _unreadable_prediction(
            path, ValueError(f"it has {values.ndim} axes"), f"a mask of {axes} axes"
        )
    of_classes = source.labels and masks is not None and masks.classes is not None
    if of_classes or values.min() < 0 or values.max() > 1:
        kind = (masks or MaskSet([path])).kind
        values = np.asarray(kind.read(path, StoredLabels(values))[source.channel].numpy())
    return values.reshape(grid.lengths), grid


def _unreadable_prediction(path: Path, error: BaseException, kind: str) -> UserError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(path, f"cannot be read as {kind} ({why})", DRAW_AGAIN)
