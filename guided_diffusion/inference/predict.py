"""From images to fused masks: draw ensembles, fuse them, and write a result folder.

:class:`Segmenter` draws: mask i of case c depends on the seed, c and i alone, for any batch size,
order or device. :func:`segment` walks a data set through it and writes the files of every case,
whole or not at all, skipping cases that an earlier run with the same settings has finished; slices
of volumes are put together again by ``restack``. Wired by ``runs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.dist_util import any_rank, rank
from guided_diffusion.files import Background, make_folder
from guided_diffusion.inference.cases import Failures, drawn, failure_of, share_of
from guided_diffusion.inference.record import Record, note_classes, row_of, say_what_to_look_at
from guided_diffusion.inference.rendering import area_columns, draw_strip
from guided_diffusion.inference.segmenter import Segmentation, Segmenter
from guided_diffusion.inference.volume_writer import VolumeWriter
from guided_diffusion.inference.writers import maps_of, write_case, write_nifti
from guided_diffusion.report.pictures import write_picture


def segment(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    out_dir: Path,
    *,
    fingerprint: str,
    num_samples: int = 0,
    debug: bool = False,
) -> list[str]:
    """Segment a data set into a result folder and return the names of its cases.

    Args:
        segmenter: draws and fuses.
        dataset: cases at their own size; with masks, the overlays show them.
        out_dir: where ``predictions.csv`` and the files of each case go.
        fingerprint: of everything the masks depend on; finished cases that bear it are kept.
        num_samples: the first so many cases; 0 for all.
        debug: write a strip of all that there is to see of each case as well.
    """
    make_folder(out_dir)
    entries = dataset.entries[: num_samples or None]
    note_classes(out_dir, segmenter.classes)
    record = Record(out_dir, fingerprint, area_columns(segmenter.classes))
    stacks = VolumeWriter(out_dir, fingerprint, entries)
    todo = [
        index
        for index, entry in enumerate(entries)
        if not record.finished(entry.name) or (entry.volume and not stacks.holds(entry))
    ]
    record.begin([entries[index].name for index in todo], of=len(entries))

    mine = share_of(todo, entries)
    others = {entries[i].volume for i in todo} if rank() == 0 else {e.volume for e in entries}
    own = {entries[index].volume for index in mine}
    stacks.expect((entries[index] for index in mine), elsewhere=others - own)
    stacks.write()
    failures: Failures = {}

    def keep(some: Sequence[tuple[int, Case, Segmentation]], seconds: float) -> None:
        for index, case, result in some:
            write_case(out_dir, case, result)
            if debug:
                pixels = draw_strip(case, result, channels=dataset.modalities)
                write_picture(out_dir / f"{case.name}_debug.png", pixels)
            if entries[index].volume:
                stacks.keep(entries[index], maps_of(result))
            elif case.affine is not None:
                write_nifti(out_dir, case, result)
            record.add(row_of(case, result, seconds, segmenter.frame))
            stacks.write()

    writer = Background()
    try:
        for some, seconds in drawn(segmenter, dataset, mine, failures):
            writer.start(partial(keep, some, seconds))
    finally:
        writer.wait()
    record.end()
    failed = any_rank(bool(failures))
    if rank() == 0 and not failed:
        stacks.clear()
    names = [entry.name for entry in entries]
    if rank() == 0:
        say_what_to_look_at(record, names)
    if failures:
        raise failure_of(failures)
    return names
