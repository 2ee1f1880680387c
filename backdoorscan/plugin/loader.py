"""The contract of a model format: file -> network, and repaired weights -> a copy of the file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import UnsupportedModelError

Layout: TypeAlias = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class LoadedNetwork:
    """A network as its file describes it, before anything is known about how it was fed.

    Attributes:
        network: A ``torch.fx.GraphModule`` of ``torch.nn`` layers named as in the file, in eval mode, or a plain
            module where tracing is impossible. Takes ``(N, *input_shape)`` float32 and returns ``(N, K)``
            scores; a final activation is still in place.
        input_shape: Shape of one input as ``network`` takes it, without the batch: images are (C, H, W), flat
            networks (D,), networks of grey images (H, W). ``None`` where the file leaves a size open; the
            whole is ``None`` where the file says nothing (a state dict).
        layout: How the file's own input orders the axes; ``network`` always takes channels first.
        num_classes: K, or ``None`` where only a run can tell.
        details: Facts for the report and for ``write``, e.g. the framework's version.
        convention: How the file says that images are fed, where it says so. It is only tried first.
        usual_shape: (C, H, W) of the images that the file says it was trained on, where it takes others too.
    """

    network: nn.Module
    input_shape: tuple[int | None, ...] | None
    layout: Layout
    num_classes: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    convention: InputConvention | None = None
    usual_shape: tuple[int, int, int] | None = None


class Loader(ABC):
    """Reads one model format as data, without running anything from the file.

    Attributes:
        id: Name of the format as reports give it, e.g. ``"keras-h5"``.
        summary: One line for ``backdoorscan plugins``.
        suffix: What a written file's name ends in, with the dot.
    """

    id: ClassVar[str]
    summary: ClassVar[str]
    suffix: ClassVar[str]

    @abstractmethod
    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content (never the name) is of this format."""

    def companions(self, artifact: Artifact) -> Sequence[str]:
        """Files that belong to the artifact, by name relative to its folder, with ``/``: none unless overridden.

        They are read before ``load``, which finds them in ``artifact.parts``; a name that leads out of the folder or
        to a link is refused there, so it is handed on as the file gives it.

        Raises:
            ArtifactError: The file is broken.
        """
        return ()

    @abstractmethod
    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the network.

        Args:
            artifact: The file's bytes.
            arch: The user's ``--arch``, for formats that hold weights alone.

        Raises:
            ArtifactError: The file is broken, unsupported or unsafe.
        """

    @abstractmethod
    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of the artifact in which only ``weights`` differ.

        Args:
            artifact: The original file.
            weights: Changed tensors by their name in the network that ``load`` returned
                (``network.state_dict()`` keys). Entries equal to the original leave their bytes alone.
            path: The new file; it is whole or not there.
            arch: The user's ``--arch`` that the network was loaded with.

        Raises:
            ArtifactError: The format cannot hold a changed tensor.
        """

    def write_extended(
        self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None
    ) -> None:
        """Write a copy of the artifact whose head has one class more, for networks that learned to reject.

        A format need not be able to.

        Args:
            artifact: The original file.
            weights: All tensors by their name in the network that ``load`` returned; weight and bias of the head
                have one row more.
            path: The new file; it is whole or not there.
            arch: The user's ``--arch`` that the network was loaded with.

        Raises:
            UnsupportedModelError: The format, or this network in it, cannot be given one class more.
            ArtifactError: The format cannot hold a changed tensor.
        """
        raise UnsupportedModelError(
            f"{artifact.path} cannot be written with one class more.",
            why=f"For the format {self.id} that is not possible.",
            hint="Use the GoodNet in ONNX, or a repair that keeps the classes, such as unlearn.",
        )
