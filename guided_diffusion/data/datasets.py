"""What a case is, what every data set promises, and how a case meets the network's square.

The contract comes first: :class:`Case` (one picture with its mask), :class:`Entry` (the files
behind it) and :class:`SegmentationDataset`, which the loaders of the floor above fill, one layout
each. Then :class:`Frame`, the one place where pictures and masks are cropped or resized and
brought back. Called by the loaders, by training (through :class:`ResizedDataset`) and by prediction
(:meth:`Frame.restore`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import listing, size_text
from guided_diffusion.data.intensity import measure, normalised
from guided_diffusion.data.readers import Affine
from guided_diffusion.errors import UserError, refuse

CROPS = ("auto", "none", "wolleb")
WOLLEB_SIZE, WOLLEB_CROP = 240, 8


class Case(NamedTuple):
    """One picture to segment, at its own size, and its truth where there is one.

    ``image`` is float32 [C, H, W]: pictures in [0, 1], NIfTI slices as stored. ``mask`` is float32
    [K, H, W] in [0, 1] (soft borders stay soft until :meth:`Frame.fit_mask`), or None. ``name`` is
    unique within its set and safe as a file name. ``affine`` is float64 [4, 4] for NIfTI input.
    ``label`` is the class of the whole image where its folder says one.
    """

    image: Tensor
    mask: Tensor | None
    name: str
    affine: Affine | None = None
    label: int | None = None


class Entry(NamedTuple):
    """Where a case lies on disk: its id, one file per channel (or one picture), its mask's file.

    ``plane`` is the axial position for one slice of a volume, None for two-dimensional files;
    ``patient`` is whom the case belongs to, empty where nobody knows.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None
    plane: int | None = None
    patient: str = ""

    @property
    def volume(self) -> str:
        """The name of the volume that a slice was cut from; empty for two-dimensional files."""
        return "" if self.plane is None else self.name.rpartition("_slice")[0]


@dataclass(frozen=True)
class Reading:
    """How files are read; every loader is given one and uses what its layout knows.

    Attributes:
        modalities: which channels, in this order; empty for all there are.
        slices: first and last-plus-one axial slice of a volume, as Python's slices have them.
        blank_slices: keep slices of a volume whose image is constant.
        normalise: a name of :data:`guided_diffusion.intensity.NORMALISATIONS`.
        cache_dir: where decoded volumes are kept; None keeps a few in memory.
        classes: the mask's channels; None makes one of everything above 0.
    """

    modalities: tuple[str, ...] = ()
    slices: tuple[int | None, int | None] = (None, None)
    blank_slices: bool = True
    normalise: str = "auto"
    cache_dir: Path | None = None
    classes: Classes | None = None


AS_STORED = Reading()


class SegmentationDataset(Dataset[Case]):
    """What every layout promises: its facts without decoding a file, its cases one by one.

    A loader lists its entries and hands them to ``__init__``, then says how to read one entry's
    image and mask; sorting, unique names and the checks of every case happen here.

    Attributes: ``layout`` ('BRATS', 'ISIC', 'KVASIR', 'CUSTOM', ...), ``channels`` (of the image),
    ``names`` (sorted), ``entries`` and ``patients`` (in the same order), ``modalities`` (where the
    channels are called so), ``classes`` (of the mask, None for one of everything), ``normalise``
    (never 'auto') and ``notes``: what the run should say about the folder, such as files that were
    left aside.
    """

    layout = ""
    usual_scale = "none"
    modalities: tuple[str, ...] = ()

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
        self.notes: list[str] = []
        self.normalise = self.usual_scale if reading.normalise == "auto" else reading.normalise
        _require_unique(directory, self.names)

    @property
    def patients(self) -> list[str]:
        """Whom each case belongs to, in the order of ``names``; empty text where nobody knows."""
        return [entry.patient for entry in self.entries]

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Decode the image, float32 [C, H, W], and its affine where the format has one.

        Values are as stored, but for a slice of a volume, which is scaled by the whole of it.
        """
        raise NotImplementedError

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the mask, float32 [K, H, W] in [0, 1]; None where the entry has none."""
        raise NotImplementedError

    def has_mask(self, entry: Entry) -> bool:
        """Whether the entry's mask is known, without decoding it."""
        return entry.mask is not None

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return f"{len(self)} {self.layout} cases, {self.channels} channels, {self.directory}"

    def __getitem__(self, index: int) -> Case:
        """Read case ``index``; a file that cannot be used is a :class:`UserError` naming it."""
        entry = self.entries[index]
        image, affine = self.read_image(entry)
        if entry.plane is None:
            image = scaled(image, self.normalise)
        mask = self.read_mask(entry)

        _check_case(entry, image, mask, channels=self.channels)
        return Case(image, mask, entry.name, affine)


def readable(dataset: SegmentationDataset, indices: Iterable[int]) -> Iterator[Case]:
    """Read cases one after the other, leaving out those that cannot be used."""
    for index in indices:
        try:
            case = dataset[index]
        except UserError:
            continue
        yield case


def scaled(image: Tensor, how: str) -> Tensor:
    """[C, H, W], every channel scaled by its own intensities."""
    if how == "none":
        return image
    channels = (channel.numpy() for channel in image)
    return torch.stack([torch.from_numpy(normalised(c, measure(c), how)) for c in channels])


def _require_unique(directory: Path, sorted_names: Sequence[str]) -> None:
    """Two cases with one name would overwrite each other's results."""
    twice = sorted({first for first, second in pairwise(sorted_names) if first == second})
    if twice:
        error = UserError(
            directory,
            found=f"more than one case with the id {listing(twice)}",
            expected="one case per id",
            hint="Rename one of the files, or move it to another folder.",
            cases=twice,
        )
        refuse(error)


