"""The quick gradient is torch's own, and only where it may be."""

import pytest
import torch
from torch import nn

from backdoorscan.ops.slopes import quick_slopes


def gradients(network, images):
    images = images.clone().requires_grad_()
    scores = network(images)
    (slope,) = torch.autograd.grad(scores.square().sum(), images)
    return scores.detach(), slope


def frozen_network(first):
    torch.manual_seed(0)
    network = nn.Sequential(first, nn.ReLU(), nn.Conv2d(first.out_channels, 4, 2), nn.Flatten())
    return network.requires_grad_(False)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (5, 2), "padding": (2, 0), "bias": False},
        {"kernel_size": 4, "stride": (2, 3), "padding": 1},
        {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 3},
    ],
)
def test_it_is_the_gradient(settings, channels_last):
    network = frozen_network(nn.Conv2d(1, 6, **settings))
    images = torch.rand(7, 1, 13, 11)
    if channels_last:
        network, images = (one.to(memory_format=torch.channels_last) for one in (network, images))
    scores, expected = gradients(network, images)
    with quick_slopes(network):
        assert "GreyConvolution" in str(network[0](images.clone().requires_grad_()).grad_fn)
        quick_scores, slope = gradients(network, images)
    assert torch.equal(quick_scores, scores)
    assert slope.shape == images.shape
    assert torch.allclose(slope, expected, rtol=1e-4, atol=1e-5)


def test_the_layers_are_as_before_afterwards():
    network = frozen_network(nn.Conv2d(1, 6, 3))
    with pytest.raises(KeyError), quick_slopes(network):
        assert "forward" in vars(network[0])
        raise KeyError
    assert "forward" not in vars(network[0])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(1, 6, 3, padding="same"),
        nn.Conv2d(1, 6, 3, padding=1, padding_mode="circular"),
    ],
)
def test_other_convolutions_stay_torchs(layer):
    network = frozen_network(layer)
    images = torch.rand(2, layer.in_channels, 8, 8)
    scores, expected = gradients(network, images)
    with quick_slopes(network):
        assert "forward" not in vars(network[0])
        again, slope = gradients(network, images)
    assert torch.equal(again, scores)
    assert torch.equal(slope, expected)
