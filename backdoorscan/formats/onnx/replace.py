"""Puts arrays into a copy of an ONNX file. Needs no torch, and runs apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.onnx.parse import read_message
from backdoorscan.formats.onnx.tensors import Store, tensors_of

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
    return bytes(model.SerializeToString())


def _replace(tensor: onnx.TensorProto, new: NDArray[Any], store: Store) -> None:
    old = store.read(tensor, tensor.name)
    # Where the file stores more digits than float32 holds, values that did not change keep them.
    with np.errstate(over="ignore"):
        values = np.where(old.astype(np.float32) == new, old, new.astype(old.dtype)).astype(old.dtype)
    if np.isfinite(new).all() and not np.isfinite(values.astype(np.float32)).all():
        raise ArtifactError(
            f"'{tensor.name}' cannot be written: it has values beyond the range of {old.dtype}, the file's own type.",
            hint="Convert the model to float32 first.",
        )
    fresh = numpy_helper.from_array(values)
    for field in ("float_data", "int32_data", "double_data"):
        tensor.ClearField(field)
    tensor.raw_data = fresh.raw_data
