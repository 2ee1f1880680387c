"""The verb *repair*: run a method, measure before and after, scan again, write the user's own format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from backdoorscan import policy
from backdoorscan.artifact import Artifact
from backdoorscan.comparing import Bench, Network
from backdoorscan.costing import Forecast, Meter, versions
from backdoorscan.errors import MethodError, OutputError, UsageError
from backdoorscan.evaluating import check_images, has_true_labels
from backdoorscan.files import whole_folder
from backdoorscan.findings import Finding, Verdict
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.images import LabelledImages
from backdoorscan.measured import NOT_WRITTEN, CandidateRow, RepairReport, Scores
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.registry import Registry, installed
from backdoorscan.scanning import Observer, unwatched

AUTO = "auto"
"""The method that tries the others and keeps the best."""


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    Attributes:
        method: Id of the repairer, or ``"auto"``.
        settings: Its options: name -> value.
        output: Folder for the repaired networks; ``<model>-repaired`` if ``None``.
        force: Whether files in an existing folder may be replaced.
        goodnet: Whether every repaired network is also combined with the original into a GoodNet.
        goodnet_format: ``"onnx"`` or ``"pt2"``: how GoodNets are written.
        max_drop: Budget: the most points of clean accuracy a repair may cost, or ``None``.
        rescan: Whether repaired networks are scanned again.
        learn_from_poisoned: Whether half of the poisoned images goes to the method; the other half measures.
        target: Target label of the poisoned images, if their labels are the true ones.
        alpha: False-alarm budget of the scans.
        seed: Same input and same seed give the same result.
    """

    method: str = "prune"
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    force: bool = False
    goodnet: bool = False
    goodnet_format: Literal["onnx", "pt2"] = "onnx"
    max_drop: float | None = None
    rescan: bool = True
    learn_from_poisoned: bool = False
    target: int | None = None
    alpha: float = policy.DEFAULT_ALPHA
    seed: int = 0


def repair(
    model: str | Path | Artifact,
    images: LabelledImages | str | Path,
    poisoned: LabelledImages | str | Path | None = None,
    read: ReadOptions | None = None,
    options: RepairOptions | None = None,
    *,
    findings: Sequence[Finding] | None = None,
    test: LabelledImages | str | Path | None = None,
    observer: Observer = unwatched,
    registry: Registry | None = None,
    foretold: Callable[[Forecast], None] | None = None,
) -> RepairReport:
    """Repair a model file.

    Args:
        model: The file, or what was read of it; it is never changed.
        images: Clean labelled images, or where to read them.
        poisoned: Images with the trigger on them, to measure with and, if ``options`` say so, to learn from.
        read: What is known about the file.
        options: How to repair.
        findings: What a scan found; if ``None``, the model is scanned first for methods that need reversed triggers
            and learn from no poisoned images in their place.
        test: Clean images to measure on; else a part of ``images`` is kept from the method.
        observer: Told of progress.
        registry: Where methods are found.
        foretold: Told before the work about how long each of its scans will take, where that is known.

    Raises:
        BackdoorscanError: Something cannot be used, or the results cannot be written. Nothing is left half-written.
    """
    read, options, registry = read or ReadOptions(), options or RepairOptions(), registry or installed()
    meter = Meter()
    methods = plan_methods(options, registry)
    path = model.path if isinstance(model, Artifact) else Path(model)
    folder = options.output or Path(f"{path.stem}-repaired")
    check_folder(folder, options.force)
    clean = _read(images)
    stamped = None if poisoned is None else _read(poisoned)
    unseen = None if test is None else _read(test)
    observer("reading the model", 0.0)
    loaded = load_model(model, clean, read, seed=options.seed, registry=registry)
    for part in (clean, unseen or clean):
        check_images(part, stamped, options.target, loaded.classifier.num_classes)
    true_labels = stamped is not None and has_true_labels(stamped, options.target)
    known = None
    if options.learn_from_poisoned:
        known, stamped = _divided(stamped, true_labels, methods, options)
    context = Context(seed=options.seed, progress=lambda part: observer(f"repairing ({options.method})", part))
    plan = [(method, replace(context, poisoned=known if _learns(method, true_labels) else None)) for method in methods]
    share = 0.0 if unseen else max(method.held_out for method in methods)
    seen, held_out = _hold_out(clean, share, options.seed)
    bench = Bench(loaded, unseen or held_out, stamped, options, meter, registry)

    scans_first = findings is None and any(method.needs_triggers and its.poisoned is None for method, its in plan)
    bench.findings = list(findings or [])
    expected = bench.forecast() if foretold and (scans_first or options.rescan) else None
    if foretold and expected:
        foretold(expected)
    if scans_first:
        observer("scanning", 0.0)
        bench.findings = bench.scan(loaded.classifier, seen, ())[1]
    findings = bench.findings
    before = bench.measure(loaded.classifier, None)
    with whole_folder(folder) as place:
        tried = _run(plan, loaded, seen, findings, options)
        rows: list[tuple[CandidateRow, Network]] = []
        for position, (method, candidate) in enumerate(tried):
            rows += bench.rows(method, candidate, before)
            observer("measuring", (position + 1) / len(tried))
        if options.method == AUTO:
            rows = [_best(rows, before)]
        report_rows = []
        for row, network in rows:
            names, missing = network.write(loaded, place)
            facts = {**row.facts, NOT_WRITTEN: {"format": loaded.loader.id, "why": missing}} if missing else row.facts
            report_rows.append(replace(row, files=[str(folder / name) for name in names], facts=facts))
    return RepairReport(
        seed=options.seed,
        versions=versions(),
        cost=meter.read(),
        model=loaded.facts,
        images=clean.described(),
        poisoned=stamped.described() if stamped else None,
        method=options.method,
        options={} if options.method == AUTO else methods[0].settings(),
        before=before,
        candidates=report_rows,
        findings=findings,
        measured_on="test" if unseen else "all" if held_out is clean else "held out",
        measured=len(bench.images),
    )


