"""What a checkpoint records of its training, checked before anything is built from it.

Every value has to be of its flag's type and among its choices, and all weights have to be those of
the network that the values describe, which is built without memory for its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from guided_diffusion.checkpoint import (
    CLASSIFIER,
    IMAGES,
    SEGMENTATION,
    Checkpoint,
    recorded_flags,
    require_fit,
    require_kind,
)
from guided_diffusion.data.classes import find_classes
from guided_diffusion.errors import UserError, did_you_mean
from guided_diffusion.options.flags import Flags, mistyped, unfit
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.segmentation import LATER, DataOptions, TrainingOptions
from guided_diffusion.options.weak import (
    ClassifierOptions,
    ImageDiffusionOptions,
    ImageNetworkOptions,
)
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model

OWN = {
    SEGMENTATION: (NetworkOptions, DiffusionOptions),
    IMAGES: (ImageNetworkOptions, ImageDiffusionOptions),
    CLASSIFIER: (ClassifierOptions, ImageDiffusionOptions),
}
"""The groups that a checkpoint of each kind records in full."""
HINT = "Use another checkpoint of the run, or copy the file again from its source."


def checked_flags(checkpoint: Checkpoint, kind: str, path: Path) -> dict[str, Any]:
    """Return the flags that a checkpoint of a kind records; bare weights show their version only.

    Raises:
        UserError: a checkpoint of another kind, a value that no training has recorded, or weights
            that are not those of the network.
    """
    require_kind(checkpoint, kind, path)
    known = recorded_flags(checkpoint)
    if not checkpoint.options:
        return known
    _refuse_unknown(checkpoint.options, kind, path)
    try:
        make = _network_of(known, kind)
        require_fit(make, [checkpoint.model, *checkpoint.ema.values()], path)
    except UserError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise _unusable(path, str(error).rstrip(".")) from error
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise _unusable(path, str(error).partition("\n")[0]) from error
    return known


def _refuse_unknown(options: Mapping[str, Any], kind: str, path: Path) -> None:
    """Raise a UserError for a flag that is missing, has a wrong value or does not exist."""
    groups = OWN[kind] + ((DataOptions, TrainingOptions) if kind == SEGMENTATION else ())
    known = {entry.name: (group, entry) for group in groups[::-1] for entry in fields(group)}
    extra = {"of_images": True} if kind == IMAGES else {}
    for name, value in options.items():
        if name in extra:
            problem = "" if value is extra[name] else f"{value!r} is not {extra[name]}"
        elif name in known:
            problem = mistyped(*known[name], value) or unfit(known[name][1], value)
        else:
            hint = did_you_mean(str(name), known, "Use the version that wrote it.")
            raise UserError(path, f"records {name!r}, which is no flag of its training", hint)
        if problem:
            raise UserError(path, f"records a wrong --{name}: {problem}", HINT)
    needed = [e.name for group in OWN[kind] for e in fields(group) if not e.metadata["run"]]
    later = {*LATER, "dropout"}  # a run's own once, and still open where it is not recorded
    if missing := [name for name in needed if name not in options and name not in later]:
        raise UserError(path, f"does not record --{missing[0]}", HINT)


def _network_of(known: Mapping[str, Any], kind: str) -> Callable[[], nn.Module]:
    """Check that network, diffusion and classes can be made, and return what makes the network."""
    flags = Flags(given=known)
    first: Any
    second: Any
    first, second = (flags.group(group) for group in OWN[kind])
    if kind == CLASSIFIER:
        create_gaussian_diffusion(second)
        return lambda: create_classifier(**vars(first))
    create_gaussian_diffusion(second, first.version)
    classes = find_classes(known.get("mask_labels", "")) if kind == SEGMENTATION else None
    return lambda: create_model(first, second, classes, of_images=kind == IMAGES)


def _unusable(path: Path, why: str) -> UserError:
    return UserError(path, f"records flags that cannot be used ({why})", HINT)
