"""The second stage: nodes and arrays to a ``torch.fx.GraphModule`` that takes images channels first."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx, nn

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsupportedModelError
from backdoorscan.formats.building.batch import BATCH, holds, shown
from backdoorscan.formats.building.limits import Limits
from backdoorscan.formats.building.network import BuiltNetwork, add_images, add_scores
from backdoorscan.formats.building.values import Const, Origin, Value, to_tensor
from backdoorscan.formats.pt2.calls import NodeCall
from backdoorscan.formats.pt2.names import attach, counter, layer_name
from backdoorscan.formats.pt2.operators import check_operator, run_operator
from backdoorscan.formats.pt2.parse import AGAIN, references
from backdoorscan.formats.pt2.schemas import aliases, changes
from backdoorscan.formats.pt2.spec import Meta, Node, ParsedPt2, Ref
from backdoorscan.plugin.loader import Layout

_DYNAMIC = "export it with a dynamic batch: dynamic_shapes=({0: torch.export.Dim('batch')},)."
_CHANNELS = {1, 3}
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


def build(parsed: ParsedPt2, size: tuple[int, ...]) -> BuiltNetwork:
    """Build a classifier whose scores are the program's first output.

    Args:
        parsed: The file.
        size: Shape of one image in the file's order of axes.

    Raises:
        ArtifactError: The program lacks what it must say of itself.
        UnsupportedModelError: The program holds something that can't be represented exactly.
        UnsafeModelError: It would exhaust the memory.
    """
    layout = _layout(parsed, size)
    builder = NetworkBuilder(parsed, checked=size == parsed.entry.sizes[1:])
    builder.limits.image(size)
    builder.entry, image = add_images(builder.graph, size, layout)
    builder.run(image)
    scores = builder.values[parsed.outputs[0]]
    classes = add_scores(builder.graph, scores, _DYNAMIC)
    builder.prune()
    builder.fill()
    network = fx.GraphModule(builder.root, builder.graph).eval()
    return BuiltNetwork.of(network, size, layout, classes, builder.origins, builder.values)


def _layout(parsed: ParsedPt2, size: tuple[int, ...]) -> Layout:
    """The order of axes of the file's images: by what happens to them first, else by which size looks like channels."""
    if len(size) != 3:
        return "NCHW"
    for node in parsed.nodes:
        if parsed.image in references(node):
            if ".conv" in node.target:
                return "NCHW"
            if node.target == "torch.ops.aten.permute.default":
                return "NHWC" if node.arguments.get("dims") == (0, 3, 1, 2) else "NCHW"
    return "NHWC" if size[2] in _CHANNELS and size[0] not in _CHANNELS else "NCHW"


