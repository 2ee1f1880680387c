"""One node of the file while the graph grows: what the functions in ``operators`` work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from torch import Tensor, fx, nn

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.batch import BATCH, Images
from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.parse import Node
from backdoorscan.formats.onnx.tensors import FLOATS

if TYPE_CHECKING:
    from backdoorscan.formats.onnx.network import NetworkBuilder

HINT = "Export the network again with standard operators (torch.onnx.export, opset 13 to 20), and scan that."
_PASSING = {"Identity", "Cast", "Transpose"}
_KINDS = {
    onnx.AttributeProto.INT: (int, "i"),
    onnx.AttributeProto.FLOAT: (float, "f"),
    onnx.AttributeProto.INTS: (list, "ints"),
    onnx.AttributeProto.FLOATS: (list, "floats"),
    onnx.AttributeProto.STRING: (bytes, "s"),
}


@dataclass
class NodeCall:
    """One node, its inputs already known.

    Attributes:
        builder: What grows.
        node: The node.
        operands: Its inputs; ``None`` where one is left out.
    """

    builder: NetworkBuilder
    node: Node
    operands: Sequence[Operand | None]

    @property
    def opset(self) -> int:
        """Version of the operators."""
        return self.builder.parsed.opset

    @property
    def one_by_one(self) -> bool:
        """Whether the file can be run image by image: it is not made for several at a time."""
        return self.builder.parsed.input.batch in (None, 1)

    def unsupported(self, why: str, hint: str = "") -> UnsupportedModelError:
        """An error that names this operator."""
        return UnsupportedModelError(f"The operator {self.node} cannot be read.", why=why, hint=hint or HINT)

    def _attribute(self, key: str, kind: type) -> Any:
        attribute = self.node.attributes.get(key)
        if attribute is None:
            return None
        known, field = _KINDS.get(attribute.type, (None, ""))
        if known is not kind or attribute.ref_attr_name:
            raise self.unsupported(f"Its setting '{key}' is of the wrong type.")
        return kind(getattr(attribute, field))

    def integer(self, key: str, default: int) -> int:
        """A whole number among the settings."""
        value = self._attribute(key, int)
        return default if value is None else int(value)

    def number(self, key: str, default: float) -> float:
        """A number among the settings."""
        value = self._attribute(key, float)
        return default if value is None else float(value)

    def text(self, key: str, default: str) -> str:
        """A word among the settings."""
        value = self._attribute(key, bytes)
        return default if value is None else bytes(value).decode("utf-8", "replace")

    def integers(self, key: str) -> list[int] | None:
        """Whole numbers among the settings, or ``None`` where they are left out."""
        value: list[int] | None = self._attribute(key, list)
        if value is not None and not all(isinstance(item, int) for item in value):
            raise self.unsupported(f"Its setting '{key}' holds no whole numbers.")
        return value

    def sizes(self, key: str, count: int) -> tuple[int, ...]:
        """As many positive sizes among the settings; ones where they are left out."""
        value = self.integers(key)
        value = [1] * count if value is None else value
        if len(value) != count or min(value, default=1) < 1:
            raise self.unsupported(f"Its setting '{key}' is {value}.")
        return tuple(value)

    def operand(self, index: int) -> Operand:
        """An input that must be there."""
        operand = self.optional(index)
        if operand is None:
            raise self.unsupported(f"Its input {index} is missing.")
        return operand

    def optional(self, index: int) -> Operand | None:
        """An input, or ``None`` where it is left out."""
        return self.operands[index] if index < len(self.operands) else None

    def constant(self, index: int) -> Const:
        """An input that must not depend on the image."""
        operand = self.operand(index)
        if not isinstance(operand, Const):
            raise self.unsupported(f"Its input {index} depends on the image; this reader takes only constants there.")
        return operand

    def numbers(self, index: int) -> list[int] | None:
        """A constant input of whole numbers, or ``None`` where it is left out."""
        if self.optional(index) is None:
            return None
        tensor = self.constant(index).tensor
        if tensor.is_floating_point() or tensor.ndim > 1 or tensor.numel() > 64:
            raise self.unsupported(f"Its input {index} is no list of whole numbers.")
        return [int(value) for value in tensor.reshape(-1).tolist()]

    def either(self, key: str, index: int) -> list[int] | None:
        """Whole numbers that old files give as a setting and new ones as an input."""
        value = self.integers(key)
        return self.numbers(index) if value is None else value

    def axis(self, axis: int, rank: int) -> int:
        """An axis made positive."""
        if not -rank <= axis < rank:
            raise self.unsupported(f"Its axis {axis} does not exist in a value of {rank} axes.")
        return axis % rank

    def call(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Operand:
        """Call a function; operands among its arguments may stand in lists. Constants alone give a constant."""
        operands: list[Operand | Images] = []

        def to_meta(item: Any) -> Any:
            if isinstance(item, Images):
                operands.append(item)
                return BATCH * item.multiple
            if isinstance(item, Const | Value):
                operands.append(item)
                return item.meta
            return item

        meta = function(*fx.node.map_aggregate(args, to_meta), **kwargs)
        constants = [operand for operand in operands if isinstance(operand, Const)]
        if operands and len(constants) == len(operands):
            self.builder.limits.fold(self.node, meta, [constant.tensor for constant in constants])
            plain = fx.node.map_aggregate(args, lambda item: item.tensor if isinstance(item, Const) else item)
            return Const(function(*plain, **kwargs))
        self.builder.limits.value(self.node, meta)
        nodes = fx.node.map_aggregate(args, self.builder.node_of)
        return Value(self._named(self.builder.graph.call_function(function, nodes, kwargs)), meta)

    def module(self, value: Value, module: nn.Module, tensors: Mapping[str, Const]) -> Value:
        """Call a layer on a value; one with the same tensors and settings is made only once.

        Args:
            value: Its input.
            module: Made on the ``meta`` device.
            tensors: What its parameters and buffers are, by name.
        """
        name, known = self.builder.install(self.node, module, tensors)
        meta = known(value.meta)
        self.builder.limits.value(self.node, meta)
        return Value(self._named(self.builder.graph.call_module(name, (value.node,))), meta)

    def _named(self, node: fx.Node) -> fx.Node:
        """A node of the graph that remembers which of the file it stands for."""
        node.meta["source"] = str(self.node)
        return node

    def bias_behind(self, channels: int, rank: int, axis: int) -> Const | None:
        """The constant that is added to each channel next, if that is all that happens to this node's output.

        Args:
            channels: Number of channels.
            rank: Axes of the output.
            axis: That of the channels.
        """
        name = self.node.outputs[0]
        user = self._only_user(name)
        while user is not None and user.op in _PASSING:
            # A convolution in a network with channels last is turned back before its bias.
            order = tuple(_ints(user, "perm") or reversed(range(rank))) if user.op == "Transpose" else None
            if (order and sorted(order) != list(range(rank))) or (user.op == "Cast" and _to(user) not in FLOATS):
                return None
            axis = order.index(axis) if order else axis
            name = user.outputs[0]
            user = self._only_user(name)
        if user is None or user.op != "Add":
            return None
        others = [other for other in user.inputs if other != name]
        bias = self.builder.values.get(others[0]) if len(others) == 1 else None
        if not isinstance(bias, Const) or not bias.tensor.is_floating_point():
            return None
        if (1,) * (rank - len(bias.shape)) + bias.shape != tuple(channels if a == axis else 1 for a in range(rank)):
            return None
        self.builder.merged[user.outputs[0]] = name
        return bias.reshaped((channels,))

    def _only_user(self, name: str) -> Node | None:
        users = self.builder.users.get(name, [])
        alone = len(users) == 1 and not users[0].domain and name != self.builder.parsed.output
        return users[0] if alone else None

    def branch(self, key: str) -> list[Operand]:
        """Add one of this node's subgraphs to the graph, and return what it gives back."""
        attribute = self.node.attributes.get(key)
        if attribute is None or attribute.g is None:
            raise self.unsupported(f"It has no subgraph '{key}'.")
        results = self.builder.branch(attribute.g)
        if len(results) != len(self.node.outputs):
            raise self.unsupported(f"Its subgraph '{key}' gives {len(results)} values.")
        return results


def _ints(node: Node, key: str) -> list[int]:
    return list(node.attributes[key].ints) if key in node.attributes else []


def _to(node: Node) -> int:
    return int(node.attributes["to"].i) if "to" in node.attributes else 0
