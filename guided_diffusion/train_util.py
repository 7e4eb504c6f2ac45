"""The training loop: finite, resumable, and a pure function of its seed.

Nothing random outlives a step. What the loop draws at step n (images, times, noise, dropout)
follows from the seed and n alone, so a run that is resumed repeats the uninterrupted one bit for
bit on a CPU, whatever the number of reading processes. Wired by ``runs``.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.augment import Augmentation
from guided_diffusion.checkpoint import Checkpoint, Weights, save_checkpoint
from guided_diffusion.datasets import Batch, Case, collate
from guided_diffusion.dist_util import autocast
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.options import RunOptions, TrainingOptions
from guided_diffusion.resample import ScheduleSampler
from guided_diffusion.unet import UNetModel


class TrainLoop:
    """Train a network on a data set, and write log and checkpoints into a folder.

    Args:
        net: on the device it is trained on.
        diffusion: what is predicted, and how it is scored.
        dataset: cases at the network's size, every one with a mask.
        schedule_sampler: draws the times.
        options: of the loop.
        run: folder, seed and precision.
        recorded: the flags a checkpoint has to remember.
    """

    def __init__(
        self,
        net: UNetModel,
        diffusion: GaussianDiffusion,
        *,
        dataset: Dataset[Case],
        schedule_sampler: ScheduleSampler,
        options: TrainingOptions,
        run: RunOptions,
        recorded: dict[str, Any],
    ) -> None:
        self.net = net
        self.diffusion = diffusion
        self.dataset = dataset
        self.schedule_sampler = schedule_sampler
        self.options = options
        self.run = run
        self.recorded = recorded
        self.step = 0

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

    @property
    def last_step(self) -> int:
        """The step to stop at; 0 for never."""
        limits = [self.options.max_steps, self.options.lr_anneal_steps]
        return min((limit for limit in limits if limit > 0), default=0)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint whose weights the network already has."""
        self.step = checkpoint.step
        for rate, average in self.averages.items():
            average.load(checkpoint.ema.get(rate, checkpoint.model))
        state = checkpoint.training
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])

    def run_loop(self) -> Path:
        """Train to the end, or until SIGTERM or Ctrl-C, and return the last checkpoint."""
        first = self.step
        batches = stream(
            self.dataset,
            self.options.batch_size,
            seed=self.run.seed,
            first_step=first,
            workers=self.options.num_workers,
            augmentation=Augmentation() if self.options.augment else None,
        )
        total = self.last_step
        bar = tqdm(initial=first, total=total or None, unit="step", disable=None)
        with _StopSignal() as stop:
            with bar as progress:
                while not stop.wanted and (not total or self.step < total):
                    loss = self.run_step(next(batches))
                    progress.update()
                    if self.step % self.options.log_interval == 0 or self.step == total:
                        progress.set_postfix(loss=f"{loss:.4f}")
                        self._write_log(progress)
                    if self.step % self.options.save_interval == 0 and self.step != total:
                        self.save()
            if stop.wanted:
                logger.log(f"stopped by {stop.wanted} at step {self.step}; --resume auto continues")
            return self.save()

    def run_step(self, batch: Batch) -> Tensor:
        """Take one optimiser step on a batch and return its mean loss, a scalar tensor."""
        torch.manual_seed(_mix(self.run.seed, self.step))
        loss = self.forward_backward(batch)
        self.scaler.unscale_(self.optimizer)
        self.log.gradient(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        for average in self.averages.values():
            average.update(self.step)
        self.step += 1
        self._anneal()
        return loss

    def forward_backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the whole batch, a microbatch at a time.

        Returns:
            The mean weighted loss, a scalar tensor.
        """
        if batch.mask is None:
            raise ValueError("a training batch needs masks")
        image = batch.image.to(self.device, non_blocking=True)
        x0 = self.diffusion.to_range(batch.mask.to(self.device, non_blocking=True))
        positions, weights = self.schedule_sampler.sample(len(x0))
        t = torch.tensor(self.diffusion.kept)[positions]
        eps = torch.randn(x0.shape).to(self.device, non_blocking=True)

        total = torch.zeros((), device=self.device)
        size = self.options.microbatch if self.options.microbatch > 0 else len(x0)
        for rows in torch.arange(len(x0)).split(size):
            chosen = rows.to(self.device)
            with autocast(self.device, self.run.precision):
                terms = self.diffusion.training_losses(
                    self.net,
                    x0[chosen],
                    t[rows],
                    eps=eps[chosen],
                    condition=self.net.encode(image[chosen]),
                )
            loss = (terms["loss"] * weights[rows].to(self.device)).sum() / len(x0)
            self.scaler.scale(loss).backward()
            total += loss.detach()
            terms = {name: values.detach() for name, values in terms.items()}
            self.schedule_sampler.update(positions[rows], terms["loss"])
            self.log.losses(t[rows], terms)
        return total

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        checkpoint = Checkpoint(
            options=self.recorded,
            step=self.step,
            model=_detached(self.net.state_dict()),
            ema={rate: average.state_dict() for rate, average in self.averages.items()},
            training={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
            },
        )
        path = save_checkpoint(Path(self.run.out_dir).expanduser(), checkpoint)
        logger.log(f"saved {path}")
        return path

    def _anneal(self) -> None:
        if self.options.lr_anneal_steps:
            left = 1 - self.step / self.options.lr_anneal_steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.options.lr * max(left, 0.0)

    def _write_log(self, progress: tqdm[Any]) -> None:
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.options.batch_size)
        logger.logkv("lr", self.optimizer.param_groups[0]["lr"])
        for name, value in self.log.means(self.parameters).items():
            logger.logkv(name, value)
        with progress.external_write_mode(sys.stdout):
            logger.dumpkvs()


class ExponentialAverage:
    """A running average of a network's parameters; buffers are taken as they are.

    The decay warms up as min(rate, (1 + n) / (10 + n)), so that a short run does not sample from
    its own random start.
    """

    def __init__(self, net: torch.nn.Module, rate: float) -> None:
        self.net = net
        self.rate = rate
        self.values = [parameter.detach().clone() for parameter in net.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step ``step`` (counted from 0)."""
        rate = min(self.rate, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, list(self.net.parameters()), 1 - rate)

    def state_dict(self) -> Weights:
        """Return the network's state dict with the averages in place of the parameters."""
        names = [name for name, _ in self.net.named_parameters()]
        return _detached({**self.net.state_dict(), **dict(zip(names, self.values, strict=True))})

    def load(self, weights: Weights) -> None:
        """Continue from :meth:`state_dict`."""
        for (name, _), value in zip(self.net.named_parameters(), self.values, strict=True):
            value.copy_(weights[name])


class StepLog:
    """Collects what steps report, without waiting for the device, until the log is written."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._clear()

    def _clear(self) -> None:
        self.times: list[Tensor] = []
        self.terms: dict[str, list[Tensor]] = {}
        self.grad_norms: list[Tensor] = []
        self.started = time.perf_counter()

    def losses(self, t: Tensor, terms: dict[str, Tensor]) -> None:
        """Note times int64 [B] and the loss terms [B] they gave."""
        self.times.append(t)
        for name, values in terms.items():
            self.terms.setdefault(name, []).append(values)

    def gradient(self, parameters: Sequence[Tensor]) -> None:
        """Note the norm of the gradient."""
        self.grad_norms.append(_norm([p.grad for p in parameters if p.grad is not None]))

    def means(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Return the means since the last call, losses also by quarter of t, and start anew."""
        quarter = (4 * torch.cat(self.times) // self.steps).tolist()
        means = {
            "grad_norm": float(torch.stack(self.grad_norms).mean()),
            "param_norm": float(_norm([p.detach() for p in parameters])),
            "steps_per_s": len(self.grad_norms) / (time.perf_counter() - self.started),
        }
        for name, parts in self.terms.items():
            values = torch.cat(parts).tolist()
            means[name] = sum(values) / len(values)
            for q in range(4):
                chosen = [v for v, of in zip(values, quarter, strict=True) if of == q]
                if chosen:
                    means[f"{name}_q{q}"] = sum(chosen) / len(chosen)
        self._clear()
        return means


class _StopSignal:
    """Remembers that SIGTERM or Ctrl-C asked for the end, so that the step can be finished.

    The second of a kind does what it always did; so does every one after the run.
    """

    def __init__(self) -> None:
        self.wanted = ""

    def __enter__(self) -> _StopSignal:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.wanted = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])


