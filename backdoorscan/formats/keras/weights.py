"""Which array of the file belongs to which tensor of the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.keras.parse import StoredWeight, WeightGroup

# What Keras stores beside the weights: random states, sample counters, and the state of batch renormalisation.
_NOT_NEEDED = {"seed_generator_state", "count", "num_samples", "renorm_mean", "renorm_stddev"}
_NOT_NEEDED |= {"renorm_mean_weight", "renorm_stddev_weight", "moving_stddev"}
HINT = "Save the model again with Keras, or check that weights and architecture belong together."


@dataclass(frozen=True)
class Slot:
    """A tensor of the network that waits for its array.

    Attributes:
        path: Names of the layer and of the models around it, outermost first, as in the file.
        kinds: What the weight may be called, e.g. ``("kernel",)``.
        trainable: Whether Keras counted it as trainable when it saved the file.
        target: Name in ``network.state_dict()``.
        file_shape: Shape in the file.
        axes: The order in which the file's axes are taken.
        shape: Shape in the network.
    """

    path: tuple[str, ...]
    kinds: tuple[str, ...]
    trainable: bool
    target: str
    file_shape: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to_network(self, array: NDArray[Any]) -> NDArray[np.float32]:
        """The array as the network wants it; always a copy."""
        moved = array.transpose(self.axes).reshape(self.shape)
        return np.array(moved, dtype=np.float32, order="C", copy=True)

    def to_file(self, array: NDArray[Any]) -> NDArray[Any]:
        """The inverse of ``to_network``."""
        moved = array.reshape([self.file_shape[axis] for axis in self.axes])
        return np.ascontiguousarray(moved.transpose(np.argsort(self.axes)))


def check_shape(weight: StoredWeight, slot: Slot, layer: str) -> None:
    """Compare what the file stores with what the architecture wants.

    Raises:
        ArtifactError: They differ.
    """
    if weight.array.shape != slot.file_shape:
        raise ArtifactError(
            f"The weight '{weight.name}' of layer '{layer}' has the shape {weight.array.shape}.",
            why=f"The architecture wants {slot.file_shape}.",
            hint=HINT,
        )


class WeightSource(Protocol):
    """Where arrays come from; one implementation per way of naming them."""

    def match(self, slots: Sequence[Slot]) -> list[StoredWeight]:
        """One array for each slot, in the slots' order.

        Raises:
            ArtifactError: An array is missing or cannot be told from another.
        """
        ...


class NamedGroups:
    """The arrays of an ``.h5`` file: one group for each top-level layer.

    Args:
        groups: As parsed.
    """

    def __init__(self, groups: Sequence[WeightGroup]) -> None:
        self._groups = {group.layer: [w for w in group.weights if _kind(w) not in _NOT_NEEDED] for group in groups}

    def match(self, slots: Sequence[Slot]) -> list[StoredWeight]:
        """See ``WeightSource``."""
        layers: dict[str, list[Slot]] = {}
        for slot in slots:
            layers.setdefault(slot.path[0], []).append(slot)
        found: dict[str, StoredWeight] = {}
        for layer, group in self._pair(list(layers)).items():
            for slot, weight in zip(layers[layer], _match_group(layer, layers[layer], group), strict=True):
                check_shape(weight, slot, layer)
                found[slot.target] = weight
        return [found[slot.target] for slot in slots]

    def _pair(self, layers: list[str]) -> dict[str, list[StoredWeight]]:
        """The groups of some layers, by name; by order where an automatic numbering differs, as Keras does."""
        filled = {name: group for name, group in self._groups.items() if group}
        if all(layer in filled for layer in layers):
            return {layer: filled[layer] for layer in layers}
        if len(filled) != len(layers):
            missing = [layer for layer in layers if layer not in filled]
            raise ArtifactError(
                f"The file has no weights for the layer '{missing[0]}'.",
                why=f"It has weights for: {', '.join(list(filled)[:10]) or 'no layer'}.",
                hint=HINT,
            )
        return dict(zip(layers, filled.values(), strict=True))


def _match_group(layer: str, slots: list[Slot], weights: list[StoredWeight]) -> list[StoredWeight]:
    """By name where that pairs everything; else in Keras's own order, which its loader goes by."""
    if len(weights) == len(slots):
        named = _by_name(slots, weights)
        if named is not None:
            return named
        order = [*(s for s in slots if s.trainable), *(s for s in slots if not s.trainable)]
        if all(_may_be(weight, slot) for slot, weight in zip(order, weights, strict=True)):
            by_target = {slot.target: weight for slot, weight in zip(order, weights, strict=True)}
            return [by_target[slot.target] for slot in slots]
    raise ArtifactError(
        f"The weights of layer '{layer}' do not fit its description.",
        why=f"Wanted: {_listed(slot.kinds[0] for slot in slots)}; the file has: {_listed(w.name for w in weights)}.",
        hint=HINT,
    )


def _by_name(slots: list[Slot], weights: list[StoredWeight]) -> list[StoredWeight] | None:
    """The weight of each slot by its name, or ``None`` unless every name points to exactly one."""
    found: list[StoredWeight] = []
    for slot in slots:
        same_kind = [weight for weight in weights if _kind(weight) in slot.kinds]
        inner = slot.path[1:]
        candidates = [weight for weight in same_kind if _is_within(inner, weight)]
        if not candidates and inner:
            candidates = [weight for weight in same_kind if _is_within(inner[-1:], weight)]
        if len(candidates) != 1:
            return None
        found.append(candidates[0])
    return found if len({id(weight) for weight in found}) == len(found) else None


def _is_within(path: Sequence[str], weight: StoredWeight) -> bool:
    """Whether the weight's name runs through all layers of ``path`` (which may hold slashes), in that order."""
    text = f"/{weight.name}"
    position = 0
    for name in path:
        position = text.find(f"/{name}/", position)
        if position < 0:
            return False
        position += len(name) + 1
    return True


def _kind(weight: StoredWeight) -> str:
    """``conv_1/kernel:0`` → ``kernel``."""
    return re.sub(r":\d+$", "", weight.name.rsplit("/", 1)[-1])


def _may_be(weight: StoredWeight, slot: Slot) -> bool:
    """Whether a weight that goes by its position may be this one: some backends number or lose the names."""
    kind = re.sub(r"_\d+$", "", _kind(weight))
    return kind in slot.kinds or kind in {"param", "variable", "Variable"}


def _listed(names: Any) -> str:
    items = list(names)
    return ", ".join(items[:8]) + (", …" if len(items) > 8 else "") if items else "none"
