"""Where finished work is kept between runs: small files that are whole or not there, under names that say what of."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backdoorscan
from backdoorscan.errors import OutputError
from backdoorscan.files import write_whole

if TYPE_CHECKING:
    from backdoorscan.plugin.method import Method


def default_folder() -> Path:
    """``BACKDOORSCAN_CACHE_DIR``, or ``backdoorscan`` in the platform's folder for caches."""
    if own := os.environ.get("BACKDOORSCAN_CACHE_DIR"):
        return Path(own)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "backdoorscan"


def digest(facts: Mapping[str, Any]) -> str:
    """A name for plain data: the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step; its folder is made.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write {path}.", why=str(error)) from error
    write_whole(path, content)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Put ``data`` at ``path`` as JSON in one step.

    Raises:
        OutputError: It cannot be written.
    """
    write(path, json.dumps(data, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """What ``write_json`` wrote, or ``None`` where there is nothing of use: it is made again then."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def method_source(method: Method) -> str:
    """A digest of the method's module and of the mathematics it may use: versions stay while somebody works on it."""
    module = None
    with suppress(TypeError):  # a class that was made without a file
        module = inspect.getsourcefile(type(method))
    files = [Path(module)] if module else []
    files += sorted(Path(backdoorscan.__file__).parent.glob("ops/*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def arch_source(arch: str | None) -> str | None:
    """A digest of what ``--arch`` names and, where it is Python code, of the modules beside it, which it may import.

    Code of other packages is not part of it.
    """
    if arch is None:
        return None
    where, _, name = arch.rpartition(":")
    known = hashlib.sha256(name.encode())
    for file in _arch_files(arch, where):
        with suppress(OSError):  # what cannot be read is the loader's to complain about
            content = file.read_bytes()
            known.update(hashlib.sha256(file.name.encode()).digest() + hashlib.sha256(content).digest())
    return known.hexdigest()


def _arch_files(arch: str, where: str) -> Iterable[Path]:
    if Path(arch).is_file():
        return [Path(arch)]
    if where.endswith(".py"):
        return sorted(Path(where).parent.glob("*.py"))
    package = where.partition(".")[0]
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    folders = spec.submodule_search_locations
    if folders is None:
        return [Path(spec.origin)] if spec.origin else []
    return sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
