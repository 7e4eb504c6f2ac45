"""Scoring a folder of predicted masks against their truths, for ``scripts/segmentation_env.py``.

Here predictions are found in the result folder and paired with the truths by case id, each pair is
scored (Dice and IoU at 0.5 at the truth's own size, and the parents' arithmetic at 256 x 256), and
``scores.csv`` and ``summary.json`` are written beside the predictions. ``report`` makes the text
that the script prints; this room itself prints nothing.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from guided_diffusion import metrics
from guided_diffusion.errors import UserError
from guided_diffusion.files import whole
from guided_diffusion.layouts import Truth, open_masks
from guided_diffusion.patients import patients_csv, score_patients, summarise_patients

Mask = NDArray[np.float32]
Summary = dict[str, Any]

PREDICTION = r"(?P<case>.+)_output_ens{}\.(png|jpg|jpeg)"
MEMBER = r"(?P<case>.+)_output(?P<index>\d+){}\.png"


class CaseFiles(NamedTuple):
    """Where one case lies: its fused mask, its members in order, and how to read its truth."""

    name: str
    fused: Path
    members: tuple[Path, ...]
    truth: Callable[[], Mask]


class CaseScore(NamedTuple):
    """One row of ``scores.csv``; the fields are its columns, in this order."""

    name: str
    dice: float
    iou: float
    parent_dice: float
    parent_iou: float
    tp: int
    fp: int
    fn: int
    tn: int
    empty_truth: bool
    empty_prediction: bool
    members: int
    dice_member: float | None  # mean Dice of the single members; None without member files


def evaluate(
    inp_pth: str | Path | None, out_pth: str | Path | None, *, partial: bool = False
) -> Summary:
    """Score the predictions in ``inp_pth`` against the truths in ``out_pth``.

    Predictions are the files ``<id>_output_ens.png`` (or .jpg) directly in ``inp_pth``, truths
    whatever ``open_masks`` finds for a data layout. Writes ``scores.csv``, ``summary.json`` and,
    where the data set knows its patients, ``patients.csv`` into ``inp_pth``, each whole or not at
    all, after every case has been scored; returns the summary. ``partial`` scores the cases that
    are on both sides. Raises UserError for a missing or empty folder, cases without a partner, and
    a file that is not a readable mask.
    """
    folder, truths = folder_of(inp_pth, "--inp_pth"), open_masks(folder_of(out_pth, "--out_pth"))
    cases = pair_cases(folder, truths, partial=partial)
    scores = [score_case(case) for case in cases]
    counts = {s.name: metrics.Confusion(s.tp, s.fp, s.fn, s.tn) for s in scores}
    patients = score_patients(counts, {name: truth.patient for name, truth in truths.items()})

    summary = {
        **summarise(scores),
        **summarise_patients(patients),
        **noted(folder),
    }
    write_text(folder / "scores.csv", _csv_text(scores))
    if patients:
        write_text(folder / "patients.csv", patients_csv(patients))
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def pair_cases(
    folder: Path, truths: Mapping[str, Truth], *, partial: bool = False, end: str = ""
) -> list[CaseFiles]:
    """Pair the predictions in ``folder`` with the truths, sorted by id.

    ``end`` stands behind the files' names where they are of one class of several.

    Raises UserError that lists the cases which are on one side only (with ``partial`` they are
    left out), and when no case is on both.
    """
    fused, members = find_predictions(folder, end), find_members(folder, end)
    if not fused:
        raise UserError(
            folder,
            found="no prediction",
            expected=f"files named <case>_output_ens{end}.png directly in it",
            mend="Give --inp_pth the folder that segmentation_sample.py wrote (its --out_dir).",
        )

    common = sorted(fused.keys() & truths.keys())
    if not common or (not partial and fused.keys() ^ truths.keys()):
        raise _unpaired(folder, fused.keys(), truths.keys())
    return [CaseFiles(case, fused[case], members.get(case, ()), truths[case]) for case in common]


def find_predictions(folder: Path, end: str = "") -> dict[str, Path]:
    """Fused masks directly in ``folder`` by case id; a lossless .png wins over a .jpg."""
    found = {}
    pattern = re.compile(PREDICTION.format(re.escape(end)), re.IGNORECASE)
    for path in sorted(folder.iterdir(), key=lambda path: path.suffix.lower() == ".png"):
        if match := pattern.fullmatch(path.name):
            found[match["case"]] = path
    return found


def find_members(folder: Path, end: str = "") -> dict[str, tuple[Path, ...]]:
    """Single members ``<id>_output<i>.png`` by case id, in the order of i."""
    found: dict[str, list[tuple[int, Path]]] = {}
    pattern = re.compile(MEMBER.format(re.escape(end)), re.IGNORECASE)
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            found.setdefault(match["case"], []).append((int(match["index"]), path))
    return {case: tuple(path for _, path in sorted(paths)) for case, paths in found.items()}


def score_case(case: CaseFiles) -> CaseScore:
    """Read one case and score it; the prediction goes to the truth's size, never the reverse.

    Raises UserError for a file that cannot be read as a mask, and for a member whose size is not
    that of the fused mask.
    """
    fused, truth = read_soft(case.fused), _read_truth(case)
    return scored(
        case, fused, truth, _counts(fused, truth), _member_scores(case, fused.shape, truth)
    )


def scored(
    case: CaseFiles, fused: Mask, truth: Mask, counts: metrics.Confusion, members: Iterable[float]
) -> CaseScore:
    """The scores of one case, from its two masks, their counts, and the Dice of its members."""
    parent_iou, parent_dice = metrics.parent_scores(_parent_size(fused), _parent_size(truth))
    return CaseScore(
        name=case.name,
        dice=metrics.dice(counts),
        iou=metrics.iou(counts),
        parent_dice=parent_dice,
        parent_iou=parent_iou,
        **counts._asdict(),
        empty_truth=counts.empty_truth,
        empty_prediction=counts.empty_prediction,
        members=len(case.members),
        dice_member=mean_of(members),
    )


def summarise(scores: Sequence[CaseScore]) -> Summary:
    """Means over the cases, over those with a lesion, and the counts of empty masks.

    A mean over no case at all is None (null in JSON).
    """
    lesion = [score for score in scores if not score.empty_truth]
    return {
        "cases": len(scores),
        "empty_truth": len(scores) - len(lesion),
        "empty_prediction": sum(score.empty_prediction for score in scores),
        "empty_both": sum(score.empty_truth and score.empty_prediction for score in scores),
        "dice": mean_of(score.dice for score in scores),
        "dice_lesion": mean_of(score.dice for score in lesion),
        "iou": mean_of(score.iou for score in scores),
        "iou_lesion": mean_of(score.iou for score in lesion),
        "dice_member": mean_of(score.dice_member for score in scores),
        "dice_member_lesion": mean_of(score.dice_member for score in lesion),
        "parent_dice": mean_of(score.parent_dice for score in scores),
        "parent_iou": mean_of(score.parent_iou for score in scores),
        "threshold": metrics.THRESHOLD,
        "empty_rule": metrics.EMPTY_RULE,
    }


def noted(folder: Path) -> Summary:
    """What sampling noted in ``predictions.csv``: seconds per case, and its count of settings."""
    path = folder / "predictions.csv"
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    return {
        "seconds_per_case": mean_of(float(row["seconds"]) for row in rows if row.get("seconds")),
        "settings": len({row.get("fingerprint") for row in rows}),
    }


def report(summary: Summary) -> str:
    """The text that the scoring script prints: the parents' two lines, then our own table."""
    mean = ", mean of classes" if "classes" in summary else ""
    rows = [(f"Dice{mean}", "dice"), (f"IoU{mean}", "iou")]
    rows.append(("Dice of single members", "dice_member"))
    lines = [
        _line(label, summary, key)
        for label, key in rows
        if summary.get(key) is not None and f"{key}_lesion" in summary
    ]
    lines += [
        _line(f"{label} of {name}", scores, key)
        for label, key in (("Dice", "dice"), ("IoU", "iou"))
        for name, scores in summary.get("classes", {}).items()
    ]
    return "\n".join(
        [
            f"iou is {summary['parent_iou']!r}",
            f"dice is {summary['parent_dice']!r}",
            "",
            f"{'at 0.5, own size':<24}{'all cases':>10}{'with lesion':>14}",
            *lines,
            *_patient_lines(summary),
            f"{'cases':<24}{summary['cases']:>10}{_with_lesion(summary):>14}",
            f"{'seconds per case':<24}{_number(summary['seconds_per_case'], 2):>10}",
            "",
            f"empty truths {summary['empty_truth']}, empty predictions "
            f"{summary['empty_prediction']}, both {summary['empty_both']}",
            f"empty masks: {summary['empty_rule']}",
            *_mixture(summary),
        ]
    )


