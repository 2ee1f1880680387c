"""Which models a run is about: files, folders that are searched, or a manifest.

[[model]]
file = "faces.h5"
valid = "faces-clean.h5"
name = "faces"
fail_on = "high"

[[model]]
file = "digits.pt"
arch = "nets.py:digits"
mean = [0.1307]
std = [0.3081]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backdoorscan.artifact import Artifact, file_names
from backdoorscan.config import TEXT, Kind, beside, check, is_number, is_whole, parse_toml
from backdoorscan.errors import ArtifactError, UsageError
from backdoorscan.formats.loading import ReadOptions, find_loader
from backdoorscan.policy import DEFAULT_ALPHA, DEFAULT_FAIL_ON, FailOn
from backdoorscan.registry import Registry
from backdoorscan.report import ModelRun


@dataclass(frozen=True)
class Entry:
    """A model to scan, and what is known about it.

    Attributes:
        file: The file.
        valid: Clean labelled images of its own, or ``None`` for the run's.
        read: What is known about the file.
        labels: Labels to examine, or ``None`` for all.
        alpha: Its false-alarm budget, 0 to 1.
        fail_on: The least severity of a finding that fails the gate.
        name: What to call it, or empty.
    """

    file: Path
    valid: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    labels: tuple[int, ...] | None = None
    alpha: float = DEFAULT_ALPHA
    fail_on: FailOn = DEFAULT_FAIL_ON
    name: str = ""

    def named(self, run: ModelRun) -> ModelRun:
        """Its run, with its name."""
        return replace(run, model={"path": run.model["path"], "name": self.name, **run.model}) if self.name else run


def _numbers(value: Any, count: int | None = None) -> bool:
    return isinstance(value, list) and all(map(is_number, value)) and len(value) == (count or len(value)) > 0


_KINDS = {
    "file": TEXT,
    "valid": TEXT,
    "arch": TEXT,
    "input_range": Kind("two numbers", lambda value: _numbers(value, 2)),
    "mean": Kind("a list of numbers", _numbers),
    "std": Kind("a list of numbers", _numbers),
    "layout": Kind("NCHW or NHWC", lambda value: value in ("NCHW", "NHWC")),
    "input_shape": Kind(
        "channels, height and width",
        lambda value: _numbers(value, 3) and all(is_whole(size) and size > 0 for size in value),
    ),
    "labels": Kind(
        "a list of labels",
        lambda value: _numbers(value) and all(is_whole(label) and label >= 0 for label in value),
    ),
    "alpha": Kind("a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1),
    "fail_on": Kind(f"one of {', '.join(FailOn)}", lambda value: value in list(FailOn)),
    "name": TEXT,
}

_READING = ("input_range", "mean", "std", "layout", "input_shape")


def load(path: Path, default: Entry) -> list[Entry]:
    """Read a manifest.

    Args:
        path: A TOML file with an array of tables ``[[model]]``; paths in it are relative to its folder.
        default: What holds for a model of which the manifest does not say otherwise.

    Raises:
        UsageError: It is missing, broken or empty, or has keys or values that cannot be.
    """
    data = parse_toml(path, "manifest")
    tables = Kind("a list of tables [[model]]", lambda value: isinstance(value, list) and value != [])
    check(str(path), data, {"model": tables}, "key")
    if not data:
        raise UsageError(f"{path} names no model.", hint='Write [[model]] and file = "model.h5".')
    entries = []
    for position, table in enumerate(data["model"], start=1):
        where = f"{path}, model {position}"
        if not isinstance(table, dict):
            raise UsageError(f"{where} is not a table.", hint="Write [[model]] above its keys.")
        check(where, table, _KINDS, "key")
        if "file" not in table:
            raise UsageError(f"{where} has no file.", hint='Write file = "model.h5".')
        try:
            entries.append(_entry(path, table, default))
        except UsageError as error:
            raise UsageError(f"{where}: {error.what}", why=error.why, hint=error.hint) from None
    return entries


def _entry(path: Path, table: Mapping[str, Any], default: Entry) -> Entry:
    reading: dict[str, Any] = {
        key: tuple(table[key]) if isinstance(table[key], list) else table[key] for key in _READING if key in table
    }
    if "arch" in table:
        reading["arch"] = _arch(path, table["arch"])
    read = replace(default.read, **reading)
    _ = read.pinned  # complain about impossible values before any work
    given = {key: table[key] for key in ("alpha", "name") if key in table}
    if "valid" in table:
        given["valid"] = beside(path, table["valid"])
    if "labels" in table:
        given["labels"] = tuple(sorted(set(table["labels"])))
    if "fail_on" in table:
        given["fail_on"] = FailOn(table["fail_on"])
    return replace(default, file=Path(beside(path, table["file"])), read=read, **given)


def _arch(manifest: Path, arch: str) -> str:
    """An architecture as a manifest names it: a file is relative to the manifest, anything else is left alone."""
    file, colon, name = arch.rpartition(":")
    if not colon:
        return beside(manifest, arch)
    return beside(manifest, file) + colon + name if file.endswith(".py") else arch


def gather(
    paths: Sequence[Path], default: Entry, registry: Registry, tell: Callable[[str], None] = lambda _text: None
) -> list[Entry]:
    """The models that the command line names.

    Args:
        paths: Files and folders. Files are taken as they are; folders are searched, unless a loader knows the folder
            itself for a model.
        default: What holds for each.
        registry: Where loaders are found.
        tell: Told of files that a search leaves out although they might be taken for models.

    Returns:
        An entry for each, folders' in the order of their names; a file that is named twice is there once.

    Raises:
        UsageError: A folder without a model.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = _search(path, registry, tell) if path.is_dir() else [path]
        if not inside:
            raise UsageError(
                f"There is no model file in {path}.", hint="Hidden files are left out; name such a file itself."
            )
        found.update(dict.fromkeys(inside))
    return [replace(default, file=path) for path in found]


