"""The training loop: finite, resumable, and a pure function of its seed.

Nothing random outlives a step. What the loop draws at step n (images, times, noise, dropout)
follows from the seed and n alone, so a resumed run repeats the uninterrupted one bit for bit on a
CPU with the same number of threads, whatever the number of reading processes.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.checkpoint import Checkpoint
from guided_diffusion.data.batches import Batch
from guided_diffusion.dist_util import (
    all_gather,
    all_gather_object,
    any_rank,
    autocast,
    barrier,
    compiling,
    describe,
    launched,
    no_sync,
    rank,
    world_size,
)
from guided_diffusion.errors import Stopped, UserError
from guided_diffusion.files import expanded, remove_leftovers
from guided_diffusion.inference.precision import device_notes, resolve_precision, set_up_kernels
from guided_diffusion.inference.run_lock import TRAINING, only_run
from guided_diffusion.report.progress import Progress, plain_loss
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import parameter_count
from guided_diffusion.training.checkpoints import CheckpointManager
from guided_diffusion.training.ema import ExponentialAverage
from guided_diffusion.training.estimates import memory_guarded
from guided_diffusion.training.forecast import TimeForecast, announce_need
from guided_diffusion.training.reading import BatchReader
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.sharded import replicate, share_buffers, whole_average
from guided_diffusion.training.step_log import StepLog
from guided_diffusion.training.steps import (
    GRAPHS,
    StepInputs,
    clip_gradient,
    last_step,
    learning_rate,
    not_finite,
    prepare_step,
    refuse_graphs,
)
from guided_diffusion.training.stop_signal import StopSignal
from guided_diffusion.training.validation import BestScore
from guided_diffusion.unet import EncodeAndPredict, UNetModel


class TrainLoop:
    """Train a network on a data set, and write log and checkpoints into a folder.

    Under ``torchrun`` every process has its own loop: each takes its share of the step's cases and
    noise, and the gradients are averaged, so that two processes of batch 4 are one of batch 8.

    Args:
        setup: the network, its data and the options.
    """

    def __init__(self, setup: TrainSetup) -> None:
        self.setup = setup
        self.net = net = setup.net
        self.model = replicate(net if setup.losses else EncodeAndPredict(cast(UNetModel, net)))
        self.diffusion = setup.diffusion
        self.options = options = setup.options
        self.device = device = next(net.parameters()).device
        precision = resolve_precision(setup.run.precision, device)
        self.run = run = replace(setup.run, precision=precision)
        refuse_graphs(run.compile, options, cuda=device.type == "cuda")
        set_up_kernels(device, tf32=run.tf32, one_size=True)
        self.schedule_sampler = create_named_schedule_sampler(
            options.schedule_sampler, len(self.diffusion.kept)
        )
        self.step = self.start = self.bad_steps = 0
        self.last_step = last_step(options)  # 0 for never
        self.fitting = 0  # images that are expected to fit at a time, once that is known
        self.best = BestScore()
        self.stop = StopSignal()

        self.parameters = list(net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=options.lr,
            weight_decay=options.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        scaled = precision == "fp16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.averages = {
            rate: ExponentialAverage(net, float(rate)) for rate in options.ema_rate.split(",")
        }
        self.log = StepLog(len(self.diffusion.schedule), kinds=self.diffusion.mask_dropout < 1)
        self.checkpoints = CheckpointManager(
            expanded(run.out_dir),
            net=net,
            optimizer=self.optimizer,
            scaler=self.scaler,
            averages=self.averages,
            schedule_sampler=self.schedule_sampler,
            recorded=setup.recorded,
            run=setup.record,
            keep=options.keep,
            after_save=setup.after_save,
        )
        self.reader = BatchReader(self._prepare, options, device, self.stop)
        self._set_rate()

    def restore(
        self, checkpoint: Checkpoint, *, path: Path | None = None, missing: Collection[str] = ()
    ) -> None:
        """Continue from a checkpoint: see :meth:`CheckpointManager.restore`."""
        self.checkpoints.restore(checkpoint, path=path, missing=missing)
        self.step = checkpoint.step
        self.best = BestScore(checkpoint.training.get("best", {}))
        self._set_rate()

    def run_loop(self) -> Path:
        """Train to the end, or until a signal, and return the last checkpoint.

        A signal ends the run after the step, and a file that cannot be read before it; the state
        is saved in any case.

        Raises:
            UserError: not all processes start at the same step; a case cannot be read.
            Stopped: a signal, before the first step or for the second time.
        """
        starts = all_gather(torch.tensor([self.step])).tolist()
        if len(set(starts)) > 1:
            raise UserError(
                f"--out_dir {self.checkpoints.folder}",
                f"the processes would continue from different steps, {starts}",
                "Use a folder on a file system that all nodes share.",
            )
        self.start = start = self.step
        total, patience = self.last_step, self.setup.watch.patience
        batches = self.reader.begin(self.setup, start)
        forecast = TimeForecast(start, total, self.device)
        bar = Progress(initial=start, total=total or None, unit="step", quiet=rank() > 0)
        error, failed = None, False
        with closing(batches), self.checkpoints, self.stop as stop:
            with bar as progress:
                if self.best.owed and self._validate(progress, owed=True):
                    self.save(best=True, numbered=False)
                while not total or self.step < total:
                    batch, error = self.reader.next(self.step)
                    if any_rank(batch is None) or batch is None:
                        failed = any_rank(error is not None)
                        break
                    compiles = self.run.compile and self.step == start
                    with (
                        self._memory_guarded(save=False),
                        compiling(compiles),
                        stop.at_once(bool(compiles)),
                    ):
                        loss = self.run_step(batch)
                    if compiles:
                        logger.log(f"compiled in {self.log.restart():.0f} s")
                    progress.step(say=partial(plain_loss, loss))
                    if text := forecast.after(self.step):
                        with progress.external_write_mode(sys.stdout):
                            logger.log(text)
                    if self._due(self.options.log_interval) or self.step == total:
                        progress.set_postfix(loss=f"{loss:.4f}")
                        self._write_log(progress)
                    better = self._validate(progress)
                    if self._due(self.options.save_interval) and self.step != total:
                        self.save(best=better)
                    elif better:
                        self.save(best=True, numbered=False)
                    if patience and any_rank(self.best.is_stale(patience, self.step)):
                        break
            if stop.wanted:
                logger.log(f"stopped by {stop.wanted} at step {self.step}; --resume auto continues")
            path = self.save()
            self.checkpoints.wait()
            if failed:
                barrier()  # a process that ends with an error lets the launcher end the others
            if error:
                raise error
            return path

    def _prepare(self, batch: Batch, step: int) -> StepInputs:
        return prepare_step(
            batch,
            self.setup.prepare_batch,
            self.schedule_sampler,
            self.diffusion,
            seed=self.run.seed,
            step=step,
            device=self.device,
        )

    def _memory_guarded(self, *, save: bool) -> AbstractContextManager[None]:
        """Report that memory ran out; of several processes the others may wait, so none saves."""
        rescue, known = self._rescue if save else self._free, (self.options, self.step, self.device)
        graphs = self.run.compile in GRAPHS
        return memory_guarded(*known, rescue, fitting=self.fitting, graphs=graphs)

    def _free(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _rescue(self) -> None:
        self._free()
        if world_size() == 1:
            self.save()
            self.checkpoints.wait()

    def run_step(self, batch: Batch) -> Tensor:
        """Take one optimiser step on a batch and return its mean loss, a scalar tensor.

        A step whose gradient is not finite changes nothing and is counted.

        Raises:
            UserError: too many such steps in a row.
        """
        before = [buffer.clone() for buffer in self.net.buffers()]
        with self._memory_guarded(save=self.step > self.start):
            try:
                loss = self.forward_backward(batch)
            except (RuntimeError, MemoryError):
                for buffer, old in zip(self.net.buffers(), before, strict=True):
                    buffer.copy_(old)
                raise
        self.scaler.unscale_(self.optimizer)
        norm = self.log.gradient(self.parameters)
        for buffer, old in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        if self.step + 1 != self.last_step:
            self.reader.read_ahead(self.step + 1)
        if self._usable(norm, batch):  # waits for the device
            clip_gradient(self.parameters, norm, self.options.grad_clip)
            self.scaler.step(self.optimizer)
            for average in self.averages.values():
                average.update(self.step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._set_rate()
        return loss

    def forward_backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the whole batch by microbatches; return its mean loss."""
        inputs = self.reader.inputs(batch, self.step)
        x0, y, drawn = inputs.x0, inputs.y, inputs.drawn

        total, losses = torch.zeros((), device=self.device), list[Tensor]()
        size = self.options.microbatch if self.options.microbatch > 0 else len(x0)
        scored_by = self.setup.losses or self.diffusion.training_losses
        for first in range(0, len(x0), size):
            rows = slice(first, first + size)
            with no_sync(self.model, first + size < len(x0)):
                with autocast(self.device, self.run.precision):
                    terms = scored_by(
                        self.model,
                        x0[rows],
                        drawn.t[rows],
                        eps=drawn.eps[rows],
                        condition=inputs.condition[rows],
                        y=None if y is None else y[rows],
                        withheld=drawn.withheld[rows],
                    )
                    loss = (terms["loss"] * drawn.weights[rows]).sum() / len(x0)
                    if "coarse" in terms:
                        loss = loss + terms["coarse"].sum() / len(x0)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            terms = {name: values.detach() for name, values in terms.items()}
            losses.append(terms["loss"])
            self.log.losses(drawn.t[rows], terms, drawn.withheld[rows])
        share_buffers(self.net)
        if self.schedule_sampler.learns:  # NaN is skipped
            seen = torch.cat(losses).masked_fill(drawn.withheld.to(self.device), torch.nan)
            self.schedule_sampler.update(all_gather(drawn.positions), all_gather(seen))
        return total

    def _usable(self, norm: Tensor, batch: Batch) -> bool:
        """Return whether the gradient is finite; count the steps in a row for which it is not.

        With a scaled loss that is expected until the scaler has found a suitable scale.
        """
        if bool(norm.isfinite()):
            self.bad_steps = 0
            return True
        self.log.skipped += 1
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return False
        self.bad_steps += 1
        if self.bad_steps >= self.options.max_bad_steps:
            cases = ", ".join(chain(*all_gather_object(batch.names)))
            raise not_finite(self.step, self.bad_steps, cases)
        return False

    def save(self, *, best: bool = False, numbered: bool = True) -> Path:
        """Write a checkpoint of the present state: see :meth:`CheckpointManager.save`."""
        return self.checkpoints.save(self.step, self.best.state, is_best=best, numbered=numbered)

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _validate(self, progress: tqdm[Any], *, owed: bool = False) -> bool:
        """Score the slowest average if validation is due, and return whether it is the best so far.

        The first process scores; all get the same answer. A signal interrupts it; it is repeated
        when the run is resumed, since it is still ``owed``.
        """
        setup = self.setup
        interval = setup.watch.val_interval or self.options.save_interval
        if not (owed or self._due(interval) or self.step == self.last_step):
            return False
        slowest = self.averages[max(self.averages, key=float)]
        weights, score = whole_average(slowest, wanted=setup.validate is not None), None
        try:
            with self._memory_guarded(save=True), self.stop.at_once(setup.validate is not None):
                score = setup.validate and setup.validate(weights, self.step)
        except Stopped:
            self.best.owe()
        if score is None:
            return any_rank(False)
        logger.logkv("step", self.step)
        for name, value in score._asdict().items():
            logger.logkv(f"val_{name}", value)
        with progress.external_write_mode(sys.stdout):
            logger.dumpkvs()
        return any_rank(self.best.update(score, self.step))

    def _set_rate(self) -> None:
        """Set the learning rate of the step to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.step)

    def _write_log(self, progress: tqdm[Any]) -> None:
        self.log.report(
            step=self.step,
            last=self.last_step,
            samples=self.step * self.options.batch_size * world_size(),
            lr=self.optimizer.param_groups[0]["lr"],
            parameters=self.parameters,
        )
        with progress.external_write_mode(sys.stdout):
            logger.dumpkvs()


def run_training(setup: TrainSetup) -> Path:
    """Announce a run, restore what it continues, and train; returns the last checkpoint.
    Raises:
        UserError: another training writes into the folder.
        SystemExit: a signal ended the run; the exit code tells the shell so. A launcher is told
            of success, since it would start the processes again.
    """
    with only_run(expanded(setup.run.out_dir), TRAINING):
        return _run(setup)


def _run(setup: TrainSetup) -> Path:
    folder = None if rank() else setup.run.out_dir
    logger.configure(folder, quiet=rank() > 0, sinks=setup.sinks)
    loop = TrainLoop(setup)
    if setup.start:
        loop.restore(setup.start, path=setup.path, missing=setup.missing)
        logger.log(f"resuming {setup.path} at step {setup.start.step}")
    if setup.alias and rank() == 0:
        remove_leftovers(setup.alias.parent)
    logger.rewind(loop.step, new=setup.start is None and setup.options.resume != "auto")
    precision, device = loop.run.precision, loop.device
    for note in [*setup.announce(), *device_notes(precision, device, tf32=loop.run.tf32)]:
        logger.log(note)
    logger.log(
        f"{setup.data}; {parameter_count(setup.net)} on {describe(device)}, {precision}; "
        f"steps {loop.step} to {loop.last_step or 'no end'}"
    )
    loop.fitting = announce_need(loop.net, loop.options, precision, device)
    try:
        path = loop.run_loop()
    finally:
        for sink in setup.sinks:
            sink.close()
    if loop.stop.wanted and not launched():
        raise SystemExit(loop.stop.code)
    return path