def _mixture(summary: Summary) -> list[str]:
    if summary["settings"] < 2:
        return []
    return [
        f"beware: these masks are of {summary['settings']} different settings (weights, sampler, "
        "steps, seed); fingerprint in predictions.csv tells them apart"
    ]


def _line(label: str, scores: Summary, key: str) -> str:
    """One line of the table: a mean over all cases, and over those with a lesion."""
    return f"{label:<24}{_number(scores[key]):>10}{_number(scores[f'{key}_lesion']):>14}"


def read_soft(path: Path) -> Mask:
    """Read an 8-bit (or 16-bit) grey image as a soft mask: float32 [H, W] in [0, 1].

    Colour is turned to grey as the parents do. Raises UserError when it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            deep = picture.mode.startswith("I")
            levels = np.asarray(picture if deep else picture.convert("L"), dtype=np.float32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            path,
            found=f"a file that cannot be read ({error})",
            expected="an image with one grey mask",
            mend="Sample this case again, or remove the file.",
        ) from error
    soft: Mask = levels / np.float32(65535 if deep else 255)
    return soft


def resize(mask: Mask, size: tuple[int, int], *, antialias: bool | None = None) -> Mask:
    """Bilinear resize of [H, W] to ``size`` (height, width), antialiased where it shrinks.

    Where it enlarges, antialiasing changes the last bit only, and takes ten times as long.
    """
    if mask.shape == size:
        return mask
    if antialias is None:
        antialias = mask.shape[0] > size[0] or mask.shape[1] > size[1]
    batch = torch.from_numpy(np.ascontiguousarray(mask))[None, None]
    resized = functional.interpolate(batch, size, mode="bilinear", antialias=antialias)
    result: Mask = resized[0, 0].numpy()
    return result


def _counts(prediction: Mask, truth: Mask) -> metrics.Confusion:
    """The four counts at the truth's size, both sides cut at 0.5."""
    soft = resize(prediction, (truth.shape[0], truth.shape[1]))
    return metrics.confusion(metrics.binarise(soft), metrics.binarise(truth))


