"""Memory estimates and notes on attention, before a network is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from traceback import clear_frames

import torch

from guided_diffusion import logger
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import counted
from guided_diffusion.dist_util import describe, rank, total_gib, world_size
from guided_diffusion.errors import UserError, memory_problem
from guided_diffusion.options.flags import numbers
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.script_util import channel_multipliers, create_model, parameter_count
from guided_diffusion.training.cost import image_cost
from guided_diffusion.training.sharded import gathered_parameters
from guided_diffusion.unet import UNetModel

LARGE_GIB = 8.0
"""Training that holds more than this, activations aside, is announced before it is built."""


def check_size(
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    options: TrainingOptions,
    *,
    classes: Classes | None,
    device: torch.device,
) -> bool:
    """Report the memory of a large network before it is built; return whether to divide it.

    Raises:
        UserError: the network, or a step of this batch, cannot fit into the device's memory.
    """
    with torch.device("meta"):
        net = create_model(network, diffusion, classes)
    averages = len(options.ema_rate.split(","))
    needed = training_gib(sum(parameter.numel() for parameter in net.parameters()), averages)
    each = sharded_gib(net, averages, world_size())
    sharded = divides(options.fsdp, needed, each, total_gib(device), world_size())
    memory = (
        f"{parameter_count(net)}: weights, gradients, AdamW's moments and averages take "
        f"{needed:.1f} GiB while a checkpoint is written, before any activation"
    )
    if sharded:
        memory += f"; divided among {world_size()} processes, {each:.1f} GiB in each"
        needed = each
    if needed > total_gib(device):
        enough = fewest_processes(net, averages, total_gib(device))
        raise UserError(
            "the network",
            f"{memory}, more than the {total_gib(device):.1f} GiB of {describe(device)}",
            f"{_share_hint(enough, options.fsdp)}, or lower --num_channels or --num_res_blocks.",
        )
    refuse_large_batch(net, options, held=needed, device=device)
    if (sharded or needed > LARGE_GIB) and rank() == 0:
        logger.log(memory)
    if spectra_gib(network) > 0.5 and rank() == 0:
        logger.log(
            f"attention between spectra takes {spectra_gib(network):.1f} GiB for each image of a "
            "batch, 16 times less with one more level (--channel_mult)"
        )
    return sharded


def divides(fsdp: str, copy: float, share: float, device: float, processes: int) -> bool:
    """Decide whether a network is divided among processes, or copied to each.

    Args:
        fsdp: ``on``, ``off``, or ``auto``, by what fits.
        copy: GiB that training holds for a copy.
        share: GiB that it holds in each process if the network is divided.
        device: GiB of the memory of each.
        processes: that work together.
    """
    if processes == 1 or fsdp == "off":
        return False
    return fsdp == "on" or share <= device < copy


def sharded_gib(net: torch.nn.Module, averages: int, processes: int) -> float:
    """The most that a process holds of a divided network in training, in GiB of float32.

    Its share of what :func:`training_gib` counts; and, whole, the parameters that are gathered at a
    time, and their gradients.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return training_gib(parameters, averages) / processes + 8 * gathered_parameters(net) / 2**30


def fewest_processes(net: torch.nn.Module, averages: int, device: float) -> int:
    """The number of processes on devices of so many GiB that can train a network; 0 if none can."""
    counts = (2**power for power in range(1, 15))
    return next((n for n in counts if sharded_gib(net, averages, n) <= device), 0)


def _share_hint(enough: int, fsdp: str) -> str:
    if not enough:
        return "Use a larger device"
    return f"Use a larger device, or {enough} such devices" + " without --fsdp off" * (
        fsdp == "off"
    )


def refuse_large_batch(
    net: UNetModel, options: TrainingOptions, *, held: float, device: torch.device
) -> None:
    """Refuse a batch or an image size with which no step can be taken.

    Less than estimated may do, with half precision or a compiler: half of it counts.

    Args:
        net: on the meta device.
        options: with the batch.
        held: GiB of weights, moments and averages.
        device: to train on.

    Raises:
        UserError: what is needed is more than the device has.
    """
    batch, size = options.batch_size, net.image_size
    micro = min(batch, options.microbatch) if options.microbatch > 0 else batch
    read = 8 * net.in_channels * size**2 / 2**30  # an image in float32, read and moved
    free = total_gib(device) - held
    usual_most = 1600 * net.model_channels * size**2 / 2**30
    if micro * usual_most + batch * read < free:
        return
    image = image_cost(net).gib
    if micro * image / 2 + batch * read <= free:
        return
    has = f"{describe(device)} has {total_gib(device):.1f} GiB"
    fitting = int(free / (image + read))
    if fitting < 1:
        largest = int(size * (free / (image + read)) ** 0.5)
        raise UserError(
            f"--image_size {size}",
            f"one image takes about {gib_text(image + read)} while its gradient is computed; {has}",
            f"About {largest} pixels fit: lower --image_size or --num_channels.",
        )
    same = f", or --microbatch {fitting} for the same gradient" if batch * read < free / 2 else ""
    raise UserError(
        f"--batch_size {batch}",
        f"a step takes about {gib_text(micro * image + batch * read)}, {gib_text(image + read)} "
        f"for each image; {has}",
        f"About {counted(fitting, 'image')} would fit: use --batch_size {fitting}{same}.",
    )


@contextmanager
def memory_guarded(
    options: TrainingOptions,
    step: int,
    device: torch.device,
    free: Callable[[], object],
    *,
    fitting: int = 0,
    graphs: bool = False,
) -> Iterator[None]:
    """Report that memory ran out inside this context, after calling ``free``.

    Args:
        options: of the loop.
        step: steps that were taken before.
        device: that trains.
        free: called first.
        fitting: images that are expected to fit at a time; 0 where that is not known.
        graphs: ``--microbatch`` is refused, as CUDA graphs are used.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError, OSError) as error:
        problem = memory_problem(error)
        if not problem:
            raise
        clear_frames(error.__traceback__)  # frees the memory of what was interrupted
    with suppress(RuntimeError, MemoryError):
        free()
    raise step_too_large(problem, options, step=step, device=device, fitting=fitting, graphs=graphs)


def step_too_large(
    problem: str,
    options: TrainingOptions,
    *,
    step: int,
    device: torch.device,
    fitting: int = 0,
    graphs: bool = False,
) -> UserError:
    """Make the error for a training step in which memory ran out: see :func:`memory_guarded`."""
    batch = options.batch_size
    size = min(batch, options.microbatch) if options.microbatch > 0 else batch
    return UserError(
        f"--batch_size {batch}",
        f"{problem} in step {step + 1}, {counted(size, 'image')} at a time; {describe(device)} has "
        f"{total_gib(device):.1f} GiB",
        _smaller_step(size, fitting if 0 < fitting < size else size // 2, graphs),
    )


def _smaller_step(size: int, fitting: int, graphs: bool) -> str:
    """Say what would need less memory than ``size`` images at a time."""
    thrifty = "--checkpoint_levels all"
    if size == 1:
        return f"Use {thrifty}, --precision auto, or a smaller --image_size or --num_channels."
    if graphs:
        return f"Use --batch_size {fitting}, or {thrifty}."
    return (
        f"Use --microbatch {fitting} for the same gradient, {thrifty}, or a smaller --batch_size."
    )


def gib_text(gib: float) -> str:
    """Write a number of GiB for people, small ones in MiB."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{1024 * gib:.1f} MiB"


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
