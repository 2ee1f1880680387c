"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.changes import changed_tensors
from backdoorscan.formats.onnx.network import BuiltNetwork
from backdoorscan.formats.onnx.tensors import decode


def with_weights(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with the arrays of changed tensors replaced.

    Args:
        artifact: The original file, from which ``built`` was read.
        built: The network as the original describes it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file as it is.
    """
    why = "The file computes it from others, it does not store it."
    changed: dict[str, NDArray[Any]] = {}
    for name, tensor in changed_tensors(artifact, built.network.state_dict(), weights, built.origins, why).items():
        origin = built.origins[name]
        changed.setdefault(origin.name, origin.to_file(_array(tensor)))
    if not changed:
        return artifact.data
    for name in weights.keys() & built.origins.keys():
        place = built.origins[name]
        if place.name in changed and not _equal(place.to_file(_array(weights[name])), changed[place.name]):
            raise _shared(name)
    model = onnx.load_model_from_string(artifact.data)
    for proto in _stored(model, changed):
        _replace(proto, changed[proto.name], len(artifact.data))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in changed:
            (attribute,) = (attribute for attribute in node.attribute if attribute.name == "value")
            _replace(attribute.t, changed[node.output[0]], len(artifact.data))
    return bytes(model.SerializeToString())


def _stored(model: onnx.ModelProto, names: Mapping[str, object]) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.name in names]


def _shared(name: str) -> ArtifactError:
    return ArtifactError(
        f"The tensor '{name}' cannot be written: the file stores it together with another one.",
        why="The repaired network has different values in the two.",
        hint="Export the network with arrays of their own and repair that.",
    )


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _replace(proto: onnx.TensorProto, new: NDArray[Any], limit: int) -> None:
    old = decode(proto, proto.name, limit)
    # Where the file stores more digits than float32 holds, values that did not change keep them.
    with np.errstate(over="ignore"):
        values = np.where(old.astype(np.float32) == new, old, new.astype(old.dtype)).astype(old.dtype)
    if np.isfinite(new).all() and not np.isfinite(values.astype(np.float32)).all():
        raise ArtifactError(
            f"'{proto.name}' cannot be written: it has values beyond the range of {old.dtype}, the file's own type.",
            hint="Convert the model to float32 first.",
        )
    fresh = numpy_helper.from_array(values)
    for field in ("float_data", "int32_data", "double_data"):
        proto.ClearField(field)
    proto.raw_data = fresh.raw_data
