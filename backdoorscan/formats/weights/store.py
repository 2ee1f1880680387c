"""Changed weights back into a copy of their file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.weights.checkpoint import safetensors_spans


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, not-a-number included."""
    return left.shape == right.shape and (
        torch.equal(left, right)
        or (left.is_floating_point() and torch.allclose(left, right, rtol=0.0, atol=0.0, equal_nan=True))
    )


def changed(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that differ from the file, in the file's own dtype.

    Args:
        stored: Tensors by their name in the file.
        wanted: Their new values by the same names.

    Raises:
        ArtifactError: A tensor has another shape, or values that the file's dtype cannot hold.
    """
    result = {}
    for key, new in wanted.items():
        old, new = stored[key], new.detach().cpu()
        if new.shape != old.shape:
            raise ArtifactError(
                f"'{key}' cannot be written: it is {tuple(new.shape)}, and {tuple(old.shape)} in the file.",
                hint="A repair may change values, never shapes.",
            )
        # Compared as the network had it: weights that the file keeps in half precision were widened.
        if same(old.to(new.dtype), new):
            continue
        result[key] = new.to(old.dtype)
        if old.is_floating_point() and torch.isfinite(new).all() and not torch.isfinite(result[key]).all():
            raise ArtifactError(
                f"'{key}' cannot be written: it has values beyond the range of {old.dtype}, the file's own type.",
                hint="Convert the checkpoint to float32 first.",
            )
    return result


def torch_copy(content: Any, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bytes:
    """A checkpoint with changed weights, everything else as it was.

    Args:
        content: The whole checkpoint; its tensors are overwritten in place, so that tensors which share their
            memory keep sharing it.
        stored: The checkpoint's own tensors by name.
        wanted: New values by the same names.

    Raises:
        ArtifactError: The file cannot hold a tensor.
    """
    try:
        with torch.no_grad():
            for key, new in changed(stored, wanted).items():
                stored[key].copy_(new)
    except RuntimeError as error:  # e.g. elements of one tensor that share their memory
        raise ArtifactError("The changed weights do not fit into the checkpoint.", why=str(error)) from error
    torn = changed(stored, {key: new.to(stored[key].dtype) for key, new in wanted.items()})
    if torn:
        raise ArtifactError(
            f"'{next(iter(torn))}' cannot be written: in the file it shares its memory with another tensor.",
            why="The repaired network has different values in the two.",
            hint="Save the checkpoint with tensors of their own (clone them) and repair that.",
        )
    # Through memory, since torch.save would put the file's name into the archive: the same weights shall give
    # the same bytes.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors_copy(data: bytes, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with the bytes of changed tensors replaced; header and metadata stay as they are."""
    spans, copy = safetensors_spans(data), bytearray(data)
    for key, new in changed(stored, wanted).items():
        start, end = spans[key]
        copy[start:end] = new.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return bytes(copy)
