"""Arrays as an ONNX file stores them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
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


def decode(tensor: onnx.TensorProto, name: str, limit: int) -> NDArray[Any]:
    """The array in a tensor message.

    Args:
        tensor: The message.
        name: What to call it in errors.
        limit: Most elements it can have: no element takes less than a byte of the file.

    Raises:
        UnsafeModelError: It lies in another file, or declares more than the file holds.
        ArtifactError: It is broken, or no array of numbers.
    """
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise UnsafeModelError(
            f"The model was refused: it keeps the array '{name}' in another file.",
            why="Reading a model never opens files that it names.",
            hint="Save it in one file: onnx.save_model(onnx.load('model.onnx'), 'whole.onnx'), or export it with "
            "torch.onnx.export(..., external_data=False).",
        )
    if tensor.data_type not in _READABLE:
        raise UnsupportedModelError(
            f"The array '{name}' holds neither numbers nor truth values that this reader knows.",
            why=f"Its element type is {tensor.data_type}.",
            hint="Export the model in float32, without quantisation.",
        )
    dims = list(tensor.dims)
    if any(size < 0 for size in dims) or math.prod(dims) > limit:
        raise UnsafeModelError(
            f"The model was refused: its array '{name}' declares the shape {dims}.",
            why="The file does not hold that many numbers.",
            hint="Do not use this file.",
        )
    try:
        return np.array(numpy_helper.to_array(tensor))
    except Exception as error:  # a damaged tensor fails in whatever way its bytes suggest
        raise ArtifactError(f"The array '{name}' is broken.", why=str(error)[:200], hint=AGAIN) from error