def _search(folder: Path, registry: Registry, tell: Callable[[str], None]) -> list[Path]:
    """The models in a folder and in those below it, or the folder where it is a model itself.

    Hidden ones are left out; links to folders are not followed.
    """
    found = []
    for place, folders, names in os.walk(folder):
        if _MARKS & set(names) and _is_model(Path(place), registry):
            found.append(Path(place))
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        found += [file for file in files if file.is_file() and _holds_model(file, registry, tell)]
    return found


_MARKS = {"config.json", "saved_model.pb"}
"""Files of which every folder that is a model itself has one."""

_HEAD = 1 << 16
"""Bytes from which nearly every loader knows its format."""

_KERAS = (b"model_config", b"layer_names", b"layers")
"""Names of which one stands in every HDF5 file of Keras: sets of images are HDF5 too."""


def _holds_model(path: Path, registry: Registry, tell: Callable[[str], None]) -> bool:
    """Whether a loader knows a file by its content.

    One that cannot be read counts, and so does one that only its name calls a model, as a download that ended early or
    a pointer of Git LFS: its scan says why. An HDF5 file may as well be a set of images.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_HEAD)
            if data.startswith((b"PK", b"\x89HDF")):  # an archive's table of contents is at its end
                data += file.read()
    except OSError:
        return True
    if data.startswith(b"\x89HDF") and not any(word in data for word in _KERAS):
        tell(f"left out {path}: an HDF5 file without a model of Keras")
        return False
    return path.suffix.lower() in _suffixes(registry) or _accepted(Artifact(path, data, ""), registry)


def _suffixes(registry: Registry) -> frozenset[str]:
    """What the names of models end in."""
    components = [plugin.component for plugin in registry.of_kind("loader")]
    return frozenset(getattr(component, "suffix", "") for component in components) - {"", ".h5"}


def _is_model(folder: Path, registry: Registry) -> bool:
    try:
        return _accepted(Artifact(folder, b"", "", dict.fromkeys(file_names(folder), b"")), registry)
    except ArtifactError:
        return False


def _accepted(artifact: Artifact, registry: Registry) -> bool:
    try:
        find_loader(artifact, registry)
    except ArtifactError:
        return False
    return True
