"""Checkpoint files that describe themselves, and the import of bare weights.

A checkpoint holds options, weights, averaged weights and training state as tensors and plain types,
so that loading it executes no code, and a checksum of every tensor. It appears whole or not at all.
Bare weights, a dictionary of tensors as Diffusion-based-Segmentation and MedSegDiff save it, are
read as well, also those that other training loops put into a dictionary; what a published file
lacks is completed (:func:`adapt_weights`). Either may be a ``.safetensors`` file.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.checkpoint import portable
from guided_diffusion.checkpoint.bare import bare_weights, is_weight
from guided_diffusion.checkpoint.content import (
    CLASSIFIER,
    IMAGES,
    SEGMENTATION,
    Checkpoint,
    kind_of,
    recorded_flags,
    require_kind,
)
from guided_diffusion.checkpoint.folders import (
    BEST,
    LATEST,
    latest_checkpoint,
    numbered_checkpoints,
    step_of,
)
from guided_diffusion.checkpoint.portable import FORMAT
from guided_diffusion.checkpoint.saving import (
    export_checkpoint,
    export_weights,
    link_as,
    save_checkpoint,
)
from guided_diffusion.checkpoint.sharded import SHARDED, joined, opened, without_values
from guided_diffusion.checkpoint.starters import STARTERS, starter_named
from guided_diffusion.checkpoint.weights import (
    NOT_WHOLE,
    OTHER_FILE,
    Weights,
    fitting_weights,
    is_whole,
    load_weights,
    require_fit,
    usable_weights,
    verify,
    version_of,
)
from guided_diffusion.data.folders import listing
from guided_diffusion.errors import UserError
from guided_diffusion.unet import UNetModel

ADDED = ("run", "checksums")
"""Parts that older checkpoints lack."""
__all__ = [
    "BEST",
    "CLASSIFIER",
    "Checkpoint",
    "IMAGES",
    "LATEST",
    "SEGMENTATION",
    "STARTERS",
    "Weights",
    "adapt_weights",
    "export_checkpoint",
    "export_weights",
    "fitting_weights",
    "is_whole",
    "kind_of",
    "latest_checkpoint",
    "link_as",
    "load_checkpoint",
    "load_weights",
    "missing_weights_note",
    "numbered_checkpoints",
    "read_content",
    "recorded_flags",
    "require_fit",
    "require_kind",
    "save_checkpoint",
    "starter_named",
    "step_of",
    "usable_weights",
    "version_of",
    "with_companions",
    "without_values",
]


def load_checkpoint(path: Path, *, training: bool = True, on_disk: bool = False) -> Checkpoint:
    """Read a checkpoint or bare weights onto the CPU, without executing code from the file.

    Args:
        path: of the file.
        training: read the optimiser's moments from shards, too; otherwise they are left out.
        on_disk: tensors stay where they are until they are used, so that several processes can open
            a large file; those in shards have no values (:func:`without_values`).

    Raises:
        UserError: the file is damaged, is not a checkpoint, or holds more than tensors and plain
            types.
    """
    content = read_content(path, on_disk=on_disk)
    if isinstance(content, dict) and content.get("format") == SHARDED:
        try:
            content = opened(content, path) if on_disk else joined(content, path, training=training)
        except UserError:
            raise
        except Exception as error:  # the file may say anything
            raise _unreadable_checkpoint(path, _why(error)) from error
        return _own_checkpoint(content, path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        own = _own_checkpoint(content, path)
        if without_values({"model": own.model, "ema": own.ema}):
            raise _unreadable_checkpoint(path, f"a tensor {NOT_WHOLE}")
        return own
    if isinstance(content, dict) and content.keys() >= {"state", "param_groups"}:
        raise _optimiser_instead(path)
    raw, averaged = bare_weights(content)
    if raw or averaged:
        ema = {"": {**raw, **averaged}} if averaged else {}  # averages may lack buffers
        return Checkpoint(options={}, step=step_of(path), model=raw or averaged, ema=ema)
    kind = type(content).__name__
    raise _unreadable_checkpoint(path, f"the {kind} in it is not a dictionary of tensors")


def read_content(path: Path, *, on_disk: bool = False) -> Any:
    """Read tensors and plain types from a file; with ``on_disk``, tensors are mapped if possible.

    Raises:
        UserError: it cannot be read, or holds anything else.
    """
    try:
        if path.suffix.lower() == portable.SUFFIX:
            return portable.read(path)
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch warns about the protocol of other pickles
            if file.read(4) == b"PK\3\4":
                _require_intact(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other files can fail in any way
        raise _unreadable_checkpoint(path, _why(error)) from error


def _require_intact(path: Path) -> None:
    """Raise an error where an archive is compressed, or all that is not a tensor has changed.

    torch never compresses and compares no checksums. What a compressed part would take is unknown.
    """
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED:
                raise RuntimeError("its parts are compressed")
            if part.filename.endswith(".pkl"):
                archive.read(part)


def _own_checkpoint(content: dict[str, Any], path: Path) -> Checkpoint:
    """Check the parts of a checkpoint of this suite, and its checksums."""
    kinds = {part.name: int if part.name == "step" else dict for part in fields(Checkpoint)}
    needed = kinds.keys() - ADDED
    content = {"run": {}, "checksums": {}} | content
    whole = content.keys() == {"format", "checksums", *kinds}
    fitting = whole and all(isinstance(content[name], kind) for name, kind in kinds.items())
    if not fitting or isinstance(content["step"], bool):
        problem = f"its parts are not those of a checkpoint, {', '.join(sorted(needed))}"
        raise _unreadable_checkpoint(path, problem)
    checkpoint = Checkpoint(**{name: content[name] for name in kinds})
    if problem := _inconsistency(checkpoint):
        raise _unreadable_checkpoint(path, problem)
    if content["checksums"]:
        try:
            verify(vars(checkpoint), content["checksums"], path)
        except (AttributeError, ValueError, RuntimeError, TypeError) as error:
            raise _unreadable_checkpoint(path, _why(error)) from error
    return checkpoint


def _inconsistency(checkpoint: Checkpoint) -> str:
    """Say in what the parts of a checkpoint contradict each other; empty if in nothing."""
    if checkpoint.step < 0:
        return f"its step is {checkpoint.step}"
    for name, weights in {"model": checkpoint.model, **checkpoint.ema}.items():
        if not isinstance(weights, dict) or not all(map(is_weight, weights.items())):
            return f"its weights {name!r} are not a dictionary of tensors"
        if lacking := checkpoint.model.keys() ^ weights.keys():
            return f"tensor {min(lacking)} is only in one of its weights 'model' and {name!r}"
    for rate in checkpoint.ema:
        try:
            if not 0 <= float(rate) <= 1:
                raise ValueError
        except (TypeError, ValueError):
            return f"its averaged weights have the decay rate {rate!r}"
    return ""


def _optimiser_instead(path: Path) -> UserError:
    """Name the weights that were saved with an optimiser, by the parents' rules."""
    number = path.stem.removeprefix(path.stem.rstrip("0123456789"))
    stems = ("savedmodel", "model") if number else ("model", "classifier_model", "savedmodel")
    names = [f"{stem}{number}.pt" for stem in stems]
    there = [str(file) for name in names if (file := path.with_name(name)).is_file()]
    hint = (
        f"Pass {' or '.join(there)}."
        if there
        else f"Pass the weights that were saved with it, such as {' or '.join(names[:2])}."
    )
    return UserError(path, "holds the state of an optimiser, not weights", hint)


