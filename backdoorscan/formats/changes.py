"""Which tensors of a repaired network differ from the file's, and whether the file can hold them."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError


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


def _bits(tensor: Tensor) -> bytes:
    """For an equality that holds for NaN too and tells 0 from -0."""
    return bytes(tensor.detach().cpu().contiguous().numpy().tobytes())
