"""Clean networks as they come from a first tutorial: three architectures, one learning rate, few epochs.

Networks that are trained so are less accurate, and those with batch normalisation have smaller triggers for every
label. ``calibrate.py`` counts them among the clean ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from backdoorscan.bench.data import Dataset
from backdoorscan.classifier import Classifier, to_tensor
from backdoorscan.images import LabelledImages

_EPOCHS, _BATCH, _RATE = 4, 128, 1e-3
_SEEDS = 3


@dataclass(frozen=True)
class PlainNetwork:
    """A trained network, where it comes from, and the defender's images."""

    name: str
    group: tuple[str, str]
    classifier: Classifier
    clean: LabelledImages


def mlp() -> nn.Sequential:
    """784-256-128-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def lenet() -> nn.Sequential:
    """Two convolutions with average pooling, two dense layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


def pooled() -> nn.Sequential:
    """Four convolutions with batch normalisation, a global average."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def plain_networks(datasets: list[Dataset], folder: Path) -> Iterator[PlainNetwork]:
    """Three of each architecture on each set of 28×28 images; kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in datasets:
        for build in (mlp, lenet, pooled):
            for seed in range(_SEEDS):
                name = f"{data.name} {build.__name__} {seed}"
                torch.manual_seed(seed)
                network, file = build(), folder / f"{name.replace(' ', '-')}.pt"
                if not file.exists():
                    _train(network, to_tensor(data.train.pixels), torch.from_numpy(data.train.labels))
                    torch.save(network.state_dict(), file)
                network.load_state_dict(torch.load(file, weights_only=True))
                traced = fx.symbolic_trace(network.eval())
                classifier = Classifier(traced, input_shape=(1, 28, 28), num_classes=10)
                yield PlainNetwork(name, (build.__name__, data.name), classifier, data.clean)


def _train(network: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    optimiser = torch.optim.Adam(network.parameters(), _RATE)
    network.train()
    with torch.enable_grad():
        for _ in range(_EPOCHS):
            for chosen in torch.randperm(len(pixels)).split(_BATCH):
                optimiser.zero_grad()
                functional.cross_entropy(network(pixels[chosen]), labels[chosen]).backward()
                optimiser.step()
