"""Files of strangers: they take no memory, time or control, and nothing is written through links.

``malformed_inputs`` makes them by chance, of all kinds; here are those that once did harm.
"""

from __future__ import annotations

import gzip
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import malformed_inputs as inputs
import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import ROOT, environment, read_csv, refused, script, succeeded
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.data import limits
from guided_diffusion.data.cache import private_folder
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.decoding import load_nifti
from guided_diffusion.data.limits import nifti_header, require_array
from guided_diffusion.data.plain_pickle import load_plain
from guided_diffusion.data.readers import read_labels, read_nifti, read_picture
from guided_diffusion.data.splits import read_split
from guided_diffusion.data.tumorloader import SlicedArrays
from guided_diffusion.data.volumes import VolumeStore
from guided_diffusion.errors import UserError
from guided_diffusion.files import (
    atomic_write,
    marked_text,
    read_table,
    read_text,
    unmarked_text,
)
from guided_diffusion.files import write as writing
from guided_diffusion.inference.record import Record
from guided_diffusion.layouts import open_dataset
from guided_diffusion.scoring.predictions import read_tensor


@pytest.fixture
def one_gib() -> Any:
    """Files may take 1 GiB of memory."""
    limits.set_limit(1)
    yield
    limits.set_limit(8)


# ------------------------------------------------------------------------------- by chance


