"""What the summary says of probability and uncertainty: whether they can be trusted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from guided_diffusion.scoring.calibration import (
    BINS,
    Tally,
    auroc,
    brier_score,
    calibration_error,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    sparsification,
    spread_skill,
)
from guided_diffusion.scoring.case_scores import CaseScore, mean_of
from guided_diffusion.scoring.components import Component
from guided_diffusion.scoring.metrics import THRESHOLD, none_for_nan
from guided_diffusion.scoring.risk_coverage import TARGETS, risk_coverage

Described = dict[str, Any]


def describe_calibration(tally: Tally) -> Described:
    """Describe the calibration over all pixels, and over those that are not surely background."""
    region = tally.counts.copy()
    region[0, 0] = region[0, 1]  # leave out background of probability 0, most of a picture
    return {
        "bins": BINS,
        "error": none_for_nan(calibration_error(tally)),
        "error_region": none_for_nan(calibration_error(Tally(region))),
        "nll": none_for_nan(negative_log_likelihood(tally)),
        "brier": none_for_nan(brier_score(tally)),
        "curve": [bin._asdict() for bin in reliability(tally)],
    }


def describe_uncertainty(rows: Sequence[CaseScore], tally: Tally, *, low_dice: float) -> Described:
    """Describe how the uncertainty predicts the error of cases (with a Dice) and of pixels."""
    known = [row for row in rows if row.dice is not None and row.uncertainty is not None]
    uncertainty = [row.uncertainty or 0.0 for row in known]
    dice = [row.dice or 0.0 for row in known]
    errors = [1 - score for score in dice]
    low = [error > 1 - low_dice for error in errors]
    curve = sparsification(tally)
    members = Counter(row.members > 1 for row in rows)
    return {
        "of": "members" if members[True] == len(rows) else "fused mask",
        "correlation": none_for_nan(rank_correlation(uncertainty, errors)),
        "low_dice": low_dice,
        "low_cases": sum(low),
        "auroc": none_for_nan(auroc(uncertainty, low)),
        "sparsification": {**curve._asdict(), "area": none_for_nan(curve.area)},
        **_spread_skill(rows),
        "risk_coverage": _risk_coverage(uncertainty, dice),
    }


def _spread_skill(rows: Sequence[CaseScore]) -> Described:
    """Describe how far members are from each other and from the truth, where cases have several."""
    pairs = [
        (1 - row.dice_between, row.member_error)
        for row in rows
        if row.dice_between is not None and row.member_error is not None
    ]
    spread, error = [spread for spread, _ in pairs], [error for _, error in pairs]
    return {
        "spread": mean_of(spread),
        "member_error": mean_of(error),
        "spread_skill": none_for_nan(spread_skill(spread, error)),
    }


def _risk_coverage(uncertainty: Sequence[float], dice: Sequence[float]) -> Described | None:
    """Describe what is gained by handing the most uncertain cases to a person."""
    curve = risk_coverage(uncertainty, dice)
    if curve is None:
        return None
    return {
        "area": curve.area,
        "excess": curve.excess,
        "hand_over": [{"dice": target, "share": curve.share(target)} for target in TARGETS],
        "curve": curve.thinned(),
    }


def describe_components(
    rows: Sequence[CaseScore], components: Sequence[Sequence[Component]]
) -> Described:
    """Describe the fused masks' components: how many are true, and whether the members know it.

    One is true where the truth contains it, by the rule for members: half of its pixels or more.
    """
    found = [
        (component.found / row.members, (component.inside or 0.0) >= THRESHOLD)
        for row, of_case in zip(rows, components, strict=True)
        for component in of_case
    ]
    shares, true = [share for share, _ in found], [is_true for _, is_true in found]
    return {
        "number": len(found),
        "true": sum(true),
        "share_true": mean_of([share for share, is_true in found if is_true]),
        "share_false": mean_of([share for share, is_true in found if not is_true]),
        "auroc": none_for_nan(auroc(shares, true)),
    }
