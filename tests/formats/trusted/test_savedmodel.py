"""SavedModels: refused, or run in the sandbox."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from backdoorscan.errors import ArtifactError, UnsafeModelError, UsageError
from backdoorscan.formats.loading import ReadOptions, load_model, read_artifact
from backdoorscan.formats.onnx import loader as onnx_loader
from backdoorscan.formats.trusted import apart, savedmodel
from backdoorscan.registry import Registry

INSTALLED = all(importlib.util.find_spec(name) for name in ("tensorflow", "tf2onnx"))
with_tensorflow = pytest.mark.skipif(not INSTALLED, reason="needs the extra tensorflow")

MAKE = """
import sys
import tensorflow as tf
from tensorflow.python.trackable.resource import CapturableResource

class Writing(CapturableResource):
    def _create_resource(self):
        return tf.raw_ops.MutableHashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

    def _initialize(self):
        tf.io.write_file(sys.argv[2], "written")
        return tf.constant(1)

class Net(tf.Module):
    def __init__(self):
        self.weight = tf.constant([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0], [3.0, 0.0, -2.0]])
        if len(sys.argv) > 2:
            self.resource = Writing()

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32)])
    def scores(self, images):
        if len(sys.argv) > 2:
            self.resource.resource_handle
        return {"scores": tf.reduce_mean(tf.nn.relu(images - 0.3), [1, 2]) @ self.weight}

net = Net()
tf.saved_model.save(net, sys.argv[1], signatures={"serving_default": net.scores})
"""


@pytest.fixture
def registry(registry_of: Callable[..., Registry]) -> Registry:
    made = registry_of()
    made.add(lambda: savedmodel, "savedmodel", "x", "1")
    made.add(lambda: onnx_loader, "onnx", "x", "1")
    return made


def test_it_is_known_and_refused(registry, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(UnsafeModelError, match="SavedModel") as caught:
        load_model(tmp_path, None, registry=registry)
    assert "--trust" in caught.value.hint and "ONNX" in caught.value.hint


@pytest.mark.skipif(INSTALLED, reason="tensorflow is installed")
def test_what_converts_it_must_be_installed(registry, tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(UsageError, match="not converted") as caught:
        load_model(tmp_path, None, ReadOptions(trust=True), registry=registry)
    assert "tf2onnx" in caught.value.why and "backdoorscan[tensorflow]" in caught.value.hint


@with_tensorflow
def test_the_scores_are_those_of_the_graph(registry, tmp_path):
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "m")], check=True, capture_output=True)
    loaded = load_model(tmp_path / "m", None, ReadOptions(input_range=(0, 1), trust=True), registry=registry)
    images = np.random.default_rng(0).random((4, 8, 8, 3), dtype=np.float32)
    weight = np.array([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0], [3.0, 0.0, -2.0]])
    expected = np.maximum(images - 0.3, 0).mean((1, 2)) @ weight
    with torch.no_grad():
        scores = loaded.classifier(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.allclose(scores, expected, atol=1e-5)
    facts = loaded.facts
    assert facts["converted_from"] == "tensorflow-savedmodel" and facts["converted_to"] == "onnx"
    assert facts["sha256"] == read_artifact(tmp_path / "m", registry).sha256


@with_tensorflow
def test_what_it_runs_stays_in_the_sandbox(registry, tmp_path):
    outside = tmp_path / "outside"
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "m"), str(outside)], check=True, capture_output=True)
    outside.unlink(missing_ok=True)
    confinement = apart.confinement()
    if confinement != "no files, no network":
        pytest.skip(f"this system: {confinement}")
    with pytest.raises(ArtifactError):
        load_model(tmp_path / "m", None, ReadOptions(input_range=(0, 1), trust=True), registry=registry)
    assert not outside.exists()
    code = "import sys, tensorflow; tensorflow.saved_model.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True, capture_output=True)
    assert outside.exists(), "the SavedModel is not hostile after all"
