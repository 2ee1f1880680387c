"""A model file in another format: written, read back, and compared before it may stay."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.costing import Meter, versions
from backdoorscan.errors import (
    BackdoorscanError,
    ImagesError,
    OutputError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from backdoorscan.files import whole_file
from backdoorscan.formats.feeding import Feeding, as_json, fed
from backdoorscan.formats.loading import ReadOptions, load_model, read_artifact
from backdoorscan.formats.onnx.export import export as export_onnx
from backdoorscan.formats.onnx.export import run_with_onnxruntime
from backdoorscan.formats.opening import OpenedNetwork, open_network
from backdoorscan.formats.pt2 import plain
from backdoorscan.formats.pt2.export import export as export_pt2
from backdoorscan.formats.pt2.parse import parse
from backdoorscan.images import LabelledImages
from backdoorscan.registry import Registry, installed
from backdoorscan.report import Report


def _as_weights(network: nn.Module, example: Tensor) -> list[bytes]:
    program = parse(export_pt2(network, example), "the network")
    graph, keys = plain.write(program)
    tensors = {key: np.array(program.tensors[key].array, order="C") for key in keys}
    return [safetensors.numpy.save(tensors), graph]


FORMATS: Mapping[str, Callable[[nn.Module, Tensor], list[bytes]]] = {
    "onnx": lambda network, example: [export_onnx(network, example)],
    "pt2": lambda network, example: [export_pt2(network, example)],
    "safetensors": _as_weights,
}
"""What can be written, by the suffix of the file: its content, and that of the graph for safetensors."""

TOLERANCE = 1e-4
"""The largest difference of two scores that rounding explains, as a part of the largest score, or of one."""

_INPUTS = 4


@dataclass(frozen=True, kw_only=True)
class Conversion(Report):
    """The report of a conversion.

    Attributes:
        model: The file that was read: ``path``, ``sha256``, ``format``.
        format: Of the new file.
        files: That file, and the graph beside it in safetensors: ``path``, ``sha256``, ``bytes``.
        input_shape: Of one input as the new file takes it, without the number of inputs.
        layout: The order of its axes.
        pixels: The convention that is part of the new file, which takes images in [0, 1]; ``None`` where it takes
            what the file that was read does.
        num_classes: Scores per input.
        difference: The largest between the scores of the two networks.
        tolerance: The largest that would have passed.
        compared: What ran the new file.
    """

    schema: ClassVar[str] = "backdoorscan.conversion/1"

    model: Mapping[str, Any]
    format: str
    files: tuple[Mapping[str, Any], ...]
    input_shape: tuple[int, ...]
    layout: str
    pixels: InputConvention | None
    num_classes: int
    difference: float
    tolerance: float
    compared: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; see docs/formats.md."""
        return {
            "schema": self.schema,
            "model": dict(self.model),
            "format": self.format,
            "files": [dict(file) for file in self.files],
            "input_shape": list(self.input_shape),
            "layout": self.layout,
            "pixels": as_json(self.pixels),
            "num_classes": self.num_classes,
            "difference": self.difference,
            "tolerance": self.tolerance,
            "compared": list(self.compared),
            "seed": self.seed,
            "versions": dict(self.versions),
            "cost": asdict(self.cost),
        }


