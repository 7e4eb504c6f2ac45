"""What to do once a command has ended, in one line: the next command with its paths filled in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guided_diffusion.data.datasets import SegmentationDataset
from guided_diffusion.data.jobs import Job
from guided_diffusion.files import expanded
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import NetworkOptions
from guided_diffusion.options.presets import PRESETS
from guided_diffusion.options.segmentation import (
    DIFFUSING,
    DataOptions,
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    WatchOptions,
)
from guided_diffusion.report.page import REPORT
from guided_diffusion.scoring.evaluate import Evaluation

SCRIPTS = {
    "train": "segmentation_train",
    "sample": "segmentation_sample",
    "score": "segmentation_env",
    "weak-train": "train_tumor_ddfm",
    "weak-sample": "image_tumor_sample",
    "weak-classifier": "classifier_tumor_train",
    "weak-segment": "image_p_seg",
}
CLASSIFIED = ("cg-cdm", "gradcam")
"""Methods that need a classifier."""
SOLVER = {"dpm_solver": True, "steps": 10}
"""What the next command samples with: few steps, so that there is soon something to look at."""


def command_line(name: str, **flags: object) -> str:
    """Write a command as this process was called: as a script, or as ``guided-diffusion NAME``."""
    program = Path(sys.argv[0])
    script = Path(program.parent.name, f"{SCRIPTS[name]}.py")
    as_script = program.suffix == ".py" and program.name != "__main__.py"
    words = ["python", str(script)] if as_script else ["guided-diffusion", name]
    for flag, value in flags.items():
        words += [f"--{flag}", str(value)]
    return shlex.join(words)


def after_check(data: DataOptions) -> str:
    """Name the training command for the data that was looked at, with settings for any machine."""
    given = {"split": data.split, "mask_labels": data.mask_labels}
    chosen = {name: value for name, value in given.items() if value}
    where = {"data_dir": data.data_dir, **chosen, "out_dir": "results/first"}
    return f"next: {command_line('train', preset='small', **where)}"


def few_steps(version: str) -> dict[str, object]:
    """The flags that sample with few steps; none for a network that does not diffuse."""
    return dict(SOLVER) if version in DIFFUSING else {}


def after_training(flags: Flags) -> str:
    """Name the sampling command for the network that was trained."""
    run, data = flags.group(RunOptions), flags.group(DataOptions)
    where: dict[str, object] = {"data_dir": _to_segment(data, flags.group(WatchOptions).val_dir)}
    if data.split:
        where["split"] = data.split
    solver = few_steps(flags.group(NetworkOptions).version)
    preset = flags.given.get("preset", "")
    if solver and preset and "sample" in PRESETS[preset].parts:
        solver = {"preset": preset}
    out = run.out_dir
    return f"next: {command_line('sample', model_path=out, **where, out_dir=out, **solver)}"


def _to_segment(data: DataOptions, val_dir: str) -> str:
    """The images beside those of training that are meant for testing; a word where none are."""
    folder = expanded(data.data_dir)
    if data.split or (folder / "imagesTs").is_dir():
        return data.data_dir
    beside = [Path(data.data_dir).parent / name for name in ("testing", "test", "Test")]
    found = [str(path) for path in beside if expanded(path).is_dir() and expanded(path) != folder]
    return next(iter([*found, val_dir] if val_dir else found), "YOUR_IMAGES")


def after_weak_training(flags: Flags, recorded: Mapping[str, Any]) -> str:
    """Name the next command of weak supervision, of the same data and folder.

    Args:
        flags: of the training.
        recorded: what its checkpoints record.
    """
    folder = {"save_dir": flags.get("out_dir", "./results/weak")}
    arrays = {n: flags.given[n] for n in ("data_folder", "fold", "class_index") if n in flags.given}
    where = {"src_dir": flags.get("src_dir", "./data/weak"), **arrays, **folder}
    preset = flags.given.get("preset", "")
    segmenting = PRESETS[preset].parts.get("weak-segment", {}) if preset else {}
    chosen = {"preset": preset} if segmenting else {}
    classified = segmenting.get("method") in CLASSIFIED or segmenting.get("label") == "classifier"
    if "model_type" in recorded:
        how = {**chosen, **where} if classified else {**where, "guided": True}
        return f"next: {command_line('weak-segment', **how)}"
    if not recorded["class_cond"]:
        few = {"use_ddim": True, "steps": 50}
        return (
            f"next: {command_line('weak-sample', **folder, **few)}; to segment, train with "
            "--class_cond True"
        )
    if segmenting and not classified:
        return f"next: {command_line('weak-segment', **chosen, **where)}"
    size = {"img_size": recorded["image_size"]}
    return f"next: {command_line('weak-classifier', **chosen, **where, **size)}"


def after_weak_masks(dataset: Path) -> str:
    """Name the command that trains a supervised network on weak masks."""
    out = dataset.parent / "supervised"
    return f"next: {command_line('train', preset='small', data_dir=dataset, out_dir=out)}"


def after_sampling(flags: Flags, dataset: SegmentationDataset, job: Job | None = None) -> str:
    """Name the page to look at and, of cases with a truth, the scoring command; a job's is its own.

    The page is that of a run of all cases.
    """
    run, data = flags.group(RunOptions), flags.group(SampleDataOptions)
    page = Path(run.out_dir, REPORT)
    shown = job is None and expanded(page).exists()
    look = f"open {page}; the most doubtful cases come first" if shown else ""
    truths = sum(bool(entry.masks) for entry in dataset.entries)
    if not truths:
        return f"next: {look or f'the masks are in {run.out_dir}'}"
    few = flags.group(SamplingOptions).num_samples or truths < len(dataset.entries)
    partial = {"partial": True} if few or data.split or data.slices else {}
    part = {"job": job} if job else {}
    scoring = command_line("score", inp_pth=run.out_dir, out_pth=data.data_dir, **partial, **part)
    return f"next: {scoring}" + (f"\n  or {look}" if look else "")


def after_scoring(evaluation: Evaluation, *, report: bool) -> str:
    """Say what of a scored folder to look at: its report and its worst case, else its table."""
    folder = evaluation.folder
    lesions = [
        (row.dice or 0.0, row.name)
        for scores in evaluation.scores.values()
        for row in scores.rows
        if not row.empty_truth
    ]
    dice, name = min(lesions, default=(0.0, ""))
    overlay = folder / f"{name}_overlay.png"
    parts = [str(folder / REPORT)] if report else []
    if overlay.exists():
        parts.append(f"{overlay}, the lowest Dice of a case with a lesion, {dice:.4f}")
    return f"next: open {' or '.join(parts or [str(folder / 'scores.csv')])}"
