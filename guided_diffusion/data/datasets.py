"""The contract of all data sets.

:class:`Case` is one image with its mask, :class:`Entry` the files it is read from, and
:class:`SegmentationDataset` the base class of the loaders, one for each layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import counted, is_nifti, listing, size_text
from guided_diffusion.data.geometry import Affine, Placed, place, plane_affine
from guided_diffusion.data.intensity import measure, normalised
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.readers import (
    read_grid,
    read_image_file,
    read_nifti_slice,
    unstated_note,
)
from guided_diffusion.errors import UserError, memory_problem, refuse

FEW = 5


class Case(NamedTuple):
    """One image to segment, at its own size, with its mask where there is one.

    ``image`` is float32 [C, H, W]: pictures in [0, 1], NIfTI slices as stored. ``mask`` is float32
    [K, H, W] in [0, 1] (soft borders stay soft until :meth:`Frame.fit_mask`), or None. ``name`` is
    unique within its set and safe as a file name. ``affine`` is float64 [4, 4] for NIfTI input.
    ``label`` is the class of the whole image, where its folder states one. ``raters`` holds the
    masks of several raters, float32 [R, K, H, W]; ``mask`` is then their :func:`majority`.
    """

    image: Tensor
    mask: Tensor | None
    name: str
    affine: Affine | None = None
    label: int | None = None
    raters: Tensor | None = None


class Entry(NamedTuple):
    """The files of a case: its id, one file per channel (or one picture), and its mask's file.

    ``plane`` is the position of a slice in its volume, None for two-dimensional files;
    ``patient`` is the patient's id, empty where it is unknown. ``raters`` are the files of several
    raters' masks, two or more, where there are any; ``mask`` is the first, or the set's own.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None
    plane: int | None = None
    patient: str = ""
    raters: tuple[Path, ...] = ()

    @property
    def masks(self) -> tuple[Path, ...]:
        """Every mask that is used: those of the raters, or the only one."""
        return self.raters or ((self.mask,) if self.mask is not None else ())

    @property
    def volume(self) -> str:
        """The name of the volume that a slice belongs to; empty for two-dimensional files."""
        return "" if self.plane is None else self.name.rpartition("_slice")[0]


@dataclass(frozen=True)
class Reading:
    """How files are read; every loader uses the settings that apply to its layout.

    Attributes:
        modalities: the channels, in this order; empty for all that are present.
        slices: first slice of a volume and the one after the last, as in a Python slice.
        plane: how volumes are sliced, a name of :data:`guided_diffusion.data.geometry.PLANES`.
        blank_slices: keep slices of a volume whose image is constant.
        normalise: a name of :data:`guided_diffusion.data.intensity.NORMALISATIONS`.
        cache_dir: where decoded volumes are kept; None keeps a few in memory.
        classes: the mask's channels; None makes one channel of everything above 0.
    """

    modalities: tuple[str, ...] = ()
    slices: tuple[int | None, int | None] = (None, None)
    plane: str = "axial"
    blank_slices: bool = True
    normalise: str = "auto"
    cache_dir: Path | None = None
    classes: Classes | None = None


AS_STORED = Reading()


