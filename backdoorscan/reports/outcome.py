"""What a repair came to, in words: of which success they speak, the true attack's or that of reversed triggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from backdoorscan.findings import Verdict
from backdoorscan.measured import NOT_WRITTEN, CandidateRow, RepairReport, Scores
from backdoorscan.policy import REPAIRED, is_repaired
from backdoorscan.reports.words import percent, plain

TRUE = "true attack success"
REVERSED = "success of the reversed triggers"


@dataclass(frozen=True)
class Outcome:
    """A repair in a heading and a few sentences.

    Attributes:
        kind: How good the news is: ``"good"``, ``"warn"`` or ``"bad"``.
        title: The heading.
        lines: What was measured, and what that means.
        best: The network the lines speak of, or ``None`` where no attack was measured.
        measure: Which success was measured: ``TRUE``, ``REVERSED``, or empty.
    """

    kind: str
    title: str
    lines: Sequence[str]
    best: CandidateRow | None
    measure: str


def outcome(report: RepairReport) -> Outcome:
    """What a repair came to."""
    result = _outcome(report)
    return replace(result, lines=[*result.lines, *_not_written(report)])


def _not_written(report: RepairReport) -> Iterator[str]:
    for row in report.candidates:
        missing = row.facts.get(NOT_WRITTEN)
        if isinstance(missing, Mapping):
            own = plain(missing.get("format"))
            yield f"{network_name(row)} was not written as {own}, the model's own format: {plain(missing.get('why'))}"


def _outcome(report: RepairReport) -> Outcome:
    safe = [row for row in report.candidates if is_repaired(row)]
    measure = measure_of(report.before)
    if not report.candidates:
        return Outcome("bad", "No network was written", ["The method had nothing to offer."], None, measure)
    if not measure and safe:
        text = "No poisoned images were given: the table shows what the repair costs, not what it gains."
        return Outcome("warn", "Repaired, attack not measured", [text], None, "")
    best = min(safe or report.candidates, key=lambda row: (success(row.scores) or 0.0) - row.scores.clean_accuracy)
    lines = [_compared(report.before, best, measure)]
    if measure == REVERSED:
        lines.append("No poisoned images were given: what the true trigger does now was not measured.")
    if not safe:
        return Outcome(
            "bad", shortcoming(best, measure), [*lines, "None of the networks written passes."], best, measure
        )
    titles = {TRUE: "The attack is broken", REVERSED: "The reversed triggers no longer work"}
    lines.append(f"A network counts as repaired up to {REPAIRED:.0%} {measure}.")
    return Outcome("good", titles[measure], lines, best, measure)


def measure_of(before: Scores) -> str:
    """Which success was measured: ``TRUE``, ``REVERSED``, or empty."""
    if before.attack_success_rate is not None:
        return TRUE
    return "" if before.reversed_success_rate is None else REVERSED


def success(scores: Scores) -> float | None:
    """The success that judges a network: that of poisoned images, or else that of reversed triggers."""
    return scores.reversed_success_rate if scores.attack_success_rate is None else scores.attack_success_rate


def _compared(before: Scores, row: CandidateRow, measure: str) -> str:
    return f"{network_name(row)} does best: {_rates(before, row, measure)}."


def _rates(before: Scores, row: CandidateRow, measure: str) -> str:
    attack = ""
    if measure:
        attack = f"{measure} {percent(success(before))} before, {percent(success(row.scores))} after; "
    return (
        f"{attack}clean accuracy {percent(before.clean_accuracy)} before, "
        f"{percent(row.scores.clean_accuracy)} after ({points(row.scores.clean_accuracy - before.clean_accuracy)})"
    )


def shortcoming(row: CandidateRow, measure: str) -> str:
    """Why a network does not count as repaired; of one that does, it means nothing."""
    if _works(row):
        return "The backdoor still works" if measure == TRUE else "The reversed triggers still work"
    if row.verdict is Verdict.BACKDOORED:
        return "The second scan finds a backdoor"
    return "The repair costs more than the budget"


def left_in(row: CandidateRow) -> bool:
    """Whether the backdoor is still there, whatever the repair cost."""
    return _works(row) or row.verdict is Verdict.BACKDOORED


def _works(row: CandidateRow) -> bool:
    rate = success(row.scores)
    return rate is not None and rate > REPAIRED


def row_sentence(row: CandidateRow, before: Scores) -> str:
    """One network: what it gains and what it costs, and whether it counts as repaired."""
    measure = measure_of(before)
    text = f"{network_name(row)}: {_rates(before, row, measure)}."
    return text if is_repaired(row) else f"{shortcoming(row, measure)}. {text}"


def network_name(row: CandidateRow) -> str:
    """A candidate as people call it."""
    return f"{'GoodNet' if row.kind == 'goodnet' else 'B′'} {row.name}"


def points(change: float) -> str:
    """A change of a rate in percentage points, with its sign."""
    return f"{100 * change:+.2f} points".replace("-", "−")
