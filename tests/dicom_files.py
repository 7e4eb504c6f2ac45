"""Small DICOM series, written with pydicom for the tests that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (0.96, 0.28, 0.0, -0.168, 0.576, -0.8)


def new(uid: Any = CTImageStorage) -> FileDataset:
    """An object without any image."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = uid, meta.MediaStorageSOPInstanceUID
    return made


def set_pixels(made: Dataset, values: npt.NDArray[Any]) -> None:
    """Put the stored values [..., rows, columns], int16 or uint16, into an object."""
    made.Rows, made.Columns = values.shape[-2:]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.PixelRepresentation = int(values.dtype.kind == "i")
    made.PixelData = values.tobytes()


def series(
    volume: npt.NDArray[Any],
    *,
    uid: str = "1.2.3",
    orientation: tuple[float, ...] = AXIAL,
    origin: tuple[float, ...] = (-20.0, -30.0, 40.0),
    spacing: tuple[float, float, float] = (0.5, 0.75, 2.5),
) -> list[FileDataset]:
    """The planes of ``volume`` [planes, rows, columns]; spacing is of planes last, rows first."""
    normal = np.cross(orientation[:3], orientation[3:])
    made = []
    for number, plane in enumerate(volume):
        one = new()
        one.SeriesInstanceUID, one.SeriesNumber, one.PatientID = uid, 7, "somebody"
        one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        one.InstanceNumber = len(volume) - number
        one.ImagePositionPatient = [
            float(f"{x:.6f}") for x in origin + number * spacing[2] * normal
        ]
        one.ImageOrientationPatient, one.PixelSpacing = list(orientation), list(spacing[:2])
        one.RescaleSlope, one.RescaleIntercept = 1, 0
        set_pixels(one, plane)
        made.append(one)
    return made


def enhanced(volume: npt.NDArray[Any], order: list[int], *, uid: str = "1.2.4") -> FileDataset:
    """One multi-frame object of the planes of :func:`series`, in another order."""
    planes = series(volume)
    made = new(EnhancedMRImageStorage)
    made.SeriesInstanceUID, made.SeriesNumber, made.NumberOfFrames = uid, 8, len(order)
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = planes[0].ImageOrientationPatient
    measures.PixelSpacing = planes[0].PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    made.SharedFunctionalGroupsSequence, made.PerFrameFunctionalGroupsSequence = [shared], []
    for index in order:
        frame, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = planes[index].ImagePositionPatient
        scale.RescaleSlope, scale.RescaleIntercept = 2, index
        frame.PlanePositionSequence = [position]
        frame.PixelValueTransformationSequence = [scale]
        made.PerFrameFunctionalGroupsSequence.append(frame)
    set_pixels(made, volume[order])
    return made


def save(folder: Path, files: list[FileDataset], *, ending: str = ".dcm") -> Path:
    """Write objects into a folder; the order of their names is not that of their positions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(files):
        one.save_as(folder / f"{(number * 7) % 100:02d}{ending}", enforce_file_format=True)
    return folder
