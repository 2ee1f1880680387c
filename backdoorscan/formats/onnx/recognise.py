"""Tells an ONNX file by its content: the format has no signature, but few other files look like its message."""

from __future__ import annotations

# Top-level fields of a model and how they are encoded: 0 is a number, 2 is bytes of a given length.
_WIRE_TYPES = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_GRAPH = 7


def is_onnx(data: bytes) -> bool:
    """Whether bytes are an ONNX model, or the beginning of one, told by the fields that only such a message has."""
    position, seen = 0, set()
    while position < len(data):
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if _WIRE_TYPES.get(number) != wire:
            return False
        value, position = _varint(data, position)
        seen.add(number)
        if wire == 2:
            position += value
    return _GRAPH in seen


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position] if position < len(data) else 0
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            break
    return value, position
