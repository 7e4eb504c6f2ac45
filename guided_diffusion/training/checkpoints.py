"""The checkpoints of a run: written in the background, counted, and restored bit for bit."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    BEST,
    Checkpoint,
    fitting_weights,
    numbered_checkpoints,
    save_checkpoint,
    step_of,
    usable_weights,
)
from guided_diffusion.checkpoint.sharded import ShardSet, is_sharded, own_part
from guided_diffusion.checkpoint.weights import map_tensors
from guided_diffusion.dist_util import all_gather_object, barrier, rank, side_stream
from guided_diffusion.files import Background
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.training.ema import ExponentialAverage, plain
from guided_diffusion.training.restored import refuse_unfit
from guided_diffusion.training.sharded import distribute, own_parts


@dataclass(eq=False)
class CheckpointManager:
    """Saves and restores what a run consists of, all but its step number.

    Leaving it as a context, also with an error, waits until the last checkpoint is written.

    Attributes:
        folder: of the run.
        net: that is trained.
        optimizer: of its parameters, in their order.
        scaler: of the loss.
        averages: of the parameters, by their ``--ema_rate``.
        schedule_sampler: with its history.
        recorded: the flags that a checkpoint records.
        run: what would repeat the run.
        keep: how many numbered checkpoints stay; 0 for all.
        after_save: called in the background once a checkpoint is written.
        own: the numbered checkpoints of this run.
        writer: the background job that writes.
        group: of all processes, in which they write shards; None for a network in one piece.
    """

    folder: Path
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averages: Mapping[str, ExponentialAverage]
    schedule_sampler: ScheduleSampler
    recorded: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    keep: int = 0
    after_save: Callable[[], object] = bool
    own: list[Path] = field(default_factory=list, init=False)
    writer: Background = field(default_factory=Background, init=False)
    group: dist.ProcessGroup | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if is_sharded([*self.net.parameters()]):
            self.group = dist.new_group(backend="gloo")

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(
        self, step: int, best: Mapping[str, Any], *, is_best: bool = False, numbered: bool = True
    ) -> Path:
        """Write the present state in the background; the first process does.

        Args:
            step: steps that were taken.
            best: the best validation so far, empty before the first one.
            is_best: make it the best checkpoint, too.
            numbered: give it its number and make it the latest.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        path = self.folder / (f"savedmodel{step:06d}.pt" if numbered else BEST)
        if rank() == 0 or self.group:
            self.wait()  # before the state is copied, so that there is one copy at a time
            training = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                **({"best": dict(best)} if best else {}),
            }
            state = Checkpoint(
                options=self.recorded,
                step=step,
                model=plain(self.net.state_dict()),
                ema={rate: average.state_dict() for rate, average in self.averages.items()},
                training=map_tensors(lambda tensor: tensor.detach().clone(), training),
                run=self.run,
            )
            reading = side_stream(next(self.net.parameters()).device)
            drop = self._surplus(path) if numbered else []
            shards = None
            if self.group:
                shards = ShardSet(all_gather_object(secrets.token_hex(4))[0], self.group)

            def write() -> None:
                with reading:
                    kept = Checkpoint(**map_tensors(Tensor.cpu, vars(state)))
                save_checkpoint(
                    self.folder, kept, drop=drop, best=is_best, numbered=numbered, shards=shards
                )
                if rank() == 0:
                    logger.log(f"saved {path}")
                    self.after_save()

            self.writer.start(write)
        barrier()
        return path

    def wait(self) -> None:
        """Wait for the last checkpoint; raises what kept it from being written."""
        self.writer.wait()

    def restore(
        self, checkpoint: Checkpoint, *, path: Path | None = None, missing: Collection[str] = ()
    ) -> None:
        """Continue from a checkpoint whose weights the network already has, if it is not sharded.

        Args:
            checkpoint: the state.
            path: its file; in the run's folder, numbered files up to its step belong to the run.
            missing: parameters that its optimiser did not have; their moments start from zero.

        Raises:
            UserError: its averages or its training state do not belong to this run.
        """
        usable = usable_weights
        if self.group and path:
            checkpoint, usable = distribute(checkpoint, self.net, path), fitting_weights
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        known = [index for index, name in enumerate(names) if name not in missing]
        state, own = checkpoint.training, self.schedule_sampler.state_dict()
        held = map_tensors(lambda tensor: own_part(tensor).cpu(), state)
        owners = own_parts(parameters[index] for index in known)
        refuse_unfit(held, owners, own, path or "the checkpoint")
        averages = {
            rate: usable(self.net, checkpoint.ema[rate], path or "the checkpoint")
            for rate in self.averages
            if rate in checkpoint.ema
        }
        if path and path.resolve().parent == self.folder.resolve():
            files = numbered_checkpoints(self.folder)
            self.own = [file for file in files if step_of(file) <= checkpoint.step]
        for rate, average in self.averages.items():
            average.load(averages.get(rate, checkpoint.model))
        if new := [rate for rate in self.averages if rate not in checkpoint.ema]:
            logger.log(
                f"--ema_rate {','.join(new)}: the checkpoint has no such average, it starts from "
                "the present weights"
            )
        if state.get("scaler"):  # empty where nothing was scaled
            self.scaler.load_state_dict(state["scaler"])
        history = state.get("schedule_sampler", own)
        if history.keys() == own.keys():
            self.schedule_sampler.load_state_dict(history)
        else:
            logger.log("--schedule_sampler is not the checkpoint's: its history starts anew")
        if state:
            moments = fitted_moments(state["optimizer"]["state"], parameters, known)
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def _surplus(self, path: Path) -> list[Path]:
        """List the run's numbered checkpoints that go once ``path`` is written.

        What an earlier run has left in the folder does not belong to the run, and stays.
        """
        own = [*(file for file in self.own if file != path), path]
        self.own = own[-self.keep :]
        return own[: -self.keep]


def fitted_moments(
    moments: dict[int, dict[str, Any]], parameters: Sequence[Tensor], known: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Bring an optimiser's moments into the memory order of the parameters they belong to.

    The optimiser's i-th parameter is our ``known[i]``-th. Moments are cut as the parents'
    two-channel head was cut, if it was. Steps are plain numbers where an old torch wrote them.
    """

    def fitted(value: Tensor | float, parameter: Tensor) -> Tensor:
        if is_sharded(value):  # divided as the parameter is
            return cast(Tensor, value)
        value = torch.as_tensor(value, dtype=torch.float32)
        return torch.empty_like(parameter).copy_(value[: len(parameter)]) if value.ndim else value

    return {
        own: {name: fitted(value, parameters[own]) for name, value in moments[index].items()}
        for index, own in enumerate(known)
        if index in moments
    }
