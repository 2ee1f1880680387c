"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

import io
from collections.abc import Mapping

import h5py
import numpy as np
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.formats.changes import changed_tensors
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
    why = "It is a constant of the architecture, not a weight that the file stores."
    changed = changed_tensors(artifact, built.network.state_dict(), weights, built.origins, why)
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
