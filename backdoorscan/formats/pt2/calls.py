"""One node of the file while the graph grows: what the functions in ``operators`` work with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.batch import holds
from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.pt2 import schemas
from backdoorscan.formats.pt2.spec import Node, Special

if TYPE_CHECKING:
    from backdoorscan.formats.pt2.network import NetworkBuilder

Result: TypeAlias = "Operand | int | bool | None"
HINT = "Export the network to ONNX instead (torch.onnx.export), and scan that."
DYNAMIC = "Export it with a dynamic batch: dynamic_shapes=({0: torch.export.Dim('batch')},)."
_DTYPES = {3: torch.int64, 4: torch.int64, 5: torch.int64, 12: torch.bool} | dict.fromkeys((6, 7, 8, 13), torch.float32)
_PLACEMENT = {"layout", "device", "pin_memory", "memory_format"}


def flat(arguments: Any) -> Iterator[Any]:
    """The arguments of a call, those in lists too."""
    for argument in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(argument, list | tuple | dict):
            yield from flat(argument)
        else:
            yield argument


@dataclass
class NodeCall:
    """One node, its arguments already known.

    Attributes:
        builder: What grows.
        node: The node.
        arguments: By name; whole numbers that hold the number of images are multiples of ``BATCH``.
    """

    builder: NetworkBuilder
    node: Node
    arguments: dict[str, Any]

    def unsupported(self, why: str, hint: str = "") -> UnsupportedModelError:
        """An error that names this operator."""
        return UnsupportedModelError(f"The operator {self.node} cannot be read.", why=why, hint=hint or HINT)

    @property
    def varies(self) -> bool:
        """Whether anything among the arguments depends on the image or on how many there are."""
        return any(isinstance(item, Value) or (isinstance(item, int) and holds(item)) for item in flat(self.arguments))

    def operand(self, name: str) -> Operand:
        """An argument that must be a tensor."""
        operand = self.arguments.get(name)
        if not isinstance(operand, Const | Value):
            raise self.unsupported(f"Its argument '{name}' is no tensor.")
        return operand

    def integer(self, name: str, default: int) -> int:
        """A whole number among the arguments."""
        value = self.arguments.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.unsupported(f"Its argument '{name}' is no whole number.")
        return value

    def integers(self, name: str) -> list[int]:
        """Whole numbers among the arguments."""
        value = self.arguments.get(name)
        value = (value,) if isinstance(value, int) else value
        if not isinstance(value, tuple) or not all(isinstance(item, int) for item in value):
            raise self.unsupported(f"Its argument '{name}' holds no whole numbers.")
        return list(value)

    def axis(self, name: str, rank: int, default: int | None = None) -> int:
        """An axis made positive."""
        axis = self.integer(name, default) if default is not None else self.integers(name)[0]
        if not -rank <= axis < rank:
            raise self.unsupported(f"Its axis {axis} does not exist in a value of {rank} axes.")
        return axis % rank

    def plain(self) -> Any:
        """Call the operator as it is, but for working in place, precision and placement."""
        name, kind = schemas.split_target(self.node.target) or ("", "")
        name = schemas.functional(name)
        found = schemas.overload(f"torch.ops.aten.{name}.{kind}")
        if found is None or schemas.changes(f"torch.ops.aten.{name}.{kind}"):
            raise self.unsupported("There is no such operator, or it writes into memory that it is given.")
        arguments, keywords = schemas.bind(found, self.arguments)
        keywords = {key: self.dtype(value) for key, value in keywords.items() if key not in _PLACEMENT}
        return self.call(schemas.python_function(found, name), *map(self.dtype, arguments), **keywords)

    def in_place(self) -> Any:
        """Change a constant that the program itself made, and with it all that look at its memory."""
        found = schemas.overload(self.node.target)
        first = next(iter(self.arguments.values()), None)
        if found is None or not isinstance(first, Const) or self.builder.is_stored(self.node):
            raise self.unsupported("It changes a weight of the network when it runs.")
        plain = {
            key: item.tensor if isinstance(item, Const) else self.dtype(item) for key, item in self.arguments.items()
        }
        arguments, keywords = schemas.bind(found, plain)
        found(*arguments, **keywords)
        return first

    def dtype(self, value: Any) -> Any:
        """A kind of numbers as the network computes with it; other arguments as they are."""
        if not isinstance(value, Special):
            return value
        if value.kind != "scalar_type" or value.value not in _DTYPES:
            raise self.unsupported("It works with a kind of numbers or of memory that this reader lacks.")
        return _DTYPES[value.value]

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function; operands among its arguments may stand in lists. Constants alone give a constant.

        Returns:
            An operand, or a list of them where the function gives several.
        """

        def to_meta(item: Any) -> Any:
            return item.meta if isinstance(item, Const | Value) else item

        def to_tensor(item: Any) -> Any:
            return item.tensor if isinstance(item, Const) else item

        operands = list(flat((args, kwargs)))
        tensors = [item.meta for item in operands if isinstance(item, Const | Value)]
        with torch.device("meta"):
            meta = function(*fx.node.map_aggregate(args, to_meta), **fx.node.map_aggregate(kwargs, to_meta))
        several = isinstance(meta, list | tuple)
        metas: list[Tensor] = list(meta) if several else [meta]
        if not any(isinstance(item, Value) or (isinstance(item, int) and holds(item)) for item in operands):
            for part in metas:
                self.builder.limits.fold(self.node, part, tensors)
            found = function(*fx.node.map_aggregate(args, to_tensor), **fx.node.map_aggregate(kwargs, to_tensor))
            consts = [Const(part) for part in (found if several else [found])]
            return consts if several else consts[0]
        nodes = fx.node.map_aggregate(args, self.builder.node_of)
        keywords = fx.node.map_aggregate(kwargs, self.builder.node_of)
        node = self.builder.graph.call_function(function, nodes, keywords)
        for part in metas:
            self.builder.limits.value(self.node, part)
        if not several:
            return Value(node, meta)
        graph = self.builder.graph
        return [Value(graph.call_function(operator.getitem, (node, index)), part) for index, part in enumerate(metas)]

    def one(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Operand:
        """Call a function that gives one tensor; see ``call``."""
        result: Operand = self.call(function, *args, **kwargs)
        return result

    def module(self, value: Value, module: nn.Module, tensors: Mapping[str, Const | None]) -> Value:
        """Call a layer on a value.

        Args:
            value: Its input.
            module: Made on the ``meta`` device.
            tensors: What its parameters and buffers are, by name; ``None`` for those it does without.
        """
        given = {name: const for name, const in tensors.items() if const is not None}
        return self.builder.install(self, module, given, value)
