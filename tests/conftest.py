"""What the tests share: phantom folders, a tiny trained model, and the scripts to run."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from guided_diffusion import logger
from guided_diffusion.networks import highway, medsegdiff
from guided_diffusion.tools import phantom_folders

ROOT = Path(__file__).resolve().parents[1]

# What a process of its own needs to import the package and the tests' helpers.
PYTHONPATH = os.pathsep.join(
    str(ROOT / folder) for folder in (".", "tests", "tests/inference", "tests/training")
)

# A network that takes milliseconds, at 16 pixels; its diffusion is the one of the quick recipes.
NETWORK = [
    *("--image_size", "16", "--num_channels", "32", "--channel_mult", "1,2"),
    *("--num_res_blocks", "1", "--attention_resolutions", "8", "--num_heads", "1"),
]
DIFFUSION = [
    *("--diffusion_steps", "100", "--noise_schedule", "cosine"),
    *("--predict_xstart", "True", "--mask_range", "-1,1"),
]


class Run(NamedTuple):
    """How a script ended and what it said."""

    code: int
    out: str
    err: str


def script(name: str, *arguments: object) -> Run:
    """Run a script as a program, in this process: an import of torch takes seconds.

    An exception that no script should let through is let through here as well.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    file = ROOT / (name if name.endswith(".py") else f"scripts/{name}.py")
    argv = [str(file.relative_to(ROOT)), *map(str, arguments)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "path", list(sys.path)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        logger.configure()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Run(code, out.getvalue(), err.getvalue())


def process(name: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start a file of scripts/ in a process of its own, from the repository's root."""
    return subprocess.Popen(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def succeeded(run: Run) -> str:
    """Return what a script said, having made sure that it ended well and complained of nothing."""
    assert (run.code, run.err) == (0, ""), run
    return run.out


def refused(run: Run) -> str:
    """Return a script's error, having made sure that it is one line and the exit code is 2."""
    assert run.code == 2, run
    assert run.err.startswith("error: "), run
    assert run.err.count("\n") == 1 and run.err.endswith("\n"), run
    return run.err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


HAS_CUDA, COUNT_CUDA = torch.cuda.is_available, torch.cuda.device_count
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hide CUDA devices from every test that is not marked ``gpu``, and from its processes."""
    hidden = item.get_closest_marker("gpu") is None
    torch.cuda.is_available = (lambda: False) if hidden else HAS_CUDA
    torch.cuda.device_count = (lambda: 0) if hidden else COUNT_CUDA
    if hidden or VISIBLE is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if hidden else str(VISIBLE)
    else:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def brats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BraTS slices of 40 x 40: 4 in training/, 2 in testing/ (000005 and 000006)."""
    folder = tmp_path_factory.mktemp("brats")
    phantom_folders.write_brats_slices(folder, 3, patients=3, size=40, slices=2, training=0.67)
    return folder


@pytest.fixture(scope="session", params=["2023", "2025"])
def isic(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ISIC pictures of 40 x 40 with either kind of CSV: 4 to train on, 2 to test on."""
    folder = tmp_path_factory.mktemp(f"isic{request.param}")
    phantom_folders.write_isic(
        folder, 3, patients=6, size=40, training=0.67, generation=str(request.param)
    )
    return folder


@pytest.fixture(scope="session")
def trained(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps on the BraTS phantoms, checkpoints at 2 and 4. Read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    succeeded(script("segmentation_train", *training(brats, folder), "--max_steps", 4))
    return folder


def training(brats: Path, out_dir: Path) -> list[object]:
    """The command line of :func:`trained`, but for the number of steps."""
    return [
        *("--data_dir", brats / "training", "--out_dir", out_dir, *NETWORK, *DIFFUSION),
        *("--batch_size", 2, "--lr", 3e-3, "--ema_rate", "0.9", "--dropout", 0.1),
        *("--save_interval", 2, "--log_interval", 2, "--fp16_scale_growth", 1e-3),
    ]


@pytest.fixture
def real_data() -> Path:
    """The folder of real images that REAL_DATA names; without it the test is skipped."""
    folder = Path(os.environ.get("REAL_DATA", ""))
    if not os.environ.get("REAL_DATA") or not folder.is_dir():
        pytest.skip("REAL_DATA names no folder of real data")
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """The package's log goes nowhere."""
    logger.configure(quiet=True)
    yield
    logger.configure()


@pytest.fixture
def narrow_highway(monkeypatch: pytest.MonkeyPatch) -> None:
    """MedSegDiff's condition network has few channels: built and filled in no time."""
    for module in (highway, medsegdiff):
        monkeypatch.setattr(module, "WIDTHS", (32, 64, 32, 32, 32, 32))
