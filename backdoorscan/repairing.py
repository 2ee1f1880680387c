"""The verb *repair*: run a method, measure before and after, write the results in the user's own format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backdoorscan.costing import Meter, versions
from backdoorscan.errors import OutputError, UsageError
from backdoorscan.evaluating import check_images, measure
from backdoorscan.findings import Finding
from backdoorscan.formats.goodnet import write_goodnet
from backdoorscan.formats.images import load_images
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.goodnet import GoodNet
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.method import Context
from backdoorscan.plugin.repairer import Candidate, Repairer
from backdoorscan.registry import Registry, installed
from backdoorscan.report import CandidateRow, RepairReport


@dataclass(frozen=True)
class RepairOptions:
    """How to repair.

    Attributes:
        method: Id of the repairer.
        settings: Its options: name -> value.
        output: Folder for the repaired networks; ``<model>-repaired`` if ``None``.
        force: Whether files in an existing folder may be replaced.
        target: Target label of the poisoned images, if their labels are the true ones.
        seed: Same input and same seed give the same result.
    """

    method: str = "prune"
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    force: bool = False
    target: int | None = None
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
    findings: Sequence[Finding] = (),
    observer: Callable[[str, float], None] = _unseen,
    registry: Registry | None = None,
) -> RepairReport:
    """Repair a model file.

    Args:
        model: The file; it is never changed.
        images: Clean labelled images, or where to read them.
        poisoned: Images with the trigger on them, only for measuring.
        read: What is known about the file.
        options: How to repair.
        findings: What a scan found, for methods that use it.
        observer: Told of progress.
        registry: Where methods are found.

    Raises:
        BackdoorscanError: Something cannot be used, or the results cannot be written. Nothing is left half-written.
    """
    read, options, registry = read or ReadOptions(), options or RepairOptions(), registry or installed()
    meter = Meter()
    component = registry.find("repairer", options.method).component
    if not (isinstance(component, type) and issubclass(component, Repairer)):
        raise UsageError(f"{options.method} is not a repair method.")
    method = component.configured(options.settings)
    folder = options.output or Path(f"{Path(model).stem}-repaired")
    if folder.exists() and not options.force:
        raise OutputError(
            f"{folder} exists already.", hint="Choose another folder with -o, or pass --force to replace files in it."
        )
    if not isinstance(images, LabelledImages):
        images = load_images(images)
    if poisoned is not None and not isinstance(poisoned, LabelledImages):
        poisoned = load_images(poisoned)
    observer("reading the model", 0.0)
    loaded = load_model(model, images, read, seed=options.seed, registry=registry)
    check_images(images, poisoned, options.target, loaded.classifier.num_classes)
    before = measure(loaded.classifier, images, poisoned, target=options.target)
    context = Context(seed=options.seed, progress=lambda fraction: observer(options.method, fraction))
    candidates = method.repair(loaded.classifier, images, findings, context)
    with _whole_folder(folder) as place:
        rows: list[CandidateRow] = []
        for position, candidate in enumerate(candidates):
            rows += _write(candidate, loaded, place, folder, images, poisoned, options)
            observer("writing", (position + 1) / len(candidates))
    return RepairReport(
        seed=options.seed,
        versions=versions(),
        cost=meter.read(),
        model=loaded.facts,
        images=images.described(),
        poisoned=poisoned.described() if poisoned is not None else None,
        method=method.id,
        options=method.settings(),
        before=before,
        candidates=rows,
    )


def _write(
    candidate: Candidate,
    loaded: LoadedModel,
    place: Path,
    folder: Path,
    images: LabelledImages,
    poisoned: LabelledImages | None,
    options: RepairOptions,
) -> list[CandidateRow]:
    """Measure a candidate, and its GoodNet, and write them."""
    stem = f"{loaded.artifact.path.stem}_{candidate.name}"
    name = stem + loaded.artifact.path.suffix
    loaded.loader.write(
        loaded.artifact, candidate.classifier.network.state_dict(), place / name, arch=loaded.options.arch
    )
    scores = measure(candidate.classifier, images, poisoned, target=options.target)
    rows = [CandidateRow(candidate.name, "repaired", scores, candidate.facts, [str(folder / name)])]
    if candidate.goodnet:
        goodnet = GoodNet(loaded.classifier, candidate.classifier)
        name = f"{stem}.goodnet.onnx"
        write_goodnet(goodnet, place / name)
        scores = measure(goodnet, images, poisoned, target=options.target, rejects=goodnet.num_classes)
        rows.append(CandidateRow(candidate.name, "goodnet", scores, candidate.facts, [str(folder / name)]))
    return rows


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write to that becomes ``folder`` only if everything went well."""
    place = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
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
