"""An architecture in one form, whichever dialect its file spoke."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from backdoorscan.errors import UnsupportedModelError

Shape: TypeAlias = tuple[int | None, ...]
"""A value's shape in the file's own order of axes, without the batch; ``None`` where a size is open."""

_MISSING = object()


@dataclass(frozen=True)
class Ref:
    """Output ``tensor`` of call ``node`` of a layer."""

    layer: str
    node: int
    tensor: int


@dataclass(frozen=True)
class Call:
    """One call of a layer: arguments with ``Ref`` leaves; all else in them is a constant."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def refs(self) -> list[Ref]:
        """The values that the call needs, in order."""
        return list(refs_in([*self.args, dict(self.kwargs)]))


def refs_in(item: Any) -> Iterator[Ref]:
    """All ``Ref`` leaves of nested lists, tuples and dictionaries."""
    if isinstance(item, Ref):
        yield item
    elif isinstance(item, list | tuple):
        for child in item:
            yield from refs_in(child)
    elif isinstance(item, dict):
        for child in item.values():
            yield from refs_in(child)


class Fields:
    """A layer's settings with checked access: the file may hold anything.

    Args:
        layer: The layer's name.
        class_name: The layer's class.
        values: The raw settings.
    """

    def __init__(self, layer: str, class_name: str, values: Mapping[str, Any]) -> None:
        self.layer = layer
        self.class_name = class_name
        self.values = values

    def unsupported(self, why: str, hint: str = "") -> UnsupportedModelError:
        """An error that names this layer."""
        return UnsupportedModelError(
            f"The layer '{self.layer}' ({self.class_name}) cannot be read.",
            why=why,
            hint=hint or "Export the model to ONNX, or replace the layer by standard ones, and scan that.",
        )

    def wrong(self, key: str, expected: str) -> UnsupportedModelError:
        """An error about one setting."""
        text = repr(self.values.get(key))
        return self.unsupported(f"Its setting '{key}' is {text[:80]}, not {expected}.")

    def raw(self, key: str, default: Any = None) -> Any:
        """A setting as it is; ``default`` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A whole number."""
        value = self._value(key, default)
        if not _is_number(value) or not float(value).is_integer():
            raise self.wrong(key, "a whole number")
        return int(value)

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A number; old files wrap it as ``{"type": "ndarray", "value": 0.3}``."""
        value = self._value(key, default)
        if isinstance(value, dict):
            value = value.get("value")
        if not _is_number(value):
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.raw(key, default)
        if not isinstance(value, bool | int):
            raise self.wrong(key, "true or false")
        return bool(value)

    def choice(self, key: str, default: str, *allowed: str) -> str:
        """One of a few words."""
        value = self.raw(key, default)
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.wrong(key, " or ".join(allowed))
        return value.lower()

    def pair(self, key: str, default: Any = _MISSING) -> tuple[int, int]:
        """Two positive sizes, given as one number or as a list."""
        value = self._value(key, default)
        items = [value, value] if isinstance(value, int) else value
        if not isinstance(items, list | tuple) or len(items) != 2 or not all(_is_size(item) for item in items):
            raise self.wrong(key, "one or two positive whole numbers")
        return int(items[0]), int(items[1])

    def integers(self, key: str, default: Any = _MISSING) -> list[int]:
        """Whole numbers, given as one or as a list."""
        value = self._value(key, default)
        items = list(value) if isinstance(value, list | tuple) else [value]
        if not all(_is_number(item) and isinstance(item, int) for item in items):
            raise self.wrong(key, "whole numbers")
        return items

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is _MISSING:
            raise self.unsupported(f"Its setting '{key}' is missing.")
        return value


def _is_number(item: Any) -> bool:
    """Whether ``item`` is a number of a sane size: a hostile file may say 10**400 or Infinity."""
    return isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < 2**31


def _is_size(item: Any) -> bool:
    return _is_number(item) and isinstance(item, int) and item > 0


@dataclass
class LayerSpec:
    """One layer of a model.

    Attributes:
        name: As in the file.
        class_name: As in the file.
        fields: Its settings.
        calls: Its calls, by node index.
        model: The inner model, where the layer is one.
        input_shape: Of an ``InputLayer``, or of a layer that begins a Sequential model.
    """

    name: str
    class_name: str
    fields: Fields
    calls: list[Call]
    model: ModelSpec | None = None
    input_shape: Shape | None = None

    @property
    def trainable(self) -> bool:
        """Whether the layer was frozen when the file was saved: Keras stores frozen weights last."""
        return bool(self.fields.raw("trainable", True))


@dataclass
class ModelSpec:
    """A model: layers by name, in the file's order, and which values go in and out."""

    name: str
    layers: dict[str, LayerSpec]
    inputs: list[Ref]
    outputs: list[Ref]
