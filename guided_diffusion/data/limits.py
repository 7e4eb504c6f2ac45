"""Limits on what a file may ask for, checked before anything is allocated, for every format.

The size that a header states is compared with the bytes that the file has, as far as its packing
allows more of them, and the memory that decoding takes with ``--max_read_gib``.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image

from guided_diffusion.data.folders import size_of
from guided_diffusion.errors import UserError
from guided_diffusion.files import require_file
from guided_diffusion.options.reading import ReadingOptions

GIB = 2**30
DEFLATE, LZW, JPEG = 1032, 1400, 1100
"""Bytes that one packed byte stands for at most; of JPEG with as little as one bit for a block."""
ALWAYS_FINE = 2**20
"""Unpacked bytes that no packed file is too short for."""
MOST_EXTENSIONS = 2**26
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_TIFF = {"raw": 1, "packbits": 64, "tiff_lzw": LZW, "tiff_adobe_deflate": DEFLATE, "jpeg": JPEG}
_PICTURES = {"PNG": DEFLATE, "JPEG": JPEG, "MPO": JPEG, "GIF": LZW}
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
"""Formats of pictures that are read, whatever a file is called."""


_limit = ReadingOptions.max_read_gib


def set_limit(gib: float, worker: int = 0) -> None:
    """Set how many GiB the decoding of one file may take in this process; 0 for no limit.

    ``worker`` is the number that torch gives a reading process; it has no effect.
    """
    global _limit
    _limit = gib


def limit() -> float:
    """The GiB that the decoding of one file may take, for processes that this one starts."""
    return _limit


def most_bytes() -> float:
    """The memory that the decoding of one file may take."""
    return _limit * GIB if _limit > 0 else math.inf


def require_memory(path: object, needed: float, what: str) -> None:
    """Raise a :class:`UserError` where decoding ``what`` takes more than the limit."""
    if needed > most_bytes():
        problem = f"decoding {what} takes {needed / GIB:.3g} GiB"
        hint = f"Check the file; if it is right, raise --max_read_gib, which is {_limit:g}."
        raise UserError(path, f"{problem}, more than is allowed", hint)


def require_size(
    path: Path,
    shape: Sequence[int],
    *,
    stored: float,
    memory: float,
    packed: float = 1,
    fine: float = ALWAYS_FINE,
    start: float = 0,
    file: Path | None = None,
) -> None:
    """Compare what a header states with the bytes at hand, and with the limit.

    Args:
        path: the file, for the message.
        shape: what it states, in the order of its header.
        stored: bytes that one value takes in the file, unpacked.
        memory: bytes that one value takes while it is decoded.
        packed: unpacked bytes that one byte of the file stands for at most.
        fine: unpacked bytes for which no packed file is too short.
        start: bytes before the values.
        file: what is measured, where that is another one than ``path``.

    Raises:
        ValueError: a negative length, or more than the file can hold.
        UserError: more than the limit.
    """
    text = size_of(shape)
    if min(shape, default=0) < 0 or not math.isfinite(start) or start < 0:
        raise ValueError(f"its header states {text} values from byte {start:g} on")
    count, size = math.prod(map(int, shape)), (file or path).stat().st_size
    held = size if packed == 1 else max(fine, packed * size)
    if start + count * stored > held:
        raise ValueError(f"its header states {text} values, which its {size} bytes cannot hold")
    require_memory(path, count * memory, f"{text} values")


class NiftiHeader(NamedTuple):
    """What the header of a NIfTI file states: lengths, type, first byte of the voxels, scaling."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    scaled: bool

    @property
    def end(self) -> int:
        """The first byte behind the voxels."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def nifti_header(path: Path, *, shown: Path | None = None) -> NiftiHeader:
    """Read the header of a NIfTI file and check it, before nibabel reads it.

    Raises:
        OSError, EOFError, ValueError, zlib.error: it cannot be read, or states what cannot be.
        UserError: a pipe, a socket or a device, or more voxels than the limit allows.
    """
    require_file(path)
    zipped = path.name.lower().endswith(".gz")
    with gzip.open(path) if zipped else path.open("rb") as file:
        head = file.read(544)
        sizes = {int.from_bytes(head[:4], order) for order in _ORDERS}
        size = 540 if 540 in sizes else 348
        if len(head) < size:
            raise ValueError(f"it holds {len(head)} bytes, a header has {size}")
        kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
        header: Any = kind(head[:size], check=False)
        axes = int(header["dim"][0])
        if not 1 <= axes <= 7:
            raise ValueError(f"its header states {axes} axes")
        shape = tuple(map(int, header.get_data_shape()))
        dtype = _type_of(header)
        offset = float(header["vox_offset"])
        start = int(offset) if math.isfinite(offset) else -1
        _require_extensions(file, head, size, start, header.endianness)
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    scaled = math.isfinite(slope) and slope != 0 and (slope, intercept) != (1, 0)
    require_size(
        shown or path,
        shape,
        stored=dtype.itemsize,
        memory=dtype.itemsize + 8 * scaled + 5,  # scaled in float64, then float32 and a test of it
        packed=DEFLATE if zipped else 1,
        start=start,
        file=path,
    )
    return NiftiHeader(shape, dtype, start, scaled)


def _type_of(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype = np.dtype(header.get_data_dtype())
    except Exception as error:
        raise ValueError(f"its header states an unknown type of data, {code}") from error
    if not dtype.itemsize:
        raise ValueError(f"its header states an unknown type of data, {code}")
    return dtype


def _require_extensions(file: Any, head: bytes, size: int, start: int, order: str) -> None:
    """Check the chain of extensions, which nibabel would follow wherever it leads."""
    first = size + 4
    if len(head) <= size or head[size : size + 1] == b"\0" or start < first + 16:
        return
    if start > MOST_EXTENSIONS:
        raise ValueError(f"its header states extensions of {start} bytes")
    file.seek(first)
    content = file.read(start - first)
    place = 0
    while start - first - place >= 16:
        (length,) = struct.unpack(f"{order}i", content[place : place + 4])
        if length < 16 or place + length > len(content):
            raise ValueError("the extensions of its header are broken")
        place += length


def require_picture(path: Path, picture: Image.Image) -> None:
    """Check the size that the header of a picture states.

    Raises:
        ValueError: more pixels than the file can hold.
        UserError: more than the limit allows.
    """
    grey = picture.mode in ("1", "L", "P")
    deep = picture.mode[0] in "IF"
    colours = 1 if grey or deep or picture.mode in ("LA", "La") else 3
    bits = 1 if picture.mode in ("1", "L", "P") else 8 * len(picture.getbands())
    packed: float = _PICTURES.get(picture.format or "", math.inf)
    if picture.format == "TIFF":
        packed = _TIFF.get(str(picture.info.get("compression")), math.inf)
    elif picture.format == "BMP" and picture.info.get("compression") in (0, 3):
        packed = 1
    require_size(
        path,
        picture.size[::-1],
        stored=bits / 8,
        memory=(2 if grey else 8) + 9 * colours,  # decoded and converted, then uint8 and float32
        packed=packed,
    )


def require_array(path: Path) -> tuple[int, ...]:
    """Check the header of a ``.npy`` file of [N, ...], which is read by single N; its shape.

    Raises:
        OSError, EOFError, ValueError, SyntaxError: it cannot be read as numbers, or states more
            than the file holds.
        UserError: a pipe, a socket or a device, or more than the limit allows.
    """
    require_file(path)
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its format is version {version[0]}.{version[1]}")
        first = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        start = file.tell()
    if dtype.kind not in "biuf" or dtype.hasobject:
        raise ValueError(f"its values are {dtype}")
    require_size(path, shape, stored=dtype.itemsize, memory=0, start=start)
    require_size(path, shape[1:], stored=0, memory=dtype.itemsize + 12)
    return tuple(map(int, shape))


def require_tensors(path: Path) -> None:
    """Check a file that ``torch.load`` is to read: what it unpacks to must be within the limit.

    Raises:
        UserError: a pipe, a socket or a device, or more than the limit allows.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile):
        size = path.stat().st_size if path.is_file() else 0
    require_memory(path, size, "its tensors")


def inflated_size(packed: Any, most: float) -> int:
    """Unpack a file of raw deflate from where it is, keeping nothing; stop above ``most`` bytes.

    Raises:
        zlib.error: it is not packed so.
    """
    unpacker, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while total <= most and not unpacker.eof:
        piece = unpacker.unconsumed_tail or packed.read(2**16)
        if not piece:
            break
        total += len(unpacker.decompress(piece, 2**24))
    return total
