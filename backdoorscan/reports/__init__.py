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
    from backdoorscan.reports.html import Html
    from backdoorscan.reports.json import Json
    from backdoorscan.reports.table import Table

    return [Table, Json, Html]
