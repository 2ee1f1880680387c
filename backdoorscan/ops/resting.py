"""What in a network is at rest on ordinary images: the candidates for gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from backdoorscan.classifier import Classifier
from backdoorscan.ops.gates import Suspects

_FAINT = 0.05
"""Part of the differences between ordinary images' logits up to which a branch counts as silent."""


@dataclass(frozen=True)
class Gate:
    """A node that is at rest on ordinary images.

    Attributes:
        node: The last node that is.
        rest: Its value for one image.
        decides: Whether it is a decision; otherwise it is the end of a side branch.
        shut: All nodes that never change on ordinary images.
    """

    node: fx.Node
    rest: Tensor
    decides: bool
    shut: frozenset[fx.Node]


class Recorder(fx.Interpreter):
    """Runs a network on one image, with some nodes held at a value.

    Args:
        network: The network.
        held: Nodes with the values they get.
        wanted: Nodes whose values are kept in ``found``.
    """

    def __init__(
        self, network: fx.GraphModule, held: Mapping[fx.Node, Tensor] | None = None, wanted: Iterable[fx.Node] = ()
    ) -> None:
        super().__init__(network)
        self.held = held or {}
        self.wanted = set(wanted)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, or take the value it is held at."""
        value = self.held[n] if n in self.held else super().run_node(n)
        if n in self.wanted:
            self.found[n] = value
        return value


@torch.no_grad()
def answer(classifier: Classifier, image: Tensor, held: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
    """Logits (K,) of one image (1, C, H, W), with some nodes held at a value."""
    output = Recorder(classifier.graph_module, held).run(classifier.native(image))
    return classifier.class_scores(output)[0]


def find_gates(classifier: Classifier, suspects: Suspects, images: Tensor) -> list[Gate]:
    """Which of the suspects are at rest on ordinary images.

    Args:
        classifier: The network.
        suspects: Its suspects.
        images: Ordinary images (N, C, H, W) in [0, 1], at least two.

    Returns:
        Of every chain of nodes at rest the last, decisions first.
    """
    behind = _behind(suspects.decisions, suspects.nodes)
    values = [recorded(classifier, image, behind | set(suspects.branches)) for image in images.split(1)]
    first = values[0]
    shut = frozenset(node for node in first if all(same(first[node], other[node]) for other in values[1:]))
    gates = [
        Gate(node, first[node], True, shut)
        for node in suspects.nodes
        if node in behind & shut and any(user not in shut for user in node.users)
    ]
    known = {gate.node for gate in gates}
    return gates + [
        Gate(node, first[node], False, shut)
        for node in suspects.branches
        if node in first and node not in known and (node in shut or _silent(classifier, node, images, values))
    ]


def _behind(starts: Iterable[fx.Node], nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(starts)
    for node in nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


@torch.no_grad()
def recorded(classifier: Classifier, image: Tensor, wanted: set[fx.Node]) -> dict[fx.Node, Tensor]:
    """The tensors that some nodes hold for one image (1, C, H, W)."""
    recorder = Recorder(classifier.graph_module, wanted=wanted)
    recorder.run(classifier.native(image))
    return {node: value for node, value in recorder.found.items() if isinstance(value, Tensor)}


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two values of a node are one, but for rounding."""
    if left.shape != right.shape:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4, equal_nan=True)


def _silent(classifier: Classifier, node: fx.Node, images: Tensor, values: list[dict[fx.Node, Tensor]]) -> bool:
    """Whether exchanging a node's value for that of another image changes next to nothing."""
    plain = torch.stack([answer(classifier, image) for image in images.split(1)])
    spread = float((plain - plain.mean(0)).abs().max())
    for place, image in enumerate(images.split(1)):
        exchanged = answer(classifier, image, {node: values[place - 1][node]})
        if not float((exchanged - plain[place]).abs().max()) <= _FAINT * spread:
            return False
    return True
