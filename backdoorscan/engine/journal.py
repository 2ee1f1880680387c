"""The journal of a scan: the evidence of every finished unit, on disk as soon as it is there.

One line of JSON per unit, appended and flushed, so that whatever ends the process costs at most the units in flight. A
line that was cut off is not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from backdoorscan import cache
from backdoorscan.errors import OutputError
from backdoorscan.findings import Evidence, Examined, Unit
from backdoorscan.trigger import Trigger

_log = logging.getLogger(__name__)


class Journal:
    """The finished units of one scan.

    Args:
        path: The file; its name says which scan it is of.
        resume: Whether to go on with a journal that is there. Otherwise it is replaced.
        tell: Told in words if the disk refuses later.

    Attributes:
        found: Evidence that an earlier run left, by the units' keys.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool, tell: Callable[[str], None]) -> None:
        self.path = path
        self.found = _read(path) if resume else {}
        self._tell = tell
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                path.unlink(missing_ok=True)
            self._file = path.open("a+b")
            self._mend()
        except OSError as error:
            raise OutputError(f"Cannot write {path}.", why=str(error)) from error

    def _mend(self) -> None:
        """End a line that was cut off, so that the next one starts anew."""
        end = self._file.seek(0, 2)
        if end:
            self._file.seek(end - 1)
            if self._file.read(1) != b"\n":
                self._append(b"\n")

    def section(self, detector: str, earlier: Mapping[str, Examined]) -> Section:
        """The part of one detector, which saw what the detectors before it found."""
        return Section(self, cache.digest({"detector": detector, "earlier": _digest_of(earlier)}))

    def keep(self, key: str, evidence: Evidence) -> None:
        """Write a finished unit down; any thread may."""
        try:
            line = json.dumps({"unit": key, "evidence": _to_json(evidence)})
        except (TypeError, ValueError) as error:  # a stranger's figures; the scan itself can do with them
            _log.debug("cannot keep a unit: %s", error)
            return
        with self._lock:
            if self._file.closed:
                return
            try:
                self._append(line.encode() + b"\n")
            except OSError as error:
                self.close()
                self._tell(f"warning: cannot write {self.path}: {error}; what follows will be lost if interrupted")

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        try:
            self._file.close()
        except OSError as error:  # closing flushes once more; all lines that could be written are
            _log.debug("cannot close %s: %s", self.path, error)

    def drop(self) -> None:
        """Delete the file: the scan is done."""
        self.close()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.debug("cannot delete %s: %s", self.path, error)


@dataclass(frozen=True)
class Section:
    """A detector's part of a journal."""

    journal: Journal
    name: str

    def taken_over(self, units: Sequence[Unit]) -> dict[str, Evidence]:
        """The evidence of those units that an earlier run has finished, by their ids."""
        keys = {unit.id: self._key(unit) for unit in units} if self.journal.found else {}
        return {name: self.journal.found[key] for name, key in keys.items() if key in self.journal.found}

    def keep(self, unit: Unit, evidence: Evidence) -> None:
        """Write a finished unit down; any thread may."""
        self.journal.keep(self._key(unit), evidence)

    def _key(self, unit: Unit) -> str:
        """A digest of all that a detector is told with a unit."""
        told = {field.name: getattr(unit, field.name) for field in fields(unit)}
        text = json.dumps([self.name, told], default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def _plain(value: object) -> str:
    return _fingerprint(value) if isinstance(value, Trigger) else repr(value)


def _fingerprint(trigger: Trigger) -> str:
    known = hashlib.sha256(str((trigger.target, tuple(trigger.pattern.shape))).encode())
    for tensor in (trigger.mask, trigger.pattern):
        known.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return known.hexdigest()


def _digest_of(earlier: Mapping[str, Examined]) -> str:
    """A digest of what detectors found; what they conclude follows from it."""
    known = hashlib.sha256()
    for name, examined in earlier.items():
        for part in examined.evidence:
            triggers = [_fingerprint(trigger) for trigger in part.triggers]
            known.update(json.dumps([name, part.figures, triggers], default=repr).encode())
    return known.hexdigest()


def _to_json(evidence: Evidence) -> dict[str, Any]:
    triggers = [trigger.to_json() for trigger in evidence.triggers]
    return {
        "figures": dict(evidence.figures),
        "triggers": triggers,
        "gradient_samples": int(evidence.gradient_samples),
    }


def _read(path: Path) -> dict[str, Evidence]:
    """The whole lines of a journal; nothing of one that is not there."""
    found: dict[str, Evidence] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    data = record["evidence"]
                    found[str(record["unit"])] = Evidence(
                        figures=dict(data["figures"]),
                        triggers=[Trigger.from_json(trigger) for trigger in data["triggers"]],
                        gradient_samples=int(data["gradient_samples"]),
                    )
                except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
                    _log.debug("%s, line %d is no unit: %s", path, number, error)
    except FileNotFoundError:
        _log.debug("there is no journal %s", path)
    except OSError as error:
        _log.debug("cannot read %s: %s", path, error)
    return found
