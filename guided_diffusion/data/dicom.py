"""Series of DICOM planes, as the volume that a NIfTI file of the same series would hold.

Planes are stacked by their position along their normal, never by their names or numbers. A series
that is no regular grid is refused, and nothing is resampled. Reading needs pydicom, which is
imported here alone (DICOM PS3.3, C.7.6.2 and C.11.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt

from guided_diffusion.data.decoding import decoding
from guided_diffusion.data.dicom_grid import Plane, Stack, Vector, require_right_angle
from guided_diffusion.data.folders import size_of
from guided_diffusion.data.limits import (
    inflated_size,
    most_bytes,
    require_memory,
    require_size,
)
from guided_diffusion.errors import UserError
from guided_diffusion.files import require_file

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
PACKED = 1100
"""Bytes of pixels that a byte of a compressed file stands for at most."""
BLANK = 2**24
"""Bytes of pixels that JPEG 2000 may pack into next to nothing, where all are alike."""
DEFLATED = "1.2.840.10008.1.2.1.99"


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM behind its preamble; its name does not count."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
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
    with decoding(path, "plane of a series"):
        _require_inflated(path)
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


def write_nifti(stacked: Stack, path: Path) -> None:
    """Decode the planes and write them as NIfTI, [columns, rows, planes], to ``path``.

    Values are scaled by slope and intercept of each plane; MONOCHROME1 is inverted before that, at
    the range of its stored values. Whole numbers are stored as int16 where they fit.

    Raises:
        UserError: a file cannot be decoded.
    """
    planes = stacked.planes
    height, width = planes[0].size
    size = width * height * len(planes) * np.dtype(_type_of(planes)).itemsize
    require_memory(planes[0].path.parent, size, f"its {len(planes)} planes")
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
    with decoding(path, "plane of a series"):
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
    require_right_angle(orientation)
    spacing = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if min(spacing) <= 0:
        raise ValueError(f"PixelSpacing is {list(spacing)}")
    scale = value("PixelValueTransformationSequence", "RescaleSlope")
    slope = 1.0 if scale is None else float(scale)
    intercept = float(value("PixelValueTransformationSequence", "RescaleIntercept") or 0)
    if not slope or not math.isfinite(slope * intercept):
        raise ValueError(f"RescaleSlope is {slope}, RescaleIntercept {intercept}")
    return Plane(
        path,
        frame,
        numbers("PlanePositionSequence", "ImagePositionPatient", 3),
        orientation,
        spacing,
        (int(header.Rows), int(header.Columns)),
        *(slope, intercept),
        _photometric(header) == "MONOCHROME1",
        *(low, low + 2**bits - 1),
    )


def _require_bytes(path: Path, header: Any, frames: int) -> None:
    """Refuse a size that the file cannot hold, before memory is taken for it."""
    syntax = header.file_meta.TransferSyntaxUID
    shape = (int(header.Rows), int(header.Columns), frames)
    if 0 in shape:
        raise ValueError(f"it states {size_of(shape)} pixels")
    stored = header.BitsAllocated // 8
    packed = PACKED if syntax.is_compressed or syntax.is_deflated else 1
    require_size(path, shape, stored=stored, memory=stored + 16, packed=packed, fine=BLANK)


def _require_inflated(path: Path) -> None:
    """Refuse a deflated file that unpacks to more than the limit, as all of it is unpacked."""
    require_file(path)
    meta = _pydicom(path).filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID", "") == DEFLATED:
        with path.open("rb") as file:
            file.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
            require_memory(path, inflated_size(file, most_bytes()), "its deflated content")


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
            "Run python -m pip install 'pydicom>=3.0.1,<4'.",
        ) from error
    return pydicom
