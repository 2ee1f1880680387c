import pytest
import torch

from backdoorscan.ops.metrics import accuracy, attack_success_rate


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
