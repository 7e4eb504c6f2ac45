"""What a case is, what every data set promises, and how a case meets the network's square.

The contract comes first: :class:`Case` (one picture with its mask), :class:`Entry` (the files
behind it) and :class:`SegmentationDataset`, which the loaders of the floor above fill, one layout
each. Then :class:`Frame`, the one place where pictures and masks are cropped or resized and
brought back. Called by the loaders, by training (through :class:`Framed`) and by prediction
(:meth:`Frame.restore`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.folders import size_text
from guided_diffusion.errors import UserError


class Batch(NamedTuple):
    """Stacked cases: ``image`` [B, C, h, w], ``mask`` [B, K, h, w] or None, ``names`` [B].

    ``label`` is int64 [B], or None unless every case has one.
    """

    image: Tensor
    mask: Tensor | None
    names: list[str]
    label: Tensor | None = None


def collate(cases: Sequence[Case]) -> Batch:
    """Stack fitted cases into a :class:`Batch`; the mask is None unless every case has one."""
    first = cases[0]
    for case in cases:
        if case.image.shape != first.image.shape:
            raise UserError(
                f"case {case.name}",
                found=f"{size_text(case.image)} for the network",
                expected=f"{size_text(first.image)} as case {first.name}",
                hint="A crop needs pictures of one size: pass --crop none to resize them instead.",
            )
    masks = [case.mask for case in cases if case.mask is not None]
    labels = [case.label for case in cases if case.label is not None]
    return Batch(
        image=torch.stack([case.image for case in cases]),
        mask=torch.stack(masks) if len(masks) == len(cases) else None,
        names=[case.name for case in cases],
        label=torch.tensor(labels) if len(labels) == len(cases) else None,
    )


class TrainingBatch(NamedTuple):
    """What a batch teaches: ``x0`` [B, K, H, W] in [0, 1] under a ``condition`` [B, C, H, W].

    ``y``: class labels int64 [B] of what is class-conditional.
    """

    x0: Tensor
    condition: Tensor
    y: Tensor | None = None


def prepare_masks(batch: Batch) -> TrainingBatch:
    """Segmentation: masks are diffused, and images are their condition."""
    if batch.mask is None:
        raise ValueError("a training batch needs masks")
    return TrainingBatch(batch.mask, batch.image)


def prepare_images(batch: Batch) -> TrainingBatch:
    """Generation: images are diffused, and nothing is their condition."""
    return TrainingBatch(batch.image, batch.image[:, :0])


def prepare_labelled_images(batch: Batch) -> TrainingBatch:
    """Generation by class, and classification."""
    return TrainingBatch(batch.image, batch.image[:, :0], batch.label)


def training_batches(
    dataset: Dataset[Case],
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    augmentation: Augmentation | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield full batches for ever, epoch after epoch in a new order, from any step on.

    Args:
        dataset: cases at the network's size.
        batch_size: cases in one batch of one process.
        seed: of orders and augmentation.
        first_step: batches that earlier runs have taken.
        workers: processes that read; 0 for this one.
        augmentation: changes each drawn case.
        rank: this process's number; its batches are its share of the steps' larger ones.
        world_size: how many processes share each step.

    Raises:
        UserError: a file cannot be used; whichever process reads it, the error arrives here.
    """
    drawn = _Drawn(dataset, seed, augmentation)
    loader = DataLoader(
        drawn,
        batch_sampler=_Positions(len(drawn), batch_size, seed, first_step, rank, world_size),
        num_workers=workers,
        collate_fn=_batch_or_error,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            break
        yield batch
    del loader  # ends the processes here and now; an error's frames would keep it for the collector
    raise batch


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
        seed = mix(mix(self.seed, draw.place), 1)
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

    def __init__(
        self, size: int, batch_size: int, seed: int, first_step: int, rank: int, world_size: int
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.first_place = (first_step * world_size + rank) * batch_size
        self.stride = world_size * batch_size

    def __iter__(self) -> Iterator[list[_Draw]]:
        position = self.first_place
        orders: dict[int, list[int]] = {}
        while True:
            batch = []
            for place in range(position, position + self.batch_size):
                epoch, offset = divmod(place, self.size)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                    orders = {epoch: torch.randperm(self.size, generator=generator).tolist()}
                batch.append(_Draw(orders[epoch][offset], place))
            yield batch
            position += self.stride


def mix(seed: int, number: int) -> int:
    """Make one 63-bit seed of two numbers, such that neighbours share nothing."""
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**64
    return (mixed ^ (mixed >> 31)) * 0x94D049BB133111EB % 2**63