class SegmentationDataset(Dataset[Case]):
    """The base class of the loaders: what is known without decoding a file, and the cases.

    A loader passes its entries to ``__init__``, and overrides ``read_image`` and ``read_mask`` if a
    case is not one file with one mask. Sorting, unique names and the checks of every case are done
    here.

    Attributes: ``layout`` ('BRATS', 'ISIC', 'KVASIR', 'CUSTOM', ...), ``channels`` (of the image),
    ``names`` (sorted), ``entries`` and ``patients`` (in the same order), ``modalities`` (the names
    of the channels, where they have any), ``classes`` (of the mask, None for a single one),
    ``normalise`` (never 'auto'), ``plane`` (in which volumes are sliced), ``masks`` (what their
    values mean, decided by the first that is read), ``brats`` (what :class:`MaskSet` says of it)
    and ``notes`` for the run to print, such as ignored files.
    """

    layout = ""
    usual_scale = "none"
    brats = ""
    plane = "axial"
    modalities: tuple[str, ...] = ()
    _last: tuple[Path, Placed] | None = None

    def __init__(
        self,
        directory: Path,
        entries: Iterable[Entry],
        *,
        channels: int,
        reading: Reading = AS_STORED,
    ) -> None:
        self.directory = directory
        self.entries = sorted(entries, key=lambda entry: entry.name)
        self.names = [entry.name for entry in self.entries]
        self.channels = channels
        self.classes = reading.classes
        self.masks = MaskSet(mask_files(self.entries), reading.classes, brats=self.brats)
        self.plane = reading.plane
        few = [self.entries[k * len(self.entries) // FEW] for k in range(FEW) if self.entries]
        self.notes = unstated_note(f for e in few for f in (e.images[0], e.mask) if f)
        self.normalise = self.usual_scale if reading.normalise == "auto" else reading.normalise
        _require_unique(directory, self.names)

    @property
    def patients(self) -> list[str]:
        """The patient of each case, in the order of ``names``; empty where unknown."""
        return [entry.patient for entry in self.entries]

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Decode the image, float32 [C, H, W], and its affine where the format has one.

        Pictures are in [0, 1] and NIfTI slices as stored, except slices of a volume, which are
        scaled by the whole volume.
        """
        path = entry.images[0]
        if not is_nifti(path):
            return read_image_file(path, channels=self.channels)
        values, placed = read_nifti_slice(path)
        self._last = path, placed
        return torch.from_numpy(values)[None], plane_affine(placed)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the mask, float32 [K, H, W] in [0, 1]; None where the entry has none.

        A mask in NIfTI is brought onto the grid of the image, and refused where it does not lie on
        it.
        """
        if entry.mask is None:
            return None
        like = self._image_place(entry) if is_nifti(entry.mask) else None
        return self.masks.read(entry.mask, like=like)

    def read_raters(self, entry: Entry) -> Tensor | None:
        """Decode the masks of several raters, float32 [R, K, H, W]; None where there are none.

        Raises:
            UserError: a mask cannot be used, or has another size than the first.
        """
        masks = [self.read_rater(entry, path) for path in entry.raters]
        require_one_size(entry.raters, masks)
        return torch.stack(masks) if masks else None

    def read_rater(self, entry: Entry, path: Path) -> Tensor:
        """Decode the mask of one rater, as :meth:`read_mask` does."""
        mask = self.read_mask(entry._replace(mask=path, raters=()))
        assert mask is not None
        return mask

    def _image_place(self, entry: Entry) -> tuple[Path, Placed] | None:
        """The image's file and where it lies: as it was read last, or by its header."""
        path = entry.images[0]
        if self._last is None or self._last[0] != path:
            self._last = (path, place(read_grid(path), self.plane)) if is_nifti(path) else None
        return self._last

    def placed(self, entry: Entry) -> Placed | None:
        """Say where the planes of a case lie, by headers alone; None for pictures.

        The image's file decides; if its header states nothing, the mask's may.
        """
        image = self._image_place(entry)
        if image is None or image[1].grid.stated or not (entry.mask and is_nifti(entry.mask)):
            return image and image[1]
        mask = read_grid(entry.mask)
        same = mask.stated and mask.shape == image[1].grid.shape
        return replace(image[1], grid=mask) if same else image[1]

    def convert_to(self, channels: int) -> None:
        """Read grey pictures as colour, or colour that is grey as grey, as a network needs it.

        Nothing happens to data of another number of channels than 1 and 3, and to NIfTI files.
        """
        converts = type(self).read_image is SegmentationDataset.read_image
        pictures = not any(is_nifti(entry.images[0]) for entry in self.entries[:1])
        if converts and pictures and {channels, self.channels} == {1, 3}:
            self.channels = channels
            kind = "colour" if channels == 3 else "grey"
            self.notes = [*self.notes, f"pictures are read in {kind}, as the network needs"]

    def has_mask(self, entry: Entry) -> bool:
        """Whether the entry's mask is known, without decoding it."""
        return entry.mask is not None

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        cases, channels = counted(len(self), f"{self.layout} case"), self.channels
        return f"{cases}, {counted(channels, 'channel')}, {self.directory}"

    def __getitem__(self, index: int) -> Case:
        """Read case ``index``; raises a :class:`UserError` naming a file that cannot be used."""
        entry = self.entries[index]
        try:
            return self._read(entry)
        except (RuntimeError, ValueError, MemoryError) as error:
            if not (problem := memory_problem(error)):
                raise
            path = entry.images[0]
        raise UserError(path, problem, "Use a smaller image, or a larger machine.")

    def _read(self, entry: Entry) -> Case:
        image, affine = self.read_image(entry)
        if entry.plane is None:
            image = scaled(image, self.normalise)
        raters = self.read_raters(entry)
        mask = self.read_mask(entry) if raters is None else majority(raters, self.classes)

        _check_case(entry, image, mask, channels=self.channels)
        return Case(image, mask, entry.name, affine, raters=raters)


def mask_files(entries: Sequence[Entry]) -> list[Path | None]:
    """Every mask of some cases: the first of each case, then those of the other raters."""
    others = (path for entry in entries for path in entry.masks if path != entry.mask)
    return [*(entry.mask for entry in entries), *others]


def raters_text(entries: Sequence[Entry]) -> str:
    """'2 to 4 raters in 30 of 40 cases'; empty where no case has several."""
    counts = sorted(len(entry.raters) for entry in entries if entry.raters)
    if not counts:
        return ""
    few = "" if counts[0] == counts[-1] else f"{counts[0]} to "
    return f"{few}{counts[-1]} raters in {len(counts)} of {counted(len(entries), 'case')}"


def require_one_size(paths: Sequence[Path], masks: Sequence[Tensor]) -> None:
    """Refuse masks of several raters that differ in size."""
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise UserError(
                path,
                f"the mask is {size_text(mask)}, but {paths[0]} is {size_text(masks[0])}",
                "Export the masks of all raters at the size of the image.",
            )


def majority(raters: Tensor, classes: Classes | None) -> Tensor:
    """Fuse the masks of raters, [R, K, H, W] in [0, 1], into float32 [K, H, W] of 0 and 1.

    A pixel is foreground if at least half of the raters mark it; of classes that exclude each
    other it gets the one with the most votes, the first of equals.
    """
    votes = (raters >= 0.5).to(torch.float32).mean(dim=0)
    if classes is None:
        return (votes >= 0.5).to(votes.dtype)
    return torch.from_numpy(classes.masks(votes.numpy())).to(votes.dtype)


def readable(dataset: SegmentationDataset, indices: Iterable[int]) -> Iterator[Case]:
    """Read cases one after the other, skipping those that cannot be used."""
    for index in indices:
        try:
            case = dataset[index]
        except UserError:
            continue
        yield case


def scaled(image: Tensor, how: str) -> Tensor:
    """Scale every channel of [C, H, W] by its own intensities."""
    if how == "none":
        return image
    channels = (channel.numpy() for channel in image)
    return torch.stack([torch.from_numpy(normalised(c, measure(c), how)) for c in channels])


def _require_unique(directory: Path, sorted_names: Sequence[str]) -> None:
    """Refuse equal names, for such cases would overwrite each other's results."""
    twice = sorted({first for first, second in pairwise(sorted_names) if first == second})
    if twice:
        problem = f"holds more than one case with the id {listing(twice)}"
        hint = "Rename one of the files, or move it to another folder."
        refuse(UserError(directory, problem, hint, cases=twice))


def _check_case(entry: Entry, image: Tensor, mask: Tensor | None, *, channels: int) -> None:
    if image.shape[0] != channels:
        raise UserError(
            entry.images[0],
            f"has {image.shape[0]} channels, but the rest of the data set has {channels}",
            "Convert the image, or remove it from the data set.",
        )
    if mask is not None and mask.shape[-2:] != image.shape[-2:]:
        raise UserError(
            entry.mask,
            f"the mask is {size_text(mask)}, but its image is {size_text(image)} "
            f"({entry.images[0]})",
            "Export image and mask at the same size, and turned alike: orientations in EXIF count.",
        )


def read_as(dataset: SegmentationDataset) -> dict[str, str]:
    """How a data set's images are read, as flags for the checkpoint to record."""
    return {
        "modalities": ",".join(dataset.modalities),
        "normalise": dataset.normalise,
        "plane": dataset.plane,
    }
