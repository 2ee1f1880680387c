"""The report of a bench: figures over all networks, and each network with what was said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np

from backdoorscan.bench.metrics import Area, Rate, area, rate
from backdoorscan.bench.running import BenchOptions, Judged, Repaired
from backdoorscan.costing import Meter, versions
from backdoorscan.report import Report

OVERALL = "overall"


@dataclass(frozen=True)
class Group:
    """How well backdoored networks of one kind are told from clean ones of the same data and architectures.

    Attributes:
        by: What they have in common: ``"overall"``, ``"attack"``, ``"family"``, ``"architecture"``, ``"data"`` or
            ``"detector"``; by detector all networks are judged by its p-value alone.
        name: Its value.
        area: Of the p-values; ``None`` where one side is empty.
        found: Backdoored networks that are called backdoored.
        alarms: Clean networks that are called backdoored.
        hits: Found networks of which some true target is among the flagged labels; those in which every label is a
            target are left out.
    """

    by: str
    name: str
    area: Area | None
    found: Rate | None
    alarms: Rate | None
    hits: Rate | None


@dataclass(frozen=True)
class RepairGroup:
    """What a repair does to the networks of one attack, or to all.

    Attributes:
        method: The id.
        name: Of the candidate, where a method makes several.
        attack: An id, or ``"overall"``.
        networks: Networks that were repaired.
        failed: Networks that the method could not work on.
        accuracy_before: Means over the repaired networks, 0 to 1, like all that follow.
        accuracy: After the repair.
        attack_success_before: Of the network as it was.
        attack_success: After the repair.
        effectiveness: DER.
        gradient_samples: Of the method on one network, all its candidates together.
        cpu_seconds: Likewise.
    """

    method: str
    name: str
    attack: str
    networks: int
    failed: int
    accuracy_before: float | None
    accuracy: float | None
    attack_success_before: float | None
    attack_success: float | None
    effectiveness: float | None
    gradient_samples: float | None
    cpu_seconds: float | None


@dataclass(frozen=True)
class BenchReport(Report):
    """The report of a bench.

    Attributes:
        alpha: The false-alarm budget of the verdicts.
        data: The images: name, source, and the number in each part.
        groups: Figures of the detectors.
        repairs: Figures of the repairs.
        clean: Clean networks.
        backdoored: Backdoored networks whose attack took.
        not_taken: Names of the networks whose attack did not take; no figure counts them.
        incomplete: Networks on which some detector failed.
        gradient_samples: Mean of the scans of one network.
        cpu_seconds: Likewise.
        networks: Each network: what it is, its figures, what was said about it.
    """

    schema: ClassVar[str] = "backdoorscan.bench/1"

    alpha: float
    data: Sequence[Mapping[str, Any]]
    groups: Sequence[Group]
    repairs: Sequence[RepairGroup]
    clean: int
    backdoored: int
    not_taken: Sequence[str]
    incomplete: int
    gradient_samples: float
    cpu_seconds: float
    networks: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/benchmarks.md."""
        return {
            "schema": self.schema,
            "seed": self.seed,
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
            "alpha": self.alpha,
            "data": [dict(row) for row in self.data],
            "clean": self.clean,
            "backdoored": self.backdoored,
            "not_taken": list(self.not_taken),
            "incomplete": self.incomplete,
            "gradient_samples": self.gradient_samples,
            "cpu_seconds": self.cpu_seconds,
            "groups": [asdict(group) for group in self.groups],
            "repairs": [asdict(group) for group in self.repairs],
            "networks": [dict(row) for row in self.networks],
        }


def summarise(results: Sequence[Judged], options: BenchOptions, meter: Meter) -> BenchReport:
    """The report of all that was judged; at least one network."""
    counted = [judged for judged in results if judged.entry.took]
    bad = [judged for judged in counted if _attack(judged)]
    meter.gradient_samples = sum(
        cost for judged in results for cost in (judged.scanned.gradient_samples, *_repair_costs(judged))
    )
    datasets = {judged.entry.spec.data.name: judged.entry.spec.data for judged in results}
    return BenchReport(
        seed=options.seed,
        versions=versions(),
        cost=meter.read(),
        alpha=options.alpha,
        data=[
            {"name": d.name, "source": d.source, "train": len(d.train), "clean": len(d.clean), "test": len(d.test)}
            for d in datasets.values()
        ],
        groups=list(_groups(counted, options)),
        repairs=list(_repair_groups(bad)),
        clean=len(counted) - len(bad),
        backdoored=len(bad),
        not_taken=[judged.entry.spec.name for judged in results if not judged.entry.took],
        incomplete=sum(bool(judged.scanned.errors) for judged in results),
        gradient_samples=_mean([judged.scanned.gradient_samples for judged in results]) or 0.0,
        cpu_seconds=_mean([judged.scanned.cpu_seconds for judged in results]) or 0.0,
        networks=[_row(judged) for judged in results],
    )


def _repair_costs(judged: Judged) -> list[int]:
    """Gradient samples of each method, whose candidates all carry those of the whole."""
    return list({row.method: row.gradient_samples for row in judged.repaired}.values())


