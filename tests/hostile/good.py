"""One small network, as a good file of each format: what hostile files are made from."""

from __future__ import annotations

import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
import onnx
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

Array = NDArray[Any]
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 1, 2)).astype("f4")
HEAD = RNG.normal(size=(8, 3)).astype("f4")
INPUT = {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 4, 4, 1], "dtype": "float32"}}
CONV = {"class_name": "Conv2D", "config": {"name": "conv", "filters": 2, "kernel_size": [3, 3], "activation": "relu"}}
FLATTEN = {"class_name": "Flatten", "config": {"name": "flatten"}}
DENSE = {"class_name": "Dense", "config": {"name": "dense", "units": 3, "activation": "softmax"}}
LAYERS = (INPUT, CONV, FLATTEN, DENSE)


def stack(*layers: Any) -> dict[str, Any]:
    """A sequential model."""
    return {"class_name": "Sequential", "config": {"name": "s", "layers": list(layers)}}


def h5(config: Any = None, edit: Callable[[h5py.File], None] = lambda file: None) -> bytes:
    """A whole model as Keras 2 wrote it; ``edit`` may change the file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        text = config if isinstance(config, str | bytes) else json.dumps(config or stack(*LAYERS))
        file.attrs.create("model_config", text, dtype=h5py.string_dtype())
        file.attrs["keras_version"] = "2.3.1"
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [b"in", b"conv", b"flatten", b"dense"]
        for layer, kernel in {"in": None, "conv": KERNEL, "flatten": None, "dense": HEAD}.items():
            group = weights.create_group(layer)
            names = [] if kernel is None else [f"{layer}/kernel:0".encode(), f"{layer}/bias:0".encode()]
            group.attrs["weight_names"] = np.array(names, "S64")
            if kernel is not None:
                group[f"{layer}/kernel:0"] = kernel
                group[f"{layer}/bias:0"] = np.full(kernel.shape[-1], 0.1, "f4")
        edit(file)
    return buffer.getvalue()


def zipped(members: Mapping[str, bytes | str], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive without dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def keras_weights(edit: Callable[[h5py.File], None] = lambda file: None) -> bytes:
    """The weights inside a ``.keras`` file."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for layer, kernel in {"conv2d": KERNEL, "dense": HEAD}.items():
            file[f"layers/{layer}/vars/0"] = kernel
            file[f"layers/{layer}/vars/1"] = np.full(kernel.shape[-1], 0.1, "f4")
        edit(file)
    return buffer.getvalue()


def keras_members(config: Any = None, weights: bytes | None = None, **more: bytes) -> dict[str, bytes | str]:
    """The members of a ``.keras`` file."""
    text = config if isinstance(config, str | bytes) else json.dumps(config or stack(*LAYERS))
    return {
        "metadata.json": json.dumps({"keras_version": "3.15.1"}),
        "config.json": text,
        "model.weights.h5": weights or keras_weights(),
        **more,
    }


def keras(config: Any = None, weights: bytes | None = None, method: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A ``.keras`` file."""
    return zipped(keras_members(config, weights, **more), method)


def node(op: str, inputs: str, outputs: str, name: str = "", **settings: Any) -> onnx.NodeProto:
    """An ONNX operator; names apart by spaces."""
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


ARRAYS = {"w": KERNEL.transpose(3, 2, 0, 1).copy(), "b": np.full(2, 0.1, "f4"), "v": HEAD, "d": np.full(3, 0.1, "f4")}
FIRST = (node("Conv", "x w b", "c", "conv"), node("Relu", "c", "h"))
LAST = (node("Flatten", "h", "f"), node("Gemm", "f v d", "y", "head"))


def onnx_model(
    nodes: Sequence[onnx.NodeProto] = (*FIRST, *LAST),
    arrays: Mapping[str, Array] | None = None,
    shape: Sequence[int | str] = ("N", 1, 4, 4),
) -> onnx.ModelProto:
    """A model from ``x`` to ``y``; ``arrays`` are added to those of the good one."""
    tensors = [numpy_helper.from_array(array, name) for name, array in {**ARRAYS, **(arrays or {})}.items()]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="onnx")


def onnx_bytes(*arguments: Any, **options: Any) -> bytes:
    """``onnx_model`` as a file."""
    return bytes(onnx_model(*arguments, **options).SerializeToString())


def network() -> nn.Module:
    """The same network in PyTorch."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.from_numpy(ARRAYS["w"]))
        net[3].weight.copy_(torch.from_numpy(HEAD.T.copy()))
    return net


def saved(content: Any, **options: Any) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def pt2() -> bytes:
    """What ``torch.export.save`` writes."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(network(), (torch.rand(2, 1, 4, 4),), dynamic_shapes=dynamic)
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # where this file lies; all else is the same wherever the tests run
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
    finally:
        logging.disable(logging.NOTSET)
    return buffer.getvalue()


def good_files() -> dict[str, bytes]:
    """The network in every format."""
    weights = network().state_dict()
    return {
        "h5": h5(),
        "keras": keras(),
        "onnx": onnx_bytes(),
        "pt2": pt2(),
        "pt": saved(weights),
        "legacy": saved(weights, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(weights),
    }
