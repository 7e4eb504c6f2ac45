"""Opening of NIfTI files and pictures, within the limits, and what is said of damaged ones."""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import nibabel as nib
from nibabel import imageglobals
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from PIL import Image, ImageOps, TiffImagePlugin

from guided_diffusion.data.limits import FORMATS, NiftiHeader, nifti_header, require_picture
from guided_diffusion.errors import MEMORY_HINT, UserError, memory_problem
from guided_diffusion.files import require_file

UNREADABLE = (
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
RESTORE = "Restore it from the source, or remove the case from the data set."
_OPENING = threading.Lock()
_TAGGED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@contextmanager
def decoding(path: Path, kind: str, *, hint: str = RESTORE) -> Iterator[None]:
    """Turn whatever a decoder raises for a damaged file into a :class:`UserError` that names it.

    ``kind`` says what the file should be, and ``hint`` what to do.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:  # decoders have errors of many classes
        if problem := memory_problem(error):
            raise UserError(path, problem, MEMORY_HINT) from error
        why = shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise UserError(path, f"cannot be read as a {kind} ({why})", hint) from error


def load_nifti(path: Path, *, shown: Path | None = None) -> tuple[Any, NiftiHeader]:
    """Open a NIfTI file with nibabel, once its header is checked; no voxel is read.

    Raises what :func:`nifti_header` and nibabel raise.
    """
    header = nifti_header(path, shown=shown)
    with _unlogged(imageglobals.logger):
        return nib.load(path), header


@contextmanager
def _unlogged(logger: Any) -> Iterator[None]:
    """Leave out what a library logs on standard error beside its exceptions."""
    level = logger.level
    logger.setLevel(99)
    try:
        yield
    finally:
        logger.setLevel(level)


def decoded_picture(path: Path) -> Image.Image:
    """Decode a picture, turned as its EXIF says.

    Raises:
        UserError: it cannot be read, or the file holds several.
    """
    with opened_picture(path) as picture:
        if picture.format in ("TIFF", "GIF") and _has_more(path, picture):
            raise UserError(path, "holds several pictures", "Split it into single pictures.")
        with decoding(path, "picture"), _quiet(picture.format == "TIFF"):
            picture.load()
            upright(picture)
        return picture


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Leave out what libtiff, which knows no other way, prints on standard error."""
    try:
        kept = os.dup(2) if active else -1
    except OSError:  # it is closed
        kept = -1
    if kept < 0:
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _has_more(path: Path, picture: Image.Image) -> bool:
    with decoding(path, "picture"):
        try:
            picture.seek(1)
        except EOFError:
            picture.seek(0)
            return False
        return True


def upright(picture: Image.Image) -> None:
    """Turn a decoded picture in place as the orientation in its EXIF says, as viewers do."""
    if not any(key in picture.info for key in _TAGGED):
        return
    with warnings.catch_warnings(action="ignore"), suppress(*UNREADABLE, KeyError, TypeError):
        ImageOps.exif_transpose(picture, in_place=True)  # damaged EXIF states nothing


def opened_picture(path: Path, *, hint: str = RESTORE) -> Image.Image:
    """Open a picture with its header read, and its size within the limits.

    Raises:
        UserError: it cannot be read.
    """
    require_file(path)
    with decoding(path, "picture", hint=hint):
        with _OPENING, _unlogged(TiffImagePlugin.logger):  # pictures have this package's own limit
            theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path, formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = theirs
        try:
            require_picture(path, picture)
        except BaseException:
            picture.close()
            raise
        return picture
