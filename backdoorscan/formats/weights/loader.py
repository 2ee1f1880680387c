"""State dicts and safetensors: weights from a file, the architecture from the user."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backdoorscan.artifact import Artifact
from backdoorscan.classifier import InputConvention
from backdoorscan.errors import ArtifactError, UsageError
from backdoorscan.files import write_whole
from backdoorscan.formats.extending import grown_head, no_class_more
from backdoorscan.formats.sandbox import facts, run_apart
from backdoorscan.formats.weights import arch as architectures
from backdoorscan.formats.weights import archive, checkpoint, graphs, tracing, zoo
from backdoorscan.formats.weights.contents import StateDict
from backdoorscan.formats.weights.extend import extended
from backdoorscan.formats.weights.names import Fit, fits
from backdoorscan.formats.weights.store import Store, same
from backdoorscan.plugin.loader import LoadedNetwork, Loader

_SHOWN = 5
_HINT_DISK = "Check the folder and the free space."


@dataclass(frozen=True)
class Checkpoint:
    """The weights of an artifact.

    Attributes:
        states: Its dictionaries of tensors, the likeliest to be the weights first.
        files: The files that hold the numbers, by the name that the spans of ``states`` call them by.
        arch: The architecture that the artifact itself names, as the user would with ``--arch``.
        settings: Plain values that this architecture is built with.
        details: What it says of itself, for the report.
        convention: How it says that images are fed.
        usual_shape: (C, H, W) of the images that it says the network was trained on.
    """

    states: Sequence[StateDict]
    files: Mapping[str, bytes]
    arch: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    convention: InputConvention | None = None
    usual_shape: tuple[int, int, int] | None = None


class WeightsLoader(Loader):
    """What all formats of weights have in common: a checkpoint in, changed files out."""

    @abstractmethod
    def checkpoint(self, artifact: Artifact) -> Checkpoint:
        """The artifact's weights.

        Raises:
            ArtifactError: It is broken or unsafe.
        """

    @abstractmethod
    def save(self, files: Mapping[str, bytes], path: Path) -> None:
        """Write the artifact's files with their new content.

        Raises:
            OutputError: The disk refused.
        """

    def load(self, artifact: Artifact, arch: str | None) -> LoadedNetwork:
        """Read the weights into the architecture that the user, or else the artifact, names.

        Args:
            artifact: The bytes.
            arch: ``timm:NAME``, ``torchvision:NAME``, the ``FILE.json`` that ``backdoorscan convert`` wrote, or
                ``FILE.py:NAME`` or ``package.module:NAME``: the user's own code, which is executed.

        Raises:
            UsageError: There is no architecture, or it cannot be built.
            ArtifactError: The file is broken or unsafe, or does not fit the architecture.
        """
        read = self.checkpoint(artifact)
        if arch is None and read.arch is None:
            largest = max(read.states, key=lambda state: len(state.tensors))
            raise UsageError(
                f"{artifact.path} holds weights, but no architecture.",
                why=f"Its tensors: {_listing([f'{k} {spec.shape}' for k, spec in largest.tensors.items()])}.",
                hint=architectures.FORM,
            )
        if graphs.is_graph(arch):
            return graphs.load(artifact, str(arch), read.states, read.files)
        module = _build(arch, read)
        ranked = fits(read.states, _shapes(module), _aliases(module))
        fit = ranked[0]
        if not fit.exact:
            raise _misfit(artifact, arch or read.arch, fit)
        _fill(artifact, module, fit, Store(read.files))

        details: dict[str, Any] = {
            **facts(),
            **read.details,
            "arch": arch,
            "state_dict": str(fit.state),
            "renamed": any(name != key for name, key in fit.keys.items()),
            "converted_from": sorted(
                {f"torch.{spec.dtype}" for spec in fit.state.tensors.values() if "float" in spec.dtype}
                - {"torch.float32"}
            ),
            "also_fitting": [str(other.state) for other in ranked[1:] if other.exact],
        }
        network: nn.Module = module
        shape: tuple[int | None, ...] | None = None
        classes: int | None = None
        try:
            traced, compared = tracing.trace(module)
        except tracing.Untraceable as error:
            details |= {"traced": False, "trace_error": str(error)}
        else:
            unused = module.state_dict().keys() - traced.state_dict().keys()
            details |= {"traced": True, "compared": compared, "unused": sorted(unused)}
            network, shape, classes = traced, tracing.input_shape(traced), tracing.num_classes(traced)
        return LoadedNetwork(network, shape, "NCHW", classes, details, read.convention, read.usual_shape)

    def write(self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None) -> None:
        """Write a copy of the artifact in which only the bytes of changed weights differ.

        Args:
            artifact: The original.
            weights: Tensors by their name in the network that ``load`` returned.
            path: The new file, or folder.
            arch: The architecture that ``load`` was given. With it the same state dict of the checkpoint is
                found again for certain, and every name of a tied weight; without, the names decide.

        Raises:
            ArtifactError: The file has no such tensor, or cannot hold it.
            OutputError: The new file cannot be written.
        """
        read = self.checkpoint(artifact)
        if graphs.is_graph(arch):
            changes = graphs.changes(artifact, str(arch), read.states, read.files, weights)
            self._patch(read, changes, path)
            return
        aliases: Mapping[str, frozenset[str]] = {}
        if arch is None and read.arch is None:
            named = {name: tuple(tensor.shape) for name, tensor in weights.items()}
            fit = fits(read.states, named, aliases)[0]
        else:
            fit, aliases = _fit(artifact, read, arch)
        wanted = _by_key(artifact, fit, aliases, weights)
        self._patch(read, Store(read.files).changes(fit.state.tensors, wanted), path)

    def _patch(self, read: Checkpoint, changes: Mapping[str, Mapping[int, bytes]], path: Path) -> None:
        self.save({name: _patched(data, changes.get(name, {})) for name, data in read.files.items()}, path)


class _OneFile(WeightsLoader):
    """A single file of weights."""

    def checkpoint(self, artifact: Artifact) -> Checkpoint:
        """The file's weights."""
        return Checkpoint(states_of(artifact.data, str(artifact.path)), {"": artifact.data})

    def save(self, files: Mapping[str, bytes], path: Path) -> None:
        """Write the file."""
        write_whole(path, files[""], hint=_HINT_DISK)

    def write_extended(
        self, artifact: Artifact, weights: Mapping[str, Tensor], path: Path, arch: str | None = None
    ) -> None:
        """Write a copy of the artifact whose head has one class more, for the architecture with one class more.

        Args:
            artifact: The original file.
            weights: All tensors of the network by name; weight and bias of the head have one row more.
            path: The new file.
            arch: The user's ``--arch``, which builds the network with the classes there were.

        Raises:
            UsageError: There is no architecture, or it cannot be built.
            UnsupportedModelError: What grew is no head that can be written, or the architecture is a graph as data.
            ArtifactError: The file has no such tensor, or cannot hold it.
            OutputError: The new file cannot be written.
        """
        if graphs.is_graph(arch):
            why = f"Its architecture, which would change too, is in {arch}."
            raise no_class_more(artifact, why)
        read = self.checkpoint(artifact)
        fit, aliases = _fit(artifact, read, arch)
        head = grown_head(artifact, fit.shapes, {name: new for name, new in weights.items() if name in fit.keys})
        names = f"{head}.weight", f"{head}.bias"
        if any(len(aliases[name]) > 1 for name in names):
            raise no_class_more(artifact, f"'{head}' shares its tensors with another layer.")
        rest = _by_key(artifact, fit, aliases, {name: new for name, new in weights.items() if name not in names})
        more = {fit.keys[name]: weights[name] for name in names}
        stored = fit.state.tensors
        data = _patched(artifact.data, Store(read.files).changes(stored, rest).get("", {}))
        contents, rows = Store({"": data}).grown(stored, more), len(weights[names[0]]) - 1
        data = run_apart(extended, data, contents, rows, str(artifact.path), name=str(artifact.path))
        # What is written must read back: a repair that cannot be loaded is none.
        again = next((s for s in states_of(data, str(path)) if s.where == fit.state.where), None)
        shapes = {key: spec.shape for key, spec in stored.items()}
        shapes |= {key: tuple(new.shape) for key, new in more.items()}
        if again is None or {key: spec.shape for key, spec in again.tensors.items()} != shapes:
            raise no_class_more(artifact, "The copy does not hold the tensors that it should.")
        written = Store({"": data})
        for key, new in {**rest, **more}.items():
            value = written.tensor(key, again.tensors[key]).to(new.dtype)
            if not torch.allclose(value, new.detach().cpu(), rtol=1e-2, atol=1e-4, equal_nan=True):
                raise ArtifactError(f"The repaired tensor '{key}' does not come back from the written file.")
        write_whole(path, data, hint=_HINT_DISK)


