import numpy as np
import pytest
import torch

from backdoorscan.ops.latent import row_evidence, step_lengths


def case(classes=6, width=8, count=40, seed=0, positive=True):
    """A random head and random features: weights, bias, features."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(classes, width, generator=random, dtype=torch.float64)
    bias = torch.randn(classes, generator=random, dtype=torch.float64)
    features = torch.randn(count, width, generator=random, dtype=torch.float64)
    return weights, bias, features.abs() if positive else features


def way(weights, label, positive):
    """The direction that the docstring describes, in NumPy."""
    direction = (weights - weights.mean(0))[label].numpy()
    direction = np.maximum(direction, 0) if positive else direction
    return direction / max(np.linalg.norm(direction), 1e-12)


def arrived(weights, bias, features, label, step, positive):
    """The share of the images that a step along the class's direction brings there."""
    moved = features.numpy() + step * way(weights, label, positive)
    return (np.argmax(moved @ weights.numpy().T + bias.numpy(), axis=1) == label).mean()


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_all_images_arrive_with_that_step_and_not_with_a_shorter_one(positive, seed):
    weights, bias, features = case(seed=seed, positive=positive)
    lengths = step_lengths(weights, bias, features, [1.0])[0].tolist()
    for label, length in enumerate(lengths):
        if np.isinf(length):
            assert arrived(weights, bias, features, label, 1e6, positive) < 1
            continue
        assert arrived(weights, bias, features, label, 1.0001 * length, positive) == 1
        assert length == 0 or arrived(weights, bias, features, label, 0.9999 * length, positive) < 1
    assert sum(0 < length < np.inf for length in lengths) >= 2


@pytest.mark.parametrize("part", [0.5, 0.9])
def test_of_two_classes_the_part_asked_for_arrives(part):
    weights, bias, features = case(classes=2, count=101, positive=False)
    lengths = step_lengths(weights, bias, features, [part])[0].tolist()
    for label, length in enumerate(lengths):
        assert arrived(weights, bias, features, label, length + 1e-6, False) >= part
        assert length == 0 or arrived(weights, bias, features, label, length - 1e-6, False) < part
    assert max(lengths) > 0


def test_quantiles_taken_together_are_those_taken_alone():
    weights, bias, features = case(count=57, positive=False)
    together = step_lengths(weights, bias, features, [0.9, 0.5, 0.9])
    alone = [step_lengths(weights, bias, features, [part])[0] for part in (0.9, 0.5)]
    assert torch.equal(together, torch.stack([*alone, alone[0]]))
    assert not torch.equal(*alone)


def test_a_class_where_all_images_are_already_is_no_step_away():
    weights, bias, features = case(classes=3)
    bias[1] += 1000
    assert step_lengths(weights, bias, features, [0.9])[0, 1] == 0


def test_a_way_without_a_gain_is_infinite():
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    lengths = step_lengths(weights, torch.zeros(3), torch.ones(4, 2), [1.0])[0]
    assert lengths.isinf().tolist() == [False, True, True]  # nothing tells the last two apart


def test_a_row_that_a_backdoor_strengthened_is_the_nearest():
    weights, bias, features = case(classes=20, width=64, seed=3, positive=False)
    features[:, :4] = 0  # neurons that lie dormant on clean images
    weights[:, :4] = 0
    weights[7, :4] = 30
    lengths = step_lengths(weights, bias, features, [0.9])[0]
    assert int(lengths.argmin()) == 7
    assert lengths[7] < 0.5 * lengths.kthvalue(2).values


def test_rows_are_compared_with_the_median_row():
    weights, bias, _ = case(classes=11, seed=4)

    def deviations(values):
        away = values - np.median(values)
        return away / (1.4826 * np.median(np.abs(away)))

    expected = np.maximum(deviations(weights.numpy().sum(1)), deviations(bias.numpy()))
    np.testing.assert_allclose(row_evidence(weights, bias).numpy(), expected)


@pytest.mark.parametrize("where", ["weights", "bias"])
def test_an_unusual_row_has_the_largest_evidence(where):
    weights, bias, _ = case(classes=12, seed=5)
    (weights if where == "weights" else bias)[3] += 10
    evidence = row_evidence(weights, bias)
    assert int(evidence.argmax()) == 3
    assert evidence[3] > 5


def test_rows_that_are_all_the_same_are_not_unusual():
    assert row_evidence(torch.ones(5, 3), torch.zeros(5)).tolist() == [0] * 5
