"""The verb *scan*: plan, run the detectors, draw the verdict."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from backdoorscan import cache, policy
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier
from backdoorscan.costing import Forecast, Meter, forecast, versions
from backdoorscan.engine import Engine, local
from backdoorscan.engine.checking import sound_judgement, sound_units
from backdoorscan.engine.journal import Journal
from backdoorscan.engine.keeping import Keeping, Kept
from backdoorscan.engine.working import Working, working_images
from backdoorscan.errors import MethodError, UsageError
from backdoorscan.findings import Evidence, Examined, Finding, Unit, Verdict
from backdoorscan.formats.convention import on_clean
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model, read_artifact
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import Detector
from backdoorscan.plugin.method import Context
from backdoorscan.registry import Plugin, Registry, installed
from backdoorscan.report import DetectorRun, ModelRun, ScanReport
from backdoorscan.trigger import Trigger

_log = logging.getLogger(__name__)

Observer = Callable[[str, float], None]
"""Told what is being done and which part of it is done, 0 to 1."""


@dataclass(frozen=True)
class ScanOptions:
    """How to scan.

    Attributes:
        detectors: Ids of the detectors to run; all default ones if empty.
        settings: Options of methods: id -> name -> value.
        labels: Labels to examine, or ``None`` for all.
        alpha: False-alarm budget per model, 0 to 1.
        seed: Same input and same seed give the same report.
        timeout: Seconds after which the scan ends incomplete, or ``None``.
        jobs: Units of work at a time, each with one computing thread; the report is the same.
        engine: Other machines to work on, or ``None`` for this one; the report is the same.
    """

    detectors: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labels: tuple[int, ...] | None = None
    alpha: float = policy.DEFAULT_ALPHA
    seed: int = 0
    timeout: float | None = None
    jobs: int = 1
    engine: Engine | None = None


def unwatched(_stage: str, _fraction: float) -> None:
    """Nobody looks."""


def scan(
    model: str | Path | Artifact,
    images: LabelledImages | str | Path | None = None,
    read: ReadOptions | None = None,
    options: ScanOptions | None = None,
    *,
    observer: Observer = unwatched,
    registry: Registry | None = None,
    keeping: Keeping | None = None,
    foretold: Callable[[Forecast], None] | None = None,
) -> ScanReport:
    """Look for backdoors in a model file.

    Args:
        model: The file, or what was read of it.
        images: Clean labelled images, or where to read them; without any, images are made from the model.
        read: What is known about the file.
        options: How to scan.
        observer: Told of progress.
        registry: Where methods are found.
        keeping: Where finished reports and the journal of an unfinished scan are kept; nowhere if ``None``.
        foretold: Told before the work about how long it will take, where that is known.

    Raises:
        BackdoorscanError: The file, the images or an option cannot be used. A detector that fails does not raise: the
            report says so and is incomplete.
    """
    read, options, registry = read or ReadOptions(), options or ScanOptions(), registry or installed()
    meter = Meter()
    plan = plan_detectors(options, registry)
    observer("reading the model", 0.0)
    if isinstance(images, str | Path):
        images = load_images(images)
    artifact = model if isinstance(model, Artifact) else read_artifact(model, registry)
    kept = keeping and Kept(keeping, work(artifact, images, read, plan, options), {"alpha": options.alpha})
    stored = kept and kept.report()
    if stored:
        report = replace(stored, runs=[as_asked(run, artifact.path, images, read) for run in stored.runs])
        registry.announce("scan_finished", report=report)
        return report
    # Of a cluster's machines each takes its own copy to its device.
    here = replace(read, device="cpu") if options.engine else read
    loaded = load_model(artifact, images, here, seed=options.seed, registry=registry)
    journal = kept.journal() if kept else None
    try:
        run = scan_model(
            loaded,
            images,
            plan,
            options,
            meter=meter,
            observer=observer,
            registry=registry,
            journal=journal,
            foretold=None if keeping and keeping.resume else foretold,
        )
    finally:
        if journal:
            journal.close()
    report = ScanReport(
        seed=options.seed,
        versions=versions(),
        cost=run.cost,
        verdict=run.verdict,
        complete=run.complete,
        alpha=options.alpha,
        runs=[run],
    )
    if kept:
        kept.keep(report)
    if journal and report.complete:
        journal.drop()
    registry.announce("scan_finished", report=report)
    return report


def work(
    artifact: Artifact,
    images: LabelledImages | None,
    read: ReadOptions,
    plan: Sequence[tuple[Plugin, Detector]],
    options: ScanOptions,
) -> dict[str, Any]:
    """Everything that the evidence of a scan follows from, as plain data; alpha only decides what it means."""
    return {
        "model": artifact.sha256,
        "images": images.sha256 if images is not None else "none",
        "read": {**asdict(read), "arch": cache.arch_source(read.arch)},
        "detectors": [[d.id, plugin.version, d.settings(), cache.method_source(d)] for plugin, d in plan],
        "labels": options.labels,
        "seed": options.seed,
        "versions": versions(),
    }


def as_asked(run: ModelRun, path: Path, images: LabelledImages | None, read: ReadOptions) -> ModelRun:
    """A run that was made before with the names under which its files are known now."""
    model = {**run.model, "path": str(path)}
    if "arch" in model:
        model["arch"] = read.arch
    described = run.images and {**run.images, "path": images.source if images is not None else None}
    return replace(run, model=model, images=described, cached=True)


def plan_detectors(options: ScanOptions, registry: Registry) -> list[tuple[Plugin, Detector]]:
    """The detectors to run, cheapest first, configured.

    Raises:
        UsageError: An unknown detector or option, or options for a method that does not run.
        PluginError: A broken one was asked for, or there is none.
    """
    if not 0 < options.alpha < 1:
        raise UsageError(f"--alpha {options.alpha:g} is not between 0 and 1.", hint="The default is 0.01.")
    everything = {plugin.id: plugin for plugin in registry.of_kind("detector")}
    if options.detectors:
        chosen = [registry.find("detector", identifier) for identifier in dict.fromkeys(options.detectors)]
    else:
        chosen = [p for p in everything.values() if getattr(p.component, "default", False)]
        if not chosen:
            registry.find("detector", "neural-cleanse")
    registry.check_settings("detector", [plugin.id for plugin in chosen], options.settings)
    plan = []
    for plugin in chosen:
        component = plugin.component
        if isinstance(component, type) and issubclass(component, Detector):
            plan.append((plugin, component.configured(options.settings.get(plugin.id, {}))))
    return sorted(plan, key=lambda pair: (pair[1].cost, pair[1].id))


def scan_model(
    loaded: LoadedModel,
    images: LabelledImages | None,
    plan: Sequence[tuple[Plugin, Detector]],
    options: ScanOptions,
    *,
    meter: Meter,
    observer: Observer,
    registry: Registry,
    journal: Journal | None = None,
    foretold: Callable[[Forecast], None] | None = None,
) -> ModelRun:
    """Run the planned detectors on one loaded model.

    Raises:
        UsageError: Labels that the model does not have.
        MethodError: No images can be made from the model.
    """
    classifier = loaded.classifier
    unknown = [label for label in options.labels or () if not 0 <= label < classifier.num_classes]
    if unknown:
        raise UsageError(
            f"--labels names {unknown[0]}.", why=f"The model has the classes 0 to {classifier.num_classes - 1}."
        )
    registry.announce("scan_started", artifact=loaded.artifact, detectors=[detector for _, detector in plan])
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    context = Context(seed=options.seed, labels=options.labels, deadline=deadline)
    clean_accuracy, guessing = on_clean(classifier, images) if images is not None else (None, "")
    promised, plan = plan, [] if guessing else plan
    if foretold and plan and not options.engine:
        _foretell(foretold, classifier, plan, options, registry)
    needed = any(detector.needs_images for _, detector in plan)
    making = replace(context, progress=lambda part: observer("making images", part))
    working = working_images(images, classifier, making) if needed else Working(images, images)
    meter.gradient_samples += working.gradient_samples
    notes = [*([guessing] if guessing else []), *working.notes]
    if classifier.details.get("input_range_assumed"):
        notes.append("no clean images: that the model takes 0..1 is assumed; pin it with --input-range, --mean, --std")
    elsewhere = options.engine.cpu_seconds if options.engine else 0.0
    drawn = _run_plan(plan, classifier, working.images, context, options, observer, registry, journal)
    if options.engine:
        meter.cpu_seconds_elsewhere += options.engine.cpu_seconds - elsewhere
    runs = drawn.runs
    meter.gradient_samples += sum(run.gradient_samples for run in runs)
    complete = not any(run.error for run in runs)
    answered = {run.id for run in runs if run.p_value is not None}
    covered = {spot for _, detector in plan if detector.id in answered for spot in detector.covers}
    blind = dict.fromkeys(spot for _, detector in promised for spot in detector.blind_spots if spot not in covered)
    not_tested = list(blind)
    if options.labels is not None and len(options.labels) < classifier.num_classes:
        not_tested.append(f"{classifier.num_classes - len(options.labels)} labels left out by --labels")
    return ModelRun(
        model=loaded.facts,
        images=working.described(options.seed),
        verdict=drawn.verdict,
        complete=complete,
        clean_accuracy=clean_accuracy,
        findings=drawn.findings,
        detectors=runs,
        cost=meter.read(),
        not_tested=not_tested,
        notes=notes,
        otherwise=drawn.otherwise,
    )


def look_again(
    classifier: Classifier, images: LabelledImages, labels: tuple[int, ...], options: ScanOptions, registry: Registry
) -> tuple[Verdict, list[Finding], int]:
    """Scan a network that is not a file: verdict, findings and gradient samples."""
    context = Context(seed=options.seed, labels=labels)
    plan = plan_detectors(options, registry)
    drawn = _run_plan(plan, classifier, images, context, options, unwatched, registry)
    return drawn.verdict, drawn.findings, sum(run.gradient_samples for run in drawn.runs)


@dataclass(frozen=True)
class _Drawn:
    """What the detectors together say: see ``ModelRun``."""

    verdict: Verdict
    findings: list[Finding]
    otherwise: Verdict
    runs: list[DetectorRun]


def _run_plan(
    plan: Sequence[tuple[Plugin, Detector]],
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    options: ScanOptions,
    observer: Observer,
    registry: Registry,
    journal: Journal | None = None,
) -> _Drawn:
    """Run the detectors one after the other, each told what those before it found, and draw the verdict."""
    earlier: dict[str, Examined] = {}
    runs = []
    examine = options.engine.run if options.engine else partial(local.run, jobs=options.jobs)
    for plugin, detector in plan:
        told = replace(context, earlier=dict(earlier))
        run, examined = _run_detector(plugin, detector, classifier, images, told, examine, observer, registry, journal)
        runs.append(run)
        if examined:
            earlier[detector.id] = examined
    answered = {name for name, examined in earlier.items() if examined.judgement.p_value is not None}
    again = {name for _, detector in plan if detector.id in answered for name in detector.confirms}
    judgements = [examined.judgement for name, examined in earlier.items() if name not in again]
    verdict, findings = policy.verdict(judgements, options.alpha)
    # Detectors of special kinds alone cannot say that there is no ordinary backdoor.
    general = any(detector.id in answered and not detector.covers for _, detector in plan)
    decided = general and not any(run.error for run in runs)
    otherwise = policy.otherwise(judgements, findings, options.alpha)
    verdict, otherwise = (
        Verdict.INCONCLUSIVE if word is Verdict.CLEAN and not decided else word for word in (verdict, otherwise)
    )
    return _Drawn(verdict, findings, otherwise, runs)


def _run_detector(
    plugin: Plugin,
    detector: Detector,
    classifier: Classifier,
    images: LabelledImages | None,
    context: Context,
    examine: Callable[..., Iterator[tuple[Unit, Evidence]]],
    observer: Observer,
    registry: Registry,
    journal: Journal | None,
) -> tuple[DetectorRun, Examined | None]:
    started = time.perf_counter()
    run = DetectorRun(id=detector.id, version=plugin.version, options=detector.settings())
    section = journal and journal.section(detector.id, context.earlier)
    evidence: list[Evidence] = []
    try:
        units = _planned(detector, partial(detector.units, classifier, context))
        while units:
            found = section.taken_over(units) if section else {}
            left = [unit for unit in units if unit.id not in found]
            watched = replace(context, progress=_rest_of(partial(observer, detector.id), len(left) / len(units)))
            watched.progress(0.0)
            keep = {"keep": section.keep} if section else {}
            for unit, part in examine(detector, left, classifier, images, watched, **keep):
                registry.announce("unit_finished", detector=detector, unit=unit, evidence=part)
                found[unit.id] = part
            evidence += [found[unit.id] for unit in units]
            units = _planned(detector, partial(detector.more_units, evidence, classifier, context))
        judgement = sound_judgement(
            detector, local.guarded(detector, "judging", lambda: detector.judge(evidence)), classifier
        )
    except MethodError as error:
        _log.debug("%s failed", detector.id, exc_info=error)
        return replace(run, error=str(error), seconds=_since(started)), None
    findings = [replace(f, detector=detector.id) for f in judgement.findings]
    judgement = replace(judgement, findings=findings, share=detector.share)
    run = replace(
        run,
        evidence={**judgement.figures, "units": [part.figures for part in evidence]},
        p_value=judgement.p_value,
        note=judgement.note,
        gradient_samples=sum(part.gradient_samples for part in evidence),
        seconds=_since(started),
        triggers=_smallest([trigger for part in evidence for trigger in part.triggers]),
    )
    return run, Examined(evidence=evidence, judgement=judgement)


def _planned(detector: Detector, plan: Callable[[], Sequence[Unit]]) -> Sequence[Unit]:
    return sound_units(detector, local.guarded(detector, "planning", plan))


def _foretell(
    foretold: Callable[[Forecast], None],
    classifier: Classifier,
    plan: Sequence[tuple[Plugin, Detector]],
    options: ScanOptions,
    registry: Registry,
) -> None:
    usual = [detector for _, detector in plan_detectors(ScanOptions(), registry)]
    labels = classifier.num_classes if options.labels is None else len(options.labels)
    expected = forecast(classifier, [detector for _, detector in plan], usual, labels, options.jobs)
    if expected:
        foretold(expected)


def _rest_of(progress: Callable[[float], None], share: float) -> Callable[[float], None]:
    """The progress of what is left, a ``share`` of the whole, told as that of the whole."""
    return lambda fraction: progress(1 - share * (1 - fraction))


def _smallest(triggers: Sequence[Trigger]) -> list[Trigger]:
    latest = {trigger.target: trigger for trigger in triggers}  # of a race, each label's last round
    return sorted(latest.values(), key=lambda trigger: trigger.l1)[: DetectorRun.MOST_TRIGGERS]


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
