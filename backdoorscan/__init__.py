"""Finds and repairs backdoors in neural networks that somebody else trained.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backdoorscan.evaluating import evaluate
    from backdoorscan.formats.images import load_images
    from backdoorscan.formats.loading import ReadOptions, load_model
    from backdoorscan.plugin.hookspecs import hookimpl
    from backdoorscan.repairing import repair
    from backdoorscan.scanning import scan

__version__ = "0.1.0"

__all__ = ["ReadOptions", "__version__", "evaluate", "hookimpl", "load_images", "load_model", "repair", "scan"]

_HOMES = {
    "ReadOptions": "backdoorscan.formats.loading",
    "evaluate": "backdoorscan.evaluating",
    "hookimpl": "backdoorscan.plugin.hookspecs",
    "load_images": "backdoorscan.formats.images",
    "load_model": "backdoorscan.formats.loading",
    "repair": "backdoorscan.repairing",
    "scan": "backdoorscan.scanning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
