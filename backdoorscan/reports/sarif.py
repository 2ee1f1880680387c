"""SARIF 2.1.0, for code scanning.

The binary file of a model has no lines: every result lies at line 1, which GitHub asks for, and names the label as its
logical location.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from backdoorscan.findings import Finding, Verdict
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.policy import is_repaired
from backdoorscan.report import ModelRun, Report, ScanReport
from backdoorscan.reports.markdown import prose
from backdoorscan.reports.outcome import left_in, row_sentence
from backdoorscan.reports.taxonomy import (
    LEFT_IN,
    NO_ANSWER,
    OVER_BUDGET,
    OWASP,
    SPECIFIC,
    SUSPICION,
    UNIVERSAL,
    Kind,
    fingerprint,
    kind_of,
    nodes,
    refuse,
    techniques,
    uri,
)
from backdoorscan.reports.telling import INCOMPLETE, budget, finding_sentence, reasons
from backdoorscan.reports.words import finite_json, plain, visible

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

Object = dict[str, Any]


class Sarif(Reporter):
    """SARIF 2.1.0."""

    id = "sarif"
    summary = "SARIF 2.1.0, for code scanning."
    refuses: ClassVar[Sequence[type[Report]]] = (EvaluationReport,)

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as SARIF: a run per model; what is clean has no results.

        Raises:
            UsageError: An evaluation, which judges nothing.
        """
        if isinstance(report, ScanReport):
            runs = [_scan_run(run, report) for run in report.runs]
        elif isinstance(report, RepairReport):
            runs = [_repair_run(report)]
        else:
            raise refuse(type(report), self.id)
        log = {"$schema": SCHEMA, "version": "2.1.0", "runs": runs}
        return json.dumps(finite_json(log), indent=2, allow_nan=False) + "\n"


_ADVICE = {
    **dict.fromkeys(
        (UNIVERSAL, SPECIFIC),
        "Do not use the model. `backdoorscan repair` writes repaired networks and measures what they cost.",
    ),
    **dict.fromkeys(
        (SUSPICION, NO_ANSWER), "It is no pass. Scan again with more clean images (`--valid`), or with all detectors."
    ),
    LEFT_IN: "Do not use this network. Try another method, or `--method auto`.",
    OVER_BUDGET: "Allow more (`--max-drop`), or try another method.",
}


def _scan_run(run: ModelRun, report: ScanReport) -> Object:
    model, alpha = run.model, budget(run, report)
    rules: dict[str, Object] = {}
    for detector in run.detectors:
        _rule(rules, detector.id, UNIVERSAL, any(nodes(run, f) for f in run.findings if f.detector == detector.id))
    results = [_finding_result(finding, run, alpha, rules) for finding in run.findings]
    if not results and (run.verdict is not Verdict.CLEAN or not run.complete):
        # A reader of SARIF takes no results for no problems.
        text = " ".join([*reasons(run, alpha), *([] if run.complete else [INCOMPLETE])])
        rule = _rule(rules, "scan", NO_ANSWER)
        name = fingerprint(model.get("sha256"), NO_ANSWER.id)
        results.append(_result(rule, rules, "warning", text, [_location(model)], name))
    invocation: Object = {"executionSuccessful": run.complete}
    notifications = [
        *([_notification("error", run.error)] if run.error else []),
        *(_notification("error", f"{d.id} failed: {plain(d.error, 500)}") for d in run.detectors if d.error),
        *(_notification("note", f"{d.id}: {d.note}") for d in run.detectors if d.note and not d.error),
        *(_notification("note", f"{note}.") for note in run.notes),
        *(_notification("note", f"Not tested: {spot}.") for spot in run.not_tested),
    ]
    if notifications:
        invocation["toolExecutionNotifications"] = notifications
    figures = {"verdict": str(run.verdict), "alpha": alpha, "seed": report.seed, "format": model.get("format")}
    return _run(report, "scan", model, rules, results, invocation, figures)


def _run(
    report: Report,
    verb: str,
    model: Mapping[str, Any],
    rules: Mapping[str, Object],
    results: Sequence[Object],
    invocation: Object,
    figures: Object,
) -> Object:
    version = report.versions.get("backdoorscan", "")
    file: Object = {"location": _artifact_location(model), "roles": ["analysisTarget"]}
    if model.get("sha256"):
        file["hashes"] = {"sha-256": model["sha256"]}
    return {
        "tool": {
            "driver": {
                "name": "backdoorscan",
                "version": version,
                "semanticVersion": version,
                "rules": list(rules.values()),
            }
        },
        # What is uploaded twice under one category replaces what was there: each model has its own.
        "automationDetails": {"id": f"backdoorscan/{verb}/{uri(model.get('path'))[0].removeprefix('file:///')}/"},
        "invocations": [invocation],
        "artifacts": [file],
        "results": list(results),
        "columnKind": "unicodeCodePoints",
        "properties": figures,
    }


