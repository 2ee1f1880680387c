"""Files that would read other files, fill the memory or hide a program; and broken ones."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from backdoorscan.errors import ArtifactError, BackdoorscanError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats import sandbox
from backdoorscan.formats.onnx import operators
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.formats.onnx.recognise import is_onnx

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


NODES = [
    node("Conv", "x w b", "c", "conv", strides=[2, 2], pads=[1, 1, 1, 1]),
    node("Relu", "c", "r"),
    node("MaxPool", "r", "p", kernel_shape=[2, 2], strides=[1, 1]),
    node("Reshape", "p target", "f"),
    node("Gemm", "f v d", "z", "head", transB=1),
    node("Softmax", "z", "y"),
]
ARRAYS = {
    "w": normal(4, 3, 3, 3), "b": normal(4), "target": np.array([-1, 16]), "v": normal(3, 16), "d": normal(3),
}  # fmt: skip
HEAD = [node("GlobalAveragePool", "h", "p"), node("Flatten", "p", "y")]


@pytest.fixture
def good(written):
    return written(NODES, ARRAYS)


def refused(load, data, match, error=UnsupportedModelError):
    with pytest.raises(error, match=match) as caught:
        load(data)
    assert caught.value.what and caught.value.hint
    assert "Traceback" not in str(caught.value)
    return caught.value


def changed(data, change):
    model = onnx.load_model_from_string(data)
    change(model.graph)
    return model.SerializeToString()


def test_the_good_file_loads(good, load):
    assert load(good).num_classes == 3


def test_an_operator_that_depends_on_itself(written, load):
    nodes = [
        node("Add", "x b", "a", "first"),
        node("Add", "a r", "b"),
        node("Relu", "b", "r"),
        node("Flatten", "r", "y"),
    ]
    refused(load, written(nodes, {}), "depends on itself", ArtifactError)


def test_a_value_that_nothing_gives(written, load):
    refused(load, written([node("Add", "x nothing", "y")], {}), "nothing gives the value", ArtifactError)


def test_one_name_for_two_values(written, load):
    nodes = [node("Relu", "x", "y"), node("Tanh", "x", "y")]
    refused(load, written(nodes, {}), "one name", ArtifactError)


def test_a_long_chain_is_no_problem_and_an_endless_one_is_refused(written, load):
    names = ["x", *(f"v{i}" for i in range(1500)), "h"]
    nodes = [node("Relu", a, b) for a, b in itertools.pairwise(names)]
    assert load(written([*nodes, *HEAD], {})).num_classes == 3
    many = [node("Relu", "x", f"v{i}") for i in range(20_001)]
    refused(load, written(many, {}), "20,001 operators", UnsafeModelError)


@pytest.mark.parametrize("shape", [[2**20, 2**20], [2**40], [2**31, 2**31], [2**62, 4]])
@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand"])
def test_a_constant_of_terabytes(written, load, op, shape):
    nodes = [node(op, "s" if op == "ConstantOfShape" else "one s", "k"), node("ReduceMax", "k", "m", keepdims=0)]
    nodes += [node("Add", "x m", "h"), *HEAD]
    data = written(nodes, {"s": np.array(shape), "one": np.float32([1])})
    refused(load, data, "k|ConstantOfShape|Expand", ArtifactError)


def test_a_constant_that_grows(written, load):
    nodes = [node("Concat", f"k{i} k{i}", f"k{i + 1}", axis=0) for i in range(40)]
    nodes += [node("ReduceMax", "k40", "m", keepdims=0), node("Add", "x m", "h"), *HEAD]
    refused(load, written(nodes, {"k0": normal(1000)}), "makes a constant", UnsafeModelError)


def test_many_constants_together(written, load):
    nodes = [node("Add", f"k{i} k0", f"k{i + 1}") for i in range(1000)]
    nodes += [node("ReduceMax", "k1000", "m", keepdims=0), node("Add", "x m", "h"), *HEAD]
    refused(load, written(nodes, {"k0": normal(2**16)}), "makes a constant", UnsafeModelError)


def test_a_count_without_end(written, load):
    nodes = [node("Range", "zero many one", "k"), node("ReduceMax", "k", "m", keepdims=0)]
    nodes += [node("Cast", "m", "f", to=1), node("Add", "x f", "h"), *HEAD]
    arrays = {"zero": np.array(0), "many": np.array(2**45), "one": np.array(1)}
    refused(load, written(nodes, arrays), "makes a constant", UnsafeModelError)


@pytest.mark.parametrize("op", ["Pad", "Tile", "Resize", "Expand"])
def test_a_value_of_terabytes(written, load, op):
    inputs, arrays = {
        "Pad": ("x s", {"s": np.array([0, 0, 2**30, 2**30, 0, 0, 0, 0])}),
        "Tile": ("x s", {"s": np.array([1, 2**20, 2**20, 1])}),
        "Resize": ("x e e s", {"e": np.zeros(0, np.float32), "s": np.array([1, 3, 2**20, 2**20])}),
        "Expand": ("u s", {"s": np.array([1, 2**40, 3, 6, 5]), "axes": np.array([1])}),
    }[op]
    first = [node("Unsqueeze", "x axes", "u")] if op == "Expand" else []
    nodes = [*first, node(op, inputs, "h"), node("ReduceMax", "h", "y", axes=[2, 3])]
    refused(load, written(nodes, arrays), "needs more memory|cannot be read", ArtifactError)


def test_images_of_terabytes(written, load):
    data = written([node("Relu", "x", "h"), *HEAD], {}, ("N", 3, 2**20, 2**20))
    refused(load, data, "takes images of the shape", UnsafeModelError)


def test_arrays_that_declare_more_than_there_is(good, load):
    def change(graph):
        graph.initializer[0].dims[:] = [2**30, 2**20, 3, 3]

    refused(load, changed(good, change), "declares the shape", UnsafeModelError)


@pytest.mark.parametrize("dims", [[4, 3, 3, 4], [4, 3], [-1, 3, 3, 3]])
def test_arrays_of_another_size(good, load, dims):
    refused(
        load,
        changed(good, lambda graph: graph.initializer[0].dims.__setitem__(slice(None), dims)),
        "'w'",
        ArtifactError,
    )


@pytest.mark.parametrize("op", ["Loop", "Scan"])
def test_loops(written, load, op):
    branch = helper.make_graph([node("Relu", "x", "out")], "b", [], [helper.make_tensor_value_info("out", 1, None)])
    error = refused(load, written([node(op, "x", "y", "gate", body=branch)], {}), f"{op} 'gate'")
    assert "backdoor can hide" in error.why


@pytest.mark.parametrize(
    "op, domain, named",
    [("Telepathy", "", "Telepathy"), ("FusedConv", "com.microsoft", "com.microsoft"), ("TopK", "", "TopK")],
)
def test_unknown_operators(written, load, op, domain, named):
    error = refused(load, written([helper.make_node(op, ["x"], ["y"], "it", domain=domain)], {}), "it")
    assert named in error.why


def test_a_bias_added_by_a_stranger(written, load):
    nodes = [node("Conv", "x w", "c"), helper.make_node("Add", ["c", "b"], ["h"], "own", domain="own"), *HEAD]
    error = refused(load, written(nodes, {"w": ARRAYS["w"], "b": normal(4, 1, 1)}), "own")
    assert "domain 'own'" in error.why


def test_functions_of_the_file(written, load):
    """An operator defined in the file itself is known by its own domain."""
    model = onnx.load_model_from_string(written([helper.make_node("Relu", ["x"], ["y"], domain="own")], {}))
    body = [node("Sigmoid", "a", "b")]
    model.functions.append(helper.make_function("own", "Relu", ["a"], ["b"], body, [helper.make_opsetid("", 13)]))
    refused(load, model.SerializeToString(), "Relu")


@pytest.mark.parametrize("opset", [1, 6])
def test_older_operators(good, load, opset):
    model = onnx.load_model_from_string(good)
    model.opset_import[0].version = opset
    refused(load, model.SerializeToString(), f"version {opset}")


def test_training_mode(written, load):
    arrays = {name: np.abs(normal(3)) for name in "abcd"}
    nodes = [node("BatchNormalization", "x a b c d", "h m v", training_mode=1), *HEAD]
    refused(load, written(nodes, arrays, opset=15), "BatchNormalization")


@pytest.mark.parametrize("nodes, match", [
    ([node("ReduceMean", "x", "m", axes=[0]), node("Add", "x m", "h"), *HEAD], "every image by itself"),
    ([node("Flatten", "x", "y", axis=0)], "shape 1×90N"),
    ([node("Gather", "x zero", "g", axis=0), node("Flatten", "g", "y")], "picks images"),
    ([node("Relu", "x", "y")], "returns values of the shape"),
    ([node("Identity", "w", "y")], "0 inputs"),
])  # fmt: skip
def test_what_is_no_classifier(written, load, nodes, match):
    refused(load, written(nodes, {"zero": np.array(0), "w": normal(1, 3)}), match)


def test_two_inputs(written, load):
    model = onnx.load_model_from_string(written([node("Add", "x second", "h"), *HEAD], {}))
    model.graph.input.append(helper.make_tensor_value_info("second", 1, ["N", 3, 6, 5]))
    refused(load, model.SerializeToString(), "2 inputs")


def test_two_outputs(written, load):
    nodes = [node("Flatten", "x", "y"), node("Relu", "y", "z")]
    refused(load, written(nodes, {}, outputs=("y", "z")), "2 outputs")


def test_what_onnxruntime_contradicts(written, load, monkeypatch):
    """A wrong conversion is found by the comparison."""
    monkeypatch.setitem(operators._OPERATORS, "Relu", lambda call: call.call(torch.abs, call.operand(0)))
    refused(load, written(NODES, ARRAYS), "not compute what onnxruntime does")


def test_what_onnxruntime_cannot_run(written, load, capfd):
    arrays = {"w": ARRAYS["w"].astype(np.float64)}
    data = written([node("Conv", "x w", "h"), *HEAD], arrays, element=onnx.TensorProto.DOUBLE)
    refused(load, data, "onnxruntime cannot run")
    assert capfd.readouterr() == ("", "")


def test_names_that_are_no_text(good, load):
    refused(load, good.replace(b"conv", b"\xff\xfe\xfd\xba"), "no text", ArtifactError)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_weights_that_are_no_numbers(good, load, value):
    """Nothing but the one error, and no warning on the way to it."""

    def change(graph):
        graph.initializer[0].raw_data = np.full_like(ARRAYS["w"], value).tobytes()

    outcome(load, changed(good, change))


def test_a_goodnet_is_not_scanned(good, load):
    model = onnx.load_model_from_string(good)
    model.metadata_props.add(key="backdoorscan.goodnet", value="{}")
    error = refused(load, model.SerializeToString(), "is a GoodNet")
    assert "evaluate" in error.hint


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated(good, load, part):
    cut = good[: int(len(good) * part)]
    refused(load, cut, "not a readable ONNX file", ArtifactError)
    assert is_onnx(cut)


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"\x08\x07", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04abc", b"\x80\x02.", b"{}", bytes(range(256))]
)
def test_what_is_no_onnx_file(data):
    assert not is_onnx(data)


def test_recognised_by_content(good, artifact):
    assert Onnx().accepts(artifact(good, "model.h5"))


def outcome(load, data):
    try:
        loaded = load(data)
    except BackdoorscanError as error:
        assert error.what
        return False
    assert loaded.num_classes and loaded.num_classes > 0
    return True


def test_flipped_bytes(good, load, monkeypatch):
    """Whatever is damaged, the answer is a model or one clear error, of the reader and not of the sandbox."""
    monkeypatch.setattr(sandbox, "available", lambda: False)
    rng = np.random.default_rng(0)
    spans = [(good.find(array.tobytes()), array.nbytes) for array in ARRAYS.values()]
    frame = [i for i in range(len(good)) if not any(start <= i < start + size for start, size in spans)]
    results = set()
    for number in range(400):
        broken = bytearray(good)
        # Half of them where the graph is, half anywhere.
        for position in rng.choice(frame, 2) if number % 2 else rng.integers(0, len(good), 4):
            broken[position] = rng.integers(0, 256)
        results.add(outcome(load, bytes(broken)))
    assert results == {True, False}


NUMBERS = [-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 16, 10**6, 2**31, 2**40, 2**63 - 1]
OPS = [
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Expand", "Flatten",
    "Gather", "Gemm", "Identity", "InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mod", "PRelu",
    "Pad", "Pow", "Range", "ReduceMean", "Reshape", "Resize", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze", "Where",
]  # fmt: skip


def test_graphs_that_make_no_sense(good, load, monkeypatch):
    """Well-formed messages with settings, shapes, operators and wires exchanged."""
    monkeypatch.setattr(sandbox, "available", lambda: False)
    rng = np.random.default_rng(1)
    results = set()
    for _ in range(600):
        model = onnx.load_model_from_string(good)
        graph = model.graph
        for _ in range(rng.integers(1, 4)):
            target = graph.node[rng.integers(len(graph.node))]
            match rng.integers(6):
                case 0:
                    target.op_type = str(rng.choice(OPS))
                case 1 if target.attribute:
                    setting = target.attribute[rng.integers(len(target.attribute))]
                    if setting.ints:
                        setting.ints[rng.integers(len(setting.ints))] = NUMBERS[rng.integers(len(NUMBERS))]
                    setting.i = NUMBERS[rng.integers(len(NUMBERS))]
                case 2 if target.input:
                    names = [*(n.output[0] for n in graph.node), *(t.name for t in graph.initializer), "x", ""]
                    target.input[rng.integers(len(target.input))] = str(rng.choice(names))
                case 3:
                    tensor = graph.initializer[rng.integers(len(graph.initializer))]
                    tensor.dims[rng.integers(len(tensor.dims))] = NUMBERS[rng.integers(len(NUMBERS))]
                case 4:
                    values = [NUMBERS[i] for i in rng.integers(0, len(NUMBERS), 2)]
                    graph.initializer[2].raw_data = np.array(values, np.int64).tobytes()
                case _:
                    model.opset_import[0].version = int(rng.integers(5, 26))
        results.add(outcome(load, model.SerializeToString()))
    assert results == {True, False}
