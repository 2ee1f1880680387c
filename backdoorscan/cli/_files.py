"""What the commands about files share: reports as a table or as JSON, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal
from backdoorscan.errors import UnknownNameError

if TYPE_CHECKING:
    from backdoorscan.plugin import reporter
    from backdoorscan.report import Report

FORMATS = ("table", "json")

Format: TypeAlias = Annotated[list[str] | None, shared.format_option("table or json")]


def check_formats(terminal: Terminal, formats: Sequence[str] | None, output: Path | None) -> None:
    """Complain before any work about reports that could not be written after it.

    Raises:
        UsageError: Such a format does not exist, or two reports go to one place.
        OutputError: A file that could not be written.
    """
    for destination in terminal.destinations(formats, output):
        if destination.format not in FORMATS:
            raise UnknownNameError("format of this report", destination.format, FORMATS)
        terminal.check_output(destination.file)


def emit(
    terminal: Terminal,
    report: Report,
    formats: Sequence[str] | None,
    output: Path | None,
    table: Callable[[reporter.Terminal], str],
) -> None:
    """Write a report where the user wants it.

    Raises:
        OutputError: A file cannot be written.
    """
    from backdoorscan.reports.json import Json

    def render(format: str, place: reporter.Terminal) -> str:
        return table(place) if format == "table" else Json().render(report, place)

    terminal.emit(report, formats, output, render=render)
