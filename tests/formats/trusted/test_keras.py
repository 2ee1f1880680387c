"""Keras models with code in them: refused, or run in the sandbox."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from backdoorscan.errors import UnsafeModelError

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5 file.*")
def test_a_lambda_layer(suffix, read, tmp_path):
    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.Lambda(lambda x: x * 2.0 + 1.0),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )
    path = tmp_path / f"m{suffix}"
    model.save(path)
    with pytest.raises(UnsafeModelError, match="Lambda") as caught:
        read(path, trust=False)
    assert "--trust" in caught.value.hint
    loaded = read(path, trust=True)
    images = np.random.default_rng(0).random((4, 8, 8, 3), dtype=np.float32)
    with torch.no_grad():
        found = loaded.classifier(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    assert np.allclose(found, expected, atol=1e-5)
    assert loaded.facts["converted_from"] == "keras" and loaded.facts["layout"] == "NHWC"
