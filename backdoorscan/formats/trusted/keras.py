"""Conversions with Keras on PyTorch, which run in the sandbox: Keras models to exported programs."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.trusted.pytorch import example_for, exported
from backdoorscan.formats.trusted.standing import somewhere, without_drawing

with somewhere():
    from torch import Tensor, nn


class _Inference(nn.Module):
    """A Keras model as it is used, never as it is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images, training=False)


def from_keras(data: bytes, archive: bool, shapes: Sequence[tuple[int, ...]]) -> bytes:
    """Run a Keras model with the code in it, and export it.

    Args:
        data: The file.
        archive: Whether it is a ``.keras`` archive, else ``.h5``.
        shapes: Of one image: those that may fit, the likeliest first.

    Returns:
        A .pt2 file.

    Raises:
        UnsupportedModelError: Keras cannot load it, it takes no such images, or it cannot be exported.
    """
    os.environ["KERAS_BACKEND"] = "torch"
    without_drawing()
    try:
        model = _archive(data) if archive else _hdf5(data)
    except Exception as error:  # whatever Keras raises about a file, and the code in it
        lines = str(error).strip().splitlines() or [""]
        raise UnsupportedModelError(
            "Keras cannot load the model.",
            why=f"{type(error).__name__}: {lines[0][:300]}",
            hint="Where it was trained, export it to ONNX, or save it without custom layers.",
        ) from error
    network = _Inference(model).eval()
    return exported(network, network, example_for(network, shapes))


def _hdf5(data: bytes) -> Any:
    # What keras.saving.load_model does with a path; here the bytes are no file.
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import load_model_from_hdf5

    with h5py.File(io.BytesIO(data)) as file:
        return load_model_from_hdf5(file, compile=False, safe_mode=False)


def _archive(data: bytes) -> Any:
    from keras.src.saving.saving_lib import _load_model_from_fileobj

    return _load_model_from_fileobj(io.BytesIO(data), custom_objects=None, compile=False, safe_mode=False)
