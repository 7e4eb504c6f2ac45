"""From images to a folder of fused masks: the loop over cases, for a data set and a segmenter.

The files of every case appear whole or not at all; cases that an earlier run with the same settings
has finished are kept. Slices of volumes are put together again by :mod:`volume_writer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from guided_diffusion import logger
from guided_diffusion.data.classes import each
from guided_diffusion.data.datasets import Case, SegmentationDataset, read_as, readable
from guided_diffusion.data.folders import counted
from guided_diffusion.data.jobs import PREDICTIONS, Job, write_jobs
from guided_diffusion.dist_util import rank
from guided_diffusion.files import expanded, make_folder, require_replaceable
from guided_diffusion.inference.cases import ReadAhead, run_cases, share_of, writer_count
from guided_diffusion.inference.next_steps import after_sampling
from guided_diffusion.inference.precision import device_notes
from guided_diffusion.inference.provenance import RECORD as SAMPLING_RECORD
from guided_diffusion.inference.provenance import is_noted, note_run, note_sampling, run_record
from guided_diffusion.inference.record import Record, log_remarks, note_classes, row_of
from guided_diffusion.inference.rendering import class_columns, draw_strip
from guided_diffusion.inference.resolve import SampleSetup
from guided_diffusion.inference.result_page import write_page
from guided_diffusion.inference.run_lock import SAMPLING, only_run
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.inference.trajectory import MemberStates, Trajectory, member_frames
from guided_diffusion.inference.volume_writer import VolumeWriter
from guided_diffusion.inference.writers import maps_of, write_case, write_nifti
from guided_diffusion.options.segmentation import SampleDataOptions
from guided_diffusion.report.animation import Moment, write_animation
from guided_diffusion.report.pictures import write_picture
from guided_diffusion.report.sinks import VisdomSink, page_of


def run_sampling(setup: SampleSetup) -> None:
    """Announce a sampling run, segment its data, and write a record of it beside the results.

    Raises:
        UserError: another sampling writes into the folder, or some cases failed.
    """
    options, run, dataset = setup.options, setup.run, setup.dataset
    assert dataset is not None
    sinks = [VisdomSink(options.visdom, environment=page_of(run))] if options.visdom else []
    logger.configure(quiet=rank() > 0, sinks=sinks if rank() == 0 else [])
    segmenter = Segmenter.from_setup(setup)
    device = device_notes(segmenter.plan.precision, segmenter.device, tf32=run.tf32)
    for line in [*setup.notes, *device, str(dataset), str(segmenter)]:
        logger.log(line)
    out_dir, flags = expanded(run.out_dir), setup.networks[0].trained.flags
    if options.dry_run:
        entries = dataset.entries[: options.num_samples or None]
        number = len(setup.job.share(entries) if setup.job else entries)
        logger.log(
            f"dry run: {counted(number, 'case')} would be drawn; they would be written to "
            f"{run.out_dir}"
        )
        return
    with only_run(out_dir, SAMPLING, job=setup.job):
        names = _segment_and_note(segmenter, setup, out_dir)
        if rank() == 0 and setup.job is None:
            write_page(out_dir, dataset, segmenter.classes)
    for sink in sinks:
        sink.close()
    end = "_<class>" if segmenter.classes else ""
    kinds = ["mask", f"output_ens{end}", "uncertainty", "overlay"]
    kinds += [f"output<i>{end}"] * options.save_members
    if any(one.network.version not in ("plain", "unet") for one in setup.networks):
        kinds.append(f"coarse{end}")
    kinds += ["debug"] * options.debug
    files = ", ".join(f"<case>_{kind}.png" for kind in kinds)
    files += ", <case>_members.gif" * (options.debug and segmenter.plan.evaluations > 1)
    record = setup.job.record if setup.job else PREDICTIONS
    logger.log(f"{counted(len(names), 'case')} in {run.out_dir}: {files}, {record}")
    logger.log(after_sampling(flags, dataset, setup.job))


def _segment_and_note(segmenter: Segmenter, setup: SampleSetup, out_dir: Path) -> list[str]:
    """Segment the data, note the settings beside the results, and return the cases' names."""
    options, dataset = setup.options, setup.dataset
    assert dataset is not None
    text = f"{segmenter.fingerprint} {read_as(dataset)}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    first = setup.networks[0].trained
    data = first.flags.group(SampleDataOptions).data_dir
    known = setup.job is not None and is_noted(out_dir, first.flags)
    record = {} if known else run_record(first.flags, data=data)
    if record and first.checkpoint.run:
        record["training"] = first.checkpoint.run

    def note() -> None:
        note_sampling(
            out_dir,
            fingerprint,
            model=str(segmenter),
            seed=segmenter.plan.seed,
            options={**first.checkpoint.options, "plane": dataset.plane},
        )

    return segment(
        segmenter,
        dataset,
        out_dir,
        fingerprint=fingerprint,
        num_samples=options.num_samples,
        job=setup.job,
        debug=options.debug,
        save_members=options.save_members,
        writers=writer_count(options.writers, segmenter.device),
        note=note,
        run=record,
    )


