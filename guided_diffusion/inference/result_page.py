"""The page of a result folder that has no scores yet, written at the end of a sampling."""

from __future__ import annotations

from pathlib import Path

from guided_diffusion import logger
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.jobs import PREDICTIONS
from guided_diffusion.files import read_table
from guided_diffusion.inference.provenance import describe_run, training_log
from guided_diffusion.report.page import REPORT
from guided_diffusion.report.unscored import is_current, write_unscored


def write_page(out_dir: Path, dataset: SegmentationDataset, classes: Classes | None) -> None:
    """Write ``report.html`` of all cases in the folder, unless the one that is there has them all.

    A page that cannot be made does not end the run: the log says why.

    Args:
        out_dir: the result folder.
        dataset: that this run's cases are from.
        classes: of the masks; None where everything is one class.
    """
    if is_current(out_dir):
        return
    try:
        table = read_table(out_dir / PREDICTIONS, needs=["name"], hint="")
        write_unscored(
            out_dir,
            table.rows if table else [],
            describe_run(out_dir, scored=False),
            classes=classes,
            volumes={entry.name: entry.volume for entry in dataset.entries if entry.volume},
            training=training_log(out_dir),
        )
    except Exception as error:  # the masks are all there
        logger.log(f"{out_dir / REPORT} could not be written: {error}")
