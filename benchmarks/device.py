"""Measure speed, memory and profile of sampling and training on a device.

    python benchmarks/device.py

The network is that of the README. Speed is compared with that of products of large bf16 matrices,
measured in the same run. Only necessary operations of the network count, not repeated ones. On a
CPU, try ``--image_size 32 --num_channels 32 --batches 1 2``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sampling
import torch
import training
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import logger
from guided_diffusion.data.frames import Frame
from guided_diffusion.dist_util import describe, dev, place_model
from guided_diffusion.dpm_solver import solver_levels
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.script_util import parameter_count
from guided_diffusion.unet import UNetModel


class Measured(NamedTuple):
    """Seconds of a call, and its peak memory in GiB."""

    seconds: float
    gib: float


def main() -> None:
    arguments = parse()
    device = dev()
    logger.configure(quiet=True)
    net, _ = training.build(arguments)
    flops = forward_flops(net.to(device), arguments.image_size)
    rate = matrix_rate(device)
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    print(
        f"torch {torch.__version__}, {describe(device)}, {parameter_count(net)}, "
        f"{arguments.image_size} px"
    )
    print(
        f"{flops / 1e12:.3f} TFLOP per evaluation; matrices in bf16 reach {rate / 1e12:.1f} TFLOP/s"
    )
    print(f"TF32 in fp32 convolutions {tf32[0]}, in fp32 matrix products {tf32[1]}\n")
    for title, table in (("sampling", sampled), ("training", trained)):
        if title in arguments.parts:
            table(arguments, device, flops, rate)
            print()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["sampling", "training"])
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--num_channels", type=int, default=128)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of training")
    parser.add_argument("--batch_size", type=int, default=20, help="network inputs, of sampling")
    parser.add_argument("--images", type=int, default=4, help="of sampling, 5 members each")
    parser.add_argument("--steps", type=int, default=10, help="network evaluations per mask")
    parser.add_argument("--repeats", type=int, default=5, help="calls, of which the median counts")
    parser.add_argument("--compile", nargs="*", default=["", "default"], help="modes; '' for none")
    return parser.parse_args()


@torch.inference_mode()
def forward_flops(net: UNetModel, size: int) -> float:
    """Count the operations of one evaluation for one mask; a multiply-add counts as two."""
    at = next(net.parameters()).device
    x, image = torch.zeros(1, 1, size, size, device=at), torch.zeros(1, 4, size, size, device=at)
    condition = net.encode(image)
    with FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(1, device=at), condition)
    return float(counter.get_total_flops())


def matrix_rate(device: torch.device) -> float:
    """Return operations per second in products of bf16 matrices, the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * size**3 / min(measured(lambda: a @ b, device, 1).seconds for _ in range(10))


