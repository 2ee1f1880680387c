"""Writes a torch network as a Keras whole-model HDF5 file, without Keras.

The dialect is that of Keras 2 (``batch_input_shape``, activations by name), which Keras 3 opens too. The file
takes images (N, H, W, C): kernels are transposed, and the first dense kernel's rows are put in the order in
which Keras flattens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

Weights: TypeAlias = dict[str, npt.NDArray[np.float32]]
Shape: TypeAlias = tuple[int, ...]

_VERSION = "2.15.0"  # the Keras whose dialect this is


def write_keras(
    place: Path | BinaryIO, network: nn.Sequential, input_shape: tuple[int, int, int], name: str = "network"
) -> None:
    """Write ``network`` with a softmax behind its last layer; the same weights give the same bytes.

    Args:
        place: The ``.h5`` file, where one that exists is replaced, or an open one.
        network: From (N, C, H, W) to logits: 3×3 Conv2d with a padding of 1, MaxPool2d, Flatten and Linear,
            with ReLU behind a Conv2d or a Linear.
        input_shape: (C, H, W).
        name: The model's name in the file.

    Raises:
        ValueError: A layer of another kind.
        OSError: The file cannot be written.
    """
    configs, weights = _convert(network, input_shape)
    model = {"class_name": "Sequential", "config": {"name": name, "layers": configs}}
    with h5py.File(place, "w") as file:
        file.attrs["keras_version"] = _VERSION
        file.attrs["backend"] = "tensorflow"
        file.attrs["model_config"] = json.dumps(model)
        root = file.create_group("model_weights")
        root.attrs["keras_version"] = _VERSION
        root.attrs["backend"] = "tensorflow"
        root.attrs["layer_names"] = np.array([layer.encode() for layer in weights])
        for layer, arrays in weights.items():
            group = root.create_group(layer)
            names = [f"{layer}/{key}:0".encode() for key in arrays]
            group.attrs["weight_names"] = np.array(names, dtype=None if names else "S1")  # "S0" has no HDF5 type
            for key, array in arrays.items():
                # A time of change would make every file another one.
                group.create_dataset(f"{layer}/{key}:0", data=array, track_times=False)


def _convert(network: nn.Sequential, input_shape: Shape) -> tuple[list[dict[str, Any]], dict[str, Weights]]:
    """The layers' entries in the model's configuration, and each layer's weights by its name, both in order."""
    channels, height, width = input_shape
    configs = [_entry("InputLayer", "images", batch_input_shape=[None, height, width, channels])]
    weights: dict[str, Weights] = {}
    shape: Shape = input_shape  # of what flows between the layers, (C, H, W)
    flattened: Shape = ()  # the shape in front of a Flatten whose Linear is still to come
    for index, layer in enumerate(network):
        if isinstance(layer, nn.ReLU) and configs[-1]["class_name"] in ("Conv2D", "Dense"):
            configs[-1]["config"]["activation"] = "relu"
            continue
        name = f"{type(layer).__name__.lower()}_{index}"
        weights[name] = {}
        match layer:
            case nn.Conv2d(stride=(1, 1), dilation=(1, 1), groups=1, padding=(1, 1), kernel_size=(3, 3)):
                configs.append(_entry("Conv2D", name, filters=layer.out_channels, kernel_size=[3, 3], padding="same"))
                weights[name] = _arrays(layer.weight.permute(2, 3, 1, 0), layer.bias)
                shape = (layer.out_channels, *shape[1:])
            case nn.MaxPool2d(kernel_size=int(size), padding=0, dilation=1) if layer.stride == size:
                configs.append(_entry("MaxPooling2D", name, pool_size=[size, size], strides=[size, size]))
                shape = (shape[0], shape[1] // size, shape[2] // size)
            case nn.Flatten():
                configs.append(_entry("Flatten", name))
                flattened = shape
            case nn.Linear():
                kernel = layer.weight
                if flattened:  # torch flattens channel by channel, Keras pixel by pixel
                    kernel = kernel.reshape(-1, *flattened).permute(0, 2, 3, 1).flatten(1)
                    flattened = ()
                configs.append(_entry("Dense", name, units=layer.out_features))
                weights[name] = _arrays(kernel.T, layer.bias)
            case _:
                raise ValueError(f"Layer {index}, {layer}, cannot be written as a Keras layer.")
    configs[-1]["config"]["activation"] = "softmax"
    return configs, weights


def _entry(kind: str, name: str, **options: object) -> dict[str, Any]:
    """One layer of the model's configuration; Keras's defaults hold for what ``options`` leave out."""
    if kind in ("Conv2D", "MaxPooling2D", "Flatten"):
        options["data_format"] = "channels_last"  # the default is the user's setting, not the file's
    return {"class_name": kind, "config": {"name": name, "dtype": "float32", **options}}


def _arrays(kernel: Tensor, bias: Tensor | None) -> Weights:
    """The weights of one layer under the names that Keras gives them."""
    if bias is None:
        raise ValueError("A layer without a bias cannot be written as a Keras layer.")
    return {key: np.ascontiguousarray(value.detach().numpy()) for key, value in (("kernel", kernel), ("bias", bias))}
