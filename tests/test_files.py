"""Paths and disks: odd names, targets that are full, and what killed runs leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DIFFUSION, NETWORK, ROOT, environment, read_csv, refused, script, succeeded
from helpers import training as train_flags
from PIL import Image

from guided_diffusion.data.folders import MOST_BYTES, safe_name
from guided_diffusion.errors import UserError, exit_on_user_error, os_message
from guided_diffusion.files import (
    atomic_write,
    make_folder,
    remove_leftovers,
    temporary_name,
    write,
)

# ---------------------------------------------------------------------------------------- paths

COMMANDS: dict[str, list[str]] = {
    "segmentation_train": ["--data_dir", "--out_dir", "--resume_checkpoint", "--cache_dir"],
    "segmentation_sample": ["--model_path", "--data_dir", "--out_dir"],
    "segmentation_env": ["--inp_pth", "--out_pth", "--compare"],
    "check_data": ["--data_dir", "--out", "--split"],
    "brats_slices": ["--src", "--out"],
    "make_phantoms": ["--out"],
    "train_tumor_ddfm": ["--src_dir", "--save_dir"],
}


@pytest.mark.parametrize(("path", "problem"), [("~nobody_here/x", "no home"), ("a\0b", "NUL")])
@pytest.mark.parametrize(("name", "flag"), [(n, f) for n, flags in COMMANDS.items() for f in flags])
def test_a_path_that_no_system_has_is_one_message(
    name: str, flag: str, path: str, problem: str, brats: Path, trained: Path, tmp_path: Path
) -> None:
    good = {
        "segmentation_train": {"--data_dir": brats / "training", "--out_dir": tmp_path / "run"},
        "segmentation_sample": {
            "--model_path": trained,
            "--data_dir": brats / "testing",
            "--out_dir": tmp_path,
            "--num_samples": 1,
        },
        "segmentation_env": {"--inp_pth": tmp_path, "--out_pth": brats / "testing"},
        "check_data": {"--data_dir": brats / "testing"},
        "brats_slices": {"--src": brats / "testing", "--out": tmp_path},
    }.get(name, {})
    given: dict[str, Any] = {**good, flag: path}
    words = [word for pair in given.items() for word in pair]
    if flag == "--compare":
        words += [path]
    done = script(name, *words)
    listed = name == "check_data" and flag != "--out"  # among all that training would fail on
    error = done.out.splitlines()[-1] if listed else refused(done)
    assert done.code == 2 and problem in error and repr(path)[1:-1] in error
    assert not Path("~nobody_here").exists() and not Path("~").exists()


def test_names_that_are_not_utf_8_work_from_images_to_scores(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    """Folders and files whose names are bytes of an old code page."""
    home = tmp_path / os.fsdecode(b"caf\xe9")
    data = home / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    for name in (b"na\xefve", b"\xff"):
        pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        Image.fromarray(pixels).save(data / "images" / os.fsdecode(name + b".png"))
        Image.fromarray((pixels > 99).astype(np.uint8) * 255).save(
            data / "masks" / os.fsdecode(name + b".png")
        )
    network = ["--image_size", 16, *NETWORK[2:], *DIFFUSION]
    flags = ["--data_dir", data, "--out_dir", home / "run", *network, "--max_steps", 1]
    succeeded(script("segmentation_train", *flags))
    assert (home / "run/log.txt").read_text("utf-8").startswith("Logging to ")
    flags = ["--data_dir", data, "--model_path", home / "run", "--out_dir", home / "masks"]
    flags += ["--dpm_solver", True, "--steps", 2, "--num_ensemble", 2]
    succeeded(script("segmentation_sample", *flags))
    flags = ["--inp_pth", home / "masks", "--out_pth", data, "--report", True]
    succeeded(script("segmentation_env", *flags))
    assert [row["name"] for row in read_csv(home / "masks/scores.csv")] == ["_", "na_ve"]
    sheet = home / "sheet.png"
    succeeded(script("check_data", "--data_dir", data, "--image_size", 16, "--out", sheet))
    assert sheet.is_file()


@pytest.mark.parametrize("letter", ["a", "é", "字"])
def test_a_name_that_is_too_long_is_shortened_and_the_run_continues(
    letter: str, trained: Path, brats: Path, tmp_path: Path
) -> None:
    long = letter * (240 // len(letter.encode()))
    names = [f"{long}1", f"{long}2", "short"]
    for side, values in (("images", range(256)), ("masks", [0, 255] * 128)):
        (tmp_path / "data" / side).mkdir(parents=True)
        for name in names:
            pixels = np.array(values, dtype=np.uint8).reshape(16, 16)
            Image.fromarray(pixels).save(tmp_path / "data" / side / f"{name}.png")
    network = ["--image_size", 16, *NETWORK[2:], *DIFFUSION, "--max_steps", 1]
    data, run, masks = (tmp_path / name for name in ("data", "run", "masks"))
    succeeded(script("segmentation_train", "--data_dir", data, "--out_dir", run, *network))
    flags = ["--data_dir", data, "--model_path", run, "--out_dir", masks, "--steps", 2]
    succeeded(script("segmentation_sample", *flags, "--dpm_solver", True, "--num_ensemble", 2))
    succeeded(script("segmentation_env", "--inp_pth", masks, "--out_pth", data))
    found = [row["name"] for row in read_csv(masks / "scores.csv")]
    assert len({*found}) == 3 and "short" in found
    assert all(len(name.encode()) <= MOST_BYTES for name in found)


def test_a_safe_name_is_kept_up_to_its_limit() -> None:
    name = "x" * MOST_BYTES
    assert safe_name(name) == name
    assert len(safe_name(name + "y")) == MOST_BYTES and safe_name(name + "y") != safe_name(
        name + "z"
    )


def test_a_target_with_the_longest_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".txt")
    with atomic_write(path) as part:
        assert part.suffix == ".txt"
        part.write_text("all of it")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match="File name too long"), atomic_write(tmp_path / ("x" * 256)):
        pass


# ---------------------------------------------------------------------------------------- disks


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("layout", ["brats2d", "brats3d", "isic", "weak"])
def test_phantoms_on_a_full_disk_are_one_message(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nibabel.save", full)
    monkeypatch.setattr(Image.Image, "save", full)
    flags = ["--out", tmp_path / "new", "--layout", layout, "--patients", 2, "--size", 40]
    done = script("make_phantoms", *flags)
    assert done.code == 2 and done.err.splitlines()[-1].startswith(f"error: {tmp_path / 'new'}: ")
    assert "No space left on device" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("where", ["/proc/none", "/dev/null/x"])
def test_a_target_that_cannot_be_made_is_refused_before_the_work(
    where: str, brats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[object] = []
    monkeypatch.setattr("guided_diffusion.tools.inspect.look_at", looked.append)
    flags = ["--data_dir", brats / "training", "--out", f"{where}/sheet.png"]
    assert "--out" in refused(script("check_data", *flags))
    assert "--out" in refused(script("make_phantoms", "--out", where))
    assert not looked


def test_a_full_folder_is_noticed_when_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(
        UserError, match=r"--out_dir .*cannot be written \(No space left on device\)"
    ):
        make_folder(tmp_path)


@pytest.mark.parametrize("chosen", [False, True])
def test_training_goes_on_without_a_temporary_folder(
    chosen: bool, brats: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TMPDIR and all other places are full from the start, or once one of them was chosen."""
    if chosen:
        monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    else:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    flags = [*train_flags(brats, tmp_path), "--max_steps", 4]
    said = succeeded(script("segmentation_train", *flags))
    assert "no temporary folder can be made (" in said and "set TMPDIR" in said
    assert "step         | 4" in said


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EDQUOT, errno.EACCES):
        with pytest.raises(SystemExit, match="2"), exit_on_user_error():
            raise OSError(number, os.strerror(number))
        assert os.strerror(number) in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        Path("/proc/none").write_text("x")
    assert capsys.readouterr().err.startswith("error: /proc/none: ")
    assert os_message(OSError("a bug")) == ""


