"""Series of DICOM planes, as the volume that a NIfTI file of the same series would hold.

Planes are stacked by their position along their normal, never by their names or numbers. A series
that is no regular grid is refused, and nothing is resampled. Reading needs pydicom, which is
imported here alone (DICOM PS3.3, C.7.6.2 and C.11.1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt

from guided_diffusion.data.geometry import TOLERANCE, Affine, size_of
from guided_diffusion.data.readers import unreadable
from guided_diffusion.errors import UserError

HEADER_TAGS = [
    *("SOPClassUID", "ImageType", "PatientID", "SeriesInstanceUID", "SeriesNumber"),
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "ImagePositionPatient"),
    *("ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "PerFrameFunctionalGroupsSequence"),
    "SharedFunctionalGroupsSequence",
]
IN_SPACE = ("CT Image", "MR Image", "Positron Emission Tomography", "PET Image")
"""Names of the objects whose planes have a position by the standard."""
ANGLE = 1e-3
"""The largest difference between the components of two directions that count as one."""
MOST_PACKED, LEAST_PACKED = 1000, 2**24
"""Times the size of a compressed file that its pixels may take, and bytes that are always fine."""
Vector = tuple[float, ...]


class Plane(NamedTuple):
    """One plane of a series: where its pixels are, where they lie, and what their values mean.

    ``position`` is that of the first pixel, and ``orientation`` holds the directions in which
    columns and rows are counted, in millimetres along LPS axes. ``spacing`` is that of rows and of
    columns. ``low`` and ``high`` are the ends of the range of stored values.
    """

    path: Path
    frame: int
    position: Vector
    orientation: Vector
    spacing: Vector
    size: tuple[int, int]
    slope: float
    intercept: float
    inverted: bool
    low: int
    high: int

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value after scaling."""
        first, second = (self.slope * end + self.intercept for end in (self.low, self.high))
        return min(first, second), max(first, second)


class Stack(NamedTuple):
    """The planes of a volume in the order of their positions, and its affine in RAS axes."""

    planes: list[Plane]
    affine: Affine


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM behind its preamble; its name does not count."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


class Found(NamedTuple):
    """What one file holds: its planes, or the reason why it is left out.

    ``series`` and ``patient`` are the ids of both, and ``number`` is that of the series.
    """

    series: str = ""
    number: str = ""
    patient: str = ""
    left_out: str = ""
    planes: tuple[Plane, ...] = ()


def examine(path: Path) -> Found:
    """Read the header of a DICOM file.

    Raises:
        UserError: it cannot be read, its planes have no place, or pydicom is not installed.
    """
    pydicom = _pydicom(path)
    with _decoding(path):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=HEADER_TAGS)
        if reason := _left_out(header):
            return Found(left_out=reason)
        return Found(
            *(str(header.get("SeriesInstanceUID", "")), str(header.get("SeriesNumber") or "")),
            patient=str(header.get("PatientID") or ""),
            planes=tuple(_planes_of(path, header)),
        )


def _left_out(header: Any) -> str:
    """Say why a file is no plane of a volume; empty for one that is, or has to be."""
    kind = _kind(header)
    if "Directory" in kind:
        return "DICOMDIR"
    if "LOCALIZER" in [str(word).upper() for word in header.get("ImageType") or ()]:
        return "localizer"
    if " " in kind and "Image" not in kind:
        return kind.removesuffix(" Storage")
    if not kind or not header.get("Rows"):
        raise ValueError(f"its header states no {'size' if kind else 'class of objects'}")
    if header.get("SamplesPerPixel", 1) != 1 or "PALETTE" in _photometric(header):
        return "picture in colour"
    placed = "ImagePositionPatient" in header or "PerFrameFunctionalGroupsSequence" in header
    if not placed and not any(name in kind for name in IN_SPACE):
        return "picture without a position"
    return ""


def _planes_of(path: Path, header: Any) -> list[Plane]:
    """List the planes of a file: one, or one for each frame."""
    groups, shared = [header], header
    if "PerFrameFunctionalGroupsSequence" in header:
        groups = list(header.PerFrameFunctionalGroupsSequence)
        shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = int(header.get("NumberOfFrames") or 1)
    if frames != len(groups):
        raise ValueError(f"it states {frames} frames, and where {len(groups)} of them lie")
    if "ModalityLUTSequence" in header:
        raise ValueError("its values are scaled by a table, a Modality LUT")
    _require_bytes(path, header, frames)
    _require_decoder(path, header)
    return [_plane(path, header, shared, group, frame) for frame, group in enumerate(groups)]


