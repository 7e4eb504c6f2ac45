"""Scoring a folder of masks of several declared classes: each class against its own truth.

Classes that exclude each other are told apart as in prediction, by the likeliest one, after the
soft masks were brought to the truth's size; then each is scored as a single class is. Called by the
composition root where a result folder, or ``--mask_labels``, declares classes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guided_diffusion import metrics
from guided_diffusion.classes import Classes, find_classes, recorded_classes
from guided_diffusion.errors import UserError
from guided_diffusion.evaluate import (
    CaseFiles,
    CaseScore,
    Mask,
    Summary,
    evaluate,
    folder_of,
    mean_of,
    noted,
    pair_cases,
    read_soft,
    resize,
    scored,
    summarise,
    write_text,
)
from guided_diffusion.layouts import Truth, open_masks
from guided_diffusion.patients import PatientScore, score_patients, summarise_patients


def evaluate_all(
    inp_pth: str | Path | None,
    out_pth: str | Path | None,
    *,
    partial: bool = False,
    mask_labels: str = "",
) -> Summary:
    """Score a result folder by its classes: those given, else those that sampling noted in it.

    Without either everything above 0 is one class, and this is ``evaluate``.
    """
    folder = folder_of(inp_pth, "--inp_pth")
    classes = find_classes(mask_labels) or recorded_classes(folder)
    if classes is None:
        return evaluate(inp_pth, out_pth, partial=partial)
    return evaluate_classes(folder, folder_of(out_pth, "--out_pth"), classes, partial=partial)


def evaluate_classes(
    folder: Path, truth_folder: Path, classes: Classes, *, partial: bool = False
) -> Summary:
    """Score every class of the predictions in ``folder`` against the truths of ``truth_folder``.

    Writes ``scores.csv`` (one row per case and class), ``patients.csv`` where patients are known
    and ``summary.json``, whose own means are those over the classes; returns the summary.

    Raises:
        UserError: as ``evaluate``; a class without files; a truth with a label of no class.
    """
    truths = open_masks(truth_folder, classes)
    rows: dict[str, list[CaseScore]] = {name: [] for name in classes.names}
    for cases in _cases_by_class(folder, truths, classes, partial=partial):
        for name, score in zip(classes.names, _score_case(cases, classes), strict=True):
            rows[name].append(score)

    patients = {name: _by_patient(scores, truths) for name, scores in rows.items()}
    summary = _summary(rows, patients)
    summary |= noted(folder)
    write_text(folder / "scores.csv", _table(rows, CaseScore._fields))
    if any(patients.values()):
        write_text(folder / "patients.csv", _table(patients, PatientScore._fields))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _cases_by_class(
    folder: Path, truths: Mapping[str, Truth], classes: Classes, *, partial: bool
) -> list[tuple[CaseFiles, ...]]:
    """The files of every case, one entry per class in their order."""
    ends = [f"_{name}" for name in classes.names]
    by_class = [pair_cases(folder, truths, partial=partial, end=end) for end in ends]
    for name, cases in zip(classes.names, by_class, strict=True):
        if [case.name for case in cases] != [case.name for case in by_class[0]]:
            raise UserError(
                folder,
                found=f"other cases of class {name} than of class {classes.names[0]}",
                expected="a file of each class for every case",
                mend="Sample again: finished cases are kept.",
            )
    return list(zip(*by_class, strict=True))


def _score_case(cases: Sequence[CaseFiles], classes: Classes) -> list[CaseScore]:
    """Read the files of one case and score each class of it."""
    truth = np.asarray(cases[0].truth(), dtype=np.float32)
    fused = _read_stack([case.fused for case in cases])
    found = _at_size_of(truth, fused, classes)
    members = [
        _at_size_of(truth, _read_stack(paths), classes)
        for paths in zip(*(case.members for case in cases), strict=False)
    ]
    scores = []
    for k, case in enumerate(cases):
        counts = metrics.confusion(found[k], metrics.binarise(truth[k]))
        single = [metrics.dice(metrics.confusion(m[k], truth[k] >= 0.5)) for m in members]
        scores.append(scored(case, fused[k], truth[k], counts, single))
    return scores


def _read_stack(paths: Sequence[Path]) -> Mask:
    """The soft masks of all classes, float32 [K, H, W]."""
    masks = [read_soft(path) for path in paths]
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise UserError(
                path,
                found=f"a mask of {' x '.join(map(str, mask.shape))}",
                expected=f"{' x '.join(map(str, masks[0].shape))} as in {paths[0].name}",
                mend="The folder holds files of two runs: sample into an empty folder.",
            )
    return np.stack(masks)


def _at_size_of(truth: Mask, soft: Mask, classes: Classes) -> NDArray[np.bool_]:
    """Soft masks [K, h, w] -> the binary ones [K, H, W] at the truth's size."""
    size = (truth.shape[1], truth.shape[2])
    return classes.masks(np.stack([resize(channel, size) for channel in soft]))


def _by_patient(scores: Sequence[CaseScore], truths: Mapping[str, Truth]) -> list[PatientScore]:
    counts = {s.name: metrics.Confusion(s.tp, s.fp, s.fn, s.tn) for s in scores}
    return score_patients(counts, {name: truth.patient for name, truth in truths.items()})


def _summary(
    rows: Mapping[str, Sequence[CaseScore]], patients: Mapping[str, Sequence[PatientScore]]
) -> Summary:
    """The summary of every class, and above them the means over the classes.

    A case counts as empty there where all of its classes are.
    """
    parts: dict[str, Summary] = {
        name: {**summarise(scores), **summarise_patients(patients[name])}
        for name, scores in rows.items()
    }
    first = next(iter(parts.values()))
    means = {
        key: mean_of(part[key] for part in parts.values())
        for key in first
        if any(isinstance(part[key], float) for part in parts.values())
    }
    cases = list(zip(*rows.values(), strict=True))
    empty = [all(score.empty_truth for score in case) for case in cases]
    found_none = [all(score.empty_prediction for score in case) for case in cases]
    return {
        **first,
        **means,
        "threshold": metrics.THRESHOLD,
        "empty_truth": sum(empty),
        "empty_prediction": sum(found_none),
        "empty_both": sum(map(all, zip(empty, found_none, strict=True))),
        "classes": parts,
    }


def _table(
    rows: Mapping[str, Sequence[CaseScore] | Sequence[PatientScore]], fields: Sequence[str]
) -> str:
    """One line per case (or patient) and class, the classes of a case one after the other."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([fields[0], "class", *fields[1:]])
    for scores in zip(*rows.values(), strict=True):
        for name, score in zip(rows, scores, strict=True):
            values = [int(value) if isinstance(value, bool) else value for value in score]
            writer.writerow([values[0], name, *values[1:]])
    return text.getvalue()
