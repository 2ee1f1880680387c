"""Hostile ONNX files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from hostile.good import ARRAYS, FIRST, LAST, node, onnx_bytes, onnx_model
from hostile.yard import SECRET, Case, Yard
from onnx import helper, numpy_helper

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError


def _outside(yard: Yard, location: str, **place: int) -> bytes:
    """The good file with its head in a file of that name."""
    model = onnx_model()
    _moved(next(tensor for tensor in model.graph.initializer if tensor.name == "v"), location, **place)
    return bytes(model.SerializeToString())


def _moved(tensor: onnx.TensorProto, location: str, **place: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "length": ARRAYS["v"].nbytes, **place}.items():
        tensor.external_data.add(key=key, value=str(value))


def _linked(kind: str) -> Callable[[Yard], bytes]:
    def write(yard: Yard) -> bytes:
        getattr(yard.folder / "weights", kind)(yard.secret)
        return _outside(yard, "weights")

    return write


def _in_an_operator(yard: Yard) -> bytes:
    tensor = numpy_helper.from_array(ARRAYS["v"], "v2")
    _moved(tensor, str(yard.secret))
    nodes = [*FIRST, node("Constant", "", "v2", value=tensor), node("Flatten", "h", "f"), node("Gemm", "f v2 d", "y")]
    return onnx_bytes(nodes)


def _in_a_branch(yard: Yard) -> bytes:
    tensor = numpy_helper.from_array(ARRAYS["v"], "v2")
    _moved(tensor, "../secret")
    inner = helper.make_graph(
        [node("Gemm", "f v2 d", "out")], "b", [], [helper.make_tensor_value_info("out", 1, None)], [tensor]
    )
    nodes = [*FIRST, node("Flatten", "h", "f"), node("ReduceMax", "x", "m", keepdims=0)]
    nodes += [node("Cast", "m", "yes", to=9), node("If", "yes", "y", then_branch=inner, else_branch=inner)]
    return onnx_bytes(nodes)


def _of_terabytes(op: str, shape: list[int]) -> Callable[[Yard], bytes]:
    inputs = "s" if op == "ConstantOfShape" else "one s"
    nodes = [node(op, inputs, "k"), node("ReduceMax", "k", "m", keepdims=0), FIRST[0], node("Add", "c m", "h"), *LAST]
    return lambda yard: onnx_bytes(nodes, {"s": np.array(shape), "one": np.float32([1])})


def _growing(yard: Yard) -> bytes:
    nodes = [node("Concat", f"k{i} k{i}", f"k{i + 1}", axis=0) for i in range(40)]
    nodes += [node("ReduceMax", "k40", "m", keepdims=0), FIRST[0], node("Add", "c m", "h"), *LAST]
    return onnx_bytes(nodes, {"k0": np.ones(1000, "f4")})


def _counting(yard: Yard) -> bytes:
    nodes = [node("Range", "zero many one", "k"), node("ReduceMax", "k", "m", keepdims=0)]
    nodes += [node("Cast", "m", "n", to=1), FIRST[0], node("Add", "c n", "h"), *LAST]
    return onnx_bytes(nodes, {"zero": np.array(0), "many": np.array(2**45), "one": np.array(1)})


def _value_of_terabytes(op: str) -> Callable[[Yard], bytes]:
    sizes = {
        "Pad": [0, 0, 2**30, 2**30, 0, 0, 0, 0],
        "Tile": [1, 2**20, 2**20, 1],
        "Expand": [1, 1, 2**20, 4],
        "Resize": [1, 1, 2**20, 2**20],
    }[op]
    inputs = {"Resize": "x e e s"}.get(op, "x s")
    nodes = [node(op, inputs, "h"), node("ReduceMax", "h", "y", axes=[2, 3])]
    return lambda yard: onnx_bytes(nodes, {"s": np.array(sizes), "e": np.zeros(0, "f4")})


def _many_nodes(yard: Yard) -> bytes:
    names = ["c", *(f"v{i}" for i in range(100_000)), "h"]
    return onnx_bytes([FIRST[0], *(node("Relu", a, b) for a, b in itertools.pairwise(names)), *LAST])


def _nested(yard: Yard) -> bytes:
    graph = helper.make_graph([node("Relu", "x", "out")], "b", [], [helper.make_tensor_value_info("out", 1, None)])
    for _ in range(25):
        inner = node("If", "yes", "out", then_branch=graph)
        graph = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("out", 1, None)])
    return onnx_bytes([node("If", "yes", "h", then_branch=graph), *LAST])


def _declared(dims: list[int]) -> Callable[[Yard], bytes]:
    def write(yard: Yard) -> bytes:
        model = onnx_model()
        model.graph.initializer[0].dims[:] = dims
        return bytes(model.SerializeToString())

    return write


def _of_numbers(value: float) -> Callable[[Yard], bytes]:
    return lambda yard: onnx_bytes(arrays={"w": np.full(ARRAYS["w"].shape, value, "f4")})


def _cyclic(yard: Yard) -> bytes:
    return onnx_bytes([FIRST[0], node("Add", "c r", "a"), node("Relu", "a", "r"), node("Identity", "r", "h"), *LAST])


def _function(yard: Yard) -> bytes:
    model = onnx_model([helper.make_node("Relu", ["x"], ["h"], domain="own"), *LAST])
    body = [node("Sigmoid", "a", "b")]
    model.functions.append(helper.make_function("own", "Relu", ["a"], ["b"], body, [helper.make_opsetid("", 13)]))
    return bytes(model.SerializeToString())


def _loop(op: str) -> Callable[[Yard], bytes]:
    body = helper.make_graph([node("Relu", "x", "out")], "b", [], [helper.make_tensor_value_info("out", 1, None)])
    return lambda yard: onnx_bytes([node(op, "x", "h", body=body), *LAST])


def _named(name: str) -> Callable[[Yard], bytes]:
    """The good file in which every layer, value and array has a name of that kind."""

    def write(yard: Yard) -> bytes:
        model = onnx_model()
        graph = model.graph
        names = {value: f"{name}{number or ''}" for number, value in enumerate(["w", "b", "v", "d", "c", "h", "f"])}
        for number, part in enumerate(graph.node):
            part.name = f"{name}{number or ''}"
            part.doc_string = f"__import__('os').system('{yard.command}')"
            part.input[:] = [names.get(value, value) for value in part.input]
            part.output[:] = [names.get(value, value) for value in part.output]
        for tensor in graph.initializer:
            tensor.name = names.get(tensor.name, tensor.name)
        return bytes(model.SerializeToString())

    return write


def _secret_as_metadata(yard: Yard) -> bytes:
    model = onnx_model()
    model.metadata_props.add(key="location", value=str(yard.secret))
    model.doc_string = f"location: {yard.secret}"
    return bytes(model.SerializeToString())


def _training(yard: Yard) -> bytes:
    """Arrays that only training would read are never looked for."""
    model = onnx_model()
    tensor = model.training_info.add().initialization.initializer.add(name="t", data_type=1, dims=[8, 3])
    _moved(tensor, str(yard.secret))
    return bytes(model.SerializeToString())


def _companion(yard: Yard) -> bytes:
    """The honest form: arrays beside the model, by a plain name."""
    (yard.folder / "model.bin.data").write_bytes(ARRAYS["v"].tobytes())
    return _outside(yard, "model.bin.data")


def cases() -> Iterator[Case]:
    """All of them."""
    for name in (
        "{secret}",
        "../{folder}/secret",
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        "C:secret",
        "a\0b",
        "",
    ):
        yield Case(
            "other files", f".onnx: arrays at {name!r}", UnsafeModelError,
            lambda yard, name=name: _outside(yard, name.format(secret=yard.secret, folder=yard.folder.name)),
        )  # fmt: skip
    yield Case("other files", ".onnx: arrays behind a symbolic link", UnsafeModelError, _linked("symlink_to"))
    yield Case("other files", ".onnx: arrays behind a hard link", UnsafeModelError, _linked("hardlink_to"))
    yield Case("other files", ".onnx: arrays in the model itself", UnsafeModelError, lambda y: _outside(y, "model.bin"))
    yield Case("other files", ".onnx: arrays in a folder", ArtifactError, lambda y: _outside(y, ".."))
    yield Case("other files", ".onnx: arrays of an operator", UnsafeModelError, _in_an_operator)
    yield Case("other files", ".onnx: arrays of a branch", UnsafeModelError, _in_a_branch)
    yield Case("other files", ".onnx: arrays of a training graph", UnsafeModelError, _training)
    yield Case("other files", ".onnx: arrays that are missing", ArtifactError, lambda y: _outside(y, "missing"))
    yield Case("other files", ".onnx: metadata that name a file", None, _secret_as_metadata)
    yield Case("other files", ".onnx: arrays beside the model", None, _companion)
    for shape in ([2**20, 2**20], [2**40], [2**62, 4]):
        for op in ("ConstantOfShape", "Expand"):
            yield Case("exhaustion", f".onnx: {op} {shape}", ArtifactError, _of_terabytes(op, shape))
    for op in ("Pad", "Tile", "Expand", "Resize"):
        yield Case("exhaustion", f".onnx: {op} of an image", ArtifactError, _value_of_terabytes(op))
    yield Case("exhaustion", ".onnx: a constant that doubles", UnsafeModelError, _growing)
    yield Case("exhaustion", ".onnx: a count without end", UnsafeModelError, _counting)
    yield Case("exhaustion", ".onnx: 100,000 operators", UnsafeModelError, _many_nodes)
    yield Case("exhaustion", ".onnx: branches in branches", ArtifactError, _nested)
    yield Case(
        "exhaustion", ".onnx: images of terabytes", UnsafeModelError, lambda y: onnx_bytes(shape=("N", 1, 2**20, 2**20))
    )
    for dims in ([2**30, 2**20, 3, 3], [-1, 1, 3, 3], [2, 1, 3, 4]):
        yield Case("exhaustion", f".onnx: an array that declares {dims}", ArtifactError, _declared(dims))
    for value in (np.nan, np.inf, 3e38):
        yield Case("malformed", f".onnx: {value}", UnsupportedModelError, _of_numbers(value))
    yield Case("malformed", ".onnx: a cycle", ArtifactError, _cyclic)
    yield Case("malformed", ".onnx: one name for two values", ArtifactError, lambda y: onnx_bytes([*FIRST, *FIRST]))
    yield Case("code", ".onnx: an operator of the file", UnsupportedModelError, _function)
    yield Case(
        "code", ".onnx: an operator of another library", UnsupportedModelError,
        lambda y: onnx_bytes([helper.make_node("PyOp", ["x"], ["h"], domain="ai.onnx.contrib"), *LAST]),
    )  # fmt: skip
    for op in ("Loop", "Scan"):
        yield Case("disguise", f".onnx: a {op}", UnsupportedModelError, _loop(op))
    for name in (
        "forward",
        "_modules",
        "training",
        "__class__",
        "state_dict",
        "lambda",
        'a"]; import os #',
        "a.b",
        "ü",
    ):
        yield Case("names", f".onnx: {name}", None, _named(name))


assert SECRET.nbytes >= ARRAYS["v"].nbytes  # so that reading it instead of the array would work
