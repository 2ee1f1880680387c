"""The verb *scan* over several models: each on its own, in one report."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from backdoorscan import cache, policy
from backdoorscan.artifact import Artifact
from backdoorscan.costing import Meter, versions
from backdoorscan.engine import Engine
from backdoorscan.engine.crew import Died, Say, spread
from backdoorscan.engine.keeping import Keeping, Kept
from backdoorscan.errors import BackdoorscanError
from backdoorscan.findings import Finding, Verdict
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import read_artifact
from backdoorscan.images import LabelledImages
from backdoorscan.manifest import Entry
from backdoorscan.registry import Registry, installed
from backdoorscan.report import Cost, DetectorRun, ModelRun, ScanReport
from backdoorscan.scanning import Observer, ScanOptions, as_asked, plan_detectors, scan, work
from backdoorscan.trigger import Trigger

T = TypeVar("T")

_TELL_EVERY = 0.25
"""Seconds between two words of a process on its progress."""


@dataclass(frozen=True)
class _Task:
    """A model to work on.

    Attributes:
        entry: Which one.
        options: How to scan it.
        sha256: Digest of its bytes when they were looked up.
        facts: What its evidence follows from: ``scanning.work``.
        artifact: Its bytes, for a worker that may not see the file.
    """

    entry: Entry
    options: ScanOptions
    sha256: str
    facts: Mapping[str, Any]
    artifact: Artifact | None = None


@dataclass(frozen=True)
class _Shared:
    """What all models' scans need; the images are those of ``Entry.valid``."""

    images: dict[str | None, LabelledImages | None]
    keeping: Keeping | None


def survey(
    entries: Sequence[Entry],
    images: LabelledImages | None,
    options: ScanOptions,
    *,
    limit: int | None = None,
    observer: Observer,
    registry: Registry | None = None,
    keeping: Keeping | None = None,
) -> ScanReport:
    """Scan several models.

    A model that cannot be scanned does not stop the others: its run has an ``error`` and is not complete. Models that
    were scanned before are answered from the cache, and of identical ones (bytes, images, options) one is scanned.
    Detectors' triggers of labels that are not suspected are left out of the report: there may be thousands of models.

    Args:
        entries: The models; each brings its labels and its alpha.
        images: Clean labelled images for those that have none of their own, or ``None``.
        options: How to scan. With several ``jobs`` models are scanned side by side, in processes of one computing
            thread; where only one has to be scanned, its units are worked on side by side. An ``engine`` does the same
            elsewhere, and there a model that was begun is begun anew.
        limit: The most images of an entry's own to use, balanced over the classes.
        observer: Told of progress.
        registry: Where methods are found; with one of the caller's own, everything is done in this process.
        keeping: Where finished reports and journals are kept; nowhere if ``None``.

    Raises:
        UsageError: Options that cannot work for any model.
    """
    meter, children, methods = Meter(), _of_children(), registry or installed()
    elsewhere = options.engine.cpu_seconds if options.engine else 0.0
    stages = [detector.id for _, detector in plan_detectors(options, methods)]
    shared = _Shared({None: images}, keeping)
    runs: dict[int, ModelRun] = {}
    tasks: dict[str, _Task] = {}
    same: dict[str, list[int]] = {}
    for position, entry in enumerate(entries):
        observer("looking at the models", position / len(entries))
        own = replace(options, labels=entry.labels, alpha=entry.alpha)
        found = _guarded(entry, partial(_look_up, entry, shared, own, methods, limit))
        if isinstance(found, ModelRun):
            runs[position] = found
        else:
            identity, task = found
            tasks.setdefault(identity, task)
            same.setdefault(identity, []).append(position)
    observer("looking at the models", 1.0)
    identities = list(tasks)
    twins = len(entries) - len(runs) - len(tasks)
    progress = _Progress(observer, [task.entry for task in tasks.values()], stages, len(entries) - twins)
    # Closed even where Ctrl-C comes between two answers: it has processes to end.
    with closing(_work_on(list(tasks.values()), shared, options, progress, registry)) as answers:
        for number, run in answers:
            progress.finished(number)
            meter.gradient_samples += run.cost.gradient_samples
            first, *others = same[identities[number]]
            runs[first] = run
            for other in others:
                runs[other] = _twin(run, tasks[identities[number]], entries[other], shared)
    if options.engine:
        meter.cpu_seconds_elsewhere = options.engine.cpu_seconds - elsewhere
    ordered = [
        replace(entry.named(runs[position]), alpha=None if entry.alpha == options.alpha else entry.alpha)
        for position, entry in enumerate(entries)
    ]
    return ScanReport(
        seed=options.seed,
        versions=versions(),
        cost=_cost(meter, children, ordered),
        verdict=policy.worst([run.verdict for run in ordered]),
        complete=all(run.complete for run in ordered),
        alpha=options.alpha,
        runs=ordered,
        cached=all(run.cached for run in ordered),
    )


