"""The verb *scan*: plan, run the detectors, draw the verdict."""

from __future__ import annotations

import base64
import logging
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdoorscan import policy
from backdoorscan.classifier import Classifier, logits, to_tensor
from backdoorscan.costing import Meter, versions
from backdoorscan.engine import local
from backdoorscan.errors import MethodError, UsageError
from backdoorscan.findings import Evidence, Examined, Finding, Verdict
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.images import LabelledImages
from backdoorscan.ops.metrics import accuracy
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
        jobs: Units of work at a time.
    """

    detectors: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    labels: tuple[int, ...] | None = None
    alpha: float = policy.DEFAULT_ALPHA
    seed: int = 0
    timeout: float | None = None
    jobs: int = 1


def _unseen(_stage: str, _fraction: float) -> None:
    """Nobody looks."""


def scan(
    model: str | Path,
    images: LabelledImages | str | Path,
    read: ReadOptions | None = None,
    options: ScanOptions | None = None,
    *,
    observer: Observer = _unseen,
    registry: Registry | None = None,
) -> ScanReport:
    """Look for backdoors in a model file.

    Args:
        model: The file.
        images: Clean labelled images, or where to read them.
        read: What is known about the file.
        options: How to scan.
        observer: Told of progress.
        registry: Where methods are found.

    Raises:
        BackdoorscanError: The file, the images or an option cannot be used. A detector that fails does not raise: the
            report says so and is incomplete.
    """
    read, options, registry = read or ReadOptions(), options or ScanOptions(), registry or installed()
    meter = Meter()
    plan = plan_detectors(options, registry)
    observer("reading the model", 0.0)
    if not isinstance(images, LabelledImages):
        images = load_images(images)
    loaded = load_model(model, images, read, seed=options.seed, registry=registry)
    run = scan_model(loaded, images, plan, options, meter=meter, observer=observer, registry=registry)
    report = ScanReport(
        seed=options.seed,
        versions=versions(),
        cost=run.cost,
        verdict=run.verdict,
        complete=run.complete,
        alpha=options.alpha,
        runs=[run],
    )
    registry.announce("scan_finished", report=report)
    return report


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
    images: LabelledImages,
    plan: Sequence[tuple[Plugin, Detector]],
    options: ScanOptions,
    *,
    meter: Meter,
    observer: Observer,
    registry: Registry,
) -> ModelRun:
    """Run the planned detectors on one loaded model."""
    classifier = loaded.classifier
    unknown = [label for label in options.labels or () if not 0 <= label < classifier.num_classes]
    if unknown:
        raise UsageError(
            f"--labels names {unknown[0]}.", why=f"The model has the classes 0 to {classifier.num_classes - 1}."
        )
    registry.announce("scan_started", artifact=loaded.artifact, detectors=[detector for _, detector in plan])
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    context = Context(seed=options.seed, labels=options.labels, deadline=deadline)
    predictions = logits(classifier, to_tensor(images.pixels)).argmax(1)
    verdict, findings, runs = _run_plan(plan, classifier, images, context, options, observer, registry)
    meter.gradient_samples += sum(run.gradient_samples for run in runs)
    complete = not any(run.error for run in runs)
    covered = {spot for _, detector in plan for spot in detector.covers}
    blind = dict.fromkeys(spot for _, detector in plan for spot in detector.blind_spots if spot not in covered)
    not_tested = list(blind)
    if options.labels is not None and len(options.labels) < classifier.num_classes:
        not_tested.append(f"{classifier.num_classes - len(options.labels)} labels left out by --labels")
    return ModelRun(
        model=loaded.facts,
        images={**images.described(), "sample": _sample(images, options.seed)},
        verdict=verdict,
        complete=complete,
        clean_accuracy=accuracy(predictions, torch.from_numpy(images.labels)),
        findings=findings,
        detectors=runs,
        cost=meter.read(),
        not_tested=not_tested,
    )


def look_again(
    classifier: Classifier, images: LabelledImages, labels: tuple[int, ...], options: ScanOptions, registry: Registry
) -> tuple[Verdict, list[Finding], int]:
    """Scan a network that is not a file: verdict, findings and gradient samples."""
    context = Context(seed=options.seed, labels=labels)
    plan = plan_detectors(options, registry)
    verdict, findings, runs = _run_plan(plan, classifier, images, context, options, _unseen, registry)
    return verdict, findings, sum(run.gradient_samples for run in runs)


def _run_plan(
    plan: Sequence[tuple[Plugin, Detector]],
    classifier: Classifier,
    images: LabelledImages,
    context: Context,
    options: ScanOptions,
    observer: Observer,
    registry: Registry,
) -> tuple[Verdict, list[Finding], list[DetectorRun]]:
    """Run the detectors one after the other, each told what those before it found, and draw the verdict."""
    earlier: dict[str, Examined] = {}
    runs = []
    for plugin, detector in plan:
        told = replace(context, earlier=dict(earlier))
        run, examined = _run_detector(plugin, detector, classifier, images, told, options.jobs, observer, registry)
        runs.append(run)
        if examined:
            earlier[detector.id] = examined
    answered = {name for name, examined in earlier.items() if examined.judgement.p_value is not None}
    again = {name for _, detector in plan if detector.id in answered for name in detector.confirms}
    judgements = [examined.judgement for name, examined in earlier.items() if name not in again]
    verdict, findings = policy.verdict(judgements, options.alpha)
    if verdict is Verdict.CLEAN and any(run.error for run in runs):
        verdict = Verdict.INCONCLUSIVE
    return verdict, findings, runs


def _run_detector(
    plugin: Plugin,
    detector: Detector,
    classifier: Classifier,
    images: LabelledImages,
    context: Context,
    jobs: int,
    observer: Observer,
    registry: Registry,
) -> tuple[DetectorRun, Examined | None]:
    started = time.perf_counter()
    run = DetectorRun(id=detector.id, version=plugin.version, options=detector.settings())
    watched = replace(context, progress=lambda fraction: observer(detector.id, fraction))
    evidence: list[Evidence] = []
    try:
        units = local.guarded(detector, "planning", partial(detector.units, classifier, watched))
        while units:
            found = {}
            for unit, part in local.run(detector, units, classifier, images, watched, jobs):
                registry.announce("unit_finished", detector=detector, unit=unit, evidence=part)
                found[unit.id] = part
            evidence += [found[unit.id] for unit in units]
            units = local.guarded(detector, "planning", partial(detector.more_units, evidence, classifier, watched))
        judgement = local.guarded(detector, "judging", lambda: detector.judge(evidence))
    except MethodError as error:
        _log.debug("%s failed", detector.id, exc_info=error)
        return replace(run, error=str(error), seconds=_since(started)), None
    judgement = replace(judgement, findings=[replace(f, detector=detector.id) for f in judgement.findings])
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


def _sample(images: LabelledImages, seed: int) -> list[dict[str, Any]]:
    """A few of the images, packed, so that reports can show triggers on them."""
    few = images.sample(4, seed)
    pixels = few.pixels if few.pixels.dtype == np.uint8 else np.round(255 * few.pixels).astype(np.uint8)
    return [
        {"shape": list(image.shape), "uint8": base64.b64encode(zlib.compress(image.tobytes(), 9)).decode()}
        for image in pixels
    ]


def _smallest(triggers: Sequence[Trigger]) -> list[Trigger]:
    return sorted(triggers, key=lambda trigger: trigger.l1)[: DetectorRun.MOST_TRIGGERS]


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 3)