def _rule(rules: dict[str, Object], owner: str, kind: Kind, architecture: bool = False) -> str:
    """The name of a rule, which is added if it is not there."""
    name = f"{plain(visible(owner), 80)}/{kind.id}"
    if name not in rules:
        tags = ["security", *(f"external/mitre-atlas/{technique}" for technique in techniques(architecture))]
        what = _ADVICE[kind]
        rules[name] = {
            "id": name,
            "name": "".join(part.capitalize() for part in name.replace("/", "-").split("-")),
            "shortDescription": {"text": f"{kind.title} ({plain(visible(owner), 80)})"},
            "fullDescription": {"text": kind.text},
            "help": {"text": f"{kind.text} {what.replace('`', '')}", "markdown": f"{kind.text}\n\n{what}"},
            "defaultConfiguration": {"level": "error" if kind.proven else "warning"},
            "properties": {
                "tags": [*tags, *(f"external/owasp-ml/{risk}" for risk in OWASP)],
                "security-severity": f"{kind.security:.1f}",
                "precision": "high" if kind.proven else "medium",
            },
        }
    return name


def _finding_result(finding: Finding, run: ModelRun, alpha: float, rules: dict[str, Object]) -> Object:
    kind = kind_of(finding, alpha)
    labels = [finding.target_label, *([] if finding.source_label is None else [finding.source_label])]
    accused = nodes(run, finding)
    rule = _rule(rules, finding.detector, kind, bool(accused))
    places = [*map(_label, labels), *map(_layer, accused)]
    result = _result(
        rule,
        rules,
        "error" if kind.proven else "warning",
        f"{kind.title}. {finding_sentence(finding, alpha)}",
        [_location(run.model, places)],
        finding.fingerprint(str(run.model.get("sha256"))),
    )
    if finding.suppressed is not None:
        result["suppressions"] = [{"kind": "external", "justification": visible(finding.suppressed, lines=True)}]
    trigger = finding.trigger
    result["properties"] = {
        "targetLabel": finding.target_label,
        "sourceLabel": finding.source_label,
        "pValue": finding.p_value,
        "score": finding.score,
        "severity": finding.severity and str(finding.severity),
        "attackSuccessRate": finding.attack_success_rate,
        "triggerL1": None if trigger is None else trigger.l1,
        "triggerArea": None if trigger is None else trigger.area,
    }
    return result


def _result(
    rule: str, rules: Mapping[str, Object], level: str, text: str, places: Sequence[Object], name: str
) -> Object:
    markdown = prose(text, 1000).replace("{", "{{").replace("}", "}}")
    return {
        "ruleId": rule,
        "ruleIndex": list(rules).index(rule),
        # Kinds other than "fail" would have no level by the standard: what is no pass would not be seen.
        "kind": "fail",
        "level": level,
        "message": {
            "text": _literal(visible(text)),
            "markdown": markdown,
        },
        "locations": places,
        "partialFingerprints": {"backdoorscan/v1": name, "primaryLocationLineHash": f"{name[:16]}:1"},
    }


def _literal(text: str) -> str:
    """Text in which braces are no places for arguments and brackets no links."""
    return re.sub(r"([\[\]\\])", r"\\\1", text).replace("{", "{{").replace("}", "}}")


def _location(file: Mapping[str, Any], places: Sequence[Object] = ()) -> Object:
    location: Object = {"physicalLocation": {"artifactLocation": _artifact_location(file), "region": {"startLine": 1}}}
    if places:
        location["logicalLocations"] = list(places)
    return location


def _artifact_location(file: Mapping[str, Any]) -> Object:
    address, relative = uri(file.get("path"))
    inside = relative and not address.startswith("../")
    return {"uri": address, **({"uriBaseId": "%SRCROOT%"} if inside else {})}


def _notification(level: str, text: str) -> Object:
    return {"level": level, "message": {"text": _literal(visible(text, lines=True))}}


def _repair_run(report: RepairReport) -> Object:
    rules: dict[str, Object] = {}
    results = [_candidate_result(row, report, rules) for row in report.candidates if not is_repaired(row)]
    if not report.candidates:
        rule = _rule(rules, report.method, NO_ANSWER)
        name = fingerprint(report.model.get("sha256"), report.method, NO_ANSWER.id)
        results = [_result(rule, rules, "warning", "No network was written.", [_location(report.model)], name)]
    figures = {"method": report.method, "seed": report.seed, "candidates": len(report.candidates)}
    return _run(report, "repair", report.model, rules, results, {"executionSuccessful": True}, figures)


def _candidate_result(row: CandidateRow, report: RepairReport, rules: dict[str, Object]) -> Object:
    kind = LEFT_IN if left_in(row) else OVER_BUDGET
    layer = row.facts.get("layer")
    places = [*map(_label, row.flagged), *([_layer(layer)] if isinstance(layer, str) and layer else [])]
    return _result(
        _rule(rules, report.method, kind),
        rules,
        "error" if kind.proven else "warning",
        row_sentence(row, report.before),
        [_location({"path": next(iter(row.files), report.model.get("path"))}, places)],
        fingerprint(report.model.get("sha256"), report.method, row.name, row.kind),
    )


def _label(label: int) -> Object:
    return {"name": f"label {label}", "fullyQualifiedName": f"label/{label}", "kind": "label"}


def _layer(name: str) -> Object:
    shown = plain(visible(name), 200)
    return {"name": shown, "fullyQualifiedName": f"layer/{shown}", "kind": "layer"}
