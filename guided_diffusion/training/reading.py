"""Reading the batches of a run: each but the first while the device computes the step before."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch

from guided_diffusion import logger
from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import Batch, TrainingBatch, training_batches
from guided_diffusion.dist_util import rank, world_size
from guided_diffusion.errors import Stopped, UserError
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.training.estimates import memory_guarded
from guided_diffusion.training.live import draw_batch
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.steps import StepInputs, reading_processes
from guided_diffusion.training.stop_signal import StopSignal


class Reading(NamedTuple):
    """A batch; None after a signal, or where it cannot be read, with the ``error``."""

    batch: Batch | None
    error: UserError | None = None


class BatchReader:
    """Reads batches and prepares the inputs of their steps.

    What is read ahead belongs to no step yet: it changes neither gradients nor random draws.

    Args:
        prepare: makes a step's inputs from its batch and its number.
        options: of the loop.
        device: that trains.
        stop: whose signals interrupt the reading.
    """

    def __init__(
        self,
        prepare: Callable[[Batch, int], StepInputs],
        options: TrainingOptions,
        device: torch.device,
        stop: StopSignal,
    ) -> None:
        self.prepare, self.options, self.device, self.stop = prepare, options, device, stop
        self._batches: Iterator[Batch] | None = None
        self._ahead: Reading | None = None
        self._inputs: StepInputs | None = None
        self._unshown: Callable[[Batch], TrainingBatch] | None = None

    def begin(self, setup: TrainSetup, step: int) -> Generator[Batch, None, None]:
        """Start the reading processes; closing what is returned ends them."""
        batches = training_batches(
            setup.dataset,
            self.options.batch_size,
            seed=setup.run.seed,
            first_step=step,
            workers=reading_processes(self.options.num_workers, self.device),
            augmentation=Augmentation() if self.options.augment else None,
            rater_choice=self.options.rater_choice,
            foreground=setup.foreground,
            rank=rank(),
            world_size=world_size(),
        )
        self._batches, self._ahead = batches, None
        self._unshown = setup.prepare_batch if logger.has_sinks() else None
        return batches

    def next(self, step: int) -> Reading:
        """Return the batch of a step, read ahead or else now; after a signal none."""
        if self._ahead is None:
            self.read_ahead(step)
        ahead, self._ahead = self._ahead, None
        if self._unshown and ahead and ahead.batch is not None:
            logger.picture("batch", draw_batch(self._unshown(ahead.batch)), step)
            self._unshown = None
        return Reading(None) if ahead is None or self.stop.wanted else ahead

    def read_ahead(self, step: int) -> None:
        """Read the batch of a step, and send its inputs to the device; nothing before begin."""
        if self._batches is None:
            return
        try:
            with self.stop.at_once(), memory_guarded(self.options, step, self.device, bool):
                if (batch := next(self._batches, None)) is None:  # the loop has ended
                    return
                self._inputs = self.prepare(batch, step)
                self._ahead = Reading(batch)
        except Stopped:
            self._ahead = Reading(None)
        except UserError as error:
            self._ahead = Reading(None, error)

    def inputs(self, batch: Batch, step: int) -> StepInputs:
        """Hand over the inputs of a step, prepared when its batch was read, or else now."""
        inputs, self._inputs = self._inputs, None
        if inputs is None or inputs.batch is not batch:
            inputs = self.prepare(batch, step)
        inputs.continue_drawing()
        return inputs
