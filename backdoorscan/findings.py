"""What a scan learns: evidence of one unit of work, findings, a verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backdoorscan.trigger import Trigger


class Verdict(StrEnum):
    """The answer of a scan."""

    CLEAN = "clean"
    BACKDOORED = "backdoored"
    INCONCLUSIVE = "inconclusive"


class Severity(StrEnum):
    """How much a finding weighs, the least first; ``policy.severity`` says when."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for the least."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Unit:
    """A piece of a detector's work that can be run on its own.

    Attributes:
        id: Unique within the detector, stable between runs; seeds are derived from it.
        labels: The labels it examines.
        round: 0, or the round of a race in which each leaves fewer labels and takes more steps.
        sources: The classes that the labels' triggers have to work from, one per label; none for all.
        starts: Triggers of an earlier round to go on from, one per label, or none.
    """

    id: str
    labels: tuple[int, ...] = ()
    round: int = 0
    sources: tuple[int, ...] = ()
    starts: Sequence[Trigger] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The raw figures of one unit of work.

    Attributes:
        figures: Plain data (numbers, strings, lists, dictionaries): what the report keeps.
        triggers: Reversed triggers, if the method makes any.
        gradient_samples: Images run forward and backward: the machine-independent cost.
    """

    figures: Mapping[str, Any]
    triggers: Sequence[Trigger] = ()
    gradient_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One suspected backdoor.

    Attributes:
        target_label: The label the trigger leads to.
        source_label: The class it works from, or ``None`` for a universal trigger.
        p_value: Probability of evidence this strong in a clean model, over all labels examined, in [0, 1].
        score: The method's own statistic; larger is more suspicious.
        trigger: The reversed trigger, or ``None``.
        attack_success_rate: Of ``trigger`` on clean images it was not made from, in [0, 1].
        detector: Id of the method; filled in by the scan.
        severity: Filled in by the policy; ``None`` where nobody judged it.
        suppressed: The reason why the user accepts it, from a baseline, or ``None``.
    """

    target_label: int
    p_value: float
    score: float
    source_label: int | None = None
    trigger: Trigger | None = None
    attack_success_rate: float | None = None
    detector: str = ""
    severity: Severity | None = None
    suppressed: str | None = None

    def fingerprint(self, artifact: str) -> str:
        """A name that is the same in every scan that finds the same in the same bytes.

        Args:
            artifact: SHA-256 of the model.

        Returns:
            32 hexadecimal digits: a digest of the artifact, the detector and the labels.
        """
        labels = f"{self.target_label}:{'any' if self.source_label is None else self.source_label}"
        facts = f"{artifact}\0{self.detector}\0{labels}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(facts).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """Plain data for the report."""
        trigger = None
        if self.trigger is not None:
            trigger = {**self.trigger.to_json(), "attack_success_rate": self.attack_success_rate}
        return {
            "detector": self.detector,
            "target_label": self.target_label,
            "source_label": self.source_label,
            "p_value": self.p_value,
            "score": self.score,
            "severity": self.severity and str(self.severity),
            "suppressed": self.suppressed,
            "trigger": trigger,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """The inverse of ``to_json``."""
        trigger = data["trigger"]
        return cls(
            detector=data["detector"],
            target_label=data["target_label"],
            source_label=data["source_label"],
            p_value=data["p_value"],
            score=data["score"],
            attack_success_rate=trigger and trigger["attack_success_rate"],
            trigger=trigger and Trigger.from_json(trigger),
            severity=Severity(data["severity"]) if data.get("severity") else None,
            suppressed=data.get("suppressed"),
        )


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a detector makes of all its evidence.

    Attributes:
        findings: Suspected labels, most suspicious first, each with its p-value; whether one counts is policy.
        p_value: Of the most suspicious label, or ``None`` where the evidence allows no answer.
        ranking: Labels, the most suspicious first, for the detectors that follow; empty if it has no opinion.
        figures: Summary statistics for the report.
        note: One line for the reader, e.g. why there is no answer.
        share: ``Detector.share``, which the scan fills in.
    """

    findings: Sequence[Finding] = ()
    p_value: float | None
    ranking: Sequence[int] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What an earlier detector of the same scan saw and concluded."""

    evidence: Sequence[Evidence]
    judgement: Judgement
