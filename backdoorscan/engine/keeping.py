"""What a scan finds in the cache and leaves there: finished reports, and the journal of an unfinished scan."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from backdoorscan import cache
from backdoorscan.engine.journal import Journal
from backdoorscan.errors import OutputError, UsageError
from backdoorscan.report import ScanReport

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Keeping:
    """How a scan uses the cache.

    Attributes:
        folder: Where everything is kept.
        reports: Whether a finished report of the same scan answers, and this one's is kept.
        resume: Whether the units of an interrupted scan of the same are taken over.
        tell: Told in words what the user should know.
    """

    folder: Path = field(default_factory=cache.default_folder)
    reports: bool = True
    resume: bool = False
    tell: Callable[[str], None] = lambda _text: None


class Kept:
    """The cache as one scan sees it.

    Args:
        keeping: How to use it.
        work: Plain data: everything that the evidence follows from.
        decision: Plain data: what the report follows from besides.
    """

    def __init__(self, keeping: Keeping, work: Mapping[str, Any], decision: Mapping[str, Any]) -> None:
        self._keeping = keeping
        self._path = keeping.folder / "scans" / f"{cache.digest({**work, **decision})}.json"
        self._journal_path = keeping.folder / "journals" / f"{cache.digest(work)}.jsonl"
        self._writable = True

    def report(self) -> ScanReport | None:
        """The finished report of the same scan, if it is to answer and there is an undamaged one."""
        stored = cache.read_json(self._path) if self._keeping.reports else None
        if stored is None:
            return None
        try:
            if cache.digest(stored["report"]) != stored["digest"]:
                raise ValueError("its content is not what was written")
            report, made = ScanReport.from_json(stored["report"]), str(stored["made"])
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            _log.debug("%s is damaged: %s", self._path, error)
            return None
        self._keeping.tell(f"answered from the cache, made on {made}; --no-cache scans anew")
        return replace(report, cached=True)

    def journal(self) -> Journal | None:
        """The journal to keep, or ``None`` where the disk refuses, which is told."""
        keeping = self._keeping
        try:
            journal = Journal(self._journal_path, resume=keeping.resume, tell=keeping.tell)
        except OutputError as error:
            self._warn(error)
            return None
        if keeping.resume:
            count = len(journal.found)
            what = f"resuming: {count} finished unit{'' if count == 1 else 's'} taken over"
            keeping.tell(what if count else "nothing to resume: no finished unit of this scan is kept")
        return journal

    def keep(self, report: ScanReport) -> None:
        """Keep a finished report, if reports are to be kept and it is complete."""
        if not (self._keeping.reports and report.complete and self._writable):
            return
        made = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        try:
            data = json.loads(json.dumps(report.to_json()))  # as it will be read: its digest has to be the same
            cache.write_json(self._path, {"made": made, "digest": cache.digest(data), "report": data})
        except OutputError as error:
            self._warn(error)
        except (TypeError, ValueError) as error:  # a stranger's figures
            _log.debug("cannot keep the report: %s", error)

    def _warn(self, error: OutputError) -> None:
        self._writable = False
        self._keeping.tell(f"warning: nothing is kept in the cache: {error.what} {error.why}".rstrip())
