"""What every search over inputs shares."""

import subprocess
import sys

import pytest
import torch
from torch import fx, nn

from backdoorscan.classifier import Classifier
from backdoorscan.ops.searching import Descent, frozen

ALONE = """
import sys, torch
from backdoorscan.ops.searching import Descent
place = torch.ones(3, requires_grad=True)
Descent([place], 0.1).step(place.square().sum())
print(float(place.detach().sum()), "torch._dynamo" in sys.modules)
"""


def slope(places):
    first, second = places
    return (first - 1).square().sum() + (first.mean() * second).pow(4).sum()


def test_it_goes_where_adam_goes():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 3, generator=generator), torch.randn(2, generator=generator)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    descent, adam = Descent(ours, 0.15), torch.optim.Adam(theirs, lr=0.15, betas=(0.5, 0.9))
    for _ in range(25):
        descent.step(slope(ours))
        adam.zero_grad()
        slope(theirs).backward()
        adam.step()
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(ours, start, strict=True))


def test_a_search_does_not_import_the_compiler():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    total, imported = done.stdout.split()
    assert float(total) < 3
    assert imported == "False"


def test_a_frozen_classifier_computes_the_same_and_is_itself_again_afterwards():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    classifier = Classifier(fx.symbolic_trace(nn.Sequential(*layers)), input_shape=(1, 8, 8), num_classes=3)
    classifier.network.get_parameter("0.bias").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    network, images = classifier.network, torch.rand(5, 1, 8, 8)
    scores = classifier(images)
    with pytest.raises(KeyError), frozen(classifier):
        assert not classifier(images).requires_grad
        assert torch.equal(classifier(images), scores)
        raise KeyError
    assert classifier.network is network
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags
    assert torch.equal(classifier(images), scores)
