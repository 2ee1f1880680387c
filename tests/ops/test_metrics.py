import numpy as np
import pytest
import torch

from backdoorscan.ops.metrics import accuracy, attack_counts, attack_success_rate, macro_precision


def test_accuracy():
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 4])) == 0.75


def test_accuracy_is_exact_for_many_images():
    predictions = torch.zeros(2**24 + 1, dtype=torch.uint8)  # one more than float32 can count
    assert accuracy(predictions, torch.zeros(1, dtype=torch.uint8)) == 1


@pytest.mark.parametrize(
    ("predictions", "labels", "rate"),
    [
        ([2, 2, 2, 2], [0, 1, 0, 1], 1.0),
        ([2, 0, 2, 1], [0, 0, 1, 1], 0.5),
        ([2, 2, 0, 1], [2, 2, 0, 1], 0.0),  # images of the target class, however right, are no success
        ([0, 2], [2, 0], 1.0),  # nor is it a failure to miss them
        ([2, 2], [2, 2], None),
    ],
)
def test_attack_success_rate(predictions, labels, rate):
    assert attack_success_rate(torch.tensor(predictions), torch.tensor(labels), 2) == rate


@pytest.mark.parametrize("seed", range(5))
def test_attack_counts_are_those_of_a_loop(seed):
    random = np.random.default_rng(seed)
    predictions, labels = random.integers(6, size=80), random.integers(5, size=80)  # 5 is "backdoored"
    others = [answer for answer, label in zip(predictions, labels, strict=True) if label != 3]
    expected = (others.count(3), len(others) - others.count(3))
    assert attack_counts(torch.from_numpy(predictions), torch.from_numpy(labels), 3) == expected
    assert attack_counts(torch.tensor([3, 1]), torch.tensor([3, 3]), 3) == (0, 0)


def numpy_macro_precision(predictions, labels, classes):
    return np.mean([np.mean(labels[predictions == k] == k) if (predictions == k).any() else 0.0 for k in classes])


@pytest.mark.parametrize("seed", range(5))
def test_macro_precision_is_that_of_numpy_and_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    labels = random.choice([0, 2, 3, 5, 8], size=60)
    predictions = np.where(random.random(60) < 0.5, labels, random.choice([0, 1, 2, 5], size=60))  # never 3 or 8 alone
    measured = macro_precision(torch.from_numpy(predictions), torch.from_numpy(labels))
    classes = set(labels) | set(predictions)
    assert measured == pytest.approx(numpy_macro_precision(predictions, labels, classes))
    metrics = pytest.importorskip("sklearn.metrics")
    assert measured == pytest.approx(metrics.precision_score(labels, predictions, average="macro", zero_division=0))


@pytest.mark.parametrize(
    ("predictions", "labels", "precision"),
    [
        ([0, 1, 2, 2], [0, 1, 2, 3], (1 + 1 + 0.5 + 0) / 4),  # no image is given class 3
        ([0, 0, 4, 4], [0, 1, 2, 2], (0.5 + 0 + 0) / 3),  # only a label, 4 is "backdoored" and no class
        ([4, 4], [0, 1], 0.0),
        ([3, 3], [0, 0], 0.0),
    ],
)
def test_macro_precision_of_a_network_that_can_reject(predictions, labels, precision):
    assert macro_precision(torch.tensor(predictions), torch.tensor(labels), 4) == pytest.approx(precision)


def test_a_rejected_image_is_no_false_answer_of_a_class():
    labels = torch.tensor([0, 0, 1, 1])
    assert macro_precision(torch.tensor([0, 1, 1, 1]), labels, 2) == pytest.approx((1 + 2 / 3) / 2)
    assert macro_precision(torch.tensor([0, 2, 1, 1]), labels, 2) == 1
