"""Places in a network's graph where the image could decide by a rule of its own what the network says.

Two things are looked for, both in the graph alone: *decisions* (comparisons, rounding, extreme places) that are no part
of an activation, and *side branches*, which read the image without the layers whose result they join. Ordinary
networks have a few of either kind; whether one is a gate is for ``ops.firing`` to find out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from backdoorscan import graph


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHAPES = _words(
    "size sym_size shape dim ndim numel len dtype device zeros_like ones_like empty_like full_like new_zeros new_ones "
    "new_full new_empty is_floating_point"
)
"""Operations whose result does not depend on the values of what they are given."""

_COMPARING = _words("eq ne gt ge lt le equal not_equal greater greater_equal less less_equal isclose logical_not isin")
_ROUNDING = _words("floor ceil round trunc fix sign sgn heaviside remainder fmod mod floordiv floor_divide")
_CHOOSING = _words("argmax argmin topk sort argsort searchsorted bucketize nonzero all any")
_STEPS = _COMPARING | _ROUNDING
_WHOLE = frozenset((torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64))
_CASTS = _words("to type cast bool long int byte short _to_copy")

_ELEMENTWISE = _STEPS | _CASTS | _words(
    "add sub subtract rsub mul multiply div divide truediv true_divide neg negative pos pow square sqrt rsqrt exp "
    "expm1 log log1p log2 abs absolute reciprocal sin cos tan atan sinh cosh erf sigmoid logsigmoid tanh relu relu6 "
    "leaky_relu leakyrelu prelu elu selu celu gelu silu swish mish hardswish hardsigmoid hardtanh softplus softsign "
    "softshrink hardshrink tanhshrink threshold clamp clip clamp_min clamp_max minimum maximum where masked_fill "
    "logical_and logical_or logical_xor and or xor invert bitwise_and bitwise_or bitwise_xor bitwise_not isnan isinf "
    "isfinite nan_to_num float double half dropout dropout2d identity contiguous clone detach type_as lerp addcmul "
    "quantize_per_tensor fake_quantize_per_tensor_affine"
)  # fmt: skip
_GATHERING = _words("all any sum mean prod amax amin max min count_nonzero cumsum cumprod norm vector_norm")
"""Operations that draw one number out of many: there a comparison stops being an activation."""

_WEIGHTED = _words(
    "conv1d conv2d conv3d convtranspose2d conv_transpose2d convolution linear addmm matmul mm bmm baddbmm einsum "
    "bilinear lazylinear lazyconv2d multiheadattention scaled_dot_product_attention"
)
_VIEWS = _words("permute transpose reshape view flatten unflatten contiguous squeeze unsqueeze expand broadcast_to")
_PARTS = _words("pad getitem select narrow slice index_select split chunk unbind")

_LATE = 1 / 3
"""Part of the network's layers up to which a join counts as near the scores, and branches as strangers."""


@dataclass(frozen=True)
class Suspects:
    """Nodes to look at more closely, in the order they are computed.

    Attributes:
        decisions: Those that decide by the image and are no part of an activation.
        branches: The ends of branches that join what was computed without them.
        nodes: All through which the image's values reach the scores.
        features: Those behind a layer with weights.
    """

    decisions: tuple[fx.Node, ...]
    branches: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    features: frozenset[fx.Node]

    def __bool__(self) -> bool:
        return bool(self.decisions or self.branches)


def operation(network: fx.GraphModule, node: fx.Node) -> str:
    """What a node does, by one name for a layer, a function, a method or an operator of ATen."""
    if node.op == "call_module":
        return type(network.get_submodule(str(node.target))).__name__.lower()
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target is getattr and len(node.args) > 1:
            return str(node.args[1])
        # The operators of ATen call themselves "where.self".
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    else:
        return node.op
    return name.strip("_").lower() if name != "_to_copy" else name


def data_nodes(network: fx.GraphModule) -> list[fx.Node]:
    """The nodes through which the image's values reach the output, in the order they are computed."""
    behind: set[fx.Node] = set()
    for node in network.graph.nodes:
        if node.op == "placeholder" or (
            node.op != "output"
            and behind.intersection(node.all_input_nodes)
            and operation(network, node) not in _SHAPES
        ):
            behind.add(node)
    live: set[fx.Node] = set()
    stack = [graph.output_node(network)]
    while stack:
        node = stack.pop()
        if node in behind and node not in live:
            live.add(node)
            stack += node.all_input_nodes
    return [node for node in network.graph.nodes if node in live]


