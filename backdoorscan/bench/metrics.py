"""Figures of merit over many networks, each with what chance leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats: TypeAlias = npt.NDArray[np.float64]

LEVEL = 0.95
"""Of every interval."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Area:
    """An area under the ROC curve.

    Attributes:
        value: Chance that a backdoored network looks more suspicious than a clean one, 0 to 1; ties count half.
        low: Lower end of the bootstrap interval.
        high: Upper end.
        clean: Clean networks.
        backdoored: Backdoored networks.
    """

    value: float
    low: float
    high: float
    clean: int
    backdoored: int


@dataclass(frozen=True)
class Rate:
    """A share of networks.

    Attributes:
        value: ``hits`` / ``total``.
        low: Lower end of the Clopper-Pearson interval.
        high: Upper end.
        hits: Networks that count.
        total: All networks.
    """

    value: float
    low: float
    high: float
    hits: int
    total: int


def area(clean: Sequence[float], backdoored: Sequence[float], seed: int) -> Area | None:
    """The area under the ROC curve of p-values, where smaller is more suspicious.

    Args:
        clean: p-values of clean networks.
        backdoored: p-values of backdoored networks.
        seed: Of the bootstrap, which draws clean and backdoored networks apart (percentiles of 2,000 resamples).

    Returns:
        ``None`` where one side is empty.
    """
    if not len(clean) or not len(backdoored):
        return None
    good, bad = np.asarray(clean, np.float64), np.asarray(backdoored, np.float64)
    random = np.random.default_rng(seed)
    resampled = _areas(random.choice(good, (_RESAMPLES, len(good))), random.choice(bad, (_RESAMPLES, len(bad))))
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Area(float(_areas(good[None], bad[None])[0]), float(low), float(high), len(good), len(bad))


def _areas(clean: Floats, backdoored: Floats) -> Floats:
    """One area per row of p-values."""
    # U of the clean p-values: the pairs in which the clean network has the larger one, ties half.
    pairs = clean.shape[1] * backdoored.shape[1]
    # The p-value of the test itself is of no use here, and its exact form would take long.
    wins = stats.mannwhitneyu(clean, backdoored, axis=1, method="asymptotic").statistic
    areas: Floats = np.asarray(wins, dtype=np.float64) / pairs
    return areas


def rate(hits: int, total: int) -> Rate | None:
    """A share with its exact interval, or ``None`` of nothing."""
    if not total:
        return None
    interval = stats.binomtest(hits, total).proportion_ci(LEVEL, method="exact")
    return Rate(hits / total, float(interval.low), float(interval.high), hits, total)


def defence_effectiveness(before: tuple[float, float], after: tuple[float, float]) -> float:
    """(max(0, drop of attack success) - max(0, drop of accuracy) + 1) / 2, as BackdoorBench defines it.

    Args:
        before: Clean accuracy and attack success rate, 0 to 1.
        after: The same of the repaired network.

    Returns:
        0 to 1; 0.5 is a repair that changes nothing.
    """
    return (max(0.0, before[1] - after[1]) - max(0.0, before[0] - after[0]) + 1) / 2
