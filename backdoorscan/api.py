"""The verbs for Python: on files as the command line has them, and on networks and arrays in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import backdoorscan
from backdoorscan import evaluating, repairing, scanning
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier
from backdoorscan.costing import Meter, versions
from backdoorscan.engine.keeping import Keeping
from backdoorscan.errors import ArtifactError, OutputError, PluginError, UnsupportedModelError, UsageError
from backdoorscan.files import whole_file
from backdoorscan.findings import Finding
from backdoorscan.formats import images as files
from backdoorscan.formats.images.arrays import to_labels, to_pixels
from backdoorscan.formats.loading import LoadedModel, ReadOptions, load_model
from backdoorscan.formats.weights import tracing
from backdoorscan.images import LabelledImages
from backdoorscan.measured import EvaluationReport, RepairReport
from backdoorscan.plugin.loader import LoadedNetwork, Loader
from backdoorscan.plugin.reporter import Reporter, Terminal
from backdoorscan.registry import Plugin, Registry, installed
from backdoorscan.repairing import RepairOptions
from backdoorscan.report import Report, ScanReport
from backdoorscan.reports.taxonomy import refuse
from backdoorscan.scanning import Observer, ScanOptions

Array: TypeAlias = npt.NDArray[Any] | Tensor

Model: TypeAlias = str | Path | nn.Module
"""A model file or folder, or a network in memory."""

Images: TypeAlias = LabelledImages | str | Path | tuple[Array, Array]
"""Labelled images, where to read them, or pixels and labels as arrays or tensors: see ``load_images``."""


def _unseen(_stage: str, _fraction: float) -> None:
    """Nobody looks."""


def scan(
    model: Model,
    images: Images | None = None,
    read: ReadOptions | None = None,
    options: ScanOptions | None = None,
    *,
    observer: Observer = _unseen,
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
    if not isinstance(model, nn.Module):
        trusted = None if images is None else _taken(images)
        return scanning.scan(model, trusted, read, options, observer=observer, registry=registry, keeping=keeping)
    if keeping is not None:
        raise UsageError(
            "Scans of networks in memory are not kept.",
            why="Their answer also follows from code, which has no digest.",
            hint="Leave keeping out, or scan a file.",
        )
    options, registry, meter = options or ScanOptions(), registry or installed(), Meter()
    plan = scanning.plan_detectors(options, registry)
    images = None if images is None else load_images(images)
    loaded = _loaded(model, images, read, options.seed, registry)
    run = scanning.scan_model(loaded, images, plan, options, meter=meter, observer=observer, registry=registry)
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


def repair(
    model: Model,
    images: Images,
    poisoned: Images | None = None,
    read: ReadOptions | None = None,
    options: RepairOptions | None = None,
    *,
    findings: Sequence[Finding] | None = None,
    test: Images | None = None,
    observer: Observer = _unseen,
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
    options, registry = options or RepairOptions(), registry or installed()
    given: Any = model
    if isinstance(model, nn.Module):
        # ``repairing`` hands what it is given to ``load_model``, which takes what was read as well.
        given, registry = ModuleArtifact.of(model), _reading_modules(registry)
        options = replace(options, output=options.output or Path(f"{given.path.stem}-repaired"))
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
    if not isinstance(model, nn.Module):
        stamped = None if poisoned is None else _taken(poisoned)
        return evaluating.evaluate(model, _taken(images), stamped, read, target=target, seed=seed)
    meter, clean = Meter(), load_images(images)
    attacked = None if poisoned is None else load_images(poisoned)
    loaded = _loaded(model, clean, read, seed, installed())
    evaluating.check_images(clean, attacked, target, loaded.classifier.num_classes)
    scores = evaluating.measure(loaded.classifier, clean, attacked, target=target)
    return EvaluationReport(
        seed=seed,
        versions=versions(),
        cost=meter.read(),
        model={"kind": "classifier", **loaded.facts},
        images=clean.described(),
        poisoned=attacked.described() if attacked else None,
        target_label=target,
        scores=scores,
    )


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
    return _loaded(model, None if images is None else load_images(images), read, seed, installed()).classifier


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


@dataclass(frozen=True)
class ModuleArtifact(Artifact):
    """A network in memory in the place of a file: a copy of it, and the digest of its state dict.

    Reports name it after its class, as its weights would be saved: ``Net.pt``.
    """

    module: nn.Module = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleArtifact:
        """A copy of ``module``, so that what is hashed stays what is examined.

        Raises:
            UsageError: Its layers are not built yet, or it cannot be copied.
        """
        name = type(module).__name__
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            raise UsageError(
                f"{name} has lazy layers, whose sizes are still open.", hint="Run it once on an input of its size."
            )
        try:
            twin = copy.deepcopy(module)
        except Exception as error:  # whatever a stranger's class does when it is copied
            raise UsageError(
                f"{name} cannot be copied.",
                why=f"{type(error).__name__}: {error}",
                hint="Save its weights, and scan the file with --arch.",
            ) from error
        return cls(Path(f"{name}.pt"), b"", _digest(twin), module=twin)


class ModuleLoader(Loader):
    """The format of networks in memory; the repaired ones are written as state dicts."""

    id = "torch-module"
    summary = "PyTorch networks in memory"
    suffix = ".pt"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it is no file."""
        return isinstance(artifact, ModuleArtifact)

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """The network as a graph, where it can be traced."""
        if arch is not None:
            raise UsageError(f"{artifact.path.stem} is a network; arch is for files of weights.", hint="Leave it out.")
        module = _module(artifact).cpu().float().eval()
        try:
            traced, compared = tracing.trace(module)
        except tracing.Untraceable as error:
            return LoadedNetwork(module, None, "NCHW", details={"traced": False, "trace_error": str(error)})
        except UnsupportedModelError as error:
            error.hint = "Wrap it in a module whose forward() returns the scores (N, classes) and nothing else."
            raise
        details = {"traced": True, "compared": compared}
        return LoadedNetwork(traced, tracing.input_shape(traced), "NCHW", tracing.num_classes(traced), details)

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Save the state dict of the network with some tensors changed; all in their own types."""
        module = _module(artifact)
        try:
            # Loaded, not put into the dictionary: a tied weight then changes under each of its names.
            unknown = module.load_state_dict(weights, strict=False).unexpected_keys
        except RuntimeError as error:
            raise ArtifactError(f"{artifact.path.stem} cannot take the repaired weights.", why=str(error)) from error
        if unknown:
            raise ArtifactError(f"{artifact.path.stem} has no tensor '{unknown[0]}'.")
        try:
            with whole_file(path) as place:
                torch.save(module.state_dict(), place)
        except OSError as error:
            raise OutputError(f"Cannot write {path}.", why=str(error)) from error


def _module(artifact: Artifact) -> nn.Module:
    """A copy of the network that may be changed."""
    if not isinstance(artifact, ModuleArtifact):
        raise ArtifactError(f"{artifact.path} is no network in memory.")
    return copy.deepcopy(artifact.module)


def _digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):  # a layer's extra state can be anything
            digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reading_modules(registry: Registry) -> Registry:
    """The same plugins, and the format of networks in memory."""
    own = Plugin("loader", ModuleLoader.id, "backdoorscan", backdoorscan.__version__, ModuleLoader)
    return Registry([own, *registry.plugins], registry.manager)


def _loaded(
    model: Model, images: LabelledImages | None, read: ReadOptions | None, seed: int, registry: Registry
) -> LoadedModel:
    given = ModuleArtifact.of(model) if isinstance(model, nn.Module) else model
    return load_model(given, images, read, seed=seed, registry=_reading_modules(registry))


def _taken(images: Images) -> LabelledImages | str | Path:
    """Arrays as images; files are read when their turn comes."""
    if not isinstance(images, tuple):
        return images
    pixels, labels = (part.numpy(force=True) if isinstance(part, Tensor) else np.asarray(part) for part in images)
    return LabelledImages(to_pixels(pixels, "arrays"), to_labels(labels, "arrays"), source="arrays")
