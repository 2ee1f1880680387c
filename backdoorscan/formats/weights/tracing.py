"""From the user's module to a graph, where that is possible, and what the graph tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from backdoorscan.errors import UnsupportedModelError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Sides to try an unknown input with: most networks are made for one of these, or take any.
_SIDES = (32, 28, 64, 96, 224)

# What may follow the last layer without changing the number of classes.
_HEADS = (nn.Softmax, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid, nn.Identity, nn.Dropout)
_HEAD_CALLS = {
    torch.softmax,
    torch.log_softmax,
    torch.sigmoid,
    F.softmax,
    F.log_softmax,
    F.sigmoid,
    F.logsigmoid,
    F.dropout,
}
_HEAD_METHODS = {"softmax", "log_softmax", "sigmoid", "contiguous", "float"}
# Questions about the input that leave it as it is.
_QUESTIONS = {"size", "dim"}


class Untraceable(Exception):
    """The module has no graph that stands for it; the message says why."""


class _Tracer(fx.Tracer):
    """Traces ``forward`` with its first argument alone, and keeps every layer with weights whole."""

    # Or else what a module computes from its buffers alone would be frozen as it is now.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A user's own kind of convolution is still a convolution: pruning looks for it.
        return super().is_leaf_module(m, module_qualified_name) or isinstance(m, (nn.Linear, *_CONVOLUTIONS, *_NORMS))

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # Options such as `forward(x, features=False)` keep their defaults, so that `if features:` is no obstacle.
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters)
        name = parameters[1] if len(parameters) > 1 else "x"
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]


def trace(module: nn.Module) -> tuple[fx.GraphModule, bool]:
    """Trace a module in eval mode.

    Returns:
        A graph with the module's own layers under their own names, and whether it was compared with the
        module on an input (which needs a size that the module takes).

    Raises:
        Untraceable: The code follows its data, or its graph would compute something else.
        UnsupportedModelError: The network returns something other than one tensor.
    """
    try:
        graph = _Tracer().trace(module)
        traced = fx.GraphModule(module, graph, type(module).__name__)
    except Exception as error:  # the user's code, run on stand-ins that it was not written for
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    traced.eval()
    result = _output(traced).args[0]
    if not isinstance(result, fx.Node):
        raise _not_scores(result)
    _settle_constants(traced, module)
    return traced, _compare(traced, module)


def _not_scores(result: object) -> UnsupportedModelError:
    given = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
    return UnsupportedModelError(
        f"The network returns {given}, not the scores of a classifier.",
        hint="Let --arch name a function that returns a network with the scores (N, classes) as its only result.",
    )


def _settle_constants(traced: fx.GraphModule, module: nn.Module) -> None:
    """Keep tensors that are no weights of the checkpoint out of the graph's ``state_dict()``."""
    known = module.state_dict().keys()
    for name in [name for name in traced.state_dict() if name not in known]:
        owner, _, leaf = name.rpartition(".")
        holder = traced.get_submodule(owner)
        constant = holder._buffers.get(leaf)
        if constant is None or constant.requires_grad:
            raise Untraceable(f"tracing would freeze what the network computes from its weights ({name})")
        holder.register_buffer(leaf, constant, persistent=False)


def _compare(traced: fx.GraphModule, module: nn.Module) -> bool:
    for shape in _guesses(traced):
        images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
        try:
            expected = _run(module, images)
        except Exception:  # noqa: S112 - the size is a guess; that the network refuses it is an answer
            continue
        try:
            actual = _run(traced, images)
        except Exception as error:  # code generated from the user's
            raise Untraceable(f"the traced graph fails: {type(error).__name__}: {error}") from error
        if not isinstance(expected, Tensor) or expected.dim() != 2:
            raise _not_scores(expected)
        if expected.shape != actual.shape or not torch.allclose(expected, actual, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise Untraceable("the traced graph computes something else than the network")
        return True
    return False


def _guesses(traced: fx.GraphModule) -> list[tuple[int, ...]]:
    for node in traced.graph.nodes:
        layer = _module(traced, node)
        if isinstance(layer, nn.Conv2d):
            return [(layer.in_channels, side, side) for side in _SIDES]
        if isinstance(layer, nn.Linear):
            return [(layer.in_features,)]
    return []


def _run(module: nn.Module, images: Tensor) -> Any:
    # Noise, where a network draws any, is the same in both runs; the caller's generator is left alone.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(images.clone())  # a first layer that works in place would change the second run's input


def input_shape(traced: fx.GraphModule) -> tuple[int | None, ...] | None:
    """What the layer that takes the input tells: (C, ``None``, ``None``), (D,) or ``None``."""
    source = next(node for node in traced.graph.nodes if node.op == "placeholder")
    users = [node for node in source.users if not _is_question(node)]
    shapes: set[tuple[int | None, ...]] = set()
    for node in users:
        layer = _module(traced, node)
        if isinstance(layer, nn.Conv2d):
            shapes.add((layer.in_channels, None, None))
        elif isinstance(layer, nn.BatchNorm2d):
            shapes.add((layer.num_features, None, None))
        elif isinstance(layer, nn.Linear) and len(users) == 1:
            shapes.add((layer.in_features,))
    return shapes.pop() if len(shapes) == 1 else None


def _is_question(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _QUESTIONS
    return node.op == "call_function" and node.target is getattr and node.args[1:2] == ("shape",)


def num_classes(traced: fx.GraphModule) -> int | None:
    """The width of the last layer, where it is a ``Linear`` that gives the scores directly."""
    node: Any = _output(traced).args[0]
    while isinstance(node, fx.Node):
        layer = _module(traced, node)
        if isinstance(layer, nn.Linear):
            return layer.out_features
        passes = (
            isinstance(layer, _HEADS)
            or (node.op == "call_function" and node.target in _HEAD_CALLS)
            or (node.op == "call_method" and node.target in _HEAD_METHODS)
        )
        if not passes or not node.args:
            return None
        node = node.args[0]
    return None


def _output(traced: fx.GraphModule) -> fx.Node:
    nodes: list[fx.Node] = [node for node in traced.graph.nodes if node.op == "output"]
    return nodes[0]


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