def stack(folder: Path, planes: Sequence[Plane]) -> Stack:
    """Put planes in the order of their positions along their normal; they must be a regular grid.

    Raises:
        UserError: they differ in size, spacing or orientation, are tilted against their normal, or
            lie at uneven distances; ``folder`` names the series in the message.
    """
    first = planes[0]
    for plane in planes:
        _require_alike(plane, first)
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    normal = np.cross(row, column)
    planes = sorted(planes, key=lambda plane: float(np.dot(plane.position, normal)))
    places = np.array([plane.position for plane in planes])
    heights = places @ normal
    _require_even(folder, planes, heights)
    aside = places - places[0] - np.outer(heights - heights[0], normal)
    _require_straight(folder, aside, heights, min(first.spacing))

    step = (heights[-1] - heights[0]) / (len(planes) - 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * first.spacing[1], column * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = normal * step, places[0]
    affine[:2] *= -1
    return Stack(planes, affine)


def write_nifti(stacked: Stack, path: Path) -> None:
    """Decode the planes and write them as NIfTI, [columns, rows, planes], to ``path``.

    Values are scaled by slope and intercept of each plane; MONOCHROME1 is inverted before that, at
    the range of its stored values. Whole numbers are stored as int16 where they fit.

    Raises:
        UserError: a file cannot be decoded.
    """
    planes = stacked.planes
    height, width = planes[0].size
    values = np.empty((width, height, len(planes)), _type_of(planes), order="F")
    by_file: dict[Path, list[int]] = {}
    for index, plane in enumerate(planes):
        by_file.setdefault(plane.path, []).append(index)
    for file, indices in by_file.items():
        frames = _pixels(file, planes[indices[0]].size)
        for index in indices:
            values[..., index] = _scaled(frames[planes[index].frame], planes[index]).T
    image: Any = nib.Nifti1Image(values, stacked.affine)
    image.set_sform(stacked.affine, 1)
    image.set_qform(stacked.affine, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _type_of(planes: Iterable[Plane]) -> type[np.generic]:
    whole = all(float(x).is_integer() for plane in planes for x in (plane.slope, plane.intercept))
    fits = all(-(2**15) <= end < 2**15 for plane in planes for end in plane.ends)
    return np.int16 if whole and fits else np.float32


def _scaled(stored: npt.NDArray[Any], plane: Plane) -> npt.NDArray[np.float64]:
    values = stored.astype(np.float64)
    if plane.inverted:
        values = plane.low + plane.high - values
    return values * plane.slope + plane.intercept


def _pixels(path: Path, size: tuple[int, int]) -> npt.NDArray[Any]:
    """Decode the stored values of a file, [frames, rows, columns]."""
    pydicom = _pydicom(path)
    with _decoding(path):
        stored = np.asarray(pydicom.dcmread(path).pixel_array)
        return stored.reshape(-1, *size)


def _plane(path: Path, header: Any, shared: Any, own: Any, frame: int) -> Plane:
    """The plane of one frame; what enhanced objects say of all frames stands in ``shared``."""

    def value(sequence: str, name: str) -> Any:
        for group in (own, shared):
            if name in group:
                return group[name].value
            if group.get(sequence):
                return group[sequence][0].get(name)
        return None

    def numbers(sequence: str, name: str, count: int) -> Vector:
        found = tuple(map(float, value(sequence, name) or ()))
        if len(found) != count or not all(map(math.isfinite, found)):
            raise ValueError(f"{name} is {list(found) or 'missing'}")
        return found

    bits, signed = int(header.BitsStored), header.get("PixelRepresentation", 0)
    if not 0 < bits <= header.BitsAllocated <= 32:
        raise ValueError(f"BitsStored is {bits}, BitsAllocated {header.BitsAllocated}")
    low = -(2 ** (bits - 1)) if signed else 0
    orientation = numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    _require_right_angle(orientation)
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise ValueError(f"PixelSpacing is {list(spacing)}")
    slope = value("PixelValueTransformationSequence", "RescaleSlope")
    intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
    return Plane(
        path,
        frame,
        numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        orientation,
        spacing,
        (int(header.Rows), int(header.Columns)),
        *(1.0 if slope is None else float(slope), float(intercept or 0)),
        _photometric(header) == "MONOCHROME1",
        *(low, low + 2**bits - 1),
    )


def _require_right_angle(orientation: Vector) -> None:
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    for product, expected in ((row @ row, 1), (column @ column, 1), (row @ column, 0)):
        if abs(product - expected) > 2 * ANGLE:
            raise ValueError(f"ImageOrientationPatient {list(orientation)} has no right angle")


def _require_bytes(path: Path, header: Any, frames: int) -> None:
    """Refuse a size that the file cannot hold, before memory is taken for it."""
    needed = frames * header.Rows * header.Columns * (header.BitsAllocated // 8)
    there = path.stat().st_size
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_compressed or syntax.is_deflated:
        there = max(LEAST_PACKED, MOST_PACKED * there)
    if not needed or needed > there:
        stated = size_of((header.Rows, header.Columns, frames))
        raise ValueError(f"it states {stated} pixels, which its {path.stat().st_size} bytes lack")


def _require_decoder(path: Path, header: Any) -> None:
    syntax = header.file_meta.TransferSyntaxUID
    try:
        available = _pydicom(path).pixels.get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise UserError(
            path,
            f"its pixels are compressed as {syntax.name}, which cannot be decoded",
            "Run python -m pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or "
            "decompress the files with gdcmconv --raw.",
        )


def _require_alike(plane: Plane, first: Plane) -> None:
    """Refuse a plane that is not of the size, spacing and orientation of the first."""
    hint = "Move the files of each volume, and localizers, into separate folders."
    for what, own, other, most in (
        ("size", plane.size, first.size, 0.0),
        ("spacing", plane.spacing, first.spacing, ANGLE * min(first.spacing)),
        ("orientation", plane.orientation, first.orientation, ANGLE),
    ):
        if any(abs(a - b) > most for a, b in zip(own, other, strict=True)):
            problem = f"its {what} is {_text(own)}, but that of {first.path.name} is {_text(other)}"
            raise UserError(plane.path, f"{problem}, in the same series", hint)


def _require_even(folder: Path, planes: Sequence[Plane], heights: npt.NDArray[Any]) -> None:
    """Refuse planes that occur twice, lack others between them, or have uneven distances."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    at = int(np.argmin(gaps))
    if gaps[at] <= max(1e-4, TOLERANCE * usual):
        names = f"{planes[at].path.name} and {planes[at + 1].path.name}"
        raise UserError(
            folder,
            f"{names} lie at the same place, {heights[at]:.6g} mm along the normal ("
            f"{int((gaps <= max(1e-4, TOLERANCE * usual)).sum())} such pairs in {len(planes)} "
            "planes)",
            "Remove copies, and put time points, echoes and reconstructions into separate folders.",
        )
    even = np.linspace(heights[0], heights[-1], len(heights))
    step = (heights[-1] - heights[0]) / len(gaps)
    if np.abs(heights - even).max() > TOLERANCE * step:
        at = int(np.argmax(np.abs(gaps - usual)))
        missing = round(float((gaps / usual - 1)[gaps > 1.5 * usual].round().sum()))
        raise UserError(
            folder,
            f"its planes are unevenly spaced: {planes[at].path.name} and "
            f"{planes[at + 1].path.name} are {gaps[at]:.6g} mm apart, most others {usual:.6g} mm"
            + (f"; {missing} of {len(planes) + missing} planes may be missing" if missing else ""),
            "Restore the missing files, or resample the series to even spacing as NIfTI.",
        )


def _require_straight(
    folder: Path, aside: npt.NDArray[Any], heights: npt.NDArray[Any], pixel: float
) -> None:
    """Refuse planes that are not stacked along their normal, as with a tilted gantry."""
    shift = float(np.linalg.norm(aside, axis=1).max())
    if shift <= TOLERANCE * pixel:
        return
    line = np.outer((heights - heights[0]) / (heights[-1] - heights[0]), aside[-1])
    tilted = float(np.linalg.norm(aside - line, axis=1).max()) <= TOLERANCE * pixel
    angle = math.degrees(math.atan2(np.linalg.norm(aside[-1]), heights[-1] - heights[0]))
    raise UserError(
        folder,
        f"the gantry was tilted by {angle:.3g} degrees: planes are shifted by up to {shift:.4g} mm "
        "against their normal"
        if tilted
        else f"planes are shifted by up to {shift:.4g} mm against each other",
        "Resample the series to a grid with right angles as NIfTI, as dcm2niix does."
        if tilted
        else "Put the files of each volume into a separate folder.",
    )


def _text(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.5g}" for number in numbers)


def _kind(header: Any) -> str:
    """The name of a file's class of objects, such as 'CT Image Storage'; its UID if unknown."""
    uid = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    return str(getattr(uid, "name", ""))


def _photometric(header: Any) -> str:
    return str(header.get("PhotometricInterpretation") or "").strip().upper()


def _pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise UserError(
            path,
            "is a DICOM file, and pydicom, which reads them, is not installed",
            "Run python -m pip install 'pydicom>=3,<4'.",
        ) from error
    return pydicom


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever pydicom raises for a damaged file into a :class:`UserError`."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # pydicom has errors of many classes
        raise unreadable(path, error, "plane of a series") from error
