"""Writes a copy of a whole model whose head has one class more."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.formats.changes import changed_tensors
from backdoorscan.formats.extending import grown_head, no_class_more
from backdoorscan.formats.keras.editing import Edit
from backdoorscan.formats.keras.network import BuiltNetwork
from backdoorscan.formats.keras.write import WHY_CONSTANT, as_array, overwritten, write_edited

_SIZES = {"Dense": "units", "Conv2D": "filters"}
"""The setting that says how many outputs a layer has; its kernel and bias count them along their last axis."""


def with_class_more(
    artifact: Artifact, config: Mapping[str, Any], built: BuiltNetwork, weights: Mapping[str, Tensor]
) -> bytes:
    """The artifact's bytes with one output more in the head, and with changed tensors overwritten.

    What only training needs (optimizer, losses) is left out of the copy: it was made for the classes there were.

    Args:
        artifact: The original file, which holds its architecture.
        config: Its architecture.
        built: The network as the original describes it.
        weights: Tensors by their name in the network; weight and bias of the head have one row more.

    Raises:
        UnsupportedModelError: What grew is no head that can be written.
        ArtifactError: A tensor is unknown or is not stored in the file.
    """
    original = built.network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    head = grown_head(artifact, shapes, weights)
    grown = {name: weights[name] for name in (f"{head}.weight", f"{head}.bias")}
    rest = {name: tensor for name, tensor in weights.items() if name not in grown}
    changed = changed_tensors(artifact, original, rest, built.origins, WHY_CONSTANT)
    architecture = copy.deepcopy(dict(config))
    architecture.pop("compile_config", None)
    layer = _entry(architecture, built.origins[f"{head}.weight"][0].path)
    if layer is None or layer["class_name"] not in _SIZES:
        raise no_class_more(artifact, f"'{head}' is no layer that is written so.")
    layer["config"][_SIZES[layer["class_name"]]] += 1
    text = json.dumps(architecture).encode()

    values = overwritten(built, changed) | dict(_grown(built, name, tensor) for name, tensor in grown.items())
    return write_edited(artifact, Edit(values, text))


def _entry(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    """A layer's own part of the architecture, from the names of the models around it and its own."""
    for name in path:
        inside = config["config"]
        for entry in inside if isinstance(inside, list) else inside["layers"]:
            values = entry["config"] if isinstance(entry["config"], dict) else {}
            if (entry.get("name") or values.get("name")) == name:
                config = entry
                break
        else:
            return None
    return config


def _grown(built: BuiltNetwork, name: str, tensor: Tensor) -> tuple[str, NDArray[Any]]:
    """The path and the larger values of one of the head's datasets."""
    slot, weight = built.origins[name]
    larger = replace(slot, file_shape=(*slot.file_shape[:-1], len(tensor)), shape=tuple(tensor.shape))
    new = larger.to_file(as_array(tensor))
    values = new.astype(weight.array.dtype)
    # Where the file stores more digits than float32 holds, values that did not change keep them.
    values[..., :-1] = np.where(weight.array.astype(np.float32) == new[..., :-1], weight.array, values[..., :-1])
    return weight.dataset, values
