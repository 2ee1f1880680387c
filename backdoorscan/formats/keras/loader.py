"""The loader of Keras ``.h5`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.keras.dialects import read_model
from backdoorscan.formats.keras.hdf5 import is_hdf5
from backdoorscan.formats.keras.network import BuiltNetwork, build
from backdoorscan.formats.keras.parse import ParsedKeras, parse, parse_architecture
from backdoorscan.formats.keras.spec import Shape
from backdoorscan.formats.keras.weights import NamedGroups
from backdoorscan.formats.keras.write import with_weights
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader


class KerasH5(Loader):
    """Whole models and weights of Keras 2.0 to 3 in ``.h5`` files, read as data."""

    id = "keras-h5"
    summary = "Keras .h5 models, with the architecture inside or beside them (--arch)"
    suffix = ".h5"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content is HDF5."""
        return is_hdf5(artifact.data)

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the network.

        Args:
            artifact: The file's bytes.
            arch: For a weights-only file: a whole-model ``.h5``, or the JSON of ``Model.to_json()``.

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
            details={"framework": "keras", "keras_version": parsed.keras_version, "backend": parsed.backend},
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
        write_whole(path, with_weights(artifact, built, weights), hint="Choose another path with --output.")


def _parsed(artifact: Artifact, arch: str | None) -> ParsedKeras:
    parsed = parse(artifact.data, str(artifact.path))
    if parsed.config is not None:
        if arch is not None:
            raise UsageError(f"{artifact.path} holds its own architecture.", hint="Leave --arch out.")
        return parsed
    if arch is None:
        raise ArtifactError(
            f"{artifact.path} holds weights, but no architecture.",
            why="It was written by Model.save_weights().",
            hint="Pass the architecture: --arch other.h5 (a whole model) or --arch model.json (from Model.to_json()).",
        )
    described = parse_architecture(Artifact.read(arch).data, arch)
    # The weights tell which Keras trained them, and so which functions they expect.
    return replace(parsed, config=described.config, keras_version=parsed.keras_version or described.keras_version)


def _built(parsed: ParsedKeras) -> BuiltNetwork:
    if parsed.config is None:
        raise ArtifactError("The file holds no architecture.", hint="Pass --arch other.h5 or --arch model.json.")
    # Files of 2.0 to 2.2 do not always say which Keras wrote them.
    major = parsed.keras_version.partition(".")[0]
    return build(read_model(parsed.config), NamedGroups(parsed.groups), int(major) if major.isdecimal() else 2)


def _channels_first(shape: Shape, already: bool) -> Shape:
    if len(shape) != 3 or already:
        return shape
    return shape[2], shape[0], shape[1]


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this module."""
    return [KerasH5]
