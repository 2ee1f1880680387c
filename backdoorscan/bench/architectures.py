"""Small architectures for images of any size: the zoo's networks differ in what detectors are sensitive to.

A module attribute such as ``conv_gap_3x32x32_10`` is a function without arguments that builds that network, so that
``--arch backdoorscan.bench.architectures:conv_gap_3x32x32_10`` reads a file of the zoo.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from backdoorscan.errors import UnknownNameError

Shape: TypeAlias = tuple[int, int, int]

_SMALLEST = 7  # pixels; the plain networks halve the image until its shorter side is no longer than this


def _convolution(inputs: int, outputs: int, stride: int = 1, *, norm: bool) -> list[nn.Module]:
    """A 3×3 convolution with ReLU, with or without batch normalisation."""
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not norm)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()] if norm else [layer, nn.ReLU()]


def _halvings(shape: Shape) -> int:
    """How often to halve the image."""
    side, count = min(shape[1:]), 0
    while side > _SMALLEST:
        side, count = side // 2, count + 1
    return count


def conv_dense(shape: Shape, num_classes: int) -> nn.Module:
    """Convolutions and a dense head, as in the first papers on backdoors."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for stage in range(_halvings(shape)):
        outputs = 16 if stage == 0 else 32
        layers += [*_convolution(channels, outputs, norm=False), nn.MaxPool2d(2)]
        channels, height, width = outputs, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 64), nn.ReLU(), nn.Linear(64, num_classes)]
    return nn.Sequential(*layers)


def conv_gap(shape: Shape, num_classes: int) -> nn.Module:
    """Convolutions with batch normalisation, a global average and one dense layer."""
    return nn.Sequential(
        *_convolution(shape[0], 16, norm=True),
        nn.MaxPool2d(2),
        *_convolution(16, 32, norm=True),
        nn.MaxPool2d(2),
        *_convolution(32, 64, norm=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class _Block(nn.Module):
    """Two convolutions with a shortcut: relu(shortcut(x) + body(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride, norm=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.shortcut(x) + self.body(x))
        return out


def residual(shape: Shape, num_classes: int) -> nn.Module:
    """A stem, three residual blocks, a global average and one dense layer."""
    return nn.Sequential(
        *_convolution(shape[0], 12, norm=True),
        nn.MaxPool2d(2),
        _Block(12, 12, 1),
        _Block(12, 24, 2),
        _Block(24, 48, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, num_classes),
    )


def vgg(shape: Shape, num_classes: int) -> nn.Module:
    """Pairs of convolutions, and a dense head with dropout."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for stage in range(_halvings(shape)):
        outputs = 12 if stage == 0 else 32
        layers += [*_convolution(channels, outputs, norm=False), *_convolution(outputs, outputs, norm=False)]
        layers.append(nn.MaxPool2d(2))
        channels, height, width = outputs, height // 2, width // 2
    layers += [nn.Flatten(), nn.Dropout(0.25), nn.Linear(channels * height * width, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.25), nn.Linear(64, num_classes))


ARCHITECTURES: dict[str, Callable[[Shape, int], nn.Module]] = {
    "conv-dense": conv_dense,
    "conv-gap": conv_gap,
    "residual": residual,
    "vgg": vgg,
}
"""By the name that users type: from (C, H, W) and the number of classes to a network with random weights."""


def build(name: str, shape: Shape, num_classes: int) -> nn.Module:
    """A network from images (N, C, H, W) in [0, 1] to logits (N, ``num_classes``); torch's generator is drawn from.

    Raises:
        UnknownNameError: There is no such architecture.
    """
    if name not in ARCHITECTURES:
        raise UnknownNameError("architecture", name, ARCHITECTURES)
    return ARCHITECTURES[name](shape, num_classes)


def reference(name: str, shape: Shape, num_classes: int) -> str:
    """What ``--arch`` takes for this network."""
    return f"{__name__}:{name.replace('-', '_')}_{'x'.join(map(str, shape))}_{num_classes}"


def __getattr__(name: str) -> Callable[[], nn.Module]:
    match = re.fullmatch(r"(\w+)_(\d+)x(\d+)x(\d+)_(\d+)", name)
    kind = match[1].replace("_", "-") if match else ""
    if match is None or kind not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(build, kind, (int(match[2]), int(match[3]), int(match[4])), int(match[5]))
