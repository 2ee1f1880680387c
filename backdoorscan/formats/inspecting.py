"""What a model file is and holds, as far as it can be told without images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.costing import Meter, versions
from backdoorscan.errors import BackdoorscanError, UnsupportedModelError
from backdoorscan.formats.feeding import as_json
from backdoorscan.formats.loading import ReadOptions, find_loader, read_artifact
from backdoorscan.formats.opening import OpenedNetwork, open_network
from backdoorscan.ops.gates import data_nodes, operation, suspects
from backdoorscan.registry import Registry, installed
from backdoorscan.report import Report

_REORDERING = frozenset(
    (
        *("permute", "transpose", "reshape", "view", "flatten", "unflatten", "contiguous", "squeeze", "unsqueeze"),
        *("pad", "zeropad2d", "constantpad2d", "samepad2d", "identity", "dropout", "dropout2d", "clone", "detach"),
        *("getitem", "to", "float"),
    )
)
"""What may stand before the first layer without changing the numbers of the image."""


@dataclass(frozen=True)
class Layer:
    """One step of a network.

    Attributes:
        name: Of the layer, or of what computes it where it is no layer.
        kind: The class of the layer, or the function.
        inputs: Names of the steps that it takes; none for the image.
        output_shape: Of its value for one image, or ``None`` where it is not known.
        parameters: How many trained numbers it has; those of a layer that is used again count once.
        settings: What else tells it from others of its kind, as PyTorch prints it.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output_shape: tuple[int, ...] | None
    parameters: int
    settings: str = ""


@dataclass(frozen=True)
class Failure:
    """Why there is no more to tell: what, why, and what to do."""

    what: str
    why: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Inspection(Report):
    """The report of an inspection. Where ``error`` says why the file could not be read, the rest is empty.

    Attributes:
        path: The file.
        sha256: Its digest; see ``Artifact``.
        bytes: Its size, with the parts.
        parts: What belongs to it, or the files of a folder: bytes by name.
        format: Its format, or ``None`` where it is of none that is known.
        details: What the file says of itself: framework, versions.
        input_shape: Of one input as the network takes it, channels first; ``None`` for sizes that it leaves open, or
            where it says nothing.
        layout: How the file orders the axes of its input.
        convention: How the file says that images are fed.
        num_classes: Scores per image.
        final_activation: ``"softmax"``, ``"sigmoid"`` or none.
        head: The last layer with weights, and its outputs.
        prunable: The convolution that a repair would prune, and its channels.
        preprocessing: The steps before the first layer that change the image's numbers.
        decisions: The steps that decide by the image and are no part of an activation.
        branches: The ends of branches that join what was computed without them.
        layers: All steps that the scores depend on, in the order they are computed.
        parameters: All trained numbers.
        notes: What could not be told, and why.
        error: Why the file could not be read.
    """

    schema: ClassVar[str] = "backdoorscan.inspection/1"

    path: str
    sha256: str
    bytes: int
    parts: Mapping[str, int] = field(default_factory=dict)
    format: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int | None, ...] | None = None
    layout: str | None = None
    convention: InputConvention | None = None
    num_classes: int | None = None
    final_activation: str | None = None
    head: Mapping[str, Any] | None = None
    prunable: Mapping[str, Any] | None = None
    preprocessing: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    parameters: int | None = None
    notes: tuple[str, ...] = ()
    error: Failure | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/formats.md."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("seed", "versions", "cost")}
        return {
            "schema": self.schema,
            **own,
            "convention": as_json(self.convention),
            "layers": [asdict(layer) for layer in self.layers],
            "error": None if self.error is None else asdict(self.error),
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
        }


def inspect(path: str | Path, options: ReadOptions | None = None, *, registry: Registry | None = None) -> Inspection:
    """Read a model file and say what it holds.

    A file that can be opened, but not read, gives a report too: with its digest, its format where that is known, and
    the error.

    Args:
        path: The file or folder.
        options: What the user says about it.
        registry: Where loaders are found.

    Raises:
        ArtifactError: There is nothing to read, or it is refused before its digest is known.
    """
    options, registry, meter = options or ReadOptions(), registry or installed(), Meter()
    artifact = read_artifact(path, registry)
    parts = {name: len(data) for name, data in artifact.parts.items()}
    found = Inspection(
        seed=0,
        versions=versions(),
        cost=meter.read(),
        path=str(artifact.path),
        sha256=artifact.sha256,
        bytes=len(artifact.data) + sum(parts.values()),
        parts=parts,
    )
    try:
        found = _described(replace(found, format=find_loader(artifact, registry).id), artifact, options, registry)
    except BackdoorscanError as error:
        known = found.format or _format(artifact, registry)
        found = replace(found, format=known, error=Failure(error.what, error.why, error.hint))
    return replace(found, cost=meter.read())


def _format(artifact: Artifact, registry: Registry) -> str | None:
    try:
        return find_loader(artifact, registry).id
    except BackdoorscanError:
        return None


