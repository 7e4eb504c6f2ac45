"""From flags to networks and diffusions: the factories that every verb and every user shares.

``create_model_and_diffusion`` takes the scripts' flags by name; its parts take the option groups.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from guided_diffusion.bratsloader import find_modalities
from guided_diffusion.checkpoint import Checkpoint
from guided_diffusion.classes import Classes, find_classes
from guided_diffusion.classifier import EncoderUNetModel
from guided_diffusion.datasets import Reading
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.highway import STEP
from guided_diffusion.medsegdiff import AnchoredUNet, HighwayUNet
from guided_diffusion.medsegdiff_v2 import SpectrumUNet
from guided_diffusion.options import (
    DataOptions,
    DiffusionOptions,
    NetworkOptions,
    fill,
    numbers,
    slice_range,
)
from guided_diffusion.readers import listing
from guided_diffusion.resnet import ResNet50
from guided_diffusion.respace import space_timesteps
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.unet import UNetModel
from guided_diffusion.weak_options import ClassifierOptions

Net = TypeVar("Net", bound=torch.nn.Module)

NUM_CLASSES = 2

NETWORKS: dict[str, Callable[..., UNetModel]] = {
    "plain": UNetModel,
    "1": HighwayUNet,
    "new": AnchoredUNet,
    "2": SpectrumUNet,
}
"""The network of each ``--version``."""

_COARSE_LOSS = {"plain": "none", "1": "mse", "new": "mse", "2": "dice_ce"}

_CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, GaussianDiffusion]:
    """Build network and diffusion from the scripts' flags; what is not given has its default.

    ``mask_labels`` says how many mask channels the network has.

    Raises:
        UserError: flags that no network or schedule can have.
        TypeError: a name that is no flag of network or diffusion.
    """
    classes = find_classes(flags.pop("mask_labels", ""))
    network, diffusion = fill(NetworkOptions, flags), fill(DiffusionOptions, flags)
    unknown = flags.keys() - vars(network).keys() - vars(diffusion).keys()
    if unknown:
        raise TypeError(f"no such network or diffusion flag: {', '.join(sorted(unknown))}")
    process = create_gaussian_diffusion(diffusion, network.version)
    return create_model(network, diffusion, classes), process


def create_model(
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    classes: Classes | None = None,
    *,
    of_images: bool = False,
) -> UNetModel:
    """Build the network, with a mask channel for each class.

    One ``of_images`` has no condition: all its input channels are what is diffused.
    """
    if of_images and network.version != "plain":
        raise UserError(
            "--version",
            found=network.version,
            expected="plain, for the others are made to segment an image given as condition",
            mend="Leave --version away.",
        )
    mask_channels = network.in_ch if of_images else count_masks(classes)
    channel_mult, attention_ds = _channel_mult(network), _attention_ds(network)
    for level, factor in enumerate(channel_mult):
        if 2**level in attention_ds or level == len(channel_mult) - 1:
            _refuse_uneven_heads(network, int(factor * network.num_channels))
    return NETWORKS[network.version](
        image_size=network.image_size,
        in_channels=network.in_ch,
        model_channels=network.num_channels,
        out_channels=mask_channels * (2 if diffusion.learn_sigma else 1),
        mask_channels=mask_channels,
        num_res_blocks=network.num_res_blocks,
        attention_resolutions=attention_ds,
        dropout=network.dropout,
        channel_mult=channel_mult,
        num_classes=NUM_CLASSES if network.class_cond else None,
        use_checkpoint=network.use_checkpoint,
        num_heads=network.num_heads,
        num_head_channels=network.num_head_channels,
        num_heads_upsample=network.num_heads_upsample,
        use_scale_shift_norm=network.use_scale_shift_norm,
        resblock_updown=network.resblock_updown,
        use_new_attention_order=network.use_new_attention_order,
        **({"ss_blocks": network.ss_blocks} if network.version == "2" else {}),
    )


def attention_notes(network: NetworkOptions) -> list[str]:
    """Say which of ``--attention_resolutions`` are no level's, what they do, and what would."""
    size = network.image_size
    factors = [2**level for level in range(len(_channel_mult(network)))]
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
    pixels = (network.image_size >> (len(_channel_mult(network)) - 1)) ** 2
    return 2 * network.ss_blocks * 4 * pixels**2 / 2**30 if network.version == "2" else 0.0


