"""What onnxruntime, the reference for what a file means, makes of it. Needs no torch, and runs apart."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from backdoorscan.errors import BackdoorscanError, UnsupportedModelError
from backdoorscan.formats.onnx.parse import read_message
from backdoorscan.formats.onnx.tensors import Store, tensors_of


@dataclass(frozen=True)
class Excerpt:
    """What of a file is to run: onnxruntime meets nothing else.

    Attributes:
        nodes: The nodes in order, by the names of their first outputs.
        arrays: Names of the stored arrays that they use.
        input_name: Name of the input.
        outputs: Names of the values to return.
    """

    nodes: Sequence[str]
    arrays: Collection[str]
    input_name: str
    outputs: Sequence[str]


def run(
    data: bytes, parts: Mapping[str, bytes], excerpt: Excerpt, batches: Sequence[NDArray[Any]]
) -> list[list[NDArray[Any]]]:
    """Run a part of a file in onnxruntime.

    Args:
        data: The file's bytes.
        parts: Its companions.
        excerpt: The part.
        batches: Inputs.

    Returns:
        For each batch the values.

    Raises:
        UnsupportedModelError: onnxruntime cannot run it.
    """
    try:
        session = _session(reduced(data, parts, excerpt))
        return [session.run(list(excerpt.outputs), {excerpt.input_name: batch}) for batch in batches]
    except BackdoorscanError:
        raise
    except Exception as error:  # onnxruntime has a class for every kind of failure, and no common one
        raise UnsupportedModelError(
            "onnxruntime cannot run the model.", why=str(error).strip().splitlines()[0][:200], hint="Export it again."
        ) from error


def reduced(data: bytes, parts: Mapping[str, bytes], excerpt: Excerpt) -> bytes:
    """A file of only a part of another one, with all arrays inside; the arguments are those of ``run``."""
    source, store = read_message(data, "The file"), Store(len(data), parts)
    model = onnx.ModelProto(ir_version=source.ir_version, opset_import=source.opset_import)
    model.graph.name = "model"
    messages = {next(out for out in node.output if out): node for node in source.graph.node if any(node.output)}
    model.graph.node.extend(messages[name] for name in excerpt.nodes)
    stored = [tensor for tensor in source.graph.initializer if tensor.name in excerpt.arrays]
    model.graph.initializer.extend(store.gathered(tensor, tensor.name) for tensor in stored)
    # Older files list their arrays as inputs.
    given = {excerpt.input_name, *(excerpt.arrays if source.ir_version < 4 else ())}
    model.graph.input.extend(entry for entry in source.graph.input if entry.name in given)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in excerpt.outputs)
    for node in model.graph.node:
        for tensor in tensors_of(node):
            tensor.CopyFrom(store.gathered(tensor, tensor.name))
    return bytes(model.SerializeToString())


def renamed(data: bytes, parts: Mapping[str, bytes], excerpt: Excerpt) -> bytes:
    """What ``reduced`` returns, for converters that write programs: with identifiers for all names in it."""
    model = onnx.load_model_from_string(reduced(data, parts, excerpt))
    graph, values, layers = model.graph, {"": ""}, set[str]()
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [values.setdefault(name, f"value_{len(values)}") for name in names]
        plain = re.sub(r"[^0-9A-Za-z_]+", "_", node.name[:100]).strip("_")
        plain = plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"layer_{plain}"
        node.name = plain if plain not in layers else f"{plain}_{len(layers)}"
        layers.add(node.name)
        node.ClearField("doc_string")
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.name = values.setdefault(entry.name, f"value_{len(values)}")
        entry.ClearField("doc_string")
    return bytes(model.SerializeToString())


def _session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Falling back means to print to stdout and to try the same again.
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
