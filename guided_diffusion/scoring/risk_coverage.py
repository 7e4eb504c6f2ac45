"""What remains to be wrong when the most uncertain cases are handed to a person.

The risk-coverage curve of Geifman and El-Yaniv (2017), *Selective Classification for Deep Neural
Networks*, with 1 - Dice as the risk of a case. All functions are pure.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
TARGETS = (0.8, 0.85, 0.9, 0.95)
"""Mean Dice of the rest for which the summary says how many cases to hand over."""
_POINTS = 101  # of a curve that is kept


class RiskCoverage(NamedTuple):
    """The mean Dice of the cases that are left when the most uncertain ones are handed over.

    ``handed`` [N] rises from 0 to (N - 1) / N of the cases, ``dice`` [N] is the mean of the rest,
    ``oracle`` [N] the same if the cases with the lowest Dice went first. ``area`` is the mean of 1
    less ``dice`` over the curve (AURC), ``excess`` what of it is above the oracle's: 0 is perfect.
    """

    handed: Floats
    dice: Floats
    oracle: Floats
    area: float
    excess: float

    def share(self, target: float) -> float | None:
        """Compute the smallest share of cases to hand over for a mean Dice of the rest.

        None where no share reaches ``target``.
        """
        reached = np.flatnonzero(self.dice >= target - 1e-12)
        return float(self.handed[reached[0]]) if len(reached) else None

    def thinned(self) -> dict[str, list[float]]:
        """The three columns by name, with about a hundred points of a longer curve."""
        last = len(self.handed) - 1
        kept = np.unique(np.linspace(0, last, min(_POINTS, last + 1)).round().astype(np.intp))
        columns = {"handed": self.handed, "dice": self.dice, "oracle": self.oracle}
        return {name: values[kept].tolist() for name, values in columns.items()}


def risk_coverage(uncertainty: ArrayLike, dice: ArrayLike) -> RiskCoverage | None:
    """Compute the curve of cases with an uncertainty [N] and a Dice [N]; None without a case.

    Cases of the same uncertainty count as handed over in random order.
    """
    unsure, scores = (np.asarray(x, dtype=np.float64) for x in (uncertainty, dice))
    if not len(scores):
        return None
    _, group, size = np.unique(unsure, return_inverse=True, return_counts=True)
    even = np.bincount(group, scores) / size  # the expected Dice at any place within a group
    rest, oracle = _means(np.repeat(even, size)), _means(np.sort(scores)[::-1])
    handed = np.arange(len(scores)) / len(scores)
    area = float(1 - rest.mean())
    return RiskCoverage(handed, rest, oracle, area, excess=float(oracle.mean() - rest.mean()))


def _means(ordered: Floats) -> Floats:
    """The mean of all values, of all but the last, and so on to the first alone."""
    return (np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[::-1]
