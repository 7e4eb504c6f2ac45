"""The fixtures that tests of several folders share: phantom data and a small trained network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import script, succeeded, training

from guided_diffusion import logger
from guided_diffusion.networks import highway, medsegdiff
from guided_diffusion.report import progress
from guided_diffusion.tools import phantom_folders

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


@pytest.fixture(scope="session", autouse=True)
def _no_lines_of_progress() -> Iterator[None]:
    """A test that is slow on a busy machine writes no progress, which ``succeeded`` refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "FIRST", 3600.0)
        yield


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


@pytest.fixture
def real_data() -> Path:
    """The folder of real images that REAL_DATA names; without it the test is skipped."""
    folder = Path(os.environ.get("REAL_DATA", ""))
    if not os.environ.get("REAL_DATA") or not folder.is_dir():
        pytest.skip("REAL_DATA names no folder of real data")
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """Nothing is logged to the console."""
    logger.configure(quiet=True)
    yield
    logger.configure()


@pytest.fixture
def narrow_highway(monkeypatch: pytest.MonkeyPatch) -> None:
    """MedSegDiff's condition network has few channels, so that it is built and filled quickly."""
    for module in (highway, medsegdiff):
        monkeypatch.setattr(module, "WIDTHS", (32, 64, 32, 32, 32, 32))
