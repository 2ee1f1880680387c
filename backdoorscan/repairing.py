"""The verb *repair*: run a method, measure before and after, scan again, write the user's own format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backdoorscan import policy
from backdoorscan.costing import Meter, versions
from backdoorscan.errors import MethodError, OutputError, UsageError
from backdoorscan.evaluating import check_images, measure, predictions
from backdoorscan.findings import Finding, Verdict
from backdoorscan.formats.goodnet import write_goodnet
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.goodnet import GoodNet, RejectingNet
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.detector import MANY_CLASSES, labels_to_check
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.registry import Registry, installed
from backdoorscan.report import CandidateRow, RepairReport, Scores
from backdoorscan.scanning import ScanOptions, look_again

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
    max_drop: float | None = None
    rescan: bool = True
    learn_from_poisoned: bool = False
    target: int | None = None
    alpha: float = policy.DEFAULT_ALPHA
    seed: int = 0


def _unseen(_stage: str, _fraction: float) -> None:
    """Nobody looks."""


def repair(
    model: str | Path,
    images: LabelledImages | str | Path,
    poisoned: LabelledImages | str | Path | None = None,
    read: ReadOptions | None = None,
    options: RepairOptions | None = None,
    *,
    findings: Sequence[Finding] | None = None,
    test: LabelledImages | str | Path | None = None,
    observer: Callable[[str, float], None] = _unseen,
    registry: Registry | None = None,
) -> RepairReport:
    """Repair a model file.

    Args:
        model: The file; it is never changed.
        images: Clean labelled images, or where to read them.
        poisoned: Images with the trigger on them, for measuring.
        read: What is known about the file.
        options: How to repair.
        findings: What a scan found; if ``None``, methods that need reversed triggers scan first.
        test: Clean images to measure on; else a part of ``images`` is kept from the method.
        observer: Told of progress.
        registry: Where methods are found.

    Raises:
        BackdoorscanError: Something cannot be used, or the results cannot be written. Nothing is left half-written.
    """
    read, options, registry = read or ReadOptions(), options or RepairOptions(), registry or installed()
    meter = Meter()
    methods = plan_methods(options, registry)
    folder = options.output or Path(f"{Path(model).stem}-repaired")
    check_folder(folder, options.force)
    clean = _read(images)
    stamped = None if poisoned is None else _read(poisoned)
    unseen = None if test is None else _read(test)
    observer("reading the model", 0.0)
    loaded = load_model(model, clean, read, seed=options.seed, registry=registry)
    for part in (clean, unseen or clean):
        check_images(part, stamped, options.target, loaded.classifier.num_classes)
    known = None
    if options.learn_from_poisoned:
        if stamped is None or len(stamped) < 2:
            raise UsageError("There are no poisoned images to learn from.", hint="Pass --poisoned.")
        known, stamped = _halves(stamped, options.seed)
    share = 0.0 if unseen else max(method.held_out for method in methods)
    seen, held_out = _hold_out(clean, share, options.seed)
    bench = _Bench(loaded, unseen or held_out, stamped, options, meter, registry)

    if findings is None:
        findings = []
        if any(method.needs_triggers for method in methods):
            observer("scanning", 0.0)
            findings = bench.scan(loaded.classifier, seen, ())[1]
    bench.findings = list(findings)
    before = bench.measure(loaded.classifier, None)
    context = Context(
        seed=options.seed, poisoned=known, progress=lambda part: observer(f"repairing ({options.method})", part)
    )
    with _whole_folder(folder) as place:
        tried = _run(methods, loaded, seen, findings, context, options)
        rows: list[tuple[CandidateRow, _Network]] = []
        for position, (method, candidate) in enumerate(tried):
            rows += bench.rows(method, candidate, before)
            observer("measuring", (position + 1) / len(tried))
        if options.method == AUTO:
            rows = [_best(rows, before)]
        for _, network in rows:
            network.write(loaded, place)
        report_rows = [replace(row, files=[str(folder / network.name)]) for row, network in rows]
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


@dataclass(frozen=True)
class _Network:
    """A repaired network and the name of its file."""

    name: str
    network: nn.Module

    def write(self, loaded: LoadedModel, place: Path) -> None:
        if isinstance(self.network, GoodNet | RejectingNet):
            write_goodnet(self.network, place / self.name)
            return
        weights: Mapping[str, Tensor] = self.network.get_submodule("network").state_dict()
        loaded.loader.write(loaded.artifact, weights, place / self.name, arch=loaded.options.arch)


class _Bench:
    """Measures networks, all in the same way."""

    def __init__(
        self,
        loaded: LoadedModel,
        images: LabelledImages,
        poisoned: LabelledImages | None,
        options: RepairOptions,
        meter: Meter,
        registry: Registry,
    ) -> None:
        self.loaded, self.images, self.poisoned = loaded, images, poisoned
        self.options, self.meter, self.registry = options, meter, registry
        self.findings: list[Finding] = []

    def measure(self, network: nn.Module, rejects: int | None) -> Scores:
        triggers = [finding.trigger for finding in self.findings if finding.trigger is not None]
        return measure(
            network, self.images, self.poisoned, target=self.options.target, rejects=rejects, triggers=triggers
        )

    def scan(self, classifier: Any, images: LabelledImages, targets: Sequence[int]) -> tuple[Verdict, list[Finding]]:
        """Scan a network; of many classes only the repaired ones and a few beside them."""
        classes = self.loaded.classifier.num_classes
        context = Context(seed=self.options.seed)
        labels = labels_to_check(classes, targets, context) if targets else tuple(range(classes))
        scan_options = ScanOptions(alpha=self.options.alpha, seed=self.options.seed)
        verdict, findings, samples = look_again(classifier, images, labels, scan_options, self.registry)
        self.meter.gradient_samples += samples
        return verdict, findings

    def rows(self, method: Repairer, candidate: Candidate, before: Scores) -> list[tuple[CandidateRow, _Network]]:
        """A candidate, and its GoodNet, measured."""
        self.meter.gradient_samples += int(candidate.facts.get("gradient_samples", 0))
        path = self.loaded.artifact.path
        stem = f"{path.stem}_{candidate.name}"
        networks: list[tuple[str, _Network]]
        if candidate.rejects:
            networks = [("goodnet", _Network(f"{stem}.goodnet.onnx", RejectingNet(candidate.classifier)))]
        else:
            networks = [("repaired", _Network(stem + path.suffix, candidate.classifier))]
            if candidate.goodnet or self.options.goodnet:
                both = GoodNet(self.loaded.classifier, candidate.classifier)
                networks.append(("goodnet", _Network(f"{stem}.goodnet.onnx", both)))
        rows = []
        for kind, network in networks:
            rejects = self.loaded.classifier.num_classes if kind == "goodnet" else None
            scores = self.measure(network.network, rejects)
            drop = 100 * (before.clean_accuracy - scores.clean_accuracy)
            row = CandidateRow(
                candidate.name,
                kind,
                scores,
                candidate.facts,
                files=(),
                method=method.id,
                worst_class=self._worst_class(network.network),
                within_budget=None if self.options.max_drop is None else drop <= self.options.max_drop + 1e-9,
            )
            rows.append((self._scanned(row, network.network), network))
        return rows

    def _scanned(self, row: CandidateRow, network: nn.Module) -> CandidateRow:
        targets = sorted({finding.target_label for finding in self.findings})
        many = self.loaded.classifier.num_classes > MANY_CLASSES and not targets
        if not self.options.rescan or many or isinstance(network, GoodNet):
            return row
        classifier = network.classifier if isinstance(network, RejectingNet) else network
        verdict, findings = self.scan(classifier, self.images, targets)
        return replace(row, verdict=verdict, flagged=[finding.target_label for finding in findings])

    def _worst_class(self, network: nn.Module) -> dict[str, Any] | None:
        labels = torch.from_numpy(self.images.labels)
        was = predictions(self.loaded.classifier, self.images) == labels
        now = predictions(network, self.images) == labels
        losses = {
            int(label): 100 * float(was[labels == label].double().mean() - now[labels == label].double().mean())
            for label in labels.unique()
        }
        label, points = max(losses.items(), key=lambda item: item[1])
        return {"label": label, "points": round(points, 2)} if points > 0 else None


def _run(
    methods: Sequence[Repairer],
    loaded: LoadedModel,
    images: LabelledImages,
    findings: Sequence[Finding],
    context: Context,
    options: RepairOptions,
) -> list[tuple[Repairer, Candidate]]:
    """All candidates; ``auto`` goes on without a method that cannot work on this network."""
    tried: list[tuple[Repairer, Candidate]] = []
    failures: list[MethodError] = []
    for method in methods:
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


def _best(rows: Sequence[tuple[CandidateRow, _Network]], before: Scores) -> tuple[CandidateRow, _Network]:
    """The row with the best defence effectiveness among those that a second scan finds clean.

    DER = (max(0, drop of success) - max(0, drop of accuracy) + 1) / 2 as BackdoorBench defines it, with the success of
    the reversed triggers: what poisoned images say must not choose.
    """

    def rank(pair: tuple[CandidateRow, _Network]) -> tuple[bool, bool, float]:
        row = pair[0]
        success = max(0.0, (before.reversed_success_rate or 0.0) - (row.scores.reversed_success_rate or 0.0))
        drop = max(0.0, before.clean_accuracy - row.scores.clean_accuracy)
        return row.within_budget is not False, row.verdict in (None, Verdict.CLEAN), (success - drop + 1) / 2

    return max(rows, key=rank)


def _read(source: LabelledImages | str | Path) -> LabelledImages:
    return source if isinstance(source, LabelledImages) else load_images(source)


def _halves(images: LabelledImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    order = torch.randperm(len(images), generator=Context(seed=seed).generator("poisoned halves")).numpy()
    return images.take(order[: len(images) // 2]), images.take(order[len(images) // 2 :])


def _hold_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Images for the method and images to measure with; the same where there are too few to divide."""
    count = int(share * len(images))
    if count < 10:
        return images, images
    order = torch.randperm(len(images), generator=Context(seed=seed).generator("held out")).numpy()
    return images.take(order[count:]), images.take(order[:count])


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write to that becomes ``folder`` only if everything went well."""
    whole = folder.absolute()
    place = whole.with_name(f".{whole.name}.{os.getpid()}.tmp")
    try:
        try:
            place.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"Cannot write to {folder.parent}.", why=str(error)) from error
        yield place
        try:
            if folder.exists():
                for file in place.iterdir():
                    file.replace(folder / file.name)
            else:
                place.rename(folder)
        except OSError as error:
            raise OutputError(f"Cannot write {folder}.", why=str(error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
