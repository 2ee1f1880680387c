"""CycloneDX 1.6: the model as a component of a bill of materials, with a model card, and findings as vulnerabilities.

The report knows no time, and neither does the bill: the same report gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from backdoorscan.findings import Finding
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport, Scores
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.policy import is_repaired
from backdoorscan.report import ModelRun, Report, ScanReport
from backdoorscan.reports.outcome import REVERSED, TRUE, measure_of, network_name, row_sentence
from backdoorscan.reports.taxonomy import CWE, fingerprint, kind_of, nodes, techniques
from backdoorscan.reports.telling import INCOMPLETE, budget, finding_sentence
from backdoorscan.reports.words import finite_json, plain, visible

Object = dict[str, Any]

_CLEAN, _POISONED, _STAMPED = "{clean} clean images", "{poisoned} poisoned images", "{clean} clean images, stamped"
_RATES = {
    "clean accuracy": ("clean_accuracy", _CLEAN),
    "macro precision": ("macro_precision", _CLEAN),
    TRUE: ("attack_success_rate", _POISONED),
    REVERSED: ("reversed_success_rate", _STAMPED),
    "false reject rate": ("false_reject_rate", _CLEAN),
    "caught rate": ("caught_rate", _POISONED),
}
"""Name -> field of ``Scores``, and what it is measured on."""


class CycloneDx(Reporter):
    """CycloneDX 1.6 as JSON."""

    id = "cyclonedx"
    summary = "CycloneDX 1.6: a bill of materials with the model's card and its findings."

    def render(self, report: Report, terminal: Terminal) -> str:
        """The report as a bill of materials.

        Raises:
            TypeError: A report of a kind this format does not know.
        """
        if isinstance(report, ScanReport):
            components = [_scanned(run) for run in report.runs]
            found = [each for run in report.runs for each in _suspected(run, budget(run, report))]
        elif isinstance(report, RepairReport):
            components = [_original(report), *(_candidate(row, report) for row in report.candidates)]
            found = list(_repaired(report))
        elif isinstance(report, EvaluationReport):
            metrics = list(_rates(report.scores, report))
            components = [_model(report.model, metrics, (), {"kind": report.model.get("kind")})]
            found = []
        else:
            raise TypeError(f"no bill of materials for {type(report).__name__}")
        bill = {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "serialNumber": _serial(report, components),
            "version": 1,
            "metadata": {"tools": {"components": [_tool(report)]}, "properties": _properties(_facts(report))},
            "components": components,
            "vulnerabilities": found,
        }
        return json.dumps(finite_json(bill), indent=2, allow_nan=False) + "\n"


def _serial(report: Report, components: Sequence[Object]) -> str:
    """A number that follows from the models' digests and from how they were examined."""
    digests = [component["bom-ref"] for component in components]
    name = fingerprint(report.schema, report.seed, report.versions.get("backdoorscan"), *digests)
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'backdoorscan:{name}')}"


def _tool(report: Report) -> Object:
    return {"type": "application", "name": "backdoorscan", "version": visible(report.versions.get("backdoorscan", ""))}


def _facts(report: Report) -> Object:
    facts: Object = {"seed": report.seed, **{f"version:{name}": text for name, text in report.versions.items()}}
    if isinstance(report, ScanReport):
        facts |= {"verdict": str(report.verdict), "complete": report.complete, "alpha": report.alpha}
    return facts


def _properties(facts: Mapping[str, Any]) -> list[Object]:
    return [
        {"name": visible(f"backdoorscan:{name}"), "value": visible(_value(value))}
        for name, value in facts.items()
        if value is not None and value != ""
    ]


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _model(
    model: Mapping[str, Any], metrics: Sequence[Object], limits: Sequence[str], facts: Mapping[str, Any]
) -> Object:
    shape = "x".join(map(str, model.get("input_shape") or ("of unknown size",)))
    answers = f"{model.get('num_classes', 'unknown')} classes"
    parameters: Object = {
        "task": "image-classification",
        "inputs": [{"format": f"image {shape}"}],
        "outputs": [{"format": f"{answers}, or backdoored" if model.get("kind") == "goodnet" else answers}],
    }
    if isinstance(model.get("architecture"), str):
        parameters["architectureFamily"] = visible(model["architecture"])
    card: Object = {"modelParameters": parameters}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": list(metrics)}
    if limits:
        card["considerations"] = {"technicalLimitations": [visible(limit) for limit in limits]}
    known = ("path", "format", "parameters", "framework", "layout")
    component: Object = {
        "type": "machine-learning-model",
        "bom-ref": _reference(model),
        "name": visible(PurePath(str(model.get("path"))).name) or "model",
        "modelCard": card,
        "properties": _properties({**{name: model.get(name) for name in known}, **facts}),
    }
    if model.get("sha256"):
        component["hashes"] = [{"alg": "SHA-256", "content": model["sha256"]}]
    return component


def _reference(model: Mapping[str, Any]) -> str:
    """A name for the component: its digest, and its path, as two files may be the same."""
    return f"{model.get('sha256') or 'model'}:{fingerprint(model.get('path'))[:8]}"


def _metric(name: str, value: float, part: str) -> Object:
    return {"type": name, "value": f"{value:.6g}", "slice": visible(part)}


def _rates(scores: Scores, report: RepairReport | EvaluationReport) -> Iterator[Object]:
    counts = {
        "clean": getattr(report, "measured", 0) or report.images.get("count"),
        "poisoned": (report.poisoned or {}).get("count"),
    }
    for name, (field, part) in _RATES.items():
        rate = getattr(scores, field)
        if rate is not None:
            yield _metric(name, rate, part.format(**counts))


