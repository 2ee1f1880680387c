"""What every search over inputs shares: the network stands still, images are drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Without gradients for the network's weights; their flags come back afterwards."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def draw(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` entries of ``pool`` (N,), with repetition."""
    return pool[torch.randint(len(pool), (count,), generator=generator)]
