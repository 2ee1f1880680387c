import pytest
import torch

from backdoorscan.bench.architectures import ARCHITECTURES, build, reference
from backdoorscan.errors import UnknownNameError, UsageError
from backdoorscan.formats.weights.arch import build as build_named

SHAPES = [(1, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 55, 47), (3, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_size_of_image_and_small_enough(name, shape):
    network = build(name, shape, 10).eval()
    assert network(torch.zeros(2, *shape)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reference_names_the_same_network(name):
    named = build_named(reference(name, (3, 32, 32), 7))
    built = build(name, (3, 32, 32), 7)
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}


@pytest.mark.parametrize("wrong", ["conv_dense", "nothing_1x16x16_10", "conv_dense_1x16_10"])
def test_a_wrong_reference_is_the_users_error(wrong):
    with pytest.raises(UsageError):
        build_named(f"backdoorscan.bench.architectures:{wrong}")


def test_a_wrong_name_gets_a_suggestion():
    with pytest.raises(UnknownNameError) as caught:
        build("residuals", (1, 8, 8), 2)
    assert caught.value.hint == "Did you mean 'residual'?"
