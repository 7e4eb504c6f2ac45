"""Checkpoint files that describe themselves, and the import of bare weights.

A checkpoint holds options, weights, averaged weights and training state as tensors and plain types,
so that loading it executes no code. It appears whole or not at all. Bare weights, a dictionary of
tensors as Diffusion-based-Segmentation and MedSegDiff save it, are read as well, also those that
other training loops put into a dictionary; what a published file lacks is completed
(:func:`adapt_weights`).
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.data.folders import listing
from guided_diffusion.errors import UserError
from guided_diffusion.files import CHECKPOINTS_HINT, atomic_write, expanded, nearest_path
from guided_diffusion.options.segmentation import LATER
from guided_diffusion.unet import UNetModel

FORMAT = "guided_diffusion checkpoint 1"
LATEST = "savedmodel.pt"
BEST = "bestmodel.pt"
SEGMENTATION = "a segmentation network, which scripts/segmentation_train.py trains"
IMAGES = "a diffusion of images, which scripts/train_tumor_ddfm.py trains"
CLASSIFIER = "a classifier of images, which scripts/classifier_tumor_train.py trains"
Weights = dict[str, Tensor]
WRAPPERS = ("module", "_orig_mod")
"""Parts of tensor names that DataParallel, DistributedDataParallel and torch.compile add."""
RAW = ("model", "state_dict", "model_state_dict")
AVERAGED = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict")
"""Where other training loops keep the last and the averaged weights."""


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
    """

    options: dict[str, Any]
    step: int
    model: Weights
    ema: dict[str, Weights] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def choose(self, weights: str) -> tuple[Weights, str]:
        """Return the weights to sample with, and a phrase that names them.

        Args:
            weights: ``ema`` for the slowest average, or the last weights if there is none; or
                ``raw`` for the last weights.
        """
        if weights == "ema" and self.ema:
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
        torch.save({"format": FORMAT, **vars(checkpoint)}, part)
    for name in [LATEST] * numbered + [BEST] * (best and numbered):
        link_as(path, folder / name)
    for old in drop:
        old.unlink(missing_ok=True)
    return path


def numbered_checkpoints(folder: Path) -> list[Path]:
    """List the ``savedmodelNNNNNN.pt`` of a folder, ordered by step."""
    return sorted(folder.glob("savedmodel[0-9]*.pt"), key=step_of)


def link_as(path: Path, other: Path) -> None:
    """Give a finished checkpoint a second name: a hard link where possible, else a copy."""
    with atomic_write(other, hint=CHECKPOINTS_HINT) as part:
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, part)


def step_of(path: Path) -> int:
    """Read the step from a file name: the number between the last ``model`` and the dot, or 0."""
    number = str(path).rpartition("model")[2].partition(".")[0]
    return int(number) if number.isdecimal() else 0


def latest_checkpoint(path: str | Path, *, flag: str = "--model_path") -> Path:
    """Find the checkpoint that a path names: a file, or the latest one in a folder.

    Raises:
        UserError: there is none; ``flag`` names the path in the message.
    """
    file = expanded(path, flag=flag)
    if file.is_dir():
        numbered = numbered_checkpoints(file)
        file = (file / LATEST) if (file / LATEST).exists() or not numbered else numbered[-1]
    if not file.is_file():
        raise UserError(
            flag,
            f"there is no file {file}" if str(path) else "no path given",
            nearest_path(
                expanded(path, flag=flag),
                f"Name a checkpoint or a folder that holds {LATEST}, or train one first.",
            ),
        )
    return file


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint or bare weights onto the CPU, without executing code from the file.

    Raises:
        UserError: the file is damaged, is not a checkpoint, or holds more than tensors and plain
            types.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the protocol of other pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other files can fail in any way
        raise _unreadable_checkpoint(path, _why(error)) from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        names = [part.name for part in fields(Checkpoint)]
        kinds = [int if name == "step" else dict for name in names]
        if content.keys() == {"format", *names} and all(
            map(isinstance, map(content.get, names), kinds)
        ):
            del content["format"]
            return Checkpoint(**content)
        problem = f"its parts are not those of a checkpoint, {', '.join(names)}"
        raise _unreadable_checkpoint(path, problem)
    if isinstance(content, dict) and content.keys() >= {"state", "param_groups"}:
        raise _optimiser_instead(path)
    raw, averaged = _bare_weights(content)
    if raw or averaged:
        ema = {"": {**raw, **averaged}} if averaged else {}  # averages may lack buffers
        return Checkpoint(options={}, step=step_of(path), model=raw or averaged, ema=ema)
    kind = type(content).__name__
    raise _unreadable_checkpoint(path, f"the {kind} in it is not a dictionary of tensors")