def _described(found: Inspection, artifact: Artifact, options: ReadOptions, registry: Registry) -> Inspection:
    """What the network tells.

    Raises:
        BackdoorscanError: The file cannot be read.
    """
    opened = open_network(artifact, options, registry)
    loaded, network = opened.loaded, opened.network
    found = replace(
        found,
        details={key: value for key, value in loaded.details.items() if value not in (None, "", [], ())},
        input_shape=opened.shape or loaded.input_shape,
        layout=opened.layout,
        convention=loaded.convention,
        num_classes=loaded.num_classes,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )
    if not isinstance(network, fx.GraphModule):
        why = str(loaded.details.get("trace_error", "")) or "its forward() depends on the values of its input"
        return replace(
            found,
            layers=_unordered(network),
            notes=(f"the layers are listed as they are stored, for the network could not be followed: {why}",),
        )
    shapes, notes = _shapes(opened, network)
    names = _names(network)
    suspected = suspects(network)
    result = graph.output_node(network)
    found = replace(
        found,
        layers=_layers(network, names, shapes),
        num_classes=loaded.num_classes or (shapes[result][-1] if result in shapes else None),
        preprocessing=tuple(names[node] for node in _preprocessing(network)),
        decisions=tuple(names[node] for node in suspected.decisions),
        branches=tuple(names[node] for node in suspected.branches if node in names),
        notes=notes,
    )
    # It takes the activation off, so it comes last.
    found = replace(found, final_activation=graph.strip_final_activation(network))
    return _ends(found, network)


def _ends(found: Inspection, network: fx.GraphModule) -> Inspection:
    """The head, and what would be pruned."""
    try:
        head = graph.head_node(network)
        module: Any = graph.layer(network, head)
        found = replace(found, head={"layer": str(head.target), "outputs": len(module.weight)})
        last = graph.last_conv_node(network)
        convolution: Any = graph.layer(network, last)
        return replace(found, prunable={"layer": str(last.target), "channels": convolution.out_channels})
    except UnsupportedModelError as error:
        return replace(found, notes=(*found.notes, error.what))


def _names(network: fx.GraphModule) -> dict[fx.Node, str]:
    """The steps that lead from the image to the scores, but the image itself, with a name for each."""
    nodes = [node for node in data_nodes(network) if node.op != "placeholder"]
    return {node: str(node.target) if node.op == "call_module" else node.name for node in nodes}


def _layers(
    network: fx.GraphModule, names: Mapping[fx.Node, str], shapes: Mapping[fx.Node, tuple[int, ...]]
) -> tuple[Layer, ...]:
    counted: set[int] = set()
    rows = []
    for node, name in names.items():
        module = graph.layer(network, node)
        tensors = list(module.parameters()) if module is not None else _constants(network, node)
        new = {id(tensor): tensor.numel() for tensor in tensors if id(tensor) not in counted}
        counted.update(new)
        kind = operation(network, node) if module is None else type(module).__name__
        shape = shapes.get(node)
        inputs = tuple(names[operand] for operand in node.all_input_nodes if operand in names)
        settings = "" if module is None else module.extra_repr()
        rows.append(Layer(name, kind, inputs, None if shape is None else shape[1:], sum(new.values()), settings))
    return tuple(rows)


def _constants(network: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    """The trained tensors that a function takes."""
    named = dict(network.named_parameters())
    targets = (str(operand.target) for operand in node.all_input_nodes if operand.op == "get_attr")
    return [named[target] for target in targets if target in named]


def _unordered(network: nn.Module) -> tuple[Layer, ...]:
    """The layers of a module without a graph, each by itself."""
    return tuple(
        Layer(name, type(module).__name__, (), None, sum(p.numel() for p in module.parameters()), module.extra_repr())
        for name, module in network.named_modules()
        if name and not list(module.children())
    )


class _Shapes(fx.Interpreter):
    """Runs a network and keeps nothing of its values but their shapes."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


def _shapes(opened: OpenedNetwork, network: fx.GraphModule) -> tuple[dict[fx.Node, tuple[int, ...]], tuple[str, ...]]:
    """The shape of every value for one image, and a note where there are none."""
    if opened.shape is None:
        return {}, ("the file does not say how large its images are: --input-shape C,H,W adds the shapes",)
    run = _Shapes(network)
    try:
        with torch.no_grad():
            run.run(torch.zeros(1, *opened.shape))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        size = "×".join(map(str, opened.shape))
        return {}, (f"an image of {size} cannot be fed to it: {str(error).partition(chr(10))[0]}",)
    return run.found, ()


def _preprocessing(network: fx.GraphModule) -> list[fx.Node]:
    """The steps before the first layer with a matrix of weights that do more than order the image's numbers."""
    nodes = data_nodes(network)
    first = next((n for n in nodes if isinstance(graph.layer(network, n), nn.Linear | nn.Conv2d)), None)
    before = graph.ancestors(first) if first is not None else set()
    return [n for n in nodes if n in before and n.op != "placeholder" and operation(network, n) not in _REORDERING]