def _look_up(
    entry: Entry, shared: _Shared, options: ScanOptions, registry: Registry, limit: int | None
) -> ModelRun | tuple[str, _Task]:
    """The kept answer, or what there is to do under a name that identical work has too."""
    if entry.valid not in shared.images:
        shared.images[entry.valid] = load_images(str(entry.valid), limit=limit, seed=options.seed)
    images = shared.images[entry.valid]
    artifact = read_artifact(entry.file, registry)
    everything = work(artifact, images, entry.read, plan_detectors(options, registry), options)
    if shared.keeping:
        silent = replace(shared.keeping, tell=_unheard)
        stored = Kept(silent, everything, {"alpha": options.alpha}).report()
        if stored:
            report = replace(stored, runs=[as_asked(run, artifact.path, images, entry.read) for run in stored.runs])
            registry.announce("scan_finished", report=report)
            return _slim(report.runs[0])
    return cache.digest({**everything, "alpha": options.alpha}), _Task(entry, options, artifact.sha256, everything)


def _work_on(
    tasks: Sequence[_Task], shared: _Shared, options: ScanOptions, progress: _Progress, registry: Registry | None
) -> Generator[tuple[int, ModelRun]]:
    """The number of each task and its run, as they come."""
    tell = shared.keeping.tell if shared.keeping else _unheard

    def heard(number: int, message: Any) -> None:
        if isinstance(message, str):
            tell(f"{tasks[number].entry.file}: {message}")
        else:
            progress.told(number, *message)

    if options.engine and len(tasks) > 1 and registry is None:
        yield from _work_elsewhere(tasks, shared, options.engine, heard)
        return
    if options.jobs == 1 or len(tasks) < 2 or registry is not None:
        units = options.jobs if len(tasks) < 2 else 1
        for number, task in enumerate(tasks):
            alone = replace(task, options=replace(task.options, jobs=units))
            yield number, _scan(shared, alone, partial(heard, number), registry)
        return
    plain = replace(shared, keeping=shared.keeping and replace(shared.keeping, tell=_unheard))
    single = [replace(task, options=replace(task.options, jobs=1)) for task in tasks]
    for number, result in spread(_scan, plain, single, options.jobs, heard):
        yield number, _lost(tasks[number], result) if isinstance(result, Died) else result


def _work_elsewhere(
    tasks: Sequence[_Task], shared: _Shared, engine: Engine, heard: Callable[[int, Any], None]
) -> Generator[tuple[int, ModelRun]]:
    """The same on other machines, which get the bytes; what is to be kept is kept here."""

    def there(task: _Task) -> _Task:
        names = [str(name) for name, *_ in task.facts["detectors"]]  # a node that lacks a plugin has to complain
        task = replace(task, options=replace(task.options, jobs=1, engine=None, detectors=names))
        with suppress(BackdoorscanError):  # gone meanwhile: whoever scans it says so
            task = replace(task, artifact=read_artifact(task.entry.file, installed()))
        return task

    plain = replace(shared, keeping=None)
    with closing(engine.spread(_scan_whole, plain, map(there, tasks), heard)) as results:
        for number, result in results:
            task = tasks[number]
            if isinstance(result, ScanReport):
                if shared.keeping and result.runs[0].model["sha256"] == task.sha256:
                    Kept(shared.keeping, task.facts, {"alpha": task.options.alpha}).keep(result)
                yield number, _slim(result.runs[0])
            else:
                yield number, _lost(task, result) if isinstance(result, Died) else result


def _lost(task: _Task, died: Died) -> ModelRun:
    return _failed(task.entry, task.sha256, f"{task.entry.file} could not be scanned.\n{died.why}")


def _scan(shared: _Shared, task: _Task, say: Say, registry: Registry | None = None) -> ModelRun:
    """One model's run, whatever happens; what it says is progress (stage and fraction) or a message."""
    whole = _scan_whole(shared, task, say, registry)
    return _slim(whole.runs[0]) if isinstance(whole, ScanReport) else whole


