"""Reports: what a scan, a repair or an evaluation found, as versioned plain data.

JSON is the canonical form; every other format is a function of it.
"""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from backdoorscan.errors import UsageError
from backdoorscan.findings import Finding, Verdict
from backdoorscan.trigger import Trigger


@dataclass(frozen=True)
class Cost:
    """What the work took.

    Attributes:
        gradient_samples: Images run forward and backward; does not depend on the machine.
        wall_seconds: Elapsed time.
        cpu_seconds: Processor time of all threads.
        peak_memory_mb: Largest resident size of the process so far, in MiB.
    """

    gradient_samples: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_mb: float = 0.0


@dataclass(frozen=True)
class DetectorRun:
    """One detector's part of a scan.

    Attributes:
        id: Its name.
        version: Of the distribution it came from.
        options: Every option with the value in force.
        evidence: The figures it measured.
        p_value: Of its most suspicious label, or ``None`` without an answer.
        note: One line from the detector, or empty.
        error: Why it failed, or empty.
        gradient_samples: Its cost.
        seconds: Its elapsed time.
        triggers: Reversed triggers, the smallest first; at most ``MOST_TRIGGERS``.
    """

    MOST_TRIGGERS: ClassVar[int] = 16

    id: str
    version: str
    options: Mapping[str, Any]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    p_value: float | None = None
    note: str = ""
    error: str = ""
    gradient_samples: int = 0
    seconds: float = 0.0
    triggers: Sequence[Trigger] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {"triggers": [trigger.to_json() for trigger in self.triggers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DetectorRun:
        """The inverse of ``to_json``."""
        return cls(**{**data, "triggers": [Trigger.from_json(trigger) for trigger in data["triggers"]]})


@dataclass(frozen=True)
class ModelRun:
    """One model's part of a scan.

    Attributes:
        model: Facts about the file: path, sha256, format, input_shape, num_classes, input_range, ...
        images: The images it worked on: path, sha256, count, and how many of them were made from the model; ``None``
            if it needed none.
        verdict: The answer.
        complete: Whether everything that was planned was run.
        clean_accuracy: On the user's clean images, 0 to 1, or ``None`` without any.
        findings: Suspected backdoors, most suspicious first.
        detectors: What each detector did.
        cost: Of this model.
        not_tested: What the detectors that ran cannot see.
        notes: What makes the verdict less certain, a sentence each.
        otherwise: The verdict but for its findings: clean or inconclusive.
        alpha: Its false-alarm budget where it is not the report's, or ``None``.
        cached: Whether the answer was there already: of an earlier scan, or of the same bytes in the same run.
        error: Why the model could not be scanned, or empty. Then the facts about it are ``path`` and ``sha256`` (which
            may be ``None``) alone, there are no images and no detectors, and nothing is complete.
    """

    model: Mapping[str, Any]
    images: Mapping[str, Any] | None
    verdict: Verdict
    complete: bool
    clean_accuracy: float | None
    findings: Sequence[Finding]
    detectors: Sequence[DetectorRun]
    cost: Cost
    not_tested: Sequence[str] = ()
    notes: Sequence[str] = ()
    otherwise: Verdict = Verdict.INCONCLUSIVE
    alpha: float | None = None
    cached: bool = False
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return data | {
            "verdict": str(self.verdict),
            "findings": [finding.to_json() for finding in self.findings],
            "detectors": [run.to_json() for run in self.detectors],
            "cost": asdict(self.cost),
            "not_tested": list(self.not_tested),
            "notes": list(self.notes),
            "otherwise": str(self.otherwise),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelRun:
        """The inverse of ``to_json``."""
        changes = {
            "verdict": Verdict(data["verdict"]),
            "findings": [Finding.from_json(finding) for finding in data["findings"]],
            "detectors": [DetectorRun.from_json(run) for run in data["detectors"]],
            "cost": Cost(**data["cost"]),
            "otherwise": Verdict(data.get("otherwise", Verdict.INCONCLUSIVE)),
        }
        return cls(**{**data, **changes})


@dataclass(frozen=True)
class Report:
    """What every report carries.

    Attributes:
        seed: The run's seed.
        versions: Of backdoorscan and of what its figures depend on.
        cost: Of the whole run.
    """

    schema: ClassVar[str]

    seed: int
    versions: Mapping[str, str]
    cost: Cost

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """What a notebook shows: a table of the main figures."""
        head, *rows = ["".join(f"<td>{_shown(cell)}</td>" for cell in row) for row in self._summary()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>"

    def _summary(self) -> Iterable[Sequence[object]]:
        """The titles of columns, then rows."""
        return [("report", "seed"), (self.schema, self.seed)]


def _shown(value: object) -> str:
    """A cell: text of others without what would be read as HTML or change how the text around it is read."""
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
    return html.escape("".join(character if character.isprintable() else "�" for character in text))


@dataclass(frozen=True)
class ScanReport(Report):
    """The report of a scan.

    Attributes:
        verdict: The worst of all models.
        complete: Whether every model was scanned completely.
        alpha: The false-alarm budget per model that the verdicts were drawn with.
        runs: One per model.
        cached: Whether all of it is of earlier scans of the same.
    """

    schema: ClassVar[str] = "backdoorscan.report/1"

    verdict: Verdict
    complete: bool
    alpha: float
    runs: Sequence[ModelRun]
    cached: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/report.md."""
        return {
            "schema": self.schema,
            "verdict": str(self.verdict),
            "complete": self.complete,
            "cached": self.cached,
            "alpha": self.alpha,
            "seed": self.seed,
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
            "runs": [run.to_json() for run in self.runs],
        }

    def _summary(self) -> Iterable[Sequence[object]]:
        yield "model", "verdict", "complete", "suspected labels", "smallest p-value", "clean accuracy"
        for run in self.runs:
            labels = ", ".join(str(label) for label in dict.fromkeys(f.target_label for f in run.findings))
            smallest = min((d.p_value for d in run.detectors if d.p_value is not None), default=None)
            complete = "yes" if run.complete else "no"
            yield run.model.get("path"), run.verdict, complete, labels or "none", smallest, run.clean_accuracy

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScanReport:
        """The inverse of ``to_json``.

        Raises:
            UsageError: The data is not a scan report of a version this program knows.
        """
        if not isinstance(data, Mapping) or data.get("schema") != cls.schema:
            raise UsageError("This is not a scan report.", hint=f'A report has "schema": "{cls.schema}".')
        try:
            return cls(
                verdict=Verdict(data["verdict"]),
                complete=data["complete"],
                alpha=data["alpha"],
                seed=data["seed"],
                versions=data["versions"],
                cost=Cost(**data["cost"]),
                runs=[ModelRun.from_json(run) for run in data["runs"]],
                cached=bool(data.get("cached", False)),
            )
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise UsageError("This scan report is damaged.", why=f"{type(error).__name__}: {error}") from error
