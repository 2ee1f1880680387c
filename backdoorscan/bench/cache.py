"""Where networks and results are kept between runs: small files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backdoorscan.errors import OutputError


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot write {path}.", why=str(error)) from error


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
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
