"""The line that says what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from typer.main import get_command

from backdoorscan.cli import app
from backdoorscan.cli._advice import after_evaluation, after_repair, after_scan
from backdoorscan.demo import DemoFiles
from backdoorscan.findings import Verdict
from backdoorscan.measured import EvaluationReport, RepairReport, Scores
from backdoorscan.report import Cost, DetectorRun, ModelRun, ScanReport

Cli = Callable[..., Any]


@pytest.fixture
def run(scanned: Any) -> ModelRun:
    """The backdoored network's part of a scan."""
    (only,) = ScanReport.from_json(scanned.json).runs
    return only


def command_of(advice: str) -> list[str]:
    """The command that a line tells the user to type: it must be one."""
    text = advice.removeprefix("next: ").partition(", ")[0].partition(" shows where")[0]
    program, name, *rest = shlex.split(text)
    assert program == "backdoorscan"
    if name == "-v":
        name, *rest = rest
    with get_command(app).commands[name].make_context(name, list(rest)):
        return [name, *rest]


def test_a_backdoored_model_is_to_be_repaired(run: ModelRun) -> None:
    odd = replace(run, model={**run.model, "path": "my model.h5"})
    advice = command_of(after_scan(odd, "clean images.h5", "net.py:make"))
    assert advice == ["repair", "my model.h5", "--valid", "clean images.h5", "--arch", "net.py:make"]


@pytest.mark.parametrize(
    ("changes", "valid", "word"),
    [
        ({}, "clean.h5", "report.html"),
        ({}, None, "--valid"),
        ({"verdict": Verdict.INCONCLUSIVE}, "clean.h5", "more clean images"),
        ({"verdict": Verdict.INCONCLUSIVE, "detectors": []}, "clean.h5", "--input-range"),
        ({"complete": False}, "clean.h5", "-v scan"),
        ({"error": "It is a text file."}, "clean.h5", "alone"),
    ],
)
def test_what_is_advised_of_other_models(
    changes: Mapping[str, Any], valid: str | None, word: str, run: ModelRun
) -> None:
    advice = after_scan(replace(run, **{"verdict": Verdict.CLEAN, "findings": [], **changes}), valid)
    assert advice.startswith("next: ")
    assert word in advice
    if "backdoorscan" in advice:
        assert command_of(advice)[0] == "scan"


def test_a_scan_out_of_time_goes_on(run: ModelRun) -> None:
    late = DetectorRun(**{**vars(run.detectors[0]), "error": "It ran out of time."})
    advice = after_scan(replace(run, verdict=Verdict.INCONCLUSIVE, complete=False, detectors=[late]), "clean.h5")
    assert "--timeout" in advice
    assert "--resume" in advice


def test_what_is_advised_after_a_repair(repaired: Any) -> None:
    report = RepairReport.from_json(repaired.json)
    best = max(report.candidates, key=lambda row: row.scores.clean_accuracy)
    broken = [row for row in report.candidates if (row.scores.attack_success_rate or 0) <= 0.1]
    assert broken
    assert any(file in after_repair(report, "clean.h5") for row in broken for file in row.files[:1])
    unmeasured = replace(report, poisoned=None)
    assert command_of(after_repair(unmeasured, "clean.h5"))[0] == "evaluate"
    weights = [replace(best, kind="repaired", scores=replace(best.scores, attack_success_rate=0.0), files=["b.pt"])]
    of_weights = replace(unmeasured, model={**report.model, "arch": "net.py:make"}, candidates=weights)
    assert command_of(after_repair(of_weights, "clean.h5").partition(", if")[0])[-2:] == ["--arch", "net.py:make"]
    goodnet = [replace(weights[0], kind="goodnet", files=["b.goodnet.onnx"])]
    assert "--arch" not in after_repair(replace(of_weights, candidates=goodnet), "clean.h5")
    stubborn = [replace(best, scores=replace(best.scores, attack_success_rate=0.9))]
    advice = command_of(after_repair(replace(report, candidates=stubborn), "clean.h5"))
    assert advice[-2:] == ["--method", "auto"]
    assert "do not use" in after_repair(replace(report, candidates=stubborn, method="auto"), "clean.h5")


def test_what_is_advised_after_an_evaluation(demo: DemoFiles) -> None:
    scores = Scores(clean_accuracy=0.9, macro_precision=0.9)
    report = EvaluationReport(
        seed=0,
        versions={},
        cost=Cost(gradient_samples=0, wall_seconds=0.0, cpu_seconds=0.0, peak_memory_mb=0.0),
        model={"path": str(demo.model), "kind": "classifier"},
        images={},
        poisoned=None,
        target_label=None,
        scores=scores,
    )
    assert command_of(after_evaluation(report, "clean.h5", None))[:2] == ["scan", str(demo.model)]
    works = replace(report, scores=replace(scores, attack_success_rate=0.9))
    assert command_of(after_evaluation(works, "clean.h5", "poisoned.h5"))[0] == "repair"
    trusted = replace(report, model={**report.model, "arch": "net.py:make", "trusted": True})
    assert command_of(after_evaluation(trusted, "clean.h5", None))[-3:] == ["--arch", "net.py:make", "--trust"]
    assert after_evaluation(replace(report, scores=replace(scores, attack_success_rate=0.01)), "clean.h5", "p.h5") == ""
    assert after_evaluation(replace(works, model={**works.model, "kind": "goodnet"}), "clean.h5", "p.h5") == ""


def test_quiet_says_nothing(demo: DemoFiles, cli: Cli) -> None:
    command = ("evaluate", demo.model, "--valid", demo.clean, "--limit", 40)
    assert cli(*command).err.startswith("next: ")
    assert cli("-q", *command).err == ""
    assert cli(*command, "-f", "json").err == ""
