"""Several models at a glance: a row for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from backdoorscan.findings import Verdict
from backdoorscan.report import ModelRun
from backdoorscan.reports.words import percent, visible


def called(run: ModelRun) -> str:
    """A model's verdict in capitals."""
    return "NOT SCANNED" if run.error else str(run.verdict).upper()


def summary(runs: Sequence[ModelRun], styles: Mapping[Verdict, str]) -> Table:
    """A table with verdict, findings, accuracy and time of each model.

    Args:
        runs: The models.
        styles: How verdicts look.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(("model", "verdict", "findings", "clean accuracy", "time", "")):
        table.add_column(title, justify="right" if position > 2 else "left", overflow="fold")
    for run in runs:
        table.add_row(
            Text(visible(str(run.model.get("name") or run.model["path"]))),
            Text(called(run), style=styles[run.verdict]),
            _findings(run),
            percent(run.clean_accuracy),
            f"{run.cost.wall_seconds:.1f} s",
            "cached" if run.cached else "",
        )
    return table


def _findings(run: ModelRun) -> str:
    """How many, how much the worst weighs, and how many of them are accepted."""
    if not run.findings:
        return ""
    known = [finding.severity for finding in run.findings if finding.severity]
    accepted = sum(finding.suppressed is not None for finding in run.findings)
    worst = f" {max(known, key=lambda severity: severity.rank)}" if known else ""
    return f"{len(run.findings)}{worst}" + (f" ({accepted} accepted)" if accepted else "")
