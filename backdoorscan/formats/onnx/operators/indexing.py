"""Operators that pick parts of a value, or put something around it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.nn import functional

from backdoorscan.formats.building.batch import BATCH, holds
from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall

_MIXED = "It picks images out of a batch."


def _gather(call: NodeCall) -> Operand:
    operand, index = call.operand(0), call.constant(1)
    axis = call.axis(call.integer("axis", 0), len(operand.shape))
    length = operand.shape[axis]
    where = index.tensor
    if isinstance(operand, Value) and holds(length):
        if call.one_by_one and axis == 0 and length == BATCH and where.ndim < 2 and where.tolist() in (0, [0]):
            # The first image of a batch is the only one, where images are run one by one.
            return replace(operand, single=True) if where.ndim == 0 else operand
        raise call.unsupported(_MIXED)
    if where.is_floating_point() or bool(((where < -length) | (where >= length)).any()):
        raise call.unsupported(f"It looks up places that an axis of {length} does not have.")
    where = where % length if length else where
    if where.ndim == 0:
        return call.call(torch.select, operand, axis, int(where))
    picked = call.call(torch.index_select, operand, axis, Const(where.reshape(-1)))
    if where.ndim == 1:
        return picked
    sizes = tuple(-1 if holds(size) else size for size in operand.shape)
    return call.call(torch.reshape, picked, (*sizes[:axis], *where.shape, *sizes[axis + 1 :]))


def _slice(call: NodeCall) -> Operand:
    operand = call.operand(0)
    starts, ends = call.either("starts", 1), call.either("ends", 2)
    rank = len(operand.shape)
    axes = call.either("axes", 3) or list(range(len(starts or [])))
    steps = call.numbers(4) or [1] * len(axes)
    if starts is None or ends is None or not len(starts) == len(ends) == len(axes) == len(steps):
        raise call.unsupported("It does not say what it cuts out.")
    cuts = [slice(None)] * rank
    turned = []
    for start, end, given, step in zip(starts, ends, axes, steps, strict=True):
        axis = call.axis(given, rank)
        length = operand.shape[axis]
        if holds(length):
            least = 1 if call.one_by_one else call.builder.parsed.input.batch or length
            if step != 1 or start != 0 or end < least:
                raise call.unsupported(_MIXED)
        elif step > 0:
            first, last, _ = slice(start, end, step).indices(length)
            cuts[axis] = slice(first, last, step)
        elif step == -1 and range(length)[start:end:step] == range(length)[::-1]:
            turned.append(axis)
        else:
            raise call.unsupported("It cuts out from the end to the beginning.")
    if turned:
        operand = call.call(torch.flip, operand, tuple(turned))
    while cuts and cuts[-1] == slice(None):
        cuts.pop()
    whole = all(cut in (slice(None), slice(0, size, 1)) for cut, size in zip(cuts, operand.shape, strict=False))
    return operand if whole else call.call(operator.getitem, operand, tuple(cuts))


def _pad(call: NodeCall) -> Operand:
    operand, mode = call.operand(0), call.text("mode", "constant")
    rank = len(operand.shape)
    pads = call.either("pads", 1)
    axes = [call.axis(axis, rank) for axis in call.numbers(3) or range(rank)]
    if pads is None or len(pads) != 2 * len(axes):
        raise call.unsupported(f"It pads {rank} axes by {pads}.")
    amounts = [(0, 0)] * rank
    for position, axis in enumerate(axes):
        amounts[axis] = (pads[position], pads[position + len(axes)])
        if holds(operand.shape[axis]) and any(amounts[axis]):
            raise call.unsupported("It adds images to a batch.")
    if not any(map(any, amounts)):
        return operand
    fill = 0.0
    if call.opset < 11:
        fill = call.number("value", 0.0)
    elif call.optional(2) is not None:
        fill = float(call.constant(2).tensor)
    around = [amount for pair in reversed(amounts) for amount in pair]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise call.unsupported(f"It pads by '{mode[:40]}'.")
    if mode == "constant":
        return call.call(functional.pad, operand, tuple(around), value=fill)
    return call.call(functional.pad, operand, tuple(around[: 2 * (rank - 2)]), mode=modes[mode])


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {"Gather": _gather, "Slice": _slice, "Pad": _pad}
