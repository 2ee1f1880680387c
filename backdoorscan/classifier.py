"""The classifier: any model file as one function from images in pixel space to logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from backdoorscan import graph
from backdoorscan.errors import UnsupportedModelError

_PIXELS_AT_ONCE = 2**18
"""Of all images together, on a CPU: what more of them leave behind leaves its caches, at 1.4 times the time."""


@dataclass(frozen=True)
class InputConvention:
    """How a network was fed: what has to be done to pixels in [0, 1] before it sees them.

    The network sees ``(low + x * (high - low) - mean) / std``.

    Attributes:
        low: What black becomes.
        high: What white becomes.
        mean: Subtracted per channel after scaling, or empty.
        std: Divided by per channel after scaling, or empty.
        layout: Axis order of the file's own input.
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str = "NCHW"

    def __str__(self) -> str:
        text = f"{self.low:g}..{self.high:g}"
        if self.mean or self.std:
            text += " mean " + ",".join(f"{v:g}" for v in self.mean) + " std " + ",".join(f"{v:g}" for v in self.std)
        return f"{text} {self.layout}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InputConvention:
        """The inverse of ``dataclasses.asdict`` after a trip through JSON."""
        return cls(
            float(data["low"]), float(data["high"]), tuple(data["mean"]), tuple(data["std"]), str(data["layout"])
        )

    def apply(self, pixels: Tensor) -> Tensor:
        """Bring images (N, C, H, W) from [0, 1] to what the network was trained on."""
        if (self.low, self.high) != (0.0, 1.0):
            pixels = pixels * (self.high - self.low) + self.low
        if self.mean or self.std:
            mean = pixels.new_tensor(self.mean or (0.0,)).view(-1, 1, 1)
            std = pixels.new_tensor(self.std or (1.0,)).view(-1, 1, 1)
            pixels = (pixels - mean) / std
        return pixels


class Classifier(nn.Module):
    """Images ``(N, C, H, W)`` float32 in [0, 1] -> logits ``(N, K)``.

    Scaling, axis order and a final softmax are part of it, so masks and triggers are always in image units. The network
    computes on the device of its weights, and in their precision; images and logits are float32 on the CPU.

    Args:
        network: Takes ``(N, *native_shape)`` in its own units, channels first, and returns logits. A
            ``torch.fx.GraphModule`` wherever the network can be traced.
        input_shape: (C, H, W) of one image.
        native_shape: Shape of one input as ``network`` takes it: the same, or (H, W), or (D,).
        binary: Whether ``network`` returns one logit for class 1, as networks that end in one sigmoid do.
        num_classes: K.
        convention: How the network was fed.
        details: Facts about the file, for the report.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        num_classes: int,
        convention: InputConvention | None = None,
        native_shape: tuple[int, ...] = (),
        binary: bool = False,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval()
        self.input_shape = input_shape
        self.native_shape = native_shape or input_shape
        self.num_classes = num_classes
        self.binary = binary
        self.convention = convention or InputConvention()
        self.details = dict(details or {})
        # Channels-last memory: measured 1.6 to 1.9 times faster on CPUs. A module that could not be traced may rely on
        # the order of memory, so it keeps what it is used to.
        self.memory_format = torch.contiguous_format
        if isinstance(network, fx.GraphModule):
            self.memory_format = torch.channels_last
            graph.allow_any_memory_format(network)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def native(self, pixels: Tensor) -> Tensor:
        """What the network itself takes for images (N, C, H, W) in [0, 1]: shape ``(N, *native_shape)``."""
        inputs = self.convention.apply(pixels)
        weights = self._weights
        if weights is not None:
            inputs = inputs.to(weights)
        if len(self.native_shape) == 3:
            return inputs.contiguous(memory_format=self.memory_format)
        if self.convention.layout == "NHWC":
            inputs = inputs.permute(0, 2, 3, 1)
        return inputs.reshape(-1, *self.native_shape)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        weights, (_, height, width) = self._weights, self.input_shape
        on_cpu = weights is None or weights.device.type == "cpu"
        parts = pixels.split(max(1, _PIXELS_AT_ONCE // (height * width))) if on_cpu else (pixels,)
        return torch.cat([self.from_native(self.native(part)) for part in parts])

    def from_native(self, inputs: Tensor) -> Tensor:
        """Logits (N, K) of inputs ``(N, *native_shape)`` in the network's own units."""
        return self.class_scores(self.network(inputs))

    def class_scores(self, output: Tensor) -> Tensor:
        """Logits (N, K) from what ``network``, or the end of it, returned."""
        scores = here(output).flatten(1)
        return torch.cat([torch.zeros_like(scores), scores], dim=1) if self.binary else scores

    @property
    def _weights(self) -> Tensor | None:
        """Some of the network's numbers, on its device and in its precision."""
        tensors = chain(self.network.parameters(), self.network.buffers())
        return next((weights for weights in tensors if weights.is_floating_point()), None)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The network as a graph.

        Raises:
            UnsupportedModelError: It could not be traced.
        """
        if not isinstance(self.network, fx.GraphModule):
            raise UnsupportedModelError(
                "This network's forward() depends on the values of its input, so its layers cannot be followed.",
                hint="Remove data-dependent control flow from its forward(), or use a method that needs no layers.",
            )
        return self.network

    @property
    def last_conv(self) -> str:
        """Name of the last convolution before the dense head.

        Raises:
            UnsupportedModelError: There is none, or the network cannot be followed.
        """
        return str(graph.last_conv_node(self.graph_module).target)

    def example(self) -> Tensor:
        """One mid-grey input as the network takes it, shape ``(1, *native_shape)``."""
        return self.native(torch.full((1, *self.input_shape), 0.5))

    def clone(self) -> Classifier:
        """An independent copy with weights of its own."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.network = copy.deepcopy(self.network)
        return twin


def here(values: Tensor) -> Tensor:
    """What a network computed, float32 on the CPU."""
    return values.to("cpu", torch.float32)


def to_tensor(pixels: npt.NDArray[Any] | Tensor) -> Tensor:
    """Images (N, C, H, W), uint8 or float32 in [0, 1], as a float32 tensor in [0, 1]."""
    # Torch cannot share memory that must not be written to, as of files read whole.
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.require(pixels, requirements="W"))
    return tensor.float().div_(255) if tensor.dtype == torch.uint8 else tensor.to(torch.float32)


@torch.no_grad()
def logits(classifier: nn.Module, images: Tensor, batch: int = 512) -> Tensor:
    """Logits (N, K) of images (N, C, H, W) in [0, 1], computed batch by batch."""
    return torch.cat([classifier(part) for part in images.split(batch)])