def create_classifier(**flags: Any) -> EncoderUNetModel | ResNet50:
    """Build the classifier of noisy images from its scripts' flags.

    Raises:
        UserError: flags that no classifier can have.
        TypeError: a name that is no flag of the classifier.
    """
    options = ClassifierOptions(**flags)
    if options.model_type == "resnet50":
        return ResNet50(
            options.in_channel, options.num_classes, told_time=options.classifier_told_time
        )
    if options.classifier_width % 32 or options.classifier_width < 32:
        raise UserError(
            "--classifier_width",
            found=options.classifier_width,
            expected="a multiple of 32 (32 groups are normalised)",
            mend="Use 32, 64, 96 or 128.",
        )
    network = NetworkOptions(
        image_size=options.image_size,
        num_channels=options.classifier_width,
        attention_resolutions=options.classifier_attention_resolutions,
    )
    channel_mult = _channel_mult(network)
    return EncoderUNetModel(
        image_size=options.image_size,
        in_channels=options.in_channel,
        model_channels=options.classifier_width,
        out_channels=options.num_classes,
        num_res_blocks=options.classifier_depth,
        attention_resolutions=_attention_ds(network),
        channel_mult=channel_mult,
        pool=options.classifier_pool,
        num_head_channels=math.gcd(64, *(int(m * options.classifier_width) for m in channel_mult)),
        use_scale_shift_norm=options.classifier_use_scale_shift_norm,
        resblock_updown=options.classifier_resblock_updown,
    )


def count_masks(classes: Classes | None) -> int:
    """How many mask channels a network has: one where everything is one class."""
    return 1 if classes is None else len(classes)


def create_gaussian_diffusion(
    options: DiffusionOptions, version: str = "plain"
) -> GaussianDiffusion:
    """Build the diffusion; respacing chooses the times that are trained.

    What ``auto`` means for the loss of the coarse mask depends on the version of the network.
    """
    _refuse_opposites(options)
    schedule = NoiseSchedule.named(options.noise_schedule, options.diffusion_steps)
    kept = space_timesteps(options.diffusion_steps, options.timestep_respacing)
    if len(kept) < 2 and (options.learn_sigma or options.use_kl):
        raise UserError(
            "--timestep_respacing",
            found=f"{len(kept)} trained time",
            expected="at least 2, for the variational bound compares neighbours",
            mend="Train on more times, or without --learn_sigma and --use_kl.",
        )
    return GaussianDiffusion(
        schedule=schedule,
        timesteps=tuple(sorted(kept)),
        predict_xstart=options.predict_xstart,
        learn_sigma=options.learn_sigma,
        use_kl=options.use_kl,
        rescale_learned_sigmas=options.rescale_learned_sigmas,
        rescale_timesteps=options.rescale_timesteps,
        mask_range=_mask_range(options.mask_range),
        predict_v=options.predict_v,
        min_snr_gamma=options.min_snr_gamma,
        coarse_loss=_coarse_loss(options.coarse_loss, version),
    )


def _coarse_loss(wanted: str, version: str) -> str:
    """What ``--coarse_loss`` means for a version of the network."""
    if wanted not in ("auto", "none") and version == "plain":
        raise UserError(
            "--coarse_loss",
            found=wanted,
            expected="auto or none, for the plain network has no coarse mask",
            mend="Leave --coarse_loss away, or choose another --version.",
        )
    return _COARSE_LOSS[version] if wanted == "auto" else wanted


def _refuse_opposites(options: DiffusionOptions) -> None:
    """Raise a UserError for two flags of which only one can hold."""
    for one, other, mend in (
        ("predict_v", "predict_xstart", "Predict either v or the clean mask."),
        ("min_snr_gamma", "use_kl", "The bound has its own weights: leave one of the two away."),
    ):
        if getattr(options, one) and getattr(options, other):
            raise UserError(
                f"--{one}",
                found=f"{getattr(options, one)} with --{other} {getattr(options, other)}",
                expected="only one of the two",
                mend=mend,
            )