class NetworkBuilder:
    """Grows the graph, node by node.

    Args:
        parsed: The file.
        checked: Whether every size must be what the file says of it.
    """

    entry: fx.Node

    def __init__(self, parsed: ParsedPt2, *, checked: bool) -> None:
        self.parsed, self.checked = parsed, checked
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.values: dict[str, Any] = {}
        self.origins: dict[str, Origin] = {}
        self._images: fx.Node | None = None
        self._modules: dict[Any, tuple[nn.Module, list[fx.Node], dict[str, Const], str]] = {}
        self._constants: dict[Any, tuple[Const, fx.Node]] = {}
        self._kept: list[Const] = []  # so that no id is given twice
        self._parameters: dict[Origin, nn.Parameter] = {}
        self._trained: set[str] = set()
        self._last_use: dict[str, int] = {}
        self.unexpanded: dict[int, tuple[Const, Const]] = {}
        self._memory: dict[str, set[str]] = {}
        for index, node in enumerate(parsed.nodes):
            self._last_use.update(dict.fromkeys(references(node), index))
        self._last_use.update(dict.fromkeys(parsed.outputs, len(parsed.nodes)))
        first: dict[Any, str] = {}
        for name, source in parsed.sources.items():
            stored = parsed.tensors[source.tensor]
            # One tensor under two names stays one.
            canonical = first.setdefault(stored.place, source.tensor)
            if source.kind == "parameter":
                self._trained.add(canonical)
            if name in self._last_use:
                self.values[name] = Const(to_tensor(np.array(stored.array)), Origin(canonical))
        self.limits = Limits(sum(const.tensor.numel() for const in self.values.values()))
        for name, const in self.values.items():
            self._check(name, const)

    def run(self, image: Value) -> None:
        """Add all nodes to the graph."""
        self.values[self.parsed.image] = image
        self._check(self.parsed.image, image)
        for node in self.parsed.nodes:
            check_operator(NodeCall(self, node, {}))
        for index, node in enumerate(self.parsed.nodes):
            self._run(index, node)

    def _run(self, index: int, node: Node) -> None:
        call = NodeCall(self, node, {})
        for key, argument in node.arguments.items():
            call.arguments[key] = self._resolved(call, argument)
        try:
            results = run_operator(call)
        except BackdoorscanError:
            raise
        except Exception as error:  # settings that contradict each other derail torch in any way there is
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise call.unsupported(reason[:200].replace(str(BATCH), "N")) from error
        for output, result in zip(node.outputs, results, strict=False):
            if output is not None and result is not None:
                self.values[output] = result
                self._check(output, result)
        for output in node.outputs:
            if output in self._last_use and output not in self.values:
                raise call.unsupported(f"Its output '{output}' is used, which this reader lacks.")
        self._follow_memory(index, call)

    def _resolved(self, call: NodeCall, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self.values[argument.name]
        if isinstance(argument, tuple):
            return tuple(self._resolved(call, item) for item in argument)
        if isinstance(argument, int) and holds(argument):
            raise call.unsupported(f"It works with the number {argument}.")
        return argument

    def _follow_memory(self, index: int, call: NodeCall) -> None:
        """What works in place makes a new value here, so nothing else may look at the old one's memory later."""
        node = call.node
        own = next(iter(node.arguments.values()), None)
        if not isinstance(own, Ref):
            return
        group = self._memory.setdefault(own.name, {own.name})
        if changes(node.target) and call.varies:
            if not group.isdisjoint(self.parsed.sources):
                raise call.unsupported("It changes a weight of the network when it runs.")
            other = next((name for name in group - {own.name} if self._last_use.get(name, -1) > index), None)
            if other is not None:
                raise call.unsupported(f"It changes memory that '{other[:100]}' looks at too.")
            # From here on the old name means the changed value.
            self.values[own.name] = self.values[str(node.outputs[0])]
        elif not aliases(node.target) and not changes(node.target):
            return
        for output in node.outputs:
            if output is not None:
                group.add(output)
                self._memory[output] = group

    def is_stored(self, node: Node) -> bool:
        """Whether the node's first argument is, or looks at, a tensor of the file."""
        own = next(iter(node.arguments.values()), None)
        group = self._memory.get(own.name, {own.name}) if isinstance(own, Ref) else set()
        return not group.isdisjoint(self.parsed.sources)

    def _check(self, name: str, value: Any) -> None:
        """Compare a value with what the file says of its shape and kind."""
        if not isinstance(value, Const | Value):
            return
        meta = self.parsed.metas.get(name)
        if meta is None:
            raise ArtifactError(f"The file does not say what '{name[:100]}' is.", hint=AGAIN)
        floating = meta.dtype in _FLOATS
        shape = value.shape
        fits = len(shape) == len(meta.sizes) and value.meta.is_floating_point() == floating
        if fits and self.checked and isinstance(value, Value):
            fits = all(self._same(size, wanted) for size, wanted in zip(shape, meta.sizes, strict=True))
        if not fits:
            raise UnsupportedModelError(
                f"The value '{name[:100]}' is not what the file says of it.",
                why=f"It has the shape {shown(shape)}; the file says {_shown(meta)}.",
                hint="Do not trust this file; export the network again.",
            )

    def _same(self, size: int, wanted: int | None) -> bool:
        if wanted is None:
            return True
        return size // BATCH * (self.parsed.batch or 1) == wanted if holds(size) else size == wanted

    def node_of(self, item: Any) -> Any:
        """What stands for an operand among the arguments of a graph's node."""
        if isinstance(item, Value):
            return item.node
        if isinstance(item, Const):
            return self._constant(item)
        if isinstance(item, int) and holds(item):
            if self._images is None:
                with self.graph.inserting_after(self.entry):
                    self._images = self.graph.call_method("size", (self.entry, 0))
            multiple = item // BATCH
            return self._images if multiple == 1 else self.graph.call_function(operator.mul, (self._images, multiple))
        return item

    def _constant(self, const: Const) -> fx.Node:
        """A constant among the network's tensors: trained if it is a parameter of the file."""
        key = const.origin or id(const)
        if key not in self._constants:
            self._kept.append(const)
            self._constants[key] = const, self.graph.get_attr(const.origin.name if const.origin else "constant")
        return self._constants[key][1]

    def install(self, call: NodeCall, module: nn.Module, tensors: Mapping[str, Const], value: Value) -> Value:
        """Call a layer on a value; one with the same tensors and settings is made only once."""
        key = (repr(module), tuple((name, const.origin or id(const)) for name, const in tensors.items()))
        if key not in self._modules:
            for tensor, const in tensors.items():
                expected = getattr(module, tensor)
                if expected is None or expected.shape != const.tensor.shape or not const.tensor.is_floating_point():
                    raise call.unsupported(f"Its {tensor} has the shape {const.shape}.")
            self._kept += tensors.values()
            named = next((const.origin.name for const in tensors.values() if const.origin), None)
            wanted = call.node.name if named is None else layer_name(named)
            self._modules[key] = module, [], dict(tensors), wanted
        module, nodes, _, wanted = self._modules[key]
        meta = module(value.meta)
        self.limits.value(call.node, meta)
        node = self.graph.call_module(wanted, (value.node,))
        nodes.append(node)
        return Value(node, meta)

    def prune(self) -> None:
        """Take away what the scores do not depend on."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)

    def fill(self) -> None:
        """Give every layer its name and its numbers, and every constant its place."""
        live = set(self.graph.nodes)
        layers = [entry for entry in self._modules.values() if live.intersection(entry[1])]
        # Outer ones first: a layer may hold others, or more tensors than its kind has.
        for module, nodes, tensors, wanted in sorted(layers, key=lambda entry: entry[3].count(".")):
            for tensor, const in tensors.items():
                trained = tensor in module._parameters
                setattr(module, tensor, self._parameter(const) if trained else const.tensor.contiguous().clone())
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                stored = self.parsed.tensors.get(f"{wanted}.num_batches_tracked")
                exact = stored is not None and stored.array.shape == () and stored.array.dtype == np.int64
                module.num_batches_tracked = counter(to_tensor(np.array(stored.array)) if stored and exact else None)
            path = attach(self.root, wanted, module)
            for node in nodes:
                node.target = path
            for tensor, const in tensors.items():
                if const.origin:
                    self.origins[f"{path}.{tensor}"] = const.origin
        for const, node in self._constants.values():
            if node not in live:
                continue
            numbers = self._parameter(const) if self._is_trained(const) else const.tensor.contiguous()
            known = next((name for name, origin in self.origins.items() if origin == const.origin), None)
            node.target = known or attach(self.root, str(node.target), numbers)
            if const.origin:
                self.origins[str(node.target)] = const.origin

    def _is_trained(self, const: Const) -> bool:
        return const.origin is not None and const.origin.name in self._trained and const.tensor.is_floating_point()

    def _parameter(self, const: Const) -> nn.Parameter:
        if const.origin is None:
            return nn.Parameter(const.tensor.contiguous().clone())
        if const.origin not in self._parameters:
            self._parameters[const.origin] = nn.Parameter(const.tensor.contiguous().clone())
        return self._parameters[const.origin]


def _shown(meta: Meta) -> str:
    return f"{meta.dtype} " + "×".join("?" if size is None else str(size) for size in meta.sizes)
