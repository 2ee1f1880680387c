"""Questions about a traced network: where its head is, which convolution feeds it, how to cut it in two.

Everything here works on ``torch.fx.GraphModule``; nothing depends on the format the network came from.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from backdoorscan.errors import UnsupportedModelError

_SOFTMAX = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax)
_SOFTMAX_FUNCTIONS = {functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax}
_SIGMOID_FUNCTIONS = {functional.sigmoid, torch.sigmoid}
_RELU_FUNCTIONS = {functional.relu, torch.relu}
_ANY_METHODS = {"softmax": "softmax", "log_softmax": "softmax", "sigmoid": "sigmoid"}
_RESHAPING_METHODS = {"view", "reshape", "flatten", "squeeze", "contiguous"}
_RESHAPING_FUNCTIONS = {torch.flatten, torch.squeeze, torch.reshape}

Dense: TypeAlias = nn.Linear | nn.Conv2d


def layer(network: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls, or ``None`` for any other kind of node."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def output_node(network: fx.GraphModule) -> fx.Node:
    """The node whose value the network returns.

    Raises:
        UnsupportedModelError: The network returns anything but one tensor.
    """
    (result,) = next(node for node in network.graph.nodes if node.op == "output").args
    if not isinstance(result, fx.Node):
        raise UnsupportedModelError(
            "The network returns more than one tensor.",
            hint="backdoorscan reads classifiers: one image in, one score per class out.",
        )
    return result


def _final_activation(network: fx.GraphModule, node: fx.Node) -> str | None:
    module = layer(network, node)
    if isinstance(module, _SOFTMAX) or (node.op == "call_function" and node.target in _SOFTMAX_FUNCTIONS):
        return "softmax"
    if isinstance(module, nn.Sigmoid) or (node.op == "call_function" and node.target in _SIGMOID_FUNCTIONS):
        return "sigmoid"
    if node.op == "call_method":
        return _ANY_METHODS.get(str(node.target))
    return None


def strip_final_activation(network: fx.GraphModule) -> str | None:
    """Take a final softmax or sigmoid off, in place, so that losses see logits.

    The layer stays in the module tree (its parameters, if any, keep their names); it is only no longer called.

    Returns:
        ``"softmax"``, ``"sigmoid"`` or ``None``: what was taken off.
    """
    node = output_node(network)
    skipped: list[fx.Node] = []
    # Some networks end in softmax -> flatten: step over nodes that only change the shape.
    while _final_activation(network, node) is None:
        reshapes = (
            (node.op == "call_method" and node.target in _RESHAPING_METHODS)
            or (node.op == "call_function" and node.target in _RESHAPING_FUNCTIONS)
            or isinstance(layer(network, node), nn.Flatten | nn.Identity | nn.Dropout)
        )
        if not reshapes or len(node.all_input_nodes) != 1:
            return None
        skipped.append(node)
        node = node.all_input_nodes[0]
    kind = _final_activation(network, node)
    if len(node.users) != 1:
        return None
    node.replace_all_uses_with(node.all_input_nodes[0])
    network.graph.erase_node(node)
    network.recompile()
    return kind


def allow_any_memory_format(network: fx.GraphModule) -> None:
    """Replace ``view``, which needs its input in one order of memory, by ``reshape``, in place."""
    for node in network.graph.nodes:
        if node.op == "call_method" and node.target == "view" and not isinstance(node.args[-1], torch.dtype):
            node.target = "reshape"
    network.recompile()


def pool_first(network: fx.GraphModule) -> fx.GraphModule:
    """The same function with every ReLU after the max pooling that follows it: there are fewer values to rectify.

    Not one bit of values and slopes changes. The result shares the layers; where nothing can be swapped it is the
    network itself.
    """
    swapped = copy.deepcopy(network.graph)
    pairs = [
        (relu, pool)
        for relu in swapped.nodes
        if _calls(network, relu, nn.ReLU, _RELU_FUNCTIONS, "relu") and len(relu.users) == 1
        if all(len(values.users) == 1 for values in relu.all_input_nodes)  # it may work in place
        for pool in relu.users
        if _calls(network, pool, nn.MaxPool2d, {functional.max_pool2d}, "") and not _returns_indices(network, pool)
    ]
    for relu, pool in pairs:
        (values,) = relu.all_input_nodes
        pool.replace_all_uses_with(relu)
        pool.replace_input_with(relu, values)
        relu.replace_input_with(values, pool)
        pool.append(relu)
    return fx.GraphModule(network, swapped) if pairs else network


def _calls(network: fx.GraphModule, node: fx.Node, kind: type[nn.Module], functions: set[Any], method: str) -> bool:
    """Whether a node is a layer of that kind, or calls one of the functions or the method."""
    if node.op == "call_method":
        return node.target == method
    return isinstance(layer(network, node), kind) or (node.op == "call_function" and node.target in functions)


def _returns_indices(network: fx.GraphModule, pool: fx.Node) -> bool:
    return bool(getattr(layer(network, pool), "return_indices", pool.kwargs.get("return_indices", False)))


def accept_channels_first(network: fx.GraphModule) -> None:
    """Make a network that takes (N, H, W, C) take (N, C, H, W), in place."""
    entry = next(node for node in network.graph.nodes if node.op == "placeholder")
    with network.graph.inserting_after(entry):
        swapped = network.graph.call_method("permute", (entry, 0, 2, 3, 1))
    entry.replace_all_uses_with(swapped, delete_user_cb=lambda user: user is not swapped)
    network.recompile()


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that ``node`` depends on, itself left out."""
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def _nodes_of(network: fx.GraphModule, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[fx.Node]:
    """Nodes in execution order that call a layer of ``kinds`` and that the output depends on."""
    result = output_node(network)
    live = ancestors(result) | {result}
    return [node for node in network.graph.nodes if node in live and isinstance(layer(network, node), kinds)]


def head_node(network: fx.GraphModule) -> fx.Node:
    """The last layer with weights: a dense layer, or a convolution in networks that end in global pooling.

    Raises:
        UnsupportedModelError: There is none.
    """
    nodes = _nodes_of(network, (nn.Linear, nn.Conv2d))
    if not nodes:
        raise UnsupportedModelError(
            "The network has no dense or convolutional layer.",
            hint="backdoorscan works on image classifiers made of such layers.",
        )
    return nodes[-1]


def last_conv_node(network: fx.GraphModule) -> fx.Node:
    """The last convolution before the dense head.

    That is the last one on which every dense layer of the head depends; dense layers that a convolution follows
    (as in squeeze-and-excitation) do not count as head. In a network such as CSAW's, whose ``conv_4`` lies beside
    the dense layer ``fc_1``, this is ``conv_3``.

    Raises:
        UnsupportedModelError: The network has no convolution before its head.
    """
    head = head_node(network)
    convolutions = [node for node in _nodes_of(network, nn.Conv2d) if node is not head]
    above = {node: ancestors(node) for node in [*convolutions, *_nodes_of(network, nn.Linear)]}
    before_convolution = set[fx.Node]().union(*(above[node] for node in convolutions)) if convolutions else set()
    dense = [n for n in _nodes_of(network, nn.Linear) if n not in before_convolution]
    shared = [node for node in convolutions if all(node in above[d] for d in dense)]
    if not shared:
        raise UnsupportedModelError(
            "The network has no convolution before its head.", hint="Name the layer with --layer."
        )
    return shared[-1]


def find_layer(network: fx.GraphModule, name: str) -> fx.Node | None:
    """The node that calls the layer ``name``, or ``None``."""
    return next((n for n in network.graph.nodes if n.op == "call_module" and str(n.target) == name), None)


def conv_names(network: fx.GraphModule) -> list[str]:
    """Names of the convolutions in execution order."""
    return [str(node.target) for node in _nodes_of(network, nn.Conv2d)]


def values(network: fx.GraphModule, inputs: Tensor, wanted: Iterable[fx.Node]) -> dict[fx.Node, Tensor]:
    """Run the network and return the values of some nodes."""
    keep = set(wanted)
    found: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n in keep:
                found[n] = cast(Tensor, value)
            return value

    with torch.no_grad():
        Recorder(network).run(inputs)
    return found


def channel_path(network: fx.GraphModule, conv: fx.Node, example: Tensor) -> list[fx.Node]:
    """The nodes from ``conv`` on that keep its channels apart: normalisation, activation, pooling.

    A node belongs to the path while it is the only user of the one before, and changing one channel before it
    changes that channel alone behind it. The test is made with numbers, so it needs no list of layer types; only
    layers made to mix channels end the path even where a silent channel hides that they do.

    Args:
        network: The network.
        conv: A node that calls an ``nn.Conv2d``.
        example: One input as the network takes it.

    Returns:
        At least ``[conv]``; the last node is where the channels' activations are measured.
    """
    path = [conv]
    value = values(network, example, [conv])[conv]
    changed = value.clone()
    changed[:, 0] += 1 + value[:, 0].abs()
    while len(path[-1].users) == 1:
        node = next(iter(path[-1].users))
        mixes = isinstance(layer(network, node), nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        if node.op == "output" or mixes or node.all_input_nodes != [path[-1]]:
            break
        tail = fx.Graph()
        entry = tail.placeholder("entry")
        tail.output(tail.node_copy(node, lambda _, entry=entry: entry))  # type: ignore[misc]
        step = fx.GraphModule(network, tail)
        with torch.no_grad():
            value, changed = step(value), step(changed)
        same_channels = value.ndim == 4 and value.shape[1] == len(_conv(network, conv).weight)
        if not same_channels or not torch.equal(value[:, 1:], changed[:, 1:]):
            break
        path.append(node)
    return path


def _conv(network: fx.GraphModule, node: fx.Node) -> nn.Conv2d:
    return cast(nn.Conv2d, layer(network, node))


def remove_channels(network: fx.GraphModule, path: list[fx.Node], channels: Iterable[int]) -> None:
    """Silence channels of a convolution in place: its weights and bias, and the normalisation behind it.

    Args:
        network: The network.
        path: What ``channel_path`` returned for the convolution.
        channels: Indices of the channels.
    """
    index = torch.as_tensor(sorted(channels), dtype=torch.long)
    with torch.no_grad():
        for node in path:
            module = layer(network, node)
            if not isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                continue
            tensors = [module.weight, module.bias]
            if isinstance(module, nn.BatchNorm2d):
                # Without the mean, a silenced channel would come out of the normalisation as a constant.
                tensors.append(module.running_mean)
            for tensor in tensors:
                if tensor is not None:
                    tensor[index] = 0


def split(network: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a network behind ``node``.

    Returns:
        ``front``, which maps the input to a tuple of tensors of which the first is the value of ``node``, and
        ``rest``, which takes those tensors and returns the network's output. Both share the network's layers.
    """
    order = list(network.graph.nodes)
    behind = {node}
    for candidate in order:
        if candidate.op != "output" and behind.intersection(candidate.all_input_nodes):
            behind.add(candidate)
    behind.discard(node)
    result = output_node(network)
    live = ancestors(result) | {result}
    needed = [node] + [
        n
        for n in order
        if n is not node and n not in behind and n in live and n.op != "get_attr" and behind.intersection(n.users)
        if not _is_batch_size(n)
    ]

    front = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in order:
        if n.op != "output" and n not in behind:
            copies[n] = front.node_copy(n, copies.__getitem__)
    front.output(tuple(copies[n] for n in needed))

    rest = fx.Graph()
    copies = {n: rest.placeholder(f"value_{i}") for i, n in enumerate(needed)}
    for n in order:
        if n in behind or n.op == "get_attr":
            copies[n] = rest.node_copy(n, copies.__getitem__)
        elif _is_batch_size(n):
            copies[n] = rest.call_method("size", (copies[node], 0))
    rest.output(copies[result])
    return _pruned(network, front), _pruned(network, rest)


def _is_batch_size(node: fx.Node) -> bool:
    """Whether a node is ``x.size(0)`` or ``x.shape[0]``, which is the same for every tensor of the network."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
        whole = node.args[0]
        is_size = isinstance(whole, fx.Node) and whole.op == "call_method" and whole.target == "size"
        is_shape = isinstance(whole, fx.Node) and whole.target is getattr and whole.args[1:] == ("shape",)
        return is_size or is_shape
    return False


def _pruned(network: fx.GraphModule, part: fx.Graph) -> fx.GraphModule:
    module = fx.GraphModule(network, part)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
