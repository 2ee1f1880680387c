"""The loader of exported programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import UnsupportedModelError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.building.network import channels_first
from backdoorscan.formats.changes import check_back
from backdoorscan.formats.goodnet import is_goodnet, no_network
from backdoorscan.formats.pt2.parse import is_pt2
from backdoorscan.formats.pt2.reading import ReadProgram, read
from backdoorscan.formats.pt2.write import with_weights
from backdoorscan.formats.sandbox import facts
from backdoorscan.plugin.hookspecs import hookimpl
from backdoorscan.plugin.loader import LoadedNetwork, Loader


class Pt2(Loader):
    """What ``torch.export.save`` writes since PyTorch 2.9, read as data and compared with the program itself."""

    id = "pt2"
    summary = "exported PyTorch programs (.pt2)"
    suffix = ".pt2"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether the content is an archive of ``torch.export``."""
        return is_pt2(artifact.data)

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
        program = _read(artifact)
        built, shape, parsed = program.built, program.shape, program.parsed
        return LoadedNetwork(
            network=built.network,
            input_shape=channels_first(shape, built.layout),
            layout=built.layout,
            num_classes=built.num_classes,
            details={"framework": f"torch {parsed.torch_version}".strip(), **facts()},
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
        program = _read(artifact)
        data = with_weights(artifact, program, weights)
        # Tensors that share memory with changed ones must not have changed too.
        known = _read(Artifact(path, data, "")).built.network.state_dict()
        check_back(known, {**program.built.network.state_dict(), **weights})
        write_whole(path, data)


def _read(artifact: Artifact) -> ReadProgram:
    if is_goodnet(artifact):
        raise no_network(artifact)
    program = read(artifact)
    if len(program.parsed.outputs) != 1:
        raise UnsupportedModelError(
            f"The model returns {len(program.parsed.outputs)} tensors.",
            hint="backdoorscan reads classifiers: one image in, one score per class out.",
        )
    return program


@hookimpl
def backdoorscan_loaders() -> Sequence[type[Loader]]:
    """The formats of this module."""
    return [Pt2]
