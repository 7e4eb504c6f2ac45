"""Factories that build networks and diffusions from flags, and checks of what those allow.

:func:`create_model_and_diffusion` takes the scripts' flags by name; the others take option groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.frames import Frame, auto_frame
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.networks.classifier import EncoderUNetModel
from guided_diffusion.networks.highway import SIZE_MULTIPLE
from guided_diffusion.networks.medsegdiff import AnchoredUNet, HighwayUNet
from guided_diffusion.networks.medsegdiff_v2 import SpectrumUNet
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.options.flags import Flags, numbers
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.objective import objective, resolve_objective
from guided_diffusion.options.weak import ClassifierOptions
from guided_diffusion.respace import space_timesteps
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.unet import DirectUNet, UNetModel

NUM_CLASSES = 2
NETWORKS: dict[str, Callable[..., UNetModel]] = {
    "plain": UNetModel,
    "unet": DirectUNet,
    "1": HighwayUNet,
    "new": AnchoredUNet,
    "2": SpectrumUNet,
}
"""The network class of each ``--version``."""
CHECKPOINT_LEVELS = {"none": 0, "fine": 2, "all": 1000}
"""The number of levels that ``--checkpoint_levels`` means, the finest first."""
_COARSE_LOSS = {"plain": "none", "unet": "none", "1": "mse", "new": "mse", "2": "dice_ce"}
_CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, GaussianDiffusion]:
    """Build network and diffusion from the scripts' flags; omitted flags have their defaults.

    ``mask_labels`` sets the number of the network's mask channels.

    Raises:
        UserError: no network or schedule can have these flags.
        TypeError: a name is not a flag of network or diffusion.
    """
    classes = find_classes(flags.pop("mask_labels", ""))
    given = Flags(given=flags)
    network = given.group(NetworkOptions)
    diffusion = resolve_objective(given, network.version)
    unknown = flags.keys() - vars(network).keys() - vars(diffusion).keys()
    if unknown:
        raise TypeError(f"no such network or diffusion flag: {', '.join(sorted(unknown))}")
    process = create_gaussian_diffusion(diffusion, network.version, classes)
    return create_model(network, diffusion, classes), process


def create_model(
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    classes: Classes | None = None,
    *,
    of_images: bool = False,
) -> UNetModel:
    """Build the network, with a mask channel for each class.

    A network ``of_images`` has no condition: all its input channels are diffused.

    Raises:
        UserError: no network can have these options.
    """
    if of_images and network.version != "plain":
        raise UserError(
            f"--version {network.version}",
            "only the plain network denoises images; the others segment an image as condition",
            "Omit --version.",
        )
    if network.version == "unet" and network.class_cond:
        raise UserError("--class_cond True", "cannot be combined with --version unet", "Omit it.")
    levels = _checkpoint_levels(network)
    mask_channels = network.in_ch if of_images else count_masks(classes)
    multipliers, attention_ds = channel_multipliers(network), _attention_ds(network)
    for level, factor in enumerate(multipliers):
        if 2**level in attention_ds or level == len(multipliers) - 1:
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
        channel_mult=multipliers,
        num_classes=NUM_CLASSES if network.class_cond else None,
        use_checkpoint=levels > 0,
        checkpoint_levels=levels,
        num_heads=network.num_heads,
        num_head_channels=network.num_head_channels,
        num_heads_upsample=network.num_heads_upsample,
        use_scale_shift_norm=network.use_scale_shift_norm,
        resblock_updown=network.resblock_updown,
        use_new_attention_order=network.use_new_attention_order,
        **({"ss_blocks": network.ss_blocks} if network.version == "2" else {}),
    )


def _checkpoint_levels(network: NetworkOptions) -> int:
    """Return how many levels recompute their activations; ``--use_checkpoint`` means all."""
    named = network.checkpoint_levels
    if network.use_checkpoint and named not in ("", "all"):
        raise UserError(
            f"--checkpoint_levels {named}",
            "contradicts --use_checkpoint True, which means --checkpoint_levels all",
            "Omit --use_checkpoint.",
        )
    return CHECKPOINT_LEVELS[named or ("all" if network.use_checkpoint else "none")]


def create_classifier(**flags: Any) -> EncoderUNetModel | ResNet50:
    """Build the classifier of noisy images from its scripts' flags.

    Raises:
        UserError: no classifier can have these flags.
        TypeError: a name is not a flag of the classifier.
    """
    options = ClassifierOptions(**flags)
    if options.model_type == "resnet50":
        embed_time = options.classifier_told_time
        return ResNet50(options.in_channel, options.num_classes, embed_time=embed_time)
    if options.classifier_width % 32 or options.classifier_width < 32:
        raise UserError(
            f"--classifier_width {options.classifier_width}",
            "must be a multiple of 32, the number of normalisation groups",
            "Use 32, 64, 96 or 128.",
        )
    network = NetworkOptions(
        image_size=options.image_size,
        num_channels=options.classifier_width,
        attention_resolutions=options.classifier_attention_resolutions,
    )
    multipliers = channel_multipliers(network)
    return EncoderUNetModel(
        image_size=options.image_size,
        in_channels=options.in_channel,
        model_channels=options.classifier_width,
        out_channels=options.num_classes,
        num_res_blocks=options.classifier_depth,
        attention_resolutions=_attention_ds(network),
        channel_mult=multipliers,
        pool=options.classifier_pool,
        num_head_channels=math.gcd(64, *(int(m * options.classifier_width) for m in multipliers)),
        use_scale_shift_norm=options.classifier_use_scale_shift_norm,
        resblock_updown=options.classifier_resblock_updown,
    )


def count_masks(classes: Classes | None) -> int:
    """Return the number of a network's mask channels: one per class, or one without classes."""
    return 1 if classes is None else len(classes)


