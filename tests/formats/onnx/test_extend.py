"""Networks that learned one class more go into a copy of their file, which onnxruntime runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from backdoorscan.comparing import Network
from backdoorscan.errors import ArtifactError, UnsupportedModelError
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.goodnet import RejectingNet
from backdoorscan.ops.rejecting import grow_head

RNG = np.random.default_rng(0)
SHAPE = (3, 6, 5)
FLATTEN = helper.make_node("Flatten", ["x"], ["f"])


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def dense():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten(),
                         nn.Softmax(1))  # fmt: skip


def heads(network):
    """Names of the weight and bias of the last layer."""
    last = [name.removesuffix(".weight") for name in network.state_dict() if name.endswith(".weight")][-1]
    return f"{last}.weight", f"{last}.bias"


def grown(network, names=None):
    """The tensors with one class more, and all others changed a little."""
    names = names or heads(network)
    tensors = {name: t * 1.5 if t.is_floating_point() else t.clone() for name, t in network.state_dict().items()}
    for name in names:
        row = torch.randn((1, *tensors[name].shape[1:]), generator=torch.Generator().manual_seed(0))
        tensors[name] = torch.cat([tensors[name], row])
    return tensors


def declared(data):
    graph = onnx.load_model_from_string(data).graph
    entries = (*graph.input, *graph.output, *graph.value_info)
    return {e.name: [d.dim_param or d.dim_value for d in e.type.tensor_type.shape.dim] for e in entries}


@pytest.mark.parametrize("options", [{}, {"batch": 5}, {"dynamo": True}], ids=str)
@pytest.mark.parametrize("make", [dense, convolutional])
def test_onnxruntime_runs_it_and_agrees(export, load, run, answer, artifact, tmp_path, make, options):
    data = export(make().eval(), SHAPE, **options)
    network = load(data).network
    tensors = grown(network)
    for name in ("out.onnx", "twin.onnx"):
        Onnx().write_extended(artifact(data), tensors, tmp_path / name)
    written = (tmp_path / "out.onnx").read_bytes()
    assert written == (tmp_path / "twin.onnx").read_bytes()
    model = onnx.load_model_from_string(written)
    onnx.checker.check_model(model, full_check=True)

    again = load(written)
    assert again.num_classes == 6
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.network.state_dict().items())
    # As many images as classes: only the axis of the classes may grow.
    batch = options.get("batch", 2)
    assert declared(written)["scores"] == [batch if "batch" in options else "batch", 6]
    x = normal(batch, *SHAPE)
    result = run(written, x, "image")
    assert result.shape == (batch, 6)
    np.testing.assert_allclose(answer(again, x), result, atol=1e-5)


def test_only_what_must_differ_differs(written, load, artifact, run, tmp_path):
    """Initialisers that are inputs too, a bias with more axes, declared shapes; what training changed not at all."""
    nodes = [
        FLATTEN,
        helper.make_node("MatMul", ["f", "w"], ["m"], "head"),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Softmax", ["s"], ["y"]),
    ]
    data = written(nodes, {"w": normal(90, 4), "b": normal(1, 4), "unused": normal(4)}, ir_version=3)
    model = onnx.load_model_from_string(data)
    model.graph.value_info.append(helper.make_tensor_value_info("f", 1, ["N", 90]))
    model.graph.value_info.append(helper.make_tensor_value_info("s", 1, ["N", 4]))
    data = model.SerializeToString()
    tensors = load(data).network.state_dict()
    for name in ("head.weight", "head.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    Onnx().write_extended(artifact(data), tensors, tmp_path / "out.onnx")
    after = onnx.load_model_from_string((tmp_path / "out.onnx").read_bytes())
    np.testing.assert_array_equal(run(after.SerializeToString(), x := normal(2, *SHAPE))[:, 0:1],
                                  run(after.SerializeToString(), x)[:, 4:5])  # fmt: skip
    was, now = declared(data), declared(after.SerializeToString())
    assert {name for name in was if was[name] != now[name]} == {"w", "b", "s"}
    assert (now["w"], now["b"], now["s"], now["f"]) == ([90, 5], [1, 5], ["N", 5], ["N", 90])
    for old, new in zip(model.graph.initializer, after.graph.initializer, strict=True):
        values = numpy_helper.to_array(new)
        np.testing.assert_array_equal(values[..., :4], numpy_helper.to_array(old))
        assert values.shape[-1] == (4 if old.name == "unused" else 5)
    for part in (model, after):
        for field in ("input", "initializer", "value_info"):
            part.graph.ClearField(field)
    assert model == after


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_precisions_keep_their_digits(written, load, artifact, tmp_path, kind):
    kernel = RNG.normal(size=(4, 90)).astype(kind)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    gemm = helper.make_node("Gemm", ["f", "w", "b"], ["y"], "head", transB=1)
    data = written([FLATTEN, gemm], {"w": kernel, "b": np.zeros(4, kind)}, element=element)
    tensors = grown(load(data).network)
    tensors["head.weight"][1:4] = load(data).network.state_dict()["head.weight"][1:4]
    Onnx().write_extended(artifact(data), tensors, tmp_path / "out.onnx")
    (values,) = (numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer if t.name == "w")
    assert values.dtype == kind and values.shape == (5, 90)
    assert np.array_equal(values[1:4], kernel[1:4]) and not np.array_equal(values[0], kernel[0])


def refused(artifact, data, tensors, match, tmp_path):
    with pytest.raises(UnsupportedModelError, match="one class more") as caught:
        Onnx().write_extended(artifact(data), tensors, tmp_path / "out.onnx")
    assert match in caught.value.why and caught.value.hint
    assert not list(tmp_path.iterdir())


def test_what_stands_behind_the_head_may_forbid_it(written, load, artifact, tmp_path):
    gemm = helper.make_node("Gemm", ["f", "w", "b"], ["s"], "head", transB=1)
    scale = helper.make_node("Mul", ["s", "temperature"], ["y"])
    data = written([FLATTEN, gemm, scale], {"w": normal(4, 90), "b": normal(4), "temperature": normal(4)})
    network = load(data).network
    refused(artifact, data, grown(network, ("head.weight", "head.bias")), "behind the head", tmp_path)


def test_an_output_whose_shape_nothing_tells(written, load, run, artifact, tmp_path):
    """It is written where the file declares none, and never with one that is wrong."""
    nodes = [FLATTEN, helper.make_node("Gemm", ["f", "w", "b"], ["s"], "head", transB=1),
             helper.make_node("Neg", ["t"], ["target"]),
             helper.make_node("Reshape", ["s", "target"], ["y"])]  # fmt: skip
    data = written(nodes, {"w": normal(4, 90), "b": normal(4), "t": np.array([0, 1])})
    model = onnx.load_model_from_string(data)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["N", 4]))
    declaring = model.SerializeToString()
    tensors = grown(load(data).network, ("head.weight", "head.bias"))
    refused(artifact, declaring, tensors, "'y' cannot be told", tmp_path)
    Onnx().write_extended(artifact(data), tensors, tmp_path / "out.onnx")
    assert run((tmp_path / "out.onnx").read_bytes(), normal(2, *SHAPE)).shape == (2, 5)


def test_arrays_beside_the_file_move_into_it(export, load, run, artifact, tmp_path):
    data = export(dense().eval(), SHAPE)
    onnx.save_model(
        onnx.load_model_from_string(data),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    loaded = load_model(tmp_path / "m.onnx", None, ReadOptions(input_range=(0, 1)))
    tensors = grown(load(data).network)
    Onnx().write_extended(loaded.artifact, tensors, tmp_path / "out.onnx")
    again = load((tmp_path / "out.onnx").read_bytes()).network.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.items())


def test_arrays_that_others_use_too(written, load, artifact, tmp_path):
    gemm = helper.make_node("Gemm", ["f", "w", "b"], ["y"], "head", transB=1)
    arrays = {"w": normal(4, 90), "b": normal(4)}
    data = written([FLATTEN, gemm, helper.make_node("Neg", ["b"], ["nowhere"])], arrays)
    refused(artifact, data, grown(load(data).network), "'b' is used in 2 places", tmp_path)

    twice = [FLATTEN, helper.make_node("Gemm", ["f", "w", "b"], ["m"], "first", transB=1),
             helper.make_node("Gemm", ["m", "v", "b"], ["y"], "head", transB=1)]  # fmt: skip
    data = written(twice, {**arrays, "v": normal(4, 4)})
    refused(artifact, data, grown(load(data).network, ("head.weight", "head.bias")), "another tensor", tmp_path)


def test_what_is_no_head(written, load, artifact, tmp_path):
    data = written([FLATTEN, helper.make_node("MatMul", ["f", "w"], ["y"], "head")], {"w": normal(90, 4)})
    tensors = load(data).network.state_dict()
    refused(artifact, data, tensors, "0 layers", tmp_path)
    more = torch.cat([tensors["head.weight"], tensors["head.weight"][:1]])
    refused(artifact, data, {"head.weight": more, "head.bias": torch.zeros(5)}, "head.bias", tmp_path)

    data = written([FLATTEN, helper.make_node("Mul", ["w", "two"], ["d"]),
                    helper.make_node("Gemm", ["f", "d", "b"], ["y"], "head")],
                   {"w": normal(90, 4), "two": np.float32([2]), "b": normal(4)})  # fmt: skip
    refused(artifact, data, grown(load(data).network), "computes 'head.weight'", tmp_path)


def test_numbers_that_are_none_and_those_too_large(written, load, artifact, tmp_path):
    data = written([FLATTEN, helper.make_node("Gemm", ["f", "w", "b"], ["y"], "head")],
                   {"w": normal(90, 4), "b": normal(4)})  # fmt: skip
    tensors = grown(load(data).network)
    tensors["head.bias"] = torch.full((5,), torch.nan)
    Onnx().write_extended(artifact(data), tensors, tmp_path / "nan.onnx")
    half = written([FLATTEN, helper.make_node("Gemm", ["f", "w", "b"], ["y"], "head")],
                   {"w": normal(90, 4).astype(np.float16), "b": normal(4).astype(np.float16)}, element=10)  # fmt: skip
    tensors["head.bias"] = torch.full((5,), 1e6)
    with pytest.raises(ArtifactError, match="float16"):
        Onnx().write_extended(artifact(half), tensors, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.onnx"]


def test_a_repair_that_rejects_is_written(export, run, tmp_path):
    source = tmp_path / "m.onnx"
    source.write_bytes(export(convolutional().eval(), SHAPE))
    before = source.read_bytes()
    loaded = load_model(source, None, ReadOptions(input_range=(0, 1)))
    network = Network("m_retrained.goodnet.onnx", RejectingNet(grow_head(loaded.classifier)[0]))
    assert network.write(loaded, tmp_path) == (["m_retrained.goodnet.onnx", "m_retrained.onnx"], "")
    assert source.read_bytes() == before
    x = RNG.random((3, *SHAPE), "float32")
    with torch.no_grad():
        expected = network.network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run((tmp_path / "m_retrained.onnx").read_bytes(), x, "image"), expected, atol=1e-5)
