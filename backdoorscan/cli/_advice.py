"""What to do next: one line for the user after a command, on stderr."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backdoorscan.measured import EvaluationReport, RepairReport
    from backdoorscan.report import ModelRun


def after_scan(run: ModelRun, valid: str | None, arch: str | None = None, trust: bool = False) -> str:
    """Of the model that matters most.

    Args:
        run: What the scan said of it.
        valid: The clean images as the user named them, if there were any.
        arch: Its ``--arch``.
        trust: Its ``--trust``.
    """
    model = str(run.model["path"])
    if run.error:
        return f"next: {_command('scan', model, '--valid', valid or 'DATA')}, alone, says more"
    if run.verdict == "backdoored":
        more = [*(("--arch", arch) if arch else ()), *(("--trust",) if trust else ())]
        return f"next: {_command('repair', model, '--valid', valid or 'DATA', *more)}"
    if any("ran out of time" in detector.error for detector in run.detectors):
        return "next: the same command with a longer --timeout and --resume goes on where it ended"
    if not run.complete:
        return f"next: {_command('-v', 'scan', model, '--valid', valid or 'DATA')} shows where a detector failed"
    if valid is None:
        return "next: give clean labelled images with --valid; a scan without any is less certain"
    if not run.detectors:
        return "next: pass the model's own images and labels with --valid, and let the scan find --input-range itself"
    if run.verdict == "inconclusive":
        return "next: more clean images may decide it; -f html -o report.html shows the triggers"
    return "next: -f html -o report.html shows every label's smallest trigger, and what was not tested"


def after_repair(report: RepairReport, valid: str) -> str:
    """Of the network to use, or of another method."""
    from backdoorscan.policy import is_repaired
    from backdoorscan.repairing import AUTO
    from backdoorscan.reports.outcome import outcome

    model, best = str(report.model["path"]), outcome(report).best
    repaired = [row for row in report.candidates if is_repaired(row) and row.files]
    if repaired:
        chosen = best if best in repaired else repaired[0]
        file = chosen.files[0]
        if report.poisoned is None:
            # A GoodNet, and what a file that was trusted has been converted to, hold their own architecture.
            whole = chosen.kind == "goodnet" or report.model.get("trusted")
            reading = () if whole else _reading(report.model)
            command = _command("evaluate", file, "--valid", valid, "--poisoned", "DATA", *reading)
            return f"next: {command}, if you have poisoned images"
        if chosen.kind == "goodnet" and file.endswith(".onnx"):
            return f"next: {_command('predict', file, 'IMAGE')}"
        return f"next: use {file} in the place of {model}"
    if report.method != AUTO:
        return f"next: {_command('repair', model, '--valid', valid, '--method', AUTO, *_reading(report.model))}"
    return "next: do not use this model; poisoned images make repairs stronger: --poisoned, --learn-from-poisoned"


def after_evaluation(report: EvaluationReport, valid: str, poisoned: str | None) -> str:
    """Whether to look for a backdoor, or to repair one; empty where there is nothing to do."""
    from backdoorscan.policy import REPAIRED

    model, success = str(report.model["path"]), report.scores.attack_success_rate
    if report.model.get("kind") == "goodnet":
        return ""
    if success is None:
        return f"next: {_command('scan', model, '--valid', valid, *_reading(report.model))}"
    if success > REPAIRED:
        images = ("--valid", valid, "--poisoned", poisoned or "DATA")
        return f"next: {_command('repair', model, *images, *_reading(report.model))}"
    return ""


def _reading(model: Mapping[str, Any]) -> Iterator[str]:
    """Without which the file would be refused."""
    if model.get("arch"):
        yield from ("--arch", str(model["arch"]))
    if model.get("trusted"):
        yield "--trust"


def _command(*words: str) -> str:
    return shlex.join(["backdoorscan", *words])
