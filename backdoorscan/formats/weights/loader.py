"""State dicts and safetensors: weights from a file, the architecture from the user."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UnsupportedModelError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.weights import arch as architectures
from backdoorscan.formats.weights import checkpoint, store, tracing
from backdoorscan.formats.weights.names import Fit, StateDict, find_state_dicts, fits
from backdoorscan.plugin.loader import LoadedNetwork, Loader

_SHOWN = 5


class _WeightsLoader(Loader):
    """What both formats have in common: all but the way from bytes to tensors and back."""

    @abstractmethod
    def _read(self, artifact: Artifact) -> Any:
        """The file's content: tensors inside plain containers."""

    @abstractmethod
    def _copy(
        self, artifact: Artifact, content: Any, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> bytes:
        """The file with changed tensors."""

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the weights into the architecture that the user names.

        Args:
            artifact: The file's bytes.
            arch: ``FILE.py:NAME`` or ``package.module:NAME``: the user's own code, which is executed.

        Raises:
            UsageError: There is no architecture, or it cannot be built.
            ArtifactError: The file is broken or unsafe, or does not fit the architecture.
        """
        states = _states(artifact, self._read(artifact))
        if arch is None:
            largest = max(states, key=lambda state: len(state.tensors))
            raise UsageError(
                f"{artifact.path} holds weights, but no architecture.",
                why=f"Its tensors: {_listing([f'{k} {tuple(t.shape)}' for k, t in largest.tensors.items()])}.",
                hint=architectures.FORM,
            )
        module = _build(arch)
        ranked = fits(states, _tensors(module), _aliases(module))
        fit = ranked[0]
        if not fit.exact:
            raise _misfit(artifact, arch, fit)
        _fill(artifact, module, fit)

        details: dict[str, Any] = {
            "arch": arch,
            "state_dict": str(fit.state),
            "renamed": any(name != key for name, key in fit.keys.items()),
            "converted_from": sorted(
                {str(t.dtype) for t in fit.state.tensors.values() if t.is_floating_point()} - {"torch.float32"}
            ),
            "also_fitting": [str(other.state) for other in ranked[1:] if other.exact],
        }
        try:
            traced, compared = tracing.trace(module)
        except tracing.Untraceable as error:
            details |= {"traced": False, "trace_error": str(error)}
            return LoadedNetwork(module, None, "NCHW", None, details)
        unused = module.state_dict().keys() - traced.state_dict().keys()
        details |= {"traced": True, "compared": compared, "unused": sorted(unused)}
        return LoadedNetwork(traced, tracing.input_shape(traced), "NCHW", tracing.num_classes(traced), details)

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of the artifact in which only ``weights`` differ.

        Args:
            artifact: The original file.
            weights: Tensors by their name in the network that ``load`` returned.
            path: The new file.
            arch: The architecture that ``load`` was given. With it the same state dict of the checkpoint is
                found again for certain, and every name of a tied weight; without, the names decide.

        Raises:
            ArtifactError: The file has no such tensor, or cannot hold it.
            OutputError: The new file cannot be written.
        """
        content = self._read(artifact)
        states = _states(artifact, content)
        aliases: dict[str, frozenset[str]] = {}
        named = weights
        if arch is not None:
            module = _build(arch)
            named, aliases = _tensors(module), _aliases(module)
        fit = fits(states, named, aliases)[0]
        if arch is not None and not fit.exact:
            raise _misfit(artifact, arch, fit)
        wanted: dict[str, Tensor] = {}
        for name, new in weights.items():
            keys = [fit.keys[alias] for alias in aliases.get(name, {name}) if alias in fit.keys]
            if not keys and not _is_absent_counter(name, fit):
                raise _no_place(artifact, name, new, fit)
            wanted |= dict.fromkeys(keys, new)
        data = self._copy(artifact, content, fit.state.tensors, wanted)
        write_whole(path, data, hint="Check the folder and the free space.")


class TorchStateDict(_WeightsLoader):
    """``torch.save`` files: a state dict, or a checkpoint that holds one."""

    id = "torch-state-dict"
    summary = "PyTorch state dicts and checkpoints (.pt, .pth), with --arch"
    suffix = ".pt"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether PyTorch wrote it; also what is only accepted to be refused with the reason."""
        return checkpoint.kind_of(artifact.data) not in (None, "safetensors")

    def _read(self, artifact: Artifact) -> Any:
        return checkpoint.read_torch(artifact)

    def _copy(
        self, artifact: Artifact, content: Any, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> bytes:
        return store.torch_copy(content, stored, wanted)


class Safetensors(_WeightsLoader):
    """safetensors files."""

    id = "safetensors"
    summary = "safetensors weights, with --arch"
    suffix = ".safetensors"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it starts with a safetensors header."""
        return checkpoint.kind_of(artifact.data) == "safetensors"

    def _read(self, artifact: Artifact) -> Any:
        return checkpoint.read_safetensors(artifact)

    def _copy(
        self, artifact: Artifact, content: Any, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> bytes:
        return store.safetensors_copy(artifact.data, stored, wanted)


def _states(artifact: Artifact, content: Any) -> list[StateDict]:
    states = find_state_dicts(content)
    if not states:
        raise ArtifactError(
            f"{artifact.path} holds no dictionary of tensors.",
            why=f"Its content is a {type(content).__name__}.",
            hint="Save the weights with torch.save(model.state_dict(), 'weights.pt').",
        )
    return states


def _build(arch: str) -> nn.Module:
    module = architectures.build(arch)
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise UsageError(
            f"--arch {arch} has lazy layers, whose sizes are still open.",
            hint="Run the network once on an input of the right size before the function returns it.",
        )
    return module.cpu().float().eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # keep_vars gives the very tensors of the module, so that tied ones can be told by their identity.
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _aliases(module: nn.Module) -> dict[str, frozenset[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    tensors = _tensors(module)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return {name: frozenset(names[id(tensor)]) for name, tensor in tensors.items()}


def _fill(artifact: Artifact, module: nn.Module, fit: Fit) -> None:
    values = {name: fit.state.tensors[key] for name, key in fit.keys.items()}
    for name, tensor in values.items():
        if tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
            raise UnsupportedModelError(
                f"{artifact.path}: '{name}' is a quantised, sparse or complex tensor.",
                hint="Give the float weights that it was made from.",
            )
    try:
        # Not strict: the counters of old files and the second names of tied weights may be absent.
        module.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise ArtifactError(f"{artifact.path} does not load into the architecture.", why=str(error)) from error
    for name, tensor in _tensors(module).items():
        if name in values and not store.same(values[name].to(tensor.dtype), tensor):
            raise ArtifactError(
                f"{artifact.path}: '{name}' is not what the architecture made of it.",
                why="It is tied to a tensor that has other values in the file, or the architecture changes it.",
                hint="Check that --arch names the network that the file was saved from.",
            )


def _misfit(artifact: Artifact, arch: str, fit: Fit) -> ArtifactError:
    lines = [
        f"{title}: {_listing(names)}."
        for title, names in (
            ("Missing in the file", fit.missing),
            ("Unexpected in the file", fit.unexpected),
            ("Other shapes (file, network)", fit.reshaped),
        )
        if names
    ]
    return ArtifactError(
        f"{artifact.path} does not fit --arch {arch}.",
        why=" ".join(lines),
        hint="Name the architecture that these weights were trained in.",
    )


def _no_place(artifact: Artifact, name: str, new: Tensor, fit: Fit) -> ArtifactError:
    hint = "A repair may change values, never names or shapes."
    other = next((entry for entry in fit.reshaped if entry.startswith(f"{name} (")), None)
    if other is not None:
        what = f"{artifact.path} holds '{name}' in another shape (file, network): {other}."
        return ArtifactError(what, hint=hint)
    return ArtifactError(f"{artifact.path} has no tensor '{name}' {tuple(new.shape)} to replace.", hint=hint)


def _is_absent_counter(name: str, fit: Fit) -> bool:
    # Old files lack this counter; no network reads it at inference, so there is nothing to keep.
    layer, _, leaf = name.rpartition(".")
    sibling = f"{layer}.running_var".removeprefix(".")
    return leaf == "num_batches_tracked" and any(key.endswith(sibling) for key in fit.state.tensors)


def _listing(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
