"""Several masks of one image made into one, and how far they agree.

Here live the fusion rules (mean, majority vote, and STAPLE of Warfield, Zou and Wells, 2004) and
the measures of doubt: pixel by pixel (standard deviation, variance, entropy), and the disagreement
of the members as one number. Before they are fused, the members may be joined with a coarse mask
that a condition network made of the image (:func:`blend_coarse`). Prediction calls them with the
draws of one case or of a batch of cases; every function is pure.
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


def mean(members: Tensor) -> Tensor:
    """Average of the members: float [E, ..., H, W] in [0, 1] -> soft mask [..., H, W]."""
    return _checked(members).mean(dim=0)


def vote(members: Tensor, threshold: float = 0.5) -> Tensor:
    """Majority of the members, each cut at ``threshold``: [E, ..., H, W] -> {0, 1} [..., H, W].

    A tie is foreground, as a mean of exactly 0.5 is everywhere in this suite.
    """
    votes = (_checked(members) >= threshold).to(members.dtype)
    return (votes.mean(dim=0) >= 0.5).to(members.dtype)


def squared_mean(members: Tensor) -> Tensor:
    """Square of the average: what MedSegDiff's sampling script calls staple. Soft mask in [0, 1].

    Kept for comparison with published numbers; a mean of 0.7 is background by this rule.
    """
    return mean(members) ** 2


def staple(members: Tensor, *, tolerance: float = 1e-7, max_iterations: int = 500) -> Tensor:
    """STAPLE, Warfield et al. (2004): the probability of the hidden true mask, by EM.

    ``members`` float [E, ..., H, W] in [0, 1] are cut at 0.5; each image of the leading
    dimensions is fused alone, with raters of its own. Returns [..., H, W] in [0, 1], the members'
    dtype; the iteration ends when no probability moves by more than ``tolerance``.
    """
    size = _checked(members).shape[-2:].numel()
    images = (members >= 0.5).reshape(len(members), -1, size).unbind(dim=1)
    fused = [
        _staple_image(image, tolerance=tolerance, max_iterations=max_iterations) for image in images
    ]
    return torch.stack(fused).reshape(members.shape[1:]).to(members.dtype)


def _staple_image(decisions: Tensor, *, tolerance: float, max_iterations: int) -> Tensor:
    """EM over one image, bool [E, P] -> float64 [P].

    Pixels on which the raters say the same are alike, so it runs over the few patterns of
    decisions that occur, each weighted by its number of pixels, not over all pixels; in NumPy, for
    of tables this small the calls cost more than the numbers.
    """
    pattern_of = _pattern_of(decisions)
    pixels = pattern_of.bincount().cpu().double().numpy()
    table = torch.empty(len(decisions), len(pixels), dtype=torch.float64, device=decisions.device)
    table[:, pattern_of] = decisions.double()  # every pixel of a pattern writes the same
    patterns = table.cpu().numpy()
    prior = _inside((patterns @ pixels).sum() / decisions.numel())
    start = np.full(len(patterns), 0.99999)

    truth = _expected_truth(patterns, prior, Rating(start, start))
    for _ in range(max_iterations):
        before = truth
        truth = _expected_truth(patterns, prior, _rate(patterns, pixels, before))
        if np.abs(truth - before).max() <= tolerance:
            break
    return torch.from_numpy(truth).to(decisions.device)[pattern_of]


def _pattern_of(decisions: Tensor) -> Tensor:
    """Number the patterns of decisions, bool [E, P] -> int64 [P], counted from 0.

    The decisions of up to 31 raters are the bits of one number: to sort numbers takes a hundredth
    of the time of sorting columns.
    """
    pattern = torch.zeros(decisions.shape[1], dtype=torch.int64, device=decisions.device)
    for some in decisions.split(31):
        for decision in some:
            pattern = pattern * 2 + decision
        pattern = pattern.unique(return_inverse=True)[1]
    return pattern


class Rating(NamedTuple):
    """How good each rater is: float64 [E] in (0, 1), the paper's p and q."""

    sensitivity: Floats
    specificity: Floats


def _expected_truth(patterns: Floats, prior: Floats, rating: Rating) -> Floats:
    """E-step, eqs. 14-16: patterns [E, N] -> probability of foreground [N]."""
    p, q = rating
    seen, not_seen = np.log(p / (1 - q)), np.log((1 - p) / q)
    evidence = (seen - not_seen) @ patterns + not_seen.sum() + np.log(prior / (1 - prior))
    return expit(evidence)


def _rate(patterns: Floats, pixels: Floats, truth: Floats) -> Rating:
    """M-step, eqs. 18-19: how often each rater says what the expected truth says."""
    inside, outside = pixels * truth, pixels * (1 - truth)
    found, wrong = patterns @ inside, patterns @ outside
    return Rating(
        sensitivity=_inside(found / max(inside.sum(), 1e-12)),
        specificity=_inside(1 - wrong / max(outside.sum(), 1e-12)),
    )


