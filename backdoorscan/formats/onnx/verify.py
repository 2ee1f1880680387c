"""Compares a converted network with what onnxruntime makes of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.onnx.parse import ParsedOnnx
from backdoorscan.formats.onnx.reference import Excerpt, run
from backdoorscan.formats.sandbox import run_apart

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
_ELEMENTS: Mapping[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.UINT8: np.uint8,
}
_ENDINGS = {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze"}
_HINT = "Please report this with the model's architecture."


def compare(artifact: Artifact, parsed: ParsedOnnx, built: BuiltNetwork) -> None:
    """Check on random images that the network computes what onnxruntime does.

    The scores are compared, and what comes before a final softmax, which would hide differences. Files for a fixed
    number of images are run piece by piece, so that the network's own batches are checked too.

    Args:
        artifact: The file.
        parsed: What it says.
        built: The network.

    Raises:
        UnsupportedModelError: It does not, or onnxruntime cannot run the file.
    """
    element = _ELEMENTS.get(parsed.input.element)
    if element is None:
        raise UnsupportedModelError("The model takes images in bfloat16.", hint="Export it in float32.")
    count = 2 * (parsed.input.batch or 1)
    # Some networks are fed 0..1, others 0..255: in between, differences could drown.
    images = np.random.default_rng(0).random((count, *built.size)) * np.resize([1.0, 255.0], count).reshape(
        -1, *[1] * len(built.size)
    )
    inputs = images.astype(element)
    names = [name for name in dict.fromkeys((parsed.output, before_ending(parsed))) if name in built.nodes]
    excerpt, batches = excerpt_of(parsed, names), np.split(inputs, 2)
    pieces = run_apart(run, artifact.data, artifact.parts, excerpt, batches, name=str(artifact.path))
    tensor = torch.from_numpy(inputs.astype(np.float32))
    nodes = [built.nodes[name] for name in names]
    try:
        found = graph.values(built.network, tensor.permute(0, 3, 1, 2) if built.layout == "NHWC" else tensor, nodes)
    except Exception as error:  # what a damaged file makes of a graph whose shapes fit
        raise UnsupportedModelError(
            "The model cannot be run.", why=str(error).strip().splitlines()[0][:200], hint="Export it again."
        ) from error
    tolerance = _HALF_TOLERANCE if parsed.halves or element is np.float16 else _TOLERANCE
    for node, parts in zip(nodes, zip(*pieces, strict=True), strict=True):
        _check(found[node].numpy(), parts, tolerance)


def excerpt_of(parsed: ParsedOnnx, outputs: Sequence[str]) -> Excerpt:
    """All that was read of a file, and what it is to return."""
    nodes = [next(filter(None, node.outputs)) for node in parsed.nodes]
    return Excerpt(nodes, sorted(parsed.arrays), parsed.input.name, outputs)


def _check(actual: NDArray[Any], parts: tuple[NDArray[Any], ...], tolerance: float) -> None:
    if any(part.ndim != actual.ndim for part in parts):
        raise UnsupportedModelError(
            "The converted network gives values of another shape than onnxruntime.",
            why=f"{actual.shape} instead of pieces of {parts[0].shape}.",
            hint=_HINT,
        )
    # The pieces lie along the axis of the images, which need not be the first in the middle of a network.
    axes = [axis for axis in range(actual.ndim) if all(part.shape[axis] != actual.shape[axis] for part in parts)]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.concatenate([part.astype(np.float32) for part in parts], axis=axes[0] if axes else 0)
        fits = expected.shape == actual.shape
        apart = np.abs(actual - expected) if fits else np.zeros(0)
    scale = max(1.0, float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0)))
    if not fits or not np.allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True):
        difference = f" of {apart[np.isfinite(apart)].max(initial=0.0):.3g}" if fits else ""
        raise UnsupportedModelError(
            "The converted network does not compute what onnxruntime does.",
            why=f"A difference{difference} among numbers up to {scale:.3g}.",
            hint=_HINT,
        )


def before_ending(parsed: ParsedOnnx) -> str:
    """The value that a final activation is made from."""
    makers = {node.outputs[0]: node for node in parsed.nodes}
    name = parsed.output
    while name in makers and makers[name].op in _ENDINGS and makers[name].inputs:
        name = makers[name].inputs[0]
    return name