def _bare_weights(content: object, depth: int = 3) -> tuple[Weights, Weights]:
    """Find the last and the averaged weights in nested dictionaries; empty where there are none.

    Tensor names lose what wrappers add to them.
    """
    if not isinstance(content, dict) or not content or not depth:
        return {}, {}
    if all(map(_is_weight, content.items())):
        names = content.keys() - {"n_averaged"}  # a count that torch's AveragedModel adds
        return {_own_name(name): content[name].data for name in content if name in names}, {}
    raw: Weights = {}
    averaged: Weights = {}
    for name in RAW:
        if not raw:
            raw, averaged = _bare_weights(content.get(name), depth - 1)
    for name in AVERAGED:
        averaged = averaged or next(filter(None, _bare_weights(content.get(name), depth - 1)), {})
    return raw, averaged


def _own_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


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
            state = torch.load(file, map_location="cpu", weights_only=True)
            training = {"optimizer": state}
    return replace(checkpoint, ema=ema, training=training)


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _unreadable_checkpoint(path: Path, problem: str) -> UserError:
    return UserError(
        path,
        problem,
        "Use a checkpoint of this suite or a dictionary of tensors, such as an earlier checkpoint "
        "of the run, or copy the file again from its source.",
    )


def _why(error: Exception) -> str:
    """Say why torch could not load a file; torch's own message advises to trust the file."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"holds objects that could run code ({code[1]})"
    if isinstance(error, OSError | RuntimeError) and str(error):
        return f"cannot be read ({str(error).splitlines()[0]})"
    return "is damaged or not a checkpoint"


def version_of(weights: Iterable[str]) -> str:
    """Infer the ``--version`` of bare weights from the names of their tensors."""
    marks = {"2": "ss_former.", "1": "hwm.ffparser.", "new": "hwm."}
    names = list(weights)
    for version, mark in marks.items():
        if any(name.startswith(mark) for name in names):
            return version
    has_time = any(name.startswith("time_embed.") for name in names)
    return "unet" if "input_blocks.0.0.weight" in names and not has_time else "plain"


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Load weights into a network whose tensors they have to match in name and shape.

    Two tensors may be larger, and only their first channels are used: an output layer that also has
    variance channels, which the parent projects always store, and a label embedding of more classes
    than the network has.

    Raises:
        UserError: a tensor differs; the message names the first one and both shapes.
    """
    own = net.state_dict()
    given = {name: _cut(name, value, own) for name, value in weights.items()}
    for name in [*own, *given]:
        in_file, in_net = (
            f"has shape {tuple(side[name].shape)}" if name in side else "is absent"
            for side in (given, own)
        )
        if in_file != in_net:
            raise UserError(
                path,
                f"tensor {name} {in_file}, but in the network that the flags describe it {in_net}",
                "Give the flags that the weights were trained with (--num_channels, "
                "--num_res_blocks, --attention_resolutions, --learn_sigma, ...).",
            )
    net.load_state_dict(given)


def _cut(name: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    if name in ("out.2.weight", "out.2.bias") and name in own and len(value) == 2 * len(own[name]):
        return value[: len(own[name])]
    if name == "label_emb.weight" and name in own:
        return value[: len(own[name])]
    return value


def recorded_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of training that a checkpoint records; bare weights show their version only."""
    if checkpoint.options:
        return {**LATER, **checkpoint.options}
    return {"version": version_of(checkpoint.model)}


def require_kind(checkpoint: Checkpoint, kind: str, path: object) -> None:
    """Raise a UserError for a checkpoint of another kind; bare weights do not say theirs."""
    options = checkpoint.options
    own = CLASSIFIER if "model_type" in options else SEGMENTATION
    if options and kind != (IMAGES if options.get("of_images") else own):
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
