"""The first stage: the bytes of an ONNX file to nodes and arrays, as plain data. Needs no torch, and runs apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.onnx.plain import Attribute, ImageInput, Node, ParsedOnnx, Subgraph
from backdoorscan.formats.onnx.tensors import AGAIN, FLOATS, Store, locations

__all__ = ["Attribute", "ImageInput", "Node", "ParsedOnnx", "Subgraph", "companions", "parse", "read_message"]

OLDEST_OPSET = 7
_MAX_NODES = 20_000
_MAX_NESTING = 16
_HOLDS_GRAPHS = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def parse(data: bytes, parts: Mapping[str, bytes], name: str) -> ParsedOnnx:
    """Read an ONNX file.

    Args:
        data: The file's bytes.
        parts: Its companions, which hold arrays: names relative to its folder -> bytes.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The file is broken, or no classifier of images.
        UnsafeModelError: Reading it would touch other files or exhaust the memory.
        UnsupportedModelError: It needs what this reader lacks.
    """
    model = read_message(data, name)
    try:
        return _parsed(model, Store(len(data), parts), name)
    except BackdoorscanError:
        raise
    except Exception as error:  # text that is none, and whatever else a damaged message holds
        raise _unreadable(name, error) from error


def companions(data: bytes, name: str) -> list[str]:
    """Names of the files beside an ONNX file in which it keeps arrays, relative to its folder.

    Raises:
        ArtifactError: The file is broken.
        UnsafeModelError: One is not in its folder.
    """
    return locations(read_message(data, name))


def read_message(data: bytes, name: str) -> onnx.ModelProto:
    """The file as the format's message.

    Raises:
        ArtifactError: It is none.
    """
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # the parser has no common class of errors
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{name} is not a readable ONNX file.", why=f"{type(error).__name__}: {str(error)[:200]}", hint=AGAIN
    )


def _parsed(model: onnx.ModelProto, store: Store, name: str) -> ParsedOnnx:
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset < OLDEST_OPSET:
        raise UnsupportedModelError(
            f"{name} uses version {opset} of the ONNX operators.",
            why=f"This reader knows them from version {OLDEST_OPSET} on (2017).",
            hint="Convert it: onnx.version_converter.convert_version(onnx.load('model.onnx'), 13).",
        )
    count = sum(len(part.node) for part in _graphs(graph, name))
    if count > _MAX_NODES:
        raise UnsafeModelError(
            f"{name} was refused: it has {count:,} operators.",
            why="Networks that others use have a few thousand at most.",
            hint="Do not use this file.",
        )
    if any(part.sparse_initializer for part in _graphs(graph, name)):
        raise UnsupportedModelError(f"{name} stores sparse arrays.", hint="Export it with dense ones.")
    _check_text(model, name)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    output = _output(graph, name)
    nodes = _read_nodes(graph, [output], set(tensors) | {entry.name for entry in graph.input}, store, name)
    used = {source for node in nodes for source in (*node.inputs, *node.captured)} | {output}
    images = [entry for entry in graph.input if entry.name not in tensors and entry.name in used]
    if len(images) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(images)} inputs that its scores depend on.",
            hint="backdoorscan reads classifiers: one image in, one score per class out. Export that part alone.",
        )
    return ParsedOnnx(
        nodes=nodes,
        input=_image(images[0], name),
        output=output,
        opset=opset,
        size=store.limit,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata={str(entry.key): str(entry.value) for entry in model.metadata_props},
        halves=any(tensor.data_type in _HALVES for tensor in graph.initializer),
        arrays={key: store.read(tensor, key) for key, tensor in tensors.items() if key in used},
    )


def _graphs(graph: onnx.GraphProto, name: str, depth: int = 0) -> Iterator[onnx.GraphProto]:
    """A graph and all those inside its operators.

    Raises:
        UnsafeModelError: They lie too deep in each other.
    """
    if depth > _MAX_NESTING:
        raise UnsafeModelError(
            f"{name} was refused: its operators hold each other more than {_MAX_NESTING} levels deep.",
            hint="Do not use this file.",
        )
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in _HOLDS_GRAPHS else ():
                yield from _graphs(inner, name, depth + 1)


def _check_text(model: onnx.ModelProto, name: str) -> None:
    """Bytes that are no text come out of the message as bytes."""
    texts = [model.producer_name, model.producer_version]
    for graph in _graphs(model.graph, name):
        texts += [entry.name for entry in (*graph.initializer, *graph.input, *graph.output)]
        for node in graph.node:
            texts += [node.op_type, node.name, node.domain, *node.input, *node.output]
            texts += [text for attribute in node.attribute for text in (attribute.name, attribute.ref_attr_name)]
    if not all(isinstance(text, str) for text in texts):
        raise ArtifactError(f"{name} is broken: it holds names that are no text.", hint=AGAIN)


def _read_nodes(
    graph: onnx.GraphProto, outputs: Sequence[str], given: set[str], store: Store, name: str
) -> tuple[Node, ...]:
    """The nodes of a graph that its outputs depend on, in order.

    Args:
        graph: The message.
        outputs: What is wanted of it.
        given: Names of values that are there without it.
        store: Where its arrays are.
        name: What to call the file in errors.
    """
    messages = list(graph.node)
    nodes = [_node(message) for message in messages]
    defined = [*(tensor.name for tensor in graph.initializer), *(out for node in nodes for out in node.outputs if out)]
    if len(defined) != len(set(defined)):
        raise ArtifactError(f"{name} is broken: it gives two values one name.", hint=AGAIN)
    known = {id(node): message for node, message in zip(nodes, messages, strict=True)}
    ordered = _ordered(nodes, outputs, given, name)
    there = given | set(defined)

    def settings(node: Node) -> dict[str, Attribute]:
        return {item.name: _attribute(item, str(node), there, store, name) for item in known[id(node)].attribute}

    return tuple(replace(node, attributes=settings(node)) for node in ordered)


def _node(message: onnx.NodeProto) -> Node:
    """A node whose settings are not read yet."""
    domain = "" if message.domain == "ai.onnx" else message.domain
    captured: dict[str, None] = {}
    for attribute in message.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            captured |= dict.fromkeys(_free(attribute.g))
    return Node(message.op_type, message.name, domain, tuple(message.input), tuple(message.output), {}, tuple(captured))


def _free(graph: onnx.GraphProto) -> Iterator[str]:
    """Names that a subgraph uses and does not define."""
    own = {entry.name for entry in (*graph.input, *graph.initializer)} | {o for node in graph.node for o in node.output}
    for node in graph.node:
        inner = _node(node)
        yield from (name for name in (*inner.inputs, *inner.captured) if name and name not in own)
    yield from (entry.name for entry in graph.output if entry.name not in own)


def _attribute(message: onnx.AttributeProto, node: str, given: set[str], store: Store, name: str) -> Attribute:
    array = message.t if message.type == onnx.AttributeProto.TENSOR else None
    graph = message.g if message.type == onnx.AttributeProto.GRAPH else None
    return Attribute(
        type=message.type,
        i=message.i,
        f=message.f,
        s=message.s,
        t=None if array is None else store.read(array, array.name or node),
        g=None if graph is None else _subgraph(graph, given, store, name),
        ints=tuple(message.ints),
        floats=tuple(message.floats),
        strings=tuple(message.strings),
        ref_attr_name=message.ref_attr_name,
    )


def _subgraph(graph: onnx.GraphProto, given: set[str], store: Store, name: str) -> Subgraph:
    inputs, outputs = (tuple(entry.name for entry in entries) for entries in (graph.input, graph.output))
    arrays = {tensor.name: store.read(tensor, tensor.name) for tensor in graph.initializer}
    nodes = _read_nodes(graph, outputs, given | set(inputs) | set(arrays), store, name)
    return Subgraph(nodes, inputs, outputs, arrays)


def _output(graph: onnx.GraphProto, name: str) -> str:
    """The scores: the only output, or the only one that may hold them."""
    scores = [entry.name for entry in graph.output]
    if len(scores) > 1:
        whole = {out for node in graph.node if node.op_type in ("ArgMax", "TopK") for out in node.output}
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


def _ordered(nodes: Sequence[Node], outputs: Sequence[str], given: set[str], name: str) -> list[Node]:
    """The nodes that ``outputs`` depend on, each behind what it needs."""
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
            stack.append((node, iter((*node.inputs, *node.captured))))
        elif not state[key]:
            raise ArtifactError(f"{name} is broken: its operator {node} depends on itself.", hint=AGAIN)

    for output in outputs:
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
    return order
