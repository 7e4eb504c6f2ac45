"""Compute what a training step would take on 1 to 64 GPUs. A model, not a measurement.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --measure --num_workers 4

A step is computed from its parts: the time of one GPU, the bytes of the gradients (of the real
network), their exchange in buckets while the backward pass goes on, reading and writing. Every part
is a flag, whose default says where it is from. With --measure, this machine's device replaces the
time of a step, the share of its backward pass and the rate of writing.

Left out: other jobs on the network and the file system, processes that wait for the slowest one,
and validation.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import training
from torch import nn

from guided_diffusion import logger
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.script_util import create_model_and_diffusion, parameter_count

GPUS = (1, 2, 4, 8, 16, 32, 64)
GB = 1e9
BUCKET = 25 * 2**20
"""Bytes of a bucket of gradients in torch's DistributedDataParallel."""


@dataclass(frozen=True)
class Parts:
    """The parts of a step that are known for one GPU; seconds, bytes, and bytes per second.

    Attributes:
        step: seconds of a step on one GPU that waits for nothing.
        backward: the share of the backward pass in it, during which gradients are exchanged.
        batch: images of one GPU in a step.
        gradients: their bytes.
        inside: rate of an all-reduce between the GPUs of a node, each way.
        between: rate of the network of one node, each way.
        latency: seconds of one hop, for each bucket.
        node: GPUs of a node.
        reading: images per second that the reading processes of one GPU decode.
        shared: images per second that the file system delivers to all.
        checkpoint: its bytes.
        writing: rate at which it is written, in the background.
        interval: steps between two checkpoints.
        bucket: bytes of a bucket.
    """

    step: float
    backward: float
    batch: int
    gradients: int
    inside: float
    between: float
    latency: float
    node: int
    reading: float
    shared: float
    checkpoint: int
    writing: float
    interval: int
    bucket: int = BUCKET


class Step(NamedTuple):
    """A step on several GPUs, in seconds.

    Attributes:
        exchange: of all gradients, if nothing else went on.
        exposed: what of it the backward pass does not hide.
        reading: of the images of one GPU.
        writing: of a checkpoint, for each step of its interval.
        seconds: of the whole step.
    """

    exchange: float
    exposed: float
    reading: float
    writing: float
    seconds: float


def step_on(gpus: int, parts: Parts) -> Step:
    """Compute a step on so many GPUs, each with a batch of its own."""
    exchange = exchange_time(gpus, parts)
    exposed = exposed_time(exchange, parts)
    reading = parts.batch / min(parts.reading, parts.shared / gpus)
    writing = parts.checkpoint / parts.writing / parts.interval
    return Step(exchange, exposed, reading, writing, max(parts.step + exposed, reading, writing))


def exchange_time(gpus: int, parts: Parts) -> float:
    """Compute the time of the all-reduce of all gradients.

    Each of n processes sends and receives 2 (n - 1) / n of the bytes (Patarasuk and Yuan, 2009)
    over the slowest link, and a tree of 2 log2 n hops delays every bucket.
    """
    if gpus == 1:
        return 0.0
    rate = parts.inside if gpus <= parts.node else min(parts.inside, parts.between)
    hops = 2 * math.ceil(math.log2(gpus))
    return 2 * (gpus - 1) / gpus * parts.gradients / rate + buckets(parts) * hops * parts.latency


def exposed_time(exchange: float, parts: Parts) -> float:
    """Compute how long an exchange goes on after the backward pass.

    Of m buckets one is ready after every m-th part of the backward pass. They are exchanged one
    after the other, the last of them after its end.
    """
    backward, number = parts.backward * parts.step, buckets(parts)
    return max(exchange / number, exchange - backward * (1 - 1 / number))


def buckets(parts: Parts) -> int:
    """Count the buckets of the gradients."""
    return max(1, math.ceil(parts.gradients / parts.bucket))


def gradient_bytes(net: nn.Module) -> int:
    """Count the bytes of the gradients of a network's parameters, which may be on ``meta``."""
    return sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)


