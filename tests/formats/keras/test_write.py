"""A repaired tensor goes back into a copy of the file; nothing else changes."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, OutputError
from backdoorscan.formats.keras.loader import KerasH5


@pytest.fixture
def model(keras, scramble):
    layers = keras.layers
    x = keras.Input((9, 8, 3))
    y = layers.Conv2D(4, (3, 2), name="conv")(x)
    y = layers.Conv2D(6, (3, 2), groups=2, name="grouped")(y)
    y = layers.BatchNormalization(name="bn")(y)
    y = layers.DepthwiseConv2D((2, 1), depth_multiplier=2, name="dw")(y)
    y = layers.SeparableConv2D(5, (1, 2), depth_multiplier=2, name="sep")(y)
    inner = keras.Sequential([keras.Input(y.shape[1:]), layers.Conv2DTranspose(3, (2, 3), name="up")], name="inner")
    y = layers.PReLU(name="prelu")(inner(y))
    y = layers.LayerNormalization(axis=-1, name="ln")(y)
    y = layers.Dense(7, name="last_axis")(y)
    model = keras.Model(x, layers.Dense(4, activation="softmax", name="head")(layers.Flatten()(y)))
    model.compile(optimizer="adam", loss="categorical_crossentropy")
    scramble(model)
    return model


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
        return found, {key: str(value) for key, value in file.attrs.items()}


KEYS = [
    "conv.weight", "conv.bias", "grouped.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
    "dw.weight", "dw.bias", "sep_depthwise.weight", "sep.weight", "sep.bias", "inner.up.weight", "inner.up.bias",
    "prelu.weight", "ln.weight", "ln.bias", "last_axis.weight", "head.weight", "head.bias",
]  # fmt: skip


def test_every_kind_of_weight(keras, model, load, run, tmp_path):
    source = tmp_path / "m.h5"
    model.save(source)
    loaded = load(source)
    weights = loaded.network.state_dict()
    assert set(KEYS) <= set(weights)
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype("float32")
    before, attributes = datasets(source)
    for number, key in enumerate(KEYS):
        changed = {name: tensor.clone() for name, tensor in weights.items()}
        changed[key].view(-1)[::3] *= 0.5
        path = tmp_path / f"{number}.h5"
        KerasH5().write(Artifact.read(source), changed, path)
        after, same_attributes = datasets(path)
        assert attributes == same_attributes and before.keys() == after.keys()
        different = [name for name in before if before[name].tobytes() != after[name].tobytes()]
        assert len(different) == 1, key
        again = load(path)
        for name, tensor in again.network.state_dict().items():
            assert torch.equal(tensor, changed[name]), name
        expected = np.asarray(keras.ops.convert_to_numpy(keras.models.load_model(path)(x, training=False)))
        np.testing.assert_allclose(run(again, x), expected, atol=1e-5)


def test_nothing_changed_is_a_copy(model, load, tmp_path):
    model.save(tmp_path / "m.h5")
    weights = load(tmp_path / "m.h5").network.state_dict()
    KerasH5().write(Artifact.read(tmp_path / "m.h5"), weights, tmp_path / "copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == (tmp_path / "m.h5").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.h5", "m.h5"]


def dense_file(write_keras2, path, kernel, **more):
    layers = [
        {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 4]}},
        {"class_name": "Rescaling", "config": {"name": "scale", "scale": 0.5, "offset": 0}},
        {"class_name": "Dense", "config": {"name": "dense", "units": 4, "use_bias": False}},
    ]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    return write_keras2(path, config, {"in": {}, "scale": {}, "dense": {"dense/kernel:0": kernel}}, **more)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_precisions_keep_their_digits(write_keras2, load, tmp_path, dtype):
    kernel = np.random.default_rng(0).normal(size=(4, 4)).astype(dtype)
    path = dense_file(write_keras2, tmp_path / "m.h5", kernel)
    tensor = load(path).network.dense.weight.detach().clone()
    tensor[2] = 0
    KerasH5().write(Artifact.read(path), {"dense.weight": tensor}, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        written = file["model_weights/dense/dense/kernel:0"][()]
    assert written.dtype == dtype and (written[:, 2] == 0).all()
    assert np.array_equal(np.delete(written, 2, 1), np.delete(kernel, 2, 1))


def test_not_a_number_is_a_value(write_keras2, load, tmp_path):
    kernel = np.full((4, 4), np.nan, "float32")
    path = dense_file(write_keras2, tmp_path / "m.h5", kernel)
    weights = load(path).network.state_dict()
    KerasH5().write(Artifact.read(path), weights, tmp_path / "out.h5")
    assert (tmp_path / "out.h5").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "weights, match",
    [
        ({"dense.weight": torch.zeros(2, 4)}, "shape"),
        ({"nothing.weight": torch.zeros(2)}, "no tensor"),
        ({"scale.scale": torch.tensor(3.0)}, "cannot be changed"),
    ],
)
def test_what_the_file_cannot_hold(write_keras2, tmp_path, weights, match):
    path = dense_file(write_keras2, tmp_path / "m.h5", np.ones((4, 4), "float32"))
    with pytest.raises(ArtifactError, match=match):
        KerasH5().write(Artifact.read(path), weights, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_folder_that_is_not_there(write_keras2, tmp_path):
    path = dense_file(write_keras2, tmp_path / "m.h5", np.ones((4, 4), "float32"))
    with pytest.raises(OutputError, match="Cannot write"):
        KerasH5().write(Artifact.read(path), {}, tmp_path / "absent" / "out.h5")
