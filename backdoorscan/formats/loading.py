"""From a path to a classifier: read the file, take the final activation off, find out how it was fed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.classifier import Classifier, InputConvention, to_tensor
from backdoorscan.errors import (
    ArtifactError,
    BackdoorscanError,
    ConventionError,
    ImagesError,
    UnsupportedModelError,
    UsageError,
)
from backdoorscan.formats import convention as conventions
from backdoorscan.formats.devices import find_device
from backdoorscan.formats.trusted.converting import OFFER, Known, converter_of
from backdoorscan.formats.trusted.loader import Converted
from backdoorscan.formats.weights.loader import WeightsLoader
from backdoorscan.images import LabelledImages
from backdoorscan.plugin.loader import LoadedNetwork, Loader
from backdoorscan.registry import Registry, installed


@dataclass(frozen=True)
class ReadOptions:
    """What the user says about a model file.

    Attributes:
        arch: ``--arch``: where the architecture of a weights-only file is.
        input_range: ``--input-range``: what black and white become.
        mean: ``--mean``: per channel, after scaling.
        std: ``--std``: per channel, after scaling.
        layout: ``--layout``: NCHW or NHWC.
        input_shape: ``--input-shape``: (C, H, W) of an image, where there are no images to tell and the file does not.
        trust: ``--trust``: whether what cannot be read as data is converted in a sandbox, where it runs code.
        device: ``--device``: where the network computes.
    """

    arch: str | None = None
    input_range: tuple[float, float] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: str | None = None
    input_shape: tuple[int, int, int] | None = None
    trust: bool = False
    device: str = "cpu"

    @property
    def pinned(self) -> InputConvention | None:
        """The convention the user pinned, or ``None``.

        Raises:
            UsageError: Values that cannot be.
        """
        if self.input_range is None and not self.mean and not self.std:
            return None
        low, high = self.input_range or (0.0, 1.0)
        if not low < high:
            raise UsageError(f"--input-range {low:g},{high:g} is empty.", hint="Give black first: 0,255.")
        if any(not value > 0 for value in self.std):
            raise UsageError("--std must be positive.")
        return InputConvention(low, high, self.mean, self.std)


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with the file it came from.

    Attributes:
        artifact: The file.
        loader: Its format.
        classifier: The network.
        options: What the user said about the file.
    """

    artifact: Artifact
    loader: Loader
    classifier: Classifier
    options: ReadOptions

    @property
    def suffix(self) -> str:
        """What the name of a repaired copy ends in, with the dot."""
        return self.loader.written if isinstance(self.loader, Converted) else self.artifact.path.suffix

    @property
    def facts(self) -> dict[str, Any]:
        """The model's part of a report."""
        classifier = self.classifier
        convention = classifier.convention
        return {
            "path": str(self.artifact.path),
            "sha256": self.artifact.sha256,
            "format": self.loader.id,
            "input_shape": list(classifier.input_shape),
            "num_classes": classifier.num_classes,
            "input_range": [convention.low, convention.high],
            "mean": list(convention.mean),
            "std": list(convention.std),
            "layout": convention.layout,
            "parameters": sum(p.numel() for p in classifier.parameters()),
            **classifier.details,
        }


def read_artifact(path: str | Path, registry: Registry | None = None) -> Artifact:
    """Read a model file with the files beside it that belong to it, or a folder that is a model.

    Args:
        path: The file or folder.
        registry: Where loaders are found.

    Raises:
        UnsafeModelError: The file refers to others outside its folder, or there are links.
        ArtifactError: Something is missing or unreadable.
    """
    artifact = Artifact.read(path)
    if not artifact.data:
        return artifact
    loader = next((loader for loader in _loaders(registry or installed()) if loader.accepts(artifact)), None)
    return artifact.with_companions(loader.companions(artifact) if loader else ())


def _loaders(registry: Registry) -> list[Loader]:
    components = [plugin.component() for plugin in registry.of_kind("loader") if plugin.component]
    return [loader for loader in components if isinstance(loader, Loader)]


def find_loader(artifact: Artifact, registry: Registry) -> Loader:
    """The loader that knows the file's format by its content.

    Raises:
        ArtifactError: None does.
    """
    loaders = _loaders(registry)
    for loader in loaders:
        if loader.accepts(artifact):
            return loader
    broken = [plugin.id for plugin in registry.plugins if plugin.error]
    plugins = f"Some plugins are broken ({', '.join(broken)}): see `backdoorscan plugins`." if broken else ""
    if not artifact.data:
        raise ArtifactError(
            f"{artifact.path} is a folder, and no model of a known format.",
            hint=plugins or "Give a model file, or a Hugging Face folder with config.json and model.safetensors.",
        )
    raise ArtifactError(
        f"{artifact.path} is not a model file of a known format.",
        why=f"Its content is none of: {', '.join(loader.id for loader in loaders)}.",
        hint=plugins or "Check that the download is complete; the name's ending does not matter.",
    )