def _check_case(entry: Entry, image: Tensor, mask: Tensor | None, *, channels: int) -> None:
    if image.shape[0] != channels:
        raise UserError(
            entry.images[0],
            found=f"{image.shape[0]} image channels",
            expected=f"{channels} as in the rest of the set",
            hint="Convert the picture, or remove it from the set.",
        )
    if mask is not None and mask.shape[-2:] != image.shape[-2:]:
        raise UserError(
            entry.mask,
            found=f"a mask of {size_text(mask)} for an image of {size_text(image)}",
            expected=f"the size of its image {entry.images[0]}",
            hint="Export image and mask at the same size.",
        )


@dataclass(frozen=True)
class Frame:
    """How a case is brought to the network's square and back.

    ``crop`` = 0 resizes to ``image_size`` x ``image_size``. ``crop`` > 0 takes that many pixels off
    every side and resizes nothing, so the network sees the cropped size whatever ``image_size``
    says (Wolleb: 240 -> 224). A case that already has the target size is not resampled.
    """

    image_size: int
    crop: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.crop < 0:
            raise UserError(
                "--image_size / --crop",
                found=f"image_size {self.image_size}, crop {self.crop}",
                expected="a positive size and a crop of 0 or more pixels",
                hint="Give a size such as --image_size 256.",
            )

    def fit_image(self, image: Tensor) -> Tensor:
        """Image float32 [C, H, W] -> [C, h, w]; resizing is bilinear and antialiased."""
        return self._cropped(image) if self.crop else _resize(image, self._square)

    def fit_mask(self, mask: Tensor) -> Tensor:
        """Mask float32 [K, H, W] in [0, 1] -> [K, h, w] in {0, 1}, by the image's geometry.

        The coverage of every target pixel is computed first and cut at one half last, once, so that
        areas are kept (cutting before the resize, or at 0 after it, would dilate the mask).
        """
        return (self.fit_image(mask) >= 0.5).to(mask.dtype)

    def fit(self, case: Case) -> Case:
        """Image and mask of ``case`` brought to the square; name and affine are kept."""
        mask = None if case.mask is None else self.fit_mask(case.mask)
        return case._replace(image=self.fit_image(case.image), mask=mask)

    def seen(self, values: Tensor) -> Tensor:
        """The part of a map [..., H, W] at the case's size that the network sees."""
        return self._cropped(values) if self.crop else values

    def restore(self, soft: Tensor, size: tuple[int, int]) -> Tensor:
        """Soft map [..., h, w] -> [..., H, W] for ``size`` = (H, W); stays within its own range.

        A cropped border comes back as 0. Raises :class:`UserError` where no picture of ``size`` can
        have been cropped to h x w.
        """
        if not self.crop:
            return _resize(soft, size)
        border = 2 * self.crop
        if (soft.shape[-2] + border, soft.shape[-1] + border) != tuple(size):
            raise UserError(
                "--crop",
                found=f"a map of {size_text(soft)} for a picture of {size[0]} x {size[1]}",
                expected=f"a picture {border} pixels larger than the map on both axes",
                hint="Use the crop that the checkpoint was trained with.",
            )
        return functional.pad(soft, (self.crop,) * 4)

    @property
    def _square(self) -> tuple[int, int]:
        return self.image_size, self.image_size

    def _cropped(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if min(height, width) <= 2 * self.crop:
            raise UserError(
                "--crop",
                found=f"a picture of {height} x {width}",
                expected=f"more than {2 * self.crop} pixels on both axes",
                hint="Pass --crop none to resize instead.",
            )
        return image[..., self.crop : height - self.crop, self.crop : width - self.crop]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] -> [..., *size]: bilinear, antialiased on shrinking, in the input's range."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])
    resized = functional.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return resized.clamp(image.min(), image.max()).reshape(*image.shape[:-2], *size)


def auto_frame(
    layout: str, size: tuple[int, int], *, version: str, image_size: int, crop: str = "auto"
) -> Frame:
    """The frame for ``--crop auto|none|wolleb``, from the layout and the cases' own size (H, W).

    auto: BraTS slices of 240 x 240 with the plain network and ``image_size`` 256 are cropped to 224
    as Wolleb et al. (2022) do; everything else is resized to ``image_size``.
    """
    if crop not in CROPS:
        raise UserError(
            "--crop", found=repr(crop), expected=f"one of {', '.join(CROPS)}", hint="Pick one."
        )
    as_wolleb = (
        layout == "BRATS"
        and tuple(size) == (WOLLEB_SIZE, WOLLEB_SIZE)
        and version == "plain"
        and image_size == 256
    )
    cropped = crop == "wolleb" or (crop == "auto" and as_wolleb)
    return Frame(image_size, WOLLEB_CROP if cropped else 0)


class ResizedDataset(Dataset[Case]):
    """A data set seen through a frame: every case at the network's size, its mask in {0, 1}.

    Where two classes that exclude each other cover half of a pixel each, the first one has it.
    """

    def __init__(self, dataset: SegmentationDataset, frame: Frame) -> None:
        self.dataset = dataset
        self.frame = frame

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, fitted."""
        case, classes = self.frame.fit(self.dataset[index]), self.dataset.classes
        if case.mask is None or classes is None or not classes.exclusive:
            return case
        return case._replace(mask=case.mask * (case.mask.cumsum(dim=0) <= 1))


def read_as(dataset: SegmentationDataset) -> dict[str, str]:
    """How a data set's images were read, as flags; a checkpoint remembers it."""
    return {"modalities": ",".join(dataset.modalities), "normalise": dataset.normalise}
