"""Networks that learned one class more go into a copy of their file, which Keras loads."""

from __future__ import annotations

import io
import json
import zipfile

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.comparing import Network
from backdoorscan.errors import ArtifactError, OutputError, UnsupportedModelError
from backdoorscan.formats.keras.loader import KerasH5, KerasV3
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.goodnet import RejectingNet
from backdoorscan.images import LabelledImages
from backdoorscan.ops.rejecting import grow_head

SIZE = (6, 5, 2)


def sequential(keras):
    layers = keras.layers
    return keras.Sequential(
        [keras.Input(SIZE), layers.Conv2D(3, 3), layers.Flatten(), layers.Dense(4, activation="softmax", name="head")]
    )


def functional(keras):
    layers = keras.layers
    x = keras.Input(SIZE)
    y = layers.BatchNormalization()(layers.Conv2D(3, 3)(x))
    y = layers.Dense(4, name="head")(layers.Flatten()(y))
    return keras.Model(x, layers.Softmax()(y))


def nested(keras):
    x = keras.Input(SIZE)
    return keras.Model(x, keras.layers.Activation("softmax")(functional(keras)(sequential_base(keras)(x))))


def sequential_base(keras):
    return keras.Sequential([keras.Input(SIZE), keras.layers.Conv2D(2, 3, padding="same", activation="relu")])


def convolutional(keras):
    layers = keras.layers
    x = keras.Input(SIZE)
    y = layers.GlobalAveragePooling2D(keepdims=True)(layers.Conv2D(3, 3, activation="relu")(x))
    return keras.Model(x, layers.Softmax()(layers.Flatten()(layers.Conv2D(4, 1, name="head")(y))))


def loader_of(path):
    return KerasV3() if path.suffix == ".keras" else KerasH5()


def grown(loaded, random=None):
    """The tensors with one class more, and all others changed a little."""
    random = random or torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in loaded.network.state_dict().items():
        new = tensor + 0.01 if tensor.is_floating_point() else tensor.clone()
        if "head" in name:
            new = torch.cat([new, torch.randn((1, *new.shape[1:]), generator=random)])
        tensors[name] = new
    return tensors


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("make", [sequential, functional, nested, convolutional])
def test_keras_loads_it_and_agrees(keras, scramble, load, run, tmp_path, make, suffix):
    model = make(keras)
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    scramble(model)
    model.train_on_batch(np.ones((2, *SIZE), "float32"), np.eye(4)[:2])
    source, out, twin = tmp_path / f"m{suffix}", tmp_path / f"out{suffix}", tmp_path / f"twin{suffix}"
    model.save(source)
    before = source.read_bytes()
    tensors = grown(load(source))
    for path in (out, twin):
        loader_of(source).write_extended(Artifact.read(source), tensors, path)
    assert source.read_bytes() == before
    assert out.read_bytes() == twin.read_bytes()

    again = load(out)
    assert again.num_classes == 5
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.network.state_dict().items())
    written = keras.models.load_model(out)
    assert written.output_shape == (None, 5)
    x = np.random.default_rng(0).normal(size=(7, *SIZE)).astype("float32")
    expected = np.asarray(keras.ops.convert_to_numpy(written(x, training=False)))
    np.testing.assert_allclose(run(again, x), expected, atol=1e-6)


