"""Puts arrays into a copy of an ONNX file. Needs no torch, and runs apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from backdoorscan.errors import ArtifactError, UnsupportedModelError
from backdoorscan.formats.onnx.parse import read_message
from backdoorscan.formats.onnx.tensors import FLOATS, Store, tensors_of

_MAX_BYTES = 2**31 - 1
"""The most that a message of this format can hold."""


def replaced(data: bytes, parts: Mapping[str, bytes], arrays: Mapping[str, NDArray[Any]], name: str) -> bytes:
    """A copy of a file with other arrays in it, and with what its companions hold.

    A copy refers to no other file: it would have to lie beside the original's companions, and both would change when
    one of them is moved or written again.

    Args:
        data: The file's bytes.
        parts: Its companions.
        arrays: What to put in place, by the names of stored arrays.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The type of a stored array cannot hold the new values, or the copy would be too large.
    """
    return bytes(_with_arrays(data, parts, arrays, name).SerializeToString())


def extended(
    data: bytes,
    parts: Mapping[str, bytes],
    arrays: Mapping[str, NDArray[Any]],
    grown: Mapping[str, NDArray[Any]],
    classes: int,
    name: str,
) -> bytes:
    """A copy of a file with other arrays in it, some of them larger, and with the shapes that follow from them.

    Args:
        data: As for ``replaced``.
        parts: As for ``replaced``.
        arrays: As for ``replaced``.
        grown: More of them, with one row more along one axis.
        classes: Their rows in the file.
        name: As for ``replaced``.

    Raises:
        UnsupportedModelError: A larger array is used in two places, or a shape that follows cannot be told.
        ArtifactError: As for ``replaced``.
    """
    original = _with_arrays(data, parts, {}, name)
    targets = _reshapes(original.graph, grown, classes)
    uses = Counter(source for node in _nodes(original.graph) for source in node.input)
    shared = next((array for array in (*grown, *targets) if uses[array] != 1), None)
    if shared is not None:
        raise _no_class_more(name, f"Its array '{shared}' is used in {uses[shared]} places.")
    model = _with_arrays(data, parts, {**arrays, **targets, **grown}, name)
    try:
        before, after = _shapes(original), _shapes(model)
    except Exception as error:  # the inference has no common class of errors
        raise _no_class_more(name, f"The shapes in it cannot be told: {str(error)[:200]}") from error
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        was, now = before.get(entry.name), after.get(entry.name)
        dims = entry.type.tensor_type.shape.dim
        if was is not None and now is not None and len(was) == len(now) == len(dims):
            for dim, old, new in zip(dims, was, now, strict=True):
                if old != new and dim.HasField("dim_value"):
                    dim.dim_value = new
        elif entry in model.graph.output and any(dim.dim_value == classes for dim in dims):
            raise _no_class_more(name, f"The shape of its output '{entry.name}' cannot be told.")
    return bytes(model.SerializeToString())


def _no_class_more(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} cannot be written with one class more.",
        why=why,
        hint="Use the GoodNet in ONNX, or a repair that keeps the classes.",
    )


def _reshapes(graph: onnx.GraphProto, grown: Container[str], classes: int) -> dict[str, NDArray[Any]]:
    """What a Reshape behind the head aims at, where exporters write the classes out there: with one class more.

    Whether the last size is meant as the classes is a guess, which reading the copy confirms or refutes.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    behind: set[str] = set()
    found: dict[str, NDArray[Any]] = {}
    for node in graph.node:
        if node.op_type == "Constant":
            stored |= {out: held.t for held in node.attribute if held.name == "value" for out in node.output}
        if not any(source in grown or source in behind for source in node.input):
            continue
        behind.update(node.output)
        if node.op_type == "Reshape" and len(node.input) > 1 and node.input[1] in stored:
            target = np.array(numpy_helper.to_array(stored[node.input[1]]))
            if target.ndim == 1 and target.size and target[-1] == classes:
                target[-1] += 1
                found[node.input[1]] = target
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of all graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shapes that follow from the nodes and arrays of a model, whatever it declares; open sizes are 0."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        # Shapes follow from whole numbers alone; the others only cost memory here.
        if tensor.data_type in FLOATS:
            tensor.ClearField("raw_data")
    del bare.graph.value_info[:]
    for entry in bare.graph.output:
        entry.type.tensor_type.ClearField("shape")
    arrays = {tensor.name: list(tensor.dims) for tensor in bare.graph.initializer}
    # Files of old versions declare their arrays as inputs too, with the shapes that they had.
    kept = [entry for entry in bare.graph.input if entry.name not in arrays]
    del bare.graph.input[:]
    bare.graph.input.extend(kept)
    bare.ir_version = max(bare.ir_version, 4)
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    known = {
        entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in (*graph.value_info, *graph.output)
        if entry.type.tensor_type.HasField("shape")
    }
    return known | arrays


def _with_arrays(
    data: bytes, parts: Mapping[str, bytes], arrays: Mapping[str, NDArray[Any]], name: str
) -> onnx.ModelProto:
    model, store = read_message(data, name), Store(len(data), parts)
    if store.limit > _MAX_BYTES:
        raise ArtifactError(
            f"The repaired copy of {name} cannot be written: it would take {store.limit:,} bytes.",
            why="A copy holds its arrays inside, where ONNX allows 2 GiB.",
            hint="Repair it as a state dict or as .pt2.",
        )
    for tensor in tensors_of(model):
        tensor.CopyFrom(store.gathered(tensor, tensor.name))
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            _replace(tensor, arrays[tensor.name], store)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in arrays:
            (attribute,) = (attribute for attribute in node.attribute if attribute.name == "value")
            _replace(attribute.t, arrays[node.output[0]], store)
    return model


def _replace(tensor: onnx.TensorProto, new: NDArray[Any], store: Store) -> None:
    old = store.read(tensor, tensor.name)
    # Where the file stores more digits than float32 holds, values that did not change keep them.
    held = tuple(map(slice, old.shape))
    with np.errstate(over="ignore"):
        values = new.astype(old.dtype)
        values[held] = np.where(old.astype(np.float32) == new[held], old, values[held])
    if np.isfinite(new).all() and not np.isfinite(values.astype(np.float32)).all():
        raise ArtifactError(
            f"'{tensor.name}' cannot be written: it has values beyond the range of {old.dtype}, the file's own type.",
            hint="Convert the model to float32 first.",
        )
    fresh = numpy_helper.from_array(values)
    for field in ("float_data", "int32_data", "double_data"):
        tensor.ClearField(field)
    tensor.dims[:] = fresh.dims
    tensor.raw_data = fresh.raw_data
