"""Compare masks per second with the procedure of the parent projects, on the same network.

    python benchmarks/sampling.py

The parent projects draw one member of one image at a time: batch 1, fp32, contiguous tensors, with
the image as network input at every step. This suite draws members and images in one tensor. Both
run here with the same weights, images and evaluations in one process. They take turns, so that
other load on the machine affects all alike; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from guided_diffusion.data.frames import Frame
from guided_diffusion.dist_util import autocast, describe, dev, place_model
from guided_diffusion.dpm_solver import multistep, solver_levels
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.script_util import create_model_and_diffusion, parameter_count

ENSEMBLE = 5


def main() -> None:
    arguments = parse()
    device = dev()
    torch.manual_seed(0)
    net, diffusion = create_model_and_diffusion(
        image_size=arguments.image_size,
        num_channels=arguments.num_channels,
        num_heads=1,
        use_scale_shift_norm=False,
        attention_resolutions="16",
        learn_sigma=True,
    )
    net = net.to(device).eval()
    placed = place_model(copy.deepcopy(net), device)
    images = torch.randn(arguments.images, 4, arguments.image_size, arguments.image_size)
    levels = tuple(solver_levels(diffusion.schedule, arguments.steps))

    def parents() -> None:
        for image in images:
            for _ in range(ENSEMBLE):
                draw_one(net, diffusion, image[None].to(device), levels)

    def ours(precision: str) -> Callable[[], None]:
        plan = SamplingPlan(
            "dpm_solver++", levels, batch_size=arguments.batch_size, precision=precision
        )
        segmenter = Segmenter(placed, diffusion, frame=Frame(arguments.image_size), plan=plan)
        names = [str(index) for index in range(len(images))]
        return lambda: void(segmenter.draw(images, names))

    ways: dict[str, Callable[[], None]] = {"parents": parents}
    for precision in arguments.precisions:
        ways[precision] = ours(precision)
        ways[f"bare {precision}"] = bare(placed, images.to(device), levels, arguments, precision)
    seconds = measure(ways, arguments.repeats)

    print(f"torch {torch.__version__}, {describe(device)}, {parameter_count(net)}")
    print(
        f"{arguments.image_size} px, {arguments.steps} evaluations, batch {arguments.batch_size}\n"
    )
    print("| procedure | masks per second | times the parents' | total / bare network |")
    print("|---|---|---|---|")
    masks = ENSEMBLE * len(images)
    rate = masks / statistics.median(seconds["parents"])
    print(f"| parents' (batch 1, fp32) | {rate:.3f} | 1.00 | |")
    for precision in arguments.precisions:
        own, least = seconds[precision], seconds[f"bare {precision}"]
        print(
            f"| ours, {precision} | {masks / statistics.median(own):.3f} "
            f"| {ratio(seconds['parents'], own):.2f} | {ratio(own, least):.3f} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image_size", type=int, default=64, help="height and width")
    parser.add_argument("--num_channels", type=int, default=64, help="width of the first level")
    parser.add_argument("--steps", type=int, default=10, help="network evaluations per mask")
    parser.add_argument("--images", type=int, default=2, help="images, 5 members each")
    parser.add_argument("--batch_size", type=int, default=5, help="network inputs at a time")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], help="fp32 bf16 fp16")
    return parser.parse_args()


@torch.inference_mode()
def draw_one(net: torch.nn.Module, diffusion, image: Tensor, levels) -> Tensor:
    """Draw one member of one image by the procedure of the parent projects."""

    def whole_network(x, t, condition, y):
        return net(x, t, net.encode(image), y)

    x = torch.randn(1, 1, *image.shape[-2:], device=image.device)
    return multistep(diffusion.denoiser(whole_network, None), x, levels)


def bare(net, images: Tensor, levels, arguments, precision: str) -> Callable[[], None]:
    """Return the network calls alone that the masks need, at the same batch size."""
    size, rows = arguments.batch_size, ENSEMBLE * len(images)
    x = torch.randn(size, 1, *images.shape[-2:], device=images.device)
    t = torch.full((size,), 500.0, device=images.device)

    @torch.inference_mode()
    def calls() -> None:
        index = torch.arange(size, device=images.device) % len(images)
        with autocast(images.device, precision):
            condition = net.encode(images).rows(index)
            for _ in range(-(-rows // size) * (len(levels) - 1)):
                net(x, t, condition)

    return calls


def measure(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each procedure in each round, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            synchronise()
            started = time.perf_counter()
            run()
            synchronise()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Return the median ratio of two procedures' seconds over the rounds."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def void(_: object) -> None:
    """Discard a result."""


if __name__ == "__main__":
    main()