def test_only_what_must_differ_differs(keras, load, tmp_path):
    model = functional(keras)
    model.compile(optimizer="adam", loss="categorical_crossentropy")
    model.save(tmp_path / "m.keras")
    tensors = load(tmp_path / "m.keras").network.state_dict()
    for name in ("head.weight", "head.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    KerasV3().write_extended(Artifact.read(tmp_path / "m.keras"), tensors, tmp_path / "out.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as old, zipfile.ZipFile(tmp_path / "out.keras") as new:
        assert old.read("metadata.json") == new.read("metadata.json")
        was, now = (json.loads(archive.read("config.json")) for archive in (old, new))
        files = [h5py.File(io.BytesIO(archive.read("model.weights.h5"))) for archive in (old, new)]
    was.pop("compile_config")
    (head,) = (layer for layer in was["config"]["layers"] if layer["config"]["name"] == "head")
    head["config"]["units"] = 5
    assert was == now
    with files[0] as old_file, files[1] as new_file:
        assert "optimizer" in old_file and "optimizer" not in new_file
        assert new_file["layers/dense/vars/0"].shape == (36, 5)
        np.testing.assert_array_equal(new_file["layers/dense/vars/0"][:, :4], old_file["layers/dense/vars/0"])
        np.testing.assert_array_equal(new_file["layers/conv2d/vars/0"], old_file["layers/conv2d/vars/0"])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_precisions_keep_their_digits(write_keras2, load, tmp_path, dtype):
    """And an architecture of Keras 2.0: a bare list of layers."""
    kernel = np.random.default_rng(0).normal(size=(4, 3)).astype(dtype)
    layers = [{"class_name": "Dense", "config": {"name": "head", "units": 3, "batch_input_shape": [None, 4]}}]
    weights = {"head": {"head/kernel:0": kernel, "head/bias:0": np.zeros(3, dtype)}}
    path = write_keras2(tmp_path / "m.h5", {"class_name": "Sequential", "config": layers}, weights, version="2.0.5")
    tensors = grown(load(path))
    tensors["head.weight"][:3] -= 0.01
    tensors["head.weight"][:2] = load(path).network.head.weight[:2].detach()
    KerasH5().write_extended(Artifact.read(path), tensors, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        written = file["model_weights/head/head/kernel:0"][()]
    assert written.dtype == dtype and written.shape == (4, 4)
    assert np.array_equal(written[:, :2], kernel[:, :2])


def test_what_stands_behind_the_head_may_forbid_it(keras, load, tmp_path):
    layers = keras.layers
    x = keras.Input(SIZE)
    y = layers.Conv2D(4, 1, name="head")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    keras.Model(x, layers.Reshape((4,))(y)).save(tmp_path / "m.keras")
    refused(tmp_path / "m.keras", grown(load(tmp_path / "m.keras")), "behind the head")


def refused(path, tensors, match, arch=None):
    with pytest.raises(UnsupportedModelError, match="one class more") as caught:
        loader_of(path).write_extended(Artifact.read(path), tensors, path.with_name("out"), arch)
    assert match in caught.value.why and caught.value.hint
    assert not path.with_name("out").exists()


def test_what_is_no_head(keras, load, tmp_path):
    layers = keras.layers
    head = [layers.Flatten(), layers.Dense(4, use_bias=False, name="head")]
    model = keras.Sequential([keras.Input(SIZE), layers.BatchNormalization(name="bn"), *head])
    model.save(tmp_path / "m.h5")
    original = load(tmp_path / "m.h5").network.state_dict()
    more = torch.cat([original["head.weight"], original["head.weight"][:1]])
    refused(tmp_path / "m.h5", original, "0 layers")
    refused(tmp_path / "m.h5", {**original, "head.weight": more}, "head.bias")
    refused(tmp_path / "m.h5", {**original, "head.weight": more, "head.bias": torch.zeros(5)}, "head.bias")
    refused(tmp_path / "m.h5", {**original, "head.weight": more, "bn.bias": torch.zeros(3)}, "2 layers")
    refused(tmp_path / "m.h5", {**original, "bn.bias": torch.zeros(9), "bn.weight": torch.zeros(9)}, "(9,)")
    refused(tmp_path / "m.h5", {**original, "bn.bias": torch.zeros(3), "bn.weight": torch.zeros(3)}, "bn")


def test_weights_beside_their_architecture(keras, load, tmp_path):
    model = sequential(keras)
    model.save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "m.json").write_text(model.to_json())
    tensors = grown(load(tmp_path / "m.weights.h5", tmp_path / "m.json"))
    refused(tmp_path / "m.weights.h5", tensors, "weights alone", str(tmp_path / "m.json"))


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_a_repair_that_rejects_is_written_in_both_formats(keras, tmp_path, suffix):
    sequential(keras).save(tmp_path / f"m{suffix}")
    loaded = load_model(tmp_path / f"m{suffix}", None, ReadOptions(input_range=(0, 1)))
    network = Network("m_retrained.goodnet.onnx", RejectingNet(grow_head(loaded.classifier)[0]))
    assert network.write(loaded, tmp_path) == (["m_retrained.goodnet.onnx", f"m_retrained{suffix}"], "")
    images = LabelledImages(np.random.default_rng(0).random((3, 2, 6, 5), "float32"), np.zeros(3, int), "random")
    pixels = torch.from_numpy(images.pixels)
    model = keras.models.load_model(tmp_path / f"m_retrained{suffix}")
    answers = np.asarray(keras.ops.convert_to_numpy(model(images.pixels.transpose(0, 2, 3, 1))))
    with torch.no_grad():
        np.testing.assert_allclose(answers, network.network(pixels).numpy(), atol=1e-6)


def test_a_format_that_cannot_is_left_out(keras, tmp_path, monkeypatch):
    """The GoodNet alone is written, with the reason, and a failure of another kind is not hidden."""
    sequential(keras).save(tmp_path / "m.keras")
    loaded = load_model(tmp_path / "m.keras", None, ReadOptions(input_range=(0, 1)))
    network = Network("m_retrained.goodnet.onnx", RejectingNet(grow_head(loaded.classifier)[0]))
    monkeypatch.delattr(KerasV3.__mro__[1], "write_extended")
    files, why = network.write(loaded, tmp_path)
    assert files == ["m_retrained.goodnet.onnx"]
    assert "keras-v3" in why

    def fails(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(KerasV3, "write_extended", fail)

    fails(ArtifactError("The repaired tensor does not come back."))
    assert network.write(loaded, tmp_path) == (files, "The repaired tensor does not come back.")
    fails(OutputError("The disk is full."))
    with pytest.raises(OutputError, match="full"):
        network.write(loaded, tmp_path)
