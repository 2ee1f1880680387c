"""The loaders of Keras files: ``.h5`` and ``.keras``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.keras.archive import is_archive
from backdoorscan.formats.keras.dialects import read_model
from backdoorscan.formats.keras.extend import with_class_more
from backdoorscan.formats.keras.hdf5 import is_hdf5
from backdoorscan.formats.keras.network import BuiltNetwork, build
from backdoorscan.formats.keras.numbering import NumberedGroups
from backdoorscan.formats.keras.parse import ParsedKeras, parse
from backdoorscan.formats.keras.spec import Shape
from backdoorscan.formats.keras.weights import NamedGroups
from backdoorscan.formats.keras.write import with_weights
from backdoorscan.formats.sandbox import facts, run_apart
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader

_ARCH = "model.h5 or model.keras (a whole model) or model.json (from Model.to_json())"
_HINT_PATH = "Choose another path with --output."


class _Keras(Loader):
    """What the two formats share: everything but how they are told apart."""

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the network.

        Args:
            artifact: The file's bytes.
            arch: For a weights-only file: a whole-model ``.h5`` or ``.keras``, or the JSON of ``Model.to_json()``.

        Raises:
            ArtifactError: The file is broken, unsupported or unsafe.
            UsageError: ``arch`` was given for a file that holds its own architecture.
        """
        parsed = _parsed(artifact, arch)
        built = _built(parsed)
        first = built.channels_first
        return LoadedNetwork(
            network=built.network,
            input_shape=_channels_first(built.input_shape, first),
            layout="NCHW" if first else "NHWC",
            num_classes=built.output_shape[0],
            details={"framework": "keras", "keras_version": parsed.keras_version, "backend": parsed.backend, **facts()},
        )

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of the artifact in which only ``weights`` differ.

        Args:
            artifact: The original file.
            weights: Changed tensors by their name in the network that ``load`` returned.
            path: The new file.
            arch: What ``load`` was given.

        Raises:
            ArtifactError: A tensor is unknown, has another shape, or is not stored in the file.
            OutputError: The new file could not be written.
        """
        built = _built(_parsed(artifact, arch))
        write_whole(path, with_weights(artifact, built, weights), hint=_HINT_PATH)

    def write_extended(
        self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None
    ) -> None:
        """Write a copy of the artifact whose head has one class more; see ``Loader.write_extended``.

        Args:
            artifact: The original file.
            weights: All tensors of the network by name.
            path: The new file.
            arch: What ``load`` was given.

        Raises:
            UnsupportedModelError: The file holds weights alone, or what grew is no head that can be written.
            ArtifactError: A tensor is unknown, or is not stored in the file.
            OutputError: The new file could not be written.
        """
        parsed = _parsed(artifact, arch)
        if arch is not None or parsed.config is None:
            raise UnsupportedModelError(
                f"{artifact.path} cannot be written with one class more.",
                why="It holds weights alone: its architecture, which would change too, is in another file.",
                hint="Save the whole model with model.save() and repair that.",
            )
        data = with_class_more(artifact, parsed.config, _built(parsed), weights)
        written = _read(Artifact(path, data, ""))
        try:
            known = _built(written).network.state_dict()
        except ArtifactError as error:
            raise UnsupportedModelError(
                f"{artifact.path} cannot be written with one class more.",
                why=f"The layers behind the head work only with the classes there are: {error.what}",
                hint="Use the GoodNet in ONNX, or a repair that keeps the classes, such as unlearn.",
            ) from error
        # What is written must read back: a repair that cannot be loaded is none.
        for name, tensor in weights.items():
            if not torch.allclose(known[name], tensor.detach().cpu(), rtol=1e-2, atol=1e-4, equal_nan=True):
                raise ArtifactError(f"The repaired tensor '{name}' does not come back from the written file.")
        write_whole(path, data, hint=_HINT_PATH)


class KerasH5(_Keras):
    """Whole models and weights of Keras 2.0 to 3 in ``.h5`` files, read as data."""

    id = "keras-h5"
    summary = "Keras .h5 models, with the architecture inside or beside them (--arch)"
    suffix = ".h5"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content is HDF5."""
        return is_hdf5(artifact.data)


class KerasV3(_Keras):
    """Whole models in ``.keras`` archives, of Keras 3 and of tf.keras in the same layout, read as data."""

    id = "keras-v3"
    summary = "Keras .keras archives"
    suffix = ".keras"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content is a zip archive as Keras writes it."""
        return is_archive(artifact.data)


def _read(artifact: Artifact) -> ParsedKeras:
    return run_apart(parse, artifact.data, str(artifact.path), name=str(artifact.path))


def _parsed(artifact: Artifact, arch: str | None) -> ParsedKeras:
    parsed = _read(artifact)
    if parsed.config is not None:
        if arch is not None:
            raise UsageError(f"{artifact.path} holds its own architecture.", hint="Leave --arch out.")
        return parsed
    if arch is None:
        raise ArtifactError(
            f"{artifact.path} holds weights, but no architecture.",
            why="It was written by Model.save_weights().",
            hint=f"Pass the architecture: --arch {_ARCH}.",
        )
    described = _read(Artifact.read(arch))
    if described.config is None:
        raise ArtifactError(f"{arch} holds no architecture.", hint=f"Give {_ARCH}.")
    # The weights tell which Keras trained them, and so which functions they expect.
    return replace(parsed, config=described.config, keras_version=parsed.keras_version or described.keras_version)


def _built(parsed: ParsedKeras) -> BuiltNetwork:
    if parsed.config is None:
        raise ArtifactError("The file holds no architecture.", hint=f"Pass --arch {_ARCH}.")
    # Files of 2.0 to 2.2 do not always say which Keras wrote them.
    major = parsed.keras_version.partition(".")[0]
    model = read_model(parsed.config)
    source = NumberedGroups(parsed.groups, model) if parsed.numbered else NamedGroups(parsed.groups)
    return build(model, source, int(major) if major.isdecimal() else 2)


def _channels_first(shape: Shape, already: bool) -> Shape:
    if len(shape) != 3 or already:
        return shape
    return shape[2], shape[0], shape[1]


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this module."""
    return [KerasH5, KerasV3]
