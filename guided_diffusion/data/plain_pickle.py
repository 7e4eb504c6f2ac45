"""Reading of pickled lists of names, such as ``splits.pkl``, without running anything of them.

Only plain containers, texts and NumPy arrays of these can be in such a file. The stream is looked
at before it is unpickled, for one opcode may ask for gigabytes; and what is called is not NumPy's,
but functions here that take what such files have.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.errors import UserError
from guided_diffusion.files import require_file

MOST_BYTES = 2**26
"""Of a file: a million names have half of that."""
_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


class _Array:
    """Stands for ``numpy.ndarray``, which would allocate what it is called with."""


def _reconstruct(kind: object, shape: object, typecode: object) -> Any:
    """Make the empty array that ``numpy``'s pickles begin with."""
    if kind is not _Array or shape != (0,):
        raise pickle.UnpicklingError("an array does not begin empty")
    return np.empty(0, np.int8)


def _scalar(dtype: object, content: object) -> Any:
    """Make a NumPy scalar from its bytes."""
    if not isinstance(dtype, np.dtype) or not isinstance(content, bytes) or dtype.hasobject:
        raise pickle.UnpicklingError("a NumPy scalar has no bytes")
    if len(content) != dtype.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar has another length than its type")
    return np.frombuffer(content, dtype)[0]


def _frombuffer(content: object, dtype: object, shape: Any, order: Any) -> Any:
    """Make an array from its bytes, as protocol 5 writes them."""
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("an array has no bytes")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _encode(text: object, encoding: object) -> bytes:
    """Bytes, as protocol 2 and earlier ones write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes are not written as latin1")
    return text.encode("latin1")


_CALLED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", function.__name__.replace("_scalar", "scalar")): function
    for core in ("core", "_core")
    for module, function in (
        ("multiarray", _reconstruct),
        ("multiarray", _scalar),
        ("numeric", _frombuffer),
    )
}
"""The only pairs of module and name, and what is called instead."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Find one of the few names that such files need."""
        try:
            return _CALLED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} could run code") from None


def load_plain(path: Path) -> Any:
    """Unpickle a file of plain containers, texts, numbers and NumPy arrays.

    Raises:
        UserError: a pipe, a socket or a device, or an unusually long file.
        Exception: of many classes, where it is damaged or holds anything else.
    """
    require_file(path)
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        problem = f"is longer than {MOST_BYTES // 2**20} MiB, more than any list of names"
        raise UserError(path, problem, "Check that it is the right file.")
    _require_modest(content)
    return _Unpickler(io.BytesIO(content)).load()


def _require_modest(content: bytes) -> None:
    """Refuse a stream that states more bytes than it has, or numbers entries beyond their count."""
    for count, (code, argument, _) in enumerate(pickletools.genops(content)):
        if code.name in _MEMO and int(argument or 0) > count + 1:
            raise pickle.UnpicklingError(f"entry {argument} follows {count} others")