def with_companions(checkpoint: Checkpoint, path: Path, rates: Iterable[str]) -> Checkpoint:
    """Add to bare weights the averages and optimiser state that were saved in the same folder.

    The parent projects save ``emasavedmodel_{rate}_{N}.pt`` (or ``ema_...``) and
    ``optsavedmodel{N}.pt`` (or ``opt...``), where N is the number in the weights' own name, and the
    weak-supervision project ``ema_{rate}.pt``. An average in the weights' own file does for every
    rate without a file. What is missing starts anew.

    Raises:
        UserError: one of these files cannot be read, or holds something else.
    """
    rates, training, number = list(rates), {}, f"{checkpoint.step:06d}"
    ema = {rate: average for average in checkpoint.ema.values() for rate in rates}
    for rate in rates:
        stems = (f"emasavedmodel_{rate}_{number}", f"ema_{rate}_{number}", f"ema_{rate}")
        for file in (path.with_name(f"{stem}.pt") for stem in stems):
            if file.exists():
                ema[rate] = load_checkpoint(file).model
    for file in (path.with_name(f"{stem}{number}.pt") for stem in ("optsavedmodel", "opt")):
        if file.exists():
            training = {"optimizer": _optimiser_state(file)}
    return replace(checkpoint, ema=ema, training=training)


def _optimiser_state(path: Path) -> dict[str, Any]:
    state = read_content(path)
    if isinstance(state, dict) and isinstance(state.get("state"), dict):
        return state
    hint = "Remove it to continue from the weights alone, or copy it again from its source."
    raise UserError(path, "does not hold the state of an optimiser", hint)


def _unreadable_checkpoint(path: Path, problem: str) -> UserError:
    return UserError(path, problem, OTHER_FILE)


def _why(error: Exception) -> str:
    """Say why torch could not load a file; torch's own message advises to trust the file."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"holds objects that could run code ({code[1]})"
    if isinstance(error, OSError | RuntimeError) and str(error):
        return f"cannot be read ({str(error).splitlines()[0]})"
    return "is damaged or not a checkpoint"


def adapt_weights(
    checkpoint: Checkpoint, net: UNetModel, *, training: bool = False
) -> tuple[Checkpoint, list[str]]:
    """Complete bare published weights for a network.

    For training, missing tensors start as in a new network: an exactly closed gate would produce
    maps without variance, and the gradient of the normalisation behind it would explode.

    Returns:
        The completed checkpoint, and the names of the tensors that were missing.
    """
    if checkpoint.options:
        return checkpoint, []
    model = net.adapt_weights(checkpoint.model)
    missing = [name for name in model if name not in checkpoint.model]
    fresh = {name: net.state_dict()[name].clone() for name in missing} if training else {}
    ema = {rate: net.adapt_weights(weights) | fresh for rate, weights in checkpoint.ema.items()}
    return replace(checkpoint, model=model | fresh, ema=ema), missing


def missing_weights_note(missing: Sequence[str], *, training: bool = False) -> str:
    """Say which tensors published weights lack, and what they are set to."""
    values = "they start as in a new network" if training else "their mean is used instead"
    return (
        f"the weights lack {listing(missing, most=2)}, which the original network drew at random "
        f"in every call; {values}"
    )
