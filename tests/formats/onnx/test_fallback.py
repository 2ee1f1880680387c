"""A foreign converter for operators that this reader lacks: a made-up one here, which knows ``Acos``."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

from backdoorscan.errors import UnsupportedModelError
from backdoorscan.formats.onnx import fallback
from backdoorscan.formats.onnx.loader import Onnx
from backdoorscan.formats.onnx.reference import Excerpt, renamed
from backdoorscan.formats.weights import zoo

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32) / 100
HEAD = RNG.normal(size=(4, 5)).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


@pytest.fixture
def data(written):
    def make(name="conv", layout="NCHW", **options):
        first = [node("Transpose", "x", "t", perm=[0, 3, 1, 2])] if layout == "NHWC" else []
        nodes = [
            *first,
            node("Conv", "t k" if first else "x k", "c", name),
            node("Acos", "c", "a", "odd"),
            node("GlobalAveragePool", "a", "p"),
            node("Flatten", "p", "f"),
            node("Gemm", "f w", "z", "head"),
            node("Softmax", "z", "y", axis=1),
        ]
        shape = ("N", 6, 5, 3) if first else ("N", 3, 6, 5)
        return written(nodes, {"k": KERNEL, "w": HEAD}, options.get("shape", shape))

    return make


class Odd(nn.Module):
    def forward(self, x):
        return torch.acos(x)


class Turned(nn.Module):
    def forward(self, x):
        return x.permute(0, 3, 1, 2)


def converted(model, factor=1.0):
    """As onnx2torch does it: one module for every node, named as the node."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    root, graph = nn.Module(), fx.Graph()
    value = graph.placeholder("input_1")
    for item in model.graph.node:
        weight = torch.tensor(arrays[item.input[1]]) if len(item.input) > 1 else None
        module = {
            "Transpose": Turned, "Conv": lambda: nn.Conv2d(3, 4, 3, bias=False), "Acos": Odd, "Flatten": nn.Flatten,
            "GlobalAveragePool": lambda: nn.AdaptiveAvgPool2d(1), "Gemm": lambda: nn.Linear(4, 5, bias=False),
            "Softmax": lambda: nn.Softmax(1),
        }[item.op_type]()  # fmt: skip
        if weight is not None:
            module.weight = nn.Parameter((weight.T.contiguous() if item.op_type == "Gemm" else weight) * factor)
        root.add_module(item.name, module)
        value = graph.call_module(item.name, (value,))
    graph.output(value)
    return fx.GraphModule(root, graph)


@pytest.fixture
def converter(monkeypatch):
    """Installs a converter in the place of onnx2torch."""

    def install(convert=converted):
        module = ModuleType("onnx2torch")
        module.convert = convert  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "onnx2torch", module)
        monkeypatch.setattr(fallback, "installed", lambda: "onnx2torch 0")
        monkeypatch.setattr(zoo, "import_torchvision", lambda: None)

    return install


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_it_reads_what_this_reader_lacks(data, load, converter, run, answer, layout):
    converter()
    file = data(layout=layout)
    loaded = load(file)
    assert loaded.details["converted_by"] == "onnx2torch 0" and loaded.num_classes == 5
    assert loaded.layout == layout and loaded.input_shape == (3, 6, 5)
    assert not [module for module in loaded.network.modules() if isinstance(module, Odd | Turned)]
    x = RNG.normal(size=(4, *((3, 6, 5) if layout == "NCHW" else (6, 5, 3)))).astype(np.float32)
    np.testing.assert_allclose(answer(loaded, x), run(file, x), atol=1e-5)


def test_it_is_not_asked_where_it_is_not_needed_or_not_there(data, load, written, converter, monkeypatch):
    monkeypatch.setattr(fallback, "installed", lambda: None)
    with pytest.raises(UnsupportedModelError, match="Acos 'odd'"):
        load(data())
    converter(lambda model: pytest.fail("not needed"))
    assert "converted_by" not in load(written([node("Flatten", "x", "y")], {})).details


def fails(model):
    raise NotImplementedError("Converter is not implemented")


@pytest.mark.parametrize(
    "convert", [fails, lambda model: converted(model, 1.01), lambda model: nn.Flatten(), lambda model: None]
)
def test_what_it_cannot_do_or_does_wrong(data, load, converter, convert):
    converter(convert)
    with pytest.raises(UnsupportedModelError, match="Acos 'odd'"):
        load(data())


def test_open_sizes_and_control_flow_are_not_given_to_it(data, load, written, converter):
    converter(lambda model: pytest.fail("given"))
    with pytest.raises(UnsupportedModelError):
        load(data(shape=("N", 3, "height", "width")))
    body = helper.make_graph([node("Acos", "x", "out")], "b", [], [helper.make_tensor_value_info("out", 1, None)])
    arrays = {"yes": np.array(True)}
    with pytest.raises(UnsupportedModelError):
        load(written([node("If", "yes", "h", then_branch=body, else_branch=body), node("Flatten", "h", "y")], arrays))


def test_a_changed_tensor_is_written_back(data, load, converter, artifact, tmp_path, run, answer):
    converter()
    weights = {name: tensor.clone() for name, tensor in load(data()).network.state_dict().items()}
    assert set(weights) == {"conv.weight", "head.weight"}
    for tensor in weights.values():
        tensor[1] = 0
    Onnx().write(artifact(data()), weights, tmp_path / "out.onnx")
    copy = (tmp_path / "out.onnx").read_bytes()
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(copy).graph.initializer}
    assert not arrays["k"][1].any() and not arrays["w"][:, 1].any() and arrays["k"][0].any()
    x = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
    np.testing.assert_allclose(answer(load(copy), x), run(copy, x), atol=1e-5)


@pytest.mark.parametrize("name", ['x")); open("/tmp/ran") or (("', "1", "class", "a.b/c", "", "ü", "conv\n"])
def test_names_are_identifiers_before_a_program_is_made_of_them(data, name):
    model = onnx.load_model_from_string(renamed(data(name), {}, Excerpt(list("capfzy"), ["k", "w"], "x", ["y"])))
    names = [text for n in model.graph.node for text in (n.name, *n.input, *n.output)]
    assert all(text.isidentifier() and text.isascii() for text in names)
    assert len({n.name for n in model.graph.node}) == 6
    assert model.graph.node[-1].output[0] == model.graph.output[0].name
    assert {t.name for t in model.graph.initializer} < {text for n in model.graph.node for text in n.input}


@pytest.mark.skipif(importlib.util.find_spec("onnx2torch") is None, reason="onnx2torch is not installed")
def test_the_real_converter(data, load, run, answer):
    loaded = load(data())
    assert loaded.details["converted_by"].startswith("onnx2torch")
    x = RNG.normal(size=(4, 3, 6, 5)).astype(np.float32)
    np.testing.assert_allclose(answer(loaded, x), run(data(), x), atol=1e-5)
