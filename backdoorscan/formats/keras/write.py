"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

import io
from collections.abc import Mapping

import h5py
import numpy as np
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.keras.network import BuiltNetwork


def with_weights(artifact: Artifact, built: BuiltNetwork, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with the datasets of changed tensors overwritten.

    Args:
        artifact: The original file, which was checked while ``built`` was read from it.
        built: The network as the original describes it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file.
    """
    original = built.network.state_dict()
    changed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name not in original:
            raise ArtifactError(f"{artifact.path} has no tensor '{name}'.", hint="Repair the network that was loaded.")
        if tensor.shape != original[name].shape:
            raise ArtifactError(
                f"The tensor '{name}' has the shape {tuple(tensor.shape)}.",
                why=f"{artifact.path} stores {tuple(original[name].shape)}; its architecture stays as it is.",
            )
        if _same_bits(tensor, original[name]):
            continue
        if name not in built.origins:
            raise ArtifactError(
                f"The tensor '{name}' cannot be changed.",
                why="It is a constant of the architecture, not a weight that the file stores.",
            )
        changed[name] = tensor
    if not changed:
        return artifact.data
    buffer = io.BytesIO(artifact.data)
    with h5py.File(buffer, "r+") as file:
        for name, tensor in changed.items():
            slot, weight = built.origins[name]
            new = slot.to_file(_array(tensor))
            # Where the file stores more digits than float32 holds, values that did not change keep them.
            kept = weight.array.astype(np.float32) == new
            file[weight.dataset][...] = np.where(kept, weight.array, new.astype(weight.array.dtype))
    return buffer.getvalue()


def _array(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = tensor.detach().cpu().float().contiguous().numpy()
    return values


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that holds for NaN too and tells 0 from -0."""
    return _array(a).tobytes() == _array(b).tobytes()
