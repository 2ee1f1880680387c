"""The first stage: the bytes of an ONNX file to nodes and arrays, as data. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.onnx.tensors import AGAIN, FLOATS, decode

OLDEST_OPSET = 7
_MAX_NODES = 20_000


@dataclass(frozen=True)
class Node:
    """One operator of the file.

    Attributes:
        op: Its type, e.g. ``"Conv"``.
        name: As the file gives it; may be empty.
        domain: Empty for the standard operators.
        inputs: Names of values; an empty one is an input left out.
        outputs: Likewise.
        attributes: Its settings, not yet decoded.
    """

    op: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, onnx.AttributeProto] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.op} '{self.name or next(iter(self.outputs), '')}'"


@dataclass(frozen=True)
class ImageInput:
    """The file's input.

    Attributes:
        name: Its name.
        batch: The number of images the file is fixed to, or ``None``.
        shape: Of one image in the file's order of axes; ``None`` where a size is open.
        element: Type of its elements, as ONNX numbers them.
    """

    name: str
    batch: int | None
    shape: tuple[int | None, ...]
    element: int


@dataclass(frozen=True)
class ParsedOnnx:
    """What a file says.

    Attributes:
        model: The file's message.
        nodes: In the file's order; only those the scores depend on.
        input: The image.
        output: Name of the scores.
        opset: Version of the standard operators.
        size: Bytes of the file.
    """

    model: onnx.ModelProto = field(repr=False)
    nodes: tuple[Node, ...] = field(repr=False)
    input: ImageInput
    output: str
    opset: int
    size: int
    _tensors: Mapping[str, onnx.TensorProto] = field(repr=False)
    _arrays: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def initializers(self) -> set[str]:
        """Names of the arrays that the file stores."""
        return set(self._tensors)

    def stored(self, name: str) -> NDArray[Any]:
        """An array as the file stores it; not to be changed.

        Raises:
            ArtifactError: It is broken, of an unknown type, or in another file.
        """
        if name not in self._arrays:
            self._arrays[name] = decode(self._tensors[name], name, self.size)
        return self._arrays[name]


def parse(data: bytes, name: str) -> ParsedOnnx:
    """Read an ONNX file.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The file is broken, or no classifier of images.
        UnsafeModelError: Reading it would touch other files or exhaust the memory.
        UnsupportedModelError: It needs what this reader lacks.
    """
    try:
        return _parsed(onnx.load_model_from_string(data), len(data), name)
    except BackdoorscanError:
        raise
    except Exception as error:  # the parser of the format, and text that is none
        raise ArtifactError(
            f"{name} is not a readable ONNX file.", why=f"{type(error).__name__}: {str(error)[:200]}", hint=AGAIN
        ) from error


def _parsed(model: onnx.ModelProto, size: int, name: str) -> ParsedOnnx:
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"{name} uses version {opset} of the ONNX operators.",
            why=f"This reader knows them from version {OLDEST_OPSET} on (2017).",
            hint="Convert it: onnx.version_converter.convert_version(onnx.load('model.onnx'), 13).",
        )
    if len(graph.node) > _MAX_NODES:
        raise UnsafeModelError(
            f"{name} was refused: it has {len(graph.node):,} operators.",
            why="Networks that others use have a few thousand at most.",
            hint="Do not use this file.",
        )
    if graph.sparse_initializer:
        raise UnsupportedModelError(f"{name} stores sparse arrays.", hint="Export it with dense ones.")
    _check_text(model, name)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [_node(node) for node in graph.node]
    defined = [*tensors, *(out for node in nodes for out in node.outputs if out)]
    if len(defined) != len(set(defined)) or len(tensors) != len(graph.initializer):
        raise ArtifactError(f"{name} is broken: it gives two values one name.", hint=AGAIN)
    output = _output(graph, nodes, name)
    ordered = _ordered(nodes, output, set(tensors) | {entry.name for entry in graph.input}, name)
    used = {source for node in ordered for source in node.inputs} | {output}
    images = [entry for entry in graph.input if entry.name not in tensors and entry.name in used]
    if len(images) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(images)} inputs that its scores depend on.",
            hint="backdoorscan reads classifiers: one image in, one score per class out. Export that part alone.",
        )
    return ParsedOnnx(model, ordered, _image(images[0], name), output, opset, size, tensors)


def _check_text(model: onnx.ModelProto, name: str) -> None:
    """Bytes that are no text come out of the message as bytes."""
    graph = model.graph
    texts = [model.producer_name, model.producer_version]
    texts += [entry.name for entry in (*graph.initializer, *graph.input, *graph.output)]
    for node in graph.node:
        texts += [node.op_type, node.name, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    if not all(isinstance(text, str) for text in texts):
        raise ArtifactError(f"{name} is broken: it holds names that are no text.", hint=AGAIN)


def _node(node: onnx.NodeProto) -> Node:
    domain = "" if node.domain == "ai.onnx" else node.domain
    attributes = {attribute.name: attribute for attribute in node.attribute}
    return Node(node.op_type, node.name, domain, tuple(node.input), tuple(node.output), attributes)


def _output(graph: onnx.GraphProto, nodes: list[Node], name: str) -> str:
    """The scores: the only output, or the only one that may hold them."""
    scores = [entry.name for entry in graph.output]
    if len(scores) > 1:
        whole = {out for node in nodes if node.op in ("ArgMax", "TopK") for out in node.outputs}
        scores = [
            entry.name
            for entry in graph.output
            if entry.type.tensor_type.elem_type in FLOATS and entry.name not in whole
        ]
    if len(scores) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(graph.output)} outputs.",
            hint="backdoorscan reads classifiers: one image in, one score per class out. Export that part alone.",
        )
    return str(scores[0])


def _image(entry: onnx.ValueInfoProto, name: str) -> ImageInput:
    kind = entry.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim]
    if kind.elem_type not in FLOATS | {onnx.TensorProto.UINT8} or not 2 <= len(dims) <= 4:
        raise UnsupportedModelError(
            f"{name} takes no batch of images.",
            why=f"Its input '{entry.name}' has the shape {dims or 'unknown'} and the element type {kind.elem_type}.",
            hint="backdoorscan reads images of two or three axes, or flat inputs, as float or uint8.",
        )
    return ImageInput(entry.name, dims[0], tuple(dims[1:]), kind.elem_type)


def _ordered(nodes: list[Node], output: str, given: set[str], name: str) -> tuple[Node, ...]:
    """The nodes that ``output`` depends on, each behind what it needs."""
    makers = {out: node for node in nodes for out in node.outputs if out}
    order: list[Node] = []
    state: dict[str, bool] = {}  # by first output: False while its inputs are looked at, True when it is in place
    stack: list[tuple[Node, Iterator[str]]] = []

    def visit(value: str) -> None:
        node = makers.get(value)
        if node is None:
            if value and value not in given:
                raise ArtifactError(f"{name} is broken: nothing gives the value '{value}'.", hint=AGAIN)
            return
        key = next(out for out in node.outputs if out)
        if key not in state:
            state[key] = False
            stack.append((node, iter(node.inputs)))
        elif not state[key]:
            raise ArtifactError(f"{name} is broken: its operator {node} depends on itself.", hint=AGAIN)

    visit(output)
    while stack:
        node, inputs = stack[-1]
        value = next(inputs, None)
        if value is not None:
            visit(value)
            continue
        stack.pop()
        state[next(out for out in node.outputs if out)] = True
        order.append(node)
    return tuple(order)
