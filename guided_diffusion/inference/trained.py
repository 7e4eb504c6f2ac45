"""Checkpoints to draw with: one, or several that agree in data and image size.

A checkpoint brings its own flags; a given flag that contradicts them is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from guided_diffusion.checkpoint import (
    SEGMENTATION,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    starter_named,
)
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.inference.recorded import checked_flags
from guided_diffusion.layouts import normalise_flags
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.presets import with_preset

COMMON = ("image_size", "in_ch", "crop", "modalities", "normalise", "plane", "mask_labels")
"""What weights that draw together must agree in."""


class Trained(NamedTuple):
    """A checkpoint, its file, and the flags completed by what it records."""

    checkpoint: Checkpoint
    path: Path
    flags: Flags

    @property
    def is_own(self) -> bool:
        """Whether the checkpoint describes itself; bare weights of others do not."""
        return bool(self.checkpoint.options)


def load_trained(
    path: str | Path,
    flags: Flags,
    *,
    flag: str = "--model_path",
    kind: str = SEGMENTATION,
    passing: Collection[str] = (),
) -> Trained:
    """Load a checkpoint of a kind, or a folder's latest one, and resolve the flags by it.

    Bare weights are taken as trained on ``--trained_steps`` steps, 1000 by default. The flags
    ``passing`` may contradict the checkpoint: they were given for another network.

    Raises:
        UserError: no checkpoint of that kind there (``flag`` names the path), or flags that
            contradict it.
    """
    found = latest_checkpoint(path, flag=flag)
    checkpoint = load_checkpoint(found, training=False)
    flags, trained = normalise_flags(flags), checked_flags(checkpoint, kind, found)
    passing = ("diffusion_steps", "timestep_respacing", *passing)
    steps = flags.get("trained_steps", 0)
    if checkpoint.options:
        trained["trained_steps"] = trained["diffusion_steps"] if steps else 0
    else:
        trained |= {"diffusion_steps": steps or 1000, "timestep_respacing": ""}
    flags.refuse_contradictions(trained, found, passing=passing)
    return Trained(checkpoint, found, flags.with_resolved(**trained))


def with_own_preset(flags: Flags, model: str | Sequence[str]) -> tuple[Flags, list[str]]:
    """Add the preset of weights that come with the package, unless another one is given.

    Returns:
        The flags, and a note on what was added.
    """
    paths = _paths_of(model)
    presets = {own.preset if (own := starter_named(path)) else "" for path in paths}
    if len(presets) != 1 or presets == {""} or "preset" in flags.given:
        return flags, []
    (preset,) = presets
    note = f"{', '.join(paths)} is used with --preset {preset}; given flags win"
    return with_preset(flags.with_given(preset=preset), "sample"), [note]


def load_agreeing(
    model: str | Sequence[str], flags: Flags, *, flag: str = "--model_path"
) -> list[Trained]:
    """Load checkpoints that can draw together: they agree in data and image size.

    What bare weights do not say is taken to be as the others say.

    Raises:
        UserError: as :func:`load_trained`; none or the same twice, or they do not agree.
    """
    loaded = [load_trained(path, flags, flag=flag) for path in _paths_of(model) or [""]]
    for index, one in enumerate(loaded):
        if any(one.path.samefile(other.path) for other in loaded[:index]):
            raise UserError(flag, f"names {one.path} twice", "Name different weights.")
    common: dict[str, tuple[Any, Path]] = {}
    for name in COMMON:
        for one in loaded:
            value = one.flags.get(name)
            if value is None or value == "auto":
                continue
            known, path = common.setdefault(name, (value, one.path))
            if value != known:
                raise disagreement_error(one.path, path, name, value, known)
    values = {name: value for name, (value, _) in common.items()}
    return [_slim(one)._replace(flags=one.flags.with_resolved(**values)) for one in loaded]


def _paths_of(model: str | Sequence[str]) -> list[str]:
    return split_paths(model) if isinstance(model, str) else [*model]


def _slim(trained: Trained) -> Trained:
    """Leave out the optimiser's state, which is twice as large as the weights."""
    training = {name: v for name, v in trained.checkpoint.training.items() if name != "optimizer"}
    return trained._replace(checkpoint=replace(trained.checkpoint, training=training))


def split_paths(text: str) -> list[str]:
    """Split paths separated by commas; a comma in the name of an existing path stays."""
    parts, paths = text.split(","), list[str]()
    while parts:
        joined = (",".join(parts[:count]) for count in range(len(parts), 0, -1))
        forms = (form for text in joined for form in (text, text.strip()))
        path = next((form for form in forms if form and expanded(form).exists()), parts[0].strip())
        paths.append(path)
        parts = parts[path.count(",") + 1 :]
    return paths


def disagreement_error(
    path: Path, other: Path, name: str, value: object, known: object
) -> UserError:
    """The error of weights that were not trained alike."""
    own, others = (f"{each!s}" or "''" for each in (value, known))
    return UserError(
        path,
        f"was trained with --{name} {own}, but {other} with {others}",
        "Weights that draw together must agree in their data and the size of the images.",
    )
