"""What commands do once their flags are read: those that check, write and export."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guided_diffusion.bratsloader import find_modalities
from guided_diffusion.checkpoint import (
    IMAGES,
    SEGMENTATION,
    Checkpoint,
    export_checkpoint,
    export_weights,
    kind_of,
    latest_checkpoint,
    load_checkpoint,
)
from guided_diffusion.checkpoint.portable import SUFFIX
from guided_diffusion.data.datasets import Reading
from guided_diffusion.data.folders import counted
from guided_diffusion.data.splits import part_of_cases
from guided_diffusion.errors import UserError, did_you_mean
from guided_diffusion.files import expanded, make_folder, require_replaceable, writing
from guided_diffusion.inference.next_steps import after_check, command_line, few_steps
from guided_diffusion.inference.provenance import note_run, run_record
from guided_diffusion.inference.recorded import checked_flags
from guided_diffusion.inference.run_lock import SLICING, only_run
from guided_diffusion.layouts import open_data
from guided_diffusion.options.flags import Flags, slice_range
from guided_diffusion.options.segmentation import DataOptions
from guided_diffusion.options.tools import (
    CheckOptions,
    ExportOptions,
    PhantomOptions,
    SlicingOptions,
)
from guided_diffusion.tools import phantom_folders
from guided_diffusion.tools.inspect import findings_text, look_at, write_sheet
from guided_diffusion.tools.phantom_layouts import PICTURES, VOLUMES, write_layout
from guided_diffusion.tools.slices import SlicingPlan, cut_all, open_volumes, plan_jobs, sweep

SIZES = {  # layout: pixels per side, slices per patient
    "brats2d": (80, 4),
    "brats3d": (240, 155),
    "isic": (128, 0),
    "weak": (64, 3),
    **dict.fromkeys(PICTURES, (128, 0)),
    **dict.fromkeys(VOLUMES, (80, 52)),
}


def run_slicing(flags: Flags) -> Iterator[str]:
    """Cut what is not cut yet, with progress by volume, and yield the messages to print.

    Raises:
        UserError: volumes or settings that cannot be used, or another slicing into the folder.
    """
    options = flags.group(SlicingOptions)
    reading = Reading(
        modalities=find_modalities(options.modalities),
        slices=slice_range(options.slices),
        plane=options.plane,
        blank_slices=options.blank_slices,
        normalise=options.normalise,
    )
    plan = SlicingPlan(reading, dtype=options.dtype, train=options.train, seed=options.seed)
    out = expanded(options.out, flag="--out")
    dataset = open_volumes(expanded(options.src, flag="--src"), reading)
    if options.dry_run:
        jobs = plan_jobs(dataset, out, plan, dry_run=True)
        folders = [folder for job in jobs for _, folder in job.targets()]
        there = sum(folder.exists() for folder in folders)
        yield (
            f"dry run: {counted(len(folders) - there, 'slice')} of {counted(len(jobs), 'volume')} "
            f"would be written to {out}, {there} are there"
        )
        return
    with only_run(out, SLICING, flag="--out"):
        jobs = plan_jobs(dataset, out, plan)
        sweep(out)
        note_run(out, run_record(flags, data=options.src))
        yield from dataset.notes
        workers = options.workers or os.cpu_count() or 1
        counts = cut_all(dataset, jobs, dtype=plan.dtype, workers=workers)
        written = sum(tqdm(counts, total=len(jobs), unit="volume", disable=None))
    yield (
        f"{counted(written, 'slice')} of {counted(len(jobs), 'volume')} written, "
        f"{len(dataset) - written} were there; who is in which part: {out / 'split.txt'}"
    )
    yield after_check(DataOptions(data_dir=str(_training_part(Path(options.out)))))


def _training_part(folder: Path) -> Path:
    """The folder of the cases to train on: a part of this one, or all of it."""
    parts = [folder / name for name in ("training", "train")]
    return next((part for part in parts if part.is_dir()), folder)


def run_check(flags: Flags) -> Iterator[str]:
    """Look at a data set, and yield what there is to print.

    Raises:
        UserError: the sheet of cases cannot be written.
        SystemExit: something is wrong with the data.
    """
    data, options = flags.group(DataOptions), flags.group(CheckOptions)
    out = expanded(options.out, flag="--out") if options.out else None
    if out:
        make_folder(out.parent, flag="--out")
        require_replaceable(out)
    findings = look_at(
        lambda: open_data(data, test=not options.labelled),
        image_size=options.image_size,
        crop=data.crop,
        workers=options.num_workers,
        parts_of=(lambda dataset: part_of_cases(dataset, data.split)) if data.split else None,
    )
    yield findings_text(findings)
    if out:
        drawn = counted(write_sheet(findings, out, cases=options.cases), "case")
        yield f"{drawn} drawn on {out}"
    if findings.problems:
        sys.exit(2)
    if options.labelled:
        yield after_check(data)


def run_export(options: ExportOptions) -> str:
    """Write one set of weights of a checkpoint, and return the message to print.

    Raises:
        UserError: no checkpoint that can be used, or a file that cannot be written.
    """
    out = expanded(options.out, flag="--out")
    if out.suffix.lower() not in (SUFFIX, ".pt"):
        what = f"--out {options.out}".strip()
        raise UserError(what, "does not end in .safetensors or .pt", "Name such a file.")
    path = latest_checkpoint(options.model_path)
    checkpoint = load_checkpoint(path, training=options.training)
    if checkpoint.options:
        checked_flags(checkpoint, kind_of(checkpoint), path)
    if os.path.lexists(out):
        raise UserError(f"--out {out}", "exists", "Name another file; none is replaced.")
    if options.training and (out.suffix.lower() == SUFFIX or not checkpoint.training):
        problem = "needs a name that ends in .pt"
        if not checkpoint.training:
            problem = f"is not possible: {path} has nothing that training needs"
        raise UserError("--training True", problem, "Omit it to write the weights.")
    if options.training and options.precision != "fp32":
        raise UserError("--precision fp16", "is not for --training True", "Omit one of the two.")
    what = f"step {checkpoint.step}, to continue from,"
    if not options.training:
        what = checkpoint.choose(options.weights)[1]
    if options.dry_run:
        return f"dry run: {what} of {path} would be written to {out}"
    make_folder(out.parent, flag="--out")
    if options.training:
        export_checkpoint(checkpoint, out)
    else:
        export_weights(checkpoint, options.weights, out, precision=options.precision)
    size = out.stat().st_size / 2**20
    return f"{what} of {path} in {out}, {size:.1f} MiB\n{_after_export(options, checkpoint)}"


def _after_export(options: ExportOptions, checkpoint: Checkpoint) -> str:
    """Name the command that uses exported weights, or continues from them."""
    kind, out = kind_of(checkpoint) if checkpoint.options else SEGMENTATION, options.out
    if options.training:
        name = {SEGMENTATION: "train", IMAGES: "weak-train"}.get(kind, "weak-classifier")
        return f"next: {command_line(name, resume_checkpoint=out)}"
    if kind == SEGMENTATION:
        steps = few_steps(checkpoint.options.get("version", "plain"))
        to = {"data_dir": "YOUR_IMAGES", "out_dir": "results/masks", **steps}
        return f"next: {command_line('sample', model_path=out, **to)}"
    flag = "model_path" if kind == IMAGES else "classifier_path"
    return f"next: {command_line('weak-sample', **{flag: out})}"


def write_phantoms(options: PhantomOptions) -> str:
    """Write phantoms, with progress by patient, and return what to print.

    Raises:
        UserError: a folder in use, or flags that the layout has no use for.
    """
    layout, out = options.layout, expanded(options.out, flag="--out")
    if layout not in SIZES:
        hint = did_you_mean(layout, SIZES, "guided-diffusion phantoms -h lists them.")
        raise UserError("--layout", f"{layout!r} is not one of {', '.join(SIZES)}", hint)
    for name, idle in (
        ("slices", ("isic", *PICTURES)),
        ("raters", ("weak", *PICTURES, *VOLUMES)),
    ):
        if getattr(options, name) and layout in idle:
            raise UserError(f"--{name}", f"has no effect with --layout {layout}", f"Omit --{name}.")
    _refuse_occupied(out)
    patients = counted(options.patients, "patient")
    if options.dry_run:
        return f"dry run: {patients} of {layout} would be written to {out}"
    make_folder(out, flag="--out")
    hint = "Free some space, empty the folder and run the command again."
    with writing(out, hint=hint):
        _write_layout(options, out)
    folders = ", ".join(sorted(path.name for path in out.iterdir() if path.is_dir()))
    if layout == "weak":
        following = f"next: {command_line('weak-train', preset='weak-ours', src_dir=options.out)}"
    else:
        following = after_check(DataOptions(data_dir=str(_training_part(Path(options.out)))))
    return f"{patients} written to {out}: {folders}\n{following}"


def _write_layout(options: PhantomOptions, out: Path) -> None:
    layout = options.layout
    usual_size, usual_slices = SIZES[layout]
    common: dict[str, Any] = {
        "patients": options.patients,
        "size": options.size or usual_size,
        "training": options.split,
        "progress": partial(tqdm, desc=layout, unit="patient", disable=None),
    }
    if layout == "isic":
        special: dict[str, Any] = {"raters": options.raters, "generation": options.generation}
        phantom_folders.write_isic(out, options.seed, **special, **common)
        return
    common["slices"] = options.slices or usual_slices
    if layout in PICTURES or layout in VOLUMES:
        write_layout(layout, out, options.seed, **common)
    elif layout == "weak":
        phantom_folders.write_weak(out, options.seed, **common)
    elif layout == "brats2d":
        phantom_folders.write_brats_slices(out, options.seed, raters=options.raters, **common)
    else:
        phantom_folders.write_brats_volumes(out, options.seed, raters=options.raters, **common)


def _refuse_occupied(out: Path) -> None:
    """Raise a UserError unless a folder is absent or empty; a README.md alone is no obstacle."""
    if not out.exists():
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else ["a file"]
    found = [name for name in names if name != "README.md"]
    if found:
        shown = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
        raise UserError(
            f"--out {out}",
            f"is not a new or empty folder, it holds {shown}",
            "Name another folder or empty this one.",
        )