class TorchStateDict(_OneFile):
    """``torch.save`` files: a state dict, or a checkpoint that holds one."""

    id = "torch-state-dict"
    summary = "PyTorch state dicts and checkpoints (.pt, .pth), with --arch"
    suffix = ".pt"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether PyTorch wrote it; also what is only accepted to be refused with the reason."""
        return checkpoint.kind_of(artifact.data) in ("zip", "legacy", "pickle", "torchscript")


class Safetensors(_OneFile):
    """safetensors files."""

    id = "safetensors"
    summary = "safetensors weights, with --arch"
    suffix = ".safetensors"

    def accepts(self, artifact: Artifact) -> bool:
        """Whether it starts with a safetensors header."""
        return checkpoint.kind_of(artifact.data) == "safetensors"


def states_of(data: bytes, name: str) -> Sequence[StateDict]:
    """The dictionaries of tensors in one file of weights, the likeliest to be the weights first.

    Args:
        data: The file.
        name: What messages call it.

    Raises:
        ArtifactError: It is broken or unsafe, or has none.
    """
    parsed = run_apart(checkpoint.parse, data, name, name=name)
    if not parsed.states:
        raise ArtifactError(
            f"{name} holds no dictionary of tensors.",
            why=f"Its content is a {parsed.holds}.",
            hint="Save the weights with torch.save(model.state_dict(), 'weights.pt').",
        )
    return parsed.states


def _fit(artifact: Artifact, read: Checkpoint, arch: str | None) -> tuple[Fit, Mapping[str, frozenset[str]]]:
    """How the weights fit the architecture, and all names of each of its tensors."""
    module = _build(arch, read)
    aliases = _aliases(module)
    fit = fits(read.states, _shapes(module), aliases)[0]
    if not fit.exact:
        raise _misfit(artifact, arch or read.arch, fit)
    return fit, aliases


def _by_key(
    artifact: Artifact, fit: Fit, aliases: Mapping[str, frozenset[str]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors to write by their names in the file."""
    wanted: dict[str, Tensor] = {}
    for name, new in weights.items():
        keys = [fit.keys[alias] for alias in aliases.get(name, {name}) if alias in fit.keys]
        if not keys and not _is_absent_counter(name, fit):
            raise _no_place(artifact, name, new, fit)
        wanted |= dict.fromkeys(keys, new)
    return wanted


