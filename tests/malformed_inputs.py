"""Malformed inputs by family: what a stranger may put into a folder, a flag or a text file.

A family writes its files into an empty folder and returns what reads them. A new one is a function
with the decorator :func:`family`; the harness of ``benchmarks/malformed.py`` finds it by itself.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import dicom_files
import nibabel as nib
import numpy as np
from PIL import Image

from guided_diffusion.commands import main
from guided_diffusion.errors import exit_on_user_error

LIMIT = 1.0
"""GiB, as ``--max_read_gib`` has it."""
Attempt = Callable[[], object]
FAMILIES: dict[str, Callable[[Random, Path], Attempt]] = {}


def family(make: Callable[[Random, Path], Attempt]) -> Callable[[Random, Path], Attempt]:
    """Add a family, by its function's name."""
    FAMILIES[make.__name__.replace("_", " ")] = make
    return make


def command(name: str, *flags: object) -> Attempt:
    """What runs a command as a program does."""
    return lambda: main(name, [*map(str, flags), "--max_read_gib", str(LIMIT)])


def check(folder: Path, rng: Random, *flags: object) -> Attempt:
    """What reads every case of a folder, with volumes in memory or unpacked."""
    kept = rng.choice(["none", str(folder.parent / "cache")])
    return command("check", "--data_dir", folder, "--cache_dir", kept, *flags)


# ------------------------------------------------------------------------------- changed bytes

NUMBERS = (0, 1, 2, -1, 7, 255, 256, 32767, -32768, 65535, 2**24, 2**31 - 1, -(2**31), 2**32 - 1)
LARGE = (*NUMBERS, 2**40, 2**62, 2**63 - 1, -(2**63))
ODD = (float("inf"), float("-inf"), float("nan"))
FLOATS = (*ODD, 0.0, -1.0, 1e-40, 1e38, -1e38, 352.0, 1e9, 1e18)


