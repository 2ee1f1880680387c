"""Writes a copy of a file whose head has one class more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.building.values import Origin
from backdoorscan.formats.changes import changed_arrays
from backdoorscan.formats.extending import grown_head, no_class_more
from backdoorscan.formats.onnx.replace import extended
from backdoorscan.formats.sandbox import run_apart


def with_class_more(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with one output more in the head, and with the arrays of changed tensors replaced.

    Args:
        artifact: The original file, from which ``built`` was read.
        built: The network as the original describes it.
        weights: Tensors by their name in the network; weight and bias of the head have one row more.

    Raises:
        UnsupportedModelError: What grew is no head that can be written.
        ArtifactError: A tensor is unknown, or is not stored in the file as it is.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in built.network.state_dict().items()}
    head = grown_head(artifact, shapes, weights)
    names = f"{head}.weight", f"{head}.bias"
    grown: dict[str, NDArray[Any]] = {}
    for name in names:
        origin = built.origins.get(name)
        if origin is None:
            raise no_class_more(artifact, f"The file computes '{name}' from others, it does not store it.")
        array = _to_file(origin, weights[name].detach().cpu().numpy())
        if array is None:
            raise no_class_more(artifact, f"The file stores '{name}' in a shape that has no axis of the classes.")
        if origin.name in grown or any(built.origins[o].name == origin.name for o in built.origins if o not in names):
            raise no_class_more(artifact, f"The file stores '{name}' together with another tensor.")
        grown[origin.name] = array
    rest = {name: tensor for name, tensor in weights.items() if name not in names}
    changed, classes, path = (
        changed_arrays(artifact, built, rest),
        shapes[names[1]][0],
        str(artifact.path),
    )
    return run_apart(extended, artifact.data, artifact.parts, changed, grown, classes, path, name=path)


def _to_file(origin: Origin, array: NDArray[Any]) -> NDArray[Any] | None:
    """An array with one row more in the file's order of axes, or ``None`` where a reshape leaves no axis to grow."""
    axis = 0
    for kind, numbers in reversed(origin.steps):
        if kind == "permute":
            array, axis = array.transpose(np.argsort(numbers)), numbers[axis]
            continue
        rows, before = array.shape[axis] - 1, math.prod(array.shape[:axis])
        places = [at for at, size in enumerate(numbers) if size == rows and math.prod(numbers[:at]) == before]
        if not places:
            return None
        axis = places[0]
        array = array.reshape([size + (at == axis) for at, size in enumerate(numbers)])
    return array
