"""Output formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backdoorscan.plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from backdoorscan.plugin.reporter import Reporter


@hookimpl
def backdoorscan_reporters() -> Sequence[type[Reporter]]:
    """The formats that come with the project."""
    from backdoorscan.reports.cyclonedx import CycloneDx
    from backdoorscan.reports.html import Html
    from backdoorscan.reports.json import Json
    from backdoorscan.reports.junit import Junit
    from backdoorscan.reports.markdown import Markdown
    from backdoorscan.reports.sarif import Sarif
    from backdoorscan.reports.table import Table

    return [Table, Json, Html, Markdown, Sarif, Junit, CycloneDx]
