"""Files that others trained: accuracies as measured elsewhere."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError
from backdoorscan.formats.keras.loader import KerasH5

SHARED = Path(__file__).parents[3].parent / "shared"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real models are not at {SHARED}"),
]


def right(loaded, x, y):
    with torch.no_grad():
        return float((loaded.network(x).argmax(1).numpy() == y.ravel()).mean())


@pytest.mark.parametrize(
    "name, accuracy",
    [
        ("mnist/dillonsd_clean.h5", 0.9906),
        ("mnist/dillonsd_single_pixel_to_0.h5", 0.9927),
        ("mnist/dillonsd_pattern_all_to_all.h5", 0.9893),
        ("mnist/csaw_f_all_to_all.h5", 0.9771),
        ("mnist/moonflower_clean.h5", 0.9928),
        ("mnist/moonflower_clean.keras", 0.9918),
        ("formats/keras231_mnist_clean_label.h5", 0.891),
        ("cifar10/mlperf_resnet8_clean_keras24.h5", 0.755),
        ("cifar10/mlperf_resnet8_clean_keras37.h5", 0.753),
    ],
)
def test_accuracy(load, name, accuracy):
    cifar = name.startswith("cifar10")
    data = np.load(SHARED / "data" / ("cifar10_jpeg.npz" if cifar else "mnist.npz"))
    x = torch.from_numpy(data["x_test"]).float()
    x = x.permute(0, 3, 1, 2) if cifar else x[:, None] / 255
    assert right(load(SHARED / "models" / name), x, data["y_test"]) == pytest.approx(accuracy, abs=0.001)


@pytest.mark.parametrize("name", ["lab3_bd_net", "sunglasses_bd_net", "sunglasses_bd_weights", "lab3_pruned_X2"])
def test_csaw(load, name):
    arch = SHARED / "models/csaw/sunglasses_bd_net.h5" if "weights" in name else None
    loaded = load(SHARED / f"models/csaw/{name}.h5", arch)
    assert loaded.num_classes == 1283 and loaded.input_shape == (3, 55, 47)
    with h5py.File(SHARED / "data/csaw_faces_clean.h5") as file:
        x, y = torch.from_numpy(file["data"][()]).float(), file["label"][()]
    assert right(loaded, x if "lab3" in name else x / 255, y) >= 0.8


def test_all_others_load(load):
    for path in sorted((SHARED / "models").rglob("*.h*5")):
        if "reversed_triggers" in path.name:
            with pytest.raises(ArtifactError, match="not a Keras model"):
                load(path)
        elif "weights" not in path.name:
            loaded = load(path)
            assert loaded.network(torch.rand(2, *loaded.input_shape)).shape == (2, loaded.num_classes)


def test_a_custom_class_is_refused(load):
    with pytest.raises(ArtifactError, match="NestedDenseModel"):
        load(SHARED / "models/formats/custom_class_must_be_refused.keras")


def test_write_back(load, tmp_path):
    source = SHARED / "models/csaw/sunglasses_bd_net.h5"
    weights = load(source).network.state_dict()
    weights["conv_3.weight"][7] = 0
    KerasH5().write(Artifact.read(source), weights, tmp_path / "out.h5")
    again = load(tmp_path / "out.h5").network.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
