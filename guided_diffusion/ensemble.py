"""Fusion of several masks of one image into one, and the uncertainty among them.

Fusion rules: mean, majority vote, and STAPLE (Warfield, Zou and Wells, 2004). Uncertainty: per
pixel (standard deviation, variance, entropy), and the disagreement of the members as one number.
Before fusion, :func:`blend_coarse` can blend the members with the coarse mask of a condition
network. All functions are pure and accept one case or a batch of cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

Floats = NDArray[np.float64]
Fusion = Callable[[Tensor], Tensor]
_CLOSE_TO_ONE = 1.0 - 1e-9
_TOLERANCE, _MOST_ITERATIONS = 1e-7, 500  # of STAPLE's iteration


def mean(members: Tensor) -> Tensor:
    """Average the members: float [E, ..., H, W] in [0, 1] -> soft mask [..., H, W]."""
    return _checked(members).mean(dim=0)


def vote(members: Tensor, threshold: float = 0.5) -> Tensor:
    """Take the majority of thresholded members: float [E, ..., H, W] -> {0, 1} [..., H, W].

    A tie is foreground, as a mean of exactly 0.5 is throughout this package.
    """
    votes = (_checked(members) >= threshold).to(members.dtype)
    return (votes.mean(dim=0) >= 0.5).to(members.dtype)


def squared_mean(members: Tensor) -> Tensor:
    """Square the average: [E, ..., H, W] in [0, 1] -> soft mask [..., H, W] in [0, 1].

    MedSegDiff's sampling script calls this staple. It is kept for comparison with published
    numbers; with it a mean of 0.7 is background.
    """
    return mean(members) ** 2


def staple(members: Tensor) -> Tensor:
    """Estimate the probability of the hidden true mask by EM: STAPLE, Warfield et al. (2004).

    ``members`` are float [E, ..., H, W] in [0, 1], thresholded at 0.5. Each image of the leading
    dimensions is fused separately, with its own estimates of the raters. Returns [..., H, W] in
    [0, 1], of the members' dtype.
    """
    size = _checked(members).shape[-2:].numel()
    images = (members >= 0.5).reshape(len(members), -1, size).unbind(dim=1)
    fused = [_staple_image(image) for image in images]
    return torch.stack(fused).reshape(members.shape[1:]).to(members.dtype)


def _staple_image(decisions: Tensor) -> Tensor:
    """Run EM on one image, bool [E, P] -> float64 [P].

    Pixels with the same decisions of all raters are equivalent, so EM runs over the few patterns of
    decisions that occur, weighted by their pixel counts. The tables are so small that NumPy, with
    its cheaper calls, is faster than torch.
    """
    pattern_of = _pattern_of(decisions)
    pixels = pattern_of.bincount().cpu().double().numpy()
    table = torch.empty(len(decisions), len(pixels), dtype=torch.float64, device=decisions.device)
    table[:, pattern_of] = decisions.double()  # all pixels of a pattern write the same values
    patterns = table.cpu().numpy()
    prior = _clip_probability((patterns @ pixels).sum() / decisions.numel())
    start = np.full(len(patterns), 0.99999)

    truth = _expected_truth(patterns, prior, Rating(start, start))
    for _ in range(_MOST_ITERATIONS):
        before = truth
        truth = _expected_truth(patterns, prior, _rate(patterns, pixels, before))
        if np.abs(truth - before).max() <= _TOLERANCE:
            break
    return torch.from_numpy(truth).to(decisions.device)[pattern_of]


def _pattern_of(decisions: Tensor) -> Tensor:
    """Number the patterns of decisions, bool [E, P] -> int64 [P], starting at 0.

    The decisions of up to 31 raters are the bits of one integer, since sorting integers takes a
    hundredth of the time of sorting columns.
    """
    pattern = torch.zeros(decisions.shape[1], dtype=torch.int64, device=decisions.device)
    for some in decisions.split(31):
        for decision in some:
            pattern = pattern * 2 + decision
        pattern = pattern.unique(return_inverse=True)[1]
    return pattern


class Rating(NamedTuple):
    """The quality of each rater: float64 [E] in (0, 1), p and q in the paper."""

    sensitivity: Floats
    specificity: Floats


def _expected_truth(patterns: Floats, prior: Floats, rating: Rating) -> Floats:
    """E-step, eqs. 14-16: patterns [E, N] -> probability of foreground [N]."""
    p, q = rating
    seen, not_seen = np.log(p / (1 - q)), np.log((1 - p) / q)
    evidence = (seen - not_seen) @ patterns + not_seen.sum() + np.log(prior / (1 - prior))
    return expit(evidence)


def _rate(patterns: Floats, pixels: Floats, truth: Floats) -> Rating:
    """M-step, eqs. 18-19: how often each rater agrees with the expected truth."""
    inside, outside = pixels * truth, pixels * (1 - truth)
    found, wrong = patterns @ inside, patterns @ outside
    return Rating(
        sensitivity=_clip_probability(found / max(inside.sum(), 1e-12)),
        specificity=_clip_probability(1 - wrong / max(outside.sum(), 1e-12)),
    )


def _clip_probability(probability: Floats) -> Floats:
    """Keep a probability away from 0 and 1, where its logarithm would be infinite."""
    return np.minimum(np.maximum(probability, 1 - _CLOSE_TO_ONE), _CLOSE_TO_ONE)


FUSIONS: dict[str, Fusion] = {
    "mean": mean,
    "vote": vote,
    "staple": staple,
    "squared_mean": squared_mean,
}


def blend_coarse(members: Tensor, coarse: Tensor, rule: str, *, zero: float = 0.0) -> Tensor:
    """Blend each member with the coarse mask of its image, at the network's size.

    Args:
        members: float [E, ..., h, w] in [0, 1].
        coarse: [..., h, w] in [0, 1].
        rule: a name of :data:`BLENDS`; ``none`` returns the members unchanged.
        zero: the value 0 of the diffused range, mapped to [0, 1].

    Returns:
        [E, ..., h, w] in [0, 1].
    """
    return BLENDS[rule](_checked(members), coarse.expand_as(members), zero)


def _medsegdiff_blend(members: Tensor, coarse: Tensor, zero: float) -> Tensor:
    """MedSegDiff's rule: weights by the Dice of the coarse mask and the member above ``zero``.

    Below 0.65, the coarse mask plus a quarter of the member, else half of each. MedSegDiff computes
    one Dice over the whole batch; here each mask has its own.
    """
    support = (members > zero).to(members)
    common = (support * coarse).sum(dim=(-2, -1), keepdim=True)
    both = (support + coarse).sum(dim=(-2, -1), keepdim=True)
    differ = 2 * common < 0.65 * both
    return torch.where(differ, coarse + 0.25 * members, 0.5 * (coarse + members)).clamp(0, 1)


def _logit_mean(members: Tensor, coarse: Tensor, _: float) -> Tensor:
    """Average the log-odds (Genest & Zidek, 1986): the more certain mask has more weight."""
    logits = [soft.clamp(0.01, 0.99).logit() for soft in (members, coarse)]
    return torch.sigmoid(0.5 * (logits[0] + logits[1]))


BLENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": lambda members, *_: members,
    "blend": _medsegdiff_blend,
    "mean": lambda members, coarse, _: 0.5 * (members + coarse),
    "logit": _logit_mean,
    "only": lambda _, coarse, __: coarse.clone(),
}
"""The rules that blend a member with the coarse mask, by the names of ``--coarse``."""


def uncertainty(members: Tensor) -> Tensor:
    """Pixel-wise standard deviation (over E, not E - 1): [E, ..., H, W] -> [..., H, W] in [0, 0.5].

    It is zero for a single member.
    """
    return _checked(members).std(dim=0, correction=0).clamp(max=0.5)


def variance(members: Tensor) -> Tensor:
    """Pixel-wise variance (over E): [E, ..., H, W] in [0, 1] -> [..., H, W] in [0, 0.25]."""
    return _checked(members).var(dim=0, correction=0).clamp(max=0.25)


def entropy(members: Tensor) -> Tensor:
    """Entropy in bits of the mean foreground probability: [E, ..., H, W] -> [..., H, W] in [0, 1].

    It measures the uncertainty within members as well as the disagreement among them.
    """
    p = mean(members)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)


class Measure(NamedTuple):
    """A pixel-wise measure of uncertainty, and the largest value it can have."""

    rule: Callable[[Tensor], Tensor]
    most: float


UNCERTAINTIES: dict[str, Measure] = {
    "std": Measure(uncertainty, 0.5),
    "variance": Measure(variance, 0.25),
    "entropy": Measure(entropy, 1.0),
}
"""The pixel-wise measures of uncertainty by the names of ``--uncertainty``."""


def disagreement(members: Tensor) -> float:
    """Average 1 - Dice over all pairs of members of one case, thresholded at 0.5; in [0, 1].

    ``members`` are float [E, ..., H, W] in [0, 1]. Two empty masks agree perfectly, so empty
    members, and a single member, give 0.
    """
    masks = (_checked(members) >= 0.5).double().flatten(start_dim=1)
    common, sizes = masks @ masks.T, masks.sum(dim=1)
    both = sizes[:, None] + sizes[None, :]
    distance = torch.where(both > 0, 1 - 2 * common / both.clamp(min=1), 0.0)

    pairs = len(masks) * (len(masks) - 1)
    return float(distance.sum() / pairs) if pairs else 0.0


def _checked(members: Tensor) -> Tensor:
    """Return the members, or raise a ValueError if they are not float [E, ..., H, W]."""
    if members.ndim < 3 or members.numel() == 0 or not members.is_floating_point():
        raise ValueError(
            f"members must be float [E, ..., H, W], not {members.dtype} {tuple(members.shape)}"
        )
    return members
