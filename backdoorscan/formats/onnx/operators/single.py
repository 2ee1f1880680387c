"""Operators on values without an axis for the images: what a file that means one image at a time computes of it.

Such values are single numbers or small arrays that a rule decides by, and few operators make rules. The network keeps
an axis for the images in front of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from backdoorscan.formats.building.batch import BATCH
from backdoorscan.formats.building.values import Const, Operand, Value
from backdoorscan.formats.onnx.calls import NodeCall
from backdoorscan.formats.onnx.operators import activations, arithmetic, constants, shaping

_MIXED = "It joins a value made for one image with one made for many."

_OVER_AXES = ("Reduce", "Arg")

_ELEMENTWISE: Mapping[str, Callable[[NodeCall], Operand]] = {
    **{op: function for op, function in arithmetic.OPERATORS.items() if not op.startswith(_OVER_AXES)},
    **{op: constants.OPERATORS[op] for op in ("Cast", "CastLike", "Identity")},
    **{op: activations.OPERATORS[op] for op in ("Relu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "LeakyRelu")},
}


def is_single(operand: Operand | None) -> bool:
    """Whether a value has no axis for the images in the file."""
    return isinstance(operand, Value) and operand.single


def run_single(call: NodeCall) -> Operand | None:
    """Add a node one of whose inputs is single, or return ``None`` where there is no rule for its operator.

    Raises:
        UnsupportedModelError: Its inputs do not fit together.
    """
    if call.node.op in _ELEMENTWISE:
        whole = [operand for operand in call.operands if isinstance(operand, Value) and not operand.single]
        result = _ELEMENTWISE[call.node.op](replace(call, operands=_aligned(call, whole)))
        return result if whole else _single(result)
    value = call.operands[0]
    if not isinstance(value, Value) or not value.single:
        return None
    if call.node.op.startswith(_OVER_AXES):
        return arithmetic.OPERATORS[call.node.op](call)
    if call.node.op in ("Squeeze", "Unsqueeze", "Reshape", "Flatten"):
        return _reshaped(call, value)
    return _picked(call, value) if call.node.op == "Gather" else None


def _single(operand: Operand) -> Operand:
    return replace(operand, single=True) if isinstance(operand, Value) else operand


def _aligned(call: NodeCall, whole: Sequence[Value]) -> list[Operand | None]:
    """The operands with as many axes behind that of the images as broadcasting in the file gives them."""
    if any(value.shape[0] != BATCH for value in whole):
        raise call.unsupported(_MIXED)
    ranks = [len(operand.shape) - is_single(operand) for operand in call.operands if operand is not None]
    rank = max(ranks)
    aligned: list[Operand | None] = []
    for operand in call.operands:
        if isinstance(operand, Value) and operand.single:
            own = list(operand.shape[1:])
            sizes = [1] * (rank - len(own)) + own
            if whole and (sizes.pop(0) != 1 or any(len(value.shape) != rank for value in whole)):
                raise call.unsupported(_MIXED)
            operand = _with_sizes(call, operand, sizes)
        aligned.append(operand)
    return aligned


def _with_sizes(call: NodeCall, value: Value, sizes: Sequence[int]) -> Operand:
    return value if list(value.shape[1:]) == list(sizes) else call.call(torch.reshape, value, (-1, *sizes))


def _reshaped(call: NodeCall, value: Value) -> Operand:
    """What the operator makes of the sizes without the images: found on a constant of that shape."""
    stand_in = Const(torch.zeros(value.shape[1:]))
    result = shaping.OPERATORS[call.node.op](replace(call, operands=[stand_in, *call.operands[1:]]))
    if isinstance(result, list):
        raise call.unsupported(_MIXED)
    return _single(_with_sizes(call, value, result.shape))


def _picked(call: NodeCall, value: Value) -> Operand:
    index = call.constant(1).tensor
    axis = call.axis(call.integer("axis", 0), len(value.shape) - 1) + 1
    length = value.shape[axis]
    if index.ndim > 1 or index.is_floating_point() or bool(((index < -length) | (index >= length)).any()):
        raise call.unsupported(f"It looks up places that an axis of {length} does not have.")
    where = index % length
    if where.ndim == 0:
        return _single(call.call(torch.select, value, axis, int(where)))
    return _single(call.call(torch.index_select, value, axis, Const(where)))
