"""The canonical format."""

from __future__ import annotations

import json

from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Report


class Json(Reporter):
    """Everything a run found, as versioned JSON."""

    id = "json"
    summary = "Everything, as versioned JSON."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as JSON; figures that are not finite are ``null``."""
        return json.dumps(_finite(report.to_json()), indent=2, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """``value`` without NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
