"""What a case is, what every data set promises, and how a case meets the network's square.

The contract comes first: :class:`Case` (one picture with its mask), :class:`Entry` (the files
behind it) and :class:`SegmentationDataset`, which the loaders of the floor above fill, one layout
each. Then :class:`Frame`, the one place where pictures and masks are cropped or resized and
brought back, and the readers for pictures and NIfTI slices that the loaders share. Called by the
loaders, by training (through :class:`Framed`), by prediction (:meth:`Frame.restore`), by scoring.
"""

from __future__ import annotations

import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from guided_diffusion.errors import UserError

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI = (".nii.gz", ".nii")
CROPS = ("auto", "none", "wolleb")
WOLLEB_SIZE, WOLLEB_CROP = 240, 8


# ------------------------------------------------------------------------------- the contract


class Case(NamedTuple):
    """One picture to segment, at its own size, and its truth where there is one.

    ``image`` is float32 [C, H, W]: pictures in [0, 1], NIfTI slices as stored. ``mask`` is float32
    [K, H, W] in [0, 1] (soft borders stay soft until :meth:`Frame.fit_mask`), or None. ``name`` is
    unique within its set and safe as a file name. ``affine`` is float64 [4, 4] for NIfTI input.
    """

    image: Tensor
    mask: Tensor | None
    name: str
    affine: Affine | None = None


class Entry(NamedTuple):
    """Where a case lies on disk: its id, one file per channel (or one picture), its mask's file.

    ``plane`` is the axial position for one slice of a volume, None for two-dimensional files.
    """

    name: str
    images: tuple[Path, ...]
    mask: Path | None
    plane: int | None = None


class SegmentationDataset(Dataset[Case]):
    """What every layout promises: its facts without decoding a file, its cases one by one.

    A loader lists its entries and hands them to ``__init__``, then says how to read one entry's
    image and mask; sorting, unique names and the checks of every case happen here.

    Attributes: ``layout`` ('BRATS', 'ISIC', 'KVASIR', 'CUSTOM', ...), ``channels`` (of the image),
    ``names`` (sorted) and ``entries`` (in the same order).
    """

    layout = ""

    def __init__(self, directory: Path, entries: Iterable[Entry], *, channels: int) -> None:
        self.directory = directory
        self.entries = sorted(entries, key=lambda entry: entry.name)
        self.names = [entry.name for entry in self.entries]
        self.channels = channels
        _require_unique(directory, self.names)

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Decode the image, float32 [C, H, W], and its affine where the format has one."""
        raise NotImplementedError

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the mask, float32 [K, H, W] in [0, 1]; None where the entry has none."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Case:
        """Read case ``index``; a file that cannot be used is a :class:`UserError` naming it."""
        entry = self.entries[index]
        image, affine = self.read_image(entry)
        mask = self.read_mask(entry)

        _check_case(entry, image, mask, channels=self.channels)
        return Case(image, mask, entry.name, affine)


def _require_unique(directory: Path, sorted_names: Sequence[str]) -> None:
    """Two cases with one name would overwrite each other's results."""
    twice = sorted({first for first, second in pairwise(sorted_names) if first == second})
    if twice:
        raise UserError(
            directory,
            found=f"more than one case with the id {listing(twice)}",
            expected="one case per id",
            mend="Rename one of the files, or move it to another folder.",
        )


def _check_case(entry: Entry, image: Tensor, mask: Tensor | None, *, channels: int) -> None:
    if image.shape[0] != channels:
        raise UserError(
            entry.images[0],
            found=f"{image.shape[0]} image channels",
            expected=f"{channels} as in the rest of the set",
            mend="Convert the picture, or remove it from the set.",
        )
    if mask is not None and mask.shape[-2:] != image.shape[-2:]:
        raise UserError(
            entry.mask,
            found=f"a mask of {size_text(mask)} for an image of {size_text(image)}",
            expected=f"the size of its image {entry.images[0]}",
            mend="Export image and mask at the same size.",
        )