def damaged(rng: Random, content: bytes) -> bytes:
    """Change, cut, double, insert or remove bytes anywhere, more often in the header."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        end = len(data) if rng.random() < 0.5 else min(len(data), 128)
        at = rng.randrange(max(end, 1))
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            number = rng.choice(NUMBERS) & 0xFFFFFFFF
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.randrange(64))
        elif kind == 4:
            del data[at : at + rng.randrange(64)]
        else:
            data += data[at : at + 4096]
    return bytes(data)


@cache
def zeros() -> bytes:
    """A gigabyte of zeros as gzip, in 1 MiB."""
    return gzip.compress(bytes(2**24)) * 64


def nifti(
    rng: Random, *, shape: tuple[int, ...] = (8, 9, 4), label: bool = False, two: bool = False
) -> bytes:
    kind: Any = nib.Nifti2Image if two else nib.Nifti1Image
    values = np.random.default_rng(rng.randrange(9)).integers(0, 2 if label else 900, shape)
    return kind(values.astype(np.uint8 if label else np.int16), np.diag([1, 2, 3, 1])).to_bytes()


def pairs(folder: Path, image: bytes, mask: bytes, ending: str) -> None:
    for side, content in (("images", image), ("masks", mask)):
        (folder / side).mkdir(parents=True)
        zipped = gzip.compress(content, 1) if ending == "nii.gz" else content
        (folder / side / f"a.{ending}").write_bytes(zipped)


@family
def nifti_headers(rng: Random, folder: Path) -> Attempt:
    """Lengths, types, offsets, scales and affines that nobody can mean."""
    two, shape = rng.random() < 0.3, rng.choice([(8, 9), (8, 9, 4), (4, 4, 4, 2)])
    whole = [nifti(rng, shape=shape, two=two), nifti(rng, shape=shape, label=True, two=two)]
    side = rng.randrange(2)
    kind: Any = nib.Nifti2Header if two else nib.Nifti1Header
    length = kind.template_dtype.itemsize
    fields = np.frombuffer(bytearray(whole[side][:length]), kind.template_dtype).copy()
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(["dim"] * 5 + ["datatype", "vox_offset", *fields.dtype.names])
        part = fields[name].reshape(-1)
        if part.dtype.kind not in "iuf":
            fields[name] = rng.randbytes(4)
            continue
        for _ in range(rng.choice([1, 1, 3])):
            some: Any = rng.choice(FLOATS if part.dtype.kind == "f" else LARGE)
            bits = part.dtype.itemsize * 8
            if part.dtype.kind != "f":
                some = some % 2**bits
                some -= 2**bits if part.dtype.kind == "i" and some >= 2 ** (bits - 1) else 0
            part[rng.randrange(len(part))] = some
    whole[side] = fields.tobytes() + whole[side][length:]
    if rng.random() < 0.1:  # extensions
        whole[side] = whole[side][:length] + b"\1\0\0\0" + rng.randbytes(16) + whole[side]
    ending = rng.choice(["nii", "nii.gz"])
    pairs(folder, *whole, ending)
    if ending == "nii.gz" and rng.random() < 0.3:
        with (folder / ("images", "masks")[side] / "a.nii.gz").open("ab") as file:
            file.write(zeros())
    return check(folder, rng)


@family
def nifti_bytes(rng: Random, folder: Path) -> Attempt:
    """Files that are cut or changed, before or after they were compressed."""
    whole = [nifti(rng), nifti(rng, label=True)]
    ending, side, inside = rng.choice(["nii", "nii.gz"]), rng.randrange(2), rng.random() < 0.4
    if inside:
        whole[side] = damaged(rng, whole[side])
    pairs(folder, *whole, ending)
    if not inside:
        path = folder / ("images", "masks")[side] / f"a.{ending}"
        path.write_bytes(damaged(rng, path.read_bytes()))
    return check(folder, rng)


# ------------------------------------------------------------------------------------ pictures


def picture(rng: Random, form: str, mode: str, **options: Any) -> bytes:
    depth = {"RGB": 3, "RGBA": 4, "L": 1, "P": 1, "1": 1}[mode]
    values = np.random.default_rng(rng.randrange(9)).integers(0, 256, (24, 32, depth), np.uint8)
    made = Image.fromarray(values.squeeze()) if depth > 1 else Image.fromarray(values[..., 0])
    made = made if depth > 1 else made.convert(mode)
    file = io.BytesIO()
    made.save(file, form, **options)
    return file.getvalue()


def mask_picture(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    values = np.zeros((24, 32), np.uint8)
    values[8:16, 8:16] = 255
    Image.fromarray(values).save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, content: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def honest_png() -> bytes:
    """180 megapixels of black."""
    return png(18_000, 10_000, 8, 0, zlib.compress(bytes(180_010_000), 1))


def forged(rng: Random, form: str, content: bytes) -> bytes:
    """State another size in the header."""
    data = bytearray(content)
    side = [rng.choice([0, 1, 31, 3000, 30_000, 65_535, 100_000, 2**31 - 1]) for _ in "wh"]
    if form == "PNG":
        return png(*side, rng.choice([1, 8, 16]), rng.choice([0, 2, 6]), zlib.compress(b"\0" * 999))
    if form == "JPEG":
        at = data.find(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", *(min(number, 65_535) for number in side))
    elif form == "BMP":
        data[18:26] = struct.pack("<ii", side[0], rng.choice([1, -1]) * side[1])
    elif form == "GIF":
        data[6:10] = struct.pack("<HH", *(min(number, 65_535) for number in side))
    else:  # TIFF: the values of some entries of the directory
        (start,) = struct.unpack("<I", data[4:8])
        (count,) = struct.unpack("<H", data[start : start + 2])
        for _ in range(rng.choice([1, 2, 3])):
            at = start + 2 + 12 * rng.randrange(count)
            if rng.random() < 0.3:
                data[at + 4 : at + 8] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
            else:
                data[at + 8 : at + 12] = struct.pack("<I", rng.choice(side))
    return bytes(data)


def two_pages(rng: Random) -> bytes:
    file = io.BytesIO()
    page = Image.new("L", (32, 24), 7)
    page.save(file, "TIFF", save_all=True, append_images=[page])
    data = bytearray(file.getvalue())
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    link = first + 2 + 12 * count
    (second,) = struct.unpack("<I", data[link : link + 4])
    if rng.random() < 0.5:
        data[link : link + 4] = struct.pack("<I", rng.choice([4, 9, first, 2**31, len(data) - 3]))
    else:
        at = second + rng.randrange(max(len(data) - second, 1))
        data[at : at + 12] = rng.randbytes(12)
    return bytes(data)


@family
def pictures(rng: Random, folder: Path) -> Attempt:
    """Forged and honest sizes, changed bytes, further pages, other formats under these names."""
    form = rng.choice(["PNG", "JPEG", "TIFF", "BMP"])
    modes = {"PNG": ["L", "RGB", "RGBA", "P", "1"], "JPEG": ["L", "RGB"]}
    options: dict[str, Any] = {}
    if form == "TIFF":
        options["compression"] = rng.choice([None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    mode = rng.choice(modes.get(form, ["L", "RGB", "1"]))
    whole = [picture(rng, form, mode, **options), mask_picture(form, **options)]
    side, kind = rng.randrange(2), rng.random()
    if kind < 0.45:
        whole[side] = forged(rng, form, whole[side])
    elif kind < 0.85:
        whole[side] = damaged(rng, whole[side])
    elif kind < 0.93:
        whole[side] = two_pages(rng)
    elif kind < 0.95:
        whole[side] = honest_png()
    else:
        other = rng.choice(["GIF", "PPM", "EPS", "WEBP", "ICO", "PCX", "TGA", "JPEG2000"])
        whole[side] = damaged(rng, picture(rng, other, "RGB"))
    pairs(folder, *whole, rng.choice(["png", "jpg", "tif", "bmp"]))
    return check(folder, rng)


# --------------------------------------------------------------------------- arrays and pickles


def read_arrays(folder: Path) -> Attempt:
    """What reads the arrays of the weak-supervision parent, as its commands do."""

    def read() -> None:
        from guided_diffusion.data.limits import set_limit
        from guided_diffusion.options.weak import SourceOptions
        from guided_diffusion.weak.train import open_labelled

        with exit_on_user_error():
            set_limit(LIMIT)
            dataset = open_labelled(SourceOptions(src_dir=str(folder)), "training")
            for index in range(len(dataset)):
                case = dataset[index]
                assert case.image.isfinite().all()

    return read


def array_bytes(rng: Random) -> bytes:
    values = np.zeros((3, 2, 8, 8), rng.choice([np.float32, np.uint8, np.float64]))
    values[:, 0] = np.random.default_rng(0).random((3, 8, 8)) * 9
    values[1:, 1, :3] = 1
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def arrays_in(folder: Path, content: bytes, split: bytes) -> None:
    (folder / "preprocessed").mkdir(parents=True)
    (folder / "preprocessed/v0.npy").write_bytes(content)
    (folder / "splits.pkl").write_bytes(split)


SPLIT = pickle.dumps([{"train": ["v0.npy"], "val": np.array(["v0.npy"]), "test": []}])
HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 2, 8, 8), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (1099511627776, 2, 8, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 2, 0, 8), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 2, 8, 8), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3, 2, 8, 8), }",
    "{'descr': '<c8', 'fortran_order': True, 'shape': (3, 2, 8, 8), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 2, 8, 8), }",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (2147483648, 2, 2, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 2, 8, 8), ",
    "{" * 900,
    "(" * 900 + ")" * 900,
    "'''",
    "\\",
    "{'shape': 1}",
)


@family
def arrays(rng: Random, folder: Path) -> Attempt:
    """``.npy`` files: headers of all sorts, changed bytes, numbers that are not finite."""
    content, kind = array_bytes(rng), rng.random()
    if kind < 0.4:
        text = rng.choice(HEADERS).encode() + b" " * rng.randrange(60) + b"\n"
        if rng.random() < 0.3:
            text = damaged(rng, text)
        major = rng.choice([1, 1, 2, 3, 9])
        length = struct.pack("<H" if major == 1 else "<I", min(len(text), 65_535))
        content = (
            b"\x93NUMPY" + bytes([major, 0]) + length + text + bytes(rng.choice([0, 64, 4096]))
        )
    elif kind < 0.8:
        content = damaged(rng, content)
    else:
        some = struct.pack("<f", rng.choice(ODD)) * 4
        at = 128 + 4 * rng.randrange(40)
        content = content[:at] + some + content[at + 16 :]
    arrays_in(folder, content, SPLIT)
    return read_arrays(folder)


class _Calls:
    """Pickles as the call of a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made


