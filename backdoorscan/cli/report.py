"""``backdoorscan report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backdoorscan.cli import _options as shared
from backdoorscan.cli._console import Terminal


def report(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="REPORT.json", help="What -f json wrote.")],
    alpha: Annotated[
        float | None,
        typer.Option(help="Judge a scan with other false alarms per clean model. [default: those of the scan]"),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on",
            metavar="SEVERITY",
            help="Least severity of a finding that fails: low, medium, high, critical or never. [default: medium]",
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Findings that are accepted, instead of the scan's baseline.")
    ] = None,
    format: shared.Format = None,
    output: shared.Output = None,
) -> None:
    """Show a report in other formats, or judge it again, without scanning.

    The exit code is that of the command that made the report, under what is given here.
    Example: backdoorscan report scan.json -f sarif=scan.sarif -f html=scan.html
    """
    import datetime

    from backdoorscan import baseline as accepted
    from backdoorscan import policy
    from backdoorscan.errors import UsageError
    from backdoorscan.report import ScanReport
    from backdoorscan.reports.reading import gate, judged_again, read_report

    terminal: Terminal = context.obj
    severity = policy.DEFAULT_FAIL_ON if fail_on is None else policy.FailOn.named(fail_on)
    result = read_report(file)
    terminal.check_formats(format, output, type(result))
    if isinstance(result, ScanReport):
        if alpha is not None:
            result = judged_again(result, alpha)
        if baseline is not None:
            result, expired = accepted.suppress(result, accepted.load(baseline), datetime.date.today())
            for entry in expired:
                terminal.say(f"expired in {baseline}: {entry}")
    elif alpha is not None or fail_on is not None or baseline is not None:
        raise UsageError(f"{file} is no scan: --alpha, --fail-on and --baseline judge scans.")
    terminal.emit(result, format, output)
    raise typer.Exit(gate(result, severity))
