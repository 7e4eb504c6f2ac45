"""What ``score`` does: with a folder, the cases of one job, or two folders side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guided_diffusion.data.folders import counted
from guided_diffusion.data.jobs import parse_job
from guided_diffusion.errors import UserError
from guided_diffusion.inference.next_steps import after_scoring, command_line
from guided_diffusion.inference.provenance import describe_run, note_run, run_record, training_log
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.scoring import ScoringOptions
from guided_diffusion.report.comparison import write_comparison
from guided_diffusion.report.report import write_report
from guided_diffusion.report.thumbnails import collect_layers
from guided_diffusion.scoring.case_scores import Scoring
from guided_diffusion.scoring.compare import compare_folders, comparison_text
from guided_diffusion.scoring.evaluate import Evaluation, evaluate_all, score_job
from guided_diffusion.scoring.pairing import folder_of
from guided_diffusion.scoring.summary import summary_text
from guided_diffusion.scoring.tables import require_writable


def run_scoring(flags: Flags) -> Iterator[str]:
    """Score as the flags say, and yield the messages to print.

    Raises:
        UserError: masks or a ground truth that cannot be scored, or flags that exclude each other.
    """
    options = flags.group(ScoringOptions)
    if options.compare:
        yield from _comparison(flags, options)
    elif options.job:
        yield from _job(options)
    else:
        yield from _folder(flags, options)


def _folder(flags: Flags, options: ScoringOptions) -> Iterator[str]:
    """Score one folder, and write its report."""
    evaluation = _scored(options, options.inp_pth, report=options.report)
    note_run(evaluation.folder, run_record(flags, data=options.out_pth))
    written = ["summary.json", "scores.csv"]
    if options.report:
        run, log = describe_run(evaluation.folder), training_log(evaluation.folder)
        written.append(write_report(evaluation, run, evaluation.collected, training=log).name)
    yield summary_text(evaluation.summary)
    yield f"written: {', '.join(str(Path(options.inp_pth) / name) for name in written)}"
    yield after_scoring(evaluation, report=options.report)


def _job(options: ScoringOptions) -> Iterator[str]:
    """Score the cases of ``--job``."""
    job = parse_job(options.job)
    assert job is not None
    path, count = score_job(options.inp_pth, options.out_pth, job, **_how(options))
    line = command_line("score", inp_pth=options.inp_pth, out_pth=options.out_pth)
    yield f"{counted(count, 'case')} of job {job} scored: {path}"
    yield f"next, once all jobs have ended: {line}"


def _comparison(flags: Flags, options: ScoringOptions) -> Iterator[str]:
    """Score the two folders of ``--compare``, and compare them."""
    if options.job:
        raise UserError("--job", "has no effect with --compare", "Score both folders first.")
    for folder in options.compare:
        require_writable(folder_of(folder, "--compare"))
    first, second = (_scored(options, folder) for folder in options.compare)
    note_run(second.folder, run_record(flags, data=options.out_pth))
    found = compare_folders(first, second)
    written = [second.folder / "comparison.json"]
    if options.report:
        written.append(write_comparison(first, second, found, describe_run(second.folder)))
    yield comparison_text(found)
    yield f"written: {', '.join(map(str, written))}, and the scores of both folders"
    if options.report:
        yield f"next: open {written[-1]}; the cases that changed most come first"


def _scored(options: ScoringOptions, folder: str, *, report: bool = False) -> Evaluation:
    """Score one folder, with what a report needs."""
    collect = collect_layers(folder) if report else None
    return evaluate_all(folder, options.out_pth, collect=collect, **_how(options))


def _how(options: ScoringOptions) -> dict[str, Any]:
    """What the flags say of how to score."""
    return {
        "scoring": Scoring(options.empty, options.tolerance, options.low_dice),
        "partial": options.partial,
        "mask_labels": options.mask_labels,
        "plane": options.plane,
        "raters": [rater for rater in options.raters.split(",") if rater],
        "processes": options.num_workers,
    }
