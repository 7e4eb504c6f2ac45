"""Print the memory that one image takes in training, for each version and size.

    python benchmarks/memory.py

Without a CUDA device it is simulated, by the shapes of all tensors that are alive at once, and half
precision is fp32 times a constant; on a device it is measured, over two images. Weights, gradients,
the optimiser and averages are left out. The network is that of the flags' defaults.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from guided_diffusion.dist_util import autocast, describe, dev, place_model
from guided_diffusion.script_util import NETWORKS, create_model_and_diffusion
from guided_diffusion.training.cost import image_cost
from guided_diffusion.unet import EncodeAndPredict


def main() -> None:
    arguments, device = parse(), dev()
    cuda = device.type == "cuda"
    way = f"measured on {describe(device)}" if cuda else "simulated"
    print(f"GiB an image in {arguments.precision}, {way}, torch {torch.__version__}\n")
    sizes = " | ".join(f"{size} px" for size in arguments.sizes)
    print(f"| `--version` | `--checkpoint_levels` | {sizes} |")
    print("|---" * (2 + len(arguments.sizes)) + "|")
    for version in arguments.versions:
        for levels in ("none", "fine", "all"):
            cells = []
            for size in arguments.sizes:
                flags = {"version": version, "image_size": size, "checkpoint_levels": levels}
                way_of = measured if cuda else simulated
                cells.append(f"{way_of(flags, arguments.precision, device):.2f}")
            print(f"| {version} | {levels} | {' | '.join(cells)} |", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--versions", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    return parser.parse_args()


def simulated(flags: dict[str, Any], precision: str, device: torch.device) -> float:
    """Count without computing."""
    with torch.device("meta"):
        net, _ = create_model_and_diffusion(**flags)
    return image_cost(net).gib_in(precision)


def measured(flags: dict[str, Any], precision: str, device: torch.device) -> float:
    """Measure the peak of a forward and a backward pass of two images, on a CUDA device."""
    net = place_model(create_model_and_diffusion(**flags)[0], device).train()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    size, channels = flags["image_size"], net.in_channels - net.mask_channels
    x = torch.randn(2, net.mask_channels, size, size, device=device)
    image = torch.randn(2, channels, size, size, device=device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with autocast(device, precision):
        output = EncodeAndPredict(net)(x, torch.zeros(2, device=device), image)
    torch.stack([part.float().sum() for part in output if part is not None]).sum().backward()
    return (torch.cuda.max_memory_allocated(device) - before) / 2 / 2**30


if __name__ == "__main__":
    main()
