"""The hooks a plugin can implement.

Every plugin, the project's own included, is an entry point in the group ``backdoorscan`` that names a module with
functions marked ``@backdoorscan.hookimpl``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from backdoorscan.artifact import Artifact
    from backdoorscan.findings import Evidence, Unit
    from backdoorscan.plugin.attack import Attack
    from backdoorscan.plugin.detector import Detector
    from backdoorscan.plugin.loader import Loader
    from backdoorscan.plugin.repairer import Repairer
    from backdoorscan.plugin.reporter import Reporter
    from backdoorscan.report import ScanReport

PROJECT = "backdoorscan"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def backdoorscan_detectors() -> Sequence[type[Detector]]:  # type: ignore[empty-body]
    """Detection methods."""


@hookspec
def backdoorscan_repairers() -> Sequence[type[Repairer]]:  # type: ignore[empty-body]
    """Repair methods."""


@hookspec
def backdoorscan_attacks() -> Sequence[type[Attack]]:  # type: ignore[empty-body]
    """Attacks that the bench puts into its networks."""


@hookspec
def backdoorscan_loaders() -> Sequence[type[Loader]]:  # type: ignore[empty-body]
    """Model formats that can be read."""


@hookspec
def backdoorscan_reporters() -> Sequence[type[Reporter]]:  # type: ignore[empty-body]
    """Formats that reports can be written in."""


@hookspec
def backdoorscan_scan_started(artifact: Artifact, detectors: Sequence[Detector]) -> None:
    """A model has been read and its scan begins."""


@hookspec
def backdoorscan_unit_finished(detector: Detector, unit: Unit, evidence: Evidence) -> None:
    """A detector has finished one unit of work."""


@hookspec
def backdoorscan_scan_finished(report: ScanReport) -> None:
    """All models are scanned and the report is complete."""
