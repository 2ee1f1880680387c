"""SavedModels of TensorFlow: known only to be refused with a reason, or converted where the user trusts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsafeModelError
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader

GRAPH = "saved_model.pb"
"""The file that makes a folder a SavedModel."""


class SavedModel(Loader):
    """Folders that ``tf.saved_model.save`` or ``Model.export`` wrote."""

    id = "tensorflow-savedmodel"
    summary = "TensorFlow SavedModel folders, only with --trust"
    suffix = ""

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it is a folder with a graph of TensorFlow."""
        return not artifact.data and GRAPH in artifact.parts

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Refuse it.

        Raises:
            UnsafeModelError: Always.
        """
        raise UnsafeModelError(
            f"{artifact.path} is a SavedModel of TensorFlow.",
            why="It is a program, and loading it runs parts of it, which can read and write files.",
            hint="Where you trust it, export it to ONNX with tf2onnx, or save the Keras model as a .keras file.",
        )

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Refuse it.

        Raises:
            UnsafeModelError: Always.
        """
        self.load(artifact, arch)


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The format of this module."""
    return [SavedModel]
