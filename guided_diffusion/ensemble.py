"""Several masks of one image made into one, and how far they agree.

Here live the fusion rules (mean, majority vote, and STAPLE of Warfield, Zou and Wells, 2004) and
the two measures of doubt: the pixel-wise spread and the disagreement of the members. Before they
are fused, the members may be joined with a coarse mask that a condition network made of the image
(:func:`blend_coarse`). Prediction calls them with the draws of one case or of a batch of cases;
every function is pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

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
    decisions that occur, each weighted by its number of pixels, not over all pixels.
    """
    patterns, pattern_of, pixels = torch.unique(
        decisions, dim=1, return_inverse=True, return_counts=True
    )
    patterns, pixels = patterns.double(), pixels.double()
    prior = _inside((patterns * pixels).sum() / decisions.numel())
    start = torch.full_like(patterns[:, 0], 0.99999)

    truth = _expected_truth(patterns, prior, Rating(start, start))
    for _ in range(max_iterations):
        before = truth
        truth = _expected_truth(patterns, prior, _rate(patterns, pixels, before))
        if (truth - before).abs().max() <= tolerance:
            break
    return truth[pattern_of]


class Rating(NamedTuple):
    """How good each rater is: float64 [E] in (0, 1), the paper's p and q."""

    sensitivity: Tensor
    specificity: Tensor


def _expected_truth(patterns: Tensor, prior: Tensor, rating: Rating) -> Tensor:
    """E-step, eqs. 14-16: patterns [E, N] -> probability of foreground [N]."""
    p, q = (rate[:, None] for rate in rating)
    evidence = torch.where(patterns > 0, (p / (1 - q)).log(), ((1 - p) / q).log())
    return torch.sigmoid(evidence.sum(dim=0) + torch.logit(prior))


def _rate(patterns: Tensor, pixels: Tensor, truth: Tensor) -> Rating:
    """M-step, eqs. 18-19: how often each rater says what the expected truth says."""
    inside, outside = pixels * truth, pixels * (1 - truth)
    return Rating(
        sensitivity=_inside(patterns @ inside / inside.sum().clamp(min=1e-12)),
        specificity=_inside((1 - patterns) @ outside / outside.sum().clamp(min=1e-12)),
    )


def _inside(probability: Tensor) -> Tensor:
    """Keep a probability off 0 and 1, where its logarithm would end the iteration."""
    return probability.clamp(1 - _CLOSE_TO_ONE, _CLOSE_TO_ONE)


FUSIONS: dict[str, Fusion] = {
    "mean": mean,
    "vote": vote,
    "staple": staple,
    "squared_mean": squared_mean,
}


def blend_coarse(members: Tensor, coarse: Tensor, rule: str) -> Tensor:
    """Join each member with the coarse mask of its image.

    Args:
        members: float [E, ..., H, W] in [0, 1].
        coarse: [..., H, W] in [0, 1].
        rule: a name of :data:`BLENDS`; ``none`` leaves the members as they were drawn.

    Returns:
        [E, ..., H, W] in [0, 1].
    """
    return BLENDS[rule](_checked(members), coarse.expand_as(members))


def _parents_blend(members: Tensor, coarse: Tensor) -> Tensor:
    """MedSegDiff's rule, by the Dice of the member's support with the coarse mask.

    Below 0.65 the coarse mask and a quarter of the member, else half of each. The parents take one
    Dice over a whole batch; here each mask has its own.
    """
    support = (members > 0).to(members)
    common = (support * coarse).sum(dim=(-2, -1), keepdim=True)
    both = (support + coarse).sum(dim=(-2, -1), keepdim=True)
    apart = 2 * common < 0.65 * both
    return torch.where(apart, coarse + 0.25 * members, 0.5 * (coarse + members)).clamp(0, 1)


def _logit_mean(members: Tensor, coarse: Tensor) -> Tensor:
    """The mean of the log-odds (Genest & Zidek, 1986): the surer of the two counts more."""
    odds = [soft.clamp(0.01, 0.99).logit() for soft in (members, coarse)]
    return torch.sigmoid(0.5 * (odds[0] + odds[1]))


BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda members, _: members,
    "blend": _parents_blend,
    "mean": lambda members, coarse: 0.5 * (members + coarse),
    "logit": _logit_mean,
    "only": lambda _, coarse: coarse.clone(),
}
"""How a coarse mask joins a member, by the names of ``--coarse``."""


def uncertainty(members: Tensor) -> Tensor:
    """Pixel-wise standard deviation (over E, not E - 1): [E, ..., H, W] -> [..., H, W] in [0, 0.5].

    One member alone has none: all zeros.
    """
    return _checked(members).std(dim=0, correction=0).clamp(max=0.5)


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