def _scan_whole(shared: _Shared, task: _Task, say: Say, registry: Registry | None = None) -> ScanReport | ModelRun:
    """One model's report, with all triggers, or a run with an error."""
    entry, last = task.entry, 0.0

    def observer(stage: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _TELL_EVERY or fraction == 0:
            last = now
            say((stage, fraction))

    keeping = shared.keeping and replace(shared.keeping, tell=say)

    def report() -> ScanReport:
        model, images = task.artifact or entry.file, shared.images[entry.valid]
        return scan(model, images, entry.read, task.options, observer=observer, registry=registry, keeping=keeping)

    gc.freeze()  # what is there already need not be looked through
    result = _guarded(entry, report, task.sha256)
    gc.collect()  # graphs of layers are cycles, and large
    gc.unfreeze()
    return result


def _guarded(entry: Entry, do: Callable[[], T], sha256: str | None = None) -> T | ModelRun:
    """What ``do`` returns, or a run with an error: whatever is wrong with one model must not stop the others."""
    try:
        return do()
    except BackdoorscanError as error:
        return _failed(entry, sha256, str(error))
    except MemoryError:
        return _failed(entry, sha256, "There is not enough memory.")
    except Exception as error:
        return _failed(entry, sha256, f"Internal error: {type(error).__name__}: {error}")


def _failed(entry: Entry, sha256: str | None, error: str) -> ModelRun:
    return ModelRun(
        model={"path": str(entry.file), "sha256": sha256},
        images=None,
        verdict=Verdict.INCONCLUSIVE,
        complete=False,
        clean_accuracy=None,
        findings=[],
        detectors=[],
        cost=Cost(),
        error=error,
    )


def _twin(run: ModelRun, task: _Task, entry: Entry, shared: _Shared) -> ModelRun:
    """The run of an identical model under another name."""
    if run.model["sha256"] != task.sha256:
        return _failed(entry, task.sha256, f"{task.entry.file}, of the same content, changed while it was scanned.")
    if run.error:
        return _failed(entry, task.sha256, run.error)
    return as_asked(run, entry.file, shared.images[entry.valid], entry.read)


def _slim(run: ModelRun) -> ModelRun:
    """A run with the triggers of suspected labels alone, which share no memory with what they were made from."""
    suspected = {finding.target_label for finding in run.findings}

    def own(trigger: Trigger) -> Trigger:
        return Trigger(trigger.mask.detach().clone(), trigger.pattern.detach().clone(), trigger.target)

    def finding(found: Finding) -> Finding:
        return replace(found, trigger=found.trigger and own(found.trigger))

    def detector(part: DetectorRun) -> DetectorRun:
        return replace(part, triggers=[own(trigger) for trigger in part.triggers if trigger.target in suspected])

    return replace(run, findings=[*map(finding, run.findings)], detectors=[*map(detector, run.detectors)])


def _cost(meter: Meter, children: float, runs: Sequence[ModelRun]) -> Cost:
    """Of the whole run, the processes that it started included."""
    own = meter.read()
    return replace(
        own,
        cpu_seconds=round(own.cpu_seconds + _of_children() - children, 3),
        peak_memory_mb=max([own.peak_memory_mb, *(run.cost.peak_memory_mb for run in runs if not run.cached)]),
    )


def _of_children() -> float:
    """Processor time of the processes that were started and have ended, in seconds."""
    times = os.times()
    return times.children_user + times.children_system


class _Progress:
    """What the observer is told of several models.

    Args:
        observer: Whom to tell.
        entries: The models to work on.
        stages: What is done with each, in order.
        count: How many models there are, those that have their answer already among them.
    """

    def __init__(self, observer: Observer, entries: Sequence[Entry], stages: Sequence[str], count: int) -> None:
        self._observer, self._entries, self._stages, self._count = observer, entries, stages, count
        self._parts: dict[int, float] = {}

    def told(self, number: int, stage: str, fraction: float) -> None:
        """A model's scan is at some stage."""
        part = (self._stages.index(stage) + fraction) / len(self._stages) if stage in self._stages else 0.0
        if fraction == 0:
            place = self._count - len(self._entries) + number + 1
            self._observer(f"model {place} of {self._count}, {self._entries[number].file.name}: {stage}", 0.0)
        self._tell(number, part)

    def finished(self, number: int) -> None:
        """A model has its answer."""
        self._tell(number, 1.0)

    def _tell(self, number: int, part: float) -> None:
        self._parts[number] = max(part, self._parts.get(number, 0.0))
        answered = self._count - len(self._entries)
        if answered or any(self._parts.values()):  # what begins at 0 would be taken for a step on the way
            self._observer("all models", (answered + sum(self._parts.values())) / self._count)


def _unheard(_text: str) -> None:
    """Nobody is told."""
