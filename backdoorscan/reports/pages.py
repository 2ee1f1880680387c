"""What the templates of the HTML report are filled with; the parts that all kinds of report share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from backdoorscan.report import Cost, Report
from backdoorscan.reports.album import Chart, safe_name
from backdoorscan.reports.evidence import Generic, Listing
from backdoorscan.reports.words import feeding, plain, size

if TYPE_CHECKING:
    from markupsafe import Markup

Pairs = Sequence[tuple[str, str]]

REPRODUCE_NOTE = (
    "The same files, seed and versions give the same figures. Options of methods are written out with the values in "
    "force, wherever they were set; what was found out about the model is left to be found out again."
)


@dataclass(frozen=True)
class Banner:
    """The answer on top.

    Attributes:
        tone: ``good``, ``bad``, ``warn`` or ``info``.
        title: The answer.
        file: Of what.
        sentences: What it rests on.
    """

    tone: str
    title: str
    file: str
    sentences: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table; flagged ones stand out."""

    cells: Sequence[str]
    flagged: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table."""

    caption: str
    columns: Sequence[str] = ()
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class DrawnChart:
    """A chart as SVG."""

    title: str
    caption: str
    svg: Markup
    wide: bool


@dataclass(frozen=True)
class Provenance:
    """Where the figures come from."""

    run: Pairs
    cost: Pairs


@dataclass(frozen=True, kw_only=True)
class Page:
    """What every page shows.

    Attributes:
        title: Of the browser's tab.
        kind: Of report.
        provenance: At the end.
        reproduce_note: Above the command line.
        footer: The last line.
    """

    title: str
    kind: str
    provenance: Provenance
    reproduce_note: str = REPRODUCE_NOTE
    footer: str = field(default="This page is self-contained: it runs no script and loads nothing from the network.")


def drawn(charts: Iterable[Chart], owner: str) -> list[DrawnChart]:
    """The charts as SVG.

    Args:
        charts: What to draw.
        owner: Unique within the page.
    """
    from markupsafe import Markup

    from backdoorscan.reports.svg import inline_svg

    return [
        DrawnChart(
            chart.title,
            chart.caption,
            # matplotlib escapes what it writes, and ``inline_svg`` what it adds.
            Markup(inline_svg(chart.draw(), f"{owner}-{chart.name}", f"{chart.title}. {chart.caption}")),  # noqa: S704
            chart.wide,
        )
        for chart in charts
    ]


def owner_name(*parts: object) -> str:
    """A name for the charts of one part of the page."""
    return safe_name("-".join(map(str, parts)))


def model_facts(model: Mapping[str, object]) -> Pairs:
    """Facts about a model file; those this program does not know come last."""
    known = {
        "path": "file",
        "sha256": "SHA-256",
        "format": "format",
        "kind": "kind",
        "num_classes": "classes",
        "parameters": "parameters",
        "layout": "axes",
    }
    pairs = [(text, _count(model[name])) for name, text in known.items() if name in model]
    if "input_shape" in model:
        pairs.append(("input", size(model["input_shape"])))
    if "input_range" in model:
        pairs.append(("pixels fed as", feeding(model)))
    rest = Generic()
    used = {*known, "input_shape", "input_range", "input_range_found", "mean", "std"}
    rest.add("", {name: value for name, value in model.items() if name not in used})
    return [*pairs, *((name.replace("_", " "), value) for name, value in rest.pairs)]


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def image_facts(images: Mapping[str, object] | None) -> Pairs:
    """Facts about a set of images."""
    if images is None:
        return [("given", "none")]
    names = {"path": "source", "sha256": "SHA-256", "count": "images"}
    known = {**images, "path": "made from the model"} if images.get("path", "") is None else images
    pairs = [(text, _count(known[name])) for name, text in names.items() if name in known]
    if images.get("made"):
        pairs.append(("made from the model", _count(images["made"])))
    rest = Generic()
    rest.add("", {name: v for name, v in images.items() if name not in {*names, "sample", "synthetic", "made"}})
    return [*pairs, *rest.pairs]


def option_facts(options: Mapping[str, object]) -> Pairs:
    """Options with the values in force."""
    return [
        (str(name), ", ".join(map(plain, value)) or "none" if isinstance(value, list | tuple) else plain(value))
        for name, value in options.items()
    ]


def listing_sheet(listing: Listing) -> Sheet:
    """A table of evidence."""
    count = len(listing.rows)
    part = f" (the first {count} of {listing.total:,})" if count < listing.total else f" ({count})"
    return Sheet(listing.title + part, listing.columns, [Row(row) for row in listing.rows])


def provenance(report: Report, extra: Pairs = ()) -> Provenance:
    """Versions, seed and cost."""
    run = [("report format", report.schema), ("seed", str(report.seed)), *extra]
    return Provenance([*run, *((str(k), str(v)) for k, v in report.versions.items())], cost_facts(report.cost))


def cost_facts(cost: Cost) -> Pairs:
    """What the work took."""
    return [
        ("gradient samples", f"{cost.gradient_samples:,}"),
        ("elapsed", f"{cost.wall_seconds:,.1f} s"),
        ("processor time", f"{cost.cpu_seconds:,.1f} s"),
        ("largest memory", f"{cost.peak_memory_mb:,.0f} MiB"),
    ]