def create_gaussian_diffusion(
    options: DiffusionOptions, version: str = "plain", classes: Classes | None = None
) -> GaussianDiffusion:
    """Build the diffusion; respacing chooses the timesteps that are trained.

    The ``version`` of the network sets what ``auto`` means in its losses.

    Raises:
        UserError: no diffusion can have these options.
    """
    options = objective(options, version)
    schedule = NoiseSchedule.named(options.noise_schedule, options.diffusion_steps)
    if options.input_scale != 1:
        schedule = schedule.scaled(options.input_scale)
    kept = space_timesteps(options.diffusion_steps, options.timestep_respacing)
    if len(kept) < 2 and (options.learn_sigma or options.use_kl):
        raise UserError(
            "--timestep_respacing",
            "leaves 1 trained timestep, but the variational bound compares neighbours and needs 2",
            "Train on more timesteps, or omit --learn_sigma and --use_kl.",
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
        mask_loss=options.mask_loss,
        mask_dropout=options.mask_dropout,
        noise_share=options.noise_share,
        exclusive=classes is not None and classes.exclusive,
    )


def _coarse_loss(wanted: str, version: str) -> str:
    """Resolve ``--coarse_loss`` for a version of the network."""
    if wanted not in ("auto", "none") and _COARSE_LOSS[version] == "none":
        raise UserError(
            f"--coarse_loss {wanted}",
            f"the {version} network has no coarse mask, so only auto and none are possible",
            "Omit --coarse_loss, or choose another --version.",
        )
    return _COARSE_LOSS[version] if wanted == "auto" else wanted


def channel_multipliers(network: NetworkOptions) -> list[float]:
    """Return the width of each level relative to the first.

    By default that of guided-diffusion for ``--image_size``, or for the next larger size it has.

    Raises:
        UserError: the image size cannot be halved so often, or a width is not a multiple of 32.
    """
    given = numbers("channel_mult", network.channel_mult, float)
    table = next((m for size, m in _CHANNEL_MULT.items() if network.image_size <= size), None)
    mult = given or list(table or _CHANNEL_MULT[256])
    halvings = _halvings(network, len(mult))
    if network.image_size < 1 or network.image_size % 2**halvings:
        step = 2**halvings
        nearest = max(step, round(network.image_size / step) * step)
        fewer = ", or fewer levels with --channel_mult" if halvings < len(mult) else ""
        times = f"{halvings} time{'s' * (halvings != 1)}"
        raise UserError(
            f"--image_size {network.image_size}",
            f"must be a multiple of {step}, as the network halves it {times}",
            f"Use --image_size {nearest}{fewer}.",
        )
    for width in (network.num_channels * factor for factor in mult):
        if width % 32 or not 32 <= width <= 65536:
            raise UserError(
                f"--num_channels {network.num_channels}",
                f"makes a level {width:g} channels wide, but the width of every level must be a "
                "multiple of 32, the number of normalisation groups, up to 65536",
                "Use --num_channels 32, 64, 96 or 128.",
            )
    return mult