def load_model(
    path: str | Path | Artifact,
    images: LabelledImages | None,
    options: ReadOptions | None = None,
    *,
    seed: int = 0,
    registry: Registry | None = None,
) -> LoadedModel:
    """Read a model file.

    Args:
        path: The file, or what was read of it.
        images: Clean labelled images: they give the size and decide how the network was fed. Without any the file or
            ``options`` must tell the size, and the pinned convention, or 0..1, is taken on trust.
        options: What the user says about the file.
        seed: Chooses the images that decide.
        registry: Where loaders are found.

    Raises:
        ArtifactError: The file cannot be read.
        ImagesError: The images do not fit the network.
        ConventionError: No way to feed the images makes the network better than guessing.
        UsageError: An option does not fit, or the device is missing.
    """
    options = options or ReadOptions()
    pinned = options.pinned
    registry = registry or installed()
    artifact = path if isinstance(path, Artifact) else read_artifact(path, registry)
    loader, loaded = read_network(artifact, images, options, registry)
    network = loaded.network
    activation = graph.strip_final_activation(network) if isinstance(network, fx.GraphModule) else None
    if images is not None and options.input_shape is not None:
        raise UsageError("--input-shape is of use only without images.", hint="Leave it out.")
    given, images = images, images or _stand_in(artifact, loaded, options.input_shape or loaded.usual_shape)
    layout = _fit(artifact, loaded, images, options.layout)
    native_shape = _native_shape(loaded, images)
    channels = images.shape[0]
    for name, values in (("--mean", options.mean), ("--std", options.std)):
        if len(values) not in (0, 1, channels):
            raise UsageError(f"{name} has {len(values)} values.", why=f"The images have {channels} channels.")

    classifier = Classifier(
        network.to(find_device(options.device)),
        input_shape=images.shape,
        native_shape=native_shape,
        num_classes=0,
        convention=InputConvention(layout=layout),
    )
    outputs = _outputs(artifact, classifier, images)
    classifier.binary = outputs == 1
    if outputs == 1 and activation != "sigmoid":
        raise UnsupportedModelError(
            f"{artifact.path} returns one number per image, which is no class score.",
            hint="backdoorscan reads classifiers: one score per class, or one sigmoid for two classes.",
        )
    classifier.num_classes = max(outputs, 2)
    images.check_fits(classifier.num_classes)

    def logits(tried: InputConvention, pixels: Tensor) -> Tensor:
        classifier.convention = replace(tried, layout=layout)
        return classifier.forward(pixels)

    described = loaded.convention
    if described is not None and len(described.mean) not in (1, channels):
        described = None  # of images in another number of channels
    convention = pinned or described or InputConvention()
    trials: list[conventions.Trial] = []
    if given is not None:
        tried = conventions.candidates(channels, pinned, described)
        try:
            chosen, trials = conventions.find(logits, given, tried, classifier.num_classes, seed, described)
        except ConventionError as error:
            error.what = f"{artifact.path}: {error.what}"
            raise
        convention = chosen.convention
    classifier.convention = replace(convention, layout=layout)
    classifier.details = {
        **loaded.details,
        "final_activation": activation,
        "input_range_found": pinned is None and given is not None,
        "input_ranges_tried": {conventions.describe(t.convention): round(t.accuracy, 4) for t in trials},
    }
    if given is None and pinned is None and described is None:
        classifier.details["input_range_assumed"] = True
    if options.device != "cpu":
        classifier.details["device"] = options.device
    return LoadedModel(artifact, loader, classifier, options)


def read_network(
    artifact: Artifact, images: LabelledImages | None, options: ReadOptions, registry: Registry
) -> tuple[Loader, LoadedNetwork]:
    """The file's network, and what read it: as data, or where the user trusts the file, what it was converted to."""
    loader = find_loader(artifact, registry)
    try:
        return loader, loader.load(artifact, options.arch)
    except ArtifactError as error:
        _name(artifact, error)
        converter = converter_of(artifact, error)
        if converter is None:
            raise
        if not options.trust:
            error.hint = f"{error.hint} {OFFER}".lstrip()
            raise
    try:
        shape = options.input_shape if images is None else images.shape
        made = converter(artifact, Known(options.arch, shape, options.layout))
        reader = find_loader(made, registry)
        converted = Converted(reader, made)
        loaded = converted.load(artifact, options.arch if isinstance(reader, WeightsLoader) else None)
    except BackdoorscanError as error:
        _name(artifact, error)
        raise
    return converted, replace(loaded, details={**loaded.details, **converter.facts(), "converted_to": reader.id})


