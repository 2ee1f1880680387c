"""JUnit XML, which most pipelines show: a test suite per model, a test case per detector.

There is no standard; these are the elements and attributes that the readers of Jenkins and GitLab agree on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from backdoorscan.findings import Verdict
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.policy import is_repaired
from backdoorscan.report import DetectorRun, ModelRun, Report, ScanReport
from backdoorscan.reports.outcome import left_in, network_name, row_sentence
from backdoorscan.reports.taxonomy import LEFT_IN, NO_ANSWER, OVER_BUDGET, kind_of, refuse
from backdoorscan.reports.telling import ACCEPTED, INCOMPLETE, budget, finding_sentence, reasons
from backdoorscan.reports.words import plain, probability, visible

_OUTCOMES = {"failure": "failures", "error": "errors", "skipped": "skipped"}


class Junit(Reporter):
    """JUnit XML."""

    id = "junit"
    summary = "JUnit XML: a test suite per model, a test case per detector."
    refuses: ClassVar[Sequence[type[Report]]] = (EvaluationReport,)

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as XML in ASCII: a suite passes only if the model does.

        Raises:
            UsageError: An evaluation, which judges nothing.
        """
        root = Element("testsuites", name="backdoorscan")
        if isinstance(report, ScanReport):
            for run in report.runs:
                root.append(_scan_suite(run, budget(run, report)))
        elif isinstance(report, RepairReport):
            root.append(_repair_suite(report))
        else:
            raise refuse(type(report), self.id)
        for name in ("tests", *_OUTCOMES.values()):
            root.set(name, str(sum(int(suite.get(name, 0)) for suite in root)))
        root.set("time", _seconds(report.cost.wall_seconds))
        indent(root)
        text: bytes = tostring(root, "us-ascii", xml_declaration=True)
        return text.decode() + "\n"


def _scan_suite(run: ModelRun, alpha: float) -> Element:
    cases = [_detector_case(detector, run, alpha) for detector in run.detectors]
    rest = run.otherwise if run.findings else run.verdict
    if (rest is not Verdict.CLEAN or not run.complete) and all(_passes(case) for case in cases):
        # Readers count what failed: a scan without an answer would pass.
        why = " ".join([*reasons(run, alpha), *([] if run.complete else [INCOMPLETE])])
        case = _case(run.model, "verdict", 0.0)
        _outcome(case, "error", NO_ANSWER.id, NO_ANSWER.title, why)
        cases.append(case)
    facts = {
        "verdict": str(run.verdict),
        "sha256": run.model.get("sha256"),
        "format": run.model.get("format"),
        "alpha": f"{alpha:g}",
        "clean_accuracy": run.clean_accuracy,
        "not_tested": ", ".join(run.not_tested),
    }
    suite = _suite(run.model, run.cost.wall_seconds, facts, cases)
    if run.notes:
        SubElement(suite, "system-out").text = _text("\n".join(f"note: {note}" for note in run.notes))
    return suite


def _detector_case(detector: DetectorRun, run: ModelRun, alpha: float) -> Element:
    case = _case(run.model, detector.id, detector.seconds)
    every = [finding for finding in run.findings if finding.detector == detector.id]
    findings = [finding for finding in every if finding.suppressed is None]
    if findings:
        # One element: readers disagree on what several would mean.
        kinds = [kind_of(finding, alpha) for finding in findings]
        worst = max(kinds, key=lambda kind: kind.security)
        labels = ", ".join(str(label) for label in dict.fromkeys(f.target_label for f in findings[:20]))
        title = f"{worst.title}: label {labels}" + (", …" if len(findings) > 20 else "")
        _outcome(case, "failure", worst.id, title, "\n".join(finding_sentence(f, alpha) for f in findings))
    elif detector.error:
        _outcome(case, "error", "failed", f"{detector.id} failed", detector.error)
    elif every:
        why = "; ".join(dict.fromkeys(finding.suppressed or "" for finding in every))
        SubElement(case, "skipped", message=_text(plain(f"{ACCEPTED}: {why}")))
    elif detector.p_value is None:
        SubElement(case, "skipped", message=_text(plain(detector.note or "no answer")))
    else:
        answer = f"smallest p-value {probability(detector.p_value)}"
        SubElement(case, "system-out").text = _text(f"{answer}\n{detector.note}".strip())
    return case


def _repair_suite(report: RepairReport) -> Element:
    cases = [_candidate_case(row, report) for row in report.candidates]
    if not cases:
        case = _case(report.model, report.method, 0.0)
        _outcome(case, "error", NO_ANSWER.id, "No network was written", "")
        cases.append(case)
    facts = {"method": report.method, "sha256": report.model.get("sha256"), "format": report.model.get("format")}
    return _suite(report.model, report.cost.wall_seconds, facts, cases)


def _candidate_case(row: CandidateRow, report: RepairReport) -> Element:
    case = _case(report.model, network_name(row), 0.0)
    sentence = row_sentence(row, report.before)
    if is_repaired(row):
        SubElement(case, "system-out").text = _text(sentence)
    else:
        kind = LEFT_IN if left_in(row) else OVER_BUDGET
        _outcome(case, "failure", kind.id, kind.title, "\n".join([sentence, *row.files]))
    return case


def _suite(model: Mapping[str, Any], seconds: float, facts: Mapping[str, Any], cases: Sequence[Element]) -> Element:
    counts = {plural: str(sum(_has(case, tag) for case in cases)) for tag, plural in _OUTCOMES.items()}
    suite = Element("testsuite", {"name": _text(str(model.get("path"))), "tests": str(len(cases)), **counts})
    suite.set("time", _seconds(seconds))
    properties = SubElement(suite, "properties")
    for name, value in facts.items():
        SubElement(properties, "property", name=name, value=_text(plain(value)))
    suite.extend(cases)
    return suite


def _case(model: Mapping[str, Any], name: str, seconds: float) -> Element:
    # Readers tell cases apart by class and name together.
    return Element("testcase", name=_text(name), classname=_text(str(model.get("path"))), time=_seconds(seconds))


def _outcome(case: Element, tag: str, kind: str, title: str, text: str) -> None:
    SubElement(case, tag, type=kind, message=_text(title)).text = _text(text)


def _passes(case: Element) -> bool:
    return not _has(case, "failure") and not _has(case, "error")


def _has(case: Element, tag: str) -> bool:
    return case.find(tag) is not None


def _text(text: str) -> str:
    """Text without the characters that XML does not have."""
    return visible(text, lines=True)


def _seconds(value: float) -> str:
    return f"{value:.3f}"