def target_format(path: Path, wanted: str | None) -> str:
    """The format to write: the one that is named, or else that of the file's suffix.

    Raises:
        UsageError: Neither tells one that can be written.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            raise UnknownNameError("format to convert to", wanted, FORMATS)
        return wanted
    name = path.suffix.removeprefix(".").lower()
    if name not in FORMATS:
        raise UsageError(
            f"The name {path} does not tell a format that can be written.",
            hint=f"End it in {' or '.join(f'.{known}' for known in FORMATS)}, or pass --to.",
        )
    return name


def targets(source: Path, path: Path, to: str | None, options: ReadOptions, force: bool) -> list[Path]:
    """The files to write; complains before any work about those that could not, or must not, be written after it.

    Raises:
        UsageError: As ``target_format``.
        OutputError: One is the model or its architecture, lies in the model, exists and may not be replaced, or has
            no folder.
    """
    paths = [path, path.with_suffix(".json")] if target_format(path, to) == "safetensors" else [path]
    kept = [known for known in (source, Path((options.arch or "").partition(":")[0])) if known.is_file()]
    if len(set(paths)) < len(paths):
        raise OutputError(f"{path} is the name of the graph.", hint="End the name of the weights in .safetensors.")
    for file in paths:
        if file.is_dir():
            raise OutputError(f"{file} is a folder.", hint="Give the name of a file.")
        if not file.absolute().parent.is_dir():
            raise OutputError(f"Cannot write {file}: there is no folder {file.absolute().parent}.")
        if source.is_dir() and source.resolve() in file.resolve().parents:
            raise OutputError(f"{file} lies in the model {source}.", hint="Write it elsewhere.")
        if file.exists() and any(file.samefile(known) for known in kept):
            raise OutputError(f"{file} is the model itself.", hint="Choose another name.")
        if file.exists() and not force:
            raise OutputError(f"{file} exists already.", hint="Choose another name, or pass --force to replace it.")
    return paths


def convert(
    source: str | Path,
    path: str | Path,
    options: ReadOptions | None = None,
    *,
    to: str | None = None,
    pixels: bool = False,
    images: LabelledImages | None = None,
    force: bool = False,
    seed: int = 0,
    registry: Registry | None = None,
) -> Conversion:
    """Write a model in another format, with an open batch and its final activation.

    What is written is read back, and must compute on random inputs what the network does; else nothing is written.

    Args:
        source: The model file; it is never changed.
        path: The new file.
        options: What the user says about the model.
        to: One of ``FORMATS``; that of the new file's suffix unless given.
        pixels: Whether the new file takes images N×C×H×W in [0, 1], by the convention that ``options`` pin, or
            that is found on ``images``, or that the file describes. Else it takes what the file that was read does.
        images: Clean labelled images.
        force: Whether an existing file may be replaced.
        seed: Of the random inputs, and of the sample of the images.
        registry: Where loaders are found.

    Raises:
        UsageError: Options that cannot be, or nothing that tells how the network is fed.
        ArtifactError: The model cannot be read, or not be written in this format.
        ImagesError: The size of the inputs is not known, or does not fit.
        OutputError: The new file cannot be written.
    """
    source, path, options, registry = Path(source), Path(path), options or ReadOptions(), registry or installed()
    meter = Meter()
    name, paths = target_format(path, to), targets(source, path, to, options, force)
    artifact = read_artifact(source, registry)
    parts = {(source.parent / part).resolve() for part in artifact.parts}
    if not parts.isdisjoint(file.resolve() for file in paths):
        raise OutputError(f"{path} belongs to the model {source}.", hint="Choose another name.")
    convention = _convention(artifact, images, options, seed, registry) if pixels else None
    if images is not None and options.input_shape is None:
        options = replace(options, input_shape=images.shape)
    opened = open_network(artifact, options, registry)
    if pixels and convention is None:
        convention = _described(opened)
    shape = opened.file_shape if convention is None else _image_shape(opened, options)
    feeding = _feeding(opened, convention)
    network = opened.network if feeding is None else fed(opened.network, feeding)

    inputs = _random_inputs(shape, convention, seed)
    expected = _scores(opened, network, inputs)
    contents = dict(zip(paths, FORMATS[name](network, inputs), strict=True))
    runs = {"backdoorscan": _read_back(contents, registry)}
    if name == "onnx":
        runs["onnxruntime"] = run_with_onnxruntime(contents[path])
    tolerance = TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = max(_difference(path, run, inputs, expected) for run in runs.values())
    if not difference <= tolerance:
        raise UnsupportedModelError(
            f"{path} was not written: it would not compute what {source} does.",
            why=f"On random inputs the scores differ by {difference:.3g}, more than {tolerance:.3g}.",
            hint="Try another format, and please report this with the model's architecture.",
        )
    _write(contents)
    return Conversion(
        seed=seed,
        versions=versions(),
        cost=meter.read(),
        model={"path": str(source), "sha256": artifact.sha256, "format": opened.loader.id},
        format=name,
        files=tuple(
            {"path": str(file), "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for file, data in contents.items()
        ),
        input_shape=shape,
        layout="NHWC" if convention is None and opened.channels_last else "NCHW",
        pixels=convention,
        num_classes=expected.shape[1],
        difference=difference,
        tolerance=tolerance,
        compared=tuple(runs),
    )


def _write(contents: Mapping[Path, bytes]) -> None:
    """Write all files or none."""
    try:
        with ExitStack() as stack:
            for file, data in contents.items():
                stack.enter_context(whole_file(file)).write_bytes(data)
    except OSError as error:
        names = " and ".join(map(str, contents))
        raise OutputError(
            f"Cannot write {names}.", why=str(error), hint="Check the folder and the free space."
        ) from error


def _convention(
    artifact: Artifact, images: LabelledImages | None, options: ReadOptions, seed: int, registry: Registry
) -> InputConvention | None:
    """How the network is fed, as far as the user or clean images tell."""
    if images is None:
        return options.pinned
    return load_model(artifact, images, options, seed=seed, registry=registry).classifier.convention


def _described(opened: OpenedNetwork) -> InputConvention:
    """How the file says that it is fed.

    Raises:
        UsageError: It does not say.
    """
    if opened.loaded.convention is None:
        raise UsageError(
            f"Nobody says how {opened.artifact.path} is fed, so that cannot be made part of it.",
            hint="Pass --input-range 0,255 (or --mean and --std), or --valid: a few clean images tell it.",
        )
    return opened.loaded.convention


def _image_shape(opened: OpenedNetwork, options: ReadOptions) -> tuple[int, int, int]:
    """(C, H, W) of the images that the network is made for.

    Raises:
        ImagesError: Nothing tells it.
    """
    if options.input_shape is not None:
        return options.input_shape
    opened.file_shape  # noqa: B018  # complains where nothing is known
    shape = opened.shape or ()
    if len(shape) == 1:
        raise ImagesError(
            f"{opened.artifact.path} takes rows of {shape[0]} numbers, and nothing says which images they are made of.",
            hint="Pass --input-shape 1,28,28 (channels, height, width).",
        )
    return (1, *shape) if len(shape) == 2 else shape  # type: ignore[return-value]


def _feeding(opened: OpenedNetwork, convention: InputConvention | None) -> Feeding | None:
    """What brings the new file's inputs to the network; ``None`` where they are the same."""
    shape = opened.shape or ()
    if convention is None:
        return Feeding(None, (0, 3, 1, 2)) if opened.channels_last else None
    flat = len(shape) < 3
    return Feeding(convention, (0, 2, 3, 1) if flat and opened.layout == "NHWC" else None, shape if flat else None)


