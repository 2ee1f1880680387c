"""Models of Keras 3 (on torch) as the truth, and files in the layout of Keras 2 written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import numpy as np
import pytest
import torch

from backdoorscan.artifact import Artifact
from backdoorscan.formats.keras.loader import KerasH5, KerasV3
from backdoorscan.plugin.loader import LoadedNetwork


@pytest.fixture(scope="session")
def keras() -> Any:
    module = pytest.importorskip("keras")
    module.utils.set_random_seed(7)
    return module


def randomize(model: Any, seed: int = 0, *, gently: bool = False) -> None:
    """Random weights everywhere, or in normalisations alone; variances positive."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "seed" in weight.path or "count" in weight.path:
            continue
        if gently and weight.path.rsplit("/", 1)[-1] in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            continue
        positive = "variance" in weight.path or "gamma" in weight.path
        values = (
            rng.uniform(0.5, 1.5, weight.shape) if positive else rng.normal(0, 0.1 if gently else 0.4, weight.shape)
        )
        weight.assign(values.astype("float32"))


def to_network(x: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def run_network(loaded: LoadedNetwork, x: np.ndarray) -> np.ndarray:
    tensor = to_network(x) if loaded.layout == "NHWC" else torch.from_numpy(x)
    with torch.no_grad():
        return np.asarray(loaded.network(tensor))


def load_file(path: Path, arch: Path | None = None) -> LoadedNetwork:
    artifact = Artifact.read(path)
    loader = KerasV3() if KerasV3().accepts(artifact) else KerasH5()
    return loader.load(artifact, None if arch is None else str(arch))


@pytest.fixture
def same(keras: Any, tmp_path: Path) -> Callable[..., LoadedNetwork]:
    """Save a Keras model in both formats, read it, compare what all compute; return what was read."""

    def compare(
        model: Any, *, tolerance: float = 1e-5, size: tuple[int, ...] | None = None, gently: bool = False
    ) -> LoadedNetwork:
        randomize(model, gently=gently)
        shape = size or tuple(model.input_shape[1:])
        x = np.random.default_rng(1).normal(0, 1, (3, *shape)).astype("float32")
        expected = np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))
        assert np.isfinite(expected).all()
        for suffix in (".keras", ".h5"):
            model.save(tmp_path / f"model{suffix}")
            loaded = load_file(tmp_path / f"model{suffix}")
            actual = run_network(loaded, x)
            assert actual.shape == expected.reshape(actual.shape).shape
            np.testing.assert_allclose(actual, expected.reshape(actual.shape), atol=tolerance, rtol=tolerance)
            assert loaded.num_classes == actual.shape[1]
            assert not any(tensor.is_meta for tensor in loaded.network.state_dict().values())
        return loaded

    return compare


@pytest.fixture
def check(keras: Any, same: Callable[..., LoadedNetwork]) -> Callable[..., LoadedNetwork]:
    """Compare a stack of layers, followed by Flatten where it does not end in scores."""

    def compare(*layers: Any, shape: tuple[int | None, ...] = (7, 6, 3), **options: Any) -> LoadedNetwork:
        model = keras.Sequential([keras.Input(shape), *layers])
        if len(model.output_shape) != 2:
            model.add(keras.layers.Flatten(name="flat_end"))
        return same(model, **options)

    return compare


def write_file(
    path: Path,
    config: Any,
    weights: dict[str, dict[str, np.ndarray]],
    *,
    version: str = "2.3.1",
    whole: bool = True,
    as_bytes: bool = True,
) -> Path:
    """Write a file as Keras 2 did: ``weights`` maps layers to names (``conv/kernel:0``) to arrays."""
    with h5py.File(path, "w") as file:
        store = file
        if whole:
            text = json.dumps(config)
            file.attrs["model_config"] = text.encode() if as_bytes else text
            file.attrs["keras_version"] = version.encode() if as_bytes else version
            store = file.create_group("model_weights")
        store.attrs["keras_version"] = version.encode()
        store.attrs["backend"] = b"tensorflow"
        store.attrs["layer_names"] = [name.encode() for name in weights]
        for layer, arrays in weights.items():
            group = store.create_group(layer)
            group.attrs["weight_names"] = np.array([name.encode() for name in arrays], dtype="S64")
            for name, array in arrays.items():
                group.create_dataset(name, data=array)
    return path


@pytest.fixture
def run() -> Callable[..., np.ndarray]:
    """Run a loaded network on inputs in the file's own order of axes."""
    return run_network


@pytest.fixture
def load() -> Callable[..., LoadedNetwork]:
    """Load a file."""
    return load_file


@pytest.fixture
def write_keras2() -> Callable[..., Path]:
    """Write a file as Keras 2 did."""
    return write_file


@pytest.fixture
def scramble() -> Callable[..., None]:
    """Give a Keras model random weights."""
    return randomize
