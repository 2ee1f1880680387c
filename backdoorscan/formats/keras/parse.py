"""The first stage: bytes of a Keras file (``.h5``, ``.keras``, or the JSON of one) to plain data. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import h5py
from h5py import h5o
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError, UnsafeModelError, UnsupportedModelError
from backdoorscan.formats.keras.architecture import parse_config
from backdoorscan.formats.keras.archive import CONFIG, METADATA, WEIGHTS, is_also_archive, is_archive, read_members
from backdoorscan.formats.keras.hdf5 import Budget, is_hdf5, names_attribute, opened, text_attribute

NUMBERED = "layers"
"""The group in which Keras 3 and tf.keras put a model's layers where weights go by number."""


@dataclass(frozen=True)
class StoredWeight:
    """One array of the file.

    Attributes:
        name: As the file's ``weight_names`` spell it, e.g. ``"conv_1/kernel:0"``; or its number, e.g. ``"0"``.
        dataset: Its path in the HDF5 file.
        array: The values, as stored.
    """

    name: str
    dataset: str
    array: NDArray[Any] = field(repr=False)


@dataclass(frozen=True)
class WeightGroup:
    """The arrays of one layer, in the file's own order.

    Attributes:
        layer: The name of a top-level layer; or where weights go by number, a path, e.g. ``"layers/conv2d_1"``.
        weights: With those of inner layers, unless weights go by number.
    """

    layer: str
    weights: tuple[StoredWeight, ...]


@dataclass(frozen=True)
class ParsedKeras:
    """What a file says, as plain data.

    Attributes:
        config: The architecture (``class_name`` and ``config``), or ``None`` where the file holds weights alone.
        keras_version: As the file says, e.g. ``"2.3.1"``; empty where it says nothing.
        backend: As the file says, e.g. ``"tensorflow"``; empty where it says nothing.
        groups: The weights by layer.
        numbered: Whether layers and weights go by class and number (``.keras``), not by name (``.h5``).
    """

    config: dict[str, Any] | None
    keras_version: str = ""
    backend: str = ""
    groups: tuple[WeightGroup, ...] = ()
    numbered: bool = False


def parse(data: bytes, name: str) -> ParsedKeras:
    """Read a Keras file: ``.h5`` or ``.keras``, a whole model or weights alone, or an architecture's JSON.

    Args:
        data: The file's bytes.
        name: What to call the file in errors.

    Raises:
        ArtifactError: The file is broken or holds no Keras model.
        UnsafeModelError: Reading it would touch other files or exhaust the memory.
    """
    if is_hdf5(data):
        if is_also_archive(data):
            raise UnsafeModelError(
                f"{name} was refused: it is an HDF5 file and a zip archive at once.",
                why="Keras goes by the file's name, and would load another model under another name.",
                hint="Do not use this file; ask its publisher for a plain copy.",
            )
        return _parse_hdf5(data, name)
    if is_archive(data):
        return _parse_archive(data, name)
    config = parse_config(_text(data, name), name)
    return ParsedKeras(config, _version(config))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{name} is neither a Keras model nor the JSON of one.",
            why=str(error),
            hint="Give a whole-model .h5 or .keras file, or the JSON of Model.to_json().",
        ) from error


def _version(facts: Any) -> str:
    version = facts.get("keras_version") if isinstance(facts, dict) else None
    return version if isinstance(version, str) else ""


def _parse_archive(data: bytes, name: str) -> ParsedKeras:
    members = read_members(data, name)
    for member in (CONFIG, WEIGHTS):
        if member not in members:
            raise UnsupportedModelError(
                f"{name} is a zip archive without '{member}'.",
                why="Models in several parts and weights in other formats cannot be read.",
                hint="Save the model again with model.save('model.keras').",
            )
    try:
        version = _version(json.loads(members.get(METADATA, b"{}")))
    except (ValueError, RecursionError):
        version = ""
    inner = f"{name} ({WEIGHTS})"
    with opened(members[WEIGHTS], inner) as file:
        groups = _numbered_groups(file, Budget(len(members[WEIGHTS]), inner))
    return ParsedKeras(parse_config(_text(members[CONFIG], name), name), version, groups=groups, numbered=True)


def _parse_hdf5(data: bytes, name: str) -> ParsedKeras:
    with opened(data, name) as file:
        text = text_attribute(file, "model_config")
        store = file
        if "model_weights" in file and isinstance(file["model_weights"], h5py.Group):
            store = file["model_weights"]
        layers = names_attribute(store, "layer_names")
        budget = Budget(len(data), name)
        if layers is None:
            if text is None and isinstance(file.get(NUMBERED), h5py.Group):
                return ParsedKeras(None, groups=_numbered_groups(file, budget), numbered=True)
            raise _no_model(file, name)
        return ParsedKeras(
            config=None if text is None else parse_config(text, name),
            keras_version=text_attribute(file, "keras_version") or text_attribute(store, "keras_version") or "",
            backend=text_attribute(file, "backend") or text_attribute(store, "backend") or "",
            groups=tuple(_read_group(store, layer, budget, name) for layer in layers),
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


def _numbered_groups(file: h5py.File, budget: Budget) -> tuple[WeightGroup, ...]:
    """The arrays in all groups ``vars``, each under the path of its layer; the optimizer's are left out."""
    groups: list[WeightGroup] = []
    # A group may hold itself under another name; Keras never writes that, so what is met again is not followed.
    seen: set[Any] = set()
    waiting = [(NUMBERED, file.get(NUMBERED))]
    while waiting:
        path, group = waiting.pop()
        if not isinstance(group, h5py.Group) or (address := h5o.get_info(group.id).addr) in seen:
            continue
        seen.add(address)
        if path.endswith("/vars"):
            weights = [
                StoredWeight(key, f"/{path}/{key}", budget.read(group[key]))
                for key in sorted(group, key=lambda key: (len(key), key))
                if isinstance(group[key], h5py.Dataset)
            ]
            groups.append(WeightGroup(path.removesuffix("/vars"), tuple(weights)))
        else:
            waiting += [(f"{path}/{key}", group[key]) for key in group]
    return tuple(sorted(groups, key=lambda group: group.layer))


def _no_model(file: h5py.File, name: str) -> ArtifactError:
    names = ", ".join(sorted(file)[:5])
    return ArtifactError(
        f"{name} is an HDF5 file, but not a Keras model.",
        why=f"It has neither model_config nor layer_names; it holds: {names or 'nothing'}.",
        hint="Images and labels go to --valid or --poisoned.",
    )
