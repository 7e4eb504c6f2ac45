"""Presets: settings under a name, ``--preset NAME``, for training and for what follows it.

A preset takes the place of defaults: flags of the command line and of ``--config`` win over it, and
so does what a checkpoint records. Settings of published code are those of the published commands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from guided_diffusion.errors import UserError, did_you_mean
from guided_diffusion.options.flags import Flags, flag


@dataclass(frozen=True)
class PresetOptions:
    """Settings under a name."""

    preset: str = flag("", "named settings of docs/recipes.md; given flags win", run=True)


@dataclass(frozen=True)
class Preset:
    """Settings under a name.

    Attributes:
        purpose: what they are for, in one line.
        source: where they come from.
        parts: flags and their values for each command, by the command's name. Where a preset lets
            the learning rate fall (``lr_anneal_steps``), a given ``--max_steps`` changes that too.
    """

    purpose: str
    source: str
    parts: Mapping[str, Mapping[str, Any]]


# Published settings. Sampling has the network's flags for bare weights, which do not say them.
_WOLLEB_NETWORK = {
    **{"image_size": 256, "num_channels": 128, "class_cond": False, "num_res_blocks": 2},
    **{"num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False},
    "attention_resolutions": "16",
}
_PLUSPLUS_NETWORK = {
    **{"image_size": 256, "num_channels": 512, "class_cond": False, "num_res_blocks": 12},
    **{"num_heads": 8, "learn_sigma": True, "use_scale_shift_norm": True},
    "attention_resolutions": "24",
}
_LINEAR = {
    **{"noise_schedule": "linear", "rescale_learned_sigmas": False, "rescale_timesteps": False},
}
_TRAINED_LINEAR = {"diffusion_steps": 1000, **_LINEAR}
_SOLVER = {"dpm_solver": True, "steps": 50}  # published as --diffusion_steps 50
_NEW = {"version": "new"}  # the default of MedSegDiff's own scripts

# Our own settings. Both have one objective and one way of sampling.
_OBJECTIVE = {"mask_loss": "dice_ce", "input_scale": 0.2, "mask_dropout": 0.7}
_PRECISION = {"precision": "auto"}
_ANSWERS = {
    **{"sampler": "dpm_solver++", "steps": 5, "num_ensemble": 8, "fusion": "direct"},
    **_PRECISION,
}

_FEW_NOISES = {"timestep_respacing": "334,333,1"}  # the lower two thirds of the schedule
_WEAK_FIT = {
    **{"lr": 1e-3, "warmup_steps": 50, "grad_clip": 1.0, "ema_rate": "0.99", "augment": True},
    **_PRECISION,
}

_WOLLEB = "Wolleb et al. (2022), README of Diffusion-based-Segmentation"
_MEDSEGDIFF = "Wu et al. (2023), README of MedSegDiff"

PRESETS: dict[str, Preset] = {
    "small": Preset(
        "a laptop, 64 px: one sure mask, and other plausible ones; measured on three data sets",
        "chosen in results/method.md; its members' sampler on validation images of ISIC alone",
        {
            "train": {
                **{"image_size": 64, "num_channels": 32, "channel_mult": "1,2,3,4"},
                **{"num_res_blocks": 1, "attention_resolutions": "8", "num_heads": 1},
                **_OBJECTIVE,
                **{"batch_size": 8, "lr": 1e-3, "lr_anneal_steps": 1200, "warmup_steps": 50},
                **{"grad_clip": 1.0, "ema_rate": "0.99", "augment": True},
                **_PRECISION,
            },
            "sample": _ANSWERS,
        },
    ),
    "best": Preset(
        "a GPU, 256 px; objective and sampling are those of small, measured at 64 px alone; "
        "network and training at 256 px are not measured yet",
        "objective and sampling chosen in results/method.md",
        {
            "train": {
                **{"image_size": 256, "num_channels": 64, "channel_mult": "1,1,2,2,4,4"},
                **{"num_res_blocks": 2, "attention_resolutions": "16", "num_heads": 4},
                **_OBJECTIVE,
                **{"batch_size": 8, "lr": 2e-4, "lr_anneal_steps": 60_000, "warmup_steps": 500},
                **{"grad_clip": 1.0, "ema_rate": "0.999", "augment": True},
                **_PRECISION,
            },
            "sample": _ANSWERS,
        },
    ),
    "wolleb": Preset(
        "BraTS slices as published: 1000 evaluations for each of 5 masks",
        _WOLLEB,
        {
            "train": {**_WOLLEB_NETWORK, **_TRAINED_LINEAR, "lr": 1e-4, "batch_size": 10},
            "sample": {**_WOLLEB_NETWORK, **_LINEAR, "num_ensemble": 5},
        },
    ),
    "medsegdiff": Preset(
        "ISIC or BraTS as published, MedSegDiff-B: 1000 evaluations for each of 5 masks",
        _MEDSEGDIFF,
        {
            "train": {
                **{**_NEW, **_WOLLEB_NETWORK, **_TRAINED_LINEAR, "lr": 1e-4, "batch_size": 8},
            },
            "sample": {**_NEW, **_WOLLEB_NETWORK, **_LINEAR, "num_ensemble": 5},
        },
    ),
    "medsegdiff++": Preset(
        "MedSegDiff's large network as published, 7.6 billion parameters",
        _MEDSEGDIFF,
        {
            "train": {
                **{**_NEW, **_PLUSPLUS_NETWORK, **_TRAINED_LINEAR, "lr": 1e-4, "batch_size": 64},
            },
            "sample": {**_NEW, **_PLUSPLUS_NETWORK, **_LINEAR, "num_ensemble": 25},
        },
    ),
    "fast-brats": Preset(
        "wolleb, with 50 evaluations of DPM-Solver++ for each mask",
        "README of the fast-sampling fork of Diffusion-based-Segmentation",
        {
            "train": {**_WOLLEB_NETWORK, **_TRAINED_LINEAR, "lr": 1e-4, "batch_size": 10},
            "sample": {**_WOLLEB_NETWORK, **_LINEAR, "num_ensemble": 5, **_SOLVER},
        },
    ),
    "fast-isic": Preset(
        "medsegdiff, with 50 evaluations of DPM-Solver++ for each mask",
        f"{_MEDSEGDIFF}, its commands for fast sampling",
        {
            "train": {
                **{**_NEW, **_WOLLEB_NETWORK, **_TRAINED_LINEAR, "lr": 1e-4, "batch_size": 8},
            },
            "sample": {**_NEW, **_WOLLEB_NETWORK, **_LINEAR, "num_ensemble": 5, **_SOLVER},
        },
    ),
    "weak-ours": Preset(
        "image-level labels, a laptop, 48 px: maps by encoding; measured on BraTS half-slices "
        "and phantoms",
        "chosen on training images of both in results/weak.md",
        {
            "weak-train": {
                **{"image_size": 48, "class_cond": True, "num_channels": 32},
                **{"channel_mult": "1,2,4", "num_res_blocks": 1, "num_heads": 1},
                **{"attention_resolutions": "12", "predict_v": True},
                **{"batch_size": 16, "max_steps": 1000, **_FEW_NOISES, **_WEAK_FIT},
            },
            "weak-classifier": {
                **{"model_type": "encoder", "image_size": 48, "classifier_width": 32},
                **{"classifier_depth": 1, "classifier_attention_resolutions": "12"},
                **{"batch_size": 16, "max_steps": 400, **_FEW_NOISES, **_WEAK_FIT},
            },
            "weak-segment": {
                **{"method": "encoded", "level": 600, "steps": 10, "difference": "positive"},
                **{"smooth": 1.0, "cut_at": 0.35, "largest": "8", "fill_holes": True},
            },
        },
    ),
    "weak-brats": Preset(
        "FLAIR slices of BraTS with image-level labels, as published",
        "Hu et al. (2023), README of cond_ddpm_wsss; --class_cond True is needed here",
        {
            "weak-train": {
                **{"image_size": 224, "num_channels": 128, "num_res_blocks": 3},
                **{"class_cond": True, "learn_sigma": True},
                **{"diffusion_steps": 4000, "noise_schedule": "linear"},
                **{"lr": 1e-4, "batch_size": 8},
            },
            "weak-classifier": {
                **{"model_type": "resnet50", "image_size": 224, "diffusion_steps": 1000},
                **{"noise_schedule": "linear", "lr": 3e-4, "batch_size": 4, "max_steps": 150_000},
            },
            "weak-segment": {
                **{"method": "cg-cdm", "classifier_scale": 10.0, "level": 400, "steps": 10},
                **{"stride": 1, "tau": 0.95, "noises": 1, "batch_size": 4},
            },
        },
    ),
}
_CHOICES = {
    "sample": (
        ("sampler", "dpm_solver", "use_ddim"),
        ("steps", "diffusion_steps", "timestep_respacing"),
    ),
    "weak-segment": (("method", "guided"),),
}
"""Flags that make one choice together: if one is given, a preset sets none of them."""


def with_preset(flags: Flags, command: str) -> Flags:
    """Add the settings of the flags' preset, if any, for a command; given flags win.

    Raises:
        UserError: there is no such preset, or it has no settings for the command.
    """
    name = flags.given.get("preset", "")
    if not name:
        return flags
    fitting = [known for known, preset in PRESETS.items() if command in preset.parts]
    if name not in fitting:
        problem = f"is for {', '.join(PRESETS[name].parts)}" if name in PRESETS else ""
        near = did_you_mean(name, fitting, "") if not problem else ""
        hint = f"{near} {command} has the presets {', '.join(fitting)}.".strip()
        raise UserError(f"--preset {name}", problem or "there is no such preset", hint)
    given = {*flags.given}
    given |= {n for choice in _CHOICES.get(command, ()) if given & {*choice} for n in choice}
    if flags.given.get("sampler") == "direct":  # one evaluation
        given |= {"steps"}
    values = {n: v for n, v in PRESETS[name].parts[command].items() if n not in given}
    if "lr_anneal_steps" in values and "max_steps" in given:
        values["lr_anneal_steps"] = flags.given["max_steps"]
    return replace(flags, preset=values)


def preset_notes(flags: Flags) -> list[str]:
    """Say in one line what a preset sets; nothing without a preset.

    What a checkpoint has decided instead is omitted.
    """
    if not (name := flags.given.get("preset")):
        return []
    values = {n: v for n, v in flags.preset.items() if n not in flags.resolved}
    return [f"--preset {name} sets {flag_text(values) or 'nothing that is not given'}"]


def flag_text(values: Mapping[str, Any]) -> str:
    """Write flags as a command line has them."""
    return " ".join(f"--{name} {value}" for name, value in values.items())


def suggest_preset(flags: Flags, trained: Mapping[str, Any], drawing: type) -> list[str]:
    """Suggest to sample with the preset that a training used, where no setting of it is given.

    Args:
        flags: of sampling.
        trained: the record of the training, as a checkpoint has it.
        drawing: the option group that says how masks are drawn.
    """
    given = trained.get("given")
    name = given.get("preset", "") if isinstance(given, dict) else ""
    part = PRESETS[name].parts.get("sample") if isinstance(name, str) and name in PRESETS else None
    if not part or "preset" in flags.given:
        return []
    drawn = {entry.name for entry in fields(drawing)} & part.keys()
    covered = with_preset(replace(flags, given={**flags.given, "preset": name}), "sample").preset
    if drawn - covered.keys():
        return []
    text = flag_text({n: v for n, v in part.items() if n in drawn})
    return [f"trained with --preset {name}; in sampling, --preset {name} means {text}"]


def refuse_other_preset(flags: Flags, trained: Mapping[str, Any], path: Path) -> None:
    """Compare a preset with the training that is continued.

    Raises:
        UserError: it sets what contradicts the record of a checkpoint.
    """
    if trained.get("version") == "unet":  # which implies it
        trained = {name: value for name, value in trained.items() if name != "mask_dropout"}
    for name, value in flags.preset.items():
        if name in trained and value != trained[name]:
            raise UserError(
                f"--preset {flags.given['preset']}",
                f"sets --{name} {value}, but {path} was trained with {trained[name]}",
                "Omit --preset, or train anew in another --out_dir.",
            )


@contextmanager
def naming_preset(flags: Flags) -> Iterator[None]:
    """Let an error about a flag say that a preset has set it."""
    try:
        yield
    except UserError as error:
        text = str(error)
        named = [n for n, value in flags.preset.items() if f"--{n} {value}:" in text]
        if named:
            text += f" --preset {flags.given['preset']} sets --{named[0]}."
        error.args = (text,)
        raise
