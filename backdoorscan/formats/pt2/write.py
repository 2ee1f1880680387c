"""Puts changed tensors into a copy of the file that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.changes import changed_arrays
from backdoorscan.formats.pt2.archive import open_archive, replaced
from backdoorscan.formats.pt2.reading import ReadProgram
from backdoorscan.formats.pt2.spec import Stored


def with_weights(artifact: Artifact, program: ReadProgram, weights: Mapping[str, Tensor]) -> bytes:
    """The artifact's bytes with those of changed tensors replaced, and nothing else.

    Args:
        artifact: The original file.
        program: What was read of it.
        weights: Tensors by their name in the network.

    Raises:
        ArtifactError: A tensor is unknown, has another shape, or is not stored in the file as it is.
    """
    changed = changed_arrays(artifact, program.built, weights)
    archive = open_archive(artifact.data)
    contents: dict[str, bytearray] = {}
    for name, array in changed.items():
        stored = program.parsed.tensors[name]
        content = contents.setdefault(stored.member, bytearray(archive.read(stored.member)))
        _put(content, name, stored, array)
    return replaced(archive, {name: bytes(content) for name, content in contents.items()})


def _put(content: bytearray, name: str, stored: Stored, new: NDArray[Any]) -> None:
    """Write numbers over a tensor's old ones, wherever they lie."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    whole = torch.frombuffer(content, dtype=dtype)
    place = whole.as_strided(new.shape, stored.strides, stored.offset)
    # Where the file stores more digits than float32 holds, values that did not change keep them.
    same = torch.from_numpy(np.array(stored.array.astype(new.dtype) == new))
    values = torch.where(same, place, torch.from_numpy(np.array(new)).to(dtype))
    if dtype.is_floating_point and np.isfinite(new).all() and not bool(torch.isfinite(values).all()):
        raise ArtifactError(
            f"'{name}' cannot be written: it has values beyond the range of {stored.dtype}, the file's own type.",
            hint="Export the model in float32 first.",
        )
    place.copy_(values)