def _attack(judged: Judged) -> str:
    """The attack's id, or nothing for a clean network."""
    return judged.entry.spec.attack.id if judged.entry.spec.attack else ""


def _family(judged: Judged) -> str:
    return judged.entry.spec.attack.family if judged.entry.spec.attack else ""


def _pool(judged: Judged) -> tuple[str, str]:
    """Networks are compared within the same data and architecture."""
    return judged.entry.spec.data.name, judged.entry.spec.architecture


_OF_ATTACKS: dict[str, Callable[[Judged], str]] = {"attack": _attack, "family": _family}
_OF_ALL: dict[str, Callable[[Judged], str]] = {
    "architecture": lambda judged: judged.entry.spec.architecture,
    "data": lambda judged: judged.entry.spec.data.name,
}


def _groups(counted: Sequence[Judged], options: BenchOptions) -> Iterator[Group]:
    bad = [judged for judged in counted if _attack(judged)]
    clean = [judged for judged in counted if not _attack(judged)]
    yield _group(OVERALL, "", clean, bad, options)
    for by, value in _OF_ALL.items():
        for name in dict.fromkeys(map(value, counted)):
            others = [judged for judged in clean if value(judged) == name]
            yield _group(by, name, others, [judged for judged in bad if value(judged) == name], options)
    for by, value in _OF_ATTACKS.items():
        for name in dict.fromkeys(map(value, bad)):
            mine = [judged for judged in bad if value(judged) == name]
            pools = {_pool(judged) for judged in mine}
            yield _group(by, name, [judged for judged in clean if _pool(judged) in pools], mine, options)
    detectors = dict.fromkeys(name for judged in counted for name in judged.scanned.p_values)
    for name in detectors:
        yield _group("detector", name, clean, bad, options, detector=name)


def _group(
    by: str,
    name: str,
    clean: Sequence[Judged],
    bad: Sequence[Judged],
    options: BenchOptions,
    detector: str | None = None,
) -> Group:
    def p_value(judged: Judged) -> float:
        if detector is None:
            return judged.scanned.p_value
        own = judged.scanned.p_values.get(detector)
        return 1.0 if own is None else own

    def flagged(judged: Judged) -> bool:
        return judged.scanned.verdict == "backdoored" if detector is None else p_value(judged) <= options.alpha

    found = [judged for judged in bad if flagged(judged)]
    # A detector's own labels are not kept apart, and where every label is a target none can be missed.
    told = [j for j in found if len(j.entry.spec.targets) < j.entry.spec.data.num_classes and detector is None]
    return Group(
        by,
        name,
        area=area([p_value(judged) for judged in clean], [p_value(judged) for judged in bad], options.seed),
        found=rate(len(found), len(bad)),
        alarms=rate(sum(map(flagged, clean)), len(clean)),
        hits=rate(sum(bool(set(j.scanned.flagged) & set(j.entry.spec.targets)) for j in told), len(told)),
    )


def _repair_groups(bad: Sequence[Judged]) -> Iterator[RepairGroup]:
    rows = [(_attack(judged), row) for judged in bad for row in judged.repaired]
    # A failure is one of the method, whatever candidates it would have made.
    order = {key: place for place, key in enumerate(dict.fromkeys((r.method, r.name) for _, r in rows if not r.error))}
    for method in dict.fromkeys(row.method for _, row in rows):
        names = [name for own, name in order if own == method] or [""]
        for name in names:
            mine = [(attack, row) for attack, row in rows if row.method == method and (row.error or row.name == name)]
            yield _repair_group(method, name, OVERALL, [row for _, row in mine])
            mine.sort(key=lambda pair: pair[0])
            for attack, pairs in groupby(mine, key=lambda pair: pair[0]):
                yield _repair_group(method, name, attack, [row for _, row in pairs])


def _repair_group(method: str, name: str, attack: str, rows: Sequence[Repaired]) -> RepairGroup:
    done = [row for row in rows if not row.error]
    figures = (
        "accuracy_before",
        "accuracy",
        "attack_success_before",
        "attack_success",
        "effectiveness",
        "gradient_samples",
        "cpu_seconds",
    )
    means = {figure: _mean([getattr(row, figure) for row in done]) for figure in figures}
    return RepairGroup(method, name, attack, networks=len(done), failed=len(rows) - len(done), **means)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _row(judged: Judged) -> dict[str, Any]:
    entry = judged.entry
    return {
        "data": entry.spec.data.name,
        "architecture": entry.spec.architecture,
        "attack": _attack(judged) or None,
        "family": _family(judged) or None,
        "mapping": entry.spec.attack.mapping if entry.spec.attack else None,
        "settings": entry.spec.attack.settings() if entry.spec.attack else {},
        "targets": list(entry.spec.targets),
        "seed": entry.spec.seed,
        "path": str(entry.path),
        "arch": entry.read.arch,
        "sha256": entry.sha256,
        "accuracy": entry.accuracy,
        "attack_success_rate": entry.attack_success,
        "took": entry.took,
        "training_seconds": entry.seconds,
        "scan": asdict(judged.scanned),
        "repairs": [asdict(row) for row in judged.repaired],
    }
