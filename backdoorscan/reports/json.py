"""The canonical format."""

from __future__ import annotations

import json

from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Report
from backdoorscan.reports.words import finite_json


class Json(Reporter):
    """Everything a run found, as versioned JSON."""

    id = "json"
    summary = "Everything, as versioned JSON."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as JSON; figures that are not finite are ``null``."""
        return json.dumps(finite_json(report.to_json()), indent=2, allow_nan=False) + "\n"
