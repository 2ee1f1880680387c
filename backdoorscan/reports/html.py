"""One page for people: everything in a single file that needs no network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Report, ScanReport
from backdoorscan.reports.words import visible

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")


class Html(Reporter):
    """One self-contained page with charts and triggers."""

    id = "html"
    summary = "One self-contained page with charts and triggers; works offline."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as a page. Whatever it quotes is escaped, and the page runs no script and loads nothing.

        Raises:
            TypeError: A report of a kind this format does not know.
        """
        from markupsafe import Markup

        name, page = _page(report)
        style = Markup(_TEMPLATES.joinpath("style.css").read_text("utf-8"))  # noqa: S704  # a file of this package
        text = _environment().get_template(name).render(page=page, style=style)
        return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def _page(report: Report) -> tuple[str, Any]:
    if isinstance(report, ScanReport):
        from backdoorscan.reports.scan_page import scan_page

        return "scan.html", scan_page(report)
    from backdoorscan.reports import measured_page

    if isinstance(report, RepairReport):
        return "measured.html", measured_page.repair_page(report)
    if isinstance(report, EvaluationReport):
        return "measured.html", measured_page.evaluation_page(report)
    raise TypeError(f"no page for {type(report).__name__}")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalized(value: object) -> object:
    """What a template shows: text without characters that change how the text around them is read."""
    return visible(value, lines=True) if type(value) is str else value