def _name(artifact: Artifact, error: BackdoorscanError) -> None:
    if str(artifact.path) not in error.what:
        error.what = f"{artifact.path}: {error.what}"


def _stand_in(artifact: Artifact, loaded: LoadedNetwork, wanted: tuple[int, int, int] | None) -> LabelledImages:
    """Two grey images of the size that the network takes, in place of the user's.

    Raises:
        ImagesError: Neither the file nor the user tells the size.
    """
    shape = loaded.input_shape or ()
    known = [size for size in shape if size is not None]
    if wanted is None and len(known) == len(shape) > 0:
        if len(known) == 3:
            wanted = known[0], known[1], known[2]
        elif len(known) == 2:
            wanted = 1, known[0], known[1]
        else:
            # Rows of pixels of square images, grey or in colour.
            squares = [(c, math.isqrt(known[0] // c)) for c in (1, 3) if math.isqrt(known[0] // c) ** 2 * c == known[0]]
            wanted = next(((c, side, side) for c, side in squares), None)
    if wanted is None:
        raise ImagesError(
            f"{artifact.path} does not say how large its images are.",
            hint="Pass --input-shape 3,32,32 (channels, height, width), or --valid: one clean image tells it.",
        )
    return LabelledImages(np.full((2, *wanted), 128, np.uint8), np.zeros(2, np.int64), "grey images")


def _fit(artifact: Artifact, loaded: LoadedNetwork, images: LabelledImages, wanted: str | None) -> str:
    """The file's axis order; makes the network take channels first where only the last order fits."""
    if loaded.input_shape is not None:
        if wanted is not None and wanted != loaded.layout:
            raise UsageError(
                f"--layout {wanted} does not fit {artifact.path}.", why=f"The file itself says {loaded.layout}."
            )
        _check_size(artifact, loaded.input_shape, images)
        return loaded.layout
    pixels = to_tensor(images.pixels[:2])
    failures: list[str] = []
    for layout in (wanted,) if wanted else ("NCHW", "NHWC"):
        if layout == "NHWC" and not isinstance(loaded.network, fx.GraphModule):
            continue
        inputs = pixels if layout == "NCHW" else pixels.permute(0, 2, 3, 1)
        try:
            with torch.no_grad():
                loaded.network(inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            failures.append(f"{layout}: {str(error).partition(chr(10))[0]}")
            continue
        if layout == "NHWC" and isinstance(loaded.network, fx.GraphModule):
            graph.accept_channels_first(loaded.network)
        return layout
    raise ImagesError(
        f"{images.source}: images of shape {images.shape} cannot be fed to {artifact.path}.",
        why="; ".join(failures),
        hint="Check that these are the images this model was trained for.",
    )


def _check_size(artifact: Artifact, shape: tuple[int | None, ...], images: LabelledImages) -> None:
    channels, height, width = images.shape
    if len(shape) == 3:
        fits = all(size in (None, own) for size, own in zip(shape, images.shape, strict=True))
    elif len(shape) == 2:
        fits = channels == 1 and shape[0] in (None, height) and shape[1] in (None, width)
    else:
        fits = len(shape) == 1 and shape[0] in (None, channels * height * width)
    if not fits:
        sizes = "×".join("any" if size is None else str(size) for size in shape)
        raise ImagesError(
            f"{images.source}: images of {channels}×{height}×{width} do not fit {artifact.path}.",
            why=f"The model takes {sizes} (channels first).",
            hint="Give images of the size and number of channels that the model was trained on.",
        )


def _native_shape(loaded: LoadedNetwork, images: LabelledImages) -> tuple[int, ...]:
    channels, height, width = images.shape
    rank = 3 if loaded.input_shape is None else len(loaded.input_shape)
    return {3: images.shape, 2: (height, width)}.get(rank, (channels * height * width,))


def _outputs(artifact: Artifact, classifier: Classifier, images: LabelledImages) -> int:
    """How many scores the network gives, by running it once."""
    try:
        with torch.no_grad():
            scores = classifier.network(classifier.native(to_tensor(images.pixels[:2])))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ImagesError(
            f"{images.source}: images of shape {images.shape} cannot be fed to {artifact.path}.",
            why=str(error).partition("\n")[0],
            hint="Check that these are the images this model was trained for.",
        ) from error
    count = min(2, len(images))
    if not isinstance(scores, Tensor) or scores.ndim < 1 or scores.shape[0] != count:
        raise UnsupportedModelError(f"{artifact.path} does not return one row of scores per image.")
    if not bool(torch.isfinite(scores).all()):
        raise UnsupportedModelError(
            f"{artifact.path} returns NaN or infinite scores.", hint="The weights are damaged: download it again."
        )
    return int(np.prod(scores.shape[1:], dtype=int))
