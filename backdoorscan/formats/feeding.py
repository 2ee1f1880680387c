"""The way of feeding a network as a part of the network."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from backdoorscan.classifier import InputConvention


def as_json(convention: InputConvention | None) -> dict[str, Any] | None:
    """How images are fed, but for the axis order, as plain data."""
    if convention is None:
        return None
    return {name: value for name, value in asdict(convention).items() if name != "layout"}


class Feeding(nn.Module):
    """What comes between the input and a network.

    Args:
        convention: Applied to images in [0, 1]; ``None`` for inputs that need none.
        permuted: The order of the input's axes that comes next, or ``None`` for its own.
        shape: What the network takes, if that is no image.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        convention: InputConvention | None,
        permuted: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.low, self.scale = (0.0, 1.0) if convention is None else (convention.low, convention.high - convention.low)
        self.normalised = convention is not None and bool(convention.mean or convention.std)
        if convention is not None and self.normalised:
            self.register_buffer("mean", torch.tensor(convention.mean or (0.0,)).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(convention.std or (1.0,)).view(-1, 1, 1))
        self.permuted, self.shape = permuted, shape

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs as the network takes them."""
        if (self.low, self.scale) != (0.0, 1.0):
            inputs = inputs * self.scale + self.low
        if self.normalised:
            inputs = (inputs - self.mean) / self.std
        if self.permuted is not None:
            # In the usual order of memory: for another one, exporters write operators that reach into memory.
            inputs = inputs.permute(self.permuted).clone(memory_format=torch.contiguous_format)
        return inputs if self.shape is None else inputs.reshape(-1, *self.shape)


def fed(network: nn.Module, feeding: Feeding) -> nn.Module:
    """A network whose input goes through ``feeding`` first; a graph is changed in place and keeps its layers' names."""
    if not isinstance(network, fx.GraphModule):
        return nn.Sequential(feeding, network)
    name = "input"
    while hasattr(network, name):
        name += "_"
    network.add_submodule(name, feeding)
    entry = next(node for node in network.graph.nodes if node.op == "placeholder")
    with network.graph.inserting_after(entry):
        first = network.graph.call_module(name, (entry,))
    entry.replace_all_uses_with(first, delete_user_cb=lambda user: user is not first)
    network.recompile()
    return network
