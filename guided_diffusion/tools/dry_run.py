"""``--dry_run``: everything up to the first step of a training, and nothing is written."""

from __future__ import annotations

from contextlib import closing

from guided_diffusion import logger
from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import training_batches
from guided_diffusion.dist_util import describe, rank, world_size
from guided_diffusion.script_util import parameter_count
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup


def rehearse_training(setup: TrainSetup) -> None:
    """Build and restore what a training needs, read its first batch, and stop.

    Raises:
        UserError: what the training itself would have raised until then.
    """
    logger.configure(quiet=rank() > 0)
    loop, options = TrainLoop(setup), setup.options
    if setup.start:
        loop.restore(setup.start, path=setup.path, missing=setup.missing)
        logger.log(f"would resume {setup.path} at step {setup.start.step}")
    batches = training_batches(
        setup.dataset,
        options.batch_size,
        seed=setup.run.seed,
        first_step=loop.step,
        augmentation=Augmentation() if options.augment else None,
        rater_choice=options.rater_choice,
        foreground=setup.foreground,
        rank=rank(),
        world_size=world_size(),
    )
    with closing(batches):
        batch = setup.prepare_batch(next(batches))
    for note in setup.notes:
        logger.log(note)
    condition, x0 = (tuple(part.shape) for part in (batch.condition, batch.x0))
    logger.log(
        f"{setup.data}; {parameter_count(setup.net)} on {describe(loop.device)}, "
        f"{setup.run.precision}; steps {loop.step} to {loop.last_step or 'no end'}"
    )
    read = f"images {condition} and masks {x0}" if condition[1] else f"images {x0}"
    logger.log(
        f"dry run: the first batch was read, {read}; it would be written to {setup.run.out_dir}"
    )
