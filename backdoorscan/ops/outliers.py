"""Is one of many labels out of line? The paper's anomaly index, and a test with a stated false-alarm rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

MAD_TO_SD = 1.4826
"""Median absolute deviation -> standard deviation, for normal data (Hampel 1974)."""


def anomaly_index(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """How many scaled median absolute deviations each value lies below the median; above it the index is negative.

    ``(median - x) / (1.4826 · median|x - median|)``. Wang et al. 2019, section V.A, call a label infected above 2.
    That is no false-alarm rate: among ten equal labels one lies above 2 in a third of all cases.

    Args:
        values: Shape (N,), finite.

    Returns:
        Shape (N,); all zero where more than half of the values are equal.
    """
    x = np.asarray(values, dtype=float)
    spread = MAD_TO_SD * np.median(np.abs(x - np.median(x)))
    return np.zeros_like(x) if spread == 0 else (np.median(x) - x) / spread


@dataclass(frozen=True)
class Spread:
    """What is known about how far apart equal values lie before seeing any.

    Attributes:
        sd: The typical standard deviation.
        weight: How many values this knowledge is worth; 0 for none.
    """

    sd: float
    weight: float


@dataclass(frozen=True)
class Null:
    """What a statistic was on networks without a backdoor.

    Attributes:
        mean: Its mean, or the median where it is skewed.
        sd: Its standard deviation, or that of its upper half.
        count: How many values these were taken from.
    """

    mean: float
    sd: float
    count: int

    def score(self, value: float) -> float:
        """How far a value lies above the mean, in standard deviations."""
        return (value - self.mean) / self.sd

    def p_value(self, value: float) -> float:
        """The probability that a network without a backdoor has such a value or a larger one, by Student's t."""
        return float(stats.t.sf(self.score(value), self.count - 1))


@dataclass(frozen=True)
class SmallOutliers:
    """The result of ``small_outliers`` and ``small_finalists``.

    Attributes:
        index: Positions of the values that stand out, smallest first; never empty: the first is the smallest value.
        p_values: For each of them, the probability that the smallest of as many equal values lies so far out.
        z: For each, its distance below the mean of the unsuspicious values in standard deviations.
    """

    index: tuple[int, ...]
    p_values: tuple[float, ...]
    z: tuple[float, ...]


