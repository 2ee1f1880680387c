"""Models exported by torch, and graphs written by hand; onnxruntime is the truth."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from backdoorscan.artifact import Artifact
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.plugin.loader import LoadedNetwork

FLOAT = onnx.TensorProto.FLOAT


def artifact_of(data: bytes, name: str = "model.onnx") -> Artifact:
    return Artifact(Path(name), data, "")


def load_bytes(data: bytes) -> LoadedNetwork:
    return Onnx().load(artifact_of(data), None)


@pytest.fixture
def load() -> Callable[[bytes], LoadedNetwork]:
    """Load a model from its bytes."""
    return load_bytes


@pytest.fixture
def artifact() -> Callable[..., Artifact]:
    """Bytes as an artifact."""
    return artifact_of


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export_model(
    model: nn.Module,
    shape: Sequence[int] = (3, 32, 32),
    *,
    dynamo: bool = False,
    opset: int | None = 17,
    batch: int | None = None,
) -> bytes:
    """Export with an open batch, or for ``batch`` images."""
    image = torch.randn(batch or 2, *shape)
    options: dict[str, Any] = {"opset_version": opset, "input_names": ["image"], "output_names": ["scores"]}
    with quiet():
        if dynamo:
            if batch is None:
                options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(model, (image,), dynamo=True, verbose=False, **options)
            assert program is not None
            return bytes(program.model_proto.SerializeToString())
        if batch is None:
            options["dynamic_axes"] = {"image": {0: "batch"}, "scores": {0: "batch"}}
        buffer = io.BytesIO()
        torch.onnx.export(model, (image,), buffer, dynamo=False, **options)
        return buffer.getvalue()


@pytest.fixture
def export() -> Callable[..., bytes]:
    """Export a module of torch."""
    return export_model


def write_model(
    nodes: Sequence[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    shape: Sequence[int | str | None] = ("N", 3, 6, 5),
    *,
    opset: int = 13,
    element: int = FLOAT,
    outputs: Sequence[str] = ("y",),
    ir_version: int = 8,
) -> bytes:
    """A file whose input is ``x`` and whose output is ``y``."""
    inputs = [helper.make_tensor_value_info("x", element, shape)]
    result = FLOAT if element == onnx.TensorProto.UINT8 else element
    scores = [helper.make_tensor_value_info(name, result, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(list(nodes), "g", inputs, scores, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    return bytes(model.SerializeToString())


@pytest.fixture
def written() -> Callable[..., bytes]:
    """Write a graph."""
    return write_model


def run_file(data: bytes, x: np.ndarray, name: str = "x") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: x})[0])


@pytest.fixture
def run() -> Callable[..., np.ndarray]:
    """Run a file in onnxruntime."""
    return run_file


def run_network(loaded: LoadedNetwork, x: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(x.astype(np.float32))
    with torch.no_grad():
        return np.asarray(loaded.network(tensor.permute(0, 3, 1, 2) if loaded.layout == "NHWC" else tensor))


@pytest.fixture
def answer() -> Callable[..., np.ndarray]:
    """Run a loaded network on inputs in the file's own order of axes."""
    return run_network


@pytest.fixture
def same(tmp_path: Path) -> Callable[..., LoadedNetwork]:
    """Load a file and compare it with onnxruntime on three images, one by one and together."""

    def compare(data: bytes, *, batch: int | None = None, size: Sequence[int] | None = None) -> LoadedNetwork:
        loaded = load_bytes(data)
        assert loaded.input_shape is not None
        shape = list(size or loaded.input_shape)
        if loaded.layout == "NHWC" and size is None:
            shape = [*shape[1:], shape[0]]
        x = np.random.default_rng(3).normal(size=(3 * (batch or 1), *shape)).astype(np.float32)
        pieces = np.split(x, 3)
        expected = np.concatenate([run_file(data, piece) for piece in pieces])
        actual = run_network(loaded, x)
        assert np.isfinite(expected).all() and np.ptp(expected) > 1e-3
        np.testing.assert_allclose(actual, expected.reshape(actual.shape), atol=1e-4, rtol=1e-4)
        assert not any(tensor.is_meta for tensor in loaded.network.state_dict().values())
        return loaded

    return compare
