"""Operators that change the shape or the order of axes, join and repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from backdoorscan.formats.building.batch import BATCH, holds, reshaped, shown
from backdoorscan.formats.building.values import Const, Operand, Value, permuted
from backdoorscan.formats.pt2.calls import DYNAMIC, NodeCall

_MIXED = "It does not treat every image by itself."


def reshape_to(call: NodeCall, operand: Operand, target: Sequence[int]) -> Operand:
    """Reshape; ``target`` may hold one -1, and may have a fixed number of images worked into it."""
    if isinstance(operand, Const):
        if any(map(holds, target)):
            raise call.unsupported(_MIXED, DYNAMIC)
        return operand.reshaped(tuple(target))
    shape = reshaped(operand.shape, target, call.builder.parsed.fixed)
    if shape is None:
        raise call.unsupported(f"{_MIXED} It reshapes {shown(operand.shape)} to {shown(target)}.", DYNAMIC)
    if shape == operand.shape:
        return operand
    if len(shape) == 2 < len(operand.shape) and shape[0] == operand.shape[0] == BATCH:
        return call.one(torch.flatten, operand, 1)
    return call.one(torch.reshape, operand, tuple(-1 if holds(size) else size for size in shape))


def _view(call: NodeCall) -> Operand:
    if "dtype" in call.arguments:
        raise call.unsupported("It looks at the bits of numbers.")
    name = "shape" if "shape" in call.arguments else "size"
    return reshape_to(call, call.operand("self"), call.integers(name))


def _flatten(call: NodeCall) -> Operand:
    operand = call.operand("self")
    rank = len(operand.shape)
    if rank == 0:
        return reshape_to(call, operand, [1])
    start, end = call.axis("start_dim", rank, 0), call.axis("end_dim", rank, -1)
    if start > end:
        raise call.unsupported("Its first axis is behind its last.")
    middle = operand.shape[start : end + 1]
    return reshape_to(call, operand, [*operand.shape[:start], math.prod(middle), *operand.shape[end + 1 :]])


def _unflatten(call: NodeCall) -> Operand:
    operand, sizes = call.operand("self"), call.integers("sizes")
    axis = call.axis("dim", len(operand.shape))
    known = math.prod(size for size in sizes if size != -1)
    sizes = [operand.shape[axis] // max(known, 1) if size == -1 else size for size in sizes]
    return reshape_to(call, operand, [*operand.shape[:axis], *sizes, *operand.shape[axis + 1 :]])


def _squeeze(call: NodeCall) -> Operand:
    operand = call.operand("self")
    rank = len(operand.shape)
    axes = [axis % rank for axis in call.integers("dim")] if "dim" in call.arguments else range(rank)
    return reshape_to(call, operand, [s for axis, s in enumerate(operand.shape) if axis not in axes or s != 1])


def _unsqueeze(call: NodeCall) -> Operand:
    operand = call.operand("self")
    axis = call.axis("dim", len(operand.shape) + 1)
    return reshape_to(call, operand, [*operand.shape[:axis], 1, *operand.shape[axis:]])


def _permuted(call: NodeCall, operand: Operand, order: tuple[int, ...]) -> Operand:
    if sorted(order) != list(range(len(operand.shape))):
        raise call.unsupported(f"It permutes {len(operand.shape)} axes by {list(order)}.")
    return permuted(operand, order, lambda value, both: call.one(torch.permute, value, both))


def _permute(call: NodeCall) -> Operand:
    operand = call.operand("self")
    rank = max(len(operand.shape), 1)
    return _permuted(call, operand, tuple(axis % rank for axis in call.integers("dims")))


def _transpose(call: NodeCall) -> Operand:
    operand = call.operand("self")
    rank = len(operand.shape)
    order = list(range(rank))
    if rank > 1 or ".t." not in call.node.target:
        first, second = (0, 1) if ".t." in call.node.target else (call.axis("dim0", rank), call.axis("dim1", rank))
        order[first], order[second] = order[second], order[first]
    return _permuted(call, operand, tuple(order))


def expanded(call: NodeCall, operand: Operand, sizes: Sequence[int]) -> Operand:
    """Broadcast to sizes, among which -1 keeps one and which may hold the number of images."""
    added = len(sizes) - len(operand.shape)
    own = [1] * added + list(operand.shape)
    if added < 0:
        raise call.unsupported(f"It broadcasts {shown(operand.shape)} to {shown(sizes)}.")
    target: list[int] = []
    for wanted, size in zip(sizes, own, strict=True):
        fixed = holds(size) and size // BATCH * (call.builder.parsed.fixed or 0) == wanted
        target.append(size if wanted in (-1, size) or fixed else wanted)
        if size not in (1, target[-1]):
            raise call.unsupported(f"It broadcasts {shown(operand.shape)} to {shown(sizes)}.", DYNAMIC)
    if target == list(operand.shape):
        return operand
    plain = [-1 if holds(size) and holds(before) else size for size, before in zip(target, own, strict=True)]
    result = call.one(torch.Tensor.expand, operand, tuple(plain))
    if isinstance(operand, Const) and isinstance(result, Const):
        call.builder.unexpanded[id(result)] = (operand, result)
    return result


def _expand(call: NodeCall) -> Operand:
    return expanded(call, call.operand("self"), call.integers("size"))


def _repeat(call: NodeCall) -> Any:
    operand, repeats = call.operand("self"), call.integers("repeats")
    if not any(map(holds, repeats)):
        return call.call(torch.tile, operand, tuple(repeats)) if len(repeats) >= len(operand.shape) else call.plain()
    own = [1] * (len(repeats) - len(operand.shape)) + list(operand.shape)
    if len(own) != len(repeats) or any(holds(times) and size != 1 for times, size in zip(repeats, own, strict=True)):
        raise call.unsupported(_MIXED, DYNAMIC)
    return expanded(call, operand, [times if size == 1 else size for times, size in zip(repeats, own, strict=True)])


def _cat(call: NodeCall) -> Any:
    parts = call.arguments.get("tensors")
    if not isinstance(parts, tuple) or not parts or not all(isinstance(part, Const | Value) for part in parts):
        raise call.unsupported("It does not join tensors.")
    axis = call.axis("dim", len(parts[0].shape), 0)
    values = [part for part in parts if isinstance(part, Value)]
    if values:
        parts = tuple(_widened(call, part, values[0].shape, axis) for part in parts)
    return call.call(torch.cat, parts, dim=axis)


def _widened(call: NodeCall, part: Operand, sizes: tuple[int, ...], axis: int) -> Operand:
    """A constant made for the file's own number of images, such as a class token, made for any."""
    if isinstance(part, Value) or len(part.shape) != len(sizes):
        return part
    place = next((place for place, size in enumerate(sizes) if holds(size) and place != axis), None)
    if place is None or part.shape[place] not in (1, call.builder.parsed.fixed):
        return part
    wide = [sizes[place] if axis == place else size for axis, size in enumerate(part.shape)]
    # The array of the file that it was repeated from, if it was, so that the network's own tensor stays trainable.
    before = call.builder.unexpanded.get(id(part), (part, part))[0]
    if before.shape == tuple(1 if axis == place else size for axis, size in enumerate(part.shape)):
        return expanded(call, before, wide)
    first = part.tensor.narrow(place, 0, 1)
    if not torch.equal(first.expand_as(part.tensor), part.tensor):
        raise call.unsupported("It treats the images of a batch differently.", DYNAMIC)
    return expanded(call, Const(first), wide)


def _slice(call: NodeCall) -> Any:
    operand = call.operand("self")
    axis = call.axis("dim", len(operand.shape), 0)
    length, step = operand.shape[axis], call.integer("step", 1)
    bounds = [call.arguments.get("start"), call.arguments.get("end")]
    start, stop, _ = slice(*bounds).indices(length)
    if (start, stop, step) == (0, length, 1):
        return operand
    if holds(length) or any(map(holds, (start, stop))):
        raise call.unsupported(_MIXED, DYNAMIC)
    return call.call(torch.narrow, operand, axis, start, max(stop - start, 0)) if step == 1 else call.plain()


OPERATORS: Mapping[str, Callable[[NodeCall], Any]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_copy", "_reshape_copy"), _view),
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "permute": _permute,
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose),
    "expand": _expand,
    "repeat": _repeat,
    **dict.fromkeys(("cat", "concat"), _cat),
    "slice": _slice,
}
