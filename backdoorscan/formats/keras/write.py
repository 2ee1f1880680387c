"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.formats.changes import changed_tensors
from backdoorscan.formats.keras.editing import Edit, edited
from backdoorscan.formats.keras.network import BuiltNetwork
from backdoorscan.formats.sandbox import run_apart

WHY_CONSTANT = "It is a constant of the architecture, not a weight that the file stores."


def with_weights(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with the datasets of changed tensors overwritten.

    Args:
        artifact: The original file, which was checked while ``built`` was read from it.
        built: The network as the original describes it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file.
    """
    changed = changed_tensors(artifact, built.network.state_dict(), weights, built.origins, WHY_CONSTANT)
    if not changed:
        return artifact.data
    return write_edited(artifact, Edit(overwritten(built, changed)))


def write_edited(artifact: Artifact, edit: Edit) -> bytes:
    """A copy of the artifact with changes, made in the sandbox.

    Raises:
        ArtifactError: The file cannot be changed.
    """
    return run_apart(edited, artifact.data, edit, str(artifact.path), name=str(artifact.path))


def overwritten(built: BuiltNetwork, changed: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """New values of the datasets of changed tensors, by the datasets' paths."""
    values: dict[str, NDArray[Any]] = {}
    for name, tensor in changed.items():
        slot, weight = built.origins[name]
        new = slot.to_file(as_array(tensor))
        # Where the file stores more digits than float32 holds, values that did not change keep them.
        kept = weight.array.astype(np.float32) == new
        values[weight.dataset] = np.where(kept, weight.array, new.astype(weight.array.dtype))
    return values


def as_array(tensor: Tensor) -> NDArray[Any]:
    """The values of a tensor as float32."""
    values: NDArray[Any] = tensor.detach().cpu().float().contiguous().numpy()
    return values