def _global(rng: Random) -> bytes:
    modules = ["numpy", "numpy.core.multiarray", "numpy.f2py.__main__", "numpy.testing", "os"]
    modules += ["builtins", "collections", "_codecs", "numpy.lib.npyio", "encodings.idna", "torch"]
    names = ["ndarray", "dtype", "_reconstruct", "scalar", "system", "eval", "load", "encode"]
    names += ["main", "OrderedDict", "fromfile", "a.b", "__class__"]
    args = [
        b"(I1099511627776\n",
        b"(I2147483647\nI2147483647\n",
        b"(V/etc/passwd\n",
        b"(",
        b"(Vx\n",
    ]
    found = f"c{rng.choice(modules)}\n{rng.choice(names)}\n".encode()
    return found + rng.choice(args) + b"tR."


@family
def pickles(rng: Random, folder: Path) -> Attempt:
    """``splits.pkl``: calls, opcodes that ask for gigabytes, deep and shared lists, others."""
    kind = rng.randrange(7)
    sizes = [2**31 - 1, 2**32 - 1, 2**40]
    if kind == 0:
        split = _global(rng)
    elif kind == 1:
        size = rng.choice(sizes)
        opcode = rng.choice([b"\x8e", b"\x8d", b"\x95", b"\x96"]) + struct.pack("<Q", size)
        if rng.random() < 0.5:
            opcode = rng.choice([b"]r", b"B", b"X", b"\x8b"]) + struct.pack("<I", size % 2**32)
        split = b"\x80\x04" + opcode + b"abc."
    elif kind == 2:
        split = b"]" + b"]" * rng.choice([10, 100_000]) + b"a" * 9 + b"."
    elif kind == 3:
        shared: Any = ["v0.npy"]
        for _ in range(40):
            shared = [shared, shared]
        split = pickle.dumps([{"train": shared, "val": shared}])
    elif kind == 4:
        odd = rng.choice(
            [{}, 5, None, "text", [1], [{"train": 7}], [{"train": [None], "val": [1]}]]
        )
        split = pickle.dumps(rng.choice([odd, [{"train": "v0.npy", "val": []}], {0: odd}]))
    elif kind == 5:
        made = rng.choice(
            [_Calls(np.zeros, 2**40), _Calls(os.system, "exit 3"), _Calls(np.load, "x")]
        )
        split = pickle.dumps([{"train": [made], "val": []}])
    else:
        split = damaged(rng, SPLIT)
    arrays_in(folder, array_bytes(rng), split)
    return read_arrays(folder)


