"""A network computed with margins instead of decisions, so that gradients lead to what makes a decision turn.

A comparison becomes a number that is at least zero where it holds, and otherwise tells how far it is from holding;
what is flat (a rectifier that is shut, a sigmoid at its end, rounding) gets a slope. Where every decision is the same
as that of the network itself, so is the value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from backdoorscan.ops.gates import operation

_BOOLEAN: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "eq": lambda a, b: -(a - b).abs(),
    "equal": lambda a, b: -(a - b).abs(),
    "isclose": lambda a, b: 1e-6 - (a - b).abs(),
    "ne": lambda a, b: (a - b).abs() - 1e-6,
    "not_equal": lambda a, b: (a - b).abs() - 1e-6,
    "gt": lambda a, b: a - b - 1e-6,
    "greater": lambda a, b: a - b - 1e-6,
    "ge": lambda a, b: a - b,
    "greater_equal": lambda a, b: a - b,
    "lt": lambda a, b: b - a - 1e-6,
    "less": lambda a, b: b - a - 1e-6,
    "le": lambda a, b: b - a,
    "less_equal": lambda a, b: b - a,
}
_SLOPE = 0.05
"""Of what is flat."""


def _short(margin: Tensor) -> Tensor:
    """How much is missing, at least zero."""
    return functional.relu(-margin)


def _margin(condition: Tensor) -> Tensor:
    """A condition that does not depend on the image, as a margin."""
    return torch.where(condition, 1.0, -1.0) if condition.dtype == torch.bool else condition


def _both(left: Tensor, right: Tensor) -> Tensor:
    """The margin of two conditions together: the smaller, or what both lack."""
    lacks = torch.sqrt(_short(left) ** 2 + _short(right) ** 2 + 1e-24)
    return torch.where((left >= 0) & (right >= 0), torch.minimum(left, right), -lacks)


def _every(margin: Tensor, dim: Any, keepdim: bool) -> Tensor:
    lacks = torch.sqrt((_short(margin) ** 2).sum(dim, keepdim) + 1e-24)
    return torch.where((margin >= 0).all(dim, keepdim), margin.amin(dim, keepdim), -lacks)


def _clamped(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x + (1 - _SLOPE) * (torch.clamp(x, low, high) - x)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """A product of switches: where one is shut, what both lack instead of a sign that two wrongs turn."""
    lacks = torch.sqrt(_short(left) ** 2 + _short(right) ** 2 + 1e-24)
    return torch.where((left > 0) & (right > 0), left * right, -lacks)


_SLOPED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: functional.leaky_relu(x, _SLOPE),
    "relu6": lambda x: _clamped(x, 0.0, 6.0),
    "hardtanh": lambda x: _clamped(x, -1.0, 1.0),
    "hardsigmoid": lambda x: _clamped(x / 6 + 0.5, 0.0, 1.0),
    "sigmoid": lambda x: torch.sigmoid(x) + 1e-3 * x,
    "tanh": lambda x: torch.tanh(x) + 1e-3 * x,
    "floor": lambda x: x - 0.5,
    "ceil": lambda x: x + 0.5,
    "round": lambda x: x,
    "trunc": lambda x: x - 0.5 * torch.sign(x),
    "sign": lambda x: x,
    "sgn": lambda x: x,
    "exp": lambda x: torch.where(x > -5, torch.exp(x.clamp(max=30)), 1e-2 * (x + 5)),
}


class Relaxed(fx.Interpreter):
    """Computes a node of a network, relaxed, and only what it needs.

    Args:
        network: The network; its parameters get no gradients.
        wanted: The node.
        shut: Nodes that have the same value on all ordinary images; of these, products are taken for switches.
    """

    def __init__(self, network: fx.GraphModule, wanted: fx.Node, shut: Collection[fx.Node] = ()) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.shut = shut
        self.margins: set[fx.Node] = set()
        self.needed = _needed(wanted)
        self.names = {node: operation(network, node) for node in self.needed}

    def value(self, inputs: Tensor) -> Tensor:
        """The relaxed value of the node: a margin if it is a decision.

        Args:
            inputs: What the network takes.
        """
        self.margins.clear()
        self.env = {}
        result: Any = None
        for node in self.needed:
            self.env[node] = inputs if node.op == "placeholder" else self._compute(node)
            result = self.env[node]
        return result  # type: ignore[no-any-return]

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if node.op == "get_attr" or not args or not isinstance(args[0], Tensor):
            return getattr(self, node.op)(node.target, args, kwargs)
        relaxed = self._relaxed(node, args, kwargs)
        return getattr(self, node.op)(node.target, self._plain(node, args), kwargs) if relaxed is None else relaxed

    def _plain(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Margins as the network itself would have them where they are used as conditions or as indices."""
        if self.names[node] in ("where", "masked_fill"):
            return tuple(
                value >= 0 if isinstance(arg, fx.Node) and arg in self.margins else value
                for arg, value in zip(node.args, args, strict=True)
            )
        if any(operand in self.margins for operand in node.all_input_nodes):
            self.margins.add(node)  # such as a reshape
        return args

    def _relaxed(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        name, first = self.names[node], args[0]
        of_margin = node.args[0] in self.margins
        second = args[1] if len(args) > 1 else kwargs.get("other")
        if name in _BOOLEAN and second is not None:
            self.margins.add(node)
            if of_margin:
                first = self._switch(first)
            place = self._place(node, second)
            return place if place is not None else _BOOLEAN[name](first, second)
        if name in _LOGICAL:
            self.margins.add(node)
            return self._logical(name, first, second)
        if of_margin and name in ("all", "any", "amin", "amax", "prod"):
            self.margins.add(node)
            dim, keep = _axes(first, args, kwargs)
            every = name in ("all", "amin", "prod")
            return _every(first, dim, keep) if every else first.amax(dim, keep)
        if of_margin and (name in _NUMBER or (name in _ARITHMETIC and not isinstance(second, Tensor))):
            switched = self._switch(first)
            return switched if name in _NUMBER else self._again(node, (switched, *args[1:]), kwargs)
        if of_margin and name in ("sum", "mean"):
            return self._again(node, (self._switch(first), *args[1:]), kwargs)
        if name in ("mul", "multiply") and isinstance(second, Tensor):
            return self._product(node, first, second)
        if name in _ARITHMETIC and isinstance(second, Tensor) and self.margins.intersection(node.all_input_nodes):
            return self._again(
                node, tuple(self._number(arg, v) for arg, v in zip(node.args, args, strict=True)), kwargs
            )
        if name in ("where", "masked_fill") and of_margin:
            return self._selected(name, args)
        if name in ("clamp", "clip", "clamp_min", "clamp_max"):
            low = args[1] if len(args) > 1 and name != "clamp_max" else kwargs.get("min")
            high = args[2] if len(args) > 2 else args[1] if name == "clamp_max" else kwargs.get("max")
            return _clamped(first, low, high)
        if name == "softmax" or name == "log_softmax":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            return torch.log_softmax(first, -1 if dim is None else dim)
        return _SLOPED[name](first) if name in _SLOPED else None

    def _again(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        result: Tensor = getattr(self, node.op)(node.target, args, kwargs)
        return result

    @staticmethod
    def _switch(margin: Tensor) -> Tensor:
        """A condition as a number: a little more than one where it holds, below zero by what it lacks."""
        return torch.where(margin >= 0, 1 + 0.01 * torch.tanh(margin), margin)

    def _number(self, arg: object, value: Any) -> Any:
        return self._switch(value) if isinstance(arg, fx.Node) and arg in self.margins else value

    def _logical(self, name: str, first: Tensor, second: Any) -> Tensor:
        if name in ("logical_not", "invert", "bitwise_not"):
            return -first - 1e-6
        first, second = _margin(first), _margin(torch.as_tensor(second))
        return _both(first, second) if name in _AND else torch.maximum(first, second)

    def _product(self, node: fx.Node, first: Tensor, second: Tensor) -> Tensor | None:
        switches = [operand for operand in node.all_input_nodes if operand in self.margins]
        left, right = (self._number(arg, value) for arg, value in zip(node.args[:2], (first, second), strict=True))
        varying = left.requires_grad and right.requires_grad
        if len(switches) == 2 or (varying and not switches and node in self.shut):
            return _times(left, right)
        return left * right if switches else None

    def _selected(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        condition, *rest = args
        if name == "masked_fill" or len(rest) < 2:
            return None
        yes, no = (torch.as_tensor(value, dtype=torch.float32) for value in rest[:2])
        share = torch.where(condition >= 0, torch.ones_like(condition), _SLOPE * condition)
        return share * yes + (1 - share) * no

    def _place(self, node: fx.Node, wanted: Any) -> Tensor | None:
        """The margin by which the extreme is where it is wanted: no gradient leads through the number of a place."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or self.names.get(source) not in ("argmax", "argmin"):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(source)
        values: Tensor = args[0] if self.names[source] == "argmax" else -args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        if dim is None:
            values, dim = values.flatten(), 0
        index = torch.as_tensor(wanted, dtype=torch.int64).reshape(-1)[:1]
        others = values.index_fill(dim, index, -torch.inf).amax(dim, keepdim=True)
        margin = values.index_select(dim, index) - others - 1e-3
        return margin if keep else margin.squeeze(dim)


_AND = frozenset(("logical_and", "and", "bitwise_and"))
_LOGICAL = _AND | {"logical_or", "or", "bitwise_or", "logical_not", "invert", "bitwise_not"}
_NUMBER = frozenset(("float", "to", "type", "double", "long", "int", "type_as", "_to_copy"))
_ARITHMETIC = frozenset(("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "truediv"))


def _axes(value: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, bool]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return tuple(range(value.ndim)) if dim is None else dim, bool(keep)


def _needed(wanted: fx.Node) -> list[fx.Node]:
    found, stack = {wanted}, [wanted]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                stack.append(operand)
    return [node for node in wanted.graph.nodes if node in found]
