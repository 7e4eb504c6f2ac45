"""On a CUDA device: what the CPU computes, in every precision, compiled, resumed and launched.

The CPU's float32 is the reference. Without a CUDA device all of this is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
import torch.distributed as dist
from helpers import NETWORK, ROOT
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.checkpoint import load_checkpoint, load_weights
from guided_diffusion.data.batches import Batch
from guided_diffusion.data.frames import Frame
from guided_diffusion.dist_util import autocast, describe, dev, place_model
from guided_diffusion.errors import UserError
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.inference.precision import resolve_precision
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.cost import image_cost
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.sharded import shard_network, whole_average
from guided_diffusion.training.steps import reading_processes
from guided_diffusion.unet import UNetModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FLAGS: dict[str, Any] = {
    "image_size": 32,
    "in_ch": 2,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "16",
    "num_heads": 2,
    "predict_xstart": True,
    "mask_range": "-1,1",
    "diffusion_steps": 100,
}
# How far a precision may be from float32, relative to the largest value.
TOLERANCE = {"fp32": 2e-3, "bf16": 6e-2, "fp16": 2e-2}
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def random_network(device: torch.device, **flags: Any) -> tuple[UNetModel, Any]:
    """A network with no zero weights, the same on every device."""
    net, diffusion = create_model_and_diffusion(**{**FLAGS, **flags})
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    net.out[-1].weight.data *= 10  # masks with contrast
    return place_model(net, device), diffusion


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def batch() -> Batch:
    """Four images, and their bright parts as masks."""
    x = images(4)
    return Batch(x, (x > 0.5).float(), list("abcd"))


def make_loop(device: torch.device, folder: Path, **flags: Any) -> TrainLoop:
    """A loop whose network, noise and batch are the same on every device."""
    run = {k: flags.pop(k) for k in ("precision", "compile", "tf32") if k in flags}
    net, diffusion = random_network(device, **flags)
    if run.get("compile"):
        place_model(net, device, compile=run["compile"])
    setup = TrainSetup(
        net=net,
        diffusion=diffusion,
        dataset=[],  # type: ignore[arg-type]
        options=TrainingOptions(batch_size=4, lr=1e-3, ema_rate="0.9"),
        run=RunOptions(out_dir=str(folder), seed=1, **run),
        recorded={},
        data="",
    )
    return TrainLoop(setup)


def drawn(device: torch.device, precision: str = "fp32", compile: str = "", **options: Any) -> Any:
    """Soft masks of two images, three each."""
    net, diffusion = random_network(device)
    sampling = SamplingOptions(num_ensemble=3, **{"sampler": "dpm_solver++", "steps": 5, **options})
    run = RunOptions(precision=precision, compile=compile)
    plan = make_plan(sampling, run, diffusion, device=device, own=True)
    if compile:
        place_model(net, device, compile=compile)
    segmenter = Segmenter(net, diffusion, frame=Frame(32), plan=plan)
    return segmenter.draw(images(2), ["a", "b"])


def near(actual: Tensor, expected: Tensor, precision: str) -> None:
    """Compare with a tolerance that is relative to the largest expected value."""
    largest = float(expected.abs().max())
    assert_close(
        actual.float().cpu(), expected.float().cpu(), rtol=0, atol=TOLERANCE[precision] * largest
    )


def test_the_device_is_chosen_and_named() -> None:
    assert dev() == CUDA
    assert torch.cuda.get_device_name(0) in describe(CUDA)


@pytest.mark.parametrize("version", ["plain", "unet", "new", "2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_networks_predict_what_they_predict_on_the_cpu(version: str, precision: str) -> None:
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5, 70])
    found = []
    for device, how in ((CPU, "fp32"), (CUDA, precision)):
        net, _ = random_network(device, version=version)
        net.eval()
        with torch.no_grad(), autocast(device, how):
            condition = net.encode(images(2).to(device))
            found.append(net(x.to(device), t.to(device), condition).raw)
    near(found[1], found[0], precision)


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("shape", [(3, 64, 33, 20), (2, 64, 50), (2, 64, 3, 4, 5)])
@pytest.mark.parametrize("precision", HALVES)
def test_group_norm_in_half_precision_errs_by_its_rounding(
    precision: str, shape: tuple[int, ...]
) -> None:
    """Value, gradients and memory order, of values whose mean is far above their deviation."""
    dtype, norm = HALVES[precision], GroupNorm32(64).to(CUDA)
    generator = torch.Generator().manual_seed(0)
    x = (20 + torch.randn(shape, generator=generator)).to(CUDA, dtype)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn(shape, generator=generator).to(CUDA, dtype)

    def value_and_gradients(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
        own = x.clone().requires_grad_()
        with autocast(CUDA, precision if x.dtype == dtype else "fp32"):
            y = layer(own)
        y.backward(grad.to(y.dtype))
        return [
            y.detach(),
            *(t.grad for t in (own, layer.weight, layer.bias) if t.grad is not None),
        ]

    found = value_and_gradients(norm, x)
    exact = value_and_gradients(torch.nn.GroupNorm(32, 64).to(CUDA, torch.float64), x.double())
    for own, expected in zip(found, exact, strict=True):
        error = (own.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < 2 * torch.finfo(dtype).eps
    assert found[0].dtype == found[1].dtype == dtype
    assert found[0].stride() == found[1].stride() == x.stride()


def test_group_norm_in_half_precision_takes_no_memory_of_single_precision() -> None:
    """What is kept is the result alone; the backward pass needs 8 maps at its most."""
    norm, x = GroupNorm32(64).to(CUDA), torch.randn(8, 64, 128, 128, device=CUDA).bfloat16()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with autocast(CUDA, "bf16"):
        norm(x).sum().backward()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = norm(x)
        assert torch.cuda.memory_allocated() - before < 1.1 * x.nbytes
        y.backward(torch.ones_like(y))
    assert torch.cuda.max_memory_allocated() - before < 8.5 * x.nbytes


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}])
def test_a_compiled_or_recomputed_step_in_bf16_has_the_same_gradient(
    options: dict[str, Any], tmp_path: Path
) -> None:
    gradients = []
    for compile in ("", "default"):
        loop = make_loop(CUDA, tmp_path, precision="bf16", compile=compile, **options)
        loop.forward_backward(batch())
        grads = [p.grad for p in loop.parameters if p.grad is not None]
        gradients.append(torch.cat([g.float().flatten() for g in grads]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("precision", HALVES)
def test_binary_masks_in_half_precision_agree_with_those_in_single(precision: str) -> None:
    exact, found = (drawn(CUDA, how) >= 0.5 for how in ("fp32", precision))
    overlap = 2 * (exact & found).sum() / (exact.sum() + found.sum())
    assert overlap >= 0.97  # random weights: many pixels are near 0.5; trained ones reach 0.995


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_has_the_loss_and_the_gradient_of_the_cpu(precision: str, tmp_path: Path) -> None:
    losses, gradients = [], []
    for device, how in ((CPU, "fp32"), (CUDA, precision)):
        loop = make_loop(device, tmp_path, precision=how)
        if loop.scaler.is_enabled():
            loop.scaler = torch.amp.GradScaler("cuda", init_scale=64.0)
        losses.append(loop.forward_backward(batch()))
        scale = loop.scaler.get_scale() if loop.scaler.is_enabled() else 1.0
        grads = [p.grad for p in loop.parameters if p.grad is not None]
        gradients.append(torch.cat([g.float().cpu().flatten() for g in grads]) / scale)
    near(losses[1], losses[0], precision)
    cosine = torch.cosine_similarity(*gradients, dim=0)
    assert cosine > {"fp32": 0.9999, "bf16": 0.98, "fp16": 0.99}[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_in_every_precision(precision: str, tmp_path: Path) -> None:
    """The image shows the mask: after 150 steps the loss is a fifth of what it was or less."""
    loop = make_loop(CUDA, tmp_path, precision=precision)
    losses = [float(loop.run_step(batch())) for _ in range(150)]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    assert all(p.isfinite().all() for p in loop.parameters)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_training_is_what_it_is_without(mode: str, tmp_path: Path) -> None:
    plain, compiled = (make_loop(CUDA, tmp_path, compile=how) for how in ("", mode))
    for _ in range(3):
        one, other = plain.run_step(batch()), compiled.run_step(batch())
        near(other, one, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++", "unipc"])
def test_masks_are_those_of_the_cpu(sampler: str, precision: str) -> None:
    """The noise is drawn on the CPU, so the same masks come out, up to rounding."""
    options = {"sampler": sampler, "steps": 10}
    expected, found = drawn(CPU, **options), drawn(CUDA, precision, **options)
    assert expected.std() > 0.1
    error = (found - expected).abs().mean()
    assert error < {"fp32": 2e-3, "bf16": 4e-2, "fp16": 1e-2}[precision]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_sampling_is_what_it_is_without(mode: str) -> None:
    assert (drawn(CUDA, compile=mode) - drawn(CUDA)).abs().mean() < 2e-3


def test_a_resumed_run_continues_with_the_same_optimiser(tmp_path: Path, quiet: None) -> None:
    loop = make_loop(CUDA, tmp_path)
    for _ in range(2):
        loop.run_step(batch())
    path = loop.save()
    loop.checkpoints.wait()
    again, start = make_loop(CUDA, tmp_path), load_checkpoint(path)
    load_weights(again.net, start.model, path)
    again.restore(start, path=path)
    near(again.run_step(batch()), loop.run_step(batch()), "fp32")
    for one, other in zip(again.parameters, loop.parameters, strict=True):
        near(one.detach(), other.detach(), "fp32")


def test_auto_is_what_the_device_computes_itself(tmp_path: Path) -> None:
    native = torch.cuda.get_device_capability(CUDA)[0] >= 8
    assert resolve_precision("auto", CUDA) == ("bf16" if native else "fp32")
    for tf32 in (False, True):
        loop = make_loop(CUDA, tmp_path, precision="auto", tf32=tf32)
        assert torch.backends.cudnn.allow_tf32 is tf32 and torch.backends.cudnn.benchmark
        assert float(loop.run_step(batch())) > 0


def test_without_tf32_convolutions_are_those_of_the_cpu(tmp_path: Path) -> None:
    losses = []
    for device in (CPU, CUDA):
        losses.append(make_loop(device, tmp_path, tf32=False).forward_backward(batch()))
    assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")  # that the mode is a prototype
@pytest.mark.parametrize(
    "flags", [{}, {"mask_loss": "dice_ce", "mask_dropout": 0.5}, {"learn_sigma": True}]
)
def test_a_step_waits_for_the_device_once(flags: dict[str, Any], tmp_path: Path) -> None:
    """In its loss nowhere; torch raises an error where a call would wait."""
    loop = make_loop(CUDA, tmp_path, **flags)
    for _ in range(2):
        loop.run_step(batch())
    try:
        torch.cuda.set_sync_debug_mode("error")
        loop.forward_backward(batch())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_read_ahead_by_other_processes_changes_no_step(tmp_path: Path, quiet: None) -> None:
    weights = []
    for workers in (0, -1):
        loop = loops.make_loop(tmp_path, max_steps=6, num_workers=workers, dropout=0.3)
        loop = make_on_cuda(loop, workers)
        loop.run_loop()
        weights.append(torch.cat([p.detach().flatten() for p in loop.parameters]))
    near(weights[1], weights[0], "fp32")


def make_on_cuda(loop: TrainLoop, workers: int) -> TrainLoop:
    """The loop over discs with its network on the device."""
    assert (reading_processes(workers, CUDA) > 0) == (workers != 0)
    return TrainLoop(replace(loop.setup, net=place_model(loop.setup.net, CUDA)))


@pytest.mark.parametrize("version", ["plain", "new", "1", "2"])
def test_recomputed_levels_have_the_same_gradient_and_less_memory(version: str) -> None:
    gradients, peaks = [], []
    for levels in ("none", "fine", "all"):
        flags = {"image_size": 128, "channel_mult": "1,1,2,2", "version": version}
        net, _ = random_network(CUDA, **flags, checkpoint_levels=levels)
        image, x = torch.ones(4, 1, 128, 128, device=CUDA), torch.ones(4, 1, 128, 128, device=CUDA)
        for _ in range(2):
            net.zero_grad()
            torch.manual_seed(0)
            torch.cuda.reset_peak_memory_stats(CUDA)
            net(x, torch.ones(4, device=CUDA), net.encode(image)).raw.square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated(CUDA))
        found = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    near(gradients[1], gradients[0], "fp32")
    near(gradients[2], gradients[0], "fp32")
    assert peaks[2] < peaks[1] < peaks[0]


@pytest.mark.parametrize("version", ["plain", "2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_simulated_memory_is_near_the_measured_one(version: str, precision: str) -> None:
    flags = {"image_size": 256, "num_channels": 64, "channel_mult": "1,1,2,2", "version": version}
    net, _ = random_network(CUDA, **flags)
    expected = image_cost(net).gib_in(precision)
    image, x = (torch.ones(4, 1, 256, 256, device=CUDA) for _ in range(2))
    for _ in range(2):
        net.zero_grad(set_to_none=False)
        before = torch.cuda.memory_allocated(CUDA)
        torch.cuda.reset_peak_memory_stats(CUDA)
        with autocast(CUDA, precision):
            out = net(x, torch.ones(4, device=CUDA), net.encode(image))
        out.raw.float().square().mean().backward()
        del out
    measured = (torch.cuda.max_memory_allocated(CUDA) - before) / 4 / 2**30
    assert expected == pytest.approx(measured, rel=0.3)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("levels", ["fine", "all"])
def test_compiled_training_recomputes_levels(mode: str, levels: str, tmp_path: Path) -> None:
    plain, other = (
        make_loop(CUDA, tmp_path, compile=how, checkpoint_levels=saved)
        for how, saved in (("", "none"), (mode, levels))
    )
    for _ in range(4):
        near(other.run_step(batch()), plain.run_step(batch()), "fp32")


def test_cuda_graphs_refuse_accumulated_gradients(tmp_path: Path) -> None:
    loop = make_loop(CUDA, tmp_path)
    options = replace(loop.options, microbatch=2)
    for mode in ("reduce-overhead", "max-autotune"):
        run = replace(loop.setup.run, compile=mode)
        with pytest.raises(UserError, match="--microbatch 2"):
            TrainLoop(replace(loop.setup, options=options, run=run))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_microbatches_have_the_gradient_of_the_batch(tmp_path: Path) -> None:
    whole, parts = (make_loop(CUDA, tmp_path, compile="default") for _ in range(2))
    parts.options = replace(parts.options, microbatch=2)
    for _ in range(3):
        near(parts.run_step(batch()), whole.run_step(batch()), "fp32")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone, as torchrun would make it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_divided_network_trains_as_one_in_one_piece(
    precision: str, tmp_path: Path, quiet: None, group: None
) -> None:
    """With one process it holds every part; its shards are read back whole."""

    def make() -> UNetModel:
        torch.manual_seed(0)
        net, _ = create_model_and_diffusion(**FLAGS)
        for parameter in net.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.data.normal_(std=0.02)
        return net

    _, diffusion = create_model_and_diffusion(**FLAGS)
    settings = TrainingOptions(batch_size=4, lr=1e-3, ema_rate="0.9", grad_clip=1, microbatch=2)
    run = RunOptions(out_dir=str(tmp_path), precision=precision)
    whole, divided = make().to(CUDA), shard_network(make, CUDA, new=True)
    loops = []
    for net in (whole, divided):
        loops.append(TrainLoop(TrainSetup(net, diffusion, [], settings, run)))  # type: ignore
        for _ in range(3):
            loops[-1].run_step(batch())
    norms = [torch.stack(loop.log.grad_norms) for loop in loops]
    near(norms[1], norms[0], precision)
    path = loops[1].save()
    loops[1].checkpoints.wait()
    saved = load_checkpoint(path)
    for name, value in loops[1].net.named_parameters():
        assert torch.equal(saved.model[name], value.full_tensor().cpu())  # type: ignore
    (average,) = loops[1].averages.values()
    assert whole_average(average, wanted=True).keys() == saved.ema["0.9"].keys()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_network_divided_between_two_devices_continues(
    precision: str, brats: Path, tmp_path: Path
) -> None:
    """Over nccl: trained, continued and sampled with."""

    def run(*words: object, script: str = "segmentation_train") -> str:
        start = [sys.executable, f"scripts/{script}.py", "--multi_gpu", "0,1"]
        command = [*start, *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    flags = ("--data_dir", brats / "training", "--out_dir", tmp_path, *NETWORK, "--fsdp", "on")
    more = ("--batch_size", 2, "--save_interval", 2, "--precision", precision)
    assert "divided among 2 processes" in run(*flags, *more, "--max_steps", 2)
    assert "at step 2" in run(*flags, *more, "--max_steps", 4, "--resume", "auto")
    masks = ("--data_dir", brats / "testing", "--model_path", tmp_path, "--out_dir", tmp_path)
    run(*masks, "--dpm_solver", True, "--steps", 3, script="segmentation_sample")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["multi_gpu", "torchrun"])
def test_the_commands_run_on_the_device(launcher: str, brats: Path, tmp_path: Path) -> None:
    """Training, sampling and scoring, in bf16, by either launcher, over nccl."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start = [sys.executable] if launcher == "multi_gpu" else [*torchrun, "--nproc_per_node=1"]
    devices = ["--multi-gpu", "0"] if launcher == "multi_gpu" else []

    def run(script: str, *words: object) -> str:
        command = [*start, f"scripts/{script}.py", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    said = run(
        "segmentation_train",
        *("--data_dir", brats / "training", "--out_dir", tmp_path, *NETWORK, *devices),
        *("--batch_size", 2, "--max_steps", 3, "--precision", "bf16"),
    )
    assert "cuda:0" in said and "bf16" in said
    said = run(
        "segmentation_sample",
        *("--data_dir", brats / "testing", "--model_path", tmp_path, "--out_dir", tmp_path),
        *("--dpm_solver", True, "--steps", 3, "--precision", "bf16", *devices),
    )
    assert "cuda:0" in said and (tmp_path / "000005_mask.png").exists()