def _patched(data: bytes, changes: Mapping[int, bytes]) -> bytes:
    if changes and data.startswith(archive.MAGIC):
        return archive.patched(data, changes)
    copy = bytearray(data)
    for start, new in changes.items():
        copy[start : start + len(new)] = new
    return bytes(copy)


def _build(arch: str | None, read: Checkpoint) -> nn.Module:
    """Build what the user names, or else the artifact with its settings."""
    settings = {} if arch else read.settings
    arch = arch or read.arch or ""
    source, _, name = arch.partition(":")
    module = zoo.build(source, name, read.states, settings) if source in zoo.ZOOS else architectures.build(arch)
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        raise UsageError(
            f"--arch {arch} has lazy layers, whose sizes are still open.",
            hint="Run the network once on an input of the right size before the function returns it.",
        )
    return module.cpu().float().eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    # keep_vars gives the very tensors of the module, so that tied ones can be told by their identity.
    return {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _tensors(module).items()}


def _aliases(module: nn.Module) -> dict[str, frozenset[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    tensors = _tensors(module)
    for name, tensor in tensors.items():
        names[id(tensor)].append(name)
    return {name: frozenset(names[id(tensor)]) for name, tensor in tensors.items()}


def _fill(artifact: Artifact, module: nn.Module, fit: Fit, stored: Store) -> None:
    try:
        values = {name: stored.tensor(name, fit.state.tensors[key]) for name, key in fit.keys.items()}
    except ArtifactError as error:
        error.what = f"{artifact.path}: {error.what}"
        raise
    try:
        # Not strict: the counters of old files and the second names of tied weights may be absent.
        module.load_state_dict(values, strict=False)
    except RuntimeError as error:
        raise ArtifactError(f"{artifact.path} does not load into the architecture.", why=str(error)) from error
    for name, tensor in _tensors(module).items():
        if name in values and not same(values[name].to(tensor.dtype), tensor):
            raise ArtifactError(
                f"{artifact.path}: '{name}' is not what the architecture made of it.",
                why="It is tied to a tensor that has other values in the file, or the architecture changes it.",
                hint="Check that --arch names the network that the file was saved from.",
            )


def _misfit(artifact: Artifact, arch: str | None, fit: Fit) -> ArtifactError:
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
