"""Memory that runs out: one message, nothing lost, and sampling goes on with smaller batches."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NETWORK, environment, refused, script, succeeded
from inference.test_predict import cases_in_memory, make_segmenter
from loops import make_loop, resumed
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion import logger
from guided_diffusion.checkpoint import load_checkpoint
from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.errors import UserError, exit_on_user_error, memory_problem
from guided_diffusion.files import Background
from guided_diffusion.inference import plan as plans
from guided_diffusion.inference.plan import within_memory
from guided_diffusion.inference.predict import segment
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.script_util import create_model
from guided_diffusion.training import estimates

CPU = torch.device("cpu")
FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. "


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda: torch.empty(10**15), "3725290.3 GiB"),
        (lambda: torch.empty(10**10, 10**10), ""),
        (lambda: torch.zeros(1).expand(10**10, 10**10).clone(), ""),
        (lambda: np.empty(10**15), "7.11 PiB"),
        (lambda: np.empty(10**19), ""),
        (lambda: np.empty((10**10, 10**10)), ""),
        (lambda: bytearray(10**17), ""),
        (lambda: [0] * 10**17, ""),
    ],
)
def test_every_library_says_so_in_its_own_way(make: Callable[[], object], asked: str) -> None:
    with pytest.raises((RuntimeError, ValueError, MemoryError)) as error:
        make()
    assert asked in memory_problem(error.value) != ""


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "2.00 GiB",
        ),
        (RuntimeError("MPS backend out of memory. Tried to allocate 256.00 MB"), "256.00 MB"),
        (RuntimeError("Invalid buffer size: 14.50 GB"), "14.50 GB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
    ],
)
def test_devices_and_systems_are_understood_too(error: Exception, asked: str) -> None:
    assert asked in memory_problem(error) != ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("no such mode"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("out of memory"),
        UserError("image", "out of memory", "Buy some."),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert memory_problem(error) == ""


def test_a_command_that_runs_out_of_memory_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        np.empty(10**15)
    said = capsys.readouterr().err
    assert said.startswith("error: memory: more memory is needed than there is (a part of 7.11 PiB")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("no method x"), ValueError("x"), OSError(9, "x")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), exit_on_user_error():
        raise error


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("segmentation_train", ("--image_size", 10**9), "must be at most 16384"),
        ("segmentation_train", ("--diffusion_steps", 10**14), "must be at most 100000"),
        ("segmentation_train", ("--num_workers", 10**6), "must be at most 256"),
        ("segmentation_train", ("--num_res_blocks", 10**9), "must be at most 100"),
        ("segmentation_train", ("--batch_size", 99999999999999), "use --batch_size "),
        ("segmentation_train", ("--batch_size", 10**9, "--microbatch", 1), "use --batch_size "),
        ("segmentation_train", ("--image_size", 16384), "pixels fit: lower --image_size"),
        ("segmentation_sample", ("--num_ensemble", 10**14), "must be at most 10000"),
        ("segmentation_sample", ("--batch_size", 10**14), "must be at most 65536"),
        ("segmentation_sample", ("--diffusion_steps", 10**14), "was trained at 100 times"),
        ("check_data", ("--num_workers", 10**6), "must be at most 256"),
        ("make_phantoms", ("--out", "x", "--size", 10**14), "must be at most 16384"),
    ],
)
def test_absurd_flags_are_refused_at_once(
    command: str, flags: tuple[Any, ...], message: str, brats: Path, trained: Path, tmp_path: Path
) -> None:
    data = {
        "segmentation_train": ["--data_dir", brats / "training", "--out_dir", tmp_path, *NETWORK],
        "segmentation_sample": ["--data_dir", brats / "testing", "--model_path", trained],
        "check_data": ["--data_dir", brats / "training"],
    }
    assert message in refused(script(command, *data.get(command, []), *flags))
    assert not [path for path in tmp_path.iterdir() if path.name != "x"]


def test_what_fits_can_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of images in the message is accepted, twice the estimate is not."""
    with torch.device("meta"):
        net = create_model(NetworkOptions(image_size=64, num_channels=32), DiffusionOptions())
    monkeypatch.setattr(estimates, "total_gib", lambda _: 1.0)

    def refuse(batch: int, micro: int = -1) -> None:
        options = TrainingOptions(batch_size=batch, microbatch=micro)
        estimates.refuse_large_batch(net, options, held=0.1, device=torch.device("cpu"))

    with pytest.raises(UserError, match="use --batch_size ") as error:
        refuse(1000)
    fitting = int(str(error.value).split("use --batch_size ")[1].split(",")[0].rstrip("."))
    assert 5 < fitting < 100
    refuse(fitting)
    refuse(1000, fitting)
    with pytest.raises(UserError):
        refuse(3 * fitting)


def test_a_step_that_is_too_large_names_what_would_fit() -> None:
    def hint(batch: int, **known: Any) -> str:
        options = TrainingOptions(batch_size=batch)
        error = estimates.step_too_large("full", options, step=0, device=CPU, **known)
        return str(error).split("GiB. ")[1]

    assert hint(16).startswith("Use --microbatch 8 for the same gradient")
    assert hint(16, fitting=5).startswith("Use --microbatch 5 for the same gradient")
    assert hint(16, fitting=40).startswith("Use --microbatch 8 ")
    assert hint(16, fitting=5, graphs=True) == "Use --batch_size 5, or --checkpoint_levels all."
    assert hint(1).startswith("Use --checkpoint_levels all, --precision auto, or a smaller --image")