# --------------------------------------------------------------------------------------- DICOM


@cache
def planes() -> list[bytes]:
    made = []
    for one in dicom_files.series(np.arange(3 * 6 * 5, dtype=np.int16).reshape(3, 6, 5)):
        file = io.BytesIO()
        one.save_as(file, enforce_file_format=True)
        made.append(file.getvalue())
    return made


@family
def dicom(rng: Random, folder: Path) -> Attempt:
    """Series of which a plane states another size, is packed otherwise, cut or changed."""
    folder.mkdir()
    content = list(planes())
    which, kind = rng.randrange(3), rng.random()
    if kind < 0.4:
        name = rng.choice([b"\x28\x00\x10\x00US", b"\x28\x00\x11\x00US", b"\x28\x00\x00\x01US"])
        at = content[which].find(name)
        value = struct.pack("<H", rng.choice([0, 1, 7, 65_535]))
        content[which] = content[which][: at + 8] + value + content[which][at + 10 :]
    elif kind < 0.5:
        deflated = b"1.2.840.10008.1.2.1.99"
        plain = b"1.2.840.10008.1.2.1\0"
        at = content[which].find(plain)
        content[which] = content[which][:at] + deflated[: len(plain)] + zlib.compress(bytes(2**22))
    else:
        content[which] = damaged(rng, content[which])
    for number, one in enumerate(content):
        (folder / f"{number}{rng.choice(['.dcm', ''])}").write_bytes(one)
    return check(folder, rng, "--labelled", False)


