"""The loader of ONNX files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.building.network import BuiltNetwork, channels_first
from backdoorscan.formats.changes import check_back
from backdoorscan.formats.extending import no_class_more
from backdoorscan.formats.goodnet import no_network
from backdoorscan.formats.onnx import fallback
from backdoorscan.formats.onnx.extend import with_class_more
from backdoorscan.formats.onnx.network import build
from backdoorscan.formats.onnx.parse import ParsedOnnx, companions, parse
from backdoorscan.formats.onnx.plain import GOODNET
from backdoorscan.formats.onnx.recognise import is_onnx
from backdoorscan.formats.onnx.sizes import another_size, layout_of, sizes
from backdoorscan.formats.onnx.verify import compare
from backdoorscan.formats.onnx.write import with_weights
from backdoorscan.formats.sandbox import facts, run_apart
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader


class Onnx(Loader):
    """ONNX classifiers of opset 7 and later, read as data and compared with onnxruntime."""

    id = "onnx"
    summary = "ONNX classifiers (.onnx), weights inside the file or beside it"
    suffix = ".onnx"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content is an ONNX model."""
        return is_onnx(artifact.data)

    def companions(self, artifact: Artifact) -> Sequence[str]:
        """Names of the files beside the artifact in which it keeps arrays.

        Raises:
            ArtifactError: The file is broken.
            UnsafeModelError: One is not in the artifact's folder.
        """
        # Every such file has this word in it; the others need not be parsed for their sake.
        if b"location" not in artifact.data:
            return ()
        return run_apart(companions, artifact.data, str(artifact.path), name=str(artifact.path))

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the network.

        Args:
            artifact: The file's bytes.
            arch: Nothing: the file holds its architecture.

        Raises:
            ArtifactError: The file is broken, unsupported or unsafe.
            UsageError: ``arch`` was given.
        """
        if arch is not None:
            raise UsageError(f"{artifact.path} holds its own architecture.", hint="Leave --arch out.")
        parsed, built, shape, converter = _read(artifact)
        return LoadedNetwork(
            network=built.network,
            input_shape=channels_first(shape, built.layout),
            layout=built.layout,
            num_classes=built.num_classes,
            details={
                "framework": parsed.producer or "unknown",
                "opset": parsed.opset,
                **({"converted_by": converter} if converter else {}),
                **facts(),
            },
        )

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of the artifact in which only ``weights`` differ, and read it again.

        Args:
            artifact: The original file.
            weights: Changed tensors by their name in the network that ``load`` returned.
            path: The new file.
            arch: Nothing.

        Raises:
            ArtifactError: A tensor is unknown, has another shape, or is not stored in the file.
            OutputError: The new file could not be written.
        """
        _, built, *_ = _read(artifact)
        data = with_weights(artifact, built, weights)
        _, again, *_ = _read(Artifact(path, data, ""))
        check_back(again.network.state_dict(), weights)
        write_whole(path, data)

    def write_extended(
        self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None
    ) -> None:
        """Write a copy of the artifact whose head has one class more, and read it again.

        Args:
            artifact: The original file.
            weights: All tensors of the network by name; weight and bias of the head have one row more.
            path: The new file.
            arch: Nothing.

        Raises:
            UnsupportedModelError: What grew is no head that can be written, or what is behind it forbids it.
            ArtifactError: A tensor is unknown, or is not stored in the file.
            OutputError: The new file could not be written.
        """
        _, built, *_ = _read(artifact)
        data = with_class_more(artifact, built, weights)
        try:
            _, again, *_ = _read(Artifact(path, data, ""))
        except ArtifactError as error:
            why = f"The layers behind the head work only with the classes there are: {error.what}"
            raise no_class_more(artifact, why) from error
        if again.num_classes != built.num_classes + 1:
            raise no_class_more(artifact, f"What grew is no head: the copy has {again.num_classes} classes.")
        check_back(again.network.state_dict(), weights)
        write_whole(path, data)


def _read(artifact: Artifact) -> tuple[ParsedOnnx, BuiltNetwork, tuple[int | None, ...], str | None]:
    """The file, its network, the shape of the images it takes in the file's order of axes, and a foreign converter."""
    name = str(artifact.path)
    parsed = run_apart(parse, artifact.data, artifact.parts, name, name=name)
    if GOODNET in parsed.metadata:
        raise no_network(artifact)
    layout = layout_of(parsed)
    found: list[BuiltNetwork] = []
    failure: UnsupportedModelError | None = None
    for size in sizes(parsed, layout):
        if found and not another_size(size, found[0].size, parsed, layout):
            continue
        try:
            found.append(build(parsed, size, layout))
        except UnsupportedModelError as error:
            failure = failure or error
            continue
        if len(found) == 2:
            break
    if not found and (converter := fallback.installed()):
        converted = fallback.convert(artifact, parsed, layout)
        if converted is not None:
            return parsed, converted, converted.size, converter
    if not found:
        raise failure or UnsupportedModelError(f"{artifact.path} fits images of no usual size.")
    for built in found:
        compare(artifact, parsed, built)
    if len(found) == 1:
        return parsed, found[0], found[0].size, None
    if not _same(*found):
        raise UnsupportedModelError(
            f"{artifact.path} leaves the size of its images open and computes with it.",
            hint="Export it with a fixed height and width.",
        )
    first, second = (built.size for built in found)
    return parsed, found[0], tuple(a if a == b else None for a, b in zip(first, second, strict=True)), None


def _same(left: BuiltNetwork, right: BuiltNetwork) -> bool:
    ours, theirs = left.network.state_dict(), right.network.state_dict()
    same = str(left.network) == str(right.network) and ours.keys() == theirs.keys()
    return same and all(
        tensor.shape == theirs[name].shape and torch.allclose(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)
        for name, tensor in ours.items()
    )


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this module."""
    return [Onnx]
