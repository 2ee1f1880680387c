"""Plain data as bytes that nobody can hide a program in: a JSON head, and the raw bytes that it points to.

What comes back from a process that read a hostile file is itself hostile. Nothing in it is called by name: a head can
name only classes from a table that the reader of it made, and every number in it is checked before it is used.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

_ALIGNMENT = 64
_MAX_HEAD = 256 * 2**20
_MAX_AXES = 64
_DTYPE = re.compile(r"[<>|][biufc][0-9]{1,2}|bfloat16")


class Malformed(ValueError):
    """What was read is not what ``write`` writes."""


def plain_classes(module: ModuleType) -> dict[str, type]:
    """The frozen dataclasses and enumerations that a module defines or imports, by ``module:name``."""
    found = {}
    for item in vars(module).values():
        if isinstance(item, type) and (_is_frozen(item) or issubclass(item, Enum)):
            found[_name(item)] = item
    return found


def write(value: Any, file: int) -> None:
    """Write plain data to a file descriptor.

    Args:
        value: ``None``, truth values, numbers, texts, bytes, lists, tuples, sets, dicts, arrays of numbers, frozen
            dataclasses and enumerations.
        file: Where to, from its beginning.

    Raises:
        TypeError: It holds anything else.
        OSError: There is no room.
    """
    buffers: list[memoryview] = []
    places: list[tuple[int, int]] = []
    head = json.dumps(_Writer(buffers).plain(value), separators=(",", ":")).encode()
    end = 0
    for buffer in buffers:
        places.append((end, buffer.nbytes))
        end += _padded(buffer.nbytes)
    table = json.dumps(places, separators=(",", ":")).encode()
    start = len(head).to_bytes(8, "little") + len(table).to_bytes(8, "little") + head + table
    position = _put(file, memoryview(start), 0)
    for (offset, _), buffer in zip(places, buffers, strict=True):
        position = _put(file, buffer, _padded(len(start)) + offset)
    if position < _padded(len(start)) + end:
        os.ftruncate(file, _padded(len(start)) + end)


def read(content: memoryview, classes: Mapping[str, type]) -> Any:
    """Plain data from bytes; arrays are views on them.

    Args:
        content: What ``write`` wrote.
        classes: The classes it may hold, by ``module:name``.

    Raises:
        Malformed: It is anything else.
    """
    try:
        size, table_size = (int.from_bytes(content[at : at + 8], "little") for at in (0, 8))
        end = 16 + size + table_size
        if end > min(len(content), _MAX_HEAD):
            raise Malformed("its head is longer than the whole")
        head = json.loads(bytes(content[16 : 16 + size]))
        places = json.loads(bytes(content[16 + size : end]))
        return _Reader(content[min(_padded(end), len(content)) :], places, classes).value(head)
    except Malformed:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _put(file: int, buffer: memoryview, position: int) -> int:
    buffer = buffer.cast("B") if buffer.nbytes else buffer
    while buffer.nbytes:
        written = os.pwrite(file, buffer[: 2**30], position)
        position += written
        buffer = buffer[written:]
    return position


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _is_frozen(item: type) -> bool:
    return is_dataclass(item) and item.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _name(item: type) -> str:
    return f"{item.__module__}:{item.__qualname__}"


class _Writer:
    def __init__(self, buffers: list[memoryview]) -> None:
        self._buffers = buffers

    def plain(self, value: Any) -> Any:
        """What stands for a value in the head: itself, a list, or ``{kind: content}``."""
        match value:
            case Enum():
                return {"enum": [_name(type(value)), value.name]}
            case str():
                return str(value)
            case np.generic():
                return {"scalar": self.plain(np.asarray(value))}
            case None | bool() | int() | float():
                return value
            case list():
                return [self.plain(item) for item in value]
            case tuple():
                return {"tuple": [self.plain(item) for item in value]}
            case set() | frozenset():
                return {type(value).__name__: [self.plain(item) for item in value]}
            case Mapping():
                return {"dict": [[self.plain(key), self.plain(item)] for key, item in value.items()]}
            case bytes() | bytearray():
                return {"bytes": self._buffer(memoryview(value))}
            case np.ndarray():
                dtype = value.dtype.name if value.dtype.name == "bfloat16" else value.dtype.str
                if _DTYPE.fullmatch(dtype):
                    raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                    return {"array": [dtype, list(value.shape), self._buffer(raw.data)]}
            case _ if _is_frozen(type(value)):
                content = {item.name: self.plain(getattr(value, item.name)) for item in fields(value)}
                return {"object": [_name(type(value)), content]}
        raise TypeError(f"{type(value).__name__} is no plain data")

    def _buffer(self, buffer: memoryview) -> int:
        self._buffers.append(buffer)
        return len(self._buffers) - 1


class _Reader:
    def __init__(self, content: memoryview, places: Any, classes: Mapping[str, type]) -> None:
        self._content = content
        self._places = places
        self._classes = classes

    def value(self, plain: Any) -> Any:
        if isinstance(plain, list):
            return [self.value(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        ((kind, content),) = plain.items()
        match kind:
            case "tuple":
                return tuple(self.value(item) for item in content)
            case "set" | "frozenset":
                items = (self.value(item) for item in content)
                return set(items) if kind == "set" else frozenset(items)
            case "dict":
                return {self.value(key): self.value(item) for key, item in content}
            case "bytes":
                return bytes(self._buffer(content))
            case "scalar":
                return self.value(content)[()]
            case "array":
                return self._array(*content)
            case "enum":
                name, member = content
                return self._class(name, Enum)[member]  # type: ignore[index]
            case "object":
                name, values = content
                found = self._class(name)
                if values.keys() != {item.name for item in fields(found)}:
                    raise Malformed(f"{name} has other fields")
                return found(**{key: self.value(item) for key, item in values.items()})
        raise Malformed(f"there is no kind {kind!r}")

    def _class(self, name: str, base: type = object) -> type:
        found = self._classes.get(name)
        if found is None or not issubclass(found, base):
            raise Malformed(f"{name!r} was not expected")
        return found

    def _buffer(self, index: int) -> memoryview:
        offset, length = self._places[index] if index >= 0 else (-1, 0)
        if offset % _ALIGNMENT or not 0 <= offset <= offset + length <= len(self._content):
            raise Malformed("it points behind its end")
        return self._content[offset : offset + length]

    def _array(self, dtype: str, shape: list[int], index: int) -> np.ndarray[Any, Any]:
        if not _DTYPE.fullmatch(dtype) or len(shape) > _MAX_AXES or not all(type(size) is int for size in shape):
            raise Malformed(f"there is no array of {dtype!r} and {shape}")
        buffer, kind = self._buffer(index), _dtype(dtype)
        if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize != len(buffer):
            raise Malformed(f"an array of the shape {shape} does not take {len(buffer)} bytes")
        if not len(buffer):
            return np.empty(shape, kind)
        return np.frombuffer(buffer, np.uint8).view(kind).reshape(shape)


def _dtype(name: str) -> np.dtype[Any]:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # only files that use it need it

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found
