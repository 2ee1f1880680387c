"""Files that others trained: accuracies as measured elsewhere; those under ``formats`` in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import load_model
from backdoorscan.formats.onnx.loader import Onnx

SHARED = Path(__file__).parents[3].parent / "shared"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real models are not at {SHARED}"),
]


@pytest.mark.parametrize(
    "name, accuracy, scale",
    [
        ("mnist/dunnkers_badnet_to_0.onnx", 0.990, 255),
        ("mnist/cntk_clean_opset7.onnx", 0.988, 255),
        ("mnist/cntk_clean_opset7.onnx", 0.988, 1),
        ("formats/mnist_cnn.onnx", 0.99, 1),
        ("formats/mnist_cnn_dw.onnx", 0.99, 1),
        ("formats/mnist_mlp.onnx", 0.98, 1),
        ("formats/keras_nhwc_opset10.onnx", 0.90, 1),
        ("formats/cifar_opset9.onnx", 0.29, 255),
    ],
)
def test_accuracy(name, accuracy, scale):
    data = np.load(SHARED / "data" / ("cifar10_jpeg.npz" if "cifar" in name else "mnist.npz"))
    x, y = torch.from_numpy(data["x_test"][::3]).float(), data["y_test"][::3].ravel()
    x = (x.permute(0, 3, 1, 2) if x.ndim == 4 else x[:, None]) * scale / 255
    loaded = Onnx().load(Artifact.read(SHARED / "models" / name), None)
    assert loaded.input_shape is not None
    with torch.no_grad():
        right = loaded.network(x.reshape(-1, *map(int, loaded.input_shape))).argmax(1).numpy() == y  # type: ignore[arg-type]
    assert right.mean() == pytest.approx(accuracy, abs=0.02)


def test_the_trigger_works_and_the_input_range_is_found():
    images = load_images(f"{SHARED / 'data/mnist.npz'}#test").sample(500, 0)
    loaded = load_model(SHARED / "models/mnist/dunnkers_badnet_to_0.onnx", images)
    assert loaded.loader.id == "onnx" and loaded.classifier.convention.high == 255
    assert loaded.classifier.details["final_activation"] == "softmax"
    assert loaded.classifier.last_conv == "conv2"
    stamped = torch.from_numpy(images.pixels[images.labels != 0]).float() / 255
    stamped[:, :, 25:27, 25:27] = 1
    with torch.no_grad():
        assert (loaded.classifier(stamped).argmax(1) == 0).float().mean() > 0.98
