"""For authors of output formats: reports of every kind, and the check of the contract."""

from __future__ import annotations

import contextlib
import copy
import io
from dataclasses import replace
from typing import Any

import torch

from backdoorscan.errors import BackdoorscanError
from backdoorscan.findings import Finding, Severity, Verdict
from backdoorscan.measured import CandidateRow, EvaluationReport, RepairReport, Scores
from backdoorscan.plugin.contract import is_kebab, require
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.report import Cost, DetectorRun, ModelRun, Report, ScanReport
from backdoorscan.trigger import Trigger

_VERSIONS = {"backdoorscan": "0.1.0", "python": "3.11.0", "torch": "2.10.0", "numpy": "2.0.0"}
_COST = Cost(gradient_samples=1000, wall_seconds=2.0, cpu_seconds=1.5, peak_memory_mb=300.0)

HOSTILE = "net \x1b[31m\r\u202e<b>&\"'|`.h5"
"""A name that an attacker chose: escape codes, other control characters, and what markup is made of."""


def sample_reports() -> list[Report]:
    """Small made-up reports of every kind: scans, of several models and with failures too, a repair, an evaluation."""
    clean, backdoored = _run(Verdict.CLEAN), _run(Verdict.BACKDOORED, _finding(2), _finding(0, source=1))
    failed = replace(
        _run(Verdict.INCONCLUSIVE),
        complete=False,
        detectors=[replace(_detector(), p_value=None, error="neural-cleanse failed.", triggers=())],
    )
    unread = replace(
        _run(Verdict.INCONCLUSIVE),
        model={"path": "broken.h5", "sha256": None},
        images=None,
        complete=False,
        clean_accuracy=None,
        detectors=[],
        error="broken.h5 is no model.\nIt is empty.",
    )
    hostile = replace(backdoored, model={**backdoored.model, "path": HOSTILE}, notes=[f"Of {HOSTILE}"])
    scores = Scores(clean_accuracy=0.97, macro_precision=0.96)
    return [
        *(_scan(run) for run in (clean, backdoored, failed, unread, hostile)),
        _scan(backdoored, clean, unread),
        _repair(scores),
        EvaluationReport(
            seed=0,
            versions=_VERSIONS,
            cost=_COST,
            model={"kind": "classifier", **_model()},
            images=_images(),
            poisoned=_images(),
            target_label=2,
            scores=replace(scores, attack_success_rate=0.99, successful_attacks=99, unsuccessful_attacks=1),
        ),
    ]


def check_reporter(component: type[Reporter]) -> None:
    """Check everything the contract of an output format says; not whether the text is of any use.

    Args:
        component: The format.

    Raises:
        ContractError: What is wrong, and how to mend it.
    """
    name = component.__name__
    require(issubclass(component, Reporter), f"{name} is no Reporter", "Derive it from Reporter.")
    identifier, summary = getattr(component, "id", ""), getattr(component, "summary", "")
    require(is_kebab(identifier), f"{name}.id = {identifier!r} is not in kebab-case", "Users type it: -f one-line.")
    lines = summary.splitlines() if isinstance(summary, str) else []
    require(len(lines) == 1, f"{name}.summary = {summary!r} is not one line", "Say what the format is for.")
    accepted = 0
    for report in sample_reports():
        kind = type(report).__name__
        if isinstance(report, tuple(component.refuses)):
            continue
        accepted += 1
        before = copy.deepcopy(report.to_json())
        text = _rendered(component, report, Terminal())
        hint = "End in a newline, or name the kind of report in `refuses`."
        require(isinstance(text, str) and text.endswith("\n"), f"render() of a {kind} returned {text!r:.40}", hint)
        same = text == _rendered(component, report, Terminal())
        require(same, f"render() of a {kind} says something else a second time", "Let it depend on the report alone.")
        require(report.to_json() == before, f"render() changed a {kind}", "Work on copies.")
        what = f"render() of a {kind} lets a name from the report write escape codes to the terminal"
        require("\x1b" not in text, what, "Replace what is not printable, e.g. with !a, and leave colours alone.")
    require(accepted > 0, f"{name} refuses every kind of report", "Leave at least one out of `refuses`.")


def _rendered(component: type[Reporter], report: Report, terminal: Terminal) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            text = component().render(report, terminal)
        except BackdoorscanError as error:
            what = f"render() of a {type(report).__name__} raises: {error.what}"
            require(False, what, "Name the kind of report in `refuses`, or render it.")
            raise
    require(not printed.getvalue(), f"render() prints {printed.getvalue()[:40]!r}", "Return the text.")
    return text


def _scan(*runs: ModelRun) -> ScanReport:
    verdicts = [run.verdict for run in runs]
    order = (Verdict.BACKDOORED, Verdict.INCONCLUSIVE, Verdict.CLEAN)
    return ScanReport(
        seed=0,
        versions=_VERSIONS,
        cost=_COST,
        verdict=next(verdict for verdict in order if verdict in verdicts),
        complete=all(run.complete for run in runs),
        alpha=0.01,
        runs=runs,
    )


def _run(verdict: Verdict, *findings: Finding) -> ModelRun:
    return ModelRun(
        model=_model(),
        images=_images(),
        verdict=verdict,
        complete=True,
        clean_accuracy=0.97,
        findings=findings,
        detectors=[_detector()],
        cost=_COST,
        not_tested=["warping backdoors"],
        notes=["Few images."],
        otherwise=Verdict.CLEAN if findings else verdict,
    )


def _detector() -> DetectorRun:
    return DetectorRun(
        id="neural-cleanse",
        version="0.1.0",
        options={"steps": 100},
        evidence={"units": []},
        p_value=0.002,
        gradient_samples=1000,
        seconds=2.0,
        triggers=[_trigger(2)],
    )


def _finding(label: int, source: int | None = None) -> Finding:
    return Finding(
        target_label=label,
        source_label=source,
        p_value=0.002,
        score=8.5,
        trigger=_trigger(label),
        attack_success_rate=0.98,
        detector="neural-cleanse",
        severity=Severity.CRITICAL if source is None else Severity.HIGH,
    )


def _trigger(label: int) -> Trigger:
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :2] = 1
    return Trigger(mask, torch.ones(1, 8, 8), label)


def _model() -> dict[str, Any]:
    return {
        "path": "models/net.h5",
        "sha256": "ab" * 32,
        "format": "keras-h5",
        "input_shape": [1, 8, 8],
        "num_classes": 5,
        "input_range": [0, 1],
        "mean": [],
        "std": [],
        "layout": "NHWC",
        "parameters": 1234,
        "final_activation": "softmax",
        "input_range_found": True,
        "input_ranges_tried": {"0..1": 0.97},
    }


def _images() -> dict[str, Any]:
    return {"path": "clean.h5", "sha256": "cd" * 32, "count": 100}


def _repair(before: Scores) -> RepairReport:
    facts = {"drop": 2.0, "channels_pruned": 3, "channels": 16}
    rows = [
        CandidateRow("X=2", "repaired", before, facts, ["net_X=2.h5"], "prune"),
        CandidateRow("X=2", "goodnet", before, facts, ["net_X=2.goodnet.onnx"], "prune"),
    ]
    return RepairReport(
        seed=0,
        versions=_VERSIONS,
        cost=_COST,
        model=_model(),
        images=_images(),
        poisoned=None,
        method="prune",
        options={"drop": [2.0]},
        before=before,
        candidates=rows,
        findings=[_finding(2)],
        measured_on="held out",
        measured=25,
    )
