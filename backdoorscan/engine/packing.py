"""Classifiers between processes of ours.

Torch pickles a graph as code and traces it again on the other side, which loses where in the file a node came from and
writes arguments in another way. A packed classifier keeps its graph node for node, so that detectors see the same.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from backdoorscan.classifier import Classifier


@dataclass(frozen=True)
class _Node:
    """Stands for the graph's node of this name in another one's arguments."""

    name: str


@dataclass(frozen=True)
class _Function:
    """A function by the name under which it can be imported; some cannot be pickled by their own."""

    module: str
    name: str


@dataclass(frozen=True)
class PackedClassifier:
    """A classifier that can be pickled.

    Attributes:
        shell: All of it but its network.
        network: The network; of a graph all but its nodes.
        nodes: The graph's nodes in order (operation, target, arguments, keyword arguments, name, type, notes), or
            ``None`` where the network is no graph.
    """

    shell: Classifier
    network: nn.Module
    nodes: tuple[tuple[Any, ...], ...] | None

    def unpack(self) -> Classifier:
        """A classifier equal to the one that was packed, once; it has the weights of this pack."""
        network = self.network
        if self.nodes is not None:
            graph, made = fx.Graph(), dict[str, fx.Node]()
            for operation, target, arguments, named, name, kind, notes in self.nodes:
                target = _found(target) if isinstance(target, _Function) else target
                arguments, named = (_mapped(part, _Node, lambda node: made[node.name]) for part in (arguments, named))
                made[name] = graph.create_node(operation, target, arguments, named, name, kind)
                made[name].meta = dict(notes)
            network = fx.GraphModule(network, graph).eval()
        classifier = copy.copy(self.shell)
        classifier._modules = {**self.shell._modules, "network": network}
        return classifier


def pack(classifier: Classifier) -> PackedClassifier:
    """A classifier as it can be pickled; nothing is copied yet."""
    shell = copy.copy(classifier)
    shell._modules = {name: module for name, module in classifier._modules.items() if name != "network"}
    network = classifier.network
    if not isinstance(network, fx.GraphModule):
        return PackedClassifier(shell, network, None)
    holder = nn.Module()
    holder.__dict__.update({name: value for name, value in network.__dict__.items() if name in holder.__dict__})
    return PackedClassifier(shell, holder, tuple(map(_packed_node, network.graph.nodes)))


def _packed_node(node: fx.Node) -> tuple[Any, ...]:
    target = _by_name(node.target) if callable(node.target) else node.target
    arguments, named = (_mapped(part, fx.Node, lambda other: _Node(other.name)) for part in (node.args, node.kwargs))
    return node.op, target, arguments, named, node.name, node.type, dict(node.meta)


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Arguments of a node with those of some kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list | tuple):
        parts = [_mapped(part, kind, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        return {key: _mapped(part, kind, change) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, kind, change) for part in (value.start, value.stop, value.step)))
    return value


def _by_name(target: Callable[..., Any]) -> object:
    """A function's name, if the same function is found under it."""
    function = _Function(str(getattr(target, "__module__", "")), str(getattr(target, "__name__", "")))
    try:
        return function if _found(function) is target else target
    except (ImportError, AttributeError, ValueError):
        return target


def _found(function: _Function) -> Any:
    return getattr(importlib.import_module(function.module), function.name)