def _random_inputs(shape: tuple[int, ...], convention: InputConvention | None, seed: int) -> Tensor:
    inputs = torch.rand(_INPUTS, *shape, generator=torch.Generator().manual_seed(seed))
    if convention is None:
        # Some networks are fed 0..1, others 0..255: with both, differences drown in neither.
        inputs[_INPUTS // 2 :] *= 255
    return inputs


def _scores(opened: OpenedNetwork, network: nn.Module, inputs: Tensor) -> Tensor:
    """What the network says of the inputs."""
    path = opened.artifact.path
    try:
        with torch.no_grad():
            scores = network.eval()(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ImagesError(
            f"Inputs of {'×'.join(map(str, inputs.shape[1:]))} cannot be fed to {path}.",
            why=str(error).partition("\n")[0],
            hint="Check --input-shape and --layout.",
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (len(inputs), scores[0].numel()):
        raise UnsupportedModelError(f"{path} does not return one row of scores per image.")
    return scores


def _read_back(contents: Mapping[Path, bytes], registry: Registry) -> Callable[[Tensor], Tensor]:
    """The new file as our own reader understands it."""
    (path, data), *others = contents.items()
    try:
        with TemporaryDirectory() as folder:
            graph = Path(folder) / "graph.json"
            for _, content in others:
                graph.write_bytes(content)
            arch = ReadOptions(arch=str(graph) if others else None)
            opened = open_network(Artifact(path, data, ""), arch, registry)
    except BackdoorscanError as error:
        raise UnsupportedModelError(
            f"{path} was not written: it could not be read back.", why=str(error).replace("\n", " ")
        ) from error
    last = opened.channels_last
    return lambda inputs: opened.network(inputs.permute(0, 3, 1, 2) if last else inputs)


def _difference(path: Path, run: Callable[[Tensor], Tensor], inputs: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        found = run(inputs)
    if found.shape != expected.shape:
        raise UnsupportedModelError(
            f"{path} was not written: it would not compute what the network does.",
            why=f"It gives scores of shape {tuple(found.shape)}, not {tuple(expected.shape)}.",
        )
    return float((found - expected).abs().max())