class Batch(NamedTuple):
    """Stacked cases: ``image`` [B, C, h, w], ``mask`` [B, K, h, w] or None, ``names`` [B]."""

    image: Tensor
    mask: Tensor | None
    names: list[str]


def collate(cases: Sequence[Case]) -> Batch:
    """Stack fitted cases into a :class:`Batch`; the mask is None unless every case has one."""
    first = cases[0]
    for case in cases:
        if case.image.shape != first.image.shape:
            raise UserError(
                f"case {case.name}",
                found=f"{size_text(case.image)} for the network",
                expected=f"{size_text(first.image)} as case {first.name}",
                mend="A crop needs pictures of one size: pass --crop none to resize them instead.",
            )
    masks = [case.mask for case in cases if case.mask is not None]
    return Batch(
        image=torch.stack([case.image for case in cases]),
        mask=torch.stack(masks) if len(masks) == len(cases) else None,
        names=[case.name for case in cases],
    )


# ---------------------------------------------------------------------- the network's square


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
                mend="Give a size such as --image_size 256.",
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
                mend="Use the crop that the checkpoint was trained with.",
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
                mend="Pass --crop none to resize instead.",
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
            "--crop", found=repr(crop), expected=f"one of {', '.join(CROPS)}", mend="Pick one."
        )
    as_wolleb = (
        layout == "BRATS"
        and tuple(size) == (WOLLEB_SIZE, WOLLEB_SIZE)
        and version == "plain"
        and image_size == 256
    )
    cropped = crop == "wolleb" or (crop == "auto" and as_wolleb)
    return Frame(image_size, WOLLEB_CROP if cropped else 0)


class Framed(Dataset[Case]):
    """A data set seen through a frame: every case at the network's size, its mask in {0, 1}."""

    def __init__(self, dataset: SegmentationDataset, frame: Frame) -> None:
        self.dataset = dataset
        self.frame = frame

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, fitted."""
        return self.frame.fit(self.dataset[index])


class Remembered(Dataset[Case]):
    """A data set that decodes each case once, as far as a bounded memory allows."""

    def __init__(self, dataset: Framed, *, most_bytes: int = 2**31) -> None:
        self.dataset = dataset
        self.room = most_bytes
        self.cases: dict[int, Case] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, fitted."""
        if index in self.cases:
            return self.cases[index]
        case = self.dataset[index]
        size = sum(part.nbytes for part in (case.image, case.mask) if part is not None)
        if size <= self.room:
            self.room -= size
            self.cases[index] = case
        return case


# ----------------------------------------------------------------------- folders and names


def open_folder(directory: str | os.PathLike[str]) -> Path:
    """The folder with ``~`` expanded; a missing one, or a file, is a :class:`UserError`."""
    folder = Path(directory).expanduser()
    if folder.is_dir():
        return folder
    raise UserError(
        folder,
        found="a file" if folder.exists() else "nothing there",
        expected="a folder of images and masks",
        mend="Pass the folder that holds the data set.",
    )


def walk(directory: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below (and ``directory`` itself) with its sorted file names; nothing is opened.

    Hidden files and folders are left out. Links to folders are followed, but no folder is visited
    twice, so a link that points upwards ends the walk there.
    """
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(directory, onerror=_refuse, followlinks=True):
        stat = Path(root).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if _is_visible(name))
        yield Path(root), sorted(name for name in files if _is_visible(name))


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed must not pass for an empty one."""
    raise UserError(
        error.filename,
        found=f"a folder that cannot be listed ({error.strerror})",
        expected="a readable folder",
        mend="Change its permissions, or move it out of the data set.",
    )


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def split_name(file_name: str) -> tuple[str, str]:
    """('slice.v2', '.nii.gz') from 'slice.v2.nii.gz'; the ending in lower case."""
    lower = file_name.lower()
    ending = next((end for end in NIFTI if lower.endswith(end)), Path(lower).suffix)
    return file_name[: len(file_name) - len(ending)], ending


def is_nifti(path: Path) -> bool:
    """Whether the file's ending says NIfTI."""
    return path.name.lower().endswith(NIFTI)


def safe_name(text: str) -> str:
    """A case id that any file system takes: separators and reserved characters become '_'."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", unicodedata.normalize("NFC", text))
    return name.strip(" .") or "_"


def listing(items: Iterable[object], *, most: int = 5) -> str:
    """The first few items for a message, with the count of the rest."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def size_text(image: Tensor) -> str:
    """'240 x 224' for a message."""
    return f"{image.shape[-2]} x {image.shape[-1]}"


# ------------------------------------------------------------------------------ the readers

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    Image.DecompressionBombError,
)
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def _unreadable(path: Path, error: Exception, kind: str) -> UserError:
    return UserError(
        path,
        found=f"a file that cannot be read ({error or type(error).__name__})",
        expected=f"a {kind}",
        mend="Restore it from the source, or take the case out of the set.",
    )


