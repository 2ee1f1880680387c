"""Findings in the words of other catalogues, and names for them that stay the same from run to run."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from backdoorscan.errors import UsageError
from backdoorscan.findings import Finding
from backdoorscan.report import ModelRun, Report
from backdoorscan.reports.evidence import listed, mapped

ATLAS = ("AML.T0018", "AML.T0018.000", "AML.T0020", "AML.T0043.004", "AML.T0010.003")
"""MITRE ATLAS 2026: Manipulate AI Model, Poison AI Model, Training Data Poisoning, Insert Backdoor Trigger,
AI Supply Chain Compromise: Model."""

ATLAS_ARCHITECTURE = "AML.T0018.001"
"""Modify AI Model Architecture: where nodes of the graph overrule its layers."""

OWASP = ("ML10:2023", "ML06:2023")
"""OWASP Machine Learning Security Top Ten: Model Poisoning, AI Supply Chain Attacks."""

CWE = 912
"""Hidden Functionality."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        id: The second half of a rule's name.
        title: In a few words.
        text: What it means.
        security: Severity on the scale of CVSS, 0 to 10.
    """

    id: str
    title: str
    text: str
    security: float

    @property
    def severity(self) -> str:
        """The severity as a word of CVSS."""
        names = ((9, "critical"), (7, "high"), (4, "medium"))
        return next((name for least, name in names if self.security >= least), "low")

    @property
    def proven(self) -> bool:
        """Whether it says that a backdoor is there."""
        return self.security >= 7


UNIVERSAL = Kind(
    "backdoor",
    "Backdoor",
    "A trigger sends images of any class to the target label.",
    9.3,  # whoever knows the trigger decides what the model answers
)
SPECIFIC = Kind(
    "source-specific-backdoor",
    "Source-specific backdoor",
    "Images of the source class are sent to the target label, those of other classes need not be.",
    8.1,  # likewise, for one class
)
SUSPICION = Kind(
    "suspicion",
    "Suspected backdoor",
    "The evidence lies between the thresholds: the label is neither cleared nor proven to be a target.",
    5.0,
)
NO_ANSWER = Kind(
    "no-answer",
    "No trustworthy answer",
    "The scan did not come to an answer: that nothing was found does not mean that nothing is there.",
    4.0,
)

LEFT_IN = Kind(
    "left-in",
    "Repair left the backdoor in",
    "A repaired network in which the attack still succeeds, or which a second scan calls backdoored.",
    9.3,
)
OVER_BUDGET = Kind(
    "over-budget",
    "Repair over budget",
    "A repaired network that lost more clean accuracy than was allowed.",
    2.0,
)


def kind_of(finding: Finding, alpha: float) -> Kind:
    """What kind of finding it is, given the largest p-value that counts."""
    if finding.p_value > alpha:
        return SUSPICION
    return UNIVERSAL if finding.source_label is None else SPECIFIC


def techniques(architecture: bool) -> Sequence[str]:
    """The ATLAS techniques that a backdoor stands for, one in the architecture or in the weights."""
    return (*ATLAS, ATLAS_ARCHITECTURE) if architecture else ATLAS


def nodes(run: ModelRun, finding: Finding) -> list[str]:
    """The nodes of the graph that a finding accuses; of detectors that name none, it lies in the weights."""
    evidence = next((d.evidence for d in run.detectors if d.id == finding.detector), {})
    gates = [gate for unit in listed(evidence.get("units")) for gate in listed(mapped(unit).get("gates"))]
    accused = [mapped(gate) for gate in gates]
    return [
        gate["node"]
        for gate in accused
        if gate.get("label") == finding.target_label
        and gate.get("verdict") in ("proven", "suspected")
        and isinstance(gate.get("node"), str)
    ]


def fingerprint(*parts: object) -> str:
    """A name for what the parts tell apart: 64 hexadecimal digits, the same in every run."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()


def uri(path: object) -> tuple[str, bool]:
    """The URI of a file as the user named it, and whether it is relative to where the program ran."""
    file = Path(str(path))
    if file.is_absolute():
        return "file://" + quote(os.fsencode(file.as_posix())), False
    return quote(os.fsencode(posixpath.normpath(file.as_posix()))), True


def refuse(report: type[Report], format: str) -> UsageError:
    """The error for a kind of report that a format has no place for."""
    kind = report.schema.partition("/")[0].rpartition(".")[2]
    return UsageError(
        f"The format {format} has no place for this report ({kind}): it holds no verdict.",
        hint="Formats that do: table, json, html, markdown, cyclonedx.",
    )
