"""Precision by what a device has, and what is said where a precision is slow there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loops import make_loop

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.inference.precision import (
    device_notes,
    is_native,
    resolve_precision,
    set_up_kernels,
)
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.training.steps import reading_processes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with the capability that the test names, told as torch from 2.9 on does."""
    found = {"avx2": True, request.param: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("processor", "chosen"),
    [("avx2", "fp32"), ("avx512_f", "fp32"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")],
    indirect=["processor"],
)
def test_auto_is_bf16_where_a_processor_has_it(processor: None, chosen: str) -> None:
    assert resolve_precision("auto", CPU) == chosen
    assert [resolve_precision(given, CPU) for given in ("fp32", "bf16", "fp16")] == [
        *("fp32", "bf16", "fp16")
    ]
    assert bool(device_notes("bf16", CPU, tf32=True)) == (chosen == "fp32")


@pytest.mark.parametrize(("has", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_torch_that_lists_no_capabilities_is_asked_otherwise(
    has: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", bool, raising=False)
    assert resolve_precision("auto", CPU) == chosen


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_auto_is_bf16_from_capability_8(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert resolve_precision("auto", CUDA) == chosen
    assert is_native("fp16", CUDA)
    said = device_notes("bf16", CUDA, tf32=False)
    assert ["--precision fp16" in line for line in said] == [True] * (chosen == "fp32") + [False]
    assert "TF32 in fp32 convolutions: False (--tf32)" in said[-1]


@pytest.mark.parametrize("processor", ["avx2"], indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_explicit_half_precision_is_honoured_after_one_line(
    processor: None, precision: str
) -> None:
    (line,) = device_notes(precision, CPU, tf32=True)
    assert line.startswith(f"--precision {precision}: this processor does not compute it itself")
    assert line.endswith("use --precision fp32")
    assert not device_notes("fp32", CPU, tf32=True)
    assert resolve_precision(precision, CPU) == precision


@pytest.mark.parametrize("processor", ["avx512_bf16"], indirect=True)
def test_training_and_sampling_resolve_auto(processor: None, tmp_path: Path) -> None:
    plan = make_plan(
        SamplingOptions(steps=2, sampler="ddim"),
        RunOptions(precision="auto"),
        GaussianDiffusion(NoiseSchedule.named("linear", 50)),
        device=CPU,
        own=True,
    )
    assert plan.precision == "bf16"
    assert make_loop(tmp_path, precision="auto").run.precision == "bf16"


def test_kernels_are_set_up_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = SimpleNamespace(allow_tf32=None, benchmark=None)
    matmul = SimpleNamespace(allow_tf32=None)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    set_up_kernels(CPU, tf32=True, one_size=True)
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (None, None, None)
    for tf32, one_size in ((True, True), (False, False)):
        set_up_kernels(CUDA, tf32=tf32, one_size=one_size)
        assert (cudnn.allow_tf32, cudnn.benchmark) == (tf32, one_size)
        assert matmul.allow_tf32 is False


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 1), (4, 1, 3), (64, 1, 4), (8, 4, 1), (16, 4, 3)]
)
def test_data_are_read_beside_a_cuda_device(
    cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert reading_processes(-1, CUDA) == expected
    assert (reading_processes(-1, CPU), reading_processes(0, CUDA)) == (0, 0)
    assert reading_processes(7, CPU) == reading_processes(7, CUDA) == 7
