"""Conversions with TensorFlow, which run in the sandbox: SavedModels to ONNX. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.trusted.standing import somewhere, without_drawing

_OPSET = 17
_FOLDER = "ram://model"
_SIGNATURE = "serving_default"
_EXPORT = "Where it was trained, export it to ONNX with tf2onnx, or save the Keras model as a .keras file."


def from_savedmodel(files: Mapping[str, bytes]) -> bytes:
    """Run a SavedModel, and write what it computes as ONNX.

    Args:
        files: Its files by their name in its folder, with ``/``.

    Returns:
        An ONNX file.

    Raises:
        UnsupportedModelError: It takes or returns several tensors, or cannot be converted.
    """
    # Before TensorFlow is imported: no advice to its own developers.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    without_drawing()
    with somewhere():
        import tensorflow
        import tf2onnx
    # TensorFlow reads by path; of this one the disk knows nothing.
    for name, data in files.items():
        with tensorflow.io.gfile.GFile(f"{_FOLDER}/{name}", "wb") as file:
            file.write(data)
    try:
        model = tensorflow.saved_model.load(_FOLDER)
    except Exception as error:  # whatever TensorFlow raises about files that it cannot read
        raise _failed("TensorFlow cannot load the SavedModel.", error) from error
    signature = model.signatures.get(_SIGNATURE)
    entries = signature.structured_input_signature[1] if signature else {}
    outputs = list(signature.structured_outputs) if signature else []
    if len(entries) != 1 or len(outputs) != 1:
        raise UnsupportedModelError(
            f"The SavedModel takes {len(entries)} tensors and returns {len(outputs)} by '{_SIGNATURE}'.",
            why=f"It has the signatures: {', '.join(model.signatures) or 'none'}.",
            hint="backdoorscan reads classifiers: one image in, one score per class out.",
        )
    ((argument, entry),) = entries.items()
    # tf2onnx takes functions of plain arguments, not signatures.
    function = tensorflow.function(
        lambda image: signature(**{argument: image})[outputs[0]], input_signature=[entry], autograph=False
    )
    try:
        converted, _ = tf2onnx.convert.from_function(function, input_signature=[entry], opset=_OPSET)
    except Exception as error:  # whatever the converter trips over
        raise _failed("tf2onnx cannot convert the SavedModel.", error) from error
    onnx: bytes = converted.SerializeToString()
    return onnx


def _failed(what: str, error: Exception) -> UnsupportedModelError:
    lines = str(error).strip().splitlines() or [""]
    return UnsupportedModelError(what, why=f"{type(error).__name__}: {lines[0][:200]}", hint=_EXPORT)