def stream(
    dataset: Dataset[Case],
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    augmentation: Augmentation | None = None,
) -> Iterator[Batch]:
    """Yield full batches for ever, epoch after epoch in a new order, from any step on.

    Raises:
        UserError: a file cannot be used; whichever process reads it, the error arrives here.
    """
    drawn = _Drawn(dataset, seed, augmentation)
    loader = DataLoader(
        drawn,
        batch_sampler=_Positions(len(drawn), batch_size, seed, first_step),
        num_workers=workers,
        collate_fn=_batch_or_error,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Draw(NamedTuple):
    """One case of the stream: which it is, and its place, counted from the stream's beginning."""

    number: int
    place: int


class _Drawn(Dataset["Case | UserError"]):
    """A data set by draws: how a case is augmented follows from the seed and its place alone."""

    def __init__(
        self, dataset: Dataset[Case], seed: int, augmentation: Augmentation | None
    ) -> None:
        self.dataset, self.seed, self.augmentation = dataset, seed, augmentation

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: _Draw) -> Case | UserError:
        """Case ``draw.number``, changed; an error is handed on, for processes garble exceptions."""
        try:
            case = self.dataset[draw.number]
        except UserError as error:
            return error
        if self.augmentation is None:
            return case
        seed = _mix(_mix(self.seed, draw.place), 1)
        return self.augmentation(case, torch.Generator().manual_seed(seed))


def _batch_or_error(cases: Sequence[Case | UserError]) -> Batch | UserError:
    good: list[Case] = []
    for case in cases:
        if isinstance(case, UserError):
            return case
        good.append(case)
    try:
        return collate(good)
    except UserError as error:
        return error


class _Positions:
    """The draws of every batch from a step on; which they are follows from seed and step."""

    def __init__(self, size: int, batch_size: int, seed: int, first_step: int) -> None:
        self.size, self.batch_size, self.seed, self.first_step = size, batch_size, seed, first_step

    def __iter__(self) -> Iterator[list[_Draw]]:
        position = self.first_step * self.batch_size
        orders: dict[int, list[int]] = {}
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                epoch, offset = divmod(place, self.size)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
                    orders = {epoch: torch.randperm(self.size, generator=generator).tolist()}
                batch.append(_Draw(orders[epoch][offset], place))
            yield batch
            position += self.batch_size


def _mix(seed: int, number: int) -> int:
    """Make one 63-bit seed of two numbers, such that neighbours share nothing."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**64
    return (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB % 2**63


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


def _detached(weights: dict[str, Tensor]) -> Weights:
    """Copy weights to the CPU as plain contiguous tensors."""
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
