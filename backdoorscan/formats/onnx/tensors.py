"""Arrays as an ONNX file stores them: inside, or in companion files beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import numpy_helper

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError

AGAIN = "Export the model again, or download the file again."

FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
}
INTEGERS = {
    onnx.TensorProto.UINT8,
    onnx.TensorProto.INT8,
    onnx.TensorProto.UINT16,
    onnx.TensorProto.INT16,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT32,
    onnx.TensorProto.UINT64,
}
_READABLE = FLOATS | INTEGERS | {onnx.TensorProto.BOOL}


class Store:
    """Where the arrays of one file lie.

    Args:
        size: Bytes of the file.
        parts: Its companions by their names relative to its folder.
    """

    def __init__(self, size: int, parts: Mapping[str, bytes]) -> None:
        self._parts = parts
        # No element takes less than a byte.
        self.limit = size + sum(map(len, parts.values()))

    def read(self, tensor: onnx.TensorProto, name: str) -> NDArray[Any]:
        """The array in a tensor message.

        Args:
            tensor: The message.
            name: What to call it in errors.

        Raises:
            UnsafeModelError: It declares more than there is, or names a file that is no companion.
            ArtifactError: It is broken, or no array of numbers.
        """
        if tensor.data_type not in _READABLE:
            raise UnsupportedModelError(
                f"The array '{name}' holds neither numbers nor truth values that this reader knows.",
                why=f"Its element type is {tensor.data_type}.",
                hint="Export the model in float32, without quantisation.",
            )
        dims = list(tensor.dims)
        if any(size < 0 for size in dims) or math.prod(dims) > self.limit:
            raise UnsafeModelError(
                f"The model was refused: its array '{name}' declares the shape {dims}.",
                why="The file does not hold that many numbers.",
                hint="Do not use this file.",
            )
        try:
            return np.array(numpy_helper.to_array(self.gathered(tensor, name)))
        except ArtifactError:
            raise
        except Exception as error:  # a damaged tensor fails in whatever way its bytes suggest
            raise ArtifactError(f"The array '{name}' is broken.", why=str(error)[:200], hint=AGAIN) from error

    def gathered(self, tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
        """The same tensor with its bytes inside.

        Raises:
            UnsafeModelError: It names a file that is no companion.
            ArtifactError: The companion does not hold it.
        """
        if not _is_external(tensor):
            return tensor
        place = _place(tensor)
        file = companion(place.get("location", ""), name)
        if file not in self._parts:
            raise ArtifactError(
                f"The array '{name}' lies in the file '{file}', which is not there.",
                hint="Put the file beside the model: the two belong together.",
            )
        content = self._parts[file]
        start, length = _count(place.get("offset", "0")), _count(place.get("length", str(len(content))))
        if start is not None and length is not None and "length" not in place:
            length -= start
        if start is None or length is None or length < 0 or start + length > len(content):
            raise ArtifactError(
                f"The array '{name}' is broken: the file '{file}' ends before it.",
                why=f"Of {len(content):,} it wants {place.get('length', 'all')} from {place.get('offset', '0')} on.",
                hint=AGAIN,
            )
        whole = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        whole.raw_data = content[start : start + length]
        return whole


def decode(array: NDArray[Any] | None, name: str, limit: int) -> NDArray[Any]:
    """An array among the settings of an operator.

    Args:
        array: As ``Attribute.t`` holds it.
        name: What to call it in errors.
        limit: Most elements it can have.

    Raises:
        ArtifactError: There is none.
        UnsafeModelError: It has more.
    """
    if array is None:
        raise ArtifactError(f"The array '{name}' is broken: a setting holds something else in its place.", hint=AGAIN)
    if array.size > limit:
        raise UnsafeModelError(
            f"The model was refused: its array '{name}' has the shape {list(array.shape)}.",
            why=f"An operator that takes no more than {limit:,} numbers holds it.",
            hint="Do not use this file.",
        )
    return array


def companion(location: str, name: str) -> str:
    """The name, relative to the model's folder, of the file in which an array lies.

    Args:
        location: As the model gives it.
        name: The array.

    Raises:
        UnsafeModelError: It is no plain name inside the folder.
    """
    path = PurePosixPath(location)
    plain = location.isprintable() and not any(mark in location for mark in "\\:")
    if not plain or not path.parts or path.is_absolute() or ".." in path.parts:
        raise UnsafeModelError(
            f"The model was refused: it keeps the array '{name[:100]}' in the file '{location[:200]}'.",
            why="Only files in the model's own folder can belong to it.",
            hint="Save it in one file: onnx.save_model(onnx.load('model.onnx'), 'whole.onnx'), or export it with "
            "torch.onnx.export(..., external_data=False).",
        )
    return str(path)


def tensors_of(message: Message) -> Iterator[onnx.TensorProto]:
    """All tensors in a message, wherever they hide: initialisers, attributes, subgraphs."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if field.is_repeated else (value,):
                yield from tensors_of(part)


def locations(model: onnx.ModelProto) -> list[str]:
    """The companions that a model names, each once.

    Raises:
        UnsafeModelError: One is no plain name inside the model's folder.
    """
    found: dict[str, None] = {}
    for tensor in filter(_is_external, tensors_of(model)):
        found[companion(_place(tensor).get("location", ""), tensor.name)] = None
    return list(found)


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _place(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where a tensor lies; bytes that are no text come out of the message as bytes, and name nothing."""
    return {str(entry.key): str(entry.value) for entry in tensor.external_data}


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
