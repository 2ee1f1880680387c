import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from backdoorscan.bench.metrics import area, defence_effectiveness, rate


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 6], ids=["with ties", "without"])
def test_the_area_is_that_of_scikit_learn(seed, decimals):
    random = np.random.default_rng(seed)
    clean = random.random(17).round(decimals)
    bad = (random.random(29) ** 2).round(decimals)
    truth = np.repeat([0, 1], [17, 29])
    expected = roc_auc_score(truth, -np.concatenate([clean, bad]))
    found = area(clean.tolist(), bad.tolist(), 0)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert (found.clean, found.backdoored) == (17, 29)


def test_the_bootstrap_interval_is_seeded_and_as_wide_as_theory_says():
    random = np.random.default_rng(0)
    clean, bad = random.random(200).tolist(), (random.random(200) * 0.8).tolist()
    found = area(clean, bad, 3)
    assert found == area(clean, bad, 3)
    assert (found.low, found.high) != (area(clean, bad, 4).low, area(clean, bad, 4).high)
    # Hanley and McNeil 1982
    a = found.value
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 199 * (q2 - a * a)) / 200**2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_area_of_the_clear_cases():
    assert area([1.0, 0.5], [0.01], 0).value == 1
    assert area([0.01], [1.0, 0.5], 0).value == 0
    assert area([1.0] * 4, [1.0] * 3, 0).value == 0.5
    assert area([], [0.1], 0) is None
    assert area([0.1], [], 0) is None


@pytest.mark.parametrize(("hits", "total"), [(0, 20), (1, 7), (13, 20), (20, 20)])
def test_the_interval_of_a_rate_is_clopper_and_pearsons(hits, total):
    found = rate(hits, total)
    low = stats.beta.ppf(0.025, hits, total - hits + 1) if hits else 0.0
    high = stats.beta.ppf(0.975, hits + 1, total - hits) if hits < total else 1.0
    assert (found.value, found.hits, found.total) == (hits / total, hits, total)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_rate_of_nothing_is_none():
    assert rate(0, 0) is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.9, 1.0), 0.5),
        ((0.9, 0.9), (0.8, 0.1), 0.85),
        ((0.9, 0.1), (0.95, 0.3), 0.5),
        ((1.0, 0.0), (0.0, 1.0), 0.0),
    ],
)
def test_defence_effectiveness(before, after, expected):
    assert defence_effectiveness(before, after) == pytest.approx(expected)
