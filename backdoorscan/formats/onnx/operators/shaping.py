"""Operators that change the shape or the order of axes, join and repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from backdoorscan.formats.building.batch import BATCH, holds, reshaped, shown
from backdoorscan.formats.building.values import Const, Operand, Value, permuted
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators.constants import expanded

_MIXED = "It does not treat every image by itself."
_DYNAMIC = "If the network was exported for a fixed number of images, export it with a dynamic batch."


def reshape_to(call: NodeCall, operand: Operand, target: Sequence[int]) -> Operand:
    """Reshape; ``target`` may hold one -1, and may have a fixed number of images worked into it."""
    if isinstance(operand, Const):
        return operand.reshaped(tuple(target))
    shape = reshaped(operand.shape, target, call.builder.parsed.input.batch)
    if shape is None and call.one_by_one and operand.shape[0] == operand.meta.numel() and math.prod(target) in (1, -1):
        # One number for the image: the condition of a rule.
        result = call.call(torch.reshape, operand, (-1, *[1] * len(target)))
        return replace(result, single=True) if isinstance(result, Value) else result
    if shape is None:
        raise call.unsupported(f"{_MIXED} It reshapes {shown(operand.shape)} to {shown(target)}.", _DYNAMIC)
    if shape == operand.shape:
        return operand
    if len(shape) == 2 < len(operand.shape) and shape[0] == operand.shape[0] == BATCH:
        return call.call(torch.flatten, operand, 1)
    return call.call(torch.reshape, operand, tuple(-1 if holds(size) else size for size in shape))


def flattened(call: NodeCall, value: Operand, axis: int) -> Operand:
    """Make a matrix: the axes before ``axis`` together, and the others."""
    sizes = [1, 1]
    for position, size in enumerate(value.shape):
        sizes[position >= axis] *= size
    return reshape_to(call, value, sizes)


def _reshape(call: NodeCall) -> Operand:
    operand, target = call.operand(0), call.either("shape", 1)
    if target is None:
        raise call.unsupported("It does not say to what shape.")
    if not call.integer("allowzero", 0):
        if any(size == 0 and axis >= len(operand.shape) for axis, size in enumerate(target)):
            raise call.unsupported(f"It reshapes {shown(operand.shape)} to {target}.")
        target = [size or operand.shape[axis] for axis, size in enumerate(target)]
    return reshape_to(call, operand, target)


def _flatten(call: NodeCall) -> Operand:
    operand, axis = call.operand(0), call.integer("axis", 1)
    rank = len(operand.shape)
    return flattened(call, operand, rank if axis == rank else call.axis(axis, rank))


def _transpose(call: NodeCall) -> Operand:
    operand = call.operand(0)
    order = tuple(call.integers("perm") or reversed(range(len(operand.shape))))
    if sorted(order) != list(range(len(operand.shape))):
        raise call.unsupported(f"It permutes {len(operand.shape)} axes by {list(order)}.")
    return permuted(operand, order, lambda value, both: call.call(torch.permute, value, both))


def _squeeze(call: NodeCall) -> Operand:
    operand, axes = call.operand(0), call.either("axes", 1)
    rank = len(operand.shape)
    if axes is None:
        gone = {axis for axis, size in enumerate(operand.shape) if size == 1}
    else:
        gone = {call.axis(axis, rank) for axis in axes}
    if gone and operand.meta.numel() == operand.shape[0] == BATCH and len(gone) == rank and call.one_by_one:
        return reshape_to(call, operand, [])
    if any(operand.shape[axis] != 1 for axis in gone):
        raise call.unsupported(f"It takes away axes {sorted(gone)} of {shown(operand.shape)}.", _DYNAMIC)
    return reshape_to(call, operand, [size for axis, size in enumerate(operand.shape) if axis not in gone])


def _unsqueeze(call: NodeCall) -> Operand:
    operand, axes = call.operand(0), call.either("axes", 1)
    rank = len(operand.shape) + len(axes or [])
    added = {call.axis(axis, rank) for axis in axes or []}
    if len(added) != len(axes or []):
        raise call.unsupported(f"It adds the axes {axes}.")
    rest = iter(operand.shape)
    return reshape_to(call, operand, [1 if axis in added else next(rest) for axis in range(rank)])


def _concat(call: NodeCall) -> Operand:
    parts = [call.operand(index) for index in range(len(call.operands))]
    rank, count = len(parts[0].shape), call.builder.parsed.input.batch or 1
    axis = call.axis(call.integer("axis", 1), rank)
    if all(isinstance(part, Const) for part in parts):
        return call.call(torch.cat, parts, dim=axis)
    sizes = next(part.shape for part in parts if isinstance(part, Value))
    widened = []
    for part in parts:
        # A constant made for the file's own number of images, such as the class token of a transformer.
        if isinstance(part, Const) and len(part.shape) == rank:
            wide = [
                wanted if holds(wanted) and size in (1, count) and place != axis else size
                for place, (size, wanted) in enumerate(zip(part.shape, sizes, strict=True))
            ]
            if wide != list(part.shape):
                part = _first_repeated(call, part, wide)
        widened.append(part)
    return call.call(torch.cat, widened, dim=axis)


def _first_repeated(call: NodeCall, part: Const, wide: list[int]) -> Operand:
    """Give every image what all images of the file get."""
    for axis, (size, wanted) in enumerate(zip(part.shape, wide, strict=True)):
        if size != wanted and size > 1:
            first = part.tensor.narrow(axis, 0, 1)
            if not torch.equal(first.expand_as(part.tensor), part.tensor):
                raise call.unsupported("It treats the images of a batch differently.", _DYNAMIC)
            part = Const(first)
    return expanded(call, part, wide)


def _split(call: NodeCall) -> list[Operand]:
    operand = call.operand(0)
    axis = call.axis(call.integer("axis", 0), len(operand.shape))
    length, parts = operand.shape[axis], len(call.node.outputs)
    sizes = call.either("split", 1)
    if holds(length):
        raise call.unsupported(_MIXED, _DYNAMIC)
    if sizes is None:
        each = -(-length // parts)
        sizes = [min(each, length - each * index) for index in range(parts)]
    if len(sizes) != parts or min(sizes) < 0 or sum(sizes) != length:
        raise call.unsupported(f"It splits {length} into {sizes}.")
    starts = [sum(sizes[:index]) for index in range(parts)]
    return [call.call(torch.narrow, operand, axis, start, size) for start, size in zip(starts, sizes, strict=True)]


def _tile(call: NodeCall) -> Operand:
    operand, repeats = call.operand(0), call.numbers(1)
    if repeats is None or len(repeats) != len(operand.shape) or min(repeats, default=1) < 1:
        raise call.unsupported(f"It repeats {shown(operand.shape)} by {repeats}.")
    if any(holds(times) for times in repeats):
        wide = [size if times == 1 else times for size, times in zip(operand.shape, repeats, strict=True)]
        return expanded(call, operand, wide)
    if all(times == 1 for times in repeats):
        return operand
    return call.call(torch.tile, operand, tuple(repeats))


OPERATORS: Mapping[str, Callable[[NodeCall], Operand | list[Operand]]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Tile": _tile,
}
