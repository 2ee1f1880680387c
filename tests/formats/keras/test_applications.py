"""Whole architectures of keras.applications, in both formats, against Keras itself."""

from __future__ import annotations

import numpy as np
import pytest

SIZES = {"MobileNetV2": 32, "ResNet50": 32, "EfficientNetB0": 32, "DenseNet121": 32, "InceptionV3": 75}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5", ".keras"])
@pytest.mark.parametrize("name", SIZES)
def test_agrees_with_keras(keras, scramble, load, run, tmp_path, name, suffix):
    size = SIZES[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)
    scramble(model, gently=True)
    model.save(tmp_path / f"m{suffix}")
    x = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype("float32")
    expected = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))
    assert expected.std() > 0.01
    difference = np.abs(run(load(tmp_path / f"m{suffix}"), x) - expected).max()
    assert difference / np.abs(expected).max() < 1e-4