def read_nifti(path: Path) -> tuple[Array, Affine]:
    """Decode a NIfTI file: float32 array without trailing axes of length 1, its affine [4, 4].

    Values are scaled as the header says and otherwise as stored. Raises :class:`UserError` where
    the file cannot be decoded, is empty, or holds colours, complex, NaN or infinite values.
    """
    try:
        with np.errstate(all="ignore"):
            nifti: Any = nib.load(path)
            stored = np.asarray(nifti.dataobj)
            if stored.dtype.kind not in "biuf":
                raise ValueError(f"its values are {stored.dtype}")
            values = stored.astype(np.float32)
    except _UNREADABLE as error:
        raise _unreadable(path, error, "NIfTI image of real numbers") from error
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    _require_finite(path, values)
    return values, np.asarray(nifti.affine, dtype=np.float64)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The shape from the header alone, without trailing axes of length 1."""
    try:
        nifti: Any = nib.load(path)
        shape = tuple(int(length) for length in nifti.shape)
    except _UNREADABLE as error:
        raise _unreadable(path, error, "NIfTI image") from error
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read_nifti_slice(path: Path) -> tuple[Array, Affine]:
    """:func:`read_nifti` for a file that must be two-dimensional, [H, W]."""
    values, affine = read_nifti(path)
    if values.ndim != 2:
        raise UserError(
            path,
            found=f"a volume of {' x '.join(map(str, values.shape))}",
            expected="a two-dimensional slice",
            mend="Cut volumes into slices; whole volumes are read in the BRATS layout only.",
        )
    return values, affine


def label_mask(path: Path, values: Array) -> Array:
    """Label map -> {0, 1} (above 0 is 1); fractions in [0, 1] are a soft mask and are kept."""
    if np.abs(values - np.round(values)).max() < 1e-3:
        return (np.round(values) > 0).astype(np.float32)
    if values.min() >= 0 and values.max() <= 1:
        return values
    raise UserError(
        path,
        found=f"fractional labels from {values.min():g} to {values.max():g}",
        expected="whole label numbers, or a soft mask in [0, 1]",
        mend="Was an image given as the mask, or the label map interpolated?",
    )


def picture_channels(path: Path) -> int:
    """1 for a grey picture, 3 for a coloured one, from the header alone."""
    with _opened(path) as picture:
        return 1 if _is_grey(picture) else 3


def read_picture(path: Path, *, channels: int) -> Tensor:
    """Decode a picture to float32 [channels, H, W] in [0, 1].

    Grey is repeated where 3 channels are asked for; transparency is dropped; orientation tags are
    ignored, as masks rarely carry them. A coloured picture in a grey set is a :class:`UserError`.
    """
    values = _levels(path, _decoded(path))
    if values.ndim == 2:
        return torch.from_numpy(values).expand(channels, -1, -1).clone()
    if channels == 3:
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()
    return torch.from_numpy(_one_channel(path, values, "a grey picture as the rest of the set"))[
        None
    ]


def read_picture_mask(path: Path) -> Tensor:
    """Decode a mask picture to float32 [1, H, W] in [0, 1], soft borders kept.

    A palette picture is a label map: index above 0 is 1. So is a lossless grey one whose brightest
    value is below an eighth of white (labels 0, 1, 2, ...). A coloured mask is a
    :class:`UserError`.
    """
    picture = _decoded(path)
    if picture.mode == "P":
        return torch.from_numpy((np.asarray(picture) > 0).astype(np.float32))[None]

    values = _levels(path, picture)
    if values.ndim == 3:
        values = _one_channel(path, values, "a grey, black-and-white or palette mask")
    if picture.mode != "F" and values.max() < 1 / 8 and not path.suffix.lower().startswith(".jp"):
        values = (values > 0).astype(np.float32)
    return torch.from_numpy(values)[None]


def image_channels(path: Path) -> int:
    """1 for a NIfTI file or a grey picture, 3 for a coloured picture, from the header alone."""
    return 1 if is_nifti(path) else picture_channels(path)


def read_image_file(path: Path, *, channels: int) -> tuple[Tensor, Affine | None]:
    """One image of either kind, float32 [channels, H, W], and the affine of a NIfTI slice."""
    if not is_nifti(path):
        return read_picture(path, channels=channels), None
    values, affine = read_nifti_slice(path)
    return torch.from_numpy(values)[None], affine


def read_mask_file(path: Path) -> Tensor:
    """One mask of either kind, float32 [1, H, W] in [0, 1]."""
    if not is_nifti(path):
        return read_picture_mask(path)
    values, _ = read_nifti_slice(path)
    return torch.from_numpy(label_mask(path, values))[None]


def _opened(path: Path) -> Image.Image:
    """The picture with its header read."""
    try:
        return Image.open(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error, "picture") from error


def _decoded(path: Path) -> Image.Image:
    picture = _opened(path)
    with picture:
        if picture.format in ("TIFF", "GIF") and getattr(picture, "n_frames", 1) > 1:
            raise UserError(
                path,
                found="a file of several pictures",
                expected="one picture per file",
                mend="Split it into single pictures.",
            )
        try:
            picture.load()
            return picture
        except _UNREADABLE as error:
            raise _unreadable(path, error, "picture") from error


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA", "La", "F", *_DEEP_GREY)


def _levels(path: Path, picture: Image.Image) -> Array:
    """Pixel values in [0, 1], [H, W] for grey modes and [H, W, 3] for all others."""
    if picture.mode == "F":
        values, white = np.asarray(picture, dtype=np.float32), 1
    elif picture.mode in _DEEP_GREY:
        values, white = np.asarray(picture).astype(np.float32), 65535
    else:
        opaque = picture.convert("RGBA") if picture.mode == "P" else picture
        converted = opaque.convert("L" if _is_grey(picture) else "RGB")
        values, white = np.asarray(converted).astype(np.float32), 255

    _require_finite(path, values)
    if values.min() < 0 or values.max() > white:
        raise UserError(
            path,
            found=f"values from {values.min():g} to {values.max():g}",
            expected=f"values from 0 to {white}",
            mend="Scale the picture, or store it with 8 or 16 bits.",
        )
    return np.asarray(values / np.float32(white), dtype=np.float32)


def _one_channel(path: Path, values: Array, expected: str) -> Array:
    """[H, W, 3] -> [H, W] where the channels agree up to compression noise."""
    if np.ptp(values, axis=2).max() > 8 / 255:
        raise UserError(
            path,
            found="a coloured picture",
            expected=expected,
            mend="Convert it, or check that images and masks were not swapped.",
        )
    return np.ascontiguousarray(values[..., 0])


def _require_finite(path: Path, values: Array) -> None:
    if values.size == 0 or not np.isfinite(values).all():
        raise UserError(
            path,
            found="NaN or infinite values" if values.size else "no pixels",
            expected="finite numbers",
            mend="Repair the file, or take the case out of the set.",
        )
