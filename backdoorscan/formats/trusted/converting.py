"""The kinds of files that are converted where the user trusts them, known by content."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, ImagesError, UnsafeModelError, UnsupportedModelError, UsageError
from backdoorscan.formats.keras.archive import is_archive
from backdoorscan.formats.keras.hdf5 import is_hdf5
from backdoorscan.formats.keras.parse import parse
from backdoorscan.formats.sandbox import run_apart
from backdoorscan.formats.trusted import apart
from backdoorscan.formats.trusted.savedmodel import SavedModel
from backdoorscan.formats.trusted.tensorflow import from_savedmodel
from backdoorscan.formats.weights.checkpoint import kind_of
from backdoorscan.formats.weights.zoo import ZOOS

OFFER = "Where you trust its author, --trust converts it in a sandbox, where code from the file runs."
"""What the refusal of such a file adds to its hint."""


@dataclass(frozen=True)
class Known:
    """What is known beside the file.

    Attributes:
        arch: The user's ``--arch``.
        shape: (C, H, W) of an image, or ``None``.
        layout: The user's ``--layout``, or ``None``.
    """

    arch: str | None
    shape: tuple[int, int, int] | None
    layout: str | None


@dataclass(frozen=True)
class Converter:
    """One kind of files.

    Attributes:
        id: What reports call it.
        accepts: Whether an artifact is of it, by content.
        convert: Its file as one that is read as data; runs what the file holds, in the sandbox.
        packages: The Python packages that convert it.
        overcomes: Whether a conversion may open what a reader has refused with an error: code in it, or what only the
            program that wrote it understands; not links, bombs and damage.
    """

    id: str
    accepts: Callable[[Artifact], bool]
    convert: Callable[[Artifact, Known], bytes]
    packages: tuple[str, ...]
    overcomes: Callable[[Artifact, ArtifactError], bool]

    def __call__(self, artifact: Artifact, known: Known) -> Artifact:
        """The converted file, under the path of the original.

        Raises:
            BackdoorscanError: It cannot be converted.
        """
        data = self.convert(artifact, known)
        return Artifact(artifact.path, data, hashlib.sha256(data).hexdigest())

    def facts(self) -> dict[str, Any]:
        """What a report says of a conversion."""
        known = packages_distributions()
        return {
            "trusted": True,
            "converted_from": self.id,
            "converted_by": {package: version(known[package][0]) for package in self.packages},
            "sandbox": apart.confinement(),
        }


def converter_of(artifact: Artifact, refusal: ArtifactError) -> Converter | None:
    """What may open an artifact that its reader has refused, or ``None``."""
    converter = next((converter for converter in CONVERTERS if converter.accepts(artifact)), None)
    return converter if converter and converter.overcomes(artifact, refusal) else None


def _is_code(_artifact: Artifact, refusal: ArtifactError) -> bool:
    """Of PyTorch and TensorFlow what is refused as unsafe is programs and pickled objects."""
    return isinstance(refusal, UnsafeModelError)


def _is_in_layers(artifact: Artifact, refusal: ArtifactError) -> bool:
    """Whether what is refused in a Keras file are its layers: the file around them is sound, and there are some."""
    unsafe = isinstance(refusal, UnsafeModelError)
    if not unsafe and not isinstance(refusal, UnsupportedModelError):
        return False
    try:
        config = run_apart(parse, artifact.data, str(artifact.path), name=str(artifact.path)).config
    except UnsupportedModelError:
        return True  # weights kept in a way that only Keras knows
    except ArtifactError:
        return False
    return config is not None and (not unsafe or _holds_lambda(config))


def _holds_lambda(config: Any) -> bool:
    if isinstance(config, dict):
        return config.get("class_name") == "Lambda" or any(map(_holds_lambda, config.values()))
    return isinstance(config, list) and any(map(_holds_lambda, config))


def _torchscript(artifact: Artifact, known: Known) -> bytes:
    _without_arch(artifact, known)
    from backdoorscan.formats.trusted.pytorch import from_torchscript

    name = str(artifact.path)
    shapes = _shapes(artifact, known)
    return apart.convert_apart(from_torchscript, artifact.data, shapes, name=name, size=len(artifact.data))


def _pickle(artifact: Artifact, known: Known) -> bytes:
    from backdoorscan.formats.trusted.pytorch import from_pickle

    name = str(artifact.path)
    shapes = _shapes(artifact, known)
    module, file = _source(known.arch)
    folder = file.parent if file else None
    with apart.findable(folder):
        source = str(file or "")
        return apart.convert_apart(
            from_pickle, artifact.data, shapes, module, source, name=name, size=len(artifact.data)
        )


def _source(arch: str | None) -> tuple[str, Path | None]:
    """The module that ``--arch`` names, and its file if it is one."""
    where = (arch or "").rpartition(":")[0]
    if not where.endswith(".py"):
        return ("" if where in ZOOS else where), None
    file = Path(where).resolve()
    if not file.is_file():
        raise UsageError(f"There is no architecture file {where}.", hint="Check the path given to --arch.")
    return file.stem, file


def _keras(artifact: Artifact, known: Known) -> bytes:
    _without_arch(artifact, known)
    _require(artifact, "keras", ("keras",))
    from backdoorscan.formats.trusted.keras import from_keras

    shapes = _shapes(artifact, known)[::-1]  # Keras puts channels last
    return apart.convert_apart(
        from_keras, artifact.data, is_archive(artifact.data), shapes, name=str(artifact.path), size=len(artifact.data)
    )


def _savedmodel(artifact: Artifact, known: Known) -> bytes:
    _without_arch(artifact, known)
    _require(artifact, "tensorflow", _TENSORFLOW)
    size = sum(map(len, artifact.parts.values()))
    return apart.convert_apart(from_savedmodel, dict(artifact.parts), name=str(artifact.path), size=size)


def _require(artifact: Artifact, extra: str, packages: Sequence[str]) -> None:
    """Complain about packages that an extra of ours would install."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"{artifact.path} was not converted.",
            why=f"That takes {' and '.join(missing)}, not installed here.",
            hint=f"pip install 'backdoorscan[{extra}]'",
        )


def _without_arch(artifact: Artifact, known: Known) -> None:
    if known.arch is not None:
        raise UsageError(f"{artifact.path} holds its own architecture.", hint="Leave --arch out.")


def _shapes(artifact: Artifact, known: Known) -> Sequence[tuple[int, ...]]:
    """Shapes of an image as the network may take it.

    Raises:
        ImagesError: Nothing tells the size.
    """
    if known.shape is None:
        raise ImagesError(
            f"{artifact.path} does not say how large its images are.",
            hint="Pass --input-shape 3,32,32 (channels, height, width), or --valid: one clean image tells it.",
        )
    channels, height, width = known.shape
    shapes = {"NCHW": (channels, height, width), "NHWC": (height, width, channels)}
    return [shapes[layout] for layout in ((known.layout,) if known.layout else shapes)]


_TENSORFLOW = ("tensorflow", "tf2onnx")

CONVERTERS = (
    Converter(
        "torchscript", lambda artifact: kind_of(artifact.data) == "torchscript", _torchscript, ("torch",), _is_code
    ),
    Converter(
        "pickle", lambda artifact: kind_of(artifact.data) in ("zip", "legacy", "pickle"), _pickle, ("torch",), _is_code
    ),
    Converter("keras", lambda a: is_hdf5(a.data) or is_archive(a.data), _keras, ("keras", "torch"), _is_in_layers),
    Converter(SavedModel.id, SavedModel().accepts, _savedmodel, _TENSORFLOW, _is_code),
)