def _halvings(network: NetworkOptions, levels: int) -> int:
    """Return how often a network halves its input: by its levels, or those of its highway."""
    highway = SIZE_MULTIPLE.bit_length() - 1 if network.version in ("1", "new") else 0
    return max(levels - 1, highway)


def refuse_uneven_crop(network: NetworkOptions, size: tuple[int, int]) -> None:
    """Raise a UserError if the network cannot halve a cropped size (H, W) often enough."""
    step = 2 ** _halvings(network, len(channel_multipliers(network)))
    if any(side < step or side % step for side in size):
        raise UserError(
            "--crop",
            f"the cropped images are {size[0]} x {size[1]}, but the network, which halves them, "
            f"needs multiples of {step}",
            "Use --crop none, which resizes them to --image_size.",
        )


def _attention_ds(network: NetworkOptions) -> set[int]:
    """Return the downsampling factors with attention: image_size // resolution, as published."""
    resolutions = numbers("attention_resolutions", network.attention_resolutions)
    if any(resolution < 1 for resolution in resolutions):
        raise UserError(
            f"--attention_resolutions {network.attention_resolutions}",
            "must be sizes of feature maps, 1 or more",
            "Write for example --attention_resolutions 16,8.",
        )
    return {network.image_size // resolution for resolution in resolutions}


def _refuse_uneven_heads(network: NetworkOptions, width: int) -> None:
    """Raise a UserError if the heads do not divide the channels of a level with attention."""
    by_size = network.num_head_channels != -1
    names = ["num_head_channels"] if by_size else ["num_heads", "num_heads_upsample"]
    for name in names:
        value = getattr(network, name)
        if value != -1 and (value < 1 or width % value):
            raise UserError(
                f"--{name} {value}",
                f"must divide {width}, the number of channels of a level with attention",
                f"Omit --{name}, or use a power of 2 up to 32.",
            )


def _mask_range(text: str) -> tuple[float, float]:
    values = numbers("mask_range", text, float)
    if len(values) != 2 or not -math.inf < values[0] < values[1] < math.inf:
        raise UserError(
            f"--mask_range {text}", "must be two increasing numbers", "Use 0,1 or -1,1."
        )
    return values[0], values[1]


def parameter_count(net: torch.nn.Module) -> str:
    """Return the number of a network's parameters as text."""
    count = sum(parameter.numel() for parameter in net.parameters())
    return f"{count / 1e6:.1f} million parameters"


def network_for(dataset: SegmentationDataset, flags: Flags, path: Path | None) -> NetworkOptions:
    """Choose the network for a data set's channels and classes.

    Grey pictures are read in colour, or the reverse, where the flags' network needs that. ``path``
    is the checkpoint whose network has to fit, if there is one.

    Raises:
        UserError: the channels do not fit, or ``--class_cond`` is asked for.
    """
    masks = count_masks(dataset.classes)
    dataset.convert_to(flags.get("in_ch", 0) - masks)
    expected = dataset.channels + masks
    if (in_ch := flags.get("in_ch", expected)) != expected:
        needs = f"{expected}: {dataset.channels} of the images and {masks} of the noisy mask"
        raise UserError(
            path or f"--in_ch {in_ch}",
            f"a network of {in_ch} input channels does not fit {dataset.directory}, which needs "
            f"{needs}",
            "Use data with the channels of training." if path else "Omit --in_ch.",
        )
    if flags.get("class_cond"):
        raise UserError(
            "--class_cond True", "segmentation has no class labels to condition on", "Omit it."
        )
    return flags.with_resolved(in_ch=expected).group(NetworkOptions)


def frame_for(
    dataset: SegmentationDataset, network: NetworkOptions, crop: str, *, case: Case
) -> tuple[Frame, str]:
    """Choose how cases of the size of ``case`` reach the network's, and what a checkpoint records.

    Raises:
        UserError: the size does not suit the network.
    """
    height, width = case.image.shape[-2:]
    frame = auto_frame(
        dataset.layout,
        (height, width),
        version=network.version,
        image_size=network.image_size,
        crop=crop,
    )
    if frame.crop:
        refuse_uneven_crop(network, (height - 2 * frame.crop, width - 2 * frame.crop))
    return frame, "wolleb" if frame.crop else "none"
