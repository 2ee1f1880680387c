import numpy as np
import pytest
from scipy import stats

from backdoorscan.ops.outliers import Null, SmallOutliers, Spread, anomaly_index, small_finalists, small_outliers

IGNORANT = Spread(sd=0.0, weight=0)
PRIOR = Spread(sd=0.45, weight=10)


def smallest(values, prior=IGNORANT, most=1, tested=None, level=0.01) -> SmallOutliers:
    return small_outliers(list(values), tested=tested or len(values), level=level, most=most, prior=prior)


@pytest.mark.parametrize("count", [3, 10, 11, 1283])
def test_anomaly_index(count):
    values = np.random.default_rng(count).lognormal(size=count)
    ranked = sorted(values)
    half = count // 2
    median = ranked[half] if count % 2 else (ranked[half - 1] + ranked[half]) / 2
    distances = sorted(abs(value - median) for value in values)
    mad = distances[half] if count % 2 else (distances[half - 1] + distances[half]) / 2
    np.testing.assert_allclose(anomaly_index(values), [(median - value) / (1.4826 * mad) for value in values])


def test_anomaly_index_of_mostly_equal_values():
    assert anomaly_index([3, 3, 3, 1]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("count", [4, 10, 43])
def test_without_prior_it_is_a_t_test_of_one_value_against_the_others(count):
    values = np.random.default_rng(count).normal(size=count)
    values[1] = values.min() - 2
    rest = np.delete(values, 1)
    expected = stats.ttest_ind_from_stats(
        values[1], 0, 1, rest.mean(), rest.std(ddof=1), count - 1, alternative="less"
    ).pvalue
    result = smallest(values)
    assert result.index == (1,)
    assert result.p_values[0] == pytest.approx(min(1, count * expected), rel=1e-9)
    assert result.z[0] == pytest.approx((rest.mean() - values[1]) / rest.std(ddof=1))


def test_the_prior_counts_like_that_many_values():
    values = np.array([-2.0, 0.3, 0.1, -0.2, 0.5])
    rest = values[1:]
    freedom, total = len(rest) - 1, ((rest - rest.mean()) ** 2).sum()
    sd = np.sqrt((10 * 0.45**2 + total) / (10 + freedom))
    statistic = (rest.mean() - values[0]) / (sd * np.sqrt(1 + 1 / 4))
    assert smallest(values, PRIOR).p_values[0] == pytest.approx(5 * stats.t.sf(statistic, 10 + freedom))


def test_labels_that_gave_no_value_count_for_the_correction():
    values = [-3.0, 0.3, 0.1, -0.2, 0.5]
    assert smallest(values, PRIOR, tested=50).p_values[0] == pytest.approx(10 * smallest(values, PRIOR).p_values[0])


def false_alarms(count, level, repeats, draw, prior, most=1):
    random = np.random.default_rng(0)
    hits = [smallest(draw(random, count), prior, most=most).p_values[0] <= level for _ in range(repeats)]
    return float(np.mean(hits))


def normal(random, count):
    return random.normal(7, 3, count)


def as_the_prior_says(random, count):
    """The spread itself is drawn from what the prior knows about it."""
    return random.normal(7, np.sqrt(PRIOR.weight * PRIOR.sd**2 / random.chisquare(PRIOR.weight)), count)


@pytest.mark.parametrize(
    ("count", "repeats", "draw", "prior"),
    [
        (10, 2000, as_the_prior_says, PRIOR),
        (43, 700, normal, IGNORANT),
        (43, 700, as_the_prior_says, PRIOR),
        (1283, 60, normal, IGNORANT),
    ],
)
def test_the_false_alarm_rate_is_what_it_says(count, repeats, draw, prior):
    level = 0.1  # of many equal values, P(smallest p <= level) = 1 - exp(-level) to first order
    expected = 1 - np.exp(-level)
    noise = 3.5 * np.sqrt(expected * (1 - expected) / repeats)
    assert abs(false_alarms(count, level, repeats, draw, prior) - expected) <= noise + 0.01


def test_a_search_for_several_costs_no_false_alarms_to_speak_of():
    rate = false_alarms(43, 0.01, 300, normal, IGNORANT, most=4)
    assert rate <= 0.01 + 3.5 * np.sqrt(0.01 / 300)


@pytest.mark.parametrize("prior", [IGNORANT, PRIOR])
def test_power(prior):
    random = np.random.default_rng(1)
    found = []
    for _ in range(100):
        values = random.normal(3, 0.45, 10)
        values[4] -= 5.5  # a trigger a few hundred times smaller
        result = smallest(values, prior, most=2)
        found.append(result.index[0] == 4 and result.p_values[0] <= 0.01)
    assert np.mean(found) >= 0.95


def test_a_large_value_hides_nothing():
    values = np.append(np.random.default_rng(2).normal(0, 0.4, 12), -4.0)
    alone = smallest(values)
    beside = smallest(np.append(values, 40.0))
    assert alone.p_values[0] < 1e-3
    assert beside.index == (12,)
    assert beside.p_values[0] == pytest.approx(alone.p_values[0] * 14 / 13)


def test_a_large_value_is_no_finding():
    values = np.append(np.random.default_rng(3).normal(0, 0.4, 12), 40.0)
    assert smallest(values).p_values[0] > 0.1


def test_several_small_values_do_not_hide_each_other():
    values = np.random.default_rng(4).normal(0, 0.4, 20)
    values[[3, 9, 17]] = [-6.2, -6.0, -6.1]
    masked = smallest(values, most=1)
    result = smallest(values, most=4)
    assert masked.p_values[0] > 0.01
    assert result.index == (3, 17, 9)
    assert max(result.p_values) <= 0.01
    assert list(result.p_values) == sorted(result.p_values)
    assert list(result.z) == sorted(result.z, reverse=True)


def test_a_further_value_counts_only_up_to_the_level():
    values = np.random.default_rng(4).normal(0, 0.4, 20)
    values[3] = -6
    assert smallest(values, most=4).index == (3,)


@pytest.mark.parametrize(
    ("values", "prior"),
    [([1.0] * 10, IGNORANT), ([1.0] * 10, PRIOR), ([2.0, 2.0], PRIOR), ([0.0, 0.0, 0.0], IGNORANT)],
)
def test_equal_values_are_no_outliers(values, prior):
    result = smallest(values, prior, most=3)
    assert result.index == (0,)
    assert result.p_values == (1.0,)


def test_one_value_below_equal_ones():
    result = smallest([1.0] * 9 + [0.5])
    assert result.index == (9,)
    assert 0 <= result.p_values[0] < 1e-6


@pytest.mark.parametrize(("count", "prior"), [(1, PRIOR), (0, PRIOR), (2, IGNORANT)])
def test_too_few_values(count, prior):
    with pytest.raises(ValueError, match="too few"):
        smallest([1.0] * count, prior)


@pytest.mark.parametrize(("count", "prior"), [(2, PRIOR), (3, PRIOR), (3, IGNORANT), (4, IGNORANT)])
def test_tiny_samples_give_probabilities(count, prior):
    result = smallest(np.arange(count) ** 2.0, prior, most=5)
    assert result.index[0] == 0
    assert all(0 <= p <= 1 for p in result.p_values)


def test_the_order_of_the_values_does_not_matter():
    values = np.random.default_rng(5).normal(size=30)
    values[7] -= 6
    shuffled = np.random.default_rng(6).permutation(30)
    one, other = smallest(values, most=5), smallest(values[shuffled], most=5)
    assert [int(shuffled[i]) for i in other.index] == list(one.index)
    assert other.p_values == pytest.approx(one.p_values)


def race(random, sd=0.4, count=96, finalists=10, noise=0.1, lead=None):
    """First rough values of all, and what becomes of the smallest of them."""
    field = random.normal(5, sd, count)
    for place, size in enumerate(lead or ()):
        field[place] = 5 - size * sd
    chosen = np.sort(field)[:finalists]
    return chosen - 1 + random.normal(0, noise * sd, finalists), field


@pytest.mark.parametrize(("sd", "count"), [(0.25, 96), (0.6, 96), (0.4, 70)])
def test_the_smallest_of_many_is_no_outlier_for_being_chosen(sd, count):
    random = np.random.default_rng(count)
    hits = [small_finalists(*race(random, sd, count), level=0.01, most=1).p_values[0] <= 0.1 for _ in range(1000)]
    assert np.mean(hits) <= 0.1 + 3.5 * np.sqrt(0.1 * 0.9 / 1000)
    assert np.mean(hits) >= 0.03  # nor is it too shy


def test_finalists_that_stand_out():
    random = np.random.default_rng(0)
    results = [small_finalists(*race(random, lead=(6, 5.5)), level=0.01, most=3) for _ in range(50)]
    assert np.mean([len(result.index) == 2 and max(result.p_values) <= 0.01 for result in results]) >= 0.9


def test_values_that_have_not_parted_yet_count_as_apart_by_the_least_spread():
    finalists = [1.0, *np.linspace(1.3, 1.5, 9)]
    assert small_finalists(finalists, np.linspace(3, 3.001, 96), level=0.01, most=1).p_values[0] > 0.01


def test_an_outlier_among_all_does_not_widen_their_spread():
    random = np.random.default_rng(3)
    finalists, field = race(random)
    odd = np.append(field, -20.0)
    usual, beside = (small_finalists(finalists, values, level=0.01, most=1).z[0] for values in (field, odd))
    assert beside == pytest.approx(usual, abs=0.1)


@pytest.mark.parametrize(("finalists", "field"), [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_finalists_are_refused(finalists, field):
    with pytest.raises(ValueError, match="too few"):
        small_finalists(finalists, field, level=0.01, most=1)


def test_a_null_is_students_t():
    null = Null(mean=2.0, sd=0.5, count=11)
    assert null.score(3.0) == 2
    assert null.p_value(3.0) == pytest.approx(stats.t.sf(2, 10))
    assert null.p_value(2.0) == pytest.approx(0.5)
