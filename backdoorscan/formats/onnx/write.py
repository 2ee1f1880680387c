"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.changes import changed_arrays
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
