"""The training objective: what its flags imply for each other, and which exclude each other."""

from __future__ import annotations

from dataclasses import replace

from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import Flags, numbers
from guided_diffusion.options.network import DiffusionOptions


def objective(options: DiffusionOptions, version: str) -> DiffusionOptions:
    """Complete the options of a diffusion by what they imply for a ``version`` of the network.

    Cross-entropy takes the network's output as logits of a clean mask in {-1, 1}. A plain U-Net
    never sees a noisy mask. Completed options stay as they are.

    Raises:
        UserError: two options exclude each other.
    """
    is_unet = version == "unet"
    loss = options.mask_loss
    if loss == "auto":
        loss = "dice_ce" if is_unet else "mse"
    dropout = 1.0 if is_unet else options.mask_dropout
    clean_alone = {
        "--version unet": is_unet,
        f"--mask_loss {loss}": loss != "mse",
        f"--mask_dropout {dropout:g}": dropout > 0,
    }
    if reason := next((text for text, applies in clean_alone.items() if applies), ""):
        hint = "The network predicts the clean mask alone, and no timestep has a weight: omit one."
        for name in ("learn_sigma", "predict_v", "use_kl", "min_snr_gamma"):
            _refuse_both(options, name, reason, hint)
    if options.predict_xstart:
        _refuse_both(
            options, "predict_v", "--predict_xstart True", "Predict either v or the clean mask."
        )
    if options.use_kl:
        hint = "The bound has its own weights: omit one of the two."
        _refuse_both(options, "min_snr_gamma", "--use_kl True", hint)
    if dropout + options.noise_share >= 1 and not is_unet:
        given = f"--mask_dropout {dropout:g}"
        given += f" --noise_share {options.noise_share:g}" if options.noise_share else ""
        raise UserError(
            given,
            "would leave no draw in which the network sees a noisy mask that tells something",
            "Use --mask_dropout 0.5, or --version unet for a plain U-Net.",
        )
    if is_unet or loss != "mse":
        options = replace(options, predict_xstart=True, mask_range="-1,1")
    if dropout and not options.predict_xstart:
        raise UserError(
            f"--mask_dropout {dropout:g}",
            "needs a network that predicts the clean mask, since without a noisy mask there is no "
            "noise to predict",
            "Add --predict_xstart True, or --mask_loss bce or dice_ce.",
        )
    share = 0.0 if is_unet else options.noise_share
    return replace(options, mask_loss=loss, mask_dropout=dropout, noise_share=share)


def resolve_objective(flags: Flags, version: str) -> DiffusionOptions:
    """Make the completed options of the flags' diffusion.

    Raises:
        UserError: two flags exclude each other, or a given flag is not what another one implies.
    """
    options = objective(flags.group(DiffusionOptions), version)
    cause = "--version unet" if version == "unet" else f"--mask_loss {options.mask_loss}"
    for name in ("predict_xstart", "mask_range", "mask_dropout"):
        given, implied = flags.given.get(name), getattr(options, name)
        if given is not None and _value(name, given) != _value(name, implied):
            raise UserError(
                f"--{name} {given}",
                f"contradicts {cause}, which implies --{name} {implied}",
                f"Omit --{name}.",
            )
    return options


def _value(name: str, value: object) -> object:
    return numbers(name, str(value), float) if name == "mask_range" else value


def _refuse_both(options: DiffusionOptions, name: str, other: str, hint: str) -> None:
    if value := getattr(options, name):
        raise UserError(f"--{name} {value}", f"cannot be combined with {other}", hint)
