"""Compare masks per second with the procedure of the parent projects, on the same network.

    python benchmarks/sampling.py

The parent projects draw one member of one image at a time: batch 1, fp32, contiguous tensors, with
the image as network input at every step. This suite draws members and images in one tensor. Both
run here with the same weights, images and evaluations in one process. They take turns, so that
other load on the machine affects all alike; ratios are medians over the rounds.

    python benchmarks/sampling.py --network_ms 195

shows how reading and writing keep up with a device: a stand-in for the network waits so many
milliseconds a case, without using the processor, and pictures are read and written as in sampling.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.frames import Frame
from guided_diffusion.dist_util import autocast, describe, dev, place_model
from guided_diffusion.dpm_solver import multistep, solver_levels
from guided_diffusion.ensemble import UNCERTAINTIES
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.layouts import open_data
from guided_diffusion.options.segmentation import SampleDataOptions
from guided_diffusion.script_util import create_model_and_diffusion, parameter_count

ENSEMBLE = 5


def main() -> None:
    arguments = parse()
    if arguments.network_ms:
        compare_writers(arguments)
        return
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
    parser.add_argument(
        "--network_ms", type=float, default=0, help="time writing, beside a network of this cost"
    )
    parser.add_argument("--case_size", type=int, default=1024, help="with --network_ms: pixels")
    parser.add_argument("--cases", type=int, default=20, help="with --network_ms: pictures")
    parser.add_argument("--writers", type=int, nargs="+", default=[1, 2, 4], help="threads")
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


class StandIn:
    """Takes a fixed time for a case, as a device would, and returns smooth masks of its size."""

    classes, others, frame, evaluations = None, (), Frame(256), 0

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seconds = arguments.network_ms / 1000
        self.plan = SamplingPlan("ddim", (), num_ensemble=ENSEMBLE, batch_size=ENSEMBLE)
        generator = torch.Generator().manual_seed(0)
        axis = torch.linspace(-1, 1, 256)
        distance = (axis[:, None] ** 2 + axis**2).sqrt() - 0.5
        wobble = torch.randn(ENSEMBLE, 1, 32, 32, generator=generator)
        wobble = torch.nn.functional.interpolate(wobble, (256, 256), mode="bilinear")
        masks = torch.sigmoid(-60 * (distance + 0.05 * wobble))
        size = (arguments.case_size, arguments.case_size)
        self.members = torch.nn.functional.interpolate(masks, size, mode="bilinear")[:, 0]

    def segment(self, cases: Sequence[Case], _: object = None) -> list[Segmentation]:
        """Return the same masks for every case, when the time of the network is over."""
        started = time.perf_counter()
        fused, spread = self.members.mean(0), UNCERTAINTIES["std"].rule(self.members)
        results = [Segmentation(self.members, fused, spread) for _ in cases]
        time.sleep(max(0.0, self.seconds * len(cases) - time.perf_counter() + started))
        return results


def skin_pictures(folder: Path, arguments: argparse.Namespace) -> SegmentationDataset:
    """Write noisy pictures of a disc as JPEG, and open them."""
    generator = np.random.default_rng(0)
    axis = np.linspace(-1, 1, arguments.case_size)
    disc = (axis[:, None] ** 2 + axis**2 < 0.25)[..., None]
    for index in range(arguments.cases):
        noise = generator.normal(0, 8, (arguments.case_size, arguments.case_size, 3))
        pixels = np.clip(180 - 80 * disc + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"case{index:03d}.jpg", quality=90)
    return open_data(SampleDataOptions(data_dir=str(folder)), part="testing", test=True)


def compare_writers(arguments: argparse.Namespace) -> None:
    """Print cases per second with several numbers of writers, with and without member files."""
    logger.configure(quiet=True)
    stand_in = StandIn(arguments)
    ways = [(writers, True) for writers in arguments.writers]
    ways.append((arguments.writers[-1], False))
    seconds: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        (pictures := Path(name, "pictures")).mkdir()
        dataset = skin_pictures(pictures, arguments)
        for turn in range(arguments.repeats):
            for writers, members in ways:
                out = Path(name, f"{turn} {writers} {members}")
                started = time.perf_counter()
                segment(
                    *(stand_in, dataset, out),
                    fingerprint="benchmark",
                    writers=writers,
                    save_members=members,
                )
                seconds[writers, members].append(time.perf_counter() - started)
    bare = 1000 / arguments.network_ms
    print(
        f"{arguments.cases} pictures of {arguments.case_size} px, {ENSEMBLE} members, a network of "
        f"{arguments.network_ms:g} ms a case ({bare:.2f} cases per second by itself)\n"
    )
    print("| writers | members | cases per second | share of the network's rate |")
    print("|---|---|---|---|")
    for (writers, members), values in seconds.items():
        rate = arguments.cases / statistics.median(values)
        kept = "written" if members else "left out"
        print(f"| {writers} | {kept} | {rate:.2f} | {rate / bare:.0%} |")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def void(_: object) -> None:
    """Discard a result."""


if __name__ == "__main__":
    main()
