from backdoorscan import EvaluationReport, RepairReport, ScanReport
from backdoorscan.errors import UsageError
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Report


class Lines(Reporter):
    """A line per model, made for grep."""

    id = "lines"
    summary = "A line per model, made for grep."
    refuses = (RepairReport, EvaluationReport)

    def render(self, report: Report, terminal: Terminal) -> str:
        if not isinstance(report, ScanReport):
            raise UsageError("The format lines has a place for scans alone.")
        lines = []
        for run in report.runs:
            labels = sorted({finding.target_label for finding in run.findings})
            # In ASCII, by !a: whoever named the file must not get to write to the terminal.
            lines.append(f"{run.verdict} {','.join(map(str, labels)) or '-'} {run.model['path']!a}\n")
        return "".join(lines)
