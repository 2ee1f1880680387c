"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.changes import changed_tensors
from backdoorscan.formats.onnx.network import BuiltNetwork
from backdoorscan.formats.onnx.replace import replaced
from backdoorscan.formats.sandbox import run_apart


def with_weights(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with the arrays of changed tensors replaced, and those of its companions inside.

    Args:
        artifact: The original file, from which ``built`` was read.
        built: The network as the original describes it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file as it is.
    """
    changed = changed_arrays(artifact, built, weights)
    if not changed and not artifact.parts:
        return artifact.data
    name = str(artifact.path)
    return run_apart(replaced, artifact.data, artifact.parts, changed, name, name=name)


def changed_arrays(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays to put in place, as the file orders their axes, by the names of stored arrays.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file as it is.
    """
    why = "The file computes it from others, it does not store it."
    changed: dict[str, NDArray[Any]] = {}
    for name, tensor in changed_tensors(artifact, built.network.state_dict(), weights, built.origins, why).items():
        origin = built.origins[name]
        changed.setdefault(origin.name, origin.to_file(_array(tensor)))
    for name in weights.keys() & built.origins.keys():
        place = built.origins[name]
        if place.name in changed and not _equal(place.to_file(_array(weights[name])), changed[place.name]):
            raise _shared(name)
    return changed


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
