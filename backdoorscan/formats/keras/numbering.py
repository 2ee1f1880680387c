"""The arrays of ``.keras`` and ``.weights.h5`` files: by the layers' classes and numbers, not by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from backdoorscan.errors import ArtifactError
from backdoorscan.formats.keras.parse import NUMBERED, StoredWeight, WeightGroup
from backdoorscan.formats.keras.spec import ModelSpec
from backdoorscan.formats.keras.weights import HINT, Slot, check_shape

_EXTRA = {"Normalization": 1, "BatchNormalization": 3}
"""Arrays that a layer may store behind those that prediction needs: a count, three of batch renormalisation."""


class NumberedGroups:
    """The arrays of a file in Keras 3's layout.

    The second Conv2D of a model is ``layers/conv2d_1``, whatever its name, and its arrays are ``0``, ``1``, … in the
    order in which the layer made them: those that are trained first.

    Args:
        groups: As parsed.
        model: The architecture.
    """

    def __init__(self, groups: Sequence[WeightGroup], model: ModelSpec) -> None:
        self._groups = {group.layer: list(group.weights) for group in groups}
        self._places = dict(_places(model, (), ""))

    def match(self, slots: Sequence[Slot]) -> list[StoredWeight]:
        """See ``WeightSource``."""
        layers: dict[tuple[str, ...], list[Slot]] = {}
        for slot in slots:
            layers.setdefault(slot.path, []).append(slot)
        found: dict[str, StoredWeight] = {}
        for path, wanted in layers.items():
            layer = "/".join(path)
            place, extra = self._places[path]
            weights = self._groups.get(place, [])
            order = [*(s for s in wanted if s.trainable), *(s for s in wanted if not s.trainable)]
            names = [weight.name for weight in weights]
            surplus = len(weights) - len(order)
            if names != [str(number) for number in range(len(names))] or not 0 <= surplus <= extra:
                raise ArtifactError(
                    f"The file does not have the weights of the layer '{layer}'.",
                    why=f"Wanted: {len(order)} arrays in '{place}'; the file has: {', '.join(names[:8]) or 'none'}.",
                    hint=HINT,
                )
            for slot, weight in zip(order, weights, strict=False):
                check_shape(weight, slot, layer)
                found[slot.target] = weight
        return [found[slot.target] for slot in slots]


def _places(model: ModelSpec, path: tuple[str, ...], above: str) -> Iterator[tuple[tuple[str, ...], tuple[str, int]]]:
    """For each layer, by its path of names: its path in the file, and how many arrays it may store in addition."""
    used: Counter[str] = Counter()
    for layer in model.layers.values():
        name = _snake_case(layer.class_name)
        place = f"{above}{NUMBERED}/{name}" + (f"_{used[name]}" if used[name] else "")
        used[name] += 1
        yield (*path, layer.name), (place, _EXTRA.get(layer.class_name, 0))
        if layer.model is not None:
            yield from _places(layer.model, (*path, layer.name), f"{place}/")


def _snake_case(class_name: str) -> str:
    """As Keras spells it: ``BatchNormalization`` → ``batch_normalization``, ``PReLU`` → ``p_re_lu``."""
    parted = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", parted).lower()
