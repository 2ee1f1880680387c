"""What is between the operators: layers put together, shared, named; layouts, sizes, batches; constants folded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import fx, nn

from backdoorscan import graph
from backdoorscan.errors import UnsupportedModelError, UsageError
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.ops.gates import suspects

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


HEAD = [node("GlobalAveragePool", "h", "p"), node("Flatten", "p", "y")]


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1)])
def test_a_bias_added_behind_belongs_to_the_convolution(written, same, shape):
    nodes = [node("Conv", "x w", "c", "first"), node("Add", "b c", "a"), node("Relu", "a", "h"), *HEAD]
    loaded = same(written(nodes, {"w": normal(4, 3, 3, 3), "b": normal(*shape)}))
    assert loaded.network.first.bias.shape == (4,)
    assert not [n for n in loaded.network.graph.nodes if n.target is torch.add]


def test_a_bias_added_behind_a_turn_belongs_to_the_convolution(written, same):
    nodes = [
        node("Conv", "x w", "c", "first"),
        node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
        node("Cast", "t", "i", to=1),
        node("Add", "i b", "a"),
        node("Transpose", "a", "h", perm=[0, 3, 1, 2]),
        *HEAD,
    ]
    loaded = same(written(nodes, {"w": normal(4, 3, 3, 3), "b": normal(4)}))
    assert loaded.network.first.bias.shape == (4,)
    assert not [n for n in loaded.network.graph.nodes if n.target in (torch.add, torch.permute)]


@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (1,), (6, 4, 1, 1)])
def test_an_addition_that_is_no_bias_stays(written, load, shape):
    nodes = [node("Conv", "x w", "c", "first"), node("Add", "c b", "h"), *HEAD]
    data = written(nodes, {"w": normal(4, 3, 3, 3), "b": normal(*shape)})
    if shape[0] == 6:
        with pytest.raises(UnsupportedModelError):
            load(data)
    else:
        assert load(data).network.first.bias is None


def test_an_addition_that_something_else_looks_behind_stays(written, same):
    nodes = [node("Conv", "x w", "c", "first"), node("Add", "c b", "a"), node("Mul", "a c", "h"), *HEAD]
    loaded = same(written(nodes, {"w": normal(4, 3, 3, 3), "b": normal(4, 1, 1)}))
    assert loaded.network.first.bias is None


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("bias", [(4,), (1, 4), None])
def test_dense_layers(written, same, turned, bias):
    arrays = {"w": normal(4, 90) if turned else normal(90, 4)} | ({"b": normal(*bias)} if bias else {})
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w b" if bias else "f w", "y", "dense", transB=turned)]
    loaded = same(written(nodes, arrays))
    assert isinstance(loaded.network.dense, nn.Linear) and (loaded.network.dense.bias is not None) == bool(bias)


def test_gemm_with_factors(written, same):
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w b", "y", alpha=0.5, beta=2.0)]
    same(written(nodes, {"w": normal(90, 4), "b": normal(4)}))


def test_matmul_and_add_make_a_dense_layer(written, same):
    nodes = [node("Flatten", "x", "f"), node("MatMul", "f w", "m", "dense"), node("Add", "m b", "y")]
    loaded = same(written(nodes, {"w": normal(90, 4), "b": normal(1, 4)}))
    assert loaded.network.dense.bias.shape == (4,)


def test_shared_arrays_are_shared_layers(written, same):
    nodes = [
        node("Conv", "x w b", "c1", "one", pads=[1, 1, 1, 1]),
        node("Identity", "w", "w2"),
        node("Conv", "c1 w2 b", "c2", "two", pads=[1, 1, 1, 1]),
        node("Conv", "c2 w b", "h", "three", strides=[2, 2]),
        *HEAD,
    ]
    loaded = same(written(nodes, {"w": normal(3, 3, 3, 3), "b": normal(3)}))
    assert [n.target for n in loaded.network.graph.nodes if n.op == "call_module"] == ["one", "one", "three"]
    assert loaded.network.one.weight is loaded.network.three.weight
    assert len(list(loaded.network.parameters())) == 2


def test_names_are_identifiers(written, same):
    nodes = [
        node("Conv", "x model.0.weight", "c", "a", pads=[1, 1, 1, 1]),
        node("Conv", "c second", "d", "class", pads=[1, 1, 1, 1]),
        node("Conv", "d third", "e", "forward", pads=[1, 1, 1, 1]),
        node("Conv", "e fourth", "f", "import os; x/Conv", pads=[1, 1, 1, 1]),
        node("Conv", "f 7.weight", "g", "b", pads=[1, 1, 1, 1]),
        node("Conv", "g 7_weight", "h", "c", pads=[1, 1, 1, 1]),
        *HEAD,
    ]
    names = ("model.0.weight", "second", "third", "fourth", "7.weight", "7_weight")
    loaded = same(written(nodes, {name: 0.3 * normal(3, 3, 3, 3) for name in names}))
    assert graph.conv_names(loaded.network) == [
        "model_0", "layer_class", "layer_forward", "import_os_x", "layer_7", "layer_7_2",
    ]  # fmt: skip


def test_shape_arithmetic_is_folded(written, same):
    """As old exporters write `x.view(x.size(0), -1)`."""
    nodes = [
        node("Shape", "x", "s"),
        node("Constant", "", "zero", value=helper.make_tensor("v", onnx.TensorProto.INT64, [], [0])),
        node("Gather", "s zero", "n"),
        node("Unsqueeze", "n", "n1", axes=[0]),
        node("Constant", "", "rest", value=helper.make_tensor("v", onnx.TensorProto.INT64, [1], [-1])),
        node("Concat", "n1 rest", "target", axis=0),
        node("Reshape", "x target", "f"),
        node("MatMul", "f w", "y", "dense"),
    ]
    loaded = same(written(nodes, {"w": normal(90, 4)}, opset=11))
    assert [n.op for n in loaded.network.graph.nodes] == ["placeholder", "call_function", "call_module", "output"]


@pytest.mark.parametrize("how", ["expand", "tile", "fill", "fixed"])
def test_a_token_for_every_image(written, same, how):
    shape = [] if how == "fixed" else [node("Shape", "x", "s"), node("Slice", "s zero one", "n")]
    token = {
        "expand": [node("Concat", "n ones", "t", axis=0), node("Expand", "token t", "all")],
        "tile": [node("Concat", "n ones", "t", axis=0), node("Tile", "token t", "all")],
        "fill": [node("Concat", "n three", "t", axis=0), node("ConstantOfShape", "t", "all")],
        "fixed": [node("Identity", "token", "all")],
    }[how]
    nodes = [*shape, *token, node("Concat", "x all", "c", axis=1), node("ReduceMax", "c", "y", axes=[3], keepdims=0)]
    nodes[-1:] = [node("Mul", "c scale", "z"), node("Flatten", "z", "y")]
    arrays = {
        "token": normal(1, 1, 6, 5), "zero": np.array([0]), "one": np.array([1]), "ones": np.array([1, 1, 1]),
        "three": np.array([1, 6, 5]), "scale": normal(4, 6, 5),
    }  # fmt: skip
    loaded = same(written(nodes, arrays, (1 if how == "fixed" else "N", 3, 6, 5)))
    assert isinstance(loaded.network.scale, nn.Parameter)


def test_channels_last_by_a_transpose(written, same):
    nodes = [
        node("Mul", "x k", "m"),
        node("Transpose", "m", "t", perm=[0, 3, 1, 2]),
        node("Conv", "t w", "c", "conv"),
        node("Transpose", "c", "l", perm=[0, 2, 3, 1]),
        node("Relu", "l", "r"),
        node("Flatten", "r", "y"),
    ]
    loaded = same(written(nodes, {"w": normal(4, 5, 3, 3), "k": np.float32(0.5)}, ("N", 7, 6, 5)))
    assert loaded.layout == "NHWC" and loaded.input_shape == (5, 7, 6)


def test_channels_last_by_the_size(written, same):
    nodes = [
        node("Reshape", "x t", "r"),
        node("Conv", "r w", "c"),
        node("Flatten", "c", "y"),
    ]
    loaded = same(written(nodes, {"w": normal(4, 1, 3, 3), "t": np.array([-1, 1, 7, 6])}, ("N", 7, 6, 1)))
    assert loaded.layout == "NHWC" and loaded.input_shape == (1, 7, 6)


@pytest.mark.parametrize("shape", [("N", 6, 5), ("N", 30)])
def test_inputs_that_are_no_colour_images(written, same, shape):
    nodes = [node("Flatten", "x", "f"), node("MatMul", "f w", "y")]
    loaded = same(written(nodes, {"w": normal(30, 4)}, shape))
    assert loaded.input_shape == shape[1:] and loaded.layout == "NCHW"


def test_any_size(written, same):
    loaded = same(
        written([node("Conv", "x w", "h"), *HEAD], {"w": normal(4, 3, 3, 3)}, ("N", 3, "H", "W")), size=(3, 19, 23)
    )
    assert loaded.input_shape == (3, None, None)


def test_a_size_that_only_the_layers_tell(written, same):
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "f"), node("MatMul", "f v", "y")]
    data = written(nodes, {"w": normal(2, 1, 3, 3), "v": normal(2 * 26 * 26, 4)}, ("N", "C", "H", "W"))
    assert same(data, size=(1, 28, 28)).input_shape == (1, 28, 28)


def test_a_size_that_the_graph_computes_with(written, load):
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s two", "height"),
        node("Cast", "height", "scale", to=1),
        node("Div", "x scale", "h"),
        *HEAD,
    ]
    with pytest.raises(UnsupportedModelError, match="open and computes"):
        load(written(nodes, {"two": np.array(2)}, ("N", 3, "H", "W")))


def test_images_of_whole_numbers(written, load, run, answer):
    nodes = [node("Cast", "x", "c", to=1), node("Conv", "c w", "h"), *HEAD]
    data = written(nodes, {"w": normal(4, 3, 3, 3)}, element=onnx.TensorProto.UINT8)
    x = RNG.integers(0, 256, (2, 3, 6, 5)).astype(np.uint8)
    np.testing.assert_allclose(answer(load(data), x), run(data, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "element, kind", [(onnx.TensorProto.FLOAT16, np.float16), (onnx.TensorProto.DOUBLE, np.float64)]
)
def test_other_precisions(written, load, run, answer, element, kind):
    nodes = [node("Flatten", "x", "f"), node("Gemm", "f w", "y")]
    data = written(nodes, {"w": normal(90, 4).astype(kind)}, element=element)
    x = RNG.random((2, 3, 6, 5)).astype(kind)
    loaded = load(data)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.network.state_dict().values())
    np.testing.assert_allclose(answer(loaded, x), run(data, x), rtol=0.02, atol=0.02)


def test_the_old_form_lists_its_arrays_as_inputs(written, same):
    same(written([node("Conv", "x w", "h"), *HEAD], {"w": normal(4, 3, 3, 3)}, opset=7, ir_version=3))


def test_nodes_in_any_order_and_dead_ones(written, load):
    nodes = [
        *reversed([node("Conv", "x w", "h"), *HEAD]),
        node("NonMaxSuppression", "x", "unused"),
    ]
    assert load(written(nodes, {"w": normal(4, 3, 3, 3)})).num_classes == 4


def test_a_label_beside_the_scores(written, load):
    nodes = [node("Conv", "x w", "h"), *HEAD, node("ArgMax", "y", "label", axis=1)]
    data = written(nodes, {"w": normal(4, 3, 3, 3)}, outputs=("label", "y"))
    assert load(data).num_classes == 4


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_a_final_activation_can_be_taken_off(written, same, ending):
    nodes = [node("Conv", "x w", "h"), node("GlobalAveragePool", "h", "p"), node("Flatten", "p", "f")]
    nodes += [node(ending, "f", "s"), node("Identity", "s", "y")]
    loaded = same(written(nodes, {"w": normal(4, 3, 3, 3)}))
    assert graph.strip_final_activation(loaded.network) == ("sigmoid" if ending == "Sigmoid" else "softmax")
    assert graph.output_node(loaded.network).op == "call_function"


def test_scores_with_axes_of_one(written, same):
    nodes = [node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "p"), node("Softmax", "p", "y", axis=1)]
    loaded = same(written(nodes, {"w": normal(4, 3, 3, 3)}))
    assert loaded.num_classes == 4 and graph.strip_final_activation(loaded.network) == "softmax"


def test_decisions_by_the_image_are_told(written, same):
    """The shape of an architectural backdoor: the scores are exchanged where the image has a mark."""
    nodes = [
        node("Conv", "x w", "h"),
        node("GlobalAveragePool", "h", "p"),
        node("Flatten", "p", "clean"),
        node("ReduceMax", "x", "top", axes=[1, 2, 3], keepdims=0),
        node("Unsqueeze", "top", "mark", axes=[1]),
        node("Greater", "mark limit", "hit", "gate"),
        node("Where", "hit target clean", "y", "choose"),
    ]
    arrays = {"w": normal(4, 3, 3, 3), "limit": np.float32(2.5), "target": np.float32([[9, 0, 0, 0]])}
    network = same(written(nodes, arrays, opset=11)).network
    assert [decision.meta["source"] for decision in suspects(network).decisions] == ["Greater 'gate'"]
    assert [n.meta["source"] for n in network.graph.nodes if n.target is torch.where] == ["Where 'choose'"]


def test_the_graph_can_be_cut_and_copied(export, load):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3)).eval()
    network = load(export(model, batch=1)).network
    conv = graph.last_conv_node(network)
    front, rest = graph.split(network, conv)
    x = torch.randn(2, 3, 32, 32)
    assert isinstance(network, fx.GraphModule)
    assert torch.allclose(rest(*front(x)), model(x), atol=1e-5)
    path = graph.channel_path(network, conv, x[:1])
    assert len(path) == 2


def test_arch_is_refused(written, artifact):
    data = written([node("Conv", "x w", "h"), *HEAD], {"w": normal(4, 3, 3, 3)})
    with pytest.raises(UsageError, match="own architecture"):
        Onnx().load(artifact(data), "net.py:Net")
