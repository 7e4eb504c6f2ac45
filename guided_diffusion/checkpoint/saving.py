"""Writing of checkpoints: each file appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.checkpoint import portable
from guided_diffusion.checkpoint.content import Checkpoint
from guided_diffusion.checkpoint.folders import BEST, LATEST
from guided_diffusion.checkpoint.portable import FORMAT
from guided_diffusion.checkpoint.sharded import ShardSet, remove_unnamed, write_shards
from guided_diffusion.checkpoint.weights import checksums
from guided_diffusion.errors import UserError
from guided_diffusion.files import CHECKPOINTS_HINT, atomic_write, writing


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    drop: Iterable[Path] = (),
    best: bool = False,
    numbered: bool = True,
    shards: ShardSet | None = None,
) -> Path:
    """Write ``savedmodelNNNNNN.pt`` and link ``savedmodel.pt`` to it; each appears whole.

    Older ones in ``drop`` are deleted once it is written. With ``best``, ``bestmodel.pt`` is linked
    to it as well; if it is not ``numbered``, only ``bestmodel.pt`` is written. Where tensors are
    sharded, each process calls this, for its ``shards``, and the first writes the file.

    Raises:
        UserError: the folder cannot be written; earlier checkpoints are unchanged.
    """
    path = folder / (f"savedmodel{checkpoint.step:06d}.pt" if numbered else BEST)
    if shards:
        with writing(path, hint=CHECKPOINTS_HINT):
            content = write_shards(folder, vars(checkpoint), shards)
        if not shards.first:
            return path
    else:
        content = _recorded_content(checkpoint)
    for partial in folder.glob(".part-*model*.pt"):  # left by a killed process
        partial.unlink(missing_ok=True)
    with atomic_write(path, hint=CHECKPOINTS_HINT) as part:
        torch.save(content, part)
    for name in [LATEST] * numbered + [BEST] * (best and numbered):
        link_as(path, folder / name)
    for old in drop:
        old.unlink(missing_ok=True)
    remove_unnamed(folder)
    return path


def _recorded_content(checkpoint: Checkpoint) -> dict[str, Any]:
    content = vars(checkpoint)
    return {"format": FORMAT, **content, "checksums": checksums(content)}


def export_weights(
    checkpoint: Checkpoint, weights: str, path: Path, *, precision: str = "fp32"
) -> None:
    """Write one set of weights and the options, without what training needs, for use elsewhere.

    Args:
        checkpoint: of this suite, or bare weights.
        weights: ``ema`` or ``raw``, as :meth:`Checkpoint.choose` has it.
        path: of the file, which ends in ``.safetensors`` or in ``.pt``.
        precision: ``fp16`` rounds floating-point numbers to half precision; ``fp32`` keeps them.

    Raises:
        UserError: the file cannot be written, or a weight is beyond the range of half precision.
    """
    chosen, _ = checkpoint.choose(weights)
    rate = next((rate for rate, average in checkpoint.ema.items() if average is chosen), None)
    if precision == "fp16":
        chosen = {name: _halved(name, value) for name, value in chosen.items()}
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


def _halved(name: str, value: Tensor) -> Tensor:
    """Round to half precision; whole numbers stay."""
    half = value.half() if value.is_floating_point() else value
    if value.isfinite().all() and not half.isfinite().all():
        problem = f"tensor {name} holds numbers above 65504, the largest one of half precision"
        raise UserError("--precision fp16", problem, "Use --precision fp32.")
    return half


def export_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a whole checkpoint as one file, such as one that was in shards.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_write(path) as part:
        torch.save(_recorded_content(checkpoint), part)


def link_as(path: Path, other: Path) -> None:
    """Give a finished checkpoint a second name: a hard link where possible, else a copy."""
    with atomic_write(other, hint=CHECKPOINTS_HINT) as part:
        part.unlink(missing_ok=True)
        try:
            part.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, part)
