"""The first stage: bytes of a Keras ``.h5`` (or of its JSON twin) to plain data. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import h5py
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.hdf5 import Budget, is_hdf5, names_attribute, opened, text_attribute

_MAX_CONFIG_BYTES = 64 * 2**20
_MAX_CONFIG_DEPTH = 200


@dataclass(frozen=True)
class StoredWeight:
    """One array of the file.

    Attributes:
        name: As the file's ``weight_names`` spell it, e.g. ``"conv_1/kernel:0"``.
        dataset: Its path in the file.
        array: The values, as stored.
    """

    name: str
    dataset: str
    array: NDArray[Any] = field(repr=False)


@dataclass(frozen=True)
class WeightGroup:
    """The arrays of one top-level layer, in the file's own order."""

    layer: str
    weights: tuple[StoredWeight, ...]


@dataclass(frozen=True)
class ParsedKeras:
    """What a file says, as plain data.

    Attributes:
        config: The architecture (``class_name`` and ``config``), or ``None`` where the file holds weights alone.
        keras_version: As the file says, e.g. ``"2.3.1"``; empty where it says nothing.
        backend: As the file says, e.g. ``"tensorflow"``; empty where it says nothing.
        groups: The weights by top-level layer.
    """

    config: dict[str, Any] | None
    keras_version: str = ""
    backend: str = ""
    groups: tuple[WeightGroup, ...] = ()


def parse(data: bytes, name: str) -> ParsedKeras:
    """Read a Keras ``.h5`` file.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The file is broken or holds no Keras model.
        UnsafeModelError: Reading it would touch other files or exhaust the memory.
    """
    with opened(data, name) as file:
        text = text_attribute(file, "model_config")
        store = file
        if "model_weights" in file and isinstance(file["model_weights"], h5py.Group):
            store = file["model_weights"]
        layers = names_attribute(store, "layer_names")
        if layers is None:
            raise _no_model(file, name)
        budget = Budget(len(data), name)
        return ParsedKeras(
            config=None if text is None else parse_config(text, name),
            keras_version=text_attribute(file, "keras_version") or text_attribute(store, "keras_version") or "",
            backend=text_attribute(file, "backend") or text_attribute(store, "backend") or "",
            groups=tuple(_read_group(store, layer, budget, name) for layer in layers),
        )


def parse_architecture(data: bytes, name: str) -> ParsedKeras:
    """Read the architecture alone, from a whole-model ``.h5`` or from what ``Model.to_json`` wrote.

    Raises:
        ArtifactError: The file holds no architecture.
    """
    if is_hdf5(data):
        with opened(data, name) as file:
            text = text_attribute(file, "model_config")
            version = text_attribute(file, "keras_version") or ""
        if text is None:
            raise ArtifactError(
                f"{name} holds no architecture.", hint="Give a whole-model .h5 or the JSON of Model.to_json()."
            )
        return ParsedKeras(parse_config(text, name), version)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{name} is neither a Keras .h5 nor a JSON file.",
            why=str(error),
            hint="Give a whole-model .h5 or the JSON of Model.to_json().",
        ) from error
    config = parse_config(text, name)
    written_by = config.get("keras_version")
    return ParsedKeras(config, written_by if isinstance(written_by, str) else "")


def parse_config(text: str, name: str) -> dict[str, Any]:
    """Parse an architecture's JSON, bounded in size and depth.

    Raises:
        ArtifactError: It is no JSON object with ``class_name`` and ``config``.
        UnsafeModelError: It is larger or deeper than any architecture.
    """
    if len(text) > _MAX_CONFIG_BYTES:
        raise UnsafeModelError(
            f"{name} was refused: its architecture is {len(text):,} characters long.",
            hint="Do not use this file; ask its publisher for a plain copy.",
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"The architecture in {name} is not valid JSON.",
            why=str(error),
            hint="Save the model again with Keras.",
        ) from error
    _check_depth(config, name)
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str) or "config" not in config:
        raise ArtifactError(
            f"The architecture in {name} is not a Keras model.",
            why="It is not a JSON object with 'class_name' and 'config'.",
            hint="Give a whole-model .h5 or the JSON of Model.to_json().",
        )
    return config


def _check_depth(config: Any, name: str) -> None:
    """Later stages walk the JSON recursively; a too deep one must not exhaust Python's stack."""
    level: list[Any] = [config]
    for _ in range(_MAX_CONFIG_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise UnsafeModelError(
        f"{name} was refused: its architecture is nested more than {_MAX_CONFIG_DEPTH} levels deep.",
        hint="Do not use this file; ask its publisher for a plain copy.",
    )


def _read_group(store: h5py.Group, layer: str, budget: Budget, name: str) -> WeightGroup:
    group = store.get(layer)
    names = names_attribute(group, "weight_names") if isinstance(group, h5py.Group) else None
    if names is None:
        raise ArtifactError(
            f"{name} lists the layer '{layer}', but not its weights.",
            why=f"There is no group '{layer}' with the attribute 'weight_names'.",
            hint="Save the model again with Keras.",
        )
    weights = []
    for weight in names:
        dataset = group.get(weight)
        if not isinstance(dataset, h5py.Dataset):
            raise ArtifactError(
                f"{name} lists the weight '{weight}' of layer '{layer}', but does not hold it.",
                hint="Save the model again with Keras, or download the file again.",
            )
        weights.append(StoredWeight(weight, f"{group.name}/{weight}", budget.read(dataset)))
    return WeightGroup(layer, tuple(weights))


def _no_model(file: h5py.File, name: str) -> ArtifactError:
    if "layers" in file or "_layer_checkpoint_dependencies" in file:
        return UnsupportedModelError(
            f"{name} holds weights alone, in Keras 3's own layout (.weights.h5).",
            why="They are stored by position, without the layers' names.",
            hint="Save the whole model with model.save('model.h5') or model.save('model.keras').",
        )
    names = ", ".join(sorted(file)[:5])
    return ArtifactError(
        f"{name} is an HDF5 file, but not a Keras model.",
        why=f"It has neither model_config nor layer_names; it holds: {names or 'nothing'}.",
        hint="Images and labels go to --valid or --poisoned.",
    )
