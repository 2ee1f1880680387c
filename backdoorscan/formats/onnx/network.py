"""The second stage: nodes and arrays to a ``torch.fx.GraphModule`` that takes images channels first."""

from __future__ import annotations

import keyword
import operator
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from backdoorscan.errors import BackdoorscanError, UnsupportedModelError
from backdoorscan.formats.building.batch import BATCH, Images
from backdoorscan.formats.building.limits import Limits
from backdoorscan.formats.building.network import BuiltNetwork, add_images, add_scores
from backdoorscan.formats.building.values import Const, Operand, Origin, Value, to_tensor
from backdoorscan.formats.onnx.calls import HINT, NodeCall
from backdoorscan.formats.onnx.operators import run_operator
from backdoorscan.formats.onnx.parse import Node, ParsedOnnx, Subgraph
from backdoorscan.plugin.loader import Layout

_RESERVED = set(dir(fx.GraphModule(nn.Module(), fx.Graph()))) | {"x"}
_WEIGHT_NAME = re.compile(r"(.+?)[._/](?:weight|kernel|gamma|scale|W|w)", re.DOTALL)


def build(parsed: ParsedOnnx, size: tuple[int, ...], layout: Layout) -> BuiltNetwork:
    """Build a classifier.

    Args:
        parsed: The file.
        size: Shape of one image in the file's order of axes.
        layout: That order.

    Raises:
        UnsupportedModelError: The model holds something that can't be represented exactly.
        UnsafeModelError: It would exhaust the memory.
    """
    builder = NetworkBuilder(parsed)
    builder.limits.image(size)
    builder.entry, image = add_images(builder.graph, size, layout)
    builder.run(image)
    scores = builder.values[parsed.output]
    if isinstance(scores, Value) and scores.single:
        raise UnsupportedModelError(
            "The model picks images out of a batch.",
            why="It returns the scores of one alone.",
            hint="Export it with a dynamic batch.",
        )
    classes = add_scores(builder.graph, scores, "export it with a dynamic batch.")
    builder.fill()
    network = fx.GraphModule(builder.root, builder.graph).eval()
    network.graph.eliminate_dead_code()
    network.recompile()
    return BuiltNetwork.of(network, size, layout, classes, builder.origins, builder.values)