def _scanned(run: ModelRun) -> Object:
    accuracy = [] if run.clean_accuracy is None else [_metric("clean accuracy", run.clean_accuracy, "clean images")]
    evidence = [
        _metric("p-value", detector.p_value, f"most suspicious label of {detector.id}")
        for detector in run.detectors
        if detector.p_value is not None
    ]
    attacks = [
        _metric(REVERSED, f.attack_success_rate, f"reversed trigger of label {f.target_label} by {f.detector}")
        for f in run.findings
        if f.attack_success_rate is not None
    ]
    limits = [*(f"Not tested: {spot}." for spot in run.not_tested), *(f"{note}." for note in run.notes)]
    limits += [f"{d.id} failed: {plain(d.error)}" for d in run.detectors if d.error]
    limits += [run.error] if run.error else []
    limits += [] if run.complete else [INCOMPLETE]
    answer = {"verdict": str(run.verdict), "complete": run.complete}
    return _model(run.model, [*accuracy, *evidence, *attacks], limits, answer)


def _suspected(run: ModelRun, alpha: float) -> Iterator[Object]:
    yield from (_vulnerability(f, run.model, alpha, architecture=bool(nodes(run, f))) for f in run.findings)


def _vulnerability(finding: Finding, model: Mapping[str, Any], alpha: float, *, architecture: bool = False) -> Object:
    kind = kind_of(finding, alpha)
    name = finding.fingerprint(str(model.get("sha256")))
    analysis: Object = {"state": "exploitable" if kind.proven else "in_triage"}
    if finding.suppressed is not None:
        analysis["response"] = ["will_not_fix"]
    sentence = finding_sentence(finding, alpha)
    return {
        "bom-ref": f"finding:{name}:{fingerprint(model.get('path'))[:8]}",
        "id": f"backdoorscan:{name[:16]}",
        "source": {"name": "backdoorscan"},
        "ratings": [
            {
                "source": {"name": "backdoorscan"},
                "score": kind.security,
                "severity": str(finding.severity or kind.severity),
                "method": "other",
                "justification": kind.text,
            }
        ],
        "cwes": [CWE],
        "description": visible(f"{kind.title}: label {finding.target_label} ({finding.detector})"),
        "detail": visible(sentence),
        "recommendation": "Do not use the model; `backdoorscan repair` writes repaired networks."
        if kind.proven
        else "Scan again with more clean images, or with all detectors.",
        "analysis": {**analysis, "detail": visible(sentence)},
        "affects": [{"ref": _reference(model)}],
        "properties": _properties(
            {
                "detector": finding.detector,
                "target_label": finding.target_label,
                "source_label": finding.source_label,
                "p_value": finding.p_value,
                "score": finding.score,
                "attack_success_rate": finding.attack_success_rate,
                "trigger_l1": finding.trigger and finding.trigger.l1,
                "mitre_atlas": ", ".join(techniques(architecture)),
            }
        ),
    }


def _original(report: RepairReport) -> Object:
    return _model(report.model, list(_rates(report.before, report)), (), {"role": "original"})


def _candidate(row: CandidateRow, report: RepairReport) -> Object:
    component = _model(_written(row, report), list(_rates(row.scores, report)), (), _row_facts(row, report))
    original = _original(report)
    component["pedigree"] = {
        "ancestors": [{key: original[key] for key in ("type", "name", "hashes") if key in original}],
        "notes": visible(f"{network_name(row)}, repaired by {row.method or report.method}"),
    }
    return component


def _row_facts(row: CandidateRow, report: RepairReport) -> Object:
    return {
        "role": row.kind,
        "method": row.method or report.method,
        "candidate": row.name,
        "verdict": row.verdict and str(row.verdict),
        "within_budget": row.within_budget,
    }


def _written(row: CandidateRow, report: RepairReport) -> Object:
    """What is known of a network's file, of which there is no digest: what the original's says of neither."""
    same = {name: report.model.get(name) for name in ("input_shape", "num_classes")}
    kind = "goodnet" if row.kind == "goodnet" else "classifier"
    return {**same, "path": next(iter(row.files), row.name), "kind": kind}


def _repaired(report: RepairReport) -> Iterator[Object]:
    """What the repair worked from, and for each network what became of it."""
    for finding in report.findings:
        # Of whatever strength: the repair was told that it is one.
        yield _vulnerability(finding, report.model, 1.0) | {"analysis": _analysis(report)}
    if not report.findings:
        return
    for row in report.candidates:
        gone = is_repaired(row)
        measured = bool(measure_of(report.before)) or row.verdict is not None
        state = ("resolved_with_pedigree" if gone else "exploitable") if measured else "in_triage"
        name = fingerprint(report.model.get("sha256"), report.method, row.name, row.kind)
        yield {
            "bom-ref": f"repair:{name}",
            "id": f"backdoorscan:{name[:16]}",
            "source": {"name": "backdoorscan"},
            "cwes": [CWE],
            "description": visible(f"The backdoor of the original in {network_name(row)}"),
            "analysis": {"state": state, "detail": visible(row_sentence(row, report.before))},
            "affects": [{"ref": _reference(_written(row, report))}],
        }


def _analysis(report: RepairReport) -> Object:
    return {"state": "exploitable", "detail": f"Of the original; {len(report.candidates)} repaired networks follow."}
