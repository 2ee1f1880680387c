"""Finds and repairs backdoors in neural networks that somebody else trained.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backdoorscan.api import evaluate, load_classifier, load_images, render, repair, scan
    from backdoorscan.classifier import Classifier
    from backdoorscan.errors import BackdoorscanError
    from backdoorscan.findings import Finding, Verdict
    from backdoorscan.formats.loading import ReadOptions
    from backdoorscan.images import LabelledImages
    from backdoorscan.measured import EvaluationReport, RepairReport
    from backdoorscan.plugin.hookspecs import hookimpl
    from backdoorscan.repairing import RepairOptions
    from backdoorscan.report import ScanReport
    from backdoorscan.scanning import ScanOptions
    from backdoorscan.trigger import Trigger

__version__ = "0.1.0"

__all__ = [
    "BackdoorscanError",
    "Classifier",
    "EvaluationReport",
    "Finding",
    "LabelledImages",
    "ReadOptions",
    "RepairOptions",
    "RepairReport",
    "ScanOptions",
    "ScanReport",
    "Trigger",
    "Verdict",
    "__version__",
    "evaluate",
    "hookimpl",
    "load_classifier",
    "load_images",
    "render",
    "repair",
    "scan",
]

_HOMES = {
    "BackdoorscanError": "backdoorscan.errors",
    "Classifier": "backdoorscan.classifier",
    "EvaluationReport": "backdoorscan.measured",
    "Finding": "backdoorscan.findings",
    "LabelledImages": "backdoorscan.images",
    "ReadOptions": "backdoorscan.formats.loading",
    "RepairOptions": "backdoorscan.repairing",
    "RepairReport": "backdoorscan.measured",
    "ScanOptions": "backdoorscan.scanning",
    "ScanReport": "backdoorscan.report",
    "Trigger": "backdoorscan.trigger",
    "Verdict": "backdoorscan.findings",
    "evaluate": "backdoorscan.api",
    "hookimpl": "backdoorscan.plugin.hookspecs",
    "load_classifier": "backdoorscan.api",
    "load_images": "backdoorscan.api",
    "render": "backdoorscan.api",
    "repair": "backdoorscan.api",
    "scan": "backdoorscan.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
