"""Long runs hold no more memory, files and threads at their end than near their start."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import NETWORK, read_csv, script, succeeded
from loops import Discs, make_loop
from PIL import Image

from guided_diffusion.inference import cases

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
]


class Held(NamedTuple):
    """What this process holds: resident memory in MiB, open files, threads."""

    mib: float
    files: int
    threads: int


def held() -> Held:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(list(Path("/proc/self/fd").iterdir()))
    return Held(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threading.active_count())


def watch(measured: list[Held], every: int, function: Callable[..., object]) -> Callable[..., None]:
    """Measure after every so many calls of a function."""
    calls = 0

    def watched(*arguments: object, **named: object) -> object:
        nonlocal calls
        value = function(*arguments, **named)
        calls += 1
        if calls % every == 0:
            measured.append(held())
        return value

    return watched  # type: ignore[return-value]


def assert_flat(measured: list[Held], mib: float) -> None:
    """From a fifth of the run on, nothing grows; memory is allowed some noise."""
    print(*measured, sep="\n")
    early, late = measured[len(measured) // 5], measured[-1]
    assert late.mib - early.mib < mib
    assert late.files <= early.files and late.threads <= early.threads


@pytest.mark.parametrize("workers", [0, 2])
def test_20000_steps(workers: int, quiet: None, tmp_path: Path) -> None:
    measured: list[Held] = []
    options = {"save_interval": 1000, "keep": 3, "log_interval": 100, "num_workers": workers}
    loop = make_loop(tmp_path, max_steps=20_000, batch_size=1, **options)
    loop.run_step = watch(measured, 1000, loop.run_step)  # type: ignore[method-assign,assignment]
    loop.run_loop()
    assert len(measured) == 20
    assert_flat(measured, 30)


def test_10000_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten discs, under a thousand names each, drawn, then scored."""
    few, many, out = tmp_path / "few", tmp_path / "many", tmp_path / "out"
    for number, case in enumerate(Discs(10)[index] for index in range(10)):
        assert case.mask is not None
        for kind, values in (("images", case.image.clamp(0, 1)), ("masks", case.mask)):
            first = few / kind / f"{number}.png"
            first.parent.mkdir(parents=True, exist_ok=True)
            (many / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray((255 * values[0]).byte().numpy()).save(first)
            for copy in range(1000):
                (many / kind / f"{number}x{copy}.png").hardlink_to(first)
    trained = tmp_path / "trained"
    flags = [*NETWORK, "--diffusion_steps", 100, "--batch_size", 2, "--max_steps", 1]
    succeeded(script("segmentation_train", "--data_dir", few, "--out_dir", trained, *flags))

    measured: list[Held] = []
    monkeypatch.setattr(cases, "draw_or_note", watch(measured, 500, cases.draw_or_note))
    draw = ["--num_ensemble", 1, "--steps", 1, "--batch_size", 1]
    source = ["--model_path", trained, "--data_dir", many]
    assert script("segmentation_sample", *source, "--out_dir", out, *draw).code == 0
    rows = read_csv(out / "predictions.csv")
    assert len(rows) == len({row["name"] for row in rows}) == 10_000 == 500 * len(measured)
    assert_flat(measured, 60)
    assert script("segmentation_env", "--inp_pth", out, "--out_pth", many).code == 0
    assert len(read_csv(out / "scores.csv")) == len(rows)
