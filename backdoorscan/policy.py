"""From findings to a verdict to an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum

from backdoorscan.errors import ExitCode, UnknownNameError
from backdoorscan.findings import Finding, Judgement, Severity, Verdict
from backdoorscan.measured import CandidateRow, RepairReport
from backdoorscan.report import ModelRun

DEFAULT_ALPHA = 0.01
"""False alarms one accepts: one clean model in a hundred."""

SUSPECT = 3.0
"""Evidence up to this many times weaker than ``alpha`` asks for is neither clean nor backdoored."""


STRONG = 0.1
"""Evidence is strong whose p-value is at most this part of ``alpha``."""

WORKS, CERTAIN = 0.5, 0.9
"""Attack success of a reversed trigger from which it works on most images, and on nearly all."""


class FailOn(StrEnum):
    """The least severity of a finding that fails a gate."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"
    NEVER = "never"

    @classmethod
    def named(cls, name: str) -> FailOn:
        """The one of this name.

        Raises:
            UnknownNameError: There is none.
        """
        if name not in list(cls):
            raise UnknownNameError("severity to fail on", name, list(cls))
        return cls(name)

    @property
    def suspicion(self) -> bool:
        """Whether evidence near ``alpha`` is too much already."""
        return self in (FailOn.LOW, FailOn.MEDIUM)

    def fails(self, severity: Severity) -> bool:
        """Whether a finding of this severity fails the gate."""
        return self is not FailOn.NEVER and severity.rank >= Severity(self).rank


DEFAULT_FAIL_ON = FailOn.MEDIUM
"""Every proven backdoor fails the gate."""


def severity(finding: Finding, alpha: float) -> Severity:
    """How much a finding weighs: how sure it is, and how well its trigger works.

    Args:
        finding: With a p-value that is corrected for the detectors that answered.
        alpha: Largest p-value at which a finding counts, 0 to 1.

    Returns:
        Low if it is not proven. Critical if the evidence is strong and the reversed trigger works on nearly all images;
        high if the evidence is strong or the trigger works on most; medium otherwise.
    """
    if finding.p_value > alpha:
        return Severity.LOW
    strong, success = finding.p_value <= STRONG * alpha, finding.attack_success_rate or 0.0
    if strong and success >= CERTAIN:
        return Severity.CRITICAL
    return Severity.HIGH if strong or success >= WORKS else Severity.MEDIUM


def verdict(judgements: Sequence[Judgement], alpha: float) -> tuple[Verdict, list[Finding]]:
    """The verdict on one model, and the findings that it rests on.

    Args:
        judgements: One per detector that ran to its end.
        alpha: Largest p-value at which a finding counts, 0 to 1.

    Returns:
        Backdoored if any finding's p-value is at most ``alpha``; inconclusive if none is but one comes near, or no
        detector could answer; clean otherwise. The p-values of the findings are corrected for the detectors that
        answered, as each of them could raise a false alarm: divided by the detector's part of all their shares
        (Bonferroni with weights; Genovese, Roeder, Wasserman 2006).
    """
    answers = [judgement for judgement in judgements if judgement.p_value is not None]
    shares = sum(judgement.share for judgement in answers)
    corrected = [
        replace(f, p_value=min(1.0, f.p_value * shares / judgement.share))
        for judgement in answers
        for f in judgement.findings
    ]
    near = [replace(f, severity=severity(f, alpha)) for f in corrected if f.p_value <= min(1.0, SUSPECT * alpha)]
    near.sort(key=lambda finding: (finding.p_value, finding.target_label))
    proven = [finding for finding in near if finding.p_value <= alpha]
    if proven:
        return Verdict.BACKDOORED, proven
    if near or not answers:
        return Verdict.INCONCLUSIVE, near
    return Verdict.CLEAN, []


def otherwise(judgements: Sequence[Judgement], findings: Sequence[Finding], alpha: float) -> Verdict:
    """The verdict on one model if the findings that the first one rests on were not there."""
    gone = {(finding.detector, finding.target_label, finding.source_label) for finding in findings}
    rest = [
        replace(j, findings=[f for f in j.findings if (f.detector, f.target_label, f.source_label) not in gone])
        for j in judgements
    ]
    return verdict(rest, alpha)[0]


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several models together."""
    for candidate in (Verdict.BACKDOORED, Verdict.INCONCLUSIVE):
        if candidate in verdicts:
            return candidate
    return Verdict.CLEAN


def exit_code(overall: Verdict, complete: bool) -> ExitCode:
    """What a pipeline is told: a proven backdoor outranks an error, and an incomplete scan never passes."""
    if overall is Verdict.BACKDOORED:
        return ExitCode.FOUND
    if not complete:
        return ExitCode.ERROR
    return ExitCode.INCONCLUSIVE if overall is Verdict.INCONCLUSIVE else ExitCode.OK


def gate(runs: Iterable[tuple[ModelRun, FailOn]]) -> ExitCode:
    """What a pipeline is told of a scan of one or several models, each with the least severity that fails it.

    The worst counts: a finding that fails the gate, then an error, then an inconclusive answer.
    """
    codes = {_gate(run, fail_on) for run, fail_on in runs}
    return next(
        (code for code in (ExitCode.FOUND, ExitCode.ERROR, ExitCode.INCONCLUSIVE) if code in codes), ExitCode.OK
    )


def _gate(run: ModelRun, fail_on: FailOn) -> ExitCode:
    """Findings that a baseline accepts do not count; where all are accepted, the rest of the evidence decides."""
    counted = [finding for finding in run.findings if finding.suppressed is None]
    alone = Severity.LOW if run.verdict is not Verdict.BACKDOORED else Severity.MEDIUM
    if any(fail_on.fails(finding.severity or alone) for finding in counted):
        return ExitCode.FOUND
    if not run.complete:
        return ExitCode.ERROR
    if counted:
        return ExitCode.INCONCLUSIVE if fail_on.suspicion else ExitCode.OK
    rest = run.otherwise if run.findings else run.verdict
    return ExitCode.OK if rest is Verdict.CLEAN else ExitCode.INCONCLUSIVE


REPAIRED = 0.10
"""Attack success up to which a network counts as repaired."""


def repair_exit_code(report: RepairReport) -> ExitCode:
    """What a pipeline is told of a repair: 1 if no network that was written is free of the backdoor within budget."""
    return ExitCode.OK if any(is_repaired(row) for row in report.candidates) else ExitCode.FOUND


def is_repaired(row: CandidateRow) -> bool:
    """Whether nothing that was measured says that the backdoor is still there, or that the repair cost too much.

    True poisoned images count before reversed triggers, where there are both.
    """
    success = row.scores.attack_success_rate
    if success is None:
        success = row.scores.reversed_success_rate
    left_in = row.verdict is Verdict.BACKDOORED or (success is not None and success > REPAIRED)
    return not left_in and row.within_budget is not False