def table(parts: Parts, gpus: tuple[int, ...] = GPUS, *, measured: bool = False) -> str:
    """Format the steps on several GPUs as Markdown."""
    lines = [
        "| GPUs | nodes | images in a step | step, ms | exchange, ms | not hidden, ms "
        "| reading, ms | writing, ms | images per second | efficiency | |",
        "|---" * 11 + "|",
    ]
    alone = step_on(1, parts).seconds
    for count in gpus:
        step = step_on(count, parts)
        times = (step.seconds, step.exchange, step.exposed, step.reading, step.writing)
        milliseconds = " | ".join(f"{1000 * value:.1f}" for value in times)
        rate, images = count * parts.batch / step.seconds, count * parts.batch
        source = "measured" if measured and count == 1 else "model"
        lines.append(
            f"| {count} | {math.ceil(count / parts.node)} | {images} | {milliseconds} "
            f"| {rate:.1f} | {alone / step.seconds:.0%} | {source} |"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the inputs

H100 = "benchmarks/README.md, Speed of a device: 8 images at 51.67 per second, bf16, one H100"
RATES = {  # default and source
    "step": (8 / 51.67, f"seconds of a step of one GPU; {H100}"),
    "backward": (2 / 3, "share of the backward pass; it has twice the operations of the forward"),
    "inside": (450.0, "GB/s in a node, each way; data sheet of the H100, NVLink: 900 both ways"),
    "between": (25.0, "GB/s of a node's network, each way; one port of HDR InfiniBand, 200 Gb/s"),
    "latency": (10.0, "microseconds of a hop; assumed"),
    "reading": (
        50.5,
        "images per second of one reading process; benchmarks/README.md, BraTS slices",
    ),
    "shared": (20_000.0, "images per second of the file system for all; assumed"),
    "writing": (1.0, "GB/s of writing; assumed"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", default="plain", help="of the network")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--num_channels", type=int, default=128)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8, help="images of one GPU")
    parser.add_argument("--num_workers", type=int, default=4, help="reading processes of one GPU")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--interval", type=int, default=5000, help="steps between checkpoints")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    for name, (value, source) in RATES.items():
        parser.add_argument(f"--{name}", type=float, help=f"{source} ({value:.4g})")
    parser.add_argument("--measure", action="store_true", help="measure on this machine's device")
    parser.add_argument("--rounds", type=int, default=8, help="measured steps")
    parser.add_argument("--precision", default="bf16", help="of the measured steps")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    with torch.device("meta"):
        net, _ = create_model_and_diffusion(
            version=arguments.version,
            image_size=arguments.image_size,
            num_channels=arguments.num_channels,
            num_res_blocks=arguments.num_res_blocks,
            num_heads=1,
            learn_sigma=True,
            use_scale_shift_norm=False,
            attention_resolutions="16",
        )
    gradients = gradient_bytes(net)
    given = {name: getattr(arguments, name) for name in RATES}
    found = measure(arguments) if arguments.measure else {}
    values = {
        name: next(v for v in (given[name], found.get(name), default) if v is not None)
        for name, (default, _) in RATES.items()
    }
    parts = Parts(
        step=values["step"],
        backward=values["backward"],
        batch=arguments.batch_size,
        gradients=gradients,
        inside=values["inside"] * GB,
        between=values["between"] * GB,
        latency=values["latency"] / 1e6,
        node=arguments.node,
        reading=values["reading"] * max(1, arguments.num_workers),
        shared=values["shared"],
        checkpoint=4 * gradients,  # weights, their average, and two moments of AdamW
        writing=values["writing"] * GB,
        interval=arguments.interval,
    )
    print("**A model, not a measurement**: computed from the parts below.\n")
    print(
        f"{parameter_count(net)}, version {arguments.version}, {arguments.image_size} px: "
        f"{gradients / 2**20:.0f} MiB of gradients in {buckets(parts)} buckets\n"
    )
    print("| part | value | from |\n|---|---|---|")
    for name, (_, source) in RATES.items():
        what, _, where = source.partition("; ")
        if given[name] is not None:
            where = "given"
        elif name in found:
            where = f"measured on {describe(dev())}"
        print(f"| {what} | {values[name]:.4g} | {where} |")
    measured = "step" in found and given["step"] is None
    print(f"\n{table(parts, tuple(arguments.gpus), measured=measured)}")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure a training step, the share of its backward pass, and the rate of writing."""
    device = dev()
    logger.configure(quiet=True)
    arguments.steps = 1
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = training.Discs(arguments.image_size)
        loop = training.our_loop(arguments, data, device, arguments.precision, folder)
        whole = training.our_step(loop)
        backward = Backward(device)
        with backward:
            seconds = training.measure({"step": whole}, arguments, device)["step"]
        step = statistics.median(seconds)
        share = statistics.median(backward.seconds[1:]) / step
        return {"step": step, "backward": share, "writing": write_rate(folder)}


class Backward:
    """Measures every backward pass inside this context."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def __enter__(self) -> Backward:
        self.run = run = torch.Tensor.backward

        def timed(*values: object, **named: object) -> None:
            training.synchronise(self.device)
            started = time.perf_counter()
            run(*values, **named)  # type: ignore[arg-type]
            training.synchronise(self.device)
            self.seconds.append(time.perf_counter() - started)

        torch.Tensor.backward = timed  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        torch.Tensor.backward = self.run  # type: ignore[method-assign]


def write_rate(folder: Path, size: int = 2**28) -> float:
    """Measure how fast a file is written and flushed, in GB/s."""
    content = os.urandom(2**20)
    started = time.perf_counter()
    with (folder / "written").open("wb") as file:
        for _ in range(size // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - started) / GB


if __name__ == "__main__":
    main()
