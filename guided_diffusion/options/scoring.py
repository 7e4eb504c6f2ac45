"""The flags of scoring."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag
from guided_diffusion.options.network import MOST_PROCESSES


@dataclass(frozen=True)
class ScoringOptions:
    """What is scored, and how."""

    inp_pth: str = flag("", "folder with the predicted masks, of sampling or of another tool")
    out_pth: str = flag("", "folder with the ground truth: a data set, or a folder of masks")
    partial: bool = flag(False, "score the cases that both folders hold; False: all, or an error")
    mask_labels: str = flag(
        "", "classes of the truth by label, as in sampling; empty: as inp_pth's classes.json says"
    )
    plane: str = flag(
        "",
        "how the truth's volumes are sliced; empty: as inp_pth's sampling.json says, else axial",
        choices=("", "axial", "coronal", "sagittal"),
    )
    empty: str = flag(
        "match",
        "how empty masks are scored: match, both empty is 1; zero, it is 0; skip, cases without a "
        "lesion are left out; parents, MedSegDiff's smoothing",
        choices=("match", "skip", "zero", "parents"),
    )
    tolerance: float = flag(
        2.0,
        "tolerance of surface Dice, in mm where headers give a spacing, else px",
        least=0,
    )
    low_dice: float = flag(
        0.8, "cases below this Dice are those that the uncertainty should find", least=0, most=1
    )
    raters: str = flag(
        "", "folders with the masks of several raters, by commas; empty: those that out_pth has"
    )
    compare: tuple[str, ...] = flag(
        (), "two folders of masks to compare on the same cases, instead of inp_pth", words="A B"
    )
    job: str = flag(
        "", "score part of the cases, as in 3/16: part 3 of 16, which scoring without it joins"
    )
    report: bool = flag(True, "write report.html beside the scores")
    num_workers: int = flag(
        -1,
        "processes that score; 0: this one; -1: by cores and cases",
        least=-1,
        cap=MOST_PROCESSES,
    )


SCORE = (ScoringOptions,)
