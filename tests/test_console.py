"""Consoles that are closed, full, or of another code page: a command goes on, and says so once."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment, script, succeeded, training

from guided_diffusion.commands import main
from guided_diffusion.options.console import tolerant_console
from guided_diffusion.tools import phantom_folders


class Failing(io.StringIO):
    """A stream that takes some writes and then fails with an error number; 0 is a closed one."""

    def __init__(self, number: int, *, after: int = 0) -> None:
        super().__init__()
        self.number, self.left = number, after

    def write(self, text: str) -> int:
        if self.left > 0:
            self.left -= 1
            return super().write(text)
        if not self.number:
            raise ValueError("I/O operation on closed file")
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, 0])
def test_what_cannot_be_printed_is_dropped_and_told_once(number: int) -> None:
    out, err = Failing(number, after=2), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), tolerant_console():
        for line in ("one", "two", "three"):
            print(line)
    assert out.getvalue() == "one\n"
    told = number in (errno.ENOSPC, errno.EIO)
    message = f"standard output cannot be written ({os.strerror(number)})\n"
    assert err.getvalue() == message * told


def test_a_run_without_a_console_trains_on_and_keeps_its_log(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*map(str, training(brats, tmp_path)), "--max_steps", "2"]
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    monkeypatch.setattr(sys, "stderr", None)
    main("segmentation_train", flags)
    assert sys.stderr is None
    assert isinstance(sys.stdout, Failing)
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert log.startswith("Logging to ") and "savedmodel000002.pt\nnext: " in log
    assert (tmp_path / "savedmodel.pt").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_letters_that_the_console_lacks_are_replaced(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shown = tmp_path / "数据", io.BytesIO()
    phantom_folders.write_isic(data, 3, patients=1, size=32, training=1.0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding))
    main("check_data", ["--data_dir", str(data / "Train"), "--image_size", "32"])
    assert rb"\u6570\u636e" in shown.getvalue()


def test_a_mistake_is_told_on_any_console(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, "ascii"))
    with pytest.raises(SystemExit, match="2"):
        main(argv=["数据"])
    sys.stderr.flush()
    assert shown.getvalue().startswith(rb"error: \u6570\u636e: there is no such command")


def test_a_log_takes_names_that_are_not_utf_8(tmp_path: Path) -> None:
    from guided_diffusion import logger

    logger.configure(tmp_path, quiet=True)
    logger.log("case \udcff")
    logger.configure()
    assert "case \\udcff\n" in (tmp_path / "log.txt").read_text("utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("streams", "told"),
    [
        ("| true", ""),
        ("> /dev/full", "standard output cannot be written (No space left on device)\n"),
        ("> /dev/full 2>&1", ""),
        (">&-", ""),
        ("2>&-", ""),
        (">&- 2>&- <&-", ""),
    ],
)
def test_the_help_ends_quietly_whatever_the_streams_are(streams: str, told: str) -> None:
    command = f"'{sys.executable}' -m guided_diffusion train --help_all {streams}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, told)


def test_a_closed_descriptor_is_not_taken_by_the_next_file(tmp_path: Path) -> None:
    code = (
        "from guided_diffusion.options.console import tolerant_console as console\n"
        "with console(): file = open('checkpoint', 'wb'); print(file.fileno()); assert "
        "file.fileno() > 2"
    )
    command = f'"{sys.executable}" -c "$0" >&- 2>&- <&-'
    done = subprocess.run(["bash", "-c", command, code], cwd=tmp_path, env=environment())
    assert done.returncode == 0


def test_no_progress_is_drawn_where_nobody_watches(tmp_path: Path) -> None:
    flags = ("--layout", "isic", "--patients", 1, "--size", 32)
    succeeded(script("make_phantoms", "--out", tmp_path / "isic", *flags))
