"""Files as Keras 2 wrote them, by hand, against torch."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import torch
from torch.nn import functional

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.formats.keras.loader import KerasH5

RNG = np.random.default_rng(3)
KERNEL = RNG.normal(size=(3, 3, 2, 4)).astype("float32")
BIAS = RNG.normal(size=4).astype("float32")
DENSE = RNG.normal(size=(4, 3)).astype("float32")
X = RNG.normal(size=(5, 6, 6, 2)).astype("float32")


def conv(name="conv", **more):
    config = {"name": name, "filters": 4, "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid", **more}
    return {"class_name": "Conv2D", "config": config}


def layer(class_name, name, **config):
    return {"class_name": class_name, "config": {"name": name, **config}}


HEAD = [layer("GlobalAveragePooling2D", "pool"), layer("Dense", "dense", units=3, use_bias=False)]
WEIGHTS = {"conv": {"conv/kernel:0": KERNEL, "conv/bias:0": BIAS}, "pool": {}, "dense": {"dense/kernel:0": DENSE}}


def truth(x=X, middle=lambda y: y):
    y = functional.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(KERNEL).permute(3, 2, 0, 1))
    y = middle(y + torch.from_numpy(BIAS)[:, None, None])
    return (y.mean((2, 3)) @ torch.from_numpy(DENSE)).numpy()


def sequential(*layers, bare=False):
    return {"class_name": "Sequential", "config": list(layers) if bare else {"name": "s", "layers": list(layers)}}


SHAPE = {"batch_input_shape": [None, 6, 6, 2]}


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_sequential(write_keras2, load, run, tmp_path, bare, as_bytes):
    config = sequential(conv(**SHAPE), *HEAD, bare=bare)
    loaded = load(write_keras2(tmp_path / "m.h5", config, WEIGHTS, as_bytes=as_bytes))
    np.testing.assert_allclose(run(loaded, X), truth(), atol=1e-5)
    assert loaded.input_shape == (2, 6, 6) and loaded.details["keras_version"] == "2.3.1"
    assert {"conv.weight", "conv.bias", "dense.weight"} == set(loaded.network.state_dict())


def test_build_input_shape(write_keras2, load, run, tmp_path):
    config = sequential(conv(), *HEAD)
    config["config"]["build_input_shape"] = [None, 6, 6, 2]
    np.testing.assert_allclose(run(load(write_keras2(tmp_path / "m.h5", config, WEIGHTS)), X), truth(), atol=1e-5)


def test_no_input_shape(write_keras2, load, tmp_path):
    with pytest.raises(UnsupportedModelError, match="which images") as caught:
        load(write_keras2(tmp_path / "m.h5", sequential(conv(), *HEAD), WEIGHTS))
    assert "input_shape" in caught.value.hint


@pytest.mark.parametrize("version", ["1.2.2", "2.0.5", "2.15.0"])
def test_hard_sigmoid_is_that_of_its_keras(write_keras2, load, run, tmp_path, version):
    config = sequential(conv(**SHAPE), layer("Activation", "act", activation="hard_sigmoid"), *HEAD)
    loaded = load(write_keras2(tmp_path / "m.h5", config, WEIGHTS, version=version))
    np.testing.assert_allclose(run(loaded, X), truth(middle=lambda y: (0.2 * y + 0.5).clamp(0, 1)), atol=1e-5)


def test_old_spellings(write_keras2, load, run, tmp_path):
    layers = [
        layer("LeakyReLU", "leaky", alpha={"type": "ndarray", "value": 0.1}),
        layer("ThresholdedReLU", "thresholded", theta=-0.5),
        layer("ReLU", "relu", max_value=1.5, negative_slope=0.0, threshold=0.0),
        layer("RandomBrightness", "brighter", factor=0.1),
        layer("Activation", "swish", activation={"class_name": "function", "config": "swish"}),
    ]
    loaded = load(write_keras2(tmp_path / "m.h5", sequential(conv(**SHAPE), *layers, *HEAD), WEIGHTS))

    def middle(y):
        y = functional.leaky_relu(y, 0.1)
        return functional.silu(torch.where(y > -0.5, y, torch.zeros(())).clamp(0, 1.5))

    np.testing.assert_allclose(run(loaded, X), truth(middle=middle), atol=1e-5)


def functional_model(*middle, outputs="dense", class_name="Model"):
    def node(entry, inbound):
        return {**entry, "name": entry["config"]["name"], "inbound_nodes": inbound}

    start = layer("InputLayer", "in", batch_input_shape=[None, 6, 6, 2])
    last = middle[-1]["name"] if middle else "conv"
    layers = [node(start, []), node(conv(), [[["in", 0, 0, {}]]]), *middle]
    layers += [node(HEAD[0], [[[last, 0, 0, {}]]]), node(HEAD[1], [[["pool", 0, 0, {}]]])]
    config = {"name": "m", "layers": layers, "input_layers": [["in", 0, 0]], "output_layers": [[outputs, 0, 0]]}
    return {"class_name": class_name, "config": config}


def op(name, function, *inbound):
    config = {"name": name, "trainable": True, "dtype": "float32", "function": function}
    return {"class_name": "TFOpLambda", "config": config, "name": name, "inbound_nodes": list(inbound)}


def test_functional_with_tensorflow_operations(write_keras2, load, run, tmp_path):
    middle = [
        op("mul", "math.multiply", ["conv", 0, 0, {"y": 2.0, "name": None}]),
        op("add", "__operators__.add", ["mul", 0, 0, {"y": ["conv", 0, 0], "name": None}]),
        op("sub", "math.subtract", ["_CONSTANT_VALUE", -1, 1.0, {"y": ["add", 0, 0]}]),
        op("div", "math.truediv", ["sub", 0, 0, {"y": 4, "name": None}]),
        op("relu6", "nn.relu6", ["div", 0, 0, {}]),
        op("cast", "cast", ["relu6", 0, 0, {"dtype": "float32"}]),
    ]
    loaded = load(write_keras2(tmp_path / "m.h5", functional_model(*middle, class_name="Functional"), WEIGHTS))
    expected = truth(middle=lambda y: functional.relu6((1 - (2 * y + y)) / 4))
    np.testing.assert_allclose(run(loaded, X), expected, atol=1e-5)


@pytest.mark.parametrize(
    "function, argument", [("math.multiply", [1.0, 2.0]), ("io.read_file", 1.0), ("math.add", None), ("cast", "int8")]
)
def test_other_operations_are_refused(write_keras2, load, tmp_path, function, argument):
    with pytest.raises(UnsupportedModelError, match="'bad'"):
        middle = op("bad", function, ["conv", 0, 0, {"y": argument}])
        load(write_keras2(tmp_path / "m.h5", functional_model(middle), WEIGHTS))


def test_training_mode_is_refused(write_keras2, load, tmp_path):
    drop = {
        **layer("Dropout", "drop", rate=0.5),
        "name": "drop",
        "inbound_nodes": [[["conv", 0, 0, {"training": True}]]],
    }
    with pytest.raises(UnsupportedModelError, match="drop"):
        load(write_keras2(tmp_path / "m.h5", functional_model(drop), WEIGHTS))


def test_batch_normalization_of_keras2(write_keras2, load, run, tmp_path):
    values = {
        key: RNG.uniform(0.5, 2, 4).astype("float32") for key in ("gamma", "beta", "moving_mean", "moving_variance")
    }
    config = sequential(conv(**SHAPE), layer("BatchNormalization", "bn", axis=[3], epsilon=0.01), *HEAD)
    # Old graphs made the scope's name unique, so it differs from the layer's.
    weights = {**WEIGHTS, "bn": {f"bn_1/{key}:0": value for key, value in values.items()}}
    loaded = load(write_keras2(tmp_path / "m.h5", config, weights))
    gamma, beta, mean, variance = (torch.from_numpy(value)[:, None, None] for value in values.values())
    expected = truth(middle=lambda y: (y - mean) / (variance + 0.01).sqrt() * gamma + beta)
    np.testing.assert_allclose(run(loaded, X), expected, atol=1e-5)


def nested(names, frozen=False):
    first, second = (conv(name, padding="same") for name in ("a", "a_1"))
    first["config"]["trainable"] = not frozen
    inner = sequential(first, second)
    inner["config"]["name"] = "inner"
    second_kernel = RNG.normal(size=(3, 3, 4, 4)).astype("float32")
    arrays = [KERNEL, BIAS, second_kernel, BIAS * 2]
    if frozen:
        arrays = arrays[2:] + arrays[:2]
    weights = {"inner": dict(zip(names, arrays, strict=True)), "pool": {}, "dense": WEIGHTS["dense"]}
    start = layer("InputLayer", "in", **SHAPE)
    return sequential(start, inner, *HEAD), weights, second_kernel


@pytest.mark.parametrize(
    "names, frozen",
    [
        (["a/kernel:0", "a/bias:0", "a_1/kernel:0", "a_1/bias:0"], False),
        (["a_1/kernel:0", "a_1/bias:0", "a/kernel:0", "a/bias:0"], True),
        # A graph that already held an `a`: the layer a is now the scope a_1, and a_1 is a_1_1.
        (["a_1/kernel:0", "a_1/bias:0", "a_1_1/kernel:0", "a_1_1/bias:0"], False),
        (["x/kernel:0", "x/bias:0", "y/kernel:0", "y/bias:0"], True),
        (["param_0", "param_1", "param_2", "param_3"], False),
    ],
)
def test_names_inside_nested_models(write_keras2, load, run, tmp_path, names, frozen):
    config, weights, second = nested(names, frozen)
    loaded = load(write_keras2(tmp_path / "m.h5", config, weights))
    kernels = [torch.from_numpy(kernel).permute(3, 2, 0, 1) for kernel in (KERNEL, second)]
    y = functional.conv2d(torch.from_numpy(X).permute(0, 3, 1, 2), kernels[0], torch.from_numpy(BIAS), padding=1)
    y = functional.conv2d(y, kernels[1], torch.from_numpy(BIAS * 2), padding=1)
    np.testing.assert_allclose(run(loaded, X), (y.mean((2, 3)) @ torch.from_numpy(DENSE)).numpy(), atol=1e-4)
    assert torch.equal(loaded.network.get_submodule("inner.a").weight, kernels[0])


def test_attributes_in_parts(write_keras2, load, run, tmp_path):
    path = write_keras2(tmp_path / "m.h5", sequential(conv(**SHAPE), *HEAD), WEIGHTS)
    with h5py.File(path, "r+") as file:
        store = file["model_weights"]
        names = store.attrs["layer_names"]
        del store.attrs["layer_names"]
        store.attrs["layer_names0"], store.attrs["layer_names1"] = names[:1], names[1:]
        text = file.attrs["model_config"]
        del file.attrs["model_config"]
        file.attrs["model_config0"], file.attrs["model_config1"] = text[:50], text[50:]
    np.testing.assert_allclose(run(load(path), X), truth(), atol=1e-5)


@pytest.mark.parametrize("from_json", [True, False])
@pytest.mark.parametrize("renamed", [True, False])
def test_weights_with_architecture_beside_them(write_keras2, load, run, tmp_path, from_json, renamed):
    config = sequential(conv(**SHAPE), *HEAD)
    weights = {f"{key}_9" if renamed else key: value for key, value in WEIGHTS.items()}
    path = write_keras2(tmp_path / "w.h5", None, weights, whole=False)
    arch = tmp_path / ("a.json" if from_json else "a.h5")
    if from_json:
        arch.write_text(json.dumps({**config, "keras_version": "2.3.1"}))
    else:
        write_keras2(arch, config, {key: {} for key in WEIGHTS})
    np.testing.assert_allclose(run(load(path, arch), X), truth(), atol=1e-5)

    loader, out = KerasH5(), tmp_path / "out.h5"
    changed = load(path, arch).network.state_dict()["conv.weight"].clone()
    changed[1] = 0
    loader.write(Artifact.read(path), {"conv.weight": changed}, out, str(arch))
    assert torch.equal(load(out, arch).network.state_dict()["conv.weight"], changed)


def test_weights_alone(write_keras2, load, tmp_path):
    path = write_keras2(tmp_path / "w.h5", None, WEIGHTS, whole=False)
    with pytest.raises(ArtifactError, match="no architecture") as caught:
        load(path)
    assert "--arch model.h5" in caught.value.hint and "model.json" in caught.value.hint
    with pytest.raises(ArtifactError, match="holds no architecture"):
        load(path, path)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"bad\.json"):
        load(path, tmp_path / "bad.json")


def test_architecture_twice(write_keras2, load, tmp_path):
    path = write_keras2(tmp_path / "m.h5", sequential(conv(**SHAPE), *HEAD), WEIGHTS)
    with pytest.raises(UsageError, match="own architecture"):
        load(path, path)


@pytest.mark.parametrize("arch", ["model.h5", "model.keras", "model.json"])
def test_keras3_weights_file(keras, load, run, scramble, tmp_path, arch):
    """Its layers go by class and number: the names in the architecture may be any."""
    layers = [keras.layers.Conv2D(2, 3, name="z"), keras.layers.Conv2D(4, 3, name="a"), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers, keras.layers.Dense(3)])
    model.save_weights(tmp_path / "old.weights.h5")
    scramble(model)
    model.save_weights(tmp_path / "m.weights.h5")
    expected = np.asarray(keras.ops.convert_to_numpy(model(X)))
    model.load_weights(tmp_path / "old.weights.h5")
    if arch == "model.json":
        (tmp_path / arch).write_text(model.to_json())
    else:
        model.save(tmp_path / arch)
    loaded = load(tmp_path / "m.weights.h5", tmp_path / arch)
    np.testing.assert_allclose(run(loaded, X), expected, atol=1e-5)
    changed = {"a.bias": loaded.network.a.bias.detach() + 1}
    source, out = Artifact.read(tmp_path / "m.weights.h5"), tmp_path / "out.weights.h5"
    KerasH5().write(source, changed, out, str(tmp_path / arch))
    model.load_weights(out)
    np.testing.assert_array_equal(np.asarray(keras.ops.convert_to_numpy(model.layers[1].bias)), changed["a.bias"])
    with pytest.raises(ArtifactError, match="no architecture"):
        load(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("first", [0, 1])
def test_calls_of_an_inner_model(write_keras2, load, run, tmp_path, first):
    """tf.keras counts the call by which an inner model was built; pure Keras does not."""
    start = {"class_name": "InputLayer", "name": "in", "inbound_nodes": [], "config": {"name": "in", **SHAPE}}
    inside = {**conv(), "name": "conv", "inbound_nodes": [[["in", 0, 0, {}]]]}
    block = {"layers": [start, inside], "input_layers": [["in", 0, 0]], "output_layers": [["conv", 0, 0]]}
    layers = [
        start,
        {"class_name": "Functional", "name": "b", "config": {"name": "b", **block}, "inbound_nodes": [[["in", 0, 0]]]},
        {**HEAD[0], "name": "pool", "inbound_nodes": [[["b", first, 0, {}]]]},
        {**HEAD[1], "name": "dense", "inbound_nodes": [[["pool", 0, 0, {}]]]},
    ]
    ends = {"input_layers": [["in", 0, 0]], "output_layers": [["dense", 0, 0]]}
    config = {"class_name": "Functional", "config": {"name": "m", "layers": layers, **ends}}
    weights = {"b": WEIGHTS["conv"], "pool": {}, "dense": WEIGHTS["dense"]}
    np.testing.assert_allclose(run(load(write_keras2(tmp_path / "m.h5", config, weights)), X), truth(), atol=1e-5)


def test_json_of_keras3(keras, load, run, write_keras2, tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 2)), keras.layers.Conv2D(4, 3, name="conv")])
    model.add(keras.layers.GlobalAveragePooling2D(name="pool"))
    model.add(keras.layers.Dense(3, use_bias=False, name="dense"))
    (tmp_path / "a.json").write_text(model.to_json())
    path = write_keras2(tmp_path / "w.h5", None, WEIGHTS, whole=False)
    np.testing.assert_allclose(run(load(path, tmp_path / "a.json"), X), truth(), atol=1e-5)
