"""Fusion of several masks of one image into one, and the uncertainty among them.

Fusion rules: mean, majority vote, STAPLE (Warfield, Zou and Wells, 2004), and the threshold of the
highest expected Dice. Uncertainty: per pixel (standard deviation, variance, entropy), and the
disagreement of the members as one number. Before fusion, :func:`blend_coarse` can blend the members
with the coarse mask of a condition network; after it, :func:`temper` can calibrate the fused mask.
All functions are pure and accept one case or a batch of cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit
from torch import Tensor

Floats = NDArray[np.float64]
Fusion = Callable[[Tensor], Tensor]
_CLOSE_TO_ONE = 1.0 - 1e-9
_TOLERANCE, _MOST_ITERATIONS = 1e-7, 500  # of STAPLE's iteration
_BELOW_HALF = 127 / 255  # the highest 8-bit level of the background
_MOST_TEMPERATURE = 10.0


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


def expected_dice(members: Tensor, *, exclusive: bool = False) -> Tensor:
    """Cut the mean where its mean Dice with the members is highest: [E, ..., H, W] -> [..., H, W].

    ``members`` are float in [0, 1]. Each image of the leading dimensions has its own threshold on
    its mean; its members count as masks, thresholded at 0.5, and two empty masks have a Dice of 1.
    Of equally good thresholds the nearest to 0.5 is taken.

    The result is a soft mask in [0, 1] that is at least 0.5 where the mean reaches the threshold.
    Pixels between the threshold and 0.5 are set to the level of their side, as :func:`with_mask`
    does; all others keep the mean, which a shift of the log-odds would take from every pixel. Where
    the axis before H, W is of ``exclusive`` classes, a pixel that several of them reach belongs to
    the one with the highest mean, the first of equals.
    """
    soft, size = mean(members), members.shape[-2:].numel()
    images = members.reshape(len(members), -1, size).unbind(dim=1)
    means = soft.reshape(-1, size)
    chosen = torch.stack([_best_level_set(*pair) for pair in zip(means, images, strict=True)])
    mask = chosen.reshape(soft.shape)
    if exclusive:
        best = soft.where(mask, -1.0).argmax(dim=-3, keepdim=True)
        mask &= best == torch.arange(soft.shape[-3], device=soft.device)[:, None, None]
    return with_mask(soft, mask)


def _best_level_set(soft: Tensor, members: Tensor) -> Tensor:
    """Choose the pixels of one image whose mean [P] reaches the best threshold, bool [P].

    ``members`` are [E, P]. All level sets are scored, from the empty one to that of all pixels.
    """
    ranked, order = soft.sort(descending=True)
    last = torch.cat([ranked[1:] < ranked[:-1], torch.ones_like(ranked[:1], dtype=torch.bool)])
    ends = last.nonzero()[:, 0]  # of each run of pixels with the same mean
    sizes = torch.cat([torch.zeros_like(ends[:1]), ends + 1])  # of the level sets

    score = torch.zeros(len(sizes), dtype=torch.float64, device=soft.device)
    for mask in members >= 0.5:
        common = torch.cat([torch.zeros_like(ends[:1]), mask[order].cumsum(dim=0)[ends]])
        both = sizes + mask.sum()
        score += torch.where(both > 0, 2 * common / both.clamp(min=1).double(), 1.0)

    usual = (ranked[ends] >= 0.5).sum()
    best = (score >= score.max() - 1e-9 * len(members)).nonzero()[:, 0]
    choice = int(best[(best - usual).abs().argmin()])
    return soft >= ranked[ends[choice - 1]] if choice else torch.zeros_like(soft, dtype=torch.bool)


def with_mask(soft: Tensor, mask: Tensor) -> Tensor:
    """Move a soft mask as little as needed to be at least 0.5 where ``mask`` is, and nowhere else.

    ``soft`` is float [..., H, W] in [0, 1], ``mask`` bool of that shape. Pixels on the wrong side
    become 0.5 or 127 / 255, the highest 8-bit level below, so that the file of the result agrees.
    """
    return torch.where(mask, soft.clamp(min=0.5), soft.clamp(max=_BELOW_HALF))


FUSIONS: dict[str, Fusion] = {
    "mean": mean,
    "vote": vote,
    "staple": staple,
    "squared_mean": squared_mean,
    "expected_dice": expected_dice,
}


def fusion(name: str, *, exclusive: bool = False) -> Fusion:
    """Return a rule by its name, for members [E, K, H, W] of ``exclusive`` classes or others."""
    return partial(expected_dice, exclusive=exclusive) if name == "expected_dice" else FUSIONS[name]


def temper(soft: Tensor, temperature: float) -> Tensor:
    """Divide the log-odds of a soft mask, float [...] in [0, 1], by a temperature above 0.

    Guo et al. (2017), section 4.2. Above 1 it becomes less certain, below 1 more certain; 0, 0.5
    and 1 stay, so the mask at 0.5 changes by rounding alone.
    """
    return torch.sigmoid(soft.logit() / temperature)


def fit_temperature(soft: Tensor, truth: Tensor) -> float:
    """Find the temperature in [0.1, 10] with which :func:`temper` has the lowest mean NLL.

    ``soft`` is float [...] in [0, 1]; ``truth``, of that shape, is foreground from 0.5 up. Pixels
    of 0 and 1, which no temperature changes, are left out; without any other the result is 1.
    """
    p, lesion = soft.flatten().double(), truth.flatten() >= 0.5
    known = (p > 0) & (p < 1)
    if not known.any():
        return 1.0
    log_odds = p[known].logit()
    wrong = torch.where(lesion[known], -log_odds, log_odds).numpy()  # log-odds of the other class

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, wrong / math.exp(log_temperature)).mean())

    # The loss is convex in 1 / temperature, so it has one minimum.
    ends = (-math.log(_MOST_TEMPERATURE), math.log(_MOST_TEMPERATURE))
    return math.exp(minimize_scalar(loss, bounds=ends, method="bounded").x)


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
