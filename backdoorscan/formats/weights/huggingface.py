"""Folders as Hugging Face keeps models: ``config.json`` beside the weights, in one file or in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import ArtifactError, OutputError, UnsupportedModelError
from backdoorscan.files import whole_folder
from backdoorscan.formats.weights.contents import StateDict, TensorSpec
from backdoorscan.formats.weights.loader import Checkpoint, WeightsLoader, states_of
from backdoorscan.plugin.loader import LoadedNetwork

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_NAMES = tuple(name for weights in _WEIGHTS for name in (weights, weights + _INDEX))
"""Where the weights are, likeliest first."""

_POINTER = b"version https://git-lfs"
_MAX_SIDE = 4096
_POOLS = ("avg", "max", "avgmax", "catavgmax", "token", "map", "fast")


class HuggingFace(WeightsLoader):
    """Folders with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.

    A configuration of timm names the architecture and says how images were fed. One of transformers does not describe
    its network; code that it refers to (``auto_map``) is never followed.
    """

    id = "huggingface"
    summary = "Hugging Face folders: config.json with model.safetensors or pytorch_model.bin"
    suffix = ""

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it is a folder with weights under one of the usual names."""
        return not artifact.data and any(name in artifact.parts for name in _NAMES)

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the weights into the architecture that the user, or else a configuration of timm, names.

        Raises:
            UnsupportedModelError: The configuration is of transformers, and there is no ``--arch``.
            UsageError: There is no architecture, or it cannot be built.
            ArtifactError: The folder is broken or unsafe, or does not fit the architecture.
        """
        config = _config(artifact)
        if arch is None and "architecture" not in config and ("architectures" in config or "model_type" in config):
            kinds = config.get("architectures")
            kind = kinds[0] if isinstance(kinds, list) and kinds else config.get("model_type")
            raise UnsupportedModelError(
                f"{artifact.path} is a model of transformers: {str(kind)[:100]}.",
                why="Its configuration does not describe the network; the code that it refers to is never run.",
                hint="Export it to ONNX (optimum-cli export onnx --model FOLDER OUTPUT) and give the .onnx file, or "
                "pass --arch.",
            )
        return super().load(artifact, arch)

    def checkpoint(self, artifact: Artifact) -> Checkpoint:
        """The weights and what the configuration says of them."""
        config = _config(artifact)
        described = config.get("pretrained_cfg", config)
        if not isinstance(described, dict):
            raise _broken(artifact, _CONFIG, "pretrained_cfg is no object")
        details: dict[str, Any] = {}
        shape = _shape(artifact, described)
        if shape is not None:
            details["input_size"] = list(shape)
        arch = config.get("architecture")
        if arch is not None:
            details |= {"architecture": f"timm:{arch}", "model_args": _settings(artifact, config)}
        return Checkpoint(
            _states(artifact),
            artifact.parts,
            details.get("architecture"),
            details.get("model_args", {}),
            details,
            _convention(artifact, described),
            shape,
        )

    def save(self, files: Mapping[str, bytes], path: Path) -> None:
        """Write the folder."""
        with whole_folder(path) as place:
            for name, data in files.items():
                try:
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                    (place / name).write_bytes(data)
                except OSError as error:
                    raise OutputError(f"Cannot write {path / name}.", why=str(error)) from error


def _config(artifact: Artifact) -> dict[str, Any]:
    return _json(artifact, _CONFIG) if _CONFIG in artifact.parts else {}


def _json(artifact: Artifact, name: str) -> dict[str, Any]:
    try:
        content = json.loads(artifact.parts[name])
    except (ValueError, RecursionError) as error:
        raise _broken(artifact, name, str(error)) from error
    if not isinstance(content, dict):
        raise _broken(artifact, name, "it is no JSON object")
    return content


def _broken(artifact: Artifact, name: str, why: str) -> ArtifactError:
    what = f"{artifact.path}/{name} is damaged or not what Hugging Face writes."
    return ArtifactError(what, why=f"{why[:300]}.", hint="Download the folder again.")


def _numbers(values: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) in (1, 3)
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def _settings(artifact: Artifact, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that timm is to build the network with; classes and channels follow from the weights."""
    given = config.get("model_args") or {}
    if not isinstance(given, dict):
        raise _broken(artifact, _CONFIG, "model_args is no object")
    settings = {name: value for name, value in given.items() if name not in ("num_classes", "in_chans")}
    side = settings.get("img_size")
    known = {
        "global_pool": settings.get("global_pool") in _POOLS,
        "img_size": _is_side(side) or (isinstance(side, list) and len(side) == 2 and all(map(_is_side, side))),
    }
    unknown = [name for name in settings if not known.get(name)]
    if unknown:
        raise UnsupportedModelError(
            f"{artifact.path} is a network of timm with settings of its own: {', '.join(unknown)[:200]}.",
            hint="Pass --arch FILE.py:NAME with a function that calls timm.create_model with them.",
        )
    return settings


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_SIDE


def _shape(artifact: Artifact, described: Mapping[str, Any]) -> tuple[int, int, int] | None:
    sizes = described.get("input_size")
    if sizes is None:
        return None
    if not isinstance(sizes, list) or not all(map(_is_side, sizes)):
        raise _broken(artifact, _CONFIG, f"its input_size is {sizes}")
    if len(sizes) != 3:
        raise _broken(artifact, _CONFIG, f"its input_size has {len(sizes)} numbers")
    return sizes[0], sizes[1], sizes[2]


def _convention(artifact: Artifact, described: Mapping[str, Any]) -> InputConvention | None:
    mean, std = described.get("mean"), described.get("std")
    if mean is None and std is None:
        return None
    if not _numbers(mean) or not _numbers(std) or min(std) <= 0:
        raise _broken(artifact, _CONFIG, f"its mean and std are {mean} and {std}")
    return InputConvention(mean=tuple(mean), std=tuple(std))


def _states(artifact: Artifact) -> Sequence[StateDict]:
    name = next(name for name in _NAMES if name in artifact.parts)
    if not name.endswith(_INDEX):
        return _in_file(artifact, name)
    places = _json(artifact, name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise _broken(artifact, name, "it has no weight_map")
    shards = {file: _in_file(artifact, file)[0].tensors for file in sorted(set(places.values()))}
    lost = [key for key, file in places.items() if key not in shards[file]]
    if lost:
        raise _broken(artifact, name, f"the tensor '{lost[0]}' is not in {places[lost[0]]}")
    return [StateDict((), {key: shards[file][key] for key, file in places.items()})]


def _in_file(artifact: Artifact, name: str) -> list[StateDict]:
    if name not in artifact.parts:
        raise _broken(artifact, name, "the file is missing")
    data = artifact.parts[name]
    if data.startswith(_POINTER):
        raise ArtifactError(
            f"{artifact.path}/{name} is a pointer of Git LFS, not the weights.", hint="Run git lfs pull in the folder."
        )
    return [
        StateDict(state.where, {key: _placed(spec, name) for key, spec in state.tensors.items()})
        for state in states_of(data, f"{artifact.path}/{name}")
    ]


def _placed(spec: TensorSpec, file: str) -> TensorSpec:
    return replace(spec, storage=replace(spec.storage, file=file))
