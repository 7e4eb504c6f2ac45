"""Compare a training step with the procedure of the parent projects, on the same network.

    python benchmarks/training.py

prints one Markdown table. The procedure of the parent projects: fp32, contiguous tensors, images
read in the training process, AdamW that is not fused, averages updated per tensor in Python. The
procedures take turns, a few steps each, and medians are compared, so that other load on the machine
affects all alike. ``--both_orders`` adds the forward and backward pass in the other memory order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import Dataset

from guided_diffusion import logger
from guided_diffusion.data.batches import collate, training_batches
from guided_diffusion.data.datasets import Case
from guided_diffusion.dist_util import autocast, describe, dev, memory_order_note, place_model
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.options.segmentation import RunOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion, parameter_count
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.unet import UNetModel


class Discs(Dataset[Case]):
    """64 random images in memory with a disc each."""

    def __init__(self, size: int, channels: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        inside = ((row - size / 2) ** 2 + (column - size / 2) ** 2 < (size / 4) ** 2).float()[None]
        self.cases = [
            Case(inside + torch.randn(channels, size, size, generator=generator), inside, f"{i}")
            for i in range(64)
        ]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Case:
        return self.cases[index]


def main() -> None:
    arguments = parse()
    logger.configure(quiet=True)
    device, data = dev(), Discs(arguments.image_size)
    ways: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = {
            precision: our_loop(arguments, data, device, precision, Path(folder))
            for precision in arguments.precisions
        }
        net, diffusion = build(arguments)
        ways["the parents' procedure, fp32"] = parents_step(
            net.to(device), diffusion, data, arguments
        )
        for precision, loop in ours.items():
            ways[f"this suite, {precision}"] = our_step(loop)
        for precision, loop in ours.items():
            ways[f"its forward and backward alone, {precision}"] = bare_step(loop, precision)
        for precision in arguments.precisions if arguments.both_orders else ():
            loop = our_loop(arguments, data, device, precision, Path(folder), other_order=True)
            name = f"its forward and backward alone, {precision}, other memory order"
            ways[name] = bare_step(loop, precision)
        seconds = measure(ways, arguments, device)

        print(
            f"{parameter_count(net)}, {arguments.image_size} px, batch {arguments.batch_size}, ",
            end="",
        )
        print(f"torch {torch.__version__}, {describe(device)}; {memory_order_note(device)}\n")
        print("| way | s per step | against the parents' | around forward and backward |")
        print("|---|---|---|---|")
        first = next(iter(seconds.values()))
        for name, values in seconds.items():
            inside = seconds.get(name.replace("this suite", "its forward and backward alone"))
            rest = "" if inside in (None, values) else f"{1 - ratio(inside, values):.1%}"
            median = statistics.median(values)
            print(f"| {name} | {median:.4f} | {ratio(values, first):.2f} | {rest} |")

        precision = arguments.precisions[0]
        loop, stalls = ours[precision], []
        for _ in range(3):
            started = time.perf_counter()
            loop.save()
            stalls.append(time.perf_counter() - started)
            loop.checkpoints.writer.wait()
            total = time.perf_counter() - started
        step = statistics.median(seconds[f"this suite, {precision}"])
        print(
            f"\nA checkpoint takes {total:.2f} s to write and blocks training for "
            f"{statistics.median(stalls):.3f} s, {statistics.median(stalls) / step:.2f} of a step."
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_channels", type=int, default=64)
    parser.add_argument("--num_res_blocks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--use_checkpoint", action="store_true", help="recompute activations")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="fp32 bf16 fp16")
    parser.add_argument(
        "--both_orders", action="store_true", help="time both memory orders of feature maps"
    )
    parser.add_argument("--rounds", type=int, default=8, help="turns of each procedure")
    parser.add_argument("--steps", type=int, default=3, help="steps in one turn")
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> tuple[UNetModel, GaussianDiffusion]:
    """Build the network of the parent project's README at this size, with fixed weights."""
    torch.manual_seed(0)
    return create_model_and_diffusion(
        image_size=arguments.image_size,
        num_channels=arguments.num_channels,
        num_res_blocks=arguments.num_res_blocks,
        num_heads=1,
        learn_sigma=True,
        use_scale_shift_norm=False,
        attention_resolutions="16",
        use_checkpoint=getattr(arguments, "use_checkpoint", False),
    )


def our_loop(
    arguments: argparse.Namespace,
    data: Discs,
    device: torch.device,
    precision: str,
    folder: Path,
    compile: str = "",
    other_order: bool = False,
) -> TrainLoop:
    net, diffusion = build(arguments)
    net = place_model(net, device, compile=compile, training=True)
    if other_order:
        last = net.get_parameter("out.2.weight").is_contiguous(memory_format=torch.channels_last)
        net.to(memory_format=torch.contiguous_format if last else torch.channels_last)
    setup = TrainSetup(
        net=net,
        diffusion=diffusion,
        dataset=data,
        options=TrainingOptions(batch_size=arguments.batch_size, keep=1),
        run=RunOptions(out_dir=str(folder), precision=precision),
    )
    return TrainLoop(setup)


def our_step(loop: TrainLoop) -> Callable[[], None]:
    loop.reader.begin(loop.setup, 0)

    def step() -> None:
        batch, _ = loop.reader.next(loop.step)
        assert batch is not None
        loop.run_step(batch)
        if loop.step % 100 == 0:
            loop.log.means(loop.parameters)

    return step


def bare_step(loop: TrainLoop, precision: str) -> Callable[[], None]:
    """Return a step of network, loss and gradient alone, for a batch on the device."""
    batch = next(training_batches(loop.setup.dataset, loop.options.batch_size, seed=0))
    assert batch.mask is not None
    image, x0 = batch.image.to(loop.device), batch.mask.to(loop.device)
    eps, t = torch.randn_like(x0), torch.arange(len(x0)) * 100 % len(loop.diffusion.schedule)

    def step() -> None:
        with autocast(loop.device, precision):
            terms = loop.diffusion.training_losses(loop.model, x0, t, eps=eps, condition=image)
            terms["loss"].mean().backward()
        for parameter in loop.parameters:
            parameter.grad = None

    return step


def parents_step(
    net: UNetModel, diffusion: GaussianDiffusion, data: Discs, arguments: argparse.Namespace
) -> Callable[[], None]:
    """Return a step by the procedure of the parent projects, with the same network and losses."""
    parameters = list(net.parameters())
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False, fused=False)
    averages = [parameter.detach().clone() for parameter in parameters]
    position = 0

    def step() -> None:
        nonlocal position
        cases = [data[(position + i) % len(data)] for i in range(arguments.batch_size)]
        position += arguments.batch_size
        batch = collate(cases)
        assert batch.mask is not None
        x0, image = batch.mask.to(device), batch.image.to(device)
        t = torch.randint(len(diffusion.schedule), (len(x0),))
        terms = diffusion.training_losses(
            lambda x, t, image, y: net(x, t, net.encode(image), y=y),
            x0,
            t,
            eps=torch.randn_like(x0),
            condition=image,
        )
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.detach_()
                parameter.grad.zero_()
        terms["loss"].mean().backward()
        norm = sum((p.grad**2).sum().item() for p in parameters if p.grad is not None)
        assert norm >= 0
        optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(averages, parameters, strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    return step


def measure(
    ways: dict[str, Callable[[], None]], arguments: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each step; the procedures take turns, and the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, step in ways.items():
            for _ in range(arguments.steps):
                synchronise(device)
                started = time.perf_counter()
                step()
                synchronise(device)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Return the median ratio of two procedures' seconds over the steps."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
