"""One self-describing file per checkpoint, and the import of weights that describe nothing.

A checkpoint holds options, weights, averaged weights and the state of training, as tensors and
plain types only, so that it is loaded without executing anything. It appears whole or not at all.
Bare weights of Diffusion-based-Segmentation and MedSegDiff (a dictionary of tensors) are read as
well.
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
from guided_diffusion.files import INTACT, atomic_write
from guided_diffusion.options.segmentation import LATER
from guided_diffusion.unet import UNetModel

FORMAT = "guided_diffusion checkpoint 1"
LATEST = "savedmodel.pt"
BEST = "bestmodel.pt"
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        options: the flags that describe network, diffusion and data, by name; empty for bare
            weights.
        step: training steps taken.
        model: the last weights, by tensor name.
        ema: averaged weights by their decay rate as text; empty for bare weights.
        training: whatever the training loop needs to go on; empty for bare weights.
    """

    options: dict[str, Any]
    step: int
    model: Weights
    ema: dict[str, Weights] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def choose(self, weights: str) -> tuple[Weights, str]:
        """Return the weights to sample with and a phrase that says which they are.

        Args:
            weights: ``ema`` for the slowest average there is, else the last weights; or ``raw``.
        """
        if weights == "ema" and self.ema:
            rate = max(self.ema, key=float)
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
    """Write ``savedmodelNNNNNN.pt`` and make ``savedmodel.pt`` the same; each appears whole.

    Older ones to ``drop`` go once it is there. With ``best``, the file is ``bestmodel.pt`` as well,
    and that alone where it is not to be ``numbered``.

    Raises:
        UserError: the folder cannot be written; earlier checkpoints are as they were.
    """
    for killed in folder.glob(".part-*model*.pt"):
        killed.unlink(missing_ok=True)
    path = folder / (f"savedmodel{checkpoint.step:06d}.pt" if numbered else BEST)
    with atomic_write(path, hint=INTACT) as part:
        torch.save({"format": FORMAT, **vars(checkpoint)}, part)
    for name in [LATEST] * numbered + [BEST] * (best and numbered):
        link_as(path, folder / name)
    for old in drop:
        old.unlink(missing_ok=True)
    return path


def numbered_checkpoints(folder: Path) -> list[Path]:
    """A folder's ``savedmodelNNNNNN.pt``, by their steps."""
    return sorted(folder.glob("savedmodel[0-9]*.pt"), key=step_of)


def link_as(path: Path, other: Path) -> None:
    """Give a finished checkpoint a second name, on the same bytes where the disk can."""
    with atomic_write(other, hint=INTACT) as part:
        _link_or_copy(path, part)


def step_of(path: Path) -> int:
    """Read the step from a checkpoint's name: the number between its last ``model`` and the dot."""
    number = str(path).rpartition("model")[2].partition(".")[0]
    return int(number) if number.isdecimal() else 0


def _link_or_copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def latest_checkpoint(path: str | Path, *, flag: str = "--model_path") -> Path:
    """Find the checkpoint that a path means: a file, or a folder's latest one.

    Raises:
        UserError: there is none.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        numbered = numbered_checkpoints(file)
        file = (file / LATEST) if (file / LATEST).exists() or not numbered else numbered[-1]
    if not file.is_file():
        raise UserError(
            flag,
            found=f"no file {file}" if str(path) else "nothing",
            expected=f"a checkpoint, or a folder that holds {LATEST}",
            hint="Train one first, or correct the path.",
        )
    return file


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint or bare weights onto the CPU, executing nothing.

    Raises:
        UserError: the file is damaged, is no checkpoint, or holds more than tensors and plain
            types.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses about the protocol of what is no pickle
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint can fail in any way
        raise _unreadable_checkpoint(path, _why(error)) from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.keys() == {"format", *(part.name for part in fields(Checkpoint))}:
            del content["format"]
            return Checkpoint(**content)
        raise _unreadable_checkpoint(path, f"a checkpoint of {', '.join(map(str, content))}")
    if isinstance(content, dict) and content and all(map(_is_weight, content.items())):
        weights = {name.removeprefix("module."): value.data for name, value in content.items()}
        return Checkpoint(options={}, step=step_of(path), model=weights)
    raise _unreadable_checkpoint(path, f"a {type(content).__name__} of something else")


def with_companions(checkpoint: Checkpoint, path: Path, rates: Iterable[str]) -> Checkpoint:
    """Add to bare weights what the parents saved beside them: averages and the optimiser.

    ``emasavedmodel_{rate}_{N}.pt`` (or ``ema_...``) and ``optsavedmodel{N}.pt`` (or ``opt...``),
    where N is in the weights' own name, or the weak-supervision seed's ``ema_{rate}.pt``; what is
    not there starts anew.
    """
    ema, number = {}, f"{checkpoint.step:06d}"
    for rate in rates:
        for name in (
            f"emasavedmodel_{rate}_{number}.pt",
            f"ema_{rate}_{number}.pt",
            f"ema_{rate}.pt",
        ):
            if (path.parent / name).exists():
                ema[rate] = load_checkpoint(path.parent / name).model
    training = {}
    for name in (f"optsavedmodel{number}.pt", f"opt{number}.pt"):
        if (path.parent / name).exists():
            state = torch.load(path.parent / name, map_location="cpu", weights_only=True)
            training = {"optimizer": state}
    return replace(checkpoint, ema=ema, training=training)


def _is_weight(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _unreadable_checkpoint(path: Path, found: str) -> UserError:
    return UserError(
        path,
        found=found,
        expected="a checkpoint of this suite, or a dictionary of tensors",
        hint="Use an earlier checkpoint of the run, or copy the file again from where it came.",
    )


def _why(error: Exception) -> str:
    """Say why torch could not load a file; its own words advise to trust the file."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"objects that could run code ({code[1]})"
    if isinstance(error, OSError | RuntimeError) and str(error):
        return f"an unreadable file ({str(error).splitlines()[0]})"
    return "a damaged file, or one of another kind"


def version_of(weights: Iterable[str]) -> str:
    """Which ``--version`` bare weights are of, told by the names of their tensors."""
    marks = {"2": "ss_former.", "1": "hwm.ffparser.", "new": "hwm."}
    names = list(weights)
    for version, mark in marks.items():
        if any(name.startswith(mark) for name in names):
            return version
    return "plain"


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Put weights into a network that they fit exactly.

    A head that has a variance channel where the network learns none is cut to its first channels:
    the parents always store both. So are embeddings of more classes than the network has.

    Raises:
        UserError: naming the first tensor that differs, and both shapes.
    """
    own = net.state_dict()
    given = {name: _cut(name, value, own) for name, value in weights.items()}
    for name in [*own, *given]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (given, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                path,
                found=f"{name} of shape {shapes[0] or '(absent)'}",
                expected=f"shape {shapes[1] or '(absent)'} for the network that the flags describe",
                hint="Give the flags the weights were trained with (--num_channels, "
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


def adapt_weights(
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


def missing_weights_note(lacking: Sequence[str], *, training: bool = False) -> str:
    """Say what published weights lacked."""
    start = "they start as in a new network" if training else "set to the expectation of that"
    return (
        f"the weights lack {listing(lacking, most=2)}, which their network drew at random in every "
        f"call: {start}"
    )
