"""Reports that were written as JSON, read again and judged again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from backdoorscan import policy
from backdoorscan.errors import ExitCode, UsageError
from backdoorscan.findings import Verdict
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.report import ModelRun, Report, ScanReport
from backdoorscan.reports.telling import budget, smallest_p
from backdoorscan.reports.words import plain, probability, visible

MOST_BYTES = 512 * 1024 * 1024
"""Of a report: one of a thousand classes has a few megabytes."""

_KINDS = {kind.schema: kind for kind in (ScanReport, RepairReport, EvaluationReport)}


def read_report(path: Path) -> ScanReport | RepairReport | EvaluationReport:
    """Read a report.

    Args:
        path: What ``-f json`` wrote.

    Raises:
        UsageError: The file cannot be read, is no report of a version this program knows, or does not fit its schema.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UsageError(f"{path} is too large for a report.", why=f"It has more than {MOST_BYTES >> 20} MiB.")
        data = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"Cannot read the report {path}.", why=plain(str(error))) from error
    name = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in _KINDS:
        raise UsageError(
            f"{path} is no report that can be shown.",
            why=f'Its "schema" is {plain(name, 60)}.' if isinstance(name, str) else 'It has no "schema".',
            hint=f"A report is what -f json writes: {', '.join(_KINDS)}.",
        )
    _validate(path, data, name)
    try:
        return _KINDS[name].from_json(data)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise UsageError(
            f"The report {path} is damaged.", why=f"{type(error).__name__}: {plain(str(error))}"
        ) from error


def _validate(path: Path, data: Mapping[str, Any], name: str) -> None:
    """Check the data against the schema that it names.

    Raises:
        UsageError: It does not fit.
    """
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

    kind, _, version = name.removeprefix("backdoorscan.").partition("/")
    text = (resources.files("backdoorscan.reports") / "schemas" / f"{kind}-{version}.json").read_text("utf-8")
    fault = next(Draft202012Validator(json.loads(text)).iter_errors(data), None)
    if fault is not None:
        raise UsageError(
            f"The report {path} does not fit the schema of {name}.",
            why=visible(f"{fault.json_path}: {plain(fault.message, 200)}"),
            hint="It was changed, or written by another version: scan again, or use that version.",
        )


def judged_again(report: ScanReport, alpha: float) -> ScanReport:
    """A scan judged with another budget, as far as its report can tell.

    A report keeps the findings up to three times its own ``alpha``, and of all others the smallest p-value of each
    detector.

    Args:
        report: The scan.
        alpha: Largest p-value at which a finding counts, 0 to 1.

    Raises:
        UsageError: The budget is none, or the verdict on a model rests on findings that the report does not keep.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"--alpha {alpha:g} is not between 0 and 1.", hint="The default is 0.01.")
    runs = [_run_again(run, budget(run, report), alpha) for run in report.runs]
    return replace(report, alpha=alpha, runs=runs, verdict=policy.worst([run.verdict for run in runs]))


def _run_again(run: ModelRun, before: float, alpha: float) -> ModelRun:
    kept = [finding for finding in run.findings if finding.p_value <= min(1.0, policy.SUSPECT * alpha)]
    near = [replace(finding, severity=policy.severity(finding, alpha)) for finding in kept]
    proven = [finding for finding in near if finding.p_value <= alpha]
    judged = replace(run, alpha=None)
    if proven:
        return replace(judged, verdict=Verdict.BACKDOORED, findings=proven)
    if near:
        return replace(judged, verdict=Verdict.INCONCLUSIVE, findings=near)
    smallest = smallest_p(run)
    if alpha > before and smallest is not None and smallest <= policy.SUSPECT * alpha:
        raise UsageError(
            f"The report on {run.model.get('path')} cannot tell for --alpha {alpha:g}.",
            why=f"Judged with {before:g}, it keeps no findings above p = {probability(policy.SUSPECT * before)}.",
            hint=f"Scan again with --alpha {alpha:g}.",
        )
    return replace(judged, verdict=run.otherwise if run.findings else run.verdict, findings=[])


def gate(report: Report, fail_on: policy.FailOn) -> ExitCode:
    """What a pipeline is told of a report: as the command that made it would have ended."""
    if isinstance(report, ScanReport):
        return policy.gate((run, fail_on) for run in report.runs)
    return policy.repair_exit_code(report) if isinstance(report, RepairReport) else ExitCode.OK
