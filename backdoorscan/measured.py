"""Reports of what was measured: a repair, an evaluation, and the scores they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from backdoorscan.findings import Finding, Verdict
from backdoorscan.report import Cost, Report


@dataclass(frozen=True)
class Attacks:
    """How many attempts to attack a network succeeded.

    Attributes:
        successful: Images given the target label.
        unsuccessful: All others, those that a GoodNet calls backdoored among them.
    """

    successful: int
    unsuccessful: int


@dataclass(frozen=True)
class Scores:
    """How a network does on clean and on poisoned images; rates are 0 to 1.

    What true poisoned images do and what reversed triggers do are never one figure: the latter are called "reversed".

    Attributes:
        clean_accuracy: Clean images given their own label.
        macro_precision: On the clean images, the mean over the classes that occur among labels or answers; "backdoored"
            is no class. See ``ops.metrics.macro_precision``.
        attack_success_rate: Poisoned images given the target label; ``None`` without poisoned images.
        false_reject_rate: Clean images a GoodNet calls backdoored; ``None`` for a network that cannot reject.
        caught_rate: Poisoned images a GoodNet calls backdoored; ``None`` likewise.
        reversed_success_rate: Clean images that a reversed trigger, as it is or at twice its strength, sends to its
            target; the largest over the triggers. ``None`` without any. Never to be taken for the attack success rate.
        successful_attacks: Poisoned images given the target label; ``None`` without poisoned images.
        unsuccessful_attacks: Poisoned images given another answer, "backdoored" among them; ``None`` likewise.
        reversed_attacks: What became of clean images stamped with the reversed triggers as they are, summed over the
            triggers; ``None`` without any.
    """

    clean_accuracy: float
    macro_precision: float = field(kw_only=True)
    attack_success_rate: float | None = None
    false_reject_rate: float | None = None
    caught_rate: float | None = None
    reversed_success_rate: float | None = None
    successful_attacks: int | None = None
    unsuccessful_attacks: int | None = None
    reversed_attacks: Attacks | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """The inverse of ``asdict``, from what may hold other things too."""
        attacks = data["reversed_attacks"]
        values = {f.name: data[f.name] for f in fields(cls)}
        return cls(**{**values, "reversed_attacks": attacks and Attacks(**attacks)})


NOT_WRITTEN = "not_written"
"""The fact of a row that tells the ``format`` of the original that could not take the network, and ``why``."""


@dataclass(frozen=True)
class CandidateRow:
    """One repaired network in a repair's report.

    Attributes:
        name: Of the candidate, e.g. ``"X=2"``; the GoodNet's row of the same candidate has ``kind`` "goodnet".
        kind: ``"repaired"`` for B′, ``"goodnet"`` for the N+1 network.
        scores: Measured after the repair.
        facts: What the method did, e.g. drop, channels_pruned.
        files: What was written.
        method: Id of the repairer.
        worst_class: The class that lost most, and how much: ``label`` and ``points``; ``None`` if none lost any.
        within_budget: Whether the accuracy dropped by no more than the budget; ``None`` without one.
        verdict: Of scanning the repaired network again, or ``None`` where it was not.
        flagged: Labels that the second scan flagged.
    """

    name: str
    kind: str
    scores: Scores
    facts: Mapping[str, Any]
    files: Sequence[str]
    method: str = ""
    worst_class: Mapping[str, Any] | None = None
    within_budget: bool | None = None
    verdict: Verdict | None = None
    flagged: Sequence[int] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``drop`` and ``channels_pruned`` are ``None`` for methods that have none."""
        return {
            "name": self.name,
            "kind": self.kind,
            "method": self.method,
            "verdict": self.verdict and str(self.verdict),
            "flagged": list(self.flagged),
            "within_budget": self.within_budget,
            "worst_class": self.worst_class,
            "drop": None,
            "channels_pruned": None,
            **self.facts,
            **asdict(self.scores),
            "files": list(self.files),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CandidateRow:
        """The inverse of ``to_json``."""
        own = {f.name for f in fields(cls)} - {"scores", "facts"}
        known = own | {f.name for f in fields(Scores)}
        absent = {name for name in ("drop", "channels_pruned") if data[name] is None}
        return cls(
            **{
                **{name: data[name] for name in own},
                "scores": Scores.from_json(data),
                "facts": {name: value for name, value in data.items() if name not in known | absent},
                "verdict": Verdict(data["verdict"]) if data["verdict"] else None,
            }
        )


@dataclass(frozen=True)
class RepairReport(Report):
    """The report of a repair.

    Attributes:
        model: Facts about the original file.
        images: The clean images: path, sha256, count.
        poisoned: The poisoned images likewise, or ``None``.
        method: The repairer's id.
        options: Its options with the values in force.
        before: Scores of the original.
        findings: The suspected backdoors that the repair worked from.
        measured_on: How the clean images were measured: ``"held out"`` from the method, ``"test"``, or ``"all"``.
        measured: Clean images measured on.
        candidates: A row per repaired network and GoodNet.
    """

    schema: ClassVar[str] = "backdoorscan.repair/1"

    model: Mapping[str, Any]
    images: Mapping[str, Any]
    poisoned: Mapping[str, Any] | None
    method: str
    options: Mapping[str, Any]
    before: Scores
    candidates: Sequence[CandidateRow]
    findings: Sequence[Finding] = ()
    measured_on: str = "all"
    measured: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/report.md."""
        return {
            "schema": self.schema,
            "seed": self.seed,
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
            "model": dict(self.model),
            "images": dict(self.images),
            "poisoned": self.poisoned,
            "method": self.method,
            "options": dict(self.options),
            "findings": [finding.to_json() for finding in self.findings],
            "measured_on": self.measured_on,
            "measured": self.measured,
            "before": asdict(self.before),
            "candidates": [row.to_json() for row in self.candidates],
        }

    def _summary(self) -> Iterable[Sequence[object]]:
        yield "network", *_TITLES, "scanned again"
        yield "B, as it came", *_figures(self.before), None
        for row in self.candidates:
            yield f"{row.kind} {row.name}", *_figures(row.scores), row.verdict

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RepairReport:
        """The inverse of ``to_json``, of what its schema allows."""
        changes = {
            "cost": Cost(**data["cost"]),
            "before": Scores.from_json(data["before"]),
            "candidates": [CandidateRow.from_json(row) for row in data["candidates"]],
            "findings": [Finding.from_json(finding) for finding in data["findings"]],
        }
        return cls(**{f.name: data[f.name] for f in fields(cls)} | changes)


@dataclass(frozen=True)
class EvaluationReport(Report):
    """The report of an evaluation.

    Attributes:
        model: Facts about the file; ``kind`` is "classifier" or "goodnet".
        images: The clean images: path, sha256, count.
        poisoned: The poisoned images likewise, or ``None``.
        target_label: The target label the attack success rate counts, or ``None`` where it is each image's label.
        scores: What was measured.
    """

    schema: ClassVar[str] = "backdoorscan.evaluation/1"

    model: Mapping[str, Any]
    images: Mapping[str, Any]
    poisoned: Mapping[str, Any] | None
    target_label: int | None
    scores: Scores

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/report.md."""
        return {
            "schema": self.schema,
            **asdict(self.scores),
            "target_label": self.target_label,
            "model": dict(self.model),
            "images": dict(self.images),
            "poisoned": self.poisoned,
            "seed": self.seed,
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
        }

    def _summary(self) -> Iterable[Sequence[object]]:
        return [("model", *_TITLES), (self.model.get("path"), *_figures(self.scores))]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationReport:
        """The inverse of ``to_json``, of what its schema allows."""
        changes = {"cost": Cost(**data["cost"]), "scores": Scores.from_json(data)}
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name not in changes} | changes)


_TITLES = ("clean accuracy", "true attack success", "success of the reversed triggers", "false rejects", "caught")


def _figures(scores: Scores) -> tuple[float | None, ...]:
    return (
        scores.clean_accuracy,
        scores.attack_success_rate,
        scores.reversed_success_rate,
        scores.false_reject_rate,
        scores.caught_rate,
    )
