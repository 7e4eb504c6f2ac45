"""Batches for training: stacking cases, and an endless seeded sequence that any step can resume.

:func:`training_batches` yields batches epoch after epoch; which cases are in a batch, and how they
are augmented, depends on the seed and the step alone. The ``prepare_...`` functions say what is
diffused and what conditions it.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.folders import size_text
from guided_diffusion.data.limits import limit, set_limit
from guided_diffusion.errors import UserError


class Batch(NamedTuple):
    """Stacked cases: ``image`` [B, C, h, w], ``mask`` [B, K, h, w] or None, ``names`` [B].

    ``label`` is int64 [B], or None unless every case has one.
    """

    image: Tensor
    mask: Tensor | None
    names: list[str]
    label: Tensor | None = None


class TrainingBatch(NamedTuple):
    """What is diffused, ``x0`` [B, K, H, W] in [0, 1], and its ``condition`` [B, C, H, W].

    ``y`` holds the class labels, int64 [B], of a class-conditional network.
    """

    x0: Tensor
    condition: Tensor
    y: Tensor | None = None


def prepare_masks(batch: Batch) -> TrainingBatch:
    """Prepare a segmentation batch: masks are diffused, conditioned on the images."""
    if batch.mask is None:
        raise ValueError("a training batch needs masks")
    return TrainingBatch(batch.mask, batch.image)


def prepare_images(batch: Batch) -> TrainingBatch:
    """Prepare a generation batch: images are diffused, without a condition."""
    return TrainingBatch(batch.image, batch.image[:, :0])


def prepare_labelled_images(batch: Batch) -> TrainingBatch:
    """Prepare a batch of images with their class labels, for generation or classification."""
    return TrainingBatch(batch.image, batch.image[:, :0], batch.label)


class Foreground(NamedTuple):
    """The cases with a lesion, by index, and the share of all draws that is from them alone."""

    share: float
    cases: Sequence[int]


def training_batches(
    dataset: Dataset[Case],
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    augmentation: Augmentation | None = None,
    rater_choice: str = "random",
    foreground: Foreground | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Generator[Batch, None, None]:
    """Yield full batches without end, each epoch in a new order, starting at any step.

    Args:
        dataset: cases at the network's size.
        batch_size: cases in one batch of one process.
        seed: of the orders, the raters and the augmentation.
        first_step: the number of batches that earlier runs have used.
        workers: number of reading processes; 0 reads in this one.
        augmentation: changes each drawn case.
        rater_choice: the mask of a case with several raters: 'random', one of theirs; 'mean', the
            share of raters that mark a pixel, which is soft; 'majority'.
        foreground: cases to draw more often than the others; None for all alike. Their share of
            the draws is exact, and they and the rest of the draws, which are from all cases, have
            epochs of their own.
        rank: the rank of this process, which gets its share of every step's global batch.
        world_size: the number of processes that share each step.

    Closing the generator ends the reading processes.

    Raises:
        UserError: a file cannot be used, whichever process read it.
    """
    drawn = _Drawn(dataset, seed, augmentation, rater_choice)
    order = _Order(len(drawn), seed, foreground)
    loader = DataLoader(
        drawn,
        batch_sampler=_Positions(order, batch_size, first_step, rank, world_size),
        num_workers=workers,
        collate_fn=_batch_or_error,
        worker_init_fn=partial(_begin_reading, limit()),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    others = multiprocessing.active_children()
    with _deaths_at_reading():
        batches = iter(loader)
    readers = [child for child in multiprocessing.active_children() if child not in others]
    batch: Batch | UserError | None = None
    try:
        while True:
            batch = _next_or_error(batches)
            if isinstance(batch, UserError):
                break
            yield batch
    finally:
        if isinstance(batch, UserError):
            _kill(readers)  # one that was killed may have left the others waiting for a lock
        del loader, batches  # ends the workers now; a traceback would keep them alive
        _kill(readers)
    raise batch


def _kill(readers: Sequence[BaseProcess]) -> None:
    for reader in readers:
        reader.kill()
        reader.join()


@contextmanager
def _deaths_at_reading() -> Iterator[None]:
    """Undo the handler by which torch raises the death of a worker anywhere, mid-step included.

    Reading a batch notices it as well.
    """
    child = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(child) if child else None
    yield
    if child and threading.current_thread() is threading.main_thread():
        signal.signal(child, before or signal.SIG_DFL)


def _next_or_error(batches: Iterator[Batch | UserError]) -> Batch | UserError:
    """Read a batch; a reading process that was killed is an error, too."""
    try:
        return next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return UserError(
            "--num_workers",
            f"a reading process ended unexpectedly ({str(error).splitlines()[0].rstrip('.')})",
            "Most often memory ran out: use fewer --num_workers, or a smaller --cache_gib. "
            "--resume auto continues.",
        )


_FOREGROUND = -1
"""Sets the orders of the cases with a lesion apart from those of all cases."""
GRACE = 120
"""Seconds that a reading process stays after SIGTERM, in which the training process saves."""


def _begin_reading(max_read_gib: float, worker: int) -> None:
    set_limit(max_read_gib)
    _leave_signals_to_the_parent()


def _leave_signals_to_the_parent() -> None:
    """Outlive a signal that the training process got as well: it saves, then ends its readers.

    Where that interrupts it as it receives a tensor, the lost connection is nothing to report.
    """
    sys.excepthook = _hook_for_all_but(ConnectionError, EOFError)
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


def _hook_for_all_but(*expected: type[BaseException]) -> Callable[..., None]:
    def hook(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, expected):
            sys.__excepthook__(kind, *rest)

    return hook


class _Positions:
    """A batch sampler: the draws of every batch from a given step on."""

    def __init__(
        self, order: _Order, batch_size: int, first_step: int, rank: int, world_size: int
    ) -> None:
        self.order, self.batch_size = order, batch_size
        self.first_place = (first_step * world_size + rank) * batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[list[_Draw]]:
        position = self.first_place
        while True:
            places = range(position, position + self.batch_size)
            yield [_Draw(self.order(place), place) for place in places]
            position += self.stride


class _Order:
    """Which case is drawn at a place of the sequence, counted from the first step."""

    def __init__(self, size: int, seed: int, foreground: Foreground | None) -> None:
        share, cases = foreground or (0, ())
        self.share = Fraction(share).limit_denominator(10**6)
        self.all = _Epochs(range(size), seed)
        self.foreground = _Epochs(cases, mix(seed, _FOREGROUND))

    def __call__(self, place: int) -> int:
        before, after = math.floor(place * self.share), math.floor((place + 1) * self.share)
        return self.all(place - before) if before == after else self.foreground(before)


class _Epochs:
    """An endless sequence of cases, in which every epoch has each of them once, in a new order."""

    def __init__(self, cases: Sequence[int], seed: int) -> None:
        self.cases, self.seed = cases, seed
        self.epoch, self.order = -1, list[int]()

    def __call__(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.cases))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self.order = torch.randperm(len(self.cases), generator=generator).tolist()
            self.epoch = epoch
        return self.cases[self.order[offset]]


class _Draw(NamedTuple):
    """One drawn case: its index, and its position in the sequence, counted from the first step."""

    number: int
    place: int


class _Drawn(Dataset["Case | UserError"]):
    """A data set indexed by draws.

    The rater and the augmentation depend on the seed and the position alone.
    """

    def __init__(
        self,
        dataset: Dataset[Case],
        seed: int,
        augmentation: Augmentation | None,
        rater_choice: str,
    ) -> None:
        self.dataset, self.seed, self.augmentation = dataset, seed, augmentation
        self.rater_choice = rater_choice

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: _Draw) -> Case | UserError:
        """Case ``draw.number``, augmented; errors are returned, as workers garble exceptions."""
        try:
            case = self.dataset[draw.number]
        except UserError as error:
            return error
        own = mix(self.seed, draw.place)
        raters, case = self._chosen(case, own), case._replace(raters=None)
        if raters is not None:  # all of them are augmented alike, as channels of one mask
            case = case._replace(mask=raters.flatten(0, 1))
        if self.augmentation is not None:
            case = self.augmentation(case, torch.Generator().manual_seed(mix(own, 1)))
        if raters is not None and case.mask is not None:
            case = case._replace(mask=case.mask.unflatten(0, raters.shape[:2]).mean(dim=0))
        return case

    def _chosen(self, case: Case, seed: int) -> Tensor | None:
        """The raters' masks whose mean is trained on, [R, K, h, w]; None for the case's own."""
        if case.raters is None or self.rater_choice == "majority":
            return None
        if self.rater_choice == "mean":
            return case.raters
        generator = torch.Generator().manual_seed(mix(seed, 2))
        chosen = int(torch.randint(len(case.raters), (), generator=generator))
        return case.raters[chosen : chosen + 1]


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


def collate(cases: Sequence[Case]) -> Batch:
    """Stack fitted cases into a :class:`Batch`; the mask is None unless every case has one."""
    first = cases[0]
    for case in cases:
        if case.image.shape != first.image.shape:
            raise UserError(
                f"case {case.name}",
                f"its size after --crop is {size_text(case.image)}, but case {first.name} has "
                f"{size_text(first.image)}",
                "Cropping needs images of one size: pass --crop none to resize them instead.",
            )
    masks = [case.mask for case in cases if case.mask is not None]
    labels = [case.label for case in cases if case.label is not None]
    return Batch(
        image=torch.stack([case.image for case in cases]),
        mask=torch.stack(masks) if len(masks) == len(cases) else None,
        names=[case.name for case in cases],
        label=torch.tensor(labels) if len(labels) == len(cases) else None,
    )


def mix(seed: int, number: int) -> int:
    """Hash two numbers to one 63-bit seed, so that neighbouring numbers give unrelated seeds."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**64
    return (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB % 2**63
