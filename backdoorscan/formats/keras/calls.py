"""One call of one layer while the graph grows: what the functions in ``layers`` work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from backdoorscan.formats.keras.spec import Fields, Shape
from backdoorscan.formats.keras.weights import Slot

if TYPE_CHECKING:
    from backdoorscan.formats.keras.network import NetworkBuilder


@dataclass(frozen=True)
class Value:
    """A value of the graph and its shape in the file's order of axes, without the batch."""

    node: fx.Node
    shape: Shape


def check_training(step: LayerCall, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of a call that would change what the layer computes."""
    for key, value in kwargs.items():
        # Keras 3 notes `training`, but replaces it by False whenever the model predicts.
        nothing = value is None or (isinstance(value, list) and all(item is None for item in value))
        harmless = nothing or (key == "training" and (value in (False, 0) or step.keras_major >= 3))
        if not harmless:
            raise step.fields.unsupported(f"It is called with {key}={str(value)[:60]}.")


@dataclass
class LayerCall:
    """One call of one layer, as the functions in ``layers`` see it.

    Attributes:
        builder: What grows.
        fields: The layer's settings.
        path: The layer's name after those of the models around it.
        trainable: Whether Keras counted the layer's weights as trainable.
    """

    builder: NetworkBuilder
    fields: Fields
    path: tuple[str, ...]
    trainable: bool

    @property
    def keras_major(self) -> int:
        """Which Keras wrote the file."""
        return self.builder.keras_major

    def module(self, value: Value, module: nn.Module, shape: Shape, suffix: str = "") -> Value:
        """Call a module on a value. A module with weights is made on the ``meta`` device."""
        name = self.builder.install(self.path, suffix, module, self.fields)
        return Value(self.builder.graph.call_module(name, (value.node,)), shape)

    def method(self, value: Value, name: str, *args: Any, shape: Shape | None = None) -> Value:
        """Call a method of a tensor."""
        node = self.builder.graph.call_method(name, (value.node, *args))
        return Value(node, value.shape if shape is None else shape)

    def function(self, function: Callable[..., Tensor], *args: Any, shape: Shape, **kwargs: Any) -> Value:
        """Call a function; values among its arguments may stand in lists."""
        return Value(self.builder.graph.call_function(function, fx.node.map_aggregate(args, _node), kwargs), shape)

    def weight(
        self,
        tensor: str,
        kinds: str | tuple[str, ...],
        file_shape: tuple[int, ...],
        axes: tuple[int, ...] | None = None,
        shape: tuple[int, ...] | None = None,
        suffix: str = "",
        trainable: bool = True,
    ) -> None:
        """Announce that a tensor of this layer's module waits for an array of the file.

        Args:
            tensor: Its name within the module.
            kinds: What the file may call it.
            file_shape: Its shape in the file.
            axes: The order in which the file's axes are taken; as they are by default.
            shape: Its shape in the network, where that is more than a permutation.
            suffix: The module, as in ``module``.
            trainable: Whether Keras trains this kind of weight.
        """
        axes = axes or tuple(range(len(file_shape)))
        target = f"{self.builder.name(self.path, suffix)}.{tensor}"
        self.builder.slots[target] = Slot(
            path=self.path,
            kinds=(kinds,) if isinstance(kinds, str) else kinds,
            trainable=trainable and self.trainable,
            target=target,
            file_shape=file_shape,
            axes=axes,
            shape=shape or tuple(file_shape[axis] for axis in axes),
        )

    def dim(self, rank: int, axis: int) -> int:
        """The axis of the tensor in the network; both axes count the batch, ``rank`` doesn't."""
        if rank != 3 or self.builder.channels_first:
            return axis
        return {0: 0, 1: 2, 2: 3, 3: 1}[axis]

    def axis(self, value: Value, axis: int) -> int:
        """An axis of the file made positive; the batch counts, but may not be meant."""
        rank = len(value.shape)
        positive = axis + rank + 1 if axis < 0 else axis
        if not 1 <= positive <= rank:
            raise self.fields.unsupported(f"Its axis {axis} does not exist in a value of the shape {value.shape}.")
        return positive

    def size(self, value: Value, axis: int) -> int:
        """The size of a positive axis, which the file must not leave open."""
        size = value.shape[axis - 1]
        if size is None:
            raise self.fields.unsupported(f"The file leaves the size of its input open: {value.shape}.")
        return size

    def image(self, value: Value) -> tuple[int | None, int | None, int]:
        """Height, width and channels of an image."""
        if len(value.shape) != 3:
            raise self.fields.unsupported(f"Its input is no image with channels: {value.shape}.")
        spatial = value.shape[1:] if self.builder.channels_first else value.shape[:2]
        return spatial[0], spatial[1], self.size(value, 1 if self.builder.channels_first else 3)

    def image_shape(self, height: int | None, width: int | None, channels: int) -> Shape:
        """The inverse of ``image``."""
        return (channels, height, width) if self.builder.channels_first else (height, width, channels)

    def to_file_order(self, value: Value) -> Value:
        """The value with the axes of its tensor as in the file."""
        if len(value.shape) != 3 or self.builder.channels_first:
            return value
        return self.method(value, "permute", 0, 2, 3, 1)

    def from_file_order(self, value: Value) -> Value:
        """The inverse of ``to_file_order``."""
        if len(value.shape) != 3 or self.builder.channels_first:
            return value
        return self.method(value, "permute", 0, 3, 1, 2)


def _node(item: Any) -> Any:
    return item.node if isinstance(item, Value) else item
