"""Settings from a file: the nearest ``backdoorscan.toml`` or pyproject.toml, or the file given by ``--config``.

    [tool.backdoorscan]
    alpha = 0.01
    fail_on = "high"
    detectors = ["neural-cleanse"]

    [tool.backdoorscan.neural-cleanse]
    steps = 200

The command line comes before the environment (``BACKDOORSCAN_ALPHA`` and so on), the environment before the file, the
file before the defaults.
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
        fail_on: Least severity of a finding that fails the gate, or never.
        baseline: File of findings that are accepted.
        seed: The run's seed.
        detectors: Detectors to run.
        valid: Clean labelled images.
        limit: The most of them to use.
        formats: Output formats, each with its file or without.
        jobs: Units of work, or models, at a time.
        threads: Computing threads of the process.
        device: Where networks compute: cpu, cuda, ...
        engine: Where to work: local or ray.
        ray_address: The Ray cluster.
        timeout: Seconds after which the scan of a model ends incomplete.
        cache: Whether finished scans are kept and answer.
        cache_dir: Where they are kept.
        methods: Options of methods: id -> name -> value.
        source: The file, or ``None`` without one.
    """

    alpha: float | None = None
    fail_on: str | None = None
    baseline: Path | None = None
    seed: int | None = None
    detectors: tuple[str, ...] | None = None
    valid: str | None = None
    limit: int | None = None
    formats: tuple[str, ...] | None = None
    jobs: int | None = None
    threads: int | None = None
    device: str | None = None
    engine: str | None = None
    ray_address: str | None = None
    timeout: float | None = None
    cache: bool | None = None
    cache_dir: Path | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Path | None = None


@dataclass(frozen=True)
class Kind:
    """What a value in a file has to be.

    Attributes:
        expected: In words.
        fits: Whether a value is it.
    """

    expected: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


NUMBER = Kind("a number", is_number)
INTEGER = Kind("an integer", lambda value: is_whole(value) and value >= 0)
POSITIVE = Kind("an integer above 0", lambda value: is_whole(value) and value > 0)
TEXT = Kind("text", lambda value: isinstance(value, str) and value != "")
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value))

_KEYS = {
    "alpha": NUMBER,
    "fail_on": TEXT,
    "baseline": TEXT,
    "seed": INTEGER,
    "detectors": NAMES,
    "valid": TEXT,
    "limit": POSITIVE,
    "formats": NAMES,
    "jobs": POSITIVE,
    "threads": POSITIVE,
    "device": TEXT,
    "engine": TEXT,
    "ray_address": TEXT,
    "timeout": Kind("a number of seconds", lambda value: is_number(value) and value >= 0),
    "cache": Kind("true or false", lambda value: isinstance(value, bool)),
    "cache_dir": TEXT,
}


def load(path: Path | None, methods: Collection[str], start: Path | None = None) -> Settings:
    """Read the settings.

    Args:
        path: ``--config``, or ``None`` to look for the nearest ``backdoorscan.toml``, or pyproject.toml with a table of
            ours; of two in one folder the first.
        methods: Ids of all methods, which may have tables of their own.
        start: Folder from which to look upwards; the current one if ``None``.

    Returns:
        The settings; ``valid``, ``baseline`` and ``cache_dir`` are relative to the folder of the file that names them.

    Raises:
        UsageError: The file is missing, broken, or holds a key nobody knows or a value of the wrong type.
    """
    if path is not None:
        data = parse_toml(path)
        table = _table(data)
        return _settings(path, ({} if path.name == "pyproject.toml" else data) if table is None else table, methods)
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        own, shared = folder / "backdoorscan.toml", folder / "pyproject.toml"
        if own.is_file():
            return load(own, methods)
        if shared.is_file():
            table = _table(parse_toml(shared))
            if table is not None:
                return _settings(shared, table, methods)
    return Settings()


def parse_toml(path: Path, what: str = "configuration file") -> dict[str, Any]:
    """The data of a TOML file.

    Raises:
        UsageError: It is missing or broken.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"Cannot read the {what} {path}.", why=str(error)) from error


def check(where: str, table: Mapping[str, Any], kinds: Mapping[str, Kind], what: str = "setting") -> None:
    """Check the keys and values of a table in a file.

    Args:
        where: The file, and which part of it.
        table: What it says.
        kinds: What it may say.
        what: A key's name in words.

    Raises:
        UnknownNameError: A key nobody knows.
        UsageError: A value of the wrong type.
    """
    for key, value in table.items():
        if key not in kinds:
            raise UnknownNameError(f"{what} in {where}", key, kinds)
        if not kinds[key].fits(value):
            raise UsageError(f"{where}: {key} = {value!r} is not {kinds[key].expected}.")


def beside(file: Path, name: str) -> str:
    """A path as a file names it, seen from the current folder.

    Args:
        file: The file.
        name: The path, perhaps with ``#`` and a split; relative to the file's folder, or absolute.
    """
    return str(file.parent / name)


def _table(data: Mapping[str, Any]) -> Any:
    """The table of ours in a file's data, or ``None``."""
    tools = data.get("tool")
    if tools is not None and not isinstance(tools, dict):
        raise UsageError("A configuration file's [tool] is not a table.")
    return tools.get("backdoorscan") if tools else None


def _settings(path: Path, table: Any, methods: Collection[str]) -> Settings:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [tool.backdoorscan] is not a table.")
    options = {key: value for key, value in table.items() if key in methods and isinstance(value, dict)}
    values = {key: value for key, value in table.items() if key not in options}
    a_table = Kind("a table", lambda _value: False)
    check(str(path), values, {**dict.fromkeys(methods, a_table), **_KEYS})
    said: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    said |= {key: beside(path, said[key]) for key in ("valid", "baseline", "cache_dir") if key in said}
    said |= {key: Path(said[key]) for key in ("baseline", "cache_dir") if key in said}
    return Settings(**said, methods=options, source=path)
