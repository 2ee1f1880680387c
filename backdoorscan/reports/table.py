"""Tables for people: rich in a terminal, plain elsewhere."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from backdoorscan.findings import Finding, Verdict
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport, Scores
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import ModelRun, Report, ScanReport
from backdoorscan.reports.columns import REVERSED_ATTACKS, TRUE_ATTACKS, columns, reversed_attacks, true_attacks
from backdoorscan.reports.drawing import WIDEST, draw, place
from backdoorscan.reports.evidence import label_rows
from backdoorscan.reports.outcome import network_name, outcome
from backdoorscan.reports.printing import printed
from backdoorscan.reports.summary import called, summary
from backdoorscan.reports.telling import ACCEPTED, INCOMPLETE, reasons, trust_sentences
from backdoorscan.reports.words import given_count, number, visible

_STYLE = {Verdict.CLEAN: "bold green", Verdict.BACKDOORED: "bold red", Verdict.INCONCLUSIVE: "bold yellow"}


class Table(Reporter):
    """Tables for people."""

    id = "table"
    summary = "Tables for people: rich in a terminal, plain elsewhere."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as text of at most ``terminal.width`` columns."""
        return printed(_parts(report, terminal), terminal)


def _parts(report: Report, terminal: Terminal) -> Iterator[RenderableType]:
    if isinstance(report, ScanReport):
        if len(report.runs) > 1:
            yield summary(report.runs, _STYLE)
        for run in report.runs:
            if len(report.runs) == 1:
                yield from _scan(run, terminal)
            elif run.verdict is not Verdict.CLEAN:
                yield Text("")
                yield from _scan(run, terminal)
    elif isinstance(report, RepairReport):
        yield from _repair(report)
    elif isinstance(report, EvaluationReport):
        yield from _evaluation(report)
    else:
        raise TypeError(f"no table for {type(report).__name__}")


def _scan(run: ModelRun, terminal: Terminal) -> Iterator[RenderableType]:
    yield Text.assemble(visible(str(run.model["path"])), "  ", (called(run), _STYLE[run.verdict]))
    if run.error:
        yield Text(visible(run.error, lines=True), style="red")
        return
    yield _facts(run)
    yield from _trust(run.model)
    if not run.detectors:
        yield from (Text(sentence, style="yellow") for sentence in reasons(run, alpha=0))
    for detector in run.detectors:
        if detector.error:
            yield Text(visible(f"{detector.id} failed: {detector.error}", lines=True), style="red")
        if detector.note:
            yield Text(visible(f"{detector.id}: {detector.note}", lines=True), style="yellow")
    if run.findings:
        table = _table("target label", "source", "detector", "p-value", "score", "trigger L1", "area", "success")
        for finding, ways in _together(run.findings):
            trigger = finding.trigger
            table.add_row(
                "\n".join(str(target) for _, target in ways),
                "\n".join("any" if source is None else str(source) for source, _ in ways),
                escape(visible(finding.detector)),
                f"{finding.p_value:.2g}",
                number(finding.score, ".2f"),
                "" if trigger is None else f"{trigger.l1:.1f} px",
                "" if trigger is None else f"{trigger.area:.1%}",
                _percent(finding.attack_success_rate),
            )
        yield table
        for finding in run.findings:
            if finding.suppressed is not None:
                accepted = f"label {finding.target_label} ({finding.detector}) is {ACCEPTED}: {finding.suppressed}"
                yield Text(visible(accepted), style="yellow")
        yield from _drawings(run, terminal)
    yield from _labels(run)
    for note in run.notes:
        yield Text(visible(f"note: {note}"), style="yellow")
    if run.not_tested:
        yield Text(visible("not tested: " + ", ".join(run.not_tested)), style="dim")
    if not run.complete:
        yield Text(INCOMPLETE, style="bold yellow")
    cost = run.cost
    yield Text(
        f"{cost.gradient_samples:,} gradient samples, {cost.wall_seconds:.1f} s, "
        f"{cost.cpu_seconds:.1f} CPU s, {cost.peak_memory_mb:.0f} MiB",
        style="dim",
    )


def _trust(model: Mapping[str, Any]) -> Iterator[RenderableType]:
    for sentence in trust_sentences(model):
        yield Text(visible(sentence), style="yellow")


def _facts(run: ModelRun) -> RenderableType:
    model = run.model
    low, high = model["input_range"]
    how = f"{low:g}..{high:g}" + (f" mean {_list(model['mean'])} std {_list(model['std'])}" if model["mean"] else "")
    found = "found" if model.get("input_range_found") else "assumed" if model.get("input_range_assumed") else "given"
    lines = [
        f"{model['format']}, {'×'.join(map(str, model['input_shape']))} -> {model['num_classes']} classes, "
        f"input {how} ({found}), {model['layout']}"
    ]
    if run.images is not None:
        made = run.images.get("made", 0)
        given = given_count(run.images)
        parts = [f"clean accuracy {_percent(run.clean_accuracy)} on {given} images"] if given else []
        lines.append(", ".join([*parts, *([f"{made} images made from the model"] if made else [])]))
    return Text(visible("\n".join(lines), lines=True), style="dim")


def _together(findings: Sequence[Finding]) -> list[tuple[Finding, list[tuple[int | None, int]]]]:
    """Findings with their ways (source, target); one for a trigger that sends each class to a target of its own."""
    groups: dict[Any, tuple[Finding, list[tuple[int | None, int]]]] = {}
    for at, finding in enumerate(findings):
        one_trigger = finding.source_label is not None and finding.trigger is not None
        key = (finding.detector, finding.p_value, finding.trigger.l1) if one_trigger and finding.trigger else at
        groups.setdefault(key, (finding, []))[1].append((finding.source_label, finding.target_label))
    return list(groups.values())