# ---------------------------------------------------------------------------------- text files

TEXTS = (
    b"", b"\0" * 99, b"\xff\xfe" + "a,b\n".encode("utf-16-le"), b"\xff" * 40, b'"' * 999,
    b",,,\n" * 9,
    b"[" * 100_000, b"{" * 100_000, b'{"a":' * 90_000, b"[1e999]", b"9" * 9000, b"NaN", b"null",
    b'[{"train": 5, "val": []}]', b'[{"train": [[1]], "val": [null]}]', b'[{"train": "ab"}]',
    b'{"labels": {"a": 1e999, "b": [[]]}}', b'{"labels": {"a": "x", "b": {}}}', b'{"labels": 3}',
    b'{"channel_names": {"x": 1}}', b'{"channel_names": [1, 2]}', b"a training\na testing\n",
    b"a nowhere", b"#" * 9999, b"a\rb\r\n\x0b\x0c", b"a," * 70_000, b"x" * 200_000,
    b'{"options": {"plane": []}}', b'{"fingerprint": 1}', b"name,members,fingerprint\n=1+1,9e9,x\n",
)  # fmt: skip


def text(rng: Random) -> bytes:
    content = rng.choice(TEXTS)
    return damaged(rng, content) if rng.random() < 0.4 else content


def small_pairs(rng: Random, folder: Path) -> None:
    pairs(folder, picture(rng, "PNG", "L"), mask_picture("PNG"), "png")


@family
def csv_tables(rng: Random, folder: Path) -> Attempt:
    """ISIC's table."""
    folder.mkdir()
    rows = b",img,seg\n0,ISIC_0000001.jpg,ISIC_0000001_Segmentation.png\n"
    (folder / "ISIC_0000001.jpg").write_bytes(picture(rng, "JPEG", "RGB"))
    (folder / "ISIC_0000001_Segmentation.png").write_bytes(mask_picture("PNG"))
    content = text(rng) if rng.random() < 0.6 else damaged(rng, rows)
    (folder / "ISBI2016_ISIC_Part1_Training_GroundTruth.csv").write_bytes(content)
    return check(folder, rng)


@family
def json_and_splits(rng: Random, folder: Path) -> Attempt:
    """``--split`` as text and as nnU-Net's folds, and ``dataset.json``."""
    if rng.random() < 0.4:
        for side, end in (("imagesTr", "_0000"), ("labelsTr", "")):
            (folder / side).mkdir(parents=True)
            content = nifti(rng, label=not end)
            (folder / side / f"a{end}.nii.gz").write_bytes(gzip.compress(content, 1))
        (folder / "dataset.json").write_bytes(text(rng))
        return check(folder, rng)
    small_pairs(rng, folder)
    name = rng.choice(["split.txt", "splits_final.json"])
    whole = b'[{"train": ["a"], "val": []}]' if name[-1] == "n" else b"a training\n"
    content = damaged(rng, whole) if rng.random() < 0.4 else text(rng)
    (folder / name).write_bytes(content)
    fold = rng.choice(["", ":0", ":1", ":99999999999", ":" + "9" * 5000]) if name[-1] == "n" else ""
    return check(folder, rng, "--split", f"{folder / name}{fold}")


@family
def results(rng: Random, folder: Path) -> Attempt:
    """A folder of results to score: tensors, pictures and records of others."""
    small_pairs(rng, folder / "data")
    (folder / "out").mkdir()
    kind = rng.randrange(4)
    if kind == 0:
        (folder / "out/a_output0").write_bytes(tensor(rng))
    else:
        whole = picture(rng, "PNG", "L")
        name = rng.choice(
            ["a_output_ens.png", "a_output0.jpg", "a_mask.png", "a_output_ens.nii.gz"]
        )
        (folder / "out" / name).write_bytes(damaged(rng, whole) if kind == 1 else whole)
        records = ["sampling.json", "classes.json", "predictions.csv", "scores.csv", "summary.json"]
        (folder / "out" / rng.choice(records)).write_bytes(text(rng))
    flags = ["--inp_pth", folder / "out", "--out_pth", folder / "data"]
    return command("score", *flags, "--report", rng.random() < 0.2)