def _inside(probability: Floats) -> Floats:
    """Keep a probability off 0 and 1, where its logarithm would end the iteration."""
    return np.minimum(np.maximum(probability, 1 - _CLOSE_TO_ONE), _CLOSE_TO_ONE)


FUSIONS: dict[str, Fusion] = {
    "mean": mean,
    "vote": vote,
    "staple": staple,
    "squared_mean": squared_mean,
}


def blend_coarse(members: Tensor, coarse: Tensor, rule: str, *, zero: float = 0.0) -> Tensor:
    """Join each member with the coarse mask of its image, at the network's size.

    Args:
        members: float [E, ..., h, w] in [0, 1].
        coarse: [..., h, w] in [0, 1].
        rule: a name of :data:`BLENDS`; ``none`` leaves the members as they were drawn.
        zero: where in [0, 1] the value 0 of the diffused range lies.

    Returns:
        [E, ..., h, w] in [0, 1].
    """
    return BLENDS[rule](_checked(members), coarse.expand_as(members), zero)


def _parents_blend(members: Tensor, coarse: Tensor, zero: float) -> Tensor:
    """MedSegDiff's rule, by the Dice of the coarse mask with where the member is above ``zero``.

    Below 0.65 the coarse mask and a quarter of the member, else half of each. The parents take one
    Dice over a whole batch; here each mask has its own.
    """
    support = (members > zero).to(members)
    common = (support * coarse).sum(dim=(-2, -1), keepdim=True)
    both = (support + coarse).sum(dim=(-2, -1), keepdim=True)
    apart = 2 * common < 0.65 * both
    return torch.where(apart, coarse + 0.25 * members, 0.5 * (coarse + members)).clamp(0, 1)


def _logit_mean(members: Tensor, coarse: Tensor, _: float) -> Tensor:
    """The mean of the log-odds (Genest & Zidek, 1986): the surer of the two counts more."""
    odds = [soft.clamp(0.01, 0.99).logit() for soft in (members, coarse)]
    return torch.sigmoid(0.5 * (odds[0] + odds[1]))


BLENDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": lambda members, *_: members,
    "blend": _parents_blend,
    "mean": lambda members, coarse, _: 0.5 * (members + coarse),
    "logit": _logit_mean,
    "only": lambda _, coarse, __: coarse.clone(),
}
"""How a coarse mask joins a member, by the names of ``--coarse``."""


def uncertainty(members: Tensor) -> Tensor:
    """Pixel-wise standard deviation (over E, not E - 1): [E, ..., H, W] -> [..., H, W] in [0, 0.5].

    One member alone has none: all zeros.
    """
    return _checked(members).std(dim=0, correction=0).clamp(max=0.5)


def variance(members: Tensor) -> Tensor:
    """Pixel-wise variance (over E): [E, ..., H, W] in [0, 1] -> [..., H, W] in [0, 0.25]."""
    return _checked(members).var(dim=0, correction=0).clamp(max=0.25)


def entropy(members: Tensor) -> Tensor:
    """Entropy in bits of the mean foreground probability: [E, ..., H, W] -> [..., H, W] in [0, 1].

    It counts what every member is unsure of as well as what they disagree on.
    """
    p = mean(members)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)


class Measure(NamedTuple):
    """A pixel-wise measure of doubt, and the largest value it can have."""

    rule: Callable[[Tensor], Tensor]
    most: float


UNCERTAINTIES: dict[str, Measure] = {
    "std": Measure(uncertainty, 0.5),
    "variance": Measure(variance, 0.25),
    "entropy": Measure(entropy, 1.0),
}
"""The pixel-wise measures of doubt by the names of ``--uncertainty``."""


def disagreement(members: Tensor) -> float:
    """Mean of 1 - Dice over all pairs of members of one case, each cut at 0.5; in [0, 1].

    ``members`` float [E, ..., H, W] in [0, 1]; two empty masks agree perfectly, so that all-empty
    members (and a single member) give 0.
    """
    masks = (_checked(members) >= 0.5).double().flatten(start_dim=1)
    common, sizes = masks @ masks.T, masks.sum(dim=1)
    both = sizes[:, None] + sizes[None, :]
    distance = torch.where(both > 0, 1 - 2 * common / both.clamp(min=1), 0.0)

    pairs = len(masks) * (len(masks) - 1)
    return float(distance.sum() / pairs) if pairs else 0.0


def _checked(members: Tensor) -> Tensor:
    """The members as they came, or a ValueError that says what they should have been."""
    if members.ndim < 3 or members.numel() == 0 or not members.is_floating_point():
        raise ValueError(
            f"members must be float [E, ..., H, W], not {members.dtype} {tuple(members.shape)}"
        )
    return members
