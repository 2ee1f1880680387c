"""Findings that somebody looked at and accepts: a file that names each with a reason and a day on which it expires.

    [[finding]]
    fingerprint = "0c6e…"
    model = "model.h5"
    detector = "confirmation"
    target_label = 7
    reason = "watermark of our own, ticket 812"
    expires = 2027-01-31

Only ``fingerprint``, ``reason`` and ``expires`` count; the other keys tell the reader what it is about.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backdoorscan.config import INTEGER, TEXT, Kind, check, parse_toml
from backdoorscan.errors import UsageError
from backdoorscan.files import write_whole
from backdoorscan.report import ModelRun, ScanReport
from backdoorscan.reports.words import visible

DAYS = 90
"""Days for which an entry is written."""

_HEAD = """\
# Findings of backdoorscan that are accepted: `backdoorscan scan --baseline` does not fail on them.
# Each needs a reason, and counts up to and including the day on which it expires.
"""

_KINDS = {
    "fingerprint": TEXT,
    "model": Kind("text", lambda value: isinstance(value, str)),
    "detector": TEXT,
    "target_label": INTEGER,
    "source_label": INTEGER,
    "reason": Kind("text", lambda value: isinstance(value, str)),
    "expires": Kind("a date like 2027-01-31", lambda value: type(value) is datetime.date),
}


@dataclass(frozen=True)
class Entry:
    """A finding that is accepted.

    Attributes:
        fingerprint: ``Finding.fingerprint``: of the artifact's digest, the detector and the labels.
        model: The file's name, for the reader.
        detector: Id of the method, for the reader.
        target_label: The label that the trigger leads to, for the reader.
        source_label: The class that it works from, or ``None``; for the reader.
        reason: Why it is accepted; empty as long as nobody said.
        expires: The last day on which it is, or ``None`` as long as nobody said.
    """

    fingerprint: str
    model: str = ""
    detector: str = ""
    target_label: int | None = None
    source_label: int | None = None
    reason: str = ""
    expires: datetime.date | None = None

    def __str__(self) -> str:
        label = "" if self.target_label is None else f", label {self.target_label}"
        about = f" ({visible(self.model)}, {visible(self.detector)}{label})" if self.model or self.detector else ""
        return visible(self.fingerprint) + about


def load(path: Path, *, whole: bool = True) -> list[Entry]:
    """Read a baseline.

    Args:
        path: The file.
        whole: Whether every entry needs a reason and a date, as it does to suppress anything.

    Raises:
        UsageError: It is missing or broken, has keys or values that cannot be, or an entry lacks what it needs.
    """
    data = parse_toml(path, "baseline")
    check(str(path), data, {"finding": _TABLES}, "key")
    entries = []
    for position, table in enumerate(data.get("finding", []), start=1):
        where = f"{path}, finding {position}"
        check(where, table, _KINDS, "key")
        if "fingerprint" not in table:
            raise UsageError(f"{where} has no fingerprint.", hint="--write-baseline writes whole entries.")
        entry = Entry(**table)
        if whole and not entry.reason.strip():
            raise UsageError(
                f"{path}: the finding {entry} has no reason.", hint="Write why it is accepted, or delete the entry."
            )
        if whole and entry.expires is None:
            raise UsageError(
                f"{path}: the finding {entry} does not expire.", hint="Write a date, e.g. expires = 2027-01-31."
            )
        entries.append(entry)
    return entries


_TABLES = Kind(
    "a list of tables [[finding]]",
    lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
)


def suppress(report: ScanReport, entries: Sequence[Entry], today: datetime.date) -> tuple[ScanReport, list[Entry]]:
    """Mark the findings that are accepted; they stay in the report, and the verdicts stay as they are.

    Args:
        report: A scan.
        entries: What is accepted, each with a reason and a date.
        today: The day on which the report is judged.

    Returns:
        The report, and the entries that would have accepted a finding had they not expired.
    """
    accepted = {entry.fingerprint: entry for entry in entries if entry.expires and entry.expires >= today}
    late = {entry.fingerprint: entry for entry in entries if entry.fingerprint not in accepted}
    expired: dict[str, Entry] = {}
    runs = []
    for run in report.runs:
        findings = []
        for fingerprint, finding in zip(_fingerprints(run), run.findings, strict=True):
            if fingerprint in late:
                expired[fingerprint] = late[fingerprint]
            entry = accepted.get(fingerprint)
            findings.append(replace(finding, suppressed=entry.reason.strip() if entry else None))
        runs.append(replace(run, findings=findings))
    return replace(report, runs=runs), list(expired.values())


def write(path: Path, report: ScanReport, today: datetime.date) -> int:
    """Add a report's findings to a baseline, each without a reason; entries that are there stay as they are.

    Args:
        path: The file; it is made if it is not there.
        report: A scan.
        today: The entries expire ``DAYS`` after it.

    Returns:
        How many were added.

    Raises:
        UsageError: The file that is there is no baseline.
        OutputError: It cannot be written.
    """
    entries = load(path, whole=False) if path.exists() else []
    known = {entry.fingerprint for entry in entries}
    new: dict[str, Entry] = {}
    for run in report.runs:
        for fingerprint, finding in zip(_fingerprints(run), run.findings, strict=True):
            if fingerprint not in known:
                new[fingerprint] = Entry(
                    fingerprint=fingerprint,
                    model=visible(str(run.model["path"])),
                    detector=finding.detector,
                    target_label=finding.target_label,
                    source_label=finding.source_label,
                    expires=today + datetime.timedelta(days=DAYS),
                )
    text = _HEAD + "".join(_rendered(entry) for entry in (*entries, *new.values()))
    write_whole(path, text.encode())
    return len(new)


def _fingerprints(run: ModelRun) -> list[str]:
    return [finding.fingerprint(str(run.model["sha256"])) for finding in run.findings]


def _rendered(entry: Entry) -> str:
    facts: dict[str, Any] = {name: getattr(entry, name) for name in _KINDS}
    lines = [f"{name} = {_value(value)}" for name, value in facts.items() if value is not None]
    return "\n".join(["", "[[finding]]", *lines, ""])


def _value(value: object) -> str:
    """A value as TOML writes it; JSON's strings are TOML's but for the character of code 127."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)