def _parent_size(mask: Mask) -> Mask:
    """Bring a mask to the parents' 256 x 256 as torchvision resizes a uint8 tensor: rounded.

    Antialiased always, because the last bit decides which way a tie is rounded.
    """
    levels = np.round(mask * np.float32(255))
    levels = resize(levels, (metrics.PARENT_SIZE, metrics.PARENT_SIZE), antialias=True)
    rounded: Mask = np.round(levels) / np.float32(255)
    return rounded


def _member_scores(case: CaseFiles, size: tuple[int, ...], truth: Mask) -> list[float]:
    """Dice of every member; all must have the size of the fused mask."""
    scores = []
    for path in case.members:
        member = read_soft(path)
        if member.shape != size:
            raise UserError(
                path,
                found=f"a member of {_size_text(member.shape)}",
                expected=f"{_size_text(size)} as in {case.fused.name}",
                mend="The folder holds files of two runs: sample into an empty folder.",
            )
        scores.append(metrics.dice(_counts(member, truth)))
    return scores


def _read_truth(case: CaseFiles) -> Mask:
    """The truth as float32 [H, W]; UserError unless it is a finite mask in [0, 1]."""
    truth = np.asarray(case.truth(), dtype=np.float32)
    fault = None
    if truth.ndim != 2 or truth.size == 0:
        fault = f"an array of shape {truth.shape}"
    elif not np.isfinite(truth).all():
        fault = "values that are NaN or infinite"
    elif truth.min() < 0 or truth.max() > 1:
        fault = f"values from {truth.min():g} to {truth.max():g}"

    if fault:
        raise UserError(
            f"truth of case {case.name}",
            found=fault,
            expected="one 2-D mask with values in [0, 1]",
            mend="Repair this file in --out_pth.",
        )
    return truth


