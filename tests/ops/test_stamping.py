import pytest
import torch
from torch import fx, nn

from backdoorscan.classifier import Classifier
from backdoorscan.ops.stamping import needed_opacity
from backdoorscan.trigger import Trigger


@pytest.fixture
def thresholds():
    """An image's second pixel tells how bright its first has to be for class 1."""
    linear = nn.Linear(2, 2)
    linear.load_state_dict({"weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "bias": torch.zeros(2)})
    return Classifier(fx.symbolic_trace(nn.Sequential(nn.Flatten(), linear)), input_shape=(1, 1, 2), num_classes=2)


def images(*needed):
    return torch.tensor([[[[0.0, value]]] for value in needed])


WHITE = Trigger(torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 2), 1)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_opacity_at_which_a_share_of_the_images_goes_over(thresholds, share):
    pixels = images(*torch.linspace(0.02, 0.98, 97).tolist())
    assert needed_opacity(thresholds, WHITE, pixels, share) == pytest.approx(share, abs=0.03)


def test_a_trigger_that_is_too_weak_has_none(thresholds):
    assert needed_opacity(thresholds, WHITE, images(0.5, 1.5, 1.5), 0.5) is None


def test_where_nothing_is_needed_it_is_next_to_nothing(thresholds):
    assert needed_opacity(thresholds, WHITE, images(-1.0, -1.0), 0.5) <= 0.3
