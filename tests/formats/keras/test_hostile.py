"""Files that would run code, read other files or fill the memory; and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.loader import KerasH5

CONFIG = {
    "class_name": "Sequential",
    "config": {
        "name": "s",
        "layers": [
            {"class_name": "InputLayer", "config": {"name": "in", "batch_input_shape": [None, 4]}},
            {"class_name": "Dense", "config": {"name": "dense", "units": 3}},
        ],
    },
}
KERNEL = np.arange(12, dtype="float32").reshape(4, 3)
WEIGHTS = {"in": {}, "dense": {"dense/kernel:0": KERNEL, "dense/bias:0": np.ones(3, "float32")}}
GROUP = "model_weights/dense/dense"


@pytest.fixture
def good(write_keras2, tmp_path):
    return write_keras2(tmp_path / "m.h5", CONFIG, WEIGHTS)


def refused(load, path, match, error=UnsafeModelError, arch=None):
    with pytest.raises(error, match=match) as caught:
        load(path, arch)
    assert caught.value.what and caught.value.hint
    assert "Traceback" not in str(caught.value)
    return caught.value


def test_the_good_file_loads(good, load):
    assert load(good).num_classes == 3


def replace_kernel(path, make):
    with h5py.File(path, "r+") as file:
        del file[f"{GROUP}/kernel:0"]
        make(file)


def test_external_link(good, load, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = KERNEL
    link = h5py.ExternalLink(str(tmp_path / "other.h5"), "/secret")
    replace_kernel(good, lambda file: file.__setitem__(f"{GROUP}/kernel:0", link))
    refused(load, good, "link")


def test_soft_link(good, load):
    replace_kernel(good, lambda file: file.__setitem__(f"{GROUP}/kernel:0", h5py.SoftLink("/elsewhere")))
    refused(load, good, "link")


def test_link_beside_the_weights(good, load):
    with h5py.File(good, "r+") as file:
        file["optimizer_weights"] = h5py.ExternalLink("/etc/passwd", "/")
    refused(load, good, "optimizer_weights")


def test_external_storage(good, load, tmp_path):
    (tmp_path / "secret").write_bytes(KERNEL.tobytes())
    external = [(str(tmp_path / "secret"), 0, KERNEL.nbytes)]
    replace_kernel(good, lambda file: file.create_dataset(f"{GROUP}/kernel:0", (4, 3), "float32", external=external))
    refused(load, good, "external")


def test_virtual_dataset(good, load):
    layout = h5py.VirtualLayout((4, 3), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 3))
    replace_kernel(good, lambda file: file.create_virtual_dataset(f"{GROUP}/kernel:0", layout))
    refused(load, good, "virtual")


def test_unknown_filter(good, load):
    replace_kernel(good, lambda file: file.create_dataset(f"{GROUP}/kernel:0", data=KERNEL, scaleoffset=2))
    refused(load, good, "filter")


@pytest.mark.parametrize(
    "options", [{"compression": "gzip"}, {"compression": "lzf", "shuffle": True, "fletcher32": True}]
)
def test_known_filters(good, load, options):
    replace_kernel(good, lambda file: file.create_dataset(f"{GROUP}/kernel:0", data=KERNEL, **options))
    assert load(good).network.dense.weight[0, 1] == 3


@pytest.mark.parametrize("options", [{}, {"chunks": (1024, 1024)}, {"chunks": (1024, 1024), "compression": "gzip"}])
def test_shape_bomb(good, load, options):
    replace_kernel(good, lambda file: file.create_dataset(f"{GROUP}/kernel:0", (2**16, 2**16), "float32", **options))
    refused(load, good, "declares")


def test_many_names_for_one_dataset(good, load):
    """Every name of a compressed dataset is read, so every name counts."""
    with h5py.File(good, "r+") as file:
        group = file["model_weights/dense"]
        big = group.create_dataset("big", data=np.zeros(2**22, "float32"), compression="gzip", chunks=(2**22,))
        names = [f"w{index}" for index in range(100)]
        for name in names:
            group[name] = big
        group.attrs["weight_names"] = names
    refused(load, good, "declares")


@pytest.mark.parametrize("value", ["text", b"bytes"])
def test_text_where_numbers_belong(good, load, value):
    replace_kernel(good, lambda file: file.__setitem__(f"{GROUP}/kernel:0", value))
    refused(load, good, "numbers", ArtifactError)


def test_group_that_holds_itself(good, load):
    with h5py.File(good, "r+") as file:
        file["model_weights/loop"] = file["model_weights"]
    assert load(good).num_classes == 3


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated(good, load, part):
    data = good.read_bytes()
    good.write_bytes(data[: int(len(data) * part)])
    refused(load, good, "HDF5", ArtifactError)


def test_flipped_bytes(good, load):
    """Whatever is damaged, the answer is a model or one clear error."""
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(80):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 6):
            broken[position] = rng.integers(0, 256)
        good.write_bytes(bytes(broken))
        try:
            load(good)
        except ArtifactError as error:
            assert error.what


def test_text_file(tmp_path, load):
    path = tmp_path / "m.h5"
    path.write_text("<html>404</html>")
    refused(load, path, "not valid JSON", ArtifactError)
    assert not KerasH5().accepts(Artifact.read(path))


def test_signature_behind_a_user_block(good, load):
    data = good.read_bytes()
    assert KerasH5().accepts(Artifact.read(good))
    good.write_bytes(bytes(1024) + data)
    assert KerasH5().accepts(Artifact.read(good))
    good.write_bytes(bytes(1000) + data)
    assert not KerasH5().accepts(Artifact.read(good))


def test_hdf5_without_a_model(tmp_path, load):
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["data"], file["label"] = np.zeros((2, 3)), np.zeros(2)
    error = refused(load, tmp_path / "images.h5", "not a Keras model", ArtifactError)
    assert "data, label" in error.why and "--valid" in error.hint


def with_config(write_keras2, tmp_path, config):
    path = write_keras2(tmp_path / "c.h5", CONFIG, WEIGHTS)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = config if isinstance(config, str) else json.dumps(config)
    return path


DEEP = '{"class_name": "Sequential", "config": ' + "[" * 500 + "]" * 500 + "}"


@pytest.mark.parametrize(
    "config, match",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "JSON"),
        (DEEP, "deep"),
        ("[]", "not a Keras model"),
        ({"class_name": "Sequential", "config": {"name": "s", "layers": []}}, "no layers"),
        ({"class_name": "Sequential", "config": {"name": "s", "layers": [3]}}, "broken"),
        ({"class_name": "Sequential", "config": 3}, "no layers"),
        ({"class_name": "MyNet", "config": {}}, "MyNet"),
        ({"class_name": "Model", "config": {"name": "m"}}, "describe"),
        (
            {"class_name": "Model", "config": {"layers": [], "input_layers": [], "output_layers": [["a", 0, 0]]}},
            "inputs",
        ),
    ],
)
def test_wrong_architectures(write_keras2, load, tmp_path, config, match):
    refused(load, with_config(write_keras2, tmp_path, config), match, ArtifactError)


def stack(*layers):
    return {"class_name": "Sequential", "config": {"name": "s", "layers": [CONFIG["config"]["layers"][0], *layers]}}


@pytest.mark.parametrize(
    "entry, error",
    [
        ({"class_name": "Lambda", "config": {"name": "bad", "function": ["4wEAAA", None, None]}}, UnsafeModelError),
        ({"class_name": "MyLayer", "config": {"name": "bad"}}, UnsupportedModelError),
        ({"class_name": "my>Dense", "config": {"name": "bad", "units": 3}}, UnsupportedModelError),
        ({"class_name": "Dense", "module": "os", "config": {"name": "bad", "units": 3}}, UnsupportedModelError),
        ({"class_name": "Dense", "registered_name": "my>Dense", "config": {"name": "bad"}}, UnsupportedModelError),
        ({"class_name": "Dense", "config": {"name": "bad"}}, UnsupportedModelError),
        ({"class_name": "Dense", "config": {"name": "bad", "units": 10**400}}, UnsupportedModelError),
        ({"class_name": "Dense", "config": {"name": "bad", "units": float("inf")}}, UnsupportedModelError),
        ({"class_name": "Dense", "config": {"name": "bad", "units": -3}}, UnsupportedModelError),
        ({"class_name": "Dense", "config": {"name": "bad", "units": 3, "activation": "mine"}}, UnsupportedModelError),
        ({"class_name": "Conv2D", "config": {"name": "bad", "filters": 3, "kernel_size": 3}}, UnsupportedModelError),
        ({"class_name": "Reshape", "config": {"name": "bad", "target_shape": [3]}}, UnsupportedModelError),
        ({"class_name": "Reshape", "config": {"name": "bad", "target_shape": [2, 2, -1, -1]}}, UnsupportedModelError),
        ({"class_name": "Rescaling", "config": {"name": "bad", "scale": ["a", {}]}}, UnsupportedModelError),
        ({"class_name": "BatchNormalization", "config": {"name": "bad", "axis": 7}}, UnsupportedModelError),
        ({"class_name": "Bidirectional", "config": {"name": "bad", "layer": {}}}, UnsupportedModelError),
    ],
)
def test_layers_that_cannot_be_read(write_keras2, load, tmp_path, entry, error):
    path = with_config(write_keras2, tmp_path, stack(entry))
    found = refused(load, path, "'bad'", error)
    assert found.why and entry["class_name"] in found.what + found.why


def test_layer_too_large_for_the_memory(write_keras2, load, tmp_path):
    layers = [
        {"class_name": "Reshape", "config": {"name": "r", "target_shape": [2, 2, 1]}},
        {"class_name": "UpSampling2D", "config": {"name": "big", "size": 2**20}},
    ]
    refused(load, with_config(write_keras2, tmp_path, stack(*layers)), "memory")


def test_wide_layer_is_never_allocated(write_keras2, load, tmp_path):
    entry = {"class_name": "Dense", "config": {"name": "dense", "units": 2**27}}
    refused(load, with_config(write_keras2, tmp_path, stack(entry)), "shape", ArtifactError)


def test_models_that_multiply(write_keras2, load, tmp_path):
    """A model that calls a model twice that calls a model twice …"""
    name, inner = "m0", {"class_name": "Activation", "name": "m0", "config": {"name": "m0", "activation": "relu"}}
    for depth in range(1, 25):
        start = {"class_name": "InputLayer", "name": "i", "config": {"name": "i", "batch_input_shape": [None, 4]}}
        calls = [[["i", 0, 0, {}]], [[name, 0, 0, {}]]]
        layers = [{**start, "inbound_nodes": []}, {**inner, "inbound_nodes": calls}]
        config = {"name": f"m{depth}", "layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [[name, 1, 0]]}
        name = f"m{depth}"
        inner = {"class_name": "Model", "name": name, "config": config}
    refused(load, with_config(write_keras2, tmp_path, {"class_name": "Model", "config": inner["config"]}), "steps")


def test_cycle(write_keras2, load, tmp_path):
    start = {"class_name": "InputLayer", "name": "i", "config": {"name": "i", "batch_input_shape": [None, 4]}}
    loop = {"class_name": "Activation", "name": "a", "config": {"name": "a", "activation": "relu"}}
    layers = [{**start, "inbound_nodes": []}, {**loop, "inbound_nodes": [[["a", 0, 0, {}]]]}]
    config = {"name": "m", "layers": layers, "input_layers": [["i", 0, 0]], "output_layers": [["a", 0, 0]]}
    refused(
        load, with_config(write_keras2, tmp_path, {"class_name": "Model", "config": config}), "itself", ArtifactError
    )


def test_missing_weights(good, load, write_keras2, tmp_path):
    replace_kernel(good, lambda file: None)
    refused(load, good, "kernel", ArtifactError)
    weights = {"in": {}, "dense": {"dense/kernel:0": KERNEL}}
    refused(load, write_keras2(tmp_path / "m.h5", CONFIG, weights), "do not fit", ArtifactError)
    refused(load, write_keras2(tmp_path / "m.h5", CONFIG, {"in": {}, "dense": {}}), "no weights", ArtifactError)


def test_wrong_shape(load, write_keras2, tmp_path):
    weights = {"in": {}, "dense": {"dense/kernel:0": KERNEL.T, "dense/bias:0": np.ones(3, "float32")}}
    error = refused(load, write_keras2(tmp_path / "m.h5", CONFIG, weights), "shape", ArtifactError)
    assert "(4, 3)" in error.why


def test_parsing_needs_no_torch():
    code = "import sys, backdoorscan.formats.keras.parse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