class NetworkBuilder:
    """Grows the graph, node by node.

    Args:
        parsed: The file.
    """

    entry: fx.Node

    def __init__(self, parsed: ParsedOnnx) -> None:
        self.parsed = parsed
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[str, Operand] = {}
        self.users: dict[str, list[Node]] = defaultdict(list)
        self.merged: dict[str, str] = {}
        self.origins: dict[str, Origin] = {}
        self._images: fx.Node | None = None
        self._modules: dict[Any, str] = {}
        self._waiting: dict[str, Const] = {}
        self._parameters: dict[Origin, nn.Parameter] = {}
        self._constants: dict[Any, fx.Node] = {}
        self._names: dict[str, int] = {}
        self._kept: list[Const] = []  # so that no id is given twice
        self._use(parsed.nodes)
        for name in parsed.initializers() & {*self.users, parsed.output}:
            self.values[name] = Const(to_tensor(parsed.stored(name)), Origin(name))
        self.limits = Limits(sum(const.tensor.numel() for const in self.values.values() if isinstance(const, Const)))

    def run(self, image: Value) -> None:
        """Add all nodes to the graph: constants first, since layers look for those behind them."""
        self.values[self.parsed.input.name] = image
        self._run_all(self.parsed.nodes)

    def branch(self, part: Subgraph) -> list[Operand]:
        """Add a subgraph, which sees the values around it, and return what it gives back.

        Raises:
            UnsupportedModelError: It holds something that can't be represented exactly, or takes inputs.
        """
        if part.inputs:
            raise UnsupportedModelError("A branch of the model takes inputs of its own.", hint=HINT)
        outer = self.values, self.users, self.merged
        self.values, self.merged = dict(self.values), dict(self.merged)
        self.users = defaultdict(list, {name: list(users) for name, users in self.users.items()})
        for name, array in part.arrays.items():
            self.values[name] = Const(to_tensor(array))
        # What it gives back is used by something that is no operator.
        self._use((*part.nodes, Node("", "", "", part.outputs, (), {})))
        self._run_all(part.nodes)
        results = [self.values[name] for name in part.outputs]
        self.values, self.users, self.merged = outer
        return results

    def _use(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            for name in {name for name in (*node.inputs, *node.captured) if name}:
                self.users[name].append(node)

    def _run_all(self, nodes: Sequence[Node]) -> None:
        varying = {name for name, value in self.values.items() if isinstance(value, Value)}
        later: list[Node] = []
        for node in nodes:
            if varying.intersection((*node.inputs, *node.captured)):
                varying.update(node.outputs)
                later.append(node)
            else:
                self._run(node)
        for node in later:
            self._run(node)

    def _run(self, node: Node) -> None:
        merged = self.merged.get(node.outputs[0])
        if merged is not None:
            self.values[node.outputs[0]] = self.values[merged]
            return
        call = NodeCall(self, node, [self.values[name] if name else None for name in node.inputs])
        try:
            results = run_operator(call)
        except BackdoorscanError:
            raise
        except Exception as error:  # settings that contradict each other derail torch in any way there is
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise call.unsupported(reason[:200].replace(str(BATCH), "N")) from error
        self.values.update(zip(node.outputs, results, strict=False))
        missing = next((out for out in node.outputs if out not in self.values and self.users.get(out)), None)
        if missing is not None:
            raise call.unsupported(f"Its output '{missing}' is used, which this reader lacks.")

    def node_of(self, item: Any) -> Any:
        """What stands for an operand among the arguments of a graph's node."""
        if isinstance(item, Value):
            return item.node
        if isinstance(item, Const):
            return self._constant(item)
        if isinstance(item, Images):
            if self._images is None:
                with self.graph.inserting_after(self.entry):
                    self._images = self.graph.call_method("size", (self.entry, 0))
            if item.multiple == 1:
                return self._images
            return self.graph.call_function(operator.mul, (self._images, item.multiple))
        return item

    def _constant(self, const: Const) -> fx.Node:
        """A constant among the network's tensors: trained if the file stores it and it is more than one number."""
        key = const.origin or id(const)
        if key not in self._constants:
            self._kept.append(const)
            name = self.name(const.origin.name if const.origin else "constant")
            if const.origin and const.tensor.is_floating_point() and const.tensor.numel() > 1:
                self.root.register_parameter(name, self._parameter(const, const.origin))
            else:
                self.root.register_buffer(name, const.tensor.contiguous())
            if const.origin:
                self.origins[name] = const.origin
            self._constants[key] = self.graph.get_attr(name)
        return self._constants[key]

    def _parameter(self, const: Const, origin: Origin) -> nn.Parameter:
        if origin not in self._parameters:
            self._parameters[origin] = nn.Parameter(const.tensor.contiguous().clone())
        return self._parameters[origin]

    def install(self, node: Node, module: nn.Module, tensors: Mapping[str, Const]) -> tuple[str, nn.Module]:
        """Put a layer into the network, or find the one that does the same; its name, and a copy without numbers."""
        key = (repr(module), tuple((name, const.origin or id(const)) for name, const in tensors.items()))
        if key not in self._modules:
            name = self.name(_layer_name(node, tensors))
            self._modules[key] = name
            self.root.add_module(name, module)
            for tensor, const in tensors.items():
                expected = getattr(module, tensor)
                if expected.shape != const.tensor.shape or not const.tensor.is_floating_point():
                    raise UnsupportedModelError(
                        f"The operator {node} cannot be read.",
                        why=f"Its {tensor} has the shape {const.shape}, not {tuple(expected.shape)}.",
                        hint=HINT,
                    )
                self._waiting[f"{name}.{tensor}"] = const
        name = self._modules[key]
        return name, self.root.get_submodule(name)

    def fill(self) -> None:
        """Give every layer its numbers."""
        for target, const in self._waiting.items():
            owner, _, name = target.rpartition(".")
            module = self.root.get_submodule(owner)
            if name in module._parameters:
                shared = self._parameter(const, const.origin) if const.origin else nn.Parameter(const.tensor.clone())
                setattr(module, name, shared)
            else:
                setattr(module, name, const.tensor.contiguous().clone())
            if const.origin:
                self.origins[target] = const.origin
        for module in self.root.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.num_batches_tracked = torch.tensor(0)

    def name(self, wanted: str) -> str:
        """A free identifier like a name of the file."""
        plain = re.sub(r"[^0-9A-Za-z_]+", "_", wanted[:200]).strip("_") or "layer"
        if plain[0].isdigit() or plain in _RESERVED or keyword.iskeyword(plain):
            plain = f"layer_{plain}"
        name = plain
        while name in self._names:
            self._names[plain] += 1
            name = f"{plain}_{self._names[plain]}"
        self._names[name] = 1
        return name


def _layer_name(node: Node, tensors: Mapping[str, Const]) -> str:
    """The name of the weights where it tells the layer's (``conv1.weight``), else that of the node."""
    for tensor in ("weight", "running_mean"):
        origin = tensors[tensor].origin if tensor in tensors else None
        found = _WEIGHT_NAME.fullmatch(origin.name) if origin else None
        if found:
            return found[1]
    name = node.name or next(iter(node.outputs), "")
    return name.removesuffix(f"/{node.op}") or node.op
