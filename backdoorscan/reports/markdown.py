"""Markdown, for a comment on a pull request or the summary of a pipeline's step.

Whatever a report quotes was written by others: as code it can neither format, nor link, nor mention anybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from backdoorscan.findings import Finding, Verdict
from backdoorscan.measured import EvaluationReport, RepairReport, Scores
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import DetectorRun, ModelRun, Report, ScanReport
from backdoorscan.reports.columns import columns
from backdoorscan.reports.outcome import network_name, outcome
from backdoorscan.reports.telling import (
    ACCEPTED,
    INCOMPLETE,
    TITLES,
    budget,
    finding_sentence,
    reasons,
    trust_sentences,
)
from backdoorscan.reports.words import command, feeding, number, percent, plain, probability, size, visible

MOST_BYTES = 60_000
"""Of the whole text: a comment on GitHub holds 65,536 characters."""

_ROWS = 40
"""Rows of a table at most; the JSON report has all."""

_SENTENCES = 20
_NAME = 80
_MARKS = {Verdict.CLEAN: "✅", Verdict.BACKDOORED: "❌", Verdict.INCONCLUSIVE: "⚠️"}
_TONES = {"good": "✅", "warn": "⚠️", "bad": "❌"}


class Markdown(Reporter):
    """Markdown for a comment or a step summary."""

    id = "markdown"
    summary = "Markdown, for a comment on a pull request or a step summary."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as GitHub's Markdown of at most ``MOST_BYTES`` bytes.

        Raises:
            TypeError: A report of a kind this format does not know.
        """
        if isinstance(report, ScanReport):
            return _scan(report)
        if isinstance(report, RepairReport):
            return _joined(_repair(report))
        if isinstance(report, EvaluationReport):
            return _joined(_evaluation(report))
        raise TypeError(f"no Markdown for {type(report).__name__}")


def code(text: object, longest: int = 200) -> str:
    """Somebody else's text as code, in which nothing has a meaning; also within a table."""
    shown = "" if text is None else plain(visible(str(text)), longest).replace("|", "\\x7c")
    if not shown.strip("– "):
        return "–"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if shown[0] in " `" or shown[-1] in " `" else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def prose(text: str, longest: int = 500) -> str:
    """A sentence, in which nothing formats; as code if something in it could link or mention."""
    shown = plain(visible(text), longest)
    if re.search(r"[@|`]|://|www\.|#\d|\bGH-\d", shown, re.IGNORECASE):
        return code(shown, longest)
    return re.sub(r"([\\*_{}\[\]<>&#~$!^])", r"\\\1", shown)