_MOST_DRAWINGS = 3


def _drawings(run: ModelRun, terminal: Terminal) -> Iterator[RenderableType]:
    """The triggers of the first findings side by side, as many as fit."""
    triggers = [finding.trigger for finding in run.findings if finding.trigger is not None]
    shown = triggers[: max(1, min(_MOST_DRAWINGS, terminal.width // (WIDEST + 4)))]
    if not shown or terminal.width < WIDEST + 2:
        return
    grid = RichTable.grid(padding=(0, 4, 0, 0))
    for _ in shown:
        grid.add_column(width=WIDEST)
    grid.add_row(*(Text(f"trigger of label {trigger.target}", style="bold") for trigger in shown))
    grid.add_row(*(Text(place(trigger), style="dim") for trigger in shown))
    grid.add_row(*(draw(trigger, terminal.color) for trigger in shown))
    yield grid
    yield Text("")


_MOST_LABELS = 12


def _labels(run: ModelRun) -> Iterator[RenderableType]:
    """The labels with the smallest triggers, for detectors that report such."""
    for detector in run.detectors:
        rows = label_rows(detector, run.findings)
        if not rows:
            continue
        table = _table(
            "label",
            "trigger L1",
            "success",
            "anomaly index",
            title=f"{escape(visible(detector.id))}: smallest triggers",
        )
        for row in rows[:_MOST_LABELS]:
            table.add_row(
                str(row.label),
                f"{row.l1:.1f} px" if row.succeeded else "none found",
                _percent(row.attack_success_rate),
                "" if row.anomaly_index is None else f"{row.anomaly_index:.2f}",
                style="bold red" if row.flagged else None,
            )
        yield table
        if len(rows) > _MOST_LABELS:
            yield Text(f"and {len(rows) - _MOST_LABELS} more labels in the JSON report", style="dim")


def _repair(report: RepairReport) -> Iterator[RenderableType]:
    yield Text(visible(f"{report.model['path']}  repaired by {report.method}"))
    yield from _trust(report.model)
    measured = [report.before, *(row.scores for row in report.candidates)]
    shown = columns(measured)
    for title in (TRUE_ATTACKS, REVERSED_ATTACKS):
        shown.pop(title, None)  # in lines of their own: the table is wide enough
    pruned = any("channels_pruned" in row.facts for row in report.candidates)
    verdicts = any(row.verdict for row in report.candidates)
    parts = (["pruned"] if pruned else [], [_narrow("scanned again")] if verdicts else [])
    table = _table("network", *parts[0], *map(_narrow, shown), *parts[1])

    def add(name: str, channels: str, scores: Scores, verdict: str) -> None:
        rates = [cell(scores) for cell in shown.values()]
        table.add_row(escape(visible(name)), *([channels] if pruned else []), *rates, *([verdict] if verdicts else []))

    add("B, as it came", "", report.before, "")
    for row in report.candidates:
        over = "" if row.within_budget is not False else " (over budget)"
        add(network_name(row) + over, _pruned(row), row.scores, str(row.verdict or ""))
    yield table
    result = outcome(report)
    yield Text(result.title, style={"good": "bold green", "bad": "bold red"}.get(result.kind, "bold"))
    for line in result.lines:
        yield Text(visible(line))
    networks = [("B", report.before), *((network_name(row), row.scores) for row in report.candidates)]
    if report.before.successful_attacks is not None:
        counts = ", ".join(f"{name} {true_attacks(scores)}" for name, scores in networks)
        yield Text(visible(f"true attacks that succeed: {counts}"), style="dim")
    if report.before.reversed_attacks:
        counts = ", ".join(f"{name} {reversed_attacks(scores.reversed_attacks)}" for name, scores in networks)
        yield Text(visible(f"attacks of the reversed triggers, as they are, that succeed: {counts}"), style="dim")
    which = {"held out": " that the method did not see", "test": " of the test set"}.get(report.measured_on, "")
    yield Text(
        f"measured on {report.measured or report.images['count']} clean images{which}"
        + _poisoned_note(report.poisoned),
        style="dim",
    )
    for row in report.candidates:
        if row.worst_class and row.kind == "repaired":
            lost = row.worst_class
            yield Text(f"B′ {row.name}: class {lost['label']} lost most, {lost['points']:.1f} points", style="dim")
    for row in report.candidates:
        for file in row.files:
            yield Text(visible(f"wrote {file}"), overflow="fold")


def _evaluation(report: EvaluationReport) -> Iterator[RenderableType]:
    yield Text(visible(str(report.model["path"])))
    yield from _trust(report.model)
    shown = columns([report.scores])
    table = _table("network", *map(_narrow, shown))
    table.add_row(escape(visible(str(report.model["kind"]))), *(cell(report.scores) for cell in shown.values()))
    yield table
    yield Text(f"measured on {report.images['count']} clean images" + _poisoned_note(report.poisoned), style="dim")


def _poisoned_note(poisoned: object) -> str:
    return (
        f" and {poisoned['count']} poisoned ones" if isinstance(poisoned, dict) else "; no poisoned images were given"
    )


def _pruned(row: CandidateRow) -> str:
    count = row.facts.get("channels_pruned")
    return "" if count is None else f"{count}/{row.facts.get('channels', '?')}"


def _table(*columns: str, title: str | None = None) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    return table


def _narrow(title: str) -> str:
    """A title over several lines, which leaves the width to the names of the networks."""
    return textwrap.fill(title, 10)


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.2%}"


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
