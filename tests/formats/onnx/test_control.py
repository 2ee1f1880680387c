"""``If`` in files: both branches are read, and every image gets what onnxruntime gives it alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from backdoorscan.errors import UnsupportedModelError

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def node(op, inputs, outputs, name="", **settings):
    return helper.make_node(op, inputs.split(), outputs.split(), name, **settings)


def branch(nodes, output, arrays=None):
    tensors = [numpy_helper.from_array(array, name) for name, array in (arrays or {}).items()]
    result = helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "part", [], [result], tensors)


HEAD = [
    node("Conv", "x w", "c", "conv"),
    node("Relu", "c", "r"),
    node("GlobalAveragePool", "r", "p"),
    node("Flatten", "p", "clean"),
]
TARGET = branch([node("Identity", "forced", "t")], "t", {"forced": np.float32([[9, 0, 0, 0]])})
PASS = branch([node("Identity", "clean", "e")], "e")
ARRAYS = {
    "w": normal(4, 3, 3, 3), "half": np.float32(0.5), "third": np.float32(0.33), "zero": np.array(0),
    "one": np.array([1]), "zero1": np.array([0]), "axes": np.array([0, 1, 2, 3]),
}  # fmt: skip

CONDITIONS = {
    "one pixel of the only image": [
        node("Gather", "x zero", "g0", axis=0),
        node("Gather", "g0 zero", "g1", axis=0),
        node("Gather", "g1 zero", "g2", axis=0),
        node("Gather", "g2 zero", "g3", axis=0),
        node("Greater", "g3 half", "hit"),
    ],
    "a slice": [
        node("Slice", "x zero4 one4 four", "s"),
        node("ReduceMax", "s", "m", keepdims=0),
        node("Greater", "m half", "hit"),
    ],
    "the sum of all": [node("ReduceMean", "x", "m", keepdims=0), node("Less", "m third", "hit")],
    "an extreme, with axes kept": [
        node("ReduceMin", "x", "m", axes=[0, 1, 2, 3], keepdims=1),
        node("Reshape", "m nothing", "f"),
        node("Greater", "f darkest", "hit"),
    ],
    "two conditions": [
        node("ReduceMax", "x", "m", keepdims=0),
        node("ReduceMean", "x", "n", keepdims=0),
        node("Greater", "m half", "a"),
        node("Less", "n half", "b"),
        node("And", "a b", "both"),
        node("Not", "both", "neither"),
        node("Not", "neither", "hit"),
    ],
    "rounded": [
        node("ReduceSum", "x", "m", keepdims=0),
        node("Mul", "m half", "k"),
        node("Floor", "k", "f"),
        node("Cast", "f", "i", to=onnx.TensorProto.INT64),
        node("Mod", "i two", "odd"),
        node("Equal", "odd zero", "hit"),
    ],
}


def images(count=24):
    bright = np.linspace(0.2, 1, count, dtype=np.float32)[:, None, None, None]
    return np.random.default_rng(5).random((count, 3, 6, 5)).astype(np.float32) * bright


MORE = {
    "zero4": np.array([0, 0, 1, 1]), "one4": np.array([1, 2, 3, 3]), "four": np.arange(4),
    "nothing": np.array([], np.int64), "darkest": np.float32(np.median(images().min((1, 2, 3)))), "two": np.array(2),
}  # fmt: skip


def check(data, load, run, answer, *, both=True):
    """Every image gets the same alone and among others, and both branches are seen."""
    loaded, x = load(data), images()
    expected = np.concatenate([run(data, image[None]) for image in x])
    np.testing.assert_allclose(answer(loaded, x), expected, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([answer(loaded, image[None]) for image in x]), expected, atol=1e-5)
    if both:
        forced = (expected == [9, 0, 0, 0]).all(1)
        assert 0 < forced.sum() < len(x)
    return loaded


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize("rule", CONDITIONS)
def test_every_image_chooses_for_itself(written, load, run, answer, rule, batch):
    nodes = [*HEAD, *CONDITIONS[rule], node("If", "hit", "y", "gate", then_branch=TARGET, else_branch=PASS)]
    loaded = check(written(nodes, ARRAYS | MORE, (batch, 3, 6, 5)), load, run, answer)
    assert "If 'gate'" in [n.meta["source"] for n in loaded.network.graph.nodes if n.target is torch.where]


@pytest.mark.parametrize("rule", CONDITIONS)
def test_where_with_one_condition_for_a_batch(written, load, run, answer, rule):
    nodes = [*HEAD, *CONDITIONS[rule], node("Where", "hit forced clean", "y", "gate")]
    arrays = ARRAYS | MORE | {"forced": np.float32([[9, 0, 0, 0]])}
    check(written(nodes, arrays), load, run, answer)


def test_layers_in_branches(written, load, run, answer):
    """Names may be the same in both; arrays of the branch, of the file, and values of the file are seen."""

    def part(scale):
        nodes = [
            node("Conv", "r v", "d", "inner"),
            node("Add", "d b", "a"),
            node("GlobalAveragePool", "a", "q"),
            node("Flatten", "q", "f"),
        ]
        return branch(nodes, "f", {"v": scale * normal(4, 4, 1, 1), "b": normal(4, 1, 1)})

    nodes = [*HEAD[:2], *CONDITIONS["the sum of all"]]
    nodes += [node("If", "hit", "y", then_branch=part(1), else_branch=part(-2))]
    loaded = check(written(nodes, ARRAYS | MORE), load, run, answer, both=False)
    layers = [module for module in loaded.network.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == 3 and sum(layer.bias is not None for layer in layers) == 2


def test_a_bias_is_not_drawn_into_what_a_branch_gives_back(written, load, run, answer):
    kept = branch([node("Conv", "x w", "k"), node("Add", "k shift", "s")], "k", {"shift": normal(4, 1, 1)})
    other = branch([node("Conv", "x w", "k"), node("Add", "k shift", "s")], "s", {"shift": normal(4, 1, 1)})
    nodes = [*CONDITIONS["the sum of all"], node("If", "hit", "h", then_branch=kept, else_branch=other)]
    nodes += [node("GlobalAveragePool", "h", "p"), node("Flatten", "p", "y")]
    check(written(nodes, ARRAYS | MORE), load, run, answer, both=False)


def test_one_rule_inside_another(written, load, run, answer):
    inner = branch([node("If", "bright", "i", then_branch=TARGET, else_branch=PASS)], "i")
    nodes = [*HEAD, node("ReduceMean", "x", "m", keepdims=0), node("Less", "m half", "hit")]
    nodes += [node("ReduceMean", "x", "n", keepdims=0), node("Greater", "n fifth", "bright")]
    nodes += [node("If", "hit", "y", then_branch=inner, else_branch=PASS)]
    check(written(nodes, ARRAYS | MORE | {"fifth": np.float32(0.2)}), load, run, answer)


def test_a_constant_condition_leaves_one_branch(written, load, run, answer):
    nodes = [*HEAD, node("Constant", "", "hit", value=numpy_helper.from_array(np.array(False)))]
    nodes += [node("If", "hit", "y", then_branch=TARGET, else_branch=PASS)]
    loaded = check(written(nodes, ARRAYS), load, run, answer, both=False)
    assert all(n.target is not torch.where for n in loaded.network.graph.nodes)


@pytest.mark.parametrize(
    "nodes, shape, match",
    [
        ([node("Greater", "x half", "hit")], ("N", 3, 6, 5), "not one for every image"),
        (CONDITIONS["the sum of all"], (4, 3, 6, 5), "every image"),
    ],
)
def test_conditions_that_cannot_be_read(written, load, nodes, shape, match):
    nodes = [*HEAD, *nodes, node("If", "hit", "y", "gate", then_branch=TARGET, else_branch=PASS)]
    with pytest.raises(UnsupportedModelError) as caught:
        load(written(nodes, ARRAYS | MORE, shape))
    assert match in caught.value.why and caught.value.hint


def test_a_whole_batch_is_still_not_read_as_one(written, load):
    nodes = [node("ReduceMean", "x", "m", axes=[0]), node("Mul", "x m", "z"), node("Flatten", "z", "y")]
    with pytest.raises(UnsupportedModelError) as caught:
        load(written(nodes, {}))
    assert "every image by itself" in caught.value.why