def _joined(parts: Iterator[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _scan(report: ScanReport) -> str:
    head = list(_head(report))
    # The worst first: what does not fit is what matters least.
    order = sorted(report.runs, key=lambda run: (*(run.verdict is not v for v in _WORST), str(run.model.get("path"))))
    end = _end(report)
    left = MOST_BYTES - sum(_bytes(part) for part in [*head, end]) - 200
    sections: list[str] = []
    for run in order:
        section = "\n\n".join(part for part in _section(run, report) if part)
        left -= _bytes(section)
        if left < 0:
            break
        sections.append(section)
    missing = len(order) - len(sections)
    rest = [f"{missing} more {_plural('model', missing)}: see the JSON report."] if missing else []
    return _joined(iter([*head, *sections, *rest, end]))


_WORST = (Verdict.BACKDOORED, Verdict.INCONCLUSIVE)


def _bytes(text: str) -> int:
    return len(text.encode()) + 2


def _head(report: ScanReport) -> Iterator[str]:
    count = len(report.runs)
    which = _name(report.runs[0]) if count == 1 else f"{count} models"
    yield f"## {_MARKS[report.verdict]} {TITLES[report.verdict]}: {which}"
    if count > 1:
        rows = [(_name(run), _answer(run), _labels(run), percent(run.clean_accuracy)) for run in report.runs[:_ROWS]]
        yield _table(("model", "verdict", "suspected labels", "clean accuracy"), rows, count)


def _name(run: ModelRun) -> str:
    return code(run.model.get("name") or run.model.get("path"))


def _answer(run: ModelRun) -> str:
    return f"{_MARKS[run.verdict]} {run.verdict}" + ("" if run.complete else ", incomplete")


def _labels(run: ModelRun) -> str:
    labels = list(dict.fromkeys(finding.target_label for finding in run.findings))
    text = ", ".join(map(str, labels[:10]))
    return text + (f", … {len(labels)} in all" if len(labels) > 10 else "") or "none"


def _section(run: ModelRun, report: ScanReport) -> Iterator[str]:
    if len(report.runs) > 1:
        yield f"### {_MARKS[run.verdict]} {TITLES[run.verdict]}: {_name(run)}"
    yield "\n".join(f"- {prose(sentence)}" for sentence in _sentences(run, budget(run, report)))
    if run.findings:
        titles = ("target label", "source", "detector", "p-value", "score", "severity", "trigger L1", "area", "success")
        yield "**Suspected backdoors**, most suspicious first"
        yield _table(titles, [_finding(finding) for finding in run.findings[:_ROWS]], len(run.findings))
    head = ("detector", "answer", "smallest p-value", "suspected labels", "elapsed")
    if run.detectors:
        yield "**Detectors**"
        yield _table(head, [_detector(d, run) for d in run.detectors[:_ROWS]], len(run.detectors))
    failed = [f"- {code(d.id, _NAME)} failed: {code(d.error)}" for d in run.detectors if d.error]
    noted = [f"- {code(d.id, _NAME)}: {prose(d.note, 200)}" for d in run.detectors if d.note and not d.error]
    yield "\n".join([*failed, *noted][:_SENTENCES])
    if run.not_tested:
        spots = [f"- {prose(spot, 200)}" for spot in run.not_tested[:_SENTENCES]]
        yield "**Not tested**"
        yield "\n".join(spots)
    if not run.error:
        yield _facts(run)
    if run.verdict is not Verdict.CLEAN or not run.complete:
        yield f"**How to go on**: {_advice(run)}"


def _sentences(run: ModelRun, alpha: float) -> Iterator[str]:
    yield from (finding_sentence(finding, alpha) for finding in run.findings[:3])
    yield from reasons(run, alpha)
    yield from trust_sentences(run.model)
    yield from (f"Note: {note}." for note in run.notes[:_SENTENCES])
    if not run.complete:
        yield INCOMPLETE


def _finding(finding: Finding) -> Sequence[str]:
    trigger = finding.trigger
    return (
        f"{finding.target_label} ({ACCEPTED})" if finding.suppressed else str(finding.target_label),
        "any" if finding.source_label is None else str(finding.source_label),
        code(finding.detector, _NAME),
        probability(finding.p_value),
        number(finding.score, ".2f"),
        plain(finding.severity and str(finding.severity)),
        "–" if trigger is None else f"{trigger.l1:.1f} px",
        "–" if trigger is None else f"{trigger.area:.1%}",
        percent(finding.attack_success_rate),
    )


def _detector(detector: DetectorRun, run: ModelRun) -> Sequence[str]:
    labels = [finding.target_label for finding in run.findings if finding.detector == detector.id]
    answer = "failed" if detector.error else "no answer" if detector.p_value is None else "answered"
    return (
        code(f"{detector.id} {detector.version}", _NAME),
        answer,
        probability(detector.p_value),
        ", ".join(map(str, labels[:10])) + (", …" if len(labels) > 10 else "") or "none",
        f"{detector.seconds:,.1f} s",
    )


def _facts(run: ModelRun) -> str:
    model, images = run.model, run.images or {}
    facts = [
        ("SHA-256", code(model.get("sha256"))),
        ("format", code(model.get("format"), _NAME)),
        ("input", f"{size(model.get('input_shape'))}, pixels fed as {feeding(model)}"),
        ("classes", plain(model.get("num_classes"))),
        ("clean images", f"{code(images.get('path'))}, {images.get('count')}" if images.get("path") else "none given"),
        ("clean accuracy", percent(run.clean_accuracy)),
    ]
    lines = "\n".join(f"- {name}: {value}" for name, value in facts)
    return f"<details><summary>Model</summary>\n\n{lines}\n\n</details>"


def _advice(run: ModelRun) -> str:
    if run.error:
        return "mend or leave out the file, and scan again."
    if not run.complete:
        return "run the scan again; `-v` shows why a detector failed, `--resume` goes on where time ran out."
    if not run.detectors:
        return "give the model's own images and labels (`--valid`), fed as the model was trained."
    if run.verdict is Verdict.INCONCLUSIVE:
        return "give more clean images (`--valid`), or run all detectors. Trying seeds until one passes is no scan."
    given = run.images if run.images and run.images.get("path") else {"path": "DATA"}
    return f"do not use the model; repair it:\n\n{_block(command('repair', run.model, given, None, [], {}))}"


def _block(text: str) -> str:
    """A block of code that its content cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text[:4000]}\n{fence}"


def _repair(report: RepairReport) -> Iterator[str]:
    result = outcome(report)
    yield f"## {_TONES[result.kind]} {result.title}: {code(report.model.get('path'))}"
    yield "\n".join(f"- {prose(line)}" for line in (*result.lines, *trust_sentences(report.model)))
    shown = columns([report.before, *(row.scores for row in report.candidates)])
    answers: dict[str, list[object]] = {
        "scanned again": [row.verdict and str(row.verdict) for row in report.candidates],
        "within budget": [row.within_budget for row in report.candidates],
    }
    asked = {title: values for title, values in answers.items() if any(value is not None for value in values)}
    rows = [("B, as it came", *(cell(report.before) for cell in shown.values()), *("–" for _ in asked))]
    for at, row in enumerate(report.candidates[:_ROWS]):
        name = code(network_name(row), _NAME) + (" (best)" if row is result.best else "")
        given = (plain(values[at]) for values in asked.values())
        rows.append((name, *(cell(row.scores) for cell in shown.values()), *given))
    yield _table(("network", *shown, *asked), rows, len(report.candidates) + 1)
    yield f"Method {code(report.method, _NAME)}. {_measured(report.measured or report.images.get('count'), report)}"
    files = [file for row in report.candidates for file in row.files]
    yield "\n".join(f"- wrote {code(file)}" for file in files[:_ROWS])
    yield _end(report)


def _evaluation(report: EvaluationReport) -> Iterator[str]:
    yield f"## Evaluation: {code(report.model.get('path'))}"
    yield "\n".join(f"- {prose(line)}" for line in trust_sentences(report.model))
    shown = columns([report.scores])
    yield _table(("network", *shown), [(code(report.model.get("kind"), _NAME), *_cells(report.scores))], 1)
    yield _measured(report.images.get("count"), report)
    yield _end(report)


def _cells(scores: Scores) -> Iterator[str]:
    yield from (cell(scores) for cell in columns([scores]).values())


def _measured(count: object, report: RepairReport | EvaluationReport) -> str:
    text = f"Measured on {number(count, ',')} clean images"
    if report.poisoned is None:
        return f"{text}; no poisoned images were given."
    return f"{text} and {number(report.poisoned.get('count'), ',')} poisoned ones."


def _end(report: Report) -> str:
    facts = [f"backdoorscan {prose(report.versions.get('backdoorscan', ''), 40)}", f"seed {report.seed}"]
    if isinstance(report, ScanReport):
        facts.append(f"false-alarm budget {report.alpha:g} per model")
    return f"<sub>{', '.join(facts)}, {report.cost.wall_seconds:,.1f} s</sub>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], total: int) -> str:
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return text + (f"\n\nThe first {len(rows)} of {total:,}; the JSON report has all." if len(rows) < total else "")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"
