"""A network as its file has it: final activation, axis order and all, and the size of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from backdoorscan import graph
from backdoorscan.artifact import Artifact
from backdoorscan.errors import ImagesError, UsageError
from backdoorscan.formats.loading import ReadOptions, read_network
from backdoorscan.plugin.loader import Layout, LoadedNetwork, Loader
from backdoorscan.registry import Registry


@dataclass(frozen=True)
class OpenedNetwork:
    """A network that nothing was taken off.

    Attributes:
        artifact: The file.
        loader: Its format.
        loaded: What the loader made of it.
        layout: How the file's own input orders the axes.
        shape: Of one input as the network takes it, channels first: (C, H, W), (H, W) or (D,); ``None`` where neither
            the file nor the user tells.
    """

    artifact: Artifact
    loader: Loader
    loaded: LoadedNetwork
    layout: Layout
    shape: tuple[int, ...] | None

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self.loaded.network

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of one input as the file takes it.

        Raises:
            ImagesError: Neither the file nor the user tells.
        """
        if self.shape is None:
            raise ImagesError(
                f"{self.artifact.path} does not say how large its images are.",
                hint="Pass --input-shape 3,32,32 (channels, height, width).",
            )
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    @property
    def channels_last(self) -> bool:
        """Whether the file takes images as N×H×W×C."""
        return self.layout == "NHWC" and len(self.shape or ()) == 3


def open_network(artifact: Artifact, options: ReadOptions, registry: Registry) -> OpenedNetwork:
    """Read a model file without looking at how it was fed.

    Args:
        artifact: What ``read_artifact`` read.
        options: What the user says about the file: architecture, axis order, size of the images, whether to trust it.
        registry: Where loaders are found.

    Raises:
        ArtifactError: The file cannot be read.
        UsageError: What the user says does not fit the file.
        ImagesError: ``--input-shape`` does not fit the file.
    """
    loader, loaded = read_network(artifact, None, options, registry)
    layout = loaded.layout
    if options.layout not in (None, layout):
        if loaded.input_shape is not None or not isinstance(loaded.network, fx.GraphModule):
            raise UsageError(
                f"--layout {options.layout} does not fit {artifact.path}.", why=f"The file itself says {layout}."
            )
        graph.accept_channels_first(loaded.network)
        layout = "NHWC"
    return OpenedNetwork(artifact, loader, loaded, layout, _shape(artifact, loaded, options.input_shape))


def _shape(artifact: Artifact, loaded: LoadedNetwork, wanted: tuple[int, int, int] | None) -> tuple[int, ...] | None:
    """The input's shape, with what the file leaves open as the user, or else the file's training, has it."""
    known = loaded.input_shape
    if wanted is None and (known is None or None in known):
        wanted = loaded.usual_shape
    if wanted is None:
        return None if known is None else _complete(known)
    if known is None:
        return wanted
    channels, height, width = wanted
    given = {2: (height, width), 1: (channels * height * width,)}.get(len(known), wanted)
    fits = len(known) != 2 or channels == 1
    if not fits or any(size not in (None, own) for size, own in zip(known, given, strict=True)):
        sizes = "×".join("any" if size is None else str(size) for size in known)
        raise ImagesError(
            f"Images of {channels}×{height}×{width} do not fit {artifact.path}.",
            why=f"The model takes {sizes} (channels first).",
            hint="Leave --input-shape out, unless the file leaves the size open.",
        )
    return given


def _complete(shape: tuple[int | None, ...]) -> tuple[int, ...] | None:
    sizes = tuple(size for size in shape if size is not None)
    return sizes if len(sizes) == len(shape) else None
