"""What formats share that write a copy of a file whose head has one class more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsupportedModelError


def grown_head(artifact: Artifact, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> str:
    """The only layer of which something changed its shape: weight and bias, by one row more.

    Args:
        artifact: The file, for messages.
        shapes: Those of the original network's tensors, by name.
        weights: The tensors to write.

    Raises:
        UnsupportedModelError: Something else changed its shape, or the file lacks one of the two.
    """
    owners = {name.rpartition(".")[0] for name, t in weights.items() if shapes.get(name) != tuple(t.shape)}
    if len(owners) != 1:
        raise no_class_more(artifact, f"{len(owners)} layers changed their shapes.")
    head = owners.pop()
    for name in (f"{head}.weight", f"{head}.bias"):
        if name not in shapes or name not in weights:
            raise no_class_more(artifact, f"The file stores no '{name}'.")
        wanted = (shapes[name][0] + 1, *shapes[name][1:])
        if tuple(weights[name].shape) != wanted:
            raise no_class_more(artifact, f"'{name}' has the shape {tuple(weights[name].shape)}, not {wanted}.")
    return head


def no_class_more(
    artifact: Artifact, why: str, hint: str = "Use the GoodNet in ONNX, or a repair that keeps the classes."
) -> UnsupportedModelError:
    """The refusal of a file that cannot be written so."""
    return UnsupportedModelError(f"{artifact.path} cannot be written with one class more.", why=why, hint=hint)
