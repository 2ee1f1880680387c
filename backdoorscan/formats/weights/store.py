"""Tensors from the bytes of their files, and changed ones back into copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from backdoorscan.errors import ArtifactError, UnsupportedModelError
from backdoorscan.formats.weights.contents import Span, TensorSpec

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
        torch.bool,
    )
}


class Store:
    """The storages of some files, copied once each, so that tensors which share their memory keep sharing it.

    Args:
        files: Their content by the name that spans call them by.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self._storages: dict[Span, Tensor] = {}

    def tensor(self, name: str, spec: TensorSpec) -> Tensor:
        """A tensor as a view on its storage.

        Raises:
            UnsupportedModelError: It is quantised, sparse or complex.
            ArtifactError: It reaches beyond its storage.
        """
        if spec.dtype not in _DTYPES:
            raise UnsupportedModelError(
                f"'{name}' is a quantised, sparse or complex tensor.",
                hint="Give the float weights that it was made from.",
            )
        dtype = _DTYPES[spec.dtype]
        try:
            storage = self._storage(spec.storage)
            numbers = storage[: len(storage) // dtype.itemsize * dtype.itemsize].view(dtype)
            return numbers.as_strided(spec.shape, spec.stride, spec.offset)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"'{name}' does not lie where the file says.", why=str(error)) from error

    def _storage(self, span: Span) -> Tensor:
        if span not in self._storages:
            count = span.stop - span.start
            stretch = np.frombuffer(self._files[span.file], np.uint8, count, span.start) if count else np.empty(0, "u1")
            self._storages[span] = torch.from_numpy(stretch.copy())
        return self._storages[span]

    def changes(self, stored: Mapping[str, TensorSpec], wanted: Mapping[str, Tensor]) -> dict[str, dict[int, bytes]]:
        """What to overwrite where, so that the files hold other values.

        Args:
            stored: Tensors by their name in the file.
            wanted: New values by the same names.

        Returns:
            By file, the new bytes of each storage that changes, by their position.

        Raises:
            ArtifactError: The file cannot hold a tensor.
        """
        tensors = {key: self.tensor(key, stored[key]) for key in wanted}
        new = changed(tensors, wanted)
        try:
            for key, values in new.items():
                tensors[key].copy_(values)
        except RuntimeError as error:  # e.g. elements of one tensor that share their memory
            raise ArtifactError("The changed weights do not fit into the checkpoint.", why=str(error)) from error
        torn = changed(tensors, {key: values.to(tensors[key].dtype) for key, values in wanted.items()})
        if torn:
            raise ArtifactError(
                f"'{next(iter(torn))}' cannot be written: in the file it shares its memory with another tensor.",
                why="The repaired network has different values in the two.",
                hint="Save the checkpoint with tensors of their own (clone them) and repair that.",
            )
        result: dict[str, dict[int, bytes]] = {}
        for span in {stored[key].storage for key in new}:
            result.setdefault(span.file, {})[span.start] = self._storages[span].numpy().tobytes()
        return result

    def grown(self, stored: Mapping[str, TensorSpec], wanted: Mapping[str, Tensor]) -> dict[int, bytes]:
        """The storages of tensors that get one row more.

        Args:
            stored: Tensors by their name in the file.
            wanted: New values by the same names, with one row more than in the file.

        Returns:
            All bytes of each storage, by its position in the file.

        Raises:
            UnsupportedModelError: A tensor does not fill a storage of its own.
            ArtifactError: The file's type cannot hold the values.
        """
        result: dict[int, bytes] = {}
        spans = [spec.storage for spec in stored.values()]
        for key, new in wanted.items():
            spec, old, new = stored[key], self.tensor(key, stored[key]), new.detach().cpu()
            if (
                spans.count(spec.storage) > 1
                or old.nbytes != spec.storage.stop - spec.storage.start
                or (not old.is_contiguous())
            ):
                raise UnsupportedModelError(
                    f"'{key}' cannot be given one row more: in the file it lies in memory that is not its own alone.",
                    hint="Save the checkpoint with tensors of their own (clone them) and repair that.",
                )
            larger = torch.cat([old, new[len(old) :].to(old.dtype)])
            larger = changed({key: larger}, {key: new}).get(key, larger)
            result[spec.storage.start] = larger.contiguous().view(torch.uint8).numpy().tobytes()
        return result


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