def plan_methods(options: RepairOptions, registry: Registry) -> list[Repairer]:
    """The repairers to run, configured: one, or for ``auto`` all that volunteer.

    Raises:
        UsageError: An unknown method or option.
        PluginError: A broken one was asked for.
    """
    if options.method != AUTO:
        component = registry.find("repairer", options.method).component
        if not (isinstance(component, type) and issubclass(component, Repairer)):
            raise UsageError(f"{options.method} is not a repair method.")
        return [component.configured(options.settings)]
    if options.settings:
        raise UsageError("--method auto has no options of its own.", hint="Name the method to set its options.")
    return [
        plugin.component.configured(settings)
        for plugin in registry.of_kind("repairer")
        if isinstance(plugin.component, type) and issubclass(plugin.component, Repairer)
        for settings in plugin.component.auto
    ]


def check_folder(folder: Path, force: bool) -> None:
    """Complain before any work about a folder that could not be written after it.

    Raises:
        OutputError: It exists and may not be touched, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file.", hint="Choose a folder with -o.")
    if folder.exists() and not force:
        raise OutputError(
            f"{folder} exists already.", hint="Choose another folder with -o, or pass --force to replace files in it."
        )


def _run(
    plan: Sequence[tuple[Repairer, Context]],
    loaded: LoadedModel,
    images: LabelledImages,
    findings: Sequence[Finding],
    options: RepairOptions,
) -> list[tuple[Repairer, Candidate]]:
    """All candidates; ``auto`` goes on without a method that cannot work on this network."""
    tried: list[tuple[Repairer, Candidate]] = []
    failures: list[MethodError] = []
    for method, context in plan:
        try:
            candidates = method.repair(loaded.classifier, images, findings, context)
        except MethodError as error:
            if options.method != AUTO:
                raise
            failures.append(error)
            continue
        tried += [(method, candidate) for candidate in candidates]
    if not tried:
        raise MethodError("No repair method works on this network.", why="; ".join(error.what for error in failures))
    return tried


def _best(rows: Sequence[tuple[CandidateRow, Network]], before: Scores) -> tuple[CandidateRow, Network]:
    """The row with the best defence effectiveness among those that a second scan finds clean.

    DER = (max(0, drop of success) - max(0, drop of accuracy) + 1) / 2 as BackdoorBench defines it, with the success of
    the reversed triggers: what poisoned images say must not choose.
    """

    def rank(pair: tuple[CandidateRow, Network]) -> tuple[bool, bool, float]:
        row = pair[0]
        success = max(0.0, (before.reversed_success_rate or 0.0) - (row.scores.reversed_success_rate or 0.0))
        drop = max(0.0, before.clean_accuracy - row.scores.clean_accuracy)
        return row.within_budget is not False, row.verdict in (None, Verdict.CLEAN), (success - drop + 1) / 2

    return max(rows, key=rank)


def _read(source: LabelledImages | str | Path) -> LabelledImages:
    return source if isinstance(source, LabelledImages) else load_images(source)


def _learns(method: Repairer, true_labels: bool) -> bool:
    """Whether a method can learn from poisoned images with such labels."""
    return method.poisoned == "images" or (method.poisoned == "true labels" and true_labels)


def _divided(
    images: LabelledImages | None, true_labels: bool, methods: Sequence[Repairer], options: RepairOptions
) -> tuple[LabelledImages, LabelledImages]:
    """Poisoned images to learn from and poisoned images to measure with.

    Raises:
        UsageError: There are none, or the method that was asked for cannot learn from them.
    """
    if images is None or len(images) < 2:
        raise UsageError("There are no poisoned images to learn from.", hint="Pass --poisoned.")
    if options.method != AUTO and not _learns(methods[0], true_labels):
        if methods[0].poisoned == "ignored":
            raise UsageError(
                f"{options.method} does not learn from poisoned images.", hint="Leave out --learn-from-poisoned."
            )
        raise UsageError(
            f"{options.method} learns from poisoned images only if their true labels are known.",
            why="Without --target, or where all labels are the target, they are those that the attack leads to.",
            hint="Pass images with their true labels and --target, or leave out --learn-from-poisoned.",
        )
    order = torch.randperm(len(images), generator=Context(seed=options.seed).generator("poisoned halves")).numpy()
    return images.take(order[: len(images) // 2]), images.take(order[len(images) // 2 :])


def _hold_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Images for the method and images to measure with; the same where there are too few to divide."""
    count = int(share * len(images))
    if count < 10:
        return images, images
    order = torch.randperm(len(images), generator=Context(seed=seed).generator("held out")).numpy()
    return images.take(order[count:]), images.take(order[:count])
