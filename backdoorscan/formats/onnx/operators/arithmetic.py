"""Arithmetic and comparisons element by element, and reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from backdoorscan.formats.building.batch import BATCH
from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[NodeCall], Operand]:
    return lambda call: call.call(function, call.operand(0))


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[NodeCall], Operand]:
    return lambda call: call.call(function, call.operand(0), call.operand(1))


def _plain(operand: Operand, other: Operand) -> Any:
    """A single float as a number, so that the graph reads like the code it came from."""
    if not isinstance(operand, Const) or isinstance(other, Const) or len(operand.shape) > len(other.shape):
        return operand
    if operand.tensor.numel() == 1 and operand.tensor.is_floating_point():
        return float(operand.tensor)
    return operand


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[NodeCall], Operand]:
    def operator(call: NodeCall) -> Operand:
        if call.integer("broadcast", 0):
            raise call.unsupported("It broadcasts by the rules of opset 6.")
        left, right = call.operand(0), call.operand(1)
        if function in (torch.add, torch.mul) and isinstance(left, Const):
            left, right = right, left
        return call.call(function, left, _plain(right, left))

    return operator


def _div(call: NodeCall) -> Operand:
    left, right = call.operand(0), call.operand(1)
    if not left.meta.is_floating_point() and not right.meta.is_floating_point():
        return call.call(torch.div, left, right, rounding_mode="trunc")
    return _binary(torch.div)(call)


def _mod(call: NodeCall) -> Operand:
    return _pair(torch.fmod if call.integer("fmod", 0) else torch.remainder)(call)


def _pow(call: NodeCall) -> Operand:
    base, exponent = call.operand(0), call.operand(1)
    plain = _plain(exponent, base)
    return call.call(torch.square, base) if plain == 2.0 else call.call(torch.pow, base, plain)


def _folded(function: Callable[[Tensor, Tensor], Tensor], *, mean: bool = False) -> Callable[[NodeCall], Operand]:
    def operator(call: NodeCall) -> Operand:
        operands = [call.operand(index) for index in range(len(call.operands))]
        total = reduce(lambda left, right: call.call(function, left, right), operands)
        return call.call(torch.div, total, float(len(operands))) if mean else total

    return operator


def _where(call: NodeCall) -> Operand:
    return call.call(torch.where, call.operand(0), call.operand(1), call.operand(2))


def _reduction(function: Callable[..., Tensor], since: int) -> Callable[[NodeCall], Operand]:
    """``since``: the opset from which the axes are an input."""

    def operator(call: NodeCall) -> Operand:
        value = call.operand(0)
        ours = isinstance(value, Value) and value.single
        rank = len(value.shape) - ours
        axes = call.numbers(1) if call.opset >= since else call.integers("axes")
        keep = bool(call.integer("keepdims", 1))
        if not axes:
            if call.integer("noop_with_empty_axes", 0):
                return value
            axes = list(range(rank))
        dims = tuple(sorted({call.axis(axis, rank) + ours for axis in axes}))
        # A rule that makes one number of a batch means the only image in it.
        over_images = call.one_by_one and not ours and value.shape[:1] == (BATCH,) and len(dims) == rank
        if over_images:
            dims = dims[1:]
        if not dims:
            value, dims, keep = call.call(torch.unsqueeze, value, len(value.shape)), (len(value.shape),), False
        result = call.call(function, value, dim=dims, keepdim=keep)
        single = ours or (over_images and not keep)
        return replace(result, single=True) if single and isinstance(result, Value) else result

    return operator


def product(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """The product over several axes."""
    for axis in reversed(dim):
        x = torch.prod(x, axis, keepdim)
    return x


def _place(function: Callable[..., Tensor]) -> Callable[[NodeCall], Operand]:
    def operator(call: NodeCall) -> Operand:
        value = call.operand(0)
        if call.integer("select_last_index", 0):
            raise call.unsupported("Of equal values it takes the last.")
        ours = isinstance(value, Value) and value.single
        axis = call.axis(call.integer("axis", 0), len(value.shape) - ours) + ours
        result = call.call(function, value, dim=axis, keepdim=bool(call.integer("keepdims", 1)))
        return replace(result, single=True) if ours and isinstance(result, Value) else result

    return operator


OPERATORS: Mapping[str, Callable[[NodeCall], Operand]] = {
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _div,
    "Pow": _pow,
    "Mod": _mod,
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Sum": _folded(torch.add),
    "Mean": _folded(torch.add, mean=True),
    "Sqrt": _unary(torch.sqrt),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Neg": _unary(torch.neg),
    "Abs": _unary(torch.abs),
    "Reciprocal": _unary(torch.reciprocal),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Floor": _unary(torch.floor),
    "Ceil": _unary(torch.ceil),
    "Round": _unary(torch.round),
    "Sign": _unary(torch.sign),
    "Not": _unary(torch.logical_not),
    "And": _pair(torch.logical_and),
    "Or": _pair(torch.logical_or),
    "Xor": _pair(torch.logical_xor),
    "Equal": _pair(torch.eq),
    "Greater": _pair(torch.gt),
    "GreaterOrEqual": _pair(torch.ge),
    "Less": _pair(torch.lt),
    "LessOrEqual": _pair(torch.le),
    "Where": _where,
    "ReduceMean": _reduction(torch.mean, 18),
    "ReduceSum": _reduction(torch.sum, 13),
    "ReduceMax": _reduction(torch.amax, 18),
    "ReduceMin": _reduction(torch.amin, 18),
    "ReduceL2": _reduction(torch.linalg.vector_norm, 18),
    "ArgMax": _place(torch.argmax),
    "ArgMin": _place(torch.argmin),
    "ReduceProd": _reduction(product, 18),
}
