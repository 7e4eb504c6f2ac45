"""Checkpoint files that describe themselves, and the import of bare weights.

A checkpoint holds options, weights, averaged weights and training state as tensors and plain types,
so that loading it executes no code, and a checksum of every tensor. It appears whole or not at all.
Bare weights, a dictionary of tensors as Diffusion-based-Segmentation and MedSegDiff save it, are
read as well, also those that other training loops put into a dictionary; what a published file
lacks is completed (:func:`adapt_weights`). Either may be a ``.safetensors`` file.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.checkpoint import portable
from guided_diffusion.checkpoint.bare import bare_weights, is_weight
from guided_diffusion.checkpoint.folders import (
    LATEST,
    latest_checkpoint,
    numbered_checkpoints,
    step_of,
)
from guided_diffusion.checkpoint.portable import FORMAT
from guided_diffusion.checkpoint.weights import (
    OTHER_FILE,
    Weights,
    checksums,
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
from guided_diffusion.files import CHECKPOINTS_HINT, atomic_write
from guided_diffusion.options.segmentation import LATER
from guided_diffusion.unet import UNetModel

BEST = "bestmodel.pt"
SEGMENTATION = "a segmentation network, which scripts/segmentation_train.py trains"
IMAGES = "a diffusion of images, which scripts/train_tumor_ddfm.py trains"
CLASSIFIER = "a classifier of images, which scripts/classifier_tumor_train.py trains"
ADDED = ("run", "checksums")
"""Parts that older checkpoints lack."""
__all__ = [
    "BEST",
    "CLASSIFIER",
    "Checkpoint",
    "IMAGES",
    "LATEST",
    "SEGMENTATION",
    "Weights",
    "adapt_weights",
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
    "recorded_flags",
    "require_fit",
    "require_kind",
    "save_checkpoint",
    "step_of",
    "usable_weights",
    "version_of",
    "with_companions",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        options: the flags that describe network, diffusion and data, by name; empty for bare
            weights.
        step: training steps taken.
        model: the last weights, by tensor name.
        ema: averaged weights by their decay rate as text, which is empty where bare weights do not
            say it.
        training: what the training loop needs to resume; empty for bare weights.
        run: what would repeat the run that wrote it, as its ``config.yaml`` says; empty in older
            checkpoints and for bare weights.
    """

    options: dict[str, Any]
    step: int
    model: Weights
    ema: dict[str, Weights] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def choose(self, weights: str) -> tuple[Weights, str]:
        """Return the weights to sample with, and a phrase that names them.

        Args:
            weights: ``ema`` for the slowest average, or the last weights if there is none; or
                ``raw`` for the last weights, unless the file has an average alone.
        """
        alone = any(average is self.model for average in self.ema.values())
        if self.ema and (weights == "ema" or alone):
            rate = max(self.ema, key=lambda rate: float(rate or 0))
            if not self.options:
                return self.ema[rate], "bare averaged weights"
            return self.ema[rate], f"averaged weights (EMA {rate}) of step {self.step}"
        return self.model, f"last weights of step {self.step}" if self.options else "bare weights"


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    drop: Iterable[Path] = (),
    best: bool = False,
    numbered: bool = True,
) -> Path:
    """Write ``savedmodelNNNNNN.pt`` and link ``savedmodel.pt`` to it; each appears whole.

    Older ones in ``drop`` are deleted once it is written. With ``best``, ``bestmodel.pt`` is linked
    to it as well; if it is not ``numbered``, only ``bestmodel.pt`` is written.

    Raises:
        UserError: the folder cannot be written; earlier checkpoints are unchanged.
    """
    for partial in folder.glob(".part-*model*.pt"):  # left by a killed process
        partial.unlink(missing_ok=True)
    path = folder / (f"savedmodel{checkpoint.step:06d}.pt" if numbered else BEST)
    with atomic_write(path, hint=CHECKPOINTS_HINT) as part:
        torch.save(_recorded_content(checkpoint), part)
    for name in [LATEST] * numbered + [BEST] * (best and numbered):
        link_as(path, folder / name)
    for old in drop:
        old.unlink(missing_ok=True)
    return path


def _recorded_content(checkpoint: Checkpoint) -> dict[str, Any]:
    content = vars(checkpoint)
    return {"format": FORMAT, **content, "checksums": checksums(content)}


def export_weights(checkpoint: Checkpoint, weights: str, path: Path) -> None:
    """Write one set of weights and the options, without what training needs, for use elsewhere.

    Args:
        checkpoint: of this suite, or bare weights.
        weights: ``ema`` or ``raw``, as :meth:`Checkpoint.choose` has it.
        path: of the file, which ends in ``.safetensors`` or in ``.pt``.

    Raises:
        UserError: the file cannot be written.
    """
    chosen, _ = checkpoint.choose(weights)
    rate = next((rate for rate, average in checkpoint.ema.items() if average is chosen), None)
    ema = {} if rate is None else {rate: chosen}
    content = _recorded_content(replace(checkpoint, model=chosen, ema=ema, training={}))
    own = bool(checkpoint.options)
    with atomic_write(path) as part:
        if path.suffix.lower() == portable.SUFFIX:
            parts = {name: content[name] for name in ("format", "options", "step", "run")}
            parts["checksums"] = content["checksums"]
            portable.write(part, chosen, rate=rate, content=parts if own else {})
        else:
            torch.save(content if own else chosen, part)


def link_as(path: Path, other: Path) -> None:
    """Give a finished checkpoint a second name: a hard link where possible, else a copy."""
    with atomic_write(other, hint=CHECKPOINTS_HINT) as part:
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, part)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint or bare weights onto the CPU, without executing code from the file.

    Raises:
        UserError: the file is damaged, is not a checkpoint, or holds more than tensors and plain
            types.
    """
    content = _content(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return _own_checkpoint(content, path)
    if isinstance(content, dict) and content.keys() >= {"state", "param_groups"}:
        raise _optimiser_instead(path)
    raw, averaged = bare_weights(content)
    if raw or averaged:
        ema = {"": {**raw, **averaged}} if averaged else {}  # averages may lack buffers
        return Checkpoint(options={}, step=step_of(path), model=raw or averaged, ema=ema)
    kind = type(content).__name__
    raise _unreadable_checkpoint(path, f"the {kind} in it is not a dictionary of tensors")


def _content(path: Path) -> Any:
    """Read tensors and plain types from a file."""
    try:
        if path.suffix.lower() == portable.SUFFIX:
            return portable.read(path)
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # torch warns about the protocol of other pickles
            if file.read(4) == b"PK\3\4":
                _require_intact(path)
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
    state = _content(path)
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


def recorded_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of training that a checkpoint records; bare weights show their version only."""
    if checkpoint.options:
        return {**LATER, **checkpoint.options}
    return {"version": version_of(checkpoint.model)}


def kind_of(checkpoint: Checkpoint) -> str:
    """Return the kind of a checkpoint; bare weights do not say theirs."""
    own = CLASSIFIER if "model_type" in checkpoint.options else SEGMENTATION
    return IMAGES if checkpoint.options.get("of_images") else own


def require_kind(checkpoint: Checkpoint, kind: str, path: object) -> None:
    """Raise a UserError for a checkpoint of another kind."""
    if checkpoint.options and kind != kind_of(checkpoint):
        raise UserError(path, f"is not {kind}", "Correct the path.")


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
