"""Repaired tensors go back into a copy of a `.keras` archive; nothing else changes."""

from __future__ import annotations

import io
import zipfile

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.formats.keras.archive import with_members
from backdoorscan.formats.keras.loader import KerasV3


@pytest.fixture
def source(keras, scramble, tmp_path):
    layers = keras.layers
    x = keras.Input((7, 6, 3))
    inside = [layers.Conv2D(4, 3, name="z"), layers.BatchNormalization(name="bn")]
    inner = keras.Sequential([keras.Input((7, 6, 3)), *inside], name="inner")
    y = layers.PReLU(name="prelu")(inner(layers.Rescaling(1 / 255)(x)))
    y = layers.SeparableConv2D(5, 2, name="sep")(layers.Conv2D(4, 1, name="a")(y))
    model = keras.Model(x, layers.Dense(4, activation="softmax", name="head")(layers.Flatten()(y)))
    model.compile(optimizer="adam", loss="categorical_crossentropy")
    model.train_on_batch(np.ones((2, 7, 6, 3), "float32"), np.eye(4)[:2])
    scramble(model)
    model.save(tmp_path / "m.keras")
    return tmp_path / "m.keras"


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: (info.date_time, info.external_attr, archive.read(info)) for info in archive.infolist()}


def datasets(data):
    found = {}
    with h5py.File(io.BytesIO(data)) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def write(source, changed, path):
    KerasV3().write(Artifact.read(source), changed, path)


KEYS = ["inner.z.weight", "inner.bn.running_var", "prelu.weight", "a.bias"]
KEYS += ["sep_depthwise.weight", "sep.weight", "head.weight"]


def test_one_channel_of_many_layers(keras, source, load, run, tmp_path):
    loaded = load(source)
    changed = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    for key in KEYS:
        changed[key][0] *= 0.5
    before = source.read_bytes()
    write(source, changed, tmp_path / "out.keras")
    assert source.read_bytes() == before

    old, new = members(source), members(tmp_path / "out.keras")
    assert list(old) == list(new)
    assert {name for name in old if old[name] != new[name]} == {"model.weights.h5"}
    was, now = datasets(old["model.weights.h5"][2]), datasets(new["model.weights.h5"][2])
    assert was.keys() == now.keys()
    assert sum(was[name].tobytes() != now[name].tobytes() for name in was) == len(KEYS)

    again = load(tmp_path / "out.keras")
    assert all(torch.equal(tensor, changed[name]) for name, tensor in again.network.state_dict().items())
    x = np.random.default_rng(0).uniform(0, 255, (2, 7, 6, 3)).astype("float32")
    model = keras.models.load_model(tmp_path / "out.keras")
    expected = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))
    np.testing.assert_allclose(run(again, x), expected, atol=1e-6)
    assert np.abs(run(loaded, x) - expected).max() > 1e-3


def test_same_input_same_bytes(source, load, tmp_path):
    changed = {"head.bias": load(source).network.head.bias.detach() + 1}
    write(source, changed, tmp_path / "a.keras")
    write(source, changed, tmp_path / "b.keras")
    assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()
    assert (tmp_path / "a.keras").read_bytes() != source.read_bytes()


def test_nothing_changed_is_a_copy(source, load, tmp_path):
    write(source, load(source).network.state_dict(), tmp_path / "out.keras")
    assert (tmp_path / "out.keras").read_bytes() == source.read_bytes()


def test_other_members_keep_their_packed_bytes(source, load, tmp_path):
    """Whatever level and program packed them, and in whatever order they lie."""
    other = tmp_path / "other.keras"
    contents = {name: content for name, (_, _, content) in members(source).items()}
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("model.weights.h5", contents["model.weights.h5"], zipfile.ZIP_DEFLATED, 1)
        archive.writestr("assets/words.txt", "word\n" * 1000, zipfile.ZIP_DEFLATED, 9)
        archive.writestr("config.json", contents["config.json"], zipfile.ZIP_DEFLATED, 1)
        archive.infolist()[1].comment = b"of one entry"
    changed = {"head.bias": load(other).network.head.bias.detach() + 1}
    write(other, changed, tmp_path / "out.keras")
    before, after = other.read_bytes(), (tmp_path / "out.keras").read_bytes()
    with zipfile.ZipFile(other) as old, zipfile.ZipFile(tmp_path / "out.keras") as new:
        assert new.testzip() is None
        assert [info.filename for info in new.infolist()] == [info.filename for info in old.infolist()]
        start, end = (old.getinfo(name).header_offset for name in ("assets/words.txt", "config.json"))
        moved = new.getinfo("assets/words.txt")
        assert after[moved.header_offset :].startswith(before[start:end])
        assert moved.comment == b"of one entry"
        assert new.getinfo("model.weights.h5").compress_type == zipfile.ZIP_DEFLATED
    assert torch.equal(load(tmp_path / "out.keras").network.head.bias, changed["head.bias"])


def test_replacing_by_the_same_keeps_every_byte(source):
    data = source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        assert with_members(data, {"config.json": archive.read("config.json")}) == data