def create_reading(data: DataOptions) -> Reading:
    """What the flags say about reading a data set."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {"auto": home / "guided_diffusion", "none": None}
    return Reading(
        modalities=find_modalities(data.modalities),
        slices=slice_range(data.slices),
        blank_slices=data.blank_slices,
        normalise=data.normalise,
        cache_dir=places.get(data.cache_dir, Path(data.cache_dir).expanduser()),
        classes=find_classes(data.mask_labels),
    )


def _channel_mult(network: NetworkOptions) -> list[float]:
    """The width of each level; sizes between the parents' take the next larger one's."""
    given = numbers("channel_mult", network.channel_mult, float)
    table = next((m for size, m in _CHANNEL_MULT.items() if network.image_size <= size), None)
    mult = given or list(table or _CHANNEL_MULT[256])
    halvings = _halvings(network, len(mult))
    if network.image_size < 1 or network.image_size % 2**halvings:
        step = 2**halvings
        nearest = max(step, round(network.image_size / step) * step)
        fewer = ", or fewer levels with --channel_mult" if halvings < len(mult) else ""
        raise UserError(
            "--image_size",
            found=network.image_size,
            expected=f"a multiple of {step}, for the network halves it {halvings} times",
            mend=f"Use --image_size {nearest}{fewer}.",
        )
    for width in (network.num_channels * factor for factor in mult):
        if width % 32 or width < 32:
            raise UserError(
                "--num_channels",
                found=f"{network.num_channels}, which makes a level {width:g} channels wide",
                expected="every level's width to be a multiple of 32 (32 groups are normalised)",
                mend="Use --num_channels 32, 64, 96 or 128.",
            )
    return mult


def _halvings(network: NetworkOptions, levels: int) -> int:
    """How often a network halves its input: its own levels, or those of its highway."""
    highway = STEP.bit_length() - 1 if network.version in ("1", "new") else 0
    return max(levels - 1, highway)


def refuse_uneven_crop(network: NetworkOptions, size: tuple[int, int]) -> None:
    """Raise a UserError where a cropped size (H, W) is none that the network can halve."""
    step = 2 ** _halvings(network, len(_channel_mult(network)))
    if any(side < step or side % step for side in size):
        raise UserError(
            "--crop",
            found=f"images of {size[0]} x {size[1]} once they are cropped",
            expected=f"multiples of {step}, for the network halves them",
            mend="Use --crop none, which resizes them to --image_size.",
        )


def _attention_ds(network: NetworkOptions) -> set[int]:
    """Downsampling factors with attention: image_size // resolution, as published weights have."""
    resolutions = numbers("attention_resolutions", network.attention_resolutions)
    if any(resolution < 1 for resolution in resolutions):
        raise UserError(
            "--attention_resolutions",
            found=network.attention_resolutions,
            expected="sizes of feature maps, 1 or more",
            mend="Write for example --attention_resolutions 16,8.",
        )
    return {network.image_size // resolution for resolution in resolutions}


def _refuse_uneven_heads(network: NetworkOptions, width: int) -> None:
    """Raise a UserError where the channels of a level with attention are no whole heads."""
    by_size = network.num_head_channels != -1
    names = ["num_head_channels"] if by_size else ["num_heads", "num_heads_upsample"]
    for name in names:
        value = getattr(network, name)
        if value != -1 and (value < 1 or width % value):
            raise UserError(
                f"--{name}",
                found=value,
                expected=f"a divisor of {width}, the channels of a level with attention",
                mend=f"Leave --{name} away, or use a power of 2 up to 32.",
            )


def _mask_range(text: str) -> tuple[float, float]:
    values = numbers("mask_range", text, float)
    if len(values) != 2 or not -math.inf < values[0] < values[1] < math.inf:
        raise UserError(
            "--mask_range", found=text, expected="two rising numbers", mend="Use 0,1 or -1,1."
        )
    return values[0], values[1]


def adopted(
    checkpoint: Checkpoint, net: UNetModel, *, training: bool = False
) -> tuple[Checkpoint, list[str]]:
    """Complete bare published weights for a network, and name the tensors that they lack.

    For training these start as in a new network: a gate that is closed exactly leaves maps without
    variance behind it, and the gradient of a normalisation explodes there.
    """
    if checkpoint.options:
        return checkpoint, []
    lacking = [name for name in net.adopt(checkpoint.model) if name not in checkpoint.model]
    fresh = {name: net.state_dict()[name].clone() for name in lacking} if training else {}
    model = net.adopt(checkpoint.model) | fresh
    ema = {rate: net.adopt(weights) | fresh for rate, weights in checkpoint.ema.items()}
    return replace(checkpoint, model=model, ema=ema), lacking


def lacking_note(lacking: Sequence[str], *, training: bool = False) -> str:
    """Say what published weights lacked."""
    start = "they start as in a new network" if training else "set to the expectation of that"
    return (
        f"the weights lack {listing(lacking, most=2)}, which their network drew at random in every "
        f"call: {start}"
    )


def place(net: Net, device: torch.device, *, compile: str = "") -> Net:
    """Move a network to its device, in the memory order that convolutions are fastest in.

    ``compile`` is a mode of ``torch.compile``; the network is compiled when it is first called.
    """
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        net.compile(mode=compile)
    return net


@contextmanager
def compiling(active: object = True) -> Iterator[None]:
    """Run what makes ``torch.compile`` compile; memory that runs out is another matter.

    Raises:
        UserError: the compiler does not work here.
    """
    try:
        yield
    except RuntimeError as error:
        if not active or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(
            "--compile",
            found=(str(error).splitlines() or [repr(error)])[0],
            expected="a compiler that works: for C++ on a CPU, Triton on a CUDA device",
            mend="Leave --compile away.",
        ) from error


def million(net: torch.nn.Module) -> str:
    """Say how large a network is."""
    return (
        f"{sum(parameter.numel() for parameter in net.parameters()) / 1e6:.1f} million parameters"
    )
