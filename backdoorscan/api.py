"""The verbs for Python: on files as the command line has them, and on networks and arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from backdoorscan import evaluating, repairing, scanning
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import PluginError, UsageError
from backdoorscan.findings import Finding
from backdoorscan.formats import images as files
from backdoorscan.formats.images.arrays import to_labels, to_pixels
from backdoorscan.formats.loading import ReadOptions, load_model
from backdoorscan.formats.memory import ModuleArtifact, reading_modules
from backdoorscan.images import LabelledImages
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.registry import Registry, installed
from backdoorscan.repairing import RepairOptions
from backdoorscan.report import Report, ScanReport
from backdoorscan.reports.taxonomy import refuse
from backdoorscan.scanning import Observer, ScanOptions, unwatched

Array: TypeAlias = npt.NDArray[Any] | Tensor

Model: TypeAlias = str | Path | nn.Module
"""A model file or folder, or a network in memory."""

Images: TypeAlias = LabelledImages | str | Path | tuple[Array, Array]
"""Labelled images, where to read them, or pixels and labels as arrays or tensors: see ``load_images``."""


def scan(
    model: Model,
    images: Images | None = None,
    read: ReadOptions | None = None,
    options: ScanOptions | None = None,
    *,
    observer: Observer = unwatched,
    registry: Registry | None = None,
    keeping: Keeping | None = None,
) -> ScanReport:
    """Look for backdoors in a model.

    Args:
        model: A file or folder, or a network in memory, which is copied and left as it is.
        images: Clean labelled images; without any, images are made from the model.
        read: What is known about the model.
        options: How to scan.
        observer: Told what is being done, and which part of it is done, 0 to 1.
        registry: Where methods are found; those installed, unless given.
        keeping: Where finished reports and the journal of an unfinished scan of a file are kept; nowhere if ``None``.

    Raises:
        BackdoorscanError: The model, the images or an option cannot be used. A detector that fails does not raise: the
            report says so and is incomplete.
    """
    if isinstance(model, nn.Module) and keeping is not None:
        raise UsageError(
            "Scans of networks in memory are not kept.",
            why="Their answer also follows from code, which has no digest.",
            hint="Leave keeping out, or scan a file.",
        )
    given, registry = _given(model, registry)
    trusted = None if images is None else _taken(images)
    return scanning.scan(given, trusted, read, options, observer=observer, registry=registry, keeping=keeping)


def repair(
    model: Model,
    images: Images,
    poisoned: Images | None = None,
    read: ReadOptions | None = None,
    options: RepairOptions | None = None,
    *,
    findings: Sequence[Finding] | None = None,
    test: Images | None = None,
    observer: Observer = unwatched,
    registry: Registry | None = None,
) -> RepairReport:
    """Repair a model, and write what came of it into a folder.

    Args:
        model: A file or folder, or a network in memory; it is never changed. Of a network in memory the repaired
            weights are written as a state dict for the same class.
        images: Clean labelled images.
        poisoned: Images with the trigger on them, to measure with and, if ``options`` say so, to learn from.
        read: What is known about the model.
        options: How to repair.
        findings: What a scan found; if ``None``, the model is scanned first for methods that need reversed triggers.
        test: Clean images to measure on; else a part of ``images`` is kept from the method.
        observer: Told what is being done, and which part of it is done, 0 to 1.
        registry: Where methods are found; those installed, unless given.

    Raises:
        BackdoorscanError: Something cannot be used, or the results cannot be written. Nothing is left half-written.
    """
    given, registry = _given(model, registry)
    return repairing.repair(
        given,
        _taken(images),
        None if poisoned is None else _taken(poisoned),
        read,
        options,
        findings=findings,
        test=None if test is None else _taken(test),
        observer=observer,
        registry=registry,
    )


def evaluate(
    model: Model,
    images: Images,
    poisoned: Images | None = None,
    read: ReadOptions | None = None,
    *,
    target: int | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Measure a model: a network, a repaired one, or the file of a GoodNet.

    Args:
        model: A file or folder, or a network in memory, which is copied and left as it is.
        images: Clean labelled images.
        poisoned: Images with the trigger on them. Their labels are the target labels; or the true ones if ``target`` is
            given and they are not all equal to it, and then images of the target class do not count.
        read: What is known about the model.
        target: The target label.
        seed: Chooses the images that decide how the network was fed.

    Raises:
        BackdoorscanError: The model or the images cannot be used.
    """
    given, registry = _given(model, None)
    stamped = None if poisoned is None else _taken(poisoned)
    return evaluating.evaluate(given, _taken(images), stamped, read, target=target, seed=seed, registry=registry)


def load_classifier(
    model: Model, images: Images | None = None, read: ReadOptions | None = None, *, seed: int = 0
) -> Classifier:
    """A model as one function from images (N, C, H, W) in [0, 1] to logits (N, K).

    Args:
        model: A file or folder, or a network in memory, which is copied and left as it is.
        images: Clean labelled images: they give the size and decide how the network was fed. Without any the model or
            ``read`` must tell the size, and the pinned convention, or 0..1, is taken on trust.
        read: What is known about the model.
        seed: Chooses the images that decide.

    Raises:
        BackdoorscanError: The model or the images cannot be used.
    """
    given, registry = _given(model, None)
    trusted = None if images is None else load_images(images)
    return load_model(given, trusted, read, seed=seed, registry=registry).classifier


def load_images(source: Images, *, limit: int | None = None, seed: int = 0) -> LabelledImages:
    """Labelled images from a file, a folder, or arrays.

    Args:
        source: What ``--valid`` takes; or pixels, shape (N, C, H, W), (N, H, W, C) or (N, H, W) with values 0..255 or
            0..1, and labels, shape (N,) or one-hot rows (N, K), as a pair of NumPy arrays or tensors.
        limit: The most images to return, as evenly over the classes as they allow; ``None`` for all.
        seed: The sample's seed.

    Raises:
        ImagesError: They cannot be read, or are no labelled images.
    """
    taken = _taken(source)
    if not isinstance(taken, LabelledImages):
        return files.load_images(taken, limit=limit, seed=seed)
    return taken if limit is None else taken.sample(limit, seed)


def render(report: Report, format: str = "table", *, width: int = 100, color: bool = False) -> str:
    """A report in one of the formats that ``-f`` takes.

    Args:
        report: Of a scan, a repair or an evaluation.
        format: Name of the format.
        width: Columns, for formats that people read in a terminal.
        color: Whether escape codes for colour are welcome.

    Raises:
        UsageError: There is no such format, or it has no place for this kind of report.
        PluginError: It is broken.
    """
    component = installed().find("reporter", format).component
    if not (isinstance(component, type) and issubclass(component, Reporter)):
        raise PluginError(f"The format {format} cannot be used.")
    if isinstance(report, tuple(component.refuses)):
        raise refuse(type(report), format)
    return component().render(report, Terminal(width=width, color=color))


def _given(model: Model, registry: Registry | None) -> tuple[str | Path | Artifact, Registry]:
    """What the verbs take in the place of a model, and plugins that read it."""
    registry = registry or installed()
    if isinstance(model, nn.Module):
        return ModuleArtifact.of(model), reading_modules(registry)
    return model, registry


def _taken(images: Images) -> LabelledImages | str | Path:
    """Arrays as images; files are read when their turn comes."""
    if not isinstance(images, tuple):
        return images
    pixels, labels = (part.numpy(force=True) if isinstance(part, Tensor) else np.asarray(part) for part in images)
    return LabelledImages(to_pixels(pixels, "arrays"), to_labels(labels, "arrays"), source="arrays")
