"""A bench's report for people: tables in a terminal, and one page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from backdoorscan.bench.metrics import LEVEL, Area, Rate
from backdoorscan.bench.report import OVERALL, BenchReport
from backdoorscan.plugin.reporter import Terminal
from backdoorscan.reports.pages import Banner, Page, Pairs, Row, Sheet, provenance
from backdoorscan.reports.printing import printed
from backdoorscan.reports.words import number, percent, probability, visible

_CAPTIONS = {
    OVERALL: "All networks",
    "attack": "By attack",
    "family": "By family of triggers",
    "architecture": "By architecture",
    "data": "By data",
    "detector": "By detector alone",
}
_FIGURES = ("AUROC", "backdoored found", "clean called backdoored", "right target")


def headline(report: BenchReport) -> str:
    """How many networks there were, in one sentence."""
    text = f"{report.clean} clean and {report.backdoored} backdoored networks"
    if report.not_taken:
        text += f"; {len(report.not_taken)} more whose attack did not take are left out"
    if report.incomplete:
        text += f"; on {report.incomplete} some detector failed"
    return text + "."


def detector_sheets(report: BenchReport) -> list[Sheet]:
    """A table for each way to divide the networks."""
    return [
        Sheet(
            f"{caption}, with {LEVEL:.0%} intervals",
            (by if by != OVERALL else "networks", *_FIGURES),
            [
                Row((group.name or "all", _area(group.area), *map(_rate, (group.found, group.alarms, group.hits))))
                for group in report.groups
                if group.by == by
            ],
        )
        for by, caption in _CAPTIONS.items()
        if any(group.by == by for group in report.groups)
    ]


def repair_sheets(report: BenchReport) -> list[Sheet]:
    """A table per repair method; none if none was judged."""
    columns = ("candidate", "attack", "networks", "failed", "accuracy", "attack success", "DER", "CPU s")
    return [
        Sheet(
            f"Repair {method}: means over the backdoored networks, before → after",
            columns,
            [
                Row(
                    (
                        group.name or method,
                        group.attack,
                        str(group.networks),
                        str(group.failed),
                        f"{percent(group.accuracy_before)} → {percent(group.accuracy)}",
                        f"{percent(group.attack_success_before)} → {percent(group.attack_success)}",
                        number(group.effectiveness, ".3f"),
                        number(group.cpu_seconds, ".1f"),
                    )
                )
                for group in report.repairs
                if group.method == method
            ],
        )
        for method in dict.fromkeys(group.method for group in report.repairs)
    ]


def not_taken_sheet(report: BenchReport) -> list[Sheet]:
    """The networks that no figure counts; nothing if there are none."""
    if not report.not_taken:
        return []
    return [Sheet("Attacks that did not take", ("network",), [Row((name,)) for name in report.not_taken])]


def render_table(report: BenchReport, width: int, color: bool) -> str:
    """The report as text of at most ``width`` columns, ending in a newline."""
    return printed(_drawn(report), Terminal(width=width, color=color))


def _drawn(report: BenchReport) -> Iterator[RenderableType]:
    yield Text(headline(report))
    for sheet in (*detector_sheets(report), *repair_sheets(report), *not_taken_sheet(report)):
        yield Text("")
        table = Table(
            box=box.SIMPLE_HEAD, title=sheet.caption, title_justify="left", title_style="bold", pad_edge=False
        )
        for position, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if position == 0 else "right")
        for row in sheet.rows:
            table.add_row(*(Text(visible(cell)) for cell in row.cells))
        yield table
    cost = f"{report.gradient_samples:,.0f} gradient samples and {report.cpu_seconds:.1f} CPU s per scan"
    yield Text(cost, style="dim")


@dataclass(frozen=True, kw_only=True)
class BenchPage(Page):
    """What ``bench.html`` shows."""

    banner: Banner
    numbers: Pairs
    sections: Sequence[tuple[str, Sequence[Sheet]]]


def render_html(report: BenchReport) -> str:
    """The report as one page that runs no script and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from backdoorscan import reports

    shared = Path(reports.__file__).with_name("templates")
    environment = Environment(
        loader=FileSystemLoader([Path(__file__).with_name("templates"), shared]),
        autoescape=True,
        finalize=lambda value: visible(value, lines=True) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup(shared.joinpath("style.css").read_text("utf-8"))  # noqa: S704  # a file of this package
    text = environment.get_template("bench.html").render(page=_page(report), style=style)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def _page(report: BenchReport) -> BenchPage:
    overall = next(group for group in report.groups if group.by == OVERALL)
    parts = (
        ("Detectors", detector_sheets(report)),
        ("Repairs", repair_sheets(report)),
        ("Left out", not_taken_sheet(report)),
        ("Networks", [_networks_sheet(report.networks)]),
    )
    return BenchPage(
        title="backdoorscan bench",
        kind="bench",
        provenance=provenance(report, [("alpha", f"{report.alpha:g}")]),
        banner=Banner("info", headline(report), ", ".join(str(row["source"]) for row in report.data)),
        numbers=[
            ("AUROC", _area(overall.area)),
            *zip(_FIGURES[1:], map(_rate, (overall.found, overall.alarms, overall.hits)), strict=True),
            ("gradient samples per scan", number(report.gradient_samples, ",.0f")),
            ("CPU seconds per scan", number(report.cpu_seconds, ".1f")),
        ],
        sections=[(heading, sheets) for heading, sheets in parts if sheets],
    )


def _networks_sheet(networks: Sequence[Mapping[str, Any]]) -> Sheet:
    columns = ("network", "accuracy", "attack success", "targets", "verdict", "p-value", "flagged", "CPU s")
    return Sheet(
        "Every network",
        columns,
        [
            Row(
                (
                    f"{row['data']} {row['architecture']} {row['attack'] or 'clean'}",
                    percent(row["accuracy"]),
                    percent(row["attack_success_rate"]),
                    _labels(row["targets"]),
                    row["scan"]["verdict"],
                    probability(row["scan"]["p_value"]),
                    _labels(row["scan"]["flagged"]),
                    number(row["scan"]["cpu_seconds"], ".1f"),
                ),
                flagged=row["scan"]["verdict"] == "backdoored",
            )
            for row in networks
        ],
    )


def _labels(labels: Sequence[int]) -> str:
    shown = ", ".join(map(str, labels[:5]))
    return shown + (" …" if len(labels) > 5 else "") or "–"


def _area(area: Area | None) -> str:
    return "–" if area is None else f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    return f"{rate.hits}/{rate.total} = {rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})"