class Full:
    """A network's forward that runs out of memory above some rows."""

    def __init__(self, forward: Callable[..., Any], most: int) -> None:
        self.forward, self.most, self.sizes = forward, most, [0]

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError(FULL)
        return self.forward(x, *rest)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver++"])
@pytest.mark.parametrize("together", [1, 3])
def test_sampling_halves_its_batch_and_draws_the_same_masks(
    sampler: str, together: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.configure()
    cases = list(cases_in_memory(together).cases.values())
    full = make_segmenter(sampler, batch_size=9)
    expected = make_segmenter(sampler, batch_size=1).segment(cases)
    unlimited = make_segmenter(sampler, batch_size=9).segment(cases)
    full.net.forward = guard = Full(full.net.forward, 2)  # type: ignore[assignment]
    for got, same, near in zip(full.segment(cases), expected, unlimited, strict=True):
        assert_close(got.members, same.members, rtol=0, atol=0)
        assert_close(got.members, near.members, rtol=0, atol=1e-6)
        assert torch.equal(got.mask, near.mask)
    halvings = {1: ["3: ", "1"], 3: ["9: ", "4", "3: ", "1"]}[together]
    said = [line for line in capsys.readouterr().out.splitlines() if "--batch_size" in line]
    assert len(said) == len(halvings) // 2 and all("3.0 GiB" in line for line in said)
    assert said[0].startswith(f"--batch_size {halvings[0]}") and said[-1].endswith(halvings[-1])
    guard.sizes.clear()
    full.segment(cases)
    assert max(guard.sizes) <= 2  # for good


def test_a_case_that_fits_no_memory_fails_alone(tmp_path: Path, quiet: None) -> None:
    segmenter = make_segmenter()
    segmenter.net.forward = Full(segmenter.net.forward, 0)  # type: ignore[assignment]
    with pytest.raises(UserError, match="3 of the cases: case0, case1, case2: more memory"):
        segment(segmenter, cases_in_memory(), tmp_path, fingerprint="x")


def test_a_sampling_batch_starts_within_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, cpu = replace(make_segmenter().plan, batch_size=60_000), torch.device("cpu")
    logger.configure()
    monkeypatch.setattr(plans, "total_gib", lambda _: 1.0)
    lower = within_memory(plan, size=256, width=128, masks=1, device=cpu)
    assert lower.batch_size == 2 and "lowered to 2" in capsys.readouterr().out
    assert within_memory(lower, size=256, width=128, masks=1, device=cpu) is lower
    with pytest.raises(UserError, match=r"--num_ensemble 10000: .* At most 1365 fit"):
        within_memory(replace(plan, num_ensemble=10_000), size=256, width=128, masks=1, device=cpu)


def test_training_saves_what_it_has_and_names_what_would_fit(tmp_path: Path, quiet: None) -> None:
    for name in ("whole", "a"):
        (tmp_path / name).mkdir()
    whole, loop = make_loop(tmp_path / "whole", max_steps=6), make_loop(tmp_path / "a", max_steps=6)
    expected = load_checkpoint(whole.run_loop())
    forward = loop.net.forward

    def failing(*inputs: Any) -> Any:
        if loop.step == 4:
            raise RuntimeError(FULL)
        return forward(*inputs)

    loop.net.forward = failing  # type: ignore[assignment, method-assign]
    with pytest.raises(UserError, match=r"3\.0 GiB.* in step 5, 4 .*Use --microbatch 2 for"):
        loop.run_loop()
    path = tmp_path / "a/savedmodel000004.pt"
    again = resumed(make_loop(tmp_path / "a", max_steps=6), path)
    got = load_checkpoint(again.run_loop())
    for name, value in expected.model.items():
        assert_close(got.model[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_that_runs_out_of_memory_names_the_case(
    workers: int, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cases_in_memory(mask=torch.ones(1, 16, 16))
    monkeypatch.setattr(type(data), "read_image", lambda *_: (np.empty(10**15), None))
    loop = make_loop(tmp_path, num_workers=workers)
    loop.setup = replace(loop.setup, dataset=data)
    with pytest.raises(UserError, match=r"case\d: more memory is needed .*7\.11 PiB"):
        loop.run_loop()
    assert isinstance(data, SegmentationDataset)


def test_a_job_is_done_even_if_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    done: list[int] = []
    writer = Background()
    writer.start(lambda: done.append(1))
    writer.start(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert done == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_training_under_a_memory_limit_ends_with_one_line(brats: Path, tmp_path: Path) -> None:
    code = (
        "import resource, torch, guided_diffusion.train_util\n"
        "from guided_diffusion.commands import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)\n"
        "main('segmentation_train')"
    )
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, *NETWORK]
    flags += ["--image_size", 64, "--batch_size", 64, "--max_steps", 1]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "more memory is needed than there is" in done.stderr and done.stderr.count("\n") == 1
    assert "Use --microbatch 32" in done.stderr
    succeeded(script("segmentation_train", *flags[:-4], "--batch_size", 1, "--max_steps", 1))
