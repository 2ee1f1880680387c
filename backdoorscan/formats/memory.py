"""Networks in memory in the place of model files."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import backdoorscan
from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.weights import tracing
from backdoorscan.plugin.loader import LoadedNetwork, Loader
from backdoorscan.registry import Plugin, Registry


@dataclass(frozen=True)
class ModuleArtifact(Artifact):
    """A network in memory in the place of a file: a copy of it, and the digest of its state dict.

    Reports name it after its class, as its weights would be saved: ``Net.pt``.
    """

    module: nn.Module = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, module: nn.Module) -> ModuleArtifact:
        """A copy of ``module``, so that what is hashed stays what is examined.

        Raises:
            UsageError: Its layers are not built yet, or it cannot be copied.
        """
        name = type(module).__name__
        if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
            raise UsageError(
                f"{name} has lazy layers, whose sizes are still open.", hint="Run it once on an input of its size."
            )
        try:
            twin = copy.deepcopy(module)
        except Exception as error:  # whatever a stranger's class does when it is copied
            raise UsageError(
                f"{name} cannot be copied.",
                why=f"{type(error).__name__}: {error}",
                hint="Save its weights, and scan the file with --arch.",
            ) from error
        return cls(Path(f"{name}.pt"), b"", _digest(twin), module=twin)


class ModuleLoader(Loader):
    """The format of networks in memory; the repaired ones are written as state dicts."""

    id = "torch-module"
    summary = "PyTorch networks in memory"
    suffix = ".pt"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it is no file."""
        return isinstance(artifact, ModuleArtifact)

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """The network as a graph, where it can be traced."""
        if arch is not None:
            raise UsageError(f"{artifact.path.stem} is a network; arch is for files of weights.", hint="Leave it out.")
        module = _module(artifact).cpu().float().eval()
        try:
            traced, compared = tracing.trace(module)
        except tracing.Untraceable as error:
            return LoadedNetwork(module, None, "NCHW", details={"traced": False, "trace_error": str(error)})
        except UnsupportedModelError as error:
            error.hint = "Wrap it in a module whose forward() returns the scores (N, classes) and nothing else."
            raise
        details = {"traced": True, "compared": compared}
        return LoadedNetwork(traced, tracing.input_shape(traced), "NCHW", tracing.num_classes(traced), details)

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Save the state dict of the network with some tensors changed; all in their own types."""
        module = _module(artifact)
        try:
            # Loaded, not put into the dictionary: a tied weight then changes under each of its names.
            unknown = module.load_state_dict(weights, strict=False).unexpected_keys
        except RuntimeError as error:
            raise ArtifactError(f"{artifact.path.stem} cannot take the repaired weights.", why=str(error)) from error
        if unknown:
            raise ArtifactError(f"{artifact.path.stem} has no tensor '{unknown[0]}'.")
        buffer = io.BytesIO()  # torch has an error of its own for a disk that is full
        torch.save(module.state_dict(), buffer)
        write_whole(path, buffer.getvalue())


def reading_modules(registry: Registry) -> Registry:
    """The same plugins, and the format of networks in memory."""
    own = Plugin("loader", ModuleLoader.id, "backdoorscan", backdoorscan.__version__, ModuleLoader)
    return Registry([own, *registry.plugins], registry.manager)


def _module(artifact: Artifact) -> nn.Module:
    """A copy of the network that may be changed."""
    if not isinstance(artifact, ModuleArtifact):
        raise ArtifactError(f"{artifact.path} is no network in memory.")
    return copy.deepcopy(artifact.module)


def _digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):  # a layer's extra state can be anything
            digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