# ------------------------------------------------------------------------------------ leftovers


def test_leftovers_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    host, own = write._host(), os.getpid()
    dead = [
        f".part-{host}.999999999.5-case_mask.png",
        f".part-{host}.{own}.1-savedmodel.pt",  # its number was given to this process
        f"decoded-{host}.999999999.5-abc",
    ]
    alive = [
        temporary_name("x.png"),
        f".part-{host}.{os.getppid()}.{write._start_of(os.getppid())}-y.png",
        ".part-0badcafe.999999999.5-case_mask.png",  # of another host
        "decoded-abcdef",
        ".part-notes",
        f"case.part-{host}.999999999.5-x",
    ]
    for name in (*dead, *alive):
        if name.startswith("decoded"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "0.npy").touch()
        else:
            (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*alive}
    remove_leftovers(tmp_path / "not there")


LEAVES = """
import sys
from pathlib import Path
from guided_diffusion.data.cache import CachedDataset
from guided_diffusion.data.frames import (Frame, ResizedDataset)
from guided_diffusion.data import volumes
from guided_diffusion.files import atomic_write
from guided_diffusion.layouts import open_dataset
out, data, source = map(Path, sys.argv[1:])
cases = CachedDataset(ResizedDataset(open_dataset(data), Frame(16)))
cases[0]
store = volumes.VolumeStore(out / "cache")
with atomic_write(out / "case_mask.png") as part:
    part.write_bytes(b"half of it")
    def wait(path, target):
        target.write_bytes(b"half of it")
        print(cases.folder, flush=True)
        sys.stdin.read()
    volumes._gunzip = wait
    store(source)
"""


def test_what_a_killed_run_leaves_is_removed_by_the_next_one(brats: Path, tmp_path: Path) -> None:
    """In TMPDIR, in the cache and in the folder of results; not as long as the run lives."""
    source = next((brats / "training").rglob("*_t1_*.nii.gz"))
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", LEAVES, tmp_path, brats / "training", source],
        cwd=ROOT,
        env={**environment(), "TMPDIR": str(tmp_path / "tmp")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        decoded = Path(running.stdout.readline().strip())

        def left() -> list[str]:
            for folder in (tmp_path, tmp_path / "cache"):
                make_folder(folder)
            remove_leftovers(tmp_path / "tmp")
            found = [path.name for path in tmp_path.rglob("*") if path.is_file()]
            return sorted(name.rpartition("-")[2] for name in found)

        assert decoded.parent == tmp_path / "tmp" and decoded.is_dir()
        before = left()
        assert "0.npy" in before and "case_mask.png" in before and len(before) == 3
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        deadline = time.monotonic() + 5
        while left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left() == [] and not decoded.exists()
