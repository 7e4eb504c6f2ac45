"""The training loop: finite, resumable, and a pure function of its seed.

Nothing random outlives a step. What the loop draws at step n (images, times, noise, dropout)
follows from the seed and n alone, so a run that is resumed repeats the uninterrupted one bit for
bit on a CPU, whatever the number of reading processes. Wired by ``runs``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    BEST,
    Checkpoint,
    numbered_checkpoints,
    save_checkpoint,
    step_of,
)
from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import Batch, TrainingBatch, mix, prepare_masks, training_batches
from guided_diffusion.data.datasets import Case
from guided_diffusion.dist_util import (
    all_gather,
    all_gather_object,
    any_rank,
    autocast,
    barrier,
    compiling,
    launched,
    memory_gib,
    no_sync,
    rank,
    side_stream,
    world_size,
    wrap_ddp,
)
from guided_diffusion.errors import UserError
from guided_diffusion.files import Background
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, Losses
from guided_diffusion.nn import Output
from guided_diffusion.options.segmentation import RunOptions, TrainingOptions, WatchOptions
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.training.checkpoints import copied, fitted_moments, on_cpu
from guided_diffusion.training.ema import ExponentialAverage, plain
from guided_diffusion.training.step_log import StepLog
from guided_diffusion.training.stop_signal import StopSignal
from guided_diffusion.training.validation import Validate
from guided_diffusion.unet import UNetModel

ECHO = 5.0
"""Seconds within which a launcher may repeat a signal that this process has had already."""


class TrainLoop:
    """Train a network on a data set, and write log and checkpoints into a folder.

    Under ``torchrun`` every process has its own loop: each takes its share of the step's cases and
    noise, and the gradients are averaged, so that two processes of batch 4 are one of batch 8.

    Args:
        net: on the device it is trained on.
        diffusion: what is predicted, and how it is scored.
        dataset: cases at the network's size.
        schedule_sampler: draws the times.
        options: of the loop.
        run: folder, seed and precision.
        recorded: the flags a checkpoint has to remember.
        watch: when it is validated, and when that ends it.
        validate: scores averaged weights; called in the first process alone.
        after_save: called in the background once a checkpoint is written.
        lesson: what a batch teaches.
        losses: scores ``net`` itself; None for the diffusion's, of a U-Net that encodes the
            condition.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        diffusion: GaussianDiffusion,
        *,
        dataset: Dataset[Case],
        schedule_sampler: ScheduleSampler,
        options: TrainingOptions,
        run: RunOptions,
        recorded: dict[str, Any],
        watch: WatchOptions | None = None,
        validate: Validate | None = None,
        after_save: Callable[[], object] = bool,
        lesson: Callable[[Batch], TrainingBatch] = prepare_masks,
        losses: Losses | None = None,
    ) -> None:
        self.net = net
        self.whole = wrap_ddp(net if losses else _Whole(net))
        self.lesson = lesson
        self.losses = losses
        self.diffusion = diffusion
        self.dataset = dataset
        self.schedule_sampler = schedule_sampler
        self.options = options
        self.run = run
        self.recorded = recorded
        self.watch = watch or WatchOptions()
        self.validate = validate
        self.after_save = after_save
        self.folder = Path(run.out_dir).expanduser()
        self.step = 0
        self.bad_steps = 0
        self.best: dict[str, Any] = {"step": 0, "since": 0}
        self.own: list[Path] = []
        self.writer = Background()

        self.device = next(net.parameters()).device
        self.parameters = list(net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=options.lr,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        fp16_on_cuda = run.precision == "fp16" and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16_on_cuda)
        self.averages = {
            rate: ExponentialAverage(net, float(rate)) for rate in options.ema_rate.split(",")
        }
        self.log = StepLog(len(diffusion.schedule))
        self._set_rate()

    @property
    def last_step(self) -> int:
        """The step to stop at; 0 for never."""
        limits = [self.options.max_steps, self.options.lr_anneal_steps]
        return min((limit for limit in limits if limit > 0), default=0)

    def restore(
        self, checkpoint: Checkpoint, *, path: Path | None = None, lacking: Collection[str] = ()
    ) -> None:
        """Continue from a checkpoint whose weights the network already has.

        Args:
            checkpoint: the state.
            path: its file; in the run's own folder the numbered ones up to its step are the run's.
            lacking: parameters that whoever wrote its optimiser did not have: they start anew.
        """
        self.step = checkpoint.step
        if path and path.resolve().parent == self.folder.resolve():
            files = numbered_checkpoints(self.folder)
            self.own = [file for file in files if step_of(file) <= self.step]
        for rate, average in self.averages.items():
            average.load(checkpoint.ema.get(rate, checkpoint.model))
        if new := [rate for rate in self.averages if rate not in checkpoint.ema]:
            logger.log(
                f"--ema_rate {','.join(new)}: the checkpoint has no such average, it starts from "
                "the present weights"
            )
        state = checkpoint.training
        self.best = state.get("best", self.best)
        if state.get("scaler"):  # empty where nothing was scaled
            self.scaler.load_state_dict(state["scaler"])
        own = self.schedule_sampler.state_dict()
        history = state.get("schedule_sampler", own)
        if history.keys() == own.keys():
            self.schedule_sampler.load_state_dict(history)
        else:
            logger.log("--schedule_sampler is not the checkpoint's: its history starts anew")
        if state:
            names = [name for name, _ in self.net.named_parameters()]
            known = [index for index, name in enumerate(names) if name not in lacking]
            moments = fitted_moments(state["optimizer"]["state"], self.parameters, known)
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self._set_rate()

    def run_loop(self) -> Path:
        """Train to the end, or until SIGTERM or Ctrl-C, and return the last checkpoint.

        Raises:
            UserError: not all processes start at the same step.
        """
        starts = all_gather(torch.tensor([self.step])).tolist()
        if len(set(starts)) > 1:
            raise UserError(
                "--out_dir",
                found=f"{self.folder}, from which the processes continue at steps {starts}",
                expected="one folder that all nodes share",
                hint="Put it on a file system that every node sees.",
            )
        batches = training_batches(
            self.dataset,
            self.options.batch_size,
            seed=self.run.seed,
            first_step=self.step,
            workers=self.options.num_workers,
            augmentation=Augmentation() if self.options.augment else None,
            rank=rank(),
            world_size=world_size(),
        )
        start, total = self.step, self.last_step
        hidden = True if rank() else None
        bar = tqdm(initial=self.step, total=total or None, unit="step", disable=hidden)
        with StopSignal(echo=ECHO if launched() else 0.0) as stop:
            with bar as progress:
                while not any_rank(bool(stop.wanted)) and (not total or self.step < total):
                    batch, compiles = next(batches), self.run.compile and self.step == start
                    with compiling(compiles):
                        loss = self.run_step(batch)
                    if compiles:
                        logger.log(f"compiled in {self.log.restart():.0f} s")
                    progress.update()
                    if self.step % self.options.log_interval == 0 or self.step == total:
                        progress.set_postfix(loss=f"{loss:.4f}")
                        self._write_log(progress)
                    better = self._validation(progress)
                    if self._due(self.options.save_interval) and self.step != total:
                        self.save(best=better)
                    elif better:
                        self.save(best=True, numbered=False)
                    if self.watch.patience and any_rank(self._no_longer_better()):
                        break
            if stop.wanted:
                logger.log(f"stopped by {stop.wanted} at step {self.step}; --resume auto continues")
            path = self.save()
            self.writer.wait()
            return path

    def run_step(self, batch: Batch) -> Tensor:
        """Take one optimiser step on a batch and return its mean loss, a scalar tensor.

        A step whose gradient is not finite changes nothing and is counted.

        Raises:
            UserError: too many such steps in a row.
        """
        before = [buffer.clone() for buffer in self.net.buffers()]
        loss = self.forward_backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = self.log.gradient(self.parameters)
        for buffer, old in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, old))
        if self._usable(norm, batch):
            self._clip(norm)
            self.scaler.step(self.optimizer)
            for average in self.averages.values():
                average.update(self.step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._set_rate()
        return loss

    def forward_backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the whole batch, a microbatch at a time.

        Returns:
            The mean weighted loss, a scalar tensor.
        """
        lesson = self.lesson(batch)
        condition = lesson.condition.to(self.device, non_blocking=True)
        x0 = self.diffusion.to_range(lesson.x0.to(self.device, non_blocking=True))
        y = None if lesson.y is None else lesson.y.to(self.device, non_blocking=True)
        positions, weights, eps = self._draw(x0.shape)
        t = torch.tensor(self.diffusion.kept)[positions]
        eps = eps.to(self.device, non_blocking=True)

        total = torch.zeros((), device=self.device)
        size = self.options.microbatch if self.options.microbatch > 0 else len(x0)
        parts = torch.arange(len(x0)).split(size)
        scored_by = self.losses or self.diffusion.training_losses
        losses = []
        for rows in parts:
            chosen = rows.to(self.device)
            last = rows is parts[-1]
            with autocast(self.device, self.run.precision), no_sync(self.whole, not last):
                terms = scored_by(
                    self.whole,
                    x0[chosen],
                    t[rows],
                    eps=eps[chosen],
                    condition=condition[chosen],
                    y=None if y is None else y[chosen],
                )
                loss = (terms["loss"] * weights[rows].to(self.device)).sum() / len(x0)
                if "coarse" in terms:
                    loss = loss + terms["coarse"].sum() / len(x0)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            terms = {name: values.detach() for name, values in terms.items()}
            losses.append(terms["loss"])
            self.log.losses(t[rows], terms)
        if self.schedule_sampler.learns:
            self.schedule_sampler.update(all_gather(positions), all_gather(torch.cat(losses)))
        return total

    def _draw(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Draw positions, weights and noise of this process's rows of the step's whole batch."""
        torch.manual_seed(mix(self.run.seed, self.step))
        count, rows = shape[0] * world_size(), slice(rank() * shape[0], (rank() + 1) * shape[0])
        positions, weights = self.schedule_sampler.sample(count)
        eps = torch.randn(count, *shape[1:])
        if rank():
            torch.manual_seed(mix(self.run.seed + rank(), self.step))
        return positions[rows], weights[rows], eps[rows]

    def _clip(self, norm: Tensor) -> None:
        """Shrink a gradient of this norm to the largest that is allowed."""
        if self.options.grad_clip:
            shrink = (self.options.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], shrink)

    def _usable(self, norm: Tensor, batch: Batch) -> bool:
        """Whether the gradient is finite; count the steps in a row for which it is not.

        Of a scaled loss that is expected, until the scaler has found a scale that fits.
        """
        if bool(norm.isfinite()):
            self.bad_steps = 0
            return True
        self.log.skipped += 1
        if self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return False
        self.bad_steps += 1
        if self.bad_steps >= self.options.max_bad_steps:
            raise UserError(
                f"step {self.step}",
                found=f"a gradient that is not finite, {self.bad_steps} times in a row, last for "
                f"the cases {', '.join(chain(*all_gather_object(batch.names)))}",
                expected="finite losses",
                hint="Lower --lr, use --grad_clip 1 or --precision fp32; scripts/check_data.py "
                "looks at the images. The last checkpoint is intact.",
            )
        return False

    def save(self, *, best: bool = False, numbered: bool = True) -> Path:
        """Write a checkpoint of the present state, in the background; the first process does.

        Args:
            best: make it the best one, too.
            numbered: give it its number and make it the latest.

        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        path = self.folder / (f"savedmodel{self.step:06d}.pt" if numbered else BEST)
        if rank() == 0:
            training = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                **({"best": self.best} if self.best["step"] else {}),
            }
            state = Checkpoint(
                options=self.recorded,
                step=self.step,
                model=plain(self.net.state_dict()),
                ema={rate: average.state_dict() for rate, average in self.averages.items()},
                training=copied(training),
            )
            reading = side_stream(self.device)
            drop = self._surplus(path) if numbered else []

            def write() -> None:
                with reading:
                    kept = Checkpoint(**on_cpu(vars(state)))
                save_checkpoint(self.folder, kept, drop=drop, best=best, numbered=numbered)
                logger.log(f"saved {path}")
                self.after_save()

            self.writer.start(write)
        barrier()
        return path

    def _surplus(self, path: Path) -> list[Path]:
        """The run's numbered checkpoints that ``keep`` has no room for beside a new one.

        What an earlier run has left in the folder is not the run's, and stays.
        """
        own = [*(file for file in self.own if file != path), path]
        self.own = own[-self.options.keep :]
        return own[: -self.options.keep]

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _validation(self, progress: tqdm[Any]) -> bool:
        """Score the slowest average where it is time to, and tell whether it is the best so far.

        The first process does; all hear of it.
        """
        interval = self.watch.val_interval or self.options.save_interval
        if not (self._due(interval) or self.step == self.last_step):
            return False
        slowest = self.averages[max(self.averages, key=float)]
        score = self.validate(slowest.state_dict(), self.step) if self.validate else None
        if score is None:
            return any_rank(False)
        first = score._fields[0]
        better = score[0] > self.best.get(first, -1.0)
        if better:
            self.best = {first: score[0], "step": self.step, "since": 0}
        else:
            self.best = self.best | {"since": self.best["since"] + 1}
        logger.logkv("step", self.step)
        for name, value in score._asdict().items():
            logger.logkv(f"val_{name}", value)
        with progress.external_write_mode(sys.stdout):
            logger.dumpkvs()
        return any_rank(better)

    def _no_longer_better(self) -> bool:
        """Whether ``patience`` validations in a row brought nothing, in the first process."""
        patience, since = self.watch.patience, self.best["since"]
        over = rank() == 0 and 0 < patience <= since
        if over:
            what, value = next(iter(self.best.items()))
            logger.log(
                f"stopped at step {self.step}: the last {since} validations were not better "
                f"than {what} {value:.4f} of step {self.best['step']}, kept as {BEST}"
            )
        return over

    def _set_rate(self) -> None:
        """Set the learning rate of the step to come: warm-up, then linear annealing."""
        warm = min(1.0, (self.step + 1) / max(self.options.warmup_steps, 1))
        anneal = self.options.lr_anneal_steps
        left = max(1 - self.step / anneal, 0.0) if anneal else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * warm * left

    def _write_log(self, progress: tqdm[Any]) -> None:
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.options.batch_size * world_size())
        logger.logkv("lr", self.optimizer.param_groups[0]["lr"])
        logger.logkv("memory_gib", memory_gib(self.device))
        means = self.log.means(self.parameters, all_gather)
        for name, value in means.items():
            logger.logkv(name, value)
        if self.last_step and "steps_per_s" in means:
            left = (self.last_step - self.step) / means["steps_per_s"]
            logger.logkv("minutes_left", round(left / 60, 1))
        with progress.external_write_mode(sys.stdout):
            logger.dumpkvs()


class _Whole(torch.nn.Module):
    """Image and noisy mask to prediction in one call, so that gradients can be shared."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = cast(UNetModel, net)

    def forward(self, x: Tensor, t: Tensor, image: Tensor, y: Tensor | None = None) -> Output:
        return cast(Output, self.net(x, t, self.net.encode(image), y))
