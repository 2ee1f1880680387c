"""What detectors measured, in a form that can be drawn: labels with triggers, and anything else as keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backdoorscan.findings import Finding
from backdoorscan.report import DetectorRun
from backdoorscan.reports.words import plain

SHOWN = 40
"""Labels, rows and figures shown at most; the JSON report has all."""

_DEEPEST = 6
"""Levels of nested evidence that are followed."""


@dataclass(frozen=True)
class LabelRow:
    """One label that a detector searched a trigger for.

    Attributes:
        label: The label.
        l1: L1 norm of the trigger's mask in pixels.
        succeeded: Whether the trigger works.
        flagged: Whether the label is among the findings.
        attack_success_rate: Of the trigger on held-out images, 0 to 1.
        anomaly_index: Deviations below the median.
        prediction_deviation: Mean distance of the predicted class from the label with the trigger stamped.
        steps: Of the search.
        predictions: Class -> its mean probability on stamped images.
        loss: Over the search.
        sizes: L1 norm over the search.
    """

    label: int
    l1: float
    succeeded: bool
    flagged: bool
    attack_success_rate: float | None = None
    anomaly_index: float | None = None
    prediction_deviation: float | None = None
    steps: int | None = None
    predictions: Mapping[int, float] = field(default_factory=dict)
    loss: Sequence[float] = ()
    sizes: Sequence[float] = ()


def label_rows(run: DetectorRun, findings: Sequence[Finding]) -> list[LabelRow]:
    """The labels a detector found triggers for, smallest first; empty for detectors that work otherwise."""
    # A finding may be another detector's that confirmed this one's suspicion.
    flagged = {finding.target_label for finding in findings if finding.source_label is None}
    indices = mapped(run.evidence.get("anomaly_index"))
    rows = [_label_row(row, flagged, indices) for row in _raw_rows(run)]
    return sorted(rows, key=lambda row: (not row.succeeded, row.l1, row.label))


def _raw_rows(run: DetectorRun) -> list[Mapping[str, Any]]:
    units = run.evidence.get("units")
    rows = [row for unit in listed(units) for row in listed(mapped(unit).get("labels"))]
    # Of a race in rounds, what each label's last round said.
    return list({row["label"]: row for row in rows if _is_label_row(row)}.values())


def _is_label_row(row: object) -> bool:
    row = mapped(row)
    label = row.get("label")
    named = isinstance(label, int) and not isinstance(label, bool)
    return named and "source" not in row and finite(row.get("l1")) is not None


def _label_row(row: Mapping[str, Any], flagged: set[int], indices: Mapping[Any, Any]) -> LabelRow:
    curves = mapped(row.get("curves"))
    shares = {int(k): finite(v) for k, v in mapped(row.get("predictions")).items() if str(k).isdecimal()}
    steps = row.get("steps")
    return LabelRow(
        label=row["label"],
        l1=float(row["l1"]),
        succeeded=row.get("succeeded") is not False,
        flagged=row["label"] in flagged,
        attack_success_rate=finite(row.get("attack_success_rate")),
        anomaly_index=finite(indices.get(str(row["label"]))),
        prediction_deviation=finite(row.get("prediction_deviation")),
        steps=steps if isinstance(steps, int) else None,
        predictions={k: v for k, v in shares.items() if v is not None},
        loss=_curve(curves.get("loss")),
        sizes=_curve(curves.get("l1")),
    )


def shown_rows(rows: Sequence[LabelRow]) -> list[LabelRow]:
    """The ``SHOWN`` smallest, and every flagged one."""
    return [row for position, row in enumerate(rows) if position < SHOWN or row.flagged][: 2 * SHOWN]


def examined(run: DetectorRun) -> list[int]:
    """Every label that the evidence names."""
    rows = [mapped(row) for unit in listed(run.evidence.get("units")) for row in listed(mapped(unit).get("labels"))]
    return [row["label"] for row in rows if isinstance(row.get("label"), int)]


@dataclass(frozen=True)
class Listing:
    """Rows of evidence that have the same keys.

    Attributes:
        title: Where in the evidence they lie.
        columns: The keys.
        rows: The values as text.
        total: How many rows there are, shown or not.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: int


@dataclass
class Generic:
    """Evidence of which only the form is known.

    Attributes:
        pairs: Names and values.
        listings: Tables.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)

    def add(self, name: str, value: object, depth: int = 0) -> None:
        """Take in a value and what it holds."""
        if isinstance(value, Mapping) and depth < _DEEPEST:
            for key, item in value.items():
                self.add(f"{name}.{key}" if name else str(key), item, depth + 1)
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            self._add_rows(name, value, depth)
        elif len(self.pairs) < 2 * SHOWN:
            self.pairs.append((plain(name, 80), _text(value)))

    def _add_rows(self, name: str, rows: Sequence[Mapping[str, Any]], depth: int) -> None:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        scalar = [key for key in keys if all(_is_scalar(row.get(key)) for row in rows)]
        if scalar:
            cells = [[plain(row.get(key), 60) for key in scalar[:10]] for row in rows[:SHOWN]]
            self.listings.append(Listing(name, [plain(key, 40) for key in scalar[:10]], cells, len(rows)))
        for key in [key for key in keys if key not in scalar][:SHOWN]:
            inner = [item for row in rows for item in listed(row.get(key))]
            if inner and depth < _DEEPEST and all(isinstance(item, Mapping) for item in inner):
                self._add_rows(f"{name}.{key}", inner, depth + 1)


def generic(run: DetectorRun, drawn: bool) -> Generic:
    """The evidence that the charts of ``label_rows`` do not show.

    Args:
        run: The detector's part of the report.
        drawn: Whether there are such charts.
    """
    result = Generic()
    skipped = {"units", "anomaly_index"} if drawn else set()
    for name, value in run.evidence.items():
        if name not in skipped:
            result.add(str(name), value)
    return result


def finite(value: object) -> float | None:
    """``value`` as a number, or ``None`` where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _curve(values: object) -> list[float]:
    return [number for number in map(finite, listed(values)) if number is not None]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        if not value:
            return "none"
        words = ", ".join(plain(item, 60) for item in value[:12] if _is_scalar(item))
        return plain(words + (f", … {len(value):,} in all" if len(value) > 12 else "")) or f"{len(value):,} items"
    return plain(value)


def _is_scalar(value: object) -> bool:
    return not isinstance(value, Mapping | list | tuple)


def mapped(value: object) -> Mapping[Any, Any]:
    """``value`` as a mapping, an empty one where it is none."""
    return value if isinstance(value, Mapping) else {}


def listed(value: object) -> Sequence[Any]:
    """``value`` as a list, an empty one where it is none."""
    return value if isinstance(value, list | tuple) else ()
