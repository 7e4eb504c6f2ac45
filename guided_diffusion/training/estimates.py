"""Memory estimates and notes on attention, before a network is built."""

from __future__ import annotations

import torch

from guided_diffusion import logger
from guided_diffusion.data.classes import Classes
from guided_diffusion.dist_util import describe, rank, total_gib
from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import numbers
from guided_diffusion.options.segmentation import DiffusionOptions, NetworkOptions, TrainingOptions
from guided_diffusion.script_util import channel_multipliers, create_model, parameter_count

LARGE_GIB = 8.0
"""Training that holds more than this, activations aside, is announced before it is built."""


def check_size(
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    options: TrainingOptions,
    *,
    classes: Classes | None,
    device: torch.device,
) -> None:
    """Report the memory of a large network before it is built; refuse one that cannot fit."""
    with torch.device("meta"):
        net = create_model(network, diffusion, classes)
    averages = len(options.ema_rate.split(","))
    needed = training_gib(sum(parameter.numel() for parameter in net.parameters()), averages)
    memory = (
        f"{parameter_count(net)}: weights, gradients, AdamW's moments and averages take "
        f"{needed:.1f} GiB while a checkpoint is written, before any activation"
    )
    if needed > total_gib(device):
        raise UserError(
            "the network",
            f"{memory}, more than the {total_gib(device):.1f} GiB of {describe(device)}",
            "Use a larger device, or lower --num_channels or --num_res_blocks.",
        )
    if needed > LARGE_GIB and rank() == 0:
        logger.log(memory)
    if spectra_gib(network) > 0.5 and rank() == 0:
        logger.log(
            f"attention between spectra takes {spectra_gib(network):.1f} GiB for each image of a "
            "batch, 16 times less with one more level (--channel_mult)"
        )


def attention_notes(network: NetworkOptions) -> list[str]:
    """Explain which ``--attention_resolutions`` match no level of the network."""
    size = network.image_size
    factors = [2**level for level in range(len(channel_multipliers(network)))]
    unmatched = [
        resolution
        for resolution in numbers("attention_resolutions", network.attention_resolutions)
        if size // resolution not in factors
    ]
    levels = ", ".join(str(size // factor) for factor in factors)
    return [
        f"--attention_resolutions {resolution} adds no attention: at {size} px the levels are of "
        f"{levels}, and {size} // {resolution} = {size // resolution} leads to none of them; the "
        "middle block attends all the same"
        for resolution in unmatched
    ]


def training_gib(parameters: int, averages: int) -> float:
    """The most that training holds for so many parameters, in GiB, before any activation.

    Weights, the two moments of AdamW and each averaged copy, in float32; all of them once more
    while a checkpoint is written; and the gradients, for training goes on meanwhile.
    """
    return 4 * parameters * (2 * (3 + averages) + 1) / 2**30


def spectra_gib(network: NetworkOptions) -> float:
    """What the matrices between spectra of version 2 take for one image, in GiB of float32.

    Each block has two, of as many rows and columns as the deepest map has pixels.
    """
    pixels = (network.image_size >> (len(channel_multipliers(network)) - 1)) ** 2
    return 2 * network.ss_blocks * 4 * pixels**2 / 2**30 if network.version == "2" else 0.0