def small_outliers(values: Sequence[float], *, tested: int, level: float, most: int, prior: Spread) -> SmallOutliers:
    """Test whether the smallest values are too small, all others being equal and normally distributed.

    The smallest of N values is compared with the mean of the others in their standard deviations. Its p-value is
    that of the externally studentised extreme, N · P(T > t) (Thompson 1935; Grubbs 1950), exact where it matters.
    Few values tell little about their own spread, so it is moderated by what is known beforehand, which also
    adds to the degrees of freedom (Smyth 2004, section 4).

    Both tails need care. A value far *above* the others says nothing about a backdoor but would hide one by blowing
    up the spread, so it is left out of the reference by the same test. Several small values would hide each other,
    so the test is made with one, two, ... of them removed, and the largest number that is significant counts
    (Rosner 1983).

    Args:
        values: On a scale where equal values would be normal: logarithms for sizes. At least 2; without prior
            knowledge at least 3.
        tested: How many labels were looked at in all, for the correction; at least ``len(values)``.
        level: p-value up to which a further value counts as standing out.
        most: The largest number of values that may stand out.
        prior: What is known about the spread.

    Raises:
        ValueError: Too few values.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < (3 if prior.weight == 0 else 2):
        raise ValueError("too few values to compare")
    order = np.argsort(x, kind="stable")
    rows = []
    for removed in range(1, max(1, min(most, len(x) - 3)) + 1):
        rest = _without_large(x[order[removed:]], prior)
        z, tail = _studentised(x[order[removed - 1]], rest, prior)
        rows.append((min(1.0, (tested - removed + 1) * tail), z))
    return _standing_out(rows, order, level)


def small_finalists(finalists: Sequence[float], field: Sequence[float], *, level: float, most: int) -> SmallOutliers:
    """Test whether the smallest of many values are too small, where only the smallest were measured in full.

    All values being equal and normally distributed, the finalists lie where the normal order statistics say (Blom 1958)
    and the smallest of them is compared with the mean that the others point to. How far values lie apart is taken
    from the first, rough measurement of all of them, less those more than 3.5 scaled median absolute deviations away.
    The p-value is N · P(T > t), as in ``small_outliers``, and so is the test for several.

    Args:
        finalists: The smallest values, measured in full, on a scale where equal values would be normal; at least 2.
        field: All N values as first measured, the finalists' among them; at least 2.
        level: p-value up to which a further value counts as standing out.
        most: The largest number of values that may stand out.

    Raises:
        ValueError: Too few values.
    """
    x, first = np.asarray(finalists, dtype=float), np.asarray(field, dtype=float)
    if min(len(x), len(first)) < 2:
        raise ValueError("too few values to compare")
    middle = np.median(first)
    near = first[np.abs(first - middle) <= 3.5 * MAD_TO_SD * np.median(np.abs(first - middle))]
    spread = max(float(near.std(ddof=1)) if len(near) > 1 else 0.0, _LEAST_SPREAD)
    order = np.argsort(x, kind="stable")
    rows = []
    for removed in range(1, max(1, min(most, len(x) - 3)) + 1):
        count, rest = len(first) - removed + 1, x[order[removed:]]
        below = -stats.norm.ppf((np.arange(2, len(rest) + 2) - 0.375) / (count + 0.25)).mean()
        z = float((rest.mean() - x[order[removed - 1]]) / spread + below)
        rows.append((min(1.0, count * float(stats.t.sf(z, max(len(near) - 1, 1)))), z))
    return _standing_out(rows, order, level)


_LEAST_SPREAD = 0.2
"""Of the logarithms of clean labels' sizes: a first measurement may end before they have parted."""


def _standing_out(rows: Sequence[tuple[float, float]], order: npt.NDArray[np.intp], level: float) -> SmallOutliers:
    """As many of the smallest values as are significant together; ``rows`` has p and z of each in turn."""
    last = max((position for position, (p, _) in enumerate(rows) if p <= level), default=0)
    chosen = rows[: last + 1]
    # Values below a significant one are smaller still, so they stand out at least as clearly.
    p_values = tuple(min(p for p, _ in chosen[position:]) for position in range(len(chosen)))
    z_values = tuple(max(z for _, z in chosen[position:]) for position in range(len(chosen)))
    return SmallOutliers(tuple(int(i) for i in order[: last + 1]), p_values, z_values)


def _studentised(candidate: float, rest: npt.NDArray[np.float64], prior: Spread) -> tuple[float, float]:
    """How far ``candidate`` lies below ``rest``, in standard deviations, and the chance that one value does so."""
    freedom = len(rest) - 1
    variance = (prior.weight * prior.sd**2 + np.sum((rest - rest.mean()) ** 2)) / (prior.weight + freedom)
    z = (rest.mean() - candidate) / np.sqrt(max(variance, 1e-12))
    return float(z), float(stats.t.sf(z / np.sqrt(1 + 1 / len(rest)), prior.weight + freedom))


_LARGE_LEVEL = 0.01
"""p-value under which a large value is left out of the reference."""


def _without_large(values: npt.NDArray[np.float64], prior: Spread) -> npt.NDArray[np.float64]:
    """Sorted values without those at the upper end that do not belong; at least 3 and half of them stay."""
    for count in range(max(3, (len(values) + 1) // 2), len(values)):
        _, tail = _studentised(-values[count], -values[:count], prior)
        if len(values) * tail <= _LARGE_LEVEL:
            return values[:count]
    return values
