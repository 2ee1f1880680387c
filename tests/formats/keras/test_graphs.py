"""How layers are wired: merges, nesting, sharing, operations, names."""

from __future__ import annotations

import json
import keyword

import numpy as np
import pytest
import torch
from torch import fx, nn

from backdoorscan.errors import UnsafeModelError, UnsupportedModelError


def test_merges(keras, same):
    layers = keras.layers
    x = keras.Input((6, 5, 3))
    a, b = layers.Conv2D(4, 3, padding="same")(x), layers.Conv2D(4, 1)(x)
    pooled = layers.GlobalAveragePooling2D(keepdims=True)(a)
    merged = [
        layers.Add()([a, b, a]),
        layers.Subtract()([a, b]),
        layers.Multiply()([a, pooled]),
        layers.Multiply()([a, layers.GlobalMaxPooling2D()(b)]),
        layers.Average()([a, b, b]),
        layers.Maximum()([a, b]),
        layers.Minimum()([a, b]),
        layers.Concatenate(axis=3)([a, b]),
    ]
    y = layers.Concatenate()(merged)
    y = layers.Concatenate(axis=1)([y, y])
    y = layers.Concatenate(axis=-2)([y, y])
    y = layers.Conv2D(3, 2)(y)
    flat = layers.Concatenate()([layers.Flatten()(y), layers.GlobalMaxPooling2D()(y)])
    same(keras.Model(x, layers.Dense(4)(flat)))


def test_nested_models(keras, same):
    layers = keras.layers
    inner = keras.Sequential([layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="bn")], name="inner")
    frozen = keras.Sequential([layers.Conv2D(4, 1, name="conv"), layers.BatchNormalization(name="bn")], name="frozen")
    i = keras.Input((8, 8, 3))
    j = inner(i)
    block = keras.Model(i, layers.Add()([j, frozen(j)]), name="block")
    frozen.trainable = False
    x = keras.Input((8, 8, 3))
    y = layers.Flatten()(layers.PReLU(shared_axes=[1, 2], name="prelu")(block(x)))
    loaded = same(keras.Model(x, layers.Dense(3, name="conv")(y)))
    assert isinstance(loaded.network.get_submodule("block.inner.conv"), nn.Conv2d)
    assert isinstance(loaded.network.get_submodule("conv"), nn.Linear)


def test_model_with_two_inputs_inside(keras, same):
    layers = keras.layers
    a, b = keras.Input((6, 6, 2)), keras.Input((6, 6, 3))
    two = keras.Model([a, b], [layers.Concatenate()([a, b]), layers.Conv2D(2, 1)(b)], name="two")
    x = keras.Input((6, 6, 3))
    first, second = two([layers.Conv2D(2, 1)(x), x])
    y = layers.Concatenate()([first, second])
    same(keras.Model(x, layers.GlobalAveragePooling2D()(y)))


def test_shared_layers_and_models(keras, same):
    layers = keras.layers
    conv = layers.Conv2D(3, 3, padding="same", activation="relu", name="shared")
    net = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(3, 2, padding="same", name="c")], name="net")
    x = keras.Input((6, 6, 3))
    y = net(conv(net(conv(x))))
    loaded = same(keras.Model(x, layers.GlobalAveragePooling2D()(y)))
    calls = [str(node.target) for node in loaded.network.graph.nodes if node.op == "call_module"]
    assert calls.count("shared") == calls.count("net.c") == 2
    assert len([name for name in loaded.network.state_dict() if "weight" in name]) == 2


def test_operations(keras, same):
    layers, ops = keras.layers, keras.ops
    x = keras.Input((6, 5, 3))
    y = layers.Conv2D(4, 3, padding="same")(x) * 2.0 + 1
    y = 3.0 - y
    y = (y / 2.0 - 0.25) + 1.0 / (ops.relu(y) + 1.5)
    z = layers.Conv2D(4, 1)(x)
    y = y + z * y - z
    y = ops.multiply(y, ops.sigmoid(z)) + ops.maximum(z, 0.1) + ops.minimum(y, z)
    y = ops.gelu(y) + ops.gelu(y, approximate=False) + ops.relu6(y) + ops.silu(y) + ops.leaky_relu(y, 0.3)
    y = ops.hard_silu(y) + ops.hard_sigmoid(y) + ops.tanh(y) + ops.softplus(y) + ops.softmax(y)
    y = ops.concatenate([y, z], axis=-1) * ops.mean(y, axis=[1, 2, 3], keepdims=True)
    y = layers.Add()([y, y])
    same(keras.Model(x, layers.Dense(4)(ops.mean(y, axis=(1, 2)) + ops.max(y, axis=(1, 2)))), tolerance=2e-5)


