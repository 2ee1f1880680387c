"""Settings from a file: ``[tool.backdoorscan]`` in the nearest pyproject.toml, or the file given by ``--config``.

    [tool.backdoorscan]
    alpha = 0.01
    seed = 0
    detectors = ["neural-cleanse"]

    [tool.backdoorscan.neural-cleanse]
    steps = 200

The command line and the environment come before the file, the file before the defaults.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backdoorscan.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Settings:
    """What a configuration file says; ``None`` where it says nothing.

    Attributes:
        alpha: False-alarm budget per model.
        seed: The run's seed.
        detectors: Detectors to run.
        methods: Options of methods: id -> name -> value.
        source: The file, or ``None`` without one.
    """

    alpha: float | None = None
    seed: int | None = None
    detectors: tuple[str, ...] | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Path | None = None


_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "seed": ("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "detectors": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    ),
}


def load(path: Path | None, methods: Collection[str], start: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        path: ``--config``, or ``None`` to look for the nearest pyproject.toml with a table of ours.
        methods: Ids of all methods, which may have tables of their own.
        start: Folder from which to look upwards; the current one if ``None``.

    Raises:
        UsageError: The file is missing, broken, or holds a key nobody knows or a value of the wrong type.
    """
    if path is not None:
        data = _parse(path)
        table = _table(data)
        return _settings(path, ({} if path.name == "pyproject.toml" else data) if table is None else table, methods)
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            table = _table(_parse(file))
            if table is not None:
                return _settings(file, table, methods)
    return Settings()


def _table(data: Mapping[str, Any]) -> Any:
    """The table of ours in a file's data, or ``None``."""
    tools = data.get("tool")
    if tools is not None and not isinstance(tools, dict):
        raise UsageError("A configuration file's [tool] is not a table.")
    return tools.get("backdoorscan") if tools else None


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"Cannot read the configuration file {path}.", why=str(error)) from error


def _settings(path: Path, table: Any, methods: Collection[str]) -> Settings:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [tool.backdoorscan] is not a table.")
    values: dict[str, Any] = {}
    options: dict[str, Mapping[str, Any]] = {}
    for key, value in table.items():
        if key in _KEYS:
            expected, is_right = _KEYS[key]
            if not is_right(value):
                raise UsageError(f"{path}: {key} = {value!r} is not {expected}.")
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in methods and isinstance(value, dict):
            options[key] = value
        else:
            raise UnknownNameError(f"setting in {path}", key, [*_KEYS, *methods])
    return Settings(**values, methods=options, source=path)
