import numpy as np
import pytest
import torch
from torch import nn

from backdoorscan.classifier import Classifier, logits
from backdoorscan.ops import synthesis
from backdoorscan.ops.synthesis import COUNT, make_images


def network(classes, shape=(3, 13, 9), seed=0):
    """A network that looks at large patches of colour, so that every class has an image."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * shape[0], classes, bias=False))
    net[2].weight.data *= 20
    return Classifier(net, input_shape=shape, num_classes=classes)


def made(classifier, seed=0):
    return make_images(classifier, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", [2, 10, 40, 64, 100])
def test_images_are_taken_for_what_they_were_meant_to_be(classes):
    classifier = network(classes)
    images, samples = made(classifier)
    assert logits(classifier, torch.from_numpy(images.pixels)).argmax(1).tolist() == images.labels.tolist()
    assert images.pixels.shape[1:] == classifier.input_shape  # 13 and 9 do not divide by 4
    assert images.source == "made from the model"
    counts = np.unique(images.labels, return_counts=True)[1]
    assert counts.max() <= max(1, COUNT // classes)
    wanted = min(classes, COUNT) * max(1, COUNT // classes)
    assert 0.9 * wanted <= len(images) <= wanted
    assert samples == 60 * wanted


def test_the_generator_decides():
    classifier = network(100)
    one, same, other = (made(classifier, seed)[0] for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert set(one.labels) != set(other.labels)  # another selection of the classes


def test_what_fails_is_dropped():
    classifier = network(5)
    bias = torch.zeros(5)
    bias[3] = -1e4  # never the largest
    classifier.network[2].bias = nn.Parameter(bias)
    images, samples = made(classifier)
    assert set(images.labels) == {0, 1, 2, 4}
    assert samples == 60 * 60
    bias[:] = float("nan")
    classifier.network[2].bias.data = bias
    assert made(classifier) == (None, 60 * 60)


def test_the_network_is_left_as_it_was():
    classifier = network(4)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    told = []
    make_images(classifier, torch.Generator().manual_seed(0), told.append)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags == [True]
    assert told == sorted(told)
    assert told[-1] == 1


def test_images_are_smooth():
    images, _ = made(network(10))
    rough = np.abs(np.diff(images.pixels, axis=2)).mean()
    noise = np.random.default_rng(0).random(images.pixels.shape)
    assert rough < 0.5 * np.abs(np.diff(noise, axis=2)).mean()


def test_total_variation_against_numpy():
    images = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    array = images.numpy().astype(np.float64)
    expected = sum((np.diff(array, axis=axis) ** 2).sum() for axis in (2, 3))
    assert float(synthesis._total_variation(images)) == pytest.approx(expected, rel=1e-5)