def suspects(network: fx.GraphModule) -> Suspects:
    """Decisions and side branches of a network.

    Every node is visited a few times, and nothing is computed.

    Args:
        network: The network.

    Raises:
        UnsupportedModelError: It returns anything but one tensor.
    """
    nodes = data_nodes(network)
    names = {node: operation(network, node) for node in nodes}
    layers = {node for node in nodes if names[node] in _WEIGHTED or _has_matrix(network, node)}
    images = _image_like(nodes, names)
    branches, features = _branches(nodes, layers)
    return Suspects(_decisions(nodes, names, images), branches, tuple(nodes), features)


def _has_matrix(network: fx.GraphModule, node: fx.Node) -> bool:
    module = graph.layer(network, node)
    return module is not None and any(parameter.ndim > 1 for parameter in module.parameters())


def _operands(node: fx.Node, data: Mapping[fx.Node, object]) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if operand in data]


def _image_like(nodes: list[fx.Node], names: Mapping[fx.Node, str]) -> set[fx.Node]:
    """The image, its parts, and what is made of them element by element."""
    found: set[fx.Node] = set()
    for node in nodes:
        operands = _operands(node, names)
        if node.op == "placeholder" or (
            names[node] in _ELEMENTWISE | _VIEWS | _PARTS and all(operand in found for operand in operands)
        ):
            found.add(node)
    return found


def _decides(node: fx.Node, name: str) -> bool:
    if name in _CASTS:
        kinds = [kind for kind in (*node.args[1:], *node.kwargs.values()) if isinstance(kind, torch.dtype)]
        return name not in ("to", "type", "cast", "_to_copy") or not _WHOLE.isdisjoint(kinds)
    return name in _STEPS or name in _CHOOSING


def _decisions(nodes: list[fx.Node], names: Mapping[fx.Node, str], images: set[fx.Node]) -> tuple[fx.Node, ...]:
    # The tensors that a node is a function of, element by element; and the nodes that hold decisions and no values.
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    bare: set[fx.Node] = set()
    for node in nodes:
        operands = _operands(node, names)
        together = frozenset[fx.Node]().union(*(sources[operand] for operand in operands))
        alike = bool(together) and names[node] in _ELEMENTWISE | _VIEWS
        sources[node] = together if alike else frozenset([node])
        if _decides(node, names[node]) or (alike and bare.issuperset(operands)):
            bare.add(node)

    def activates(decision: fx.Node) -> bool:
        """Whether all that follows from a decision is a function of one tensor, element by element."""
        stack = [decision]
        while stack:
            for user in stack.pop().users:
                if user.op == "output":
                    return False
                if user not in names:
                    continue  # it does not lead to the scores
                if names[user] in _GATHERING or len(sources[user]) > 1:
                    return False
                if user in bare and names[user] in _ELEMENTWISE | _VIEWS:
                    stack.append(user)
        return True

    return tuple(
        node
        for node in nodes
        if _decides(node, names[node]) and (names[node] in _CHOOSING or sources[node] <= images or not activates(node))
    )


def _branches(nodes: list[fx.Node], weighted: set[fx.Node]) -> tuple[tuple[fx.Node, ...], frozenset[fx.Node]]:
    """The operands of joins that have next to no layers in common; and all nodes behind a layer."""
    layers: dict[fx.Node, int] = {}  # as bits: those that a node depends on
    depth: dict[fx.Node, int] = {}  # most layers on a way from the image
    for number, node in enumerate(nodes):
        layers[node], depth[node] = (1 << number) * (node in weighted), int(node in weighted)
        operands = _operands(node, layers)
        for operand in operands:
            layers[node] |= layers[operand]
        depth[node] += max((depth[operand] for operand in operands), default=0)
    deepest = max(depth.values(), default=0)
    found: dict[fx.Node, None] = {}
    for node in nodes:
        operands = _operands(node, layers)
        if len(operands) < 2 or not layers[node]:
            continue
        late = depth[node] >= (1 - _LATE) * deepest
        for place, left in enumerate(operands):
            for right in operands[place + 1 :]:
                shared, both = layers[left] & layers[right], layers[left] | layers[right]
                few = shared.bit_count() <= _LATE * both.bit_count()
                if both and (not shared or (late and few)):
                    found.update({left: None, right: None})
    return tuple(node for node in nodes if node in found), frozenset(node for node in nodes if layers[node])