def tensor(rng: Random) -> bytes:
    """A tensor as torch saves it, changed, or an archive that unpacks to a gigabyte."""
    import torch

    file = io.BytesIO()
    made = torch.rand(1, 4, 24, 32)
    if rng.random() < 0.3:
        made = torch.zeros(1).expand(2 ** rng.choice([4, 20, 24]), 2**20)
    torch.save(made, file, _use_new_zipfile_serialization=rng.random() < 0.6)
    if rng.random() < 0.1:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(2**26))
        return file.getvalue()
    return file.getvalue() if rng.random() < 0.3 else damaged(rng, file.getvalue())


# ---------------------------------------------------------------------- no files, and the flags


def put_odd(rng: Random, path: Path) -> None:
    """Put something into the place of a file that is none, or may be that of somebody else."""
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    kind = rng.randrange(6)
    if kind < 2:
        os.mkfifo(path)
    elif kind == 2:
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)  # names of sockets have at most 107 bytes
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == 3:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/random", "/dev/stdin", "/proc/self/mem"]))
    elif kind == 4:
        path.symlink_to(path.name)
    else:
        path.mkdir()


@family
def special_files(rng: Random, folder: Path) -> Attempt:
    """Pipes, sockets, devices, loops and folders among the data, the texts and the results."""
    data, kind = folder / "data", rng.randrange(6)
    if kind == 0:
        pairs(data, nifti(rng), nifti(rng, label=True), rng.choice(["nii", "nii.gz"]))
    elif kind == 1:
        data.mkdir(parents=True)
        for number, one in enumerate(planes()):
            (data / f"{number}.dcm").write_bytes(one)
    elif kind == 2:
        arrays_in(data, array_bytes(rng), SPLIT)
    else:
        small_pairs(rng, data)
    if kind == 4:
        put_odd(rng, folder / "split.txt")
        return check(data, rng, "--split", folder / "split.txt")
    if kind == 5:
        (folder / "out").mkdir()
        mask = picture(rng, "PNG", "L")
        (folder / "out/a_output_ens.png").write_bytes(mask)
        names = ["a_output_ens.png", "a_output0.png", "a_overlay.png", "sampling.json"]
        names += ["classes.json", "predictions.csv", "scores.csv", "summary.json", "report.html"]
        put_odd(rng, folder / "out" / rng.choice(names))
        return command("score", "--inp_pth", folder / "out", "--out_pth", data)
    put_odd(rng, rng.choice(sorted(path for path in data.rglob("*") if path.is_file())))
    return read_arrays(data) if kind == 2 else check(data, rng, "--labelled", rng.random() < 0.5)


VALUES = (
    "", " ", "-1", "0", "1e999", "nan", "-inf", "9" * 5000, str(2**63), "é", "\udcff", "a\0b", "[]",
    "True", "None", "../../etc", "/dev/null", "/dev/zero", "/proc/self/mem", "%s%n", "$(exit 3)",
    "=", "--", "1,2,,3", "1:2:3", ":", "1=2", "a=1+2,b=x", "~nobody_here/x", "a" * 300, "\n",
    "auto", "zscore",
)  # fmt: skip


@family
def flags(rng: Random, folder: Path) -> Attempt:
    """Flags and values of all kinds; training and sampling end before they begin."""
    from dataclasses import fields

    from guided_diffusion.commands import COMMANDS

    small_pairs(rng, folder)
    name = rng.choice(["train", "sample", "score", "check", "check", "slices", "weak-segment"])
    known = [entry.name for group in COMMANDS[name].groups for entry in fields(group)]
    given: list[object] = []
    for _ in range(rng.choice([1, 2, 3])):
        given += [f"--{rng.choice(known)}", rng.choice(VALUES)]
    if rng.random() < 0.1:
        given.append(rng.choice(VALUES))
    sets = {"check": "--data_dir", "train": "--data_dir", "sample": "--data_dir"}
    where = folder if name == "check" else folder / "missing"
    own = [sets[name], where] if name in sets and sets[name] not in given else []
    out = {"train": "--out_dir", "sample": "--out_dir", "slices": "--out"}.get(name)
    own += [out, folder / "made"] if out and out not in given else []
    return command(name, *own, *given)
