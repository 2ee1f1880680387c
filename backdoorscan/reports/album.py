"""Which charts a report has, with their words; on a page or as files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backdoorscan.errors import OutputError
from backdoorscan.files import whole_file
from backdoorscan.findings import Finding
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.report import DetectorRun, ModelRun, Report, ScanReport
from backdoorscan.reports import figures
from backdoorscan.reports.evidence import SHOWN, finite, label_rows, shown_rows
from backdoorscan.reports.outcome import network_name
from backdoorscan.reports.pictures import grey, samples
from backdoorscan.reports.style import styled
from backdoorscan.reports.words import ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A chart in its place.

    Attributes:
        name: For files and identifiers.
        title: Its heading.
        caption: What one sees.
        draw: Makes the figure.
        wide: Whether it needs the whole width.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]
    wide: bool = False


def label_charts(run: DetectorRun, findings: Sequence[Finding]) -> Iterator[Chart]:
    """The charts of a detector that searches a trigger for every label; none for others."""
    every = label_rows(run, findings)
    if not every:
        return
    rows = shown_rows(every)
    flagged = [row.label for row in rows if row.flagged]
    who = f"Flagged: {ranges(flagged)}." if flagged else "No label is flagged."
    part = f" The {len(rows)} smallest of {len(every):,} labels." if len(rows) < len(every) else ""
    median, threshold = finite(run.evidence.get("median_l1")), finite(run.evidence.get("threshold_l1"))
    yield Chart(
        "trigger-sizes",
        "Size of the smallest trigger of each label",
        f"A backdoored label needs an unusually small trigger. {who}{part}",
        partial(figures.trigger_sizes, rows, median, threshold),
    )
    if any(row.anomaly_index is not None for row in rows):
        yield Chart(
            "anomaly-index",
            "Anomaly index of each label",
            "As published, a label above 2 is infected; the verdict rests on the p-value, which keeps the number of "
            f"false alarms at the stated level. {who}{part}",
            partial(figures.anomaly_indices, rows),
        )
    for quantity, title in (("loss", "Loss over the search"), ("sizes", "Trigger size over the search")):
        drawn = [row for row in rows if getattr(row, quantity)]
        if drawn:
            yield Chart(
                f"{quantity}-curves",
                title,
                f"One line per label, averaged over short stretches. {who}{part}",
                partial(figures.curves, drawn, quantity),
            )
    stamped = [row for row in rows if row.predictions]
    if stamped:
        yield Chart(
            "predictions",
            "Predictions with each label's trigger stamped",
            "Rows: the label whose trigger is stamped on clean images. Columns: the class the model then gives, by "
            f"mean probability. A trigger that works fills the diagonal.{part}",
            partial(figures.predictions, stamped),
            wide=len(stamped) > figures.MOST_NARROW,
        )


def repair_charts(report: RepairReport) -> Iterator[Chart]:
    """Before and after."""
    networks = [("before", report.before), *((network_name(row), row.scores) for row in report.candidates)]
    yield Chart(
        "before-after",
        "Before and after",
        "Clean accuracy should stay, the success of true attacks and of reversed triggers should fall to nearly "
        "nothing, false rejects should be rare.",
        partial(figures.scores, networks[: SHOWN + 1]),
    )


def evaluation_charts(report: EvaluationReport) -> Iterator[Chart]:
    """The rates of one network."""
    yield Chart(
        "rates", "Rates", "Share of the images.", partial(figures.scores, [(str(report.model["kind"]), report.scores)])
    )


def _all_charts(report: Report) -> Iterator[tuple[str, Chart]]:
    """Every chart with what its file name begins with."""
    if isinstance(report, RepairReport):
        yield from (("", chart) for chart in repair_charts(report))
    elif isinstance(report, EvaluationReport):
        yield from (("", chart) for chart in evaluation_charts(report))
    elif isinstance(report, ScanReport):
        for position, run in enumerate(report.runs, start=1):
            front = f"model-{position}-" if len(report.runs) > 1 else ""
            for detector in run.detectors:
                owner = f"{front}{safe_name(detector.id)}-"
                yield from ((owner, chart) for chart in label_charts(detector, run.findings))
            yield from ((front, chart) for chart in _trigger_charts(run))


def _trigger_charts(run: ModelRun) -> Iterator[Chart]:
    for finding in run.findings[:SHOWN]:
        found = finding.trigger
        if found is not None:
            shape = tuple(found.pattern.shape)
            base = (samples(run.images, shape) or [grey(shape)])[0]
            name = f"{safe_name(finding.detector)}-trigger-of-label-{finding.target_label}"
            yield Chart(name, name, "", partial(figures.trigger, found, base))


def safe_name(text: str) -> str:
    """``text`` as part of a file name or an identifier."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:60] or "-"


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write the charts and the flagged triggers of a report as PNG files.

    Returns:
        The files, in the order in which they were written.

    Raises:
        OutputError: The folder cannot be written.
    """
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for front, chart in _all_charts(report):
            path = folder / f"{front}{chart.name}.png"
            figure = chart.draw()
            with styled(), whole_file(path) as place:
                figure.savefig(place, format="png", dpi=200, metadata={"Software": None})
            files.append(path)
    except OSError as error:
        raise OutputError(f"Cannot write figures to {folder}.", why=str(error)) from error
    return files
