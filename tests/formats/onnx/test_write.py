"""A repaired tensor goes back into a copy of the file; nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from backdoorscan.errors import ArtifactError, OutputError
from backdoorscan.formats.onnx.loader import Onnx

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


@pytest.fixture
def data(written):
    """Every way in which a file keeps weights."""
    constant = numpy_helper.from_array(normal(6, 1, 2, 2))
    nodes = [
        node("Conv", "x conv.weight conv.bias", "a", "conv"),
        node("BatchNormalization", "a scale shift mean var", "b", "norm"),
        node("Constant", "", "held", value=constant),
        node("Conv", "b held", "c", "grouped", group=4),
        node("Add", "c channels", "d"),
        node("PRelu", "d slope", "e", "prelu"),
        node("Mul", "e factor", "f"),
        node("Flatten", "f", "g"),
        node("Reshape", "cube target", "matrix"),
        node("MatMul", "g matrix", "h", "hidden"),
        node("Add", "h hidden_bias", "i"),
        node("Gemm", "i last last_bias", "z", "head", transB=1),
        node("Softmax", "z", "y"),
    ]
    nodes[3] = node("Conv", "b held", "c", "grouped", group=6)
    arrays = {
        "conv.weight": normal(6, 3, 3, 2), "conv.bias": normal(6), "scale": normal(6), "shift": normal(6),
        "mean": normal(6), "var": np.abs(normal(6)) + 0.5, "channels": normal(1, 6, 1, 1), "slope": normal(6, 1, 1),
        "factor": normal(3, 3), "cube": normal(6, 9, 7), "target": np.array([54, 7]), "hidden_bias": normal(1, 7),
        "last": normal(4, 7), "last_bias": normal(4), "unused": normal(3),
    }  # fmt: skip
    return written(nodes, arrays)


KEYS = {
    "conv.weight": "conv.weight", "conv.bias": "conv.bias", "norm.weight": "scale", "norm.bias": "shift",
    "norm.running_mean": "mean", "norm.running_var": "var", "grouped.weight": "held", "grouped.bias": "channels",
    "prelu.weight": "slope", "factor": "factor", "hidden.weight": "cube", "hidden.bias": "hidden_bias",
    "head.weight": "last", "head.bias": "last_bias",
}  # fmt: skip


def contents(data):
    """All arrays of a file, and the rest of it."""
    model = onnx.load_model_from_string(data)
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    for held in (n for n in model.graph.node if n.op_type == "Constant"):
        arrays[held.output[0]] = numpy_helper.to_array(held.attribute[0].t).copy()
        held.attribute[0].t.raw_data = b""
    for tensor in model.graph.initializer:
        tensor.raw_data = b""
    return arrays, model.SerializeToString(deterministic=True)


def test_every_kind_of_weight(data, load, run, answer, artifact, tmp_path):
    weights = load(data).network.state_dict()
    assert set(KEYS) | {"norm.num_batches_tracked"} == set(weights)
    before, frame = contents(data)
    x = normal(2, 3, 6, 5)
    for key, stored in KEYS.items():
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed[key].view(-1)[::3] *= 0.5
        path = tmp_path / f"{key}.onnx"
        Onnx().write(artifact(data), changed, path)
        after, same_frame = contents(path.read_bytes())
        assert frame == same_frame
        assert [name for name in before if before[name].tobytes() != after[name].tobytes()] == [stored]
        again = load(path.read_bytes())
        for name, tensor in again.network.state_dict().items():
            assert torch.equal(tensor, changed[name]), name
        np.testing.assert_allclose(answer(again, x), run(path.read_bytes(), x), atol=1e-5)


def test_pruned_channels_in_onnxruntime(data, load, run, artifact, tmp_path):
    network = load(data).network
    weights = network.state_dict()
    for key in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
        weights[key][[1, 4]] = 0
    Onnx().write(artifact(data), weights, tmp_path / "out.onnx")
    x = normal(3, 3, 6, 5)
    network.load_state_dict(weights)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    written = (tmp_path / "out.onnx").read_bytes()
    np.testing.assert_allclose(run(written, x), expected, atol=1e-5)
    assert np.abs(run(data, x) - expected).max() > 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_nothing_changed_is_a_copy(data, load, artifact, tmp_path):
    Onnx().write(artifact(data), load(data).network.state_dict(), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == data


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_precisions_keep_their_digits(written, load, artifact, tmp_path, kind):
    kernel = RNG.normal(size=(90, 4)).astype(kind)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    data = written([node("Flatten", "x", "f"), node("MatMul", "f w", "y", "head")], {"w": kernel}, element=element)
    tensor = load(data).network.head.weight.detach().clone()
    tensor[2] = 0
    Onnx().write(artifact(data), {"head.weight": tensor}, tmp_path / "out.onnx")
    values = contents((tmp_path / "out.onnx").read_bytes())[0]["w"]
    assert values.dtype == kind and (values[:, 2] == 0).all()
    assert np.array_equal(np.delete(values, 2, 1), np.delete(kernel, 2, 1))


def test_values_that_the_type_cannot_hold(written, load, artifact, tmp_path):
    nodes = [node("Flatten", "x", "f"), node("MatMul", "f w", "y", "head")]
    data = written(nodes, {"w": normal(90, 4).astype(np.float16)}, element=onnx.TensorProto.FLOAT16)
    with pytest.raises(ArtifactError, match="float16"):
        Onnx().write(artifact(data), {"head.weight": torch.full((4, 90), 1e6)}, tmp_path / "out.onnx")


def test_what_two_layers_share_can_only_change_for_both(written, load, artifact, tmp_path):
    nodes = [
        node("Conv", "x w", "a", "one", pads=[1, 1, 1, 1]),
        node("Conv", "a w", "b", "two", strides=[2, 2]),
        node("Flatten", "b", "y"),
    ]
    data = written(nodes, {"w": normal(3, 3, 3, 3)})
    weights = load(data).network.state_dict()
    changed = {"one.weight": weights["one.weight"] * 2, "two.weight": weights["two.weight"]}
    with pytest.raises(ArtifactError, match="together"):
        Onnx().write(artifact(data), changed, tmp_path / "out.onnx")
    changed["two.weight"] = changed["one.weight"]
    Onnx().write(artifact(data), changed, tmp_path / "out.onnx")
    assert torch.equal(load((tmp_path / "out.onnx").read_bytes()).network.two.weight, changed["one.weight"])


@pytest.mark.parametrize(
    "weights, match",
    [
        ({"head.weight": torch.zeros(2, 4)}, "shape"),
        ({"nothing.weight": torch.zeros(2)}, "no tensor"),
        ({"norm.num_batches_tracked": torch.tensor(3)}, "cannot be changed"),
    ],
)
def test_what_the_file_cannot_hold(data, artifact, tmp_path, weights, match):
    with pytest.raises(ArtifactError, match=match):
        Onnx().write(artifact(data), weights, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(data, load, artifact, tmp_path):
    with pytest.raises(OutputError):
        Onnx().write(artifact(data), load(data).network.state_dict(), tmp_path / "none" / "out.onnx")
