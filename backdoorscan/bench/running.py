"""Detectors and repairs over the zoo; every result is kept, so that a second run only reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from backdoorscan import cache, policy
from backdoorscan.bench.metrics import defence_effectiveness
from backdoorscan.bench.pool import run_all
from backdoorscan.bench.zoo import ZooEntry
from backdoorscan.costing import Meter, versions
from backdoorscan.demo.training import one_thread
from backdoorscan.errors import BackdoorscanError
from backdoorscan.plugin.method import Method
from backdoorscan.registry import Registry, installed
from backdoorscan.repairing import RepairOptions, plan_methods, repair
from backdoorscan.scanning import ScanOptions, plan_detectors, scan_model


@dataclass(frozen=True)
class BenchOptions:
    """What to judge.

    Attributes:
        detectors: Ids; those of a scan if empty.
        repairs: Ids of repair methods, or ``"auto"``; none if empty.
        settings: Options of methods: id -> name -> value.
        alpha: False-alarm budget per network, 0 to 1.
        seed: Of scans and repairs.
    """

    detectors: Sequence[str] = ()
    repairs: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alpha: float = policy.DEFAULT_ALPHA
    seed: int = 0

    @property
    def scan(self) -> ScanOptions:
        """How each network is scanned."""
        repairs = set(self.repairs) - set(self.detectors)
        settings = {name: values for name, values in self.settings.items() if name not in repairs}
        return ScanOptions(detectors=self.detectors, settings=settings, alpha=self.alpha, seed=self.seed)

    def repair(self, method: str) -> RepairOptions:
        """How each network is repaired by a method."""
        own = self.settings.get(method, {}) if method not in self.detectors else {}
        return RepairOptions(method=method, settings=own, rescan=False, alpha=self.alpha, seed=self.seed)


@dataclass(frozen=True)
class Scanned:
    """What a scan said about one network.

    Attributes:
        verdict: Of all detectors together.
        p_value: The smallest of any detector; 1 where none has an answer.
        p_values: By detector; ``None`` without an answer.
        flagged: Labels that the verdict rests on.
        errors: By detector that failed: why.
        gradient_samples: Images run forward and backward.
        cpu_seconds: Processor time.
    """

    verdict: str
    p_value: float
    p_values: Mapping[str, float | None]
    flagged: Sequence[int]
    errors: Mapping[str, str]
    gradient_samples: int
    cpu_seconds: float


@dataclass(frozen=True)
class Repaired:
    """What a repair did to one network.

    Attributes:
        method: The id.
        name: Of the candidate, where a method makes several.
        accuracy_before: On the test images, in [0, 1], of the network as it was.
        accuracy: Of the repaired network.
        attack_success_before: The share of stamped test images that get the label the attacker wants.
        attack_success: Likewise, of the repaired network.
        effectiveness: DER, see ``metrics.defence_effectiveness``.
        gradient_samples: Of the whole repair, all candidates together.
        cpu_seconds: Likewise.
        error: Why there is no network, or empty.
    """

    method: str
    name: str = ""
    accuracy_before: float | None = None
    accuracy: float | None = None
    attack_success_before: float | None = None
    attack_success: float | None = None
    effectiveness: float | None = None
    gradient_samples: int = 0
    cpu_seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Judged:
    """A network with everything that was found out about it; repairs only of backdoored ones."""

    entry: ZooEntry
    scanned: Scanned
    repaired: Sequence[Repaired]


def judge_zoo(
    entries: Sequence[ZooEntry],
    options: BenchOptions,
    folder: Path | None = None,
    *,
    jobs: int = 1,
    use_cache: bool = True,
    observer: Callable[[str, float], None] = lambda _stage, _fraction: None,
) -> Iterator[Judged]:
    """Scan, and repair where asked, every network; yield them in order.

    Args:
        entries: The networks.
        options: What to judge.
        folder: The cache; ``cache.default_folder()`` if ``None``.
        jobs: Processes, each on one thread.
        use_cache: Whether to take and keep results; networks are kept in any case.
        observer: Told which part is done.

    Raises:
        BackdoorscanError: A method does not exist, or its options cannot be.
    """
    check(options, installed())
    place = (folder or cache.default_folder()) / "results" if use_cache else None
    observer("judging", 0.0)
    results = run_all(_judge, [(entry, options, place) for entry in entries], jobs)
    for position, judged in enumerate(results):
        yield judged
        observer("judging", (position + 1) / len(entries))


def check(options: BenchOptions, registry: Registry) -> None:
    """Complain before any work about methods and options that do not exist.

    Raises:
        UsageError: An unknown method or option, or options for a method that does not run.
        PluginError: A broken one was asked for.
    """
    plan_detectors(options.scan, registry)
    for method in options.repairs:
        plan_methods(options.repair(method), registry)


def _judge(entry: ZooEntry, options: BenchOptions, place: Path | None) -> Judged:
    with one_thread():
        detectors = [detector for _, detector in plan_detectors(options.scan, installed())]
        found = _kept(place, _key(entry, "scan", detectors, options), partial(_scan, entry, options.scan))
        repaired: list[Repaired] = []
        for method in options.repairs if entry.attack_success is not None and entry.took else ():
            methods = plan_methods(options.repair(method), installed())
            # A repair that needs triggers scans first, with the detectors of a scan.
            key = _key(entry, f"repair {method}", [*methods, *_all_detectors(options)], options)
            rows = _kept(place, key, partial(_repair, entry, options.repair(method)))
            repaired += [Repaired(**row) for row in rows["rows"]]
    return Judged(entry, Scanned(**found), repaired)


def _all_detectors(options: BenchOptions) -> list[Method]:
    scan = ScanOptions(alpha=options.alpha, seed=options.seed)
    return [detector for _, detector in plan_detectors(scan, installed())]


def _scan(entry: ZooEntry, options: ScanOptions) -> dict[str, Any]:
    """The fields of a ``Scanned``."""
    plan, registry = plan_detectors(options, installed()), installed()
    loaded, meter = entry.load(), Meter()
    run = scan_model(
        loaded, entry.clean, plan, options, meter=meter, observer=lambda _stage, _part: None, registry=registry
    )
    p_values = {detector.id: detector.p_value for detector in run.detectors}
    scanned = Scanned(
        verdict=str(run.verdict),
        p_value=min((p for p in p_values.values() if p is not None), default=1.0),
        p_values=p_values,
        flagged=sorted({finding.target_label for finding in run.findings}) if run.verdict == "backdoored" else [],
        errors={detector.id: detector.error for detector in run.detectors if detector.error},
        gradient_samples=run.cost.gradient_samples,
        cpu_seconds=run.cost.cpu_seconds,
    )
    return asdict(scanned)


def _repair(entry: ZooEntry, options: RepairOptions) -> dict[str, Any]:
    """The fields of a ``Repaired`` for each candidate of a method, or the reason why there is none."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = replace(options, output=Path(scratch) / "repaired")
        try:
            report = repair(entry.path, entry.clean, entry.spec.attacked(), entry.read, whole, test=entry.test)
        except BackdoorscanError as error:
            failed = Repaired(options.method, error=str(error), cpu_seconds=meter.read().cpu_seconds)
            return {"rows": [asdict(failed)]}
    rows = []
    for row in report.candidates:
        before = (report.before.clean_accuracy, report.before.attack_success_rate or 0.0)
        after = (row.scores.clean_accuracy, row.scores.attack_success_rate or 0.0)
        rows.append(
            Repaired(
                options.method,
                # Which candidate "auto" took differs from network to network.
                "" if options.method == "auto" else f"{row.name} {row.kind}",
                accuracy_before=before[0],
                accuracy=after[0],
                attack_success_before=before[1],
                attack_success=after[1],
                effectiveness=defence_effectiveness(before, after),
                gradient_samples=report.cost.gradient_samples,
                cpu_seconds=report.cost.cpu_seconds,
            )
        )
    return {"rows": [asdict(row) for row in rows]}


def _kept(place: Path | None, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of that name, made and kept if it is not there."""
    if place is None:
        return make()
    path = place / f"{key}.json"
    found = cache.read_json(path)
    if found is None:
        found = make()
        cache.write_json(path, found)
    return found


def _key(entry: ZooEntry, what: str, methods: Sequence[Method], options: BenchOptions) -> str:
    """The name of a result: a digest of everything that it follows from."""
    return cache.digest(
        {
            "what": what,
            "model": entry.sha256,
            "clean": entry.clean.sha256,
            "test": entry.test.sha256,
            "methods": [[method.id, method.settings(), cache.method_source(method)] for method in methods],
            "alpha": options.alpha,
            "seed": options.seed,
            "versions": versions(),
        }
    )
