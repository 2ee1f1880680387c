"""Layers that merge several values into one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from backdoorscan.formats.keras.calls import LayerCall, Value
from backdoorscan.formats.keras.spec import Shape

Merge = Callable[[LayerCall, list[Value]], Value]


def broadcast_shape(call: LayerCall, values: list[Value]) -> Shape:
    """The shape that values of one rank have together."""
    shapes = [value.shape for value in values]
    if len({len(shape) for shape in shapes}) != 1:
        raise call.fields.unsupported(f"Its inputs differ in rank: {shapes}.")
    result: list[int | None] = []
    for sizes in zip(*shapes, strict=True):
        wide = {size for size in sizes if size != 1}
        if len(wide - {None}) > 1:
            raise call.fields.unsupported(f"Its inputs do not fit together: {shapes}.")
        known = wide - {None}
        result.append(known.pop() if known else None if wide else 1)
    return tuple(result)


def _same_rank(call: LayerCall, values: list[Value]) -> list[Value]:
    """Keras lets values of a lower rank grow axes of size 1 behind the batch."""
    rank = max(len(value.shape) for value in values)
    grown = []
    for value in values:
        if len(value.shape) < rank:
            missing = rank - len(value.shape)
            value = call.to_file_order(value)
            for _ in range(missing):
                value = call.method(value, "unsqueeze", 1, shape=(1, *value.shape))
            value = call.from_file_order(value)
        grown.append(value)
    return grown


def pairwise(function: Callable[..., Tensor]) -> Merge:
    """A merge that goes from left to right."""

    def merge(call: LayerCall, values: list[Value]) -> Value:
        values = _same_rank(call, values)
        return reduce(lambda a, b: call.function(function, a, b, shape=broadcast_shape(call, [a, b])), values)

    return merge


def _subtract(call: LayerCall, values: list[Value]) -> Value:
    if len(values) != 2:
        raise call.fields.unsupported(f"It subtracts {len(values)} values.")
    return pairwise(torch.sub)(call, values)


def _average(call: LayerCall, values: list[Value]) -> Value:
    total = pairwise(torch.add)(call, values)
    return call.function(torch.div, total, len(values), shape=total.shape)


def _concatenate(call: LayerCall, values: list[Value]) -> Value:
    axes = call.fields.integers("axis", -1)
    axis = call.axis(values[0], axes[0])
    shapes = [value.shape for value in values]
    rest = {(*shape[: axis - 1], *shape[axis:]) for shape in shapes if None not in shape}
    if len(axes) != 1 or len({len(shape) for shape in shapes}) != 1 or len(rest) > 1:
        raise call.fields.unsupported(f"Its inputs do not fit together: {shapes}.")
    sizes = [shape[axis - 1] for shape in shapes]
    size = None if None in sizes else reduce(operator.add, [s for s in sizes if s is not None])
    shape = (*shapes[0][: axis - 1], size, *shapes[0][axis:])
    return call.function(torch.cat, values, call.dim(len(shape), axis), shape=shape)


LAYERS: Mapping[str, Merge] = {
    "Add": pairwise(torch.add),
    "Subtract": _subtract,
    "Multiply": pairwise(torch.mul),
    "Average": _average,
    "Maximum": pairwise(torch.maximum),
    "Minimum": pairwise(torch.minimum),
    "Concatenate": _concatenate,
}