def measured(call: Callable[[], object], device: torch.device, repeats: int) -> Measured:
    """Return the median of several calls, after two that compile, tune and warm up."""
    seconds = []
    for turn in range(repeats + 2):
        if turn == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        training.synchronise(device)
        started = time.perf_counter()
        call()
        training.synchronise(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Measured(statistics.median(seconds[2:]), peak / 2**30)


def sampled(arguments: argparse.Namespace, device: torch.device, flops: float, rate: float) -> None:
    """Print the table of sampling, and the profile of its last row."""
    net, diffusion = training.build(arguments)
    net = net.to(device).eval()
    size, masks = arguments.image_size, sampling.ENSEMBLE * arguments.images
    images = torch.randn(arguments.images, 4, size, size)
    levels = tuple(solver_levels(diffusion.schedule, arguments.steps))

    def parents() -> None:
        for image in images[:1]:
            for _ in range(sampling.ENSEMBLE):
                sampling.draw_one(net, diffusion, image[None].to(device), levels)

    def ours(precision: str, mode: str) -> Callable[[], object]:
        own = place_model(training.build(arguments)[0], device, compile=mode)
        plan = SamplingPlan(
            "dpm_solver++", levels, batch_size=arguments.batch_size, precision=precision
        )
        segmenter = Segmenter(own, diffusion, frame=Frame(size), plan=plan)
        return lambda: segmenter.draw(images, [str(index) for index in range(len(images))])

    print("| sampling | masks per second | times the parents' | share of the matrix rate | GiB |")
    print("|---|---|---|---|---|")
    first = measured(parents, device, arguments.repeats)
    base = sampling.ENSEMBLE / first.seconds

    def row(name: str, per_second: float, gib: float) -> None:
        share = per_second * arguments.steps * flops / rate
        print(
            f"| {name} | {per_second:.3f} | {per_second / base:.2f} | {share:.1%} | {gib:.2f} |",
            flush=True,
        )

    row("the parents' procedure, batch 1, fp32", base, first.gib)
    call: Callable[[], object] = parents
    for precision in ("fp32", "bf16"):
        for mode in arguments.compile:
            call = ours(precision, mode)
            result = measured(call, device, arguments.repeats)
            name = f"ours, {precision}{f', --compile {mode}' if mode else ''}"
            row(name, masks / result.seconds, result.gib)
    print_profile(call, device)


def trained(arguments: argparse.Namespace, device: torch.device, flops: float, rate: float) -> None:
    """Print the table of training steps in bf16, and the profile of its last row.

    A training step has three times the operations of a forward pass.
    """
    data = training.Discs(arguments.image_size)
    call: Callable[[], object] = bool
    print("| training, bf16 | batch | images per second | share of the matrix rate | GiB |")
    print("|---|---|---|---|---|")
    one = argparse.Namespace(**vars(arguments) | {"batch_size": 1})
    net, diffusion = training.build(one)
    parents = training.parents_step(net.to(device), diffusion, data, one)
    result = measured(parents, device, arguments.repeats)
    share = 3 * flops / result.seconds / rate
    print(
        f"| the parents' procedure, fp32 | 1 | {1 / result.seconds:.2f} | {share:.1%} "
        f"| {result.gib:.2f} |",
        flush=True,
    )
    del parents, net
    for mode in arguments.compile:
        for checkpointed in (False, True):
            for batch in arguments.batches:
                flags = argparse.Namespace(**vars(arguments) | {"batch_size": batch})
                flags.use_checkpoint = checkpointed
                name = "--use_checkpoint True" if checkpointed else "plain"
                name += f", --compile {mode}" if mode else ""
                call = bool  # frees the memory of the previous one
                with tempfile.TemporaryDirectory() as folder:
                    call = training.our_step(
                        training.our_loop(flags, data, device, "bf16", Path(folder), mode)
                    )
                    try:
                        result = measured(call, device, arguments.repeats)
                    except torch.cuda.OutOfMemoryError:
                        print(f"| {name} | {batch} | out of memory | | |", flush=True)
                        continue
                speed = batch / result.seconds
                share = 3 * flops * speed / rate
                print(f"| {name} | {batch} | {speed:.2f} | {share:.1%} | {result.gib:.2f} |")
    print_profile(call, device)


def kernel_times(entries: Iterable[Any]) -> dict[str, float]:
    """Return the microseconds of each kernel.

    The profiler lists a kernel's time with the operation that launched it and with ranges that
    were named around it, too; those are left out.
    """
    return {
        entry.key: entry.self_device_time_total
        for entry in entries
        if entry.device_type == DeviceType.CUDA and not entry.is_user_annotation
    }


def cpu_times(entries: Iterable[Any]) -> dict[str, float]:
    """Return the microseconds of each operation on the CPU."""
    return {entry.key: entry.self_cpu_time_total for entry in entries}


def print_profile(call: Callable[[], object], device: torch.device) -> None:
    """Print the operations on which the last row of a table spends its time."""
    cuda = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as seen:
        started = time.perf_counter()
        call()
        training.synchronise(device)
        wall = time.perf_counter() - started
    spent = kernel_times(seen.key_averages()) if cuda else cpu_times(seen.key_averages())
    total = sum(spent.values())
    if cuda:
        print(f"\nthe device is busy for {total / wall / 1e6:.1%} of the time, profiled")
    print("\n| operation of the last row | share of time |\n|---|---|")
    for name in sorted(spent, key=spent.__getitem__, reverse=True)[:12]:
        print(f"| `{name[:90]}` | {spent[name] / total:.1%} |")


if __name__ == "__main__":
    main()
