"""The architecture's JSON, bounded before anything walks it. Needs no torch."""

from __future__ import annotations

import json
from typing import Any

from backdoorscan.errors import ArtifactError, UnsafeModelError

_MAX_BYTES = 64 * 2**20
_MAX_DEPTH = 200


def parse_config(text: str, name: str) -> dict[str, Any]:
    """Parse an architecture's JSON, bounded in size and depth.

    Raises:
        ArtifactError: It is no JSON object with ``class_name`` and ``config``.
        UnsafeModelError: It is larger or deeper than any architecture.
    """
    if len(text) > _MAX_BYTES:
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
            hint="Give a whole-model .h5 or .keras file, or the JSON of Model.to_json().",
        )
    return config


def _check_depth(config: Any, name: str) -> None:
    """Later stages walk the JSON recursively; a too deep one must not exhaust Python's stack."""
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise UnsafeModelError(
        f"{name} was refused: its architecture is nested more than {_MAX_DEPTH} levels deep.",
        hint="Do not use this file; ask its publisher for a plain copy.",
    )