def segment(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    out_dir: Path,
    *,
    fingerprint: str,
    num_samples: int = 0,
    job: Job | None = None,
    debug: bool = False,
    save_members: bool = True,
    writers: int = 1,
    note: Callable[[], object] = bool,
    run: Mapping[str, Any] = {},
) -> list[str]:
    """Segment a data set into a result folder and return the names of its cases.

    Args:
        segmenter: draws and fuses.
        dataset: cases at their own size; with masks, the overlays show them.
        out_dir: where ``predictions.csv`` and the files of each case go.
        fingerprint: of everything the masks depend on; finished cases that bear it are kept.
        num_samples: the first so many cases; 0 for all.
        job: draws its share of these cases only, beside other jobs; None for all of them.
        debug: also write a strip of all channels and masks of each case, and an animated picture
            of its members.
        save_members: also write the members of each case.
        writers: threads that write cases while the next ones are drawn.
        note: called by the first process before anything is drawn, to record the settings.
        run: what would repeat the run, recorded if there is anything left to draw.

    Raises:
        UserError: the folder holds another run's masks of other data; or some cases failed, and all
            others are finished.
    """
    # What is left to do, and this process's share of it.
    make_folder(out_dir)
    entries = dataset.entries[: num_samples or None]
    taken = job.share(entries) if job else range(len(entries))
    names = [entries[index].name for index in taken]
    require_replaceable(out_dir / SAMPLING_RECORD)
    ends = [end for _, end in each(segmenter.classes)]
    columns, several = class_columns(segmenter.classes), bool(segmenter.others)
    record = Record(
        out_dir,
        fingerprint,
        columns,
        spreads=several,
        ends=ends,
        with_members=save_members,
        job=job,
        names=names,
    )
    record.refuse_other_run(dataset)
    note_classes(out_dir, segmenter.classes, known=record.is_uniform)
    if rank() == 0:
        note()
        if job:
            write_jobs(out_dir, job.of, entries)
    volumes = VolumeWriter(
        out_dir, fingerprint, [entries[index] for index in taken], plane=dataset.plane
    )
    record.forget(volumes.lost(record.rows.keys() - {*names}))
    todo = [
        index
        for index in taken
        if not record.finished((entry := entries[index]).name)
        or (entry.volume and not volumes.holds(entry))
    ]
    if todo:
        note_run(out_dir, run)
    record.begin([entries[index].name for index in todo], of=len(names))
    mine = share_of(todo, entries)
    others = {entries[i].volume for i in todo} if rank() == 0 else {e.volume for e in entries}
    own = {entries[index].volume for index in mine}
    volumes.expect((entries[index] for index in mine), elsewhere=others - own)
    volumes.write()

    # How cases are read, drawn and written.
    read = ReadAhead(dataset, mine)
    moments: dict[str, list[Moment]] = {}  # of those that are not written yet

    def draw(indices: Sequence[int]) -> list[tuple[Case, Segmentation]]:
        cases = read(indices)
        shown = Trajectory(segmenter, cases[0].name, show=_show) if logger.has_sinks() else None
        if not debug:
            return list(zip(cases, segmenter.segment(cases, shown), strict=True))
        states = MemberStates(segmenter, cases, then=shown)
        results = segmenter.segment(cases, states)
        moments.update({case.name: states.moments(k) for k, case in enumerate(cases)})
        return list(zip(cases, results, strict=True))

    def write(index: int, drawn: tuple[Case, Segmentation], seconds: float) -> dict[str, Any]:
        case, result = drawn
        write_case(out_dir, case, result, save_members=save_members)
        if debug:
            pixels = draw_strip(case, result, channels=dataset.modalities)
            write_picture(out_dir / f"{case.name}_debug.png", pixels)
            if some := moments.pop(case.name, []):
                frames = member_frames(case, result, some)
                write_animation(out_dir / f"{case.name}_members.gif", frames)
        if entries[index].volume:
            volumes.keep(entries[index], maps_of(result))
        elif case.affine is not None:
            write_nifti(out_dir, case, result, source=entries[index].images[0])
        return row_of(case, result, seconds, segmenter.frame)

    # The loop over cases.
    plan = segmenter.plan
    if plan.compile and (first := next(readable(dataset, mine), None)):
        logger.log(f"compiled in {segmenter.warm_up(first):.0f} s")
    try:
        all_done = run_cases(
            entries,
            mine,
            record,
            draw=draw,
            write=write,
            after=volumes.write,
            together=plan.cases,
            evaluations=segmenter.evaluations,
            writers=writers,
        )
    finally:
        read.close()
        if rank() == 0:
            log_remarks(record, names)
    if rank() == 0 and all_done and job is None:
        volumes.clear()
    return names


def _show(trajectory: Trajectory) -> None:
    logger.picture("sampling", trajectory.picture(), trajectory.calls)
