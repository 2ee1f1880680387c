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
class SmallOutliers:
    """The result of ``small_outliers``.

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
