"""Compares a converted network with onnxruntime, the reference for what a file means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from backdoorscan import graph
from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.onnx.network import BuiltNetwork
from backdoorscan.formats.onnx.parse import ParsedOnnx

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2
_ELEMENTS: Mapping[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.UINT8: np.uint8,
}
_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_ENDINGS = {"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze"}
_HINT = "Please report this with the model's architecture."


def compare(parsed: ParsedOnnx, built: BuiltNetwork) -> None:
    """Check on random images that the network computes what onnxruntime does.

    The scores are compared, and what comes before a final softmax, which would hide differences. Files for a fixed
    number of images are run piece by piece, so that the network's own batches are checked too.

    Args:
        parsed: The file.
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
    names = [name for name in dict.fromkeys((parsed.output, _before_ending(parsed))) if name in built.nodes]
    try:
        session = _session(reduced(parsed, names))
        pieces = [session.run(names, {parsed.input.name: part}) for part in np.split(inputs, 2)]
    except Exception as error:  # onnxruntime has a class for every kind of failure, and no common one
        raise UnsupportedModelError(
            "onnxruntime cannot run the model.", why=str(error).strip().splitlines()[0][:200], hint="Export it again."
        ) from error
    tensor = torch.from_numpy(inputs.astype(np.float32))
    nodes = [built.nodes[name] for name in names]
    try:
        found = graph.values(built.network, tensor.permute(0, 3, 1, 2) if built.layout == "NHWC" else tensor, nodes)
    except Exception as error:  # what a damaged file makes of a graph whose shapes fit
        raise UnsupportedModelError(
            "The model cannot be run.", why=str(error).strip().splitlines()[0][:200], hint="Export it again."
        ) from error
    half = any(tensor.data_type in _HALVES for tensor in parsed.model.graph.initializer)
    tolerance = _HALF_TOLERANCE if half or element is np.float16 else _TOLERANCE
    for node, parts in zip(nodes, zip(*pieces, strict=True), strict=True):
        _check(found[node].numpy(), parts, tolerance)


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


def _before_ending(parsed: ParsedOnnx) -> str:
    """The value that a final activation is made from."""
    makers = {node.outputs[0]: node for node in parsed.nodes}
    name = parsed.output
    while name in makers and makers[name].op in _ENDINGS and makers[name].inputs:
        name = makers[name].inputs[0]
    return name


def reduced(parsed: ParsedOnnx, outputs: list[str]) -> bytes:
    """A model of only those nodes and arrays that were read, so that onnxruntime meets nothing else."""
    source = parsed.model.graph
    model = onnx.ModelProto(ir_version=parsed.model.ir_version, opset_import=parsed.model.opset_import)
    used = {name for node in parsed.nodes for name in node.inputs} | {parsed.output}
    model.graph.name = "model"
    protos = {next(out for out in node.output if out): node for node in source.node if any(node.output)}
    model.graph.node.extend(protos[next(out for out in node.outputs if out)] for node in parsed.nodes)
    model.graph.initializer.extend(tensor for tensor in source.initializer if tensor.name in used)
    model.graph.input.extend(entry for entry in source.input if entry.name in used)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return bytes(model.SerializeToString())


def _session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Falling back means to print to stdout and to try the same again.
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], enable_fallback=0)
