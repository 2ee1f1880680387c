"""From findings to a verdict to an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backdoorscan.errors import ExitCode
from backdoorscan.findings import Finding, Judgement, Verdict
from backdoorscan.measured import CandidateRow, RepairReport

DEFAULT_ALPHA = 0.01
"""False alarms one accepts: one clean model in a hundred."""

SUSPECT = 3.0
"""Evidence up to this many times weaker than ``alpha`` asks for is neither clean nor backdoored."""


def verdict(judgements: Sequence[Judgement], alpha: float) -> tuple[Verdict, list[Finding]]:
    """The verdict on one model, and the findings that it rests on.

    Args:
        judgements: One per detector that ran to its end.
        alpha: Largest p-value at which a finding counts, 0 to 1.

    Returns:
        Backdoored if any finding's p-value is at most ``alpha``; inconclusive if none is but one comes near, or no
        detector could answer; clean otherwise. The p-values of the findings are corrected for the number of
        detectors that answered (Bonferroni), as each of them could raise a false alarm.
    """
    answers = [judgement for judgement in judgements if judgement.p_value is not None]
    corrected = [
        replace(f, p_value=min(1.0, len(answers) * f.p_value)) for judgement in answers for f in judgement.findings
    ]
    near = [f for f in corrected if f.p_value <= min(1.0, SUSPECT * alpha)]
    near.sort(key=lambda finding: (finding.p_value, finding.target_label))
    proven = [finding for finding in near if finding.p_value <= alpha]
    if proven:
        return Verdict.BACKDOORED, proven
    if near or not answers:
        return Verdict.INCONCLUSIVE, near
    return Verdict.CLEAN, []


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
