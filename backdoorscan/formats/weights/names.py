"""Which tensors of a checkpoint are the network's, and under which names. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from backdoorscan.formats.weights.contents import StateDict
from backdoorscan.formats.weights.pickles import Leaf

Found: TypeAlias = tuple[tuple[str | int, ...], dict[str, Leaf]]
"""Keys and indices that lead to a dictionary of tensors from the root of a checkpoint, and its tensors by name."""

# Where training scripts put the weights, likeliest first.
_LIKELY = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")
# What training scripts keep beside the weights: tensors of the weights' shapes, but not weights.
_OTHER = ("optim", "sched", "grad", "scaler")
_MAX_DEPTH = 4

# Left by DataParallel and torch.compile, around the whole network or a part of it.
_WRAPPERS = {"module", "_orig_mod"}
# Attributes that hold the network inside a training class.
_HOLDERS = ("model", "net", "network")


@dataclass(frozen=True)
class Fit:
    """How well a state dict fits a network.

    Attributes:
        state: The state dict.
        keys: Names in the file by the names in the network, for the tensors that fit.
        shapes: The file's shapes by the names in the network, for the tensors that both have.
        missing: Names that the network has and the file lacks.
        unexpected: Names in the file that the network lacks.
        reshaped: ``"name (in the file, in the network)"`` for tensors of another shape.
    """

    state: StateDict
    keys: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every tensor has its place, and every place its tensor."""
        return not (self.missing or self.unexpected or self.reshaped)


def find_state_dicts(content: Any) -> list[Found]:
    """All dictionaries of tensors in a checkpoint, the likeliest to be the weights first."""
    found = list(_walk(content, (), set()))

    def rank(state: Found) -> int:
        keys = [key for key in state[0] if isinstance(key, str)]
        if not keys:
            return -1
        return _LIKELY.index(keys[-1]) if keys[-1] in _LIKELY else len(_LIKELY)

    return sorted(found, key=rank)


def _walk(content: Any, where: tuple[str | int, ...], seen: set[int]) -> Iterator[Found]:
    # Each container once: a few nested lists that repeat each other would otherwise take for ever.
    if len(where) > _MAX_DEPTH or id(content) in seen:
        return
    items: list[tuple[Any, Any]]
    if isinstance(content, Mapping):
        items = list(content.items())
        tensors = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Leaf)}
        if tensors:
            yield where, tensors
    elif isinstance(content, list | tuple):
        items = list(enumerate(content))
    else:
        return
    seen.add(id(content))
    for key, value in items:
        named_other = isinstance(key, str) and any(word in key.lower() for word in _OTHER)
        if isinstance(key, str | int) and not named_other:
            yield from _walk(value, (*where, key), seen)


def fits(
    states: Sequence[StateDict], wanted: Mapping[str, tuple[int, ...]], aliases: Mapping[str, frozenset[str]]
) -> list[Fit]:
    """Fit each state dict to a network with the names that fit it best, the best fit first.

    Args:
        states: The candidates, the likeliest first.
        wanted: The shapes in the network's ``state_dict()``.
        aliases: For each of its names, all names of the same tensor (tied weights).
    """
    # Both sorts are stable: among equals the likeliest state dict and the plainest names win.
    best = [min((_fit(state, name, wanted, aliases) for name in _RENAMES), key=_badness) for state in states]
    return sorted(best, key=_badness)


def _badness(fit: Fit) -> tuple[bool, int, int]:
    return (not fit.exact, -len(fit.keys), len(fit.unexpected))


def _fit(
    state: StateDict,
    rename: Callable[[str], str],
    wanted: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, frozenset[str]],
) -> Fit:
    named = {rename(key): key for key in state.tensors}
    if len(named) < len(state.tensors):
        # Two tensors would get one name.
        named = {key: key for key in state.tensors}
    shapes = {name: state.tensors[named[name]].shape for name in wanted if name in named}
    # A counter that old files lack and that inference never reads may be absent; and a tied weight is stored once.
    missing = [
        name
        for name in wanted
        if name not in named
        and not name.endswith("num_batches_tracked")
        and not any(alias in named for alias in aliases.get(name, ()))
    ]
    reshaped = [f"{name} ({shape}, {wanted[name]})" for name, shape in shapes.items() if shape != wanted[name]]
    keys = {name: named[name] for name, shape in shapes.items() if shape == wanted[name]}
    unexpected = tuple(key for name, key in named.items() if name not in wanted)
    return Fit(state, keys, shapes, tuple(missing), unexpected, tuple(reshaped))


def _unwrapped(name: str) -> str:
    first, _, rest = name.partition(".")
    return _unwrapped(rest) if first in _WRAPPERS and rest else name


def _unwrapped_throughout(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _held(name: str) -> str:
    name = _unwrapped_throughout(name)
    first, _, rest = name.partition(".")
    return rest if first in _HOLDERS and rest else name


def _as_is(name: str) -> str:
    return name


_RENAMES: tuple[Callable[[str], str], ...] = (_as_is, _unwrapped, _unwrapped_throughout, _held)