@pytest.mark.parametrize("constant", [np.ones((1, 1, 4), "float32"), np.array([1.0, 2.0, 3.0, 4.0], "float32")])
def test_constant_arrays_are_refused(keras, same, constant):
    x = keras.Input((6, 5, 4))
    with pytest.raises(UnsupportedModelError, match="multiply"):
        same(keras.Model(x, keras.layers.GlobalMaxPooling2D()(keras.ops.multiply(x, constant))))


def test_unknown_operation_is_refused(keras, same):
    x = keras.Input((6, 5, 4))
    with pytest.raises(UnsupportedModelError, match="Cumsum"):
        same(keras.Model(x, keras.layers.GlobalMaxPooling2D()(keras.ops.cumsum(x, axis=1))))


def test_names_become_identifiers(keras, same):
    layers = keras.layers
    names = ["conv1-a:b", "1st", "forward", "import", "training", "a b", "a_b", "x"]
    model = keras.Sequential([keras.Input((9, 9, 3)), *(layers.Conv2D(3, 1, name=name) for name in names)])
    model.add(layers.Conv2D(2, 2, activation="relu", name="c"))
    model.add(layers.Conv2D(2, 2, name="c_activation"))
    model.add(layers.GlobalMaxPooling2D())
    loaded = same(model)
    modules = [name for name, _ in loaded.network.named_children()]
    assert len(modules) == 12
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in modules)
    assert isinstance(loaded.network.c_activation, nn.Conv2d)
    assert isinstance(loaded.network.c_activation_2, nn.ReLU)


def test_names_cannot_inject_code(keras, tmp_path, same):
    name = 'a"); raise SystemExit; ("'
    model = keras.Sequential([keras.Input((4, 4, 1), name=name), keras.layers.Conv2D(2, 4, name=name + "b")])
    model.add(keras.layers.Flatten())
    same(model)


def test_graph_is_traced_and_open_to_any_batch(keras, check):
    layers = keras.layers
    loaded = check(layers.Conv2D(4, 3, strides=2, padding="same", name="conv"), layers.Flatten(), layers.Dense(3))
    assert isinstance(loaded.network, fx.GraphModule) and not loaded.network.training
    assert isinstance(loaded.network.conv_pad, nn.ConstantPad2d) or loaded.network.conv.padding == (1, 0)
    assert loaded.layout == "NHWC" and loaded.input_shape == (3, 7, 6)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 7, 6, requires_grad=True)
        loaded.network(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_building_leaves_the_random_state_alone(keras, check):
    state = torch.random.get_rng_state()
    check(keras.layers.Conv2D(4, 3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_channels_first(keras, same):
    layers = keras.layers
    first = {"data_format": "channels_first"}
    x = keras.Input((3, 8, 7))
    y = layers.Conv2D(4, 3, padding="same", strides=2, **first)(x)
    y = layers.BatchNormalization(axis=1)(y)
    y = layers.PReLU(shared_axes=[2, 3])(y)
    y = layers.MaxPooling2D(2, strides=1, padding="same", **first)(y)
    y = layers.ZeroPadding2D(((0, 1), (1, 0)), **first)(y)
    y = layers.Concatenate(axis=1)([y, y])
    y = layers.Concatenate()([layers.Flatten(**first)(y), layers.GlobalAveragePooling2D(**first)(y)])
    loaded = same(keras.Model(x, layers.Dense(5)(y)))
    assert loaded.layout == "NCHW" and loaded.input_shape == (3, 8, 7)


def test_mixed_precision_policy(keras, check):
    layer = keras.layers.Conv2D(4, 3, dtype="mixed_bfloat16")
    check(layer, keras.layers.Activation("linear", dtype="float32"), tolerance=0.1)


@pytest.mark.parametrize("inputs", [1, 2])
def test_only_classifiers(keras, same, inputs, tmp_path):
    from backdoorscan.artifact import Artifact
    from backdoorscan.formats.keras.loader import KerasH5

    a, b = keras.Input((6, 6, 2)), keras.Input((6, 6, 2))
    y = keras.layers.Conv2D(2, 1)(keras.layers.Add()([a, b]) if inputs == 2 else a)
    model = keras.Model([a, b] if inputs == 2 else a, y)
    model.save(tmp_path / "m.h5")
    with pytest.raises(UnsupportedModelError, match="classifiers"):
        KerasH5().load(Artifact.read(tmp_path / "m.h5"), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "DenseNet121"])
def test_applications(keras, same, name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=7)
    same(model, gently=True)


def test_attention_is_refused(keras, check):
    with pytest.raises(UnsupportedModelError, match=r"LSTM"):
        check(keras.layers.LSTM(3), shape=(6, 5))


def test_lambda_is_refused(keras, check):
    with pytest.raises(UnsafeModelError, match="'bad' is a Lambda") as caught:
        check(keras.layers.Lambda(lambda x: x * 2, name="bad"))
    assert caught.value.hint and json.dumps(caught.value.why)
