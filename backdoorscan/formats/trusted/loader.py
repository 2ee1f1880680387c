"""Converted files: read by the loader that knows what they were converted to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.plugin.loader import LoadedNetwork, Loader


class Converted(Loader):
    """One file that was converted. Repaired weights go into a copy of what it was converted to.

    Args:
        reader: What reads the converted file.
        converted: That file.
    """

    id = "converted"
    summary = "files that --trust converts"
    suffix = ""

    def __init__(self, reader: Loader, converted: Artifact) -> None:
        self._reader = reader
        self._converted = converted

    @property
    def written(self) -> str:
        """What the name of a repaired copy ends in, with the dot."""
        return self._reader.suffix

    def accepts(self, artifact: Artifact) -> bool:
        """Never: a file that can be read as data is not converted."""
        return False

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read what the artifact was converted to.

        Raises:
            ArtifactError: It is broken, unsupported or unsafe.
        """
        return self._reader.load(self._converted, arch)

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of what the artifact was converted to, in which only ``weights`` differ."""
        self._reader.write(self._converted, weights, path, arch)

    def write_extended(
        self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None
    ) -> None:
        """Write a copy of what the artifact was converted to with one class more, if that format can."""
        self._reader.write_extended(self._converted, weights, path, arch)
