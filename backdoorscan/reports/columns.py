"""The columns in which reports show what was measured of networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backdoorscan.measured import Attacks, Scores
from backdoorscan.reports.words import number, percent

Columns = dict[str, Callable[[Scores], str]]
"""Title -> what a row shows of its scores."""

TRUE_ATTACKS = "true attacks"
REVERSED_ATTACKS = "reversed attacks, as they are"


def columns(measured: Sequence[Scores]) -> Columns:
    """The columns that something was measured for: others would only take room."""
    every: Columns = {
        "clean accuracy": lambda scores: percent(scores.clean_accuracy),
        "macro precision": lambda scores: percent(scores.macro_precision),
        "true attack success": lambda scores: percent(scores.attack_success_rate),
        TRUE_ATTACKS: true_attacks,
        "reversed triggers, up to double": lambda scores: percent(scores.reversed_success_rate),
        REVERSED_ATTACKS: lambda scores: reversed_attacks(scores.reversed_attacks),
        "false rejects": lambda scores: percent(scores.false_reject_rate),
        "caught": lambda scores: percent(scores.caught_rate),
    }
    nothing = percent(None)
    return {title: cell for title, cell in every.items() if any(cell(scores) != nothing for scores in measured)}


def true_attacks(scores: Scores) -> str:
    """How many poisoned images succeed, as ``12 of 4,000``, or a dash."""
    if scores.successful_attacks is None or scores.unsuccessful_attacks is None:
        return percent(None)
    return _of(scores.successful_attacks, scores.unsuccessful_attacks)


def reversed_attacks(attacks: Attacks | None) -> str:
    """How many attempts with reversed triggers as they are succeed, likewise."""
    return percent(None) if attacks is None else _of(attacks.successful, attacks.unsuccessful)


def _of(successful: int, unsuccessful: int) -> str:
    return f"{number(successful, ',')} of {number(successful + unsuccessful, ',')}"
