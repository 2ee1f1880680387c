"""Which tensors of a repaired network differ from the file's, and whether the file can hold them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.building.network import BuiltNetwork


def changed_tensors(
    artifact: Artifact, original: Mapping[str, Tensor], weights: Mapping[str, Tensor], stored: Container[str], why: str
) -> dict[str, Tensor]:
    """The tensors that are not, bit for bit, what they were.

    Args:
        artifact: The file, for messages.
        original: The network's tensors by name as the file gives them.
        weights: The tensors to write.
        stored: The names that the file stores a weight for.
        why: Why another tensor cannot be changed, for the user.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or changed without being stored in the file.
    """
    changed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in original:
            raise ArtifactError(f"{artifact.path} has no tensor '{name}'.", hint="Repair the network that was loaded.")
        if tensor.shape != original[name].shape:
            raise ArtifactError(
                f"The tensor '{name}' has the shape {tuple(tensor.shape)}.",
                why=f"{artifact.path} stores {tuple(original[name].shape)}; its architecture stays as it is.",
            )
        if _bits(tensor.to(original[name].dtype)) == _bits(original[name]):
            continue
        if name not in stored:
            raise ArtifactError(f"The tensor '{name}' cannot be changed.", why=why)
        changed[name] = tensor
    return changed


def changed_arrays(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The arrays to put in place, as the file orders their axes, by the names under which it stores them.

    Args:
        artifact: The file, for messages.
        built: The network as the file describes it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file as it is.
    """
    why = "The file computes it from others, it does not store it."
    changed: dict[str, NDArray[Any]] = {}

    def stored(name: str, tensor: Tensor) -> NDArray[Any]:
        return built.origins[name].to_file(tensor.detach().cpu().contiguous().numpy())

    for name, tensor in changed_tensors(artifact, built.network.state_dict(), weights, built.origins, why).items():
        changed.setdefault(built.origins[name].name, stored(name, tensor))
    for name in weights.keys() & built.origins.keys():
        place = built.origins[name].name
        if place in changed and not np.array_equal(stored(name, weights[name]), changed[place], equal_nan=True):
            raise ArtifactError(
                f"The tensor '{name}' cannot be written: the file stores it together with another one.",
                why="The repaired network has different values in the two.",
                hint="Export the network with tensors of their own and repair that.",
            )
    return changed


def check_back(known: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check that what was written reads back: a repair that cannot be loaded is none.

    Args:
        known: The tensors of the written file by name.
        weights: What they should be.

    Raises:
        ArtifactError: One is not.
    """
    for name, tensor in weights.items():
        if name not in known or not torch.allclose(
            known[name], tensor.detach().cpu(), rtol=1e-2, atol=1e-4, equal_nan=True
        ):
            raise ArtifactError(f"The repaired tensor '{name}' does not come back from the written file.")


def _bits(tensor: Tensor) -> bytes:
    """For an equality that holds for NaN too and tells 0 from -0."""
    return bytes(tensor.detach().cpu().contiguous().numpy().tobytes())
