"""Weights whose architecture is a graph as data: the ``.json`` that ``backdoorscan convert`` writes beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from backdoorscan.artifact import Artifact
from backdoorscan.errors import ArtifactError, UsageError
from backdoorscan.formats.building.network import BuiltNetwork
from backdoorscan.formats.changes import changed_arrays
from backdoorscan.formats.pt2 import plain
from backdoorscan.formats.pt2.network import build
from backdoorscan.formats.pt2.spec import Stored
from backdoorscan.formats.pt2.verify import compare
from backdoorscan.formats.sandbox import facts, run_apart
from backdoorscan.formats.weights.contents import StateDict
from backdoorscan.formats.weights.store import Store
from backdoorscan.plugin.loader import LoadedNetwork

_SHOWN = 5


@dataclass(frozen=True)
class _Assembled:
    """A network with the dictionary that its weights are from."""

    built: BuiltNetwork
    state: StateDict


def is_graph(arch: str | None) -> bool:
    """Whether ``--arch`` names a graph as data."""
    return arch is not None and arch.lower().endswith(".json")


def load(artifact: Artifact, arch: str, states: Sequence[StateDict], files: Mapping[str, bytes]) -> LoadedNetwork:
    """Read the network.

    Args:
        artifact: The weights, for messages.
        arch: The path of the graph.
        states: The dictionaries of tensors in the weights.
        files: The files that hold their numbers.

    Raises:
        UsageError: There is no such graph.
        ArtifactError: The graph or the weights are broken, unsupported or unsafe, or do not fit together.
    """
    found = _assembled(artifact, arch, states, files)
    shape = found.built.size
    return LoadedNetwork(
        network=found.built.network,
        input_shape=(shape[2], shape[0], shape[1]) if found.built.layout == "NHWC" else shape,
        layout=found.built.layout,
        num_classes=found.built.num_classes,
        details={**facts(), "arch": arch, "state_dict": str(found.state)},
    )


def changes(
    artifact: Artifact,
    arch: str,
    states: Sequence[StateDict],
    files: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
) -> Mapping[str, Mapping[int, bytes]]:
    """What to overwrite in the files of weights, so that they hold changed tensors.

    Args:
        artifact: As for ``load``.
        arch: As for ``load``.
        states: As for ``load``.
        files: As for ``load``.
        weights: Tensors by their name in the network that ``load`` returned.

    Raises:
        ArtifactError: As for ``load``; or a tensor is unknown, has another shape, or is not stored.
    """
    found = _assembled(artifact, arch, states, files)
    changed = changed_arrays(artifact, found.built, weights)
    wanted = {name: torch.from_numpy(array.copy()) for name, array in changed.items()}
    return Store(files).changes(found.state.tensors, wanted)


def _assembled(artifact: Artifact, arch: str, states: Sequence[StateDict], files: Mapping[str, bytes]) -> _Assembled:
    try:
        data = Path(arch).read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the graph {arch}.", why=str(error), hint="Check --arch.") from error
    graph = run_apart(plain.parse, data, arch, name=arch)
    state = _fitting(artifact, arch, graph, states)
    program, store = graph.program, Store(files)
    tensors = {key: _stored(key, store.tensor(key, state.tensors[key])) for key in graph.shapes}
    program = replace(program, tensors=tensors)
    sizes = tuple(size for size in program.entry.sizes[1:] if size is not None)
    if not sizes or len(sizes) != len(program.entry.sizes) - 1 or program.entry.dtype != "float32":
        raise ArtifactError(f"{arch}: The graph takes no images of a known size in float32.")
    built = build(program, sizes)
    compare(program, built)
    return _Assembled(built, state)


def _stored(key: str, tensor: Tensor) -> Stored:
    # Half precision is only how the file keeps them: the network computes with float32.
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return Stored(key, 0, (), str(tensor.dtype).removeprefix("torch."), tensor.numpy())


def _fitting(artifact: Artifact, arch: str, graph: plain.PlainGraph, states: Sequence[StateDict]) -> StateDict:
    """The dictionary that has the graph's tensors and no others."""
    for state in states:
        if {key: spec.shape for key, spec in state.tensors.items()} == graph.shapes:
            return state
    stored = {key: spec.shape for key, spec in states[0].tensors.items()}
    wrong = sorted(key for key in stored.keys() | graph.shapes.keys() if stored.get(key) != graph.shapes.get(key))
    raise ArtifactError(
        f"{artifact.path} does not fit --arch {arch}.",
        why=f"Missing, unexpected or of another shape: {', '.join(wrong[:_SHOWN])}{', …' * (len(wrong) > _SHOWN)}.",
        hint="Give the .json file that was written beside these weights.",
    )