def harness(count: int, first: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/malformed.py", "--count", str(count), "--first", str(first)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert f"| all | {count} |" in done.stdout


@pytest.mark.slow
def test_300_malformed_inputs_are_read_or_refused() -> None:
    harness(300)


@pytest.mark.long
def test_10_000_malformed_inputs_are_read_or_refused() -> None:
    harness(10_000, 1000)


# ------------------------------------------------------------------- sizes that files state


def header(path: Path, *, two: bool = False, **fields: object) -> Path:
    """A NIfTI file of 4 x 4 x 4 bytes with other fields in its header."""
    kind: Any = nib.Nifti2Image if two else nib.Nifti1Image
    content = bytearray(kind(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes())
    length = kind.header_class.template_dtype.itemsize
    values = np.frombuffer(content[:length], kind.header_class.template_dtype).copy()
    for name, value in fields.items():
        if name == "dim":
            values["dim"].reshape(-1)[: len(value)] = value  # type: ignore[arg-type]
        else:
            values[name] = value
    content[:length] = values.tobytes()
    path.write_bytes(gzip.compress(bytes(content)) if path.suffix == ".gz" else bytes(content))
    return path


HEADERS: list[tuple[dict[str, Any], str]] = [
    ({"dim": [3, 32767, 32767, 32767]}, "32767 x 32767 x 32767 values, which its"),
    ({"dim": [7, *[32767] * 7]}, "values, which its"),
    ({"two": True, "dim": [3, 2**40, 1, 1]}, "1099511627776 x 1 x 1 values, which its"),
    ({"two": True, "dim": [3, 2**62, 2**62, 2**62]}, "values, which its"),
    ({"two": True, "dim": [3, -(2**63), 4, 4]}, "its header states -9223372036854775808 x"),
    ({"dim": [3, -4, 4, 4]}, "its header states -4 x 4 x 4"),
    ({"datatype": 77}, "an unknown type of data, 77"),
    ({"datatype": 0}, "an unknown type of data, 0"),
    ({"vox_offset": np.inf}, "cannot be read as a NIfTI"),
    ({"vox_offset": 1e18}, "cannot be read as a NIfTI"),
]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("fields", "problem"), HEADERS)
def test_a_header_that_states_more_than_the_file_holds(
    fields: dict[str, Any], problem: str, ending: str, tmp_path: Path
) -> None:
    path = header(tmp_path / f"a{ending}", **fields)
    with pytest.raises(UserError, match=problem) as caught:
        read_nifti(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_volume_above_the_limit_is_refused_by_its_header(tmp_path: Path, one_gib: None) -> None:
    path = header(tmp_path / "a.nii", dim=[3, 1024, 1024, 256])
    with path.open("ab") as file:
        file.truncate(2**29)
    with pytest.raises(UserError, match=r"takes 1.5 GiB.*--max_read_gib, which is 1"):
        read_nifti(path)
    limits.set_limit(2)
    assert nifti_header(path).shape == (1024, 1024, 256)
    limits.set_limit(0)
    assert limits.most_bytes() == np.inf


def test_what_follows_the_voxels_is_neither_read_nor_unpacked(tmp_path: Path) -> None:
    """A gigabyte of zeros behind a small volume."""
    path = header(tmp_path / "a.nii.gz")
    with path.open("ab") as file:
        file.write(inputs.zeros())
    begun = time.monotonic()
    assert VolumeStore(tmp_path / "cache")(path).voxels.shape == (4, 4, 4)
    (unpacked,) = (tmp_path / "cache").glob("*.nii")
    assert unpacked.stat().st_size == 352 + 64 and time.monotonic() - begun < 5


def test_a_chain_of_extensions_ends_where_the_header_says(tmp_path: Path) -> None:
    """nibabel would read all that follows for an extension of no length."""
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes())
    content[108:112] = np.float32(384).tobytes()
    content[348:352] = b"\1\0\0\0"
    for length in (0, -16, 8, 48, 2**31 - 1):
        extension = np.array([length, 4], "<i4").tobytes() + bytes(24)
        (tmp_path / "a.nii").write_bytes(content[:352] + extension + content[352:])
        with pytest.raises(ValueError, match="extensions"):
            load_nifti(tmp_path / "a.nii")
    extension = np.array([32, 4], "<i4").tobytes() + bytes(24)
    (tmp_path / "a.nii").write_bytes(content[:352] + extension + content[352:])
    assert len(load_nifti(tmp_path / "a.nii")[0].header.extensions) == 1


def test_pictures_of_180_megapixels(tmp_path: Path, one_gib: None) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(inputs.honest_png())
    with pytest.raises(UserError, match=r"takes 1.84 GiB.*--max_read_gib"):
        read_picture(path, channels=1)
    path.write_bytes(inputs.png(13_000, 13_000, 8, 0, b"\0" * 99))
    with pytest.raises(UserError, match="13000 x 13000 values, which its 156 bytes cannot hold"):
        read_labels(path)
    assert Image.MAX_IMAGE_PIXELS, "others' own limit stays"


def test_a_long_black_mask_is_read(tmp_path: Path) -> None:
    """What an honest file packs most densely."""
    black = Image.new("1", (6000, 6000))
    for name, options in {"a.png": {}, "a.tif": {"compression": "group4"}, "b.bmp": {}}.items():
        black.save(tmp_path / name, **options)
        assert not read_labels(tmp_path / name).values.any()
    black.convert("L").save(tmp_path / "a.jpg", optimize=True, progressive=True)
    assert not read_labels(tmp_path / "a.jpg").values.any()


def test_another_format_under_the_name_of_a_picture_is_not_interpreted(tmp_path: Path) -> None:
    """PostScript would be run by Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        read_picture(tmp_path / "a.png", channels=1)


@pytest.mark.parametrize("text", inputs.HEADERS)
def test_headers_of_arrays(text: str, tmp_path: Path) -> None:
    content = text.encode() + b"\n"
    length = len(content).to_bytes(2, "little")
    inputs.arrays_in(tmp_path, b"\x93NUMPY\1\0" + length + content + bytes(64), inputs.SPLIT)
    with pytest.raises(UserError, match=r"v0\.npy: "):
        SlicedArrays(tmp_path, parts=("train",))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_arrays_with_numbers_that_are_not_finite(value: float, tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4, 4))
    values[1, 0, 2, 2] = value
    inputs.arrays_in(tmp_path, b"", inputs.SPLIT)
    np.save(tmp_path / "preprocessed/v0.npy", values)
    assert require_array(tmp_path / "preprocessed/v0.npy") == (2, 2, 4, 4)
    with pytest.raises(UserError, match=r"v0\.npy: has NaN or infinite values"):
        SlicedArrays(tmp_path, parts=("train",))


def test_a_tensor_that_states_more_than_it_holds(tmp_path: Path, one_gib: None) -> None:
    torch.save(torch.zeros(1).expand(2**20, 2**20), tmp_path / "a_output0")
    with pytest.raises(UserError, match=r"it states .* values, and holds fewer"):
        read_tensor(tmp_path / "a_output0")


# ---------------------------------------------------------------------------------- pickles

NAMED = [
    ("numpy.f2py.__main__", "main"),
    ("numpy.f2py.__main__", "scalar"),
    ("numpy.testing", "dtype"),
    ("numpy", "fromfile"),
    ("collections", "encode"),
    ("_codecs", "decode"),
    ("numpy.core.multiarray", "_reconstruct.__globals__"),
]


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_only_exact_pairs_of_module_and_name_are_found(
    module: str, name: str, tmp_path: Path
) -> None:
    before = {*sys.modules}
    (tmp_path / "splits.pkl").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(pickle.UnpicklingError, match="could run code"):
        load_plain(tmp_path / "splits.pkl")
    assert module in before or module not in sys.modules


@pytest.mark.parametrize(
    "stream",
    [
        b"]r\xff\xff\xff\xff.",  # an entry of the memo with a number of 2^32
        b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.",
        b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b"abc.",
        b"cnumpy\nndarray\n(I1099511627776\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1099511627776\ntVb\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(VV1099511627776\ntRtR.",
        b"c_codecs\nencode\n(Vx\nVidna\ntR.",
    ],
)
def test_no_opcode_takes_gigabytes(stream: bytes, tmp_path: Path) -> None:
    inputs.arrays_in(tmp_path, inputs.array_bytes(Random(0)), stream)
    with pytest.raises(UserError, match=r"splits\.pkl: cannot be read as a pickled list"):
        SlicedArrays(tmp_path, parts=("train",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lists_and_arrays_of_names_are_unpickled(protocol: int, tmp_path: Path) -> None:
    names = ["a.npy", "é.npy"]
    content = [{"train": names, "val": np.array(names), "test": [np.str_("b"), 7, b"c", 0.5]}]
    content[0]["objects"] = np.array(names, dtype=object)
    (tmp_path / "splits.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_plain(tmp_path / "splits.pkl")[0]
    assert {key: list(values) for key, values in found.items()} == {
        **{"train": names, "val": names, "objects": names},
        "test": ["b", 7, b"c", 0.5],
    }


# ------------------------------------------------------------------------------ what is no file


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.png", lambda path: read_picture(path, channels=1)),
        ("a.nii.gz", read_nifti),
        ("a.npy", require_array),
        ("splits.pkl", load_plain),
        ("split.txt", read_split),
        ("splits_final.json", lambda path: read_split(f"{path}:0")),
        ("a_output0", read_tensor),
        ("notes.txt", read_text),
    ],
)
def test_pipes_and_devices_are_refused_not_waited_for(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a named pipe, not a file"):
        read(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a device, not a file"):
        read(path)


def test_the_check_names_each_pipe_and_goes_on(tmp_path: Path) -> None:
    inputs.small_pairs(Random(0), tmp_path)
    for side in ("images", "masks"):
        os.link(tmp_path / side / "a.png", tmp_path / side / "b.png")
    (tmp_path / "images/b.png").unlink()
    os.mkfifo(tmp_path / "images/b.png")
    done = script("check_data", "--data_dir", tmp_path, "--cache_dir", "none")
    assert done.code == 2 and "images/b.png: is a named pipe, not a file" in done.out


def test_text_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "split.txt"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(UserError, match="is longer than 64 MiB"):
        read_split(path)
    path.write_bytes(b"[" * 100_000)
    path = path.rename(path.with_suffix(".json"))
    with pytest.raises(UserError, match="is no list of nnU-Net's folds"):
        read_split(f"{path}:0")


@pytest.mark.parametrize("flag", ["--mask_labels", "--slices"])
def test_numbers_of_thousands_of_digits(flag: str, tmp_path: Path) -> None:
    inputs.small_pairs(Random(0), tmp_path)
    value = "9" * 5000 + ":" * (flag == "--slices")
    done = script("check_data", "--data_dir", tmp_path, flag, value)
    assert done.code == 2 and flag in done.out + done.err


def test_an_argument_of_several_lines_is_one_line(tmp_path: Path) -> None:
    assert "unrecognized arguments" in refused(script("check_data", "--data_dir", tmp_path, "a\nb"))


def test_the_flag_reaches_the_readers(tmp_path: Path) -> None:
    inputs.small_pairs(Random(0), tmp_path)
    flags = ["--data_dir", tmp_path, "--cache_dir", "none"]
    done = script("check_data", *flags, "--max_read_gib", 1e-6)
    assert done.code == 2 and "raise --max_read_gib, which is 1e-06" in done.out
    succeeded(script("check_data", *flags))
    assert "--max_read_gib" in refused(script("check_data", *flags, "--max_read_gib", -1))


# --------------------------------------------------------------------------- links and permissions


def test_a_temporary_file_is_never_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("mine")
    monkeypatch.setattr(writing, "temporary_name", lambda name: f".part-{name}")
    (tmp_path / ".part-a.png").symlink_to(foreign)
    with (
        pytest.raises(UserError, match=r"a\.png: cannot be written .*exists"),
        atomic_write(tmp_path / "a.png") as part,
    ):
        part.write_text("theirs")
    assert foreign.read_text() == "mine" and not (tmp_path / "a.png").exists()


LOGS = ("log.txt", "progress.csv", "progress.json")


def test_names_of_temporary_files_cannot_be_told_beforehand() -> None:
    assert len({writing.temporary_name("a.png") for _ in range(9)}) == 9


def test_a_link_in_the_place_of_a_result_is_replaced_not_followed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("mine")
    (tmp_path / "a.png").symlink_to(foreign)
    with atomic_write(tmp_path / "a.png") as part:
        part.write_text("theirs")
    assert foreign.read_text() == "mine" and not (tmp_path / "a.png").is_symlink()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        *((what, name) for what in ("link", "pipe") for name in LOGS),
        *(("dangling link", name) for name in LOGS if name != "progress.csv"),
    ],
)
def test_logs_are_appended_to_files_alone(what: str, name: str, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    if what == "link":
        foreign.write_text("step,loss\n1,2\n" if name.endswith("csv") else "")
    before = foreign.read_text() if what == "link" else None
    if what == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(foreign)
    with pytest.raises(UserError, match=rf"{name}: .*\(it is (a link|not a file)"):
        logger.configure(tmp_path, quiet=True)
        logger.logkv("step", 7)
        logger.logkv("loss", 1.5)
        logger.dumpkvs()
    logger.configure()
    assert (foreign.read_text() if foreign.exists() else None) == before


def test_unpacked_volumes_are_their_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        source = header(tmp_path / "a.nii.gz")
        VolumeStore(tmp_path / "cache")(source)
        (tmp_path / "shared").mkdir(0o777)
        (tmp_path / "shared/notes.txt").touch()
        VolumeStore(tmp_path / "shared")(source)
        (tmp_path / "dicom").mkdir()
        for number, content in enumerate(inputs.planes()):
            (tmp_path / f"dicom/{number}.dcm").write_bytes(content)
        open_dataset(tmp_path / "dicom", test=True, reading=Reading(cache_dir=tmp_path / "cache"))
    finally:
        os.umask(before)
    files = [p for name in ("cache", "shared") for p in (tmp_path / name).rglob("*.nii")]
    assert len(files) == 3
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o777, "it is not ours to change"


def test_an_earlier_cache_becomes_private_and_is_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(0o755)
    (cache / f"{'0' * 32}.nii").touch()
    assert private_folder(cache) == cache and stat.S_IMODE(cache.stat().st_mode) == 0o700


# ---------------------------------------------------------------------------------- spreadsheets

FORMULAS = ["=1+1", "+A1", "-A1", "@sum(A1)", "\tx", "\rx", "'=1", "''+", "=cmd|' /C calc'!A0"]


@pytest.mark.parametrize("text", [*FORMULAS, "", "a", "'", "'a", "a=1", "é", " =1"])
def test_formulas_are_marked_and_read_back(text: str) -> None:
    assert marked_text(text)[:1] not in ("=", "+", "-", "@", "\t", "\r")
    assert unmarked_text(marked_text(text)) == text


@pytest.mark.parametrize("number", ["-0.5", "+3", "-1e-05", "-inf", "12"])
def test_numbers_are_no_formulas(number: str) -> None:
    assert marked_text(number) == unmarked_text(number) == number


def test_records_and_scores_mark_the_names_of_cases(tmp_path: Path) -> None:
    name = "=1+1"
    (tmp_path / "data").mkdir()
    inputs.small_pairs(Random(0), tmp_path / "data")
    for side in ("images", "masks"):
        folder = tmp_path / "data" / side
        (folder / "a.png").rename(folder / f"{name}.png")
    (tmp_path / "out").mkdir()
    (tmp_path / f"out/{name}_output_ens.png").write_bytes(inputs.mask_picture("PNG"))
    succeeded(
        script("segmentation_env", "--inp_pth", tmp_path / "out", "--out_pth", tmp_path / "data")
    )
    for table in ("scores.csv", "masks.csv"):
        assert {row["name"] for row in read_csv(tmp_path / "out" / table)} == {f"'{name}"}

    record = Record(tmp_path, "f")
    record.begin([], of=0)
    record.add({"name": name, "members": 1, "disagreement": -0.5})
    record.add({"name": "@b", "members": 1})
    assert [row["name"] for row in read_csv(tmp_path / "predictions.csv")] == ["'=1+1", "'@b"]
    found = read_table(tmp_path / "predictions.csv", needs=["name"], hint="")
    assert found and [row["name"] for row in found.rows] == ["=1+1", "@b"]
    assert found.rows[0]["disagreement"] == "-0.5"
    assert {*Record(tmp_path, "f").rows} == {"=1+1", "@b"}