def _unpaired(folder: Path, predicted: Iterable[str], true: Iterable[str]) -> UserError:
    """The error that lists the cases which are on one side only."""
    missing, surplus = set(true) - set(predicted), set(predicted) - set(true)
    parts = []
    if missing:
        parts.append(f"no prediction for {_cases(missing)}")
    if surplus:
        parts.append(f"no truth for {_cases(surplus)}")

    common = len(set(true) & set(predicted))
    if common:
        mend = f"Complete the folders, or score the {common} common cases with --partial True."
    else:
        mend = "Not one case is on both sides: check that --out_pth is the data that was sampled."
    expected = "one prediction <case>_output_ens.png per truth"
    return UserError(folder, found="; ".join(parts), expected=expected, mend=mend)


def _cases(names: Iterable[str], most: int = 10) -> str:
    """'3 cases (a, b, c)', with the first ten names at most."""
    listed = sorted(names)
    shown = ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
    return f"{len(listed)} {'case' if len(listed) == 1 else 'cases'} ({shown})"


def folder_of(path: str | Path | None, flag: str) -> Path:
    """The folder a flag names, or a UserError that says what is wrong with it."""
    if path is None or not str(path):
        found, mend = "nothing", f"Add {flag} with a folder."
    elif not Path(path).exists():
        found, mend = f"{path}, which does not exist", "Check the path."
    elif not Path(path).is_dir():
        found, mend = f"{path}, which is a file", "Give the folder it lies in."
    else:
        return Path(path)
    raise UserError(flag, found=found, expected="a folder", mend=mend)


def _csv_text(scores: Sequence[CaseScore]) -> str:
    """One header line and one line per case; flags as 0 and 1, an absent value as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CaseScore._fields)
    for score in scores:
        writer.writerow([int(value) if isinstance(value, bool) else value for value in score])
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a table into the result folder, whole or not at all."""
    with whole(path, mend="Change the permissions, or copy the predictions elsewhere.") as part:
        part.write_text(text, encoding="utf-8")


def mean_of(values: Iterable[float | None]) -> float | None:
    """Arithmetic mean of what is there; None where nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _patient_lines(summary: Summary) -> list[str]:
    """The line on patients, where there are any."""
    if not summary.get("patients"):
        return []
    label = f"Dice of {summary['patients']} patient{'s' * (summary['patients'] != 1)}"
    return [f"{label:<24}{_number(summary['dice_patient']):>10}"]


def _number(value: float | int | str | None, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "-"


def _with_lesion(summary: Summary) -> int:
    """How many truths are not empty."""
    return int(summary["cases"] or 0) - int(summary["empty_truth"] or 0)


def _size_text(size: Sequence[int]) -> str:
    return " x ".join(str(length) for length in size)
